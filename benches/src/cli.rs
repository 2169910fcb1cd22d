//! The options that all programs here have.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, ensure};
use clap::{Args, ValueEnum};

use crate::guest::Habits;
use crate::rig::Common;

/// Where, beside what, and how long.
#[derive(Debug, Args)]
pub struct Where {
    /// What ours is measured beside.
    #[arg(long, value_enum, default_value = "ovs")]
    pub peer: Peer,
    /// Leave ours out.
    #[arg(long)]
    pub only_peer: bool,
    /// Our switch [default: beside this program].
    #[arg(long)]
    pub switch: Option<PathBuf>,
    /// CPU of the switches' workers.
    #[arg(long, default_value_t = 0)]
    pub worker_cpu: usize,
    /// CPU of the guest.
    #[arg(long, default_value_t = 1)]
    pub guest_cpu: usize,
    /// Seconds of a switch's turn: short, so that all turns of a round fall into one state of the machine.
    #[arg(long, default_value_t = 1.0)]
    pub turn_s: f64,
    /// Seconds of it that do not count.
    #[arg(long, default_value_t = 0.25)]
    pub skip_s: f64,
    /// Seconds to wait for other work on this machine to end, before each window.
    #[arg(long, default_value_t = 60.0)]
    pub quiet_s: f64,
    /// A ping-pong round trip of up to so many cycles is near.
    #[arg(long, default_value_t = 600)]
    pub near_max: u64,
    /// Measure nothing: read the cells of an earlier run from this file, and make table and picture of them again, beside it.
    #[arg(long, value_name = "FILE")]
    pub render: Option<PathBuf>,
}

/// See [`Where::peer`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Peer {
    /// OVS-DPDK.
    Ovs,
    /// Nothing.
    None,
}

impl Where {
    /// Checked.
    pub fn common(&self) -> Result<Common> {
        ensure!(
            self.skip_s >= 0.0 && self.turn_s > self.skip_s,
            "a turn must be longer than what is skipped"
        );
        let switch = match &self.switch {
            Some(path) => path.clone(),
            None => std::env::current_exe()?.with_file_name("gangway-switch"),
        };
        Ok(Common {
            switch,
            with_ovs: self.peer == Peer::Ovs,
            with_gangway: !self.only_peer,
            worker_cpu: self.worker_cpu,
            guest_cpu: self.guest_cpu,
            skip: Duration::from_secs_f64(self.skip_s),
            measure: Duration::from_secs_f64(self.turn_s - self.skip_s),
            quiet: Duration::from_secs_f64(self.quiet_s),
            near_max: self.near_max,
        })
    }
}

/// How the null guest behaves.
#[derive(Debug, Args)]
pub struct NullGuest {
    /// Entries of each ring.
    #[arg(long, default_value_t = 1024)]
    pub ring_size: u16,
    /// The guest takes used buffers back from this many on.
    #[arg(long, default_value_t = 128)]
    pub batch: u16,
    /// The guest does without mergeable receive buffers.
    #[arg(long)]
    pub no_mergeable: bool,
    /// `pause` instructions of the guest when it has nothing to do.
    #[arg(long, default_value_t = 40)]
    pub pauses: u32,
}

impl NullGuest {
    /// Checked.
    pub fn habits(&self) -> Result<Habits> {
        ensure!(
            self.ring_size.is_power_of_two() && self.ring_size >= 2 && self.batch >= 1,
            "a ring's size is a power of two, a batch at least 1"
        );
        Ok(Habits {
            ring_size: self.ring_size,
            batch: self.batch.min(self.ring_size / 2),
            mergeable: !self.no_mergeable,
            pauses: self.pauses,
            full: true,
            gather: false,
        })
    }
}
