//! A front-end that says what it likes on a port's control socket.

use std::fs::File;
use std::io::IoSlice;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};

use gangway_switch::port::vhost::{features, serve_one};
use gangway_switch::port::{Attach, Burst, Frame, RxQueue, TxQueue, VnetHdr};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use crate::input::Input;

const MEMORY: u64 = 0x2_0000;
const UVA: u64 = 0x7f00_0000_0000;
/// Rings of the first pair: descriptors, driver's area, device's area.
const RINGS: [[u64; 3]; 2] = [[0x1000, 0x3000, 0x4000], [0x5000, 0x7000, 0x8000]];
/// VHOST_USER_VERSION, in a message's flags.
const VERSION: u32 = 1;
const NEED_REPLY: u32 = 8;

/// Front-end's messages.
mod says {
    pub const SET_FEATURES: u32 = 2;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_LOG_BASE: u32 = 6;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
}
use says::*;

struct FrontEnd {
    socket: UnixStream,
    memory: File,
    event: File,
    odd: [File; 3],
}

impl FrontEnd {
    fn new(socket: UnixStream) -> FrontEnd {
        let memory = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).expect("a memfd"));
        memory.set_len(MEMORY).expect("its size");
        let (read, _write) = rustix::pipe::pipe().expect("a pipe");
        FrontEnd {
            socket,
            memory,
            event: File::from(eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd")),
            odd: [
                File::from(read),
                File::open("/dev/null").expect("/dev/null"),
                tempfile::tempfile().expect("a file"),
            ],
        }
    }

    fn file(&self, kind: u8) -> Option<BorrowedFd<'_>> {
        match kind % 6 {
            0 => None,
            1 => Some(self.memory.as_fd()),
            2 => Some(self.event.as_fd()),
            n => Some(self.odd[usize::from(n) - 3].as_fd()),
        }
    }

    /// As much as the socket takes.
    fn say(&self, request: u32, flags: u32, body: &[u8], size: u32, files: &[BorrowedFd<'_>]) {
        let mut head = Vec::with_capacity(12);
        for word in [request, flags, size] {
            head.extend(word.to_ne_bytes());
        }
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !files.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(files));
        }
        let parts = [IoSlice::new(&head), IoSlice::new(body)];
        let _ = sendmsg(&self.socket, &parts, &mut control, SendFlags::NOSIGNAL);
    }

    fn words(&self, request: u32, words: &[u64], files: &[BorrowedFd<'_>]) {
        let body: Vec<u8> = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
        self.say(request, VERSION, &body, body.len() as u32, files);
    }

    fn ring(&self, ring: usize, num: u64, base: u64) {
        let i = ring as u64;
        let pair = |value: u64| i | value << 32;
        let [d, a, u] = RINGS[ring % 2].map(|at| UVA + at);
        self.words(SET_VRING_NUM, &[pair(num)], &[]);
        self.words(SET_VRING_BASE, &[pair(base)], &[]);
        self.words(SET_VRING_ADDR, &[pair(0), d, u, a, RINGS[ring % 2][2]], &[]);
        self.words(SET_VRING_CALL, &[i], &[self.event.as_fd()]);
        self.words(SET_VRING_KICK, &[i], &[self.event.as_fd()]);
        self.words(SET_VRING_ENABLE, &[pair(1)], &[]);
    }

    /// What QEMU says to begin with.
    fn begin(&self, how: u8) {
        let without = if how & 1 == 0 {
            features::RING_PACKED
        } else {
            0
        };
        let without = without | if how & 2 == 0 { features::LOG_ALL } else { 0 };
        self.words(SET_PROTOCOL_FEATURES, &[features::protocol().bits()], &[]);
        self.words(SET_FEATURES, &[features::OFFERED & !without], &[]);
        let memory = self.memory.as_fd();
        self.words(SET_MEM_TABLE, &[1, 0, MEMORY, UVA, 0], &[memory]);
        for ring in 0..2 {
            let base = if how & 1 == 0 { 0 } else { 1 << 15 };
            self.ring(ring, if how & 4 == 0 { 16 } else { 256 }, base);
        }
    }

    fn speak(&self, input: &mut Input<'_>) {
        let op = input.u8();
        match op {
            0..8 => return self.begin(op),
            8..16 => return self.ring(usize::from(op & 3), 8 << (op >> 2 & 1), 0),
            16..24 => {
                let at = u64::from(input.u16());
                let n = input.u8();
                let written = self.memory.write_all_at(input.take(usize::from(n)), at);
                return written.expect("in the file");
            }
            _ => {}
        }
        let request = u32::from(op) % 46;
        let how = input.u8();
        let flags = match how & 3 {
            0 | 1 => VERSION,
            2 => VERSION | NEED_REPLY,
            _ => input.u32(),
        };
        let kinds = input.u8();
        let mut files: Vec<_> = self.file(kinds).into_iter().collect();
        files.extend(self.file(kinds / 6));
        files.extend(self.file(kinds / 36));
        let mut body = Vec::new();
        if how & 4 != 0 {
            let n = input.u8();
            body.extend(input.take(usize::from(n)));
        } else {
            for field in shape(request, how >> 4) {
                let value = value(input);
                body.extend(&value.to_ne_bytes()[..field]);
            }
        }
        let size = if how & 8 != 0 {
            input.u32()
        } else {
            body.len() as u32
        };
        self.say(request, flags, &body, size, &files);
    }
}

/// Bytes of the fields of a request's body.
fn shape(request: u32, n: u8) -> Vec<usize> {
    match request {
        SET_MEM_TABLE => {
            let mut all = vec![4, 4];
            all.extend([8; 4].repeat(usize::from(n % 3)));
            all
        }
        SET_LOG_BASE => vec![8, 8],
        SET_VRING_NUM | SET_VRING_BASE | GET_VRING_BASE | SET_VRING_ENABLE => vec![4, 4],
        SET_VRING_ADDR => vec![4, 4, 8, 8, 8, 8],
        SET_VRING_KICK | SET_VRING_CALL | SET_VRING_ERR => vec![8],
        SET_FEATURES | SET_PROTOCOL_FEATURES => vec![8],
        ADD_MEM_REG | REM_MEM_REG => vec![8; 5],
        _ => vec![8; usize::from(n % 4)],
    }
}

/// Mostly one that means something.
fn value(input: &mut Input<'_>) -> u64 {
    match input.u8() {
        n @ 0..40 => u64::from(n),
        40 => features::OFFERED,
        41 => features::OFFERED & !features::RING_PACKED,
        42 => features::OFFERED & !features::PROTOCOL_FEATURES,
        43 => MEMORY,
        44 => UVA,
        45 => UVA + MEMORY,
        46 => 1 << 15,
        47 => 1 << 8,
        n @ 48..64 => UVA + 0x1000 * u64::from(n - 48),
        n @ 64..80 => 0x1000 * u64::from(n - 64),
        n @ 80..144 => 1 << (n - 80),
        n @ 144..208 => u64::MAX << (n - 144),
        _ => input.u64(),
    }
}

/// The data path's place: uses what it is given, at once.
#[derive(Default)]
struct Ports {
    rx: Mutex<Vec<(u16, Box<dyn RxQueue>)>>,
    tx: Mutex<Vec<(u16, Box<dyn TxQueue>)>>,
}

fn lock<T>(m: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

fn receive(rx: &mut dyn RxQueue) {
    rx.disarm();
    let mut burst = Burst::new();
    rx.burst(&mut burst);
    let n = burst.len();
    drop(burst);
    rx.release(n / 2 + 1);
    rx.settle();
    rx.arm();
}

fn send(tx: &mut dyn TxQueue) {
    let bytes = [0x5a; 200];
    let frames = [0, 1].map(|_| Frame::from_slice(VnetHdr::default(), &bytes));
    tx.send_run(&frames);
    tx.send(&frames[0]);
    tx.flush();
    tx.settle();
}

impl Attach for Ports {
    fn attach_rx(
        &self,
        _: usize,
        queue: u16,
        mut rx: Box<dyn RxQueue>,
    ) -> Option<Box<dyn RxQueue>> {
        let old = self.detach_rx(0, queue);
        receive(&mut *rx);
        lock(&self.rx).push((queue, rx));
        old
    }

    fn detach_rx(&self, _: usize, queue: u16) -> Option<Box<dyn RxQueue>> {
        let mut all = lock(&self.rx);
        let at = all.iter().position(|q| q.0 == queue)?;
        let (_, mut rx) = all.remove(at);
        receive(&mut *rx);
        Some(rx)
    }

    fn set_tx(&self, _: usize, queues: Vec<(u16, Box<dyn TxQueue>)>) {
        for (queue, mut tx) in queues {
            self.clear_tx(0, queue);
            send(&mut *tx);
            lock(&self.tx).push((queue, tx));
        }
    }

    fn clear_tx(&self, _: usize, queue: u16) {
        for (_, tx) in lock(&self.tx).iter_mut().filter(|q| q.0 == queue) {
            send(&mut **tx);
        }
        lock(&self.tx).retain(|q| q.0 != queue);
    }

    fn port_error(&self, _: usize, _: Option<String>) {
        for (_, rx) in lock(&self.rx).iter_mut() {
            receive(&mut **rx);
        }
        for (_, tx) in lock(&self.tx).iter_mut() {
            send(&mut **tx);
        }
    }
}

/// What is said, piece by piece; then it hangs up.
pub fn run(data: &[u8]) {
    let Ok((ours, theirs)) = UnixStream::pair() else {
        return;
    };
    theirs.set_nonblocking(true).expect("a socket");
    let front_end = FrontEnd::new(theirs);
    let mut input = Input(data);
    while !input.is_empty() {
        front_end.speak(&mut input);
    }
    front_end
        .socket
        .shutdown(std::net::Shutdown::Write)
        .expect("a socket");
    let ports = Arc::new(Ports::default());
    serve_one(ours, 0, ports.clone()).expect("an eventfd");
    // A ring that is gone is closed on the data path's side, too.
    assert!(lock(&ports.rx).is_empty() && lock(&ports.tx).is_empty());
}
