//! Holds: what a freeze, a shipment, a commit and an abort do to lanes, spool and ports (ADR-0001).
//!
//! [`machine`] says what may follow what (pure); [`source`] and [`target`] carry it out on the engine; [`manager`]
//! answers the control requests, those about workers by `workers`. [`record`] is what a hold leaves to the next run of the
//! switch, which takes it up by `restart`.
//!
//! Invariant: a request that is refused has changed nothing.
//! Invariant: nothing here runs on a worker.

mod book;
mod dead;
mod entry;
mod host;
mod listing;
pub mod machine;
pub mod manager;
pub mod record;
mod restart;
pub mod source;
pub mod target;
#[cfg(test)]
mod tests;
mod workers;

pub use host::{Host, Vms};
pub use manager::Manager;
pub use restart::{Left, workers_of};

use gangway_shared::api::{Refusal, RefusalCode};

/// The `from` of the lane that carries what a paused VM's TAP queue still held: older than everything else for it.
pub const READ_BACK: &str = "(tap-queue)";

pub(crate) fn refuse(code: RefusalCode, message: impl Into<String>) -> Refusal {
    Refusal {
        code,
        message: message.into(),
    }
}
