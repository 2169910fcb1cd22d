//! The coordinator: the product's migration machine, driven action by action, with its journal on a disk that can lose
//! what was not synced. What a step asks of whom is the product's table.

use std::collections::{BTreeMap, VecDeque};

use gangway::migration::act::End;
use gangway::migration::machine::{Action, Entry, Event as Move, Machine, Outcome};
pub use gangway::migration::orders::Task;
use gangway::migration::orders::{Order, phases};
use gangway::migration::steps::{FreezeMode, NO_RETURN, Step, Undo};
use gangway_shared::api::{HoldState, RefusalCode, Tally};
use gangway_shared::id::HoldId;

use crate::Bug;
use crate::disk::Lane;
use crate::seen::Seen;
use crate::world::{A, B, Call, Event, Host, MS, Reply, Request, S, World, name};

/// Of its own.
#[derive(Debug, Clone, Copy)]
pub enum CoordEvent {
    /// The operator starts the migration.
    Begin,
    /// The next action.
    Act,
    /// A request was not answered.
    Late(u64),
    /// A step or an undo asks again, after a while.
    Go(Task),
}

#[derive(Debug, Default)]
struct Run {
    phase: usize,
    waiting: BTreeMap<u64, (Host, Request)>,
    failed: Option<bool>,
    states: BTreeMap<Host, Option<HoldState>>,
    until: u64,
}

/// See the module.
pub struct Coordinator {
    /// The migration's number.
    pub id: HoldId,
    freeze: FreezeMode,
    up: bool,
    life: u64,
    begun: bool,
    session: u64,
    machine: Option<Machine>,
    actions: VecDeque<Action>,
    runs: BTreeMap<Task, Run>,
    calls: BTreeMap<u64, Task>,
    next_call: u64,
    written: Vec<u8>,
    synced: usize,
    outcome: Option<Outcome>,
    tallies: BTreeMap<Lane, Tally>,
    lives: u64,
}

impl Coordinator {
    /// Nothing is begun.
    pub fn new(id: HoldId, early: bool) -> Coordinator {
        Coordinator {
            id,
            freeze: if early {
                FreezeMode::Early
            } else {
                FreezeMode::Switchover
            },
            up: true,
            life: 0,
            begun: false,
            session: 1,
            machine: None,
            actions: VecDeque::new(),
            runs: BTreeMap::new(),
            calls: BTreeMap::new(),
            next_call: 1,
            written: Vec::new(),
            synced: 0,
            outcome: None,
            tallies: BTreeMap::new(),
            lives: 0,
        }
    }

    /// How it ended for good.
    pub fn outcome(&self) -> Option<Outcome> {
        self.outcome
    }

    /// Nobody has to take it up any more.
    pub fn is_over(&self) -> bool {
        self.outcome.is_some()
    }

    /// It has not yet stopped the source's VMs, or has let them go on.
    pub fn lets_run(&self) -> bool {
        let past = entries(&self.written);
        self.is_over()
            || !past.contains(&Entry::Begin(Step::Stop))
            || past.contains(&Entry::Undone(Undo::ResumeSources))
    }

    /// The last look at the target's VMs may be over.
    pub fn may_have_looked(&self) -> bool {
        entries(&self.written).contains(&Entry::Begin(NO_RETURN))
    }

    /// For people.
    pub fn summary(&self) -> String {
        format!(
            "up {}, running {:?}, ended {:?}, lives {}",
            self.up,
            self.runs.keys().collect::<Vec<_>>(),
            self.outcome,
            self.lives
        )
    }
}

/// Of the order, for this VM.
fn request(end: End, order: Order, v: u8) -> (Host, Request) {
    use Request as R;
    let h = match end {
        End::Source => A,
        End::Target => B,
    };
    let request = match order {
        Order::Show => R::Show,
        Order::Prepare => R::Prepare,
        Order::Open => R::Open,
        Order::Freeze(scope) => R::Freeze(scope),
        Order::Seal => R::Seal,
        Order::Restore => R::Restore,
        Order::Commit => R::Commit,
        Order::Announce => R::Announce,
        Order::Depart => R::Depart,
        Order::Status => R::Status,
        Order::Release => R::Release,
        Order::Abort => R::Abort,
        Order::VmStart => R::VmStart(v),
        Order::VmMigrate => R::VmMigrate(v),
        Order::VmStop => R::VmStop(v),
        Order::VmSwitchover => R::VmSwitchover(v),
        Order::VmShow => R::VmShow(v),
        Order::VmCont => R::VmCont(h, v),
        Order::VmCancel => R::VmCancel(v),
        Order::VmEnd => R::VmEnd(v),
        Order::VmQuit => R::VmQuit(v),
    };
    (h, request)
}

/// The journal's records; a torn last line counts for nothing.
fn entries(journal: &[u8]) -> Vec<Entry> {
    let lines = journal
        .split_inclusive(|b| *b == b'\n')
        .filter(|l| l.ends_with(b"\n"));
    lines
        .filter_map(|l| serde_json::from_slice(l).ok())
        .collect()
}

impl World {
    /// Of the coordinator's own events.
    pub fn on_coord(&mut self, life: u64, event: CoordEvent) {
        if !self.coord.up || self.coord.life != life {
            return;
        }
        match event {
            CoordEvent::Begin => {
                if !self.coord.begun {
                    self.coord.begun = true;
                    let mut m = Machine::new(self.coord.freeze);
                    let actions = m.on(Move::Start);
                    self.coord.machine = Some(m);
                    self.follow(actions);
                }
            }
            CoordEvent::Act => self.act(),
            CoordEvent::Late(call) => self.answered(call, None),
            CoordEvent::Go(task) => self.go(task),
        }
    }

    fn follow(&mut self, actions: Vec<Action>) {
        let idle = self.coord.actions.is_empty();
        self.coord.actions.extend(actions);
        if idle && !self.coord.actions.is_empty() {
            self.act_soon();
        }
    }

    fn act_soon(&mut self) {
        let (at, life) = (self.rng.range(20, 400), self.coord.life);
        self.after(at, Event::Coord(life, CoordEvent::Act));
    }

    fn tell(&mut self, event: Move) {
        let event = match event {
            Move::Failed { step, .. }
                if self.has(Bug::FailureIsSuccess) && step > Step::Prepare && step < NO_RETURN =>
            {
                Move::Done(step)
            }
            e => e,
        };
        self.say(|| format!("coordinator: {event:?}"));
        if let Some(m) = &mut self.coord.machine {
            let actions = m.on(event);
            self.follow(actions);
        }
    }

    /// One action; between two of them it can die.
    fn act(&mut self) {
        let Some(action) = self.coord.actions.pop_front() else {
            return;
        };
        match action {
            Action::Journal { entry, sync } => {
                self.say(|| format!("coordinator writes {entry:?}"));
                let skip = self.has(Bug::SkipJournal)
                    && matches!(entry, Entry::Begin(s) if s >= NO_RETURN);
                if !skip {
                    let mut line = serde_json::to_vec(&entry).unwrap_or_default();
                    line.push(b'\n');
                    self.coord.written.extend(line);
                    if sync && !self.has(Bug::JournalNotSynced) {
                        self.coord.synced = self.coord.written.len();
                    }
                }
            }
            Action::Run { step, attempt } => self.begin(Task::Step(step), attempt),
            Action::Halt(step) => {
                self.coord.runs.remove(&Task::Step(step));
                self.tell(Move::Halted(step));
            }
            Action::Undo { undo, .. }
                if undo == Undo::EndTargets && self.has(Bug::LeavesTargets) =>
            {
                self.tell(Move::Undone(undo));
            }
            Action::Undo { undo, attempt } => {
                if attempt > 0 || undo == Undo::CancelMemory {
                    self.coord.session += 1;
                }
                self.begin(Task::Undo(undo), attempt);
            }
            Action::TooLate => {}
            Action::End(outcome) => {
                self.say(|| format!("coordinator: the migration has ended: {outcome:?}"));
                self.coord.up = false;
                if matches!(outcome, Outcome::Unfinished | Outcome::RollbackIncomplete) {
                    self.after(2 * S, Event::TakeUp);
                } else {
                    self.coord.outcome = Some(outcome);
                }
            }
        }
        if !self.coord.actions.is_empty() {
            self.act_soon();
        }
    }

    fn begin(&mut self, task: Task, attempt: u32) {
        let delay = match attempt {
            0 => 0,
            n => (50 << n.min(6)).min(2000) * MS,
        };
        let until = self.now + delay + 30 * S;
        // Nobody takes a look again that is only before the first try.
        let again = attempt > 0 || self.coord.lives > 0;
        let phase = phases(task).iter().take_while(|p| again && p.once).count();
        let run = Run {
            phase,
            until,
            ..Run::default()
        };
        self.coord.runs.insert(task, run);
        let life = self.coord.life;
        self.after(delay, Event::Coord(life, CoordEvent::Go(task)));
    }

    /// What a task asks for in this phase; nothing: it is done.
    fn asks(&self, task: Task, phase: usize) -> Vec<(Host, Request)> {
        let vms = self.vms.len();
        let mut at = 0;
        for p in phases(task) {
            let turns = if p.in_turn { vms } else { 1 };
            if phase < at + turns {
                let turn = p.in_turn.then_some(phase - at);
                let of = |o: &Order| match (o.is_for_vms(), turn) {
                    (false, _) => 0..1,
                    (true, None) => 0..vms,
                    (true, Some(v)) => v..v + 1,
                };
                let asks = p.asks.iter();
                return asks
                    .flat_map(|(end, o)| of(o).map(|v| request(*end, *o, v as u8)))
                    .collect();
            }
            at += turns;
        }
        Vec::new()
    }

    fn go(&mut self, task: Task) {
        let Some(run) = self.coord.runs.get(&task) else {
            return;
        };
        let asks = self.asks(task, run.phase);
        if asks.is_empty() {
            return self.ended(task, None);
        }
        for (h, request) in asks {
            let id = self.coord.next_call;
            self.coord.next_call += 1;
            if let Some(r) = self.coord.runs.get_mut(&task) {
                r.waiting.insert(id, (h, request));
            }
            self.coord.calls.insert(id, task);
            let call = Call {
                id,
                life: self.coord.life,
                hold: self.coord.id,
                session: self.coord.session,
                request,
            };
            self.say(|| format!("coordinator asks {}: {request:?}", name(h)));
            self.call(h, call);
            let patience = match request {
                Request::Open | Request::Seal | Request::Restore => 5 * S,
                _ => 3 * S / 2,
            };
            let life = self.coord.life;
            self.after(patience, Event::Coord(life, CoordEvent::Late(id)));
        }
    }

    /// A reply arrives.
    pub fn on_reply(&mut self, life: u64, id: u64, reply: Reply) {
        if self.coord.up && self.coord.life == life {
            self.answered(id, Some(reply));
        }
    }

    fn answered(&mut self, id: u64, reply: Option<Reply>) {
        let Some(task) = self.coord.calls.remove(&id) else {
            return;
        };
        let waits = |r: &mut Run| r.waiting.remove(&id);
        let Some((h, request)) = self.coord.runs.get_mut(&task).and_then(waits) else {
            return;
        };
        let undoing = matches!(task, Task::Undo(_));
        // A lost answer says nothing; a refusal says that nothing was done.
        let failed = match (&reply, request) {
            // One that can't be looked at counts as dead: nothing was done yet.
            (None, Request::VmShow(_)) => Some(true),
            (None, _) => Some(false),
            (Some(Reply::Refused(RefusalCode::Unknown)), _) if undoing => None,
            // Released, and the switch was started again since.
            (Some(Reply::Refused(RefusalCode::Unknown)), Request::Release) => None,
            (Some(Reply::Refused(_)), _) => Some(true),
            (Some(Reply::Hold(_, b)), Request::Restore) => {
                (*b != self.coord.tallies).then_some(false)
            }
            _ => None,
        };
        if let (Some(Reply::Hold(_, a)), Request::Seal) = (&reply, request) {
            self.coord.tallies.clone_from(a);
        }
        let Some(run) = self.coord.runs.get_mut(&task) else {
            return;
        };
        let state = match reply {
            Some(Reply::Hold(s, _)) => Some(s),
            _ => None,
        };
        run.states.insert(h, state);
        run.failed = match (run.failed, failed) {
            (Some(a), Some(b)) => Some(a && b),
            (a, b) => a.or(b),
        };
        if run.waiting.is_empty() {
            self.phase_done(task);
        }
    }

    fn phase_done(&mut self, task: Task) {
        let now = self.now;
        let Some(run) = self.coord.runs.get_mut(&task) else {
            return;
        };
        if let Some(unchanged) = run.failed {
            return self.ended(task, Some(unchanged));
        }
        let is = |h: Host, wanted: &[HoldState]| {
            run.states
                .get(&h)
                .copied()
                .flatten()
                .is_none_or(|s| wanted.contains(&s))
        };
        use HoldState as H;
        let wait = match (task, run.phase) {
            (Task::Step(Step::Settle), 0) => {
                let known = run.states.values().all(Option::is_some);
                !known || !is(A, &[H::Departed, H::Released]) || !is(B, &[H::Live, H::Released])
            }
            (Task::Undo(Undo::ReturnFrames), 1) => {
                [A, B].iter().any(|h| !is(*h, &[H::Aborted, H::Released]))
            }
            _ => false,
        };
        if !wait {
            run.phase += 1;
        } else if now > run.until {
            return self.ended(task, Some(false));
        }
        let (delay, life) = (if wait { 20 * MS } else { 0 }, self.coord.life);
        self.after(delay, Event::Coord(life, CoordEvent::Go(task)));
    }

    fn ended(&mut self, task: Task, failed: Option<bool>) {
        self.coord.runs.remove(&task);
        if let (Task::Step(step), Some(_), true) = (task, failed, self.has(Bug::AbortAfterCommit))
            && step > NO_RETURN
        {
            let mut past = entries(&self.coord.written);
            past.push(Entry::Rollback);
            let (machine, actions) = Machine::replay(self.coord.freeze, &past);
            self.coord.machine = Some(machine);
            self.coord.runs.clear();
            return self.follow(actions);
        }
        self.tell(match (task, failed) {
            (Task::Step(step), None) => Move::Done(step),
            (Task::Step(step), Some(unchanged)) => Move::Failed { step, unchanged },
            (Task::Undo(undo), None) => Move::Undone(undo),
            (Task::Undo(undo), Some(_)) => Move::UndoFailed(undo),
        });
    }

    /// `gangway abort` while it runs.
    pub fn operator_aborts(&mut self) {
        if self.coord.up && self.coord.begun {
            self.check.seen.count(Seen::OperatorAbort);
            self.tell(Move::Abort);
        }
    }

    /// The process dies; with `power` the journal loses what was not synced.
    pub fn kill_coordinator(&mut self, power: bool) {
        if !self.coord.up || !self.coord.begun || self.coord.is_over() {
            return;
        }
        let back = self.rng.range(20 * MS, S);
        self.check.seen.count(match power {
            true => Seen::CoordinatorWithoutPower,
            false => Seen::CoordinatorKilled,
        });
        if power {
            let keep = self
                .rng
                .range(self.coord.synced as u64, self.coord.written.len() as u64)
                as usize;
            self.coord.written.truncate(keep);
        }
        let c = &mut self.coord;
        c.up = false;
        c.life += 1;
        c.machine = None;
        c.actions.clear();
        c.runs.clear();
        c.calls.clear();
        self.after(back, Event::TakeUp);
    }

    /// The operator has somebody go on with it, from the journal.
    pub fn take_up(&mut self) {
        if self.coord.up || self.coord.is_over() {
            return;
        }
        // What a crash has torn is cut off.
        let whole = self
            .coord
            .written
            .iter()
            .rposition(|b| *b == b'\n')
            .map_or(0, |n| n + 1);
        self.coord.written.truncate(whole);
        self.coord.synced = whole;
        let mut past = entries(&self.coord.written);
        if self.has(Bug::ForgetsNoReturn) {
            past.retain(|e| *e != Entry::Begin(NO_RETURN));
        }
        self.say(|| {
            format!(
                "coordinator starts, its journal ends with {:?}",
                past.last()
            )
        });
        let (machine, actions) = Machine::replay(self.coord.freeze, &past);
        let c = &mut self.coord;
        c.up = true;
        c.life += 1;
        c.lives += 1;
        c.session += 1;
        c.runs.clear();
        c.actions.clear();
        let outcome = machine.outcome();
        c.machine = Some(machine);
        if let Some(o) = outcome {
            c.outcome = Some(o);
        }
        self.follow(actions);
    }
}
