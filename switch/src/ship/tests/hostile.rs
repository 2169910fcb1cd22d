use gangway_shared::api::{Refusal, RefusalCode, Tally, VERSION};
use gangway_shared::ship::{LaneOpen, ToSource, ToTarget};

use super::*;
use crate::said::tests::{listen, logged};
use crate::ship::wire;

fn refusal(w: &World, args: OutgoingArgs) -> Refusal {
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
    let other = w.incoming(HOLD, TICKET, "gamma");
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

    async fn refused(self) -> RefusalCode {
        self.refusal().await.code
    }

    async fn refusal(mut self) -> Refusal {
        loop {
            let m = tokio::time::timeout(LONG, wire::from_target(&mut self.answers)).await;
            match m.unwrap().unwrap() {
                Some(ToSource::Refused(r)) => return r,
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
    records_of(w, HOLD, &key(0))
}

fn records_of(w: &World, hold: HoldId, key: &LaneKey) -> Vec<Vec<u8>> {
    let (mut writer, q) = w.source.create(hold, Kind::Source, key).unwrap();
    for n in 0..3 {
        put(&mut writer, n, 100);
    }
    writer.commit();
    batches(&q)
}

fn batches(q: &Arc<Queue>) -> Vec<Vec<u8>> {
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
        let no = r.refusal().await;
        assert_eq!(no.code, RefusalCode::Version);
        let both = format!("version {VERSION}, the peer {}", VERSION + 1);
        assert!(no.message.contains(&both), "{no}");
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

/// It was refused so, and the text names all this.
fn is_malformed(no: &Refusal, words: &[&str]) {
    assert_eq!(no.code, RefusalCode::Malformed, "{no}");
    for word in words {
        assert!(no.message.contains(word), "no {word:?} in: {no}");
    }
}

#[test]
fn a_ticket_of_another_hold_opens_neither_and_the_log_says_so_once() {
    listen();
    let w = World::new(Sync::None);
    let other = HoldId(0xb0d1_e5b0_d1e5_0001);
    let (mine, its) = (w.expect(), w.incoming(other, [9; 32], "alpha"));
    w.acceptor.register(its.clone());
    for _ in 0..3 {
        for (hold, ticket) in [(HOLD, [9; 32]), (other, TICKET)] {
            let no = w.rt.block_on(async {
                let mut r = Rogue::new(&w).await;
                let version = VERSION;
                r.say(&ToTarget::Hello {
                    version,
                    hold,
                    ticket,
                })
                .await;
                r.refusal().await
            });
            assert_eq!(no.code, RefusalCode::Unknown);
            assert_eq!(no.message, format!("the ticket is not that of hold {hold}"));
        }
    }
    for i in [&mine, &its] {
        assert!(i.lanes().is_empty() && !i.is_connected());
        assert_eq!(i.error(), None);
    }
    assert_eq!(w.target.used_bytes(), 0);
    let id = other.to_string();
    let words = ["host 'alpha': shipment of hold", id.as_str(), "ticket"];
    until(|| !logged(&words).is_empty());
    // The last one may take a moment.
    std::thread::sleep(Duration::from_millis(300));
    let lines = logged(&words);
    assert_eq!(lines.len(), 1, "{lines:#?}");
}

#[test]
fn a_lane_that_is_complete_takes_nothing_more() {
    let w = World::new(Sync::None);
    let into = w.expect();
    let (mut writer, q) = w.queue(0);
    for n in 0..3 {
        put(&mut writer, n, 100);
    }
    writer.seal();
    let out = w.ship(w.args());
    out.add_lane(key(0), true, q.clone());
    assert!(out.wait_complete(Lanes::All, LONG), "{:?}", out.error());
    out.close();
    until(|| !into.is_connected());
    let rec = batches(&q);
    w.rt.block_on(async {
        // All of it once more; the same frames as if they were new ones; another end.
        for (first_seq, bytes) in [(1, rec.concat()), (4, rec[0].clone())] {
            let (mut r, marks) = Rogue::welcome(&w).await;
            assert_eq!(marks, [(key(0), 3)]);
            r.lane(0).await;
            let _s = r.stream(0, first_seq, &bytes).await;
            let no = r.refusal().await;
            is_malformed(&no, &["lane 0 is complete", "nothing follows record 3"]);
        }
        let (mut r, _) = Rogue::welcome(&w).await;
        r.lane(0).await;
        let tally = Tally {
            frames: 2,
            ..q.tally()
        };
        r.say(&ToTarget::End { lane: 0, tally }).await;
        is_malformed(&r.refusal().await, &["complete with", "frames: 3"]);
    });
    let l = into.lanes().remove(0);
    assert!(l.complete && l.queue.is_sealed());
    assert_eq!(l.mismatch, None);
    assert_eq!((l.acked, l.queue.tally()), (q.tally(), q.tally()));
    // And when the hold is over, nobody knows of it.
    drop(l);
    w.acceptor.unregister(HOLD);
    let r = refusal(&w, w.args());
    assert_eq!(r.code, RefusalCode::Unknown);
    assert!(r.message.contains("no shipment of hold"), "{r}");
}

#[test]
fn what_ends_inside_of_something_is_refused_and_what_was_whole_stays() {
    let w = World::new(Sync::None);
    let into = w.expect();
    let rec = records(&w);
    w.rt.block_on(async {
        // A lane inside its second batch.
        let (mut r, _) = Rogue::welcome(&w).await;
        r.lane(0).await;
        let half = &rec[1][..rec[1].len() / 2];
        let mut s = r.stream(0, 1, &[&rec[0][..], half].concat()).await;
        s.finish().unwrap();
        let words = ["lane 0 ends inside a batch", "record 2 must follow"];
        is_malformed(&r.refusal().await, &words);

        // A lane inside its first message.
        let (mut r, _) = Rogue::welcome(&w).await;
        r.lane(0).await;
        let mut s = r.conn.open_uni().await.unwrap();
        s.write_all(&[9, 0, 0, 0, 1]).await.unwrap();
        s.finish().unwrap();
        is_malformed(&r.refusal().await, &["1 bytes where 9 must stand"]);

        // The control stream, before and behind Hello, and without a word.
        for greeted in [false, true] {
            let mut r = match greeted {
                true => Rogue::welcome(&w).await.0,
                false => Rogue::new(&w).await,
            };
            let _ = r.control.write_all(&[20, 0, 0, 0, 1, 2, 3]).await;
            r.control.finish().unwrap();
            is_malformed(&r.refusal().await, &["3 bytes where 20 must stand"]);
        }
        let mut r = Rogue::new(&w).await;
        r.control.finish().unwrap();
        is_malformed(&r.refusal().await, &["where Hello must stand"]);
    });
    let lanes = into.lanes();
    assert_eq!((lanes.len(), lanes[0].queue.tally().frames), (1, 1));
    assert!(!lanes[0].complete);
}

#[test]
fn frames_of_another_lane_or_hold_and_lanes_to_other_ports_are_refused() {
    let w = World::new(Sync::None);
    let into = w.expect();
    let other = HoldId(0xb0d1_e5b0_d1e5_0002);
    let foreign = [
        records_of(&w, HOLD, &key(1)),
        records_of(&w, other, &key(0)),
    ];
    w.rt.block_on(async {
        for rec in &foreign {
            let (mut r, _) = Rogue::welcome(&w).await;
            r.lane(0).await;
            let _s = r.stream(0, 1, &rec[0]).await;
            let words = [
                "lane 0: no intact batch of this lane",
                "record 1 must follow",
            ];
            is_malformed(&r.refusal().await, &words);
        }
        let (mut r, _) = Rogue::welcome(&w).await;
        let key = LaneKey {
            to: "web9".into(),
            ..key(0)
        };
        r.say(&ToTarget::Lane {
            lane: 0,
            key,
            inside: true,
        })
        .await;
        is_malformed(&r.refusal().await, &["port 'web9'", "are db0, db1"]);
    });
    let lanes = into.lanes();
    assert_eq!((lanes.len(), lanes[0].queue.tally().frames), (1, 0));
    assert!(!into.is_named() && !lanes[0].complete);
}

#[test]
fn a_source_that_is_not_let_in_says_why() {
    let w = World::new(Sync::None);
    let into = w.expect();
    let other = tempfile::tempdir().unwrap();
    let d = other.path();
    gangway::pki::init(d).unwrap();
    let ca = |dir: &Path| std::fs::read_to_string(dir.join("ca.pem")).unwrap();
    std::fs::write(d.join("both.pem"), ca(w.dir.path()) + &ca(d)).unwrap();
    let files = TlsFiles {
        ca: d.join("both.pem"),
        crl: None,
        ..issue(d, "alpha")
    };
    let _in = w.rt.enter();
    let stranger = listen_as(d, "alpha", files).1.ship_client().unwrap();
    let rt = w.rt.handle().clone();
    let out = Outgoing::start(rt, w.endpoint.clone(), stranger, w.args());
    let e = out.wait_connected(Duration::from_secs(1)).unwrap_err();
    assert!(matches!(e, ShipError::Timeout(Some(_))), "{e}");
    let why = "invalid peer certificate: UnknownIssuer";
    assert!(e.to_string().contains(why), "{e}");
    out.close();
    assert!(into.lanes().is_empty() && !into.is_connected());
}
