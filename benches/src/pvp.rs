//! Port to VM to port: a null guest between two ports of a switch, in windows that take turns.
//!
//! A window is: ping-pong, let the switch run, warm up, measure, stop the switch, ping-pong. Whatever else runs here, and
//! a host that moves virtual CPUs about, spoils a window; it is then kept in the raw results with the reason, and does
//! not count.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::guest::{self, Drive, Habits, Seen};
use crate::host::{self, Alone, Folder, Hugepages, Task};
use crate::peer::{Gangway, OVS_HUGEPAGES, Ovs, Rule, Switch};
use crate::pingpong::{State, round_trip};
use crate::ring::Layout;
use crate::sys;

/// Hugepages of 2 MB for the guests' own memory.
const GUEST_HUGEPAGES: u64 = 8;
/// Of its CPU, what a thread must have had for its window to count.
const SHARE_MIN: f64 = 0.95;
/// A window's steal time at most, of both CPUs' time.
const STEAL_MAX: f64 = 0.01;
/// How often a round may be repeated, on average, because a window was spoiled or the state changed.
const ROUNDS_PER_PAIR: usize = 3;
/// The first frame must come within this.
const PATIENCE: Duration = Duration::from_secs(20);

/// What to measure.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Frame sizes without FCS.
    pub frames: Vec<usize>,
    /// Ring layouts.
    pub rings: Vec<Layout>,
    /// Good rounds, in which each switch has a turn, in one state.
    pub pairs: usize,
    /// Whether OVS-DPDK has turns.
    pub with_ovs: bool,
    /// Whether ours has.
    pub with_gangway: bool,
    /// Our binary.
    pub switch: PathBuf,
    /// CPU of the switches' workers.
    pub worker_cpu: usize,
    /// CPU of the guest.
    pub guest_cpu: usize,
    /// Ports, in pairs.
    pub ports: usize,
    /// Not counted at a window's start.
    pub skip: Duration,
    /// Counted.
    pub measure: Duration,
    /// How long to wait for other work on this machine to end, before each window.
    pub quiet: Duration,
    /// A round trip up to so many cycles is near.
    pub near_max: u64,
    /// How the guest behaves.
    pub habits: Habits,
}

/// One window's result.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Window {
    /// Which switch.
    pub switch: &'static str,
    /// How it found the way.
    pub rule: Rule,
    /// Ring layout.
    pub ring: Layout,
    /// Frame size.
    pub frame: usize,
    /// The round in which it was measured.
    pub round: usize,
    /// Of the two ping-pongs.
    pub state: State,
    /// Ping-pong round trips before and after, in cycles.
    pub trips: [u64; 2],
    /// Million frames received per second.
    pub mpps: f64,
    /// The same, of the tenth-best part of the window: what the switch does while no neighbour on the host shares the core.
    pub calm_mpps: f64,
    /// The worker's time-stamp cycles per frame received.
    pub cycles: f64,
    /// What the worker had of its CPU.
    pub worker_share: f64,
    /// What the guest had of its CPU.
    pub guest_share: f64,
    /// What the hypervisor gave to others, of both.
    pub steal: f64,
    /// Of the guest's cycles, those that found nothing to do.
    pub guest_idle: f64,
    /// Of the guest's busy cycles, how many per frame.
    pub guest_cycles: f64,
    /// The guest's own figures.
    pub seen: Seen,
    /// Why it does not count.
    pub spoiled: Option<&'static str>,
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
    ensure!(
        plan.worker_cpu != plan.guest_cpu,
        "the worker and the guest need a CPU each"
    );
    sys::on_signals();
    host::go_first()?;
    // Dropped in reverse order: processes, then hugepages, then the folder, then the turn.
    let _alone = Alone::wait()?;
    let folder = Folder::new()?;
    let pages = GUEST_HUGEPAGES * plan.ports as u64 + if plan.with_ovs { OVS_HUGEPAGES } else { 0 };
    let _pages = Hugepages::take(pages, &folder)?;
    let mut switches: Vec<(Box<dyn Switch>, &'static [Rule])> = Vec::new();
    if plan.with_gangway {
        let ours = Gangway::start(&plan.switch, folder.path(), plan.ports, plan.worker_cpu)?;
        switches.push((Box::new(ours), &[Rule::Normal]));
    }
    if plan.with_ovs {
        Ovs::install()?;
        let ovs = Ovs::start(folder.path(), plan.ports, plan.worker_cpu, plan.guest_cpu)?;
        switches.push((Box::new(ovs), &[Rule::InPort, Rule::Normal]));
    }
    // After the processes have been started: they would inherit it.
    host::pin(plan.guest_cpu)?;
    for (switch, _) in &mut switches {
        switch.process().pause()?;
    }
    let mut results = Results {
        is_huge: true,
        tsc_hz: tsc_hz(),
        ..Results::default()
    };
    for &ring in &plan.rings {
        for &frame in &plan.frames {
            cell(plan, ring, frame, &mut switches, &mut results)?;
        }
    }
    Ok(results)
}

/// Time-stamp cycles per second, by the kernel's clock.
fn tsc_hz() -> f64 {
    let (since, begin) = (Instant::now(), sys::tsc());
    std::thread::sleep(Duration::from_millis(200));
    let cycles = sys::tsc() - begin;
    cycles as f64 / since.elapsed().as_secs_f64()
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
        let guest = guest::start(ring, streams, frame, plan.habits)
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
        if enough(plan, &results.windows, ring, frame) {
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

/// Whether some state has as many rounds as were asked for in which every switch had a good window.
fn enough(plan: &Plan, windows: &[Window], ring: Layout, frame: usize) -> bool {
    let of_cell = |w: &&Window| w.ring == ring && w.frame == frame;
    let good = |w: &&Window| w.spoiled.is_none();
    [State::Near, State::Far].into_iter().any(|state| {
        let rounds = (0..plan.pairs * ROUNDS_PER_PAIR).filter(|&round| {
            let mut all = windows
                .iter()
                .filter(of_cell)
                .filter(|w| w.round == round)
                .peekable();
            all.peek().is_some() && all.all(|w| good(&w) && w.state == state)
        });
        rounds.count() >= plan.pairs
    })
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
    host::quiet(plan.quiet)?;
    let before = round_trip(plan.worker_cpu)?;
    turn.switch.process().go_on()?;
    turn.switch.rule(rule)?;
    warm_up(plan, turn, tsc_hz)?;
    let worker = turn.switch.worker()?;
    let pinned = worker.pinned_to()?;
    ensure!(
        pinned == Some(plan.worker_cpu),
        "{name}: the worker may run on {pinned:?}"
    );
    let me = Task::current();
    let times = || -> Result<_> { Ok((worker.cpu_time()?, me.cpu_time()?, host::steal_ns())) };
    let since = Instant::now();
    let from = times()?;
    let seen = turn
        .guest
        .run((plan.measure.as_secs_f64() * tsc_hz) as u64, slice(tsc_hz));
    let to = times()?;
    let wall_ns = since.elapsed().as_nanos() as f64;
    turn.switch.process().pause()?;
    let after = round_trip(plan.worker_cpu)?;
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
    let share = |a: host::CpuTime, b: host::CpuTime| (b.ran - a.ran) as f64 / wall_ns;
    let (worker_share, guest_share) = (share(from.0, to.0), share(from.1, to.1));
    let steal = (to.2 - from.2) as f64 / (2.0 * wall_ns);
    let state = State::of(before, after, plan.near_max);
    let frames = seen.frames.max(1) as f64;
    let cycles = seen.cycles as f64;
    let spoiled = if worker_share < SHARE_MIN {
        Some("the worker had not its whole CPU")
    } else if guest_share < SHARE_MIN {
        Some("the guest had not its whole CPU")
    } else if steal > STEAL_MAX {
        Some("the hypervisor gave the CPUs to others")
    } else if state == State::Mixed {
        Some("the CPUs' distance changed")
    } else {
        None
    };
    Ok(Window {
        switch: name,
        rule,
        ring,
        frame,
        round,
        state,
        trips: [before, after],
        calm_mpps: calm(&seen.slices) * 100.0 / 1e6,
        mpps: frames / (cycles / tsc_hz) / 1e6,
        cycles: cycles * worker_share.min(1.0) / frames,
        worker_share,
        guest_share,
        steal,
        guest_idle: seen.idle_cycles as f64 / cycles,
        guest_cycles: (seen.cycles - seen.idle_cycles) as f64 / frames,
        seen,
        spoiled,
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

/// Until frames flow, and then for the time that is not counted.
fn warm_up(plan: &Plan, turn: &mut Turn<'_>, tsc_hz: f64) -> Result<()> {
    let since = Instant::now();
    loop {
        turn.guest.announce();
        let seen = turn.guest.run((0.05 * tsc_hz) as u64, slice(tsc_hz));
        if seen.frames > 0 {
            break;
        }
        if sys::is_interrupted() {
            bail!("interrupted");
        }
        let name = turn.switch.name();
        turn.switch.process().check()?;
        if since.elapsed() > PATIENCE {
            let said = turn.switch.process().said();
            bail!("{name}: no frame arrives within {PATIENCE:?}: {seen:?}; it said:\n{said}");
        }
    }
    turn.guest
        .run((plan.skip.as_secs_f64() * tsc_hz) as u64, slice(tsc_hz));
    if sys::is_interrupted() {
        bail!("interrupted");
    }
    Ok(())
}

fn line(w: &Window) -> String {
    format!(
        "{:?} {:4} B {:8} {:7} {:5} ({:4} {:4}): {:6.2} Mpps (calm {:6.2}) {:6.1} cycles | worker {:.3} guest {:.3} steal {:.3} | \
         guest idle {:.2}, {:.1} cycles, tx empty {}, rx full {} of {} rounds, kicks {}, lost {}{}",
        w.ring,
        w.frame,
        w.switch,
        format!("{:?}", w.rule),
        format!("{:?}", w.state),
        w.trips[0],
        w.trips[1],
        w.mpps,
        w.calm_mpps,
        w.cycles,
        w.worker_share,
        w.guest_share,
        w.steal,
        w.guest_idle,
        w.guest_cycles,
        w.seen.tx_empty,
        w.seen.rx_full,
        w.seen.rounds,
        w.seen.kicks,
        w.seen.sent as i64 - w.seen.frames as i64,
        w.spoiled
            .map_or(String::new(), |s| format!(" | spoiled: {s}")),
    )
}
