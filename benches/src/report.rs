//! What is made of the windows: figures of ours beside OVS-DPDK, in cells; JSON and Markdown tables.

use std::fmt::Write;
use std::path::Path;

use anyhow::{Context, Result};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::peer::Rule;
use crate::pingpong::State;
use crate::pvp::{Results, Window};
use crate::rig::Conditions;
use crate::ring::Layout;

/// Of several windows.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Figure {
    /// Least.
    pub min: f64,
    /// In the middle; of two, their mean.
    pub median: f64,
    /// Most.
    pub max: f64,
}

impl Figure {
    /// `None` of nothing.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Figure> {
        let mut all: Vec<f64> = values.into_iter().collect();
        all.sort_by(f64::total_cmp);
        let (&min, &max) = (all.first()?, all.last()?);
        let n = all.len();
        Some(Figure {
            min: round(min),
            median: round((all[(n - 1) / 2] + all[n / 2]) / 2.0),
            max: round(max),
        })
    }
}

fn round(v: f64) -> f64 {
    (v * 1000.0).round() / 1000.0
}

/// What is compared of a window, whatever stands for the guests.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Sample {
    /// Which switch.
    pub switch: &'static str,
    /// How it found the way.
    pub rule: Rule,
    /// The round in which it was measured.
    pub round: usize,
    /// Million frames received per second.
    pub mpps: f64,
    /// The same, of the tenth-best part of the window: what the switch does while no neighbour on the host shares the core.
    pub calm_mpps: Option<f64>,
    /// The worker's time-stamp cycles per frame received.
    pub cycles: f64,
    /// What it was like.
    #[serde(flatten)]
    pub on: Conditions,
}

impl Sample {
    /// For who watches.
    pub fn line(&self) -> String {
        let (calm, spoiled) = (self.calm_mpps, self.on.spoiled);
        format!(
            "{:8} {:7} {:5} ({:4} {:4}): {:6.2} Mpps{} {:6.1} cycles | worker {:.3} guest {:.3} steal {:.3}{}",
            self.switch,
            format!("{:?}", self.rule),
            format!("{:?}", self.on.state),
            self.on.trips[0],
            self.on.trips[1],
            self.mpps,
            calm.map_or(String::new(), |c| format!(" (calm {c:6.2})")),
            self.cycles,
            self.on.worker_share,
            self.on.guest_share,
            self.on.steal,
            spoiled.map_or(String::new(), |s| format!(" | spoiled: {s}")),
        )
    }
}

/// Ours beside OVS-DPDK, in one state of the machine.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Beside {
    /// Of the two CPUs, during these windows.
    pub state: State,
    /// Ours: million frames per second. Null if it was not measured, or does not offer the layout.
    pub mpps: Option<Figure>,
    /// Ours: cycles of the worker per frame.
    pub cycles: Option<Figure>,
    /// OVS-DPDK with a rule per in-port.
    pub ovs_mpps: Option<Figure>,
    /// The same.
    pub ovs_cycles: Option<Figure>,
    /// Ours to OVS-DPDK with a rule per in-port, in the same round and state.
    pub ratio: Option<Figure>,
    /// Ours in the calm parts of the windows, while no neighbour on the host shared the worker's core.
    pub calm_mpps: Option<Figure>,
    /// The same of OVS-DPDK with a rule per in-port.
    pub ovs_calm_mpps: Option<Figure>,
    /// Of these two, in the same round and state.
    pub calm_ratio: Option<Figure>,
    /// Of the most of these two: the one that depends least on who else was on the host.
    pub peak_ratio: Option<f64>,
    /// OVS-DPDK that learns addresses.
    pub ovs_normal_mpps: Option<Figure>,
    /// The same.
    pub ovs_normal_cycles: Option<Figure>,
    /// Ours to that, in the same round and state.
    pub ratio_normal: Option<Figure>,
    /// Windows of ours, of OVS by in-port and of OVS that learns.
    pub windows: [usize; 3],
    /// Pairs in `ratio`.
    pub pairs: usize,
}

/// What the good windows in `state` say; `None` if there are none. Where no window was good the others are taken
/// (`spoiled_too`), which is better than nothing if the reader is told.
pub fn beside<'a>(
    samples: impl Iterator<Item = &'a Sample> + Clone,
    state: State,
    spoiled_too: bool,
) -> Option<Beside> {
    let good = |switch: &str, rule: Rule| -> Vec<&Sample> {
        let all = samples.clone();
        all.filter(|w| w.on.state == state && (spoiled_too || w.on.spoiled.is_none()))
            .filter(|w| w.switch == switch && w.rule == rule)
            .collect()
    };
    let ours = good("gangway", Rule::Normal);
    let by_port = good("ovs", Rule::InPort);
    let normal = good("ovs", Rule::Normal);
    if ours.is_empty() && by_port.is_empty() && normal.is_empty() {
        return None;
    }
    let mpps = |w: &[&Sample]| Figure::of(w.iter().map(|w| w.mpps));
    let cycles = |w: &[&Sample]| Figure::of(w.iter().map(|w| w.cycles));
    let calm = |w: &[&Sample]| Figure::of(w.iter().filter_map(|w| w.calm_mpps));
    let ratios = |theirs: &[&Sample], of: fn(&Sample) -> Option<f64>| -> Vec<f64> {
        let pairs = ours.iter().filter_map(|o| {
            let other = theirs.iter().find(|t| t.round == o.round)?;
            Some(of(o)? / of(other)?)
        });
        pairs.collect()
    };
    let ratio = ratios(&by_port, |w| Some(w.mpps));
    Some(Beside {
        state,
        mpps: mpps(&ours),
        cycles: cycles(&ours),
        ovs_mpps: mpps(&by_port),
        ovs_cycles: cycles(&by_port),
        pairs: ratio.len(),
        ratio: Figure::of(ratio),
        calm_mpps: calm(&ours),
        ovs_calm_mpps: calm(&by_port),
        calm_ratio: Figure::of(ratios(&by_port, |w| w.calm_mpps)),
        peak_ratio: calm(&ours)
            .zip(calm(&by_port))
            .map(|(a, b)| round(a.max / b.max)),
        ovs_normal_mpps: mpps(&normal),
        ovs_normal_cycles: cycles(&normal),
        ratio_normal: Figure::of(ratios(&normal, |w| Some(w.mpps))),
        windows: [ours.len(), by_port.len(), normal.len()],
    })
}

/// Ping-pong round trips in nanoseconds.
pub fn round_trip_ns<'a>(
    samples: impl Iterator<Item = &'a Sample>,
    state: State,
    tsc_hz: f64,
) -> Option<Figure> {
    let good = samples.filter(|w| w.on.state == state && w.on.spoiled.is_none());
    Figure::of(good.flat_map(|w| w.on.trips.map(|t| t as f64 / tsc_hz * 1e9)))
}

/// One line of the table.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Cell {
    /// Who stands for the guests.
    pub peer: String,
    /// Ring layout.
    pub ring: Layout,
    /// Frame size without FCS.
    pub frame: usize,
    /// The figures.
    #[serde(flatten)]
    pub beside: Beside,
    /// Of the guest's cycles beside ours, those with nothing to do: near 0, the guest is what is measured.
    pub guest_idle: Option<Figure>,
    /// Of the guest's looks at the transmit ring beside ours, the share that found it empty.
    pub tx_empty: Option<Figure>,
    /// Of its looks at the receive ring, the share that found no free buffer.
    pub rx_full: Option<Figure>,
    /// Ping-pong round trips in nanoseconds.
    pub round_trip_ns: Option<Figure>,
    /// Why a figure is missing.
    pub note: Option<String>,
}

/// Sorts windows into cells.
pub fn cells(results: &Results) -> Vec<Cell> {
    let mut out = Vec::new();
    let mut seen: Vec<(Layout, usize)> = Vec::new();
    for w in &results.windows {
        if !seen.contains(&(w.ring, w.frame)) {
            seen.push((w.ring, w.frame));
        }
    }
    for (ring, frame) in seen {
        for state in [State::Near, State::Far] {
            out.extend(cell(results, ring, frame, state));
        }
    }
    out
}

fn cell(results: &Results, ring: Layout, frame: usize, state: State) -> Option<Cell> {
    let all = results.windows.iter();
    let of_cell = all.filter(|w| (w.ring, w.frame) == (ring, frame));
    let samples = of_cell.clone().map(|w| &w.sample);
    let ours = of_cell.filter(|w| {
        (w.sample.switch, w.sample.on.state) == ("gangway", state) && w.sample.on.spoiled.is_none()
    });
    let share = |count: fn(&Window) -> u64| {
        Figure::of(ours.clone().map(|w| count(w) as f64 / w.seen.rounds as f64))
    };
    let refused = |r: &crate::pvp::Refusal| (r.switch, r.ring) == ("gangway", ring);
    Some(Cell {
        peer: "null-guest".to_owned(),
        ring,
        frame,
        beside: beside(samples.clone(), state, false)?,
        guest_idle: Figure::of(ours.clone().map(|w| w.guest_idle)),
        tx_empty: share(|w| w.seen.tx_empty),
        rx_full: share(|w| w.seen.rx_full),
        round_trip_ns: round_trip_ns(samples, state, results.tsc_hz),
        note: results
            .refusals
            .iter()
            .any(refused)
            .then(|| "unsupported: the switch does not offer this ring layout".to_owned()),
    })
}

/// A table of Markdown: its head, and a line for each row.
pub fn table<const N: usize>(
    head: [&str; N],
    rows: impl IntoIterator<Item = [String; N]>,
) -> String {
    let mut out = format!("| {} |\n|{}\n", head.join(" | "), "---|".repeat(N));
    for row in rows {
        let _ = writeln!(out, "| {} |", row.join(" | "));
    }
    out
}

/// The figures of [`Beside`] as a table has them; [`BESIDE_HEAD`] stands above.
pub fn columns(b: &Beside) -> [String; 7] {
    [
        name(b.state),
        both(b.mpps, b.cycles),
        both(b.ovs_mpps, b.ovs_cycles),
        one(b.ratio, 2),
        both(b.ovs_normal_mpps, b.ovs_normal_cycles),
        one(b.ratio_normal, 2),
        b.pairs.to_string(),
    ]
}

/// See [`columns`].
pub const BESIDE_HEAD: [&str; 7] = [
    "state",
    "Gangway",
    "OVS-DPDK, in_port",
    "ratio",
    "OVS-DPDK, NORMAL",
    "ratio",
    "pairs",
];

/// What stands in a cell where nothing is known.
pub const NOTHING: &str = "-";

/// As in the JSON.
pub fn name(what: impl std::fmt::Debug) -> String {
    format!("{what:?}").to_lowercase()
}

/// The table.
pub fn markdown(cells: &[Cell]) -> String {
    let mut head = [
        "ring",
        "frame",
        "",
        "",
        "",
        "",
        "",
        "",
        "",
        "calm: Gangway",
        "OVS-DPDK",
        "ratio",
        "guest idle",
    ];
    head[2..9].copy_from_slice(&BESIDE_HEAD);
    let rows = cells.iter().map(|c| {
        let percent = |f: Figure| format!("{:.0} %", 100.0 * f.median);
        let b = &c.beside;
        let [state, mut ours, by_port, ratio, normal, ratio_normal, pairs] = columns(b);
        if c.note.is_some() {
            ours = "unsupported".to_owned();
        }
        [
            name(c.ring),
            c.frame.to_string(),
            state,
            ours,
            by_port,
            ratio,
            normal,
            ratio_normal,
            pairs,
            one(b.calm_mpps, 1),
            one(b.ovs_calm_mpps, 1),
            one(b.calm_ratio, 2),
            c.guest_idle.map_or(NOTHING.to_owned(), percent),
        ]
    });
    format!(
        "Mpps: median [least to most] (cycles per frame). Calm: in the calm parts of the windows.\n\n{}",
        table(head, rows)
    )
}

/// Median and span.
pub fn one(f: Option<Figure>, digits: usize) -> String {
    f.map_or(NOTHING.to_owned(), |f| {
        format!(
            "{:.digits$} [{:.digits$} to {:.digits$}]",
            f.median, f.min, f.max
        )
    })
}

/// Median and span of the rate, with the cycles per frame.
pub fn both(mpps: Option<Figure>, cycles: Option<Figure>) -> String {
    match cycles {
        Some(cycles) => format!("{} ({:.0})", one(mpps, 1), cycles.median),
        None => NOTHING.to_owned(),
    }
}

/// What a program leaves: cells as JSON at `out`, the table beside it (`.md`), the picture (`.svg`). `measured`: just now, and not
/// in an earlier run, of which the table's first line tells.
pub fn save<C: Serialize + ?Sized>(
    out: &Path,
    measured: bool,
    cells: &C,
    markdown: &str,
    svg: &str,
) -> Result<()> {
    put(out, &(serde_json::to_string_pretty(cells)? + "\n"))?;
    let path = out.with_extension("md");
    let old = std::fs::read_to_string(&path).unwrap_or_default();
    let origin = match old.lines().next().filter(|_| !measured) {
        Some(line) => line.to_owned(),
        None => crate::page::origin(),
    };
    put(&path, &format!("{origin}\n\n{markdown}"))?;
    put(&out.with_extension("svg"), svg)
}

/// All that was measured, beside the cells (`-windows.json`).
pub fn save_windows<W: Serialize + ?Sized>(out: &Path, windows: &W) -> Result<()> {
    let stem = out.file_stem().unwrap_or_default().to_string_lossy();
    let path = out.with_file_name(format!("{stem}-windows.json"));
    put(&path, &(serde_json::to_string_pretty(windows)? + "\n"))
}

/// The cells of an earlier run.
pub fn load<C: DeserializeOwned>(path: &Path) -> Result<C> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    serde_json::from_str(&text).with_context(|| path.display().to_string())
}

fn put(path: &Path, text: &str) -> Result<()> {
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
    }
    std::fs::write(path, text).with_context(|| path.display().to_string())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn sample(switch: &'static str, rule: Rule, round: usize, mpps: f64) -> Sample {
        let on = Conditions {
            state: State::Near,
            trips: [300, 310],
            worker_share: 1.0,
            guest_share: 1.0,
            steal: 0.0,
            spoiled: None,
        };
        Sample {
            switch,
            rule,
            round,
            mpps,
            calm_mpps: Some(mpps + 1.0),
            cycles: 2600.0 / mpps,
            on,
        }
    }

    #[test]
    fn a_figure_is_least_middle_and_most() {
        assert_eq!(Figure::of([]), None);
        let f = Figure::of([3.0, 1.0, 10.0]).unwrap();
        assert_eq!((f.min, f.median, f.max), (1.0, 3.0, 10.0));
        assert_eq!(Figure::of([1.0, 2.0]).unwrap().median, 1.5);
    }

    #[test]
    fn a_ratio_is_of_windows_in_the_same_round() {
        let mut all = [
            sample("gangway", Rule::Normal, 0, 20.0),
            sample("ovs", Rule::InPort, 0, 10.0),
            sample("gangway", Rule::Normal, 1, 30.0),
            sample("ovs", Rule::InPort, 1, 10.0),
            sample("ovs", Rule::Normal, 1, 5.0),
        ];
        all[2].on.spoiled = Some("noise");
        let b = beside(all.iter(), State::Near, false).unwrap();
        assert_eq!((b.pairs, b.windows), (1, [1, 2, 1]));
        assert_eq!(b.ratio.unwrap().median, 2.0);
        assert_eq!(b.ratio_normal, None, "ours of that round is spoiled");
        let all_of_it = beside(all.iter(), State::Near, true).unwrap();
        assert_eq!(all_of_it.ratio.unwrap().max, 3.0);
        assert!(beside(all.iter(), State::Far, false).is_none());
    }

    #[test]
    fn cells_that_are_written_can_be_read_again() {
        let samples = [sample("gangway", Rule::Normal, 0, 20.0)];
        let cell = Cell {
            peer: "null-guest".to_owned(),
            ring: Layout::Packed,
            frame: 64,
            beside: beside(samples.iter(), State::Near, false).unwrap(),
            guest_idle: None,
            tx_empty: None,
            rx_full: None,
            round_trip_ns: None,
            note: None,
        };
        let json = serde_json::to_string(&[&cell]).unwrap();
        let back: Vec<Cell> = serde_json::from_str(&json).unwrap();
        assert_eq!(serde_json::to_string(&back).unwrap(), json);
        assert!(
            markdown(&back).contains("| packed | 64 | near | 20.0 [20.0 to 20.0] (130) | - | - |")
        );
    }
}
