//! A's switch is killed under running VMs whose ports are TAPs, and comes again after 200 ms, as by its supervisor.
//!
//! The devices stay, and QEMU keeps them: what waited in one for its VM is read. What a VM sends meanwhile, and what comes in at the
//! uplink, waits in sockets of which the keeper has copies (ADR-0039). At most a burst of a device is lost, which the switch had received
//! and not forwarded; and nobody is flooded with what was known.

use gangway_tests::lab::demo::Ports;
use gangway_tests::lab::group::Group;
use gangway_tests::lab::moved::World;
use gangway_tests::lab::once_more_after_a_crash;
use gangway_tests::lab::traffic::Flow;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

const RESTART: Duration = Duration::from_millis(200);
/// What a switch receives from a device at once.
const BURST: u64 = 32;

/// Of a device: what the kernel says in /sys/class/net.
fn told(world: &World, device: &str, what: &str) -> u64 {
    let line = format!("cat /sys/class/net/{device}/{what}");
    let text = world.lab.a.netns.run(&line).unwrap();
    text.trim().parse().unwrap()
}

/// That are in the file of the FDB (docs/formats/fdb.md).
fn addresses(file: &Path) -> Option<usize> {
    let bytes = std::fs::read(file).ok()?;
    let count = bytes.get(48..52)?.try_into().ok()?;
    usize::try_from(u32::from_le_bytes(count)).ok()
}

fn devices(world: &World) -> Vec<String> {
    let config = world.config(&world.lab.a);
    let named = config.split("device = \"").skip(1);
    let names = named.filter_map(|rest| rest.split('"').next());
    names.filter(|d| *d != "up0").map(str::to_owned).collect()
}

fn since(before: &[Flow], after: &[Flow]) -> Vec<Flow> {
    let was = |name: &str| before.iter().find(|f| f.name == name);
    let new = |f: &Flow| {
        let was = was(&f.name).cloned().unwrap_or_default();
        Flow {
            sent: f.sent - was.sent,
            received: f.received - was.received,
            lost: f.lost.saturating_sub(was.lost),
            duplicated: f.duplicated - was.duplicated,
            reordered: f.reordered - was.reordered,
            corrupted: f.corrupted - was.corrupted,
            ..f.clone()
        }
    };
    after.iter().map(new).collect()
}

fn killed() {
    let logs = Path::new(env!("CARGO_TARGET_TMPDIR")).join("taps");
    let group = Group::roomy();
    let mut world = World::new(&group, Ports::Tap, &logs).unwrap();
    world.traffic.be_patient();
    world.traffic.start().unwrap();
    thread::sleep(Duration::from_secs(2));
    // All VMs, and who talks to them from outside: it is written once a second, more rarely on a slow disk.
    let file = world.lab.a.dir.join("fdb");
    let until = Instant::now() + Duration::from_secs(60);
    while addresses(&file).is_none_or(|n| n <= group.vms.len()) {
        let log = world.lab.a.dir.join("switch.log");
        assert!(
            Instant::now() < until,
            "{:?}, {}",
            addresses(&file),
            log.display()
        );
        thread::sleep(Duration::from_millis(100));
    }
    let devices = devices(&world);
    assert_eq!(devices.len(), group.vms.len());
    let index = |w: &World| -> Vec<u64> { devices.iter().map(|d| told(w, d, "ifindex")).collect() };
    let before = index(&world);

    drop(world.lab.a.switch.take());
    let gone = Instant::now();
    let count = |w: &World, what: &str| -> Vec<u64> {
        let what = format!("statistics/{what}");
        devices.iter().map(|d| told(w, d, &what)).collect()
    };
    let sent = count(&world, "rx_packets");
    thread::sleep(RESTART);
    assert_eq!(index(&world), before, "no device goes with its switch");
    for d in &devices {
        assert_eq!(told(&world, d, "carrier"), 1, "{d}: QEMU keeps it");
    }
    // From QEMU.
    let meanwhile = count(&world, "rx_packets");
    let meanwhile: Vec<u64> = meanwhile
        .iter()
        .zip(&sent)
        .map(|(now, was)| now - was)
        .collect();
    eprintln!(
        "taken from VMs without a switch: {meanwhile:?}, rx_dropped {:?}, rx_nohandler {:?}, tx_dropped {:?}",
        count(&world, "rx_dropped"),
        count(&world, "rx_nohandler"),
        count(&world, "tx_dropped"),
    );
    assert!(meanwhile.iter().sum::<u64>() > 0, "VMs notice nothing");
    world.revive_switch(true).unwrap();
    let outage = gone.elapsed().as_secs_f64();
    thread::sleep(Duration::from_secs(2));

    let first = world.stop_traffic().unwrap();
    for f in &first {
        eprintln!(
            "{}: {} of {} lost, {} twice; no switch for {outage:.3} s",
            f.name, f.lost, f.sent, f.duplicated
        );
        let most = if f.name.starts_with("tcp") { 0 } else { BURST };
        assert!(f.lost <= most, "at most {most}: {f:#?}");
        assert_eq!(
            (f.duplicated, f.reordered, f.corrupted),
            (0, 0, 0),
            "{f:#?}"
        );
        assert!(f.errors.is_empty(), "{f:#?}");
        assert_eq!(f.digest_source, f.digest_target, "{f:#?}");
    }

    let log = std::fs::read_to_string(world.lab.a.dir.join("switch.log")).unwrap();
    let line = log
        .lines()
        .rfind(|l| l.contains("addresses are known from the last run"));
    let line = line.unwrap_or_else(|| panic!("{log}"));
    let words: Vec<&str> = line.split_whitespace().collect();
    let at = words.iter().position(|w| *w == "addresses").unwrap();
    let known: usize = words[at - 1].parse().unwrap();
    assert!(known > group.vms.len(), "{line}");

    world.traffic.start().unwrap();
    thread::sleep(Duration::from_secs(2));
    let second = world.stop_traffic().unwrap();
    for f in since(&first, &second) {
        assert!(f.is_clean(), "behind it: {f:#?}\n{}", world.drops());
    }
}

#[test]
fn vms_on_taps_outlive_their_switch_and_what_they_send_without_one_waits() {
    once_more_after_a_crash(killed);
}
