//! What a worker sleeps on: an epoll set of the descriptors that its queues wake it with.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::time::Duration;

use rustix::event::epoll;

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

/// Clears a non-blocking eventfd.
pub fn drain_event(fd: BorrowedFd<'_>) {
    let mut buf = [0; 8];
    let _ = rustix::io::read(fd, &mut buf[..]);
}
