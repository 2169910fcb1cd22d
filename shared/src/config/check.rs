//! From what is written ([`super::raw`]) to what may be relied on ([`super::valid`]).
//!
//! Each table has one function. It notes what is wrong and goes on with a stand-in, so that one run finds everything;
//! the result counts only if nothing was noted.

use std::collections::HashMap;
use std::hash::Hash;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use super::ConfigError;
use super::raw::{At, Notes, Section, document, nearest};
use super::valid::{
    HoldConfig, HostConfig, LedgerConfig, Overdue, Poll, PortConfig, PortKind, SpoolConfig,
    SpoolLimits, Sync, TapRole, TlsFiles, VmConfig, WORKERS_MAX, Workers, kept_socket,
};
use crate::id::MacAddr;
use crate::pki;

/// `sizeof(sun_path)` less its final zero (unix(7)).
const SOCKET_PATH_MAX: usize = 107;
/// `IFNAMSIZ` less its final zero (linux/if.h).
const DEVICE_NAME_MAX: usize = 15;
const PAGE: u64 = 4096;

/// Checks a whole file.
pub fn host(text: &str, file: &str) -> Result<HostConfig, ConfigError> {
    let mut notes = Notes::new(text, file);
    let config = document(text, &mut notes).map(|table| {
        let mut root = Section::root(&table, &notes);
        let config = Check::new(&mut notes).host(&mut root);
        root.finish(&mut notes);
        config
    });
    match config {
        Some(config) if notes.is_clean() => Ok(config),
        _ => Err(ConfigError::Invalid(notes.into_problems())),
    }
}

struct Check<'n> {
    notes: &'n mut Notes,
    sockets: Claims<PathBuf>,
    devices: Claims<String>,
    macs: Claims<MacAddr>,
}

/// Who has claimed what may be had once.
struct Claims<T>(HashMap<T, (usize, String)>);

impl<T: Eq + Hash> Claims<T> {
    /// Who has it already, if somebody does: key and line.
    fn claim(&mut self, value: T, line: usize, key: &str) -> Option<String> {
        if let Some((line, key)) = self.0.get(&value) {
            return Some(format!("{key} in line {line}"));
        }
        self.0.insert(value, (line, key.to_owned()));
        None
    }
}

impl<'n> Check<'n> {
    fn new(notes: &'n mut Notes) -> Self {
        Check {
            notes,
            sockets: Claims(HashMap::new()),
            devices: Claims(HashMap::new()),
            macs: Claims(HashMap::new()),
        }
    }

    fn host(&mut self, root: &mut Section<'_>) -> HostConfig {
        let (name, state_dir) = self.host_table(root);
        let (control_socket, listen) = self.control(root);
        let tls = self.tls(root, listen.as_ref());
        let workers = self.workers(root);
        let (fdb_ageing_s, fdb_capacity) = self.fdb(root);
        let flows_capacity = self.flows(root);
        let spool = self.spool(root, &state_dir, workers.count);
        let hold = self.hold(root);
        let ledger = self.ledger(root, &state_dir);
        let keeper_dir = self.keeper(root);
        let migration_address = self.migration(root);
        let vms = self.vms(root, migration_address);
        let ports = self.ports(root, &vms, keeper_dir.as_deref());
        HostConfig {
            name,
            state_dir,
            control_socket,
            listen: listen.map(|l| l.value),
            tls,
            workers,
            fdb_ageing_s,
            fdb_capacity,
            flows_capacity,
            spool,
            hold,
            ledger,
            keeper_dir,
            migration_address,
            ports,
            vms,
        }
    }

    fn host_table(&mut self, root: &mut Section<'_>) -> (String, PathBuf) {
        let mut t = root.table(self.notes, "host");
        let name = t.required(
            self.notes,
            "name",
            "name this host as in its certificate (NAME.host.gangway), for example name = \"kvm1\"",
        );
        if let Some(n) = &name
            && !pki::is_name(&n.value)
        {
            let what = pki::PkiError::BadName(n.value.escape_debug().to_string());
            self.notes.add(n.line, t.key("name"), what.to_string());
        }
        let state_dir = t.string(self.notes, "state_dir");
        let state_dir = self.path_or(&t, "state_dir", state_dir, "/var/lib/gangway");
        t.finish(self.notes);
        (name.map(|n| n.value).unwrap_or_default(), state_dir)
    }

    fn control(&mut self, root: &mut Section<'_>) -> (PathBuf, Option<At<SocketAddr>>) {
        let mut t = root.table(self.notes, "control");
        let socket = t.string(self.notes, "socket").unwrap_or(At {
            line: t.line(),
            value: "/run/gangway/switch.sock".to_owned(),
        });
        let socket = self.socket(&t, "socket", socket);
        let listen = t.string(self.notes, "listen");
        let listen = listen.and_then(|l| match l.value.parse::<SocketAddr>() {
            Ok(a) if a.port() != 0 => Some(At { line: l.line, value: a }),
            _ => {
                let what = format!(
                    "'{}' is not an address with a port; write it like \"192.0.2.1:7600\" or \"[::]:7600\"",
                    l.value.escape_debug()
                );
                self.notes.add(l.line, t.key("listen"), what);
                None
            }
        });
        t.finish(self.notes);
        (socket, listen)
    }

    fn tls(&mut self, root: &mut Section<'_>, listen: Option<&At<SocketAddr>>) -> Option<TlsFiles> {
        if !root.has("tls") {
            if let Some(l) = listen {
                self.notes.add(
                    l.line,
                    "control.listen",
                    "needs a [tls] table with cert, key and ca; make them with `gangway pki issue`, or remove listen",
                );
            }
            return None;
        }
        let mut t = root.table(self.notes, "tls");
        let mut file = |check: &mut Self, key| {
            let hint = "name the PEM file that `gangway pki issue` wrote";
            let at = t.required(check.notes, key, hint)?;
            Some(check.path(&t, key, at))
        };
        let (cert, key, ca) = (file(self, "cert"), file(self, "key"), file(self, "ca"));
        let crl = t.string(self.notes, "crl");
        let crl = crl.map(|c| self.path(&t, "crl", c));
        t.finish(self.notes);
        Some(TlsFiles {
            cert: cert?,
            key: key?,
            ca: ca?,
            crl,
        })
    }

    fn workers(&mut self, root: &mut Section<'_>) -> Workers {
        let mut t = root.table(self.notes, "workers");
        let count = t.integer(self.notes, "count", 1, WORKERS_MAX as u64);
        let cpus = t.integers(self.notes, "cpus");
        let poll = t.string(self.notes, "poll");
        let poll = self.one_of(
            &t,
            "poll",
            poll,
            &[("adaptive", Poll::Adaptive), ("busy", Poll::Busy)],
        );
        let given = cpus.as_ref().map_or(0, |c| c.value.len());
        let count_value = count.as_ref().map_or(1, |c| c.value as usize);
        if let Some(c) = cpus.as_ref().filter(|_| given > 0) {
            if given != count_value {
                let what = format!(
                    "{given} CPUs for {count_value} workers; name one CPU per worker, or none"
                );
                self.notes.add(c.line, t.key("cpus"), what);
            }
            let mut seen = Claims(HashMap::new());
            for cpu in &c.value {
                if *cpu > 8191 {
                    self.notes
                        .add(c.line, t.key("cpus"), format!("there is no CPU {cpu}"));
                } else if seen.claim(*cpu, c.line, "").is_some() {
                    let what = format!("CPU {cpu} is named twice; give each worker its own");
                    self.notes.add(c.line, t.key("cpus"), what);
                }
            }
        }
        t.finish(self.notes);
        Workers {
            count: count_value,
            cpus: cpus.map_or_else(Vec::new, |c| {
                c.value.into_iter().map(|v| v as usize).collect()
            }),
            poll: poll.unwrap_or(Poll::Adaptive),
        }
    }

    fn fdb(&mut self, root: &mut Section<'_>) -> (u32, usize) {
        let mut t = root.table(self.notes, "fdb");
        // IEEE 802.1Q-2018 table 8-6: 10 to 1,000,000 s.
        let ageing = t.integer(self.notes, "ageing_s", 10, 1_000_000);
        let capacity = t.integer(self.notes, "capacity", 64, 1 << 24);
        t.finish(self.notes);
        (
            ageing.map_or(300, |a| a.value as u32),
            capacity.map_or(1 << 20, |c| c.value as usize),
        )
    }

    fn flows(&mut self, root: &mut Section<'_>) -> usize {
        let mut t = root.table(self.notes, "flows");
        let capacity = t.integer(self.notes, "capacity", 64, 1 << 24);
        t.finish(self.notes);
        capacity.map_or(1 << 20, |c| c.value as usize)
    }

    fn hold(&mut self, root: &mut Section<'_>) -> HoldConfig {
        let mut t = root.table(self.notes, "hold");
        let default = HoldConfig::default();
        let quiet_s = t.integer(self.notes, "quiet_s", 10, 86_400);
        let longest_s = t.integer(self.notes, "longest_s", 1, 2_592_000);
        let then = t.string(self.notes, "then");
        let all = [("keep", Overdue::Keep), ("put-back", Overdue::PutBack)];
        let then = self.one_of(&t, "then", then, &all);
        t.finish(self.notes);
        HoldConfig {
            quiet_s: quiet_s.map_or(default.quiet_s, |n| n.value),
            longest_s: longest_s.map(|n| n.value),
            then: then.unwrap_or(default.then),
        }
    }

    fn ledger(&mut self, root: &mut Section<'_>, state_dir: &Path) -> LedgerConfig {
        let mut t = root.table(self.notes, "ledger");
        let dir = t.string(self.notes, "dir");
        let default = state_dir.join("ledger").display().to_string();
        let dir = self.path_or(&t, "dir", dir, &default);
        let keep_days = t.integer(self.notes, "keep_days", 0, 3650);
        let keep_bytes = t.integer(self.notes, "keep_bytes", 0, i64::MAX as u64);
        let frames_bytes = t.integer(self.notes, "frames_bytes", 0, i64::MAX as u64);
        t.finish(self.notes);
        LedgerConfig {
            dir,
            keep_days: keep_days.map_or(30, |d| d.value as u32),
            keep_bytes: keep_bytes.map_or(256 << 20, |b| b.value),
            frames_bytes: frames_bytes.map_or(0, |b| b.value),
        }
    }

    fn spool(&mut self, root: &mut Section<'_>, state_dir: &Path, workers: usize) -> SpoolConfig {
        let mut t = root.table(self.notes, "spool");
        let dir = t.string(self.notes, "dir");
        let default = state_dir.join("spool").display().to_string();
        let dir = self.path_or(&t, "dir", dir, &default);
        let segment = t.integer(self.notes, "segment_bytes", 128 << 10, 1 << 30);
        if let Some(s) = &segment
            && s.value % PAGE != 0
        {
            let what = format!(
                "{} is not a multiple of {PAGE}; take {}",
                s.value,
                s.value.next_multiple_of(PAGE)
            );
            self.notes.add(s.line, t.key("segment_bytes"), what);
        }
        let segment_bytes = segment.as_ref().map_or(1 << 20, |s| s.value);
        let quota = t.integer(self.notes, "quota_bytes", 1, i64::MAX as u64);
        let quota_bytes = quota.as_ref().map_or(1 << 30, |q| q.value);
        let least = segment_bytes * workers as u64;
        if quota_bytes < least {
            let line = quota.or(segment).map_or(t.line(), |at| at.line);
            let what = format!(
                "{quota_bytes} is less than one segment of {segment_bytes} for each of {workers} workers; \
                 raise it to {least} at least, or make segments smaller"
            );
            self.notes.add(line, t.key("quota_bytes"), what);
        }
        let sync = t.string(self.notes, "sync");
        let sync = self.one_of(
            &t,
            "sync",
            sync,
            &[
                ("batch", Sync::Batch),
                ("each", Sync::Each),
                ("none", Sync::None),
            ],
        );
        let default = SpoolLimits::default();
        let hold_bytes = t.integer(self.notes, "hold_bytes", 128 << 10, i64::MAX as u64);
        let mut frames = |key| t.integer(self.notes, key, 1024, i64::MAX as u64);
        let (quota_frames, hold_frames) = (frames("quota_frames"), frames("hold_frames"));
        let quota_frames = quota_frames.map(|n| n.value);
        let mut number = |key, min, max, default| {
            let n = t.integer(self.notes, key, min, max);
            n.map_or(default, |n| n.value)
        };
        let limits = SpoolLimits {
            sync_ms: number("sync_ms", 1, 1000, default.sync_ms),
            sync_bytes: number("sync_bytes", 1 << 20, i64::MAX as u64, default.sync_bytes),
            // As much as there is at all is no bound of its own.
            hold_bytes: hold_bytes.map(|n| n.value).filter(|n| *n < quota_bytes),
            quota_frames,
            hold_frames: hold_frames
                .map(|n| n.value)
                .filter(|n| quota_frames.is_none_or(|q| *n < q)),
        };
        t.finish(self.notes);
        SpoolConfig {
            dir,
            segment_bytes,
            quota_bytes,
            sync: sync.unwrap_or(Sync::Batch),
            limits,
        }
    }

    fn keeper(&mut self, root: &mut Section<'_>) -> Option<PathBuf> {
        let mut t = root.table(self.notes, "keeper");
        let dir = t.string(self.notes, "dir");
        let dir = dir.map(|d| self.path(&t, "dir", d));
        t.finish(self.notes);
        dir
    }

    fn migration(&mut self, root: &mut Section<'_>) -> Option<IpAddr> {
        let mut t = root.table(self.notes, "migration");
        let at = t.string(self.notes, "address");
        t.finish(self.notes);
        let at = at?;
        match at.value.parse::<IpAddr>() {
            Ok(a) if !a.is_unspecified() && !a.is_multicast() => Some(a),
            _ => {
                let what = format!(
                    "'{}' is not an address of this host that others can reach; write it like \"192.0.2.1\", without a port",
                    at.value.escape_debug()
                );
                self.notes.add(at.line, "migration.address", what);
                None
            }
        }
    }

    fn vms(&mut self, root: &mut Section<'_>, migration: Option<IpAddr>) -> Vec<VmConfig> {
        let has_migration = migration.is_some() || root.has("migration");
        let mut names = Claims(HashMap::new());
        let mut out = Vec::new();
        for mut t in root.tables(self.notes, "vm") {
            let name = self.name(&mut t, &mut names);
            let hint = "name the VM's QMP socket, as in QEMU's -qmp unix:PATH,server=on,wait=off";
            let qmp = t.required(self.notes, "qmp", hint);
            let qmp = qmp.map(|q| self.socket(&t, "qmp", q));
            let incoming = t.strings(self.notes, "incoming");
            if let Some(i) = &incoming {
                if i.value.first().is_none_or(String::is_empty) {
                    let what = "needs a program and its arguments, as in [\"/usr/bin/qemu-system-x86_64\", \"-S\"]";
                    self.notes.add(i.line, t.key("incoming"), what);
                }
                if i.value.iter().any(|a| a.contains('\0')) {
                    self.notes.add(
                        i.line,
                        t.key("incoming"),
                        "an argument has a zero character in it; remove it",
                    );
                }
                if !has_migration {
                    let what = "no VM can arrive here without [migration] address; set it, or remove incoming";
                    self.notes.add(i.line, t.key("incoming"), what);
                }
            }
            t.finish(self.notes);
            out.push(VmConfig {
                name,
                qmp: qmp.unwrap_or_default(),
                incoming: incoming.map(|i| i.value),
            });
        }
        out
    }

    fn ports(
        &mut self,
        root: &mut Section<'_>,
        vms: &[VmConfig],
        keeper_dir: Option<&Path>,
    ) -> Vec<PortConfig> {
        let mut names = Claims(HashMap::new());
        let mut out = Vec::new();
        for mut t in root.tables(self.notes, "port") {
            let name = self.name(&mut t, &mut names);
            let vm = t.string(self.notes, "vm");
            if let Some(vm) = &vm
                && !vms.iter().any(|v| v.name == vm.value)
            {
                let known: Vec<&str> = vms.iter().map(|v| v.name.as_str()).collect();
                let hint = nearest(&vm.value, &known).map_or_else(
                    || "add a [[vm]] with this name".to_owned(),
                    |n| format!("did you mean '{n}'?"),
                );
                let what = format!("there is no VM '{}'; {hint}", vm.value.escape_debug());
                self.notes.add(vm.line, t.key("vm"), what);
            }
            let mac = self.mac(&mut t);
            let kind = self.kind(&mut t, vm.is_some(), mac.is_some());
            if let (Some(PortKind::VhostUser { .. }), Some(dir)) = (&kind, keeper_dir) {
                self.kept(&t, dir, &name);
            }
            t.finish(self.notes);
            if let Some(kind) = kind {
                out.push(PortConfig {
                    name,
                    vm: vm.map(|v| v.value),
                    mac,
                    kind,
                });
            }
        }
        out
    }

    /// The socket between keeper and switch.
    fn kept(&mut self, t: &Section<'_>, dir: &Path, port: &str) {
        let path = kept_socket(dir, port);
        let bytes = path.as_os_str().len();
        if bytes > SOCKET_PATH_MAX {
            let what = format!(
                "{} would have {bytes} bytes, a socket's path has at most {SOCKET_PATH_MAX}; choose a shorter name, or a shorter keeper.dir",
                path.display()
            );
            self.notes.add(t.line(), t.key("name"), what);
        }
        let key = t.key("name");
        if let Some(other) = self.sockets.claim(path.clone(), t.line(), &key) {
            let what = format!(
                "the keeper would use {} for it, which is also {other}; choose another keeper.dir",
                path.display()
            );
            self.notes.add(t.line(), key, what);
        }
    }

    fn mac(&mut self, t: &mut Section<'_>) -> Option<MacAddr> {
        let at = t.string(self.notes, "mac")?;
        let (line, key) = (at.line, t.key("mac"));
        let mac = match at.value.parse::<MacAddr>() {
            Ok(mac) => mac,
            Err(e) => {
                self.notes.add(line, key, e.to_string());
                return None;
            }
        };
        if mac.is_multicast() {
            let what = format!(
                "{mac} is a group address; a guest's has an even first octet, as 52:54:00:12:34:56"
            );
            self.notes.add(line, key, what);
        } else if mac == MacAddr([0; 6]) {
            self.notes
                .add(line, key, "no guest has the address 00:00:00:00:00:00");
        } else if let Some(other) = self.macs.claim(mac, line, &key) {
            let what = format!("{mac} is also {other}; every port needs its own");
            self.notes.add(line, key, what);
        }
        Some(mac)
    }

    fn kind(&mut self, t: &mut Section<'_>, has_vm: bool, has_mac: bool) -> Option<PortKind> {
        const TYPES: &str = "set type = \"vhost-user\", \"tap\" or \"uplink\"";
        let name = t.required(self.notes, "type", TYPES);
        let line = name.as_ref().map(|n| n.line);
        let kind = self.one_of(
            t,
            "type",
            name,
            &[
                ("vhost-user", Kind::VhostUser),
                ("tap", Kind::Tap),
                ("uplink", Kind::Uplink),
            ],
        );
        for (key, goes_with) in [
            ("socket", &[Kind::VhostUser][..]),
            ("mode", &[Kind::VhostUser]),
            ("device", &[Kind::Tap, Kind::Uplink]),
            ("role", &[Kind::Tap]),
        ] {
            if t.has(key)
                && let Some(kind) = kind
                && !goes_with.contains(&kind)
            {
                let with: Vec<&str> = goes_with.iter().map(|k| k.name()).collect();
                let what = format!(
                    "goes with type {}, not with {}; remove it",
                    with.join(" or "),
                    kind.name()
                );
                self.notes.add(line.unwrap_or(t.line()), t.key(key), what);
            }
        }
        let line = line.unwrap_or(t.line());
        match kind? {
            Kind::VhostUser => {
                let socket = t.required(
                    self.notes,
                    "socket",
                    "name the vhost-user socket of the VM's network device",
                );
                let socket = socket.map(|s| self.socket(t, "socket", s));
                let hint = "set \"client\" if QEMU listens on the socket (server=on), \"server\" if the switch does";
                let mode = t.required(self.notes, "mode", hint);
                let server = self.one_of(t, "mode", mode, &[("client", false), ("server", true)]);
                Some(PortKind::VhostUser {
                    socket: socket?,
                    server: server?,
                })
            }
            Kind::Tap => {
                let device = self.device(t);
                let hint = "set \"vm\" if QEMU holds the TAP, \"endpoint\" if it is for the host or a container";
                let role = t.required(self.notes, "role", hint);
                let role = self.one_of(
                    t,
                    "role",
                    role,
                    &[("vm", TapRole::Vm), ("endpoint", TapRole::Endpoint)],
                )?;
                match role {
                    TapRole::Vm if !has_vm => {
                        let what = "missing; say which VM has this TAP, or set role = \"endpoint\"";
                        self.notes.add(line, t.key("vm"), what);
                    }
                    TapRole::Endpoint if has_vm => {
                        let what = "an endpoint is the host's or a container's; remove vm, or set role = \"vm\"";
                        self.notes.add(line, t.key("vm"), what);
                    }
                    _ => {}
                }
                Some(PortKind::Tap {
                    device: device?,
                    role,
                })
            }
            Kind::Uplink => {
                let device = self.device(t);
                for (has, key) in [(has_vm, "vm"), (has_mac, "mac")] {
                    if has {
                        let what = "an uplink leads to the network, not to one guest; remove it";
                        self.notes.add(line, t.key(key), what);
                    }
                }
                Some(PortKind::Uplink { device: device? })
            }
        }
    }

    fn device(&mut self, t: &mut Section<'_>) -> Option<String> {
        let at = t.required(
            self.notes,
            "device",
            "name the network device, as `ip link` shows it",
        )?;
        let (name, key) = (&at.value, t.key("device"));
        if name.len() > DEVICE_NAME_MAX {
            let what = format!(
                "'{}' has {} characters; Linux allows {DEVICE_NAME_MAX} in a device's name",
                name.escape_debug(),
                name.len()
            );
            self.notes.add(at.line, key, what);
        } else if name.is_empty() || name == "." || name == ".." || !name.bytes().all(is_name_byte)
        {
            let what = format!(
                "'{}' is no device name; use A-Z a-z 0-9 . _ -",
                name.escape_debug()
            );
            self.notes.add(at.line, key, what);
        } else if let Some(other) = self.devices.claim(name.clone(), at.line, &key) {
            let what = format!("'{name}' is also {other}; every port needs its own device");
            self.notes.add(at.line, key, what);
        }
        Some(at.value)
    }

    /// The name of a port or VM.
    fn name(&mut self, t: &mut Section<'_>, names: &mut Claims<String>) -> String {
        let hint = "give it a unique name, 1 to 64 of A-Z a-z 0-9 . _ -";
        let Some(at) = t.required(self.notes, "name", hint) else {
            return String::new();
        };
        let (n, key) = (&at.value, t.key("name"));
        if n.is_empty() || n.len() > 64 || !n.bytes().all(is_name_byte) {
            let what = format!(
                "'{}' is not a name: 1 to 64 of A-Z a-z 0-9 . _ -",
                n.escape_debug()
            );
            self.notes.add(at.line, key, what);
        } else if let Some(other) = names.claim(n.clone(), at.line, &key) {
            let what = format!("'{n}' is also {other}; names must differ");
            self.notes.add(at.line, key, what);
        }
        at.value
    }

    /// A unix socket that nothing else in the file may name.
    fn socket(&mut self, t: &Section<'_>, name: &str, at: At<String>) -> PathBuf {
        let (line, key) = (at.line, t.key(name));
        if at.value.len() > SOCKET_PATH_MAX {
            let what = format!(
                "a socket's path has at most {SOCKET_PATH_MAX} bytes, this one has {}; choose a shorter one",
                at.value.len()
            );
            self.notes.add(line, key.clone(), what);
        }
        let path = self.path(t, name, at);
        if let Some(other) = self.sockets.claim(path.clone(), line, &key) {
            let what = format!(
                "'{}' is also {other}; each needs its own socket",
                path.display()
            );
            self.notes.add(line, key, what);
        }
        path
    }

    fn path(&mut self, t: &Section<'_>, key: &str, at: At<String>) -> PathBuf {
        if !at.value.starts_with('/') || at.value.contains('\0') {
            let what = format!(
                "'{}' is not an absolute path; begin it with '/', the switch has no folder of its own",
                at.value.escape_debug()
            );
            self.notes.add(at.line, t.key(key), what);
        }
        PathBuf::from(at.value)
    }

    fn path_or(
        &mut self,
        t: &Section<'_>,
        key: &str,
        at: Option<At<String>>,
        default: &str,
    ) -> PathBuf {
        match at {
            Some(at) => self.path(t, key, at),
            None => PathBuf::from(default),
        }
    }

    fn one_of<T: Copy>(
        &mut self,
        t: &Section<'_>,
        key: &str,
        at: Option<At<String>>,
        choices: &[(&str, T)],
    ) -> Option<T> {
        let at = at?;
        let found = choices.iter().find(|(name, _)| *name == at.value);
        if found.is_none() {
            let all: Vec<&str> = choices.iter().map(|c| c.0).collect();
            let hint = nearest(&at.value, &all)
                .map_or(String::new(), |n| format!("; did you mean '{n}'?"));
            let what = format!(
                "'{}' is none of {}{hint}",
                at.value.escape_debug(),
                all.join(", ")
            );
            self.notes.add(at.line, t.key(key), what);
        }
        found.map(|(_, value)| *value)
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    VhostUser,
    Tap,
    Uplink,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::VhostUser => "vhost-user",
            Kind::Tap => "tap",
            Kind::Uplink => "uplink",
        }
    }
}

fn is_name_byte(b: u8) -> bool {
    b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-')
}
