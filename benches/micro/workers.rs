//! Two workers that send to one port: behind the lock of its transmit queue, as the switch does it, or handed over to the worker
//! that has the port, beside one worker, and two with a port each (or a queue each of the same port: the same work).
//! `cargo bench -p gangway-benches --bench workers` on two idle CPUs (ADR-0017).
//!
//! A thread for each worker, pinned; it takes bursts from a ring of its own and also plays the driver of the rings: there is no
//! CPU left for guests. So the rates are above those of a switch with guests; what counts is how the ways compare.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use gangway_benches::ring::split::Split;
use gangway_benches::{host, pingpong};
use gangway_switch::port::{BURST, Burst, Frame, RxQueue, Sent, TxQueue, VnetHdr};
use spin::mutex::SpinMutex;
use spin::relax::Yield;

mod side;

use side::{Side, receiver, sender, turn};

const SIZES: [usize; 3] = [64, 512, 1514];
const CPUS: [usize; 2] = [0, 1];
const WINDOW: Duration = Duration::from_millis(200);
const ROUNDS: usize = 7;
/// Bursts that may be on their way from one worker to the other.
const SLOTS: usize = 16;

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
    queue: Lock<Box<dyn TxQueue>>,
    ring: Lock<Split>,
}

impl Port {
    fn new() -> Port {
        let Side { queue, ring } = receiver::<Split>();
        let (queue, ring) = (Lock::new(queue), Lock::new(ring));
        Port { queue, ring }
    }

    fn send(&self, frames: &[Frame<'_>]) -> usize {
        let mut queue = self.queue.0.lock();
        let mut sent = queue.send_run(frames);
        while sent < frames.len() && queue.send(&frames[sent]) == Sent::Yes {
            sent += 1;
        }
        queue.flush();
        drop(queue);
        // The guest.
        if let Some(mut ring) = self.ring.0.try_lock() {
            turn(&mut *ring);
        }
        sent
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

/// Frames on their way from one worker to another.
#[derive(Default)]
struct Batch {
    bytes: Vec<u8>,
    lens: Vec<usize>,
}

/// One writes, one reads. No slot is ever waited for: whose it is say the two counts.
struct HandOver {
    slots: Vec<Lock<Batch>>,
    written: AtomicUsize,
    read: AtomicUsize,
}

impl HandOver {
    fn new() -> HandOver {
        HandOver {
            slots: (0..SLOTS).map(|_| Lock::new(Batch::default())).collect(),
            written: AtomicUsize::new(0),
            read: AtomicUsize::new(0),
        }
    }

    /// Copies them in; none if all slots are full.
    fn put(&self, frames: &[Frame<'_>]) -> usize {
        let at = self.written.load(Ordering::Relaxed);
        if at - self.read.load(Ordering::Acquire) == SLOTS {
            return 0;
        }
        let mut slot = self.slots[at % SLOTS].0.lock();
        let Batch { bytes, lens } = &mut *slot;
        bytes.clear();
        lens.clear();
        for f in frames {
            let len = f.len as usize;
            let start = bytes.len();
            bytes.resize(start + len, 0);
            f.copy_to(&mut bytes[start..]);
            lens.push(len);
        }
        drop(slot);
        self.written.store(at + 1, Ordering::Release);
        frames.len()
    }

    /// Sends the oldest ones.
    fn take(&self, port: &Port) -> usize {
        let at = self.read.load(Ordering::Relaxed);
        if at == self.written.load(Ordering::Acquire) {
            return 0;
        }
        let slot = self.slots[at % SLOTS].0.lock();
        let mut rest = &slot.bytes[..];
        let mut frames = Burst::new();
        for len in &slot.lens {
            let (frame, behind) = rest.split_at(*len);
            frames.push(Frame::from_slice(VnetHdr::default(), frame));
            rest = behind;
        }
        let mut sent = 0;
        while sent < frames.len() {
            sent += port.send(&frames[sent..]);
        }
        drop(frames);
        drop(slot);
        self.read.store(at + 1, Ordering::Release);
        sent
    }
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
    /// To the same, by the worker that has it.
    HandedOver,
}

const WAYS: [(Way, &str); 4] = [
    (Way::One, "one worker, one port"),
    (Way::Own, "two workers, a port (or queue) each"),
    (Way::Locked, "two workers, one queue, lock"),
    (Way::HandedOver, "two workers, one queue, handed over"),
];

/// Frames per second that arrive, in millions.
fn run(way: Way, bytes: usize) -> f64 {
    let ports = [Port::new(), Port::new()];
    let handed = HandOver::new();
    let (ready, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
    let workers = if way == Way::One { 1 } else { 2 };
    let worker = |n: usize| {
        host::pin(CPUS[n]).expect("a CPU");
        let mut from = sender::<Split>(bytes);
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
                    (Way::HandedOver, 0) => {
                        forward(&mut from, |f| ports[0].send(f)) + handed.take(&ports[0])
                    }
                    // It counts where it arrives.
                    (Way::HandedOver, _) => {
                        forward(&mut from, |f| handed.put(f));
                        0
                    }
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
