//! Puts a switch together from its configuration, and takes it apart again.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result};
use gangway_shared::config::valid::{LedgerConfig, PortConfig, PortKind, TapRole};
use gangway_shared::config::{HostConfig, WORKERS_MAX};
use gangway_shared::pki::Identity;

use crate::addresses::{Addresses, Following};
use crate::control::quic::Quic;
use crate::control::{Handler, ShipAcceptor, Vmm};
use crate::datapath::Engine;
use crate::datapath::engine::Mode;
use crate::hold::{Host, Left, Manager, workers_of};
use crate::ledger::{Retirement, retire};
use crate::port::Attach;
use crate::port::kept::Kept;
use crate::port::packet::{self, Fault, Health, Opened};
use crate::port::tap::{VmTap, open_endpoint};
use crate::port::vhost::{self, VhostConfig, VhostPort};
use crate::ship::Acceptor;
use crate::spool::Spool;

/// How often devices are looked at.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// How often unused memory is given back, in looks.
const TRIM_EVERY: u32 = 20;

/// How long after the start senders wait for a VM that has not connected yet. QEMU tries again once a second.
const AWAIT_VMS: Duration = Duration::from_secs(5);

/// How long receivers may take for what waits for them when the switch stops.
const REST: Duration = Duration::from_secs(1);

/// The VMs that may have run on an earlier run of this switch, and connect again one by one: what the first of them send to
/// the others waits, as for a VM that is stopped for a move.
struct Awaited {
    engine: Arc<Engine>,
    ports: Vec<usize>,
    /// From the first look on: what is read at a start takes its time.
    until: Option<Instant>,
}

impl Awaited {
    fn new(engine: &Arc<Engine>, cfg: &HostConfig) -> Awaited {
        let shared = engine.shared();
        let is_vm = |(n, p): (usize, &PortConfig)| {
            let vhost = matches!(p.kind, PortKind::VhostUser { .. });
            (vhost && (p.vm.is_some() || cfg.keeper_dir.is_some())).then_some(n)
        };
        let ports: Vec<usize> = cfg.ports.iter().enumerate().filter_map(is_vm).collect();
        for &n in &ports {
            shared.ports[n].arm();
            // Not the network's, before it has said where it is. A hold says it of its own ports.
            if let (Some(mac), Mode::Live) = (shared.ports[n].mac, shared.ports[n].mode()) {
                shared.fdb.set(mac, n, true, shared.now_s());
            }
        }
        Awaited {
            engine: engine.clone(),
            ports,
            until: None,
        }
    }

    /// Those that have come, or have not in time, are not awaited any more.
    fn look(&mut self, now: Instant) {
        let ports = &self.engine.shared().ports;
        let until = *self.until.get_or_insert(now + AWAIT_VMS);
        self.ports.retain(|&n| {
            let wait = now < until && !ports[n].is_up();
            if !wait {
                // What has piled up meanwhile must not overflow anybody.
                ports[n].be_patient(self.engine.shared().now_s());
                ports[n].disarm();
            }
            wait
        });
    }
}

/// A running switch, without its control server.
pub struct Switch {
    engine: Arc<Engine>,
    manager: Arc<Manager>,
    acceptor: Arc<Acceptor>,
    vhost: Vec<VhostPort>,
    addresses: Following,
    watch: tokio::task::JoinHandle<()>,
}

/// Shipments go to the acceptor, each on a task of its own.
struct Shipments(Arc<Acceptor>);

impl ShipAcceptor for Shipments {
    fn accept(&self, conn: quinn::Connection, peer: Identity) {
        tokio::spawn(self.0.clone().accept(conn, peer.name));
    }
}

impl Switch {
    /// Opens the spool, starts the workers, opens every port. A vhost-user port waits for its VM for as long as it takes;
    /// a device that cannot be opened is an error, and nothing runs. To be called inside the runtime.
    pub fn start(cfg: &HostConfig, vmm: &Arc<Vmm>, quic: Option<&Quic>) -> Result<Switch> {
        let (spool, recovered) = Spool::open(&cfg.spool).context("the spool")?;
        let left = Left::read(&spool, recovered).context("the spool")?;
        let engine = start_engine(cfg, workers_of(&left)).context("cannot start the workers")?;
        let kept = Arc::new(Kept::new(cfg.keeper_dir.as_deref()));
        let mut taps = HashMap::new();
        let mut opened = Vec::new();
        for (slot, p) in cfg.ports.iter().enumerate() {
            if let Some(device) = open_device(&p.kind, slot, &mut taps, &kept).transpose() {
                opened.push((slot, device.with_context(|| format!("port {}", p.name))?));
            }
        }
        kept.done();
        let acceptor = Arc::new(Acceptor::new().context("cannot start the threads that ship")?);
        let dialer = match quic {
            Some(q) => Some((q.endpoint.clone(), q.ship_client()?)),
            None => None,
        };
        let addresses = Addresses::new(cfg, engine.shared().clone());
        let manager = Arc::new(Manager::new(Host {
            engine: engine.clone(),
            addresses: addresses.clone(),
            spool,
            acceptor: acceptor.clone(),
            dialer,
            runtime: tokio::runtime::Handle::current(),
            taps,
            vms: vmm.clone(),
            config: cfg.clone(),
        }));
        // Before the first frame comes in.
        manager.take_up(left);
        let mut awaited = Awaited::new(&engine, cfg);
        addresses.take_up();
        let addresses = addresses
            .follow()
            .context("cannot start the thread that keeps the FDB")?;
        let mut devices = Vec::new();
        let mut inputs = Vec::new();
        for (slot, Opened { rx, tx, health }) in opened {
            engine.set_tx(slot, vec![(0, tx)]);
            inputs.push((slot, rx));
            devices.push((slot, health));
        }
        // Receivers are there, or awaited; senders are not there yet.
        let frames = engine.take_up().context("the backlogs of an earlier run")?;
        if frames > 0 {
            tracing::info!(
                "{frames} frames waited for their receivers in an earlier run, and do again"
            );
        }
        for (slot, rx) in inputs {
            engine.attach_rx(slot, 0, rx);
        }
        let mut vhost = Vec::new();
        for (slot, p) in cfg.ports.iter().enumerate() {
            if let PortKind::VhostUser { socket, server } = &p.kind {
                // Behind a keeper we listen, whoever does on the VM's side.
                let kept = cfg.kept_socket(&p.name);
                let c = VhostConfig {
                    name: p.name.clone(),
                    slot,
                    server: *server || kept.is_some(),
                    positions: kept.as_deref().map(HostConfig::kept_positions),
                    socket: kept.unwrap_or_else(|| socket.clone()),
                };
                let port = vhost::spawn(c, engine.clone());
                vhost.push(port.with_context(|| format!("port {}", p.name))?);
            }
        }
        // They can connect from here on.
        awaited.look(Instant::now());
        let watch = tokio::spawn(watch(
            engine.clone(),
            manager.clone(),
            awaited,
            devices,
            kept,
            cfg.ledger.clone(),
        ));
        Ok(Switch {
            engine,
            manager,
            acceptor,
            vhost,
            addresses,
            watch,
        })
    }

    /// Answers what concerns ports, links and holds.
    pub fn handler(&self) -> Arc<dyn Handler> {
        self.manager.clone()
    }

    /// Takes what other switches ship.
    pub fn shipments(&self) -> Arc<dyn ShipAcceptor> {
        Arc::new(Shipments(self.acceptor.clone()))
    }

    /// Detaches from VMs and devices. TAPs stay: a VM may still have them. What was taken from a sender and not delivered yet goes to
    /// its receiver first: port by port it would find no one there.
    pub fn stop(self) {
        self.watch.abort();
        match self.engine.rest(REST) {
            Ok(true) => {}
            Ok(false) if self.engine.shared().shelf.is_some() => {
                tracing::info!(
                    "receivers do not take what waits for them; it is there for the next run"
                );
            }
            Ok(false) => tracing::warn!("receivers do not take what waits for them; it is lost"),
            Err(e) => tracing::warn!("{e}"),
        }
        // Or what waits for them would be dropped as for ports that are down, one by one as they go.
        self.engine.shared().ports.iter().for_each(|p| p.arm());
        for v in self.vhost {
            v.stop();
        }
        self.engine.stop();
        self.addresses.end();
    }
}

/// Evens out the workers' load, deletes old ledgers, and tells the engine what is wrong with devices, when it changes. A device that is
/// gone for good gives no frames any more: its queue is detached.
async fn watch(
    engine: Arc<Engine>,
    manager: Arc<Manager>,
    mut awaited: Awaited,
    devices: Vec<(usize, Arc<Health>)>,
    kept: Arc<Kept>,
    ledger: LedgerConfig,
) {
    let mut last = vec![None; devices.len()];
    let mut retirement = Retirement::default();
    let mut looks = 0u32;
    let mut asks: Option<tokio::task::JoinHandle<()>> = None;
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        awaited.look(Instant::now());
        if let Some(due) = retirement.due(Instant::now(), SystemTime::now()) {
            let cfg = ledger.clone();
            let old = tokio::task::spawn_blocking(move || retire(&cfg, due.clock)).await;
            match old {
                Ok(Ok(0)) => {}
                Ok(Ok(n)) => tracing::info!("{n} old files of the ledger were deleted"),
                Ok(Err(e)) => tracing::warn!("old ledgers stay: {e}"),
                // A panic there would be ours and is logged by the runtime.
                Err(_) => {}
            }
        }
        let holds = manager.clone();
        let even = engine.clone();
        looks = looks.wrapping_add(1);
        let both = move || {
            even.rebalance();
            if looks.is_multiple_of(TRIM_EVERY) {
                even.trim();
            }
            if let Some(shelf) = &even.shared().shelf {
                shelf.is_alive();
            }
        };
        // A panic there would be ours and is logged by the runtime.
        let _ = tokio::task::spawn_blocking(both).await;
        // A keeper that stands still must not keep the rest from being looked at.
        if asks.as_ref().is_none_or(|a| a.is_finished()) {
            let kept = kept.clone();
            asks = Some(tokio::task::spawn_blocking(move || kept.look()));
        }
        // It may write a record, or put a hold back.
        let _ = tokio::task::spawn_blocking(move || holds.look(Instant::now())).await;
        for ((slot, health), last) in devices.iter().zip(&mut last) {
            let fault = health.fault();
            if fault != *last {
                let (engine, slot) = (engine.clone(), *slot);
                let gone = fault == Some(Fault::Gone);
                let text = fault.map(|f| f.to_string());
                *last = fault;
                let tell = move || {
                    engine.port_error(slot, text);
                    if gone {
                        engine.detach_rx(slot, 0);
                    }
                };
                // A panic there would be ours and is logged by the runtime.
                let _ = tokio::task::spawn_blocking(tell).await;
            }
        }
    }
}

/// With as many workers as the configuration says, or as an open hold had.
fn start_engine(cfg: &HostConfig, at_least: usize) -> std::io::Result<Arc<Engine>> {
    if at_least <= cfg.workers.count {
        return Engine::start(cfg);
    }
    let at_least = at_least.min(WORKERS_MAX);
    tracing::info!("{at_least} workers: an open hold had so many");
    let mut more = cfg.clone();
    more.workers.count = at_least;
    Engine::start(&more)
}

/// None for a port that is no device.
fn open_device(
    kind: &PortKind,
    slot: usize,
    taps: &mut HashMap<usize, Arc<VmTap>>,
    kept: &Kept,
) -> Result<Option<Opened>> {
    Ok(Some(match kind {
        PortKind::Tap {
            device,
            role: TapRole::Endpoint,
        } => open_endpoint(device)?,
        PortKind::Tap {
            device,
            role: TapRole::Vm,
        } => {
            let tap = VmTap::create(device)?;
            let queues = tap.queues(kept)?;
            taps.insert(slot, tap);
            queues
        }
        PortKind::Uplink { device } => packet::open(device, kept)?,
        PortKind::VhostUser { .. } => return Ok(None),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use gangway_shared::id::MacAddr;

    use crate::datapath::tests::{config, eventually, frame, mac};
    use crate::port::memory::MemoryPort;

    /// Two runs of a whole switch, and what is written in between. The first one vanishes.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_learned_address_is_not_flooded_behind_a_crash() {
        let dir = tempfile::tempdir().unwrap();
        let mut cfg = config(&["a", "b", "c"], 1, dir.path().join("host"));
        for p in &mut cfg.ports {
            p.kind = PortKind::VhostUser {
                socket: dir.path().join(&p.name),
                server: true,
            };
        }
        let vmm = Vmm::new(&cfg);
        let plug = |switch: &Switch| {
            let ports = [(); 3].map(|()| MemoryPort::default());
            for (n, port) in ports.iter().enumerate() {
                let (rx, tx) = port.queues();
                switch.engine.set_tx(n, vec![(0, tx)]);
                switch.engine.attach_rx(n, 0, rx);
            }
            ports
        };
        let first = Switch::start(&cfg, &vmm, None).unwrap();
        let [_, b, c] = plug(&first);
        c.push(frame(9, mac(200), 1));
        eventually("it is flooded", || b.delivered_count() == 1);
        let file = cfg.state_dir.join(crate::addresses::FILE);
        let is_kept = || {
            let kept = std::fs::read(&file).ok();
            kept.is_some_and(|b| b.windows(6).any(|w| w == mac(9).0))
        };
        eventually("it is written", is_kept);
        let written = std::fs::read(&file).unwrap();
        tokio::task::block_in_place(|| first.stop());
        // As a crash leaves it.
        std::fs::write(&file, written).unwrap();

        let next = Switch::start(&cfg, &vmm, None).unwrap();
        let [a, b, c] = plug(&next);
        a.push(frame(1, mac(9), 2));
        eventually("it comes", || c.delivered_count() == 1);
        // Behind it in every lane.
        a.push(frame(1, MacAddr::BROADCAST, 3));
        eventually("all hear the next one", || {
            b.delivered_count() > 0 && c.delivered_count() == 2
        });
        assert_eq!(b.delivered_count(), 1, "only that one");
        tokio::task::block_in_place(|| next.stop());
    }

    /// `a` connects first and sends to `b`; then `b` comes. `c` never does.
    #[test]
    fn what_the_first_vm_sends_to_one_that_is_not_back_yet_waits() {
        let dir = tempfile::tempdir().unwrap();
        let mut cfg = config(&["a", "b", "c"], 1, dir.path().join("host"));
        for (n, p) in cfg.ports.iter_mut().enumerate() {
            p.vm = Some(p.name.clone());
            p.mac = Some(mac(n as u8 + 1));
        }
        let engine = Engine::start(&cfg).unwrap();
        let mut awaited = Awaited::new(&engine, &cfg);
        let ports = [
            MemoryPort::default(),
            MemoryPort::default(),
            MemoryPort::default(),
        ];
        let plug = |n: usize| {
            let (rx, tx) = ports[n].queues();
            engine.set_tx(n, vec![(0, tx)]);
            engine.attach_rx(n, 0, rx);
        };
        plug(0);
        for n in 1..=500 {
            ports[0].push(frame(1, mac(2), n));
        }
        eventually("they are taken", || ports[0].waiting() == 0);
        // However long the start took.
        let begin = Instant::now() + 2 * AWAIT_VMS;
        awaited.look(begin);
        plug(1);
        eventually("all are delivered", || ports[1].delivered_count() == 500);
        let numbers = ports[1].delivered();
        let numbers = numbers.iter().map(|f| f[20..24].to_vec());
        assert!(numbers.is_sorted());
        let armed = |n: usize| engine.shared().ports[n].armed();
        awaited.look(begin + AWAIT_VMS / 2);
        assert_eq!([armed(0), armed(1), armed(2)], [false, false, true]);
        awaited.look(begin + AWAIT_VMS);
        assert!(!armed(2), "it is not waited for any longer");
        engine.stop();
    }

    /// No hold ends here: what is too much goes by itself, oldest first. What is too old does an hour later, for a clock may jump.
    #[test]
    fn an_idle_host_deletes_its_old_ledgers() {
        let dir = tempfile::tempdir().unwrap();
        let mut cfg = config(&[], 1, dir.path().join("host"));
        cfg.state_dir = dir.path().join("state");
        cfg.ledger.dir = dir.path().join("ledger");
        cfg.ledger.keep_bytes = 150;
        std::fs::create_dir(&cfg.ledger.dir).unwrap();
        let file = |name: &str, days: u64| {
            let path = cfg.ledger.dir.join(name);
            std::fs::write(&path, [0; 100]).unwrap();
            let f = std::fs::File::options().write(true).open(&path).unwrap();
            f.set_modified(SystemTime::now() - Duration::from_secs(days * 86_400))
                .unwrap();
            path
        };
        let old = file("1-source.ledger", 2);
        let young = file("2-source.ledger", 1);
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let _inside = runtime.enter();
        let switch = Switch::start(&cfg, &Vmm::new(&cfg), None).unwrap();
        eventually("the old one is gone", || !old.exists());
        assert!(young.exists());
        switch.stop();
    }
}
