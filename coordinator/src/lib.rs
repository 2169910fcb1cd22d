//! The coordinator: finds the VMs that talk to each other, works out their order, and moves them together.

pub mod cli;
pub mod client;
pub mod cmd;
pub mod exit;
pub mod graph;
pub mod hosts;
pub mod ledger;
pub mod migration;
pub mod nearest;
pub mod pki;
pub mod progress;
pub mod table;
pub mod vmm;
