use super::*;
use crate::spool::format::{FILE_HEADER, record_len, salt};
use crate::spool::recover::{End, Scanner};

fn segment(dir: &Path, n: usize) -> std::path::PathBuf {
    dir.join(HOLD.to_string())
        .join("s-0000")
        .join(format!("{n:06}.seg"))
}

/// Writes `n` committed records and returns where each ends in the first segment.
fn written(dir: &Path, n: u64, len: usize) -> Vec<usize> {
    let (spool, _) = open(dir);
    let (mut w, _q) = spool.create(HOLD, Kind::Source, &lane(0)).unwrap();
    let mut ends = Vec::new();
    let mut at = FILE_HEADER;
    for i in 0..n {
        let len = len + i as usize;
        put(&mut w, i, len);
        at += record_len(len as u32);
        ends.push(at);
    }
    w.commit();
    ends
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
        let end = s.segment(&b);
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
    for cut in [1, 17, 39, 40, 60, 99] {
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

fn patch_committed(dir: &Path, seq: u64) {
    let path = dir.join(HOLD.to_string()).join("s-0000").join("queue.meta");
    let mut b = std::fs::read(&path).unwrap();
    b[256..264].copy_from_slice(&seq.to_le_bytes());
    std::fs::write(&path, &b).unwrap();
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
        s.segment(&b);
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
    let dir = tmp();
    {
        let (spool, _) = open(dir.path());
        let (mut w, _q) = spool.create(HOLD, Kind::Source, &lane(0)).unwrap();
        (0..400).for_each(|n| put(&mut w, n, 700));
        w.commit();
    }
    let path = segment(dir.path(), 0);
    let mut b = std::fs::read(&path).unwrap();
    let at = b.windows(4).position(|w| w == b"GWnx").unwrap();
    b[at + 9] ^= 4;
    std::fs::write(&path, &b).unwrap();
    let (_spool, found) = open(dir.path());
    assert!(found[0].damaged.is_empty());
    assert_eq!(all(&found[0].queue), ((1..=400).collect(), vec![]));
}

/// A segment that a dead hold has used must not bring its frames into the next hold's queue.
#[test]
fn what_a_recycled_segment_held_never_comes_back() {
    let dir = tmp();
    {
        let (spool, _) = open(dir.path());
        for round in 0..3_u64 {
            let (mut w, q) = spool.create(HoldId(round), Kind::Source, &lane(0)).unwrap();
            for n in 0..4000 {
                put(&mut w, n, 700);
            }
            w.commit();
            drop((w, q));
            spool.remove_hold(HoldId(round)).unwrap();
            until(|| spool.used_bytes() == 0);
        }
        let (mut w, _q) = spool.create(HOLD, Kind::Source, &lane(0)).unwrap();
        for n in 0..5 {
            put(&mut w, n, 700);
        }
        w.commit();
    }
    let (_spool, found) = open(dir.path());
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].torn_bytes, 0);
    assert_eq!(all(&found[0].queue).0, [1, 2, 3, 4, 5]);
}

#[test]
fn only_one_process_has_a_spool() {
    let dir = tmp();
    let (_spool, _) = open(dir.path());
    let again = Spool::open(&config(dir.path(), 128 << 10, 64 << 20));
    assert!(matches!(again, Err(SpoolError::InUse(_))));
}

#[test]
fn a_newer_format_is_refused_by_name() {
    let dir = tmp();
    written(dir.path(), 1, 60);
    let path = dir
        .path()
        .join(HOLD.to_string())
        .join("s-0000")
        .join("queue.meta");
    let mut b = std::fs::read(&path).unwrap();
    b[8] = 9;
    std::fs::write(&path, &b).unwrap();
    let e = Spool::open(&config(dir.path(), 128 << 10, 64 << 20)).unwrap_err();
    assert!(e.to_string().contains("format version 9"), "{e}");
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
