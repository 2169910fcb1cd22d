//! The host's one QUIC endpoint: coordinators and other switches come in on it, shipments go out from it.

use std::io::{self, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
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

use crate::ship::{PACKET_MAX, SENT_MAX};

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
            let socket = Arc::new(wrap(runtime.wrap_udp_socket(s)?));
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

/// Hands no more to the kernel at once than that sends at once. quinn hands over ten packets, however large they are.
#[derive(Debug)]
struct Socket {
    inner: Arc<dyn AsyncUdpSocket>,
    /// The size of the last packets that went out together.
    packet: AtomicUsize,
}

fn wrap(inner: Arc<dyn AsyncUdpSocket>) -> Socket {
    Socket {
        inner,
        packet: AtomicUsize::new(PACKET_MAX.into()),
    }
}

impl Socket {
    fn packets(&self) -> usize {
        (SENT_MAX / self.packet.load(Ordering::Relaxed)).max(1)
    }
}

impl AsyncUdpSocket for Socket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        self.inner.clone().create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let Some(size) = transmit.segment_size.filter(|s| *s > 0) else {
            return self.inner.try_send(transmit);
        };
        self.packet.store(size, Ordering::Relaxed);
        // The first ones of a new size may be too many. What is sent again because the rest had no room does no harm.
        for contents in transmit.contents.chunks(self.packets() * size) {
            self.inner.try_send(&Transmit {
                contents,
                ..transmit.clone()
            })?;
        }
        Ok(())
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        self.inner.poll_recv(cx, bufs, meta)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.inner.max_transmit_segments().min(self.packets())
    }

    fn max_receive_segments(&self) -> usize {
        self.inner.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.inner.may_fragment()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn no_packet_of_a_burst_is_lost_however_large_they_are() {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let to = socket(any).unwrap();
        to.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let runtime = quinn::default_runtime().unwrap();
        let from = Arc::new(wrap(runtime.wrap_udp_socket(socket(any).unwrap()).unwrap()));
        let mut ready = from.clone().create_io_poller();
        let most = from.inner.max_transmit_segments();
        for size in [PACKET_MAX.into(), 1452, PACKET_MAX.into(), 1200_usize] {
            // quinn asks how many before it knows how large they are.
            let packets = most.min(10);
            let contents: Vec<u8> = (0..packets * size - 7).map(|n| (n / size) as u8).collect();
            let transmit = Transmit {
                destination: to.local_addr().unwrap(),
                ecn: None,
                contents: &contents,
                segment_size: Some(size),
                src_ip: None,
            };
            std::future::poll_fn(|cx| ready.as_mut().poll_writable(cx))
                .await
                .unwrap();
            from.try_send(&transmit).unwrap();
            assert!(from.max_transmit_segments() * size <= SENT_MAX);
            let mut packet = vec![0; 1 << 16];
            for n in 0..packets {
                let len = to.recv(&mut packet).unwrap();
                let want = size - if n == packets - 1 { 7 } else { 0 };
                assert_eq!((len, packet[0], packet[len - 1]), (want, n as u8, n as u8));
            }
        }
        assert_eq!(from.max_transmit_segments(), most.min(SENT_MAX / 1200));
    }
}
