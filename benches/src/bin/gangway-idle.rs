//! `gangway-idle`: what a switch with idle ports costs, ours beside OVS-DPDK.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use gangway_benches::cli::{NullGuest, Where};
use gangway_benches::idle::{self, Plan, measure};
use gangway_benches::ring::Layout;
use gangway_benches::{plot, report};

/// Measures the CPU time of a switch whose ports are connected and send nothing, beside OVS-DPDK in turn.
///
/// Needs root; takes hugepages and gives them back.
#[derive(Debug, Parser)]
struct Args {
    /// Ports, in pairs.
    #[arg(long, default_value_t = 20)]
    ports: usize,
    /// Ring layout.
    #[arg(long, default_value = "split")]
    ring: Layout,
    /// Windows of each switch; how long they are is --turn-s less --skip-s.
    #[arg(long, default_value_t = 3)]
    windows: usize,
    /// Cells, as JSON; table (.md) and picture (.svg) go beside it.
    #[arg(long, default_value = "target/bench/idle.json")]
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
                (2..=64).contains(&args.ports) && args.ports.is_multiple_of(2),
                "ports come in pairs, 64 at most"
            );
            let mut habits = args.guest.habits()?;
            habits.full = false;
            let cells = measure(&Plan {
                common: args.place.common()?,
                ring: args.ring,
                ports: args.ports,
                windows: args.windows,
                habits,
            })?;
            (&args.out, cells)
        }
    };
    let table = idle::markdown(&cells);
    report::save(
        out,
        args.place.render.is_none(),
        &cells,
        &table,
        &plot::idle(&cells)?,
    )
    .context("the results")?;
    print!("{table}");
    Ok(())
}
