//! Where the backlogs of lanes are kept, so that they outlive the switch: a folder of the keeper's, in memory
//! (docs/formats/spool.md, "Backlogs").
//!
//! Only behind a keeper: without one QEMU throws away more than a backlog holds (ADR-0024). And only in memory: no worker waits for a
//! disk. Where it is not so a backlog dies with the switch.
//!
//! Invariant: a file is of one lane: the sending port, the worker, the receiving port. Its name stays as long as the process lives.
//! Invariant: what cannot be taken up is named in the log, with the number of its frames, and counted by nobody else.

use std::ffi::OsStr;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use gangway_keeper::devices::AWAY;

use super::backlog::{Backlog, Opened};
use super::worker::Seat;
use crate::spool::{Room, is_memory};

const MAGIC: &[u8; 8] = b"GWblog01";
const SUFFIX: &str = "frames";
/// When a switch last ran, for the next one.
const ALIVE: &str = "alive";

fn now_s() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    u64::try_from(now.tv_sec).unwrap_or_default()
}

/// See the module.
#[derive(Debug)]
pub struct Shelf {
    dir: PathBuf,
    /// Of ports, by index.
    ports: Vec<String>,
    /// One copy for each backlog that found no memory here.
    without: Arc<()>,
    /// It was said that there are such.
    said: AtomicBool,
}

/// What an earlier run had taken and not delivered, and of which lane.
pub struct Found {
    /// Whose.
    pub seat: Seat,
    /// Destination port.
    pub to: usize,
    /// Where they came in.
    pub queues: Vec<u16>,
    /// The frames.
    pub backlog: Backlog,
}

impl Shelf {
    /// The folder, which is made if it is not there, and what is in it.
    ///
    /// # Errors
    /// If the folder cannot be made or read, or is on a disk.
    pub fn open(dir: &Path, ports: Vec<String>) -> io::Result<(Arc<Shelf>, Vec<Found>)> {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)?;
        if !is_memory(dir) {
            return Err(io::Error::other("not in memory (tmpfs)"));
        }
        let shelf = Arc::new(Shelf {
            dir: dir.to_owned(),
            ports,
            without: Arc::default(),
            said: AtomicBool::default(),
        });
        // The keeper's sockets are closed by then, too.
        let is_old = shelf
            .last()
            .is_some_and(|s| now_s().saturating_sub(s) > AWAY.as_secs());
        let mut found = Vec::new();
        for entry in std::fs::read_dir(dir)? {
            let path = entry?.path();
            if path.ends_with(ALIVE) {
                continue;
            }
            match shelf.take(&path, is_old) {
                Ok(f) => found.extend(f),
                Err(e) => tracing::error!("{}: {e}; what waited there is lost", path.display()),
            }
        }
        Ok((shelf, found))
    }

    /// None if nothing waits there. A file of no lane that there is now is removed.
    fn take(self: &Arc<Shelf>, path: &Path, is_old: bool) -> io::Result<Option<Found>> {
        let remove = || std::fs::remove_file(path);
        let Some((from, worker, to)) = parts(path) else {
            return remove().map(|()| None);
        };
        let opened = Backlog::open(path);
        // No memory, no descriptor: another run may have better luck.
        let Opened {
            backlog,
            header,
            unread,
        } = opened.inspect_err(|e| {
            if e.kind() == io::ErrorKind::InvalidData {
                let _ = remove();
            }
        })?;
        if !header.starts_with(MAGIC) {
            remove()?;
            return Err(io::Error::other("no backlog of this version"));
        }
        if unread > 0 {
            tracing::error!(
                "{}: damaged: what waited from {from} to {to} (worker {worker}) behind {} frames, {unread} bytes, cannot be read and is lost",
                path.display(),
                backlog.len()
            );
        }
        let port = |name| self.ports.iter().position(|p| p == name);
        match (port(from), port(to)) {
            _ if backlog.is_empty() => remove().map(|()| None),
            _ if is_old => {
                remove()?;
                let n = backlog.len();
                Err(io::Error::other(format!(
                    "{n} frames that have waited for more than {AWAY:?} without a switch"
                )))
            }
            (Some(port), Some(to)) => Ok(Some(Found {
                seat: Seat { port, worker },
                to,
                queues: backlog.queues(),
                backlog,
            })),
            _ => {
                remove()?;
                let n = backlog.len();
                Err(io::Error::other(format!(
                    "{n} frames of a port that is not configured any more"
                )))
            }
        }
    }

    /// What was found, for so many workers: one of a number that there is not any more leaves its frames to another, behind those that
    /// lie there.
    pub fn settle(&self, found: Vec<Found>, workers: usize) -> Vec<Found> {
        let mut out: Vec<Found> = Vec::new();
        let (here, gone): (Vec<_>, Vec<_>) =
            found.into_iter().partition(|f| f.seat.worker < workers);
        for mut f in here.into_iter().chain(gone) {
            let from = self.dir.join(self.name(f.seat.port, f.seat.worker, f.to));
            f.seat.worker %= workers.max(1);
            let to = self.dir.join(self.name(f.seat.port, f.seat.worker, f.to));
            if let Some(other) = out.iter_mut().find(|o| (o.seat, o.to) == (f.seat, f.to)) {
                other.queues.append(&mut f.queues);
                while f
                    .backlog
                    .front()
                    .is_some_and(|(f, q)| other.backlog.push(&f, q))
                {
                    // One by one: a switch that is killed here has one frame twice, and not all of them.
                    f.backlog.pop();
                    f.backlog.note();
                }
                if !f.backlog.is_empty() {
                    let (n, path) = (f.backlog.len(), from.display());
                    tracing::error!(
                        "{path}: {n} frames find no room with fewer workers and are lost"
                    );
                }
                let _ = std::fs::remove_file(&from);
                continue;
            }
            if from != to
                && let Err(e) = std::fs::rename(&from, &to)
            {
                tracing::warn!("{}: {e}", from.display());
            }
            out.push(f);
        }
        out
    }

    /// To be called now and then: what waits here is not older than that, as far as a dead switch is concerned.
    pub fn is_alive(&self) {
        let _ = std::fs::write(self.dir.join(ALIVE), now_s().to_string());
        let dir = self.dir.display();
        match self.change() {
            Some(0) => tracing::info!("{dir}: all that waits for receivers is here again"),
            Some(n) => tracing::warn!(
                "{dir}: what waits for receivers finds no place here ({n} backlogs; is there memory left?): a switch that is killed loses it"
            ),
            None => {}
        }
    }

    /// How many backlogs are elsewhere and die with the switch, if there are some now and were none, or the other way round.
    fn change(&self) -> Option<usize> {
        let n = Arc::strong_count(&self.without) - 1;
        (self.said.swap(n > 0, Ordering::Relaxed) != (n > 0)).then_some(n)
    }

    /// When an earlier run last said so, in seconds since the boot.
    fn last(&self) -> Option<u64> {
        let said = std::fs::read_to_string(self.dir.join(ALIVE)).ok()?;
        said.parse().ok()
    }

    /// The place of a lane's.
    pub fn spot(self: &Arc<Shelf>, from: usize, worker: usize, to: usize) -> Spot {
        Spot(Some((self.clone(), from, worker, to)))
    }

    pub(super) fn name(&self, from: usize, worker: usize, to: usize) -> String {
        let [from, to] = [from, to].map(|n| self.ports.get(n).map_or("", String::as_str));
        format!("{from}~{worker}~{to}.{SUFFIX}")
    }
}

/// What a file's name says. Names of ports have no `~`.
fn parts(path: &Path) -> Option<(&str, usize, &str)> {
    let is_ours = path.extension() == Some(OsStr::new(SUFFIX));
    let stem = path.file_stem().filter(|_| is_ours)?.to_str()?;
    let mut parts = stem.split('~');
    let (from, worker, to) = (parts.next()?, parts.next()?, parts.next()?);
    Some((from, worker.parse().ok()?, to))
}

/// Where a lane's backlog is to be: nowhere by default, and it dies with the switch.
#[derive(Debug, Clone, Default)]
pub struct Spot(Option<(Arc<Shelf>, usize, usize, usize)>);

impl Spot {
    /// A new file for so many bytes.
    pub(super) fn room(&self, bytes: usize) -> Option<Room> {
        let (shelf, from, worker, to) = self.0.as_ref()?;
        let path = shelf.dir.join(shelf.name(*from, *worker, *to));
        Room::create(&path, MAGIC, bytes).ok()
    }

    /// To be held by a backlog that should be here and is elsewhere, as long as it is.
    pub(super) fn without(&self) -> Without {
        Without(self.0.as_ref().map(|(shelf, ..)| shelf.without.clone()))
    }
}

/// See [`Spot::without`].
pub(super) struct Without(Option<Arc<()>>);

impl Without {
    /// There is a place where it should be.
    pub(super) fn counts(&self) -> bool {
        self.0.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::port::{Frame, VnetHdr};

    #[test]
    fn that_a_backlog_finds_no_memory_is_said_once() {
        let dir = tempfile::tempdir_in("/dev/shm").expect("a folder in memory");
        let names = ["a", "b", "c"].map(String::from).to_vec();
        let (shelf, _) = Shelf::open(&dir.path().join("x"), names).expect("a shelf");
        let [mut b, mut c] = [1, 2].map(|to| Backlog::at(shelf.spot(0, 0, to)));
        let f = Frame::from_slice(VnetHdr::default(), &[7; 60]);
        assert_eq!(shelf.change(), None);
        // No file can be made there.
        std::fs::remove_dir_all(dir.path().join("x")).expect("it is gone");
        assert!(b.push(&f, 0), "it waits elsewhere");
        assert_eq!(shelf.change(), Some(1));
        assert!(c.push(&f, 0));
        assert_eq!(shelf.change(), None);
        // There is room again, and nothing waits.
        std::fs::create_dir(dir.path().join("x")).expect("a folder");
        for lane in [&mut b, &mut c] {
            assert!(!lane.trim());
            lane.pop();
            lane.note();
            assert!(lane.trim());
        }
        assert_eq!(shelf.change(), Some(0));
        assert!(b.push(&f, 0));
        let path = dir.path().join("x").join(shelf.name(0, 0, 1));
        assert_eq!(Backlog::open(&path).expect("a file").backlog.len(), 1);
        assert_eq!(shelf.change(), None);
    }

    /// Who is killed before the old file is gone has another name of it here.
    #[test]
    fn frames_that_go_behind_another_workers_are_not_in_both_files() {
        let dir = tempfile::tempdir_in("/dev/shm").expect("a folder in memory");
        let open = || Shelf::open(dir.path(), vec!["a".into(), "b".into()]).expect("a shelf");
        let shelf = open().0;
        for worker in 0..2 {
            let mut b = Backlog::at(shelf.spot(0, worker, 1));
            for n in 0..3 {
                assert!(b.push(&Frame::from_slice(VnetHdr::default(), &[n; 60]), 0));
            }
        }
        let (shelf, found) = open();
        let names = [0, 1].map(|w| dir.path().join(shelf.name(0, w, 1)));
        let other = dir.path().join("killed");
        std::fs::hard_link(&names[1], &other).expect("another name");
        let settled = shelf.settle(found, 1);
        assert_eq!(settled.iter().map(|f| f.backlog.len()).sum::<usize>(), 6);
        assert!(!names[1].exists());
        let len = |path: &Path| Backlog::open(path).expect("a file").backlog.len();
        assert_eq!([len(&names[0]), len(&other)], [6, 0]);
    }
}
