//! The endpoint role: one `readv` or `writev` per frame on the character device.

use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use crate::port::offload::pieces::Pieces;
use crate::port::packet::{Health, Opened, PortError, Waiting, refused};
use crate::port::{Burst, Frame, RxErrors, RxQueue, Sent, TxQueue};
use crate::sys::netdev::DeviceControl;
use crate::sys::{frame_io, tun};

/// The queues of an endpoint, and its state.
pub struct Endpoint {
    /// One per queue asked for.
    pub rx: Vec<Box<dyn RxQueue>>,
    /// Writes each flow through one queue, so that the host's answers come back on the same.
    pub tx: Box<dyn TxQueue>,
    /// Whether it works.
    pub health: Arc<Health>,
}

/// Opens (or makes, until it is closed) a TAP whose network side is the host's, with one queue. Sets it up and takes
/// checksum, TSO and (since Linux 6.2) USO requests from the host.
///
/// # Errors
/// See [`PortError`]; `Busy` if another process has its queue.
pub fn open_endpoint(device: &str) -> Result<Opened, PortError> {
    let Endpoint { mut rx, tx, health } = open(device, 1, false)?;
    let rx = rx.swap_remove(0);
    Ok(Opened { rx, tx, health })
}

/// The same with several queues (at least 1). The device must not exist yet, or have been made with `multi_queue`.
///
/// # Errors
/// See [`PortError`].
pub fn open_endpoint_queues(device: &str, queues: u16) -> Result<Endpoint, PortError> {
    open(device, queues.max(1), true)
}

fn open(device: &str, queues: u16, multi_queue: bool) -> Result<Endpoint, PortError> {
    let err = |doing| move |e| PortError::of(doing, device, e);
    let mut fds = Vec::new();
    for _ in 0..queues {
        let fd = tun::open_tap(device, multi_queue).map_err(err("open"))?;
        fds.push(Arc::new(fd));
    }
    // Of the device, not of a queue.
    let fd = fds[0].as_fd();
    tun::set_offloads(fd, tun::OFFLOADS | tun::USO)
        .or_else(|_| tun::set_offloads(fd, tun::OFFLOADS))
        .map_err(err("set the offloads of"))?;
    let control = DeviceControl::new().map_err(err("look up"))?;
    let up = control.change_flags(device, 0, libc::IFF_UP);
    up.map_err(err("set up"))?;

    let health = Arc::new(Health::default());
    let rx = fds.iter().map(|fd| {
        let queue = EndpointRx {
            fd: Arc::clone(fd),
            waiting: Waiting::new(),
            health: Arc::clone(&health),
        };
        Box::new(queue) as Box<dyn RxQueue>
    });
    let rx = rx.collect();
    let tx = EndpointTx {
        fds,
        pieces: Pieces::default(),
        health: Arc::clone(&health),
    };
    Ok(Endpoint {
        rx,
        tx: Box::new(tx),
        health,
    })
}

/// What the host sends to the device.
struct EndpointRx {
    fd: Arc<OwnedFd>,
    waiting: Waiting,
    health: Arc<Health>,
}

impl RxQueue for EndpointRx {
    fn burst<'q>(&'q mut self, out: &mut Burst<'q>) {
        let mut n = 0;
        for buf in self.waiting.free() {
            match frame_io::read_frame(self.fd.as_fd(), buf) {
                Ok(()) => n += 1,
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => break,
                Err(e) => {
                    self.health.failed(&e);
                    break;
                }
            }
        }
        self.waiting.add(n);
        self.waiting.show(out);
    }

    fn release(&mut self, n: usize) {
        self.waiting.release(n);
    }

    /// After the device was deleted the descriptor is "readable" for ever; the caller detaches the queue when it sees
    /// [`Health::fault`].
    fn wake_fd(&self) -> Option<RawFd> {
        Some(self.fd.as_raw_fd())
    }

    fn arm(&mut self) -> bool {
        self.waiting.is_holding()
    }

    fn disarm(&mut self) {}

    fn errors(&self) -> RxErrors {
        RxErrors {
            malformed: self.waiting.malformed(),
            ..RxErrors::default()
        }
    }
}

/// What the host receives from the device.
struct EndpointTx {
    fds: Vec<Arc<OwnedFd>>,
    pieces: Pieces,
    health: Arc<Health>,
}

impl TxQueue for EndpointTx {
    fn send(&mut self, frame: &Frame<'_>) -> Sent {
        let fd = &self.fds[flow_of(frame.head()) % self.fds.len()];
        let write = |f: &Frame<'_>| frame_io::write_frame(fd.as_fd(), f);
        match self.pieces.send(frame, write) {
            Ok(_) => {
                self.health.well();
                Sent::Yes
            }
            Err(e) => refused(&e, &self.health),
        }
    }

    fn flush(&mut self) {}
}

/// A number that is the same for all frames of a flow: addresses and ports of untagged IPv4 and the like, folded. The
/// kernel remembers through which queue a flow came and sends its answers there.
fn flow_of(head: &[u8]) -> usize {
    let tail = head.get(26..38).unwrap_or(head);
    let sum = tail
        .iter()
        .fold(0u32, |h, b| (h ^ u32::from(*b)).wrapping_mul(0x0100_0193));
    (sum >> 16) as usize
}
