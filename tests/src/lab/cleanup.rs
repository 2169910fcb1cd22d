//! Nothing stays behind: a registry of what the run has made, for its guards, its signals and the next run.
//!
//! Invariant: a guard that drops takes its entry out; the signal thread takes what is still in.

use rustix::process::{Pid, Signal, kill_process};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError};
use std::thread;

use super::sys;

/// A child that its guard and the signal thread may both end.
pub type SharedChild = Arc<Mutex<Child>>;

struct Made {
    children: Vec<SharedChild>,
    netns: Vec<String>,
    dirs: Vec<PathBuf>,
}

static MADE: Mutex<Made> = Mutex::new(Made {
    children: Vec::new(),
    netns: Vec::new(),
    dirs: Vec::new(),
});

fn made() -> MutexGuard<'static, Made> {
    MADE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Kills a child and waits for it. The handle, not the number, is what is killed: a reaped number may be anyone's.
pub fn end(child: &SharedChild) {
    let mut child = child.lock().unwrap_or_else(PoisonError::into_inner);
    let _ = child.kill();
    let _ = child.wait();
}

/// Registers a child.
pub fn add_child(child: &SharedChild) {
    made().children.push(child.clone());
}

/// Forgets a child that has been waited for.
pub fn forget_child(child: &SharedChild) {
    made().children.retain(|other| !Arc::ptr_eq(other, child));
}

/// Removes a namespace when it drops.
#[derive(Debug)]
pub struct NetnsGuard(String);

impl NetnsGuard {
    /// Takes charge of a namespace by its name.
    pub fn new(name: &str) -> Self {
        made().netns.push(name.to_owned());
        Self(name.to_owned())
    }
}

impl Drop for NetnsGuard {
    fn drop(&mut self) {
        delete_netns(&self.0);
        made().netns.retain(|name| *name != self.0);
    }
}

/// Takes away what is mounted below a folder of ours: else it could not be removed.
fn unmount_below(dir: &Path) {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let points = mounts.lines().filter_map(|line| line.split(' ').nth(1));
    for point in points.filter(|point| Path::new(point).starts_with(dir)) {
        // Lazily: a process in a namespace of ours may still hold it.
        let _ = Command::new("umount").args(["--lazy", point]).status();
    }
}

/// Keeps a temporary folder in the registry as long as it lives; its owner removes it.
#[derive(Debug)]
pub struct DirGuard(PathBuf);

impl DirGuard {
    /// Registers a folder.
    pub fn new(path: &Path) -> Self {
        made().dirs.push(path.to_owned());
        Self(path.to_owned())
    }
}

impl Drop for DirGuard {
    fn drop(&mut self) {
        unmount_below(&self.0);
        made().dirs.retain(|path| *path != self.0);
    }
}

/// Ends what still runs in a namespace of ours, such as VMs that a switch started, and removes it.
fn delete_netns(name: &str) {
    let listed = Command::new("ip")
        .args(["netns", "pids", name])
        .stderr(Stdio::null())
        .output();
    let listed = listed.map(|output| output.stdout).unwrap_or_default();
    for pid in String::from_utf8_lossy(&listed).split_whitespace() {
        if let Some(pid) = pid.parse().ok().and_then(Pid::from_raw) {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
    let _ = Command::new("ip")
        .args(["netns", "del", name])
        .stderr(Stdio::null())
        .status();
}

/// From now on SIGINT and SIGTERM clean up before the process ends. Call it before other threads are started.
pub fn on_signals() -> std::io::Result<()> {
    static ONCE: Once = Once::new();
    let mut result = Ok(());
    ONCE.call_once(|| {
        result = sys::block_end_signals();
        if result.is_ok() {
            thread::spawn(|| {
                let signal = sys::wait_end_signal();
                eprintln!("lab: signal {signal}, cleaning up");
                let made = made();
                made.children.iter().for_each(end);
                made.netns.iter().for_each(|name| delete_netns(name));
                for dir in &made.dirs {
                    unmount_below(dir);
                    let _ = std::fs::remove_dir_all(dir);
                }
                // With the registry still locked: nothing new is made from here on.
                std::process::exit(128 + signal);
            });
        }
    });
    // A test's own thread was started before the call above.
    result.and_then(|()| sys::block_end_signals())
}

/// The process number in a name of ours: `gw<pid>-<rest>`.
fn owner(name: &str) -> Option<u32> {
    name.strip_prefix("gw")?.split_once('-')?.0.parse().ok()
}

/// Removes namespaces and folders of runs whose process is gone.
pub fn remove_stale() {
    let dead =
        |name: &str| owner(name).is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists());
    let names = |dir: &str| -> Vec<String> {
        let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
        entries
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect()
    };
    for name in names("/run/netns").iter().filter(|name| dead(name)) {
        delete_netns(name);
    }
    for name in names("/tmp").iter().filter(|name| dead(name)) {
        let dir = Path::new("/tmp").join(name);
        unmount_below(&dir);
        let _ = std::fs::remove_dir_all(dir);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_ours_have_an_owner() {
        assert_eq!(owner("gw123-0-a"), Some(123));
        for other in ["gw-a", "gwen-a", "gateway", "gw12", "xgw1-a"] {
            assert_eq!(owner(other), None, "{other}");
        }
    }
}
