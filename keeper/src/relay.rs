//! A port's loop: passes messages on, and sees a new switch in.
//!
//! ```text
//!              VM's end is there               answered, or nobody asks
//!   waiting ----------------------> relaying <------------------------- asked (nothing more is read from the VM's end)
//!      ^                            |   ^                                  |
//!      | VM's end hangs up;         |   | told everything                  | the switch is gone
//!      | the switch refuses         v   | (what was asked is asked again)  v
//!      +------------------------- switch is gone <-------------------------+
//! ```
//!
//! A switch that is gone is waited for without an end: the VM's frames wait in its rings.

use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt::socket_peercred;
use rustix::process::{PidfdFlags, pidfd_open};

use gangway_shared::config::HostConfig;
use gangway_shared::positions;

use crate::message::request::{
    GET_VRING_BASE, SET_PROTOCOL_FEATURES, SET_VRING_BASE, SET_VRING_KICK,
};
use crate::transcript::{Transcript, ring};
use crate::wire::{Message, receive, send};

/// Between two looks for a switch, or a VM, that is not there.
const RETRY: Duration = Duration::from_millis(10);
/// Between two connections of a VM.
const PAUSE: Duration = Duration::from_millis(100);
/// A process that has closed its sockets because it ends has ended so much later.
const DYING: Duration = Duration::from_secs(2);
/// How long a new switch may take for an answer while it is told everything.
const PATIENCE: Duration = Duration::from_secs(10);
/// Times in a row that a switch may die right behind being told of a VM: then that is what kills it.
const DEATHS: u32 = 5;
/// Right behind it.
const SOON: Duration = Duration::from_millis(300);
/// How long after the port before it a port tells of its VM, for each death behind the first: so that one VM's death is not taken for
/// another's.
const APART: Duration = Duration::from_millis(500);

/// A port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Port {
    /// For the log.
    pub name: String,
    /// QEMU's end: what its device says.
    pub socket: PathBuf,
    /// We listen there, and QEMU dials; else QEMU listens.
    pub server: bool,
    /// Where the switch listens.
    pub switch: PathBuf,
    /// Which port it is, from 0 on: behind a few deaths of the switch each tells the next one at a time of its own.
    pub number: u32,
}

/// The switch's end of a port.
struct Back {
    stream: UnixStream,
    /// Its process; none if it had ended already.
    process: Option<OwnedFd>,
}

impl Back {
    fn dial(path: &Path) -> io::Result<Back> {
        let stream = UnixStream::connect(path)?;
        let pid = socket_peercred(&stream)?.pid;
        let process = pidfd_open(pid, PidfdFlags::empty()).ok();
        Ok(Back { stream, process })
    }

    /// Whether its process ends, or it does not listen at `path` any more, because it stops: then it has refused nothing.
    fn is_dying(&self, path: &Path) -> bool {
        let Some(process) = &self.process else {
            return true;
        };
        let until = Instant::now() + DYING;
        while Instant::now() < until {
            if !path.exists() || waits(&[(process.as_fd(), true)], Some(RETRY)) == [true] {
                return true;
            }
        }
        false
    }
}

/// Why a VM's connection ends.
#[derive(Debug, thiserror::Error)]
enum End {
    #[error("the VM's end hung up")]
    Usual,
    #[error("the VM's end: {0}")]
    Front(io::Error),
    #[error("the switch hung up: it has refused what it was told, see its log")]
    Refused,
    #[error("the switch is gone, and it has not noted where its packed rings were")]
    Packed,
    #[error("{DEATHS} switches in a row died while they were told of this VM")]
    Deadly,
    #[error("a new switch does not offer what the old one did: {0:#x} is missing")]
    Less(u64),
    #[error("the switch takes more than {PATIENCE:?} for an answer")]
    Slow,
    #[error(
        "what a switch has noted of the connection before it can't be replaced (keeper.dir must be writable): {0}"
    )]
    Stale(io::Error),
}

/// Which of the descriptors can be read or have hung up; `false` ones are only looked at for that.
pub(crate) fn waits(
    fds: &[(rustix::fd::BorrowedFd<'_>, bool)],
    timeout: Option<Duration>,
) -> Vec<bool> {
    let mut polled: Vec<_> = fds
        .iter()
        .map(|(fd, read)| {
            let flags = if *read {
                PollFlags::IN | PollFlags::RDHUP
            } else {
                PollFlags::RDHUP
            };
            PollFd::from_borrowed_fd(*fd, flags)
        })
        .collect();
    let timeout = timeout.map(|t| Timespec {
        tv_sec: t.as_secs() as i64,
        tv_nsec: i64::from(t.subsec_nanos()),
    });
    match poll(&mut polled, timeout.as_ref()) {
        Ok(_) => polled.iter().map(|p| !p.revents().is_empty()).collect(),
        Err(_) => vec![false; fds.len()],
    }
}

/// Serves a port for ever.
pub fn serve(port: &Port) {
    let mut listener = None;
    let (mut said, mut stale) = (None, None);
    loop {
        match front(port, &mut listener) {
            Ok(Some(front)) => {
                tracing::info!(port = port.name, "the VM's end is connected");
                said = None;
                match relay(&front, port) {
                    End::Usual => tracing::info!(port = port.name, "the VM's end hung up"),
                    end => {
                        let text = end.to_string();
                        // It goes on until the operator does something.
                        let again = matches!(end, End::Stale(_)) && stale.as_ref() == Some(&text);
                        if !again {
                            tracing::warn!(port = port.name, "connection closed: {text}");
                        }
                        stale = Some(text);
                    }
                }
                std::thread::sleep(PAUSE);
            }
            Ok(None) => std::thread::sleep(RETRY),
            // QEMU that does not listen yet is nothing to speak of.
            Err(e) => {
                let text = e.to_string();
                if port.server && said.as_ref() != Some(&text) {
                    tracing::warn!(port = port.name, socket = %port.socket.display(), "{text}");
                    said = Some(text);
                }
                std::thread::sleep(PAUSE);
            }
        }
    }
}

/// The VM's end. None while there is none, and while no switch listens: QEMU would wait for its answers, so it finds
/// nobody, and tries again.
fn front(port: &Port, listener: &mut Option<UnixListener>) -> io::Result<Option<UnixStream>> {
    if !port.switch.exists() {
        if listener.take().is_some() {
            std::fs::remove_file(&port.socket)?;
        }
        return Ok(None);
    }
    if !port.server {
        return UnixStream::connect(&port.socket).map(Some);
    }
    let l = match listener {
        Some(l) => l,
        None => listener.insert(listen(&port.socket)?),
    };
    match waits(&[(l.as_fd(), true)], Some(PAUSE)) == [true] {
        true => Ok(Some(l.accept()?.0)),
        false => Ok(None),
    }
}

/// Listens, for our own user only. A socket that nobody listens on any more is in the way after a crash.
fn listen(path: &Path) -> io::Result<UnixListener> {
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket());
    let refused = |e: io::Error| e.kind() == io::ErrorKind::ConnectionRefused;
    if is_socket && UnixStream::connect(path).is_err_and(refused) {
        std::fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// What a switch has noted of the connection before is of other rings, and would make it skip frames of these. That it may note
/// something of this one says an empty file.
fn begin(positions: &Path) -> io::Result<()> {
    match std::fs::remove_file(positions) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    std::fs::File::create(positions).map(drop)
}

/// The switch has noted what a packed ring does not show.
fn has_noted(positions: &Path) -> bool {
    let mut start = Vec::new();
    let file = std::fs::File::open(positions);
    let read = file.and_then(|f| f.take(4096).read_to_end(&mut start));
    read.is_ok() && positions::has_packed(&start)
}

/// Serves one connection of a VM to its end.
fn relay(front: &UnixStream, port: &Port) -> End {
    let (switch, name) = (port.switch.as_path(), port.name.as_str());
    if let Err(e) = begin(&HostConfig::kept_positions(switch)) {
        return End::Stale(e);
    }
    let mut transcript = Transcript::default();
    let mut asked: Option<Message> = None;
    let mut deaths = 0;
    loop {
        if deaths > 1 {
            std::thread::sleep(APART * (deaths - 1) * port.number);
        }
        let back = match wait_for_switch(front, switch) {
            Ok(back) => back,
            Err(end) => return end,
        };
        let told = tell(&back, switch, &transcript, asked.as_ref());
        let since = Instant::now();
        if let Ok(n @ 1..) = told {
            tracing::info!(port = name, messages = n, "a new switch knows of the VM");
        }
        let lost = match told {
            Ok(_) => pass(front, &back, &mut transcript, &mut asked),
            Err(lost) => Err(lost),
        };
        match lost {
            Ok(never) => match never {},
            Err(Lost::End(end)) => return end,
            Err(Lost::Switch) => {}
        }
        let lived = since.elapsed();
        if !back.is_dying(switch) {
            return End::Refused;
        }
        if !transcript.can_be_told() && !has_noted(&HostConfig::kept_positions(switch)) {
            return End::Packed;
        }
        deaths = if lived > SOON { 0 } else { deaths + 1 };
        if deaths >= DEATHS {
            return End::Deadly;
        }
        tracing::warn!(
            port = name,
            "the switch is gone; the VM waits for the next one"
        );
    }
}

/// Why [`pass`] and [`tell`] end.
enum Lost {
    End(End),
    Switch,
}

enum Never {}

fn wait_for_switch(front: &UnixStream, switch: &Path) -> Result<Back, End> {
    loop {
        match Back::dial(switch) {
            Ok(back) => return Ok(back),
            Err(_) if waits(&[(front.as_fd(), false)], Some(RETRY)) == [true] => {
                return Err(End::Usual);
            }
            Err(_) => {}
        }
    }
}

/// Tells a new switch everything, and asks what the one before it has not answered. How many messages that were.
fn tell(
    back: &Back,
    path: &Path,
    known: &Transcript<std::sync::Arc<OwnedFd>>,
    asked: Option<&Message>,
) -> Result<usize, Lost> {
    // What is answered depends on what was told so far.
    let mut protocol = 0;
    let mut n = 0;
    // The old one may have stopped a packed ring and not have said where: it is noted, and the new one says so, if nobody has it run
    // first. (A split ring tells where it is, and is stopped anew.)
    let ends = asked.filter(|m| m.request == GET_VRING_BASE && !known.can_be_told());
    let ends = ends.and_then(|m| ring(m).ok());
    let of_it = |m: &Message| {
        let begins = matches!(m.request, SET_VRING_BASE | SET_VRING_KICK);
        begins && ends.is_some() && ring(m).ok() == ends
    };
    for (m, offered) in known.tell().filter(|(m, _)| !of_it(m)) {
        send(&back.stream, m).map_err(|_| Lost::Switch)?;
        n += 1;
        let is_answered = m.is_answered(protocol);
        if m.request == SET_PROTOCOL_FEATURES {
            protocol = known.protocol();
        }
        if !is_answered {
            continue;
        }
        let answer = loop {
            let readable = waits(&[(back.stream.as_fd(), true)], Some(PATIENCE));
            if readable != [true] {
                return Err(Lost::End(End::Slow));
            }
            match receive(&back.stream) {
                Ok(Some(answer)) if answer.request == m.request => break answer,
                // Of one that need not have been answered.
                Ok(Some(_)) => {}
                _ => return Err(Lost::Switch),
            }
        };
        if !m.was_done(&answer) {
            return Err(Lost::End(End::Refused));
        }
        let missing = offered & !answer.long().unwrap_or(0);
        if offered != 0 && missing != 0 {
            return Err(Lost::End(End::Less(missing)));
        }
        // It has looked at what is noted: one that does not know of packed rings has thrown it away.
        if !known.can_be_told() && !has_noted(&HostConfig::kept_positions(path)) {
            return Err(Lost::End(End::Packed));
        }
    }
    if let Some(m) = asked {
        send(&back.stream, m).map_err(|_| Lost::Switch)?;
    }
    if n > 0 {
        // A signal that the old one has not sent any more: one too many does no harm.
        for call in known.calls() {
            // Not one that is raised already: whoever has made it blocking must not make us wait.
            let mut room = [PollFd::new(call, PollFlags::OUT)];
            let now = Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            };
            if poll(&mut room, Some(&now)) == Ok(1) && room[0].revents() == PollFlags::OUT {
                let _ = rustix::io::write(call, &1u64.to_ne_bytes());
            }
        }
    }
    Ok(n)
}

/// Passes messages on until one of the two is gone.
fn pass(
    front: &UnixStream,
    back: &Back,
    transcript: &mut Transcript<std::sync::Arc<OwnedFd>>,
    asked: &mut Option<Message>,
) -> Result<Never, Lost> {
    loop {
        // One question at a time, so that it is known which one an answer answers.
        let ready = waits(
            &[
                (back.stream.as_fd(), true),
                (front.as_fd(), asked.is_none()),
            ],
            None,
        );
        if ready.first() == Some(&true) {
            let answer = match receive(&back.stream) {
                Ok(Some(answer)) => answer,
                _ => return Err(Lost::Switch),
            };
            if let Some(m) = asked.take_if(|m| m.request == answer.request) {
                note(transcript, &m, Some(&answer))?;
            }
            send(front, &answer).map_err(|e| Lost::End(End::Front(e)))?;
            continue;
        }
        if ready.get(1) == Some(&true) {
            let m = match receive(front) {
                Ok(Some(m)) => m,
                Ok(None) => return Err(Lost::End(End::Usual)),
                Err(e) => return Err(Lost::End(End::Front(e))),
            };
            if m.is_answered(transcript.protocol()) {
                *asked = Some(m.clone());
            } else {
                note(transcript, &m, None)?;
            }
            send(&back.stream, &m).map_err(|_| Lost::Switch)?;
        }
    }
}

fn note(
    transcript: &mut Transcript<std::sync::Arc<OwnedFd>>,
    m: &Message,
    answer: Option<&Message>,
) -> Result<(), Lost> {
    let noted = transcript.note(m, answer);
    noted.map_err(|e| Lost::End(End::Front(io::Error::other(e))))
}
