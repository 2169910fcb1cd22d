//! Puts a switch together from its configuration, and takes it apart again.

use std::collections::HashMap;
use std::sync::Arc;

use anyhow::{Context, Result};
use gangway_shared::config::HostConfig;
use gangway_shared::config::valid::{PortKind, TapRole};

use crate::datapath::Engine;
use crate::port::tap::{VmTap, open_endpoint};
use crate::port::vhost::{self, VhostConfig, VhostPort};
use crate::port::{Attach, packet};


/// What a running switch's ports need to be kept.
#[derive(Default)]
pub struct Ports {
    /// TAPs of VMs, by port index.
    pub taps: HashMap<usize, Arc<VmTap>>,
    vhost: Vec<VhostPort>,
}

impl Ports {
    /// Opens every port. A vhost-user port waits for its VM for as long as it takes; an uplink or a TAP that cannot be
    /// opened is an error of the configuration or of the host, and nothing starts.
    pub fn open(cfg: &HostConfig, engine: &Arc<Engine>) -> Result<Ports> {
        let mut ports = Ports::default();
        for (slot, p) in cfg.ports.iter().enumerate() {
            let opened = match &p.kind {
                PortKind::VhostUser { socket, server } => {
                    let c = VhostConfig { name: p.name.clone(), slot, socket: socket.clone(), server: *server };
                    ports.vhost.push(vhost::spawn(c, engine.clone()));
                    continue;
                }
                PortKind::Uplink { device } => packet::open(device).map(|o| (o.rx, o.tx)),
                PortKind::Tap { device, role: TapRole::Endpoint } => open_endpoint(device).map(|o| (o.rx, o.tx)),
                PortKind::Tap { device, role: TapRole::Vm } => {
                    let tap = VmTap::create(device).with_context(|| format!("port {}", p.name))?;
                    let queues = tap.queues();
                    ports.taps.insert(slot, tap);
                    queues.map(|o| (o.rx, o.tx))
                }
            };
            let (rx, tx) = opened.with_context(|| format!("port {}", p.name))?;
            engine.set_tx(slot, Some(tx));
            engine.attach_rx(slot, 0, rx);
        }
        Ok(ports)
    }

    /// Ends the ports' threads. TAPs stay: a VM may still have them.
    pub fn close(self) {
        for v in self.vhost {
            v.stop();
        }
    }
}
