//! What an uplink's socket drops while its lane is at its bound, on a real device. These tests need root and say so.

use std::process::Command;

use super::restart::{Upto, go, put_back};
use super::*;
use crate::port::kept::Kept;
use crate::port::packet::{self, Opened};
use crate::port::{Frame, VnetHdr};
use crate::sys::process;

/// Both ends of a cable, in a network namespace that lives as long as they do.
fn cable() -> (Opened, Opened) {
    let thread = std::thread::spawn(|| {
        process::own_network_namespace().expect("these tests need root (CAP_SYS_ADMIN)");
        for args in [
            "link add d0 type veth peer name d1",
            "link set d0 up",
            "link set d1 up",
        ] {
            let done = Command::new("ip").args(args.split(' ')).status();
            assert!(done.expect("run ip").success(), "ip {args}");
        }
        let open = |device| packet::open(device, &Kept::default()).expect(device);
        (open("d0"), open("d1"))
    });
    thread.join().expect("a cable")
}

fn dropped(site: &Site) -> u64 {
    site.status().lanes.iter().map(|l| l.dropped).sum()
}

/// Sends to `m` over a real device until its host has lost some. So many at least.
fn overflow(site: &Site) -> u64 {
    let (near, far) = cable();
    site.engine().detach_rx(UP, 0);
    site.engine().attach_rx(UP, 0, near.rx);
    assert_eq!(dropped(site), 0);
    let mut bytes = vec![0; 1500];
    bytes[..6].copy_from_slice(&mac(MAC_M).0);
    bytes[6..14].copy_from_slice(&[2, 0, 0, 0, 0, 77, 0x88, 0xb6]);
    let mut tx = far.tx;
    eventually("the socket overflows", || {
        for _ in 0..1000 {
            tx.send(&Frame::from_slice(VnetHdr::default(), &bytes));
        }
        dropped(site) > 0
    });
    let lanes = site.status().lanes;
    let at: Vec<_> = lanes.iter().filter(|l| l.dropped > 0).collect();
    assert!(at.len() == 1 && at[0].lane.from == "up0", "{at:?}");
    let least = dropped(site);
    // As every half second.
    site.manager().look(Instant::now());
    least
}

#[test]
fn what_the_source_s_uplink_loses_is_counted_behind_a_restart_and_in_the_account() {
    let s = Scene::with(|c| c.spool.limits.hold_bytes = Some(32 << 20));
    go(&s, Upto::Frozen);
    let least = overflow(&s.a);
    s.a.kill();
    s.a.start(&[M, P, UP]);
    assert!(dropped(&s.a) >= least, "{} < {least}", dropped(&s.a));
    s.a.ask(Request::HoldAbort { hold: ID });
    s.b.ask(Request::HoldAbort { hold: ID });
    put_back(&s);
    let account: u64 = s.a.ledger(Role::Source).1.iter().map(|l| l.dropped).sum();
    assert!(account >= least && dropped(&s.a) >= least, "{account}");
    s.more();
    s.verdict();
}

#[test]
fn what_the_target_s_uplink_loses_is_counted_behind_a_restart_and_in_the_account() {
    let mut s = Scene::with(|c| c.spool.limits.hold_bytes = Some(32 << 20));
    let ring = committed(&s);
    // `m` is late.
    let least = overflow(&s.b);
    s.b.kill();
    s.b.start(&[UP]);
    assert!(dropped(&s.b) >= least, "{} < {least}", dropped(&s.b));
    s.b.refill(ring);
    s.b.plug(P);
    s.b.plug(M);
    s.runs_at(2);
    let depart = Request::Depart {
        hold: ID,
        grace_ms: 10_000,
    };
    s.a.ask(depart);
    s.b.ask(Request::Announce { hold: ID });
    eventually("both are done", || {
        let (a, b) = (s.a.status().state, s.b.status().state);
        (a, b) == (HoldState::Departed, HoldState::Live)
    });
    s.a.ask(Request::HoldRelease { hold: ID });
    s.b.ask(Request::HoldRelease { hold: ID });
    let account: u64 = s.b.ledger(Role::Target).1.iter().map(|l| l.dropped).sum();
    assert!(account >= least && dropped(&s.b) >= least, "{account}");
    s.end();
}
