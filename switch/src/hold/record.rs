//! The file that makes a hold outlive its switch: what it is, written once, and where it stands, written in place each
//! time it moves. Bytes: docs/formats/hold.md.
//!
//! Invariant: a move needs no room on the disk: the file has its size from the beginning.
//! Invariant: a state that was answered is there after `kill -9` at any instruction, and after a loss of power unless
//! `spool.sync` is `none`: the two slots are written in turn, and the older one is right while the newer is torn.
//! Invariant: no bytes of the file panic; what is not intact is an error that names the file.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use gangway_shared::api::HoldState;
use gangway_shared::codec;
use gangway_shared::record::HoldRecord;

use crate::spool::crc32c;

/// Its name, beside the queues of the hold.
pub const FILE: &str = "hold.rec";
const MAGIC: &[u8; 8] = b"GWHOLDR\n";
const VERSION: u32 = 1;
const HEADER: usize = 40;
/// Each in a sector of its own.
const SLOTS: [usize; 2] = [512, 1024];
const SLOT: usize = 64;
/// Where the part that does not change begins.
const FIXED: usize = 1536;
const FIXED_MAX: usize = 1 << 20;

/// The codes in a slot. Only ever add to them.
const STATES: [(u8, HoldState); 13] = [
    (1, HoldState::Open),
    (2, HoldState::FrozenInside),
    (3, HoldState::Frozen),
    (4, HoldState::Sealed),
    (5, HoldState::Departing),
    (6, HoldState::Departed),
    (7, HoldState::Prepared),
    (8, HoldState::Restored),
    (9, HoldState::Draining),
    (10, HoldState::Live),
    (11, HoldState::Aborting),
    (12, HoldState::Aborted),
    (13, HoldState::Released),
];

/// Where a hold stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stand {
    /// Its state.
    pub state: HoldState,
    /// Target: the network was told where the VMs are.
    pub announced: bool,
    /// Target, from `Restored` on: lanes that the source has named.
    pub named: u32,
    /// Source, from `Departing` on: how long it waits for the network.
    pub grace_ms: u32,
    /// As in [`gangway_shared::api::HoldInfo`].
    pub frozen_ns: u64,
    /// Likewise.
    pub thawed_ns: u64,
    /// Likewise.
    pub drained_ns: u64,
    /// Frames that could not be held, as far as they were counted.
    pub lost: u64,
}

impl Stand {
    /// Nothing has happened yet.
    pub fn new(state: HoldState) -> Stand {
        Stand {
            state,
            announced: false,
            named: 0,
            grace_ms: 0,
            frozen_ns: 0,
            thawed_ns: 0,
            drained_ns: 0,
            lost: 0,
        }
    }

    fn encode(&self, number: u64) -> [u8; SLOT] {
        let mut b = [0; SLOT];
        b[0..8].copy_from_slice(&number.to_le_bytes());
        let code = STATES.iter().find(|(_, s)| *s == self.state);
        b[8] = code.map_or(0, |(c, _)| *c);
        b[9] = u8::from(self.announced);
        b[12..16].copy_from_slice(&self.named.to_le_bytes());
        b[16..20].copy_from_slice(&self.grace_ms.to_le_bytes());
        b[24..32].copy_from_slice(&self.frozen_ns.to_le_bytes());
        b[32..40].copy_from_slice(&self.thawed_ns.to_le_bytes());
        b[40..48].copy_from_slice(&self.drained_ns.to_le_bytes());
        b[48..56].copy_from_slice(&self.lost.to_le_bytes());
        let sum = crc32c(&b[..SLOT - 4]);
        b[SLOT - 4..].copy_from_slice(&sum.to_le_bytes());
        b
    }

    /// With its number; none if the slot is not intact or was never written.
    fn decode(b: &[u8]) -> Option<(u64, Stand)> {
        let b: &[u8; SLOT] = b.try_into().ok()?;
        if crc32c(&b[..SLOT - 4]) != le32(b, SLOT - 4) {
            return None;
        }
        let (_, state) = STATES.iter().find(|(c, _)| *c == b[8])?;
        let number = le64(b, 0);
        let stand = Stand {
            state: *state,
            announced: b[9] & 1 != 0,
            named: le32(b, 12),
            grace_ms: le32(b, 16),
            frozen_ns: le64(b, 24),
            thawed_ns: le64(b, 32),
            drained_ns: le64(b, 40),
            lost: le64(b, 48),
        };
        Some((number, stand))
    }
}

fn le32(b: &[u8], at: usize) -> u32 {
    let mut w = [0; 4];
    w.iter_mut().zip(&b[at..]).for_each(|(w, b)| *w = *b);
    u32::from_le_bytes(w)
}

fn le64(b: &[u8], at: usize) -> u64 {
    u64::from(le32(b, at)) | u64::from(le32(b, at + 4)) << 32
}

/// Why a record can't be used.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The file system failed.
    #[error("{}: {source}", .path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// How.
        source: io::Error,
    },
    /// It is not what was written.
    #[error("{}: {what}", .path.display())]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
}

/// The whole file of a hold that was just opened.
pub fn encode(record: &HoldRecord, stand: &Stand) -> Result<Vec<u8>, codec::CodecError> {
    let fixed = codec::encode(record)?;
    let mut b = vec![0; FIXED];
    b[0..8].copy_from_slice(MAGIC);
    b[8..12].copy_from_slice(&VERSION.to_le_bytes());
    b[12..16].copy_from_slice(&(HEADER as u32).to_le_bytes());
    b[16..24].copy_from_slice(&record.hold.0.to_le_bytes());
    b[24..28].copy_from_slice(&(fixed.len() as u32).to_le_bytes());
    b[28..32].copy_from_slice(&crc32c(&fixed).to_le_bytes());
    let sum = crc32c(&b[..HEADER - 4]);
    b[HEADER - 4..HEADER].copy_from_slice(&sum.to_le_bytes());
    let at = slot_of(1);
    b[at..at + SLOT].copy_from_slice(&stand.encode(1));
    b.extend_from_slice(&fixed);
    Ok(b)
}

/// What a file says: the record, where it stands, and the number of that; `Err`: what is wrong with it.
pub fn decode(b: &[u8]) -> Result<(HoldRecord, Stand, u64), String> {
    let Some(header) = b.get(..FIXED) else {
        return Err(format!("{} bytes are no record of a hold", b.len()));
    };
    if header[0..8] != *MAGIC {
        return Err("not a record of a hold".into());
    }
    let version = le32(header, 8);
    if version != VERSION {
        return Err(format!(
            "format version {version}, this program reads {VERSION}"
        ));
    }
    if crc32c(&header[..HEADER - 4]) != le32(header, HEADER - 4) {
        return Err("the header's checksum is wrong".into());
    }
    let len = le32(header, 24) as usize;
    let fixed = b.get(FIXED..).and_then(|f| f.get(..len));
    let fixed = fixed.filter(|f| f.len() <= FIXED_MAX && crc32c(f) == le32(header, 28));
    let Some(fixed) = fixed else {
        return Err("the record's checksum is wrong".into());
    };
    let record: HoldRecord = codec::decode(fixed).map_err(|e| e.to_string())?;
    if record.hold.0 != le64(header, 16) {
        return Err("it names two holds".into());
    }
    let slots = SLOTS.map(|at| {
        let found = header.get(at..at + SLOT).and_then(Stand::decode);
        // The next one must not go where this one is.
        found.filter(|(number, _)| slot_of(*number) == at)
    });
    let newest = match slots {
        // Behind the last number comes 0.
        [Some(a), Some(b)] if a.0 == b.0.wrapping_add(1) => Some(a),
        [Some(a), Some(b)] if b.0 == a.0.wrapping_add(1) => Some(b),
        slots => slots.into_iter().flatten().max_by_key(|(n, _)| *n),
    };
    match newest {
        Some((number, stand)) => Ok((record, stand, number)),
        None => Err("neither of its two states is intact".into()),
    }
}

fn slot_of(number: u64) -> usize {
    SLOTS[(number % 2) as usize]
}

/// The open file.
#[derive(Debug)]
pub struct RecordFile {
    file: File,
    path: PathBuf,
    durable: bool,
    number: u64,
}

impl RecordFile {
    /// Writes it into the hold's directory, complete or not at all; with `durable`, onto the disk.
    pub fn create(
        dir: &Path,
        record: &HoldRecord,
        stand: &Stand,
        durable: bool,
    ) -> Result<RecordFile, RecordError> {
        let path = dir.join(FILE);
        let new = dir.join("hold.rec.new");
        let io = |source| RecordError::Io {
            path: path.clone(),
            source,
        };
        let bytes = encode(record, stand).map_err(|e| RecordError::Damaged {
            path: path.clone(),
            what: e.to_string(),
        })?;
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&new)
            .map_err(io)?;
        file.write_all(&bytes).map_err(io)?;
        if durable {
            file.sync_all().map_err(io)?;
        }
        std::fs::rename(&new, &path).map_err(io)?;
        if durable {
            File::open(dir).and_then(|d| d.sync_all()).map_err(io)?;
        }
        Ok(RecordFile {
            file,
            path,
            durable,
            number: 1,
        })
    }

    /// What is in a hold's directory; none if there is no record.
    pub fn open(
        dir: &Path,
        durable: bool,
    ) -> Result<Option<(HoldRecord, Stand, RecordFile)>, RecordError> {
        let path = dir.join(FILE);
        let io = |source| RecordError::Io {
            path: path.clone(),
            source,
        };
        let bytes = match std::fs::read(&path) {
            Ok(b) => b,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(io(e)),
        };
        let (record, stand, number) = decode(&bytes).map_err(|what| RecordError::Damaged {
            path: path.clone(),
            what,
        })?;
        let file = OpenOptions::new().write(true).open(&path).map_err(io)?;
        let file = RecordFile {
            file,
            path,
            durable,
            number,
        };
        Ok(Some((record, stand, file)))
    }

    /// From now on it can't be written to, or again.
    #[cfg(test)]
    pub fn fail(&mut self, fails: bool) {
        let file = OpenOptions::new().read(true).write(!fails).open(&self.path);
        self.file = file.expect("the record");
    }

    /// Where it stands from now on.
    pub fn put(&mut self, stand: &Stand) -> Result<(), RecordError> {
        let number = self.number.wrapping_add(1);
        let done = self
            .file
            .write_all_at(&stand.encode(number), slot_of(number) as u64)
            .and_then(|()| match self.durable {
                true => self.file.sync_data(),
                false => Ok(()),
            });
        done.map_err(|source| RecordError::Io {
            path: self.path.clone(),
            source,
        })?;
        self.number = number;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gangway_shared::api::Role;
    use gangway_shared::id::{HoldId, MacAddr};
    use gangway_shared::record::{HeldPort, HeldQueue, HeldSeats};

    fn record() -> HoldRecord {
        HoldRecord {
            hold: HoldId(0x0123_4567_89ab_cdef),
            role: Role::Source,
            vms: vec!["producer".into(), "consumer".into()],
            peer: "beta".into(),
            address: "192.0.2.7:7420".into(),
            ticket: [7; 32],
            ports: vec![HeldPort {
                name: "p0".into(),
                mac: Some(MacAddr([0x52, 0x54, 0, 0, 0, 1])),
            }],
            seats: vec![HeldSeats {
                port: "p0".into(),
                workers: vec![0, 3],
                queues: vec![HeldQueue {
                    queue: 1,
                    worker: 3,
                }],
            }],
            queues: 9,
        }
    }

    fn stand(state: HoldState) -> Stand {
        Stand {
            state,
            announced: true,
            named: 12,
            grace_ms: 2000,
            frozen_ns: 1_700_000_000_000_000_001,
            thawed_ns: 2,
            drained_ns: 3,
            lost: 4,
        }
    }

    fn hex(b: &[u8]) -> String {
        let line = |l: &[u8]| l.iter().map(|b| format!("{b:02x}")).collect::<String>();
        let lines: Vec<_> = b.chunks(32).map(line).collect();
        lines.join("\n") + "\n"
    }

    /// `UPDATE=1 cargo test` writes it, if there is a reason.
    #[test]
    fn the_bytes_are_those_of_version_1() {
        let bytes = encode(&record(), &stand(HoldState::Sealed)).unwrap();
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/src/hold/hold-v1.hex");
        if std::env::var_os("UPDATE").is_some() {
            std::fs::write(file, hex(&bytes)).unwrap();
        }
        assert_eq!(hex(&bytes), std::fs::read_to_string(file).unwrap());
        let (r, s, n) = decode(&bytes).unwrap();
        assert_eq!((r, s, n), (record(), stand(HoldState::Sealed), 1));
    }

    #[test]
    fn every_state_comes_back_and_a_torn_one_leaves_the_one_before() {
        let dir = tempfile::tempdir().unwrap();
        let first = Stand::new(HoldState::Open);
        let mut f = RecordFile::create(dir.path(), &record(), &first, true).unwrap();
        let path = dir.path().join(FILE);
        let len = std::fs::metadata(&path).unwrap().len();
        let mut before = first;
        for (n, (_, state)) in STATES.iter().enumerate() {
            f.put(&stand(*state)).unwrap();
            let (r, s, mut again) = RecordFile::open(dir.path(), true).unwrap().unwrap();
            assert_eq!((r, s), (record(), stand(*state)));
            let whole = std::fs::read(&path).unwrap();
            assert_eq!(whole.len() as u64, len, "it never grows");
            // Half of it on the disk.
            let mut torn = whole.clone();
            let at = slot_of(again.number);
            torn[at + 20..at + 60].fill(0xaa);
            assert_eq!(decode(&torn).unwrap().1, before, "{n}");
            // The next life goes on with the other slot.
            if n % 2 == 0 {
                again.put(&stand(*state)).unwrap();
                f = again;
            }
            before = stand(*state);
        }
    }

    #[test]
    fn a_damaged_file_is_an_error_with_its_name_and_never_a_panic() {
        let dir = tempfile::tempdir().unwrap();
        assert!(RecordFile::open(dir.path(), true).unwrap().is_none());
        let bytes = encode(&record(), &stand(HoldState::Frozen)).unwrap();
        for n in 0..bytes.len() {
            assert!(decode(&bytes[..n]).is_err(), "cut at {n}");
            let mut b = bytes.clone();
            b[n] ^= 0x10;
            // What nobody reads (the other slot, gaps) may differ.
            if let Ok((r, s, _)) = decode(&b) {
                assert_eq!((r, s), (record(), stand(HoldState::Frozen)), "{n}");
            }
        }
        let mut newer = bytes.clone();
        newer[8] = 2;
        assert!(decode(&newer).unwrap_err().contains("version 2"));
        std::fs::write(dir.path().join(FILE), &bytes[..700]).unwrap();
        let e = RecordFile::open(dir.path(), true).unwrap_err().to_string();
        assert!(e.contains(FILE), "{e}");
    }

    #[test]
    fn behind_the_last_number_comes_the_first() {
        let dir = tempfile::tempdir().unwrap();
        let state = |n: u32| Stand {
            named: n,
            ..Stand::new(HoldState::Open)
        };
        let mut file = RecordFile::create(dir.path(), &record(), &state(0), false).unwrap();
        file.number = u64::MAX - 2;
        for n in 1..6 {
            file.put(&state(n)).unwrap();
            let (_, found, again) = RecordFile::open(dir.path(), false).unwrap().unwrap();
            assert_eq!(found, state(n));
            file = again;
        }
    }
}
