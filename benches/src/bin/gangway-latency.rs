//! `gangway-latency`: round trips through a switch under load, ours beside OVS-DPDK.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use gangway_benches::cli::{NullGuest, Where};
use gangway_benches::latency::{self, Plan, cells, measure};
use gangway_benches::ring::Layout;
use gangway_benches::{plot, report};

/// Measures how long frames are on their way to a station and back, at parts of the load that each switch carries, beside
/// OVS-DPDK in turn.
///
/// Needs root and two idle CPUs; takes hugepages and gives them back. Windows that something else has spoiled do not
/// count.
#[derive(Debug, Parser)]
struct Args {
    /// Frame sizes in bytes, without FCS.
    #[arg(long, value_delimiter = ',', default_value = "64,1514")]
    frames: Vec<usize>,
    /// Loads in per cent of what each switch carries.
    #[arg(long, value_delimiter = ',', default_value = "10,50,90")]
    loads: Vec<f64>,
    /// Ring layout.
    #[arg(long, default_value = "split")]
    ring: Layout,
    /// Rounds; in each, every switch has its turn.
    #[arg(long, default_value_t = 5)]
    pairs: usize,
    /// Cells, as JSON; table (.md) and picture (.svg) go beside it, all windows as -windows.json.
    #[arg(long, default_value = "target/bench/latency.json")]
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
            ensure!(
                args.loads.iter().all(|l| *l > 0.0 && *l <= 100.0),
                "a load is more than 0 and at most 100 per cent"
            );
            let mut habits = args.guest.habits()?;
            habits.full = false;
            let plan = Plan {
                common: args.place.common()?,
                ring: args.ring,
                frames: args.frames,
                loads: args.loads.iter().map(|l| l / 100.0).collect(),
                pairs: args.pairs,
                habits,
            };
            let windows = measure(&plan)?;
            report::save_windows(&args.out, &windows)?;
            (&args.out, cells(&plan, &windows))
        }
    };
    let table = latency::markdown(&cells);
    report::save(
        out,
        args.place.render.is_none(),
        &cells,
        &table,
        &plot::latency(&cells)?,
    )
    .context("the results")?;
    print!("{table}");
    Ok(())
}
