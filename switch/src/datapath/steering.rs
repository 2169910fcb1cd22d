//! Which of a port's transmit queues gets a frame.
//!
//! All frames of a flow that one worker sends take one queue, so that the guest sees them in order. Where a guest has at
//! least as many queues as there are workers, each worker has queues of its own and never waits for another one.
//!
//! Invariant: a queue is picked only while it is active, but for the moment of a change: who finds the picked one empty asks
//! again.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicUsize, Ordering};

use gangway_shared::config::WORKERS_MAX;

use crate::port::QUEUES;

/// Flows are spread over so many; a power of two.
const BUCKETS: usize = 64;

/// See the module. Changed by one thread at a time.
#[derive(Debug)]
pub struct Steering {
    /// A bit for each queue.
    active: AtomicU32,
    /// A row for each worker that there may be.
    rows: Box<[[AtomicU8; BUCKETS]]>,
    /// Workers that there are.
    workers: AtomicUsize,
    /// There are fewer queues than workers.
    shared: AtomicBool,
}

impl Steering {
    /// Without queues.
    pub fn new(workers: usize) -> Steering {
        let row = |_| std::array::from_fn(|_| AtomicU8::new(0));
        Steering {
            active: AtomicU32::new(0),
            rows: (0..WORKERS_MAX).map(row).collect(),
            workers: AtomicUsize::new(workers),
            shared: AtomicBool::new(false),
        }
    }

    /// There is a queue.
    pub fn is_up(&self) -> bool {
        self.active.load(Ordering::Acquire) != 0
    }

    /// There are several: what is picked depends on the flow.
    #[inline]
    pub fn is_wide(&self) -> bool {
        let active = self.active.load(Ordering::Relaxed);
        active & active.wrapping_sub(1) != 0
    }

    /// Several workers send by each of its queues, as there are not enough.
    #[inline]
    pub fn is_shared(&self) -> bool {
        self.shared.load(Ordering::Relaxed)
    }

    /// The queue, of [`QUEUES`], for a flow with this hash.
    #[inline]
    pub fn pick(&self, worker: usize, hash: u64) -> usize {
        let active = self.active.load(Ordering::Relaxed);
        if active & active.wrapping_sub(1) == 0 {
            return active.trailing_zeros() as usize % QUEUES;
        }
        // The upper bits: the lower ones have chosen the flow's line.
        let bucket = (hash >> 58) as usize % BUCKETS;
        let queue = self
            .rows
            .get(worker)
            .map_or(0, |row| row[bucket].load(Ordering::Relaxed));
        usize::from(queue) % QUEUES
    }

    /// Queues come and go.
    pub fn change(
        &self,
        on: impl IntoIterator<Item = usize>,
        off: impl IntoIterator<Item = usize>,
    ) {
        let bits = |queues: &mut dyn Iterator<Item = usize>| {
            queues.fold(0u32, |all, q| all | 1 << (q % QUEUES))
        };
        let before = self.active.load(Ordering::Relaxed);
        let now = (before | bits(&mut on.into_iter())) & !bits(&mut off.into_iter());
        self.deal(now);
        self.active.store(now, Ordering::Release);
    }

    /// There are so many workers now: flows change their queues.
    pub fn resize(&self, workers: usize) {
        self.workers.store(workers, Ordering::Relaxed);
        self.deal(self.active.load(Ordering::Relaxed));
    }

    /// Gives each worker its queues of those that are active.
    fn deal(&self, active: u32) {
        let all: Vec<u8> = (0..QUEUES as u8)
            .filter(|q| active & (1 << q) != 0)
            .collect();
        let workers = self.workers.load(Ordering::Relaxed).max(1);
        self.shared.store(all.len() < workers, Ordering::Relaxed);
        for (n, row) in self.rows.iter().enumerate() {
            // A worker that is leaving shares with another one.
            let own = |rank: &usize| all.len() < workers || rank % workers == n % workers;
            let mine: Vec<u8> = (0..all.len()).filter(own).map(|rank| all[rank]).collect();
            for (slot, queue) in row.iter().zip(mine.iter().cycle()) {
                slot.store(*queue, Ordering::Relaxed);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    fn picked(s: &Steering, worker: usize) -> HashSet<usize> {
        (0..4096u64)
            .map(|n| s.pick(worker, n.wrapping_mul(0x9e37_79b9_7f4a_7c15)))
            .collect()
    }

    proptest! {
        #[test]
        fn picks_active_queues_only_and_all_of_them_and_shares_none_without_need(
            mut workers in 1usize..6,
            changes in proptest::collection::vec((0usize..QUEUES, any::<bool>(), proptest::option::weighted(0.2, 1usize..6)), 1..40),
        ) {
            let s = Steering::new(workers);
            let mut active = HashSet::new();
            for (q, on, resize) in changes {
                if let Some(n) = resize {
                    workers = n;
                    s.resize(n);
                } else if on {
                    active.insert(q);
                    s.change([q], []);
                } else {
                    active.remove(&q);
                    s.change([], [q]);
                }
                prop_assert_eq!(s.is_up(), !active.is_empty());
                prop_assert_eq!(s.is_wide(), active.len() > 1);
                prop_assert_eq!(s.is_shared(), active.len() < workers);
                if active.is_empty() {
                    continue;
                }
                let by: Vec<_> = (0..workers).map(|w| picked(&s, w)).collect();
                prop_assert_eq!(by.iter().flatten().copied().collect::<HashSet<_>>(), active.clone());
                if active.len() >= workers {
                    let sum: usize = by.iter().map(HashSet::len).sum();
                    prop_assert_eq!(sum, active.len(), "no queue is shared");
                }
            }
        }
    }

    #[test]
    fn a_flow_keeps_its_queue() {
        let s = Steering::new(2);
        s.change([0, 1, 2, 3], []);
        let first = s.pick(1, 77 << 50);
        assert!((0..10).all(|_| s.pick(1, 77 << 50) == first));
    }
}
