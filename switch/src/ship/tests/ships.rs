use super::*;

#[test]
fn lanes_arrive_while_they_are_written() {
    for sync in [Sync::None, Sync::Batch] {
        let w = World::new(sync);
        let into = w.expect();
        let out = w.ship(w.args());
        out.wait_connected(LONG).unwrap();
        let mut queues: Vec<_> = (0..4).map(|n| w.queue(n)).collect();
        for (n, (_, q)) in queues.iter().enumerate() {
            let inside = n % 2 == 0;
            assert_eq!(out.add_lane(q.lane().clone(), inside, q.clone()), n as u32);
            assert_eq!(out.add_lane(q.lane().clone(), inside, q.clone()), n as u32);
        }
        // The last one stays empty.
        for n in 0..6000 {
            for (writer, _) in &mut queues[..3] {
                put(writer, n, 60 + (n as usize * 37) % 1400);
                if n % 32 == 0 {
                    writer.commit();
                }
            }
        }
        let first = queues[0].1.clone();
        queues[0].0.commit();
        until(|| {
            let s = &out.status()[0];
            s.acked_seq == 6000 && s.acked == first.tally() && !s.complete
        });
        assert!(!out.wait_complete(Lanes::Inside, Duration::from_millis(50)));
        queues[0].0.seal();
        queues[2].0.seal();
        let t = Instant::now();
        assert!(out.wait_complete(Lanes::Inside, LONG));
        println!("{sync:?}: seal to complete, 2 lanes: {:?}", t.elapsed());
        assert!(into.wait_complete(Lanes::Inside, LONG));
        assert!(!out.wait_complete(Lanes::All, Duration::ZERO));
        queues[1].0.seal();
        queues[3].0.seal();
        assert!(out.wait_complete(Lanes::All, LONG));
        for (n, (_, q)) in queues.iter().enumerate() {
            check(&out, &into, q, if n < 3 { 6000 } else { 0 });
        }
        assert_eq!((out.error(), into.error()), (None, None));
        out.close();
        until(|| !into.is_connected());
        assert_eq!(into.error(), None);
        into.stop();
    }
}

#[test]
fn the_tail_is_acknowledged_after_the_seal() {
    for sync in [Sync::None, Sync::Batch] {
        let w = World::new(sync);
        let into = w.expect();
        let out = w.ship(w.args());
        out.wait_connected(LONG).unwrap();
        let mut took = Vec::new();
        for n in 0..20 {
            let (mut writer, q) = w.queue(n);
            q.sync().unwrap();
            out.add_lane(key(n), true, q.clone());
            for i in 0..200 {
                put(&mut writer, i, 1000);
                writer.commit();
            }
            until(|| out.status()[usize::from(n)].acked_seq > 0);
            for i in 200..232 {
                put(&mut writer, i, 1000);
            }
            writer.seal();
            let t = Instant::now();
            assert!(out.wait_complete(Lanes::All, LONG));
            took.push(t.elapsed());
            check(&out, &into, &q, 232);
        }
        took.sort();
        println!(
            "{sync:?}: seal to complete: median {:?}, worst {:?}",
            took[10], took[19]
        );
    }
}

#[test]
fn a_lost_connection_goes_on_where_it_was() {
    let w = World::new(Sync::None);
    let into = w.expect();
    let out = w.ship(w.args());
    out.wait_connected(LONG).unwrap();
    let (mut writer, q) = w.queue(0);
    let (mut other, q1) = w.queue(1);
    out.add_lane(key(0), true, q.clone());
    for n in 0..30_000 {
        put(&mut writer, n, 500);
        put(&mut other, n, 100);
        if n % 16 == 0 {
            writer.commit();
            other.commit();
        }
        if n % 3000 == 1500 {
            w.cut();
        }
        if n == 10_000 {
            out.add_lane(key(1), false, q1.clone());
        }
    }
    writer.seal();
    other.seal();
    w.cut();
    assert!(out.wait_complete(Lanes::All, LONG), "{:?}", out.error());
    check(&out, &into, &q, 30_000);
    check(&out, &into, &q1, 30_000);
}

#[test]
fn a_pulled_cable_is_noticed_and_survived_by_both_ends() {
    let w = World::new(Sync::None);
    let into = w.expect();
    let out = w.ship(OutgoingArgs {
        target_address: w.relayed.to_string(),
        ..w.args()
    });
    out.wait_connected(LONG).unwrap();
    let (mut writer, q) = w.queue(0);
    out.add_lane(key(0), true, q.clone());
    for n in 0..2000 {
        put(&mut writer, n, 500);
    }
    writer.commit();
    until(|| out.status()[0].acked_seq > 0);
    w.relay.store(false, Ordering::Relaxed);
    for n in 2000..4000 {
        put(&mut writer, n, 500);
    }
    writer.seal();
    until(|| out.error().is_some() && !out.is_connected());
    assert!(!out.wait_complete(Lanes::All, Duration::ZERO));
    w.relay.store(true, Ordering::Relaxed);
    assert!(out.wait_complete(Lanes::All, LONG), "{:?}", out.error());
    check(&out, &into, &q, 4000);
}

#[test]
fn a_restarted_target_goes_on_with_what_it_had() {
    let mut w = World::new(Sync::None);
    let into = w.expect();
    let out = w.ship(w.args());
    out.wait_connected(LONG).unwrap();
    let (mut writer, q) = w.queue(0);
    out.add_lane(key(0), true, q.clone());
    for n in 0..5000 {
        put(&mut writer, n, 500);
    }
    writer.commit();
    until(|| out.status()[0].acked_seq == 5000);
    // The process dies and starts again.
    w.acceptor.unregister(HOLD);
    until(|| !into.is_connected() && into.turn.try_lock().is_ok());
    drop(into);
    let cfg = spool_config(w.dir.path().join("target"), Sync::None);
    let empty = Spool::open(&spool_config(w.dir.path().join("other"), Sync::None))
        .unwrap()
        .0;
    drop(std::mem::replace(&mut w.target, empty));
    let mut found = Vec::new();
    until(|| match Spool::open(&cfg) {
        Ok((spool, f)) => {
            w.target = spool;
            found = f;
            true
        }
        Err(e) => {
            assert!(matches!(e, crate::spool::SpoolError::InUse(_)));
            false
        }
    });
    assert_eq!(found.len(), 1);
    until(|| out.error().is_some_and(|e| e.contains("is expected here")));
    let into = w.incoming(HOLD, TICKET, "alpha");
    found.into_iter().for_each(|f| into.adopt(f));
    w.acceptor.register(into.clone());
    for n in 5000..7000 {
        put(&mut writer, n, 500);
    }
    writer.seal();
    assert!(out.wait_complete(Lanes::All, LONG), "{:?}", out.error());
    check(&out, &into, &q, 7000);
}

#[test]
fn an_abort_is_heard_by_the_target() {
    let w = World::new(Sync::None);
    let into = w.expect();
    let out = w.ship(w.args());
    out.wait_connected(LONG).unwrap();
    let (mut writer, q) = w.queue(0);
    out.add_lane(key(0), true, q);
    put(&mut writer, 0, 100);
    writer.commit();
    until(|| out.status()[0].acked_seq == 1);
    assert!(!into.is_aborted());
    out.abort();
    until(|| into.is_aborted());
    assert!(!out.wait_complete(Lanes::All, Duration::from_millis(20)));
}

#[test]
fn a_target_without_room_holds_the_source_back_and_loses_nothing() {
    let mut w = World::new(Sync::None);
    let cfg = SpoolConfig {
        quota_bytes: 8 * (256 << 10),
        ..spool_config(w.dir.path().join("small"), Sync::None)
    };
    w.target = Spool::open(&cfg).unwrap().0;
    let (mut big, _q) = w.target.create(HoldId(1), Kind::Local, &key(9)).unwrap();
    for n in 0..700 {
        put(&mut big, n, 1500);
    }
    let into = w.expect();
    let out = w.ship(w.args());
    out.wait_connected(LONG).unwrap();
    let (mut writer, q) = w.queue(0);
    out.add_lane(key(0), true, q.clone());
    for n in 0..1100 {
        put(&mut writer, n, 1500);
    }
    writer.seal();
    assert!(!out.wait_complete(Lanes::All, Duration::from_millis(300)));
    assert_eq!(out.error(), None);
    drop(big);
    w.target.remove_hold(HoldId(1)).unwrap();
    assert!(out.wait_complete(Lanes::All, LONG), "{:?}", out.error());
    check(&out, &into, &q, 1100);
}
