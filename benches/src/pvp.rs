//! Port to VM to port: a null guest between two ports of a switch, in windows that take turns.
//!
//! A window is: ping-pong, let the switch run, warm up, measure, stop the switch, ping-pong. Whatever else runs here, and
//! a host that moves virtual CPUs about, spoils a window; it is then kept in the raw results with the reason, and does
//! not count.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::frames::Pattern;
use crate::guest::{self, Drive, Habits, Seen};
use crate::host::Task;
use crate::peer::{Rule, Size, Switch};
use crate::report::Sample;
use crate::rig::{self, Common, Meter, Rig, tsc_hz};
use crate::ring::Layout;
use crate::sys;

/// Hugepages of 2 MB for the memory of a port's guest.
const PORT_HUGEPAGES: u64 = 4;
/// How often a round may be repeated, on average, because a window was spoiled or the state changed.
pub const ROUNDS_PER_PAIR: usize = 3;
/// The first frame must come within this.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// What to measure.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Where, and how long.
    pub common: Common,
    /// Frame sizes without FCS.
    pub frames: Vec<usize>,
    /// Ring layouts.
    pub rings: Vec<Layout>,
    /// Good rounds, in which each switch has a turn, in one state.
    pub pairs: usize,
    /// Ports, in pairs.
    pub ports: usize,
    /// How the guest behaves.
    pub habits: Habits,
    /// What the frames differ in.
    pub pattern: Pattern,
}

/// One window's result.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Window {
    /// Ring layout.
    pub ring: Layout,
    /// Frame size.
    pub frame: usize,
    /// What is compared.
    #[serde(flatten)]
    pub sample: Sample,
    /// Of the guest's cycles, those that found nothing to do.
    pub guest_idle: f64,
    /// Of the guest's busy cycles, how many per frame.
    pub guest_cycles: f64,
    /// The guest's own figures.
    pub seen: Seen,
}

/// A layout that a switch does not offer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refusal {
    /// Which switch.
    pub switch: &'static str,
    /// Which layout.
    pub ring: Layout,
}

/// Everything that was measured.
#[derive(Debug, Default)]
pub struct Results {
    /// In the order of time.
    pub windows: Vec<Window>,
    /// What could not be.
    pub refusals: Vec<Refusal>,
    /// Time-stamp cycles per second.
    pub tsc_hz: f64,
    /// Whether all guests' memory lay in hugepages.
    pub is_huge: bool,
}

struct Turn<'a> {
    switch: &'a mut dyn Switch,
    guest: Box<dyn Drive>,
    rules: &'static [Rule],
}

/// Measures all cells.
pub fn measure(plan: &Plan) -> Result<Results> {
    let size = Size {
        ports: plan.ports,
        addresses: None,
    };
    let mut rig = Rig::start(&plan.common, size, hugepages(plan.ports))?;
    measure_on(plan, &mut rig)
}

/// Hugepages of 2 MB that the guests of `ports` ports take.
pub fn hugepages(ports: usize) -> u64 {
    // Every switch has guests of its own.
    2 * PORT_HUGEPAGES * ports as u64
}

/// The same on switches that run already, with as many ports as the plan says.
pub fn measure_on(plan: &Plan, rig: &mut Rig) -> Result<Results> {
    let mut results = Results {
        is_huge: true,
        tsc_hz: tsc_hz(),
        ..Results::default()
    };
    for &ring in &plan.rings {
        for &frame in &plan.frames {
            cell(plan, ring, frame, &mut rig.switches, &mut results)?;
        }
    }
    Ok(results)
}

fn cell(
    plan: &Plan,
    ring: Layout,
    frame: usize,
    switches: &mut [(Box<dyn Switch>, &'static [Rule])],
    results: &mut Results,
) -> Result<()> {
    let mut turns = Vec::new();
    for (switch, rules) in switches {
        let switch = switch.as_mut();
        let name = switch.name();
        switch.process().go_on()?;
        let streams = switch.connect()?;
        let guest = guest::start(ring, streams, frame, plan.habits, plan.pattern)
            .with_context(|| format!("{name}, {ring:?} rings, {frame} bytes"))?;
        switch.process().pause()?;
        match guest {
            Ok(guest) => {
                if !guest.is_huge() && results.is_huge {
                    eprintln!(
                        "no hugepages left for the guests: figures are lower than they could be"
                    );
                }
                results.is_huge &= guest.is_huge();
                turns.push(Turn {
                    switch,
                    guest,
                    rules,
                });
            }
            Err(guest::Unsupported) => {
                let refusal = Refusal { switch: name, ring };
                if !results.refusals.contains(&refusal) {
                    eprintln!("{name} does not offer {ring:?} rings");
                    results.refusals.push(refusal);
                }
            }
        }
    }
    for round in 0..plan.pairs * ROUNDS_PER_PAIR {
        let of_cell = results
            .windows
            .iter()
            .filter(|w| w.ring == ring && w.frame == frame);
        let so_far: Vec<_> = of_cell.map(|w| (w.sample.round, w.sample.on)).collect();
        if rig::enough(&so_far, plan.pairs) {
            break;
        }
        for turn in &mut turns {
            for &rule in turn.rules {
                let window = take(plan, turn, rule, (ring, frame, round), results.tsc_hz)?;
                eprintln!("{}", line(&window));
                results.windows.push(window);
            }
        }
    }
    for turn in turns {
        turn.switch.process().go_on()?;
        if let Some(text) = turn.switch.account()? {
            eprintln!("{text}");
        }
        turn.guest.stop()?;
        turn.switch.process().pause()?;
    }
    Ok(())
}

/// One window.
fn take(
    plan: &Plan,
    turn: &mut Turn<'_>,
    rule: Rule,
    (ring, frame, round): (Layout, usize, usize),
    tsc_hz: f64,
) -> Result<Window> {
    let name = turn.switch.name();
    let before = rig::before(&plan.common)?;
    turn.switch.process().go_on()?;
    turn.switch.rule(rule)?;
    warm_up(plan, turn, tsc_hz)?;
    let meter = Meter::start(&plan.common, turn.switch, Task::current(), before)?;
    let cycles = (plan.common.measure.as_secs_f64() * tsc_hz) as u64;
    let seen = turn.guest.run(cycles, slice(tsc_hz));
    let closed = meter.stop()?;
    turn.switch.process().pause()?;
    let on = closed.conditions(&plan.common)?;
    turn.switch.process().check()?;
    if seen.wrong > 0 {
        bail!(
            "{name}: {} of {} frames arrived wrong",
            seen.wrong,
            seen.frames
        );
    }
    let (same, all) = turn.guest.intact();
    ensure!(
        same == all,
        "{name}: only {same} of {all} buffers hold the frame that was sent"
    );
    let frames = seen.frames.max(1) as f64;
    let cycles = seen.cycles as f64;
    Ok(Window {
        ring,
        frame,
        sample: Sample {
            switch: name,
            rule,
            round,
            on,
            mpps: frames / (cycles / tsc_hz) / 1e6,
            calm_mpps: Some(calm(&seen.slices) * 100.0 / 1e6),
            cycles: cycles * on.worker_share.min(1.0) / frames,
        },
        guest_idle: seen.idle_cycles as f64 / cycles,
        guest_cycles: (seen.cycles - seen.idle_cycles) as f64 / frames,
        seen,
    })
}

/// The frames of a slice that one in ten surpasses.
fn calm(slices: &[u32]) -> f64 {
    let mut sorted = slices.to_vec();
    sorted.sort_unstable();
    let at = sorted.len() * 9 / 10;
    sorted.get(at).copied().map_or(0.0, f64::from)
}

/// A hundredth of a second.
fn slice(tsc_hz: f64) -> u64 {
    (tsc_hz / 100.0) as u64
}

/// Until frames flow where they should, and then for the time that is not counted.
fn warm_up(plan: &Plan, turn: &mut Turn<'_>, tsc_hz: f64) -> Result<()> {
    let since = Instant::now();
    loop {
        turn.guest.announce();
        let seen = turn.guest.run((0.05 * tsc_hz) as u64, slice(tsc_hz));
        // A switch floods until it has learned, and a cached decision to flood may outlive that for a while.
        if seen.frames > 0 && seen.wrong == 0 {
            break;
        }
        if sys::is_interrupted() {
            bail!("interrupted");
        }
        let name = turn.switch.name();
        turn.switch.process().check()?;
        if since.elapsed() > PATIENCE {
            let said = turn.switch.process().said();
            bail!(
                "{name}: frames do not arrive, or not where they should, within {PATIENCE:?}: {seen:?}; it said:\n{said}"
            );
        }
    }
    turn.guest.run(
        (plan.common.skip.as_secs_f64() * tsc_hz) as u64,
        slice(tsc_hz),
    );
    if sys::is_interrupted() {
        bail!("interrupted");
    }
    Ok(())
}

fn line(w: &Window) -> String {
    format!(
        "{:?} {:4} B {} | guest idle {:.2}, {:.1} cycles, tx empty {}, rx full {} of {} rounds, kicks {}, lost {}",
        w.ring,
        w.frame,
        w.sample.line(),
        w.guest_idle,
        w.guest_cycles,
        w.seen.tx_empty,
        w.seen.rx_full,
        w.seen.rounds,
        w.seen.kicks,
        w.seen.sent as i64 - w.seen.frames as i64,
    )
}
