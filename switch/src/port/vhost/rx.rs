//! The guest's transmit ring: frames into the switch. A burst looks at waiting chains without consuming them; a chain
//! is given back only when the switch says that its frame is safe. So a switch that dies in between finds the frame in
//! guest memory again, and so does the target of a migration. Which of them a spool has already, the next run learns by [`Position`].
#![allow(unsafe_code)]

use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use arrayvec::ArrayVec;

use super::features::RingFeatures;
use super::live::{Gate, clear};
use super::position::{Position, show};
use super::ring::{Broken, Chain, Direction, Pieces, Plain, Plains, Pos, Ring};
use crate::mem::Seg;
use crate::mem::copy::{LINE, copy_short};
use crate::port::offload::{Offloads, gso};
use crate::port::{
    BURST, Burst, FRAME_MAX, FRAME_MIN, Frame, HEAD, PLAIN_HDR, RxErrors, RxQueue, SEGS, VnetHdr,
};

/// Descriptors' pieces per burst: what a guest may make us walk at most before others get their turn.
const PIECES_PER_BURST: usize = 2048;

/// A chain that was looked at and not given back yet.
struct Seen {
    chain: Chain,
    is_frame: bool,
}

/// A frame of the last burst: its head is in the slot of the same number.
struct Shown {
    vnet: VnetHdr,
    len: u32,
    head_len: u8,
    /// First and behind the last of `segs`.
    segs: (u16, u16),
}

/// The share of a ring that a driver which polls is shown late at most, and never more than a burst.
const LAG_SHARE: usize = 8;
/// Looks that find nothing before it is shown all of it: some 100 microseconds of a worker that polls.
const LINGER: u32 = 512;

/// Bytes in front of a private head.
const PREFIX: usize = PLAIN_HDR.len();

/// Bytes of a frame that its private start has at most: see [`Head::len`].
const HEAD_MAX: usize = HEAD + LINE;

/// A frame's private start behind [`PLAIN_HDR`], in cache lines of its own.
#[repr(align(64))]
#[derive(Clone, Copy)]
struct Head([u8; PREFIX + HEAD_MAX]);

impl Head {
    const EMPTY: Head = {
        let mut bytes = [0; PREFIX + HEAD_MAX];
        bytes.split_at_mut(PREFIX).0.copy_from_slice(&PLAIN_HDR);
        Head(bytes)
    };

    /// How much of a frame of `len` bytes at `at` is made private: so much that what follows starts a cache line, which is
    /// then copied by whole lines.
    #[inline(always)]
    fn len(at: *const u8, len: usize) -> usize {
        let behind = (at as usize).wrapping_add(HEAD) % LINE;
        len.min(HEAD + (LINE - behind) % LINE)
    }

    /// Takes the first `len` bytes of a frame behind a header of `hdr_len` bytes at `from`, which it returns as far as all kinds
    /// have it in common (virtio 1.2, 5.1.6).
    ///
    /// # Safety
    /// `from` is readable for `hdr_len` (10 or 12) and `len` bytes; `len` is at most HEAD_MAX.
    #[inline(always)]
    unsafe fn fill(&mut self, from: *const u8, hdr_len: usize, len: usize) -> [u8; 10] {
        let to = self.0.as_mut_ptr();
        // SAFETY: by the contract; a head has room for a header and HEAD_MAX bytes.
        unsafe {
            let hdr = from.cast::<[u8; 10]>().read();
            copy_short(from.add(hdr_len), to.add(PREFIX), len);
            hdr
        }
    }
}

/// Pieces behind heads.
struct Segs(Vec<Seg<'static>>);

// SAFETY: the pieces point into mappings that are the same for all threads; they are made anew for each burst and
// followed only as long as the queue is borrowed.
unsafe impl Send for Segs {}

const _: () = assert!(BURST * SEGS < u16::MAX as usize && HEAD_MAX <= u8::MAX as usize);

/// See the module's text.
pub struct Rx<R: Ring> {
    ring: R,
    gate: Gate,
    kick: Option<Arc<File>>,
    features: RingFeatures,
    /// The first chain that is not given back.
    next: Pos,
    /// Something was given back, and nobody has asked whether the driver wants a signal.
    owes: bool,
    seen: ArrayVec<Seen, BURST>,
    /// How many of `seen` were given back.
    given: usize,
    /// Chains given back so far.
    taken: u64,
    /// The last of them, which a driver that polls is not shown yet.
    unshown: usize,
    /// What the next run of the switch finds of it.
    position: Position,
    /// Looks in a row behind which nothing was given back, while there are such.
    lingers: u32,
    /// `taken` at the last of these.
    looked_at: u64,
    /// Up to this chain malformed ones were counted (a burst may look at one twice).
    counted: u64,
    pieces: Pieces,
    /// The next chains, as far as they are plain.
    plains: Plains,
    /// The last burst was easy: the first so many of `plains`, and not `seen` and `shown`.
    easy: usize,
    /// `plains` are of an earlier snapshot: not to be followed any more.
    is_stale: bool,
    shown: ArrayVec<Shown, BURST>,
    heads: Box<[Head; BURST]>,
    segs: Segs,
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
    /// A queue on a ring that starts at `next`; of the chains before it the driver has not been shown the last ones, if `position`
    /// says so.
    pub fn new(
        ring: R,
        gate: Gate,
        next: u16,
        kick: Option<Arc<File>>,
        features: RingFeatures,
        position: Position,
    ) -> Rx<R> {
        Rx {
            ring,
            gate,
            kick,
            features,
            next: Pos(next),
            owes: false,
            seen: ArrayVec::new(),
            given: 0,
            taken: 0,
            unshown: usize::from(position.start().1),
            position,
            lingers: 0,
            looked_at: 0,
            counted: 0,
            pieces: Pieces::default(),
            plains: Plains::default(),
            easy: 0,
            is_stale: false,
            shown: ArrayVec::new(),
            heads: Box::new([Head::EMPTY; BURST]),
            segs: Segs(Vec::with_capacity(BURST * SEGS)),
            bounce: vec![0; FRAME_MAX].into_boxed_slice(),
            errors: RxErrors::default(),
        }
    }

    /// Takes a new snapshot over. False if the ring is closed or broken.
    #[inline]
    fn is_live(&mut self) -> bool {
        if self.gate.refresh() {
            self.pieces.clear();
            // What was shown is still to be given back, but its memory may be gone.
            self.plains.truncate(self.easy);
            self.is_stale = true;
            if let Some(live) = self.gate.live() {
                self.ring.rebind(live);
            }
        }
        if let Some(why) = self.gate.lost() {
            self.set_broken(why);
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

    /// Counts the chain behind those that were seen, once.
    fn count_malformed(&mut self) {
        let this = self.taken + self.seen.len() as u64 + 1;
        if self.counted < this {
            self.counted = this;
            self.errors.malformed += 1;
            self.gate
                .counters()
                .malformed
                .fetch_add(1, Ordering::Relaxed);
        }
    }

    fn set_broken(&mut self, why: Broken) {
        // Memory that was added while we looked: the next burst sees it.
        if matches!(why, Broken::Address(_)) && self.gate.is_stale() {
            return;
        }
        self.errors.ring_broken += 1;
        self.gate.set_broken(why);
    }

    /// Gives back `frames` frames, and what was no frame before them, or was seen right behind them.
    fn give_back(&mut self, frames: usize) {
        let mut left = frames;
        let (n, slots) = if self.easy > 0 {
            let n = frames.min(self.easy);
            let plains = self.plains.waiting();
            self.ring.complete_run(n, |i| (plains[i].chain(), 0));
            self.plains.take(n);
            self.easy -= n;
            left -= n;
            (n, n as u16)
        } else {
            let waiting = &self.seen[self.given..];
            let stays = |s: &Seen| {
                let stays = s.is_frame && left == 0;
                left -= usize::from(s.is_frame && !stays);
                stays
            };
            let n = waiting.iter().position(stays).unwrap_or(waiting.len());
            self.ring.complete_run(n, |i| (waiting[i].chain, 0));
            self.given += n;
            let slots = |s: &Seen| s.chain.slots;
            (n, waiting[..n].iter().map(slots).sum())
        };
        if n == 0 {
            return;
        }
        self.next = self.ring.after(self.next, slots);
        self.taken += n as u64;
        self.unshown += n;
        self.position.set((frames - left) as u64, self.next.0);
        let stays = if self.ring.is_polled() { self.lag() } else { 0 };
        self.publish(stays);
        self.gate.set_next(self.next.0);
    }

    /// How many chains a driver that polls is shown late (ADR-0025).
    #[inline]
    fn lag(&self) -> usize {
        BURST.min(self.ring.slots() / LAG_SHARE)
    }

    /// Within a section: shows the driver what it has back, but for the last `stays` chains.
    #[inline]
    fn publish(&mut self, stays: usize) {
        let n = self.unshown.saturating_sub(stays);
        if n == 0 {
            return;
        }
        self.unshown -= n;
        match show(&mut self.ring, &mut self.position, n) {
            Ok(_) => self.owes = true,
            Err(why) => self.set_broken(why),
        }
    }

    /// Before `found` more chains are taken, so that together with those that the driver does not know to be back they are no more
    /// than a burst: the next run of a switch that is killed takes no more than that again, or has to show no more. If nothing is given back for a while, because nothing comes
    /// or the next frame has no place, what is left is shown.
    #[inline]
    fn make_way(&mut self, found: usize) {
        if self.unshown == 0 {
            return;
        }
        let goes_on = self.looked_at != self.taken;
        self.looked_at = self.taken;
        self.lingers = if goes_on { 0 } else { self.lingers + 1 };
        let stays = match self.lingers < LINGER && self.ring.is_polled() {
            true => self.lag().saturating_sub(found),
            false => 0,
        };
        if self.unshown > stays {
            self.gate.enter();
            // By a snapshot that came meanwhile: at the next look.
            if !self.gate.is_stale() {
                self.publish(stays);
            }
            self.gate.leave();
        }
    }

    /// Looks at the next chains, up to a burst behind the first `had`, and asks for what will be read of them.
    #[inline]
    fn look_ahead(&mut self, had: usize) {
        let known = self.plains.waiting().len();
        let max = (had + BURST).min(self.ring.slots()).saturating_sub(known);
        if max == 0 {
            return;
        }
        let at = self.ring.after(self.next, known as u16);
        self.ring
            .peek_plain(at, max, Direction::Read, &mut self.plains);
        for p in &self.plains.waiting()[known..] {
            // Header and the start of the frame.
            crate::mem::prefetch(p.ptr.as_ptr());
            crate::mem::prefetch(p.ptr.as_ptr().wrapping_add(64));
        }
    }

    /// What nearly all bursts are: frames in one buffer each, of which nothing is asked. How many, up to the first that is
    /// anything else; their heads and what is behind them are in `heads` and `segs`.
    #[inline]
    fn easy_burst(&mut self) -> usize {
        if self.plains.waiting().len() < BURST {
            self.look_ahead(0);
        }
        let hdr_len = usize::from(self.features.hdr_len);
        let mut n = 0;
        for (p, head) in self.plains.waiting().iter().zip(self.heads.iter_mut()) {
            let len = (p.len as usize).wrapping_sub(hdr_len);
            if !(FRAME_MIN..=FRAME_MAX).contains(&len) {
                break;
            }
            // SAFETY: the piece is readable for `hdr_len + len` bytes, `hdr_len` is 10 or 12.
            unsafe {
                let from = p.ptr.add(hdr_len);
                let head_len = Head::len(from.as_ptr(), len);
                let hdr = head.fill(p.ptr.as_ptr(), hdr_len, head_len);
                // Flags and kind of segmentation (virtio 1.2, 5.1.6).
                if hdr[0] | hdr[1] != 0 {
                    break;
                }
                if len > head_len {
                    // The piece lies in a mapping that the snapshot keeps, which is only changed by a call with `&mut self`,
                    // and so not while a frame borrows this queue.
                    let rest = Seg::from_raw(from.add(head_len), (len - head_len) as u32);
                    self.segs.0.push(rest);
                }
            }
            n += 1;
        }
        n
    }

    fn show_easy<'q>(&'q self, out: &mut Burst<'q>) {
        let hdr_len = u32::from(self.features.hdr_len);
        let easy = &self.plains.waiting()[..self.easy];
        let mut segs = self.segs.0.iter();
        for (p, head) in easy.iter().zip(self.heads.iter()) {
            let len = p.len - hdr_len;
            let from = p.ptr.as_ptr().wrapping_add(hdr_len as usize);
            let head_len = Head::len(from, len as usize);
            let rest = match len as usize > head_len {
                true => segs.next().map(std::slice::from_ref).unwrap_or_default(),
                false => &[],
            };
            let head = &head.0[..PREFIX + head_len];
            out.push(Frame::with_prefix(VnetHdr::default(), len, head, rest));
        }
    }

    /// Makes a frame of a buffer that has header and frame: notes it in `shown`, its head in `heads`, what follows in
    /// `segs`.
    #[inline(always)]
    fn parse_plain(&mut self, p: &Plain) -> Parsed {
        let hdr_len = usize::from(self.features.hdr_len);
        let n = self.shown.len();
        let segs = self.segs.0.len();
        let len = (p.len as usize).wrapping_sub(hdr_len);
        if !(FRAME_MIN..=FRAME_MAX).contains(&len) {
            return Parsed::Malformed;
        }
        // SAFETY: the piece is readable for `hdr_len + len` bytes, `hdr_len` is 10 or 12.
        let (hdr, head_len) = unsafe {
            let from = p.ptr.add(hdr_len);
            let head_len = Head::len(from.as_ptr(), len);
            let hdr = self.heads[n].fill(p.ptr.as_ptr(), hdr_len, head_len);
            if len > head_len {
                let rest = (len - head_len) as u32;
                // The piece lies in a mapping that the snapshot keeps, which is only changed by a call with `&mut self`,
                // and so not while a frame borrows this queue.
                self.segs.0.push(Seg::from_raw(from.add(head_len), rest));
            }
            (hdr, head_len)
        };
        if hdr[0] | hdr[1] != 0 {
            return self.note(hdr, head_len, len, segs);
        }
        self.show(VnetHdr::default(), head_len, len, segs);
        Parsed::Frame
    }

    #[inline(always)]
    fn show(&mut self, vnet: VnetHdr, head_len: usize, len: usize, segs: usize) {
        self.shown.push(Shown {
            vnet,
            len: len as u32,
            head_len: head_len as u8,
            segs: (segs as u16, self.segs.0.len() as u16),
        });
    }

    /// The same of the pieces of a chain.
    fn parse(&mut self, bounce_free: &mut bool) -> Parsed {
        let mut hdr = [0u8; 12];
        let segs = self.segs.0.len();
        match self.gather(&mut hdr, bounce_free) {
            Ok((head_len, len)) => {
                let mut vnet = [0; 10];
                vnet.copy_from_slice(&hdr[..10]);
                self.note(vnet, head_len, len, segs)
            }
            Err(parsed) => {
                self.segs.0.truncate(segs);
                parsed
            }
        }
    }

    /// Notes a frame with the header that came with it.
    fn note(&mut self, hdr: [u8; 10], head_len: usize, len: usize, segs: usize) -> Parsed {
        let Some(vnet) = checked(VnetHdr(hdr), len, &self.features.host) else {
            self.segs.0.truncate(segs);
            return Parsed::Malformed;
        };
        self.show(vnet, head_len, len, segs);
        Parsed::Frame
    }

    /// The same for a frame of many pieces: lengths of its head and of all of it.
    fn gather(
        &mut self,
        hdr_out: &mut [u8; 12],
        bounce_free: &mut bool,
    ) -> Result<(usize, usize), Parsed> {
        let n = self.shown.len();
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
            return Err(Parsed::Malformed);
        }
        let first = self.segs.0.len();
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
                None if self.segs.0.len() - first == SEGS => {
                    if !*bounce_free {
                        return Err(Parsed::Later);
                    }
                    let mut at = 0;
                    for s in self.segs.0.drain(first..) {
                        s.read(0, &mut self.bounce[at..at + s.len()]);
                        at += s.len();
                    }
                    bounce_in(&mut self.bounce[at..], ptr, left);
                    bounced = Some(at + left);
                }
                // SAFETY: the piece lies in a mapping that the snapshot keeps, which is only changed by a call with
                // `&mut self`, and so not while a frame borrows this queue.
                None => self.segs.0.push(unsafe { Seg::from_raw(ptr, left as u32) }),
            }
        }
        if let Some(filled) = bounced {
            // SAFETY: the bounce buffer lives as long as the queue and is written by a call with `&mut self` only; one
            // frame per burst gets it.
            self.segs.0.push(unsafe {
                Seg::from_raw(NonNull::from(&mut *self.bounce).cast(), filled as u32)
            });
        }
        *bounce_free &= bounced.is_none();
        *hdr_out = hdr.bytes;
        self.heads[n].0[PREFIX..PREFIX + HEAD].copy_from_slice(&head.bytes);
        Ok((head.filled, len))
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
        if !needs_csum || gso_size == 0 || !host.takes_gso(h.gso_type(), &[]) {
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
        (self.easy, self.given) = (0, 0);
        self.seen.clear();
        self.shown.clear();
        self.segs.0.clear();
        if !self.is_live() {
            return;
        }
        if std::mem::take(&mut self.is_stale) {
            self.plains.truncate(0);
        }
        let easy = self.easy_burst();
        if easy > 0 {
            self.easy = easy;
            self.make_way(easy);
            self.look_ahead(easy);
            self.show_easy(out);
            return;
        }
        self.plains.truncate(0);
        self.segs.0.clear();
        let mut at = self.next;
        let mut bounce_free = true;
        let mut walked = 0;
        let most = BURST.min(self.ring.slots());
        while self.seen.len() < most && walked < PIECES_PER_BURST {
            let max = most - self.seen.len();
            self.plains.truncate(0);
            self.ring
                .peek_plain(at, max, Direction::Read, &mut self.plains);
            for p in self.plains.waiting() {
                // Header and the start of the frame.
                crate::mem::prefetch(p.ptr.as_ptr());
                crate::mem::prefetch(p.ptr.as_ptr().wrapping_add(64));
            }
            let found = self.plains.waiting().len();
            for i in 0..found {
                let p = self.plains.waiting()[i];
                let is_frame = !matches!(self.parse_plain(&p), Parsed::Malformed);
                if !is_frame {
                    self.count_malformed();
                }
                let chain = p.chain();
                self.seen.push(Seen { chain, is_frame });
            }
            at = self.ring.after(at, found as u16);
            walked += 2 * found;
            if self.seen.len() == most {
                break;
            }
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
            walked += self.pieces.walked() + 1;
            let is_frame = match self.parse(&mut bounce_free) {
                Parsed::Frame => true,
                Parsed::Malformed => {
                    self.count_malformed();
                    false
                }
                Parsed::Later => break,
            };
            self.seen.push(Seen { chain, is_frame });
            at = after;
        }
        // Behind what was seen, not at the ring's next position.
        self.plains.truncate(0);
        self.make_way(self.seen.len());
        if self.seen.first().is_some_and(|s| !s.is_frame) && self.gate.live().is_some() {
            self.gate.enter();
            // A snapshot that came meanwhile waits for us, or sees us; ours still keeps what the frames point to.
            if self.gate.is_stale() {
                self.gate.leave();
            } else {
                self.give_back(0);
                self.gate.leave();
            }
        }
        let this: &'q Self = self;
        for (s, head) in this.shown.iter().zip(this.heads.iter()) {
            let head = &head.0[..PREFIX + usize::from(s.head_len)];
            let segs = &this.segs.0[usize::from(s.segs.0)..usize::from(s.segs.1)];
            out.push(Frame::with_prefix(s.vnet, s.len, head, segs));
        }
    }

    fn release(&mut self, n: usize) {
        if n == 0 || !self.enter() {
            return;
        }
        let had = self.easy + self.shown.len();
        self.gate.count(n.min(had) as u64);
        self.give_back(n);
        self.gate.leave();
    }

    fn settle(&mut self) {
        if std::mem::take(&mut self.owes) && self.ring.wants_signal() && !self.gate.call() {
            self.set_broken(Broken::Call);
        }
    }

    fn wake_fd(&self) -> Option<RawFd> {
        self.kick.as_ref().map(|k| k.as_raw_fd())
    }

    fn arm(&mut self) -> bool {
        if !self.enter() {
            return false;
        }
        self.publish(0);
        let waits = self.ring.arm(self.next);
        self.gate.leave();
        if self.owes {
            fence(Ordering::SeqCst);
            self.settle();
        }
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

    fn position(&self) -> Option<u64> {
        self.position.count()
    }

    fn errors(&self) -> RxErrors {
        self.errors
    }
}

impl<R: Ring> Drop for Rx<R> {
    fn drop(&mut self) {
        if self.unshown > 0 && self.enter() {
            self.publish(0);
            self.gate.leave();
        }
        if self.owes {
            fence(Ordering::SeqCst);
            self.settle();
        }
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
            ..Offloads::default()
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
        for kind in [3, gso::UDP_L4] {
            udp.0[1] = kind;
            assert_eq!(checked(udp, 4000, &all), None);
        }
        let uso = Offloads {
            uso4: true,
            uso6: true,
            ..all
        };
        assert_eq!(checked(udp, 4000, &uso), Some(udp));
        udp.0[1] |= gso::ECN;
        assert_eq!(checked(udp, 4000, &uso), None);
        assert_eq!(
            checked(VnetHdr([2, 0, 9, 9, 9, 9, 9, 9, 9, 9]), 60, &all),
            Some(VnetHdr::default())
        );
    }
}
