//! Keeps the sockets by which a switch receives from network devices, so that what comes while no switch runs waits in them
//! (ADR-0039). A socket is a descriptor: who has a copy keeps it open. Frames do not pass through the keeper.
//!
//! ```text
//!   switch --- TAKE device ---> the kept socket, if there is one
//!          --- KEEP device + socket ---> kept from now on
//!          --- DONE ---> what this switch has neither taken nor kept is closed
//! ```
//! `keeper.dir`/devices.sock, messages as on a vhost-user socket with requests of our own: each is answered by its request, a word (1: there
//! it is, or it is done; 0: no), and the socket. The switch's connection lasts as long as its process.
//!
//! Invariant: what nobody reads does not grow old: [`AWAY`] behind a switch's end its sockets are closed, and what comes then is lost, as
//! without a keeper.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};

use crate::relay::waits;
use crate::wire::{Message, receive, send};

/// In `keeper.dir`.
pub const FILE: &str = "devices.sock";
/// How long sockets are kept without a switch.
pub const AWAY: Duration = Duration::from_secs(10);

const TAKE: u32 = 1;
const KEEP: u32 = 2;
const DONE: u32 = 3;
/// A message of version 1, and the same as an answer.
const ASKED: u32 = 1;
const ANSWERED: u32 = 0b101;
/// Devices at most, and bytes of a device's name.
const DEVICES_MAX: usize = 1024;
const NAME_MAX: usize = 64;
/// Neither end lets the other one wait for longer.
const PATIENCE: Duration = Duration::from_secs(2);

/// What is kept. Pure, but for the descriptors.
#[derive(Debug, Default)]
pub struct Store {
    kept: BTreeMap<String, Arc<OwnedFd>>,
    /// What this switch has taken or kept.
    used: BTreeSet<String>,
}

impl Store {
    /// Another switch asks.
    pub fn begin(&mut self) {
        self.used.clear();
    }

    /// The answer to a message. `None`: it is none of ours, and whoever has sent it is not to be talked to.
    pub fn answer(&mut self, m: &Message) -> Option<Message> {
        let name = || {
            let name = str::from_utf8(&m.body).ok();
            name.filter(|n| (1..=NAME_MAX).contains(&n.len()))
        };
        let (is, fds) = match (m.request, m.fds.as_slice()) {
            (TAKE, []) => {
                let name = name()?;
                let found = self.kept.get(name).cloned();
                if found.is_some() {
                    self.used.insert(name.to_owned());
                }
                (found.is_some(), found.into_iter().collect())
            }
            (KEEP, [fd]) => {
                let name = name()?;
                let fits = self.kept.contains_key(name) || self.kept.len() < DEVICES_MAX;
                if fits {
                    self.kept.insert(name.to_owned(), fd.clone());
                    self.used.insert(name.to_owned());
                }
                (fits, Vec::new())
            }
            (DONE, []) => {
                self.kept.retain(|name, _| self.used.contains(name));
                (true, Vec::new())
            }
            _ => return None,
        };
        Some(Message {
            request: m.request,
            flags: ANSWERED,
            body: u32::from(is).to_ne_bytes().into(),
            fds,
        })
    }

    /// Nobody reads them any more.
    pub fn close(&mut self) {
        self.kept.clear();
    }

    /// Devices of which a socket is kept.
    pub fn len(&self) -> usize {
        self.kept.len()
    }

    /// None is kept.
    pub fn is_empty(&self) -> bool {
        self.kept.is_empty()
    }
}

/// Serves switches, one after the other, for ever.
///
/// # Errors
/// If it cannot listen in `dir`.
pub fn serve(dir: &Path) -> io::Result<()> {
    let path = dir.join(FILE);
    match std::fs::remove_file(&path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let listener = UnixListener::bind(&path)?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
    let mut store = Store::default();
    let mut switch: Option<UnixStream> = None;
    let mut gone = Instant::now();
    loop {
        let listens = (listener.as_fd(), true);
        let left = AWAY.saturating_sub(gone.elapsed());
        let (comes, says) = match &switch {
            Some(s) => match waits(&[listens, (s.as_fd(), true)], None)[..] {
                [comes, says] => (comes, says),
                _ => (false, false),
            },
            None if store.is_empty() => (waits(&[listens], None) == [true], false),
            None if left.is_zero() => {
                tracing::warn!(
                    "no switch for {AWAY:?}: the sockets of {} devices are closed, and what has come in there is lost",
                    store.len()
                );
                store.close();
                continue;
            }
            None => (waits(&[listens], Some(left)) == [true], false),
        };
        if says
            && let Some(s) = &switch
            && !serve_one(s, &mut store)
        {
            (switch, gone) = (None, Instant::now());
        }
        if comes && let Ok((s, _)) = listener.accept() {
            let both = s
                .set_read_timeout(Some(PATIENCE))
                .and_then(|()| s.set_write_timeout(Some(PATIENCE)));
            if both.is_ok() {
                store.begin();
                switch = Some(s);
            }
        }
    }
}

/// False if it was the last one.
fn serve_one(switch: &UnixStream, store: &mut Store) -> bool {
    match receive(switch) {
        Ok(Some(m)) => match store.answer(&m) {
            Some(answer) => send(switch, &answer).is_ok(),
            None => {
                tracing::error!(
                    "request {} of a switch is none of ours; is it of this version?",
                    m.request
                );
                false
            }
        },
        Ok(None) => false,
        Err(e) => {
            tracing::warn!("a switch's connection: {e}");
            false
        }
    }
}

/// The switch's end.
#[derive(Debug)]
pub struct Client(UnixStream);

impl Client {
    /// # Errors
    /// If no keeper serves in `dir`, or one that stands still has no room for another connection.
    pub fn connect(dir: &Path) -> io::Result<Client> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let fd = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        rustix::net::connect(&fd, &SocketAddrUnix::new(dir.join(FILE))?)?;
        let stream = UnixStream::from(fd);
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(Client(stream))
    }

    /// The socket that is kept of a device.
    ///
    /// # Errors
    /// If the keeper is gone, or says what it may not.
    pub fn take(&self, device: &str) -> io::Result<Option<OwnedFd>> {
        let mut answer = self.ask(TAKE, device, None)?;
        match answer.fds.pop().filter(|_| answer.word(0) == Some(1)) {
            Some(fd) => Arc::try_unwrap(fd).or_else(|fd| fd.try_clone()).map(Some),
            None => Ok(None),
        }
    }

    /// Gives it a copy of a device's socket.
    ///
    /// # Errors
    /// As above, or if it keeps too many.
    pub fn keep(&self, device: &str, socket: BorrowedFd<'_>) -> io::Result<()> {
        let answer = self.ask(KEEP, device, Some(socket.try_clone_to_owned()?))?;
        match answer.word(0) {
            Some(1) => Ok(()),
            _ => Err(io::Error::other("the keeper keeps no more devices")),
        }
    }

    /// All devices were named: the keeper closes what it has of others.
    ///
    /// # Errors
    /// As above.
    pub fn done(&self) -> io::Result<()> {
        self.ask(DONE, "", None).map(drop)
    }

    /// The keeper has not hung up.
    pub fn is_there(&self) -> bool {
        waits(&[(self.0.as_fd(), true)], Some(Duration::ZERO)) == [false]
    }

    fn ask(&self, request: u32, device: &str, fd: Option<OwnedFd>) -> io::Result<Message> {
        let m = Message {
            request,
            flags: ASKED,
            body: device.as_bytes().to_vec(),
            fds: fd.map(Arc::new).into_iter().collect(),
        };
        send(&self.0, &m)?;
        let answer = receive(&self.0)?.ok_or(io::ErrorKind::UnexpectedEof)?;
        match answer.request == request && answer.is_reply() {
            true => Ok(answer),
            false => Err(io::Error::other("an answer to something else")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    fn pair() -> (UnixStream, OwnedFd) {
        let (a, b) = UnixStream::pair().expect("sockets");
        (a, b.into())
    }

    fn start() -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().to_owned();
        std::thread::spawn(move || serve(&path));
        while !dir.path().join(FILE).exists() {
            std::thread::sleep(Duration::from_millis(1));
        }
        dir
    }

    fn connect(dir: &tempfile::TempDir) -> Client {
        loop {
            match Client::connect(dir.path()) {
                Ok(c) => return c,
                Err(_) => std::thread::sleep(Duration::from_millis(1)),
            }
        }
    }

    #[test]
    fn what_comes_while_nobody_reads_is_there_for_the_next_switch() {
        let dir = start();
        let first = connect(&dir);
        assert!(first.take("up0").expect("it answers").is_none());
        let (mut far, near) = pair();
        first.keep("up0", near.as_fd()).expect("it is kept");
        let (_other, gone) = pair();
        first.keep("old", gone.as_fd()).expect("it is kept");
        first.done().expect("it answers");
        assert!(first.is_there());
        drop((first, near, gone));
        far.write_all(b"meanwhile")
            .expect("somebody has the other end");

        let second = connect(&dir);
        let near = second
            .take("up0")
            .expect("it answers")
            .expect("it was kept");
        let mut got = [0; 9];
        UnixStream::from(near).read_exact(&mut got).expect("bytes");
        assert_eq!(&got, b"meanwhile");
        second.done().expect("it answers");
        drop(second);
        // What the second one did not ask for was closed; what it took is still kept.
        let third = connect(&dir);
        assert!(third.take("old").expect("it answers").is_none());
        assert!(third.take("up0").expect("it answers").is_some());
    }

    #[test]
    fn who_says_something_else_is_hung_up_on_and_changes_nothing() {
        let dir = start();
        let (_far, near) = pair();
        connect(&dir).keep("up0", near.as_fd()).expect("it is kept");
        for (request, body, with) in [
            (7, "up0", false),
            (TAKE, "", false),
            (TAKE, "up0", true),
            (KEEP, "up0", false),
            (DONE, "", true),
        ] {
            let c = connect(&dir);
            let fd = with.then(|| near.try_clone().expect("a copy"));
            assert!(c.ask(request, body, fd).is_err(), "{request}");
        }
        assert!(connect(&dir).take("up0").expect("it answers").is_some());
    }

    #[test]
    fn nobody_waits_for_a_keeper_that_stands_still() {
        let dir = tempfile::tempdir().expect("a folder");
        let listener = UnixListener::bind(dir.path().join(FILE)).expect("it listens");
        rustix::net::listen(&listener, 1).expect("a short queue");
        let (tell, told) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            // Connections that are given up stay in the queue.
            while let Ok(c) = Client::connect(dir.path()) {
                let _ = tell.send(c.done().is_ok());
            }
        });
        for n in 0.. {
            match told.recv_timeout(4 * PATIENCE) {
                Ok(is_done) => assert!(!is_done && n < 9),
                Err(e) => {
                    assert_eq!(e, std::sync::mpsc::RecvTimeoutError::Disconnected);
                    break;
                }
            }
        }
        drop(listener);
    }

    #[test]
    fn the_store_keeps_so_many_and_replaces_what_it_has() {
        let mut store = Store::default();
        let fd = Arc::new(pair().1);
        let keep = |n: usize| Message {
            request: KEEP,
            flags: ASKED,
            body: format!("d{n}").into_bytes(),
            fds: vec![fd.clone()],
        };
        for n in 0..DEVICES_MAX {
            assert_eq!(store.answer(&keep(n)).expect("ours").word(0), Some(1));
        }
        assert_eq!(store.answer(&keep(0)).expect("ours").word(0), Some(1));
        assert_eq!(
            store.answer(&keep(DEVICES_MAX)).expect("ours").word(0),
            Some(0)
        );
        assert_eq!(store.len(), DEVICES_MAX);
        store.begin();
        store.answer(&keep(3)).expect("ours");
        let done = Message {
            request: DONE,
            flags: ASKED,
            body: Vec::new(),
            fds: Vec::new(),
        };
        store.answer(&done).expect("ours");
        assert_eq!(store.len(), 1);
        store.close();
        assert!(store.is_empty());
    }
}
