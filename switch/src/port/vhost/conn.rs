//! A port's control socket: dial or listen, serve one connection at a time, begin again.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use vhost::vhost_user::{BackendReqHandler, Error};

use super::early;
use super::live::clear;
use super::session::{Session, TOGETHER};
use super::{Shared, VhostConfig, lock};

/// Between two attempts to dial or to listen.
const RETRY: Duration = Duration::from_millis(100);
/// The same behind a front-end that has stalled a worker.
const PENALTY: Duration = Duration::from_secs(1);

/// Serves until the port is stopped.
pub(super) fn serve(cfg: &VhostConfig, shared: &Arc<Shared>) {
    let mut listener = None;
    while !shared.is_stopping() {
        let stream = if cfg.server {
            accept(&mut listener, &cfg.socket, shared)
        } else {
            dial(&cfg.socket).map(Some)
        };
        let mut pause = RETRY;
        match stream {
            Ok(Some(stream)) => {
                if session(stream, shared) == End::Expelled {
                    pause = PENALTY;
                }
            }
            Ok(None) => continue,
            Err(e) => shared.state(|s| s.last_error = Some(e.to_string())),
        }
        let until = Instant::now() + pause;
        while !shared.is_stopping()
            && let left = until.saturating_duration_since(Instant::now())
            && !left.is_zero()
        {
            wait(None, shared, Some(left));
        }
    }
    if listener.is_some() {
        let _ = std::fs::remove_file(&cfg.socket);
    }
}

/// Waits until `fd` is readable (true), or for an alarm or the timeout (false).
fn wait(fd: Option<BorrowedFd<'_>>, shared: &Shared, timeout: Option<Duration>) -> bool {
    let timeout = timeout.map(|t| Timespec {
        tv_sec: t.as_secs() as i64,
        tv_nsec: i64::from(t.subsec_nanos()),
    });
    let alarm = PollFd::new(&*shared.alarm, PollFlags::IN);
    let mut fds = vec![alarm];
    fds.extend(fd.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
    if poll(&mut fds, timeout.as_ref()).is_err() {
        return false;
    }
    if !fds[0].revents().is_empty() {
        clear(&shared.alarm);
    }
    fds.get(1).is_some_and(|f| !f.revents().is_empty())
}

/// Dials without waiting: the backlog of a QEMU that is busy with another connection is short.
fn dial(path: &Path) -> io::Result<UnixStream> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let fd = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&fd, &SocketAddrUnix::new(path)?)?;
    let stream = UnixStream::from(fd);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

/// Waits for a connection. `None` after an alarm.
fn accept(
    listener: &mut Option<UnixListener>,
    path: &Path,
    shared: &Shared,
) -> io::Result<Option<UnixStream>> {
    let listener = match listener {
        Some(l) => l,
        None => listener.insert(listen(path)?),
    };
    if !wait(Some(listener.as_fd()), shared, None) {
        return Ok(None);
    }
    let (stream, _) = listener.accept()?;
    stream.set_nonblocking(false)?;
    Ok(Some(stream))
}

/// Listens, for our own user only. A socket that nobody listens on any more is in the way after a crash.
fn listen(path: &Path) -> io::Result<UnixListener> {
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket());
    if is_socket && matches!(dial(path), Err(e) if e.kind() == io::ErrorKind::ConnectionRefused) {
        std::fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Who has ended a connection.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum End {
    /// The front-end, or we because we stop or do not understand it.
    Usual,
    /// We: it has stalled a worker.
    Expelled,
}

/// Serves one connection to its end.
pub(super) fn session(stream: UnixStream, shared: &Arc<Shared>) -> End {
    let (Ok(handle), Ok(watch)) = (stream.try_clone(), stream.try_clone()) else {
        return End::Usual;
    };
    shared.set_stream(Some(handle));
    shared.state(|s| {
        s.connected = true;
        s.connections += 1;
        s.last_error = None;
    });
    tracing::info!(port = %shared.name, "vhost-user front-end connected");
    let session = Arc::new(Mutex::new(Session::new(shared.clone())));
    let mut handler = BackendReqHandler::from_stream(stream, session.clone());
    let (end, why) = loop {
        if shared.is_stopping() {
            break (End::Usual, None);
        }
        let timeout = lock(&session).is_waiting().then_some(TOGETHER);
        if wait(Some(watch.as_fd()), shared, timeout) {
            let early = early::serve(&watch, &mut lock(&session)).map_err(Error::SocketError);
            let done = match early {
                Ok(false) => handler.handle_request(),
                done => done.map(|_| ()),
            };
            match done {
                Ok(()) => {}
                Err(Error::Disconnected) => break (End::Usual, None),
                Err(e) => break (End::Usual, Some(e.to_string())),
            }
        } else {
            lock(&session).attach_waiting();
        }
        if let Some(why) = lock(&session).is_lost() {
            break (End::Usual, Some(why));
        }
        let reported = lock(&session).report_broken();
        if let Err(why) = reported {
            break (End::Expelled, Some(why));
        }
    };
    lock(&session).stop_all();
    shared.set_stream(None);
    match &why {
        Some(why) => tracing::warn!(port = %shared.name, "vhost-user connection ended: {why}"),
        None => tracing::info!(port = %shared.name, "vhost-user connection ended"),
    }
    shared.state(|s| {
        s.connected = false;
        s.features = 0;
        s.logging = false;
        s.last_error.clone_from(&why);
    });
    if !shared.is_stopping() {
        let text = match why {
            Some(why) => format!("no vhost-user front-end; the last one's connection ended: {why}"),
            None => "no vhost-user front-end".to_owned(),
        };
        shared.attach.port_error(shared.slot, Some(text));
    }
    end
}
