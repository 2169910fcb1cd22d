//! The keeper between a front-end and switches that die: real sockets, real descriptors, and a switch that is a process of
//! its own, so that its death is one.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Arc;
use std::time::{Duration, Instant};

use gangway_keeper::message::request::*;
use gangway_keeper::relay::{self, Port};
use gangway_keeper::wire::{self, Message};
use gangway_shared::config::HostConfig;
use rustix::event::{EventfdFlags, eventfd};
use tempfile::TempDir;

const VERSION: u32 = 1;
const REPLY: u32 = 1 | 1 << 2;
const NEED_REPLY: u32 = 1 | 1 << 3;
const PROTOCOL: u64 = 1 << 1 | 1 << 3;
const FEATURES: u64 = 1 << 26 | 1 << 30 | 1 << 34;
/// What the next two say to the child.
const SOCKET: &str = "GANGWAY_KEEPER_TEST_SOCKET";
const MODE: &str = "GANGWAY_KEEPER_TEST_MODE";

/// The switch: says what it hears, answers, and does what the mode says. Runs in a process of its own ([`Switch::start`]).
#[test]
#[ignore = "a process of the tests below"]
fn switch() {
    let path = PathBuf::from(std::env::var_os(SOCKET).unwrap());
    let mode = std::env::var(MODE).unwrap();
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).unwrap();
    let heard = path.with_extension("heard");
    loop {
        let (stream, _) = listener.accept().unwrap();
        let mut said = File::options()
            .create(true)
            .append(true)
            .open(&heard)
            .unwrap();
        writeln!(said, "connected").unwrap();
        while let Ok(Some(m)) = wire::receive(&stream) {
            writeln!(said, "{} {:?} {}", m.request, m.word(0), m.fds.len()).unwrap();
            if m.request == SET_VRING_ERR && mode == "refuses" {
                break;
            }
            if m.request == SET_VRING_ERR && mode == "stops slowly" {
                // As the switch does: its ports first, and then what takes longer.
                std::fs::remove_file(&path).unwrap();
                drop(stream);
                std::thread::sleep(Duration::from_secs(60));
                return;
            }
            if m.request == SET_VRING_KICK && mode == "dies" {
                std::process::abort();
            }
            if m.request == GET_VRING_BASE && mode == "silent" {
                continue;
            }
            let value = match m.request {
                GET_FEATURES if mode == "less" => FEATURES & !(1 << 30),
                GET_FEATURES => FEATURES,
                GET_PROTOCOL_FEATURES => PROTOCOL,
                GET_VRING_BASE => 0x77,
                _ => 0u64,
            };
            if m.is_answered(PROTOCOL) {
                let answer = Message {
                    flags: REPLY,
                    body: value.to_ne_bytes().to_vec(),
                    fds: vec![],
                    ..m
                };
                if wire::send(&stream, &answer).is_err() {
                    break;
                }
            }
        }
    }
}

struct Switch {
    child: Child,
    heard: PathBuf,
}

impl Switch {
    fn start(path: &Path, mode: &str) -> Switch {
        let _ = std::fs::remove_file(path.with_extension("heard"));
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "switch", "-q"])
            .env(SOCKET, path)
            .env(MODE, mode)
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        Switch {
            child,
            heard: path.with_extension("heard"),
        }
    }

    fn heard(&self) -> Vec<String> {
        let text = std::fs::read_to_string(&self.heard).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    /// Waits until it has heard so many messages.
    fn hears(&self, n: usize) -> Vec<String> {
        let since = Instant::now();
        while self.heard().len() < n + 1 {
            assert!(
                since.elapsed() < Duration::from_secs(20),
                "{:?}",
                self.heard()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
        self.heard()
    }

    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

struct World {
    dir: TempDir,
}

impl World {
    /// A keeper for one port.
    fn new() -> World {
        let dir = TempDir::new().unwrap();
        let port = Port {
            name: "vm".into(),
            socket: dir.path().join("vm.vhost"),
            server: true,
            switch: dir.path().join("vm.sock"),
            number: 0,
        };
        std::thread::spawn(move || relay::serve(&port));
        World { dir }
    }

    fn switch(&self, mode: &str) -> Switch {
        Switch::start(&self.dir.path().join("vm.sock"), mode)
    }

    /// As a switch notes where packed rings are.
    fn note(&self) {
        let noted = HostConfig::kept_positions(&self.dir.path().join("vm.sock"));
        assert_eq!(std::fs::read(&noted).unwrap(), [0; 0], "the keeper's");
        let mut file = vec![0; gangway_shared::positions::AT];
        file.extend(gangway_shared::positions::MAGIC);
        std::fs::write(&noted, file).unwrap();
    }

    fn front(&self) -> Front {
        let path = self.dir.path().join("vm.vhost");
        let since = Instant::now();
        loop {
            match UnixStream::connect(&path) {
                Ok(stream) => {
                    let patience = Some(Duration::from_secs(20));
                    stream.set_read_timeout(patience).unwrap();
                    return Front(stream);
                }
                Err(e) => assert!(since.elapsed() < Duration::from_secs(20), "{e}"),
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

struct Front(UnixStream);

fn event() -> Arc<OwnedFd> {
    Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap())
}

fn count(event: &OwnedFd) -> u64 {
    let mut b = [0; 8];
    match rustix::io::read(event.as_fd(), &mut b) {
        Ok(8) => u64::from_ne_bytes(b),
        _ => 0,
    }
}

impl Front {
    fn say(&self, request: u32, body: u64, fds: &[&Arc<OwnedFd>]) {
        self.say_with(request, VERSION, body, fds);
    }

    fn say_with(&self, request: u32, flags: u32, body: u64, fds: &[&Arc<OwnedFd>]) {
        let m = Message {
            request,
            flags,
            body: body.to_ne_bytes().to_vec(),
            fds: fds.iter().map(|f| (*f).clone()).collect(),
        };
        wire::send(&self.0, &m).unwrap();
    }

    fn answer(&self) -> u64 {
        let m = wire::receive(&self.0).unwrap().expect("an answer");
        assert!(m.is_reply());
        m.long().unwrap()
    }

    fn ask(&self, request: u32, body: u64) -> u64 {
        self.say(request, body, &[]);
        self.answer()
    }

    /// As QEMU begins, for one ring; the descriptor of its signal.
    fn begin(&self) -> Arc<OwnedFd> {
        assert_eq!(self.ask(GET_FEATURES, 0), FEATURES);
        assert_eq!(self.ask(GET_PROTOCOL_FEATURES, 0), PROTOCOL);
        self.say(SET_PROTOCOL_FEATURES, PROTOCOL, &[]);
        self.say(SET_OWNER, 0, &[]);
        self.say(SET_FEATURES, 1 << 30, &[]);
        let call = event();
        self.say(SET_VRING_CALL, 1, &[&call]);
        self.say(SET_VRING_KICK, 1, &[&event()]);
        self.say_with(SET_VRING_ENABLE, NEED_REPLY, 1 | 1 << 32, &[]);
        assert_eq!(self.answer(), 0);
        call
    }

    fn is_closed(&self) -> bool {
        match (&self.0).read(&mut [0]) {
            Ok(n) => n == 0,
            // A time-out is none of these.
            Err(e) => matches!(e.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe),
        }
    }
}

#[test]
fn a_new_switch_is_told_everything_and_the_front_end_notices_nothing() {
    let w = World::new();
    let first = w.switch("");
    let front = w.front();
    let call = front.begin();
    first.hears(8);
    first.kill();
    assert_eq!(count(&call), 0);
    // Meanwhile the front-end goes on, and asks something.
    front.say(SET_VRING_ERR, 1, &[&event()]);
    front.say(GET_VRING_BASE, 1, &[]);
    let second = w.switch("");
    assert_eq!(front.answer(), 0x77, "asked while no switch ran");
    let heard = second.hears(10);
    let requests: Vec<u32> = heard[1..]
        .iter()
        .map(|h| h.split(' ').next().unwrap().parse().unwrap())
        .collect();
    assert_eq!(
        requests,
        [
            GET_FEATURES,
            SET_OWNER,
            GET_PROTOCOL_FEATURES,
            SET_PROTOCOL_FEATURES,
            SET_FEATURES,
            SET_VRING_CALL,
            SET_VRING_ENABLE,
            SET_VRING_KICK,
            SET_VRING_ERR,
            GET_VRING_BASE
        ]
    );
    assert!(heard[6].ends_with(" 1"), "with its descriptor: {heard:?}");
    assert_eq!(count(&call), 1, "a signal that may have been missed");
    assert_eq!(front.ask(GET_QUEUE_NUM, 0), 0, "it goes on");
    // The ring has stopped: a third one is not told to start it.
    second.kill();
    let third = w.switch("");
    assert_eq!(front.ask(GET_QUEUE_NUM, 0), 0);
    assert!(!third.heard().iter().any(|h| h.starts_with("12 ")));
}

/// What a switch has noted of rings is for the next switch, as long as the rings are the same.
#[test]
fn what_a_switch_has_noted_lasts_as_long_as_the_front_ends_connection() {
    let w = World::new();
    let noted = w.dir.path().join("vm.positions");
    std::fs::write(&noted, "of another connection").unwrap();
    let first = w.switch("");
    let front = w.front();
    front.begin();
    first.hears(8);
    let is_empty = || std::fs::read(&noted).unwrap().is_empty();
    assert!(is_empty());
    std::fs::write(&noted, "of this one").unwrap();
    first.kill();
    let second = w.switch("");
    assert_eq!(front.ask(GET_QUEUE_NUM, 0), 0);
    assert!(!is_empty(), "the second switch finds it");
    drop(front);
    w.front().begin();
    second.hears(16);
    assert!(is_empty());
}

#[test]
fn a_switch_that_stops_and_takes_its_time_has_refused_nothing() {
    let w = World::new();
    let first = w.switch("stops slowly");
    let front = w.front();
    front.begin();
    front.say(SET_VRING_ERR, 1, &[&event()]);
    first.hears(9);
    front.say(GET_QUEUE_NUM, 0, &[]);
    // Longer than a switch that refuses is given.
    std::thread::sleep(Duration::from_secs(3));
    let _second = w.switch("");
    assert_eq!(front.answer(), 0);
}

#[test]
fn what_a_dead_switch_has_not_answered_is_asked_again() {
    let w = World::new();
    let first = w.switch("silent");
    let front = w.front();
    front.begin();
    front.say(GET_VRING_BASE, 1, &[]);
    first.hears(9);
    first.kill();
    let second = w.switch("");
    assert_eq!(front.answer(), 0x77);
    let heard = second.hears(9);
    assert!(
        heard.contains(&"12 Some(1) 1".to_owned()),
        "it is stopped anew: {heard:?}"
    );
}

#[test]
fn a_switch_that_refuses_closes_the_front_ends_connection() {
    let w = World::new();
    let switch = w.switch("refuses");
    let front = w.front();
    front.begin();
    front.say(SET_VRING_ERR, 1, &[&event()]);
    assert!(front.is_closed());
    // And the next one is served.
    let front = w.front();
    front.begin();
    assert_eq!(
        switch.heard().iter().filter(|h| *h == "connected").count(),
        2
    );
}

#[test]
fn what_kills_every_switch_is_not_told_for_ever() {
    let w = World::new();
    let mut switch = w.switch("");
    let front = w.front();
    front.begin();
    switch.hears(8);
    for _ in 0..5 {
        switch.kill();
        switch = w.switch("dies");
        let since = Instant::now();
        while switch.child.try_wait().unwrap().is_none()
            && since.elapsed() < Duration::from_secs(10)
        {
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = switch.child.kill();
    }
    assert!(front.is_closed());
}

#[test]
fn a_switch_that_offers_less_is_not_put_in_the_place_of_another() {
    let w = World::new();
    let first = w.switch("");
    let front = w.front();
    front.begin();
    first.kill();
    let _second = w.switch("less");
    assert!(front.is_closed());
}

#[test]
fn a_packed_ring_that_is_about_to_stop_is_not_run_by_the_next_switch() {
    let w = World::new();
    let first = w.switch("silent");
    let front = w.front();
    front.begin();
    front.say(SET_FEATURES, 1 << 30 | 1 << 34, &[]);
    front.say(GET_VRING_BASE, 1, &[]);
    first.hears(10);
    w.note();
    first.kill();
    let second = w.switch("");
    assert_eq!(front.answer(), 0x77);
    let heard = second.hears(8);
    let kick = format!("{SET_VRING_KICK} ");
    assert!(!heard.iter().any(|h| h.starts_with(&kick)), "{heard:?}");
}

#[test]
fn packed_rings_end_with_a_switch_that_has_not_noted_where_they_are() {
    let w = World::new();
    let first = w.switch("");
    let front = w.front();
    front.begin();
    front.say(SET_FEATURES, 1 << 30 | 1 << 34, &[]);
    first.hears(9);
    first.kill();
    assert!(front.is_closed());
}

#[test]
fn packed_rings_of_which_it_is_noted_where_they_are_go_on() {
    let w = World::new();
    let first = w.switch("");
    let front = w.front();
    front.begin();
    front.say(SET_FEATURES, 1 << 30 | 1 << 34, &[]);
    first.hears(9);
    w.note();
    first.kill();
    let second = w.switch("");
    assert_eq!(second.hears(8).len(), 9, "it is told everything");
    assert_eq!(front.ask(GET_FEATURES, 0), FEATURES);
}

#[test]
fn a_front_end_that_goes_while_no_switch_runs_makes_way_for_the_next() {
    let w = World::new();
    let first = w.switch("");
    let front = w.front();
    front.begin();
    first.hears(8);
    first.kill();
    std::thread::sleep(Duration::from_millis(100));
    drop(front);
    let second = w.switch("");
    let front = w.front();
    front.begin();
    let heard = second.hears(8);
    assert_eq!(heard.len(), 9, "nothing of the one before: {heard:?}");
}

#[test]
fn a_vm_finds_nobody_while_no_switch_is_there_to_answer() {
    let w = World::new();
    let path = w.dir.path().join("vm.vhost");
    std::thread::sleep(Duration::from_millis(100));
    assert!(!path.exists(), "no switch has been here");
    let switch = w.switch("stops slowly");
    let front = w.front();
    front.begin();
    front.say(SET_VRING_ERR, 1, &[&event()]);
    switch.hears(9);
    drop(front);
    let since = Instant::now();
    while path.exists() {
        assert!(since.elapsed() < Duration::from_secs(20), "it has stopped");
        std::thread::sleep(Duration::from_millis(5));
    }
    let _next = w.switch("");
    w.front().begin();
}

#[test]
fn descriptors_in_every_byte_of_a_message_are_not_collected() {
    let w = World::new();
    let _switch = w.switch("");
    let front = w.front();
    let e = event();
    // A message of one byte, as it were: its descriptors, and then the next byte with more of them.
    let header: Vec<u8> = [SET_MEM_TABLE, VERSION, 400]
        .iter()
        .flat_map(|w| w.to_ne_bytes())
        .collect();
    let mut sent = 0;
    for byte in header.iter().chain(&[0; 400]) {
        use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
        let fds = [e.as_fd(); 4];
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        let parts = [std::io::IoSlice::new(std::slice::from_ref(byte))];
        if sendmsg(&front.0, &parts, &mut control, SendFlags::NOSIGNAL).is_err() {
            break;
        }
        sent += 1;
        std::thread::sleep(Duration::from_millis(2));
    }
    assert!(sent < 400, "{sent} bytes, four descriptors each");
    assert!(front.is_closed());
}

#[test]
fn nonsense_ends_the_connection_and_nothing_else() {
    let w = World::new();
    let _switch = w.switch("");
    let version_2 = [GET_FEATURES, 2, 0];
    let endless = [GET_FEATURES, VERSION, u32::MAX];
    let no_ring = [SET_VRING_NUM, VERSION, 4, 1000];
    let short = [SET_FEATURES, VERSION, 4, 0];
    for words in [&version_2[..], &endless, &no_ring, &short] {
        let front = w.front();
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
        (&front.0).write_all(&bytes).unwrap();
        assert!(front.is_closed(), "{words:?}");
    }
    // Cut off in the middle of a header.
    let front = w.front();
    (&front.0).write_all(&[1, 0]).unwrap();
    drop(front);
    w.front().begin();
}
