//! Counters. Each worker has its own of what it moves, so that it counts by plain stores: a locked instruction in the middle
//! of a burst would wait until all that was copied is out. Control adds them up.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use crate::port::{NeverReason, QUEUES};

/// Why a frame was not delivered. One counter per port (the receiving port, or the sending one where there is none).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum Drop {
    /// The receiver's ring and the lane's backlog were full.
    Full,
    /// The receiver is stopped or absent, and the backlog was full.
    Down,
    /// Longer than the receiver takes.
    TooLong,
    /// Needs an offload that the receiver lacks.
    Offload,
    /// The receiver's ring is broken, or the kernel refused the frame.
    Refused,
    /// Shorter than an Ethernet header.
    Malformed,
    /// The destination is the port that it came from.
    Hairpin,
    /// Arrived at the source after the lane had been closed behind a move.
    Late,
    /// A spooled record that failed its check.
    Corrupt,
}

/// Names for listings, in the order of [`Drop`].
pub const DROP_NAMES: [&str; 9] = [
    "receiver_full",
    "receiver_down",
    "too_long",
    "offload_missing",
    "receiver_refused",
    "malformed",
    "hairpin",
    "late_straggler",
    "spool_corrupt",
];

impl From<NeverReason> for Drop {
    fn from(r: NeverReason) -> Drop {
        match r {
            NeverReason::TooLong => Drop::TooLong,
            NeverReason::Offload => Drop::Offload,
            NeverReason::RingBroken | NeverReason::Refused => Drop::Refused,
            NeverReason::Gone => Drop::Down,
        }
    }
}

/// Of a port: what went wrong.
#[derive(Debug, Default)]
pub struct PortCounters {
    /// By [`Drop`].
    pub drops: [AtomicU64; DROP_NAMES.len()],
    /// From the receive queues: malformed, ring broken, overrun.
    pub rx_errors: [AtomicU64; 3],
}

impl PortCounters {
    /// Frames that the port's socket had dropped before we saw them.
    pub fn overruns(&self) -> u64 {
        self.rx_errors[2].load(Relaxed)
    }

    /// Counts one dropped frame.
    pub fn drop(&self, why: Drop) {
        self.drops[why as usize].fetch_add(1, Relaxed);
    }
}

/// Adds to a counter that nobody else writes.
#[inline(always)]
pub fn add(counter: &AtomicU64, n: u64) {
    counter.store(counter.load(Relaxed).wrapping_add(n), Relaxed);
}

/// What one worker has moved at a port.
#[derive(Debug, Default)]
#[repr(align(64))]
pub struct Moved {
    /// Bytes from it.
    pub rx_bytes: AtomicU64,
    /// Bytes to it.
    pub tx_bytes: AtomicU64,
    /// Frames from each of its queues.
    rx_frames: [AtomicU64; QUEUES],
    /// Frames to each of its queues.
    tx_frames: [AtomicU64; QUEUES],
}

impl Moved {
    /// Frames from one of its queues (the first ones of [`QUEUES`]).
    #[inline]
    pub fn rx_frames(&self, queue: usize) -> &AtomicU64 {
        &self.rx_frames[queue % QUEUES]
    }

    /// Frames to one of its queues.
    #[inline]
    pub fn tx_frames(&self, queue: usize) -> &AtomicU64 {
        &self.tx_frames[queue % QUEUES]
    }
}

/// What one worker has moved from one port to another, unicast.
#[derive(Debug, Default)]
pub struct LinkCounters {
    frames: AtomicU64,
    bytes: AtomicU64,
    payload: AtomicU64,
    last_s: AtomicU32,
}

/// Frames one after the other on the same way, or all of a link.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Run {
    /// Frames.
    pub frames: u64,
    /// Bytes of whole frames.
    pub bytes: u64,
    /// Bytes of payload, see [`super::parse::payload_bytes`].
    pub payload: u64,
}

/// The counters of one worker. Written by it alone.
pub struct Traffic {
    ports: Box<[Moved]>,
    links: Box<[LinkCounters]>,
}

impl Traffic {
    /// For `n` ports.
    pub fn new(n: usize) -> Traffic {
        Traffic {
            ports: (0..n).map(|_| Moved::default()).collect(),
            links: (0..n * n).map(|_| LinkCounters::default()).collect(),
        }
    }

    /// Frames from and to all ports.
    pub fn frames(&self) -> (u64, u64) {
        let sum = |c: &[AtomicU64]| c.iter().map(|n| n.load(Relaxed)).sum::<u64>();
        let all = self.ports.iter();
        all.fold((0, 0), |(rx, tx), m| {
            (rx + sum(&m.rx_frames), tx + sum(&m.tx_frames))
        })
    }

    /// Of a port.
    pub fn port(&self, n: usize) -> &Moved {
        &self.ports[n]
    }

    fn link(&self, from: usize, to: usize) -> &LinkCounters {
        &self.links[from * self.ports.len() + to]
    }

    /// Counts a run that has ended (its port is one) and begins the next.
    #[must_use]
    pub fn next(&self, from: usize, run: (usize, Run), to: usize, now_s: u32) -> (usize, Run) {
        if run.0 != usize::MAX {
            let c = self.link(from, run.0);
            add(&c.frames, run.1.frames);
            add(&c.bytes, run.1.bytes);
            add(&c.payload, run.1.payload);
            c.last_s.store(now_s, Relaxed);
        }
        (to, Run::default())
    }
}

/// The counters of all workers that there are or have been. What one that has left counted stays, and the next one of its
/// number goes on with it.
#[derive(Default)]
pub struct Books(Mutex<Vec<Arc<Traffic>>>);

impl Books {
    /// The counters of a worker, for `ports` ports.
    pub fn of(&self, worker: usize, ports: usize) -> Arc<Traffic> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        while all.len() <= worker {
            all.push(Arc::new(Traffic::new(ports)));
        }
        all[worker].clone()
    }

    /// All of them, by worker.
    pub fn all(&self) -> Vec<Arc<Traffic>> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.clone()
    }
}

/// What all workers together have moved at a port.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PortTotal {
    /// Bytes from it.
    pub rx_bytes: u64,
    /// Bytes to it.
    pub tx_bytes: u64,
    /// Frames from and to each of its queues.
    pub queues: [(u64, u64); QUEUES],
}

/// The sum over all workers.
pub fn port_total(workers: &[Arc<Traffic>], port: usize) -> PortTotal {
    let mut sum = PortTotal::default();
    for m in workers.iter().map(|w| w.port(port)) {
        sum.rx_bytes += m.rx_bytes.load(Relaxed);
        sum.tx_bytes += m.tx_bytes.load(Relaxed);
        for (n, (rx, tx)) in sum.queues.iter_mut().enumerate() {
            *rx += m.rx_frames(n).load(Relaxed);
            *tx += m.tx_frames(n).load(Relaxed);
        }
    }
    sum
}

/// The sum over all workers of what went from one port to another, and the engine's second in which the last frame came.
pub fn link_total(workers: &[Arc<Traffic>], from: usize, to: usize) -> (Run, u32) {
    let (mut sum, mut last_s) = (Run::default(), 0);
    for w in workers {
        let c = w.link(from, to);
        sum.frames += c.frames.load(Relaxed);
        sum.bytes += c.bytes.load(Relaxed);
        sum.payload += c.payload.load(Relaxed);
        last_s = last_s.max(c.last_s.load(Relaxed));
    }
    (sum, last_s)
}
