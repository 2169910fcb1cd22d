//! `gangway vm`.

use serde_json::json;

use super::Context;
use crate::cli::{Format, VmCmd};
use crate::client::Switch;
use crate::exit::{Code, Failure};
use crate::table::{json, show, table};

pub async fn exec(cx: &Context, command: VmCmd) -> Result<(), Failure> {
    let VmCmd::List { host, output } = command;
    let hosts = cx.hosts()?;
    let asked: Vec<_> = match &host {
        Some(name) => vec![hosts.find(name)?],
        None => hosts.hosts.iter().collect(),
    };
    let mut rows = Vec::new();
    let mut silent = Vec::new();
    for h in asked {
        match Switch::new(&hosts, h)?.vms().await {
            Ok(vms) => rows.extend(vms.into_iter().map(|v| (h.name.clone(), v))),
            Err(e) if host.is_some() => return Err(e.into()),
            Err(e) => silent.push(e.to_string()),
        }
    }
    if output.output == Format::Json {
        json(
            &rows
                .iter()
                .map(|(host, vm)| json!({"host": host, "vm": vm}))
                .collect::<Vec<_>>(),
        )?;
    } else {
        let mut t = table(&["vm", "host", "status", "ports", "can arrive"]);
        for (host, v) in rows {
            let arrive = if v.can_arrive { "yes" } else { "no" };
            t.add_row(vec![
                v.name,
                host,
                v.status,
                v.ports.join(","),
                arrive.to_owned(),
            ]);
        }
        show(&t);
    }
    match silent.is_empty() {
        true => Ok(()),
        false => Err(Failure::new(Code::Unreachable, silent.join("; "))),
    }
}
