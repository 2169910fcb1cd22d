//! Raises eventfds of front-ends, and gets a thread out that sleeps in one: the front-end has made it blocking behind our
//! back, and filled it (ADR-0018).
//!
//! A thread that writes marks that by two plain stores; the watchdog, one thread for the process, looks at the marks at each
//! tick. A write that is under way is looked at once more a moment later: if it is still the same one its thread is
//! interrupted, and again at the next tick, should that have come before it slept. A thread that was only not scheduled does
//! not notice.
//!
//! While nobody writes the watchdog sleeps. Who writes and finds it asleep wakes it; as in [`super::live`] the full barrier
//! between "write mine" and "read the other's" is made by the side that is rarely there, for both.
//!
//! ```text
//!   writer:    turn := odd   | compiler's barrier | asleep? -> wake it         | write(2) | turn := even
//!   watchdog:  asleep := yes | barrier on all CPUs | a turn moved? -> stay awake | sleep
//! ```
//!
//! Invariant: a thread's place is in the list as long as the thread lives and not longer, so an interruption reaches no other.
//! Invariant: only the calls of [`raise`] are interrupted on purpose; anything else that a late signal meets neither sleeps nor
//! minds `EINTR`.

use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, compiler_fence};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::io::Errno;

use crate::sys;

/// Between two looks.
const TICK: Duration = Duration::from_millis(2);
/// Between the look that finds a write and the one that finds it still there. A write takes a microsecond.
const MOMENT: Duration = Duration::from_micros(50);
/// Ticks without a write, after which the watchdog sleeps.
const QUIET: u32 = 8;

/// A thread that writes, in cache lines of its own.
#[repr(align(128))]
struct Place {
    thread: sys::interrupt::Thread,
    /// Odd during a write. Only the thread changes it.
    turn: AtomicU64,
    /// The watchdog's: the turn that it saw.
    seen: AtomicU64,
}

static PLACES: Mutex<Vec<Arc<Place>>> = Mutex::new(Vec::new());
static ASLEEP: AtomicBool = AtomicBool::new(false);
static WATCHDOG: OnceLock<thread::Thread> = OnceLock::new();

fn places() -> MutexGuard<'static, Vec<Arc<Place>>> {
    PLACES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The calling thread's place.
struct Mine(Arc<Place>);

thread_local! {
    static MINE: Mine = Mine::new();
}

impl Mine {
    fn new() -> Mine {
        let place = Arc::new(Place {
            thread: sys::interrupt::Thread::current(),
            turn: AtomicU64::new(0),
            seen: AtomicU64::new(0),
        });
        let mut places = places();
        places.push(place.clone());
        if WATCHDOG.get().is_none() {
            let started = thread::Builder::new().name("watchdog".into()).spawn(watch);
            match started {
                Ok(t) => drop(WATCHDOG.set(t.thread().clone())),
                Err(e) => tracing::error!("no watchdog: a front-end could stall a worker: {e}"),
            }
        }
        Mine(place)
    }

    fn write(&self, fd: BorrowedFd<'_>) -> bool {
        let turn = &self.0.turn;
        let now = turn.load(Ordering::Relaxed);
        turn.store(now + 1, Ordering::Relaxed);
        // The processor's barrier is the watchdog's; the compiler shall keep the order, too.
        compiler_fence(Ordering::SeqCst);
        if ASLEEP.load(Ordering::Relaxed) {
            wake();
        }
        let raised = write(fd);
        turn.store(now + 2, Ordering::Release);
        raised
    }
}

impl Drop for Mine {
    fn drop(&mut self) {
        places().retain(|p| !Arc::ptr_eq(p, &self.0));
    }
}

fn write(fd: BorrowedFd<'_>) -> bool {
    rustix::io::write(fd, &1u64.to_ne_bytes()) != Err(Errno::INTR)
}

/// Raises an eventfd. A full one is raised already; false if it is full and blocks, which was waited for until the watchdog
/// saw it.
#[must_use]
pub fn raise(fd: BorrowedFd<'_>) -> bool {
    // A thread that ends has no place any more.
    MINE.try_with(|m| m.write(fd)).unwrap_or_else(|_| write(fd))
}

#[cold]
fn wake() {
    ASLEEP.store(false, Ordering::SeqCst);
    if let Some(t) = WATCHDOG.get() {
        t.unpark();
    }
}

fn watch() {
    let (mut had, mut quiet) = (0, 0);
    loop {
        thread::sleep(TICK);
        let (turns, writing) = look();
        if writing {
            thread::sleep(MOMENT);
            free_sleepers();
        }
        if writing || turns != had {
            (had, quiet) = (turns, 0);
            continue;
        }
        quiet += 1;
        if quiet < QUIET {
            continue;
        }
        quiet = 0;
        ASLEEP.store(true, Ordering::SeqCst);
        sys::barrier_everywhere();
        if look() == (had, false) {
            while ASLEEP.load(Ordering::SeqCst) {
                thread::park();
            }
        }
        ASLEEP.store(false, Ordering::SeqCst);
    }
}

/// What tells whether somebody has written since the last look, and whether somebody does so now.
fn look() -> (u64, bool) {
    let (mut sum, mut writing) = (0u64, false);
    for p in places().iter() {
        let turn = p.turn.load(Ordering::Acquire);
        p.seen.store(turn, Ordering::Relaxed);
        sum = sum.wrapping_add(turn);
        writing |= !turn.is_multiple_of(2);
    }
    (sum, writing)
}

/// Interrupts those who are still in the write that the last look saw. None of them can end meanwhile: it would wait for the
/// list.
fn free_sleepers() {
    for p in places().iter() {
        let turn = p.turn.load(Ordering::Acquire);
        if !turn.is_multiple_of(2) && turn == p.seen.load(Ordering::Relaxed) {
            // It has not ended.
            let _ = p.thread.interrupt();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datapath::tests::eventually;
    use rustix::event::{EventfdFlags, eventfd};
    use std::os::fd::{AsFd, OwnedFd};

    fn event(flags: EventfdFlags) -> OwnedFd {
        eventfd(0, flags | EventfdFlags::CLOEXEC).unwrap()
    }

    fn fill(fd: &OwnedFd) {
        rustix::io::write(fd, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    }

    fn counted(fd: &OwnedFd) -> u64 {
        let mut b = [0; 8];
        rustix::io::read(fd, &mut b).unwrap();
        u64::from_ne_bytes(b)
    }

    #[test]
    fn a_full_eventfd_is_raised_and_only_one_that_blocks_is_told() {
        let fd = event(EventfdFlags::NONBLOCK);
        assert!(raise(fd.as_fd()) && raise(fd.as_fd()));
        assert_eq!(counted(&fd), 2);
        fill(&fd);
        assert!(raise(fd.as_fd()));
        let fd = event(EventfdFlags::empty());
        assert!(raise(fd.as_fd()));
        assert_eq!(counted(&fd), 1);
        fill(&fd);
        for _ in 0..3 {
            assert!(!raise(fd.as_fd()));
        }
        assert_eq!(counted(&fd), u64::MAX - 1);
    }

    /// Each write sleeps for less than a tick.
    #[test]
    fn who_lets_go_before_a_tick_is_over_is_found_all_the_same() {
        let fd = event(EventfdFlags::empty());
        let caught = (0..5000).any(|_| {
            fill(&fd);
            thread::scope(|s| {
                let writer = s.spawn(|| raise(fd.as_fd()));
                thread::sleep(TICK / 2);
                // Now it fits, and is read if it came.
                counted(&fd);
                let raised = writer.join().unwrap();
                if raised {
                    counted(&fd);
                }
                !raised
            })
        });
        assert!(caught);
    }

    /// In a process of its own: other tests write all the time.
    #[test]
    fn the_watchdog_sleeps_while_nobody_writes_and_wakes_for_the_next() {
        let mut child = std::process::Command::new(std::env::current_exe().unwrap());
        child.args(["--ignored", "--exact", "--test-threads=1"]);
        child.arg("port::vhost::watchdog::tests::alone_it_sleeps_and_wakes");
        assert!(child.status().unwrap().success());
    }

    #[test]
    #[ignore = "needs a process of its own"]
    fn alone_it_sleeps_and_wakes() {
        let fd = event(EventfdFlags::empty());
        assert!(raise(fd.as_fd()));
        for _ in 0..3 {
            counted(&fd);
            eventually("it sleeps", || ASLEEP.load(Ordering::SeqCst));
            fill(&fd);
            assert!(!raise(fd.as_fd()));
        }
    }
}
