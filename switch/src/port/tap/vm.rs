//! The VM role's device and its control: make it, see who reads it, wait for it, read it back, delete it.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::reader::Reader;
use super::taken::{self, Back, Taken, Whole};
use super::tx::{CREDIT, VmTapTx};
use crate::port::kept::Kept;
use crate::port::offload::pieces::Pieces;
use crate::port::packet::{Health, Opened, PacketRx, PortError};
use crate::port::{Frame, VnetHdr};
use crate::sys::netdev::DeviceControl;
use crate::sys::packet::{Direction, PacketSocket};
use crate::sys::tun;
use std::os::fd::AsFd;

/// Packets that wait for the VM at most before the driver refuses more.
pub(super) const QUEUE_LEN: u32 = 4096;
/// Between two looks whether the queue has drained.
const LOOK_EVERY: Duration = Duration::from_micros(50);

/// Why a request to a VM's TAP failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TapError {
    /// The device could not be made or opened.
    #[error(transparent)]
    Port(#[from] PortError),
    /// A device of that name exists and is no TAP (operator).
    #[error("{device} is a {driver} device, not a TAP; give the VM another name for its TAP")]
    NoTap {
        /// As configured.
        device: String,
        /// The driver it belongs to.
        driver: String,
    },
    /// The process does not read this TAP (caller, or QEMU has not opened it yet).
    #[error(
        "process {pid} does not have {device} open; is it the VM's QEMU, and was it started with ifname={device}?"
    )]
    NotTheReader {
        /// Who was asked.
        pid: u32,
        /// As configured.
        device: String,
    },
    /// Nothing was adopted (caller).
    #[error("no reader of {device} was adopted; its queue can be neither seen nor read back")]
    NoReader {
        /// As configured.
        device: String,
    },
    /// A VM still has the device (operator).
    #[error("process {pid} still has {device} open; stop the VM first")]
    InUse {
        /// The reader that was adopted, 0 if none was.
        pid: u32,
        /// As configured.
        device: String,
    },
    /// The host refused.
    #[error(
        "cannot {doing} (reader of {device}: process {pid}); the switch needs CAP_NET_ADMIN and CAP_SYS_PTRACE"
    )]
    Host {
        /// What was tried.
        doing: &'static str,
        /// As configured.
        device: String,
        /// The reader, 0 if none.
        pid: u32,
        /// What the kernel said.
        source: io::Error,
    },
}

/// A TAP whose character device a VM's QEMU holds (`-netdev tap,ifname=DEVICE,script=no,downscript=no`).
pub struct VmTap {
    device: String,
    ifindex: u32,
    created: AtomicBool,
    control: DeviceControl,
    reader: Mutex<Option<Reader>>,
    /// See [`Taken`]; and whether there is one, for the data path. Who locks both locks this before the reader.
    taken: Mutex<Option<Taken>>,
    remembers: AtomicBool,
    health: Arc<Health>,
}

impl fmt::Debug for VmTap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VmTap")
            .field("device", &self.device)
            .field("ifindex", &self.ifindex)
            .finish_non_exhaustive()
    }
}

impl VmTap {
    /// Makes the persistent TAP, or takes one that exists (also one that a QEMU holds), and sets it up for the VM alone:
    /// the host's own stack neither answers nor sends on it.
    ///
    /// # Errors
    /// We may not, or the name belongs to another kind of device.
    pub fn create(device: &str) -> Result<Arc<VmTap>, TapError> {
        VmTap::create_owned(device, None)
    }

    /// The same, for a QEMU that runs as user `owner` without CAP_NET_ADMIN.
    ///
    /// # Errors
    /// As [`VmTap::create`].
    pub fn create_owned(device: &str, owner: Option<u32>) -> Result<Arc<VmTap>, TapError> {
        let err = |doing| move |e| TapError::Port(PortError::of(doing, device, e));
        let control = DeviceControl::new().map_err(err("look up"))?;
        let exists = control.index(device).is_ok();
        if exists {
            let driver = control.driver(device).map_err(err("look up"))?;
            if driver != "tun" {
                let device = device.to_owned();
                return Err(TapError::NoTap { device, driver });
            }
        }
        match tun::open_tap(device, false) {
            Ok(fd) => {
                tun::set_persistent(fd.as_fd(), true).map_err(err("keep"))?;
                if let Some(uid) = owner {
                    tun::set_owner(fd.as_fd(), uid).map_err(err("set the owner of"))?;
                }
            }
            // A VM has it already.
            Err(e) if exists && e.raw_os_error() == Some(libc::EBUSY) => {}
            // It was made with several queues, which we leave as they are.
            Err(e) if exists && e.raw_os_error() == Some(libc::EINVAL) => {}
            Err(e) => return Err(err("make")(e)),
        }
        let ifindex = control.index(device).map_err(err("look up"))?;
        control
            .set_tx_queue_len(device, QUEUE_LEN)
            .map_err(err("set the queue length of"))?;
        keep_the_host_out(device);
        control
            .change_flags(device, 0, libc::IFF_NOARP | libc::IFF_UP)
            .map_err(err("set up"))?;
        Ok(Arc::new(VmTap {
            device: device.to_owned(),
            ifindex,
            created: AtomicBool::new(!exists),
            control,
            reader: Mutex::new(None),
            taken: Mutex::new(None),
            remembers: AtomicBool::new(false),
            health: Arc::default(),
        }))
    }

    /// The queues for the engine. May be called again after the old ones were detached.
    ///
    /// # Errors
    /// The device is gone, or we may not.
    pub fn queues(self: &Arc<Self>, kept: &Kept) -> Result<Opened, PortError> {
        let err = |doing| move |e| PortError::of(doing, &self.device, e);
        let health = Arc::clone(&self.health);
        let rx = PacketRx::open(&self.device, self.ifindex, false, kept, health);
        let rx = rx.map_err(err("receive from"))?;
        let open = |bypass_qdisc| {
            PacketSocket::open(self.ifindex, Direction::Send { bypass_qdisc })
                .map_err(err("send to"))
        };
        let tx = VmTapTx {
            tap: Arc::clone(self),
            direct: open(true)?,
            segmenting: open(false)?,
            pieces: Pieces::default(),
            health: Arc::clone(&self.health),
            credit: 0,
            down_until: None,
            segment_until: None,
        };
        Ok(Opened {
            rx: Box::new(rx),
            tx: Box::new(tx),
            health: Arc::clone(&self.health),
        })
    }

    /// The device's name.
    pub fn device(&self) -> &str {
        &self.device
    }

    /// Whether it works; the same as its queues'.
    pub fn health(&self) -> &Arc<Health> {
        &self.health
    }

    /// Whether [`VmTap::create`] made the device. A restarted switch finds what its predecessor made: see
    /// [`VmTap::claim`].
    pub fn created(&self) -> bool {
        self.created.load(Ordering::Relaxed)
    }

    /// Says that a predecessor of ours made the device, so that [`VmTap::delete`] removes it.
    pub fn claim(&self) {
        self.created.store(true, Ordering::Relaxed);
    }

    /// Sets the device's MTU in bytes (without the Ethernet header).
    ///
    /// # Errors
    /// The device cannot.
    pub fn set_mtu(&self, mtu_bytes: u32) -> Result<(), PortError> {
        let set = self.control.set_mtu(&self.device, mtu_bytes);
        set.map_err(|e| PortError::of("set the MTU of", &self.device, e))
    }

    /// Whether a process has the character device open now.
    ///
    /// # Errors
    /// `ENODEV` the device was deleted.
    pub fn carrier(&self) -> io::Result<bool> {
        self.control.carrier(&self.device)
    }

    /// Duplicates the descriptors by which process `qemu_pid` reads this TAP. Call it when the VM's QMP is connected
    /// (the number comes from [`crate::sys::peer_pid`], or from libvirt's pid file), and again for each new QEMU. `user` says
    /// who does: the last one has it.
    ///
    /// # Errors
    /// It is not this TAP's reader, or we lack CAP_SYS_PTRACE.
    pub fn adopt(&self, qemu_pid: u32, user: u64) -> Result<(), TapError> {
        let found = Reader::find(qemu_pid, &self.device, &self.control, user)
            .map_err(|e| self.host("find and duplicate the TAP's descriptor", qemu_pid, e))?;
        let reader = found.ok_or_else(|| TapError::NotTheReader {
            pid: qemu_pid,
            device: self.device.clone(),
        })?;
        *self.reader() = Some(reader);
        Ok(())
    }

    /// Gives the duplicates back, so that QEMU's exit really closes the device. Call it before a VM is ended on purpose,
    /// and after [`VmTap::read_back`] when it ended by itself.
    pub fn release_dup(&self) {
        *self.reader() = None;
    }

    /// Whether nothing waits for the VM in the kernel's queue; `None` if no reader was adopted.
    pub fn queue_empty(&self) -> Option<bool> {
        self.reader().as_ref().map(Reader::queue_empty)
    }

    /// Whether the adopted reader has ended (false if none was adopted).
    pub fn reader_exited(&self) -> bool {
        self.reader().as_ref().is_some_and(Reader::exited)
    }

    /// From now on what is sent is remembered, until [`VmTap::forget`] or the end of [`VmTap::take_back`]: a VM may stop unasked. Not
    /// with several queues, of which nobody knows the order.
    pub fn remember(&self) {
        let fresh = Taken::new();
        let mut taken = self.taken();
        let one = self.reader().as_ref().is_none_or(Reader::has_one_queue);
        *taken = one.then_some(fresh);
        self.remembers.store(one, Ordering::Relaxed);
    }

    /// It cannot any more, or everything is known to be with the guest.
    pub fn forget(&self) {
        self.remembers.store(false, Ordering::Relaxed);
        *self.taken() = None;
    }

    /// As [`VmTap::forget`] and [`VmTap::release_dup`], if `user` was the last to adopt.
    pub fn let_go(&self, user: u64) {
        let mut taken = self.taken();
        let mut reader = self.reader();
        if reader.as_ref().is_some_and(|r| r.user == user) {
            self.remembers.store(false, Ordering::Relaxed);
            (*taken, *reader) = (None, None);
        }
    }

    /// Nothing is sent any more: two frames that nobody receives go behind what was, once, unless nothing is remembered. If the queue
    /// runs empty ([`VmTap::wait_empty`]) then, the guest has everything; otherwise see [`VmTap::take_back`].
    ///
    /// # Errors
    /// The driver does not take them: the queue's end proves nothing then.
    pub fn mark(&self) -> io::Result<()> {
        let mut guard = self.taken();
        let Some(taken) = guard.as_mut().filter(|t| !t.is_marked()) else {
            return Ok(());
        };
        let bypass_qdisc = true;
        let socket = PacketSocket::open(self.ifindex, Direction::Send { bypass_qdisc })?;
        for _ in 0..2 {
            socket.send(&taken::mark())?;
            taken.add(&taken::mark());
        }
        taken.cut();
        Ok(())
    }

    /// The next that belongs to a VM that stands still and has not received it, oldest first: what the kernel's queue still
    /// holds, and before it (or in it) what QEMU has taken and perhaps not given to the guest. None at the end; then nothing is
    /// remembered any more. What was read and not returned, because of an error, comes with the next call.
    ///
    /// # Errors
    /// As [`VmTap::read_back`].
    pub fn take_back(&self) -> Result<Option<Back>, TapError> {
        self.remembers.store(false, Ordering::Relaxed);
        let mut guard = self.taken();
        let Some(taken) = guard.as_mut() else {
            let queued = self.read_back(1)?.pop();
            return Ok(queued.map(|w| Back {
                queued: Some(w),
                ..Back::default()
            }));
        };
        while taken.ahead.len() < 2 {
            match self.read_back(1)?.pop() {
                Some(whole) => taken.ahead.push_back(whole),
                None => break,
            }
        }
        let is_end = taken.ahead.is_empty();
        let back = taken.next();
        if is_end {
            *guard = None;
        }
        Ok((!is_end || back != Back::default()).then_some(back))
    }

    pub(super) fn remembers(&self) -> bool {
        self.remembers.load(Ordering::Relaxed)
    }

    pub(super) fn has_sent(&self, frame: &Frame<'_>) {
        if self.remembers()
            && let Some(taken) = self.taken().as_mut()
        {
            taken.add(frame);
        }
    }

    pub(super) fn forget_sent(&self) {
        if let Some(taken) = self.taken().as_mut() {
            taken.forget();
        }
    }

    fn taken(&self) -> MutexGuard<'_, Option<Taken>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the VM has taken everything; false when the time is over or there is no reader. With the lanes to the
    /// VM frozen, and [`VmTap::mark`] done, this is the moment to stop it.
    pub fn wait_empty(&self, timeout: Duration) -> bool {
        let end = Instant::now() + timeout;
        loop {
            match self.queue_empty() {
                Some(true) => return true,
                None => return false,
                Some(false) if Instant::now() >= end => return false,
                Some(false) => std::thread::sleep(LOOK_EVERY),
            }
        }
    }

    /// Takes back what the queue of a paused (or ended) VM still holds, oldest first, at most `max` frames: the caller
    /// has room for so many. On a running VM it would steal from it: the caller knows that the VM stands still. What
    /// QEMU had read and the guest not received stays behind in QEMU: see [`VmTap::take_back`].
    ///
    /// # Errors
    /// No reader was adopted, or the device was deleted.
    pub fn read_back(&self, max: usize) -> Result<Vec<Whole>, TapError> {
        let guard = self.reader();
        let reader = guard.as_ref().ok_or_else(|| TapError::NoReader {
            device: self.device.clone(),
        })?;
        let read = reader.read_back(max);
        read.map_err(|e| self.host("read back the TAP's queue", reader.pid, e))
    }

    /// Removes the device if [`VmTap::create`] made it (or it was claimed): at once, or, if the adopted QEMU still has it
    /// and ends later, then. Gives the duplicates back. A device that is gone already is fine.
    ///
    /// # Errors
    /// `InUse` if a process that was not adopted has it.
    pub fn delete(&self) -> Result<(), TapError> {
        if !self.created() {
            self.release_dup();
            return Ok(());
        }
        // With the lock held, so that nobody adopts in between.
        let mut guard = self.reader();
        let pid = guard.as_ref().map_or(0, |r| r.pid);
        if let Some(reader) = guard.take() {
            match reader.set_persistent(false) {
                Err(e) if e.raw_os_error() != Some(libc::EBADFD) => {
                    return Err(self.host("let the TAP go", pid, e));
                }
                Ok(()) | Err(_) => return Ok(()),
            }
        }
        if self.control.index(&self.device).ok() != Some(self.ifindex) {
            return Ok(());
        }
        match tun::open_tap(&self.device, false).and_then(|fd| {
            // The device goes when `fd` does.
            tun::set_persistent(fd.as_fd(), false)
        }) {
            Ok(()) => Ok(()),
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => Err(TapError::InUse {
                pid,
                device: self.device.clone(),
            }),
            Err(e) => Err(PortError::of("delete", &self.device, e).into()),
        }
    }

    /// Whether the kernel hands a segmentation request to the reader as it is, as far as that can be asked.
    pub(super) fn segments_itself(&self, vnet: VnetHdr, len: u32) -> bool {
        const GSO_TCPV4: u8 = 1;
        let plain = vnet.gso_type() == GSO_TCPV4
            && vnet.flags() & VnetHdr::F_NEEDS_CSUM != 0
            && len < 65_536;
        plain && self.control.tso(&self.device).unwrap_or(false)
    }

    fn reader(&self) -> MutexGuard<'_, Option<Reader>> {
        // A panic elsewhere cannot leave an `Option` half written.
        self.reader.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn host(&self, doing: &'static str, pid: u32, source: io::Error) -> TapError {
        TapError::Host {
            doing,
            device: self.device.clone(),
            pid,
            source,
        }
    }
}

const _: () = assert!(CREDIT + 2048 < QUEUE_LEN);

/// The network side is a device of the host, whose own stack also sees what the VM sends. It must not take part: no
/// IPv6 (which would announce itself), no ARP answers (with NOARP), no IPv4 packet from the VM taken as one to the host
/// (strict reverse path: there is no route to this device). Documentation/networking/ip-sysctl.rst.
fn keep_the_host_out(device: &str) {
    for (family, key, value) in [
        ("ipv6", "disable_ipv6", "1"),
        ("ipv4", "arp_ignore", "8"),
        ("ipv4", "rp_filter", "1"),
        ("ipv4", "forwarding", "0"),
    ] {
        let path = format!("/proc/sys/net/{family}/conf/{device}/{key}");
        match std::fs::write(&path, value) {
            Ok(()) => {}
            // A host without that protocol.
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => tracing::warn!(
                "the host may answer on {device}: cannot set {path}: {e}; set it by hand"
            ),
        }
    }
}
