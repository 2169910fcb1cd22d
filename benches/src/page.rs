//! The document of all measurements: each program's table, at the place that is marked for it.
//!
//! ```text
//! <!-- bench: NAME -->
//! what is in NAME.md: when, which build, where, by which command; the table
//! <!-- bench: end -->
//! ```
//!
//! What stands between the places is people's, and stays.

use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;
use time::OffsetDateTime;
use time::macros::format_description;

use crate::report::table;

const BEGIN: &str = "<!-- bench: ";
const CLOSE: &str = " -->";
const END: &str = "<!-- bench: end -->";

/// The page with new tables at their places; places without a new table stay as they are.
///
/// # Errors
/// A place that does not end.
pub fn fill(page: &str, mut table: impl FnMut(&str) -> Result<Option<String>>) -> Result<String> {
    let mut out = String::new();
    let mut rest = page;
    while let Some(at) = rest.find(BEGIN) {
        let (before, place) = rest.split_at(at);
        let inside = place[BEGIN.len()..].split_once(CLOSE);
        let (name, body) = inside.context("a mark that does not end")?;
        let Some((old, after)) = body.split_once(END) else {
            bail!("the place of '{name}' does not end: {END} is missing");
        };
        let new = table(name)?.map(|t| format!("\n{}\n", t.trim_end()));
        let body = new.as_deref().unwrap_or(old);
        write!(out, "{before}{BEGIN}{name}{CLOSE}{body}{END}")?;
        rest = after;
    }
    Ok(out + rest)
}

/// When, which build, where and by which command the calling program measures: a line of Markdown.
pub fn origin() -> String {
    let format = format_description!("[year]-[month]-[day] [hour]:[minute] UTC");
    let when = OffsetDateTime::now_utc().format(format).unwrap_or_default();
    let git = Command::new("git")
        .args(["describe", "--always", "--dirty"])
        .output();
    let git = git.ok().filter(|o| o.status.success());
    let build = git.map_or_else(
        || env!("CARGO_PKG_VERSION").to_owned(),
        |o| String::from_utf8_lossy(&o.stdout).trim().to_owned(),
    );
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    let field = |text: &str, key: &str| {
        let line = text.lines().find(|l| l.starts_with(key));
        let value = line.and_then(|l| l.split_once(':'));
        value.map(|(_, v)| v.trim().to_owned()).unwrap_or_default()
    };
    let cpus = read("/proc/cpuinfo");
    let memory = field(&read("/proc/meminfo"), "MemTotal");
    let memory = memory.trim_end_matches(" kB").parse::<u64>();
    let mut args = std::env::args();
    let program = args.next().unwrap_or_default();
    let program = Path::new(&program).file_name().unwrap_or_default();
    let command: Vec<String> = std::iter::once(program.to_string_lossy().into_owned())
        .chain(args)
        .collect();
    format!(
        "{when}, build {build}, {} (family {}, model {}), {} CPUs, {} GiB, Linux {}: `{}`",
        field(&cpus, "model name"),
        field(&cpus, "cpu family"),
        field(&cpus, "model\t"),
        cpus.lines().filter(|l| l.starts_with("processor")).count(),
        memory.map_or(0, |kb| kb.div_ceil(1 << 20)),
        read("/proc/sys/kernel/osrelease").trim(),
        command.join(" "),
    )
}

/// What criterion has left of the micro benchmarks: nanoseconds for each element.
pub fn micro(dir: &Path) -> Result<Option<String>> {
    let mut rows = Vec::new();
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        let entries = std::fs::read_dir(&folder).into_iter().flatten().flatten();
        folders.extend(entries.map(|e| e.path()).filter(|p| p.is_dir()));
        let of = folder.join("benchmark.json");
        if folder.file_name().is_none_or(|n| n != "new") || !of.exists() {
            continue;
        }
        let json = |path: &Path| -> Result<Value> {
            let text = std::fs::read_to_string(path);
            let text = text.with_context(|| path.display().to_string())?;
            serde_json::from_str(&text).with_context(|| path.display().to_string())
        };
        let (of, mean) = (json(&of)?, json(&folder.join("estimates.json"))?);
        let elements = of["throughput"]["Elements"].as_f64().unwrap_or(1.0);
        let ns = |v: &Value| {
            v.as_f64()
                .map_or("?".into(), |ns| format!("{:.1}", ns / elements))
        };
        let bounds = &mean["mean"]["confidence_interval"];
        rows.push([
            of["full_id"].as_str().unwrap_or("?").to_owned(),
            ns(&mean["mean"]["point_estimate"]),
            format!(
                "{} to {}",
                ns(&bounds["lower_bound"]),
                ns(&bounds["upper_bound"])
            ),
        ]);
    }
    rows.sort();
    Ok((!rows.is_empty()).then(|| table(["stage", "ns, mean", "95 %"], rows)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: &str = "# M\nwords\n<!-- bench: pvp -->\nold\n<!-- bench: end -->\nmore\n\
                        <!-- bench: hold -->\nkept\n<!-- bench: end -->\n";

    fn new(name: &str) -> Result<Option<String>> {
        Ok((name == "pvp").then(|| "| a |\n|---|\n".to_owned()))
    }

    #[test]
    fn a_table_goes_to_its_place_and_nothing_else_changes() {
        let filled = fill(PAGE, new).expect("filled");
        assert_eq!(filled, PAGE.replace("\nold\n", "\n| a |\n|---|\n"));
        assert_eq!(fill(&filled, new).expect("again"), filled);
        assert_eq!(fill("no place\n", new).expect("nothing"), "no place\n");
    }

    #[test]
    fn a_place_that_does_not_end_is_named() {
        for page in [&PAGE[..50], "<!-- bench: pvp -->\nold\n", "<!-- bench: pvp"] {
            let e = fill(page, new).expect_err("no end").to_string();
            assert!(e.contains("does not end"), "{e}");
        }
    }

    #[test]
    fn the_micro_benchmarks_are_told_by_element() {
        let dir = std::env::temp_dir().join(format!("gangway-page-{}", std::process::id()));
        assert_eq!(micro(&dir).expect("nothing"), None);
        let new = dir.join("ring/take/new");
        std::fs::create_dir_all(&new).expect("a folder");
        let of = r#"{"full_id":"ring/take","throughput":{"Elements":32}}"#;
        std::fs::write(new.join("benchmark.json"), of).expect("written");
        let mean = r#"{"mean":{"point_estimate":64.0,"confidence_interval":{"lower_bound":32.0,"upper_bound":96.0}}}"#;
        std::fs::write(new.join("estimates.json"), mean).expect("written");
        let text = micro(&dir).expect("a table").expect("a row");
        std::fs::remove_dir_all(&dir).expect("removed");
        assert!(text.contains("| ring/take | 2.0 | 1.0 to 3.0 |"), "{text}");
    }

    #[test]
    fn where_it_was_measured_is_on_one_line() {
        let line = origin();
        assert!(
            line.contains(" UTC, build ") && line.contains("Linux "),
            "{line}"
        );
        assert!(!line.contains('\n'));
    }
}
