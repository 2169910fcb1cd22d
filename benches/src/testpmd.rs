//! dpdk-testpmd as the guests: two virtio-user ports in one process, on one CPU, between which frames go to and fro.
//!
//! Each port's driver is DPDK's, with all the work that a driver has: it is a guest as they are, where the null guest
//! shows what the switch could do. A few bursts are sent once; testpmd then gives back at either port what arrives at the
//! other (`io`), so that as many frames are under way at any time. What both ports receive is counted.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType};
use serde::{Deserialize, Serialize};

use crate::frames::mac;
use crate::host::{self, Process, Task, until};
use crate::peer::{Dials, Rule, Size, Switch};
use crate::pingpong::State;
use crate::report::{self, BESIDE_HEAD, Beside, Figure, Sample, beside, columns, name, table};
use crate::rig::{self, Common, Meter, Rig, tsc_hz};
use crate::ring::Layout;
use crate::sys;

const TESTPMD: &str = "/usr/bin/dpdk-testpmd";
const PACKAGES: [&str; 2] = ["dpdk-dev", "librte-mempool-ring23"];
/// Its memory: MB, and hugepages of 2 MB for it.
const MEMORY_MB: u64 = 256;
const HUGEPAGES: u64 = MEMORY_MB / 2 + 8;
const RING_SIZE: u16 = 1024;
/// Frames that testpmd sends and takes at once.
const BURST: u32 = 32;
const ROUNDS_PER_PAIR: usize = 3;
const PATIENCE: Duration = Duration::from_secs(20);
/// Its answer to a request for counters must come within this, or it is asked again: it says of when they are.
const ANSWER_MAX: Duration = Duration::from_millis(2);

/// What virtio-user is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    /// Ring layout.
    pub ring: Layout,
    /// The device gives buffers back in order (`VIRTIO_F_IN_ORDER`).
    pub in_order: bool,
    /// Receive buffers merge (`VIRTIO_NET_F_MRG_RXBUF`).
    pub mrg_rxbuf: bool,
    /// The driver's loops that use vector instructions, where it has one.
    pub vectorized: bool,
}

impl Shape {
    /// All of these rings.
    pub fn all(rings: &[Layout]) -> Vec<Shape> {
        let bools = [false, true];
        let mut all = Vec::new();
        for &ring in rings {
            for (in_order, mrg_rxbuf) in
                [(false, true), (false, false), (true, true), (true, false)]
            {
                all.extend(bools.map(|vectorized| Shape {
                    ring,
                    in_order,
                    mrg_rxbuf,
                    vectorized,
                }));
            }
        }
        all
    }

    fn devargs(&self) -> String {
        format!(
            "packed_vq={},in_order={},mrg_rxbuf={},vectorized={}",
            u8::from(self.ring == Layout::Packed),
            u8::from(self.in_order),
            u8::from(self.mrg_rxbuf),
            u8::from(self.vectorized)
        )
    }
}

/// The loops that the driver has chosen: receive, transmit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Loops {
    /// For receiving.
    pub rx: String,
    /// For sending.
    pub tx: String,
}

impl Loops {
    /// From what it says: `virtio: using inorder Rx path on port 0`.
    fn parse(said: &str) -> Loops {
        let of = |direction: &str| {
            let line = said.lines().rev().find_map(|l| {
                let (_, rest) = l.split_once("virtio: using ")?;
                rest.strip_suffix(&format!(" {direction} path on port 0"))
            });
            line.unwrap_or("unknown").to_owned()
        };
        Loops {
            rx: of("Rx"),
            tx: of("Tx"),
        }
    }
}

/// A running testpmd; killed when it drops.
struct Testpmd {
    process: Process,
    telemetry: OwnedFd,
    loops: Loops,
    /// Times it was told to start.
    starts: usize,
    bursts: u32,
}

/// Counters of a port, and when.
#[derive(Debug, Clone, Copy)]
struct Reading {
    received: u64,
    errors: u64,
    at: u64,
}

#[derive(Deserialize)]
struct Stats {
    ipackets: u64,
    ierrors: u64,
}

fn stats(answer: &str) -> Result<Stats> {
    #[derive(Deserialize)]
    struct Answer {
        #[serde(rename = "/ethdev/stats")]
        stats: Stats,
    }
    let answer: Answer = serde_json::from_str(answer).with_context(|| answer.to_owned())?;
    Ok(answer.stats)
}

impl Testpmd {
    /// Connects to the first two ports of a switch, which must run.
    fn start(
        plan: &Plan,
        dir: &Path,
        switch: &dyn Switch,
        shape: Shape,
        frame: usize,
    ) -> Result<Testpmd> {
        let dir = dir.join(format!("testpmd-{}", switch.name()));
        // That of the cell before.
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir(&dir)?;
        let (sockets, dials) = switch.sockets();
        let cpu = plan.common.guest_cpu;
        // Its lines must not wait in a buffer: they are looked at.
        let mut command = Command::new("stdbuf");
        command.args(["-oL", TESTPMD]);
        command.args(["--lcores", &format!("0@{cpu},1@{cpu}")]);
        command.args(["--no-pci", "--in-memory", "--single-file-segments"]);
        command.args(["--socket-mem", &MEMORY_MB.to_string()]);
        command.args([
            "--force-max-simd-bitwidth=512",
            "--log-level=pmd.net.virtio.init:info",
        ]);
        for (i, socket) in sockets.iter().take(2).enumerate() {
            let server = match dials {
                Dials::Guest => "",
                Dials::Switch => {
                    let _ = std::fs::remove_file(socket);
                    ",server=1"
                }
            };
            command.arg(format!(
                "--vdev=net_virtio_user{i},path={}{server},mac={},queues=1,queue_size={RING_SIZE},{}",
                socket.display(),
                colons(mac(i)),
                shape.devargs()
            ));
        }
        command.args(["--", "-i", "--nb-cores=1", "--forward-mode=io"]);
        command.args([format!("--txd={RING_SIZE}"), format!("--rxd={RING_SIZE}")]);
        command.args([format!("--burst={BURST}"), format!("--txpkts={frame}")]);
        command.arg("--total-num-mbufs=16384");
        for i in 0..2 {
            command.arg(format!("--eth-peer={i},{}", colons(mac(i ^ 1))));
        }
        command.env("RUNTIME_DIRECTORY", &dir);
        let mut process = Process::start_told("dpdk-testpmd", command, &dir.join("log"))?;
        until("prompt of testpmd", PATIENCE, || {
            process.check()?;
            Ok(process.has_said()?.contains("testpmd> ").then_some(()))
        })
        .with_context(|| process.said())?;
        let loops = Loops::parse(&process.has_said()?);
        let path = dir.join("dpdk/rte/dpdk_telemetry.v2");
        let telemetry = connect(&path).with_context(|| path.display().to_string())?;
        Ok(Testpmd {
            process,
            telemetry,
            loops,
            starts: 0,
            bursts: plan.bursts,
        })
    }

    fn worker(&self) -> Result<Task> {
        // As DPDK names it, and as later versions do.
        let mut named = ["rte-worker-", "dpdk-worker"].into_iter();
        let worker = named.find_map(|n| self.process.thread(n));
        worker.context("testpmd has no worker thread")
    }

    fn ask(&self, request: &str) -> Result<String> {
        rustix::net::send(&self.telemetry, request.as_bytes(), SendFlags::empty())?;
        receive(&self.telemetry)
    }

    /// Both ports' counters.
    fn read(&self) -> Result<[Reading; 2]> {
        let one = |port: usize| -> Result<Reading> {
            let mut tries = 0;
            loop {
                let (since, before) = (Instant::now(), sys::tsc());
                let answer = self.ask(&format!("/ethdev/stats,{port}"))?;
                let at = before + (sys::tsc() - before) / 2;
                tries += 1;
                if since.elapsed() <= ANSWER_MAX || tries >= 20 {
                    let stats = stats(&answer)?;
                    return Ok(Reading {
                        received: stats.ipackets,
                        errors: stats.ierrors,
                        at,
                    });
                }
            }
        };
        Ok([one(0)?, one(1)?])
    }

    /// Starts anew, with as many frames as in every other window: what was under way is taken off the rings first.
    fn begin(&mut self, switch: &mut dyn Switch) -> Result<()> {
        for _ in 0..3 {
            let bursts = self.bursts;
            self.process
                .tell(&format!("stop\nstart tx_first {bursts}\n"))?;
            self.starts += 1;
            until("start of testpmd", PATIENCE, || {
                self.process.check()?;
                switch.process().check()?;
                let said = self.process.has_said()?;
                let starts = said.matches("packet forwarding - ports=2").count();
                Ok((starts >= self.starts).then_some(()))
            })?;
            std::thread::sleep(Duration::from_millis(50));
            let first = self.read()?;
            std::thread::sleep(Duration::from_millis(20));
            let second = self.read()?;
            if (0..2).all(|i| second[i].received > first[i].received) {
                return Ok(());
            }
            // The switch may not have been ready for the first frames.
        }
        bail!(
            "{}: frames do not go round; it said:\n{}\ntestpmd said:\n{}",
            switch.name(),
            switch.process().said(),
            self.process.said()
        );
    }
}

fn colons(mac: [u8; 6]) -> String {
    mac.map(|b| format!("{b:02x}")).join(":")
}

fn connect(path: &Path) -> Result<OwnedFd> {
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    // Version, process, longest answer.
    receive(&socket)?;
    Ok(socket)
}

fn receive(socket: &OwnedFd) -> Result<String> {
    let mut answer = vec![0; 16384];
    let (n, _) = rustix::net::recv(socket, &mut answer[..], RecvFlags::empty())?;
    ensure!(n > 0, "testpmd has hung up");
    Ok(String::from_utf8_lossy(&answer[..n]).into_owned())
}

/// What to measure.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Where, and how long.
    pub common: Common,
    /// Frame sizes without FCS.
    pub frames: Vec<usize>,
    /// What virtio-user is asked for.
    pub shapes: Vec<Shape>,
    /// Good rounds, in which each switch has a turn, in one state.
    pub pairs: usize,
    /// Bursts of 32 frames that are under way in each direction.
    pub bursts: u32,
}

/// One window's result.
#[derive(Debug, Clone, Serialize)]
pub struct Window {
    /// Of the rings.
    #[serde(flatten)]
    pub shape: Shape,
    /// What testpmd made of it.
    pub loops: Loops,
    /// Frame size.
    pub frame: usize,
    /// Frames that each port received.
    pub received: [u64; 2],
    /// What is compared.
    #[serde(flatten)]
    pub sample: Sample,
}

/// A combination that did not start.
#[derive(Debug, Clone)]
pub struct Refusal {
    shape: Shape,
    frame: usize,
    why: String,
}

/// Everything that was measured.
#[derive(Debug, Default)]
pub struct Results {
    /// In the order of time.
    pub windows: Vec<Window>,
    /// What could not be.
    pub refusals: Vec<Refusal>,
    /// Time-stamp cycles per second.
    pub tsc_hz: f64,
}

/// Measures all cells.
pub fn measure(plan: &Plan) -> Result<Results> {
    ensure!(
        plan.bursts >= 1 && plan.bursts * BURST < u32::from(RING_SIZE),
        "the frames under way must fit into a ring"
    );
    if !Path::new(TESTPMD).exists() {
        host::install(&PACKAGES)?;
    }
    let size = Size {
        ports: 2,
        addresses: None,
    };
    let mut rig = Rig::start(&plan.common, size, 2 * HUGEPAGES)?;
    let mut results = Results {
        tsc_hz: tsc_hz(),
        ..Results::default()
    };
    for &shape in &plan.shapes {
        for &frame in &plan.frames {
            cell(plan, &mut rig, shape, frame, &mut results)?;
        }
    }
    Ok(results)
}

fn cell(
    plan: &Plan,
    rig: &mut Rig,
    shape: Shape,
    frame: usize,
    results: &mut Results,
) -> Result<()> {
    let dir: PathBuf = rig.dir();
    let mut guests = Vec::new();
    for (switch, _) in &mut rig.switches {
        switch.process().go_on()?;
        let guest = Testpmd::start(plan, &dir, switch.as_ref(), shape, frame);
        switch.process().check()?;
        match guest {
            Ok(guest) => {
                guest.process.pause()?;
                guests.push(guest);
            }
            Err(e) if sys::is_interrupted() => return Err(e),
            Err(e) => {
                let why = format!("{}: {}", switch.name(), e.root_cause());
                eprintln!("{shape:?}, {frame} bytes: {e:#}");
                results.refusals.push(Refusal { shape, frame, why });
            }
        }
        switch.process().pause()?;
    }
    // Both or none: a figure without the other one beside it says little.
    let both = guests.len() == rig.switches.len();
    for round in 0..plan.pairs * ROUNDS_PER_PAIR {
        let of_cell = results.windows.iter();
        let of_cell = of_cell.filter(|w| w.shape == shape && w.frame == frame);
        let so_far: Vec<_> = of_cell.map(|w| (w.sample.round, w.sample.on)).collect();
        if !both || rig::enough(&so_far, plan.pairs) {
            break;
        }
        for ((switch, rules), guest) in rig.switches.iter_mut().zip(&mut guests) {
            for &rule in *rules {
                let (sample, received) =
                    take(plan, switch.as_mut(), guest, rule, round, results.tsc_hz)?;
                let loops = guest.loops.clone();
                eprintln!(
                    "{:6} {:4} B {} | {} to {}",
                    name(shape.ring),
                    frame,
                    sample.line(),
                    loops.tx,
                    loops.rx
                );
                results.windows.push(Window {
                    shape,
                    loops,
                    frame,
                    received,
                    sample,
                });
            }
        }
    }
    // A switch that stands still would not notice that its guests are gone.
    for (switch, _) in &mut rig.switches {
        switch.process().go_on()?;
    }
    drop(guests);
    for (switch, _) in &mut rig.switches {
        switch.process().check()?;
        switch.process().pause()?;
    }
    Ok(())
}

/// One window.
fn take(
    plan: &Plan,
    switch: &mut dyn Switch,
    guest: &mut Testpmd,
    rule: Rule,
    round: usize,
    tsc_hz: f64,
) -> Result<(Sample, [u64; 2])> {
    let before = rig::before(&plan.common)?;
    switch.process().go_on()?;
    switch.rule(rule)?;
    guest.process.go_on()?;
    guest.begin(switch)?;
    std::thread::sleep(plan.common.skip);
    let meter = Meter::start(&plan.common, switch, guest.worker()?, before)?;
    let from = guest.read()?;
    std::thread::sleep(plan.common.measure);
    let to = guest.read()?;
    let closed = meter.stop()?;
    guest.process.pause()?;
    switch.process().pause()?;
    let on = closed.conditions(&plan.common)?;
    switch.process().check()?;
    if sys::is_interrupted() {
        bail!("interrupted");
    }
    let received = [0, 1].map(|i| to[i].received - from[i].received);
    let errors: u64 = (0..2).map(|i| to[i].errors - from[i].errors).sum();
    ensure!(
        errors == 0,
        "{}: {errors} frames arrived wrong",
        switch.name()
    );
    let per_second = |i: usize| received[i] as f64 * tsc_hz / (to[i].at - from[i].at) as f64;
    let rate = per_second(0) + per_second(1);
    let sample = Sample {
        switch: switch.name(),
        rule,
        round,
        mpps: rate / 1e6,
        calm_mpps: None,
        cycles: tsc_hz * on.worker_share.min(1.0) / rate.max(1.0),
        on,
    };
    Ok((sample, received))
}

/// One line of the table.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Cell {
    /// Who stands for the guests.
    pub peer: String,
    /// Of the rings.
    #[serde(flatten)]
    pub shape: Shape,
    /// Frame size without FCS.
    pub frame: usize,
    /// What the driver made of it, beside ours and beside OVS-DPDK.
    pub loops: [Option<Loops>; 2],
    /// The figures; null if it could not be measured.
    #[serde(flatten)]
    pub beside: Option<Beside>,
    /// Ping-pong round trips in nanoseconds.
    pub round_trip_ns: Option<Figure>,
    /// Why a figure is missing.
    pub note: Option<String>,
}

/// Sorts windows into cells.
pub fn cells(plan: &Plan, results: &Results) -> Vec<Cell> {
    let mut out = Vec::new();
    for &shape in &plan.shapes {
        for &frame in &plan.frames {
            out.extend(cells_of(results, shape, frame));
        }
    }
    out
}

fn cells_of(results: &Results, shape: Shape, frame: usize) -> Vec<Cell> {
    let all = results.windows.iter();
    let windows = all.filter(|w| w.shape == shape && w.frame == frame);
    let samples = windows.clone().map(|w| &w.sample);
    let loops = ["gangway", "ovs"].map(|switch| {
        let mut of_it = windows.clone().filter(|w| w.sample.switch == switch);
        of_it.next().map(|w| w.loops.clone())
    });
    let cell = |beside, round_trip_ns, note| Cell {
        peer: "testpmd".to_owned(),
        shape,
        frame,
        loops: loops.clone(),
        beside,
        round_trip_ns,
        note,
    };
    let of_state = |state| {
        let beside = beside(samples.clone(), state, false)?;
        let trips = report::round_trip_ns(samples.clone(), state, results.tsc_hz);
        Some(cell(Some(beside), trips, None))
    };
    let mut out: Vec<Cell> = [State::Near, State::Far]
        .into_iter()
        .filter_map(of_state)
        .collect();
    let refused = |r: &&Refusal| r.shape == shape && r.frame == frame;
    if let Some(refusal) = results.refusals.iter().find(refused) {
        out.push(cell(None, None, Some(refusal.why.clone())));
    }
    out
}

/// The table.
pub fn markdown(cells: &[Cell]) -> String {
    let mut head = [""; 14];
    head[..6].copy_from_slice(&[
        "ring",
        "in order",
        "mergeable",
        "vectorized",
        "frame",
        "driver's loops",
    ]);
    head[6..13].copy_from_slice(&BESIDE_HEAD);
    head[13] = "note";
    let yes = |b: bool| if b { "yes" } else { "no" }.to_owned();
    let rows = cells.iter().map(|c| {
        let loops = match &c.loops {
            [Some(ours), _] | [None, Some(ours)] => format!("{} / {}", ours.rx, ours.tx),
            [None, None] => report::NOTHING.to_owned(),
        };
        let nothing = || [0; 7].map(|_| report::NOTHING.to_owned());
        let [a, b, d, e, f, g, h] = c.beside.as_ref().map_or_else(nothing, columns);
        let s = c.shape;
        [
            name(s.ring),
            yes(s.in_order),
            yes(s.mrg_rxbuf),
            yes(s.vectorized),
            c.frame.to_string(),
            loops,
            a,
            b,
            d,
            e,
            f,
            g,
            h,
            c.note.clone().unwrap_or_default(),
        ]
    });
    format!(
        "Mpps, received by both ports: median [least to most] (cycles of the switch's worker per frame).\n\n{}",
        table(head, rows)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loops_are_what_the_driver_says() {
        let said = "EAL: Probe\n\
            virtio_dev_devargs_parse(): virtio: using vectorized Rx path on port 0\n\
            set_rxtx_funcs(): virtio: using packed ring standard Tx path on port 0\n\
            set_rxtx_funcs(): virtio: using packed ring mergeable buffer Rx path on port 0\n\
            set_rxtx_funcs(): virtio: using standard Rx path on port 1\n";
        let l = Loops::parse(said);
        assert_eq!(
            (&*l.rx, &*l.tx),
            ("packed ring mergeable buffer", "packed ring standard")
        );
        assert_eq!(Loops::parse("").rx, "unknown");
    }

    #[test]
    fn counters_are_read_from_an_answer() {
        let s = stats(
            "{\"/ethdev/stats\":{\"ipackets\":7,\"opackets\":8,\"ierrors\":1,\"q_ipackets\":[7,0]}}",
        );
        let s = s.unwrap();
        assert_eq!((s.ipackets, s.ierrors), (7, 1));
        assert!(stats("{\"/ethdev/stats\":null}").is_err());
    }

    #[test]
    fn all_shapes_are_eight_a_ring_and_different() {
        let all = Shape::all(&[Layout::Split, Layout::Packed]);
        let devargs: std::collections::HashSet<_> = all.iter().map(Shape::devargs).collect();
        assert_eq!((all.len(), devargs.len()), (16, 16));
    }

    #[test]
    fn cells_survive_their_json() {
        let shape = Shape::all(&[Layout::Split])[0];
        let refusal = Refusal {
            shape,
            frame: 64,
            why: "ovs: no".to_owned(),
        };
        let sample = crate::report::tests::sample("gangway", Rule::Normal, 0, 10.0);
        let loops = Loops::parse("");
        let results = Results {
            windows: vec![Window {
                shape,
                loops,
                frame: 64,
                received: [1, 2],
                sample,
            }],
            refusals: vec![refusal],
            tsc_hz: 2.6e9,
        };
        let cells = cells_of(&results, shape, 64);
        assert_eq!(cells.len(), 2);
        let json = serde_json::to_string(&cells).unwrap();
        let back: Vec<Cell> = serde_json::from_str(&json).unwrap();
        assert!(back[0].beside.is_some() && back[1].beside.is_none());
        assert!(markdown(&back).contains("ovs: no"));
    }
}
