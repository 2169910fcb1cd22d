//! A move of two VMs between two hosts, with every interleaving of its parts and every crash: a model for the checker of
//! stateright. The machines are the product's: the table of a hold's states ([`gangway_switch::hold::machine`]) and the migration's
//! machine ([`gangway::migration::machine`]).
//!
//! ```text
//!   coordinator -- one order at a time of each step; lost, late, unanswered; dies between any two actions
//!   switches A, B - a hold's state in memory and on disk; die before, between and behind the two, and start again
//!   VMs P, M ----- run, stand still, arrive; P sends to M, and so does the network, whose mind changes with the announcement
//!   two lanes ---- ring or socket -> held at A -> shipped to B -> behind it what came at B -> M
//! ```
//! What the simulation (`tests/sim`) tries in a thousand ways with disks, batches and clocks is here complete, and small: a frame or two
//! on each lane, a bounded number of faults, no clock (what may time out may do so at once), and a frame that is delivered is noted in
//! the same step.
//!
//! Checked ([`State::wrong`]): no VM runs twice, each lane is in order and once, nothing accepted is lost, nothing is delivered at the
//! source behind the cut, and where nothing moves by itself any more it is over: moved or as before, nothing held, all delivered.
//! That this always comes about is what [`rounds`] shows: without faults no state comes back.

mod control;
mod frames;
mod switch;

use std::collections::{HashMap, VecDeque};

use gangway::migration::machine::{Action as Order, Entry, Machine, Outcome};
use gangway::migration::orders::Task;
use gangway::migration::steps::FreezeMode;
use gangway_shared::api::HoldState;
use stateright::{Model, Property};

/// Where the VMs leave.
pub const A: usize = 0;
/// Where they arrive.
pub const B: usize = 1;
/// The VM that sends.
pub const P: usize = 0;
/// The VM that receives.
pub const M: usize = 1;
/// The lane from `P` to `M`.
pub const INSIDE: usize = 0;
/// The lane from the network to `M`.
pub const OUTSIDE: usize = 1;

/// How much there may be of what is not normal, and of frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Bounds {
    /// Frames on each lane.
    pub frames: u8,
    /// Orders or answers that get lost, or come late.
    pub lost: u8,
    /// Deaths of the coordinator.
    pub coordinator: u8,
    /// Deaths of switches.
    pub switches: u8,
    /// The operator's mind changes.
    pub aborts: u8,
}

/// A bug that is put around the machines, to see that it is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bug {
    /// A switch writes nothing down.
    SkipPersist,
    /// What shall be written down before it is done is not written down.
    ForgetFirst,
    /// The commit is ordered before the journal says so.
    SkipJournal,
    /// The target forwards while it still drains.
    OpenBeforeDrained,
    /// The freeze leaves out the lane from the network.
    HoleInTheCut,
    /// An abort of an unknown hold leaves no trace.
    NoTombstone,
    /// The source closes its lanes without waiting for the network.
    DepartAtOnce,
    /// The target's table lets an abort behind the commit through, and a failed step there is put back.
    AbortAfterCommit,
    /// An ended VM can be started again by a late order.
    StartAgain,
}

/// See the crate.
#[derive(Debug, Clone)]
pub struct Move {
    /// When the group's traffic is cut.
    pub freeze: FreezeMode,
    /// How much of each.
    pub bounds: Bounds,
    /// None: as it is.
    pub bug: Option<Bug>,
}

/// What somebody is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs, reason = "named as the requests and QEMU's commands are")]
pub enum Request {
    Show,
    Prepare,
    Open,
    FreezeInside,
    FreezeAll,
    Seal,
    Restore,
    Commit,
    Announce,
    Depart,
    Status,
    Release,
    Abort,
    VmStart(usize),
    VmMigrate(usize),
    VmStop(usize),
    VmSwitchover(usize),
    VmCancel(usize),
    VmEnd(usize),
    VmQuit(usize),
    VmCont(usize),
}

/// A request on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Sent {
    /// To the switch of this host, or to a VM's process there.
    pub host: usize,
    /// What.
    pub request: Request,
    /// Of the coordinator with VMs: an older one's orders are dropped.
    pub session: u8,
}

/// What is under way for a task.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Run {
    task: Task,
    attempt: u32,
    phase: u8,
    open: Vec<Sent>,
    /// It has failed; certainly without an effect.
    failed: Option<bool>,
}

/// The coordinator.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Coordinator {
    machine: Option<Machine>,
    orders: VecDeque<Order>,
    runs: Vec<Run>,
    journal: Vec<Entry>,
    session: u8,
    outcome: Option<Outcome>,
}

/// A host's switch.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Switch {
    up: bool,
    /// Of the hold, in memory.
    state: Option<HoldState>,
    /// And on the disk.
    disk: Option<HoldState>,
    /// In memory: an order to open the hold comes too late.
    too_late: bool,
    /// A: lanes that hold. B: lanes that forward.
    lanes: [bool; 2],
    /// B: the source has put everything back.
    put_back: bool,
}

/// Where a VM is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "as they are said")]
pub enum Proc {
    Absent,
    /// Waits for its memory.
    Incoming,
    Arrived,
    Running,
    Paused,
    /// Its memory is elsewhere.
    Sent,
}

/// A VM.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Vm {
    on: [Proc; 2],
    copying: bool,
    /// The youngest session that a process on each host has heard of.
    session: [u8; 2],
    /// Its process on B was ended for this hold.
    ended: bool,
}

/// Frames in a spool, by their numbers.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Queue {
    frames: Vec<u8>,
    delivered: usize,
    sealed: bool,
}

/// A lane.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Lane {
    sent: u8,
    /// Not taken yet: in the ring of `P`, or in the sockets of both hosts.
    waits: [Vec<u8>; 2],
    /// Of both hosts: accepted.
    accepted: Vec<u8>,
    source: Queue,
    shipped: Queue,
    local: Queue,
    got: Vec<u8>,
    /// The source has acknowledged the cut, and not put back.
    cut: bool,
}

/// All there is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct State {
    coordinator: Coordinator,
    switches: [Switch; 2],
    vms: [Vm; 2],
    lanes: [Lane; 2],
    /// The network finds `M` at B.
    found: bool,
    /// An order that nobody waits for any more, and that may still arrive.
    late: Option<Sent>,
    left: Bounds,
    wrong: Option<&'static str>,
}

/// How far a request gets before the switch dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Death {
    /// Between what it writes down and what it does, whichever comes first.
    Between,
    /// It has done both, and not answered.
    Behind,
}

/// What can happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Happening {
    /// The coordinator's next action.
    Act,
    /// An open request of a task is carried out and answered.
    Answer(usize, usize),
    /// The same, and the answer is lost.
    Unanswered(usize, usize),
    /// A request does not arrive; it may later.
    Late(usize, usize),
    /// A request finds nobody.
    Nobody(usize, usize),
    /// The one that was late arrives.
    Arrives,
    /// The switch that carries it out dies at that.
    Dies(usize, usize, Death),
    /// The coordinator dies; one of its open requests may arrive late.
    CoordinatorDies(Option<(usize, usize)>),
    /// Somebody takes the migration up.
    TakeUp,
    /// `gangway abort`.
    Abort,
    /// A switch dies.
    SwitchDies(usize),
    /// And starts.
    SwitchStarts(usize),
    /// A frame is sent.
    Send(usize),
    /// A switch takes the oldest frame that waits for it.
    Take(usize, usize),
    /// A held frame goes to the other host.
    Ship(usize),
    /// A frame out of a spool is delivered.
    Drain(usize, usize),
    /// What a hold does by itself.
    Settle(usize),
}

impl Happening {
    /// It is not what normally happens.
    pub fn is_fault(&self) -> bool {
        use Happening::*;
        matches!(
            self,
            Unanswered(..) | Late(..) | Dies(..) | CoordinatorDies(_) | Abort | SwitchDies(_)
        )
    }
}

impl Model for Move {
    type State = State;
    type Action = Happening;

    fn init_states(&self) -> Vec<State> {
        let switch = |up| Switch {
            up,
            ..Switch::default()
        };
        let vm = || Vm {
            on: [Proc::Running, Proc::Absent],
            copying: false,
            session: [0; 2],
            ended: false,
        };
        let mut machine = Machine::new(self.freeze);
        let orders = machine.on(gangway::migration::machine::Event::Start).into();
        vec![State {
            coordinator: Coordinator {
                machine: Some(machine),
                orders,
                runs: Vec::new(),
                journal: Vec::new(),
                session: 1,
                outcome: None,
            },
            switches: [switch(true), switch(true)],
            vms: [vm(), vm()],
            lanes: Default::default(),
            found: false,
            late: None,
            left: self.bounds,
            wrong: None,
        }]
    }

    fn actions(&self, s: &State, out: &mut Vec<Happening>) {
        if s.wrong.is_some() {
            return;
        }
        self.control_actions(s, out);
        self.frame_actions(s, out);
    }

    fn next_state(&self, last: &State, step: Happening) -> Option<State> {
        let mut s = last.clone();
        match step {
            Happening::Send(_)
            | Happening::Take(..)
            | Happening::Ship(_)
            | Happening::Drain(..)
            | Happening::Settle(_) => {
                self.frame_step(&mut s, step);
            }
            _ => self.control_step(&mut s, step),
        }
        s.look();
        (s != *last).then_some(s)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("the contract holds", |_, s: &State| s.wrong.is_none()),
            Property::always(
                "where nothing moves any more it is over",
                |m: &Move, s: &State| !m.is_quiet(s) || s.is_over(),
            ),
            Property::sometimes("it moves", |_, s: &State| {
                s.coordinator.outcome == Some(Outcome::Moved) && s.is_over()
            }),
        ]
    }
}

impl Move {
    /// Nothing happens without a fault.
    pub fn is_quiet(&self, s: &State) -> bool {
        let mut actions = Vec::new();
        self.actions(s, &mut actions);
        let moves = |a: &Happening| !a.is_fault() && self.next_state(s, *a).is_some();
        s.wrong.is_none() && !actions.iter().any(moves)
    }

    fn has(&self, bug: Bug) -> bool {
        self.bug == Some(bug)
    }
}

impl State {
    /// Why the contract does not hold, if it does not.
    pub fn wrong(&self) -> Option<&'static str> {
        self.wrong
    }

    fn violated(&mut self, what: &'static str) {
        self.wrong.get_or_insert(what);
    }

    /// What must be in every state.
    fn look(&mut self) {
        if self.vms.iter().any(|vm| vm.on == [Proc::Running; 2]) {
            self.violated("a VM runs twice");
        }
        if self
            .lanes
            .iter()
            .any(|l| l.got.windows(2).any(|w| w[0] >= w[1]))
        {
            self.violated("out of order, or twice");
        }
    }

    /// What must be in the end.
    pub fn is_over(&self) -> bool {
        let vms = |host: usize| {
            let runs = |vm: &Vm| vm.on[host] == Proc::Running && vm.on[1 - host] != Proc::Running;
            self.vms.iter().all(runs)
        };
        let gone = |vm: &Vm| vm.on[A] == Proc::Absent;
        let placed = match self.coordinator.outcome {
            Some(Outcome::Moved) => vms(B) && self.vms.iter().all(gone),
            Some(Outcome::RolledBack | Outcome::NothingDone) => {
                vms(A) && self.vms.iter().all(|vm| vm.on[B] == Proc::Absent)
            }
            _ => false,
        };
        let over = |s: &Switch| {
            s.up && matches!(
                s.state,
                None | Some(HoldState::Aborted | HoldState::Released)
            ) && s.disk.is_none()
        };
        let all = |l: &Lane| {
            let mut accepted = l.accepted.clone();
            accepted.sort_unstable();
            l.waits.iter().all(Vec::is_empty) && l.got == accepted
        };
        placed && self.switches.iter().all(over) && self.lanes.iter().all(all)
    }
}

/// States that come back without a fault: a path that need not end. `states`: how many were looked at.
pub fn rounds(model: &Move) -> (Option<State>, usize) {
    // Depth first; a state that is met while it is still open closes a circle.
    let mut open: HashMap<State, bool> = HashMap::new();
    let mut stack: Vec<(State, Vec<Happening>)> = Vec::new();
    let steps = |s: &State| {
        let mut all = Vec::new();
        model.actions(s, &mut all);
        all
    };
    let begin = |s: State, open: &mut HashMap<State, bool>, stack: &mut Vec<_>| {
        open.insert(s.clone(), true);
        let all = steps(&s);
        stack.push((s, all));
    };
    // A fault lowers a bound that nothing raises: a circle has none in it, and may be looked for among all steps.
    for s in model.init_states() {
        begin(s, &mut open, &mut stack);
    }
    while let Some((s, left)) = stack.last_mut() {
        let Some(step) = left.pop() else {
            let (s, _) = stack.pop().unwrap_or_else(|| unreachable!("it was there"));
            open.insert(s, false);
            continue;
        };
        let Some(next) = model.next_state(s, step) else {
            continue;
        };
        match open.get(&next) {
            Some(true) => return (Some(next), open.len()),
            Some(false) => {}
            None => begin(next, &mut open, &mut stack),
        }
    }
    (None, open.len())
}
