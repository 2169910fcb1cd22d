use gangway_shared::api::{RefusalCode, Tally, VERSION};
use gangway_shared::ship::{LaneOpen, ToSource, ToTarget};

use super::*;
use crate::ship::wire;

fn refusal(w: &World, args: OutgoingArgs) -> gangway_shared::api::Refusal {
    let out = w.ship(args);
    match out.wait_connected(LONG) {
        Err(ShipError::Refused(r)) => r,
        other => panic!("{other:?}"),
    }
}

#[test]
fn only_the_expected_shipment_is_welcome() {
    let w = World::new(Sync::None);
    let r = refusal(&w, w.args());
    assert_eq!(r.code, RefusalCode::Unknown);
    let into = w.expect();
    let r = refusal(
        &w,
        OutgoingArgs {
            ticket: [8; 32],
            ..w.args()
        },
    );
    assert_eq!(r.code, RefusalCode::Unknown);
    assert!(r.message.contains("ticket"), "{r}");
    let r = refusal(
        &w,
        OutgoingArgs {
            hold: HoldId(5),
            ..w.args()
        },
    );
    assert!(r.message.contains("0000000000000005"), "{r}");
    // The right ticket, from another host.
    w.acceptor.unregister(HOLD);
    let other = Incoming::new(w.target.clone(), HOLD, TICKET, "gamma".into());
    w.acceptor.register(other.clone());
    let r = refusal(&w, w.args());
    assert!(r.message.contains("gamma"), "{r}");
    assert!(into.lanes().is_empty() && other.lanes().is_empty());
    assert_eq!(w.target.used_bytes(), 0);
}

#[test]
fn another_host_at_the_address_is_not_the_target() {
    let w = World::new(Sync::None);
    let _into = w.expect();
    let out = w.ship(OutgoingArgs {
        target_host: "gamma".into(),
        ..w.args()
    });
    let e = out.wait_connected(Duration::from_millis(500)).unwrap_err();
    assert!(matches!(e, ShipError::Timeout(Some(_))), "{e}");
    assert!(e.to_string().contains("certificate"), "{e}");
    out.close();
}

#[test]
fn nobody_at_the_address_is_a_timeout_that_says_so() {
    let w = World::new(Sync::None);
    let out = w.ship(OutgoingArgs {
        target_address: "127.0.0.1:9".into(),
        ..w.args()
    });
    let e = out.wait_connected(Duration::from_millis(200)).unwrap_err();
    assert!(matches!(e, ShipError::Timeout(_)), "{e}");
    out.close();
}

/// A source that says what it likes.
struct Rogue {
    conn: quinn::Connection,
    control: quinn::SendStream,
    answers: quinn::RecvStream,
}

impl Rogue {
    async fn new(w: &World) -> Rogue {
        let c = w
            .endpoint
            .connect_with(w.client.clone(), w.address, "beta.host.gangway");
        let conn = c.unwrap().await.unwrap();
        let (control, answers) = conn.open_bi().await.unwrap();
        Rogue {
            conn,
            control,
            answers,
        }
    }

    async fn say(&mut self, m: &ToTarget) {
        // The target may have refused already, and stopped the stream: `refused` has the verdict.
        let _ = wire::to_target(&mut self.control, m).await;
    }

    async fn welcome(w: &World) -> (Rogue, Vec<(LaneKey, u64)>) {
        let mut r = Rogue::new(w).await;
        r.say(&hello()).await;
        match wire::from_target(&mut r.answers).await.unwrap() {
            Some(ToSource::Welcome { watermarks }) => (r, watermarks),
            other => panic!("{other:?}"),
        }
    }

    async fn lane(&mut self, lane: u32) {
        let m = ToTarget::Lane {
            lane,
            key: key(0),
            inside: true,
        };
        self.say(&m).await;
    }

    async fn stream(&mut self, lane: u32, first_seq: u64, bytes: &[u8]) -> quinn::SendStream {
        let mut s = self.conn.open_uni().await.unwrap();
        let _ = wire::lane_open(&mut s, &LaneOpen { lane, first_seq }).await;
        let _ = s.write_all(bytes).await;
        s
    }

    async fn refused(mut self) -> RefusalCode {
        loop {
            let m = tokio::time::timeout(LONG, wire::from_target(&mut self.answers)).await;
            match m.unwrap().unwrap() {
                Some(ToSource::Refused(r)) => return r.code,
                Some(ToSource::Ack { .. }) => {}
                other => panic!("{other:?}"),
            }
        }
    }
}

fn hello() -> ToTarget {
    ToTarget::Hello {
        version: VERSION,
        hold: HOLD,
        ticket: TICKET,
    }
}

/// The batches of a lane with three frames, each alone.
fn records(w: &World) -> Vec<Vec<u8>> {
    let (mut writer, q) = w.queue(0);
    for n in 0..3 {
        put(&mut writer, n, 100);
    }
    writer.commit();
    let mut r = q.reader();
    let mut out = Vec::new();
    while let Some(b) = r.peek_batch().unwrap() {
        out.push(b.wire.to_vec());
        r.advance_batch();
    }
    out
}

#[test]
fn what_is_not_the_protocol_is_refused_and_changes_nothing() {
    let w = World::new(Sync::None);
    let into = w.expect();
    let rec = records(&w);
    let tampered = {
        let mut r = rec[1].clone();
        r[60] ^= 1;
        r
    };
    w.rt.block_on(async {
        // A flipped bit in the second record: the first one stays.
        let (mut r, marks) = Rogue::welcome(&w).await;
        assert!(marks.is_empty());
        r.lane(0).await;
        let both = [rec[0].clone(), tampered].concat();
        let _s = r.stream(0, 1, &both).await;
        assert_eq!(r.refused().await, RefusalCode::Malformed);

        // A gap, after a resume at the right place; a duplicate before it is dropped.
        let (mut r, marks) = Rogue::welcome(&w).await;
        assert_eq!(marks, [(key(0), 1)]);
        r.lane(3).await;
        let _s = r
            .stream(3, 1, &[rec[0].clone(), rec[2].clone()].concat())
            .await;
        assert_eq!(r.refused().await, RefusalCode::Malformed);

        // A start beyond what is here.
        let (mut r, _) = Rogue::welcome(&w).await;
        r.lane(0).await;
        let _s = r.stream(0, 3, &rec[2]).await;
        assert_eq!(r.refused().await, RefusalCode::Malformed);

        // A length beyond any frame's.
        let (mut r, _) = Rogue::welcome(&w).await;
        r.lane(0).await;
        let mut long = rec[1].clone();
        long[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
        let _s = r.stream(0, 2, &long).await;
        assert_eq!(r.refused().await, RefusalCode::Malformed);

        // An end that does not agree.
        let (mut r, _) = Rogue::welcome(&w).await;
        r.lane(0).await;
        let tally = Tally {
            frames: 1,
            bytes: 100,
            digest: 1,
        };
        r.say(&ToTarget::End { lane: 0, tally }).await;
        assert_eq!(r.refused().await, RefusalCode::Malformed);

        // An end of a lane that does not exist, and a second hello.
        let (mut r, _) = Rogue::welcome(&w).await;
        r.say(&ToTarget::End { lane: 5, tally }).await;
        assert_eq!(r.refused().await, RefusalCode::Malformed);
        let (mut r, _) = Rogue::welcome(&w).await;
        r.say(&hello()).await;
        assert_eq!(r.refused().await, RefusalCode::Malformed);

        // Lanes of names that the spool can't have.
        let (mut r, _) = Rogue::welcome(&w).await;
        let key = LaneKey {
            from: "x".repeat(1000),
            ..key(0)
        };
        r.say(&ToTarget::Lane {
            lane: 0,
            key,
            inside: true,
        })
        .await;
        assert_eq!(r.refused().await, RefusalCode::Resources);

        // Another version; no hello; garbage; a message that is too long.
        let mut r = Rogue::new(&w).await;
        r.say(&ToTarget::Hello {
            version: VERSION + 1,
            hold: HOLD,
            ticket: TICKET,
        })
        .await;
        assert_eq!(r.refused().await, RefusalCode::Version);
        let mut r = Rogue::new(&w).await;
        r.say(&ToTarget::Abort).await;
        assert_eq!(r.refused().await, RefusalCode::Malformed);
        for garbage in [&[4, 0, 0, 0, 9, 9, 9, 9][..], &[0xff; 64]] {
            let mut r = Rogue::new(&w).await;
            let _ = r.control.write_all(garbage).await;
            assert_eq!(r.refused().await, RefusalCode::Malformed);
        }
    });
    let lanes = into.lanes();
    assert_eq!(lanes.len(), 1);
    assert_eq!(lanes[0].queue.tally().frames, 1);
    assert!(!lanes[0].complete && !into.is_aborted());
    assert!(lanes[0].mismatch.is_some());

    // The real source is served all the same.
    let (mut writer, q) = {
        let q = w.source.queues(HOLD).remove(0);
        w.source.remove_hold(HOLD).unwrap();
        drop(q);
        w.queue(0)
    };
    for n in 0..3 {
        put(&mut writer, n, 100);
    }
    writer.seal();
    let out = w.ship(w.args());
    out.add_lane(key(0), true, q.clone());
    assert!(out.wait_complete(Lanes::All, LONG), "{:?}", out.error());
    assert_eq!(into.lanes()[0].queue.tally(), q.tally());
}

#[test]
fn damage_in_the_source_ends_the_shipment_with_its_place() {
    let w = World::new(Sync::None);
    let into = w.expect();
    let dir = w.dir.path().join("broken");
    let cfg = spool_config(dir.clone(), Sync::None);
    {
        let (spool, _) = Spool::open(&cfg).unwrap();
        let (mut writer, _q) = spool.create(HOLD, Kind::Source, &key(0)).unwrap();
        for n in 0..10 {
            put(&mut writer, n, 100);
        }
        writer.seal();
    }
    let path = dir.join(HOLD.to_string()).join("s-0000/000000.seg");
    let mut b = std::fs::read(&path).unwrap();
    b[256 + 3 * 176 + 70] ^= 1;
    std::fs::write(&path, b).unwrap();
    let (_spool, found) = Spool::open(&cfg).unwrap();
    let out = w.ship(w.args());
    out.add_lane(key(0), true, found[0].queue.clone());
    assert!(!out.wait_complete(Lanes::All, LONG));
    assert!(
        out.error().unwrap().contains("records 4 to 4 are damaged"),
        "{:?}",
        out.error()
    );
    until(|| !into.is_connected());
    assert!(!into.lanes().iter().any(|l| l.complete));
}

#[test]
fn a_connection_that_ends_while_its_lane_is_made_leaves_the_lane_usable() {
    let w = World::new(Sync::Batch);
    let into = w.expect();
    w.rt.block_on(async {
        for _ in 0..30 {
            let (mut r, _) = Rogue::welcome(&w).await;
            r.lane(0).await;
            r.conn.close(quinn::VarInt::from_u32(1), b"");
        }
    });
    let (mut writer, q) = w.queue(0);
    put(&mut writer, 0, 100);
    writer.seal();
    let out = w.ship(w.args());
    out.add_lane(key(0), true, q.clone());
    assert!(out.wait_complete(Lanes::All, LONG), "{:?}", out.error());
    check(&out, &into, &q, 1);
}
