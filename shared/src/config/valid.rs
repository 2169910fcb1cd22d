//! The configuration after all checks: what the rest of the switch may rely on. Defaults stand in parentheses.

use std::net::SocketAddr;
use std::path::PathBuf;

use crate::id::MacAddr;

/// A host's switch.
#[derive(Debug, Clone, PartialEq)]
pub struct HostConfig {
    /// `host.name`: must be the name in the host's certificate.
    pub name: String,
    /// `host.state_dir` (`/var/lib/gangway`).
    pub state_dir: PathBuf,
    /// `control.socket` (`/run/gangway/switch.sock`): unix socket for the local coordinator; mode 0600.
    pub control_socket: PathBuf,
    /// `control.listen`: QUIC, for coordinators and for other switches; absent: local control only.
    pub listen: Option<SocketAddr>,
    /// `[tls]`: needed with `control.listen`.
    pub tls: Option<TlsFiles>,
    /// `[workers]`.
    pub workers: Workers,
    /// `fdb.ageing_s` (300, IEEE 802.1Q table 8-6).
    pub fdb_ageing_s: u32,
    /// `fdb.capacity` (1048576).
    pub fdb_capacity: usize,
    /// `flows.capacity` (1048576), of each worker.
    pub flows_capacity: usize,
    /// `[spool]`.
    pub spool: SpoolConfig,
    /// `[hold]`.
    pub hold: HoldConfig,
    /// `[ledger]`.
    pub ledger: LedgerConfig,
    /// `keeper.dir`: where the switch listens for `gangway-keeper`, which serves the sockets of its vhost-user ports; absent: the
    /// switch serves them itself.
    pub keeper_dir: Option<PathBuf>,
    /// `migration.address`: where this host receives the memory of VMs; absent: none can arrive.
    pub migration_address: Option<std::net::IpAddr>,
    /// `[[port]]`, in the file's order.
    pub ports: Vec<PortConfig>,
    /// `[[vm]]`, in the file's order. Every `vm` of a port is among them.
    pub vms: Vec<VmConfig>,
}

/// PEM files.
#[derive(Debug, Clone, PartialEq)]
pub struct TlsFiles {
    /// The host's certificate chain.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// The authority that all hosts and coordinators are issued by.
    pub ca: PathBuf,
    /// Which of its certificates count no more (none), as `gangway pki revoke` writes it.
    pub crl: Option<PathBuf>,
}

/// Workers that a switch may have.
pub const WORKERS_MAX: usize = 64;

/// `[workers]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Workers {
    /// `workers.count` (1).
    pub count: usize,
    /// `workers.cpus`: one per worker; empty: not pinned.
    pub cpus: Vec<usize>,
    /// `workers.poll` (`adaptive`).
    pub poll: Poll,
}

/// How a worker waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Poll {
    /// Poll while there is work, then sleep on the kick descriptors.
    Adaptive,
    /// Never sleep.
    Busy,
}

/// `[spool]`.
#[derive(Debug, Clone, PartialEq)]
pub struct SpoolConfig {
    /// `spool.dir` (`spool` under `host.state_dir`).
    pub dir: PathBuf,
    /// `spool.segment_bytes` (1 MiB; 128 KiB to 1 GiB, a multiple of 4096).
    pub segment_bytes: u64,
    /// `spool.quota_bytes` (1 GiB): of all holds together.
    pub quota_bytes: u64,
    /// `spool.sync` (`batch`).
    pub sync: Sync,
    /// What a hold may take of it, and how long a disk may be behind.
    pub limits: SpoolLimits,
}

/// The rest of `[spool]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SpoolLimits {
    /// `spool.sync_ms` (20; 1 to 1000): with `batch`, how often what is held is forced to the disk.
    pub sync_ms: u64,
    /// `spool.sync_bytes` (64 MiB; 1 MiB at least): how much of a lane may not be on the disk yet. Then its senders wait.
    pub sync_bytes: u64,
    /// `spool.hold_bytes` (none; less than `quota_bytes`): of one hold, on each of its two hosts.
    pub hold_bytes: Option<u64>,
    /// `spool.quota_frames` (none; 1024 at least): frames that the holds that there are have accepted, all together.
    pub quota_frames: Option<u64>,
    /// `spool.hold_frames` (none; 1024 at least, less than `quota_frames`): of one hold, on each of its two hosts.
    pub hold_frames: Option<u64>,
}

impl Default for SpoolLimits {
    fn default() -> SpoolLimits {
        SpoolLimits {
            sync_ms: 20,
            sync_bytes: 64 << 20,
            hold_bytes: None,
            quota_frames: None,
            hold_frames: None,
        }
    }
}

/// `[hold]`: a hold that nobody ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HoldConfig {
    /// `hold.quiet_s` (60; 10 to 86400): without a request for so many seconds its coordinator counts as gone.
    pub quiet_s: u64,
    /// `hold.longest_s` (none; 1 to 2592000): for how many seconds a hold may hold frames on the source, from its first freeze on.
    pub longest_s: Option<u64>,
    /// `hold.then` (`keep`): what to do after either.
    pub then: Overdue,
}

impl Default for HoldConfig {
    fn default() -> HoldConfig {
        HoldConfig {
            quiet_s: 60,
            longest_s: None,
            then: Overdue::Keep,
        }
    }
}

/// What becomes of a hold that is overdue. In each case the log says so once, and the status as long as it is so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Overdue {
    /// It stays until somebody ends it.
    Keep,
    /// It is put back where that is safe whatever the coordinator knows (ADR-0035); elsewhere it stays.
    PutBack,
}

/// `[ledger]`: what is remembered of holds that are over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LedgerConfig {
    /// `ledger.dir` (`ledger` under `host.state_dir`).
    pub dir: PathBuf,
    /// `ledger.keep_days` (30; 0 to 3650): older ones are deleted. 0: nothing is kept, and what is there is deleted.
    pub keep_days: u32,
    /// `ledger.keep_bytes` (256 MiB): of all together; the oldest go first.
    pub keep_bytes: u64,
    /// `ledger.frames_bytes` (0): of each hold that ends from now on so many bytes of the held frames themselves are kept, too.
    pub frames_bytes: u64,
}

/// When held frames are forced to the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sync {
    /// Every `spool.sync_ms`, and at each freeze, seal and acknowledgement.
    Batch,
    /// Before frames go back to their sender.
    Each,
    /// Left to the kernel: survives a killed process, not a loss of power.
    None,
}

/// `[[port]]`.
#[derive(Debug, Clone, PartialEq)]
pub struct PortConfig {
    /// `name`: unique, 1 to 64 of `[A-Za-z0-9._-]`.
    pub name: String,
    /// `vm`: the VM behind it.
    pub vm: Option<String>,
    /// `mac`: the guest's address. Frames from elsewhere that claim it are not believed.
    pub mac: Option<MacAddr>,
    /// What it is.
    pub kind: PortKind,
}

/// `type`, with the keys that go with it.
#[derive(Debug, Clone, PartialEq)]
pub enum PortKind {
    /// `vhost-user`.
    VhostUser {
        /// `socket`.
        socket: PathBuf,
        /// `mode = "client"` (QEMU listens, the switch dials) or `"server"` (the switch listens).
        server: bool,
    },
    /// `tap`.
    Tap {
        /// `device`: at most 15 characters; created if it does not exist.
        device: String,
        /// `role = "vm"` (QEMU holds the character device) or `"endpoint"` (the switch does; the network device is the
        /// host's or a container's).
        role: TapRole,
    },
    /// `uplink`: AF_PACKET on a network device of the host.
    Uplink {
        /// `device`.
        device: String,
    },
}

/// See [`PortKind::Tap`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TapRole {
    /// A VM's.
    Vm,
    /// The host's or a container's.
    Endpoint,
}

/// `[[vm]]`.
#[derive(Debug, Clone, PartialEq)]
pub struct VmConfig {
    /// `name`: unique, 1 to 64 of `[A-Za-z0-9._-]`.
    pub name: String,
    /// `qmp`: the VM's QMP socket on this host.
    pub qmp: PathBuf,
    /// `incoming`: program and arguments that start the VM for an incoming migration (`-incoming defer -S`); absent:
    /// it cannot arrive here. No shell; it runs in the switch's own mount and network namespaces.
    pub incoming: Option<Vec<String>>,
}

/// See [`HostConfig::kept_socket`].
pub(super) fn kept_socket(keeper_dir: &std::path::Path, port: &str) -> PathBuf {
    keeper_dir.join(format!("{port}.sock"))
}
