//! The character device of TUN/TAP (Documentation/networking/tuntap.rst of the kernel).

use std::ffi::c_int;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::fs::{Mode, OFlags};

use super::{IfReq, check};

/// Where the character device lives.
pub const TUN_PATH: &str = "/dev/net/tun";

/// What the reader of the character device takes without segmentation or checksum: checksums, TSO over IPv4 and IPv6
/// with and without ECN.
pub const OFFLOADS: u32 = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | TUN_F_TSO_ECN;
const TUN_F_TSO_ECN: u32 = 0x08;
/// And UDP without segmentation, over IPv4 and IPv6 together (Linux 6.2).
pub const USO: u32 = libc::TUN_F_USO4 | libc::TUN_F_USO6;

/// Opens a queue of a TAP device with a virtio-net header of 10 bytes and no packet information, non-blocking. The device
/// is made if it does not exist.
///
/// # Errors
/// `EPERM` without CAP_NET_ADMIN (or being its owner), `EBUSY` somebody else has its only queue, `EINVAL` a device of that
/// name is no TAP or differs in multi-queue, `ENOENT` no tun driver.
pub fn open_tap(device: &str, multi_queue: bool) -> io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let fd = rustix::fs::open(TUN_PATH, flags, Mode::empty())?;
    let mut r = IfReq::new(device)?;
    let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    if multi_queue {
        flags |= libc::IFF_MULTI_QUEUE;
    }
    r.set_flags(flags as u16);
    // SAFETY: TUNSETIFF reads and writes one `struct ifreq`.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETIFF as _, &mut r) })?;
    set_vnet_hdr_len(fd.as_fd(), super::frame_io::VNET_BYTES)?;
    Ok(fd)
}

/// Length of the header in front of each packet, in bytes (TUNSETVNETHDRSZ).
///
/// # Errors
/// `EINVAL` shorter than 10, `EBADFD` not attached.
pub fn set_vnet_hdr_len(fd: BorrowedFd<'_>, bytes: usize) -> io::Result<()> {
    let mut n = bytes as c_int;
    // SAFETY: reads one int.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETVNETHDRSZ as _, &mut n) })?;
    Ok(())
}

/// What the reader takes: `TUN_F_*` (TUNSETOFFLOAD).
///
/// # Errors
/// `EINVAL` the kernel does not know a bit, `EBADFD` not attached.
pub fn set_offloads(fd: BorrowedFd<'_>, offloads: u32) -> io::Result<()> {
    let arg = libc::c_ulong::from(offloads);
    // SAFETY: takes a number.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETOFFLOAD as _, arg) })?;
    Ok(())
}

/// Whether the device outlives its last descriptor (TUNSETPERSIST).
///
/// # Errors
/// `EBADFD` not attached.
pub fn set_persistent(fd: BorrowedFd<'_>, on: bool) -> io::Result<()> {
    let arg = libc::c_ulong::from(on);
    // SAFETY: takes a number.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETPERSIST as _, arg) })?;
    Ok(())
}

/// The user that may attach without CAP_NET_ADMIN (TUNSETOWNER).
///
/// # Errors
/// `EINVAL` no such user in this user namespace.
pub fn set_owner(fd: BorrowedFd<'_>, uid: u32) -> io::Result<()> {
    let arg = libc::c_ulong::from(uid);
    // SAFETY: takes a number.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETOWNER as _, arg) })?;
    Ok(())
}

/// What a tun descriptor, ours or another process's, is attached to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attached {
    /// Name of the network device.
    pub device: String,
    /// Bytes of header in front of each packet; 0 if whoever opened it asked for none.
    pub vnet_hdr_len: usize,
    /// Network namespace of the device, to compare with [`super::netdev::DeviceControl::namespace`].
    pub namespace: (u64, u64),
}

/// Asks a tun descriptor (TUNGETIFF, TUNGETVNETHDRSZ, TUNGETDEVNETNS).
///
/// # Errors
/// `EBADFD` it is not attached or its device was deleted; `EPERM` without CAP_NET_ADMIN; `ENOTTY` it is no tun descriptor.
pub fn attached(fd: BorrowedFd<'_>) -> io::Result<Attached> {
    let mut r = IfReq {
        name: [0; 16],
        data: [0; 24],
    };
    // SAFETY: TUNGETIFF writes one `struct ifreq`.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNGETIFF as _, &mut r) })?;
    let mut len: c_int = 0;
    if i32::from(r.flags()) & libc::IFF_VNET_HDR != 0 {
        // SAFETY: writes one int.
        check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNGETVNETHDRSZ as _, &mut len) })?;
    }
    // SAFETY: takes no argument and returns a new descriptor.
    let ns = check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNGETDEVNETNS as _, 0) })?;
    // SAFETY: the kernel has just made it for us.
    let ns = unsafe { OwnedFd::from_raw_fd(ns) };
    Ok(Attached {
        device: r.device(),
        vnet_hdr_len: usize::try_from(len).unwrap_or(0),
        namespace: super::netdev::file_id(ns.as_fd())?,
    })
}
