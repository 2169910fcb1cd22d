//! `gangway verify`.

use gangway_shared::api::{LedgerPage, Reply, Request, Role};
use gangway_shared::id::HoldId;
use gangway_shared::ledger::{KeptFrame, LaneKind, Ledger, LedgerLane};
use serde_json::json;

use super::Context;
use crate::cli::{Format, VerifyArgs};
use crate::client::{Switch, verb};
use crate::exit::Failure;
use crate::ledger::{End, Fault, LaneRecord, LaneVerdict, Verdict, pcapng, verify};
use crate::migration::journal::replace;
use crate::table::{json, num, show, table};

pub async fn exec(cx: &Context, args: VerifyArgs) -> Result<(), Failure> {
    let (id, from, to) = match (args.id, args.from, args.to) {
        // The hosts' records are enough: anybody can compare them.
        (Some(id), Some(from), Some(to)) => (id, from, to),
        (id, ..) => {
            let id = cx.store.resolve(id).map_err(elsewhere)?;
            let mission = cx.store.read(id)?.mission;
            (id, mission.from, mission.to)
        }
    };
    let (from, to) = (cx.switch(&from)?, cx.switch(&to)?);
    let source = fetch(&from, id, Role::Source).await?;
    let target = fetch(&to, id, Role::Target).await?;
    if let Some(path) = &args.ledger {
        let both = json!({"source": source, "target": target});
        let text = serde_json::to_vec_pretty(&both)
            .map_err(|e| Failure::failed(format!("cannot write JSON: {e}")))?;
        replace(path, &text)?;
    }
    if let Some(path) = &args.pcapng {
        let mut lanes = kept(&from, id, &source).await?;
        for (name, frames) in kept(&to, id, &target).await? {
            if lanes.iter().all(|l| l.0 != name) {
                lanes.push((name, frames));
            }
        }
        if lanes.iter().all(|l| l.1.is_empty()) {
            return Err(Failure::usage(format!(
                "no frames of migration {id} were kept: ledger.frames_bytes in the configuration of the hosts says how many bytes are"
            )));
        }
        replace(path, &pcapng::file(&id.to_string(), &lanes))?;
    }
    let verdict = verify(&source, &target);
    print(&verdict, args.output.output)?;
    if verdict.clean {
        return Ok(());
    }
    let all: Vec<String> = faults(&verdict).collect();
    Err(Failure::failed(format!(
        "migration {id} is not clean, {} faults: {}",
        all.len(),
        all.first().map_or("", String::as_str)
    )))
}

/// No journal is no obstacle.
fn elsewhere(f: Failure) -> Failure {
    let how = "one that was started elsewhere: `gangway verify ID --from HOST --to HOST`";
    Failure::new(f.code, format!("{}; {how}", f.message))
}

/// One line each.
fn faults(v: &Verdict) -> impl Iterator<Item = String> {
    let of_lane = |l: &LaneVerdict, f: &Fault| {
        format!("{}: {}, {}: {}", l.lane, f.host, f.stage.name(), f.what)
    };
    let lanes = v.lanes.iter();
    let lanes = lanes.flat_map(move |l| l.faults.iter().map(move |f| of_lane(l, f)));
    v.faults.iter().cloned().chain(lanes)
}

/// All that a host remembers.
async fn fetch(switch: &Switch, hold: HoldId, role: Role) -> Result<End, Failure> {
    let (ledger, lanes) = lanes(switch, hold, role).await?;
    let mut records = Vec::new();
    for (n, lane) in lanes.into_iter().enumerate() {
        let mut index = None;
        if lane.indexed {
            let mut page = page(hold, role, n);
            let all = index.insert(Vec::new());
            loop {
                let request = Request::LedgerIndex(page);
                match switch.call(&request).await? {
                    Reply::LedgerIndex { batches, next } => {
                        all.extend(batches);
                        match next {
                            Some(at) if at > page.at => page.at = at,
                            _ => break,
                        }
                    }
                    other => return Err(switch.protocol(verb(&request), &other).into()),
                }
            }
        }
        records.push(LaneRecord { lane, index });
    }
    Ok(End {
        ledger,
        lanes: records,
    })
}

fn page(hold: HoldId, role: Role, lane: usize) -> LedgerPage {
    LedgerPage {
        hold,
        role,
        lane: lane as u32,
        at: 0,
    }
}

async fn lanes(
    switch: &Switch,
    hold: HoldId,
    role: Role,
) -> Result<(Ledger, Vec<LedgerLane>), Failure> {
    let mut all = Vec::new();
    loop {
        let request = Request::LedgerShow {
            hold,
            role,
            lane: all.len() as u32,
        };
        match switch.call(&request).await? {
            Reply::Ledger { ledger, lanes } => {
                let more = !lanes.is_empty();
                all.extend(lanes);
                if !more || all.len() >= ledger.lanes as usize {
                    return Ok((ledger, all));
                }
            }
            other => return Err(switch.protocol(verb(&request), &other).into()),
        }
    }
}

/// The frames that a host has kept, by lane.
async fn kept(
    switch: &Switch,
    hold: HoldId,
    end: &End,
) -> Result<Vec<(String, Vec<KeptFrame>)>, Failure> {
    let mut out = Vec::new();
    for (n, r) in end.lanes.iter().enumerate() {
        let mut page = page(hold, end.ledger.role, n);
        let mut all = Vec::new();
        loop {
            let request = Request::LedgerFrames(page);
            match switch.call(&request).await? {
                Reply::LedgerFrames { frames, next } => {
                    all.extend(frames);
                    match next {
                        Some(at) if at > page.at => page.at = at,
                        _ => break,
                    }
                }
                other => return Err(switch.protocol(verb(&request), &other).into()),
            }
        }
        if all.is_empty() {
            continue;
        }
        if !r.lane.kept {
            anstream::eprintln!(
                "gangway: lane {}: only the first {} frames were kept on {}",
                r.lane.lane,
                all.len(),
                switch.host()
            );
        }
        let name = match r.lane.kind {
            LaneKind::Shipped => r.lane.lane.to_string(),
            LaneKind::Behind => format!("{} (behind, on {})", r.lane.lane, switch.host()),
        };
        out.push((name, all));
    }
    Ok(out)
}

/// For people or programs.
fn print(v: &Verdict, format: Format) -> Result<(), Failure> {
    if format == Format::Json {
        return json(v);
    }
    anstream::println!(
        "migration {} ({}): {} frames, {} bytes: {}",
        v.migration,
        v.outcome,
        v.frames,
        v.bytes,
        if v.clean { "clean" } else { "NOT CLEAN" }
    );
    let mut t = table(&["lane", "frames", "bytes", "stages", "agree"]);
    for l in &v.lanes {
        let stages: Vec<String> = l
            .stages
            .iter()
            .map(|s| match s.agrees {
                true => s.stage.name().to_owned(),
                false => format!("{}!", s.stage.name()),
            })
            .collect();
        let lane = match l.kind {
            LaneKind::Shipped => l.lane.clone(),
            LaneKind::Behind => format!("{} (behind)", l.lane),
        };
        t.add_row(vec![
            lane.into(),
            num(l.frames),
            num(l.bytes),
            stages.join(",").into(),
            if l.faults.is_empty() { "yes" } else { "NO" }.into(),
        ]);
    }
    show(&t);
    for f in faults(v) {
        anstream::println!("fault: {f}");
    }
    Ok(())
}
