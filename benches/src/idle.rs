//! What a switch costs that has nothing to do: connected front-ends that send nothing, and the CPU time of its process.
//!
//! OVS-DPDK polls all the time by default; it is also measured with `pmd-maxsleep`, its answer to that. After each window
//! frames must go through: a switch that has stopped would be idle, too.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use serde::{Deserialize, Serialize};

use crate::frames::Pattern;
use crate::guest::{self, Drive, Habits};
use crate::host;
use crate::peer::{Gangway, OVS_HUGEPAGES, Ovs, Rule, Setup, Size, Switch};
use crate::report::{Figure, one, table};
use crate::rig::{Common, Ground, tsc_hz};
use crate::ring::Layout;
use crate::{pvp, sys};

/// What goes through after a window, in frames per second, and for how long.
const PROOF_HZ: f64 = 20_000.0;
const PROOF: Duration = Duration::from_millis(50);
/// After this a switch knows where the receivers are.
const HEARD: Duration = Duration::from_millis(200);
/// The longest sleep of OVS's PMD threads, in microseconds.
const OVS_SLEEP_US: u32 = 500;

/// What to measure.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Where, and how long.
    pub common: Common,
    /// Ring layout.
    pub ring: Layout,
    /// Ports, in pairs.
    pub ports: usize,
    /// Windows of each switch.
    pub windows: usize,
    /// How the guest behaves.
    pub habits: Habits,
}

/// One line of the table.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Cell {
    /// Which switch, and how it waits.
    pub switch: String,
    /// Connected ports.
    pub ports: usize,
    /// Of one CPU, what the switch's process uses, in per cent.
    pub cpu_percent: Figure,
    /// Windows.
    pub windows: usize,
}

/// Measures all of them, in turn.
pub fn measure(plan: &Plan) -> Result<Vec<Cell>> {
    let common = &plan.common;
    if common.with_ovs {
        Ovs::install()?;
    }
    let ovs_pages = if common.with_ovs { OVS_HUGEPAGES } else { 0 };
    let ground = Ground::take(common, pvp::hugepages(plan.ports) + ovs_pages)?;
    let size = Size {
        ports: plan.ports,
        addresses: None,
    };
    let setup = Setup {
        sleeps: true,
        ..Setup::default()
    };
    let (dir, cpu) = (ground.dir(), common.worker_cpu);
    let mut ours = match common.with_gangway {
        true => Some(Gangway::start(&common.switch, dir, &setup, size, &[cpu])?),
        false => None,
    };
    let mut ovs = match common.with_ovs {
        true => Some(Ovs::start(dir, size, &[cpu], common.guest_cpu)?),
        false => None,
    };
    let tsc_hz = tsc_hz();
    let guest_of = |switch: &mut dyn Switch| -> Result<Box<dyn Drive>> {
        let streams = switch.connect()?;
        let guest = guest::start(plan.ring, streams, 64, plan.habits, Pattern::One)?;
        let refused = |_| anyhow!("{} does not offer {:?} rings", switch.name(), plan.ring);
        let mut guest = guest.map_err(refused)?;
        switch.rule(Rule::Normal)?;
        // Nothing is flooded to ports that nobody empties: a switch would try again and again.
        guest.announce();
        std::thread::sleep(HEARD);
        switch.process().pause()?;
        Ok(guest)
    };
    let mut our_guest = ours.as_mut().map(|s| guest_of(s)).transpose()?;
    let mut ovs_guest = ovs.as_mut().map(|s| guest_of(s)).transpose()?;
    host::pin(common.guest_cpu)?;
    let mut found: Vec<(&str, Vec<f64>)> = Vec::new();
    for _ in 0..plan.windows {
        let mut note = |switch: &'static str, cpu: f64| {
            eprintln!("{switch}: {cpu:.2} % of a CPU");
            match found.iter_mut().find(|(s, _)| *s == switch) {
                Some((_, all)) => all.push(cpu),
                None => found.push((switch, vec![cpu])),
            }
        };
        if let (Some(switch), Some(guest)) = (&mut ours, &mut our_guest) {
            note(
                "Gangway, adaptive",
                idle(plan, switch, guest.as_mut(), tsc_hz)?,
            );
        }
        if let (Some(switch), Some(guest)) = (&mut ovs, &mut ovs_guest) {
            for (name, sleep) in [("OVS-DPDK", 0), ("OVS-DPDK, pmd-maxsleep", OVS_SLEEP_US)] {
                switch.process().go_on()?;
                switch.sleep_at_most(sleep)?;
                note(name, idle(plan, switch, guest.as_mut(), tsc_hz)?);
            }
        }
    }
    let cell = |(switch, all): (&str, Vec<f64>)| {
        Some(Cell {
            switch: switch.to_owned(),
            ports: plan.ports,
            windows: all.len(),
            cpu_percent: Figure::of(all)?,
        })
    };
    Ok(found.into_iter().filter_map(cell).collect())
}

/// One window: the CPU time of the switch's process while nobody sends, in per cent of one CPU's.
fn idle(plan: &Plan, switch: &mut dyn Switch, guest: &mut dyn Drive, tsc_hz: f64) -> Result<f64> {
    let common = &plan.common;
    switch.process().go_on()?;
    std::thread::sleep(common.skip);
    let (since, from) = (Instant::now(), switch.process().cpu_ns());
    std::thread::sleep(common.measure);
    let used = switch.process().cpu_ns().saturating_sub(from);
    let cpu = 100.0 * used as f64 / since.elapsed().as_nanos() as f64;
    ensure!(!sys::is_interrupted(), "interrupted");
    let cycles = (PROOF.as_secs_f64() * tsc_hz) as u64;
    let seen = guest.paced(cycles, tsc_hz / PROOF_HZ, false);
    switch.process().check()?;
    ensure!(
        seen.sent > 0 && seen.lost == 0,
        "{}: {} of {} frames are lost after an idle window",
        switch.name(),
        seen.lost,
        seen.sent
    );
    switch.process().pause().context("a pause")?;
    Ok(cpu)
}

/// The table.
pub fn markdown(cells: &[Cell]) -> String {
    let rows = cells.iter().map(|c| {
        [
            c.switch.clone(),
            c.ports.to_string(),
            one(Some(c.cpu_percent), 2),
            c.windows.to_string(),
        ]
    });
    format!(
        "Of one CPU, what a switch's process uses while its ports are idle, in per cent: median [least to most].\n\n{}",
        table(["switch", "idle ports", "% of a CPU", "windows"], rows)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_has_a_line_for_each_switch() {
        let cell = Cell {
            switch: "Gangway".to_owned(),
            ports: 20,
            cpu_percent: Figure {
                min: 0.4,
                median: 1.0,
                max: 100.0,
            },
            windows: 3,
        };
        let json = serde_json::to_string(&[cell]).unwrap();
        let back: Vec<Cell> = serde_json::from_str(&json).unwrap();
        assert!(markdown(&back).contains("| Gangway | 20 | 1.00 [0.40 to 100.00] | 3 |"));
    }
}
