//! From what VMs send each other to the order in which they move.
//!
//! Per pair of VMs the *net* payload decides the direction: the sender is the less dependent one and moves first. VMs
//! that depend on each other in a circle are condensed (strongly connected components) and ordered by net flow inside.
//!
//! Invariant: pure; the same links give the same order, in whatever sequence they come.

pub mod draw;

use std::collections::{BTreeMap, BTreeSet};

use gangway_shared::api::LinkInfo;
use petgraph::graphmap::DiGraphMap;
use serde::{Deserialize, Serialize};

/// What two VMs of the group exchanged. `from` is the net sender.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    /// Sent more (or is first by name, if both sent the same).
    pub from: String,
    /// Received more.
    pub to: String,
    /// Payload bytes `from` to `to`.
    pub payload_bytes: u64,
    /// Payload bytes back.
    pub back_bytes: u64,
    /// The difference: what the order is made of. 0: no direction.
    pub net_bytes: u64,
}

/// The order of a group, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// From the least dependent, sending VM to the most dependent, receiving VM.
    pub order: Vec<String>,
    /// The links between VMs of the group, by name.
    pub links: Vec<Link>,
    /// Circles: VMs that depend on each other; each in its place in the order.
    pub cycles: Vec<Vec<String>>,
    /// VMs without a link to another VM of the group.
    pub unconnected: Vec<String>,
    /// One sentence per VM, in order.
    pub why: Vec<String>,
    /// True if the operator gave the order.
    pub overridden: bool,
}

/// Links between VMs of `vms`, both directions of a pair as one.
pub fn links(vms: &BTreeSet<&str>, infos: &[LinkInfo]) -> Vec<Link> {
    let mut sent: BTreeMap<(&str, &str), u64> = BTreeMap::new();
    for l in infos {
        if let (Some(a), Some(b)) = (l.from_vm.as_deref(), l.to_vm.as_deref())
            && a != b
            && l.frames > 0
            && vms.contains(a)
            && vms.contains(b)
        {
            let bytes = sent.entry((a, b)).or_default();
            *bytes = bytes.saturating_add(l.payload_bytes);
        }
    }
    let pairs: BTreeSet<(&str, &str)> = sent
        .keys()
        .map(|&(a, b)| if a < b { (a, b) } else { (b, a) })
        .collect();
    let amount = |a, b| sent.get(&(a, b)).copied().unwrap_or(0);
    pairs
        .into_iter()
        .map(|(a, b)| {
            let (there, back) = (amount(a, b), amount(b, a));
            let (from, to) = if there >= back { (a, b) } else { (b, a) };
            Link {
                from: from.to_owned(),
                to: to.to_owned(),
                payload_bytes: there.max(back),
                back_bytes: there.min(back),
                net_bytes: there.abs_diff(back),
            }
        })
        .collect()
}

/// The order of `vms`.
pub fn plan(vms: &BTreeSet<&str>, infos: &[LinkInfo]) -> Plan {
    let links = links(vms, infos);
    let mut graph: DiGraphMap<&str, u64> = DiGraphMap::new();
    for vm in vms {
        graph.add_node(vm);
    }
    for l in links.iter().filter(|l| l.net_bytes > 0) {
        graph.add_edge(&l.from, &l.to, l.net_bytes);
    }
    // What a VM sends more than it receives, counting only edges that `within` accepts.
    let net = |vm: &str, within: &dyn Fn(&str) -> bool| -> i128 {
        graph
            .all_edges()
            .map(
                |(a, b, w)| match (a == vm && within(b), b == vm && within(a)) {
                    (true, _) => i128::from(*w),
                    (_, true) => -i128::from(*w),
                    _ => 0,
                },
            )
            .sum()
    };

    let mut components: Vec<Vec<&str>> = petgraph::algo::tarjan_scc(&graph);
    for c in &mut components {
        let members: BTreeSet<&str> = c.iter().copied().collect();
        c.sort_by_key(|vm| {
            (
                std::cmp::Reverse(net(vm, &|other| members.contains(other))),
                *vm,
            )
        });
    }
    // Kahn's algorithm over the components; of those that are free, the one that sends most goes first.
    components.sort_by_key(|c| {
        (
            std::cmp::Reverse(c.iter().map(|vm| net(vm, &|_| true)).sum::<i128>()),
            c[0],
        )
    });
    let mut order: Vec<&str> = Vec::new();
    let mut cycles = Vec::new();
    while !components.is_empty() {
        let free = components
            .iter()
            .position(|c| {
                graph
                    .all_edges()
                    .all(|(a, b, _)| !c.contains(&b) || c.contains(&a) || order.contains(&a))
            })
            // The condensation of a graph has no circle, so one is always free.
            .unwrap_or(0);
        let c = components.remove(free);
        if c.len() > 1 {
            cycles.push(c.iter().map(|&s| s.to_owned()).collect());
        }
        order.extend(c);
    }
    let order: Vec<String> = order.into_iter().map(str::to_owned).collect();
    let unconnected = order
        .iter()
        .filter(|vm| !links.iter().any(|l| l.from == **vm || l.to == **vm))
        .cloned()
        .collect();
    let mut plan = Plan {
        order,
        links,
        cycles,
        unconnected,
        why: Vec::new(),
        overridden: false,
    };
    plan.why = why(&plan);
    plan
}

impl Plan {
    /// The operator's order in place of ours; it must name exactly the group's VMs.
    pub fn overridden(mut self, order: &[String]) -> Result<Plan, String> {
        let (mut ours, mut theirs) = (self.order.clone(), order.to_vec());
        ours.sort();
        theirs.sort();
        if ours != theirs {
            return Err(format!(
                "--order must name each VM of the group once ({}), but it is {}",
                self.order.join(","),
                order.join(",")
            ));
        }
        self.order = order.to_vec();
        self.overridden = true;
        self.why = why(&self);
        Ok(self)
    }
}

fn why(plan: &Plan) -> Vec<String> {
    let place = |vm: &str| {
        plan.order
            .iter()
            .position(|o| o == vm)
            .unwrap_or(usize::MAX)
    };
    plan.order
        .iter()
        .enumerate()
        .map(|(i, vm)| {
            let mut parts = Vec::new();
            for l in plan.links.iter().filter(|l| l.from == *vm || l.to == *vm) {
                let other = if l.from == *vm { &l.to } else { &l.from };
                let verb = match (l.net_bytes, l.from == *vm) {
                    (0, _) => "exchanges as much as it gets with".to_owned(),
                    (n, true) => format!("sends {n} bytes net to"),
                    (n, false) => format!("receives {n} bytes net from"),
                };
                let against = l.net_bytes > 0 && place(&l.from) > place(&l.to);
                let note = if against { " (against this order)" } else { "" };
                parts.push(format!("{verb} {other}{note}"));
            }
            if parts.is_empty() {
                parts.push("has no link with another VM of the group".to_owned());
            }
            if let Some(c) = plan.cycles.iter().find(|c| c.contains(vm)) {
                parts.push(format!("part of the circle {}", c.join(", ")));
            }
            format!("{}. {vm}: {}", i + 1, parts.join("; "))
        })
        .collect()
}

#[cfg(test)]
mod tests;
