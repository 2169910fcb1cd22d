//! `gangway-hold`: how fast a switch freezes lanes into its spool and flushes them, and what gates cost.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};
use gangway_benches::cli::{NullGuest, Where};
use gangway_benches::hold::{self, Plan, Results, Segments, cells};
use gangway_benches::ring::Layout;
use gangway_benches::{plot, report};

/// Measures how fast a switch freezes lanes into its spool and flushes them again, and what open and frozen holds cost a
/// lane that forwards.
///
/// Needs root and two idle CPUs; takes hugepages and gives them back. Windows that something else has spoiled do not
/// count.
#[derive(Debug, Parser)]
struct Args {
    /// What to measure.
    #[arg(long, value_delimiter = ',', default_value = "hold,gates")]
    what: Vec<What>,
    /// Where segments come from.
    #[arg(long, value_delimiter = ',', default_value = "ready,made")]
    segments: Vec<Segments>,
    /// Frame sizes in bytes, without FCS.
    #[arg(long, value_delimiter = ',', default_value = "64,1514")]
    frames: Vec<usize>,
    /// Ring layout.
    #[arg(long, default_value = "split")]
    ring: Layout,
    /// Rounds.
    #[arg(long, default_value_t = 5)]
    pairs: usize,
    /// The spool lies in a folder below this one.
    #[arg(long, default_value = "/dev/shm")]
    spool: PathBuf,
    /// Without a ledger of the holds.
    #[arg(long)]
    no_ledger: bool,
    /// Cells, as JSON; tables (.md) and picture (.svg) go beside it, all windows as -windows.json.
    #[arg(long, default_value = "target/bench/hold.json")]
    out: PathBuf,
    #[command(flatten)]
    place: Where,
    #[command(flatten)]
    guest: NullGuest,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum What {
    Hold,
    Gates,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let (out, cells) = match &args.place.render {
        Some(path) => (path, report::load(path)?),
        None => {
            let plan = Plan {
                common: args.place.common()?,
                ring: args.ring,
                frames: args.frames,
                segments: args.segments,
                pairs: args.pairs,
                habits: args.guest.habits()?,
                spool: args.spool,
                ledger: !args.no_ledger,
            };
            let mut results = Results::default();
            if args.what.contains(&What::Hold) {
                hold::measure(&plan, &mut results)?;
            }
            if args.what.contains(&What::Gates) {
                hold::measure_gates(&plan, &mut results)?;
            }
            report::save_windows(&args.out, &results)?;
            (&args.out, cells(&results))
        }
    };
    let table = hold::markdown(&cells);
    report::save(
        out,
        args.place.render.is_none(),
        &cells,
        &table,
        &plot::hold(&cells)?,
    )
    .context("the results")?;
    print!("{table}");
    Ok(())
}
