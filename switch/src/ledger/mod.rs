//! The ledger: what this host remembers of a hold that is over, so that anybody can check that no frame is missing.
//! Bytes: docs/formats/ledger.md; why it is so: ADR-0020. Types: [`gangway_shared::ledger`].
//!
//! While a hold lasts each stage only counts. When it ends, before its frames are let go, its queues are read once more from
//! the spool's files: that gives the stages `spool` and `store`, and an index with each frame's length and checksum, by which
//! what is missing is named.
//!
//! Invariant: nothing here runs on a worker.
//! Invariant: a ledger is on the disk, complete and synced, or not there.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use gangway_shared::api::{Role, Tally};
use gangway_shared::config::valid::LedgerConfig;
use gangway_shared::id::HoldId;
use gangway_shared::ledger::{Account, LedgerLane, Lost, Stage, StageAccount};
use rustix::fs::{FlockOperation, flock};

use crate::spool::Queue;
use crate::spool::format::{le32, le64};

mod read;
#[cfg(test)]
mod tests;
mod write;

pub use read::Reader;
pub use write::write;

/// A lane as its hold knows it at its end.
#[derive(Debug)]
pub struct Book {
    /// With the stages that have counted.
    pub lane: LedgerLane,
    /// To be read again, and as which stage.
    pub again: Option<(Arc<Queue>, Stage)>,
}

impl Book {
    /// Adds what a stage has counted.
    pub fn note(&mut self, stage: Stage, account: Account) {
        self.lane.stages.push(StageAccount { stage, account });
        self.lane.stages.sort_by_key(|s| s.stage);
    }

    /// Adds what a stage could not pass on.
    pub fn lose(&mut self, stage: Stage, first_seq: u64, last_seq: u64, why: &str) {
        if self.lane.lost.len() < LOST {
            self.lane.lost.push(Lost {
                stage,
                first_seq,
                last_seq,
                why: why.to_owned(),
            });
        } else {
            self.lane.lost_more += last_seq - first_seq + 1;
        }
    }
}

/// Of what a tally counts, up to this record.
pub fn counted((last_seq, tally): (u64, Tally)) -> Account {
    Account::batches(last_seq, &tally)
}

/// Ranges of lost frames of a lane that are told apart.
const LOST: usize = 64;

/// Why a ledger can't be written or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LedgerError {
    /// The file system failed.
    #[error("{}: {source}", .path.display())]
    Io {
        /// What was touched.
        path: PathBuf,
        /// How it failed.
        source: io::Error,
    },
    /// Not what was written.
    #[error("{}: {what}", .path.display())]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// Where.
        what: String,
    },
    /// There is no such lane or page.
    #[error("the ledger has no {0}")]
    Absent(String),
}

impl LedgerError {
    fn io(path: &Path) -> impl FnOnce(io::Error) -> LedgerError {
        let path = path.to_owned();
        move |source| LedgerError::Io { path, source }
    }
}

/// What a file begins with.
const MAGIC: &[u8; 8] = b"GWLEDGR\n";
/// Of the format.
const VERSION: u32 = 1;
/// Length of a file's header.
const HEADER: usize = 40;
/// Length of a batch's head in an index, and of a frame's entry behind it.
const BATCH: usize = 24;
const ENTRY: usize = 8;
const SUFFIX: &str = "ledger";
/// While it is being written.
const UNFINISHED: &str = "new";

/// A lane in a file's summary.
#[derive(Debug)]
struct FileLane {
    lane: LedgerLane,
    index: Section,
    frames: Section,
}

/// Bytes of a file.
#[derive(Debug, Clone, Copy, Default)]
struct Section {
    at: u64,
    bytes: u64,
    crc: u32,
}

/// Length of a [`Section`] in a summary.
const SECTION: usize = 20;

impl Section {
    fn encode(&self) -> [u8; SECTION] {
        let mut b = [0; SECTION];
        b[..8].copy_from_slice(&self.at.to_le_bytes());
        b[8..16].copy_from_slice(&self.bytes.to_le_bytes());
        b[16..].copy_from_slice(&self.crc.to_le_bytes());
        b
    }

    fn decode(b: &[u8; SECTION]) -> Section {
        Section {
            at: le64(b, 0),
            bytes: le64(b, 8),
            crc: le32(b, 16),
        }
    }
}

fn file_name(hold: HoldId, role: Role) -> String {
    let role = match role {
        Role::Source => "source",
        Role::Target => "target",
    };
    format!("{hold}-{role}.{SUFFIX}")
}

/// Deletes what is older than `ledger.keep_days` (0: everything), and the oldest beyond `ledger.keep_bytes`; of those that are
/// not too old the youngest stays. Without a clock that can be believed ([`Retirement`]) nothing is too old. What a write that was cut off
/// has left goes, too: a file that is being written is locked. Returns how many.
pub fn retire(cfg: &LedgerConfig, now: Option<SystemTime>) -> Result<usize, LedgerError> {
    let entries = match fs::read_dir(&cfg.dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(0),
        r => r.map_err(LedgerError::io(&cfg.dir))?,
    };
    let mut gone = 0;
    let mut remove = |path: &Path| match fs::remove_file(path) {
        // The end of a hold retires, too.
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        r => r.map(|()| gone += 1).map_err(LedgerError::io(path)),
    };
    let mut all = Vec::new();
    for entry in entries {
        let path = entry.map_err(LedgerError::io(&cfg.dir))?.path();
        let ours = |suffix| path.extension().is_some_and(|e| e == suffix);
        if !ours(SUFFIX) && !ours(UNFINISHED) {
            continue;
        }
        let meta = match fs::metadata(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            r => r.map_err(LedgerError::io(&path))?,
        };
        let made = meta.modified().map_err(LedgerError::io(&path))?;
        // A file from the future is young.
        let age = now.and_then(|now| now.duration_since(made).ok());
        if ours(SUFFIX) {
            all.push((made, age.unwrap_or_default(), meta.len(), path));
            continue;
        }
        match File::open(&path) {
            Ok(f) if is_idle(&f) => remove(&path)?,
            // It is being written, or is complete by now.
            _ => {}
        }
    }
    all.sort();
    let oldest = Duration::from_secs(u64::from(cfg.keep_days) * 86_400);
    let mut bytes: u64 = all.iter().map(|(_, _, len, _)| len).sum();
    let mut left = all.len();
    for (_, age, len, path) in all {
        let old = cfg.keep_days == 0 || age > oldest;
        if !old && (bytes <= cfg.keep_bytes || left == 1) {
            continue;
        }
        remove(&path)?;
        bytes -= len;
        left -= 1;
    }
    Ok(gone)
}

/// Nobody writes it, and nobody begins to while `f` is open.
fn is_idle(f: &File) -> bool {
    flock(f, FlockOperation::NonBlockingLockExclusive).is_ok()
}

/// How often a host on which no hold ends looks for what is due.
const RETIRE_EVERY: Duration = Duration::from_secs(3600);
/// How far the wall's clock and ours may go apart from one look to the next.
const DRIFT: Duration = Duration::from_secs(60);

/// When it is looked for: at the start of the switch, then every hour.
///
/// Invariant: a clock that jumps makes no ledger old. It is believed at a look before which it went as the machine's own clock since the
/// look before: what it calls too old at a start, or right behind a jump, has at least an hour until somebody has set it right.
#[derive(Debug, Default)]
pub struct Retirement {
    last: Option<(Instant, SystemTime)>,
}

/// It is time to call [`retire`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Due {
    /// The time, if it can be believed.
    pub clock: Option<SystemTime>,
}

impl Retirement {
    /// Some if it is time to call [`retire`].
    pub fn due(&mut self, now: Instant, wall: SystemTime) -> Option<Due> {
        let Some((then, was)) = self.last else {
            self.last = Some((now, wall));
            return Some(Due { clock: None });
        };
        let passed = now.saturating_duration_since(then);
        if passed < RETIRE_EVERY {
            return None;
        }
        self.last = Some((now, wall));
        let went = wall.duration_since(was).ok();
        let agrees = went.is_some_and(|went| went.abs_diff(passed) <= DRIFT);
        Some(Due {
            clock: agrees.then_some(wall),
        })
    }
}
