//! `gangway-series`: moves the group again and again, by Gangway and by what it is compared with, in turn.

use clap::Parser;
use gangway_tests::lab::group::Group;
use gangway_tests::lab::series::{Method, Options, run};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

/// Measures several moves by each method, one after the other; the figures go to moves.json and moves.md.
#[derive(Parser)]
struct Args {
    /// Runs of each method
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// What is measured, in this order
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "gangway,gang-stop,in-place"
    )]
    methods: Vec<Method>,
    /// VMs of the chain: fewer of them share this machine's processors
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=3))]
    vms: u32,
    /// Where the figures and logs go
    #[arg(long, default_value = "target/bench/moves")]
    out: PathBuf,
}

fn main() -> ExitCode {
    let args = Args::parse();
    if !rustix::process::geteuid().is_root() {
        eprintln!("gangway-series: run as root: the lab makes network namespaces and TAP devices");
        return ExitCode::from(2);
    }
    let began = Instant::now();
    let mut say = |text: &str| println!("[{:6.1} s] {text}", began.elapsed().as_secs_f64());
    let names = ["producer", "middle", "consumer"];
    let options = Options {
        runs: args.runs,
        methods: args.methods,
        group: Group::chain(&names[..names.len().min(args.vms as usize)]),
        out: args.out,
    };
    match run(&options, &mut say) {
        Ok(clean) => {
            let table = options.out.join("moves.md");
            println!(
                "\n{}\n{}",
                std::fs::read_to_string(&table).unwrap_or_default(),
                options.out.join("moves.json").display()
            );
            ExitCode::from(u8::from(!clean))
        }
        Err(error) => {
            eprintln!("gangway-series: {error:#}");
            ExitCode::from(2)
        }
    }
}
