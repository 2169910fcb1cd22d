//! The packed ring: one ring of descriptors that driver and device rewrite in turn, and two event areas.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::{AtomicU64, fence};

use super::{GPA, Layout, Place, Ring};

const WRITE: u16 = 1 << 1;
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;
/// `flags` of an event area: no events.
const DISABLE: u16 = 1;
/// `flags` of an event area is its second word.
const EVENT_FLAGS: usize = 2;

/// See [`Ring`].
#[derive(Debug)]
pub struct Packed {
    place: Place,
    /// The buffer that each slot has, or last had.
    at: Vec<u16>,
    /// Next slot to hand out, and the wrap counter there.
    next: u16,
    next_wrap: bool,
    /// Next slot to look for a used descriptor, and the wrap counter there.
    taken: u16,
    taken_wrap: bool,
    outstanding: u16,
}

impl Packed {
    /// Two words for each descriptor: address; length, id and flags.
    #[inline(always)]
    fn words(place: &Place) -> &[AtomicU64] {
        let n = 2 * usize::from(place.num);
        place.memory.u64s(place.areas[0], n)
    }

    #[inline(always)]
    fn is_used(meta: u64, wrap: bool) -> bool {
        let flags = (meta >> 48) as u16;
        (flags & AVAIL != 0) == wrap && (flags & USED != 0) == wrap
    }
}

impl Ring for Packed {
    const LAYOUT: Layout = Layout::Packed;

    fn new(place: Place) -> Packed {
        let [desc, driver, _] = place.areas;
        let m = &place.memory;
        for i in 0..place.num {
            let at = desc + 16 * usize::from(i);
            m.u64(at).store(GPA + place.buffer(i) as u64, Relaxed);
        }
        m.u16(driver + EVENT_FLAGS).store(DISABLE, Relaxed);
        Packed {
            at: (0..place.num).collect(),
            place,
            next: 0,
            next_wrap: true,
            taken: 0,
            taken_wrap: true,
            outstanding: 0,
        }
    }

    #[inline(always)]
    fn reap(&mut self, least: u16, mut each: impl FnMut(u16, u32)) -> u16 {
        let least = least.min(self.place.num / 2);
        if self.outstanding < least {
            return 0;
        }
        // Is the batch's last one used? Devices show the first of their own batch last, so each is looked at below.
        let last = self.taken + (least - 1);
        let (last, wrap) = match last.checked_sub(self.place.num) {
            Some(behind) => (behind, !self.taken_wrap),
            None => (last, self.taken_wrap),
        };
        if !Self::is_used(
            Self::words(&self.place)[2 * usize::from(last) + 1].load(Relaxed),
            wrap,
        ) {
            return 0;
        }
        // The device is done with these lines; we shall read them and then write them.
        for line in (0..least).step_by(4) {
            let slot = self.taken + line;
            let slot = slot.checked_sub(self.place.num).unwrap_or(slot);
            let desc = self.place.areas[0] + 16 * usize::from(slot);
            self.place.memory.fetch_to_write(desc);
        }
        // No more than these: behind them the device may be writing, and a look would take its line away.
        let num = self.place.num;
        let words = Self::words(&self.place);
        let (mut slot, mut wrap, mut n) = (self.taken, self.taken_wrap, 0);
        while n < least {
            let here = usize::from(slot);
            let meta = words[2 * here + 1].load(Acquire);
            if !Self::is_used(meta, wrap) {
                break;
            }
            let (len, id) = (meta as u32, (meta >> 32) as u16);
            if self.at[here] != id {
                self.at[here] = id;
                let addr = GPA + self.place.buffer(id) as u64;
                words[2 * here].store(addr, Relaxed);
            }
            n += 1;
            slot += 1;
            if slot == num {
                (slot, wrap) = (0, !wrap);
            }
            each(id, len);
        }
        (self.taken, self.taken_wrap) = (slot, wrap);
        self.outstanding -= n;
        n
    }

    #[inline(always)]
    fn publish(&mut self, n: u16) {
        debug_assert!(n <= self.place.num - self.outstanding);
        let write = if self.place.device_writes { WRITE } else { 0 };
        let flags = |wrap| u64::from(write | if wrap { AVAIL } else { USED }) << 48;
        let len = u64::from(self.place.len);
        let num = self.place.num;
        let words = Self::words(&self.place);
        let (mut slot, mut wrap) = (self.next, self.next_wrap);
        for _ in 0..n {
            let here = usize::from(slot);
            let meta = len | u64::from(self.at[here]) << 32 | flags(wrap);
            // One store: the device sees flags, id and length together.
            words[2 * here + 1].store(meta, Release);
            slot += 1;
            if slot == num {
                (slot, wrap) = (0, !wrap);
            }
        }
        (self.next, self.next_wrap) = (slot, wrap);
        self.outstanding += n;
    }

    #[inline(always)]
    fn next_buffer(&self, ahead: u16) -> u16 {
        let slot = self.next.wrapping_add(ahead) & (self.place.num - 1);
        self.at[usize::from(slot)]
    }

    #[inline(always)]
    fn wants_kick(&self) -> bool {
        fence(SeqCst);
        let device = self.place.areas[2] + EVENT_FLAGS;
        self.place.memory.u16(device).load(Relaxed) & 3 != DISABLE
    }

    #[inline(always)]
    fn is_drained(&self) -> bool {
        let (newest, wrap) = match self.next.checked_sub(1) {
            Some(before) => (before, self.next_wrap),
            None => (self.place.num - 1, !self.next_wrap),
        };
        Self::is_used(
            Self::words(&self.place)[2 * usize::from(newest) + 1].load(Relaxed),
            wrap,
        )
    }

    #[inline(always)]
    fn outstanding(&self) -> u16 {
        self.outstanding
    }

    fn place(&self) -> &Place {
        &self.place
    }
}
