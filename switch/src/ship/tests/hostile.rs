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
        r.say(&hello(w)).await;
        match wire::from_target(&mut r.answers).await.unwrap() {
            Some(ToSource::Welcome { watermarks }) => (r, watermarks),
            other => panic!("{other:?}"),
        }
    }

    async fn lane(&mut self, lane: u32) {
        self.name(lane, key(0)).await;
    }

    async fn name(&mut self, lane: u32, key: LaneKey) {
        let inside = true;
        self.say(&ToTarget::Lane { lane, key, inside }).await;
    }

    async fn stream(&mut self, lane: u32, first_seq: u64, bytes: &[u8]) -> quinn::SendStream {
        let mut s = self.conn.open_uni().await.unwrap();
        let _ = wire::lane_open(&mut s, &LaneOpen { lane, first_seq }).await;
        let _ = s.write_all(bytes).await;
        s
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

fn hello(w: &World) -> ToTarget {
    ToTarget::Hello {
        version: VERSION,
        hold: w.hold,
        ticket: TICKET,
    }
}

/// The batches of a lane with three frames, each alone.
fn records(w: &World) -> Vec<Vec<u8>> {
    records_of(w, w.hold, &key(0))
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
    listen();
    let mut w = World::new(Sync::None);
    w.hold = HoldId(0xb0d1_e5b0_d1e5_0004);
    let into = w.expect();
    let rec = records(&w);
    let changed = |at: usize, with: &[u8]| {
        let mut r = rec[1].clone();
        r[at..at + with.len()].copy_from_slice(with);
        r
    };
    let flipped = changed(60, &[rec[1][60] ^ 1]);
    let long = changed(8, &u32::MAX.to_le_bytes());
    let tally = Tally {
        frames: 1,
        bytes: 100,
        digest: 1,
    };
    let after = |first: &[u8]| [first, &rec[2][..]].concat();
    for _ in 0..TIMES {
        w.rt.block_on(async {
            let batches = [
                // The first record stays, and is not looked at when it comes again.
                (
                    1,
                    [&rec[0][..], &flipped].concat(),
                    "no intact batch of this lane where record 2 must follow",
                ),
                (1, after(&rec[0]), "lane 0: record 3 where 2 must follow"),
                (
                    3,
                    rec[2].clone(),
                    "lane 0 goes on at record 3, 2 is missing",
                ),
                (
                    2,
                    long.clone(),
                    "impossible length in the header where record 2 must follow",
                ),
            ];
            for (first_seq, bytes, why) in batches {
                let (mut r, _) = Rogue::welcome(&w).await;
                r.lane(0).await;
                let _s = r.stream(0, first_seq, &bytes).await;
                is_malformed(&r.refusal().await, &[why]);
            }
            // A number, or a lane, for the second time; no queue is made.
            for (lane, other, why) in [
                (0, 1, "lane 0 was named twice"),
                (1, 0, "is 0 on this connection, and 1"),
            ] {
                let (mut r, _) = Rogue::welcome(&w).await;
                r.lane(0).await;
                r.name(lane, key(other)).await;
                is_malformed(&r.refusal().await, &[why]);
            }
            // With the watermark, and an end that does not agree.
            let (mut r, marks) = Rogue::welcome(&w).await;
            assert_eq!(marks, [(key(0), 1)]);
            r.lane(0).await;
            r.say(&ToTarget::End { lane: 0, tally }).await;
            is_malformed(
                &r.refusal().await,
                &["source has Tally", "digest: 1 }, target Tally"],
            );
            // What no session has.
            for (m, why) in [
                (
                    ToTarget::End { lane: 5, tally },
                    "an end of lane 5, which was not named; 0 lanes were",
                ),
                (
                    ToTarget::Named { lanes: 3 },
                    "3 lanes were named, 0 are known",
                ),
                (hello(&w), "a second Hello; a connection has one"),
            ] {
                let (mut r, _) = Rogue::welcome(&w).await;
                r.say(&m).await;
                is_malformed(&r.refusal().await, &[why]);
            }
            // A name that the spool can't have.
            let (mut r, _) = Rogue::welcome(&w).await;
            let from = "x".repeat(1000);
            r.name(0, LaneKey { from, ..key(0) }).await;
            let no = r.refusal().await;
            assert_eq!(no.code, RefusalCode::Resources);
            assert!(
                no.message
                    .starts_with("the name of a spooled port has 1 to 64 bytes, not 1000"),
                "{no}"
            );

            let mut r = Rogue::new(&w).await;
            let version = VERSION + 1;
            let (hold, ticket) = (w.hold, TICKET);
            r.say(&ToTarget::Hello {
                version,
                hold,
                ticket,
            })
            .await;
            let no = r.refusal().await;
            assert_eq!(no.code, RefusalCode::Version);
            let both = format!("this switch speaks version {VERSION}, the peer {version}; upgrade");
            assert!(no.message.contains(&both), "{no}");

            // No Hello; no message; one that is too long.
            let mut r = Rogue::new(&w).await;
            r.say(&ToTarget::Abort).await;
            is_malformed(
                &r.refusal().await,
                &["the first message must be Hello, not Abort"],
            );
            for (garbage, why) in [
                (&[4, 0, 0, 0, 77, 9, 9, 9][..], "Invalid tag encoding: 77"),
                (
                    &[0xf1, 0xff, 0xff, 0x7f, 1],
                    "message of 2147483633 bytes, at most 1048576 are allowed",
                ),
            ] {
                let mut r = Rogue::new(&w).await;
                let _ = r.control.write_all(garbage).await;
                is_malformed(&r.refusal().await, &[why]);
            }
        });
    }
    let lanes = into.lanes();
    assert_eq!(lanes.len(), 1);
    assert_eq!(lanes[0].queue.tally().frames, 1);
    assert!(!lanes[0].complete && !into.is_aborted() && !into.is_named());
    assert!(lanes[0].mismatch.is_some());
    in_the_log_once(
        &w,
        &[
            "no intact batch of this lane where record 2 must follow",
            "lane 0: record 3 where 2 must follow",
            "lane 0 goes on at record 3, 2 is missing",
            "impossible length in the header where record 2 must follow",
            "source has Tally",
            "an end of lane 5",
            "3 lanes were named, 0 are known",
            "a second Hello",
            "the name of a spooled port has 1 to 64 bytes, not 1000",
            "this switch speaks version",
        ],
    );
    for why in [
        "must be Hello, not Abort",
        "tag encoding: 77",
        "message of 2147483633 bytes",
    ] {
        once(&["WARN", "host 'alpha': shipment refused: ", why]);
    }

    // The real source is served all the same.
    let (mut writer, q) = {
        let q = w.source.queues(w.hold).remove(0);
        w.source.remove_hold(w.hold).unwrap();
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

/// How often each thing is tried.
const TIMES: usize = 3;

/// The one line of the log that has all these words.
fn once(words: &[&str]) {
    until(|| !logged(words).is_empty());
    // The last one may take a moment.
    std::thread::sleep(Duration::from_millis(100));
    let lines = logged(words);
    assert_eq!(lines.len(), 1, "{words:?}: {lines:#?}");
}

/// That this world's hold was refused, for each of these reasons.
fn in_the_log_once(w: &World, reasons: &[&str]) {
    let whose = format!("host 'alpha': shipment of hold {} refused: ", w.hold);
    for why in reasons {
        once(&["WARN", &whose, why]);
    }
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
    once(&["host 'alpha': shipment of hold", &id, "ticket"]);
}

#[test]
fn a_source_that_is_cut_off_again_and_again_is_in_the_log_once() {
    listen();
    let mut w = World::new(Sync::None);
    w.hold = HoldId(0xb0d1_e5b0_d1e5_0008);
    let into = w.expect();
    for _ in 0..TIMES {
        let (r, _) = w.rt.block_on(Rogue::welcome(&w));
        r.conn.close(quinn::VarInt::from_u32(9), b"cut by the test");
        until(|| !into.is_connected());
    }
    let whose = format!("host 'alpha': shipment of hold {}", w.hold);
    once(&["INFO", &whose, "the connection was lost", "cut by the test"]);
}

#[test]
fn a_lane_that_is_complete_takes_nothing_more() {
    listen();
    let mut w = World::new(Sync::None);
    w.hold = HoldId(0xb0d1_e5b0_d1e5_0005);
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
    for _ in 0..TIMES {
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
    }
    in_the_log_once(
        &w,
        &[
            "lane 0 is complete, nothing follows record 3",
            "complete with Tally",
        ],
    );
    let l = into.lanes().remove(0);
    assert!(l.complete && l.queue.is_sealed());
    assert_eq!(l.mismatch, None);
    assert_eq!((l.acked, l.queue.tally()), (q.tally(), q.tally()));
    // And when the hold is over, nobody knows of it.
    drop(l);
    w.acceptor.unregister(w.hold);
    let r = refusal(&w, w.args());
    assert_eq!(r.code, RefusalCode::Unknown);
    assert!(r.message.contains("no shipment of hold"), "{r}");
}

#[test]
fn what_ends_inside_of_something_is_refused_and_what_was_whole_stays() {
    listen();
    let mut w = World::new(Sync::None);
    w.hold = HoldId(0xb0d1_e5b0_d1e5_0006);
    let into = w.expect();
    let rec = records(&w);
    for _ in 0..TIMES {
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
    }
    in_the_log_once(
        &w,
        &[
            "lane 0 ends inside a batch",
            "1 bytes where 9 must stand",
            "3 bytes where 20 must stand",
        ],
    );
    for why in ["3 bytes where 20 must stand", "where Hello must stand"] {
        once(&["WARN", "host 'alpha': shipment refused: ", why]);
    }
    let lanes = into.lanes();
    assert_eq!((lanes.len(), lanes[0].queue.tally().frames), (1, 1));
    assert!(!lanes[0].complete);
}

#[test]
fn frames_of_another_lane_or_hold_and_lanes_to_other_ports_are_refused() {
    listen();
    let mut w = World::new(Sync::None);
    w.hold = HoldId(0xb0d1_e5b0_d1e5_0007);
    let into = w.expect();
    let other = HoldId(0xb0d1_e5b0_d1e5_0002);
    let foreign = [
        records_of(&w, w.hold, &key(1)),
        records_of(&w, other, &key(0)),
    ];
    for _ in 0..TIMES {
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
    }
    in_the_log_once(
        &w,
        &[
            "lane 0: no intact batch of this lane where record 1 must follow",
            "a lane to port 'web9'",
        ],
    );
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
