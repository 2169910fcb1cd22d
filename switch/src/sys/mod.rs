//! Unsafe island: system calls that no library of ours offers, wrapped in safe functions. Each wrapper does one call and
//! says in its documentation which page of the manual or of the kernel's documentation it follows.
//!
//! Invariant: every function here is safe to call with any argument; a wrong one is an `io::Error`.
//! Invariant: no policy. What to do about an error is decided in `port`.
#![allow(unsafe_code)]

pub mod frame_io;
pub mod interrupt;
pub mod netdev;
pub mod packet;
pub mod poll;
pub mod process;
pub mod spawn;
pub mod tun;

pub use frame_io::FrameBuf;
pub use poll::{Poller, drain_event, is_eventfd, signal_event};
pub use process::{Affinity, affinity, barrier_everywhere, eventfd, peer_pid, pin_thread};

use std::io;

/// Turns the C convention (-1 and `errno`) into a `Result`.
fn check(ret: libc::c_int) -> io::Result<libc::c_int> {
    if ret < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(ret)
    }
}

/// `IFNAMSIZ` of `linux/if.h`: bytes of a device's name with its final zero.
const NAME_BYTES: usize = 16;

/// `struct ifreq` of `netdevice(7)`: a device's name and a union, here as plain bytes in native order.
#[repr(C, align(8))]
struct IfReq {
    name: [u8; NAME_BYTES],
    data: [u8; 24],
}

impl IfReq {
    /// For a device, whose name must be one that the kernel's `dev_valid_name` takes.
    fn new(device: &str) -> io::Result<IfReq> {
        let bad = device.is_empty()
            || device.len() >= NAME_BYTES
            || matches!(device, "." | "..")
            || device
                .bytes()
                .any(|b| matches!(b, b'/' | b':' | b'%' | 0) || b.is_ascii_whitespace());
        if bad {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let mut name = [0; NAME_BYTES];
        name[..device.len()].copy_from_slice(device.as_bytes());
        Ok(IfReq {
            name,
            data: [0; 24],
        })
    }

    fn set_i32(&mut self, v: i32) {
        self.data[..4].copy_from_slice(&v.to_ne_bytes());
    }

    fn i32(&self) -> i32 {
        i32::from_ne_bytes([self.data[0], self.data[1], self.data[2], self.data[3]])
    }

    fn set_flags(&mut self, v: u16) {
        self.data[..2].copy_from_slice(&v.to_ne_bytes());
    }

    fn flags(&self) -> u16 {
        u16::from_ne_bytes([self.data[0], self.data[1]])
    }

    fn device(&self) -> String {
        let end = self.name.iter().position(|b| *b == 0).unwrap_or(NAME_BYTES);
        String::from_utf8_lossy(&self.name[..end]).into_owned()
    }
}
