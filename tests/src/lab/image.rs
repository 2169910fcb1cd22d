//! What the guests boot, built by `deploy/lab/image.sh` when it is stale.

use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

use super::process::run;

/// Where the repository is, as it was when the lab was built.
pub fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap_or(Path::new("."))
}

/// Kernel, initramfs, and the workload for use outside of VMs.
#[derive(Clone, Debug)]
pub struct Image {
    /// The kernel, an ELF file where possible.
    pub kernel: PathBuf,
    /// The guests' whole system.
    pub initramfs: PathBuf,
    /// The same with iperf3 and ethtool.
    pub tools: PathBuf,
    /// The static workload program.
    pub workload: PathBuf,
}

impl Image {
    /// Builds what is stale; 0.2 s when nothing is.
    pub fn ensure() -> Result<Self> {
        static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
        let _one = ONE_AT_A_TIME.lock();
        let out = repository().join("target/lab");
        run(Command::new(repository().join("deploy/lab/image.sh")).arg(&out))
            .context("the guest image")?;
        Ok(Self {
            kernel: out.join("vmlinux"),
            initramfs: out.join("initramfs.cpio"),
            tools: out.join("tools.cpio"),
            workload: out.join("gangway-workload"),
        })
    }
}
