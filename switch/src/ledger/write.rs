//! Makes a ledger's file.

use std::fs::{self, File};
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crc_fast::{CrcAlgorithm, Digest};
use gangway_shared::codec::{self, CodecError};
use gangway_shared::config::valid::LedgerConfig;
use gangway_shared::ledger::{Account, Ledger, Stage};
use rustix::fs::{FlockOperation, flock};

use super::{
    Book, ENTRY, HEADER, LedgerError, MAGIC, Section, UNFINISHED, VERSION, file_name, retire,
};
use crate::spool::{Batch, Queue, crc32c};

/// Reads the queues again and writes everything down, synced; then deletes what is due. Blocks for as long as reading takes.
/// Nothing is written if nothing is to be kept.
pub fn write(
    cfg: &LedgerConfig,
    ledger: &Ledger,
    books: Vec<Book>,
) -> Result<Option<PathBuf>, LedgerError> {
    if cfg.keep_days == 0 {
        return Ok(None);
    }
    let path = cfg.dir.join(file_name(ledger.hold, ledger.role));
    let temporary = path.with_extension(UNFINISHED);
    let made = fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&cfg.dir)
        .map_err(LedgerError::io(&cfg.dir))
        .and_then(|()| fill(&temporary, cfg, ledger, books))
        // Locked until it has its name.
        .and_then(|_file| fs::rename(&temporary, &path).map_err(LedgerError::io(&path)))
        .and_then(|()| {
            let dir = File::open(&cfg.dir).and_then(|d| d.sync_all());
            dir.map_err(LedgerError::io(&cfg.dir))
        });
    if let Err(e) = made {
        // The error that matters is `e`.
        let _ = fs::remove_file(&temporary);
        return Err(e);
    }
    if let Err(e) = retire(cfg, None) {
        tracing::warn!("old ledgers stay: {e}");
    }
    Ok(Some(path))
}

fn fill(
    path: &Path,
    cfg: &LedgerConfig,
    ledger: &Ledger,
    books: Vec<Book>,
) -> Result<File, LedgerError> {
    let file = create(path).map_err(LedgerError::io(path))?;
    let mut out = Out {
        path,
        file: BufWriter::with_capacity(1 << 18, file),
        at: 0,
        sum: Digest::new(CrcAlgorithm::Crc32Iscsi),
    };
    out.put(&[0; HEADER])?;
    let mut room = cfg.frames_bytes;
    let mut summary = Vec::new();
    message(path, &mut summary, codec::encode(ledger))?;
    for mut book in books {
        let (mut index, mut frames) = (Section::default(), Section::default());
        if let Some((queue, stage)) = book.again.take() {
            index = out.section(|out| again(out, &mut book, &queue, stage))?;
            book.lane.indexed = true;
            if cfg.frames_bytes > 0 {
                frames = out.section(|out| {
                    book.lane.kept = keep(out, &queue, &mut room)?;
                    Ok(())
                })?;
            }
        }
        message(path, &mut summary, codec::encode(&book.lane))?;
        summary.extend_from_slice(&index.encode());
        summary.extend_from_slice(&frames.encode());
    }
    let at = out.at;
    out.put(&summary)?;
    let mut header = [0; HEADER];
    header[..8].copy_from_slice(MAGIC);
    header[8..12].copy_from_slice(&VERSION.to_le_bytes());
    header[12..16].copy_from_slice(&(HEADER as u32).to_le_bytes());
    header[16..24].copy_from_slice(&at.to_le_bytes());
    header[24..32].copy_from_slice(&(summary.len() as u64).to_le_bytes());
    header[32..36].copy_from_slice(&crc32c(&summary).to_le_bytes());
    let sum = crc32c(&header[..36]);
    header[36..].copy_from_slice(&sum.to_le_bytes());
    let io = LedgerError::io(path);
    let mut file = out.file.into_inner().map_err(|e| io(e.into_error()))?;
    file.seek(SeekFrom::Start(0))
        .and_then(|_| file.write_all(&header))
        .and_then(|()| file.sync_all())
        .map_err(LedgerError::io(path))?;
    Ok(file)
}

/// Empty, and locked: nobody takes it for what a write that was cut off has left.
pub(super) fn create(path: &Path) -> io::Result<File> {
    loop {
        let file = File::options()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(path)?;
        flock(&file, FlockOperation::LockExclusive)?;
        // It may have been deleted right before.
        if file.metadata()?.nlink() > 0 {
            return Ok(file);
        }
    }
}

/// Length and bytes of an encoded value.
fn message(
    path: &Path,
    to: &mut Vec<u8>,
    value: Result<Vec<u8>, CodecError>,
) -> Result<(), LedgerError> {
    let bytes = value.map_err(|e| LedgerError::Damaged {
        path: path.to_owned(),
        what: e.to_string(),
    })?;
    to.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
    to.extend_from_slice(&bytes);
    Ok(())
}

/// A file that is being written, and what of it belongs to the present section.
struct Out<'a> {
    path: &'a Path,
    file: BufWriter<File>,
    at: u64,
    sum: Digest,
}

impl Out<'_> {
    fn put(&mut self, bytes: &[u8]) -> Result<(), LedgerError> {
        self.sum.update(bytes);
        self.at += bytes.len() as u64;
        self.file
            .write_all(bytes)
            .map_err(LedgerError::io(self.path))
    }

    fn section(
        &mut self,
        fill: impl FnOnce(&mut Self) -> Result<(), LedgerError>,
    ) -> Result<Section, LedgerError> {
        let at = self.at;
        self.sum = Digest::new(CrcAlgorithm::Crc32Iscsi);
        fill(self)?;
        Ok(Section {
            at,
            bytes: self.at - at,
            crc: self.sum.finalize() as u32,
        })
    }
}

/// The queue's index, and what this reading says of it.
fn again(
    out: &mut Out<'_>,
    book: &mut Book,
    queue: &std::sync::Arc<Queue>,
    stage: Stage,
) -> Result<(), LedgerError> {
    let mut reader = queue.reader();
    let mut account = Account {
        digest: Some(0),
        roll: Some(0),
        ..Account::default()
    };
    let mut bytes = Vec::new();
    loop {
        match reader.peek_batch() {
            Ok(None) => break,
            Ok(Some(b)) => {
                bytes.clear();
                entry(&b, &mut account, &mut bytes);
                out.put(&bytes)?;
            }
            Err(d) => book.lose(stage, d.first_seq, d.last_seq, "spool_corrupt"),
        }
        reader.advance_batch();
    }
    book.note(stage, account);
    Ok(())
}

/// A batch in an index.
fn entry(b: &Batch<'_>, account: &mut Account, to: &mut Vec<u8>) {
    to.extend_from_slice(&b.first_seq.to_le_bytes());
    to.extend_from_slice(&b.time_ns.to_le_bytes());
    to.extend_from_slice(&b.crc.to_le_bytes());
    to.extend_from_slice(&b.count.to_le_bytes());
    for (slot, seq) in b.slots().zip(b.first_seq..) {
        let len = slot.len().saturating_sub(crate::spool::format::FRONT) as u32;
        to.extend_from_slice(&len.to_le_bytes());
        to.extend_from_slice(&crc32c(slot).to_le_bytes());
        account.frame(seq, len);
    }
    account.batch(b.first_seq, b.crc);
    debug_assert_eq!(to.len(), super::BATCH + b.count as usize * ENTRY);
}

/// The queue's batches, as far as there is room; true if that is all.
fn keep(
    out: &mut Out<'_>,
    queue: &std::sync::Arc<Queue>,
    room: &mut u64,
) -> Result<bool, LedgerError> {
    let mut reader = queue.reader();
    loop {
        match reader.peek_batch() {
            Ok(None) => return Ok(true),
            Ok(Some(b)) => {
                let Some(left) = room.checked_sub(b.wire.len() as u64) else {
                    return Ok(false);
                };
                *room = left;
                out.put(b.wire)?;
            }
            // Reported by the index.
            Err(_) => {}
        }
        reader.advance_batch();
    }
}
