//! A series: the same group moved again and again by different methods in turn, and what is typical of each.
//!
//! One run shows what is possible; only several, taken in turn on the same machine, can be compared.

use anyhow::{Context, Result};
use serde::Serialize;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use super::baseline::{self, Phases, Recipe};
use super::cpu::Cpu;
use super::demo::{Freeze, Ports};
use super::group::Group;
use super::moved;
use super::report::Run;
use super::traffic::Flow;
use crate::workload::report::Clock;

/// How the group is moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// Gangway with vhost-user ports
    Gangway,
    /// Gangway with TAP ports
    GangwayTap,
    /// Linux bridges, plain QEMU migration, stopped and resumed together
    GangStop,
    /// Linux bridges, stopped and resumed together without a move
    InPlace,
    /// The same, and the emulators lose their translations while they are stopped
    InPlaceCold,
    /// Linux bridges, plain QEMU migration, each VM after the other
    OneByOne,
}

impl Method {
    /// As the command line has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gangway => "gangway",
            Self::GangwayTap => "gangway-tap",
            Self::GangStop => Recipe::GangStop.name(),
            Self::InPlace => Recipe::InPlace.name(),
            Self::InPlaceCold => Recipe::InPlaceCold.name(),
            Self::OneByOne => Recipe::OneByOne.name(),
        }
    }

    /// Whether it is our switch and coordinator that do it.
    pub fn is_gangway(self) -> bool {
        matches!(self, Self::Gangway | Self::GangwayTap)
    }

    fn run(self, group: &Group, logs: &Path, say: &mut dyn FnMut(&str)) -> Result<Run> {
        let phases = Phases::default();
        let gangway = |ports, say| moved::run(group, ports, Freeze::Switchover, phases, logs, say);
        match self {
            Self::Gangway => gangway(Ports::VhostUser, say),
            Self::GangwayTap => gangway(Ports::Tap, say),
            Self::GangStop => baseline::run(group, Recipe::GangStop, phases, logs, say),
            Self::InPlace => baseline::run(group, Recipe::InPlace, phases, logs, say),
            Self::InPlaceCold => baseline::run(group, Recipe::InPlaceCold, phases, logs, say),
            Self::OneByOne => baseline::run(group, Recipe::OneByOne, phases, logs, say),
        }
    }
}

/// A run's figures.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Figures {
    /// As the run's verdict has it.
    pub clean: bool,
    /// From the first pause to the last resume.
    pub blackout_ms: f64,
    /// From the order to migrate to its end.
    pub migration_ms: f64,
    /// The longest silences on the host's clock.
    pub host_clock: Stalls,
    /// The longest silences on the guests' clocks, which stand still in a pause.
    pub guest_clock: Stalls,
    /// Of all flows.
    pub lost: u64,
    /// Of all flows.
    pub duplicated: u64,
    /// Of all flows.
    pub reordered: u64,
    /// TCP segments sent again, in all flows.
    pub retransmits: u64,
    /// The processors.
    pub cpu: Cpu,
    /// The flows that something happened to, whole.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub unclean: Vec<Flow>,
}

/// The longest silence of any flow.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Stalls {
    /// Of streams and of requests over them.
    pub tcp_stall_ms: f64,
    /// Of datagrams and echoes.
    pub udp_stall_ms: f64,
}

impl Figures {
    /// Takes them from a run of `group`.
    pub fn of(group: &Group, run: &Run) -> Self {
        // The flow from the chain's first VM to its last is made of the others' ends: it would count twice.
        let whole = match (group.vms.first(), group.vms.last()) {
            (Some(first), Some(last)) if group.vms.len() > 2 => {
                format!("tcp {}->{}", first.name, last.name)
            }
            _ => String::new(),
        };
        let flows = || run.traffic.iter().filter(|flow| flow.name != whole);
        let sum = |figure: fn(&Flow) -> u64| flows().map(figure).sum();
        let longest = |clock, protocol: &str| {
            let named = |flow: &&Flow| flow.name.split(' ').any(|word| word == protocol);
            flows()
                .filter(|flow| flow.clock == Some(clock))
                .filter(named)
                .map(|flow| flow.stall_ms_max)
                .fold(0.0, f64::max)
        };
        let stalls = |clock| Stalls {
            tcp_stall_ms: longest(clock, "tcp"),
            udp_stall_ms: longest(clock, "udp"),
        };
        Self {
            clean: run.clean,
            blackout_ms: run.blackout_ms,
            migration_ms: run.migration_ms,
            host_clock: stalls(Clock::Host),
            guest_clock: stalls(Clock::Guest),
            lost: sum(|flow| flow.lost),
            duplicated: sum(|flow| flow.duplicated),
            reordered: sum(|flow| flow.reordered),
            retransmits: sum(|flow| flow.retransmits),
            cpu: run.cpu.clone(),
            unclean: flows().filter(|flow| !flow.is_clean()).cloned().collect(),
        }
    }
}

/// One run of the series.
#[derive(Clone, Debug, Serialize)]
pub struct Taken {
    /// How the group was moved.
    pub method: Method,
    /// The how manieth of its method, from 1 on.
    pub round: u32,
    /// Its figures, when it came to its end.
    #[serde(flatten)]
    pub figures: Option<Figures>,
    /// Why it did not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl Taken {
    /// It came to its end and nothing was lost.
    pub fn is_clean(&self) -> bool {
        self.figures.as_ref().is_some_and(|figures| figures.clean)
    }
}

/// What the series shall do.
#[derive(Clone, Debug)]
pub struct Options {
    /// Runs of each method.
    pub runs: u32,
    /// The methods, in turn.
    pub methods: Vec<Method>,
    /// What is moved.
    pub group: Group,
    /// Where the figures and logs go.
    pub out: PathBuf,
}

/// Runs the series; whether all of Gangway's runs were clean. What has been measured is written after each run.
pub fn run(options: &Options, say: &mut dyn FnMut(&str)) -> Result<bool> {
    let group = &options.group;
    let total = options.runs as usize * options.methods.len();
    let mut taken = Vec::new();
    for round in 1..=options.runs {
        for &method in &options.methods {
            say(&format!(
                "run {} of {total}: {} {round}",
                taken.len() + 1,
                method.name()
            ));
            let logs = options
                .out
                .join("logs")
                .join(format!("{}-{round}", method.name()));
            let (figures, error) = match method.run(group, &logs, say) {
                Ok(run) => (Some(Figures::of(group, &run)), None),
                Err(error) => (None, Some(format!("{error:#}"))),
            };
            let one = Taken {
                method,
                round,
                figures,
                error,
            };
            say(&line(&one));
            taken.push(one);
            write(&options.out, &taken)?;
        }
    }
    let clean = |one: &Taken| one.is_clean() || !one.method.is_gangway();
    Ok(taken.iter().all(clean))
}

fn line(one: &Taken) -> String {
    match (&one.figures, &one.error) {
        (Some(figures), _) => format!(
            "{}: blackout {:.0} ms, TCP stall {:.0} ms, {}",
            one.method.name(),
            figures.blackout_ms,
            figures.host_clock.tcp_stall_ms,
            if figures.clean {
                "nothing lost"
            } else {
                "NOT CLEAN"
            }
        ),
        (None, error) => format!(
            "{}: FAILED: {}",
            one.method.name(),
            error.as_deref().unwrap_or_default()
        ),
    }
}

fn write(out: &Path, taken: &[Taken]) -> Result<()> {
    std::fs::create_dir_all(out).with_context(|| out.display().to_string())?;
    for (name, bytes) in [
        ("moves.json", serde_json::to_vec_pretty(taken)?),
        ("moves.md", table(taken).into_bytes()),
    ] {
        let path = out.join(name);
        std::fs::write(&path, bytes).with_context(|| path.display().to_string())?;
    }
    Ok(())
}

/// The table for people: per method the smallest, the median and the largest of each figure.
pub fn table(taken: &[Taken]) -> String {
    type Figure = fn(&Figures) -> f64;
    let columns: [(&str, Figure); 6] = [
        ("blackout ms", |f| f.blackout_ms),
        ("longest TCP stall ms", |f| f.host_clock.tcp_stall_ms),
        ("stall - blackout ms", |f| {
            f.host_clock.tcp_stall_ms - f.blackout_ms
        }),
        ("lost + duplicated + reordered", |f| {
            (f.lost + f.duplicated + f.reordered) as f64
        }),
        ("retransmissions", |f| f.retransmits as f64),
        ("CPU % during", |f| f.cpu.migration_percent),
    ];
    let mut text = "| method | runs (clean) |".to_owned();
    columns
        .iter()
        .for_each(|(name, _)| text += &format!(" {name} |"));
    text += "\n|---|---:|";
    columns.iter().for_each(|_| text += "---:|");
    text += "\n";
    let mut methods: Vec<Method> = Vec::new();
    for one in taken {
        if !methods.contains(&one.method) {
            methods.push(one.method);
        }
    }
    for method in methods {
        let runs: Vec<&Taken> = taken.iter().filter(|one| one.method == method).collect();
        let clean = runs.iter().filter(|one| one.is_clean()).count();
        let _ = write!(text, "| {} | {} ({clean}) |", method.name(), runs.len());
        for (_, figure) in columns {
            let values = runs.iter().filter_map(|one| one.figures.as_ref());
            match Spread::of(values.map(figure)) {
                Some(Spread { min, median, max }) => {
                    let _ = write!(text, " {min:.0} / {median:.0} / {max:.0} |");
                }
                None => text += " - |",
            }
        }
        text += "\n";
    }
    text + "\nminimum / median / maximum; stalls are silences at receivers outside, on the host's clock\n"
}

/// How a figure spreads over runs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    /// The smallest.
    pub min: f64,
    /// The middle one; of an even number, the mean of the two in the middle.
    pub median: f64,
    /// The largest.
    pub max: f64,
}

impl Spread {
    /// PURE: of values in any order; `None` of none.
    pub fn of(values: impl Iterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.collect();
        values.sort_by(f64::total_cmp);
        let upper = *values.get(values.len() / 2)?;
        let lower = *values.get((values.len() - 1) / 2)?;
        Some(Self {
            min: *values.first()?,
            median: (lower + upper) / 2.0,
            max: *values.last()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spread(values: &[f64]) -> Option<(f64, f64, f64)> {
        let Spread { min, median, max } = Spread::of(values.iter().copied())?;
        Some((min, median, max))
    }

    #[test]
    fn the_median_is_the_middle_or_the_mean_of_the_two_in_the_middle() {
        assert_eq!(spread(&[]), None);
        assert_eq!(spread(&[7.0]), Some((7.0, 7.0, 7.0)));
        assert_eq!(spread(&[9.0, 1.0, 5.0]), Some((1.0, 5.0, 9.0)));
        assert_eq!(spread(&[4.0, 1.0, 2.0, 100.0]), Some((1.0, 3.0, 100.0)));
        assert_eq!(
            spread(&[-2.0, -10.0]),
            Some((-10.0, -6.0, -2.0)),
            "a stall may be shorter than the blackout"
        );
    }

    fn flow(name: &str, clock: Clock, stall_ms_max: f64) -> Flow {
        Flow {
            name: name.to_owned(),
            clock: Some(clock),
            stall_ms_max,
            lost: 1,
            retransmits: 10,
            ..Flow::default()
        }
    }

    #[test]
    fn figures_are_apart_by_clock_and_protocol_and_count_the_chain_once() {
        let run = Run {
            blackout_ms: 140.0,
            traffic: vec![
                flow("tcp consumer->outside", Clock::Host, 200.0),
                flow("outside tcp middle", Clock::Host, 300.0),
                flow("outside udp echo middle", Clock::Host, 150.0),
                flow("udp producer->middle", Clock::Guest, 9.0),
                flow("tcp producer->middle", Clock::Guest, 8.0),
                flow("tcp producer->consumer", Clock::Guest, 999.0),
            ],
            ..Run::default()
        };
        let figures = Figures::of(&Group::default(), &run);
        assert_eq!(figures.host_clock.tcp_stall_ms, 300.0);
        assert_eq!(figures.host_clock.udp_stall_ms, 150.0);
        assert_eq!(figures.guest_clock.tcp_stall_ms, 8.0);
        assert_eq!(figures.guest_clock.udp_stall_ms, 9.0);
        assert_eq!((figures.lost, figures.retransmits), (5, 50));
        assert_eq!((figures.clean, figures.unclean.len()), (false, 5));
    }

    #[test]
    fn the_table_has_a_line_per_method_and_says_what_failed() {
        let one = |method, blackout_ms| Taken {
            method,
            round: 1,
            figures: Some(Figures {
                clean: true,
                blackout_ms,
                ..Figures::default()
            }),
            error: None,
        };
        let failed = Taken {
            method: Method::Gangway,
            round: 3,
            figures: None,
            error: Some("why".to_owned()),
        };
        let taken = [
            one(Method::Gangway, 100.0),
            one(Method::GangStop, 7.0),
            one(Method::Gangway, 120.0),
            failed,
        ];
        let text = table(&taken);
        let lines: Vec<&str> = text.lines().collect();
        assert!(
            lines[2].starts_with("| gangway | 3 (2) | 100 / 110 / 120 |"),
            "{text}"
        );
        assert!(lines[3].starts_with("| gang-stop | 1 (1) | 7 / 7 / 7 |"));
        assert!(!taken[3].is_clean());
        let json = serde_json::to_value(&taken[0]).unwrap();
        assert_eq!(
            (&json["method"], &json["blackout_ms"]),
            (&"gangway".into(), &100.0.into())
        );
    }
}
