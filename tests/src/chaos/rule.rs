//! PURE: what a fault may cost, and what came of it.
//!
//! | fault | what it may cost |
//! |---|---|
//! | every one | no frame, none twice, none out of order; the migration is over: all VMs run at B, or all at A |
//! | a switch is killed | of what comes in at a device, a burst that it had received and not forwarded, if the network reaches the VMs by it; the rest waits in the device's socket. Between VMs nothing is lost; of each flow a burst may arrive twice |
//! | the same, and VMs are on TAPs | also of what the VMs sent a burst each: it comes in at devices |
//! | a QEMU is killed that is the VM at that time | this VM, and what it sends and gets. The others lose nothing and go on |
//! | held for 20 s and delivered at once | nothing; what a guest's own kernel had no room for at its sockets is told apart, by that kernel's counters |
//! | a QEMU is killed that is not (A's when B's has all of it, B's before the commit) | nothing |
//!
//! Who changes the rule, what [`judge`] makes of a case or what the run asks besides, raises [`VERSION`]: rows of an older one count as missing.

use std::collections::BTreeMap;

use super::Fault;
use crate::lab::traffic::Flow;
use serde::{Deserialize, Serialize};

/// Of the rule. Rows that do not say have 0.
pub const VERSION: u32 = 1;

/// A switch that is killed may have delivered at most one burst of each lane that it had not yet given back.
pub const BURST: u64 = 32;

/// How it ended, as `gangway status` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ending {
    /// On B.
    Moved,
    /// On A.
    RolledBack,
    /// Neither, after all that a user can do.
    Open,
}

/// What the case's traffic came to, over all flows that are judged.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sum {
    /// Sent.
    pub sent: u64,
    /// Not arrived.
    pub lost: u64,
    /// Not arrived, and not accepted: a killed switch had received it from a device.
    pub unheard: u64,
    /// Arrived at the VM, whose kernel had no room for it at the socket, as its counters say.
    #[serde(default)]
    pub no_room: u64,
    /// Arrived twice.
    pub duplicated: u64,
    /// Arrived late.
    pub reordered: u64,
    /// Arrived damaged.
    pub corrupted: u64,
    /// Flows that are not judged: the killed VM's own.
    pub gone: u64,
}

/// The circumstances.
#[derive(Clone, Debug)]
pub struct Scene<'a> {
    /// What was done.
    pub fault: Fault,
    /// The VM that died with its QEMU.
    pub dead: Option<&'a str>,
    /// The network reaches the VMs by the switch that goes: see [`serves`].
    pub serves: bool,
    /// VMs on TAPs spoke to that switch: see [`mutes`].
    pub mutes: bool,
    /// Datagrams that each VM's kernel has dropped at its sockets.
    pub no_room: BTreeMap<String, u64>,
}

impl Scene<'_> {
    fn killed(&self) -> bool {
        matches!(
            self.fault,
            Fault::KillSourceSwitch | Fault::KillTargetSwitch
        )
    }

    /// How much of a flow may have died with the switch that had received it.
    fn unheard(&self, flow: &str) -> u64 {
        let comes_in = match flow.split_once(' ') {
            Some(("outside", rest)) => rest.starts_with("udp") && self.serves,
            Some(("udp", _)) => self.mutes,
            _ => false,
        };
        if comes_in && self.killed() { BURST } else { 0 }
    }
}

/// Whether the switch that goes is the one by which the network reaches the VMs. `at` and the others: places in the table. B's VMs speak from
/// behind `activate` on; behind `announce` all know that they are there.
pub fn serves(fault: Fault, at: usize, activate: usize, announce: usize) -> bool {
    match fault {
        Fault::KillSourceSwitch => at <= announce,
        Fault::RestartSourceSwitch => true,
        Fault::KillTargetSwitch => at > activate,
        _ => false,
    }
}

/// Whether VMs on TAPs speak to the switch that goes: A's do until they are stopped, B's from behind `activate` on.
pub fn mutes(fault: Fault, at: usize, stop: usize, activate: usize) -> bool {
    match fault {
        Fault::KillSourceSwitch => at <= stop,
        Fault::RestartSourceSwitch => true,
        Fault::KillTargetSwitch => at > activate,
        _ => false,
    }
}

/// Whether a flow depends on the VM: as an end, or as a stream through it.
fn of_dead(flow: &Flow, dead: &str) -> bool {
    // The chain's streams hang together: what breaks at its end is felt up to its first VM.
    flow.name.contains(dead) || flow.name.starts_with("tcp ")
}

/// Adds up, and says what is against the rule. `before`: the same flows when the case began.
pub fn judge(scene: &Scene, before: &[Flow], after: &[Flow]) -> (Sum, Vec<String>) {
    let (mut sum, mut wrong) = (Sum::default(), Vec::new());
    let mut no_room = scene.no_room.clone();
    for flow in after {
        if scene.dead.is_some_and(|dead| of_dead(flow, dead)) {
            sum.gone += 1;
            continue;
        }
        let was = before.iter().find(|f| f.name == flow.name);
        let was = was.cloned().unwrap_or_default();
        let mut new = Flow {
            name: flow.name.clone(),
            lost: flow.lost - was.lost.min(flow.lost),
            ..Flow::default()
        };
        let unheard = new.lost.min(scene.unheard(&flow.name));
        sum.unheard += unheard;
        new.lost -= unheard;
        sum.no_room += new.excuse(&mut no_room);
        let lost = new.lost;
        let duplicated = flow.duplicated - was.duplicated.min(flow.duplicated);
        let reordered = flow.reordered - was.reordered.min(flow.reordered);
        let corrupted = flow.corrupted - was.corrupted.min(flow.corrupted);
        let sent = flow.sent - was.sent.min(flow.sent);
        sum.sent += sent;
        sum.lost += lost;
        sum.duplicated += duplicated;
        sum.reordered += reordered;
        sum.corrupted += corrupted;
        let twice = if scene.killed() { BURST } else { 0 };
        for (what, n) in [
            ("lost", lost),
            ("twice", duplicated.saturating_sub(twice)),
            ("out of order", reordered),
            ("damaged", corrupted),
        ] {
            if n > 0 {
                wrong.push(format!("{}: {n} of {sent} {what}", flow.name));
            }
        }
        if !flow.errors.is_empty() {
            wrong.push(format!("{}: {}", flow.name, flow.errors.join("; ")));
        } else if flow.digest_source != flow.digest_target {
            wrong.push(format!("{}: digests differ", flow.name));
        }
        if sent == 0 && lost == 0 {
            wrong.push(format!("{}: nothing was sent", flow.name));
        }
    }
    (sum, wrong)
}

/// The only way that it may end, if there is only one. `at` and the others: places in the table; B's copy is whole from
/// behind `switchover` on, there is no way back from behind `commit` on.
pub fn must_end(fault: Fault, at: usize, switchover: usize, commit: usize) -> Option<Ending> {
    match fault {
        Fault::KillSourceQemu if at < switchover => Some(Ending::RolledBack),
        Fault::KillSourceQemu => Some(Ending::Moved),
        _ if at > commit => Some(Ending::Moved),
        Fault::KillTargetQemu if at < commit => Some(Ending::RolledBack),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flow(name: &str, sent: u64, lost: u64) -> Flow {
        Flow {
            name: name.to_owned(),
            sent,
            received: sent - lost,
            lost,
            ..Flow::default()
        }
    }

    fn scene(fault: Fault) -> Scene<'static> {
        Scene {
            fault,
            dead: None,
            serves: serves(fault, 5, 4, 6),
            mutes: false,
            no_room: BTreeMap::new(),
        }
    }

    #[test]
    fn what_a_guests_kernel_says_that_it_has_dropped_is_told_apart_and_nothing_more() {
        let mut scene = scene(Fault::CutLong);
        scene.no_room = [("b", 30), ("a", 5)]
            .map(|(vm, n)| (vm.to_owned(), n))
            .into();
        let after = [
            flow("outside udp echo a", 1000, 5),
            flow("outside udp echo b", 1000, 20),
            flow("udp a->b", 1000, 11),
        ];
        let (sum, wrong) = judge(&scene, &[], &after);
        assert_eq!((sum.no_room, sum.lost), (35, 1));
        assert_eq!(wrong, ["udp a->b: 1 of 1000 lost"]);
    }

    #[test]
    fn a_lost_frame_is_a_red_row() {
        let after = [flow("udp a->b", 1000, 1)];
        let (sum, wrong) = judge(&scene(Fault::KillCoordinator), &[], &after);
        assert_eq!((sum.sent, sum.lost), (1000, 1));
        assert_eq!(wrong, ["udp a->b: 1 of 1000 lost"]);
    }

    #[test]
    fn only_what_a_case_has_cost_counts() {
        let before = [flow("udp a->b", 1000, 1)];
        let after = [flow("udp a->b", 1500, 1)];
        let (sum, wrong) = judge(&scene(Fault::CutShort), &before, &after);
        assert_eq!((sum.sent, sum.lost, wrong.len()), (500, 0, 0));
    }

    #[test]
    fn what_a_killed_switch_had_from_outside_is_told_apart_and_bounded() {
        let killed = scene(Fault::KillSourceSwitch);
        let after = [flow("outside udp echo a", 1000, 30), flow("udp a->b", 9, 0)];
        let (sum, wrong) = judge(&killed, &[], &after);
        assert_eq!((sum.unheard, sum.lost, wrong.len()), (30, 0, 0));
        let after = [flow("outside udp echo a", 1000, 40), flow("udp a->b", 9, 1)];
        let (sum, wrong) = judge(&killed, &[], &after);
        assert_eq!((sum.unheard, sum.lost, wrong.len()), (32, 9, 2));
        // One that is stopped first forwards what it has.
        let stopped = scene(Fault::RestartSourceSwitch);
        assert!(stopped.serves);
        let (sum, wrong) = judge(&stopped, &[], &after);
        assert_eq!((sum.unheard, sum.lost, wrong.len()), (0, 41, 2));
    }

    #[test]
    fn what_comes_while_another_hosts_switch_is_gone_is_heard() {
        let mut scene = scene(Fault::KillTargetSwitch);
        scene.serves = false;
        let (sum, wrong) = judge(&scene, &[], &[flow("outside udp echo a", 1000, 1)]);
        assert_eq!((sum.unheard, sum.lost, wrong.len()), (0, 1, 1));
        // In the table: activate is step 1, announce step 2; its place is twice that, and one more behind it.
        let serves = |fault, at| serves(fault, at, 2, 4);
        let served = |fault| (0..8).map(|at| serves(fault, at)).collect::<Vec<_>>();
        let (y, n) = (true, false);
        assert_eq!(served(Fault::KillSourceSwitch), [y, y, y, y, y, n, n, n]);
        assert_eq!(served(Fault::KillTargetSwitch), [n, n, n, y, y, y, y, y]);
        assert_eq!(served(Fault::CutLong), [n; 8]);
        let mutes = |fault| {
            (0..6)
                .map(|at| super::mutes(fault, at, 2, 4))
                .collect::<Vec<_>>()
        };
        assert_eq!(
            mutes(Fault::KillSourceSwitch),
            [y, y, y, n, n, n],
            "they stand still"
        );
        assert_eq!(mutes(Fault::KillTargetSwitch), [n, n, n, n, n, y]);
    }

    #[test]
    fn what_a_killed_switch_had_from_vms_on_taps_is_told_apart_and_bounded() {
        let mut scene = scene(Fault::KillSourceSwitch);
        let after = [flow("udp a->b", 1000, 33), flow("tcp a->b", 1000, 1)];
        assert_eq!(judge(&scene, &[], &after).0.lost, 34);
        scene.mutes = true;
        let (sum, wrong) = judge(&scene, &[], &after);
        assert_eq!((sum.unheard, sum.lost, wrong.len()), (32, 2, 2));
    }

    #[test]
    fn a_burst_may_come_twice_only_from_a_switch_that_was_killed() {
        let mut twice = flow("udp a->b", 1000, 0);
        twice.duplicated = BURST;
        let judged = |fault, flow: &Flow| judge(&scene(fault), &[], std::slice::from_ref(flow)).1;
        assert!(judged(Fault::KillTargetSwitch, &twice).is_empty());
        assert_eq!(judged(Fault::KillCoordinator, &twice).len(), 1);
        twice.duplicated += 1;
        assert_eq!(judged(Fault::KillTargetSwitch, &twice).len(), 1);
    }

    #[test]
    fn a_killed_vm_takes_its_own_flows_and_no_others() {
        let mut scene = scene(Fault::KillSourceQemu);
        scene.dead = Some("c");
        let after = [flow("udp b->c", 10, 9), flow("udp a->b", 10, 1)];
        let (sum, wrong) = judge(&scene, &[], &after);
        assert_eq!((sum.gone, sum.lost, wrong.len()), (1, 1, 1));
    }

    #[test]
    fn a_flow_that_was_silent_proves_nothing() {
        let (_, wrong) = judge(&scene(Fault::Fail), &[], &[flow("udp a->b", 0, 0)]);
        assert_eq!(wrong.len(), 1);
    }
}
