//! What of a running ring may change under it, and how the control thread changes it without stopping the ring.
//!
//! A front-end may turn the dirty log on and off, replace it, move the call descriptor and add memory while frames
//! flow. Its request is answered only when no worker can still act by the old state: after the answer to "log from now
//! on" no write may go unlogged, or a page that the front-end copies next would stay stale on the target.
//!
//! The control thread swaps a snapshot in and raises the generation; a ring looks at the generation when it enters a
//! section in which it writes to guest memory (once per burst), and takes the new snapshot then. The control thread
//! waits until a section that was open at the swap is left. Both do "write mine, then read the other's"; the full barrier
//! that this needs between the two is made by the control thread for both sides ([`sys::barrier_everywhere`]), so that a
//! ring pays nothing for what happens once a minute.
//!
//! ```text
//!   ring:     turn := odd      | generation?         -> new snapshot if raised | write, mark | turn := even
//!   control:  generation += 1  | barrier on all CPUs | turn odd? -> wait until it changes    | answer
//! ```
//!
//! Invariant: a ring takes the lock only after a change.

use std::fs::File;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering, compiler_fence};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::dirty::DirtyLog;
use super::ring::Broken;
use super::watchdog;
use crate::mem::guest::GuestMem;
use crate::mem::lost;
use crate::sys;

/// Where a ring's three areas lie (virtio 1.2, 2.7), valid for its size.
#[derive(Debug, Clone, Copy)]
pub struct Areas {
    /// Descriptor table.
    pub desc: NonNull<u8>,
    /// Available ring.
    pub avail: NonNull<u8>,
    /// Used ring.
    pub used: NonNull<u8>,
}

/// The changeable part of a ring.
#[derive(Debug, Clone)]
pub struct Live {
    /// The memory table; keeps what `areas` points to.
    pub mem: Arc<GuestMem>,
    /// Translated in `mem`.
    pub areas: Areas,
    /// Where to mark what we write.
    pub log: Option<Arc<DirtyLog>>,
    /// The guest address under which writes to the used ring are marked (`VHOST_VRING_F_LOG`).
    pub used_log: Option<u64>,
    /// Signals the driver; none if it polls.
    pub call: Option<Arc<File>>,
}

impl Live {
    /// What it needs and was lost.
    fn lost(&self) -> Option<Broken> {
        if self.mem.is_lost() {
            return Some(Broken::MemoryLost);
        }
        let log = self.log.as_ref().filter(|l| l.is_lost());
        log.map(|_| Broken::LogLost)
    }
}

#[allow(unsafe_code)]
mod threads {
    use super::Live;
    // SAFETY: `areas` points into the mappings that `mem` keeps, which are the same for all threads; it is dereferenced
    // in the ring files only, by atomic and volatile access.
    unsafe impl Send for Live {}
    // SAFETY: as above.
    unsafe impl Sync for Live {}
}

/// What a ring has done, for `state()`.
#[derive(Debug, Default)]
pub struct Counters {
    /// Frames taken from or given to the guest.
    pub frames: AtomicU64,
    /// Chains that were no frames.
    pub malformed: AtomicU64,
}

/// Shared by a ring, which lives with a worker, and the control thread of its port.
#[derive(Debug)]
pub struct Control {
    generation: AtomicU64,
    slot: Mutex<Option<Arc<Live>>>,
    turn: AtomicU64,
    next: AtomicU16,
    broken: OnceLock<Broken>,
    alarm: Arc<File>,
    /// What the ring has done.
    pub counters: Counters,
}

impl Control {
    /// Of a ring that starts at `next`; `alarm` is signalled when it breaks.
    pub fn new(live: Live, next: u16, alarm: Arc<File>) -> Arc<Control> {
        Arc::new(Control {
            generation: AtomicU64::new(1),
            slot: Mutex::new(Some(Arc::new(live))),
            turn: AtomicU64::new(0),
            next: AtomicU16::new(next),
            broken: OnceLock::new(),
            alarm,
            counters: Counters::default(),
        })
    }

    fn slot(&self) -> MutexGuard<'_, Option<Arc<Live>>> {
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Control side: swaps the snapshot (`None` closes the ring for good) and waits until the old one is out of use.
    /// False if that takes longer than a second: a worker hangs in the middle of a burst.
    #[must_use]
    pub fn swap(&self, live: Option<Live>) -> bool {
        *self.slot() = live.map(Arc::new);
        self.generation.fetch_add(1, Ordering::SeqCst);
        sys::barrier_everywhere();
        let seen = self.turn.load(Ordering::SeqCst);
        if seen.is_multiple_of(2) {
            return true;
        }
        let since = Instant::now();
        while self.turn.load(Ordering::SeqCst) == seen {
            if since.elapsed() > Duration::from_secs(1) {
                return false;
            }
            std::thread::sleep(Duration::from_micros(20));
        }
        true
    }

    /// The ring's position: the first chain that has not been given back.
    pub fn next(&self) -> u16 {
        self.next.load(Ordering::Acquire)
    }

    /// Why the ring gives no frames any more.
    pub fn broken(&self) -> Option<Broken> {
        self.broken.get().copied()
    }
}

/// The ring's side of a [`Control`].
#[derive(Debug)]
pub struct Gate {
    control: Arc<Control>,
    seen: u64,
    turn: u64,
    live: Option<Arc<Live>>,
    /// [`lost::count`] when this snapshot was last looked at.
    lost: u64,
}

impl Gate {
    /// Takes the first snapshot.
    pub fn new(control: Arc<Control>) -> Gate {
        let live = control.slot().clone();
        Gate {
            seen: control.generation.load(Ordering::SeqCst),
            turn: 0,
            live,
            lost: 0,
            control,
        }
    }

    /// Looks for a new snapshot. True if the ring must take it over from [`Gate::live`].
    #[inline]
    pub fn refresh(&mut self) -> bool {
        if self.control.generation.load(Ordering::SeqCst) == self.seen {
            return false;
        }
        self.take_over()
    }

    #[cold]
    fn take_over(&mut self) -> bool {
        let slot = self.control.slot();
        self.seen = self.control.generation.load(Ordering::SeqCst);
        self.live.clone_from(&slot);
        self.lost = 0;
        true
    }

    /// What the ring works on and was lost since the last call: it can't go on.
    #[inline]
    pub fn lost(&mut self) -> Option<Broken> {
        let count = lost::count();
        if count == self.lost {
            return None;
        }
        self.lost = count;
        self.find_lost().filter(|_| !self.is_broken())
    }

    #[cold]
    fn find_lost(&self) -> Option<Broken> {
        self.live.as_ref().and_then(|l| l.lost())
    }

    /// Whether a newer snapshot waits: what looked wrong may be right by that one.
    pub fn is_stale(&self) -> bool {
        self.control.generation.load(Ordering::SeqCst) != self.seen
    }

    /// Opens a section in which the ring writes to guest memory. [`Gate::refresh`] must follow.
    #[inline]
    pub fn enter(&mut self) {
        if self.turn.is_multiple_of(2) {
            self.turn += 1;
            self.control.turn.store(self.turn, Ordering::Relaxed);
            // The processor's barrier is the control thread's; the compiler shall keep the order, too.
            compiler_fence(Ordering::SeqCst);
        }
    }

    /// Closes the section, if one is open.
    #[inline]
    pub fn leave(&mut self) {
        if !self.turn.is_multiple_of(2) {
            self.turn += 1;
            self.control.turn.store(self.turn, Ordering::Release);
        }
    }

    /// The snapshot; none if the ring was closed.
    #[inline]
    pub fn live(&self) -> Option<&Arc<Live>> {
        self.live.as_ref()
    }

    /// Tells the control side how far the ring is.
    #[inline]
    pub fn set_next(&self, next: u16) {
        self.control.next.store(next, Ordering::Release);
    }

    /// Whether the ring has broken.
    #[inline]
    pub fn is_broken(&self) -> bool {
        self.control.broken.get().is_some()
    }

    /// The ring is unusable: says so once.
    pub fn set_broken(&self, why: Broken) {
        // Zeros where memory was are what is wrong, whatever they look like.
        let why = self.find_lost().unwrap_or(why);
        if self.control.broken.set(why).is_ok() {
            signal(&self.control.alarm);
        }
    }

    /// Signals the driver, if it does not poll. False if its descriptor blocks.
    #[must_use]
    pub fn call(&self) -> bool {
        let call = self.live.as_ref().and_then(|l| l.call.as_ref());
        // Waited for once.
        let is_bad = self.control.broken.get() == Some(&Broken::Call);
        call.is_none_or(|c| is_bad || watchdog::raise(c.as_fd()))
    }

    /// Counts frames: nobody else does, so without a locked instruction.
    #[inline]
    pub fn count(&self, frames: u64) {
        crate::datapath::stats::add(&self.control.counters.frames, frames);
    }

    /// The counters.
    pub fn counters(&self) -> &Counters {
        &self.control.counters
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.leave();
    }
}

/// Raises an eventfd of our own. A full one is raised already.
pub fn signal(fd: &File) {
    let _ = rustix::io::write(fd, &1u64.to_ne_bytes());
}

/// Clears an eventfd; never waits.
pub fn clear(fd: &File) {
    sys::drain_event(fd.as_fd());
}
