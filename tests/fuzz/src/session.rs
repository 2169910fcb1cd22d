//! A shipment's source that was let in, and says anything in any order, on one connection behind the other.

use std::collections::HashMap;
use std::sync::Arc;

use gangway_shared::api::Tally;
use gangway_shared::id::{HoldId, LaneKey};
use gangway_shared::ship::{LaneOpen, ToSource, ToTarget};
use gangway_switch::ship::{Incoming, Session, ShipError, Stream};
use gangway_switch::spool::Spool;
use gangway_switch::spool::format::{EPOCH, salt};

use crate::input::Input;
use crate::spool::{HOLD, config, folder, item};

thread_local! {
    static SPOOL: (Arc<Spool>, tempfile::TempDir) = {
        let dir = folder();
        let (spool, _) = Spool::open(&config(dir.path())).expect("a spool");
        (spool, dir)
    };
}

/// The hold's own ports.
const PORTS: [&str; 2] = ["b", "c"];

/// The last leads to a port that is not the hold's.
fn key(n: u8) -> LaneKey {
    let (queue, to) = [(0, "b"), (1, "b"), (0, "c"), (0, "z")][usize::from(n % 4)];
    LaneKey {
        from: "a".into(),
        queue,
        to: to.into(),
    }
}

/// A stream that is open.
struct Open {
    key: LaneKey,
    stream: Stream,
    seq: u64,
}

struct World {
    incoming: Arc<Incoming>,
    session: Session,
    /// Of this connection.
    numbers: HashMap<u32, LaneKey>,
    streams: Vec<Open>,
    /// What was said of a lane's end, as far as it holds.
    ends: HashMap<LaneKey, Tally>,
    /// What was acknowledged.
    safe: HashMap<LaneKey, Tally>,
    complete: HashMap<LaneKey, Tally>,
    named: bool,
}

pub fn run(data: &[u8]) {
    SPOOL.with(|(spool, _)| {
        say(spool, &mut Input(data));
        spool.remove_hold(HOLD).expect("its folder goes");
    });
}

fn say(spool: &Arc<Spool>, input: &mut Input<'_>) {
    let ports = PORTS.map(str::to_owned).to_vec();
    let incoming = Incoming::new(spool.clone(), HOLD, [0; 32], "a".into(), ports);
    let (session, _) = Session::new(incoming.clone());
    let mut w = World {
        incoming,
        session,
        numbers: HashMap::new(),
        streams: Vec::new(),
        ends: HashMap::new(),
        safe: HashMap::new(),
        complete: HashMap::new(),
        named: false,
    };
    while !input.is_empty() {
        match w.next(input) {
            Ok(true) => {}
            Ok(false) => break,
            Err(e) => {
                let typed = matches!(
                    e,
                    ShipError::Refused(_) | ShipError::Protocol(_) | ShipError::Disagree { .. }
                );
                assert!(typed, "{e:?}");
                w.connect();
            }
        }
        w.look();
    }
    w.streams.clear();
    w.look();
    w.read_back();
    w.incoming.stop();
}

impl World {
    /// False: it is over.
    fn next(&mut self, input: &mut Input<'_>) -> Result<bool, ShipError> {
        let op = input.u8();
        match op % 10 {
            0 => {
                let (lane, key) = (u32::from(input.u8() & 3), key(op >> 4));
                let m = ToTarget::Lane {
                    lane,
                    key: key.clone(),
                    inside: op & 128 != 0,
                };
                self.session.heard(m)?;
                assert!(PORTS.contains(&key.to.as_str()), "a lane to {}", key.to);
                let before = self.numbers.insert(lane, key.clone());
                assert!(before.is_none(), "lane {lane} was named twice");
                let names = self.numbers.values().filter(|k| **k == key).count();
                assert_eq!(names, 1, "numbers of lane {key}");
                // What an earlier connection said of its end is said again.
                if !self.complete.contains_key(&key) {
                    self.ends.remove(&key);
                }
            }
            1 => {
                let lanes = u32::from(input.u8() & 7);
                self.session.heard(ToTarget::Named { lanes })?;
                assert_eq!(lanes as usize, self.numbers.len());
                self.named = true;
            }
            2 | 3 => {
                let lane = u32::from(input.u8() & 3);
                let mut tally = self.numbers.get(&lane).map_or_else(Tally::default, |key| {
                    let all = self.incoming.lanes();
                    let lane = all.iter().find(|l| l.key == *key);
                    lane.map(|l| l.queue.tally()).unwrap_or_default()
                });
                match op >> 4 {
                    0 => tally.frames += u64::from(input.u8()),
                    1 => tally.digest ^= 1,
                    2 => tally.frames = input.u64(),
                    _ => {}
                }
                self.session.heard(ToTarget::End { lane, tally })?;
                let key = self.numbers.get(&lane).expect("it was named");
                if let Some(all) = self.complete.get(key) {
                    assert_eq!(tally, *all, "another end of a lane that is complete");
                }
                self.ends.insert(key.clone(), tally);
            }
            4 | 5 => {
                let lane = u32::from(input.u8() & 3);
                let first_seq = match op >> 4 {
                    0 => input.u64(),
                    n => u64::from(n & 1),
                };
                let stream = self.session.begin(&LaneOpen { lane, first_seq })?;
                let key = self.numbers.get(&lane).expect("it was named").clone();
                assert!(self.streams.iter().all(|s| s.key != key), "two writers");
                assert!(!self.complete.contains_key(&key), "it was complete");
                let seq = 1 + self.tally(&key).frames;
                assert!(first_seq <= seq, "a gap");
                self.streams.push(Open { key, stream, seq });
            }
            6 | 7 => {
                let n = usize::from(op >> 4) % self.streams.len().max(1);
                let Some(s) = self.streams.get_mut(n) else {
                    return Ok(true);
                };
                let item = item(input, &mut s.seq, 0, salt(HOLD, &s.key));
                let mut bytes = item.get(EPOCH..).unwrap_or_default();
                if !s.stream.take(&mut bytes)? {
                    // Nobody makes room here.
                    return Ok(false);
                }
                if op & 128 == 0 {
                    s.stream.commit();
                }
            }
            8 if op & 128 == 0 => {
                for told in self.session.acknowledge()? {
                    self.told(&told);
                }
            }
            8 => {
                if let Some(s) = self.streams.pop() {
                    s.stream.end()?;
                }
            }
            _ => match op >> 4 {
                0 => return self.session.heard(ToTarget::Abort),
                1 => {
                    self.session.heard(ToTarget::Hello {
                        version: 0,
                        hold: HoldId(0),
                        ticket: [0; 32],
                    })?;
                    panic!("a second Hello was taken");
                }
                _ => self.connect(),
            },
        }
        Ok(true)
    }

    /// The source comes again.
    fn connect(&mut self) {
        self.streams.clear();
        self.numbers.clear();
        let (session, welcome) = Session::new(self.incoming.clone());
        self.session = session;
        let ToSource::Welcome { watermarks } = welcome else {
            panic!("{welcome:?}");
        };
        for (key, safe) in &self.safe {
            let mark = watermarks.iter().find(|(k, _)| k == key);
            let mark = mark.map_or(0, |(_, seq)| *seq);
            assert!(mark >= safe.frames, "{key}: {mark} of {safe:?}");
        }
    }

    fn tally(&self, key: &LaneKey) -> Tally {
        let all = self.incoming.lanes();
        let lane = all.iter().find(|l| l.key == *key);
        lane.map(|l| l.queue.tally()).unwrap_or_default()
    }

    fn told(&mut self, m: &ToSource) {
        let ToSource::Ack {
            lane,
            seq,
            tally,
            complete,
        } = m
        else {
            panic!("{m:?}");
        };
        let key = self.numbers.get(lane).expect("it was named").clone();
        assert_eq!((*seq, *tally), (tally.frames, self.tally(&key)));
        if *complete {
            assert_eq!(
                self.ends.get(&key),
                Some(tally),
                "complete, and not its end"
            );
            self.complete.insert(key.clone(), *tally);
        }
        self.safe.insert(key, *tally);
    }

    /// Each lane once, and what was acknowledged, or complete, stays so.
    fn look(&self) {
        let lanes = self.incoming.lanes();
        for (n, l) in lanes.iter().enumerate() {
            assert!(lanes.iter().skip(n + 1).all(|o| o.key != l.key));
            let (here, safe) = (l.queue.tally(), self.safe.get(&l.key));
            assert_eq!(l.acked, safe.copied().unwrap_or_default());
            assert!(here.frames >= l.acked.frames);
            assert_eq!(l.complete, self.complete.contains_key(&l.key));
            if let Some(all) = self.complete.get(&l.key) {
                assert!(here == *all && l.queue.is_sealed());
            }
        }
        assert_eq!(self.incoming.is_named(), self.named);
    }

    /// As many records as were counted, in order.
    fn read_back(&self) {
        for l in self.incoming.lanes() {
            let (mut reader, mut last) = (l.queue.reader(), 0);
            while let Ok(Some(batch)) = reader.peek_batch() {
                let wire = batch.wire;
                let number = |at: usize| wire.get(at..).and_then(|b| b.first_chunk::<8>());
                let first = u64::from_le_bytes(*number(16).expect("a header"));
                let count = *number(12).expect("a header");
                assert_eq!(first, last + 1);
                last += u64::from(u16::from_le_bytes([count[0], count[1]]));
                reader.advance_batch();
            }
            assert_eq!(last, l.queue.tally().frames);
        }
    }
}
