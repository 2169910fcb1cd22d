//! The migration buffer: per lane and hold a persistent, bounded queue of frames in mmap'ed, preallocated segment
//! files. One [`Writer`] (a worker, or the receiver of a shipment) appends, any number of [`Reader`]s follow.
//! Bytes: docs/formats/spool.md.
//!
//! Invariant: [`Writer::append_run`] takes no lock, allocates nothing and makes no system call, but for one wake-up of the
//! keeper per segment (and of the syncer per burst, with `sync = "each"`); it copies each frame once and sums what it has copied.
//! Invariant: what a reader returns has been committed and its checksum was right.
//! Invariant: no worker that appends waits for a disk; a disk that is too far behind is a reason to have no room.
//! Invariant: after an I/O error a queue takes nothing more until the spool is opened again (fail-stop).

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use gangway_shared::id::{HoldId, LaneKey};

mod arriving;
pub mod format;
mod frames;
mod header;
mod keeper;
mod map;
mod open;
mod queue;
mod reader;
pub mod recover;
mod store;
mod sum;
mod syncer;
mod words;
mod writer;

#[cfg(test)]
pub(crate) mod tests;

pub use arriving::Arriving;
pub use format::{Batch, Origin, Record};
pub(crate) use map::{PAGE, Page, Room, is_memory};
pub use queue::{Queue, sync_all};
pub use reader::{Damaged, RUN, Reader, Run};
pub use store::Spool;
pub(crate) use sum::crc32c;
pub use syncer::Owed;
pub use words::{Word, seal as seal_word};
pub use writer::{NoRoom, RejectedBatch, Writer};

/// What a queue is for; the three of a hold are kept apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// Held on the source, to be shipped (or flushed here after an abort).
    Source,
    /// Received from the source.
    Incoming,
    /// Accepted on the target behind what the source ships.
    Local,
}

impl Kind {
    /// All of them.
    pub const ALL: [Kind; 3] = [Kind::Source, Kind::Incoming, Kind::Local];

    /// As in file headers.
    pub const fn code(self) -> u8 {
        match self {
            Kind::Source => 1,
            Kind::Incoming => 2,
            Kind::Local => 3,
        }
    }

    /// The inverse of [`Kind::code`].
    pub const fn from_code(c: u8) -> Option<Kind> {
        match c {
            1 => Some(Kind::Source),
            2 => Some(Kind::Incoming),
            3 => Some(Kind::Local),
            _ => None,
        }
    }

    /// As in names of directories.
    pub const fn letter(self) -> char {
        match self {
            Kind::Source => 's',
            Kind::Incoming => 't',
            Kind::Local => 'l',
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Source => "source",
            Kind::Incoming => "incoming",
            Kind::Local => "local",
        })
    }
}

/// What [`Spool::open`] found of an earlier run: one queue.
#[derive(Debug)]
pub struct Recovered {
    /// The queue, with everything that is intact; its tally is over that.
    pub queue: Arc<Queue>,
    /// Goes on behind the last record; none if the queue is sealed.
    pub writer: Option<Writer>,
    /// Records that were there and are not intact any more, oldest first. Must be empty in a queue that is to be
    /// shipped; a reader reports each as [`Damaged`].
    pub damaged: Vec<Damaged>,
    /// Words of `queue.meta` that are not what was written.
    pub bad_words: Vec<BadWord>,
    /// Bytes of a batch that was not complete when the host or the switch went down; it was never committed and is gone.
    pub torn_bytes: u64,
}

/// A word of a queue's `queue.meta` that is not what was written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct BadWord {
    /// Of which lane.
    pub lane: LaneKey,
    /// Which.
    pub word: Word,
    /// Both copies: what it said is not known any more. Each further start says so, too.
    pub lost: bool,
}

impl fmt::Display for BadWord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let BadWord { lane, word, lost } = self;
        write!(f, "{lane}: '{word}' of queue.meta was damaged")?;
        f.write_str(match (lost, word) {
            (false, _) => " in one of its two places; the other one is used",
            (true, Word::Committed) => {
                ", both copies: records that are missing at the end are not noticed"
            }
            (true, Word::Flushed) => {
                ", both copies: what was delivered of it is delivered once more"
            }
            (true, Word::Flags) => {
                ", both copies: whether it is between VMs of the group is taken from hold.rec"
            }
        })
    }
}

/// Why the spool can't do something.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SpoolError {
    /// Another switch has the directory.
    #[error("{} is in use by another process", .0.display())]
    InUse(PathBuf),
    /// The quota does not allow one more segment.
    #[error(
        "the spool's quota of {quota_bytes} bytes is used up ({used_bytes} bytes in segments of {segment_bytes}); raise spool.quota_bytes or make spool.segment_bytes smaller"
    )]
    Quota {
        /// `spool.quota_bytes`.
        quota_bytes: u64,
        /// In use by all holds.
        used_bytes: u64,
        /// `spool.segment_bytes`.
        segment_bytes: u64,
    },
    /// The hold's own quota does not allow one more segment.
    #[error(
        "hold {hold} has used up its part of the spool: {used_bytes} of {hold_bytes} bytes (what waits behind a shipment gets three quarters); raise spool.hold_bytes"
    )]
    HoldQuota {
        /// Which.
        hold: HoldId,
        /// `spool.hold_bytes`.
        hold_bytes: u64,
        /// In its segments.
        used_bytes: u64,
    },
    /// The quota allows no more frames.
    #[error(
        "the spool's quota of {quota_frames} frames is used up ({used_frames} frames; what waits behind a shipment gets three quarters); raise spool.quota_frames"
    )]
    Frames {
        /// `spool.quota_frames`.
        quota_frames: u64,
        /// Accepted by all holds that there are.
        used_frames: u64,
    },
    /// The hold's own quota allows no more frames.
    #[error(
        "hold {hold} has used up its part of the spool: {used_frames} of {hold_frames} frames (what waits behind a shipment gets three quarters); raise spool.hold_frames"
    )]
    HoldFrames {
        /// Which.
        hold: HoldId,
        /// `spool.hold_frames`.
        hold_frames: u64,
        /// Accepted by its queues.
        used_frames: u64,
    },
    /// There is a queue for this lane already.
    #[error("hold {0} has a {1} queue for {2} already")]
    Exists(HoldId, Kind, LaneKey),
    /// A port's name that does not fit.
    #[error("the name of a spooled port has 1 to 64 bytes, not {len}: '{0}'", len = .0.len())]
    Name(String),
    /// A file that this program can't read.
    #[error("{}: {reason}", .path.display())]
    Format {
        /// Which.
        path: PathBuf,
        /// Why.
        reason: format::BadHeader,
    },
    /// The file system failed.
    #[error("{}: {source}", .path.display())]
    Io {
        /// What was touched.
        path: PathBuf,
        /// How it failed.
        source: io::Error,
    },
    /// An earlier failure of the disk; nothing more is accepted until the spool is opened again.
    #[error("the spool has stopped after an I/O error: {0}")]
    Stopped(String),
}

impl SpoolError {
    fn io(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> SpoolError {
        let path = path.into();
        move |source| SpoolError::Io { path, source }
    }
}
