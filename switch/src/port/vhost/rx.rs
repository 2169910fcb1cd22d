//! The guest's transmit ring: frames into the switch. A burst looks at waiting chains without consuming them; a chain
//! is given back only when the switch says that its frame is safe. So a switch that dies in between finds the frame in
//! guest memory again, and so does the target of a migration.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use arrayvec::ArrayVec;

use super::features::{Offloads, RingFeatures, gso};
use super::live::{Gate, clear, signal};
use super::ring::{Broken, Chain, Direction, Pieces, Pos, Ring};
use crate::mem::Seg;
use crate::port::{
    BURST, Burst, FRAME_MAX, FRAME_MIN, Frame, HEAD, RxErrors, RxQueue, SEGS, VnetHdr,
};

/// Descriptors' pieces per burst: what a guest may make us walk at most before others get their turn.
const PIECES_PER_BURST: usize = 2048;

/// A chain that was looked at and not given back yet.
struct Seen {
    chain: Chain,
    after: Pos,
    is_frame: bool,
}

/// See the module's text.
pub struct Rx<R> {
    ring: R,
    gate: Gate,
    kick: Option<Arc<File>>,
    features: RingFeatures,
    /// The first chain that is not given back.
    next: Pos,
    seen: VecDeque<Seen>,
    /// Up to here malformed chains were counted (a burst may look at one twice).
    counted: Pos,
    pieces: Pieces,
    /// For one frame per burst that has more pieces than a [`Frame`] holds.
    bounce: Box<[u8]>,
    errors: RxErrors,
}

enum Parsed {
    Frame,
    Malformed,
    /// Needs the bounce buffer, which is taken.
    Later,
}

impl<R: Ring> Rx<R> {
    /// A queue on a ring that starts at `next`.
    pub fn new(
        ring: R,
        gate: Gate,
        next: u16,
        kick: Option<Arc<File>>,
        features: RingFeatures,
    ) -> Rx<R> {
        Rx {
            ring,
            gate,
            kick,
            features,
            next: Pos(next),
            seen: VecDeque::with_capacity(BURST),
            counted: Pos(next),
            pieces: Pieces::default(),
            bounce: vec![0; FRAME_MAX].into_boxed_slice(),
            errors: RxErrors::default(),
        }
    }

    /// Takes a new snapshot over. False if the ring is closed or broken.
    #[inline]
    fn is_live(&mut self) -> bool {
        if self.gate.refresh() {
            self.pieces.clear();
            if let Some(live) = self.gate.live() {
                self.ring.rebind(live);
            }
        }
        self.gate.live().is_some() && !self.gate.is_broken()
    }

    /// Opens a section that writes to guest memory.
    fn enter(&mut self) -> bool {
        self.gate.enter();
        let live = self.is_live();
        if !live {
            self.gate.leave();
        }
        live
    }

    fn set_broken(&mut self, why: Broken) {
        // Memory that was added while we looked: the next burst sees it.
        if matches!(why, Broken::Address(_)) && self.gate.is_stale() {
            return;
        }
        self.errors.ring_broken += 1;
        self.gate.set_broken(why);
    }

    /// Gives back `frames` frames, and what was no frame before and behind them.
    fn give_back(&mut self, mut frames: usize) {
        let mut given = false;
        while let Some(s) = self.seen.front() {
            if s.is_frame {
                if frames == 0 {
                    break;
                }
                frames -= 1;
            }
            self.ring.complete(s.chain, 0);
            self.next = s.after;
            given = true;
            self.seen.pop_front();
        }
        if !given {
            return;
        }
        match self.ring.publish() {
            Ok(true) => {
                if let Some(call) = self.gate.live().and_then(|l| l.call.as_ref()) {
                    signal(call);
                }
            }
            Ok(false) => (),
            Err(why) => self.set_broken(why),
        }
        self.gate.set_next(self.next.0);
    }

    /// Makes a frame of the pieces.
    #[inline]
    fn parse<'q>(&mut self, bounce_free: &mut bool, out: &mut Burst<'q>) -> Parsed {
        let mut hdr = Fill::<12>::new(usize::from(self.features.hdr_len));
        let mut head = Fill::<HEAD>::new(HEAD);
        let total: u64 = self
            .pieces
            .all()
            .iter()
            .map(|p| u64::from(p.host.len))
            .sum();
        let len = total.saturating_sub(u64::from(self.features.hdr_len)) as usize;
        if !(FRAME_MIN..=FRAME_MAX).contains(&len) {
            return Parsed::Malformed;
        }
        let mut rest: ArrayVec<Seg<'q>, SEGS> = ArrayVec::new();
        let mut bounced = None;
        for p in self.pieces.all() {
            let (mut ptr, mut left) = (p.host.ptr, p.host.len as usize);
            // SAFETY: a piece is readable for its length; each `take` takes at most what is left of it.
            unsafe {
                let n = hdr.take(ptr, left);
                ptr = ptr.add(n);
                left -= n;
                let n = head.take(ptr, left);
                ptr = ptr.add(n);
                left -= n;
            }
            if left == 0 {
                continue;
            }
            match &mut bounced {
                Some(at) => {
                    bounce_in(&mut self.bounce[*at..], ptr, left);
                    *at += left;
                }
                None if rest.is_full() => {
                    if !*bounce_free {
                        return Parsed::Later;
                    }
                    let mut at = 0;
                    for s in rest.take() {
                        s.read(0, &mut self.bounce[at..at + s.len()]);
                        at += s.len();
                    }
                    bounce_in(&mut self.bounce[at..], ptr, left);
                    bounced = Some(at + left);
                }
                // SAFETY: the piece lies in a mapping that the snapshot keeps, which is only changed by a call with
                // `&mut self`, and so not during 'q (the borrow of this queue).
                None => rest.push(unsafe { Seg::from_raw(ptr, left as u32) }),
            }
        }
        if let Some(filled) = bounced {
            // SAFETY: the bounce buffer lives as long as the queue and is written by a call with `&mut self` only; one
            // frame per burst gets it.
            rest.push(unsafe {
                Seg::from_raw(NonNull::from(&mut *self.bounce).cast(), filled as u32)
            });
        }
        let mut vnet = [0; 10];
        vnet.copy_from_slice(&hdr.bytes[..10]);
        let Some(vnet) = checked(VnetHdr(vnet), len, &self.features.host) else {
            return Parsed::Malformed;
        };
        *bounce_free &= bounced.is_none();
        out.push(Frame {
            vnet,
            len: len as u32,
            head_len: head.filled as u8,
            head: head.bytes,
            rest,
        });
        Parsed::Frame
    }
}

/// Copies a piece of `len` bytes to the start of the bounce buffer's rest.
fn bounce_in(to: &mut [u8], from: NonNull<u8>, len: usize) {
    let to = &mut to[..len];
    // SAFETY: `from` is a piece of at least `len` bytes; `to` is our own memory.
    unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to.as_mut_ptr(), len) }
}

/// A private buffer that takes bytes until it is full.
struct Fill<const N: usize> {
    bytes: [u8; N],
    want: usize,
    filled: usize,
}

impl<const N: usize> Fill<N> {
    fn new(want: usize) -> Fill<N> {
        Fill {
            bytes: [0; N],
            want: want.min(N),
            filled: 0,
        }
    }

    /// Takes what it can of `len` bytes at `from`.
    ///
    /// # Safety
    /// `from` is readable for `len` bytes.
    unsafe fn take(&mut self, from: NonNull<u8>, len: usize) -> usize {
        let n = len.min(self.want - self.filled);
        // SAFETY: `n <= len` bytes are readable by contract; they fit, since `filled + n <= want <= N`.
        unsafe {
            let to = self.bytes.as_mut_ptr().add(self.filled);
            std::ptr::copy_nonoverlapping(from.as_ptr(), to, n);
        }
        self.filled += n;
        n
    }
}

/// The header with what may pass on: `None` for an offload request that makes no sense or was not negotiated (virtio
/// 1.2, 5.1.6.2).
fn checked(h: VnetHdr, len: usize, host: &Offloads) -> Option<VnetHdr> {
    let needs_csum = h.flags() & VnetHdr::F_NEEDS_CSUM != 0;
    let mut out = [0; 10];
    if needs_csum {
        let end = usize::from(h.csum_start()) + usize::from(h.csum_offset()) + 2;
        if !host.csum || end > len {
            return None;
        }
        out[0] = VnetHdr::F_NEEDS_CSUM;
        out[6..].copy_from_slice(&h.0[6..]);
    }
    if h.gso_type() != gso::NONE {
        let gso_size = u16::from_le_bytes([h.0[4], h.0[5]]);
        if !needs_csum || gso_size == 0 || !host.takes_gso(h.gso_type()) {
            return None;
        }
        out[1] = h.gso_type();
        out[4..6].copy_from_slice(&h.0[4..6]);
    }
    // A hint; some receivers trust it to lie within the frame.
    let hdr_len = u16::from_le_bytes([h.0[2], h.0[3]]).min(len.min(0xffff) as u16);
    if out[0] != 0 {
        out[2..4].copy_from_slice(&hdr_len.to_le_bytes());
    }
    Some(VnetHdr(out))
}

impl<R: Ring> RxQueue for Rx<R> {
    fn burst<'q>(&'q mut self, out: &mut Burst<'q>) {
        if !self.is_live() {
            return;
        }
        self.seen.clear();
        let mut at = self.next;
        let mut bounce_free = true;
        let mut walked = 0;
        while self.seen.len() < BURST && walked < PIECES_PER_BURST {
            self.pieces.clear();
            let (chain, after) = match self.ring.peek(at, Direction::Read, &mut self.pieces) {
                Ok(Some(found)) => found,
                Ok(None) => break,
                Err(why) => {
                    // The good ones before it come first.
                    if self.seen.is_empty() {
                        self.set_broken(why);
                    }
                    break;
                }
            };
            walked += self.pieces.all().len() + 1;
            let is_frame = match self.parse(&mut bounce_free, out) {
                Parsed::Frame => true,
                Parsed::Malformed => {
                    let behind = at.0.wrapping_sub(self.counted.0);
                    if behind < 0x8000 {
                        self.counted = after;
                        self.errors.malformed += 1;
                        self.gate
                            .counters()
                            .malformed
                            .fetch_add(1, Ordering::Relaxed);
                    }
                    false
                }
                Parsed::Later => break,
            };
            self.seen.push_back(Seen {
                chain,
                after,
                is_frame,
            });
            at = after;
        }
        if self.seen.front().is_some_and(|s| !s.is_frame) && self.gate.live().is_some() {
            self.gate.enter();
            // A snapshot that came meanwhile waits for us, or sees us; ours still keeps what the frames point to.
            if self.gate.is_stale() {
                self.gate.leave();
            } else {
                self.give_back(0);
                self.gate.leave();
            }
        }
    }

    fn release(&mut self, n: usize) {
        if n == 0 || !self.enter() {
            return;
        }
        let had = self.seen.iter().filter(|s| s.is_frame).count();
        self.gate
            .counters()
            .frames
            .fetch_add(n.min(had) as u64, Ordering::Relaxed);
        self.give_back(n);
        self.gate.leave();
    }

    fn wake_fd(&self) -> Option<RawFd> {
        self.kick.as_ref().map(|k| k.as_raw_fd())
    }

    fn arm(&mut self) -> bool {
        if !self.enter() {
            return false;
        }
        let waits = self.ring.arm(self.next);
        self.gate.leave();
        waits.unwrap_or_else(|why| {
            self.set_broken(why);
            false
        })
    }

    fn disarm(&mut self) {
        if let Some(kick) = &self.kick {
            clear(kick);
        }
        if self.enter() {
            if let Err(why) = self.ring.quiet() {
                self.set_broken(why);
            }
            self.gate.leave();
        }
    }

    fn errors(&self) -> RxErrors {
        self.errors
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offload_requests_are_checked() {
        let all = Offloads {
            csum: true,
            tso4: true,
            tso6: true,
            ecn: false,
        };
        let tso = VnetHdr([1, 1, 66, 0, 0xb4, 5, 34, 0, 16, 0]);
        assert_eq!(checked(tso, 4000, &all), Some(tso));
        assert_eq!(checked(tso, 51, &all), None, "checksum field outside");
        assert_eq!(checked(tso, 4000, &Offloads::default()), None);
        let mut ecn = tso;
        ecn.0[1] = 0x81;
        assert_eq!(checked(ecn, 4000, &all), None);
        let mut no_csum = tso;
        no_csum.0[0] = 0;
        assert_eq!(checked(no_csum, 4000, &all), None);
        let mut udp = tso;
        udp.0[1] = 3;
        assert_eq!(checked(udp, 4000, &all), None);
        assert_eq!(
            checked(VnetHdr([2, 0, 9, 9, 9, 9, 9, 9, 9, 9]), 60, &all),
            Some(VnetHdr::default())
        );
    }
}
