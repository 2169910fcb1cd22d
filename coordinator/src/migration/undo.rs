//! How things are put back. Every undo may be done when there is nothing to undo, and again; it goes on past errors and
//! answers with all of them.

use std::sync::Arc;
use std::time::Duration;

use gangway_shared::api::{HoldState, RefusalCode, Request};
use tokio::time::{Instant, sleep};

use super::act::{End, World, dead};
use super::steps::Undo;
use crate::client::{ClientError, Switch};

/// Puts one thing back; the errors, if any.
pub async fn undo(w: &Arc<World>, undo: Undo) -> Result<(), Vec<String>> {
    match undo {
        Undo::CancelMemory => {
            every(w, |w, vm| async move {
                let q = w.qemu(End::Source, &vm).await?;
                q.cancel().await?;
                // As if nobody had been here: QEMU's own defaults.
                q.set_capabilities(false).await?;
                q.set_limits(128 << 20, 300).await
            })
            .await
        }
        Undo::EndTargets => {
            let mut errors = Vec::new();
            for vm in w.mission.vms() {
                let request = Request::VmmStop {
                    vm: vm.clone(),
                    hold: w.mission.id,
                };
                // SIGTERM, a while, SIGKILL.
                match w
                    .target
                    .call_within(&request, Duration::from_secs(20))
                    .await
                {
                    Ok(_) => {}
                    Err(e) if unknown(&e) => {}
                    Err(e) => errors.push(e.to_string()),
                }
            }
            if errors.is_empty() {
                Ok(())
            } else {
                Err(errors)
            }
        }
        Undo::ResumeSources => {
            every(w, |w, vm| async move {
                let q = w.qemu(End::Source, &vm).await?;
                if q.status().await? == "running" {
                    return Ok(());
                }
                q.cont().await?;
                match q.status().await?.as_str() {
                    "running" => Ok(()),
                    other => Err(q.trouble(format!("is '{other}' after cont"))),
                }
            })
            .await
        }
        Undo::ReturnFrames => return_frames(w).await,
    }
}

/// With every VM of the source. One that has died there has nothing left to be put back.
async fn every<F, Fut>(w: &Arc<World>, f: F) -> Result<(), Vec<String>>
where
    F: Fn(Arc<World>, String) -> Fut,
    Fut: Future<Output = Result<(), crate::vmm::qemu::VmmError>> + Send + 'static,
{
    let results = w
        .each(|w, vm| {
            let work = f(w, vm.clone());
            async move { Ok(work.await.err().map(|e| (vm, e.to_string()))) }
        })
        .await;
    let failed: Vec<(String, String)> = match results {
        Ok(failed) => failed.into_iter().flatten().collect(),
        Err(e) => return Err(vec![e.to_string()]),
    };
    let names = failed.iter().map(|(vm, _)| vm.clone()).collect();
    let dead = dead(&w.source, names).await.unwrap_or_default();
    w.facts().died.extend(dead.iter().cloned());
    let errors = failed.into_iter().filter(|(vm, _)| !dead.contains(vm));
    let errors: Vec<String> = errors.map(|(_, e)| e).collect();
    if errors.is_empty() {
        Ok(())
    } else {
        Err(errors)
    }
}

fn unknown(e: &ClientError) -> bool {
    e.refusal() == Some(RefusalCode::Unknown)
}

async fn return_frames(w: &Arc<World>) -> Result<(), Vec<String>> {
    // The source first: its guests wait for these frames.
    let (source, target) = tokio::join!(abort_hold(&w.source, w), abort_hold(&w.target, w));
    let errors: Vec<String> = [source.err(), target.err()].into_iter().flatten().collect();
    if errors.is_empty() {
        Ok(())
    } else {
        Err(errors)
    }
}

async fn abort_hold(switch: &Switch, w: &Arc<World>) -> Result<(), String> {
    let hold = w.mission.id;
    let end = Instant::now() + Duration::from_secs(30);
    let mut request = Request::HoldAbort { hold };
    loop {
        let info = match switch.hold(&request, crate::client::CALL).await {
            Ok(info) => info,
            // It was never opened, or is put back and the switch was started again since. Frames of a hold that a switch could
            // not take up are another refusal, and this undo is not done.
            Err(e) if unknown(&e) => return Ok(()),
            Err(e) => return Err(e.to_string()),
        };
        let (state, error) = (info.state, info.error.clone());
        if switch.host() == w.source.host() && !info.lanes.is_empty() {
            w.facts().source = Some(info);
        }
        match state {
            HoldState::Aborted | HoldState::Released => return Ok(()),
            _ if Instant::now() >= end => {
                let why = error.map(|e| format!(": {e}")).unwrap_or_default();
                return Err(format!(
                    "host '{}' is still putting frames back ({state:?}){why}",
                    switch.host()
                ));
            }
            _ => request = Request::HoldStatus { hold },
        }
        sleep(Duration::from_millis(20)).await;
    }
}
