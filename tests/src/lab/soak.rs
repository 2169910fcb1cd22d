//! The long soak: the group moves back and forth under its traffic until the time is up. Nothing may be lost, and nothing may grow.
//!
//! After each move, and a rest, the processes and folders of both hosts are looked at. What is normal depends on where the group is: a
//! switch has its VMs' memory and descriptors only while they are there. So a look is compared with those in the same place only.
//!
//! Invariant: what may become of a figure is written in `FIGURES` before it is taken.
//! Invariant: what was measured is on the disk after each move, however the run ends.

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use std::fmt::Write as _;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use super::demo::Ports;
use super::group::Group;
use super::host::Host;
use super::moved::World;
use super::process::Process;
use super::series::Spread;
use super::traffic::Flow;

/// No longer: the numbers of the chain's datagrams end ten minutes later ([`crate::workload::tally`]).
pub const MINUTES_MAX: i64 = 240;
/// Fewer looks in one place say nothing about growth.
pub const FEWEST: usize = 6;
/// Moves whose looks are not judged: once there and back, each host makes what it goes on with, such as its VMs' logs.
pub const FIRST: usize = 2;

/// The hosts, where the group can be.
const PLACES: [&str; 2] = ["a", "b"];
/// How long traffic flows before the first move.
const WARM: Duration = Duration::from_secs(3);
/// Between a move and the look: longer than a QUIC connection lives without an answer.
const REST: Duration = Duration::from_secs(8);
/// What a host keeps of migrations that are over: so little that it has to delete some during the run.
const LEDGER_BYTES: u64 = 16 << 20;
/// What the threads of the switch's runtime are called, those for blocking calls, too.
const POOL: &str = "control";

/// What a process has.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ProcessLook {
    /// All memory that is there, also of files and of guests.
    pub rss_kib: u64,
    /// Of it, the process's own.
    pub anon_kib: u64,
    /// Of it, what is shared: the guests'.
    pub shmem_kib: u64,
    /// Open descriptors.
    pub descriptors: u64,
    /// Threads, but for those of the runtime.
    pub threads: u64,
    /// Threads of the runtime.
    pub pool_threads: u64,
}

/// What is in a folder.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct FolderLook {
    /// Files, folders and sockets.
    pub entries: u64,
    /// Of the files.
    pub bytes: u64,
}

/// A host, a while after a move.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct HostLook {
    /// Its name.
    pub host: String,
    /// `gangway-switch`.
    pub switch: ProcessLook,
    /// `gangway-keeper`.
    pub keeper: ProcessLook,
    /// The spool, without its pool: of holds that are over nothing is left in it.
    pub spool: FolderLook,
    /// The spool's segments that are ready for the next hold.
    pub pool: FolderLook,
    /// The ledger.
    pub ledger: FolderLook,
    /// Everything else: sockets, logs, what the switch remembers of VMs that it has started.
    pub state: FolderLook,
}

/// A move, and what is there after it.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Move {
    /// The how manieth, from 1 on.
    pub number: usize,
    /// Where the group is from now on.
    pub to: String,
    /// When it began, in seconds since the first one.
    pub began_s: f64,
    /// How long the command took.
    pub took_s: f64,
    /// From the first VM's stop to the last one's resume.
    pub blackout_ms: Option<f64>,
    /// Frames that were held, each of which `gangway verify` has found delivered.
    pub held_frames: u64,
    /// Migrations of which the coordinator has a journal.
    pub journals: u64,
    /// Both hosts.
    pub hosts: Vec<HostLook>,
}

/// What may become of a figure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// It does not grow.
    Never,
    /// Memory, in KiB: it grows by 5 % and 2 MiB at most.
    Memory,
    /// The same on the host where the group is not. Where it is, it depends on what the guests touch.
    MemoryAway,
    /// It stays at what the busiest moment has needed, which may come late: it grows by 8 at most.
    Peak,
    /// It is shown, and no more.
    Shown,
}

impl Rule {
    fn most(self, first: f64) -> f64 {
        match self {
            Rule::Never => first,
            Rule::Memory | Rule::MemoryAway => first * 1.05 + 2048.0,
            Rule::Peak => first + 8.0,
            Rule::Shown => f64::INFINITY,
        }
    }

    fn judges(self, place: &str, host: &str) -> bool {
        match self {
            Rule::Never | Rule::Memory | Rule::Peak => true,
            Rule::MemoryAway => place != host,
            Rule::Shown => false,
        }
    }
}

type Of = fn(&HostLook) -> u64;

/// All figures of a host.
const FIGURES: [(&str, Rule, Of); 18] = [
    ("switch: memory KiB", Rule::MemoryAway, |h| h.switch.rss_kib),
    ("switch: own memory KiB", Rule::Memory, |h| {
        h.switch.anon_kib
    }),
    ("switch: shared memory KiB", Rule::Shown, |h| {
        h.switch.shmem_kib
    }),
    ("switch: descriptors", Rule::Never, |h| h.switch.descriptors),
    ("switch: threads", Rule::Never, |h| h.switch.threads),
    ("switch: threads of the runtime", Rule::Peak, |h| {
        h.switch.pool_threads
    }),
    ("keeper: memory KiB", Rule::MemoryAway, |h| h.keeper.rss_kib),
    ("keeper: own memory KiB", Rule::Memory, |h| {
        h.keeper.anon_kib
    }),
    ("keeper: descriptors", Rule::Never, |h| h.keeper.descriptors),
    ("keeper: threads", Rule::Never, |h| h.keeper.threads),
    ("spool: files", Rule::Never, |h| h.spool.entries),
    ("spool: bytes", Rule::Never, |h| h.spool.bytes),
    ("spool's pool: files", Rule::Peak, |h| h.pool.entries),
    ("spool's pool: bytes", Rule::Shown, |h| h.pool.bytes),
    ("ledger: files", Rule::Shown, |h| h.ledger.entries),
    ("ledger: bytes", Rule::Shown, |h| h.ledger.bytes),
    ("state: files", Rule::Never, |h| h.state.entries),
    ("state: bytes", Rule::Shown, |h| h.state.bytes),
];

/// The medians of the first and of the last third; `None` of fewer than [`FEWEST`] values.
fn thirds(values: &[u64]) -> Option<(f64, f64)> {
    if values.len() < FEWEST {
        return None;
    }
    let third = values.len() / 3;
    let median = |part: &[u64]| Spread::of(part.iter().map(|v| *v as f64)).map(|s| s.median);
    let first = median(values.get(..third)?)?;
    let last = median(values.get(values.len() - third..)?)?;
    Some((first, last))
}

/// PURE: how a figure has grown beyond its rule, by the medians of the first and of the last third of its values, which one odd
/// look does not change. `None`: it has not, or there are fewer than [`FEWEST`] values.
pub fn growth(values: &[u64], rule: Rule) -> Option<String> {
    let (first, last) = thirds(values)?;
    let most = rule.most(first);
    (last > most).then(|| format!("from {first} to {last}, {most} at most"))
}

/// The moves to a place, but for the first.
fn moves_to<'a>(moves: &'a [Move], place: &'a str) -> impl Iterator<Item = &'a Move> {
    moves
        .iter()
        .filter(move |m| m.number > FIRST && m.to == place)
}

/// A figure of a host at all looks with the group in one place.
fn values(moves: &[Move], place: &str, host: &str, of: Of) -> Vec<u64> {
    let looks = moves_to(moves, place).flat_map(|m| &m.hosts);
    looks.filter(|look| look.host == host).map(of).collect()
}

/// PURE: what has grown that must not, and in which places there were too few looks to say so.
pub fn judge(moves: &[Move]) -> (Vec<String>, Vec<String>) {
    let (mut wrong, mut unknown) = (Vec::new(), Vec::new());
    for place in PLACES {
        let looks = moves_to(moves, place).count();
        if looks < FEWEST {
            unknown.push(format!(
                "growth is not judged with the group on {place}: {looks} looks behind the first {FIRST} moves, {FEWEST} are needed"
            ));
            continue;
        }
        for host in PLACES {
            for (name, rule, of) in FIGURES {
                if !rule.judges(place, host) {
                    continue;
                }
                if let Some(how) = growth(&values(moves, place, host, of), rule) {
                    wrong.push(format!(
                        "host {host} with the group on {place}: {name} grew {how}"
                    ));
                }
            }
        }
    }
    let mut looks = moves.iter().flat_map(|m| {
        m.hosts
            .iter()
            .map(move |look| (m.number, &look.host, &look.ledger))
    });
    // The youngest record stays, whatever its size.
    let over = looks.find(|(.., ledger)| ledger.bytes > LEDGER_BYTES && ledger.entries > 1);
    if let Some((number, host, ledger)) = over {
        wrong.push(format!(
            "host {host} after move {number}: {} bytes in the ledger, {LEDGER_BYTES} at most",
            ledger.bytes
        ));
    }
    if let Some(m) = moves.iter().find(|m| m.journals > m.number as u64) {
        wrong.push(format!("{} journals of {} moves", m.journals, m.number));
    }
    (wrong, unknown)
}

impl ProcessLook {
    fn take(process: &Process) -> Result<Self> {
        let folder = PathBuf::from(format!("/proc/{}", process.pid()));
        let why = || format!("a look at {}", process.name);
        let status = std::fs::read_to_string(folder.join("status")).with_context(why)?;
        let mut look = Self::parse(&status).with_context(|| format!("{} ended", process.name))?;
        let descriptors = std::fs::read_dir(folder.join("fd")).with_context(why)?;
        look.descriptors = descriptors.count() as u64;
        let tasks = std::fs::read_dir(folder.join("task")).with_context(why)?;
        for task in tasks.flatten() {
            // One that cannot be read has just ended.
            match std::fs::read_to_string(task.path().join("comm")) {
                Ok(name) if name.trim_end() == POOL => look.pool_threads += 1,
                Ok(_) => look.threads += 1,
                Err(_) => {}
            }
        }
        Ok(look)
    }

    /// The memory, from /proc/PID/status (proc(5)); none of a process that has ended.
    fn parse(status: &str) -> Option<Self> {
        let kib = |key: &str| -> Option<u64> {
            let mut lines = status.lines();
            let value = lines.find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
            value.split_whitespace().next()?.parse().ok()
        };
        Some(Self {
            rss_kib: kib("VmRSS")?,
            anon_kib: kib("RssAnon")?,
            shmem_kib: kib("RssShmem")?,
            ..Self::default()
        })
    }
}

impl FolderLook {
    /// All that is below a folder, but for what is called `without` directly in it; nothing if there is no such folder.
    fn take(dir: &Path, without: &[&str]) -> Result<Self> {
        let mut look = Self::default();
        let mut folders = vec![dir.to_owned()];
        while let Some(folder) = folders.pop() {
            let entries = match std::fs::read_dir(&folder) {
                Ok(entries) => entries,
                Err(e) if e.kind() == ErrorKind::NotFound => continue,
                Err(e) => return Err(e).with_context(|| folder.display().to_string()),
            };
            for entry in entries.flatten() {
                let name = entry.file_name();
                if folder == dir && without.iter().any(|other| name == *other) {
                    continue;
                }
                // What is gone meanwhile does not count.
                let Ok(meta) = entry.metadata() else { continue };
                look.entries += 1;
                match meta.is_dir() {
                    true => folders.push(entry.path()),
                    false => look.bytes += meta.len(),
                }
            }
        }
        Ok(look)
    }
}

impl HostLook {
    fn take(host: &Host) -> Result<Self> {
        let process = |process: &Option<Process>| -> Result<ProcessLook> {
            ProcessLook::take(process.as_ref().context("it does not run")?)
        };
        let folder = |name: &str, without: &[&str]| FolderLook::take(&host.dir.join(name), without);
        Ok(Self {
            host: host.name.clone(),
            switch: process(&host.switch)?,
            keeper: process(&host.keeper)?,
            spool: folder("spool", &["pool"])?,
            pool: folder("spool/pool", &[])?,
            ledger: folder("ledger", &[])?,
            state: FolderLook::take(&host.dir, &["spool", "ledger"])?,
        })
    }
}

/// What the soak shall do.
#[derive(Clone, Debug)]
pub struct Options {
    /// No move begins later.
    pub duration: Duration,
    /// Where the report and logs go.
    pub out: PathBuf,
}

/// `soak.json`.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// All moves, each with its looks.
    pub moves: Vec<Move>,
    /// The traffic's verdict, once it has ended.
    pub traffic: Vec<Flow>,
    /// What is against the rules.
    pub wrong: Vec<String>,
    /// What could not be judged.
    pub unknown: Vec<String>,
}

impl Report {
    /// The traffic was judged, and nothing is against the rules.
    pub fn is_green(&self) -> bool {
        self.wrong.is_empty() && !self.traffic.is_empty()
    }

    /// Judges the whole run, whose traffic has ended.
    fn conclude(&mut self, traffic: Vec<Flow>) {
        for flow in traffic.iter().filter(|flow| !flow.is_clean()) {
            self.wrong.push(format!(
                "{}: of {} sent {} lost, {} twice, {} out of order, {} damaged, digests {:?} and {:?}; {}",
                flow.name,
                flow.sent,
                flow.lost,
                flow.duplicated,
                flow.reordered,
                flow.corrupted,
                flow.digest_source,
                flow.digest_target,
                flow.errors.join("; ")
            ));
        }
        self.traffic = traffic;
        let (wrong, unknown) = judge(&self.moves);
        self.wrong.extend(wrong);
        self.unknown.extend(unknown);
    }

    /// Writes `soak.json` and, for people, `soak.md` into a folder.
    pub fn write(&self, dir: &Path) -> Result<()> {
        std::fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
        for (name, bytes) in [
            ("soak.json", serde_json::to_vec_pretty(self)?),
            ("soak.md", self.markdown().into_bytes()),
        ] {
            let (path, new) = (dir.join(name), dir.join(format!("{name}.new")));
            std::fs::write(&new, bytes)
                .and_then(|()| std::fs::rename(&new, &path))
                .with_context(|| path.display().to_string())?;
        }
        Ok(())
    }

    /// The verdict, the flows, the figures.
    pub fn markdown(&self) -> String {
        let mut text = match (self.is_green(), self.traffic.is_empty()) {
            (true, _) => "Green".to_owned(),
            (false, true) if self.wrong.is_empty() => "Not over".to_owned(),
            (false, _) => "RED".to_owned(),
        };
        let minutes = self.moves.last().map_or(0.0, |m| m.began_s / 60.0);
        let _ = write!(text, ": {} moves in {minutes:.0} min", self.moves.len());
        let blackouts = self.moves.iter().filter_map(|m| m.blackout_ms);
        if let Some(Spread { min, median, max }) = Spread::of(blackouts) {
            let _ = write!(text, ", blackout {min:.0} / {median:.0} / {max:.0} ms");
        }
        let held: u64 = self.moves.iter().map(|m| m.held_frames).sum();
        let _ = writeln!(text, ", {held} frames held and delivered.");
        for line in self.wrong.iter().chain(&self.unknown) {
            let _ = writeln!(text, "* {}", line.replace('\n', " "));
        }
        if !self.traffic.is_empty() {
            text +=
                "\n| flow | sent | lost | twice | out of order | damaged | longest silence ms |\n";
            text += "|---|---:|---:|---:|---:|---:|---:|\n";
        }
        for f in &self.traffic {
            let _ = writeln!(
                text,
                "| {} | {} | {} | {} | {} | {} | {:.0} |",
                f.name, f.sent, f.lost, f.duplicated, f.reordered, f.corrupted, f.stall_ms_max
            );
        }
        text += "\n| host | figure | with the group on a | with the group on b |\n|---|---|---:|---:|\n";
        for host in PLACES {
            for (name, _, of) in FIGURES {
                let cell = |place| match thirds(&values(&self.moves, place, host, of)) {
                    Some((first, last)) => format!("{first} -> {last}"),
                    None => "-".to_owned(),
                };
                let _ = writeln!(text, "| {host} | {name} | {} | {} |", cell("a"), cell("b"));
            }
        }
        text + &format!(
            "\nMedians of the first and of the last third of the looks behind the first {FIRST} moves; - : fewer than {FEWEST} looks.\n"
        )
    }
}

/// Runs the soak; whether it is green. What the lab itself could not do is an error only before the first move, and red later.
pub fn run(options: &Options, say: &mut dyn FnMut(&str)) -> Result<bool> {
    let logs = options.out.join("logs");
    let retain = format!("[ledger]\nkeep_bytes = {LEDGER_BYTES}\n");
    let mut world = World::prepared(
        &Group::default(),
        Ports::VhostUser,
        &logs,
        |_| Ok(()),
        |config| config.replace("[ledger]\n", &retain),
    )?;
    let mut report = Report::default();
    let moved = back_and_forth(&mut world, options, &mut report, say);
    if let Err(error) = world.lab.blame(moved) {
        report.wrong.push(format!(
            "it ended after {} moves: {error:#}",
            report.moves.len()
        ));
    }
    // Even a move that failed must not have lost anything.
    let flows = world.traffic.stop().unwrap_or_else(|error| {
        let why = format!("the traffic can't be judged: {error:#}");
        report.wrong.push(why);
        Vec::new()
    });
    if !flows.iter().all(Flow::is_clean) {
        say(&world.drops());
    }
    report.conclude(flows);
    report.write(&options.out)?;
    world.lab.keep_logs(&logs)?;
    Ok(report.is_green())
}

fn back_and_forth(
    world: &mut World,
    options: &Options,
    report: &mut Report,
    say: &mut dyn FnMut(&str),
) -> Result<()> {
    world.traffic.start()?;
    say("the VMs run on a, traffic flows");
    thread::sleep(WARM);
    let first = Instant::now();
    while first.elapsed() < options.duration {
        let number = report.moves.len() + 1;
        let to = PLACES[number % 2];
        let one = one_move(world, number, to, first)
            .with_context(|| format!("move {number}, to {to}"))?;
        say(&line(&one));
        report.moves.push(one);
        report.write(&options.out)?;
    }
    Ok(())
}

fn one_move(world: &World, number: usize, to: &str, first: Instant) -> Result<Move> {
    let began = Instant::now();
    let told = world.move_to(to)?;
    let took_s = began.elapsed().as_secs_f64();
    let proof = world.verify("moved").context("gangway verify")?;
    thread::sleep(REST);
    ensure!(world.lab.crashed().is_empty(), "not all guests live");
    let hosts = [&world.lab.a, &world.lab.b];
    let looks = hosts
        .map(|host| HostLook::take(host).with_context(|| format!("a look at host {}", host.name)));
    Ok(Move {
        number,
        to: to.to_owned(),
        began_s: began.duration_since(first).as_secs_f64(),
        took_s,
        blackout_ms: told.blackout_ms,
        held_frames: proof.frames,
        journals: journals(&world.lab.dir().join("coordinator"))?,
        hosts: looks.into_iter().collect::<Result<_>>()?,
    })
}

/// Each migration has a folder.
fn journals(dir: &Path) -> Result<u64> {
    let entries = std::fs::read_dir(dir).with_context(|| dir.display().to_string())?;
    Ok(entries.flatten().filter(|e| e.path().is_dir()).count() as u64)
}

fn line(m: &Move) -> String {
    let blackout = m
        .blackout_ms
        .map_or("?".to_owned(), |ms| format!("{ms:.0}"));
    let mut text = format!(
        "move {} to {}: {:.1} s, blackout {blackout} ms, {} frames held",
        m.number, m.to, m.took_s, m.held_frames
    );
    let mib = |kib: u64| kib as f64 / 1024.0;
    for look in &m.hosts {
        let (s, k) = (&look.switch, &look.keeper);
        let _ = write!(
            text,
            "; {}: switch {:.1} MiB (own {:.1}) {} fds, keeper {:.1} MiB {} fds, spool {} files",
            look.host,
            mib(s.rss_kib),
            mib(s.anon_kib),
            s.descriptors,
            mib(k.rss_kib),
            k.descriptors,
            look.spool.entries
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As many moves, with hosts whose figures `set` makes from host, place and number.
    fn moves(count: usize, set: impl Fn(&mut HostLook, &str, usize)) -> Vec<Move> {
        let one = |number: usize| {
            let to = PLACES[number % 2];
            let hosts = PLACES.map(|host| {
                let mut look = HostLook {
                    host: host.to_owned(),
                    ..HostLook::default()
                };
                set(&mut look, to, number);
                look
            });
            Move {
                number,
                to: to.to_owned(),
                journals: number as u64,
                hosts: hosts.into(),
                ..Move::default()
            }
        };
        (1..=count).map(one).collect()
    }

    #[test]
    fn a_count_that_rises_has_grown_and_one_odd_look_has_not() {
        let rising: Vec<u64> = (40..52).collect();
        let told = growth(&rising, Rule::Never);
        assert_eq!(told.as_deref(), Some("from 41.5 to 49.5, 41.5 at most"));
        assert_eq!(growth(&[40; 12], Rule::Never), None);
        assert_eq!(growth(&[5, 5, 5, 5, 5, 5, 5, 90, 5], Rule::Never), None);
        assert_eq!(growth(&[9, 9, 9, 9, 9, 9, 5, 5, 5], Rule::Never), None);
        assert_eq!(growth(&rising, Rule::Peak), None);
        let leak: Vec<u64> = (0..30).collect();
        assert!(growth(&leak, Rule::Peak).is_some());
        assert_eq!(growth(&leak, Rule::Shown), None);
    }

    #[test]
    fn memory_may_grow_by_a_twentieth_and_two_mebibytes() {
        let most = 105_000 + 2048;
        let values = |last: u64| [100_000, 100_000, 0, 0, last, last];
        assert_eq!(growth(&values(most), Rule::Memory), None);
        assert!(growth(&values(most + 1), Rule::Memory).is_some());
    }

    #[test]
    fn five_looks_say_nothing() {
        assert_eq!(growth(&[1, 2, 3, 4, 5], Rule::Never), None);
        assert!(growth(&[1, 2, 3, 4, 5, 6], Rule::Never).is_some());
        let (wrong, unknown) = judge(&moves(13, |look, _, n| look.spool.entries = n as u64));
        assert_eq!(
            unknown.len(),
            1,
            "6 on b behind the first, 5 on a: {unknown:?}"
        );
        assert!(unknown[0].contains("on a: 5 looks"), "{unknown:?}");
        assert!(wrong.iter().all(|w| w.contains("group on b")), "{wrong:?}");
        assert_eq!(wrong.len(), 2, "on both hosts: {wrong:?}");
    }

    #[test]
    fn a_look_is_compared_with_those_in_the_same_place() {
        fn there(look: &HostLook, place: &str) -> bool {
            look.host == place
        }
        let steady = moves(24, |look, place, _| {
            let here = there(look, place);
            look.switch.descriptors = if here { 80 } else { 50 };
            look.switch.rss_kib = if here { 400_000 } else { 60_000 };
        });
        assert_eq!(judge(&steady), (Vec::new(), Vec::new()));
        // A switch that does not let go of what it had of the VMs, and only shows it when they are gone.
        let leaks = moves(24, |look, place, n| {
            look.switch.descriptors = match there(look, place) {
                true => 80,
                false => 50 + n as u64,
            };
        });
        let (wrong, _) = judge(&leaks);
        assert_eq!(wrong.len(), 2, "{wrong:?}");
        assert!(
            wrong[0].starts_with("host b with the group on a: switch: descriptors grew"),
            "{wrong:?}"
        );
    }

    #[test]
    fn memory_of_guests_is_judged_where_there_are_none() {
        let grows = |here: bool| {
            let moves = moves(24, move |look, place, n| {
                let is_here = look.host == place;
                look.switch.rss_kib = if is_here == here {
                    10_000 * n as u64
                } else {
                    7
                };
            });
            judge(&moves).0.len()
        };
        assert_eq!((grows(true), grows(false)), (0, 2));
    }

    #[test]
    fn a_ledger_beyond_what_is_to_be_kept_and_a_journal_too_many_are_wrong() {
        let mut moves = moves(12, |look, _, n| {
            look.ledger = FolderLook {
                entries: n as u64,
                bytes: LEDGER_BYTES,
            };
        });
        assert_eq!(judge(&moves).0, Vec::<String>::new());
        moves[3].hosts[1].ledger.bytes += 1;
        moves[5].journals += 1;
        let (wrong, _) = judge(&moves);
        assert_eq!(wrong.len(), 2, "{wrong:?}");
        assert!(wrong[0].starts_with("host b after move 4:"), "{wrong:?}");
    }

    #[test]
    fn a_process_is_read_from_proc() {
        let text = "Name:\tx\nVmRSS:\t   61234 kB\nRssAnon:\t   20000 kB\nRssFile:\t 1 kB\nRssShmem:\t   400 kB\n";
        let look = ProcessLook::parse(text).unwrap();
        let found = (look.rss_kib, look.anon_kib, look.shmem_kib);
        assert_eq!(found, (61_234, 20_000, 400));
        assert_eq!(ProcessLook::parse("Name:\tx\nState:\tZ (zombie)\n"), None);
    }

    #[test]
    fn all_below_a_folder_counts_but_for_what_is_left_out_at_its_top() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["pool/a", "hold/pool/b", "lock"] {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "1234").unwrap();
        }
        let look = FolderLook::take(dir.path(), &["pool"]).unwrap();
        let expected = FolderLook {
            entries: 4,
            bytes: 8,
        };
        assert_eq!(look, expected);
        let none = FolderLook::take(&dir.path().join("none"), &[]).unwrap();
        assert_eq!(none, FolderLook::default());
    }

    #[test]
    fn a_report_is_green_only_when_its_traffic_was_judged_and_was_clean() {
        let flow = |received| Flow {
            name: "udp a->b".to_owned(),
            sent: 10,
            received,
            lost: 10 - received,
            ..Flow::default()
        };
        let mut report = Report::default();
        assert!(!report.is_green(), "no traffic proves nothing");
        assert!(report.markdown().starts_with("Not over: 0 moves"));
        report.moves = moves(24, |_, _, _| {});
        report.conclude(vec![flow(10)]);
        assert!(report.is_green(), "{:?}", report.wrong);
        assert!(report.markdown().starts_with("Green: 24 moves"));
        report.conclude(vec![flow(9)]);
        assert!(!report.is_green());
        let text = report.markdown();
        assert!(text.starts_with("RED"), "{text}");
        assert!(text.contains("| udp a->b | 10 | 1 |"), "{text}");
        assert!(
            text.contains("| b | switch: descriptors | 0 -> 0 |"),
            "{text}"
        );
    }

    #[test]
    fn the_report_is_left_as_json_and_for_people() {
        let dir = tempfile::tempdir().unwrap();
        let report = Report {
            moves: moves(2, |look, _, n| look.switch.descriptors = n as u64),
            ..Report::default()
        };
        report.write(dir.path()).unwrap();
        let text = std::fs::read(dir.path().join("soak.json")).unwrap();
        let json: serde_json::Value = serde_json::from_slice(&text).unwrap();
        assert_eq!(json["moves"][1]["hosts"][0]["switch"]["descriptors"], 2);
        assert!(dir.path().join("soak.md").is_file());
    }
}
