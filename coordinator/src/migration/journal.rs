//! A migration's folder: `journal` (JSON lines, appended before what they announce), `report.json`, and the file
//! `abort` by which another process asks for one.
//!
//! Who holds the lock of `journal` runs the migration. The kernel lets go of it when the process dies, so there is no
//! stale lock and no process number that could belong to somebody else by now.

use std::fs::{File, OpenOptions};
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use gangway_shared::id::HoldId;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use super::machine::{Entry, Outcome};
use super::plan::Mission;
use super::report::Facts;
use crate::exit::Failure;

/// A line.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Record {
    /// The first.
    Mission(Box<Mission>),
    /// Of the machine.
    Step(Entry),
    /// What was measured so far, for the report.
    Facts(Box<Facts>),
    /// Why a step or an undo failed, for people.
    Trouble(String),
}

#[derive(Serialize, Deserialize)]
struct Line {
    at_ns: u64,
    #[serde(flatten)]
    record: Record,
}

/// The folder of all migrations.
#[derive(Debug, Clone)]
pub struct Store {
    dir: PathBuf,
}

/// The open journal of the migration that this process runs.
pub struct Journal {
    dir: PathBuf,
    file: File,
}

/// A migration as its journal tells it.
#[derive(Debug, Clone)]
pub struct Past {
    /// What it was to do.
    pub mission: Mission,
    /// What the machine wrote, with the time (nanoseconds since the Unix epoch).
    pub entries: Vec<(u64, Entry)>,
    /// The last facts.
    pub facts: Facts,
    /// All troubles.
    pub troubles: Vec<String>,
}

impl Past {
    /// The machine's records without their times.
    pub fn steps(&self) -> Vec<Entry> {
        self.entries.iter().map(|(_, e)| *e).collect()
    }

    /// How it ended; `None`: it has not.
    pub fn outcome(&self) -> Option<Outcome> {
        match self.entries.last() {
            Some((_, Entry::End(o))) => Some(*o),
            _ => None,
        }
    }

    /// True if nobody has to take it up any more.
    pub fn over(&self) -> bool {
        !matches!(
            self.outcome(),
            None | Some(Outcome::Unfinished | Outcome::RollbackIncomplete)
        )
    }
}

fn trouble(what: &str, path: &Path, e: impl std::fmt::Display) -> Failure {
    Failure::failed(format!("cannot {what} {}: {e}", path.display()))
}

impl Store {
    /// In this folder; it is made when something is written.
    pub fn new(dir: &Path) -> Store {
        Store {
            dir: dir.to_owned(),
        }
    }

    /// The folder of one migration.
    pub fn folder(&self, id: HoldId) -> PathBuf {
        self.dir.join(id.to_string())
    }

    /// Numbers of all migrations, the youngest last.
    pub fn list(&self) -> Result<Vec<HoldId>, Failure> {
        let entries = match std::fs::read_dir(&self.dir) {
            Ok(e) => e,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(trouble("read", &self.dir, e)),
        };
        let mut ids: Vec<(std::time::SystemTime, HoldId)> = entries
            .filter_map(|e| {
                let e = e.ok()?;
                let id = e.file_name().to_str()?.parse().ok()?;
                let begun = std::fs::metadata(e.path().join("mission")).and_then(|m| m.modified());
                Some((begun.unwrap_or(std::time::UNIX_EPOCH), id))
            })
            .collect();
        ids.sort();
        Ok(ids.into_iter().map(|(_, id)| id).collect())
    }

    /// The migration meant by `id`, or the youngest.
    pub fn resolve(&self, id: Option<HoldId>) -> Result<HoldId, Failure> {
        let all = self.list()?;
        match id {
            Some(id) if all.contains(&id) => Ok(id),
            Some(id) => Err(Failure::usage(format!(
                "no migration {id} in {}; `gangway status` lists them",
                self.dir.display()
            ))),
            None => all.last().copied().ok_or_else(|| {
                Failure::usage(format!("no migration in {} yet", self.dir.display()))
            }),
        }
    }

    /// Reads a journal. A last line that was torn by a crash is left out: what it announced was not done.
    pub fn read(&self, id: HoldId) -> Result<Past, Failure> {
        let path = self.folder(id).join("journal");
        let file = File::open(&path).map_err(|e| trouble("read", &path, e))?;
        let mut past: Option<Past> = None;
        let mut torn = false;
        for (n, line) in BufReader::new(file).split(b'\n').enumerate() {
            let line = line.map_err(|e| trouble("read", &path, e))?;
            if torn {
                return Err(trouble("read", &path, format!("line {n} is damaged")));
            }
            let Ok(Line { at_ns, record }) = serde_json::from_slice(&line) else {
                torn = true;
                continue;
            };
            match (record, &mut past) {
                (Record::Mission(mission), None) => {
                    past = Some(Past {
                        mission: *mission,
                        entries: Vec::new(),
                        facts: Facts::default(),
                        troubles: Vec::new(),
                    });
                }
                (Record::Step(e), Some(p)) => p.entries.push((at_ns, e)),
                (Record::Facts(f), Some(p)) => p.facts = *f,
                (Record::Trouble(t), Some(p)) => p.troubles.push(t),
                _ => {
                    return Err(trouble(
                        "read",
                        &path,
                        format!("line {} is out of place", n + 1),
                    ));
                }
            }
        }
        past.ok_or_else(|| trouble("read", &path, "it is empty"))
    }

    /// A new migration, refused if one of its VMs is part of one that is not over.
    pub fn create(&self, mission: &Mission) -> Result<Journal, Failure> {
        let make = |dir: &Path| {
            std::fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(dir)
                .map_err(|e| trouble("make", dir, e))
        };
        make(&self.dir)?;
        let lock_path = self.dir.join("lock");
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&lock_path)
            .map_err(|e| trouble("open", &lock_path, e))?;
        flock(&lock, FlockOperation::LockExclusive).map_err(|e| trouble("lock", &lock_path, e))?;
        for id in self.list()? {
            let past = match self.read(id) {
                Ok(p) => p,
                // Died before its first record: it has done nothing.
                Err(_)
                    if std::fs::metadata(self.folder(id).join("journal"))
                        .is_ok_and(|m| m.len() == 0) =>
                {
                    continue;
                }
                Err(e) => return Err(e),
            };
            if past.over() {
                continue;
            }
            if let Some(vm) = mission
                .vms()
                .iter()
                .find(|vm| past.mission.vms().contains(vm))
            {
                return Err(Failure::refused(format!(
                    "VM '{vm}' is part of migration {id}, which is not over: `gangway status {id}` shows it, `gangway abort {id}` ends it"
                )));
            }
        }
        let dir = self.folder(mission.id);
        make(&dir)?;
        std::fs::write(dir.join("mission"), b"").map_err(|e| trouble("write", &dir, e))?;
        let path = dir.join("journal");
        let file = OpenOptions::new()
            .create_new(true)
            .append(true)
            .mode(0o600)
            .open(&path)
            .map_err(|e| trouble("make", &path, e))?;
        flock(&file, FlockOperation::LockExclusive).map_err(|e| trouble("lock", &path, e))?;
        let mut journal = Journal {
            dir: dir.clone(),
            file,
        };
        journal.append(Record::Mission(Box::new(mission.clone())), true)?;
        for d in [&dir, &self.dir] {
            File::open(d)
                .and_then(|d| d.sync_all())
                .map_err(|e| trouble("sync", d, e))?;
        }
        Ok(journal)
    }

    /// Takes up a migration whose coordinator is dead; `None` while one is alive.
    pub fn take_over(&self, id: HoldId) -> Result<Option<Journal>, Failure> {
        let dir = self.folder(id);
        let path = dir.join("journal");
        let file = OpenOptions::new()
            .read(true)
            .append(true)
            .open(&path)
            .map_err(|e| trouble("open", &path, e))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
            Err(e) => return Err(trouble("lock", &path, e)),
        }
        let mut journal = Journal { dir, file };
        journal.mend()?;
        Ok(Some(journal))
    }

    /// True while a process runs this migration.
    pub fn alive(&self, id: HoldId) -> Result<bool, Failure> {
        let path = self.folder(id).join("journal");
        let file = File::open(&path).map_err(|e| trouble("open", &path, e))?;
        match flock(&file, FlockOperation::NonBlockingLockShared) {
            Ok(()) => Ok(false),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(true),
            Err(e) => Err(trouble("lock", &path, e)),
        }
    }

    /// Asks the process that runs a migration to abort it.
    pub fn ask_abort(&self, id: HoldId) -> Result<(), Failure> {
        let path = self.folder(id).join("abort");
        std::fs::write(&path, b"").map_err(|e| trouble("write", &path, e))
    }
}

impl Journal {
    /// The migration's folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Appends; with `sync` it is on the disk afterwards.
    pub fn append(&mut self, record: Record, sync: bool) -> Result<(), Failure> {
        let line = Line {
            at_ns: now_ns(),
            record,
        };
        let write = || -> std::io::Result<()> {
            let mut text = serde_json::to_vec(&line)?;
            text.push(b'\n');
            self.file.write_all(&text)?;
            if sync { self.file.sync_data() } else { Ok(()) }
        };
        let path = self.dir.join("journal");
        let mut write = write;
        write().map_err(|e| trouble("write", &path, e))
    }

    /// Cuts off a line that a crash has torn.
    fn mend(&mut self) -> Result<(), Failure> {
        let path = self.dir.join("journal");
        let text = std::fs::read(&path).map_err(|e| trouble("read", &path, e))?;
        let whole = text.iter().rposition(|b| *b == b'\n').map_or(0, |i| i + 1);
        if whole < text.len() {
            self.file
                .set_len(whole as u64)
                .map_err(|e| trouble("mend", &path, e))?;
        }
        Ok(())
    }

    /// Puts a file of the migration in place as a whole.
    pub fn put(&self, name: &str, bytes: &[u8]) -> Result<PathBuf, Failure> {
        let path = self.dir.join(name);
        replace(&path, bytes)?;
        Ok(path)
    }

    /// True once another process has asked for an abort.
    pub fn abort_asked(dir: &Path) -> bool {
        dir.join("abort").exists()
    }
}

/// Writes a file beside, syncs it, and renames it.
pub fn replace(path: &Path, bytes: &[u8]) -> Result<(), Failure> {
    let beside = path.with_extension("new");
    File::create(&beside)
        .and_then(|mut f| f.write_all(bytes).and_then(|()| f.sync_all()))
        .and_then(|()| std::fs::rename(&beside, path))
        .map_err(|e| trouble("write", path, e))
}

/// Nanoseconds since the Unix epoch.
pub fn now_ns() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |d| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX))
}
