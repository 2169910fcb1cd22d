//! Requests and replies between the coordinator and a switch, the same over the unix socket and over QUIC.
//!
//! # Transport
//! Each call is one bidirectional stream (QUIC, ALPN [`ALPN`]) or one message on the unix socket's connection, which
//! carries any number of calls one after the other. A message is a `u32` length (little endian) and [`crate::codec`]
//! bytes. The first call of every connection is [`Request::Hello`].
//! After the reply to [`Request::VmmOpen`] the stream (on the unix socket: the connection) carries QMP's own bytes
//! both ways until one side closes it.
//!
//! # Holds
//! Source: `HoldOpen`, `Freeze` (once or, with `--freeze early`, twice: inside, then all), `Seal`, `Depart`,
//! `HoldRelease`; at any time before `Depart`: `HoldAbort`.
//! Target: `IncomingPrepare`, (the source ships), `IncomingRestore`, `Commit`, `Announce`, `HoldRelease`; at any time
//! before `Commit`: `HoldAbort`.
//! Every one may be repeated with the same arguments and then answers as the first time.

use serde::{Deserialize, Serialize};
use wincode::{SchemaRead, SchemaWrite};

use crate::id::{HoldId, LaneKey, MacAddr};
use crate::ledger::{IndexBatch, KeptFrame, Ledger, LedgerLane};

/// The QUIC application protocol of control calls.
pub const ALPN: &[u8] = b"gangway-control/1";
/// The version of this API; peers must agree on it.
pub const VERSION: u32 = 1;

/// What a coordinator asks of a switch.
#[derive(Debug, Clone, PartialEq, SchemaRead, SchemaWrite)]
pub enum Request {
    /// Opens the conversation; the reply is [`Reply::Hello`] or a refusal.
    Hello {
        /// [`VERSION`] of the caller.
        version: u32,
    },
    /// [`Reply::Host`].
    HostShow,
    /// [`Reply::Ports`].
    PortList,
    /// [`Reply::Vms`].
    VmList,
    /// [`Reply::Links`]: counters per pair of ports since the switch started.
    LinkList,
    /// [`Reply::Fdb`].
    FdbList,
    /// Connects this stream to the QMP socket of a configured VM: [`Reply::Ok`], then raw bytes.
    VmmOpen {
        /// The VM's configured name.
        vm: String,
    },
    /// Starts the configured `incoming` command of a VM; [`Reply::Started`] once its QMP socket accepts connections.
    VmmStart {
        /// The VM's configured name.
        vm: String,
        /// The hold that it is started for.
        hold: HoldId,
    },
    /// Ends (SIGTERM, then SIGKILL) the process that `VmmStart` started for this VM, if it still runs, and only that.
    VmmStop {
        /// The VM's configured name.
        vm: String,
        /// The hold that it was started for.
        hold: HoldId,
    },
    /// Source: reserves the spool and connects to the target's switch. No frame is held yet.
    HoldOpen(HoldOpen),
    /// Source: one acknowledged cut over all workers. [`Reply::Frozen`].
    Freeze {
        /// Of which hold.
        hold: HoldId,
        /// Which lanes.
        scope: Scope,
    },
    /// Source, all VMs of the group stopped: reads back what their ports still hold, closes the lanes between them
    /// and waits until the target has spooled and acknowledged them. [`Reply::Hold`].
    Seal {
        /// Of which hold.
        hold: HoldId,
        /// Gives up after this long, in milliseconds, with a refusal; the lanes stay held.
        timeout_ms: u64,
    },
    /// Source, the VMs run on the target: forwards stragglers, and closes the lanes from outside once the network
    /// sends to the target (its announcement comes in at our uplink) or `grace_ms` have passed.
    Depart {
        /// Of which hold.
        hold: HoldId,
        /// How long to wait for the announcement at most, in milliseconds.
        grace_ms: u64,
    },
    /// Target: claims the VMs' ports (they stay dark) and accepts a shipment with this ticket.
    IncomingPrepare(IncomingPrepare),
    /// Target: verifies that all sealed lanes are here and agree with the source's digests. [`Reply::Hold`].
    IncomingRestore {
        /// Of which hold.
        hold: HoldId,
    },
    /// Target, no way back: the ports go live, their lanes start to drain as their guests take frames.
    Commit {
        /// Of which hold.
        hold: HoldId,
    },
    /// Target: tells the network (RARP, repeated) where the VMs are now.
    Announce {
        /// Of which hold.
        hold: HoldId,
    },
    /// [`Reply::Hold`].
    HoldStatus {
        /// Of which hold.
        hold: HoldId,
    },
    /// [`Reply::Holds`].
    HoldList,
    /// Undo: source flushes what it held in order, target forgets what it received. [`Reply::Hold`].
    HoldAbort {
        /// Of which hold.
        hold: HoldId,
    },
    /// Both, after the commit: keeps the report, frees the spool. Refused while lanes are open. [`Reply::Hold`].
    HoldRelease {
        /// Of which hold.
        hold: HoldId,
    },
    /// [`Reply::Workers`].
    WorkerList,
    /// Changes the workers while frames flow; [`Reply::Workers`] as they are then.
    WorkersSet(WorkersSet),
    /// The record of a hold that is over: [`Reply::Ledger`], its lanes from this one on.
    LedgerShow {
        /// Of which hold.
        hold: HoldId,
        /// Of which end.
        role: Role,
        /// The first lane that is wanted.
        lane: u32,
    },
    /// The index of a lane: [`Reply::LedgerIndex`].
    LedgerIndex(LedgerPage),
    /// The frames of a lane that were kept: [`Reply::LedgerFrames`].
    LedgerFrames(LedgerPage),
}

impl Request {
    /// Its name, for messages: what it carries may be long, or secret.
    pub fn name(&self) -> &'static str {
        match self {
            Request::Hello { .. } => "Hello",
            Request::HostShow => "HostShow",
            Request::PortList => "PortList",
            Request::VmList => "VmList",
            Request::LinkList => "LinkList",
            Request::FdbList => "FdbList",
            Request::VmmOpen { .. } => "VmmOpen",
            Request::VmmStart { .. } => "VmmStart",
            Request::VmmStop { .. } => "VmmStop",
            Request::HoldOpen(_) => "HoldOpen",
            Request::Freeze { .. } => "Freeze",
            Request::Seal { .. } => "Seal",
            Request::Depart { .. } => "Depart",
            Request::IncomingPrepare(_) => "IncomingPrepare",
            Request::IncomingRestore { .. } => "IncomingRestore",
            Request::Commit { .. } => "Commit",
            Request::Announce { .. } => "Announce",
            Request::HoldStatus { .. } => "HoldStatus",
            Request::HoldList => "HoldList",
            Request::HoldAbort { .. } => "HoldAbort",
            Request::HoldRelease { .. } => "HoldRelease",
            Request::WorkerList => "WorkerList",
            Request::WorkersSet(_) => "WorkersSet",
            Request::LedgerShow { .. } => "LedgerShow",
            Request::LedgerIndex(_) => "LedgerIndex",
            Request::LedgerFrames(_) => "LedgerFrames",
        }
    }
}

/// A part of a lane's record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, SchemaRead, SchemaWrite)]
pub struct LedgerPage {
    /// Of which hold.
    pub hold: HoldId,
    /// Of which end.
    pub role: Role,
    /// Which lane, in the order of [`Reply::Ledger`].
    pub lane: u32,
    /// 0 at first, then what the last page said.
    pub at: u64,
}

/// See [`Request::WorkersSet`]. What is not given stays.
#[derive(Debug, Clone, PartialEq, Eq, Default, SchemaRead, SchemaWrite)]
pub struct WorkersSet {
    /// How many. While a hold is open their number does not change.
    pub count: Option<u32>,
    /// One CPU for each worker; an empty list: none is pinned.
    pub cpus: Option<Vec<u32>>,
    /// How they wait.
    pub poll: Option<PollMode>,
}

/// How a worker waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, SchemaRead, SchemaWrite)]
#[serde(rename_all = "snake_case")]
pub enum PollMode {
    /// Polls while there is work, then sleeps.
    Adaptive,
    /// Never sleeps.
    Busy,
}

/// Which lanes a freeze cuts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, SchemaRead, SchemaWrite)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// Those between two VMs of the group (the method's step 3).
    Inside,
    /// These, and everything from outside towards the group.
    All,
}

/// See [`Request::HoldOpen`].
#[derive(Debug, Clone, PartialEq, SchemaRead, SchemaWrite)]
pub struct HoldOpen {
    /// New, or the same as before on a repeat.
    pub hold: HoldId,
    /// The VMs of the group; all their ports take part.
    pub vms: Vec<String>,
    /// `address:port` of the target's switch (QUIC).
    pub target_address: String,
    /// The target's host name, as in its certificate.
    pub target_host: String,
    /// Proof towards the target that the coordinator wants this shipment.
    pub ticket: [u8; 32],
}

/// See [`Request::IncomingPrepare`].
#[derive(Debug, Clone, PartialEq, SchemaRead, SchemaWrite)]
pub struct IncomingPrepare {
    /// The source's hold.
    pub hold: HoldId,
    /// The VMs of the group.
    pub vms: Vec<String>,
    /// Names and MACs of their ports on the source; the target must have ports of the same names.
    pub ports: Vec<IncomingPort>,
    /// The host that will ship, as in its certificate.
    pub source_host: String,
    /// Must be shown by the shipment.
    pub ticket: [u8; 32],
}

/// A port that is to arrive.
#[derive(Debug, Clone, PartialEq, SchemaRead, SchemaWrite)]
pub struct IncomingPort {
    /// Its configured name on both hosts.
    pub name: String,
    /// Its VM.
    pub vm: String,
    /// The guest's address.
    pub mac: Option<MacAddr>,
}

/// What a switch answers.
#[derive(Debug, Clone, PartialEq, SchemaRead, SchemaWrite)]
pub enum Reply {
    /// Done.
    Ok,
    /// Not now, or not like this; nothing has changed.
    Refused(Refusal),
    /// To [`Request::Hello`].
    Hello {
        /// [`VERSION`] of the switch.
        version: u32,
        /// The host's name.
        host: String,
    },
    /// To [`Request::HostShow`].
    Host(HostInfo),
    /// To [`Request::PortList`].
    Ports(Vec<PortInfo>),
    /// To [`Request::VmList`].
    Vms(Vec<VmInfo>),
    /// To [`Request::LinkList`].
    Links(Vec<LinkInfo>),
    /// To [`Request::FdbList`].
    Fdb(Vec<FdbInfo>),
    /// To [`Request::VmmStart`].
    Started {
        /// The process.
        pid: u32,
    },
    /// To [`Request::Freeze`].
    Frozen {
        /// When the last worker had passed the cut: nanoseconds since the Unix epoch, the switch's clock.
        at_ns: u64,
        /// False if the queue of a TAP port was not seen empty within its time.
        drained: bool,
    },
    /// The hold as it is now.
    Hold(HoldInfo),
    /// All holds that the switch remembers.
    Holds(Vec<HoldInfo>),
    /// To [`Request::WorkerList`] and [`Request::WorkersSet`].
    Workers(Vec<WorkerInfo>),
    /// To [`Request::LedgerShow`].
    Ledger {
        /// All but the lanes.
        ledger: Ledger,
        /// Some of them, from the wanted one on; none behind the last one.
        lanes: Vec<LedgerLane>,
    },
    /// To [`Request::LedgerIndex`].
    LedgerIndex {
        /// In order.
        batches: Vec<IndexBatch>,
        /// Where the next page begins; absent: this is the last one.
        next: Option<u64>,
    },
    /// To [`Request::LedgerFrames`].
    LedgerFrames {
        /// In order.
        frames: Vec<KeptFrame>,
        /// Where the next page begins; absent: this is the last one.
        next: Option<u64>,
    },
}

/// Why a request was refused, and what to do.
#[derive(Debug, Clone, PartialEq, Eq, SchemaRead, SchemaWrite, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// For programs.
    pub code: RefusalCode,
    /// For people: what, where, what to do. One line, no newline.
    pub message: String,
}

/// See [`Refusal`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, SchemaRead, SchemaWrite)]
pub enum RefusalCode {
    /// The versions differ.
    Version,
    /// No such VM, port or hold here.
    Unknown,
    /// Not in the present state.
    State,
    /// Somebody else has it.
    Busy,
    /// No room, no descriptor, no memory.
    Resources,
    /// The peer switch could not be reached or refused.
    Peer,
    /// It took too long.
    Timeout,
    /// The request makes no sense.
    Malformed,
    /// Something broke here; see the switch's log.
    Internal,
}

/// A host.
#[derive(Debug, Clone, PartialEq, Serialize, SchemaRead, SchemaWrite)]
pub struct HostInfo {
    /// Its name.
    pub name: String,
    /// The switch's version.
    pub version: String,
    /// Seconds since the switch started.
    pub uptime_s: u64,
    /// Number of workers.
    pub workers: u32,
    /// Where QEMU's memory should be sent to.
    pub migration_address: String,
    /// Numbers of ports, VMs and FDB entries.
    pub ports: u32,
    /// VMs configured.
    pub vms: u32,
    /// Learned and configured addresses.
    pub fdb_entries: u32,
    /// Bytes of the spool in use and allowed.
    pub spool_used_bytes: u64,
    /// Quota of the spool.
    pub spool_quota_bytes: u64,
    /// Why held senders get no more room and wait, if so.
    pub spool_error: Option<String>,
    /// Holds that nobody asks for any more, or that hold frames for longer than they may, if there are any.
    pub holds_overdue: Option<String>,
}

/// A worker: a thread that serves queues.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, SchemaRead, SchemaWrite)]
pub struct WorkerInfo {
    /// Its number, from 0.
    pub worker: u32,
    /// The CPU that it is pinned to, if it is.
    pub cpu: Option<u32>,
    /// How it waits.
    pub poll: PollMode,
    /// The queues that it serves.
    pub queues: Vec<WorkerQueue>,
    /// Frames from its queues since the switch started, those of earlier workers with its number included.
    pub rx_frames: u64,
    /// Frames that it has sent, likewise.
    pub tx_frames: u64,
}

/// A queue of a port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, SchemaRead, SchemaWrite)]
pub struct WorkerQueue {
    /// The port's configured name.
    pub port: String,
    /// Which queue pair, from 0.
    pub queue: u32,
}

/// A port and its counters since the switch started. `rx` is what the switch received from the port.
#[derive(Debug, Clone, PartialEq, Default, Serialize, SchemaRead, SchemaWrite)]
pub struct PortInfo {
    /// Configured name.
    pub name: String,
    /// `vhost-user`, `tap` or `uplink`.
    pub kind: String,
    /// Its VM, if any.
    pub vm: Option<String>,
    /// Configured address, if any.
    pub mac: Option<MacAddr>,
    /// `down`, `up`, `standby` (claimed by an incoming VM) or `departed`.
    pub state: String,
    /// Why it is down, if something is wrong.
    pub error: Option<String>,
    /// Frames from the port.
    pub rx_frames: u64,
    /// Bytes from the port.
    pub rx_bytes: u64,
    /// Frames to the port.
    pub tx_frames: u64,
    /// Bytes to the port.
    pub tx_bytes: u64,
    /// Its queue pairs, up to the last one that carried a frame.
    pub queues: Vec<QueueInfo>,
    /// Dropped frames by reason, only those that are not zero.
    pub drops: Vec<(String, u64)>,
}

/// A queue pair of a port, and its counters since the switch started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, SchemaRead, SchemaWrite)]
pub struct QueueInfo {
    /// Frames from the port by this queue.
    pub rx_frames: u64,
    /// Frames to the port by this queue.
    pub tx_frames: u64,
}

/// A VM that the configuration names.
#[derive(Debug, Clone, PartialEq, Serialize, SchemaRead, SchemaWrite)]
pub struct VmInfo {
    /// Configured name.
    pub name: String,
    /// Its ports.
    pub ports: Vec<String>,
    /// True while its QMP socket accepts connections (asked at the time of the call).
    pub reachable: bool,
    /// QMP's `query-status` status; `absent` if nobody listens on its QMP socket, `unreachable` if somebody does and does not answer.
    pub status: String,
    /// True if it can arrive here (an `incoming` command is configured).
    pub can_arrive: bool,
}

/// What one port sent to another, unicast, since the switch started.
#[derive(Debug, Clone, PartialEq, Serialize, SchemaRead, SchemaWrite)]
pub struct LinkInfo {
    /// Sending port.
    pub from: String,
    /// Its VM.
    pub from_vm: Option<String>,
    /// Receiving port.
    pub to: String,
    /// Its VM.
    pub to_vm: Option<String>,
    /// Frames.
    pub frames: u64,
    /// Bytes of whole frames.
    pub bytes: u64,
    /// Bytes behind the transport header (TCP, UDP), or behind the network header.
    pub payload_bytes: u64,
    /// Milliseconds since the last frame, at most.
    pub idle_ms: u64,
}

/// An entry of the forwarding database.
#[derive(Debug, Clone, PartialEq, Serialize, SchemaRead, SchemaWrite)]
pub struct FdbInfo {
    /// The address.
    pub mac: MacAddr,
    /// Where it is.
    pub port: String,
    /// Configured, not learned.
    pub fixed: bool,
    /// Seconds since it was last seen.
    pub age_s: u32,
}

/// Which end of a move this hold is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, SchemaRead, SchemaWrite)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// The VMs leave.
    Source,
    /// The VMs arrive.
    Target,
}

/// Where a hold stands.
///
/// ```text
/// source:  Open --Freeze--> FrozenInside --Freeze--> Frozen --Seal--> Sealed --Depart--> Departing ~~> Departed --Release--> Released
///            `----------------Freeze (all)-------------^
///          Open, FrozenInside, Frozen, Sealed --Abort----> Aborting ~~> Aborted
///          Open, FrozenInside, Frozen         --TimedOut-> Aborting
///
/// target:  Prepared --Restore--> Restored --Commit--> Draining ~~> Live --Release--> Released
///          Prepared, Restored --Abort----> Aborted
///          Prepared           --TimedOut-> Aborted
///                                 Draining, Live --Announce--> as they were
/// ```
/// `~~>` happens by itself: every lane was acknowledged, delivered, or put back. A VM that stops by itself freezes an open hold.
/// `TimedOut`: its coordinator is gone (`hold.then = "put-back"`); in `Open` only if lanes hold, in `Prepared` only if it never was `Restored`. Behind a restart of its switch a hold stands where it stood, but
/// `Live` drains once more, and `Restored` is `Prepared` again if not all that was verified is there.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, SchemaRead, SchemaWrite,
)]
#[serde(rename_all = "snake_case")]
pub enum HoldState {
    /// Source: spool reserved, nothing held.
    Open,
    /// Source: lanes between the group's VMs are held.
    FrozenInside,
    /// Source: all lanes towards the group are held.
    Frozen,
    /// Source: the group's own lanes are complete and acknowledged by the target.
    Sealed,
    /// Source: stragglers are forwarded.
    Departing,
    /// Source: every lane is complete and acknowledged.
    Departed,
    /// Target: ports claimed, shipment accepted.
    Prepared,
    /// Target: sealed lanes verified.
    Restored,
    /// Target: live, lanes are draining.
    Draining,
    /// Target: every lane forwards.
    Live,
    /// Put back, still draining.
    Aborting,
    /// Put back.
    Aborted,
    /// Done and freed.
    Released,
}

/// A hold, for status and report.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, SchemaRead, SchemaWrite)]
pub struct HoldInfo {
    /// Which.
    pub hold: HoldId,
    /// Which end.
    pub role: Role,
    /// Where it stands.
    pub state: HoldState,
    /// The VMs.
    pub vms: Vec<String>,
    /// The peer host.
    pub peer: String,
    /// Trouble with the shipment or with room for it right now, if any.
    pub error: Option<String>,
    /// When the (last) freeze was acknowledged, nanoseconds since the Unix epoch; 0 before.
    pub frozen_ns: u64,
    /// When lanes were let go (commit or abort), likewise.
    pub thawed_ns: u64,
    /// When the last lane had drained, likewise.
    pub drained_ns: u64,
    /// Per lane.
    pub lanes: Vec<LaneInfo>,
}

/// A lane of a hold. Counts are of frames accepted into the spool on the source, and what became of them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, SchemaRead, SchemaWrite)]
pub struct LaneInfo {
    /// Which lane, in the source's names.
    pub lane: LaneKey,
    /// No more frames will be held.
    pub sealed: bool,
    /// Source: accepted. Target: received and synced.
    pub held: Tally,
    /// Source: acknowledged by the target.
    pub shipped: Tally,
    /// Delivered to the receiving port (target; source after an abort).
    pub flushed: Tally,
    /// Frames that arrived at the target's own ports behind the shipped ones and were queued (target).
    pub queued_behind: u64,
    /// Could not be held; must be zero.
    pub dropped: u64,
}

/// Frames, bytes, and the running digest over them (docs/formats/spool.md, "Digest").
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, SchemaRead, SchemaWrite,
)]
pub struct Tally {
    /// Frames.
    pub frames: u64,
    /// Bytes of the frames (without headers of ours).
    pub bytes: u64,
    /// Running digest.
    pub digest: u64,
}

impl Tally {
    /// Counts records; their batch goes into the digest by [`Tally::mix`].
    #[inline]
    pub fn count(&mut self, frames: u64, bytes: u64) {
        self.frames += frames;
        self.bytes += bytes;
    }

    /// Adds one batch to the digest: `digest = mix(digest ^ (first_seq << 32 | checksum))` with the finalizer of SplitMix64.
    #[inline]
    pub fn mix(&mut self, first_seq: u64, checksum: u32) {
        let mut z = self.digest ^ (first_seq << 32 | u64::from(checksum));
        z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        self.digest = z ^ (z >> 31);
    }
}
