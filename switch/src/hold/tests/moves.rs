//! Whole moves, aborts in every state, and what is refused.

use super::*;

fn move_all(scope_first: Option<Scope>) {
    let s = Scene::new();
    s.more();
    s.prepare();
    s.more();
    if let Some(scope) = scope_first {
        s.a.ask(Request::Freeze { hold: ID, scope });
        let before = s.received(MAC_P);
        let o = s.received(MAC_O);
        eventually("outside still talks to m", || s.received(MAC_O) > o + 20);
        assert!(
            s.received(MAC_P) <= before + 32,
            "the link inside is frozen"
        );
    }
    s.a.ask(Request::Freeze {
        hold: ID,
        scope: Scope::All,
    });
    for from in ["p", "up0"] {
        eventually("frames are held", || {
            let lanes = s.a.status().lanes;
            lanes
                .iter()
                .any(|l| l.lane.from == from && l.held.frames > 0)
        });
    }
    let ring = s.stop_vms();
    s.a.ask(Request::Seal {
        hold: ID,
        timeout_ms: 5000,
    });
    s.b.ask(Request::IncomingRestore { hold: ID });
    assert!(!s.b.spool().is_only_forward(ID));
    s.b.ask(Request::Commit { hold: ID });
    assert!(s.b.spool().is_only_forward(ID));
    // The VMs run on B: their rings come with what they had queued.
    s.b.refill(ring);
    s.b.plug(P);
    s.runs_at(2);
    std::thread::sleep(Duration::from_millis(10));
    s.b.plug(M);
    s.a.ask(Request::Depart {
        hold: ID,
        grace_ms: 10_000,
    });
    s.b.ask(Request::Announce { hold: ID });
    eventually("the source is done", || {
        s.a.status().state == HoldState::Departed
    });
    eventually("the target is live", || {
        s.b.status().state == HoldState::Live
    });
    s.more();
    let (a, b) = (s.a.status(), s.b.status());
    for l in &a.lanes {
        let t = b
            .lanes
            .iter()
            .find(|t| t.lane == l.lane)
            .expect("the same lanes");
        assert_eq!(
            (l.held, l.held, l.held),
            (l.shipped, t.held, t.flushed),
            "{}",
            l.lane
        );
    }
    let queues: Vec<_> = [&s.a, &s.b]
        .iter()
        .flat_map(|h| h.spool().queues(ID))
        .map(|q| std::sync::Arc::downgrade(&q))
        .collect();
    assert!(!queues.is_empty());
    s.a.ask(Request::HoldRelease { hold: ID });
    s.b.ask(Request::HoldRelease { hold: ID });
    // What was reserved for an abort, too, although the account is kept.
    eventually("nothing of it is in the spools", || {
        s.a.spool().used_bytes() + s.b.spool().used_bytes() == 0
    });
    eventually("no queue of it is in memory", || {
        queues.iter().all(|q| q.upgrade().is_none())
    });
    assert!(!s.a.status().lanes.is_empty(), "what became of it is told");
    the_ledgers_agree(&s);
    s.verdict();
}

#[test]
fn a_group_moves_and_every_frame_arrives_once_in_order() {
    move_all(None);
}

#[test]
fn the_early_freeze_holds_the_inside_first_and_loses_nothing() {
    move_all(Some(Scope::Inside));
}

#[test]
fn an_abort_in_any_state_puts_everything_back_in_order() {
    for stage in 0..5 {
        let s = Scene::new();
        s.more();
        s.prepare();
        if stage >= 1 {
            s.a.ask(Request::Freeze {
                hold: ID,
                scope: if stage == 1 {
                    Scope::Inside
                } else {
                    Scope::All
                },
            });
            std::thread::sleep(Duration::from_millis(20));
        }
        let mut ring = Vec::new();
        if stage >= 3 {
            ring = s.stop_vms();
            s.a.ask(Request::Seal {
                hold: ID,
                timeout_ms: 5000,
            });
        }
        if stage >= 4 {
            s.b.ask(Request::IncomingRestore { hold: ID });
        }
        s.a.ask(Request::HoldAbort { hold: ID });
        s.b.ask(Request::HoldAbort { hold: ID });
        if stage >= 3 {
            s.a.refill(ring);
            s.a.plug(P);
            s.a.plug(M);
            s.runs_at(0);
        }
        eventually("it is put back", || {
            s.a.status().state == HoldState::Aborted
        });
        assert_eq!(s.b.status().state, HoldState::Aborted);
        eventually("both spools are free again", || {
            s.a.spool().used_bytes() + s.b.spool().used_bytes() == 0
        });
        let frames = verified(&s, "put_back");
        assert_eq!(frames > 0, stage > 0, "{frames} frames were held");
        s.more();
        s.verdict();
    }
}

#[test]
fn what_cannot_be_is_refused_and_changes_nothing() {
    let s = Scene::new();
    let refused = |site: &Site, r: Request| match site.manager().call(r) {
        Reply::Refused(e) => e.code,
        other => panic!("{other:?}"),
    };
    assert_eq!(
        refused(
            &s.a,
            Request::Seal {
                hold: ID,
                timeout_ms: 1
            }
        ),
        RefusalCode::Unknown
    );
    let open = HoldOpen {
        hold: ID,
        vms: vec!["nobody".into()],
        target_address: s.w.address.to_string(),
        target_host: "beta".into(),
        ticket: [5; 32],
    };
    assert_eq!(
        refused(&s.a, Request::HoldOpen(open.clone())),
        RefusalCode::Unknown
    );
    // Nobody expects this shipment.
    let open = HoldOpen {
        vms: vec!["p".into()],
        ..open
    };
    assert_eq!(
        refused(&s.a, Request::HoldOpen(open.clone())),
        RefusalCode::Peer
    );
    s.prepare();
    assert_eq!(
        refused(
            &s.a,
            Request::HoldOpen(HoldOpen {
                hold: HoldId(9),
                ..open
            })
        ),
        RefusalCode::Busy
    );
    let stands = |site: &Site| {
        let i = site.status();
        (i.state, i.frozen_ns, i.thawed_ns, i.drained_ns)
    };
    let before = [stands(&s.a), stands(&s.b)];
    let seal = Request::Seal {
        hold: ID,
        timeout_ms: 1,
    };
    let depart = Request::Depart {
        hold: ID,
        grace_ms: 1,
    };
    let freeze = Request::Freeze {
        hold: ID,
        scope: Scope::All,
    };
    let (release, commit) = (
        Request::HoldRelease { hold: ID },
        Request::Commit { hold: ID },
    );
    for (site, order, is, wanted) in [
        (&s.a, seal, "Open", "have to be Frozen"),
        (&s.a, depart, "Open", "have to be Sealed"),
        (&s.a, release.clone(), "Open", "have to be Departed"),
        (&s.a, commit.clone(), "Open", "for the other end"),
        (&s.b, commit, "Prepared", "have to be Restored"),
        (
            &s.b,
            Request::Announce { hold: ID },
            "Prepared",
            "have to be Draining or Live",
        ),
        (&s.b, release, "Prepared", "have to be Live"),
        (&s.b, freeze, "Prepared", "for the other end"),
    ] {
        let (code, what) = refusal(site, order);
        assert_eq!(code, RefusalCode::State, "{what}");
        assert!(what.contains(is) && what.contains(wanted), "{what}");
    }
    assert_eq!([stands(&s.a), stands(&s.b)], before);
    s.more();
    s.a.ask(Request::HoldAbort { hold: ID });
    s.a.ask(Request::HoldAbort { hold: ID });
    s.b.ask(Request::HoldAbort { hold: ID });
    s.more();
    s.verdict();
}

/// Uses up what is left of a host's quota.
fn use_up(site: &Site) {
    for n in 0.. {
        let key = LaneKey {
            from: format!("filler{n}"),
            queue: 0,
            to: "m".into(),
        };
        if site.spool().create(HoldId(77), Kind::Source, &key).is_err() {
            return;
        }
    }
}

#[test]
fn an_abort_needs_no_room_in_the_spool() {
    for sealed in [false, true] {
        let s = Scene::new();
        s.more();
        s.prepare();
        s.a.ask(Request::Freeze {
            hold: ID,
            scope: Scope::All,
        });
        std::thread::sleep(Duration::from_millis(20));
        use_up(&s.a);
        let mut ring = Vec::new();
        if sealed {
            ring = s.stop_vms();
            s.a.ask(Request::Seal {
                hold: ID,
                timeout_ms: 5000,
            });
        }
        s.a.ask(Request::HoldAbort { hold: ID });
        s.b.ask(Request::HoldAbort { hold: ID });
        if sealed {
            s.a.refill(ring);
            s.a.plug(P);
            s.a.plug(M);
            s.runs_at(0);
        }
        eventually("it is put back", || {
            s.a.status().state == HoldState::Aborted
        });
        let lanes = s.a.status().lanes;
        assert!(lanes.iter().any(|l| l.held.frames > 0));
        for l in lanes {
            assert_eq!(l.held, l.flushed, "{}", l.lane);
        }
        s.more();
        s.a.spool().remove_hold(HoldId(77)).unwrap();
        s.verdict();
    }
}

/// What comes from outside meanwhile would find no room, and no way back.
#[test]
fn a_target_without_room_for_what_is_still_to_come_is_not_committed() {
    let s = Scene::new();
    let ring = restored(&s);
    use_up(&s.b);
    eventually("a lane needs a segment", || {
        s.b.spool().trouble(Some(ID)).is_some()
    });
    let (code, what) = refusal(&s.b, Request::Commit { hold: ID });
    assert_eq!(code, RefusalCode::Resources);
    assert!(what.contains("host beta has no room"), "{what}");
    assert_eq!(s.b.status().state, HoldState::Restored);
    s.a.ask(Request::HoldAbort { hold: ID });
    s.b.ask(Request::HoldAbort { hold: ID });
    resumed(&s, ring);
    s.more();
    s.verdict();
}

#[test]
fn a_vm_that_stops_before_the_freeze_freezes_the_hold() {
    let s = Scene::new();
    s.more();
    s.prepare();
    // At once: before anybody has looked for the first time.
    let ring = s.stop_vms();
    eventually("the hold freezes itself", || {
        s.a.status().state == HoldState::Frozen
    });
    // Longer than any backlog would last.
    std::thread::sleep(Duration::from_millis(100));
    s.a.ask(Request::HoldAbort { hold: ID });
    s.b.ask(Request::HoldAbort { hold: ID });
    resumed(&s, ring);
    eventually("it is put back", || {
        s.a.status().state == HoldState::Aborted
    });
    s.more();
    s.verdict();
}

#[test]
fn one_vm_moves_alone_although_no_lane_of_it_has_to_be_complete() {
    let s = Scene::new();
    s.more();
    s.b.ask(Request::IncomingPrepare(IncomingPrepare {
        hold: ID,
        vms: vec!["m".into()],
        ports: vec![IncomingPort {
            name: "m".into(),
            vm: "m".into(),
            mac: Some(mac(MAC_M)),
        }],
        source_host: "alpha".into(),
        ticket: [5; 32],
    }));
    let (code, what) = refusal(&s.b, Request::IncomingRestore { hold: ID });
    assert_eq!(code, RefusalCode::State, "{what}");
    s.a.ask(Request::HoldOpen(open_args(&s, &["m"])));
    s.a.ask(Request::Freeze {
        hold: ID,
        scope: Scope::All,
    });
    s.a.unplug(M);
    s.a.ask(Request::Seal {
        hold: ID,
        timeout_ms: 5000,
    });
    s.b.ask(Request::IncomingRestore { hold: ID });
    assert_eq!(s.b.status().lanes.len(), 3, "all lanes are known");
    s.b.ask(Request::Commit { hold: ID });
    s.b.plug(M);
    s.a.ask(Request::Depart {
        hold: ID,
        grace_ms: 10_000,
    });
    s.b.ask(Request::Announce { hold: ID });
    eventually("the source is done", || {
        s.a.status().state == HoldState::Departed
    });
    eventually("the target is live", || {
        s.b.status().state == HoldState::Live
    });
    s.more();
    s.verdict();
}

#[test]
fn after_the_commit_frames_wait_for_a_vm_that_is_late_and_a_broadcast_comes_once() {
    let s = Scene::new();
    let ring = committed(&s);
    // Until the announcement the network floods to both hosts.
    let broadcast = frame(9, MacAddr::BROADCAST, 1);
    s.a.ports[UP].push(broadcast.clone());
    s.b.ports[UP].push(broadcast);
    s.b.refill(ring);
    s.b.plug(P);
    s.runs_at(2);
    // `m` takes its time, and its device goes away once more.
    std::thread::sleep(Duration::from_millis(300));
    s.b.plug(M);
    std::thread::sleep(Duration::from_millis(5));
    s.a.ask(Request::Depart {
        hold: ID,
        grace_ms: 10_000,
    });
    s.b.ask(Request::Announce { hold: ID });
    eventually("the source is done", || {
        s.a.status().state == HoldState::Departed
    });
    s.more();
    assert_eq!(s.received(9), 1, "the broadcast");
    s.verdict();
}

#[test]
fn a_guest_with_two_queues_gets_nothing_before_it_has_read_what_it_had() {
    let s = Scene::new();
    let ring = committed(&s);
    let before = SENDERS.map(|n| s.received(n));
    let m = &s.b.ports[M];
    m.leave_unread();
    let (rx, tx) = m.queues();
    let engine = s.b.engine();
    engine.set_tx(M, vec![(0, tx), (1, m.queues().1)]);
    engine.attach_rx(M, 0, rx);
    s.b.refill(ring);
    s.b.plug(P);
    s.runs_at(2);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(SENDERS.map(|n| s.received(n)), before);
    m.set_read(u64::MAX);
    s.more();
    s.verdict();
}

#[test]
fn a_shipment_that_the_source_has_put_back_cannot_be_committed() {
    let s = Scene::new();
    let ring = restored(&s);
    s.a.ask(Request::HoldAbort { hold: ID });
    // The source's word may be on its way.
    std::thread::sleep(Duration::from_millis(100));
    let (code, what) = refusal(&s.b, Request::Commit { hold: ID });
    assert_eq!(code, RefusalCode::State);
    assert!(what.contains("put everything back"), "{what}");
    s.b.ask(Request::HoldAbort { hold: ID });
    resumed(&s, ring);
    s.more();
    s.verdict();
}

#[test]
fn frames_of_an_earlier_run_are_not_mixed_with_a_new_hold() {
    let s = Scene::new();
    let key = LaneKey {
        from: "p".into(),
        queue: 0,
        to: "m".into(),
    };
    let _left = s.a.spool().create(ID, Kind::Source, &key).unwrap();
    let (code, what) = refusal(&s.a, Request::HoldOpen(open_args(&s, &["m"])));
    assert_eq!(code, RefusalCode::Busy, "{what}");
    assert!(what.contains("earlier run"), "{what}");
    s.more();
    s.verdict();
}

#[test]
fn an_abort_frees_what_a_target_had_received_before_it_was_restarted() {
    let s = Scene::new();
    let key = LaneKey {
        from: "p".into(),
        queue: 0,
        to: "m".into(),
    };
    for (site, spool, kind) in [
        (&s.b, s.b.spool(), Kind::Incoming),
        (&s.a, s.a.spool(), Kind::Source),
    ] {
        drop(spool.create(ID, kind, &key).unwrap());
        assert!(spool.used_bytes() > 0);
        let (code, _) = refusal(site, Request::HoldAbort { hold: ID });
        assert_eq!(code, RefusalCode::Unknown, "it is no hold of this run");
    }
    // A segment may be being made for it just now.
    eventually("it is freed", || s.b.spool().used_bytes() == 0);
    assert!(s.a.spool().used_bytes() > 0, "accepted frames are kept");
    s.more();
    s.verdict();
}

#[test]
fn a_hold_that_still_waits_for_its_vm_does_not_disarm_the_next_one() {
    let s = Scene::new();
    s.more();
    s.prepare();
    s.a.ask(Request::Freeze {
        hold: ID,
        scope: Scope::All,
    });
    let ring = s.stop_vms();
    s.a.ask(Request::HoldAbort { hold: ID });
    s.b.ask(Request::HoldAbort { hold: ID });
    // Its lanes drain when the VM is there again; so does nothing to the next hold.
    s.a.refill(ring);
    s.a.plug(M);
    eventually("it is put back", || {
        s.a.status().state == HoldState::Aborted
    });
    let next = HoldId(0xbeef);
    let port = IncomingPort {
        name: "p".into(),
        vm: "p".into(),
        mac: Some(mac(MAC_P)),
    };
    s.b.ask(Request::IncomingPrepare(IncomingPrepare {
        hold: next,
        vms: vec!["p".into()],
        ports: vec![port],
        source_host: "alpha".into(),
        ticket: [6; 32],
    }));
    s.a.ask(Request::HoldOpen(HoldOpen {
        hold: next,
        ticket: [6; 32],
        ..open_args(&s, &["p"])
    }));
    s.a.plug(P);
    s.runs_at(0);
    s.more();
    assert!(s.a.engine().shared().ports[P].armed(), "by the next hold");
    s.a.ask(Request::HoldAbort { hold: next });
    s.b.ask(Request::HoldAbort { hold: next });
    eventually("nobody waits any more", || {
        let engine = s.a.engine();
        let ports = &engine.shared().ports;
        !ports[P].armed() && !ports[M].armed()
    });
    s.verdict();
}

#[test]
fn a_vm_that_dies_behind_the_commit_holds_nobody_up() {
    for restarted in [false, true] {
        let mut s = Scene::new();
        let ring = committed(&s);
        s.b.refill(ring);
        s.b.plug(P);
        s.runs_at(2);
        s.a.ask(Request::Depart {
            hold: ID,
            grace_ms: 10_000,
        });
        s.b.ask(Request::Announce { hold: ID });
        std::thread::sleep(Duration::from_millis(300));
        assert_eq!(s.b.status().state, HoldState::Draining, "m is waited for");
        if restarted {
            s.b.kill();
            s.b.start(&[UP, P]);
            std::thread::sleep(Duration::from_millis(150));
            assert_eq!(s.b.status().state, HoldState::Draining, "m is waited for");
        }
        s.b.gone.vms.lock().unwrap().push("m".into());
        eventually("nobody waits for m", || {
            s.b.status().state == HoldState::Live
        });
        s.does_not_wait(&s.b);
        let lanes = s.b.status().lanes;
        let held: u64 = lanes.iter().map(|l| l.held.frames).sum();
        assert!(held > 0 && lanes.iter().all(|l| l.held == l.flushed));
        eventually("the source is done", || {
            s.a.status().state == HoldState::Departed
        });
        s.a.ask(Request::HoldRelease { hold: ID });
        s.b.ask(Request::HoldRelease { hold: ID });
        // The account says what became of them.
        let (_, ledger) = s.b.ledger(Role::Target);
        let lost = ledger.iter().flat_map(|l| &l.lost);
        let lost: Vec<_> = lost.collect();
        assert!(!lost.is_empty() && lost.iter().all(|g| g.why == "receiver_down"));
        // It is started anew: a plain port.
        s.b.plug(M);
        s.more();
        s.end();
    }
}

#[test]
fn an_abort_does_not_wait_for_a_vm_that_has_died_on_the_source() {
    let mut s = Scene::new();
    s.more();
    s.prepare();
    s.a.ask(Request::Freeze {
        hold: ID,
        scope: Scope::All,
    });
    eventually("frames are held", || {
        s.a.status().lanes.iter().any(|l| l.held.frames > 0)
    });
    let ring = s.stop_vms();
    s.a.ask(Request::HoldAbort { hold: ID });
    s.b.ask(Request::HoldAbort { hold: ID });
    s.a.refill(ring);
    s.a.plug(P);
    s.runs_at(0);
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(s.a.status().state, HoldState::Aborting, "m is waited for");
    s.a.gone.not_ours.store(true, Ordering::Relaxed);
    s.a.gone.vms.lock().unwrap().push("m".into());
    eventually("nobody waits for m", || {
        s.a.status().state == HoldState::Aborted
    });
    s.does_not_wait(&s.a);
    eventually("nothing of it is in the spool", || {
        s.a.spool().used_bytes() == 0
    });
    s.a.plug(M);
    s.more();
    s.end();
}
