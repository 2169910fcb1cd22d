//! A port in memory, for tests: frames go in and come out of shared lists.

use std::collections::VecDeque;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use super::{BURST, Burst, Frame, Mark, RxQueue, Sent, TxQueue, VnetHdr};

/// Both ends of a memory port.
#[derive(Clone, Default)]
pub struct MemoryPort {
    input: Arc<Mutex<VecDeque<Vec<u8>>>>,
    output: Arc<Mutex<Vec<Vec<u8>>>>,
    room: Arc<Mutex<usize>>,
    refused: Arc<AtomicU64>,
    /// Frames that were ever delivered, and those of them that the receiver has read.
    sent: Arc<AtomicU64>,
    read: Arc<AtomicU64>,
}

impl MemoryPort {
    /// With room for all frames of a test.
    pub fn new() -> MemoryPort {
        let p = MemoryPort::default();
        p.set_room(usize::MAX);
        p.set_read(u64::MAX);
        p
    }
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
    /// The queues to attach.
    pub fn queues(&self) -> (Box<dyn RxQueue>, Box<dyn TxQueue>) {
        (
            Box::new(Rx {
                port: self.clone(),
                burst: Vec::new(),
            }),
            Box::new(self.clone()),
        )
    }
}

struct Rx {
    port: MemoryPort,
    burst: Vec<Vec<u8>>,
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
        None
    }
    fn arm(&mut self) -> bool {
        self.port.waiting() > 0
    }
    fn disarm(&mut self) {}
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
