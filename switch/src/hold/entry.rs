//! A hold in memory.

use std::time::Instant;

use gangway_shared::api::{HoldInfo, HoldState, Refusal, RefusalCode, Reply, Role};
use gangway_shared::config::valid::HoldConfig;
use gangway_shared::id::HoldId;

use super::machine::{Event, Persist, Verdict, step, wanted};
use super::record::{RecordFile, Stand};
use super::source::SourceHold;
use super::target::TargetHold;
use super::{Host, refuse};

/// One of its two ends.
pub(super) enum End {
    Source(SourceHold),
    Target(TargetHold),
    /// Nothing is left to be carried out.
    Over,
}

/// A hold: what is told of it, what carries it out, and its record.
pub(super) struct Hold {
    pub(super) info: HoldInfo,
    pub(super) end: End,
    /// Where it stands, besides what `info` says.
    pub(super) stand: Stand,
    pub(super) file: Option<RecordFile>,
    /// When somebody last asked for it by its id.
    asked: Instant,
    /// Since when it holds frames in this run of the switch.
    holding: Option<Instant>,
    /// What was said in the log: that nobody asks for it, and that it holds for too long.
    said: [bool; 2],
    /// What was said in the log of a time-out that failed, and of losses that could not be written down.
    failed: [Option<String>; 2],
    /// Why it was put back without an order.
    pub(super) timed_out: Option<String>,
    /// What was found damaged when it was taken up.
    pub(super) harm: Vec<String>,
}

impl Hold {
    pub(super) fn new(info: HoldInfo, end: End, stand: Stand, file: RecordFile) -> Hold {
        let state = info.state;
        let mut hold = Hold {
            info,
            end,
            stand,
            file: Some(file),
            asked: Instant::now(),
            holding: None,
            said: [false; 2],
            failed: [None, None],
            timed_out: None,
            harm: Vec::new(),
        };
        hold.is_now(state);
        hold
    }

    fn is_now(&mut self, state: HoldState) {
        use HoldState as S;
        self.info.state = state;
        let holds = match (state, &self.end) {
            // It was cut, and that could not be written down; or its switch died in between.
            (S::Open, End::Source(s)) => s.is_holding(),
            (s, _) => matches!(s, S::FrozenInside | S::Frozen | S::Sealed | S::Departing),
        };
        self.holding = holds.then(|| self.holding.unwrap_or_else(Instant::now));
    }

    /// Somebody asks for it.
    pub(super) fn is_asked(&mut self) {
        (self.asked, self.said[0]) = (Instant::now(), false);
    }

    /// It holds, or claims, something, and nobody asks for it; or it holds for too long.
    fn lateness(&self, limits: &HoldConfig, now: Instant) -> [Option<String>; 2] {
        use HoldState as S;
        let s = now.saturating_duration_since(self.asked).as_secs();
        let idle = match self.info.state {
            S::Open => self.holding.is_none(),
            s => matches!(s, S::Aborting | S::Aborted | S::Released),
        };
        let quiet = (!idle && s >= limits.quiet_s).then(|| {
            format!(
                "no coordinator has asked for it for {s} s; if none is at work, take it up with `gangway abort {}`",
                self.info.hold
            )
        });
        let s = self
            .holding
            .map(|t| now.saturating_duration_since(t).as_secs());
        let long = limits.longest_s.zip(s).filter(|(most, s)| s >= most);
        let long = long
            .map(|(most, s)| format!("it has held frames for {s} s, and hold.longest_s is {most}"));
        [quiet, long]
    }

    /// Why it is overdue.
    pub(super) fn overdue(&self, limits: &HoldConfig, now: Instant) -> Option<String> {
        let all: Vec<_> = self.lateness(limits, now).into_iter().flatten().collect();
        (!all.is_empty()).then(|| all.join("; "))
    }

    /// Logs it, once.
    pub(super) fn say_overdue(&mut self, limits: &HoldConfig, now: Instant) {
        let all = self.lateness(limits, now);
        for (why, said) in all.into_iter().zip(&mut self.said) {
            if let (Some(why), false) = (why, *said) {
                let i = &self.info;
                tracing::warn!(hold = %i.hold, "{:?} on the {:?}: {why}", i.state, i.role);
                *said = true;
            }
        }
    }

    /// Logs why something failed that is tried again by itself, twice a second: once, until it is something else.
    pub(super) fn fails(&mut self, of: usize, why: &str) {
        if self.failed[of].as_deref() != Some(why) {
            tracing::error!(hold = %self.info.hold, "tried again: {why}");
            self.failed[of] = Some(why.to_owned());
        }
    }

    /// Its time-out would be right now, whatever its coordinator's journal says: in its state, and as things are on this host.
    pub(super) fn may_time_out(&self, host: &Host) -> bool {
        let goes = step(self.info.role, self.info.state, Event::TimedOut);
        matches!(goes, Verdict::Go(..))
            && match &self.end {
                End::Source(s) => {
                    let holds = self.info.state != HoldState::Open || self.holding.is_some();
                    holds && s.may_time_out(host)
                }
                // It was restored once, whatever was found of it since: a commit may have begun in the coordinator's journal.
                End::Target(_) => self.stand.named == 0,
                End::Over => false,
            }
    }

    /// The one way to another state: checks the transition, carries it out by `act`, and writes it down, in the order that the machine
    /// says. None: it was done before. `Err`: it stands where it stood; what an order has begun is gone on with when it is repeated.
    ///
    /// That an abort can't be written down is no reason not to put things back: the VMs wait for them.
    pub(super) fn step(
        &mut self,
        host: &Host,
        event: Event,
        act: impl FnOnce(&mut End, &mut HoldInfo) -> Result<Option<Reply>, Refusal>,
    ) -> Result<Option<Reply>, Refusal> {
        let (next, persist) = match step(self.info.role, self.info.state, event) {
            Verdict::No => return Err(self.not_now(event)),
            Verdict::Again => return Ok(None),
            Verdict::Go(next, persist) => (next, persist),
        };
        let before = self.stand;
        self.stand.announced |= event == Event::Announce;
        let noted = match persist {
            Persist::First => self.note(host, next),
            Persist::Then => Ok(()),
        };
        if let (Err(e), false) = (&noted, event == Event::Abort) {
            self.stand = before;
            return Err(e.clone());
        }
        let done = act(&mut self.end, &mut self.info);
        // What holds now does so whether it can be written down or not.
        self.is_now(self.info.state);
        let reply = done.inspect_err(|_| {
            self.stand = before;
            if persist == Persist::First
                && let Err(e) = self.note(host, before.state)
            {
                tracing::error!("{e}");
            }
        })?;
        if persist == Persist::Then {
            self.note(host, next)?;
        }
        if let Err(e) = noted {
            tracing::error!("{e}");
        }
        self.is_now(next);
        tracing::info!(hold = %self.info.hold, "{event:?}: {next:?}");
        if self.is_over() && !self.is_armed() {
            self.forget();
        }
        Ok(reply)
    }

    fn not_now(&self, event: Event) -> Refusal {
        let i = &self.info;
        let states = wanted(i.role, event);
        let states: Vec<_> = states.iter().map(|s| format!("{s:?}")).collect();
        let wanted = match states.as_slice() {
            [] => "that is an order for the other end".to_owned(),
            all => format!("it would have to be {}", all.join(" or ")),
        };
        let why = self.timed_out.as_ref().map(|w| format!(" ({w})"));
        let what = format!(
            "{event:?} is not possible: hold {} is {:?} on the {:?}{}; {wanted}",
            i.hold,
            i.state,
            i.role,
            why.unwrap_or_default()
        );
        refuse(RefusalCode::State, what)
    }

    pub(super) fn is_over(&self) -> bool {
        matches!(self.info.state, HoldState::Released | HoldState::Aborted)
    }

    /// A port of it still waits for its VM.
    pub(super) fn is_armed(&self) -> bool {
        matches!(&self.end, End::Source(s) if s.is_armed())
    }

    /// Only what is told of it stays: no file, and no queue.
    pub(super) fn forget(&mut self) {
        (self.end, self.file) = (End::Over, None);
    }

    /// Frames that were lost to it: what uplinks' sockets have dropped, and backlogs that could not be held; in earlier runs, too.
    fn lost(&self, host: &Host) -> u64 {
        match &self.end {
            End::Source(s) => s.lost(host),
            End::Target(t) => t.lost(host),
            End::Over => self.stand.lost,
        }
    }

    /// Writes down what was lost since the last time, so that the next run knows it.
    pub(super) fn note_lost(&mut self, host: &Host) {
        if self.lost(host) != self.stand.lost {
            match self.note(host, self.info.state) {
                Ok(()) => self.failed[1] = None,
                Err(e) => self.fails(1, &e.message),
            }
        }
    }

    /// Writes down that it is in this state. What is over has no record.
    fn note(&mut self, host: &Host, state: HoldState) -> Result<(), Refusal> {
        if matches!(state, HoldState::Released | HoldState::Aborted) {
            return Ok(());
        }
        if let (HoldState::Restored, End::Target(t)) = (state, &self.end) {
            self.stand.named = t.named();
        }
        let lost = self.lost(host);
        let i = &self.info;
        self.stand = Stand {
            lost,
            state,
            frozen_ns: i.frozen_ns,
            thawed_ns: i.thawed_ns,
            drained_ns: i.drained_ns,
            ..self.stand
        };
        let Some(file) = &mut self.file else {
            return Ok(());
        };
        file.put(&self.stand).map_err(|e| {
            let what = format!("hold {} can't be written down: {e}", self.info.hold);
            refuse(RefusalCode::Resources, what)
        })
    }

    pub(super) fn snapshot(&self, host: &Host) -> HoldInfo {
        let mut i = self.info.clone();
        let mut errors = Vec::new();
        if !self.is_over() {
            let error;
            (i.lanes, error) = match &self.end {
                End::Source(s) => (s.lanes(host), s.error()),
                End::Target(t) => (t.lanes(host), t.error()),
                End::Over => (Vec::new(), None),
            };
            let trouble = host.spool.trouble(Some(i.hold));
            errors.extend(error);
            errors.extend(trouble.map(|why| format!("senders wait: {why}")));
            let harm = self.harm.iter();
            errors.extend(harm.map(|h| format!("damaged in the spool: {h}")));
            errors.extend(self.overdue(&host.config.hold, Instant::now()));
        }
        errors.extend(self.timed_out.clone());
        i.error = (!errors.is_empty()).then(|| errors.join("; "));
        i
    }

    pub(super) fn group(&self) -> &[usize] {
        match &self.end {
            End::Source(s) => s.group(),
            End::Target(t) => t.group(),
            End::Over => &[],
        }
    }
}

/// Nothing has happened to it yet.
pub(super) fn info(
    hold: HoldId,
    role: Role,
    state: HoldState,
    vms: Vec<String>,
    peer: String,
) -> HoldInfo {
    HoldInfo {
        hold,
        role,
        state,
        vms,
        peer,
        error: None,
        frozen_ns: 0,
        thawed_ns: 0,
        drained_ns: 0,
        lanes: Vec::new(),
    }
}
