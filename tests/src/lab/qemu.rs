//! QEMU's command line, and a VM that runs.

use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::group::{Group, VmSpec};
use super::host::Host;
use super::image::Image;
use super::process::{Process, command_in, run, until};
use super::qmp::Qmp;

/// How a VM's network card is attached to the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Nic {
    /// A persistent TAP device that somebody else made.
    Tap {
        /// Its name in the host's namespace.
        device: String,
    },
    /// A vhost-user socket.
    VhostUser {
        /// Its path.
        socket: PathBuf,
        /// QEMU listens and the switch dials; else the switch listens and QEMU dials, again and again.
        qemu_listens: bool,
    },
}

/// The files of one QEMU process. Source and target of a migration have different ones.
#[derive(Clone, Debug)]
pub struct Files {
    /// The monitor for the product.
    pub qmp: PathBuf,
    /// The monitor for the lab: QEMU serves one client per socket, and every client gets every event.
    pub lab_qmp: PathBuf,
    /// The guest's serial line.
    pub serial: PathBuf,
    /// What QEMU itself says.
    pub log: PathBuf,
}

impl Files {
    /// The files of a VM in a host's folder.
    pub fn new(dir: &Path, vm: &str) -> Self {
        let file = |kind: &str| dir.join(format!("{vm}{kind}"));
        Self {
            qmp: file(".qmp"),
            lab_qmp: file(".lab"),
            serial: file("-serial.log"),
            log: file("-qemu.log"),
        }
    }
}

/// The command of a VM, program first. `incoming`: it waits for a migration and stays paused when it has arrived.
pub fn command(
    group: &Group,
    vm: &VmSpec,
    image: &Image,
    nic: &Nic,
    files: &Files,
    incoming: Incoming,
) -> Vec<String> {
    let memory = memory_kb(group);
    let queues = match group.queues {
        0 | 1 => String::new(),
        n => format!(",queues={n}"),
    };
    let mut line = vec![
        "qemu-system-x86_64".to_owned(),
        "-name".to_owned(),
        // So that the threads of its processors have names.
        format!("{},debug-threads=on", vm.name),
    ];
    let mut add = |words: &[&str]| line.extend(words.iter().map(|word| word.to_string()));
    // KVM guests hang on some of the machines that this runs on; emulation runs everywhere.
    add(&[
        "-accel",
        "tcg,thread=multi",
        "-cpu",
        "qemu64",
        "-smp",
        &group.queues.to_string(),
        "-m",
        &format!("{memory}k"),
    ]);
    add(&[
        "-object",
        &format!("memory-backend-memfd,id=m0,size={memory}k,share=on"),
    ]);
    add(&[
        "-machine",
        "pc,memory-backend=m0",
        "-nodefaults",
        "-no-user-config",
        "-no-reboot",
        "-display",
        "none",
    ]);
    let initramfs = match group.tools {
        true => &image.tools,
        false => &image.initramfs,
    };
    add(&[
        "-kernel",
        &image.kernel.to_string_lossy(),
        "-initrd",
        &initramfs.to_string_lossy(),
    ]);
    add(&["-append", &group.cmdline(vm)]);
    add(&["-serial", &format!("file:{}", files.serial.display())]);
    for monitor in [&files.qmp, &files.lab_qmp] {
        add(&[
            "-qmp",
            &format!("unix:{},server=on,wait=off", monitor.display()),
        ]);
    }
    let device = match nic {
        Nic::Tap { device } => {
            add(&[
                "-netdev",
                &format!("tap,id=n0,ifname={device},script=no,downscript=no{queues}"),
            ]);
            "virtio-net-pci,netdev=n0"
        }
        Nic::VhostUser {
            socket,
            qemu_listens,
        } => {
            let mode = if *qemu_listens {
                "server=on,wait=off"
            } else {
                "reconnect=1"
            };
            add(&[
                "-chardev",
                &format!("socket,id=c0,path={},{mode}", socket.display()),
            ]);
            add(&[
                "-netdev",
                &format!("vhost-user,id=n0,chardev=c0,vhostforce=on{queues}"),
            ]);
            // With MSI-X, QEMU 7.2 crashes at DRIVER_OK when it emulates the processor.
            "virtio-net-pci,netdev=n0,vectors=0"
        }
    };
    let multi = if queues.is_empty() { "" } else { ",mq=on" };
    let more = if vm.nic.is_empty() { "" } else { "," };
    add(&[
        "-device",
        &format!(
            "{device}{multi},mac={},romfile=,id=nic0{more}{}",
            vm.mac, vm.nic
        ),
        "-device",
        "virtio-rng-pci",
    ]);
    match incoming {
        Incoming::No => {}
        Incoming::Runs => add(&["-incoming", "defer"]),
        Incoming::Paused => add(&["-incoming", "defer", "-S"]),
    }
    line
}

/// The memory of a VM, deliberately no multiple of 64 pages.
///
/// QEMU before 9.0, when it emulates the processor, collects the dirty bits of a RAM block of whole words through a
/// short cut that forgets the processor's TLB: later writes to hot pages go unnoticed, and the guest arrives with torn
/// memory (fixed by "physmem: Fix migration dirty bitmap coherency with TCG memory access"). An odd length takes
/// the long way.
fn memory_kb(group: &Group) -> u32 {
    group.memory_mb * 1024 + 8
}

/// Whether a QEMU waits for a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Incoming {
    /// It boots.
    No,
    /// It waits, and runs as soon as the migration is complete.
    Runs,
    /// It waits, and stays paused until `cont`.
    Paused,
}

/// A QEMU process with the lab's own monitor.
pub struct Vm {
    /// Its name.
    pub name: String,
    /// The lab's monitor.
    pub qmp: Qmp,
    /// Its files.
    pub files: Files,
    /// The process.
    pub process: Process,
}

impl Vm {
    /// Starts a VM on a host.
    pub fn start(
        host: &Host,
        group: &Group,
        vm: &VmSpec,
        image: &Image,
        nic: &Nic,
        incoming: Incoming,
    ) -> Result<Self> {
        let files = Files::new(&host.dir, &vm.name);
        let words = command(group, vm, image, nic, &files, incoming);
        let mut command = command_in(&host.netns, &words[0]);
        command.args(&words[1..]);
        let process = Process::start(
            &format!("QEMU of {} on {}", vm.name, host.name),
            command,
            &files.log,
        )?;
        let qmp = Qmp::connect(&files.lab_qmp, Duration::from_secs(10))
            .with_context(|| said(&files.log))?;
        Ok(Self {
            name: vm.name.clone(),
            qmp,
            files,
            process,
        })
    }

    /// Waits until the workload in the guest is ready.
    pub fn wait_ready(&self, patience: Duration) -> Result<()> {
        until(&format!("sign of life of {}", self.name), patience, || {
            if let Some(status) = self.process.ended() {
                bail!(
                    "{} ended with {status}: {}",
                    self.process.name,
                    said(&self.files.log)
                );
            }
            let serial = std::fs::read(&self.files.serial).unwrap_or_default();
            Ok(String::from_utf8_lossy(&serial)
                .contains("is ready")
                .then_some(()))
        })?;
        do_not_preempt(self.process.pid() as i32).with_context(|| self.name.clone())
    }
}

/// Takes the processors of the VM out of the competition for the host's.
///
/// QEMU's emulated processor notes a first write to a page in two steps: it sets the page's dirty bit, and then lets later
/// writes through unnoticed (`notdirty_write` in accel/tcg/cputlb.c). A migration that collects the bit and sends the page
/// between the two never hears of these writes. That takes a processor that is suspended just there, which a busy host does:
/// with builds beside the lab 20 pages in 96 moves of a VM were not those of the source (all written by its kernel,
/// none by the switch); with this none in 18. Real guests (KVM) have no such steps. `GANGWAY_LAB_PREEMPT=1` is without.
pub fn do_not_preempt(pid: i32) -> Result<()> {
    if std::env::var_os("GANGWAY_LAB_PREEMPT").is_some() {
        return Ok(());
    }
    let tasks = format!("/proc/{pid}/task");
    let mut processors = Vec::new();
    for task in std::fs::read_dir(&tasks).with_context(|| tasks.clone())? {
        let task = task?;
        let name = std::fs::read_to_string(task.path().join("comm")).unwrap_or_default();
        if name.starts_with("CPU ") {
            processors.push(task.file_name());
        }
    }
    match &processors[..] {
        [] => bail!("no thread of process {pid} is named after a processor"),
        [one] => run(std::process::Command::new("chrt")
            .args(["--fifo", "--pid", "1"])
            .arg(one))
        .map(drop),
        // Several of each VM would leave nothing to the switches.
        _ => Ok(()),
    }
}

/// The QEMU whose lab monitor is at `files`, whoever has started it.
pub fn process_at(files: &Files) -> Option<i32> {
    let monitor = files.lab_qmp.display().to_string();
    for process in std::fs::read_dir("/proc").ok()?.flatten() {
        let line = std::fs::read(process.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line);
        if line.starts_with("qemu-system") && line.contains(&monitor) {
            return process.file_name().to_str()?.parse().ok();
        }
    }
    None
}

/// Kills it at once.
pub fn kill(files: &Files) -> Result<()> {
    use rustix::process::{Pid, Signal, kill_process};
    let pid = process_at(files).and_then(Pid::from_raw);
    let pid =
        pid.with_context(|| format!("no QEMU has a monitor at {}", files.lab_qmp.display()))?;
    Ok(kill_process(pid, Signal::KILL)?)
}

/// The end of a log, for an error message.
fn said(log: &Path) -> String {
    let text = std::fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().rev().take(5).collect();
    lines.into_iter().rev().collect::<Vec<_>>().join(" | ")
}
