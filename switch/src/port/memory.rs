//! A port in memory, for tests: frames go in and come out of shared lists.

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use super::{BURST, Burst, Frame, Mark, RxQueue, Sent, TxQueue, VnetHdr};
use crate::sys;

/// Both ends of a memory port.
#[derive(Clone)]
pub struct MemoryPort {
    input: Arc<Mutex<VecDeque<Vec<u8>>>>,
    output: Arc<Mutex<Vec<Vec<u8>>>>,
    room: Arc<Mutex<usize>>,
    refused: Arc<AtomicU64>,
    /// Frames that were ever delivered, and those of them that the receiver has read.
    sent: Arc<AtomicU64>,
    read: Arc<AtomicU64>,
    /// Wakes a switch that sleeps, as a guest's kick does; and whether it asked for that.
    kick: Arc<OwnedFd>,
    armed: Arc<AtomicBool>,
}

/// With room for all frames of a test.
impl Default for MemoryPort {
    fn default() -> MemoryPort {
        MemoryPort {
            input: Arc::default(),
            output: Arc::default(),
            room: Arc::new(Mutex::new(usize::MAX)),
            refused: Arc::default(),
            sent: Arc::default(),
            read: Arc::new(AtomicU64::new(u64::MAX)),
            kick: Arc::new(sys::eventfd().expect("an eventfd")),
            armed: Arc::default(),
        }
    }
}

impl MemoryPort {
    /// Frames that the receiver takes from now on.
    pub fn set_room(&self, n: usize) {
        *self.room.lock().unwrap() = n;
    }
    /// How often a frame found no room.
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }
    /// So many of the delivered frames count as read.
    pub fn set_read(&self, n: u64) {
        self.read.store(n, Ordering::Release);
    }
    /// One was delivered before that is not read.
    pub fn leave_unread(&self) {
        self.set_read(self.sent.fetch_add(1, Ordering::AcqRel));
    }
    /// Puts a frame in.
    pub fn push(&self, f: Vec<u8>) {
        self.input.lock().unwrap().push_back(f);
        if self.armed.swap(false, Ordering::SeqCst) {
            sys::signal_event(self.kick.as_fd());
        }
    }
    /// Frames that the switch has not taken.
    pub fn waiting(&self) -> usize {
        self.input.lock().unwrap().len()
    }
    /// Takes out what waits to go in.
    pub fn take_waiting(&self) -> Vec<Vec<u8>> {
        self.input.lock().unwrap().drain(..).collect()
    }
    /// Takes what the switch delivered.
    pub fn take_delivered(&self) -> Vec<Vec<u8>> {
        std::mem::take(&mut *self.output.lock().unwrap())
    }
    /// What the switch delivered so far.
    pub fn delivered(&self) -> Vec<Vec<u8>> {
        self.output.lock().unwrap().clone()
    }
    /// How many frames those are; a test that waits for more asks for no copies, which would take the switch's time.
    pub fn delivered_count(&self) -> usize {
        self.output.lock().unwrap().len()
    }
    /// The queues to attach.
    pub fn queues(&self) -> (Box<dyn RxQueue>, Box<dyn TxQueue>) {
        (
            Box::new(Rx {
                port: self.clone(),
                burst: Vec::new(),
                kick: self.kick.try_clone().expect("a descriptor"),
            }),
            Box::new(self.clone()),
        )
    }
}

struct Rx {
    port: MemoryPort,
    burst: Vec<Vec<u8>>,
    /// A descriptor of its own: the switch stops watching a queue's when it has another.
    kick: OwnedFd,
}

impl RxQueue for Rx {
    fn burst<'q>(&'q mut self, out: &mut Burst<'q>) {
        self.burst = self
            .port
            .input
            .lock()
            .unwrap()
            .iter()
            .take(BURST)
            .cloned()
            .collect();
        out.extend(
            self.burst
                .iter()
                .map(|b| Frame::from_slice(VnetHdr::default(), b)),
        );
    }
    fn release(&mut self, n: usize) {
        self.port.input.lock().unwrap().drain(..n);
    }
    fn wake_fd(&self) -> Option<RawFd> {
        Some(self.kick.as_raw_fd())
    }
    fn arm(&mut self) -> bool {
        self.port.armed.store(true, Ordering::SeqCst);
        self.port.waiting() > 0
    }
    fn disarm(&mut self) {
        self.port.armed.store(false, Ordering::SeqCst);
        sys::drain_event(self.kick.as_fd());
    }
}

impl TxQueue for MemoryPort {
    fn send(&mut self, frame: &Frame<'_>) -> Sent {
        let mut room = self.room.lock().unwrap();
        if *room == 0 {
            self.refused.fetch_add(1, Ordering::Relaxed);
            return Sent::Full;
        }
        *room -= 1;
        let mut b = vec![0; frame.len as usize];
        frame.copy_to(&mut b);
        self.output.lock().unwrap().push(b);
        self.sent.fetch_add(1, Ordering::AcqRel);
        Sent::Yes
    }
    fn flush(&mut self) {}
    fn mark(&mut self) -> Option<Mark> {
        Some(Mark {
            at: 0,
            count: self.sent.load(Ordering::Acquire),
            tells: true,
        })
    }
    fn has_read(&mut self, mark: &Mark) -> bool {
        self.read.load(Ordering::Acquire) >= mark.count
    }
}
