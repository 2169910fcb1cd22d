//! Two workers that send to one port: copying behind the lock of its transmit queue, or without it into places taken there, as
//! the switch does; beside one worker, and two with a port each (or a queue each of the same port: the same work).
//! `cargo bench -p gangway-benches --bench workers` on two idle CPUs (ADR-0022).
//!
//! A thread for each worker, pinned; it takes bursts from a ring of its own and also plays the driver of the rings: there is no
//! CPU left for guests. So the rates are above those of a switch with guests; what counts is how the ways compare.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use gangway_benches::ring::split::Split;
use gangway_benches::{host, pingpong};
use gangway_switch::port::{BURST, Burst, Claim, Frame, RxQueue, Sent, TxQueue};
use spin::mutex::SpinMutex;
use spin::relax::Yield;

mod side;

use side::{Side, receiver, sender, turn};

const SIZES: [usize; 3] = [64, 512, 1514];
const CPUS: [usize; 2] = [0, 1];
const WINDOW: Duration = Duration::from_millis(200);
const ROUNDS: usize = 7;

type From = Side<Box<dyn RxQueue>, Split>;

/// A lock as a port's transmit queue has it.
#[repr(align(64))]
struct Lock<T>(SpinMutex<T, Yield>);

impl<T> Lock<T> {
    fn new(value: T) -> Lock<T> {
        Lock(SpinMutex::new(value))
    }
}

/// A port's transmit queue, and its guest's driver.
struct Port {
    queue: Lock<Option<Box<dyn TxQueue>>>,
    ring: Lock<Split>,
}

impl Port {
    fn new() -> Port {
        let Side { queue, ring } = receiver::<Split>();
        let (queue, ring) = (Lock::new(Some(queue)), Lock::new(ring));
        Port { queue, ring }
    }

    fn send(&self, frames: &[Frame<'_>]) -> usize {
        let mut queue = self.queue.0.lock();
        let tx = queue.as_mut().expect("a queue");
        let mut sent = tx.send_run(frames);
        while sent < frames.len() && tx.send(&frames[sent]) == Sent::Yes {
            sent += 1;
        }
        tx.flush();
        drop(queue);
        self.take();
        sent
    }

    fn claim(&self, claim: &mut Claim, frames: &[Frame<'_>]) -> usize {
        let lock = || self.queue.0.lock();
        let mut sent = claim.send_run(lock, frames).expect("a queue to share");
        while sent < frames.len() && claim.send(lock, &frames[sent]) == Some(Sent::Yes) {
            sent += 1;
        }
        while let Some(number) = claim.behind()
            && let Some(tx) = lock().as_mut().and_then(|t| t.shared())
            && tx.is_out(number)
        {
            std::hint::spin_loop();
        }
        self.take();
        sent
    }

    /// The guest.
    fn take(&self) {
        if let Some(mut ring) = self.ring.0.try_lock() {
            turn(&mut *ring);
        }
    }
}

/// Sends a burst of `from`; how many went.
fn forward(from: &mut From, send: impl FnOnce(&[Frame<'_>]) -> usize) -> usize {
    let mut burst = Burst::new();
    from.queue.burst(&mut burst);
    let sent = send(&burst);
    drop(burst);
    from.queue.release(sent);
    turn(&mut from.ring);
    sent
}

/// How two workers send.
#[derive(Clone, Copy, PartialEq)]
enum Way {
    /// Only one does.
    One,
    /// Each to a port of its own.
    Own,
    /// To the same, behind its lock.
    Locked,
    /// To the same, copying without it.
    Claimed,
}

const WAYS: [(Way, &str); 4] = [
    (Way::One, "one worker, one port"),
    (Way::Own, "two workers, a port (or queue) each"),
    (Way::Locked, "two workers, one queue, lock"),
    (Way::Claimed, "two workers, one queue, claims"),
];

/// Frames per second that arrive, in millions.
fn run(way: Way, bytes: usize) -> f64 {
    let ports = [Port::new(), Port::new()];
    let (ready, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
    let workers = if way == Way::One { 1 } else { 2 };
    let worker = |n: usize| {
        host::pin(CPUS[n]).expect("a CPU");
        let mut from = sender::<Split>(bytes);
        let mut claim = Claim::default();
        ready.fetch_add(1, Ordering::AcqRel);
        while ready.load(Ordering::Acquire) < workers {
            std::hint::spin_loop();
        }
        let (mut arrived, since) = (0, Instant::now());
        while !stop.load(Ordering::Relaxed) {
            for _ in 0..16 {
                arrived += match (way, n) {
                    (Way::One | Way::Locked, _) => forward(&mut from, |f| ports[0].send(f)),
                    (Way::Own, n) => forward(&mut from, |f| ports[n].send(f)),
                    (Way::Claimed, _) => forward(&mut from, |f| ports[0].claim(&mut claim, f)),
                };
            }
            if n == 0 && since.elapsed() >= WINDOW {
                stop.store(true, Ordering::Relaxed);
            }
        }
        arrived as f64 / since.elapsed().as_secs_f64() / 1e6
    };
    std::thread::scope(|s| {
        let all: Vec<_> = (0..workers).map(|n| s.spawn(move || worker(n))).collect();
        all.into_iter().map(|t| t.join().expect("a worker")).sum()
    })
}

fn main() {
    // What `cargo bench` and `cargo test` pass to criterion's benchmarks is of no use here.
    if std::env::args().any(|a| a == "--test") {
        return;
    }
    println!("bursts of {BURST}; Mpps that arrive: median [least to most] of {ROUNDS}, in turn");
    let mut trips = Vec::new();
    for bytes in SIZES {
        let mut rates = WAYS.map(|_| Vec::new());
        for _ in 0..ROUNDS {
            host::pin(CPUS[0]).expect("a CPU");
            trips.push(pingpong::round_trip(CPUS[1]).expect("two CPUs"));
            for ((way, _), rates) in WAYS.iter().zip(&mut rates) {
                rates.push(run(*way, bytes));
            }
        }
        for ((_, name), mut rates) in WAYS.iter().zip(rates) {
            rates.sort_by(f64::total_cmp);
            let [median, least, most] = [ROUNDS / 2, 0, ROUNDS - 1].map(|n| rates[n]);
            println!("{bytes:5} bytes  {name:38} {median:6.2} [{least:.2} to {most:.2}]");
        }
    }
    trips.sort_unstable();
    println!("a line to and fro between the CPUs: {trips:?} cycles");
}
