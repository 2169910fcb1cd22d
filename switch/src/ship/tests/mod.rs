//! Shipments over real QUIC on the loopback, with certificates from a throw-away authority.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use gangway_shared::api::{Reply, Request};
use gangway_shared::config::HostConfig;
use gangway_shared::config::valid::{SpoolConfig, SpoolLimits, Sync, TlsFiles};
use gangway_shared::id::{HoldId, LaneKey};
use gangway_shared::pki::{self, Identity};
use tempfile::TempDir;

use super::*;
use crate::control::quic::{self, Quic};
use crate::control::{Handler, Server, ShipAcceptor, Vmm};
use crate::spool::tests::{HOLD, bytes, put, until, vnet};
use crate::spool::{Kind, Queue, Spool, Writer};

mod hostile;
mod ships;

const TICKET: [u8; 32] = [7; 32];

/// Two hosts' switches, as far as shipments go: the product's endpoints, server and acceptor.
pub(crate) struct World {
    pub(crate) dir: TempDir,
    pub(crate) rt: tokio::runtime::Runtime,
    pub(crate) source: Arc<Spool>,
    pub(crate) target: Arc<Spool>,
    pub(crate) acceptor: Arc<Acceptor>,
    pub(crate) client: quinn::ClientConfig,
    pub(crate) endpoint: quinn::Endpoint,
    pub(crate) address: SocketAddr,
    /// The target's connections, to be cut.
    pub(crate) conns: Arc<std::sync::Mutex<Vec<quinn::Connection>>>,
    pub(crate) relay: Arc<AtomicBool>,
    pub(crate) relayed: SocketAddr,
    /// Which the log names; another one where a test looks there.
    hold: HoldId,
}

fn spool_config(dir: PathBuf, sync: Sync) -> SpoolConfig {
    SpoolConfig {
        dir,
        segment_bytes: 256 << 10,
        quota_bytes: 256 << 20,
        sync,
        limits: SpoolLimits::default(),
    }
}

/// A host's certificate, by `gangway pki` of the authority in `dir`.
fn issue(dir: &Path, name: &str) -> TlsFiles {
    gangway::pki::issue(dir, name, pki::Role::Host, &[]).unwrap();
    TlsFiles {
        cert: dir.join(format!("{name}.pem")),
        key: dir.join(format!("{name}.key")),
        ca: dir.join("ca.pem"),
        crl: Some(dir.join("ca.crl")),
    }
}

/// A host's configuration, and its endpoint as `main` opens it.
fn listen_as(dir: &Path, name: &str, tls: TlsFiles) -> (HostConfig, Quic) {
    let d = dir.display();
    let text = format!(
        "[host]\nname = '{name}'\nstate_dir = '{d}'\n[control]\nsocket = '{d}/{name}.sock'\n"
    );
    let mut cfg = HostConfig::parse(&text, "test").unwrap();
    cfg.listen = Some(SocketAddr::from(([127, 0, 0, 1], 0)));
    cfg.tls = Some(tls);
    let quic = quic::endpoint(&cfg).unwrap().unwrap();
    (cfg, quic)
}

/// Answers every order the same.
struct Answers;

impl Handler for Answers {
    fn call(&self, _: Request) -> Reply {
        Reply::Ok
    }
}

/// As the switch does it; remembers the connections.
struct Shipments(Arc<Acceptor>, Arc<std::sync::Mutex<Vec<quinn::Connection>>>);

impl ShipAcceptor for Shipments {
    fn accept(&self, conn: quinn::Connection, peer: Identity) {
        self.1.lock().unwrap().push(conn.clone());
        tokio::spawn(self.0.clone().accept(conn, peer.name));
    }
}

impl World {
    pub(crate) fn new(sync: Sync) -> World {
        let dir = tempfile::tempdir().unwrap();
        gangway::pki::init(dir.path()).unwrap();
        let rt = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let _in = rt.enter();
        let [(_, alpha), (cfg, beta)] =
            ["alpha", "beta"].map(|name| listen_as(dir.path(), name, issue(dir.path(), name)));
        let address = beta.endpoint.local_addr().unwrap();
        let acceptor = Arc::new(Acceptor::new().unwrap());
        let conns = Arc::new(std::sync::Mutex::new(Vec::new()));
        let shipments = Arc::new(Shipments(acceptor.clone(), conns.clone()));
        let server = Server::bind(
            &cfg,
            Vmm::new(&cfg),
            Arc::new(Answers),
            Some(beta),
            shipments,
        );
        rt.spawn(server.unwrap().run(std::future::pending()));
        let relay = Arc::new(AtomicBool::new(true));
        let relayed = rt.block_on(cable(address, relay.clone()));
        let spool = |name: &str| {
            Spool::open(&spool_config(dir.path().join(name), sync))
                .unwrap()
                .0
        };
        World {
            source: spool("source"),
            target: spool("target"),
            acceptor,
            client: alpha.ship_client().unwrap(),
            endpoint: alpha.endpoint,
            address,
            conns,
            relay,
            relayed,
            hold: HOLD,
            rt: {
                drop(_in);
                rt
            },
            dir,
        }
    }

    fn expect(&self) -> Arc<Incoming> {
        let i = self.incoming(self.hold, TICKET, "alpha");
        self.acceptor.register(i.clone());
        i
    }

    fn incoming(&self, hold: HoldId, ticket: [u8; 32], source: &str) -> Arc<Incoming> {
        let ports = vec!["db0".into(), "db1".into()];
        Incoming::new(self.target.clone(), hold, ticket, source.into(), ports)
    }

    fn args(&self) -> OutgoingArgs {
        OutgoingArgs {
            hold: self.hold,
            ticket: TICKET,
            target_address: self.address.to_string(),
            target_host: "beta".into(),
        }
    }

    fn ship(&self, args: OutgoingArgs) -> Arc<Outgoing> {
        let rt = self.rt.handle().clone();
        Outgoing::start(rt, self.endpoint.clone(), self.client.clone(), args)
    }

    fn queue(&self, n: u16) -> (Writer, Arc<Queue>) {
        self.source
            .create(self.hold, Kind::Source, &key(n))
            .unwrap()
    }

    fn cut(&self) {
        for c in self.conns.lock().unwrap().drain(..) {
            c.close(quinn::VarInt::from_u32(9), b"cut by the test");
        }
    }
}

fn key(n: u16) -> LaneKey {
    LaneKey {
        from: format!("web{n}"),
        queue: n,
        to: "db0".into(),
    }
}

/// A cable that can be pulled: forwards datagrams between one client and `to` while `on`.
async fn cable(to: SocketAddr, on: Arc<AtomicBool>) -> SocketAddr {
    let near = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let far = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    far.connect(to).await.unwrap();
    let at = near.local_addr().unwrap();
    tokio::spawn(async move {
        let (mut a, mut b) = (vec![0; 65536], vec![0; 65536]);
        let mut client = None;
        loop {
            tokio::select! {
                Ok((n, from)) = near.recv_from(&mut a) => {
                    client = Some(from);
                    if on.load(Ordering::Relaxed) {
                        let _ = far.send(&a[..n]).await;
                    }
                }
                Ok(n) = far.recv(&mut b) => {
                    if let (true, Some(c)) = (on.load(Ordering::Relaxed), client) {
                        let _ = near.send_to(&b[..n], c).await;
                    }
                }
            }
        }
    });
    at
}

/// Source, wire and target agree on this lane, and the frames are the ones that were put in.
fn check(out: &Outgoing, into: &Incoming, q: &Arc<Queue>, frames: u64) {
    let t = q.tally();
    assert_eq!(t.frames, frames);
    let sent = out
        .status()
        .into_iter()
        .find(|l| l.key == *q.lane())
        .unwrap();
    assert!(sent.complete);
    assert_eq!((sent.acked, sent.acked_seq), (t, frames));
    let got = into
        .lanes()
        .into_iter()
        .find(|l| l.key == *q.lane())
        .unwrap();
    assert!(got.complete && got.queue.is_sealed() && got.mismatch.is_none());
    assert_eq!(got.acked, t);
    assert_eq!(got.inside, sent.inside);
    let mut r = got.queue.reader();
    let mut n = 0;
    while let Some(x) = r.peek().unwrap() {
        assert_eq!(x.seq, n + 1);
        assert_eq!(x.frame, bytes(x.time_ns, x.frame.len()));
        assert_eq!(x.vnet, vnet(x.time_ns));
        r.advance();
        n += 1;
    }
    assert!(r.finished());
    assert_eq!(r.tally(), t);
}

const LONG: Duration = Duration::from_secs(30);
