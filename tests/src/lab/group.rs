//! The group: three VMs in a chain, each with its place and its rates.

use super::net::OUTSIDE;

/// A VM of the group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmSpec {
    /// Its name.
    pub name: String,
    /// Its address on the fabric.
    pub address: String,
    /// Its MAC address.
    pub mac: String,
    /// Who sends to it.
    pub prev: Option<String>,
    /// Whom it sends to: name and address.
    pub next: (String, String),
    /// Further properties of its network card, as QEMU has them: `guest_csum=off`.
    pub nic: String,
}

/// What the group does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// From the least dependent VM, which sends, to the most dependent one, which receives.
    pub vms: Vec<VmSpec>,
    /// Datagrams per second that the producer sends.
    pub udp_rate: u32,
    /// Messages per second in the chain's stream.
    pub tcp_rate: u32,
    /// Datagrams per second to each VM's echo.
    pub echo_rate: u32,
    /// Requests per second to each VM.
    pub request_rate: u32,
    /// Megabytes per second that change in each VM.
    pub dirty_mb: u32,
    /// Megabytes of memory per VM.
    pub memory_mb: u32,
    /// Queue pairs of each VM, and its processors.
    pub queues: u16,
    /// Workers of each switch.
    pub workers: u16,
    /// The guests have iperf3 and ethtool.
    pub tools: bool,
}

impl Default for Group {
    fn default() -> Self {
        Self::chain(&["producer", "middle", "consumer"])
    }
}

impl Group {
    /// A chain of the given VMs, the last of which sends to the outside.
    pub fn chain(names: &[&str]) -> Self {
        let address = |at: usize| format!("10.78.0.{}", 11 + at);
        let vms = names.iter().enumerate().map(|(at, name)| VmSpec {
            name: name.to_string(),
            address: address(at),
            mac: format!("52:54:00:67:77:{:02x}", 11 + at),
            prev: at.checked_sub(1).map(|prev| names[prev].to_owned()),
            next: match names.get(at + 1) {
                Some(next) => (next.to_string(), address(at + 1)),
                None => ("outside".to_owned(), OUTSIDE.to_owned()),
            },
            nic: String::new(),
        });
        Self {
            vms: vms.collect(),
            // Nominal: a pause and a busy machine cost some; at least 1,000 and 500 are asked for.
            udp_rate: 1110,
            tcp_rate: 100,
            echo_rate: 560,
            request_rate: 50,
            dirty_mb: 5,
            memory_mb: 128,
            queues: 1,
            workers: 1,
            tools: false,
        }
    }

    /// The same with memory for what was held for long and comes at once, or for what is sent to a VM that has died: kernels of
    /// 128 MB have died of it.
    pub fn roomy() -> Self {
        Self {
            memory_mb: 192,
            ..Self::default()
        }
    }

    /// The names in dependency order.
    pub fn order(&self) -> Vec<String> {
        self.vms.iter().map(|vm| vm.name.clone()).collect()
    }

    /// What the guest's kernel is told.
    pub fn cmdline(&self, vm: &VmSpec) -> String {
        // What the last one sends outside only shows the chain's silence on the host's clock.
        let hop = self.vms.iter().any(|other| other.name == vm.next.0);
        let udp_rate = if hop {
            self.udp_rate
        } else {
            self.udp_rate / 10
        };
        let mut line = format!(
            "console=ttyS0 quiet tsc=reliable no_timer_check panic=1 mitigations=off apparmor=0 gw.name={} gw.addr={}/24 gw.next={}@{} \
             gw.udp_rate={} gw.tcp_rate={} gw.dirty_mb={}",
            vm.name, vm.address, vm.next.0, vm.next.1, udp_rate, self.tcp_rate, self.dirty_mb
        );
        if let Some(prev) = &vm.prev {
            line += &format!(" gw.prev={prev}");
        }
        line
    }
}
