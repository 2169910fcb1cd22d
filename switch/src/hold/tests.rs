//! Two hosts in one process: real workers, real spools, real QUIC between them; ports in memory and a learning switch
//! as the network. VMs `p` and `m` move while `p` and an outside station `o` send numbered frames to `m`.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use gangway_shared::api::{
    HoldInfo, HoldOpen, HoldState, IncomingPort, IncomingPrepare, LedgerPage, RefusalCode, Reply,
    Request, Role, Scope,
};
use gangway_shared::config::valid::{Sync, VmConfig};
use gangway_shared::id::{HoldId, LaneKey, MacAddr};
use gangway_shared::ledger::{IndexBatch, LaneKind, LedgerLane, account};

use super::Manager;
use super::manager::{Host, Vms};
use crate::control::Handler;
use crate::datapath::Engine;
use crate::datapath::tests::{config, eventually, frame, mac};
use crate::port::Attach;
use crate::port::memory::MemoryPort;
use crate::ship::tests::World;
use crate::spool::Kind;

const ID: HoldId = HoldId(0xfeed);
const P: usize = 0;
const M: usize = 1;
const UP: usize = 2;
const MAC_P: u8 = 1;
const MAC_M: u8 = 2;
const MAC_O: u8 = 3;
/// A second station of `p`, which sends by its second queue.
const MAC_Q: u8 = 4;
const SENDERS: [u8; 3] = [MAC_P, MAC_O, MAC_Q];

struct NoVms;

impl Vms for NoVms {
    fn pid(&self, _: &str) -> Option<u32> {
        None
    }
    fn status(&self, _: &str) -> Option<String> {
        None
    }
}

struct Site {
    manager: Arc<Manager>,
    engine: Arc<Engine>,
    ports: [MemoryPort; 3],
    /// The second queue of `p`.
    second: MemoryPort,
}

impl Site {
    fn new(w: &World, name: &str, source: bool) -> Site {
        let mut cfg = config(&["p", "m", "up0"], 2, w.dir.path().join(name));
        cfg.name = name.into();
        for (i, (vm, n)) in [("p", MAC_P), ("m", MAC_M)].into_iter().enumerate() {
            cfg.ports[i].vm = Some(vm.into());
            cfg.ports[i].mac = Some(mac(n));
            cfg.vms.push(VmConfig {
                name: vm.into(),
                qmp: "/nowhere".into(),
                incoming: None,
            });
        }
        let engine = Engine::start(&cfg).unwrap();
        let ports = [MemoryPort::new(), MemoryPort::new(), MemoryPort::new()];
        let manager = Arc::new(Manager::new(Host {
            engine: engine.clone(),
            spool: if source {
                w.source.clone()
            } else {
                w.target.clone()
            },
            acceptor: w.acceptor.clone(),
            dialer: Some((w.endpoint.clone(), w.client.clone())),
            runtime: w.rt.handle().clone(),
            taps: Default::default(),
            vms: Arc::new(NoVms),
            config: cfg,
        }));
        let site = Site {
            manager,
            engine,
            ports,
            second: MemoryPort::new(),
        };
        site.plug(UP);
        site
    }

    fn plug(&self, port: usize) {
        let (rx, tx) = self.ports[port].queues();
        self.engine.set_tx(port, vec![(0, tx)]);
        self.engine.attach_rx(port, 0, rx);
        if port == P {
            self.engine.attach_rx(P, 1, self.second.queues().0);
        }
    }

    /// What was in the rings of `p` is there again.
    fn refill(&self, ring: Vec<Vec<u8>>) {
        for f in ring {
            let queue = match f[11] {
                MAC_Q => &self.second,
                _ => &self.ports[P],
            };
            queue.push(f);
        }
    }

    /// What a stopping vhost-user VM does.
    fn unplug(&self, port: usize) {
        self.engine.detach_rx(port, 0);
        self.engine.detach_rx(port, 1);
        self.engine.clear_tx(port, 0);
    }

    fn ask(&self, r: Request) -> Reply {
        let reply = self.manager.call(r.clone());
        if let Reply::Refused(e) = &reply {
            panic!("{r:?}: {e}");
        }
        reply
    }

    fn ledger(&self, role: Role) -> Vec<LedgerLane> {
        match self.ask(Request::LedgerShow {
            hold: ID,
            role,
            lane: 0,
        }) {
            Reply::Ledger { ledger, lanes } => {
                assert_eq!(ledger.lanes as usize, lanes.len());
                lanes
            }
            other => panic!("{other:?}"),
        }
    }

    fn index(&self, role: Role, lane: usize) -> Vec<IndexBatch> {
        let mut all = Vec::new();
        let mut at = Some(0);
        while let Some(here) = at {
            let page = LedgerPage {
                hold: ID,
                role,
                lane: lane as u32,
                at: here,
            };
            match self.ask(Request::LedgerIndex(page)) {
                Reply::LedgerIndex { batches, next } => {
                    all.extend(batches);
                    at = next;
                }
                other => panic!("{other:?}"),
            }
        }
        all
    }

    fn status(&self) -> HoldInfo {
        match self.ask(Request::HoldStatus { hold: ID }) {
            Reply::Hold(i) => i,
            other => panic!("{other:?}"),
        }
    }
}

/// The number of a frame of a station; 0 for others: what is announced reaches `m` too, if the network floods it while
/// the old host still takes frames for it.
fn number(f: &[u8]) -> u32 {
    match f[12..14] {
        [0x88, 0xb5] => u32::from_be_bytes(f[20..24].try_into().unwrap()),
        _ => 0,
    }
}

/// Everything that runs beside the migration.
struct Scene {
    a: Arc<Site>,
    b: Arc<Site>,
    /// What `m` received, in order: (sender, number).
    got: Arc<Mutex<Vec<(u8, u32)>>>,
    sent: Arc<[AtomicU32; 3]>,
    stop: Arc<AtomicBool>,
    /// 0: p runs on A; 1: stopped; 2: runs on B.
    place: Arc<AtomicU32>,
    /// Nothing is looked for any more.
    done: Arc<AtomicBool>,
    threads: Vec<std::thread::JoinHandle<()>>,
    w: World,
}

impl Scene {
    fn new() -> Scene {
        let w = World::new(Sync::Batch);
        let (a, b) = (
            Arc::new(Site::new(&w, "alpha", true)),
            Arc::new(Site::new(&w, "beta", false)),
        );
        a.plug(M);
        a.plug(P);
        let seats = a.engine.pin().seats(P);
        assert_eq!(seats.len(), 2, "the queues of p are on both workers");
        // m says where it is.
        a.ports[M].push(frame(MAC_M, MacAddr::BROADCAST, 0));
        eventually("m is learned", || !a.ports[P].take_delivered().is_empty());
        let scene = Scene {
            a,
            b,
            got: Arc::default(),
            sent: Arc::default(),
            stop: Arc::default(),
            place: Arc::default(),
            done: Arc::default(),
            threads: Vec::new(),
            w,
        };
        scene.start()
    }

    fn start(mut self) -> Scene {
        let (a, b, got, sent) = (
            self.a.clone(),
            self.b.clone(),
            self.got.clone(),
            self.sent.clone(),
        );
        let (stop, place, done) = (self.stop.clone(), self.place.clone(), self.done.clone());
        self.threads.push(std::thread::spawn(move || {
            // The network: where m is, as a learning switch sees it.
            let mut m_at_b = false;
            let mut n = [0u32; 3];
            let mut ending = false;
            while !done.load(Ordering::Relaxed) {
                ending |= stop.load(Ordering::Relaxed);
                for f in b.ports[UP].take_delivered() {
                    if f[6..12] == mac(MAC_M).0 {
                        m_at_b = true;
                    }
                    a.ports[UP].push(f);
                }
                for f in a.ports[UP].take_delivered() {
                    if m_at_b && f[0..6] == mac(MAC_M).0 {
                        b.ports[UP].push(f);
                    }
                }
                if !ending {
                    n[1] += 1;
                    let up = if m_at_b { &b } else { &a };
                    up.ports[UP].push(frame(MAC_O, mac(MAC_M), n[1]));
                    let p = match place.load(Ordering::Acquire) {
                        0 => Some(&a),
                        2 => Some(&b),
                        _ => None,
                    };
                    if let Some(p) = p {
                        n[0] += 1;
                        p.ports[P].push(frame(MAC_P, mac(MAC_M), n[0]));
                        n[2] += 1;
                        p.second.push(frame(MAC_Q, mac(MAC_M), n[2]));
                    }
                    for (sent, n) in sent.iter().zip(n) {
                        sent.store(n, Ordering::Release);
                    }
                }
                for site in [&a, &b] {
                    let mut got = got.lock().unwrap();
                    got.extend(
                        site.ports[M]
                            .take_delivered()
                            .iter()
                            .filter(|f| number(f) > 0)
                            .map(|f| (f[11], number(f))),
                    );
                }
                std::thread::sleep(Duration::from_micros(200));
            }
        }));
        self
    }

    fn received(&self, from: u8) -> usize {
        self.got
            .lock()
            .unwrap()
            .iter()
            .filter(|(s, _)| *s == from)
            .count()
    }

    fn more(&self) {
        let before = SENDERS.map(|s| self.received(s) + 20);
        eventually("frames flow", || {
            SENDERS
                .iter()
                .zip(before)
                .all(|(s, n)| self.received(*s) > n)
        });
    }

    fn prepare(&self) {
        let ports = [("p", MAC_P), ("m", MAC_M)]
            .map(|(n, m)| IncomingPort {
                name: n.into(),
                vm: n.into(),
                mac: Some(mac(m)),
            })
            .to_vec();
        let vms = vec!["p".to_string(), "m".into()];
        self.b.ask(Request::IncomingPrepare(IncomingPrepare {
            hold: ID,
            vms: vms.clone(),
            ports,
            source_host: "alpha".into(),
            ticket: [5; 32],
        }));
        self.a.ask(Request::HoldOpen(HoldOpen {
            hold: ID,
            vms,
            target_address: self.w.address.to_string(),
            target_host: "beta".into(),
            ticket: [5; 32],
        }));
    }

    /// Stops `p` and `m` on A. What they had queued stays in their rings.
    fn stop_vms(&self) -> Vec<Vec<u8>> {
        self.place.store(1, Ordering::Release);
        std::thread::sleep(Duration::from_millis(5));
        self.a.unplug(P);
        self.a.unplug(M);
        let mut ring = self.a.ports[P].take_waiting();
        ring.extend(self.a.second.take_waiting());
        ring
    }

    /// Everything once, in order.
    fn verdict(mut self) {
        self.stop.store(true, Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(50));
        for (i, who) in SENDERS.into_iter().enumerate() {
            let n = self.sent[i].load(Ordering::Acquire) as usize;
            eventually("the last frame", || self.received(who) >= n);
        }
        std::thread::sleep(Duration::from_millis(50));
        self.done.store(true, Ordering::Relaxed);
        for t in self.threads.drain(..) {
            t.join().unwrap();
        }
        let got = self.got.lock().unwrap();
        for (i, who) in SENDERS.into_iter().enumerate() {
            let n = self.sent[i].load(Ordering::Acquire);
            let seen: Vec<u32> = got
                .iter()
                .filter(|(s, _)| *s == who)
                .map(|(_, n)| *n)
                .collect();
            assert!(n > 40);
            let wrong = seen.iter().zip(1..).position(|(a, b)| *a != b);
            assert_eq!(
                (wrong, seen.len()),
                (None, n as usize),
                "from station {who}: {:?}",
                wrong.map(|w| &seen[w..])
            );
        }
        for site in [&self.a, &self.b] {
            site.engine.stop();
        }
    }
}

fn move_all(scope_first: Option<Scope>) {
    let s = Scene::new();
    s.more();
    s.prepare();
    s.more();
    if let Some(scope) = scope_first {
        s.a.ask(Request::Freeze { hold: ID, scope });
        let before = s.received(MAC_P);
        let o = s.received(MAC_O);
        eventually("outside still talks to m", || s.received(MAC_O) > o + 20);
        assert!(
            s.received(MAC_P) <= before + 32,
            "the link inside is frozen"
        );
    }
    s.a.ask(Request::Freeze {
        hold: ID,
        scope: Scope::All,
    });
    for from in ["p", "up0"] {
        eventually("frames are held", || {
            let lanes = s.a.status().lanes;
            lanes
                .iter()
                .any(|l| l.lane.from == from && l.held.frames > 0)
        });
    }
    let ring = s.stop_vms();
    s.a.ask(Request::Seal {
        hold: ID,
        timeout_ms: 5000,
    });
    s.b.ask(Request::IncomingRestore { hold: ID });
    s.b.ask(Request::Commit { hold: ID });
    // The VMs run on B: their rings come with what they had queued.
    s.b.refill(ring);
    s.b.plug(P);
    s.place.store(2, Ordering::Release);
    std::thread::sleep(Duration::from_millis(10));
    s.b.plug(M);
    s.a.ask(Request::Depart {
        hold: ID,
        grace_ms: 10_000,
    });
    s.b.ask(Request::Announce { hold: ID });
    eventually("the source is done", || {
        s.a.status().state == HoldState::Departed
    });
    eventually("the target is live", || {
        s.b.status().state == HoldState::Live
    });
    s.more();
    let (a, b) = (s.a.status(), s.b.status());
    for l in &a.lanes {
        let t = b
            .lanes
            .iter()
            .find(|t| t.lane == l.lane)
            .expect("the same lanes");
        assert_eq!(
            (l.held, l.held, l.held),
            (l.shipped, t.held, t.flushed),
            "{}",
            l.lane
        );
    }
    s.a.ask(Request::HoldRelease { hold: ID });
    s.b.ask(Request::HoldRelease { hold: ID });
    // What was reserved for an abort, too, although the account is kept.
    eventually("nothing of it is in the spools", || {
        s.w.source.used_bytes() + s.w.target.used_bytes() == 0
    });
    the_ledgers_agree(&s);
    s.verdict();
}

/// All stages of both hosts have seen the same frames, and the indexes add up to them.
fn the_ledgers_agree(s: &Scene) {
    let (a, b) = (s.a.ledger(Role::Source), s.b.ledger(Role::Target));
    let shipped = |l: &&LedgerLane| l.kind == LaneKind::Shipped;
    let lanes = a.iter().filter(shipped).count();
    assert_eq!(lanes, b.iter().filter(shipped).count());
    for (n, l) in a.iter().enumerate().filter(|(_, l)| shipped(l)) {
        let m = b
            .iter()
            .position(|t| shipped(&t) && t.lane == l.lane)
            .expect("the same lanes");
        let (here, there) = (s.a.index(Role::Source, n), s.b.index(Role::Target, m));
        assert_eq!(here, there, "{}", l.lane);
        let all = account(&here);
        let stages: Vec<_> = l.stages.iter().chain(&b[m].stages).collect();
        assert_eq!(stages.len(), 8, "{stages:?}");
        for st in stages {
            assert!(st.account.agrees(&all), "{}: {st:?}, not {all:?}", l.lane);
        }
        assert!(l.lost.is_empty() && b[m].lost.is_empty());
    }
    for (n, l) in b.iter().enumerate().filter(|(_, l)| !shipped(l)) {
        let all = account(&s.b.index(Role::Target, n));
        for st in &l.stages {
            assert!(st.account.agrees(&all), "{}: {st:?}, not {all:?}", l.lane);
        }
    }
}

#[test]
fn a_group_moves_and_every_frame_arrives_once_in_order() {
    move_all(None);
}

#[test]
fn the_early_freeze_holds_the_inside_first_and_loses_nothing() {
    move_all(Some(Scope::Inside));
}

#[test]
fn an_abort_in_any_state_puts_everything_back_in_order() {
    for stage in 0..5 {
        let s = Scene::new();
        s.more();
        s.prepare();
        if stage >= 1 {
            s.a.ask(Request::Freeze {
                hold: ID,
                scope: if stage == 1 {
                    Scope::Inside
                } else {
                    Scope::All
                },
            });
            std::thread::sleep(Duration::from_millis(20));
        }
        let mut ring = Vec::new();
        if stage >= 3 {
            ring = s.stop_vms();
            s.a.ask(Request::Seal {
                hold: ID,
                timeout_ms: 5000,
            });
        }
        if stage >= 4 {
            s.b.ask(Request::IncomingRestore { hold: ID });
        }
        s.a.ask(Request::HoldAbort { hold: ID });
        s.b.ask(Request::HoldAbort { hold: ID });
        if stage >= 3 {
            s.a.refill(ring);
            s.a.plug(P);
            s.a.plug(M);
            s.place.store(0, Ordering::Release);
        }
        eventually("it is put back", || {
            s.a.status().state == HoldState::Aborted
        });
        assert_eq!(s.b.status().state, HoldState::Aborted);
        eventually("both spools are free again", || {
            s.w.source.used_bytes() + s.w.target.used_bytes() == 0
        });
        s.more();
        s.verdict();
    }
}

#[test]
fn what_cannot_be_is_refused_and_changes_nothing() {
    let s = Scene::new();
    let refused = |site: &Site, r: Request| match site.manager.call(r) {
        Reply::Refused(e) => e.code,
        other => panic!("{other:?}"),
    };
    assert_eq!(
        refused(
            &s.a,
            Request::Seal {
                hold: ID,
                timeout_ms: 1
            }
        ),
        RefusalCode::Unknown
    );
    let open = HoldOpen {
        hold: ID,
        vms: vec!["nobody".into()],
        target_address: s.w.address.to_string(),
        target_host: "beta".into(),
        ticket: [5; 32],
    };
    assert_eq!(
        refused(&s.a, Request::HoldOpen(open.clone())),
        RefusalCode::Unknown
    );
    // Nobody expects this shipment.
    let open = HoldOpen {
        vms: vec!["p".into()],
        ..open
    };
    assert_eq!(
        refused(&s.a, Request::HoldOpen(open.clone())),
        RefusalCode::Peer
    );
    s.prepare();
    assert_eq!(
        refused(
            &s.a,
            Request::HoldOpen(HoldOpen {
                hold: HoldId(9),
                ..open
            })
        ),
        RefusalCode::Busy
    );
    assert_eq!(
        refused(
            &s.a,
            Request::Seal {
                hold: ID,
                timeout_ms: 1
            }
        ),
        RefusalCode::State
    );
    assert_eq!(
        refused(&s.a, Request::HoldRelease { hold: ID }),
        RefusalCode::State
    );
    assert_eq!(
        refused(&s.b, Request::Commit { hold: ID }),
        RefusalCode::State
    );
    s.more();
    s.a.ask(Request::HoldAbort { hold: ID });
    s.a.ask(Request::HoldAbort { hold: ID });
    s.b.ask(Request::HoldAbort { hold: ID });
    s.more();
    s.verdict();
}

fn open_args(s: &Scene, vms: &[&str]) -> HoldOpen {
    HoldOpen {
        hold: ID,
        vms: vms.iter().map(|v| v.to_string()).collect(),
        target_address: s.w.address.to_string(),
        target_host: "beta".into(),
        ticket: [5; 32],
    }
}

fn refusal(site: &Site, r: Request) -> (RefusalCode, String) {
    match site.manager.call(r) {
        Reply::Refused(e) => (e.code, e.message),
        other => panic!("{other:?}"),
    }
}

/// Uses up what is left of the source's quota.
fn use_up(s: &Scene) {
    for n in 0.. {
        let key = LaneKey {
            from: format!("filler{n}"),
            queue: 0,
            to: "m".into(),
        };
        if s.w.source.create(HoldId(77), Kind::Source, &key).is_err() {
            return;
        }
    }
}

#[test]
fn an_abort_needs_no_room_in_the_spool() {
    for sealed in [false, true] {
        let s = Scene::new();
        s.more();
        s.prepare();
        s.a.ask(Request::Freeze {
            hold: ID,
            scope: Scope::All,
        });
        std::thread::sleep(Duration::from_millis(20));
        use_up(&s);
        let mut ring = Vec::new();
        if sealed {
            ring = s.stop_vms();
            s.a.ask(Request::Seal {
                hold: ID,
                timeout_ms: 5000,
            });
        }
        s.a.ask(Request::HoldAbort { hold: ID });
        s.b.ask(Request::HoldAbort { hold: ID });
        if sealed {
            s.a.refill(ring);
            s.a.plug(P);
            s.a.plug(M);
            s.place.store(0, Ordering::Release);
        }
        eventually("it is put back", || {
            s.a.status().state == HoldState::Aborted
        });
        let lanes = s.a.status().lanes;
        assert!(lanes.iter().any(|l| l.held.frames > 0));
        for l in lanes {
            assert_eq!(l.held, l.flushed, "{}", l.lane);
        }
        s.more();
        s.w.source.remove_hold(HoldId(77)).unwrap();
        s.verdict();
    }
}

#[test]
fn a_vm_that_stops_before_the_freeze_freezes_the_hold() {
    let s = Scene::new();
    s.more();
    s.prepare();
    s.more();
    let ring = s.stop_vms();
    eventually("the hold freezes itself", || {
        s.a.status().state == HoldState::Frozen
    });
    // Longer than any backlog would last.
    std::thread::sleep(Duration::from_millis(100));
    s.a.ask(Request::HoldAbort { hold: ID });
    s.b.ask(Request::HoldAbort { hold: ID });
    s.a.refill(ring);
    s.a.plug(P);
    s.a.plug(M);
    s.place.store(0, Ordering::Release);
    eventually("it is put back", || {
        s.a.status().state == HoldState::Aborted
    });
    s.more();
    s.verdict();
}

#[test]
fn one_vm_moves_alone_although_no_lane_of_it_has_to_be_complete() {
    let s = Scene::new();
    s.more();
    s.b.ask(Request::IncomingPrepare(IncomingPrepare {
        hold: ID,
        vms: vec!["m".into()],
        ports: vec![IncomingPort {
            name: "m".into(),
            vm: "m".into(),
            mac: Some(mac(MAC_M)),
        }],
        source_host: "alpha".into(),
        ticket: [5; 32],
    }));
    let (code, what) = refusal(&s.b, Request::IncomingRestore { hold: ID });
    assert_eq!(code, RefusalCode::State, "{what}");
    s.a.ask(Request::HoldOpen(open_args(&s, &["m"])));
    s.a.ask(Request::Freeze {
        hold: ID,
        scope: Scope::All,
    });
    s.a.unplug(M);
    s.a.ask(Request::Seal {
        hold: ID,
        timeout_ms: 5000,
    });
    s.b.ask(Request::IncomingRestore { hold: ID });
    assert_eq!(s.b.status().lanes.len(), 3, "all lanes are known");
    s.b.ask(Request::Commit { hold: ID });
    s.b.plug(M);
    s.a.ask(Request::Depart {
        hold: ID,
        grace_ms: 10_000,
    });
    s.b.ask(Request::Announce { hold: ID });
    eventually("the source is done", || {
        s.a.status().state == HoldState::Departed
    });
    eventually("the target is live", || {
        s.b.status().state == HoldState::Live
    });
    s.more();
    s.verdict();
}

/// Everything up to the commit, with both VMs stopped.
fn committed(s: &Scene) -> Vec<Vec<u8>> {
    s.more();
    s.prepare();
    s.a.ask(Request::Freeze {
        hold: ID,
        scope: Scope::All,
    });
    let ring = s.stop_vms();
    s.a.ask(Request::Seal {
        hold: ID,
        timeout_ms: 5000,
    });
    s.b.ask(Request::IncomingRestore { hold: ID });
    s.b.ask(Request::Commit { hold: ID });
    ring
}

#[test]
fn after_the_commit_frames_wait_for_a_vm_that_is_late_and_a_broadcast_comes_once() {
    let s = Scene::new();
    let ring = committed(&s);
    // Until the announcement the network floods to both hosts.
    let broadcast = frame(9, MacAddr::BROADCAST, 1);
    s.a.ports[UP].push(broadcast.clone());
    s.b.ports[UP].push(broadcast);
    s.b.refill(ring);
    s.b.plug(P);
    s.place.store(2, Ordering::Release);
    // `m` takes its time, and its device goes away once more.
    std::thread::sleep(Duration::from_millis(300));
    s.b.plug(M);
    std::thread::sleep(Duration::from_millis(5));
    s.a.ask(Request::Depart {
        hold: ID,
        grace_ms: 10_000,
    });
    s.b.ask(Request::Announce { hold: ID });
    eventually("the source is done", || {
        s.a.status().state == HoldState::Departed
    });
    s.more();
    assert_eq!(s.received(9), 1, "the broadcast");
    s.verdict();
}

#[test]
fn a_shipment_that_the_source_has_put_back_cannot_be_committed() {
    let s = Scene::new();
    s.more();
    s.prepare();
    s.a.ask(Request::Freeze {
        hold: ID,
        scope: Scope::All,
    });
    let ring = s.stop_vms();
    s.a.ask(Request::Seal {
        hold: ID,
        timeout_ms: 5000,
    });
    s.b.ask(Request::IncomingRestore { hold: ID });
    s.a.ask(Request::HoldAbort { hold: ID });
    // The source's word may be on its way.
    std::thread::sleep(Duration::from_millis(100));
    let (code, what) = refusal(&s.b, Request::Commit { hold: ID });
    assert_eq!(code, RefusalCode::State);
    assert!(what.contains("put everything back"), "{what}");
    s.b.ask(Request::HoldAbort { hold: ID });
    s.a.refill(ring);
    s.a.plug(P);
    s.a.plug(M);
    s.place.store(0, Ordering::Release);
    s.more();
    s.verdict();
}

#[test]
fn frames_of_an_earlier_run_are_not_mixed_with_a_new_hold() {
    let s = Scene::new();
    let key = LaneKey {
        from: "p".into(),
        queue: 0,
        to: "m".into(),
    };
    let _left = s.w.source.create(ID, Kind::Source, &key).unwrap();
    let (code, what) = refusal(&s.a, Request::HoldOpen(open_args(&s, &["m"])));
    assert_eq!(code, RefusalCode::Busy, "{what}");
    assert!(what.contains("earlier run"), "{what}");
    s.more();
    s.verdict();
}

#[test]
fn an_abort_frees_what_a_target_had_received_before_it_was_restarted() {
    let s = Scene::new();
    let key = LaneKey {
        from: "p".into(),
        queue: 0,
        to: "m".into(),
    };
    for (site, spool, kind) in [
        (&s.b, &s.w.target, Kind::Incoming),
        (&s.a, &s.w.source, Kind::Source),
    ] {
        drop(spool.create(ID, kind, &key).unwrap());
        assert!(spool.used_bytes() > 0);
        let (code, _) = refusal(site, Request::HoldAbort { hold: ID });
        assert_eq!(code, RefusalCode::Unknown, "it is no hold of this run");
    }
    assert_eq!(s.w.target.used_bytes(), 0);
    assert!(s.w.source.used_bytes() > 0, "accepted frames are kept");
    s.more();
    s.verdict();
}

#[test]
fn a_hold_that_still_waits_for_its_vm_does_not_disarm_the_next_one() {
    let s = Scene::new();
    s.more();
    s.prepare();
    s.a.ask(Request::Freeze {
        hold: ID,
        scope: Scope::All,
    });
    let ring = s.stop_vms();
    s.a.ask(Request::HoldAbort { hold: ID });
    s.b.ask(Request::HoldAbort { hold: ID });
    // Its lanes drain when the VM is there again; so does nothing to the next hold.
    s.a.refill(ring);
    s.a.plug(M);
    eventually("it is put back", || {
        s.a.status().state == HoldState::Aborted
    });
    let next = HoldId(0xbeef);
    let port = IncomingPort {
        name: "p".into(),
        vm: "p".into(),
        mac: Some(mac(MAC_P)),
    };
    s.b.ask(Request::IncomingPrepare(IncomingPrepare {
        hold: next,
        vms: vec!["p".into()],
        ports: vec![port],
        source_host: "alpha".into(),
        ticket: [6; 32],
    }));
    s.a.ask(Request::HoldOpen(HoldOpen {
        hold: next,
        ticket: [6; 32],
        ..open_args(&s, &["p"])
    }));
    s.a.plug(P);
    s.place.store(0, Ordering::Release);
    s.more();
    assert!(s.a.engine.shared().ports[P].armed(), "by the next hold");
    s.a.ask(Request::HoldAbort { hold: next });
    s.b.ask(Request::HoldAbort { hold: next });
    eventually("nobody waits any more", || {
        let ports = &s.a.engine.shared().ports;
        !ports[P].armed() && !ports[M].armed()
    });
    s.verdict();
}
