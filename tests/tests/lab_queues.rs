//! Guests with several queues on a switch with several workers: both carry frames, and a group of them moves under traffic
//! without losing one, in split rings and in packed ones. What they send outside meanwhile has right checksums.

use gangway_tests::lab::capture::Capture;
use gangway_tests::lab::demo::{Freeze, Ports};
use gangway_tests::lab::group::Group;
use gangway_tests::lab::iperf;
use gangway_tests::lab::moved::World;
use gangway_tests::lab::process::Process;
use gangway_tests::lab::{CRASH, once_more_after_a_crash};
use serde_json::Value;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::thread;
use std::time::Duration;

/// (frames from, frames to) each queue of a VM's port.
fn queues(world: &World, host: &str, port: &str) -> Vec<(u64, u64)> {
    let text = world.coordinator.ask(&["host", "show", host, "-o", "json"]);
    let shown: Value = serde_json::from_str(&text.unwrap()).unwrap();
    let ports = shown["ports"].as_array().unwrap();
    let port = ports.iter().find(|p| p["name"] == port).unwrap();
    let count = |q: &Value, key: &str| q[key].as_u64().unwrap();
    let queues = port["queues"].as_array().unwrap().iter();
    queues
        .map(|q| (count(q, "rx_frames"), count(q, "tx_frames")))
        .collect()
}

/// Both queues of each VM's port have carried frames, and there is no third one.
fn both_carry(world: &World, host: &str) {
    for port in ["left0", "right0"] {
        let queues = queues(world, host, port);
        eprintln!("{port} on {host}: {queues:?}");
        // How many, and whether both ways, is the guests' affair: a sender's queue is that of the processor that it happens to run on.
        let busy = queues.iter().filter(|(rx, tx)| rx + tx > 0);
        assert_eq!((busy.count(), queues.len()), (2, 2), "{port}: {queues:?}");
    }
}

/// `VIRTIO_F_RING_PACKED`.
const RING_PACKED: usize = 34;

fn moves(world: &mut World, packed: bool) {
    for vm in ["left", "right"] {
        let shell = |script: &str| world.traffic.shell(vm, script).unwrap();
        let features = shell("cat /sys/class/net/eth0/device/features");
        let is_packed = features.as_bytes()[RING_PACKED] == b'1';
        assert_eq!(is_packed, packed, "{vm}: {features}");
        let channels = shell("ethtool -l eth0");
        let combined: Vec<&str> = channels
            .lines()
            .filter(|l| l.contains("Combined"))
            .collect();
        // What could be, and what is.
        assert_eq!(combined.len(), 2, "{channels}");
        assert!(combined.iter().all(|l| l.ends_with('2')), "{channels}");
        // By the flow instead of by the processor: a sender that changes its processor would overtake itself in the guest.
        shell("for f in /sys/class/net/eth0/queues/tx-*/xps_cpus; do echo 0 >$f; done");
    }
    for host in [&world.lab.a, &world.lab.b] {
        // As it looks on a wire.
        host.netns.no_offloads("up0").unwrap();
    }
    let file = world.lab.dir().join("outside.pcap");
    let filter = "src net 10.78.0.0/27";
    let capture = Capture::start(&world.lab.net.out, "eth0", filter, 200_000, &file).unwrap();
    // A kernel that has just resolved an address sends what waited for that by one processor, and what comes by another.
    let neighbour = format!("ping -c 1 -w 20 {}", world.group.vms[1].address);
    world.traffic.shell("left", &neighbour).unwrap();
    world.traffic.start().unwrap();
    iperf::serve(&world.traffic, "right").unwrap();
    // Slow enough that the memory that it touches can be copied meanwhile.
    let right = &world.group.vms[1].address;
    let streams = format!("{right} -P 4 -t 14 --bidir -b 4M");
    iperf::start(&world.traffic, "left", &streams).unwrap();
    thread::sleep(Duration::from_secs(3));
    both_carry(world, "a");
    let command = world.coordinator.migrate(&world.group, Freeze::Switchover);
    let log = world.lab.dir().join("migrate.log");
    let status = Process::start("gangway migrate", command, &log).unwrap();
    let status = status.wait(Duration::from_secs(60)).unwrap();
    let said = std::fs::read_to_string(&log).unwrap_or_default();
    assert!(status.success(), "{said}");
    thread::sleep(Duration::from_secs(1));
    let seen = iperf::finish(&world.traffic, "left", Duration::from_secs(40)).unwrap();
    eprintln!("{seen:?}");
    assert!(seen.bytes > 1 << 20, "{seen:?}");
    both_carry(world, "b");
    let outside = capture.stop().unwrap();
    eprintln!("{outside:?}");
    assert_eq!(outside.wrong, Vec::<String>::new());
    assert!(outside.tcp > 500 && outside.udp > 500, "{outside:?}");
    for vm in ["left", "right"] {
        let snmp = world.traffic.shell(vm, "cat /proc/net/snmp").unwrap();
        for (protocol, field) in [("Tcp", "InCsumErrors"), ("Udp", "InCsumErrors")] {
            assert_eq!(counted(&snmp, protocol, field), 0, "{protocol} of {vm}");
        }
    }
    for mut flow in world.traffic.stop().unwrap() {
        // Linux says that it has read a queue while it still has a list of packets from it in its hands (ADR-0027): a guest whose
        // processor stands still just then, as these do, brings them in late itself.
        if flow.name.starts_with("udp ") && flow.reordered < IN_HAND {
            eprintln!("{}: late {:?}", flow.name, flow.late);
            flow.reordered = 0;
        }
        assert!(flow.is_clean(), "{flow:#?}\n{}", world.drops());
    }
    eprintln!("{:?}", world.verify("moved").unwrap());
}

/// `net.core.gro_normal_batch` of Linux.
const IN_HAND: u64 = 8;

/// A counter of a guest's kernel in `/proc/net/snmp`: a line of names, a line of values.
fn counted(snmp: &str, protocol: &str, field: &str) -> u64 {
    let lines = snmp.lines().filter_map(|line| line.split_once(": "));
    let lines: Vec<&str> = lines
        .filter(|(name, _)| *name == protocol)
        .map(|(_, rest)| rest)
        .collect();
    let at = lines[0].split(' ').position(|name| name == field).unwrap();
    lines[1].split(' ').nth(at).unwrap().parse().unwrap()
}

#[test]
fn guests_with_two_queues_move_without_losing_a_frame() {
    moves_without_loss("queues", false);
}

#[test]
fn guests_with_two_packed_queues_move_without_losing_a_frame() {
    moves_without_loss("queues-packed", true);
}

fn moves_without_loss(name: &str, packed: bool) {
    let logs = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let mut group = Group {
        queues: 2,
        workers: 2,
        tools: true,
        ..Group::chain(&["left", "right"])
    };
    if packed {
        for vm in &mut group.vms {
            vm.nic = "packed=on".to_owned();
        }
    }
    once_more_after_a_crash(|| {
        let mut world = World::new(&group, Ports::VhostUser, &logs).unwrap();
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| moves(&mut world, packed))) {
            world.lab.keep_logs(&logs).unwrap();
            eprintln!("{}\nlogs in {}", world.drops(), logs.display());
            let crashed = world.lab.crashed();
            assert!(crashed.is_empty(), "{CRASH}: {crashed:?}");
            resume_unwind(panic);
        }
    });
}
