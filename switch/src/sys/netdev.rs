//! Settings of network devices by `ioctl(2)`, as `netdevice(7)` and `linux/ethtool.h` describe them. Each call looks the
//! device up by name in the calling thread's network namespace, or in that of the socket where one is passed.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::net::{AddressFamily, SocketFlags, SocketType};

use super::{IfReq, check};

// linux/sockios.h and linux/ethtool.h; libc lacks them.
const SIOCGIFFLAGS: u64 = 0x8913;
const SIOCSIFFLAGS: u64 = 0x8914;
const SIOCGIFMTU: u64 = 0x8921;
const SIOCSIFMTU: u64 = 0x8922;
const SIOCSIFTXQLEN: u64 = 0x8943;
const SIOCETHTOOL: u64 = 0x8946;
const SIOCGSKNS: u64 = 0x894c;
const ETHTOOL_GDRVINFO: u32 = 0x03;
const ETHTOOL_GLINK: u32 = 0x0a;
const ETHTOOL_GTSO: u32 = 0x1e;

/// A socket in the calling thread's network namespace, through which devices are asked and set.
#[derive(Debug)]
pub struct DeviceControl {
    socket: OwnedFd,
}

impl DeviceControl {
    /// In the calling thread's network namespace.
    ///
    /// # Errors
    /// Of `socket(2)`.
    pub fn new() -> io::Result<DeviceControl> {
        let socket = rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::DGRAM,
            SocketFlags::CLOEXEC,
            None,
        )?;
        Ok(DeviceControl { socket })
    }

    /// The number of a device.
    ///
    /// # Errors
    /// `ENODEV` there is none.
    pub fn index(&self, device: &str) -> io::Result<u32> {
        IfReq::new(device)?;
        Ok(rustix::net::netdevice::name_to_index(&self.socket, device)?)
    }

    /// `IFF_*` flags of a device.
    ///
    /// # Errors
    /// `ENODEV` there is none.
    pub fn flags(&self, device: &str) -> io::Result<u16> {
        Ok(self.ioctl(SIOCGIFFLAGS, IfReq::new(device)?)?.flags())
    }

    /// Changes `IFF_*` flags: `clear` first, then `set`.
    ///
    /// # Errors
    /// `ENODEV`; `EPERM` without CAP_NET_ADMIN.
    pub fn change_flags(&self, device: &str, clear: i32, set: i32) -> io::Result<()> {
        let mut r = self.ioctl(SIOCGIFFLAGS, IfReq::new(device)?)?;
        // All flags that SIOCSIFFLAGS can change fit 16 bits.
        r.set_flags(r.flags() & !(clear as u16) | set as u16);
        self.ioctl(SIOCSIFFLAGS, r)?;
        Ok(())
    }

    /// MTU in bytes.
    ///
    /// # Errors
    /// `ENODEV`.
    pub fn mtu(&self, device: &str) -> io::Result<u32> {
        let mtu = self.ioctl(SIOCGIFMTU, IfReq::new(device)?)?.i32();
        Ok(u32::try_from(mtu).unwrap_or(0))
    }

    /// Sets the MTU in bytes.
    ///
    /// # Errors
    /// `EINVAL` the device cannot; `EPERM`, `ENODEV`.
    pub fn set_mtu(&self, device: &str, mtu: u32) -> io::Result<()> {
        self.set_i32(SIOCSIFMTU, device, mtu)
    }

    /// Sets the length of the transmit queue in packets. For a TAP that is what waits for the reader of the character
    /// device.
    ///
    /// # Errors
    /// `EPERM`, `ENODEV`, `ENOMEM`.
    pub fn set_tx_queue_len(&self, device: &str, packets: u32) -> io::Result<()> {
        self.set_i32(SIOCSIFTXQLEN, device, packets)
    }

    /// Whether the device has a carrier now. (`IFF_RUNNING` lags behind by up to a second; this does not.) It takes the
    /// kernel's routing lock: not for every frame.
    ///
    /// # Errors
    /// `ENODEV`.
    pub fn carrier(&self, device: &str) -> io::Result<bool> {
        let mut value = [ETHTOOL_GLINK, 0];
        self.ethtool(device, &mut value)?;
        Ok(value[1] != 0)
    }

    /// Whether the device segments TCP by itself (any of TSO over IPv4 or IPv6). Takes the kernel's routing lock.
    ///
    /// # Errors
    /// `ENODEV`.
    pub fn tso(&self, device: &str) -> io::Result<bool> {
        let mut value = [ETHTOOL_GTSO, 0];
        self.ethtool(device, &mut value)?;
        Ok(value[1] != 0)
    }

    /// Name of the driver: `tun` for TUN and TAP.
    ///
    /// # Errors
    /// `ENODEV`, `EOPNOTSUPP`.
    pub fn driver(&self, device: &str) -> io::Result<String> {
        // struct ethtool_drvinfo: cmd, then char driver[32], 196 bytes in all.
        let mut info = [0u32; 64];
        info[0] = ETHTOOL_GDRVINFO;
        self.ethtool(device, &mut info)?;
        let bytes: Vec<u8> = info[1..9].iter().flat_map(|w| w.to_ne_bytes()).collect();
        let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
        Ok(String::from_utf8_lossy(&bytes[..end]).into_owned())
    }

    /// The network namespace of this socket, as (device, inode) of its descriptor.
    ///
    /// # Errors
    /// `EPERM` without CAP_NET_ADMIN.
    pub fn namespace(&self) -> io::Result<(u64, u64)> {
        // SAFETY: SIOCGSKNS takes no argument and returns a new descriptor.
        let fd = check(unsafe { libc::ioctl(self.socket.as_raw_fd(), SIOCGSKNS as _, 0) })?;
        // SAFETY: the kernel has just made it for us.
        file_id(unsafe { OwnedFd::from_raw_fd(fd) }.as_fd())
    }

    fn set_i32(&self, request: u64, device: &str, value: u32) -> io::Result<()> {
        let mut r = IfReq::new(device)?;
        r.set_i32(i32::try_from(value).unwrap_or(i32::MAX));
        self.ioctl(request, r)?;
        Ok(())
    }

    fn ioctl(&self, request: u64, mut r: IfReq) -> io::Result<IfReq> {
        // SAFETY: the requests used here read and write one `struct ifreq`, which `IfReq` is laid out as, and follow no
        // pointer in it.
        check(unsafe { libc::ioctl(self.socket.as_raw_fd(), request as _, &mut r) })?;
        Ok(r)
    }

    /// `data` starts with the command and must be at least as long as the command's structure.
    fn ethtool(&self, device: &str, data: &mut [u32]) -> io::Result<()> {
        let mut r = IfReq::new(device)?;
        let address = data.as_mut_ptr().expose_provenance();
        r.data[..size_of::<usize>()].copy_from_slice(&address.to_ne_bytes());
        // SAFETY: SIOCETHTOOL follows the pointer at the start of the union. The callers above pass arrays of at least
        // the size of the structure of their command (8 and 196 bytes), which live until the call returns.
        check(unsafe { libc::ioctl(self.socket.as_raw_fd(), SIOCETHTOOL as _, &mut r) })?;
        Ok(())
    }
}

/// (device, inode) of an open file: two descriptors of one namespace agree in it.
///
/// # Errors
/// Of `fstat(2)`.
pub(super) fn file_id(fd: BorrowedFd<'_>) -> io::Result<(u64, u64)> {
    let stat = rustix::fs::fstat(fd)?;
    Ok((stat.st_dev, stat.st_ino))
}
