//! The header of the spool's files (docs/formats/spool.md, "Header").
//!
//! Invariant: pure; no file, no clock, no allocation except for names.

use gangway_shared::id::{HoldId, LaneKey};

use super::Kind;
use super::format::{le32, le64};
use super::sum::crc32c;

/// Version of the format, in every file's header.
pub const VERSION: u32 = 3;
/// Bytes of the header that a segment (and a queue's metadata file) starts with.
pub const FILE_HEADER: usize = 256;
/// The longest port name that fits.
pub const NAME_MAX: usize = 64;
/// Starts a segment file.
pub const SEGMENT_MAGIC: [u8; 8] = *b"GWSPSEG\n";
/// Starts a queue's metadata file.
pub const QUEUE_MAGIC: [u8; 8] = *b"GWSPQUE\n";

/// The header of a segment or of a metadata file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileHeader {
    /// The hold.
    pub hold: HoldId,
    /// Which end of it.
    pub kind: Kind,
    /// The lane.
    pub lane: LaneKey,
    /// The queue's number in the hold's directory.
    pub index: u32,
    /// The segment's number in the queue, from 0 (metadata: 0).
    pub number: u32,
    /// The sequence number of the first record (metadata: 1).
    pub first_seq: u64,
    /// Of each of the queue's segment files.
    pub segment_bytes: u64,
    /// Of this use of the file (metadata: 0).
    pub epoch: u64,
}

impl FileHeader {
    /// The bytes. Names are at most [`NAME_MAX`] long (checked when the queue is created); a longer one is cut.
    pub fn encode(&self, magic: [u8; 8]) -> [u8; FILE_HEADER] {
        let mut b = [0; FILE_HEADER];
        b[0..8].copy_from_slice(&magic);
        b[8..12].copy_from_slice(&VERSION.to_le_bytes());
        b[12..16].copy_from_slice(&(FILE_HEADER as u32).to_le_bytes());
        b[16..24].copy_from_slice(&self.hold.0.to_le_bytes());
        b[24] = self.kind.code();
        b[26..28].copy_from_slice(&self.lane.queue.to_le_bytes());
        b[28..32].copy_from_slice(&self.index.to_le_bytes());
        b[32..36].copy_from_slice(&self.number.to_le_bytes());
        b[40..48].copy_from_slice(&self.first_seq.to_le_bytes());
        b[48..56].copy_from_slice(&self.segment_bytes.to_le_bytes());
        for (at, len_at, name) in [(64, 56, &self.lane.from), (128, 57, &self.lane.to)] {
            let n = name.len().min(NAME_MAX);
            b[len_at] = n as u8;
            b[at..at + n].copy_from_slice(&name.as_bytes()[..n]);
        }
        b[192..200].copy_from_slice(&self.epoch.to_le_bytes());
        let crc = crc32c(&b[..FILE_HEADER - 4]);
        b[FILE_HEADER - 4..].copy_from_slice(&crc.to_le_bytes());
        b
    }

    /// Reads it back.
    pub fn decode(b: &[u8], magic: [u8; 8]) -> Result<FileHeader, BadHeader> {
        if b.len() < FILE_HEADER || b[0..8] != magic {
            return Err(BadHeader::NotOurs);
        }
        // First: a flipped bit is no other version.
        if crc32c(&b[..FILE_HEADER - 4]) != le32(b, FILE_HEADER - 4) {
            return Err(BadHeader::Checksum);
        }
        let version = le32(b, 8);
        if version != VERSION {
            return Err(BadHeader::Version(version));
        }
        let name = |at: usize, len: u8| {
            let n = usize::from(len).min(NAME_MAX);
            String::from_utf8(b[at..at + n].to_vec()).map_err(|_| BadHeader::Field("name"))
        };
        Ok(FileHeader {
            hold: HoldId(le64(b, 16)),
            kind: Kind::from_code(b[24]).ok_or(BadHeader::Field("kind"))?,
            lane: LaneKey {
                from: name(64, b[56])?,
                queue: u16::from_le_bytes([b[26], b[27]]),
                to: name(128, b[57])?,
            },
            index: le32(b, 28),
            number: le32(b, 32),
            first_seq: le64(b, 40),
            segment_bytes: le64(b, 48),
            epoch: le64(b, 192),
        })
    }
}

/// Why a file's header, or a batch's on the wire, can't be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadHeader {
    /// Another magic, or too short.
    #[error("not of Gangway's spool")]
    NotOurs,
    /// A version that this program does not read.
    #[error("format version {0}, this program reads {VERSION}")]
    Version(u32),
    /// Flipped bits.
    #[error("the header's checksum is wrong")]
    Checksum,
    /// A field with an impossible value.
    #[error("impossible {0} in the header")]
    Field(&'static str),
}
