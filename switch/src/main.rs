//! `gangway-switch`: reads its configuration, then serves until it is told to stop.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Parser;
use gangway_shared::config::HostConfig;
use gangway_switch::control::{Server, Vmm, notify, preflight, quic};
use gangway_switch::run::Switch;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// Something did not work.
const FAILED: u8 = 1;
/// The configuration cannot be used.
const BAD_CONFIGURATION: u8 = 2;

/// The virtual switch of a Gangway host.
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "Exit codes: 0 stopped as asked (or the configuration is valid), 1 failed, 2 bad configuration.\n\
                  RUST_LOG sets what is logged to stderr, as in RUST_LOG=debug (default: info).\n\
                  SIGTERM and SIGINT stop the switch; VMs that it has started run on."
)]
struct Args {
    /// The host's configuration (TOML; see deploy/examples/host.toml).
    #[arg(long, value_name = "FILE", env = "GANGWAY_SWITCH_CONFIG")]
    config: PathBuf,
    /// Only check the configuration and the certificates, and say what the switch would do.
    #[arg(long)]
    check: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    log_to_stderr();
    let cfg = match HostConfig::load(&args.config) {
        Ok(cfg) => cfg,
        Err(e) => {
            eprintln!("{e}");
            return ExitCode::from(BAD_CONFIGURATION);
        }
    };
    if args.check {
        return check(&cfg);
    }
    match start(cfg) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("gangway-switch: {e:#}");
            let bad = e.chain().any(|c| c.is::<quic::QuicError>());
            ExitCode::from(if bad { BAD_CONFIGURATION } else { FAILED })
        }
    }
}

fn log_to_stderr() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    // The journal has its own clock.
    if std::env::var_os("JOURNAL_STREAM").is_some() {
        log.without_time().init();
    } else {
        log.init();
    }
}

fn check(cfg: &HostConfig) -> ExitCode {
    if let Err(e) = quic::check(cfg) {
        eprintln!("{e}");
        return ExitCode::from(BAD_CONFIGURATION);
    }
    let quic = match cfg.listen {
        Some(listen) => format!("QUIC {listen}"),
        None => "no QUIC (VMs can neither leave nor arrive)".to_owned(),
    };
    println!(
        "host {}: {}, {quic}",
        cfg.name,
        cfg.control_socket.display()
    );
    let workers = &cfg.workers;
    println!(
        "workers: {}, CPUs {:?}, {:?}",
        workers.count, workers.cpus, workers.poll
    );
    for p in &cfg.ports {
        let vm = p.vm.as_deref().unwrap_or("-");
        println!("port {}: VM {vm}, {:?}", p.name, p.kind);
    }
    for vm in &cfg.vms {
        let arrives = if vm.incoming.is_some() {
            "can arrive"
        } else {
            "cannot arrive"
        };
        println!("VM {}: {}, {arrives}", vm.name, vm.qmp.display());
    }
    for m in preflight::missing(cfg) {
        println!("warning: {m}");
    }
    ExitCode::SUCCESS
}

fn start(cfg: HostConfig) -> Result<()> {
    let missing = preflight::missing(&cfg);
    if !missing.is_empty() {
        bail!("{}", missing.join("; "));
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("control")
        .enable_all()
        .build()
        .context("cannot start the control threads")?;
    let result = runtime.block_on(run(cfg));
    // A call that still waits must not keep the process.
    runtime.shutdown_background();
    result
}

async fn run(cfg: HostConfig) -> Result<()> {
    let stop = stop_signal().context("cannot wait for signals")?;
    let vmm = Vmm::new(&cfg);
    let quic = quic::endpoint(&cfg)?;
    let switch = Switch::start(&cfg, &vmm, quic.as_ref())?;
    let server = Server::bind(&cfg, vmm, switch.handler(), quic, switch.shipments())?;
    tracing::info!(host = cfg.name, socket = %cfg.control_socket.display(), "serving");
    notify::ready();
    server.run(stop).await;
    tokio::task::block_in_place(|| switch.stop());
    Ok(())
}

fn stop_signal() -> std::io::Result<impl Future<Output = ()>> {
    let mut term = signal(SignalKind::terminate())?;
    let mut int = signal(SignalKind::interrupt())?;
    Ok(async move {
        let name = tokio::select! {
            _ = term.recv() => "SIGTERM",
            _ = int.recv() => "SIGINT",
        };
        tracing::info!("{name}: stopping");
        notify::stopping();
    })
}
