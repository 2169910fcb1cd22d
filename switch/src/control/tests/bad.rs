//! Who may not come in, and what may not be asked now: a refusal that says what is wanted, once in the log, and nothing has
//! changed. Certificates are those of `gangway pki`; what it never issues is made here with its authority's key.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

use gangway::hosts::Hosts;
use gangway_shared::api::{HoldInfo, HoldOpen, IncomingPort, IncomingPrepare, Scope};
use gangway_shared::id::HoldId;
use gangway_shared::pki::{Credentials, host_server_name};

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use super::*;
use crate::run::Switch;
use crate::said::tests::{listen, logged};
use crate::ship::{Outgoing, OutgoingArgs, ShipError};

/// How often each thing is tried.
const TIMES: usize = 3;

/// An authority of `gangway pki init`.
struct Pki(TempDir);

impl Pki {
    fn new() -> Pki {
        let dir = TempDir::new().expect("tempdir");
        gangway::pki::init(dir.path()).expect("init");
        Pki(dir)
    }

    fn path(&self, file: &str) -> PathBuf {
        self.0.path().join(file)
    }

    fn files(&self, name: &str) -> TlsFiles {
        TlsFiles {
            cert: self.path(&format!("{name}.pem")),
            key: self.path(&format!("{name}.key")),
            ca: self.path("ca.pem"),
            crl: Some(self.path("ca.crl")),
        }
    }

    fn issue(&self, name: &str, role: Role) -> TlsFiles {
        gangway::pki::issue(self.0.path(), name, role, &[]).expect("issue");
        self.files(name)
    }

    /// Issued, and taken back. Whoever had it has it still.
    fn revoked(&self, name: &str, role: Role) -> TlsFiles {
        let (files, kept) = (self.issue(name, role), self.files(&format!("kept-{name}")));
        for (from, to) in [(&files.cert, &kept.cert), (&files.key, &kept.key)] {
            std::fs::copy(from, to).expect("copy");
        }
        gangway::pki::revoke(self.0.path(), name).expect("revoke");
        kept
    }

    /// With other dates than a certificate of `issue` has, or for another name.
    fn forged(&self, name: &str, dns: &str, years: (i32, i32)) -> TlsFiles {
        let read = |file: &str| std::fs::read_to_string(self.path(file)).expect("read");
        let key = KeyPair::from_pem(&read("ca.key")).expect("key");
        let issuer = Issuer::from_ca_cert_pem(&read("ca.pem"), key).expect("issuer");
        let key = KeyPair::generate().expect("key");
        let mut params = CertificateParams::new(vec![dns.to_owned()]).expect("params");
        params.not_before = rcgen::date_time_ymd(years.0, 1, 1);
        params.not_after = rcgen::date_time_ymd(years.1, 1, 1);
        let cert = params.signed_by(&key, &issuer).expect("sign");
        let files = self.files(name);
        std::fs::write(&files.cert, cert.pem()).expect("write");
        std::fs::write(&files.key, key.serialize_pem()).expect("write");
        files
    }
}

/// The one line of the log that has all these words.
async fn once(words: &[&str]) -> String {
    for _ in 0..500 {
        if !logged(words).is_empty() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let mut lines = logged(words);
    assert_eq!(lines.len(), 1, "{words:?}: {lines:#?}");
    lines.remove(0)
}

/// What the coordinator's command says of a host that its file calls `name`. One test only may ask: its endpoint belongs to
/// the process, and to the runtime that first used it.
async fn coordinator(address: SocketAddr, name: &str, files: &TlsFiles) -> String {
    let text = format!(
        "[[host]]\nname = '{name}'\naddress = '{}'\n[tls]\ncert = '{}'\nkey = '{}'\nca = '{}'\n",
        address,
        files.cert.display(),
        files.key.display(),
        files.ca.display()
    );
    let hosts = Hosts::parse(Path::new("hosts.toml"), &text).expect("hosts");
    let switch = gangway::client::Switch::new(&hosts, &hosts.hosts[0]).expect("a switch");
    match switch.host_show().await {
        Ok(shown) => format!("{shown:?}"),
        Err(e) => e.to_string(),
    }
}

#[tokio::test]
async fn a_wrong_certificate_does_not_get_in_and_the_log_says_so_once() {
    listen();
    let (ca, other) = (Pki::new(), Pki::new());
    let (a, me) = (ca.issue("a", Role::Host), ca.issue("me", Role::Coordinator));
    let (b, hal) = (ca.issue("b", Role::Host), ca.issue("hal", Role::Host));
    let kim = ca.issue("kim", Role::Coordinator);
    let ray = ca.revoked("ray", Role::Coordinator);
    let host = Host::start(Some(a));
    let at = host.address.expect("listens");

    // It trusts both authorities, the host only its own.
    let pem = |pki: &Pki| std::fs::read_to_string(pki.path("ca.pem")).expect("ca");
    let both = other.path("both.pem");
    std::fs::write(&both, pem(&ca) + &pem(&other)).expect("write");
    let fay = TlsFiles {
        ca: both,
        ..other.issue("fay", Role::Coordinator)
    };
    let dated = |name: &str, years| ca.forged(name, "old.coordinator.gangway", years);
    let www = ca.forged("www", "www.bad.example", (2020, 2090));
    let handshake = "wanted: gangway-control/1 or gangway-ship/2, with a valid certificate";
    // Not what a peer has said of a certificate of ours, in another test.
    let ours = "refused: the cryptographic handshake failed";
    let cases = [
        (
            &fay,
            api::ALPN,
            "a",
            ["certificate: UnknownIssuer", handshake],
        ),
        (
            &dated("old", (2019, 2020)),
            api::ALPN,
            "a",
            ["certificate expired", handshake],
        ),
        (
            &dated("new", (2080, 2090)),
            api::ALPN,
            "a",
            ["certificate not valid yet", handshake],
        ),
        (&ray, api::ALPN, "a", ["certificate: Revoked", ours]),
        (&ray, ship::ALPN, "a", ["certificate: Revoked", ours]),
        (
            &www,
            api::ALPN,
            "a",
            ["names neither a host", "but www.bad.example;"],
        ),
        (
            &hal,
            api::ALPN,
            "a",
            ["host 'hal' may ship but not control", "--coordinator"],
        ),
        (
            &kim,
            ship::ALPN,
            "a",
            ["coordinator 'kim' may control but not ship", "from hosts"],
        ),
        (
            &me,
            api::ALPN,
            "zed",
            ["not valid for name \"zed.host.gangway\"", handshake],
        ),
    ];
    for (files, alpn, name, [why, _]) in &cases {
        for _ in 0..TIMES {
            let told = rogue(&host, files, alpn, name).await;
            assert!(told.contains(why), "no {why:?} in: {told}");
        }
    }
    // In the coordinator's words.
    for (files, name, words) in [
        (
            &fay,
            "a",
            ["does not let us in", "do not have the same authority"],
        ),
        (
            &ray,
            "a",
            ["does not let us in", "our certificate was revoked"],
        ),
        (
            &hal,
            "a",
            ["does not let us in", "may ship but not control"],
        ),
        (
            &me,
            "zed",
            [
                "cannot be reached",
                "its certificate is not for 'zed.host.gangway'",
            ],
        ),
    ] {
        let said = coordinator(at, name, files).await;
        for word in words {
            assert!(said.contains(word), "no {word:?} in: {said}");
        }
    }

    let said = coordinator(outdated(&ca).0, "a", &me).await;
    for word in [
        "switch of host 'a' at",
        "cannot be reached",
        "its certificate has expired, issue a new one",
    ] {
        assert!(said.contains(word), "no {word:?} in: {said}");
    }

    // Nobody came through; whoever may does.
    assert!(host.shipped.0.lock().expect("lock").is_empty());
    let shown = coordinator(at, "a", &me).await;
    assert!(shown.contains("uptime_s"), "{shown}");
    let conn = host.quic(&b, ship::ALPN).await.expect("a host may ship");
    conn.closed().await;
    let came = host.shipped.0.lock().expect("lock").clone();
    assert_eq!(came.len(), 1, "{came:?}");

    tokio::time::sleep(Duration::from_millis(200)).await;
    for (.., words) in &cases {
        let line = once(words).await;
        assert!(
            line.contains("WARN") && line.contains("127.0.0.1: refused: "),
            "{line}"
        );
    }
}

/// A switch `a` whose certificate has expired while it ran: where it is, and how often somebody came.
fn outdated(ca: &Pki) -> (SocketAddr, Arc<AtomicUsize>) {
    let files = ca.forged("late", "a.host.gangway", (2019, 2020));
    let chain = CertificateDer::pem_file_iter(&files.cert).expect("cert");
    let chain = chain.map(|c| c.expect("cert")).collect();
    let key = PrivateKeyDer::from_pem_file(&files.key).expect("key");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let tls = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("versions");
    let mut tls = tls
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .expect("tls");
    tls.alpn_protocols = vec![api::ALPN.to_vec(), ship::ALPN.to_vec()];
    let tls = quinn::crypto::rustls::QuicServerConfig::try_from(tls).expect("quic");
    let server = quinn::ServerConfig::with_crypto(Arc::new(tls));
    let any = "127.0.0.1:0".parse().expect("address");
    let endpoint = quinn::Endpoint::server(server, any).expect("endpoint");
    let (address, came) = (
        endpoint.local_addr().expect("address"),
        Arc::new(AtomicUsize::new(0)),
    );
    let count = came.clone();
    tokio::spawn(async move {
        while let Some(incoming) = endpoint.accept().await {
            count.fetch_add(1, Ordering::Relaxed);
            tokio::spawn(async move { incoming.await.map(|c| async move { c.closed().await }) });
        }
    });
    (address, came)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_whose_certificate_has_expired_is_named_and_the_log_says_so_once() {
    listen();
    let ca = Pki::new();
    let (at, came) = outdated(&ca);
    let mut cfg = config(ca.0.path());
    cfg.name = "b".into();
    cfg.listen = Some("127.0.0.1:0".parse().expect("address"));
    cfg.tls = Some(ca.issue("b", Role::Host));
    let quic = endpoint(&cfg).expect("endpoint").expect("it listens");
    let args = OutgoingArgs {
        hold: HoldId(0xb0d1_e5b0_d1e5_0009),
        ticket: [0; 32],
        target_address: at.to_string(),
        target_host: "a".into(),
    };
    let id = args.hold.to_string();
    let client = quic.ship_client().expect("client");
    let rt = tokio::runtime::Handle::current();
    let new = Outgoing::start(
        rt.clone(),
        quic.endpoint.clone(),
        client.clone(),
        args.clone(),
    );
    let waiting = new.clone();
    let wait = move || waiting.wait_connected(Duration::from_secs(1));
    let e = tokio::task::spawn_blocking(wait).await.expect("no panic");
    let Err(ShipError::Timeout(Some(said))) = e else {
        panic!("{e:?}")
    };
    let words = ["certificate expired: that of host 'a'", "gangway pki issue"];
    for word in words {
        assert!(said.contains(word), "no {word:?} in: {said}");
    }
    new.close();
    // One that was under way tries again, each second in the end.
    let before = came.load(Ordering::Relaxed);
    let old = Outgoing::go_on(rt, quic.endpoint.clone(), client, args);
    while came.load(Ordering::Relaxed) < before + 9 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    old.close();
    let line = once(&[&id, "trying again", words[0]]).await;
    assert!(line.contains("INFO") && line.contains(" to a: "), "{line}");
}

#[tokio::test]
async fn a_revoked_host_is_not_dialled_and_does_not_start() {
    let ca = Pki::new();
    let host = Host::start(Some(ca.issue("a", Role::Host)));
    let (b, me) = (ca.issue("b", Role::Host), ca.issue("me", Role::Coordinator));
    assert!(host.quic(&me, api::ALPN).await.is_ok());
    gangway::pki::revoke(ca.0.path(), "a").expect("revoke");
    for (who, alpn) in [(&me, api::ALPN), (&b, ship::ALPN)] {
        let e = host.quic(who, alpn).await.expect_err("it is revoked");
        assert!(e.contains("invalid peer certificate: Revoked"), "{e}");
    }

    let mut cfg = config(ca.0.path());
    cfg.listen = host.address;
    cfg.tls = Some(ca.revoked("a", Role::Host));
    let e = endpoint(&cfg).expect_err("ours is revoked");
    assert!(matches!(e, QuicError::Pki(PkiError::Revoked { .. })), "{e}");
    let e = e.to_string();
    for word in [
        "kept-a.pem' is revoked in '",
        "ca.crl'",
        "gangway pki issue",
    ] {
        assert!(e.contains(word), "no {word:?} in: {e}");
    }
}

#[tokio::test]
async fn a_coordinator_of_another_version_is_told_both_and_let_go() {
    listen();
    let ca = Pki::new();
    let host = Host::start(Some(ca.issue("a", Role::Host)));
    let vic = ca.issue("vic", Role::Coordinator);
    for _ in 0..TIMES {
        let conn = host.quic(&vic, api::ALPN).await.expect("connection");
        let (mut s, mut r) = conn.open_bi().await.expect("stream");
        send(&mut s, &Request::Hello { version: 99 }).await;
        let Reply::Refused(no) = receive(&mut r).await else {
            panic!("it is not refused")
        };
        assert_eq!(no.code, RefusalCode::Version);
        let ours = format!("this switch version {VERSION}");
        for word in ["speaks version 99", &ours, "install the same release"] {
            assert!(no.message.contains(word), "no {word:?} in: {no}");
        }
        let why = timeout(Duration::from_secs(5), conn.closed()).await;
        let why = why.expect("closed").to_string();
        assert!(why.contains("(code 2)"), "{why}");
    }
    let conn = host.quic(&vic, api::ALPN).await.expect("connection");
    assert!(matches!(ask(&conn, &HELLO).await, Reply::Hello { .. }));
    let line = once(&[
        "coordinator 'vic' at 127.0.0.1: refused Hello",
        "version 99",
    ])
    .await;
    assert!(line.contains("WARN"), "{line}");
}

/// One call of a connection.
async fn ask(conn: &quinn::Connection, request: &Request) -> Reply {
    let (send, receive) = conn.open_bi().await.expect("stream");
    call(&mut tokio::io::join(receive, send), request).await
}

/// A switch as `main` puts it together, with two VMs that do not run.
struct Whole {
    address: SocketAddr,
    switch: Switch,
    stop: oneshot::Sender<()>,
    task: tokio::task::JoinHandle<()>,
    _dir: TempDir,
}

impl Whole {
    fn start(name: &str, tls: TlsFiles) -> Whole {
        let dir = TempDir::new().expect("tempdir");
        let d = dir.path().display();
        let mut text = format!(
            "[host]\nname = '{name}'\nstate_dir = '{d}'\n[control]\nsocket = '{d}/control.sock'\n"
        );
        for vm in ["web", "db"] {
            text += &format!(
                "[[vm]]\nname = '{vm}'\nqmp = '{d}/{vm}.qmp'\n\
                 [[port]]\nname = '{vm}0'\ntype = 'vhost-user'\nvm = '{vm}'\nsocket = '{d}/{vm}.sock'\nmode = 'client'\n"
            );
        }
        let mut cfg = HostConfig::parse(&text, "test").expect("config");
        cfg.listen = Some("127.0.0.1:0".parse().expect("address"));
        cfg.tls = Some(tls);
        let quic = endpoint(&cfg).expect("endpoint").expect("it listens");
        let address = quic.endpoint.local_addr().expect("address");
        let vmm = Vmm::new(&cfg);
        let switch = Switch::start(&cfg, &vmm, Some(&quic)).expect("switch");
        let (handler, shipments) = (switch.handler(), switch.shipments());
        let server = Server::bind(&cfg, vmm, handler, Some(quic), shipments).expect("bind");
        let (stop, stopped) = oneshot::channel();
        let task = tokio::spawn(server.run(async {
            let _ = stopped.await;
        }));
        Whole {
            address,
            switch,
            stop,
            task,
            _dir: dir,
        }
    }

    /// A coordinator's connection to it.
    async fn greeted(&self, name: &str, files: &TlsFiles) -> quinn::Connection {
        let credentials = Credentials::load(files, UnixTime::now()).expect("credentials");
        let tls = credentials.client_config(api::ALPN).expect("client");
        let crypto = quinn::crypto::rustls::QuicClientConfig::try_from(tls).expect("quic");
        let any = "127.0.0.1:0".parse().expect("address");
        let dialer = quinn::Endpoint::client(any).expect("dialer");
        let config = quinn::ClientConfig::new(Arc::new(crypto));
        let name = host_server_name(name).expect("name");
        let dialled = dialer.connect_with(config, self.address, &name);
        let conn = dialled.expect("dial").await.expect("connection");
        assert!(matches!(ask(&conn, &HELLO).await, Reply::Hello { .. }));
        conn
    }

    async fn end(self) {
        let _ = self.stop.send(());
        let _ = self.task.await;
        self.switch.stop();
    }
}

async fn hold(conn: &quinn::Connection, request: &Request) -> HoldInfo {
    match ask(conn, request).await {
        Reply::Hold(info) => info,
        other => panic!("{request:?}: {other:?}"),
    }
}

#[tokio::test]
async fn an_order_that_cannot_be_now_names_what_would_have_to_be_and_changes_nothing() {
    listen();
    let ca = Pki::new();
    let me = ca.issue("me", Role::Coordinator);
    let a = Whole::start("a", ca.issue("a", Role::Host));
    let b = Whole::start("b", ca.issue("b", Role::Host));
    let (to_a, to_b) = (a.greeted("a", &me).await, b.greeted("b", &me).await);
    let id = HoldId(0xb0d1_e5b0_d1e5_0003);
    let text = id.to_string();
    let vms = vec!["web".to_owned()];
    let prepare = Request::IncomingPrepare(IncomingPrepare {
        hold: id,
        vms: vms.clone(),
        ports: vec![IncomingPort {
            name: "web0".into(),
            vm: "web".into(),
            mac: None,
        }],
        source_host: "a".into(),
        ticket: [5; 32],
    });
    let open = |ticket| {
        Request::HoldOpen(HoldOpen {
            hold: id,
            vms: vms.clone(),
            target_address: b.address.to_string(),
            target_host: "b".into(),
            ticket,
        })
    };
    let status = Request::HoldStatus { hold: id };
    hold(&to_b, &prepare).await;

    // With a ticket that is not this hold's.
    for _ in 0..TIMES {
        let Reply::Refused(no) = ask(&to_a, &open([6; 32])).await else {
            panic!("it is not refused")
        };
        assert_eq!(no.code, RefusalCode::Peer);
        let why = format!("the ticket is not that of hold {id}");
        assert!(no.message.contains(&why), "{no}");
    }
    assert_eq!(code(&ask(&to_a, &status).await), Some(RefusalCode::Unknown));
    once(&["coordinator 'me'", "refused HoldOpen", &text, "the ticket"]).await;
    once(&["host 'a': shipment of hold", &text, "the ticket"]).await;

    // The same hold once more: as before. Another one under its number: refused.
    for _ in 0..TIMES {
        hold(&to_a, &open([5; 32])).await;
        hold(&to_b, &prepare).await;
    }
    let other = |order: &Request| {
        let mut order = order.clone();
        match &mut order {
            Request::HoldOpen(o) => o.target_host = "c".into(),
            Request::IncomingPrepare(p) => p.vms.push("db".into()),
            _ => {}
        }
        order
    };
    let one = format!("hold {id} exists already: ");
    for (to, order, is, asked) in [
        (
            &to_a,
            other(&open([5; 32])),
            "Open on the Source, of web, with host b",
            "for the Source, web, with host c",
        ),
        (
            &to_b,
            other(&prepare),
            "Prepared on the Target, of web, with host a",
            "for the Target, web, db, with host a",
        ),
        (
            &to_b,
            open([5; 32]),
            "Prepared on the Target, of web, with host a",
            "for the Source, web, with host b",
        ),
    ] {
        for _ in 0..TIMES {
            let Reply::Refused(no) = ask(to, &order).await else {
                panic!("{order:?} is not refused")
            };
            assert_eq!(no.code, RefusalCode::Busy, "{no}");
            assert!(no.message.contains(&format!("{one}{is}")), "{no}");
            assert!(no.message.ends_with(asked), "{no}");
        }
        once(&["INFO", "refused", &one, asked]).await;
    }
    let stands = |i: HoldInfo| (i.state, i.frozen_ns, i.thawed_ns, i.drained_ns);
    let before = [
        stands(hold(&to_a, &status).await),
        stands(hold(&to_b, &status).await),
    ];
    let freeze = Request::Freeze {
        hold: id,
        scope: Scope::All,
    };
    let seal = Request::Seal {
        hold: id,
        timeout_ms: 1,
    };
    let depart = Request::Depart {
        hold: id,
        grace_ms: 1,
    };
    let restore = Request::IncomingRestore { hold: id };
    let commit = Request::Commit { hold: id };
    let announce = Request::Announce { hold: id };
    let release = Request::HoldRelease { hold: id };
    let source = "is Open on the Source; ";
    let target = "is Prepared on the Target; ";
    let other = "that is an order for the other end";
    for (to, order, is, wanted) in [
        (&to_a, &seal, source, "it would have to be Frozen"),
        (&to_a, &depart, source, "it would have to be Sealed"),
        (&to_a, &release, source, "it would have to be Departed"),
        (&to_a, &restore, source, other),
        (&to_a, &commit, source, other),
        (&to_b, &commit, target, "it would have to be Restored"),
        (
            &to_b,
            &announce,
            target,
            "it would have to be Draining or Live",
        ),
        (&to_b, &release, target, "it would have to be Live"),
        (&to_b, &freeze, target, other),
    ] {
        let what = format!("hold {id} {is}{wanted}");
        for _ in 0..TIMES {
            let Reply::Refused(no) = ask(to, order).await else {
                panic!("{order:?} is not refused")
            };
            assert_eq!(no.code, RefusalCode::State, "{no}");
            assert!(no.message.ends_with(&what), "{no}");
        }
        let name = format!("coordinator 'me' at 127.0.0.1: refused {}: ", order.name());
        once(&["INFO", &name, &what]).await;
    }
    let after = [
        stands(hold(&to_a, &status).await),
        stands(hold(&to_b, &status).await),
    ];
    assert_eq!(after, before);

    for to in [&to_a, &to_b] {
        hold(to, &Request::HoldAbort { hold: id }).await;
    }
    drop((to_a, to_b));
    a.end().await;
    b.end().await;
}
