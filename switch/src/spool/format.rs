//! The bytes of format v1 (docs/formats/spool.md), written and read.
//!
//! Invariant: pure; no file, no clock, no allocation except for names.
//! Invariant: foreign bytes lead to an error or to [`Step::Bad`], never to a panic.

use gangway_shared::id::{HoldId, LaneKey};

use super::Kind;
use crate::port::{FRAME_MAX, VnetHdr};

/// Version of the format, in every file's header.
pub const VERSION: u32 = 1;
/// Bytes of the header that a segment (and a queue's metadata file) starts with.
pub const FILE_HEADER: usize = 256;
/// Bytes of a record before its frame; also the whole of a marker.
pub const RECORD_HEADER: usize = 40;
/// Records start at multiples of this.
pub const ALIGN: usize = 8;
/// The longest record.
pub const RECORD_MAX: usize = record_len(FRAME_MAX as u32);
/// The highest number of a record: so far from a counter's end that nothing that counts on from it overflows.
pub const SEQ_MAX: u64 = u64::MAX >> 1;
/// The longest port name that fits.
pub const NAME_MAX: usize = 64;

/// Starts a segment file.
pub const SEGMENT_MAGIC: [u8; 8] = *b"GWSPSEG\n";
/// Starts a queue's metadata file.
pub const QUEUE_MAGIC: [u8; 8] = *b"GWSPQUE\n";
const RECORD: u32 = u32::from_le_bytes(*b"GWrc");
const NEXT: u32 = u32::from_le_bytes(*b"GWnx");
const SEAL: u32 = u32::from_le_bytes(*b"GWsl");

/// CRC-32C (Castagnoli, as in iSCSI).
pub fn crc32c(bytes: &[u8]) -> u32 {
    crc_fast::crc32_iscsi(bytes)
}

/// Bytes that a record with a frame of `frame_len` takes.
pub const fn record_len(frame_len: u32) -> usize {
    (RECORD_HEADER + frame_len as usize).next_multiple_of(ALIGN)
}

/// What every record's checksum is XORed with, so that what a recycled file held before is never taken for a record of
/// this lane. The same on both hosts.
pub fn salt(hold: HoldId, lane: &LaneKey) -> u32 {
    let mut b = Vec::with_capacity(8 + 2 + 2 + 2 * NAME_MAX);
    b.extend_from_slice(&hold.0.to_le_bytes());
    b.extend_from_slice(&lane.queue.to_le_bytes());
    b.extend_from_slice(lane.from.as_bytes());
    b.push(0);
    b.extend_from_slice(lane.to.as_bytes());
    crc32c(&b)
}

/// The fields of a record's header but its checksum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fields {
    /// Of the lane, from 1.
    pub seq: u64,
    /// When the frame was accepted: nanoseconds since the Unix epoch.
    pub time_ns: u64,
    /// Of the frame, in bytes.
    pub frame_len: u32,
    /// Travels with the frame.
    pub vnet: VnetHdr,
}

fn le32(b: &[u8], at: usize) -> u32 {
    let mut v = [0; 4];
    v.copy_from_slice(&b[at..at + 4]);
    u32::from_le_bytes(v)
}

fn le64(b: &[u8], at: usize) -> u64 {
    let mut v = [0; 8];
    v.copy_from_slice(&b[at..at + 8]);
    u64::from_le_bytes(v)
}

fn header(magic: u32, f: &Fields, salt: u32) -> [u8; RECORD_HEADER] {
    let mut h = [0; RECORD_HEADER];
    h[0..4].copy_from_slice(&magic.to_le_bytes());
    h[8..16].copy_from_slice(&f.seq.to_le_bytes());
    h[16..24].copy_from_slice(&f.time_ns.to_le_bytes());
    h[24..28].copy_from_slice(&f.frame_len.to_le_bytes());
    h[28..38].copy_from_slice(&f.vnet.0);
    h[38..40].copy_from_slice(&(salt as u16).to_le_bytes());
    h
}

/// Writes a record into `out` (of [`record_len`] bytes, its start aligned); `fill` copies the frame. Returns the
/// checksum.
pub fn write_record(out: &mut [u8], f: &Fields, salt: u32, fill: impl FnOnce(&mut [u8])) -> u32 {
    let end = RECORD_HEADER + f.frame_len as usize;
    out[..RECORD_HEADER].copy_from_slice(&header(RECORD, f, salt));
    fill(&mut out[RECORD_HEADER..end]);
    out[end..].fill(0);
    let crc = crc32c(&out[8..end]) ^ salt;
    out[4..8].copy_from_slice(&crc.to_le_bytes());
    crc
}

/// What stands between records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Marker {
    /// The lane goes on in the next segment.
    Next,
    /// No record will follow.
    Seal,
}

/// A marker behind record `seq` (0: behind none).
pub fn marker(kind: Marker, seq: u64, salt: u32) -> [u8; RECORD_HEADER] {
    let magic = match kind {
        Marker::Next => NEXT,
        Marker::Seal => SEAL,
    };
    let f = Fields {
        seq,
        time_ns: 0,
        frame_len: 0,
        vnet: VnetHdr::default(),
    };
    let mut h = header(magic, &f, salt);
    let crc = crc32c(&h[8..]) ^ salt;
    h[4..8].copy_from_slice(&crc.to_le_bytes());
    h
}

/// A record in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record<'a> {
    /// Its number on the lane, from 1.
    pub seq: u64,
    /// When it was accepted: nanoseconds since the Unix epoch.
    pub time_ns: u64,
    /// The frame's offload request.
    pub vnet: VnetHdr,
    /// The frame.
    pub frame: &'a [u8],
    /// The whole record, with header and padding, as it is shipped.
    pub raw: &'a [u8],
    /// The checksum as stored.
    pub crc: u32,
}

/// What is at a place in a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step<'a> {
    /// A record whose checksum is right.
    Record(Record<'a>),
    /// A marker behind the record with this number.
    Marker(Marker, u64),
    /// Nothing was written here (zeros), or the segment ends.
    Free,
    /// More bytes are needed to tell (for streams; a segment's end cuts a record).
    Short(usize),
    /// No record: a wrong magic, length, number or checksum.
    Bad,
}

/// Looks at the start of `bytes` (aligned).
pub fn step(bytes: &[u8], salt: u32) -> Step<'_> {
    if bytes.len() < 4 {
        return if bytes.iter().all(|b| *b == 0) {
            Step::Free
        } else {
            Step::Short(RECORD_HEADER)
        };
    }
    let magic = le32(bytes, 0);
    if magic == 0 {
        return if bytes[..bytes.len().min(RECORD_HEADER)]
            .iter()
            .all(|b| *b == 0)
        {
            Step::Free
        } else {
            Step::Bad
        };
    }
    if !matches!(magic, RECORD | NEXT | SEAL) {
        return Step::Bad;
    }
    if bytes.len() < RECORD_HEADER {
        return Step::Short(RECORD_HEADER);
    }
    let frame_len = le32(bytes, 24);
    let end = RECORD_HEADER + frame_len as usize;
    if bytes[38..40] != (salt as u16).to_le_bytes()
        || frame_len as usize > FRAME_MAX
        || (magic != RECORD && frame_len != 0)
    {
        return Step::Bad;
    }
    let total = record_len(frame_len);
    if bytes.len() < total {
        return Step::Short(total);
    }
    let crc = le32(bytes, 4);
    if crc32c(&bytes[8..end]) ^ salt != crc || bytes[end..total].iter().any(|b| *b != 0) {
        return Step::Bad;
    }
    let seq = le64(bytes, 8);
    if seq > SEQ_MAX {
        return Step::Bad;
    }
    match magic {
        NEXT => Step::Marker(Marker::Next, seq),
        SEAL => Step::Marker(Marker::Seal, seq),
        _ => view(&bytes[..total]).map_or(Step::Bad, Step::Record),
    }
}

/// How many bytes the record at the start of a stream has; none as long as its header is not complete.
pub fn stream_len(bytes: &[u8]) -> Result<Option<usize>, BadHeader> {
    if bytes.len() < RECORD_HEADER {
        return Ok(None);
    }
    let frame_len = le32(bytes, 24);
    if le32(bytes, 0) != RECORD {
        return Err(BadHeader::NotOurs);
    }
    if frame_len as usize > FRAME_MAX {
        return Err(BadHeader::Field("length"));
    }
    Ok(Some(record_len(frame_len)))
}

/// The record whose header starts `raw`, without checking its checksum (done before).
pub fn view(raw: &[u8]) -> Option<Record<'_>> {
    if raw.len() < RECORD_HEADER {
        return None;
    }
    let end = RECORD_HEADER + le32(raw, 24) as usize;
    let mut vnet = VnetHdr::default();
    vnet.0.copy_from_slice(&raw[28..38]);
    Some(Record {
        seq: le64(raw, 8),
        time_ns: le64(raw, 16),
        vnet,
        frame: raw.get(RECORD_HEADER..end)?,
        raw,
        crc: le32(raw, 4),
    })
}

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
        let crc = crc32c(&b[..FILE_HEADER - 4]);
        b[FILE_HEADER - 4..].copy_from_slice(&crc.to_le_bytes());
        b
    }

    /// Reads it back.
    pub fn decode(b: &[u8], magic: [u8; 8]) -> Result<FileHeader, BadHeader> {
        if b.len() < FILE_HEADER || b[0..8] != magic {
            return Err(BadHeader::NotOurs);
        }
        let version = le32(b, 8);
        if version != VERSION {
            return Err(BadHeader::Version(version));
        }
        if crc32c(&b[..FILE_HEADER - 4]) != le32(b, FILE_HEADER - 4) {
            return Err(BadHeader::Checksum);
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
        })
    }
}

/// Why a file's header can't be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadHeader {
    /// Another magic, or too short.
    #[error("not a file of Gangway's spool")]
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
