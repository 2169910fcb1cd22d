//! Two hosts in one process: real workers, real spools, real QUIC between them; ports in memory and a learning switch
//! as the network. VMs `p` and `m` move while `p` and an outside station `o` send numbered frames to `m`.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use gangway_shared::api::{
    HoldInfo, HoldOpen, HoldState, IncomingPort, IncomingPrepare, RefusalCode, Reply, Request,
    Scope,
};
use gangway_shared::config::valid::{Sync, VmConfig};
use gangway_shared::id::{HoldId, MacAddr};

use super::Manager;
use super::manager::Host;
use crate::control::Handler;
use crate::datapath::Engine;
use crate::datapath::tests::{config, eventually, frame, mac};
use crate::port::Attach;
use crate::port::memory::MemoryPort;
use crate::ship::tests::World;

const ID: HoldId = HoldId(0xfeed);
const P: usize = 0;
const M: usize = 1;
const UP: usize = 2;
const MAC_P: u8 = 1;
const MAC_M: u8 = 2;
const MAC_O: u8 = 3;

struct Site {
    manager: Arc<Manager>,
    engine: Arc<Engine>,
    ports: [MemoryPort; 3],
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
            vm_pid: Box::new(|_| None),
            config: cfg,
        }));
        let site = Site {
            manager,
            engine,
            ports,
        };
        site.plug(UP);
        site
    }

    fn plug(&self, port: usize) {
        let (rx, tx) = self.ports[port].queues();
        self.engine.set_tx(port, Some(tx));
        self.engine.attach_rx(port, 0, rx);
    }

    /// What a stopping vhost-user VM does.
    fn unplug(&self, port: usize) {
        self.engine.detach_rx(port, 0);
        self.engine.set_tx(port, None);
    }

    fn ask(&self, r: Request) -> Reply {
        let reply = self.manager.call(r.clone());
        if let Reply::Refused(e) = &reply {
            panic!("{r:?}: {e}");
        }
        reply
    }

    fn status(&self) -> HoldInfo {
        match self.ask(Request::HoldStatus { hold: ID }) {
            Reply::Hold(i) => i,
            other => panic!("{other:?}"),
        }
    }
}

fn number(f: &[u8]) -> u32 {
    u32::from_be_bytes(f[20..24].try_into().unwrap())
}

/// Everything that runs beside the migration.
struct Scene {
    a: Arc<Site>,
    b: Arc<Site>,
    /// What `m` received, in order: (sender, number).
    got: Arc<Mutex<Vec<(u8, u32)>>>,
    sent: Arc<[AtomicU32; 2]>,
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
        a.plug(P);
        a.plug(M);
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
            let mut n = [0u32; 2];
            let mut ending = false;
            while !done.load(Ordering::Relaxed) {
                ending |= stop.load(Ordering::Relaxed);
                for f in b.ports[UP].take_delivered() {
                    if f[6..12] == mac(MAC_M).0 {
                        m_at_b = true;
                    }
                    a.ports[UP].push(f);
                }
                a.ports[UP].take_delivered();
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
                    }
                    sent[0].store(n[0], Ordering::Release);
                    sent[1].store(n[1], Ordering::Release);
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
        let (p, o) = (self.received(MAC_P), self.received(MAC_O));
        eventually("frames flow", || {
            self.received(MAC_P) > p + 20 && self.received(MAC_O) > o + 20
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
        self.a.ports[P].take_waiting()
    }

    /// Everything once, in order.
    fn verdict(mut self) {
        self.stop.store(true, Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(50));
        for (i, who) in [MAC_P, MAC_O].into_iter().enumerate() {
            let n = self.sent[i].load(Ordering::Acquire) as usize;
            eventually("the last frame", || self.received(who) >= n);
        }
        std::thread::sleep(Duration::from_millis(50));
        self.done.store(true, Ordering::Relaxed);
        for t in self.threads.drain(..) {
            t.join().unwrap();
        }
        let got = self.got.lock().unwrap();
        for (i, who) in [MAC_P, MAC_O].into_iter().enumerate() {
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
    std::thread::sleep(Duration::from_millis(20));
    let ring = s.stop_vms();
    s.a.ask(Request::Seal {
        hold: ID,
        timeout_ms: 5000,
    });
    s.b.ask(Request::IncomingRestore { hold: ID });
    s.b.ask(Request::Commit { hold: ID });
    // The VMs run on B: their rings come with what they had queued.
    ring.into_iter().for_each(|f| s.b.ports[P].push(f));
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
    assert!(
        a.lanes
            .iter()
            .any(|l| l.lane.from == "p" && l.held.frames > 0)
    );
    assert!(
        a.lanes
            .iter()
            .any(|l| l.lane.from == "up0" && l.held.frames > 0)
    );
    s.a.ask(Request::HoldRelease { hold: ID });
    s.b.ask(Request::HoldRelease { hold: ID });
    s.verdict();
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
            ring.into_iter().for_each(|f| s.a.ports[P].push(f));
            s.a.plug(P);
            s.a.plug(M);
            s.place.store(0, Ordering::Release);
        }
        eventually("it is put back", || {
            s.a.status().state == HoldState::Aborted
        });
        assert_eq!(s.b.status().state, HoldState::Aborted);
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
