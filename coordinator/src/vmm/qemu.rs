//! QEMU as a migration needs it: typed commands over [`Qmp`].

use std::time::Duration;

use serde_json::{Value, json};

use super::qmp::{Qmp, QmpError};
use crate::client::{ClientError, Switch};
use crate::migration::brink::Sample;

/// A migration thread that was about to say where it is has said it.
const SETTLES: Duration = Duration::from_millis(50);

/// As good as no limit, in bytes per second.
pub const UNLIMITED: u64 = 1 << 40;

/// A VMM did not do it.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// The way to it is broken.
    #[error("VM '{vm}': {error}")]
    Way {
        /// The VM.
        vm: String,
        /// What the switch says.
        error: ClientError,
    },
    /// QEMU.
    #[error("VM '{vm}' on host '{host}': {error}")]
    Qmp {
        /// The VM.
        vm: String,
        /// Where.
        host: String,
        /// What QEMU says.
        error: QmpError,
    },
    /// QEMU's migration went wrong.
    #[error("VM '{vm}' on host '{host}': {what}")]
    Migration {
        /// The VM.
        vm: String,
        /// Where.
        host: String,
        /// QEMU's words.
        what: String,
    },
}

/// One look at `query-migrate`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Progress {
    /// QEMU's word; empty if there was no migration.
    pub status: String,
    /// For [`crate::migration::brink`].
    pub sample: Sample,
    /// All of the guest's memory, bytes.
    pub total: u64,
    /// Pages per second.
    pub dirty_pages_rate: u64,
    /// QEMU's own downtime, after completion.
    pub downtime_ms: Option<u64>,
    /// Why it failed.
    pub error: Option<String>,
    /// The port at which an incoming migration listens.
    pub listens: Option<u16>,
}

impl Progress {
    fn read(v: &Value) -> Progress {
        let status = v["status"].as_str().unwrap_or_default().to_owned();
        let ram = |k: &str| v["ram"][k].as_u64().unwrap_or(0);
        let listens = v["socket-address"]
            .as_array()
            .and_then(|a| a.first())
            .and_then(|a| a["port"].as_str()?.parse().ok());
        Progress {
            sample: Sample {
                stopped: matches!(status.as_str(), "pre-switchover" | "device" | "completed"),
                remaining: ram("remaining"),
                transferred: ram("transferred"),
                sync_count: ram("dirty-sync-count"),
            },
            total: ram("total"),
            dirty_pages_rate: ram("dirty-pages-rate"),
            downtime_ms: v["downtime"].as_u64(),
            error: v["error-desc"].as_str().map(str::to_owned),
            listens,
            status,
        }
    }

    /// True if a migration is under way.
    pub fn under_way(&self) -> bool {
        matches!(
            self.status.as_str(),
            "setup"
                | "active"
                | "pre-switchover"
                | "device"
                | "cancelling"
                | "wait-unplug"
                | "postcopy-active"
                | "colo"
        )
    }
}

/// A connected QEMU.
#[derive(Clone)]
pub struct Qemu {
    /// The VM's name.
    pub vm: String,
    /// The host's name.
    pub host: String,
    qmp: Qmp,
}

impl Qemu {
    /// Connects through the host's switch.
    pub async fn connect(switch: &Switch, vm: &str) -> Result<Qemu, VmmError> {
        let stream = switch.open_qmp(vm).await.map_err(|error| VmmError::Way {
            vm: vm.to_owned(),
            error,
        })?;
        let host = switch.host().to_owned();
        match Qmp::connect(stream, Duration::from_secs(5)).await {
            Ok(qmp) => Ok(Qemu {
                vm: vm.to_owned(),
                host,
                qmp,
            }),
            Err(error) => Err(VmmError::Qmp {
                vm: vm.to_owned(),
                host,
                error,
            }),
        }
    }

    /// Over a stream of the caller's, for tests.
    pub fn over(vm: &str, host: &str, qmp: Qmp) -> Qemu {
        Qemu {
            vm: vm.to_owned(),
            host: host.to_owned(),
            qmp,
        }
    }

    /// Its events.
    pub fn events(&self) -> &Qmp {
        &self.qmp
    }

    async fn run(&self, command: &str, arguments: Value) -> Result<Value, VmmError> {
        self.qmp
            .execute(command, arguments)
            .await
            .map_err(|error| self.qmp_error(error))
    }

    fn qmp_error(&self, error: QmpError) -> VmmError {
        VmmError::Qmp {
            vm: self.vm.clone(),
            host: self.host.clone(),
            error,
        }
    }

    /// An error about its migration.
    pub fn trouble(&self, what: impl Into<String>) -> VmmError {
        VmmError::Migration {
            vm: self.vm.clone(),
            host: self.host.clone(),
            what: what.into(),
        }
    }

    /// `query-status`.
    pub async fn status(&self) -> Result<String, VmmError> {
        let v = self.run("query-status", Value::Null).await?;
        Ok(v["status"].as_str().unwrap_or("unknown").to_owned())
    }

    /// Both ends need the same capabilities; `pause-before-switchover` only matters at the source.
    pub async fn set_capabilities(&self, pause: bool) -> Result<(), VmmError> {
        let caps = json!({"capabilities": [
            {"capability": "events", "state": true},
            {"capability": "pause-before-switchover", "state": pause},
        ]});
        self.run("migrate-set-capabilities", caps).await.map(drop)
    }

    /// `max-bandwidth`, in bytes per second.
    pub async fn set_bandwidth(&self, bytes_per_s: u64) -> Result<(), VmmError> {
        self.run(
            "migrate-set-parameters",
            json!({"max-bandwidth": bytes_per_s}),
        )
        .await
        .map(drop)
    }

    /// `max-bandwidth` and `downtime-limit`.
    pub async fn set_limits(&self, bytes_per_s: u64, downtime_ms: u64) -> Result<(), VmmError> {
        self.run(
            "migrate-set-parameters",
            json!({"max-bandwidth": bytes_per_s, "downtime-limit": downtime_ms}),
        )
        .await
        .map(drop)
    }

    /// QEMU's limits as they are: (`max-bandwidth`, `downtime-limit`).
    pub async fn limits(&self) -> Result<(u64, u64), VmmError> {
        let v = self.run("query-migrate-parameters", Value::Null).await?;
        Ok((
            v["max-bandwidth"].as_u64().unwrap_or(UNLIMITED),
            v["downtime-limit"].as_u64().unwrap_or(300),
        ))
    }

    /// Target: listens on a free port of `address`; answers the URI for the source.
    pub async fn listen(&self, address: &str) -> Result<String, VmmError> {
        let host = match address.parse::<std::net::IpAddr>() {
            Ok(std::net::IpAddr::V6(a)) => format!("[{a}]"),
            _ => address.to_owned(),
        };
        if self.progress().await?.listens.is_none() {
            self.run("migrate-incoming", json!({"uri": format!("tcp:{host}:0")}))
                .await?;
        }
        for _ in 0..100 {
            if let Some(port) = self.progress().await?.listens {
                return Ok(format!("tcp:{host}:{port}"));
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Err(self.trouble("does not say at which port it listens for its memory"))
    }

    /// Source: begins to copy.
    pub async fn migrate(&self, uri: &str) -> Result<(), VmmError> {
        self.run("migrate", json!({"uri": uri})).await.map(drop)
    }

    /// `query-migrate`.
    pub async fn progress(&self) -> Result<Progress, VmmError> {
        Ok(Progress::read(
            &self.run("query-migrate", Value::Null).await?,
        ))
    }

    /// `query-migrate`; a failed or cancelled one is an error.
    pub async fn healthy(&self) -> Result<Progress, VmmError> {
        let p = self.progress().await?;
        match p.status.as_str() {
            "failed" => Err(self.trouble(format!(
                "its migration failed: {}",
                p.error.as_deref().unwrap_or("QEMU does not say why")
            ))),
            "cancelled" | "cancelling" => {
                Err(self.trouble("somebody else cancelled its migration"))
            }
            "" | "none" => Err(self.trouble("it has no migration; was it restarted?")),
            _ => Ok(p),
        }
    }

    /// Waits until the migration's status is one of `wanted`. QEMU's events say so at once; the query at both ends of
    /// the wait is for a connection that was made after the event.
    pub async fn reach(&self, wanted: &[&str], within: Duration) -> Result<Progress, VmmError> {
        let there = |status: &str| wanted.contains(&status);
        let p = self.healthy().await?;
        if there(&p.status) {
            return Ok(p);
        }
        let what = format!("status {}", wanted.join(" or "));
        let event = self.qmp.event(0, within, &what, |e| {
            let status = e.data["status"].as_str().unwrap_or_default();
            e.name == "MIGRATION" && (there(status) || matches!(status, "failed" | "cancelled"))
        });
        let waited = event.await;
        let p = self.healthy().await?;
        if there(&p.status) {
            return Ok(p);
        }
        match waited {
            // It was there and has gone on.
            Ok(_) => Ok(p),
            Err(e) => Err(self.qmp_error(e)),
        }
    }

    /// `stop`.
    pub async fn stop(&self) -> Result<(), VmmError> {
        self.run("stop", Value::Null).await.map(drop)
    }

    /// `cont`.
    pub async fn cont(&self) -> Result<(), VmmError> {
        self.run("cont", Value::Null).await.map(drop)
    }

    /// `migrate-continue` from `pre-switchover`.
    pub async fn pass_brink(&self) -> Result<(), VmmError> {
        self.run("migrate-continue", json!({"state": "pre-switchover"}))
            .await
            .map(drop)
    }

    /// `migrate_cancel`, until it is over. Without a migration it does nothing.
    pub async fn cancel(&self) -> Result<(), VmmError> {
        let now = self.progress().await?;
        if !now.under_way() {
            return Ok(());
        }
        if now.status == "active" {
            // QEMU 7.2 loses a cancel that comes while it goes to `pre-switchover`: its migration thread waits there for ever, and the VM
            // with it (migration_maybe_pause: the state is set behind the lock, and the cancel that came between posts nothing). So it
            // shall not get there, and where it was on its way it is there a moment later.
            let never = json!({"downtime-limit": 0});
            self.run("migrate-set-parameters", never).await?;
            tokio::time::sleep(SETTLES).await;
        }
        self.run("migrate_cancel", Value::Null).await?;
        for _ in 0..500 {
            if !self.progress().await?.under_way() {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Err(self.trouble("its migration does not end after migrate_cancel"))
    }

    /// `quit`; the connection may break before the answer.
    pub async fn quit(&self) -> Result<(), VmmError> {
        match self.run("quit", Value::Null).await {
            Err(VmmError::Qmp {
                error: QmpError::Gone(_),
                ..
            })
            | Ok(_) => Ok(()),
            Err(e) => Err(e),
        }
    }
}
