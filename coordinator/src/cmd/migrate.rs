//! `gangway migrate`.

use std::io::Read as _;
use std::sync::Arc;

use gangway_shared::id::HoldId;

use super::Context;
use super::group::{Found, find};
use super::report::{print, write};
use crate::cli::{Format, MigrateArgs};
use crate::client::Switch;
use crate::exit::Failure;
use crate::graph::draw;
use crate::hosts::Hosts;
use crate::migration::act::World;
use crate::migration::machine::Machine;
use crate::migration::plan::{Mission, PortOf};
use crate::migration::report::Facts;
use crate::migration::run::{Interference, check, drive, verdict};
use crate::migration::steps::{NO_RETURN, TABLE};
use crate::progress::Progress;
use crate::table::{json, show, table};
use crate::vmm::qemu::UNLIMITED;

pub async fn exec(cx: &Context, c: MigrateArgs) -> Result<(), Failure> {
    let interference = Interference::from_env()?;
    let hosts = cx.hosts()?;
    let target = Switch::new(&hosts, hosts.find(&c.to)?)?;
    let found = find(&hosts, &c.group, c.from.as_deref(), c.order.as_deref()).await?;
    let mission = mission(&hosts, &c, &found).await?;
    let source = found.source;

    // Before there is a journal: what is refused here was never a migration. The machine's first step checks again.
    check(&mission, &source, &target).await?;
    if c.dry_run {
        return dry_run(&mission, c.output.output);
    }
    let show_progress = !c.quiet;
    if show_progress {
        anstream::eprintln!(
            "migration {}: {} -> {}",
            mission.id,
            mission.from,
            mission.to
        );
        anstream::eprint!("{}", draw::text(&mission.plan));
    }
    let journal = cx.store.create(&mission)?;
    let world = Arc::new(World::new(
        mission.clone(),
        source,
        target,
        Facts::default(),
        false,
    ));
    let progress = Progress::new(world.clone(), c.quiet, false);
    let machine = Machine::new(mission.freeze);
    let (ended, journal) = drive(
        world,
        journal,
        machine,
        Vec::new(),
        &[],
        interference,
        progress,
    )
    .await?;
    let report = write(cx, &journal, mission.id, c.report.as_deref())?;
    print(&report, c.output.output)?;
    if show_progress {
        anstream::eprintln!("report: {}", journal.dir().join("report.json").display());
    }
    verdict(&mission, &ended)?;
    super::report::agreement(&report)
}

async fn mission(hosts: &Hosts, c: &MigrateArgs, found: &Found) -> Result<Mission, Failure> {
    let target = hosts.find(&c.to)?;
    let from = found.source.host().to_owned();
    if from == target.name {
        return Err(Failure::usage(format!(
            "the VMs already run on host '{from}'"
        )));
    }
    let Some(address) = target.address else {
        return Err(Failure::usage(format!(
            "{}: host '{}' needs address = \"IP:PORT\" too: that is where the source's switch ships to",
            hosts.path.display(),
            target.name
        )));
    };
    let ports = found.source.ports().await?;
    let ours = |vm: &String| found.plan.order.contains(vm);
    let ports: Vec<PortOf> = ports
        .into_iter()
        .filter_map(|p| {
            Some(PortOf {
                name: p.name,
                mac: p.mac,
                vm: p.vm.filter(ours)?,
            })
        })
        .collect();
    if let Some(vm) = found
        .plan
        .order
        .iter()
        .find(|vm| ports.iter().all(|p| p.vm != **vm))
    {
        return Err(Failure::usage(format!(
            "VM '{vm}' has no port at the switch of host '{from}'"
        )));
    }
    let secret: [u8; 32] = random()?;
    Ok(Mission {
        id: HoldId(u64::from_le_bytes(random()?)),
        from,
        to: target.name.clone(),
        target_address: address.to_string(),
        plan: found.plan.clone(),
        ports,
        freeze: c.freeze,
        bandwidth: c.bandwidth_mbit.map_or(UNLIMITED, |m| m * 125_000),
        ticket: hex::encode(secret),
        seal_ms: c.max_hold_ms,
        grace_ms: c.grace_ms,
    })
}

fn random<const N: usize>() -> Result<[u8; N], Failure> {
    let mut out = [0; N];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut f| f.read_exact(&mut out))
        .map_err(|e| Failure::failed(format!("cannot read /dev/urandom: {e}")))?;
    Ok(out)
}

fn dry_run(mission: &Mission, format: Format) -> Result<(), Failure> {
    if format == Format::Json {
        let steps: Vec<_> = TABLE
            .iter()
            .filter(|r| r.step.in_mode(mission.freeze))
            .map(|r| {
                serde_json::json!({
                    "step": r.name, "actor": r.actor, "forward": r.forward, "undo": r.undo,
                    "point_of_no_return": r.step == NO_RETURN,
                })
            })
            .collect();
        return json(&serde_json::json!({
            "from": mission.from, "to": mission.to, "plan": mission.plan, "ports": mission.ports, "steps": steps,
        }));
    }
    anstream::print!("{}", draw::text(&mission.plan));
    let mut t = table(&["step", "who", "does", "undo"]);
    for r in TABLE.iter().filter(|r| r.step.in_mode(mission.freeze)) {
        let undo = match r.step >= NO_RETURN {
            true => "none: it is tried again".to_owned(),
            false => r
                .undo
                .iter()
                .map(|u| u.text())
                .collect::<Vec<_>>()
                .join(", "),
        };
        t.add_row(vec![
            r.name.to_owned(),
            r.actor.to_owned(),
            r.forward.to_owned(),
            undo,
        ]);
    }
    show(&t);
    anstream::println!("all checks passed; nothing was changed");
    Ok(())
}
