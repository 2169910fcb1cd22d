//! wincode writes what bincode 2.0.1 `standard()` writes, and hostile bytes do no harm.

use proptest::prelude::*;

use super::*;
use crate::api::{
    self, HoldInfo, HoldOpen, HoldState, IncomingPort, IncomingPrepare, LaneInfo, PortInfo,
    Refusal, RefusalCode, Reply, Request, Role, Scope, Tally,
};
use crate::id::{HoldId, LaneKey, MacAddr};
use crate::ship::{LaneOpen, ToSource, ToTarget};

/// What bincode 2.0.1 writes. It is the definition of the format; nothing else here uses it.
fn bincode<T: bincode::Encode>(value: T) -> Vec<u8> {
    bincode::encode_to_vec(value, bincode::config::standard()).expect("bincode")
}

/// Our types' doubles for bincode: the same fields in the same order, variants by number.
mod double {
    use bincode::Encode;

    #[derive(Encode)]
    pub enum Scope {
        Inside,
        #[expect(dead_code, reason = "keeps the numbers")]
        All,
    }

    /// The variants of `Request` up to `Depart`, in its order.
    #[derive(Encode)]
    #[expect(dead_code, reason = "keeps the numbers")]
    pub enum Request {
        Hello { version: u32 },
        HostShow,
        PortList,
        VmList,
        LinkList,
        FdbList,
        VmmOpen { vm: String },
        VmmStart { vm: String, hold: u64 },
        VmmStop { vm: String, hold: u64 },
        HoldOpen(HoldOpen),
        Freeze { hold: u64, scope: Scope },
        Seal { hold: u64, timeout_ms: u64 },
        Depart { hold: u64, grace_ms: u64 },
        IncomingPrepare(IncomingPrepare),
    }

    #[derive(Encode)]
    pub struct HoldOpen {
        pub hold: u64,
        pub vms: Vec<String>,
        pub target_address: String,
        pub target_host: String,
        pub ticket: [u8; 32],
    }

    #[derive(Encode)]
    pub struct IncomingPrepare {
        pub hold: u64,
        pub vms: Vec<String>,
        pub ports: Vec<(String, String, Option<[u8; 6]>)>,
        pub source_host: String,
        pub ticket: [u8; 32],
    }
}

#[test]
fn requests_are_bincode_s_bytes() {
    let ticket = std::array::from_fn(|i| i as u8 * 8);
    let vms = || vec!["web".to_owned(), String::new(), "äöü".to_owned()];
    let hold = HoldId(u64::MAX - 1);
    let pairs: Vec<(Request, double::Request)> = vec![
        (
            Request::Hello { version: 251 },
            double::Request::Hello { version: 251 },
        ),
        (Request::FdbList, double::Request::FdbList),
        (
            Request::VmmOpen {
                vm: "x".repeat(300),
            },
            double::Request::VmmOpen {
                vm: "x".repeat(300),
            },
        ),
        (
            Request::HoldOpen(HoldOpen {
                hold,
                vms: vms(),
                target_address: "[::1]:7600".into(),
                target_host: "b".into(),
                ticket,
            }),
            double::Request::HoldOpen(double::HoldOpen {
                hold: hold.0,
                vms: vms(),
                target_address: "[::1]:7600".into(),
                target_host: "b".into(),
                ticket,
            }),
        ),
        (
            Request::Freeze {
                hold,
                scope: Scope::Inside,
            },
            double::Request::Freeze {
                hold: hold.0,
                scope: double::Scope::Inside,
            },
        ),
        (
            Request::Seal {
                hold: HoldId(0),
                timeout_ms: 65_536,
            },
            double::Request::Seal {
                hold: 0,
                timeout_ms: 65_536,
            },
        ),
        (
            Request::IncomingPrepare(IncomingPrepare {
                hold,
                vms: vms(),
                ports: vec![
                    IncomingPort {
                        name: "p".into(),
                        vm: "v".into(),
                        mac: Some(MacAddr([0xff, 1, 2, 3, 4, 251])),
                    },
                    IncomingPort {
                        name: "q".into(),
                        vm: "v".into(),
                        mac: None,
                    },
                ],
                source_host: "a".into(),
                ticket,
            }),
            double::Request::IncomingPrepare(double::IncomingPrepare {
                hold: hold.0,
                vms: vms(),
                ports: vec![
                    ("p".into(), "v".into(), Some([0xff, 1, 2, 3, 4, 251])),
                    ("q".into(), "v".into(), None),
                ],
                source_host: "a".into(),
                ticket,
            }),
        ),
    ];
    for (ours, theirs) in pairs {
        let bytes = encode(&ours).expect("encode");
        assert_eq!(bytes, bincode(theirs), "{ours:?}");
        assert_eq!(decode::<Request>(&bytes).expect("decode"), ours);
    }
}

fn tally(seed: u64) -> Tally {
    let mut t = Tally::default();
    t.count(1, u64::from(seed as u32));
    t.mix(seed, !seed as u32);
    t
}

fn flat(t: &Tally) -> (u64, u64, u64) {
    (t.frames, t.bytes, t.digest)
}

#[test]
fn replies_and_shipment_messages_are_bincode_s_bytes() {
    let key = LaneKey {
        from: "web0".into(),
        queue: 40_000,
        to: "up".into(),
    };
    let flat_key = || ("web0".to_owned(), 40_000u16, "up".to_owned());
    let lane = LaneInfo {
        lane: key.clone(),
        sealed: true,
        held: tally(1),
        shipped: tally(u64::MAX),
        flushed: Tally::default(),
        queued_behind: 251,
        dropped: 0,
    };
    let flat_lane = (
        flat_key(),
        true,
        flat(&lane.held),
        flat(&lane.shipped),
        flat(&lane.flushed),
        251u64,
        0u64,
    );
    let info = HoldInfo {
        hold: HoldId(7),
        role: Role::Target,
        state: HoldState::Released,
        vms: vec!["v".into()],
        peer: "b".into(),
        error: Some("e".into()),
        frozen_ns: 1 << 40,
        thawed_ns: 0,
        drained_ns: 250,
        lanes: vec![lane],
    };
    // A variant is its number as u32, a struct its fields.
    let flat_info = (
        7u64,
        1u32,
        12u32,
        vec!["v"],
        "b",
        Some("e"),
        1u64 << 40,
        0u64,
        250u64,
        vec![flat_lane],
    );
    assert_eq!(
        encode(&Reply::Hold(info.clone())).expect("encode"),
        bincode((10u32, &flat_info))
    );
    assert_eq!(
        encode(&Reply::Holds(vec![info])).expect("encode"),
        bincode((11u32, vec![flat_info]))
    );

    let refusal = Refusal {
        code: RefusalCode::Internal,
        message: "m".into(),
    };
    assert_eq!(
        encode(&Reply::Refused(refusal.clone())).expect("encode"),
        bincode((1u32, 8u32, "m"))
    );
    let port = PortInfo {
        queues: vec![api::QueueInfo::default(); 2],
        drops: vec![("why".into(), 300)],
        ..PortInfo::default()
    };
    let bytes = encode(&Reply::Ports(vec![port.clone()])).expect("encode");
    assert_eq!(
        decode::<Reply>(&bytes).expect("decode"),
        Reply::Ports(vec![port])
    );

    assert_eq!(
        encode(&ToTarget::Hello {
            version: api::VERSION,
            hold: HoldId(9),
            ticket: [7; 32]
        })
        .expect("encode"),
        bincode((0u32, api::VERSION, 9u64, [7u8; 32]))
    );
    assert_eq!(
        encode(&ToTarget::Lane {
            lane: 300,
            key: key.clone(),
            inside: false
        })
        .expect("encode"),
        bincode((1u32, 300u32, flat_key(), false))
    );
    assert_eq!(
        encode(&ToSource::Welcome {
            watermarks: vec![(key, u64::MAX)]
        })
        .expect("encode"),
        bincode((0u32, vec![(flat_key(), u64::MAX)]))
    );
    assert_eq!(
        encode(&ToSource::Ack {
            lane: 1,
            seq: 2,
            tally: tally(3),
            complete: true
        })
        .expect("encode"),
        bincode((2u32, 1u32, 2u64, flat(&tally(3)), true))
    );
    assert_eq!(
        encode(&LaneOpen {
            lane: 70_000,
            first_seq: 1
        })
        .expect("encode"),
        bincode((70_000u32, 1u64))
    );
}

#[test]
fn left_over_and_missing_bytes_are_errors() {
    let good = encode(&Request::VmmOpen { vm: "web".into() }).expect("encode");
    for n in 0..good.len() {
        assert!(
            matches!(decode::<Request>(&good[..n]), Err(CodecError::Malformed(_))),
            "{n} bytes"
        );
    }
    let mut more = good;
    more.push(0);
    assert!(matches!(
        decode::<Request>(&more),
        Err(CodecError::Malformed(_))
    ));
    assert!(matches!(
        decode::<Request>(&vec![0; MESSAGE_MAX + 1]),
        Err(CodecError::TooLong(_))
    ));
    let long = Request::VmmOpen {
        vm: "x".repeat(MESSAGE_MAX),
    };
    assert!(matches!(
        encode(&long),
        Err(CodecError::TooLong(_) | CodecError::Encode(_))
    ));
}

/// The most address space that this process has had (proc(5)).
fn peak_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("status");
    let line = status
        .lines()
        .find(|l| l.starts_with("VmPeak:"))
        .expect("VmPeak");
    line.split_ascii_whitespace()
        .nth(1)
        .and_then(|kb| kb.parse::<u64>().ok())
        .expect("kB")
        * 1024
}

#[test]
fn a_length_alone_costs_nothing() {
    let before = peak_bytes();
    // A length of 2^64-1, of 2^40, of 2^31: as bincode's varints behind every number of a variant.
    let lengths: [&[u8]; 3] = [
        &[253, 255, 255, 255, 255, 255, 255, 255, 255],
        &[253, 0, 0, 0, 0, 0, 1, 0, 0],
        &[252, 0, 0, 0, 128],
    ];
    for variant in 0..32u8 {
        for length in lengths {
            for filler in 0..40 {
                let mut bytes = vec![variant];
                bytes.extend(std::iter::repeat_n(0, filler));
                bytes.extend_from_slice(length);
                let _ = decode::<Request>(&bytes);
                let _ = decode::<Reply>(&bytes);
                let _ = decode::<ToTarget>(&bytes);
                let _ = decode::<ToSource>(&bytes);
            }
        }
    }
    // Generous, because other tests run beside this one; what a length asks for is thousands of times more.
    assert!(peak_bytes() - before < 512 << 20);
}

proptest! {
    #[test]
    fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..300), variant in 0u8..24) {
        let mut led = vec![variant];
        led.extend_from_slice(&bytes);
        for b in [&bytes, &led] {
            let _ = decode::<Request>(b);
            let _ = decode::<Reply>(b);
            let _ = decode::<ToTarget>(b);
            let _ = decode::<ToSource>(b);
            let _ = decode::<LaneOpen>(b);
        }
    }

    /// Both ways, for the building blocks that all messages are made of.
    #[test]
    fn building_blocks_are_bincode_s_bytes(
        n in any::<(u8, u16, u32, u64, bool)>(), s in ".{0,300}", o in any::<Option<u64>>(),
        list in proptest::collection::vec(any::<(String, u64)>(), 0..5), array in any::<[u8; 32]>(),
    ) {
        let ours = (n, s, (o, list, array));
        let bytes = encode(&ours).expect("encode");
        prop_assert_eq!(&bytes, &bincode(&ours));
        prop_assert_eq!(decode::<((u8, u16, u32, u64, bool), String, (Option<u64>, Vec<(String, u64)>, [u8; 32]))>(&bytes).expect("decode"), ours);
    }
}
