//! The source's end of a hold.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use gangway_shared::api::{HoldOpen, LaneInfo, Refusal, RefusalCode, Scope, Tally};
use gangway_shared::id::{HoldId, LaneKey, MacAddr};

use super::manager::Host;
use super::{READ_BACK, refuse};
use crate::datapath::engine::Mode;
use crate::datapath::lane::{Drain, Gate, Progress, Source as Older};
use crate::datapath::stats::Drop as Dropped;
use crate::datapath::worker::{Command, QueueId, now_ns};
use crate::port::Frame;
use crate::ship::{Lanes, Outgoing};
use crate::spool::{Kind, Queue, Writer, sync_all};

/// How long a TAP's queue may take to run empty after the cut.
const TAP_EMPTY: Duration = Duration::from_millis(50);

struct Lane {
    key: LaneKey,
    id: QueueId,
    to: usize,
    inside: bool,
    queue: Arc<Queue>,
    /// Until the lane is held.
    writer: Option<Writer>,
    ship: u32,
    held: bool,
    closed: bool,
    flushed: Option<Arc<Progress>>,
    behind: Option<Arc<Queue>>,
}

/// Source's end.
pub struct SourceHold {
    id: HoldId,
    group: Vec<usize>,
    macs: Vec<Option<MacAddr>>,
    /// Which of them were up when the hold was opened.
    ran: Vec<bool>,
    lanes: Vec<Lane>,
    read_back: Vec<Lane>,
    outgoing: Arc<Outgoing>,
    /// Frames that could not be held.
    lost: u64,
}

impl SourceHold {
    /// Reserves and connects; nothing is held yet.
    pub fn open(host: &Host, args: &HoldOpen, group: Vec<usize>) -> Result<SourceHold, Refusal> {
        let ports = &host.engine.shared().ports;
        let now_s = host.engine.shared().now_s();
        if !host.spool.queues(args.hold).is_empty() {
            let what = format!(
                "frames of hold {} are in the spool from an earlier run",
                args.hold
            );
            return Err(refuse(RefusalCode::Busy, what));
        }
        let outgoing = host.dial(args)?;
        let mut hold = SourceHold {
            id: args.hold,
            macs: group.iter().map(|&g| host.mac_of(g)).collect(),
            ran: group.iter().map(|&g| ports[g].is_up()).collect(),
            lanes: Vec::new(),
            read_back: Vec::new(),
            outgoing,
            group,
            lost: 0,
        };
        for &to in &hold.group {
            for from in (0..ports.len()).filter(|&f| f != to) {
                let key = LaneKey {
                    from: ports[from].name.clone(),
                    queue: 0,
                    to: ports[to].name.clone(),
                };
                let inside = hold.group.contains(&from);
                match host.spool.create(hold.id, Kind::Source, &key) {
                    Ok((writer, queue)) => {
                        queue.set_inside(inside);
                        hold.lanes.push(Lane {
                            key,
                            id: QueueId {
                                port: from,
                                queue: 0,
                            },
                            to,
                            inside,
                            queue,
                            writer: Some(writer),
                            ship: 0,
                            held: false,
                            closed: false,
                            flushed: None,
                            behind: None,
                        });
                    }
                    Err(e) => {
                        hold.outgoing.abort();
                        host.free_spool(hold.id);
                        return Err(refuse(
                            RefusalCode::Resources,
                            format!("no spool for {key}: {e}"),
                        ));
                    }
                }
            }
        }
        for l in &mut hold.lanes {
            l.ship = hold
                .outgoing
                .add_lane(l.key.clone(), l.inside, l.queue.clone());
        }
        // The first sync writes the files' metadata: better now than in the freeze.
        if let Err(e) = hold.sync(|_| true) {
            hold.outgoing.abort();
            hold.forget(host);
            return Err(e);
        }
        // A learned address stays believed to be here until the network says otherwise.
        for (&g, mac) in hold.group.iter().zip(&hold.macs) {
            if let Some(mac) = mac {
                host.engine.shared().fdb.set(*mac, g, true, now_s);
            }
            host.engine.shared().ports[g].set_armed(true);
            host.adopt_tap(g);
        }
        Ok(hold)
    }

    /// One of the VMs that ran when the hold was opened has stopped.
    pub fn stopped(&self, host: &Host) -> bool {
        let ports = &host.engine.shared().ports;
        self.group
            .iter()
            .zip(&self.ran)
            .any(|(&g, &ran)| ran && !ports[g].is_up())
    }

    /// The cut. Returns its time and whether all TAP queues ran empty.
    pub fn freeze(&mut self, host: &Host, scope: Scope) -> Result<(u64, bool), Refusal> {
        let ports = &host.engine.shared().ports;
        let mut commands = Vec::new();
        for l in self
            .lanes
            .iter_mut()
            .filter(|l| !l.held && (l.inside || scope == Scope::All))
        {
            if let Some(writer) = l.writer.take() {
                commands.push((l.id, Command::Hold(l.id, l.to, writer)));
                l.held = true;
            }
        }
        if scope == Scope::All {
            self.group
                .iter()
                .for_each(|&g| ports[g].set_mode(Mode::Held));
        }
        let out = host.batch(commands)?;
        let at = now_ns();
        self.lost += out.lost;
        for (id, to) in &out.refused {
            tracing::error!(
                "lane {} -> {} was not forwarding when it was to be held",
                ports[id.port].name,
                ports[*to].name
            );
        }
        let mut drained = true;
        if scope == Scope::All {
            let until = Instant::now() + TAP_EMPTY;
            for &g in &self.group {
                drained &= host.tap_empty(g, until.saturating_duration_since(Instant::now()));
            }
        }
        self.sync(|l| l.held)?;
        Ok((at, drained))
    }

    fn sync(&self, which: impl Fn(&Lane) -> bool) -> Result<(), Refusal> {
        let lanes = self.lanes.iter().chain(&self.read_back);
        let queues: Vec<Arc<Queue>> = lanes
            .filter(|l| which(l))
            .map(|l| l.queue.clone())
            .collect();
        sync_all(&queues).map_err(|e| refuse(RefusalCode::Resources, format!("the spool: {e}")))
    }

    /// VMs are stopped: takes what their TAPs still hold, closes the lanes between them, waits for the target.
    pub fn seal(&mut self, host: &Host, timeout: Duration) -> Result<(), Refusal> {
        let until = Instant::now() + timeout;
        let ports = &host.engine.shared().ports;
        for &g in &self.group {
            host.settle_rx(g, until)?;
            ports[g].marker.store(false, Ordering::Release);
        }
        if self.read_back.is_empty() {
            for g in self.group.clone() {
                self.take_tap_queue(host, g)?;
            }
        }
        self.close(host, |l| l.inside, || Gate::Blocked)?;
        self.sync(|l| l.inside)?;
        if self.outgoing.wait_complete(
            Lanes::Inside,
            until.saturating_duration_since(Instant::now()),
        ) {
            return Ok(());
        }
        let why = self
            .outgoing
            .error()
            .unwrap_or_else(|| "it has not acknowledged everything in time".into());
        Err(refuse(
            RefusalCode::Peer,
            format!("the target's switch: {why}; the lanes stay held, repeat or abort"),
        ))
    }

    fn take_tap_queue(&mut self, host: &Host, port: usize) -> Result<(), Refusal> {
        let frames = host.tap_read_back(port);
        if frames.is_empty() {
            return Ok(());
        }
        let name = &host.engine.shared().ports[port].name;
        tracing::info!(
            "port {name}: {} frames read back from the TAP's queue",
            frames.len()
        );
        let key = LaneKey {
            from: READ_BACK.into(),
            queue: 0,
            to: name.clone(),
        };
        let broken = |e: &dyn std::fmt::Display| {
            refuse(RefusalCode::Resources, format!("no spool for {key}: {e}"))
        };
        let (mut writer, queue) = host
            .spool
            .create(self.id, Kind::Source, &key)
            .map_err(|e| broken(&e))?;
        queue.set_inside(true);
        for (vnet, bytes) in frames {
            let frame = Frame::from_slice(vnet, &bytes);
            let until = Instant::now() + Duration::from_secs(2);
            while !writer.has_room(frame.len) && Instant::now() < until {
                std::thread::sleep(Duration::from_millis(1));
            }
            if writer.append(now_ns(), frame.vnet, &frame).is_err() {
                self.lost += 1;
            }
        }
        writer.commit();
        writer.seal();
        let ship = self.outgoing.add_lane(key.clone(), true, queue.clone());
        self.read_back.push(Lane {
            key,
            id: QueueId { port, queue: 0 },
            to: port,
            inside: true,
            queue,
            writer: None,
            ship,
            held: true,
            closed: true,
            flushed: None,
            behind: None,
        });
        Ok(())
    }

    fn close(
        &mut self,
        host: &Host,
        which: impl Fn(&Lane) -> bool,
        gate: impl Fn() -> Gate,
    ) -> Result<(), Refusal> {
        let mut commands = Vec::new();
        for l in self.lanes.iter_mut().filter(|l| !l.closed && which(l)) {
            l.closed = true;
            if let Some(mut w) = l.writer.take() {
                w.seal();
            }
            commands.push((l.id, Command::Close(l.id, l.to, gate())));
        }
        host.batch(commands).map(drop)
    }

    /// Stragglers from now on.
    pub fn depart(&self, host: &Host) {
        for &g in &self.group {
            host.engine.shared().ports[g].set_mode(Mode::Departing);
        }
    }

    /// Closes the lanes to every VM that the network has found at its new place (or all, when `give_up`). True when
    /// all are closed and acknowledged.
    pub fn departed(&mut self, host: &Host, give_up: bool) -> Result<bool, Refusal> {
        let shared = host.engine.shared();
        for (n, &g) in self.group.iter().enumerate() {
            let p = &shared.ports[g];
            if p.mode() == Mode::Departing && (give_up || p.marker.load(Ordering::Acquire)) {
                if let (Some(mac), Some(up)) =
                    (self.macs[n], shared.ports.iter().position(|p| p.uplink))
                {
                    shared.fdb.set(mac, up, false, shared.now_s());
                }
                p.set_mode(Mode::Departed);
            }
        }
        let gone: Vec<usize> = self
            .group
            .iter()
            .copied()
            .filter(|&g| shared.ports[g].mode() == Mode::Departed)
            .collect();
        if self.lanes.iter().any(|l| !l.closed && gone.contains(&l.to)) {
            self.close(
                host,
                |l| gone.contains(&l.to),
                || Gate::Closed(Dropped::Late),
            )?;
            self.sync(|l| l.held)?;
        }
        Ok(gone.len() == self.group.len()
            && self.outgoing.wait_complete(Lanes::All, Duration::ZERO))
    }

    /// Everything goes back to where it was: lanes drain to the VMs here.
    pub fn abort(&mut self, host: &Host) -> Result<(), Refusal> {
        self.outgoing.abort();
        let mut commands = Vec::new();
        for i in 0..self.group.len() {
            let to = self.group[i];
            // What was read back from a TAP's queue is older than the rest: it drains on the port's lane to itself.
            let before = match self.read_back.iter_mut().find(|l| l.to == to) {
                Some(rb) => {
                    let done = Arc::new(AtomicBool::new(false));
                    commands.push(Self::put_back(host, self.id, rb, None, Some(done.clone()))?);
                    Some(done)
                }
                None => None,
            };
            for l in self.lanes.iter_mut().filter(|l| l.to == to && l.held) {
                commands.push(Self::put_back(host, self.id, l, before.clone(), None)?);
            }
        }
        host.batch(commands).map(drop)
    }

    fn put_back(
        host: &Host,
        id: HoldId,
        l: &mut Lane,
        before: Option<Arc<AtomicBool>>,
        done: Option<Arc<AtomicBool>>,
    ) -> Result<(QueueId, Command), Refusal> {
        let (writer, behind) = host.spool.create(id, Kind::Local, &l.key).map_err(|e| {
            refuse(
                RefusalCode::Resources,
                format!("no spool to drain {}: {e}", l.key),
            )
        })?;
        let progress = Arc::new(Progress::default());
        let local = Older {
            reader: behind.reader(),
            progress: Arc::new(Progress::default()),
        };
        let older = Older {
            reader: l.queue.reader(),
            progress: progress.clone(),
        };
        l.flushed = Some(progress);
        l.behind = Some(behind);
        let drain = Drain {
            before,
            older: [older].into(),
            done,
            wait: None,
            writer,
            local,
        };
        Ok((l.id, Command::Drain(l.id, l.to, Box::new(drain))))
    }

    /// After an abort: true once everything is delivered; the ports are as before then.
    pub fn put_back_done(&self, host: &Host) -> bool {
        let all = self.lanes.iter().chain(&self.read_back).filter(|l| l.held);
        // The queue behind is sealed by its worker when the lane forwards again.
        let done = all
            .clone()
            .all(|l| l.behind.as_ref().is_none_or(|q| q.is_sealed()));
        if done {
            self.live(host);
        }
        done
    }

    fn live(&self, host: &Host) {
        for &g in &self.group {
            host.engine.shared().ports[g].set_mode(Mode::Live);
        }
    }

    /// After the end: what waits for a VM that is not up yet keeps waiting. True when all are up.
    pub fn disarm(&self, host: &Host, give_up: bool) -> bool {
        let ports = &host.engine.shared().ports;
        let mut all = true;
        for &g in &self.group {
            let up = ports[g].is_up() || give_up;
            all &= up;
            if up {
                ports[g].set_armed(false);
            }
        }
        all
    }

    /// Frees everything; the ports are open for a new VM.
    pub fn release(&mut self, host: &Host) -> Result<(), Refusal> {
        self.outgoing.close();
        let ids: Vec<_> = self
            .lanes
            .iter()
            .filter(|l| l.closed)
            .map(|l| (l.id, Command::Open(l.id, l.to)))
            .collect();
        host.batch(ids)?;
        self.live(host);
        self.disarm(host, true);
        host.free_spool(self.id);
        Ok(())
    }

    /// After an abort.
    pub fn forget(&mut self, host: &Host) {
        self.lanes.iter_mut().for_each(|l| l.writer = None);
        host.free_spool(self.id);
    }

    /// Group's ports.
    pub fn group(&self) -> &[usize] {
        &self.group
    }

    /// For status and report.
    pub fn lanes(&self) -> Vec<LaneInfo> {
        let ships = self.outgoing.status();
        let info = |l: &Lane| LaneInfo {
            lane: l.key.clone(),
            sealed: l.queue.is_sealed(),
            held: l.queue.tally(),
            shipped: ships
                .iter()
                .find(|s| s.lane == l.ship)
                .map_or(Tally::default(), |s| s.acked),
            flushed: l.flushed.as_ref().map_or(Tally::default(), |p| p.tally()),
            queued_behind: l.behind.as_ref().map_or(0, |q| q.tally().frames),
            dropped: 0,
        };
        let mut all: Vec<LaneInfo> = self.lanes.iter().chain(&self.read_back).map(info).collect();
        if let Some(first) = all.first_mut() {
            first.dropped = self.lost;
        }
        all
    }

    /// Trouble with the shipment.
    pub fn error(&self) -> Option<String> {
        self.outgoing.error()
    }
}
