//! Processes and threads: who is at the other end of a socket, a duplicate of another process's descriptor, pinning.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags};
use rustix::thread::CpuSet;

/// The process at the other end (`unix(7)`, SO_PEERCRED): for the side that connected, the one that called `listen(2)`.
/// That is QEMU itself when it made its QMP socket (`-qmp unix:PATH,server=on`), but libvirtd when libvirt did.
///
/// # Errors
/// Of `getsockopt(2)`; `ESRCH` if the other end lives in a PID namespace that we do not see.
pub fn peer_pid(socket: &UnixStream) -> io::Result<u32> {
    // The kernel reports 0 for a process outside our PID namespace, which no `Pid` can hold: ask it ourselves.
    let mut cred = libc::ucred {
        pid: 0,
        uid: 0,
        gid: 0,
    };
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes into `cred`, a plain struct for which any bytes are valid.
    super::check(unsafe {
        libc::getsockopt(
            std::os::fd::AsRawFd::as_raw_fd(socket),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut cred).cast(),
            &mut len,
        )
    })?;
    match u32::try_from(cred.pid) {
        Ok(pid) if pid > 0 => Ok(pid),
        _ => Err(io::Error::from_raw_os_error(libc::ESRCH)),
    }
}

/// A descriptor of a process, readable once it has exited (`pidfd_open(2)`).
///
/// # Errors
/// `ESRCH` no such process.
pub fn pidfd_open(pid: u32) -> io::Result<OwnedFd> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or(io::Error::from_raw_os_error(libc::ESRCH))?;
    Ok(rustix::process::pidfd_open(pid, PidfdFlags::empty())?)
}

/// A duplicate of descriptor `fd` of the process (`pidfd_getfd(2)`): the same open file description, close-on-exec here.
///
/// # Errors
/// `EPERM` without the right to trace the process (CAP_SYS_PTRACE), `EBADF` it has no such descriptor.
pub fn pidfd_getfd(pidfd: BorrowedFd<'_>, fd: RawFd) -> io::Result<OwnedFd> {
    Ok(rustix::process::pidfd_getfd(
        pidfd,
        fd,
        PidfdGetfdFlags::empty(),
    )?)
}

/// A counter descriptor (`eventfd(2)`), non-blocking and close-on-exec.
///
/// # Errors
/// `EMFILE`, `ENFILE`, `ENOMEM`.
pub fn eventfd() -> io::Result<OwnedFd> {
    Ok(rustix::event::eventfd(
        0,
        EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC,
    )?)
}

/// Pins the calling thread to one CPU (`sched_setaffinity(2)`).
///
/// # Errors
/// `EINVAL` the machine has no such CPU or our cpuset does not allow it.
pub fn pin_thread(cpu: usize) -> io::Result<()> {
    if cpu >= CpuSet::MAX_CPU {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let mut set = CpuSet::new();
    set.set(cpu);
    Ok(rustix::thread::sched_setaffinity(None, &set)?)
}

/// The CPUs that a thread may run on.
#[derive(Debug, Clone, Copy)]
pub struct Affinity(CpuSet);

/// Those of the calling thread (`sched_getaffinity(2)`).
///
/// # Errors
/// `EINVAL` the machine has more CPUs than we can name.
pub fn affinity() -> io::Result<Affinity> {
    Ok(Affinity(rustix::thread::sched_getaffinity(None)?))
}

impl Affinity {
    /// No CPU: nothing can run there.
    #[cfg(test)]
    pub fn none() -> Affinity {
        Affinity(CpuSet::new())
    }

    /// Lets the calling thread run on them (`sched_setaffinity(2)`).
    ///
    /// # Errors
    /// `EINVAL` our cpuset allows none of them.
    pub fn apply(&self) -> io::Result<()> {
        Ok(rustix::thread::sched_setaffinity(None, &self.0)?)
    }
}

/// Waits until `fd` is readable, has failed or hung up (`poll(2)`); false when the time is over first.
///
/// # Errors
/// Of `poll(2)`; an interrupted call counts as "not readable".
pub fn readable(fd: impl AsFd, timeout: Duration) -> io::Result<bool> {
    let mut fds = [PollFd::new(&fd, PollFlags::IN)];
    let timeout = Timespec {
        tv_sec: timeout.as_secs().min(i32::MAX as u64) as i64,
        tv_nsec: i64::from(timeout.subsec_nanos()),
    };
    match rustix::event::poll(&mut fds, Some(&timeout)) {
        Ok(n) => Ok(n > 0),
        Err(rustix::io::Errno::INTR) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

/// Makes every thread of this process execute a full memory barrier before this returns: membarrier(2),
/// `MEMBARRIER_CMD_PRIVATE_EXPEDITED`. On a kernel without it (before 4.14) it waits long enough for any store to get out.
pub fn barrier_everywhere() {
    const EXPEDITED: libc::c_int = 1 << 3;
    const REGISTER_EXPEDITED: libc::c_int = 1 << 4;
    let call = |command: libc::c_int| {
        // SAFETY: takes numbers only.
        unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) == 0 }
    };
    static REGISTERED: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
    if !(*REGISTERED.get_or_init(|| call(REGISTER_EXPEDITED)) && call(EXPEDITED)) {
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Moves the calling thread into a fresh network namespace, so that a test cannot touch the machine's devices.
///
/// # Errors
/// `EPERM` without CAP_SYS_ADMIN.
#[cfg(test)]
pub fn own_network_namespace() -> io::Result<()> {
    // SAFETY: CLONE_NEWNET does not touch the descriptor table or memory of any thread.
    super::check(unsafe { libc::unshare(libc::CLONE_NEWNET) })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    #[test]
    fn the_peer_of_a_socket_is_the_process_that_listens() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("s");
        let _listener = UnixListener::bind(&path).expect("bind");
        let client = UnixStream::connect(&path).expect("connect");
        assert_eq!(peer_pid(&client).expect("peer"), std::process::id());
    }

    #[test]
    fn a_process_that_cannot_be_is_an_error() {
        assert!(pidfd_open(0).is_err());
        assert!(pidfd_open(u32::MAX).is_err());
        assert!(pin_thread(usize::MAX).is_err());
    }

    #[test]
    fn a_thread_can_be_pinned() {
        let body = || {
            let home = affinity().expect("affinity");
            let all = |a: &Affinity| a.0.count();
            pin_thread(0).expect("pin");
            assert_eq!(all(&affinity().expect("one")), 1);
            home.apply().expect("back");
            assert_eq!(all(&affinity().expect("all")), all(&home));
        };
        std::thread::spawn(body).join().expect("thread");
    }
}
