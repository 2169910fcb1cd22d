//! Whatever a front-end has said: a back-end that is told the transcript is where one is that has heard all of it.

use std::collections::BTreeMap;

use gangway_keeper::message::Message;
use gangway_keeper::message::request::*;
use gangway_keeper::transcript::{Refused, Transcript};
use proptest::prelude::*;

/// Descriptors are numbers here.
type M = Message<u32>;

/// Where a back-end says that it has stopped a ring.
const STOPPED_AT: u32 = 0x77;
const VERSION: u32 = 1;
const REPLY: u32 = 1 | 1 << 2;
const NEED_REPLY: u32 = 1 | 1 << 3;
/// MQ, LOG_SHMFD, REPLY_ACK, CONFIGURE_MEM_SLOTS.
const PROTOCOL: u64 = 1 | 1 << 1 | 1 << 3 | 1 << 15;

fn message(request: u32, body: Vec<u8>, fds: Vec<u32>) -> M {
    Message {
        request,
        flags: VERSION,
        body,
        fds,
    }
}

fn longs(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_ne_bytes()).collect()
}

fn two(a: u32, b: u32) -> Vec<u8> {
    [a, b].iter().flat_map(|w| w.to_ne_bytes()).collect()
}

/// A back-end, as plain as can be: what it knows by what it was told (vhost-user, "Front-end message types").
#[derive(Debug, Clone, Default, PartialEq)]
struct Device {
    asked: (bool, bool),
    owner: bool,
    protocol: Option<u64>,
    features: Option<u64>,
    memory: Vec<(Vec<u8>, Option<u32>)>,
    log: Option<(Vec<u8>, Vec<u32>)>,
    rings: BTreeMap<u32, Ring>,
}

#[derive(Debug, Clone, Default, PartialEq)]
struct Ring {
    num: u32,
    base: Option<u32>,
    addr: Vec<u8>,
    call: Option<u32>,
    err: Option<u32>,
    kick: Option<u32>,
    enabled: bool,
}

impl Device {
    fn hear(&mut self, m: &M) {
        let word = |i: usize| m.word(i).unwrap();
        let ring = |d: &mut Device, i: u32, f: &dyn Fn(&mut Ring)| {
            f(d.rings.entry(i).or_default());
            d.rings.retain(|_, r| *r != Ring::default());
        };
        let fd = m.fds.first().copied();
        match m.request {
            GET_FEATURES => self.asked.0 = true,
            GET_PROTOCOL_FEATURES => self.asked.1 = true,
            SET_OWNER => self.owner = true,
            SET_PROTOCOL_FEATURES => self.protocol = m.long(),
            SET_FEATURES => self.features = m.long(),
            SET_MEM_TABLE => {
                let parts = m.body.chunks(32).zip(&m.fds);
                self.memory = parts.map(|(r, fd)| (r[..24].to_vec(), Some(*fd))).collect();
            }
            ADD_MEM_REG => self.memory.push((m.body[8..32].to_vec(), fd)),
            REM_MEM_REG => {
                let at = self.memory.iter().position(|(r, _)| *r == m.body[8..32]);
                if let Some(at) = at {
                    self.memory.remove(at);
                }
            }
            SET_LOG_BASE => self.log = Some((m.body.clone(), m.fds.clone())),
            SET_VRING_NUM => ring(self, word(0), &|r| r.num = word(1)),
            SET_VRING_BASE => ring(self, word(0), &|r| r.base = Some(word(1))),
            SET_VRING_ADDR => ring(self, word(0), &|r| r.addr = m.body.clone()),
            SET_VRING_CALL => ring(self, word(0), &|r| r.call = fd),
            SET_VRING_ERR => ring(self, word(0), &|r| r.err = fd),
            SET_VRING_KICK => ring(self, word(0), &|r| r.kick = fd),
            SET_VRING_ENABLE => ring(self, word(0), &|r| r.enabled = word(1) == 1),
            GET_VRING_BASE => ring(self, word(0), &|r| {
                (r.kick, r.call) = (None, None);
                r.base = r.base.map(|_| STOPPED_AT);
            }),
            RESET_OWNER | RESET_DEVICE => {
                (self.features, self.log) = (None, None);
                self.rings.clear();
            }
            _ => {}
        }
    }
}

fn said() -> impl Strategy<Value = M> {
    let ring = 0u32..3;
    let fd = 0u32..1000;
    let region = 0u64..4;
    let in_ring = |request: u32| move |(i, v): (u32, u32)| message(request, two(i, v), vec![]);
    let with_fd = |request: u32| {
        move |(i, fd): (u32, u32)| message(request, longs(&[u64::from(i)]), vec![fd])
    };
    prop_oneof![
        1 => Just(message(GET_FEATURES, vec![], vec![])),
        1 => Just(message(GET_PROTOCOL_FEATURES, vec![], vec![])),
        1 => Just(message(GET_QUEUE_NUM, vec![], vec![])),
        1 => Just(message(SET_OWNER, vec![], vec![])),
        1 => Just(message(SET_PROTOCOL_FEATURES, longs(&[PROTOCOL]), vec![])),
        3 => (0u64..8).prop_map(|f| message(SET_FEATURES, longs(&[f << 26]), vec![])),
        2 => (prop::collection::vec((region.clone(), fd.clone()), 1..4)).prop_map(|all| {
            let body = all.iter().flat_map(|(r, _)| longs(&[*r, 1, *r, 0])).collect();
            message(SET_MEM_TABLE, body, all.iter().map(|(_, fd)| *fd).collect())
        }),
        3 => (region.clone(), fd.clone()).prop_map(|(r, fd)| message(ADD_MEM_REG, longs(&[0, 100 + r, 1, r, 0]), vec![fd])),
        3 => (region, 0u64..2).prop_map(|(r, of_table)| {
            let gpa = if of_table == 1 { r } else { 100 + r };
            message(REM_MEM_REG, longs(&[0, gpa, 1, r, 0]), vec![])
        }),
        2 => (0u64..4, fd.clone()).prop_map(|(n, fd)| message(SET_LOG_BASE, longs(&[n, 0]), vec![fd])),
        2 => (ring.clone(), 1u32..4).prop_map(in_ring(SET_VRING_NUM)),
        2 => (ring.clone(), 0u32..4).prop_map(in_ring(SET_VRING_BASE)),
        3 => (ring.clone(), 0u32..2).prop_map(in_ring(SET_VRING_ENABLE)),
        2 => (ring.clone(), 0u64..4).prop_map(|(i, at)| message(SET_VRING_ADDR, longs(&[u64::from(i), at, at, at, 0]), vec![])),
        3 => (ring.clone(), fd.clone()).prop_map(with_fd(SET_VRING_CALL)),
        3 => (ring.clone(), fd.clone()).prop_map(with_fd(SET_VRING_KICK)),
        1 => (ring.clone(), fd).prop_map(with_fd(SET_VRING_ERR)),
        2 => ring.prop_map(|i| message(GET_VRING_BASE, two(i, 0), vec![])),
        1 => Just(message(RESET_OWNER, vec![], vec![])),
        1 => Just(message(RESET_DEVICE, vec![], vec![])),
    ]
}

/// What a back-end answers that does all of it.
fn answer(m: &M, transcript: &Transcript<u32>) -> Option<M> {
    let value = match m.request {
        GET_FEATURES => 7 << 26,
        GET_PROTOCOL_FEATURES => PROTOCOL,
        _ => 0,
    };
    let body = match m.request {
        GET_VRING_BASE => two(m.word(0).unwrap(), STOPPED_AT),
        _ => longs(&[value]),
    };
    let answer = Message {
        flags: REPLY,
        body,
        fds: vec![],
        ..m.clone()
    };
    m.is_answered(transcript.protocol()).then_some(answer)
}

proptest! {
    #[test]
    fn a_new_back_end_knows_what_the_old_one_did(all in prop::collection::vec((said(), any::<bool>()), 1..80)) {
        let (mut transcript, mut old) = (Transcript::default(), Device::default());
        for (mut m, needs_reply) in all {
            if needs_reply {
                m.flags = NEED_REPLY;
            }
            let answer = answer(&m, &transcript);
            transcript.note(&m, answer.as_ref()).unwrap();
            old.hear(&m);
        }
        let mut new = Device::default();
        transcript.tell().for_each(|(m, _)| new.hear(m));
        prop_assert_eq!(&new, &old);
        let calls: Vec<u32> = transcript.calls().copied().collect();
        let known: Vec<u32> = old.rings.values().filter_map(|r| r.call).collect();
        prop_assert_eq!(calls, known);

        // A ring starts at its kick, with all it needs; what is logged is logged from the start.
        let order: Vec<u32> = transcript.tell().map(|(m, _)| m.request).collect();
        let last = |r: u32| order.iter().rposition(|o| *o == r);
        let first_kick = order.iter().position(|o| *o == SET_VRING_KICK).unwrap_or(order.len());
        for before in [SET_FEATURES, ADD_MEM_REG, SET_LOG_BASE, SET_VRING_ADDR, SET_VRING_CALL, SET_VRING_ENABLE] {
            prop_assert!(last(before).is_none_or(|at| at < first_kick), "{} behind a kick: {:?}", before, order);
        }
        prop_assert!(last(SET_LOG_BASE) < last(SET_FEATURES) || last(SET_FEATURES).is_none());
    }
}

#[test]
fn what_was_refused_is_not_told() {
    let mut t = Transcript::default();
    let mut m = message(ADD_MEM_REG, longs(&[0, 1, 2, 3, 0]), vec![7]);
    m.flags = NEED_REPLY;
    let no = message(ADD_MEM_REG, longs(&[1]), vec![]);
    t.note(&m, Some(&no)).unwrap();
    assert_eq!(t.tell().count(), 0);
    let yes = message(ADD_MEM_REG, longs(&[0]), vec![]);
    t.note(&m, Some(&yes)).unwrap();
    assert_eq!(t.tell().count(), 1);
}

#[test]
fn what_was_offered_must_be_offered_again() {
    let mut t = Transcript::default();
    let asked = message(GET_FEATURES, vec![], vec![]);
    t.note(&asked, Some(&message(GET_FEATURES, longs(&[0xf0]), vec![])))
        .unwrap();
    let told: Vec<_> = t.tell().map(|(m, offered)| (m.request, offered)).collect();
    assert_eq!(told, [(GET_FEATURES, 0xf0)]);
}

#[test]
fn packed_rings_cannot_be_told() {
    let mut t = Transcript::default();
    assert!(t.can_be_told());
    t.note(&message(SET_FEATURES, longs(&[1 << 34]), vec![]), None)
        .unwrap();
    assert!(!t.can_be_told());
}

#[test]
fn nonsense_is_refused_and_changes_nothing() {
    let mut t = Transcript::default();
    let cases = [
        (
            message(SET_FEATURES, vec![1; 7], vec![]),
            Refused::Short(SET_FEATURES),
        ),
        (
            message(SET_PROTOCOL_FEATURES, vec![], vec![]),
            Refused::Short(SET_PROTOCOL_FEATURES),
        ),
        (
            message(SET_VRING_NUM, vec![0; 3], vec![]),
            Refused::Short(SET_VRING_NUM),
        ),
        (
            message(SET_VRING_NUM, two(256, 1), vec![]),
            Refused::Ring(SET_VRING_NUM, 256),
        ),
        (
            message(GET_VRING_BASE, two(u32::MAX, 1), vec![]),
            Refused::Ring(GET_VRING_BASE, u32::MAX),
        ),
        (
            message(ADD_MEM_REG, vec![0; 31], vec![1]),
            Refused::Short(ADD_MEM_REG),
        ),
    ];
    for (m, why) in cases {
        assert_eq!(t.note(&m, None), Err(why));
        assert_eq!(t.tell().count(), 0);
    }
    for i in 0..1024 {
        t.note(
            &message(ADD_MEM_REG, longs(&[0, i, 1, i, 0]), vec![1]),
            None,
        )
        .unwrap();
    }
    let more = message(ADD_MEM_REG, longs(&[0, 5000, 1, 0, 0]), vec![1]);
    assert_eq!(t.note(&more, None), Err(Refused::Regions));
}
