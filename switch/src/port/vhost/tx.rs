//! The guest's receive ring: frames out of the switch, copied once, straight into the guest's buffers.
//!
//! `send` copies and marks dirty pages; `flush` shows the guest everything at once. Nothing is consumed by a frame that
//! does not fit.
#![allow(unsafe_code)]

use std::sync::atomic::{Ordering, fence};

use arrayvec::ArrayVec;

use super::features::RingFeatures;
use super::live::Gate;
use super::ring::{Broken, Chain, Direction, Piece, Pieces, Plain, Plains, Pos, Ring};
use crate::mem::copy::{LINE, copy_long, copy_short};
use crate::mem::prefetch_to_write;
use crate::port::offload::cut::Cut;
use crate::port::offload::{csum, gso};
use crate::port::{BURST, FRAME_MAX, Frame, NeverReason, PLAIN_HDR, SEGS, Sent, TxQueue, VnetHdr};

/// See the module's text.
pub struct Tx<R: Ring> {
    ring: R,
    gate: Gate,
    features: RingFeatures,
    num: u16,
    next: Pos,
    pieces: Pieces,
    plains: Plains,
    /// The chains of one frame, with their bytes.
    chains: Vec<(Chain, u32)>,
    /// For checksums and segments in software.
    bounce: Box<[u8]>,
    /// Sent since the last flush.
    unflushed: u64,
    /// What ours can do.
    cpu: Cpu,
    /// Something was flushed, and nobody has asked whether the driver wants a signal.
    owes: bool,
}

/// A piece of what is sent: where it lies, and its length.
type Part = (*const u8, usize);

/// Why a frame was not sent.
enum Not {
    Full,
    Never(NeverReason),
    Broken(Broken),
}

impl From<Broken> for Not {
    fn from(b: Broken) -> Not {
        Not::Broken(b)
    }
}

impl<R: Ring> Tx<R> {
    /// A queue on a ring of `num` entries that starts at `next`.
    pub fn new(ring: R, gate: Gate, next: u16, num: u16, features: RingFeatures) -> Tx<R> {
        let mut tx = Tx {
            ring,
            gate,
            features,
            num,
            next: Pos(next),
            pieces: Pieces::default(),
            plains: Plains::default(),
            chains: Vec::with_capacity(usize::from(num)),
            bounce: vec![0; FRAME_MAX].into_boxed_slice(),
            unflushed: 0,
            cpu: Cpu::here(),
            owes: false,
        };
        // Nobody listens to the kicks for new buffers: a frame that found none is tried again by the worker.
        if tx.enter() {
            if let Err(why) = tx.ring.quiet() {
                tx.gate.set_broken(why);
            }
            tx.gate.leave();
        }
        tx
    }

    fn enter(&mut self) -> bool {
        self.gate.enter();
        if self.unflushed > 0 {
            // Within a burst; the control side waits for its end.
            return true;
        }
        if self.gate.refresh() {
            self.pieces.clear();
            self.plains.truncate(0);
            if let Some(live) = self.gate.live() {
                self.ring.rebind(live);
            }
        }
        if let Some(why) = self.gate.lost() {
            self.set_broken(why);
        }
        let live = self.gate.live().is_some() && !self.gate.is_broken();
        if !live {
            self.gate.leave();
        }
        live
    }

    /// Finds buffers for `need` bytes from `at` on; returns what is behind them.
    fn collect(&mut self, mut at: Pos, need: u64) -> Result<Pos, Not> {
        self.pieces.clear();
        self.chains.clear();
        let mut room = 0u64;
        let mut pieces = 0;
        while room < need {
            // Only mergeable buffers go together (virtio 1.2, 5.1.6.4).
            if !self.chains.is_empty() && !self.features.mrg {
                return Err(Not::Never(NeverReason::TooLong));
            }
            if self.chains.len() == usize::from(self.num) {
                return Err(Not::Never(NeverReason::TooLong));
            }
            let found = match self.ring.peek(at, Direction::Write, &mut self.pieces) {
                // Buffers so small that a frame would need thousands of them.
                Err(Broken::Chain) if !self.chains.is_empty() => {
                    return Err(Not::Never(NeverReason::TooLong));
                }
                found => found?,
            };
            let Some((chain, after)) = found else {
                return Err(Not::Full);
            };
            let all = self.pieces.all();
            let bytes: u64 = all[pieces..].iter().map(|p| u64::from(p.host.len)).sum();
            pieces = all.len();
            // Longer than a frame can be is as good as a frame's length.
            self.chains.push((chain, bytes.min(1 << 30) as u32));
            room += bytes;
            at = after;
        }
        Ok(at)
    }

    fn try_send(&mut self, frame: &Frame<'_>) -> Result<(), Not> {
        let guest = self.features.guest;
        let len = frame.len as usize;
        if len > FRAME_MAX {
            return Err(Not::Never(NeverReason::TooLong));
        }
        let needs_csum = frame.vnet.flags() & VnetHdr::F_NEEDS_CSUM != 0;
        let csum_here = needs_csum && !guest.csum;
        let is_gso = frame.vnet.gso_type() != gso::NONE;
        if !guest.takes_gso(frame.vnet.gso_type(), frame.head()) || (csum_here && is_gso) {
            return self.send_cut(frame);
        }
        let mut hdr = [0u8; 12];
        if guest.csum {
            hdr[..10].copy_from_slice(&frame.vnet.0);
        }
        let whole = self.hdr_bytes() + u64::from(frame.len);
        let after = self.collect(self.next, whole)?;
        let mut parts: ArrayVec<Part, { SEGS + 1 }> = ArrayVec::new();
        if csum_here {
            let whole = &mut self.bounce[..len];
            frame.copy_to(whole);
            let start = usize::from(frame.vnet.csum_start());
            if !csum::complete(whole, start, usize::from(frame.vnet.csum_offset())) {
                return Err(Not::Never(NeverReason::Offload));
            }
            parts.push((self.bounce.as_ptr(), len));
        } else {
            parts.push((frame.head().as_ptr(), frame.head().len()));
            parts.extend(frame.rest().iter().map(|s| (s.as_ptr(), s.len())));
        }
        // SAFETY: a frame's segments outlive this call, and our own arrays, which nobody changes meanwhile.
        unsafe { self.place(hdr, &parts, after) }
    }

    fn hdr_bytes(&self) -> u64 {
        u64::from(self.features.hdr_len)
    }

    /// Sends what the guest does not take in one piece as several: all of them or none.
    fn send_cut(&mut self, frame: &Frame<'_>) -> Result<(), Not> {
        let mut bounce = std::mem::take(&mut self.bounce);
        let whole = &mut bounce[..frame.len as usize];
        frame.copy_to(whole);
        let sent = match Cut::new(frame.vnet, whole) {
            Some(cut) => self.send_parts(cut),
            None => Err(Not::Never(NeverReason::Offload)),
        };
        self.bounce = bounce;
        sent
    }

    fn send_parts(&mut self, mut cut: Cut<'_>) -> Result<(), Not> {
        // So that a ring of two descriptors a buffer takes them when it is empty.
        if cut.lengths().len() > usize::from(self.num / 2) {
            return Err(Not::Never(NeverReason::Offload));
        }
        // A place for each before the first is written.
        let mut at = self.next;
        for len in cut.lengths() {
            at = self.collect(at, self.hdr_bytes() + len as u64)?;
        }
        while let Some((front, payload)) = cut.next_frame() {
            let need = self.hdr_bytes() + (front.len() + payload.len()) as u64;
            let after = match self.collect(self.next, need) {
                // It was there a moment ago.
                Err(Not::Full | Not::Never(_)) => return Err(Not::Broken(Broken::Chain)),
                found => found?,
            };
            let parts = [
                (front.as_ptr(), front.len()),
                (payload.as_ptr(), payload.len()),
            ];
            // SAFETY: both are in our own memory, as long as `cut` is.
            unsafe { self.place([0; 12], &parts, after)? };
        }
        Ok(())
    }

    /// Writes a header and a frame into what [`Tx::collect`] has found last.
    ///
    /// # Safety
    /// Each part is readable for its length.
    unsafe fn place(&mut self, mut hdr: [u8; 12], parts: &[Part], after: Pos) -> Result<(), Not> {
        let hdr_len = usize::from(self.features.hdr_len);
        // virtio 1.2, 5.1.6.4: the number of buffers, one if they can't be merged.
        hdr[10..].copy_from_slice(&(self.chains.len() as u16).to_le_bytes());
        let mut left = (hdr_len + parts.iter().map(|p| p.1).sum::<usize>()) as u32;
        let mut to = Cursor::new(self.pieces.all());
        // SAFETY: our own array, and the parts by the contract.
        unsafe {
            to.put(hdr.as_ptr(), hdr_len);
            for &(from, len) in parts {
                to.put(from, len);
            }
        }
        if let Some(log) = self.gate.live().and_then(|l| l.log.as_ref()) {
            let mut left = left;
            for p in self.pieces.all() {
                let n = left.min(p.host.len);
                if !log.mark(p.gpa, u64::from(n)) {
                    return Err(Not::Broken(Broken::Log(p.gpa)));
                }
                left -= n;
                if left == 0 {
                    break;
                }
            }
        }
        for &(chain, room) in &self.chains {
            let n = left.min(room);
            self.ring.complete(chain, n);
            left -= n;
        }
        self.next = after;
        // One that is not plain ends what was looked at ahead.
        self.plains.take(self.chains.len());
        Ok(())
    }

    fn set_broken(&mut self, why: Broken) {
        self.gate.set_broken(why);
    }

    /// Looks at the next plain buffers, as far as a burst more, and takes their first lines away from the guest's processor,
    /// which has read them: so much earlier than they are written that no store has to wait.
    #[inline]
    fn look_ahead(&mut self, want: usize) {
        let had = self.plains.waiting().len();
        let at = self.ring.after(self.next, had as u16);
        let max = want.min(self.ring.slots()).saturating_sub(had);
        if max == 0 {
            return;
        }
        self.ring
            .peek_plain(at, max, Direction::Write, &mut self.plains);
        for p in &self.plains.waiting()[had..] {
            let at = p.ptr.as_ptr();
            prefetch_to_write(match is_apart(at) {
                true => at.wrapping_add(PLAIN_HDR.len()),
                false => at,
            });
        }
    }

    /// Marks the first `n` of the plain buffers, of which so many bytes were written.
    fn mark_run(&mut self, n: usize, written: impl Fn(usize) -> u32) {
        let Some(live) = self.gate.live() else { return };
        let Some(log) = &live.log else { return };
        let mark = |(i, p): (usize, &Plain)| {
            let gpa = live.mem.gpa(p.ptr).unwrap_or_default();
            let marked = log.mark(gpa, u64::from(written(i)));
            (!marked).then_some(Broken::Log(gpa))
        };
        if let Some(why) = self.plains.waiting()[..n].iter().enumerate().find_map(mark) {
            self.set_broken(why);
        }
    }
}

/// What the copies of a run are compiled for: a line by one store keeps twice as many lines under way.
#[derive(Debug, Clone, Copy)]
enum Cpu {
    Any,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
}

impl Cpu {
    fn here() -> Cpu {
        #[cfg(target_arch = "x86_64")]
        if std::arch::is_x86_feature_detected!("avx512f")
            && std::arch::is_x86_feature_detected!("avx512vl")
        {
            return Cpu::Avx512;
        }
        #[cfg(target_arch = "x86_64")]
        if std::arch::is_x86_feature_detected!("avx2") {
            return Cpu::Avx2;
        }
        Cpu::Any
    }
}

/// Writes each frame into the buffer of the same place.
///
/// # Safety
/// As for [`write_plain`], for each.
#[inline(always)]
unsafe fn write_run(frames: &[Frame<'_>], plains: &[Plain], hdr_len: u8) {
    for (frame, p) in frames.iter().zip(plains) {
        // SAFETY: by the contract.
        unsafe { write_plain(frame, p.ptr.as_ptr(), hdr_len) };
    }
}

/// # Safety
/// As for [`write_run`]; the processor has AVX-512.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vl")]
unsafe fn write_run_avx512(frames: &[Frame<'_>], plains: &[Plain], hdr_len: u8) {
    // SAFETY: by the contract.
    unsafe { write_run(frames, plains, hdr_len) }
}

/// # Safety
/// As for [`write_run`]; the processor has AVX2.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn write_run_avx2(frames: &[Frame<'_>], plains: &[Plain], hdr_len: u8) {
    // SAFETY: by the contract.
    unsafe { write_run(frames, plains, hdr_len) }
}

/// Writes a frame of which nothing is asked, and its header, into a buffer that takes both.
///
/// # Safety
/// `to` is writable for `hdr_len` (10 or 12) bytes and the frame's.
#[inline(always)]
unsafe fn write_plain(frame: &Frame<'_>, mut to: *mut u8, hdr_len: u8) {
    let plain = usize::from(hdr_len) == PLAIN_HDR.len();
    // SAFETY: all of it is within the header and the frame.
    unsafe {
        match frame.plain_front().filter(|_| plain) {
            Some(front) if is_apart(to) => {
                put_apart(to);
                to = to.add(PLAIN_HDR.len());
                copy_short(frame.head().as_ptr(), to, frame.head().len());
                to = to.add(front.len() - PLAIN_HDR.len());
            }
            Some(front) => {
                copy_short(front.as_ptr(), to, front.len());
                to = to.add(front.len());
            }
            None => {
                // The shorter one lacks the number of buffers (virtio 1.2, 5.1.6.1).
                std::ptr::copy_nonoverlapping(PLAIN_HDR.as_ptr(), to, usize::from(hdr_len));
                to = to.add(usize::from(hdr_len));
                copy_short(frame.head().as_ptr(), to, frame.head().len());
                to = to.add(frame.head().len());
            }
        }
        for s in frame.rest() {
            copy_long(s.as_ptr(), to, s.len());
            to = to.add(s.len());
        }
    }
}

/// Whether a header at `to` lies in a cache line in front of its frame's, as in the buffers of DPDK.
#[inline(always)]
fn is_apart(to: *const u8) -> bool {
    (to as usize)
        .wrapping_add(PLAIN_HDR.len())
        .is_multiple_of(LINE)
}

/// Writes [`PLAIN_HDR`], unless it stands there already, mostly from last time: a line that is not written stays with the
/// guest's processor.
///
/// # Safety
/// `to` is writable for its 12 bytes, and [`is_apart`]: so it is aligned to 4.
#[inline(always)]
unsafe fn put_apart(to: *mut u8) {
    // SAFETY: by the contract.
    unsafe {
        if to.cast::<[u32; 3]>().read_volatile() != PLAIN_WORDS {
            std::ptr::copy_nonoverlapping(PLAIN_HDR.as_ptr(), to, PLAIN_HDR.len());
        }
    }
}

/// [`PLAIN_HDR`] as it lies in memory.
const PLAIN_WORDS: [u32; 3] = {
    let h = &PLAIN_HDR;
    [
        u32::from_ne_bytes([h[0], h[1], h[2], h[3]]),
        u32::from_ne_bytes([h[4], h[5], h[6], h[7]]),
        u32::from_ne_bytes([h[8], h[9], h[10], h[11]]),
    ]
};

/// Writes one after the other into pieces.
struct Cursor<'a> {
    pieces: &'a [Piece],
    offset: usize,
}

impl<'a> Cursor<'a> {
    fn new(pieces: &'a [Piece]) -> Cursor<'a> {
        Cursor { pieces, offset: 0 }
    }

    /// Writes `len` bytes, or as many as there is room for.
    ///
    /// # Safety
    /// `from` is readable for `len` bytes.
    #[inline]
    unsafe fn put(&mut self, mut from: *const u8, mut len: usize) {
        while len > 0 {
            let [piece, behind @ ..] = self.pieces else {
                return;
            };
            let room = piece.host.len as usize - self.offset;
            let n = room.min(len);
            // SAFETY: `n` bytes are readable by contract, and lie within the piece, which is mapped as long as the
            // ring's snapshot. A guest that gives us the same memory to read and to write (its own, twice) gets bytes of
            // its own in an order of its own; `copy` is defined for that.
            unsafe {
                std::ptr::copy(from, piece.host.ptr.as_ptr().add(self.offset), n);
                from = from.add(n);
            }
            len -= n;
            self.offset += n;
            if self.offset == piece.host.len as usize {
                self.pieces = behind;
                self.offset = 0;
            }
        }
    }
}

impl<R: Ring> TxQueue for Tx<R> {
    fn send_run(&mut self, frames: &[Frame<'_>]) -> usize {
        if self.gate.is_broken() || !self.enter() {
            return 0;
        }
        let hdr_len = self.features.hdr_len;
        let room = |frame: &Frame<'_>| u32::from(hdr_len) + frame.len;
        let simple = |frame: &&Frame<'_>| frame.vnet == VnetHdr::default();
        let n = frames.iter().take_while(simple).count();
        if self.plains.waiting().len() < n {
            self.look_ahead(n);
        }
        let plains = self.plains.waiting();
        let fits = |(frame, p): &(&Frame<'_>, &Plain)| p.len >= room(frame);
        let n = frames[..n].iter().zip(plains).take_while(fits).count();
        let (frames, plains) = (&frames[..n], &plains[..n]);
        // SAFETY: the buffers are writable for header and frame, as was just checked; nothing is asked for; the processor has
        // what `cpu` says.
        unsafe {
            match self.cpu {
                #[cfg(target_arch = "x86_64")]
                Cpu::Avx512 => write_run_avx512(frames, plains, hdr_len),
                #[cfg(target_arch = "x86_64")]
                Cpu::Avx2 => write_run_avx2(frames, plains, hdr_len),
                Cpu::Any => write_run(frames, plains, hdr_len),
            }
        }
        if n > 0 {
            let chain = |i: usize| (plains[i].chain(), room(&frames[i]));
            self.ring.complete_run(n, chain);
            self.mark_run(n, |i| room(&frames[i]));
            self.plains.take(n);
            self.next = self.ring.after(self.next, n as u16);
            self.unflushed += n as u64;
            if self.plains.waiting().len() < BURST {
                self.look_ahead(BURST);
            }
        }
        if self.unflushed == 0 {
            self.gate.leave();
        }
        n
    }

    fn send(&mut self, frame: &Frame<'_>) -> Sent {
        if self.gate.is_broken() {
            return Sent::Never(NeverReason::RingBroken);
        }
        if !self.enter() {
            return match self.gate.is_broken() {
                true => Sent::Never(NeverReason::RingBroken),
                false => Sent::Down,
            };
        }
        let not = match self.try_send(frame) {
            Ok(()) => {
                self.unflushed += 1;
                return Sent::Yes;
            }
            Err(not) => not,
        };
        let stale = self.gate.is_stale();
        if self.unflushed == 0 {
            self.gate.leave();
        }
        match not {
            Not::Full => Sent::Full,
            Not::Never(why) => Sent::Never(why),
            // In memory that was added meanwhile: the next burst knows it.
            Not::Broken(Broken::Address(_)) if stale => Sent::Full,
            Not::Broken(why) => {
                self.set_broken(why);
                Sent::Never(NeverReason::RingBroken)
            }
        }
    }

    fn flush(&mut self) {
        if self.unflushed == 0 {
            return;
        }
        match self.ring.publish() {
            Ok(_) => self.owes = true,
            Err(why) => self.set_broken(why),
        }
        self.gate.set_next(self.next.0);
        self.gate.count(std::mem::take(&mut self.unflushed));
        self.gate.leave();
    }

    fn settle(&mut self) {
        if std::mem::take(&mut self.owes) && self.ring.wants_signal() && !self.gate.call() {
            self.set_broken(Broken::Call);
        }
    }
}

impl<R: Ring> Drop for Tx<R> {
    fn drop(&mut self) {
        self.flush();
        if self.owes {
            fence(Ordering::SeqCst);
            self.settle();
        }
    }
}
