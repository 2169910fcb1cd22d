use super::*;
use crate::spool::format::{FILE_HEADER, FileHeader, SEGMENT_MAGIC, batch_len, salt, slot_len};
use crate::spool::recover::{End, Scanner, epoch_of};
use crate::spool::words::seal;

fn segment(dir: &Path, n: usize) -> std::path::PathBuf {
    dir.join(HOLD.to_string())
        .join("s-0000")
        .join(format!("{n:06}.seg"))
}

/// Writes `n` committed records, each a batch, and returns where each ends in the first segment.
fn written(dir: &Path, n: u64, len: usize) -> Vec<usize> {
    let (spool, _) = open(dir);
    let (mut w, _q) = spool.create(HOLD, Kind::Source, &lane(0)).unwrap();
    let mut ends = Vec::new();
    let mut at = FILE_HEADER;
    for i in 0..n {
        let len = len + i as usize;
        put(&mut w, i, len);
        at += batch_len(1, slot_len(len as u32));
        ends.push(at);
    }
    w.commit();
    ends
}

fn epoch(segment: &[u8]) -> u64 {
    FileHeader::decode(segment, SEGMENT_MAGIC).unwrap().epoch
}

/// Pure: whatever byte the tail is cut at, the records before it are found and nothing else.
#[test]
fn a_torn_tail_is_cut_at_every_byte() {
    let dir = tmp();
    let ends = written(dir.path(), 12, 60);
    let whole = std::fs::read(segment(dir.path(), 0)).unwrap();
    let salt = salt(HOLD, &lane(0));
    for cut in FILE_HEADER..*ends.last().unwrap() {
        let mut b = whole.clone();
        b[cut..].fill(0);
        let mut s = Scanner::new(salt);
        let end = s.segment(&b, epoch(&whole));
        // Padding is zero anyway.
        let intact = ends
            .iter()
            .filter(|e| **e <= cut || whole[cut..**e].iter().all(|b| *b == 0))
            .count();
        assert_eq!(s.tally().frames, intact as u64, "cut at {cut}");
        assert_eq!(end.end, End::Open);
        assert_eq!(
            end.used,
            if intact == 0 {
                FILE_HEADER
            } else {
                ends[intact - 1]
            }
        );
        assert!(s.damaged().is_empty());
    }
}

/// With files, at a few places: the queue goes on where it was cut.
#[test]
fn a_queue_goes_on_behind_a_torn_tail() {
    for cut in [8, 17, 39, 40, 60, 99] {
        let dir = tmp();
        let ends = written(dir.path(), 12, 60);
        let last = ends[10];
        let path = segment(dir.path(), 0);
        let mut b = std::fs::read(&path).unwrap();
        b[last + cut..].fill(0);
        std::fs::write(&path, &b).unwrap();
        // As a process that died before its commit would have left it.
        patch_committed(dir.path(), 11);
        let (_spool, mut found) = open(dir.path());
        let f = found.pop().unwrap();
        assert_eq!(f.queue.tally().frames, 11, "cut {cut}");
        assert!(f.torn_bytes > 0);
        assert_eq!(f.damaged, []);
        let mut w = f.writer.unwrap();
        assert_eq!(w.next_seq(), 12);
        put(&mut w, 40, 1000);
        w.commit();
        let (seqs, bad) = all(&f.queue);
        assert_eq!(seqs, (1..=12).collect::<Vec<_>>());
        assert_eq!(bad, []);
    }
}

fn meta(dir: &Path) -> std::path::PathBuf {
    dir.join(HOLD.to_string()).join("s-0000").join("queue.meta")
}

/// Where the two copies of the words are.
const COPIES: [usize; 2] = [256, 1024];

fn patch(dir: &Path, word: Word, value: u64, copies: &[usize]) {
    let mut b = std::fs::read(meta(dir)).unwrap();
    let stored = seal(word, value, salt(HOLD, &lane(0)));
    for copy in copies {
        let at = copy + 8 * word as usize;
        b[at..at + 8].copy_from_slice(&stored.to_le_bytes());
    }
    std::fs::write(meta(dir), &b).unwrap();
}

fn patch_committed(dir: &Path, seq: u64) {
    patch(dir, Word::Committed, seq, &COPIES);
}

/// A queue of 12 records of which 5 are delivered, inside.
fn half_delivered(dir: &Path) -> Vec<u8> {
    written(dir, 12, 60);
    let (_spool, found) = open(dir);
    found[0].queue.set_flushed(5);
    found[0].queue.set_inside(true);
    std::fs::read(meta(dir)).unwrap()
}

/// Everything is there, and what comes next gets the next number.
fn nothing_is_missing(f: &mut Recovered, flushed: u64, what: &str) {
    assert_eq!(f.damaged, [], "{what}");
    assert_eq!(f.queue.flushed_seq(), flushed, "{what}");
    let mut r = f.queue.reader();
    assert_eq!(r.skip_to(f.queue.flushed_seq()), []);
    for n in flushed + 1..=12 {
        assert_eq!(r.peek().unwrap().unwrap().seq, n, "{what}");
        r.advance();
    }
    let w = f.writer.as_mut().expect(what);
    put(w, 12, 60);
    w.commit();
    assert_eq!(r.peek().unwrap().unwrap().seq, 13, "{what}");
}

/// Each bit of the words in turn: the other copy says what was there, and the damage is named.
#[test]
fn a_flipped_bit_of_a_word_costs_nothing() {
    let dir = tmp();
    let whole = half_delivered(dir.path());
    let path = segment(dir.path(), 0);
    let records = std::fs::read(&path).unwrap();
    for copy in COPIES {
        for bit in 0..3 * 64 {
            let mut b = whole.clone();
            b[copy + bit / 8] ^= 1 << (bit % 8);
            std::fs::write(meta(dir.path()), &b).unwrap();
            std::fs::write(&path, &records).unwrap();
            let (_spool, mut found) = open(dir.path());
            let what = format!("bit {bit} of the copy at {copy}");
            let bad = BadWord {
                lane: lane(0),
                word: Word::ALL[bit / 64],
                lost: false,
            };
            assert_eq!(found[0].bad_words, [bad], "{what}");
            assert!(found[0].queue.inside(), "{what}");
            nothing_is_missing(&mut found[0], 5, &what);
            // Both are whole again.
            found[0].queue.set_inside(true);
            drop(found);
            drop(_spool);
            let (_spool, found) = open(dir.path());
            assert_eq!(found[0].bad_words, [], "{what}");
        }
    }
}

/// The same bit of both copies: nothing is taken for delivered, no number is given twice, and what is lost is named.
#[test]
fn a_word_that_is_lost_costs_no_record() {
    let dir = tmp();
    let whole = half_delivered(dir.path());
    let path = segment(dir.path(), 0);
    let records = std::fs::read(&path).unwrap();
    for bit in 0..3 * 64 {
        let mut b = whole.clone();
        for copy in COPIES {
            b[copy + bit / 8] ^= 1 << (bit % 8);
        }
        std::fs::write(meta(dir.path()), &b).unwrap();
        std::fs::write(&path, &records).unwrap();
        let (_spool, mut found) = open(dir.path());
        let word = Word::ALL[bit / 64];
        let bad = &found[0].bad_words;
        assert_eq!(bad.len(), 1, "bit {bit}");
        assert!(bad[0].lost && bad[0].word == word, "bit {bit}: {}", bad[0]);
        assert!(bad[0].to_string().contains(&word.to_string()));
        let flushed = if word == Word::Flushed { 0 } else { 5 };
        nothing_is_missing(&mut found[0], flushed, &format!("bit {bit}"));
    }
}

/// A death right behind the start that found it, or any number of commits: the next one says it again.
#[test]
fn a_word_that_was_lost_is_named_at_each_start() {
    for word in Word::ALL {
        let dir = tmp();
        let mut b = half_delivered(dir.path());
        for copy in COPIES {
            b[copy + 8 * word as usize] ^= 1;
        }
        std::fs::write(meta(dir.path()), &b).unwrap();
        for start in 0..3 {
            let (_spool, mut found) = open(dir.path());
            let bad = &found[0].bad_words;
            assert_eq!(bad.len(), 1, "{word} at start {start}");
            assert!(bad[0].lost && bad[0].word == word, "{start}: {}", bad[0]);
            match start {
                0 => {}
                1 => {
                    let inside = word != Word::Flags;
                    assert_eq!(found[0].queue.inside(), inside, "{word}");
                    let w = found[0].writer.as_mut().unwrap();
                    put(w, 12, 60);
                    w.commit();
                    found[0].queue.set_flushed(13);
                    found[0].queue.set_inside(true);
                }
                _ => {
                    let q = &found[0].queue;
                    assert_eq!((q.flushed_seq(), q.inside()), (13, true), "{word}");
                }
            }
        }
    }
}

/// One damage that was read around must not wait for a second one.
#[test]
fn a_header_that_a_segment_has_replaced_is_whole_again() {
    let dir = tmp();
    let whole = half_delivered(dir.path());
    let mut b = whole.clone();
    b[20] ^= 4;
    std::fs::write(meta(dir.path()), &b).unwrap();
    let (spool, found) = open(dir.path());
    assert_eq!(found[0].bad_words, []);
    drop((spool, found));
    assert_eq!(std::fs::read(meta(dir.path())).unwrap(), whole);
}

/// A check that is right does not make it true.
#[test]
fn what_is_delivered_beyond_the_last_record_is_damage() {
    let dir = tmp();
    half_delivered(dir.path());
    patch(dir.path(), Word::Flushed, 13, &COPIES[..1]);
    {
        let (_spool, found) = open(dir.path());
        assert_eq!(found[0].queue.flushed_seq(), 5);
        assert!(!found[0].bad_words[0].lost);
    }
    patch(dir.path(), Word::Flushed, 13, &COPIES);
    let (_spool, mut found) = open(dir.path());
    assert!(found[0].bad_words[0].lost);
    nothing_is_missing(&mut found[0], 0, "both copies");
}

/// A death between the two stores of a word: the newer one counts, and nothing is damaged.
#[test]
fn of_two_copies_the_newer_one_counts() {
    for copy in COPIES {
        let dir = tmp();
        half_delivered(dir.path());
        patch(dir.path(), Word::Flushed, 4, &[copy]);
        patch(dir.path(), Word::Committed, 11, &[copy]);
        let (_spool, mut found) = open(dir.path());
        assert_eq!(found[0].bad_words, []);
        nothing_is_missing(&mut found[0], 5, "a stale copy");
    }
}

/// What says whose the records are goes, but the records are there: the queue is, too.
#[test]
fn records_without_their_metadata_are_kept() {
    for cut in [None, Some(0), Some(100), Some(300)] {
        let dir = tmp();
        let whole = half_delivered(dir.path());
        match cut {
            None => std::fs::remove_file(meta(dir.path())).unwrap(),
            Some(n) => std::fs::write(meta(dir.path()), &whole[..n]).unwrap(),
        }
        let (spool, mut found) = open(dir.path());
        let lost: Vec<Word> = found[0].bad_words.iter().map(|b| b.word).collect();
        assert_eq!(lost, Word::ALL, "{cut:?}");
        assert_eq!(found[0].queue.lane(), &lane(0));
        nothing_is_missing(&mut found[0], 0, "without metadata");
        assert_eq!(
            spool.strays(HOLD).unwrap(),
            Vec::<std::path::PathBuf>::new()
        );
        drop((spool, found));
        let (_spool, found) = open(dir.path());
        let lost = found[0].bad_words.iter().filter(|b| b.lost).count();
        assert_eq!(
            (found[0].queue.last_seq(), lost),
            (13, 3),
            "it is not forgotten"
        );
    }
}

/// Nothing says whose they are: they stay, and are named.
#[test]
fn segments_that_say_nothing_of_their_queue_are_kept() {
    let dir = tmp();
    half_delivered(dir.path());
    std::fs::remove_file(meta(dir.path())).unwrap();
    let path = segment(dir.path(), 0);
    let mut b = std::fs::read(&path).unwrap();
    b[100] ^= 1;
    std::fs::write(&path, &b).unwrap();
    let (spool, found) = open(dir.path());
    assert_eq!(found.len(), 0);
    assert_eq!(spool.strays(HOLD).unwrap(), [path.parent().unwrap()]);
    assert_eq!(std::fs::read(&path).unwrap(), b);
}

/// A death while a queue is made: nothing was ever there.
#[test]
fn a_queue_that_was_never_made_leaves_nothing() {
    for header in [false, true] {
        let dir = tmp();
        {
            let (spool, _) = open(dir.path());
            spool.create(HOLD, Kind::Source, &lane(0)).unwrap();
        }
        std::fs::remove_file(meta(dir.path())).unwrap();
        if !header {
            let path = segment(dir.path(), 0);
            std::fs::write(path, vec![0; 128 << 10]).unwrap();
        }
        let (_spool, found) = open(dir.path());
        assert_eq!(found.len(), 0);
        assert!(!dir.path().join(HOLD.to_string()).exists());
    }
}

/// Each byte of the middle records in turn: exactly the damaged record is reported, all others are delivered.
#[test]
fn flipped_bits_are_reported_and_never_delivered() {
    let dir = tmp();
    let ends = written(dir.path(), 8, 60);
    let whole = std::fs::read(segment(dir.path(), 0)).unwrap();
    let salt = salt(HOLD, &lane(0));
    for at in ends[2]..ends[4] {
        let mut b = whole.clone();
        b[at] ^= 1 << (at % 8);
        let mut s = Scanner::new(salt);
        s.segment(&b, epoch(&whole));
        let bad = if at < ends[3] { 4 } else { 5 };
        assert_eq!(s.damaged(), [(bad, bad)], "byte {at}");
        assert_eq!(s.tally().frames, 7);
        assert_eq!(s.next_seq(), 9);
    }
}

#[test]
fn a_reader_passes_damage_and_names_it() {
    let dir = tmp();
    let ends = written(dir.path(), 9, 60);
    let path = segment(dir.path(), 0);
    let mut b = std::fs::read(&path).unwrap();
    // The third, and the last one, which was committed.
    b[ends[1] + 50] ^= 4;
    b[ends[7] + 50] ^= 4;
    std::fs::write(&path, &b).unwrap();
    let (_spool, mut found) = open(dir.path());
    let f = found.pop().unwrap();
    let expected = [(3, 3), (9, 9)].map(|(first_seq, last_seq)| Damaged {
        lane: lane(0),
        first_seq,
        last_seq,
    });
    assert_eq!(f.damaged, expected);
    assert_eq!(f.queue.tally().frames, 7);
    let mut w = f.writer.unwrap();
    // No number is given twice.
    assert_eq!(w.next_seq(), 10);
    let (seqs, bad) = all(&f.queue);
    assert_eq!(seqs, [1, 2, 4, 5, 6, 7, 8]);
    assert_eq!(bad, expected);
    put(&mut w, 77, 100);
    w.commit();
    let (seqs, bad) = all(&f.queue);
    assert_eq!(seqs, [1, 2, 4, 5, 6, 7, 8, 10]);
    assert_eq!(bad, expected);
}

#[test]
fn a_long_queue_survives_a_restart_and_goes_on() {
    let dir = tmp();
    let n = {
        let (spool, found) = open(dir.path());
        assert!(found.is_empty());
        let (mut w, q) = spool.create(HOLD, Kind::Source, &lane(0)).unwrap();
        let (mut w2, q2) = spool.create(HOLD, Kind::Local, &lane(1)).unwrap();
        q2.set_inside(true);
        for n in 0..3000 {
            put(&mut w, n, 700);
        }
        w.commit();
        put(&mut w2, 0, 64);
        w2.seal();
        q.set_flushed(1234);
        assert!(q.segment_count() > 10);
        q.segment_count()
    };
    let (spool, found) = open(dir.path());
    assert_eq!(found.len(), 2);
    let mut found = found.into_iter();
    let sealed = found.next().unwrap();
    assert_eq!(
        (sealed.queue.kind(), sealed.queue.lane()),
        (Kind::Local, &lane(1))
    );
    assert!(sealed.queue.is_sealed() && sealed.writer.is_none() && sealed.queue.inside());
    let f = found.next().unwrap();
    assert_eq!(f.queue.tally().frames, 3000);
    assert_eq!(f.queue.flushed_seq(), 1234);
    let mut r = f.queue.reader();
    assert!(r.skip_to(f.queue.flushed_seq()).is_empty());
    assert_eq!(r.peek().unwrap().unwrap().seq, 1235);
    let mut w = f.writer.unwrap();
    for n in 3000..6000 {
        put(&mut w, n, 700);
    }
    w.seal();
    assert!(f.queue.segment_count() > n);
    assert_eq!(all(&f.queue).0, (1..=6000).collect::<Vec<_>>());
    assert!(spool.used_bytes() >= (f.queue.segment_count() as u64 + 1) * (128 << 10));
}

/// A marker is no record: without it all records are still there, in the next segment.
#[test]
fn a_flipped_bit_between_two_segments_costs_no_record() {
    (0..48).for_each(flipped_in_a_marker);
}

fn flipped_in_a_marker(flipped: usize) {
    let dir = tmp();
    {
        let (spool, _) = open(dir.path());
        let (mut w, _q) = spool.create(HOLD, Kind::Source, &lane(0)).unwrap();
        (0..400).for_each(|n| put(&mut w, n, 700));
        w.commit();
    }
    {
        let (_spool, found) = open(dir.path());
        assert_eq!(found[0].damaged, [], "before anything was flipped");
        assert_eq!(found[0].queue.tally().frames, 400);
    }
    let path = segment(dir.path(), 0);
    let mut b = std::fs::read(&path).unwrap();
    let is_marker = |line: &[u8]| line[12..] == *b"GWnx";
    let at = 16 * b.chunks_exact(16).position(is_marker).unwrap();
    b[at + flipped] ^= 4;
    std::fs::write(&path, &b).unwrap();
    let (_spool, found) = open(dir.path());
    assert_eq!(found[0].damaged, [], "byte {flipped} of the marker");
    assert_eq!(all(&found[0].queue), ((1..=400).collect(), vec![]));
}

/// Bits may flip in a segment's header, too: the marker before it says its epoch, and in the first one its batches.
#[test]
fn a_flipped_bit_in_a_segments_header_costs_no_record() {
    for (n, at) in [
        (0, 0),
        (0, 9),
        (0, 193),
        (1, 0),
        (1, 9),
        (1, 100),
        (1, 193),
        (1, 255),
    ] {
        let dir = tmp();
        {
            let (spool, _) = open(dir.path());
            let (mut w, _q) = spool.create(HOLD, Kind::Source, &lane(0)).unwrap();
            (0..400).for_each(|n| put(&mut w, n, 700));
            w.commit();
        }
        let path = segment(dir.path(), n);
        let mut b = std::fs::read(&path).unwrap();
        b[at] ^= 4;
        std::fs::write(&path, &b).unwrap();
        let (_spool, found) = open(dir.path());
        assert_eq!(found[0].damaged, [], "byte {at} of segment {n}");
        assert_eq!(all(&found[0].queue), ((1..=400).collect(), vec![]));
    }
}

/// A batch is damaged as a whole: its records are named, and nothing of them is delivered.
#[test]
fn a_flipped_bit_costs_its_batch_and_no_other() {
    let dir = tmp();
    {
        let (spool, _) = open(dir.path());
        let (mut w, _q) = spool.create(HOLD, Kind::Source, &lane(0)).unwrap();
        for n in [0, 10, 20] {
            let all: Vec<_> = (0..10).map(|_| bytes(n, 100)).collect();
            let frames: Vec<_> = all.iter().map(|b| Frame::from_slice(vnet(n), b)).collect();
            assert_eq!(w.append_run(n, &frames, Origin::NONE), 10);
        }
        w.commit();
    }
    let path = segment(dir.path(), 0);
    let whole = std::fs::read(&path).unwrap();
    let len = batch_len(10, 10 * slot_len(100));
    for at in [0, 8, 12, 16, 20, 23, 30, 47, 50, 90, 200, len - 1] {
        let mut b = whole.clone();
        b[FILE_HEADER + len + at] ^= 32;
        std::fs::write(&path, &b).unwrap();
        let (_spool, found) = open(dir.path());
        let expected = Damaged {
            lane: lane(0),
            first_seq: 11,
            last_seq: 20,
        };
        assert_eq!(
            found[0].damaged,
            std::slice::from_ref(&expected),
            "byte {at}"
        );
        let (seqs, bad) = all(&found[0].queue);
        assert_eq!(seqs, (1..=10).chain(21..=30).collect::<Vec<_>>());
        assert_eq!(bad, [expected]);
    }
}

#[test]
fn a_missing_segment_costs_what_was_in_it() {
    // 700 records are in five of them.
    for missing in 0..5 {
        let dir = tmp();
        {
            let (spool, _) = open(dir.path());
            let (mut w, _q) = spool.create(HOLD, Kind::Source, &lane(0)).unwrap();
            (0..700).for_each(|n| put(&mut w, n, 700));
            w.commit();
        }
        let first = |n| {
            let b = std::fs::read(segment(dir.path(), n)).unwrap();
            FileHeader::decode(&b, SEGMENT_MAGIC).unwrap().first_seq
        };
        let to = if missing < 4 {
            first(missing + 1) - 1
        } else {
            700
        };
        let from = first(missing);
        std::fs::remove_file(segment(dir.path(), missing)).unwrap();
        for _ in 0..2 {
            let (_spool, mut found) = open(dir.path());
            let mut f = found.pop().unwrap();
            let expected = Damaged {
                lane: lane(0),
                first_seq: from,
                last_seq: to,
            };
            assert_eq!(f.damaged, std::slice::from_ref(&expected));
            let last = f.queue.last_seq();
            let w = f.writer.as_mut().unwrap();
            // More than the segment at the end has room for: the next ones do not get a number that is taken.
            (last..last + 400).for_each(|n| put(w, n, 700));
            w.commit();
            let (seqs, bad) = all(&f.queue);
            assert_eq!(
                seqs,
                (1..from).chain(to + 1..=last + 400).collect::<Vec<_>>()
            );
            assert_eq!(bad, [expected]);
        }
    }
}

/// A segment that another hold has used must not bring its frames into the next hold's queue, not even into one of the
/// same name.
#[test]
fn what_a_recycled_segment_held_never_comes_back() {
    const LANES: u16 = 12;
    for same in [false, true] {
        let dir = tmp();
        // So few segments that most of the last ones were used before.
        let cfg = config(dir.path(), 128 << 10, 40 * (128 << 10));
        {
            let (spool, _) = Spool::open(&cfg).unwrap();
            for round in 0..3_u64 {
                let hold = if same { HOLD } else { HoldId(round) };
                let (mut w, q) = spool.create(hold, Kind::Source, &lane(0)).unwrap();
                for n in 0..4000 {
                    put(&mut w, n, 700);
                }
                w.commit();
                drop((w, q));
                spool.remove_hold(hold).unwrap();
                until(|| spool.used_bytes() == 0);
            }
            for n in 0..LANES {
                let (mut w, _q) = spool.create(HOLD, Kind::Source, &lane(n)).unwrap();
                for n in 0..5 {
                    put(&mut w, n, 700);
                }
                w.commit();
            }
        }
        // What lies behind them is still there.
        let recycled = |n: u16| {
            let queue = dir.path().join(format!("{HOLD}/s-{n:04}/000000.seg"));
            let b = std::fs::read(queue).unwrap();
            b[60_000..].iter().any(|b| *b != 0)
        };
        assert!((0..LANES).any(recycled));
        let (_spool, found) = Spool::open(&cfg).unwrap();
        assert_eq!(found.len(), usize::from(LANES));
        for f in found {
            assert_eq!((f.torn_bytes, f.damaged), (0, vec![]));
            assert_eq!(all(&f.queue).0, [1, 2, 3, 4, 5]);
        }
    }
}

/// The same at every place where the queue can end: behind what is written now, the use before has intact batches with
/// just the numbers that must follow.
#[test]
fn an_earlier_use_of_a_segment_is_another_epoch() {
    let dir = tmp();
    written(dir.path(), 20, 60);
    let old = std::fs::read(segment(dir.path(), 0)).unwrap();
    let dir = tmp();
    let ends = written(dir.path(), 20, 60);
    let new = std::fs::read(segment(dir.path(), 0)).unwrap();
    assert_ne!(epoch(&old), epoch(&new));
    let salt = salt(HOLD, &lane(0));
    for (n, end) in ends.iter().enumerate() {
        let mixed = [&new[..*end], &old[*end..]].concat();
        let mut s = Scanner::new(salt);
        let found = s.segment(&mixed, epoch(&new));
        assert_eq!((found.used, found.torn), (*end, 0));
        assert_eq!(s.tally().frames, n as u64 + 1);
        // The check of this test: with the old epoch there would be more.
        if n > 0 {
            let mut s = Scanner::new(salt);
            s.segment(&mixed, epoch(&old));
            assert_eq!(s.tally().frames, 19 - n as u64);
        }
    }
    // A use that has not begun has no epoch.
    let mut fresh = old.clone();
    fresh[..FILE_HEADER].fill(0);
    assert_eq!(epoch_of(&fresh, |_| true, None, salt), None);
    assert_eq!(epoch_of(&old, |_| false, None, salt), None);
}

#[test]
fn only_one_process_has_a_spool() {
    let dir = tmp();
    let (_spool, _) = open(dir.path());
    let again = Spool::open(&config(dir.path(), 128 << 10, 64 << 20));
    assert!(matches!(again, Err(SpoolError::InUse(_))));
}

#[test]
fn another_format_is_refused_by_name() {
    [1, 2, 9].into_iter().for_each(refused);
}

fn refused(version: u8) {
    let dir = tmp();
    written(dir.path(), 1, 60);
    let path = dir
        .path()
        .join(HOLD.to_string())
        .join("s-0000")
        .join("queue.meta");
    let mut b = std::fs::read(&path).unwrap();
    b[8] = version;
    // A flipped bit is no other version: a segment says whose queue it is.
    let flipped = tmp();
    let hold = flipped.path().join(HOLD.to_string());
    std::fs::create_dir(&hold).unwrap();
    std::fs::create_dir(hold.join("s-0000")).unwrap();
    for entry in std::fs::read_dir(path.parent().unwrap()).unwrap() {
        let from = entry.unwrap();
        std::fs::copy(from.path(), hold.join("s-0000").join(from.file_name())).unwrap();
    }
    std::fs::write(hold.join("s-0000/queue.meta"), &b).unwrap();
    assert_eq!(open(flipped.path()).1.len(), 1);
    // And where none says it, that queue stays, and no other waits for it.
    std::fs::write(hold.join("s-0000/queue.meta"), &b).unwrap();
    std::fs::write(hold.join("s-0000/000000.seg"), [7; 4096]).unwrap();
    assert!(open(flipped.path()).1.is_empty());
    assert!(hold.join("s-0000/000000.seg").exists());

    let sum = crate::spool::crc32c(&b[..FILE_HEADER - 4]);
    b[FILE_HEADER - 4..FILE_HEADER].copy_from_slice(&sum.to_le_bytes());
    std::fs::write(&path, &b).unwrap();
    let e = Spool::open(&config(dir.path(), 128 << 10, 64 << 20)).unwrap_err();
    let e = e.to_string();
    assert!(e.contains(&format!("format version {version}")), "{e}");
    assert!(e.contains("s-0000/queue.meta"), "{e}");
}

/// Contract 5 with a real SIGKILL: this test runs itself again, and kills it while it writes.
#[test]
fn a_killed_process_loses_nothing_it_committed() {
    use std::io::{BufRead, BufReader};
    const INNER: &str = "GANGWAY_TEST_KILLED";
    if let Ok(dir) = std::env::var(INNER) {
        let (spool, _) = open(Path::new(&dir));
        let (mut w, q) = spool.create(HOLD, Kind::Source, &lane(0)).unwrap();
        for n in 0.. {
            put(&mut w, n % 5000, 60 + (n as usize * 97) % 3000);
            if n % 8 == 0 {
                w.commit();
                println!("\ncommitted {}", q.last_seq());
            }
            if n > 20_000 {
                std::thread::sleep(Duration::from_secs(60));
            }
        }
    }
    for wait_ms in [5, 20, 60] {
        let dir = tmp();
        let mut child = std::process::Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "--nocapture",
                "spool::tests::recovery::a_killed_process_loses_nothing_it_committed",
            ])
            .env(INNER, dir.path())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let out = child.stdout.take().unwrap();
        let lines = std::thread::spawn(move || {
            let lines = BufReader::new(out).lines().map_while(Result::ok);
            let seqs = lines.filter_map(|l| l.strip_prefix("committed ")?.parse::<u64>().ok());
            seqs.last()
        });
        until(|| dir.path().join(HOLD.to_string()).exists());
        std::thread::sleep(Duration::from_millis(wait_ms));
        child.kill().unwrap();
        child.wait().unwrap();
        let committed = lines.join().unwrap().unwrap_or(0);
        let (_spool, mut found) = open(dir.path());
        let Some(f) = found.pop() else {
            assert_eq!(committed, 0);
            continue;
        };
        let (seqs, bad) = all(&f.queue);
        assert_eq!(bad, []);
        assert_eq!(f.damaged, []);
        assert_eq!(seqs, (1..=seqs.len() as u64).collect::<Vec<_>>());
        assert!(
            seqs.len() as u64 >= committed,
            "{} of {committed}",
            seqs.len()
        );
        assert!(f.writer.is_some());
    }
}

/// Frames that the run before has accepted and not given back come again, with the numbers that they had (ADR-0021).
#[test]
fn what_the_run_before_has_put_here_is_not_put_here_again() {
    let dir = tmp();
    let all: Vec<Vec<u8>> = (0..40).map(|n| bytes(n, 60)).collect();
    let frames: Vec<Frame<'_>> = all
        .iter()
        .map(|b| Frame::from_slice(VnetHdr::default(), b))
        .collect();
    let from = |queue, position| Origin { queue, position };
    {
        let (spool, _) = open(dir.path());
        let (mut w, _q) = spool.create(HOLD, Kind::Source, &lane(0)).unwrap();
        assert_eq!(w.append_run(1, &frames[..10], from(1, 100)), 10);
        assert_eq!(w.append_run(1, &frames[10..13], from(2, 7)), 3);
        assert_eq!(w.append_run(1, &frames[13..14], from(1, 110)), 1);
        assert_eq!(w.append_run(1, &frames[14..15], from(3, 1000)), 1);
        w.commit();
        // Nobody knows where these came in.
        assert_eq!(w.append_run(1, &frames[15..16], Origin::NONE), 1);
        w.commit();
    }
    let (_spool, mut found) = open(dir.path());
    let mut r = found.pop().unwrap();
    let w = r.writer.as_mut().unwrap();
    let last = |w: &Writer| w.next_seq() - 1;
    assert_eq!(last(w), 16);
    // Some of them, one more, and then others.
    assert_eq!(w.append_run(2, &frames[5..8], from(1, 105)), 3);
    assert_eq!(w.append_run(2, &frames[8..10], from(1, 108)), 2);
    assert_eq!(last(w), 16, "all of that was there");
    assert_eq!(w.append_run(2, &frames[13..20], from(1, 110)), 7);
    assert_eq!(last(w), 22, "six behind the one that was there");
    // A count that begins anew, and is by chance one that was there: the queue is past what it had.
    assert_eq!(w.append_run(2, &frames[20..21], from(1, 105)), 1);
    assert_eq!(last(w), 23);
    assert_eq!(w.append(2, &frames[12], from(2, 9)), Ok(()));
    assert_eq!(last(w), 23);
    assert_eq!(w.append_run(2, &frames[20..22], from(2, 10)), 2);
    // Further ahead than a burst: of another time.
    assert_eq!(w.append_run(2, &frames[22..23], from(3, 1001 - 33)), 1);
    assert_eq!(w.append_run(2, &frames[23..24], Origin::NONE), 1);
    assert_eq!(last(w), 27);
}

/// What was shipped here has come in at another host's queues.
#[test]
fn what_was_shipped_here_says_nothing_of_our_queues() {
    let dir = tmp();
    let b = bytes(1, 60);
    let f = [Frame::from_slice(VnetHdr::default(), &b)];
    let here = Origin {
        queue: 0,
        position: 5,
    };
    {
        let (spool, _) = open(dir.path());
        let (mut w, _q) = spool.create(HOLD, Kind::Incoming, &lane(0)).unwrap();
        assert_eq!(w.append_run(1, &f, here), 1);
        w.commit();
    }
    let (_spool, mut found) = open(dir.path());
    let w = found[0].writer.as_mut().unwrap();
    assert_eq!(w.append_run(1, &f, here), 1);
    assert_eq!(w.next_seq(), 3);
}
