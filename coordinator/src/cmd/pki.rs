//! `gangway pki`.

use gangway_shared::pki::Role;

use crate::cli::Pki;
use crate::exit::Failure;
use crate::pki::{init, issue, revoke};

pub fn exec(command: Pki) -> Result<(), Failure> {
    let files = match command {
        Pki::Init { dir } => init(&dir)?,
        Pki::Issue {
            dir,
            name,
            host,
            coordinator: _,
            address,
        } => {
            let role = if host { Role::Host } else { Role::Coordinator };
            issue(&dir, &name, role, &address)?
        }
        Pki::Revoke { dir, name } => revoke(&dir, &name)?,
    };
    for f in files {
        anstream::println!("{}", f.display());
    }
    Ok(())
}
