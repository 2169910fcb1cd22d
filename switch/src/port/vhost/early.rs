//! The one request that the `vhost` crate refuses although QEMU is right to send it: SET_VRING_ENABLE before
//! SET_FEATURES.
//!
//! The crate takes SET_VRING_ENABLE for allowed only once SET_FEATURES has acknowledged the protocol features. QEMU's
//! network device enables its rings first (`vhost_net_start` restores their state), each time that it starts. So we look
//! at the next request's header without taking it, and serve this one ourselves.

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use rustix::net::{RecvFlags, recv};
use vhost::vhost_user::VhostUserBackendReqHandlerMut;

use super::session::Session;

const SET_VRING_ENABLE: u32 = 18;
const HEADER: usize = 12;
const REQUEST: usize = HEADER + 8;
// "Header": version in bits 0 and 1, reply in bit 2, need_reply in bit 3.
const VERSION_AND_REPLY: u32 = 0b111;
const VERSION: u32 = 0b001;
const IS_REPLY: u32 = 0b100;
const NEED_REPLY: u32 = 0b1000;

fn word(bytes: &[u8], i: usize) -> u32 {
    let mut w = [0; 4];
    w.copy_from_slice(&bytes[4 * i..4 * i + 4]);
    u32::from_ne_bytes(w)
}

/// Serves the waiting request if it is that one. True if it was.
///
/// # Errors
/// If the socket breaks, or the request is malformed.
pub fn serve(mut socket: &UnixStream, session: &mut Session) -> io::Result<bool> {
    if session.has_features() {
        return Ok(false);
    }
    let mut header = [0; HEADER];
    let (_, n) = recv(socket.as_fd(), &mut header[..], RecvFlags::PEEK)?;
    let flags = word(&header, 1);
    let is_it = word(&header, 0) == SET_VRING_ENABLE && flags & VERSION_AND_REPLY == VERSION;
    if n < HEADER || !is_it || word(&header, 2) as usize != REQUEST - HEADER {
        return Ok(false);
    }
    let mut request = [0; REQUEST];
    socket.read_exact(&mut request)?;
    let (index, enable) = (word(&request, 3), word(&request, 4));
    let done = match enable {
        0 | 1 => session.set_vring_enable(index, enable == 1),
        _ => return Err(io::ErrorKind::InvalidData.into()),
    };
    if flags & NEED_REPLY != 0 {
        let words = [
            SET_VRING_ENABLE,
            VERSION | IS_REPLY,
            8,
            u32::from(done.is_err()),
            0,
        ];
        let reply: Vec<u8> = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
        socket.write_all(&reply)?;
    }
    done.map_err(io::Error::other)?;
    Ok(true)
}
