//! The write end of a queue.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use gangway_shared::api::Tally;

use super::format::{
    self, BATCH_HEADER, BadHeader, EPOCH, FILE_HEADER, Fields, FileHeader, Marker, Origin,
};
use super::keeper::segment_name;
use super::map::{Segment, Tail};
use super::queue::Queue;
use super::syncer::Owed;
use crate::port::{BURST, FRAME_MAX, Frame};

/// Frames that a switch has accepted and not given back when it dies, at most.
const AHEAD_MAX: u64 = BURST as u64;

/// Appends to a queue. Owned by one thread at a time.
#[derive(Debug)]
pub struct Writer {
    queue: Arc<Queue>,
    tail: Tail,
    /// The file of the tail's segment, by its number, once something has arrived for it.
    file: Option<(u32, File)>,
    /// Segments that were left since the last commit start here.
    left: Option<Arc<Segment>>,
    next_seq: u64,
    tally: Tally,
    dirty: bool,
    sealed: bool,
    /// Of each receive queue the last frame that an earlier run of the switch has put here.
    had: Vec<Origin>,
}

/// There is no room for this frame now: the quota is used up, the disk is full, or the next segment is not ready yet.
/// Keep the frame and try again; or the queue has failed or is sealed and never will have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no room in the spool now")]
pub struct NoRoom;

/// Why a batch of another host was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RejectedBatch {
    /// Try again later.
    #[error(transparent)]
    NoRoom(#[from] NoRoom),
    /// It does not begin as a batch does.
    #[error(transparent)]
    Header(#[from] BadHeader),
    /// The bytes are no intact batch of this lane.
    #[error("no intact batch of this lane")]
    Garbage,
    /// Its first number is not the next one.
    #[error("record {found} where {expected} must follow")]
    Sequence {
        /// What it says.
        found: u64,
        /// What must follow.
        expected: u64,
    },
}

impl Writer {
    /// Behind record `last_seq`, in the queue's segment of this tail; writes and publishes the segment's header if it is
    /// empty. Frames up to those that are `had` do not come in again.
    pub(super) fn new(
        queue: Arc<Queue>,
        tail: Tail,
        last_seq: u64,
        tally: Tally,
        had: Vec<Origin>,
    ) -> Writer {
        let mut w = Writer {
            queue,
            tail,
            file: None,
            left: None,
            next_seq: last_seq + 1,
            tally,
            dirty: false,
            sealed: false,
            had,
        };
        w.queue.set_writing(w.tail.segment().number());
        if w.tail.at() == 0 {
            let header = w.file_header(w.tail.segment());
            put_header(&mut w.tail, &header);
            w.tail.publish();
        }
        w
    }

    fn file_header(&self, segment: &Segment) -> FileHeader {
        FileHeader {
            hold: self.queue.hold(),
            kind: self.queue.kind(),
            lane: self.queue.lane().clone(),
            index: self.queue.index(),
            number: segment.number(),
            first_seq: self.next_seq,
            segment_bytes: segment.len() as u64,
            epoch: segment.epoch(),
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
        !self.queue.has_all_frames() && self.has_bytes(frame_len)
    }

    /// The same for [`Writer::append_accepted`].
    pub fn has_bytes(&self, frame_len: u32) -> bool {
        frame_len as usize <= FRAME_MAX
            && self.room_for(format::batch_len(1, format::slot_len(frame_len)))
    }

    fn room_for(&self, total: usize) -> bool {
        if self.sealed || self.queue.is_removed() || self.queue.failed().is_some() {
            return false;
        }
        let segment = self.tail.segment();
        let begun = segment.number() > 0
            || self.tail.room() < segment.len() / 4 * 3
            || self.tail.room() < total + BATCH_HEADER;
        if begun && self.queue.lacks_segments() {
            self.queue.want_segment();
        }
        if self
            .queue
            .is_behind(self.queue.place(segment, self.tail.at()) + total as u64)
        {
            return false;
        }
        // A marker must always fit behind a batch.
        self.tail.room() >= total + BATCH_HEADER || segment.next().is_some()
    }

    /// Copies the frame, which came in behind `from`, behind the last one. Visible to readers after [`Writer::commit`].
    pub fn append(&mut self, time_ns: u64, frame: &Frame<'_>, from: Origin) -> Result<(), NoRoom> {
        match self.append_run(time_ns, std::slice::from_ref(frame), from) {
            0 => Err(NoRoom),
            _ => Ok(()),
        }
    }

    /// The same for frames that came together, as many as there is room for: a batch, or a few. What an earlier run of the switch
    /// has put here and not given back to the sender is taken, and not put here again (ADR-0021).
    pub fn append_run(&mut self, time_ns: u64, frames: &[Frame<'_>], from: Origin) -> usize {
        match self.queue.has_all_frames() {
            true => 0,
            false => self.append_accepted(time_ns, frames, from),
        }
    }

    /// The same for frames that nobody can keep back any more, for which bytes were reserved: the quota of frames does not stop them.
    pub fn append_accepted(&mut self, time_ns: u64, frames: &[Frame<'_>], from: Origin) -> usize {
        // Whether the queue takes anything and whether the next segment is due is asked once, and at each segment's end.
        if !self.room_for(0) {
            return 0;
        }
        let mut done = match self.had.is_empty() {
            true => 0,
            false => self.known(from, frames.len()),
        };
        while let Some(rest) = frames.get(done..).filter(|rest| !rest.is_empty()) {
            let room = self.tail.room().saturating_sub(BATCH_HEADER);
            match format::fit(rest, room) {
                (0, _) => match rest.first() {
                    Some(f) if f.len as usize <= FRAME_MAX => {
                        let one = format::batch_len(1, format::slot_len(f.len));
                        // What does not fit into a fresh segment fits into none.
                        if room >= one || self.make_room(one).is_err() {
                            break;
                        }
                    }
                    _ => break,
                },
                (n, len) => {
                    self.put(time_ns, &rest[..n], len, from.behind(done + n));
                    done += n;
                }
            }
        }
        done
    }

    /// How many of `n` frames behind `from` are here already. A lane's frames of one queue come in order, so all up to the last one
    /// are. A number that is further ahead than a burst is of another ring, or of another time.
    #[cold]
    fn known(&mut self, from: Origin, n: usize) -> usize {
        let Some(at) = self.had.iter().position(|h| h.queue == from.queue) else {
            return 0;
        };
        let known = match self.had[at].position.wrapping_sub(from.position) {
            ahead @ 1..=AHEAD_MAX => ahead as usize,
            _ => 0,
        };
        if known <= n {
            self.had.swap_remove(at);
        }
        known.min(n)
    }

    /// Writes a batch of `len` bytes, for which there is room; its last frame is `origin`.
    #[inline]
    fn put(&mut self, time_ns: u64, frames: &[Frame<'_>], len: usize, origin: Origin) {
        let fields = Fields {
            first_seq: self.next_seq,
            time_ns,
            origin,
        };
        let (salt, epoch) = (self.queue.salt(), self.tail.segment().epoch());
        let Some(buf) = self.tail.buf(len) else {
            return;
        };
        let crc = format::write_batch(buf, epoch, &fields, frames, salt);
        let bytes = frames.iter().map(|f| u64::from(f.len)).sum();
        self.took(len, frames.len() as u64, bytes, crc);
    }

    /// Appends a batch of another host, after checking it: what was sent of it, behind room for its epoch. Blocks, as a disk may.
    pub(super) fn take_arrived(&mut self, batch: &mut [u8]) -> Result<(), RejectedBatch> {
        if self.queue.has_all_frames() {
            return Err(NoRoom.into());
        }
        let salt = self.queue.salt();
        let len = batch.len();
        self.make_room(len)?;
        let (place, wire) = batch.split_at_mut(EPOCH);
        let arrived = format::shipped(wire, salt).ok_or(RejectedBatch::Garbage)?;
        if arrived.first_seq != self.next_seq {
            return Err(RejectedBatch::Sequence {
                found: arrived.first_seq,
                expected: self.next_seq,
            });
        }
        let (count, bytes, crc) = (u64::from(arrived.count), arrived.bytes, arrived.crc);
        place.copy_from_slice(&self.tail.segment().epoch().to_le_bytes());
        self.write(batch)?;
        self.took(len, count, bytes, crc);
        Ok(())
    }

    fn write(&mut self, batch: &[u8]) -> Result<(), NoRoom> {
        #[cfg(test)]
        drop(self.queue.disk.lock());
        let written = match open(&mut self.file, &self.queue, self.tail.segment()) {
            Ok(file) => self.tail.write(file, batch),
            // Too many are open, which will pass: it is mapped all the same.
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                self.tail
                    .buf(batch.len())
                    .ok_or(NoRoom)?
                    .copy_from_slice(batch);
                Ok(())
            }
            gone => gone.map(drop),
        };
        written.map_err(|e| {
            if !self.queue.is_removed() {
                let path = segment_path(&self.queue, self.tail.segment());
                let why = format!("{}: {e}", path.display());
                tracing::error!(lane = %self.queue.lane(), hold = %self.queue.hold(), "writing to the spool failed: {why}");
                self.queue.fail(why);
            }
            NoRoom
        })
    }

    fn took(&mut self, len: usize, frames: u64, bytes: u64, crc: u32) {
        self.tail.advance(len);
        self.tally.count(frames, bytes);
        self.tally.mix(self.next_seq, crc);
        self.next_seq += frames;
        self.dirty = true;
    }

    /// Goes on in the next segment if a batch of this length does not fit in this one.
    fn make_room(&mut self, len: usize) -> Result<(), NoRoom> {
        if !self.room_for(len) {
            return Err(NoRoom);
        }
        if self.tail.room() >= len + BATCH_HEADER {
            return Ok(());
        }
        let next = self.tail.segment().next().cloned().ok_or(NoRoom)?;
        let mut tail = next.tail().ok_or(NoRoom)?;
        // The next segment's header first: a marker always points to a complete one.
        put_header(&mut tail, &self.file_header(&next));
        self.put_marker(Marker::Next(next.epoch()));
        self.queue.set_writing(next.number());
        let left = std::mem::replace(&mut self.tail, tail).leave();
        self.left.get_or_insert(left);
        Ok(())
    }

    fn put_marker(&mut self, kind: Marker) {
        let epoch = self.tail.segment().epoch();
        let m = format::marker(epoch, kind, self.next_seq - 1, self.queue.salt());
        if let Some(b) = self.tail.buf(BATCH_HEADER) {
            b.copy_from_slice(&m);
            self.tail.advance(BATCH_HEADER);
        }
    }

    /// Publishes everything appended since the last commit. Once per burst, before the frames go back to their sender.
    pub fn commit(&mut self) {
        if self.dirty {
            self.publish(false);
        }
    }

    /// What was committed and must be on the disk before the frames go back to their sender; none unless `spool.sync` is
    /// `each`, or if it is there already.
    pub fn owed(&self) -> Option<Owed> {
        let seq = self.next_seq - 1;
        (self.queue.owes() && self.queue.durable_seq() < seq).then(|| Owed {
            queue: self.queue.clone(),
            seq,
        })
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

/// The segment's file, which stays open until another one is asked for.
fn open<'f>(
    last: &'f mut Option<(u32, File)>,
    queue: &Queue,
    segment: &Segment,
) -> io::Result<&'f File> {
    let number = segment.number();
    let file = match last.take().filter(|f| f.0 == number) {
        Some(same) => same,
        None => (number, segment.file(&segment_path(queue, segment))?),
    };
    Ok(&last.insert(file).1)
}

fn segment_path(queue: &Queue, segment: &Segment) -> PathBuf {
    queue.dir().join(segment_name(segment.number()))
}

fn put_header(tail: &mut Tail, header: &FileHeader) {
    if let Some(b) = tail.buf(FILE_HEADER) {
        b.copy_from_slice(&header.encode(format::SEGMENT_MAGIC));
        tail.advance(FILE_HEADER);
    }
}
