//! A hold in memory.

use std::time::{Duration, Instant};

use gangway_shared::api::{HoldInfo, HoldState, Refusal, RefusalCode, Role};
use gangway_shared::id::HoldId;

use super::record::{RecordFile, Stand};
use super::source::SourceHold;
use super::target::TargetHold;
use super::{Host, refuse};

/// A hold that nobody asks for so long may have lost its coordinator.
const QUIET: Duration = Duration::from_secs(60);

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
    pub(super) asked: Instant,
    /// That nobody does was said.
    pub(super) said: bool,
    /// What was found damaged when it was taken up.
    pub(super) harm: Vec<String>,
}

impl Hold {
    pub(super) fn new(info: HoldInfo, end: End, stand: Stand, file: RecordFile) -> Hold {
        Hold {
            info,
            end,
            stand,
            file: Some(file),
            asked: Instant::now(),
            said: false,
            harm: Vec::new(),
        }
    }

    /// It holds, or claims, something, and nobody asks for it.
    pub(super) fn quiet(&self, now: Instant) -> Option<String> {
        use HoldState as S;
        let s = now.saturating_duration_since(self.asked);
        let idle = matches!(
            self.info.state,
            S::Open | S::Aborting | S::Aborted | S::Released
        );
        (!idle && s >= QUIET).then(|| {
            format!(
                "no coordinator has asked for it for {} s; if none is at work, take it up with `gangway abort {}`",
                s.as_secs(),
                self.info.hold
            )
        })
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

    /// Writes down that it is in this state. What is over has no record.
    pub(super) fn note(&mut self, state: HoldState) -> Result<(), Refusal> {
        if matches!(state, HoldState::Released | HoldState::Aborted) {
            return Ok(());
        }
        if let (HoldState::Restored, End::Target(t)) = (state, &self.end) {
            self.stand.named = t.named();
        }
        let i = &self.info;
        self.stand = Stand {
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

    /// It has moved by itself: written down, then so.
    pub(super) fn became(&mut self, state: HoldState) {
        if let Err(e) = self.note(state) {
            tracing::error!("{e}");
        }
        self.info.state = state;
    }

    pub(super) fn snapshot(&self, host: &Host) -> HoldInfo {
        let mut i = self.info.clone();
        if !self.is_over() {
            (i.lanes, i.error) = match &self.end {
                End::Source(s) => (s.lanes(host), s.error()),
                End::Target(t) => (t.lanes(), t.error()),
                End::Over => (Vec::new(), None),
            };
            let waits = host.spool.trouble(Some(i.hold));
            let all = i.error.take().into_iter();
            let all = all.chain(waits.map(|why| format!("senders wait: {why}")));
            let all = all.chain(
                self.harm
                    .iter()
                    .map(|h| format!("damaged in the spool: {h}")),
            );
            let all: Vec<String> = all.chain(self.quiet(Instant::now())).collect();
            i.error = (!all.is_empty()).then(|| all.join("; "));
        }
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
