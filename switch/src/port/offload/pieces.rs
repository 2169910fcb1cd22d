//! Bursts of datagrams for a kernel that does not know them (Linux before 6.2): it says `EINVAL`, and gets them one by one.

use std::io;

use super::cut::Cut;
use super::gso;
use crate::port::{Frame, VnetHdr};

/// Pieces of a frame at most: as many as Linux makes of one (`UDP_MAX_SEGMENTS`).
const PIECES_MAX: usize = 128;

/// Memory for it; none until it is needed.
#[derive(Debug, Default)]
pub struct Pieces {
    whole: Vec<u8>,
    piece: Vec<u8>,
}

impl Pieces {
    /// Hands a frame to the kernel by `call`, in pieces if it must be; returns in how many. What the kernel refuses behind
    /// the first piece is an `EINVAL`: a frame that has gone in part is lost, and not to be tried again.
    ///
    /// # Errors
    /// Of `call`.
    pub fn send(
        &mut self,
        frame: &Frame<'_>,
        mut call: impl FnMut(&Frame<'_>) -> io::Result<()>,
    ) -> io::Result<u32> {
        match call(frame) {
            Ok(()) => Ok(1),
            Err(e) if frame.vnet.gso_type() == gso::UDP_L4 && is_invalid(&e) => {
                self.cut(frame, call)
            }
            Err(e) => Err(e),
        }
    }

    /// The same, in pieces in any case.
    ///
    /// # Errors
    /// Of `call`.
    #[cold]
    pub fn cut(
        &mut self,
        frame: &Frame<'_>,
        mut call: impl FnMut(&Frame<'_>) -> io::Result<()>,
    ) -> io::Result<u32> {
        let invalid = || io::Error::from_raw_os_error(libc::EINVAL);
        self.whole.resize(frame.len as usize, 0);
        frame.copy_to(&mut self.whole);
        let mut cut = Cut::new(frame.vnet, &self.whole).ok_or_else(invalid)?;
        if cut.lengths().len() > PIECES_MAX {
            return Err(invalid());
        }
        let mut done = 0;
        while let Some((front, payload)) = cut.next_frame() {
            self.piece.clear();
            self.piece.extend_from_slice(front);
            self.piece.extend_from_slice(payload);
            let sent = call(&Frame::from_slice(VnetHdr::default(), &self.piece));
            match sent {
                Ok(()) => done += 1,
                Err(e) if done == 0 => return Err(e),
                Err(_) => return Err(invalid()),
            }
        }
        Ok(done)
    }
}

fn is_invalid(e: &io::Error) -> bool {
    e.raw_os_error() == Some(libc::EINVAL)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn burst(payload: usize, size: u16) -> (VnetHdr, Vec<u8>) {
        let mut f = vec![2; 12];
        f.extend([
            8, 0, 0x45, 0, 0, 0, 0, 1, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
        ]);
        f.extend([0, 9, 0, 9, 0, 0, 0, 0]);
        f.extend((0..payload).map(|n| n as u8));
        let [lo, hi] = size.to_le_bytes();
        (VnetHdr([1, gso::UDP_L4, 42, 0, lo, hi, 34, 0, 6, 0]), f)
    }

    /// A kernel that knows no such bursts, and after `room` frames has none for more.
    fn old(room: usize, got: &mut Vec<Vec<u8>>) -> impl FnMut(&Frame<'_>) -> io::Result<()> {
        move |f| {
            if f.vnet.gso_type() == gso::UDP_L4 {
                return Err(io::Error::from_raw_os_error(libc::EINVAL));
            }
            if got.len() == room {
                return Err(io::Error::from_raw_os_error(libc::EAGAIN));
            }
            assert_eq!(f.vnet, VnetHdr::default());
            got.push(f.head().to_vec());
            Ok(())
        }
    }

    #[test]
    fn a_kernel_that_knows_no_bursts_of_datagrams_gets_them_one_by_one() {
        let (vnet, f) = burst(2500, 1000);
        let mut got = Vec::new();
        let sent = Pieces::default().send(&Frame::from_slice(vnet, &f), old(9, &mut got));
        assert_eq!(sent.unwrap(), 3);
        let lengths: Vec<usize> = got.iter().map(Vec::len).collect();
        assert_eq!(lengths, [1042, 1042, 542]);
        let payload: Vec<u8> = got.iter().flat_map(|f| f[42..].to_vec()).collect();
        assert_eq!(payload, f[42..]);
    }

    #[test]
    fn what_cannot_go_as_a_whole_is_tried_again_only_if_nothing_of_it_went() {
        let (vnet, f) = burst(2500, 1000);
        for (room, error) in [(0, libc::EAGAIN), (1, libc::EINVAL), (2, libc::EINVAL)] {
            let mut got = Vec::new();
            let sent = Pieces::default().send(&Frame::from_slice(vnet, &f), old(room, &mut got));
            assert_eq!(sent.unwrap_err().raw_os_error(), Some(error));
            assert_eq!(got.len(), room);
        }
        let (vnet, f) = burst(2500, 1);
        let mut got = Vec::new();
        let sent = Pieces::default().send(&Frame::from_slice(vnet, &f), old(9, &mut got));
        assert_eq!(sent.unwrap_err().raw_os_error(), Some(libc::EINVAL));
        assert!(got.is_empty(), "too many pieces");
        // Other refusals are the caller's.
        let (mut vnet, f) = burst(2500, 1000);
        vnet.0[1] = gso::TCPV4;
        let full = |_: &Frame<'_>| Err(io::Error::from_raw_os_error(libc::EINVAL));
        assert!(
            Pieces::default()
                .send(&Frame::from_slice(vnet, &f), full)
                .is_err()
        );
    }
}
