//! Processes of the lab: in a namespace, with a log, gone with their guard.

use anyhow::{Context, Result, bail};
use std::fs::File;
use std::path::Path;
use std::process::{ChildStdin, ChildStdout, Command, ExitStatus, Output, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::cleanup::{self, SharedChild};
use super::net::Netns;
use super::sys;

/// A long-lived process that we started. It is killed when this drops.
pub struct Process {
    /// For messages.
    pub name: String,
    child: SharedChild,
}

impl Process {
    /// Starts a command whose standard output and error go to `log`.
    pub fn start(name: &str, mut command: Command, log: &Path) -> Result<Self> {
        let file = File::options()
            .create(true)
            .append(true)
            .open(log)
            .with_context(|| log.display().to_string())?;
        command
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file);
        Self::spawn(name, command)
    }

    /// Starts a command whose progress, on standard error, the user sees; its standard output goes to `log`.
    pub fn start_shown(name: &str, mut command: Command, log: &Path) -> Result<Self> {
        let file = File::create(log).with_context(|| log.display().to_string())?;
        command.stdin(Stdio::null()).stdout(file);
        Self::spawn(name, command)
    }

    /// Starts a command that is talked to through its standard input and output.
    pub fn start_piped(
        name: &str,
        mut command: Command,
    ) -> Result<(Self, ChildStdin, ChildStdout)> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let process = Self::spawn(name, command)?;
        let pipes = {
            let mut child = process.child.lock().unwrap_or_else(PoisonError::into_inner);
            child.stdin.take().zip(child.stdout.take())
        };
        let (stdin, stdout) = pipes.context("the pipes of a piped process")?;
        Ok((process, stdin, stdout))
    }

    fn spawn(name: &str, mut command: Command) -> Result<Self> {
        sys::die_with_us(&mut command);
        let child = command
            .spawn()
            .with_context(|| format!("{name}: {command:?} does not start"))?;
        let child = Arc::new(Mutex::new(child));
        cleanup::add_child(&child);
        Ok(Self {
            name: name.to_owned(),
            child,
        })
    }

    /// Its number.
    pub fn pid(&self) -> u32 {
        self.child
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .id()
    }

    /// How it ended, if it has.
    pub fn ended(&self) -> Option<ExitStatus> {
        self.child
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .try_wait()
            .ok()
            .flatten()
    }

    /// Waits for its end.
    pub fn wait(&self, patience: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + patience;
        while Instant::now() < deadline {
            if let Some(status) = self.ended() {
                return Ok(status);
            }
            thread::sleep(Duration::from_millis(10));
        }
        bail!("{} still runs after {patience:?}", self.name)
    }

    /// Asks it to end, as `kill` does.
    pub fn terminate(&self) -> Result<()> {
        let pid = rustix::process::Pid::from_raw(self.pid() as i32).context("a process")?;
        rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
        Ok(())
    }

    /// Kills it at once, as `kill -9` does.
    pub fn kill(&self) {
        cleanup::end(&self.child);
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        cleanup::end(&self.child);
        cleanup::forget_child(&self.child);
    }
}

/// A command that runs in a namespace. `ip netns exec` replaces itself, so the child's number is the program's.
pub fn command_in(netns: &Netns, program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new("ip");
    command.args(["netns", "exec", netns.name()]).arg(program);
    command
}

/// Runs a short command to its end; its error output becomes the error.
pub fn run(command: &mut Command) -> Result<Output> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("{command:?} does not start"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let said = if said.trim().is_empty() {
            String::from_utf8_lossy(&output.stdout)
        } else {
            said
        };
        bail!("{command:?}: {}: {}", output.status, said.trim());
    }
    Ok(output)
}

/// Looks again and again until `found` gives something.
pub fn until<T>(
    what: &str,
    patience: Duration,
    mut found: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let deadline = Instant::now() + patience;
    loop {
        if let Some(value) = found()? {
            return Ok(value);
        }
        if Instant::now() > deadline {
            bail!("no {what} after {patience:?}");
        }
        thread::sleep(Duration::from_millis(20));
    }
}
