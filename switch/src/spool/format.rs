//! The bytes of format 3 (docs/formats/spool.md): batches and markers, written and read.
//!
//! Invariant: pure; no file, no clock, no allocation.
//! Invariant: foreign bytes lead to an error or to [`Step::Bad`], never to a panic.

use gangway_shared::id::{HoldId, LaneKey};

pub use super::header::{
    BadHeader, FILE_HEADER, FileHeader, NAME_MAX, QUEUE_MAGIC, SEGMENT_MAGIC, VERSION,
};
use super::sum::{Copier, Striped};
pub use super::sum::{crc32c, striped};
use crate::port::{FRAME_MAX, Frame, PLAIN_HDR, VnetHdr};

/// Bytes of a batch before its table; also the whole of a marker.
pub const BATCH_HEADER: usize = 48;
/// Batches, and the frames in them, start at multiples of this.
pub const ALIGN: usize = super::sum::BLOCK;
/// Bytes of a batch's first field, the epoch, which is not sent.
pub const EPOCH: usize = 8;
/// Bytes of a frame's entry in the table.
pub const ENTRY: usize = 4;
/// Bytes in front of each frame: a `virtio_net_hdr` of one buffer (virtio 1.2, 5.1.6).
pub const FRONT: usize = PLAIN_HDR.len();
/// Frames of a batch, at most.
pub const BATCH_FRAMES: usize = 256;
/// Bytes of a batch, at most. The longest frame fits, also into the smallest segment.
pub const BATCH_MAX: usize = 96 << 10;
/// The highest number of a record: so far from a counter's end that nothing that counts on from it overflows.
pub const SEQ_MAX: u64 = super::words::VALUE_MAX;

/// Bytes of a batch's slots, and of one of them, from which on they are written past the caches.
const STREAMED: usize = 8 << 10;
const STREAMED_FRAME: usize = 512;
/// Where the checksum begins.
const SUMMED: usize = 16;
/// Where the table begins, in a batch as it is shipped.
pub(super) const TABLE: usize = BATCH_HEADER - EPOCH;
const BATCH: u32 = u32::from_le_bytes(*b"GWbt");
const NEXT: u32 = u32::from_le_bytes(*b"GWnx");
const SEAL: u32 = u32::from_le_bytes(*b"GWsl");

const _: () = assert!(batch_len(1, slot_len(FRAME_MAX as u32)) <= BATCH_MAX);

/// Bytes that a frame takes behind the table.
pub const fn slot_len(frame_len: u32) -> usize {
    (FRONT + frame_len as usize).next_multiple_of(ALIGN)
}

/// Bytes of a batch of so many frames that take `slots` bytes.
pub const fn batch_len(count: usize, slots: usize) -> usize {
    BATCH_HEADER + table_len(count) + slots
}

const fn table_len(count: usize) -> usize {
    (count * ENTRY).next_multiple_of(ALIGN)
}

/// What every batch's checksum is XORed with, so that another lane's is never taken for one of this. The same on both
/// hosts.
pub fn salt(hold: HoldId, lane: &LaneKey) -> u32 {
    let mut b = Vec::with_capacity(8 + 2 + 2 + 2 * NAME_MAX);
    b.extend_from_slice(&hold.0.to_le_bytes());
    b.extend_from_slice(&lane.queue.to_le_bytes());
    b.extend_from_slice(lane.from.as_bytes());
    b.push(0);
    b.extend_from_slice(lane.to.as_bytes());
    crc32c(&b)
}

/// Where a batch came in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Origin {
    /// The receive queue of the sending port; `u16::MAX` if it is not known.
    pub queue: u16,
    /// The number of the batch's last frame among those that the queue has given back, from a random start
    /// ([`crate::port::RxQueue::position`]).
    pub position: u64,
}

impl Origin {
    /// Not known.
    pub const NONE: Origin = Origin {
        queue: u16::MAX,
        position: 0,
    };

    /// Is it known?
    pub fn is_known(&self) -> bool {
        self.queue != u16::MAX
    }

    /// So many frames behind it.
    #[must_use]
    pub fn behind(self, frames: usize) -> Origin {
        match self.is_known() {
            true => Origin {
                position: self.position.wrapping_add(frames as u64),
                ..self
            },
            false => self,
        }
    }
}

/// The fields of a batch's header that its frames do not give.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fields {
    /// Number of its first record on the lane, from 1.
    pub first_seq: u64,
    /// When the frames were accepted: nanoseconds since the Unix epoch.
    pub time_ns: u64,
    /// Where they came in.
    pub origin: Origin,
}

pub(crate) fn le32(b: &[u8], at: usize) -> u32 {
    let mut v = [0; 4];
    v.copy_from_slice(&b[at..at + 4]);
    u32::from_le_bytes(v)
}

pub(crate) fn le64(b: &[u8], at: usize) -> u64 {
    let mut v = [0; 8];
    v.copy_from_slice(&b[at..at + 8]);
    u64::from_le_bytes(v)
}

fn le16(b: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([b[at], b[at + 1]])
}

/// The header without its checksum.
fn header(epoch: u64, magic: u32, len: usize, count: usize, f: &Fields) -> [u8; BATCH_HEADER] {
    let mut h = [0; BATCH_HEADER];
    h[0..8].copy_from_slice(&epoch.to_le_bytes());
    h[12..16].copy_from_slice(&magic.to_le_bytes());
    h[16..20].copy_from_slice(&(len as u32).to_le_bytes());
    h[20..22].copy_from_slice(&(count as u16).to_le_bytes());
    h[22..24].copy_from_slice(&f.origin.queue.to_le_bytes());
    h[24..32].copy_from_slice(&f.first_seq.to_le_bytes());
    h[32..40].copy_from_slice(&f.time_ns.to_le_bytes());
    h[40..48].copy_from_slice(&f.origin.position.to_le_bytes());
    h
}

/// How many of these frames, from the first on, make a batch of at most `room` bytes, and how many bytes it has.
#[inline]
pub fn fit(frames: &[Frame<'_>], room: usize) -> (usize, usize) {
    let room = room.min(BATCH_MAX);
    let (mut n, mut slots, mut len) = (0, 0, 0);
    for f in frames.iter().take(BATCH_FRAMES) {
        let more = slots + slot_len(f.len);
        let with = batch_len(n + 1, more);
        if with > room || f.len as usize > FRAME_MAX {
            break;
        }
        (n, slots, len) = (n + 1, more, with);
    }
    (n, len)
}

/// Writes a batch of these frames into `out`, whose length [`fit`] gave. Its header is written last: a batch that is not
/// complete has none. Returns the checksum.
#[inline]
pub fn write_batch(out: &mut [u8], epoch: u64, f: &Fields, frames: &[Frame<'_>], salt: u32) -> u32 {
    let len = out.len();
    let (head, body) = out.split_at_mut(BATCH_HEADER);
    let (table, slots) = body.split_at_mut(table_len(frames.len()));
    if let Some(last) = table.last_chunk_mut::<ALIGN>() {
        *last = [0; ALIGN];
    }
    for (entry, frame) in table.as_chunks_mut::<ENTRY>().0.iter_mut().zip(frames) {
        *entry = frame.len.to_le_bytes();
    }
    let mut h = header(epoch, BATCH, len, frames.len(), f);
    let mut sum = Striped::new();
    sum.add(&h[SUMMED..]);
    sum.add(table);
    // Much that nobody reads before it has left the caches anyway need not go through them.
    let stream = slots.len() >= STREAMED && slots.len() / frames.len().max(1) >= STREAMED_FRAME;
    let sum = if stream {
        stream_frames(slots, frames, sum)
    } else {
        // Small ones are in the nearest cache when they are summed: that is faster than to stop at each of their ends.
        let mut rest = &mut slots[..];
        for frame in frames {
            let slot;
            (slot, rest) = rest.split_at_mut(slot_len(frame.len));
            write_frame(slot, frame);
        }
        sum.add(slots);
        sum.end()
    };
    let crc = sum ^ salt;
    h[8..12].copy_from_slice(&crc.to_le_bytes());
    head[EPOCH..].copy_from_slice(&h[EPOCH..]);
    head[..EPOCH].copy_from_slice(&h[..EPOCH]);
    crc
}

/// Copies and sums in one pass, past the caches.
fn stream_frames(slots: &mut [u8], frames: &[Frame<'_>], sum: Striped) -> u32 {
    let mut to = Copier::new(slots, sum, true);
    for frame in frames {
        match frame.plain_front() {
            Some(front) => to.push(front),
            None => {
                let mut front = PLAIN_HDR;
                front[..10].copy_from_slice(&frame.vnet.0);
                to.push(&front);
                to.push(frame.head());
            }
        }
        for s in frame.rest() {
            to.push_seg(s);
        }
        to.pad();
    }
    to.end()
}

#[inline]
fn write_frame(slot: &mut [u8], frame: &Frame<'_>) {
    if let Some(last) = slot.last_chunk_mut::<ALIGN>() {
        *last = [0; ALIGN];
    }
    let end = FRONT + frame.len as usize;
    let mut at = match frame.plain_front() {
        Some(front) => {
            copy_front(&mut slot[..front.len()], front);
            front.len()
        }
        None => {
            slot[..10].copy_from_slice(&frame.vnet.0);
            slot[10..FRONT].copy_from_slice(&PLAIN_HDR[10..]);
            let head = frame.head();
            copy_front(&mut slot[FRONT..FRONT + head.len()], head);
            FRONT + head.len()
        }
    };
    for s in frame.rest() {
        s.read(0, &mut slot[at..at + s.len()]);
        at += s.len();
    }
    debug_assert_eq!(at, end);
}

/// Copies what is mostly 60 to 140 bytes, in pieces of a fixed size of which the last may overlap the one before.
#[inline(always)]
fn copy_front(to: &mut [u8], from: &[u8]) {
    let len = from.len();
    let to = &mut to[..len];
    match len {
        64..=192 => {
            to[..64].copy_from_slice(&from[..64]);
            if len > 128 {
                to[64..128].copy_from_slice(&from[64..128]);
            }
            if len - 64 <= 16 {
                to[len - 16..].copy_from_slice(&from[len - 16..]);
            } else {
                to[len - 64..].copy_from_slice(&from[len - 64..]);
            }
        }
        _ => to.copy_from_slice(from),
    }
}

/// What stands between batches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Marker {
    /// The lane goes on in the next segment, which has this epoch.
    Next(u64),
    /// No record will follow.
    Seal,
}

/// A marker behind record `seq` (0: behind none).
pub fn marker(epoch: u64, kind: Marker, seq: u64, salt: u32) -> [u8; BATCH_HEADER] {
    let (magic, position) = match kind {
        Marker::Next(next) => (NEXT, next),
        Marker::Seal => (SEAL, 0),
    };
    let f = Fields {
        first_seq: seq,
        time_ns: 0,
        origin: Origin { queue: 0, position },
    };
    let mut h = header(epoch, magic, BATCH_HEADER, 0, &f);
    let crc = striped(&h[SUMMED..]) ^ salt;
    h[8..12].copy_from_slice(&crc.to_le_bytes());
    h
}

/// An intact batch in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Batch<'a> {
    /// Number of its first record.
    pub first_seq: u64,
    /// When it was accepted.
    pub time_ns: u64,
    /// Where it came in.
    pub origin: Origin,
    /// Records in it; at least one.
    pub count: u32,
    /// Bytes of their frames.
    pub bytes: u64,
    /// The checksum as stored.
    pub crc: u32,
    /// All of it but its epoch, as it is shipped.
    pub wire: &'a [u8],
}

/// A record of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record<'a> {
    /// Its number on the lane, from 1.
    pub seq: u64,
    /// When it was accepted: nanoseconds since the Unix epoch.
    pub time_ns: u64,
    /// The frame's offload request.
    pub vnet: VnetHdr,
    /// The frame.
    pub frame: &'a [u8],
}

impl<'a> Batch<'a> {
    /// Number of its last record.
    pub fn last_seq(&self) -> u64 {
        self.first_seq + u64::from(self.count) - 1
    }

    /// Bytes that it takes in a segment.
    pub fn span(&self) -> usize {
        EPOCH + self.wire.len()
    }

    /// Its frames, each with its front.
    pub fn slots(&self) -> Slots<'a> {
        Slots::from(self.wire, self.count, Place::start(self.count))
    }

    /// Its records.
    pub fn records(self) -> impl Iterator<Item = Record<'a>> {
        let records = self.slots().zip(self.first_seq..);
        records.map(move |(slot, seq)| record(slot, seq, self.time_ns))
    }
}

/// The record of a slot.
pub fn record(slot: &[u8], seq: u64, time_ns: u64) -> Record<'_> {
    Record {
        seq,
        time_ns,
        vnet: vnet(slot),
        frame: &slot[FRONT..],
    }
}

fn vnet(slot: &[u8]) -> VnetHdr {
    let mut v = VnetHdr::default();
    v.0.copy_from_slice(&slot[..10]);
    v
}

/// The frame of a slot, as it is sent.
#[inline]
pub fn frame(slot: &[u8]) -> Frame<'_> {
    if slot.starts_with(&PLAIN_HDR) {
        let len = slot.len() - FRONT;
        Frame::with_prefix(VnetHdr::default(), len as u32, slot, &[])
    } else {
        Frame::from_slice(vnet(slot), &slot[FRONT..])
    }
}

/// The frames of a checked batch, each with its front.
#[derive(Debug, Clone)]
pub struct Slots<'a> {
    table: &'a [u8],
    rest: &'a [u8],
}

impl<'a> Slots<'a> {
    /// Those of a batch with so many from this place on; none at a place where there is none.
    #[inline]
    pub fn from(wire: &'a [u8], count: u32, at: Place) -> Slots<'a> {
        let table = TABLE + at.index as usize * ENTRY..TABLE + count as usize * ENTRY;
        Slots {
            table: wire.get(table).unwrap_or_default(),
            rest: wire.get(at.offset as usize..).unwrap_or_default(),
        }
    }
}

impl<'a> Iterator for Slots<'a> {
    type Item = &'a [u8];

    #[inline]
    fn next(&mut self) -> Option<&'a [u8]> {
        let (len, table) = self.table.split_first_chunk::<ENTRY>()?;
        let len = u32::from_le_bytes(*len);
        let (slot, rest) = self.rest.split_at_checked(slot_len(len))?;
        (self.table, self.rest) = (table, rest);
        slot.get(..FRONT + len as usize)
    }
}

/// A record's place in its batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Which one.
    pub index: u32,
    /// Where its slot begins, in the batch as it is shipped.
    pub offset: u32,
}

impl Place {
    /// Of the first of so many.
    pub fn start(count: u32) -> Place {
        let offset = TABLE as u32 + table_len(count as usize) as u32;
        Place { index: 0, offset }
    }

    /// Of the next one, behind a frame of this length.
    pub fn pass(&mut self, frame_len: u32) {
        self.index += 1;
        self.offset += slot_len(frame_len) as u32;
    }
}

/// What is at a place in a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step<'a> {
    /// A batch whose checksum is right.
    Batch(Batch<'a>),
    /// A marker behind the record with this number.
    Marker(Marker, u64),
    /// Nothing was written here in this use of the file, or the segment ends.
    Free,
    /// Something was begun here: a wrong magic, length, number, table or checksum.
    Bad,
}

/// Looks at the start of `bytes`, in a segment with this epoch.
#[inline]
pub fn step(bytes: &[u8], epoch: u64, salt: u32) -> Step<'_> {
    match bytes.split_first_chunk::<EPOCH>() {
        Some((e, wire)) if *e == epoch.to_le_bytes() => look(wire, salt).unwrap_or(Step::Bad),
        _ => Step::Free,
    }
}

/// Looks at the start of what is shipped, or of what stands behind an epoch; none if it is nothing intact.
fn look(wire: &[u8], salt: u32) -> Option<Step<'_>> {
    if wire.len() < TABLE {
        return None;
    }
    let magic = le32(wire, 4);
    let len = le32(wire, 8) as usize;
    let count = u32::from(le16(wire, 12));
    let is_marker = matches!(magic, NEXT | SEAL) && len == BATCH_HEADER && count == 0;
    let is_batch = magic == BATCH
        && (1..=BATCH_FRAMES as u32).contains(&count)
        && (batch_len(count as usize, 0)..=BATCH_MAX).contains(&len)
        && len.is_multiple_of(ALIGN);
    if !is_marker && !is_batch {
        return None;
    }
    let wire = wire.get(..len - EPOCH)?;
    let crc = le32(wire, 0);
    if striped(&wire[SUMMED - EPOCH..]) ^ salt != crc {
        return None;
    }
    let batch = fields(wire, count);
    let seq = batch.first_seq;
    if seq > SEQ_MAX - u64::from(count) {
        return None;
    }
    match magic {
        NEXT => {
            let next = Marker::Next(batch.origin.position);
            return Some(Step::Marker(next, seq));
        }
        SEAL => return Some(Step::Marker(Marker::Seal, seq)),
        _ => {}
    }
    let bytes = table_bytes(wire, count)?;
    (seq > 0).then_some(Step::Batch(Batch { bytes, ..batch }))
}

/// Bytes of all frames, if the table says just what the batch has.
fn table_bytes(wire: &[u8], count: u32) -> Option<u64> {
    let table = wire.get(TABLE..)?.get(..count as usize * ENTRY)?;
    let (mut bytes, mut slots) = (0u64, 0usize);
    for entry in table.as_chunks::<ENTRY>().0 {
        let len = u32::from_le_bytes(*entry);
        if len as usize > FRAME_MAX {
            return None;
        }
        bytes += u64::from(len);
        slots += slot_len(len);
    }
    (batch_len(count as usize, slots) == EPOCH + wire.len()).then_some(bytes)
}

/// A batch in a segment that was checked before.
pub fn view(raw: &[u8]) -> Option<Batch<'_>> {
    let wire = raw.get(EPOCH..).filter(|wire| wire.len() >= TABLE)?;
    let count = u32::from(le16(wire, 12));
    Some(Batch {
        bytes: table_bytes(wire, count)?,
        ..fields(wire, count)
    })
}

/// What a batch's header says.
fn fields(wire: &[u8], count: u32) -> Batch<'_> {
    Batch {
        first_seq: le64(wire, 16),
        time_ns: le64(wire, 24),
        origin: Origin {
            queue: le16(wire, 14),
            position: le64(wire, 32),
        },
        count,
        bytes: 0,
        crc: le32(wire, 0),
        wire,
    }
}

/// How many bytes the batch at the start of a lane's stream has there; none as long as that can't be told.
pub fn wire_len(bytes: &[u8]) -> Result<Option<usize>, BadHeader> {
    if bytes.len() < TABLE {
        return Ok(None);
    }
    if le32(bytes, 4) != BATCH {
        return Err(BadHeader::NotOurs);
    }
    let len = le32(bytes, 8) as usize;
    if !(BATCH_HEADER..=BATCH_MAX).contains(&len) {
        return Err(BadHeader::Field("length"));
    }
    Ok(Some(len - EPOCH))
}

/// The number of the last record of a batch, as its header in a lane's stream says it; 0 without one.
pub(super) fn last_seq(head: &[u8]) -> u64 {
    (le64(head, 16).saturating_add(u64::from(le16(head, 12)))).saturating_sub(1)
}

/// A whole batch as it came in a lane's stream; none if it is not intact.
pub fn shipped(wire: &[u8], salt: u32) -> Option<Batch<'_>> {
    match look(wire, salt)? {
        Step::Batch(b) if b.wire.len() == wire.len() => Some(b),
        _ => None,
    }
}
