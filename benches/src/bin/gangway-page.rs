//! `gangway-page`: puts the tables of the measurements into the document.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Parser;
use gangway_benches::page;

/// Puts what the benchmark programs have left into the places that are marked for it in a document.
#[derive(Debug, Parser)]
struct Args {
    /// Where the programs' tables are.
    #[arg(long, default_value = "target/bench")]
    from: PathBuf,
    /// Where criterion's results are.
    #[arg(long, default_value = "target/criterion")]
    criterion: PathBuf,
    /// The document.
    #[arg(long, default_value = "docs/benchmarks.md")]
    page: PathBuf,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let name = |path: &Path| path.display().to_string();
    let old = std::fs::read_to_string(&args.page).with_context(|| name(&args.page))?;
    let new = page::fill(&old, |of| {
        if of == "micro" {
            return page::micro(&args.criterion);
        }
        let path = args.from.join(format!("{of}.md"));
        if !path.exists() {
            eprintln!("{}: not there; the old table stays", name(&path));
            return Ok(None);
        }
        std::fs::read_to_string(&path)
            .map(Some)
            .with_context(|| name(&path))
    })
    .with_context(|| name(&args.page))?;
    if new != old {
        std::fs::write(&args.page, new).with_context(|| name(&args.page))?;
    }
    Ok(())
}
