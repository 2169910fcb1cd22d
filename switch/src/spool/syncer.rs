//! The syncer: a thread that forces what is held to the disk, so that the data path never waits for one.
//!
//! `batch`: every `spool.sync_ms` it looks for what is new. `each`: whoever commits wakes it, and frames go back to their
//! sender when it is done ([`Owed`]). `none`: there is no such thread.
//!
//! Invariant: it is told of a commit, or looks again within `spool.sync_ms`: no record stays unforced for longer, but for
//! the time that the disk takes.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::{self, Thread};
use std::time::Duration;

use gangway_shared::config::valid::Sync as SyncPolicy;

use super::keeper::Host;
use super::queue::{Queue, Reach, at_once, lock};

/// How it is woken.
#[derive(Debug, Default)]
pub(super) struct Syncer {
    thread: OnceLock<Thread>,
    asked: AtomicBool,
}

impl Syncer {
    /// There is something to do. A system call only if it was not asked yet.
    pub(super) fn ask(&self) {
        if !self.asked.swap(true, Ordering::AcqRel)
            && let Some(t) = self.thread.get()
        {
            t.unpark();
        }
    }
}

/// Records that their sender must not see accepted before they are on the disk.
#[derive(Debug)]
pub struct Owed {
    pub(super) queue: Arc<Queue>,
    pub(super) seq: u64,
}

impl Owed {
    /// They are, or nobody needs them any more: they were delivered or shipped and their hold is over.
    pub fn is_settled(&self) -> bool {
        self.queue.durable_seq() >= self.seq || self.queue.is_removed()
    }
}

impl Host {
    /// The thread's loop.
    pub(super) fn run_syncer(&self) {
        let _ = self.syncer.thread.set(thread::current());
        let tick = Duration::from_millis(self.limits.sync_ms);
        let reach = match self.policy {
            SyncPolicy::Each => Reach::All,
            _ => Reach::Pages,
        };
        while !self.is_stopped() {
            // Before the look: what is committed behind it asks again.
            self.syncer.asked.store(false, Ordering::SeqCst);
            let (some, new) = {
                let state = lock(&self.state);
                let all = || state.queues.values().flatten();
                let new: Vec<Arc<Queue>> = all().filter(|q| q.wants_sync()).cloned().collect();
                (all().next().is_some(), new)
            };
            if !new.is_empty() {
                // A failure is latched in its queue and logged there.
                let _ = at_once(&new, &|q| {
                    let _ = q.sync_now(reach);
                    Ok(())
                });
            }
            match (self.policy, some) {
                (SyncPolicy::Each, true) if self.syncer.asked.load(Ordering::SeqCst) => {}
                (_, true) => thread::park_timeout(tick),
                (_, false) => thread::park(),
            }
        }
    }
}
