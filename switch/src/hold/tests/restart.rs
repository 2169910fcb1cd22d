//! `kill -9` of a switch with a hold in any state, and what its successor does with it.

use super::*;
use crate::hold::record::FILE;
use crate::spool::{Kind, Queue};

/// How far a hold got.
#[derive(Debug, Clone, Copy, PartialEq, PartialOrd)]
pub(super) enum Upto {
    Open,
    FrozenInside,
    Frozen,
    Sealed,
    Restored,
}

const ALL: [Upto; 5] = [
    Upto::Open,
    Upto::FrozenInside,
    Upto::Frozen,
    Upto::Sealed,
    Upto::Restored,
];

/// Goes there; what `p` had queued when it was stopped.
pub(super) fn go(s: &Scene, upto: Upto) -> Vec<Vec<u8>> {
    s.more();
    s.prepare();
    if upto >= Upto::FrozenInside {
        s.a.ask(Request::Freeze {
            hold: ID,
            scope: Scope::Inside,
        });
    }
    if upto >= Upto::Frozen {
        s.a.ask(Request::Freeze {
            hold: ID,
            scope: Scope::All,
        });
    }
    std::thread::sleep(Duration::from_millis(30));
    let mut ring = Vec::new();
    if upto >= Upto::Sealed {
        ring = s.stop_vms();
        seal(s);
    }
    if upto >= Upto::Restored {
        s.b.ask(Request::IncomingRestore { hold: ID });
    }
    ring
}

pub(super) fn seal(s: &Scene) {
    s.a.ask(Request::Seal {
        hold: ID,
        timeout_ms: 5000,
    });
}

pub(super) fn put_back(s: &Scene) {
    eventually("it is put back", || {
        s.a.status().state == HoldState::Aborted
    });
    eventually("both spools are free again", || {
        s.a.spool().used_bytes() + s.b.spool().used_bytes() == 0
    });
    assert_eq!(
        (s.a.spool().holds().unwrap(), s.b.spool().holds().unwrap()),
        (vec![], vec![])
    );
}

/// Each lane to `m` holds more than so many frames.
fn each_holds(s: &Scene, least: u64) {
    eventually("each lane holds enough", || {
        let lanes = s.a.status().lanes;
        let mut to_m = lanes.iter().filter(|l| l.lane.to == "m");
        to_m.all(|l| l.held.frames > least)
    });
}

/// Held frames that wait at A's switch.
pub(super) fn held(s: &Scene) -> u64 {
    s.a.status().lanes.iter().map(|l| l.held.frames).sum()
}

#[test]
fn an_abort_behind_a_restart_of_the_source_delivers_what_was_held() {
    for upto in ALL {
        let s = Scene::new();
        let ring = go(&s, upto);
        let before = s.a.status();
        s.a.kill();
        // What comes meanwhile waits where nobody has accepted it.
        std::thread::sleep(Duration::from_millis(20));
        s.a.start(&[UP]);
        let after = s.a.status();
        assert_eq!(after.state, before.state, "{upto:?}");
        assert_eq!(after.frozen_ns, before.frozen_ns);
        assert_eq!((after.vms, after.peer), (before.vms, before.peer));
        for l in &before.lanes {
            let again = after.lanes.iter().find(|a| a.lane == l.lane).unwrap();
            assert!(again.held.frames >= l.held.frames, "{upto:?}: {}", l.lane);
        }
        if upto >= Upto::FrozenInside {
            assert!(held(&s) > 0, "{upto:?}");
        }
        if upto < Upto::Sealed {
            s.a.plug(P);
            s.a.plug(M);
        }
        s.a.ask(Request::HoldAbort { hold: ID });
        s.b.ask(Request::HoldAbort { hold: ID });
        if upto >= Upto::Sealed {
            resumed(&s, ring);
        }
        put_back(&s);
        s.more();
        s.verdict();
    }
}

#[test]
fn an_abort_goes_on_by_itself_where_it_was() {
    for upto in [Upto::Frozen, Upto::Sealed] {
        for room in [0, 7, 100] {
            let s = Scene::new();
            let mut ring = go(&s, Upto::Frozen);
            // None has delivered all when the switch dies: then it would not be putting back.
            each_holds(&s, 2 * 100);
            if upto == Upto::Sealed {
                ring = s.stop_vms();
                seal(&s);
            }
            // `m` takes so many, and then no more.
            s.a.ports[M].set_room(room);
            s.a.ask(Request::HoldAbort { hold: ID });
            s.b.ask(Request::HoldAbort { hold: ID });
            if upto == Upto::Sealed {
                resumed(&s, ring);
            }
            std::thread::sleep(Duration::from_millis(30));
            assert_eq!(s.a.status().state, HoldState::Aborting);
            s.a.kill();
            s.a.start(&[M, P, UP]);
            assert_eq!(s.a.status().state, HoldState::Aborting);
            // And once more.
            s.a.ports[M].set_room(room);
            std::thread::sleep(Duration::from_millis(10));
            s.a.kill();
            s.a.start(&[M, P, UP]);
            s.a.ports[M].set_room(usize::MAX);
            put_back(&s);
            s.more();
            s.verdict();
        }
    }
}

/// What waits for a receiver in memory: without a hold, with one that is open, and once it was cut.
#[test]
fn a_backlog_outlives_its_switch_before_and_in_a_hold() {
    let s = Scene::new();
    let dies = || {
        std::thread::sleep(Duration::from_millis(30));
        s.a.kill();
        s.a.start(&[M, P, UP]);
    };
    s.more();
    s.a.ports[M].set_room(0);
    dies();
    s.prepare();
    dies();
    s.a.ask(Request::Freeze {
        hold: ID,
        scope: Scope::All,
    });
    dies();
    s.a.ask(Request::HoldAbort { hold: ID });
    s.b.ask(Request::HoldAbort { hold: ID });
    dies();
    s.a.ports[M].set_room(usize::MAX);
    put_back(&s);
    s.a.ports[M].set_room(5);
    dies();
    s.a.ports[M].set_room(usize::MAX);
    s.more();
    s.verdict();
}

/// Which switch dies, and when.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Kill {
    Source(&'static str),
    Target(&'static str),
}

/// A move in which the switches die at these places.
fn moved(kills: &[Kill]) {
    let s = Scene::new();
    // Where the VMs are.
    let up = |site: &str, vms: bool| -> Vec<usize> {
        match (site, vms) {
            (_, true) => vec![M, P, UP],
            _ => vec![UP],
        }
    };
    let at = |here: &str, a_runs: bool, b_runs: bool| {
        for k in kills {
            match *k {
                Kill::Source(k) if k == here => {
                    s.a.kill();
                    std::thread::sleep(Duration::from_millis(10));
                    s.a.start(&up("a", a_runs));
                }
                Kill::Target(k) if k == here => {
                    s.b.kill();
                    std::thread::sleep(Duration::from_millis(10));
                    s.b.start(&up("b", b_runs));
                }
                _ => {}
            }
        }
    };
    s.more();
    s.prepare();
    at("prepared", true, false);
    s.a.ask(Request::Freeze {
        hold: ID,
        scope: Scope::All,
    });
    // More than `m` takes at first.
    each_holds(&s, 100);
    at("frozen", true, false);
    let ring = s.stop_vms();
    seal(&s);
    at("sealed", false, false);
    s.b.ask(Request::IncomingRestore { hold: ID });
    at("restored", false, false);
    s.b.ask(Request::Commit { hold: ID });
    at("committed", false, false);
    s.b.ports[M].set_room(50);
    s.b.refill(ring);
    s.b.plug(P);
    s.b.plug(M);
    s.runs_at(2);
    std::thread::sleep(Duration::from_millis(20));
    at("activated", false, true);
    s.b.ports[M].set_room(usize::MAX);
    s.b.ask(Request::Announce { hold: ID });
    at("announced", false, true);
    s.a.ask(Request::Depart {
        hold: ID,
        grace_ms: 3_000,
    });
    at("departing", false, true);
    eventually("the source is done", || {
        s.a.status().state == HoldState::Departed
    });
    eventually("the target is live", || {
        s.b.status().state == HoldState::Live
    });
    s.more();
    at("settled", false, true);
    eventually("the target is live", || {
        s.b.status().state == HoldState::Live
    });
    assert_eq!((s.a.knows_m_at(), s.b.knows_m_at()), (Some(UP), Some(M)));
    s.a.ask(Request::HoldRelease { hold: ID });
    s.b.ask(Request::HoldRelease { hold: ID });
    // No record says it to the next run any more.
    assert_eq!((s.a.keeps_m_at(), s.b.keeps_m_at()), (UP, M));
    eventually("nothing of it is in the spools", || {
        s.a.spool().used_bytes() + s.b.spool().used_bytes() == 0
    });
    the_ledgers_agree(&s);
    s.verdict();
}

impl Site {
    fn knows_m_at(&self) -> Option<usize> {
        let engine = self.engine();
        let shared = engine.shared();
        shared.fdb.lookup(mac(MAC_M), shared.now_s())
    }

    /// For the next run.
    fn keeps_m_at(&self) -> usize {
        let file = self.config.state_dir.join(crate::addresses::FILE);
        let kept = crate::addresses::format::decode(&std::fs::read(file).unwrap()).unwrap();
        let m = kept.addresses.iter().find(|a| a.mac == mac(MAC_M));
        usize::from(m.unwrap().port)
    }
}

#[test]
fn a_move_survives_the_source_s_switch_in_every_state() {
    for at in [
        "prepared",
        "frozen",
        "sealed",
        "restored",
        "committed",
        "activated",
        "announced",
        "departing",
        "settled",
    ] {
        moved(&[Kill::Source(at)]);
    }
}

#[test]
fn a_move_survives_the_target_s_switch_in_every_state() {
    for at in [
        "prepared",
        "frozen",
        "sealed",
        "restored",
        "committed",
        "activated",
        "announced",
        "departing",
        "settled",
    ] {
        moved(&[Kill::Target(at)]);
    }
}

#[test]
fn a_move_survives_both_switches_and_again() {
    let both = |at| [Kill::Source(at), Kill::Target(at)];
    moved(&both("sealed"));
    moved(&[both("restored"), both("committed"), both("activated")].concat());
    moved(&[both("prepared"), both("announced"), both("departing")].concat());
}

#[test]
fn what_cannot_be_taken_up_is_kept_and_named() {
    let s = Scene::new();
    let ring = go(&s, Upto::Sealed);
    let path = s.a.spool().dir_of(ID).join(FILE);
    s.a.kill();
    let intact = std::fs::read(&path).unwrap();
    let mut torn = intact.clone();
    torn[1600] ^= 1;
    std::fs::write(&path, &torn).unwrap();
    // What would come in now is not held by anybody.
    s.a.start(&[]);
    let used = s.a.spool().used_bytes();
    assert!(used > 0);
    for request in [
        Request::HoldStatus { hold: ID },
        Request::HoldAbort { hold: ID },
        Request::HoldAbort { hold: ID },
    ] {
        let (code, what) = refusal(&s.a, request);
        assert_eq!(code, RefusalCode::State, "not unknown: {what}");
        assert!(what.contains("frames") && what.contains(FILE), "{what}");
    }
    let (code, _) = refusal(&s.a, Request::HoldOpen(open_args(&s, &["m"])));
    assert_eq!(code, RefusalCode::Busy);
    match s.a.ask(Request::HostShow) {
        Reply::Host(h) => assert!(h.spool_error.unwrap().contains(FILE)),
        other => panic!("{other:?}"),
    }
    assert_eq!(s.a.spool().used_bytes(), used, "nothing is thrown away");
    // Once it is mended, everything is there.
    s.a.kill();
    std::fs::write(&path, &intact).unwrap();
    s.a.start(&[UP]);
    s.a.ask(Request::HoldAbort { hold: ID });
    s.b.ask(Request::HoldAbort { hold: ID });
    resumed(&s, ring);
    put_back(&s);
    s.more();
    s.verdict();
}

/// The queue of a lane, by its directory's number.
fn queue_dir(site: &Site, kind: Kind, from: &str, n: u16) -> std::path::PathBuf {
    let queues = site.spool().queues(ID);
    let is_it = |q: &&Arc<Queue>| q.kind() == kind && q.lane().from == from && q.lane().queue == n;
    let q = queues.iter().find(is_it).expect("a queue");
    q.dir().to_path_buf()
}

/// Nobody gets it, and everything that is left of it stays.
fn is_left(s: &Scene, what: &[&str]) {
    for request in [
        Request::HoldStatus { hold: ID },
        Request::HoldAbort { hold: ID },
    ] {
        let (code, why) = refusal(&s.a, request);
        assert_eq!(code, RefusalCode::State, "{why}");
        assert!(what.iter().all(|w| why.contains(w)), "{why}");
    }
    match s.a.ask(Request::HostShow) {
        Reply::Host(h) => {
            let why = h.spool_error.unwrap();
            assert!(what.iter().all(|w| why.contains(w)), "{why}");
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(s.a.spool().holds().unwrap(), [ID]);
}

#[test]
fn a_hold_of_which_a_queue_is_missing_is_not_taken_up_but_named() {
    let s = Scene::new();
    let ring = go(&s, Upto::Sealed);
    let gone = queue_dir(&s.a, Kind::Source, "p", 1);
    let aside = s.a.config.spool.dir.join("aside");
    s.a.kill();
    std::fs::rename(&gone, &aside).unwrap();
    s.a.start(&[]);
    is_left(&s, &["1 of its", "p.1 -> m", "not in the spool any more"]);
    // Once it is back, everything is there.
    s.a.kill();
    std::fs::rename(&aside, &gone).unwrap();
    s.a.start(&[UP]);
    s.a.ask(Request::HoldAbort { hold: ID });
    s.b.ask(Request::HoldAbort { hold: ID });
    resumed(&s, ring);
    put_back(&s);
    s.more();
    s.verdict();
}

#[test]
fn a_queue_that_does_not_say_whose_it_is_is_not_thrown_away() {
    let s = Scene::new();
    let ring = go(&s, Upto::Sealed);
    let dir = queue_dir(&s.a, Kind::Source, "p", 1);
    let (meta, first) = (dir.join("queue.meta"), dir.join("000000.seg"));
    s.a.kill();
    let intact = std::fs::read(&first).unwrap();
    let aside = s.a.config.spool.dir.join("aside");
    std::fs::rename(&meta, &aside).unwrap();
    let mut flipped = intact.clone();
    flipped[100] ^= 1;
    std::fs::write(&first, &flipped).unwrap();
    let record = s.a.config.spool.dir.join(ID.to_string()).join(FILE);
    // Whether there is a record or not.
    for keep in [true, false] {
        let bytes = std::fs::read(&record).unwrap();
        if !keep {
            std::fs::remove_file(&record).unwrap();
        }
        s.a.start(&[]);
        is_left(&s, &[dir.to_str().unwrap(), "whose frames"]);
        s.a.kill();
        std::fs::write(&record, bytes).unwrap();
    }
    assert_eq!(std::fs::read(&first).unwrap(), flipped);
    // With its header its lane is known, and its metadata are made anew.
    std::fs::write(&first, &intact).unwrap();
    s.a.start(&[UP]);
    let status = s.a.status();
    let lane = status
        .lanes
        .iter()
        .find(|l| l.lane.from == "p" && l.lane.queue == 1);
    assert!(lane.is_some_and(|l| l.held.frames > 0));
    let why = status.error.unwrap_or_default();
    assert!(why.contains("'flushed' of queue.meta"), "{why}");
    s.a.ask(Request::HoldAbort { hold: ID });
    s.b.ask(Request::HoldAbort { hold: ID });
    resumed(&s, ring);
    put_back(&s);
    s.more();
    s.verdict();
}

/// Behind the commit there is only forward: the hold goes on, and says what may be lost.
#[test]
fn a_target_of_which_a_queue_is_missing_behind_the_commit_says_so() {
    for committed_too in [false, true] {
        let mut s = Scene::new();
        match committed_too {
            true => committed(&s),
            false => restored(&s),
        };
        let gone = queue_dir(&s.b, Kind::Local, "up0", 0);
        s.b.kill();
        std::fs::remove_dir_all(gone).unwrap();
        s.b.start(&[UP]);
        let status = s.b.status();
        let why = status.error.unwrap_or_default();
        let said = why.contains("up0.0 -> ") && why.contains("not in the spool any more");
        assert_eq!(said, committed_too, "{:?}: {why}", status.state);
        s.end();
    }
}

/// Likewise of what was shipped; before the commit it is asked for again.
#[test]
fn a_target_of_which_a_shipped_lane_is_missing_behind_the_commit_says_so() {
    for committed_too in [false, true] {
        let mut s = Scene::new();
        match committed_too {
            true => committed(&s),
            false => restored(&s),
        };
        let shipped = s.b.spool().queues(ID);
        let shipped = shipped.iter().filter(|q| q.kind() == Kind::Incoming);
        let named = shipped.count();
        let gone = queue_dir(&s.b, Kind::Incoming, "p", 1);
        s.b.kill();
        std::fs::remove_dir_all(gone).unwrap();
        s.b.start(&[UP]);
        let status = s.b.status();
        let why = status.error.unwrap_or_default();
        let said = why.contains(&format!("1 of the {named} lanes"))
            && why.contains("there: ")
            && why.contains("p.0 -> ");
        assert_eq!(said, committed_too, "{:?}: {why}", status.state);
        let state = match committed_too {
            true => HoldState::Draining,
            false => HoldState::Prepared,
        };
        assert_eq!(status.state, state);
        if committed_too {
            // The source ships it once more; the hold is not over before that is delivered, which the next start begins with.
            eventually("it is there again", || {
                let why = s.b.status().error.unwrap_or_default();
                why.contains("p.1 -> m: shipped once more")
                    && why.contains("start this switch again")
            });
            s.b.kill();
            s.b.start(&[UP]);
            let status = s.b.status();
            let why = status.error.unwrap_or_default();
            assert!(
                !why.contains("lanes that the source") && !why.contains("once more"),
                "{why}"
            );
            assert_eq!(status.lanes.len(), named);
        }
        s.end();
    }
}

/// Also those that nothing was written to: what a loss of power leaves of words that were never synced is no queue.
#[test]
fn the_queues_of_both_ends_are_on_the_disk_once_they_are_answered_for() {
    let mut s = Scene::new();
    s.prepare();
    let queues = [&s.a, &s.b].map(|site| site.spool().queues(ID));
    let local = queues[1].iter().filter(|q| q.kind() == Kind::Local);
    assert!(local.count() > 0);
    for q in queues.iter().flatten() {
        let shipped = q.kind() == Kind::Incoming;
        assert!(shipped || q.is_founded(), "{}", q.dir().display());
    }
    s.end();
}

/// Who asks for the hold is told which lane and which numbers; an abort delivers all others, and the ledger says which not.
#[test]
fn a_damaged_record_is_named_by_the_hold_and_never_delivered() {
    let mut s = Scene::new();
    let ring = go(&s, Upto::Sealed);
    let dir = queue_dir(&s.a, Kind::Source, "p", 1);
    let lane = LaneKey {
        from: "p".into(),
        queue: 1,
        to: "m".into(),
    };
    s.a.kill();
    let path = dir.join("000000.seg");
    let mut b = std::fs::read(&path).unwrap();
    let le = |b: &[u8], at: usize| b[at..at + 8].try_into().map(u64::from_le_bytes).unwrap();
    // The second batch: behind the header and the first one.
    let at = 256 + (le(&b, 256 + 16) & 0xffff_ffff) as usize;
    let (first, n) = (le(&b, at + 24), u64::from(b[at + 20]));
    b[at + 60] ^= 8;
    std::fs::write(&path, &b).unwrap();
    s.a.start(&[UP]);
    let damaged = format!("{lane}: records {first} to {} are damaged", first + n - 1);
    let why = s.a.status().error.unwrap_or_default();
    assert!(why.contains(&damaged), "{why}, not {damaged}");
    s.a.ask(Request::HoldAbort { hold: ID });
    s.b.ask(Request::HoldAbort { hold: ID });
    resumed(&s, ring);
    put_back(&s);
    let ledger = s.a.ledger(Role::Source);
    let account = ledger
        .1
        .iter()
        .find(|l| l.lane == lane && !l.lost.is_empty());
    let lost = &account.expect("the ledger says what is lost").lost;
    for l in lost {
        let range = (l.first_seq, l.last_seq);
        assert_eq!(range, (first, first + n - 1), "at {:?}: {}", l.stage, l.why);
    }
    s.end();
    let got = s.got.lock().unwrap();
    let of_q: Vec<u32> = got
        .iter()
        .filter(|(who, _)| *who == MAC_Q)
        .map(|(_, n)| *n)
        .collect();
    let missing = of_q
        .windows(2)
        .map(|w| u64::from(w[1]) - u64::from(w[0]) - 1);
    let missing: Vec<u64> = missing.filter(|n| *n > 0).collect();
    assert_eq!(
        missing,
        [n],
        "one gap, of the damaged batch, and none twice"
    );
}

/// What was delivered is not known any more, of no lane: nothing is lost, and nothing of it was delivered before.
#[test]
fn a_hold_whose_words_are_lost_delivers_everything() {
    let s = Scene::new();
    let ring = go(&s, Upto::Sealed);
    let queues = s.a.spool().queues(ID);
    let metas: Vec<_> = queues.iter().map(|q| q.dir().join("queue.meta")).collect();
    drop(queues);
    s.a.kill();
    for (n, meta) in metas.iter().enumerate() {
        let mut b = std::fs::read(meta).unwrap();
        for copy in [256, 1024] {
            for word in 0..3 {
                b[copy + 8 * word + n % 8] ^= 1 << (n % 7);
            }
        }
        std::fs::write(meta, b).unwrap();
    }
    // A start that dies before anybody has looked at what it has found.
    drop(Spool::open(&s.a.config.spool).unwrap());
    s.a.start(&[UP]);
    let status = s.a.status();
    assert_eq!(status.state, HoldState::Sealed);
    let why = status.error.unwrap_or_default();
    assert!(why.contains("p.1 -> m: 'flags' of queue.meta"), "{why}");
    // Both lanes inside are known again.
    for q in s.a.spool().queues(ID) {
        let is = q.lane().from == "p" || q.lane().to == "p" && q.lane().from == "m";
        assert_eq!(q.inside(), is, "{}", q.lane());
    }
    s.a.ask(Request::HoldAbort { hold: ID });
    s.b.ask(Request::HoldAbort { hold: ID });
    resumed(&s, ring);
    put_back(&s);
    s.more();
    s.verdict();
}

#[test]
fn an_opening_that_was_never_answered_leaves_nothing() {
    let s = Scene::new();
    go(&s, Upto::Open);
    let path = s.a.spool().dir_of(ID).join(FILE);
    s.a.kill();
    std::fs::remove_file(path).unwrap();
    s.a.start(&[M, P, UP]);
    let (code, _) = refusal(&s.a, Request::HoldStatus { hold: ID });
    assert_eq!(code, RefusalCode::Unknown);
    assert_eq!(s.a.spool().holds().unwrap(), vec![]);
    s.b.ask(Request::HoldAbort { hold: ID });
    s.more();
    s.verdict();
}

#[test]
fn an_order_to_open_that_comes_behind_the_abort_is_late() {
    let s = Scene::new();
    for site in [&s.a, &s.b] {
        let (code, _) = refusal(site, Request::HoldAbort { hold: ID });
        assert_eq!(code, RefusalCode::Unknown);
    }
    let (code, what) = refusal(&s.a, Request::HoldOpen(open_args(&s, &["m"])));
    assert_eq!(code, RefusalCode::State);
    assert!(what.contains("too late"), "{what}");
    let prepare = IncomingPrepare {
        hold: ID,
        vms: vec!["m".into()],
        ports: vec![],
        source_host: "alpha".into(),
        ticket: [5; 32],
    };
    let (code, _) = refusal(&s.b, Request::IncomingPrepare(prepare));
    assert_eq!(code, RefusalCode::State);
    s.more();
    s.verdict();
}

#[test]
fn a_hold_that_nobody_asks_for_is_kept_and_says_so() {
    let s = Scene::new();
    go(&s, Upto::Frozen);
    s.a.status();
    let later = std::time::Instant::now() + Duration::from_secs(61);
    let h = s.a.manager().overdue_at(ID, later);
    assert!(h.is_some_and(|why| why.contains("gangway abort")));
    s.a.manager().look(later);
    assert_eq!(s.a.status().state, HoldState::Frozen, "it is kept");
    s.a.ask(Request::HoldAbort { hold: ID });
    s.b.ask(Request::HoldAbort { hold: ID });
    put_back(&s);
    assert_eq!(s.a.manager().overdue_at(ID, later), None, "it is over");
    s.more();
    s.verdict();
}
