//! `gangway-soak`: a group of real VMs moves back and forth under traffic for long; nothing is lost and nothing grows.

use clap::Parser;
use gangway_tests::lab::soak::{MINUTES_MAX, Options, run};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Moves three VMs that talk to each other back and forth, and judges their traffic and what the hosts' processes and folders have
/// become
#[derive(Parser)]
struct Args {
    /// Begin no further move after so many minutes
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=MINUTES_MAX))]
    minutes: u32,
    /// Where soak.json, soak.md and the logs go
    #[arg(long, default_value = "target/soak")]
    out: PathBuf,
}

fn main() -> ExitCode {
    let args = Args::parse();
    if !rustix::process::geteuid().is_root() {
        eprintln!("gangway-soak: run as root: the lab makes network namespaces");
        return ExitCode::from(2);
    }
    let began = Instant::now();
    let mut say = |text: &str| eprintln!("[{:6.1} s] {text}", began.elapsed().as_secs_f64());
    let options = Options {
        duration: Duration::from_secs(60 * u64::from(args.minutes)),
        out: args.out,
    };
    match run(&options, &mut say) {
        Ok(green) => {
            let page = options.out.join("soak.md");
            println!(
                "{}\n{}",
                std::fs::read_to_string(&page).unwrap_or_default(),
                options.out.join("soak.json").display()
            );
            ExitCode::from(u8::from(!green))
        }
        Err(error) => {
            eprintln!("gangway-soak: {error:#}");
            ExitCode::from(2)
        }
    }
}
