//! Data I/O: what a worker sees of a port. A port has receive queues (frames into the switch), each owned by one
//! worker, and transmit queues, each behind a lock that is taken once per burst. Who uses which: ADR-0011.
//!
//! Whether a peer sleeps and wants a signal can only be asked behind a full barrier, which drains the processor's stores:
//! so there is one per round of a worker, and then [`RxQueue::settle`] and [`TxQueue::settle`] for all it has touched.
//!
//! The control side of a kind of port (sockets, devices) lives in its own module and attaches and detaches queues
//! through [`Attach`].
//!
//! Invariant: nothing a guest or a peer does makes a method here panic or run longer than one burst.
//! Invariant: a frame is given back to its sender only by [`RxQueue::release`].

use std::os::fd::RawFd;

use arrayvec::ArrayVec;

use self::offload::Offloads;
pub use self::vhost::claim::{Claim, Places};
use crate::mem::Seg;

pub mod kept;
#[cfg(test)]
pub mod memory;
pub mod offload;
pub mod packet;
pub mod tap;
pub mod vhost;

/// Queue pairs of a port, at most.
pub const QUEUES: usize = 16;
/// Frames per burst.
pub const BURST: usize = 32;
/// Bytes at the start of a frame, at least, that are copied once and then looked at, decided on and delivered (a guest that
/// rewrites its buffer meanwhile gains nothing). With a `virtio_net_hdr` in front they are two cache lines.
pub const HEAD: usize = 116;
/// What stands in front of a private head that was made for it: a `virtio_net_hdr` of which nothing is asked, for one buffer
/// (virtio 1.2, 5.1.6). A receiver that takes such a header gets both by one copy.
pub const PLAIN_HDR: [u8; 12] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];
/// Pieces of a frame behind its head.
pub const SEGS: usize = 20;
/// The longest frame: a 64 KiB TSO frame with its Ethernet header and two VLAN tags, in bytes.
pub const FRAME_MAX: usize = 65_535 + 14 + 8;
/// The shortest frame that is forwarded: an Ethernet header.
pub const FRAME_MIN: usize = 14;

/// `virtio_net_hdr` (virtio 1.2, 5.1.6), little endian, without `num_buffers`, which each receiver counts for itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(transparent)]
pub struct VnetHdr(pub [u8; 10]);

impl VnetHdr {
    /// `VIRTIO_NET_HDR_F_NEEDS_CSUM` in `flags`.
    pub const F_NEEDS_CSUM: u8 = 1;
    /// `VIRTIO_NET_HDR_F_DATA_VALID` in `flags`.
    pub const F_DATA_VALID: u8 = 2;

    /// The `flags` field.
    pub fn flags(&self) -> u8 {
        self.0[0]
    }
    /// The `gso_type` field.
    pub fn gso_type(&self) -> u8 {
        self.0[1]
    }
    /// `gso_size`: payload bytes of each segment.
    pub fn gso_size(&self) -> u16 {
        u16::from_le_bytes([self.0[4], self.0[5]])
    }
    /// `csum_start`: offset in the frame.
    pub fn csum_start(&self) -> u16 {
        u16::from_le_bytes([self.0[6], self.0[7]])
    }
    /// `csum_offset`: from `csum_start`.
    pub fn csum_offset(&self) -> u16 {
        u16::from_le_bytes([self.0[8], self.0[9]])
    }
}

/// One received frame, borrowed from its queue: neither Copy nor Clone.
#[derive(Debug)]
pub struct Frame<'q> {
    /// Offload request of the sender.
    pub vnet: VnetHdr,
    /// Length of the whole frame in bytes (Ethernet header to last payload byte).
    pub len: u32,
    head: &'q [u8],
    /// Bytes of `head` that are [`PLAIN_HDR`], all or none.
    prefix: usize,
    rest: &'q [Seg<'q>],
}

impl<'q> Frame<'q> {
    /// Of a private copy of its start (at least its first [`HEAD`] bytes, or all of it) and at most [`SEGS`] pieces
    /// behind that.
    pub fn new(vnet: VnetHdr, len: u32, head: &'q [u8], rest: &'q [Seg<'q>]) -> Frame<'q> {
        debug_assert!(rest.len() <= SEGS);
        debug_assert_eq!(
            len as usize,
            head.len() + rest.iter().map(Seg::len).sum::<usize>()
        );
        Frame {
            vnet,
            len,
            head,
            prefix: 0,
            rest,
        }
    }

    /// The same of a head behind [`PLAIN_HDR`].
    #[inline]
    pub fn with_prefix(
        vnet: VnetHdr,
        len: u32,
        prefixed: &'q [u8],
        rest: &'q [Seg<'q>],
    ) -> Frame<'q> {
        debug_assert!(prefixed.starts_with(&PLAIN_HDR));
        Frame {
            vnet,
            len,
            head: prefixed,
            prefix: PLAIN_HDR.len(),
            rest,
        }
    }

    /// A frame that lies in our own memory, of `FRAME_MIN` to `FRAME_MAX` bytes.
    pub fn from_slice(vnet: VnetHdr, bytes: &'q [u8]) -> Frame<'q> {
        Frame::new(vnet, bytes.len() as u32, bytes, &[])
    }

    /// The private part: its start, or all of it.
    #[inline]
    pub fn head(&self) -> &[u8] {
        self.head.get(self.prefix..).unwrap_or_default()
    }

    /// [`PLAIN_HDR`] and the head behind it, if that is how it lies in memory and nothing is asked of the receiver.
    #[inline]
    pub fn plain_front(&self) -> Option<&[u8]> {
        (self.prefix != 0 && self.vnet == VnetHdr::default()).then_some(self.head)
    }

    /// What follows behind the head.
    #[inline]
    pub fn rest(&self) -> &[Seg<'q>] {
        self.rest
    }

    /// Copies the whole frame into `out`, which must be exactly `len` long.
    pub fn copy_to(&self, out: &mut [u8]) {
        let head = self.head();
        let (h, mut out) = out.split_at_mut(head.len());
        h.copy_from_slice(head);
        for s in self.rest {
            let (a, b) = out.split_at_mut(s.len());
            s.read(0, a);
            out = b;
        }
    }
}

/// A burst of received frames.
pub type Burst<'q> = ArrayVec<Frame<'q>, BURST>;

/// A receive queue: frames from the port into the switch. Owned by one worker.
pub trait RxQueue: Send {
    /// Puts up to [`BURST`] waiting frames into `out` (empty on entry), oldest first, without giving anything back.
    /// What is no frame (runts, bad descriptors) is consumed and counted inside, at most a burst of it per call.
    /// Called again without [`RxQueue::release`] between, it gives the same frames again (and perhaps more).
    fn burst<'q>(&'q mut self, out: &mut Burst<'q>);

    /// Gives the first `n` frames of the last burst back to the sender: they are delivered, spooled or counted. The
    /// others come again with the next burst.
    fn release(&mut self, n: usize);

    /// Tells the peer of what was released since the last time, if it wants to be told; at most once. The caller has
    /// executed a full memory barrier since.
    fn settle(&mut self) {}

    /// The descriptor that becomes readable when frames wait.
    fn wake_fd(&self) -> Option<RawFd>;

    /// Before sleeping: asks the peer to signal, then looks once more; true if frames wait already (do not sleep).
    fn arm(&mut self) -> bool;

    /// After sleeping: clears the signal and asks the peer not to signal while we poll.
    fn disarm(&mut self);

    /// How many frames were given back, on a count that goes on where an earlier run of the switch was killed: the first frame of
    /// the next burst is the one behind so many. None if the next run could not know.
    fn position(&self) -> Option<u64> {
        None
    }

    /// Counters since creation: (reason, frames) of what was consumed without being a frame.
    fn errors(&self) -> RxErrors {
        RxErrors::default()
    }
}

/// Why received buffers were no frames.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RxErrors {
    /// Shorter than an Ethernet header or longer than allowed, or an impossible offload request.
    pub malformed: u64,
    /// The ring itself is broken; the queue gives no frames until it is set up again.
    pub ring_broken: u64,
    /// Lost in the kernel's socket buffer before we could read them (AF_PACKET).
    pub overrun: u64,
}

/// What became of a frame handed to [`TxQueue::send`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sent {
    /// It will be with the receiver after the next [`TxQueue::flush`] at the latest.
    Yes,
    /// No room now; try again later. Nothing was consumed.
    Full,
    /// The receiver is stopped or absent; nothing was consumed.
    Down,
    /// Can never be delivered to this receiver (too long, offload it does not have).
    Never(NeverReason),
}

/// See [`Sent::Never`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NeverReason {
    /// Longer than the receiver's buffers or MTU allow.
    TooLong,
    /// Needs segmentation that the receiver lacks.
    Offload,
    /// The receiver's ring is broken.
    RingBroken,
    /// The kernel refused the frame itself.
    Refused,
    /// The receiving VM has died, and nothing waits for it any more.
    Gone,
}

/// A place in a transmit queue: behind all that was sent by then.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mark {
    /// The layout's position.
    pub at: u16,
    /// Chains that were taken by then.
    pub count: u64,
    /// The receiver tells how far it has read.
    pub tells: bool,
}

/// A transmit queue of a port: frames from the switch to it.
pub trait TxQueue: Send {
    /// Copies the frame to the receiver.
    fn send(&mut self, frame: &Frame<'_>) -> Sent;
    /// Copies frames to the receiver, as long as that is simple; returns how many. The next one is for [`TxQueue::send`],
    /// which says what is with it.
    fn send_run(&mut self, frames: &[Frame<'_>]) -> usize {
        let sent = |f| self.send(f) == Sent::Yes;
        frames.iter().map(sent).take_while(|s| *s).count()
    }
    /// Publishes what was sent since the last flush.
    fn flush(&mut self);
    /// Signals the receiver for what was flushed since the last time, if it wants that; at most once. The caller has
    /// executed a full memory barrier since.
    fn settle(&mut self) {}
    /// Where it is; none for a queue of which it cannot be known whether the receiver has read it.
    fn mark(&mut self) -> Option<Mark> {
        None
    }
    /// Whether the receiver is known to have read all up to there.
    fn has_read(&mut self, mark: &Mark) -> bool {
        let _ = mark;
        true
    }
    /// The same queue for workers that share it and copy without its lock, if it is of a kind that can do that.
    fn shared(&mut self) -> Option<&mut dyn SharedTx> {
        None
    }
}

/// A transmit queue that workers share: each takes places in it, copies without the lock ([`Claim`] does both), and gives
/// them back (ADR-0022). The receiver sees places in their order.
pub trait SharedTx {
    /// What the receiver need not have done for it.
    fn takes(&self) -> Offloads;
    /// Takes places for as many of the frames as simply go; returns how many. The next one is for [`SharedTx::take`].
    fn take_run(&mut self, frames: &[Frame<'_>], places: &mut Places) -> usize;
    /// Takes places for the frames that `places` lists: all of them or none.
    fn take(&mut self, places: &mut Places) -> Result<(), Sent>;
    /// They are written. True if the receiver can see them now, not if a claim before them is still being written.
    fn give_back(&mut self, places: &Places) -> bool;
    /// Whether the receiver cannot see this claim yet.
    fn is_out(&self, number: u64) -> bool;
    /// The last claim that the receiver cannot see yet, if there is one: what was flushed meanwhile is behind it.
    fn last_out(&self) -> Option<u64>;
    /// Gives no places any more. True if none is out; asked again until it is, before the queue goes.
    fn close(&mut self) -> bool;
}

/// How the control side of a port attaches and detaches its queues (implemented by the engine). Called from any
/// thread that is not a worker; blocks for a few loops of a worker at most.
pub trait Attach: Send + Sync {
    /// Gives a receive queue to its worker. One that is there already is replaced and returned.
    fn attach_rx(&self, port: usize, queue: u16, rx: Box<dyn RxQueue>) -> Option<Box<dyn RxQueue>>;
    /// Takes it away. On return no worker touches it any more.
    fn detach_rx(&self, port: usize, queue: u16) -> Option<Box<dyn RxQueue>>;
    /// Sets or replaces transmit queues, all of them at once: until then frames keep to the queues that are there.
    fn set_tx(&self, port: usize, queues: Vec<(u16, Box<dyn TxQueue>)>);
    /// Takes a transmit queue away. On return no worker uses it.
    fn clear_tx(&self, port: usize, queue: u16);
    /// Says what happened to a port (for `gangway` and the log): the reason why it is down or broken, or `None` when well.
    fn port_error(&self, port: usize, error: Option<String>);
}
