//! A port against the `vhost` crate's front-end, over a real socket.

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vhost::VhostBackend;
use vhost::vhost_user::message::VhostUserProtocolFeatures as Protocol;
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostUserDirtyLogRegion, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::port::vhost::features::{LOG_ALL, MQ, PROTOCOL_FEATURES};
use crate::port::vhost::{VhostConfig, VhostPort, spawn};
use crate::port::{Attach, Burst, Frame, RxQueue, Sent, TxQueue, VnetHdr};

/// An engine with one port and no worker.
#[derive(Default)]
struct Engine {
    rx: Mutex<Option<Box<dyn RxQueue>>>,
    tx: Mutex<Option<Box<dyn TxQueue>>>,
    errors: Mutex<Vec<Option<String>>>,
    /// Receive queues behind the first that are there.
    more: Mutex<Vec<u16>>,
    /// The transmit queues of each call.
    sets: Mutex<Vec<Vec<u16>>>,
}

impl Attach for Engine {
    fn attach_rx(&self, _: usize, queue: u16, rx: Box<dyn RxQueue>) -> Option<Box<dyn RxQueue>> {
        if queue > 0 {
            self.more.lock().unwrap().push(queue);
            return None;
        }
        self.rx.lock().unwrap().replace(rx)
    }
    fn detach_rx(&self, _: usize, queue: u16) -> Option<Box<dyn RxQueue>> {
        if queue > 0 {
            self.more.lock().unwrap().retain(|q| *q != queue);
            return None;
        }
        self.rx.lock().unwrap().take()
    }
    fn set_tx(&self, _: usize, queues: Vec<(u16, Box<dyn TxQueue>)>) {
        let all = queues.iter().map(|(q, _)| *q).collect();
        self.sets.lock().unwrap().push(all);
        for (queue, tx) in queues {
            if queue == 0 {
                *self.tx.lock().unwrap() = Some(tx);
            }
        }
    }
    fn clear_tx(&self, _: usize, queue: u16) {
        if queue == 0 {
            *self.tx.lock().unwrap() = None;
        }
    }
    fn port_error(&self, _: usize, error: Option<String>) {
        self.errors.lock().unwrap().push(error);
    }
}

impl Engine {
    /// Takes a burst and gives `release` frames of it back.
    fn take(&self, release: usize) -> Vec<Vec<u8>> {
        let mut rx = self.rx.lock().unwrap();
        let Some(rx) = rx.as_mut() else { return vec![] };
        let mut out = Burst::new();
        rx.burst(&mut out);
        let frames: Vec<_> = out.iter().map(bytes).collect();
        drop(out);
        rx.release(release.min(frames.len()));
        frames
    }
    fn send(&self, f: &[u8]) -> Sent {
        let mut tx = self.tx.lock().unwrap();
        let Some(tx) = tx.as_mut() else {
            return Sent::Down;
        };
        let sent = tx.send(&Frame::from_slice(VnetHdr::default(), f));
        tx.flush();
        sent
    }
}

fn until(what: &str, mut f: impl FnMut() -> bool) {
    let since = Instant::now();
    while !f() {
        assert!(since.elapsed() < Duration::from_secs(20), "never: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A guest with its front-end.
pub(super) struct Guest {
    pub(super) memory: Memory,
    pub(super) front: Frontend,
    pub(super) drivers: [Driver; 2],
    calls: [EventFd; 2],
    kicks: [EventFd; 2],
    bits: u64,
}

pub(super) const TX: usize = 0;
pub(super) const RX: usize = 1;

impl Guest {
    pub(super) fn connect(
        path: &Path,
        memory: &Memory,
        drivers: Option<[Driver; 2]>,
        bits: u64,
    ) -> Guest {
        let mut front = None;
        until("the port listens", || {
            front = Frontend::connect(path, 4).ok();
            front.is_some()
        });
        let drivers = drivers.unwrap_or_else(|| {
            [
                Driver::new(memory, NUM, HIGH, HIGH + 0x10_0000, bits),
                Driver::new(memory, NUM, 0x1000, 0x10_0000, bits),
            ]
        });
        let event = || EventFd::new(libc::EFD_NONBLOCK).unwrap();
        Guest {
            memory: memory.clone(),
            front: front.unwrap(),
            drivers,
            calls: [event(), event()],
            kicks: [event(), event()],
            bits: bits | PROTOCOL_FEATURES,
        }
    }

    /// As QEMU negotiates.
    pub(super) fn negotiate(&mut self) {
        let offered = self.front.get_features().unwrap();
        assert_eq!(self.bits & !offered, 0);
        let protocol = self.front.get_protocol_features().unwrap();
        let want = Protocol::LOG_SHMFD
            | Protocol::REPLY_ACK
            | Protocol::CONFIGURE_MEM_SLOTS
            | Protocol::MQ;
        assert_eq!(protocol, want);
        self.front.set_protocol_features(want).unwrap();
        // No GET_QUEUE_NUM here: this front-end takes the number for rings, QEMU's network device for pairs.
        self.front.set_owner().unwrap();
        self.front.set_features(self.bits).unwrap();
        use vhost::vhost_user::message::VhostUserHeaderFlag;
        self.front.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    }

    pub(super) fn regions(&self) -> [VhostUserMemoryRegionInfo; 2] {
        [(0, UVA, 0), (HIGH, UVA + REGION, REGION)].map(|(gpa, uva, offset)| {
            VhostUserMemoryRegionInfo {
                guest_phys_addr: gpa,
                memory_size: REGION,
                userspace_addr: uva,
                mmap_offset: offset,
                mmap_handle: self.memory.0.as_raw_fd(),
            }
        })
    }

    pub(super) fn addr(&self, i: usize, log: bool) -> VringConfigData {
        let [desc, avail, used] = self.drivers[i].at.map(|gpa| UVA + Memory::offset(gpa));
        VringConfigData {
            queue_max_size: NUM,
            queue_size: NUM,
            flags: u32::from(log),
            desc_table_addr: desc,
            used_ring_addr: used,
            avail_ring_addr: avail,
            log_addr: log.then_some(self.drivers[i].at[2]),
        }
    }

    /// As QEMU starts a device.
    pub(super) fn start(&mut self, bases: [u16; 2]) {
        for i in [TX, RX] {
            self.front.set_vring_enable(i, true).unwrap();
        }
        let regions = self.regions();
        self.front.set_mem_table(&regions).unwrap();
        for (i, base) in bases.into_iter().enumerate() {
            self.front.set_vring_num(i, NUM).unwrap();
            self.front.set_vring_base(i, base).unwrap();
            self.front.set_vring_addr(i, &self.addr(i, false)).unwrap();
            self.front.set_vring_kick(i, &self.kicks[i]).unwrap();
            self.front.set_vring_call(i, &self.calls[i]).unwrap();
        }
    }

    pub(super) fn stop(&mut self) -> [u16; 2] {
        [TX, RX].map(|i| self.front.get_vring_base(i).unwrap() as u16)
    }

    pub(super) fn send(&mut self, f: &[u8]) -> bool {
        let mut b = vec![0; 12];
        b.extend(f);
        self.drivers[RX].send(&b, 1, false)
    }

    pub(super) fn kick(&self, i: usize) {
        self.kicks[i].write(1).unwrap();
    }

    /// Lets a read of the kick wait.
    pub(super) fn block_kick(&self, i: usize) {
        block(&self.kicks[i]);
    }

    /// Lets the next call wait, for good.
    pub(super) fn block_call(&self, i: usize) {
        let _ = self.calls[i].read();
        block(&self.calls[i]);
        self.calls[i].write(u64::MAX - 1).unwrap();
    }

    pub(super) fn offer(&mut self) {
        let d = &mut self.drivers[TX];
        while d.free_descs() > 0 {
            let buffer = (d.alloc(2048), 2048);
            d.add(&[buffer], true, false);
        }
    }

    fn received(&mut self) -> Vec<Vec<u8>> {
        self.drivers[TX]
            .received(12, false)
            .into_iter()
            .map(|(_, f)| f)
            .collect()
    }
}

/// Takes the flag that does not let it wait from the file that both sides have.
fn block(fd: &EventFd) {
    use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};
    let process = pidfd_open(getpid(), PidfdFlags::empty()).unwrap();
    let fd = pidfd_getfd(&process, fd.as_raw_fd(), PidfdGetfdFlags::empty()).unwrap();
    let flags = rustix::fs::fcntl_getfl(&fd).unwrap();
    assert!(flags.contains(rustix::fs::OFlags::NONBLOCK));
    rustix::fs::fcntl_setfl(&fd, flags - rustix::fs::OFlags::NONBLOCK).unwrap();
}

struct Setup {
    dir: tempfile::TempDir,
    engine: Arc<Engine>,
    port: VhostPort,
    memory: Memory,
}

impl Setup {
    fn new() -> Setup {
        Setup::with(|_| None)
    }

    /// Behind a keeper, which has made the file.
    fn kept() -> Setup {
        Setup::with(|dir| {
            let file = dir.join("s.positions");
            std::fs::write(&file, []).unwrap();
            Some(file)
        })
    }

    fn with(positions: impl FnOnce(&Path) -> Option<std::path::PathBuf>) -> Setup {
        let dir = tempfile::tempdir().unwrap();
        let positions = positions(dir.path());
        let engine = Arc::new(Engine::default());
        let cfg = VhostConfig {
            name: "p".into(),
            slot: 0,
            socket: dir.path().join("s"),
            server: true,
            positions,
        };
        let port = spawn(cfg, engine.clone()).unwrap();
        Setup {
            dir,
            engine,
            port,
            memory: Memory::new(),
        }
    }

    fn guest(&self, drivers: Option<[Driver; 2]>) -> Guest {
        self.guest_with(drivers, VERSION_1 | EVENT_IDX)
    }

    fn guest_with(&self, drivers: Option<[Driver; 2]>, bits: u64) -> Guest {
        let socket = self.dir.path().join("s");
        Guest::connect(&socket, &self.memory, drivers, bits)
    }

    /// The next run of a switch, as a keeper begins with it.
    fn again(&self, g: Guest) -> Guest {
        let Guest {
            drivers,
            front,
            bits,
            ..
        } = g;
        drop(front);
        until("the queues are gone", || {
            self.engine.rx.lock().unwrap().is_none() && !self.port.state().connected
        });
        let mut g = self.guest_with(Some(drivers), bits & !PROTOCOL_FEATURES);
        g.negotiate();
        g
    }

    fn started(&self) -> Guest {
        let mut g = self.guest(None);
        g.negotiate();
        g.start([0, 0]);
        g
    }
}

#[test]
fn frames_flow_both_ways_and_the_socket_is_private() {
    use std::os::unix::fs::PermissionsExt;
    let s = Setup::new();
    let mut g = s.started();
    let mode = std::fs::metadata(s.dir.path().join("s"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    let state = s.port.state();
    assert!(state.connected && state.rx_running && state.tx_running && !state.logging);
    assert_eq!(state.features & VERSION_1, VERSION_1);
    assert!(s.engine.errors.lock().unwrap().last().unwrap().is_none());
    assert!(g.send(&frame(1, 100)));
    assert_eq!(s.engine.take(1), [frame(1, 100)]);
    g.offer();
    assert_eq!(s.engine.send(&frame(2, 200)), Sent::Yes);
    assert_eq!(g.received(), [frame(2, 200)]);
    assert!(g.calls[TX].read().unwrap() >= 1);
    s.port.stop();
    assert!(s.engine.rx.lock().unwrap().is_none() && s.engine.tx.lock().unwrap().is_none());
    assert!(!s.dir.path().join("s").exists());
}

#[test]
fn a_stop_keeps_what_was_not_released() {
    let s = Setup::new();
    let mut g = s.started();
    for i in 0..10 {
        assert!(g.send(&frame(i, 60)));
    }
    g.offer();
    assert_eq!(s.engine.take(4).len(), 10);
    assert_eq!(s.engine.send(&frame(99, 60)), Sent::Yes);
    assert_eq!(g.stop(), [1, 4]);
    assert!(!s.port.state().rx_running && !s.port.state().tx_running);
    assert!(s.engine.take(9).is_empty());
    assert_eq!(s.engine.send(&frame(98, 60)), Sent::Down);
    // A stopped ring does not start by itself.
    g.front.set_vring_enable(RX, true).unwrap();
    assert!(!s.port.state().rx_running);
    g.start([1, 4]);
    let want: Vec<_> = (4..10).map(|i| frame(i, 60)).collect();
    assert_eq!(s.engine.take(6), want);
    assert_eq!(s.engine.send(&frame(97, 60)), Sent::Yes);
    assert_eq!(g.received(), [frame(99, 60), frame(97, 60)]);
    assert_eq!(g.drivers[RX].reap().len(), 10);
    assert_eq!(s.port.state().resumed, 0);
}

#[test]
fn a_disabled_ring_discards_nothing() {
    let s = Setup::new();
    let mut g = s.started();
    assert!(g.send(&frame(1, 60)));
    g.front.set_vring_enable(RX, false).unwrap();
    assert!(s.engine.take(1).is_empty());
    assert!(g.send(&frame(2, 60)));
    g.front.set_vring_enable(RX, true).unwrap();
    assert_eq!(s.engine.take(2), [frame(1, 60), frame(2, 60)]);
}

#[test]
fn a_reconnect_finds_what_was_not_released() {
    let s = Setup::new();
    let mut g = s.started();
    for i in 0..6 {
        assert!(g.send(&frame(i, 60)));
    }
    g.offer();
    assert_eq!(s.engine.take(2).len(), 6);
    assert_eq!(s.engine.send(&frame(50, 60)), Sent::Yes);
    let Guest { drivers, front, .. } = g;
    drop(front);
    until("the queues are gone", || {
        s.engine.rx.lock().unwrap().is_none() && !s.port.state().connected
    });
    assert_eq!(s.engine.send(&frame(51, 60)), Sent::Down);
    let last = s.engine.errors.lock().unwrap().last().cloned();
    assert!(last.unwrap().is_some());
    let mut g = s.guest(Some(drivers));
    g.negotiate();
    // QEMU takes the used index of guest memory after a crash.
    g.start([1, 2]);
    let want: Vec<_> = (2..6).map(|i| frame(i, 60)).collect();
    assert_eq!(s.engine.take(4), want);
    assert_eq!(s.engine.send(&frame(52, 60)), Sent::Yes);
    assert_eq!(g.received(), [frame(50, 60), frame(52, 60)]);
    assert_eq!(s.port.state().connections, 2);
}

#[test]
fn what_another_back_end_left_unfinished_is_taken_up() {
    let s = Setup::new();
    let mut g = s.guest(None);
    g.negotiate();
    for i in 0..6 {
        assert!(g.send(&frame(i, 60)));
    }
    g.start([0, 5]);
    assert_eq!(s.engine.take(6).len(), 6);
    assert_eq!(s.port.state().resumed, 1);
}

#[test]
fn memory_comes_and_goes_under_running_rings() {
    let s = Setup::new();
    let mut g = s.guest(None);
    g.negotiate();
    for i in [TX, RX] {
        g.front.set_vring_enable(i, true).unwrap();
    }
    // One slot at a time, as QEMU does with CONFIGURE_MEM_SLOTS.
    let [low, high] = g.regions();
    assert!(g.front.get_max_mem_slots().unwrap() >= 8);
    g.front.add_mem_region(&low).unwrap();
    for i in [TX, RX] {
        g.front.set_vring_num(i, NUM).unwrap();
        g.front.set_vring_base(i, 0).unwrap();
        g.front.set_vring_addr(i, &g.addr(i, false)).unwrap();
        g.front.set_vring_kick(i, &g.kicks[i]).unwrap();
        g.front.set_vring_call(i, &g.calls[i]).unwrap();
    }
    assert!(s.port.state().rx_running, "its ring lies low");
    assert!(!s.port.state().tx_running, "its ring lies high");
    assert!(g.send(&frame(1, 60)));
    g.front.add_mem_region(&high).unwrap();
    assert!(s.port.state().tx_running);
    assert_eq!(s.engine.take(1), [frame(1, 60)]);
    g.offer();
    assert_eq!(s.engine.send(&frame(2, 60)), Sent::Yes);
    // A buffer in the region that was added.
    let mut b = vec![0; 12];
    b.extend(frame(3, 60));
    let at = HIGH + REGION - 72;
    g.memory.write(at, &b);
    g.drivers[RX].add(&[(at, 72)], false, false);
    assert_eq!(s.engine.take(1), [frame(3, 60)]);
    let regions = g.regions();
    g.front.set_mem_table(&regions).unwrap();
    assert_eq!(s.engine.send(&frame(4, 60)), Sent::Yes);
    g.front.remove_mem_region(&high).unwrap();
    assert!(!s.port.state().tx_running && s.port.state().rx_running);
    assert_eq!(g.received(), [frame(2, 60), frame(4, 60)]);
    assert_eq!(g.front.get_vring_base(TX).unwrap(), 2);
}

/// As behind a change of switches: the keeper tells the new one the position of the connection's begin.
#[test]
fn the_position_of_a_ring_that_does_not_run_is_the_rings_own() {
    let s = Setup::new();
    let mut g = s.started();
    assert!(g.send(&frame(1, 60)));
    assert_eq!(s.engine.take(1), [frame(1, 60)]);
    g.front.set_vring_enable(RX, false).unwrap();
    g.front.set_vring_base(RX, 0).unwrap();
    assert_eq!(g.front.get_vring_base(RX).unwrap(), 1);
}

#[test]
fn a_packed_ring_goes_on_where_it_was_whatever_the_next_run_is_told_of_its_base() {
    const BEGIN: u16 = packed::START;
    let s = Setup::kept();
    let mut g = s.guest_with(None, VERSION_1 | EVENT_IDX | PACKED);
    g.negotiate();
    g.start([BEGIN; 2]);
    let mut n = 0;
    let mut next = |g: &mut Guest| {
        n += 1;
        assert!(g.send(&frame(n, 60)));
        assert_eq!(s.engine.take(1), [frame(n, 60)], "the {n}th frame");
        n as u16
    };
    next(&mut g);
    next(&mut g);
    g.offer();
    assert_eq!(s.engine.send(&frame(50, 60)), Sent::Yes);
    // Disabled, and enabled only under the next switch.
    g.front.set_vring_enable(RX, false).unwrap();
    let mut g = s.again(g);
    g.start([BEGIN; 2]);
    assert_eq!(s.engine.send(&frame(51, 60)), Sent::Yes);
    assert_eq!(g.received(), [frame(50, 60), frame(51, 60)]);
    let last = next(&mut g);

    // Asked for before it runs: a keeper does not tell the base of a ring that is about to end.
    let told = |g: Guest| {
        let g = s.again(g);
        let regions = g.regions();
        g.front.set_mem_table(&regions).unwrap();
        for i in [TX, RX] {
            g.front.set_vring_num(i, NUM).unwrap();
            g.front.set_vring_addr(i, &g.addr(i, false)).unwrap();
        }
        g
    };
    let mut g = told(g);
    let at = g.stop();
    assert_eq!(at, [BEGIN | 2, BEGIN | last]);
    // Once more, as the one that has stopped it may not have come to answer.
    let mut g = told(g);
    assert_eq!(g.stop(), at);

    // It goes on there.
    g.start(at);
    next(&mut g);
    let at = g.stop();
    let mut g = s.again(g);
    g.start(at);
    next(&mut g);

    // The guest resets it.
    g.stop();
    s.memory.write(0x1000, &[0; 0x8000]);
    s.memory.write(HIGH, &[0; 0x8000]);
    let bits = VERSION_1 | EVENT_IDX | PACKED;
    g.drivers = [
        Driver::new(&s.memory, NUM, HIGH, HIGH + 0x10_0000, bits),
        Driver::new(&s.memory, NUM, 0x1000, 0x10_0000, bits),
    ];
    g.start([BEGIN; 2]);
    next(&mut g);
    assert_eq!(s.port.state().connections, 5);
}

#[test]
fn a_packed_ring_of_which_nothing_can_be_read_is_not_guessed() {
    let s = Setup::kept();
    let mut g = s.guest_with(None, VERSION_1 | PACKED);
    g.negotiate();
    g.start([packed::START; 2]);
    assert!(g.send(&frame(1, 60)));
    assert_eq!(s.engine.take(1), [frame(1, 60)]);
    let mut g = {
        let Guest { drivers, front, .. } = g;
        drop(front);
        until("it is gone", || !s.port.state().connected);
        std::fs::write(s.dir.path().join("s.positions"), b"somebody else's").unwrap();
        let mut g = s.guest_with(Some(drivers), VERSION_1 | PACKED);
        g.negotiate();
        g
    };
    let regions = g.regions();
    g.front.set_mem_table(&regions).unwrap();
    g.front.set_vring_enable(RX, true).unwrap();
    g.front.set_vring_num(RX, NUM).unwrap();
    g.front.set_vring_base(RX, packed::START).unwrap();
    g.front.set_vring_addr(RX, &g.addr(RX, false)).unwrap();
    let _ = g.front.set_vring_kick(RX, &g.kicks[RX]);
    until("the connection ends", || !s.port.state().connected);
    let said = s.port.state().last_error.unwrap_or_default();
    assert!(said.contains("can be read of where it is"), "{said}");
}

#[test]
fn a_broken_ring_is_reported_once_and_heals_when_set_up_again() {
    let s = Setup::new();
    let mut g = s.started();
    g.drivers[RX].publish(1000);
    for _ in 0..3 {
        assert!(s.engine.take(1).is_empty());
    }
    let broken = || s.engine.errors.lock().unwrap().iter().flatten().count();
    until("it is reported", || broken() == 1);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(broken(), 1);
    assert_eq!(s.port.state().broken, 1);
    let bases = g.stop();
    g.drivers[RX].publish(0);
    g.start(bases);
    assert!(s.engine.errors.lock().unwrap().last().unwrap().is_none());
    assert!(g.send(&frame(1, 60)));
    assert_eq!(s.engine.take(1), [frame(1, 60)]);
}

/// Flips the log on and off while a worker delivers; each time that it is on, what the guest sees change is marked.
#[test]
fn the_log_is_switched_under_load() {
    let s = Setup::new();
    let mut g = s.started();
    let log = tempfile::tempfile().unwrap();
    log.set_len(LOG_BYTES).unwrap();
    let region = VhostUserDirtyLogRegion {
        mmap_size: LOG_BYTES,
        mmap_offset: 0,
        mmap_handle: log.as_raw_fd(),
    };
    g.front.set_log_base(0, Some(region)).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let worker = std::thread::spawn({
        let (stop, engine) = (stop.clone(), s.engine.clone());
        move || {
            let mut i = 0u64;
            while !stop.load(Ordering::Relaxed) {
                let f = frame(i, 60 + i as usize % 1400);
                if engine.send(&f) == Sent::Yes {
                    i += 1;
                }
                std::thread::yield_now();
            }
            i
        }
    });
    let mut seen = 0u64;
    for round in 0..30 {
        g.front.set_features(g.bits | LOG_ALL).unwrap();
        g.front.set_vring_addr(TX, &g.addr(TX, true)).unwrap();
        assert!(s.port.state().logging);
        // What is not marked since here must not have changed since here.
        log.write_all_at(&vec![0; LOG_BYTES as usize], 0).unwrap();
        let before = g.memory.read(HIGH, REGION as usize);
        for _ in 0..5 {
            for f in g.received() {
                assert_eq!(f, frame(seen, 60 + seen as usize % 1400));
                seen += 1;
            }
            std::thread::sleep(Duration::from_micros(300));
        }
        // Stop as a migration does, then compare.
        let bases = g.stop();
        let after = g.memory.read(HIGH, REGION as usize);
        let mut marks = vec![0; LOG_BYTES as usize];
        log.read_exact_at(&mut marks, 0).unwrap();
        // The driver's own writes to the available ring are not the device's: its page is left out.
        let avail = g.drivers[TX].at[1] / 4096;
        for (i, (a, b)) in before.chunks(4096).zip(after.chunks(4096)).enumerate() {
            let page = HIGH / 4096 + i as u64;
            let marked = marks[page as usize / 8] >> (page % 8) & 1 == 1;
            assert!(
                a == b || marked || page == avail,
                "round {round}: page {page:#x} is stale"
            );
        }
        g.front.set_features(g.bits).unwrap();
        g.start(bases);
        g.offer();
        std::thread::sleep(Duration::from_micros(500));
    }
    stop.store(true, Ordering::Relaxed);
    let sent = worker.join().unwrap();
    for f in g.received() {
        assert_eq!(f, frame(seen, 60 + seen as usize % 1400));
        seen += 1;
    }
    assert_eq!(seen, sent, "neither lost nor doubled");
    assert!(sent > 0);
    assert!(!s.port.state().logging);
}

/// QEMU's network device enables its rings before it sends features.
#[test]
fn enable_may_come_before_features() {
    let s = Setup::new();
    let path = s.dir.path().join("s");
    let mut socket = None;
    until("it listens", || {
        socket = UnixStream::connect(&path).ok();
        socket.is_some()
    });
    let mut socket = socket.unwrap();
    let mut ask = |words: &[u32], reply: usize| {
        let b: Vec<u8> = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
        socket.write_all(&b).unwrap();
        let mut r = vec![0; reply];
        socket.read_exact(&mut r).unwrap();
        r
    };
    // GET_FEATURES, then SET_PROTOCOL_FEATURES (REPLY_ACK), then SET_VRING_ENABLE with need_reply.
    ask(&[1, 1, 0], 20);
    ask(&[16, 1, 8, 8, 0], 0);
    let r = ask(&[18, 1 | 8, 8, 0, 1], 20);
    assert_eq!(r[..4], 18u32.to_ne_bytes());
    assert_eq!(r[12..], [0; 8]);
    let r = ask(&[18, 1 | 8, 8, 32, 1], 20);
    assert_eq!(r[12], 1, "there is no ring 32");
}

/// With several pairs: none of the receive rings is used before all that are enabled run, or keep us waiting.
#[test]
fn receive_rings_of_several_pairs_go_live_together() {
    for complete in [true, false] {
        let s = Setup::new();
        let mut g = Guest::connect(
            &s.dir.path().join("s"),
            &s.memory,
            None,
            VERSION_1 | EVENT_IDX | MQ,
        );
        g.negotiate();
        (2..4).for_each(|i| g.front.set_vring_enable(i, true).unwrap());
        g.start([0, 0]);
        assert!(
            s.engine.rx.lock().unwrap().is_some(),
            "what it sends is taken"
        );
        assert!(s.engine.sets.lock().unwrap().is_empty());
        let more = [
            Driver::new(&s.memory, NUM, HIGH + 0x8000, HIGH + 0x20_0000, VERSION_1),
            Driver::new(&s.memory, NUM, 0x8000, 0x20_0000, VERSION_1),
        ];
        g.drivers = more;
        for i in (0..2).filter(|_| complete) {
            g.front.set_vring_num(2 + i, NUM).unwrap();
            g.front.set_vring_base(2 + i, 0).unwrap();
            g.front.set_vring_addr(2 + i, &g.addr(i, false)).unwrap();
            g.front.set_vring_kick(2 + i, &g.kicks[i]).unwrap();
        }
        if complete {
            assert_eq!(*s.engine.sets.lock().unwrap(), [vec![0, 1]]);
            assert_eq!(*s.engine.more.lock().unwrap(), [1]);
            g.front.get_vring_base(3).unwrap();
            assert!(s.engine.more.lock().unwrap().is_empty());
        } else {
            until("it goes without", || {
                *s.engine.sets.lock().unwrap() == [vec![0]]
            });
        }
    }
}

#[test]
fn nonsense_ends_the_connection_and_nothing_else() {
    let s = Setup::new();
    let path = s.dir.path().join("s");
    until("it listens", || path.exists());
    for words in [
        vec![99u32, 1, 0],
        vec![18, 1, 8, 0, 2],
        vec![2, 1, 8, 0xffff_ffff, 0xffff_ffff],
        vec![5, 1, 4, 0],
    ] {
        let mut socket = None;
        until("it listens", || {
            socket = UnixStream::connect(&path).ok();
            socket.is_some()
        });
        let mut socket = socket.unwrap();
        let b: Vec<u8> = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
        socket.write_all(&b).unwrap();
        assert_eq!(socket.read(&mut [0; 8]).unwrap_or(0), 0, "{words:?}");
    }
    let mut g = s.started();
    assert!(g.send(&frame(1, 60)));
    assert_eq!(s.engine.take(1), [frame(1, 60)]);
}

#[test]
fn a_dialling_port_dials_again_and_stops_in_the_middle_of_a_message() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("q");
    let engine = Arc::new(Engine::default());
    let cfg = VhostConfig {
        name: "d".into(),
        slot: 0,
        socket: socket.clone(),
        server: false,
        positions: None,
    };
    let port = spawn(cfg, engine).unwrap();
    std::thread::sleep(Duration::from_millis(30));
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let (first, _) = listener.accept().unwrap();
    drop(first);
    let (mut second, _) = listener.accept().unwrap();
    until("it is there", || port.state().connections == 2);
    // Half a header.
    second.write_all(&[1, 0, 0, 0, 1]).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    port.stop();
}
