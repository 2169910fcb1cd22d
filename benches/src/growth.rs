//! How the rates change with the number of ports, of flows, of addresses and of workers.
//!
//! * Ports: half of them send, each to one of the other half; one guest thread serves all.
//! * Flows: between one pair of ports, the frames differ in IPv4 addresses and the UDP source port.
//! * Addresses: between one pair of ports, pairs of stations, one flow each; the receiving ones were heard before.
//! * Workers: between two pairs of ports ([`mod@crate::workers`]).
//!
//! For flows and addresses the guest writes into each frame that it sends, in random order, also where there is only one
//! flow; for ports it does not.

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::frames::Pattern;
use crate::guest::Habits;
use crate::peer::Size;
use crate::pingpong::State;
use crate::pvp::{self, Window};
use crate::report::{BESIDE_HEAD, Beside, Figure, NOTHING, beside, columns, name, one, table};
use crate::rig::{Common, Rig};
use crate::ring::Layout;
use crate::workers;

/// What grows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Axis {
    /// Ports of the switch.
    Ports,
    /// Flows between two ports.
    Flows,
    /// Stations behind two ports.
    Addresses,
    /// Workers of the switch.
    Workers,
}

impl Axis {
    /// All of them.
    pub const ALL: [Axis; 4] = [Axis::Ports, Axis::Flows, Axis::Addresses, Axis::Workers];

    /// For a heading.
    pub fn title(self) -> &'static str {
        match self {
            Axis::Ports => "ports, in pairs of sender and receiver",
            Axis::Flows => "flows in random order",
            Axis::Addresses => "addresses, in pairs in random order",
            Axis::Workers => "workers, which share two CPUs with the guest",
        }
    }
}

/// What to measure.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Where, and how long.
    pub common: Common,
    /// Ring layout.
    pub ring: Layout,
    /// Frame size without FCS.
    pub frame: usize,
    /// Good rounds, in which each switch has a turn, in one state.
    pub pairs: usize,
    /// How the guest behaves.
    pub habits: Habits,
    /// Numbers of ports, even.
    pub ports: Vec<usize>,
    /// Numbers of flows.
    pub flows: Vec<u32>,
    /// Numbers of addresses, even.
    pub addresses: Vec<u32>,
    /// Numbers of workers.
    pub workers: Vec<usize>,
}

/// A window, and where on its axis.
#[derive(Debug, Clone, Serialize)]
pub struct Point {
    /// What grows.
    pub axis: Axis,
    /// How much of it.
    pub n: usize,
    /// What was measured.
    #[serde(flatten)]
    pub window: Window,
}

/// Everything that was measured.
#[derive(Debug, Default)]
pub struct Results {
    /// In the order of time.
    pub points: Vec<Point>,
    /// Time-stamp cycles per second.
    pub tsc_hz: f64,
}

impl Plan {
    fn cell(&self, ports: usize, pattern: Pattern) -> pvp::Plan {
        pvp::Plan {
            common: self.common.clone(),
            frames: vec![self.frame],
            rings: vec![self.ring],
            pairs: self.pairs,
            ports,
            habits: self.habits,
            pattern,
        }
    }
}

/// Measures all points.
pub fn measure(plan: &Plan) -> Result<Results> {
    let mut results = Results::default();
    let mut add = |axis: Axis, n: usize, found: pvp::Results| {
        results.tsc_hz = found.tsc_hz;
        let point = |window| Point { axis, n, window };
        results.points.extend(found.windows.into_iter().map(point));
    };
    for &ports in &plan.ports {
        eprintln!("{ports} ports");
        let found = pvp::measure(&plan.cell(ports, Pattern::One))?;
        add(Axis::Ports, ports, found);
    }
    let start = |addresses| {
        let size = Size {
            ports: 2,
            addresses,
        };
        Rig::start(&plan.common, size, pvp::hugepages(2))
    };
    if !plan.flows.is_empty() {
        let mut rig = start(None)?;
        for &flows in &plan.flows {
            eprintln!("{flows} flows");
            let cell = plan.cell(2, Pattern::Flows(flows));
            add(
                Axis::Flows,
                flows as usize,
                pvp::measure_on(&cell, &mut rig)?,
            );
        }
    }
    for &addresses in &plan.addresses {
        eprintln!("{addresses} addresses");
        // Its tables are empty, and those of the switch that had fewer are not in the way.
        let mut rig = start(Some(addresses as usize))?;
        let cell = plan.cell(2, Pattern::Pairs((addresses / 2).max(1)));
        add(
            Axis::Addresses,
            addresses as usize,
            pvp::measure_on(&cell, &mut rig)?,
        );
    }
    for &n in &plan.workers {
        eprintln!("{n} workers");
        add(Axis::Workers, n, workers::measure(plan, n)?);
    }
    Ok(results)
}

/// One line of the table.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Cell {
    /// Who stands for the guests.
    pub peer: String,
    /// What grows.
    pub axis: Axis,
    /// How much of it.
    pub n: usize,
    /// Ring layout.
    pub ring: Layout,
    /// Frame size without FCS.
    pub frame: usize,
    /// The figures.
    #[serde(flatten)]
    pub beside: Beside,
    /// What the guest could do beside ours, if it never had to wait: by its cycles per frame in rounds that had work.
    pub guest_bound_mpps: Option<Figure>,
    /// Of the guest's cycles beside ours, those with nothing to do: near 0, the guest is what is measured.
    pub guest_idle: Option<Figure>,
    /// No window was good: these are of spoiled ones (with so many new flows a peer has work on the guest's CPU).
    pub spoiled: Option<String>,
}

/// Sorts points into cells.
pub fn cells(results: &Results) -> Vec<Cell> {
    let mut seen: Vec<(Axis, usize)> = Vec::new();
    for p in &results.points {
        if !seen.contains(&(p.axis, p.n)) {
            seen.push((p.axis, p.n));
        }
    }
    let mut out = Vec::new();
    for (axis, n) in seen {
        let all = results.points.iter();
        let windows: Vec<&Window> = all
            .filter(|p| (p.axis, p.n) == (axis, n))
            .map(|p| &p.window)
            .collect();
        let before = out.len();
        for state in [State::Near, State::Far] {
            out.extend(cell(results.tsc_hz, axis, n, &windows, state, false));
        }
        // Both switches, or the ones that no window counts of.
        let is_whole = |c: &Cell| {
            let [ours, by_port, normal] = c.beside.windows;
            let wanted = |switch: &str| windows.iter().any(|w| w.sample.switch == switch);
            (ours > 0 || !wanted("gangway")) && (by_port.min(normal) > 0 || !wanted("ovs"))
        };
        if !out[before..].iter().any(is_whole) {
            for state in [State::Near, State::Far, State::Mixed] {
                out.extend(cell(results.tsc_hz, axis, n, &windows, state, true));
            }
        }
    }
    out
}

fn cell(
    tsc_hz: f64,
    axis: Axis,
    n: usize,
    windows: &[&Window],
    state: State,
    spoiled: bool,
) -> Option<Cell> {
    let samples = windows.iter().map(|w| &w.sample);
    let first = windows.first()?;
    let ours = windows.iter().filter(|w| {
        (w.sample.switch, w.sample.on.state) == ("gangway", state)
            && (spoiled || w.sample.on.spoiled.is_none())
    });
    let why = |w: &&&Window| w.sample.on.state == state && w.sample.on.spoiled.is_some();
    let why = windows.iter().find(why).and_then(|w| w.sample.on.spoiled);
    if spoiled && why.is_none() {
        return None;
    }
    // Where it shares its CPUs its clock does not tell.
    let of_guest = |get: &dyn Fn(&Window) -> f64| {
        let all = ours.clone().map(|w| get(w));
        Figure::of(all).filter(|_| axis != Axis::Workers)
    };
    Some(Cell {
        peer: "null-guest".to_owned(),
        axis,
        n,
        ring: first.ring,
        frame: first.frame,
        beside: beside(samples, state, spoiled)?,
        guest_bound_mpps: of_guest(&|w| tsc_hz / w.guest_cycles / 1e6),
        guest_idle: of_guest(&|w| w.guest_idle),
        spoiled: spoiled.then(|| why.unwrap_or_default().to_owned()),
    })
}

/// What a reader of figures for workers must know.
const SHARED: &str = " Workers: two pairs of ports, a thread of the guest for each; with one worker and with two, of either \
    switch, all of them have the same two CPUs, and none gives one away before the kernel takes it: the second worker has no CPU \
    of its own.";

/// The table.
pub fn markdown(cells: &[Cell]) -> String {
    let mut head = [""; 12];
    head[..2].copy_from_slice(&["what grows", "to"]);
    head[2..9].copy_from_slice(&BESIDE_HEAD);
    head[9..].copy_from_slice(&["the guest's bound", "guest idle", "note"]);
    let rows = cells.iter().map(|c| {
        let [a, b, d, e, f, g, h] = columns(&c.beside);
        let percent = |f: Figure| format!("{:.0} %", 100.0 * f.median);
        [
            name(c.axis),
            c.n.to_string(),
            a,
            b,
            d,
            e,
            f,
            g,
            h,
            one(c.guest_bound_mpps, 1),
            c.guest_idle.map_or(NOTHING.to_owned(), percent),
            c.spoiled
                .as_ref()
                .map_or(String::new(), |s| format!("spoiled: {s}")),
        ]
    });
    format!(
        "Mpps: median [least to most] (cycles of the switch's worker per frame). The guest's bound: what it could do beside \
         Gangway if it never had to wait.{}\n\n{}",
        match cells.iter().any(|c| c.axis == Axis::Workers) {
            true => SHARED,
            false => "",
        },
        table(head, rows)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::Seen;
    use crate::peer::Rule;
    use crate::report::tests::sample;

    fn point(axis: Axis, n: usize, switch: &'static str, rule: Rule, mpps: f64) -> Point {
        Point {
            axis,
            n,
            window: Window {
                ring: Layout::Split,
                frame: 64,
                sample: sample(switch, rule, 0, mpps),
                guest_idle: 0.5,
                guest_cycles: 26.0,
                seen: Seen::default(),
            },
        }
    }

    #[test]
    fn points_become_cells_and_spoiled_ones_say_so() {
        let mut points = vec![
            point(Axis::Ports, 2, "gangway", Rule::Normal, 20.0),
            point(Axis::Ports, 2, "ovs", Rule::InPort, 10.0),
            point(Axis::Ports, 2, "ovs", Rule::Normal, 8.0),
            point(Axis::Addresses, 1000, "gangway", Rule::Normal, 5.0),
            point(Axis::Addresses, 1000, "ovs", Rule::InPort, 1.0),
            point(Axis::Addresses, 1000, "ovs", Rule::Normal, 0.5),
        ];
        points[5].window.sample.on.spoiled = Some("noise");
        points.push(point(Axis::Workers, 2, "gangway", Rule::Normal, 7.0));
        let results = Results {
            points,
            tsc_hz: 2.6e9,
        };
        let cells = cells(&results);
        assert_eq!(cells.len(), 4, "ports; addresses, good and all; workers");
        assert_eq!(cells[3].guest_bound_mpps, None, "it shared its CPUs");
        assert_eq!(cells[0].guest_bound_mpps.unwrap().median, 100.0);
        assert_eq!(cells[0].beside.ratio_normal.unwrap().median, 2.5);
        assert_eq!(cells[1].beside.ovs_normal_mpps, None);
        assert_eq!(cells[2].spoiled.as_deref(), Some("noise"));
        assert_eq!(cells[2].beside.ratio_normal.unwrap().median, 10.0);
        let json = serde_json::to_string(&cells).unwrap();
        let back: Vec<Cell> = serde_json::from_str(&json).unwrap();
        assert!(markdown(&back).contains("spoiled: noise"));
        assert!(markdown(&back).contains("no CPU of its own"));
        assert!(!markdown(&back[..3]).contains("no CPU of its own"));
    }
}
