//! The same group on Gangway: switches on both hosts, their configuration and certificates, and the coordinator's command.
//!
//! The lab drives the product's binaries as a user would; nothing here calls into its crates.

use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::Command;

use super::Lab;
use super::demo::{Freeze, Ports};
use super::group::{Group, VmSpec};
use super::host::Host;
use super::net::{MGMT_A, MGMT_B, Netns};
use super::process::{command_in, run};
use super::qemu::{self, Files, Incoming, Nic};
use super::report::LinkFigures;

/// Where a switch listens for coordinators and other switches.
pub const CONTROL_PORT: u16 = 7600;
/// What a host keeps of the frames of a hold: all, of what the lab's VMs send.
const KEPT_BYTES: u64 = 256 << 20;

/// The product's programs, beside the one that runs now.
#[derive(Clone, Debug)]
pub struct Programs {
    /// The coordinator's command.
    pub gangway: PathBuf,
    /// The switch.
    pub switch: PathBuf,
    /// What keeps the VMs' connections while it is restarted.
    pub keeper: PathBuf,
}

impl Programs {
    /// Finds them in the folder of the running program or, for a test, in the one above.
    pub fn find() -> Result<Self> {
        let me = std::env::current_exe().context("our own path")?;
        let folders = me.ancestors().skip(1).take(2);
        for folder in folders {
            let programs = Self {
                gangway: folder.join("gangway"),
                switch: folder.join("gangway-switch"),
                keeper: folder.join("gangway-keeper"),
            };
            let all = [&programs.gangway, &programs.switch, &programs.keeper];
            if all.iter().all(|p| p.is_file()) {
                return Ok(programs);
            }
        }
        bail!(
            "gangway, gangway-switch and gangway-keeper are not beside {}; run `cargo build --release --bins`",
            me.display()
        )
    }
}

/// How a VM of the group is attached to a host's switch.
pub fn nic(host: &Host, vm: &VmSpec, ports: Ports) -> Nic {
    match ports {
        Ports::VhostUser => Nic::VhostUser {
            socket: host.dir.join(format!("{}.vhost", vm.name)),
            qemu_listens: true,
        },
        Ports::Tap => Nic::Tap {
            device: vm.name.clone(),
        },
    }
}

/// A host's configuration: its uplink, and a port and an incoming command for each VM of the group.
pub fn host_config(lab: &Lab, host: &Host, group: &Group, ports: Ports) -> String {
    let address = if host.name == "a" { MGMT_A } else { MGMT_B };
    let pki = lab.dir().join("pki");
    let (dir, pki) = (host.dir.display(), pki.display());
    let name = &host.name;
    let mut text = format!(
        "[host]\nname = \"{name}\"\nstate_dir = \"{dir}\"\n\n\
         [control]\nsocket = \"{dir}/switch.sock\"\nlisten = \"{address}:{CONTROL_PORT}\"\n\n\
         [tls]\ncert = \"{pki}/{name}.pem\"\nkey = \"{pki}/{name}.key\"\nca = \"{pki}/ca.pem\"\n\n\
         [workers]\ncount = {}\n\n[spool]\ndir = \"{dir}/spool\"\n\n[ledger]\nframes_bytes = {KEPT_BYTES}\n\n\
         [migration]\naddress = \"{address}\"\n\n\
         [[port]]\nname = \"uplink\"\ntype = \"uplink\"\ndevice = \"up0\"\n",
        group.workers
    );
    let _ = write!(text, "\n[keeper]\ndir = \"{dir}/kept\"\n");
    for vm in &group.vms {
        let nic = nic(host, vm, ports);
        let files = Files::new(&host.dir, &vm.name);
        let incoming = qemu::command(group, vm, &lab.image, &nic, &files, Incoming::Paused);
        let VmSpec { name, mac, .. } = vm;
        // JSON's strings and lists are TOML's, too.
        let incoming = Value::from(incoming);
        let _ = write!(
            text,
            "\n[[vm]]\nname = \"{name}\"\nqmp = \"{}\"\nincoming = {incoming}\n\
             \n[[port]]\nname = \"{name}0\"\nvm = \"{name}\"\nmac = \"{mac}\"\n",
            files.qmp.display()
        );
        let _ = match &nic {
            Nic::Tap { device } => {
                writeln!(text, "type = \"tap\"\nrole = \"vm\"\ndevice = \"{device}\"")
            }
            Nic::VhostUser {
                socket,
                qemu_listens,
            } => {
                let mode = if *qemu_listens { "client" } else { "server" };
                writeln!(
                    text,
                    "type = \"vhost-user\"\nmode = \"{mode}\"\nsocket = \"{}\"",
                    socket.display()
                )
            }
        };
    }
    text
}

/// The coordinator's place: the management namespace, its certificate, its list of hosts.
pub struct Coordinator {
    netns: Netns,
    dir: PathBuf,
    program: PathBuf,
}

impl Coordinator {
    /// Makes an authority, certificates for both hosts and the coordinator, and the list of hosts.
    pub fn new(lab: &Lab, programs: &Programs) -> Result<Self> {
        let pki = lab.dir().join("pki");
        let issue = |args: &[&str]| run(Command::new(&programs.gangway).arg("pki").args(args));
        let dir = pki.to_string_lossy();
        issue(&["init", &dir])?;
        issue(&["issue", &dir, "a", "--host", "--address", MGMT_A])?;
        issue(&["issue", &dir, "b", "--host", "--address", MGMT_B])?;
        issue(&["issue", &dir, "admin", "--coordinator"])?;
        let this = Self {
            netns: lab.net.mgmt.clone(),
            dir: lab.dir().to_owned(),
            program: programs.gangway.clone(),
        };
        let file = this.hosts_file();
        std::fs::write(&file, hosts_toml()).with_context(|| file.display().to_string())?;
        Ok(this)
    }

    fn hosts_file(&self) -> PathBuf {
        self.dir.join("hosts.toml")
    }

    /// The coordinator's command with the lab's list of hosts and state.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = command_in(&self.netns, &self.program);
        command
            .env("GANGWAY_HOSTS", self.hosts_file())
            .env("GANGWAY_STATE", self.dir.join("coordinator"))
            .args(args);
        command
    }

    /// Runs a short command and returns what it prints.
    pub fn ask(&self, args: &[&str]) -> Result<String> {
        let output = run(&mut self.command(args))?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// The command that moves the group to B and writes its report to [`Coordinator::report_file`].
    pub fn migrate(&self, group: &Group, freeze: Freeze) -> Command {
        self.move_to(group, "b", freeze)
    }

    /// The same to either host.
    pub fn move_to(&self, group: &Group, host: &str, freeze: Freeze) -> Command {
        let report = self.report_file();
        let (vms, report) = (group.order().join(","), report.to_string_lossy());
        self.command(&[
            "migrate",
            &vms,
            "--to",
            host,
            "--freeze",
            freeze.name(),
            "--report",
            &report,
        ])
    }

    /// Where [`Coordinator::migrate`] leaves its report.
    pub fn report_file(&self) -> PathBuf {
        self.dir.join("migration.json")
    }
}

fn hosts_toml() -> String {
    let host = |name: &str, address: &str| {
        format!("[[host]]\nname = \"{name}\"\naddress = \"{address}:{CONTROL_PORT}\"\n\n")
    };
    host("a", MGMT_A)
        + &host("b", MGMT_B)
        + "[tls]\ncert = \"pki/admin.pem\"\nkey = \"pki/admin.key\"\nca = \"pki/ca.pem\"\n\n\
           [[group]]\nname = \"chain\"\nvms = [\"producer\", \"middle\", \"consumer\"]\n"
}

/// What the lab takes from the coordinator's report.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default)]
pub struct CoordinatorReport {
    /// How it ended.
    pub outcome: String,
    /// The dependency order.
    pub order: Vec<String>,
    /// Per VM.
    pub vms: Vec<CoordinatorVm>,
    /// Per lane.
    pub links: Vec<LinkFigures>,
    /// From the first stop to the last resume.
    pub blackout_ms: Option<f64>,
    /// From the freeze to the thaw.
    pub freeze_to_thaw_ms: Option<f64>,
}

/// A VM in the coordinator's report.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default)]
pub struct CoordinatorVm {
    /// Its name.
    pub name: String,
    /// Bytes of memory copied while it ran.
    pub precopy_bytes: u64,
    /// QEMU's STOP on the source.
    pub stop_ns: Option<u64>,
    /// QEMU's RESUME on the target.
    pub resume_ns: Option<u64>,
}
