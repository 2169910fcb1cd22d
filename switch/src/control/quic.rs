//! The host's one QUIC endpoint: coordinators and other switches come in on it, shipments go out from it.

use std::io::{self, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use gangway_shared::config::HostConfig;
use gangway_shared::pki::{Credentials, Identity, PkiError, Role, peer_identity};
use gangway_shared::{api, ship};
use quinn::crypto::rustls::{HandshakeData, QuicClientConfig, QuicServerConfig};
use quinn::udp::{RecvMeta, Transmit};
use quinn::{
    AsyncUdpSocket, ClientConfig, Connection, Endpoint, EndpointConfig, ServerConfig,
    TransportConfig, UdpPoller, VarInt,
};
use rustls::pki_types::{CertificateDer, UnixTime};

use crate::ship::{PACKET_MAX, PACKETS_AT_ONCE};

/// What may be under way: 10 Gbit/s for 13 ms.
const WINDOW_BYTES: u32 = 16 << 20;
const STREAM_WINDOW_BYTES: u32 = 8 << 20;
/// A dead peer is noticed after this long; a coordinator that was killed keeps a VM's QMP socket until then.
const IDLE: Duration = Duration::from_secs(6);
const KEEP_ALIVE: Duration = Duration::from_secs(2);
/// Calls side by side on one connection.
const CALLS_MAX: u32 = 64;
/// Handshakes under way.
const HANDSHAKES_MAX: usize = 256;

/// Why there is no endpoint.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QuicError {
    /// The operator's: certificate, key or authority.
    #[error("tls: {0}")]
    Pki(#[from] PkiError),
    /// The operator's: the certificate is for somebody else.
    #[error(
        "tls.cert '{cert}' is for the {found}, but host.name is '{name}'; use the certificate of this host, or correct host.name"
    )]
    NotOurs {
        /// The file.
        cert: String,
        /// Whom it names.
        found: Identity,
        /// Whom it should name.
        name: String,
    },
    /// The operator's: the address is not ours or taken.
    #[error(
        "control.listen {address}: {source}; is it an address of this host, and no other switch running?"
    )]
    Bind {
        /// What was asked for.
        address: SocketAddr,
        /// Why not.
        source: io::Error,
    },
    /// Ours.
    #[error("TLS cannot be set up for QUIC: {0}")]
    Tls(String),
}

/// The endpoint, and what is needed to dial from it.
#[derive(Debug, Clone)]
pub struct Quic {
    /// Accepts both protocols.
    pub endpoint: Endpoint,
    /// Who we are.
    pub identity: Identity,
    credentials: Credentials,
}

impl Quic {
    /// To dial with, ALPN [`ship::ALPN`]. The server name to ask for: [`gangway_shared::pki::host_server_name`].
    pub fn ship_client(&self) -> Result<ClientConfig, QuicError> {
        self.client(ship::ALPN, crate::ship::transport())
    }

    /// To dial with any protocol.
    pub fn client(
        &self,
        alpn: &[u8],
        transport: TransportConfig,
    ) -> Result<ClientConfig, QuicError> {
        let tls = self.credentials.client_config(alpn)?;
        let crypto = QuicClientConfig::try_from(tls).map_err(|e| QuicError::Tls(e.to_string()))?;
        let mut config = ClientConfig::new(Arc::new(crypto));
        config.transport_config(Arc::new(transport));
        Ok(config)
    }
}

/// Checks the certificates that the configuration names, without opening anything.
pub fn check(cfg: &HostConfig) -> Result<(), QuicError> {
    credentials(cfg).map(|_| ())
}

fn credentials(cfg: &HostConfig) -> Result<Option<Credentials>, QuicError> {
    let Some(files) = &cfg.tls else {
        return Ok(None);
    };
    let credentials = Credentials::load(files, UnixTime::now())?;
    let found = credentials.identity();
    if found.role != Role::Host || found.name != cfg.name {
        return Err(QuicError::NotOurs {
            cert: files.cert.display().to_string(),
            found: found.clone(),
            name: cfg.name.clone(),
        });
    }
    Ok(Some(credentials))
}

/// Opens the endpoint of `control.listen`; `None` without one. To be called inside the runtime.
pub fn endpoint(cfg: &HostConfig) -> Result<Option<Quic>, QuicError> {
    let (Some(address), Some(credentials)) = (cfg.listen, credentials(cfg)?) else {
        return Ok(None);
    };
    let tls = credentials.server_config(&[api::ALPN, ship::ALPN])?;
    let crypto = QuicServerConfig::try_from(tls).map_err(|e| QuicError::Tls(e.to_string()))?;
    let mut server = ServerConfig::with_crypto(Arc::new(crypto));
    server.transport_config(Arc::new(transport()));
    server.max_incoming(HANDSHAKES_MAX);
    let endpoint = socket(address)
        .and_then(|s| {
            let runtime = quinn::default_runtime()
                .ok_or_else(|| io::Error::other("no tokio runtime on this thread"))?;
            // What we do not offer nobody sends us: by itself quinn offers 1,472 bytes.
            let mut config = EndpointConfig::default();
            config
                .max_udp_payload_size(PACKET_MAX)
                .map_err(io::Error::other)?;
            let socket = Arc::new(Socket(runtime.wrap_udp_socket(s)?));
            Endpoint::new_with_abstract_socket(config, Some(server), socket, runtime)
        })
        .map_err(|source| QuicError::Bind { address, source })?;
    Ok(Some(Quic {
        endpoint,
        identity: credentials.identity().clone(),
        credentials,
    }))
}

/// What both kinds of connections start with. Streams one way are allowed once a peer is known to be a host.
fn transport() -> TransportConfig {
    let mut t = TransportConfig::default();
    let mut mtu = quinn::MtuDiscoveryConfig::default();
    mtu.upper_bound(PACKET_MAX);
    t.mtu_discovery_config(Some(mtu));
    t.stream_receive_window(VarInt::from_u32(STREAM_WINDOW_BYTES));
    t.receive_window(VarInt::from_u32(WINDOW_BYTES));
    t.send_window(u64::from(WINDOW_BYTES));
    t.max_concurrent_bidi_streams(VarInt::from_u32(CALLS_MAX));
    t.max_concurrent_uni_streams(VarInt::from_u32(0));
    t.datagram_receive_buffer_size(None);
    t.keep_alive_interval(Some(KEEP_ALIVE));
    t.max_idle_timeout(quinn::IdleTimeout::try_from(IDLE).ok());
    t.congestion_controller_factory(Arc::new(quinn::congestion::CubicConfig::default()));
    t
}

/// Hands no more to the kernel at once than it sends at once.
#[derive(Debug)]
struct Socket(Arc<dyn AsyncUdpSocket>);

impl AsyncUdpSocket for Socket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        self.0.clone().create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.0.try_send(transmit)
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        self.0.poll_recv(cx, bufs, meta)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.0.max_transmit_segments().min(PACKETS_AT_ONCE)
    }

    fn max_receive_segments(&self) -> usize {
        self.0.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.0.may_fragment()
    }
}

fn socket(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind(address)?;
    // With CAP_NET_ADMIN; without it as much as the administrator allows (net.core.rmem_max). Less is slower, not wrong.
    use rustix::net::sockopt as opt;
    let bytes = WINDOW_BYTES as usize;
    if opt::set_socket_recv_buffer_size_force(&socket, bytes).is_err() {
        let _ = opt::set_socket_recv_buffer_size(&socket, bytes);
    }
    if opt::set_socket_send_buffer_size_force(&socket, bytes).is_err() {
        let _ = opt::set_socket_send_buffer_size(&socket, bytes);
    }
    Ok(socket)
}

/// What a peer came for, from the handshake.
pub(super) fn protocol(conn: &Connection) -> Option<Vec<u8>> {
    conn.handshake_data()?
        .downcast::<HandshakeData>()
        .ok()?
        .protocol
}

/// Who a peer is, from the certificate that the handshake has verified.
pub(super) fn peer(conn: &Connection) -> Result<Identity, PkiError> {
    let chain = conn
        .peer_identity()
        .and_then(|any| any.downcast::<Vec<CertificateDer<'static>>>().ok())
        .ok_or(PkiError::NoCertificate)?;
    peer_identity(chain.first().ok_or(PkiError::NoCertificate)?)
}
