//! The demo: moves the group, compares it with what users have today, leaves a report.

use anyhow::Result;
use std::path::PathBuf;
use std::time::Instant;

use super::baseline::{self, Phases, Recipe};
use super::group::Group;
use super::moved;
use super::report::Report;
use super::table;

/// How VMs are attached to the switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Ports {
    /// Shared memory.
    VhostUser,
    /// TAP devices.
    Tap,
}

/// When links are frozen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Freeze {
    /// Around the switchover only.
    Switchover,
    /// Before the whole migration.
    Early,
}

impl Ports {
    /// As the command line has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::VhostUser => "vhost-user",
            Self::Tap => "tap",
        }
    }
}

impl Freeze {
    /// As the command line has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Switchover => "switchover",
            Self::Early => "early",
        }
    }
}

/// What the demo shall do.
#[derive(Clone, Debug)]
pub struct Options {
    /// How VMs are attached.
    pub ports: Ports,
    /// When links are frozen.
    pub freeze: Freeze,
    /// Also run the baselines.
    pub baseline: bool,
    /// Only run the baselines.
    pub baseline_only: bool,
    /// Also run the control: the same pause on A, without a move.
    pub in_place: bool,
    /// Where the report goes.
    pub out: PathBuf,
}

/// Runs the demo; whether Gangway's run (or there being none, the lab) did what it promises.
pub fn run(options: &Options) -> Result<bool> {
    let began = Instant::now();
    let mut say = |text: &str| println!("[{:6.2} s] {text}", began.elapsed().as_secs_f64());
    let group = Group::default();
    let mut report = Report::default();
    if !options.baseline_only {
        say(&format!(
            "Gangway: {} ports, freeze {}",
            options.ports.name(),
            options.freeze.name()
        ));
        let logs = options.out.join("logs/gangway");
        let (ports, freeze) = (options.ports, options.freeze);
        report.run = Some(moved::run(
            &group,
            ports,
            freeze,
            Phases::default(),
            &logs,
            &mut say,
        )?);
    }
    if options.baseline || options.baseline_only {
        say("baseline: gang stop on Linux bridges");
        let logs = options.out.join("logs/gang-stop");
        report.baseline = Some(baseline::run(
            &group,
            Recipe::GangStop,
            Phases::default(),
            &logs,
            &mut say,
        )?);
        say("baseline: one by one on Linux bridges");
        let logs = options.out.join("logs/one-by-one");
        let run = baseline::run(&group, Recipe::OneByOne, Phases::default(), &logs, &mut say)?;
        report.baseline_one_by_one = Some(run);
    }
    if options.in_place {
        say("control: the same pause in place on Linux bridges");
        let logs = options.out.join("logs/in-place");
        let run = baseline::run(&group, Recipe::InPlace, Phases::default(), &logs, &mut say)?;
        report.in_place = Some(run);
    }
    let path = report.write(&options.out)?;
    println!("\n{}", table::render(&report));
    println!("report: {}", path.display());
    Ok(report
        .run
        .as_ref()
        .map_or(options.baseline_only, |run| run.clean))
}
