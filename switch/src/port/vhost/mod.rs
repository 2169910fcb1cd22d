//! vhost-user ports: a guest's rings, served in its own memory. QEMU is the front-end, we are the back-end
//! (<https://qemu-project.gitlab.io/qemu/interop/vhost-user.html>).
//!
//! - `conn`: the socket, for ever (dial or listen, again after each disconnect); a thread per port
//! - `early`: a request that the `vhost` crate refuses though it must not
//! - [`session`]: one connection's requests; decides which rings run and attaches them
//! - [`live`]: what changes under a running ring (memory, log, call) without stopping it
//! - [`rx`], [`tx`]: the loops, which a worker runs; [`ring`]: the layout they run on
//! - [`dirty`]: the log for live migration
//! - [`position`]: how far a ring was, for the next run of the switch
//! - `watchdog`: gets a worker out of a descriptor that a front-end has made blocking
//!
//! Invariant: nothing here waits for a guest, and nothing a guest writes makes the data path panic, log or run long.
//! Invariant: a chain is given back to the guest only when its frame is safe, so a crash or a migration finds all others
//! in guest memory.

use std::fs::File;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use super::{Attach, QUEUES};

pub mod claim;
mod conn;
pub mod dirty;
mod early;
pub mod features;
pub mod given;
pub mod live;
pub mod position;
pub mod ring;
pub mod rx;
pub mod session;
pub mod tx;
mod watchdog;

#[cfg(test)]
mod tests;

/// A vhost-user port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VhostConfig {
    /// For the log.
    pub name: String,
    /// The port's number for [`Attach`].
    pub slot: usize,
    /// The control socket.
    pub socket: PathBuf,
    /// We listen and QEMU dials (`reconnect=1`); otherwise QEMU listens.
    pub server: bool,
    /// Where the rings' positions are kept for the next run of the switch, if the connection outlives this one.
    pub positions: Option<PathBuf>,
}

/// What a port's guest and front-end are up to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VhostState {
    /// A front-end is there.
    pub connected: bool,
    /// Connections so far.
    pub connections: u64,
    /// We take frames from the guest.
    pub rx_running: bool,
    /// We give frames to the guest.
    pub tx_running: bool,
    /// Virtio features that the guest accepted.
    pub features: u64,
    /// `VHOST_F_LOG_ALL`: a migration is on.
    pub logging: bool,
    /// Rings that broke.
    pub broken: u64,
    /// Starts of a ring that took up what an earlier back-end had left unfinished.
    pub resumed: u64,
    /// Frames taken from the guest since the ring's start.
    pub rx_frames: u64,
    /// Frames given to the guest since the ring's start.
    pub tx_frames: u64,
    /// Chains from the guest that were no frames since the ring's start.
    pub malformed: u64,
    /// Why the last connection ended or failed.
    pub last_error: Option<String>,
}

/// What the port's handle, its thread and its session share.
pub struct Shared {
    name: String,
    slot: usize,
    positions: Option<PathBuf>,
    attach: Arc<dyn Attach>,
    /// Wakes the thread: to stop, or for a broken ring.
    alarm: Arc<File>,
    stop: AtomicBool,
    stream: Mutex<Option<UnixStream>>,
    state: Mutex<VhostState>,
    controls: Mutex<[Option<Arc<live::Control>>; 2 * QUEUES]>,
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn new(
        name: &str,
        slot: usize,
        positions: Option<PathBuf>,
        attach: Arc<dyn Attach>,
    ) -> std::io::Result<Arc<Shared>> {
        use rustix::event::{EventfdFlags, eventfd};
        let alarm = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Arc::new(Shared {
            name: name.to_owned(),
            slot,
            positions,
            attach,
            alarm: Arc::new(File::from(alarm)),
            stop: AtomicBool::new(false),
            stream: Mutex::new(None),
            state: Mutex::default(),
            controls: Mutex::default(),
        }))
    }

    fn state<T>(&self, f: impl FnOnce(&mut VhostState) -> T) -> T {
        f(&mut lock(&self.state))
    }

    fn set_control(&self, ring: usize, control: Option<Arc<live::Control>>) {
        lock(&self.controls)[ring] = control;
    }

    fn is_stopping(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// Keeps a handle on the connection, so that [`VhostPort::stop`] can end a request that hangs.
    fn set_stream(&self, stream: Option<UnixStream>) {
        *lock(&self.stream) = stream;
        if self.is_stopping() {
            self.hang_up();
        }
    }

    fn hang_up(&self) {
        if let Some(s) = &*lock(&self.stream) {
            let _ = s.shutdown(Shutdown::Both);
        }
    }
}

/// A running port.
pub struct VhostPort {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// Serves the port's control socket in a thread of its own until it is stopped.
///
/// # Errors
/// If the kernel gives no eventfd or thread.
pub fn spawn(cfg: VhostConfig, attach: Arc<dyn Attach>) -> std::io::Result<VhostPort> {
    let shared = Shared::new(&cfg.name, cfg.slot, cfg.positions.clone(), attach)?;
    let thread = std::thread::Builder::new()
        .name(format!("vhost-{}", cfg.name))
        .spawn({
            let shared = shared.clone();
            move || conn::serve(&cfg, &shared)
        })?;
    Ok(VhostPort {
        shared,
        thread: Some(thread),
    })
}

/// Serves one connection in the caller's thread, until the front-end hangs up or breaks the protocol. The reason why it
/// ended, if the front-end did not just hang up.
///
/// # Errors
/// If the kernel gives no eventfd.
pub fn serve_one(
    stream: UnixStream,
    slot: usize,
    attach: Arc<dyn Attach>,
) -> std::io::Result<Option<String>> {
    let shared = Shared::new("one", slot, None, attach)?;
    conn::session(stream, &shared);
    Ok(shared.state(|s| s.last_error.take()))
}

impl VhostPort {
    /// Detaches the queues, hangs up and ends the thread.
    pub fn stop(self) {
        drop(self);
    }

    /// What is going on.
    pub fn state(&self) -> VhostState {
        let mut s = self.shared.state(|s| s.clone());
        let controls = lock(&self.shared.controls);
        for (ring, c) in controls.iter().enumerate() {
            let Some(c) = c else { continue };
            let frames = c.counters.frames.load(Ordering::Relaxed);
            if ring % 2 == 1 {
                s.rx_running = true;
                s.rx_frames += frames;
                s.malformed += c.counters.malformed.load(Ordering::Relaxed);
            } else {
                s.tx_running = true;
                s.tx_frames += frames;
            }
        }
        s
    }
}

impl Drop for VhostPort {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        live::signal(&self.shared.alarm);
        self.shared.hang_up();
        if let Some(t) = self.thread.take() {
            let _ = t.join();
        }
    }
}
