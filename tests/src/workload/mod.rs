//! The traffic whose fate the lab judges: numbered UDP, digested TCP, echoes and requests from outside.
//!
//! One static program in three parts: `guest` runs in a VM as all that there is, `outside` in the namespace of the
//! clients, `ask` puts one question to a guest. VMs form a chain: the first produces, each other one checks what
//! it gets and passes it on under its own numbers, the last one passes on to the outside.
//!
//! Invariant: no loss is guessed here. Senders and receivers report counts; whoever reads both subtracts.
//! Invariant: senders stop before receivers are read, so that what was lost at the tail is counted too.
//! Invariant: the clock of a guest stands still while it is paused; figures taken on it say `guest`.

pub mod control;
pub mod dirty;
pub mod guest;
pub mod outside;
pub mod pace;
pub mod report;
pub mod socket;
pub mod stream;
pub mod tally;
pub mod udp;
pub mod wire;

use std::process::ExitCode;

/// Runs the program: `guest`, `outside [options]` or `ask ADDRESS COMMAND`.
pub fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let result = match args.first().map(String::as_str) {
        Some("guest") => guest::main(),
        Some("turn") => guest::turn(),
        Some("outside") => outside::main(&args[1..]),
        Some("ask") if args.len() == 3 => {
            control::ask(&args[1], &args[2]).map(|answer| println!("{answer}"))
        }
        _ => Err(std::io::Error::other(
            "usage: gangway-workload guest | outside --vm NAME=ADDRESS... | ask ADDRESS COMMAND",
        )),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("gangway-workload: {error}");
            ExitCode::FAILURE
        }
    }
}
