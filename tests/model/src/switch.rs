//! The switches: shells around the product's table, as ADR-0001 wants them.

use gangway_shared::api::{HoldState as H, Role, Scope};
use gangway_switch::hold::machine::{Event, Found, Persist, Verdict, holds, step, taken_up};

use crate::{A, B, Bug, Death, INSIDE, Move, OUTSIDE, Proc, Request as R, Sent, State, Switch};

/// Of a switch or a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Answer {
    Yes,
    /// Refused: nothing was done.
    No,
    /// There is no such hold.
    Unknown,
}

impl Move {
    fn verdict(&self, role: Role, state: H, event: Event) -> Verdict {
        match (role, state, event) {
            (Role::Target, H::Draining | H::Live, Event::Abort)
                if self.has(Bug::AbortAfterCommit) =>
            {
                Verdict::Go(H::Aborted, Persist::Then)
            }
            (..) => step(role, state, event),
        }
    }

    /// Carries a request out, as far as the switch lives.
    pub(crate) fn carry_out(&self, s: &mut State, sent: Sent, death: Option<Death>) -> Answer {
        let h = sent.host;
        let event = match sent.request {
            R::Show => return Answer::Yes,
            R::Status => {
                return match s.switches[h].state {
                    Some(_) => Answer::Yes,
                    None => Answer::Unknown,
                };
            }
            R::Prepare | R::Open => return self.open(s, sent, death),
            R::Abort if s.switches[h].state.is_none() => {
                // An order to open it may still be on its way: it comes too late from now on.
                s.switches[h].too_late = !self.has(Bug::NoTombstone);
                return Answer::Yes;
            }
            R::Abort => Event::Abort,
            R::FreezeInside => Event::Freeze(Scope::Inside),
            R::FreezeAll => Event::Freeze(Scope::All),
            R::Seal => Event::Seal,
            R::Restore => Event::Restore,
            R::Commit => Event::Commit,
            R::Announce => Event::Announce,
            R::Depart => Event::Depart,
            R::Release => Event::Release,
            _ => return s.vm_call(self.bug, sent),
        };
        let Some(state) = s.switches[h].state else {
            return Answer::Unknown;
        };
        self.advance(s, h, state, event, death)
    }

    fn open(&self, s: &mut State, sent: Sent, death: Option<Death>) -> Answer {
        let (h, first) = match sent.request {
            R::Open => (A, H::Open),
            _ => (B, H::Prepared),
        };
        match s.switches[h].state {
            Some(H::Aborted | H::Released) => return Answer::No,
            Some(_) => return Answer::Yes,
            None if s.switches[h].too_late => return Answer::No,
            None => {}
        }
        // The source connects to a target that expects it.
        let expects = matches!(s.switches[B].state, Some(H::Prepared));
        if h == A && !(s.switches[B].up && expects) {
            return Answer::No;
        }
        if death != Some(Death::Between) {
            self.persist(s, h, first);
        }
        s.switches[h].state = Some(first);
        Answer::Yes
    }

    /// Checks the transition, carries it out and writes it down, or the other way round.
    pub(crate) fn advance(
        &self,
        s: &mut State,
        h: usize,
        state: H,
        event: Event,
        death: Option<Death>,
    ) -> Answer {
        let role = [Role::Source, Role::Target][h];
        let (next, persist) = match self.verdict(role, state, event) {
            Verdict::No => return Answer::No,
            Verdict::Again => return Answer::Yes,
            Verdict::Go(next, persist) => (next, persist),
        };
        if !s.may(event) {
            return Answer::No;
        }
        match event {
            // The lane is closed at once; the answer waits until that is acknowledged, and an order that is late is not answered.
            Event::Seal if !s.inside_is_there() => {
                s.lanes[INSIDE].source.sealed = true;
                return Answer::No;
            }
            Event::Restore if !s.inside_is_there() => return Answer::No,
            _ => {}
        }
        let first = persist == Persist::First;
        if first {
            if !self.has(Bug::ForgetFirst) {
                self.persist(s, h, next);
            }
            if death == Some(Death::Between) {
                return Answer::No;
            }
        }
        s.switches[h].state = Some(next);
        self.do_it(s, h, event, next);
        if !first && death != Some(Death::Between) {
            self.persist(s, h, next);
        }
        // From the answer on it is promised.
        if let (Event::Freeze(scope), None) = (event, death) {
            s.lanes[INSIDE].cut = true;
            s.lanes[OUTSIDE].cut |= scope == Scope::All;
        }
        Answer::Yes
    }

    fn persist(&self, s: &mut State, h: usize, state: H) {
        if self.has(Bug::SkipPersist) {
            return;
        }
        let over = matches!(state, H::Aborted | H::Released);
        s.switches[h].disk = (!over).then_some(state);
        if over {
            s.free(h);
        }
    }

    fn do_it(&self, s: &mut State, h: usize, event: Event, next: H) {
        match event {
            Event::Freeze(scope) => {
                let hole = self.has(Bug::HoleInTheCut);
                s.switches[A].lanes[INSIDE] = true;
                if scope == Scope::All {
                    s.switches[A].lanes[OUTSIDE] = !hole;
                }
            }
            Event::Announce => s.found = true,
            Event::Abort if h == A => {
                s.lanes.iter_mut().for_each(|l| l.cut = false);
                // The connection says so, if it is there.
                if s.switches[B].up && s.switches[B].state.is_some() {
                    s.switches[B].put_back = true;
                }
            }
            Event::Commit => s.lanes.iter_mut().for_each(|l| l.cut = false),
            _ => {}
        }
        if matches!(next, H::Aborted | H::Released) {
            s.switches[h].lanes = [false; 2];
        }
    }

    /// The switch starts, and takes up what it finds.
    pub(crate) fn start(&self, s: &mut State, h: usize) {
        let lanes = &s.lanes;
        let found = Found {
            complete: lanes[INSIDE].shipped.sealed,
        };
        let old = &s.switches[h];
        let role = [Role::Source, Role::Target][h];
        let state = old.disk.map(|d| taken_up(role, d, found));
        let mut held = [false; 2];
        if let (A, Some(state)) = (h, state) {
            for (n, l) in lanes.iter().enumerate() {
                let q = &l.source;
                let waits = q.delivered < q.frames.len() || q.sealed;
                held[n] = match state {
                    H::Aborting => waits,
                    state => holds(state, n == INSIDE, waits),
                };
            }
        }
        s.switches[h] = Switch {
            up: true,
            state,
            disk: old.disk,
            too_late: false,
            lanes: held,
            // Over the new connection, if the source still knows.
            put_back: h == B && matches!(s.switches[A].state, Some(H::Aborting)),
        };
    }
}

impl State {
    /// What a request needs beyond its state.
    fn may(&self, event: Event) -> bool {
        match event {
            Event::Commit => !self.switches[B].put_back,
            Event::Seal => self.vms.iter().all(|vm| vm.on[A] != Proc::Running),
            _ => true,
        }
    }

    /// All of the lane between the VMs is on B's disk.
    fn inside_is_there(&self) -> bool {
        let l = &self.lanes[INSIDE];
        l.shipped.sealed && l.shipped.frames == l.source.frames
    }

    pub(crate) fn may_answer_seal(&self) -> bool {
        let state = self.switches[A].state;
        // It closes the lane at once, and answers when that is acknowledged.
        state != Some(H::Frozen) || !self.may(Event::Seal) || self.inside_is_there()
    }

    pub(crate) fn may_answer_restore(&self) -> bool {
        self.switches[B].state != Some(H::Prepared) || self.inside_is_there()
    }

    /// The switch's memory is gone, and what was on its way to it.
    pub(crate) fn die(&mut self, h: usize) {
        let disk = self.switches[h].disk;
        self.switches[h] = Switch {
            disk,
            ..Switch::default()
        };
        self.late.take_if(|sent| sent.host == h);
    }

    /// The spool of a host is freed.
    fn free(&mut self, h: usize) {
        let waits = |l: &crate::Lane| {
            let all = l.source.frames.len();
            l.source.delivered < all && l.shipped.frames.len() < all
        };
        if h == A && self.lanes.iter().any(waits) {
            self.violated("frames are thrown away at the source");
        }
    }
}
