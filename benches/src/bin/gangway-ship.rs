//! `gangway-ship`: a hold of many lanes goes to another host, beside `scp` and plain TCP.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use gangway_benches::cli::{NullGuest, Where};
use gangway_benches::report;
use gangway_benches::ship::{self, Cell, Plan};

/// Measures how fast a hold goes to another host, how long the last frame takes, and how much memory both switches need, beside
/// `scp` and TCP over the same link, in turn.
///
/// Needs root; takes hugepages and gives them back, and installs iperf3 and sshd, which it runs on the loopback device.
#[derive(Debug, Parser)]
struct Args {
    /// Lanes.
    #[arg(long, default_value_t = 64)]
    lanes: usize,
    /// Frame sizes in bytes, without FCS.
    #[arg(long, value_delimiter = ',', default_value = "64,1514")]
    frames: Vec<usize>,
    /// MiB of frames to hold.
    #[arg(long, default_value_t = 2048)]
    mib: u64,
    /// Rounds; in each, all three have their turn.
    #[arg(long, default_value_t = 3)]
    pairs: usize,
    /// Spools and files lie in folders below this one.
    #[arg(long, default_value = "/dev/shm")]
    spool: PathBuf,
    /// Cells, as JSON; table (.md) and picture (.svg) go beside it, all rounds as -windows.json.
    #[arg(long, default_value = "target/bench/ship.json")]
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
            ensure!((1..=120).contains(&args.lanes), "1 to 120 lanes");
            let mut habits = args.guest.habits()?;
            habits.ring_size = habits.ring_size.min(256);
            habits.batch = habits.batch.min(32);
            let mut cells: Vec<Cell> = Vec::new();
            let mut windows = Vec::new();
            for &frame in &args.frames {
                let plan = Plan {
                    common: args.place.common()?,
                    lanes: args.lanes,
                    frame,
                    bytes: args.mib << 20,
                    pairs: args.pairs,
                    habits,
                    spool: args.spool.clone(),
                };
                let rounds = ship::measure(&plan)?;
                cells.extend(ship::cell(&plan, &rounds));
                windows.extend(rounds);
            }
            report::save_windows(&args.out, &windows)?;
            (&args.out, cells)
        }
    };
    let table = ship::markdown(&cells);
    report::save(
        out,
        args.place.render.is_none(),
        &cells,
        &table,
        &ship::picture(&cells)?,
    )
    .context("the results")?;
    print!("{table}");
    Ok(())
}
