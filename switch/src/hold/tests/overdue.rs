//! Holds that nobody ends, and what happens by itself but can't be written down.

use gangway_shared::config::valid::Overdue;

use super::restart::{Upto, go, held, put_back, seal};
use super::*;
use crate::spool::Kind;

fn careful(c: &mut HostConfig) {
    c.hold.then = Overdue::PutBack;
}

/// Looks for overdue holds as if so many seconds had passed.
fn look(site: &Site, s: u64) {
    site.manager().look(Instant::now() + Duration::from_secs(s));
}

fn abort(s: &Scene) {
    s.a.ask(Request::HoldAbort { hold: ID });
    s.b.ask(Request::HoldAbort { hold: ID });
}

#[test]
fn a_hold_whose_coordinator_is_gone_is_put_back_while_nothing_can_be_committed() {
    for (upto, restarted) in [
        (Upto::FrozenInside, false),
        (Upto::Frozen, false),
        (Upto::Frozen, true),
    ] {
        let s = Scene::with(careful);
        go(&s, upto);
        if restarted {
            s.a.kill();
            s.a.start(&[M, P, UP]);
        }
        for site in [&s.a, &s.b] {
            look(site, 59);
        }
        assert!(s.a.status().state != HoldState::Aborting && held(&s) > 0);
        assert_eq!(s.b.status().state, HoldState::Prepared);
        look(&s.a, 61);
        look(&s.b, 61);
        eventually("it is put back", || {
            s.a.status().state == HoldState::Aborted
        });
        assert_eq!(s.b.status().state, HoldState::Aborted);
        // Its coordinator comes back.
        let (hold, timeout_ms) = (ID, 10);
        for (site, late) in [
            (
                &s.a,
                Request::Freeze {
                    hold,
                    scope: Scope::All,
                },
            ),
            (&s.a, Request::Seal { hold, timeout_ms }),
            (&s.b, Request::IncomingRestore { hold }),
            (&s.b, Request::Commit { hold }),
        ] {
            let (code, what) = refusal(site, late);
            assert_eq!(code, RefusalCode::State, "{what}");
            assert!(
                what.contains("this host has put it back: no coordinator"),
                "{what}"
            );
        }
        for site in [&s.a, &s.b] {
            let error = site.status().error.unwrap_or_default();
            assert!(error.contains("this host has put it back"), "{error}");
        }
        abort(&s);
        put_back(&s);
        let (_, ledger) = s.a.ledger(Role::Source);
        assert!(ledger.iter().any(|l| !l.stages.is_empty()));
        assert!(ledger.iter().all(|l| l.lost.is_empty() && l.dropped == 0));
        assert!(!s.b.ledger(Role::Target).1.is_empty());
        s.more();
        s.verdict();
    }
}

#[test]
fn what_may_have_been_committed_is_kept_whatever_is_configured() {
    for upto in [Upto::Sealed, Upto::Restored] {
        let s = Scene::with(careful);
        let ring = go(&s, upto);
        let before = s.b.status().state;
        look(&s.a, 100_000);
        assert_eq!(s.a.status().state, HoldState::Sealed, "{upto:?}");
        if upto == Upto::Restored {
            look(&s.b, 100_000);
            assert_eq!(s.b.status().state, before);
            s.b.ask(Request::Commit { hold: ID });
            look(&s.a, 100_000);
            look(&s.b, 100_000);
            s.b.refill(ring);
            s.b.plug(P);
            s.b.plug(M);
            s.runs_at(2);
            let depart = Request::Depart {
                hold: ID,
                grace_ms: 10_000,
            };
            s.a.ask(depart);
            look(&s.a, 100_000);
            s.b.ask(Request::Announce { hold: ID });
            eventually("the source is done", || {
                s.a.status().state == HoldState::Departed
            });
        } else {
            // The target may: a restore that was not answered is the end of a commit that never began.
            look(&s.b, 100_000);
            let restore = Request::IncomingRestore { hold: ID };
            assert_eq!(refusal(&s.b, restore).0, RefusalCode::State);
            abort(&s);
            resumed(&s, ring);
            put_back(&s);
        }
        s.more();
        s.verdict();
    }
}

/// It is tried twice a second, on a disk that may be full for hours.
#[test]
fn a_time_out_that_cannot_be_written_down_is_told_once() {
    crate::said::tests::listen();
    let s = Scene::with(careful);
    go(&s, Upto::Frozen);
    let dir = s.a.spool().dir_of(ID).display().to_string();
    s.a.manager().record_fails(ID, true);
    (0..5).for_each(|n| look(&s.a, 61 + n));
    let lines = crate::said::tests::logged(&["can't be written down", &dir]);
    assert_eq!(lines.len(), 1, "{lines:#?}");
    assert_eq!(s.a.status().state, HoldState::Frozen);
    s.a.manager().record_fails(ID, false);
    look(&s.a, 70);
    eventually("it is put back", || {
        s.a.status().state == HoldState::Aborted
    });
    abort(&s);
    put_back(&s);
    s.more();
    s.verdict();
}

#[test]
fn what_has_nobody_to_go_to_is_kept() {
    let s = Scene::with(careful);
    go(&s, Upto::Frozen);
    let ring = s.stop_vms();
    look(&s.a, 61);
    assert_eq!(s.a.status().state, HoldState::Frozen);
    // A seal that was not answered, and its VMs run again: the target may have all that a restore wants by now.
    s.b.kill();
    let unanswered = Request::Seal {
        hold: ID,
        timeout_ms: 10,
    };
    assert_eq!(refusal(&s.a, unanswered).0, RefusalCode::Peer);
    s.a.plug(P);
    s.a.plug(M);
    look(&s.a, 61);
    assert_eq!(s.a.status().state, HoldState::Frozen);
    s.b.start(&[UP]);
    abort(&s);
    s.a.refill(ring);
    s.runs_at(0);
    put_back(&s);
    s.more();
    s.verdict();
}

#[test]
fn a_hold_that_holds_for_too_long_is_told_and_put_back_if_that_is_wanted() {
    for then in [Overdue::Keep, Overdue::PutBack] {
        let s = Scene::with(|c| {
            c.hold.then = then;
            c.hold.longest_s = Some(1);
        });
        go(&s, Upto::Frozen);
        eventually("it is told", || {
            let error = s.a.status().error.unwrap_or_default();
            error.contains("hold.longest_s is 1")
        });
        match s.a.ask(Request::HostShow) {
            Reply::Host(h) => {
                let which = h.holds_overdue.expect("told");
                assert!(
                    which.contains(&ID.to_string()) && which.contains("Frozen"),
                    "{which}"
                );
            }
            other => panic!("{other:?}"),
        }
        look(&s.a, 0);
        match then {
            Overdue::Keep => {
                assert_eq!(s.a.status().state, HoldState::Frozen);
                abort(&s);
            }
            // The target holds nothing, and waits.
            Overdue::PutBack => {
                look(&s.b, 0);
                assert_eq!(s.b.status().state, HoldState::Prepared);
                eventually("it is put back", || {
                    s.a.status().state == HoldState::Aborted
                });
                s.b.ask(Request::HoldAbort { hold: ID });
            }
        }
        put_back(&s);
        s.more();
        s.verdict();
    }
}

#[test]
fn a_move_of_its_own_that_cannot_be_written_down_is_tried_again() {
    let s = Scene::new();
    go(&s, Upto::Open);
    s.a.manager().record_fails(ID, true);
    let ring = s.stop_vms();
    eventually("what comes is held", || held(&s) > 0);
    std::thread::sleep(Duration::from_millis(150));
    assert_eq!(
        s.a.status().state,
        HoldState::Open,
        "no other is on the disk"
    );
    s.a.manager().record_fails(ID, false);
    eventually("it is written down", || {
        s.a.status().state == HoldState::Frozen
    });
    s.a.kill();
    s.a.start(&[UP]);
    assert_eq!(s.a.status().state, HoldState::Frozen);
    seal(&s);
    s.b.ask(Request::IncomingRestore { hold: ID });
    s.b.ask(Request::Commit { hold: ID });
    s.b.manager().record_fails(ID, true);
    s.b.refill(ring);
    s.b.plug(P);
    s.b.plug(M);
    s.runs_at(2);
    let depart = Request::Depart {
        hold: ID,
        grace_ms: 10_000,
    };
    s.a.ask(depart);
    s.a.manager().record_fails(ID, true);
    s.b.manager().record_fails(ID, false);
    s.b.ask(Request::Announce { hold: ID });
    s.b.manager().record_fails(ID, true);
    // Nothing waits for it but what is told.
    s.more();
    std::thread::sleep(Duration::from_millis(150));
    assert_eq!(s.a.status().state, HoldState::Departing);
    s.a.manager().record_fails(ID, false);
    s.b.manager().record_fails(ID, false);
    eventually("both are told", || {
        let (a, b) = (s.a.status().state, s.b.status().state);
        (a, b) == (HoldState::Departed, HoldState::Live)
    });
    s.verdict();
}

/// The cut could not be written down, or the switch died before: lanes hold, and the record says `Open`.
#[test]
fn an_open_hold_that_holds_is_overdue_and_put_back_and_one_that_does_not_is_neither() {
    for restarted in [false, true] {
        let s = Scene::with(|c| {
            careful(c);
            c.hold.longest_s = Some(30);
        });
        go(&s, Upto::Open);
        let overdue = |s_: u64| {
            let at = Instant::now() + Duration::from_secs(s_);
            s.a.manager().overdue_at(ID, at)
        };
        assert_eq!(overdue(100_000), None);
        look(&s.a, 100_000);
        assert_eq!(s.a.status().state, HoldState::Open);
        s.a.manager().record_fails(ID, true);
        let freeze = Request::Freeze {
            hold: ID,
            scope: Scope::All,
        };
        assert_eq!(refusal(&s.a, freeze).0, RefusalCode::Resources);
        eventually("what comes is held", || held(&s) > 20);
        s.a.manager().record_fails(ID, false);
        if restarted {
            s.a.kill();
            s.a.start(&[M, P, UP]);
        }
        assert_eq!(s.a.status().state, HoldState::Open);
        let why = overdue(61).expect("it holds");
        assert!(
            why.contains("no coordinator") && why.contains("it has held frames for"),
            "{why}"
        );
        look(&s.a, 61);
        look(&s.b, 61);
        eventually("it is put back", || {
            s.a.status().state == HoldState::Aborted
        });
        put_back(&s);
        s.more();
        s.verdict();
    }
}

/// A restart has found less than was verified, so it is `Prepared` again; but its restore was answered.
#[test]
fn a_target_that_was_restored_is_kept_whatever_a_restart_has_found() {
    let s = Scene::with(careful);
    let ring = go(&s, Upto::Restored);
    let queues = s.b.spool().queues(ID);
    let shipped = queues.iter().find(|q| q.kind() == Kind::Incoming);
    let gone = shipped.expect("a lane").dir().to_path_buf();
    drop(queues);
    s.b.kill();
    std::fs::remove_dir_all(&gone).unwrap();
    s.b.start(&[UP]);
    assert_eq!(s.b.status().state, HoldState::Prepared);
    look(&s.b, 100_000);
    assert_eq!(s.b.status().state, HoldState::Prepared);
    abort(&s);
    resumed(&s, ring);
    put_back(&s);
    s.more();
    s.verdict();
}
