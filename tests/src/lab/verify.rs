//! `gangway verify` behind a move: both hosts' records agree, and what it prints, as text, as JSON and as pcapng, says the same.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::path::Path;
use std::process::Command;

use super::gangway::Coordinator;
use super::process::run;

/// What the records of a migration say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verified {
    /// Lanes on which frames were held, or could have been.
    pub lanes: usize,
    /// Frames that were held.
    pub frames: u64,
    /// Bytes of them.
    pub bytes: u64,
}

/// Of the youngest migration, which came to `outcome` ("moved" or "put_back"): an error if it is not clean. Frames are exported
/// to a file in `dir` and read back by tcpdump.
pub fn verify(coordinator: &Coordinator, outcome: &str, dir: &Path) -> Result<Verified> {
    let json = coordinator.ask(&["verify", "-o", "json"])?;
    let verdict: Value = serde_json::from_str(&json).context("its JSON")?;
    let number = |key: &str| verdict[key].as_u64().with_context(|| key.to_owned());
    let lanes = verdict["lanes"].as_array().context("lanes")?;
    let found = Verified {
        lanes: lanes.len(),
        frames: number("frames")?,
        bytes: number("bytes")?,
    };
    ensure!(verdict["clean"] == true, "not clean: {json}");
    ensure!(verdict["outcome"] == outcome, "not {outcome}: {json}");
    let held: u64 = lanes.iter().filter_map(|l| l["frames"].as_u64()).sum();
    ensure!(held == found.frames, "{held} frames on its lanes: {json}");

    let text = coordinator.ask(&["verify"])?;
    let id = verdict["migration"].as_str().context("migration")?;
    let first = format!(
        "migration {id} ({outcome}): {} frames, {} bytes: clean",
        found.frames, found.bytes
    );
    ensure!(text.lines().next() == Some(&first), "not {first:?}: {text}");
    for lane in lanes {
        let name = lane["lane"].as_str().context("a lane's name")?;
        ensure!(text.contains(name), "{name} is not in {text}");
    }
    if found.frames > 0 {
        let exported = export(coordinator, &dir.join("held.pcapng"))?;
        ensure!(
            exported == found.frames,
            "tcpdump reads {exported} frames, {found:?}"
        );
    }
    Ok(found)
}

/// How many frames tcpdump finds in what is exported.
fn export(coordinator: &Coordinator, file: &Path) -> Result<u64> {
    coordinator.ask(&["verify", "--pcapng", &file.to_string_lossy()])?;
    // A line for each frame: no look at what is in them.
    let mut tcpdump = Command::new("tcpdump");
    tcpdump
        .args(["-Z", "root", "-n", "-t", "-q", "-r"])
        .arg(file);
    let said = run(&mut tcpdump)?;
    let lines = String::from_utf8_lossy(&said.stdout);
    Ok(lines
        .lines()
        .filter(|l| !l.starts_with(['\t', ' ']))
        .count() as u64)
}
