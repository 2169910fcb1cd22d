//! Answers the control requests that concern ports, links and holds.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use gangway_shared::api::{
    FdbInfo, HoldInfo, HoldOpen, HoldState, HostInfo, IncomingPrepare, LinkInfo, PortInfo,
    QueueInfo, Refusal, RefusalCode, Reply, Request, Role,
};
use gangway_shared::config::HostConfig;
use gangway_shared::id::{HoldId, MacAddr};

use super::book;
use super::machine::{Event, Verdict, step};
use super::refuse;
use super::source::SourceHold;
use super::target::TargetHold;
use super::workers;
use crate::control::Handler;
use crate::datapath::Engine;
use crate::datapath::engine::Mode;
use crate::datapath::stats::{DROP_NAMES, link_total, port_total};
use crate::datapath::worker::{Command, Outcome, now_ns};
use crate::port::tap::VmTap;
use crate::port::{Attach, Burst, VnetHdr};
use crate::ship::{Acceptor, Incoming, Outgoing, OutgoingArgs};
use crate::spool::{Kind, Spool};

/// How long the target's switch may take to accept a shipment.
const CONNECT: Duration = Duration::from_secs(5);
/// How long a restore waits for the last acknowledgements.
const RESTORE: Duration = Duration::from_secs(5);
/// How long frames wait for a VM that is stopped when its hold was put back.
const AWAIT_VM: Duration = Duration::from_secs(30);
/// How often a hold that moves by itself is looked at.
const TICK: Duration = Duration::from_millis(1);
/// When an announcement is repeated, after the first.
const ANNOUNCE_AGAIN_MS: [u64; 5] = [20, 80, 200, 500, 1000];
/// Ended holds that are remembered for reports.
const KEEP: usize = 64;

/// What the VMM channel knows of a VM.
pub trait Vms: Send + Sync {
    /// The process behind its QMP socket.
    fn pid(&self, vm: &str) -> Option<u32>;
    /// As QEMU has said last: `running`, `paused`, ... (qapi/run-state.json, RunState).
    fn status(&self, vm: &str) -> Option<String>;
}

/// What holds are carried out on.
pub struct Host {
    /// Workers, ports, FDB.
    pub engine: Arc<Engine>,
    /// Where held frames go.
    pub spool: Arc<Spool>,
    /// Expected shipments.
    pub acceptor: Arc<Acceptor>,
    /// To dial other switches; absent without `control.listen`.
    pub dialer: Option<(quinn::Endpoint, quinn::ClientConfig)>,
    /// For the shipments' tasks.
    pub runtime: tokio::runtime::Handle,
    /// TAPs of VMs, by port index.
    pub taps: HashMap<usize, Arc<VmTap>>,
    /// For what only QEMU knows.
    pub vms: Arc<dyn Vms>,
    /// The configuration.
    pub config: HostConfig,
}

impl Host {
    pub(super) fn batch(&self, commands: Vec<Command>) -> Result<Outcome, Refusal> {
        self.engine
            .batch(commands)
            .map_err(|e| refuse(RefusalCode::Internal, e.to_string()))
    }

    pub(super) fn dial(&self, args: &HoldOpen) -> Result<Arc<Outgoing>, Refusal> {
        let Some((endpoint, client)) = self.dialer.clone() else {
            return Err(refuse(
                RefusalCode::State,
                "this switch has no control.listen and [tls]; it cannot ship",
            ));
        };
        let out = Outgoing::start(
            self.runtime.clone(),
            endpoint,
            client,
            OutgoingArgs {
                hold: args.hold,
                ticket: args.ticket,
                target_address: args.target_address.clone(),
                target_host: args.target_host.clone(),
            },
        );
        out.wait_connected(CONNECT).map_err(|e| {
            out.abort();
            refuse(
                RefusalCode::Peer,
                format!(
                    "switch of {} at {}: {e}",
                    args.target_host, args.target_address
                ),
            )
        })?;
        Ok(out)
    }

    pub(super) fn expect(&self, args: &IncomingPrepare) -> Result<Arc<Incoming>, Refusal> {
        let incoming = Incoming::new(
            self.spool.clone(),
            args.hold,
            args.ticket,
            args.source_host.clone(),
        );
        self.acceptor.register(incoming.clone());
        Ok(incoming)
    }

    pub(super) fn unexpect(&self, hold: HoldId) {
        self.acceptor.unregister(hold);
    }

    pub(super) fn free_spool(&self, hold: HoldId) {
        if let Err(e) = self.spool.remove_hold(hold) {
            tracing::error!("the spool of hold {hold} is not freed: {e}");
        }
    }

    /// Configured, or the one address learned there.
    pub fn mac_of(&self, port: usize) -> Option<MacAddr> {
        let shared = self.engine.shared();
        shared.ports[port].mac.or_else(|| {
            let all = shared.fdb.list(shared.now_s());
            all.into_iter()
                .filter(|e| e.port == port && !shared.ports[port].uplink)
                .min_by_key(|e| e.age_s)
                .map(|e| e.mac)
        })
    }

    /// Duplicates the descriptors of a VM's TAP: without them what it has not taken when it stops is lost.
    pub(super) fn adopt_tap(&self, port: usize) -> Result<(), Refusal> {
        let Some(tap) = self.taps.get(&port) else {
            return Ok(());
        };
        let p = &self.engine.shared().ports[port];
        let name = &p.name;
        let pid = p.vm.as_deref().and_then(|vm| self.vms.pid(vm));
        let Some(pid) = pid else {
            let what = format!(
                "port {name}: the process of its VM is unknown; does QEMU run, with the QMP socket of this host's configuration?"
            );
            return Err(refuse(RefusalCode::State, what));
        };
        let adopted = tap.adopt(pid);
        adopted.map_err(|e| refuse(RefusalCode::State, format!("port {name}: {e}")))
    }

    pub(super) fn tap_empty(&self, port: usize, timeout: Duration) -> bool {
        self.taps.get(&port).is_none_or(|t| t.wait_empty(timeout))
    }

    /// The oldest frame that waits in a stopped VM's TAP.
    pub(super) fn tap_read_back(&self, port: usize) -> Result<Option<(VnetHdr, Vec<u8>)>, Refusal> {
        let Some(tap) = self.taps.get(&port) else {
            return Ok(None);
        };
        let name = &self.engine.shared().ports[port].name;
        let read = tap.read_back(1);
        read.map(|mut f| f.pop())
            .map_err(|e| refuse(RefusalCode::State, format!("port {name}: {e}")))
    }

    /// Waits until what a stopped VM has sent through its TAP is taken by the workers. (A vhost-user VM's frames stay
    /// in its own memory and travel with it.)
    pub(super) fn settle_rx(&self, port: usize, until: Instant) -> Result<(), Refusal> {
        if !self.taps.contains_key(&port) {
            return Ok(());
        }
        loop {
            let Some(mut rx) = self.engine.detach_rx(port, 0) else {
                return Ok(());
            };
            let mut burst = Burst::new();
            rx.burst(&mut burst);
            let left = burst.len();
            drop(burst);
            self.engine.attach_rx(port, 0, rx);
            if left == 0 {
                return Ok(());
            }
            if Instant::now() > until {
                let name = &self.engine.shared().ports[port].name;
                let what = format!(
                    "port {name} still gives frames: is its VM stopped, has the spool room?"
                );
                return Err(refuse(RefusalCode::Timeout, what));
            }
            std::thread::sleep(Duration::from_micros(300));
        }
    }
}

enum End {
    Source(SourceHold),
    Target(TargetHold),
}

struct Hold {
    info: HoldInfo,
    end: End,
}

impl Hold {
    fn snapshot(&self, host: &Host) -> HoldInfo {
        let mut i = self.info.clone();
        if !matches!(i.state, HoldState::Released | HoldState::Aborted) {
            (i.lanes, i.error) = match &self.end {
                End::Source(s) => (s.lanes(host), s.error()),
                End::Target(t) => (t.lanes(), t.error()),
            };
            if let Some(why) = host.spool.trouble(Some(i.hold)) {
                let why = format!("senders wait: {why}");
                i.error = Some(i.error.map_or(why.clone(), |e| format!("{e}; {why}")));
            }
        }
        i
    }

    fn group(&self) -> &[usize] {
        match &self.end {
            End::Source(s) => s.group(),
            End::Target(t) => t.group(),
        }
    }
}

/// See the module.
pub struct Manager {
    host: Arc<Host>,
    holds: Mutex<BTreeMap<HoldId, Arc<Mutex<Hold>>>>,
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
            opening: Mutex::default(),
            start: Instant::now(),
        }
    }

    fn find(&self, id: HoldId) -> Result<Arc<Mutex<Hold>>, Refusal> {
        let unknown = || refuse(RefusalCode::Unknown, format!("no hold {id} on this host"));
        lock(&self.holds).get(&id).cloned().ok_or_else(unknown)
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
        let all: Vec<_> = lock(&self.holds).values().cloned().collect();
        for h in all {
            let h = lock(&h);
            let over = matches!(h.info.state, HoldState::Released | HoldState::Aborted);
            if let Some(p) = group.iter().find(|p| !over && h.group().contains(p)) {
                let what = format!(
                    "port {} is taken by hold {} ({:?})",
                    ports[*p].name, h.info.hold, h.info.state
                );
                return Err(refuse(RefusalCode::Busy, what));
            }
        }
        Ok(group)
    }

    fn keep(&self, info: HoldInfo, end: End) -> Reply {
        let mut holds = lock(&self.holds);
        if holds.len() >= KEEP {
            // One that is busy at the moment, or still waits for a VM, is not over.
            let over = |h: &Arc<Mutex<Hold>>| {
                h.try_lock().is_ok_and(|h| {
                    let waits = matches!(&h.end, End::Source(s) if s.is_armed());
                    !waits && matches!(h.info.state, HoldState::Released | HoldState::Aborted)
                })
            };
            if let Some(old) = holds.iter().find(|(_, h)| over(h)).map(|(id, _)| *id) {
                holds.remove(&old);
            }
        }
        let reply = Reply::Hold(info.clone());
        holds.insert(info.hold, Arc::new(Mutex::new(Hold { info, end })));
        reply
    }

    fn again(&self, id: HoldId, role: Role) -> Option<Answer> {
        let h = lock(&self.holds).get(&id).cloned()?;
        let h = lock(&h);
        Some(
            if h.info.role == role
                && !matches!(h.info.state, HoldState::Released | HoldState::Aborted)
            {
                Ok(Reply::Hold(h.snapshot(&self.host)))
            } else {
                Err(refuse(
                    RefusalCode::Busy,
                    format!("hold {id} exists already, {:?}", h.info.state),
                ))
            },
        )
    }

    fn open(&self, args: HoldOpen) -> Answer {
        let _one = lock(&self.opening);
        if let Some(a) = self.again(args.hold, Role::Source) {
            return a;
        }
        let group = self.claim(&args.vms)?;
        let end = SourceHold::open(&self.host, &args, group)?;
        tracing::info!(hold = %args.hold, "opened towards {}: {}", args.target_host, args.vms.join(", "));
        let id = args.hold;
        let reply = self.keep(
            info(
                args.hold,
                Role::Source,
                HoldState::Open,
                args.vms,
                args.target_host,
            ),
            End::Source(end),
        );
        // A VM that stops before the freeze (its migration converged by itself, its coordinator died): what comes for it
        // is held from then on, as if the coordinator had asked.
        self.follow(id, |host, h| {
            let early = matches!(h.info.state, HoldState::Open | HoldState::FrozenInside);
            let End::Source(s) = &mut h.end else {
                return true;
            };
            if early && s.stopped(host) {
                match s.freeze(host, gangway_shared::api::Scope::All) {
                    Ok((at, _)) => {
                        h.info.frozen_ns = at;
                        h.info.state = HoldState::Frozen;
                        tracing::info!(hold = %h.info.hold, "a VM has stopped by itself: frozen");
                    }
                    Err(e) => tracing::error!("{e}"),
                }
            }
            !early
        });
        Ok(reply)
    }

    fn prepare(&self, args: IncomingPrepare) -> Answer {
        let _one = lock(&self.opening);
        if let Some(a) = self.again(args.hold, Role::Target) {
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
        let end = TargetHold::prepare(&self.host, &args, group)?;
        tracing::info!(hold = %args.hold, "expecting {} from {}", args.vms.join(", "), args.source_host);
        Ok(self.keep(
            info(
                args.hold,
                Role::Target,
                HoldState::Prepared,
                args.vms,
                args.source_host,
            ),
            End::Target(end),
        ))
    }

    /// Checks the transition, carries it out, notes the state.
    fn advance(
        &self,
        id: HoldId,
        event: Event,
        act: impl FnOnce(&mut End, &mut HoldInfo) -> Result<Option<Reply>, Refusal>,
    ) -> Answer {
        let h = self.find(id)?;
        let mut h = lock(&h);
        match step(h.info.role, h.info.state, event) {
            Verdict::No => {
                let what = format!(
                    "{event:?} is not possible: hold {id} is {:?} on the {:?}",
                    h.info.state, h.info.role
                );
                Err(refuse(RefusalCode::State, what))
            }
            Verdict::Again => Ok(Reply::Hold(h.snapshot(&self.host))),
            Verdict::Go(next) => {
                let Hold { info, end } = &mut *h;
                let reply = act(end, info)?;
                info.state = next;
                tracing::info!(hold = %id, "{event:?}: {next:?}");
                Ok(reply.unwrap_or_else(|| Reply::Hold(h.snapshot(&self.host))))
            }
        }
    }

    /// Runs `look` every [`TICK`] until it has moved the hold on.
    fn follow(&self, id: HoldId, mut look: impl FnMut(&Host, &mut Hold) -> bool + Send + 'static) {
        let Ok(hold) = self.find(id) else { return };
        let (hold, host) = (Arc::downgrade(&hold), Arc::downgrade(&self.host));
        let body = move || {
            while let (Some(h), Some(host)) = (Weak::upgrade(&hold), Weak::upgrade(&host)) {
                if look(&host, &mut lock(&h)) {
                    return;
                }
                drop((h, host));
                std::thread::sleep(TICK);
            }
        };
        if let Err(e) = std::thread::Builder::new()
            .name(format!("hold-{id}"))
            .spawn(body)
        {
            tracing::error!("no thread to follow hold {id}: {e}");
        }
    }

    fn freeze(&self, hold: HoldId, scope: gangway_shared::api::Scope) -> Answer {
        let host = &self.host;
        let reply = self.advance(hold, Event::Freeze(scope), |end, info| {
            let End::Source(s) = end else { return Ok(None) };
            let (at_ns, drained) = s.freeze(host, scope)?;
            info.frozen_ns = at_ns;
            Ok(Some(Reply::Frozen { at_ns, drained }))
        })?;
        Ok(match reply {
            Reply::Hold(i) => Reply::Frozen {
                at_ns: i.frozen_ns,
                drained: true,
            },
            r => r,
        })
    }

    fn depart(&self, hold: HoldId, grace: Duration) -> Answer {
        let host = &self.host;
        let mut first = false;
        let reply = self.advance(hold, Event::Depart, |end, info| {
            if let End::Source(s) = end {
                s.depart(host);
                info.thawed_ns = now_ns();
                first = true;
            }
            Ok(None)
        })?;
        if first {
            let until = Instant::now() + grace;
            self.follow(hold, move |host, h| {
                let End::Source(s) = &mut h.end else {
                    return true;
                };
                match s.departed(host, Instant::now() > until) {
                    Ok(false) => false,
                    Ok(true) => {
                        h.info.state = HoldState::Departed;
                        h.info.drained_ns = now_ns();
                        true
                    }
                    Err(e) => {
                        tracing::error!("{e}");
                        false
                    }
                }
            });
        }
        Ok(reply)
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
            self.follow(hold, |host, h| {
                let End::Target(t) = &h.end else { return true };
                let done = t.drained(host);
                if done {
                    h.info.state = HoldState::Live;
                    h.info.drained_ns = now_ns();
                }
                done
            });
        }
        Ok(reply)
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
        let start = Instant::now();
        let mut next = ANNOUNCE_AGAIN_MS.iter();
        let mut due = next.next();
        self.follow(hold, move |host, h| {
            let (Some(ms), End::Target(t)) = (due, &h.end) else {
                return true;
            };
            if !matches!(h.info.state, HoldState::Draining | HoldState::Live) {
                return true;
            }
            if start.elapsed() >= Duration::from_millis(*ms) {
                t.announce(host);
                due = next.next();
            }
            false
        });
        Ok(reply)
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
        }
    }

    fn abort(&self, hold: HoldId) -> Answer {
        let host = &self.host;
        self.forget_shipped(hold);
        let mut follow = false;
        let reply = self.advance(hold, Event::Abort, |end, info| {
            match end {
                End::Source(s) => {
                    s.abort(host)?;
                    follow = true;
                }
                End::Target(t) => {
                    info.lanes = t.lanes();
                    // Only what was counted: the VMs wait to run on the source again, and reading takes its time.
                    let mut books = t.books();
                    books.iter_mut().for_each(|b| b.again = None);
                    t.abort(host);
                    book::keep(host, info, HoldState::Aborted, books);
                }
            }
            info.thawed_ns = now_ns();
            Ok(None)
        })?;
        if follow {
            let until = Instant::now() + AWAIT_VM;
            self.follow(hold, move |host, h| {
                let End::Source(s) = &mut h.end else {
                    return true;
                };
                if h.info.state == HoldState::Aborted {
                    return s.disarm(host, Instant::now() > until);
                }
                if s.put_back_done(host) {
                    h.info.lanes = s.lanes(host);
                    h.info.drained_ns = now_ns();
                    book::keep(host, &h.info, HoldState::Aborted, s.books(host));
                    s.forget(host);
                    h.info.state = HoldState::Aborted;
                }
                false
            });
        }
        Ok(reply)
    }

    fn release(&self, hold: HoldId) -> Answer {
        let host = &self.host;
        self.advance(hold, Event::Release, |end, info| {
            match end {
                End::Source(s) => {
                    info.lanes = s.lanes(host);
                    book::keep(host, info, HoldState::Released, s.books(host));
                    s.release(host)?;
                }
                End::Target(t) => {
                    info.lanes = t.lanes();
                    book::keep(host, info, HoldState::Released, t.books());
                    t.release(host);
                }
            }
            Ok(None)
        })
    }

    fn answer(&self, request: Request) -> Answer {
        match request {
            Request::HostShow => Ok(Reply::Host(self.host_info())),
            Request::PortList => Ok(Reply::Ports(self.ports())),
            Request::LinkList => Ok(Reply::Links(self.links())),
            Request::FdbList => Ok(Reply::Fdb(self.fdb())),
            Request::HoldOpen(a) => self.open(a),
            Request::IncomingPrepare(a) => self.prepare(a),
            Request::Freeze { hold, scope } => self.freeze(hold, scope),
            Request::Seal { hold, timeout_ms } => {
                let host = &self.host;
                self.advance(hold, Event::Seal, |end, _| match end {
                    End::Source(s) => s
                        .seal(host, Duration::from_millis(timeout_ms))
                        .map(|()| None),
                    End::Target(_) => Ok(None),
                })
            }
            Request::Depart { hold, grace_ms } => {
                self.depart(hold, Duration::from_millis(grace_ms))
            }
            Request::IncomingRestore { hold } => {
                self.advance(hold, Event::Restore, |end, _| match end {
                    End::Target(t) => t.restore(RESTORE).map(|()| None),
                    End::Source(_) => Ok(None),
                })
            }
            Request::Commit { hold } => self.commit(hold),
            Request::Announce { hold } => self.announce(hold),
            Request::HoldStatus { hold } => {
                Ok(Reply::Hold(lock(&*self.find(hold)?).snapshot(&self.host)))
            }
            Request::HoldList => {
                let holds: Vec<_> = lock(&self.holds).values().cloned().collect();
                Ok(Reply::Holds(
                    holds.iter().map(|h| lock(h).snapshot(&self.host)).collect(),
                ))
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
            Ok(h) if matches!(h.info.state, HoldState::Released | HoldState::Aborted) => None,
            Ok(h) => Some(format!("{id} of {}", h.info.vms.join(", "))),
            Err(_) => Some(id.to_string()),
        };
        let open: Vec<String> = holds.iter().filter_map(name).collect();
        open.join("; ")
    }

    fn host_info(&self) -> HostInfo {
        let shared = self.host.engine.shared();
        let c = &self.host.config;
        HostInfo {
            name: c.name.clone(),
            version: env!("CARGO_PKG_VERSION").into(),
            uptime_s: self.start.elapsed().as_secs(),
            workers: self.host.engine.workers().len() as u32,
            migration_address: c
                .migration_address
                .map(|a: IpAddr| a.to_string())
                .unwrap_or_default(),
            ports: shared.ports.len() as u32,
            vms: c.vms.len() as u32,
            fdb_entries: shared.fdb.list(shared.now_s()).len() as u32,
            spool_used_bytes: self.host.spool.used_bytes(),
            spool_quota_bytes: c.spool.quota_bytes,
            spool_error: self.host.spool.trouble(None),
        }
    }

    fn ports(&self) -> Vec<PortInfo> {
        use std::sync::atomic::Ordering::Relaxed;
        let shared = self.host.engine.shared();
        let books = shared.books.all();
        let ports = &shared.ports;
        let info = |(n, p): (usize, &Arc<crate::datapath::engine::Port>)| {
            let c = &p.counters;
            let names =
                DROP_NAMES
                    .iter()
                    .copied()
                    .chain(["rx_malformed", "rx_ring_broken", "rx_overrun"]);
            let counts = c.drops.iter().chain(&c.rx_errors).map(|v| v.load(Relaxed));
            let total = port_total(&books, n);
            let used = total.queues.iter().rposition(|q| *q != (0, 0));
            let queue = |&(rx_frames, tx_frames): &(u64, u64)| QueueInfo {
                rx_frames,
                tx_frames,
            };
            let state = match p.mode() {
                Mode::Live if !p.is_up() => "down",
                m => m.name(),
            };
            PortInfo {
                name: p.name.clone(),
                kind: p.kind.into(),
                vm: p.vm.clone(),
                mac: self.host.mac_of(n),
                state: state.into(),
                error: p.error(),
                rx_frames: total.queues.iter().map(|q| q.0).sum(),
                rx_bytes: total.rx_bytes,
                tx_frames: total.queues.iter().map(|q| q.1).sum(),
                tx_bytes: total.tx_bytes,
                queues: total.queues[..used.map_or(0, |n| n + 1)]
                    .iter()
                    .map(queue)
                    .collect(),
                drops: names
                    .map(String::from)
                    .zip(counts)
                    .filter(|(_, v)| *v > 0)
                    .collect(),
            }
        };
        ports.iter().enumerate().map(info).collect()
    }

    fn links(&self) -> Vec<LinkInfo> {
        let shared = self.host.engine.shared();
        let books = shared.books.all();
        let now_s = shared.now_s();
        let mut all = Vec::new();
        for (f, from) in shared.ports.iter().enumerate() {
            for (t, to) in shared.ports.iter().enumerate() {
                let (sum, last_s) = link_total(&books, f, t);
                if sum.frames > 0 {
                    all.push(LinkInfo {
                        from: from.name.clone(),
                        from_vm: from.vm.clone(),
                        to: to.name.clone(),
                        to_vm: to.vm.clone(),
                        frames: sum.frames,
                        bytes: sum.bytes,
                        payload_bytes: sum.payload,
                        idle_ms: u64::from(now_s.saturating_sub(last_s)) * 1000,
                    });
                }
            }
        }
        all
    }

    fn fdb(&self) -> Vec<FdbInfo> {
        let shared = self.host.engine.shared();
        let entries = shared.fdb.list(shared.now_s()).into_iter();
        let mut all: Vec<FdbInfo> = entries
            .map(|e| FdbInfo {
                mac: e.mac,
                port: shared.ports[e.port].name.clone(),
                fixed: e.fixed,
                age_s: e.age_s,
            })
            .collect();
        all.sort_by_key(|e| e.mac);
        all
    }
}

fn info(hold: HoldId, role: Role, state: HoldState, vms: Vec<String>, peer: String) -> HoldInfo {
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

impl Handler for Manager {
    fn call(&self, request: Request) -> Reply {
        self.answer(request).unwrap_or_else(Reply::Refused)
    }
}
