//! A cursor over a queue.

use std::sync::Arc;

use arrayvec::ArrayVec;
use gangway_shared::api::Tally;
use gangway_shared::id::LaneKey;

use super::format::{self, FILE_HEADER, Marker, Record, Step};
use super::map::Segment;
use super::queue::Queue;
use super::recover::resync;

/// Records that [`Reader::pass_run`] gives at once, at most.
pub const RUN: usize = 32;

/// Reads a queue from its first record on, independent of other readers.
#[derive(Debug)]
pub struct Reader {
    queue: Arc<Queue>,
    /// None: the queue was removed before.
    seg: Option<Arc<Segment>>,
    at: u32,
    next_seq: u64,
    tally: Tally,
    /// Of the records from `at` on, in one segment, whose checksums were found right.
    checked: ArrayVec<Checked, RUN>,
    damaged: Option<(Damaged, Resume)>,
}

#[derive(Debug, Clone, Copy)]
struct Checked {
    total: u32,
    frame_len: u32,
    crc: u32,
}

impl Checked {
    fn of(r: &Record<'_>) -> Checked {
        Checked {
            total: r.raw.len() as u32,
            frame_len: r.frame.len() as u32,
            crc: r.crc,
        }
    }
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

impl Reader {
    pub(super) fn new(queue: Arc<Queue>, first: Option<Arc<Segment>>) -> Reader {
        Reader {
            queue,
            seg: first,
            at: FILE_HEADER as u32,
            next_seq: 1,
            tally: Tally::default(),
            checked: ArrayVec::new(),
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
        if let Some((d, _)) = &self.damaged {
            return Err(d.clone());
        }
        if self.checked.is_empty() && !self.find()? {
            return Ok(None);
        }
        let (Some(c), Some(seg)) = (self.checked.first(), &self.seg) else {
            return Ok(None);
        };
        let raw = seg.read(self.at, self.at + c.total);
        Ok(format::view(raw))
    }

    /// Gives `take` the next records, up to `most` that follow each other intact in one segment, and passes as many as it
    /// says. Zero at the end and where something is damaged, which [`Reader::peek`] tells apart.
    pub fn pass_run(&mut self, most: usize, take: impl FnOnce(&[Record<'_>]) -> usize) -> usize {
        if self.damaged.is_some() || (self.checked.is_empty() && !self.find().unwrap_or(false)) {
            return 0;
        }
        let Some(seg) = &self.seg else {
            return 0;
        };
        let mut at = self.at + self.checked.iter().map(|c| c.total).sum::<u32>();
        let last = self.queue.last_seq();
        while !self.checked.is_full() && self.next_seq + self.checked.len() as u64 <= last {
            match format::step(seg.read(at, u32::MAX), self.queue.salt()) {
                Step::Record(r) if r.seq == self.next_seq + self.checked.len() as u64 => {
                    let checked = Checked::of(&r);
                    at += checked.total;
                    self.checked.push(checked);
                }
                _ => break,
            }
        }
        let mut at = self.at;
        let mut records: ArrayVec<Record<'_>, RUN> = ArrayVec::new();
        for c in self.checked.iter().take(most) {
            records.extend(format::view(seg.read(at, at + c.total)));
            at += c.total;
        }
        let n = take(&records).min(records.len());
        drop(records);
        self.advance_by(n);
        n
    }

    /// Moves to the next record and checks it.
    fn find(&mut self) -> Result<bool, Damaged> {
        loop {
            if self.at_end() {
                return Ok(false);
            }
            let Some(seg) = &self.seg else {
                return Ok(false);
            };
            let bytes = seg.read(self.at, u32::MAX);
            match format::step(bytes, self.queue.salt()) {
                Step::Record(r) if r.seq == self.next_seq => {
                    self.checked.push(Checked::of(&r));
                    return Ok(true);
                }
                Step::Marker(Marker::Next, seq) if seq + 1 == self.next_seq => {
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
        let (resume, next_seq) = loop {
            let bytes = seg.read(at, u32::MAX);
            // The first step may be a good record with a later number (its predecessors were lost before).
            if let Some(f) = resync(bytes, salt, self.next_seq) {
                at += f.offset as u32;
                if !f.next_segment {
                    break (Resume { seg, at }, f.seq);
                }
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
        let there = format::step(resume.seg.read(resume.at, u32::MAX), salt);
        if next_seq == self.next_seq && matches!(there, Step::Record(_)) {
            // Only what stood between two records, as a marker: none is missing.
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
        } else {
            self.advance_by(1);
        }
    }

    fn advance_by(&mut self, n: usize) {
        for c in self.checked.drain(..n.min(self.checked.len())) {
            self.tally.add(self.next_seq, c.frame_len, c.crc);
            self.next_seq += 1;
            self.at += c.total;
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

    /// Over what was passed.
    pub fn tally(&self) -> Tally {
        self.tally
    }

    /// Resolves when there is something to peek at, or never will be (sealed or removed).
    pub async fn ready(&self) {
        self.queue.notified(self.next_seq - 1).await;
    }
}
