//! The file as it is written: tables, keys, values and the lines that they stand on.
//!
//! A [`Section`] is asked for its keys one by one. What was never asked for is unknown, and the keys that were asked for
//! are the known ones: there is no second list of them.
//!
//! Invariant: a value of the wrong type is noted once and then counts as absent; nothing here stops at the first error.

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::Problem;

/// A value and its line.
#[derive(Debug, Clone, PartialEq)]
pub struct At<T> {
    /// From 1.
    pub line: usize,
    /// What stands there.
    pub value: T,
}

/// The file's name, its line starts, and what was found to be wrong with it.
pub struct Notes {
    file: String,
    line_starts: Vec<usize>,
    problems: Vec<Problem>,
}

impl Notes {
    /// For `text`.
    pub fn new(text: &str, file: &str) -> Notes {
        let newlines = text.bytes().enumerate().filter(|(_, b)| *b == b'\n');
        Notes {
            file: file.to_owned(),
            line_starts: std::iter::once(0)
                .chain(newlines.map(|(i, _)| i + 1))
                .collect(),
            problems: Vec::new(),
        }
    }

    /// The line of a byte of the text.
    fn line(&self, byte: usize) -> usize {
        self.line_starts.partition_point(|start| *start <= byte)
    }

    /// Notes a problem.
    pub fn add(&mut self, line: usize, key: impl Into<String>, what: impl Into<String>) {
        let what: String = what.into();
        self.problems.push(Problem {
            file: self.file.clone(),
            line,
            key: key.into(),
            // The text may quote the file: keep each problem on its own line.
            what: what.replace(['\n', '\r'], " "),
        });
    }

    /// True if nothing is wrong so far.
    pub fn is_clean(&self) -> bool {
        self.problems.is_empty()
    }

    /// All problems in the order of their lines.
    pub fn into_problems(mut self) -> Vec<Problem> {
        self.problems.sort_by_key(|p| p.line);
        self.problems
    }
}

/// Parses TOML; the problems of a text that is none are noted.
pub fn document<'t>(text: &'t str, notes: &mut Notes) -> Option<Spanned<DeTable<'t>>> {
    let (table, errors) = DeTable::parse_recoverable(text);
    for e in &errors {
        let byte = e.span().map_or(0, |s| s.start);
        let line = notes.line(byte);
        notes.add(line, "", format!("not TOML: {}", e.message()));
    }
    errors.is_empty().then_some(table)
}

/// A table of the file, or one that is absent.
pub struct Section<'d> {
    /// `port`, or empty for the whole file.
    path: String,
    line: usize,
    entries: Vec<Entry<'d>>,
    asked: Vec<&'static str>,
}

struct Entry<'d> {
    key: &'d str,
    line: usize,
    value: &'d DeValue<'d>,
}

impl<'d> Section<'d> {
    /// The whole file.
    pub fn root(table: &'d Spanned<DeTable<'d>>, notes: &Notes) -> Section<'d> {
        Section::new(String::new(), 1, table.get_ref(), notes)
    }

    fn new(path: String, line: usize, table: &'d DeTable<'d>, notes: &Notes) -> Section<'d> {
        let entries = table.iter().map(|(key, value)| Entry {
            key: key.get_ref(),
            line: notes.line(key.span().start),
            value: value.get_ref(),
        });
        Section {
            path,
            line,
            entries: entries.collect(),
            asked: Vec::new(),
        }
    }

    /// Where the table begins.
    pub fn line(&self) -> usize {
        self.line
    }

    /// `key` with the table before it.
    pub fn key(&self, key: &str) -> String {
        if self.path.is_empty() {
            key.to_owned()
        } else {
            format!("{}.{key}", self.path)
        }
    }

    /// True if the file has the key; counts as asking for it.
    pub fn has(&mut self, key: &'static str) -> bool {
        self.take(key).is_some()
    }

    fn take(&mut self, key: &'static str) -> Option<(usize, &'d DeValue<'d>)> {
        if !self.asked.contains(&key) {
            self.asked.push(key);
        }
        let entry = self.entries.iter().find(|e| e.key == key)?;
        Some((entry.line, entry.value))
    }

    fn wrong_type(&self, notes: &mut Notes, line: usize, key: &str, want: &str, got: &DeValue<'_>) {
        let what = format!("must be {want}, not {}", type_name(got));
        notes.add(line, self.key(key), what);
    }

    /// A table that may be absent.
    pub fn table(&mut self, notes: &mut Notes, key: &'static str) -> Section<'d> {
        let path = self.key(key);
        match self.take(key) {
            Some((line, DeValue::Table(t))) => Section::new(path, line, t, notes),
            other => {
                if let Some((line, got)) = other {
                    self.wrong_type(notes, line, key, &format!("a table, [{path}]"), got);
                }
                Section {
                    path,
                    line: 1,
                    entries: Vec::new(),
                    asked: Vec::new(),
                }
            }
        }
    }

    /// An array of tables.
    pub fn tables(&mut self, notes: &mut Notes, key: &'static str) -> Vec<Section<'d>> {
        let path = self.key(key);
        let want = format!("an array of tables, [[{path}]]");
        let Some((line, value)) = self.take(key) else {
            return Vec::new();
        };
        let DeValue::Array(array) = value else {
            self.wrong_type(notes, line, key, &want, value);
            return Vec::new();
        };
        let mut out = Vec::new();
        for item in array.iter() {
            let line = notes.line(item.span().start);
            match item.get_ref() {
                DeValue::Table(t) => out.push(Section::new(path.clone(), line, t, notes)),
                got => self.wrong_type(notes, line, key, &want, got),
            }
        }
        out
    }

    /// A string.
    pub fn string(&mut self, notes: &mut Notes, key: &'static str) -> Option<At<String>> {
        let (line, value) = self.take(key)?;
        let DeValue::String(s) = value else {
            self.wrong_type(notes, line, key, "a string in quotes", value);
            return None;
        };
        let value = s.to_string();
        Some(At { line, value })
    }

    /// A string that must be there.
    pub fn required(
        &mut self,
        notes: &mut Notes,
        key: &'static str,
        hint: &str,
    ) -> Option<At<String>> {
        if !self.has(key) {
            let what = format!("missing; {hint}");
            notes.add(self.line, self.key(key), what);
        }
        self.string(notes, key)
    }

    /// An integer between `min` and `max`.
    pub fn integer(
        &mut self,
        notes: &mut Notes,
        key: &'static str,
        min: u64,
        max: u64,
    ) -> Option<At<u64>> {
        let (line, value) = self.take(key)?;
        let DeValue::Integer(i) = value else {
            self.wrong_type(notes, line, key, "an integer", value);
            return None;
        };
        match u64::from_str_radix(i.as_str(), i.radix()) {
            Ok(value) if (min..=max).contains(&value) => Some(At { line, value }),
            _ => {
                notes.add(
                    line,
                    self.key(key),
                    format!("{i} is out of range; {min} to {max} are allowed"),
                );
                None
            }
        }
    }

    /// An array of strings.
    pub fn strings(&mut self, notes: &mut Notes, key: &'static str) -> Option<At<Vec<String>>> {
        self.list(notes, key, "an array of strings", |v| match v {
            DeValue::String(s) => Some(s.to_string()),
            _ => None,
        })
    }

    /// An array of integers from 0.
    pub fn integers(&mut self, notes: &mut Notes, key: &'static str) -> Option<At<Vec<u64>>> {
        self.list(notes, key, "an array of integers from 0", |v| match v {
            DeValue::Integer(i) => u64::from_str_radix(i.as_str(), i.radix()).ok(),
            _ => None,
        })
    }

    fn list<T>(
        &mut self,
        notes: &mut Notes,
        key: &'static str,
        want: &str,
        item: impl Fn(&DeValue<'_>) -> Option<T>,
    ) -> Option<At<Vec<T>>> {
        let (line, value) = self.take(key)?;
        let DeValue::Array(array) = value else {
            self.wrong_type(notes, line, key, want, value);
            return None;
        };
        let all: Option<Vec<T>> = array.iter().map(|v| item(v.get_ref())).collect();
        if all.is_none() {
            notes.add(
                line,
                self.key(key),
                format!("must be {want}; one of its items is not"),
            );
        }
        Some(At { line, value: all? })
    }

    /// Notes every key that was not asked for.
    pub fn finish(self, notes: &mut Notes) {
        for e in self.entries.iter().filter(|e| !self.asked.contains(&e.key)) {
            let nearest = nearest(e.key, &self.asked).map_or_else(
                || format!("known here: {}", self.asked.join(", ")),
                |n| format!("did you mean '{n}'?"),
            );
            let kind = match e.value {
                DeValue::Table(_) => "table",
                _ => "key",
            };
            let key = self.key(&e.key.escape_debug().to_string());
            notes.add(e.line, key, format!("unknown {kind}; {nearest}"));
        }
    }
}

/// The candidate that `word` was probably meant to be.
pub fn nearest<'c, S: AsRef<str>>(word: &str, candidates: &'c [S]) -> Option<&'c str> {
    candidates
        .iter()
        .map(|c| (strsim::damerau_levenshtein(word, c.as_ref()), c.as_ref()))
        .min()
        .filter(|(distance, c)| *distance <= 1 + c.len() / 4)
        .map(|(_, c)| c)
}

fn type_name(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "a string",
        DeValue::Integer(_) => "an integer",
        DeValue::Float(_) => "a float",
        DeValue::Boolean(_) => "a boolean",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "an array",
        DeValue::Table(_) => "a table",
    }
}
