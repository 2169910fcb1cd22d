//! The split ring: descriptor table, available ring, used ring.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::fence;

use super::{GPA, Layout, Place, Ring};

const WRITE: u64 = 2;
const NO_INTERRUPT: u16 = 1;
const NO_NOTIFY: u16 = 1;

/// See [`Ring`].
#[derive(Debug)]
pub struct Split {
    place: Place,
    /// What stands in the available ring.
    at: Vec<u16>,
    published: u16,
    taken: u16,
}

impl Ring for Split {
    const LAYOUT: Layout = Layout::Split;

    fn new(place: Place) -> Split {
        let [desc, avail, _] = place.areas;
        let m = &place.memory;
        for i in 0..place.num {
            let at = desc + 16 * usize::from(i);
            let flags = if place.device_writes { WRITE } else { 0 };
            m.u64(at).store(GPA + place.buffer(i) as u64, Relaxed);
            m.u64(at + 8)
                .store(u64::from(place.len) | flags << 32, Relaxed);
            m.u16(avail + 4 + 2 * usize::from(i)).store(i, Relaxed);
        }
        m.u16(avail).store(NO_INTERRUPT, Relaxed);
        Split {
            at: (0..place.num).collect(),
            place,
            published: 0,
            taken: 0,
        }
    }

    #[inline(always)]
    fn reap(&mut self, least: u16, mut each: impl FnMut(u16, u32)) -> u16 {
        let [_, avail, used] = self.place.areas;
        let n = self
            .place
            .memory
            .u16(used + 2)
            .load(Acquire)
            .wrapping_sub(self.taken);
        if n < least {
            return 0;
        }
        assert!(
            n <= self.outstanding(),
            "the device gave back what it does not have"
        );
        let num = self.place.num;
        let entries = self.place.memory.u32s(used + 4, 2 * usize::from(num));
        for k in 0..n {
            let slot = usize::from(self.taken.wrapping_add(k) & (num - 1));
            let id = entries[2 * slot].load(Relaxed) as u16;
            let len = entries[2 * slot + 1].load(Relaxed);
            if self.at[slot] != id {
                self.at[slot] = id;
                let at = avail + 4 + 2 * slot;
                self.place.memory.u16(at).store(id, Relaxed);
            }
            each(id, len);
        }
        self.taken = self.taken.wrapping_add(n);
        n
    }

    #[inline(always)]
    fn publish(&mut self, n: u16) {
        debug_assert!(n <= self.place.num - self.outstanding());
        self.published = self.published.wrapping_add(n);
        let idx = self.place.memory.u16(self.place.areas[1] + 2);
        idx.store(self.published, Release);
    }

    #[inline(always)]
    fn next_buffer(&self, ahead: u16) -> u16 {
        let slot = self.published.wrapping_add(ahead) & (self.place.num - 1);
        self.at[usize::from(slot)]
    }

    #[inline(always)]
    fn wants_kick(&self) -> bool {
        // The index before the look at the flag (virtio 1.2, 2.7.13.4.1).
        fence(SeqCst);
        let flags = self.place.memory.u16(self.place.areas[2]).load(Relaxed);
        flags & NO_NOTIFY == 0
    }

    #[inline(always)]
    fn is_drained(&self) -> bool {
        self.place.memory.u16(self.place.areas[2] + 2).load(Relaxed) == self.published
    }

    #[inline(always)]
    fn outstanding(&self) -> u16 {
        self.published.wrapping_sub(self.taken)
    }

    fn place(&self) -> &Place {
        &self.place
    }
}
