//! The product's promise, with real VMs: a group moves, or is put back in whatever phase, and its traffic is clean.

use gangway_tests::lab::baseline::Phases;
use gangway_tests::lab::demo::{Freeze, Ports};
use gangway_tests::lab::group::Group;
use gangway_tests::lab::memory;
use gangway_tests::lab::moved::{self, World};
use gangway_tests::lab::process::{Process, until};
use gangway_tests::lab::qemu::Files;
use gangway_tests::lab::report::Run;
use gangway_tests::lab::{CRASH, once_more_after_a_crash};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(60);

fn logs(name: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(name)
}

fn moves(ports: Ports, freeze: Freeze, name: &str) -> Run {
    once_more_after_a_crash(|| moves_once(ports, freeze, name))
}

fn moves_once(ports: Ports, freeze: Freeze, name: &str) -> Run {
    let say = &mut |text: &str| eprintln!("{name}: {text}");
    let run = moved::run(
        &Group::roomy(),
        ports,
        freeze,
        Phases::default(),
        &logs(name),
        say,
    );
    let run = run.unwrap_or_else(|e| panic!("{name}: {e:#}; logs in {}", logs(name).display()));
    for flow in &run.traffic {
        assert!(flow.is_clean(), "{name}: {flow:#?}");
        assert!(flow.sent > 0, "{name}: {} sent nothing", flow.name);
    }
    assert_eq!(
        run.order,
        ["producer", "middle", "consumer"],
        "senders first"
    );
    assert!(!run.links.is_empty());
    run
}

#[test]
fn a_group_on_vhost_user_ports_moves_without_losing_a_frame() {
    moves(
        Ports::VhostUser,
        Freeze::Switchover,
        "vhost-user-switchover",
    );
}

#[test]
fn a_group_on_tap_ports_moves_without_losing_a_frame() {
    moves(Ports::Tap, Freeze::Switchover, "tap-switchover");
}

#[test]
fn the_early_freeze_moves_without_losing_a_frame() {
    moves(Ports::VhostUser, Freeze::Early, "vhost-user-early");
}

/// A coordinator that waits at a step. Returns it and the migration's folder.
fn paused_at(world: &World, freeze: Freeze, step: &str) -> (Process, PathBuf) {
    let mut command = world.coordinator.migrate(&world.group, freeze);
    command.env("GANGWAY_PAUSE_AT", step);
    let log = (0..)
        .map(|n| format!("migrate-{n}-{}.log", step.replace(':', "-")))
        .map(|name| world.lab.dir().join(name))
        .find(|log| !log.exists())
        .unwrap();
    let process = Process::start("gangway migrate", command, &log).unwrap();
    let state = world.lab.dir().join("coordinator");
    let mut seen = None;
    let found = until(&format!("pause at {step}"), PATIENCE, || {
        if let Some(status) = process.ended() {
            anyhow::bail!(
                "it ended with {status}: {}",
                std::fs::read_to_string(&log).unwrap_or_default()
            );
        }
        let folders = std::fs::read_dir(&state).into_iter().flatten().flatten();
        seen = folders
            .map(|f| f.path())
            .find(|f| f.join("paused").exists());
        Ok(seen.clone())
    });
    (process, found.unwrap())
}

fn all_run_on_a(world: &mut World, when: &str) {
    for vm in &mut world.sources {
        let status = vm.qmp.execute("query-status", json!({})).unwrap();
        assert_eq!(status["status"], "running", "{} after {when}", vm.name);
    }
}

/// A world under traffic in which `body` does something, after which the group moves and the traffic must be clean.
fn in_a_world(ports: Ports, name: &str, body: impl Fn(&mut World)) {
    once_more_after_a_crash(|| in_a_world_once(ports, name, &body));
}

fn in_a_world_once(ports: Ports, name: &str, body: impl Fn(&mut World)) {
    let group = Group::roomy();
    let mut world = World::new(&group, ports, &logs(name)).unwrap();
    world.traffic.start().unwrap();
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        body(&mut world);
        let command = world.coordinator.migrate(&group, Freeze::Switchover);
        let log = world.lab.dir().join("migrate-at-last.log");
        let status = Process::start("gangway migrate", command, &log)
            .unwrap()
            .wait(PATIENCE)
            .unwrap();
        assert!(
            status.success(),
            "{}",
            std::fs::read_to_string(&log).unwrap_or_default()
        );
        thread::sleep(Duration::from_secs(2));
        let flows = world.stop_traffic().unwrap();
        let unclean: Vec<_> = flows.iter().filter(|flow| !flow.is_clean()).collect();
        assert!(unclean.is_empty(), "{unclean:#?}\n{}", world.drops());
        eprintln!("{name}: {:?}", world.verify("moved").unwrap());
    }));
    world.lab.keep_logs(&logs(name)).unwrap();
    if let Err(panic) = result {
        let crashed = world.lab.crashed();
        assert!(crashed.is_empty(), "{CRASH}: {crashed:?}");
        std::panic::resume_unwind(panic);
    }
}

fn aborted_at(world: &mut World, freeze: Freeze, step: &str) {
    let (migrate, folder) = paused_at(world, freeze, step);
    world
        .coordinator
        .ask(&["abort"])
        .unwrap_or_else(|e| panic!("abort at {step}: {e:#}"));
    assert_eq!(
        migrate.wait(PATIENCE).unwrap().code(),
        Some(3),
        "rolled back at {step}"
    );
    all_run_on_a(world, step);
    std::fs::remove_file(folder.join("paused")).unwrap();
}

fn killed_at(world: &mut World, step: &str, silence: Duration) {
    let (migrate, folder) = paused_at(world, Freeze::Switchover, step);
    migrate.kill();
    // Nobody speaks for the group now; what comes in is held or flows as before.
    thread::sleep(silence);
    world
        .coordinator
        .ask(&["abort"])
        .unwrap_or_else(|e| panic!("abort after a kill at {step}: {e:#}"));
    all_run_on_a(world, step);
    std::fs::remove_file(folder.join("paused")).unwrap();
}

/// Aborted, or killed and then aborted, in each phase: the VMs run on A and nothing is lost. Then they move all the same.
#[test]
fn an_abort_in_any_phase_and_a_killed_coordinator_lose_nothing() {
    in_a_world(Ports::VhostUser, "aborts", |world| {
        for step in [
            "start",
            "precopy:after",
            "freeze:after",
            "stop:after",
            "switchover:after",
            "restore:after",
        ] {
            aborted_at(world, Freeze::Switchover, step);
        }
        aborted_at(world, Freeze::Early, "freeze-inside:after");
        for step in ["precopy:after", "seal:after"] {
            killed_at(world, step, Duration::from_secs(1));
        }
    });
}

/// How often a test repeats what it does.
fn rounds(default: u32) -> u32 {
    std::env::var("GANGWAY_ROUNDS").map_or(default, |n| n.parse().unwrap())
}

/// The pages that differ between both ends when all VMs are over and none has gone on, and how often that was looked at.
/// Then the move is aborted.
fn stale_pages(world: &mut World, rounds: u32, seen: &mut Vec<String>) {
    for round in 0..rounds {
        let (migrate, folder) = paused_at(world, Freeze::Switchover, "restore:after");
        for vm in &world.group.vms {
            let [a, b] = [&world.lab.a, &world.lab.b]
                .map(|host| memory::of(&Files::new(&host.dir, &vm.name)).unwrap());
            for stale in memory::compare(&a, &b).unwrap() {
                let stale = format!("round {round}, {}: {stale:#x?}", vm.name);
                // Also if something else fails first.
                eprintln!("{stale}");
                seen.push(stale);
            }
        }
        world.coordinator.ask(&["abort"]).unwrap();
        assert_eq!(migrate.wait(PATIENCE).unwrap().code(), Some(3));
        all_run_on_a(world, "a look at the memories");
        std::fs::remove_file(folder.join("paused")).unwrap();
    }
}

/// What the switch writes for a guest is in its dirty log, and what QEMU collects of it arrives: every page is at B as it is
/// at A. More rounds: `GANGWAY_ROUNDS`.
#[test]
fn a_moved_vm_has_the_memory_that_it_had() {
    let rounds = rounds(4);
    let seen = std::cell::RefCell::new(Vec::new());
    in_a_world(Ports::VhostUser, "memory", |world| {
        stale_pages(world, rounds, &mut seen.borrow_mut());
    });
    let seen = seen.into_inner();
    assert!(seen.is_empty(), "{rounds} rounds of 3 VMs: {seen:#?}");
}

/// What a move leaves behind at its source is not in the way of the move back, nor that of the next one.
#[test]
fn a_group_moves_there_and_back_and_there_again_without_losing_a_frame() {
    in_a_world(Ports::VhostUser, "back", |world| {
        for host in ["b", "a"] {
            world
                .move_to(host)
                .unwrap_or_else(|e| panic!("to {host}: {e:#}"));
            eprintln!("to {host}: {:?}", world.verify("moved").unwrap());
            thread::sleep(Duration::from_secs(1));
        }
    });
}

/// More rounds: `GANGWAY_ROUNDS`.
#[test]
fn on_tap_ports_aborts_lose_nothing() {
    in_a_world(Ports::Tap, "tap-aborts", |world| {
        for _ in 0..rounds(1) {
            aborted_at(world, Freeze::Switchover, "freeze:after");
            aborted_at(world, Freeze::Switchover, "restore:after");
        }
    });
}

/// Behind the pre-copy the VMs converge and stop by themselves once nobody steers them: on TAPs only QEMU's word tells, and a
/// QEMU that stops unasked keeps or throws away what it has taken.
#[test]
fn on_tap_ports_a_coordinator_killed_behind_the_precopy_loses_nothing() {
    in_a_world(Ports::Tap, "tap-kill", |world| {
        killed_at(world, "precopy:after", Duration::from_secs(7));
    });
}

/// A switch that gets no processor for a while (a busy host) loses nothing: frames wait in the guests' rings.
#[test]
fn a_switch_that_stands_still_for_a_while_loses_nothing() {
    let group = Group::default();
    let mut world = World::new(&group, Ports::VhostUser, &logs("stall")).unwrap();
    world.traffic.start().unwrap();
    let switch = world.lab.a.switch.as_ref().unwrap().pid() as i32;
    let pid = rustix::process::Pid::from_raw(switch).unwrap();
    for _ in 0..6 {
        thread::sleep(Duration::from_millis(600));
        for (signal, then) in [
            (rustix::process::Signal::STOP, 2000),
            (rustix::process::Signal::CONT, 0),
        ] {
            rustix::process::kill_process(pid, signal).unwrap();
            thread::sleep(Duration::from_millis(then));
        }
    }
    thread::sleep(Duration::from_secs(1));
    let flows = world.traffic.stop().unwrap();
    world.lab.keep_logs(&logs("stall")).unwrap();
    let drops = world.drops();
    for flow in flows {
        assert!(flow.is_clean(), "{flow:#?}\n{drops}");
    }
}

/// What a user gets wrong: one clear line that names the thing and what to do, an exit code, and nothing changed.
#[test]
fn wrong_requests_are_refused_clearly_and_change_nothing() {
    let group = Group::default();
    let mut world = World::new(&group, Ports::VhostUser, &logs("refusals")).unwrap();
    let ask = |world: &World, args: &[&str]| {
        let out = world.coordinator.command(args).output().unwrap();
        (
            out.status.code(),
            String::from_utf8_lossy(&out.stderr).into_owned(),
        )
    };
    for (args, code, words) in [
        (&["migrate", "produzer", "--to", "b"][..], 2, "producer"),
        (&["migrate", "producer", "--to", "bb"], 2, "bb"),
        (&["host", "show", "c"], 2, "c"),
        (
            &["migrate", "producer", "--from", "b", "--to", "a"],
            2,
            "producer",
        ),
    ] {
        let (got, text) = ask(&world, args);
        assert!(
            got.is_some_and(|c| c != 0 && c != 3),
            "{args:?}: {got:?} (about {code}): {text}"
        );
        assert!(text.contains(words), "{args:?}: {text}");
        assert!(!text.contains("panicked"), "{text}");
    }
    // A command leaves no connection behind: a switch takes 64 at a time.
    for n in 0..70 {
        let (got, text) = ask(&world, &["host", "show", "b"]);
        assert_eq!(got, Some(0), "command {n}: {text}");
    }
    // A switch that is down.
    let b = world.lab.b.switch.take().unwrap();
    b.kill();
    let (got, text) = ask(
        &world,
        &["migrate", "producer,middle", "--from", "a", "--to", "b"],
    );
    assert_eq!(got, Some(4), "{text}");
    assert!(text.contains('b'), "{text}");
    all_run_on_a(&mut world, "refusals");
}

/// A VM whose memory is copied sooner than anybody expects: QEMU stops it before the freeze, reads one frame more from its TAP, and
/// takes that to its grave. It has been sent once more then.
#[test]
fn on_tap_ports_a_vm_that_stops_before_the_freeze_loses_nothing() {
    in_a_world(Ports::Tap, "tap-early", |world| {
        let vm = &mut world.sources[1];
        let mut command = world.coordinator.migrate(&world.group, Freeze::Switchover);
        command.arg("--quiet");
        let log = world.lab.dir().join("migrate-early.log");
        let migrate = Process::start("gangway migrate", command, &log).unwrap();
        until("a migration under way", PATIENCE, || {
            let told = vm.qmp.execute("query-migrate", json!({}))?;
            let copied = told["ram"]["transferred"].as_u64().unwrap_or(0);
            Ok((told["status"] == "active" && copied > 1 << 20).then_some(()))
        })
        .unwrap();
        // What is left fits into so long a pause.
        vm.qmp
            .execute(
                "migrate-set-parameters",
                json!({ "downtime-limit": 100_000 }),
            )
            .unwrap();
        let status = migrate.wait(PATIENCE).unwrap();
        let said = std::fs::read_to_string(&log).unwrap_or_default();
        assert!(status.success(), "{said}");
        let report = std::fs::read_to_string(world.coordinator.report_file()).unwrap();
        let report: serde_json::Value = serde_json::from_str(&report).unwrap();
        assert_eq!(report["stopped_early"], json!(["middle"]), "{report:#}");
        let log = std::fs::read_to_string(world.lab.a.dir.join("switch.log")).unwrap();
        let back = log.lines().find(|l| l.contains("read back"));
        eprintln!("tap-early: {back:?} {:?}", world.verify("moved").unwrap());
        world.move_to("a").unwrap();
    });
}
