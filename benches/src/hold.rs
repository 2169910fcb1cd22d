//! How fast lanes freeze into the spool and flush out of it, and what gates cost a lane that is not frozen.
//!
//! Two switches: the source, whose worker is measured between two ports of a null guest, and a target that the hold is
//! opened towards and which then stands still: what is measured is the source's own way in and out, without the shipment
//! on the same two CPUs. The flush is that of an abort; a target's flush is the same loop.
//!
//! A round: forward for a while, freeze all lanes to the receiver, send until the spool is full, rest, put the hold back,
//! receive until all is there. What was sent and what arrived is counted, and must be equal.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};
use gangway_shared::api::{HoldInfo, HoldOpen, HoldState, IncomingPort, IncomingPrepare};
use gangway_shared::api::{Reply, Request, Scope};
use gangway_shared::id::{HoldId, MacAddr};
use gangway_shared::pki::Role;
use serde::{Deserialize, Serialize};

use crate::control::Control;
use crate::frames::{Pattern, mac};
use crate::guest::{self, Drive, Habits, Seen};
use crate::host::{Folder, Task, until};
use crate::peer::{Gangway, Setup, Size, Switch};
use crate::pingpong::State;
use crate::report::{Figure, both, name, one, table};
use crate::rig::{self, Common, Conditions, GUEST_SHARED, Ground, Meter, tsc_hz};
use crate::ring::Layout;
use crate::{host, pvp, sys};

/// Slices of a run.
const SLICES_HZ: f64 = 1000.0;
/// A stretch of a run; it goes on as long as something moves.
const STRETCH: Duration = Duration::from_millis(100);
/// A freeze or flush that takes longer has failed.
const LONGEST: Duration = Duration::from_secs(20);
/// How long the spool gets to make segments ready before a freeze.
const KEEPER: Duration = Duration::from_millis(400);
const ROUNDS_PER_PAIR: usize = 3;
/// What full bursts take in the spool (docs/formats/spool.md).
const BURST: u64 = 32;
const BATCH_HEADER: u64 = 48;
const BATCH_ENTRY: u64 = 4;
const SLOT_FRONT: u64 = 12;
const SLOT_ALIGN: u64 = 16;

/// Where the segments come from that a freeze fills.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Segments {
    /// They lie ready, faulted in: what the worker can do.
    Ready,
    /// Few of them do, as by default; the keeper makes more on the guest's CPU meanwhile.
    Made,
}

impl Segments {
    /// Bytes of a segment, and of all.
    fn sizes(self) -> (u64, u64) {
        match self {
            // The lane's first one, and two that are kept ready: there is nothing left to make.
            Segments::Ready => (256 << 20, 3 * (256 << 20)),
            Segments::Made => (1 << 20, 1 << 30),
        }
    }

    fn spool(self, dir: &Path) -> String {
        let (segment, quota) = self.sizes();
        format!(
            "dir = \"{}\"\nsegment_bytes = {segment}\nquota_bytes = {quota}\nsync = \"none\"\n",
            dir.display()
        )
    }

    /// Frames that a freeze is measured over: most of what the spool holds.
    fn frames(self, bytes: usize) -> f64 {
        let slot = (SLOT_FRONT + bytes as u64).next_multiple_of(SLOT_ALIGN);
        let batch = BATCH_HEADER + BURST * (BATCH_ENTRY + slot);
        0.9 * (self.sizes().1 / batch * BURST) as f64
    }
}

/// What to measure.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Where, and how long.
    pub common: Common,
    /// Ring layout.
    pub ring: Layout,
    /// Frame sizes without FCS.
    pub frames: Vec<usize>,
    /// Where segments come from.
    pub segments: Vec<Segments>,
    /// Good rounds in one state.
    pub pairs: usize,
    /// How the guest behaves.
    pub habits: Habits,
    /// Where the spool lies.
    pub spool: PathBuf,
    /// The switch keeps a ledger of its holds, as by default.
    pub ledger: bool,
}

/// A round of freeze and flush.
#[derive(Debug, Clone, Serialize)]
pub struct Window {
    /// Frame size.
    pub frame: usize,
    /// Where segments came from.
    pub segments: Segments,
    /// Which round.
    pub round: usize,
    /// Before the freeze.
    pub forward_mpps: f64,
    /// Into the spool.
    pub freeze_mpps: f64,
    /// Out of it.
    pub flush_mpps: f64,
    /// Frames that were held.
    pub held: u64,
    /// From the order to put the hold back until it is over, with its ledger, in milliseconds.
    pub put_back_ms: f64,
    /// What it was like.
    #[serde(flatten)]
    pub on: Conditions,
}

/// What is held elsewhere while a lane forwards.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Gates {
    /// Nothing.
    Off,
    /// A hold is open on the receiver of the lane; nothing is frozen.
    Open,
    /// Another VM's lanes are frozen.
    Frozen,
}

const GATES: [Gates; 3] = [Gates::Off, Gates::Open, Gates::Frozen];

/// A window of a lane that forwards.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct GateWindow {
    /// Frame size.
    pub frame: usize,
    /// What is held elsewhere.
    pub gates: Gates,
    /// Which round.
    pub round: usize,
    /// The lane's rate.
    pub mpps: f64,
    /// What it was like.
    #[serde(flatten)]
    pub on: Conditions,
}

/// Everything that was measured.
#[derive(Debug, Default, Serialize)]
pub struct Results {
    /// Freeze and flush.
    pub holds: Vec<Window>,
    /// What gates cost.
    pub gates: Vec<GateWindow>,
    /// Time-stamp cycles per second.
    pub tsc_hz: f64,
}

/// Lines of a configuration, `[spool]` first, for a spool in a folder.
pub(crate) type Sections<'a> = &'a dyn Fn(&Path) -> String;

/// A source and a target. Processes drop before what they use.
pub(crate) struct Hosts {
    pub(crate) source: Gangway,
    pub(crate) target: Gangway,
    pub(crate) near: Control,
    pub(crate) far: Control,
    address: SocketAddr,
    next: u64,
    _spool: Folder,
    _ground: Ground,
}

impl Hosts {
    /// Their spools lie below `base`; `sections` are the lines for a spool in a folder, and what else follows: the source's, and
    /// the target's, if it is to have other than few.
    pub(crate) fn start(
        common: &Common,
        base: &Path,
        sections: [Option<Sections<'_>>; 2],
        ports: usize,
    ) -> Result<Hosts> {
        let ground = Ground::take(common, pvp::hugepages(ports))?;
        let folder = Folder::below(base)?;
        let dir = ground.dir().to_owned();
        let certificates = dir.join("pki");
        let failed = |f: gangway::exit::Failure| anyhow!(f.message);
        gangway::pki::init(&certificates).map_err(failed)?;
        let size = Size {
            ports,
            addresses: None,
        };
        let setup = |host: &str| -> Result<(Setup, SocketAddr)> {
            gangway::pki::issue(&certificates, host, Role::Host, &[]).map_err(failed)?;
            let address = free_address()?;
            let setup = Setup {
                host: host.to_owned(),
                vms: true,
                listen: Some((address, certificates.clone())),
                ..Setup::default()
            };
            Ok((setup, address))
        };
        let (mut a, _) = setup("source")?;
        let (mut b, address) = setup("target")?;
        b.sleeps = true;
        // A target that works, too, needs a CPU for it.
        a.sleeps = sections[1].is_some();
        for (s, sections) in [&mut a, &mut b].into_iter().zip(sections) {
            if let Some(sections) = sections {
                s.spool = sections(&folder.path().join(&s.host));
            }
        }
        let source = Gangway::start(&common.switch, &dir, &a, size, &[common.worker_cpu])?;
        let target = Gangway::start(&common.switch, &dir, &b, size, &[common.guest_cpu])?;
        host::pin(common.guest_cpu)?;
        Ok(Hosts {
            near: Control::connect(&a.control(&dir))?,
            far: Control::connect(&b.control(&dir))?,
            source,
            target,
            address,
            next: 1,
            _spool: folder,
            _ground: ground,
        })
    }

    /// Opens a hold on the VM of a port; the target stands still then. Both must run.
    pub(crate) fn open(&mut self, port: usize) -> Result<HoldId> {
        let hold = HoldId(self.next);
        self.next += 1;
        let (vm, ticket) = (Setup::port(port), [7; 32]);
        let arriving = IncomingPort {
            name: vm.clone(),
            vm: vm.clone(),
            mac: Some(MacAddr(mac(port))),
        };
        self.far.call(&Request::IncomingPrepare(IncomingPrepare {
            hold,
            vms: vec![vm.clone()],
            ports: vec![arriving],
            source_host: "source".to_owned(),
            ticket,
        }))?;
        self.near.call(&Request::HoldOpen(HoldOpen {
            hold,
            vms: vec![vm],
            target_address: self.address.to_string(),
            target_host: "target".to_owned(),
            ticket,
        }))?;
        self.target.process().pause()?;
        Ok(hold)
    }

    pub(crate) fn freeze(&mut self, hold: HoldId) -> Result<()> {
        let scope = Scope::All;
        match self.near.call(&Request::Freeze { hold, scope })? {
            Reply::Frozen { .. } => Ok(()),
            other => Err(anyhow!("{other:?} to a freeze")),
        }
    }

    fn put_back(&mut self, hold: HoldId) -> Result<HoldInfo> {
        self.near.hold(&Request::HoldAbort { hold })
    }

    /// Until everything is put back on both hosts; the target runs again.
    fn end(&mut self, hold: HoldId) -> Result<HoldInfo> {
        let near = &mut self.near;
        let info = until("end of the hold", LONGEST, || {
            let info = near.hold(&Request::HoldStatus { hold })?;
            Ok((info.state == HoldState::Aborted).then_some(info))
        })?;
        self.target.process().go_on()?;
        self.far.call(&Request::HoldAbort { hold })?;
        Ok(info)
    }
}

/// Where nobody listens at the moment.
fn free_address() -> Result<SocketAddr> {
    let any = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
    Ok(UdpSocket::bind(any)?.local_addr()?)
}

/// Measures freeze and flush.
pub fn measure(plan: &Plan, results: &mut Results) -> Result<()> {
    results.tsc_hz = tsc_hz();
    for &segments in &plan.segments {
        let sections = |dir: &Path| match plan.ledger {
            true => segments.spool(dir),
            false => segments.spool(dir) + "[ledger]\nkeep_days = 0\n",
        };
        let sections = [Some(&sections as Sections<'_>), None];
        let mut hosts = Hosts::start(&plan.common, &plan.spool, sections, 2)?;
        for &frame in &plan.frames {
            let streams = hosts.source.connect()?;
            let guest = guest::start(plan.ring, streams, frame, plan.habits, Pattern::One)?;
            let mut guest =
                guest.map_err(|_| anyhow!("the switch does not offer {:?} rings", plan.ring))?;
            for round in 0..plan.pairs * ROUNDS_PER_PAIR {
                let of_cell = results.holds.iter();
                let of_cell = of_cell.filter(|w| (w.segments, w.frame) == (segments, frame));
                let so_far: Vec<_> = of_cell.map(|w| (w.round, w.on)).collect();
                if rig::enough(&so_far, plan.pairs) {
                    break;
                }
                let window = freeze_and_flush(
                    plan,
                    &mut hosts,
                    guest.as_mut(),
                    (segments, frame, round),
                    results.tsc_hz,
                )?;
                eprintln!(
                    "{frame:4} B, segments {}: forward {:.2}, freeze {:.2}, flush {:.2} Mpps, {} frames, put back in {:.0} ms, {:?}",
                    name(segments),
                    window.forward_mpps,
                    window.freeze_mpps,
                    window.flush_mpps,
                    window.held,
                    window.put_back_ms,
                    window.on
                );
                results.holds.push(window);
            }
            guest.stop()?;
        }
    }
    Ok(())
}

/// Runs the guest in stretches until nothing moves any more.
pub(crate) fn run_on(
    guest: &mut dyn Drive,
    tsc_hz: f64,
    what: &str,
    moved: impl Fn(&Seen) -> u64,
) -> Result<Vec<Seen>> {
    let since = Instant::now();
    let mut all = Vec::new();
    loop {
        let seen = stretch(guest, STRETCH, tsc_hz);
        let still = moved(&seen) == 0;
        all.push(seen);
        if still {
            return Ok(all);
        }
        ensure!(!sys::is_interrupted(), "interrupted");
        ensure!(
            since.elapsed() < LONGEST,
            "no end of the {what} after {LONGEST:?}"
        );
    }
}

pub(crate) fn stretch(guest: &mut dyn Drive, time: Duration, tsc_hz: f64) -> Seen {
    let cycles = (time.as_secs_f64() * tsc_hz) as u64;
    guest.run(cycles, (tsc_hz / SLICES_HZ) as u64)
}

fn freeze_and_flush(
    plan: &Plan,
    hosts: &mut Hosts,
    guest: &mut dyn Drive,
    (segments, frame, round): (Segments, usize, usize),
    tsc_hz: f64,
) -> Result<Window> {
    let common = &plan.common;
    let hold = hosts.open(1)?;
    thread::sleep(KEEPER);
    hosts.source.process().pause()?;
    let before = rig::before(common)?;
    hosts.source.process().go_on()?;
    // Until what an earlier round has left under way is through.
    stretch(guest, common.skip, tsc_hz);
    guest.rest(true);
    run_on(guest, tsc_hz, "frames under way", |s| s.frames)?;
    guest.rest(false);

    let meter = Meter::start(common, &mut hosts.source, Task::current(), before)?;
    let mut all = vec![stretch(guest, STRETCH, tsc_hz)];
    let forward_mpps = all[0].frames as f64 / STRETCH.as_secs_f64() / 1e6;
    hosts.freeze(hold)?;
    let frozen = run_on(guest, tsc_hz, "freeze", |s| s.sent)?;
    guest.rest(true);
    let put_back = Instant::now();
    hosts.put_back(hold)?;
    let flushed = run_on(guest, tsc_hz, "flush", |s| s.frames)?;
    let closed = meter.stop()?;

    let info = hosts.end(hold)?;
    let put_back_ms = put_back.elapsed().as_secs_f64() * 1e3;
    let held: u64 = info.lanes.iter().map(|l| l.held.frames).sum();
    let slices = |runs: &[Seen], of: fn(&Seen) -> &Vec<u32>| -> Vec<u32> {
        runs.iter().flat_map(|s| of(s).iter().copied()).collect()
    };
    let freeze = rate(&slices(&frozen, |s| &s.sent_slices), segments.frames(frame));
    let flush = rate(&slices(&flushed, |s| &s.slices), 0.95 * held as f64);
    all.extend(frozen);
    all.extend(flushed);
    // What the switch took while the guest rested is not known as sent yet.
    guest.rest(false);
    all.push(stretch(guest, STRETCH, tsc_hz));
    guest.rest(true);
    all.extend(run_on(guest, tsc_hz, "frames under way", |s| s.frames)?);
    guest.rest(false);
    hosts.source.process().pause()?;
    let mut on = closed.conditions(common)?;
    hosts.source.process().go_on()?;
    hosts.source.process().check()?;
    if segments == Segments::Made {
        // The keeper has its share of the guest's CPU.
        on.spoiled = on.spoiled.filter(|why| *why != GUEST_SHARED);
    }
    let sum = |of: fn(&Seen) -> u64| all.iter().map(of).sum::<u64>();
    let (sent, arrived, wrong) = (sum(|s| s.sent), sum(|s| s.frames), sum(|s| s.wrong));
    let ring = u64::from(plan.habits.ring_size);
    ensure!(wrong == 0, "{wrong} of {arrived} frames arrived wrong");
    // What is known as sent is a ring's content behind or ahead of what was taken.
    ensure!(
        sent.abs_diff(arrived) <= ring,
        "{sent} frames were sent, {arrived} arrived"
    );
    ensure!(
        info.lanes.iter().all(|l| l.dropped == 0) && held > 0,
        "the hold has dropped frames, or held none: {info:?}"
    );
    Ok(Window {
        frame,
        segments,
        round,
        forward_mpps,
        freeze_mpps: freeze * SLICES_HZ / 1e6,
        flush_mpps: flush * SLICES_HZ / 1e6,
        held,
        put_back_ms,
        on,
    })
}

/// Frames per slice, from the first that moved until `want` have; of all of them, if there are fewer.
fn rate(slices: &[u32], want: f64) -> f64 {
    let mut sum = 0.0;
    let mut passed = 0.0;
    let (mut all, mut last) = (0.0, 1.0);
    for &n in slices.iter().skip_while(|n| **n == 0) {
        let n = f64::from(n);
        if sum + n >= want && n > 0.0 {
            return want / (passed + (want - sum) / n);
        }
        sum += n;
        passed += 1.0;
        if n > 0.0 {
            (all, last) = (sum, passed);
        }
    }
    all / last
}

/// Measures what gates cost.
pub fn measure_gates(plan: &Plan, results: &mut Results) -> Result<()> {
    results.tsc_hz = tsc_hz();
    // Ready segments are large, and many lanes need one each.
    let made = |dir: &Path| Segments::Made.spool(dir);
    let sections = [Some(&made as Sections<'_>), None];
    let mut hosts = Hosts::start(&plan.common, &plan.spool, sections, 4)?;
    for &frame in &plan.frames {
        let mut streams = hosts.source.connect()?;
        let others = streams.split_off(2);
        let start = |streams| {
            let guest = guest::start(plan.ring, streams, frame, plan.habits, Pattern::One)?;
            guest.map_err(|_| anyhow!("the switch does not offer {:?} rings", plan.ring))
        };
        let (mut guest, mut other) = (start(streams)?, start(others)?);
        // Nothing is flooded to ports that nobody empties: it would be held there, and never end.
        guest.announce();
        other.announce();
        for round in 0..plan.pairs * ROUNDS_PER_PAIR {
            let of_cell = results.gates.iter().filter(|w| w.frame == frame);
            let so_far: Vec<_> = of_cell.map(|w| (w.round, w.on)).collect();
            if rig::enough(&so_far, plan.pairs) {
                break;
            }
            for i in 0..GATES.len() {
                let gates = GATES[(round + i) % GATES.len()];
                let window = beside_gates(plan, &mut hosts, guest.as_mut(), gates, results.tsc_hz)?;
                let window = GateWindow {
                    frame,
                    round,
                    ..window
                };
                eprintln!("{window:?}");
                results.gates.push(window);
            }
        }
        guest.stop()?;
        other.stop()?;
    }
    Ok(())
}

fn beside_gates(
    plan: &Plan,
    hosts: &mut Hosts,
    guest: &mut dyn Drive,
    gates: Gates,
    tsc_hz: f64,
) -> Result<GateWindow> {
    let common = &plan.common;
    let hold = match gates {
        Gates::Off => None,
        Gates::Open => Some(hosts.open(1)?),
        Gates::Frozen => {
            let hold = hosts.open(3)?;
            hosts.freeze(hold)?;
            Some(hold)
        }
    };
    if hold.is_none() {
        hosts.target.process().pause()?;
    }
    thread::sleep(KEEPER);
    hosts.source.process().pause()?;
    let before = rig::before(common)?;
    hosts.source.process().go_on()?;
    stretch(guest, common.skip, tsc_hz);
    let meter = Meter::start(common, &mut hosts.source, Task::current(), before)?;
    let seen = stretch(guest, common.measure, tsc_hz);
    let closed = meter.stop()?;
    hosts.source.process().pause()?;
    let on = closed.conditions(common)?;
    hosts.source.process().go_on()?;
    hosts.source.process().check()?;
    match hold {
        Some(hold) => {
            hosts.put_back(hold)?;
            hosts.end(hold)?;
        }
        None => hosts.target.process().go_on()?,
    }
    ensure!(seen.wrong == 0, "{} frames arrived wrong", seen.wrong);
    Ok(GateWindow {
        frame: 0,
        gates,
        round: 0,
        mpps: seen.frames as f64 / (seen.cycles as f64 / tsc_hz) / 1e6,
        on,
    })
}

/// Freeze and flush: one line of the table.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Cell {
    /// Frame size without FCS.
    pub frame: usize,
    /// Where segments came from.
    pub segments: Segments,
    /// Of the two CPUs.
    pub state: State,
    /// Mpps before the freeze, and the worker's cycles per frame.
    pub forward: [Option<Figure>; 2],
    /// Into the spool.
    pub freeze: [Option<Figure>; 2],
    /// Out of it.
    pub flush: [Option<Figure>; 2],
    /// Rounds.
    pub rounds: usize,
}

/// What gates cost: one line of the table.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct GateCell {
    /// Frame size without FCS.
    pub frame: usize,
    /// Of the two CPUs.
    pub state: State,
    /// Mpps without a hold.
    pub mpps: Option<Figure>,
    /// Of these, with a hold open on the receiver, in the same round.
    pub open: Option<Figure>,
    /// With another VM's lanes frozen.
    pub frozen: Option<Figure>,
}

/// What is kept.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Cells {
    /// Freeze and flush.
    pub holds: Vec<Cell>,
    /// What gates cost.
    pub gates: Vec<GateCell>,
}

/// Sorts windows into cells.
pub fn cells(results: &Results) -> Cells {
    let mut out = Cells::default();
    let mut seen: Vec<(Segments, usize)> = Vec::new();
    for w in &results.holds {
        if !seen.contains(&(w.segments, w.frame)) {
            seen.push((w.segments, w.frame));
        }
    }
    for (segments, frame) in seen {
        for state in [State::Near, State::Far] {
            let good: Vec<&Window> = results
                .holds
                .iter()
                .filter(|w| (w.segments, w.frame) == (segments, frame))
                .filter(|w| w.on.state == state && w.on.spoiled.is_none())
                .collect();
            let figures = |of: fn(&Window) -> f64| {
                let cycles = |mpps: f64| results.tsc_hz / 1e6 / mpps;
                [
                    Figure::of(good.iter().map(|w| of(w))),
                    Figure::of(good.iter().map(|w| cycles(of(w)))),
                ]
            };
            if !good.is_empty() {
                out.holds.push(Cell {
                    frame,
                    segments,
                    state,
                    forward: figures(|w| w.forward_mpps),
                    freeze: figures(|w| w.freeze_mpps),
                    flush: figures(|w| w.flush_mpps),
                    rounds: good.len(),
                });
            }
        }
    }
    let mut frames: Vec<usize> = results.gates.iter().map(|w| w.frame).collect();
    frames.dedup();
    for frame in frames {
        for state in [State::Near, State::Far] {
            out.gates.extend(gate_cell(results, frame, state));
        }
    }
    out
}

fn gate_cell(results: &Results, frame: usize, state: State) -> Option<GateCell> {
    let of_cell = results.gates.iter().filter(|w| w.frame == frame);
    let good: Vec<&GateWindow> = of_cell
        .filter(|w| w.on.state == state && w.on.spoiled.is_none())
        .collect();
    let with = |gates| good.iter().filter(move |w| w.gates == gates);
    let ratio = |gates| {
        let pairs = with(gates).filter_map(|w| {
            let off = with(Gates::Off).find(|o| o.round == w.round)?;
            Some(w.mpps / off.mpps)
        });
        Figure::of(pairs.collect::<Vec<_>>())
    };
    (!good.is_empty()).then(|| GateCell {
        frame,
        state,
        mpps: Figure::of(with(Gates::Off).map(|w| w.mpps)),
        open: ratio(Gates::Open),
        frozen: ratio(Gates::Frozen),
    })
}

/// The tables.
pub fn markdown(cells: &Cells) -> String {
    let rows = cells.holds.iter().map(|c| {
        let of = |[mpps, cycles]: [Option<Figure>; 2]| both(mpps, cycles);
        [
            c.frame.to_string(),
            name(c.segments),
            name(c.state),
            of(c.forward),
            of(c.freeze),
            of(c.flush),
            c.rounds.to_string(),
        ]
    });
    let holds = table(
        [
            "frame", "segments", "state", "forward", "freeze", "flush", "rounds",
        ],
        rows,
    );
    let rows = cells.gates.iter().map(|c| {
        [
            c.frame.to_string(),
            name(c.state),
            one(c.mpps, 1),
            one(c.open, 3),
            one(c.frozen, 3),
        ]
    });
    let gates = table(
        [
            "frame",
            "state",
            "no hold",
            "hold open: of that",
            "another VM's lanes frozen: of that",
        ],
        rows,
    );
    format!(
        "Mpps: median [least to most] (cycles of the worker per frame). Segments: ready, or made by the keeper meanwhile.\n\n\
         {holds}\nA lane that forwards.\n\n{gates}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn on(spoiled: Option<&'static str>) -> Conditions {
        Conditions {
            spoiled,
            ..crate::report::tests::sample("gangway", crate::peer::Rule::Normal, 0, 1.0).on
        }
    }

    #[test]
    fn a_rate_is_of_the_time_in_which_frames_moved() {
        assert_eq!(
            rate(&[0, 0, 10, 10, 10], 25.0),
            10.0,
            "half a slice counts half"
        );
        assert_eq!(
            rate(&[0, 10, 0, 10, 0, 0], 20.0),
            20.0 / 3.0,
            "a pause counts"
        );
        assert_eq!(rate(&[0, 10, 10, 0, 0], 100.0), 10.0, "the end does not");
        assert_eq!(rate(&[0, 0], 10.0), 0.0);
    }

    #[test]
    fn windows_become_cells_without_the_spoiled() {
        let window = |freeze_mpps, spoiled| Window {
            frame: 64,
            segments: Segments::Ready,
            round: 0,
            forward_mpps: 20.0,
            freeze_mpps,
            flush_mpps: 26.0,
            held: 1,
            put_back_ms: 1.0,
            on: on(spoiled),
        };
        let gate = |gates, round, mpps| GateWindow {
            frame: 64,
            gates,
            round,
            mpps,
            on: on(None),
        };
        let results = Results {
            holds: vec![window(10.0, None), window(90.0, Some("noise"))],
            gates: vec![
                gate(Gates::Off, 0, 20.0),
                gate(Gates::Open, 0, 19.0),
                gate(Gates::Frozen, 1, 10.0),
            ],
            tsc_hz: 2.6e9,
        };
        let cells = cells(&results);
        assert_eq!(cells.holds.len(), 1);
        assert_eq!(cells.holds[0].freeze[0].unwrap().max, 10.0);
        assert_eq!(cells.holds[0].flush[1].unwrap().median, 100.0);
        assert_eq!(cells.gates[0].open.unwrap().median, 0.95);
        assert_eq!(cells.gates[0].frozen, None, "of another round");
        let json = serde_json::to_string(&cells).unwrap();
        let back: Cells = serde_json::from_str(&json).unwrap();
        assert!(markdown(&back).contains("| 64 | ready | near | 20.0"));
    }
}
