//! How the command ends: one clear line for a person and one code for a script.

use std::fmt;

/// The exit code; the table is printed by `gangway --help`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Code {
    /// Done; for a migration: moved, and both ends agree.
    Ok = 0,
    /// Failed; what that means for the VMs is in the message.
    Failed = 1,
    /// Bad arguments, files or names. Nothing was changed.
    Usage = 2,
    /// The migration was undone: all VMs run on the source and nothing was lost.
    RolledBack = 3,
    /// A host, switch or VMM could not be reached. Nothing was changed.
    Unreachable = 4,
    /// A switch, or another migration, does not allow it now. Nothing was changed.
    Refused = 5,
    /// Past the point of no return and not finished: `gangway abort ID` goes on with it.
    Unfinished = 6,
    /// The group has moved, but for a VM that died on the target; its stopped copy on the source is kept.
    Lost = 7,
}

/// The same, for `--help`.
pub const HELP: &str = "Exit codes:
  0  done
  1  failed
  2  bad arguments, files or names; nothing was changed
  3  rolled back: all VMs run on the source, nothing was lost
  4  a host, switch or VMM could not be reached; nothing was changed
  5  refused: a switch or another migration does not allow it now; nothing was changed
  6  past the point of no return and not finished: `gangway abort ID` goes on with it
  7  moved, but for a VM that died on the target; its stopped copy on the source is kept";

/// An error that ends a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// For the shell.
    pub code: Code,
    /// One line: what, where, whose fault, what to do.
    pub message: String,
}

impl Failure {
    /// Bad input.
    pub fn usage(message: impl Into<String>) -> Failure {
        Failure::new(Code::Usage, message)
    }

    /// Broken.
    pub fn failed(message: impl Into<String>) -> Failure {
        Failure::new(Code::Failed, message)
    }

    /// Not now.
    pub fn refused(message: impl Into<String>) -> Failure {
        Failure::new(Code::Refused, message)
    }

    /// Any code; newlines and control characters in the message are replaced.
    pub fn new(code: Code, message: impl Into<String>) -> Failure {
        let message: String = message
            .into()
            .chars()
            .map(|c| if c.is_control() { ' ' } else { c })
            .collect();
        Failure { code, message }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

impl From<crate::client::ClientError> for Failure {
    fn from(e: crate::client::ClientError) -> Failure {
        let code = match &e {
            crate::client::ClientError::Refused { .. }
            | crate::client::ClientError::Denied { .. } => Code::Refused,
            crate::client::ClientError::Settings(_) => Code::Usage,
            _ => Code::Unreachable,
        };
        Failure::new(code, e.to_string())
    }
}
