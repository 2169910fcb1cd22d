//! The files that people write.

use std::path::Path;

use gangway::hosts::Hosts;
use gangway_shared::config::HostConfig;

/// A host's configuration, and a coordinator's list of hosts.
pub fn run(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    if let Err(e) = HostConfig::parse(text, "host.toml") {
        assert!(!e.problems().is_empty());
        let lines = text.matches('\n').count() + 1;
        for p in e.problems() {
            assert!((1..=lines).contains(&p.line), "{p}");
            assert!(!p.what.is_empty() && !p.to_string().contains('\n'), "{p}");
        }
    }
    if let Err(e) = Hosts::parse(Path::new("/etc/hosts.toml"), text) {
        assert!(e.to_string().contains("hosts.toml:"), "{e}");
    }
}
