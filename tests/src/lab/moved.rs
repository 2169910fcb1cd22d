//! Gangway's run: the group moves from A to B through our switches, ordered by our coordinator, under the same traffic and
//! with the same verdict as the baselines.

use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::Lab;
use super::baseline::Phases;
use super::cpu::{Cpu, CpuMeter};
use super::demo::{Freeze, Ports};
use super::gangway::{Coordinator, CoordinatorReport, Programs, host_config, nic};
use super::group::Group;
use super::host::Host;
use super::process::{Process, until};
use super::qemu::{self, Files, Incoming, Vm};
use super::qmp::Qmp;
use super::report::{Mode, Run, VmFigures};
use super::traffic::{Flow, Traffic};
use super::verify::{Verified, verify};

/// How long a migration may take before the lab gives up on it.
const PATIENCE: Duration = Duration::from_secs(90);

/// The group on host A, attached to a switch, with traffic; host B ready to take it.
pub struct World {
    /// Hosts and links. Dropped last.
    pub group: Group,
    /// The group's traffic.
    pub traffic: Traffic,
    /// The VMs on A.
    pub sources: Vec<Vm>,
    /// The coordinator's command.
    pub coordinator: Coordinator,
    /// How VMs are attached.
    pub ports: Ports,
    /// Namespaces, switches.
    pub lab: Lab,
}

impl World {
    /// Starts switches and VMs, and waits until all are ready. No traffic yet.
    pub fn new(group: &Group, ports: Ports, logs: &Path) -> Result<Self> {
        Self::prepared(group, ports, logs, |_| Ok(()), |config| config)
    }

    /// The same, on hosts that are prepared before anything runs on them, with configurations that are edited.
    pub fn prepared(
        group: &Group,
        ports: Ports,
        logs: &Path,
        prepare: impl FnOnce(&Lab) -> Result<()>,
        edit: impl Fn(String) -> String,
    ) -> Result<Self> {
        let programs = Programs::find()?;
        let mut lab = Lab::new()?;
        let built =
            prepare(&lab).and_then(|()| Self::build(&mut lab, &programs, group, ports, edit));
        match built {
            Ok((coordinator, sources, traffic)) => Ok(Self {
                group: group.clone(),
                traffic,
                sources,
                coordinator,
                ports,
                lab,
            }),
            Err(error) => {
                lab.keep_logs(logs)?;
                Err(error)
            }
        }
    }

    fn build(
        lab: &mut Lab,
        programs: &Programs,
        group: &Group,
        ports: Ports,
        edit: impl Fn(String) -> String,
    ) -> Result<(Coordinator, Vec<Vm>, Traffic)> {
        let coordinator = Coordinator::new(lab, programs)?;
        let configs = [&lab.a, &lab.b].map(|host| edit(host_config(lab, host, group, ports)));
        for (host, config) in [&mut lab.a, &mut lab.b].into_iter().zip(&configs) {
            host.start_keeper(&programs.keeper, config)?;
            host.start_switch(&programs.switch, config)?;
        }
        for host in [&lab.a, &lab.b] {
            answers(host, &coordinator)?;
        }
        let mut sources = Vec::new();
        for vm in &group.vms {
            let nic = nic(&lab.a, vm, ports);
            sources.push(Vm::start(
                &lab.a,
                group,
                vm,
                &lab.image,
                &nic,
                Incoming::No,
            )?);
        }
        let traffic = Traffic::new(lab, group)?;
        sources
            .iter()
            .try_for_each(|vm| vm.wait_ready(Duration::from_secs(60)))?;
        Ok((coordinator, sources, traffic))
    }

    /// A host's configuration as the lab writes it.
    pub fn config(&self, host: &Host) -> String {
        host_config(&self.lab, host, &self.group, self.ports)
    }

    /// Kills B's switch, or A's, and starts it with another configuration; VMs live on.
    pub fn restart_switch(&mut self, of_a: bool, config: &str) -> Result<()> {
        let programs = Programs::find()?;
        let host = if of_a {
            &mut self.lab.a
        } else {
            &mut self.lab.b
        };
        drop(host.switch.take());
        host.start_switch(&programs.switch, config)?;
        answers(host, &self.coordinator)
    }

    /// Starts a switch again that was killed, with the configuration that it had, and waits until it answers.
    pub fn revive_switch(&mut self, of_a: bool) -> Result<()> {
        let host = if of_a { &self.lab.a } else { &self.lab.b };
        let file = host.dir.join("host.toml");
        let config = std::fs::read_to_string(&file).with_context(|| file.display().to_string())?;
        self.restart_switch(of_a, &config)
    }

    /// What both switches and all kernels say of frames that they dropped: for the message of a run that is not clean.
    pub fn drops(&self) -> String {
        let mut told = Vec::new();
        for host in ["a", "b"] {
            let shown = self.coordinator.ask(&["host", "show", host, "-o", "json"]);
            told.push(format!("switch of {host}: {shown:?}"));
        }
        told.push(self.traffic.kernels());
        told.join("\n")
    }

    /// Stops the traffic and judges it, but for datagrams that came twice because a switch has sent them once more and said so:
    /// what a QEMU that stopped its VM unasked had taken from a TAP (more than three for each VM and stop it never says); and for those
    /// that a guest's own kernel had no room for at a socket, by its counters: a busy machine holds for long, and then all comes at once.
    pub fn stop_traffic(&mut self) -> Result<Vec<Flow>> {
        let mut flows = self.traffic.stop()?;
        let mut again = 0;
        for host in [&self.lab.a, &self.lab.b] {
            let log = host.dir.join("switch.log");
            let text = std::fs::read_to_string(&log).with_context(|| log.display().to_string())?;
            again += sent_again(&text)?;
        }
        let mut no_room = self.traffic.no_room()?;
        for flow in flows.iter_mut().filter(|f| f.name.contains("udp")) {
            let excused = flow.duplicated.min(again);
            (flow.duplicated, again) = (flow.duplicated - excused, again - excused);
            flow.received += flow.excuse(&mut no_room);
        }
        Ok(flows)
    }

    /// The product's own proof, of the youngest migration, which came to `outcome`: every frame that was held was delivered.
    pub fn verify(&self, outcome: &str) -> Result<Verified> {
        verify(&self.coordinator, outcome, self.lab.dir())
    }

    /// Moves the group to a host, as often as one likes, and waits for the end: an error if it is not there then. What it has been
    /// moved to is ready to be moved on.
    pub fn move_to(&self, name: &str) -> Result<CoordinatorReport> {
        let host = [&self.lab.a, &self.lab.b]
            .into_iter()
            .find(|host| host.name == name)
            .with_context(|| format!("there is no host {name}"))?;
        let mut command = self
            .coordinator
            .move_to(&self.group, name, Freeze::Switchover);
        command.arg("--quiet");
        let log = self.lab.dir().join("move.log");
        // Of an earlier move.
        let _ = std::fs::remove_file(&log);
        let status = Process::start("gangway migrate", command, &log)?.wait(PATIENCE)?;
        if !status.success() {
            let said = std::fs::read_to_string(&log).unwrap_or_default();
            bail!("gangway migrate --to {name} ended with {status}: {said}");
        }
        let path = self.coordinator.report_file();
        let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let report: CoordinatorReport =
            serde_json::from_str(&text).context("the coordinator's report")?;
        if report.outcome != "moved" {
            bail!("the coordinator's report says {:?}", report.outcome);
        }
        for vm in &self.group.vms {
            let pid = qemu::process_at(&Files::new(&host.dir, &vm.name));
            let pid = pid.with_context(|| format!("{} has no QEMU on {name}", vm.name))?;
            qemu::do_not_preempt(pid).with_context(|| vm.name.clone())?;
        }
        Ok(report)
    }

    /// Watches the QEMUs that B's switch will start.
    pub fn watch_targets(&self) -> Vec<Resumed> {
        self.group
            .vms
            .iter()
            .map(|vm| Resumed::watch(&Files::new(&self.lab.b.dir, &vm.name).lab_qmp))
            .collect()
    }
}

/// Waits until a host's switch answers the coordinator.
fn answers(host: &Host, coordinator: &Coordinator) -> Result<()> {
    let what = format!("answer of the switch of {}", host.name);
    until(&what, Duration::from_secs(10), || {
        if let Some(status) = host.switch.as_ref().and_then(Process::ended) {
            let log = std::fs::read_to_string(host.dir.join("switch.log")).unwrap_or_default();
            bail!(
                "the switch of host {} ended with {status}: {}",
                host.name,
                log.trim()
            );
        }
        Ok(coordinator.ask(&["host", "show", &host.name]).ok())
    })
    .map(drop)
}

/// A thread that waits for a target VM to run, on the lab's own monitor. It starts no process.
pub struct Resumed(JoinHandle<Result<u64>>);

impl Resumed {
    fn watch(path: &Path) -> Self {
        let path: PathBuf = path.to_owned();
        Self(thread::spawn(move || {
            let mut qmp = Qmp::connect(&path, PATIENCE)?;
            Ok(qmp.wait(PATIENCE, |event| event.name == "RESUME")?.at_us)
        }))
    }

    /// When it ran, in microseconds since 1970.
    pub fn at_us(self) -> Result<u64> {
        self.0
            .join()
            .unwrap_or_else(|_| bail!("the watcher of a target died"))
    }
}

/// Boots the group on A, moves it to B under traffic, and judges. `say` hears of the progress; logs are left in `logs`.
pub fn run(
    group: &Group,
    ports: Ports,
    freeze: Freeze,
    phases: Phases,
    logs: &Path,
    say: &mut dyn FnMut(&str),
) -> Result<Run> {
    let mut world = World::new(group, ports, logs)?;
    let result = run_in(&mut world, freeze, phases, say);
    world.lab.keep_logs(logs)?;
    if result.as_ref().is_ok_and(|run| !run.clean) && !world.lab.crashed().is_empty() {
        return world
            .lab
            .blame(Err(anyhow::anyhow!("the traffic is not clean")));
    }
    world.lab.blame(result)
}

/// Of a switch's log.
fn sent_again(log: &str) -> Result<u64> {
    let mut all = 0;
    for line in log.lines() {
        let Some((front, _)) = line.split_once(" that QEMU has taken go once more") else {
            continue;
        };
        let n: u64 = front.rsplit(' ').next().unwrap_or_default().parse()?;
        if n > 3 {
            bail!("more than three frames of one VM go once more: {line}");
        }
        all += n;
    }
    Ok(all)
}

fn run_in(
    world: &mut World,
    freeze: Freeze,
    phases: Phases,
    say: &mut dyn FnMut(&str),
) -> Result<Run> {
    world.traffic.start()?;
    say("the VMs run on A, traffic flows");
    let mut cpu = CpuMeter::start();
    thread::sleep(phases.warm);
    let steady = cpu.lap();

    let watchers = world.watch_targets();
    let began = Instant::now();
    let command = world.coordinator.migrate(&world.group, freeze);
    let migrate = Process::start_shown(
        "gangway migrate",
        command,
        &world.lab.dir().join("migrate.log"),
    )?;
    let status = migrate.wait(PATIENCE)?;
    let (migration_ms, moving) = (began.elapsed().as_millis() as f64, cpu.lap());
    // Even a migration that failed must not have lost anything: judge first.
    thread::sleep(phases.settle);
    let traffic = world.stop_traffic()?;
    if !traffic.iter().all(Flow::is_clean) {
        say(&world.drops());
    }
    if !status.success() {
        let clean = traffic.iter().all(Flow::is_clean);
        bail!(
            "gangway migrate ended with {status}; the traffic is {}",
            if clean { "clean" } else { "NOT clean" }
        );
    }
    say("all VMs run on B");

    let path = world.coordinator.report_file();
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let coordinator: CoordinatorReport =
        serde_json::from_str(&text).context("the coordinator's report")?;
    if coordinator.outcome != "moved" {
        bail!("the coordinator's report says {:?}", coordinator.outcome);
    }
    let proof = world.verify("moved").context("gangway verify")?;
    say(&format!("gangway verify: {proof:?}"));
    let mut run = Run {
        group: "chain".to_owned(),
        order: coordinator.order.clone(),
        mode: Mode {
            method: "gangway".to_owned(),
            ports: world.ports.name().to_owned(),
            freeze: Some(freeze.name().to_owned()),
        },
        links: coordinator.links,
        freeze_to_thaw_ms: coordinator.freeze_to_thaw_ms,
        migration_ms,
        cpu: Cpu::of(steady, moving),
        traffic,
        coordinator: Some(serde_json::from_str(&text)?),
        ..Run::default()
    };
    for (source, watcher) in world.sources.iter_mut().zip(watchers) {
        let stop = source
            .qmp
            .events()
            .into_iter()
            .rfind(|event| event.name == "STOP");
        let bytes = coordinator
            .vms
            .iter()
            .find(|vm| vm.name == source.name)
            .map(|vm| vm.precopy_bytes);
        run.vms.push(VmFigures {
            name: source.name.clone(),
            precopy_bytes: bytes.unwrap_or(0),
            pause_ms: 0.0,
            stopped_at_us: stop
                .with_context(|| format!("{} did not stop", source.name))?
                .at_us,
            resumed_at_us: watcher.at_us()?,
        });
    }
    run.conclude();
    Ok(run)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_switch_sends_once_more_is_read_from_its_log() {
        let line = |n: u32| {
            format!(
                "INFO port producer0: 51 frames read back from the TAP's queue; {n} that QEMU has taken go once more\n"
            )
        };
        assert_eq!(sent_again(&(line(2) + "else\n" + &line(1))).unwrap(), 3);
        assert_eq!(sent_again("").unwrap(), 0);
        assert!(sent_again(&line(4)).is_err());
    }
}
