//! A hypervisor of the lab: a namespace, a folder, VMs, and later a switch.

use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use std::process::Command;

use super::net::Netns;
use super::process::{self, Process, command_in};

/// A host.
pub struct Host {
    /// `a` or `b`.
    pub name: String,
    /// Its namespace, with `mgmt0` and `up0`.
    pub netns: Netns,
    /// Its folder.
    pub dir: PathBuf,
    /// Its switch, once started.
    pub switch: Option<Process>,
    /// What keeps the connections of its VMs while there is no switch.
    pub keeper: Option<Process>,
}

impl Host {
    /// A host without anything on it.
    pub fn new(name: &str, netns: Netns, dir: PathBuf) -> Result<Self> {
        std::fs::create_dir_all(&dir).with_context(|| dir.display().to_string())?;
        Ok(Self {
            name: name.to_owned(),
            netns,
            dir,
            switch: None,
            keeper: None,
        })
    }

    /// A command in the host's namespace.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        command_in(&self.netns, program)
    }

    /// A Linux bridge with the uplink on it: what a host without our switch has.
    pub fn start_bridge(&self) -> Result<()> {
        self.netns.bridge("br0")?;
        self.netns.enslave("up0", "br0")
    }

    /// A persistent TAP device on the bridge.
    pub fn bridge_tap(&self, device: &str) -> Result<()> {
        self.netns
            .ip(&format!("tuntap add dev {device} mode tap"))?;
        self.netns.enslave(device, "br0")
    }

    /// Writes a configuration and starts the switch with it.
    pub fn start_switch(&mut self, program: &Path, config: &str) -> Result<()> {
        self.switch = Some(self.start(program, config, "switch")?);
        Ok(())
    }

    /// The same with the keeper.
    pub fn start_keeper(&mut self, program: &Path, config: &str) -> Result<()> {
        // As `/run` is.
        self.in_memory("kept", "64m")?;
        self.keeper = Some(self.start(program, config, "keeper")?);
        Ok(())
    }

    /// Makes one of the host's folders a file system of so many bytes (`64m`) in memory. It goes with the lab.
    pub fn in_memory(&self, name: &str, size: &str) -> Result<()> {
        let dir = self.dir.join(name);
        std::fs::create_dir_all(&dir).with_context(|| dir.display().to_string())?;
        let options = format!("size={size},mode=700");
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &options, "gangway-lab"]);
        process::run(mount.arg(&dir)).map(drop)
    }

    fn start(&self, program: &Path, config: &str, what: &str) -> Result<Process> {
        let file = self.dir.join("host.toml");
        std::fs::write(&file, config).with_context(|| file.display().to_string())?;
        let mut command = self.command(program);
        command.arg("--config").arg(&file);
        let name = format!("the {what} of host {}", self.name);
        let log = self.dir.join(what).with_extension("log");
        Process::start(&name, command, &log)
    }
}
