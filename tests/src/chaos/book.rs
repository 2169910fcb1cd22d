//! Keeps what came of each case, and writes it into docs/reliability.md between two marks.

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use std::fmt::Write as _;
use std::path::Path;

use super::rule::Ending;

use super::run::{FREED, Row};
use super::{Case, Fault};

const BEGIN: &str = "<!-- chaos: begin -->";
const END: &str = "<!-- chaos: end -->";

/// `results.json`: the last row of every case.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Book {
    /// The product's steps.
    pub steps: Vec<String>,
    /// One for each case that was run.
    pub rows: Vec<Row>,
}

impl Book {
    /// What earlier runs have left.
    pub fn load(path: &Path) -> Result<Book> {
        match std::fs::read(path) {
            Ok(text) => serde_json::from_slice(&text).with_context(|| path.display().to_string()),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Book::default()),
            Err(e) => Err(e).with_context(|| path.display().to_string()),
        }
    }

    /// Replaces the case's row.
    pub fn put(&mut self, row: Row) {
        self.rows.retain(|r| r.case != row.case);
        self.rows.push(row);
        self.rows.sort_by_key(|row| {
            let step = self.steps.iter().position(|s| *s == row.case.step);
            (step, !row.case.before, row.case.fault)
        });
    }

    /// Writes it beside, and puts it in place.
    pub fn save(&self, path: &Path) -> Result<()> {
        let beside = path.with_extension("new");
        std::fs::write(&beside, serde_json::to_vec_pretty(self)?)
            .and_then(|()| std::fs::rename(&beside, path))
            .with_context(|| path.display().to_string())
    }

    /// Rows by the rule as it is now.
    fn counted(&self) -> impl Iterator<Item = &Row> {
        self.rows.iter().filter(|r| r.counts())
    }

    /// No case is missing. Cases that were never run, or judged by an older rule, or no steps known at all: a page of them would be worse than the one that there is.
    pub fn is_whole(&self) -> bool {
        let has = |step: &String| {
            Fault::ALL
                .into_iter()
                .all(|f| !f.can_hit(step, &self.steps) || self.row(step, f).is_some())
        };
        !self.steps.is_empty() && self.steps.iter().all(has)
    }

    /// Replaces what is between the marks of a page, if every case was run.
    pub fn write_into(&self, page: &Path) -> Result<()> {
        if !self.is_whole() {
            let rows = self.counted().count();
            let older = match self.rows.len() - rows {
                0 => String::new(),
                n => format!(", {n} more were judged by an older rule"),
            };
            bail!(
                "{} keeps its table: only {rows} cases were run here{older}; `make chaos` runs all",
                page.display()
            );
        }
        let text = std::fs::read_to_string(page).with_context(|| page.display().to_string())?;
        let parts = text
            .split_once(BEGIN)
            .and_then(|(head, rest)| Some((head, rest.split_once(END)?.1)));
        let (head, tail) =
            parts.with_context(|| format!("{}: no {BEGIN} ... {END}", page.display()))?;
        let new = format!("{head}{BEGIN}\n{}{END}{tail}", self.markdown());
        std::fs::write(page, new).with_context(|| page.display().to_string())
    }

    fn row(&self, step: &str, fault: Fault) -> Option<&Row> {
        let case = Case {
            step: step.to_owned(),
            before: false,
            fault,
        };
        self.counted().find(|r| r.case == case)
    }

    /// Steps by faults, then totals, then the red rows one by one.
    pub fn markdown(&self) -> String {
        let mut out = String::from("| `CASE=` |");
        for fault in Fault::ALL {
            let _ = write!(out, " {} |", fault.name());
        }
        let _ = writeln!(out, "\n|---|{}", "---|".repeat(Fault::ALL.len()));
        for step in &self.steps {
            let _ = write!(out, "| `\"{step}\"` |");
            for fault in Fault::ALL {
                let cell = match self.row(step, fault) {
                    _ if !fault.can_hit(step, &self.steps) => "-".to_owned(),
                    row => row.map(cell).unwrap_or_default(),
                };
                let _ = write!(out, " {cell} |");
            }
            out.push('\n');
        }
        let red: Vec<&Row> = self.counted().filter(|r| !r.wrong.is_empty()).collect();
        let sum = |of: fn(&Row) -> u64| self.counted().map(of).sum::<u64>();
        let rows = self.counted().count();
        let _ = writeln!(
            out,
            "\n{} cases, {} green, {} red. Frames, messages and requests that were judged: {}. Lost: {}, twice: {}, out of order: {}, \
             damaged: {}; received by a switch that was killed, and not forwarded: {}; dropped by guests' own kernels: {}.",
            rows,
            rows - red.len(),
            red.len(),
            sum(|r| r.traffic.sent),
            sum(|r| r.traffic.lost),
            sum(|r| r.traffic.duplicated),
            sum(|r| r.traffic.reordered),
            sum(|r| r.traffic.corrupted),
            sum(|r| r.traffic.unheard),
            sum(|r| r.traffic.no_room),
        );
        if !red.is_empty() {
            out.push_str("\n| red row | what is against the rule |\n|---|---|\n");
        }
        for row in red {
            let text = row.wrong.join("; ").replace('|', "/").replace('\n', " ");
            let _ = writeln!(out, "| `make chaos CASE=\"{}\"` | {text} |", row.name);
        }
        out
    }
}

fn cell(row: &Row) -> String {
    let ending = match row.ending {
        Ending::Moved => "moved",
        Ending::RolledBack => "back",
        Ending::Open => "open",
    };
    let freed = row.user.iter().any(|what| what == FREED);
    let user = match row.user.len() - usize::from(freed) {
        0 if freed => " (disk freed)".to_owned(),
        0 => String::new(),
        n => format!(" ({n} abort)"),
    };
    let full = match row.missed_room {
        Some(false) => " (room not missed)",
        _ => "",
    };
    let red = match row.wrong.is_empty() {
        true => String::new(),
        false => format!("**RED** {} lost, ", row.traffic.lost),
    };
    format!("{red}{ending}{user}{full}")
}

#[cfg(test)]
mod tests {
    use super::super::rule::{Sum, VERSION};
    use super::*;

    fn row(step: &str, fault: Fault, wrong: &[&str]) -> Row {
        let case = Case {
            step: step.to_owned(),
            before: false,
            fault,
        };
        Row {
            name: case.to_string(),
            case,
            ending: Ending::RolledBack,
            exit: Some(3),
            user: Vec::new(),
            troubles: Vec::new(),
            traffic: Sum {
                sent: 10,
                ..Sum::default()
            },
            outage_ms: None,
            missed_room: None,
            silence_ms: 0.0,
            took_s: 1.0,
            wrong: wrong.iter().map(|w| w.to_string()).collect(),
            at_s: 0,
            rule: VERSION,
        }
    }

    #[test]
    fn a_page_gets_the_table_between_its_marks_and_keeps_the_rest() {
        let dir = tempfile::tempdir().unwrap();
        let page = dir.path().join("page.md");
        let mut book = Book {
            steps: vec!["start".to_owned(), "stop".to_owned()],
            rows: Vec::new(),
        };
        std::fs::write(&page, "no marks").unwrap();
        assert!(book.write_into(&page).is_err());
        std::fs::write(&page, format!("head\n{BEGIN}\nold\n{END}\ntail\n")).unwrap();
        let steps = book.steps.clone();
        for step in &steps {
            let all = Fault::ALL.into_iter();
            for fault in all.filter(|f| f.can_hit(step, &steps)) {
                // One at a time, as on a fresh clone.
                assert!(book.write_into(&page).is_err());
                assert!(std::fs::read_to_string(&page).unwrap().contains("old"));
                let mut row = row(step, fault, &[]);
                row.missed_room = Some(fault != Fault::SourceDiskFull);
                book.put(row);
            }
        }
        book.put(row("stop", Fault::Fail, &["a | b"]));
        book.write_into(&page).unwrap();
        let text = std::fs::read_to_string(&page).unwrap();
        assert!(
            text.starts_with("head\n") && text.ends_with("\ntail\n"),
            "{text}"
        );
        assert!(!text.contains("old"), "{text}");
        assert!(text.contains("18 cases, 17 green, 1 red"), "{text}");
        assert_eq!(text.matches("back (room not missed)").count(), 2, "{text}");
        assert!(
            text.contains("`make chaos CASE=\"stop fail\"` | a / b |"),
            "{text}"
        );
        let before = text;
        book.write_into(&page).unwrap();
        assert_eq!(before, std::fs::read_to_string(&page).unwrap());
    }

    #[test]
    fn a_row_of_an_older_rule_counts_as_missing() {
        let dir = tempfile::tempdir().unwrap();
        let (page, file) = (dir.path().join("page.md"), dir.path().join("results.json"));
        std::fs::write(&page, format!("{BEGIN}\nold\n{END}\n")).unwrap();
        let steps = vec!["stop".to_owned()];
        let mut book = Book {
            steps: steps.clone(),
            rows: Vec::new(),
        };
        for fault in Fault::ALL.into_iter().filter(|f| f.can_hit("stop", &steps)) {
            book.put(row("stop", fault, &[]));
        }
        assert!(book.is_whole());
        // As files have it that were written before rows said so.
        let mut json = serde_json::to_value(&book).unwrap();
        let first = json["rows"][0].as_object_mut().unwrap();
        first.remove("rule");
        first.insert("wrong".to_owned(), serde_json::json!(["of old"]));
        std::fs::write(&file, json.to_string()).unwrap();
        let mut book = Book::load(&file).unwrap();
        assert_eq!(book.rows[0].rule, 0);
        assert!(!book.rows[0].counts() && !book.is_whole());
        let told = book.write_into(&page).unwrap_err().to_string();
        let rest = book.rows.len() - 1;
        assert!(
            told.contains(&format!("only {rest} cases")) && told.contains("1 more"),
            "{told}"
        );
        assert!(std::fs::read_to_string(&page).unwrap().contains("old"));
        let text = book.markdown();
        assert!(
            text.contains(&format!("{rest} cases, {rest} green, 0 red")) && text.contains("|  |"),
            "{text}"
        );
        // Run again: whole again.
        let fault = book.rows[0].case.fault;
        book.put(row("stop", fault, &[]));
        book.write_into(&page).unwrap();
    }

    #[test]
    fn a_case_that_is_run_again_replaces_its_row() {
        let mut book = Book {
            steps: vec!["start".to_owned(), "stop".to_owned()],
            rows: Vec::new(),
        };
        book.put(row("stop", Fault::Fail, &["lost"]));
        book.put(row("start", Fault::KillCoordinator, &[]));
        book.put(row("stop", Fault::Fail, &[]));
        let names: Vec<&str> = book.rows.iter().map(|r| r.name.as_str()).collect();
        assert_eq!(names, ["start kill-coordinator", "stop fail"]);
        assert!(book.rows[1].wrong.is_empty());
    }
}
