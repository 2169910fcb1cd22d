//! Unsafe island: a file that is truncated under our mapping of it. The kernel answers an access behind the new end with
//! SIGBUS, which ends the process: one guest's front-end could take the switch from all others. So the mappings of
//! front-ends' files are kept in a list, and a handler puts zeros where the file no longer reaches; the access goes on
//! there. The mapping is lost from then on: what reads it finds that out ([`count`], [`Watch::is_lost`]) and stops.
//!
//! Any other SIGBUS (a file of ours, a bad disk, a broken memory module, a signal that somebody sent) ends the process as
//! before.
//!
//! Invariant: the handler takes no lock, allocates nothing and calls only `mmap`, `sigaction` and `raise`.
//! Invariant: places are never freed, so that the handler can walk them at any time; they are used again. A thread that
//! faults in a mapping holds it, so its place is not being changed; one that is being changed is not the one sought.

use std::mem::MaybeUninit;
use std::ptr::{NonNull, null_mut};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Mutex, OnceLock, PoisonError};

use libc::{c_int, c_void, siginfo_t};

use super::zeros::Line;

/// One mapping that may be lost.
struct Place {
    next: *mut Place,
    /// Odd while the others change.
    turn: AtomicU64,
    start: AtomicUsize,
    /// Behind its last byte; `start` for none.
    end: AtomicUsize,
    /// What the kernel maps of it at a time.
    page: AtomicUsize,
    lost: AtomicBool,
}

/// The newest place.
static PLACES: AtomicPtr<Place> = AtomicPtr::new(null_mut());
/// Of those who change places.
static CHANGE: Mutex<()> = Mutex::new(());
/// How often something was lost. In a line that nobody writes: workers look at it in each burst.
static COUNT: Line<AtomicU64> = Line(AtomicU64::new(0));

/// `si_code` of memory that is found broken before somebody touches it (sigaction(2); the libc crate has no name for it).
const BUS_MCEERR_AO: c_int = 5;

/// How often memory was lost so far, of any mapping.
#[inline(always)]
pub fn count() -> u64 {
    COUNT.0.load(std::sync::atomic::Ordering::Acquire)
}

impl Place {
    /// Between its two ends, unless it is being changed.
    fn range(&self) -> Option<(usize, usize, usize)> {
        let turn = self.turn.load(SeqCst);
        let range = (
            self.start.load(SeqCst),
            self.end.load(SeqCst),
            self.page.load(SeqCst),
        );
        let is_whole = turn.is_multiple_of(2) && self.turn.load(SeqCst) == turn;
        is_whole.then_some(range)
    }

    fn set(&self, start: usize, end: usize, page: usize) {
        self.turn.fetch_add(1, SeqCst);
        self.start.store(start, SeqCst);
        self.end.store(end, SeqCst);
        self.page.store(page, SeqCst);
        self.lost.store(false, SeqCst);
        self.turn.fetch_add(1, SeqCst);
    }

    fn is_free(&self) -> bool {
        self.start.load(SeqCst) == self.end.load(SeqCst)
    }
}

/// All places, newest first.
fn places() -> impl Iterator<Item = &'static Place> {
    let at = |p: *mut Place| {
        // SAFETY: null, or a place, all of which were leaked by `Watch::new` and are changed through atomics only.
        unsafe { p.as_ref() }
    };
    std::iter::successors(at(PLACES.load(SeqCst)), move |p| at(p.next))
}

/// A mapping that is watched until this is dropped.
pub struct Watch(&'static Place);

impl Watch {
    /// Of `len` bytes at `start`, which the kernel maps in pieces of `page` bytes, a power of two.
    ///
    /// # Safety
    /// All of it is one mapping of somebody else's file, to which nobody has a reference, and which is unmapped only when the
    /// result was dropped.
    pub unsafe fn new(start: NonNull<u8>, len: usize, page: usize) -> Watch {
        install();
        let start = start.as_ptr() as usize;
        let _one = CHANGE.lock().unwrap_or_else(PoisonError::into_inner);
        let free = places().find(|p| p.is_free());
        let place = free.unwrap_or_else(|| {
            let place = Box::leak(Box::new(Place {
                next: PLACES.load(SeqCst),
                turn: AtomicU64::new(0),
                start: AtomicUsize::new(0),
                end: AtomicUsize::new(0),
                page: AtomicUsize::new(0),
                lost: AtomicBool::new(false),
            }));
            PLACES.store(place, SeqCst);
            place
        });
        place.set(start, start + len, page);
        Watch(place)
    }

    /// A part of it is zeros now.
    pub fn is_lost(&self) -> bool {
        self.0.lost.load(SeqCst)
    }
}

// SAFETY: a place is changed through atomics, but for `next`, which never changes.
unsafe impl Send for Watch {}
// SAFETY: as above.
unsafe impl Sync for Watch {}

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Watch").field(&self.is_lost()).finish()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let _one = CHANGE.lock().unwrap_or_else(PoisonError::into_inner);
        self.0.set(0, 0, 0);
    }
}

/// What SIGBUS did before: Rust's own handler, which names an overflown stack.
static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

/// An action of all zeros: the default one.
fn default_action() -> libc::sigaction {
    // SAFETY: integers and pointers, of which zeros are a value; `SIG_DFL` is 0.
    unsafe { MaybeUninit::zeroed().assume_init() }
}

fn install() {
    BEFORE.get_or_init(|| {
        let mut action = default_action();
        action.sa_sigaction = on_bus as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
        let mut before = default_action();
        // SAFETY: both are valid; the handler does what a handler may. It cannot fail for this signal.
        unsafe { libc::sigaction(libc::SIGBUS, &action, &mut before) };
        before
    });
}

/// The handler (sigaction(2)).
unsafe extern "C" fn on_bus(_: c_int, info: *mut siginfo_t, _: *mut c_void) {
    // SAFETY: the kernel gives a valid `info`; each thread has its `errno`, which the interrupted code may be about to read.
    unsafe {
        let errno = *libc::__errno_location();
        let code = (*info).si_code;
        match code {
            libc::BUS_ADRERR if cover((*info).si_addr() as usize) => {}
            // Memory that nobody has touched yet is broken: who touches it gets the signal that counts.
            BUS_MCEERR_AO => {}
            _ => end(code),
        }
        *libc::__errno_location() = errno;
    }
}

/// Puts zeros from the page of `at` to the end of the watched mapping that it lies in. False if there is none.
fn cover(at: usize) -> bool {
    let holds = |p: &&Place| p.range().is_some_and(|(s, e, _)| (s..e).contains(&at));
    let Some(place) = places().find(holds) else {
        return false;
    };
    let Some((start, end, page)) = place.range() else {
        return false;
    };
    let from = (at & !(page - 1)).max(start);
    // Before the zeros: who finds them knows what they are.
    place.lost.store(true, SeqCst);
    COUNT.0.fetch_add(1, SeqCst);
    let flags = libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: `from..end` is the rest of a mapping of a shared file that only copies are made of (contract of `Watch::new`);
    // it is not unmapped, since the thread that was interrupted uses it. Nothing behind a file's end is ever there to be lost.
    let zeros = unsafe {
        libc::mmap(
            from as *mut c_void,
            end - from,
            libc::PROT_READ | libc::PROT_WRITE,
            flags,
            -1,
            0,
        )
    };
    zeros != libc::MAP_FAILED
}

/// Lets the signal do what it did before; one that was sent, and no access will raise again, ends the process.
fn end(code: c_int) {
    let sent = code <= 0;
    let action = match BEFORE.get() {
        Some(before) if !sent => *before,
        _ => default_action(),
    };
    // SAFETY: a valid action; both calls are ones that a handler may make (signal-safety(7)).
    unsafe {
        libc::sigaction(libc::SIGBUS, &action, null_mut());
        if sent {
            libc::raise(libc::SIGBUS);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use memmap2::{MmapOptions, MmapRaw};
    use std::fs::File;
    use std::os::unix::process::ExitStatusExt;

    const PAGE: usize = 4096;

    fn mapped(pages: usize) -> (File, MmapRaw) {
        let file = tempfile::tempfile().unwrap();
        file.set_len((pages * PAGE) as u64).unwrap();
        let map = MmapOptions::new().map_raw(&file).unwrap();
        (file, map)
    }

    fn watch(map: &MmapRaw) -> Watch {
        let start = NonNull::new(map.as_mut_ptr()).unwrap();
        // SAFETY: a mapping that outlives the result in each test.
        unsafe { Watch::new(start, map.len(), PAGE) }
    }

    fn read(map: &MmapRaw, at: usize) -> u8 {
        assert!(at < map.len());
        // SAFETY: within the mapping.
        unsafe { map.as_ptr().add(at).read_volatile() }
    }

    fn write(map: &MmapRaw, at: usize, byte: u8) {
        assert!(at < map.len());
        // SAFETY: within the mapping.
        unsafe { map.as_mut_ptr().add(at).write_volatile(byte) }
    }

    #[test]
    fn what_a_file_no_longer_reaches_is_zeros_and_said_to_be_lost() {
        let (file, map) = mapped(8);
        let (_other_file, other) = mapped(8);
        let (one, two) = (watch(&map), watch(&other));
        for page in 0..8 {
            write(&map, page * PAGE + 1, 7);
        }
        file.set_len(3 * PAGE as u64).unwrap();
        let before = count();
        assert_eq!((read(&map, 1), one.is_lost()), (7, false));
        // In the middle: what is before it is there still, or is zeros, too.
        assert_eq!(read(&map, 5 * PAGE + 1), 0);
        assert!(one.is_lost() && !two.is_lost() && count() > before);
        write(&map, 7 * PAGE, 9);
        assert_eq!(read(&map, 3 * PAGE + 1), 0);
        assert_eq!(read(&map, 2 * PAGE + 1), 7);
        file.set_len(0).unwrap();
        assert_eq!(read(&map, 1), 0);
        drop(one);
        drop(map);
        // The next one in its place has lost nothing.
        let (_file, map) = mapped(1);
        assert!(!watch(&map).is_lost());
    }

    #[test]
    fn many_threads_lose_and_watch_at_the_same_time() {
        std::thread::scope(|s| {
            for _ in 0..8 {
                s.spawn(|| {
                    for _ in 0..200 {
                        let (file, map) = mapped(4);
                        let one = watch(&map);
                        write(&map, PAGE, 1);
                        assert!(!one.is_lost());
                        file.set_len(PAGE as u64).unwrap();
                        assert_eq!(read(&map, PAGE), 0);
                        assert!(one.is_lost());
                        drop(one);
                    }
                });
            }
        });
    }

    /// Runs a test of this module that must end its process.
    fn ends(name: &str) -> Option<i32> {
        let mut child = std::process::Command::new(std::env::current_exe().unwrap());
        child.args(["--ignored", "--exact", "--test-threads=1"]);
        child.arg(format!("mem::lost::tests::{name}"));
        child.output().unwrap().status.signal()
    }

    #[test]
    fn any_other_bus_error_ends_the_process() {
        assert_eq!(ends("touch_what_nobody_watches"), Some(libc::SIGBUS));
        assert_eq!(ends("touch_what_was_watched"), Some(libc::SIGBUS));
        assert_eq!(ends("be_sent_a_signal"), Some(libc::SIGBUS));
    }

    #[test]
    #[ignore = "ends its process"]
    fn touch_what_nobody_watches() {
        let (_file, watched) = mapped(4);
        let _watch = watch(&watched);
        let (file, map) = mapped(4);
        file.set_len(0).unwrap();
        read(&map, 0);
    }

    #[test]
    #[ignore = "ends its process"]
    fn touch_what_was_watched() {
        let (file, map) = mapped(4);
        drop(watch(&map));
        file.set_len(0).unwrap();
        read(&map, 0);
    }

    #[test]
    #[ignore = "ends its process"]
    fn be_sent_a_signal() {
        let (_file, map) = mapped(4);
        let _watch = watch(&map);
        // SAFETY: a signal to this process.
        unsafe { libc::raise(libc::SIGBUS) };
    }
}
