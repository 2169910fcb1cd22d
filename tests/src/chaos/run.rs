//! Carries a case out in a world.

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use super::rule::{self, Ending, Scene, Sum};
use super::{Case, Fault, NO_MIGRATION};
use crate::lab::Lab;
use crate::lab::demo::{Freeze, Ports};
use crate::lab::group::Group;
use crate::lab::host::Host;
use crate::lab::moved::World;
use crate::lab::process::{self, Process, until};
use crate::lab::qemu::{self, Files};
use crate::lab::qmp::Qmp;
use crate::lab::traffic::Flow;
use crate::workload::report::Clock;

/// The VM whose QEMU is killed: the one that the others send to.
const VICTIM: &str = "consumer";
/// A migration may be slow to give up.
const PATIENCE: Duration = Duration::from_secs(240);
/// As the unit in deploy/systemd says.
const RESTART: Duration = Duration::from_millis(200);
/// What a spool's disk has in cases that fill it, and the segment that goes with it.
const DISK_BYTES: u64 = 24 << 20;
/// What the user did then.
pub(super) const FREED: &str = "made room on the disk";
/// How long a user lets a migration wait for room on a disk.
const FULL: Duration = Duration::from_secs(40);

/// What came of a case.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Row {
    /// The case.
    pub case: Case,
    /// As on the command line.
    pub name: String,
    /// How it ended.
    pub ending: Ending,
    /// The coordinator's exit code; none if it was killed.
    pub exit: Option<i32>,
    /// What the user did afterwards, and the exit codes.
    pub user: Vec<String>,
    /// What the coordinator noted.
    pub troubles: Vec<String>,
    /// The traffic.
    pub traffic: Sum,
    /// How long no switch ran, if one was killed.
    pub outage_ms: Option<f64>,
    /// Whether the disk that was filled was missed: somebody waited for room, or was refused. It was full in any case.
    #[serde(default)]
    pub missed_room: Option<bool>,
    /// The longest silence that a client outside has seen in this world so far.
    #[serde(default)]
    pub silence_ms: f64,
    /// From the order to migrate to the end, the user's part included.
    pub took_s: f64,
    /// What is against the rules; nothing: a green row.
    pub wrong: Vec<String>,
    /// When, in seconds since 1970.
    pub at_s: u64,
    /// The rule that it was judged by: [`rule::VERSION`].
    #[serde(default)]
    pub rule: u32,
}

/// A world, and what it is good for.
pub struct Stage {
    world: World,
    small_disks: bool,
    /// Flows as they were when the last case ended.
    flows: Vec<Flow>,
    /// And what the VMs' kernels had dropped.
    dropped: BTreeMap<String, u64>,
    logs: PathBuf,
}

impl Stage {
    /// Boots the group on A.
    pub fn new(case: Option<&Case>, logs: &Path) -> Result<Stage> {
        Stage::with(case, logs, Ports::VhostUser, "")
    }

    /// The same with these ports, and these properties of all network cards, as QEMU has them: `packed=on`.
    pub fn with(case: Option<&Case>, logs: &Path, ports: Ports, nic: &str) -> Result<Stage> {
        let small_disks = case.is_some_and(|c| fills_a_disk(c.fault));
        let mut group = Group::roomy();
        group.vms.iter_mut().for_each(|vm| vm.nic = nic.to_owned());
        let prepare = |lab: &Lab| match small_disks {
            true => [&lab.a, &lab.b].into_iter().try_for_each(small_disk),
            false => Ok(()),
        };
        let edit = |config: String| match small_disks {
            true => config.replace(
                "/spool\"\n",
                &format!(
                    "/spool\"\nsegment_bytes = 131072\nquota_bytes = {}\n",
                    4 * DISK_BYTES
                ),
            ),
            false => config,
        };
        let mut world = World::prepared(&group, ports, logs, prepare, edit)?;
        world.traffic.be_patient();
        Ok(Stage {
            world,
            small_disks,
            flows: Vec::new(),
            dropped: BTreeMap::new(),
            logs: logs.to_owned(),
        })
    }

    /// Whether a case may follow in this world.
    pub fn suits(&self, case: &Case) -> bool {
        fills_a_disk(case.fault) == self.small_disks
    }

    /// The steps that the product has, from itself.
    pub fn steps(&self) -> Result<Vec<String>> {
        let mut command = self
            .world
            .coordinator
            .migrate(&self.world.group, Freeze::Early);
        let output = process::run(command.args(["--dry-run", "-o", "json"]))?;
        let plan: Value = serde_json::from_slice(&output.stdout).context("the dry run")?;
        let steps = plan["steps"].as_array().context("steps")?.iter();
        let names: Vec<String> = steps
            .filter_map(|s| s["step"].as_str().map(str::to_owned))
            .collect();
        if names.is_empty() {
            bail!("the dry run names no step");
        }
        Ok([names, vec![NO_MIGRATION.to_owned()]].concat())
    }

    /// What guests' kernels say when they have crashed by themselves.
    pub fn crashed(&self) -> Vec<String> {
        self.world.lab.crashed()
    }

    /// Carries the case out. Afterwards the world is as good as new if the row is green and the group is back on A with
    /// all its VMs. A case that the lab itself could not carry through is red.
    pub fn run(&mut self, case: &Case, steps: &[String]) -> Result<Row> {
        let row = self.run_in(case, steps);
        let row = row.unwrap_or_else(|error| Row::broken(case, &error));
        if !row.wrong.is_empty() {
            let folder = self.logs.join(case.to_string().replace([' ', ':'], "-"));
            self.world.lab.keep_logs(&folder)?;
            // What switches and kernels have dropped, as far as they still answer.
            for host in ["a", "b"] {
                let told = self
                    .world
                    .coordinator
                    .ask(&["host", "show", host, "-o", "json"]);
                std::fs::write(
                    folder.join(format!("{host}.json")),
                    told.unwrap_or_default(),
                )?;
            }
            std::fs::write(folder.join("kernels"), self.world.traffic.kernels())?;
        }
        Ok(row)
    }

    /// The group stays where it is, and A's switch is killed and comes again.
    fn run_in_place(&mut self, case: &Case) -> Result<Row> {
        let world = &mut self.world;
        world.traffic.start()?;
        thread::sleep(Duration::from_secs(2));
        let began = Instant::now();
        take_switch(world, case.fault)?;
        // One that is stopped takes nothing more long before it has ended.
        let outage = mend(world, case.fault)?.map(|_| began.elapsed().as_secs_f64());
        thread::sleep(Duration::from_secs(4));
        let mut row = Row::new(case, Ending::RolledBack);
        row.took_s = began.elapsed().as_secs_f64();
        row.wrong = runs_where_it_should(world, Ending::RolledBack, None);
        row.wrong.extend(left_over(world));
        // Its switch is the only one.
        self.judge(row, None, outage, (true, true))
    }

    /// What the VMs' kernels have dropped at their sockets since this was last asked.
    fn no_room(&mut self) -> Result<BTreeMap<String, u64>> {
        let now = self.world.traffic.no_room()?;
        let was = std::mem::replace(&mut self.dropped, now.clone());
        let since = |(vm, n): (String, u64)| {
            let before = was.get(&vm).copied().unwrap_or(0);
            (vm, n - before.min(n))
        };
        Ok(now.into_iter().map(since).collect())
    }

    /// Stops the traffic, and completes the row with what came of it.
    fn judge(
        &mut self,
        mut row: Row,
        dead: Option<&str>,
        outage: Option<f64>,
        (serves, mutes): (bool, bool),
    ) -> Result<Row> {
        if let Some(dead) = dead {
            self.world.traffic.forget(dead);
        }
        thread::sleep(Duration::from_millis(500));
        let flows = self.world.traffic.stop()?;
        let scene = Scene {
            fault: row.case.fault,
            dead,
            serves,
            mutes: mutes && self.world.ports == Ports::Tap,
            no_room: self.no_room()?,
        };
        let (traffic, wrong) = rule::judge(&scene, &self.flows, &flows);
        row.traffic = traffic;
        row.wrong.extend(wrong);
        row.outage_ms = outage.map(|s| (s * 10_000.0).round() / 10.0);
        let of_host = |flow: &&Flow| flow.clock == Some(Clock::Host);
        let stalls = flows.iter().filter(of_host).map(|flow| flow.stall_ms_max);
        row.silence_ms = stalls.fold(0.0, f64::max);
        self.flows = flows;
        Ok(row)
    }

    fn run_in(&mut self, case: &Case, steps: &[String]) -> Result<Row> {
        if case.step == NO_MIGRATION {
            return self.run_in_place(case);
        }
        let world = &mut self.world;
        world.traffic.start()?;
        thread::sleep(Duration::from_millis(700));
        let began = Instant::now();
        let freeze = match case.step.as_str() {
            "freeze-inside" => Freeze::Early,
            _ => Freeze::Switchover,
        };
        let (migrate, folder) = begin(world, case, freeze)?;
        let id = folder.file_name().unwrap_or_default().to_string_lossy();
        let mut outage = None;
        let told = Told::begin(world, case.fault);
        if case.fault != Fault::Fail {
            let struck = strike(world, case.fault, &migrate);
            // Whatever became of it, the coordinator must not wait for us.
            std::fs::write(folder.join("go"), b"")?;
            struck?;
            outage = mend(world, case.fault)?;
        }
        let mut user = Vec::new();
        if fills_a_disk(case.fault) {
            // Behind the commit it waits for room, and says so.
            let until = Instant::now() + FULL;
            while migrate.ended().is_none() && Instant::now() < until {
                thread::sleep(Duration::from_millis(50));
            }
            if migrate.ended().is_none() {
                empty_disk(world, case.fault);
                user.push(FREED.to_owned());
            }
        }
        let exit = migrate.wait(PATIENCE)?.code();
        if case.fault == Fault::KillCoordinator {
            thread::sleep(Duration::from_millis(500));
        }
        let mut wrong = Vec::new();
        let (state, troubles) = settle(world, &id, exit, &mut user, &mut wrong)?;
        let took_s = began.elapsed().as_secs_f64();
        empty_disk(world, case.fault);
        // When what was done: for whoever looks into a row.
        let journals = self.logs.join("journals");
        std::fs::create_dir_all(&journals)?;
        let name = case.to_string().replace([' ', ':'], "-");
        std::fs::copy(folder.join("journal"), journals.join(name))?;

        let ending = match state.as_str() {
            "moved" => Ending::Moved,
            "rolled_back" | "nothing_done" => Ending::RolledBack,
            other => {
                wrong.push(format!("it is not over: {other}"));
                Ending::Open
            }
        };
        let at = |name: &str| steps.iter().position(|s| s == name).unwrap_or(usize::MAX);
        let place = 2 * at(&case.step) + usize::from(!case.before);
        let must = rule::must_end(
            case.fault,
            place,
            2 * at("switchover") + 1,
            2 * at("commit"),
        );
        if let Some(must) = must.filter(|must| *must != ending) {
            wrong.push(format!("it had to end {must:?} and ended {ending:?}"));
        }
        let serves = rule::serves(case.fault, place, 2 * at("activate"), 2 * at("announce"));
        let mutes = rule::mutes(case.fault, place, 2 * at("stop"), 2 * at("activate"));
        let dead = matches!(
            (case.fault, ending),
            (Fault::KillSourceQemu, Ending::RolledBack)
                | (Fault::KillTargetQemu, Ending::Moved | Ending::Open)
        );
        let dead = dead.then_some(VICTIM);
        wrong.extend(runs_where_it_should(world, ending, dead));
        if ending != Ending::Open {
            wrong.extend(left_over(world));
        }
        let mut row = Row::new(case, ending);
        (row.exit, row.user, row.troubles) = (exit, user, troubles);
        (row.took_s, row.wrong) = ((took_s * 10.0).round() / 10.0, wrong);
        row.missed_room = match told {
            Some(told) => Some(told.of_room()? || row.troubles.iter().any(|t| says_no_room(t))),
            None => None,
        };
        self.judge(row, dead, outage, (serves, mutes))
    }
}

impl Row {
    fn broken(case: &Case, error: &anyhow::Error) -> Row {
        let mut row = Row::new(case, Ending::Open);
        row.wrong = vec![format!("the case came to no end: {error:#}")];
        row
    }

    fn new(case: &Case, ending: Ending) -> Row {
        Row {
            case: case.clone(),
            name: case.to_string(),
            ending,
            exit: None,
            user: Vec::new(),
            troubles: Vec::new(),
            traffic: Sum::default(),
            outage_ms: None,
            missed_room: None,
            silence_ms: 0.0,
            took_s: 0.0,
            wrong: Vec::new(),
            at_s: now_s(),
            rule: rule::VERSION,
        }
    }

    /// Whether it was judged by the rule as it is now; if not, it counts as missing.
    pub fn counts(&self) -> bool {
        self.rule == rule::VERSION
    }

    /// Whether the world that it was run in is as it was before.
    pub fn leaves_all_as_it_was(&self) -> bool {
        let whole = self.case.fault != Fault::KillSourceQemu;
        self.wrong.is_empty() && self.ending == Ending::RolledBack && whole
    }
}

fn now_s() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |d| d.as_secs())
}

fn fills_a_disk(fault: Fault) -> bool {
    matches!(fault, Fault::SourceDiskFull | Fault::TargetDiskFull)
}

/// What the switch whose disk is filled and the coordinator say from now on.
struct Told(Vec<(PathBuf, usize)>);

impl Told {
    fn begin(world: &World, fault: Fault) -> Option<Told> {
        let host = match fault {
            Fault::SourceDiskFull => &world.lab.a,
            Fault::TargetDiskFull => &world.lab.b,
            _ => return None,
        };
        let logs = [
            host.dir.join("switch.log"),
            world.lab.dir().join("migrate.log"),
        ];
        let so_far = |log: PathBuf| {
            let len = std::fs::read(&log).map_or(0, |text| text.len());
            (log, len)
        };
        Some(Told(logs.map(so_far).into()))
    }

    fn of_room(&self) -> Result<bool> {
        for (log, from) in &self.0 {
            let text = std::fs::read(log).with_context(|| log.display().to_string())?;
            let new = text.get(*from..).unwrap_or_default();
            if says_no_room(&String::from_utf8_lossy(new)) {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// The words of the switch for senders that wait, for a commit and an opening that it refuses, and the system's.
fn says_no_room(text: &str) -> bool {
    ["gets no room", "has no room", "No space left on device"]
        .iter()
        .any(|words| text.contains(words))
}

fn small_disk(host: &Host) -> Result<()> {
    host.in_memory("spool", &DISK_BYTES.to_string())
}

/// Starts the migration and waits until it stands at the case's point; of a step that fails, until it has begun.
fn begin(world: &World, case: &Case, freeze: Freeze) -> Result<(Process, PathBuf)> {
    let mut command = world.coordinator.migrate(&world.group, freeze);
    let key = match case.fault {
        Fault::Fail => "GANGWAY_FAIL_AT",
        _ => "GANGWAY_PAUSE_AT",
    };
    command.env(key, case.point());
    let log = world.lab.dir().join("migrate.log");
    let state = world.lab.dir().join("coordinator");
    let folders = || {
        let all = std::fs::read_dir(&state).into_iter().flatten().flatten();
        all.map(|f| f.path()).filter(|f| f.is_dir())
    };
    let old: Vec<PathBuf> = folders().collect();
    let process = Process::start("gangway migrate", command, &log)?;
    let folder = until(&format!("pause at {}", case.point()), PATIENCE, || {
        let young = folders().find(|f| !old.contains(f));
        let there = young.filter(|f| case.fault == Fault::Fail || f.join("paused").exists());
        if there.is_none()
            && let Some(status) = process.ended()
        {
            let said = std::fs::read_to_string(&log).unwrap_or_default();
            bail!("it ended with {status}: {said}");
        }
        Ok(there)
    })?;
    Ok((process, folder))
}

fn cable(world: &World, state: &str) -> Result<()> {
    world.lab.net.mgmt.ip(&format!("link set dev b {state}"))
}

fn junk(host: &Host) -> PathBuf {
    host.dir.join("spool/junk")
}

/// Kills a switch, or waits until it has stopped.
fn take_switch(world: &mut World, fault: Fault) -> Result<()> {
    let host = match fault {
        Fault::KillTargetSwitch => &mut world.lab.b,
        _ => &mut world.lab.a,
    };
    let switch = host.switch.take();
    if fault == Fault::RestartSourceSwitch {
        let switch = switch.context("a switch")?;
        switch.terminate()?;
        let status = switch.wait(Duration::from_secs(20))?;
        anyhow::ensure!(status.success(), "the switch stopped with {status}");
    }
    Ok(())
}

fn strike(world: &mut World, fault: Fault, migrate: &Process) -> Result<()> {
    let full = |host: &Host| -> Result<()> {
        use std::io::Write as _;
        let mut file = std::fs::File::create(junk(host))?;
        let piece = vec![1; 64 << 10];
        // Until there is no room.
        while file.write_all(&piece).is_ok() {}
        Ok(())
    };
    match fault {
        Fault::Fail => {}
        Fault::KillCoordinator => migrate.kill(),
        Fault::KillSourceSwitch | Fault::KillTargetSwitch | Fault::RestartSourceSwitch => {
            take_switch(world, fault)?;
        }
        Fault::KillSourceQemu => {
            let vm = world.sources.iter().find(|vm| vm.name == VICTIM);
            vm.context("the victim")?.process.kill();
        }
        Fault::KillTargetQemu => qemu::kill(&Files::new(&world.lab.b.dir, VICTIM))?,
        Fault::CutShort | Fault::CutLong => cable(world, "down")?,
        Fault::SourceDiskFull => full(&world.lab.a)?,
        Fault::TargetDiskFull => full(&world.lab.b)?,
    }
    Ok(())
}

/// What a supervisor or the network does by itself. Of a killed switch: how many seconds it was away.
fn mend(world: &mut World, fault: Fault) -> Result<Option<f64>> {
    let began = Instant::now();
    match fault {
        Fault::KillSourceSwitch | Fault::KillTargetSwitch | Fault::RestartSourceSwitch => {
            let of_a = fault != Fault::KillTargetSwitch;
            thread::sleep(RESTART);
            world.revive_switch(of_a)?;
            return Ok(Some(began.elapsed().as_secs_f64()));
        }
        Fault::CutShort => thread::sleep(Duration::from_secs(3)),
        Fault::CutLong => thread::sleep(Duration::from_secs(20)),
        _ => return Ok(None),
    }
    cable(world, "up")?;
    Ok(None)
}

fn empty_disk(world: &World, fault: Fault) {
    if fills_a_disk(fault) {
        for host in [&world.lab.a, &world.lab.b] {
            let _ = std::fs::remove_file(junk(host));
        }
    }
}

fn status(world: &World, id: &str) -> Result<(String, Vec<String>)> {
    let text = world.coordinator.ask(&["status", id, "-o", "json"])?;
    let told: Value = serde_json::from_str(&text).with_context(|| text.clone())?;
    let troubles = told["troubles"].as_array().into_iter().flatten();
    Ok((
        told["state"].as_str().unwrap_or_default().to_owned(),
        troubles
            .filter_map(|t| t.as_str().map(str::to_owned))
            .collect(),
    ))
}

/// What a user does: reads `gangway status`, and runs `gangway abort` as long as it says so, three times at most.
fn settle(
    world: &World,
    id: &str,
    exit: Option<i32>,
    user: &mut Vec<String>,
    wrong: &mut Vec<String>,
) -> Result<(String, Vec<String>)> {
    for _ in 0..3 {
        let (state, troubles) = status(world, id)?;
        if matches!(state.as_str(), "moved" | "rolled_back" | "nothing_done") {
            // 0 (7: without a VM that died) is for moved and 3 for rolled back; a migration that is not over has other codes.
            let right = match (exit, state.as_str()) {
                (None | Some(1 | 6), _) => true,
                (Some(0 | 7), word) => word == "moved",
                (Some(_), word) => word != "moved",
            };
            if !right {
                wrong.push(format!("exit code {exit:?}, and it is {state}"));
            }
            return Ok((state, troubles));
        }
        if exit.is_none() && !state.contains("gangway abort") && user.is_empty() {
            wrong.push(format!("status does not tell what to do: {state}"));
        }
        let log = world.lab.dir().join("abort.log");
        let command = world.coordinator.command(&["abort", id]);
        let code = Process::start("gangway abort", command, &log)?
            .wait(PATIENCE)?
            .code();
        user.push(format!(
            "abort: {}",
            code.map_or("killed".to_owned(), |c| c.to_string())
        ));
    }
    status(world, id)
}

fn vm_status(qmp: &mut Qmp) -> Result<String> {
    let told = qmp.execute("query-status", json!({}))?;
    Ok(told["status"].as_str().unwrap_or_default().to_owned())
}

/// Every VM that lives must run where the migration has ended, and nowhere else.
fn runs_where_it_should(world: &mut World, ending: Ending, dead: Option<&str>) -> Vec<String> {
    let mut wrong = Vec::new();
    for vm in &mut world.sources {
        let ends = ending == Ending::Moved && dead != Some(&vm.name);
        // QEMU has answered that it ends, and does.
        let within = Duration::from_secs(if ends { 5 } else { 0 });
        let ended = until("its end", within, || Ok(vm.process.ended()));
        let gone = ended.is_ok();
        let status = match gone {
            true => "gone".to_owned(),
            false => vm_status(&mut vm.qmp).unwrap_or_else(|e| e.to_string()),
        };
        let fine = match ending {
            // What is left of a VM that died behind the commit stays, stopped.
            Ending::Moved => gone || (dead == Some(&vm.name) && status == "postmigrate"),
            Ending::RolledBack => status == "running" || dead == Some(&vm.name),
            Ending::Open => true,
        };
        if !fine {
            wrong.push(format!("{} at A: {status}", vm.name));
        }
    }
    for vm in &world.group.vms {
        let files = Files::new(&world.lab.b.dir, &vm.name);
        let there = qemu::process_at(&files).is_some();
        let status = match there {
            false => "gone".to_owned(),
            true => Qmp::connect(&files.lab_qmp, Duration::from_secs(2))
                .and_then(|mut qmp| vm_status(&mut qmp))
                .unwrap_or_else(|e| e.to_string()),
        };
        let fine = match ending {
            Ending::Moved => status == "running" || dead == Some(&vm.name),
            Ending::RolledBack => !there,
            Ending::Open => true,
        };
        if !fine {
            wrong.push(format!("{} at B: {status}", vm.name));
        }
    }
    wrong
}

/// Holds that are not over, spools that are not empty: given 20 s.
fn left_over(world: &World) -> Vec<String> {
    let look = |host: &str| -> Result<Option<String>> {
        let text = world
            .coordinator
            .ask(&["host", "show", host, "-o", "json"])?;
        let told: Value = serde_json::from_str(&text)?;
        let mut left = Vec::new();
        for hold in told["holds"].as_array().into_iter().flatten() {
            let state = hold["state"].as_str().unwrap_or_default();
            if !matches!(state, "aborted" | "released") {
                left.push(format!("a hold that is {state}"));
            }
        }
        let used = told["host"]["spool_used_bytes"].as_u64().unwrap_or(0);
        if used > 0 {
            left.push(format!("{used} bytes in the spool"));
        }
        Ok((!left.is_empty()).then(|| format!("left on {host}: {}", left.join(", "))))
    };
    let mut wrong = Vec::new();
    let deadline = Instant::now() + Duration::from_secs(20);
    for host in ["a", "b"] {
        loop {
            let left = look(host).unwrap_or_else(|e| Some(format!("{host}: {e}")));
            match left {
                None => break,
                Some(left) if Instant::now() > deadline => {
                    wrong.push(left);
                    break;
                }
                Some(_) => thread::sleep(Duration::from_millis(200)),
            }
        }
    }
    wrong
}
