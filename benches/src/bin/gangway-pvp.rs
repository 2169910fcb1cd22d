//! `gangway-pvp`: frames from one VM to another through a switch, ours beside OVS-DPDK.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};
use gangway_benches::guest::Habits;
use gangway_benches::pvp::{Plan, measure};
use gangway_benches::report;
use gangway_benches::ring::Layout;

/// Measures how fast a switch moves frames between two vhost-user ports, on one CPU, beside OVS-DPDK in turn.
///
/// Needs root and two idle CPUs; takes hugepages and gives them back. Windows that something else has spoiled do not
/// count.
#[derive(Debug, Parser)]
struct Args {
    /// Frame sizes in bytes, without FCS.
    #[arg(long, value_delimiter = ',', default_value = "64,256,512,1024,1514")]
    frames: Vec<usize>,
    /// Ring layouts.
    #[arg(long, value_delimiter = ',', default_value = "split,packed")]
    rings: Vec<Layout>,
    /// Rounds; in each, every switch has its turn.
    #[arg(long, default_value_t = 5)]
    pairs: usize,
    /// What ours is measured beside.
    #[arg(long, value_enum, default_value = "ovs")]
    peer: Peer,
    /// Leave ours out.
    #[arg(long)]
    only_peer: bool,
    /// Cells, as JSON; the table goes beside it as .md, all windows as -windows.json.
    #[arg(long, default_value = "target/bench/pvp.json")]
    out: PathBuf,
    /// Our switch [default: beside this program].
    #[arg(long)]
    switch: Option<PathBuf>,
    /// CPU of the switches' workers.
    #[arg(long, default_value_t = 0)]
    worker_cpu: usize,
    /// CPU of the guest.
    #[arg(long, default_value_t = 1)]
    guest_cpu: usize,
    /// Ports; each even one sends to the next.
    #[arg(long, default_value_t = 2)]
    ports: usize,
    /// Seconds of a switch's turn: short, so that all turns of a round fall into one state of the machine.
    #[arg(long, default_value_t = 1.0)]
    turn_s: f64,
    /// Seconds of it that do not count.
    #[arg(long, default_value_t = 0.25)]
    skip_s: f64,
    /// Seconds to wait for other work on this machine to end, before each window.
    #[arg(long, default_value_t = 60.0)]
    quiet_s: f64,
    /// A ping-pong round trip of up to so many cycles is near.
    #[arg(long, default_value_t = 600)]
    near_max: u64,
    /// Entries of each ring.
    #[arg(long, default_value_t = 1024)]
    ring_size: u16,
    /// The guest takes used buffers back from this many on.
    #[arg(long, default_value_t = 128)]
    batch: u16,
    /// The guest does without mergeable receive buffers.
    #[arg(long)]
    no_mergeable: bool,
    /// `pause` instructions of the guest when it has nothing to do.
    #[arg(long, default_value_t = 40)]
    pauses: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Peer {
    Ovs,
    None,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let switch = match args.switch {
        Some(path) => path,
        None => std::env::current_exe()?.with_file_name("gangway-switch"),
    };
    anyhow::ensure!(
        args.skip_s >= 0.0 && args.turn_s > args.skip_s,
        "a turn must be longer than what is skipped"
    );
    anyhow::ensure!(
        args.ring_size.is_power_of_two() && args.ring_size >= 2 && args.batch >= 1,
        "a ring's size is a power of two, a batch at least 1"
    );
    let plan = Plan {
        frames: args.frames,
        rings: args.rings,
        pairs: args.pairs,
        with_ovs: args.peer == Peer::Ovs,
        with_gangway: !args.only_peer,
        switch,
        worker_cpu: args.worker_cpu,
        guest_cpu: args.guest_cpu,
        ports: args.ports,
        skip: Duration::from_secs_f64(args.skip_s),
        measure: Duration::from_secs_f64(args.turn_s - args.skip_s),
        quiet: Duration::from_secs_f64(args.quiet_s),
        near_max: args.near_max,
        habits: Habits {
            ring_size: args.ring_size,
            batch: args.batch.min(args.ring_size / 2),
            mergeable: !args.no_mergeable,
            pauses: args.pauses,
        },
    };
    let results = measure(&plan)?;
    let cells = report::cells(&results);
    report::write(&args.out, &cells, &results).context("the results")?;
    print!("{}", report::markdown(&cells));
    Ok(())
}
