//! A few of the faults of `make chaos`: docs/reliability.md has the rule and the table.

use gangway_tests::chaos::run::Stage;
use gangway_tests::chaos::{Wish, cases};
use gangway_tests::lab::demo::Ports;
use std::path::{Path, PathBuf};

fn logs(name: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(name)
}

/// One behind the other in one world, which each leaves as it was; after a guest's own crash the case is run once more.
fn all_green(name: &str, wishes: &[&str]) {
    all_green_with(name, wishes, Ports::VhostUser, "");
}

/// With these ports, and properties of the network cards.
fn all_green_with(name: &str, wishes: &[&str], ports: Ports, nic: &str) {
    let mut stage = Some(Stage::with(None, &logs(name), ports, nic).unwrap());
    let steps = stage.as_ref().unwrap().steps().unwrap();
    let wishes: Vec<Wish> = wishes.iter().map(|w| w.parse().unwrap()).collect();
    for case in cases(&wishes, &steps).unwrap() {
        for again in [true, false] {
            let used = stage.take();
            let mut used =
                used.unwrap_or_else(|| Stage::with(Some(&case), &logs(name), ports, nic).unwrap());
            let row = used.run(&case, &steps).unwrap();
            let crashed = used.crashed();
            if row.leaves_all_as_it_was() {
                stage = Some(used);
            }
            if row.wrong.is_empty() {
                break;
            }
            assert!(again && !crashed.is_empty(), "{row:#?}\n{crashed:?}");
        }
    }
}

#[test]
fn faults_before_the_point_of_no_return_put_everything_back_and_lose_nothing() {
    all_green(
        "chaos",
        &["stop fail", "restore fail", "seal kill-coordinator"],
    );
}

#[test]
fn a_switch_that_goes_under_running_vms_loses_nothing() {
    all_green(
        "chaos-switch",
        &[
            "no-migration kill-source-switch",
            "no-migration restart-source-switch",
            "precopy kill-source-switch",
        ],
    );
}

#[test]
fn a_switch_that_goes_under_packed_rings_loses_nothing() {
    all_green_with(
        "chaos-packed",
        &[
            "no-migration kill-source-switch",
            "no-migration restart-source-switch",
            "precopy kill-source-switch",
        ],
        Ports::VhostUser,
        "packed=on",
    );
}

/// What they send without a switch waits in kept sockets (lab_taps), and what a hold has accepted in its spool.
#[test]
fn a_switch_that_goes_under_taps_loses_no_frame_of_a_hold() {
    all_green_with("chaos-taps", &["seal kill-source-switch"], Ports::Tap, "");
}

#[test]
fn a_vm_that_dies_behind_the_commit_takes_nobody_with_it() {
    all_green("chaos-vm", &["commit kill-target-qemu"]);
}
