//! Packet sockets (`packet(7)`) with virtio-net headers: `recvmmsg(2)` into our own buffers, `sendmsg(2)` straight from
//! the sender's memory.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::net::{AddressFamily, Protocol, SocketFlags, SocketType};

use super::check;
use super::frame_io::{FrameBuf, Gather, VNET_BYTES, VlanTag};
use crate::port::{BURST, Frame};

/// `linux/if_packet.h`: `tp_vlan_tpid` is valid.
const TP_STATUS_VLAN_TPID_VALID: u32 = 1 << 6;

/// What a packet socket is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// Everything that the device receives; nothing that it sends.
    Receive {
        /// Wanted size of the kernel's buffer in bytes. The kernel doubles it and counts its own overhead in it.
        buffer_bytes: usize,
        /// Also what is addressed to other stations.
        promiscuous: bool,
    },
    /// Sending only; receives nothing.
    Send {
        /// Past the queueing discipline, straight to the driver (PACKET_QDISC_BYPASS): a frame that the driver drops is
        /// an `ENOBUFS`, and one that needs segmentation that the device lacks is dropped with it too.
        bypass_qdisc: bool,
    },
}

/// A non-blocking packet socket on one device.
#[derive(Debug)]
pub struct PacketSocket {
    fd: OwnedFd,
}

/// From PACKET_STATISTICS since the last time it was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PacketStats {
    /// Frames that did not fit the kernel's buffer.
    pub dropped: u32,
}

impl PacketSocket {
    /// Opens and binds it in the calling thread's network namespace.
    ///
    /// # Errors
    /// `EPERM` without CAP_NET_RAW (and CAP_NET_ADMIN for a big buffer), `ENODEV` no such device.
    pub fn open(ifindex: u32, direction: Direction) -> io::Result<PacketSocket> {
        // Without a protocol it receives nothing before it is bound, so no frame of another device gets in.
        let fd = rustix::net::socket_with(
            AddressFamily::PACKET,
            SocketType::RAW,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None::<Protocol>,
        )?;
        let s = PacketSocket { fd };
        s.set(libc::SOL_PACKET, libc::PACKET_VNET_HDR, &1i32)?;
        let protocol = match direction {
            Direction::Receive {
                buffer_bytes,
                promiscuous,
            } => {
                let bytes = i32::try_from(buffer_bytes).unwrap_or(i32::MAX);
                s.set(libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, &bytes)?;
                s.set(libc::SOL_PACKET, libc::PACKET_IGNORE_OUTGOING, &1i32)?;
                s.set(libc::SOL_PACKET, libc::PACKET_AUXDATA, &1i32)?;
                if promiscuous {
                    let m = libc::packet_mreq {
                        mr_ifindex: ifindex as i32,
                        mr_type: libc::PACKET_MR_PROMISC as u16,
                        mr_alen: 0,
                        mr_address: [0; 8],
                    };
                    s.set(libc::SOL_PACKET, libc::PACKET_ADD_MEMBERSHIP, &m)?;
                }
                libc::ETH_P_ALL as u16
            }
            Direction::Send { bypass_qdisc } => {
                let on = i32::from(bypass_qdisc);
                s.set(libc::SOL_PACKET, libc::PACKET_QDISC_BYPASS, &on)?;
                0
            }
        };
        s.bind(ifindex, protocol)?;
        Ok(s)
    }

    /// One that receives, which an earlier run of the switch has opened.
    ///
    /// # Errors
    /// If it is of another device, as one that was made anew under its name, or is no such socket.
    pub fn adopt(fd: OwnedFd, ifindex: u32) -> io::Result<PacketSocket> {
        // SAFETY: a plain struct; all zeroes is a valid value.
        let mut addr: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        let mut len = size_of_val(&addr) as libc::socklen_t;
        // SAFETY: `addr` is a `sockaddr_ll` of the length given.
        check(unsafe { libc::getsockname(fd.as_raw_fd(), (&raw mut addr).cast(), &raw mut len) })?;
        let is_ours = addr.sll_family == libc::AF_PACKET as u16
            && addr.sll_ifindex == ifindex as i32
            && addr.sll_protocol == (libc::ETH_P_ALL as u16).to_be();
        match is_ours {
            true => Ok(PacketSocket { fd }),
            false => Err(io::ErrorKind::NotFound.into()),
        }
    }

    fn bind(&self, ifindex: u32, protocol: u16) -> io::Result<()> {
        // SAFETY: a plain struct; all zeroes is a valid value.
        let mut addr: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        addr.sll_family = libc::AF_PACKET as u16;
        addr.sll_protocol = protocol.to_be();
        addr.sll_ifindex = ifindex as i32;
        // SAFETY: `addr` is a `sockaddr_ll` of the length given.
        check(unsafe {
            libc::bind(
                self.fd.as_raw_fd(),
                (&raw const addr).cast(),
                size_of_val(&addr) as libc::socklen_t,
            )
        })?;
        Ok(())
    }

    fn set<T: Copy>(&self, level: i32, option: i32, value: &T) -> io::Result<()> {
        // SAFETY: the kernel reads `size_of::<T>()` bytes from `value`; the callers above pass int and `packet_mreq`,
        // which have no padding that matters.
        check(unsafe {
            libc::setsockopt(
                self.fd.as_raw_fd(),
                level,
                option,
                std::ptr::from_ref(value).cast(),
                size_of::<T>() as libc::socklen_t,
            )
        })?;
        Ok(())
    }

    /// Counters since the last call (PACKET_STATISTICS clears them).
    ///
    /// # Errors
    /// Of `getsockopt(2)`.
    pub fn stats(&self) -> io::Result<PacketStats> {
        let mut st = libc::tpacket_stats {
            tp_packets: 0,
            tp_drops: 0,
        };
        let mut len = size_of_val(&st) as libc::socklen_t;
        // SAFETY: the kernel writes at most `len` bytes into `st`, a plain struct.
        check(unsafe {
            libc::getsockopt(
                self.fd.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_STATISTICS,
                (&raw mut st).cast(),
                &mut len,
            )
        })?;
        Ok(PacketStats {
            dropped: st.tp_drops,
        })
    }

    /// Sends one frame with its header: all of it or nothing.
    ///
    /// # Errors
    /// `EAGAIN`, `ENOBUFS` no room (or, past the qdisc, dropped by the driver); `EMSGSIZE` longer than the MTU;
    /// `ENETDOWN`, `ENXIO`, `ENODEV` the device is down or gone; `EINVAL` a header that the kernel refuses; `EFAULT`
    /// the sender took its memory away.
    pub fn send(&self, frame: &Frame<'_>) -> io::Result<()> {
        let mut g = Gather::of(frame);
        // SAFETY: a plain struct; all zeroes is a valid value.
        let mut msg: libc::msghdr = unsafe { std::mem::zeroed() };
        msg.msg_iov = g.as_mut_ptr();
        msg.msg_iovlen = g.used as _;
        // SAFETY: `msg` points to `used` valid pieces: the header and the head lie in `frame`, the others are mapped
        // and readable while it is borrowed (`Seg`'s contract). The kernel only reads them.
        let n = unsafe { libc::sendmsg(self.fd.as_raw_fd(), &msg, libc::MSG_DONTWAIT) };
        if n < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Receives up to [`BURST`] waiting frames into `bufs`, and returns how many.
    ///
    /// # Errors
    /// `EAGAIN` none waits; `ENETDOWN` the device went down (reported once).
    pub fn receive(&self, bufs: &mut [FrameBuf]) -> io::Result<usize> {
        let want = bufs.len().min(BURST);
        let mut iov = [const { MaybeUninit::<[libc::iovec; 2]>::uninit() }; BURST];
        let mut control = [const { MaybeUninit::<Control>::uninit() }; BURST];
        let mut msgs = [const { MaybeUninit::<libc::mmsghdr>::zeroed() }; BURST];
        for (i, b) in bufs[..want].iter_mut().enumerate() {
            let (vnet, frame) = b.parts();
            let pieces = iov[i].write([
                libc::iovec {
                    iov_base: vnet.as_mut_ptr().cast(),
                    iov_len: VNET_BYTES,
                },
                libc::iovec {
                    iov_base: frame.as_mut_ptr().cast(),
                    iov_len: frame.len(),
                },
            ]);
            // SAFETY: all zeroes is a valid `mmsghdr`.
            let m = unsafe { msgs[i].assume_init_mut() };
            m.msg_hdr.msg_iov = pieces.as_mut_ptr();
            m.msg_hdr.msg_iovlen = 2;
            m.msg_hdr.msg_control = control[i].as_mut_ptr().cast();
            m.msg_hdr.msg_controllen = size_of::<Control>() as _;
        }
        // SAFETY: the first `want` headers are initialised; their pieces point into `bufs`, their control space into
        // `control`, with true lengths; all outlive the call.
        let got = check(unsafe {
            libc::recvmmsg(
                self.fd.as_raw_fd(),
                msgs.as_mut_ptr().cast(),
                want as libc::c_uint,
                libc::MSG_DONTWAIT as _,
                std::ptr::null_mut(),
            )
        })? as usize;
        for (b, m) in bufs.iter_mut().zip(&msgs).take(got) {
            // SAFETY: initialised above.
            let m = unsafe { m.assume_init_ref() };
            let whole = m.msg_hdr.msg_flags & libc::MSG_TRUNC == 0;
            b.filled(m.msg_len as usize, whole, vlan_tag(&m.msg_hdr));
        }
        Ok(got)
    }
}

impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Space for one control message with `tpacket_auxdata`.
#[repr(C, align(8))]
struct Control([u8; CONTROL_BYTES]);
// CMSG_SPACE(sizeof(struct tpacket_auxdata)): a header of 16 bytes and 20 bytes, rounded up.
const CONTROL_BYTES: usize = 40;

/// The tag that the kernel took off, from the auxiliary data of a received message.
fn vlan_tag(msg: &libc::msghdr) -> Option<VlanTag> {
    // SAFETY: the kernel has filled in `msg`, and its control space is alive.
    let c = unsafe { libc::CMSG_FIRSTHDR(msg).as_ref() }?;
    let len = size_of::<libc::tpacket_auxdata>();
    // SAFETY: only computes a length.
    let whole = c.cmsg_len as usize >= unsafe { libc::CMSG_LEN(len as u32) } as usize;
    if (c.cmsg_level, c.cmsg_type) != (libc::SOL_PACKET, libc::PACKET_AUXDATA) || !whole {
        return None;
    }
    // SAFETY: the message holds a whole `tpacket_auxdata` (just checked), a plain struct.
    let aux: libc::tpacket_auxdata = unsafe {
        libc::CMSG_DATA(c)
            .cast::<libc::tpacket_auxdata>()
            .read_unaligned()
    };
    if aux.tp_status & libc::TP_STATUS_VLAN_VALID == 0 {
        return None;
    }
    let tpid = if aux.tp_status & TP_STATUS_VLAN_TPID_VALID != 0 {
        aux.tp_vlan_tpid
    } else {
        0x8100
    };
    Some(VlanTag {
        tpid,
        tci: aux.tp_vlan_tci,
    })
}
