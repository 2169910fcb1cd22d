//! A thread of ours that sleeps in a system call is made to come back from it: by a signal to that thread alone, whose
//! handler does nothing and is set without `SA_RESTART`, so that the call ends with `EINTR` (signal(7)).
//!
//! The signal is SIGURG: ignored where nobody handles it, and nothing here asks for urgent data.

use std::io;
use std::mem::MaybeUninit;
use std::sync::OnceLock;

use rustix::process::getpid;
use rustix::thread::{Pid, gettid};

/// A thread of this process.
#[derive(Debug, Clone, Copy)]
pub struct Thread(Pid);

impl Thread {
    /// The calling one.
    pub fn current() -> Thread {
        Thread(gettid())
    }

    /// Ends the system call in which it sleeps, if that is one that a signal may end (tgkill(2)). Nothing happens if it sleeps
    /// in none: what it calls next is not touched by it.
    ///
    /// # Errors
    /// `ESRCH` the thread has ended.
    pub fn interrupt(self) -> io::Result<()> {
        install();
        let (process, thread) = (getpid().as_raw_nonzero(), self.0.as_raw_nonzero());
        // SAFETY: takes numbers only, and the signal has a handler.
        let sent =
            unsafe { libc::syscall(libc::SYS_tgkill, process.get(), thread.get(), libc::SIGURG) };
        match sent {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

fn install() {
    static DONE: OnceLock<()> = OnceLock::new();
    DONE.get_or_init(|| {
        // SAFETY: integers and pointers, of which zeros are a value.
        let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
        action.sa_sigaction = nothing as *const () as usize;
        action.sa_flags = libc::SA_ONSTACK;
        // SAFETY: the action is valid. It cannot fail for this signal.
        unsafe { libc::sigaction(libc::SIGURG, &action, std::ptr::null_mut()) };
    });
}

extern "C" fn nothing(_: libc::c_int) {}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};
    use rustix::io::Errno;
    use std::sync::mpsc;
    use std::time::Duration;

    #[test]
    fn a_thread_that_sleeps_in_a_read_comes_back() {
        let fd = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let (tx, rx) = mpsc::channel();
        let sleeper = std::thread::spawn(move || {
            tx.send(Thread::current()).unwrap();
            rustix::io::read(&fd, &mut [0; 8])
        });
        let thread = rx.recv().unwrap();
        while !sleeper.is_finished() {
            // Too early once or twice.
            let _ = thread.interrupt();
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(sleeper.join().unwrap(), Err(Errno::INTR));
    }
}
