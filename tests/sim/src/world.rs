//! The world: a clock, hosts, VMs, networks and a coordinator, moved by one queue of events.
//!
//! ```text
//!             coordinator (the product's migration machine, journal)
//!              /  requests: lost, late, twice     \
//!   host A: switch, spool, VMMs  ---shipment---  host B: switch, spool, VMMs
//!              \                                   /
//!               `------ the network outside ------'
//! ```
//! Invariant: no real time, no thread, no I/O; everything follows from the seed.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use gangway_shared::api::{HoldState, RefusalCode, Scope, Tally};
use gangway_shared::id::HoldId;
use gangway_shared::ship::{ToSource, ToTarget};

use crate::check::Check;
use crate::coord::{CoordEvent, Coordinator};
use crate::disk::{Disk, EXT, Lane, Numbered};
use crate::rng::Rng;
use crate::seen::{Counts, Seen};
use crate::switch::{Hold, Pending};
use crate::{Bug, Options};

/// A host, by number.
pub type Host = usize;
/// Where the VMs are at first.
pub const A: Host = 0;
/// Where they go.
pub const B: Host = 1;
/// Frames that are taken or delivered between two notes: also what may be delivered twice after a crash.
pub const BURST: usize = 6;
/// Microseconds.
pub const MS: u64 = 1000;
/// Microseconds.
pub const S: u64 = 1000 * MS;
/// Descriptors of a ring.
const RING: usize = 24;
/// Frames that wait in the uplink's socket.
const SOCKET: usize = 64;

/// The process died in the middle of what it did.
#[derive(Debug)]
pub struct Killed;
/// What a switch's work comes to.
pub type Work<T = ()> = Result<T, Killed>;

/// What a VM's process on a host does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Proc {
    /// There is none.
    Absent,
    /// Runs.
    Running,
    /// Stopped, memory here.
    Paused,
    /// Waits for its memory.
    Incoming,
    /// Has its memory; has not run.
    Arrived,
    /// Its memory was sent.
    Sent,
}

/// A VM. Its memory is one, wherever its processes are: it changes only where it runs.
#[derive(Debug, Clone)]
pub struct Vm {
    /// On each host.
    pub procs: [Proc; 2],
    /// What it has queued to send, by queue.
    pub rings: Vec<VecDeque<Numbered>>,
    /// Its receive rings are full until then.
    pub deaf_until: u64,
    /// The youngest session of the coordinator with its process, on each host.
    pub session: [u64; 2],
    /// Its process on the target was ended for this migration: an order to start it comes too late.
    pub ended: bool,
    /// It has stopped by itself, and will go on so.
    pub stopped: bool,
    /// Its process on the source has died.
    pub died: bool,
}

/// From the coordinator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "as the product's requests")]
pub enum Request {
    Show,
    Prepare,
    Open,
    Freeze(Scope),
    Seal,
    Restore,
    Commit,
    Announce,
    Depart,
    Release,
    Abort,
    Status,
    VmShow(u8),
    VmStart(u8),
    VmMigrate(u8),
    VmStop(u8),
    VmSwitchover(u8),
    VmCont(Host, u8),
    VmCancel(u8),
    VmEnd(u8),
    VmQuit(u8),
}

/// To the coordinator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// Done.
    Ok,
    /// A hold as it is.
    Hold(HoldState, BTreeMap<Lane, Tally>),
    /// It cannot be.
    Refused(RefusalCode),
}

/// A request on its way.
#[derive(Debug, Clone, Copy)]
pub struct Call {
    /// For the answer.
    pub id: u64,
    /// Which life of the coordinator asks.
    pub life: u64,
    /// Of which hold.
    pub hold: HoldId,
    /// The coordinator's session with VMs.
    pub session: u64,
    /// What.
    pub request: Request,
}

/// On a shipment's connection.
#[derive(Debug, Clone)]
pub enum Body {
    /// Control stream.
    ToTarget(ToTarget),
    /// Control stream.
    ToSource(ToSource),
    /// A lane's stream: a batch, as the product ships it.
    Batch(u32, Vec<u8>),
}

/// A shipment's connection: streams keep their order; it breaks as a whole, and the ends learn that at different times.
#[derive(Debug, Clone, Default)]
pub struct Conn {
    /// Nothing arrives any more.
    pub broken: bool,
    arrival: BTreeMap<(Host, u32), u64>,
    /// Batches that are under way, or wait at the other end.
    pub batches: usize,
}

/// What happens.
#[derive(Debug, Clone)]
pub enum Event {
    /// A switch looks around; of this life.
    Tick(Host, u64),
    /// A request arrives, on a connection to this life of the switch.
    Call(Host, u64, Call),
    /// A reply arrives.
    Reply(u64, u64, Reply),
    /// The coordinator's own.
    Coord(u64, CoordEvent),
    /// On a connection.
    Ship(u64, Host, HoldId, Body),
    /// An end learns that a connection is gone.
    Lost(u64, Host),
    /// A guest acts.
    Guest(u8),
    /// A guest that has stopped by itself goes on, if nobody else has to say so.
    GoesOn(u8),
    /// The network outside acts.
    Outside,
    /// A frame from outside reaches an uplink.
    Uplink(Host, Numbered),
    /// An announcement reaches the network.
    Announced(u8, Host),
    /// An announcement reaches the old host's uplink.
    Marker(Host, u8),
    /// A fault begins.
    Fault(Fault),
    /// A link heals.
    Heal(usize),
    /// A disk is well again.
    DiskWell(Host),
    /// A switch starts.
    Start(Host),
    /// The operator takes the migration up.
    TakeUp,
}

/// Faults.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "their names say it")]
pub enum Fault {
    /// At one of the next places where it can matter.
    KillSwitch(Host, u32),
    KillCoordinator,
    CoordinatorLosesPower,
    TargetLosesPower,
    CutLink(usize),
    CutShipment,
    SyncFails(Host),
    DiskFull(Host),
    DiskLies(Host),
    GuestReset(u8),
    GuestStops(u8),
    SourceVmDies(u8),
    TargetVmDies(u8),
    OperatorAborts,
}

/// Links between: coordinator and A, coordinator and B, A and B.
pub const LINK_AB: usize = 2;

/// A host.
pub struct Node {
    /// The switch runs.
    pub up: bool,
    /// Its life.
    pub life: u64,
    /// Its disk.
    pub disk: Disk,
    /// It dies at this many more places.
    pub fuse: Option<u32>,
    /// In memory.
    pub holds: BTreeMap<HoldId, Hold>,
    /// Requests that wait.
    pub pending: Vec<Pending>,
    /// What the uplink's socket holds.
    pub socket: VecDeque<Numbered>,
}

/// See the module.
pub struct World {
    /// Microseconds.
    pub now: u64,
    /// Of the seed.
    pub rng: Rng,
    /// Of what is being found.
    pub bug: Option<Bug>,
    options: Options,
    events: BTreeMap<(u64, u64), Event>,
    count: u64,
    /// A and B.
    pub nodes: [Node; 2],
    /// The group.
    pub vms: Vec<Vm>,
    /// Queues of each sender.
    pub queues: u8,
    /// A hold that nobody has asked for so long is put back where that is safe.
    pub overdue: Option<u64>,
    /// Shipments' connections.
    pub conns: BTreeMap<u64, Conn>,
    links: [bool; 3],
    loss: u64,
    late: u64,
    twice: u64,
    /// Where the network outside believes each VM.
    pub located: Vec<Host>,
    path: [u64; 2],
    outside_flying: u64,
    /// See there.
    pub coord: Coordinator,
    /// See there.
    pub check: Check,
    faults_end: u64,
    /// Holds of which a loss of power on B has brought an old record back.
    stale: BTreeSet<HoldId>,
    /// Guests and the network say nothing more.
    pub quiet: bool,
    trace: Option<Vec<String>>,
    /// Events so far.
    pub steps: u64,
}

impl World {
    /// The world of this seed.
    pub fn new(seed: u64, bug: Option<Bug>, options: Options, traced: bool) -> World {
        let mut rng = Rng::new(seed);
        let vms = rng.range(2, 3) as usize;
        let queues = rng.range(1, 2) as u8;
        let quota = rng.range(150, 400) as usize;
        let node = || Node {
            up: true,
            life: 0,
            disk: Disk::new(quota),
            fuse: None,
            holds: BTreeMap::new(),
            pending: Vec::new(),
            socket: VecDeque::new(),
        };
        let vm = || Vm {
            procs: [Proc::Running, Proc::Absent],
            rings: vec![VecDeque::new(); usize::from(queues)],
            deaf_until: 0,
            session: [0; 2],
            ended: false,
            stopped: false,
            died: false,
        };
        let faults = options.faults;
        let some = |rng: &mut Rng, n| {
            if faults && rng.permille(400) {
                rng.range(1, n)
            } else {
                0
            }
        };
        let mut w = World {
            now: 0,
            bug,
            options,
            events: BTreeMap::new(),
            count: 0,
            nodes: [node(), node()],
            vms: (0..vms).map(|_| vm()).collect(),
            queues,
            // Much too impatient: many a coordinator is still there.
            overdue: (options.faults && seed.is_multiple_of(2))
                .then_some((3 + (seed.wrapping_mul(7919) % 40).pow(2)) * MS),
            conns: BTreeMap::new(),
            links: [true; 3],
            loss: some(&mut rng, 60),
            late: options.late.unwrap_or(some(&mut rng, 40)),
            twice: some(&mut rng, 60),
            located: vec![A; vms],
            path: [0; 2],
            outside_flying: 0,
            coord: Coordinator::new(HoldId(seed), rng.permille(300)),
            check: Check::default(),
            faults_end: if faults { rng.range(S, 6 * S) } else { 0 },
            stale: BTreeSet::new(),
            quiet: false,
            trace: traced.then(Vec::new),
            steps: 0,
            rng,
        };
        for h in [A, B] {
            w.after(h as u64 * 100, Event::Tick(h, 0));
        }
        for v in 0..vms {
            w.after(0, Event::Guest(v as u8));
        }
        w.after(0, Event::Outside);
        w.after(50 * MS, Event::Coord(0, CoordEvent::Begin));
        if faults {
            w.plan_faults();
        }
        w
    }

    fn plan_faults(&mut self) {
        for _ in 0..self.rng.range(0, 6) {
            // Most of a move happens in its first second or two.
            let at = match self.rng.range(0, 2) {
                0 => self.rng.range(0, self.faults_end),
                _ => self.rng.range(0, self.faults_end.min(1500 * MS)),
            };
            let host = self.rng.range(0, 1) as usize;
            let vm = self.rng.range(0, self.vms.len() as u64 - 1) as u8;
            let fault = match self.rng.range(0, 22) {
                0..=3 => Fault::KillSwitch(host, self.rng.range(0, 120) as u32),
                4..=6 => Fault::KillCoordinator,
                7 => Fault::CoordinatorLosesPower,
                8 => Fault::TargetLosesPower,
                9 | 10 => Fault::CutLink(self.rng.range(0, 2) as usize),
                11 | 12 => Fault::CutShipment,
                13 => Fault::SyncFails(host),
                14 => Fault::DiskFull(host),
                15 => Fault::DiskLies(host),
                16 => Fault::GuestReset(vm),
                17 => Fault::TargetVmDies(vm),
                18 | 19 => Fault::GuestStops(vm),
                20 => Fault::SourceVmDies(vm),
                // A lie is found out when the power fails.
                21 => {
                    let then = at + self.rng.range(0, 300 * MS);
                    self.after(then, Event::Fault(Fault::TargetLosesPower));
                    Fault::DiskLies(B)
                }
                _ => Fault::OperatorAborts,
            };
            self.after(at, Event::Fault(fault));
        }
    }

    /// Writes a line of the trace.
    pub fn say(&mut self, line: impl FnOnce() -> String) {
        let now = self.now;
        if let Some(t) = &mut self.trace {
            t.push(format!("{:>9.3} ms  {}", now as f64 / MS as f64, line()));
        }
    }

    /// The trace.
    pub fn take_trace(&mut self) -> Vec<String> {
        self.trace.take().unwrap_or_default()
    }

    /// True if this is the bug of this world.
    pub fn has(&self, bug: Bug) -> bool {
        self.bug == Some(bug)
    }

    /// Schedules.
    pub fn after(&mut self, delay: u64, event: Event) {
        self.count += 1;
        self.events.insert((self.now + delay, self.count), event);
    }

    /// Until it is over, or the checker has found something.
    pub fn run(&mut self) {
        let deadline = self.faults_end + self.options.patience_s * S;
        let mut quiet_since = None;
        while let Some(((at, _), event)) = self.events.pop_first() {
            self.now = at;
            self.steps += 1;
            self.handle(event);
            self.within_quota();
            if self.check.broken().is_some() {
                return;
            }
            if at > self.faults_end && self.coord.is_over() {
                self.quiet = true;
                self.abort_stale();
                if self.is_still() {
                    let since = *quiet_since.get_or_insert(at);
                    if at > since + 100 * MS {
                        break;
                    }
                } else {
                    quiet_since = None;
                }
            }
            if at > deadline {
                let why = self.what_moves();
                self.check.violated("it does not end", why);
                return;
            }
        }
        self.final_check();
    }

    /// An operator sees a hold that nobody works on any more, because a disk that had lied has brought it back, and aborts it.
    fn abort_stale(&mut self) {
        for hold in self.stale.clone() {
            let x = self.nodes[B].holds.get(&hold);
            if self.nodes[B].up && x.is_some_and(|x| !x.is_over()) {
                let call = Call {
                    id: 0,
                    life: u64::MAX,
                    hold,
                    session: 0,
                    request: Request::Abort,
                };
                let work = self.on_call(B, call);
                self.survive(B, work);
            }
        }
    }

    fn within_quota(&mut self) {
        for h in [A, B] {
            let disk = &self.nodes[h].disk;
            let (has, quota) = (disk.segments(), disk.quota);
            if has > quota || has != disk.used {
                let how = format!(
                    "{has} segments on {}, quota {quota}, {} noted",
                    name(h),
                    disk.used
                );
                self.check.violated("bounded", how);
            }
        }
    }

    /// What has gone wrong so far.
    pub fn seen(&self) -> Counts {
        let mut all = self.check.seen;
        self.nodes.iter().for_each(|n| all.add(&n.disk.seen));
        all
    }

    fn is_still(&self) -> bool {
        self.outside_flying == 0
            && self.nodes.iter().all(|n| {
                n.up && n.socket.is_empty()
                    && n.pending.is_empty()
                    && n.holds.values().all(|h| h.is_over())
            })
            && self
                .vms
                .iter()
                .all(|v| !v.stopped && v.rings.iter().all(VecDeque::is_empty))
    }

    fn what_moves(&self) -> String {
        let holds: Vec<String> = (0..2)
            .flat_map(|h| {
                self.nodes[h]
                    .holds
                    .values()
                    .map(move |x| format!("{} {}", name(h), x.summary()))
            })
            .collect();
        let rings: Vec<Vec<usize>> = self
            .vms
            .iter()
            .map(|v| v.rings.iter().map(VecDeque::len).collect())
            .collect();
        format!(
            "coordinator {}; holds: {}; VMs {:?}; frames in rings {rings:?}; sockets {:?}",
            self.coord.summary(),
            holds.join("; "),
            self.vms.iter().map(|v| v.procs).collect::<Vec<_>>(),
            self.nodes
                .iter()
                .map(|n| n.socket.len())
                .collect::<Vec<_>>(),
        )
    }

    fn final_check(&mut self) {
        use gangway::migration::machine::Outcome;
        let (at, other) = match self.coord.outcome() {
            Some(Outcome::Moved) => (B, A),
            _ => (A, B),
        };
        for v in 0..self.vms.len() {
            let p = self.vms[v].procs;
            if self.vms[v].died && p == [Proc::Absent; 2] && at == A {
                self.check.dead.insert(v as u8);
                continue;
            }
            if p[at] != Proc::Running || p[other] != Proc::Absent {
                let outcome = self.coord.outcome();
                self.check
                    .violated("all or nothing", format!("{outcome:?}, but vm{v} is {p:?}"));
                return;
            }
        }
        for h in [A, B] {
            let used = self.nodes[h].disk.used;
            if used > 0 {
                self.check.violated(
                    "bounded",
                    format!("{used} segments are left on {}", name(h)),
                );
                return;
            }
        }
        self.check.complete();
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Tick(h, life) => {
                if self.nodes[h].up && self.nodes[h].life == life {
                    let next = self.rng.range(1500, 4000);
                    self.after(next, Event::Tick(h, life));
                    let work = self.tick(h);
                    self.survive(h, work);
                }
            }
            Event::Call(h, life, call) => {
                if self.nodes[h].up && self.nodes[h].life == life && self.links[h] {
                    let work = self.on_call(h, call);
                    self.survive(h, work);
                } else {
                    self.say(|| format!("{} does not hear {:?}", name(h), call.request));
                }
            }
            Event::Reply(life, id, reply) => self.on_reply(life, id, reply),
            Event::Coord(life, e) => self.on_coord(life, e),
            Event::Ship(conn, to, hold, body) => {
                let Some(c) = self.conns.get_mut(&conn) else {
                    return;
                };
                if !c.broken && !self.links[LINK_AB] {
                    self.break_conn(conn);
                } else if !c.broken && self.nodes[to].up {
                    let work = self.on_ship(to, conn, hold, body);
                    self.survive(to, work);
                }
            }
            Event::Lost(conn, h) => {
                if self.nodes[h].up {
                    self.on_lost(h, conn);
                }
            }
            Event::Guest(v) => self.guest(v),
            Event::GoesOn(v) => self.goes_on(v),
            Event::Outside => self.outside(),
            Event::Uplink(h, frame) => {
                self.outside_flying -= 1;
                // What a socket cannot take, or nobody listens for, is the network's loss: it was never accepted.
                if self.nodes[h].up && self.nodes[h].socket.len() < SOCKET {
                    self.nodes[h].socket.push_back(frame);
                }
            }
            Event::Announced(v, h) => {
                if self.located[usize::from(v)] != h {
                    self.located[usize::from(v)] = h;
                    let old = 1 - h;
                    self.say(|| format!("the network knows vm{v} on {}", name(h)));
                    let at = self.path_time(old);
                    self.after(at, Event::Marker(old, v));
                } else if self.rng.permille(500) {
                    let at = self.path_time(1 - h);
                    self.after(at, Event::Marker(1 - h, v));
                }
            }
            // Behind what came before it, like any frame.
            Event::Marker(h, v) => {
                if self.nodes[h].up && self.nodes[h].socket.len() < SOCKET {
                    self.nodes[h].socket.push_back(Numbered::mark(v));
                }
            }
            Event::Fault(f) => self.fault(f),
            Event::Heal(link) => {
                self.links[link] = true;
                self.say(|| format!("link {link} is back"));
            }
            Event::DiskWell(h) => {
                let d = &mut self.nodes[h].disk;
                (d.failing, d.full, d.lying) = (false, false, false);
                let failed = d.queues.values().any(|q| q.failed);
                self.say(|| format!("the disk of {} is well", name(h)));
                // A spool that has stopped takes nothing until it is opened again: somebody restarts the switch.
                if failed && self.nodes[h].up {
                    self.kill(h);
                }
            }
            Event::Start(h) => self.start(h),
            Event::TakeUp => self.take_up(),
        }
    }

    fn survive(&mut self, h: Host, work: Work) {
        if work.is_err() {
            self.kill(h);
        }
    }

    /// A place at which the death of the process can matter.
    pub fn mortal(&mut self, h: Host) -> Work {
        match &mut self.nodes[h].fuse {
            Some(0) => {
                self.nodes[h].fuse = None;
                let kinds = [Seen::SourceSwitchKilled, Seen::TargetSwitchKilled];
                self.check.seen.count(kinds[h]);
                Err(Killed)
            }
            Some(n) => {
                *n -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn kill(&mut self, h: Host) {
        self.say(|| format!("{}'s switch is killed", name(h)));
        self.check.kills += 1;
        let n = &mut self.nodes[h];
        n.up = false;
        n.life += 1;
        n.fuse = None;
        n.holds.clear();
        n.pending.clear();
        n.socket.clear();
        let conns: Vec<u64> = self
            .conns
            .iter()
            .filter(|(_, c)| !c.broken)
            .map(|(n, _)| *n)
            .collect();
        for c in conns {
            self.break_conn(c);
        }
        let back = self.rng.range(20 * MS, 800 * MS);
        self.after(back, Event::Start(h));
    }

    /// Nothing arrives any more; who notices when is chance: half-open for up to seconds.
    pub fn break_conn(&mut self, conn: u64) {
        if let Some(c) = self.conns.get_mut(&conn)
            && !c.broken
        {
            c.broken = true;
            for h in [A, B] {
                let half_open = self.rng.permille(300);
                if half_open {
                    self.check.seen.count(Seen::HalfOpen);
                }
                let at = self.rng.range(MS, if half_open { 3 * S } else { 100 * MS });
                self.after(at, Event::Lost(conn, h));
            }
        }
    }

    /// On a stream of a connection; order is kept on each.
    pub fn ship(&mut self, conn: u64, to: Host, hold: HoldId, body: Body) {
        let stream = match &body {
            Body::Batch(lane, _) => 1 + lane,
            _ => 0,
        };
        let at = self.now + self.rng.range(200, 4 * MS);
        let Some(c) = self.conns.get_mut(&conn) else {
            return;
        };
        let last = c.arrival.entry((to, stream)).or_default();
        let at = at.max(*last + 1);
        *last = at;
        if matches!(body, Body::Batch(..)) {
            c.batches += 1;
        }
        let now = self.now;
        self.after(at - now, Event::Ship(conn, to, hold, body));
    }

    fn flight(&mut self) -> Option<u64> {
        let faulty = self.now < self.faults_end;
        if faulty && self.rng.permille(self.loss) {
            self.check.seen.count(Seen::Loss);
            return None;
        }
        Some(if faulty && self.rng.permille(self.late) {
            self.check.seen.count(Seen::Reorder);
            self.rng.range(100 * MS, 5 * S)
        } else {
            self.rng.range(200, 5 * MS)
        })
    }

    /// A request to a switch: may be lost, late, or arrive twice.
    pub fn call(&mut self, h: Host, call: Call) {
        if !self.nodes[h].up {
            return;
        }
        let life = self.nodes[h].life;
        if let Some(at) = self.flight() {
            self.after(at, Event::Call(h, life, call));
        }
        if self.now < self.faults_end
            && self.rng.permille(self.twice)
            && let Some(at) = self.flight()
        {
            self.check.seen.count(Seen::Duplicate);
            self.after(at, Event::Call(h, life, call));
        }
    }

    /// A reply to the coordinator.
    pub fn reply(&mut self, h: Host, call: &Call, reply: Reply) {
        self.reply_in(h, call, 0, reply);
    }

    /// The same for what takes time.
    pub fn reply_in(&mut self, h: Host, call: &Call, delay: u64, reply: Reply) {
        self.say(|| format!("{} answers {:?}: {reply:?}", name(h), call.request));
        if self.links[h]
            && let Some(at) = self.flight()
        {
            self.after(delay + at, Event::Reply(call.life, call.id, reply));
        }
    }

    /// True while hosts reach each other.
    pub fn hosts_connected(&self) -> bool {
        self.links[LINK_AB]
    }

    fn path_time(&mut self, h: Host) -> u64 {
        let at = (self.now + self.rng.range(100, 3 * MS)).max(self.path[h] + 1);
        self.path[h] = at;
        at - self.now
    }

    fn guest(&mut self, v: u8) {
        if !self.quiet {
            let next = self.rng.range(2 * MS, 12 * MS);
            self.after(next, Event::Guest(v));
        }
        let vms = self.vms.len() as u8;
        let vm = &self.vms[usize::from(v)];
        if !vm.procs.contains(&Proc::Running) || self.quiet {
            return;
        }
        for _ in 0..self.rng.range(0, 5) {
            let to = self.rng.range(0, u64::from(vms) - 1) as u8;
            let queue = self.rng.range(0, u64::from(self.queues) - 1) as u8;
            let ring = &mut self.vms[usize::from(v)].rings[usize::from(queue)];
            if to != v && ring.len() < RING {
                let frame = self.check.send((v, queue, to));
                ring.push_back(frame);
            }
        }
        if self.rng.permille(20) {
            let until = self.now + self.rng.range(MS, 40 * MS);
            self.vms[usize::from(v)].deaf_until = until;
        }
    }

    /// On the source a coordinator that has stopped it, too, says when it runs again.
    fn goes_on(&mut self, v: u8) {
        let procs = self.vms[usize::from(v)].procs;
        if procs[B] == Proc::Paused {
            self.run_vm(B, v);
        } else if procs[A] == Proc::Paused {
            if self.coord.lets_run() {
                self.run_vm(A, v);
            } else {
                return self.after(100 * MS, Event::GoesOn(v));
            }
        }
        self.vms[usize::from(v)].stopped = false;
    }

    fn outside(&mut self) {
        if self.quiet {
            return;
        }
        let next = self.rng.range(2 * MS, 10 * MS);
        self.after(next, Event::Outside);
        let to = self.rng.range(0, self.vms.len() as u64 - 1) as u8;
        for _ in 0..self.rng.range(0, 3) {
            let frame = self.check.send((EXT, 0, to));
            let h = self.located[usize::from(to)];
            let at = self.path_time(h);
            self.outside_flying += 1;
            self.after(at, Event::Uplink(h, frame));
        }
    }

    fn fault(&mut self, fault: Fault) {
        if fault != Fault::TargetLosesPower {
            self.say(|| format!("FAULT {fault:?}"));
        }
        let left = self.faults_end.saturating_sub(self.now);
        match fault {
            Fault::KillSwitch(h, fuse) => {
                if self.nodes[h].up {
                    self.nodes[h].fuse = Some(fuse);
                }
            }
            Fault::KillCoordinator => self.kill_coordinator(false),
            Fault::CoordinatorLosesPower => self.kill_coordinator(true),
            // Behind the last look at them that would end VMs for good, which nobody promises anything about.
            Fault::TargetLosesPower => {
                if !self.coord.may_have_looked() && self.nodes[B].up {
                    self.say(|| format!("FAULT {fault:?}"));
                    self.kill(B);
                    let node = &mut self.nodes[B];
                    let betrayed = node.disk.lose_power(&mut self.rng);
                    self.check.betrayed.extend(betrayed.frames);
                    self.stale.extend(betrayed.holds);
                    self.check.seen.count(Seen::TargetWithoutPower);
                    for vm in &mut self.vms {
                        vm.procs[B] = Proc::Absent;
                    }
                }
            }
            Fault::CutLink(link) => {
                self.links[link] = false;
                self.check.seen.count(Seen::Cut);
                if link == LINK_AB {
                    let all: Vec<u64> = self.conns.keys().copied().collect();
                    all.into_iter().for_each(|c| self.break_conn(c));
                }
                let heal = self.rng.range(5 * MS, left.max(6 * MS));
                self.after(heal, Event::Heal(link));
            }
            Fault::CutShipment => {
                let all: Vec<u64> = self.conns.keys().copied().collect();
                all.into_iter().for_each(|c| self.break_conn(c));
            }
            Fault::SyncFails(h) | Fault::DiskFull(h) | Fault::DiskLies(h) => {
                let d = &mut self.nodes[h].disk;
                match fault {
                    Fault::SyncFails(_) => d.failing = true,
                    Fault::DiskFull(_) => d.full = true,
                    _ => d.lying = true,
                }
                let heal = self.rng.range(5 * MS, left.max(6 * MS));
                self.after(heal, Event::DiskWell(h));
            }
            Fault::GuestReset(v) => {
                let vm = &mut self.vms[usize::from(v)];
                if vm.procs.contains(&Proc::Running) {
                    let gone = vm.rings.iter_mut().flat_map(|r| r.drain(..));
                    self.check.withdrawn.extend(gone);
                    self.check.seen.count(Seen::GuestReset);
                }
            }
            Fault::GuestStops(v) => {
                let vm = &mut self.vms[usize::from(v)];
                let runs = vm.procs.iter_mut().find(|p| **p == Proc::Running);
                if let (Some(p), false) = (runs, vm.stopped) {
                    *p = Proc::Paused;
                    vm.stopped = true;
                    self.check.seen.count(Seen::GuestStop);
                    let on = self.rng.range(5 * MS, 2 * S);
                    self.after(on, Event::GoesOn(v));
                }
            }
            // What it had queued goes with its memory.
            Fault::SourceVmDies(v) => {
                let vm = &mut self.vms[usize::from(v)];
                if vm.procs[A] != Proc::Absent {
                    vm.procs[A] = Proc::Absent;
                    vm.died = true;
                    self.check.seen.count(Seen::SourceVmKilled);
                    if !matches!(vm.procs[B], Proc::Arrived | Proc::Running) {
                        let gone = vm.rings.iter_mut().flat_map(|r| r.drain(..));
                        self.check.withdrawn.extend(gone);
                    }
                }
            }
            // Behind the coordinator's last look nobody can help it any more.
            Fault::TargetVmDies(v) => {
                let p = &mut self.vms[usize::from(v)].procs[B];
                if !self.coord.may_have_looked() && matches!(p, Proc::Incoming | Proc::Arrived) {
                    *p = Proc::Absent;
                    self.check.seen.count(Seen::TargetVmKilled);
                }
            }
            Fault::OperatorAborts => self.operator_aborts(),
        }
    }

    /// A VM begins to run here.
    pub fn run_vm(&mut self, h: Host, v: u8) {
        let vm = &mut self.vms[usize::from(v)];
        vm.procs[h] = Proc::Running;
        let both = vm.procs == [Proc::Running; 2];
        self.say(|| format!("vm{v} runs on {}", name(h)));
        if both {
            self.check
                .violated("all or nothing", format!("vm{v} runs twice"));
        }
        if h == B {
            self.check.activated = true;
        } else if self.check.activated {
            self.check.violated(
                "all or nothing",
                format!("vm{v} runs on A, after one ran on B"),
            );
        }
    }
}

/// For people.
pub fn name(h: Host) -> &'static str {
    ["A", "B"][h]
}
