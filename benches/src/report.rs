//! What is made of the windows: a cell for each ring layout, frame size and state; JSON and a Markdown table.

use std::fmt::Write;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::peer::Rule;
use crate::pingpong::State;
use crate::pvp::{Results, Window};
use crate::ring::Layout;

/// Of several windows.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
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

/// One line of the table.
#[derive(Debug, Clone, Serialize)]
pub struct Cell {
    /// Who stands for the guests.
    pub peer: &'static str,
    /// Ring layout.
    pub ring: Layout,
    /// Frame size without FCS.
    pub frame: usize,
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
    /// Of the guest's cycles beside ours, those with nothing to do: near 0, the guest is what is measured.
    pub guest_idle: Option<Figure>,
    /// Of the guest's looks at the transmit ring beside ours, the share that found it empty.
    pub tx_empty: Option<Figure>,
    /// Of its looks at the receive ring, the share that found no free buffer.
    pub rx_full: Option<Figure>,
    /// Ping-pong round trips in nanoseconds.
    pub round_trip_ns: Option<Figure>,
    /// Why a figure is missing.
    pub note: Option<&'static str>,
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
    let good = |switch: &str, rule: Rule| -> Vec<&Window> {
        let all = results.windows.iter();
        all.filter(|w| (w.ring, w.frame, w.state) == (ring, frame, state))
            .filter(|w| w.spoiled.is_none() && w.switch == switch && w.rule == rule)
            .collect()
    };
    let ours = good("gangway", Rule::Normal);
    let by_port = good("ovs", Rule::InPort);
    let normal = good("ovs", Rule::Normal);
    if ours.is_empty() && by_port.is_empty() && normal.is_empty() {
        return None;
    }
    let mpps = |w: &[&Window]| Figure::of(w.iter().map(|w| w.mpps));
    let cycles = |w: &[&Window]| Figure::of(w.iter().map(|w| w.cycles));
    let calm = |w: &[&Window]| Figure::of(w.iter().map(|w| w.calm_mpps));
    let ratios = |theirs: &[&Window], of: fn(&Window) -> f64| -> Vec<f64> {
        let pairs = ours.iter().filter_map(|o| {
            let other = theirs.iter().find(|t| t.round == o.round)?;
            Some(of(o) / of(other))
        });
        pairs.collect()
    };
    let ratio = ratios(&by_port, |w| w.mpps);
    let share = |count: fn(&Window) -> u64| {
        Figure::of(ours.iter().map(|w| count(w) as f64 / w.seen.rounds as f64))
    };
    let everyone = ours.iter().chain(&by_port).chain(&normal);
    let refused = |r: &crate::pvp::Refusal| (r.switch, r.ring) == ("gangway", ring);
    Some(Cell {
        peer: "null-guest",
        ring,
        frame,
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
        ratio_normal: Figure::of(ratios(&normal, |w| w.mpps)),
        windows: [ours.len(), by_port.len(), normal.len()],
        guest_idle: Figure::of(ours.iter().map(|w| w.guest_idle)),
        tx_empty: share(|w| w.seen.tx_empty),
        rx_full: share(|w| w.seen.rx_full),
        round_trip_ns: Figure::of(
            everyone.flat_map(|w| w.trips.map(|t| t as f64 / results.tsc_hz * 1e9)),
        ),
        note: results
            .refusals
            .iter()
            .any(refused)
            .then_some("unsupported: the switch does not offer this ring layout"),
    })
}

/// The table.
pub fn markdown(cells: &[Cell]) -> String {
    let mut out = String::from(
        "Mpps: median [least to most] (cycles per frame). Calm: in the calm parts of the windows; its ratio is that of the two mosts.\n\n\
         | ring | frame | state | Gangway | OVS-DPDK, in_port | ratio | calm: Gangway | OVS-DPDK | ratio | OVS-DPDK, NORMAL | ratio | pairs | guest idle |\n\
         |---|---|---|---|---|---|---|---|---|---|---|---|---|\n",
    );
    for c in cells {
        let or_unsupported = |text: String| match c.note {
            Some(_) => "unsupported".to_owned(),
            None => text,
        };
        let percent = |f: Figure| format!("{:.0} %", 100.0 * f.median);
        let fields = [
            format!("{:?}", c.ring).to_lowercase(),
            c.frame.to_string(),
            format!("{:?}", c.state).to_lowercase(),
            or_unsupported(both(c.mpps, c.cycles)),
            both(c.ovs_mpps, c.ovs_cycles),
            one(c.ratio, 2),
            or_unsupported(one(c.calm_mpps, 1)),
            one(c.ovs_calm_mpps, 1),
            c.peak_ratio.map_or("-".to_owned(), |r| format!("{r:.2}")),
            both(c.ovs_normal_mpps, c.ovs_normal_cycles),
            one(c.ratio_normal, 2),
            c.pairs.to_string(),
            c.guest_idle.map_or("-".to_owned(), percent),
        ];
        let _ = writeln!(out, "| {} |", fields.join(" | "));
    }
    out
}

fn one(f: Option<Figure>, digits: usize) -> String {
    f.map_or("-".to_owned(), |f| {
        format!(
            "{:.digits$} [{:.digits$} to {:.digits$}]",
            f.median, f.min, f.max
        )
    })
}

fn both(mpps: Option<Figure>, cycles: Option<Figure>) -> String {
    match cycles {
        Some(cycles) => format!("{} ({:.0})", one(mpps, 1), cycles.median),
        None => "-".to_owned(),
    }
}

/// Writes the cells to `out`, the table beside it (`.md`), and every window (`-windows.json`).
pub fn write(out: &Path, cells: &[Cell], results: &Results) -> Result<()> {
    let save = |path: &Path, text: String| {
        std::fs::write(path, text).with_context(|| path.display().to_string())
    };
    if let Some(dir) = out.parent() {
        std::fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
    }
    save(out, serde_json::to_string_pretty(cells)? + "\n")?;
    save(&out.with_extension("md"), markdown(cells))?;
    let stem = out.file_stem().unwrap_or_default().to_string_lossy();
    let windows = out.with_file_name(format!("{stem}-windows.json"));
    save(
        &windows,
        serde_json::to_string_pretty(&results.windows)? + "\n",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_figure_is_least_middle_and_most() {
        assert_eq!(Figure::of([]), None);
        let f = Figure::of([3.0, 1.0, 10.0]).unwrap();
        assert_eq!((f.min, f.median, f.max), (1.0, 3.0, 10.0));
        assert_eq!(Figure::of([1.0, 2.0]).unwrap().median, 1.5);
    }
}
