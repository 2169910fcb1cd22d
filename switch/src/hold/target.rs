//! The target's end of a hold.
//!
//! What was shipped is older than anything that arrives here, so a lane opens only behind it:
//! * a lane between two VMs of the group drains its own shipped queue first;
//! * everything else that the source held for a VM (from its network, from other VMs there) drains on one carrier, the
//!   lane from our uplink; every other lane to that VM waits for it;
//! * what a paused VM's TAP queue held is older still: it drains on the VM's lane to itself, and all others wait.
//!
//! Where several workers have lanes of one port, the first of them drains what was shipped, and the others wait for it.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use gangway_shared::api::{
    HoldState, IncomingPrepare, LaneInfo, Refusal, RefusalCode, Role, Tally,
};
use gangway_shared::id::{HoldId, LaneKey, MacAddr};
use gangway_shared::ledger::{LaneKind, Stage as At};
use gangway_shared::record::HoldRecord;

use super::Host;
use super::book::book;
use super::dead::Dead;
use super::record::RecordFile;
use super::source::{behind, overruns};
use super::{READ_BACK, refuse};
use crate::datapath::engine::{Mode, Pin};
use crate::datapath::lane::{Behind, Drain, Progress, Source as Older, Stage};
use crate::datapath::parse;
use crate::datapath::reading::Reading;
use crate::datapath::worker::{Command, Seat};
use crate::ledger::{Book, counted};
use crate::port::{Frame, Sent, VnetHdr};
use crate::ship::{Incoming, IncomingLane};
use crate::spool::{Kind, Queue, Writer, sync_all};

pub(super) struct Local {
    pub(super) seat: Seat,
    /// Of the port's seats.
    pub(super) first: bool,
    pub(super) to: usize,
    pub(super) key: LaneKey,
    pub(super) writer: Option<Writer>,
    pub(super) queue: Arc<Queue>,
    pub(super) progress: Arc<Progress>,
}

/// Target's end.
pub struct TargetHold {
    pub(super) id: HoldId,
    pub(super) group: Vec<usize>,
    pub(super) macs: Vec<Option<MacAddr>>,
    pub(super) incoming: Arc<Incoming>,
    /// Until the end: the local lanes are all there are.
    pub(super) pin: Option<Pin>,
    pub(super) local: Vec<Local>,
    /// Of each shipped lane, once committed.
    pub(super) flushed: Vec<(LaneKey, Arc<Progress>)>,
    pub(super) dead: Dead,
    /// Frames that could not be held, as an earlier run had counted them.
    pub(super) lost: u64,
    /// What sockets had dropped at the commit, by port: from there on they wait for lanes.
    pub(super) overruns: Vec<u64>,
}

impl TargetHold {
    /// Claims the ports, makes room for what arrives while they drain, and writes it down.
    pub fn prepare(
        host: &Host,
        args: &IncomingPrepare,
        group: Vec<usize>,
    ) -> Result<(TargetHold, RecordFile), Refusal> {
        let shared = host.engine.shared();
        let ports = &shared.ports;
        if !host.spool.queues(args.hold).is_empty() {
            let what = format!(
                "frames of hold {} are in the spool from an earlier run",
                args.hold
            );
            return Err(refuse(RefusalCode::Busy, what));
        }
        let pin = host.engine.pin();
        let seats = (0..ports.len()).flat_map(|from| pin.seats(from).into_iter().enumerate());
        let seats: Vec<(usize, Seat)> = seats.collect();
        let mut local = Vec::new();
        for &to in &group {
            for &(n, seat) in &seats {
                let key = LaneKey {
                    from: ports[seat.port].name.clone(),
                    queue: n as u16,
                    to: ports[to].name.clone(),
                };
                match host.spool.create(args.hold, Kind::Local, &key) {
                    Ok((writer, queue)) => {
                        let progress = Arc::new(Progress::default());
                        local.push(Local {
                            seat,
                            first: n == 0,
                            to,
                            key,
                            writer: Some(writer),
                            queue,
                            progress,
                        });
                    }
                    Err(e) => {
                        host.free_spool(args.hold);
                        return Err(refuse(
                            RefusalCode::Resources,
                            format!("no spool for {key}: {e}"),
                        ));
                    }
                }
            }
        }
        // Before the record: words that were never written come back from a loss of power as zeros, and would pass as lost.
        let queues: Vec<_> = local.iter().map(|l| l.queue.clone()).collect();
        if let Err(e) = sync_all(&queues) {
            host.free_spool(args.hold);
            return Err(refuse(RefusalCode::Resources, format!("the spool: {e}")));
        }
        let macs: Vec<_> = group
            .iter()
            .map(|&g| {
                args.ports
                    .iter()
                    .find(|p| p.name == ports[g].name)
                    .and_then(|p| p.mac)
            })
            .collect();
        let (held, seats) = host.places(&group, &macs, &pin);
        let record = HoldRecord {
            hold: args.hold,
            role: Role::Target,
            vms: args.vms.clone(),
            peer: args.source_host.clone(),
            address: String::new(),
            ticket: args.ticket,
            ports: held,
            seats,
            queues: local.len() as u32,
        };
        let file = host
            .write_down(&record, HoldState::Prepared)
            .inspect_err(|_| host.free_spool(args.hold))?;
        let hold = TargetHold {
            dead: Dead::default(),
            id: args.hold,
            incoming: host.incoming(args.hold, args.ticket, &args.source_host, &group),
            group,
            macs,
            pin: Some(pin),
            local,
            flushed: Vec::new(),
            lost: 0,
            overruns: Vec::new(),
        };
        hold.stand_by(host);
        host.expect(&hold.incoming);
        Ok((hold, file))
    }

    /// The ports are claimed, and get nothing.
    pub(super) fn stand_by(&self, host: &Host) {
        let shared = host.engine.shared();
        for &g in &self.group {
            shared.ports[g].set_mode(Mode::Standby);
            shared.ports[g].set_hears_uplink(false);
            shared.fdb.forget_port(g);
        }
    }

    /// Lanes that the source has named.
    pub fn named(&self) -> u32 {
        self.incoming.lanes().len() as u32
    }

    /// All lanes that must be complete before a VM may run are here, and agree with the source.
    pub fn restore(&self, timeout: Duration) -> Result<(), Refusal> {
        let until = Instant::now() + timeout;
        self.not_put_back()?;
        loop {
            // Before the lanes: those that are named when this is true are all.
            let named = self.incoming.is_named();
            let lanes = self.incoming.lanes();
            if let Some(l) = lanes.iter().find(|l| l.mismatch.is_some()) {
                let why = l.mismatch.clone().unwrap_or_default();
                return Err(refuse(
                    RefusalCode::Peer,
                    format!("lane {} differs from the source's: {why}", l.key),
                ));
            }
            let open: Vec<String> = lanes
                .iter()
                .filter(|l| l.inside && !l.complete)
                .map(|l| l.key.to_string())
                .collect();
            if open.is_empty() && named {
                return Ok(());
            }
            if Instant::now() >= until {
                let what = if lanes.is_empty() {
                    "no shipment".into()
                } else if open.is_empty() {
                    "the source has not named all lanes".into()
                } else {
                    format!("incomplete: {}", open.join(", "))
                };
                return Err(refuse(
                    RefusalCode::State,
                    format!("{what}; seal the hold at the source first"),
                ));
            }
            std::thread::sleep(Duration::from_micros(500));
        }
    }

    fn not_put_back(&self) -> Result<(), Refusal> {
        if self.incoming.is_aborted() {
            return Err(refuse(
                RefusalCode::State,
                "the source has put everything back; abort here, too",
            ));
        }
        Ok(())
    }

    /// The ports go live; lanes drain as the guests take frames.
    pub fn commit(&mut self, host: &Host) -> Result<(), Refusal> {
        self.not_put_back()?;
        // Behind the commit nobody goes back: what is still to come would wait for room, and its senders with it.
        if let Some(why) = host.spool.trouble(Some(self.id)) {
            let what = format!(
                "the spool of host {} has no room for what is still to come of hold {}: {why}; make room there, and migrate again",
                host.config.name, self.id
            );
            return Err(refuse(RefusalCode::Resources, what));
        }
        host.spool.only_forward(self.id);
        let shared = host.engine.shared();
        let uplink = shared.ports.iter().position(|p| p.uplink);
        let shipped = self.incoming.lanes();
        let mut commands = Vec::new();
        for i in 0..self.group.len() {
            self.commit_port(host, self.group[i], uplink, &shipped, &mut commands);
        }
        self.overruns = shared.ports.iter().map(|p| p.counters.overruns()).collect();
        host.batch(commands)?;
        for (&g, mac) in self.group.iter().zip(&self.macs) {
            shared.ports[g].set_mode(Mode::Held);
            if let Some(mac) = mac {
                shared.fdb.set(*mac, g, true, shared.now_s());
            }
        }
        Ok(())
    }

    fn commit_port(
        &mut self,
        host: &Host,
        to: usize,
        uplink: Option<usize>,
        shipped: &[IncomingLane],
        commands: &mut Vec<Command>,
    ) {
        let ports = &host.engine.shared().ports;
        let name = &ports[to].name;
        let mine = || shipped.iter().filter(|l| l.key.to == *name);
        let inside_from = |l: &IncomingLane| -> Option<usize> {
            let from = ports.iter().position(|p| p.name == l.key.from)?;
            (l.inside && self.group.contains(&from)).then_some(from)
        };
        let read_back = mine()
            .any(|l| l.key.from == READ_BACK)
            .then(|| Arc::new(AtomicBool::new(false)));
        let outside = Arc::new(AtomicBool::new(false));
        // The carrier is the uplink's lane; on a host without one, the VM's lane to itself, which nothing else uses.
        let carrier = uplink.unwrap_or(to);
        let mut flushed = Vec::new();
        let mut older = |l: &IncomingLane| {
            let progress = Arc::new(Progress::default());
            flushed.push((l.key.clone(), progress.clone()));
            Older::new(&l.queue, progress)
        };
        // Of each port with several seats: set when its first seat has drained what came from there.
        let mut inside: HashMap<usize, Arc<AtomicBool>> = HashMap::new();
        for local in self.local.iter_mut().filter(|l| l.to == to) {
            let writer = local.writer.take();
            if writer.is_none() && !local.queue.is_sealed() {
                continue;
            }
            let from = local.seat.port;
            // An earlier run that has sealed it had waited.
            let waits = writer.is_some();
            let mut before = read_back.clone();
            let mut wait = None;
            let mut stages: VecDeque<Stage> = VecDeque::new();
            let mut stage =
                |which: &dyn Fn(&&IncomingLane) -> bool, done: &Arc<AtomicBool>| Stage {
                    sources: mine().filter(which).map(&mut older).collect(),
                    done: Some(done.clone()),
                    reading: waits.then(Reading::default),
                };
            if let Some(done) = before.take_if(|_| from == to && local.first) {
                stages.push_back(stage(&|l| l.key.from == READ_BACK, &done));
            }
            if from == carrier && local.first {
                let is_out =
                    |l: &&IncomingLane| l.key.from != READ_BACK && inside_from(l).is_none();
                stages.push_back(stage(&is_out, &outside));
            } else if self.group.contains(&from) && from != to {
                let flag = inside.entry(from).or_default().clone();
                if local.first {
                    stages.push_back(stage(&|l| inside_from(l) == Some(from), &flag));
                } else {
                    wait = Some(flag);
                }
            } else if from != to || from == carrier {
                wait = Some(outside.clone());
            }
            if waits && !stages.is_empty() {
                // The guest may have frames in its queues that it had not read when it stopped, and they may not be those that
                // ours for the same flows take.
                stages.push_front(Stage {
                    reading: Some(Reading::default()),
                    ..Stage::default()
                });
            }
            let own = Older::new(&local.queue, local.progress.clone());
            let behind = match writer {
                Some(writer) => Some(Behind { writer, local: own }),
                // An earlier run had all but delivered it.
                None => {
                    stages.push_back(Stage {
                        sources: vec![own],
                        ..Stage::default()
                    });
                    None
                }
            };
            let drain = Drain {
                before,
                older: stages,
                wait,
                behind,
                ended: Vec::new(),
            };
            commands.push(Command::Drain(local.seat, to, Box::new(drain)));
        }
        self.flushed.extend(flushed);
    }

    /// Tells the network where the VMs are. To be repeated: an announcement can get lost.
    pub fn announce(&self, host: &Host) -> usize {
        let ports = &host.engine.shared().ports;
        let mut sent = 0;
        for (&g, mac) in self.group.iter().zip(&self.macs) {
            // From here on the network's broadcasts are ours to deliver.
            ports[g].set_hears_uplink(true);
            let Some(mac) = mac else { continue };
            let bytes = parse::rarp(*mac);
            let frame = Frame::from_slice(VnetHdr::default(), &bytes);
            for p in ports.iter().filter(|p| p.uplink) {
                if let Some(tx) = p.tx(0).as_mut() {
                    sent += usize::from(tx.send(&frame) == Sent::Yes);
                    tx.flush();
                    std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
                    tx.settle();
                }
            }
        }
        sent
    }

    /// Behind the commit: gives up what waits for VMs that have died.
    pub fn give_up_the_dead(&mut self, host: &Host) {
        for &g in &self.group {
            self.dead.give_up(host, self.id, g);
        }
    }

    /// True once every lane forwards; the ports are plain ports then.
    pub fn drained(&self, host: &Host) -> bool {
        let ports = &host.engine.shared().ports;
        let is_there = |&g: &usize| ports[g].is_up() || ports[g].mode() == Mode::Lost;
        let done = self.local.iter().all(|l| l.progress.finished())
            && self.group.iter().all(is_there)
            && self.undrained().is_empty();
        if done {
            for &g in &self.group {
                ports[g].set_hears_uplink(true);
                ports[g].be_patient(host.engine.shared().now_s());
                ports[g].set_mode(Mode::Live);
            }
        }
        done
    }

    /// Behind the commit: lanes with frames that were not there when it was settled what drains. Their queues had got lost, and the source
    /// has shipped them once more; the next start finds them.
    fn undrained(&self) -> Vec<LaneKey> {
        if self.local.iter().any(|l| l.writer.is_some()) {
            return Vec::new();
        }
        let shipped = self.incoming.lanes().into_iter();
        shipped
            .filter(|l| l.queue.last_seq() > 0 && self.flushed.iter().all(|(k, _)| *k != l.key))
            .map(|l| l.key)
            .collect()
    }

    /// Before the commit: forgets everything; the ports are free again.
    pub fn abort(&mut self, host: &Host) {
        self.release(host);
        for &g in &self.group {
            host.engine.shared().ports[g].set_hears_uplink(true);
            host.engine.shared().ports[g].set_mode(Mode::Live);
        }
    }

    /// Frees the spool.
    pub fn release(&mut self, host: &Host) {
        self.incoming.stop();
        host.unexpect(self.id);
        self.local.iter_mut().for_each(|l| l.writer = None);
        self.pin = None;
        host.free_spool(self.id);
    }

    /// Group's ports.
    pub fn group(&self) -> &[usize] {
        &self.group
    }

    /// Frames that could not be held since the commit, in earlier runs, too: what sockets have dropped, for whomever.
    pub fn lost(&self, host: &Host) -> u64 {
        self.lost + overruns(host, &self.overruns).iter().sum::<u64>()
    }

    /// For status and report. What could not be held stands at the first lane from outside.
    pub fn lanes(&self, host: &Host) -> Vec<LaneInfo> {
        let behind = |key: &LaneKey| {
            self.local
                .iter()
                .find(|l| l.key == *key)
                .map_or(0, |l| l.queue.tally().frames)
        };
        let info = |l: IncomingLane| LaneInfo {
            sealed: l.complete,
            held: l.queue.tally(),
            shipped: l.acked,
            flushed: self
                .flushed
                .iter()
                .find(|(k, _)| *k == l.key)
                .map_or(Tally::default(), |(_, p)| p.tally()),
            queued_behind: behind(&l.key),
            dropped: 0,
            lane: l.key,
        };
        let shipped = self.incoming.lanes();
        let outside = shipped.iter().position(|l| !l.inside).unwrap_or(0);
        let mut lanes: Vec<LaneInfo> = shipped.into_iter().map(info).collect();
        if let Some(l) = lanes.get_mut(outside) {
            l.dropped = self.lost(host);
        }
        lanes
    }

    /// For the ledger.
    pub fn books(&self, host: &Host) -> Vec<Book> {
        let mut books = Vec::new();
        for (l, info) in self.incoming.lanes().into_iter().zip(self.lanes(host)) {
            let mut b = book(&l.key, LaneKind::Shipped, l.inside);
            b.lane.dropped = info.dropped;
            b.note(At::Receive, counted(l.queue.progress()));
            if let Some((_, p)) = self.flushed.iter().find(|(k, _)| *k == l.key) {
                b.drained(p);
            }
            b.again = Some((l.queue, At::Store));
            books.push(b);
        }
        books.extend(
            self.local
                .iter()
                .filter_map(|l| behind(&l.queue, &l.progress)),
        );
        books
    }

    /// Trouble with the shipment.
    pub fn error(&self) -> Option<String> {
        let late = self.undrained();
        let late = (!late.is_empty()).then(|| {
            let all: Vec<_> = late.iter().map(LaneKey::to_string).collect();
            format!(
                "{}: shipped once more, for what had come before was not in the spool any more; start this switch again to have it delivered",
                all.join(", ")
            )
        });
        late.or_else(|| self.incoming.error())
    }
}
