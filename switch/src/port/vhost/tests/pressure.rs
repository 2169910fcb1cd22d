//! A worker with a held lane at a bound of the spool: the guest keeps its frames, and all of them arrive once there is room.

use std::sync::atomic::Ordering::Relaxed;

use gangway_shared::config::valid::{Poll, SpoolConfig};
use gangway_shared::id::{HoldId, LaneKey};

use super::*;
use crate::datapath::Engine;
use crate::datapath::tests::{config, eventually, frame, mac};
use crate::datapath::worker::Command;
use crate::port::memory::MemoryPort;
use crate::port::{Attach, Frame, PLAIN_HDR, VnetHdr};
use crate::spool::{Kind, Origin, Spool};

const SEGMENT: u64 = 128 << 10;
const ONE: HoldId = HoldId(1);
const OTHER: HoldId = HoldId(2);

fn key(to: &str) -> LaneKey {
    LaneKey {
        from: "a".into(),
        queue: 0,
        to: to.into(),
    }
}

/// Guest `a` sends to `b` until the spool has no room, of which another hold has a half.
fn held_back(limit: impl Fn(&mut SpoolConfig), why: &str, bits: u64) {
    let dir = tempfile::tempdir().unwrap();
    let mut cfg = config(&["a", "b"], 1, dir.path().into());
    cfg.workers.poll = Poll::Busy;
    cfg.spool.segment_bytes = SEGMENT;
    limit(&mut cfg.spool);
    let engine = Engine::start(&cfg).unwrap();
    let (spool, _) = Spool::open(&cfg.spool).unwrap();
    let World {
        rx: Side {
            mut driver, queue, ..
        },
        memory,
        ..
    } = World::new(bits);
    let (a, b) = (MemoryPort::default(), MemoryPort::default());
    engine.set_tx(0, vec![(0, a.queues().1)]);
    engine.attach_rx(0, 0, queue);
    let (rx, tx) = b.queues();
    engine.set_tx(1, vec![(0, tx)]);
    engine.attach_rx(1, 0, rx);
    let shared = engine.shared();
    for (at, n) in [(0, 1), (1, 2)] {
        shared.fdb.set(mac(n), at, true, 0);
    }
    let (mut other, _q) = spool.create(OTHER, Kind::Source, &key("c")).unwrap();
    let bytes = [7; 60];
    let one = [Frame::from_slice(VnetHdr::default(), &bytes)];
    for _ in 0..1800 {
        eventually("the other hold has room", || {
            other.append_run(1, &one, Origin::NONE) == 1
        });
        other.commit();
    }
    let (writer, q) = spool.create(ONE, Kind::Source, &key("b")).unwrap();
    let seat = engine.pin().seats(0)[0];
    engine.batch(vec![Command::Hold(seat, 1, writer)]).unwrap();

    let mut sent = 0;
    let mut offer = |driver: &mut Driver| {
        driver.reap();
        let mut packet = PLAIN_HDR.to_vec();
        packet.extend(frame(1, mac(2), sent));
        let there_is_room = driver.send(&packet, 1, false);
        sent += u32::from(there_is_room);
        there_is_room
    };
    // The worker goes on with others, round after round.
    let mut rounds = 0;
    let mut round = || {
        b.push(frame(2, mac(1), rounds));
        rounds += 1;
        eventually("b's frame is delivered", || {
            a.delivered().len() == rounds as usize
        });
    };
    eventually(
        "the spool says that it has no room, and takes nothing",
        || {
            while offer(&mut driver) {}
            round();
            driver.free_descs() == 0
                && spool.trouble(Some(ONE)).is_some_and(|t| t.contains(why))
                && driver.reap().is_empty()
        },
    );
    let ring = |driver: &Driver| memory.read(driver.at[2], 4 + 8 * usize::from(NUM));
    let (used, held) = (ring(&driver), q.last_seq());
    (0..50).for_each(|_| round());
    assert_eq!(driver.reap().len(), 0, "the guest has nothing back");
    assert_eq!((ring(&driver), q.last_seq()), (used, held));
    assert_eq!(
        held + u64::from(NUM),
        u64::from(sent),
        "all that is not held is in its ring"
    );
    let dropped = || -> u64 {
        let drops = shared.ports.iter().flat_map(|p| &p.counters.drops);
        drops.map(|d| d.load(Relaxed)).sum()
    };
    assert_eq!(dropped(), 0);

    drop((other, _q));
    spool.remove_hold(OTHER).unwrap();
    eventually("all of it is held", || q.last_seq() == u64::from(sent));
    eventually("nobody waits", || spool.trouble(None).is_none());
    assert_eq!(driver.reap().len(), usize::from(NUM));
    let back = vec![Command::PutBack(seat, 1, None, Arc::default())];
    engine.batch(back).unwrap();
    eventually("all of it arrives", || b.delivered().len() >= sent as usize);
    let number = |f: &Vec<u8>| u32::from_be_bytes(f[20..24].try_into().unwrap());
    let got: Vec<u32> = b.delivered().iter().map(number).collect();
    assert!(got.into_iter().eq(0..sent), "in order, each once");
    assert_eq!(dropped(), 0);
    engine.stop();
}

#[test]
fn a_guest_keeps_its_frames_at_the_quota_of_bytes() {
    for bits in [VERSION_1, VERSION_1 | PACKED] {
        let limit = |s: &mut SpoolConfig| s.quota_bytes = 4 * SEGMENT;
        held_back(limit, "spool.quota_bytes", bits);
    }
}

#[test]
fn a_guest_keeps_its_frames_at_the_quota_of_frames() {
    for bits in [VERSION_1, VERSION_1 | PACKED] {
        let limit = |s: &mut SpoolConfig| s.limits.quota_frames = Some(3000);
        held_back(limit, "spool.quota_frames", bits);
    }
}
