//! `gangway abort`: asks the coordinator that runs a migration to undo it; if it is dead, takes its place.

use std::sync::Arc;
use std::time::Duration;

use gangway_shared::id::HoldId;

use super::Context;
use super::report::{agreement, print, write};
use crate::cli::{Format, OfMigration};
use crate::client::Switch;
use crate::exit::Failure;
use crate::migration::act::World;
use crate::migration::journal::Journal;
use crate::migration::look::ask;
use crate::migration::machine::{Entry, Machine, Outcome};
use crate::migration::run::{Interference, drive, verdict};
use crate::progress::Progress;

pub async fn exec(cx: &Context, c: OfMigration) -> Result<(), Failure> {
    let id = cx.store.resolve(c.id)?;
    if cx.store.read(id)?.over() {
        return told(cx, id, c.output.output);
    }
    let mut asked = false;
    loop {
        match cx.store.take_over(id)? {
            // It ended while we waited.
            Some(_) if cx.store.read(id)?.over() => return told(cx, id, c.output.output),
            Some(journal) => return take_up(cx, id, journal, c.output.output).await,
            None if !asked => {
                cx.store.ask_abort(id)?;
                asked = true;
            }
            None => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

/// How a migration that is over has ended: an abort is content with everything but "moved".
fn told(cx: &Context, id: HoldId, format: Format) -> Result<(), Failure> {
    let past = cx.store.read(id)?;
    let report = super::report::make(cx, id)?;
    print(&report, format)?;
    match past.outcome() {
        Some(Outcome::Moved) => {
            agreement(&report)?;
            Err(Failure::refused(format!(
                "migration {id} was already past the point of no return: the group runs on '{}'",
                past.mission.to
            )))
        }
        _ => Ok(()),
    }
}

async fn take_up(
    cx: &Context,
    id: HoldId,
    journal: Journal,
    format: Format,
) -> Result<(), Failure> {
    let past = cx.store.read(id)?;
    let mission = past.mission.clone();
    let hosts = cx.hosts()?;
    let source = Switch::new(&hosts, hosts.find(&mission.from)?)?;
    let target = Switch::new(&hosts, hosts.find(&mission.to)?)?;
    let world = Arc::new(World::new(
        mission.clone(),
        source,
        target,
        past.facts.clone(),
        true,
    ));
    let (machine, first) = Machine::replay(mission.freeze, &past.steps());
    anstream::eprintln!(
        "migration {id}: its coordinator is dead; {}",
        if machine.past_return() {
            "past the point of no return, finishing it"
        } else {
            "undoing it"
        }
    );
    let ordered = past.steps().contains(&Entry::Rollback);
    let remarks = ask(&world, ordered).await;
    let progress = Progress::new(world.clone(), format == Format::Json, true);
    let (ended, journal) = drive(
        world,
        journal,
        machine,
        first,
        &remarks,
        Interference::default(),
        progress,
    )
    .await?;
    let report = write(cx, &journal, id, None)?;
    print(&report, format)?;
    match ended.outcome {
        Outcome::NothingDone | Outcome::RolledBack => Ok(()),
        _ => verdict(&mission, &ended).and_then(|()| agreement(&report)),
    }
}
