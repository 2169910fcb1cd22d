//! A QEMU that has no guest: the QMP commands of a live migration, over a unix socket, with the states and events of
//! QEMU 7.2. Memory is a number that shrinks.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::broadcast;
use tokio::task::AbortHandle;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Status {
    Running,
    Paused,
    Inmigrate,
    FinishMigrate,
    Postmigrate,
}

impl Status {
    fn name(self) -> &'static str {
        match self {
            Status::Running => "running",
            Status::Paused => "paused",
            Status::Inmigrate => "inmigrate",
            Status::FinishMigrate => "finish-migrate",
            Status::Postmigrate => "postmigrate",
        }
    }
}

/// The VMs of a host; all hosts of a test share the ports.
#[derive(Clone, Default)]
pub struct FakeHost {
    vms: Arc<Mutex<HashMap<String, Running>>>,
    ports: Arc<Mutex<HashMap<u16, Arc<Mutex<Vm>>>>>,
    /// Commands, in order.
    log: Arc<Mutex<Vec<String>>>,
}

/// A VM and the task that serves its QMP.
type Running = (Arc<Mutex<Vm>>, AbortHandle);

struct Vm {
    status: Status,
    migration: &'static str,
    transferred: u64,
    remaining: u64,
    syncs: u64,
    bandwidth: u64,
    port: Option<u16>,
    peer: Option<u16>,
    events: broadcast::Sender<String>,
}

impl Vm {
    fn event(&self, name: &str, data: Value) {
        let now = gangway::migration::journal::now_ns();
        let e = json!({"event": name, "data": data, "timestamp": {"seconds": now / 1_000_000_000, "microseconds": now / 1000 % 1_000_000}});
        let _ = self.events.send(format!("{e}\n"));
    }

    fn migration(&mut self, status: &'static str) {
        self.migration = status;
        self.event("MIGRATION", json!({"status": status}));
    }

    fn run(&mut self, runs: bool) {
        if runs != (self.status == Status::Running) {
            self.status = if runs {
                Status::Running
            } else {
                Status::Paused
            };
            self.event(if runs { "RESUME" } else { "STOP" }, json!({}));
        }
    }
}

impl FakeHost {
    /// A second host that can take VMs of this one.
    pub fn peer(&self) -> FakeHost {
        FakeHost {
            vms: Arc::default(),
            ports: self.ports.clone(),
            log: Arc::default(),
        }
    }

    pub fn start(&self, name: &str, qmp: &Path, status: Status) {
        let vm = Arc::new(Mutex::new(Vm {
            status,
            migration: "",
            transferred: 0,
            remaining: 64 << 20,
            syncs: 0,
            bandwidth: 0,
            port: None,
            peer: None,
            events: broadcast::channel(256).0,
        }));
        let _ = std::fs::remove_file(qmp);
        let listener = UnixListener::bind(qmp).expect("bind");
        let (me, served) = (self.clone(), vm.clone());
        let name_too = name.to_owned();
        // One client at a time, as QEMU.
        let task = tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.expect("accept");
                if me.serve(stream, &served).await {
                    me.vms.lock().expect("lock").remove(&name_too);
                    return;
                }
            }
        });
        self.vms
            .lock()
            .expect("lock")
            .insert(name.to_owned(), (vm, task.abort_handle()));
    }

    /// What all VMs of this host were told.
    pub fn commands(&self) -> Vec<String> {
        self.log.lock().expect("lock").clone()
    }

    pub fn kill(&self, name: &str) {
        if let Some((_, task)) = self.vms.lock().expect("lock").remove(name) {
            task.abort();
        }
    }

    pub fn status(&self, name: &str) -> Option<Status> {
        self.vms
            .lock()
            .expect("lock")
            .get(name)
            .map(|(v, _)| v.lock().expect("lock").status)
    }

    /// True if it has quit.
    async fn serve(&self, stream: UnixStream, vm: &Arc<Mutex<Vm>>) -> bool {
        let (read, mut write) = stream.into_split();
        let mut lines = BufReader::new(read).lines();
        let mut events = vm.lock().expect("lock").events.subscribe();
        if write
            .write_all(b"{\"QMP\": {\"version\": {}, \"capabilities\": []}}\n")
            .await
            .is_err()
        {
            return false;
        }
        loop {
            let out = tokio::select! {
                biased;
                Ok(e) = events.recv() => e,
                line = lines.next_line() => {
                    let Ok(Some(line)) = line else { return false };
                    let v: Value = serde_json::from_str(&line).expect("json");
                    let command = v["execute"].as_str().expect("execute").to_owned();
                    let answer = self.command(vm, &command, &v["arguments"]);
                    let mut answer = match answer {
                        Ok(v) => json!({"return": v}),
                        Err(e) => json!({"error": {"class": "GenericError", "desc": e}}),
                    };
                    answer["id"] = v["id"].clone();
                    if command == "quit" {
                        let _ = write.write_all(format!("{answer}\n").as_bytes()).await;
                        return true;
                    }
                    format!("{answer}\n")
                }
            };
            if write.write_all(out.as_bytes()).await.is_err() {
                return false;
            }
        }
    }

    fn command(&self, arc: &Arc<Mutex<Vm>>, command: &str, args: &Value) -> Result<Value, String> {
        self.log.lock().expect("lock").push(command.to_owned());
        let mut vm = arc.lock().expect("lock");
        match command {
            "qmp_capabilities" | "migrate-set-capabilities" | "quit" => {}
            "migrate-set-parameters" => {
                vm.bandwidth = args["max-bandwidth"].as_u64().unwrap_or(vm.bandwidth)
            }
            "query-status" => {
                return Ok(
                    json!({"status": vm.status.name(), "running": vm.status == Status::Running}),
                );
            }
            "query-migrate" => {
                let mut v = json!({});
                if !vm.migration.is_empty() {
                    v = json!({"status": vm.migration, "ram": {"total": 64 << 20, "remaining": vm.remaining,
                        "transferred": vm.transferred, "dirty-sync-count": vm.syncs, "dirty-pages-rate": 100}});
                }
                if let Some(p) = vm.port {
                    v["socket-address"] =
                        json!([{"type": "inet", "host": "127.0.0.1", "port": p.to_string()}]);
                }
                return Ok(v);
            }
            "migrate-incoming" => {
                let mut ports = self.ports.lock().expect("lock");
                let port = 5000 + ports.len() as u16;
                ports.insert(port, arc.clone());
                vm.port = Some(port);
                vm.migration("setup");
            }
            "migrate" => {
                let uri = args["uri"].as_str().unwrap_or_default();
                let port = uri
                    .rsplit(':')
                    .next()
                    .and_then(|p| p.parse().ok())
                    .ok_or("bad uri")?;
                vm.peer = Some(port);
                vm.remaining = 64 << 20;
                vm.syncs = 1;
                vm.migration("active");
                tokio::spawn(copy(arc.clone()));
            }
            "stop" => vm.run(false),
            "cont" => match vm.status {
                Status::Inmigrate => return Err("incoming".into()),
                Status::FinishMigrate => return Err("migrating".into()),
                _ => vm.run(true),
            },
            "migrate_cancel" => {
                if matches!(vm.migration, "active" | "pre-switchover") {
                    vm.migration("cancelled");
                    if vm.status == Status::FinishMigrate {
                        vm.status = Status::Paused;
                    }
                }
            }
            "migrate-continue" => {
                if vm.migration != "pre-switchover" {
                    return Err(format!("not in pre-switchover but {}", vm.migration));
                }
                let peer = vm
                    .peer
                    .and_then(|p| self.ports.lock().expect("lock").get(&p).cloned())
                    .ok_or("no peer")?;
                vm.status = Status::Postmigrate;
                vm.migration("completed");
                let mut peer = peer.lock().expect("lock");
                peer.status = Status::Paused;
                peer.migration("completed");
            }
            other => return Err(format!("The command {other} has not been found")),
        }
        Ok(json!({}))
    }
}

/// Windows of 20 ms instead of 100.
async fn copy(arc: Arc<Mutex<Vm>>) {
    loop {
        tokio::time::sleep(Duration::from_millis(20)).await;
        let mut vm = arc.lock().expect("lock");
        if vm.migration != "active" {
            return;
        }
        let sent = (vm.bandwidth / 50).min(vm.remaining).min(16 << 20);
        vm.transferred += sent;
        vm.remaining -= sent;
        if vm.remaining == 0 {
            if vm.status == Status::Running {
                vm.syncs += 1;
                vm.remaining = 200 << 10;
            } else {
                vm.status = Status::FinishMigrate;
                vm.migration("pre-switchover");
            }
        }
    }
}
