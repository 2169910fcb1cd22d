//! Ports of several queues.

use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::datapath::reading::Reading;
use crate::datapath::worker::QueueId;

/// Port `a` sends by two queues, one on each worker; `b` receives by four.
struct Wide {
    w: World,
    /// The queues of `a`.
    a: [MemoryPort; 2],
    /// The queues of `b`.
    b: [MemoryPort; 4],
    sent: HashMap<u8, u32>,
}

const STATIONS: std::ops::Range<u8> = 10..50;

impl Wide {
    fn new() -> Wide {
        let w = world(&["a", "b"], 2);
        let a = [w.ports["a"].clone(), MemoryPort::default()];
        let b = [(); 4].map(|()| MemoryPort::default());
        let queues = b.iter().zip(0..).map(|(p, n)| (n, p.queues().1)).collect();
        w.engine.set_tx(1, queues);
        w.engine.attach_rx(0, 1, a[1].queues().0);
        let seats = w.engine.pin().seats(0);
        assert_eq!(seats.len(), 2, "the queues of a are on both workers");
        w.ports["b"].push(frame(2, MacAddr::BROADCAST, 1));
        eventually("2 is learned", || numbers(&w.ports["a"], 2) == [1]);
        let sent = HashMap::new();
        Wide { w, a, b, sent }
    }

    /// Each station sends so many, always by the same queue of `a`.
    fn send(&mut self, n: u32) {
        for _ in 0..n {
            for s in STATIONS {
                let number = self.sent.entry(s).or_default();
                *number += 1;
                self.a[usize::from(s % 2)].push(frame(s, mac(2), *number));
            }
        }
    }

    fn received(&self) -> usize {
        self.b.iter().map(|p| p.delivered_count()).sum()
    }

    /// Everything has come, in order, each station's by one queue, which only one worker uses; every queue was used.
    fn verdict(&self) {
        let all: u32 = self.sent.values().sum();
        eventually("all frames", || self.received() >= all as usize);
        let mut users = [[0; 2]; 4];
        for (&s, &n) in &self.sent {
            let by: Vec<_> = self.b.iter().map(|p| numbers(p, s)).collect();
            let used: Vec<usize> = (0..4).filter(|q| !by[*q].is_empty()).collect();
            assert_eq!(used.len(), 1, "station {s} by {used:?}");
            assert_eq!(by[used[0]], (1..=n).collect::<Vec<u32>>(), "station {s}");
            users[used[0]][usize::from(s % 2)] += 1;
        }
        for (q, users) in users.iter().enumerate() {
            let workers = users.iter().filter(|n| **n > 0).count();
            assert_eq!(workers, 1, "queue {q}: {users:?}");
        }
    }
}

#[test]
fn flows_are_spread_over_the_queues_of_a_port_and_keep_theirs() {
    let mut t = Wide::new();
    t.send(100);
    t.verdict();
    t.w.engine.stop();
}

#[test]
fn each_queue_has_its_own_counters() {
    let mut t = Wide::new();
    t.send(10);
    t.verdict();
    t.w.engine.stop();
    let traffic = &t.w.engine.shared().books.all();
    let [a, b] = [0, 1].map(|port| port_total(traffic, port).queues);
    let sent: u64 = t.sent.values().map(|n| u64::from(*n)).sum();
    assert_eq!([a[0].0, a[1].0], [sent / 2; 2], "{a:?}");
    let to: Vec<u64> = t.b.iter().map(|p| p.delivered_count() as u64).collect();
    let counted: Vec<u64> = b[..4].iter().map(|q| q.1).collect();
    assert_eq!(counted, to);
    // What 2 has flooded to be learned.
    assert_eq!((a[0].1, b[0].0), (1, 1));
    assert_eq!(b[4..].iter().chain(&a[2..]).max(), Some(&(0, 0)));
}

#[test]
fn a_hold_cuts_the_lanes_of_all_workers_that_serve_a_port() {
    let mut t = Wide::new();
    t.send(50);
    let pin = t.w.engine.pin();
    let mut queues = Vec::new();
    let mut commands = Vec::new();
    for (n, seat) in pin.seats(0).into_iter().enumerate() {
        let key = LaneKey {
            from: "a".into(),
            queue: n as u16,
            to: "b".into(),
        };
        let (writer, q) = t.w.spool.create(HoldId(1), Kind::Source, &key).unwrap();
        commands.push(Command::Hold(seat, 1, writer));
        queues.push((seat, q));
    }
    let out = t.w.engine.batch(commands).unwrap();
    assert!(out.refused.is_empty());
    let cut = t.received();
    t.send(50);
    eventually("both hold", || {
        queues.iter().all(|(_, q)| q.tally().frames > 0)
    });
    // A queue that goes and comes back finds its lane.
    let back = t.w.engine.detach_rx(0, 1).unwrap();
    t.w.engine.attach_rx(0, 1, back);
    t.send(50);
    eventually("everything is taken", || {
        t.a.iter().all(|p| p.waiting() == 0)
    });
    assert_eq!(t.received(), cut, "nothing arrives after the cut");
    let ends = [Arc::<Progress>::default(), Arc::default()];
    let back = queues
        .iter()
        .zip(&ends)
        .map(|((seat, _), p)| Command::PutBack(*seat, 1, None, p.clone()))
        .collect();
    t.w.engine.batch(back).unwrap();
    t.send(50);
    t.verdict();
    eventually("they forward again", || ends.iter().all(|e| e.finished()));
    t.w.engine.stop();
}

#[test]
fn what_takes_another_queue_waits_until_the_frames_before_it_are_read() {
    let mut t = Wide::new();
    t.send(20);
    eventually("they are there", || t.received() == 20 * STATIONS.len());
    let key = |queue| LaneKey {
        from: "a".into(),
        queue,
        to: "b".into(),
    };
    let seats: Vec<Seat> = t.w.engine.pin().seats(0);
    let mut hold = Vec::new();
    let mut held = Vec::new();
    for (seat, n) in seats.iter().zip(0..) {
        let made = t.w.spool.create(HoldId(1), Kind::Source, &key(n));
        let (writer, q) = made.unwrap();
        hold.push(Command::Hold(*seat, 1, writer));
        held.push(q);
    }
    assert!(t.w.engine.batch(hold).unwrap().refused.is_empty());
    t.send(20);
    let all = |queues: &[Arc<crate::spool::Queue>]| {
        let frames = |q: &Arc<crate::spool::Queue>| q.tally().frames as usize;
        queues.iter().map(frames).sum::<usize>()
    };
    eventually("they are held", || all(&held) == 20 * STATIONS.len());
    // As on a target: the first seat drains what all have held, the other one waits for it.
    t.b.iter().for_each(|b| b.set_read(0));
    let done = Arc::new(AtomicBool::new(false));
    let source = |q: &Arc<crate::spool::Queue>| Source {
        reader: q.reader(),
        progress: Arc::default(),
    };
    let mut drains = Vec::new();
    let mut ends = Vec::new();
    for (seat, n) in seats.iter().zip(0..) {
        let made = t.w.spool.create(HoldId(1), Kind::Local, &key(n));
        let (writer, local) = made.unwrap();
        let first = n == 0;
        let shipped = Stage {
            sources: held.iter().map(source).collect(),
            done: Some(done.clone()),
            reading: Some(Reading::default()),
        };
        let unread = Stage {
            reading: Some(Reading::default()),
            ..Stage::default()
        };
        let own = source(&local);
        ends.push(own.progress.clone());
        let drain = Drain {
            before: None,
            older: match first {
                true => [unread, shipped].into(),
                false => Default::default(),
            },
            wait: (!first).then(|| done.clone()),
            behind: Some(Behind { writer, local: own }),
            ended: Vec::new(),
        };
        drains.push(Command::Drain(*seat, 1, Box::new(drain)));
    }
    t.w.engine.batch(drains).unwrap();
    t.send(20);
    let stays = |t: &Wide, rounds: usize| {
        std::thread::sleep(Duration::from_millis(30));
        assert_eq!(t.received(), rounds * 20 * STATIONS.len());
        assert!(!done.load(Ordering::Acquire));
    };
    stays(&t, 1);
    let delivered = |b: &MemoryPort| b.delivered_count() as u64;
    t.b.iter().for_each(|b| b.set_read(delivered(b)));
    eventually("the shipped ones", || {
        t.received() == 2 * 20 * STATIONS.len()
    });
    stays(&t, 2);
    t.b.iter().for_each(|b| b.set_read(delivered(b)));
    eventually("the others", || t.received() == 3 * 20 * STATIONS.len());
    eventually("they forward", || ends.iter().all(|e| e.finished()));
    t.w.engine.stop();
}

#[test]
fn a_queue_does_not_move_before_all_is_read_but_for_one_who_never_reads() {
    let mut t = Wide::new();
    let served = |t: &Wide| -> Vec<Vec<QueueId>> {
        let workers = t.w.engine.workers();
        workers.into_iter().map(|w| w.queues).collect()
    };
    assert!(!t.w.engine.rebalance());
    // Three queues: without the lonely one the other worker has two of two.
    let lonely = served(&t).into_iter().find(|q| q.len() == 1).unwrap()[0];
    assert_eq!(lonely.port, 0);
    t.w.engine.detach_rx(0, lonely.queue).unwrap();
    let before = served(&t);
    assert_eq!(before.iter().map(Vec::len).max(), Some(2));
    t.b[3].leave_unread();
    for _ in 0..50 {
        assert!(!t.w.engine.rebalance());
        assert_eq!(served(&t), before);
    }
    assert!(t.w.engine.rebalance(), "it had its time");
    assert_eq!(served(&t).iter().map(Vec::len).max(), Some(1));
    // And back, when all is read.
    let back = t.a[usize::from(lonely.queue)].queues().0;
    t.w.engine.attach_rx(0, lonely.queue, back);
    t.b[3].set_read(u64::MAX);
    t.send(20);
    eventually("frames", || t.received() == 20 * STATIONS.len());
    let crowded = served(&t).into_iter().find(|q| q.len() == 2).unwrap();
    let other = served(&t).into_iter().find(|q| q.len() == 1).unwrap()[0];
    assert!(!crowded.contains(&other));
    t.w.engine.detach_rx(other.port, other.queue).unwrap();
    assert!(t.w.engine.rebalance());
    t.w.engine.stop();
}
