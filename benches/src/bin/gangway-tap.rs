//! `gangway-tap`: TCP between two network namespaces over TAPs and our switch, beside veths and a Linux bridge.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use gangway_benches::report;
use gangway_benches::tap::{Plan, cells, markdown, measure, picture};

/// Measures iperf3 between two network namespaces, over TAPs and our switch and over veths and a Linux bridge, in turn.
///
/// Needs root and two idle CPUs. Both ways have checksum and TCP segmentation offload.
#[derive(Debug, Parser)]
struct Args {
    /// Numbers of TCP streams.
    #[arg(long, value_delimiter = ',', default_value = "1,4")]
    streams: Vec<u32>,
    /// Rounds; in each, both ways have their turn.
    #[arg(long, default_value_t = 5)]
    pairs: usize,
    /// Seconds of a turn that count; one more does not.
    #[arg(long, default_value_t = 3)]
    turn_s: u32,
    /// The switch's workers.
    #[arg(long, default_value_t = 1)]
    workers: usize,
    /// Our switch [default: beside this program].
    #[arg(long)]
    switch: Option<PathBuf>,
    /// Seconds to wait for other work on this machine to end, before each turn.
    #[arg(long, default_value_t = 60.0)]
    quiet_s: f64,
    /// A ping-pong round trip of up to so many cycles is near.
    #[arg(long, default_value_t = 600)]
    near_max: u64,
    /// Cells, as JSON; table (.md) and picture (.svg) go beside it, all windows as -windows.json.
    #[arg(long, default_value = "target/bench/tap.json")]
    out: PathBuf,
}

fn main() -> Result<()> {
    let args = Args::parse();
    ensure!(
        args.turn_s > 0 && args.pairs > 0 && args.workers > 0 && !args.streams.contains(&0),
        "turns, pairs, workers and streams are at least one"
    );
    let switch = match args.switch {
        Some(path) => path,
        None => std::env::current_exe()?.with_file_name("gangway-switch"),
    };
    let windows = measure(&Plan {
        switch,
        workers: args.workers,
        streams: args.streams,
        pairs: args.pairs,
        turn_s: args.turn_s,
        quiet: Duration::from_secs_f64(args.quiet_s),
        near_max: args.near_max,
    })?;
    report::save_windows(&args.out, &windows)?;
    let cells = cells(&windows);
    let table = markdown(&cells);
    report::save(&args.out, true, &cells, &table, &picture(&cells)?).context("the results")?;
    print!("{table}");
    Ok(())
}
