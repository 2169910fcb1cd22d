//! The unix socket and the QUIC endpoint: who may come in, and how many.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use gangway_shared::api::{self, RefusalCode};
use gangway_shared::config::HostConfig;
use gangway_shared::pki::Role;
use gangway_shared::ship;
use quinn::{Connection, VarInt};
use rustix::fs::Mode;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::quic::{self, Quic};
use super::session::{After, Control, Session};
use super::vmm::Vmm;
use super::{Handler, ShipAcceptor, refuse, wire};

/// Connections at once, each way.
const CONNECTIONS_MAX: usize = 64;
/// From this many on, a QUIC peer must first prove that it can receive at its address.
const CONNECTIONS_CALM: usize = 16;
/// How long a handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// How long a stream may be open before its request comes.
const REQUEST: Duration = Duration::from_secs(10);
/// How long a peer gets to take the last answer before its connection is closed.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Codes of QUIC's CONNECTION_CLOSE (docs/formats/wire.md).
mod close {
    /// Done.
    pub const OK: u32 = 0;
    /// The certificate does not entitle to this.
    pub const ROLE: u32 = 1;
    /// A message was malformed, or of another version.
    pub const MALFORMED: u32 = 2;
}

/// Why the switch does not serve.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// The operator's: another one has the socket.
    #[error("control.socket '{}': another gangway-switch serves on it; stop it first", .0.display())]
    AlreadyRunning(PathBuf),
    /// The operator's: something else is there.
    #[error("control.socket '{}' exists and is no socket; remove it, or choose another path", .0.display())]
    NotASocket(PathBuf),
    /// The operator's or the host's.
    #[error("control.socket '{}': {source}", path.display())]
    Socket {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Bound, and ready to run.
pub struct Server {
    control: Arc<Control>,
    listener: UnixListener,
    path: PathBuf,
    quic: Option<Quic>,
    ship: Arc<dyn ShipAcceptor>,
}

/// Binds and runs until `shutdown` is over.
pub async fn serve(
    cfg: &HostConfig,
    vmm: Arc<Vmm>,
    handler: Arc<dyn Handler>,
    quic: Option<Quic>,
    ship: Arc<dyn ShipAcceptor>,
    shutdown: impl Future<Output = ()>,
) -> Result<(), ServeError> {
    let server = Server::bind(cfg, vmm, handler, quic, ship)?;
    server.run(shutdown).await;
    Ok(())
}

impl Server {
    /// Binds the unix socket. To be called inside the runtime.
    pub fn bind(
        cfg: &HostConfig,
        vmm: Arc<Vmm>,
        handler: Arc<dyn Handler>,
        quic: Option<Quic>,
        ship: Arc<dyn ShipAcceptor>,
    ) -> Result<Server, ServeError> {
        let path = cfg.control_socket.clone();
        let listener = bind(&path)?;
        let control = Arc::new(Control::new(cfg.name.clone(), handler, vmm));
        Ok(Server {
            control,
            listener,
            path,
            quic,
            ship,
        })
    }

    /// Serves until `shutdown` is over. Calls that are being carried out then lose their connection; what they have
    /// started goes on in the handler.
    pub async fn run(self, shutdown: impl Future<Output = ()>) {
        let mut tasks = JoinSet::new();
        tasks.spawn(accept_unix(Arc::clone(&self.control), self.listener));
        if let Some(quic) = &self.quic {
            let endpoint = quic.endpoint.clone();
            tasks.spawn(accept_quic(self.control, endpoint, self.ship));
        }
        shutdown.await;
        let _ = std::fs::remove_file(&self.path);
        tasks.shutdown().await;
        if let Some(quic) = self.quic {
            quic.endpoint
                .close(VarInt::from_u32(close::OK), b"the switch stops");
            let _ = timeout(LAST_WORDS, quic.endpoint.wait_idle()).await;
        }
    }
}

/// Listens on `path`, mode 0600 from the first moment. A file that a dead switch left is replaced.
fn bind(path: &Path) -> Result<UnixListener, ServeError> {
    let failed = |source: io::Error| ServeError::Socket {
        path: path.to_owned(),
        source,
    };
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).map_err(failed)?;
    }
    match std::fs::symlink_metadata(path) {
        Ok(meta) if !meta.file_type().is_socket() => {
            return Err(ServeError::NotASocket(path.to_owned()));
        }
        Ok(_) => match StdUnixStream::connect(path) {
            Ok(_) => return Err(ServeError::AlreadyRunning(path.to_owned())),
            Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
                std::fs::remove_file(path).map_err(failed)?;
            }
            Err(e) => return Err(failed(e)),
        },
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(failed(e)),
    }
    let socket = || -> io::Result<UnixListener> {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let fd: OwnedFd =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        // On Linux the file takes its mode from the socket (less the umask).
        rustix::fs::fchmod(&fd, Mode::RUSR | Mode::WUSR)?;
        rustix::net::bind(&fd, &SocketAddrUnix::new(path)?)?;
        rustix::net::listen(&fd, 64)?;
        UnixListener::from_std(fd.into())
    };
    socket().map_err(failed)
}

async fn accept_unix(control: Arc<Control>, listener: UnixListener) {
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut open = JoinSet::new();
    loop {
        let stream = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = open.join_next() => continue,
        };
        let mut stream = match stream {
            Ok((stream, _)) => stream,
            Err(e) => {
                // Out of descriptors, most likely: some will come back.
                tracing::warn!("control.socket: cannot accept: {e}");
                tokio::time::sleep(Duration::from_millis(200)).await;
                continue;
            }
        };
        let Ok(permit) = Arc::clone(&room).try_acquire_owned() else {
            let message = format!("{CONNECTIONS_MAX} connections are open already; close some");
            open.spawn(async move {
                let _ = wire::write(&mut stream, &refuse(RefusalCode::Busy, message)).await;
            });
            continue;
        };
        open.spawn(serve_unix(Arc::clone(&control), stream, permit));
    }
}

async fn serve_unix(control: Arc<Control>, mut stream: UnixStream, _room: OwnedSemaphorePermit) {
    let session = Session::new("control.socket");
    loop {
        // A local coordinator may keep its connection for as long as it likes.
        match control.call(&session, &mut stream, None).await {
            Ok(After::Next) => {}
            Ok(After::Closed | After::Misbehaved) => return,
            Err(e) => {
                tracing::debug!("control.socket: {e}");
                return;
            }
        }
    }
}

async fn accept_quic(
    control: Arc<Control>,
    endpoint: quinn::Endpoint,
    ship: Arc<dyn ShipAcceptor>,
) {
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut open = JoinSet::new();
    loop {
        let incoming = tokio::select! {
            incoming = endpoint.accept() => incoming,
            Some(_) = open.join_next() => continue,
        };
        let Some(incoming) = incoming else { return };
        let used = CONNECTIONS_MAX - room.available_permits();
        if used >= CONNECTIONS_CALM && !incoming.remote_address_validated() && incoming.may_retry()
        {
            let _ = incoming.retry();
            continue;
        }
        let Ok(permit) = Arc::clone(&room).try_acquire_owned() else {
            let why = format!("refused: {CONNECTIONS_MAX} connections are open already");
            control.said.warn(incoming.remote_address().ip(), why);
            incoming.refuse();
            continue;
        };
        let (control, ship) = (Arc::clone(&control), Arc::clone(&ship));
        open.spawn(async move {
            // Without its port, which is another one the next time.
            let peer = incoming.remote_address().ip();
            match timeout(HANDSHAKE, async { incoming.accept()?.await }).await {
                Ok(Ok(conn)) => admit(control, conn, ship, permit).await,
                Ok(Err(e)) => control.said.warn(peer, not_admitted(&e)),
                Err(_) => control
                    .said
                    .warn(peer, "refused: the handshake took too long"),
            }
        });
    }
}

/// What was wrong with a handshake, and what would not be. The same text whenever it is tried again: without rustls' seconds
/// since a certificate has expired.
fn not_admitted(e: &quinn::ConnectionError) -> String {
    let text = e.to_string();
    let text = text.split(": verification time").next().unwrap_or(&text);
    format!(
        "refused: {text}; wanted: {} or {}, with a valid certificate of the authority in tls.ca that is not in tls.crl",
        String::from_utf8_lossy(api::ALPN),
        String::from_utf8_lossy(ship::ALPN),
    )
}

/// The handshake has proven that our authority issued the peer's certificate; here it is decided what it is good for.
async fn admit(
    control: Arc<Control>,
    conn: Connection,
    ship: Arc<dyn ShipAcceptor>,
    permit: OwnedSemaphorePermit,
) {
    let address = conn.remote_address().ip();
    let deny = |why: String| {
        control.said.warn(address, format!("refused: {why}"));
        conn.close(VarInt::from_u32(close::ROLE), why.as_bytes());
    };
    let peer = match quic::peer(&conn) {
        Ok(peer) => peer,
        Err(e) => return deny(e.to_string()),
    };
    match (quic::protocol(&conn).as_deref(), peer.role) {
        (Some(api::ALPN), Role::Coordinator) => {
            tracing::debug!(peer = %address, "control connection of {peer}");
            let session = Session::new(format!("{peer} at {address}"));
            serve_quic(Arc::clone(&control), session, &conn, permit).await;
        }
        (Some(ship::ALPN), Role::Host) => {
            conn.set_max_concurrent_uni_streams(VarInt::from_u32(crate::ship::LANES_MAX as u32));
            ship.accept(conn, peer);
        }
        (Some(api::ALPN), Role::Host) => deny(format!(
            "{peer} may ship but not control; use a certificate issued with `gangway pki issue DIR NAME --coordinator`"
        )),
        (Some(ship::ALPN), Role::Coordinator) => {
            deny(format!(
                "{peer} may control but not ship; shipments come from hosts"
            ));
        }
        _ => deny("no protocol of ours".to_owned()),
    }
}

async fn serve_quic(
    control: Arc<Control>,
    session: Session,
    conn: &Connection,
    _room: OwnedSemaphorePermit,
) {
    let session = Arc::new(session);
    let mut calls = JoinSet::new();
    loop {
        let stream = tokio::select! {
            stream = conn.accept_bi() => stream,
            Some(_) = calls.join_next() => continue,
        };
        // Closed by the peer, timed out, or by us: the calls' tasks end with `calls`.
        let Ok((send, recv)) = stream else { return };
        let (control, session, conn) = (Arc::clone(&control), Arc::clone(&session), conn.clone());
        calls.spawn(async move {
            let mut stream = tokio::io::join(recv, send);
            let after = control.call(&session, &mut stream, Some(REQUEST)).await;
            let (_, mut send) = stream.into_inner();
            let _ = send.finish();
            match after {
                Ok(After::Next | After::Closed) => {
                    // The stream counts against the peer's limit until it has taken the answer.
                    let _ = timeout(wire::SLOW, send.stopped()).await;
                }
                Ok(After::Misbehaved) => {
                    let _ = timeout(LAST_WORDS, send.stopped()).await;
                    conn.close(VarInt::from_u32(close::MALFORMED), b"malformed");
                }
                Err(e) => tracing::debug!(peer = %conn.remote_address(), "control call: {e}"),
            }
        });
    }
}
