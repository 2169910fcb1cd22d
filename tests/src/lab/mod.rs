//! Two hosts on one machine: network namespaces, a management link, a fabric, and QEMU in them.
//!
//! A [`Lab`] is the world of one run: hosts A and B, the outside client, the coordinator's place. [`group`] says
//! which VMs there are, [`traffic`] runs and judges their traffic, [`moved`] migrates them with Gangway (set up by
//! [`mod@gangway`]), [`baseline`] as users do today,
//! [`mod@verify`] is the product's own proof, [`report`] is what a run leaves behind, [`series`] compares many runs.
//!
//! Invariant: everything is named after our process, nothing outside of our namespaces is changed.
//! Invariant: whatever was made goes away with its guard, also on a panic, on SIGINT and SIGTERM; what a killed run
//! left behind, the next run removes.
//! Invariant: only processes that we started, or that run in a namespace of ours, are ended.

pub mod baseline;
pub mod capture;
pub mod cleanup;
pub mod cold;
pub mod cpu;
pub mod demo;
pub mod gangway;
pub mod group;
pub mod host;
pub mod image;
pub mod iperf;
pub mod memory;
pub mod moved;
pub mod net;
pub mod process;
pub mod qemu;
pub mod qmp;
pub mod report;
pub mod series;
pub mod soak;
mod sys;
pub mod table;
pub mod traffic;
pub mod verify;

use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use tempfile::TempDir;

use cleanup::DirGuard;
use host::Host;
use image::Image;
use net::Net;

/// The world of one run. Fields drop in this order: the hosts' switches first, their namespaces and the folder last.
pub struct Lab {
    /// Where the VMs are at first.
    pub a: Host,
    /// Where they go.
    pub b: Host,
    /// What the guests boot.
    pub image: Image,
    /// Namespaces and links.
    pub net: Net,
    _guard: DirGuard,
    dir: TempDir,
}

/// How a failure begins that a guest's crash explains.
pub const CRASH: &str = "the guest has crashed";

/// Runs a test that moves VMs once more if a guest has crashed: QEMU's emulated processor now and then leaves a page behind as it
/// was ([`qemu::do_not_preempt`]), which guests notice as a torn kernel stack, or in their own account, which they keep twice
/// ([`crate::workload::report`]). Whatever else fails, and a second crash, fails the test.
pub fn once_more_after_a_crash<T>(mut run: impl FnMut() -> T) -> T {
    use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
    match catch_unwind(AssertUnwindSafe(&mut run)) {
        Ok(done) => done,
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map_or("", String::as_str);
            if !text.contains(CRASH) {
                resume_unwind(panic);
            }
            eprintln!("{text}\nonce more");
            run()
        }
    }
}

impl Lab {
    /// Builds the image when it is stale, the namespaces and the links.
    pub fn new() -> Result<Self> {
        static RUNS: AtomicU32 = AtomicU32::new(0);
        cleanup::on_signals()?;
        cleanup::remove_stale();
        let image = Image::ensure()?;
        let name = format!(
            "gw{}-{}",
            std::process::id(),
            RUNS.fetch_add(1, Ordering::Relaxed)
        );
        // Short, because the path of a unix socket has 108 bytes.
        let dir = tempfile::Builder::new()
            .prefix(&format!("{name}."))
            .tempdir_in("/tmp")
            .context("the run's folder in /tmp")?;
        let guard = DirGuard::new(dir.path());
        let net = Net::new(&name)?;
        let host =
            |name: &str, netns: &net::Netns| Host::new(name, netns.clone(), dir.path().join(name));
        Ok(Self {
            a: host("a", &net.a)?,
            b: host("b", &net.b)?,
            image,
            net,
            _guard: guard,
            dir,
        })
    }

    /// The run's folder: sockets, logs, serial lines.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The same result; an error also names the guests whose kernels have crashed: it is theirs or QEMU's before ours.
    pub fn blame<T>(&self, result: Result<T>) -> Result<T> {
        result.map_err(|error| match self.crashed().as_slice() {
            [] => error,
            crashed => error.context(format!("{CRASH}: {}", crashed.join("; "))),
        })
    }

    /// What guests say when their memory is damaged, from their serial lines.
    pub fn crashed(&self) -> Vec<String> {
        let signs = ["BUG:", "Oops", "Kernel panic", "inconsistent task state"];
        let mut found = Vec::new();
        for host in [&self.a, &self.b] {
            for entry in std::fs::read_dir(&host.dir).into_iter().flatten().flatten() {
                let name = entry.file_name().to_string_lossy().into_owned();
                let Some(vm) = name.strip_suffix("-serial.log") else {
                    continue;
                };
                let text = std::fs::read(entry.path()).unwrap_or_default();
                let text = String::from_utf8_lossy(&text);
                let line = text
                    .lines()
                    .find(|line| signs.iter().any(|sign| line.contains(sign)));
                found.extend(line.map(|line| format!("{vm} on {}: {}", host.name, line.trim())));
            }
        }
        found
    }

    /// Copies every log of the run, of both hosts and of the commands, to a place that outlives it.
    pub fn keep_logs(&self, to: &Path) -> Result<()> {
        let hosts = [&self.a, &self.b].map(|host| (host.dir.as_path(), to.join(&host.name)));
        let commands = (self.dir(), to.to_owned());
        for (from, to) in hosts.into_iter().chain([commands]) {
            std::fs::create_dir_all(&to).with_context(|| to.display().to_string())?;
            for entry in std::fs::read_dir(from)?.flatten() {
                let path = entry.path();
                if path
                    .extension()
                    .is_some_and(|extension| extension == "log" || extension == "toml")
                {
                    let name: PathBuf = entry.file_name().into();
                    std::fs::copy(&path, to.join(name))
                        .with_context(|| path.display().to_string())?;
                }
            }
        }
        Ok(())
    }
}
