//! The lab's unsafe island: what has to happen between fork and exec, and signals.
#![allow(unsafe_code)]

use std::os::unix::process::CommandExt;
use std::process::Command;

/// The child dies with the thread that starts it, and takes no blocked signals from us.
///
/// The kernel means the *thread*: start long-lived processes from a thread that lives as long as the lab.
pub fn die_with_us(command: &mut Command) {
    let parent = std::process::id();
    let prepare = move || {
        // SAFETY: between fork and exec only async-signal-safe calls are made: prctl, getppid, sigemptyset,
        // sigprocmask; nothing is allocated. `set` is fully written by sigemptyset before it is read.
        unsafe {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                return Err(std::io::Error::last_os_error());
            }
            // We may have died before the call above.
            if libc::getppid() as u32 != parent {
                return Err(std::io::Error::from_raw_os_error(libc::ESRCH));
            }
            let mut set = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
            libc::sigemptyset(set.as_mut_ptr());
            libc::sigprocmask(libc::SIG_SETMASK, set.as_ptr(), std::ptr::null_mut());
        }
        Ok(())
    };
    // SAFETY: `prepare` keeps to what is allowed in a forked child, see above.
    unsafe {
        command.pre_exec(prepare);
    }
}

/// Blocks SIGINT and SIGTERM in this thread and those it starts later.
pub fn block_end_signals() -> std::io::Result<()> {
    let set = end_signals();
    // SAFETY: `set` is initialised; the old mask is not asked for.
    let result = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) };
    if result == 0 {
        Ok(())
    } else {
        Err(std::io::Error::from_raw_os_error(result))
    }
}

/// Waits for SIGINT or SIGTERM, which must be blocked.
pub fn wait_end_signal() -> i32 {
    let (set, mut signal) = (end_signals(), 0);
    // SAFETY: both pointers are to live locals of the right types.
    while unsafe { libc::sigwait(&set, &mut signal) } != 0 {}
    signal
}

fn end_signals() -> libc::sigset_t {
    // SAFETY: sigset_t is plain data and written whole by sigemptyset; the signal numbers are valid.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGINT);
        libc::sigaddset(&mut set, libc::SIGTERM);
        set
    }
}
