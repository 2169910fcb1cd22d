//! Measurements beside peers, on the same machine, in turn.
//!
//! - [`guest`]: the null guest: vhost-user front-ends that keep a switch's rings full and touch what arrives
//! - [`ring`]: the driver's side of split and packed rings
//! - [`front`]: the vhost-user handshake of a front-end
//! - [`pingpong`]: how far the two CPUs are apart at the moment
//! - [`peer`]: the switches that are measured: ours, OVS-DPDK
//! - [`pvp`]: cells, windows, retries; [`report`]: JSON and Markdown
//! - [`host`]: hugepages, processes, folders, all given back
//! - [`sys`]: the one module with `unsafe`
//!
//! Invariant: nothing outside of [`sys`] is unsafe; nothing that was started or reserved outlives a run, also when it fails.
#![deny(unsafe_code)]

pub mod front;
pub mod guest;
pub mod host;
pub mod peer;
pub mod pingpong;
pub mod pvp;
pub mod report;
pub mod ring;
pub mod sys;
