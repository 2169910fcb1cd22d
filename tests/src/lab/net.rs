//! The run's networks.
//!
//! ```text
//!   out .100 ---+                         mgmt .10 (the coordinator)
//!               |                            |
//!             [fab] fabric 10.78.0.0/24   [mgmt] 10.77.0.0/24, 1 Gbit/s
//!              |  |                         |  |
//!        a/up0-+  +-b/up0          a/mgmt0 .1  b/mgmt0 .2
//! ```

use anyhow::Result;
use std::process::Command;
use std::sync::Arc;

use super::cleanup::NetnsGuard;
use super::process::{command_in, run};

/// Host A on the management link.
pub const MGMT_A: &str = "10.77.0.1";
/// Host B on the management link.
pub const MGMT_B: &str = "10.77.0.2";
/// The coordinator on the management link.
pub const MGMT_COORDINATOR: &str = "10.77.0.10";
/// The outside client on the fabric.
pub const OUTSIDE: &str = "10.78.0.100";
/// The management link's rate.
pub const MGMT_RATE: &str = "1gbit";

/// A network namespace of this run; the last clone removes it.
#[derive(Clone, Debug)]
pub struct Netns {
    name: String,
    _guard: Arc<NetnsGuard>,
}

impl Netns {
    /// Makes a namespace.
    pub fn new(name: &str) -> Result<Self> {
        // The guard first: a namespace that is half made goes, too.
        let guard = Arc::new(NetnsGuard::new(name));
        run(Command::new("ip").args(["netns", "add", name]))?;
        let netns = Self {
            name: name.to_owned(),
            _guard: guard,
        };
        // No IPv6: what it sends by itself would only blur the counts.
        netns.write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1")?;
        netns.write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1")?;
        netns.ip("link set lo up")?;
        Ok(netns)
    }

    /// Its name, as `ip netns` lists it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs `ip` in it.
    pub fn ip(&self, args: &str) -> Result<()> {
        run(Command::new("ip")
            .args(["-n", &self.name])
            .args(args.split_whitespace()))
        .map(drop)
    }

    /// Runs a program in it.
    pub fn run(&self, line: &str) -> Result<String> {
        let mut words = line.split_whitespace();
        let output = run(command_in(self, words.next().unwrap_or("true")).args(words))?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn write(&self, path: &str, value: &str) -> Result<()> {
        let script = format!("[ ! -e {path} ] || echo {value} > {path}");
        run(command_in(self, "sh").args(["-c", &script])).map(drop)
    }

    /// A bridge that forwards at once and only what it is given.
    pub fn bridge(&self, name: &str) -> Result<()> {
        self.ip(&format!(
            "link add dev {name} type bridge stp_state 0 forward_delay 0 mcast_snooping 0"
        ))?;
        self.ip(&format!("link set dev {name} up"))
    }

    /// Puts a device on a bridge.
    pub fn enslave(&self, device: &str, bridge: &str) -> Result<()> {
        self.ip(&format!("link set dev {device} master {bridge}"))?;
        self.ip(&format!("link set dev {device} up"))
    }

    /// A virtual cable from a device of ours to one of `peer`.
    pub fn cable(&self, device: &str, peer: &Netns, peer_device: &str) -> Result<()> {
        self.ip(&format!(
            "link add dev {device} type veth peer name {peer_device} netns {}",
            peer.name
        ))?;
        self.ip(&format!("link set dev {device} up"))?;
        peer.ip(&format!("link set dev {peer_device} up"))
    }

    /// Makes a device send whole frames with their checksums, as they look on a wire.
    pub fn no_offloads(&self, device: &str) -> Result<()> {
        self.run(&format!("ethtool -K {device} tx off tso off gso off"))
            .map(drop)
    }
}

/// All namespaces of a run.
#[derive(Debug)]
pub struct Net {
    /// Host A, with `mgmt0` and `up0`.
    pub a: Netns,
    /// Host B, likewise.
    pub b: Netns,
    /// The outside client.
    pub out: Netns,
    /// Where the coordinator runs.
    pub mgmt: Netns,
    /// The fabric's bridge.
    pub fab: Netns,
}

impl Net {
    /// Makes namespaces named after the run, and everything between them.
    pub fn new(run: &str) -> Result<Self> {
        let make = |part: &str| Netns::new(&format!("{run}-{part}"));
        let net = Self {
            a: make("a")?,
            b: make("b")?,
            out: make("out")?,
            mgmt: make("mgmt")?,
            fab: make("fab")?,
        };
        net.mgmt.bridge("br0")?;
        net.mgmt
            .ip(&format!("addr add {MGMT_COORDINATOR}/24 dev br0"))?;
        net.fab.bridge("br0")?;
        for (host, name, address) in [(&net.a, "a", MGMT_A), (&net.b, "b", MGMT_B)] {
            host.cable("mgmt0", &net.mgmt, name)?;
            net.mgmt.enslave(name, "br0")?;
            host.ip(&format!("addr add {address}/24 dev mgmt0"))?;
            host.run(&format!(
                "tc qdisc add dev mgmt0 root tbf rate {MGMT_RATE} burst 256kb latency 50ms"
            ))?;
            host.cable("up0", &net.fab, name)?;
            net.fab.enslave(name, "br0")?;
        }
        net.out.cable("eth0", &net.fab, "out")?;
        net.fab.enslave("out", "br0")?;
        net.out.ip(&format!("addr add {OUTSIDE}/24 dev eth0"))?;
        net.out.no_offloads("eth0")?;
        // As in the guests, see `workload::guest`.
        net.out
            .write("/proc/sys/net/ipv4/neigh/eth0/ucast_solicit", "120")?;
        Ok(net)
    }
}
