//! The worker threads: who is there, how they are told what to do, how they come and go while frames flow.
//!
//! Workers are numbered from 0 without gaps. One joins with nothing to do. One leaves only when it has no queue, and no lane
//! of it holds anything or a frame back ([`Order::Retire`]): what it counted stays.
//!
//! [`Engine::set_workers`] changes their number: queues move from those that leave to those that stay, each between two bursts and
//! only while nothing of its port waits in the old worker's hands. If that does not come about by itself the queue is not
//! taken from any more until what has come in is delivered, and if that takes too long everything stays as it was.
//!
//! Invariant: orders go out under the crew's lock, and so does the last one that a worker gets; none is left unread.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::TryLockError;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, SyncSender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use gangway_shared::config::valid::Poll;

use super::engine::{Engine, Shared, lock};
use super::seating::Seating;
use super::worker::{Batch, Line, Order, Outcome, QueueId, Worker};
use crate::sys::{self, Affinity};

/// Batches that may wait for a worker.
const BATCHES: usize = 64;
/// How long a worker may take to acknowledge.
const ACK: Duration = Duration::from_secs(5);
/// How long a queue may wait for a moment in which nothing of its port waits here.
const CALM: Duration = Duration::from_millis(250);
/// How long all queues together may take to leave.
const LEAVE: Duration = Duration::from_millis(1250);
/// How often that is looked at.
const LOOK: Duration = Duration::from_millis(1);

/// A worker did not acknowledge a batch in time: the switch is broken.
#[derive(Debug, thiserror::Error)]
#[error("worker {0} did not acknowledge within {1:?}; the data path hangs, restart the switch")]
pub struct NoAck(usize, Duration);

/// A worker runs where it has run before.
#[derive(Debug, thiserror::Error)]
pub enum Unpinned {
    /// On this CPU it cannot.
    #[error("worker {0} is not pinned to CPU {1}: {2}")]
    To(usize, usize, std::io::Error),
    /// It is to have no CPU of its own any more.
    #[error("worker {0} stays where it is pinned to: {1}")]
    Stays(usize, std::io::Error),
}

impl Unpinned {
    pub(super) fn new(worker: usize, cpu: Option<usize>, why: std::io::Error) -> Unpinned {
        match cpu {
            Some(cpu) => Unpinned::To(worker, cpu, why),
            None => Unpinned::Stays(worker, why),
        }
    }
}

/// How a worker runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Its CPU; none: wherever the process may run.
    pub cpu: Option<usize>,
    /// How it waits.
    pub poll: Poll,
}

struct Hand {
    batches: SyncSender<Batch>,
    waker: Arc<OwnedFd>,
    asleep: Arc<AtomicBool>,
    thread: JoinHandle<()>,
    place: Place,
}

impl Hand {
    fn give(&self, n: usize, orders: Vec<Order>) -> Result<mpsc::Receiver<Outcome>, NoAck> {
        let (done, acked) = mpsc::channel();
        self.batches
            .send(Batch { orders, done })
            .map_err(|_| NoAck(n, Duration::ZERO))?;
        std::sync::atomic::fence(Ordering::SeqCst);
        if self.asleep.load(Ordering::SeqCst) {
            sys::signal_event(self.waker.as_fd());
        }
        Ok(acked)
    }
}

/// Acknowledgements to come.
pub struct Waits(Vec<mpsc::Receiver<Outcome>>);

impl Waits {
    /// Until all are here.
    pub fn wait(self) -> Result<Outcome, NoAck> {
        let mut out = Outcome::default();
        for (n, w) in self.0.into_iter().enumerate() {
            out.add(w.recv_timeout(ACK).map_err(|_| NoAck(n, ACK))?);
        }
        Ok(out)
    }
}

/// See the module.
pub struct Crew {
    shared: Arc<Shared>,
    /// Flows of each worker.
    flows: usize,
    /// Where workers run that have no CPU.
    home: Affinity,
    hands: Vec<Hand>,
}

impl Crew {
    /// Nobody yet. The calling thread's CPUs are those of workers that have none of their own.
    pub fn new(shared: Arc<Shared>, flows: usize) -> std::io::Result<Crew> {
        Ok(Crew {
            shared,
            flows,
            home: sys::affinity()?,
            hands: Vec::new(),
        })
    }

    /// How each runs.
    pub fn places(&self) -> Vec<Place> {
        self.hands.iter().map(|h| h.place).collect()
    }

    /// One more worker.
    pub fn join(&mut self, place: Place) -> std::io::Result<()> {
        let n = self.hands.len();
        let (batches, rx) = mpsc::sync_channel(BATCHES);
        let waker = Arc::new(sys::eventfd()?);
        let asleep = Arc::new(AtomicBool::new(false));
        let (shared, home) = (self.shared.clone(), self.home);
        let line = Line {
            batches: rx,
            waker: waker.clone(),
            asleep: asleep.clone(),
        };
        let worker = Worker::new(n, shared, line, place.poll, self.flows, home)?;
        let body = move || {
            if let Some(cpu) = place.cpu
                && let Err(why) = sys::pin_thread(cpu)
            {
                tracing::warn!("{}", Unpinned::new(n, place.cpu, why));
            }
            worker.run();
        };
        let thread = std::thread::Builder::new()
            .name(format!("worker-{n}"))
            .spawn(body)?;
        self.hands.push(Hand {
            batches,
            waker,
            asleep,
            thread,
            place,
        });
        Ok(())
    }

    /// Tells each worker its orders; one without gets an empty batch, so that all pass the cut.
    pub fn orders(&self, orders: Vec<(usize, Order)>) -> Result<Waits, NoAck> {
        let mut parts: Vec<Vec<Order>> = self.hands.iter().map(|_| Vec::new()).collect();
        for (worker, order) in orders {
            // Never another: queues and seats are of workers that are there.
            if let Some(part) = parts.get_mut(worker) {
                part.push(order);
            }
        }
        let all = self.hands.iter().zip(parts).enumerate();
        all.map(|(n, (hand, orders))| hand.give(n, orders))
            .collect::<Result<_, _>>()
            .map(Waits)
    }

    /// Changes where the workers run and how they wait.
    pub fn settle(&mut self, places: &[Place]) -> Result<(), NoAck> {
        let mut orders = Vec::new();
        for (n, (hand, place)) in self.hands.iter_mut().zip(places).enumerate() {
            if hand.place != *place {
                hand.place = *place;
                orders.push((n, Order::Run(*place)));
            }
        }
        for e in self.orders(orders)?.wait()?.unpinned {
            tracing::warn!("{e}");
        }
        Ok(())
    }

    /// All but the first `count` leave: all of them, or none if something waits with one, (from, to).
    ///
    /// To be called only while none of them has a queue or can get one.
    pub fn retire(&mut self, count: usize) -> Result<Option<(usize, usize)>, NoAck> {
        let all = || count..self.hands.len();
        // One that has no queue and nothing that waits stays so.
        let idle = all().map(|n| (n, Order::Idle)).collect();
        if let Some(busy) = self.orders(idle)?.wait()?.busy.first() {
            return Ok(Some(*busy));
        }
        let end = all().map(|n| (n, Order::Retire)).collect();
        self.orders(end)?.wait()?;
        for hand in self.hands.drain(count.min(self.hands.len())..) {
            ended(hand.thread);
        }
        Ok(None)
    }

    /// All workers end; they let go of all queues.
    pub fn stop(&mut self) {
        for hand in self.hands.drain(..) {
            sys::signal_event(hand.waker.as_fd());
            ended(hand.thread);
        }
    }
}

fn ended(thread: JoinHandle<()>) {
    if thread.join().is_err() {
        tracing::error!("a worker had panicked");
    }
}

/// Why the workers are as they were.
#[derive(Debug, thiserror::Error)]
pub enum Unchanged {
    /// Lanes are held: they belong to the workers that there are.
    #[error("a hold is open")]
    Held,
    /// Somebody else is at it.
    #[error("the workers are being changed already")]
    Changing,
    /// What came in at a port waits for another one, which takes nothing.
    #[error("frames from port {from} wait for port {to}, which takes none")]
    Waiting {
        /// Where they came in.
        from: String,
        /// Where they go.
        to: String,
    },
    /// The operator's.
    #[error("no worker can run on CPU {0}: {1}")]
    NoCpu(usize, std::io::Error),
    /// The host's.
    #[error("no worker can be started: {0}")]
    NoWorker(std::io::Error),
    /// Ours.
    #[error(transparent)]
    Broken(#[from] NoAck),
}

/// A worker as control sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct View {
    /// How it runs.
    pub place: Place,
    /// What it serves.
    pub queues: Vec<QueueId>,
    /// Frames from its queues; also of earlier workers with its number.
    pub rx_frames: u64,
    /// Frames that it has sent, likewise.
    pub tx_frames: u64,
}

impl Engine {
    /// The workers that there are.
    pub fn workers(&self) -> Vec<View> {
        let seating = lock(&self.seating);
        let (places, books) = (lock(&self.crew).places(), self.shared.books.all());
        let view = |(n, (place, book)): (usize, (Place, Arc<super::stats::Traffic>))| {
            let (rx_frames, tx_frames) = book.frames();
            View {
                place,
                queues: seating.of(n),
                rx_frames,
                tx_frames,
            }
        };
        places
            .into_iter()
            .zip(books)
            .enumerate()
            .map(view)
            .collect()
    }

    /// From now on there is a worker for each place (one at least), while frames flow. Not while a hold is open, unless only
    /// places change. `wish` says which places, of those that there are; until its wish is fulfilled nobody else has one.
    pub fn set_workers<E: From<Unchanged>>(
        &self,
        wish: impl FnOnce(&[Place]) -> Result<Vec<Place>, E>,
    ) -> Result<Vec<Place>, E> {
        let _one_at_a_time = match self.changing.try_lock() {
            Ok(guard) => guard,
            Err(TryLockError::Poisoned(p)) => p.into_inner(),
            Err(TryLockError::WouldBlock) => return Err(Unchanged::Changing.into()),
        };
        let now = lock(&self.crew).places();
        let places = wish(&now)?;
        self.replace(now.len(), &places)?;
        Ok(places)
    }

    fn replace(&self, before: usize, places: &[Place]) -> Result<(), Unchanged> {
        let count = places.len();
        places.iter().filter_map(|p| p.cpu).try_for_each(can_run)?;
        if count > before {
            self.hire(before, places)?;
        } else if count < before && count > 0 {
            self.dismiss(before, count)?;
        }
        lock(&self.crew).settle(places)?;
        while self.rebalance() {}
        Ok(())
    }

    /// Before the switch stops: nothing more is taken from any sender, and what waits for receivers in memory goes to them. False if
    /// they do not take all of it in time. What a spool has stays there for the next run.
    pub fn rest(&self, patience: Duration) -> Result<bool, NoAck> {
        let since = Instant::now();
        let workers = self.workers().len();
        let served: Vec<(usize, QueueId)> = {
            let seating = lock(&self.seating);
            let of = |n: usize| seating.of(n).into_iter().map(move |id| (n, id));
            (0..workers).flat_map(of).collect()
        };
        let quiet = served
            .into_iter()
            .map(|(n, id)| (n, Order::Quiet(id, true)));
        self.orders(quiet.collect())?;
        loop {
            let out = self.orders((0..workers).map(|n| (n, Order::Backlogs)).collect())?;
            if out.busy.is_empty() {
                return Ok(true);
            }
            if since.elapsed() > patience {
                return Ok(false);
            }
            std::thread::sleep(LOOK);
        }
    }

    fn hire(&self, before: usize, places: &[Place]) -> Result<(), Unchanged> {
        let mut seating = lock(&self.seating);
        if seating.is_pinned() {
            return Err(Unchanged::Held);
        }
        let mut crew = lock(&self.crew);
        for place in &places[before..] {
            if let Err(e) = crew.join(*place) {
                crew.retire(before)?;
                return Err(Unchanged::NoWorker(e));
            }
        }
        drop(crew);
        seating.resize(places.len());
        self.steer(places.len());
        Ok(())
    }

    fn dismiss(&self, before: usize, count: usize) -> Result<(), Unchanged> {
        let began = Instant::now();
        lock(&self.seating).resize(count);
        loop {
            let mut seating = lock(&self.seating);
            let waits = match self.empty(&mut seating, count, began.elapsed() > CALM) {
                Ok(None) => {
                    self.steer(count);
                    return Ok(());
                }
                Ok(Some((from, to))) => {
                    let name = |port: usize| self.shared.ports[port].name.clone();
                    Unchanged::Waiting {
                        from: name(from),
                        to: name(to),
                    }
                }
                Err(e) => e,
            };
            if began.elapsed() > LEAVE || !matches!(waits, Unchanged::Waiting { .. }) {
                let stay = seating.to_leave();
                let stay = stay.map(|(id, worker)| (worker, Order::Quiet(id, false)));
                let told = self.orders(stay.collect());
                seating.resize(before);
                told?;
                return Err(waits);
            }
            drop(seating);
            std::thread::sleep(LOOK);
        }
    }

    /// Moves what can be moved from the workers that leave, and sends them away when nothing is left. What one has to wait for:
    /// (from, to).
    fn empty(
        &self,
        seating: &mut Seating,
        count: usize,
        quiet: bool,
    ) -> Result<Option<(usize, usize)>, Unchanged> {
        if seating.is_pinned() {
            return Err(Unchanged::Held);
        }
        let mut waits = None;
        let all: Vec<(QueueId, usize)> = seating.to_leave().collect();
        for (id, from) in all {
            let moves = seating.moves();
            let Some((_, _, to)) = moves.into_iter().find(|m| m.0 == id) else {
                continue;
            };
            let mut orders = vec![(from, Order::Leave(id))];
            if quiet {
                orders.insert(0, (from, Order::Quiet(id, true)));
            }
            let mut out = self.orders(orders)?;
            match out.queues.pop() {
                Some(queue) => {
                    seating.moved(id, to);
                    self.orders(vec![(to, Order::Attach(id, queue))])?;
                }
                None => waits = out.busy.pop().or(Some((id.port, id.port))),
            }
        }
        if waits.is_some() {
            return Ok(waits);
        }
        waits = lock(&self.crew).retire(count)?;
        // It has no reason to say no.
        let gone = waits.is_none() && seating.dismiss();
        debug_assert_eq!(gone, waits.is_none());
        Ok(waits)
    }

    fn steer(&self, workers: usize) {
        self.shared.ports.iter().for_each(|p| p.steer(workers));
    }
}

/// A thread can be pinned to it.
fn can_run(cpu: usize) -> Result<(), Unchanged> {
    let probe = std::thread::Builder::new()
        .name("probe".into())
        .spawn(move || sys::pin_thread(cpu));
    let done = probe.map_err(Unchanged::NoWorker)?.join();
    match done {
        Ok(Ok(())) => Ok(()),
        Ok(Err(e)) => Err(Unchanged::NoCpu(cpu, e)),
        Err(_) => Err(Unchanged::NoWorker(std::io::ErrorKind::Other.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datapath::tests::config;

    const FREE: Place = Place {
        cpu: None,
        poll: Poll::Adaptive,
    };

    fn engine(workers: usize) -> (tempfile::TempDir, Arc<Engine>) {
        let dir = tempfile::tempdir().unwrap();
        let engine = Engine::start(&config(&["a"], workers, dir.path().into())).unwrap();
        (dir, engine)
    }

    /// Else each of two could fulfil its wish for places that the other has just changed, and undo that.
    #[test]
    fn a_wish_sees_the_places_that_it_changes() {
        let (_dir, engine) = engine(1);
        let one_more = |now: &[Place]| Ok::<_, Unchanged>([now, &[FREE]].concat());
        let places = engine.set_workers(|now| {
            assert_eq!(now, [FREE]);
            let other = std::thread::scope(|s| s.spawn(|| engine.set_workers(one_more)).join());
            assert!(matches!(other.unwrap(), Err(Unchanged::Changing)));
            one_more(now)
        });
        assert_eq!(places.unwrap(), [FREE; 2]);
        assert_eq!(engine.set_workers(one_more).unwrap(), [FREE; 3]);
        assert_eq!(engine.workers().len(), 3);
        engine.stop();
    }

    #[test]
    fn a_worker_that_cannot_be_moved_says_so_and_names_only_a_cpu_that_was_asked_for() {
        let (_dir, engine) = engine(1);
        let mut crew = Crew::new(engine.shared().clone(), 64).unwrap();
        crew.home = Affinity::none();
        crew.join(FREE).unwrap();
        let told = |cpu| {
            let run = Order::Run(Place { cpu, ..FREE });
            let out = crew.orders(vec![(0, run)]).unwrap().wait().unwrap();
            out.unpinned
                .iter()
                .map(Unpinned::to_string)
                .collect::<String>()
        };
        assert!(told(Some(8000)).starts_with("worker 0 is not pinned to CPU 8000: "));
        assert!(told(None).starts_with("worker 0 stays where it is pinned to: "));
        // First: it tells all workers of its ports.
        engine.stop();
        crew.stop();
    }
}
