//! Holds: what a freeze, a shipment, a commit and an abort do to lanes, spool and ports (ADR-0001).
//!
//! [`machine`] says what may follow what (pure); [`source`] and [`target`] carry it out on the engine; [`manager`]
//! answers the control requests, those about workers by `workers`.
//!
//! Invariant: a request that is refused has changed nothing.
//! Invariant: nothing here runs on a worker.

mod book;
pub mod machine;
pub mod manager;
pub mod source;
pub mod target;
#[cfg(test)]
mod tests;
mod workers;

pub use manager::{Manager, Vms};

use gangway_shared::api::{Refusal, RefusalCode};

/// The `from` of the lane that carries what a paused VM's TAP queue still held: older than everything else for it.
pub const READ_BACK: &str = "(tap-queue)";

pub(crate) fn refuse(code: RefusalCode, message: impl Into<String>) -> Refusal {
    Refusal {
        code,
        message: message.into(),
    }
}
