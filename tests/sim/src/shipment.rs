//! The shipment: the product's messages and batches over connections that break and are half-open.

use std::collections::BTreeMap;

use gangway_shared::api::{Refusal, RefusalCode, Role, Tally, VERSION};
use gangway_shared::id::HoldId;
use gangway_shared::ship::{ToSource, ToTarget};
use gangway_switch::spool::Kind;

use crate::Bug;
use crate::disk::{At, Cursor, Lane, Queue, key, lane_of};
use crate::switch::Stash;
use crate::world::{A, B, Body, Conn, Host, MS, S, Work, World, name};

/// Batches that may be under way on a connection.
const WINDOW: usize = 8;
/// How long the source waits for a welcome.
const HANDSHAKE: u64 = S;

#[derive(Debug, Clone, Default)]
struct OutLane {
    cursor: Cursor,
    /// Since this connection.
    ended: bool,
    complete: bool,
}

/// The source's end, in memory.
#[derive(Debug, Clone, Default)]
pub struct Outgoing {
    conn: Option<u64>,
    greeted: bool,
    dialed_at: u64,
    next_dial: u64,
    /// At least once.
    pub welcomed: bool,
    lanes: BTreeMap<Lane, OutLane>,
    /// It dials no more.
    ended: bool,
}

impl Outgoing {
    /// These lanes are sealed here, and there, with the same digest.
    pub fn complete<'l>(&self, mut lanes: impl Iterator<Item = &'l Lane>) -> bool {
        lanes.all(|l| self.lanes.get(l).is_some_and(|o| o.complete))
    }
}

#[derive(Debug, Clone, Default)]
struct InLane {
    end: Option<Tally>,
    complete: bool,
    /// On this connection.
    acked: Option<(u64, bool)>,
}

/// The target's end, in memory.
#[derive(Debug, Clone, Default)]
pub struct Incoming {
    conn: Option<u64>,
    numbers: BTreeMap<u32, Lane>,
    stash: Stash,
    lanes: BTreeMap<Lane, InLane>,
    /// The source has named all lanes.
    pub named: bool,
    /// The source has put everything back.
    pub aborted: bool,
}

impl Incoming {
    /// Everything of these lanes is here, on the disk, and agrees.
    pub fn complete<'l>(&self, mut lanes: impl Iterator<Item = &'l Lane>) -> bool {
        lanes.all(|l| self.lanes.get(l).is_some_and(|i| i.complete))
    }

    /// A queue that was found at the start.
    pub fn adopt(&mut self, lane: Lane, _: Tally) {
        self.lanes.insert(lane, InLane::default());
    }
}

impl World {
    fn out(&mut self, id: HoldId) -> Option<&mut Outgoing> {
        self.nodes[A].holds.get_mut(&id).map(|x| &mut x.out)
    }

    fn incoming(&mut self, id: HoldId) -> Option<&mut Incoming> {
        self.nodes[B].holds.get_mut(&id).map(|x| &mut x.incoming)
    }

    /// The source has put everything back (`abort`), or is done.
    pub fn ship_end(&mut self, h: Host, id: HoldId, abort: bool) {
        let Some(x) = self.nodes[h].holds.get_mut(&id) else {
            return;
        };
        match x.record.role {
            Role::Source => {
                x.out.ended = true;
                if let Some(conn) = x.out.conn.take() {
                    if abort {
                        self.ship(conn, B, id, Body::ToTarget(ToTarget::Abort));
                    }
                    self.break_later(conn);
                }
            }
            Role::Target => {
                if let Some(conn) = x.incoming.conn.take() {
                    self.break_later(conn);
                }
            }
        }
    }

    fn break_later(&mut self, conn: u64) {
        // What is under way still arrives, or not.
        if self.rng.permille(500) {
            self.break_conn(conn);
        }
    }

    /// Dials, pumps, acknowledges.
    pub fn ship_tick(&mut self, h: Host, id: HoldId) -> Work {
        let Some(x) = self.nodes[h].holds.get(&id).filter(|x| !x.is_over()) else {
            return Ok(());
        };
        match x.record.role {
            Role::Source => {
                self.dial(id);
                self.pump(id);
                Ok(())
            }
            Role::Target => self.acknowledge(id),
        }
    }

    fn dial(&mut self, id: HoldId) {
        let (now, connected) = (self.now, self.hosts_connected());
        let again = now + self.rng.range(20 * MS, 200 * MS);
        let conn = self.steps;
        let Some(out) = self.out(id) else { return };
        if out.conn.is_some() && !out.greeted && now > out.dialed_at + HANDSHAKE {
            out.conn = None;
            out.next_dial = again;
        }
        if out.ended || out.conn.is_some() || now < out.next_dial || !connected {
            return;
        }
        out.conn = Some(conn);
        out.greeted = false;
        out.dialed_at = now;
        self.conns.insert(conn, Conn::default());
        let hello = ToTarget::Hello {
            version: VERSION,
            hold: id,
            ticket: [7; 32],
        };
        self.ship(conn, B, id, Body::ToTarget(hello));
    }

    fn pump(&mut self, id: HoldId) {
        let Some(x) = self.nodes[A].holds.get_mut(&id) else {
            return;
        };
        let (Some(conn), true) = (x.out.conn, x.out.greeted) else {
            return;
        };
        let lanes: Vec<Lane> = x.out.lanes.keys().copied().collect();
        for (number, lane) in lanes.into_iter().enumerate() {
            loop {
                let under_way = self.conns.get(&conn).map_or(0, |c| c.batches);
                let Some(x) = self.nodes[A].holds.get_mut(&id) else {
                    return;
                };
                let Some(o) = x.out.lanes.get_mut(&lane) else {
                    break;
                };
                let Some(q) = self.nodes[A].disk.queues.get(&(id, Kind::Source, lane)) else {
                    break;
                };
                let body = match q.at(&mut o.cursor) {
                    At::Batch(b) if under_way < WINDOW => {
                        Queue::pass(&mut o.cursor, &b);
                        Body::Batch(number as u32, b.wire.to_vec())
                    }
                    At::Sealed if !o.ended => {
                        o.ended = true;
                        let (lane, tally) = (number as u32, q.tally());
                        Body::ToTarget(ToTarget::End { lane, tally })
                    }
                    _ => break,
                };
                self.ship(conn, B, id, body);
            }
        }
    }

    /// Something arrives on a connection.
    pub fn on_ship(&mut self, h: Host, conn: u64, id: HoldId, body: Body) -> Work {
        match body {
            Body::ToTarget(ToTarget::Hello { .. }) => return self.hello(conn, id),
            Body::ToTarget(m) if self.incoming(id).is_some_and(|i| i.conn == Some(conn)) => {
                self.take_source(conn, id, m);
            }
            Body::Batch(number, wire)
                if self.incoming(id).is_some_and(|i| i.conn == Some(conn)) =>
            {
                if let Some(i) = self.incoming(id) {
                    i.stash.entry(number).or_default().push_back(wire);
                }
                self.unstash(id);
            }
            Body::ToSource(m) if h == A && self.out(id).is_some_and(|o| o.conn == Some(conn)) => {
                self.take_target(conn, id, m);
            }
            _ => {}
        }
        Ok(())
    }

    fn hello(&mut self, conn: u64, id: HoldId) -> Work {
        let there = |x: &crate::switch::Hold| x.record.role == Role::Target && !x.is_over();
        if !self.nodes[B].holds.get(&id).is_some_and(there) {
            let message = "no such hold".to_owned();
            let refusal = Refusal {
                code: RefusalCode::Unknown,
                message,
            };
            self.ship(conn, A, id, Body::ToSource(ToSource::Refused(refusal)));
            return Ok(());
        }
        let queues: Vec<Lane> = self.nodes[B]
            .disk
            .queues
            .keys()
            .filter(|q| (q.0, q.1) == (id, Kind::Incoming))
            .map(|q| q.2)
            .collect();
        let Some(i) = self.incoming(id) else {
            return Ok(());
        };
        let old = i.conn.replace(conn);
        i.numbers.clear();
        i.stash.clear();
        i.lanes.values_mut().for_each(|l| l.acked = None);
        if let Some(old) = old {
            self.break_conn(old);
        }
        let mut watermarks = Vec::new();
        for lane in queues {
            let q = (id, Kind::Incoming, lane);
            if !self.has(Bug::AckBeforeSync) && !self.nodes[B].disk.sync(q) {
                self.close_in(id);
                return Ok(());
            }
            watermarks.push((key(lane), self.nodes[B].disk.queues[&q].last_seq()));
            self.is_durable(id, lane);
        }
        self.mortal(B)?;
        self.ship(
            conn,
            A,
            id,
            Body::ToSource(ToSource::Welcome { watermarks }),
        );
        Ok(())
    }

    /// What is acknowledged is on the platter (contract, "durable").
    fn is_durable(&mut self, id: HoldId, lane: Lane) {
        let Some(q) = self.nodes[B].disk.queues.get(&(id, Kind::Incoming, lane)) else {
            return;
        };
        let (safe, said) = (q.durable_seq(), q.promised());
        if safe < said {
            self.check.violated(
                "durable",
                format!("record {said} of {lane:?} is acknowledged, {safe} is on the disk of B"),
            );
        }
    }

    fn close_in(&mut self, id: HoldId) {
        if let Some(conn) = self.incoming(id).and_then(|i| i.conn.take()) {
            self.break_conn(conn);
        }
    }

    fn take_source(&mut self, _: u64, id: HoldId, m: ToTarget) {
        match m {
            ToTarget::Lane { lane, key, .. } => {
                let name = lane_of(&key);
                if self.nodes[B]
                    .disk
                    .create((id, Kind::Incoming, name))
                    .is_err()
                {
                    return self.close_in(id);
                }
                self.nodes[B].disk.sync((id, Kind::Incoming, name));
                let Some(i) = self.incoming(id) else { return };
                i.numbers.insert(lane, name);
                let l = i.lanes.entry(name).or_default();
                if !l.complete {
                    l.end = None;
                }
                self.unstash(id);
            }
            ToTarget::Named { lanes } => {
                if let Some(i) = self.incoming(id) {
                    i.named = i.numbers.len() == lanes as usize;
                }
            }
            ToTarget::End { lane, tally } => {
                let Some(i) = self.incoming(id) else { return };
                if let Some(l) = i.numbers.get(&lane).and_then(|l| i.lanes.get_mut(l)) {
                    l.end = Some(tally);
                }
            }
            ToTarget::Abort => {
                if let Some(i) = self.incoming(id) {
                    i.aborted = true;
                }
            }
            ToTarget::Hello { .. } => {}
        }
    }

    /// What came goes into the queues, as far as there is room and its lane is known.
    fn unstash(&mut self, id: HoldId) {
        let numbers = match self.incoming(id) {
            Some(i) => i.numbers.clone(),
            None => return,
        };
        let blind = self.has(Bug::NoDedupe);
        for (number, lane) in numbers {
            let q = (id, Kind::Incoming, lane);
            while let Some(wire) = self
                .incoming(id)
                .and_then(|i| i.stash.get(&number)?.front().cloned())
            {
                let disk = &mut self.nodes[B].disk;
                let Some(batch) = disk.shipped(q, &wire) else {
                    return self.close_in(id);
                };
                let next = disk.queues[&q].last_seq() + 1;
                if batch.last_seq() < next && !blind {
                    // It was here before the connection was lost.
                } else if batch.first_seq > next {
                    return self.close_in(id);
                } else if batch.last_seq() < next {
                    let again: Vec<_> = batch
                        .records()
                        .map(|r| crate::disk::Numbered::decode(r.frame))
                        .collect();
                    self.nodes[B].disk.append(q, &again);
                } else if disk.append_wire(q, &wire).is_err() {
                    break;
                }
                let Some(i) = self.incoming(id) else { return };
                if let Some(s) = i.stash.get_mut(&number) {
                    s.pop_front();
                }
                // Room for another one: the window is of what was not taken yet.
                if let Some(c) = i.conn.and_then(|c| self.conns.get_mut(&c)) {
                    c.batches -= 1;
                }
            }
        }
        let waiting: usize = self
            .incoming(id)
            .map_or(0, |i| i.stash.values().map(|s| s.len()).sum());
        if waiting > WINDOW {
            self.check.violated(
                "bounded",
                format!("{waiting} batches wait in the target's memory"),
            );
        }
    }

    fn acknowledge(&mut self, id: HoldId) -> Work {
        self.unstash(id);
        let blind = self.has(Bug::NoDedupe);
        let Some(i) = self.incoming(id) else {
            return Ok(());
        };
        let Some(conn) = i.conn else { return Ok(()) };
        let lanes: Vec<(u32, Lane)> = i.numbers.iter().map(|(n, l)| (*n, *l)).collect();
        for (number, lane) in lanes {
            let q = (id, Kind::Incoming, lane);
            let Some(queue) = self.nodes[B].disk.queues.get(&q) else {
                continue;
            };
            let (seq, tally) = (queue.last_seq(), queue.tally());
            let Some(l) = self.incoming(id).and_then(|i| i.lanes.get_mut(&lane)) else {
                continue;
            };
            let complete = match l.end {
                Some(end) if end == tally || (blind && tally.frames >= end.frames) => true,
                Some(end) if tally.frames >= end.frames => {
                    // They differ: it will never be complete.
                    self.say(|| format!("B has {tally:?} of {lane:?}, the source {end:?}"));
                    self.close_in(id);
                    return Ok(());
                }
                _ => false,
            };
            if l.acked == Some((seq, complete)) || (seq == 0 && !complete) {
                continue;
            }
            l.acked = Some((seq, complete));
            if complete {
                self.nodes[B].disk.seal(q);
            }
            if self.has(Bug::AckBeforeSync) {
                // Some time later.
            } else if !self.nodes[B].disk.sync(q) {
                self.close_in(id);
                return Ok(());
            }
            self.mortal(B)?;
            self.is_durable(id, lane);
            if let Some(l) = self.incoming(id).and_then(|i| i.lanes.get_mut(&lane)) {
                l.complete |= complete;
            }
            let ack = ToSource::Ack {
                lane: number,
                seq,
                tally,
                complete,
            };
            self.ship(conn, A, id, Body::ToSource(ack));
        }
        Ok(())
    }

    fn take_target(&mut self, conn: u64, id: HoldId, m: ToSource) {
        match m {
            ToSource::Welcome { watermarks } => {
                let lanes: Vec<(Lane, bool)> = self.nodes[A].holds[&id]
                    .lanes
                    .iter()
                    .map(|(k, l)| (*k, l.inside))
                    .collect();
                let safe: BTreeMap<Lane, u64> =
                    watermarks.iter().map(|(k, s)| (lane_of(k), *s)).collect();
                for (number, (lane, inside)) in lanes.iter().enumerate() {
                    // The protocol allows to go on at an earlier record.
                    let generous = self.rng.permille(300);
                    let mut o = OutLane::default();
                    let known = self.nodes[A].holds[&id].out.lanes.get(lane);
                    o.complete = known.is_some_and(|k| k.complete);
                    let watermark = safe.get(lane).copied().unwrap_or(0);
                    if let Some(q) = self.nodes[A].disk.queues.get(&(id, Kind::Source, *lane)) {
                        while let (At::Batch(b), false) = (q.at(&mut o.cursor), generous) {
                            if b.last_seq() > watermark {
                                break;
                            }
                            Queue::pass(&mut o.cursor, &b);
                        }
                    }
                    if let Some(out) = self.out(id) {
                        out.lanes.insert(*lane, o);
                    }
                    let named = ToTarget::Lane {
                        lane: number as u32,
                        key: key(*lane),
                        inside: *inside,
                    };
                    self.ship(conn, B, id, Body::ToTarget(named));
                }
                let all = lanes.len() as u32;
                self.ship(conn, B, id, Body::ToTarget(ToTarget::Named { lanes: all }));
                if let Some(out) = self.out(id) {
                    (out.greeted, out.welcomed) = (true, true);
                }
            }
            ToSource::Refused(_) => {
                let again = self.now + 100 * MS;
                if let Some(out) = self.out(id) {
                    out.conn = None;
                    out.next_dial = again;
                }
            }
            ToSource::Ack {
                lane,
                seq,
                tally,
                complete,
            } => {
                let blind = self.has(Bug::NoDedupe);
                let lanes = self.nodes[A].holds[&id]
                    .out
                    .lanes
                    .keys()
                    .nth(lane as usize)
                    .copied();
                let Some(lane) = lanes else { return };
                let Some(q) = self.nodes[A].disk.queues.get(&(id, Kind::Source, lane)) else {
                    return;
                };
                let agree = blind
                    || (seq <= q.last_seq()
                        && (!complete || (tally == q.tally() && q.is_sealed())));
                if !agree {
                    self.check.violated(
                        "complete",
                        format!("{} and B disagree over {lane:?}", name(A)),
                    );
                }
                if let Some(o) = self.out(id).and_then(|o| o.lanes.get_mut(&lane)) {
                    o.complete |= complete;
                }
            }
        }
    }

    /// An end learns that its connection is gone.
    pub fn on_lost(&mut self, h: Host, conn: u64) {
        let again = self.now + self.rng.range(20 * MS, 300 * MS);
        for x in self.nodes[h].holds.values_mut() {
            if h == A && x.out.conn == Some(conn) {
                x.out.conn = None;
                x.out.next_dial = again;
            }
            if h == B && x.incoming.conn == Some(conn) {
                x.incoming.conn = None;
            }
        }
    }
}
