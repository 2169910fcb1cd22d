//! What is left in the segments of a queue after a crash.
//!
//! Invariant: pure; bytes in, findings out. Nothing that is not an intact batch of this lane, written in this use of its
//! segment, is ever counted as one.

use gangway_shared::api::Tally;

use super::format::{
    ALIGN, BATCH_HEADER, EPOCH, FILE_HEADER, FileHeader, Marker, Origin, SEGMENT_MAGIC, SEQ_MAX,
    Step, le64, step,
};
use crate::port::QUEUES;

/// Where a lane goes on behind bytes that are no batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Found {
    /// From where the search began.
    pub offset: usize,
    /// The number that is expected there.
    pub seq: u64,
    /// A marker: there is nothing more in this segment. (Behind a seal there should be no other one; if there is, recovery has looked there, too.)
    pub next_segment: bool,
}

/// Looks for the next intact batch (or marker) of number `min_seq` or later in `bytes`. Once per damaged place: a
/// linear search.
pub fn resync(bytes: &[u8], epoch: u64, salt: u32, min_seq: u64) -> Option<Found> {
    let at = |offset: usize| match step(bytes.get(offset..)?, epoch, salt) {
        Step::Batch(b) if b.first_seq >= min_seq => Some(Found {
            offset,
            seq: b.first_seq,
            next_segment: false,
        }),
        Step::Marker(_, seq) if seq + 1 >= min_seq => Some(Found {
            offset,
            seq: seq + 1,
            next_segment: true,
        }),
        _ => None,
    };
    (0..bytes.len()).step_by(ALIGN).find_map(at)
}

/// How a segment ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Room for more behind the last batch.
    Open,
    /// The lane goes on in the next one, which has this epoch.
    Next(u64),
    /// No record follows.
    Sealed,
}

/// What was found in one segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentEnd {
    /// How it ends.
    pub end: End,
    /// The first byte behind the last intact batch (or its marker, with [`End::Sealed`] and [`End::Next`]).
    pub used: usize,
    /// Where a marker begins; else as `used`.
    pub records_end: usize,
    /// Bytes behind `used` of a batch that was begun and is not complete.
    pub torn: usize,
    /// Intact records in it.
    pub records: u64,
}

/// The epoch of a segment's present use; none if this use has not begun.
///
/// `is_ours` says of an intact header whether it is of this place. `marker` is what the segment before says. If neither
/// says anything, but the header was there once, the segment's first batch is asked, which then must be intact.
pub fn epoch_of(
    bytes: &[u8],
    is_ours: impl FnOnce(&FileHeader) -> bool,
    marker: Option<u64>,
    salt: u32,
) -> Option<u64> {
    if let Ok(h) = FileHeader::decode(bytes, SEGMENT_MAGIC) {
        return is_ours(&h).then_some(h.epoch);
    }
    if marker.is_some() || bytes.len() < FILE_HEADER + EPOCH {
        return marker;
    }
    let was_there = bytes[..FILE_HEADER].iter().any(|b| *b != 0);
    let epoch = le64(bytes, FILE_HEADER);
    let first = step(&bytes[FILE_HEADER..], epoch, salt);
    (was_there && matches!(first, Step::Batch(_))).then_some(epoch)
}

/// Goes through the segments of a queue in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scanner {
    salt: u32,
    next_seq: u64,
    tally: Tally,
    damaged: Vec<(u64, u64)>,
    origins: Vec<Origin>,
}

impl Scanner {
    /// For records with this salt, from sequence number 1.
    pub fn new(salt: u32) -> Scanner {
        Scanner {
            salt,
            next_seq: 1,
            tally: Tally::default(),
            damaged: Vec::new(),
            origins: Vec::new(),
        }
    }

    /// The number behind the last record that is there or should be.
    pub fn next_seq(&self) -> u64 {
        self.next_seq
    }

    /// Over the intact records.
    pub fn tally(&self) -> Tally {
        self.tally
    }

    /// Of each receive queue that is known, the last frame.
    pub fn origins(&self) -> &[Origin] {
        &self.origins
    }

    fn note(&mut self, origin: Origin) {
        match self.origins.iter_mut().find(|o| o.queue == origin.queue) {
            Some(o) => *o = origin,
            // Foreign bytes may name any number of queues.
            None if origin.is_known() && usize::from(origin.queue) < QUEUES => {
                self.origins.push(origin);
            }
            None => {}
        }
    }

    /// First and last number of each run of records that is not intact.
    pub fn damaged(&self) -> &[(u64, u64)] {
        &self.damaged
    }

    fn expect(&mut self, seq: u64) {
        if seq > self.next_seq {
            self.damaged.push((self.next_seq, seq - 1));
            self.next_seq = seq;
        }
    }

    /// Scans the whole of one segment file that has this epoch.
    pub fn segment(&mut self, bytes: &[u8], epoch: u64) -> SegmentEnd {
        let mut at = FILE_HEADER;
        let mut records = 0;
        loop {
            let rest = bytes.get(at..).unwrap_or_default();
            match step(rest, epoch, self.salt) {
                Step::Batch(b) if b.first_seq >= self.next_seq => {
                    self.expect(b.first_seq);
                    self.tally.count(u64::from(b.count), b.bytes);
                    self.tally.mix(b.first_seq, b.crc);
                    self.next_seq = b.last_seq() + 1;
                    self.note(b.origin);
                    at += b.span();
                    records += u64::from(b.count);
                }
                Step::Marker(m, seq) if seq + 1 >= self.next_seq => {
                    self.expect(seq + 1);
                    return SegmentEnd {
                        end: match m {
                            Marker::Next(epoch) => End::Next(epoch),
                            Marker::Seal => End::Sealed,
                        },
                        used: at + BATCH_HEADER,
                        records_end: at,
                        torn: 0,
                        records,
                    };
                }
                what => match resync(rest, epoch, self.salt, self.next_seq) {
                    Some(f) => at += f.offset,
                    None => {
                        let used = at.min(bytes.len());
                        return SegmentEnd {
                            end: End::Open,
                            used,
                            records_end: used,
                            torn: if what == Step::Bad { torn(rest) } else { 0 },
                            records,
                        };
                    }
                },
            }
        }
    }

    /// After the last segment: records up to `committed` (at most [`SEQ_MAX`]) should have been there.
    pub fn finish(&mut self, committed: u64) {
        self.expect(committed.min(SEQ_MAX) + 1);
    }
}

/// Bytes that a batch which is not complete says it has, as far as there are so many.
fn torn(rest: &[u8]) -> usize {
    let said = rest
        .get(16..20)
        .map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]) as usize);
    said.clamp(BATCH_HEADER, super::format::BATCH_MAX)
        .min(rest.len())
}
