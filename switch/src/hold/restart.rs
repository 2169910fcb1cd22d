//! Taking up the holds that an earlier run of the switch has left: its records say what they are and where they stand, the
//! spool what was held.
//!
//! Before any port is attached and control answers, lanes, gates, modes and shipments are as the state wants them. A hold
//! that was being put back, or was committed, goes on with that by itself; any other waits for its coordinator.
//!
//! Invariant: what can't be taken up (a damaged record, a port that is not configured any more) stays on the disk, is
//! named, and is refused to everybody who asks for it. So is a source's hold of which queues are missing: what they held
//! is lost, and what comes for their lanes would be held by nobody.
//! Invariant: what is lost of a hold that is taken up all the same is named in the log and in its status.
//! Invariant: a queue is delivered from behind what was noted as delivered; at most a burst of it comes twice.

use std::collections::BTreeMap;
use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;

use gangway_shared::api::{HoldState, Refusal, RefusalCode};
use gangway_shared::id::{HoldId, LaneKey, MacAddr};
use gangway_shared::record::HoldRecord;

use super::dead::Dead;
use super::machine::{Found, holds, taken_up};
use super::record::{RecordError, RecordFile, Stand};
use super::source::{Lane, SourceHold};
use super::target::{Local, TargetHold};
use super::{Host, READ_BACK, refuse};
use crate::datapath::backlog::SPOOLED_MAX;
use crate::datapath::engine::{Mode, Pin, Port};
use crate::datapath::lane::{Gate, Progress};
use crate::datapath::stats::Drop as Dropped;
use crate::datapath::worker::{Command, Seat};
use crate::ship::Incoming;
use crate::spool::{Kind, Queue, Recovered, Spool, SpoolError, Word, Writer};

/// What is there of a hold.
pub struct Left {
    pub(super) hold: HoldId,
    /// None: it was never opened, or is of a switch that wrote no records.
    pub(super) record: Result<Option<(HoldRecord, Stand, RecordFile)>, RecordError>,
    pub(super) queues: Vec<Recovered>,
    /// Directories of which it is not known whose frames they have.
    strays: Vec<PathBuf>,
    /// What is damaged.
    pub(super) harm: Vec<String>,
}

impl Left {
    /// Of all holds in the spool.
    pub fn read(spool: &Spool, recovered: Vec<Recovered>) -> Result<Vec<Left>, SpoolError> {
        let mut queues: BTreeMap<HoldId, (Vec<Recovered>, Vec<String>)> = BTreeMap::new();
        for r in recovered {
            let hold = r.queue.hold();
            let (queues, harm) = queues.entry(hold).or_default();
            if let Some(d) = r.damaged.first() {
                let more = r.damaged.len() - 1;
                tracing::error!(%hold, "in the spool, and {more} more places: {d}");
                harm.push(d.to_string());
            }
            for b in &r.bad_words {
                if b.lost {
                    tracing::error!(%hold, "in the spool: {b}");
                    harm.push(b.to_string());
                } else {
                    tracing::warn!(%hold, "in the spool: {b}");
                }
            }
            queues.push(r);
        }
        let left = spool.holds()?.into_iter().map(|hold| {
            let (queues, harm) = queues.remove(&hold).unwrap_or_default();
            let record = RecordFile::open(&spool.dir_of(hold), spool.is_durable());
            if let Ok(Some((record, ..))) = &record {
                queues.iter().for_each(|r| know_again(r, record));
            }
            Ok(Left {
                hold,
                record,
                queues,
                strays: spool.strays(hold)?,
                harm,
            })
        });
        left.collect()
    }

    /// Why nobody may touch it, whatever its record says.
    pub(super) fn unreadable(&self) -> Option<String> {
        let dir = self.strays.first()?;
        let what = format!(
            "{}, and {} more: damaged, it is not known whose frames they have",
            dir.display(),
            self.strays.len() - 1
        );
        Some(what)
    }

    /// Frames that were accepted and are not known to be delivered.
    pub(super) fn frames(&self) -> u64 {
        let left = |r: &Recovered| r.queue.last_seq().saturating_sub(r.queue.flushed_seq());
        self.queues.iter().map(left).sum()
    }
}

/// What is not known of a queue that its hold's record says: whether both ends of its lane are in the group.
fn know_again(r: &Recovered, record: &HoldRecord) {
    if r.bad_words.iter().any(|b| b.lost && b.word == Word::Flags) {
        let from = &r.queue.lane().from;
        let inside = from == READ_BACK || record.ports.iter().any(|p| p.name == *from);
        r.queue.set_inside(inside);
    }
}

/// The lanes to the group, by its record; with `own` also the lanes of the group's ports to themselves.
fn recorded(record: &HoldRecord, own: bool) -> Vec<LaneKey> {
    let mut all = Vec::new();
    for to in &record.ports {
        for s in record.seats.iter().filter(|s| own || s.port != to.name) {
            all.extend((0..s.workers.len()).map(|n| LaneKey {
                from: s.port.clone(),
                queue: n as u16,
                to: to.name.clone(),
            }));
        }
    }
    all
}

/// Workers that must be there so that each hold has its seats again.
pub fn workers_of(left: &[Left]) -> usize {
    let records = left.iter().filter_map(|l| l.record.as_ref().ok()?.as_ref());
    let seats = records.flat_map(|(r, ..)| r.seats.iter().flat_map(|s| &s.workers));
    seats.map(|w| *w as usize + 1).max().unwrap_or(0)
}

/// Where everything of a record is on this host now.
struct Places {
    group: Vec<usize>,
    macs: Vec<Option<MacAddr>>,
    pin: Pin,
}

impl Places {
    fn find(host: &Host, record: &HoldRecord) -> Result<Places, Refusal> {
        let mut group = Vec::new();
        for p in &record.ports {
            let (port, is) = port(host, &p.name)?;
            if is.vm.as_ref().is_none_or(|vm| !record.vms.contains(vm)) {
                return Err(gone(&p.name));
            }
            group.push(port);
        }
        Ok(Places {
            group,
            macs: record.ports.iter().map(|p| p.mac).collect(),
            pin: host.pin_again(record),
        })
    }

    /// Who has the lane of this number.
    fn seat(&self, host: &Host, from: &str, number: u16) -> Result<Seat, Refusal> {
        let seats = self.pin.seats(port(host, from)?.0);
        let seat = seats.get(usize::from(number)).or(seats.last()).copied();
        seat.ok_or_else(|| gone(from))
    }
}

fn port<'a>(host: &'a Host, name: &str) -> Result<(usize, &'a Arc<Port>), Refusal> {
    host.engine.port(name).ok_or_else(|| gone(name))
}

fn gone(name: &str) -> Refusal {
    let what = format!(
        "port '{name}' is not configured any more, or for another VM; configure it as it was and start the switch again"
    );
    refuse(RefusalCode::State, what)
}

impl SourceHold {
    /// As it stood. `Err`: it can't be.
    pub fn take_up(
        host: &Host,
        record: &HoldRecord,
        state: HoldState,
        queues: Vec<Recovered>,
        harm: &mut Vec<String>,
    ) -> Result<SourceHold, Refusal> {
        let places = Places::find(host, record)?;
        // Everything that can fail comes first.
        let (mut found, mut spares) = (Vec::new(), Vec::new());
        for r in queues {
            let key = r.queue.lane().clone();
            let to = port(host, &key.to)?.0;
            let seat = match key.from.as_str() {
                READ_BACK => places.seat(host, &key.to, 0)?,
                from => places.seat(host, from, key.queue)?,
            };
            match r.queue.kind() {
                Kind::Source => found.push((key, seat, to, r)),
                _ => spares.push((key, r)),
            }
        }
        if found.len() < record.queues as usize {
            return Err(missing(host, record, &found));
        }
        let outgoing = host.dial_again(record)?;
        let mut hold = SourceHold {
            dead: Dead::default(),
            id: record.hold,
            ran: vec![false; places.group.len()],
            armed: Vec::new(),
            lanes: Vec::new(),
            read_back: Vec::new(),
            outgoing,
            pin: Some(places.pin),
            group: places.group,
            macs: places.macs,
            lost: 0,
            overruns: Vec::new(),
        };
        let ports = &host.engine.shared().ports;
        hold.overruns = ports.iter().map(|p| p.counters.overruns()).collect();
        let mut commands = Vec::new();
        for (key, seat, to, r) in found {
            let spare = spares.iter().position(|(k, _)| *k == key);
            let spare = spare.map(|n| spares.remove(n).1);
            if state == HoldState::Aborting && r.queue.is_sealed() && r.queue.inside() {
                // What comes while a sealed lane is put back waits there.
                let gone = spare.is_none() && key.from != READ_BACK;
                harm.extend(gone.then(|| lost_behind(&key)));
            }
            let lane = hold.lane_again(host, state, key, seat, to, r, spare, &mut commands);
            if lane.key.from == READ_BACK {
                hold.read_back.push(lane);
            } else {
                hold.lanes.push(lane);
            }
        }
        for l in hold.lanes.iter_mut().chain(&mut hold.read_back) {
            l.ship = hold
                .outgoing
                .add_lane(l.key.clone(), l.inside, l.queue.clone());
        }
        hold.outgoing.all_added();
        host.batch(commands)
            .inspect_err(|_| hold.outgoing.close())?;
        hold.modes(host, state);
        hold.arm(host);
        let ports = &host.engine.shared().ports;
        for (n, &g) in hold.group.iter().enumerate() {
            if ports[g].mode() == Mode::Departed {
                hold.is_elsewhere(host, n);
            }
        }
        if state == HoldState::Aborting {
            hold.abort(host)?;
        }
        Ok(hold)
    }

    #[expect(clippy::too_many_arguments, reason = "all that is known of a lane")]
    fn lane_again(
        &self,
        host: &Host,
        state: HoldState,
        key: LaneKey,
        seat: Seat,
        to: usize,
        found: Recovered,
        spare: Option<Recovered>,
        commands: &mut Vec<Command>,
    ) -> Lane {
        let (queue, mut writer) = (found.queue, found.writer);
        let (inside, closed) = (queue.inside(), queue.is_sealed());
        let is_read_back = key.from == READ_BACK;
        let waits = closed || queue.last_seq() > queue.flushed_seq();
        let held = match is_read_back {
            true => closed,
            false => closed || holds(state, inside, waits),
        };
        if closed && !is_read_back {
            let gate = match inside || state == HoldState::Aborting {
                true => Gate::Blocked,
                false => Gate::Closed(Dropped::Late),
            };
            commands.push(Command::Close(seat, to, gate));
        } else if held {
            commands.extend(writer.take().map(|w| Command::Hold(seat, to, w)));
        } else if let Err(e) = host.spool.reserve(&queue, SPOOLED_MAX) {
            tracing::warn!("lane {key}: what waits at the freeze may find no room: {e}");
        }
        let (mut spent, mut again) = (None, None);
        match spare {
            Some(Recovered {
                queue,
                writer: Some(w),
                ..
            }) => again = Some((w, queue)),
            Some(r) => spent = Some(r.queue),
            None if inside && !is_read_back => {
                let made = self.queue(host, Kind::Local, &key);
                again = made.map_err(|e| tracing::warn!("{e}")).ok();
            }
            None => {}
        }
        Lane {
            key,
            seat,
            to,
            inside,
            queue,
            writer,
            spare: again,
            spent,
            ship: 0,
            held,
            closed,
            flushed: None,
            back: None,
            behind: None,
            pending: VecDeque::new(),
            again: 0,
        }
    }

    fn modes(&self, host: &Host, state: HoldState) {
        use HoldState as S;
        for &g in &self.group {
            let mut to_it = self.lanes.iter().filter(|l| l.to == g);
            let mode = match state {
                S::Open | S::FrozenInside => Mode::Live,
                S::Departed => Mode::Departed,
                S::Departing if to_it.all(|l| l.closed) => Mode::Departed,
                S::Departing => Mode::Departing,
                _ => Mode::Held,
            };
            host.engine.shared().ports[g].set_mode(mode);
        }
    }
}

impl TargetHold {
    /// As it stood, and in which state that is. `Err`: it can't be.
    pub fn take_up(
        host: &Host,
        record: &HoldRecord,
        stand: &Stand,
        queues: Vec<Recovered>,
        harm: &mut Vec<String>,
    ) -> Result<(TargetHold, HoldState), Refusal> {
        let places = Places::find(host, record)?;
        let incoming = host.incoming(record.hold, record.ticket, &record.peer, &places.group);
        let mut mine = BTreeMap::new();
        let (mut shipped, mut complete) = (0, true);
        for r in queues {
            if r.queue.kind() == Kind::Incoming {
                shipped += 1;
                let intact = r.damaged.is_empty();
                complete &= intact && (r.queue.is_sealed() || !r.queue.inside());
                incoming.adopt(r);
            } else {
                mine.insert(r.queue.lane().clone(), r);
            }
        }
        let found = Found {
            complete: complete && shipped >= stand.named,
        };
        let state = taken_up(record.role, stand.state, found);
        if state == HoldState::Draining && shipped < stand.named {
            harm.push(lost_lanes(stand.named - shipped, stand.named, &incoming));
        }
        let ports = &host.engine.shared().ports;
        let mut local = Vec::new();
        for &to in &places.group {
            for (n, seat) in
                (0..ports.len()).flat_map(|from| places.pin.seats(from).into_iter().enumerate())
            {
                let key = LaneKey {
                    from: ports[seat.port].name.clone(),
                    queue: n as u16,
                    to: ports[to].name.clone(),
                };
                let (writer, queue) = match mine.remove(&key) {
                    Some(r) => (r.writer, r.queue),
                    // Never on the disk, and the host was without power; or the port is new.
                    None => {
                        // Before the commit nothing comes there.
                        let had =
                            state == HoldState::Draining && recorded(record, true).contains(&key);
                        harm.extend(had.then(|| lost_behind(&key)));
                        local_queue(host, record.hold, &key)?
                    }
                };
                local.push(Local {
                    seat,
                    first: n == 0,
                    to,
                    key,
                    writer,
                    queue,
                    progress: Arc::new(Progress::default()),
                });
            }
        }
        if let Some((key, _)) = mine.iter().find(|(_, r)| r.queue.last_seq() > 0) {
            return Err(gone(&key.from));
        }
        let mut hold = TargetHold {
            dead: Dead::default(),
            id: record.hold,
            group: places.group,
            macs: places.macs,
            incoming,
            pin: Some(places.pin),
            local,
            flushed: Vec::new(),
            lost: stand.lost,
            overruns: Vec::new(),
        };
        hold.stand_by(host);
        if state == HoldState::Draining {
            hold.commit(host)?;
            if stand.announced {
                let hears = |&g: &usize| ports[g].set_hears_uplink(true);
                hold.group.iter().for_each(hears);
            }
        }
        host.expect(&hold.incoming);
        Ok((hold, state))
    }
}

/// A source has fewer queues than its record says.
fn missing(
    host: &Host,
    record: &HoldRecord,
    found: &[(LaneKey, Seat, usize, Recovered)],
) -> Refusal {
    let taps = record.ports.iter().filter(|p| {
        let port = host.engine.port(&p.name);
        port.is_some_and(|(n, _)| host.taps.contains_key(&n))
    });
    let read_back = taps.map(|p| LaneKey {
        from: READ_BACK.into(),
        queue: 0,
        to: p.name.clone(),
    });
    let all = recorded(record, false).into_iter().chain(read_back);
    let gone: Vec<String> = all
        .filter(|key| found.iter().all(|f| f.0 != *key))
        .map(|key| key.to_string())
        .collect();
    let what = format!(
        "{} of its {} queues are not in the spool any more ({}): what was held there is lost; put their directories back and start the switch again",
        record.queues as usize - found.len(),
        record.queues,
        gone.join(", ")
    );
    refuse(RefusalCode::State, what)
}

/// Behind the commit: lanes that the source had named, by their number; which are there says which are not.
fn lost_lanes(gone: u32, named: u32, incoming: &Incoming) -> String {
    let there = incoming.lanes();
    let there: Vec<_> = there.iter().map(|l| l.key.to_string()).collect();
    let what = format!(
        "{gone} of the {named} lanes that the source has named are not in the spool any more (there: {}); what was held there and not delivered is lost here, unless the source, which has it until the release, ships it once more (then start the switch again), or their directories come back",
        match there.is_empty() {
            true => "none".to_owned(),
            false => there.join(", "),
        }
    );
    tracing::error!("{what}");
    what
}

fn lost_behind(key: &LaneKey) -> String {
    let what = format!(
        "{key}: the queue of what came behind older frames is not in the spool any more; what waited there is lost"
    );
    tracing::error!("{what}");
    what
}

fn local_queue(
    host: &Host,
    hold: HoldId,
    key: &LaneKey,
) -> Result<(Option<Writer>, Arc<Queue>), Refusal> {
    let made = host.spool.create(hold, Kind::Local, key);
    let made = made.and_then(|(writer, queue)| queue.sync().map(|()| (writer, queue)));
    let (writer, queue) =
        made.map_err(|e| refuse(RefusalCode::Resources, format!("no spool for {key}: {e}")))?;
    Ok((Some(writer), queue))
}
