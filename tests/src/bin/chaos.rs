//! `gangway-chaos`: every fault at every step of a migration, on the lab with real VMs.

use anyhow::Result;
use clap::Parser;
use gangway_tests::chaos::book::Book;
use gangway_tests::chaos::run::{Row, Stage};
use gangway_tests::chaos::{Case, Fault, Wish, cases};
use gangway_tests::lab::demo::Ports;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

/// Breaks something at a step of a migration, does what a user would do, and judges the traffic
#[derive(Parser)]
struct Args {
    /// A step, a fault or both ("seal kill-source-switch", "seal:before fail"); may be repeated. None: all
    #[arg(long = "case", value_name = "CASE")]
    cases: Vec<String>,
    /// Leave out cases of which there is a green row already, judged by the rule as it is now
    #[arg(long)]
    missing: bool,
    /// How VMs are attached. Results of TAPs go beside the others (OUT/tap) and into no page
    #[arg(long, value_enum, default_value = "vhost-user")]
    ports: Ports,
    /// Begin no further case after so many seconds
    #[arg(long, value_name = "S")]
    within_s: Option<u64>,
    /// Where results.json and the logs of red rows go
    #[arg(long, default_value = "target/chaos")]
    out: PathBuf,
    /// The page that gets the table, as soon as results.json has all cases
    #[arg(long, value_name = "FILE")]
    page: Option<PathBuf>,
    /// Only write the page from results.json
    #[arg(long)]
    write: bool,
}

fn main() -> ExitCode {
    let mut args = Args::parse();
    if args.ports == Ports::Tap {
        args.out.push("tap");
        args.page = None;
    }
    if !rustix::process::geteuid().is_root() {
        eprintln!("gangway-chaos: run as root: the lab makes network namespaces");
        return ExitCode::from(2);
    }
    match run(&args) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("gangway-chaos: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// Whether every row that was run is green.
fn run(args: &Args) -> Result<bool> {
    let began = Instant::now();
    let file = args.out.join("results.json");
    std::fs::create_dir_all(&args.out)?;
    let mut book = Book::load(&file)?;
    if args.write {
        args.page
            .iter()
            .try_for_each(|page| book.write_into(page))?;
        return Ok(true);
    }
    let wishes: Vec<Wish> = args
        .cases
        .iter()
        .filter(|text| !text.trim().is_empty())
        .map(|text| text.parse())
        .collect::<Result<_>>()?;
    let mut stage = Some(Stage::with(None, &args.out, args.ports, "")?);
    if let Some(stage) = &stage {
        book.steps = stage.steps()?;
    }
    let steps = book.steps.clone();
    let mut cases = cases(&wishes, &steps)?;
    cases.retain(|case| {
        let green = |r: &Row| r.case == *case && r.counts() && r.wrong.is_empty();
        !(args.missing && book.rows.iter().any(green))
    });
    // Those that share a world one behind the other.
    cases.sort_by_key(|case| matches!(case.fault, Fault::SourceDiskFull | Fault::TargetDiskFull));
    let mut all_green = true;
    for case in &cases {
        if args
            .within_s
            .is_some_and(|s| began.elapsed().as_secs() >= s)
        {
            println!("time is up");
            break;
        }
        let row = twice_if_a_guest_crashed(&mut stage, case, &steps, args)?;
        say(&row);
        all_green &= row.wrong.is_empty();
        book.put(row);
        book.save(&file)?;
        if book.is_whole() {
            args.page
                .iter()
                .try_for_each(|page| book.write_into(page))?;
        }
    }
    println!("{}", file.display());
    Ok(all_green)
}

/// A guest's kernel that crashes by itself says nothing about us (docs/benchmarks.md): once more then.
fn twice_if_a_guest_crashed(
    stage: &mut Option<Stage>,
    case: &Case,
    steps: &[String],
    args: &Args,
) -> Result<Row> {
    for again in [true, false] {
        let mut used = match stage.take().filter(|s| s.suits(case)) {
            Some(used) => used,
            None => Stage::with(Some(case), &args.out, args.ports, "")?,
        };
        let row = used.run(case, steps);
        let good = row.as_ref().is_ok_and(Row::leaves_all_as_it_was);
        let crashed = used.crashed();
        if good {
            *stage = Some(used);
        } else if again && !crashed.is_empty() {
            println!(
                "{case}: a guest has crashed: {}; once more",
                crashed.join("; ")
            );
            continue;
        }
        return row;
    }
    anyhow::bail!("{case}: not run")
}

fn say(row: &Row) {
    let t = &row.traffic;
    let word = if row.wrong.is_empty() { "ok " } else { "RED" };
    println!(
        "{word} {:<36} {:?} exit {:?} [{}] {:.1} s; sent {} lost {} twice {} late {} unheard {}{}",
        row.name,
        row.ending,
        row.exit,
        row.user.join(", "),
        row.took_s,
        t.sent,
        t.lost,
        t.duplicated,
        t.reordered,
        t.unheard,
        row.outage_ms.map_or(String::new(), |ms| format!(
            "; no switch for {ms} ms, silence {:.0} ms",
            row.silence_ms
        )),
    );
    for wrong in &row.wrong {
        println!("      {wrong}");
    }
    if !row.wrong.is_empty() {
        for trouble in &row.troubles {
            println!("      (noted: {trouble})");
        }
    }
}
