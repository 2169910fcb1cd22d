//! Socket options that std does not offer.
#![allow(unsafe_code)]

use std::net::{TcpStream, UdpSocket};
use std::os::fd::AsRawFd;

/// Room for ten seconds of a flow that comes back all at once (after `kill -9` of the coordinator in the pause, a hold lasts
/// six): what a guest's own socket drops is no loss of the network. A small datagram takes more than 2 KiB of it.
const RECEIVE_BYTES: usize = 16 << 20;

/// A UDP socket with a large receive buffer.
pub fn roomy(socket: &UdpSocket) {
    // Root only; what the system's limit allows otherwise.
    if rustix::net::sockopt::set_socket_recv_buffer_size_force(socket, RECEIVE_BYTES).is_err() {
        let _ = rustix::net::sockopt::set_socket_recv_buffer_size(socket, RECEIVE_BYTES);
    }
}

/// Segments that the kernel sent again on this connection.
pub fn retransmits(stream: &TcpStream) -> u64 {
    // SAFETY: tcp_info is plain numbers, for which all zeroes is a value.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut length = size_of::<libc::tcp_info>() as libc::socklen_t;
    // SAFETY: the descriptor is open as long as `stream` is borrowed; the kernel writes at most `length` bytes into
    // `info`, which is that large.
    let result = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut info).cast(),
            &mut length,
        )
    };
    if result == 0 {
        u64::from(info.tcpi_total_retrans)
    } else {
        0
    }
}
