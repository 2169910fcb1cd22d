//! Recovery's I/O: maps what an earlier run left, lets [`super::recover`] judge it, and makes queues of it.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use gangway_shared::id::HoldId;

use super::format::{
    BATCH_HEADER, BadHeader, FILE_HEADER, FileHeader, QUEUE_MAGIC, SEGMENT_MAGIC, salt,
};
use super::keeper::{Host, segment_number};
use super::map::{PAGE, Page, Segment};
use super::queue::{FLAGS_MAX, Parts, Queue, lock};
use super::reader::Damaged;
use super::recover::{End, Scanner, SegmentEnd, epoch_of};
use super::store::{META, queue_dir};
use super::words::{Said, VALUE_MAX, Word, Words};
use super::writer::Writer;
use super::{BadWord, Kind, Recovered, SpoolError};

/// Everything under the spool's directory.
pub(super) fn recover(host: &Arc<Host>) -> Result<Vec<Recovered>, SpoolError> {
    let mut out = Vec::new();
    for hold_dir in subdirs(&host.dir)? {
        let Some(hold) = name_of(&hold_dir).and_then(|n| n.parse::<HoldId>().ok()) else {
            continue;
        };
        for dir in subdirs(&hold_dir)? {
            if let Some(r) = queue(host, hold, &dir)? {
                let mut state = lock(&host.state);
                state.queues.entry(hold).or_default().push(r.queue.clone());
                drop(state);
                out.push(r);
            }
        }
        // Only if nothing is left in it.
        let _ = std::fs::remove_dir(&hold_dir);
    }
    Ok(out)
}

/// One queue's directory; none if the queue was never complete.
fn queue(host: &Arc<Host>, hold: HoldId, dir: &Path) -> Result<Option<Recovered>, SpoolError> {
    let meta = dir.join(META);
    let bad = |reason| SpoolError::Format {
        path: meta.clone(),
        reason,
    };
    let mut is_damaged = false;
    let header = match std::fs::read(&meta) {
        Ok(bytes) => match FileHeader::decode(&bytes, QUEUE_MAGIC) {
            Ok(h) => h,
            Err(e @ BadHeader::Version(_)) => return Err(bad(e)),
            Err(e) => match any_header(hold, dir) {
                Some(h) => {
                    tracing::error!("{}: {e}; a segment says whose queue it is", meta.display());
                    is_damaged = true;
                    h
                }
                None => {
                    tracing::error!(
                        "{}: {e}, and no segment says whose frames these are: it stays as it is",
                        meta.display()
                    );
                    return Ok(None);
                }
            },
        },
        Err(e) if e.kind() == ErrorKind::NotFound => match without_meta(dir)? {
            Some(h) => h,
            None => return Ok(None),
        },
        Err(e) => return Err(SpoolError::io(&meta)(e)),
    };
    if header.hold != hold || Some(header.kind) != kind_of(dir) {
        return Err(bad(BadHeader::Field("hold or kind")));
    }
    let salt = salt(hold, &header.lane);
    // What a segment says of itself is not the queue's.
    let header = FileHeader {
        number: 0,
        first_seq: 1,
        epoch: 0,
        ..header
    };
    let encoded = header.encode(QUEUE_MAGIC);
    let page = match Page::open(&meta, PAGE) {
        Ok(p) => {
            if is_damaged {
                Page::repair(&meta, &encoded).map_err(SpoolError::io(&meta))?;
            }
            p
        }
        // Gone, or not of its size: nothing of it is known. It says so from the first moment on.
        Err(e) if is_lost(&e) => {
            let lost = Word::ALL.iter().fold(0, |all, w| all | w.lost_flag());
            let made = Page::create(&meta, &Words::start(&encoded, lost, salt), PAGE);
            made.map_err(SpoolError::io(&meta))?
        }
        Err(e) => return Err(SpoolError::io(&meta)(e)),
    };
    let words = Words::new(page, salt);
    let mut flags = 0;
    let mut bad_words = Vec::new();
    let said_flags = words.get(Word::Flags, FLAGS_MAX);
    if let Said::Well(f) | Said::Once(f) = said_flags {
        flags = f;
    }
    let mut word = |word: Word, said: Said| {
        let lost = said == Said::Nothing || flags & word.lost_flag() != 0;
        if lost {
            flags |= word.lost_flag();
        }
        if lost || !matches!(said, Said::Well(_)) {
            let lane = header.lane.clone();
            bad_words.push(BadWord { lane, word, lost });
        }
        match said {
            Said::Well(v) | Said::Once(v) => v,
            // What loses nothing: no record is missed, none is delivered, and control knows better which lane it is.
            Said::Nothing => 0,
        }
    };
    let committed = word(Word::Committed, words.get(Word::Committed, VALUE_MAX));

    let mut scan = Scanner::new(salt);
    let mut found = Vec::new();
    let mut marker = None;
    for (number, path) in segment_files(dir)? {
        let said = marker
            .take()
            .and_then(|(of, epoch)| (of == number).then_some(epoch));
        let mut seg = Segment::open(&path).map_err(SpoolError::io(&path))?;
        let is_ours = |h: &FileHeader| {
            let place = (h.hold, h.kind, &h.lane, h.index, h.number);
            place == (hold, header.kind, &header.lane, header.index, number)
        };
        let bytes = seg.bytes_mut();
        let epoch = epoch_of(bytes, is_ours, said, salt);
        let end = epoch.map_or(UNUSED, |e| scan.segment(bytes, e));
        if let End::Next(next) = end.end {
            marker = Some((number + 1, next));
        }
        seg.begin(number, epoch.unwrap_or_else(|| host.epoch()));
        found.push((seg, end, path));
    }
    // Segments that were got ready and never used.
    let used = found
        .iter()
        .rposition(|(_, e, _)| e.records > 0 || e.end == End::Sealed)
        .map_or(1, |n| n + 1);
    for (seg, _, path) in found.drain(used.min(found.len())..) {
        drop(seg);
        std::fs::remove_file(&path).map_err(SpoolError::io(&path))?;
    }
    scan.finish(committed);

    let mut torn_bytes = 0;
    let mut segments = Vec::new();
    let last = found.len().saturating_sub(1);
    let mut sealed = false;
    for (n, (mut seg, end, path)) in found.into_iter().enumerate() {
        torn_bytes += end.torn as u64;
        let keep = match end.end {
            // Readers go through it to the next one.
            _ if n < last => end.used.max(FILE_HEADER),
            End::Next(_) => end.records_end,
            _ => end.used,
        };
        let bytes = seg.bytes_mut();
        if n == last {
            sealed = end.end == End::Sealed;
            // The next recovery does not meet it again.
            let rest = bytes.get_mut(keep..).unwrap_or_default();
            let n = rest.len().min(BATCH_HEADER);
            rest[..n].fill(0);
        }
        if let (Err(e), true) = (FileHeader::decode(bytes, SEGMENT_MAGIC), keep > 0) {
            tracing::warn!(
                "{}: {e}; its batches were checked one by one",
                path.display()
            );
        }
        seg.set_published(keep as u32);
        segments.push(Arc::new(seg));
    }
    for w in segments.windows(2) {
        w[0].set_next(w[1].clone());
    }
    {
        let mut state = lock(&host.state);
        state.held += segments.len() as u64;
        state.total += segments.len() as u64;
    }
    if segments.is_empty() {
        // It was promised when the queue was made, whatever the quota is now.
        segments.push(Arc::new(host.take(dir, 0, header.kind, true)?));
    }
    let last_seq = scan.next_seq() - 1;
    // More than there is was never delivered.
    let flushed = word(Word::Flushed, words.get(Word::Flushed, last_seq));
    word(Word::Flags, said_flags);
    let tail_segment = segments[segments.len() - 1].clone();
    let lane = header.lane.clone();
    let queue = Arc::new(Queue::new(Parts {
        hold,
        kind: header.kind,
        lane: header.lane,
        index: header.index,
        dir: dir.to_path_buf(),
        policy: host.policy,
        limits: host.limits,
        host: Arc::downgrade(host),
        scarce: host.scarce.clone(),
        frames: host.frames(hold, header.kind),
        words,
        segments,
    }));
    // What was shipped here has come in elsewhere.
    let had = match header.kind {
        Kind::Incoming => Vec::new(),
        Kind::Source | Kind::Local => scan.origins().to_vec(),
    };
    queue.set_recovered(last_seq, &scan.tally(), sealed, flushed, flags);
    let writer = if sealed {
        None
    } else {
        tail_segment
            .tail()
            .map(|tail| Writer::new(queue.clone(), tail, last_seq, scan.tally(), had))
    };
    let damaged = scan
        .damaged()
        .iter()
        .map(|(first_seq, last_seq)| Damaged {
            lane: lane.clone(),
            first_seq: *first_seq,
            last_seq: *last_seq,
        })
        .collect();
    Ok(Some(Recovered {
        queue,
        writer,
        damaged,
        bad_words,
        torn_bytes,
    }))
}

/// Why `queue.meta` can't be mapped: it is not there, or not of its size. What only can't be opened now is not made anew.
fn is_lost(e: &std::io::Error) -> bool {
    matches!(e.kind(), ErrorKind::NotFound | ErrorKind::InvalidData)
}

/// A segment that no writer has begun.
const UNUSED: SegmentEnd = SegmentEnd {
    end: End::Open,
    used: 0,
    records_end: 0,
    torn: 0,
    records: 0,
};

/// By their numbers; some may be missing.
fn segment_files(dir: &Path) -> Result<Vec<(u32, PathBuf)>, SpoolError> {
    let mut out = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(SpoolError::io(dir))? {
        let path = entry.map_err(SpoolError::io(dir))?.path();
        if let Some(number) = name_of(&path).and_then(segment_number) {
            out.push((number, path));
        }
    }
    out.sort();
    Ok(out)
}

/// Of a queue's directory without `queue.meta`: what its segments say of it, if there is a record in one of them. A
/// directory in which nothing was ever written, or whose removal was interrupted, is removed. What can't be read stays.
fn without_meta(dir: &Path) -> Result<Option<FileHeader>, SpoolError> {
    let files = segment_files(dir)?;
    let mut begun = false;
    for (_, path) in &files {
        let bytes = std::fs::read(path).map_err(SpoolError::io(path))?;
        match FileHeader::decode(&bytes, SEGMENT_MAGIC) {
            Ok(h) => {
                let salt = salt(h.hold, &h.lane);
                if Scanner::new(salt).segment(&bytes, h.epoch).records > 0 {
                    tracing::error!("{}: no {META}, but records: it is made anew", dir.display());
                    return Ok(Some(h));
                }
            }
            Err(reason @ BadHeader::Version(_)) => {
                let path = path.clone();
                return Err(SpoolError::Format { path, reason });
            }
            Err(_) => begun |= bytes.iter().take(FILE_HEADER).any(|b| *b != 0),
        }
    }
    match begun {
        true => tracing::error!(
            "{}: no {META}, and no segment that says whose frames these are: it stays as it is",
            dir.display()
        ),
        false => std::fs::remove_dir_all(dir).map_err(SpoolError::io(dir))?,
    }
    Ok(None)
}

/// What a segment says of the queue in this directory; another use may have left it there that no writer of this queue has begun.
fn any_header(hold: HoldId, dir: &Path) -> Option<FileHeader> {
    let files = segment_files(dir).ok()?;
    files.into_iter().find_map(|(number, path)| {
        let bytes = std::fs::read(path).ok()?;
        let header = FileHeader::decode(&bytes, SEGMENT_MAGIC).ok()?;
        let is_ours = queue_dir(Path::new(""), hold, header.kind, header.index).file_name()
            == dir.file_name();
        (header.hold == hold && is_ours && header.number == number).then_some(header)
    })
}

fn kind_of(dir: &Path) -> Option<Kind> {
    let letter = name_of(dir)?.chars().next()?;
    Kind::ALL.into_iter().find(|k| k.letter() == letter)
}

fn name_of(path: &Path) -> Option<&str> {
    path.file_name()?.to_str()
}

pub(super) fn subdirs(dir: &Path) -> Result<Vec<PathBuf>, SpoolError> {
    let mut out = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(SpoolError::io(dir))? {
        let path = entry.map_err(SpoolError::io(dir))?.path();
        if path.is_dir() {
            out.push(path);
        }
    }
    out.sort();
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metadata_that_cannot_be_opened_now_is_not_lost() {
        let dir = tempfile::tempdir().unwrap();
        let opened = |path: &Path| Page::open(path, PAGE).map(drop).unwrap_err();
        let path = dir.path().join(META);
        assert!(is_lost(&opened(&path)));
        std::fs::write(&path, [7; 300]).unwrap();
        assert!(is_lost(&opened(&path)));
        assert!(!is_lost(&opened(dir.path())), "another kind of file");
        for os in [
            libc::EMFILE,
            libc::EIO,
            libc::ENOSPC,
            libc::EACCES,
            libc::ENOMEM,
        ] {
            assert!(!is_lost(&std::io::Error::from_raw_os_error(os)), "{os}");
        }
    }
}
