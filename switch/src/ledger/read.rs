//! Reads a ledger's file.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use crc_fast::{CrcAlgorithm, Digest};
use gangway_shared::api::Role;
use gangway_shared::codec;
use gangway_shared::config::valid::LedgerConfig;
use gangway_shared::id::HoldId;
use gangway_shared::ledger::{IndexBatch, IndexFrame, KeptFrame, Ledger, LedgerLane};

use super::{BATCH, ENTRY, FileLane, HEADER, LedgerError, MAGIC, Section, VERSION, file_name};
use crate::spool::crc32c;
use crate::spool::format::{self, le32, le64};

/// A summary is not longer: 4096 lanes of 2 KiB.
const SUMMARY_MAX: u64 = 8 << 20;
/// Bytes of an index that are read at once: at most so many frames to a page, each of at most 10 bytes on the wire.
const INDEX_PAGE: usize = 256 << 10;
/// Bytes of frames that are read at once; more than a batch has.
const FRAMES_PAGE: usize = 384 << 10;
/// Records of a batch (docs/formats/spool.md).
const RECORDS_MAX: usize = 256;

/// A ledger that was written.
#[derive(Debug)]
pub struct Reader {
    path: PathBuf,
    file: File,
    ledger: Ledger,
    lanes: Vec<FileLane>,
}

impl Reader {
    /// None: there is none of this hold's end.
    pub fn open(
        cfg: &LedgerConfig,
        hold: HoldId,
        role: Role,
    ) -> Result<Option<Reader>, LedgerError> {
        let path = cfg.dir.join(file_name(hold, role));
        let file = match File::open(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            r => r.map_err(LedgerError::io(&path))?,
        };
        let bad = |what: &str| LedgerError::Damaged {
            path: path.clone(),
            what: what.to_owned(),
        };
        let mut h = [0; HEADER];
        file.read_exact_at(&mut h, 0)
            .map_err(|_| bad("shorter than its header"))?;
        if &h[..8] != MAGIC {
            return Err(bad("no ledger"));
        }
        if le32(&h, 8) != VERSION {
            return Err(bad(&format!(
                "version {}, this program reads {VERSION}",
                le32(&h, 8)
            )));
        }
        if crc32c(&h[..36]) != le32(&h, 36) {
            return Err(bad("the header is damaged"));
        }
        let (at, len) = (le64(&h, 16), le64(&h, 24));
        if len > SUMMARY_MAX {
            return Err(bad("the summary is too long"));
        }
        let mut summary = vec![0; len as usize];
        file.read_exact_at(&mut summary, at)
            .map_err(|_| bad("it ends before its summary does"))?;
        if crc32c(&summary) != le32(&h, 32) {
            return Err(bad("the summary is damaged"));
        }
        let mut rest = summary.as_slice();
        let first = message(&mut rest).ok_or_else(|| bad("the summary is malformed"))?;
        let ledger: Ledger = codec::decode(first).map_err(|e| bad(&e.to_string()))?;
        let mut lanes = Vec::new();
        while !rest.is_empty() {
            let m = message(&mut rest).ok_or_else(|| bad("the summary is malformed"))?;
            let lane: LedgerLane = codec::decode(m).map_err(|e| bad(&e.to_string()))?;
            let mut section = || {
                let (s, behind) = rest.split_first_chunk()?;
                rest = behind;
                let s = Section::decode(s);
                let end = s.at.checked_add(s.bytes)?;
                (end <= at).then_some(s)
            };
            let (Some(index), Some(frames)) = (section(), section()) else {
                return Err(bad("a lane's records lie outside the file"));
            };
            lanes.push(FileLane {
                lane,
                index,
                frames,
            });
        }
        if (ledger.hold, ledger.role) != (hold, role) {
            return Err(bad("it is that of another hold"));
        }
        Ok(Some(Reader {
            path,
            file,
            ledger,
            lanes,
        }))
    }

    /// All but the lanes.
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// From this one on.
    pub fn lanes(&self, first: usize) -> impl Iterator<Item = &LedgerLane> {
        self.lanes.iter().skip(first).map(|l| &l.lane)
    }

    fn lane(&self, n: usize) -> Result<&FileLane, LedgerError> {
        let absent = || LedgerError::Absent(format!("lane {n}"));
        self.lanes.get(n).ok_or_else(absent)
    }

    fn bad(&self, n: usize, what: &str) -> LedgerError {
        let lane = self.lanes.get(n).map(|l| l.lane.lane.to_string());
        LedgerError::Damaged {
            path: self.path.clone(),
            what: format!("lane {}: {what}", lane.unwrap_or_default()),
        }
    }

    /// A page of a section, and where it is; all of it is checked with the first page.
    fn page(&self, n: usize, s: Section, at: u64, most: usize) -> Result<Vec<u8>, LedgerError> {
        let left = s.bytes.checked_sub(at);
        let left = left.ok_or_else(|| LedgerError::Absent(format!("page {at}")))?;
        if at == 0 && self.sum(&s)? != s.crc {
            return Err(self.bad(n, "its records are damaged"));
        }
        let mut bytes = vec![0; left.min(most as u64) as usize];
        self.file
            .read_exact_at(&mut bytes, s.at + at)
            .map_err(LedgerError::io(&self.path))?;
        Ok(bytes)
    }

    fn sum(&self, s: &Section) -> Result<u32, LedgerError> {
        let mut sum = Digest::new(CrcAlgorithm::Crc32Iscsi);
        let mut buf = vec![0; 1 << 18];
        let mut at = 0;
        while at < s.bytes {
            let n = (s.bytes - at).min(buf.len() as u64) as usize;
            self.file
                .read_exact_at(&mut buf[..n], s.at + at)
                .map_err(LedgerError::io(&self.path))?;
            sum.update(&buf[..n]);
            at += n as u64;
        }
        Ok(sum.finalize() as u32)
    }

    /// Batches of a lane's index, and where the next page begins if there is more.
    pub fn index(&self, n: usize, at: u64) -> Result<(Vec<IndexBatch>, Option<u64>), LedgerError> {
        let s = self.lane(n)?.index;
        let bytes = self.page(n, s, at, INDEX_PAGE)?;
        let mut batches = Vec::new();
        let mut rest = bytes.as_slice();
        while rest.len() >= BATCH {
            let count = le32(rest, 20) as usize;
            let first = le64(rest, 0);
            let is_one =
                (1..=RECORDS_MAX).contains(&count) && first.checked_add(count as u64).is_some();
            if !is_one {
                return Err(self.bad(n, "a batch of its index is malformed"));
            }
            let Some((batch, behind)) = rest.split_at_checked(BATCH + count * ENTRY) else {
                break;
            };
            let frames = batch[BATCH..].chunks_exact(ENTRY);
            batches.push(IndexBatch {
                first_seq: first,
                time_ns: le64(batch, 8),
                crc: le32(batch, 16),
                frames: frames
                    .map(|f| IndexFrame {
                        len: le32(f, 0),
                        crc: le32(f, 4),
                    })
                    .collect(),
            });
            rest = behind;
        }
        let next = self.next(n, s, at, bytes.len() - rest.len())?;
        Ok((batches, next))
    }

    /// Frames of a lane that were kept, and where the next page begins if there are more.
    pub fn frames(&self, n: usize, at: u64) -> Result<(Vec<KeptFrame>, Option<u64>), LedgerError> {
        let lane = self.lane(n)?;
        let s = lane.frames;
        let salt = format::salt(self.ledger.hold, &lane.lane.lane);
        let bytes = self.page(n, s, at, FRAMES_PAGE)?;
        let mut frames = Vec::new();
        let mut rest = bytes.as_slice();
        while let Ok(Some(len)) = format::wire_len(rest) {
            let Some((batch, behind)) = rest.split_at_checked(len) else {
                break;
            };
            let batch = format::shipped(batch, salt)
                .ok_or_else(|| self.bad(n, "a batch of its frames is damaged"))?;
            frames.extend(batch.records().map(|r| KeptFrame {
                seq: r.seq,
                time_ns: r.time_ns,
                bytes: r.frame.to_vec(),
            }));
            rest = behind;
        }
        let next = self.next(n, s, at, bytes.len() - rest.len())?;
        Ok((frames, next))
    }

    fn next(&self, n: usize, s: Section, at: u64, used: usize) -> Result<Option<u64>, LedgerError> {
        let next = at + used as u64;
        if used == 0 && next < s.bytes {
            return Err(self.bad(n, "its records end in the middle"));
        }
        Ok((next < s.bytes).then_some(next))
    }
}

fn message<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let len = u32::from_le_bytes(*rest.first_chunk()?) as usize;
    let (m, behind) = rest.get(4..)?.split_at_checked(len)?;
    *rest = behind;
    Some(m)
}
