//! Unsafe island: starts a program that is to outlive us, in a session of its own and with none of our descriptors.
//!
//! Libraries of ours receive descriptors over unix sockets without close-on-exec (vhost-user: the memory of other
//! guests); a VM must not inherit them.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use tokio::process::Child;

/// Starts `argv`; its output goes to `log`. To be called inside the runtime.
///
/// # Errors
/// Of `fork(2)` and `execve(2)`; `EINVAL` for an empty `argv`.
pub fn detached(argv: &[String], log: File) -> io::Result<Child> {
    let (program, args) = argv
        .split_first()
        .ok_or(io::Error::from(io::ErrorKind::InvalidInput))?;
    let mut command = Command::new(program);
    command
        .args(args)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log);
    // What the service manager told the switch is not for the VM.
    for ours in [
        "NOTIFY_SOCKET",
        "WATCHDOG_USEC",
        "WATCHDOG_PID",
        "LISTEN_FDS",
        "LISTEN_PID",
        "LISTEN_FDNAMES",
    ] {
        command.env_remove(ours);
    }
    // SAFETY: between fork and exec only async-signal-safe calls are allowed; these are two system calls, and
    // building an `io::Error` from `errno` does not allocate.
    unsafe {
        command.pre_exec(|| {
            rustix::process::setsid()?;
            // close_range(2). Marked, not closed: the standard library reports a failed exec through one of them.
            let flags = libc::CLOSE_RANGE_CLOEXEC;
            match libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, flags) {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            }
        });
    }
    tokio::process::Command::from(command)
        .kill_on_drop(false)
        .spawn()
}
