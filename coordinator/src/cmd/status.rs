//! `gangway status`.

use gangway_shared::id::HoldId;
use serde_json::json;

use super::Context;
use crate::cli::{Format, OfMigration};
use crate::exit::Failure;
use crate::migration::journal::Past;
use crate::migration::machine::Entry;
use crate::migration::steps::{Step, TABLE};
use crate::table::{json, show, table};

pub fn exec(cx: &Context, c: OfMigration) -> Result<(), Failure> {
    match c.id {
        Some(id) => one(cx, cx.store.resolve(Some(id))?, c.output.output),
        None => list(cx, c.output.output),
    }
}

fn list(cx: &Context, format: Format) -> Result<(), Failure> {
    let ids = cx.store.list()?;
    let mut rows = Vec::new();
    for id in ids {
        let past = cx.store.read(id)?;
        let state = state(cx, id, &past)?;
        rows.push((id, past, state));
    }
    if format == Format::Json {
        let rows: Vec<_> = rows
            .iter()
            .map(|(id, p, state)| {
                json!({"migration": id, "state": state, "from": p.mission.from, "to": p.mission.to, "vms": p.mission.vms()})
            })
            .collect();
        return json(&rows);
    }
    if rows.is_empty() {
        anstream::println!("no migration yet");
        return Ok(());
    }
    let mut t = table(&["migration", "state", "from", "to", "vms"]);
    for (id, p, state) in rows {
        t.add_row(vec![
            id.to_string(),
            state,
            p.mission.from.clone(),
            p.mission.to.clone(),
            p.mission.vms().join(","),
        ]);
    }
    show(&t);
    Ok(())
}

/// A word, and whether somebody works on it.
fn state(cx: &Context, id: HoldId, past: &Past) -> Result<String, Failure> {
    let word = match past.outcome() {
        Some(o) => return Ok(snake(&o)),
        None => current(past).map_or("begun".to_owned(), |s| s.name().to_owned()),
    };
    Ok(match cx.store.alive(id)? {
        true => word,
        false => format!("{word}, its coordinator is dead: run `gangway abort {id}`"),
    })
}

fn snake(value: &impl serde::Serialize) -> String {
    serde_json::to_value(value)
        .ok()
        .and_then(|v| v.as_str().map(str::to_owned))
        .unwrap_or_default()
}

fn current(past: &Past) -> Option<Step> {
    past.entries.iter().rev().find_map(|(_, e)| match e {
        Entry::Begin(s) => Some(*s),
        _ => None,
    })
}

fn one(cx: &Context, id: HoldId, format: Format) -> Result<(), Failure> {
    let past = cx.store.read(id)?;
    let has = |wanted: Entry| past.entries.iter().any(|(_, e)| *e == wanted);
    let word = |s: Step| match (
        has(Entry::Done(s)),
        has(Entry::Failed(s)),
        has(Entry::Begin(s)),
    ) {
        (true, ..) => "done",
        (_, true, _) => "failed",
        (.., true) => "running",
        _ => "",
    };
    let state = state(cx, id, &past)?;
    let rows: Vec<_> = TABLE
        .iter()
        .filter(|r| r.step.in_mode(past.mission.freeze))
        .map(|r| (r, word(r.step)))
        .collect();
    if format == Format::Json {
        let steps: Vec<_> = rows
            .iter()
            .map(|(r, w)| json!({"step": r.name, "state": w}))
            .collect();
        return json(&json!({
            "migration": id, "state": state, "from": past.mission.from, "to": past.mission.to,
            "vms": past.mission.vms(), "steps": steps, "troubles": past.troubles,
        }));
    }
    anstream::println!(
        "migration {id} {} -> {}: {state}",
        past.mission.from,
        past.mission.to
    );
    let mut t = table(&["step", "state", "who", "does"]);
    for (r, w) in rows {
        t.add_row(vec![r.name, w, r.actor, r.forward]);
    }
    show(&t);
    for trouble in &past.troubles {
        anstream::println!("note: {trouble}");
    }
    Ok(())
}
