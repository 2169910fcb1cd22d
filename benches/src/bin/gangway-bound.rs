//! `gangway-bound`: what no switch can be faster than on this machine.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Parser;
use gangway_benches::bound::{self, Plan, measure};
use gangway_benches::cli::{NullGuest, Where};
use gangway_benches::{plot, report};

/// Measures a device that only moves frames between the rings of a null guest: no switch with a single copy can be faster.
///
/// Needs root and two idle CPUs; takes hugepages and gives them back.
#[derive(Debug, Parser)]
struct Args {
    /// Frame sizes in bytes, without FCS.
    #[arg(long, value_delimiter = ',', default_value = "64,256,512,1024,1514")]
    frames: Vec<usize>,
    /// Windows of each cell.
    #[arg(long, default_value_t = 5)]
    windows: usize,
    /// Frames that the device moves at once.
    #[arg(long, default_value_t = 32)]
    burst: usize,
    /// Cells, as JSON; table (.md) and picture (.svg) go beside it.
    #[arg(long, default_value = "target/bench/bound.json")]
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
            let habits = args.guest.habits()?;
            let cells = measure(&Plan {
                common: args.place.common()?,
                frames: args.frames,
                windows: args.windows,
                ring_size: habits.ring_size,
                batch: habits.batch,
                burst: args.burst,
            })?;
            (&args.out, cells)
        }
    };
    let table = bound::markdown(&cells);
    report::save(
        out,
        args.place.render.is_none(),
        &cells,
        &table,
        &plot::bound(&cells)?,
    )
    .context("the results")?;
    print!("{table}");
    Ok(())
}
