//! The final table: one line per flow, the runs side by side.

use comfy_table::{Cell, CellAlignment, ContentArrangement, Table, presets};

use super::report::{Report, Run};
use super::traffic::Flow;
use crate::workload::report::Clock;

/// The report for people.
pub fn render(report: &Report) -> String {
    let runs: Vec<&Run> = [
        &report.run,
        &report.baseline,
        &report.baseline_one_by_one,
        &report.in_place,
    ]
    .into_iter()
    .flatten()
    .collect();
    let mut text = String::new();
    text += &figures(&runs).to_string();
    text += "\n\n";
    text += &traffic(&runs).to_string();
    text += "\nstall: the longest silence in ms on the host's clock; * on a guest's clock, which stands still in a pause; !: broken or altered\n";
    text
}

fn table() -> Table {
    let mut table = Table::new();
    table
        .load_preset(presets::UTF8_FULL_CONDENSED)
        .set_content_arrangement(ContentArrangement::Disabled);
    table
}

fn right(text: impl ToString) -> Cell {
    Cell::new(text).set_alignment(CellAlignment::Right)
}

fn title(run: &Run) -> String {
    match &run.mode.freeze {
        Some(freeze) => format!("{} {} {freeze}", run.mode.method, run.mode.ports),
        None => run.mode.method.clone(),
    }
}

fn figures(runs: &[&Run]) -> Table {
    let mut table = table();
    table.set_header([
        "group",
        "blackout ms",
        "migration ms",
        "pauses ms",
        "pre-copy MB",
        "cpu % before/during",
        "verdict",
    ]);
    for run in runs {
        let per_vm = |figure: &dyn Fn(&super::report::VmFigures) -> String| {
            run.vms.iter().map(figure).collect::<Vec<_>>().join(" ")
        };
        table.add_row([
            Cell::new(title(run)),
            right(format!("{:.0}", run.blackout_ms)),
            right(format!("{:.0}", run.migration_ms)),
            right(per_vm(&|vm| format!("{:.0}", vm.pause_ms))),
            right(per_vm(&|vm| {
                format!("{:.0}", vm.precopy_bytes as f64 / 1e6)
            })),
            right(format!(
                "{:.0}/{:.0}",
                run.cpu.steady_percent, run.cpu.migration_percent
            )),
            Cell::new(if run.clean {
                "nothing lost"
            } else {
                "NOT CLEAN"
            }),
        ]);
    }
    table
}

fn traffic(runs: &[&Run]) -> Table {
    let mut table = table();
    let mut header = vec!["flow\n(lost / duplicated / reordered)".to_owned()];
    for run in runs {
        header.extend([format!("{}\nsent", title(run)), "\nl / d / r".to_owned()]);
        header.extend(["\nstall".to_owned(), "\nrtx".to_owned()]);
    }
    table.set_header(header);
    let Some(first) = runs.first() else {
        return table;
    };
    for flow in &first.traffic {
        let mut row = vec![Cell::new(&flow.name)];
        for run in runs {
            match run.traffic.iter().find(|other| other.name == flow.name) {
                Some(flow) => row.extend(flow_cells(flow)),
                None => row.extend((0..4).map(|_| Cell::new(""))),
            }
        }
        table.add_row(row);
    }
    table
}

fn flow_cells(flow: &Flow) -> [Cell; 4] {
    let mark = if flow.clock == Some(Clock::Guest) {
        "*"
    } else {
        " "
    };
    let broken = if flow.corrupted > 0 || !flow.errors.is_empty() {
        "!"
    } else {
        ""
    };
    [
        right(flow.sent),
        right(format!(
            "{broken}{} / {} / {}",
            flow.lost, flow.duplicated, flow.reordered
        )),
        right(format!("{:.0}{mark}", flow.stall_ms_max)),
        right(flow.retransmits),
    ]
}
