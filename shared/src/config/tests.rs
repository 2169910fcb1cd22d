//! Bad files, each with the exact text that the operator sees.

use proptest::prelude::*;

use super::valid::{HoldConfig, Overdue, PortKind, TapRole};
use super::*;

const GOOD: &str = r#"
[host]
name = "kvm1"
[control]
listen = "192.0.2.1:7600"
[tls]
cert = "/etc/gangway/kvm1.pem"
key = "/etc/gangway/kvm1.key"
ca = "/etc/gangway/ca.pem"
[migration]
address = "192.0.2.1"
[[vm]]
name = "web"
qmp = "/run/vm/web.qmp"
incoming = ["/usr/bin/qemu-system-x86_64", "-S"]
[[port]]
name = "web0"
type = "vhost-user"
vm = "web"
mac = "52:54:00:00:00:01"
socket = "/run/vm/web0.sock"
mode = "client"
[[port]]
name = "web1"
type = "tap"
vm = "web"
device = "web1"
role = "vm"
[[port]]
name = "up"
type = "uplink"
device = "eth0"
"#;

fn problems(text: &str) -> Vec<String> {
    match HostConfig::parse(text, "host.toml") {
        Ok(_) => Vec::new(),
        Err(e) => e.problems().iter().map(Problem::to_string).collect(),
    }
}

#[test]
fn a_complete_file_is_read_with_its_defaults() {
    let c = HostConfig::parse(GOOD, "host.toml").expect("valid");
    assert_eq!(c.name, "kvm1");
    assert_eq!(c.state_dir, Path::new("/var/lib/gangway"));
    assert_eq!(c.spool.dir, Path::new("/var/lib/gangway/spool"));
    assert_eq!(c.ledger.dir, Path::new("/var/lib/gangway/ledger"));
    assert_eq!((c.ledger.keep_days, c.ledger.keep_bytes), (30, 256 << 20));
    assert_eq!(c.ledger.frames_bytes, 0);
    assert_eq!((c.hold.quiet_s, c.hold.longest_s), (60, None));
    assert_eq!(c.hold.then, Overdue::Keep);
    let text = GOOD.to_owned() + "[hold]\nquiet_s = 10\nlongest_s = 5\nthen = \"put-back\"\n";
    let hold = HostConfig::parse(&text, "host.toml").expect("valid").hold;
    let wanted = HoldConfig {
        quiet_s: 10,
        longest_s: Some(5),
        then: Overdue::PutBack,
    };
    assert_eq!(hold, wanted);
    assert_eq!(
        (c.workers.count, c.fdb_ageing_s, c.fdb_capacity),
        (1, 300, 1 << 20)
    );
    assert_eq!(c.flows_capacity, 1 << 20);
    let names: Vec<&str> = c.ports.iter().map(|p| p.name.as_str()).collect();
    assert_eq!(names, ["web0", "web1", "up"], "the file's order");
    assert!(matches!(
        &c.ports[1].kind,
        PortKind::Tap {
            role: TapRole::Vm,
            ..
        }
    ));
}

#[test]
fn the_smallest_file_is_a_name() {
    HostConfig::parse("host.name = 'a'", "x").expect("valid");
}

/// What replaces what in `GOOD` (or is appended), and the one line that it gives.
const BAD: &[(&str, &str, &str)] = &[
    (
        "name = \"kvm1\"",
        "nmae = \"kvm1\"",
        "host.toml:2: host.name: missing; name this host",
    ),
    (
        "name = \"kvm1\"",
        "nmae = \"kvm1\"",
        "host.toml:3: host.nmae: unknown key; did you mean 'name'?",
    ),
    (
        "name = \"kvm1\"",
        "name = \"k/1\"",
        "host.toml:3: host.name: 'k/1' is not a name",
    ),
    (
        "name = \"kvm1\"",
        "name = 7",
        "host.toml:3: host.name: must be a string in quotes, not an integer",
    ),
    (
        "[control]",
        "[contrl]",
        "host.toml:4: contrl: unknown table; did you mean 'control'?",
    ),
    (
        "[control]",
        "[quite.else]\n[control]",
        "unknown table; known here: host, control, tls",
    ),
    (
        "[control]",
        "[control]\nsocket = \"run/x\"",
        "host.toml:5: control.socket: 'run/x' is not an absolute path",
    ),
    (
        "192.0.2.1:7600",
        "192.0.2.1",
        "host.toml:5: control.listen: '192.0.2.1' is not an address with a port",
    ),
    (
        "192.0.2.1:7600",
        "192.0.2.1:0",
        "control.listen: '192.0.2.1:0' is not an address with a port",
    ),
    (
        "[tls]",
        "[[tls]]",
        "host.toml:6: tls: must be a table, [tls], not an array",
    ),
    (
        "cert = \"/etc/gangway/kvm1.pem\"\n",
        "",
        "host.toml:6: tls.cert: missing; name the PEM file",
    ),
    (
        "ca = \"/etc/gangway/ca.pem\"",
        "ca = \"/etc/gangway/ca.pem\"\ncrl = \"ca.crl\"",
        "host.toml:10: tls.crl: 'ca.crl' is not an absolute path",
    ),
    (
        "ca = \"/etc/gangway/ca.pem\"",
        "ca = \"/etc/gangway/ca.pem\"\ncrl = [\"/etc/gangway/ca.crl\"]",
        "host.toml:10: tls.crl: must be a string in quotes, not an array",
    ),
    (
        "[migration]\naddress = \"192.0.2.1\"\n",
        "",
        "host.toml:13: vm.incoming: no VM can arrive here without [migration]",
    ),
    (
        "address = \"192.0.2.1\"",
        "address = \"0.0.0.0\"",
        "host.toml:11: migration.address: '0.0.0.0' is not an address of this host",
    ),
    (
        "[\"/usr/bin/qemu-system-x86_64\", \"-S\"]",
        "[]",
        "host.toml:15: vm.incoming: needs a program",
    ),
    (
        "\"-S\"]",
        "1]",
        "host.toml:15: vm.incoming: must be an array of strings; one of its items is not",
    ),
    (
        "vm = \"web\"\nmac",
        "vm = \"wbe\"\nmac",
        "host.toml:19: port.vm: there is no VM 'wbe'; did you mean 'web'?",
    ),
    (
        "vm = \"web\"\nmac",
        "vm = \"database\"\nmac",
        "port.vm: there is no VM 'database'; add a [[vm]]",
    ),
    (
        "52:54:00:00:00:01",
        "52:54:00:00:01",
        "host.toml:20: port.mac: '52:54:00:00:01' is not a MAC address; write it like",
    ),
    (
        "52:54:00:00:00:01",
        "53:54:00:00:00:01",
        "port.mac: 53:54:00:00:00:01 is a group address",
    ),
    (
        "52:54:00:00:00:01",
        "00:00:00:00:00:00",
        "port.mac: no guest has the address",
    ),
    (
        "role = \"vm\"",
        "role = \"vm\"\nmac = \"52:54:00:00:00:01\"",
        "port.mac: 52:54:00:00:00:01 is also port.mac in line 20",
    ),
    (
        "mode = \"client\"",
        "mode = \"clinet\"",
        "host.toml:22: port.mode: 'clinet' is none of client, server; did you mean 'client'?",
    ),
    (
        "mode = \"client\"\n",
        "",
        "host.toml:16: port.mode: missing; set \"client\" if QEMU listens",
    ),
    (
        "/run/vm/web0.sock",
        "/run/vm//web.qmp",
        "host.toml:21: port.socket: '/run/vm//web.qmp' is also vm.qmp in line 14",
    ),
    (
        "device = \"web1\"",
        "device = \"a-name-of-16-byt\"",
        "host.toml:27: port.device: 'a-name-of-16-byt' has 16 characters; Linux allows 15",
    ),
    (
        "device = \"web1\"",
        "device = \"tap%d\"",
        "port.device: 'tap%d' is no device name",
    ),
    (
        "device = \"web1\"",
        "device = \"eth0\"",
        "host.toml:32: port.device: 'eth0' is also port.device in line 27",
    ),
    (
        "device = \"web1\"\nrole = \"vm\"",
        "device = \"web1\"\nrole = \"endpoint\"",
        "port.vm: an endpoint is the host's or a container's",
    ),
    (
        "role = \"vm\"",
        "role = \"vm\"\nmode = \"client\"",
        "port.mode: goes with type vhost-user, not with tap; remove it",
    ),
    (
        "name = \"web1\"",
        "name = \"web0\"",
        "host.toml:24: port.name: 'web0' is also port.name in line 17; names must differ",
    ),
    (
        "type = \"uplink\"",
        "type = \"uplink\"\nvm = \"web\"",
        "port.vm: an uplink leads to the network",
    ),
    (
        "type = \"uplink\"",
        "type = \"upling\"",
        "host.toml:31: port.type: 'upling' is none of vhost-user, tap, uplink; did you mean 'uplink'?",
    ),
    (
        "",
        "[[vm]]\nname = \"web\"\nqmp = \"/run/x\"\n",
        "host.toml:34: vm.name: 'web' is also vm.name in line 13",
    ),
    (
        "",
        "[workers]\ncount = 2\ncpus = [1]\n",
        "host.toml:35: workers.cpus: 1 CPUs for 2 workers; name one CPU per worker, or none",
    ),
    (
        "",
        "[workers]\ncount = 2\ncpus = [1, 1]\n",
        "workers.cpus: CPU 1 is named twice",
    ),
    (
        "",
        "[workers]\ncount = 0\n",
        "host.toml:34: workers.count: 0 is out of range; 1 to 64 are allowed",
    ),
    (
        "",
        "[workers]\ncount = -1\n",
        "workers.count: -1 is out of range",
    ),
    (
        "",
        "[workers]\npoll = \"bsuy\"\n",
        "workers.poll: 'bsuy' is none of adaptive, busy; did you mean 'busy'?",
    ),
    (
        "",
        "[spool]\nsegment_bytes = 131073\n",
        "host.toml:34: spool.segment_bytes: 131073 is not a multiple of 4096; take 135168",
    ),
    (
        "",
        "[spool]\nsegment_bytes = 4096\n",
        "spool.segment_bytes: 4096 is out of range; 131072 to 1073741824",
    ),
    (
        "",
        "[spool]\nquota_bytes = 1\n",
        "host.toml:34: spool.quota_bytes: 1 is less than one segment",
    ),
    (
        "",
        "[hold]\nquiet_s = 9\n",
        "host.toml:34: hold.quiet_s: 9 is out of range; 10 to 86400",
    ),
    (
        "",
        "[hold]\nlongest_s = 0\n",
        "hold.longest_s: 0 is out of range; 1 to 2592000",
    ),
    (
        "",
        "[hold]\nthen = \"put_back\"\n",
        "hold.then: 'put_back' is none of keep, put-back; did you mean 'put-back'?",
    ),
    (
        "",
        "[ledger]\nkeep_days = 3651\n",
        "host.toml:34: ledger.keep_days: 3651 is out of range; 0 to 3650",
    ),
    (
        "",
        "[ledger]\nkeep_bytes = -1\n",
        "ledger.keep_bytes: -1 is out of range",
    ),
    (
        "",
        "[ledger]\nframes_bytes = \"all\"\n",
        "ledger.frames_bytes: must be an integer",
    ),
    (
        "",
        "[ledger]\ndir = 1\n",
        "ledger.dir: must be a string in quotes, not an integer",
    ),
    (
        "",
        "[keeper]\ndir = \"kept\"\n",
        "host.toml:34: keeper.dir: 'kept' is not an absolute path",
    ),
    (
        "",
        "[keeper]\nfolder = \"/run/kept\"\n",
        "keeper.folder: unknown key",
    ),
    (
        "",
        "[spool]\nsync = true\n",
        "spool.sync: must be a string in quotes, not a boolean",
    ),
    (
        "",
        "[spool]\nhold_bytes = 0\n",
        "spool.hold_bytes: 0 is out of range; 131072 to",
    ),
    (
        "",
        "[spool]\nquota_frames = 1023\n",
        "host.toml:34: spool.quota_frames: 1023 is out of range; 1024 to",
    ),
    (
        "",
        "[spool]\nhold_frames = 0\n",
        "spool.hold_frames: 0 is out of range; 1024 to",
    ),
    (
        "",
        "[spool]\nsync_ms = 0\n",
        "spool.sync_ms: 0 is out of range; 1 to 1000 are allowed",
    ),
    (
        "",
        "[spool]\nsync_bytes = 4096\n",
        "spool.sync_bytes: 4096 is out of range; 1048576 to",
    ),
    (
        "",
        "[fdb]\nageing_s = 1\n",
        "host.toml:34: fdb.ageing_s: 1 is out of range; 10 to 1000000",
    ),
    (
        "",
        "[flows]\ncapacity = 63\n",
        "host.toml:34: flows.capacity: 63 is out of range; 64 to 16777216",
    ),
    ("", "[fdb\n", "host.toml:33: not TOML: "),
    ("", "[host]\n", "host.toml:33: not TOML: duplicate key"),
];

#[test]
fn each_mistake_is_named_with_its_line_its_key_and_what_to_do() {
    for (from, to, want) in BAD {
        let text = if from.is_empty() {
            format!("{GOOD}{to}")
        } else {
            assert!(GOOD.contains(from), "'{from}' is not in GOOD");
            GOOD.replacen(from, to, 1)
        };
        let got = problems(&text);
        assert!(
            got.iter().any(|p| p.contains(want)),
            "wanted: {want}\n   got: {}",
            got.join("\n        ")
        );
    }
}

#[test]
fn listening_needs_certificates() {
    let got = problems("host.name = 'a'\ncontrol.listen = '[::]:7600'");
    assert_eq!(got.len(), 1, "{got:?}");
    assert!(got[0].contains("host.toml:2: control.listen: needs a [tls] table"));
}

#[test]
fn all_mistakes_are_found_in_one_go() {
    let text = "[host]\nnam = 1\n[[port]]\nname = 'x'\ntype = 'tap'\n[[port]]\nmac = 'y'\n[workers]\ncount = 99\n";
    let got = problems(text);
    assert_eq!(
        got.iter()
            .map(|p| p.split(": ").nth(1).unwrap_or(""))
            .collect::<Vec<_>>(),
        [
            "host.name",
            "host.nam",
            "port.device",
            "port.role",
            "port.name",
            "port.type",
            "port.mac",
            "workers.count"
        ],
        "{got:#?}"
    );
}

#[test]
fn a_file_that_cannot_be_read_says_why() {
    let dir = tempfile::tempdir().expect("tempdir");
    let load = |p: &Path| HostConfig::load(p).expect_err("must fail").to_string();
    assert!(
        load(&dir.path().join("none"))
            .contains("none: cannot read the configuration: No such file")
    );
    assert!(load(dir.path()).contains("not a configuration"));
    let latin = dir.path().join("latin.toml");
    std::fs::write(&latin, b"[host]\nname = \"\xe9\"").expect("write");
    assert!(load(&latin).contains("latin.toml: not UTF-8 at byte 15"));
}

#[test]
fn the_example_of_deploy_is_valid() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/examples/host.toml");
    let config = HostConfig::load(&path).unwrap_or_else(|e| panic!("{e}"));
    assert!(config.tls.as_ref().is_some_and(|t| t.crl.is_some()));
    assert!(!config.vms.is_empty() && config.ports.len() >= 3);
    // What is commented out shows its default.
    let text = std::fs::read_to_string(&path).expect("read");
    let is_key = |line: &str| {
        let key = line.strip_prefix('#').and_then(|l| l.split_once(" = "));
        key.is_some_and(|(k, _)| k.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'))
    };
    let lines = text.lines();
    let all: Vec<&str> = lines.map(|l| if is_key(l) { &l[1..] } else { l }).collect();
    assert_eq!(
        all.iter().filter(|l| l.starts_with("capacity = ")).count(),
        2
    );
    let with_defaults = HostConfig::parse(&all.join("\n"), "host.toml");
    assert_eq!(with_defaults.expect("valid"), config);
}

proptest! {
    #[test]
    fn garbage_never_panics(text in "\\PC{0,200}") {
        let _ = HostConfig::parse(&text, "x");
    }

    /// Near-misses reach deeper: a good file with a piece cut out and another put in.
    #[test]
    fn a_damaged_file_never_panics_and_every_problem_has_a_line(
        at in 0..GOOD.len(), len in 0usize..40, put in "[\\[\\]a-z\"=.,{}0-9 \n-]{0,12}"
    ) {
        let end = (at + len).min(GOOD.len());
        let text = format!("{}{put}{}", &GOOD[..at], &GOOD[end..]);
        if let Err(e) = HostConfig::parse(&text, "x") {
            let lines = text.lines().count() + 1;
            prop_assert!(!e.problems().is_empty());
            for p in e.problems() {
                prop_assert!((1..=lines).contains(&p.line), "{p}");
                prop_assert!(!p.what.contains('\n'));
            }
        }
    }
}
