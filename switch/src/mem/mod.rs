//! Unsafe island: memory that somebody else writes too (guest memory, mapped files), read and written by copy only.
//!
//! Invariant: nothing here hands out a reference into shared memory; a [`Seg`] can only be copied from.
#![allow(unsafe_code)]

pub mod copy;
pub mod guest;
pub mod lost;
pub mod zeros;

use std::marker::PhantomData;
use std::ptr::NonNull;

/// Asks the processor for the cache line at `at`; changes nothing.
#[inline(always)]
pub fn prefetch(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint; it never faults.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// Asks the processor for the cache line at `at`, to be written: takes it away from the other processors that have it, before
/// a store has to wait for that. (`_mm_prefetch` can't say so without a target feature.)
#[inline(always)]
pub fn prefetch_to_write(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint; it never faults. A processor of x86-64 that does not know it takes it for a `nop`.
    unsafe {
        std::arch::asm!("prefetchw [{}]", in(reg) at, options(nostack, preserves_flags, readonly));
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// Which of sixteen words are `wanted` in these `bits`, from the lowest bit on.
#[inline(always)]
pub fn which(words: &[u32; 16], bits: u32, wanted: u32) -> u16 {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::*;
        // SAFETY: every x86-64 has SSE2; `n` is at most 3, so the sixteen bytes are of the array.
        unsafe {
            let bits = _mm_set1_epi32(bits.cast_signed());
            let wanted = _mm_set1_epi32(wanted.cast_signed());
            let four = |n: usize| {
                let words = _mm_loadu_si128(words.as_ptr().cast::<__m128i>().add(n));
                _mm_cmpeq_epi32(_mm_and_si128(words, bits), wanted)
            };
            let low = _mm_packs_epi32(four(0), four(1));
            let high = _mm_packs_epi32(four(2), four(3));
            _mm_movemask_epi8(_mm_packs_epi16(low, high)) as u16
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let hit = |(i, word): (usize, &u32)| u16::from(word & bits == wanted) << i;
        words.iter().enumerate().map(hit).sum()
    }
}

/// A piece of a received frame: readable memory that outlives `'q`, the borrow of the queue it came from. Another
/// process may change its content at any time.
#[derive(Debug)]
pub struct Seg<'q> {
    ptr: NonNull<u8>,
    len: u32,
    _queue: PhantomData<&'q [u8]>,
}

impl<'q> Seg<'q> {
    /// Of memory that nobody else writes.
    pub fn from_slice(s: &'q [u8]) -> Seg<'q> {
        // A frame has at most 64 KiB and some headers.
        let len = s.len().min(u32::MAX as usize) as u32;
        Seg {
            ptr: NonNull::from(s).cast(),
            len,
            _queue: PhantomData,
        }
    }

    /// Of shared memory.
    ///
    /// # Safety
    /// `ptr..ptr + len` stays mapped and readable for `'q`.
    pub unsafe fn from_raw(ptr: NonNull<u8>, len: u32) -> Seg<'q> {
        Seg {
            ptr,
            len,
            _queue: PhantomData,
        }
    }

    /// In bytes.
    pub fn len(&self) -> usize {
        self.len as usize
    }

    /// True for no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The first byte, for the ring loops in `port::vhost`.
    pub fn as_ptr(&self) -> *const u8 {
        self.ptr.as_ptr()
    }

    /// Copies `out.len()` bytes from `offset`.
    ///
    /// # Panics
    /// If the segment is shorter: our own mistake, never a guest's.
    pub fn read(&self, offset: usize, out: &mut [u8]) {
        assert!(offset + out.len() <= self.len as usize);
        // SAFETY: in bounds (asserted); mapped for `'q` by the constructors' contract; `out` is ours alone, so the
        // two cannot overlap except where a peer maps our memory, which it cannot.
        unsafe {
            std::ptr::copy_nonoverlapping(
                self.ptr.as_ptr().add(offset),
                out.as_mut_ptr(),
                out.len(),
            )
        }
    }
}
