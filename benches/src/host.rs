//! What a run takes from its host, and gives back: processes, hugepages, a folder, CPUs.

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::fs::FlockOperation;
use rustix::process::{Pid, Signal, kill_process};
use rustix::thread::CpuSet;

use crate::sys;

const HUGEPAGES: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

/// How many hugepages a run has added, in its folder.
const NOTE: &str = "hugepages-added";

/// A process of ours: killed and waited for when it drops.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts it; what it says goes to a file. To be called from the main thread: its end is the child's end.
    pub fn start(name: &str, command: Command, log: &Path) -> Result<Process> {
        Process::spawn(name, command, log, Stdio::null())
    }

    /// The same of one that takes commands ([`Process::tell`]).
    pub fn start_told(name: &str, command: Command, log: &Path) -> Result<Process> {
        Process::spawn(name, command, log, Stdio::piped())
    }

    fn spawn(name: &str, mut command: Command, log: &Path, stdin: Stdio) -> Result<Process> {
        let file = File::create(log).with_context(|| log.display().to_string())?;
        command.stdin(stdin).stdout(file.try_clone()?);
        command.stderr(file);
        sys::dies_with_us(&mut command);
        let child = command
            .spawn()
            .with_context(|| format!("{command:?} does not start"))?;
        Ok(Process {
            name: name.to_owned(),
            child,
            log: log.to_owned(),
        })
    }

    /// Its number.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.pid()).ok().and_then(Pid::from_raw);
        let pid = pid.context("a process number")?;
        kill_process(pid, signal).with_context(|| self.name.clone())
    }

    /// Stops all its threads where they are, until [`Process::go_on`].
    pub fn pause(&self) -> Result<()> {
        self.signal(Signal::STOP)?;
        // The signal takes effect when each thread next enters the kernel, at its next tick at the latest.
        self.until_state("T", |state| state == "T")
    }

    /// Lets it run again.
    pub fn go_on(&self) -> Result<()> {
        self.signal(Signal::CONT)?;
        self.until_state("running", |state| state != "T")
    }

    fn until_state(&self, what: &str, is: impl Fn(&str) -> bool) -> Result<()> {
        until(
            &format!("{} in state {what}", self.name),
            Duration::from_secs(5),
            || {
                // One that has ended since is in no state.
                let mut states = self
                    .threads()
                    .into_iter()
                    .filter_map(|t| state(self.pid(), t));
                Ok(states.all(|s| is(&s)).then_some(()))
            },
        )
    }

    fn threads(&self) -> Vec<u32> {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.pid()));
        let names = tasks.into_iter().flatten().flatten();
        names
            .filter_map(|t| t.file_name().to_str()?.parse().ok())
            .collect()
    }

    /// The CPU time of all its threads so far, in nanoseconds.
    pub fn cpu_ns(&self) -> u64 {
        let pid = self.pid();
        let tasks = self.threads().into_iter().map(|tid| Task { pid, tid });
        // Without one that ends meanwhile.
        tasks.filter_map(|t| Some(t.cpu_time().ok()?.ran)).sum()
    }

    /// The first of its threads whose names start so.
    pub fn thread(&self, prefix: &str) -> Option<Task> {
        self.named(prefix).first().copied()
    }

    /// Its threads whose names start so, by name.
    pub fn named(&self, prefix: &str) -> Vec<Task> {
        let pid = self.pid();
        let comm = |tid: u32| {
            let comm = std::fs::read_to_string(format!("/proc/{pid}/task/{tid}/comm"));
            Some((comm.ok().filter(|c| c.starts_with(prefix))?, tid))
        };
        let mut all: Vec<(String, u32)> = self.threads().into_iter().filter_map(comm).collect();
        all.sort();
        all.into_iter().map(|(_, tid)| Task { pid, tid }).collect()
    }

    /// An error if it has ended.
    pub fn check(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            Some(status) => bail!(
                "{} has ended: {status}; it said:\n{}",
                self.name,
                self.said()
            ),
            None => Ok(()),
        }
    }

    /// Writes to its standard input.
    pub fn tell(&mut self, lines: &str) -> Result<()> {
        let stdin = self.child.stdin.as_mut().context("it takes no commands")?;
        stdin.write_all(lines.as_bytes())?;
        Ok(stdin.flush()?)
    }

    /// All that it has said.
    pub fn has_said(&self) -> Result<String> {
        let text = std::fs::read(&self.log).with_context(|| self.log.display().to_string())?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }

    /// The end of what it has said.
    pub fn said(&self) -> String {
        let text = std::fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn state(pid: u32, tid: u32) -> Option<String> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/task/{tid}/stat")).ok()?;
    // The name before it may contain anything, but ends with the last parenthesis.
    let (_, rest) = stat.rsplit_once(") ")?;
    Some(rest.split(' ').next()?.to_owned())
}

/// A thread of some process.
#[derive(Debug, Clone, Copy)]
pub struct Task {
    pid: u32,
    tid: u32,
}

/// What a thread got and did not get of its CPU, in nanoseconds.
#[derive(Debug, Clone, Copy)]
pub struct CpuTime {
    /// On the CPU.
    pub ran: u64,
    /// Ready, but another thread had the CPU.
    pub waited: u64,
}

impl Task {
    /// The calling thread.
    pub fn current() -> Task {
        Task {
            pid: std::process::id(),
            tid: rustix::thread::gettid().as_raw_nonzero().get() as u32,
        }
    }

    /// Its times so far.
    pub fn cpu_time(&self) -> Result<CpuTime> {
        let path = format!("/proc/{}/task/{}/schedstat", self.pid, self.tid);
        let text = std::fs::read_to_string(&path).with_context(|| path.clone())?;
        let mut words = text.split_whitespace().map(str::parse);
        match (words.next(), words.next()) {
            (Some(Ok(ran)), Some(Ok(waited))) => Ok(CpuTime { ran, waited }),
            _ => bail!("{path}: {text:?}"),
        }
    }

    /// The CPU that it may run on, if that is one.
    pub fn pinned_to(&self) -> Result<Option<usize>> {
        let path = format!("/proc/{}/task/{}/status", self.pid, self.tid);
        let text = std::fs::read_to_string(&path)?;
        let list = text
            .lines()
            .find_map(|l| l.strip_prefix("Cpus_allowed_list:"));
        Ok(list.and_then(|l| l.trim().parse().ok()))
    }
}

/// Time that the hypervisor gave to others, of all CPUs, in nanoseconds.
pub fn steal_ns() -> u64 {
    let stat = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let ticks = stat.lines().next().and_then(|l| {
        let mut words = l.split_whitespace();
        words.nth(8)?.parse::<u64>().ok()
    });
    // USER_HZ is 100 on every Linux of this architecture.
    ticks.unwrap_or(0) * 10_000_000
}

/// What the CPUs did in all, and how much of it was work, in ticks.
pub fn ticks() -> (u64, u64) {
    let stat = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let line = stat.lines().next().unwrap_or_default();
    // user, nice, system, idle, iowait, irq, softirq, steal
    let words = line.split_whitespace().skip(1).take(8);
    let all: Vec<u64> = words.filter_map(|w| w.parse().ok()).collect();
    let idle: u64 = all.iter().skip(3).take(2).sum();
    let sum: u64 = all.iter().sum();
    (sum, sum - idle)
}

/// Waits until the machine has nothing else to do: other work would spoil a window, and a window the other work. False
/// if it still has after `patience`.
pub fn quiet(patience: Duration) -> Result<bool> {
    let since = Instant::now();
    loop {
        let before = ticks();
        thread::sleep(Duration::from_millis(100));
        let after = ticks();
        if 20 * (after.1 - before.1) <= after.0 - before.0 {
            return Ok(true);
        }
        if sys::is_interrupted() {
            bail!("interrupted");
        }
        if since.elapsed() > patience {
            return Ok(false);
        }
    }
}

/// Looks again and again until `found` gives something.
pub fn until<T>(
    what: &str,
    patience: Duration,
    mut found: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let since = Instant::now();
    loop {
        if let Some(value) = found()? {
            return Ok(value);
        }
        if sys::is_interrupted() {
            bail!("interrupted");
        }
        if since.elapsed() > patience {
            bail!("no {what} after {patience:?}");
        }
        thread::sleep(Duration::from_millis(1));
    }
}

/// Runs a short command to its end; what it says on standard error becomes the error.
pub fn run(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("{command:?} does not start"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{command:?}: {}: {}", output.status, said.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Installs packages of Debian, as root.
pub fn install(packages: &[&str]) -> Result<()> {
    eprintln!("installing {}", packages.join(", "));
    let install = || {
        run(Command::new("apt-get")
            .args(["install", "-y", "--no-install-recommends"])
            .args(["-o", "DPkg::Lock::Timeout=300"])
            .args(packages)
            .env("DEBIAN_FRONTEND", "noninteractive"))
    };
    if install().is_err() {
        run(Command::new("apt-get").arg("update"))?;
        install()?;
    }
    Ok(())
}

/// Pins the calling thread.
pub fn pin(cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu);
    rustix::thread::sched_setaffinity(None, &set).with_context(|| format!("CPU {cpu}"))
}

/// The calling thread may run on any CPU again.
pub fn unpin() -> Result<()> {
    let mut set = CpuSet::new();
    for cpu in 0..CpuSet::MAX_CPU {
        set.set(cpu);
    }
    rustix::thread::sched_setaffinity(None, &set).context("all CPUs")
}

/// The calling thread, and what it starts, goes before what else runs here.
pub fn go_first() -> Result<()> {
    // Where sessions are scheduled as groups, priorities count within a session only: raise ours. Not an error where
    // there are no such groups.
    let _ = std::fs::write("/proc/self/autogroup", "-20");
    rustix::process::setpriority_process(None, -20).context("setpriority")
}

fn hugepages() -> Result<u64> {
    let text = std::fs::read_to_string(HUGEPAGES).context("hugepages")?;
    Ok(text.trim().parse()?)
}

/// Takes so many out of the pool again. Not "as many as there were": others may have changed it meanwhile.
fn give_back(pages: u64) {
    if let Ok(now) = hugepages() {
        let _ = std::fs::write(HUGEPAGES, now.saturating_sub(pages).to_string());
    }
}

/// Hugepages of 2 MB beyond those that were there; given back when it drops.
#[derive(Debug)]
pub struct Hugepages {
    added: u64,
}

impl Hugepages {
    /// Takes `more`, and notes it in the folder, for the next run if this one is killed.
    pub fn take(more: u64, folder: &Folder) -> Result<Hugepages> {
        let before = hugepages()?;
        let note = folder.path().join(NOTE);
        std::fs::write(&note, more.to_string())?;
        std::fs::write(HUGEPAGES, (before + more).to_string()).context("hugepages: run as root")?;
        let mut added = hugepages()?.saturating_sub(before);
        if added < more {
            // Memory in pieces: the kernel can put it together.
            let _ = std::fs::write("/proc/sys/vm/compact_memory", "1");
            std::fs::write(HUGEPAGES, (before + more).to_string())?;
            added = hugepages()?.saturating_sub(before);
        }
        std::fs::write(&note, added.to_string())?;
        let pages = Hugepages { added };
        if added < more {
            bail!("only {added} of {more} hugepages of 2 MB are free");
        }
        Ok(pages)
    }
}

impl Drop for Hugepages {
    fn drop(&mut self) {
        give_back(self.added);
    }
}

/// The machine for this run alone: two runs at a time would measure each other, and share the pool of hugepages.
#[derive(Debug)]
pub struct Alone(#[expect(dead_code, reason = "the lock is held as long as it is open")] File);

impl Alone {
    /// Waits for its turn.
    pub fn wait() -> Result<Alone> {
        let file = File::options()
            .create(true)
            .append(true)
            .open("/tmp/gangway-pvp.lock")?;
        let mut told = false;
        loop {
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(Alone(file)),
                Err(rustix::io::Errno::WOULDBLOCK) => {}
                Err(e) => return Err(e).context("/tmp/gangway-pvp.lock"),
            }
            if !std::mem::replace(&mut told, true) {
                eprintln!("another run is under way; waiting for its end");
            }
            if sys::is_interrupted() {
                bail!("interrupted");
            }
            thread::sleep(Duration::from_millis(200));
        }
    }
}

/// A folder of this run; removed when it drops.
#[derive(Debug)]
pub struct Folder(PathBuf);

impl Folder {
    /// Makes it below `base`, and removes those of runs that were killed.
    pub fn below(base: &Path) -> Result<Folder> {
        let old = std::fs::read_dir(base).into_iter().flatten().flatten();
        for entry in old {
            let name = entry.file_name();
            let pid = name.to_str().and_then(|n| n.strip_prefix("gangway-pvp-"));
            if let Some(pid) = pid.and_then(|p| p.parse::<u32>().ok())
                && !Path::new(&format!("/proc/{pid}")).exists()
            {
                let note = std::fs::read_to_string(entry.path().join(NOTE));
                if let Some(pages) = note.ok().and_then(|n| n.parse().ok()) {
                    give_back(pages);
                }
                let _ = std::fs::remove_dir_all(entry.path());
            }
        }
        let path = base.join(format!("gangway-pvp-{}", std::process::id()));
        std::fs::create_dir(&path).with_context(|| path.display().to_string())?;
        Ok(Folder(path))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
