//! One file per subcommand.

use std::process::ExitCode;

use clap::Parser as _;

use crate::cli::{Cli, Command};
use crate::client::Switch;
use crate::exit::{Code, Failure};
use crate::hosts::Hosts;
use crate::migration::journal::Store;

mod abort;
mod discover;
mod flows;
mod group;
mod host;
mod migrate;
mod pki;
mod plan;
mod report;
mod status;
mod verify;
mod vm;
mod workers;

/// What every command may need.
pub struct Context {
    cli_hosts: std::path::PathBuf,
    /// Journals and reports.
    pub store: Store,
}

impl Context {
    /// The hosts file.
    pub fn hosts(&self) -> Result<Hosts, Failure> {
        Hosts::read(&self.cli_hosts)
    }

    /// The switch of a host.
    pub fn switch(&self, host: &str) -> Result<Switch, Failure> {
        let hosts = self.hosts()?;
        Switch::new(&hosts, hosts.find(host)?)
    }
}

/// The program.
pub fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_env("GANGWAY_LOG"))
        .with_writer(std::io::stderr)
        .init();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => {
            // To standard output or error, as clap sees fit; if that is gone there is nobody to tell.
            let _ = e.print();
            return ExitCode::from(if e.use_stderr() {
                Code::Usage as u8
            } else {
                Code::Ok as u8
            });
        }
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
    {
        Ok(r) => r,
        Err(e) => return fail(&Failure::failed(format!("cannot start: {e}"))),
    };
    let result = runtime.block_on(async {
        let result = run(cli).await;
        crate::client::goodbye().await;
        result
    });
    runtime.shutdown_timeout(std::time::Duration::from_millis(200));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(f) => fail(&f),
    }
}

fn fail(f: &Failure) -> ExitCode {
    anstream::eprintln!("gangway: {f}");
    ExitCode::from(f.code as u8)
}

async fn run(cli: Cli) -> Result<(), Failure> {
    let cx = Context {
        cli_hosts: cli.hosts,
        store: Store::new(&cli.state),
    };
    match cli.command {
        Command::Pki(c) => pki::exec(c),
        Command::Host(c) => host::exec(&cx, c).await,
        Command::Vm(c) => vm::exec(&cx, c).await,
        Command::Flows(c) => flows::exec(&cx, c).await,
        Command::Discover(c) => discover::exec(&cx, c).await,
        Command::Plan(c) => plan::exec(&cx, c).await,
        Command::Migrate(c) => migrate::exec(&cx, c).await,
        Command::Status(c) => status::exec(&cx, c),
        Command::Abort(c) => abort::exec(&cx, c).await,
        Command::Report(c) => report::exec(&cx, c),
        Command::Verify(c) => verify::exec(&cx, c).await,
    }
}
