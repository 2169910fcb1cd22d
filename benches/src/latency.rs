//! How long a frame is on its way to a station and back, while a switch carries a tenth, a half, nine tenths of what it
//! could.
//!
//! The null guest sends frames with a time stamp at a steady rate from one port; at the other they go back with the same
//! stamp. The time counts from when a frame was due, so that what could not be sent in time is not forgotten ("coordinated
//! omission"). What a switch could carry is measured right before, in the same window: as many round trips as it takes.

use anyhow::{Result, anyhow, bail};
use serde::{Deserialize, Serialize};

use crate::frames::Pattern;
use crate::guest::{self, Drive, Habits, Paced};
use crate::host::Task;
use crate::peer::{Rule, Size, Switch};
use crate::pingpong::State;
use crate::report::{Figure, NOTHING, name, one, table};
use crate::rig::{self, Common, Conditions, Meter, Rig, tsc_hz};
use crate::ring::Layout;
use crate::{pvp, sys};

const ROUNDS_PER_PAIR: usize = 3;
/// Of the time of a window, what goes into finding out what the switch carries; each load has an equal part of the rest.
const FLOOD_SHARE: f64 = 0.2;

/// What to measure.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Where, and how long.
    pub common: Common,
    /// Ring layout.
    pub ring: Layout,
    /// Frame sizes without FCS.
    pub frames: Vec<usize>,
    /// Loads, as parts of what the switch carries.
    pub loads: Vec<f64>,
    /// Good rounds, in which each switch has a turn, in one state.
    pub pairs: usize,
    /// How the guest behaves.
    pub habits: Habits,
}

/// A load in a window.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Loaded {
    /// Of what the switch carries.
    pub load: f64,
    /// Million round trips per second.
    pub mpps: f64,
    /// Half of the frames were back by then, in microseconds.
    pub median_us: f64,
    /// 99 in 100.
    pub p99_us: f64,
    /// 999 in 1000.
    pub p999_us: f64,
    /// The longest.
    pub max_us: f64,
    /// Of all frames, those that were sent more than a microsecond late.
    pub late: f64,
    /// Frames that did not come back.
    pub lost: u64,
    /// Of these, those that the echoing station had no room for.
    pub unechoed: u64,
}

/// One window's result.
#[derive(Debug, Clone, Serialize)]
pub struct Window {
    /// Which switch.
    pub switch: &'static str,
    /// How it found the way.
    pub rule: Rule,
    /// The round in which it was measured.
    pub round: usize,
    /// Frame size.
    pub frame: usize,
    /// Million round trips per second that it carries.
    pub most_mpps: f64,
    /// Times.
    pub loads: Vec<Loaded>,
    /// What it was like.
    #[serde(flatten)]
    pub on: Conditions,
}

/// Measures all cells.
pub fn measure(plan: &Plan) -> Result<Vec<Window>> {
    let size = Size {
        ports: 2,
        addresses: None,
    };
    let mut rig = Rig::start(&plan.common, size, pvp::hugepages(2))?;
    let tsc_hz = tsc_hz();
    let mut windows: Vec<Window> = Vec::new();
    for &frame in &plan.frames {
        let mut turns = Vec::new();
        for (switch, rules) in &mut rig.switches {
            switch.process().go_on()?;
            let streams = switch.connect()?;
            let guest = guest::start(plan.ring, streams, frame, plan.habits, Pattern::One)?;
            let refused = |_| anyhow!("{} does not offer {:?} rings", switch.name(), plan.ring);
            let guest = guest.map_err(refused)?;
            switch.process().pause()?;
            turns.push((switch.as_mut(), *rules, guest));
        }
        for round in 0..plan.pairs * ROUNDS_PER_PAIR {
            let of_cell = windows.iter().filter(|w| w.frame == frame);
            let so_far: Vec<_> = of_cell.map(|w| (w.round, w.on)).collect();
            if rig::enough(&so_far, plan.pairs) {
                break;
            }
            for (switch, rules, guest) in &mut turns {
                for &rule in *rules {
                    let at = (rule, round, frame);
                    let window = take(plan, *switch, guest.as_mut(), at, tsc_hz)?;
                    eprintln!("{}", line(&window));
                    windows.push(window);
                }
            }
        }
        for (switch, _, guest) in turns {
            switch.process().go_on()?;
            guest.stop()?;
            switch.process().pause()?;
        }
    }
    Ok(windows)
}

/// One window.
fn take(
    plan: &Plan,
    switch: &mut dyn Switch,
    guest: &mut dyn Drive,
    (rule, round, frame): (Rule, usize, usize),
    tsc_hz: f64,
) -> Result<Window> {
    let common = &plan.common;
    let before = rig::before(common)?;
    switch.process().go_on()?;
    switch.rule(rule)?;
    let cycles = |seconds: f64| (seconds * tsc_hz) as u64;
    // Both stations are heard.
    guest.paced(cycles(common.skip.as_secs_f64()), 0.0, true);
    let meter = Meter::start(common, switch, Task::current(), before)?;
    let seconds = common.measure.as_secs_f64();
    let flood = guest.paced(cycles(FLOOD_SHARE * seconds), 0.0, true);
    let most = carried(&flood);
    if most <= 0.0 {
        let said = switch.process().said();
        bail!("{}: no frame comes back; it said:\n{said}", switch.name());
    }
    let part = (1.0 - FLOOD_SHARE) * seconds / plan.loads.len().max(1) as f64;
    let mut loads = Vec::new();
    for &load in &plan.loads {
        let seen = guest.paced(cycles(part), 1.0 / (load * most), true);
        loads.push(loaded(&seen, load, tsc_hz)?);
    }
    let closed = meter.stop()?;
    switch.process().pause()?;
    let on = closed.conditions(common)?;
    switch.process().check()?;
    if sys::is_interrupted() {
        bail!("interrupted");
    }
    Ok(Window {
        switch: switch.name(),
        rule,
        round,
        frame,
        most_mpps: most * tsc_hz / 1e6,
        loads,
        on,
    })
}

/// Round trips per cycle.
fn carried(seen: &Paced) -> f64 {
    seen.sent.saturating_sub(seen.lost) as f64 / seen.cycles.max(1) as f64
}

fn loaded(seen: &Paced, load: f64, tsc_hz: f64) -> Result<Loaded> {
    let us = |share: f64| {
        let time = seen.times.quantile(share);
        time.map(|t| t as f64 / tsc_hz * 1e6)
    };
    let (Some(median_us), Some(p99_us), Some(p999_us)) = (us(0.5), us(0.99), us(0.999)) else {
        bail!(
            "no frame came back at a load of {load}: {} were sent",
            seen.sent
        );
    };
    Ok(Loaded {
        load,
        mpps: seen.sent as f64 / seen.cycles.max(1) as f64 * tsc_hz / 1e6,
        median_us,
        p99_us,
        p999_us,
        max_us: seen.times.max() as f64 / tsc_hz * 1e6,
        late: seen.late as f64 / seen.sent.max(1) as f64,
        lost: seen.lost,
        unechoed: seen.unechoed,
    })
}

fn line(w: &Window) -> String {
    let loads = w.loads.iter().map(|l| {
        format!(
            " | {:.0} %: {:.1} {:.1} {:.1} us, late {:.3}, lost {}",
            100.0 * l.load,
            l.median_us,
            l.p99_us,
            l.p999_us,
            l.late,
            l.lost
        )
    });
    format!(
        "{:4} B {:8} {:7} {:5}: carries {:.2} Mpps{}{}",
        w.frame,
        w.switch,
        name(w.rule),
        name(w.on.state),
        w.most_mpps,
        loads.collect::<String>(),
        w.on.spoiled
            .map_or(String::new(), |s| format!(" | spoiled: {s}")),
    )
}

/// Times of one switch in a cell, in microseconds.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Times {
    /// Million round trips per second.
    pub mpps: Figure,
    /// Half of the frames.
    pub median_us: Figure,
    /// 99 in 100.
    pub p99_us: Figure,
    /// 999 in 1000.
    pub p999_us: Figure,
    /// Of all frames, those that were sent more than a microsecond late, in per cent: what is measured then is the queue
    /// before the switch.
    pub late_percent: Figure,
    /// Frames that did not come back, of all windows.
    pub lost: u64,
    /// Of these, those that the echoing station had no room for.
    pub unechoed: u64,
    /// Windows.
    pub windows: usize,
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
    /// Of what each switch carries.
    pub load: f64,
    /// Of the two CPUs.
    pub state: State,
    /// Ours.
    pub gangway: Option<Times>,
    /// OVS-DPDK with a rule per in-port.
    pub ovs: Option<Times>,
    /// OVS-DPDK that learns addresses.
    pub ovs_normal: Option<Times>,
}

/// Sorts windows into cells.
pub fn cells(plan: &Plan, windows: &[Window]) -> Vec<Cell> {
    let mut out = Vec::new();
    for &frame in &plan.frames {
        for state in [State::Near, State::Far] {
            let good = |switch: &str, rule: Rule| -> Vec<&Window> {
                let all = windows.iter();
                all.filter(|w| (w.frame, w.on.state) == (frame, state) && w.on.spoiled.is_none())
                    .filter(|w| w.switch == switch && w.rule == rule)
                    .collect()
            };
            let ours = good("gangway", Rule::Normal);
            let (by_port, normal) = (good("ovs", Rule::InPort), good("ovs", Rule::Normal));
            if ours.is_empty() && by_port.is_empty() && normal.is_empty() {
                continue;
            }
            for (i, &load) in plan.loads.iter().enumerate() {
                out.push(Cell {
                    peer: "null-guest".to_owned(),
                    ring: plan.ring,
                    frame,
                    load,
                    state,
                    gangway: times(&ours, i),
                    ovs: times(&by_port, i),
                    ovs_normal: times(&normal, i),
                });
            }
        }
    }
    out
}

fn times(windows: &[&Window], i: usize) -> Option<Times> {
    let loads = || windows.iter().filter_map(|w| w.loads.get(i));
    let figure = |of: fn(&Loaded) -> f64| Figure::of(loads().map(of));
    Some(Times {
        mpps: figure(|l| l.mpps)?,
        median_us: figure(|l| l.median_us)?,
        p99_us: figure(|l| l.p99_us)?,
        p999_us: figure(|l| l.p999_us)?,
        late_percent: figure(|l| 100.0 * l.late)?,
        lost: loads().map(|l| l.lost).sum(),
        unechoed: loads().map(|l| l.unechoed).sum(),
        windows: loads().count(),
    })
}

/// The table.
pub fn markdown(cells: &[Cell]) -> String {
    let head = [
        "frame",
        "load",
        "state",
        "switch",
        "Mpps",
        "sent late, %",
        "median",
        "99 %",
        "99.9 %",
        "lost",
        "at the station",
        "windows",
    ];
    let rows = cells.iter().flat_map(|c| {
        let all = [
            ("Gangway", c.gangway),
            ("OVS-DPDK, in_port", c.ovs),
            ("OVS-DPDK, NORMAL", c.ovs_normal),
        ];
        all.map(|(switch, times)| {
            let figure = |of: fn(&Times) -> Figure| one(times.as_ref().map(of), 1);
            let count = |of: fn(&Times) -> u64| {
                times
                    .as_ref()
                    .map_or(NOTHING.to_owned(), |t| of(t).to_string())
            };
            [
                c.frame.to_string(),
                format!("{:.0} %", 100.0 * c.load),
                name(c.state),
                switch.to_owned(),
                figure(|t| t.mpps),
                figure(|t| t.late_percent),
                figure(|t| t.median_us),
                figure(|t| t.p99_us),
                figure(|t| t.p999_us),
                count(|t| t.lost),
                count(|t| t.unechoed),
                count(|t| t.windows as u64),
            ]
        })
    });
    format!(
        "Round trips in microseconds, of windows: median [least to most]; load: of what the switch at hand carries.\n\n{}",
        table(head, rows)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_become_times_of_the_good_ones() {
        let sample = crate::report::tests::sample("gangway", Rule::Normal, 0, 1.0);
        let window = |median_us, spoiled| Window {
            switch: "gangway",
            rule: Rule::Normal,
            round: 0,
            frame: 64,
            most_mpps: 10.0,
            loads: vec![Loaded {
                load: 0.5,
                mpps: 5.0,
                median_us,
                p99_us: 2.0 * median_us,
                p999_us: 3.0 * median_us,
                max_us: 100.0,
                late: 0.0,
                lost: 1,
                unechoed: 0,
            }],
            on: Conditions {
                spoiled,
                ..sample.on
            },
        };
        let plan = Plan {
            common: Common {
                switch: Default::default(),
                with_ovs: false,
                with_gangway: true,
                worker_cpu: 0,
                guest_cpu: 1,
                skip: Default::default(),
                measure: Default::default(),
                quiet: Default::default(),
                near_max: 600,
            },
            ring: Layout::Split,
            frames: vec![64, 1514],
            loads: vec![0.5],
            pairs: 1,
            habits: Habits {
                ring_size: 256,
                batch: 32,
                mergeable: true,
                pauses: 1,
                full: false,
                gather: false,
            },
        };
        let cells = cells(
            &plan,
            &[
                window(3.0, None),
                window(5.0, None),
                window(90.0, Some("noise")),
            ],
        );
        assert_eq!(cells.len(), 1, "nothing was measured at 1514");
        let t = cells[0].gangway.unwrap();
        assert_eq!(
            (t.median_us.median, t.p99_us.max, t.lost, t.windows),
            (4.0, 10.0, 2, 2)
        );
        let json = serde_json::to_string(&cells).unwrap();
        let back: Vec<Cell> = serde_json::from_str(&json).unwrap();
        assert!(markdown(&back).contains("| 64 | 50 % | near | OVS-DPDK, NORMAL | - |"));
    }

    #[test]
    fn what_is_carried_came_back() {
        let mut seen = Paced {
            sent: 100,
            lost: 40,
            cycles: 600,
            ..Paced::default()
        };
        assert_eq!(carried(&seen), 0.1);
        assert!(loaded(&seen, 0.1, 1e9).is_err(), "no times");
        (1..=100).for_each(|t| seen.times.record(1000 * t));
        let l = loaded(&seen, 0.1, 1e9).unwrap();
        assert!(
            (l.median_us - 50.0).abs() < 1.0 && (l.p99_us - 99.0).abs() < 2.0,
            "{l:?}"
        );
    }
}
