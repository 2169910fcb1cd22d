use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use gangway_shared::api::VERSION;
use gangway_shared::codec;

use super::*;
use crate::spool::Recovered;

#[test]
fn lanes_arrive_while_they_are_written() {
    for sync in [Sync::None, Sync::Batch] {
        let w = World::new(sync);
        let into = w.expect();
        let out = w.ship(w.args());
        out.wait_connected(LONG).unwrap();
        let mut queues: Vec<_> = (0..4).map(|n| w.queue(n)).collect();
        for (n, (_, q)) in queues.iter().enumerate() {
            let inside = n % 2 == 0;
            assert_eq!(out.add_lane(q.lane().clone(), inside, q.clone()), n as u32);
            assert_eq!(out.add_lane(q.lane().clone(), inside, q.clone()), n as u32);
        }
        // The last one stays empty.
        for n in 0..6000 {
            for (writer, _) in &mut queues[..3] {
                put(writer, n, 60 + (n as usize * 37) % 1400);
                if n % 32 == 0 {
                    writer.commit();
                }
            }
        }
        let first = queues[0].1.clone();
        queues[0].0.commit();
        until(|| {
            let s = &out.status()[0];
            s.acked_seq == 6000 && s.acked == first.tally() && !s.complete
        });
        assert!(!out.wait_complete(Lanes::Inside, Duration::from_millis(50)));
        queues[0].0.seal();
        queues[2].0.seal();
        let t = Instant::now();
        assert!(out.wait_complete(Lanes::Inside, LONG));
        println!("{sync:?}: seal to complete, 2 lanes: {:?}", t.elapsed());
        assert!(into.wait_complete(Lanes::Inside, LONG));
        assert!(!out.wait_complete(Lanes::All, Duration::ZERO));
        queues[1].0.seal();
        queues[3].0.seal();
        assert!(out.wait_complete(Lanes::All, LONG));
        for (n, (_, q)) in queues.iter().enumerate() {
            check(&out, &into, q, if n < 3 { 6000 } else { 0 });
        }
        assert_eq!((out.error(), into.error()), (None, None));
        out.close();
        until(|| !into.is_connected());
        assert_eq!(into.error(), None);
        into.stop();
    }
}

#[test]
fn the_tail_is_acknowledged_after_the_seal() {
    for sync in [Sync::None, Sync::Batch] {
        let w = World::new(sync);
        let into = w.expect();
        let out = w.ship(w.args());
        out.wait_connected(LONG).unwrap();
        let mut took = Vec::new();
        for n in 0..20 {
            let (mut writer, q) = w.queue(n);
            q.sync().unwrap();
            out.add_lane(key(n), true, q.clone());
            for i in 0..200 {
                put(&mut writer, i, 1000);
                writer.commit();
            }
            until(|| out.status()[usize::from(n)].acked_seq > 0);
            for i in 200..232 {
                put(&mut writer, i, 1000);
            }
            writer.seal();
            let t = Instant::now();
            assert!(out.wait_complete(Lanes::All, LONG));
            took.push(t.elapsed());
            check(&out, &into, &q, 232);
        }
        took.sort();
        println!(
            "{sync:?}: seal to complete: median {:?}, worst {:?}",
            took[10], took[19]
        );
    }
}

#[test]
fn a_lost_connection_goes_on_where_it_was() {
    let w = World::new(Sync::None);
    let into = w.expect();
    let out = w.ship(w.args());
    out.wait_connected(LONG).unwrap();
    let (mut writer, q) = w.queue(0);
    let (mut other, q1) = w.queue(1);
    out.add_lane(key(0), true, q.clone());
    for n in 0..30_000 {
        put(&mut writer, n, 500);
        put(&mut other, n, 100);
        if n % 16 == 0 {
            writer.commit();
            other.commit();
        }
        if n % 3000 == 1500 {
            w.cut();
        }
        if n == 10_000 {
            out.add_lane(key(1), false, q1.clone());
        }
    }
    writer.seal();
    other.seal();
    w.cut();
    assert!(out.wait_complete(Lanes::All, LONG), "{:?}", out.error());
    check(&out, &into, &q, 30_000);
    check(&out, &into, &q1, 30_000);
}

#[test]
fn a_pulled_cable_is_noticed_and_survived_by_both_ends() {
    let w = World::new(Sync::None);
    let into = w.expect();
    let out = w.ship(OutgoingArgs {
        target_address: w.relayed.to_string(),
        ..w.args()
    });
    out.wait_connected(LONG).unwrap();
    let (mut writer, q) = w.queue(0);
    out.add_lane(key(0), true, q.clone());
    for n in 0..2000 {
        put(&mut writer, n, 500);
    }
    writer.commit();
    until(|| out.status()[0].acked_seq > 0);
    w.relay.store(false, Ordering::Relaxed);
    for n in 2000..4000 {
        put(&mut writer, n, 500);
    }
    writer.seal();
    until(|| out.error().is_some() && !out.is_connected());
    assert!(!out.wait_complete(Lanes::All, Duration::ZERO));
    w.relay.store(true, Ordering::Relaxed);
    assert!(out.wait_complete(Lanes::All, LONG), "{:?}", out.error());
    check(&out, &into, &q, 4000);
}

#[test]
fn a_restarted_target_goes_on_with_what_it_had() {
    let mut w = World::new(Sync::None);
    let into = w.expect();
    let out = w.ship(w.args());
    out.wait_connected(LONG).unwrap();
    let (mut writer, q) = w.queue(0);
    out.add_lane(key(0), true, q.clone());
    for n in 0..5000 {
        put(&mut writer, n, 500);
    }
    writer.commit();
    until(|| out.status()[0].acked_seq == 5000);
    // The process dies and starts again.
    w.acceptor.unregister(HOLD);
    until(|| !into.is_connected() && into.turn.try_lock().is_ok());
    drop(into);
    let found = reopen(&mut w.target, &w.dir, "target");
    assert_eq!(found.len(), 1);
    until(|| out.error().is_some_and(|e| e.contains("is expected here")));
    let into = w.incoming(HOLD, TICKET, "alpha");
    found.into_iter().for_each(|f| into.adopt(f));
    w.acceptor.register(into.clone());
    for n in 5000..7000 {
        put(&mut writer, n, 500);
    }
    writer.seal();
    assert!(out.wait_complete(Lanes::All, LONG), "{:?}", out.error());
    check(&out, &into, &q, 7000);
    assert_eq!(handed(&out), on_the_wire(&q, 0), "each record went once");
}

/// As a switch that starts again finds this spool.
fn reopen(spool: &mut Arc<Spool>, dir: &TempDir, name: &str) -> Vec<Recovered> {
    let config = |name: &str| spool_config(dir.path().join(name), Sync::None);
    let empty = Spool::open(&config("other")).unwrap().0;
    drop(std::mem::replace(spool, empty));
    let mut found = Vec::new();
    until(|| match Spool::open(&config(name)) {
        Ok((again, f)) => {
            *spool = again;
            found = f;
            true
        }
        Err(e) => {
            assert!(matches!(e, crate::spool::SpoolError::InUse(_)));
            false
        }
    });
    found
}

#[test]
fn a_cut_connection_goes_on_at_the_watermark() {
    let w = World::new(Sync::None);
    let into = w.expect();
    let out = w.ship(w.args());
    let (mut writer, q) = w.queue(0);
    out.add_lane(key(0), true, q.clone());
    for cut in 1..=3 {
        for n in 0..1000 {
            put(&mut writer, n, 500);
            if n % 16 == 0 {
                writer.commit();
            }
        }
        writer.commit();
        until(|| out.status()[0].acked_seq == cut * 1000);
        assert_eq!(w.conns.lock().unwrap().len(), 1);
        w.cut();
        until(|| !w.conns.lock().unwrap().is_empty() && out.is_connected());
    }
    put(&mut writer, 3000, 500);
    writer.seal();
    assert!(out.wait_complete(Lanes::All, LONG), "{:?}", out.error());
    let here = into.lanes().remove(0).queue;
    assert_eq!((here.tally(), q.tally().frames), (q.tally(), 3001));
    assert_eq!(handed(&out), on_the_wire(&q, 0), "each record went once");
}

#[test]
fn a_restarted_source_goes_on_at_the_watermark() {
    let mut w = World::new(Sync::None);
    let into = w.expect();
    let out = w.ship(w.args());
    let (mut writer, q) = w.queue(0);
    out.add_lane(key(0), true, q.clone());
    for n in 0..5000 {
        put(&mut writer, n, 500);
    }
    writer.commit();
    until(|| out.status()[0].acked_seq == 5000);
    assert_eq!(handed(&out), on_the_wire(&q, 0));
    // The process dies and starts again.
    out.close();
    until(|| !into.is_connected() && out.failure().is_some());
    drop((out, writer, q));
    let found = reopen(&mut w.source, &w.dir, "source").remove(0);
    let (mut writer, q) = (found.writer.unwrap(), found.queue);
    let rt = w.rt.handle().clone();
    let out = Outgoing::go_on(rt, w.endpoint.clone(), w.client.clone(), w.args());
    out.add_lane(key(0), true, q.clone());
    for n in 5000..7000 {
        put(&mut writer, n, 500);
    }
    writer.seal();
    assert!(out.wait_complete(Lanes::All, LONG), "{:?}", out.error());
    check(&out, &into, &q, 7000);
    assert_eq!(handed(&out), on_the_wire(&q, 5000), "what was not there");
}

#[test]
fn an_abort_is_heard_by_the_target() {
    let w = World::new(Sync::None);
    let into = w.expect();
    let out = w.ship(w.args());
    out.wait_connected(LONG).unwrap();
    let (mut writer, q) = w.queue(0);
    out.add_lane(key(0), true, q);
    put(&mut writer, 0, 100);
    writer.commit();
    until(|| out.status()[0].acked_seq == 1);
    assert!(!into.is_aborted());
    out.abort();
    until(|| into.is_aborted());
    assert!(!out.wait_complete(Lanes::All, Duration::from_millis(20)));
}

/// Bytes that these records had on the way.
fn on_the_wire(q: &Arc<Queue>, behind: u64) -> u64 {
    let mut r = q.reader();
    assert!(r.skip_to(behind).is_empty());
    let mut bytes = 0;
    while let Some(b) = r.peek_batch().unwrap() {
        bytes += b.wire.len() as u64;
        r.advance_batch();
    }
    bytes
}

fn handed(out: &Outgoing) -> u64 {
    out.status().iter().map(|l| l.handed).sum()
}

const FRAME: usize = 16_000;

/// Lanes to a target with little room.
struct Tight {
    w: World,
    into: Arc<Incoming>,
    lanes: Vec<(Writer, Arc<Queue>)>,
}

impl Tight {
    /// Each lane has so many frames of [`FRAME`] bytes, and is sealed.
    fn new(frames: &[u64]) -> Tight {
        let mut w = World::new(Sync::None);
        let cfg = SpoolConfig {
            quota_bytes: 64 << 20,
            ..spool_config(w.dir.path().join("small"), Sync::None)
        };
        w.target = Spool::open(&cfg).unwrap().0;
        // Not a local one, which may not have the last quarter.
        let (mut other, _q) = w.target.create(HoldId(1), Kind::Incoming, &key(9)).unwrap();
        while w.target.used_bytes() < cfg.quota_bytes - (3 << 20) {
            put(&mut other, 0, FRAME);
        }
        let lanes = frames.iter().enumerate().map(|(n, frames)| {
            let (mut writer, q) = w.queue(n as u16);
            (0..*frames).for_each(|n| put(&mut writer, n, FRAME));
            writer.seal();
            (writer, q)
        });
        let lanes = lanes.collect();
        let into = w.expect();
        Tight { w, into, lanes }
    }

    /// With all lanes, on one thread.
    fn ship(&self, rt: &tokio::runtime::Runtime) -> Arc<Outgoing> {
        let (endpoint, client) = (self.w.endpoint.clone(), self.w.client.clone());
        let out = Outgoing::start(rt.handle().clone(), endpoint, client, self.w.args());
        for (_, q) in &self.lanes {
            out.add_lane(q.lane().clone(), true, q.clone());
        }
        out
    }

    /// What the source could hand to the network and is not in the target's spool, once no more goes out.
    fn under_way(&self, out: &Outgoing) -> u64 {
        let mut last = (0, Instant::now());
        until(|| {
            let now = handed(out);
            if now != last.0 {
                last = (now, Instant::now());
            }
            now >= WINDOW && last.1.elapsed() > Duration::from_millis(500)
        });
        let lanes = self.into.lanes();
        let here: u64 = lanes.iter().map(|l| on_the_wire(&l.queue, 0)).sum();
        handed(out) - here
    }

    /// Gives the room that it has not had.
    fn finish(self, out: &Outgoing) {
        assert_eq!(out.error(), None);
        assert!(!out.wait_complete(Lanes::All, Duration::ZERO));
        self.w.target.remove_hold(HoldId(1)).unwrap();
        assert!(out.wait_complete(Lanes::All, LONG), "{:?}", out.error());
        for (_, q) in &self.lanes {
            check(out, &self.into, q, q.tally().frames);
        }
    }
}

/// QUIC's windows as control::quic has them (docs/formats/wire.md), of a connection.
const WINDOW: u64 = 16 << 20;
/// Beyond them each lane has a piece of its stream, and a batch that is not whole or has no room.
const LANE: u64 = (64 << 10) + (96 << 10);

fn one_thread() -> tokio::runtime::Runtime {
    let mut rt = tokio::runtime::Builder::new_multi_thread();
    rt.worker_threads(1).enable_all().build().unwrap()
}

#[test]
fn a_target_without_room_holds_the_source_back_and_loses_nothing() {
    let t = Tight::new(&[900, 900, 900, 900]);
    let rt = one_thread();
    let out = t.ship(&rt);
    let under_way = t.under_way(&out);
    println!("{under_way} bytes are under way");
    assert!(under_way <= WINDOW + 4 * LANE, "{under_way}");
    t.finish(&out);
}

#[test]
fn a_slow_disk_holds_up_no_order_and_no_keep_alive() {
    let w = World::new(Sync::None);
    let into = w.expect();
    let out = w.ship(w.args());
    let mut lanes: Vec<_> = (0..4).map(|n| w.queue(n)).collect();
    for (writer, q) in &mut lanes {
        out.add_lane(q.lane().clone(), true, q.clone());
        put(writer, 0, 100);
        writer.commit();
    }
    until(|| out.status().iter().all(|l| l.acked_seq == 1));
    let here: Vec<_> = into.lanes().into_iter().map(|l| l.queue).collect();
    let disk: Vec<_> = here.iter().map(|q| q.disk.lock().unwrap()).collect();
    let before = handed(&out);
    for (writer, _) in &mut lanes {
        put(writer, 1, 100);
        writer.commit();
    }
    until(|| handed(&out) > before);
    let mut s = UnixStream::connect(w.dir.path().join("beta.sock")).unwrap();
    s.set_read_timeout(Some(LONG)).unwrap();
    let mut call = |request: &Request| {
        let body = codec::encode(request).unwrap();
        let len = body.len() as u32;
        s.write_all(&[&len.to_le_bytes(), &body[..]].concat())
            .unwrap();
        let mut len = [0; 4];
        s.read_exact(&mut len).unwrap();
        let mut body = vec![0; u32::from_le_bytes(len) as usize];
        s.read_exact(&mut body).unwrap();
        codec::decode::<Reply>(&body).unwrap()
    };
    call(&Request::Hello { version: VERSION });
    // Longer than a connection lasts that is silent.
    for _ in 0..40 {
        assert_eq!(call(&Request::HostShow), Reply::Ok);
        std::thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(w.conns.lock().unwrap().len(), 1);
    assert!(here.iter().all(|q| q.tally().frames == 1));
    drop(disk);
    lanes.iter_mut().for_each(|(writer, _)| writer.seal());
    assert!(out.wait_complete(Lanes::All, LONG), "{:?}", out.error());
    for (_, q) in &lanes {
        check(&out, &into, q, 2);
    }
}

#[test]
fn a_lane_with_little_is_not_behind_those_with_much() {
    // Either of the others has a stream's window and more, both together a connection's and more.
    let t = Tight::new(&[1200, 5, 1200]);
    let rt = one_thread();
    let out = t.ship(&rt);
    t.under_way(&out);
    t.finish(&out);
    let taken = std::mem::take(&mut out.lock().taken);
    let last = taken.iter().rposition(|(lane, _)| *lane == 1).unwrap();
    let before: usize = taken[..last].iter().map(|(_, bytes)| bytes).sum();
    println!("{before} bytes before the last ones of the small lane");
    assert!(before < WINDOW as usize / 8, "{before}");
}
