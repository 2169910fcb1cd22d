//! Puts a switch together from its configuration, and takes it apart again.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use gangway_shared::config::valid::{PortKind, TapRole};
use gangway_shared::config::{HostConfig, WORKERS_MAX};
use gangway_shared::pki::Identity;

use crate::control::quic::Quic;
use crate::control::{Handler, ShipAcceptor, Vmm};
use crate::datapath::Engine;
use crate::hold::{Host, Left, Manager, workers_of};
use crate::port::Attach;
use crate::port::packet::{self, Fault, Health, Opened};
use crate::port::tap::{VmTap, open_endpoint};
use crate::port::vhost::{self, VhostConfig, VhostPort};
use crate::ship::Acceptor;
use crate::spool::Spool;

/// How often devices are looked at.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// A running switch, without its control server.
pub struct Switch {
    engine: Arc<Engine>,
    manager: Arc<Manager>,
    acceptor: Arc<Acceptor>,
    vhost: Vec<VhostPort>,
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
        let mut taps = HashMap::new();
        let mut opened = Vec::new();
        for (slot, p) in cfg.ports.iter().enumerate() {
            if let Some(device) = open_device(&p.kind, slot, &mut taps).transpose() {
                opened.push((slot, device.with_context(|| format!("port {}", p.name))?));
            }
        }
        let acceptor = Arc::new(Acceptor::new());
        let dialer = match quic {
            Some(q) => Some((q.endpoint.clone(), q.ship_client()?)),
            None => None,
        };
        let manager = Arc::new(Manager::new(Host {
            engine: engine.clone(),
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
        let mut devices = Vec::new();
        for (slot, Opened { rx, tx, health }) in opened {
            engine.set_tx(slot, vec![(0, tx)]);
            engine.attach_rx(slot, 0, rx);
            devices.push((slot, health));
        }
        let mut vhost = Vec::new();
        for (slot, p) in cfg.ports.iter().enumerate() {
            if let PortKind::VhostUser { socket, server } = &p.kind {
                let c = VhostConfig {
                    name: p.name.clone(),
                    slot,
                    socket: socket.clone(),
                    server: *server,
                };
                let port = vhost::spawn(c, engine.clone());
                vhost.push(port.with_context(|| format!("port {}", p.name))?);
            }
        }
        let watch = tokio::spawn(watch(engine.clone(), devices));
        Ok(Switch {
            engine,
            manager,
            acceptor,
            vhost,
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

    /// Detaches from VMs and devices. TAPs stay: a VM may still have them.
    pub fn stop(self) {
        self.watch.abort();
        for v in self.vhost {
            v.stop();
        }
        self.engine.stop();
    }
}

/// Evens out the workers' load, and tells the engine what is wrong with devices, when it changes. A device that is gone for good gives no frames any more:
/// its queue is detached.
async fn watch(engine: Arc<Engine>, devices: Vec<(usize, Arc<Health>)>) {
    let mut last = vec![None; devices.len()];
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        let even = engine.clone();
        // A panic there would be ours and is logged by the runtime.
        let _ = tokio::task::spawn_blocking(move || even.rebalance()).await;
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
            let queues = tap.queues()?;
            taps.insert(slot, tap);
            queues
        }
        PortKind::Uplink { device } => packet::open(device)?,
        PortKind::VhostUser { .. } => return Ok(None),
    }))
}
