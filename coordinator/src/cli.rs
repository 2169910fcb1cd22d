//! The command line.

use std::net::IpAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use gangway_shared::id::HoldId;

use crate::migration::steps::FreezeMode;

/// Moves a group of communicating VMs between hosts without losing a frame.
#[derive(Debug, Parser)]
#[command(name = "gangway", version, after_help = crate::exit::HELP)]
pub struct Cli {
    /// The file that says where the hosts are.
    #[arg(
        long,
        global = true,
        env = "GANGWAY_HOSTS",
        default_value = "/etc/gangway/hosts.toml",
        value_name = "FILE"
    )]
    pub hosts: PathBuf,
    /// Where journals and reports of migrations are kept.
    #[arg(
        long,
        global = true,
        env = "GANGWAY_STATE",
        default_value = "/var/lib/gangway-coordinator",
        value_name = "DIR"
    )]
    pub state: PathBuf,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// The fleet's own authority and certificates.
    #[command(subcommand)]
    Pki(Pki),
    /// Hosts and their switches.
    #[command(subcommand)]
    Host(HostCmd),
    /// VMs.
    #[command(subcommand)]
    Vm(VmCmd),
    /// What the ports of a host sent each other.
    Flows(OfHost),
    /// The active VMs of a host that have a data-flow connection with another VM there.
    Discover(OfHost),
    /// The order in which a group would move, and why.
    Plan(PlanArgs),
    /// Moves a group to another host: all of it, or nothing.
    Migrate(MigrateArgs),
    /// Migrations, or one of them.
    Status(OfMigration),
    /// Ends a migration: undoes it or, past the point of no return, finishes it.
    Abort(OfMigration),
    /// The account of a migration.
    Report(OfMigration),
    /// Compares what both hosts remember of a migration that is over, frame by frame.
    Verify(VerifyArgs),
}

/// See [`Command::Pki`].
#[derive(Debug, Subcommand)]
pub enum Pki {
    /// Makes an authority: DIR/ca.pem, DIR/ca.key, and its list of revoked certificates, DIR/ca.crl.
    Init {
        /// The folder.
        dir: PathBuf,
    },
    /// Issues a certificate: DIR/NAME.pem and DIR/NAME.key, valid for a year.
    Issue {
        /// The authority's folder.
        dir: PathBuf,
        /// The host's or coordinator's name.
        name: String,
        /// For a host's switch.
        #[arg(
            long,
            required_unless_present = "coordinator",
            conflicts_with = "coordinator"
        )]
        host: bool,
        /// For a coordinator.
        #[arg(long)]
        coordinator: bool,
        /// An IP address that also goes into the certificate; may be repeated.
        #[arg(long, value_name = "IP")]
        address: Vec<IpAddr>,
    },
    /// Takes a certificate back: it goes to DIR/revoked and into DIR/ca.crl, which every host and coordinator needs then (tls.crl).
    Revoke {
        /// The authority's folder.
        dir: PathBuf,
        /// The host's or coordinator's name.
        name: String,
    },
}

/// See [`Command::Host`].
#[derive(Debug, Subcommand)]
pub enum HostCmd {
    /// All hosts.
    List(Output),
    /// One host: its switch, ports, holds.
    Show(OfHost),
    /// The threads of a switch that forward frames.
    #[command(subcommand)]
    Workers(WorkersCmd),
}

/// See [`HostCmd::Workers`].
#[derive(Debug, Subcommand)]
pub enum WorkersCmd {
    /// Workers of all hosts, or of one: where they run, what they serve.
    List {
        /// The host.
        host: Option<String>,
        /// How to print.
        #[command(flatten)]
        output: Output,
    },
    /// Changes them while frames flow, until the switch is started again. What is not given stays.
    Set(WorkersArgs),
}

/// See [`WorkersCmd::Set`].
#[derive(Debug, Args)]
#[group(id = "change", required = true, multiple = true, args = ["count", "cpus", "poll"])]
pub struct WorkersArgs {
    /// The host's name.
    pub host: String,
    /// How many.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub count: Option<u32>,
    /// One CPU for each worker, with commas between; or none.
    #[arg(long, value_name = "CPU,CPU")]
    pub cpus: Option<Cpus>,
    /// How they wait.
    #[arg(long, value_enum)]
    pub poll: Option<Poll>,
    /// How long to wait for the end of a hold, in seconds. Without it: not at all.
    #[arg(long, value_name = "S", default_value_t = 0, value_parser = clap::value_parser!(u64).range(0..=86_400))]
    pub wait_s: u64,
    /// How to print.
    #[command(flatten)]
    pub output: Output,
}

/// CPUs; an empty list is `none`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cpus(pub Vec<u32>);

impl std::str::FromStr for Cpus {
    type Err = String;

    fn from_str(s: &str) -> Result<Cpus, String> {
        if s == "none" {
            return Ok(Cpus(Vec::new()));
        }
        let cpu = |c: &str| c.parse::<u32>().map_err(|e| format!("'{c}': {e}"));
        s.split(',').map(cpu).collect::<Result<_, _>>().map(Cpus)
    }
}

/// How a worker waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Poll {
    /// Polls while there is work, then sleeps.
    Adaptive,
    /// Never sleeps.
    Busy,
}

/// See [`Command::Vm`].
#[derive(Debug, Subcommand)]
pub enum VmCmd {
    /// VMs of all hosts, or of one.
    List {
        /// The host.
        host: Option<String>,
        /// How to print.
        #[command(flatten)]
        output: Output,
    },
}

/// How to print a listing.
#[derive(Debug, Args)]
pub struct Output {
    /// The format.
    #[arg(short, long, value_enum, default_value_t = Format::Text)]
    pub output: Format,
}

/// A listing's format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[allow(missing_docs, reason = "the names say it")]
pub enum Format {
    Text,
    Json,
}

/// One host.
#[derive(Debug, Args)]
pub struct OfHost {
    /// The host's name.
    pub host: String,
    /// How to print.
    #[command(flatten)]
    pub output: Output,
}

/// One migration.
#[derive(Debug, Args)]
pub struct OfMigration {
    /// Its number; without it the youngest (`status`: all).
    pub id: Option<HoldId>,
    /// How to print.
    #[command(flatten)]
    pub output: Output,
}

/// See [`Command::Verify`].
#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// The migration's number; without it the youngest.
    pub id: Option<HoldId>,
    /// The host that the VMs left, where this computer has no journal of the migration (with --to).
    #[arg(long, value_name = "HOST", requires = "to", requires = "id")]
    pub from: Option<String>,
    /// The host to which they went, likewise.
    #[arg(long, value_name = "HOST", requires = "from")]
    pub to: Option<String>,
    /// Also writes both hosts' records here, as JSON.
    #[arg(long, value_name = "FILE")]
    pub ledger: Option<PathBuf>,
    /// Also writes the held frames here, if the hosts have kept them.
    #[arg(long, value_name = "FILE")]
    pub pcapng: Option<PathBuf>,
    /// How to print the verdict.
    #[command(flatten)]
    pub output: Output,
}

/// See [`Command::Plan`].
#[derive(Debug, Args)]
pub struct PlanArgs {
    /// A group of the hosts file, VM names with commas between, or @discover.
    #[arg(default_value = "@discover")]
    pub group: String,
    /// The host on which the VMs run.
    #[arg(long, value_name = "HOST")]
    pub from: Option<String>,
    /// The order in place of the computed one: all VMs of the group, with commas between.
    #[arg(long, value_delimiter = ',', value_name = "VM,VM")]
    pub order: Option<Vec<String>>,
    /// The format.
    #[arg(short, long, value_enum, default_value_t = PlanFormat::Text)]
    pub output: PlanFormat,
}

/// A plan's format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[allow(missing_docs, reason = "the names say it")]
pub enum PlanFormat {
    Text,
    Json,
    Dot,
    Mermaid,
    Svg,
}

/// See [`Command::Migrate`].
#[derive(Debug, Args)]
pub struct MigrateArgs {
    /// A group of the hosts file, VM names with commas between, or @discover (with --from).
    pub group: String,
    /// The host on which the VMs run; without it all hosts are asked.
    #[arg(long, value_name = "HOST")]
    pub from: Option<String>,
    /// The host to which they move.
    #[arg(long, value_name = "HOST")]
    pub to: String,
    /// Checks everything and shows what would be done.
    #[arg(long)]
    pub dry_run: bool,
    /// When the group's traffic is cut: around the switchover, or inside the group before the memory is copied.
    #[arg(long, value_enum, default_value_t = FreezeMode::Switchover)]
    pub freeze: FreezeMode,
    /// The order in place of the computed one: all VMs of the group, with commas between.
    #[arg(long, value_delimiter = ',', value_name = "VM,VM")]
    pub order: Option<Vec<String>>,
    /// What the pre-copy of the whole group may use of the link, in megabits per second. Without it: what TCP gets.
    #[arg(long, value_name = "MBIT", value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub bandwidth_mbit: Option<u64>,
    /// How long the tail of held frames may take to the target before everything is put back, in milliseconds.
    #[arg(long, value_name = "MS", default_value_t = 10_000, value_parser = clap::value_parser!(u64).range(1..=600_000))]
    pub max_hold_ms: u64,
    /// How long the source waits for the network to learn the new place, in milliseconds.
    #[arg(long, value_name = "MS", default_value_t = 2000, value_parser = clap::value_parser!(u64).range(0..=600_000))]
    pub grace_ms: u64,
    /// Also writes the report here.
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
    /// No progress.
    #[arg(short, long)]
    pub quiet: bool,
    /// How to print the report.
    #[command(flatten)]
    pub output: Output,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn arguments_are_understood() {
        let parse = |line: &str| Cli::try_parse_from(line.split(' '));
        let c = parse(
            "gangway migrate a,b --to h2 --freeze early --bandwidth-mbit 1000 -o json --state /s",
        )
        .expect("good");
        assert_eq!(c.state, PathBuf::from("/s"));
        let Command::Migrate(m) = c.command else {
            panic!("not migrate")
        };
        assert_eq!(
            (m.group.as_str(), m.to.as_str(), m.freeze),
            ("a,b", "h2", FreezeMode::Early)
        );
        assert!(parse("gangway migrate a,b").is_err(), "no target");
        assert!(parse("gangway migrate a,b --to b --bandwidth-mbit 0").is_err());
        assert!(parse("gangway pki issue d n").is_err(), "no role");
        assert!(
            parse("gangway pki issue d n --host --coordinator").is_err(),
            "two roles"
        );
        let c = parse("gangway host workers set a --count 2 --cpus 2,3 --poll busy").expect("good");
        let Command::Host(HostCmd::Workers(WorkersCmd::Set(w))) = c.command else {
            panic!("not workers")
        };
        assert_eq!(
            (w.host.as_str(), w.count, w.cpus, w.poll),
            ("a", Some(2), Some(Cpus(vec![2, 3])), Some(Poll::Busy))
        );
        assert!(parse("gangway host workers set a --cpus none").is_ok());
        assert!(parse("gangway host workers set a").is_err(), "no change");
        assert!(parse("gangway host workers set a --count 0").is_err());
        assert!(parse("gangway host workers set a --cpus 2,x").is_err());
        assert!(parse("gangway host workers list -o json").is_ok());
        assert!(parse("gangway status xyz").is_err());
        assert!(parse("gangway verify 00000000000000ff --pcapng f --ledger g -o json").is_ok());
        assert!(parse("gangway verify 00000000000000ff --from a --to b").is_ok());
        assert!(parse("gangway verify 00000000000000ff --from a").is_err());
        assert!(
            parse("gangway verify --from a --to b").is_err(),
            "no number"
        );
        assert!(parse("gangway report 00000000000000ff -o json").is_ok());
    }
}
