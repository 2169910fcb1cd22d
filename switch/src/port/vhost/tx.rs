//! The guest's receive ring: frames out of the switch, copied once, straight into the guest's buffers.
//!
//! `send` copies and marks dirty pages; `flush` shows the guest everything at once. Nothing is consumed by a frame that
//! does not fit.
#![allow(unsafe_code)]

use std::sync::atomic::{Ordering, fence};

use super::csum;
use super::features::{RingFeatures, gso};
use super::live::{Gate, signal};
use super::ring::{Broken, Chain, Direction, Piece, Pieces, Plain, Plains, Pos, Ring};
use super::rx::copy_head;
use crate::port::{FRAME_MAX, Frame, HEAD, NeverReason, Sent, TxQueue, VnetHdr};

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
    /// For checksums in software.
    bounce: Box<[u8]>,
    /// Sent since the last flush.
    unflushed: u64,
    /// Something was flushed, and nobody has asked whether the driver wants a signal.
    owes: bool,
}

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
            if let Some(live) = self.gate.live() {
                self.ring.rebind(live);
            }
        }
        let live = self.gate.live().is_some() && !self.gate.is_broken();
        if !live {
            self.gate.leave();
        }
        live
    }

    /// Finds buffers for `need` bytes.
    fn collect(&mut self, need: u64) -> Result<Pos, Not> {
        self.pieces.clear();
        self.chains.clear();
        let mut at = self.next;
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

    /// Writes a frame of which nothing is asked into a buffer that takes it whole.
    #[inline]
    fn write_plain(&mut self, frame: &Frame<'_>, p: &Plain) -> Result<(), Broken> {
        let hdr_len = usize::from(self.features.hdr_len);
        let need = hdr_len + frame.len as usize;
        debug_assert!(need <= p.piece.host.len as usize);
        // SAFETY: the piece is writable for `need` bytes (by the callers' check): the header's 10 or 12 and the frame's.
        // The head is our own memory; the other pieces may be the guest's own and overlap, for which `copy` is defined.
        unsafe {
            let to = p.piece.host.ptr.as_ptr();
            to.cast::<u64>().write_unaligned(0);
            // num_buffers, where there is one (virtio 1.2, 5.1.6.4).
            match hdr_len {
                12 => to
                    .add(8)
                    .cast::<u32>()
                    .write_unaligned((1u32 << 16).to_le()),
                _ => to.add(8).cast::<u16>().write_unaligned(0),
            }
            let mut to = to.add(hdr_len);
            let head = frame.head();
            if head.len() <= HEAD {
                copy_head(head.as_ptr(), to, head.len());
            } else {
                std::ptr::copy_nonoverlapping(head.as_ptr(), to, head.len());
            }
            to = to.add(head.len());
            for s in frame.rest() {
                std::ptr::copy(s.as_ptr(), to, s.len());
                to = to.add(s.len());
            }
        }
        if let Some(log) = self.gate.live().and_then(|l| l.log.as_ref())
            && !log.mark(p.piece.gpa, need as u64)
        {
            return Err(Broken::Log(p.piece.gpa));
        }
        self.ring.complete(p.chain, need as u32);
        self.next = p.after;
        self.unflushed += 1;
        Ok(())
    }

    fn try_send(&mut self, frame: &Frame<'_>) -> Result<(), Not> {
        let guest = &self.features.guest;
        let len = frame.len as usize;
        if !guest.takes_gso(frame.vnet.gso_type()) {
            return Err(Not::Never(NeverReason::Offload));
        }
        if len > FRAME_MAX {
            return Err(Not::Never(NeverReason::TooLong));
        }
        let mut hdr = [0u8; 12];
        hdr[..10].copy_from_slice(&frame.vnet.0);
        let needs_csum = frame.vnet.flags() & VnetHdr::F_NEEDS_CSUM != 0;
        let csum_here = needs_csum && !guest.csum;
        if csum_here && frame.vnet.gso_type() != gso::NONE {
            return Err(Not::Never(NeverReason::Offload));
        }
        if !guest.csum {
            hdr[..10].fill(0);
        }

        let hdr_len = usize::from(self.features.hdr_len);
        let mut left = (hdr_len + len) as u32;
        let after = self.collect(u64::from(left))?;
        // virtio 1.2, 5.1.6.4: the number of buffers, one if they can't be merged.
        hdr[10..].copy_from_slice(&(self.chains.len() as u16).to_le_bytes());

        if csum_here {
            let whole = &mut self.bounce[..len];
            frame.copy_to(whole);
            let start = usize::from(frame.vnet.csum_start());
            if !csum::complete(whole, start, usize::from(frame.vnet.csum_offset())) {
                return Err(Not::Never(NeverReason::Offload));
            }
        }

        let mut to = Cursor::new(self.pieces.all());
        // SAFETY: sources are readable for their lengths (our own arrays, a frame's segments, which outlive this call).
        unsafe {
            to.put(hdr.as_ptr(), hdr_len);
            if csum_here {
                to.put(self.bounce.as_ptr(), len);
            } else {
                to.put(frame.head().as_ptr(), frame.head().len());
                for s in frame.rest() {
                    to.put(s.as_ptr(), s.len());
                }
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
        Ok(())
    }

    fn set_broken(&mut self, why: Broken) {
        self.gate.set_broken(why);
    }
}

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
        self.ring
            .peek_plain(self.next, frames.len(), Direction::Write, &mut self.plains);
        let hdr_len = u32::from(self.features.hdr_len);
        let mut done = 0;
        for (i, frame) in frames.iter().enumerate() {
            let Some(&p) = self.plains.0.get(i) else {
                break;
            };
            let fits = p.piece.host.len >= hdr_len + frame.len;
            if !fits || frame.vnet != VnetHdr::default() {
                break;
            }
            if let Err(why) = self.write_plain(frame, &p) {
                self.set_broken(why);
                break;
            }
            done += 1;
        }
        if self.unflushed == 0 {
            self.gate.leave();
        }
        done
    }

    fn send(&mut self, frame: &Frame<'_>) -> Sent {
        if self.gate.is_broken() {
            return Sent::Never(NeverReason::RingBroken);
        }
        if !self.enter() {
            return Sent::Down;
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
        self.gate
            .counters()
            .frames
            .fetch_add(self.unflushed, Ordering::Relaxed);
        self.unflushed = 0;
        self.gate.leave();
    }

    fn settle(&mut self) {
        if std::mem::take(&mut self.owes)
            && self.ring.wants_signal()
            && let Some(call) = self.gate.live().and_then(|l| l.call.as_ref())
        {
            signal(call);
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
