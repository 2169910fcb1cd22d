//! What holds are carried out on: engine, spool, shipments, TAPs.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use gangway_shared::api::{HoldOpen, HoldState, Refusal, RefusalCode};
use gangway_shared::config::HostConfig;
use gangway_shared::id::{HoldId, MacAddr};
use gangway_shared::record::{HeldPort, HeldQueue, HeldSeats, HoldRecord};

use super::record::{RecordFile, Stand};
use super::refuse;
use crate::addresses::Addresses;
use crate::datapath::Engine;
use crate::datapath::engine::Pin;
use crate::datapath::worker::{Command, Outcome};
use crate::port::tap::{Back, VmTap};
use crate::port::{Attach, Burst};
use crate::ship::{Acceptor, Incoming, Outgoing, OutgoingArgs};
use crate::spool::Spool;

/// How long the target's switch may take to accept a shipment.
const CONNECT: Duration = Duration::from_secs(5);

/// What the VMM channel knows of a VM.
pub trait Vms: Send + Sync {
    /// The process behind its QMP socket.
    fn pid(&self, vm: &str) -> Option<u32>;
    /// As QEMU has said last: `running`, `paused`, ... (qapi/run-state.json, RunState).
    fn status(&self, vm: &str) -> Option<String>;
    /// It was started here for its arrival in this hold, and its process has ended.
    fn has_ended(&self, vm: &str, hold: HoldId) -> bool;
    /// Nobody serves its QMP socket.
    fn is_absent(&self, vm: &str) -> bool;
}

/// What holds are carried out on.
pub struct Host {
    /// Workers, ports, FDB.
    pub engine: Arc<Engine>,
    /// What the next run of the switch will know of the FDB.
    pub addresses: Arc<Addresses>,
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

    fn dialer(&self) -> Result<(quinn::Endpoint, quinn::ClientConfig), Refusal> {
        let none = "this switch has no control.listen and [tls]; it cannot ship";
        let dialer = self.dialer.clone();
        dialer.ok_or_else(|| refuse(RefusalCode::State, none))
    }

    pub(super) fn dial(&self, args: &HoldOpen) -> Result<Arc<Outgoing>, Refusal> {
        let (endpoint, client) = self.dialer()?;
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

    /// Goes on with the shipment of a hold that was taken up.
    pub(super) fn dial_again(&self, record: &HoldRecord) -> Result<Arc<Outgoing>, Refusal> {
        let (endpoint, client) = self.dialer()?;
        let args = OutgoingArgs {
            hold: record.hold,
            ticket: record.ticket,
            target_address: record.address.clone(),
            target_host: record.peer.clone(),
        };
        Ok(Outgoing::go_on(
            self.runtime.clone(),
            endpoint,
            client,
            args,
        ))
    }

    /// Expects a shipment for these ports once it is registered.
    pub(super) fn incoming(
        &self,
        hold: HoldId,
        ticket: [u8; 32],
        source: &str,
        group: &[usize],
    ) -> Arc<Incoming> {
        let all = &self.engine.shared().ports;
        let ports = group.iter().map(|&g| all[g].name.clone()).collect();
        Incoming::new(self.spool.clone(), hold, ticket, source.to_owned(), ports)
    }

    /// Writes a hold's record; on the disk, if that is what `spool.sync` wants.
    pub(super) fn write_down(
        &self,
        record: &HoldRecord,
        state: HoldState,
    ) -> Result<RecordFile, Refusal> {
        let dir = self.spool.dir_of(record.hold);
        let made = RecordFile::create(&dir, record, &Stand::new(state), self.spool.is_durable());
        made.map_err(|e| {
            let what = format!("hold {} can't be written down: {e}", record.hold);
            refuse(RefusalCode::Resources, what)
        })
    }

    /// The group's ports and everybody's seats, for a record.
    pub(super) fn places(
        &self,
        group: &[usize],
        macs: &[Option<MacAddr>],
        pin: &Pin,
    ) -> (Vec<HeldPort>, Vec<HeldSeats>) {
        let ports = &self.engine.shared().ports;
        let held = group.iter().zip(macs).map(|(&g, mac)| HeldPort {
            name: ports[g].name.clone(),
            mac: *mac,
        });
        let seats = ports.iter().enumerate().map(|(n, p)| HeldSeats {
            port: p.name.clone(),
            workers: pin.seats(n).iter().map(|s| s.worker as u32).collect(),
            queues: pin
                .served(n)
                .into_iter()
                .map(|(queue, worker)| HeldQueue {
                    queue,
                    worker: worker as u32,
                })
                .collect(),
        });
        (held.collect(), seats.collect())
    }

    /// The seats of a record, once more.
    pub(super) fn pin_again(&self, record: &HoldRecord) -> Pin {
        let pin = self.engine.pin();
        for s in &record.seats {
            if let Some((port, _)) = self.engine.port(&s.port) {
                let workers: Vec<usize> = s.workers.iter().map(|w| *w as usize).collect();
                let queues: Vec<(u16, usize)> = s
                    .queues
                    .iter()
                    .map(|q| (q.queue, q.worker as usize))
                    .collect();
                pin.seat_again(port, &workers, &queues);
            }
        }
        pin
    }

    pub(super) fn expect(&self, incoming: &Arc<Incoming>) {
        self.acceptor.register(incoming.clone());
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
    pub(super) fn adopt_tap(&self, port: usize, hold: HoldId) -> Result<(), Refusal> {
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
        let adopted = tap.adopt(pid, hold.0);
        adopted.map_err(|e| refuse(RefusalCode::State, format!("port {name}: {e}")))
    }

    /// What is sent to a VM's TAP is remembered from now on.
    pub(super) fn tap_remembers(&self, port: usize) {
        if let Some(tap) = self.taps.get(&port) {
            tap.remember();
        }
    }

    /// The hold is over: a VM that ends now, or has ended, gives its TAP to the next one. Unless another hold has it.
    pub(super) fn tap_let_go(&self, port: usize, hold: HoldId) {
        if let Some(tap) = self.taps.get(&port) {
            tap.let_go(hold.0);
        }
    }

    /// Nothing is sent to these ports any more: whether all of it is with the guests by then. Who has stopped is not waited for.
    pub(super) fn taps_drain(&self, ports: &[usize], until: Instant) -> bool {
        let taps = ports.iter().filter_map(|p| Some((*p, self.taps.get(p)?)));
        let marked: Vec<_> = taps.map(|(p, tap)| (p, tap, tap.mark())).collect();
        let mut all = true;
        for (port, tap, marked) in marked {
            if let Err(e) = &marked {
                let name = &self.engine.shared().ports[port].name;
                tracing::warn!("port {name}: the TAP's end is not marked: {e}");
            }
            let left = until.saturating_duration_since(Instant::now());
            if marked.is_ok() && !self.has_stopped(port) && tap.wait_empty(left) {
                tap.forget();
            } else {
                all = false;
            }
        }
        all
    }

    /// The port's VM does not run, as QEMU has said.
    pub(super) fn has_stopped(&self, port: usize) -> bool {
        let vm = self.engine.shared().ports[port].vm.as_deref();
        let status = vm.and_then(|vm| self.vms.status(vm));
        status.is_some_and(|s| s != "running")
    }

    /// See [`VmTap::take_back`].
    pub(super) fn tap_take_back(&self, port: usize) -> Result<Option<Back>, Refusal> {
        let Some(tap) = self.taps.get(&port) else {
            return Ok(None);
        };
        let name = &self.engine.shared().ports[port].name;
        let back = tap.take_back();
        back.map_err(|e| refuse(RefusalCode::State, format!("port {name}: {e}")))
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
