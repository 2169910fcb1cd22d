//! A hold's ledger: written when the hold is over, read when somebody asks.

use gangway_shared::api::{HoldInfo, HoldState, LedgerPage, Refusal, RefusalCode, Reply, Role};
use gangway_shared::id::HoldId;
use gangway_shared::ledger::{LaneKind, Ledger, LedgerLane, Stage};

use super::Host;
use super::refuse;
use crate::datapath::lane::Progress;
use crate::datapath::worker::now_ns;
use crate::ledger::{Book, LedgerError, Reader, write};

/// Lanes of one reply: of 500 bytes each.
const LANES: usize = 1024;

/// A lane of which nothing was noted.
pub(super) fn book(lane: &gangway_shared::id::LaneKey, kind: LaneKind, inside: bool) -> Book {
    Book {
        lane: LedgerLane {
            lane: lane.clone(),
            kind,
            inside,
            stages: Vec::new(),
            lost: Vec::new(),
            lost_more: 0,
            dropped: 0,
            indexed: false,
            kept: false,
        },
        again: None,
    }
}

impl Book {
    /// What a drain has done.
    pub(super) fn drained(&mut self, p: &Progress) {
        self.note(Stage::Flush, p.flushed());
        self.note(Stage::Deliver, p.delivered());
        let (lost, more) = p.lost();
        for (first, last, why) in lost {
            self.lose(Stage::Deliver, first, last, why);
        }
        self.lane.lost_more += more;
    }
}

/// Writes a hold's ledger. A host that can't do that does everything else: a hold that is over must not stay because of it.
pub(super) fn keep(host: &Host, info: &HoldInfo, state: HoldState, books: Vec<Book>) {
    let ledger = Ledger {
        hold: info.hold,
        role: info.role,
        state,
        host: host.config.name.clone(),
        peer: info.peer.clone(),
        vms: info.vms.clone(),
        frozen_ns: info.frozen_ns,
        thawed_ns: info.thawed_ns,
        drained_ns: info.drained_ns,
        made_ns: now_ns(),
        lanes: books.len() as u32,
    };
    match write(&host.config.ledger, &ledger, books) {
        Ok(Some(path)) => tracing::debug!(hold = %info.hold, "ledger: {}", path.display()),
        Ok(None) => {}
        Err(e) => tracing::error!(hold = %info.hold, "its ledger is not kept: {e}"),
    }
}

fn open(host: &Host, hold: HoldId, role: Role) -> Result<Reader, Refusal> {
    let none = || {
        let what = format!(
            "host {} has no ledger of hold {hold} ({role:?}): it is not over yet, or was not kept ([ledger] of the host's configuration)",
            host.config.name
        );
        refuse(RefusalCode::Unknown, what)
    };
    let found = Reader::open(&host.config.ledger, hold, role).map_err(trouble)?;
    found.ok_or_else(none)
}

fn trouble(e: LedgerError) -> Refusal {
    let code = match e {
        LedgerError::Absent(_) => RefusalCode::Malformed,
        _ => RefusalCode::Internal,
    };
    refuse(code, e.to_string())
}

/// [`gangway_shared::api::Request::LedgerShow`].
pub(super) fn show(host: &Host, hold: HoldId, role: Role, lane: u32) -> Result<Reply, Refusal> {
    let ledger = open(host, hold, role)?;
    Ok(Reply::Ledger {
        ledger: ledger.ledger().clone(),
        lanes: ledger.lanes(lane as usize).take(LANES).cloned().collect(),
    })
}

/// [`gangway_shared::api::Request::LedgerIndex`].
pub(super) fn index(host: &Host, p: LedgerPage) -> Result<Reply, Refusal> {
    let ledger = open(host, p.hold, p.role)?;
    let (batches, next) = ledger.index(p.lane as usize, p.at).map_err(trouble)?;
    Ok(Reply::LedgerIndex { batches, next })
}

/// [`gangway_shared::api::Request::LedgerFrames`].
pub(super) fn frames(host: &Host, p: LedgerPage) -> Result<Reply, Refusal> {
    let ledger = open(host, p.hold, p.role)?;
    let (frames, next) = ledger.frames(p.lane as usize, p.at).map_err(trouble)?;
    Ok(Reply::LedgerFrames { frames, next })
}
