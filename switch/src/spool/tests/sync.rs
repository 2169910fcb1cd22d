//! What is on the disk when, and that nobody who appends waits for it. A disk is slow while a test has the queue's lock of
//! it; a loss of power leaves what was forced, and any of the other pages.

use proptest::prelude::*;

use super::*;
use crate::spool::queue::Reach;

fn spool(dir: &Path, sync: Sync, sync_bytes: u64) -> Arc<Spool> {
    let mut cfg = config(dir, 128 << 10, 64 << 20);
    cfg.sync = sync;
    cfg.limits.sync_ms = 1;
    cfg.limits.sync_bytes = sync_bytes;
    Spool::open(&cfg).unwrap().0
}

#[test]
fn with_each_nothing_is_settled_before_the_disk_has_it() {
    let dir = tmp();
    let spool = spool(dir.path(), Sync::Each, 1 << 20);
    let (mut w, q) = spool.create(HOLD, Kind::Source, &lane(0)).unwrap();
    let slow = q.disk.lock().unwrap();
    for n in 0..20 {
        put(&mut w, n, 500);
    }
    w.commit();
    // Committed and to be read, not to be given back.
    assert_eq!(all(&q).0.len(), 20);
    let owed = w.owed().expect("the disk has nothing");
    assert!(!owed.is_settled());
    assert_eq!(q.durable_seq(), 0);
    drop(slow);
    until(|| owed.is_settled());
    assert_eq!(q.durable_seq(), 20);
    assert!(w.owed().is_none());
    // A shipment is acknowledged when it is synced; its writer owes nothing.
    let (mut w, _q) = spool.create(HOLD, Kind::Incoming, &lane(0)).unwrap();
    put(&mut w, 1, 500);
    w.commit();
    assert!(w.owed().is_none());
}

#[test]
fn a_disk_that_is_behind_is_backpressure_at_the_bound() {
    for sync in [Sync::Batch, Sync::Each, Sync::None] {
        let dir = tmp();
        let spool = spool(dir.path(), sync, 1 << 20);
        let (mut w, q) = spool.create(HOLD, Kind::Source, &lane(0)).unwrap();
        let slow = q.disk.lock().unwrap();
        let mut n = 0;
        let mut idle = Instant::now();
        while n < 2000 && idle.elapsed() < Duration::from_millis(300) {
            if w.has_room(1500) {
                put(&mut w, n, 1500);
                w.commit();
                n += 1;
                idle = Instant::now();
            }
        }
        let limit = (1 << 20) / 1500;
        if sync == Sync::None {
            assert_eq!(n, 2000, "nobody asks the disk");
            continue;
        }
        assert!(n <= limit && n > limit - 50, "{sync:?}: {n}");
        let frame = bytes(0, 1500);
        assert_eq!(
            w.append(0, &Frame::from_slice(vnet(0), &frame), Origin::NONE),
            Err(NoRoom)
        );
        drop(slow);
        until(|| w.has_room(1500));
    }
}

#[test]
fn a_page_that_is_being_written_is_left_alone_for_one_tick() {
    let dir = tmp();
    let (spool, _) = open(dir.path());
    let (mut w, q) = spool.create(HOLD, Kind::Source, &lane(0)).unwrap();
    let on_disk = |q: &Queue| q.on_disk()[0].1;
    for n in 0..10 {
        put(&mut w, n, 1500);
    }
    w.commit();
    q.sync_now(Reach::Pages).unwrap();
    assert_eq!((on_disk(&q) % 4096, q.durable_seq()), (0, 0));
    let first = on_disk(&q);
    assert!(first > 0);
    // The lane goes on: what was whole then is on the disk, the new last page is not.
    for n in 10..20 {
        put(&mut w, n, 1500);
    }
    w.commit();
    q.sync_now(Reach::Pages).unwrap();
    assert_eq!((on_disk(&q) % 4096, q.durable_seq()), (0, 0));
    assert!(on_disk(&q) > first);
    // It rests.
    q.sync_now(Reach::Pages).unwrap();
    assert_eq!(q.durable_seq(), 20);
    // A slow one, whose page stays the last one, is not older than two ticks.
    put(&mut w, 20, 60);
    w.commit();
    q.sync_now(Reach::Pages).unwrap();
    assert_eq!(q.durable_seq(), 21);
}

#[test]
fn batch_forces_what_rests_without_being_asked() {
    let dir = tmp();
    let spool = spool(dir.path(), Sync::Batch, 1 << 20);
    let (mut w, q) = spool.create(HOLD, Kind::Source, &lane(0)).unwrap();
    for n in 0..300 {
        put(&mut w, n, 1500);
    }
    w.commit();
    assert!(w.owed().is_none(), "its sender does not wait");
    until(|| q.durable_seq() == 300);
}

#[test]
fn after_a_failed_sync_nothing_is_taken_and_nothing_is_settled() {
    let dir = tmp();
    let spool = spool(dir.path(), Sync::Each, 1 << 20);
    let (mut w, q) = spool.create(HOLD, Kind::Source, &lane(0)).unwrap();
    *q.disk.lock().unwrap() = true;
    put(&mut w, 0, 100);
    w.commit();
    until(|| q.failed().is_some());
    let owed = w.owed().expect("it is not on the disk");
    assert!(!w.has_room(64));
    assert!(q.sync().is_err());
    assert!(!owed.is_settled());
    // What was committed is there for a flush; when the hold is over its sender gets its buffers back.
    assert_eq!(all(&q).0, [1]);
    spool.remove_hold(HOLD).unwrap();
    assert!(owed.is_settled());
}

#[derive(Debug, Clone)]
enum Op {
    Frames(u8, u16),
    Commit,
    Tick,
    Sync,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        5 => (1u8..40, 60u16..9000).prop_map(|(n, len)| Op::Frames(n, len)),
        4 => Just(Op::Commit),
        3 => Just(Op::Tick),
        1 => Just(Op::Sync),
    ]
}

/// What a disk has after a loss of power: all below the forced end, and of the rest any page as it was in memory.
fn image(from: &Path, to: &Path, q: &Queue, keep: &[bool]) {
    std::fs::create_dir_all(to).unwrap();
    std::fs::copy(from.join("queue.meta"), to.join("queue.meta")).unwrap();
    let mut keep = keep.iter().cycle();
    for (number, forced) in q.on_disk() {
        let name = format!("{number:06}.seg");
        let mut b = std::fs::read(from.join(&name)).unwrap();
        for (n, page) in b.chunks_mut(4096).enumerate() {
            if !keep.next().unwrap() {
                let forced = (forced as usize).saturating_sub(n * 4096).min(4096);
                page[forced..].fill(0);
            }
        }
        std::fs::write(to.join(&name), b).unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    /// Whatever was said to be on the disk is there, in order and intact; of the rest, what is there is intact, too.
    #[test]
    fn a_loss_of_power_takes_nothing_that_was_durable(
        ops in proptest::collection::vec(op(), 1..40),
        keep in proptest::collection::vec(any::<bool>(), 1..20),
    ) {
        let (dir, after) = (tmp(), tmp());
        let (spool, _) = open(dir.path());
        let (mut w, q) = spool.create(HOLD, Kind::Source, &lane(0)).unwrap();
        let mut n = 0;
        for op in ops {
            match op {
                Op::Frames(count, len) => for _ in 0..count {
                    put(&mut w, n, len.into());
                    n += 1;
                },
                Op::Commit => w.commit(),
                Op::Tick => q.sync_now(Reach::Pages).unwrap(),
                Op::Sync => {
                    q.sync_now(Reach::All).unwrap();
                    prop_assert_eq!(q.durable_seq(), q.last_seq());
                }
            }
        }
        let durable = q.durable_seq();
        let part = Path::new(&HOLD.to_string()).join("s-0000");
        image(&dir.path().join(&part), &after.path().join(&part), &q, &keep);
        let (_spool, mut found) = open(after.path());
        let r = found.remove(0);
        let (seqs, bad) = all(&r.queue);
        prop_assert!(seqs.iter().copied().take(durable as usize).eq(1..=durable), "{seqs:?}");
        prop_assert!(bad.iter().all(|d| d.first_seq > durable), "{bad:?}");
    }
}
