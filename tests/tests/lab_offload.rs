//! Real guests with all offloads on the switch: big frames pass whole, small ones are made where a receiver needs them, and
//! every checksum is right, as the guests and a capture outside see it.

use gangway_tests::lab::capture::Capture;
use gangway_tests::lab::demo::Ports;
use gangway_tests::lab::group::Group;
use gangway_tests::lab::iperf;
use gangway_tests::lab::moved::World;
use gangway_tests::lab::net::OUTSIDE;
use gangway_tests::lab::process::{Process, until};
use serde_json::Value;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::time::Duration;

/// Two guests whose cards have such properties, with tools and without anything else to do.
fn group(nic: &str) -> Group {
    let mut group = Group {
        tools: true,
        dirty_mb: 0,
        ..Group::chain(&["left", "right"])
    };
    for vm in &mut group.vms {
        vm.nic = nic.to_owned();
    }
    group
}

/// What a guest with packed rings has.
const PACKED: &str = "packed=on";
/// `VIRTIO_F_RING_PACKED`, `VIRTIO_NET_F_GUEST_CSUM`, `GUEST_TSO4`, `GUEST_TSO6`.
const RING_PACKED: usize = 34;
const TAKES: [usize; 3] = [1, 7, 8];

/// What a guest without offloads for receiving has.
const PLAIN: &str = "guest_csum=off,guest_tso4=off,guest_tso6=off,guest_ecn=off,guest_ufo=off";

/// A world whose logs are kept when what is done in it fails.
fn in_world(name: &str, group: &Group, act: impl Fn(&World)) {
    let logs = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let world = World::new(group, Ports::VhostUser, &logs).unwrap();
    let act = || {
        world.traffic.ping().unwrap();
        for vm in &world.group.vms {
            let is_packed = agreed(&world, &vm.name, RING_PACKED);
            assert_eq!(is_packed, vm.nic.contains(PACKED), "{}", vm.name);
        }
        for vm in &world.group.vms {
            // An emulated processor may come late; what is lost then would be the guest's fault.
            let script = "echo 4194304 >/proc/sys/net/core/rmem_default";
            world.traffic.shell(&vm.name, script).unwrap();
        }
        act(&world);
    };
    if let Err(panic) = catch_unwind(AssertUnwindSafe(act)) {
        world.lab.keep_logs(&logs).unwrap();
        eprintln!("{}\nlogs in {}", world.drops(), logs.display());
        resume_unwind(panic);
    }
}

/// The ports of A's switch by name.
fn ports(world: &World) -> BTreeMap<String, Value> {
    let text = world.coordinator.ask(&["host", "show", "a", "-o", "json"]);
    let shown: Value = serde_json::from_str(&text.unwrap()).unwrap();
    let ports = shown["ports"].as_array().unwrap().iter();
    ports
        .map(|p| (p["name"].as_str().unwrap().to_owned(), p.clone()))
        .collect()
}

/// Bytes per frame that the switch has given to a port since `before`.
fn mean(world: &World, before: &BTreeMap<String, Value>, port: &str) -> u64 {
    let now = ports(world);
    let more = |key: &str| now[port][key].as_u64().unwrap() - before[port][key].as_u64().unwrap();
    more("tx_bytes") / more("tx_frames").max(1)
}

/// What a guest's kernel counts, as `Tcp.InCsumErrors`.
fn snmp(world: &World, vm: &str) -> BTreeMap<String, u64> {
    let text = world.traffic.shell(vm, "cat /proc/net/snmp").unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let mut all = BTreeMap::new();
    for pair in lines.chunks(2) {
        let [names, values] = pair else { continue };
        let (protocol, names) = names.split_once(": ").unwrap();
        let values = values.split_once(": ").unwrap().1.split(' ');
        for (name, value) in names.split(' ').zip(values) {
            all.insert(format!("{protocol}.{name}"), value.parse().unwrap_or(0));
        }
    }
    all
}

/// No kernel and no card of a guest has found a frame wrong or had to drop one; no frame was dropped in the switch.
fn nothing_is_wrong(world: &World) {
    for vm in ["left", "right"] {
        let counts = snmp(world, vm);
        for bad in [
            "Ip.InHdrErrors",
            "Ip.InDiscards",
            "Tcp.InErrs",
            "Tcp.InCsumErrors",
            "Udp.InErrors",
            "Udp.InCsumErrors",
        ] {
            assert_eq!(counts[bad], 0, "{bad} of {vm}");
        }
        assert!(counts["Tcp.InSegs"] > 0);
        let card = world.traffic.shell(vm, "ethtool -S eth0").unwrap();
        let drops = card.lines().filter(|line| line.contains("drops"));
        let drops: Vec<&str> = drops.filter(|line| !line.ends_with(": 0")).collect();
        assert!(card.contains("rx_queue_0_packets"), "{card}");
        assert_eq!(drops, Vec::<&str>::new(), "{vm}");
    }
    for (name, port) in ports(world) {
        assert_eq!(port["drops"], serde_json::json!([]), "port {name}");
    }
}

/// Whether a guest's card has a feature.
fn has(world: &World, vm: &str, feature: &str) -> bool {
    let shown = world.traffic.shell(vm, "ethtool -k eth0").unwrap();
    let line = shown.lines().find(|line| line.trim().starts_with(feature));
    line.unwrap_or_else(|| panic!("no {feature} in {shown}"))
        .contains(": on")
}

/// Whether a guest's driver has agreed to a virtio feature. (ethtool shows "on" for some that it has not.)
fn agreed(world: &World, vm: &str, bit: usize) -> bool {
    let script = "cat /sys/class/net/eth0/device/features";
    let features = world.traffic.shell(vm, script).unwrap();
    features.as_bytes()[bit] == b'1'
}

/// Eight megabytes from one guest to the other by TCP arrive as they were.
fn bytes_arrive(world: &World, from: &str, to: &str) {
    const BYTES: usize = 8 << 20;
    let shell = |vm: &str, script: &str| world.traffic.shell(vm, script).unwrap();
    let address = &world
        .group
        .vms
        .iter()
        .find(|vm| vm.name == to)
        .unwrap()
        .address;
    shell(from, &format!("head -c {BYTES} /dev/urandom >/tmp/sent"));
    // Its own end must not come first: nc would close.
    shell(
        to,
        "rm -f /tmp/got; (tail -f /dev/null | nc -l -p 7010 >/tmp/got) </dev/null >/dev/null 2>&1 & sleep 0.5",
    );
    shell(
        from,
        &format!("nc {address} 7010 </tmp/sent >/dev/null 2>&1 &"),
    );
    let size = || -> usize { shell(to, "wc -c </tmp/got").trim().parse().unwrap() };
    until("file", Duration::from_secs(20), || {
        Ok((size() >= BYTES).then_some(()))
    })
    .unwrap();
    let digest = |vm: &str, file: &str| {
        let said = shell(vm, &format!("sha256sum <{file}"));
        said.split(' ').next().unwrap().to_owned()
    };
    assert_eq!(digest(from, "/tmp/sent"), digest(to, "/tmp/got"));
    shell(to, "killall tail nc; rm -f /tmp/got");
    shell(from, "rm -f /tmp/sent");
}

/// iperf3 from one guest to the other and back.
fn both_ways(world: &World, what: &str) {
    let right = &world.group.vms[1].address;
    iperf::serve(&world.traffic, "right").unwrap();
    let run = |args: &str| {
        let seen = iperf::run(&world.traffic, "left", &format!("{right} {args}"));
        seen.unwrap_or_else(|e| {
            let script = "pidof iperf3; tail -20 /tmp/iperf3-server.log; free; dmesg | tail -20";
            let server = world.traffic.shell("right", script);
            panic!("{what}, {args}: {e:#}; its server: {server:?}")
        })
    };
    for args in ["-t 3", "-t 3 -R"] {
        let seen = run(args);
        eprintln!(
            "{what}, {args}: {:.2} Gbit/s, {} segments again",
            seen.bits_per_s / 1e9,
            seen.retransmits
        );
        assert!(seen.bytes > 1 << 20, "{what}, {args}: {seen:?}");
    }
    let seen = run("-t 2 -u -b 20M");
    assert!(
        seen.bytes > 1 << 20 && seen.lost == 0,
        "{what}, UDP: {seen:?}"
    );
}

fn set_mtu(world: &World, mtu: u32) {
    for vm in ["left", "right"] {
        let script = format!("ip link set eth0 mtu {mtu}");
        world.traffic.shell(vm, &script).unwrap();
    }
}

#[test]
fn big_frames_pass_whole_between_two_guests() {
    big_frames_pass_whole("offload", "");
}

#[test]
fn big_frames_pass_whole_in_packed_rings() {
    big_frames_pass_whole("offload-packed", PACKED);
}

fn big_frames_pass_whole(name: &str, nic: &str) {
    in_world(name, &group(nic), |world| {
        for vm in ["left", "right"] {
            for feature in [
                "rx-checksumming",
                "tx-checksumming",
                "tx-tcp-segmentation",
                "tx-tcp6-segmentation",
            ] {
                assert!(has(world, vm, feature), "{feature} of {vm}");
            }
        }
        for mtu in [1500, 9000] {
            set_mtu(world, mtu);
            let before = ports(world);
            bytes_arrive(world, "left", "right");
            bytes_arrive(world, "right", "left");
            both_ways(world, &format!("MTU {mtu}"));
            for port in ["left0", "right0"] {
                let mean = mean(world, &before, port);
                eprintln!("MTU {mtu}: {mean} bytes per frame to {port}");
                assert!(mean > 4000, "MTU {mtu}: {mean} bytes per frame to {port}");
            }
        }
        // Frames of 9,014 bytes as they are.
        for vm in ["left", "right"] {
            world
                .traffic
                .shell(vm, "ethtool -K eth0 tso off gso off gro off")
                .unwrap();
        }
        let before = ports(world);
        bytes_arrive(world, "left", "right");
        let mean = mean(world, &before, "right0");
        assert!((6000..9015).contains(&mean), "{mean} bytes per frame");
        nothing_is_wrong(world);
    });
}

/// The receiver takes neither partial checksums nor big frames: the switch completes the ones and cuts the others, and the
/// guest's kernel checks each.
#[test]
fn a_guest_without_offloads_gets_small_frames_with_right_checksums() {
    small_frames_have_right_checksums("offload-plain", group(""), PLAIN);
}

#[test]
fn a_guest_with_a_packed_ring_and_without_offloads_gets_small_frames_with_right_checksums() {
    let plain = format!("{PACKED},{PLAIN}");
    small_frames_have_right_checksums("offload-plain-packed", group(PACKED), &plain);
}

fn small_frames_have_right_checksums(name: &str, mut group: Group, plain: &str) {
    group.vms[1].nic = plain.to_owned();
    in_world(name, &group, |world| {
        assert!(has(world, "left", "tx-tcp-segmentation"));
        for (vm, takes) in [("left", true), ("right", false)] {
            assert_eq!(TAKES.map(|bit| agreed(world, vm, bit)), [takes; 3], "{vm}");
        }
        let before = ports(world);
        bytes_arrive(world, "left", "right");
        both_ways(world, "a receiver without offloads");
        let mean = mean(world, &before, "right0");
        assert!(mean > 4000, "{mean} bytes per frame came from left");
        let card = world.traffic.shell("right", "ethtool -S eth0").unwrap();
        let count = |key: &str| -> u64 {
            let line = card.lines().find_map(|line| line.trim().strip_prefix(key));
            line.unwrap().parse().unwrap()
        };
        let small = count("rx_queue_0_bytes: ") / count("rx_queue_0_packets: ");
        assert!(small < 1515, "{small} bytes per frame to right");
        nothing_is_wrong(world);
    });
}

/// What leaves by the uplink is complete on the wire: the network device of the host is told to leave nothing undone.
#[test]
fn what_leaves_by_the_uplink_has_right_checksums() {
    uplink_has_right_checksums("offload-uplink", "");
}

#[test]
fn what_leaves_packed_rings_by_the_uplink_has_right_checksums() {
    uplink_has_right_checksums("offload-uplink-packed", PACKED);
}

fn uplink_has_right_checksums(name: &str, nic: &str) {
    in_world(name, &group(nic), |world| {
        let lab = &world.lab;
        lab.a.netns.no_offloads("up0").unwrap();
        let mut command = gangway_tests::lab::process::command_in(&lab.net.out, "iperf3");
        command.arg("-s");
        let log = lab.dir().join("iperf3-outside.log");
        let _server = Process::start("iperf3", command, &log).unwrap();
        for (mtu, tag) in [(1500, "1500"), (9000, "9000")] {
            set_mtu(world, mtu);
            for (netns, devices) in [
                (&lab.net.a, &["up0"][..]),
                (&lab.net.fab, &["a", "b", "out", "br0"]),
                (&lab.net.out, &["eth0"]),
            ] {
                for device in devices {
                    netns
                        .ip(&format!("link set dev {device} mtu {mtu}"))
                        .unwrap();
                }
            }
            let before = ports(world);
            let left = &world.group.vms[0].address;
            for (what, args) in [("tcp", ""), ("udp", "-u -b 20M -l 1400")] {
                let file = lab.dir().join(format!("{what}-{tag}.pcap"));
                let filter = format!("src host {left} and {what}");
                let capture = Capture::start(&lab.net.out, "eth0", &filter, 5000, &file).unwrap();
                let sent = iperf::run(&world.traffic, "left", &format!("{OUTSIDE} -t 2 {args}"));
                let (sent, seen) = (sent.unwrap(), capture.stop().unwrap());
                eprintln!("MTU {mtu}, {what}: {sent:?}, {seen:?}");
                assert_eq!(seen.wrong, Vec::<String>::new());
                assert!(seen.tcp + seen.udp > 500, "{seen:?}");
                assert!(seen.longest <= mtu as usize + 14, "{seen:?}");
                if what == "tcp" {
                    assert_eq!(seen.longest, mtu as usize + 14);
                }
            }
            // It was the host that cut them.
            let mean = mean(world, &before, "uplink");
            assert!(mean > 4000, "{mean} bytes per frame to the uplink");
            let back = iperf::run(&world.traffic, "left", &format!("{OUTSIDE} -t 2 -R")).unwrap();
            assert!(back.bytes > 1 << 20, "{back:?}");
        }
        nothing_is_wrong(world);
    });
}
