//! Everything in Gangway that reads foreign bytes, as functions that take any bytes: a guest's rings, a front-end's messages,
//! a peer's, what a crash or a bad disk leaves in a spool, what people write into files, what QEMU says.
//!
//! A target panics if a promise is broken; that nothing else happens is all it asks. `cargo test` runs each on the inputs in
//! `corpus/` (those that once reached something new, and those that once broke something), `make fuzz` looks for more.

mod backlog;
mod codec;
mod config;
pub mod corpus;
mod fdb;
mod input;
mod keeper;
mod ledger;
mod packet;
mod positions;
mod qmp;
mod record;
mod rings;
mod session;
mod shipment;
mod spool;
mod vhost_user;

/// Takes any bytes.
pub type Target = fn(&[u8]);

/// All of them, by name.
pub const TARGETS: [(&str, Target); 17] = [
    ("vhost_user", vhost_user::run),
    ("keeper", keeper::run),
    ("split_ring", rings::split),
    ("packed_ring", rings::packed),
    ("packet", packet::run),
    ("codec", codec::run),
    ("shipment", shipment::run),
    ("session", session::run),
    ("spool_scan", spool::scan),
    ("spool_open", spool::open),
    ("record", record::run),
    ("positions", positions::run),
    ("backlog", backlog::run),
    ("ledger", ledger::run),
    ("fdb", fdb::run),
    ("config", config::run),
    ("qmp", qmp::run),
];

/// The target of this name.
pub fn target(name: &str) -> Option<Target> {
    TARGETS.iter().find(|t| t.0 == name).map(|t| t.1)
}
