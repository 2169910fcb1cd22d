//! `gangway host`.

use gangway_shared::api::{HostInfo, Reply, Request};
use serde_json::json;

use super::Context;
use crate::cli::{Format, HostCmd};
use crate::client::Switch;
use crate::exit::Failure;
use crate::table::{bytes, json, num, show, table};

pub async fn exec(cx: &Context, command: HostCmd) -> Result<(), Failure> {
    match command {
        HostCmd::List(o) => list(cx, o.output).await,
        HostCmd::Show(o) => one(cx, &o.host, o.output.output).await,
        HostCmd::Workers(c) => super::workers::exec(cx, c).await,
    }
}

async fn list(cx: &Context, format: Format) -> Result<(), Failure> {
    let hosts = cx.hosts()?;
    let mut rows: Vec<(String, String, Result<HostInfo, String>)> = Vec::new();
    for h in &hosts.hosts {
        let info = Switch::new(&hosts, h)?
            .host_show()
            .await
            .map_err(|e| e.to_string());
        rows.push((h.name.clone(), h.way.to_string(), info));
    }
    if format == Format::Json {
        let rows: Vec<_> = rows
            .iter()
            .map(|(name, at, info)| json!({"name": name, "at": at, "info": info.as_ref().ok(), "error": info.as_ref().err()}))
            .collect();
        return json(&rows);
    }
    let mut t = table(&[
        "host",
        "at",
        "state",
        "version",
        "ports",
        "vms",
        "spool used",
        "of",
    ]);
    for (name, at, info) in rows {
        match info {
            Ok(i) => t.add_row(vec![
                name.into(),
                at.into(),
                "up".into(),
                i.version.into(),
                num(i.ports),
                num(i.vms),
                num(bytes(i.spool_used_bytes)),
                num(bytes(i.spool_quota_bytes)),
            ]),
            Err(e) => t.add_row(vec![name, at, e]),
        };
    }
    show(&t);
    Ok(())
}

async fn one(cx: &Context, host: &str, format: Format) -> Result<(), Failure> {
    let switch = cx.switch(host)?;
    let (info, ports) = (switch.host_show().await?, switch.ports().await?);
    let holds = match switch.call(&Request::HoldList).await? {
        Reply::Holds(h) => h,
        other => return Err(switch.protocol("HoldList", &other).into()),
    };
    if format == Format::Json {
        return json(&json!({"host": info, "ports": ports, "holds": holds}));
    }
    anstream::println!(
        "host {} (gangway-switch {}), up {} s, {} workers, memory of VMs to {}, spool {} of {}",
        info.name,
        info.version,
        info.uptime_s,
        info.workers,
        if info.migration_address.is_empty() {
            "nowhere"
        } else {
            &info.migration_address
        },
        bytes(info.spool_used_bytes),
        bytes(info.spool_quota_bytes)
    );
    if let Some(why) = &info.spool_error {
        anstream::println!("held senders wait: {why}");
    }
    if let Some(which) = &info.holds_overdue {
        anstream::println!("holds overdue: {which}");
    }
    let mut t = table(&[
        "port",
        "kind",
        "vm",
        "mac",
        "state",
        "frames in",
        "frames out",
        "dropped",
        "error",
    ]);
    for p in ports {
        t.add_row(vec![
            p.name.into(),
            p.kind.into(),
            p.vm.unwrap_or_default().into(),
            p.mac.map(|m| m.to_string()).unwrap_or_default().into(),
            p.state.into(),
            num(p.rx_frames),
            num(p.tx_frames),
            num(p.drops.iter().map(|(_, n)| n).sum::<u64>()),
            p.error.unwrap_or_default().into(),
        ]);
    }
    show(&t);
    for h in holds {
        anstream::println!(
            "hold {} ({:?}, {:?}) of {} with {}",
            h.hold,
            h.role,
            h.state,
            h.vms.join(", "),
            h.peer
        );
    }
    Ok(())
}
