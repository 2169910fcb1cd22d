//! A switch that keeps no frame, for tests of the coordinator alone: it answers the control API over a unix socket,
//! relays QMP, starts processes or fake VMs, and writes down what it was asked.

#![allow(
    dead_code,
    missing_docs,
    reason = "shared by several tests, each of which uses a part"
)]

pub mod qemu;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use gangway_shared::api::*;
use gangway_shared::codec;
use gangway_shared::id::{HoldId, LaneKey};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};

/// How a VM arrives.
#[derive(Clone)]
pub enum Incoming {
    Never,
    /// `sh -c`.
    Command(String),
    Fake(qemu::FakeHost),
}

#[derive(Clone)]
pub struct FakeVm {
    pub name: String,
    pub qmp: PathBuf,
    pub incoming: Incoming,
}

#[derive(Clone)]
pub struct FakeSwitch(Arc<Inner>);

pub struct Inner {
    pub host: String,
    pub vms: Vec<FakeVm>,
    pub links: Vec<(String, String, u64)>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    holds: HashMap<HoldId, HoldInfo>,
    children: HashMap<String, Child>,
    calls: Vec<String>,
    /// How often a hold was asked for.
    asked: u32,
    /// Requests (by the word they begin with) that are refused so many times.
    refuse: HashMap<String, u32>,
}

impl FakeSwitch {
    pub fn start(
        host: &str,
        socket: &Path,
        vms: Vec<FakeVm>,
        links: Vec<(String, String, u64)>,
    ) -> FakeSwitch {
        let s = FakeSwitch(Arc::new(Inner {
            host: host.to_owned(),
            vms,
            links,
            state: Mutex::default(),
        }));
        let listener = UnixListener::bind(socket).expect("bind");
        let me = s.clone();
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.expect("accept");
                tokio::spawn(me.clone().connection(stream));
            }
        });
        s
    }

    pub fn calls(&self) -> Vec<String> {
        self.0.state.lock().expect("lock").calls.clone()
    }

    pub fn refuse(&self, request: &str, times: u32) {
        self.0
            .state
            .lock()
            .expect("lock")
            .refuse
            .insert(request.to_owned(), times);
    }

    pub fn asked(&self) -> u32 {
        self.0.state.lock().expect("lock").asked
    }

    /// What a switch with `[hold] then = "put-back"` does with a hold that nobody asks for.
    pub fn put_back(&self, why: &str) {
        for h in self.0.state.lock().expect("lock").holds.values_mut() {
            (h.state, h.error) = (HoldState::Aborted, Some(why.to_owned()));
        }
    }

    pub fn stop_child(&self, vm: &str) {
        if let Some(mut c) = self.0.state.lock().expect("lock").children.remove(vm) {
            let _ = c.kill();
            let _ = c.wait();
        }
    }

    pub fn hold_states(&self) -> Vec<HoldState> {
        self.0
            .state
            .lock()
            .expect("lock")
            .holds
            .values()
            .map(|h| h.state)
            .collect()
    }

    async fn connection(self, mut stream: UnixStream) {
        loop {
            let mut length = [0; 4];
            if stream.read_exact(&mut length).await.is_err() {
                return;
            }
            let mut body = vec![0; u32::from_le_bytes(length) as usize];
            if stream.read_exact(&mut body).await.is_err() {
                return;
            }
            let request: Request = codec::decode(&body).expect("a request");
            let mut relay = None;
            let reply = match &request {
                Request::VmmOpen { vm } => match self.vm(vm) {
                    Some(v) => match UnixStream::connect(&v.qmp).await {
                        Ok(s) => {
                            relay = Some(s);
                            Reply::Ok
                        }
                        Err(e) => refused(RefusalCode::State, &e.to_string()),
                    },
                    None => refused(RefusalCode::Unknown, "no such VM"),
                },
                Request::VmList => Reply::Vms(self.list().await),
                Request::VmmStart { vm, .. } => self.vmm_start(vm).await,
                other => self.answer(other),
            };
            let body = codec::encode(&reply).expect("encode");
            let mut message = (body.len() as u32).to_le_bytes().to_vec();
            message.extend(body);
            if stream.write_all(&message).await.is_err() {
                return;
            }
            if let Some(mut qmp) = relay {
                let _ = tokio::io::copy_bidirectional(&mut stream, &mut qmp).await;
                return;
            }
        }
    }

    fn vm(&self, name: &str) -> Option<&FakeVm> {
        self.0.vms.iter().find(|v| v.name == name)
    }

    async fn list(&self) -> Vec<VmInfo> {
        let mut out = Vec::new();
        for v in &self.0.vms {
            let status = match UnixStream::connect(&v.qmp).await {
                Err(_) => None,
                Ok(s) => {
                    let ask = async {
                        let q = gangway::vmm::qmp::Qmp::connect(s, Duration::from_millis(300))
                            .await
                            .ok()?;
                        let v = q
                            .execute("query-status", serde_json::Value::Null)
                            .await
                            .ok()?;
                        v["status"].as_str().map(str::to_owned)
                    };
                    Some(ask.await.unwrap_or("busy".to_owned()))
                }
            };
            out.push(VmInfo {
                name: v.name.clone(),
                ports: vec![v.name.clone()],
                reachable: status.is_some(),
                status: status.unwrap_or("absent".to_owned()),
                can_arrive: !matches!(v.incoming, Incoming::Never),
            });
        }
        out
    }

    async fn vmm_start(&self, vm: &str) -> Reply {
        if let Some(refusal) = self.note("VmmStart", &format!("VmmStart {vm}")) {
            return refusal;
        }
        let Some(v) = self.vm(vm) else {
            return refused(RefusalCode::Unknown, "no such VM");
        };
        if UnixStream::connect(&v.qmp).await.is_ok() {
            return Reply::Started { pid: 1 };
        }
        match &v.incoming {
            Incoming::Never => return refused(RefusalCode::State, "it cannot arrive"),
            Incoming::Fake(host) => {
                host.start(&v.name, &v.qmp, qemu::Status::Inmigrate);
                return Reply::Started { pid: 1 };
            }
            Incoming::Command(line) => {
                let _ = std::fs::remove_file(&v.qmp);
                let child = Command::new("sh")
                    .arg("-c")
                    .arg(format!("exec {line}"))
                    .spawn()
                    .expect("spawn");
                self.0
                    .state
                    .lock()
                    .expect("lock")
                    .children
                    .insert(vm.to_owned(), child);
            }
        }
        for _ in 0..500 {
            if UnixStream::connect(&v.qmp).await.is_ok() {
                return Reply::Started { pid: 1 };
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        refused(RefusalCode::Timeout, "it does not start")
    }

    /// Writes a request down; answers with a refusal if one was ordered.
    fn note(&self, name: &str, text: &str) -> Option<Reply> {
        let mut s = self.0.state.lock().expect("lock");
        s.calls.push(text.to_owned());
        let left = s.refuse.get_mut(name)?;
        *left = left.checked_sub(1)?;
        Some(refused(RefusalCode::Internal, "refused on purpose"))
    }

    fn answer(&self, request: &Request) -> Reply {
        let name = gangway::client::verb(request);
        if let Request::HoldStatus { .. } = request {
            self.0.state.lock().expect("lock").asked += 1;
        }
        let quiet = matches!(name, "Hello" | "HoldStatus");
        if !quiet && let Some(refusal) = self.note(name, name) {
            return refusal;
        }
        let port = |v: &FakeVm| PortInfo {
            name: v.name.clone(),
            kind: "vhost-user".into(),
            vm: Some(v.name.clone()),
            state: "up".into(),
            ..PortInfo::default()
        };
        match request {
            Request::Hello { .. } => Reply::Hello {
                version: VERSION,
                host: self.0.host.clone(),
            },
            Request::HostShow => Reply::Host(HostInfo {
                name: self.0.host.clone(),
                version: "0".into(),
                uptime_s: 1,
                workers: 1,
                migration_address: "127.0.0.1".into(),
                ports: 1,
                vms: 1,
                fdb_entries: 0,
                spool_used_bytes: 0,
                spool_quota_bytes: 1,
                spool_error: None,
                holds_overdue: None,
            }),
            Request::PortList => Reply::Ports(self.0.vms.iter().map(port).collect()),
            Request::LinkList => Reply::Links(
                self.0
                    .links
                    .iter()
                    .map(|(from, to, n)| LinkInfo {
                        from: from.clone(),
                        from_vm: Some(from.clone()),
                        to: to.clone(),
                        to_vm: Some(to.clone()),
                        frames: 1,
                        bytes: *n,
                        payload_bytes: *n,
                        idle_ms: 0,
                    })
                    .collect(),
            ),
            Request::VmmStop { vm, .. } => {
                if let Some(v) = self.vm(vm)
                    && let Incoming::Fake(host) = &v.incoming
                {
                    host.kill(vm);
                }
                self.stop_child(vm);
                Reply::Ok
            }
            Request::HoldOpen(o) => {
                self.hold(o.hold, Some((Role::Source, &o.vms)), HoldState::Open)
            }
            Request::IncomingPrepare(p) => {
                self.hold(p.hold, Some((Role::Target, &p.vms)), HoldState::Prepared)
            }
            Request::Freeze { hold, scope } => {
                let state = if *scope == Scope::All {
                    HoldState::Frozen
                } else {
                    HoldState::FrozenInside
                };
                self.hold(*hold, None, state);
                Reply::Frozen {
                    at_ns: gangway::migration::journal::now_ns(),
                    drained: true,
                }
            }
            Request::Seal { hold, .. } => self.hold(*hold, None, HoldState::Sealed),
            Request::IncomingRestore { hold } => self.hold(*hold, None, HoldState::Restored),
            Request::Commit { hold } => self.hold(*hold, None, HoldState::Live),
            Request::Announce { .. } => Reply::Ok,
            Request::Depart { hold, .. } => self.hold(*hold, None, HoldState::Departed),
            Request::HoldAbort { hold } => self.hold(*hold, None, HoldState::Aborted),
            Request::HoldRelease { hold } => self.hold(*hold, None, HoldState::Released),
            Request::HoldStatus { hold } => {
                match self.0.state.lock().expect("lock").holds.get(hold) {
                    Some(h) => Reply::Hold(h.clone()),
                    None => refused(RefusalCode::Unknown, "no such hold"),
                }
            }
            Request::HoldList => Reply::Holds(
                self.0
                    .state
                    .lock()
                    .expect("lock")
                    .holds
                    .values()
                    .cloned()
                    .collect(),
            ),
            Request::FdbList => Reply::Fdb(Vec::new()),
            Request::WorkerList | Request::WorkersSet(_) => Reply::Workers(Vec::new()),
            Request::LedgerShow { .. } | Request::LedgerIndex(_) | Request::LedgerFrames(_) => {
                refused(RefusalCode::Unknown, "no ledger is kept here")
            }
            Request::VmList | Request::VmmOpen { .. } | Request::VmmStart { .. } => {
                unreachable!("answered above")
            }
        }
    }

    fn hold(&self, id: HoldId, new: Option<(Role, &Vec<String>)>, state: HoldState) -> Reply {
        let mut s = self.0.state.lock().expect("lock");
        if let Some((role, vms)) = new {
            let tally = Tally {
                frames: 3,
                bytes: 300,
                digest: 7,
            };
            let lane = |a: &String, b: &String| LaneInfo {
                lane: LaneKey {
                    from: a.clone(),
                    queue: 0,
                    to: b.clone(),
                },
                sealed: true,
                held: tally,
                shipped: if role == Role::Source {
                    tally
                } else {
                    Tally::default()
                },
                flushed: tally,
                queued_behind: 0,
                dropped: 0,
            };
            let info = HoldInfo {
                hold: id,
                role,
                state,
                vms: vms.clone(),
                peer: "peer".into(),
                error: None,
                frozen_ns: 0,
                thawed_ns: 0,
                drained_ns: 0,
                lanes: vms.windows(2).map(|w| lane(&w[0], &w[1])).collect(),
            };
            s.holds.entry(id).or_insert(info);
        }
        match s.holds.get_mut(&id) {
            Some(h) => {
                h.state = state;
                if matches!(state, HoldState::Live | HoldState::Aborted) {
                    h.thawed_ns = gangway::migration::journal::now_ns();
                }
                Reply::Hold(h.clone())
            }
            None => refused(RefusalCode::Unknown, "no such hold"),
        }
    }
}

fn refused(code: RefusalCode, message: &str) -> Reply {
    Reply::Refused(Refusal {
        code,
        message: message.to_owned(),
    })
}
