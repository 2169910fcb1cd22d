//! `gangway-testpmd`: frames between two DPDK guests through a switch, ours beside OVS-DPDK.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Parser;
use gangway_benches::cli::Where;
use gangway_benches::ring::Layout;
use gangway_benches::testpmd::{self, Plan, Shape, cells, measure};
use gangway_benches::{plot, report};

/// Measures how fast a switch moves frames between two virtio-user ports of dpdk-testpmd, in all shapes of rings that it
/// has, beside OVS-DPDK in turn.
///
/// Needs root and two idle CPUs; takes hugepages and gives them back. Windows that something else has spoiled do not
/// count.
#[derive(Debug, Parser)]
struct Args {
    /// Frame sizes in bytes, without FCS.
    #[arg(long, value_delimiter = ',', default_value = "64,1514")]
    frames: Vec<usize>,
    /// Ring layouts; each in order or not, mergeable or not, vectorized or not.
    #[arg(long, value_delimiter = ',', default_value = "split,packed")]
    rings: Vec<Layout>,
    /// Of these shapes the ones with these numbers only, from 0 on: ring by ring.
    #[arg(long, value_delimiter = ',')]
    shapes: Option<Vec<usize>>,
    /// Rounds; in each, every switch has its turn.
    #[arg(long, default_value_t = 3)]
    pairs: usize,
    /// Bursts of 32 frames under way in each direction.
    #[arg(long, default_value_t = 8)]
    bursts: u32,
    /// Cells, as JSON; table (.md) and picture (.svg) go beside it, all windows as -windows.json.
    #[arg(long, default_value = "target/bench/testpmd.json")]
    out: PathBuf,
    #[command(flatten)]
    place: Where,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let (out, cells) = match &args.place.render {
        Some(path) => (path, report::load(path)?),
        None => {
            let all = Shape::all(&args.rings);
            let shapes = match args.shapes {
                Some(wanted) => wanted
                    .into_iter()
                    .filter_map(|i| all.get(i).copied())
                    .collect(),
                None => all,
            };
            let plan = Plan {
                common: args.place.common()?,
                frames: args.frames,
                shapes,
                pairs: args.pairs,
                bursts: args.bursts,
            };
            let results = measure(&plan)?;
            report::save_windows(&args.out, &results.windows)?;
            (&args.out, cells(&plan, &results))
        }
    };
    let table = testpmd::markdown(&cells);
    report::save(
        out,
        args.place.render.is_none(),
        &cells,
        &table,
        &plot::testpmd(&cells)?,
    )
    .context("the results")?;
    print!("{table}");
    Ok(())
}
