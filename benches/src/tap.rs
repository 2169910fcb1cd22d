//! TCP between two network namespaces: over TAPs and our switch, beside veths and a Linux bridge, in turn.
//!
//! Both offer the hosts the same: checksums and TCP segmentation left to the receiver, 1,500 bytes MTU. The kernel's bridge
//! carries a big frame by reference, in the sender's own context; through a TAP it is copied out of the kernel and into it
//! again, by a third thread.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::host::{self, Alone, Folder, Process, run, until};
use crate::pingpong::{State, round_trip};
use crate::plot::{Bars, Panel, draw};
use crate::report::{Figure, one, table};
use crate::sys;

const PATIENCE: Duration = Duration::from_secs(20);
const CLIENT: &str = "10.9.0.1";
const SERVER: &str = "10.9.0.2";

/// What is measured.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Our binary.
    pub switch: PathBuf,
    /// Its workers.
    pub workers: usize,
    /// Numbers of streams.
    pub streams: Vec<u32>,
    /// Rounds; in each, both have their turn, each time the other one first.
    pub pairs: usize,
    /// Seconds of a turn that count, behind one that does not.
    pub turn_s: u32,
    /// How long to wait for other work on this machine to end, before each turn.
    pub quiet: Duration,
    /// A ping-pong round trip of up to so many cycles is near.
    pub near_max: u64,
}

/// One turn.
#[derive(Debug, Clone, Serialize)]
pub struct Window {
    /// `gangway` or `bridge`.
    pub way: &'static str,
    /// Streams.
    pub streams: u32,
    /// In which round.
    pub round: usize,
    /// Received payload.
    pub gbit_s: f64,
    /// Segments sent again.
    pub retransmits: u64,
    /// Of one CPU: what the switch's workers had.
    pub workers: f64,
    /// Of all CPUs: what was not idle.
    pub busy: f64,
    /// How far the CPUs were apart.
    pub state: State,
}

/// All windows of one number of streams.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Cell {
    /// Streams.
    pub streams: u32,
    /// Ours, in Gbit/s.
    pub gangway: Figure,
    /// The bridge, in Gbit/s.
    pub bridge: Figure,
    /// Ours by the bridge's, of the same round.
    pub ratio: Figure,
    /// Segments sent again per turn, ours and the bridge's.
    pub retransmits: [Figure; 2],
    /// Of one CPU: what our workers had.
    pub workers: Figure,
    /// Of all CPUs: what was not idle, ours and the bridge's.
    pub busy: [Figure; 2],
}

/// A network namespace; it goes when this drops.
struct Netns(String);

impl Netns {
    fn new(part: &str) -> Result<Netns> {
        let name = format!("gwtap{}-{part}", std::process::id());
        run(Command::new("ip").args(["netns", "add", &name]))?;
        let netns = Netns(name);
        netns.ip("link set lo up")?;
        Ok(netns)
    }

    fn ip(&self, line: &str) -> Result<()> {
        let mut ip = Command::new("ip");
        run(ip.args(["-n", &self.0]).args(line.split(' '))).map(drop)
    }

    fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.0]).arg(program);
        command
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = run(Command::new("ip").args(["netns", "del", &self.0]));
    }
}

/// A way from a client to a server. Fields drop in this order: processes before namespaces.
struct Way {
    name: &'static str,
    /// What moves the frames, if it is a process.
    switch: Option<Process>,
    _server: Process,
    client: Netns,
    _others: Vec<Netns>,
}

/// A ping-pong between the first two CPUs, for which all else stands still.
fn trip() -> Result<u64> {
    host::pin(1)?;
    let cycles = round_trip(0);
    host::unpin()?;
    cycles
}

fn server(netns: &Netns, log: &Path) -> Result<Process> {
    let mut command = netns.command("iperf3");
    command.arg("-s");
    let mut server = Process::start("iperf3", command, log)?;
    until("server of iperf3", PATIENCE, || {
        server.check()?;
        let listening = run(netns.command("ss").args(["-Hltn", "sport = :5201"]))?;
        Ok((!listening.is_empty()).then_some(()))
    })?;
    Ok(server)
}

impl Way {
    fn gangway(plan: &Plan, dir: &Path) -> Result<Way> {
        ensure!(
            plan.switch.exists(),
            "{} is not there: cargo build --release -p gangway-switch",
            plan.switch.display()
        );
        let (home, client, far) = (Netns::new("sw")?, Netns::new("ga")?, Netns::new("gb")?);
        let d = dir.display();
        let mut config = format!(
            "[host]\nname = \"bench\"\nstate_dir = \"{d}/gangway\"\n\
             [control]\nsocket = \"{d}/gangway.sock\"\n\
             [workers]\ncount = {}\n[spool]\nquota_bytes = 67108864\nsync = \"none\"\n",
            plan.workers
        );
        for device in ["gwa", "gwb"] {
            let _ = write!(
                config,
                "[[port]]\nname = \"{device}\"\ntype = \"tap\"\ndevice = \"{device}\"\nrole = \"endpoint\"\n"
            );
        }
        std::fs::create_dir(dir.join("gangway"))?;
        let file = dir.join("gangway.toml");
        std::fs::write(&file, config)?;
        let mut command = home.command(&plan.switch);
        command.arg("--config").arg(&file);
        let mut switch = Process::start("gangway-switch", command, &dir.join("gangway.log"))?;
        until("socket of gangway-switch", PATIENCE, || {
            switch.check()?;
            Ok(dir.join("gangway.sock").exists().then_some(()))
        })?;
        for (device, netns, address) in [("gwa", &client, CLIENT), ("gwb", &far, SERVER)] {
            // The switch has its end; this one may go where it is needed.
            home.ip(&format!("link set {device} netns {}", netns.0))?;
            netns.ip(&format!("addr add {address}/24 dev {device}"))?;
            netns.ip(&format!("link set {device} up"))?;
        }
        Ok(Way {
            name: "gangway",
            switch: Some(switch),
            _server: server(&far, &dir.join("iperf3-gangway.log"))?,
            client,
            _others: vec![home, far],
        })
    }

    fn bridge(dir: &Path) -> Result<Way> {
        let (home, client, far) = (Netns::new("br")?, Netns::new("ba")?, Netns::new("bb")?);
        home.ip("link add br0 type bridge stp_state 0 forward_delay 0")?;
        home.ip("link set br0 up")?;
        for (device, netns, address) in [("a", &client, CLIENT), ("b", &far, SERVER)] {
            home.ip(&format!(
                "link add name {device} type veth peer name eth0 netns {}",
                netns.0
            ))?;
            home.ip(&format!("link set dev {device} master br0 up"))?;
            netns.ip(&format!("addr add {address}/24 dev eth0"))?;
            netns.ip("link set eth0 up")?;
        }
        Ok(Way {
            name: "bridge",
            switch: None,
            _server: server(&far, &dir.join("iperf3-bridge.log"))?,
            client,
            _others: vec![home, far],
        })
    }

    /// Nanoseconds that the switch's workers have had.
    fn worker_ns(&self, workers: usize) -> Result<u64> {
        let Some(switch) = &self.switch else {
            return Ok(0);
        };
        let mut sum = 0;
        for n in 0..workers {
            let worker = switch.thread(&format!("worker-{n}"));
            sum += worker.context("a worker of the switch")?.cpu_time()?.ran;
        }
        Ok(sum)
    }

    fn turn(&self, plan: &Plan, streams: u32, round: usize) -> Result<Window> {
        host::quiet(plan.quiet)?;
        let before = trip()?;
        let (since, ran, ticks) = (Instant::now(), self.worker_ns(plan.workers)?, host::ticks());
        let mut client = self.client.command("iperf3");
        client.args(["-J", "-O", "1", "-c", SERVER]);
        client.args(["-t", &plan.turn_s.to_string(), "-P", &streams.to_string()]);
        let said = run(&mut client)?;
        let wall_ns = since.elapsed().as_nanos() as f64;
        let (ran, now) = (self.worker_ns(plan.workers)? - ran, host::ticks());
        let after = trip()?;
        let json: serde_json::Value = serde_json::from_str(&said).context("iperf3's answer")?;
        let end = &json["end"];
        let bits = end["sum_received"]["bits_per_second"].as_f64();
        Ok(Window {
            way: self.name,
            streams,
            round,
            gbit_s: bits.with_context(|| said.clone())? / 1e9,
            retransmits: end["sum_sent"]["retransmits"].as_u64().unwrap_or(0),
            workers: ran as f64 / wall_ns,
            busy: (now.1 - ticks.1) as f64 / (now.0 - ticks.0).max(1) as f64,
            state: State::of(before, after, plan.near_max),
        })
    }
}

/// Measures, and gives back all that it took.
pub fn measure(plan: &Plan) -> Result<Vec<Window>> {
    sys::on_signals();
    let _alone = Alone::wait()?;
    if run(Command::new("iperf3").arg("--version")).is_err() {
        host::install(&["iperf3"])?;
    }
    let folder = Folder::below(Path::new("/tmp"))?;
    let mut ways = [
        Way::gangway(plan, folder.path())?,
        Way::bridge(folder.path())?,
    ];
    let mut windows = Vec::new();
    for round in 0..plan.pairs {
        for &streams in &plan.streams {
            for way in &ways {
                let w = way.turn(plan, streams, round)?;
                eprintln!(
                    "{:7} {streams} streams: {:6.2} Gbit/s, {} again, workers {:.2}, busy {:.2}, {:?}",
                    w.way, w.gbit_s, w.retransmits, w.workers, w.busy, w.state
                );
                windows.push(w);
            }
        }
        ways.reverse();
    }
    Ok(windows)
}

/// What is made of the windows.
pub fn cells(windows: &[Window]) -> Vec<Cell> {
    let mut streams: Vec<u32> = windows.iter().map(|w| w.streams).collect();
    streams.sort_unstable();
    streams.dedup();
    let cell = |&streams: &u32| {
        let of = |way: &'static str| {
            let of = move |w: &&Window| w.way == way && w.streams == streams;
            windows.iter().filter(of)
        };
        let figure = |way, what: fn(&Window) -> f64| Figure::of(of(way).map(what));
        let both = |what| Some([figure("gangway", what)?, figure("bridge", what)?]);
        let ratios = of("gangway").filter_map(|ours| {
            let theirs = of("bridge").find(|w| w.round == ours.round)?;
            Some(ours.gbit_s / theirs.gbit_s)
        });
        let [gangway, bridge] = both(|w| w.gbit_s)?;
        Some(Cell {
            streams,
            gangway,
            bridge,
            ratio: Figure::of(ratios)?,
            retransmits: both(|w| w.retransmits as f64)?,
            workers: figure("gangway", |w| w.workers)?,
            busy: both(|w| w.busy)?,
        })
    };
    streams.iter().filter_map(cell).collect()
}

/// Pictures of the cells.
pub fn picture(cells: &[Cell]) -> Result<String> {
    let bars = |name: &str, figure: fn(&Cell) -> Figure| Bars {
        name: name.to_owned(),
        values: cells.iter().map(|c| Some(figure(c))).collect(),
    };
    draw(&[Panel::Bars {
        title: "TCP between two namespaces, Gbit/s".to_owned(),
        categories: cells
            .iter()
            .map(|c| format!("{} streams", c.streams))
            .collect(),
        series: vec![
            bars("Gangway, TAP to TAP", |c| c.gangway),
            bars("Linux bridge, veth to veth", |c| c.bridge),
        ],
    }])
}

/// A table.
pub fn markdown(cells: &[Cell]) -> String {
    let head = [
        "streams",
        "Gangway, Gbit/s",
        "bridge, Gbit/s",
        "ratio",
        "sent again",
        "workers, CPUs",
        "machine busy",
    ];
    let rows = cells.iter().map(|c| {
        let two = |f: [Figure; 2], digits| {
            format!("{} / {}", one(Some(f[0]), digits), one(Some(f[1]), digits))
        };
        [
            c.streams.to_string(),
            one(Some(c.gangway), 1),
            one(Some(c.bridge), 1),
            one(Some(c.ratio), 2),
            two(c.retransmits, 0),
            one(Some(c.workers), 2),
            two(c.busy, 2),
        ]
    });
    table(head, rows)
}
