//! The switches that are measured. Each runs its one worker on the same CPU, so one is stopped while another runs.

use std::net::SocketAddr;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::frames::mac;
use crate::host::{self, Process, Task, run, until};

const PATIENCE: Duration = Duration::from_secs(30);

/// A switch with a port for each socket.
pub trait Switch {
    /// For messages and the raw results.
    fn name(&self) -> &'static str;
    /// Its process.
    fn process(&mut self) -> &mut Process;
    /// The threads that move frames.
    fn workers(&mut self) -> Result<Vec<Task>>;
    /// The first of them.
    fn worker(&mut self) -> Result<Task> {
        let all = self.workers()?;
        all.first().copied().context("a worker")
    }
    /// Its ports' sockets, for guests that connect themselves, and which side dials.
    fn sockets(&self) -> (&[PathBuf], Dials);
    /// A connection for each port, as a VMM would have it.
    fn connect(&mut self) -> Result<Vec<UnixStream>>;
    /// Its rules for what follows.
    fn rule(&mut self, rule: Rule) -> Result<()>;
    /// Its own account of its worker since the last call, if it has one.
    fn account(&mut self) -> Result<Option<String>>;
}

/// How a switch finds where a frame goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Rule {
    /// It learns addresses.
    Normal,
    /// All that comes in at one port goes out at another.
    InPort,
}

/// How large a switch is.
#[derive(Debug, Clone, Copy)]
pub struct Size {
    /// vhost-user ports.
    pub ports: usize,
    /// Addresses that it can learn, if that is not left to it.
    pub addresses: Option<usize>,
}

/// What else is asked of a switch of ours.
#[derive(Debug, Clone)]
pub struct Setup {
    /// Its host's name, and that of its files.
    pub host: String,
    /// The worker sleeps when it has nothing to do.
    pub sleeps: bool,
    /// Lines of `[spool]`.
    pub spool: String,
    /// Every port is that of a VM, which has the port's name.
    pub vms: bool,
    /// Where other switches reach it, and the folder with its certificate.
    pub listen: Option<(SocketAddr, PathBuf)>,
    /// A keeper serves its ports' sockets.
    pub kept: bool,
}

impl Default for Setup {
    fn default() -> Setup {
        Setup {
            host: "gangway".to_owned(),
            sleeps: false,
            spool: "quota_bytes = 67108864\nsync = \"none\"\n".to_owned(),
            vms: false,
            listen: None,
            kept: false,
        }
    }
}

impl Setup {
    /// The name of a port, and of its VM.
    pub fn port(i: usize) -> String {
        format!("p{i}")
    }

    /// Where a switch with this setup listens for its coordinator.
    pub fn control(&self, dir: &Path) -> PathBuf {
        dir.join(format!("{}.sock", self.host))
    }

    /// Writes its configuration file: the path of it.
    pub fn write(&self, dir: &Path, size: Size, cpus: &[usize]) -> Result<PathBuf> {
        std::fs::create_dir_all(dir.join(&self.host))?;
        let file = dir.join(format!("{}.toml", self.host));
        std::fs::write(&file, self.config(dir, size, cpus))?;
        Ok(file)
    }

    fn socket(&self, dir: &Path, port: usize) -> PathBuf {
        dir.join(format!("{}-{}.sock", self.host, Setup::port(port)))
    }

    /// What stands in its configuration file.
    fn config(&self, dir: &Path, size: Size, cpus: &[usize]) -> String {
        let (d, host) = (dir.display(), &self.host);
        let poll = if self.sleeps { "adaptive" } else { "busy" };
        let mut config = format!("[host]\nname = \"{host}\"\nstate_dir = \"{d}/{host}\"\n");
        config += &format!("[control]\nsocket = \"{}\"\n", self.control(dir).display());
        if let Some((address, certificates)) = &self.listen {
            let c = certificates.display();
            config += &format!(
                "listen = \"{address}\"\n[tls]\ncert = \"{c}/{host}.pem\"\nkey = \"{c}/{host}.key\"\nca = \"{c}/ca.pem\"\n"
            );
        }
        config += &format!(
            "[workers]\ncount = {}\ncpus = {cpus:?}\npoll = \"{poll}\"\n[spool]\n{}",
            cpus.len(),
            self.spool
        );
        if self.kept {
            config += &format!("[keeper]\ndir = \"{d}/{host}/kept\"\n");
        }
        if let Some(addresses) = size.addresses {
            // Buckets of eight: some of them fill up before the others.
            config += &format!("[fdb]\ncapacity = {}\n", (2 * addresses).max(65_536));
        }
        for i in 0..size.ports {
            let (name, m) = (Setup::port(i), mac(i).map(|b| format!("{b:02x}")).join(":"));
            if self.vms {
                config += &format!("[[vm]]\nname = \"{name}\"\nqmp = \"{d}/{host}-{name}.qmp\"\n");
            }
            config += &format!(
                "[[port]]\nname = \"{name}\"\ntype = \"vhost-user\"\nmac = \"{m}\"\n\
                 socket = \"{}\"\nmode = \"server\"\n",
                self.socket(dir, i).display()
            );
            if self.vms {
                config += &format!("vm = \"{name}\"\n");
            }
        }
        config
    }
}

/// Who opens a port's connection; the other one listens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dials {
    /// The guest (or its VMM).
    Guest,
    /// The switch.
    Switch,
}

/// Ours.
pub struct Gangway {
    process: Process,
    sockets: Vec<PathBuf>,
}

impl Gangway {
    /// Starts it, also where one has ended.
    pub fn start(
        binary: &Path,
        dir: &Path,
        setup: &Setup,
        size: Size,
        cpus: &[usize],
    ) -> Result<Gangway> {
        ensure!(
            binary.exists(),
            "{} is not there: cargo build --release -p gangway-switch",
            binary.display()
        );
        let host = &setup.host;
        let file = setup.write(dir, size, cpus)?;
        let mut command = Command::new(binary);
        command.arg("--config").arg(&file);
        let log = dir.join(format!("{host}.log"));
        let mut process = Process::start("gangway-switch", command, &log)?;
        let sockets: Vec<PathBuf> = (0..size.ports).map(|i| setup.socket(dir, i)).collect();
        let control = setup.control(dir);
        until("sockets of gangway-switch", PATIENCE, || {
            process.check()?;
            let mut all = sockets.iter().chain([&control]);
            Ok(all.all(|s| s.exists()).then_some(()))
        })?;
        Ok(Gangway { process, sockets })
    }
}

impl Switch for Gangway {
    fn name(&self) -> &'static str {
        "gangway"
    }

    fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    fn workers(&mut self) -> Result<Vec<Task>> {
        let workers = self.process.named("worker-");
        ensure!(!workers.is_empty(), "gangway-switch has no thread worker-0");
        Ok(workers)
    }

    fn sockets(&self) -> (&[PathBuf], Dials) {
        (&self.sockets, Dials::Guest)
    }

    fn connect(&mut self) -> Result<Vec<UnixStream>> {
        let dial = |s: &PathBuf| {
            until("answer", PATIENCE, || match UnixStream::connect(s) {
                Ok(stream) => Ok(Some(stream)),
                // Between two connections the port does not listen for a moment.
                Err(_) => Ok(None),
            })
        };
        self.sockets.iter().map(dial).collect()
    }

    fn rule(&mut self, _: Rule) -> Result<()> {
        Ok(())
    }

    fn account(&mut self) -> Result<Option<String>> {
        Ok(None)
    }
}

/// OVS-DPDK, with everything of its own: database, sockets, network namespace.
pub struct Ovs {
    dir: PathBuf,
    db: String,
    switch: Process,
    _database: Process,
    sockets: Vec<PathBuf>,
    /// Ours, once we play the guest ourselves.
    listeners: Vec<UnixListener>,
    now: Option<Rule>,
    /// Its worker threads, once a port is up.
    pmds: usize,
}

const OVS: &str = "/usr/lib/openvswitch-switch-dpdk/ovs-vswitchd-dpdk";
/// A plug-in of DPDK without which OVS has no packet buffers ("Failed to create mempool": EINVAL); no dependency of it.
const POOLS: &str = "/usr/lib/x86_64-linux-gnu/dpdk/pmds-23.0/librte_mempool_ring.so.23";
const BRIDGE: &str = "br-pvp";
/// What it takes for `mac-table-size`.
const OVS_ADDRESSES_MAX: usize = 1_000_000;

/// Hugepages of 2 MB that it gets.
pub const OVS_HUGEPAGES: u64 = 512;

impl Ovs {
    /// Installs what is missing.
    pub fn install() -> Result<()> {
        let there = |path| Path::new(path).exists();
        if there(OVS) && there(POOLS) {
            return Ok(());
        }
        host::install(&["openvswitch-switch-dpdk", "librte-mempool-ring23"])
    }

    /// Starts it; its ports dial us.
    pub fn start(dir: &Path, size: Size, cpus: &[usize], other_cpu: usize) -> Result<Ovs> {
        let dir = dir.join("ovs");
        std::fs::create_dir(&dir)?;
        let at = |name: &str| dir.join(name).display().to_string();
        run(Command::new("ovsdb-tool").args([
            "create",
            &at("conf.db"),
            "/usr/share/openvswitch/vswitch.ovsschema",
        ]))?;
        let db = format!("unix:{}", at("db.sock"));
        let mut command = Command::new("ovsdb-server");
        command.arg(at("conf.db"));
        command.arg(format!("--remote=p{db}"));
        command.arg(format!("--unixctl={}", at("db.ctl")));
        let database = Process::start("ovsdb-server", own(command, &dir), &dir.join("db.log"))?;
        until("database", PATIENCE, || {
            Ok(dir.join("db.sock").exists().then_some(()))
        })?;
        let vsctl = |args: &[&str]| vsctl(&dir, &db, args);
        vsctl(&["--no-wait", "init"])?;
        let lcores = format!("other_config:dpdk-lcore-mask={:#x}", 1 << other_cpu);
        let mask = cpus.iter().fold(0u64, |mask, cpu| mask | 1 << cpu);
        let pmds = format!("other_config:pmd-cpu-mask={mask:#x}");
        vsctl(&[
            "--no-wait",
            "set",
            "Open_vSwitch",
            ".",
            "other_config:dpdk-init=true",
            "other_config:dpdk-socket-mem=256",
            "other_config:dpdk-extra=--no-pci --in-memory",
            &lcores,
            &pmds,
        ])?;
        // The bridge brings a network device of its own: not into the host's namespace.
        let mut command = Command::new("unshare");
        command.args(["--net", OVS, &db]);
        command.arg(format!("--unixctl={}", at("switch.ctl")));
        command.args(["-vconsole:info", "-vcoverage:off"]);
        let log = dir.join("switch.log");
        let mut switch = Process::start("ovs-vswitchd", own(command, &dir), &log)?;
        until("OVS-DPDK", PATIENCE, || {
            switch.check()?;
            Ok(dir.join("switch.ctl").exists().then_some(()))
        })?;
        let mut request: Vec<String> = [
            "add-br",
            BRIDGE,
            "--",
            "set",
            "bridge",
            BRIDGE,
            "datapath_type=netdev",
        ]
        .map(String::from)
        .to_vec();
        if let Some(addresses) = size.addresses {
            let most = addresses.min(OVS_ADDRESSES_MAX);
            request.push(format!("other_config:mac-table-size={most}"));
        }
        let mut sockets = Vec::new();
        for i in 0..size.ports {
            let port = Setup::port(i);
            let path = format!("options:vhost-server-path={}", at(&format!("{port}.sock")));
            let number = format!("ofport_request={}", i + 1);
            let words = [
                "--",
                "add-port",
                BRIDGE,
                &port,
                "--",
                "set",
                "Interface",
                &port,
            ];
            request.extend(words.map(String::from));
            request.extend(["type=dpdkvhostuserclient".to_owned(), path, number]);
            if let [_, _, ..] = cpus {
                // As ours does it by itself.
                let cpu = cpus[i % cpus.len()];
                request.push(format!("other_config:pmd-rxq-affinity=0:{cpu}"));
            }
            sockets.push(dir.join(format!("{port}.sock")));
        }
        vsctl(&request.iter().map(String::as_str).collect::<Vec<_>>())?;
        Ok(Ovs {
            dir,
            db,
            switch,
            _database: database,
            sockets,
            listeners: Vec::new(),
            now: None,
            pmds: cpus.len(),
        })
    }

    /// Its worker sleeps up to so many microseconds while there is little to do; 0: it does not, as by default. It must run.
    pub fn sleep_at_most(&self, us: u32) -> Result<()> {
        let key = format!("other_config:pmd-maxsleep={us}");
        vsctl(&self.dir, &self.db, &["set", "Open_vSwitch", ".", &key]).map(drop)
    }

    fn ctl(&self, request: &str) -> Result<String> {
        let mut command = Command::new("ovs-appctl");
        command.arg("-t").arg(self.dir.join("switch.ctl"));
        run(own(command, &self.dir).arg(request))
    }
}

fn vsctl(dir: &Path, db: &str, args: &[&str]) -> Result<String> {
    let mut command = Command::new("ovs-vsctl");
    command.arg(format!("--db={db}")).args(["--timeout=60"]);
    run(own(command, dir).args(args))
}

/// With the folders that OVS's programs look into.
fn own(mut command: Command, dir: &Path) -> Command {
    for name in ["OVS_RUNDIR", "OVS_LOGDIR", "OVS_DBDIR", "OVS_SYSCONFDIR"] {
        command.env(name, dir);
    }
    // DPDK's.
    command.env("RUNTIME_DIRECTORY", dir);
    command
}

impl Switch for Ovs {
    fn name(&self) -> &'static str {
        "ovs"
    }

    fn process(&mut self) -> &mut Process {
        &mut self.switch
    }

    fn workers(&mut self) -> Result<Vec<Task>> {
        // They come with the first port that is up.
        until("PMD threads of OVS", PATIENCE, || {
            let all = self.switch.named("pmd-");
            Ok((all.len() == self.pmds).then_some(all))
        })
    }

    fn sockets(&self) -> (&[PathBuf], Dials) {
        (&self.sockets, Dials::Switch)
    }

    fn connect(&mut self) -> Result<Vec<UnixStream>> {
        if self.listeners.is_empty() {
            let bind = |s: &PathBuf| UnixListener::bind(s).with_context(|| s.display().to_string());
            self.listeners = self.sockets.iter().map(bind).collect::<Result<_>>()?;
        }
        let accept = |l: &UnixListener| -> Result<UnixStream> {
            l.set_nonblocking(true)?;
            // It dials once a second.
            let stream = until("connection of OVS", PATIENCE, || Ok(l.accept().ok()))?.0;
            stream.set_nonblocking(false)?;
            Ok(stream)
        };
        self.listeners.iter().map(accept).collect()
    }

    fn rule(&mut self, rule: Rule) -> Result<()> {
        if self.now == Some(rule) {
            return Ok(());
        }
        let flows = match rule {
            Rule::Normal => "actions=NORMAL\n".to_owned(),
            Rule::InPort => (0..self.sockets.len())
                .map(|i| format!("in_port={} actions=output:{}\n", i + 1, (i ^ 1) + 1))
                .collect(),
        };
        let file = self.dir.join("flows");
        std::fs::write(&file, flows)?;
        let bridge = format!("unix:{}", self.dir.join("br-pvp.mgmt").display());
        let mut command = Command::new("ovs-ofctl");
        command.args(["--bundle", "replace-flows"]).arg(bridge);
        run(own(command, &self.dir).arg(&file))?;
        // A cached flow gets the new actions but keeps the fields that the old rules looked at: after NORMAL, a rule per
        // in-port would go on comparing addresses and be a third slower than it is.
        self.ctl("revalidator/purge")?;
        self.now = Some(rule);
        Ok(())
    }

    fn account(&mut self) -> Result<Option<String>> {
        let text = self.ctl("dpif-netdev/pmd-stats-show")?;
        self.ctl("dpif-netdev/pmd-stats-clear")?;
        Ok(Some(text))
    }
}
