//! `gangway-switch`: the userspace virtual switch of a host.
//!
//! See ARCHITECTURE.md for the nouns and the way of a frame.

pub mod addresses;
pub mod control;
pub mod datapath;
pub mod hold;
pub mod ledger;
pub mod mem;
pub mod port;
pub mod run;
pub mod said;
pub mod ship;
pub mod spool;
pub mod sys;
