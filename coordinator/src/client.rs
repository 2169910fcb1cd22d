//! Calls to a switch, the same over its unix socket and over QUIC (`gangway_shared::api`, "Transport").

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use gangway_shared::api::{
    ALPN, HoldInfo, HostInfo, LinkInfo, PortInfo, Refusal, RefusalCode, Reply, Request, VERSION,
    VmInfo, WorkerInfo,
};
use gangway_shared::{codec, pki};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::sync::Mutex;
use tokio::time::timeout;

use crate::exit::Failure;
use crate::hosts::{Host, Hosts, Way};

/// Time for a call that has no time-out of its own.
pub const CALL: Duration = Duration::from_secs(10);
const CONNECT: Duration = Duration::from_secs(5);
/// How long the end of a command waits for its last words to go out.
const GOODBYE: Duration = Duration::from_millis(100);

/// A call did not end well, and whose fault that is.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No connection.
    #[error(
        "switch of host '{host}' at {at} cannot be reached: {why}; is gangway-switch running there?"
    )]
    Unreachable {
        /// The host.
        host: String,
        /// Where it was looked for.
        at: String,
        /// What went wrong.
        why: String,
    },
    /// The switch is there and wants no connection of ours.
    #[error("switch of host '{host}' at {at} does not let us in: {why}")]
    Denied {
        /// The host.
        host: String,
        /// Where it is.
        at: String,
        /// What it says.
        why: String,
    },
    /// The connection broke, or the answer took too long: the switch may or may not have done it.
    #[error("switch of host '{host}': {what} {why}")]
    Lost {
        /// The host.
        host: String,
        /// The call.
        what: &'static str,
        /// What went wrong.
        why: String,
    },
    /// The switch says no; nothing has changed.
    #[error("switch of host '{host}' refuses {what}: {refusal}")]
    Refused {
        /// The host.
        host: String,
        /// The call.
        what: &'static str,
        /// Its reason.
        refusal: Refusal,
    },
    /// The switch breaks the protocol.
    #[error(
        "switch of host '{host}' answers {what} with something else: {why}; are both of the same release?"
    )]
    Protocol {
        /// The host.
        host: String,
        /// The call.
        what: &'static str,
        /// What came.
        why: String,
    },
    /// Our own settings.
    #[error("{0}")]
    Settings(String),
}

impl ClientError {
    /// True if the switch certainly has not done it.
    pub fn nothing_changed(&self) -> bool {
        matches!(
            self,
            ClientError::Refused { .. }
                | ClientError::Unreachable { .. }
                | ClientError::Denied { .. }
                | ClientError::Settings(_)
        )
    }

    /// The refusal's code, if it is one.
    pub fn refusal(&self) -> Option<RefusalCode> {
        match self {
            ClientError::Refused { refusal, .. } => Some(refusal.code),
            _ => None,
        }
    }
}

/// Both ways of one stream.
pub trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// A stream that carries calls or, later, QMP.
pub type Stream = Box<dyn Duplex>;

/// A switch that can be called. Cheap to clone; calls may run side by side.
#[derive(Clone)]
pub struct Switch(Arc<Inner>);

struct Inner {
    host: Host,
    /// Unix connections that have said hello and carry no call now.
    idle: Mutex<Vec<UnixStream>>,
    quic: Option<QuicWay>,
}

struct QuicWay {
    config: quinn::ClientConfig,
    connection: Mutex<Option<quinn::Connection>>,
}

impl Switch {
    /// Prepares calls to `host`; nothing is sent yet.
    pub fn new(hosts: &Hosts, host: &Host) -> Result<Switch, Failure> {
        let quic = match (&host.way, &hosts.tls) {
            (Way::Unix(_), _) => None,
            (Way::Quic(_), Some(tls)) => {
                let tls = pki::client_config(tls, ALPN, rustls::pki_types::UnixTime::now())
                    .map_err(|e| {
                        Failure::usage(format!("[tls] in {}: {e}", hosts.path.display()))
                    })?;
                Some(QuicWay {
                    config: quic_config(tls)?,
                    connection: Mutex::new(None),
                })
            }
            (Way::Quic(_), None) => {
                return Err(Failure::usage(format!(
                    "host '{}' needs [tls] in {}",
                    host.name,
                    hosts.path.display()
                )));
            }
        };
        Ok(Switch(Arc::new(Inner {
            host: host.clone(),
            idle: Mutex::new(Vec::new()),
            quic,
        })))
    }

    /// The host's name.
    pub fn host(&self) -> &str {
        &self.0.host.name
    }

    /// One call, with the usual time-out.
    pub async fn call(&self, request: &Request) -> Result<Reply, ClientError> {
        self.call_within(request, CALL).await
    }

    /// One call. A refusal is an error.
    pub async fn call_within(
        &self,
        request: &Request,
        within: Duration,
    ) -> Result<Reply, ClientError> {
        let what = verb(request);
        let call = async {
            match &self.0.host.way {
                Way::Unix(_) => {
                    // An idle connection may have died with the switch: then a fresh one decides.
                    loop {
                        let idle = self.0.idle.lock().await.pop();
                        let fresh = idle.is_none();
                        let mut stream = match idle {
                            Some(s) => s,
                            None => self.unix().await?,
                        };
                        match exchange(&mut stream, request).await {
                            Ok(reply) => {
                                self.0.idle.lock().await.push(stream);
                                return self.reply(what, reply);
                            }
                            Err(Exchange::Send(_)) if !fresh => {}
                            Err(e) => return Err(self.exchange_error(what, e)),
                        }
                    }
                }
                Way::Quic(_) => {
                    let mut stream = self.quic_stream(what).await?;
                    let reply = exchange(&mut stream, request).await;
                    self.reply(what, reply.map_err(|e| self.exchange_error(what, e))?)
                }
            }
        };
        timeout(within, call)
            .await
            .map_err(|_| self.late(what, within))?
    }

    /// Connects to the QMP socket of a VM.
    pub async fn open_qmp(&self, vm: &str) -> Result<Stream, ClientError> {
        let request = Request::VmmOpen { vm: vm.to_owned() };
        let what = verb(&request);
        let open = async {
            let mut stream: Stream = match &self.0.host.way {
                Way::Unix(_) => Box::new(self.unix().await?),
                Way::Quic(_) => Box::new(self.quic_stream(what).await?),
            };
            let reply = exchange(&mut stream, &request)
                .await
                .map_err(|e| self.exchange_error(what, e))?;
            match self.reply(what, reply)? {
                Reply::Ok => Ok(stream),
                other => Err(self.protocol(what, &other)),
            }
        };
        timeout(CALL, open)
            .await
            .map_err(|_| self.late(what, CALL))?
    }

    /// [`Request::HostShow`].
    pub async fn host_show(&self) -> Result<HostInfo, ClientError> {
        match self.call(&Request::HostShow).await? {
            Reply::Host(h) => Ok(h),
            other => Err(self.protocol("HostShow", &other)),
        }
    }

    /// [`Request::PortList`].
    pub async fn ports(&self) -> Result<Vec<PortInfo>, ClientError> {
        match self.call(&Request::PortList).await? {
            Reply::Ports(p) => Ok(p),
            other => Err(self.protocol("PortList", &other)),
        }
    }

    /// [`Request::WorkerList`] or [`Request::WorkersSet`].
    pub async fn workers(&self, request: &Request) -> Result<Vec<WorkerInfo>, ClientError> {
        match self.call(request).await? {
            Reply::Workers(w) => Ok(w),
            other => Err(self.protocol(verb(request), &other)),
        }
    }

    /// [`Request::VmList`].
    pub async fn vms(&self) -> Result<Vec<VmInfo>, ClientError> {
        match self.call(&Request::VmList).await? {
            Reply::Vms(v) => Ok(v),
            other => Err(self.protocol("VmList", &other)),
        }
    }

    /// [`Request::LinkList`].
    pub async fn links(&self) -> Result<Vec<LinkInfo>, ClientError> {
        match self.call(&Request::LinkList).await? {
            Reply::Links(l) => Ok(l),
            other => Err(self.protocol("LinkList", &other)),
        }
    }

    /// A call that answers [`Reply::Hold`].
    pub async fn hold(&self, request: &Request, within: Duration) -> Result<HoldInfo, ClientError> {
        match self.call_within(request, within).await? {
            Reply::Hold(h) => Ok(h),
            other => Err(self.protocol(verb(request), &other)),
        }
    }

    /// The error for an answer of the wrong kind.
    pub fn protocol(&self, what: &'static str, got: &Reply) -> ClientError {
        let mut why = format!("{got:?}");
        why.truncate(why.char_indices().nth(80).map_or(why.len(), |(i, _)| i));
        ClientError::Protocol {
            host: self.host().to_owned(),
            what,
            why,
        }
    }

    fn reply(&self, what: &'static str, reply: Reply) -> Result<Reply, ClientError> {
        match reply {
            Reply::Refused(refusal) => Err(ClientError::Refused {
                host: self.host().to_owned(),
                what,
                refusal,
            }),
            reply => Ok(reply),
        }
    }

    fn late(&self, what: &'static str, within: Duration) -> ClientError {
        let why = format!("was not answered within {} ms", within.as_millis());
        ClientError::Lost {
            host: self.host().to_owned(),
            what,
            why,
        }
    }

    fn exchange_error(&self, what: &'static str, e: Exchange) -> ClientError {
        let host = self.host().to_owned();
        match e {
            Exchange::Send(e) | Exchange::Receive(e) => ClientError::Lost {
                host,
                what,
                why: format!("broke off: {e}"),
            },
            Exchange::Codec(e) => ClientError::Protocol {
                host,
                what,
                why: e.to_string(),
            },
        }
    }

    fn unreachable(&self, why: impl ToString) -> ClientError {
        let at = self.0.host.way.to_string();
        ClientError::Unreachable {
            host: self.host().to_owned(),
            at,
            why: why.to_string(),
        }
    }

    /// A new unix connection that has said hello.
    async fn unix(&self) -> Result<UnixStream, ClientError> {
        let Way::Unix(path) = &self.0.host.way else {
            return Err(self.unreachable("not a unix socket"));
        };
        let connect = timeout(CONNECT, UnixStream::connect(path)).await;
        let mut stream = connect
            .map_err(|_| self.unreachable("no answer"))?
            .map_err(|e| self.unreachable(e))?;
        self.hello(&mut stream).await?;
        Ok(stream)
    }

    /// A new stream on the QUIC connection, which is made if there is none.
    async fn quic_stream(&self, what: &'static str) -> Result<QuicStream, ClientError> {
        let (Some(quic), Way::Quic(address)) = (&self.0.quic, &self.0.host.way) else {
            return Err(self.unreachable("no [tls] settings"));
        };
        let mut slot = quic.connection.lock().await;
        let connection = match slot.as_ref().filter(|c| c.close_reason().is_none()) {
            Some(c) => c.clone(),
            None => {
                let name = pki::host_server_name(self.host())
                    .map_err(|e| ClientError::Settings(e.to_string()))?;
                let connecting = endpoint(*address)
                    .map_err(|e| self.unreachable(e))?
                    .connect_with(quic.config.clone(), *address, &name)
                    .map_err(|e| self.unreachable(e))?;
                let c = timeout(CONNECT, connecting)
                    .await
                    .map_err(|_| self.unreachable("no answer"))?
                    .map_err(|e| self.unreachable(explain(&e, &name)))?;
                if let Err(e) = self.greet(&c).await {
                    return Err(match (e, c.close_reason()) {
                        (ClientError::Unreachable { .. }, Some(why)) => self.closed(&why, &name),
                        (e, _) => e,
                    });
                }
                *slot = Some(c.clone());
                c
            }
        };
        drop(slot);
        let (send, recv) = connection.open_bi().await.map_err(|e| ClientError::Lost {
            host: self.host().to_owned(),
            what,
            why: format!("was not sent: {e}"),
        })?;
        Ok(QuicStream { send, recv })
    }

    /// The first call of a QUIC connection.
    async fn greet(&self, connection: &quinn::Connection) -> Result<(), ClientError> {
        let opened = connection.open_bi().await;
        let (send, recv) = opened.map_err(|e| self.unreachable(e))?;
        self.hello(&mut QuicStream { send, recv }).await
    }

    /// The error for a connection that ended before the greeting: a switch that does not want our certificate says so behind
    /// the handshake (TLS 1.3).
    fn closed(&self, why: &quinn::ConnectionError, name: &str) -> ClientError {
        use quinn::ConnectionError as C;
        let denied = match why {
            C::ConnectionClosed(_) => true,
            C::ApplicationClosed(close) => close.error_code.into_inner() != 0,
            _ => false,
        };
        let why = explain(why, name);
        if !denied {
            return self.unreachable(why);
        }
        ClientError::Denied {
            host: self.host().to_owned(),
            at: self.0.host.way.to_string(),
            why,
        }
    }

    async fn hello(&self, stream: &mut (impl Duplex + ?Sized)) -> Result<(), ClientError> {
        const WHAT: &str = "Hello";
        let call = exchange(stream, &Request::Hello { version: VERSION });
        let reply = timeout(CONNECT, call)
            .await
            .map_err(|_| self.unreachable("it accepts the connection and says nothing"))?
            .map_err(|e| match e {
                Exchange::Codec(_) => self.exchange_error(WHAT, e),
                Exchange::Send(e) | Exchange::Receive(e) => self.unreachable(e),
            })?;
        match self.reply(WHAT, reply)? {
            Reply::Hello { version, .. } if version != VERSION => Err(ClientError::Protocol {
                host: self.host().to_owned(),
                what: WHAT,
                why: format!("its control API has version {version}, ours has {VERSION}"),
            }),
            Reply::Hello { host, .. } if host != self.host() => {
                Err(ClientError::Settings(format!(
                    "the switch at {} calls itself '{host}', but the hosts file calls it '{}': correct one of them",
                    self.0.host.way,
                    self.host()
                )))
            }
            Reply::Hello { .. } => Ok(()),
            other => Err(self.protocol(WHAT, &other)),
        }
    }
}

/// What a failed handshake means for the operator.
fn explain(e: &quinn::ConnectionError, name: &str) -> String {
    let text = e.to_string();
    // Each side says what is wrong with the other's certificate.
    let whose = match e {
        quinn::ConnectionError::ConnectionClosed(_) => "our certificate",
        _ => "its certificate",
    };
    let has = |words: &str| text.contains(words);
    let hint = if has("not valid for name") {
        format!(
            ": its certificate is not for '{name}', issue one with `gangway pki issue DIR NAME --host`"
        )
    } else if has("UnknownIssuer") || has("BadSignature") {
        ": the two sides do not have the same authority (ca)".to_owned()
    } else if has("UnknownRevocationStatus") {
        format!(": {whose} is of an authority of which tls.crl has no list")
    } else if has("Revoked") {
        format!(": {whose} was revoked, issue a new one")
    } else if has("certificate expired") {
        format!(": {whose} has expired, issue a new one")
    } else if has("not valid yet") {
        format!(": {whose} is not valid yet, compare the clocks of both sides")
    } else {
        String::new()
    };
    text + &hint
}

/// One endpoint per address family for the whole process.
static V4: OnceLock<quinn::Endpoint> = OnceLock::new();
static V6: OnceLock<quinn::Endpoint> = OnceLock::new();

/// Closes all connections, so that switches need not wait until they have timed out. At the end of a command.
pub async fn goodbye() {
    for endpoint in [&V4, &V6].into_iter().filter_map(OnceLock::get) {
        endpoint.close(quinn::VarInt::from_u32(0), b"");
        // A switch that does not listen any more finds out by itself.
        let _ = timeout(GOODBYE, endpoint.wait_idle()).await;
    }
}

fn endpoint(peer: SocketAddr) -> io::Result<quinn::Endpoint> {
    let (cell, any) = match peer {
        SocketAddr::V4(_) => (&V4, SocketAddr::from(([0, 0, 0, 0], 0))),
        SocketAddr::V6(_) => (&V6, SocketAddr::from(([0u16; 8], 0))),
    };
    match cell.get() {
        Some(e) => Ok(e.clone()),
        None => {
            let e = quinn::Endpoint::client(any)?;
            Ok(cell.get_or_init(|| e).clone())
        }
    }
}

fn quic_config(tls: rustls::ClientConfig) -> Result<quinn::ClientConfig, Failure> {
    let crypto = quinn::crypto::rustls::QuicClientConfig::try_from(tls)
        .map_err(|e| Failure::failed(e.to_string()))?;
    let mut transport = quinn::TransportConfig::default();
    transport.keep_alive_interval(Some(Duration::from_secs(2)));
    transport.max_idle_timeout(quinn::IdleTimeout::try_from(Duration::from_secs(15)).ok());
    let mut config = quinn::ClientConfig::new(Arc::new(crypto));
    config.transport_config(Arc::new(transport));
    Ok(config)
}

enum Exchange {
    Send(io::Error),
    Receive(io::Error),
    Codec(codec::CodecError),
}

async fn exchange<S: AsyncRead + AsyncWrite + Unpin + ?Sized>(
    stream: &mut S,
    request: &Request,
) -> Result<Reply, Exchange> {
    let body = codec::encode(request).map_err(Exchange::Codec)?;
    // `encode` allows no more than MESSAGE_MAX, which fits.
    let mut message = (body.len() as u32).to_le_bytes().to_vec();
    message.extend_from_slice(&body);
    stream.write_all(&message).await.map_err(Exchange::Send)?;
    stream.flush().await.map_err(Exchange::Send)?;
    let mut length = [0; 4];
    stream
        .read_exact(&mut length)
        .await
        .map_err(|e| match e.kind() {
            // The switch closed it before it read the request: an idle connection that had died.
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => Exchange::Send(e),
            _ => Exchange::Receive(e),
        })?;
    let length = u32::from_le_bytes(length) as usize;
    if length > codec::MESSAGE_MAX {
        return Err(Exchange::Codec(codec::CodecError::TooLong(length)));
    }
    let mut body = vec![0; length];
    stream
        .read_exact(&mut body)
        .await
        .map_err(Exchange::Receive)?;
    codec::decode(&body).map_err(Exchange::Codec)
}

struct QuicStream {
    send: quinn::SendStream,
    recv: quinn::RecvStream,
}

impl AsyncRead for QuicStream {
    fn poll_read(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
        buf: &mut tokio::io::ReadBuf<'_>,
    ) -> std::task::Poll<io::Result<()>> {
        AsyncRead::poll_read(std::pin::Pin::new(&mut self.recv), cx, buf)
    }
}

impl AsyncWrite for QuicStream {
    fn poll_write(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
        buf: &[u8],
    ) -> std::task::Poll<io::Result<usize>> {
        AsyncWrite::poll_write(std::pin::Pin::new(&mut self.send), cx, buf)
    }

    fn poll_flush(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<io::Result<()>> {
        AsyncWrite::poll_flush(std::pin::Pin::new(&mut self.send), cx)
    }

    fn poll_shutdown(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<io::Result<()>> {
        AsyncWrite::poll_shutdown(std::pin::Pin::new(&mut self.send), cx)
    }
}

/// The request's name, for messages.
pub fn verb(request: &Request) -> &'static str {
    request.name()
}

/// Switches of all hosts, by name.
pub fn all(hosts: &Hosts) -> Result<HashMap<String, Switch>, Failure> {
    hosts
        .hosts
        .iter()
        .map(|h| Ok((h.name.clone(), Switch::new(hosts, h)?)))
        .collect()
}
