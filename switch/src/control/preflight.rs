//! What the host must offer before the ports can be opened. Found out first, said in one line each.

use std::path::Path;

use gangway_shared::config::HostConfig;
use gangway_shared::config::valid::PortKind;
use rustix::thread::CapabilitySet;

/// The character device that TAPs are made through.
const TUN: &str = "/dev/net/tun";

/// What is missing for the ports of `cfg`; empty if nothing is.
pub fn missing(cfg: &HostConfig) -> Vec<String> {
    let has = rustix::thread::capabilities(None).map_or(CapabilitySet::empty(), |c| c.effective);
    let port = |wanted: fn(&PortKind) -> bool| {
        let found = cfg.ports.iter().find(|p| wanted(&p.kind));
        found.map(|p| p.name.as_str())
    };
    let tap = port(|k| matches!(k, PortKind::Tap { .. }));
    let device = port(|k| matches!(k, PortKind::Tap { .. } | PortKind::Uplink { .. }));
    let mut out = Vec::new();
    if let Some(port) = device
        && !has.contains(CapabilitySet::NET_ADMIN | CapabilitySet::NET_RAW)
    {
        out.push(format!(
            "port '{port}' needs root (or CAP_NET_ADMIN and CAP_NET_RAW); start the switch as root or as its systemd unit"
        ));
    }
    if let Some(port) = tap
        && !Path::new(TUN).exists()
    {
        out.push(format!(
            "port '{port}' needs {TUN}, which this host lacks; load it with `modprobe tun`, or give the container the device"
        ));
    }
    out
}
