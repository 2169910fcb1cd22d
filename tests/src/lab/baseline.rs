//! What users have today: VMs on Linux bridges, moved by plain QEMU migration.
//!
//! *Gang stop* is the best that plain tools do: pre-copy all, hold them at the brink by starving their bandwidth, stop all, let
//! them over in order, resume all. *One by one* is what scripts around `migrate` do. *In place* is a control and moves nothing:
//! all stop, stay stopped, go on where they are. It tells what a pause alone costs from what a cold target costs. *In place, cold*
//! is the same, but the emulators lose their translations in the pause ([`super::cold`]), as the targets of a move have none.

use anyhow::{Context, Result, bail};
use serde_json::json;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use super::Lab;
use super::cold::Debugger;
use super::cpu::{Cpu, CpuMeter};
use super::group::Group;
use super::net::MGMT_B;
use super::process::until;
use super::qemu::{Incoming, Nic, Vm};
use super::qmp::Event;
use super::report::{Mode, Run, VmFigures};
use super::traffic::Traffic;

/// A gigabit per second, in bytes.
const FULL: u64 = 125_000_000;
/// Too little for any VM to get ready: it stays in pre-copy.
const STARVED: u64 = 65_536;
/// Below this much a VM's bandwidth is taken away.
const BRINK_BYTES: u64 = 12_000_000;
/// What may be left after the catch-up.
const CAUGHT_UP_BYTES: u64 = 3_000_000;
/// How long the control keeps the VMs stopped: about as long as the moves do.
const IN_PLACE: Duration = Duration::from_millis(150);
/// How long a migration step may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// How the group is moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recipe {
    /// All stop together and resume together.
    GangStop,
    /// Each as soon as the one before has arrived.
    OneByOne,
    /// All stop together and resume together on A; nothing moves.
    InPlace,
    /// The same, and each emulator forgets its translations while it is stopped.
    InPlaceCold,
}

impl Recipe {
    /// As the report has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::GangStop => "gang-stop",
            Self::OneByOne => "one-by-one",
            Self::InPlace => "in-place",
            Self::InPlaceCold => "in-place-cold",
        }
    }
}

/// How long traffic runs before and after a migration.
#[derive(Clone, Copy, Debug)]
pub struct Phases {
    /// Before.
    pub warm: Duration,
    /// After.
    pub settle: Duration,
}

impl Default for Phases {
    fn default() -> Self {
        Self {
            warm: Duration::from_secs(3),
            settle: Duration::from_secs(3),
        }
    }
}

/// Boots the group on A, moves it to B under traffic, and judges. `say` hears of the progress; logs are left in `logs`.
pub fn run(
    group: &Group,
    recipe: Recipe,
    phases: Phases,
    logs: &Path,
    say: &mut dyn FnMut(&str),
) -> Result<Run> {
    let lab = Lab::new()?;
    let result = run_in(&lab, group, recipe, phases, say);
    lab.keep_logs(logs)?;
    lab.blame(result)
}

fn run_in(
    lab: &Lab,
    group: &Group,
    recipe: Recipe,
    phases: Phases,
    say: &mut dyn FnMut(&str),
) -> Result<Run> {
    for host in [&lab.a, &lab.b] {
        host.start_bridge()?;
        group
            .vms
            .iter()
            .try_for_each(|vm| host.bridge_tap(&vm.name))?;
    }
    let nic = |name: &str| Nic::Tap {
        device: name.to_owned(),
    };
    let start = |host, incoming| {
        let vms = group
            .vms
            .iter()
            .map(|vm| Vm::start(host, group, vm, &lab.image, &nic(&vm.name), incoming));
        vms.collect::<Result<Vec<Vm>>>()
    };
    let mut sources = start(&lab.a, Incoming::No)?;
    let mut traffic = Traffic::new(lab, group)?;
    sources
        .iter()
        .try_for_each(|vm| vm.wait_ready(Duration::from_secs(60)))?;
    traffic.start()?;
    say("the VMs run on A, traffic flows");

    let mut cpu = CpuMeter::start();
    thread::sleep(phases.warm);
    let steady = cpu.lap();
    let mut targets = match recipe {
        Recipe::GangStop => start(&lab.b, Incoming::Paused)?,
        Recipe::OneByOne => start(&lab.b, Incoming::Runs)?,
        Recipe::InPlace | Recipe::InPlaceCold => Vec::new(),
    };
    for (at, target) in targets.iter_mut().enumerate() {
        target
            .qmp
            .execute("migrate-incoming", json!({"uri": uri(at)}))?;
    }
    let debuggers = match recipe {
        Recipe::InPlaceCold => sources.iter_mut().map(Debugger::open).collect(),
        _ => Ok(Vec::new()),
    };
    let debuggers: Vec<Debugger> = debuggers?;
    cpu.lap();
    let began = Instant::now();
    match recipe {
        Recipe::GangStop => gang_stop(&mut sources, &mut targets, say)?,
        Recipe::OneByOne => one_by_one(&mut sources, &mut targets, say)?,
        Recipe::InPlace | Recipe::InPlaceCold => in_place(&mut sources, &debuggers, say)?,
    }
    let migration_ms = began.elapsed().as_millis() as f64;
    let moving = cpu.lap();
    thread::sleep(phases.settle);
    let flows = traffic.stop()?;

    let mut run = Run {
        group: "chain".to_owned(),
        order: group.order(),
        mode: Mode {
            method: recipe.name().to_owned(),
            ports: "tap".to_owned(),
            freeze: None,
        },
        migration_ms,
        cpu: Cpu::of(steady, moving),
        traffic: flows,
        ..Run::default()
    };
    for (at, source) in sources.iter_mut().enumerate() {
        run.vms.push(figures(source, targets.get_mut(at))?);
    }
    run.conclude();
    Ok(run)
}

fn uri(at: usize) -> String {
    format!("tcp:{MGMT_B}:{}", 4400 + at)
}

/// Pause and bytes of a VM that has moved to `target`, or went on where it was.
fn figures(source: &mut Vm, target: Option<&mut Vm>) -> Result<VmFigures> {
    let precopy_bytes = source.qmp.migration()?.transferred;
    let mut events = source.qmp.events();
    let at_us = |found: Option<&Event>, name: &str| {
        let found = found.with_context(|| format!("no event {name} of {}", source.name))?;
        Ok::<_, anyhow::Error>(found.at_us)
    };
    // The first: a cold control stops and resumes twice.
    let stop = events.iter().find(|event| event.name == "STOP");
    let stopped_at_us = at_us(stop, "STOP")?;
    if let Some(target) = target {
        events = target.qmp.events();
    }
    let resume = events.iter().rfind(|event| event.name == "RESUME");
    Ok(VmFigures {
        name: source.name.clone(),
        precopy_bytes,
        pause_ms: 0.0,
        stopped_at_us,
        resumed_at_us: at_us(resume, "RESUME")?,
    })
}

fn wait_status(vm: &mut Vm, status: &str) -> Result<()> {
    until(&format!("{status} of {}", vm.name), PATIENCE, || {
        Ok((vm.qmp.migration()?.status == status).then_some(()))
    })
}

/// The target of a completed migration is loaded a little after the source has sent everything.
fn wait_loaded(vm: &mut Vm) -> Result<()> {
    until(&format!("loaded state of {}", vm.name), PATIENCE, || {
        let status = vm.qmp.execute("query-status", json!({}))?;
        Ok((status["status"] != "inmigrate").then_some(()))
    })
}

fn one_by_one(sources: &mut [Vm], targets: &mut [Vm], say: &mut dyn FnMut(&str)) -> Result<()> {
    for (at, (source, target)) in sources.iter_mut().zip(targets).enumerate() {
        source.qmp.parameters(json!({"max-bandwidth": FULL}))?;
        source.qmp.execute("migrate", json!({"uri": uri(at)}))?;
        wait_status(source, "completed")?;
        wait_loaded(target)?;
        say(&format!("{} runs on B", source.name));
    }
    Ok(())
}

/// With `debuggers`, one per VM, the VMs are cold when they go on.
fn in_place(vms: &mut [Vm], debuggers: &[Debugger], say: &mut dyn FnMut(&str)) -> Result<()> {
    let began = Instant::now();
    for vm in vms.iter_mut() {
        vm.qmp.execute("stop", json!({}))?;
    }
    for (vm, debugger) in vms.iter_mut().zip(debuggers) {
        debugger.flush(vm)?;
    }
    thread::sleep(IN_PLACE.saturating_sub(began.elapsed()));
    for vm in vms.iter_mut() {
        vm.qmp.execute("cont", json!({}))?;
    }
    say("all VMs run on A again");
    Ok(())
}

/// Where a VM is on its way to the brink.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// The first copy of the memory.
    Copying,
    /// Held in pre-copy.
    Held,
    /// Copying once more what has become dirty, since so many collections.
    CatchingUp { since: u64 },
    /// Went to the brink by itself and is stopped there.
    Over,
}

fn gang_stop(sources: &mut [Vm], targets: &mut [Vm], say: &mut dyn FnMut(&str)) -> Result<()> {
    for (at, source) in sources.iter_mut().enumerate() {
        source
            .qmp
            .capabilities(&["events", "pause-before-switchover"])?;
        source
            .qmp
            .parameters(json!({"downtime-limit": 1, "max-bandwidth": FULL}))?;
        source.qmp.execute("migrate", json!({"uri": uri(at)}))?;
    }
    let mut stages = vec![Stage::Copying; sources.len()];
    until_held(sources, &mut stages)?;
    say("all VMs are held at the brink");
    for (source, stage) in sources.iter_mut().zip(&mut stages) {
        if *stage == Stage::Held {
            *stage = Stage::CatchingUp {
                since: source.qmp.migration()?.dirty_syncs,
            };
            source.qmp.parameters(json!({"max-bandwidth": FULL}))?;
        }
    }
    until_held(sources, &mut stages)?;

    for source in sources.iter_mut() {
        source.qmp.execute("stop", json!({}))?;
    }
    for source in sources.iter_mut() {
        source
            .qmp
            .parameters(json!({"max-bandwidth": 1u64 << 40, "downtime-limit": 2000}))?;
    }
    for source in sources.iter_mut() {
        wait_status(source, "pre-switchover")?;
    }
    for source in sources.iter_mut() {
        source
            .qmp
            .execute("migrate-continue", json!({"state": "pre-switchover"}))?;
    }
    for (source, target) in sources.iter_mut().zip(targets.iter_mut()) {
        wait_status(source, "completed")?;
        wait_loaded(target)?;
    }
    for target in targets.iter_mut() {
        target.qmp.execute("cont", json!({}))?;
    }
    say("all VMs run on B");
    Ok(())
}

/// Lets each VM go on until it is held (or has gone over by itself).
fn until_held(sources: &mut [Vm], stages: &mut [Stage]) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while stages
        .iter()
        .any(|stage| !matches!(stage, Stage::Held | Stage::Over))
    {
        if Instant::now() > deadline {
            bail!("the VMs do not get to the brink: {stages:?}");
        }
        for (source, stage) in sources.iter_mut().zip(stages.iter_mut()) {
            let limit = match stage {
                Stage::Copying => BRINK_BYTES,
                Stage::CatchingUp { .. } => CAUGHT_UP_BYTES,
                Stage::Held | Stage::Over => continue,
            };
            let migration = source.qmp.migration()?;
            let collected = match stage {
                Stage::CatchingUp { since } => migration.dirty_syncs > *since,
                _ => true,
            };
            match migration.status.as_str() {
                "pre-switchover" => *stage = Stage::Over,
                "active"
                    if migration.transferred > 0 && collected && migration.remaining < limit =>
                {
                    source.qmp.parameters(json!({"max-bandwidth": STARVED}))?;
                    *stage = Stage::Held;
                }
                _ => {}
            }
        }
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}
