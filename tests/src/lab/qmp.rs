//! A small blocking client of QEMU's monitor, and the recipes that the lab needs.

use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::process::until;

/// How long QEMU may take for an answer; a migration's last stretch holds its monitor up.
const PATIENCE: Duration = Duration::from_secs(20);

/// An event with QEMU's own time stamp.
#[derive(Clone, Debug)]
pub struct Event {
    /// Its name, for example `STOP`.
    pub name: String,
    /// Microseconds since 1970 on the host's clock.
    pub at_us: u64,
    /// What it carries.
    pub data: Value,
}

/// A connection to a monitor.
pub struct Qmp {
    path: PathBuf,
    reader: BufReader<UnixStream>,
    line: String,
    events: VecDeque<Event>,
}

impl Qmp {
    /// Connects, waiting for the socket to appear.
    pub fn connect(path: &Path, patience: Duration) -> Result<Self> {
        let stream = until(&format!("monitor at {}", path.display()), patience, || {
            Ok(UnixStream::connect(path).ok())
        })?;
        let mut qmp = Self {
            path: path.to_owned(),
            reader: BufReader::new(stream),
            line: String::new(),
            events: VecDeque::new(),
        };
        let greeting = qmp.read(PATIENCE)?.context("a greeting")?;
        if greeting.get("QMP").is_none() {
            bail!("{}: no monitor: {greeting}", qmp.path.display());
        }
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// The next line, or `None` when none comes in time.
    fn read(&mut self, patience: Duration) -> Result<Option<Value>> {
        self.reader
            .get_ref()
            .set_read_timeout(Some(patience.max(Duration::from_millis(1))))?;
        // A line that was cut by the time-out stays in `line` and is read on.
        match self.reader.read_line(&mut self.line) {
            Ok(0) => bail!("{}: QEMU has closed its monitor", self.path.display()),
            Ok(_) => {
                let value = serde_json::from_str(&self.line)
                    .with_context(|| format!("not JSON: {}", self.line))?;
                self.line.clear();
                Ok(Some(value))
            }
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
                ) =>
            {
                Ok(None)
            }
            Err(error) => Err(error).with_context(|| self.path.display().to_string()),
        }
    }

    fn note(&mut self, value: &Value) {
        if let Some(name) = value["event"].as_str() {
            let part = |key: &str| value["timestamp"][key].as_u64().unwrap_or(0);
            let at_us = part("seconds") * 1_000_000 + part("microseconds");
            self.events.push_back(Event {
                name: name.to_owned(),
                at_us,
                data: value["data"].clone(),
            });
        }
    }

    /// Runs a command; events that come in between are kept.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let line = json!({"execute": command, "arguments": arguments}).to_string() + "\n";
        self.reader
            .get_mut()
            .write_all(line.as_bytes())
            .with_context(|| self.path.display().to_string())?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let value = self
                .read(deadline.saturating_duration_since(Instant::now()))?
                .with_context(|| format!("{command}: no answer from {}", self.path.display()))?;
            if let Some(error) = value.get("error") {
                bail!("{command}: {}", error["desc"].as_str().unwrap_or("refused"));
            }
            if let Some(answer) = value.get("return") {
                return Ok(answer.clone());
            }
            self.note(&value);
        }
    }

    /// All events so far, taken out. A QEMU that has gone leaves those that it sent before.
    pub fn events(&mut self) -> Vec<Event> {
        while let Ok(Some(value)) = self.read(Duration::from_millis(1)) {
            self.note(&value);
        }
        self.events.drain(..).collect()
    }

    /// Waits for an event that `wanted` picks; events before it stay for [`Qmp::events`].
    pub fn wait(
        &mut self,
        patience: Duration,
        mut wanted: impl FnMut(&Event) -> bool,
    ) -> Result<Event> {
        let (deadline, mut looked) = (Instant::now() + patience, 0);
        loop {
            while looked < self.events.len() {
                if wanted(&self.events[looked]) {
                    return Ok(self.events[looked].clone());
                }
                looked += 1;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!(
                    "{}: the event did not come in {patience:?}",
                    self.path.display()
                );
            }
            if let Some(value) = self.read(left)? {
                self.note(&value);
            }
        }
    }

    /// Sets migration capabilities.
    pub fn capabilities(&mut self, names: &[&str]) -> Result<()> {
        let list: Vec<Value> = names
            .iter()
            .map(|name| json!({"capability": name, "state": true}))
            .collect();
        self.execute("migrate-set-capabilities", json!({"capabilities": list}))
            .map(drop)
    }

    /// Sets migration parameters.
    pub fn parameters(&mut self, parameters: Value) -> Result<()> {
        self.execute("migrate-set-parameters", parameters).map(drop)
    }

    /// The state of the migration.
    pub fn migration(&mut self) -> Result<Migration> {
        let answer = self.execute("query-migrate", json!({}))?;
        let status = answer["status"].as_str().unwrap_or("none").to_owned();
        if status == "failed" {
            return Err(anyhow!(
                "migration failed: {}",
                answer["error-desc"]
                    .as_str()
                    .unwrap_or("QEMU does not say why")
            ));
        }
        let ram = |key: &str| answer["ram"][key].as_u64().unwrap_or(0);
        Ok(Migration {
            status,
            transferred: ram("transferred"),
            remaining: ram("remaining"),
            dirty_syncs: ram("dirty-sync-count"),
        })
    }
}

/// What `query-migrate` says.
#[derive(Clone, Debug)]
pub struct Migration {
    /// `active`, `pre-switchover`, `completed`, ...
    pub status: String,
    /// Bytes sent so far.
    pub transferred: u64,
    /// Bytes still to send.
    pub remaining: u64,
    /// How often the dirty pages were collected.
    pub dirty_syncs: u64,
}
