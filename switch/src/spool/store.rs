//! The spool of a host: its directory, its quota, its queues.

use std::fs::File;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use gangway_shared::api::Tally;
use gangway_shared::config::valid::{SpoolConfig, Sync as SyncPolicy};
use gangway_shared::id::{HoldId, LaneKey};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::format::{self, BATCH_HEADER, FILE_HEADER, FileHeader, NAME_MAX, QUEUE_MAGIC};
use super::keeper::Host;
use super::map::{PAGE, Page};
use super::queue::{Parts, Queue, lock};
use super::words::Words;
use super::writer::Writer;
use super::{Kind, Recovered, SpoolError, open};
use crate::port::FRAME_MAX;

/// All queues of this host.
#[derive(Debug)]
pub struct Spool {
    host: Arc<Host>,
    /// The keeper, and the syncer if there is one.
    threads: Vec<JoinHandle<()>>,
    /// Held as long as we have the directory.
    _lock: File,
}

/// A process that was killed has the lock as long as one of its threads waits for a slow disk; one that its predecessor was just
/// starting, until it executes its program.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);

impl Spool {
    /// Takes the directory (making it if need be), and finds what an earlier run left in it. Blocks.
    pub fn open(cfg: &SpoolConfig) -> Result<(Arc<Spool>, Vec<Recovered>), SpoolError> {
        make_dir(&cfg.dir)?;
        let lock_path = cfg.dir.join("lock");
        let lock_file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&lock_path)
            .map_err(SpoolError::io(&lock_path))?;
        let patience = Instant::now() + LOCK_PATIENCE;
        loop {
            match flock(&lock_file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => break,
                Err(Errno::WOULDBLOCK) if Instant::now() < patience => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                Err(Errno::WOULDBLOCK) => return Err(SpoolError::InUse(cfg.dir.clone())),
                Err(e) => return Err(SpoolError::io(&lock_path)(e.into())),
            }
        }
        let pool = cfg.dir.join("pool");
        match std::fs::remove_dir_all(&pool) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(SpoolError::io(&pool)(e));
            }
            _ => make_dir(&pool)?,
        }
        let host = Arc::new(Host::new(cfg));
        let recovered = open::recover(&host)?;
        let mut spool = Spool {
            host,
            threads: Vec::new(),
            _lock: lock_file,
        };
        spool.start("spool-keeper", |h| h.run())?;
        if cfg.sync != SyncPolicy::None {
            spool.start("spool-syncer", |h| h.run_syncer())?;
        }
        Ok((Arc::new(spool), recovered))
    }

    fn start(
        &mut self,
        name: &str,
        what: impl FnOnce(&Host) + Send + 'static,
    ) -> Result<(), SpoolError> {
        let host = self.host.clone();
        let thread = std::thread::Builder::new().name(name.into());
        let thread = thread.spawn(move || what(&host));
        self.threads
            .push(thread.map_err(SpoolError::io(&self.host.dir))?);
        Ok(())
    }

    /// A new, empty queue; its first segment is ready. Blocks: for the control path. Call [`Queue::sync`] before
    /// anything is promised about it.
    pub fn create(
        &self,
        hold: HoldId,
        kind: Kind,
        lane: &LaneKey,
    ) -> Result<(Writer, Arc<Queue>), SpoolError> {
        for name in [&lane.from, &lane.to] {
            if name.is_empty() || name.len() > NAME_MAX {
                return Err(SpoolError::Name(name.clone()));
            }
        }
        let host = &self.host;
        let index = {
            let state = lock(&host.state);
            let queues = state.queues.get(&hold).map_or(&[][..], Vec::as_slice);
            let same = || queues.iter().filter(|q| q.kind() == kind);
            if same().any(|q| q.lane() == lane) {
                return Err(SpoolError::Exists(hold, kind, lane.clone()));
            }
            same().map(|q| q.index() + 1).max().unwrap_or(0)
        };
        let beyond = host.is_exempt(hold, kind);
        if !beyond {
            // An empty lane's first segment is not growth.
            host.allows(hold, Kind::Source)?;
        }
        let dir = queue_dir(&host.dir, hold, kind, index);
        make_dir(&dir)?;
        let made = (|| {
            let header = FileHeader {
                hold,
                kind,
                lane: lane.clone(),
                index,
                number: 0,
                first_seq: 1,
                segment_bytes: host.segment_bytes,
                epoch: 0,
            };
            let meta = dir.join(META);
            let salt = format::salt(hold, lane);
            let start = Words::start(&header.encode(QUEUE_MAGIC), 0, salt);
            let page = Page::create(&meta, &start, PAGE).map_err(SpoolError::io(&meta))?;
            let seg = Arc::new(host.take(&dir, 0, kind, beyond)?);
            let tail = seg
                .tail()
                .ok_or_else(|| SpoolError::Stopped("a fresh segment is in use".into()))?;
            let queue = Arc::new(Queue::new(Parts {
                hold,
                kind,
                lane: lane.clone(),
                index,
                dir: dir.clone(),
                policy: host.policy,
                limits: host.limits,
                host: Arc::downgrade(host),
                scarce: host.scarce.clone(),
                frames: host.frames(hold, kind),
                words: Words::new(page, salt),
                segments: vec![seg],
            }));
            let writer = Writer::new(queue.clone(), tail, 0, Tally::default(), Vec::new());
            Ok((writer, queue))
        })();
        match made {
            Ok((writer, queue)) => {
                let mut state = lock(&host.state);
                let queues = state.queues.entry(hold).or_default();
                queues.push(queue.clone());
                drop(state);
                host.syncer.ask();
                Ok((writer, queue))
            }
            Err(e) => {
                // What is left is an empty queue; the error that matters is `e`.
                let _ = std::fs::remove_dir_all(&dir);
                Err(e)
            }
        }
    }

    /// Gives a queue that nobody writes to yet as many segments as frames take that are `bytes` long with what a batch adds to
    /// them, whatever their lengths are. Blocks: for the control path.
    pub fn reserve(&self, queue: &Queue, bytes: usize) -> Result<(), SpoolError> {
        // Of each segment as much may stay empty as the largest frame would have needed.
        let empty =
            FILE_HEADER + format::batch_len(1, format::slot_len(FRAME_MAX as u32)) + BATCH_HEADER;
        let usable = (self.host.segment_bytes as usize)
            .saturating_sub(empty)
            .max(1);
        let want = bytes.div_ceil(usable) as u32;
        while queue.next_number() < want && !queue.is_removed() {
            self.host.provide(queue)?;
        }
        Ok(())
    }

    /// Nothing can put this hold back any more: from now on no quota of bytes stops what is shipped for it. To be said again after a
    /// restart.
    pub fn only_forward(&self, hold: HoldId) {
        lock(&self.host.state).forward.insert(hold);
        self.host.wake();
    }

    /// See [`Spool::only_forward`].
    #[cfg(test)]
    pub fn is_only_forward(&self, hold: HoldId) -> bool {
        self.host.is_exempt(hold, Kind::Incoming)
    }

    /// Nobody makes segments any more.
    #[cfg(test)]
    pub fn stop_keeper(&self) {
        self.host.stop();
        while self.threads.iter().any(|t| !t.is_finished()) {
            std::thread::yield_now();
        }
    }

    /// The queues of a hold.
    pub fn queues(&self, hold: HoldId) -> Vec<Arc<Queue>> {
        let state = lock(&self.host.state);
        state.queues.get(&hold).cloned().unwrap_or_default()
    }

    /// Bytes of the segments of all holds.
    pub fn used_bytes(&self) -> u64 {
        lock(&self.host.state).held * self.host.segment_bytes
    }

    /// Why this hold's senders get no more room (its quota, the host's, a full disk), if so; of any hold if none is named.
    pub fn trouble(&self, hold: Option<HoldId>) -> Option<String> {
        self.host.trouble_of(hold)
    }

    /// `spool.quota_bytes`.
    pub fn quota_bytes(&self) -> u64 {
        self.host.quota_bytes
    }

    /// Forgets a hold and everything in it, at once: what a crash leaves of it is nobody's. Its segments are used again
    /// once nobody reads them any more. Writers have no room from now on.
    pub fn remove_hold(&self, hold: HoldId) -> Result<(), SpoolError> {
        let queues = {
            let mut state = lock(&self.host.state);
            state.forward.remove(&hold);
            state.queues.remove(&hold)
        };
        let queues = || queues.iter().flatten();
        queues().for_each(|q| q.set_removed());
        let dir = self.dir_of(hold);
        let gone = self.host.dir.join("pool").join(format!("{hold}.gone"));
        // The whole before any part of it: a hold of which only some segments are left would be one that has lost frames.
        let is_gone = match std::fs::rename(&dir, &gone) {
            Ok(()) => true,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => false,
            Err(e) => {
                // To be tried again; its files count as before.
                let mut state = lock(&self.host.state);
                let again = state.queues.entry(hold).or_default();
                again.extend(queues().cloned());
                return Err(SpoolError::io(dir)(e));
            }
        };
        let synced = match is_gone && self.is_durable() {
            true => File::open(&self.host.dir).and_then(|d| d.sync_all()),
            false => Ok(()),
        };
        for q in queues() {
            let name = q.dir().file_name().unwrap_or_default();
            self.host.give_back(q, &gone.join(name));
        }
        synced.map_err(SpoolError::io(&self.host.dir))?;
        match is_gone {
            true => remove_dir(&gone),
            false => Ok(()),
        }
    }

    /// Directories of a hold that look like queues and are none that is known: their segments are not intact enough to
    /// say whose they are.
    pub fn strays(&self, hold: HoldId) -> Result<Vec<PathBuf>, SpoolError> {
        let mut all = open::subdirs(&self.dir_of(hold))?;
        let known = self.queues(hold);
        all.retain(|dir| known.iter().all(|q| q.dir() != dir));
        Ok(all)
    }

    /// The holds that have a directory.
    pub fn holds(&self) -> Result<Vec<HoldId>, SpoolError> {
        let dir = &self.host.dir;
        let mut all = Vec::new();
        for entry in std::fs::read_dir(dir).map_err(SpoolError::io(dir))? {
            let entry = entry.map_err(SpoolError::io(dir))?;
            all.extend(
                entry
                    .file_name()
                    .to_str()
                    .and_then(|n| n.parse::<HoldId>().ok()),
            );
        }
        all.sort();
        Ok(all)
    }

    /// Where the files of a hold are.
    pub fn dir_of(&self, hold: HoldId) -> PathBuf {
        hold_dir(&self.host.dir, hold)
    }

    /// `spool.sync` is not `none`.
    pub fn is_durable(&self) -> bool {
        self.host.policy != SyncPolicy::None
    }
}

impl Drop for Spool {
    fn drop(&mut self) {
        self.host.stop();
        for t in self.threads.drain(..) {
            // It can only have panicked, and that was printed.
            let _ = t.join();
        }
    }
}

/// Name of a queue's metadata file.
pub(super) const META: &str = "queue.meta";

pub(super) fn hold_dir(dir: &Path, hold: HoldId) -> PathBuf {
    dir.join(hold.to_string())
}

pub(super) fn queue_dir(dir: &Path, hold: HoldId, kind: Kind, index: u32) -> PathBuf {
    hold_dir(dir, hold).join(format!("{}-{index:04}", kind.letter()))
}

/// With all that is in it. The keeper may be putting a segment there at this moment, whose queue was not removed yet when it looked;
/// no further one.
fn remove_dir(path: &Path) -> Result<(), SpoolError> {
    let mut tries = 0;
    loop {
        match std::fs::remove_dir_all(path) {
            Err(e) if e.kind() == std::io::ErrorKind::DirectoryNotEmpty && tries < 1000 => {
                tries += 1;
                std::thread::sleep(Duration::from_millis(1));
            }
            r => return r.map_err(SpoolError::io(path)),
        }
    }
}

fn make_dir(path: &Path) -> Result<(), SpoolError> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(SpoolError::io(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_goes_that_gets_another_file_meanwhile() {
        let dir = tempfile::tempdir().unwrap();
        let hold = dir.path().join("hold");
        std::fs::create_dir(&hold).unwrap();
        for n in 0..5000 {
            File::create(hold.join(n.to_string())).unwrap();
        }
        std::thread::scope(|s| {
            s.spawn(|| {
                // Until some are gone, and then behind what was listed.
                while hold.join("0").exists() && hold.join("4999").exists() {
                    std::hint::spin_loop();
                }
                for n in 0..200 {
                    let _ = File::create(hold.join(format!("late-{n}")));
                }
            });
            remove_dir(&hold).unwrap();
        });
        assert!(!hold.exists());
    }
}
