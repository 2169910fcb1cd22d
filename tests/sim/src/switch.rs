//! A switch: the shell around the product's table of a hold's states, as ADR-0001 wants it. It writes a hold's record
//! before it answers, and takes its holds up again when it starts.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use gangway_shared::api::{HoldState, RefusalCode, Role, Scope, Tally};
use gangway_shared::id::HoldId;
use gangway_switch::hold::machine::{
    Event as Move, Found, Persist, Verdict, holds, step, taken_up,
};
use gangway_switch::spool::Kind;

use crate::Bug;
use crate::disk::{Cursor, EXT, Lane, Numbered, QueueId, Record};
use crate::seen::Seen;
use crate::shipment::{Incoming, Outgoing};
use crate::world::{
    A, B, BURST, Call, Event, Host, MS, Proc, Reply, Request, S, Vm, Work, World, name,
};

/// How long an opening, a seal and a restore wait for the other host.
const WAIT: u64 = 3 * S;
/// How long the source waits for the network to find a VM at its new place.
const GRACE: u64 = 2 * S;

/// A lane of a hold.
#[derive(Debug, Clone, Default)]
pub struct HeldLane {
    /// Between two VMs of the group.
    pub inside: bool,
    /// Source: into the queue.
    pub held: bool,
    /// It forwards again (source: put back; target: drained).
    pub open: bool,
    older: Cursor,
    own: Cursor,
}

/// A request that waits.
#[derive(Debug, Clone)]
pub struct Pending {
    call: Call,
    until: u64,
}

/// A hold in memory.
#[derive(Debug, Clone)]
pub struct Hold {
    /// Its record, as it is on the disk.
    pub record: Record,
    /// Its lanes.
    pub lanes: BTreeMap<Lane, HeldLane>,
    /// Not yet connected: the source's opening waits.
    pub opening: bool,
    /// Source's shipment.
    pub out: Outgoing,
    /// Target's.
    pub incoming: Incoming,
    /// VMs that have run since.
    ran: BTreeSet<u8>,
    marked: BTreeSet<u8>,
    departed: BTreeSet<u8>,
    give_up_at: u64,
    asked: u64,
}

impl Hold {
    fn new(record: Record, lanes: BTreeMap<Lane, HeldLane>, now: u64) -> Hold {
        Hold {
            record,
            lanes,
            opening: false,
            out: Outgoing::default(),
            incoming: Incoming::default(),
            ran: BTreeSet::new(),
            marked: BTreeSet::new(),
            departed: BTreeSet::new(),
            give_up_at: 0,
            asked: now,
        }
    }

    /// Nothing is to be done for it any more.
    pub fn is_over(&self) -> bool {
        matches!(self.record.state, HoldState::Released | HoldState::Aborted)
    }

    /// For people.
    pub fn summary(&self) -> String {
        format!("{:?} {:?}", self.record.role, self.record.state)
    }
}

/// What a lane does with a frame.
enum Gate {
    Forward,
    Queue(QueueId),
    Wait,
    Late,
    /// No such VM here.
    Nowhere,
}

impl World {
    /// All lanes towards the group.
    fn lanes(&self) -> BTreeMap<Lane, HeldLane> {
        let vms = self.vms.len() as u8;
        let mut lanes = BTreeMap::new();
        for to in 0..vms {
            for from in (0..vms).filter(|f| *f != to) {
                for q in 0..self.queues {
                    let lane = HeldLane {
                        inside: true,
                        ..HeldLane::default()
                    };
                    lanes.insert((from, q, to), lane);
                }
            }
            lanes.insert((EXT, 0, to), HeldLane::default());
        }
        lanes
    }

    /// The hold of this host that is not over.
    fn active(&self, h: Host) -> Option<HoldId> {
        let mut holds = self.nodes[h].holds.iter();
        holds.find(|(_, x)| !x.is_over()).map(|(id, _)| *id)
    }

    fn hold(&mut self, h: Host, id: HoldId) -> Option<&mut Hold> {
        self.nodes[h].holds.get_mut(&id)
    }

    /// The product's table, or what a bug makes of it.
    fn verdict(&self, role: Role, state: HoldState, event: Move) -> Verdict {
        match (role, state, event) {
            (Role::Target, HoldState::Draining | HoldState::Live, Move::Abort)
                if self.has(Bug::AbortAfterCommit) =>
            {
                Verdict::Go(HoldState::Aborted, Persist::Then)
            }
            (Role::Source, HoldState::Frozen | HoldState::Sealed, Move::Abort)
                if self.has(Bug::AbortForgetsFrames) =>
            {
                Verdict::Go(HoldState::Aborted, Persist::Then)
            }
            (Role::Target, HoldState::Restored, Move::Commit) if self.has(Bug::LiveAtOnce) => {
                Verdict::Go(HoldState::Live, Persist::First)
            }
            (Role::Source, HoldState::Sealed, Move::Depart) if self.has(Bug::NeverDeparts) => {
                Verdict::Go(HoldState::Departed, Persist::First)
            }
            (_, _, Move::Commit) if self.has(Bug::Panics) => {
                panic!("a bug that was put in panics")
            }
            (Role::Source, HoldState::Sealed, Move::TimedOut) if self.has(Bug::TimeOutSealed) => {
                Verdict::Go(HoldState::Aborting, Persist::First)
            }
            _ => step(role, state, event),
        }
    }

    /// Writes the record down, then the hold is in this state.
    fn become_(&mut self, h: Host, id: HoldId, state: HoldState) -> Work {
        let skip = self.has(Bug::SkipPersist);
        let Some(x) = self.hold(h, id) else {
            return Ok(());
        };
        x.record.state = state;
        let (record, over) = (x.record.clone(), x.is_over());
        self.say(|| format!("{}: {:?} {state:?}", name(h), record.role));
        if over {
            self.nodes[h].disk.remove_hold(id);
        } else if !skip {
            self.nodes[h].disk.persist(id, record);
        }
        self.mortal(h)
    }

    // --- frames -----------------------------------------------------------------------------------------------------

    fn gate(&self, h: Host, lane: Lane) -> Gate {
        let runs = self.vms[usize::from(lane.2)].procs[h] == Proc::Running;
        let absent = self.vms[usize::from(lane.2)].procs[h] == Proc::Absent;
        let Some(id) = self.active(h) else {
            return match (runs, absent) {
                (true, _) => Gate::Forward,
                (false, true) => Gate::Nowhere,
                // It is expected back.
                (false, false) => Gate::Wait,
            };
        };
        let x = &self.nodes[h].holds[&id];
        let Some(l) = x.lanes.get(&lane) else {
            return Gate::Nowhere;
        };
        let sealed = |kind| {
            self.nodes[h]
                .disk
                .queues
                .get(&(id, kind, lane))
                .is_some_and(|q| q.is_sealed())
        };
        let forward = if runs { Gate::Forward } else { Gate::Wait };
        match (x.record.role, x.record.state) {
            (Role::Source, HoldState::Aborting) => match l.held && !l.open {
                true if sealed(Kind::Source) => Gate::Wait,
                true => Gate::Queue((id, Kind::Source, lane)),
                false => forward,
            },
            (Role::Source, _) if sealed(Kind::Source) => match l.inside {
                true => Gate::Wait,
                false => Gate::Late,
            },
            (Role::Source, _) if l.held => Gate::Queue((id, Kind::Source, lane)),
            (Role::Source, _) => forward,
            (Role::Target, HoldState::Draining) if !l.open && !self.has(Bug::OpenBeforeDrained) => {
                Gate::Queue((id, Kind::Local, lane))
            }
            (Role::Target, HoldState::Draining | HoldState::Live) => forward,
            (Role::Target, _) => Gate::Nowhere,
        }
    }

    /// True if the receiver has taken it.
    fn deliver(&mut self, h: Host, frame: Numbered) -> bool {
        let vm = &self.vms[usize::from(frame.lane.2)];
        // The product gives up what waits for one that has died.
        if vm.died && vm.procs == [Proc::Absent; 2] {
            return true;
        }
        if vm.procs[h] != Proc::Running || vm.deaf_until > self.now {
            return false;
        }
        self.check.deliver(frame, name(h), h == A);
        true
    }

    /// Takes frames of one lane, in order; how many were accepted.
    fn take(&mut self, h: Host, frames: &[Numbered]) -> usize {
        let Some(first) = frames.first() else {
            return 0;
        };
        if *first == Numbered::mark(first.lane.2) {
            self.on_marker(h, first.lane.2);
            return frames.len();
        }
        let taken = match self.gate(h, first.lane) {
            Gate::Forward => frames.iter().take_while(|f| self.deliver(h, **f)).count(),
            Gate::Queue(id) => {
                let n = self.nodes[h].disk.append(id, frames);
                self.check.held += n as u64;
                if self.has(Bug::DropWhenFull) {
                    frames.len()
                } else {
                    n
                }
            }
            Gate::Wait => 0,
            Gate::Late => {
                if !self.check.gave_up {
                    let what = format!("{first:?} came behind the mark on {}", name(h));
                    self.check.violated("complete", what);
                }
                frames.len()
            }
            Gate::Nowhere => frames.len(),
        };
        if !matches!(self.gate(h, first.lane), Gate::Nowhere | Gate::Late) {
            frames[..taken].iter().for_each(|f| self.check.accept(*f));
        }
        taken
    }

    /// As many of a burst as are accepted: those of one lane together, and nothing behind one that has to wait.
    fn take_burst(&mut self, h: Host, burst: &[Numbered]) -> usize {
        let mut done = 0;
        for run in burst.chunk_by(|a, b| a.lane == b.lane) {
            let n = self.take(h, run);
            done += n;
            if n < run.len() {
                break;
            }
        }
        done
    }

    /// The switch looks around once.
    pub fn tick(&mut self, h: Host) -> Work {
        for vm in &mut self.vms {
            // What it had queued has gone with its memory.
            if vm.died && vm.procs == [Proc::Absent; 2] {
                let gone = vm.rings.iter_mut().flat_map(|r| r.drain(..));
                self.check.withdrawn.extend(gone);
            }
        }
        for v in 0..self.vms.len() {
            for q in 0..usize::from(self.queues) {
                if self.vms[v].procs[h] != Proc::Running {
                    continue;
                }
                let burst: Vec<Numbered> =
                    self.vms[v].rings[q].iter().take(BURST).copied().collect();
                if burst.is_empty() {
                    continue;
                }
                if self.has(Bug::GiveBackFirst)
                    && matches!(self.gate(h, burst[0].lane), Gate::Queue(_))
                {
                    self.vms[v].rings[q].drain(..burst.len());
                    self.mortal(h)?;
                    let n = self.take_burst(h, &burst);
                    for f in burst[n..].iter().rev() {
                        self.vms[v].rings[q].push_front(*f);
                    }
                    continue;
                }
                let n = self.take_burst(h, &burst);
                if n > 0 {
                    // Taken, and not yet given back.
                    self.mortal(h)?;
                }
                self.vms[v].rings[q].drain(..n);
            }
        }
        let burst: Vec<Numbered> = self.nodes[h].socket.iter().take(BURST).copied().collect();
        let n = self.take_burst(h, &burst);
        self.nodes[h].socket.drain(..n);
        for id in self.nodes[h].holds.keys().copied().collect::<Vec<_>>() {
            match self.nodes[h]
                .holds
                .get(&id)
                .map(|x| (x.record.role, x.record.state))
            {
                Some((Role::Source, HoldState::Open | HoldState::FrozenInside)) => {
                    self.watch_open(h, id)?
                }
                Some((Role::Source, HoldState::Aborting)) => self.put_back(h, id)?,
                Some((Role::Source, HoldState::Departing)) => self.departing(h, id)?,
                Some((Role::Target, HoldState::Draining)) => self.draining(h, id)?,
                _ => {}
            }
            self.time_out(h, id)?;
            self.ship_tick(h, id)?;
        }
        for p in std::mem::take(&mut self.nodes[h].pending) {
            self.wait(h, p)?;
        }
        Ok(())
    }

    /// Delivers a burst of a queue; true when all of it is delivered.
    fn drain(&mut self, h: Host, id: QueueId, mut cursor: Cursor) -> Work<(bool, Cursor)> {
        let early = self.has(Bug::FlushedEarly);
        let Some(q) = self.nodes[h].disk.queues.get_mut(&id) else {
            return Ok((true, cursor));
        };
        let records = q.unflushed(&mut cursor, BURST);
        if early && let Some((last, _)) = records.last() {
            q.flushed = *last;
            self.mortal(h)?;
        }
        let mut flushed = None;
        for (seq, frame) in &records {
            if !self.deliver(h, *frame) {
                break;
            }
            flushed = Some(*seq);
        }
        if flushed.is_some() {
            // Delivered, and not yet noted.
            self.mortal(h)?;
        }
        let Some(q) = self.nodes[h].disk.queues.get_mut(&id) else {
            return Ok((true, cursor));
        };
        if early {
            q.flushed = flushed.unwrap_or(q.flushed - records.len() as u64);
        } else if let Some(seq) = flushed {
            q.flushed = seq;
        }
        Ok((q.flushed == q.last_seq(), cursor))
    }

    /// As the product's: a VM that stops before the freeze has what comes for it held from then on.
    fn watch_open(&mut self, h: Host, id: HoldId) -> Work {
        let runs = |v: &Vm| v.procs[h] == Proc::Running;
        let running: BTreeSet<u8> = (0..)
            .zip(&self.vms)
            .filter(|(_, v)| runs(v))
            .map(|(n, _)| n)
            .collect();
        let Some(x) = self.hold(h, id).filter(|x| !x.opening) else {
            return Ok(());
        };
        let stopped = !x.ran.is_subset(&running);
        x.ran.extend(running);
        if stopped {
            x.lanes.values_mut().for_each(|l| l.held = true);
            self.check.seen.count(Seen::FrozenByItself);
            self.become_(h, id, HoldState::Frozen)?;
        }
        Ok(())
    }

    fn put_back(&mut self, h: Host, id: HoldId) -> Work {
        let Some(x) = self.hold(h, id) else {
            return Ok(());
        };
        let lanes: Vec<Lane> = x
            .lanes
            .iter()
            .filter(|(_, l)| l.held && !l.open)
            .map(|(k, _)| *k)
            .collect();
        for lane in &lanes {
            let cursor = self.nodes[h].holds[&id].lanes[lane].own;
            let (done, cursor) = self.drain(h, (id, Kind::Source, *lane), cursor)?;
            if let Some(l) = self.hold(h, id).and_then(|x| x.lanes.get_mut(lane)) {
                l.own = cursor;
                l.open = done;
            }
        }
        let all = |x: &Hold| x.lanes.values().all(|l| !l.held || l.open);
        if self.nodes[h].holds.get(&id).is_some_and(all)
            && let Verdict::Go(next, _) =
                self.verdict(Role::Source, HoldState::Aborting, Move::Drained)
        {
            self.become_(h, id, next)?;
            self.nodes[h].disk.remove_hold(id);
        }
        Ok(())
    }

    fn departing(&mut self, h: Host, id: HoldId) -> Work {
        let now = self.now;
        let hasty = self.has(Bug::DepartAtOnce);
        let Some(x) = self.hold(h, id) else {
            return Ok(());
        };
        let give_up = now > x.give_up_at;
        let vms: BTreeSet<u8> = x.lanes.keys().map(|l| l.2).collect();
        let gone: Vec<u8> = vms
            .iter()
            .copied()
            .filter(|v| !x.departed.contains(v) && (give_up || hasty || x.marked.contains(v)))
            .collect();
        x.departed.extend(&gone);
        let closing: Vec<Lane> = x
            .lanes
            .keys()
            .copied()
            .filter(|l| gone.contains(&l.2))
            .collect();
        if give_up && closing.iter().any(|l| l.0 == EXT) {
            self.check.gave_up = true;
        }
        for lane in closing {
            self.nodes[h].disk.seal((id, Kind::Source, lane));
            self.nodes[h].disk.sync((id, Kind::Source, lane));
        }
        let Some(x) = self.nodes[h].holds.get(&id) else {
            return Ok(());
        };
        if x.departed.len() == vms.len()
            && x.out.complete(x.lanes.keys())
            && let Verdict::Go(next, _) =
                self.verdict(Role::Source, HoldState::Departing, Move::Acknowledged)
        {
            self.become_(h, id, next)?;
        }
        Ok(())
    }

    fn draining(&mut self, h: Host, id: HoldId) -> Work {
        for to in 0..self.vms.len() as u8 {
            if self.vms[usize::from(to)].procs[h] != Proc::Running {
                continue;
            }
            let Some(x) = self.hold(h, id) else {
                return Ok(());
            };
            let lanes: Vec<Lane> = x
                .lanes
                .iter()
                .filter(|(k, l)| k.2 == to && !l.open)
                .map(|(k, _)| *k)
                .collect();
            for lane in lanes {
                let l = self.nodes[h].holds[&id].lanes[&lane].clone();
                let shipped = (id, Kind::Incoming, lane);
                let forgotten =
                    self.has(Bug::ForgetLane) && lane.0 == u8::from(to == 0) && lane.1 == 0;
                let mut older = (true, l.older);
                if !forgotten {
                    older = self.drain(h, shipped, l.older)?;
                    // Nothing follows only behind the seal.
                    older.0 &= self.nodes[h]
                        .disk
                        .queues
                        .get(&shipped)
                        .is_some_and(|q| q.is_sealed());
                }
                let mut own = (false, l.own);
                if older.0 {
                    own = self.drain(h, (id, Kind::Local, lane), l.own)?;
                }
                if let Some(l) = self.hold(h, id).and_then(|x| x.lanes.get_mut(&lane)) {
                    (l.older, l.own, l.open) = (older.1, own.1, own.0);
                }
            }
        }
        let all = |x: &Hold| x.lanes.values().all(|l| l.open);
        if self.nodes[h].holds.get(&id).is_some_and(all)
            && let Verdict::Go(next, _) =
                self.verdict(Role::Target, HoldState::Draining, Move::Drained)
        {
            self.become_(h, id, next)?;
        }
        Ok(())
    }

    /// The announcement has come to the old host: nothing older is on its way.
    fn on_marker(&mut self, h: Host, v: u8) {
        if let Some(id) = self.active(h)
            && let Some(x) = self.hold(h, id)
            && matches!(x.record.state, HoldState::Sealed | HoldState::Departing)
        {
            x.marked.insert(v);
        }
    }

    // --- requests ---------------------------------------------------------------------------------------------------

    /// A request of the coordinator.
    pub fn on_call(&mut self, h: Host, call: Call) -> Work {
        let id = call.hold;
        self.say(|| format!("{} hears {:?}", name(h), call.request));
        let now = self.now;
        if let Some(x) = self.hold(h, id) {
            x.asked = now;
        }
        match call.request {
            Request::Show => self.reply(h, &call, Reply::Ok),
            Request::Prepare => return self.prepare(h, call),
            Request::Open => return self.open(h, call),
            Request::Status => {
                let answer = self.status(h, id);
                self.reply(h, &call, answer);
            }
            Request::Freeze(scope) => return self.freeze(h, call, scope),
            Request::Seal => return self.seal(h, call),
            Request::Restore => {
                return self.advance(h, call, Move::Restore, |w, _| {
                    let until = w.now + WAIT;
                    w.nodes[h].pending.push(Pending { call, until });
                    Ok(None)
                });
            }
            Request::Commit => {
                return self.advance(h, call, Move::Commit, |w, _| {
                    if w.nodes[h].holds[&id].incoming.aborted {
                        return Ok(Some(Reply::Refused(RefusalCode::State)));
                    }
                    w.check.cut.clear();
                    Ok(Some(Reply::Ok))
                });
            }
            Request::Announce => {
                return self.advance(h, call, Move::Announce, |w, _| {
                    for v in 0..w.vms.len() as u8 {
                        for again in [0, 20, 80, 200, 500, 1000] {
                            if w.rng.permille(700) {
                                w.after(again * MS + 300, Event::Announced(v, h));
                            }
                        }
                    }
                    Ok(Some(Reply::Ok))
                });
            }
            Request::Depart => {
                return self.advance(h, call, Move::Depart, |w, x| {
                    let until = w.now + GRACE;
                    if let Some(x) = w.hold(h, x) {
                        x.give_up_at = until;
                    }
                    Ok(Some(Reply::Ok))
                });
            }
            Request::Release => {
                return self.advance(h, call, Move::Release, |w, id| {
                    w.ship_end(h, id, false);
                    Ok(Some(Reply::Ok))
                });
            }
            Request::Abort => return self.abort(h, call),
            _ => self.vm_call(h, call),
        }
        Ok(())
    }

    fn status(&self, h: Host, id: HoldId) -> Reply {
        match self.nodes[h].holds.get(&id) {
            Some(x) if !x.opening => {
                let kind = match x.record.role {
                    Role::Source => Kind::Source,
                    Role::Target => Kind::Incoming,
                };
                let inside = x.lanes.iter().filter(|(_, l)| l.inside).map(|(k, _)| *k);
                let tally = |l: Lane| {
                    self.nodes[h]
                        .disk
                        .queues
                        .get(&(id, kind, l))
                        .map_or(Tally::default(), |q| q.tally())
                };
                Reply::Hold(x.record.state, inside.map(|l| (l, tally(l))).collect())
            }
            _ => Reply::Refused(RefusalCode::Unknown),
        }
    }

    /// As the product's: checks the transition, carries it out, notes the state, answers.
    fn advance(
        &mut self,
        h: Host,
        call: Call,
        event: Move,
        act: impl FnOnce(&mut World, HoldId) -> Work<Option<Reply>>,
    ) -> Work {
        let id = call.hold;
        let Some(x) = self.nodes[h].holds.get(&id).filter(|x| !x.opening) else {
            self.reply(h, &call, Reply::Refused(RefusalCode::Unknown));
            return Ok(());
        };
        match self.verdict(x.record.role, x.record.state, event) {
            Verdict::No => self.reply(h, &call, Reply::Refused(RefusalCode::State)),
            Verdict::Again => {
                let answer = self.status(h, id);
                self.reply(h, &call, answer);
            }
            Verdict::Go(next, persist) => {
                let before = self.nodes[h].holds[&id].record.state;
                if persist == Persist::First && !self.has(Bug::AnswerFirst) {
                    self.become_(h, id, next)?;
                }
                match act(self, id)? {
                    Some(refused @ Reply::Refused(_)) => {
                        if persist == Persist::First {
                            self.become_(h, id, before)?;
                        }
                        self.reply(h, &call, refused);
                    }
                    Some(answer) if self.has(Bug::AnswerFirst) => {
                        if let Some(x) = self.hold(h, id) {
                            x.record.state = next;
                        }
                        self.free_if_over(h, id);
                        self.reply(h, &call, answer);
                    }
                    Some(answer) => {
                        if persist == Persist::Then {
                            self.become_(h, id, next)?;
                        }
                        self.reply(h, &call, answer);
                    }
                    // It waits.
                    None => {}
                }
            }
        }
        Ok(())
    }

    fn free_if_over(&mut self, h: Host, id: HoldId) {
        if self.nodes[h].holds.get(&id).is_some_and(Hold::is_over) {
            self.nodes[h].disk.remove_hold(id);
        }
    }

    /// Answers what cannot be opened, or may not any more.
    fn again(&mut self, h: Host, call: &Call, role: Role) -> bool {
        let answer = match self.nodes[h].holds.get(&call.hold) {
            Some(x) if x.record.role == role && !x.is_over() && !x.opening => {
                self.status(h, call.hold)
            }
            Some(_) => Reply::Refused(RefusalCode::Busy),
            None if self.active(h).is_some() => Reply::Refused(RefusalCode::Busy),
            None => return false,
        };
        self.reply(h, call, answer);
        true
    }

    fn make_queues(&mut self, h: Host, id: HoldId, kind: Kind) -> bool {
        let lanes = self.lanes();
        let made = lanes.keys().all(|l| {
            let q = (id, kind, *l);
            self.nodes[h].disk.create(q).is_ok() && self.nodes[h].disk.sync(q)
        });
        if !made {
            self.nodes[h].disk.remove_hold(id);
        }
        made
    }

    fn prepare(&mut self, h: Host, call: Call) -> Work {
        if self.again(h, &call, Role::Target) {
            return Ok(());
        }
        if !self.make_queues(h, call.hold, Kind::Local) {
            self.reply(h, &call, Reply::Refused(RefusalCode::Resources));
            return Ok(());
        }
        let record = Record {
            role: Role::Target,
            state: HoldState::Prepared,
            named: 0,
            closed: Vec::new(),
        };
        let x = Hold::new(record, self.lanes(), self.now);
        self.nodes[h].holds.insert(call.hold, x);
        self.become_(h, call.hold, HoldState::Prepared)?;
        self.reply(h, &call, Reply::Ok);
        Ok(())
    }

    fn open(&mut self, h: Host, call: Call) -> Work {
        if self.again(h, &call, Role::Source) {
            return Ok(());
        }
        if !self.make_queues(h, call.hold, Kind::Source) {
            self.reply(h, &call, Reply::Refused(RefusalCode::Resources));
            return Ok(());
        }
        let record = Record {
            role: Role::Source,
            state: HoldState::Open,
            named: 0,
            closed: Vec::new(),
        };
        let mut x = Hold::new(record, self.lanes(), self.now);
        x.opening = true;
        self.nodes[h].holds.insert(call.hold, x);
        let until = self.now + WAIT;
        self.nodes[h].pending.push(Pending { call, until });
        Ok(())
    }

    fn freeze(&mut self, h: Host, call: Call, scope: Scope) -> Work {
        let hole = self.has(Bug::HoleInTheCut);
        self.advance(h, call, Move::Freeze(scope), |w, id| {
            let mut cut = Vec::new();
            let Some(x) = w.hold(h, id) else {
                return Ok(None);
            };
            for (lane, l) in &mut x.lanes {
                if l.inside || scope == Scope::All {
                    l.held = !(hole && *lane == (1, 0, 0));
                    cut.push(*lane);
                }
            }
            let synced = cut
                .iter()
                .all(|l| w.nodes[h].disk.sync((id, Kind::Source, *l)));
            Ok(Some(match synced {
                true => Reply::Ok,
                false => Reply::Refused(RefusalCode::Resources),
            }))
        })?;
        if let Some(x) = self.nodes[h].holds.get(&call.hold)
            && matches!(x.record.state, HoldState::Frozen | HoldState::FrozenInside)
        {
            let all = x.record.state == HoldState::Frozen;
            let cut = x.lanes.iter().filter(|(_, l)| l.inside || all);
            self.check.cut.extend(cut.map(|(k, _)| *k));
        }
        Ok(())
    }

    fn seal(&mut self, h: Host, call: Call) -> Work {
        let ready = self.vms.iter().all(|v| v.procs[h] != Proc::Running);
        self.advance(h, call, Move::Seal, |w, id| {
            if !ready {
                return Ok(Some(Reply::Refused(RefusalCode::State)));
            }
            let inside = w.nodes[h].holds[&id].lanes.iter().filter(|(_, l)| l.inside);
            let inside: Vec<Lane> = inside.map(|(k, _)| *k).collect();
            for l in inside {
                let q = (id, Kind::Source, l);
                w.nodes[h].disk.seal(q);
                if !w.nodes[h].disk.sync(q) {
                    return Ok(Some(Reply::Refused(RefusalCode::Resources)));
                }
            }
            let until = w.now + WAIT;
            w.nodes[h].pending.push(Pending { call, until });
            Ok(None)
        })
    }

    fn abort(&mut self, h: Host, call: Call) -> Work {
        let id = call.hold;
        let known = self.nodes[h].holds.get(&id).is_some_and(|x| !x.opening);
        if !known && !self.has(Bug::NoTombstone) {
            // An order to open it may still be on its way: it comes too late from now on.
            if let Some(mut x) = self.nodes[h].holds.remove(&id) {
                x.opening = false;
                self.nodes[h].holds.insert(id, x);
                self.ship_end(h, id, true);
                self.nodes[h].holds.remove(&id);
            }
            self.nodes[h].pending.retain(|p| p.call.hold != id);
            self.nodes[h].disk.remove_hold(id);
            let record = Record {
                role: Role::Source,
                state: HoldState::Aborted,
                named: 0,
                closed: Vec::new(),
            };
            // In memory is enough: what was on its way to this process dies with it.
            self.nodes[h]
                .holds
                .insert(id, Hold::new(record, BTreeMap::new(), self.now));
            self.reply(h, &call, Reply::Refused(RefusalCode::Unknown));
            return Ok(());
        }
        self.advance(h, call, Move::Abort, |w, id| {
            w.ship_end(h, id, true);
            w.check.cut.clear();
            Ok(Some(Reply::Ok))
        })
    }

    /// Nobody asks for it any more, as the product's: only where no seal was begun and all VMs run, and not while an order waits.
    fn time_out(&mut self, h: Host, id: HoldId) -> Work {
        let now = self.now;
        let overdue = self.overdue;
        let asked = |x: &&Hold| !x.opening && overdue.is_some_and(|q| now > x.asked + q);
        let Some(x) = self.nodes[h].holds.get(&id).filter(asked) else {
            return Ok(());
        };
        let (role, state) = (x.record.role, x.record.state);
        // As the product's shell: an open hold that holds, and a target that never was restored.
        let moot = match role {
            Role::Source => state == HoldState::Open && x.lanes.values().all(|l| !l.held),
            Role::Target => x.record.named > 0,
        };
        if moot {
            return Ok(());
        }
        let Verdict::Go(next, persist) = self.verdict(role, state, Move::TimedOut) else {
            return Ok(());
        };
        let mut queues = self.nodes[h].disk.queues.iter();
        let sealed = queues.any(|(q, x)| (q.0, q.1) == (id, Kind::Source) && x.is_sealed());
        let run = self.vms.iter().all(|v| v.procs[h] == Proc::Running);
        let wait = self.nodes[h].pending.iter().any(|p| p.call.hold == id);
        let safe = role == Role::Target || (run && !sealed) || state == HoldState::Sealed;
        if wait || !safe {
            return Ok(());
        }
        self.say(|| format!("{}: nobody asks for {id}", name(h)));
        if persist == Persist::First {
            self.become_(h, id, next)?;
        }
        self.ship_end(h, id, true);
        if role == Role::Source {
            self.check.cut.clear();
        }
        if persist == Persist::Then {
            self.become_(h, id, next)?;
        }
        Ok(())
    }

    /// Looks again at a request that waits.
    fn wait(&mut self, h: Host, p: Pending) -> Work {
        let id = p.call.hold;
        let late = self.now > p.until;
        let Some(x) = self.nodes[h].holds.get(&id) else {
            self.reply(h, &p.call, Reply::Refused(RefusalCode::Unknown));
            return Ok(());
        };
        let inside = || x.lanes.iter().filter(|(_, l)| l.inside).map(|(k, _)| k);
        let (done, event) = match p.call.request {
            Request::Open => (x.out.welcomed, None),
            Request::Seal => (x.out.complete(inside()), Some(Move::Seal)),
            _ => {
                let done = x.incoming.named && x.incoming.complete(inside());
                (done && !x.incoming.aborted, Some(Move::Restore))
            }
        };
        match (done, event) {
            (true, None) => {
                if let Some(x) = self.hold(h, id) {
                    x.opening = false;
                }
                self.become_(h, id, HoldState::Open)?;
                self.reply(h, &p.call, Reply::Ok);
            }
            (true, Some(event)) => {
                if let Verdict::Go(next, _) = self.verdict(x.record.role, x.record.state, event) {
                    if let Some(x) = self.hold(h, id) {
                        x.record.named = x.lanes.len();
                    }
                    self.become_(h, id, next)?;
                    let answer = self.status(h, id);
                    self.reply(h, &p.call, answer);
                } else {
                    self.reply(h, &p.call, Reply::Refused(RefusalCode::State));
                }
            }
            (false, None) if late => {
                self.nodes[h].holds.remove(&id);
                self.nodes[h].disk.remove_hold(id);
                self.reply(h, &p.call, Reply::Refused(RefusalCode::Peer));
            }
            (false, Some(_)) if late => self.reply(h, &p.call, Reply::Refused(RefusalCode::Peer)),
            (false, _) => self.nodes[h].pending.push(p),
        }
        Ok(())
    }

    /// What the switch passes on to a VM's process.
    fn vm_call(&mut self, h: Host, call: Call) {
        let (v, on) = match call.request {
            Request::VmCont(on, v) => (v, on),
            Request::VmStart(v) | Request::VmEnd(v) | Request::VmShow(v) => (v, B),
            Request::VmMigrate(v) | Request::VmStop(v) | Request::VmSwitchover(v) => (v, A),
            Request::VmCancel(v) | Request::VmQuit(v) => (v, A),
            _ => return,
        };
        let n = usize::from(v);
        // QEMU serves one client at a time: what an earlier one still had under way never arrives.
        let newest = &mut self.vms[n].session[on];
        if call.session < *newest {
            return;
        }
        *newest = call.session;
        let is_there = self.nodes[h]
            .holds
            .get(&call.hold)
            .is_some_and(|x| !x.is_over() && !x.opening);
        if matches!(call.request, Request::VmEnd(_)) && !self.has(Bug::NoTombstone) {
            self.vms[n].ended = true;
        }
        let procs = self.vms[n].procs;
        let connected = self.hosts_connected();
        let ended = self.vms[n].ended;
        let died = self.vms[n].died;
        let mut put = |to: Proc| {
            self.vms[n].procs[on] = to;
            Some(0)
        };
        let took = match (call.request, procs[on]) {
            (Request::VmStart(_), Proc::Absent) if is_there && !ended => put(Proc::Incoming),
            (Request::VmStart(_), Proc::Incoming) => Some(0),
            (Request::VmMigrate(_), Proc::Running | Proc::Paused) if procs[B] == Proc::Incoming => {
                Some(self.rng.range(50 * MS, 300 * MS))
            }
            (Request::VmStop(_), Proc::Running) => put(Proc::Paused),
            (Request::VmStop(_), Proc::Paused | Proc::Sent) => Some(0),
            (Request::VmSwitchover(_), Proc::Sent) if procs[B] == Proc::Arrived => Some(0),
            (Request::VmSwitchover(_), Proc::Paused) if connected && procs[B] == Proc::Incoming => {
                self.vms[n].procs = [Proc::Sent, Proc::Arrived];
                Some(self.rng.range(5 * MS, 40 * MS))
            }
            (Request::VmCont(..), Proc::Running) => Some(0),
            // Nothing of it is left to be put back.
            (Request::VmCont(A, _), Proc::Absent) if died => Some(0),
            (Request::VmCont(..), Proc::Arrived | Proc::Paused | Proc::Sent) => {
                self.run_vm(on, v);
                Some(0)
            }
            (Request::VmCancel(_), _) => Some(0),
            (Request::VmShow(_), p) => (p != Proc::Absent).then_some(0),
            (Request::VmEnd(_), _)
            | (Request::VmQuit(_), Proc::Paused | Proc::Sent | Proc::Absent) => put(Proc::Absent),
            _ => None,
        };
        match took {
            Some(delay) => self.reply_in(h, &call, delay, Reply::Ok),
            None => self.reply(h, &call, Reply::Refused(RefusalCode::State)),
        }
    }

    // --- a new life -------------------------------------------------------------------------------------------------

    /// The switch starts: it opens its spool and takes up the holds that it finds.
    pub fn start(&mut self, h: Host) {
        let forget = self.has(Bug::ForgetTail);
        if let Some(gone) = self.nodes[h].disk.reopen(forget) {
            self.check
                .violated("durable", format!("{}: {gone}", name(h)));
        }
        self.nodes[h].up = true;
        let life = self.nodes[h].life;
        self.say(|| format!("{}'s switch starts", name(h)));
        let known = self.nodes[h].disk.holds();
        let left: BTreeSet<HoldId> = self.nodes[h].disk.queues.keys().map(|q| q.0).collect();
        for id in left {
            let over = self.nodes[h]
                .disk
                .record(id)
                .is_none_or(|r| matches!(r.state, HoldState::Released | HoldState::Aborted));
            if over && !self.has(Bug::SkipPersist) {
                self.nodes[h].disk.remove_hold(id);
            }
        }
        for id in known {
            let Some(record) = self.nodes[h].disk.record(id).cloned() else {
                continue;
            };
            let x = self.take_hold_up(h, id, record);
            self.say(|| format!("{} takes up its hold: {}", name(h), x.summary()));
            self.nodes[h].holds.insert(id, x);
        }
        self.after(MS, Event::Tick(h, life));
    }

    fn take_hold_up(&mut self, h: Host, id: HoldId, record: Record) -> Hold {
        let mut x = Hold::new(record, self.lanes(), self.now);
        if x.is_over() {
            return x;
        }
        let (blind, drained) = (self.has(Bug::HoldsWhatWaits), self.has(Bug::TakenUpDrained));
        let disk = &mut self.nodes[h].disk;
        match x.record.role {
            Role::Source => {
                for (lane, l) in &mut x.lanes {
                    // Frames in its queue: it was held, whatever the record says.
                    let waits = |q: &crate::disk::Queue| q.last_seq() > q.flushed || q.is_sealed();
                    let q = disk.queues.get(&(id, Kind::Source, *lane));
                    l.held = match x.record.state {
                        HoldState::Aborting => q.is_some_and(waits),
                        _ if blind => q.is_some_and(waits),
                        state => holds(state, l.inside, q.is_some_and(waits)),
                    };
                }
                x.give_up_at = self.now + GRACE;
            }
            Role::Target => {
                let mut intact = true;
                for (lane, l) in &mut x.lanes {
                    // A queue that was never synced may be gone with the power; nothing was in it.
                    let _ = disk.create((id, Kind::Local, *lane));
                    if let Some(q) = disk.queues.get(&(id, Kind::Incoming, *lane)) {
                        x.incoming.adopt(*lane, q.tally());
                        intact &= !l.inside || (q.is_sealed() && !q.failed);
                    } else {
                        intact = false;
                    }
                }
                let found = Found { complete: intact };
                x.record.state = match x.record.state {
                    HoldState::Draining if drained => HoldState::Live,
                    state => taken_up(x.record.role, state, found),
                };
            }
        }
        x
    }
}

/// What is under way towards a lane whose name is not known yet.
pub type Stash = BTreeMap<u32, VecDeque<Vec<u8>>>;
