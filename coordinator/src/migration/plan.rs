//! What a migration was asked to do: the first record of its journal, enough to take it up after a crash.

use gangway_shared::api::{HoldOpen, IncomingPort, IncomingPrepare};
use gangway_shared::id::{HoldId, MacAddr};
use serde::{Deserialize, Serialize};

use super::steps::FreezeMode;
use crate::graph;

/// See the module.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Mission {
    /// The migration's and the hold's number.
    pub id: HoldId,
    /// Source host.
    pub from: String,
    /// Target host.
    pub to: String,
    /// `address:port` at which the target's switch takes shipments.
    pub target_address: String,
    /// The order, and why.
    pub plan: graph::Plan,
    /// The ports of the VMs.
    pub ports: Vec<PortOf>,
    /// When to freeze.
    pub freeze: FreezeMode,
    /// Bytes per second of the whole group's pre-copy.
    pub bandwidth: u64,
    /// Proof for the shipment, hexadecimal.
    pub ticket: String,
    /// How long the seal may take.
    pub seal_ms: u64,
    /// How long the source waits for the network.
    pub grace_ms: u64,
}

/// A port of a VM of the group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortOf {
    /// Its name on both hosts.
    pub name: String,
    /// Its VM.
    pub vm: String,
    /// Its address.
    pub mac: Option<MacAddr>,
}

impl Mission {
    /// The VMs in dependency order.
    pub fn vms(&self) -> &[String] {
        &self.plan.order
    }

    /// One VM's share of the bandwidth.
    pub fn share(&self) -> u64 {
        self.bandwidth / self.vms().len().max(1) as u64
    }

    fn secret(&self) -> [u8; 32] {
        let mut out = [0; 32];
        // A journal that was tampered with yields a ticket that the target refuses.
        let _ = hex::decode_to_slice(&self.ticket, &mut out);
        out
    }

    /// For the source.
    pub fn open(&self) -> HoldOpen {
        HoldOpen {
            hold: self.id,
            vms: self.vms().to_vec(),
            target_address: self.target_address.clone(),
            target_host: self.to.clone(),
            ticket: self.secret(),
        }
    }

    /// For the target.
    pub fn prepare(&self) -> IncomingPrepare {
        let port = |p: &PortOf| IncomingPort {
            name: p.name.clone(),
            vm: p.vm.clone(),
            mac: p.mac,
        };
        IncomingPrepare {
            hold: self.id,
            vms: self.vms().to_vec(),
            ports: self.ports.iter().map(port).collect(),
            source_host: self.from.clone(),
            ticket: self.secret(),
        }
    }
}
