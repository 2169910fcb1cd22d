//! The write end of a queue.

use std::sync::Arc;

use gangway_shared::api::Tally;

use super::format::{
    self, FILE_HEADER, Fields, FileHeader, Marker, RECORD_HEADER, Step, record_len,
};
use super::map::{Segment, Tail};
use super::queue::Queue;
use crate::port::{FRAME_MAX, Frame, VnetHdr};

/// Appends to a queue. Owned by one thread at a time.
#[derive(Debug)]
pub struct Writer {
    queue: Arc<Queue>,
    tail: Tail,
    /// Segments that were left since the last commit start here.
    left: Option<Arc<Segment>>,
    number: u32,
    next_seq: u64,
    tally: Tally,
    dirty: bool,
    sealed: bool,
}

/// There is no room for this frame now: the quota is used up, the disk is full, or the next segment is not ready yet.
/// Keep the frame and try again; or the queue has failed or is sealed and never will have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no room in the spool now")]
pub struct NoRoom;

/// Why [`Writer::append_record`] did not take a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RejectedRecord {
    /// Try again later.
    #[error(transparent)]
    NoRoom(#[from] NoRoom),
    /// The bytes are no intact record of this lane.
    #[error("no intact record of this lane")]
    Garbage,
    /// Its number is not the next one.
    #[error("record {found} where {expected} must follow")]
    Sequence {
        /// What it says.
        found: u64,
        /// What must follow.
        expected: u64,
    },
}

impl Writer {
    /// Behind record `last_seq` of segment `number`; writes and publishes the segment's header if it is empty.
    pub(super) fn new(
        queue: Arc<Queue>,
        tail: Tail,
        number: u32,
        last_seq: u64,
        tally: Tally,
    ) -> Writer {
        let mut w = Writer {
            queue,
            tail,
            left: None,
            number,
            next_seq: last_seq + 1,
            tally,
            dirty: false,
            sealed: false,
        };
        if w.tail.at() == 0 {
            let header = w.file_header(w.tail.room() as u64);
            put_header(&mut w.tail, &header);
            w.tail.publish();
        }
        w
    }

    fn file_header(&self, segment_bytes: u64) -> FileHeader {
        FileHeader {
            hold: self.queue.hold(),
            kind: self.queue.kind(),
            lane: self.queue.lane().clone(),
            index: self.queue.index(),
            number: self.number,
            first_seq: self.next_seq,
            segment_bytes,
        }
    }

    /// The queue.
    pub fn queue(&self) -> &Arc<Queue> {
        &self.queue
    }

    /// The number that the next record gets.
    pub fn next_seq(&self) -> u64 {
        self.next_seq
    }

    /// What was appended so far, committed or not.
    pub fn tally(&self) -> Tally {
        self.tally
    }

    /// False: do not take this frame from its sender now. Never blocks; asks the keeper for the next segment early.
    pub fn has_room(&self, frame_len: u32) -> bool {
        self.room_for(record_len(frame_len)) && frame_len as usize <= FRAME_MAX
    }

    fn room_for(&self, total: usize) -> bool {
        if self.sealed || self.queue.is_removed() || self.queue.failed().is_some() {
            return false;
        }
        let next = self.tail.segment().next().is_some();
        let begun = self.number > 0 || self.tail.room() < self.tail.segment().len() / 4 * 3;
        if begun && self.queue.lacks_segments() {
            self.queue.want_segment();
        }
        // A marker must always fit behind the record.
        self.tail.room() >= total + RECORD_HEADER || next
    }

    /// Copies the frame behind the last one. Visible to readers after [`Writer::commit`].
    pub fn append(
        &mut self,
        time_ns: u64,
        vnet: VnetHdr,
        frame: &Frame<'_>,
    ) -> Result<u64, NoRoom> {
        if frame.len as usize > FRAME_MAX {
            return Err(NoRoom);
        }
        let total = record_len(frame.len);
        self.make_room(total)?;
        self.put(time_ns, vnet, frame, total)
    }

    /// The same for frames that came together, as many as there is room for.
    pub fn append_run(&mut self, time_ns: u64, frames: &[Frame<'_>]) -> usize {
        // Whether the queue takes anything and whether the next segment is due is asked once, and at each segment's end.
        if !self.room_for(0) {
            return 0;
        }
        let mut put = |frame: &Frame<'_>| {
            let total = record_len(frame.len);
            if frame.len as usize > FRAME_MAX {
                return Err(NoRoom);
            }
            if self.tail.room() < total + RECORD_HEADER {
                self.make_room(total)?;
            }
            self.put(time_ns, frame.vnet, frame, total)
        };
        frames.iter().take_while(|f| put(f).is_ok()).count()
    }

    /// Writes a record of `total` bytes, for which there is room.
    #[inline]
    fn put(
        &mut self,
        time_ns: u64,
        vnet: VnetHdr,
        frame: &Frame<'_>,
        total: usize,
    ) -> Result<u64, NoRoom> {
        let seq = self.next_seq;
        let fields = Fields {
            seq,
            time_ns,
            frame_len: frame.len,
            vnet,
        };
        let salt = self.queue.salt();
        let buf = self.tail.buf(total).ok_or(NoRoom)?;
        let crc = format::write_record(buf, &fields, salt, |out| frame.copy_to(out));
        self.took(total, frame.len, crc);
        Ok(seq)
    }

    /// Appends a whole record as [`super::Record::raw`] gave it on the other host, after checking it.
    pub fn append_record(&mut self, record: &[u8]) -> Result<u64, RejectedRecord> {
        let Step::Record(r) = format::step(record, self.queue.salt()) else {
            return Err(RejectedRecord::Garbage);
        };
        if r.raw.len() != record.len() {
            return Err(RejectedRecord::Garbage);
        }
        if r.seq != self.next_seq {
            return Err(RejectedRecord::Sequence {
                found: r.seq,
                expected: self.next_seq,
            });
        }
        self.make_room(record.len())?;
        let buf = self.tail.buf(record.len()).ok_or(NoRoom)?;
        buf.copy_from_slice(record);
        self.took(record.len(), r.frame.len() as u32, r.crc);
        Ok(r.seq)
    }

    fn took(&mut self, total: usize, frame_len: u32, crc: u32) {
        self.tail.advance(total);
        self.tally.add(self.next_seq, frame_len, crc);
        self.next_seq += 1;
        self.dirty = true;
    }

    /// Goes on in the next segment if the record does not fit in this one.
    fn make_room(&mut self, total: usize) -> Result<(), NoRoom> {
        if !self.room_for(total) {
            return Err(NoRoom);
        }
        if self.tail.room() >= total + RECORD_HEADER {
            return Ok(());
        }
        let next = self.tail.segment().next().cloned().ok_or(NoRoom)?;
        let mut tail = next.tail().ok_or(NoRoom)?;
        // The next segment's header first: a marker always points to a complete one.
        self.number += 1;
        put_header(&mut tail, &self.file_header(next.len() as u64));
        self.put_marker(Marker::Next);
        self.queue.set_writing(self.number);
        let left = std::mem::replace(&mut self.tail, tail).leave();
        self.left.get_or_insert(left);
        Ok(())
    }

    fn put_marker(&mut self, kind: Marker) {
        let m = format::marker(kind, self.next_seq - 1, self.queue.salt());
        if let Some(b) = self.tail.buf(RECORD_HEADER) {
            b.copy_from_slice(&m);
            self.tail.advance(RECORD_HEADER);
        }
    }

    /// Publishes everything appended since the last commit. Once per burst, before the frames go back to their sender.
    pub fn commit(&mut self) {
        if self.dirty {
            self.publish(false);
        }
    }

    /// Commits, and no record will follow. Again: does nothing.
    pub fn seal(&mut self) {
        if !self.sealed {
            self.put_marker(Marker::Seal);
            self.sealed = true;
            self.publish(true);
        }
    }

    fn publish(&mut self, seal: bool) {
        self.dirty = false;
        let mut left = self.left.take();
        while let Some(s) = left {
            if Arc::ptr_eq(&s, self.tail.segment()) {
                break;
            }
            s.publish_left();
            left = s.next().cloned();
        }
        self.tail.publish();
        self.queue.committed(self.next_seq - 1, &self.tally, seal);
    }
}

fn put_header(tail: &mut Tail, header: &FileHeader) {
    if let Some(b) = tail.buf(FILE_HEADER) {
        b.copy_from_slice(&header.encode(format::SEGMENT_MAGIC));
        tail.advance(FILE_HEADER);
    }
}
