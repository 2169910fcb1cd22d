//! Two hosts in one process: real workers, real spools, real QUIC between them; ports in memory and a learning switch
//! as the network. VMs `p` and `m` move while `p` and an outside station `o` send numbered frames to `m`.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use gangway_shared::api::{
    HoldInfo, HoldOpen, HoldState, IncomingPort, IncomingPrepare, LedgerPage, RefusalCode, Reply,
    Request, Role, Scope,
};
use gangway_shared::config::HostConfig;
use gangway_shared::config::valid::{Sync, VmConfig};
use gangway_shared::id::{HoldId, LaneKey, MacAddr};
use gangway_shared::ledger::{IndexBatch, LaneKind, Ledger, LedgerLane, account};

use super::{Host, Left, Manager, Vms, workers_of};
use crate::addresses::Addresses;
use crate::control::Handler;
use crate::datapath::engine::{Engine, Port};
use crate::datapath::stats::DROP_NAMES;
use crate::datapath::tests::{config, eventually, frame, mac};
use crate::port::Attach;
use crate::port::memory::MemoryPort;
use crate::ship::Acceptor;
use crate::ship::tests::World;
use crate::spool::{Kind, Spool};

mod moves;
mod overdue;
mod restart;
mod uplink;

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

/// Of which nothing is known but that nobody serves their sockets, and whether their process was ours.
#[derive(Default)]
struct Gone {
    vms: Mutex<Vec<String>>,
    not_ours: AtomicBool,
}

impl Vms for Gone {
    fn pid(&self, _: &str) -> Option<u32> {
        None
    }
    fn status(&self, _: &str) -> Option<String> {
        None
    }
    fn has_ended(&self, vm: &str, hold: HoldId) -> bool {
        hold == ID && self.is_absent(vm) && !self.not_ours.load(Ordering::Relaxed)
    }
    fn is_absent(&self, vm: &str) -> bool {
        self.vms.lock().unwrap().iter().any(|v| v == vm)
    }
}

/// A run of a switch.
struct Run {
    manager: Arc<Manager>,
    engine: Arc<Engine>,
    spool: Arc<Spool>,
}

/// A host: what outlives its switch, and the switch.
struct Site {
    config: HostConfig,
    acceptor: Arc<Acceptor>,
    dialer: (quinn::Endpoint, quinn::ClientConfig),
    runtime: tokio::runtime::Handle,
    run: Mutex<Option<Run>>,
    gone: Arc<Gone>,
    ports: [MemoryPort; 3],
    /// The second queue of `p`.
    second: MemoryPort,
    /// The keeper's.
    _kept: tempfile::TempDir,
}

impl Site {
    fn new(w: &World, name: &str, change: impl Fn(&mut HostConfig)) -> Site {
        let mut cfg = config(&["p", "m", "up0"], 2, w.dir.path().join(name));
        cfg.name = name.into();
        let kept = tempfile::tempdir_in("/dev/shm").expect("a folder in memory");
        cfg.keeper_dir = Some(kept.path().to_path_buf());
        cfg.spool.sync = Sync::Batch;
        cfg.spool.segment_bytes = 256 << 10;
        cfg.spool.quota_bytes = 256 << 20;
        for (i, (vm, n)) in [("p", MAC_P), ("m", MAC_M)].into_iter().enumerate() {
            cfg.ports[i].vm = Some(vm.into());
            cfg.ports[i].mac = Some(mac(n));
            cfg.vms.push(VmConfig {
                name: vm.into(),
                qmp: "/nowhere".into(),
                incoming: None,
            });
        }
        change(&mut cfg);
        let site = Site {
            config: cfg,
            acceptor: w.acceptor.clone(),
            dialer: (w.endpoint.clone(), w.client.clone()),
            runtime: w.rt.handle().clone(),
            run: Mutex::default(),
            gone: Arc::default(),
            ports: [
                MemoryPort::default(),
                MemoryPort::default(),
                MemoryPort::default(),
            ],
            second: MemoryPort::default(),
            _kept: kept,
        };
        site.start(&[UP]);
        site
    }

    /// As `run::Switch` does it; these ports come up.
    fn start(&self, up: &[usize]) {
        let (spool, recovered) = Spool::open(&self.config.spool).unwrap();
        let left = Left::read(&spool, recovered).unwrap();
        let mut config = self.config.clone();
        config.workers.count = config.workers.count.max(workers_of(&left));
        let engine = Engine::start(&config).unwrap();
        let addresses = Addresses::new(&config, engine.shared().clone());
        let manager = Arc::new(Manager::new(Host {
            engine: engine.clone(),
            addresses: addresses.clone(),
            spool: spool.clone(),
            acceptor: self.acceptor.clone(),
            dialer: Some(self.dialer.clone()),
            runtime: self.runtime.clone(),
            taps: Default::default(),
            vms: self.gone.clone(),
            config,
        }));
        manager.take_up(left);
        addresses.take_up();
        *self.run.lock().unwrap() = Some(Run {
            manager,
            engine,
            spool,
        });
        for &p in up {
            self.engine().set_tx(p, vec![(0, self.ports[p].queues().1)]);
        }
        self.engine().take_up().unwrap();
        up.iter().for_each(|p| self.plug(*p));
    }

    /// `kill -9`: nothing is told to anybody, nothing is put back.
    fn kill(&self) {
        let run = self.run.lock().unwrap().take().unwrap();
        run.engine.stop();
        run.manager.vanish();
        let spool = Arc::downgrade(&run.spool);
        drop(run);
        eventually("nobody has its spool", || spool.strong_count() == 0);
    }

    fn manager(&self) -> Arc<Manager> {
        self.run.lock().unwrap().as_ref().unwrap().manager.clone()
    }

    fn engine(&self) -> Arc<Engine> {
        self.run.lock().unwrap().as_ref().unwrap().engine.clone()
    }

    fn spool(&self) -> Arc<Spool> {
        self.run.lock().unwrap().as_ref().unwrap().spool.clone()
    }

    fn plug(&self, port: usize) {
        let (rx, tx) = self.ports[port].queues();
        self.engine().set_tx(port, vec![(0, tx)]);
        self.engine().attach_rx(port, 0, rx);
        if port == P {
            self.engine().attach_rx(P, 1, self.second.queues().0);
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
        self.engine().detach_rx(port, 0);
        self.engine().detach_rx(port, 1);
        self.engine().clear_tx(port, 0);
    }

    fn ask(&self, r: Request) -> Reply {
        let reply = self.manager().call(r.clone());
        if let Reply::Refused(e) = &reply {
            panic!("{r:?}: {e}");
        }
        reply
    }

    fn ledger(&self, role: Role) -> (Ledger, Vec<LedgerLane>) {
        match self.ask(Request::LedgerShow {
            hold: ID,
            role,
            lane: 0,
        }) {
            Reply::Ledger { ledger, lanes } => {
                assert_eq!(ledger.lanes as usize, lanes.len());
                (ledger, lanes)
            }
            other => panic!("{other:?}"),
        }
    }

    /// As `gangway verify` gets it.
    fn end(&self, role: Role) -> gangway::ledger::End {
        let (ledger, lanes) = self.ledger(role);
        let record = |(n, lane): (usize, LedgerLane)| gangway::ledger::LaneRecord {
            index: lane.indexed.then(|| self.index(role, n)),
            lane,
        };
        gangway::ledger::End {
            ledger,
            lanes: lanes.into_iter().enumerate().map(record).collect(),
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
    place: Arc<Mutex<u32>>,
    /// Nothing is looked for any more.
    done: Arc<AtomicBool>,
    threads: Vec<std::thread::JoinHandle<()>>,
    w: World,
}

impl Scene {
    fn new() -> Scene {
        Scene::with(|_| ())
    }

    /// On hosts that are configured otherwise.
    fn with(change: impl Fn(&mut HostConfig)) -> Scene {
        let w = World::new(Sync::Batch);
        let (a, b) = (
            Arc::new(Site::new(&w, "alpha", &change)),
            Arc::new(Site::new(&w, "beta", &change)),
        );
        a.plug(M);
        a.plug(P);
        let seats = a.engine().pin().seats(P);
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
            while !done.load(Ordering::Relaxed) {
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
                // Nothing is sent behind the answer of `runs_at`, or of `verdict`.
                let place = place.lock().unwrap();
                if !stop.load(Ordering::Relaxed) {
                    n[1] += 1;
                    let up = if m_at_b { &b } else { &a };
                    up.ports[UP].push(frame(MAC_O, mac(MAC_M), n[1]));
                    let p = match *place {
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
                drop(place);
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

    /// Where `p` sends from now on.
    fn runs_at(&self, place: u32) {
        *self.place.lock().unwrap() = place;
    }

    /// `p` sends on here, and the switch takes it.
    fn does_not_wait(&self, site: &Site) {
        let then = self.sent[0].load(Ordering::Acquire) + 200;
        eventually("p does not wait for m", || {
            self.sent[0].load(Ordering::Acquire) > then && site.ports[P].waiting() < 100
        });
    }

    /// Stops `p` and `m` on A. What they had queued stays in their rings.
    fn stop_vms(&self) -> Vec<Vec<u8>> {
        self.runs_at(1);
        self.a.unplug(P);
        self.a.unplug(M);
        let mut ring = self.a.ports[P].take_waiting();
        ring.extend(self.a.second.take_waiting());
        ring
    }

    /// What has not come, and where frames wait.
    fn whereabouts(&self) -> String {
        let got = self.got.lock().unwrap();
        let missing = |(i, who): (usize, u8)| {
            let seen: HashSet<u32> = got.iter().filter(|g| g.0 == who).map(|g| g.1).collect();
            let n = self.sent[i].load(Ordering::Acquire);
            let missing: Vec<u32> = (1..=n).filter(|n| !seen.contains(n)).collect();
            format!("of {n} from station {who}: {missing:?}; ")
        };
        let missing: String = SENDERS.into_iter().enumerate().map(missing).collect();
        let waiting = |s: &Site| {
            let ports = s.ports.iter().chain([&s.second]);
            ports.map(MemoryPort::waiting).collect::<Vec<_>>()
        };
        let drops = |s: &Site| -> Vec<(usize, &str, u64)> {
            let engine = s.engine();
            let ports = engine.shared().ports.iter().enumerate();
            let each = |(port, p): (usize, &Arc<Port>)| {
                let drops = p.counters.drops.iter().map(|d| d.load(Ordering::Relaxed));
                let named = DROP_NAMES.iter().zip(drops);
                named
                    .filter(|d| d.1 > 0)
                    .map(|(why, n)| (port, *why, n))
                    .collect::<Vec<_>>()
            };
            ports.flat_map(each).collect()
        };
        let (a, b) = (&self.a, &self.b);
        format!(
            "{missing} wait at a: {:?}, at b: {:?}; dropped: {:?} {:?}",
            waiting(a),
            waiting(b),
            drops(a),
            drops(b)
        )
    }

    /// Everything once, in order.
    fn verdict(mut self) {
        eventually("frames to judge by", || {
            self.sent.iter().all(|n| n.load(Ordering::Acquire) > 40)
        });
        {
            let _between_frames = self.place.lock().unwrap();
            self.stop.store(true, Ordering::Relaxed);
        }
        for (i, who) in SENDERS.into_iter().enumerate() {
            let n = self.sent[i].load(Ordering::Acquire) as usize;
            let until = Instant::now() + Duration::from_secs(20);
            while self.received(who) < n {
                assert!(Instant::now() < until, "{}", self.whereabouts());
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        std::thread::sleep(Duration::from_millis(50));
        self.end();
        let got = self.got.lock().unwrap();
        for (i, who) in SENDERS.into_iter().enumerate() {
            let n = self.sent[i].load(Ordering::Acquire);
            let seen: Vec<u32> = got
                .iter()
                .filter(|(s, _)| *s == who)
                .map(|(_, n)| *n)
                .collect();
            let wrong = seen.iter().zip(1..).position(|(a, b)| *a != b);
            assert_eq!(
                (wrong, seen.len()),
                (None, n as usize),
                "from station {who}: {:?}",
                wrong.map(|w| &seen[w..])
            );
        }
    }

    fn end(&mut self) {
        self.done.store(true, Ordering::Relaxed);
        for t in self.threads.drain(..) {
            t.join().unwrap();
        }
        for site in [&self.a, &self.b] {
            site.engine().stop();
        }
    }
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
    match site.manager().call(r) {
        Reply::Refused(e) => (e.code, e.message),
        other => panic!("{other:?}"),
    }
}

/// Everything before the commit, with both VMs stopped.
fn restored(s: &Scene) -> Vec<Vec<u8>> {
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
    ring
}

/// Everything up to the commit.
fn committed(s: &Scene) -> Vec<Vec<u8>> {
    let ring = restored(s);
    s.b.ask(Request::Commit { hold: ID });
    ring
}

/// Both VMs run on A again.
fn resumed(s: &Scene, ring: Vec<Vec<u8>>) {
    s.a.refill(ring);
    s.a.plug(P);
    s.a.plug(M);
    s.runs_at(0);
}

/// All stages of both hosts have seen the same frames, and the indexes add up to them.
fn the_ledgers_agree(s: &Scene) {
    verified(s, "moved");
    let (a, b) = (s.a.ledger(Role::Source).1, s.b.ledger(Role::Target).1);
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

/// `gangway verify` calls it clean; how many frames it has compared.
fn verified(s: &Scene, outcome: &str) -> u64 {
    let (a, b) = (s.a.end(Role::Source), s.b.end(Role::Target));
    let v = gangway::ledger::verify(&a, &b);
    assert!(v.clean, "{v:#?}");
    assert_eq!(v.outcome, outcome);
    v.frames
}
