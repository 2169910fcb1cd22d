//! Real processes on this machine, without VMs and without root: who has no business at a switch is told what is wrong, the
//! switch's log has it once, and the switch is as before.

use gangway_shared::api::{
    HoldInfo, IncomingPort, IncomingPrepare, RefusalCode, Reply, Request, VERSION,
};
use gangway_shared::codec;
use gangway_shared::id::HoldId;
use gangway_tests::lab::gangway::Programs;
use gangway_tests::lab::process::{Process, run, until};
use serde_json::Value;
use std::io::{Read, Write};
use std::net::UdpSocket;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::time::Duration;

/// How often each thing is tried.
const TIMES: usize = 3;

/// A switch, and the folder with its files, two authorities, and their certificates.
struct Site {
    _switch: Process,
    programs: Programs,
    port: u16,
    dir: tempfile::TempDir,
}

impl Site {
    fn start() -> Site {
        let programs = Programs::find().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let d = dir.path().to_string_lossy().into_owned();
        let (ours, other) = (format!("{d}/pki"), format!("{d}/other"));
        for args in [
            vec!["init", &ours],
            vec!["issue", &ours, "a", "--host"],
            vec!["issue", &ours, "hal", "--host"],
            vec!["issue", &ours, "me", "--coordinator"],
            vec!["issue", &ours, "ray", "--coordinator"],
            vec!["init", &other],
            vec!["issue", &other, "fay", "--coordinator"],
        ] {
            run(Command::new(&programs.gangway).arg("pki").args(args)).unwrap();
        }
        // Whoever had the certificate has it still.
        for file in ["ray.pem", "ray.key"] {
            std::fs::copy(format!("{ours}/{file}"), format!("{d}/{file}")).unwrap();
        }
        run(Command::new(&programs.gangway).args(["pki", "revoke", &ours, "ray"])).unwrap();
        let ca = |pki: &str| std::fs::read_to_string(format!("{pki}/ca.pem")).unwrap();
        std::fs::write(format!("{d}/both.pem"), ca(&ours) + &ca(&other)).unwrap();

        let free = UdpSocket::bind("127.0.0.1:0").unwrap();
        let port = free.local_addr().unwrap().port();
        drop(free);
        let config = format!(
            "[host]\nname = \"a\"\nstate_dir = \"{d}/state\"\n\
             [control]\nsocket = \"{d}/switch.sock\"\nlisten = \"127.0.0.1:{port}\"\n\
             [tls]\ncert = \"{ours}/a.pem\"\nkey = \"{ours}/a.key\"\nca = \"{ours}/ca.pem\"\ncrl = \"{ours}/ca.crl\"\n\
             [[vm]]\nname = \"web\"\nqmp = \"{d}/web.qmp\"\n\
             [[port]]\nname = \"web0\"\ntype = \"vhost-user\"\nvm = \"web\"\nsocket = \"{d}/web.sock\"\nmode = \"client\"\n"
        );
        let file = dir.path().join("host.toml");
        std::fs::write(&file, config).unwrap();
        let mut command = Command::new(&programs.switch);
        command.arg("--config").arg(&file).env("RUST_LOG", "info");
        let log = dir.path().join("switch.log");
        let site = Site {
            _switch: Process::start("gangway-switch", command, &log).unwrap(),
            programs,
            port,
            dir,
        };
        until("answer of the switch", Duration::from_secs(20), || {
            let shown = site.host_show("pki/me", "pki/ca.pem");
            Ok(shown.status.success().then_some(()))
        })
        .unwrap();
        site
    }

    fn path(&self, file: &str) -> PathBuf {
        self.dir.path().join(file)
    }

    /// `gangway host show a` with these credentials.
    fn host_show(&self, who: &str, ca: &str) -> Output {
        let port = self.port;
        let hosts = format!(
            "[[host]]\nname = \"a\"\naddress = \"127.0.0.1:{port}\"\n\
             [tls]\ncert = \"{who}.pem\"\nkey = \"{who}.key\"\nca = \"{ca}\"\n"
        );
        std::fs::write(self.path("hosts.toml"), hosts).unwrap();
        Command::new(&self.programs.gangway)
            .args(["host", "show", "a", "-o", "json"])
            .env("GANGWAY_HOSTS", self.path("hosts.toml"))
            .env("GANGWAY_STATE", self.path("coordinator"))
            .output()
            .unwrap()
    }

    /// All that the switch tells of itself, but for the time.
    fn is(&self) -> Value {
        let shown = self.host_show("pki/me", "pki/ca.pem");
        let mut shown: Value = serde_json::from_slice(&shown.stdout).unwrap();
        let uptime = shown["host"].as_object_mut().unwrap().remove("uptime_s");
        assert!(uptime.is_some());
        shown
    }

    /// The switch's log has exactly one line with all these words.
    fn has_once(&self, words: &[&str]) {
        let log = std::fs::read_to_string(self.path("switch.log")).unwrap();
        let has = |line: &&str| words.iter().all(|w| line.contains(w));
        let lines: Vec<&str> = log.lines().filter(has).collect();
        assert_eq!(lines.len(), 1, "{words:?}: {lines:#?} in:\n{log}");
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.path("switch.sock")).unwrap();
        let patience = Some(Duration::from_secs(20));
        stream.set_read_timeout(patience).unwrap();
        stream
    }
}

fn ask(stream: &mut UnixStream, request: &Request) -> Reply {
    let body = codec::encode(request).unwrap();
    let length = (body.len() as u32).to_le_bytes();
    stream.write_all(&[&length[..], &body].concat()).unwrap();
    let mut length = [0; 4];
    stream.read_exact(&mut length).unwrap();
    let mut body = vec![0; u32::from_le_bytes(length) as usize];
    stream.read_exact(&mut body).unwrap();
    codec::decode(&body).unwrap()
}

fn hold(stream: &mut UnixStream, request: &Request) -> HoldInfo {
    match ask(stream, request) {
        Reply::Hold(info) => info,
        other => panic!("{request:?}: {other:?}"),
    }
}

#[test]
fn who_has_no_business_at_a_switch_is_told_why_and_leaves_one_line() {
    let site = Site::start();
    let before = site.is();
    for (who, ca, words, line) in [
        (
            "other/fay",
            "both.pem",
            ["does not let us in", "do not have the same authority"],
            ["UnknownIssuer", "wanted: gangway-control/1"],
        ),
        (
            "ray",
            "pki/ca.pem",
            ["does not let us in", "our certificate was revoked"],
            ["Revoked", "wanted: gangway-control/1"],
        ),
        (
            "pki/hal",
            "pki/ca.pem",
            ["host 'hal' may ship but not control", "--coordinator"],
            ["WARN", "host 'hal' may ship but not control"],
        ),
    ] {
        for _ in 0..TIMES {
            let said = site.host_show(who, ca);
            let text = String::from_utf8_lossy(&said.stderr).into_owned();
            assert_eq!(said.status.code(), Some(5), "{who}: {text}");
            for word in words {
                assert!(text.contains(word), "{who}: no {word:?} in: {text}");
            }
        }
        site.has_once(&line);
    }

    for _ in 0..TIMES {
        let mut stream = site.connect();
        let Reply::Refused(no) = ask(&mut stream, &Request::Hello { version: 99 }) else {
            panic!("it is not refused")
        };
        assert_eq!(no.code, RefusalCode::Version);
        assert!(no.message.contains("version 99"), "{no}");
        assert_eq!(stream.read(&mut [0]).unwrap(), 0, "it hangs up");
    }
    let ours = format!("this switch version {VERSION}");
    site.has_once(&["control.socket: refused Hello", "version 99", &ours]);
    assert_eq!(site.is(), before);
}

#[test]
fn orders_that_cannot_be_now_are_refused_with_what_would_have_to_be() {
    let site = Site::start();
    let mut stream = site.connect();
    let hello = Request::Hello { version: VERSION };
    assert!(matches!(ask(&mut stream, &hello), Reply::Hello { .. }));
    let id = HoldId(0xb0d1_e5b0_d1e5_0004);
    let unknown = format!("no hold {id} on this host");
    let is = format!("hold {id} is Prepared on the Target; ");
    let commit = Request::Commit { hold: id };
    let refused = |stream: &mut UnixStream, order: &Request, code: RefusalCode, why: &str| {
        for _ in 0..TIMES {
            let Reply::Refused(no) = ask(stream, order) else {
                panic!("{order:?} is not refused")
            };
            assert_eq!(no.code, code, "{no}");
            assert!(no.message.contains(why), "{no}");
        }
        let name = format!("control.socket: refused {}: ", order.name());
        site.has_once(&["INFO", &name, why]);
    };
    refused(&mut stream, &commit, RefusalCode::Unknown, &unknown);
    let before = hold(
        &mut stream,
        &Request::IncomingPrepare(IncomingPrepare {
            hold: id,
            vms: vec!["web".into()],
            ports: vec![IncomingPort {
                name: "web0".into(),
                vm: "web".into(),
                mac: None,
            }],
            source_host: "b".into(),
            ticket: [5; 32],
        }),
    );
    let release = Request::HoldRelease { hold: id };
    let seal = Request::Seal {
        hold: id,
        timeout_ms: 1,
    };
    for (order, wanted) in [
        (&commit, "it would have to be Restored"),
        (&release, "it would have to be Live"),
        (&seal, "that is an order for the other end"),
    ] {
        let why = format!("{is}{wanted}");
        refused(&mut stream, order, RefusalCode::State, &why);
    }
    let status = Request::HoldStatus { hold: id };
    assert_eq!(hold(&mut stream, &status), before);
    hold(&mut stream, &Request::HoldAbort { hold: id });
}
