//! Makes a stopped VM as cold as a migration's target: its emulator forgets every translation.
//!
//! QEMU (7.2) throws its translations away when a debugger's single step ends (`gdb_vm_state_change`); setting or clearing a
//! breakpoint does not. The step runs one instruction of the guest, with interrupts and timers off, and costs one more
//! RESUME and STOP, 0.2 ms apart: a VM's pause begins with the first STOP.

use anyhow::{Context, Result, bail};
use serde_json::json;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use super::process::until;
use super::qemu::Vm;

/// How long QEMU may take for one step.
const PATIENCE: Duration = Duration::from_secs(5);

/// What `info jit` says of the translations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Translations {
    blocks: u64,
    flushes: u64,
}

/// A VM's debugger port.
pub struct Debugger(PathBuf);

impl Debugger {
    /// Opens it, while the VM runs: connecting is what stops it.
    pub fn open(vm: &mut Vm) -> Result<Self> {
        let path = vm.files.qmp.with_extension("gdb");
        let order = format!("gdbserver unix:{},server=on,wait=off", path.display());
        human(vm, &order)?;
        Ok(Self(path))
    }

    /// Empties the cache of a stopped VM, and leaves the VM stopped.
    pub fn flush(&self, vm: &mut Vm) -> Result<()> {
        let before = translations(vm)?;
        let mut stub = UnixStream::connect(&self.0).context("the debugger's port")?;
        stub.set_read_timeout(Some(PATIENCE))?;
        // GDB remote protocol: a step, checksum 0x73. It answers with why the VM has stopped.
        stub.write_all(b"$s#73").context("a step")?;
        let mut answer = Vec::new();
        while !answer.contains(&b'#') {
            let mut some = [0; 64];
            match stub.read(&mut some).context("the answer to a step")? {
                0 => bail!("{}: the debugger's port was closed", vm.name),
                count => answer.extend_from_slice(some.get(..count).unwrap_or_default()),
            }
        }
        if !answer.windows(4).any(|word| word == b"$T05") {
            let answer = String::from_utf8_lossy(&answer);
            bail!("{}: a step ended with {answer}", vm.name);
        }
        stub.write_all(b"+").context("a step")?;
        // The processor's thread does it a little later.
        until("empty translation cache", PATIENCE, || {
            let now = translations(vm)?;
            Ok((now.flushes > before.flushes && now.blocks == 0).then_some(()))
        })
        .with_context(|| vm.name.clone())
    }
}

fn human(vm: &mut Vm, line: &str) -> Result<String> {
    let answer = vm
        .qmp
        .execute("human-monitor-command", json!({"command-line": line}))?;
    Ok(answer.as_str().unwrap_or_default().to_owned())
}

fn translations(vm: &mut Vm) -> Result<Translations> {
    let told = human(vm, "info jit")?;
    parse(&told).with_context(|| format!("info jit says {told:?}"))
}

fn parse(told: &str) -> Option<Translations> {
    let number = |key: &str| {
        let rest = told.lines().find_map(|line| line.strip_prefix(key))?;
        rest.split_whitespace().next()?.parse().ok()
    };
    Some(Translations {
        blocks: number("TB count ")?,
        flushes: number("TB flush count ")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_counts_are_read_from_what_qemu_prints() {
        let told = "gen code size       0/1073736704\r\nTB count            7\r\n\r\nStatistics:\r\n\
                    TB flush count      1\r\nTB invalidate count 5\r\n";
        let expected = Translations {
            blocks: 7,
            flushes: 1,
        };
        assert_eq!(parse(told), Some(expected));
        assert_eq!(parse("TB count 7\r\n"), None);
    }
}
