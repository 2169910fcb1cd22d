//! What is in a spool's files after a crash, on a bad disk, or by somebody's hand.

use std::path::Path;

use gangway_shared::config::valid::{SpoolConfig, SpoolLimits, Sync};
use gangway_shared::id::{HoldId, LaneKey};
use gangway_switch::port::{Frame, VnetHdr};
use gangway_switch::spool::format::{
    Fields, FileHeader, Marker, Origin, QUEUE_MAGIC, SEGMENT_MAGIC, fit, marker, salt, shipped,
    step, view, wire_len, write_batch,
};
use gangway_switch::spool::recover::{End, Scanner, epoch_of, resync};
use gangway_switch::spool::{Kind, Recovered, Spool, Word, seal_word};

use crate::input::Input;

pub const HOLD: HoldId = HoldId(7);
/// Of the first segment; each has one more than the one before.
pub const EPOCH: u64 = 9;
const SEGMENT: usize = 128 << 10;

pub fn lane() -> LaneKey {
    LaneKey {
        from: "a".into(),
        queue: 0,
        to: "b".into(),
    }
}

/// A directory in memory, if there is one.
pub fn folder() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    let made = match memory.is_dir() {
        true => tempfile::tempdir_in(memory),
        false => tempfile::tempdir(),
    };
    made.expect("a folder")
}

pub fn config(dir: &Path) -> SpoolConfig {
    SpoolConfig {
        dir: dir.to_owned(),
        segment_bytes: SEGMENT as u64,
        quota_bytes: 64 * SEGMENT as u64,
        sync: Sync::None,
        limits: SpoolLimits::default(),
    }
}

/// A batch or a marker, mostly the next one and intact; or anything.
pub fn item(input: &mut Input<'_>, seq: &mut u64, epoch: u64, salt: u32) -> Vec<u8> {
    let op = input.u8();
    let number = match op >> 4 & 7 {
        0..4 => *seq,
        4 => seq.wrapping_add(u64::from(input.u8())),
        5 => seq.wrapping_sub(u64::from(input.u8())),
        6 => u64::MAX - u64::from(input.u8() & 1),
        _ => input.u64(),
    };
    let mut bytes = match op & 7 {
        0..4 => {
            let fields = Fields {
                first_seq: number,
                time_ns: 5,
                origin: Origin::NONE,
            };
            let count = u64::from(input.u8() & 7);
            let vnet = VnetHdr(if op & 1 == 1 { input.vnet() } else { [0; 10] });
            let bytes: Vec<Vec<u8>> = (0..count)
                .map(|_| {
                    let mut frame = vec![0; usize::from(input.u16() & 0x7ff)];
                    let head = input.take(frame.len().min(4));
                    frame[..head.len()].copy_from_slice(head);
                    frame
                })
                .collect();
            let frames: Vec<Frame<'_>> = bytes.iter().map(|b| Frame::from_slice(vnet, b)).collect();
            let (n, len) = fit(&frames, usize::MAX);
            assert_eq!(n, frames.len());
            let mut out = vec![0; len];
            if n > 0 {
                write_batch(&mut out, epoch, &fields, &frames, salt);
            }
            *seq = number.wrapping_add(count);
            out
        }
        4 => marker(epoch, Marker::Next(epoch.wrapping_add(1)), number, salt).to_vec(),
        5 => marker(epoch, Marker::Seal, number, salt).to_vec(),
        6 => {
            let n = input.u8();
            input.take(usize::from(n)).to_vec()
        }
        _ => vec![0; 8 * usize::from(input.u8())],
    };
    if op & 128 != 0 {
        let at = usize::from(input.u16());
        let bit = 1 << (input.u8() & 7);
        if let Some(b) = bytes.get_mut(at) {
            *b ^= bit;
        }
    }
    bytes
}

fn header(kind: Kind, number: u32) -> FileHeader {
    FileHeader {
        hold: HOLD,
        kind,
        lane: lane(),
        index: 0,
        number,
        first_seq: 1,
        segment_bytes: SEGMENT as u64,
        epoch: EPOCH + u64::from(number),
    }
}

fn segments(input: &mut Input<'_>, seq: &mut u64) -> Vec<Vec<u8>> {
    let salt = salt(HOLD, &lane());
    let count = u32::from(input.u8() % 3) + 1;
    let each = input.0.len() / count as usize;
    let one = |number| {
        let mut bytes = header(Kind::Source, number).encode(SEGMENT_MAGIC).to_vec();
        let mut own = Input(input.take(each));
        while !own.is_empty() {
            bytes.extend(item(&mut own, seq, EPOCH + u64::from(number), salt));
        }
        bytes.truncate(SEGMENT);
        bytes
    };
    (0..count).map(one).collect()
}

/// Pure: bytes in, findings out.
pub fn scan(data: &[u8]) {
    let salt = salt(HOLD, &lane());
    for magic in [SEGMENT_MAGIC, QUEUE_MAGIC] {
        let _ = FileHeader::decode(data, magic);
    }
    let _ = (wire_len(data), view(data), shipped(data, salt));
    let _ = resync(data, EPOCH, salt, 1);
    if let Some(epoch) = epoch_of(data, |_| true, None, salt) {
        let _ = step(data, epoch, salt);
    }

    let mut input = Input(data);
    let committed = match input.u8() {
        255 => input.u64(),
        n => u64::from(n),
    };
    let mut scan = Scanner::new(salt);
    let mut records = 0;
    for (bytes, epoch) in segments(&mut input, &mut 1).iter().zip(EPOCH..) {
        let found = scan.segment(bytes, epoch);
        assert!(found.records_end <= found.used && found.used <= bytes.len());
        assert!(found.torn <= bytes.len() - found.used);
        assert_eq!(found.records_end == found.used, found.end == End::Open);
        records += found.records;
    }
    scan.finish(committed);
    assert_eq!(scan.tally().frames, records);
    let mut last = 0;
    let mut missing = 0u64;
    for (a, b) in scan.damaged() {
        assert!(last < *a && a <= b && *b < scan.next_seq());
        missing += b - a + 1;
        last = *b;
    }
    assert_eq!(missing + records + 1, scan.next_seq(), "each number once");
}

/// Where the two copies of the words are (docs/formats/spool.md, "Metadata").
const COPIES: [usize; 2] = [256, 1024];

/// Words as a switch writes them, mostly of numbers that can be; the copies may differ, as behind a death between two stores.
fn put_words(meta: &mut [u8], input: &mut Input<'_>) {
    let salt = salt(HOLD, &lane());
    let differ = input.u8();
    for word in Word::ALL {
        let value = match input.u8() {
            255 => input.u64(),
            n => u64::from(n),
        };
        for (n, copy) in COPIES.into_iter().enumerate() {
            let older = u64::from(n == 1 && differ & 1 << word as u8 != 0);
            let stored = seal_word(word, value.saturating_sub(older), salt);
            let at = copy + 8 * word as usize;
            meta[at..at + 8].copy_from_slice(&stored.to_le_bytes());
        }
    }
}

/// A directory as an earlier run may have left it.
pub fn open(data: &[u8]) {
    opened(data, |_| {});
}

fn opened(data: &[u8], mut look: impl FnMut(&Recovered)) {
    let mut input = Input(data);
    let dir = folder();
    let how = input.u8();
    let queue = dir.path().join(HOLD.to_string()).join("s-0000");
    std::fs::create_dir_all(&queue).expect("a folder");
    let mut meta = header(Kind::Source, 0).encode(QUEUE_MAGIC).to_vec();
    meta.resize(4096, 0);
    if how & 64 != 0 {
        put_words(&mut meta, &mut input);
    }
    // Behind the words: what is well-formed is damaged, too.
    for _ in 0..how & 3 {
        let at = usize::from(input.u16()) % meta.len();
        meta[at] = input.u8();
    }
    if how & 4 != 0 {
        meta.truncate(usize::from(input.u16()));
    }
    if how & 8 == 0 {
        std::fs::write(queue.join("queue.meta"), &meta).expect("a file");
    }
    for (n, mut bytes) in segments(&mut input, &mut 1).into_iter().enumerate() {
        if how & 16 == 0 {
            bytes.resize(SEGMENT, 0);
        } else if how & 32 == 0 {
            bytes.resize(bytes.len().max(4096), 0);
        }
        std::fs::write(queue.join(format!("{n:06}.seg")), bytes).expect("a file");
    }
    let Ok((spool, found)) = Spool::open(&config(dir.path())) else {
        return;
    };
    let lost = lost_words(&found);
    for mut r in found {
        look(&r);
        let damaged = std::mem::take(&mut r.damaged);
        let last = r.queue.last_seq();
        if let Some(writer) = &mut r.writer {
            let _ = writer.append(
                1,
                &Frame::from_slice(VnetHdr::default(), &[9; 60]),
                Origin::NONE,
            );
            writer.seal();
        }
        let mut reader = r.queue.reader();
        let (mut good, mut bad) = (0u64, Vec::new());
        loop {
            match reader.peek() {
                Ok(None) => break,
                Ok(Some(_)) => good += 1,
                Err(d) => bad.push((d.first_seq, d.last_seq)),
            }
            reader.advance();
        }
        assert!(good <= last.saturating_add(1));
        assert!(
            damaged.is_empty() == bad.is_empty(),
            "{damaged:?} found, {bad:?} read; {last} was the last"
        );
    }
    drop(spool);
    // A start that dies at once must not have hidden what it found.
    let (_spool, found) = Spool::open(&config(dir.path())).expect("what was opened once");
    assert_eq!(lost_words(&found), lost);
}

fn lost_words(found: &[Recovered]) -> Vec<Word> {
    let all = found.iter().flat_map(|r| &r.bad_words);
    all.filter(|b| b.lost).map(|b| b.word).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The corpus has spools whose words are whole, and some with damage behind them.
    #[test]
    fn not_every_spool_has_lost_its_words() {
        let (mut whole, mut damaged, mut lost) = (0, 0, 0);
        for (_, data) in crate::corpus::read("spool_open").expect("the corpus") {
            opened(&data, |r| match r.bad_words.iter().any(|b| b.lost) {
                true => lost += 1,
                false if r.damaged.is_empty() => whole += 1,
                false => damaged += 1,
            });
        }
        assert!(
            whole > 0 && damaged > 0 && lost > 0,
            "{whole} {damaged} {lost}"
        );
    }
}
