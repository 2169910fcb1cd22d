//! A switch that is killed at any step of a burst, behind a keeper: what a spool has accepted is there once (ADR-0021).

use std::path::Path;
use std::sync::atomic::Ordering::Relaxed;

use gangway_shared::config::valid::{SpoolConfig, SpoolLimits, Sync};
use gangway_shared::id::{HoldId, LaneKey};
use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
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
    rx: Option<Rx<Split>>,
}

struct Crash {
    dir: TempDir,
    memory: Memory,
    driver: Driver,
    switch: Switch,
    forwarded: Vec<u64>,
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
            },
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
        let used = Split::used_idx(&live.areas);
        let ahead = Split::ahead(&live.areas, used).min(NUM);
        let position = self.positions().split(0, used, ahead);
        let (next, unshown) = position.start();
        let ring = Split::new(&live, NUM, next, &features).not_shown(unshown);
        let gate = Gate::new(Control::new(live, next, event()));
        let rx = Rx::new(ring, gate, next, None, features, position);
        self.switch.rx = Some(rx);
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
        if until >= Until::Written {
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
        self.positions().stopped(0);
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

fn bits() -> impl Strategy<Value = u64> {
    (0u64..4).prop_map(|i| {
        VERSION_1 | [0, EVENT_IDX][i as usize & 1] | [0, INDIRECT][i as usize >> 1 & 1]
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
                    c.memory.write(c.driver.at[1], &0u16.to_le_bytes());
                    (0..8).for_each(|_| c.burst(BURST, Until::Released));
                    c.stop();
                    reaped += c.driver.reap().len();
                    prop_assert_eq!(reaped, offered, "each buffer comes back once");
                    c.memory.write(0x1000, &[0; 0x8000]);
                    c.driver = Driver::new(&c.memory, NUM, 0x1000, 0x10_0000, bits);
                    c.begin(bits, n);
                }
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
