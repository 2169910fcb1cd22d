//! Measurements beside peers, on the same machine, in turn.
//!
//! - [`rig`]: the switches of a run and the window that one of them is measured in
//! - [`pvp`]: a null guest between two ports, ring layouts and frame sizes
//! - [`bound`]: what no switch can be faster than: a device that only moves frames
//! - [`testpmd`]: DPDK's driver and testpmd instead, all ring shapes that virtio-user has
//! - [`growth`]: more ports, flows, addresses
//! - [`tap`]: TCP over TAPs, beside a Linux bridge
//! - [`hold`]: into the spool and out of it; what gates cost
//! - [`latency`]: round trips under load; [`idle`]: what a switch costs that has nothing to do
//! - [`guest`]: the null guest: vhost-user front-ends that keep a switch's rings full and touch what arrives
//! - [`frames`]: its frames, and what they differ in
//! - [`ring`]: the driver's side of split and packed rings; [`front`]: the vhost-user handshake of a front-end
//! - [`peer`]: the switches that are measured: ours, OVS-DPDK
//! - [`control`]: what a coordinator says to a switch
//! - [`pingpong`]: how far the two CPUs are apart at the moment
//! - [`page`]: the document with all tables
//! - [`report`]: figures, JSON and Markdown; [`plot`]: pictures; [`hist`]: histograms
//! - [`host`]: hugepages, processes, folders, all given back; [`cli`]: options
//! - [`sys`]: the one module with `unsafe`
//!
//! Invariant: nothing outside of [`sys`] is unsafe; nothing that was started or reserved outlives a run, also when it fails.
#![deny(unsafe_code)]

pub mod bound;
pub mod cli;
pub mod control;
pub mod frames;
pub mod front;
pub mod growth;
pub mod guest;
pub mod hist;
pub mod hold;
pub mod host;
pub mod idle;
pub mod latency;
pub mod page;
pub mod peer;
pub mod pingpong;
pub mod plot;
pub mod pvp;
pub mod report;
pub mod rig;
pub mod ring;
pub mod ship;
pub mod sys;
pub mod tap;
pub mod testpmd;
pub mod workers;
