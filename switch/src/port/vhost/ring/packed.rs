//! The packed ring (virtio 1.2, 2.8): one table of descriptors that both sides write, and two small areas by which
//! each says when it wants to be signalled.
//!
//! ```text
//!   desc           16 bytes each: addr u64, len u32, id u16, flags u16 (AVAIL bit 7, USED bit 15)
//!   driver, device off_wrap u16, flags u16 (0 enable, 1 disable, 2 at off_wrap)
//! ```
//!
//! A position is a slot (bits 0 to 14) and the wrap counter with which the driver fills it (bit 15). We give chains back in
//! the order in which they came, so a chain's used element goes into the chain's own first slot, and the position of the
//! first chain that is still ours is all the state there is.
//!
//! Invariant: nothing in the table changes before [`Ring::publish`]: a switch that dies with a burst in its hands leaves the
//! descriptors as the driver wrote them.
//! Invariant: every access to the three areas is volatile or atomic, at an offset below the size that was checked when
//! the ring was set up.
#![allow(unsafe_code)]

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

use super::super::dirty::DirtyLog;
use super::super::features::RingFeatures;
use super::super::given::Element;
use super::super::live::{Areas, Live};
use super::super::position::Position;
use super::common::{DESC_BYTES, atomic, buffer, words, words_aligned};
use super::{Broken, CHAIN_MAX, Chain, Direction, Pieces, Plain, Plains, Pos, Ring};
use crate::mem::copy::LINE;
use crate::mem::guest::GuestMem;
use crate::mem::prefetch_to_write;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;
const FLAGS: usize = 14;

/// Descriptors of a cache line.
const PER_LINE: u32 = LINE as u32 / DESC_BYTES;

const WRAP: u16 = 1 << 15;
/// The slot of a position.
pub const SLOT: u16 = !WRAP;
/// Where a ring starts: slot 0, wrap counter 1.
pub const START: u16 = WRAP;

const EVENT_ENABLE: u16 = 0;
const EVENT_DISABLE: u16 = 1;
const EVENT_AT: u16 = 2;

/// Bytes of the three areas for a ring of `num`.
pub fn sizes(num: u16) -> [u64; 3] {
    [16 * u64::from(num), 4, 4]
}

/// The alignment of the three areas (virtio 1.2, 2.8.10).
pub const ALIGN: [usize; 3] = [16, 4, 4];

#[derive(Clone, Copy)]
struct Desc {
    addr: u64,
    len: u32,
    id: u16,
    flags: u16,
}

/// A chain that is given back, and not shown to the driver yet: where, and the second word of its used element.
#[derive(Debug, Clone, Copy)]
struct Done {
    word: u64,
    at: u16,
    slots: u16,
}

impl Done {
    #[inline(always)]
    fn new(at: u16, chain: Chain, written: u32) -> Done {
        let mut flags = if at & WRAP != 0 { AVAIL | USED } else { 0 };
        if written > 0 {
            flags |= WRITE;
        }
        let word = u64::from(written) | u64::from(chain.id) << 32 | u64::from(flags) << 48;
        Done {
            word,
            at,
            slots: chain.slots,
        }
    }

    #[inline(always)]
    fn element(&self) -> Element {
        Element {
            at: self.at,
            id: (self.word >> 32) as u16,
            written: self.word as u32,
        }
    }
}

/// A packed ring.
#[derive(Debug)]
pub struct Packed {
    mem: Arc<GuestMem>,
    areas: Areas,
    log: Option<Arc<DirtyLog>>,
    num: u16,
    event_idx: bool,
    indirect: bool,
    region: usize,
    /// Where the next used element goes.
    used: u16,
    done: Vec<Done>,
    /// The first that was shown since the last decision about a signal.
    unsignalled: Option<u16>,
    /// Slots shown since then.
    shown: u32,
    /// Our event flags as last written.
    flags: Option<u16>,
}

// SAFETY: the pointers lead into mappings that `mem` keeps and that are the same for all threads.
unsafe impl Send for Packed {}

/// `slots` behind `pos` in a ring of `num`: a slot below `num`, whatever is asked for. (A guest can make chains it has given
/// us look as if it gave them again: more than a lap of them is known then.)
#[inline]
fn behind(pos: u16, slots: u16, num: u16) -> u16 {
    let slot = u32::from(pos & !WRAP) + u32::from(slots);
    let num = u32::from(num.max(1));
    if slot < num {
        slot as u16 | (pos & WRAP)
    } else if slot < 2 * num {
        (slot - num) as u16 | (!pos & WRAP)
    } else {
        let turned = if slot / num % 2 == 1 { WRAP } else { 0 };
        (slot % num) as u16 | ((pos ^ turned) & WRAP)
    }
}

impl Packed {
    /// A ring of `num` entries whose areas were checked for that size and alignment, at position `next`, which lies in it.
    pub fn new(live: &Live, num: u16, next: u16, features: &RingFeatures) -> Packed {
        let mut ring = Packed {
            mem: live.mem.clone(),
            areas: live.areas,
            log: None,
            num,
            event_idx: features.event_idx,
            indirect: features.indirect,
            region: 0,
            used: next,
            done: Vec::with_capacity(usize::from(num)),
            unsignalled: None,
            // At first every event counts as passed: a predecessor may have died before it could signal.
            shown: u32::from(num),
            flags: None,
        };
        ring.rebind(live);
        ring
    }

    /// Takes up what an earlier run was giving back before the ring's position, unless the driver has seen it: to be published once more.
    /// How many chains that is. A burst's first element is written last, so it tells.
    pub fn resume(&mut self, last: &[Element]) -> usize {
        // The run that was killed may not have come to mark what it has written.
        for e in last {
            let offset = DESC_BYTES as usize * usize::from(e.at & SLOT);
            // SAFETY: a note's slots are below `num` ([`super::super::given`]), so this lies in the table.
            let at = unsafe { self.areas.desc.add(offset) };
            let _ = self.mark(at, DESC_BYTES as u64);
        }
        if !last.first().is_some_and(|e| self.is_available(e.at)) {
            return 0;
        }
        let ends = last.iter().skip(1).map(|e| e.at).chain([self.used]);
        for (e, end) in last.iter().zip(ends) {
            let slots = self.between(e.at, end) as u16;
            let chain = Chain { id: e.id, slots };
            self.done.push(Done::new(e.at, chain, e.written));
        }
        self.done.len()
    }

    /// Checks a ring's areas once: in one region each, aligned.
    pub fn areas(mem: &GuestMem, num: u16, desc: u64, driver: u64, device: u64) -> Option<Areas> {
        let [d, a, u] = sizes(num);
        Some(Areas {
            desc: mem.ring(desc, d, ALIGN[0])?,
            avail: mem.ring(driver, a, ALIGN[1])?,
            used: mem.ring(device, u, ALIGN[2])?,
        })
    }

    /// The flags of a slot.
    #[inline]
    fn flags_of(&self, pos: u16) -> &AtomicU16 {
        let slot = usize::from(pos & !WRAP);
        // SAFETY: a position's slot is below `num` (`new`, `behind`), so its flags lie in the table that was checked at
        // set-up; 14 behind a multiple of 16, so aligned.
        unsafe { atomic(self.areas.desc, DESC_BYTES as usize * slot + FLAGS) }
    }

    /// Whether the driver has filled the slot at `pos`.
    #[inline]
    fn is_available(&self, pos: u16) -> bool {
        let flags = u16::from_le(self.flags_of(pos).load(Ordering::Acquire));
        let wrap = pos & WRAP != 0;
        (flags & AVAIL != 0) == wrap && (flags & USED != 0) != wrap
    }

    /// The driver's event suppression area: `off_wrap`, and its flags above.
    #[inline]
    fn wanted(&self) -> u32 {
        // SAFETY: the driver area has 4 bytes, aligned to 4 and mapped (checked at set-up).
        let area = unsafe { &*self.areas.avail.as_ptr().cast::<AtomicU32>() };
        u32::from_le(area.load(Ordering::Relaxed))
    }

    /// Slots from one position on to another one, in a circle of two laps.
    #[inline]
    fn between(&self, from: u16, to: u16) -> u32 {
        let num = u32::from(self.num);
        let at = |p: u16| u32::from(p & !WRAP) + if p & WRAP == 0 { num } else { 0 };
        (at(to) + 4 * num).wrapping_sub(at(from)) % (2 * num)
    }

    /// Takes the line of a slot away from the driver's processor: it is read soon and then written, and so comes once. (Behind the
    /// table it asks for a line in vain.)
    #[inline(always)]
    fn fetch(&self, slot: u32) {
        let offset = (slot * DESC_BYTES) as usize;
        prefetch_to_write(self.areas.desc.as_ptr().wrapping_add(offset));
    }

    /// # Safety
    /// `table` is mapped for `16 * (i + 1)` bytes.
    #[inline]
    unsafe fn desc(table: NonNull<u8>, i: u32) -> Desc {
        // SAFETY: by the contract of this function.
        let [addr, rest] = unsafe { words(table, i) };
        Desc {
            addr,
            len: rest as u32,
            id: (rest >> 32) as u16,
            flags: (rest >> 48) as u16,
        }
    }

    #[inline]
    fn buffer(&mut self, d: &Desc, to: Direction, pieces: &mut Pieces) -> Result<(), Broken> {
        if (d.flags & WRITE != 0) != (to == Direction::Write) {
            return Err(Broken::Direction);
        }
        buffer(&self.mem, &mut self.region, d.addr, d.len, pieces)
    }

    /// virtio 1.2, 2.8.7: the table of an indirect descriptor; NEXT has no meaning in it.
    fn indirect(&mut self, d: &Desc, to: Direction, pieces: &mut Pieces) -> Result<(), Broken> {
        let whole = d.len > 0 && d.len.is_multiple_of(DESC_BYTES);
        if !self.indirect || !whole {
            return Err(Broken::Indirect);
        }
        let host = self
            .mem
            .at(&mut self.region, d.addr, d.len)
            .filter(|h| h.len == d.len)
            .ok_or(Broken::Address(d.addr))?;
        let count = d.len / DESC_BYTES;
        if count > CHAIN_MAX {
            return Err(Broken::Chain);
        }
        for i in 0..count {
            // SAFETY: `i < count`, and the table has `count` descriptors in one region.
            let e = unsafe { Self::desc(host.ptr, i) };
            if e.flags & INDIRECT != 0 {
                return Err(Broken::Indirect);
            }
            self.buffer(&e, to, pieces)?;
        }
        Ok(())
    }

    fn mark(&self, at: NonNull<u8>, len: u64) -> Result<(), Broken> {
        let Some(log) = &self.log else { return Ok(()) };
        let gpa = self.mem.gpa(at).ok_or(Broken::Log(0))?;
        log.mark(gpa, len).then_some(()).ok_or(Broken::Log(gpa))
    }

    fn set_event(&mut self, off_wrap: u16, flags: u16) -> Result<(), Broken> {
        if flags != EVENT_AT && self.flags == Some(flags) {
            return Ok(());
        }
        self.flags = Some(flags);
        let word = u32::from(off_wrap) | u32::from(flags) << 16;
        // SAFETY: the device area has 4 bytes, aligned to 4 and mapped (checked at set-up).
        let area = unsafe { &*self.areas.used.as_ptr().cast::<AtomicU32>() };
        area.store(word.to_le(), Ordering::Relaxed);
        self.mark(self.areas.used, 4)
    }
}

impl Ring for Packed {
    fn rebind(&mut self, live: &Live) {
        self.mem = live.mem.clone();
        self.areas = live.areas;
        self.log = live.log.clone();
        self.region = 0;
    }

    #[inline]
    fn peek(
        &mut self,
        at: Pos,
        direction: Direction,
        pieces: &mut Pieces,
    ) -> Result<Option<(Chain, Pos)>, Broken> {
        // The first descriptor's flags are written last (virtio 1.2, 2.8.14).
        if !self.is_available(at.0) {
            return Ok(None);
        }
        let mut pos = at.0;
        let mut slots = 0;
        loop {
            slots += 1;
            if slots > self.num || u32::from(slots) > CHAIN_MAX {
                return Err(Broken::Chain);
            }
            // SAFETY: a position's slot is below `num` (`new`, `behind`), and the table was checked for `num` descriptors.
            let d = unsafe { Self::desc(self.areas.desc, u32::from(pos & !WRAP)) };
            pos = behind(pos, 1, self.num);
            if d.flags & INDIRECT != 0 {
                if slots > 1 || d.flags & NEXT != 0 {
                    return Err(Broken::Indirect);
                }
                self.indirect(&d, direction, pieces)?;
            } else {
                self.buffer(&d, direction, pieces)?;
            }
            if d.flags & NEXT == 0 {
                // The last one has the chain's id.
                return Ok(Some((Chain { id: d.id, slots }, Pos(pos))));
            }
        }
    }

    fn peek_plain(&mut self, at: Pos, max: usize, direction: Direction, out: &mut Plains) {
        let want = match direction {
            Direction::Read => 0,
            Direction::Write => WRITE,
        };
        let mut pos = at.0;
        let mut found = 0;
        for plain in out.room().iter_mut().take(max) {
            if !self.is_available(pos) {
                break;
            }
            let slot = u32::from(pos & !WRAP);
            if found == 0 || slot.is_multiple_of(PER_LINE) {
                self.fetch(slot + PER_LINE);
            }
            // SAFETY: a position's slot is below `num` (`new`, `behind`), and the table was checked for `num` descriptors and
            // its alignment.
            let [addr, rest] = unsafe { words_aligned(self.areas.desc, slot) };
            let (len, id, flags) = (rest as u32, (rest >> 32) as u16, (rest >> 48) as u16);
            if flags & (NEXT | INDIRECT | WRITE) != want || len == 0 {
                break;
            }
            let Some(ptr) = self.mem.whole(&mut self.region, addr, len) else {
                break;
            };
            *plain = Plain { ptr, len, id };
            pos = behind(pos, 1, self.num);
            found += 1;
        }
        out.added(found);
    }

    #[inline]
    fn complete(&mut self, chain: Chain, written: u32) {
        self.done.push(Done::new(self.used, chain, written));
        self.used = behind(self.used, chain.slots, self.num);
    }

    #[inline]
    fn complete_run(&mut self, n: usize, chain: impl Fn(usize) -> (Chain, u32)) {
        let (num, mut used) = (self.num, self.used);
        self.done.extend((0..n).map(|i| {
            let (chain, written) = chain(i);
            let done = Done::new(used, chain, written);
            used = behind(used, chain.slots, num);
            done
        }));
        self.used = used;
    }

    #[inline]
    fn after(&self, at: Pos, slots: u16) -> Pos {
        Pos(behind(at.0, slots, self.num))
    }

    #[inline]
    fn slots(&self) -> usize {
        usize::from(self.num)
    }

    fn note(&self, max: usize, position: &mut Position) {
        let done = &self.done[..max.min(self.done.len())];
        let waiting = self.done.get(done.len()).map_or(self.used, |d| d.at);
        position.note(waiting, done.len(), |i| done[i].element());
    }

    fn publish(&mut self, max: usize) -> Result<bool, Broken> {
        let n = max.min(self.done.len());
        let Some((first, others)) = self.done[..n].split_first() else {
            return Ok(false);
        };
        let write = |d: &Done| {
            let offset = DESC_BYTES as usize * usize::from(d.at & !WRAP) + 8;
            // SAFETY: a position's slot is below `num`; length, id and flags are 8 bytes, 8 behind a multiple of 16 in the
            // table, which is aligned to 16.
            let at = unsafe { &*self.areas.desc.as_ptr().add(offset).cast::<AtomicU64>() };
            at.store(d.word.to_le(), Ordering::Release);
        };
        // The driver reads in order and stops at the first: that one goes last.
        others.iter().for_each(write);
        write(first);
        if self.log.is_some() {
            for d in &self.done[..n] {
                let offset = DESC_BYTES as usize * usize::from(d.at & !WRAP);
                // SAFETY: within the table.
                let at = unsafe { self.areas.desc.add(offset) };
                self.mark(at, DESC_BYTES as u64)?;
            }
        }
        self.unsignalled.get_or_insert(first.at);
        let slots: u32 = self.done[..n].iter().map(|d| u32::from(d.slots)).sum();
        self.shown = self.shown.saturating_add(slots);
        self.done.drain(..n);
        Ok(true)
    }

    fn wants_signal(&mut self) -> bool {
        let Some(first) = self.unsignalled.take() else {
            return false;
        };
        let shown = std::mem::take(&mut self.shown);
        let word = self.wanted();
        match (word >> 16) as u16 & 3 {
            EVENT_ENABLE => true,
            // A whole lap passes every event; the first time we do not know what a predecessor has passed.
            EVENT_AT if self.event_idx => {
                shown >= u32::from(self.num) || self.between(first, word as u16) < shown
            }
            _ => false,
        }
    }

    fn tells(&self) -> bool {
        self.event_idx && (self.wanted() >> 16) as u16 & 3 == EVENT_AT
    }

    fn has_read(&self, at: Pos) -> bool {
        // The slot before it is filled anew.
        if self.is_available(behind(at.0, self.num - 1, self.num)) {
            return true;
        }
        // A driver that has read all writes the next place that it wants to hear of (virtio 1.2, 2.8.10). One that polls leaves an old
        // one, which after a lap may look like a new one.
        let word = self.wanted();
        let event = word as u16;
        let ago = |p: u16| self.between(p, self.used);
        self.event_idx
            && (word >> 16) as u16 & 3 == EVENT_AT
            && (event & !WRAP) < self.num
            && ago(event) <= ago(at.0).min(u32::from(self.num))
    }

    fn arm(&mut self, at: Pos) -> Result<bool, Broken> {
        if self.event_idx {
            self.set_event(at.0, EVENT_AT)?;
        } else {
            self.set_event(0, EVENT_ENABLE)?;
        }
        // Our wish must be out before we look again.
        fence(Ordering::SeqCst);
        Ok(self.is_available(at.0))
    }

    fn quiet(&mut self) -> Result<(), Broken> {
        self.set_event(0, EVENT_DISABLE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Also of rings that are shorter than what a guest can make us count.
    #[test]
    fn a_position_is_where_single_steps_lead_and_lies_in_the_ring() {
        for num in [1, 2, 3, 8, 64, 1024, 32768] {
            let mut at = START;
            for slots in 0..200u16 {
                assert_eq!(behind(START, slots, num), at, "{slots} of {num}");
                assert!((at & !WRAP) < num);
                at = behind(at, 1, num);
            }
            assert!((behind(num - 1, u16::MAX, num) & !WRAP) < num);
        }
    }
}
