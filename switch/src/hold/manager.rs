//! Answers the control requests that concern ports, links and holds.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use gangway_shared::api::{
    HoldInfo, HoldOpen, HoldState, IncomingPrepare, Refusal, RefusalCode, Reply, Request, Role,
    Scope,
};
use gangway_shared::config::valid::Overdue;
use gangway_shared::id::HoldId;

use super::entry::{End, Hold, info};
use super::machine::{Event, Verdict, step};
use super::record::Stand;
use super::restart::Left;
use super::source::SourceHold;
use super::target::TargetHold;
use super::{book, listing, refuse, workers};
use crate::control::Handler;
use crate::datapath::worker::now_ns;
use crate::spool::Kind;

pub use super::host::Host;

/// How long a restore waits for the last acknowledgements.
const RESTORE: Duration = Duration::from_secs(5);
/// How long frames wait for a VM that is stopped when its hold was put back.
const AWAIT_VM: Duration = Duration::from_secs(30);
/// How long a source that was restarted behind its last acknowledgement waits for its repetition.
const HEAR: Duration = Duration::from_secs(2);
/// How often it is looked for VMs that have died behind their arrival.
const DIED: Duration = Duration::from_millis(250);
/// How often a hold that moves by itself is looked at.
const TICK: Duration = Duration::from_millis(1);
/// When that is tried again which has failed.
const RETRY: Duration = Duration::from_millis(100);
/// When an announcement is repeated, after the first.
const ANNOUNCE_AGAIN_MS: [u64; 5] = [20, 80, 200, 500, 1000];
/// Ended holds that are remembered for reports.
const KEEP: usize = 64;
/// Holds of which only is remembered that they were ended.
const ENDED: usize = 1024;

/// See the module.
pub struct Manager {
    host: Arc<Host>,
    holds: Mutex<BTreeMap<HoldId, Arc<Mutex<Hold>>>>,
    /// Aborted without having been known here: an order to open one of them that comes now was late. In memory is
    /// enough: what was on its way to this process dies with it.
    ended: Mutex<VecDeque<HoldId>>,
    /// Of an earlier run, not taken up, and why.
    left: Mutex<BTreeMap<HoldId, String>>,
    /// Opening is done by one at a time, so that two holds cannot claim the same port.
    opening: Mutex<()>,
    start: Instant,
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

type Answer = Result<Reply, Refusal>;

impl Manager {
    /// No holds yet.
    pub fn new(host: Host) -> Manager {
        Manager {
            host: Arc::new(host),
            holds: Mutex::default(),
            ended: Mutex::default(),
            left: Mutex::default(),
            opening: Mutex::default(),
            start: Instant::now(),
        }
    }

    /// Takes up what an earlier run has left. Before any port is attached, and before control answers.
    pub fn take_up(&self, left: Vec<Left>) {
        for mut l in left {
            let (hold, frames) = (l.hold, l.frames());
            if let Some(why) = l.unreadable() {
                self.leave(hold, frames, &why);
                continue;
            }
            match l.record {
                Ok(Some((record, stand, file))) => {
                    let taken = match record.role {
                        Role::Source => {
                            let state = stand.state;
                            SourceHold::take_up(&self.host, &record, state, l.queues, &mut l.harm)
                                .map(|mut s| {
                                    s.lost = stand.lost;
                                    (End::Source(s), state)
                                })
                        }
                        Role::Target => {
                            let host = &self.host;
                            TargetHold::take_up(host, &record, &stand, l.queues, &mut l.harm)
                                .map(|(t, state)| (End::Target(t), state))
                        }
                    };
                    match taken {
                        Ok((end, state)) => {
                            tracing::warn!(%hold, "taken up: {state:?} on the {:?}, {frames} frames wait", record.role);
                            let mut i = info(hold, record.role, state, record.vms, record.peer);
                            (i.frozen_ns, i.thawed_ns, i.drained_ns) =
                                (stand.frozen_ns, stand.thawed_ns, stand.drained_ns);
                            let mut x = Hold::new(i, end, stand, file);
                            x.harm = l.harm;
                            lock(&self.holds).insert(hold, Arc::new(Mutex::new(x)));
                            self.go_on(hold, state, &stand);
                        }
                        Err(e) => self.leave(hold, frames, &e.to_string()),
                    }
                }
                // Its opening was not answered, so nothing was ever held.
                Ok(None) if frames == 0 => {
                    drop(l.queues);
                    self.host.free_spool(hold);
                }
                Ok(None) => self.leave(hold, frames, "there is no record of it"),
                Err(e) => self.leave(hold, frames, &e.to_string()),
            }
        }
    }

    /// Says which holds are overdue, and puts those back that may be, if the configuration wants it; writes down what uplinks have lost.
    pub fn look(&self, now: Instant) {
        let limits = &self.host.config.hold;
        for (id, h) in self.all() {
            // One that is busy is asked for.
            let Ok(mut h) = h.try_lock() else { continue };
            h.note_lost(&self.host);
            h.say_overdue(limits, now);
            let Some(why) = h.overdue(limits, now) else {
                continue;
            };
            if limits.then != Overdue::PutBack || !h.may_time_out(&self.host) {
                continue;
            }
            let mut follow = false;
            let done = h.step(&self.host, Event::TimedOut, |end, info| {
                follow = put_back(&self.host, end, info)?;
                Ok(None)
            });
            match done {
                Ok(_) => {
                    h.timed_out = Some(format!("this host has put it back: {why}"));
                    tracing::warn!(hold = %id, "put back: {why}");
                }
                Err(e) => h.fails(0, &e.message),
            }
            drop(h);
            if follow {
                self.watch_put_back(id);
            }
        }
    }

    fn all(&self) -> Vec<(HoldId, Arc<Mutex<Hold>>)> {
        let holds = lock(&self.holds);
        holds.iter().map(|(id, h)| (*id, h.clone())).collect()
    }

    /// For the host's listing.
    fn holds_overdue(&self) -> Option<String> {
        let late = |(id, h): (HoldId, Arc<Mutex<Hold>>)| {
            let h = h.try_lock().ok()?;
            let why = h.overdue(&self.host.config.hold, Instant::now())?;
            Some(format!(
                "hold {id} ({:?} on the {:?}): {why}",
                h.info.state, h.info.role
            ))
        };
        let all: Vec<_> = self.all().into_iter().filter_map(late).collect();
        (!all.is_empty()).then(|| all.join("; "))
    }

    #[cfg(test)]
    pub(super) fn overdue_at(&self, hold: HoldId, now: Instant) -> Option<String> {
        lock(&*self.find(hold).ok()?).overdue(&self.host.config.hold, now)
    }

    #[cfg(test)]
    pub(super) fn record_fails(&self, hold: HoldId, fails: bool) {
        let h = self.find(hold).expect("it is known");
        let mut h = lock(&h);
        h.file.as_mut().expect("it has a record").fail(fails);
    }

    /// As if the process had died: shipments end without a word, nothing is put back.
    #[cfg(test)]
    pub(super) fn vanish(&self) {
        for (id, h) in std::mem::take(&mut *lock(&self.holds)) {
            match &lock(&h).end {
                End::Source(s) => s.vanish(),
                End::Target(_) => self.host.unexpect(id),
                End::Over => {}
            }
        }
    }

    fn leave(&self, hold: HoldId, frames: u64, why: &str) {
        tracing::error!(%hold, "NOT taken up, {frames} frames stay in the spool: {why}");
        let what = format!("{frames} frames of an earlier run are in the spool: {why}");
        lock(&self.left).insert(hold, what);
    }

    /// Of holds that were not taken up.
    fn left_over(&self) -> Option<String> {
        let left = lock(&self.left);
        let all: Vec<_> = left
            .iter()
            .map(|(h, why)| format!("hold {h}: {why}"))
            .collect();
        (!all.is_empty()).then(|| all.join("; "))
    }

    fn find(&self, id: HoldId) -> Result<Arc<Mutex<Hold>>, Refusal> {
        if let Some(hold) = lock(&self.holds).get(&id) {
            return Ok(hold.clone());
        }
        Err(match lock(&self.left).get(&id) {
            Some(why) => refuse(
                RefusalCode::State,
                format!("hold {id} could not be taken up: {why}"),
            ),
            None => refuse(RefusalCode::Unknown, format!("no hold {id} on this host")),
        })
    }

    /// Ports of the VMs, checked to be free.
    fn claim(&self, vms: &[String]) -> Result<Vec<usize>, Refusal> {
        let ports = &self.host.engine.shared().ports;
        let mut group = Vec::new();
        for vm in vms {
            let mine: Vec<usize> = (0..ports.len())
                .filter(|&p| ports[p].vm.as_ref() == Some(vm))
                .collect();
            if mine.is_empty() {
                let host = &self.host.config.name;
                return Err(refuse(
                    RefusalCode::Unknown,
                    format!("host {host} has no port for a VM '{vm}'"),
                ));
            }
            group.extend(mine);
        }
        for (_, h) in self.all() {
            let h = lock(&h);
            if let Some(p) = group.iter().find(|p| !h.is_over() && h.group().contains(p)) {
                let what = format!(
                    "port {} is taken by hold {} ({:?})",
                    ports[*p].name, h.info.hold, h.info.state
                );
                return Err(refuse(RefusalCode::Busy, what));
            }
        }
        Ok(group)
    }

    /// A hold that was opened and written down; not if it was aborted meanwhile.
    fn keep(&self, hold: Hold) -> Answer {
        let mut holds = lock(&self.holds);
        let id = hold.info.hold;
        if lock(&self.ended).contains(&id) {
            match hold.end {
                End::Source(mut s) => s.cancel(&self.host),
                End::Target(mut t) => t.abort(&self.host),
                End::Over => {}
            }
            return Err(late(id));
        }
        if holds.len() >= KEEP {
            // One that is busy at the moment, or still waits for a VM, is not over.
            let over =
                |h: &Arc<Mutex<Hold>>| h.try_lock().is_ok_and(|h| h.is_over() && !h.is_armed());
            if let Some(old) = holds.iter().find(|(_, h)| over(h)).map(|(id, _)| *id) {
                holds.remove(&old);
            }
        }
        let reply = Reply::Hold(hold.info.clone());
        holds.insert(id, Arc::new(Mutex::new(hold)));
        Ok(reply)
    }

    /// The answer to an order to open a hold that is known already: a repetition is answered as the first was, another
    /// order under the same number is refused.
    fn again(&self, id: HoldId, role: Role, vms: &[String], peer: &str) -> Option<Answer> {
        if lock(&self.ended).contains(&id) {
            return Some(Err(late(id)));
        }
        let h = lock(&self.holds).get(&id).cloned()?;
        let h = lock(&h);
        let i = &h.info;
        let set = |vms: &[String]| vms.iter().cloned().collect::<BTreeSet<_>>();
        let same = i.role == role && i.peer == peer && set(&i.vms) == set(vms);
        Some(if same && !h.is_over() {
            Ok(Reply::Hold(h.snapshot(&self.host)))
        } else {
            let what = format!(
                "hold {id} exists already: {:?} on the {:?}, of {}, with host {}; this order is for the {role:?}, {}, with host {peer}",
                i.state,
                i.role,
                i.vms.join(", "),
                i.peer,
                vms.join(", "),
            );
            Err(refuse(RefusalCode::Busy, what))
        })
    }

    fn open(&self, args: HoldOpen) -> Answer {
        let _one = lock(&self.opening);
        if let Some(a) = self.again(args.hold, Role::Source, &args.vms, &args.target_host) {
            return a;
        }
        let group = self.claim(&args.vms)?;
        let (end, file) = SourceHold::open(&self.host, &args, group)?;
        tracing::info!(hold = %args.hold, "opened towards {}: {}", args.target_host, args.vms.join(", "));
        let (id, state) = (args.hold, HoldState::Open);
        let i = info(id, Role::Source, state, args.vms, args.target_host);
        let stand = Stand::new(state);
        let reply = self.keep(Hold::new(i, End::Source(end), stand, file))?;
        self.go_on(id, state, &stand);
        Ok(reply)
    }

    /// What a hold in this state does by itself.
    fn go_on(&self, id: HoldId, state: HoldState, stand: &Stand) {
        match state {
            HoldState::Open | HoldState::FrozenInside => self.watch_open(id),
            HoldState::Departing => self.watch_departing(id, stand.grace_ms),
            HoldState::Aborting => self.watch_put_back(id),
            HoldState::Draining => {
                self.watch_draining(id);
                if stand.announced {
                    self.announce_again(id);
                }
            }
            _ => {}
        }
    }

    /// A VM that stops before the freeze (its migration converged by itself, its coordinator died): what comes for it
    /// is held from then on, as if the coordinator had asked.
    fn watch_open(&self, id: HoldId) {
        self.follow(id, |host, h| {
            let early = matches!(h.info.state, HoldState::Open | HoldState::FrozenInside);
            let End::Source(s) = &mut h.end else {
                return Ok(true);
            };
            if early && s.stopped(host) {
                // Cut again if it can't be written down: what is held by then stays so.
                h.step(host, Event::Freeze(Scope::All), |end, info| {
                    cut(host, end, info, Scope::All)
                })?;
                tracing::info!(hold = %h.info.hold, "a VM has stopped by itself: frozen");
                if let End::Source(s) = &mut h.end
                    && let Err(e) = s.read_back_stopped(host)
                {
                    tracing::warn!(hold = %h.info.hold, "{e}");
                }
            }
            Ok(!early)
        });
    }

    fn prepare(&self, args: IncomingPrepare) -> Answer {
        let _one = lock(&self.opening);
        if let Some(a) = self.again(args.hold, Role::Target, &args.vms, &args.source_host) {
            return a;
        }
        let group = self.claim(&args.vms)?;
        let ports = &self.host.engine.shared().ports;
        for p in &args.ports {
            if !group
                .iter()
                .any(|&g| ports[g].name == p.name && ports[g].vm.as_ref() == Some(&p.vm))
            {
                let what = format!(
                    "host {} has no port '{}' for VM '{}'; give it one in its configuration",
                    self.host.config.name, p.name, p.vm
                );
                return Err(refuse(RefusalCode::Unknown, what));
            }
        }
        if let Some(&g) = group
            .iter()
            .find(|&&g| ports[g].kind == "vhost-user" && ports[g].is_up())
        {
            let what = format!(
                "port {} is up: VM '{}' runs here already",
                ports[g].name,
                ports[g].vm.clone().unwrap_or_default()
            );
            return Err(refuse(RefusalCode::Busy, what));
        }
        let (end, file) = TargetHold::prepare(&self.host, &args, group)?;
        tracing::info!(hold = %args.hold, "expecting {} from {}", args.vms.join(", "), args.source_host);
        let state = HoldState::Prepared;
        let i = info(args.hold, Role::Target, state, args.vms, args.source_host);
        self.keep(Hold::new(i, End::Target(end), Stand::new(state), file))
    }

    /// An order of the coordinator's: see [`Hold::step`].
    fn advance(
        &self,
        id: HoldId,
        event: Event,
        act: impl FnOnce(&mut End, &mut HoldInfo) -> Result<Option<Reply>, Refusal>,
    ) -> Answer {
        let h = self.find(id)?;
        let mut h = lock(&h);
        let reply = h.step(&self.host, event, act);
        // Now, not when it came: it may have taken a while.
        h.is_asked();
        Ok(reply?.unwrap_or_else(|| Reply::Hold(h.snapshot(&self.host))))
    }

    /// Runs `look` every [`TICK`] until it says that there is nothing more to look for. What it can't do or write down is tried again:
    /// the hold stands where it stood until then.
    fn follow(
        &self,
        id: HoldId,
        mut look: impl FnMut(&Host, &mut Hold) -> Result<bool, Refusal> + Send + 'static,
    ) {
        let Ok(hold) = self.find(id) else { return };
        let (hold, host) = (Arc::downgrade(&hold), Arc::downgrade(&self.host));
        let body = move || {
            let mut said = None;
            while let (Some(h), Some(host)) = (Weak::upgrade(&hold), Weak::upgrade(&host)) {
                let looked = look(&host, &mut lock(&h));
                drop((h, host));
                match looked {
                    Ok(true) => return,
                    Ok(false) => {
                        said = None;
                        std::thread::sleep(TICK);
                    }
                    Err(e) => {
                        if said.as_ref() != Some(&e) {
                            tracing::error!(hold = %id, "tried again: {e}");
                        }
                        said = Some(e);
                        std::thread::sleep(RETRY);
                    }
                }
            }
        };
        if let Err(e) = std::thread::Builder::new()
            .name(format!("hold-{id}"))
            .spawn(body)
        {
            tracing::error!("no thread to follow hold {id}: {e}");
        }
    }

    fn freeze(&self, hold: HoldId, scope: Scope) -> Answer {
        let host = &self.host;
        let reply = self.advance(hold, Event::Freeze(scope), |end, info| {
            cut(host, end, info, scope)
        })?;
        Ok(match reply {
            Reply::Hold(i) => Reply::Frozen {
                at_ns: i.frozen_ns,
                drained: true,
            },
            r => r,
        })
    }

    fn depart(&self, hold: HoldId, grace_ms: u64) -> Answer {
        let host = &self.host;
        let mut first = false;
        let grace_ms = u32::try_from(grace_ms).unwrap_or(u32::MAX);
        {
            let h = self.find(hold)?;
            let mut h = lock(&h);
            if let Verdict::Go(..) = step(h.info.role, h.info.state, Event::Depart) {
                h.stand.grace_ms = grace_ms;
            }
        }
        let reply = self.advance(hold, Event::Depart, |end, info| {
            if let End::Source(s) = end {
                s.depart(host);
                info.thawed_ns = now_ns();
                first = true;
            }
            Ok(None)
        })?;
        if first {
            self.watch_departing(hold, grace_ms);
        }
        Ok(reply)
    }

    fn watch_departing(&self, hold: HoldId, grace_ms: u32) {
        let until = Instant::now() + Duration::from_millis(grace_ms.into());
        self.follow(hold, move |host, h| {
            let End::Source(s) = &mut h.end else {
                return Ok(true);
            };
            let done = s.departed(host, Instant::now() > until)?;
            if done {
                h.step(host, Event::Acknowledged, |_, info| {
                    info.drained_ns = now_ns();
                    Ok(None)
                })?;
            }
            Ok(done)
        });
    }

    fn commit(&self, hold: HoldId) -> Answer {
        let host = &self.host;
        let mut first = false;
        let reply = self.advance(hold, Event::Commit, |end, info| {
            if let End::Target(t) = end {
                t.commit(host)?;
                info.thawed_ns = now_ns();
                first = true;
            }
            Ok(None)
        })?;
        if first {
            self.watch_draining(hold);
        }
        Ok(reply)
    }

    fn watch_draining(&self, hold: HoldId) {
        // One that lives has taken everything by then.
        let mut next = Instant::now() + 2 * DIED;
        self.follow(hold, move |host, h| {
            let End::Target(t) = &mut h.end else {
                return Ok(true);
            };
            let now = Instant::now();
            if now >= next {
                t.give_up_the_dead(host);
                next = now + DIED;
            }
            let done = t.drained(host);
            if done {
                // The ports are plain ports from here on, whether it can be written down or not: nothing waits for that.
                h.step(host, Event::Drained, |_, info| {
                    info.drained_ns = now_ns();
                    Ok(None)
                })?;
            }
            Ok(done)
        });
    }

    fn announce(&self, hold: HoldId) -> Answer {
        let host = &self.host;
        let reply = self.advance(hold, Event::Announce, |end, _| {
            if let End::Target(t) = end
                && t.announce(host) == 0
            {
                tracing::warn!("nothing was announced: no uplink is up, or no address is known");
            }
            Ok(None)
        })?;
        self.announce_again(hold);
        Ok(reply)
    }

    fn announce_again(&self, hold: HoldId) {
        let start = Instant::now();
        let mut next = ANNOUNCE_AGAIN_MS.iter();
        let mut due = next.next();
        self.follow(hold, move |host, h| {
            let (Some(ms), End::Target(t)) = (due, &h.end) else {
                return Ok(true);
            };
            if !matches!(h.info.state, HoldState::Draining | HoldState::Live) {
                return Ok(true);
            }
            if start.elapsed() >= Duration::from_millis(*ms) {
                t.announce(host);
                due = next.next();
            }
            Ok(false)
        });
    }

    /// What another switch has shipped to an earlier run of this one. The source puts a hold back, and then the copy is of
    /// no use; frames that were accepted here as a source are never thrown away.
    fn forget_shipped(&self, hold: HoldId) {
        if self.find(hold).is_ok() || self.host.spool.queues(hold).is_empty() {
            return;
        }
        // One that is just being opened is not ours.
        let _one = lock(&self.opening);
        let queues = self.host.spool.queues(hold);
        let own = queues.iter().any(|q| q.kind() == Kind::Source);
        if !queues.is_empty() && !own && self.find(hold).is_err() {
            tracing::info!(%hold, "aborted: what an earlier run had received is freed");
            drop(queues);
            self.host.free_spool(hold);
            lock(&self.left).remove(&hold);
        }
    }

    /// An order to open it may still be on its way: that comes too late from now on.
    fn end(&self, hold: HoldId) {
        let holds = lock(&self.holds);
        if holds.contains_key(&hold) || lock(&self.left).contains_key(&hold) {
            return;
        }
        let mut ended = lock(&self.ended);
        if !ended.contains(&hold) {
            if ended.len() >= ENDED {
                ended.pop_front();
            }
            ended.push_back(hold);
        }
    }

    fn abort(&self, hold: HoldId) -> Answer {
        let host = &self.host;
        self.forget_shipped(hold);
        self.end(hold);
        let mut follow = false;
        let reply = self.advance(hold, Event::Abort, |end, info| {
            follow = put_back(host, end, info)?;
            Ok(None)
        })?;
        if follow {
            self.watch_put_back(hold);
        }
        Ok(reply)
    }

    fn watch_put_back(&self, hold: HoldId) {
        let until = Instant::now() + AWAIT_VM;
        // One that lives has taken everything by then.
        let mut next = Instant::now() + 2 * DIED;
        self.follow(hold, move |host, h| {
            let End::Source(s) = &mut h.end else {
                return Ok(true);
            };
            if Instant::now() >= next {
                s.give_up_the_dead(host);
                next = Instant::now() + DIED;
            }
            if h.info.state == HoldState::Aborted {
                let done = s.disarm(host, Instant::now() > until);
                if done {
                    h.forget();
                }
                return Ok(done);
            }
            if s.put_back_done(host) {
                h.step(host, Event::Drained, |end, info| {
                    if let End::Source(s) = end {
                        info.lanes = s.lanes(host);
                        info.drained_ns = now_ns();
                        book::keep(host, info, HoldState::Aborted, s.books(host));
                        s.forget(host);
                    }
                    Ok(None)
                })?;
            }
            Ok(false)
        });
    }

    fn release(&self, hold: HoldId) -> Answer {
        let host = &self.host;
        self.advance(hold, Event::Release, |end, info| {
            // As long as there is a record, that says where its VMs are; then this must.
            host.addresses.save();
            match end {
                End::Source(s) => {
                    s.hear_again(HEAR);
                    info.lanes = s.lanes(host);
                    book::keep(host, info, HoldState::Released, s.books(host));
                    s.release(host)?;
                }
                End::Target(t) => {
                    info.lanes = t.lanes(host);
                    book::keep(host, info, HoldState::Released, t.books(host));
                    t.release(host);
                }
                End::Over => {}
            }
            Ok(None)
        })
    }

    fn answer(&self, request: Request) -> Answer {
        match request {
            Request::HostShow => Ok(Reply::Host(listing::host_info(
                &self.host,
                self.start.elapsed(),
                self.left_over(),
                self.holds_overdue(),
            ))),
            Request::PortList => Ok(Reply::Ports(listing::ports(&self.host))),
            Request::LinkList => Ok(Reply::Links(listing::links(&self.host))),
            Request::FdbList => Ok(Reply::Fdb(listing::fdb(&self.host))),
            Request::HoldOpen(a) => self.open(a),
            Request::IncomingPrepare(a) => self.prepare(a),
            Request::Freeze { hold, scope } => self.freeze(hold, scope),
            Request::Seal { hold, timeout_ms } => {
                let host = &self.host;
                self.advance(hold, Event::Seal, |end, _| match end {
                    End::Source(s) => s
                        .seal(host, Duration::from_millis(timeout_ms))
                        .map(|()| None),
                    End::Target(_) | End::Over => Ok(None),
                })
            }
            Request::Depart { hold, grace_ms } => self.depart(hold, grace_ms),
            Request::IncomingRestore { hold } => {
                self.advance(hold, Event::Restore, |end, _| match end {
                    End::Target(t) => t.restore(RESTORE).map(|()| None),
                    End::Source(_) | End::Over => Ok(None),
                })
            }
            Request::Commit { hold } => self.commit(hold),
            Request::Announce { hold } => self.announce(hold),
            Request::HoldStatus { hold } => {
                let h = self.find(hold)?;
                let mut h = lock(&h);
                let told = Reply::Hold(h.snapshot(&self.host));
                h.is_asked();
                Ok(told)
            }
            Request::HoldList => {
                let all = self.all();
                let told = all.iter().map(|(_, h)| lock(h).snapshot(&self.host));
                Ok(Reply::Holds(told.collect()))
            }
            Request::HoldAbort { hold } => self.abort(hold),
            Request::HoldRelease { hold } => self.release(hold),
            Request::LedgerShow { hold, role, lane } => book::show(&self.host, hold, role, lane),
            Request::LedgerIndex(p) => book::index(&self.host, p),
            Request::LedgerFrames(p) => book::frames(&self.host, p),
            Request::WorkerList => Ok(Reply::Workers(workers::list(&self.host))),
            Request::WorkersSet(wish) => {
                workers::set(&self.host, &wish, || self.open_holds())?;
                Ok(Reply::Workers(workers::list(&self.host)))
            }
            Request::Hello { .. }
            | Request::VmList
            | Request::VmmOpen { .. }
            | Request::VmmStart { .. }
            | Request::VmmStop { .. } => {
                Err(refuse(RefusalCode::Internal, "not for the hold manager"))
            }
        }
    }

    /// For messages. One that is busy at the moment is named without its VMs.
    fn open_holds(&self) -> String {
        let holds = lock(&self.holds);
        let name = |(id, h): (&HoldId, &Arc<Mutex<Hold>>)| match h.try_lock() {
            Ok(h) if h.is_over() => None,
            Ok(h) => Some(format!("{id} of {}", h.info.vms.join(", "))),
            Err(_) => Some(id.to_string()),
        };
        let open: Vec<String> = holds.iter().filter_map(name).collect();
        open.join("; ")
    }
}

/// A freeze, on the source.
fn cut(
    host: &Host,
    end: &mut End,
    info: &mut HoldInfo,
    scope: Scope,
) -> Result<Option<Reply>, Refusal> {
    let End::Source(s) = end else { return Ok(None) };
    let (at_ns, drained) = s.freeze(host, scope)?;
    info.frozen_ns = at_ns;
    Ok(Some(Reply::Frozen { at_ns, drained }))
}

/// An abort. True: frames drain, and that is to be followed.
fn put_back(host: &Host, end: &mut End, info: &mut HoldInfo) -> Result<bool, Refusal> {
    match end {
        End::Source(s) => s.abort(host)?,
        End::Target(t) => {
            info.lanes = t.lanes(host);
            // Only what was counted: the VMs wait to run on the source again, and reading takes its time.
            let mut books = t.books(host);
            books.iter_mut().for_each(|b| b.again = None);
            t.abort(host);
            book::keep(host, info, HoldState::Aborted, books);
        }
        End::Over => {}
    }
    info.thawed_ns = now_ns();
    Ok(matches!(end, End::Source(_)))
}

fn late(hold: HoldId) -> Refusal {
    let what = format!("hold {hold} was aborted here; this order comes too late");
    refuse(RefusalCode::State, what)
}

impl Handler for Manager {
    fn call(&self, request: Request) -> Reply {
        self.answer(request).unwrap_or_else(Reply::Refused)
    }
}
