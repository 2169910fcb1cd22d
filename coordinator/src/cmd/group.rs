//! Which VMs an argument means, and where they run.

use std::collections::BTreeSet;

use gangway_shared::api::VmInfo;

use crate::client::Switch;
use crate::exit::{Code, Failure};
use crate::graph::{self, Plan};
use crate::hosts::Hosts;
use crate::nearest::hint;

/// All active VMs with a link to another one.
pub const DISCOVER: &str = "@discover";

/// A group on its host.
pub struct Found {
    /// The host's switch.
    pub source: Switch,
    /// The order.
    pub plan: Plan,
}

/// The VMs that run.
pub fn active(vms: &[VmInfo]) -> BTreeSet<&str> {
    vms.iter()
        .filter(|v| v.status == "running")
        .map(|v| v.name.as_str())
        .collect()
}

/// Finds the group, on `from` or wherever its VMs run, and its order.
pub async fn find(
    hosts: &Hosts,
    group: &str,
    from: Option<&str>,
    order: Option<&[String]>,
) -> Result<Found, Failure> {
    let names = match hosts.groups.iter().find(|g| g.name == group) {
        _ if group == DISCOVER => None,
        Some(g) => Some(g.vms.clone()),
        None => Some(
            group
                .split(',')
                .map(|s| s.trim().to_owned())
                .collect::<Vec<_>>(),
        ),
    };
    if let Some(names) = &names {
        if names.iter().any(String::is_empty) {
            return Err(Failure::usage(format!(
                "'{group}' names no VM: write VM names with commas between them"
            )));
        }
        if let Some(twice) = names
            .iter()
            .enumerate()
            .find(|(i, n)| names[..*i].contains(n))
        {
            return Err(Failure::usage(format!(
                "VM '{}' is named twice in '{group}'",
                twice.1
            )));
        }
    }
    let (source, vms) = match (from, &names) {
        (Some(from), _) => {
            let s = Switch::new(hosts, hosts.find(from)?)?;
            let vms = s.vms().await?;
            (s, vms)
        }
        (None, Some(names)) => locate(hosts, names).await?,
        (None, None) => return Err(Failure::usage("@discover needs --from HOST: where to look")),
    };
    let links = source.links().await?;
    let running = active(&vms);
    let members: BTreeSet<&str> = match &names {
        Some(names) => {
            for n in names {
                if !vms.iter().any(|v| v.name == *n) {
                    let groups = hosts.groups.iter().map(|g| g.name.as_str());
                    let hint = hint(n, vms.iter().map(|v| v.name.as_str()).chain(groups));
                    return Err(Failure::usage(format!(
                        "host '{}' knows no VM (and there is no group) '{n}'{hint}",
                        source.host()
                    )));
                }
            }
            names.iter().map(String::as_str).collect()
        }
        None => {
            let all = graph::links(&running, &links);
            running
                .iter()
                .copied()
                .filter(|vm| all.iter().any(|l| l.from == *vm || l.to == *vm))
                .collect()
        }
    };
    if members.is_empty() {
        return Err(Failure::usage(format!(
            "no running VM of host '{}' has sent to another one yet; name the VMs",
            source.host()
        )));
    }
    let mut plan = graph::plan(&members, &links);
    if let Some(order) = order {
        plan = plan.overridden(order).map_err(Failure::usage)?;
    }
    Ok(Found { source, plan })
}

/// Asks all hosts.
async fn locate(hosts: &Hosts, names: &[String]) -> Result<(Switch, Vec<VmInfo>), Failure> {
    let mut silent = Vec::new();
    let mut known: BTreeSet<String> = BTreeSet::new();
    let mut home: Option<(Switch, Vec<VmInfo>)> = None;
    for host in &hosts.hosts {
        let switch = Switch::new(hosts, host)?;
        let vms = match switch.vms().await {
            Ok(v) => v,
            Err(e) => {
                silent.push(e.to_string());
                continue;
            }
        };
        known.extend(vms.iter().map(|v| v.name.clone()));
        let here: Vec<&String> = names
            .iter()
            .filter(|n| active(&vms).contains(n.as_str()))
            .collect();
        if here.is_empty() {
            continue;
        }
        if let Some((other, _)) = &home {
            return Err(Failure::usage(format!(
                "VM '{}' runs on host '{}', but others of the group run on '{}'; a group moves from one host",
                here[0],
                switch.host(),
                other.host()
            )));
        }
        home = Some((switch, vms));
    }
    home.ok_or_else(|| {
        match (
            names.iter().find(|n| !known.contains(*n)),
            silent.is_empty(),
        ) {
            (_, false) => Failure::new(
                Code::Unreachable,
                format!(
                    "the VMs run on no host that answers, and: {}",
                    silent.join("; ")
                ),
            ),
            (Some(n), true) => Failure::usage(format!(
                "no host knows a VM '{n}'{}",
                hint(n, known.iter().map(String::as_str))
            )),
            (None, true) => Failure::refused(format!(
                "none of {} runs anywhere; `gangway vm list` shows them",
                names.join(", ")
            )),
        }
    })
}
