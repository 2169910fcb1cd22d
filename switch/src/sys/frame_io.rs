//! A frame behind its virtio-net header, as one scatter-gather call: `readv(2)`/`writev(2)` on a tun descriptor,
//! `recvmmsg(2)`/`sendmsg(2)` on a packet socket.
//!
//! Invariant: memory that a guest writes too is only ever read by the kernel's own copy; if the guest took it away, the
//! call fails with `EFAULT` and nothing is harmed.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::port::{FRAME_MAX, FRAME_MIN, Frame, SEGS, VnetHdr};

/// Bytes of a virtio-net header without `num_buffers` (`struct virtio_net_hdr`).
pub const VNET_BYTES: usize = 10;
/// Space in front of a received frame for a VLAN tag that the kernel took off.
const TAG_BYTES: usize = 4;
/// An odd number of cache lines over the longest frame, so that neighbouring buffers start in different sets.
const BUF_BYTES: usize = 64 * 1029;
const _: () = assert!(BUF_BYTES > TAG_BYTES + FRAME_MAX);

/// A VLAN tag that the kernel took off a frame and reports beside it (`packet(7)`, PACKET_AUXDATA).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VlanTag {
    /// Tag protocol identifier: 0x8100 or 0x88a8.
    pub tpid: u16,
    /// Priority, DEI and VLAN number (IEEE 802.1Q, 9.6).
    pub tci: u16,
}

/// A buffer of our own for one received frame, and the frame in it.
#[derive(Debug)]
pub struct FrameBuf {
    pub(super) vnet: [u8; VNET_BYTES],
    buf: Box<[u8]>,
    start: usize,
    len: usize,
}

impl Default for FrameBuf {
    fn default() -> FrameBuf {
        FrameBuf {
            vnet: [0; VNET_BYTES],
            buf: vec![0; BUF_BYTES].into_boxed_slice(),
            start: TAG_BYTES,
            len: 0,
        }
    }
}

impl FrameBuf {
    /// The offload request that came with the frame.
    pub fn vnet(&self) -> VnetHdr {
        VnetHdr(self.vnet)
    }

    /// The frame; empty if nothing was received.
    pub fn bytes(&self) -> &[u8] {
        &self.buf[self.start..self.start + self.len]
    }

    /// Whether this is a frame at all, by its length and by a checksum that lies inside it.
    pub fn well_formed(&self) -> bool {
        let v = self.vnet();
        let csum_ok = v.flags() & VnetHdr::F_NEEDS_CSUM == 0
            || usize::from(v.csum_start()) + usize::from(v.csum_offset()) + 2 <= self.len;
        (FRAME_MIN..=FRAME_MAX).contains(&self.len) && csum_ok
    }

    /// The header and the frame's space, for the kernel to write.
    pub(super) fn parts(&mut self) -> (&mut [u8; VNET_BYTES], &mut [u8]) {
        (&mut self.vnet, &mut self.buf[TAG_BYTES..])
    }

    /// Notes what the kernel wrote: `bytes` with the header. What is no frame gets length 0.
    pub(super) fn filled(&mut self, bytes: usize, whole: bool, tag: Option<VlanTag>) {
        self.start = TAG_BYTES;
        self.len = if whole {
            bytes.saturating_sub(VNET_BYTES)
        } else {
            0
        };
        if let Some(tag) = tag {
            self.insert(tag);
        }
    }

    /// Puts the tag back between the source address and the type. Offsets in the virtio-net header count from the
    /// frame's start and move with it.
    fn insert(&mut self, tag: VlanTag) {
        if self.len < FRAME_MIN {
            return;
        }
        self.buf.copy_within(TAG_BYTES..TAG_BYTES + 12, 0);
        self.buf[12..14].copy_from_slice(&tag.tpid.to_be_bytes());
        self.buf[14..16].copy_from_slice(&tag.tci.to_be_bytes());
        self.start = 0;
        self.len += TAG_BYTES;
        let v = self.vnet();
        let moved = |at: u16| at.saturating_add(TAG_BYTES as u16).to_le_bytes();
        if v.flags() & VnetHdr::F_NEEDS_CSUM != 0 {
            self.vnet[6..8].copy_from_slice(&moved(v.csum_start()));
        }
        if v.gso_type() != 0 {
            let hdr_len = u16::from_le_bytes([self.vnet[2], self.vnet[3]]);
            self.vnet[2..4].copy_from_slice(&moved(hdr_len));
        }
    }
}

/// The pieces of a frame to send: header, private head, and what lies in the sender's memory.
pub(super) struct Gather {
    iov: [libc::iovec; SEGS + 2],
    pub(super) used: usize,
}

impl Gather {
    /// Valid as long as `frame` is borrowed.
    pub(super) fn of(frame: &Frame<'_>) -> Gather {
        let none = libc::iovec {
            iov_base: std::ptr::null_mut(),
            iov_len: 0,
        };
        let mut g = Gather {
            iov: [none; SEGS + 2],
            used: 0,
        };
        g.push(frame.vnet.0.as_ptr(), VNET_BYTES);
        g.push(frame.head().as_ptr(), frame.head().len());
        for s in frame.rest() {
            g.push(s.as_ptr(), s.len());
        }
        g
    }

    fn push(&mut self, ptr: *const u8, len: usize) {
        self.iov[self.used] = libc::iovec {
            iov_base: ptr.cast_mut().cast(),
            iov_len: len,
        };
        self.used += 1;
    }

    pub(super) fn as_mut_ptr(&mut self) -> *mut libc::iovec {
        self.iov.as_mut_ptr()
    }
}

/// Writes one frame with its header to a tun descriptor, which takes all of it or nothing.
///
/// # Errors
/// Of `writev(2)`; `EAGAIN` no room, `EIO` the device is down, `EBADFD` it was deleted, `EINVAL` a header that the
/// kernel refuses.
pub fn write_frame(fd: BorrowedFd<'_>, frame: &Frame<'_>) -> io::Result<()> {
    let mut g = Gather::of(frame);
    // SAFETY: `g` holds `used` valid pieces: the header and the head lie in `frame`, the others are mapped and readable
    // while it is borrowed (`Seg`'s contract). The kernel only reads them.
    let n = unsafe { libc::writev(fd.as_raw_fd(), g.as_mut_ptr(), g.used as libc::c_int) };
    if n < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Reads one frame with its header from a tun descriptor into `buf`.
///
/// # Errors
/// Of `readv(2)`; `EAGAIN` nothing waits, `EBADFD` the device was deleted.
pub fn read_frame(fd: BorrowedFd<'_>, buf: &mut FrameBuf) -> io::Result<()> {
    let (vnet, frame) = buf.parts();
    let n = rustix::io::readv(fd, &mut [IoSliceMut::new(vnet), IoSliceMut::new(frame)])?;
    buf.filled(n, true, None);
    Ok(())
}

/// Reads one packet from a tun descriptor that belongs to another process, without ever waiting, whatever that process
/// chose (`RWF_NOWAIT` of `preadv2(2)`; tun supports it since Linux 5.11). Returns its length in bytes.
///
/// # Errors
/// Of `preadv2(2)`; `EAGAIN` nothing waits, `EOPNOTSUPP` an old kernel.
pub fn read_nowait(fd: BorrowedFd<'_>, buf: &mut [u8]) -> io::Result<usize> {
    let flags = rustix::io::ReadWriteFlags::NOWAIT;
    let n = rustix::io::preadv2(fd, &mut [IoSliceMut::new(buf)], u64::MAX, flags)?;
    Ok(n)
}

/// Writes the pieces to a tun descriptor, for tests and for putting frames back.
///
/// # Errors
/// Of `writev(2)`.
pub fn write_parts(fd: BorrowedFd<'_>, vnet: &VnetHdr, frame: &[u8]) -> io::Result<()> {
    rustix::io::writev(fd, &[IoSlice::new(&vnet.0), IoSlice::new(frame)])?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn buf_with(frame: &[u8]) -> FrameBuf {
        let mut b = FrameBuf::default();
        b.parts().1[..frame.len()].copy_from_slice(frame);
        b
    }

    #[test]
    fn a_tag_goes_back_behind_the_addresses_and_offsets_move_with_it() {
        let frame: Vec<u8> = (0..60).collect();
        let mut b = buf_with(&frame);
        b.vnet = [1, 1, 54, 0, 0, 0, 34, 0, 16, 0];
        let tag = VlanTag {
            tpid: 0x8100,
            tci: 0x2064,
        };
        b.filled(frame.len() + VNET_BYTES, true, Some(tag));
        let mut want = frame[..12].to_vec();
        want.extend([0x81, 0x00, 0x20, 0x64]);
        want.extend(&frame[12..]);
        assert_eq!(b.bytes(), want);
        assert_eq!(b.vnet.as_slice(), [1, 1, 58, 0, 0, 0, 38, 0, 16, 0]);
    }

    #[test]
    fn runts_cut_frames_and_wild_checksums_are_not_well_formed() {
        let mut b = buf_with(&[7; 60]);
        b.filled(VNET_BYTES + 13, true, None);
        assert!(!b.well_formed());
        b.filled(VNET_BYTES + 60, false, None);
        assert!(!b.well_formed());
        b.filled(VNET_BYTES + 60, true, None);
        assert!(b.well_formed());
        b.vnet = [1, 0, 0, 0, 0, 0, 50, 0, 9, 0];
        assert!(!b.well_formed());
    }
}
