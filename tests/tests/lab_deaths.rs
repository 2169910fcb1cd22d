//! A switch that is killed again and again under load, behind a keeper: real processes, and a guest that numbers its frames.
//!
//! What a hold has accepted is there once, and in order (ADR-0021). What is forwarded is there once, or a burst of it twice; also what waits for
//! a receiver without room (ADR-0038).

use std::net::UdpSocket;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use gangway_benches::control::Control;
use gangway_benches::frames::{HEADER, frame, mac};
use gangway_benches::front::Front;
use gangway_benches::host::Process;
use gangway_benches::peer::{Gangway, Setup, Size, Switch};
use gangway_benches::ring::packed::Packed;
use gangway_benches::ring::split::Split;
use gangway_benches::ring::{Place, Ring};
use gangway_benches::sys::Memory;
use gangway_shared::api::{
    HoldOpen, HoldState, IncomingPort, IncomingPrepare, Reply, Request, Scope,
};
use gangway_shared::id::{HoldId, MacAddr};
use gangway_shared::pki::Role;
use tempfile::TempDir;

const NUM: u16 = 256;
const STRIDE: usize = 2112;
const RX_LEN: u32 = 2048;
const PAGE: usize = 4096;
/// Where a buffer has its frame's number.
const NUMBER: usize = HEADER + 44;
const BYTES: usize = 100;
const PATIENCE: Duration = Duration::from_secs(60);
/// Frames on their way, at most, while they are forwarded: the receiver has room for them.
const WINDOW: u64 = 200;
const SIZE: Size = Size {
    ports: 2,
    addresses: None,
};

fn binary(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../target/debug")
        .join(name)
}

/// A port's guest.
struct Station<R> {
    front: Front,
    memory: Arc<Memory>,
    rx: R,
    tx: R,
}

impl<R: Ring> Station<R> {
    fn start(socket: &Path, port: usize) -> Station<R> {
        let stream = until("the keeper", || {
            std::os::unix::net::UnixStream::connect(socket).ok()
        });
        let mut next = PAGE;
        let mut take = |bytes: usize| {
            let at = next;
            next += bytes.next_multiple_of(PAGE);
            at
        };
        let mut queue = || {
            let areas = Place::area_bytes(NUM).map(&mut take);
            (areas, take(usize::from(NUM) * STRIDE))
        };
        let (rx, tx) = (queue(), queue());
        let memory = Arc::new(Memory::new(next as u64).unwrap());
        let place = |(areas, buffers), len, device_writes| Place {
            memory: memory.clone(),
            areas,
            num: NUM,
            buffers,
            stride: STRIDE,
            len,
            device_writes,
        };
        let mut rx = R::new(place(rx, RX_LEN, true));
        let tx = R::new(place(tx, (HEADER + BYTES) as u32, false));
        for i in 0..NUM {
            memory.write(tx.place().buffer(i) + HEADER, &frame(BYTES, port, port ^ 1));
        }
        rx.publish(NUM);
        let front = Front::start(stream, R::LAYOUT, true, [rx.place(), tx.place()]);
        Station {
            front: front
                .unwrap()
                .unwrap_or_else(|_| panic!("{:?} rings", R::LAYOUT)),
            memory,
            rx,
            tx,
        }
    }
}

/// Two of them, and what was sent and has come.
struct Guests<R> {
    from: Station<R>,
    to: Station<R>,
    sent: u64,
    came: Vec<u64>,
}

impl<R: Ring> Guests<R> {
    /// Sends as much as there is room for, up to so many on their way, and takes what has come.
    fn turn(&mut self, window: u64) {
        self.send(window);
        self.take();
    }

    fn send(&mut self, window: u64) {
        self.from.tx.reap(1, |_, _| {});
        let mut n = 0;
        while self.from.tx.outstanding() + n < NUM
            && self.sent - self.came.last().copied().unwrap_or(0) < window
        {
            self.sent += 1;
            let at = self.from.tx.place().buffer(self.from.tx.next_buffer(n));
            self.from.memory.u64(at + NUMBER).store(self.sent, Relaxed);
            n += 1;
        }
        if n > 0 {
            self.from.tx.publish(n);
            if self.from.tx.wants_kick() {
                self.from.front.kick(1);
            }
        }
    }

    fn take(&mut self) {
        let (memory, buffers) = (&self.to.memory, self.to.rx.place().buffers);
        let came = &mut self.came;
        let n = self.to.rx.reap(1, |buffer, _| {
            let at = buffers + usize::from(buffer) * STRIDE;
            came.push(memory.u64(at + NUMBER).load(Relaxed));
        });
        if n > 0 {
            self.to.rx.publish(n);
            if self.to.rx.wants_kick() {
                self.to.front.kick(0);
            }
        }
        if n == 0 {
            std::thread::sleep(Duration::from_micros(20));
        }
    }

    fn turns(&mut self, time: Duration, window: u64) {
        let since = Instant::now();
        while since.elapsed() < time {
            self.turn(window);
        }
    }

    /// Numbers that are missing, and how many frames came twice; each is in order, but for what is repeated.
    fn judge(&self) -> (Vec<u64>, usize) {
        let (mut next, mut twice, mut missing) = (1, 0, Vec::new());
        for &n in &self.came {
            if n < next {
                twice += 1;
                continue;
            }
            missing.extend(next..n);
            next = n + 1;
        }
        missing.extend(next..=self.sent);
        (missing, twice)
    }
}

fn until<T>(what: &str, mut found: impl FnMut() -> Option<T>) -> T {
    let since = Instant::now();
    loop {
        if let Some(t) = found() {
            return t;
        }
        assert!(since.elapsed() < PATIENCE, "no {what} after {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A source whose switch dies, with a keeper, and a target. Processes drop before their folder.
struct World<R> {
    guests: Guests<R>,
    near: Option<Gangway>,
    _far: Gangway,
    _keeper: Process,
    setup: Setup,
    far: Control,
    address: String,
    dir: TempDir,
    /// Of the times between deaths.
    random: u64,
}

impl<R: Ring> World<R> {
    fn new() -> World<R> {
        World::at(TempDir::new().unwrap())
    }

    fn at(dir: TempDir) -> World<R> {
        let pki = dir.path().join("pki");
        let ok =
            |r: Result<_, gangway::exit::Failure>| r.unwrap_or_else(|f| panic!("{}", f.message));
        ok(gangway::pki::init(&pki).map(drop));
        let setup = |host: &str, kept| {
            ok(gangway::pki::issue(&pki, host, Role::Host, &[]).map(drop));
            let any = UdpSocket::bind("127.0.0.1:0").unwrap();
            let address = any.local_addr().unwrap();
            let spool = dir.path().join(host).join("spool");
            Setup {
                host: host.to_owned(),
                sleeps: true,
                spool: format!("dir = \"{}\"\nquota_bytes = 1073741824\n", spool.display()),
                vms: true,
                listen: Some((address, pki.clone())),
                kept,
            }
        };
        let (source, target) = (setup("source", true), setup("target", false));
        let start = |s: &Setup, cpu| {
            Gangway::start(&binary("gangway-switch"), dir.path(), s, SIZE, &[cpu]).unwrap()
        };
        let far = start(&target, 1);
        // A switch's child dies with the thread that has started it, so all are started here; the switch waits for the keeper's sockets.
        let file = source.write(dir.path(), SIZE, &[0]).unwrap();
        let mut command = Command::new(binary("gangway-keeper"));
        command.arg("--config").arg(&file);
        let log = dir.path().join("keeper.log");
        let keeper = Process::start("gangway-keeper", command, &log).unwrap();
        until("the keeper", || {
            dir.path().join("source/kept").exists().then_some(())
        });
        let near = start(&source, 0);
        let sockets = near.sockets().0.to_vec();
        World {
            guests: Guests {
                from: Station::start(&sockets[0], 0),
                to: Station::start(&sockets[1], 1),
                sent: 0,
                came: Vec::new(),
            },
            far: Control::connect(&target.control(dir.path())).unwrap(),
            address: target.listen.as_ref().unwrap().0.to_string(),
            near: Some(near),
            _far: far,
            _keeper: keeper,
            setup: source,
            random: Instant::now().elapsed().as_nanos() as u64 ^ u64::from(std::process::id()),
            dir,
        }
    }

    fn control(&self) -> Control {
        let socket = self.setup.control(self.dir.path());
        until("control", || Control::connect(&socket).ok())
    }

    /// Kills the switch at some moment, and starts the next one; the guests go on.
    fn die(&mut self, window: u64, after: Duration) {
        self.random = self
            .random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        let time = after + Duration::from_micros((self.random >> 33) % 60_000);
        self.guests.turns(time, window);
        self.die_now(window);
    }

    fn die_now(&mut self, window: u64) {
        // Dropping kills it (SIGKILL).
        self.near = None;
        let near = Gangway::start(
            &binary("gangway-switch"),
            self.dir.path(),
            &self.setup,
            SIZE,
            &[0],
        );
        self.near = Some(near.unwrap());
        drop(self.control());
        let since = Instant::now();
        if window == NO_WINDOW {
            // It has taken something.
            while self.guests.from.tx.outstanding() == NUM {
                self.guests.from.tx.reap(1, |_, _| {});
                assert!(
                    since.elapsed() < PATIENCE,
                    "nothing is taken: {}",
                    self.said()
                );
            }
        } else if window > 0 {
            // What it takes before the receiver's port is there again is in its memory.
            let sent = self.guests.sent;
            while self.guests.came.last().is_none_or(|n| *n < sent) {
                self.guests.turn(window);
                assert!(since.elapsed() < PATIENCE, "nothing comes: {}", self.said());
            }
        }
    }

    /// The end of the switch's log.
    fn said(&mut self) -> String {
        let near = self.near.as_mut();
        near.map_or_else(String::new, |n| n.process().said())
    }

    /// All that was sent has come.
    fn settle(&mut self) {
        let since = Instant::now();
        let last = self.guests.sent;
        while self.guests.came.iter().rev().take(64).all(|n| *n != last) {
            self.guests.turn(0);
            assert!(
                since.elapsed() < PATIENCE,
                "{} frames were sent, {} came; the switch says:\n{}",
                last,
                self.guests.came.len(),
                self.near
                    .as_mut()
                    .map_or_else(String::new, |n| n.process().said())
            );
        }
        // What comes twice comes now.
        self.guests.turns(Duration::from_millis(100), 0);
    }

    /// The second port's VM is held.
    fn hold(&mut self, hold: HoldId) {
        let (vm, ticket) = (Setup::port(1), [7; 32]);
        let arriving = IncomingPort {
            name: vm.clone(),
            vm: vm.clone(),
            mac: Some(MacAddr(mac(1))),
        };
        let prepare = IncomingPrepare {
            hold,
            vms: vec![vm.clone()],
            ports: vec![arriving],
            source_host: "source".to_owned(),
            ticket,
        };
        self.far.call(&Request::IncomingPrepare(prepare)).unwrap();
        let open = HoldOpen {
            hold,
            vms: vec![vm],
            target_address: self.address.clone(),
            target_host: "target".to_owned(),
            ticket,
        };
        let mut near = self.control();
        near.call(&Request::HoldOpen(open)).unwrap();
        let scope = Scope::All;
        let frozen = near.call(&Request::Freeze { hold, scope }).unwrap();
        assert!(matches!(frozen, Reply::Frozen { .. }), "{frozen:?}");
    }

    /// It is put back; the guests go on.
    fn put_back(&mut self, hold: HoldId) {
        let mut near = self.control();
        let since = Instant::now();
        loop {
            match near.hold(&Request::HoldStatus { hold }).unwrap().state {
                HoldState::Aborted => break,
                _ => self.guests.turns(Duration::from_millis(10), 0),
            }
            assert!(since.elapsed() < PATIENCE, "it is not put back");
        }
        self.far.call(&Request::HoldAbort { hold }).unwrap();
    }
}

const NO_WINDOW: u64 = u64::MAX;
/// A keeper takes a VM that several switches in a row have not lived with for 0.3 s for what kills them.
const LIVES: Duration = Duration::from_millis(330);

fn what_a_hold_has_accepted_is_there_once<R: Ring>() {
    let mut w = World::<R>::new();
    w.guests.turns(Duration::from_millis(200), WINDOW);
    w.settle();
    let hold = HoldId(1);
    w.hold(hold);
    let before = w.guests.came.len();
    for _ in 0..8 {
        w.die(NO_WINDOW, LIVES);
    }
    assert_eq!(w.guests.came.len(), before, "all of it is held");
    let held = w.control().hold(&Request::HoldStatus { hold }).unwrap();
    let frames: u64 = held.lanes.iter().map(|l| l.held.frames).sum();
    assert!(frames > 1000, "{frames} frames are held");
    w.control().hold(&Request::HoldAbort { hold }).unwrap();
    w.put_back(hold);
    w.settle();
    let (missing, twice) = w.guests.judge();
    eprintln!("{} frames, {frames} of them held; 8 deaths", w.guests.sent);
    assert_eq!((missing, twice), (Vec::new(), 0));
}

fn at_most_a_burst_comes_twice<R: Ring>() {
    let mut w = World::<R>::new();
    let mut deaths = 0;
    for _ in 0..4 {
        w.die(WINDOW, LIVES);
        deaths += 1;
    }
    w.settle();
    let (missing, twice) = w.guests.judge();
    eprintln!("{} frames, {twice} twice; {deaths} deaths", w.guests.sent);
    assert_eq!(missing, Vec::<u64>::new());
    assert!(twice <= 32 * deaths, "{twice} frames twice");

    let hold = HoldId(2);
    w.hold(hold);
    w.guests.turns(Duration::from_millis(500), NO_WINDOW);
    let before = w.guests.came.len();
    w.control().hold(&Request::HoldAbort { hold }).unwrap();
    // It dies while it puts back, and the next run goes on with it.
    let since = Instant::now();
    while w.guests.came.len() == before {
        w.guests.turn(0);
        assert!(since.elapsed() < PATIENCE, "nothing is put back");
    }
    w.die_now(0);
    w.put_back(hold);
    w.settle();
    let (missing, twice) = w.guests.judge();
    eprintln!("{} frames, {twice} twice; 5 deaths", w.guests.sent);
    assert_eq!(missing, Vec::<u64>::new());
    assert!(twice <= 32 * (deaths + 1), "{twice} frames twice");
}

fn what_waits_for_a_receiver_is_there<R: Ring>() {
    // The keeper's folder has to be in memory.
    let mut w = World::<R>::at(TempDir::new_in("/dev/shm").unwrap());
    w.guests.turns(Duration::from_millis(200), WINDOW);
    w.settle();
    let came = w.guests.came.len();
    let deaths = 6;
    for n in 1..=deaths {
        // The receiver takes nothing, and more than its ring has room for.
        let window = u64::from(NUM) + 300 * n;
        let since = Instant::now();
        while w.guests.sent - w.guests.came.last().copied().unwrap_or(0) < window
            || w.guests.from.tx.outstanding() > 0
        {
            w.guests.send(window);
            let waits = w.guests.from.tx.outstanding();
            assert!(
                since.elapsed() < PATIENCE,
                "{waits} not taken: {}",
                w.said()
            );
        }
        std::thread::sleep(LIVES);
        w.die_now(0);
    }
    assert_eq!(w.guests.came.len(), came, "nothing was received meanwhile");
    w.settle();
    let (missing, twice) = w.guests.judge();
    eprintln!("{} frames, {twice} twice; {deaths} deaths", w.guests.sent);
    assert_eq!(missing, Vec::<u64>::new());
    assert!(twice <= 32 * deaths as usize, "{twice} frames twice");
}

#[test]
fn what_waits_for_a_receiver_is_there_however_often_the_switch_dies() {
    what_waits_for_a_receiver_is_there::<Split>();
    what_waits_for_a_receiver_is_there::<Packed>();
}

#[test]
fn what_a_hold_has_accepted_is_there_once_however_often_its_switch_dies() {
    what_a_hold_has_accepted_is_there_once::<Split>();
}

#[test]
fn what_a_hold_has_accepted_from_packed_rings_is_there_once_however_often_its_switch_dies() {
    what_a_hold_has_accepted_is_there_once::<Packed>();
}

#[test]
fn what_is_forwarded_or_put_back_is_there_and_at_most_a_burst_of_it_twice() {
    at_most_a_burst_comes_twice::<Split>();
}

#[test]
fn what_is_forwarded_or_put_back_in_packed_rings_is_there_and_at_most_a_burst_of_it_twice() {
    at_most_a_burst_comes_twice::<Packed>();
}
