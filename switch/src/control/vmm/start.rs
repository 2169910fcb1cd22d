//! Starts VMs for their arrival and ends what it started, also after the switch itself was restarted.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use gangway_shared::api::{Refusal, RefusalCode};
use gangway_shared::id::HoldId;
use serde::{Deserialize, Serialize};
use tokio::process::Child;
use tokio::time::{Instant, sleep, timeout};

use super::process::{Process, start_time};
use super::{Connect, Vm, Vmm, refusal};
use crate::sys::spawn;

/// How long a VM may take until its QMP socket greets.
const START: Duration = Duration::from_secs(20);
/// Between SIGTERM and SIGKILL.
const PATIENCE: Duration = Duration::from_secs(3);
const RETRY: Duration = Duration::from_millis(20);
/// How much of a failed VM's log goes into the refusal.
const TAIL_BYTES: u64 = 600;

/// What `vm-NAME.json` in the state folder remembers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Started {
    pid: u32,
    /// In ticks since the boot.
    start_time: u64,
    hold: HoldId,
}

impl Vmm {
    /// Starts the configured command of a VM and waits until its QMP socket greets. Repeated for the same hold it
    /// answers with the process that runs.
    pub async fn start(&self, name: &str, hold: HoldId) -> Result<u32, Refusal> {
        let vm = self.vm(name)?;
        let Some(argv) = &vm.config.incoming else {
            let message =
                format!("VM '{name}' cannot arrive here: its [[vm]] has no incoming command");
            return Err(refusal(RefusalCode::State, message));
        };
        let ended = vm.lifecycle.lock().await;
        if *ended == Some(hold) {
            let message =
                format!("VM '{name}' was ended for migration {hold}; this comes too late");
            return Err(refusal(RefusalCode::State, message));
        }
        let files = Files::new(&self.state_dir, name);
        if let Some(started) = files.load()
            && Process::find(started.pid, started.start_time).is_some()
        {
            if started.hold == hold {
                return Ok(started.pid);
            }
            let message = format!(
                "VM '{name}' was started here for migration {} (process {}) and still runs; end that migration first",
                started.hold, started.pid
            );
            return Err(refusal(RefusalCode::State, message));
        }
        let _turn = vm.turn(self.turn).await?;
        match vm.connect(super::GREETING).await {
            Err(Connect::Absent(_)) => {}
            Ok(_) | Err(Connect::Silent) => {
                let message = format!(
                    "VM '{name}' runs here already: its QMP socket '{}' answers",
                    vm.socket().display()
                );
                return Err(refusal(RefusalCode::State, message));
            }
        }
        let (mut child, started) = files.spawn(argv, hold).map_err(|e| {
            let message = format!("VM '{name}' cannot be started: {e}");
            refusal(RefusalCode::Resources, message)
        })?;
        tracing::info!(vm = name, pid = started.pid, %hold, "started for its arrival");
        let ready = wait(&vm, &mut child, &files).await;
        if ready.is_err() {
            if let Some(process) = Process::find(started.pid, started.start_time) {
                let _ = process.end(PATIENCE).await;
            }
            let _ = timeout(PATIENCE, child.wait()).await;
            files.forget();
        } else {
            reap(child, name.to_owned());
        }
        ready.map(|()| started.pid)
    }

    /// What `start` started for this hold has ended.
    pub(super) fn ended(&self, name: &str, hold: HoldId) -> bool {
        let started = Files::new(&self.state_dir, name).load();
        started.is_some_and(|s| s.hold == hold && Process::find(s.pid, s.start_time).is_none())
    }

    /// Ends what `start` started for this hold, and nothing else.
    pub async fn stop(&self, name: &str, hold: HoldId) -> Result<(), Refusal> {
        let vm = self.vm(name)?;
        let mut ended = vm.lifecycle.lock().await;
        *ended = Some(hold);
        let files = Files::new(&self.state_dir, name);
        let Some(started) = files.load() else {
            return Ok(());
        };
        let Some(process) = Process::find(started.pid, started.start_time) else {
            files.forget();
            return Ok(());
        };
        if started.hold != hold {
            let message = format!(
                "VM '{name}' was started for migration {}, not for {hold}; it is left alone",
                started.hold
            );
            return Err(refusal(RefusalCode::State, message));
        }
        process.end(PATIENCE).await.map_err(|e| {
            let message = format!("VM '{name}' (process {}) does not end: {e}", started.pid);
            refusal(RefusalCode::Internal, message)
        })?;
        tracing::info!(vm = name, pid = started.pid, %hold, "ended");
        files.forget();
        Ok(())
    }
}

/// Waits until the VM greets on its QMP socket, or gives up.
async fn wait(vm: &Vm, child: &mut Child, files: &Files) -> Result<(), Refusal> {
    let name = vm.name();
    let deadline = Instant::now() + START;
    loop {
        if let Ok(Some(status)) = child.try_wait() {
            let message = format!(
                "VM '{name}' ended at once ({status}): {}; all of it is in '{}'",
                files.tail(),
                files.log.display()
            );
            return Err(refusal(RefusalCode::Resources, message));
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            let message = format!(
                "VM '{name}' runs, but its QMP socket '{}' does not answer within {} s: does incoming make that socket? {}",
                vm.socket().display(),
                START.as_secs(),
                files.tail()
            );
            return Err(refusal(RefusalCode::Timeout, message));
        }
        if vm.connect(left.min(super::GREETING)).await.is_ok() {
            return Ok(());
        }
        sleep(RETRY).await;
    }
}

/// Takes the exit status, so that no zombie stays; the VM lives on if the switch ends first.
fn reap(mut child: Child, name: String) {
    tokio::spawn(async move {
        if let Ok(status) = child.wait().await {
            tracing::info!(vm = name, "the VM's process has ended: {status}");
        }
    });
}

/// A VM's files in the state folder. Its name is checked by the configuration: no slash.
struct Files {
    log: PathBuf,
    record: PathBuf,
}

impl Files {
    fn new(state_dir: &Path, name: &str) -> Files {
        Files {
            log: state_dir.join(format!("vm-{name}.log")),
            record: state_dir.join(format!("vm-{name}.json")),
        }
    }

    fn load(&self) -> Option<Started> {
        serde_json::from_slice(&std::fs::read(&self.record).ok()?).ok()
    }

    fn forget(&self) {
        let _ = std::fs::remove_file(&self.record);
    }

    /// Starts, and remembers before anybody is told. What can't be remembered is not left running.
    fn spawn(&self, argv: &[String], hold: HoldId) -> io::Result<(Child, Started)> {
        if let Some(dir) = self.log.parent() {
            std::fs::create_dir_all(dir)?;
        }
        let log = create(&self.log)?;
        let program = argv.first().map_or("", String::as_str);
        let mut child = spawn::detached(argv, log)
            .map_err(|e| io::Error::new(e.kind(), format!("'{program}': {e}")))?;
        let remember = || {
            let pid = child.id()?;
            let start_time = start_time(pid)?;
            Some(Started {
                pid,
                start_time,
                hold,
            })
        };
        let remembered = remember()
            .ok_or_else(|| io::Error::other(format!("'{program}' ended at once")))
            .and_then(|started| self.store(&started).map(|()| started));
        match remembered {
            Ok(started) => Ok((child, started)),
            Err(e) => {
                let _ = child.start_kill();
                Err(io::Error::new(
                    e.kind(),
                    format!("'{}': {e}", self.record.display()),
                ))
            }
        }
    }

    /// As a whole or not at all.
    fn store(&self, started: &Started) -> io::Result<()> {
        let new = self.record.with_extension("json.new");
        let mut file = create(&new)?;
        file.write_all(&serde_json::to_vec(started)?)?;
        file.sync_all()?;
        std::fs::rename(&new, &self.record)
    }

    /// The end of the log, on one line.
    fn tail(&self) -> String {
        let read = || -> io::Result<String> {
            let mut file = File::open(&self.log)?;
            let length = file.metadata()?.len();
            file.seek(SeekFrom::Start(length.saturating_sub(TAIL_BYTES)))?;
            let mut bytes = Vec::new();
            file.take(TAIL_BYTES).read_to_end(&mut bytes)?;
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        };
        let text = read().unwrap_or_default();
        let lines: Vec<&str> = text
            .lines()
            .map(str::trim)
            .filter(|l| !l.is_empty())
            .collect();
        match lines.as_slice() {
            [] => "it has written nothing".to_owned(),
            lines => format!("it wrote: {}", lines.join(" | ").escape_debug()),
        }
    }
}

fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
}
