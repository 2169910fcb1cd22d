//! The split ring (virtio 1.2, 2.7): descriptor table, available ring, used ring.
//!
//! ```text
//!   desc   16 bytes each: addr u64, len u32, flags u16, next u16
//!   avail  flags u16, idx u16, ring [u16; num], used_event u16
//!   used   flags u16, idx u16, ring [(id u32, len u32); num], avail_event u16
//! ```
//!
//! We give chains back in the order in which they came, so the used index is also the position of the first chain that
//! is still ours, and nothing is in flight between the two indices.
//!
//! Invariant: every access to the three areas is at an offset below the size that was checked when the ring was set up,
//! and volatile or atomic but for used entries, which nobody reads before the index behind them.
#![allow(unsafe_code)]

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use super::super::dirty::DirtyLog;
use super::super::features::RingFeatures;
use super::super::live::{Areas, Live};
use super::common::{DESC_BYTES, atomic, buffer, words, words_aligned};
use super::{Broken, CHAIN_MAX, Chain, Direction, Pieces, Plain, Plains, Pos, Ring};
use crate::mem::copy::LINE;
use crate::mem::guest::GuestMem;
use crate::mem::prefetch_to_write;
use crate::port::BURST;

const DESC_NEXT: u16 = 1;
const DESC_WRITE: u16 = 2;
const DESC_INDIRECT: u16 = 4;
const AVAIL_NO_INTERRUPT: u16 = 1;
const USED_NO_NOTIFY: u16 = 1;
/// Where the rings start behind flags and index.
const RING: usize = 4;

/// Bytes of the three areas for a ring of `num`.
pub fn sizes(num: u16) -> [u64; 3] {
    let num = u64::from(num);
    [16 * num, 6 + 2 * num, 6 + 8 * num]
}

/// The alignment of the three areas (virtio 1.2, 2.7).
pub const ALIGN: [usize; 3] = [16, 2, 4];

#[derive(Clone, Copy)]
struct Desc {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

/// A split ring.
#[derive(Debug)]
pub struct Split {
    mem: Arc<GuestMem>,
    areas: Areas,
    log: Option<(Arc<DirtyLog>, u64)>,
    num: u16,
    event_idx: bool,
    indirect: bool,
    region: usize,
    /// The driver's index when we last looked.
    avail: u16,
    /// Where the next used entry goes.
    used: u16,
    /// What the driver sees as our index.
    published: u16,
    /// The index at the last decision about a signal.
    signalled: Option<u16>,
    /// `flags` as we last wrote it.
    flags: Option<u16>,
}

// SAFETY: the pointers lead into mappings that `mem` keeps and that are the same for all threads.
unsafe impl Send for Split {}

impl Split {
    /// A ring of `num` (a power of two) entries whose areas were checked for that size and alignment, at the position
    /// that [`Split::used_idx`] found.
    pub fn new(live: &Live, num: u16, next: u16, features: &RingFeatures) -> Split {
        let mut ring = Split {
            mem: live.mem.clone(),
            areas: live.areas,
            log: None,
            num,
            event_idx: features.event_idx,
            indirect: features.indirect,
            region: 0,
            avail: next,
            used: next,
            published: next,
            signalled: None,
            flags: None,
        };
        ring.rebind(live);
        // A run that was killed may have written entries and not said so.
        let _ = ring.mark(0, sizes(num)[2] as usize);
        ring
    }

    /// The driver has not been shown the last `unshown` of what was given back; their entries are written.
    pub fn not_shown(mut self, unshown: u16) -> Split {
        self.published = self.published.wrapping_sub(unshown);
        self
    }

    /// The used index in guest memory: everything before it was given back.
    pub fn used_idx(areas: &Areas) -> u16 {
        // SAFETY: the used area has at least 4 bytes, is aligned to 4 and mapped (checked at set-up).
        unsafe { atomic(areas.used, 2) }.load(Ordering::Acquire)
    }

    /// How many chains the driver has made available beyond that position; more than `num` in a ring that is broken.
    pub fn ahead(areas: &Areas, used: u16) -> u16 {
        // SAFETY: the available area has at least 4 bytes, is aligned to 2 and mapped (checked at set-up).
        let avail = unsafe { atomic(areas.avail, 2) }.load(Ordering::Acquire);
        avail.wrapping_sub(used)
    }

    /// Checks a ring's areas once: in one region each, aligned.
    pub fn areas(mem: &GuestMem, num: u16, desc: u64, avail: u64, used: u64) -> Option<Areas> {
        let [d, a, u] = sizes(num);
        Some(Areas {
            desc: mem.ring(desc, d, ALIGN[0])?,
            avail: mem.ring(avail, a, ALIGN[1])?,
            used: mem.ring(used, u, ALIGN[2])?,
        })
    }

    #[inline]
    fn slot(&self, pos: u16) -> usize {
        usize::from(pos & (self.num - 1))
    }

    #[inline]
    fn load_avail_idx(&self) -> u16 {
        // SAFETY: offset 2 of the available area, aligned to 2 and mapped (checked at set-up).
        unsafe { atomic(self.areas.avail, 2) }.load(Ordering::Acquire)
    }

    #[inline]
    fn read_avail(&self, offset: usize) -> u16 {
        // SAFETY: callers pass an even offset of at most 4 + 2 * num, within the area of 6 + 2 * num bytes that was
        // checked at set-up.
        unsafe { atomic(self.areas.avail, offset) }.load(Ordering::Relaxed)
    }

    /// The driver's flags ask for no signals.
    #[inline]
    fn asks_for_none(&self) -> bool {
        u16::from_le(self.read_avail(0)) & AVAIL_NO_INTERRUPT != 0
    }

    /// Writes an entry of the used ring. Nobody looks at it before the index has passed it.
    #[inline(always)]
    fn write_used(&self, pos: u16, id: u16, written: u32) {
        let entry = u64::from(id) | u64::from(written) << 32;
        // SAFETY: a slot's entry ends at 4 + 8 * num at most, within the used area checked at set-up.
        unsafe {
            let at = self.areas.used.as_ptr().add(RING + 8 * self.slot(pos));
            at.cast::<u64>().write_unaligned(entry.to_le());
        }
    }

    /// Takes the lines of `n` used entries away from the driver's processor, which has read what stood there a lap ago: so much
    /// earlier than they are written that no store has to wait.
    #[inline(always)]
    fn fetch_used(&self, pos: u16, n: usize) {
        for i in (0..n).step_by(LINE / 8) {
            let offset = RING + 8 * self.slot(pos.wrapping_add(i as u16));
            prefetch_to_write(self.areas.used.as_ptr().wrapping_add(offset));
        }
    }

    /// Looks at the driver's index again.
    #[inline]
    fn look(&mut self) -> Result<(), Broken> {
        let avail = self.load_avail_idx();
        let ahead = avail.wrapping_sub(self.used);
        // Nor does it go back behind what we have seen.
        if ahead > self.num || avail.wrapping_sub(self.avail) > self.num {
            return Err(Broken::Index(ahead));
        }
        self.avail = avail;
        Ok(())
    }

    /// Descriptor `i` of the table at `table`, which has more than `i` of them.
    ///
    /// # Safety
    /// `table` is mapped for `16 * (i + 1)` bytes.
    #[inline]
    unsafe fn desc(table: NonNull<u8>, i: u32) -> Desc {
        // SAFETY: by the contract of this function.
        let [addr, rest] = unsafe { words(table, i) };
        Desc {
            addr,
            len: rest as u32,
            flags: (rest >> 32) as u16,
            next: (rest >> 48) as u16,
        }
    }

    /// Writes an u16 of the used area and marks it.
    fn store_used(&mut self, offset: usize, value: u16, order: Ordering) -> Result<(), Broken> {
        // SAFETY: callers pass 0, 2 or 4 + 8 * num, within the area of 6 + 8 * num bytes that was checked at set-up and
        // is aligned to 4.
        unsafe { atomic(self.areas.used, offset) }.store(value, order);
        self.mark(offset, 2)
    }

    fn mark(&self, offset: usize, len: usize) -> Result<(), Broken> {
        match &self.log {
            Some((log, base)) => {
                let gpa = base.wrapping_add(offset as u64);
                log.mark(gpa, len as u64)
                    .then_some(())
                    .ok_or(Broken::Log(gpa))
            }
            None => Ok(()),
        }
    }

    fn set_flags(&mut self, flags: u16) -> Result<(), Broken> {
        if self.flags == Some(flags) {
            return Ok(());
        }
        self.flags = Some(flags);
        self.store_used(0, flags, Ordering::Relaxed)
    }
}

impl Ring for Split {
    fn rebind(&mut self, live: &Live) {
        self.mem = live.mem.clone();
        self.areas = live.areas;
        self.log = live.log.clone().zip(live.used_log);
        self.region = 0;
    }

    #[inline]
    fn peek(
        &mut self,
        at: Pos,
        direction: Direction,
        pieces: &mut Pieces,
    ) -> Result<Option<(Chain, Pos)>, Broken> {
        if at.0 == self.avail {
            self.look()?;
            if at.0 == self.avail {
                return Ok(None);
            }
        }
        let id = u16::from_le(self.read_avail(RING + 2 * self.slot(at.0)));
        let mut table = self.areas.desc;
        let mut table_len = u32::from(self.num);
        let mut in_indirect = false;
        let mut i = u32::from(id);
        let mut steps = 0;
        loop {
            if i >= table_len {
                return Err(Broken::Descriptor(i as u16));
            }
            // SAFETY: `i < table_len`; the ring's own table was checked for `num` descriptors, an indirect one below.
            let d = unsafe { Self::desc(table, i) };
            if d.flags & DESC_INDIRECT != 0 {
                // virtio 1.2, 2.7.5.3.1: not nested, no NEXT, whole descriptors.
                let whole = d.len > 0 && d.len.is_multiple_of(DESC_BYTES);
                if !self.indirect || in_indirect || d.flags & DESC_NEXT != 0 || !whole {
                    return Err(Broken::Indirect);
                }
                let host = self
                    .mem
                    .at(&mut self.region, d.addr, d.len)
                    .filter(|h| h.len == d.len)
                    .ok_or(Broken::Address(d.addr))?;
                (table, table_len, in_indirect, i) = (host.ptr, d.len / DESC_BYTES, true, 0);
                continue;
            }
            steps += 1;
            if steps > CHAIN_MAX {
                return Err(Broken::Chain);
            }
            if (d.flags & DESC_WRITE != 0) != (direction == Direction::Write) {
                return Err(Broken::Direction);
            }
            buffer(&self.mem, &mut self.region, d.addr, d.len, pieces)?;
            if d.flags & DESC_NEXT == 0 {
                break;
            }
            i = u32::from(d.next);
        }
        Ok(Some((Chain { id, slots: 1 }, Pos(at.0.wrapping_add(1)))))
    }

    fn peek_plain(&mut self, at: Pos, max: usize, direction: Direction, out: &mut Plains) {
        let max = max.min(BURST);
        let here = |ring: &Split| usize::from(ring.avail.wrapping_sub(at.0));
        // The one that looks without need pays for a line that the driver is writing.
        if here(self) < max && self.look().is_err() {
            return;
        }
        let n = here(self).min(max);
        let mut ids = [0u16; BURST];
        for (i, id) in ids[..n].iter_mut().enumerate() {
            let slot = self.slot(at.0.wrapping_add(i as u16));
            *id = u16::from_le(self.read_avail(RING + 2 * slot));
        }
        let want = match direction {
            Direction::Read => 0,
            Direction::Write => DESC_WRITE,
        };
        self.fetch_used(at.0, n);
        let mut found = 0;
        for (&id, plain) in ids[..n].iter().zip(out.room()) {
            if id >= self.num {
                break;
            }
            // SAFETY: `id < num`, and the table was checked for `num` descriptors and its alignment.
            let [addr, rest] = unsafe { words_aligned(self.areas.desc, u32::from(id)) };
            let (len, flags) = (rest as u32, (rest >> 32) as u16);
            if flags & (DESC_NEXT | DESC_INDIRECT | DESC_WRITE) != want || len == 0 {
                break;
            }
            let Some(ptr) = self.mem.whole(&mut self.region, addr, len) else {
                break;
            };
            *plain = Plain { ptr, len, id };
            found += 1;
        }
        out.added(found);
    }

    #[inline]
    fn complete(&mut self, chain: Chain, written: u32) {
        self.write_used(self.used, chain.id, written);
        self.used = self.used.wrapping_add(1);
    }

    #[inline]
    fn complete_run(&mut self, n: usize, chain: impl Fn(usize) -> (Chain, u32)) {
        // All entries of a line, one behind the other: stores that go to and fro between lines that the driver has wait for
        // each of them again and again.
        let first = self.used;
        for i in 0..n {
            let (chain, written) = chain(i);
            self.write_used(first.wrapping_add(i as u16), chain.id, written);
        }
        self.used = first.wrapping_add(n as u16);
    }

    #[inline]
    fn after(&self, at: Pos, slots: u16) -> Pos {
        Pos(at.0.wrapping_add(slots))
    }

    #[inline]
    fn slots(&self) -> usize {
        usize::from(self.num)
    }

    fn publish(&mut self, max: usize) -> Result<bool, Broken> {
        let count = max.min(usize::from(self.used.wrapping_sub(self.published)));
        if count == 0 {
            return Ok(false);
        }
        let first = self.slot(self.published);
        self.published = self.published.wrapping_add(count as u16);
        // Release: entries and buffers before the index.
        self.store_used(2, self.published.to_le(), Ordering::Release)?;
        if self.log.is_some() {
            let up = count.min(usize::from(self.num) - first);
            self.mark(RING + 8 * first, 8 * up)?;
            self.mark(RING, 8 * (count - up))?;
        }
        Ok(true)
    }

    fn wants_signal(&mut self) -> bool {
        let before = self.signalled.replace(self.published);
        if !self.event_idx {
            return !self.asks_for_none();
        }
        let event = u16::from_le(self.read_avail(RING + 2 * usize::from(self.num)));
        before.is_none_or(|b| passed(event, self.published, b))
    }

    #[inline]
    fn is_polled(&self) -> bool {
        !self.event_idx && self.asks_for_none()
    }

    fn tells(&self) -> bool {
        self.event_idx
    }

    fn has_read(&self, at: Pos) -> bool {
        if self.load_avail_idx().wrapping_sub(at.0) >= self.num {
            return true;
        }
        // A driver that has read all writes the next index that it wants to hear of (virtio 1.2, 2.7.7.1). Zero is also what Linux
        // writes to hear of nothing.
        let event = u16::from_le(self.read_avail(RING + 2 * usize::from(self.num)));
        let ago = |p: u16| self.used.wrapping_sub(p);
        let says = ago(event) <= ago(at.0).min(self.num);
        self.event_idx && says && (event != 0 || self.used == 0)
    }

    fn arm(&mut self, at: Pos) -> Result<bool, Broken> {
        if self.event_idx {
            let offset = RING + 8 * usize::from(self.num);
            self.store_used(offset, at.0.to_le(), Ordering::Relaxed)?;
        }
        self.set_flags(0)?;
        // Our wish must be out before we look again.
        fence(Ordering::SeqCst);
        self.look()?;
        Ok(self.avail != at.0)
    }

    fn quiet(&mut self) -> Result<(), Broken> {
        // With EVENT_IDX the event stays behind the driver's index, which passes it once in 65536 chains.
        if self.event_idx {
            return Ok(());
        }
        self.set_flags(USED_NO_NOTIFY.to_le())
    }
}

/// Whether an index that moved from `old` to `new` has passed `event` (virtio 1.2, 2.7.7.2).
#[inline]
fn passed(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}
