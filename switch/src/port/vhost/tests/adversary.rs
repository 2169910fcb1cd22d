//! Guests and front-ends that break every rule beside ports that carry traffic: the port gets a counter and a reason, and
//! the others lose nothing.

use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use gangway_shared::id::MacAddr;

use super::driver::{INDIRECT_FLAG, NEXT, WRITE};
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;

use super::protocol::{Guest, RX, TX};
use super::*;
use crate::datapath::Engine;
use crate::datapath::tests::{config, eventually, frame as numbered, mac};
use crate::port::memory::MemoryPort;
use crate::port::vhost::ring::Broken;
use crate::port::vhost::{VhostConfig, VhostPort, spawn};
use crate::port::{Attach, Burst, Frame, NeverReason, Sent, VnetHdr};

/// A chain of empty buffers is work without a byte.
const EMPTY: [(u64, u32); 1024] = [(0x10_0000, 0); 1024];

#[test]
fn a_burst_ends_also_among_chains_of_empty_buffers() {
    for packed in [0, PACKED] {
        let mut w = World::new(VERSION_1 | INDIRECT | packed);
        for _ in 0..NUM {
            assert!(w.rx.driver.add(&EMPTY, false, true).is_some());
        }
        for bursts in 1..NUM / 2 {
            let mut out = Burst::new();
            w.rx.queue.burst(&mut out);
            assert!(out.is_empty());
            assert_eq!(w.rx.control.next() & 0x7fff, 2 * bursts, "two a burst");
        }
        assert_eq!(w.rx.control.broken(), None);
    }
}

#[test]
fn a_frame_looks_at_no_more_empty_buffers_than_a_chain_may_have() {
    for packed in [0, PACKED] {
        let mut w = World::new(VERSION_1 | INDIRECT | MRG | packed);
        for _ in 0..4 {
            assert!(w.tx.driver.add(&EMPTY, true, true).is_some());
        }
        // Who comes as far as this finds the ring broken.
        assert!(w.tx.driver.add(&[(1 << 40, 100)], true, false).is_some());
        let f = frame(1, 60);
        let sent = w.tx.queue.send(&Frame::from_slice(VnetHdr::default(), &f));
        assert_eq!(sent, Sent::Never(NeverReason::TooLong));
        assert_eq!(w.tx.control.broken(), None);
    }
}

/// A switch with one worker: `a` sends to `b` all the time, `evil` is a guest's.
struct Switch {
    engine: Arc<Engine>,
    evil: VhostPort,
    socket: PathBuf,
    a: MemoryPort,
    b: MemoryPort,
    stop: Arc<AtomicBool>,
    sender: JoinHandle<u32>,
    memory: Memory,
    _dir: tempfile::TempDir,
}

impl Switch {
    fn new() -> Switch {
        let dir = tempfile::tempdir().unwrap();
        let engine = Engine::start(&config(&["a", "b", "evil"], 1, dir.path().into())).unwrap();
        let [a, b] = [0, 1].map(|n| {
            let p = MemoryPort::default();
            let (rx, tx) = p.queues();
            engine.set_tx(n, vec![(0, tx)]);
            engine.attach_rx(n, 0, rx);
            engine.shared().fdb.set(mac(n as u8 + 1), n, true, 0);
            p
        });
        let cfg = VhostConfig {
            name: "evil".into(),
            slot: 2,
            socket: dir.path().join("s"),
            server: true,
            positions: None,
        };
        let socket = cfg.socket.clone();
        let evil = spawn(cfg, engine.clone()).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let sender = std::thread::spawn({
            let (stop, a) = (stop.clone(), a.clone());
            move || {
                let mut n = 0;
                while !stop.load(Ordering::Relaxed) {
                    if a.waiting() < 64 {
                        n += 1;
                        a.push(numbered(1, mac(2), n));
                    } else {
                        std::thread::yield_now();
                    }
                }
                n
            }
        });
        Switch {
            engine,
            evil,
            socket,
            a,
            b,
            stop,
            sender,
            memory: Memory::new(),
            _dir: dir,
        }
    }

    fn guest(&self, bits: u64) -> Guest {
        let mut g = Guest::connect(&self.socket, &self.memory, None, bits);
        g.negotiate();
        g.start([if bits & PACKED != 0 { packed::START } else { 0 }; 2]);
        g
    }

    fn reason(&self) -> String {
        self.engine.shared().ports[2].error().unwrap_or_default()
    }

    fn rings_broken(&self) -> u64 {
        let counters = &self.engine.shared().ports[2].counters;
        counters.rx_errors[1].load(Ordering::Relaxed)
    }

    /// Frames go on from `a` to `b`.
    fn goes_on(&self, what: &str) {
        let had = self.b.delivered_count();
        eventually(what, || self.b.delivered_count() > had + 200);
    }

    /// Nothing was lost or came out of order.
    fn verdict(self) {
        self.stop.store(true, Ordering::Relaxed);
        let sent = self.sender.join().unwrap();
        let number = |f: &Vec<u8>| u32::from_be_bytes(f[20..24].try_into().unwrap());
        let from_a = |f: &&Vec<u8>| f[6..12] == mac(1).0;
        let got = || -> Vec<u32> {
            self.b
                .delivered()
                .iter()
                .filter(from_a)
                .map(number)
                .collect()
        };
        eventually("the last frame", || got().len() >= sent as usize);
        assert_eq!(got(), (1..=sent).collect::<Vec<_>>());
        self.evil.stop();
        self.engine.stop();
    }
}

/// A way to break a ring, and what is said of it then.
type Break = (fn(&mut Driver, u16), &'static str);

/// Of both layouts; `w` is what the ring's own buffers have for a direction.
const OF_BOTH: [Break; 10] = [
    (
        |d, w| d.raw(&[(1 << 40, 100, w)]),
        "0x10000000000 is not guest memory",
    ),
    (
        |d, w| d.raw(&[(u64::MAX - 8, 100, w)]),
        "0xfffffffffffffff7 is not guest memory",
    ),
    // From one region into what is behind it.
    (
        |d, w| d.raw(&[(REGION - 50, 100, w)]),
        "0x400000 is not guest memory",
    ),
    (
        |d, w| d.raw(&[(0x10_0000, u32::MAX, w)]),
        "0x400000 is not guest memory",
    ),
    (
        |d, w| d.raw(&[(0x10_0000, 100, w ^ WRITE)]),
        "wrong direction",
    ),
    (
        |d, _| d.raw(&[(0x10_0000, 17, INDIRECT_FLAG)]),
        "bad indirect",
    ),
    (
        |d, _| d.raw(&[(0x10_0000, 0, INDIRECT_FLAG)]),
        "bad indirect",
    ),
    (
        |d, _| d.raw(&[(1 << 40, 32, INDIRECT_FLAG)]),
        "0x10000000000 is not guest memory",
    ),
    (
        |d, _| {
            // A table in a table.
            d.raw_in(0x10_0000, 0, (0x10_0000, 16, INDIRECT_FLAG), 0);
            d.raw(&[(0x10_0000, 16, INDIRECT_FLAG)]);
        },
        "bad indirect",
    ),
    (
        |d, w| {
            // Longer than a chain may be: in a split ring it goes from each entry to the next, and round at the end.
            for i in 0..2048 {
                let entry = (0x20_0000, 1, w | if d.packed { 0 } else { NEXT });
                d.raw_in(0x10_0000, i, entry, (i + 1) % 2048);
            }
            d.raw(&[(0x10_0000, 2048 * 16, INDIRECT_FLAG)]);
        },
        "loops or is longer",
    ),
];

const OF_SPLIT: [Break; 5] = [
    (|d, _| d.publish(NUM + 1), "available index"),
    (|d, _| d.publish(0x8000), "available index"),
    (|d, _| d.offer(NUM), "beyond the table"),
    (
        |d, w| {
            d.raw_in(d.at[0], 0, (0x10_0000, 1, NEXT | w), NUM);
            d.offer(0);
        },
        "beyond the table",
    ),
    (
        |d, w| {
            d.raw_in(d.at[0], 0, (0x10_0000, 1, NEXT | w), 1);
            d.raw_in(d.at[0], 1, (0x10_0000, 1, NEXT | w), 0);
            d.offer(0);
        },
        "loops or is longer",
    ),
];

/// All slots are one chain without an end.
const OF_PACKED: [Break; 1] = [(
    |d, w| d.raw(&[(0x10_0000, 1, NEXT | w); NUM as usize]),
    "loops or is longer",
)];

/// One ring after the other is broken; it is set up again after each.
fn break_each(bits: u64, ring: usize) {
    let ways: &[Break] = match bits & PACKED {
        0 => &OF_SPLIT,
        _ => &OF_PACKED,
    };
    let s = Switch::new();
    s.engine.shared().fdb.set(mac(9), 2, true, 0);
    let (which, w) = match ring {
        RX => ("transmit ring 0 is broken", 0),
        _ => ("receive ring 0 is broken", WRITE),
    };
    for (n, &(make, why)) in OF_BOTH.iter().chain(ways).enumerate() {
        let mut g = s.guest(VERSION_1 | INDIRECT | bits);
        eventually("the port is well", || s.reason().is_empty());
        make(&mut g.drivers[ring], w);
        g.kick(RX);
        let had = s.b.delivered_count();
        eventually(why, || {
            // A receive ring is looked at for a frame: one each time, for the sender leaves its port full nearly always.
            if ring == TX {
                s.a.push(numbered(8, mac(9), 0));
            }
            let reason = s.reason();
            reason.contains(which) && reason.contains(why)
        });
        assert_eq!(s.evil.state().broken, 1 + n as u64);
        if ring == RX {
            eventually("it is counted", || s.rings_broken() == n as u64 + 1);
        }
        assert!(s.b.delivered_count() >= had);
        s.goes_on(why);
        drop(g);
        eventually("it has gone", || !s.evil.state().connected);
        s.memory.write(0x1000, &[0; 0x8000]);
        s.memory.write(HIGH, &[0; 0x8000]);
    }
    s.verdict();
}

#[test]
fn a_broken_split_transmit_ring_has_a_reason_and_its_neighbours_lose_nothing() {
    break_each(0, RX);
}

#[test]
fn a_broken_split_receive_ring_has_a_reason_and_its_neighbours_lose_nothing() {
    break_each(0, TX);
}

#[test]
fn a_broken_packed_transmit_ring_has_a_reason_and_its_neighbours_lose_nothing() {
    break_each(PACKED, RX);
}

#[test]
fn a_broken_packed_receive_ring_has_a_reason_and_its_neighbours_lose_nothing() {
    break_each(PACKED, TX);
}

/// Buffers without a byte are no reason to break: they are given back, or wait, and a frame behind them arrives.
#[test]
fn buffers_of_no_length_are_counted_and_disturb_nobody() {
    for packed in [0, PACKED] {
        let s = Switch::new();
        s.engine.shared().fdb.set(mac(9), 2, true, 0);
        let mut g = s.guest(VERSION_1 | packed);
        let empty = [(0x10_0000, 0)];
        for _ in 0..NUM / 2 {
            assert!(g.drivers[RX].add(&empty, false, false).is_some());
            assert!(g.drivers[TX].add(&empty, true, false).is_some());
        }
        let broadcast = numbered(9, MacAddr::BROADCAST, 7);
        assert!(g.send(&broadcast));
        g.kick(RX);
        eventually("its frame", || s.b.delivered().contains(&broadcast));
        assert_eq!(s.evil.state().malformed, u64::from(NUM / 2));
        for _ in 0..10 {
            s.a.push(numbered(8, mac(9), 0));
        }
        s.goes_on("beside a ring of buffers without a byte");
        assert_eq!(s.evil.state().broken, 0);
        drop(g);
        s.verdict();
    }
}

/// Descriptors, tables and indices change while the switch reads them: whatever it finds, nobody else loses anything.
#[test]
fn rings_that_are_rewritten_under_the_switch_disturb_nobody() {
    for packed in [0, PACKED] {
        let s = Switch::new();
        s.engine.shared().fdb.set(mac(9), 2, true, 0);
        for round in 0..4u64 {
            let mut g = s.guest(VERSION_1 | INDIRECT | MRG | packed);
            let stop = AtomicBool::new(false);
            let tables = [TX, RX].map(|i| g.drivers[i].at);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    let mut x = round + 1;
                    while !stop.load(Ordering::Relaxed) {
                        // xorshift64
                        x ^= x << 13;
                        x ^= x >> 7;
                        x ^= x << 17;
                        let [desc, avail, _] = tables[(x >> 60) as usize % 2];
                        let slot = 16 * (x >> 20 & u64::from(NUM - 1));
                        match x >> 50 & 7 {
                            // An address within memory, a length, flags, all that is in a descriptor.
                            0 => s
                                .memory
                                .write(desc + slot, &(x >> 30 & 0x3f_ffff).to_le_bytes()),
                            1..4 => s
                                .memory
                                .write(desc + slot + 8, &(x as u16 & 0xfff).to_le_bytes()),
                            4 | 5 => s.memory.write(desc + slot + 12, &[x as u8 & 7]),
                            6 => s.memory.write(desc + slot + 14, &[x as u8 & 0x87]),
                            _ => s.memory.write(avail + 4 + slot / 8, &[x as u8 & 0x7f]),
                        }
                    }
                });
                for n in 0..300u32 {
                    for d in [TX, RX] {
                        let at = 0x20_0000 + u64::from(n % 64) * 2048;
                        g.drivers[d].raw(&[(at, 1514, if d == TX { WRITE } else { 0 })]);
                    }
                    g.kick(RX);
                    if s.a.waiting() < 64 {
                        s.a.push(numbered(8, mac(9), n));
                    }
                }
                s.goes_on("beside rings that are rewritten");
                stop.store(true, Ordering::Relaxed);
            });
            drop(g);
            eventually("it has gone", || !s.evil.state().connected);
            s.memory.write(0x1000, &[0; 0x8000]);
            s.memory.write(HIGH, &[0; 0x8000]);
        }
        s.verdict();
    }
}

#[test]
fn rings_and_buffers_lose_their_memory_under_load_and_others_nothing() {
    lose_memory(0);
    lose_memory(PACKED);
}

fn lose_memory(packed: u64) {
    let s = Switch::new();
    let mut g = s.guest(VERSION_1 | packed);
    // The receive ring lies high, and with it what is flooded.
    g.offer();
    let [_, high] = g.regions();
    g.front.remove_mem_region(&high).unwrap();
    eventually("a reason", || {
        s.reason().contains("receive ring 0 is not in guest memory")
    });
    assert_eq!(s.evil.state().broken, 1);
    s.goes_on("after a ring's memory");
    // A buffer of the other one, in what is gone.
    g.drivers[RX].add(&[(HIGH + 0x1000, 100)], false, false);
    g.kick(RX);
    eventually("a reason", || s.reason().contains("not guest memory"));
    s.goes_on("after a buffer's memory");
    // The used ring where there is no memory.
    let mut at = g.addr(RX, false);
    at.used_ring_addr = UVA + 16 * REGION;
    g.front.set_vring_addr(RX, &at).unwrap();
    eventually("a reason", || {
        s.reason()
            .contains("transmit ring 0 is not in guest memory")
    });
    assert!(!s.evil.state().rx_running);
    s.goes_on("after a used ring's memory");
    drop(g);
    s.verdict();
}

/// Each ring of both layouts meets the truncated file at its next burst, wherever it looks first.
#[test]
fn a_ring_whose_memory_was_truncated_says_so() {
    for (packed, len) in [0, PACKED]
        .map(|p| [0, 0x8000].map(|len| (p, len)))
        .concat()
    {
        let mut w = World::new(VERSION_1 | packed);
        for n in 0..8 {
            let mut bytes = vec![0; 12];
            bytes.extend(frame(n, 1000));
            assert!(w.rx.driver.send(&bytes, 1, false));
            assert!(
                w.tx.driver
                    .add(&[(HIGH + 0x10_0000, 2000)], true, false)
                    .is_some()
            );
        }
        let mut out = Burst::new();
        w.rx.queue.burst(&mut out);
        // With frames in hand that point there.
        w.memory.0.set_len(len).unwrap();
        for f in &out {
            bytes(f);
        }
        drop(out);
        w.rx.queue.release(8);
        let f = frame(1, 500);
        w.tx.queue.send(&Frame::from_slice(VnetHdr::default(), &f));
        w.tx.queue.flush();
        let mut out = Burst::new();
        w.rx.queue.burst(&mut out);
        assert!(out.is_empty());
        drop(out);
        let sent = w.tx.queue.send(&Frame::from_slice(VnetHdr::default(), &f));
        assert_eq!(sent, Sent::Never(NeverReason::RingBroken));
        for control in [&w.rx.control, &w.tx.control] {
            assert_eq!(control.broken(), Some(Broken::MemoryLost), "{len:#x}");
        }
        assert_eq!(w.rx.queue.errors().ring_broken, 1);
        assert_eq!(raised(&w.rx.alarm), 1);
    }
}

#[test]
fn a_ring_whose_dirty_log_was_truncated_says_so() {
    for packed in [0, PACKED] {
        let mut w = World::logged(VERSION_1 | packed, true);
        w.log_file.set_len(0).unwrap();
        let mut bytes = vec![0; 12];
        bytes.extend(frame(1, 1000));
        assert!(w.rx.driver.send(&bytes, 1, false));
        let mut out = Burst::new();
        w.rx.queue.burst(&mut out);
        drop(out);
        w.rx.queue.release(1);
        w.rx.queue.burst(&mut Burst::new());
        assert_eq!(w.rx.control.broken(), Some(Broken::LogLost));
    }
}

#[test]
fn a_truncated_file_of_guest_memory_costs_its_own_port_only() {
    for packed in [0, PACKED] {
        let mut s = Switch::new();
        let mut g = s.guest(VERSION_1 | packed);
        eventually("the port is well", || s.reason().is_empty());
        for n in 0..u32::from(NUM) {
            assert!(g.send(&numbered(9, mac(2), n)));
        }
        g.kick(RX);
        s.memory.0.set_len(REGION / 2).unwrap();
        s.memory.0.set_len(0).unwrap();
        g.kick(RX);
        eventually("a reason", || s.reason().contains("guest memory lost"));
        eventually("it is counted", || s.rings_broken() == 1);
        s.goes_on("after the guest's memory");
        drop(g);
        eventually("it has gone", || !s.evil.state().connected);
        // A new front-end with memory of its own is served.
        s.memory = Memory::new();
        let mut g = s.guest(VERSION_1 | packed);
        eventually("the port is well", || s.reason().is_empty());
        let broadcast = numbered(9, MacAddr::BROADCAST, 7);
        assert!(g.send(&broadcast));
        g.kick(RX);
        eventually("its frame", || s.b.delivered().contains(&broadcast));
        drop(g);
        s.verdict();
    }
}

/// The destination is rewritten while the switch looks: what it decided on is what it delivers.
#[test]
fn a_buffer_that_is_rewritten_is_delivered_as_it_was_looked_at() {
    rewrite(0);
    rewrite(PACKED);
}

fn rewrite(packed: u64) {
    let s = Switch::new();
    let mut g = s.guest(VERSION_1 | packed);
    s.engine.shared().fdb.set(mac(9), 2, true, 0);
    let mut bytes = vec![0; 12];
    bytes.extend(numbered(9, mac(2), 0));
    let stop = Arc::new(AtomicBool::new(false));
    let at = 0x20_0000;
    let writer = std::thread::spawn({
        let (stop, memory) = (stop.clone(), s.memory.clone());
        move || {
            let mut n = 0u8;
            while !stop.load(Ordering::Relaxed) {
                n = n.wrapping_add(1);
                // The last byte of the destination: `a` or `b`.
                memory.write(at + 12 + 5, &[1 + n % 2]);
            }
        }
    });
    s.memory.write(at, &bytes);
    let mut back = 0;
    while back < 5000 {
        while g.drivers[RX]
            .add(&[(at, bytes.len() as u32)], false, false)
            .is_some()
        {}
        g.kick(RX);
        back += g.drivers[RX].reap().len();
    }
    stop.store(true, Ordering::Relaxed);
    writer.join().unwrap();
    let to_b = s.b.delivered();
    let evil: Vec<_> = to_b.iter().filter(|f| f[6..12] == mac(9).0).collect();
    assert!(!evil.is_empty());
    assert!(evil.iter().all(|f| f[..6] == mac(2).0));
    drop(g);
    s.verdict();
}

/// A request with a descriptor, from a front-end that has said nothing else.
fn pass(socket: &std::path::Path, words: &[u32], fd: BorrowedFd<'_>) -> UnixStream {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    let mut stream = None;
    eventually("it listens", || {
        stream = UnixStream::connect(socket).ok();
        stream.is_some()
    });
    let stream = stream.unwrap();
    let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [fd];
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    let parts = [std::io::IoSlice::new(&bytes)];
    sendmsg(&stream, &parts, &mut control, SendFlags::empty()).unwrap();
    stream
}

#[test]
fn descriptors_that_are_no_eventfds_are_refused() {
    let s = Switch::new();
    let (_read, write) = rustix::pipe::pipe().unwrap();
    // SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR.
    for (request, what) in [(12, "kick"), (13, "call"), (14, "error")] {
        let _stream = pass(&s.socket, &[request, 1, 8, 1, 0], write.as_fd());
        let why = format!("ring 1: the {what} descriptor is no eventfd");
        eventually(&why, || s.reason().contains(&why));
        s.goes_on("while it is refused");
        eventually("it has gone", || !s.evil.state().connected);
    }
    s.verdict();
}

/// The flag is the front-end's as much as ours.
#[test]
fn a_kick_that_was_made_blocking_again_stalls_nobody() {
    let s = Switch::new();
    let mut g = s.guest(VERSION_1);
    eventually("the port is well", || s.reason().is_empty());
    g.block_kick(RX);
    // The worker sleeps and is woken by the other port, with no kick to read.
    s.stop.store(true, Ordering::Relaxed);
    for n in 0..20 {
        std::thread::sleep(std::time::Duration::from_millis(5));
        let had = s.b.delivered_count();
        s.a.push(numbered(8, mac(2), n));
        eventually("the frame of the other port", || {
            s.b.delivered_count() > had
        });
    }
    let broadcast = numbered(9, MacAddr::BROADCAST, 7);
    assert!(g.send(&broadcast));
    g.kick(RX);
    eventually("its frame", || s.b.delivered().contains(&broadcast));
    drop(g);
    s.verdict();
}

/// So is a call's, and a full one cannot be written without waiting: the worker is got out of it, once for a front-end.
#[test]
fn a_call_that_was_made_blocking_again_and_filled_ends_its_front_end_and_stalls_nobody() {
    for (packed, ring) in [(0, TX), (0, RX), (PACKED, TX), (PACKED, RX)] {
        let s = Switch::new();
        s.engine.shared().fdb.set(mac(9), 2, true, 0);
        for n in 1..=2 {
            let mut g = s.guest(VERSION_1 | packed);
            eventually("the port is well", || s.reason().is_empty());
            g.block_call(ring);
            let which = if ring == TX {
                g.offer();
                s.a.push(numbered(8, mac(9), 0));
                "guest's receive ring 0 is broken"
            } else {
                assert!(g.send(&numbered(9, MacAddr::BROADCAST, n)));
                g.kick(RX);
                "guest's transmit ring 0 is broken"
            };
            eventually("it has gone", || !s.evil.state().connected);
            eventually("a reason", || {
                let reason = s.reason();
                reason.contains(which) && reason.contains("its call descriptor blocks")
            });
            assert_eq!(s.evil.state().broken, u64::from(n));
            s.goes_on("after a call that blocks");
            drop(g);
            s.memory.write(0x1000, &[0; 0x8000]);
            s.memory.write(HIGH, &[0; 0x8000]);
        }
        s.verdict();
    }
}

#[test]
fn a_socket_that_speaks_out_of_turn_disturbs_nobody() {
    let s = Switch::new();
    eventually("it listens", || s.socket.exists());
    // Unknown; a reply; SET_FEATURES beyond the offer; memory without a descriptor; a ring 255; half a header.
    let messages: [&[u32]; 6] = [
        &[99, 1, 0],
        &[1, 5, 8, 0, 0],
        &[2, 1, 8, !0, !0],
        &[5, 1, 4, 0],
        &[8, 1, 8, 255, 64],
        &[1, 1],
    ];
    for words in messages {
        let mut socket = None;
        eventually("it listens", || {
            socket = UnixStream::connect(&s.socket).ok();
            socket.is_some()
        });
        let mut socket = socket.unwrap();
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
        socket.write_all(&bytes).unwrap();
        s.goes_on("while it speaks");
        socket.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(socket.read(&mut [0; 64]).unwrap_or(0), 0, "{words:?}");
        eventually("a reason", || {
            s.reason().contains("no vhost-user front-end")
        });
    }
    // GET_VRING_BASE of a ring that has moved nothing, then frames all the same.
    let mut g = s.guest(VERSION_1);
    assert_eq!(g.front.get_vring_base(TX).unwrap(), 0);
    let broadcast = numbered(9, MacAddr::BROADCAST, 7);
    assert!(g.send(&broadcast));
    g.kick(RX);
    eventually("its frame", || s.b.delivered().contains(&broadcast));
    drop(g);
    s.verdict();
}
