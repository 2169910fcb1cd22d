//! The lanes: what switches do with frames, without being told.

use gangway_shared::api::{HoldState as H, Role};
use gangway_switch::hold::machine::{Event, Verdict};

use crate::{A, B, Bug, Happening, INSIDE, M, Move, OUTSIDE, P, Proc, Queue, State};

/// What a switch does with a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Gate {
    Forward,
    /// Into the queue of what this host holds.
    Hold,
    /// It stays where it is.
    Wait,
    /// It is lost.
    Closed,
    /// The VM is not here: nobody takes it.
    Nowhere,
}

fn is_over(state: Option<H>) -> bool {
    matches!(state, None | Some(H::Aborted | H::Released))
}

impl Move {
    pub(crate) fn frame_actions(&self, s: &State, out: &mut Vec<Happening>) {
        for n in [INSIDE, OUTSIDE] {
            if s.lanes[n].sent < self.bounds.frames && s.sender(n).is_some() {
                out.push(Happening::Send(n));
            }
            for h in [A, B] {
                if s.switches[h].up && s.next(n, h).is_some() {
                    out.push(Happening::Take(n, h));
                }
                if s.switches[h].up && !is_over(s.switches[h].state) {
                    out.push(Happening::Drain(n, h));
                }
            }
            if s.switches.iter().all(|x| x.up && !is_over(x.state)) {
                out.push(Happening::Ship(n));
            }
        }
        for h in [A, B] {
            if s.switches[h].up && !is_over(s.switches[h].state) {
                out.push(Happening::Settle(h));
            }
        }
    }

    /// Switches or guests have something to do.
    pub(crate) fn frames_move(&self, s: &State) -> bool {
        let mut all = Vec::new();
        self.frame_actions(s, &mut all);
        all.into_iter().any(|a| {
            let mut next = s.clone();
            self.frame_step(&mut next, a);
            next != *s
        })
    }

    pub(crate) fn frame_step(&self, s: &mut State, step: Happening) {
        match step {
            Happening::Send(n) => {
                if let Some(place) = s.sender(n) {
                    let l = &mut s.lanes[n];
                    l.sent += 1;
                    l.waits[place].push(l.sent);
                }
            }
            Happening::Take(n, h) => self.take(s, n, h),
            Happening::Ship(n) => s.ship(n),
            Happening::Drain(n, h) => self.drain(s, n, h),
            Happening::Settle(h) => self.settle(s, h),
            _ => {}
        }
    }

    fn gate(&self, s: &State, n: usize, h: usize) -> Gate {
        let forward = match s.vms[M].on[h] {
            Proc::Running => Gate::Forward,
            Proc::Absent => Gate::Nowhere,
            _ => Gate::Wait,
        };
        let (x, l) = (&s.switches[h], &s.lanes[n]);
        let Some(state) = x.state.filter(|_| !is_over(x.state)) else {
            return forward;
        };
        match (h, state) {
            (A, H::Aborting) => match x.lanes[n] {
                true if l.source.sealed => Gate::Wait,
                true => Gate::Hold,
                false => forward,
            },
            (A, _) if l.source.sealed => match n {
                INSIDE => Gate::Wait,
                _ => Gate::Closed,
            },
            (A, _) if x.lanes[n] => Gate::Hold,
            (A, _) => forward,
            (_, H::Draining) if !x.lanes[n] && !self.has(Bug::OpenBeforeDrained) => Gate::Hold,
            (_, H::Draining | H::Live) => forward,
            _ => Gate::Nowhere,
        }
    }

    fn take(&self, s: &mut State, n: usize, h: usize) {
        let Some(frame) = s.next(n, h) else { return };
        let gate = self.gate(s, n, h);
        if gate == Gate::Wait {
            return;
        }
        let place = if n == INSIDE { 0 } else { h };
        let l = &mut s.lanes[n];
        if gate == Gate::Nowhere && n == INSIDE {
            return;
        }
        l.waits[place].remove(0);
        match gate {
            Gate::Forward => {
                l.accepted.push(frame);
                l.got.push(frame);
                if h == A && l.cut {
                    s.violated("delivered behind the cut");
                }
            }
            Gate::Hold => {
                l.accepted.push(frame);
                let q = if h == A { &mut l.source } else { &mut l.local };
                q.frames.push(frame);
            }
            Gate::Closed => s.violated("a frame came behind the last one"),
            Gate::Wait | Gate::Nowhere => {}
        }
    }

    fn drain(&self, s: &mut State, n: usize, h: usize) {
        if s.vms[M].on[h] != Proc::Running {
            return;
        }
        let state = s.switches[h].state;
        let l = &mut s.lanes[n];
        match (h, state) {
            (A, Some(H::Aborting)) => {
                let holds = &mut s.switches[A].lanes[n];
                *holds = *holds && l.source.deliver(&mut l.got);
            }
            (B, Some(H::Draining)) if !s.switches[B].lanes[n] => {
                if l.shipped.deliver(&mut l.got) || !l.shipped.sealed {
                    return;
                }
                if !l.local.deliver(&mut l.got) {
                    s.switches[B].lanes[n] = true;
                }
            }
            _ => {}
        }
    }

    /// What the table calls events, and the source's close of lanes.
    fn settle(&self, s: &mut State, h: usize) {
        let Some(state) = s.switches[h].state else {
            return;
        };
        let role = [Role::Source, Role::Target][h];
        let event = match (h, state) {
            // Asked to; and the VMs stand still, so nothing more comes.
            (A, H::Frozen) if s.asked_to_seal() => {
                s.lanes[INSIDE].source.sealed = true;
                return;
            }
            (A, H::Departing) => {
                let hasty = self.has(Bug::DepartAtOnce);
                // What the network sent before it changed its mind is there; behind it comes the announcement.
                if hasty || (s.found && s.lanes[OUTSIDE].waits[A].is_empty()) {
                    s.lanes[OUTSIDE].source.sealed = true;
                }
                if !s.lanes.iter().all(|l| l.shipped.sealed) {
                    return;
                }
                Event::Acknowledged
            }
            (A, H::Aborting) if s.switches[A].lanes == [false; 2] => Event::Drained,
            (B, H::Draining) if s.switches[B].lanes == [true; 2] => Event::Drained,
            _ => return,
        };
        if let Verdict::Go(..) = gangway_switch::hold::machine::step(role, state, event) {
            self.advance(s, h, state, event, None);
        }
    }
}

impl State {
    /// Where what this lane's sender sends now goes.
    fn sender(&self, n: usize) -> Option<usize> {
        match n {
            INSIDE => self.vms[P].on.contains(&Proc::Running).then_some(0),
            _ => Some(if self.found { B } else { A }),
        }
    }

    /// The oldest frame that waits for this switch.
    fn next(&self, n: usize, h: usize) -> Option<u8> {
        let place = match n {
            // A ring is served where its VM runs.
            INSIDE if self.vms[P].on[h] != Proc::Running => return None,
            INSIDE => 0,
            _ => h,
        };
        self.lanes[n].waits[place].first().copied()
    }

    fn asked_to_seal(&self) -> bool {
        let open = |r: &crate::Run| r.open.iter().any(|s| s.request == crate::Request::Seal);
        let stand = self.vms.iter().all(|vm| vm.on[A] != Proc::Running);
        stand && self.coordinator.runs.iter().any(open)
    }

    /// One frame, or the end of the lane, gets to the other disk.
    fn ship(&mut self, n: usize) {
        let ships = matches!(
            self.switches[A].state,
            Some(H::FrozenInside | H::Frozen | H::Sealed | H::Departing | H::Departed)
        );
        if !ships {
            return;
        }
        let l = &mut self.lanes[n];
        match l.source.frames.get(l.shipped.frames.len()) {
            Some(frame) => l.shipped.frames.push(*frame),
            None => l.shipped.sealed = l.source.sealed,
        }
    }
}

impl Queue {
    /// The next frame goes to the guest; false if there is none.
    fn deliver(&mut self, got: &mut Vec<u8>) -> bool {
        let Some(frame) = self.frames.get(self.delivered) else {
            return false;
        };
        got.push(*frame);
        self.delivered += 1;
        true
    }
}
