//! The VMM channel: the coordinator's way to the QMP sockets of the VMs that the configuration names, and to the
//! commands that it gives for their arrival.
//!
//! QEMU serves one QMP client at a time and lets others wait without a word. So each VM has one permit here: a relay
//! holds it as long as it is open, a question of our own for a moment.
//!
//! Invariant: a request names a VM; sockets and programs come from the configuration only.

mod process;
pub mod qmp;
mod relay;
mod start;

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use gangway_shared::api::{Refusal, RefusalCode, VmInfo};
use gangway_shared::config::HostConfig;
use gangway_shared::config::raw::nearest;
use gangway_shared::config::valid::VmConfig;
use gangway_shared::id::HoldId;
use tokio::net::UnixStream;
use tokio::sync::{Mutex as AsyncMutex, OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout};

use super::refusal;

pub use relay::Relay;

/// How long `VmmOpen` waits for its turn: longer than a coordinator that was killed keeps the socket
/// ([`super::quic`]).
const TURN: Duration = Duration::from_secs(8);
/// How long QEMU may take to accept and to greet.
const GREETING: Duration = Duration::from_secs(2);
/// How long `VmmOpen` may take with its turn, but for who has a late one and gives QEMU [`GREETING`]: QEMU may greet as late as this leaves, since
/// on a crowded host it takes seconds.
const OPEN: Duration = Duration::from_secs(8);
/// How long one of our own questions may take in all.
const ASK: Duration = Duration::from_secs(1);

/// The VMs that the configuration names.
pub struct Vmm {
    vms: HashMap<String, Arc<Vm>>,
    order: Vec<String>,
    state_dir: PathBuf,
    /// How long a relay waits for its turn.
    turn: Duration,
}

/// One of them.
struct Vm {
    config: VmConfig,
    ports: Vec<String>,
    qmp: Arc<Semaphore>,
    seen: Mutex<Seen>,
    /// Held while it is being started or stopped; the last hold for which it was ended. An order to start it for that one
    /// which comes later was late. In memory is enough: what was on its way to this process dies with it.
    lifecycle: AsyncMutex<Option<HoldId>>,
}

/// What was last learned.
#[derive(Debug, Clone, Default)]
struct Seen {
    status: Option<String>,
    /// The process behind the QMP socket.
    pid: Option<u32>,
}

impl Vmm {
    /// For the VMs of `cfg`. Remembers under `state_dir` what it starts.
    pub fn new(cfg: &HostConfig) -> Arc<Vmm> {
        let vm = |config: &VmConfig| {
            let of_this = |p: &&gangway_shared::config::valid::PortConfig| {
                p.vm.as_ref() == Some(&config.name)
            };
            let ports = cfg.ports.iter().filter(of_this).map(|p| p.name.clone());
            Arc::new(Vm {
                config: config.clone(),
                ports: ports.collect(),
                qmp: Arc::new(Semaphore::new(1)),
                seen: Mutex::default(),
                lifecycle: AsyncMutex::default(),
            })
        };
        Arc::new(Vmm {
            vms: cfg.vms.iter().map(|c| (c.name.clone(), vm(c))).collect(),
            order: cfg.vms.iter().map(|c| c.name.clone()).collect(),
            state_dir: cfg.state_dir.clone(),
            turn: TURN,
        })
    }

    /// Connects to a VM's QMP socket for a relay.
    pub async fn open(&self, name: &str) -> Result<Relay, Refusal> {
        let vm = self.vm(name)?;
        let began = Instant::now();
        let permit = vm.turn(self.turn).await?;
        let left = OPEN.saturating_sub(began.elapsed()).max(GREETING);
        let (stream, greeting) = vm.connect(left).await.map_err(|e| match e {
            Connect::Absent(e) => refusal(
                RefusalCode::State,
                format!("VM '{name}' does not run here: its QMP socket '{}' does not answer ({e})", vm.socket().display()),
            ),
            Connect::Silent => refusal(
                RefusalCode::Busy,
                format!(
                    "QMP socket '{}' of VM '{name}' accepts but does not greet: another program is connected to it; close that one",
                    vm.socket().display()
                ),
            ),
        })?;
        Ok(Relay::new(vm, permit, stream, greeting))
    }

    /// All VMs in the configuration's order, each asked how it is.
    pub async fn list(&self) -> Vec<VmInfo> {
        let asked: Vec<_> = self
            .order
            .iter()
            .filter_map(|name| self.vms.get(name))
            .map(|vm| {
                let vm = Arc::clone(vm);
                tokio::spawn(async move { vm.info().await })
            })
            .collect();
        let mut out = Vec::with_capacity(asked.len());
        for task in asked {
            out.extend(task.await);
        }
        out
    }

    /// The process that listens on a VM's QMP socket (QEMU, or libvirtd if that made the socket). Blocks for a moment.
    pub fn qmp_peer_pid(&self, name: &str) -> Option<u32> {
        let vm = self.vms.get(name)?;
        // While somebody else is connected QEMU's backlog is short; what that connection showed still holds.
        if vm.qmp.available_permits() == 0
            && let Some(pid) = vm.seen().pid
        {
            return Some(pid);
        }
        process::listener_pid(vm.socket()).ok()
    }

    fn vm(&self, name: &str) -> Result<Arc<Vm>, Refusal> {
        self.vms.get(name).cloned().ok_or_else(|| {
            let hint = nearest(name, &self.order).map_or_else(
                || "see `gangway vm list`".to_owned(),
                |n| format!("did you mean '{n}'?"),
            );
            let short: String = name.escape_debug().take(64).collect();
            let message = format!("this host's configuration has no VM '{short}'; {hint}");
            refusal(RefusalCode::Unknown, message)
        })
    }
}

impl crate::hold::Vms for Vmm {
    fn pid(&self, vm: &str) -> Option<u32> {
        self.qmp_peer_pid(vm)
    }

    fn status(&self, vm: &str) -> Option<String> {
        self.vms.get(vm)?.seen().status
    }

    fn has_ended(&self, vm: &str, hold: HoldId) -> bool {
        self.vms.contains_key(vm) && self.ended(vm, hold)
    }

    fn is_absent(&self, vm: &str) -> bool {
        // Somebody is connected to it.
        let free = |vm: &&Arc<Vm>| vm.qmp.available_permits() > 0;
        let vm = self.vms.get(vm).filter(free);
        vm.is_some_and(|vm| process::listener_pid(vm.socket()).is_err_and(|e| is_nobody(&e)))
    }
}

/// Nobody listens there.
fn is_nobody(e: &io::Error) -> bool {
    matches!(
        e.kind(),
        io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound
    )
}

/// Why there is no QMP connection.
enum Connect {
    /// Nobody listens.
    Absent(io::Error),
    /// Somebody listens, but serves another client.
    Silent,
}

impl Vm {
    fn name(&self) -> &str {
        &self.config.name
    }

    fn socket(&self) -> &Path {
        &self.config.qmp
    }

    fn seen(&self) -> Seen {
        self.seen
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn learn(&self, change: impl FnOnce(&mut Seen)) {
        change(&mut self.seen.lock().unwrap_or_else(PoisonError::into_inner));
    }

    async fn turn(&self, limit: Duration) -> Result<OwnedSemaphorePermit, Refusal> {
        match timeout(limit, Arc::clone(&self.qmp).acquire_owned()).await {
            Ok(Ok(permit)) => Ok(permit),
            _ => Err(refusal(
                RefusalCode::Busy,
                format!(
                    "another coordinator is connected to VM '{}'; close it, or wait until it is done",
                    self.name()
                ),
            )),
        }
    }

    /// Connects, and waits for the first bytes of QMP's greeting. Needs the permit.
    async fn connect(&self, limit: Duration) -> Result<(UnixStream, Vec<u8>), Connect> {
        let connect = async {
            let stream = UnixStream::connect(self.socket())
                .await
                .map_err(|e| match e.kind() {
                    // The backlog is full: it listens, and does not accept.
                    io::ErrorKind::WouldBlock => Connect::Silent,
                    _ => Connect::Absent(e),
                })?;
            let pid = stream.peer_cred().ok().and_then(|c| c.pid());
            self.learn(|s| s.pid = pid.and_then(|p| u32::try_from(p).ok()));
            let mut greeting = vec![0; 4096];
            loop {
                stream.readable().await.map_err(Connect::Absent)?;
                match stream.try_read(&mut greeting) {
                    Ok(0) => return Err(Connect::Absent(io::ErrorKind::UnexpectedEof.into())),
                    Ok(n) => {
                        greeting.truncate(n);
                        return Ok((stream, greeting));
                    }
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                    Err(e) => return Err(Connect::Absent(e)),
                }
            }
        };
        timeout(limit, connect)
            .await
            .unwrap_or(Err(Connect::Silent))
    }

    async fn info(&self) -> VmInfo {
        let (reachable, status) = self.status().await;
        VmInfo {
            name: self.name().to_owned(),
            ports: self.ports.clone(),
            reachable,
            status,
            can_arrive: self.config.incoming.is_some(),
        }
    }

    /// Asks, unless a relay is open: then what passed through it tells.
    async fn status(&self) -> (bool, String) {
        let last = || self.seen().status.unwrap_or_else(|| "busy".to_owned());
        let Ok(_permit) = Arc::clone(&self.qmp).try_acquire_owned() else {
            return (true, last());
        };
        match timeout(ASK, self.ask()).await {
            Ok(Ok(status)) => {
                self.learn(|s| s.status = Some(status.clone()));
                (true, status)
            }
            Ok(Err(Connect::Absent(e))) => {
                self.learn(|s| *s = Seen::default());
                let word = if is_nobody(&e) {
                    "absent"
                } else {
                    "unreachable"
                };
                (false, word.to_owned())
            }
            Ok(Err(Connect::Silent)) | Err(_) => (true, last()),
        }
    }

    async fn ask(&self) -> Result<String, Connect> {
        let (mut stream, _) = self.connect(ASK / 2).await?;
        qmp::query_status(&mut stream)
            .await
            .map_err(Connect::Absent)
    }
}
