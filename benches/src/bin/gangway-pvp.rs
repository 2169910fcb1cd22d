//! `gangway-pvp`: frames from one VM to another through a switch, ours beside OVS-DPDK.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Parser;
use gangway_benches::cli::{NullGuest, Where};
use gangway_benches::frames::Pattern;
use gangway_benches::pvp::{Plan, measure};
use gangway_benches::ring::Layout;
use gangway_benches::{plot, report};

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
    /// Cells, as JSON; the table goes beside it as .md, all windows as -windows.json.
    #[arg(long, default_value = "target/bench/pvp.json")]
    out: PathBuf,
    /// Ports; each even one sends to the next.
    #[arg(long, default_value_t = 2)]
    ports: usize,
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
            let results = measure(&Plan {
                common: args.place.common()?,
                frames: args.frames,
                rings: args.rings,
                pairs: args.pairs,
                ports: args.ports,
                habits: args.guest.habits()?,
                pattern: Pattern::One,
            })?;
            report::save_windows(&args.out, &results.windows)?;
            (&args.out, report::cells(&results))
        }
    };
    let table = report::markdown(&cells);
    report::save(
        out,
        args.place.render.is_none(),
        &cells,
        &table,
        &plot::pvp(&cells)?,
    )
    .context("the results")?;
    print!("{table}");
    Ok(())
}
