//! What control and the ports' own threads see of the data path: ports, batches of commands, counters.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use gangway_shared::config::HostConfig;
use gangway_shared::config::valid::PortKind;
use gangway_shared::id::MacAddr;

use super::crew::{Crew, NoAck, Place};
use super::fdb::Fdb;
use super::reading::Reading;
use super::seating::Seating;
use super::shelf::{Found, Shelf};
use super::stats::{Books, PortCounters};
use super::steering::Steering;
use super::worker::{Command, Order, Outcome, QueueId, Seat, seconds_since};
use crate::port::{Attach, Mark, QUEUES, RxQueue, TxQueue};

/// How a port takes part in forwarding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Mode {
    /// As configured.
    Live = 0,
    /// Its lanes are held or draining: frames for it are accepted although it may be down.
    Held = 1,
    /// Claimed by an incoming VM that has not arrived: it gets nothing.
    Standby = 2,
    /// Its VM runs elsewhere now; stragglers are still held and shipped.
    Departing = 3,
    /// Its VM runs elsewhere; it gets nothing.
    Departed = 4,
    /// Its VM has died while its lanes drained: what waits for it is dropped and counted, so that its senders do not wait with it.
    Lost = 5,
}

impl Mode {
    const ALL: [Mode; 6] = [
        Mode::Live,
        Mode::Held,
        Mode::Standby,
        Mode::Departing,
        Mode::Departed,
        Mode::Lost,
    ];

    /// For listings.
    pub fn name(self) -> &'static str {
        match self {
            Mode::Live => "up",
            Mode::Held => "held",
            Mode::Standby => "standby",
            Mode::Departing => "departing",
            Mode::Departed => "departed",
            Mode::Lost => "lost",
        }
    }
}

/// A transmit queue; `None` while there is none.
pub type Tx = Option<Box<dyn TxQueue>>;

/// Taken for a burst at most, and given back by a plain store: a locked instruction would make the worker wait until all it
/// has copied is out.
#[derive(Default)]
#[repr(align(64))]
struct TxLock(spin::mutex::SpinMutex<Tx, spin::relax::Yield>);
/// The queue, ours for now.
pub type TxGuard<'a> = spin::mutex::SpinMutexGuard<'a, Tx>;

/// A port as all workers see it.
pub struct Port {
    /// Configured name.
    pub name: String,
    /// `vhost-user`, `tap` or `uplink`.
    pub kind: &'static str,
    /// Its VM.
    pub vm: Option<String>,
    /// Configured address of the guest.
    pub mac: Option<MacAddr>,
    /// Leads out of the host.
    pub uplink: bool,
    /// See [`PortCounters`].
    pub counters: PortCounters,
    /// Departing: a frame of this VM came in from the network, so the network knows its new place.
    pub marker: AtomicBool,
    /// Who sends to it by which queue.
    pub steering: Steering,
    tx: [TxLock; QUEUES],
    /// Held while queues or workers come and go.
    changing: Mutex<()>,
    mode: AtomicU8,
    deaf: AtomicBool,
    fixed: AtomicBool,
    armed: AtomicU32,
    patient_until_s: AtomicU32,
    error: Mutex<Option<String>>,
}

/// How long after a hold the senders to its VMs wait for room instead of overflowing a backlog, in seconds. Long enough for
/// what piled up to be worked off, also by a VM that relays it; short enough that a VM which takes nothing harms nobody.
const PATIENCE_S: u32 = 10;

pub(super) fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Port {
    /// A transmit queue (the first ones of [`QUEUES`]), for the time of a burst.
    #[inline]
    pub fn tx(&self, queue: usize) -> TxGuard<'_> {
        self.tx[queue % QUEUES].0.lock()
    }

    /// Where its transmit queues are, those of which it can be known whether the guest has read them.
    pub(super) fn marks(&self) -> Vec<(usize, Mark)> {
        let mark = |q| Some((q, self.tx(q).as_mut()?.mark()?));
        (0..QUEUES).filter_map(mark).collect()
    }

    /// Whether the guest has read all up to there, or the queue has gone.
    pub(super) fn has_read(&self, queue: usize, mark: &Mark) -> bool {
        self.tx(queue).as_mut().is_none_or(|tx| tx.has_read(mark))
    }

    /// Puts another queue in its place, when no worker has a claim in it any more.
    fn exchange(&self, queue: usize, new: Tx) -> Tx {
        loop {
            let mut tx = self.tx(queue);
            let shared = tx.as_mut().and_then(|t| t.shared());
            if shared.is_none_or(|t| t.close()) {
                return std::mem::replace(&mut *tx, new);
            }
            drop(tx);
            std::thread::yield_now();
        }
    }

    /// There are so many workers now.
    pub(super) fn steer(&self, workers: usize) {
        let _one_at_a_time = lock(&self.changing);
        self.steering.resize(workers);
    }

    /// How it takes part.
    pub fn mode(&self) -> Mode {
        Mode::ALL[usize::from(self.mode.load(Ordering::Acquire)) % Mode::ALL.len()]
    }

    /// Changes it.
    pub fn set_mode(&self, m: Mode) {
        if m == Mode::Live {
            self.fixed.store(false, Ordering::Release);
        }
        self.mode.store(m as u8, Ordering::Release);
    }

    /// It has a transmit queue.
    pub fn is_up(&self) -> bool {
        self.steering.is_up()
    }

    /// False between a commit and the announcement: the source still hears the network's broadcasts for this VM.
    pub fn hears_uplink(&self) -> bool {
        !self.deaf.load(Ordering::Acquire)
    }

    /// See [`Port::hears_uplink`].
    pub fn set_hears_uplink(&self, yes: bool) {
        self.deaf.store(!yes, Ordering::Release);
    }

    /// A hold on its VM is open: should the VM stop before the freeze (a migration that converged by itself), frames for it
    /// wait in their lanes' backlogs, from where the freeze takes them.
    pub fn armed(&self) -> bool {
        self.armed.load(Ordering::Acquire) > 0
    }

    /// Its VM is stopped only for the move: what is sent to it meanwhile waits.
    pub fn awaited(&self) -> bool {
        self.armed() || self.mode() == Mode::Held
    }

    /// A hold on its VM has just ended: what piled up while it lasted comes at once, from its neighbours, too.
    pub fn be_patient(&self, now_s: u32) {
        let until = now_s.saturating_add(PATIENCE_S);
        self.patient_until_s.store(until, Ordering::Release);
    }

    /// See [`Port::be_patient`].
    pub fn is_patient(&self, now_s: u32) -> bool {
        now_s < self.patient_until_s.load(Ordering::Acquire)
    }

    /// See [`Port::armed`]. A hold that has ended may still wait for its VM when the next one is opened: they count.
    pub fn arm(&self) {
        self.armed.fetch_add(1, Ordering::AcqRel);
    }

    /// Takes one [`Port::arm`] back.
    pub fn disarm(&self) {
        self.armed.fetch_sub(1, Ordering::AcqRel);
    }

    /// True once after the port came (back) to life: its own address should be fixed in the FDB.
    pub fn fix_own_address(&self) -> bool {
        !self.fixed.load(Ordering::Relaxed) && !self.fixed.swap(true, Ordering::AcqRel)
    }

    /// Its address was seen elsewhere while it was down.
    pub fn unfix(&self) {
        self.fixed.store(false, Ordering::Release);
    }

    /// Why it is down, for people.
    pub fn error(&self) -> Option<String> {
        lock(&self.error).clone()
    }
}

/// What workers share.
pub struct Shared {
    /// In the configuration's order; a port's index is its number everywhere.
    pub ports: Vec<Arc<Port>>,
    /// Forwarding database.
    pub fdb: Fdb,
    /// What each worker has moved.
    pub books: Books,
    /// Where backlogs are that outlive this process.
    pub shelf: Option<Arc<Shelf>>,
    start: Instant,
    stop: AtomicBool,
}

impl Shared {
    /// Seconds since the engine started.
    pub fn now_s(&self) -> u32 {
        seconds_since(self.start)
    }

    /// Workers shall end.
    pub fn stopping(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

/// The workers of a switch.
pub struct Engine {
    pub(super) shared: Arc<Shared>,
    /// Taken behind `seating`, if both are.
    pub(super) crew: Mutex<Crew>,
    pub(super) seating: Mutex<Seating>,
    /// Held while workers come and go.
    pub(super) changing: Mutex<()>,
    /// What an earlier run had taken and not delivered.
    left: Mutex<Vec<Found>>,
    /// How often in a row a queue has not moved, as guests had not read.
    unread: AtomicU32,
}

/// How long a queue that moves waits until all guests have read what is in theirs.
const SOON: Duration = Duration::from_millis(20);
/// How often that is tried.
const TRIES: u32 = 50;
/// How often it is looked at.
const LOOK: Duration = Duration::from_micros(200);

/// As long as it lives, no queue changes its worker, and no port gets a worker that it did not have.
pub struct Pin {
    engine: Arc<Engine>,
}

impl Drop for Pin {
    fn drop(&mut self) {
        lock(&self.engine.seating).unpin();
    }
}

impl Pin {
    /// Who has the lanes of what comes in at a port; at least one.
    pub fn seats(&self, port: usize) -> Vec<Seat> {
        let workers = lock(&self.engine.seating).seats(port);
        workers
            .into_iter()
            .map(|worker| Seat { port, worker })
            .collect()
    }

    /// Which worker serves which queue of a port.
    pub fn served(&self, port: usize) -> Vec<(u16, usize)> {
        lock(&self.engine.seating).served(port)
    }

    /// See [`Seating::seat_again`].
    pub fn seat_again(&self, port: usize, workers: &[usize], queues: &[(u16, usize)]) {
        lock(&self.engine.seating).seat_again(port, workers, queues);
    }
}

impl Engine {
    /// Starts the workers; ports come without queues.
    pub fn start(cfg: &HostConfig) -> std::io::Result<Arc<Engine>> {
        let count = cfg.workers.count.max(1);
        let ports = cfg.ports.iter().map(|p| {
            Arc::new(Port {
                name: p.name.clone(),
                kind: match p.kind {
                    PortKind::VhostUser { .. } => "vhost-user",
                    PortKind::Tap { .. } => "tap",
                    PortKind::Uplink { .. } => "uplink",
                },
                vm: p.vm.clone(),
                mac: p.mac,
                uplink: matches!(p.kind, PortKind::Uplink { .. }),
                counters: PortCounters::default(),
                marker: AtomicBool::new(false),
                steering: Steering::new(count),
                tx: std::array::from_fn(|_| TxLock::default()),
                changing: Mutex::new(()),
                mode: AtomicU8::new(Mode::Live as u8),
                deaf: AtomicBool::new(false),
                fixed: AtomicBool::new(false),
                armed: AtomicU32::new(0),
                patient_until_s: AtomicU32::new(0),
                error: Mutex::new(None),
            })
        });
        let names = cfg.ports.iter().map(|p| p.name.clone()).collect();
        let kept = cfg.keeper_dir.as_ref().map(|d| d.join("backlog"));
        let opened = kept.map(|dir| (Shelf::open(&dir, names), dir));
        let (shelf, left) = match opened {
            Some((Ok((shelf, left)), _)) => (Some(shelf), left),
            Some((Err(e), dir)) => {
                let dir = dir.display();
                tracing::warn!("{dir}: {e}; what waits for a receiver dies with this switch");
                (None, Vec::new())
            }
            None => (None, Vec::new()),
        };
        let shared = Arc::new(Shared {
            shelf,
            books: Books::default(),
            ports: ports.collect(),
            fdb: Fdb::new(cfg.fdb_capacity, cfg.fdb_ageing_s)?,
            start: Instant::now(),
            stop: AtomicBool::new(false),
        });
        let mut crew = Crew::new(shared.clone(), cfg.flows_capacity)?;
        for n in 0..count {
            crew.join(Place {
                cpu: cfg.workers.cpus.get(n).copied(),
                poll: cfg.workers.poll,
            })?;
        }
        Ok(Arc::new(Engine {
            shared,
            crew: Mutex::new(crew),
            seating: Mutex::new(Seating::new(count)),
            changing: Mutex::new(()),
            left: Mutex::new(left),
            unread: AtomicU32::new(0),
        }))
    }

    /// Has the lanes deliver what an earlier run of the switch had taken for them, before anything newer comes in at their ports. To be
    /// called when receivers are there or awaited. Returns how many frames that are.
    ///
    /// # Errors
    /// If a worker does not answer.
    pub fn take_up(&self) -> Result<usize, NoAck> {
        let left = std::mem::take(&mut *lock(&self.left));
        let Some(shelf) = &self.shared.shelf else {
            return Ok(0);
        };
        let left = shelf.settle(left, self.workers().len());
        let frames = left.iter().map(|f| f.backlog.len()).sum();
        let mut seating = lock(&self.seating);
        let order = |f: Found| {
            for queue in f.queues {
                let id = QueueId {
                    port: f.seat.port,
                    queue,
                };
                seating.begin_at(id, f.seat.worker);
            }
            let backlog = Box::new(f.backlog);
            (f.seat.worker, Order::TakeUp(f.seat.port, f.to, backlog))
        };
        let orders = left.into_iter().map(order).collect();
        self.orders(orders)?;
        Ok(frames)
    }

    /// Ports, FDB and counters.
    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// The port of this name.
    pub fn port(&self, name: &str) -> Option<(usize, &Arc<Port>)> {
        self.shared
            .ports
            .iter()
            .enumerate()
            .find(|(_, p)| p.name == name)
    }

    /// Applies commands between two bursts of the workers that have the lanes. Every worker takes part, also one without a
    /// command: on return each has passed the cut.
    pub fn batch(&self, commands: Vec<Command>) -> Result<Outcome, NoAck> {
        let order = |c: Command| (c.worker(), Order::Lane(c));
        self.orders(commands.into_iter().map(order).collect())
    }

    /// See [`Pin`].
    pub fn pin(self: &Arc<Self>) -> Pin {
        lock(&self.seating).pin(self.shared.ports.len());
        Pin {
            engine: self.clone(),
        }
    }

    /// Gives back memory of backlogs that were not used since the last call.
    pub fn trim(&self) {
        let orders = (0..self.workers().len()).map(|n| (n, Order::Trim));
        if let Err(e) = self.orders(orders.collect()) {
            tracing::warn!("{e}");
        }
    }

    /// Evens out what ports that have gone or a hold have left: queues move to workers that have fewer, unless something that they
    /// have sent still waits, or a guest with several queues has not read what is in them (ADR-0027). True if one has moved.
    pub fn rebalance(&self) -> bool {
        let mut seating = lock(&self.seating);
        let moves = seating.moves();
        // One that reads nothing must not keep queues where they are for ever.
        let is_late = self.unread.load(Ordering::Relaxed) >= TRIES;
        let is_read = || {
            let is_read = is_late || self.is_read();
            if !is_read {
                self.unread.fetch_add(1, Ordering::Relaxed);
            }
            is_read
        };
        // While the queue is served: what nobody reads must not cost its sender a pause each time.
        if moves.is_empty() || !is_read() {
            return false;
        }
        for (id, from, to) in moves {
            let Some(queue) = self.one(from, Order::Leave(id)) else {
                continue;
            };
            // Behind this its flows take other queues of guests that have several.
            if !is_read() {
                self.one(from, Order::Attach(id, queue));
                return false;
            }
            self.unread.store(0, Ordering::Relaxed);
            seating.moved(id, to);
            self.one(to, Order::Attach(id, queue));
            let port = &self.shared.ports[id.port].name;
            tracing::info!(
                "queue {} of port {port} moves from worker {from} to {to}",
                id.queue
            );
            return true;
        }
        false
    }

    /// Whether all guests with several queues read what is in them now within [`SOON`].
    fn is_read(&self) -> bool {
        let begin = Instant::now();
        let wide = self.shared.ports.iter().filter(|p| p.steering.is_wide());
        let mut waits: Vec<(&Arc<Port>, Reading)> = wide.map(|p| (p, Reading::default())).collect();
        loop {
            let now = Instant::now();
            waits.retain_mut(|(port, reading)| {
                reading.begin(now, || port.marks());
                !reading.is_over(now, |q, mark| port.has_read(q, mark))
            });
            if waits.is_empty() || begin.elapsed() >= SOON {
                return waits.is_empty();
            }
            std::thread::sleep(LOOK);
        }
    }

    pub(super) fn orders(&self, orders: Vec<(usize, Order)>) -> Result<Outcome, NoAck> {
        let waits = lock(&self.crew).orders(orders)?;
        waits.wait()
    }

    /// Ends the workers and lets go of all queues.
    pub fn stop(&self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        lock(&self.crew).stop();
    }

    fn one(&self, worker: usize, order: Order) -> Option<Box<dyn RxQueue>> {
        match self.orders(vec![(worker, order)]) {
            Ok(mut out) => out.queues.pop(),
            Err(e) => {
                tracing::error!("{e}");
                None
            }
        }
    }
}

impl Attach for Engine {
    fn attach_rx(&self, port: usize, queue: u16, rx: Box<dyn RxQueue>) -> Option<Box<dyn RxQueue>> {
        let id = QueueId { port, queue };
        let mut seating = lock(&self.seating);
        let worker = seating.place(id);
        self.one(worker, Order::Attach(id, rx))
    }

    fn detach_rx(&self, port: usize, queue: u16) -> Option<Box<dyn RxQueue>> {
        let id = QueueId { port, queue };
        let mut seating = lock(&self.seating);
        let worker = seating.leave(id)?;
        self.one(worker, Order::Detach(id))
    }

    fn set_tx(&self, port: usize, queues: Vec<(u16, Box<dyn TxQueue>)>) {
        let p = &self.shared.ports[port];
        let _one_at_a_time = lock(&p.changing);
        let mut on = Vec::new();
        for (queue, tx) in queues {
            let queue = usize::from(queue) % QUEUES;
            drop(p.exchange(queue, Some(tx)));
            on.push(queue);
        }
        p.steering.change(on, []);
    }

    fn clear_tx(&self, port: usize, queue: u16) {
        let p = &self.shared.ports[port];
        let queue = usize::from(queue) % QUEUES;
        let _one_at_a_time = lock(&p.changing);
        // First: who then finds the place empty asks again.
        p.steering.change([], [queue]);
        drop(p.exchange(queue, None));
    }

    fn port_error(&self, port: usize, error: Option<String>) {
        let p = &self.shared.ports[port];
        if let Some(e) = &error {
            tracing::warn!("port {}: {e}", p.name);
        }
        *lock(&p.error) = error;
    }
}
