//! What a worker sleeps on: an epoll set of the descriptors that its queues wake it with.

use std::io;
use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::Duration;

use rustix::event::epoll;
use rustix::io::{Errno, ReadWriteFlags};

/// An epoll set, level-triggered.
pub struct Poller(OwnedFd);

impl Poller {
    /// An empty set.
    pub fn new() -> io::Result<Poller> {
        Ok(Poller(epoll::create(epoll::CreateFlags::CLOEXEC)?))
    }

    /// Adds a descriptor. The kernel forgets it when its last duplicate is closed.
    pub fn add(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        epoll::add(
            &self.0,
            fd,
            epoll::EventData::new_u64(0),
            epoll::EventFlags::IN,
        )?;
        Ok(())
    }

    /// [`Poller::add`] for a queue's descriptor; one that cannot be watched is polled at the next time-out instead.
    pub fn add_raw(&self, fd: RawFd) {
        // SAFETY: the caller holds the queue that owns `fd`, so it is open during this call; nothing is kept.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        let _ = self.add(fd);
    }

    /// Removes a descriptor.
    pub fn remove_raw(&self, fd: RawFd) {
        // SAFETY: as in `add_raw`; a closed or foreign descriptor is answered with an error by the kernel.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        let _ = epoll::delete(&self.0, fd);
    }

    /// Sleeps until a descriptor is readable or `timeout` has passed.
    pub fn wait(&self, timeout: Option<Duration>) {
        let timeout = timeout.and_then(|t| rustix::time::Timespec::try_from(t).ok());
        let mut events = [epoll::Event {
            flags: epoll::EventFlags::empty(),
            data: epoll::EventData::new_u64(0),
        }; 8];
        // An interrupted wait is a short one.
        let _ = epoll::wait(&self.0, &mut events[..], timeout.as_ref());
    }
}

/// Makes an eventfd readable.
pub fn signal_event(fd: BorrowedFd<'_>) {
    // Only a full counter could fail, and then it is readable.
    let _ = rustix::io::write(fd, &1u64.to_ne_bytes());
}

/// Clears an eventfd, and never waits: also of one that somebody else has made blocking, for himself and for us
/// (preadv2(2), `RWF_NOWAIT`). Returns what it counted.
pub fn drain_event(fd: BorrowedFd<'_>) -> u64 {
    let mut buf = [0; 8];
    let read = {
        let mut parts = [IoSliceMut::new(&mut buf)];
        // The offset says: from where it is.
        rustix::io::preadv2(fd, &mut parts, u64::MAX, ReadWriteFlags::NOWAIT)
    };
    let read = match read {
        // Before Linux 5.12, where a flag of the file is all there is.
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => rustix::io::read(fd, &mut buf[..]),
        read => read,
    };
    match read {
        Ok(8) => u64::from_ne_bytes(buf),
        _ => 0,
    }
}

/// Whether it is an eventfd (proc(5), `/proc/pid/fd`): a file's own name starts with a slash.
pub fn is_eventfd(fd: BorrowedFd<'_>) -> io::Result<bool> {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
    Ok(link.as_os_str() == "anon_inode:[eventfd]")
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};
    use std::os::fd::AsFd;

    #[test]
    fn a_blocking_eventfd_is_drained_without_waiting() {
        let fd = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        assert_eq!(drain_event(fd.as_fd()), 0);
        signal_event(fd.as_fd());
        signal_event(fd.as_fd());
        assert_eq!(drain_event(fd.as_fd()), 2);
        assert_eq!(drain_event(fd.as_fd()), 0);
    }

    #[test]
    fn an_eventfd_is_told_from_anything_else() {
        let fd = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        assert!(is_eventfd(fd.as_fd()).unwrap());
        let dir = tempfile::tempdir().unwrap();
        let named = std::fs::File::create(dir.path().join("anon_inode:[eventfd]")).unwrap();
        assert!(!is_eventfd(named.as_fd()).unwrap());
        let (read, write) = rustix::pipe::pipe().unwrap();
        assert!(!is_eventfd(read.as_fd()).unwrap());
        assert!(!is_eventfd(write.as_fd()).unwrap());
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
        assert!(!is_eventfd(epoll.as_fd()).unwrap());
    }
}
