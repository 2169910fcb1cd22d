//! `gangway-keeper`: keeps the vhost-user connections of VMs while their switch is restarted.

use std::fs::DirBuilder;
use std::io::IsTerminal;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use gangway_keeper::devices;
use gangway_keeper::relay::{self, Port};
use gangway_shared::config::HostConfig;
use gangway_shared::config::valid::PortKind;
use tracing_subscriber::EnvFilter;

const FAILED: u8 = 1;
const BAD_CONFIGURATION: u8 = 2;

/// Keeps the vhost-user connections of VMs while their switch is restarted.
///
/// Reads the switch's configuration: with `keeper.dir` set, it serves the sockets of the vhost-user ports and passes everything on
/// to the switch.
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "Exit codes: 1 failed, 2 bad configuration. It runs until it is killed; VMs lose their carrier then.\n\
                  RUST_LOG sets what is logged to stderr, as in RUST_LOG=debug (default: info)."
)]
struct Args {
    /// The host's configuration (TOML; see deploy/examples/host.toml).
    #[arg(long, value_name = "FILE", env = "GANGWAY_SWITCH_CONFIG")]
    config: PathBuf,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    let cfg = match HostConfig::load(&args.config) {
        Ok(cfg) => cfg,
        Err(e) => {
            eprintln!("{e}");
            return ExitCode::from(BAD_CONFIGURATION);
        }
    };
    let Some(dir) = &cfg.keeper_dir else {
        eprintln!(
            "{}: no [keeper] with a dir: there is nothing to keep; add it, or leave the keeper off",
            args.config.display()
        );
        return ExitCode::from(BAD_CONFIGURATION);
    };
    match run(&cfg, dir) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("gangway-keeper: {e:#}");
            ExitCode::from(FAILED)
        }
    }
}

fn run(cfg: &HostConfig, dir: &Path) -> Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .with_context(|| format!("cannot make {}", dir.display()))?;
    let mut threads = Vec::new();
    for (number, p) in (0..).zip(&cfg.ports) {
        let PortKind::VhostUser { socket, server } = &p.kind else {
            continue;
        };
        let Some(switch) = cfg.kept_socket(&p.name) else {
            continue;
        };
        let port = Port {
            name: p.name.clone(),
            socket: socket.clone(),
            server: *server,
            switch,
            number,
        };
        let thread = std::thread::Builder::new().name(format!("keep-{}", p.name));
        threads.push(thread.spawn(move || relay::serve(&port))?);
    }
    let own = dir.to_owned();
    let thread = std::thread::Builder::new().name("keep-devices".to_owned());
    let devices = thread.spawn(move || devices::serve(&own))?;
    tracing::info!(host = cfg.name, ports = threads.len(), "keeping");
    for t in threads {
        let _ = t.join();
    }
    let ended = devices.join();
    let ended = ended.unwrap_or_else(|_| Err(std::io::Error::other("its thread panicked")));
    ended.with_context(|| format!("cannot keep sockets in {}", dir.display()))
}
