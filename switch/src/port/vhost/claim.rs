//! Places in a guest's receive ring, and the copying of frames into them.
//!
//! A transmit queue is behind its lock while a worker copies into it, but for long runs into one that several workers share
//! (ADR-0022): there a worker takes places under the lock, copies without it, and gives the claim back under the lock.
//!
//! ```text
//!   lock: take places, in the ring's order | no lock: copy | lock: give back; the guest sees all up to the first claim that is out
//! ```
//!
//! Invariant: the memory that a claim points to is the guest's until the claim is given back: the queue neither takes a new
//! memory table nor is dropped before that.
//! Invariant: nobody waits for a claim under a lock. A worker that is behind another one's claim waits for it when its burst
//! has ended and before its frames are given back to their sender, so that a switch that is killed has lost none of them.
#![allow(unsafe_code)]

use std::ops::DerefMut;

use arrayvec::ArrayVec;

use super::ring::{Piece, Pieces, Plain};
use crate::mem::copy::{LINE, copy_long, copy_short};
use crate::port::offload::cut::Cut;
use crate::port::offload::{Offloads, csum, gso};
use crate::port::{
    BURST, FRAME_MAX, Frame, NeverReason, PLAIN_HDR, SEGS, Sent, SharedTx, TxQueue, VnetHdr,
};

/// What a worker needs to send into queues that it shares: places that it has, and memory for checksums and segments.
#[derive(Debug)]
pub struct Claim {
    pub(super) places: Places,
    pub(super) bounce: Box<[u8]>,
    behind: bool,
}

/// Where frames go. Of one kind at a time: a run of plain ones, or one frame with all that it is cut into.
#[derive(Debug)]
pub struct Places {
    /// Which of the queue's claims.
    pub(super) number: u64,
    /// Bytes of `virtio_net_hdr` before each frame.
    pub(super) hdr_len: u8,
    /// A run: the buffer of each frame.
    pub(super) plains: ArrayVec<Plain, BURST>,
    /// The bytes that are written to each of them, header included.
    pub(super) written: ArrayVec<u32, BURST>,
    /// Else: the frames, one behind the other in `pieces`.
    pub(super) frames: Vec<Placed>,
    /// See `frames`.
    pub(super) pieces: Pieces,
    cpu: Cpu,
}

/// A frame's share of the pieces.
#[derive(Debug, Clone, Copy)]
pub struct Placed {
    /// Of the frame, without header.
    pub(super) bytes: u32,
    /// Of them.
    pub(super) pieces: usize,
    /// That were merged (virtio 1.2, 5.1.6.4).
    pub(super) buffers: u16,
}

impl Default for Places {
    fn default() -> Places {
        Places {
            number: 0,
            hdr_len: 0,
            plains: ArrayVec::new(),
            written: ArrayVec::new(),
            frames: Vec::new(),
            pieces: Pieces::default(),
            cpu: Cpu::here(),
        }
    }
}

impl Default for Claim {
    fn default() -> Claim {
        Claim {
            places: Places::default(),
            bounce: vec![0; FRAME_MAX].into_boxed_slice(),
            behind: false,
        }
    }
}

impl Places {
    /// Forgets all.
    pub(super) fn clear(&mut self) {
        self.plains.clear();
        self.written.clear();
        self.frames.clear();
        self.pieces.clear();
    }
}

impl Claim {
    /// The number of the last claim, if the receiver could not see it when it was given back: another worker was still writing
    /// before it.
    pub fn behind(&self) -> Option<u64> {
        self.behind.then_some(self.places.number)
    }

    /// Sends as many of the frames as simply go, of which nothing is asked. `lock` gives the queue. None if it is of a kind
    /// that cannot be shared like this.
    pub fn send_run<G>(&mut self, lock: impl Fn() -> G, frames: &[Frame<'_>]) -> Option<usize>
    where
        G: DerefMut<Target = Option<Box<dyn TxQueue>>>,
    {
        let n = self.begin_run(&mut lock(), frames)?;
        if n > 0 {
            self.write_run(&frames[..n]);
            self.behind = !give_back(&lock, &self.places);
        }
        Some(n)
    }

    /// Takes places for a run.
    pub(super) fn begin_run(
        &mut self,
        queue: &mut Option<Box<dyn TxQueue>>,
        frames: &[Frame<'_>],
    ) -> Option<usize> {
        self.places.clear();
        Some(shared(queue)?.take_run(frames, &mut self.places))
    }

    /// Writes the frames for which there are places.
    pub(super) fn write_run(&mut self, frames: &[Frame<'_>]) {
        let Places {
            cpu,
            hdr_len,
            ref plains,
            ref written,
            ..
        } = self.places;
        let room = |f: &Frame<'_>| u32::from(hdr_len) + f.len;
        debug_assert!(frames.iter().map(room).eq(written.iter().copied()));
        // SAFETY: the places are ours from `begin_run` on until they are given back, and were taken for these frames.
        unsafe { cpu.write_run(frames, plains, hdr_len) };
    }

    /// The same with one frame of any kind.
    pub fn send<G>(&mut self, lock: impl Fn() -> G, frame: &Frame<'_>) -> Option<Sent>
    where
        G: DerefMut<Target = Option<Box<dyn TxQueue>>>,
    {
        let mut queue = lock();
        let takes = shared(&mut queue)?.takes();
        if Plan::is_work(frame, takes) {
            drop(queue);
            let plan = Plan::of(frame, takes, &mut self.bounce);
            queue = lock();
            if shared(&mut queue)?.takes() != takes {
                // Another guest's by now.
                return Some(Sent::Full);
            }
            return Some(put(queue, &lock, plan, &mut self.places, &mut self.behind));
        }
        let plan = Plan::of(frame, takes, &mut self.bounce);
        Some(put(queue, &lock, plan, &mut self.places, &mut self.behind))
    }
}

fn shared(queue: &mut Option<Box<dyn TxQueue>>) -> Option<&mut dyn SharedTx> {
    queue.as_mut()?.shared()
}

fn give_back<G>(lock: &impl Fn() -> G, places: &Places) -> bool
where
    G: DerefMut<Target = Option<Box<dyn TxQueue>>>,
{
    let mut queue = lock();
    // It is the one that we have them from: it does not go before.
    debug_assert!(queue.is_some());
    shared(&mut queue).is_none_or(|tx| tx.give_back(places))
}

/// Takes places for a plan, lets go of the queue, writes, gives back.
fn put<G>(
    mut queue: G,
    lock: &impl Fn() -> G,
    plan: Result<Plan<'_>, NeverReason>,
    places: &mut Places,
    behind: &mut bool,
) -> Sent
where
    G: DerefMut<Target = Option<Box<dyn TxQueue>>>,
{
    let plan = match plan {
        Ok(plan) => plan,
        Err(why) => return Sent::Never(why),
    };
    places.want(&plan);
    let taken = match shared(&mut queue) {
        Some(tx) => tx.take(places),
        None => Err(Sent::Down),
    };
    drop(queue);
    if let Err(not) = taken {
        return not;
    }
    // SAFETY: the places are ours until they are given back, which is below.
    unsafe { places.write(plan) };
    *behind = !give_back(lock, places);
    Sent::Yes
}

/// A piece of what is sent: where it lies, and its length.
type Part = (*const u8, usize);

/// What is written for a frame.
pub(super) enum Plan<'f> {
    /// The frame, with the start of its header.
    Whole {
        hdr: [u8; 10],
        len: u32,
        parts: ArrayVec<Part, { SEGS + 1 }>,
    },
    /// What it is cut into.
    Cut(Cut<'f>),
}

impl<'f> Plan<'f> {
    /// Who receives has this done for him: the frame is gone over byte by byte.
    pub(super) fn is_work(frame: &Frame<'_>, takes: Offloads) -> bool {
        let csum_here = frame.vnet.flags() & VnetHdr::F_NEEDS_CSUM != 0 && !takes.csum;
        csum_here || !takes.takes_gso(frame.vnet.gso_type(), frame.head())
    }

    /// How a receiver that takes this gets the frame. `bounce` has [`FRAME_MAX`] bytes.
    pub(super) fn of(
        frame: &'f Frame<'_>,
        takes: Offloads,
        bounce: &'f mut [u8],
    ) -> Result<Plan<'f>, NeverReason> {
        let len = frame.len as usize;
        let Some(bounce) = bounce.get_mut(..len) else {
            return Err(NeverReason::TooLong);
        };
        let csum_here = frame.vnet.flags() & VnetHdr::F_NEEDS_CSUM != 0 && !takes.csum;
        let is_gso = frame.vnet.gso_type() != gso::NONE;
        if !takes.takes_gso(frame.vnet.gso_type(), frame.head()) || (csum_here && is_gso) {
            frame.copy_to(bounce);
            let cut = Cut::new(frame.vnet, bounce).ok_or(NeverReason::Offload)?;
            return Ok(Plan::Cut(cut));
        }
        let mut hdr = [0; 10];
        if takes.csum {
            hdr = frame.vnet.0;
        }
        let mut parts: ArrayVec<Part, { SEGS + 1 }> = ArrayVec::new();
        if csum_here {
            frame.copy_to(bounce);
            let start = usize::from(frame.vnet.csum_start());
            if !csum::complete(bounce, start, usize::from(frame.vnet.csum_offset())) {
                return Err(NeverReason::Offload);
            }
            parts.push((bounce.as_ptr(), len));
        } else {
            parts.push((frame.head().as_ptr(), frame.head().len()));
            parts.extend(frame.rest().iter().map(|s| (s.as_ptr(), s.len())));
        }
        Ok(Plan::Whole {
            hdr,
            len: frame.len,
            parts,
        })
    }
}

impl Places {
    /// Says what is to be placed.
    pub(super) fn want(&mut self, plan: &Plan<'_>) {
        self.clear();
        let one = |bytes: u32| Placed {
            bytes,
            pieces: 0,
            buffers: 0,
        };
        match plan {
            Plan::Whole { len, .. } => self.frames.push(one(*len)),
            Plan::Cut(cut) => self.frames.extend(cut.lengths().map(|n| one(n as u32))),
        }
    }

    /// Writes what was planned when the places were wanted.
    ///
    /// # Safety
    /// The pieces are writable; the plan's parts are readable.
    pub(super) unsafe fn write(&mut self, plan: Plan<'_>) {
        let mut pieces = self.pieces.all();
        let mut frames = self.frames.iter();
        let hdr_len = self.hdr_len;
        // A header, and a frame behind it, into the next frame's pieces.
        let mut put = |hdr: &[u8; 10], parts: &[Part]| {
            let Some(frame) = frames.next() else { return };
            let mut whole = [0; 12];
            whole[..10].copy_from_slice(hdr);
            // virtio 1.2, 5.1.6.4: the number of buffers, one if they can't be merged.
            whole[10..].copy_from_slice(&frame.buffers.to_le_bytes());
            let (own, behind) = pieces
                .split_at_checked(frame.pieces)
                .unwrap_or((pieces, &[]));
            pieces = behind;
            let mut to = Cursor::new(own);
            // SAFETY: our own array, and the parts by the contract; the pieces are writable by the contract.
            unsafe {
                to.put(whole.as_ptr(), usize::from(hdr_len));
                for &(from, len) in parts {
                    to.put(from, len);
                }
            }
        };
        match plan {
            Plan::Whole { hdr, parts, .. } => put(&hdr, &parts),
            Plan::Cut(mut cut) => {
                while let Some((front, payload)) = cut.next_frame() {
                    let parts = [
                        (front.as_ptr(), front.len()),
                        (payload.as_ptr(), payload.len()),
                    ];
                    put(&[0; 10], &parts);
                }
            }
        }
    }
}

mod threads {
    use super::Places;
    // SAFETY: what it points to is shared memory, the same for all threads, and followed only between `take` and `give_back`.
    unsafe impl Send for Places {}
}

/// What the copies of a run are compiled for: a line by one store keeps twice as many lines under way.
#[derive(Debug, Clone, Copy)]
pub(super) enum Cpu {
    Any,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
}

impl Cpu {
    pub(super) fn here() -> Cpu {
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

    /// Writes each frame into the buffer of the same place.
    ///
    /// # Safety
    /// As for [`write_plain`], for each.
    #[inline(always)]
    pub(super) unsafe fn write_run(self, frames: &[Frame<'_>], plains: &[Plain], hdr_len: u8) {
        // SAFETY: by the contract; the processor has what `here` found.
        unsafe {
            match self {
                #[cfg(target_arch = "x86_64")]
                Cpu::Avx512 => write_run_avx512(frames, plains, hdr_len),
                #[cfg(target_arch = "x86_64")]
                Cpu::Avx2 => write_run_avx2(frames, plains, hdr_len),
                Cpu::Any => write_run(frames, plains, hdr_len),
            }
        }
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
pub(super) fn is_apart(to: *const u8) -> bool {
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
