//! A port on the network side of a device, through AF_PACKET with virtio-net headers: an uplink to a NIC or veth, and the
//! switch's end of a VM's TAP ([`super::tap::VmTap`]). Checksum and segmentation requests pass in both directions.
//!
//! Sending is one `sendmsg` per frame, gathered from the sender's memory: the kernel makes the one copy and says at once
//! what became of the frame, so there is no queue here in which an accepted frame could be lost, and `flush` has nothing
//! to do. Receiving is one `recvmmsg` per burst into our own buffers.
//!
//! Invariant: `Sent::Yes` means that the kernel has taken the frame; any other answer, that it has not.
//! Invariant: nothing here waits.

use std::cell::Cell;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::{Duration, Instant};

use super::kept::Kept;
use super::offload::pieces::Pieces;
use super::{BURST, Burst, Frame, NeverReason, RxErrors, RxQueue, Sent, TxQueue};
use crate::sys::FrameBuf;
use crate::sys::netdev::DeviceControl;
use crate::sys::packet::{Direction, PacketSocket};

/// What we ask for as the kernel's receive buffer, in bytes. It doubles it; about 40,000 small frames fit.
const RX_BUFFER_BYTES: usize = 16 << 20;
/// How often the kernel's counters are asked at most.
const STATS_EVERY: Duration = Duration::from_millis(10);

/// Why a port could not be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PortError {
    /// The operator named a device that is not there.
    #[error(
        "there is no network device {device} here; check the name (`ip link`) and the network namespace"
    )]
    NoDevice {
        /// As configured.
        device: String,
    },
    /// We lack a right.
    #[error("not allowed to {doing} {device}; the switch needs CAP_NET_ADMIN and CAP_NET_RAW")]
    NotAllowed {
        /// What was tried.
        doing: &'static str,
        /// As configured.
        device: String,
    },
    /// Another process holds it.
    #[error("another process has {device} open; stop it, or give the port another device")]
    Busy {
        /// As configured.
        device: String,
    },
    /// The host refused for another reason.
    #[error("cannot {doing} {device}")]
    Host {
        /// What was tried.
        doing: &'static str,
        /// As configured.
        device: String,
        /// What the kernel said.
        source: io::Error,
    },
}

impl PortError {
    /// Sorts an error of the kernel by whose fault it is.
    pub(crate) fn of(doing: &'static str, device: &str, source: io::Error) -> PortError {
        let device = device.to_owned();
        match source.raw_os_error() {
            Some(libc::ENODEV | libc::ENXIO) => PortError::NoDevice { device },
            Some(libc::EPERM | libc::EACCES) => PortError::NotAllowed { doing, device },
            Some(libc::EBUSY) => PortError::Busy { device },
            _ => PortError::Host {
                doing,
                device,
                source,
            },
        }
    }
}

/// Why a port that was opened does not work now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Somebody set the device down; it works again after `ip link set DEVICE up`.
    Down,
    /// The device was deleted; the port has to be opened again.
    Gone,
    /// The TAP's character device has no reader: the VM is not running.
    NoReader,
    /// The kernel failed otherwise: the value of `errno`.
    Errno(i32),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::Down => {
                f.write_str("the device is down; set it up with `ip link set DEVICE up`")
            }
            Fault::Gone => f.write_str("the device was deleted; make it again and reload"),
            Fault::NoReader => f.write_str("no VM has the TAP open"),
            Fault::Errno(e) => write!(f, "the host: {}", io::Error::from_raw_os_error(*e)),
        }
    }
}

/// Whether a port works, shared by its queues (which set it) and its control side (which asks, to call
/// [`super::Attach::port_error`]). It recovers by itself when frames flow again.
#[derive(Debug, Default)]
pub struct Health {
    /// 0 well, -1 no reader, otherwise `errno`.
    code: AtomicI32,
}

impl Health {
    /// The fault that the last call met, or `None`.
    pub fn fault(&self) -> Option<Fault> {
        match self.code.load(Ordering::Relaxed) {
            0 => None,
            -1 => Some(Fault::NoReader),
            libc::ENETDOWN | libc::EIO => Some(Fault::Down),
            libc::ENXIO | libc::ENODEV | libc::EBADFD => Some(Fault::Gone),
            e => Some(Fault::Errno(e)),
        }
    }

    pub(super) fn well(&self) {
        // A load first: the line stays shared among the workers while all is well.
        if self.code.load(Ordering::Relaxed) != 0 {
            self.code.store(0, Ordering::Relaxed);
        }
    }

    pub(super) fn failed(&self, e: &io::Error) {
        self.code
            .store(e.raw_os_error().unwrap_or(libc::EIO), Ordering::Relaxed);
    }

    pub(super) fn no_reader(&self) {
        self.code.store(-1, Ordering::Relaxed);
    }
}

/// What became of a frame that the kernel refused with `e`.
pub(super) fn refused(e: &io::Error, health: &Health) -> Sent {
    match e.raw_os_error() {
        Some(libc::EAGAIN | libc::ENOBUFS | libc::ENOMEM | libc::EINTR) => Sent::Full,
        Some(libc::ENETDOWN | libc::ENXIO | libc::ENODEV | libc::EIO | libc::EBADFD) => {
            health.failed(e);
            Sent::Down
        }
        Some(libc::EMSGSIZE) => Sent::Never(NeverReason::TooLong),
        _ => Sent::Never(NeverReason::Refused),
    }
}

/// Received frames that are not released yet, in order, in front of the free buffers.
#[derive(Debug)]
pub(super) struct Waiting {
    bufs: Vec<FrameBuf>,
    filled: usize,
    malformed: u64,
}

impl Waiting {
    pub(super) fn new() -> Waiting {
        Waiting {
            bufs: (0..BURST).map(|_| FrameBuf::default()).collect(),
            filled: 0,
            malformed: 0,
        }
    }

    pub(super) fn free(&mut self) -> &mut [FrameBuf] {
        &mut self.bufs[self.filled..]
    }

    /// Takes in the first `n` free buffers, which were just filled; what is no frame stays free.
    pub(super) fn add(&mut self, n: usize) {
        for i in self.filled..self.filled + n {
            if self.bufs[i].well_formed() {
                self.bufs.swap(self.filled, i);
                self.filled += 1;
            } else {
                self.malformed += 1;
            }
        }
    }

    pub(super) fn show<'q>(&'q self, out: &mut Burst<'q>) {
        for b in &self.bufs[..self.filled] {
            out.push(Frame::from_slice(b.vnet(), b.bytes()));
        }
    }

    pub(super) fn release(&mut self, n: usize) {
        let n = n.min(self.filled);
        if n < self.filled {
            self.bufs[..self.filled].rotate_left(n);
        }
        self.filled -= n;
    }

    pub(super) fn is_holding(&self) -> bool {
        self.filled > 0
    }

    pub(super) fn malformed(&self) -> u64 {
        self.malformed
    }
}

/// The receiving side.
#[derive(Debug)]
pub struct PacketRx {
    socket: PacketSocket,
    waiting: Waiting,
    health: Arc<Health>,
    overrun: Cell<(u64, Option<Instant>)>,
}

impl PacketRx {
    /// On a device by number and name; `promiscuous` for an uplink. Goes on where an earlier run of the switch ended, if its socket is kept.
    pub(super) fn open(
        device: &str,
        ifindex: u32,
        promiscuous: bool,
        kept: &Kept,
        health: Arc<Health>,
    ) -> io::Result<PacketRx> {
        let direction = Direction::Receive {
            buffer_bytes: RX_BUFFER_BYTES,
            promiscuous,
        };
        Ok(PacketRx {
            socket: kept.socket(device, ifindex, direction)?,
            waiting: Waiting::new(),
            health,
            overrun: Cell::new((0, None)),
        })
    }
}

impl RxQueue for PacketRx {
    fn burst<'q>(&'q mut self, out: &mut Burst<'q>) {
        if !self.waiting.free().is_empty() {
            match self.socket.receive(self.waiting.free()) {
                Ok(n) => {
                    self.waiting.add(n);
                    self.health.well();
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => self.health.failed(&e),
            }
        }
        self.waiting.show(out);
    }

    fn release(&mut self, n: usize) {
        self.waiting.release(n);
    }

    fn wake_fd(&self) -> Option<RawFd> {
        Some(self.socket.as_fd().as_raw_fd())
    }

    fn arm(&mut self) -> bool {
        // The socket is level-triggered: what comes after this wakes us. What was given and not released does not.
        self.waiting.is_holding()
    }

    fn disarm(&mut self) {}

    fn errors(&self) -> RxErrors {
        let (mut overrun, last) = self.overrun.get();
        if last.is_none_or(|t| t.elapsed() >= STATS_EVERY) {
            overrun += self.socket.stats().map_or(0, |s| u64::from(s.dropped));
            self.overrun.set((overrun, Some(Instant::now())));
        }
        RxErrors {
            malformed: self.waiting.malformed(),
            ring_broken: 0,
            overrun,
        }
    }
}

/// The sending side of an uplink: through the device's queueing discipline, which shapes as the operator configured it
/// and segments what the device cannot.
#[derive(Debug)]
pub struct PacketTx {
    socket: PacketSocket,
    pieces: Pieces,
    health: Arc<Health>,
}

impl TxQueue for PacketTx {
    fn send(&mut self, frame: &Frame<'_>) -> Sent {
        match self.pieces.send(frame, |f| self.socket.send(f)) {
            Ok(_) => {
                self.health.well();
                Sent::Yes
            }
            Err(e) => refused(&e, &self.health),
        }
    }

    fn flush(&mut self) {}
}

/// The queues of a port with one receive queue, and its state.
pub struct Opened {
    /// For [`super::Attach::attach_rx`].
    pub rx: Box<dyn RxQueue>,
    /// For [`super::Attach::set_tx`].
    pub tx: Box<dyn TxQueue>,
    /// Whether it works.
    pub health: Arc<Health>,
}

/// Opens an uplink on a device of the calling thread's network namespace, promiscuously. The device must be up by the
/// time frames flow; its MTU and offloads are the operator's.
///
/// # Errors
/// The device is not there or we may not; see [`PortError`].
pub fn open(device: &str, kept: &Kept) -> Result<Opened, PortError> {
    let err = |doing| move |e| PortError::of(doing, device, e);
    let control = DeviceControl::new().map_err(err("look up"))?;
    let ifindex = control.index(device).map_err(err("look up"))?;
    let health = Arc::new(Health::default());
    let rx = PacketRx::open(device, ifindex, true, kept, Arc::clone(&health));
    let rx = rx.map_err(err("receive from"))?;
    let direction = Direction::Send {
        bypass_qdisc: false,
    };
    let socket = PacketSocket::open(ifindex, direction).map_err(err("send to"))?;
    let tx = PacketTx {
        socket,
        pieces: Pieces::default(),
        health: Arc::clone(&health),
    };
    Ok(Opened {
        rx: Box::new(rx),
        tx: Box::new(tx),
        health,
    })
}
