//! The source's end of a hold.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use gangway_shared::api::{
    HoldOpen, HoldState, LaneInfo, Refusal, RefusalCode, Role, Scope, Tally,
};
use gangway_shared::id::{HoldId, LaneKey, MacAddr};
use gangway_shared::ledger::{LaneKind, Stage as At};
use gangway_shared::record::HoldRecord;

use super::Host;
use super::book::book;
use super::dead::Dead;
use super::record::RecordFile;
use super::{READ_BACK, refuse};
use crate::datapath::backlog::SPOOLED_MAX;
use crate::datapath::engine::{Mode, Pin};
use crate::datapath::lane::{Behind, Drain, Gate, Progress, Source as Older, Stage};
use crate::datapath::stats::Drop as Dropped;
use crate::datapath::worker::{Command, Seat, now_ns};
use crate::ledger::{Book, counted};
use crate::port::tap::Whole;
use crate::port::{FRAME_MAX, Frame};
use crate::ship::{Lanes, Outgoing};
use crate::spool::{Kind, Origin, Queue, Writer, sync_all};

/// How long a TAP's queue may take to run empty after the cut.
const TAP_EMPTY: Duration = Duration::from_millis(50);

pub(super) struct Lane {
    pub(super) key: LaneKey,
    pub(super) seat: Seat,
    pub(super) to: usize,
    pub(super) inside: bool,
    pub(super) queue: Arc<Queue>,
    /// Until the lane is held; of a TAP's queue: until it is read back.
    pub(super) writer: Option<Writer>,
    /// Inside: where frames wait behind a sealed queue that is put back.
    pub(super) spare: Option<(Writer, Arc<Queue>)>,
    /// Likewise, of an earlier run that had all but delivered it: sealed.
    pub(super) spent: Option<Arc<Queue>>,
    pub(super) ship: u32,
    pub(super) held: bool,
    pub(super) closed: bool,
    pub(super) flushed: Option<Arc<Progress>>,
    /// Set when it forwards again.
    pub(super) back: Option<Arc<Progress>>,
    /// The spare one, once it is used.
    pub(super) behind: Option<Arc<Queue>>,
    /// Of a TAP's queue: what was read back and is not in the spool yet, and how many were sent once more so far.
    pub(super) pending: VecDeque<Whole>,
    pub(super) again: u64,
}

/// Source's end.
pub struct SourceHold {
    pub(super) id: HoldId,
    pub(super) group: Vec<usize>,
    pub(super) macs: Vec<Option<MacAddr>>,
    /// Which of them were seen running since the hold was opened.
    pub(super) ran: Vec<bool>,
    /// Of which of them frames still wait for the VM on our behalf.
    pub(super) armed: Vec<bool>,
    pub(super) lanes: Vec<Lane>,
    /// One for each VM on a TAP.
    pub(super) read_back: Vec<Lane>,
    pub(super) outgoing: Arc<Outgoing>,
    /// Until the end: the lanes that were cut are all there are.
    pub(super) pin: Option<Pin>,
    /// Frames of backlogs that could not be held, and what an earlier run had counted.
    pub(super) lost: u64,
    /// What sockets had dropped when the hold was opened, or taken up, by port.
    pub(super) overruns: Vec<u64>,
    pub(super) dead: Dead,
}

impl SourceHold {
    /// Reserves everything that freeze, seal and abort will need, connects, and writes it down; nothing is held yet.
    pub fn open(
        host: &Host,
        args: &HoldOpen,
        group: Vec<usize>,
    ) -> Result<(SourceHold, RecordFile), Refusal> {
        let ports = &host.engine.shared().ports;
        if !host.spool.queues(args.hold).is_empty() {
            let what = format!(
                "frames of hold {} are in the spool from an earlier run",
                args.hold
            );
            return Err(refuse(RefusalCode::Busy, what));
        }
        let dialled = group
            .iter()
            .try_for_each(|&g| host.adopt_tap(g, args.hold))
            .and_then(|()| host.dial(args));
        let outgoing = dialled.inspect_err(|_| {
            group.iter().for_each(|&g| host.tap_let_go(g, args.hold));
        })?;
        let mut hold = SourceHold {
            dead: Dead::default(),
            id: args.hold,
            macs: group.iter().map(|&g| host.mac_of(g)).collect(),
            ran: vec![false; group.len()],
            armed: Vec::new(),
            lanes: Vec::new(),
            read_back: Vec::new(),
            outgoing,
            pin: Some(host.engine.pin()),
            group,
            lost: 0,
            overruns: ports.iter().map(|p| p.counters.overruns()).collect(),
        };
        let written = hold
            .reserve(host)
            .and_then(|()| host.write_down(&hold.record(host, args), HoldState::Open));
        match written {
            Ok(file) => {
                hold.arm(host);
                // Who runs now is missed if it is not there at the first look.
                hold.stopped(host);
                Ok((hold, file))
            }
            Err(e) => {
                hold.outgoing.abort();
                hold.forget(host);
                let group = hold.group.iter();
                group.for_each(|&g| host.tap_let_go(g, args.hold));
                Err(e)
            }
        }
    }

    fn record(&self, host: &Host, args: &HoldOpen) -> HoldRecord {
        let place = |pin: &Pin| host.places(&self.group, &self.macs, pin);
        let (ports, seats) = self.pin.as_ref().map(place).unwrap_or_default();
        HoldRecord {
            hold: self.id,
            role: Role::Source,
            vms: args.vms.clone(),
            peer: args.target_host.clone(),
            address: args.target_address.clone(),
            ticket: args.ticket,
            ports,
            seats,
            queues: (self.lanes.len() + self.read_back.len()) as u32,
        }
    }

    /// A learned address stays believed to be here until the network says otherwise; what comes for a VM that stops waits.
    pub(super) fn arm(&mut self, host: &Host) {
        let shared = host.engine.shared();
        self.armed = vec![true; self.group.len()];
        for (&g, mac) in self.group.iter().zip(&self.macs) {
            if let Some(mac) = mac {
                shared.fdb.set(*mac, g, true, shared.now_s());
            }
            shared.ports[g].arm();
            host.tap_remembers(g);
        }
    }

    /// For tests: the connection ends as if the process had died.
    #[cfg(test)]
    pub fn vanish(&self) {
        self.outgoing.close();
    }

    /// It is not to be after all.
    pub fn cancel(&mut self, host: &Host) {
        self.outgoing.abort();
        self.live(host);
        self.disarm(host, true);
        self.forget(host);
    }

    fn reserve(&mut self, host: &Host) -> Result<(), Refusal> {
        let ports = &host.engine.shared().ports;
        let seats = |port| self.pin.as_ref().map_or_else(Vec::new, |p| p.seats(port));
        let seats: Vec<Vec<Seat>> = (0..ports.len()).map(seats).collect();
        for to in self.group.clone() {
            for from in (0..ports.len()).filter(|&f| f != to) {
                let inside = self.group.contains(&from);
                for (n, &seat) in seats[from].iter().enumerate() {
                    let mut l = self.lane(host, &ports[from].name, n, seat, to, inside)?;
                    if inside {
                        l.spare = Some(self.queue(host, Kind::Local, &l.key)?);
                    }
                    self.lanes.push(l);
                }
            }
            if let (true, Some(&seat)) = (host.taps.contains_key(&to), seats[to].first()) {
                let l = self.lane(host, READ_BACK, 0, seat, to, true)?;
                self.read_back.push(l);
            }
        }
        for l in self.lanes.iter_mut().chain(&mut self.read_back) {
            l.ship = self
                .outgoing
                .add_lane(l.key.clone(), l.inside, l.queue.clone());
        }
        self.outgoing.all_added();
        // The first sync writes the files' metadata: better now than in the freeze. The spare ones' too: what was never on the disk
        // comes back from a loss of power as zeros.
        let lanes = self.lanes.iter().chain(&self.read_back);
        let spares = self.lanes.iter().filter_map(|l| l.spare.as_ref());
        let queues = lanes.map(|l| &l.queue).chain(spares.map(|(_, q)| q));
        let queues: Vec<_> = queues.cloned().collect();
        sync_all(&queues).map_err(|e| refuse(RefusalCode::Resources, format!("the spool: {e}")))
    }

    pub(super) fn queue(
        &self,
        host: &Host,
        kind: Kind,
        key: &LaneKey,
    ) -> Result<(Writer, Arc<Queue>), Refusal> {
        let made = host.spool.create(self.id, kind, key);
        made.map_err(|e| refuse(RefusalCode::Resources, format!("no spool for {key}: {e}")))
    }

    fn lane(
        &self,
        host: &Host,
        name: &str,
        n: usize,
        seat: Seat,
        to: usize,
        inside: bool,
    ) -> Result<Lane, Refusal> {
        let key = LaneKey {
            from: name.into(),
            queue: n as u16,
            to: host.engine.shared().ports[to].name.clone(),
        };
        let (writer, queue) = self.queue(host, Kind::Source, &key)?;
        let reserved = host.spool.reserve(&queue, SPOOLED_MAX);
        reserved.map_err(|e| refuse(RefusalCode::Resources, format!("no spool for {key}: {e}")))?;
        queue.set_inside(inside);
        Ok(Lane {
            key,
            seat,
            to,
            inside,
            queue,
            writer: Some(writer),
            spare: None,
            spent: None,
            ship: 0,
            held: false,
            closed: false,
            flushed: None,
            back: None,
            behind: None,
            pending: VecDeque::new(),
            again: 0,
        })
    }

    /// One of the VMs has run since the hold was opened, and does not any more, as far as earlier calls have seen it.
    pub fn stopped(&mut self, host: &Host) -> bool {
        let mut stopped = false;
        for (&g, ran) in self.group.iter().zip(&mut self.ran) {
            let runs = runs(host, g).unwrap_or(*ran);
            stopped |= *ran && !runs;
            *ran |= runs;
        }
        stopped
    }

    /// Every VM of the group runs here, so what goes back is taken; and none of their lanes is closed, so the target has not all that a
    /// restore wants.
    pub fn may_time_out(&self, host: &Host) -> bool {
        let mut lanes = self.lanes.iter().chain(&self.read_back);
        lanes.all(|l| !l.closed) && self.group.iter().all(|&g| runs(host, g) == Some(true))
    }

    /// A lane holds.
    pub fn is_holding(&self) -> bool {
        self.lanes.iter().chain(&self.read_back).any(|l| l.held)
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
                commands.push(Command::Hold(l.seat, l.to, writer));
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
        for (seat, to) in &out.refused {
            tracing::error!(
                "lane {} -> {} was not forwarding when it was to be held",
                ports[seat.port].name,
                ports[*to].name
            );
        }
        let drained =
            scope != Scope::All || host.taps_drain(&self.group, Instant::now() + TAP_EMPTY);
        self.sync(|l| l.held)?;
        Ok((at, drained))
    }

    /// Behind a freeze by a VM that has stopped: what its TAP still holds, before anybody resumes it.
    pub fn read_back_stopped(&mut self, host: &Host) -> Result<(), Refusal> {
        let until = Instant::now() + TAP_EMPTY;
        let id = self.id;
        self.read_back
            .iter_mut()
            .filter(|l| host.has_stopped(l.to))
            .try_for_each(|l| read_back(host, id, l, until))
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
            // Already, unless this switch was started behind the opening.
            host.adopt_tap(g, self.id)?;
            host.settle_rx(g, until)?;
            ports[g].marker.store(false, Ordering::Release);
        }
        for l in &mut self.read_back {
            read_back(host, self.id, l, until)?;
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
            commands.push(Command::Close(l.seat, l.to, gate()));
        }
        host.batch(commands).map(drop)
    }

    /// Stragglers from now on.
    pub fn depart(&self, host: &Host) {
        for &g in &self.group {
            host.engine.shared().ports[g].set_mode(Mode::Departing);
        }
    }

    /// Where frames for it go from here on.
    pub(super) fn is_elsewhere(&self, host: &Host, n: usize) {
        let shared = host.engine.shared();
        let up = shared.ports.iter().position(|p| p.uplink);
        if let (Some(mac), Some(up)) = (self.macs.get(n).copied().flatten(), up) {
            shared.fdb.set(mac, up, false, shared.now_s());
        }
    }

    /// Closes the lanes to every VM that the network has found at its new place (or all, when `give_up`). True when
    /// all are closed and acknowledged.
    pub fn departed(&mut self, host: &Host, give_up: bool) -> Result<bool, Refusal> {
        let shared = host.engine.shared();
        for (n, &g) in self.group.iter().enumerate() {
            let p = &shared.ports[g];
            if p.mode() == Mode::Departing && (give_up || p.marker.load(Ordering::Acquire)) {
                self.is_elsewhere(host, n);
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

    /// Everything goes back to where it was: lanes drain to the VMs here. Needs nothing that is not reserved.
    pub fn abort(&mut self, host: &Host) -> Result<(), Refusal> {
        self.outgoing.abort();
        let mut commands = Vec::new();
        for &to in &self.group {
            // What was read back from a TAP's queue is older than the rest: it drains on the port's lane to itself.
            let mut before = None;
            for l in self.read_back.iter_mut().filter(|l| l.to == to) {
                if let Some(mut w) = l.writer.take() {
                    // There is room: so much was reserved.
                    for (vnet, bytes) in l.pending.drain(..) {
                        let frame = Frame::from_slice(vnet, &bytes);
                        if w.append_accepted(now_ns(), &[frame], Origin::NONE) == 0 {
                            tracing::error!(hold = %self.id, "a frame of the TAP of port {} is lost: no room in the spool", l.key.to);
                        }
                    }
                    w.seal();
                }
                l.closed = true;
                if l.queue.tally().frames > 0 {
                    l.held = true;
                    let done = Arc::new(AtomicBool::new(false));
                    commands.push(l.put_back(None, Some(done.clone())));
                    before = Some(done);
                }
            }
            let held = self.lanes.iter_mut().filter(|l| l.to == to && l.held);
            commands.extend(held.map(|l| l.put_back(before.clone(), None)));
        }
        host.batch(commands).map(drop)
    }

    /// After an abort: true once everything is delivered; the ports are as before then.
    pub fn put_back_done(&self, host: &Host) -> bool {
        let mut all = self.lanes.iter().chain(&self.read_back).filter(|l| l.held);
        let done = all.all(|l| l.back.as_ref().is_none_or(|b| b.finished()));
        if done {
            self.live(host);
        }
        done
    }

    pub(super) fn live(&self, host: &Host) {
        for &g in &self.group {
            host.engine.shared().ports[g].set_mode(Mode::Live);
        }
    }

    /// While it puts back, and behind it: gives up what waits for VMs that have died.
    pub fn give_up_the_dead(&mut self, host: &Host) {
        let ports = &host.engine.shared().ports;
        for (&g, armed) in self.group.iter().zip(&mut self.armed) {
            let waits = *armed || ports[g].mode() == Mode::Held;
            if waits && self.dead.give_up(host, self.id, g) && std::mem::take(armed) {
                ports[g].disarm();
                host.tap_let_go(g, self.id);
            }
        }
    }

    /// After the end: what waits for a VM that is not up yet keeps waiting. True when all are up.
    pub fn disarm(&mut self, host: &Host, give_up: bool) -> bool {
        let ports = &host.engine.shared().ports;
        for (&g, armed) in self.group.iter().zip(&mut self.armed) {
            if *armed && (ports[g].is_up() || give_up) {
                ports[g].be_patient(host.engine.shared().now_s());
                ports[g].disarm();
                host.tap_let_go(g, self.id);
                *armed = false;
            }
        }
        !self.armed.contains(&true)
    }

    /// Waits for what the target has acknowledged to an earlier run of this switch: the account shall say it.
    pub fn hear_again(&self, timeout: Duration) {
        if !self.outgoing.wait_complete(Lanes::All, timeout) {
            tracing::warn!(hold = %self.id, "the target has not said again what it has");
        }
    }

    /// Frees everything; the ports are open for a new VM.
    pub fn release(&mut self, host: &Host) -> Result<(), Refusal> {
        self.outgoing.close();
        let ids: Vec<_> = self
            .lanes
            .iter()
            .filter(|l| l.closed)
            .map(|l| Command::Open(l.seat, l.to))
            .collect();
        host.batch(ids)?;
        self.live(host);
        self.disarm(host, true);
        self.forget(host);
        Ok(())
    }

    /// Gives back everything that was reserved: a writer that stays keeps its segment.
    pub fn forget(&mut self, host: &Host) {
        for l in self.lanes.iter_mut().chain(&mut self.read_back) {
            (l.writer, l.spare) = (None, None);
        }
        self.pin = None;
        host.free_spool(self.id);
    }

    /// Frames still wait for one of the VMs on its behalf.
    pub fn is_armed(&self) -> bool {
        self.armed.contains(&true)
    }

    /// Group's ports.
    pub fn group(&self) -> &[usize] {
        &self.group
    }

    /// Frames that could not be held, in earlier runs, too.
    pub fn lost(&self, host: &Host) -> u64 {
        self.lost + overruns(host, &self.overruns).iter().sum::<u64>()
    }

    /// For status and report. What a port's socket has dropped since the opening, for whomever, stands at its first lane; other losses at
    /// the first lane from outside.
    pub fn lanes(&self, host: &Host) -> Vec<LaneInfo> {
        let ships = self.outgoing.status();
        let mut overruns = overruns(host, &self.overruns);
        let outside = self.lanes.iter().find(|l| !l.inside);
        if let Some(l) = outside.or(self.lanes.first()) {
            overruns[l.seat.port] += self.lost;
        }
        let info = |l: &Lane| LaneInfo {
            lane: l.key.clone(),
            sealed: l.queue.is_sealed(),
            held: l.queue.tally(),
            shipped: ships
                .iter()
                .find(|s| s.lane == l.ship)
                .map_or(Tally::default(), |s| s.acked),
            flushed: l.flushed.as_ref().map_or(Tally::default(), |p| p.tally()),
            queued_behind: l.spare.as_ref().map_or(0, |(_, q)| q.tally().frames),
            dropped: std::mem::take(&mut overruns[l.seat.port]),
        };
        self.lanes.iter().chain(&self.read_back).map(info).collect()
    }

    /// For the ledger.
    pub fn books(&self, host: &Host) -> Vec<Book> {
        let ships = self.outgoing.status();
        let infos = self.lanes(host);
        let mut books = Vec::new();
        for (l, info) in self.lanes.iter().chain(&self.read_back).zip(infos) {
            let mut b = book(&l.key, LaneKind::Shipped, l.inside);
            b.note(At::Accept, counted(l.queue.progress()));
            b.again = Some((l.queue.clone(), At::Spool));
            b.lane.dropped = info.dropped;
            if let Some(s) = ships.iter().find(|s| s.lane == l.ship) {
                if let Some(sent) = s.sent {
                    b.note(At::Ship, counted(sent));
                }
                b.note(At::Acknowledge, counted((s.acked_seq, s.acked)));
            }
            if let Some(p) = &l.flushed {
                b.drained(p);
            }
            books.push(b);
            if let (Some(q), Some(p)) = (&l.behind, &l.back) {
                books.extend(behind(q, p));
            }
        }
        books
    }

    /// Trouble with the shipment.
    pub fn error(&self) -> Option<String> {
        self.outgoing.error()
    }
}

/// The VM behind this port runs; none if that is not known.
fn runs(host: &Host, port: usize) -> Option<bool> {
    let p = &host.engine.shared().ports[port];
    match (host.taps.contains_key(&port), &p.vm) {
        // A TAP stays up whatever its VM does.
        (true, Some(vm)) => Some(host.vms.status(vm)? == "running"),
        _ => Some(p.is_up()),
    }
}

/// What sockets have dropped since then, by port.
pub(super) fn overruns(host: &Host, then: &[u64]) -> Vec<u64> {
    let ports = host.engine.shared().ports.iter().zip(then);
    ports
        .map(|(p, then)| p.counters.overruns().saturating_sub(*then))
        .collect()
}

/// What waited behind older frames; none if nothing did.
pub(super) fn behind(queue: &Arc<Queue>, drained: &Progress) -> Option<Book> {
    let progress = queue.progress();
    if progress.1.frames == 0 {
        return None;
    }
    let mut b = book(queue.lane(), LaneKind::Behind, queue.inside());
    b.note(At::Accept, counted(progress));
    b.again = Some((queue.clone(), At::Spool));
    b.drained(drained);
    Some(b)
}

impl Lane {
    /// Held: drains its own queue and goes on filling it. Closed: drains what is sealed, then what comes meanwhile.
    fn put_back(
        &mut self,
        before: Option<Arc<AtomicBool>>,
        done: Option<Arc<AtomicBool>>,
    ) -> Command {
        let progress = Arc::new(Progress::default());
        self.flushed = Some(progress.clone());
        self.back = Some(progress.clone());
        if !self.closed {
            return Command::PutBack(self.seat, self.to, before, progress);
        }
        let mut older: VecDeque<Stage> = [Stage {
            sources: vec![Older::new(&self.queue, progress)],
            done,
            ..Stage::default()
        }]
        .into();
        let mut next = |queue: &Arc<Queue>| {
            let progress = Arc::new(Progress::default());
            self.back = Some(progress.clone());
            self.behind = Some(queue.clone());
            Older::new(queue, progress)
        };
        if let Some(queue) = self.spent.take() {
            older.push_back(Stage {
                sources: vec![next(&queue)],
                ..Stage::default()
            });
        }
        let behind = self.spare.take().map(|(writer, queue)| Behind {
            writer,
            local: next(&queue),
        });
        let drain = Drain {
            before,
            older,
            wait: None,
            behind,
            ended: Vec::new(),
        };
        Command::Drain(self.seat, self.to, Box::new(drain))
    }
}

/// Puts what was read back of a TAP into its queue. Nobody can keep it back any more, so no quota of frames stops it. False: there is no room,
/// for these or for the next one.
fn put_accepted(writer: &mut Writer, pending: &mut VecDeque<Whole>) -> bool {
    while let Some((vnet, bytes)) = pending.front() {
        let frame = Frame::from_slice(*vnet, bytes);
        if writer.append_accepted(now_ns(), &[frame], Origin::NONE) == 0 {
            return false;
        }
        writer.commit();
        pending.pop_front();
    }
    writer.has_bytes(FRAME_MAX as u32)
}

/// Takes what a stopped VM's TAP still holds, and before it what QEMU may have taken and not given to the guest; again after an
/// error: the rest.
fn read_back(host: &Host, hold: HoldId, l: &mut Lane, until: Instant) -> Result<(), Refusal> {
    let Some(writer) = &mut l.writer else {
        return Ok(());
    };
    loop {
        if !put_accepted(writer, &mut l.pending) {
            if Instant::now() > until {
                // It names the quota, if it is one.
                let why = host.spool.trouble(Some(hold));
                let what = format!(
                    "the spool has no room for the TAP queue of port {} (hold {hold}): {}; its frames stay where they are, repeat or abort",
                    l.key.to,
                    why.unwrap_or_else(|| "it gets none in time".into())
                );
                return Err(refuse(RefusalCode::Resources, what));
            }
            std::thread::sleep(Duration::from_millis(1));
            continue;
        }
        let Some(back) = host.tap_take_back(l.to)? else {
            break;
        };
        l.again += back.taken.len() as u64;
        l.pending.extend(back.taken.into_iter().chain(back.queued));
    }
    writer.seal();
    (l.writer, l.held, l.closed) = (None, true, true);
    let (frames, again) = (l.queue.tally().frames, l.again);
    if frames > 0 {
        tracing::info!(
            "port {}: {} frames read back from the TAP's queue; {again} that QEMU has taken go once more",
            l.key.to,
            frames - again.min(frames)
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::port::VnetHdr;
    use crate::spool::Spool;
    use crate::spool::tests::{config, lane, tmp};

    fn whole(n: usize, len: usize) -> VecDeque<Whole> {
        (0..n).map(|_| (VnetHdr::default(), vec![7; len])).collect()
    }

    #[test]
    fn what_a_tap_gives_back_is_taken_at_the_quota_of_frames_and_waits_at_that_of_bytes() {
        let dir = tmp();
        let mut cfg = config(dir.path(), 128 << 10, 4 * (128 << 10));
        cfg.limits.hold_frames = Some(10);
        let (spool, _) = Spool::open(&cfg).unwrap();
        let made = spool.create(HoldId(1), Kind::Source, &lane(0));
        let (mut w, q) = made.unwrap();
        let mut pending = whole(30, 60);
        assert!(put_accepted(&mut w, &mut pending));
        assert!(!w.has_room(60), "the quota of frames is used up");
        let mut more = whole(5, 60);
        assert!(put_accepted(&mut w, &mut more));
        assert_eq!((pending.len(), more.len(), q.last_seq()), (0, 0, 35));
        // More bytes than there may be: what has no room stays, in its order.
        let mut big = whole(1000, 1500);
        let until = Instant::now() + Duration::from_millis(500);
        while Instant::now() < until {
            assert!(!put_accepted(&mut w, &mut big));
        }
        assert!(!big.is_empty());
        assert_eq!(q.last_seq(), 35 + 1000 - big.len() as u64);
        let why = spool.trouble(Some(HoldId(1))).unwrap();
        assert!(why.contains("spool.quota_bytes"), "{why}");
    }
}
