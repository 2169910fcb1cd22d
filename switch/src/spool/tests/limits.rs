use std::io::Write;

use super::*;

#[test]
fn at_the_quota_the_writer_waits_until_another_hold_is_gone() {
    let dir = tmp();
    let cfg = config(dir.path(), 128 << 10, 8 * (128 << 10));
    let (spool, _) = Spool::open(&cfg).unwrap();
    let (mut w1, _q1) = spool.create(HoldId(1), Kind::Source, &lane(0)).unwrap();
    let (mut w2, q2) = spool.create(HoldId(2), Kind::Source, &lane(0)).unwrap();
    let full = |w: &mut Writer| {
        let mut n = 0;
        let mut idle = Instant::now();
        while idle.elapsed() < Duration::from_millis(300) {
            if w.has_room(1500) {
                put(w, n, 1500);
                n += 1;
                idle = Instant::now();
            }
        }
        w.commit();
        n
    };
    let n1 = full(&mut w1);
    assert!(n1 > 300, "{n1}");
    let n2 = full(&mut w2);
    let frame = bytes(0, 1500);
    let frame = Frame::from_slice(vnet(0), &frame);
    assert_eq!(w2.append(0, &frame, Origin::NONE), Err(NoRoom));
    assert!(spool.used_bytes() <= cfg.quota_bytes);
    let on_disk = disk_bytes(dir.path());
    assert!(on_disk <= cfg.quota_bytes + (64 << 10), "{on_disk}");
    let e = spool.create(HoldId(3), Kind::Source, &lane(0)).unwrap_err();
    assert!(matches!(e, SpoolError::Quota { .. }), "{e}");

    // The writer of the removed hold is still there, and has no room.
    spool.remove_hold(HoldId(1)).unwrap();
    assert!(!w1.has_room(64));
    drop(w1);
    until(|| w2.has_room(1500));
    for n in n2..n2 + 200 {
        put(&mut w2, n, 1500);
    }
    w2.commit();
    assert_eq!(all(&q2).0.len() as u64, n2 + 200);
    // Nothing of the failed creation is left.
    assert!(
        !dir.path()
            .join(HoldId(3).to_string())
            .join("s-0000")
            .exists()
    );
}

/// Appends until the spool says that there is no more room.
fn fill(spool: &Spool, w: &mut Writer) -> u64 {
    let (mut n, hold) = (0, w.queue().hold());
    until(|| {
        while w.has_room(1500) {
            put(w, n, 1500);
            n += 1;
        }
        spool.trouble(Some(hold)).is_some() && !w.has_room(1500)
    });
    w.commit();
    n
}

#[test]
fn a_hold_at_its_quota_waits_says_why_and_leaves_room_for_others() {
    let dir = tmp();
    let mut cfg = config(dir.path(), 128 << 10, 64 << 20);
    cfg.limits.hold_bytes = Some(4 * (128 << 10));
    let (spool, _) = Spool::open(&cfg).unwrap();
    let (mut w1, _q) = spool.create(HoldId(1), Kind::Source, &lane(0)).unwrap();
    let (mut w2, _q) = spool.create(HoldId(2), Kind::Source, &lane(0)).unwrap();
    let n = fill(&spool, &mut w1);
    let all = 4 * (128 << 10) / 1500;
    assert!(n < all && n > all / 10 * 8, "{n}");
    let why = spool.trouble(None).unwrap();
    assert!(why.contains("raise spool.hold_bytes"), "{why}");
    assert_eq!(spool.trouble(Some(HoldId(2))), None);
    let e = spool.create(HoldId(1), Kind::Source, &lane(1)).unwrap_err();
    assert!(matches!(e, SpoolError::HoldQuota { .. }), "{e}");
    // The first hold goes on asking.
    put(&mut w2, 0, 1500);
    for n in 0..200 {
        put(&mut w2, n, 1500);
    }
    spool.remove_hold(HoldId(1)).unwrap();
    until(|| spool.trouble(None).is_none());
}

#[test]
fn what_waits_behind_a_shipment_does_not_stop_the_shipment() {
    let dir = tmp();
    let (quota, segment) = (16 * (128 << 10), 128 << 10);
    for hold_bytes in [None, Some(quota)] {
        let mut cfg = config(dir.path(), segment, quota);
        cfg.limits.hold_bytes = hold_bytes;
        let (spool, _) = Spool::open(&cfg).unwrap();
        let (mut behind, _l) = spool.create(HOLD, Kind::Local, &lane(0)).unwrap();
        let (mut shipped, _i) = spool.create(HOLD, Kind::Incoming, &lane(0)).unwrap();
        let n = fill(&spool, &mut behind);
        assert!(n < quota / 1500 / 10 * 8, "{n}");
        for n in 0..150 {
            put(&mut shipped, n, 1500);
        }
        drop((behind, shipped, _l, _i));
        spool.remove_hold(HOLD).unwrap();
    }
}

/// What waits behind the shipment has all that it may have, and the shipment is greater than the rest: behind the commit it goes on
/// all the same, also after a restart.
#[test]
fn behind_the_commit_a_shipment_is_stopped_by_no_quota_of_bytes() {
    let (quota, segment) = (16 * (128 << 10), 128 << 10);
    for hold_bytes in [None, Some(quota)] {
        let dir = tmp();
        let mut cfg = config(dir.path(), segment, quota);
        cfg.limits.hold_bytes = hold_bytes;
        {
            let (spool, _) = Spool::open(&cfg).unwrap();
            let (mut behind, _l) = spool.create(HOLD, Kind::Local, &lane(0)).unwrap();
            let (mut shipped, i) = spool.create(HOLD, Kind::Incoming, &lane(0)).unwrap();
            fill(&spool, &mut behind);
            let before = fill(&spool, &mut shipped);
            assert!(before < quota / 1500 / 3, "{before}");
            spool.only_forward(HOLD);
            for n in 0..quota / 1500 {
                put(&mut shipped, n, 1500);
            }
            shipped.commit();
            assert_eq!(i.last_seq(), before + quota / 1500);
            assert!(spool.used_bytes() > quota);
            // One more lane of it, and nothing else.
            let _late = spool.create(HOLD, Kind::Incoming, &lane(1)).unwrap();
            assert!(!behind.has_room(1500));
            for (hold, kind) in [(HOLD, Kind::Local), (HoldId(2), Kind::Incoming)] {
                let e = spool.create(hold, kind, &lane(2)).unwrap_err();
                let is_quota = matches!(e, SpoolError::Quota { .. } | SpoolError::HoldQuota { .. });
                assert!(is_quota, "{e}");
            }
        }
        // A queue whose first segment was not there yet is no reason not to start.
        let late = dir.path().join(HOLD.to_string()).join("t-0001/000000.seg");
        std::fs::remove_file(late).unwrap();
        let (spool, mut found) = Spool::open(&cfg).unwrap();
        let kind = |f: &Recovered| (f.queue.kind(), f.queue.index());
        let shipped = found.iter_mut().find(|f| kind(f) == (Kind::Incoming, 0));
        let shipped = shipped.unwrap().writer.as_mut().unwrap();
        fill(&spool, shipped);
        spool.only_forward(HOLD);
        for n in 0..200 {
            put(shipped, n, 1500);
        }
        drop(found);
        spool.remove_hold(HOLD).unwrap();
        assert!(!spool.is_only_forward(HOLD));
        until(|| spool.used_bytes() == 0);
        until(|| disk_bytes(dir.path()) <= quota);
    }
}

fn disk_bytes(dir: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    std::fs::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap())
        .map(|e| {
            if e.path().is_dir() {
                disk_bytes(&e.path())
            } else {
                e.metadata().unwrap().blocks() * 512
            }
        })
        .sum()
}

#[test]
fn a_removed_hold_gives_its_bytes_back_and_leaves_no_files() {
    let dir = tmp();
    let (spool, _) = open(dir.path());
    let (mut w, q) = spool.create(HOLD, Kind::Source, &lane(0)).unwrap();
    assert!(matches!(
        spool.create(HOLD, Kind::Source, &lane(0)),
        Err(SpoolError::Exists(..))
    ));
    for n in 0..2000 {
        put(&mut w, n, 1500);
    }
    w.commit();
    let mut r = q.reader();
    assert_eq!(r.peek().unwrap().unwrap().seq, 1);
    spool.remove_hold(HOLD).unwrap();
    assert!(!dir.path().join(HOLD.to_string()).exists());
    // Whoever still reads may go on reading what was there.
    for n in 1..=2000 {
        assert_eq!(r.peek().unwrap().unwrap().seq, n);
        r.advance();
    }
    assert!(spool.used_bytes() > 0);
    drop((w, r, q));
    until(|| spool.used_bytes() == 0);
    let (mut w, q) = spool.create(HOLD, Kind::Source, &lane(0)).unwrap();
    put(&mut w, 3, 100);
    w.commit();
    assert_eq!(all(&q).0, [1]);
}

/// Where a removal ends early: either all of it is there, or nothing.
#[test]
fn a_hold_whose_removal_does_not_begin_is_whole() {
    let dir = tmp();
    let (spool, _) = open(dir.path());
    let (mut w, _q) = spool.create(HOLD, Kind::Source, &lane(0)).unwrap();
    for n in 0..300 {
        put(&mut w, n, 1500);
    }
    w.seal();
    let taken = dir.path().join("pool").join(format!("{HOLD}.gone"));
    std::fs::create_dir(&taken).unwrap();
    std::fs::write(taken.join("x"), "").unwrap();
    let used = spool.used_bytes();
    assert!(spool.remove_hold(HOLD).is_err());
    assert!(!w.has_room(60));
    assert_eq!(spool.used_bytes(), used);
    drop((spool, w, _q));
    let (spool, found) = open(dir.path());
    assert_eq!(found[0].damaged, []);
    assert_eq!(all(&found[0].queue).0.len(), 300);
    spool.remove_hold(HOLD).unwrap();
    drop((spool, found));
    assert_eq!(open(dir.path()).1.len(), 0);
}

/// In a mount namespace of its own: this test runs itself again under `unshare`.
#[test]
fn a_full_disk_is_backpressure_and_no_signal() {
    const INNER: &str = "GANGWAY_TEST_FULL_DISK";
    if let Ok(dir) = std::env::var(INNER) {
        let out = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=3m", "none", &dir])
            .status();
        assert!(out.unwrap().success());
        shipment_on_a_full_disk(&Path::new(&dir).join("shipment"));
        return full_disk(Path::new(&dir));
    }
    let dir = tmp();
    let out = std::process::Command::new("unshare")
        .args(["--mount", "--propagation", "private", "--"])
        .arg(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "--nocapture",
            "spool::tests::limits::a_full_disk_is_backpressure_and_no_signal",
        ])
        .env(INNER, dir.path())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&out.stdout);
    assert!(
        out.status.success() && text.contains("full disk seen"),
        "this needs root, to mount a small file system: {out:?}"
    );
}

/// What is ready is for a shipment, too, where nothing can be made.
fn shipment_on_a_full_disk(dir: &Path) {
    const SEGMENT: u64 = 256 << 10;
    {
        let (spool, _) = Spool::open(&config(dir, SEGMENT, 16 * SEGMENT)).unwrap();
        until(|| disk_bytes(&dir.join("pool")) == 2 * SEGMENT);
        let filler = std::fs::File::create(dir.join("filler")).unwrap();
        while (&filler).write_all(&[1; 4096]).is_ok() {}
        let len = filler.metadata().unwrap().len();
        filler.set_len(len - SEGMENT / 2).unwrap();
        for n in 0..2 {
            spool.create(HOLD, Kind::Incoming, &lane(n)).unwrap();
        }
        let e = spool.create(HOLD, Kind::Incoming, &lane(2)).unwrap_err();
        assert!(e.to_string().contains("No space left"), "{e}");
        assert_eq!(spool.used_bytes(), 2 * SEGMENT);
    }
    std::fs::remove_dir_all(dir).unwrap();
}

fn full_disk(dir: &Path) {
    let cfg = config(dir, 256 << 10, 1 << 30);
    let (spool, _) = Spool::open(&cfg).unwrap();
    let (mut w, q) = spool.create(HOLD, Kind::Source, &lane(0)).unwrap();
    let mut n = 0;
    let mut idle = Instant::now();
    while idle.elapsed() < Duration::from_millis(400) {
        if w.has_room(1500) {
            put(&mut w, n, 1500);
            w.commit();
            n += 1;
            idle = Instant::now();
        }
    }
    assert!((1000..2000).contains(&n), "{n}");
    let e = spool.create(HOLD, Kind::Source, &lane(1)).unwrap_err();
    assert!(e.to_string().contains("No space left"), "{e}");
    assert_eq!(all(&q).0.len() as u64, n);
    assert!(q.failed().is_none());
    let why = spool.trouble(Some(HOLD)).expect("the hold says so");
    assert!(why.contains("No space left"), "{why}");
    assert_eq!(spool.trouble(None), Some(why));
    println!("full disk seen: {e}");
}

#[test]
fn names_that_do_not_fit_are_refused() {
    let dir = tmp();
    let (spool, _) = open(dir.path());
    for from in [String::new(), "x".repeat(65)] {
        let key = LaneKey { from, ..lane(0) };
        assert!(matches!(
            spool.create(HOLD, Kind::Source, &key),
            Err(SpoolError::Name(_))
        ));
    }
}

#[test]
fn sync_covers_what_is_committed_under_each_policy() {
    for sync in [Sync::Batch, Sync::Each, Sync::None] {
        let dir = tmp();
        let cfg = SpoolConfig {
            sync,
            ..config(dir.path(), 128 << 10, 8 << 20)
        };
        let (spool, _) = Spool::open(&cfg).unwrap();
        let (mut w, q) = spool.create(HOLD, Kind::Source, &lane(0)).unwrap();
        q.sync().unwrap();
        for n in 0..300 {
            put(&mut w, n, 1500);
            if n % 32 == 0 {
                w.commit();
            }
        }
        w.seal();
        q.sync().unwrap();
        q.sync().unwrap();
        assert_eq!(q.failed(), None);
    }
}

#[test]
fn what_was_given_back_is_room_at_once() {
    let dir = tmp();
    let cfg = config(dir.path(), 128 << 10, 4 * (128 << 10));
    let (spool, _) = Spool::open(&cfg).unwrap();
    // Who usually collects it never comes to it.
    spool.stop_keeper();
    for n in 1..20 {
        let made = spool.create(HoldId(n), Kind::Source, &lane(0));
        drop(made.unwrap_or_else(|e| panic!("{n}: {e}")));
        spool.remove_hold(HoldId(n)).unwrap();
    }
}

/// Offers bursts of 32 until the spool says that it takes no more frames; how many it took.
fn fill_bursts(spool: &Spool, w: &mut Writer) -> u64 {
    let (b, hold) = (bytes(0, 60), w.queue().hold());
    let burst = [(); 32].map(|()| Frame::from_slice(vnet(0), &b));
    let mut n = 0;
    until(|| {
        loop {
            let took = w.append_run(0, &burst, Origin::NONE) as u64;
            w.commit();
            n += took;
            if took == 0 {
                break;
            }
        }
        spool
            .trouble(Some(hold))
            .is_some_and(|why| why.contains("frames"))
    });
    assert!(!w.has_room(60));
    n
}

#[test]
fn at_the_quota_of_frames_the_writer_waits_until_another_hold_is_gone() {
    let dir = tmp();
    let mut cfg = config(dir.path(), 128 << 10, 64 << 20);
    cfg.limits.quota_frames = Some(2000);
    cfg.limits.hold_frames = Some(1100);
    {
        let (spool, _) = Spool::open(&cfg).unwrap();
        let (mut w1, _q) = spool.create(HoldId(1), Kind::Source, &lane(0)).unwrap();
        let n = fill_bursts(&spool, &mut w1);
        assert!(
            (1100..1100 + 32).contains(&n),
            "{n}: one burst over it at most"
        );
        let why = spool.trouble(Some(HoldId(1))).unwrap();
        assert!(
            why.contains("of 1100 frames") && why.contains("spool.hold_frames"),
            "{why}"
        );
        // Another lane of it has none either; another hold goes on.
        let (mut other, _q) = spool.create(HoldId(1), Kind::Source, &lane(1)).unwrap();
        assert_eq!(fill_bursts(&spool, &mut other), 0);
        assert_eq!(spool.trouble(Some(HoldId(2))), None);
    }
    // What is there counts behind a restart, too.
    let (spool, mut found) = Spool::open(&cfg).unwrap();
    let mut w1 = found.pop().unwrap().writer.unwrap();
    assert!(!w1.has_room(60));
    let (mut w2, q2) = spool.create(HoldId(2), Kind::Source, &lane(0)).unwrap();
    let n2 = fill_bursts(&spool, &mut w2);
    assert!((2000 - 1132..2032 - 1100).contains(&n2), "{n2}");
    let why = spool.trouble(Some(HoldId(2))).unwrap();
    assert!(why.contains("spool.quota_frames"), "{why}");
    // What nobody can keep back is taken all the same.
    let b = bytes(1, 60);
    let one = [Frame::from_slice(vnet(1), &b)];
    assert!(!w2.has_room(60) && w2.has_bytes(60));
    assert_eq!(w2.append_accepted(1, &one, Origin::NONE), 1);
    w2.commit();

    drop(found);
    spool.remove_hold(HoldId(1)).unwrap();
    w1.commit();
    until(|| spool.trouble(None).is_none());
    assert!(fill_bursts(&spool, &mut w2) >= 1100 - 32 - n2);
    assert_eq!(q2.last_seq(), q2.tally().frames);
    spool.remove_hold(HoldId(2)).unwrap();
    // All of it was given back.
    let (mut w3, _q) = spool.create(HoldId(3), Kind::Source, &lane(0)).unwrap();
    assert!(fill_bursts(&spool, &mut w3) >= 1100);
}

/// One that is at its bound, of frames or bytes, is no reason for the others to have no segments ready.
#[test]
fn a_hold_at_its_quota_does_not_keep_segments_from_being_made_ready() {
    let segment = 128 << 10;
    for frames in [true, false] {
        let dir = tmp();
        let mut cfg = config(dir.path(), segment, 32 * segment);
        match frames {
            true => cfg.limits.hold_frames = Some(1100),
            false => cfg.limits.hold_bytes = Some(2 * segment),
        }
        let (spool, _) = Spool::open(&cfg).unwrap();
        let ready = || disk_bytes(&dir.path().join("pool")) / segment;
        until(|| ready() == 4);
        let (mut w, _q) = spool.create(HoldId(1), Kind::Source, &lane(0)).unwrap();
        match frames {
            true => fill_bursts(&spool, &mut w),
            false => fill(&spool, &mut w),
        };
        until(|| ready() == 4);
        // It waits all the time.
        let (_w, _q) = spool.create(HoldId(2), Kind::Source, &lane(0)).unwrap();
        until(|| ready() == 4);
        assert!(spool.trouble(Some(HoldId(1))).is_some());
    }
}

#[test]
fn frames_behind_a_shipment_do_not_stop_the_shipment() {
    for host in [true, false] {
        let dir = tmp();
        let mut cfg = config(dir.path(), 128 << 10, 64 << 20);
        match host {
            true => cfg.limits.quota_frames = Some(4000),
            false => cfg.limits.hold_frames = Some(4000),
        }
        let (spool, _) = Spool::open(&cfg).unwrap();
        let (mut behind, _l) = spool.create(HOLD, Kind::Local, &lane(0)).unwrap();
        let (mut shipped, _i) = spool.create(HOLD, Kind::Incoming, &lane(0)).unwrap();
        let n = fill_bursts(&spool, &mut behind);
        assert!((3000..3032).contains(&n), "{n}");
        // All that its source may have held, and more.
        for n in 0..5000 {
            put(&mut shipped, n, 60);
            shipped.commit();
        }
    }
}

/// Size and what of it is mapped in, in KiB, of each segment of a queue, as the kernel says.
fn faulted_in(q: &Queue) -> Vec<(u64, u64)> {
    let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let dir = q.dir().to_str().unwrap();
    let mut lines = maps.lines();
    let mut all = Vec::new();
    while lines.any(|l| l.contains(dir) && l.ends_with(".seg")) {
        let mut number = |key| {
            let line = lines.find(|l| l.starts_with(key)).unwrap();
            line.split_whitespace().nth(1).unwrap().parse().unwrap()
        };
        all.push((number("Size:"), number("Rss:")));
    }
    all
}

/// A worker that stores into a segment meets no page fault: what it has not come to yet is there already.
#[test]
fn segments_for_workers_are_faulted_in() {
    let dir = tmp();
    let (spool, _) = open(dir.path());
    let fresh = |q: &Queue| {
        let all = faulted_in(q);
        assert!(!all.is_empty());
        assert!(all.iter().all(|(size, rss)| size == rss), "{all:?}");
        all.len()
    };
    let (mut w, q) = spool.create(HOLD, Kind::Source, &lane(0)).unwrap();
    assert_eq!(fresh(&q), 1);
    // More than lie ready at the beginning, so that they are made one by one.
    for n in 0..30_000 {
        put(&mut w, n, 700);
        w.commit();
    }
    assert!(fresh(&q) > 150);
    // This test can see one that is not.
    let (_w, shipped) = spool.create(HoldId(2), Kind::Incoming, &lane(0)).unwrap();
    let all = faulted_in(&shipped);
    assert!(all.iter().all(|(size, rss)| rss < size), "{all:?}");
}
