//! The coordinator and what it asks for. What a step asks of whom is the product's table.

use gangway::migration::act::End;
use gangway::migration::machine::{Action as Order, Entry, Event, Machine, Outcome};
use gangway::migration::orders::{Order as Ask, Task, phases};
use gangway::migration::steps::{NO_RETURN, Step, Undo};
use gangway_shared::api::{HoldState as H, Scope};

use crate::switch::Answer;
use crate::{
    A, B, Bug, Coordinator, Death, Happening, M, Move, P, Proc, Request as R, Run, Sent, State,
};

/// What a task asks for in this phase; nothing: it is done. No VM dies here, so none is looked at.
fn asks(task: Task, phase: u8) -> Vec<(usize, R)> {
    let all = phases(task).iter().flat_map(|p| {
        let asks = p.asks.iter().filter(|(_, o)| *o != Ask::VmShow);
        let of = |o: &Ask| {
            if o.is_for_vms() {
                [P, M].as_slice()
            } else {
                &[P]
            }
        };
        let asks: Vec<(usize, R)> = asks
            .flat_map(|(end, o)| of(o).iter().map(|v| request(*end, *o, *v)))
            .collect();
        match p.in_turn && !RELAXED.contains(&task) {
            true => asks.into_iter().map(|a| vec![a]).collect(),
            false => vec![asks],
        }
    });
    let mut all = all.filter(|asks| !asks.is_empty());
    all.nth(usize::from(phase)).unwrap_or_default()
}

/// Their turns are not told apart: more orders than the product's, in fewer states.
const RELAXED: [Task; 1] = [Task::Step(Step::Switchover)];

fn request(end: End, order: Ask, v: usize) -> (usize, R) {
    let host = match end {
        End::Source => A,
        End::Target => B,
    };
    let request = match order {
        Ask::Show | Ask::VmShow => R::Show,
        Ask::Prepare => R::Prepare,
        Ask::Open => R::Open,
        Ask::Freeze(Scope::Inside) => R::FreezeInside,
        Ask::Freeze(Scope::All) => R::FreezeAll,
        Ask::Seal => R::Seal,
        Ask::Restore => R::Restore,
        Ask::Commit => R::Commit,
        Ask::Announce => R::Announce,
        Ask::Depart => R::Depart,
        Ask::Status => R::Status,
        Ask::Release => R::Release,
        Ask::Abort => R::Abort,
        Ask::VmStart => R::VmStart(v),
        Ask::VmMigrate => R::VmMigrate(v),
        Ask::VmStop => R::VmStop(v),
        Ask::VmSwitchover => R::VmSwitchover(v),
        Ask::VmCont => R::VmCont(v),
        Ask::VmCancel => R::VmCancel(v),
        Ask::VmEnd => R::VmEnd(v),
        Ask::VmQuit => R::VmQuit(v),
    };
    (host, request)
}

impl Move {
    pub(crate) fn control_actions(&self, s: &State, out: &mut Vec<Happening>) {
        let c = &s.coordinator;
        // Who tries again waits first: longer than the switches need for what they do by themselves.
        let again = |o: &Order| matches!(o, Order::Run { attempt, .. } | Order::Undo { attempt, .. } if *attempt > 0);
        let next = c.orders.front().filter(|_| c.machine.is_some());
        if next.is_some_and(|o| !again(o) || !self.frames_move(s)) {
            out.push(Happening::Act);
        }
        for (r, run) in c.runs.iter().enumerate() {
            for (n, sent) in run.open.iter().enumerate() {
                if !s.switches[sent.host].up {
                    // What has to be tried until it succeeds waits; its retries differ in nothing.
                    let once = run.attempt == 0 && !s.coordinator.is_past();
                    if once && matches!(run.task, Task::Step(_)) {
                        out.push(Happening::Nobody(r, n));
                    }
                    continue;
                }
                if self.waits(s, run.task, sent) {
                    continue;
                }
                out.push(Happening::Answer(r, n));
                if s.left.lost > 0 {
                    out.push(Happening::Unanswered(r, n));
                    if s.late.is_none() {
                        out.push(Happening::Late(r, n));
                    }
                }
                if s.left.switches > 0 && changes(sent.request) {
                    out.push(Happening::Dies(r, n, Death::Between));
                    out.push(Happening::Dies(r, n, Death::Behind));
                }
            }
        }
        if let Some(sent) = s.late
            && s.switches[sent.host].up
        {
            out.push(Happening::Arrives);
        }
        match &c.machine {
            Some(_) => {
                if s.left.coordinator > 0 {
                    out.push(Happening::CoordinatorDies(None));
                    if s.late.is_none() {
                        for (r, run) in c.runs.iter().enumerate() {
                            let all = 0..run.open.len();
                            out.extend(all.map(|n| Happening::CoordinatorDies(Some((r, n)))));
                        }
                    }
                }
                if s.left.aborts > 0 {
                    out.push(Happening::Abort);
                }
            }
            None if c.outcome.is_none() => out.push(Happening::TakeUp),
            None => {}
        }
        for h in [A, B] {
            match s.switches[h].up {
                true if s.left.switches > 0 => out.push(Happening::SwitchDies(h)),
                true => {}
                false => out.push(Happening::SwitchStarts(h)),
            }
        }
    }

    /// The answer is not there yet.
    fn waits(&self, s: &State, task: Task, sent: &Sent) -> bool {
        let is = |wanted: &[H]| {
            s.switches[sent.host]
                .state
                .is_none_or(|x| wanted.contains(&x))
        };
        match (task, sent.request, sent.host) {
            (Task::Step(Step::Settle), R::Status, A) => !is(&[H::Departed, H::Released]),
            (Task::Step(Step::Settle), R::Status, _) => !is(&[H::Live, H::Released]),
            (Task::Undo(_), R::Status, _) => !is(&[H::Aborted, H::Released]),
            (_, R::Seal, _) => !s.may_answer_seal(),
            (_, R::Restore, _) => !s.may_answer_restore(),
            _ => false,
        }
    }

    pub(crate) fn control_step(&self, s: &mut State, step: Happening) {
        match step {
            Happening::Act => self.act(s),
            Happening::Answer(r, n) => {
                let Some(sent) = s.sent(r, n) else { return };
                let answer = self.carry_out(s, sent, None);
                self.answered(s, r, n, Some(answer));
            }
            Happening::Unanswered(r, n) => {
                let Some(sent) = s.sent(r, n) else { return };
                s.left.lost -= 1;
                self.carry_out(s, sent, None);
                self.answered(s, r, n, None);
            }
            Happening::Late(r, n) => {
                s.left.lost -= 1;
                s.late = s.sent(r, n);
                self.answered(s, r, n, None);
            }
            Happening::Nobody(r, n) => self.answered(s, r, n, None),
            Happening::Dies(r, n, death) => {
                let Some(sent) = s.sent(r, n) else { return };
                s.left.switches -= 1;
                self.carry_out(s, sent, Some(death));
                s.die(sent.host);
                self.answered(s, r, n, None);
            }
            Happening::Arrives => {
                if let Some(sent) = s.late.take() {
                    self.carry_out(s, sent, None);
                }
            }
            Happening::CoordinatorDies(late) => {
                s.left.coordinator -= 1;
                if let Some((r, n)) = late {
                    s.late = s.sent(r, n);
                }
                let c = &mut s.coordinator;
                (c.machine, c.orders) = (None, Default::default());
                c.runs.clear();
            }
            Happening::TakeUp => {
                let c = &mut s.coordinator;
                let (machine, orders) = Machine::replay(self.freeze, &c.journal);
                c.session += 1;
                let again = c.session > 40;
                c.outcome = machine.outcome();
                c.orders = orders.into();
                c.machine = c.outcome.is_none().then_some(machine);
                if again {
                    s.violated("taken up again and again");
                }
            }
            Happening::Abort => {
                s.left.aborts -= 1;
                s.tell(Event::Abort);
            }
            Happening::SwitchDies(h) => {
                s.left.switches -= 1;
                s.die(h);
            }
            Happening::SwitchStarts(h) => self.start(s, h),
            _ => {}
        }
    }

    fn act(&self, s: &mut State) {
        let Some(order) = s.coordinator.orders.pop_front() else {
            return;
        };
        let c = &mut s.coordinator;
        match order {
            Order::Journal { entry, .. } => {
                let begins = |e| matches!(e, Entry::Begin(step) if step >= NO_RETURN);
                // What was undone or has failed, and may be again, the machine does not look at.
                let counts = !matches!(
                    entry,
                    Entry::Failed(_) | Entry::Undone(_) | Entry::NotUndone(_)
                );
                if counts && !(self.has(Bug::SkipJournal) && begins(entry)) {
                    c.journal.push(entry);
                }
            }
            Order::Run { step, attempt } => self.begin(s, Task::Step(step), attempt),
            Order::Halt(step) => {
                c.runs.retain(|r| r.task != Task::Step(step));
                s.tell(Event::Halted(step));
            }
            Order::Undo { undo, attempt } => {
                if attempt > 0 || undo == Undo::CancelMemory {
                    c.session += 1;
                }
                self.begin(s, Task::Undo(undo), attempt);
            }
            Order::TooLate => {}
            Order::End(outcome) => {
                c.machine = None;
                c.runs.clear();
                if !matches!(outcome, Outcome::Unfinished | Outcome::RollbackIncomplete) {
                    c.outcome = Some(outcome);
                }
            }
        }
    }

    fn begin(&self, s: &mut State, task: Task, attempt: u32) {
        let run = Run {
            task,
            attempt,
            phase: 0,
            open: Vec::new(),
            failed: None,
        };
        s.coordinator.runs.push(run);
        let last = s.coordinator.runs.len() - 1;
        self.phase(s, last);
    }

    /// Asks for what the run's phase needs, or ends it.
    fn phase(&self, s: &mut State, r: usize) {
        let session = s.coordinator.session;
        let run = &mut s.coordinator.runs[r];
        let sent = |(host, request)| Sent {
            host,
            request,
            session,
        };
        run.open = asks(run.task, run.phase).into_iter().map(sent).collect();
        if run.open.is_empty() {
            self.ended(s, r, None);
        }
    }

    fn answered(&self, s: &mut State, r: usize, n: usize, answer: Option<Answer>) {
        let run = &mut s.coordinator.runs[r];
        let sent = run.open.remove(n);
        // A lost answer says nothing; a refusal says that nothing was done.
        let failed = match answer {
            None => Some(false),
            Some(Answer::Unknown) if matches!(run.task, Task::Undo(_)) => None,
            // Released, and the switch was started again since.
            Some(Answer::Unknown) if sent.request == R::Release => None,
            Some(Answer::Unknown | Answer::No) => Some(true),
            Some(Answer::Yes) => None,
        };
        run.failed = match (run.failed, failed) {
            (Some(a), Some(b)) => Some(a && b),
            (a, b) => a.or(b),
        };
        if !run.open.is_empty() {
            return;
        }
        match run.failed {
            Some(unchanged) => self.ended(s, r, Some(unchanged)),
            None => {
                run.phase += 1;
                self.phase(s, r);
            }
        }
    }

    fn ended(&self, s: &mut State, r: usize, failed: Option<bool>) {
        let task = s.coordinator.runs.remove(r).task;
        if let (Task::Step(step), Some(_)) = (task, failed)
            && step > NO_RETURN
            && self.has(Bug::AbortAfterCommit)
        {
            let c = &mut s.coordinator;
            c.journal.push(Entry::Rollback);
            let (machine, orders) = Machine::replay(self.freeze, &c.journal);
            c.runs.clear();
            (c.machine, c.orders) = (Some(machine), orders.into());
            return;
        }
        s.tell(match (task, failed) {
            (Task::Step(step), None) => Event::Done(step),
            (Task::Step(step), Some(unchanged)) => Event::Failed { step, unchanged },
            (Task::Undo(undo), None) => Event::Undone(undo),
            (Task::Undo(undo), Some(_)) => Event::UndoFailed(undo),
        });
    }
}

impl Coordinator {
    fn is_past(&self) -> bool {
        self.machine.as_ref().is_some_and(Machine::past_return)
    }
}

impl State {
    fn sent(&self, r: usize, n: usize) -> Option<Sent> {
        self.coordinator.runs.get(r)?.open.get(n).copied()
    }

    fn tell(&mut self, event: Event) {
        let c = &mut self.coordinator;
        if let Some(m) = &mut c.machine {
            c.orders.extend(m.on(event));
        }
    }

    /// A VM's process hears of it, by the switch of its host.
    pub(crate) fn vm_call(&mut self, bug: Option<Bug>, sent: Sent) -> Answer {
        use Proc::*;
        let holds = |s: &crate::Switch| {
            s.state
                .is_some_and(|x| !matches!(x, H::Aborted | H::Released))
        };
        let is_there = holds(&self.switches[sent.host]);
        let (v, on) = match sent.request {
            R::VmStart(v) | R::VmEnd(v) => (v, B),
            R::VmCont(v) => (v, sent.host),
            R::VmMigrate(v) | R::VmStop(v) | R::VmSwitchover(v) | R::VmCancel(v) | R::VmQuit(v) => {
                (v, A)
            }
            _ => return Answer::No,
        };
        let vm = &mut self.vms[v];
        // QEMU serves one client at a time: what an earlier one still had under way never arrives.
        if sent.session < vm.session[on] {
            return Answer::No;
        }
        vm.session[on] = sent.session;
        let (here, there) = (vm.on[on], vm.on[B]);
        match (sent.request, here) {
            (R::VmStart(_), Absent) if is_there && !vm.ended => vm.on[B] = Incoming,
            (R::VmStart(_), Incoming) => {}
            (R::VmMigrate(_), Running | Paused) if there == Incoming => vm.copying = true,
            (R::VmStop(_), Running) => vm.on[A] = Paused,
            (R::VmStop(_), Paused | Sent) => {}
            (R::VmSwitchover(_), Paused) if vm.copying && there == Incoming => {
                vm.on = [Sent, Arrived];
                vm.copying = false;
            }
            (R::VmSwitchover(_), Sent) if there == Arrived => {}
            (R::VmCancel(_), _) => vm.copying = false,
            (R::VmCont(_), Running) => {}
            (R::VmCont(_), Paused | Sent | Arrived) => vm.on[on] = Running,
            (R::VmEnd(_), _) => {
                vm.on[B] = Absent;
                vm.ended = bug != Some(Bug::StartAgain);
            }
            (R::VmQuit(_), Paused | Sent | Absent) => vm.on[A] = Absent,
            _ => return Answer::No,
        }
        Answer::Yes
    }
}

/// It is carried out by a switch, and changes its hold.
fn changes(r: R) -> bool {
    use R::*;
    matches!(
        r,
        Prepare
            | Open
            | FreezeInside
            | FreezeAll
            | Seal
            | Restore
            | Commit
            | Announce
            | Depart
            | Release
            | Abort
    )
}
