//! The data path: from a burst received to frames delivered, held or counted.
//!
//! A worker ([`worker`]) owns receive queues and everything that is decided about their frames: per pair of (receiving
//! port, destination port) a [`lane::Lane`] with its gate. `targets` says where a frame goes, `egress` sends it.
//! [`crew`] has the threads, [`seating`] says who owns what, [`steering`] which of the receiver's queues a frame takes
//! (ADR-0011). Control changes lanes only by [`engine`]'s batches, which each worker applies between two bursts and
//! acknowledges: that acknowledgement is the cut of a freeze.
//!
//! Invariant: nothing here logs, and nothing allocates per frame (a lane gets its backlog when it first
//! meets a full receiver).
//! Invariant: a frame is released to its sender only after it was delivered, committed to a spool, or counted.
//! Invariant: per lane, frames leave in the order in which they came (ADR-0001).

pub mod backlog;
pub mod crew;
mod egress;
pub mod engine;
pub mod fdb;
pub mod flow;
pub mod hash;
pub mod lane;
pub mod parse;
pub mod reading;
pub mod seating;
pub mod shelf;
pub mod stats;
pub mod steering;
mod stuck;
mod targets;
#[cfg(test)]
pub(crate) mod tests;
pub mod worker;

pub use engine::Engine;
