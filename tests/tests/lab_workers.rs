//! Workers join and leave a switch that carries real VMs' traffic, before, during and after a move: no frame is lost.

use gangway_tests::lab::demo::{Freeze, Ports};
use gangway_tests::lab::group::Group;
use gangway_tests::lab::moved::World;
use gangway_tests::lab::process::{Process, until};
use gangway_tests::lab::{CRASH, once_more_after_a_crash};
use serde_json::Value;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::thread;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(60);

/// The queues that each worker of a host serves.
fn served(said: &str) -> Vec<usize> {
    let hosts: Value = serde_json::from_str(said).unwrap();
    let workers = hosts[0]["workers"].as_array().unwrap().iter();
    workers
        .map(|w| w["queues"].as_array().unwrap().len())
        .collect()
}

/// There are so many workers from now on, and all queues are spread over them.
fn set(world: &World, host: &str, count: usize, all: usize) {
    let n = count.to_string();
    let command = [
        "host", "workers", "set", host, "--count", &n, "-o", "json", "--wait-s", "20",
    ];
    let said = world.coordinator.ask(&command).unwrap();
    let served = served(&said);
    eprintln!("{host}: {served:?}");
    assert_eq!(served.len(), count);
    assert_eq!(served.iter().sum::<usize>(), all, "{served:?}");
    let (most, least) = (served.iter().max(), served.iter().min());
    assert!(most.unwrap() - least.unwrap() <= 1, "{served:?}");
}

/// Frames that each worker of a host has taken in.
fn taken(world: &World, host: &str) -> Vec<u64> {
    let command = ["host", "workers", "list", host, "-o", "json"];
    let hosts: Value = serde_json::from_str(&world.coordinator.ask(&command).unwrap()).unwrap();
    let workers = hosts[0]["workers"].as_array().unwrap().iter();
    workers.map(|w| w["rx_frames"].as_u64().unwrap()).collect()
}

fn in_a_world(group: &Group, name: &str, body: impl Fn(&mut World)) {
    let logs = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    once_more_after_a_crash(|| {
        let mut world = World::new(group, Ports::VhostUser, &logs).unwrap();
        let result = catch_unwind(AssertUnwindSafe(|| {
            world.traffic.start().unwrap();
            body(&mut world);
            for flow in world.traffic.stop().unwrap() {
                assert!(flow.is_clean(), "{flow:#?}\n{}", world.drops());
            }
        }));
        if let Err(panic) = result {
            world.lab.keep_logs(&logs).unwrap();
            eprintln!("{}\nlogs in {}", world.drops(), logs.display());
            let crashed = world.lab.crashed();
            assert!(crashed.is_empty(), "{CRASH}: {crashed:?}");
            resume_unwind(panic);
        }
    });
}

#[test]
fn workers_join_and_leave_under_traffic_without_losing_a_frame() {
    // Three VMs with a queue each, and the uplink.
    in_a_world(&Group::default(), "workers", |world| {
        thread::sleep(Duration::from_secs(1));
        for count in [2, 1, 2, 1] {
            set(world, "a", count, 4);
            let before = taken(world, "a");
            thread::sleep(Duration::from_secs(1));
            let now = taken(world, "a");
            assert!(
                before.iter().zip(&now).all(|(b, n)| n > b),
                "all work: {before:?} {now:?}"
            );
        }
    });
}

#[test]
fn a_hold_over_two_hosts_keeps_their_workers_and_is_clean_between_changes() {
    let group = Group::chain(&["left", "right"]);
    in_a_world(&group, "workers-hold", |world| {
        set(world, "a", 2, 3);
        let mut migrate = world.coordinator.migrate(&world.group, Freeze::Switchover);
        migrate.env("GANGWAY_PAUSE_AT", "seal");
        let log = world.lab.dir().join("migrate.log");
        let process = Process::start("gangway migrate", migrate, &log).unwrap();
        let state = world.lab.dir().join("coordinator");
        let folder = until("the pause", PATIENCE, || {
            let folders = std::fs::read_dir(&state).into_iter().flatten().flatten();
            let found = folders
                .map(|f| f.path())
                .find(|f| f.join("paused").exists());
            Ok(found)
        });
        let folder = folder.unwrap();
        for (host, count) in [("a", "1"), ("b", "2")] {
            let command = ["host", "workers", "set", host, "--count", count];
            let e = format!("{:#}", world.coordinator.ask(&command).unwrap_err());
            assert!(e.contains("a hold is open") && e.contains("left"), "{e}");
            // How they wait may change.
            let command = ["host", "workers", "set", host, "--poll", "busy"];
            world.coordinator.ask(&command).unwrap();
            let command = ["host", "workers", "set", host, "--poll", "adaptive"];
            world.coordinator.ask(&command).unwrap();
        }
        std::fs::write(folder.join("go"), "").unwrap();
        let status = process.wait(PATIENCE).unwrap();
        let said = std::fs::read_to_string(&log).unwrap_or_default();
        assert!(status.success(), "{said}");
        eprintln!("{:?}", world.verify("moved").unwrap());
        // The uplink is left of A's, all three are B's.
        set(world, "b", 2, 3);
        set(world, "a", 1, 1);
        thread::sleep(Duration::from_secs(1));
        set(world, "b", 1, 3);
        thread::sleep(Duration::from_secs(1));
    });
}
