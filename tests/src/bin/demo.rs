//! `gangway-demo`: a group of real VMs moves between two hosts of the lab, and not a frame is lost.

use clap::Parser;
use gangway_tests::lab::demo::{Freeze, Options, Ports, run};
use std::path::PathBuf;
use std::process::ExitCode;

/// Moves three VMs that talk to each other from host A to host B and judges their traffic.
#[derive(Parser)]
struct Args {
    /// How the VMs are attached to the switch
    #[arg(long, value_enum, default_value = "vhost-user")]
    ports: Ports,
    /// When the links between the VMs are frozen
    #[arg(long, value_enum, default_value = "switchover")]
    freeze: Freeze,
    /// Also move the group over Linux bridges, for comparison
    #[arg(long)]
    baseline: bool,
    /// Move the group over Linux bridges and do nothing else
    #[arg(long)]
    baseline_only: bool,
    /// Also pause the group on Linux bridges without moving it, to tell the pause from the cold target
    #[arg(long)]
    in_place: bool,
    /// Where report.json and the logs go
    #[arg(long, default_value = "target/demo")]
    out: PathBuf,
}

fn main() -> ExitCode {
    let args = Args::parse();
    if !rustix::process::geteuid().is_root() {
        eprintln!("gangway-demo: run as root: the lab makes network namespaces and TAP devices");
        return ExitCode::from(2);
    }
    let options = Options {
        ports: args.ports,
        freeze: args.freeze,
        baseline: args.baseline,
        baseline_only: args.baseline_only,
        in_place: args.in_place,
        out: args.out,
    };
    match run(&options) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("gangway-demo: {error:#}");
            ExitCode::from(2)
        }
    }
}
