//! A switch that is killed at any step of a burst, behind a keeper: what a spool has accepted is there once (ADR-0021).

use std::path::Path;
use std::sync::atomic::Ordering::Relaxed;

use gangway_shared::config::valid::{SpoolConfig, SpoolLimits, Sync};
use gangway_shared::id::{HoldId, LaneKey};
use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::port::vhost::given::Left;
use crate::port::vhost::position::Positions;
use crate::port::{BURST, Burst, Frame};
use crate::spool::{Kind, Origin, Spool, Writer};

/// The steps of a burst, at each of which it may end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Until {
    Looked,
    /// In the first lane's queue, not committed.
    First,
    FirstCommitted,
    Second,
    SecondCommitted,
    /// The receiver of what is forwarded has it.
    Forwarded,
    /// The used entries are written.
    Written,
    /// What was given back is noted, and the driver does not see it.
    Noted,
    Released,
}

#[derive(Debug, Clone)]
enum Op {
    /// So many frames, each to a lane or on.
    Guest(Vec<u8>),
    /// A burst of which at most so many frames find a place.
    Burst(usize),
    /// A burst that ends there with the switch, as it was killed.
    Kill(usize, Until),
    /// The front-end stops the ring and starts it again.
    Restart,
    /// The guest resets its device when all that it has sent is taken: its ring begins anew, and so much is in it already when it starts.
    Reset(usize),
    /// Whether the driver looks for what it has back by itself.
    Polls(bool),
    /// A queue of the port that is not this one brings a lane something.
    Other(u8),
}

fn op() -> impl Strategy<Value = Op> {
    let until = prop_oneof![
        Just(Until::Looked),
        Just(Until::First),
        Just(Until::FirstCommitted),
        Just(Until::Second),
        Just(Until::SecondCommitted),
        Just(Until::Forwarded),
        Just(Until::Written),
        Just(Until::Noted),
        Just(Until::Released),
    ];
    prop_oneof![
        6 => prop::collection::vec(0u8..4, 1..50).prop_map(Op::Guest),
        5 => (0..=BURST).prop_map(Op::Burst),
        4 => (0..=BURST, until).prop_map(|(n, u)| Op::Kill(n, u)),
        1 => Just(Op::Restart),
        1 => (1usize..NUM.into()).prop_map(Op::Reset),
        1 => any::<bool>().prop_map(Op::Polls),
        1 => (0u8..2).prop_map(Op::Other),
    ]
}

/// Where a frame goes: to a lane that is held, on to its receiver, or nowhere, for it is none.
fn lane_of(kind: u8) -> Option<usize> {
    [Some(0), Some(1), None, None][usize::from(kind)]
}

const RUNT: u8 = 3;

fn to_bytes(number: u64, kind: u8) -> Vec<u8> {
    let mut b = vec![0; 12];
    if kind == RUNT {
        return b;
    }
    b.extend([kind; 14]);
    b.extend(number.to_be_bytes());
    b.resize(12 + 60 + number as usize % 200, 0);
    b
}

fn kind(f: &[u8]) -> u8 {
    f[0]
}

fn number(f: &[u8]) -> u64 {
    u64::from_be_bytes(f[14..22].try_into().expect("eight bytes"))
}

fn spool(dir: &Path) -> (Arc<Spool>, [Option<Writer>; 2]) {
    let cfg = SpoolConfig {
        dir: dir.join("spool"),
        segment_bytes: 1 << 20,
        quota_bytes: 64 << 20,
        sync: Sync::None,
        limits: SpoolLimits::default(),
    };
    let (spool, found) = Spool::open(&cfg).expect("a spool");
    let mut writers = [None, None];
    for r in found {
        writers[usize::from(r.queue.lane().queue)] = r.writer;
    }
    for (n, w) in writers.iter_mut().enumerate() {
        let key = LaneKey {
            from: "a".into(),
            queue: n as u16,
            to: "b".into(),
        };
        if w.is_none() {
            let made = spool.create(HoldId(1), Kind::Source, &key);
            *w = Some(made.expect("a queue").0);
        }
    }
    (spool, writers)
}

#[derive(Default)]
struct Switch {
    _spool: Option<Arc<Spool>>,
    lanes: [Option<Writer>; 2],
    rx: Option<Box<dyn RxQueue>>,
    control: Option<Arc<Control>>,
}

struct Crash {
    dir: TempDir,
    memory: Memory,
    driver: Driver,
    switch: Switch,
    forwarded: Vec<u64>,
    /// Where the front-end has said that the ring is (packed).
    base: u16,
}

impl Crash {
    fn new(bits: u64) -> Crash {
        let dir = TempDir::new().expect("a directory");
        let memory = Memory::new();
        let driver = Driver::new(&memory, NUM, 0x1000, 0x10_0000, bits);
        std::fs::write(dir.path().join("p.positions"), []).expect("as the keeper makes it");
        let (spool, lanes) = spool(dir.path());
        let mut c = Crash {
            switch: Switch {
                _spool: Some(spool),
                lanes,
                rx: None,
                control: None,
            },
            base: packed::START,
            dir,
            memory,
            driver,
            forwarded: Vec::new(),
        };
        c.begin(bits, 1);
        c
    }

    /// Moves the ring from 0, where a ring that is stopped and begun anew is not told from one that goes on.
    fn begin(&mut self, bits: u64, n: usize) {
        (0..n).for_each(|_| assert!(self.driver.send(&to_bytes(0, RUNT), 1, false)));
        self.attach(bits);
        (0..4).for_each(|_| self.burst(BURST, Until::Released));
        self.switch.rx.as_mut().expect("a ring").arm();
        assert_eq!(self.driver.reap().len(), n);
    }

    fn positions(&self) -> Positions {
        let found = Positions::open(&self.dir.path().join("p.positions"));
        found.expect("a file").expect("a file")
    }

    /// As a session starts the ring.
    fn attach(&mut self, bits: u64) {
        let features = RingFeatures::new(bits);
        let live = live(&self.memory, &self.driver, &event(), None);
        if bits & PACKED != 0 {
            let (ring, position) =
                packed_ring(&self.positions(), RING, self.base, &live, &features);
            let next = position.start().0;
            let control = Control::new(live, next, event());
            let rx = Rx::new(
                ring,
                Gate::new(control.clone()),
                next,
                None,
                features,
                position,
            );
            self.switch.rx = Some(Box::new(rx));
            self.switch.control = Some(control);
            return;
        }
        let used = Split::used_idx(&live.areas);
        let ahead = Split::ahead(&live.areas, used).min(NUM);
        let position = self.positions().split(0, used, ahead);
        let (next, unshown) = position.start();
        let ring = Split::new(&live, NUM, next, &features).not_shown(unshown);
        let gate = Gate::new(Control::new(live, next, event()));
        let rx = Rx::new(ring, gate, next, None, features, position);
        self.switch.rx = Some(Box::new(rx));
    }

    /// What a worker does with a burst of which `most` frames find a place, up to a step.
    fn burst(&mut self, most: usize, until: Until) {
        let Switch { lanes, rx, .. } = &mut self.switch;
        let rx = rx.as_mut().expect("a ring");
        let before = Origin {
            queue: 0,
            position: rx.position().expect("it is kept"),
        };
        let mut burst = Burst::new();
        rx.burst(&mut burst);
        let n = burst.len().min(most);
        let all: Vec<Vec<u8>> = burst.iter().map(bytes).collect();
        for (i, w) in lanes.iter_mut().enumerate() {
            let (append, commit) = match i {
                0 => (Until::First, Until::FirstCommitted),
                _ => (Until::Second, Until::SecondCommitted),
            };
            let w = w.as_mut().expect("a writer");
            if until >= append {
                // Runs and single frames, as they come.
                let mut at = 0;
                while at < n {
                    let mine = |f: &Vec<u8>| lane_of(kind(f)) == Some(i);
                    let run = all[at..n].iter().take_while(|f| mine(f)).count();
                    if run > 0 {
                        let frames: &[Frame<'_>] = &burst[at..at + run];
                        let put = w.append_run(1, frames, before.behind(at));
                        assert_eq!(put, run, "there is room");
                    }
                    at += run.max(1);
                }
            }
            if until >= commit {
                w.commit();
            }
        }
        if until >= Until::Forwarded {
            let on = all[..n].iter().filter(|f| lane_of(kind(f)).is_none());
            self.forwarded.extend(on.map(|f| number(f)));
        }
        drop(burst);
        if until >= Until::Written && self.driver.packed {
            let rx = self.switch.rx.as_mut().expect("a ring");
            let file = self.dir.path().join("p.positions");
            let at = (&self.memory, self.driver.at[0], file.as_path(), RING);
            let done = match until {
                Until::Written => Shown::None,
                Until::Noted => Shown::AllButFirst,
                _ => Shown::All,
            };
            give(at, done, || rx.release(n));
        } else if until >= Until::Written {
            let positions = self.positions();
            let index = self.driver.at[2] + 2;
            let before = (self.memory.u16(index), positions.raw(0).load(Relaxed));
            self.switch.rx.as_mut().expect("a ring").release(n);
            if until < Until::Released {
                self.memory.write(index, &before.0.to_le_bytes());
            }
            if until < Until::Noted {
                positions.raw(0).store(before.1, Relaxed);
            }
        }
    }

    /// As a session stops the ring.
    fn stop(&mut self) {
        self.switch.rx = None;
        let positions = self.positions();
        positions.stopped(0);
        positions.packed_stopped(RING);
        if let Some(control) = self.switch.control.take() {
            self.base = control.next();
        }
    }

    /// Nothing of it runs any more, and nothing is told to anybody.
    fn kill(&mut self, bits: u64) {
        // What is in files and in the guest's memory stays. A queue that was dropped would tidy up.
        std::mem::forget(self.switch.rx.take());
        self.switch = Switch::default();
        let (spool, lanes) = spool(self.dir.path());
        (self.switch._spool, self.switch.lanes) = (Some(spool), lanes);
        self.attach(bits);
    }

    /// Numbers that the lane has.
    fn held(&self, lane: usize) -> Vec<u64> {
        let w = self.switch.lanes[lane].as_ref().expect("a writer");
        let mut r = w.queue().reader();
        let mut out = Vec::new();
        while let Ok(Some(rec)) = r.peek() {
            out.push(number(rec.frame));
            r.advance();
        }
        out
    }
}

/// The guest's transmit ring of the first pair.
const RING: usize = 1;

/// As a session begins a packed ring.
fn packed_ring(
    positions: &Positions,
    ring: usize,
    base: u16,
    live: &Live,
    features: &RingFeatures,
) -> (Packed, Position) {
    let (position, last) = positions.packed(ring, base, NUM).expect("it is known");
    let mut packed = Packed::new(live, NUM, position.start().0, features);
    let unseen = packed.resume(&last);
    (packed, position.with_unseen(unseen))
}

/// How much of a burst that is given back a packed ring's driver can see when the switch dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shown {
    /// It is noted.
    None,
    /// A half of its elements is written; the first comes last.
    Half,
    AllButFirst,
    All,
}

/// Lets `give` give back a burst, and then takes back what a switch that dies would not have written.
fn give(at: (&Memory, u64, &Path, usize), shown: Shown, give: impl FnOnce()) {
    let (memory, table, file, ring) = at;
    let positions = Positions::open(file).expect("a file").expect("a file");
    let state = || positions.raw_packed(ring)[0].load(Relaxed);
    let before = (state(), memory.read(table, 16 * usize::from(NUM)));
    give();
    if state() == before.0 {
        return;
    }
    let Left::Here { last, .. } = positions.left(ring, 0, NUM) else {
        panic!("it is noted")
    };
    let hidden = match shown {
        Shown::None => last.len(),
        Shown::Half => last.len().div_ceil(2),
        Shown::AllButFirst => 1,
        Shown::All => 0,
    };
    // In the order in which they are written the first is the last.
    let (first, others) = last.split_at(last.len().min(1));
    let written = last.len() - hidden;
    let not = first.iter().chain(&others[written.min(others.len())..]);
    for e in not.take(hidden) {
        let slot = 16 * u64::from(e.at & packed::SLOT);
        let was = &before.1[slot as usize..][..16];
        memory.write(table + slot, was);
    }
}

fn bits() -> impl Strategy<Value = u64> {
    (0u64..8).prop_map(|i| {
        let one = |n: u64, bit| if i >> n & 1 == 1 { bit } else { 0 };
        VERSION_1 | one(0, EVENT_IDX) | one(1, INDIRECT) | one(2, PACKED)
    })
}

proptest! {
    #![proptest_config(cases(30))]

    /// Each frame for a lane that is held is in its queue once and in order, wherever the switch dies; what is forwarded comes at
    /// least once, and twice only from a burst that was not given back. The driver gets each buffer back once.
    #[test]
    fn what_was_accepted_is_there_once(bits in bits(), ops in prop::collection::vec(op(), 1..60)) {
        let mut c = Crash::new(bits);
        let mut sent: [Vec<u64>; 3] = Default::default();
        let (mut n, mut reaped, mut offered, mut kills) = (0u64, 0, 0, 0);
        let mut other = 0u64;
        let end = [Op::Polls(false)].into_iter().chain((0..8).map(|_| Op::Burst(BURST)));
        for op in ops.into_iter().chain(end) {
            match op {
                Op::Guest(kinds) => for k in kinds {
                    reaped += c.driver.reap().len();
                    n += 1;
                    if !c.driver.send(&to_bytes(n, k), 1, n.is_multiple_of(7)) {
                        break;
                    }
                    offered += 1;
                    if k != RUNT {
                        sent[lane_of(k).unwrap_or(2)].push(n);
                    }
                },
                Op::Burst(most) => c.burst(most, Until::Released),
                Op::Kill(most, until) => {
                    kills += 1;
                    c.burst(most, until);
                    c.kill(bits);
                }
                Op::Restart => {
                    c.stop();
                    c.attach(bits);
                }
                Op::Reset(n) => {
                    if !c.driver.packed {
                        c.memory.write(c.driver.at[1], &0u16.to_le_bytes());
                    }
                    (0..8).for_each(|_| c.burst(BURST, Until::Released));
                    c.stop();
                    reaped += c.driver.reap().len();
                    prop_assert_eq!(reaped, offered, "each buffer comes back once");
                    c.memory.write(0x1000, &[0; 0x8000]);
                    c.base = packed::START;
                    c.driver = Driver::new(&c.memory, NUM, 0x1000, 0x10_0000, bits);
                    c.begin(bits, n);
                }
                Op::Polls(_) if c.driver.packed => {}
                Op::Polls(yes) => c.memory.write(c.driver.at[1], &u16::from(yes).to_le_bytes()),
                Op::Other(lane) => {
                    // Its numbers are far beyond, and must not be taken for the ring's own.
                    other += 1;
                    let b = to_bytes(1 << 40 | other, lane);
                    let f = Frame::from_slice(crate::port::VnetHdr::default(), &b[12..]);
                    let w = c.switch.lanes[usize::from(lane)].as_mut().expect("a writer");
                    let from = Origin { queue: 1, position: other };
                    prop_assert_eq!(w.append_run(1, &[f], from), 1);
                    w.commit();
                }
            }
        }
        for (lane, sent) in sent.iter().take(2).enumerate() {
            let mut held = c.held(lane);
            held.retain(|n| n >> 40 == 0);
            prop_assert_eq!(&held, sent, "lane {} behind {} deaths", lane, kills);
        }
        let mut last = 0;
        let mut twice = 0;
        for n in &c.forwarded {
            twice += usize::from(*n <= last);
            prop_assert!(*n <= last || sent[2].contains(n));
            last = last.max(*n);
        }
        prop_assert!(twice <= kills * BURST);
        let mut got = c.forwarded.clone();
        got.sort_unstable();
        got.dedup();
        prop_assert_eq!(&got, &sent[2], "nothing that was to be forwarded is lost");
        if let Some(rx) = &mut c.switch.rx {
            rx.arm();
        }
        reaped += c.driver.reap().len();
        prop_assert_eq!(reaped, offered, "each buffer comes back once");
    }
}

/// What becomes of a guest's packed receive ring.
#[derive(Debug, Clone)]
enum Deed {
    /// The guest offers so many buffers.
    Offers(usize),
    /// The guest reads.
    Reads,
    /// So many frames are sent and shown, and their sender has them back.
    Sends(usize),
    /// The same, and the switch dies when so much is written; without it: before anything is shown.
    Dies(usize, Option<Shown>),
    /// The front-end stops the ring and starts it again.
    Restarts,
}

fn deed() -> impl Strategy<Value = Deed> {
    let shown = prop_oneof![
        Just(None),
        Just(Some(Shown::None)),
        Just(Some(Shown::Half)),
        Just(Some(Shown::AllButFirst)),
        Just(Some(Shown::All)),
    ];
    prop_oneof![
        4 => (1usize..40).prop_map(Deed::Offers),
        2 => Just(Deed::Reads),
        4 => (1..=BURST).prop_map(Deed::Sends),
        4 => (1..=BURST, shown).prop_map(|(n, s)| Deed::Dies(n, s)),
        1 => Just(Deed::Restarts),
    ]
}

struct Receiver {
    dir: TempDir,
    memory: Memory,
    driver: Driver,
    features: RingFeatures,
    base: u16,
    tx: Option<Tx<Packed>>,
    control: Option<Arc<Control>>,
}

impl Receiver {
    const RING: usize = 0;

    fn new(bits: u64) -> Receiver {
        let dir = TempDir::new().expect("a directory");
        std::fs::write(dir.path().join("p.positions"), []).expect("as the keeper makes it");
        let memory = Memory::new();
        let driver = Driver::new(&memory, NUM, 0x1000, 0x10_0000, bits);
        let mut r = Receiver {
            dir,
            memory,
            driver,
            features: RingFeatures::new(bits),
            base: packed::START,
            tx: None,
            control: None,
        };
        r.attach();
        r
    }

    fn file(&self) -> std::path::PathBuf {
        self.dir.path().join("p.positions")
    }

    fn positions(&self) -> Positions {
        Positions::open(&self.file())
            .expect("a file")
            .expect("a file")
    }

    fn attach(&mut self) {
        let live = live(&self.memory, &self.driver, &event(), None);
        let all = self.positions();
        let (ring, position) = packed_ring(&all, Self::RING, self.base, &live, &self.features);
        let next = position.start().0;
        let control = Control::new(live, next, event());
        let gate = Gate::new(control.clone());
        self.tx = Some(Tx::new(ring, gate, next, NUM, self.features, position));
        self.control = Some(control);
    }

    /// Sends the frames behind `last`, `n` at most, as far as there is room; how many.
    fn send(&mut self, last: u64, n: usize, shown: Option<Shown>) -> usize {
        let tx = self.tx.as_mut().expect("a ring");
        let mut sent = 0;
        for number in (last + 1..).take(n) {
            let b = received(number);
            let f = Frame::from_slice(crate::port::VnetHdr::default(), &b);
            if tx.send(&f) != crate::port::Sent::Yes {
                break;
            }
            sent += 1;
        }
        if let Some(shown) = shown {
            let file = self.dir.path().join("p.positions");
            let at = (&self.memory, self.driver.at[0], file.as_path(), Self::RING);
            give(at, shown, || tx.flush());
        }
        sent
    }
}

/// Its bytes, of which some frames need several small buffers.
fn received(number: u64) -> Vec<u8> {
    let mut b = vec![number as u8; 60 + number as usize * 37 % 700];
    b[14..22].copy_from_slice(&number.to_be_bytes());
    b
}

proptest! {
    #![proptest_config(cases(30))]

    /// A guest gets each frame whole and in order, twice only where a switch died between showing it and giving it back to its sender, and each
    /// of its buffers comes back once (the driver looks).
    #[test]
    fn what_a_packed_ring_shows_is_whole_wherever_the_switch_dies(
        mrg in any::<bool>(),
        events in any::<bool>(),
        deeds in prop::collection::vec(deed(), 1..80),
    ) {
        let bits = VERSION_1 | PACKED | if mrg { MRG } else { 0 } | if events { EVENT_IDX } else { 0 };
        let mut r = Receiver::new(bits);
        // The last frame that its sender has back.
        let mut last = 0u64;
        let mut deaths = 0;
        let mut got: Vec<u64> = Vec::new();
        let mut reads = |r: &mut Receiver| -> Result<(), TestCaseError> {
            for (_, frame) in r.driver.received(12, mrg) {
                let n = number(&frame);
                prop_assert_eq!(&frame, &received(n));
                got.push(n);
            }
            Ok(())
        };
        for deed in deeds {
            match deed {
                Deed::Offers(n) => for _ in 0..n {
                    let len = if mrg { 200 } else { 1000 };
                    let at = r.driver.alloc(len);
                    r.driver.add(&[(at, len)], true, false);
                },
                Deed::Reads => reads(&mut r)?,
                Deed::Sends(n) => last += r.send(last, n, Some(Shown::All)) as u64,
                Deed::Dies(n, shown) => {
                    deaths += 1;
                    r.send(last, n, shown);
                    std::mem::forget(r.tx.take());
                    r.attach();
                }
                Deed::Restarts => {
                    r.tx = None;
                    r.base = r.control.take().expect("a ring").next();
                    r.positions().packed_stopped(Receiver::RING);
                    r.attach();
                }
            }
        }
        reads(&mut r)?;
        let mut most = 0;
        let mut twice = 0;
        for n in &got {
            prop_assert!(*n <= most + 1, "{n} behind {most}: one is missing");
            twice += usize::from(*n <= most);
            most = most.max(*n);
        }
        prop_assert!(most >= last, "{most} of {last}");
        prop_assert!(twice <= deaths * BURST);
    }
}
