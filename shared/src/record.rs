//! What a switch writes down of a hold when it is opened, so that its successor can take the hold up
//! (docs/formats/hold.md).

use wincode::{SchemaRead, SchemaWrite};

use crate::api::Role;
use crate::id::{HoldId, MacAddr};

/// The part that does not change.
#[derive(Debug, Clone, PartialEq, Eq, SchemaRead, SchemaWrite)]
pub struct HoldRecord {
    /// Which.
    pub hold: HoldId,
    /// Which end.
    pub role: Role,
    /// The VMs.
    pub vms: Vec<String>,
    /// The peer host, as in its certificate.
    pub peer: String,
    /// Source: where its switch listens, `address:port`. Target: empty.
    pub address: String,
    /// Shown by the shipment.
    pub ticket: [u8; 32],
    /// The group's ports on this host.
    pub ports: Vec<HeldPort>,
    /// Who had the lanes of each port.
    pub seats: Vec<HeldSeats>,
    /// Queues that were made at the opening.
    pub queues: u32,
}

/// A port of the group.
#[derive(Debug, Clone, PartialEq, Eq, SchemaRead, SchemaWrite)]
pub struct HeldPort {
    /// Its configured name.
    pub name: String,
    /// Its guest's address, if known.
    pub mac: Option<MacAddr>,
}

/// The workers of a port, in the order of its lanes' numbers.
#[derive(Debug, Clone, PartialEq, Eq, SchemaRead, SchemaWrite)]
pub struct HeldSeats {
    /// Its configured name.
    pub port: String,
    /// Numbers of workers; at least one.
    pub workers: Vec<u32>,
    /// Who served which queue.
    pub queues: Vec<HeldQueue>,
}

/// A receive queue and its worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, SchemaRead, SchemaWrite)]
pub struct HeldQueue {
    /// Of the port.
    pub queue: u16,
    /// Number of the worker.
    pub worker: u32,
}
