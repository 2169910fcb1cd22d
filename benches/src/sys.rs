//! What needs `unsafe`: guest memory that another process writes, the time-stamp counter, signals, a child's last will.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicU64, Ordering};

use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

const HUGE: u64 = 2 << 20;

/// A guest's memory: a memfd, shared with a switch. Every access is atomic, in bounds and aligned, or it panics.
#[derive(Debug)]
pub struct Memory {
    map: MmapRaw,
    file: File,
    /// Whether it lies in hugepages.
    pub is_huge: bool,
}

impl Memory {
    /// At least `bytes` of zeros, in hugepages if there are enough of them.
    pub fn new(bytes: u64) -> io::Result<Memory> {
        let bytes = bytes.next_multiple_of(HUGE);
        let huge = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
        match Memory::with(bytes, huge, true) {
            Ok(memory) => Ok(memory),
            Err(_) => Memory::with(bytes, MemfdFlags::CLOEXEC, false),
        }
    }

    fn with(bytes: u64, flags: MemfdFlags, is_huge: bool) -> io::Result<Memory> {
        let file = File::from(memfd_create("gangway-null-guest", flags)?);
        ftruncate(&file, bytes)?;
        // Reserves hugepages or fails; a later access does not.
        let map = MmapOptions::new().len(bytes as usize).map_raw(&file)?;
        Ok(Memory { map, file, is_huge })
    }

    /// Its size.
    pub fn bytes(&self) -> u64 {
        self.map.len() as u64
    }

    /// Where it lies in this process: the front-end's "user address".
    pub fn user_addr(&self) -> u64 {
        self.map.as_mut_ptr() as u64
    }

    /// What it lies in.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// What the switch maps.
    pub fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    #[inline(always)]
    fn at(&self, offset: usize, size: usize) -> *mut u8 {
        assert!(offset.is_multiple_of(size) && offset < self.map.len());
        // SAFETY: within the mapping: `offset` and the length are multiples of `size`, and `offset` is less.
        unsafe { self.map.as_mut_ptr().add(offset) }
    }

    /// The 16-bit word at `offset`.
    #[inline(always)]
    pub fn u16(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: in bounds and aligned (`at`; the mapping itself is page-aligned), mapped as long as `self`, and the
        // switch's accesses are in another process, which the language can't see: atomics are the honest type.
        unsafe { AtomicU16::from_ptr(self.at(offset, 2).cast()) }
    }

    /// The 32-bit word at `offset`.
    #[inline(always)]
    pub fn u32(&self, offset: usize) -> &AtomicU32 {
        // SAFETY: as above.
        unsafe { AtomicU32::from_ptr(self.at(offset, 4).cast()) }
    }

    /// The 64-bit word at `offset`.
    #[inline(always)]
    pub fn u64(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: as above.
        unsafe { AtomicU64::from_ptr(self.at(offset, 8).cast()) }
    }

    /// `n` 32-bit words from `offset` on: bounds are checked once for all.
    #[inline(always)]
    pub fn u32s(&self, offset: usize, n: usize) -> &[AtomicU32] {
        assert!(offset + 4 * n <= self.map.len());
        // SAFETY: in bounds (just checked) and aligned (`at`); shared access by atomics only, as above.
        unsafe { std::slice::from_raw_parts(self.at(offset, 4).cast(), n) }
    }

    /// `n` 64-bit words from `offset` on: bounds are checked once for all.
    #[inline(always)]
    pub fn u64s(&self, offset: usize, n: usize) -> &[AtomicU64] {
        assert!(offset + 8 * n <= self.map.len());
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts(self.at(offset, 8).cast(), n) }
    }

    /// Fetches the cache line at `offset` for writing: one transfer between the CPUs where a read and then a write take two.
    #[inline(always)]
    pub fn fetch_to_write(&self, offset: usize) {
        let at = self.at(offset, 1);
        // SAFETY: a hint that changes nothing, on an address that is mapped; every x86-64 of the last ten years has it.
        unsafe {
            core::arch::asm!("prefetchw [{}]", in(reg) at, options(nostack, preserves_flags, readonly))
        };
    }

    /// Fetches the cache line at `offset`.
    #[inline(always)]
    pub fn fetch(&self, offset: usize) {
        let at = self.at(offset, 1);
        // SAFETY: a hint that changes nothing, on an address that is mapped; every x86-64 has it.
        unsafe {
            core::arch::asm!("prefetcht0 [{}]", in(reg) at, options(nostack, preserves_flags, readonly))
        };
    }

    /// Copies whole cache lines to another memory, with the widest stores that `wide` says the processor has.
    #[inline(always)]
    pub fn copy_lines(&self, from: usize, to: &Memory, at: usize, lines: usize, wide: Wide) {
        assert!(from + 64 * lines <= self.map.len() && at + 64 * lines <= to.map.len());
        // SAFETY: in bounds of both, which are mapped apart; the processor has what was found at the start.
        unsafe {
            let (from, to) = (self.map.as_ptr().add(from), to.map.as_mut_ptr().add(at));
            match wide {
                Wide::Avx512 => lines_avx512(from, to, lines),
                Wide::Avx2 => lines_avx2(from, to, lines),
                Wide::Any => lines_any(from, to, lines),
            }
        }
    }

    /// Writes bytes, before the switch knows of them.
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= self.map.len());
        // SAFETY: in bounds; the source is our own memory and can't overlap.
        unsafe {
            let to = self.map.as_mut_ptr().add(offset);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len());
        }
    }

    /// Reads bytes while the switch is stopped.
    pub fn read(&self, offset: usize, bytes: &mut [u8]) {
        assert!(offset + bytes.len() <= self.map.len());
        // SAFETY: in bounds; the target is our own memory and can't overlap.
        unsafe {
            let from = self.map.as_mut_ptr().add(offset);
            std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), bytes.len());
        }
    }
}

/// The widest stores of this processor.
#[derive(Debug, Clone, Copy)]
pub enum Wide {
    /// 16 bytes.
    Any,
    /// 32 bytes.
    Avx2,
    /// A cache line.
    Avx512,
}

impl Wide {
    /// What this processor has.
    pub fn here() -> Wide {
        if std::arch::is_x86_feature_detected!("avx512f") {
            Wide::Avx512
        } else if std::arch::is_x86_feature_detected!("avx2") {
            Wide::Avx2
        } else {
            Wide::Any
        }
    }
}

/// # Safety
/// `from` is readable and `to` writable for so many lines.
#[inline(always)]
unsafe fn lines_any(from: *const u8, to: *mut u8, lines: usize) {
    for i in 0..lines {
        // SAFETY: by the contract.
        unsafe { std::ptr::copy(from.add(64 * i), to.add(64 * i), 64) }
    }
}

/// # Safety
/// As [`lines_any`]; the processor has AVX2.
#[target_feature(enable = "avx2")]
unsafe fn lines_avx2(from: *const u8, to: *mut u8, lines: usize) {
    // SAFETY: by the contract.
    unsafe { lines_any(from, to, lines) }
}

/// # Safety
/// As [`lines_any`]; the processor has AVX-512.
#[target_feature(enable = "avx512f,avx512vl")]
unsafe fn lines_avx512(from: *const u8, to: *mut u8, lines: usize) {
    // SAFETY: by the contract.
    unsafe { lines_any(from, to, lines) }
}

/// The time-stamp counter: constant rate, the same on both CPUs (`constant_tsc`, `nonstop_tsc`).
#[inline(always)]
pub fn tsc() -> u64 {
    // SAFETY: every x86-64 has it, and Linux lets user space read it.
    unsafe { core::arch::x86_64::_rdtsc() }
}

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

extern "C" fn interrupt(_: libc::c_int) {
    INTERRUPTED.store(true, Ordering::Relaxed);
}

/// From now on SIGINT, SIGTERM and SIGHUP only set a flag, so that guards clean up.
pub fn on_signals() {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        let handler = interrupt as extern "C" fn(libc::c_int);
        // SAFETY: the handler stores an atomic, which is async-signal-safe.
        unsafe { libc::signal(signal, handler as libc::sighandler_t) };
    }
}

/// Whether one of them has arrived.
pub fn is_interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

/// The child is killed when the thread that starts it ends, however it ends; a terminal's signals pass it by.
pub fn dies_with_us(command: &mut Command) {
    command.process_group(0);
    let will = || {
        let kill = rustix::process::Signal::KILL;
        Ok(rustix::process::set_parent_process_death_signal(Some(
            kill,
        ))?)
    };
    // SAFETY: between fork and exec only a system call is made.
    unsafe { command.pre_exec(will) };
}
