//! Counters. Written with relaxed atomics by the worker that owns the lane, read by control.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

use crate::port::NeverReason;

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
        }
    }
}

/// Of a port.
#[derive(Debug, Default)]
pub struct PortCounters {
    /// Frames from it.
    pub rx_frames: AtomicU64,
    /// Bytes from it.
    pub rx_bytes: AtomicU64,
    /// Frames to it.
    pub tx_frames: AtomicU64,
    /// Bytes to it.
    pub tx_bytes: AtomicU64,
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

/// From one port to another, unicast.
#[derive(Debug, Default)]
pub struct LinkCounters {
    /// Frames.
    pub frames: AtomicU64,
    /// Bytes of whole frames.
    pub bytes: AtomicU64,
    /// Bytes of payload, see [`super::parse::payload_bytes`].
    pub payload: AtomicU64,
    /// The engine's second in which the last frame came.
    pub last_s: AtomicU32,
}

/// Frames one after the other on the same way.
#[derive(Debug, Clone, Copy, Default)]
pub struct Run {
    /// Frames.
    pub frames: u64,
    /// Bytes of whole frames.
    pub bytes: u64,
    /// Bytes of payload.
    pub payload: u64,
}

/// All pairs of ports.
pub struct Links {
    n: usize,
    cells: Box<[LinkCounters]>,
}

impl Links {
    /// For `n` ports.
    pub fn new(n: usize) -> Links {
        Links {
            n,
            cells: (0..n * n).map(|_| LinkCounters::default()).collect(),
        }
    }

    /// The counters of a pair.
    pub fn get(&self, from: usize, to: usize) -> &LinkCounters {
        &self.cells[from * self.n + to]
    }

    /// Counts a run that has ended (its port is one) and begins the next.
    #[must_use]
    pub fn next(&self, from: usize, run: (usize, Run), to: usize, now_s: u32) -> (usize, Run) {
        if run.0 != usize::MAX {
            self.count(from, run.0, &run.1, now_s);
        }
        (to, Run::default())
    }

    /// Counts a run of frames. By the worker that owns the sending queue; another queue's may count at the same time.
    pub fn count(&self, from: usize, to: usize, run: &Run, now_s: u32) {
        let c = self.get(from, to);
        c.frames.fetch_add(run.frames, Relaxed);
        c.bytes.fetch_add(run.bytes, Relaxed);
        c.payload.fetch_add(run.payload, Relaxed);
        c.last_s.store(now_s, Relaxed);
    }
}
