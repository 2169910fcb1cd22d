//! A cursor over a queue.

use std::sync::Arc;

use arrayvec::ArrayVec;
use bytes::Bytes;
use gangway_shared::api::Tally;
use gangway_shared::id::LaneKey;

use super::format::{self, Batch, FILE_HEADER, Place, Record, Slots, Step};
use super::map::Segment;
use super::queue::Queue;
use super::recover::resync;
use crate::port::Frame;

/// Frames that [`Reader::pass_run`] gives at once, at most.
pub const RUN: usize = 32;

/// Reads a queue from its first record on, independent of other readers.
#[derive(Debug)]
pub struct Reader {
    queue: Arc<Queue>,
    /// None: the queue was removed before.
    seg: Option<Arc<Segment>>,
    /// Where the batch at hand begins, or the next one.
    at: u32,
    next_seq: u64,
    tally: Tally,
    /// The batch at `at`, whose checksum was found right.
    open: Option<Open>,
    damaged: Option<(Damaged, Resume)>,
}

/// A batch of which some records were not passed yet.
#[derive(Debug, Clone, Copy)]
struct Open {
    len: u32,
    count: u32,
    first_seq: u64,
    time_ns: u64,
    crc: u32,
    /// Of the next record.
    place: Place,
}

#[derive(Debug, Clone)]
struct Resume {
    seg: Arc<Segment>,
    at: u32,
}

/// Records that are in the queue and not intact: bits have flipped in memory or on the disk. They are never returned.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{lane}: records {first_seq} to {last_seq} are damaged")]
pub struct Damaged {
    /// Of which lane.
    pub lane: LaneKey,
    /// The first.
    pub first_seq: u64,
    /// The last.
    pub last_seq: u64,
}

/// Frames that came together and lie in a row.
#[derive(Debug)]
pub struct Run<'a> {
    /// Number of the first.
    pub first_seq: u64,
    /// When they were accepted.
    pub time_ns: u64,
    /// They lie in the spool.
    pub frames: &'a [Frame<'a>],
}

/// A part of a segment that is published, and so is never written again.
struct Wire {
    seg: Arc<Segment>,
    from: u32,
    to: u32,
}

impl AsRef<[u8]> for Wire {
    fn as_ref(&self) -> &[u8] {
        self.seg.read(self.from, self.to)
    }
}

impl Reader {
    pub(super) fn new(queue: Arc<Queue>, first: Option<Arc<Segment>>) -> Reader {
        Reader {
            queue,
            seg: first,
            at: FILE_HEADER as u32,
            next_seq: 1,
            tally: Tally::default(),
            open: None,
            damaged: None,
        }
    }

    /// The queue.
    pub fn queue(&self) -> &Arc<Queue> {
        &self.queue
    }

    /// The next committed record, or `None` at the end. Asked again it answers the same and checks nothing twice.
    /// [`Reader::advance`] passes what it returned, also an error.
    pub fn peek(&mut self) -> Result<Option<Record<'_>>, Damaged> {
        if !self.find()? {
            return Ok(None);
        }
        let record = self.slots().and_then(|(open, mut slots)| {
            let slot = slots.next()?;
            Some(format::record(slot, self.next_seq, open.time_ns))
        });
        Ok(record)
    }

    /// Gives `take` the next frames, up to `most` of one batch, and passes as many as it says. Zero at the end and where
    /// something is damaged, which [`Reader::peek`] tells apart.
    pub fn pass_run(&mut self, most: usize, take: impl FnOnce(Run<'_>) -> usize) -> usize {
        if !self.find().unwrap_or(false) {
            return 0;
        }
        let Some((open, slots)) = self.slots() else {
            return 0;
        };
        let most = most.min(RUN);
        let frames: ArrayVec<Frame<'_>, RUN> = slots.take(most).map(format::frame).collect();
        let run = Run {
            first_seq: self.next_seq,
            time_ns: open.time_ns,
            frames: &frames,
        };
        let n = take(run).min(frames.len());
        let mut place = open.place;
        for f in &frames[..n] {
            place.pass(f.len);
        }
        let bytes = frames[..n].iter().map(|f| u64::from(f.len)).sum();
        drop(frames);
        self.passed(n as u64, bytes, place);
        n
    }

    /// The next batch, whole, whatever was passed of it; `None` at the end. [`Reader::advance_batch`] passes its rest.
    pub fn peek_batch(&mut self) -> Result<Option<Batch<'_>>, Damaged> {
        if !self.find()? {
            return Ok(None);
        }
        let (Some(open), Some(seg)) = (&self.open, &self.seg) else {
            return Ok(None);
        };
        let raw = seg.read(self.at, self.at + open.len);
        Ok(format::view(raw))
    }

    /// What of the next batch is shipped, without a copy: as long as somebody has it, its segment is not used again.
    /// [`Reader::advance_batch`] passes it.
    pub fn wire(&mut self) -> Result<Option<Bytes>, Damaged> {
        if !self.find()? {
            return Ok(None);
        }
        let (Some(open), Some(seg)) = (&self.open, &self.seg) else {
            return Ok(None);
        };
        Ok(Some(Bytes::from_owner(Wire {
            seg: seg.clone(),
            from: self.at + format::EPOCH as u32,
            to: self.at + open.len,
        })))
    }

    /// Passes what [`Reader::peek_batch`] returned last, or the error; without it, nothing.
    pub fn advance_batch(&mut self) {
        let Some((open, slots)) = self.slots() else {
            return self.advance();
        };
        let mut place = open.place;
        let (mut frames, mut bytes) = (0, 0);
        for slot in slots {
            let len = slot.len() - format::FRONT;
            place.pass(len as u32);
            frames += 1;
            bytes += len as u64;
        }
        self.passed(frames, bytes, place);
    }

    /// What is left of the batch at hand.
    #[inline]
    fn slots(&self) -> Option<(Open, Slots<'_>)> {
        let (open, seg) = (self.open?, self.seg.as_ref()?);
        let wire = seg.read(self.at + format::EPOCH as u32, self.at + open.len);
        Some((open, Slots::from(wire, open.count, open.place)))
    }

    /// Moves to the next batch and checks it, unless one is at hand.
    #[inline]
    fn find(&mut self) -> Result<bool, Damaged> {
        if self.open.is_some() {
            return Ok(true);
        }
        self.find_next()
    }

    fn find_next(&mut self) -> Result<bool, Damaged> {
        if let Some((d, _)) = &self.damaged {
            return Err(d.clone());
        }
        loop {
            if self.at_end() {
                return Ok(false);
            }
            let Some(seg) = &self.seg else {
                return Ok(false);
            };
            let bytes = seg.read(self.at, u32::MAX);
            match format::step(bytes, seg.epoch(), self.queue.salt()) {
                Step::Batch(b) if b.first_seq == self.next_seq => {
                    self.open = Some(Open {
                        len: b.span() as u32,
                        count: b.count,
                        first_seq: b.first_seq,
                        time_ns: b.time_ns,
                        crc: b.crc,
                        place: Place::start(b.count),
                    });
                    return Ok(true);
                }
                Step::Marker(_, seq) if seq + 1 == self.next_seq => {
                    let Some(next) = seg.next().cloned() else {
                        self.damage(seg.clone())?;
                        continue;
                    };
                    self.seg = Some(next);
                    self.at = FILE_HEADER as u32;
                }
                _ => self.damage(seg.clone())?,
            }
        }
    }

    /// What is at the cursor is not what must be there: finds where the lane goes on.
    fn damage(&mut self, mut seg: Arc<Segment>) -> Result<(), Damaged> {
        let salt = self.queue.salt();
        let last = self.queue.last_seq();
        let mut at = self.at;
        let mut min_seq = self.next_seq;
        let (resume, next_seq) = loop {
            let bytes = seg.read(at, u32::MAX);
            // The first step may be a good batch with a later number (its predecessors were lost before).
            if let Some(f) = resync(bytes, seg.epoch(), salt, min_seq) {
                at += f.offset as u32;
                if !f.next_segment {
                    break (Resume { seg, at }, f.seq);
                }
                // What is before it is not in the next one: recovery says so, too.
                min_seq = f.seq;
            }
            match seg.next().cloned() {
                Some(n) if n.published() > 0 => {
                    seg = n;
                    at = FILE_HEADER as u32;
                }
                _ => {
                    let at = seg.published();
                    break (Resume { seg, at }, last + 1);
                }
            }
        };
        let bytes = resume.seg.read(resume.at, u32::MAX);
        let there = format::step(bytes, resume.seg.epoch(), salt);
        if next_seq == self.next_seq && matches!(there, Step::Batch(_)) {
            // Only what stood between two batches, as a marker: none is missing.
            self.seg = Some(resume.seg);
            self.at = resume.at;
            return Ok(());
        }
        let d = Damaged {
            lane: self.queue.lane().clone(),
            first_seq: self.next_seq,
            last_seq: next_seq
                .saturating_sub(1)
                .clamp(self.next_seq, last.max(self.next_seq)),
        };
        self.damaged = Some((d.clone(), resume));
        Err(d)
    }

    /// Passes what [`Reader::peek`] returned last; without it, nothing.
    pub fn advance(&mut self) {
        if let Some((d, r)) = self.damaged.take() {
            self.next_seq = d.last_seq + 1;
            self.seg = Some(r.seg);
            self.at = r.at;
            return;
        }
        let len = self.slots().and_then(|(open, mut slots)| {
            let len = (slots.next()?.len() - format::FRONT) as u32;
            Some((open.place, len))
        });
        if let Some((mut place, len)) = len {
            place.pass(len);
            self.passed(1, u64::from(len), place);
        }
    }

    /// So many records of the batch at hand, up to this place.
    #[inline]
    fn passed(&mut self, frames: u64, bytes: u64, place: Place) {
        let Some(open) = &mut self.open else {
            return;
        };
        open.place = place;
        self.next_seq += frames;
        self.tally.count(frames, bytes);
        if place.index >= open.count {
            self.tally.mix(open.first_seq, open.crc);
            self.at += open.len;
            self.open = None;
        }
    }

    /// Passes everything up to `seq`, as far as it is committed; the tally counts what was intact. Returns what was
    /// damaged.
    pub fn skip_to(&mut self, seq: u64) -> Vec<Damaged> {
        let mut bad = Vec::new();
        while self.next_seq <= seq {
            match self.peek() {
                Ok(None) => break,
                Ok(Some(_)) => {}
                Err(d) => bad.push(d),
            }
            self.advance();
        }
        bad
    }

    /// The number of the record that comes next.
    pub fn next_seq(&self) -> u64 {
        self.next_seq
    }

    /// Nothing is committed beyond the cursor.
    pub fn at_end(&self) -> bool {
        self.next_seq > self.queue.last_seq()
    }

    /// The cursor has passed everything that will ever be there.
    pub fn finished(&self) -> bool {
        // In this order: what is committed before the seal is seen.
        self.queue.is_sealed() && self.at_end()
    }

    /// Over what was passed. The digest is that of whole batches.
    pub fn tally(&self) -> Tally {
        self.tally
    }

    /// Resolves when there is something to peek at, or never will be (sealed or removed).
    pub async fn ready(&self) {
        self.queue.notified(self.next_seq - 1).await;
    }
}
