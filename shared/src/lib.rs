//! What crosses a process in Gangway, and nothing else: identities, the control API, shipments,
//! configuration files, and trust.
//!
//! Invariant: no threads, no tokio, no sockets and no clock in here.

pub mod api;
pub mod codec;
pub mod config;
pub mod id;
pub mod ledger;
pub mod pki;
pub mod positions;
pub mod record;
pub mod ship;
