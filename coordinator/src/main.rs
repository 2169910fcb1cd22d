//! `gangway`: see `gangway --help`.

use std::process::ExitCode;

fn main() -> ExitCode {
    gangway::cmd::main()
}
