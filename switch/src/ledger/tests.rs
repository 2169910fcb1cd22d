//! The file byte by byte, damage to it, paging, retirement.

use std::time::UNIX_EPOCH;

use gangway_shared::api::HoldState;
use gangway_shared::ledger::{IndexBatch, LaneKind, Ledger, account};
use tempfile::TempDir;

use super::*;
use crate::port::{Frame, VnetHdr};
use crate::spool::tests::{HOLD, bytes, lane, open, put, tmp};
use crate::spool::{Kind, Origin, Spool, Writer};

/// Format v1 as docs/formats/ledger.md shows it. If this fails the format has changed: that needs a new version.
const LEDGER_V1: &str = include_str!("ledger-v1.hex");

fn config(dir: &TempDir, frames_bytes: u64) -> LedgerConfig {
    LedgerConfig {
        dir: dir.path().join("ledger"),
        keep_days: 30,
        keep_bytes: 1 << 30,
        frames_bytes,
    }
}

fn ledger() -> Ledger {
    Ledger {
        hold: HOLD,
        role: Role::Source,
        state: HoldState::Released,
        host: "a".into(),
        peer: "b".into(),
        vms: vec!["web".into()],
        frozen_ns: 1,
        thawed_ns: 2,
        drained_ns: 3,
        made_ns: 4,
        lanes: 1,
    }
}

fn queue(spool: &Spool, fill: impl FnOnce(&mut Writer)) -> Arc<Queue> {
    let (mut w, q) = spool.create(HOLD, Kind::Source, &lane(3)).unwrap();
    fill(&mut w);
    w.seal();
    q
}

fn books(q: &Arc<Queue>) -> Vec<Book> {
    let mut b = Book {
        lane: LedgerLane {
            lane: q.lane().clone(),
            kind: LaneKind::Shipped,
            inside: true,
            stages: Vec::new(),
            lost: Vec::new(),
            lost_more: 0,
            dropped: 0,
            indexed: false,
            kept: false,
        },
        again: Some((q.clone(), Stage::Spool)),
    };
    b.note(Stage::Accept, counted(q.progress()));
    vec![b]
}

fn read(cfg: &LedgerConfig) -> Reader {
    Reader::open(cfg, HOLD, Role::Source).unwrap().unwrap()
}

fn index(r: &Reader) -> (Vec<IndexBatch>, usize) {
    let (mut all, mut at, mut pages) = (Vec::new(), Some(0), 0);
    while let Some(here) = at {
        let (batches, next) = r.index(0, here).unwrap();
        all.extend(batches);
        at = next;
        pages += 1;
    }
    (all, pages)
}

#[test]
fn version_1_is_written_as_ever_and_read() {
    let dir = tmp();
    let (spool, _) = open(&dir.path().join("spool"));
    let q = queue(&spool, |w| {
        put(w, 0x0102_0304, 20);
        let two = [bytes(5, 33), bytes(6, 14)];
        let two = two
            .each_ref()
            .map(|b| Frame::from_slice(VnetHdr::default(), b));
        assert_eq!(w.append_run(0x0506_0708, &two, Origin::NONE), 2);
    });
    let cfg = config(&dir, 1 << 20);
    let path = write(&cfg, &ledger(), books(&q)).unwrap().unwrap();
    let found = fs::read(path).unwrap();
    let hex: Vec<String> = found
        .chunks(16)
        .map(|c| c.iter().map(|b| format!("{b:02x}")).collect())
        .collect();
    if std::env::var_os("UPDATE").is_some() {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/src/ledger/ledger-v1.hex");
        fs::write(file, hex.join("\n") + "\n").unwrap();
    } else {
        assert_eq!(hex.join("\n"), LEDGER_V1.trim_end());
    }

    let r = read(&cfg);
    assert_eq!(*r.ledger(), ledger());
    let l = r.lanes(0).next().unwrap();
    let all = account(&index(&r).0);
    assert_eq!(l.stage(Stage::Spool), Some(&all));
    assert!(l.stage(Stage::Accept).unwrap().agrees(&all));
    assert_eq!((all.first_seq, all.last_seq, all.bytes), (1, 3, 67));
    let (frames, next) = r.frames(0, 0).unwrap();
    assert_eq!((frames.len(), next, l.kept), (3, None, true));
    assert_eq!((frames[1].seq, frames[1].time_ns), (2, 0x0506_0708));
    assert_eq!(frames[1].bytes, bytes(5, 33));
}

#[test]
fn a_long_index_comes_in_pages_and_frames_end_where_their_room_does() {
    let dir = tmp();
    let (spool, _) = open(&dir.path().join("spool"));
    let q = queue(&spool, |w| {
        for n in 0..20_000 {
            put(w, n, 60);
            w.commit();
        }
    });
    let cfg = config(&dir, 100_000);
    write(&cfg, &ledger(), books(&q)).unwrap();
    let r = read(&cfg);
    let (all, pages) = index(&r);
    assert!(pages > 1);
    let said = *r.lanes(0).next().unwrap().stage(Stage::Spool).unwrap();
    assert_eq!((account(&all), said.frames), (said, 20_000));
    assert!(account(&all).agrees(&counted(q.progress())));
    assert!(!r.lanes(0).next().unwrap().kept);
    let (frames, _) = r.frames(0, 0).unwrap();
    assert!(
        frames.len() > 500 && frames.len() < 1000,
        "{}",
        frames.len()
    );
    assert!(r.index(1, 0).is_err() && r.index(0, 1 << 40).is_err());
}

#[test]
fn a_flipped_bit_in_any_byte_is_noticed_and_none_panics() {
    let dir = tmp();
    let (spool, _) = open(&dir.path().join("spool"));
    let q = queue(&spool, |w| put(w, 7, 100));
    let cfg = config(&dir, 1 << 20);
    let path = write(&cfg, &ledger(), books(&q)).unwrap().unwrap();
    let good = fs::read(&path).unwrap();
    let all = |cfg: &LedgerConfig| -> Result<(), LedgerError> {
        let r = Reader::open(cfg, HOLD, Role::Source)?.unwrap();
        r.index(0, 0)?;
        r.frames(0, 0).map(drop)
    };
    all(&cfg).unwrap();
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 1 << (at % 8);
        fs::write(&path, &bad).unwrap();
        assert!(all(&cfg).is_err(), "bit {} of byte {at}", at % 8);
    }
    for len in 0..good.len() {
        fs::write(&path, &good[..len]).unwrap();
        assert!(all(&cfg).is_err(), "{len} bytes");
    }
}

#[test]
fn a_damaged_record_is_named_in_the_ledger() {
    let dir = tmp();
    let (spool, _) = open(&dir.path().join("spool"));
    let q = queue(&spool, |w| (0..9).for_each(|n| put(w, n, 100)));
    let segment = dir.path().join("spool/1122334455667788/s-0000/000000.seg");
    // A byte of the fifth frame: batches of one, 48 + 8 + 112 bytes each.
    let mut b = fs::read(&segment).unwrap();
    b[256 + 4 * 168 + 100] ^= 1;
    let file = fs::File::options().write(true).open(&segment).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &b, 0).unwrap();
    let cfg = config(&dir, 0);
    write(&cfg, &ledger(), books(&q)).unwrap();
    let r = read(&cfg);
    let l = r.lanes(0).next().unwrap();
    let lost: Vec<_> = l
        .lost
        .iter()
        .map(|l| (l.stage, l.first_seq, l.last_seq))
        .collect();
    assert_eq!(lost, [(Stage::Spool, 5, 5)]);
    assert_eq!(l.stage(Stage::Accept).unwrap().frames, 9);
    assert_eq!(l.stage(Stage::Spool).unwrap().frames, 8);
}

#[test]
fn old_ledgers_go_and_then_the_oldest() {
    let dir = tmp();
    let mut cfg = config(&dir, 0);
    fs::create_dir(&cfg.dir).unwrap();
    let day = |n: u64| UNIX_EPOCH + Duration::from_secs(n * 86_400);
    for n in 1..=5 {
        let f = fs::File::create(cfg.dir.join(format!("{n}.ledger"))).unwrap();
        f.set_len(100).unwrap();
        f.set_modified(day(n)).unwrap();
    }
    let other = cfg.dir.join("notes.txt");
    fs::write(&other, "mine").unwrap();
    let left = || {
        (1..=5)
            .filter(|n| cfg.dir.join(format!("{n}.ledger")).exists())
            .collect::<Vec<_>>()
    };
    assert_eq!(retire(&cfg, Some(day(32))).unwrap(), 1);
    assert_eq!(left(), [2, 3, 4, 5]);
    let less = LedgerConfig {
        keep_bytes: 250,
        ..cfg.clone()
    };
    assert_eq!(retire(&less, Some(day(32))).unwrap(), 2);
    assert_eq!(left(), [4, 5]);
    let none = LedgerConfig {
        keep_bytes: 0,
        ..cfg.clone()
    };
    assert_eq!(retire(&none, Some(day(32))).unwrap(), 1);
    assert_eq!(left(), [5], "the last one stays");
    assert!(other.exists());
    cfg.keep_days = 0;
    let (spool, _) = open(&dir.path().join("spool"));
    let q = queue(&spool, |_| {});
    assert!(write(&cfg, &ledger(), books(&q)).unwrap().is_none());
    assert_eq!(left(), [5], "writing nothing deletes nothing");
    assert_eq!(retire(&cfg, Some(day(1))).unwrap(), 1);
    assert!(left().is_empty(), "nothing is kept, not even the last one");
    assert!(other.exists());
}

#[test]
fn what_a_cut_off_write_has_left_goes_and_what_is_being_written_stays() {
    let dir = tmp();
    let cfg = config(&dir, 0);
    fs::create_dir(&cfg.dir).unwrap();
    let (left, mine) = (cfg.dir.join("1.new"), cfg.dir.join("2.new"));
    for path in [&left, &mine] {
        let f = fs::File::create(path).unwrap();
        f.set_modified(UNIX_EPOCH).unwrap();
    }
    // Another hold's, which ends at this moment; whatever the clock says.
    let file = write::create(&mine).unwrap();
    file.set_modified(UNIX_EPOCH).unwrap();
    assert_eq!(retire(&cfg, Some(SystemTime::now())).unwrap(), 1);
    assert!(!left.exists() && mine.exists());
    drop(file);
    assert_eq!(retire(&cfg, None).unwrap(), 1);
    assert!(!mine.exists());
}

#[test]
fn an_idle_host_looks_at_its_start_and_once_an_hour() {
    let (mut r, start) = (Retirement::default(), Instant::now());
    let minutes = |n: u64| Duration::from_secs(60 * n);
    let due: Vec<u64> = (0..200)
        .filter(|n| {
            let after = minutes(*n);
            r.due(start + after, UNIX_EPOCH + after).is_some()
        })
        .collect();
    assert_eq!(due, [0, 60, 120, 180]);
}

/// A clock that jumps makes nothing old: not the look behind the jump, only one that agrees with the look before.
#[test]
fn a_clock_is_believed_while_it_goes_as_the_machine_s_own() {
    let (mut r, start) = (Retirement::default(), Instant::now());
    let year = Duration::from_secs(365 * 86_400);
    let mut look = |hours: u32, off: Duration| {
        let after = RETIRE_EVERY * hours;
        let wall = UNIX_EPOCH + year + after + off;
        let due = r.due(start + after, wall).expect("an hour has passed");
        assert!(due.clock.is_none_or(|c| c == wall));
        due.clock.is_some()
    };
    let (right, soon) = (Duration::ZERO, Duration::from_secs(30));
    assert!(!look(0, right), "it may be wrong at a start");
    assert!(look(1, right));
    assert!(look(2, soon), "set by NTP");
    assert!(!look(3, 70 * year));
    assert!(!look(4, right), "and back");
    assert!(look(5, right));
    assert!(!look(6, Duration::from_secs(120)));
    assert!(look(7, Duration::from_secs(120)));
}

#[test]
fn without_a_clock_that_is_believed_nothing_is_too_old() {
    let dir = tmp();
    let cfg = config(&dir, 0);
    let (spool, _) = open(&dir.path().join("spool"));
    let q = queue(&spool, |w| put(w, 1, 100));
    fs::create_dir(&cfg.dir).unwrap();
    for n in 1..=2 {
        let f = fs::File::create(cfg.dir.join(format!("{n}.ledger"))).unwrap();
        f.set_modified(UNIX_EPOCH).unwrap();
    }
    assert_eq!(retire(&cfg, None).unwrap(), 0);
    // The end of a hold may come right behind a jump.
    write(&cfg, &ledger(), books(&q)).unwrap();
    assert!(cfg.dir.join("1.ledger").exists());
    let none = LedgerConfig {
        keep_days: 0,
        ..cfg.clone()
    };
    assert_eq!(retire(&none, None).unwrap(), 3, "that asks for no clock");
}
