//! What a second worker is worth on a machine of two CPUs, where the guest's threads have to share these with the workers.
//!
//! Two pairs of ports, each driven by a thread of its own. Worker k has the k-th CPU and the ports k, k + n, ... (ours spreads
//! them so, OVS is told to): the pairs (0 -> 1) and (3 -> 2) have a worker each if there are two. A pair's thread has the CPU that
//! its worker does not have. With one worker nothing of the guest changes. Nobody gives a CPU away before the kernel takes it (tried:
//! a guest that yields when it has nothing to do gets 2 % of a CPU beside a worker that polls).

use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::Scope;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail, ensure};

use crate::frames::Pattern;
use crate::growth::Plan;
use crate::guest::{self, Drive, Seen};
use crate::host::{self, Task};
use crate::peer::{Rule, Size, Switch};
use crate::pingpong::{State, round_trip};
use crate::pvp::{self, PATIENCE, ROUNDS_PER_PAIR, Results, Window};
use crate::report::Sample;
use crate::rig::{self, Conditions, Rig, STEAL_MAX, tsc_hz};
use crate::sys;

/// Sender and receiver of each pair.
const PAIRS: [[usize; 2]; 2] = [[0, 1], [3, 2]];

/// A pair's thread, which does what it is told.
struct Driver {
    task: Task,
    orders: Sender<Order>,
    done: Receiver<Result<Seen>>,
}

enum Order {
    /// Until frames flow where they should, and then for so many cycles.
    Warm(u64),
    /// For so many cycles.
    Run(u64),
    /// Lets go of the switch, and ends.
    Stop,
}

impl Driver {
    /// Connects its guest; the switch must run.
    fn start<'s>(
        scope: &'s Scope<'s, '_>,
        plan: &'s Plan,
        ports: Vec<(usize, UnixStream)>,
        cpu: usize,
        tsc_hz: f64,
    ) -> Result<Driver> {
        let (orders, todo) = channel();
        let (tell, done) = channel();
        let (ready, is_ready) = channel();
        scope.spawn(move || {
            let begin = || -> Result<Box<dyn Drive>> {
                host::pin(cpu)?;
                let guest =
                    guest::start_as(plan.ring, ports, plan.frame, plan.habits, Pattern::One)?;
                guest.map_err(|_| anyhow!("the switch does not offer {:?} rings", plan.ring))
            };
            let mut guest = match begin() {
                Ok(guest) => guest,
                Err(e) => return drop(ready.send(Err(e))),
            };
            let _ = ready.send(Ok(Task::current()));
            let slice = (tsc_hz / 100.0) as u64;
            for order in todo {
                let seen = match order {
                    Order::Warm(cycles) => warm_up(guest.as_mut(), cycles, tsc_hz),
                    Order::Run(cycles) => Ok(guest.run(cycles, slice)),
                    Order::Stop => return drop(tell.send(guest.stop().map(|()| Seen::default()))),
                };
                let _ = tell.send(seen);
            }
        });
        let task = is_ready.recv().context("a driver")??;
        Ok(Driver { task, orders, done })
    }
}

fn warm_up(guest: &mut dyn Drive, cycles: u64, tsc_hz: f64) -> Result<Seen> {
    let (since, slice) = (Instant::now(), (tsc_hz / 100.0) as u64);
    loop {
        guest.announce();
        let seen = guest.run((0.1 * tsc_hz) as u64, slice);
        if seen.frames > 0 && seen.wrong == 0 {
            return Ok(guest.run(cycles, slice));
        }
        ensure!(
            since.elapsed() < PATIENCE,
            "frames do not arrive, or not where they should: {seen:?}"
        );
    }
}

/// All drivers at once.
fn all(drivers: &[Driver], order: impl Fn() -> Order) -> Result<Vec<Seen>> {
    for d in drivers {
        d.orders.send(order()).context("a driver has ended")?;
    }
    drivers
        .iter()
        .map(|d| d.done.recv().context("a driver has ended")?)
        .collect()
}

struct Turn<'a> {
    switch: &'a mut dyn Switch,
    rules: &'static [Rule],
    drivers: Vec<Driver>,
}

/// Windows of both switches with so many workers, one or two.
pub fn measure(plan: &Plan, workers: usize) -> Result<Results> {
    let cpus = [plan.common.worker_cpu, plan.common.guest_cpu];
    ensure!((1..=cpus.len()).contains(&workers), "{workers} workers");
    let size = Size {
        ports: 2 * PAIRS.len(),
        addresses: None,
    };
    let pages = pvp::hugepages(size.ports);
    let mut rig = Rig::start_on(&plan.common, &cpus[..workers], size, pages)?;
    let mut results = Results {
        tsc_hz: tsc_hz(),
        ..Results::default()
    };
    let hz = results.tsc_hz;
    std::thread::scope(|scope| -> Result<()> {
        let mut turns = Vec::new();
        for (switch, rules) in &mut rig.switches {
            let switch = switch.as_mut();
            switch.process().go_on()?;
            let mut streams: Vec<_> = switch.connect()?.into_iter().map(Some).collect();
            let mut drivers = Vec::new();
            for (pair, cpu) in PAIRS.iter().zip(cpus.iter().rev()) {
                let take = |port: &usize| Some((*port, streams.get_mut(*port)?.take()?));
                let ports = pair.iter().filter_map(take).collect();
                drivers.push(Driver::start(scope, plan, ports, *cpu, hz)?);
            }
            switch.process().pause()?;
            turns.push(Turn {
                switch,
                rules,
                drivers,
            });
        }
        for round in 0..plan.pairs * ROUNDS_PER_PAIR {
            let windows = results.windows.iter();
            let so_far: Vec<_> = windows.map(|w| (w.sample.round, w.sample.on)).collect();
            if rig::enough(&so_far, plan.pairs) {
                break;
            }
            for turn in &mut turns {
                for &rule in turn.rules {
                    let window = take(plan, turn, (rule, round), hz)?;
                    eprintln!("{workers} workers: {}", window.sample.line());
                    results.windows.push(window);
                }
            }
        }
        for turn in turns {
            turn.switch.process().go_on()?;
            if let Some(text) = turn.switch.account()? {
                eprintln!("{text}");
            }
            all(&turn.drivers, || Order::Stop)?;
            turn.switch.process().pause()?;
        }
        Ok(())
    })?;
    Ok(results)
}

/// One window.
fn take(
    plan: &Plan,
    turn: &mut Turn<'_>,
    (rule, round): (Rule, usize),
    tsc_hz: f64,
) -> Result<Window> {
    let common = &plan.common;
    let name = turn.switch.name();
    let before = rig::before(common)?;
    turn.switch.process().go_on()?;
    turn.switch.rule(rule)?;
    let cycles = |d: std::time::Duration| (d.as_secs_f64() * tsc_hz) as u64;
    all(&turn.drivers, || Order::Warm(cycles(common.skip)))?;
    let workers = turn.switch.workers()?;
    let ran = |tasks: &[Task]| -> Result<u64> {
        let times = tasks.iter().map(|t| Ok(t.cpu_time()?.ran));
        times.sum()
    };
    let guests: Vec<Task> = turn.drivers.iter().map(|d| d.task).collect();
    let (since, steal) = (Instant::now(), host::steal_ns());
    let from = (ran(&workers)?, ran(&guests)?);
    let seen = all(&turn.drivers, || Order::Run(cycles(common.measure)))?;
    let (worked, drove) = (ran(&workers)? - from.0, ran(&guests)? - from.1);
    let wall = since.elapsed().as_nanos() as f64;
    let steal = (host::steal_ns() - steal) as f64 / (2.0 * wall);
    turn.switch.process().pause()?;
    let after = round_trip(common.worker_cpu)?;
    turn.switch.process().check()?;
    if sys::is_interrupted() {
        bail!("interrupted");
    }
    for s in &seen {
        let (frames, wrong) = (s.frames, s.wrong);
        ensure!(frames > 0, "{name}: a pair of ports got no frame");
        ensure!(
            wrong == 0,
            "{name}: {wrong} of {frames} frames arrived wrong"
        );
    }
    let state = State::of(before, after, common.near_max);
    let frames: u64 = seen.iter().map(|s| s.frames).sum();
    let seconds = seen.iter().map(|s| s.cycles).max().unwrap_or(1) as f64 / tsc_hz;
    let idle: u64 = seen.iter().map(|s| s.idle_cycles).sum();
    let spent: u64 = seen.iter().map(|s| s.cycles).sum();
    Ok(Window {
        ring: plan.ring,
        frame: plan.frame,
        sample: Sample {
            switch: name,
            rule,
            round,
            mpps: frames as f64 / seconds / 1e6,
            calm_mpps: None,
            cycles: worked as f64 * 1e-9 * tsc_hz / frames as f64,
            on: Conditions {
                state,
                trips: [before, after],
                worker_share: worked as f64 / wall,
                guest_share: drove as f64 / wall,
                steal,
                // That threads share CPUs is what is measured.
                spoiled: if steal > STEAL_MAX {
                    Some("the hypervisor gave the CPUs to others")
                } else if state == State::Mixed {
                    Some("the CPUs' distance changed")
                } else {
                    None
                },
            },
        },
        guest_idle: idle as f64 / spent as f64,
        guest_cycles: (spent - idle) as f64 / frames as f64,
        seen: Seen {
            frames,
            sent: seen.iter().map(|s| s.sent).sum(),
            cycles: spent,
            idle_cycles: idle,
            rounds: seen.iter().map(|s| s.rounds).sum(),
            ..Seen::default()
        },
    })
}
