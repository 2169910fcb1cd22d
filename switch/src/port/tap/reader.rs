//! Duplicates of the descriptors by which QEMU reads a TAP: to see whether the queue is empty, and to read back what a
//! paused VM left in it.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::time::Duration;

use super::taken::Whole;
use crate::port::{FRAME_MAX, VnetHdr};
use crate::sys::{frame_io, netdev::DeviceControl, process, tun};

/// The longest header that a reader can ask for: `virtio_net_hdr_v1_hash_tunnel` has 24 bytes; twice that.
const HDR_MAX: usize = 48;

/// The process that holds a TAP's character device, and duplicates of its descriptors.
#[derive(Debug)]
pub(super) struct Reader {
    pub(super) pid: u32,
    /// Who asked for it, as [`super::VmTap::adopt`] was told.
    pub(super) user: u64,
    pidfd: OwnedFd,
    /// One per queue.
    fds: Vec<OwnedFd>,
}

impl Reader {
    /// Finds the descriptors of process `pid` that are attached to `device` in the namespace of `control`, and
    /// duplicates them. `Ok(None)` if it has none.
    pub(super) fn find(
        pid: u32,
        device: &str,
        control: &DeviceControl,
        user: u64,
    ) -> io::Result<Option<Reader>> {
        // The pidfd first: if the process ends and its number is used again, pidfd_getfd fails instead of taking a
        // stranger's descriptor.
        let pidfd = process::pidfd_open(pid)?;
        let namespace = control.namespace()?;
        let mut fds = Vec::new();
        for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
            let name = entry?.file_name();
            let Some(fd) = name.to_str().and_then(|n| n.parse::<RawFd>().ok()) else {
                continue;
            };
            // It may be closed at any time between these calls: then it is not one of ours.
            let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}")).unwrap_or_default();
            if interface(&info) != Some(device) {
                continue;
            }
            let dup = match process::pidfd_getfd(pidfd.as_fd(), fd) {
                Err(e) if e.raw_os_error() == Some(libc::EBADF) => continue,
                dup => dup?,
            };
            if tun::attached(dup.as_fd())
                .is_ok_and(|a| a.device == device && a.namespace == namespace)
            {
                fds.push(dup);
            }
        }
        Ok((!fds.is_empty()).then_some(Reader {
            pid,
            user,
            pidfd,
            fds,
        }))
    }

    /// Several are read side by side.
    pub(super) fn has_one_queue(&self) -> bool {
        self.fds.len() == 1
    }

    /// Whether nothing waits for the reader. A failed descriptor counts as empty: nobody can read it any more.
    pub(super) fn queue_empty(&self) -> bool {
        self.fds
            .iter()
            .all(|fd| !process::readable(fd, Duration::ZERO).unwrap_or(false))
    }

    /// Whether the process has ended: only our duplicates keep the queue alive.
    pub(super) fn exited(&self) -> bool {
        process::readable(&self.pidfd, Duration::ZERO).unwrap_or(true)
    }

    /// Takes everything that waits now, oldest first, queue by queue; at most `max` packets.
    pub(super) fn read_back(&self, max: usize) -> io::Result<Vec<Whole>> {
        let mut out = Vec::new();
        let mut buf = vec![0; HDR_MAX + FRAME_MAX];
        for fd in &self.fds {
            let hdr_len = tun::attached(fd.as_fd())?.vnet_hdr_len.min(HDR_MAX);
            while out.len() < max && process::readable(fd, Duration::ZERO)? {
                let n = match frame_io::read_nowait(fd.as_fd(), &mut buf) {
                    Ok(n) => n,
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                    Err(e) => return Err(e),
                };
                let packet = &buf[..n];
                let (hdr, frame) = packet.split_at(hdr_len.min(n));
                // The first 10 bytes are the same in all versions of the header.
                let mut vnet = VnetHdr::default();
                if let Some(first) = hdr.first_chunk() {
                    vnet = VnetHdr(*first);
                }
                out.push((vnet, frame.to_vec()));
            }
        }
        Ok(out)
    }

    /// Whether the device goes away with its last descriptor.
    pub(super) fn set_persistent(&self, on: bool) -> io::Result<()> {
        tun::set_persistent(self.fds[0].as_fd(), on)
    }
}

/// The `iff:` line that tun adds to `/proc/PID/fdinfo/FD`.
fn interface(fdinfo: &str) -> Option<&str> {
    fdinfo
        .lines()
        .find_map(|l| l.strip_prefix("iff:"))
        .map(str::trim)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interface_is_read_from_fdinfo() {
        let info = "pos:\t0\nflags:\t0104002\nmnt_id:\t25\niff:\ttap7\n";
        assert_eq!(interface(info), Some("tap7"));
        assert_eq!(interface("pos:\t0\n"), None);
    }
}
