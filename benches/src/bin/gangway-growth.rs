//! `gangway-growth`: how a switch's rate changes with ports, flows and addresses, ours beside OVS-DPDK.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use gangway_benches::cli::{NullGuest, Where};
use gangway_benches::growth::{self, Axis, Plan, cells, measure};
use gangway_benches::ring::Layout;
use gangway_benches::{plot, report};

/// Measures how a switch's rate changes with the number of ports, flows and addresses, beside OVS-DPDK in turn.
///
/// Needs root and two idle CPUs; takes hugepages and gives them back. Windows that something else has spoiled do not
/// count.
#[derive(Debug, Parser)]
struct Args {
    /// What grows.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "ports,flows,addresses,workers"
    )]
    axes: Vec<Axis>,
    /// Numbers of ports; half of them send, each to one of the others.
    #[arg(long, value_delimiter = ',', default_value = "2,4,8,16,32,64")]
    ports: Vec<usize>,
    /// Numbers of flows.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "1,10,100,1000,10000,100000,1000000"
    )]
    flows: Vec<u32>,
    /// Numbers of addresses, in pairs.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "2,100,10000,100000,1000000"
    )]
    addresses: Vec<u32>,
    /// Numbers of workers, 1 or 2; guests share their CPUs.
    #[arg(long, value_delimiter = ',', default_value = "1,2")]
    workers: Vec<usize>,
    /// Frame size in bytes, without FCS.
    #[arg(long, default_value_t = 64)]
    frame: usize,
    /// Ring layout.
    #[arg(long, default_value = "split")]
    ring: Layout,
    /// Rounds; in each, every switch has its turn.
    #[arg(long, default_value_t = 3)]
    pairs: usize,
    /// Cells, as JSON; table (.md) and picture (.svg) go beside it, all windows as -windows.json.
    #[arg(long, default_value = "target/bench/growth.json")]
    out: PathBuf,
    #[command(flatten)]
    place: Where,
    #[command(flatten)]
    guest: NullGuest,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let (out, cells) = match &args.place.render {
        Some(path) => (path, report::load(path)?),
        None => {
            let ports_max = 64;
            ensure!(
                args.ports
                    .iter()
                    .all(|p| (2..=ports_max).contains(p) && p.is_multiple_of(2)),
                "ports come in pairs, {ports_max} at most"
            );
            let has = |axis| args.axes.contains(&axis);
            let none_unless = |axis, v: Vec<u32>| if has(axis) { v } else { Vec::new() };
            let results = measure(&Plan {
                common: args.place.common()?,
                ring: args.ring,
                frame: args.frame,
                pairs: args.pairs,
                habits: args.guest.habits()?,
                ports: if has(Axis::Ports) {
                    args.ports
                } else {
                    Vec::new()
                },
                flows: none_unless(Axis::Flows, args.flows),
                addresses: none_unless(Axis::Addresses, args.addresses),
                workers: if has(Axis::Workers) {
                    args.workers
                } else {
                    Vec::new()
                },
            })?;
            report::save_windows(&args.out, &results.points)?;
            (&args.out, cells(&results))
        }
    };
    let table = growth::markdown(&cells);
    report::save(
        out,
        args.place.render.is_none(),
        &cells,
        &table,
        &plot::growth(&cells)?,
    )
    .context("the results")?;
    print!("{table}");
    Ok(())
}
