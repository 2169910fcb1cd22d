//! What the next run of the switch is told of the FDB, so that it need not flood what this one knew: `STATE_DIR/fdb`
//! (ADR-0033). Bytes: docs/formats/fdb.md.
//!
//! It outlives the process, not the host: nothing is synced, and another boot's file is of no use.
//!
//! Invariant: the file says no more than was known a second ago (or what a write of a large table takes a hundred times), and
//! nothing that a hold which is over has changed; else there is none.
//! Invariant: without it, or with a damaged one, addresses are learned anew; nothing else fails.
//! Invariant: configuration and holds are right, the file is wrong.

pub mod format;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use gangway_shared::config::HostConfig;
use rustix::time::{ClockId, clock_gettime};

use crate::datapath::engine::{Mode, Shared};
use format::{Kept, KeptAddress, KeptPort};

/// Its name in the state directory.
pub const FILE: &str = "fdb";
/// How often it is written at most.
const EVERY: Duration = Duration::from_secs(1);
/// Between two writes is so many times what a write takes: a hundredth of a processor at most, however large the table.
const REST: u32 = 100;
/// More than the largest table that can be configured takes.
const FILE_MAX: u64 = 1 << 30;

/// Which boot of the host this is, and how long ago it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Now {
    boot: [u8; 16],
    at_s: u64,
}

impl Now {
    fn read() -> io::Result<Now> {
        let text = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        let digits = text.trim().replace('-', "");
        let boot = u128::from_str_radix(&digits, 16).map_err(io::Error::other)?;
        let at = clock_gettime(ClockId::Boottime).tv_sec;
        Ok(Now {
            boot: boot.to_be_bytes(),
            at_s: u64::try_from(at).unwrap_or(0),
        })
    }
}

/// What came of a file's addresses.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Taken {
    /// Known again.
    pub known: usize,
    /// Last seen too long ago.
    pub aged: usize,
    /// At a port that is not configured any more, or for another VM.
    pub gone: usize,
    /// The configuration or a hold says otherwise, or there is no room.
    pub overruled: usize,
}

/// Keeps the FDB of one switch.
pub struct Addresses {
    shared: Arc<Shared>,
    path: PathBuf,
    ports: Vec<KeptPort>,
    /// One writes at a time.
    writing: Mutex<()>,
    failed: AtomicBool,
}

impl Addresses {
    /// Of the switch with this configuration and these ports. Nothing is read or written yet.
    pub fn new(cfg: &HostConfig, shared: Arc<Shared>) -> Arc<Addresses> {
        let port = |p: &Arc<crate::datapath::engine::Port>| KeptPort {
            name: p.name.clone(),
            vm: p.vm.clone(),
        };
        Arc::new(Addresses {
            path: cfg.state_dir.join(FILE),
            ports: shared.ports.iter().map(port).collect(),
            shared,
            writing: Mutex::default(),
            failed: AtomicBool::new(false),
        })
    }

    /// Makes known what the last run knew. When holds are taken up, and before the first frame comes in.
    pub fn take_up(&self) {
        let told = Now::read()
            .map_err(|e| e.to_string())
            .and_then(|now| self.read(now));
        match told {
            Ok(None) => {}
            Ok(Some(t)) => tracing::info!(
                "{} addresses are known from the last run; {} have aged, of {} the port is gone, of {} something else is known",
                t.known,
                t.aged,
                t.gone,
                t.overruled
            ),
            Err(e) => tracing::warn!(
                "{}: {e}; addresses are learned anew, which costs some flooding",
                self.path.display()
            ),
        }
    }

    /// `None`: there is nothing of this boot.
    fn read(&self, now: Now) -> Result<Option<Taken>, String> {
        let file = match File::open(&self.path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            file => file.map_err(|e| e.to_string())?,
        };
        let mut bytes = Vec::new();
        let read = file.take(FILE_MAX).read_to_end(&mut bytes);
        read.map_err(|e| e.to_string())?;
        let kept = format::decode(&bytes)?;
        Ok((kept.boot == now.boot).then(|| self.take(&kept, now.at_s)))
    }

    fn take(&self, kept: &Kept, at_s: u64) -> Taken {
        let shared = &self.shared;
        let here = |p: &KeptPort| self.ports.iter().position(|mine| mine == p);
        let places: Vec<Option<usize>> = kept.ports.iter().map(here).collect();
        // A clock that went back tells nothing: all have aged.
        let since = at_s.checked_sub(kept.at_s);
        let mut taken = Taken::default();
        for a in &kept.addresses {
            let age = since.map(|s| s.saturating_add(a.age_s.into()));
            let age = age.and_then(|age| u32::try_from(age).ok());
            let Some(age) = age.filter(|age| *age <= shared.fdb.ageing_s()) else {
                taken.aged += 1;
                continue;
            };
            let Some(port) = places.get(usize::from(a.port)).copied().flatten() else {
                taken.gone += 1;
                continue;
            };
            let owner = shared.ports.iter().position(|p| p.mac == Some(a.mac));
            let believed =
                shared.ports[port].mode() == Mode::Live && owner.is_none_or(|o| o == port);
            if believed && shared.fdb.recall(a.mac, port, age, shared.now_s()) {
                taken.known += 1;
            } else {
                taken.overruled += 1;
            }
        }
        taken
    }

    /// Writes it now. What cannot be written must not be found either: a failure removes the file, and is logged once.
    pub fn save(&self) {
        let _one = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        // Before the first look: what is learned meanwhile is for the next time.
        self.shared.fdb.has_changed();
        match self.write() {
            Ok(()) => {
                if self.failed.swap(false, Ordering::Relaxed) {
                    tracing::info!("{} is written again", self.path.display());
                }
            }
            Err(e) => {
                let gone = fs::remove_file(&self.path);
                if !self.failed.swap(true, Ordering::Relaxed) {
                    tracing::warn!(
                        "cannot write {}: {e}; the next run of the switch will learn addresses anew",
                        self.path.display()
                    );
                    if let Err(e) = gone.or_else(absent) {
                        tracing::warn!("cannot remove {}: {e}", self.path.display());
                    }
                }
            }
        }
    }

    fn write(&self) -> io::Result<()> {
        let now = Now::read()?;
        let address = |e: crate::datapath::fdb::Entry| {
            let port = u16::try_from(e.port).ok()?;
            Some(KeptAddress {
                mac: e.mac,
                port,
                age_s: e.age_s,
            })
        };
        let shared = &self.shared;
        let all = shared.fdb.iter(shared.now_s()).filter_map(address);
        let bytes = format::encode(now.boot, now.at_s, &self.ports, all);
        let new = self.path.with_extension("new");
        let dir = self.path.parent().unwrap_or(Path::new("/"));
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)?;
        let put = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&new)
            .and_then(|mut file| file.write_all(&bytes))
            .and_then(|()| fs::rename(&new, &self.path));
        put.inspect_err(|_| {
            // The error that matters is that one.
            let _ = fs::remove_file(&new);
        })
    }

    /// From now on the file follows the FDB.
    ///
    /// # Errors
    /// No thread.
    pub fn follow(self: &Arc<Self>) -> io::Result<Following> {
        let addresses = self.clone();
        let (stop, stopped) = mpsc::channel();
        // Ages go on also while nothing is learned.
        let refresh = Duration::from_secs(u64::from(self.shared.fdb.ageing_s()) / 4);
        let body = move || {
            let (mut rest, mut last) = (EVERY, Instant::now());
            while stopped.recv_timeout(rest) == Err(RecvTimeoutError::Timeout) {
                rest = EVERY;
                if addresses.shared.fdb.has_changed() || last.elapsed() >= refresh {
                    last = Instant::now();
                    addresses.save();
                    rest = rest.max(last.elapsed() * REST);
                }
            }
        };
        let thread = std::thread::Builder::new().name("fdb".into()).spawn(body)?;
        Ok(Following {
            addresses: self.clone(),
            stop,
            thread,
        })
    }
}

fn absent(e: io::Error) -> io::Result<()> {
    match e.kind() {
        io::ErrorKind::NotFound => Ok(()),
        _ => Err(e),
    }
}

/// The thread that writes.
pub struct Following {
    addresses: Arc<Addresses>,
    stop: mpsc::Sender<()>,
    thread: JoinHandle<()>,
}

impl Following {
    /// Writes a last time.
    pub fn end(self) {
        drop(self.stop);
        // A panic there would be ours and is logged.
        let _ = self.thread.join();
        self.addresses.save();
    }
}

#[cfg(test)]
mod tests;
