//! The lab itself: what it measures without anything to lose, and that it leaves nothing behind.

use gangway_tests::lab::Lab;
use gangway_tests::lab::demo::Ports;
use gangway_tests::lab::gangway::host_config;
use gangway_tests::lab::group::Group;
use gangway_tests::lab::process::until;
use gangway_tests::lab::qemu::{Incoming, Nic, Vm};
use gangway_tests::lab::traffic::Traffic;
use rustix::process::{Pid, Signal, kill_process};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

/// The names of our namespaces and folders that belong to a process.
fn left_behind(pid: u32) -> Vec<String> {
    let mut found = Vec::new();
    for dir in ["/run/netns", "/tmp"] {
        let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
        let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
        found.extend(names.filter(|name| name.starts_with(&format!("gw{pid}-"))));
    }
    found
}

#[test]
fn traffic_over_bridges_is_clean_while_nothing_moves() {
    let lab = Lab::new().unwrap();
    let group = Group::default();
    lab.a.start_bridge().unwrap();
    let start = |vm: usize| {
        lab.a.bridge_tap(&group.vms[vm].name).unwrap();
        let nic = Nic::Tap {
            device: group.vms[vm].name.clone(),
        };
        Vm::start(
            &lab.a,
            &group,
            &group.vms[vm],
            &lab.image,
            &nic,
            Incoming::No,
        )
        .unwrap()
    };
    let vms: Vec<Vm> = (0..3).map(start).collect();
    vms.iter()
        .for_each(|vm| vm.wait_ready(Duration::from_secs(60)).unwrap());
    let mut traffic = Traffic::new(&lab, &group).unwrap();
    traffic.start().unwrap();
    thread::sleep(Duration::from_secs(3));
    let flows = traffic.stop().unwrap();

    let names: Vec<&str> = flows.iter().map(|flow| flow.name.as_str()).collect();
    for name in [
        "udp producer->middle",
        "udp middle->consumer",
        "udp consumer->outside",
        "tcp producer->consumer",
        "tcp consumer->outside",
        "outside udp echo middle",
        "outside tcp producer",
    ] {
        assert!(names.contains(&name), "{name} is not in {names:?}");
    }
    for flow in &flows {
        assert!(flow.is_clean(), "{flow:#?}");
        if flow.name.starts_with("tcp") {
            assert!(flow.digest_source.is_some(), "{flow:#?}");
        }
    }
}

#[test]
fn a_run_that_is_terminated_leaves_nothing_behind() {
    let out = tempfile::tempdir().unwrap();
    let mut demo = Command::new(env!("CARGO_BIN_EXE_gangway-demo"))
        .args(["--baseline-only", "--out"])
        .arg(out.path())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let pid = demo.id();
    let host = |name: &str| {
        Path::new("/run/netns")
            .join(format!("gw{pid}-0-{name}"))
            .exists()
    };
    until("namespace", Duration::from_secs(60), || {
        Ok(host("fab").then_some(()))
    })
    .unwrap();
    thread::sleep(Duration::from_secs(2));
    kill_process(Pid::from_raw(pid as i32).unwrap(), Signal::TERM).unwrap();
    let status = demo.wait().unwrap();
    assert_eq!(status.code(), Some(128 + Signal::TERM.as_raw()));
    assert_eq!(left_behind(pid), Vec::<String>::new());
}

#[test]
fn what_a_killed_run_left_behind_is_removed_by_the_next() {
    let out = tempfile::tempdir().unwrap();
    let mut demo = Command::new(env!("CARGO_BIN_EXE_gangway-demo"))
        .args(["--baseline-only", "--out"])
        .arg(out.path())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let pid = demo.id();
    let fabric = format!("/run/netns/gw{pid}-0-fab");
    until("namespace", Duration::from_secs(60), || {
        Ok(Path::new(&fabric).exists().then_some(()))
    })
    .unwrap();
    thread::sleep(Duration::from_secs(2));
    demo.kill().unwrap();
    demo.wait().unwrap();
    assert!(
        !left_behind(pid).is_empty(),
        "a killed process can't clean up"
    );
    let lab = Lab::new().unwrap();
    assert_eq!(left_behind(pid), Vec::<String>::new());
    assert!(
        !left_behind(std::process::id()).is_empty(),
        "the living keep theirs"
    );
    drop(lab);
    assert_eq!(left_behind(std::process::id()), Vec::<String>::new());
}

#[test]
fn the_hosts_configurations_are_valid() {
    let lab = Lab::new().unwrap();
    let group = Group::default();
    for ports in [Ports::VhostUser, Ports::Tap] {
        for host in [&lab.a, &lab.b] {
            let text = host_config(&lab, host, &group, ports);
            if let Err(error) = gangway_shared::config::HostConfig::parse(&text, "host.toml") {
                panic!("{error}\n{text}");
            }
        }
    }
}
