//! Sending to a VM's TAP without ever losing a frame in its queue.
//!
//! tun drops what does not fit its queue, and what comes while no process has the character device open. Two things make
//! that impossible to miss:
//!
//! 1. **The driver's answer.** We send past the queueing discipline, so the driver's drop comes back as `ENOBUFS` from the
//!    very call that offered the frame, and the frame is still ours.
//! 2. **Credit.** At most [`CREDIT`] frames go out after the queue was last seen empty (through the duplicate of the
//!    reader's descriptor). It keeps the queue short, so that waiting for it to drain before a stop is quick, and it
//!    bounds what a paused VM leaves behind. It also covers the one case where the driver's answer does not reach us:
//!    frames that the kernel must segment because the guest does not take TSO go through the queueing discipline, each
//!    costing as many credits as it has segments.
//!
//! Without a duplicate there is no credit: rule 1 alone holds the queue, up to its full length, and frames that
//! the guest cannot take whole are refused as `Never(Offload)`.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::vm::VmTap;
use crate::port::offload::gso;
use crate::port::offload::pieces::Pieces;
use crate::port::packet::{Health, refused};
use crate::port::{Frame, NeverReason, Sent, TxQueue, VnetHdr};
use crate::sys::packet::PacketSocket;

/// Frames sent since the queue was last seen empty. With [`SEGMENTS_MAX`] it stays below [`super::vm::QUEUE_LEN`].
pub(super) const CREDIT: u32 = 512;
/// More segments than any honest sender's frame has (64 KiB at an MSS of 536 are 123).
const SEGMENTS_MAX: u32 = 2048;
/// How long "nobody reads" is believed without asking again.
const DOWN_FOR: Duration = Duration::from_millis(1);
/// How long "the guest takes no TSO" is believed. A guest changes it when its driver starts.
const SEGMENT_FOR: Duration = Duration::from_millis(100);

/// The sending side of a VM's TAP.
pub(super) struct VmTapTx {
    pub(super) tap: Arc<VmTap>,
    /// Past the queueing discipline.
    pub(super) direct: PacketSocket,
    /// Through it: the kernel segments.
    pub(super) segmenting: PacketSocket,
    /// For [`VmTapTx::direct`].
    pub(super) pieces: Pieces,
    pub(super) health: Arc<Health>,
    pub(super) credit: u32,
    pub(super) down_until: Option<Instant>,
    pub(super) segment_until: Option<Instant>,
}

impl TxQueue for VmTapTx {
    fn send(&mut self, frame: &Frame<'_>) -> Sent {
        if pending(&mut self.down_until) {
            return Sent::Down;
        }
        if self.credit == 0 {
            if self.tap.reader_exited() {
                return self.down();
            }
            match self.tap.queue_empty() {
                Some(false) => return Sent::Full,
                // No duplicate: the driver's answer is the only limit.
                Some(true) | None => self.credit = CREDIT,
            }
        }
        if is_gso(frame) && pending(&mut self.segment_until) {
            return self.send_segmented(frame);
        }
        match self.pieces.send(frame, direct(&self.direct, &self.tap)) {
            Ok(frames) => self.sent(frames),
            Err(e) if e.raw_os_error() == Some(libc::ENOBUFS) => self.dropped(frame, &e),
            Err(e) => refused(&e, &self.health),
        }
    }

    fn flush(&mut self) {}
}

impl VmTapTx {
    fn sent(&mut self, frames: u32) -> Sent {
        self.credit = self.credit.saturating_sub(frames);
        self.health.well();
        Sent::Yes
    }

    fn down(&mut self) -> Sent {
        self.down_until = Some(Instant::now() + DOWN_FOR);
        self.health.no_reader();
        Sent::Down
    }

    /// The driver did not take it: is nobody there, is the queue full, or must it be segmented first?
    fn dropped(&mut self, frame: &Frame<'_>, e: &io::Error) -> Sent {
        match self.tap.carrier() {
            Ok(true) => {}
            Ok(false) => return self.down(),
            Err(e) => return refused(&e, &self.health),
        }
        if !is_gso(frame) {
            return refused(e, &self.health);
        }
        match self.tap.queue_empty() {
            // We never fill the queue beyond half of it, but somebody before us might have.
            Some(false) if self.credit < CREDIT / 2 => {
                self.credit = 0;
                Sent::Full
            }
            // Asking for the carrier has also made the kernel set up the queueing discipline of a device that has just
            // got one (`linkwatch_sync_dev`); before that it would drop silently.
            Some(_) => {
                self.segment_until = Some(Instant::now() + SEGMENT_FOR);
                self.send_segmented(frame)
            }
            None if self.tap.segments_itself(frame.vnet, frame.len) => refused(e, &self.health),
            // A burst of datagrams needs nobody to segment it.
            None if frame.vnet.gso_type() == gso::UDP_L4 => self.send_cut(frame),
            None => Sent::Never(NeverReason::Offload),
        }
    }

    fn send_segmented(&mut self, frame: &Frame<'_>) -> Sent {
        let segments = segments(frame);
        if segments > SEGMENTS_MAX || self.tap.queue_empty().is_none() {
            return Sent::Never(NeverReason::Offload);
        }
        if self.tap.remembers() {
            // What the kernel makes of a frame cannot be remembered. What cannot be cut here, it still can.
            match self.send_cut(frame) {
                Sent::Never(_) => self.tap.forget_sent(),
                other => return other,
            }
        }
        match self.pieces.send(frame, |f| self.segmenting.send(f)) {
            Ok(frames) => self.sent(segments.max(frames)),
            Err(e) => refused(&e, &self.health),
        }
    }

    fn send_cut(&mut self, frame: &Frame<'_>) -> Sent {
        match self.pieces.cut(frame, direct(&self.direct, &self.tap)) {
            Ok(frames) => self.sent(frames),
            Err(e) if e.raw_os_error() == Some(libc::ENOBUFS) => Sent::Full,
            Err(e) => refused(&e, &self.health),
        }
    }
}

/// Hands a frame to the driver, and remembers it if it must.
fn direct<'q>(
    socket: &'q PacketSocket,
    tap: &'q VmTap,
) -> impl FnMut(&Frame<'_>) -> io::Result<()> + 'q {
    |frame| {
        socket.send(frame)?;
        tap.has_sent(frame);
        Ok(())
    }
}

fn is_gso(frame: &Frame<'_>) -> bool {
    frame.vnet.gso_type() != 0
}

/// An upper bound of the segments that the kernel makes of a frame.
fn segments(frame: &Frame<'_>) -> u32 {
    let VnetHdr([_, _, _, _, lo, hi, ..]) = frame.vnet;
    let size = u32::from(u16::from_le_bytes([lo, hi])).max(1);
    frame.len.div_ceil(size).max(1)
}

/// Whether a time that was set has not come yet; clears it when it has. Costs nothing while none is set.
fn pending(until: &mut Option<Instant>) -> bool {
    match *until {
        None => false,
        Some(t) if Instant::now() < t => true,
        Some(_) => {
            *until = None;
            false
        }
    }
}
