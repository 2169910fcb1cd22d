//! The host's configuration file: TOML as people write it, read with its lines ([`raw`]), checked (`check`) into what
//! the switch uses ([`valid`]).
//!
//! Invariant: every error names the file, the line, the key and what to do; an unknown key is an error.
//! Invariant: one run finds all errors that can be told apart, not only the first.

mod check;
pub mod raw;
pub mod valid;

#[cfg(test)]
mod tests;

use std::fmt;
use std::path::{Path, PathBuf};

pub use valid::{HostConfig, WORKERS_MAX};

/// The largest configuration file, in bytes.
pub const FILE_MAX: u64 = 1 << 20;

/// One thing that is wrong in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The file, as it was named.
    pub file: String,
    /// The line, from 1.
    pub line: usize,
    /// The key, with its table before it (`port.mac`); empty if the file is not TOML.
    pub key: String,
    /// What is wrong and what to do. One line.
    pub what: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: ", self.file, self.line)?;
        if !self.key.is_empty() {
            write!(f, "{}: ", self.key)?;
        }
        f.write_str(&self.what)
    }
}

/// The operator's configuration cannot be used. Its text has one line per problem.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file is missing, unreadable, too long or not UTF-8.
    #[error("{}: {reason}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What is wrong and what to do.
        reason: String,
    },
    /// What the file says cannot be.
    #[error("{}", lines(.0))]
    Invalid(Vec<Problem>),
}

impl ConfigError {
    /// The problems in the file; none if it could not be read.
    pub fn problems(&self) -> &[Problem] {
        match self {
            ConfigError::Read { .. } => &[],
            ConfigError::Invalid(problems) => problems,
        }
    }
}

fn lines(problems: &[Problem]) -> String {
    let lines: Vec<String> = problems.iter().map(Problem::to_string).collect();
    lines.join("\n")
}

impl HostConfig {
    /// Where the switch listens for the keeper, if there is one, for this port.
    pub fn kept_socket(&self, port: &str) -> Option<PathBuf> {
        let dir = self.keeper_dir.as_deref()?;
        Some(valid::kept_socket(dir, port))
    }

    /// Where the switch notes how far the rings of that port are: beside its socket, for as long as the keeper has the VM's connection.
    pub fn kept_positions(socket: &Path) -> PathBuf {
        socket.with_extension("positions")
    }

    /// Reads and checks the file.
    pub fn load(path: &Path) -> Result<HostConfig, ConfigError> {
        let failed = |reason: String| ConfigError::Read {
            path: path.to_owned(),
            reason,
        };
        let meta = std::fs::metadata(path)
            .map_err(|e| failed(format!("cannot read the configuration: {e}")))?;
        if !meta.is_file() || meta.len() > FILE_MAX {
            return Err(failed(format!(
                "not a configuration: it must be a file of at most {FILE_MAX} bytes"
            )));
        }
        let bytes = std::fs::read(path)
            .map_err(|e| failed(format!("cannot read the configuration: {e}")))?;
        let text = String::from_utf8(bytes).map_err(|e| {
            let at = e.utf8_error().valid_up_to();
            failed(format!(
                "not UTF-8 at byte {at}; the configuration is a TOML text file"
            ))
        })?;
        HostConfig::parse(&text, &path.display().to_string())
    }

    /// Checks `text`; `file` is only for messages.
    pub fn parse(text: &str, file: &str) -> Result<HostConfig, ConfigError> {
        check::host(text, file)
    }
}
