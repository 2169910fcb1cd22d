//! What each step does, forward. Every one may be done again after it was cut off half-way.

use std::collections::HashMap;
use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use gangway_shared::api::{HoldInfo, HoldState, RefusalCode, Reply, Request, Scope};
use gangway_shared::id::HoldId;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use super::brink::{Brink, Order};
use super::plan::Mission;
use super::report::{Facts, difference};
use super::steps::Step;
use crate::client::{ClientError, Switch};
use crate::exit::Failure;
use crate::vmm::qemu::{Progress, Qemu, UNLIMITED, VmmError};

/// A step failed.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    /// A switch, or the way to it.
    #[error(transparent)]
    Switch(#[from] ClientError),
    /// A VMM.
    #[error(transparent)]
    Vmm(#[from] VmmError),
    /// What must hold for a migration does not.
    #[error("{0}")]
    Check(Failure),
    /// Both ends do not agree.
    #[error("the target's account differs from the source's: {0}")]
    Disagree(String),
    /// A VM is not at the target any more, in time.
    #[error("a VM has died on the target, before the commit: {0}")]
    Died(VmmError),
    /// It does not get there.
    #[error("{0}")]
    Late(String),
    /// A bug of ours.
    #[error("internal: {0}")]
    Internal(String),
}

impl StepError {
    /// True if the step certainly had no effect.
    pub fn unchanged(&self) -> bool {
        match self {
            StepError::Switch(e) => e.nothing_changed(),
            StepError::Check(_) | StepError::Died(_) => true,
            _ => false,
        }
    }
}

/// What one sees of a VM while it moves.
#[derive(Debug, Clone, Default)]
pub struct Live {
    /// A word.
    pub state: &'static str,
    /// As QEMU says.
    pub progress: Progress,
}

/// Everything a step can reach.
pub struct World {
    /// What is to be done.
    pub mission: Mission,
    /// The source's switch.
    pub source: Switch,
    /// The target's switch.
    pub target: Switch,
    facts: Mutex<Facts>,
    live: Mutex<HashMap<String, Live>>,
    qemus: tokio::sync::Mutex<HashMap<(End, String), Qemu>>,
    /// The commit was tried, or may have been, in an earlier life.
    committing: AtomicBool,
}

/// Which end of the move.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum End {
    /// Where the VMs leave.
    Source,
    /// Where they arrive.
    Target,
}

impl World {
    /// Nothing is connected yet. `resumed`: another coordinator has begun.
    pub fn new(
        mission: Mission,
        source: Switch,
        target: Switch,
        facts: Facts,
        resumed: bool,
    ) -> World {
        World {
            committing: AtomicBool::new(resumed),
            mission,
            source,
            target,
            facts: Mutex::new(facts),
            live: Mutex::default(),
            qemus: tokio::sync::Mutex::default(),
        }
    }

    /// What was measured.
    pub fn facts(&self) -> MutexGuard<'_, Facts> {
        self.facts
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// What can be seen now.
    pub fn live(&self) -> MutexGuard<'_, HashMap<String, Live>> {
        self.live
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// The VMM of a VM; connects if there is no living connection.
    pub async fn qemu(&self, end: End, vm: &str) -> Result<Qemu, VmmError> {
        let key = (end, vm.to_owned());
        if let Some(q) = self
            .qemus
            .lock()
            .await
            .get(&key)
            .filter(|q| !q.events().is_gone())
        {
            return Ok(q.clone());
        }
        let switch = match end {
            End::Source => &self.source,
            End::Target => &self.target,
        };
        let q = Qemu::connect(switch, vm).await?;
        self.qemus.lock().await.insert(key, q.clone());
        Ok(q)
    }

    /// Lets go of all VMMs: QEMU serves one client at a time.
    pub async fn disconnect(&self) {
        self.qemus.lock().await.clear();
    }

    /// Does something with every VM at once; the first error ends it.
    pub async fn each<T, F, Fut>(self: &Arc<Self>, f: F) -> Result<Vec<T>, StepError>
    where
        T: Send + 'static,
        F: Fn(Arc<World>, String) -> Fut,
        Fut: Future<Output = Result<T, StepError>> + Send + 'static,
    {
        let mut set = JoinSet::new();
        for (i, vm) in self.mission.vms().iter().enumerate() {
            let work = f(self.clone(), vm.clone());
            set.spawn(async move { (i, work.await) });
        }
        let mut out = Vec::new();
        while let Some(joined) = set.join_next().await {
            let (i, result) = joined.map_err(|e| StepError::Internal(e.to_string()))?;
            out.push((i, result?));
        }
        out.sort_by_key(|(i, _)| *i);
        Ok(out.into_iter().map(|(_, t)| t).collect())
    }
}

/// Does a step.
pub async fn forward(w: &Arc<World>, step: Step) -> Result<(), StepError> {
    let hold = w.mission.id;
    match step {
        Step::Check => crate::migration::run::check(&w.mission, &w.source, &w.target)
            .await
            .map_err(StepError::Check),
        Step::Prepare => {
            w.target
                .call(&Request::IncomingPrepare(w.mission.prepare()))
                .await?;
            w.source.call(&Request::HoldOpen(w.mission.open())).await?;
            Ok(())
        }
        Step::Start => start(w).await,
        Step::FreezeInside => freeze(w, Scope::Inside).await,
        Step::Precopy => precopy(w).await,
        Step::Freeze => freeze(w, Scope::All).await,
        Step::Stop => stop(w).await,
        Step::Seal => {
            let timeout_ms = w.mission.seal_ms;
            let within = Duration::from_millis(timeout_ms + 5000);
            let info = w
                .source
                .hold(&Request::Seal { hold, timeout_ms }, within)
                .await?;
            w.facts().source = Some(info);
            Ok(())
        }
        Step::Switchover => switchover(w).await,
        Step::Restore => restore(w).await,
        Step::Commit => commit(w).await,
        Step::Activate => activate(w).await,
        Step::Announce => w
            .target
            .call(&Request::Announce { hold })
            .await
            .map(drop)
            .map_err(StepError::from),
        Step::Depart => {
            let grace_ms = w.mission.grace_ms;
            let within = Duration::from_millis(grace_ms + 20_000);
            w.source
                .call_within(&Request::Depart { hold, grace_ms }, within)
                .await?;
            Ok(())
        }
        Step::Settle => settle(w).await,
        Step::Retire => retire(w).await,
        Step::Release => {
            let source = release(&w.source, hold).await?;
            let target = release(&w.target, hold).await?;
            keep(w, source, target);
            Ok(())
        }
    }
}

/// None: it is released already, and the switch was started again since. (What a switch could not take up it does not call
/// unknown.)
async fn release(switch: &Switch, hold: HoldId) -> Result<Option<HoldInfo>, ClientError> {
    let request = Request::HoldRelease { hold };
    match switch.hold(&request, Duration::from_secs(20)).await {
        Err(e) if e.refusal() == Some(RefusalCode::Unknown) => Ok(None),
        r => r.map(Some),
    }
}

/// Keeps the account of both ends; a later look that has no lanes any more does not replace an earlier one.
fn keep(w: &World, source: Option<HoldInfo>, target: Option<HoldInfo>) {
    let mut f = w.facts();
    let put = |slot: &mut Option<HoldInfo>, new: Option<HoldInfo>| {
        if let Some(new) = new
            && (slot.is_none() || !new.lanes.is_empty())
        {
            *slot = Some(new);
        }
    };
    put(&mut f.source, source);
    put(&mut f.target, target);
}

async fn start(w: &Arc<World>) -> Result<(), StepError> {
    let address = w.target.host_show().await?.migration_address;
    let uris = w
        .each(move |w, vm| {
            let address = address.clone();
            async move {
                w.target
                    .call_within(
                        &Request::VmmStart {
                            vm: vm.clone(),
                            hold: w.mission.id,
                        },
                        Duration::from_secs(30),
                    )
                    .await?;
                let q = w.qemu(End::Target, &vm).await?;
                q.set_capabilities(false).await?;
                Ok(q.listen(&address).await?)
            }
        })
        .await?;
    let mut facts = w.facts();
    for (vm, uri) in w.mission.vms().iter().zip(uris) {
        facts.vms.entry(vm.clone()).or_default().uri = uri;
    }
    Ok(())
}

async fn freeze(w: &Arc<World>, scope: Scope) -> Result<(), StepError> {
    let request = Request::Freeze {
        hold: w.mission.id,
        scope,
    };
    match w.source.call(&request).await? {
        Reply::Frozen { at_ns, drained } => {
            let mut f = w.facts();
            f.frozen_ns = at_ns;
            f.drained = Some(drained && f.drained.unwrap_or(true));
            Ok(())
        }
        other => Err(w.source.protocol("Freeze", &other).into()),
    }
}

/// Copies the memory of all VMs until the moment has come to stop them; see [`super::brink`].
async fn precopy(w: &Arc<World>) -> Result<(), StepError> {
    let share = w.mission.share().min(UNLIMITED);
    let sources = w
        .each(move |w, vm| async move {
            let q = w.qemu(End::Source, &vm).await?;
            q.set_capabilities(true).await?;
            q.set_limits(share, 1).await?;
            Ok(q)
        })
        .await?;
    w.each(|w, vm| async move {
        let uri = w
            .facts()
            .vms
            .get(&vm)
            .map(|f| f.uri.clone())
            .unwrap_or_default();
        Ok(w.qemu(End::Source, &vm).await?.migrate(&uri).await?)
    })
    .await?;

    let on_taps = w.source.ports().await?.iter().any(|p| {
        let moves = |vm: &String| w.mission.vms().contains(vm);
        p.kind == "tap" && p.vm.as_ref().is_some_and(moves)
    });
    let begun = Instant::now();
    let mut brink = Brink::new(sources.len(), on_taps);
    loop {
        let looks = w
            .each(|w, vm| async move { Ok(w.qemu(End::Source, &vm).await?.healthy().await?) })
            .await?;
        let samples: Vec<_> = looks.iter().map(|p| p.sample).collect();
        let orders = brink.on(begun.elapsed().as_secs_f64() * 1000.0, &samples);
        tracing::trace!(ms = begun.elapsed().as_millis(), ?samples);
        if !orders.is_empty() {
            tracing::debug!(ms = begun.elapsed().as_millis(), ?orders, ?samples);
        }
        for (i, (q, p)) in sources.iter().zip(&looks).enumerate() {
            let live = Live {
                state: brink.stage(i),
                progress: p.clone(),
            };
            w.live().insert(q.vm.clone(), live);
        }
        if orders.contains(&Order::Go) {
            let mut facts = w.facts();
            for (q, p) in sources.iter().zip(&looks) {
                let f = facts.vms.entry(q.vm.clone()).or_default();
                f.precopy_bytes = p.sample.transferred;
                f.left_bytes = p.sample.remaining;
                f.passes = p.sample.sync_count;
                f.dirty_pages_rate = p.dirty_pages_rate;
                if p.sample.stopped {
                    facts.early.push(q.vm.clone());
                }
            }
            return Ok(());
        }
        if orders.contains(&Order::Freeze) {
            freeze(w, Scope::All).await?;
        }
        let mut set = JoinSet::new();
        for order in orders {
            if let Order::Bandwidth { vm, rate } = order {
                let q = sources[vm].clone();
                set.spawn(async move { q.set_bandwidth(rate.bytes_per_s(share)).await });
            }
        }
        while let Some(joined) = set.join_next().await {
            joined.map_err(|e| StepError::Internal(e.to_string()))??;
        }
        sleep(Duration::from_millis(brink.poll_ms())).await;
    }
}

async fn stop(w: &Arc<World>) -> Result<(), StepError> {
    w.each(|w, vm| async move {
        let q = w.qemu(End::Source, &vm).await?;
        // Both are on their way at once; QEMU takes them in this order.
        let (stopped, limits) = tokio::join!(q.stop(), q.set_limits(UNLIMITED, 2000));
        stopped?;
        limits?;
        Ok(())
    })
    .await?;
    for vm in w.mission.vms() {
        let stop = w.qemu(End::Source, vm).await?.events().last("STOP");
        if let Some(e) = stop {
            w.facts().vms.entry(vm.clone()).or_default().stop_ns = e.at_ns;
        }
        w.live().entry(vm.clone()).or_default().state = "stopped";
    }
    Ok(())
}

/// All reach the brink at their own pace, and pass it in dependency order.
async fn switchover(w: &Arc<World>) -> Result<(), StepError> {
    const WITHIN: Duration = Duration::from_secs(60);
    for vm in w.mission.vms() {
        let q = w.qemu(End::Source, vm).await?;
        let p = q
            .reach(&["pre-switchover", "device", "completed"], WITHIN)
            .await?;
        if p.status == "pre-switchover" {
            q.pass_brink().await?;
        }
    }
    for vm in w.mission.vms() {
        let p = w
            .qemu(End::Source, vm)
            .await?
            .reach(&["completed"], WITHIN)
            .await?;
        w.facts()
            .vms
            .entry(vm.clone())
            .or_default()
            .downtime_qemu_ms = p.downtime_ms;
        w.qemu(End::Target, vm)
            .await?
            .reach(&["completed"], WITHIN)
            .await?;
        w.live().insert(
            vm.clone(),
            Live {
                state: "arrived",
                progress: p,
            },
        );
    }
    Ok(())
}

async fn restore(w: &Arc<World>) -> Result<(), StepError> {
    let hold = w.mission.id;
    let info = w
        .target
        .hold(&Request::IncomingRestore { hold }, Duration::from_secs(20))
        .await?;
    let mut f = w.facts();
    let differs = f.source.as_ref().and_then(|s| difference(s, &info));
    f.target = Some(info);
    match differs {
        Some(d) => Err(StepError::Disagree(d)),
        None => Ok(()),
    }
}

/// A VM that has died on the target by now is whole on the source, and there is still a way back. Asked once, before the first try: behind
/// it there is none.
async fn commit(w: &Arc<World>) -> Result<(), StepError> {
    if !w.committing.swap(true, Ordering::Relaxed) {
        let there = |w: Arc<World>, vm: String| async move {
            let asked = async { w.qemu(End::Target, &vm).await?.status().await };
            asked.await.map(drop).map_err(StepError::Died)
        };
        w.each(there).await?;
    }
    let hold = w.mission.id;
    w.target.call(&Request::Commit { hold }).await?;
    Ok(())
}

/// Behind the commit the others do not wait for a VM that has died: it is lost there, and its copy on the source stays.
async fn activate(w: &Arc<World>) -> Result<(), StepError> {
    let mut failed: Vec<(&String, VmmError)> = Vec::new();
    for vm in w.mission.vms() {
        let run = async { w.qemu(End::Target, vm).await?.cont().await };
        if let Err(e) = run.await {
            failed.push((vm, e));
        }
    }
    for vm in w.mission.vms() {
        if failed.iter().any(|(f, _)| *f == vm) {
            continue;
        }
        if let Err(e) = runs(w, vm).await {
            failed.push((vm, e));
        }
    }
    let names = failed.iter().map(|(vm, _)| (*vm).clone()).collect();
    let dead = dead(&w.target, names).await?;
    match failed.into_iter().find(|(vm, _)| !dead.contains(vm)) {
        Some((_, e)) => Err(e.into()),
        None => {
            w.facts().lost = dead;
            Ok(())
        }
    }
}

/// That it does, and since when.
async fn runs(w: &World, vm: &str) -> Result<(), VmmError> {
    let q = w.qemu(End::Target, vm).await?;
    let status = q.status().await?;
    if status != "running" {
        return Err(q.trouble(format!("is '{status}' after cont")));
    }
    if let Some(e) = q.events().last("RESUME") {
        w.facts().vms.entry(vm.to_owned()).or_default().resume_ns = e.at_ns;
    }
    w.live().entry(vm.to_owned()).or_default().state = "running on the target";
    Ok(())
}

/// Those of them of which no process serves the QMP socket. Seen twice, so that none is taken for dead whose switch was just started.
pub async fn dead(switch: &Switch, mut vms: Vec<String>) -> Result<Vec<String>, ClientError> {
    for _ in 0..2 {
        if !vms.is_empty() {
            sleep(GONE).await;
            let there = switch.vms().await?;
            vms.retain(|vm| there.iter().any(|v| v.name == *vm && v.status == ABSENT));
        }
    }
    Ok(vms)
}

/// Between two looks whether a VM is gone.
const GONE: Duration = Duration::from_millis(250);
/// What a switch says of a VM of which no process serves its QMP socket.
const ABSENT: &str = "absent";

async fn settle(w: &Arc<World>) -> Result<(), StepError> {
    let hold = w.mission.id;
    let end = Instant::now() + Duration::from_millis(w.mission.grace_ms + 30_000);
    loop {
        let status = Request::HoldStatus { hold };
        let source = w.source.hold(&status, crate::client::CALL).await?;
        let target = w.target.hold(&status, crate::client::CALL).await?;
        let settled = matches!(source.state, HoldState::Departed | HoldState::Released)
            && matches!(target.state, HoldState::Live | HoldState::Released);
        let text = format!(
            "the source is {:?}{}, the target {:?}{}",
            source.state,
            source
                .error
                .as_ref()
                .map(|e| format!(" ({e})"))
                .unwrap_or_default(),
            target.state,
            target
                .error
                .as_ref()
                .map(|e| format!(" ({e})"))
                .unwrap_or_default()
        );
        keep(w, Some(source), Some(target));
        if settled {
            return Ok(());
        }
        if Instant::now() >= end {
            return Err(StepError::Late(format!("lanes are still draining: {text}")));
        }
        sleep(Duration::from_millis(20)).await;
    }
}

/// Ends the source's VMs. One that runs is not ended, whatever the journal says, nor one that is all that is left of a VM.
async fn retire(w: &Arc<World>) -> Result<(), StepError> {
    w.each(|w, vm| async move {
        if w.facts().lost.contains(&vm) {
            return Ok(());
        }
        let q = match w.qemu(End::Source, &vm).await {
            Ok(q) => q,
            Err(e) if absent(&e) || is_absent(&w, &vm).await => {
                tracing::debug!(%vm, "already gone: {e}");
                return Ok(());
            }
            Err(e) => return Err(e.into()),
        };
        let status = q.status().await?;
        if status == "running" {
            return Err(q.trouble("runs on the source although it was moved; it is left alone: find out who resumed it").into());
        }
        q.quit().await?;
        Ok(())
    })
    .await?;
    Ok(())
}

fn absent(e: &VmmError) -> bool {
    matches!(e, VmmError::Way { error, .. } if error.refusal() == Some(RefusalCode::Unknown))
}

async fn is_absent(w: &World, vm: &str) -> bool {
    let vms = w.source.vms().await.unwrap_or_default();
    vms.iter().any(|v| v.name == vm && !v.reachable)
}
