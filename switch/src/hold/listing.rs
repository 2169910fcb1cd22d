//! Listings: the host, its ports, links and addresses.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use gangway_shared::api::{FdbInfo, HostInfo, LinkInfo, PortInfo, QueueInfo};

use super::Host;
use crate::datapath::engine::{Mode, Port};
use crate::datapath::stats::{DROP_NAMES, link_total, port_total};

/// [`gangway_shared::api::Request::HostShow`].
pub(super) fn host_info(
    host: &Host,
    uptime: Duration,
    left: Option<String>,
    holds_overdue: Option<String>,
) -> HostInfo {
    let shared = host.engine.shared();
    let c = &host.config;
    HostInfo {
        name: c.name.clone(),
        version: env!("CARGO_PKG_VERSION").into(),
        uptime_s: uptime.as_secs(),
        workers: host.engine.workers().len() as u32,
        migration_address: c
            .migration_address
            .map(|a: IpAddr| a.to_string())
            .unwrap_or_default(),
        ports: shared.ports.len() as u32,
        vms: c.vms.len() as u32,
        fdb_entries: shared.fdb.list(shared.now_s()).len() as u32,
        spool_used_bytes: host.spool.used_bytes(),
        spool_quota_bytes: c.spool.quota_bytes,
        spool_error: host.spool.trouble(None).or(left),
        holds_overdue,
    }
}

/// [`gangway_shared::api::Request::PortList`].
pub(super) fn ports(host: &Host) -> Vec<PortInfo> {
    let shared = host.engine.shared();
    let books = shared.books.all();
    let ports = &shared.ports;
    let info = |(n, p): (usize, &Arc<Port>)| {
        let c = &p.counters;
        let names =
            DROP_NAMES
                .iter()
                .copied()
                .chain(["rx_malformed", "rx_ring_broken", "rx_overrun"]);
        let counts = c.drops.iter().chain(&c.rx_errors).map(|v| v.load(Relaxed));
        let total = port_total(&books, n);
        let used = total.queues.iter().rposition(|q| *q != (0, 0));
        let queue = |&(rx_frames, tx_frames): &(u64, u64)| QueueInfo {
            rx_frames,
            tx_frames,
        };
        let state = match p.mode() {
            Mode::Live if !p.is_up() => "down",
            m => m.name(),
        };
        PortInfo {
            name: p.name.clone(),
            kind: p.kind.into(),
            vm: p.vm.clone(),
            mac: host.mac_of(n),
            state: state.into(),
            error: p.error(),
            rx_frames: total.queues.iter().map(|q| q.0).sum(),
            rx_bytes: total.rx_bytes,
            tx_frames: total.queues.iter().map(|q| q.1).sum(),
            tx_bytes: total.tx_bytes,
            queues: total.queues[..used.map_or(0, |n| n + 1)]
                .iter()
                .map(queue)
                .collect(),
            drops: names
                .map(String::from)
                .zip(counts)
                .filter(|(_, v)| *v > 0)
                .collect(),
        }
    };
    ports.iter().enumerate().map(info).collect()
}

/// [`gangway_shared::api::Request::LinkList`].
pub(super) fn links(host: &Host) -> Vec<LinkInfo> {
    let shared = host.engine.shared();
    let books = shared.books.all();
    let now_s = shared.now_s();
    let mut all = Vec::new();
    for (f, from) in shared.ports.iter().enumerate() {
        for (t, to) in shared.ports.iter().enumerate() {
            let (sum, last_s) = link_total(&books, f, t);
            if sum.frames > 0 {
                all.push(LinkInfo {
                    from: from.name.clone(),
                    from_vm: from.vm.clone(),
                    to: to.name.clone(),
                    to_vm: to.vm.clone(),
                    frames: sum.frames,
                    bytes: sum.bytes,
                    payload_bytes: sum.payload,
                    idle_ms: u64::from(now_s.saturating_sub(last_s)) * 1000,
                });
            }
        }
    }
    all
}

/// [`gangway_shared::api::Request::FdbList`].
pub(super) fn fdb(host: &Host) -> Vec<FdbInfo> {
    let shared = host.engine.shared();
    let entries = shared.fdb.list(shared.now_s()).into_iter();
    let mut all: Vec<FdbInfo> = entries
        .map(|e| FdbInfo {
            mac: e.mac,
            port: shared.ports[e.port].name.clone(),
            fixed: e.fixed,
            age_s: e.age_s,
        })
        .collect();
    all.sort_by_key(|e| e.mac);
    all
}
