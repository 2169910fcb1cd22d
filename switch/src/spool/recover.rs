//! What is left in the segments of a queue after a crash.
//!
//! Invariant: pure; bytes in, findings out. Nothing that is not an intact record of this lane is ever counted as one.

use gangway_shared::api::Tally;

use super::format::{ALIGN, FILE_HEADER, Marker, RECORD_HEADER, SEQ_MAX, Step, step};

/// Where a lane goes on behind bytes that are no record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Found {
    /// From where the search began.
    pub offset: usize,
    /// The number that is expected there.
    pub seq: u64,
    /// A [`Marker::Next`]: there is nothing more in this segment.
    pub next_segment: bool,
}

/// Looks for the next intact record (or marker) of number `min_seq` or later in `bytes`. Once per damaged place: a
/// linear search.
pub fn resync(bytes: &[u8], salt: u32, min_seq: u64) -> Option<Found> {
    let at = |offset: usize| match step(bytes.get(offset..)?, salt) {
        Step::Record(r) if r.seq >= min_seq => Some(Found {
            offset,
            seq: r.seq,
            next_segment: false,
        }),
        Step::Marker(m, seq) if seq + 1 >= min_seq => Some(Found {
            offset,
            seq: seq + 1,
            next_segment: m == Marker::Next,
        }),
        _ => None,
    };
    (0..bytes.len())
        .step_by(ALIGN)
        .filter(|o| bytes[*o] != 0)
        .find_map(at)
}

/// How a segment ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Room for more behind the last record.
    Open,
    /// The lane goes on in the next one.
    Next,
    /// No record follows.
    Sealed,
}

/// What was found in one segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentEnd {
    /// How it ends.
    pub end: End,
    /// The first byte behind the last intact record (or its marker, with [`End::Sealed`] and [`End::Next`]).
    pub used: usize,
    /// Where a marker begins; else as `used`.
    pub records_end: usize,
    /// Bytes behind `used` up to the last one that is not zero.
    pub torn: usize,
    /// Intact records in it.
    pub records: u64,
}

/// Goes through the segments of a queue in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scanner {
    salt: u32,
    next_seq: u64,
    tally: Tally,
    damaged: Vec<(u64, u64)>,
}

impl Scanner {
    /// For records with this salt, from sequence number 1.
    pub fn new(salt: u32) -> Scanner {
        Scanner {
            salt,
            next_seq: 1,
            tally: Tally::default(),
            damaged: Vec::new(),
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

    /// Scans the whole of one segment file.
    pub fn segment(&mut self, bytes: &[u8]) -> SegmentEnd {
        let mut at = FILE_HEADER;
        let mut records = 0;
        loop {
            let rest = bytes.get(at..).unwrap_or_default();
            match step(rest, self.salt) {
                Step::Record(r) if r.seq >= self.next_seq => {
                    self.expect(r.seq);
                    self.tally.add(r.seq, r.frame.len() as u32, r.crc);
                    self.next_seq = r.seq + 1;
                    at += r.raw.len();
                    records += 1;
                }
                Step::Marker(m, seq) if seq + 1 >= self.next_seq => {
                    self.expect(seq + 1);
                    return SegmentEnd {
                        end: match m {
                            Marker::Next => End::Next,
                            Marker::Seal => End::Sealed,
                        },
                        used: at + RECORD_HEADER,
                        records_end: at,
                        torn: 0,
                        records,
                    };
                }
                _ => match resync(rest, self.salt, self.next_seq) {
                    Some(f) => at += f.offset,
                    None => {
                        let used = at.min(bytes.len());
                        let torn = rest.iter().rposition(|b| *b != 0).map_or(0, |p| p + 1);
                        return SegmentEnd {
                            end: End::Open,
                            used,
                            records_end: used,
                            torn,
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
