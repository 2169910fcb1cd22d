//! Processes by number and start time: a number alone may have gone to somebody else.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use rustix::process::{Pid, PidfdFlags, Signal};
use tokio::time::{Instant, sleep};

const POLL: Duration = Duration::from_millis(10);

/// When a process started, in clock ticks since the boot (proc(5), `/proc/PID/stat`, field 22).
pub fn start_time(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field, the name, may contain anything, parentheses too.
    let after_name = stat.get(stat.rfind(')')? + 1..)?;
    after_name
        .split_ascii_whitespace()
        .nth(22 - 3)?
        .parse()
        .ok()
}

/// A process that is certainly the one meant, for as long as this lives.
pub struct Process(OwnedFd);

impl Process {
    /// `None` if it has gone.
    pub fn find(pid: u32, started: u64) -> Option<Process> {
        let id = Pid::from_raw(i32::try_from(pid).ok()?)?;
        let fd = rustix::process::pidfd_open(id, PidfdFlags::NONBLOCK).ok()?;
        // Opened first, compared then: from here on the number can't change hands.
        let process = Process(fd);
        (start_time(pid)? == started && !process.has_exited()).then_some(process)
    }

    fn has_exited(&self) -> bool {
        crate::sys::process::readable(&self.0, Duration::ZERO).unwrap_or(false)
    }

    /// Sends SIGTERM, and SIGKILL if that does not help within `patience`.
    pub async fn end(self, patience: Duration) -> io::Result<()> {
        let gone = |r: rustix::io::Result<()>| match r {
            Err(rustix::io::Errno::SRCH) => Ok(()),
            r => r,
        };
        for signal in [Signal::TERM, Signal::KILL] {
            gone(rustix::process::pidfd_send_signal(&self.0, signal))?;
            let deadline = Instant::now() + patience;
            while Instant::now() < deadline {
                if self.has_exited() {
                    return Ok(());
                }
                sleep(POLL).await;
            }
        }
        Err(io::ErrorKind::TimedOut.into())
    }
}

/// The process that listens on a unix socket. Does not wait for it to accept.
pub fn listener_pid(path: &Path) -> io::Result<u32> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let fd = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&fd, &SocketAddrUnix::new(path)?)?;
    crate::sys::peer_pid(&UnixStream::from(fd))
}
