//! `gangway report`.

use std::path::Path;

use gangway_shared::id::HoldId;

use super::Context;
use crate::cli::{Format, OfMigration};
use crate::exit::{Code, Failure};
use crate::migration::journal::{Journal, replace};
use crate::migration::report::Report;
use crate::table::{bytes, json, num, show, table};

pub fn exec(cx: &Context, c: OfMigration) -> Result<(), Failure> {
    let id = cx.store.resolve(c.id)?;
    print(&make(cx, id)?, c.output.output)
}

/// The account, made from the journal.
pub fn make(cx: &Context, id: HoldId) -> Result<Report, Failure> {
    let past = cx.store.read(id)?;
    Ok(Report::new(
        &past.mission,
        &past.facts,
        &past.entries,
        &past.troubles,
    ))
}

/// Makes it and puts it into the migration's folder, and to `also`.
pub fn write(
    cx: &Context,
    journal: &Journal,
    id: HoldId,
    also: Option<&Path>,
) -> Result<Report, Failure> {
    let report = make(cx, id)?;
    let text = serde_json::to_vec_pretty(&report)
        .map_err(|e| Failure::failed(format!("cannot write JSON: {e}")))?;
    journal.put("report.json", &text)?;
    if let Some(path) = also {
        replace(path, &text)?;
    }
    Ok(report)
}

/// An error if the group has moved and the two ends do not agree, or a VM has died there.
pub fn agreement(report: &Report) -> Result<(), Failure> {
    let differs = report.links.iter().find(|l| !l.agree);
    if let Some(l) = differs.filter(|_| report.outcome == "disagree") {
        return Err(Failure::failed(format!(
            "the group has moved, but the accounts of lane {} differ: held {} shipped {} flushed {} dropped {}; see the report",
            l.lane, l.held_frames, l.shipped_frames, l.flushed_frames, l.dropped
        )));
    }
    if !report.lost.is_empty() {
        let (vms, from, to) = (report.lost.join(", "), &report.from, &report.to);
        return Err(Failure::new(
            Code::Lost,
            format!(
                "the group has moved, but {vms} died on host '{to}' when it was to run there: the stopped copy on host '{from}' is kept; resume it there (QMP 'cont', virsh resume) or end it ('quit'); why it died is in vm-NAME.log of host '{to}'"
            ),
        ));
    }
    Ok(())
}

/// For people or programs.
pub fn print(r: &Report, format: Format) -> Result<(), Failure> {
    if format == Format::Json {
        return json(r);
    }
    let ms = |v: Option<f64>| v.map_or("-".to_owned(), |v| format!("{v:.1}"));
    anstream::println!(
        "migration {} {} -> {}: {}; order {}; blackout {} ms (first STOP to last RESUME), freeze to thaw {} ms",
        r.migration,
        r.from,
        r.to,
        r.outcome,
        r.order.join(" -> "),
        ms(r.blackout_ms),
        ms(r.freeze_to_thaw_ms)
    );
    let mut t = table(&[
        "vm",
        "pre-copied",
        "left at stop",
        "passes",
        "dirty pages/s",
        "pause ms",
        "qemu downtime ms",
    ]);
    for v in &r.vms {
        t.add_row(vec![
            v.name.clone().into(),
            num(bytes(v.precopy_bytes)),
            num(bytes(v.left_bytes)),
            num(v.passes),
            num(v.dirty_pages_rate),
            num(ms(v.pause_ms)),
            num(v.downtime_qemu_ms.map_or("-".to_owned(), |d| d.to_string())),
        ]);
    }
    show(&t);
    if !r.links.is_empty() {
        let mut t = table(&[
            "lane", "held", "bytes", "shipped", "flushed", "behind", "dropped", "source", "target",
            "agree",
        ]);
        for l in &r.links {
            t.add_row(vec![
                l.lane.clone().into(),
                num(l.held_frames),
                num(l.held_bytes),
                num(l.shipped_frames),
                num(l.flushed_frames),
                num(l.queued_behind),
                num(l.dropped),
                l.digest_source.clone().into(),
                l.digest_target.clone().into(),
                if l.agree { "yes" } else { "NO" }.into(),
            ]);
        }
        show(&t);
    }
    let mut t = table(&["step", "ms", "failures"]);
    for s in &r.steps {
        t.add_row(vec![s.step.name().into(), num(ms(s.ms)), num(s.failures)]);
    }
    show(&t);
    if !r.stopped_early.is_empty() {
        anstream::println!(
            "note: QEMU stopped by itself before the freeze: {}",
            r.stopped_early.join(", ")
        );
    }
    if r.tap_drained == Some(false) {
        anstream::println!(
            "note: the queue of a TAP was not seen empty before the stop; what it held was read back"
        );
    }
    for t in &r.troubles {
        anstream::println!("note: {t}");
    }
    Ok(())
}
