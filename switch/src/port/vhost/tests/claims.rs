//! A queue that several workers share: whoever is done first, the guest sees all frames once, in the order of their places.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use proptest::prelude::*;

use super::*;
use crate::port::vhost::claim::Claim;
use crate::port::{Frame, Sent, VnetHdr};

const SHAPES: [u64; 4] = [
    VERSION_1,
    VERSION_1 | MRG | EVENT_IDX | INDIRECT,
    VERSION_1 | PACKED,
    VERSION_1 | MRG | PACKED | EVENT_IDX,
];

/// Buffers that take any frame of a test, alone or merged.
fn fill(d: &mut Driver, mrg: bool) {
    let len = if mrg { 1526 } else { 12 + 4000 };
    while d.free_descs() > 0 {
        let at = d.alloc(len);
        d.add(&[(at, len)], true, false);
    }
}

type Queue = Mutex<Option<Box<dyn TxQueue>>>;

#[test]
fn a_claim_that_is_done_first_is_seen_behind_the_one_before_it() {
    for bits in SHAPES {
        let World { tx, .. } = World::logged(bits, true);
        let (mut driver, mut queue, mrg) = (tx.driver, Some(tx.queue), bits & MRG != 0);
        fill(&mut driver, mrg);
        let all: Vec<Vec<u8>> = (0..7).map(|n| frame(n, 60 + n as usize)).collect();
        let frames: Vec<Frame<'_>> = all
            .iter()
            .map(|f| Frame::from_slice(VnetHdr::default(), f))
            .collect();
        let (mut first, mut second) = (Claim::default(), Claim::default());
        assert_eq!(first.begin_run(&mut queue, &frames[..3]), Some(3));
        assert_eq!(second.begin_run(&mut queue, &frames[3..5]), Some(2));
        // One that asks for the whole queue meanwhile.
        let q = queue.as_mut().unwrap();
        assert_eq!(q.send(&frames[5]), Sent::Yes);
        q.flush();
        let shared = q.shared().unwrap();
        let last = shared.last_out().unwrap();
        assert!(
            last > second.places.number,
            "what was flushed is behind the claims"
        );
        second.write_run(&frames[3..5]);
        assert!(!shared.give_back(&second.places));
        assert!(shared.is_out(second.places.number));
        assert!(!shared.close(), "a claim is out");
        assert_eq!(second.begin_run(&mut queue, &frames[6..]), Some(0));
        assert!(driver.received(12, mrg).is_empty());
        assert_eq!(tx.control.counters.frames.load(Ordering::Relaxed), 0);
        first.write_run(&frames[..3]);
        let q = queue.as_mut().unwrap();
        let shared = q.shared().unwrap();
        assert!(shared.give_back(&first.places));
        assert!(!shared.is_out(second.places.number) && !shared.is_out(last));
        assert_eq!(shared.last_out(), None);
        assert!(shared.close());
        let got = driver.received(12, mrg);
        assert_eq!(got.len(), 6);
        for ((_, got), want) in got.iter().zip(&all) {
            assert_eq!(got, want);
        }
        assert_eq!(tx.control.counters.frames.load(Ordering::Relaxed), 6);
        assert_eq!(driver.number_of(tx.control.next()), 6);
    }
}

#[derive(Debug, Clone)]
enum Op {
    /// A worker takes places for so many.
    Begin(usize, usize),
    /// It has copied.
    End(usize),
    /// Somebody sends with the whole queue, and flushes.
    Whole(usize),
    /// The guest takes and offers.
    Guest,
    /// The control side changes the memory table, unless it had to wait.
    Swap,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (0usize..3, 1usize..20).prop_map(|(w, n)| Op::Begin(w, n)),
        4 => (0usize..3).prop_map(Op::End),
        1 => (1usize..4).prop_map(Op::Whole),
        2 => Just(Op::Guest),
        1 => Just(Op::Swap),
    ]
}

proptest! {
    #![proptest_config(cases(200))]
    /// Against the plain model: a list of what was taken, of which the guest sees the front that is written.
    #[test]
    fn claims_in_any_order_are_a_queue(shape in 0usize..SHAPES.len(), ops in proptest::collection::vec(op(), 1..80)) {
        let bits = SHAPES[shape];
        let mrg = bits & MRG != 0;
        let World { memory, tx, .. } = World::new(bits);
        let (mut driver, mut queue) = (tx.driver, Some(tx.queue));
        fill(&mut driver, mrg);
        let mut workers: [(Claim, Vec<Vec<u8>>); 3] = Default::default();
        // Taken: the frames, and which worker is still writing them.
        let mut model: VecDeque<(Vec<Vec<u8>>, Option<usize>)> = VecDeque::new();
        let mut seed = 0;
        let ends = [Op::End(0), Op::End(1), Op::End(2), Op::Guest];
        for op in ops.into_iter().chain(ends) {
            match op {
                Op::Begin(w, n) => {
                    let (claim, own) = &mut workers[w];
                    if !own.is_empty() {
                        continue;
                    }
                    let all: Vec<Vec<u8>> = (0..n).map(|i| frame(seed + i as u64, 60 + 13 * i)).collect();
                    seed += n as u64;
                    let frames: Vec<Frame<'_>> = all.iter().map(|f| Frame::from_slice(VnetHdr::default(), f)).collect();
                    let taken = claim.begin_run(&mut queue, &frames).unwrap();
                    if taken > 0 {
                        *own = all[..taken].to_vec();
                        model.push_back((own.clone(), Some(w)));
                    }
                }
                Op::End(w) => {
                    let (claim, own) = &mut workers[w];
                    if own.is_empty() {
                        continue;
                    }
                    let frames: Vec<Frame<'_>> = own.iter().map(|f| Frame::from_slice(VnetHdr::default(), f)).collect();
                    claim.write_run(&frames);
                    let shown = queue.as_mut().unwrap().shared().unwrap().give_back(&claim.places);
                    own.clear();
                    let first_out = model.iter().position(|m| m.1.is_some());
                    let mine = model.iter().position(|m| m.1 == Some(w));
                    prop_assert_eq!(shown, first_out == mine);
                    model[mine.unwrap()].1 = None;
                }
                Op::Whole(n) => {
                    let q = queue.as_mut().unwrap();
                    for i in 0..n {
                        let f = frame(seed, 100 + i);
                        seed += 1;
                        if q.send(&Frame::from_slice(VnetHdr::default(), &f)) == Sent::Yes {
                            model.push_back((vec![f], None));
                        }
                    }
                    q.flush();
                }
                Op::Guest => fill(&mut driver, mrg),
                Op::Swap if model.is_empty() => {
                    let live = live(&memory, &driver, &tx.call, None);
                    prop_assert!(tx.control.swap(Some(live)));
                }
                // That it does not wait for ever is for the test with threads.
                Op::Swap => {}
            }
            // What the guest may see: all before the first that is being written.
            let mut visible = Vec::new();
            while model.front().is_some_and(|m| m.1.is_none()) {
                visible.extend(model.pop_front().unwrap().0);
            }
            let got: Vec<Vec<u8>> = driver.received(12, mrg).into_iter().map(|(_, f)| f).collect();
            prop_assert_eq!(&got, &visible);
        }
        prop_assert!(model.is_empty());
        prop_assert_eq!(tx.control.broken(), None);
    }
}

/// Three workers, a guest that takes, and a control side that changes what may change, all at once.
#[test]
fn workers_share_a_queue_and_lose_nothing() {
    const EACH: u64 = 4000;
    for (shape, bits) in SHAPES.into_iter().enumerate() {
        let World {
            memory,
            log_file,
            tx,
            ..
        } = World::new(bits | if shape % 2 == 1 { OFFLOADS } else { 0 });
        let mrg = bits & MRG != 0;
        let queue: Queue = Mutex::new(Some(tx.queue));
        let mut driver = tx.driver;
        fill(&mut driver, mrg);
        let done = AtomicBool::new(false);
        let (call, control) = (tx.call, tx.control);
        // For where its rings are.
        let stand_in = Driver::new(&memory, NUM, driver.at[0], 0, bits);
        std::thread::scope(|s| {
            let senders: Vec<_> = (0..3u8)
                .map(|w| {
                    let queue = &queue;
                    s.spawn(move || {
                        let mut claim = Claim::default();
                        let mut n = 0u64;
                        while n < EACH {
                            let many = 1 + (n * 7 + u64::from(w)) % 9;
                            // A checksum is to be done here and there: in software, for a guest without offloads.
                            let vnet = match n % 5 {
                                0 => VnetHdr([1, 0, 0, 0, 0, 0, 34, 0, 6, 0]),
                                _ => VnetHdr::default(),
                            };
                            let all: Vec<Vec<u8>> =
                                (n..EACH.min(n + many)).map(|n| numbered(w, n)).collect();
                            let frames: Vec<Frame<'_>> =
                                all.iter().map(|f| Frame::from_slice(vnet, f)).collect();
                            let lock = || queue.lock().unwrap();
                            let mut sent = claim.send_run(lock, &frames).unwrap();
                            if sent == 0 {
                                match claim.send(lock, &frames[0]).unwrap() {
                                    Sent::Yes => sent = 1,
                                    Sent::Full => std::thread::yield_now(),
                                    other => panic!("{other:?}"),
                                }
                            }
                            n += sent as u64;
                        }
                    })
                })
                .collect();
            let changer = s.spawn(|| {
                let mut logged = false;
                while !done.load(Ordering::Relaxed) {
                    logged = !logged;
                    let live = live(&memory, &stand_in, &call, logged.then_some(&log_file));
                    assert!(control.swap(Some(live)), "claims do not keep it waiting");
                    std::thread::sleep(std::time::Duration::from_micros(300));
                }
            });
            let mut next = [0u64; 3];
            loop {
                let ended = senders.iter().all(|s| s.is_finished());
                let got = driver.received(12, mrg);
                fill(&mut driver, mrg);
                if ended && got.is_empty() {
                    break;
                }
                for (_, f) in got {
                    let w = f[60];
                    let n = next[usize::from(w)];
                    let mut want = numbered(w, n);
                    // The checksum is the one thing that may differ.
                    want[40..42].copy_from_slice(&f[40..42]);
                    assert_eq!(f, want);
                    next[usize::from(w)] += 1;
                }
            }
            for sender in senders {
                sender.join().unwrap();
            }
            done.store(true, Ordering::Relaxed);
            changer.join().unwrap();
            assert_eq!(next, [EACH; 3], "{bits:#x}");
        });
        assert_eq!(control.broken(), None);
        assert_eq!(control.counters.frames.load(Ordering::Relaxed), 3 * EACH);
    }
}

/// A frame of a sender, of a length of its own.
fn numbered(w: u8, n: u64) -> Vec<u8> {
    let mut f = frame(n * 3 + u64::from(w), 70 + (n * 37 % 1300) as usize);
    f[60] = w;
    f[61..69].copy_from_slice(&n.to_le_bytes());
    f
}

/// Two workers of the switch with long runs for a guest that has one queue.
#[test]
fn workers_claim_places_for_long_runs() {
    use crate::datapath::Engine;
    use crate::datapath::tests::{config, eventually, frame, mac};
    use crate::port::Attach;
    use crate::port::memory::MemoryPort;
    const EACH: u32 = 400;
    // Few enough for the ring, so that none goes through a backlog, and so long that a few are a long run.
    const AHEAD: u32 = 24;
    const LEN: usize = 9000;
    let World { tx, .. } = World::new(VERSION_1);
    let mut driver = tx.driver;
    let fill = |d: &mut Driver| {
        while d.free_descs() > 0 {
            let at = d.alloc(12 + LEN as u32);
            d.add(&[(at, 12 + LEN as u32)], true, false);
        }
    };
    fill(&mut driver);
    let dir = tempfile::tempdir().unwrap();
    let mut cfg = config(&["left", "right", "guest"], 2, dir.path().into());
    cfg.ports[2].mac = Some(mac(9));
    // Ports in memory wake nobody.
    cfg.workers.poll = gangway_shared::config::valid::Poll::Busy;
    let engine = Engine::start(&cfg).unwrap();
    let voice = MemoryPort::default();
    let senders = [MemoryPort::default(), MemoryPort::default()];
    engine.set_tx(2, vec![(0, tx.queue)]);
    for (i, s) in senders.iter().enumerate() {
        engine.attach_rx(i, 0, s.queues().0);
    }
    engine.attach_rx(2, 0, voice.queues().0);
    voice.push(frame(9, mac(1), 0));
    eventually("the guest is learned", || voice.waiting() == 0);
    let seats: Vec<_> = (0..2).map(|p| engine.pin().seats(p)[0].worker).collect();
    assert_ne!(seats[0], seats[1], "a worker each");
    let (mut sent, mut next) = ([0u32; 2], [0u32; 2]);
    let since = std::time::Instant::now();
    while next != [EACH; 2] {
        for (i, s) in senders.iter().enumerate() {
            while sent[i] < EACH.min(next[i] + AHEAD) {
                let mut f = frame(i as u8 + 1, mac(9), sent[i]);
                f.resize(LEN, 0);
                s.push(f);
                sent[i] += 1;
            }
        }
        assert!(since.elapsed().as_secs() < 60, "{next:?} came");
        for (_, f) in driver.received(12, false) {
            let from = &mut next[usize::from(f[11]) - 1];
            assert_eq!(f.len(), LEN);
            assert_eq!(f[20..24], from.to_be_bytes(), "in order, once");
            *from += 1;
        }
        fill(&mut driver);
    }
    let port = &engine.shared().ports[2];
    let last = [numbered(1, 0)];
    let frames = [Frame::from_slice(VnetHdr::default(), &last[0])];
    let mut claim = Claim::default();
    assert_eq!(claim.send_run(|| port.tx(0), &frames), Some(1));
    assert!(claim.places.number > 0, "there were claims before");
    engine.stop();
}
