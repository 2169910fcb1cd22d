//! The engine with real worker threads and ports in memory.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use gangway_shared::config::HostConfig;
use gangway_shared::config::valid::{
    HoldConfig, LedgerConfig, Poll, PortConfig, PortKind, SpoolConfig, SpoolLimits, Sync, Workers,
};
use gangway_shared::id::{HoldId, LaneKey, MacAddr};

use super::Engine;
use super::crew::{Place, Unchanged};
use super::engine::Mode;
use super::lane::{Behind, Drain, Progress, Source, Stage};
use super::stats::{Drop as Dropped, port_total};
use super::worker::{Command, Seat};
use crate::port::Attach;
use crate::port::memory::MemoryPort;
use crate::spool::{Kind, Spool};

mod deaths;
mod wide;

pub(crate) fn config(names: &[&str], workers: usize, spool: PathBuf) -> HostConfig {
    let port = |n: &&str| PortConfig {
        name: (*n).into(),
        vm: None,
        mac: None,
        kind: if n.starts_with("up") {
            PortKind::Uplink {
                device: (*n).into(),
            }
        } else {
            PortKind::VhostUser {
                socket: (*n).into(),
                server: false,
            }
        },
    };
    HostConfig {
        name: "test".into(),
        state_dir: spool.with_extension("state"),
        control_socket: spool.join("control"),
        listen: None,
        tls: None,
        workers: Workers {
            count: workers,
            cpus: vec![],
            poll: Poll::Adaptive,
        },
        fdb_ageing_s: 300,
        fdb_capacity: 1024,
        flows_capacity: 1024,
        hold: HoldConfig::default(),
        ledger: LedgerConfig {
            dir: spool.join("ledger"),
            keep_days: 30,
            keep_bytes: 64 << 20,
            frames_bytes: 64 << 20,
        },
        spool: SpoolConfig {
            dir: spool,
            segment_bytes: 1 << 20,
            quota_bytes: 64 << 20,
            sync: Sync::None,
            limits: SpoolLimits::default(),
        },
        keeper_dir: None,
        migration_address: None,
        ports: names.iter().map(port).collect(),
        vms: vec![],
    }
}

pub(crate) fn mac(n: u8) -> MacAddr {
    MacAddr([2, 0, 0, 0, 0, n])
}

pub(crate) fn frame(src: u8, dst: MacAddr, n: u32) -> Vec<u8> {
    let mut f = vec![0u8; 64];
    f[..6].copy_from_slice(&dst.0);
    f[6..12].copy_from_slice(&mac(src).0);
    f[12..14].copy_from_slice(&[0x88, 0xb5]);
    f[20..24].copy_from_slice(&n.to_be_bytes());
    f
}

fn numbers(p: &MemoryPort, src: u8) -> Vec<u32> {
    let from = |f: &&Vec<u8>| f[6..12] == mac(src).0;
    p.delivered()
        .iter()
        .filter(from)
        .map(|f| u32::from_be_bytes(f[20..24].try_into().unwrap()))
        .collect()
}

pub(crate) fn eventually(what: &str, mut ok: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(20);
    while !ok() {
        assert!(Instant::now() < until, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

struct World {
    engine: Arc<Engine>,
    ports: HashMap<&'static str, MemoryPort>,
    spool: Arc<Spool>,
    _dir: tempfile::TempDir,
}

impl World {
    /// Where the lanes of a port with one queue are.
    fn seat(&self, port: usize) -> Seat {
        self.engine.pin().seats(port)[0]
    }
}

fn world(names: &[&'static str], workers: usize) -> World {
    world_with(names, workers, Sync::None)
}

fn world_with(names: &[&'static str], workers: usize, sync: Sync) -> World {
    let dir = tempfile::tempdir().unwrap();
    let mut cfg = config(names, workers, dir.path().into());
    cfg.spool.sync = sync;
    let engine = Engine::start(&cfg).unwrap();
    let (spool, _) = Spool::open(&cfg.spool).unwrap();
    let mut ports = HashMap::new();
    for (n, name) in names.iter().enumerate() {
        let p = MemoryPort::default();
        let (rx, tx) = p.queues();
        engine.set_tx(n, vec![(0, tx)]);
        engine.attach_rx(n, 0, rx);
        ports.insert(*name, p);
    }
    World {
        engine,
        ports,
        spool,
        _dir: dir,
    }
}

#[test]
fn learns_floods_and_never_echoes() {
    let w = world(&["a", "b", "c"], 2);
    w.ports["a"].push(frame(1, MacAddr::BROADCAST, 1));
    eventually("the broadcast", || {
        numbers(&w.ports["b"], 1) == [1] && numbers(&w.ports["c"], 1) == [1]
    });
    assert!(numbers(&w.ports["a"], 1).is_empty(), "no echo");
    w.ports["b"].push(frame(2, mac(1), 2));
    eventually("unicast to the learned port", || {
        numbers(&w.ports["a"], 2) == [2]
    });
    assert!(numbers(&w.ports["c"], 2).is_empty());
    w.ports["c"].push(frame(3, mac(9), 3));
    eventually("unknown is flooded", || {
        numbers(&w.ports["a"], 3) == [3] && numbers(&w.ports["b"], 3) == [3]
    });
    let (sum, _) = super::stats::link_total(&w.engine.shared().books.all(), 1, 0);
    assert_eq!((sum.frames, sum.bytes), (1, 64));
    w.engine.stop();
}

#[test]
fn a_station_that_moves_is_followed_at_once_also_by_known_flows() {
    let w = world(&["a", "b", "c"], 1);
    w.ports["b"].push(frame(2, MacAddr::BROADCAST, 1));
    eventually("2 is learned", || numbers(&w.ports["a"], 2) == [1]);
    let mut n = 0;
    for at in ["c", "b", "c", "b"] {
        let (to, other) = (&w.ports[at], if at == "b" { "c" } else { "b" });
        let before = numbers(&w.ports["a"], 2).len();
        to.push(frame(2, MacAddr::BROADCAST, 1));
        eventually("2 has moved", || numbers(&w.ports["a"], 2).len() > before);
        let (had, others) = (numbers(to, 1).len(), numbers(&w.ports[other], 1).len());
        for _ in 0..100 {
            n += 1;
            w.ports["a"].push(frame(1, mac(2), n));
        }
        eventually("all arrive", || numbers(to, 1).len() == had + 100);
        assert_eq!(
            numbers(&w.ports[other], 1).len(),
            others,
            "none to the old place"
        );
    }
    w.engine.stop();
}

#[test]
fn four_times_as_many_flows_as_there_is_room_for_go_where_they_should_in_order() {
    const FLOWS: u32 = 4096;
    let w = world(&["a", "b", "c"], 1);
    for (at, n) in [("b", 2), ("c", 3)] {
        w.ports[at].push(frame(n, MacAddr::BROADCAST, 0));
        eventually("it is learned", || numbers(&w.ports["a"], n) == [0]);
    }
    let to = |n: u32| 2 + (n / 5 % 2) as u8;
    for n in 0..3 * FLOWS {
        let mut f = frame(1, mac(to(n)), n);
        f[12..14].copy_from_slice(&[8, 0]);
        f[26..30].copy_from_slice(&(n % FLOWS).to_be_bytes());
        w.ports["a"].push(f);
    }
    for (at, port, n) in [("b", 1, 2), ("c", 2, 3)] {
        let want: Vec<u32> = (0..3 * FLOWS).filter(|i| to(*i) == n).collect();
        eventually("all arrive", || {
            numbers(&w.ports[at], 1).len() == want.len()
        });
        assert_eq!(numbers(&w.ports[at], 1), want);
        eventually("all are counted", || {
            let (sum, _) = super::stats::link_total(&w.engine.shared().books.all(), 0, port);
            sum.frames == want.len() as u64
        });
    }
    w.engine.stop();
}

#[test]
fn a_frame_from_one_uplink_does_not_leave_through_another() {
    let w = world(&["a", "up0", "up1"], 1);
    w.ports["up0"].push(frame(1, MacAddr::BROADCAST, 1));
    eventually("the broadcast", || numbers(&w.ports["a"], 1) == [1]);
    assert!(numbers(&w.ports["up1"], 1).is_empty());
    w.engine.stop();
}

#[test]
fn garbage_is_counted_and_the_rest_goes_on() {
    let w = world(&["a", "b"], 1);
    w.ports["a"].push(vec![1, 2, 3]);
    w.ports["a"].push(vec![]);
    w.ports["a"].push(frame(1, MacAddr::BROADCAST, 7));
    eventually("the good one", || numbers(&w.ports["b"], 1) == [7]);
    let drops = &w.engine.shared().ports[0].counters.drops;
    assert_eq!(
        drops[super::stats::Drop::Malformed as usize].load(std::sync::atomic::Ordering::Relaxed),
        2
    );
    w.engine.stop();
}

/// A VM that has been moved relays at once what piled up for it: more than its neighbour's backlog takes.
#[test]
fn after_a_hold_a_sender_waits_for_room_and_the_network_does_not() {
    const FRAMES: u32 = 20_000;
    let w = world(&["a", "b", "up0"], 1);
    let shared = w.engine.shared();
    for (at, n) in [(0, 1), (1, 2)] {
        shared.fdb.set(mac(n), at, true, 0);
    }
    w.ports["b"].set_room(0);
    shared.ports[1].be_patient(shared.now_s());
    for n in 0..FRAMES {
        w.ports["a"].push(frame(1, mac(2), n));
        w.ports["up0"].push(frame(7, mac(2), n));
    }
    eventually("the uplink's frames are taken", || {
        w.ports["up0"].waiting() == 0
    });
    assert!(w.ports["a"].waiting() > 1000, "the rest waits in its ring");
    w.ports["b"].set_room(usize::MAX);
    eventually("all of a", || {
        numbers(&w.ports["b"], 1).len() == FRAMES as usize
    });
    assert!(numbers(&w.ports["b"], 1).is_sorted());
    let drops = &shared.ports[1].counters.drops[Dropped::Full as usize];
    let drops = drops.load(std::sync::atomic::Ordering::Relaxed);
    assert_eq!(
        drops + numbers(&w.ports["b"], 7).len() as u64,
        u64::from(FRAMES),
        "what the backlog could not take of the network's is counted"
    );
}

#[test]
fn before_the_switch_stops_nothing_more_is_taken_and_what_waits_is_delivered() {
    let w = world(&["a", "b"], 2);
    w.ports["b"].push(frame(2, MacAddr::BROADCAST, 0));
    eventually("it is learned", || numbers(&w.ports["a"], 2) == [0]);
    w.ports["b"].set_room(0);
    (1..=100).for_each(|n| w.ports["a"].push(frame(1, mac(2), n)));
    eventually("all wait", || w.ports["a"].waiting() == 0);
    assert!(!w.engine.rest(Duration::from_millis(20)).unwrap());
    w.ports["a"].push(frame(1, mac(2), 101));
    w.ports["b"].set_room(usize::MAX);
    assert!(w.engine.rest(Duration::from_secs(20)).unwrap());
    assert_eq!(numbers(&w.ports["b"], 1), (1..=100).collect::<Vec<_>>());
    assert_eq!(w.ports["a"].waiting(), 1, "it is still the sender's");
    w.engine.stop();
}

#[test]
fn what_is_held_does_not_keep_the_switch_from_stopping() {
    let w = world(&["a", "b"], 1);
    w.ports["b"].push(frame(2, MacAddr::BROADCAST, 0));
    eventually("it is learned", || numbers(&w.ports["a"], 2) == [0]);
    let key = LaneKey {
        from: "a".into(),
        queue: 0,
        to: "b".into(),
    };
    let (writer, q) = w.spool.create(HoldId(1), Kind::Source, &key).unwrap();
    w.engine
        .batch(vec![Command::Hold(w.seat(0), 1, writer)])
        .unwrap();
    w.ports["a"].push(frame(1, mac(2), 1));
    eventually("it is held", || q.last_seq() == 1);
    assert!(w.engine.rest(Duration::ZERO).unwrap());
    w.engine.stop();
}

#[test]
fn a_receiver_that_takes_nothing_is_not_tried_in_every_round() {
    let names = ["stuck", "b", "c", "d", "e", "f"];
    let w = world(&names, 1);
    let busy = Place {
        cpu: None,
        poll: Poll::Busy,
    };
    set_workers(&w, &[busy]).unwrap();
    let stuck = &w.ports["stuck"];
    stuck.push(frame(1, MacAddr::BROADCAST, 0));
    eventually("it is learned", || numbers(&w.ports["b"], 1) == [0]);
    stuck.set_room(0);
    let senders = || (2u8..).zip(&names[1..]);
    for (src, name) in senders() {
        w.ports[name].push(frame(src, mac(1), 1));
    }
    eventually("all wait", || {
        senders().all(|(_, n)| w.ports[n].waiting() == 0)
    });
    std::thread::sleep(Duration::from_millis(100));
    let (since, before) = (Instant::now(), stuck.refused());
    std::thread::sleep(Duration::from_millis(50));
    let tried = stuck.refused() - before;
    let pauses = since.elapsed().as_micros() / super::stuck::LAST.as_micros();
    // Each sender's lane is tried once as it comes; then all of them together are tried so often.
    assert!(
        u128::from(tried) < pauses + 20,
        "{tried} times in {pauses} pauses"
    );
    assert!(tried > 0);
    stuck.set_room(usize::MAX);
    for (src, _) in senders() {
        eventually("all arrive", || numbers(stuck, src) == [1]);
    }
    w.engine.stop();
}

#[test]
fn a_standby_port_gets_nothing_and_an_address_is_not_stolen() {
    let w = world(&["a", "b", "up0"], 1);
    let shared = w.engine.shared();
    shared.ports[1].set_mode(Mode::Standby);
    w.ports["a"].push(frame(1, MacAddr::BROADCAST, 1));
    eventually("the uplink", || numbers(&w.ports["up0"], 1) == [1]);
    assert!(numbers(&w.ports["b"], 1).is_empty());
    // The network claims the address of a VM that is here and up: not believed, and not the mark of a move.
    shared.fdb.set(mac(1), 0, true, shared.now_s());
    w.ports["up0"].push(frame(1, MacAddr::BROADCAST, 2));
    w.ports["up0"].push(frame(5, mac(1), 3));
    eventually("the frame", || numbers(&w.ports["a"], 5) == [3]);
    assert!(
        !shared.ports[0]
            .marker
            .load(std::sync::atomic::Ordering::Acquire)
    );
    shared.ports[0].set_mode(Mode::Held);
    w.ports["up0"].push(frame(1, MacAddr::BROADCAST, 4));
    eventually("the mark", || {
        shared.ports[0]
            .marker
            .load(std::sync::atomic::Ordering::Acquire)
    });
    w.engine.stop();
}

/// Two senders on two workers under load: after the acknowledged cut nothing arrives, and after the drain everything has
/// arrived once and in order.
#[test]
fn a_freeze_is_one_cut_over_all_workers_and_a_drain_keeps_order() {
    let w = world(&["a", "b", "c"], 2);
    w.ports["c"].push(frame(3, MacAddr::BROADCAST, 0));
    eventually("c is learned", || numbers(&w.ports["a"], 3) == [0]);
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let senders: Vec<_> = [("a", 1u8), ("b", 2)]
        .map(|(name, src)| {
            let (p, stop) = (w.ports[name].clone(), stop.clone());
            std::thread::spawn(move || {
                let mut n = 0;
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    if p.waiting() < 200 {
                        n += 1;
                        p.push(frame(src, mac(3), n));
                    } else {
                        std::thread::yield_now();
                    }
                }
                n
            })
        })
        .into();
    for round in 1..=5u64 {
        let mut queues = Vec::new();
        let mut commands = Vec::new();
        for (port, name) in [(0usize, "a"), (1, "b")] {
            let key = LaneKey {
                from: name.into(),
                queue: 0,
                to: "c".into(),
            };
            let (writer, q) = w.spool.create(HoldId(round), Kind::Source, &key).unwrap();
            let seat = w.seat(port);
            commands.push(Command::Hold(seat, 2, writer));
            queues.push((seat, key, q));
        }
        let out = w.engine.batch(commands).unwrap();
        assert!(out.refused.is_empty(), "forwarding before round {round}");
        let cut = w.ports["c"].delivered_count();
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(
            w.ports["c"].delivered_count(),
            cut,
            "nothing arrives after the cut"
        );
        let mut commands = Vec::new();
        let mut ends = Vec::new();
        for (seat, key, q) in queues {
            eventually("frames are held", || q.tally().frames > 0);
            if round % 2 == 0 {
                let progress = Arc::<Progress>::default();
                ends.push(progress.clone());
                commands.push(Command::PutBack(seat, 2, None, progress));
                continue;
            }
            let (writer, local) = w.spool.create(HoldId(round), Kind::Local, &key).unwrap();
            let source = |q: &Arc<crate::spool::Queue>| Source {
                reader: q.reader(),
                progress: Arc::default(),
            };
            let own = source(&local);
            ends.push(own.progress.clone());
            let stage = Stage {
                sources: vec![source(&q)],
                ..Stage::default()
            };
            let drain = Drain {
                before: None,
                older: [stage].into(),
                wait: None,
                behind: Some(Behind { writer, local: own }),
                ended: Vec::new(),
            };
            commands.push(Command::Drain(seat, 2, Box::new(drain)));
        }
        w.engine.batch(commands).unwrap();
        eventually("the drain ends under load", || {
            ends.iter().all(|e| e.finished())
        });
        w.spool.remove_hold(HoldId(round)).unwrap();
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    for (src, s) in (1u8..).zip(senders) {
        let n = s.join().unwrap();
        eventually("the last frame", || {
            numbers(&w.ports["c"], src).len() >= n as usize
        });
        assert_eq!(
            numbers(&w.ports["c"], src),
            (1..=n).collect::<Vec<u32>>(),
            "sender {src}: once each, in order"
        );
    }
    w.engine.stop();
}

#[test]
fn queues_move_when_a_port_goes_but_not_during_a_hold_and_not_while_frames_wait() {
    let w = world(&["a", "b", "c", "d"], 2);
    let worker = |port| w.engine.pin().seats(port)[0].worker;
    w.ports["d"].push(frame(4, MacAddr::BROADCAST, 1));
    eventually("4 is learned", || numbers(&w.ports["a"], 4) == [1]);
    assert!(!w.engine.rebalance(), "two queues each");
    let (stay, go): (Vec<usize>, Vec<usize>) = (0..3).partition(|p| worker(*p) == worker(3));
    assert_eq!((stay.len(), go.len()), (1, 2));
    for p in &go {
        w.engine.detach_rx(*p, 0).unwrap();
    }
    let pin = w.engine.pin();
    assert!(!w.engine.rebalance(), "a hold is open");
    drop(pin);
    // Both that could move have something waiting.
    let names = ["a", "b", "c", "d"];
    let (one, other) = (names[stay[0]], names[go[0]]);
    w.ports[other].push(frame(9, MacAddr::BROADCAST, 1));
    w.ports["d"].set_room(0);
    w.ports[one].set_room(0);
    let from = stay[0] as u8 + 1;
    let mut n = 0;
    let mut send = |name: &str, src: u8, to: u8| {
        n += 1;
        w.ports[name].push(frame(src, mac(to), n));
    };
    send(one, from, 4);
    eventually("d is full", || w.ports[one].waiting() == 0);
    send("d", 4, from);
    eventually("the other one, too", || w.ports["d"].waiting() == 0);
    assert!(!w.engine.rebalance(), "frames wait");
    w.ports["d"].set_room(usize::MAX);
    w.ports[one].set_room(usize::MAX);
    eventually("it moves", || w.engine.rebalance());
    assert_ne!(worker(3), worker(stay[0]));
    send(one, from, 4);
    eventually("in order", || numbers(&w.ports["d"], from) == [1, 3]);
    w.engine.stop();
}

fn places(n: usize) -> Vec<Place> {
    let place = Place {
        cpu: None,
        poll: Poll::Adaptive,
    };
    vec![place; n]
}

fn set_workers(w: &World, places: &[Place]) -> Result<Vec<Place>, Unchanged> {
    w.engine.set_workers(|_| Ok(places.to_vec()))
}

/// Two ports send to each other and to a third one that is often full, while workers come and go.
#[test]
fn workers_come_and_go_and_no_frame_is_lost_or_overtaken() {
    let w = world(&["a", "b", "c"], 1);
    for (name, src) in [("a", 1), ("b", 2), ("c", 3)] {
        w.ports[name].push(frame(src, MacAddr::BROADCAST, 0));
    }
    let learned = || {
        let heard = |n: &str, s| !numbers(&w.ports[n], s).is_empty();
        heard("b", 1) && heard("c", 2) && heard("a", 3)
    };
    eventually("all are learned", learned);
    // Else a full backlog drops what comes.
    w.engine.shared().ports[2].arm();
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let sender = |name: &str, src: u8, to: [u8; 2]| {
        let (port, stop) = (w.ports[name].clone(), stop.clone());
        std::thread::spawn(move || {
            let mut n = 0;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                n += 1;
                for to in to {
                    port.push(frame(src, mac(to), n));
                }
                if port.waiting() > 256 {
                    std::thread::sleep(Duration::from_micros(200));
                }
            }
            n
        })
    };
    let senders = [sender("a", 1, [2, 3]), sender("b", 2, [1, 3])];
    for n in [2, 3, 1, 2, 1, 4, 1].into_iter().cycle().take(21) {
        w.ports["c"].set_room(0);
        // There is room for it before the workers lose patience with it.
        let c = w.ports["c"].clone();
        let room = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(3));
            c.set_room(usize::MAX);
        });
        set_workers(&w, &places(n)).expect("nothing is held");
        room.join().unwrap();
        let workers = w.engine.workers();
        assert_eq!(workers.len(), n);
        let served: Vec<usize> = workers.iter().map(|w| w.queues.len()).collect();
        assert_eq!(served.iter().sum::<usize>(), 3, "{served:?}");
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    let sent = senders.map(|s| s.join().unwrap());
    for (src, n) in [(1, sent[0]), (2, sent[1])] {
        for name in ["a", "b", "c"] {
            if (name, src) == ("a", 1) || (name, src) == ("b", 2) {
                continue;
            }
            let got = || numbers(&w.ports[name], src);
            eventually("all frames", || got().last() == Some(&n));
            let want: Vec<u32> = (0..=n).collect();
            assert_eq!(got(), want, "{src} to {name}");
        }
    }
    let [a, b, c] = [0, 1, 2].map(|n| port_total(&w.engine.shared().books.all(), n).queues[0]);
    // What each has sent, and one that was flooded: those who have left are counted, too.
    let rx = |n: u32| u64::from(n) * 2 + 1;
    assert_eq!((a.0, b.0, c.0), (rx(sent[0]), rx(sent[1]), 1));
    w.engine.stop();
}

#[test]
fn a_hold_keeps_the_workers_that_there_are_and_a_receiver_that_takes_nothing_does_too() {
    let w = world(&["a", "b"], 2);
    let numbers_of = |n: usize| w.engine.workers()[n].queues.len();
    assert_eq!((numbers_of(0), numbers_of(1)), (1, 1));
    let pin = w.engine.pin();
    for n in [1, 3] {
        let e = set_workers(&w, &places(n)).unwrap_err();
        assert!(matches!(e, Unchanged::Held), "{e}");
    }
    let busy = Place {
        cpu: None,
        poll: Poll::Busy,
    };
    set_workers(&w, &[busy; 2]).expect("only how they wait");
    assert_eq!(w.engine.workers()[1].place, busy);
    set_workers(&w, &places(2)).unwrap();
    drop(pin);
    let nowhere = Place {
        cpu: Some(8000),
        poll: Poll::Adaptive,
    };
    let e = set_workers(&w, &[nowhere, busy]);
    assert!(matches!(e, Err(Unchanged::NoCpu(8000, _))));
    assert_eq!(w.engine.workers()[0].place.cpu, None);
    for (name, src) in [("a", 1), ("b", 2)] {
        w.ports[name].push(frame(src, MacAddr::BROADCAST, 0));
    }
    eventually("both are learned", || {
        numbers(&w.ports["b"], 1) == [0] && numbers(&w.ports["a"], 2) == [0]
    });
    // Neither takes anything: whoever is to leave has a frame that waits.
    for name in ["a", "b"] {
        w.ports[name].set_room(0);
    }
    w.ports["a"].push(frame(1, mac(2), 1));
    w.ports["b"].push(frame(2, mac(1), 1));
    eventually("both wait", || {
        w.ports["a"].waiting() + w.ports["b"].waiting() == 0
    });
    let e = set_workers(&w, &places(1)).unwrap_err();
    assert!(matches!(e, Unchanged::Waiting { .. }), "{e}");
    assert_eq!((numbers_of(0), numbers_of(1)), (1, 1), "as it was");
    w.ports["a"].push(frame(1, mac(2), 2));
    w.ports["b"].push(frame(2, mac(1), 2));
    for name in ["a", "b"] {
        w.ports[name].set_room(usize::MAX);
    }
    set_workers(&w, &places(1)).expect("they take");
    w.ports["a"].push(frame(1, mac(2), 3));
    w.ports["b"].push(frame(2, mac(1), 3));
    eventually("in order", || {
        numbers(&w.ports["b"], 1) == [0, 1, 2, 3] && numbers(&w.ports["a"], 2) == [0, 1, 2, 3]
    });
    w.engine.stop();
}

#[test]
fn with_each_a_sender_gets_nothing_back_before_the_disk_has_it_and_others_go_on() {
    let w = world_with(&["a", "b", "c"], 1, Sync::Each);
    for (port, n) in [("a", 1), ("b", 2), ("c", 3)] {
        w.ports[port].push(frame(n, MacAddr::BROADCAST, 0));
    }
    eventually("all are learned", || numbers(&w.ports["a"], 3) == [0]);
    let key = LaneKey {
        from: "a".into(),
        queue: 0,
        to: "c".into(),
    };
    let (writer, q) = w.spool.create(HoldId(1), Kind::Source, &key).unwrap();
    let hold = vec![Command::Hold(w.seat(0), 2, writer)];
    w.engine.batch(hold).unwrap();
    let slow = q.disk.lock().unwrap();
    for n in 1..=100 {
        w.ports["a"].push(frame(1, mac(3), n));
    }
    eventually("a burst is held", || q.last_seq() > 0);
    for n in 1..=100 {
        w.ports["b"].push(frame(2, mac(3), n));
    }
    eventually("the worker does not wait for the disk", || {
        numbers(&w.ports["c"], 2).len() == 101
    });
    assert_eq!((w.ports["a"].waiting(), q.durable_seq()), (100, 0));
    // It may have met the first few alone.
    let first = q.last_seq();
    assert!(first <= 32, "and takes nothing twice");
    // A queue that is taken away gives back what was accepted: its successor must not take it again.
    let rx = w.engine.detach_rx(0, 0).unwrap();
    assert_eq!(w.ports["a"].waiting() as u64, 100 - first);
    w.engine.attach_rx(0, 0, rx);
    eventually("the next burst is held", || q.last_seq() == first + 32);
    drop(slow);
    eventually("all is given back", || w.ports["a"].waiting() == 0);
    assert_eq!((q.last_seq(), q.durable_seq()), (100, 100));
    w.engine.stop();
}
