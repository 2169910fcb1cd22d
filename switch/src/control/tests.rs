//! Calls over both ways in, and everything that must not get in.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::Mutex;
use std::time::Duration;

use gangway_shared::api::{self, HostInfo, RefusalCode, Reply, Request, VERSION};
use gangway_shared::codec;
use gangway_shared::config::HostConfig;
use gangway_shared::config::valid::TlsFiles;
use gangway_shared::pki::{Identity, PkiError, Role};
use gangway_shared::ship;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::pki_types::UnixTime;
use tempfile::TempDir;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::quic::{QuicError, endpoint};
use super::*;

mod bad;

/// Answers `HostShow`, panics at `LinkList`.
struct Fake;

impl Handler for Fake {
    fn call(&self, request: Request) -> Reply {
        match request {
            Request::HostShow => Reply::Host(HostInfo {
                name: "a".into(),
                version: "0".into(),
                uptime_s: 1,
                workers: 1,
                migration_address: String::new(),
                ports: 0,
                vms: 0,
                fdb_entries: 0,
                spool_used_bytes: 0,
                spool_quota_bytes: 0,
                spool_error: None,
                holds_overdue: None,
            }),
            Request::LinkList => panic!("as the test wants"),
            _ => refuse(RefusalCode::State, "no"),
        }
    }
}

/// Remembers who came.
#[derive(Default)]
struct Shipped(Mutex<Vec<Identity>>);

impl ShipAcceptor for Shipped {
    fn accept(&self, conn: quinn::Connection, peer: Identity) {
        self.0.lock().expect("lock").push(peer);
        conn.close(quinn::VarInt::from_u32(0), b"seen");
    }
}

/// An authority of the test's own.
struct Authority {
    dir: TempDir,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Authority {
        let dir = TempDir::new().expect("tempdir");
        let key = KeyPair::generate().expect("key");
        let mut params = CertificateParams::new(Vec::new()).expect("params");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let cert = params.self_signed(&key).expect("ca");
        std::fs::write(dir.path().join("ca.pem"), cert.pem()).expect("write");
        Authority {
            dir,
            issuer: Issuer::new(params, key),
        }
    }

    fn issue(&self, dns: &[&str], years: (i32, i32)) -> TlsFiles {
        let key = KeyPair::generate().expect("key");
        let names: Vec<String> = dns.iter().map(|d| (*d).to_owned()).collect();
        let mut params = CertificateParams::new(names).expect("params");
        params.not_before = rcgen::date_time_ymd(years.0, 1, 1);
        params.not_after = rcgen::date_time_ymd(years.1, 1, 1);
        let cert = params.signed_by(&key, &self.issuer).expect("sign");
        let stem = self.dir.path().join(dns.first().unwrap_or(&"none"));
        let file = |ext: &str| stem.with_file_name(format!("{}.{ext}", stem.display()));
        let (cert_path, key_path) = (file("pem"), file("key"));
        std::fs::write(&cert_path, cert.pem()).expect("write");
        std::fs::write(&key_path, key.serialize_pem()).expect("write");
        TlsFiles {
            cert: cert_path,
            key: key_path,
            ca: self.dir.path().join("ca.pem"),
            crl: None,
        }
    }

    fn good(&self, dns: &str) -> TlsFiles {
        self.issue(&[dns], (2020, 2090))
    }
}

/// A switch's control path that listens on both ways.
struct Host {
    cfg: HostConfig,
    shipped: Arc<Shipped>,
    address: Option<std::net::SocketAddr>,
    stop: Option<oneshot::Sender<()>>,
    task: tokio::task::JoinHandle<()>,
    _dir: TempDir,
}

fn config(dir: &Path) -> HostConfig {
    let text = format!(
        "[host]\nname = 'a'\nstate_dir = '{0}'\n[control]\nsocket = '{0}/control.sock'\n\
         [[vm]]\nname = 'web'\nqmp = '{0}/web.qmp'\n[[vm]]\nname = 'db'\nqmp = '{0}/db.qmp'\n",
        dir.display()
    );
    HostConfig::parse(&text, "test").expect("config")
}

impl Host {
    fn start(tls: Option<TlsFiles>) -> Host {
        let dir = TempDir::new().expect("tempdir");
        let mut cfg = config(dir.path());
        if tls.is_some() {
            cfg.listen = Some("127.0.0.1:0".parse().expect("address"));
            cfg.tls = tls;
        }
        let quic = endpoint(&cfg).expect("endpoint");
        let address = quic
            .as_ref()
            .map(|q| q.endpoint.local_addr().expect("address"));
        let shipped = Arc::new(Shipped::default());
        let server = Server::bind(
            &cfg,
            Vmm::new(&cfg),
            Arc::new(Fake),
            quic,
            Arc::clone(&shipped) as _,
        )
        .expect("bind");
        let (stop, stopped) = oneshot::channel();
        let task = tokio::spawn(server.run(async {
            let _ = stopped.await;
        }));
        Host {
            cfg,
            shipped,
            address,
            stop: Some(stop),
            task,
            _dir: dir,
        }
    }

    async fn unix(&self) -> UnixStream {
        UnixStream::connect(&self.cfg.control_socket)
            .await
            .expect("connect")
    }

    /// Dials as the holder of `tls`; an error says what the peer or quinn said.
    async fn quic(&self, tls: &TlsFiles, alpn: &[u8]) -> Result<quinn::Connection, String> {
        let credentials =
            gangway_shared::pki::Credentials::load(tls, UnixTime::now()).expect("credentials");
        let crypto = quinn::crypto::rustls::QuicClientConfig::try_from(
            credentials.client_config(alpn).expect("client"),
        )
        .expect("quic");
        let dialer =
            quinn::Endpoint::client("127.0.0.1:0".parse().expect("address")).expect("dialer");
        dialer
            .connect_with(
                quinn::ClientConfig::new(Arc::new(crypto)),
                self.address.expect("listens"),
                &gangway_shared::pki::host_server_name("a").expect("name"),
            )
            .expect("dial")
            .await
            .map_err(|e| e.to_string())
    }
}

async fn send<S: AsyncWrite + Unpin>(stream: &mut S, request: &Request) {
    let body = codec::encode(request).expect("encode");
    stream
        .write_all(&(body.len() as u32).to_le_bytes())
        .await
        .expect("write");
    stream.write_all(&body).await.expect("write");
}

async fn receive<S: AsyncRead + Unpin>(stream: &mut S) -> Reply {
    let read = async {
        let length = stream.read_u32_le().await.expect("length");
        let mut body = vec![0; length as usize];
        stream.read_exact(&mut body).await.expect("body");
        codec::decode(&body).expect("reply")
    };
    timeout(Duration::from_secs(10), read)
        .await
        .expect("in time")
}

async fn call<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S, request: &Request) -> Reply {
    send(stream, request).await;
    receive(stream).await
}

async fn closed<S: AsyncRead + Unpin>(stream: &mut S) -> bool {
    let mut byte = [0];
    matches!(
        timeout(Duration::from_secs(10), stream.read(&mut byte)).await,
        Ok(Ok(0) | Err(_))
    )
}

fn code(reply: &Reply) -> Option<RefusalCode> {
    match reply {
        Reply::Refused(r) => Some(r.code),
        _ => None,
    }
}

const HELLO: Request = Request::Hello { version: VERSION };

#[tokio::test]
async fn calls_follow_each_other_on_the_unix_socket() {
    let host = Host::start(None);
    let mode = std::fs::metadata(&host.cfg.control_socket)
        .expect("socket")
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    let mut s = host.unix().await;
    let hello = call(&mut s, &HELLO).await;
    assert_eq!(
        hello,
        Reply::Hello {
            version: VERSION,
            host: "a".into()
        }
    );
    assert!(matches!(
        call(&mut s, &Request::HostShow).await,
        Reply::Host(_)
    ));
    assert_eq!(
        code(&call(&mut s, &Request::LinkList).await),
        Some(RefusalCode::Internal),
        "a panic stays inside"
    );
    assert!(
        matches!(call(&mut s, &Request::HostShow).await, Reply::Host(_)),
        "and the connection goes on"
    );
}

#[tokio::test]
async fn the_first_call_must_be_hello_of_our_version() {
    let host = Host::start(None);
    let mut s = host.unix().await;
    assert_eq!(
        code(&call(&mut s, &Request::HostShow).await),
        Some(RefusalCode::Malformed)
    );
    assert!(closed(&mut s).await);
    let mut s = host.unix().await;
    let reply = call(&mut s, &Request::Hello { version: 99 }).await;
    let Reply::Refused(r) = reply else {
        panic!("{reply:?}")
    };
    assert_eq!(r.code, RefusalCode::Version);
    assert!(
        r.message.contains("version 99") && r.message.contains("install the same release"),
        "{r}"
    );
    assert!(closed(&mut s).await);
}

#[tokio::test]
async fn hostile_bytes_are_refused_and_the_connection_closed() {
    let host = Host::start(None);
    for bytes in [
        &[0xff, 0xff, 0xff, 0xff][..],
        &[1, 0, 16, 0, 0],
        &[0, 0, 0, 0],
        &[3, 0, 0, 0, 250, 250, 250],
        // VmmOpen with a name of 2^64 - 1 bytes.
        &[10, 0, 0, 0, 6, 253, 255, 255, 255, 255, 255, 255, 255, 255],
    ] {
        for greeted in [false, true] {
            let mut s = host.unix().await;
            if greeted {
                call(&mut s, &HELLO).await;
            }
            s.write_all(bytes).await.expect("write");
            assert_eq!(
                code(&receive(&mut s).await),
                Some(RefusalCode::Malformed),
                "{bytes:?}"
            );
            assert!(closed(&mut s).await);
        }
    }
    // A message that never ends does no harm to others.
    let mut slow = host.unix().await;
    slow.write_all(&[9, 0]).await.expect("write");
    let mut s = host.unix().await;
    assert!(matches!(call(&mut s, &HELLO).await, Reply::Hello { .. }));
}

#[tokio::test]
async fn too_many_connections_are_told_so() {
    let host = Host::start(None);
    let mut open = Vec::new();
    for _ in 0..64 {
        let mut s = host.unix().await;
        call(&mut s, &HELLO).await;
        open.push(s);
    }
    let mut s = host.unix().await;
    assert_eq!(code(&receive(&mut s).await), Some(RefusalCode::Busy));
    drop(open);
    tokio::time::sleep(Duration::from_millis(100)).await;
    let mut s = host.unix().await;
    assert!(matches!(call(&mut s, &HELLO).await, Reply::Hello { .. }));
}

#[tokio::test]
async fn a_dead_switch_s_socket_is_replaced_and_a_living_one_s_is_not() {
    let mut host = Host::start(None);
    let bind = |cfg: &HostConfig| {
        Server::bind(
            cfg,
            Vmm::new(cfg),
            Arc::new(Fake),
            None,
            Arc::new(Shipped::default()),
        )
        .map(|_| ())
    };
    assert!(matches!(
        bind(&host.cfg),
        Err(ServeError::AlreadyRunning(_))
    ));
    host.stop.take().expect("once").send(()).expect("stop");
    (&mut host.task).await.expect("ends");
    assert!(
        !host.cfg.control_socket.exists(),
        "a clean stop leaves nothing"
    );
    drop(std::os::unix::net::UnixListener::bind(&host.cfg.control_socket).expect("stale"));
    bind(&host.cfg).expect("stale file is replaced");
    std::fs::remove_file(&host.cfg.control_socket).expect("remove");
    std::fs::write(&host.cfg.control_socket, "precious").expect("write");
    assert!(matches!(bind(&host.cfg), Err(ServeError::NotASocket(_))));
}

#[tokio::test]
async fn a_coordinator_calls_over_quic() {
    let ca = Authority::new();
    let host = Host::start(Some(ca.good("a.host.gangway")));
    let me = ca.good("me.coordinator.gangway");
    let conn = host.quic(&me, api::ALPN).await.expect("connection");
    for (request, first) in [(HELLO, true), (Request::HostShow, false)] {
        let (send_half, recv) = conn.open_bi().await.expect("stream");
        let mut s = tokio::io::join(recv, send_half);
        let reply = call(&mut s, &request).await;
        assert_eq!(matches!(reply, Reply::Hello { .. }), first, "{reply:?}");
        assert!(closed(&mut s).await, "one call a stream");
    }
    let (mut s, mut r) = conn.open_bi().await.expect("stream");
    s.write_all(&[0xff; 9]).await.expect("write");
    assert_eq!(code(&receive(&mut r).await), Some(RefusalCode::Malformed));
    let why = timeout(Duration::from_secs(5), conn.closed())
        .await
        .expect("closed");
    assert!(why.to_string().contains("malformed"), "{why}");
}

#[tokio::test]
async fn roles_are_kept_apart() {
    let ca = Authority::new();
    let host = Host::start(Some(ca.good("a.host.gangway")));
    let (b, me) = (ca.good("b.host.gangway"), ca.good("me.coordinator.gangway"));
    let why = |conn: Result<quinn::Connection, String>| async {
        match conn {
            Ok(c) => timeout(Duration::from_secs(5), c.closed())
                .await
                .expect("closed")
                .to_string(),
            Err(e) => e,
        }
    };
    let e = why(host.quic(&b, api::ALPN).await).await;
    assert!(e.contains("host 'b' may ship but not control"), "{e}");
    let e = why(host.quic(&me, ship::ALPN).await).await;
    assert!(
        e.contains("coordinator 'me' may control but not ship"),
        "{e}"
    );
    let e = why(host.quic(&me, b"h3").await).await;
    assert!(e.contains("any known protocol"), "{e}");
    let e = why(host.quic(&b, ship::ALPN).await).await;
    assert!(e.contains("seen"), "{e}");
    let came = host.shipped.0.lock().expect("lock").clone();
    assert_eq!(
        came,
        [Identity {
            name: "b".into(),
            role: Role::Host
        }]
    );
}

#[tokio::test]
async fn strangers_do_not_get_in() {
    let (ca, other) = (Authority::new(), Authority::new());
    let host = Host::start(Some(ca.good("a.host.gangway")));
    let ends = |conn: Result<quinn::Connection, String>| async {
        match conn {
            Ok(c) => timeout(Duration::from_secs(5), c.closed())
                .await
                .expect("closed")
                .to_string(),
            Err(e) => e,
        }
    };
    // Its own authority does not know ours: it hangs up.
    let e = ends(
        host.quic(&other.good("me.coordinator.gangway"), api::ALPN)
            .await,
    )
    .await;
    // Every authority has the same name (as those of `gangway pki init` have): it is the signature that tells.
    assert!(e.contains("BadSignature"), "{e}");
    // It trusts us, but we don't trust it.
    let mut mixed = other.good("you.coordinator.gangway");
    let stranger = TlsFiles {
        ca: ca.dir.path().join("ca.pem"),
        ..mixed.clone()
    };
    let e = gangway_shared::pki::Credentials::load(&stranger, UnixTime::now())
        .expect_err("other authority");
    assert!(
        e.to_string().contains("was not issued by the authority in"),
        "{e}"
    );
    let trusting = std::fs::read_to_string(ca.dir.path().join("ca.pem")).expect("ca")
        + &std::fs::read_to_string(other.dir.path().join("ca.pem")).expect("ca");
    mixed.ca = other.dir.path().join("both.pem");
    std::fs::write(&mixed.ca, trusting).expect("write");
    let e = ends(host.quic(&mixed, api::ALPN).await).await;
    assert!(e.contains("handshake failed"), "{e}");
    // Issued by ours, but for nobody in particular.
    let files = ca.good("www.example.org");
    let e = rogue(&host, &files, api::ALPN, "a").await;
    assert!(e.contains("names neither a host"), "{e}");
    assert!(host.shipped.0.lock().expect("lock").is_empty());
}

/// Dials a host of this name with a certificate that we would not use ourselves. What ended it.
async fn rogue(host: &Host, files: &TlsFiles, alpn: &[u8], name: &str) -> String {
    use rustls::pki_types::pem::PemObject;
    use rustls::pki_types::{CertificateDer, PrivateKeyDer};
    let mut roots = rustls::RootCertStore::empty();
    roots
        .add(CertificateDer::from_pem_file(&files.ca).expect("ca"))
        .expect("root");
    let mut tls = rustls::ClientConfig::builder_with_provider(Arc::new(
        rustls::crypto::ring::default_provider(),
    ))
    .with_protocol_versions(&[&rustls::version::TLS13])
    .expect("tls")
    .with_root_certificates(roots)
    .with_client_auth_cert(
        vec![CertificateDer::from_pem_file(&files.cert).expect("cert")],
        PrivateKeyDer::from_pem_file(&files.key).expect("key"),
    )
    .expect("auth");
    tls.alpn_protocols = vec![alpn.to_vec()];
    let crypto = quinn::crypto::rustls::QuicClientConfig::try_from(tls).expect("quic");
    let dialer = quinn::Endpoint::client("127.0.0.1:0".parse().expect("address")).expect("dialer");
    let config = quinn::ClientConfig::new(Arc::new(crypto));
    let name = gangway_shared::pki::host_server_name(name).expect("name");
    let dialled = dialer.connect_with(config, host.address.expect("listens"), &name);
    match dialled.expect("dial").await {
        Ok(c) => timeout(Duration::from_secs(5), c.closed())
            .await
            .expect("closed")
            .to_string(),
        Err(e) => e.to_string(),
    }
}

#[tokio::test]
async fn wrong_certificates_are_named_before_anything_is_opened() {
    let ca = Authority::new();
    let dir = TempDir::new().expect("tempdir");
    let with = |tls: TlsFiles| {
        let mut cfg = config(dir.path());
        cfg.listen = Some("127.0.0.1:0".parse().expect("address"));
        cfg.tls = Some(tls);
        endpoint(&cfg).expect_err("must fail")
    };
    let text = |e: QuicError| e.to_string();

    let e = with(ca.good("b.host.gangway"));
    assert!(matches!(e, QuicError::NotOurs { .. }));
    assert!(text(e).contains("is for the host 'b', but host.name is 'a'"));
    let e = with(ca.good("a.coordinator.gangway"));
    assert!(text(e).contains("is for the coordinator 'a'"));
    let e = text(with(ca.issue(&["a.host.gangway"], (2019, 2020))));
    assert!(
        e.contains("expired on") && e.contains("2020") && e.contains("gangway pki issue"),
        "{e}"
    );
    let e = text(with(ca.issue(&["a.host.gangway"], (2080, 2090))));
    assert!(
        e.contains("is valid only from") && e.contains("clock"),
        "{e}"
    );
    let e = with(ca.issue(&["a.host.gangway", "b.host.gangway"], (2020, 2090)));
    assert!(matches!(e, QuicError::Pki(PkiError::Ambiguous(_))));
    let e = with(ca.issue(&["*.host.gangway"], (2020, 2090)));
    assert!(matches!(e, QuicError::Pki(PkiError::NoIdentity(_))), "{e}");
    let key = ca.good("c.host.gangway").key;
    let good = ca.good("a.host.gangway");
    let e = text(with(TlsFiles {
        key,
        ..good.clone()
    }));
    assert!(e.contains("does not belong to certificate"), "{e}");
    let e = text(with(TlsFiles {
        key: "/nowhere/a.key".into(),
        ..good.clone()
    }));
    assert!(
        e.contains("cannot read private key '/nowhere/a.key': No such file"),
        "{e}"
    );
    let e = text(with(TlsFiles {
        key: good.cert.clone(),
        ..good.clone()
    }));
    assert!(e.contains("no private key in"), "{e}");
    let garbage = dir.path().join("garbage.pem");
    std::fs::write(
        &garbage,
        "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
    )
    .expect("write");
    let e = text(with(TlsFiles {
        ca: garbage.clone(),
        ..good.clone()
    }));
    assert!(e.contains("garbage.pem"), "{e}");
    let e = text(with(TlsFiles {
        cert: garbage,
        ..good.clone()
    }));
    assert!(e.contains("not an X.509 certificate"), "{e}");
    let mut cfg = config(dir.path());
    cfg.listen = Some("192.0.2.1:7600".parse().expect("address"));
    cfg.tls = Some(good);
    let e = endpoint(&cfg).expect_err("not our address").to_string();
    assert!(e.contains("control.listen 192.0.2.1:7600: "), "{e}");
}
