//! `gangway discover`: the method's first step.

use serde_json::json;

use super::Context;
use super::group::active;
use crate::cli::{Format, OfHost};
use crate::exit::Failure;
use crate::graph;
use crate::table::{bytes, json, num, show, table};

pub async fn exec(cx: &Context, c: OfHost) -> Result<(), Failure> {
    let switch = cx.switch(&c.host)?;
    let vms = switch.vms().await?;
    let running = active(&vms);
    let links = graph::links(&running, &switch.links().await?);
    let partners = |vm: &str| -> Vec<String> {
        links
            .iter()
            .filter_map(|l| match (l.from == vm, l.to == vm) {
                (true, _) => Some(l.to.clone()),
                (_, true) => Some(l.from.clone()),
                _ => None,
            })
            .collect()
    };
    let found: Vec<(&str, Vec<String>)> = running
        .iter()
        .map(|vm| (*vm, partners(vm)))
        .filter(|(_, p)| !p.is_empty())
        .collect();
    if c.output.output == Format::Json {
        let vms: Vec<_> = found
            .iter()
            .map(|(vm, p)| json!({"vm": vm, "connected_with": p}))
            .collect();
        return json(&json!({"host": c.host, "vms": vms, "links": links}));
    }
    if found.is_empty() {
        anstream::println!(
            "none of the {} running VMs of host '{}' has sent to another one of them yet",
            running.len(),
            c.host
        );
        return Ok(());
    }
    let mut t = table(&["vm", "sent net", "connected with"]);
    for (vm, partners) in found {
        let net: i128 = links
            .iter()
            .map(|l| i128::from(l.net_bytes) * (i128::from(l.from == vm) - i128::from(l.to == vm)))
            .sum();
        let size = bytes(u64::try_from(net.abs()).unwrap_or(u64::MAX));
        let net = if net < 0 { format!("-{size}") } else { size };
        t.add_row(vec![vm.into(), num(net), partners.join(", ").into()]);
    }
    show(&t);
    Ok(())
}
