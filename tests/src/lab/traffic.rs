//! Runs the group's traffic and judges it: joins what the ends of each flow report.
//!
//! Invariant: a verdict is made of counts from both ends, read after the senders have stopped and the network is quiet.

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::process::{ChildStdin, ChildStdout};
use std::thread;
use std::time::{Duration, Instant};

use super::Lab;
use super::group::{Group, VmSpec};
use super::net::Netns;
use super::process::{Process, command_in, run};
use crate::workload::report::{Clock, End, Ends};
use crate::workload::wire::CONTROL_PORT;

/// How long the network may stay without progress before what is missing counts as lost.
const QUIET: Duration = Duration::from_secs(2);

/// What became of a flow.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Flow {
    /// For example `udp producer->middle`.
    pub name: String,
    /// Frames, messages or requests that were sent.
    pub sent: u64,
    /// How many per second that was.
    pub sent_per_s: f64,
    /// Different ones of them that arrived; for echoes and requests: that came back.
    pub received: u64,
    /// The difference.
    pub lost: u64,
    /// Arrived once more.
    pub duplicated: u64,
    /// Arrived after a later one.
    pub reordered: u64,
    /// The first of these, as ranges; and the highest number that was there before.
    pub late: Vec<(u64, u64, u64)>,
    /// Arrived with other bytes than were sent.
    pub corrupted: u64,
    /// The longest silence at the receiver.
    pub stall_ms_max: f64,
    /// On whose clock; a guest's stands still while it is paused.
    pub clock: Option<Clock>,
    /// TCP segments sent again, by both ends.
    pub retransmits: u64,
    /// Digest of a stream at its source.
    pub digest_source: Option<String>,
    /// Digest of a stream at its end.
    pub digest_target: Option<String>,
    /// The first ranges of numbers that did not arrive.
    pub missing: Vec<(u64, u64)>,
    /// What the ends say went wrong.
    pub errors: Vec<String>,
}

impl Flow {
    fn join(name: &str, ends: &[&End]) -> Self {
        let mut flow = Self {
            name: name.to_owned(),
            ..Self::default()
        };
        for end in ends {
            flow.sent += end.sent.unwrap_or(0);
            flow.retransmits += end.retransmits;
            flow.errors.extend(end.error.clone());
            if let Some(received) = end.received {
                flow.received += received;
                flow.duplicated += end.duplicated;
                flow.reordered += end.reordered;
                flow.late = end.late.clone();
                flow.corrupted += end.corrupted;
                flow.stall_ms_max = end.stall_ms_max.unwrap_or(0.0);
                flow.clock = end.clock;
                flow.digest_target = end.digest.clone();
                flow.missing = end.missing.clone();
            } else if end.sent.is_some() {
                flow.digest_source = end.digest.clone();
            }
        }
        flow.lost = flow.sent.saturating_sub(flow.received);
        flow
    }

    /// The VM whose sockets take the flow's datagrams, or send them back; none for streams.
    pub fn receiver(&self) -> Option<&str> {
        let name = self.name.as_str();
        let chain = || name.strip_prefix("udp ")?.split_once("->");
        name.strip_prefix("outside udp echo ")
            .or_else(|| chain().map(|(_, to)| to))
    }

    /// Takes from what did not arrive what its receiver's own kernel says that it has dropped at its sockets, and that from what it says.
    /// Returns how many that were.
    pub fn excuse(&mut self, no_room: &mut BTreeMap<String, u64>) -> u64 {
        let Some(dropped) = self.receiver().and_then(|vm| no_room.get_mut(vm)) else {
            return 0;
        };
        let n = self.lost.min(*dropped);
        *dropped -= n;
        self.lost -= n;
        n
    }

    /// Nothing lost, duplicated, reordered, altered or broken, and something was sent at all.
    pub fn is_clean(&self) -> bool {
        self.sent > 0
            && self.received == self.sent
            && self.duplicated + self.reordered + self.corrupted == 0
            && self.errors.is_empty()
            && self.digest_source == self.digest_target
    }
}

/// The traffic of a group, under way.
pub struct Traffic {
    group: Group,
    out: Netns,
    workload: std::path::PathBuf,
    commands: ChildStdin,
    answers: BufReader<ChildStdout>,
    began: Instant,
    /// See [`QUIET`].
    quiet: Duration,
    _outside: Process,
}

impl Traffic {
    /// Starts the clients outside, which wait for orders.
    pub fn new(lab: &Lab, group: &Group) -> Result<Self> {
        let mut command = command_in(&lab.net.out, &lab.image.workload);
        command.arg("outside");
        for vm in &group.vms {
            command.args(["--vm", &format!("{}={}", vm.name, vm.address)]);
        }
        if let Some(last) = group.vms.last() {
            command.args(["--sink-of", &last.name]);
        }
        command.args(["--echo-rate", &group.echo_rate.to_string()]);
        command.args(["--request-rate", &group.request_rate.to_string()]);
        let (outside, commands, answers) = Process::start_piped("the outside client", command)?;
        Ok(Self {
            group: group.clone(),
            out: lab.net.out.clone(),
            workload: lab.image.workload.clone(),
            commands,
            answers: BufReader::new(answers),
            began: Instant::now(),
            quiet: QUIET,
            _outside: outside,
        })
    }

    fn outside(&mut self, command: &str) -> Result<String> {
        writeln!(self.commands, "{command}").context("the outside client is gone")?;
        let mut answer = String::new();
        self.answers.read_line(&mut answer)?;
        checked("the outside client", &answer)
    }

    fn guest(&self, vm: &VmSpec, command: &str) -> Result<String> {
        let address = format!("{}:{CONTROL_PORT}", vm.address);
        let output = run(command_in(&self.out, &self.workload).args(["ask", &address, command]))
            .with_context(|| format!("{command} to {}", vm.name))?;
        checked(&vm.name, &String::from_utf8_lossy(&output.stdout))
    }

    /// Makes sure that each VM is reached from outside.
    pub fn ping(&self) -> Result<()> {
        self.group
            .vms
            .iter()
            .try_for_each(|vm| self.guest(vm, "ping").map(drop))
    }

    /// Sends a command to one VM, whatever else is going on.
    pub fn tell(&self, vm: &str, command: &str) -> Result<String> {
        let spec = self.group.vms.iter().find(|spec| spec.name == vm);
        self.guest(spec.with_context(|| format!("no VM {vm}"))?, command)
    }

    /// Lets a VM's shell run a script of one line that is over within seconds, and returns what it says. It may be run again
    /// when its answer is late.
    pub fn shell(&self, vm: &str, script: &str) -> Result<String> {
        #[derive(Deserialize)]
        struct Said {
            status: Option<i32>,
            said: String,
        }
        let answer = self.tell(vm, &format!("sh {script}"))?;
        let Said { status, said } =
            serde_json::from_str(&answer).with_context(|| answer.clone())?;
        if status != Some(0) {
            bail!("{vm}: {script:?} ends with {status:?}: {said}");
        }
        Ok(said)
    }

    /// Datagrams that each VM's kernel has dropped at its sockets, since it has booted: for want of room or memory.
    pub fn no_room(&self) -> Result<BTreeMap<String, u64>> {
        let mut all = BTreeMap::new();
        for vm in &self.group.vms {
            let told: serde_json::Value = serde_json::from_str(&self.guest(vm, "kernel")?)?;
            let text = told["/proc/net/snmp"].as_str().unwrap_or_default();
            let dropped = dropped(text).with_context(|| format!("{}: {told}", vm.name))?;
            all.insert(vm.name.clone(), dropped);
        }
        Ok(all)
    }

    /// What the kernels of the VMs and of the outside client say of their own drops: for the message of a failed test.
    pub fn kernels(&self) -> String {
        let mut told = Vec::new();
        for vm in &self.group.vms {
            let kernel = self.guest(vm, "kernel");
            told.push(format!("{}: {kernel:?}", vm.name));
        }
        let snmp = run(command_in(&self.out, "cat").arg("/proc/net/snmp"));
        let snmp = snmp.map(|o| String::from_utf8_lossy(&o.stdout).into_owned());
        let snmp = snmp.unwrap_or_default();
        told.extend(
            snmp.lines()
                .filter(|l| l.starts_with("Udp:"))
                .map(|l| format!("outside: {l}")),
        );
        told.join("\n")
    }

    /// A VM that is dead is not asked any more; its flows are judged by the other end alone.
    pub fn forget(&mut self, vm: &str) {
        self.group.vms.retain(|spec| spec.name != vm);
        self.be_patient();
    }

    /// VMs do not hear of each other for long: who sends sits in its own kernel until that has asked three times in vain where the other one
    /// is, and reads nothing meanwhile.
    pub fn be_patient(&mut self) {
        self.quiet = QUIET + Duration::from_secs(5);
    }

    /// Starts all flows, or starts them again after [`Traffic::stop`]; their counts go on.
    pub fn start(&mut self) -> Result<()> {
        self.ping()?;
        self.began = Instant::now();
        for at in 0..self.group.vms.len() {
            self.guest(&self.group.vms[at], "start")?;
        }
        self.outside("start").map(drop)
    }

    /// Every end's report.
    pub fn ends(&mut self) -> Result<Vec<End>> {
        let mut answers = vec![self.outside("report")?];
        for vm in &self.group.vms {
            answers.push(self.guest(vm, "report")?);
        }
        let mut ends = Vec::new();
        for answer in answers {
            let all: Ends =
                serde_json::from_str(&answer).with_context(|| format!("a report: {answer}"))?;
            ends.extend(all.ends);
        }
        Ok(ends)
    }

    /// Stops the senders, waits until what is on its way has arrived, and judges.
    pub fn stop(&mut self) -> Result<Vec<Flow>> {
        let outside_s = self.began.elapsed().as_secs_f64();
        self.outside("stop")?;
        let chain_s = self.began.elapsed().as_secs_f64();
        for at in 0..self.group.vms.len() {
            self.guest(&self.group.vms[at], "stop")?;
        }
        let mut flows = self.judge()?;
        let (mut arrived, mut since) = (received(&flows), Instant::now());
        while flows.iter().any(|flow| flow.lost > 0) && since.elapsed() < self.quiet {
            thread::sleep(Duration::from_millis(100));
            flows = self.judge()?;
            if received(&flows) != arrived {
                (arrived, since) = (received(&flows), Instant::now());
            }
        }
        for flow in &mut flows {
            let seconds = if flow.name.starts_with("outside ") {
                outside_s
            } else {
                chain_s
            };
            flow.sent_per_s = (10.0 * flow.sent as f64 / seconds).round() / 10.0;
        }
        Ok(flows)
    }

    /// All flows as their ends see them now.
    pub fn judge(&mut self) -> Result<Vec<Flow>> {
        let ends = self.ends()?;
        Ok(join(&self.group, &ends))
    }
}

/// Of `/proc/net/snmp`, a line of names and one of numbers with a slash between: `RcvbufErrors` and `MemErrors`.
fn dropped(snmp: &str) -> Option<u64> {
    let (names, numbers) = snmp.split_once(" / ")?;
    let of = |name: &str| {
        let at = names.split_whitespace().position(|n| n == name)?;
        numbers.split_whitespace().nth(at)?.parse::<u64>().ok()
    };
    Some(of("RcvbufErrors")? + of("MemErrors")?)
}

fn received(flows: &[Flow]) -> u64 {
    flows.iter().map(|flow| flow.received).sum()
}

fn checked(who: &str, answer: &str) -> Result<String> {
    let answer = answer.trim();
    if answer.is_empty() || answer.starts_with("{\"error\"") {
        bail!("{who} answers {answer:?}");
    }
    Ok(answer.to_owned())
}

/// Joins the ends by name, and adds the chain's stream from its first VM to its last.
pub fn join(group: &Group, ends: &[End]) -> Vec<Flow> {
    let mut by_name: BTreeMap<&str, Vec<&End>> = BTreeMap::new();
    for end in ends {
        by_name.entry(&end.flow).or_default().push(end);
    }
    let mut flows: Vec<Flow> = by_name
        .iter()
        .map(|(name, ends)| Flow::join(name, ends))
        .collect();
    if let (Some(first), Some(last)) = (group.vms.first(), group.vms.last())
        && group.vms.len() > 2
    {
        let (out, into) = (
            format!("tcp {}->{}", first.name, first.next.0),
            last.prev.as_deref().unwrap_or(""),
        );
        let into = format!("tcp {into}->{}", last.name);
        let source = ends
            .iter()
            .find(|end| end.flow == out && end.sent.is_some());
        let target = ends
            .iter()
            .find(|end| end.flow == into && end.received.is_some());
        if let (Some(source), Some(target)) = (source, target) {
            flows.push(Flow::join(
                &format!("tcp {}->{}", first.name, last.name),
                &[source, target],
            ));
        }
    }
    flows
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end(flow: &str, sent: Option<u64>, received: Option<u64>) -> End {
        End {
            flow: flow.to_owned(),
            sent,
            received,
            digest: Some("d".to_owned()),
            ..End::default()
        }
    }

    #[test]
    fn a_kernels_own_drops_are_read() {
        let told = "Udp: InDatagrams NoPorts InErrors RcvbufErrors SndbufErrors MemErrors / Udp: 9 0 3914 1516 0 2398";
        assert_eq!(dropped(told), Some(3914));
        assert_eq!(dropped("Udp: InDatagrams / Udp: 9"), None);
        assert_eq!(dropped(""), None);
    }

    #[test]
    fn a_kernel_excuses_what_was_for_its_own_vm_only() {
        let lossy = |name: &str| Flow {
            name: name.to_owned(),
            lost: 10,
            ..Flow::default()
        };
        let mut no_room = [("b", 15), ("c", 0)]
            .map(|(vm, n)| (vm.to_owned(), n))
            .into();
        let mut lost = |name| {
            let mut flow = lossy(name);
            let n = flow.excuse(&mut no_room);
            assert_eq!(flow.lost + n, 10);
            flow.lost
        };
        assert_eq!(lost("udp b->c"), 10, "b had no room, c had");
        assert_eq!(lost("tcp a->b"), 10);
        assert_eq!(lost("udp a->b"), 0);
        assert_eq!(lost("outside udp echo b"), 5);
        assert_eq!(lost("udp a->b"), 10, "each only once");
    }

    #[test]
    fn what_was_sent_and_did_not_arrive_is_lost_also_at_the_tail() {
        let ends = [
            end("tcp producer->middle", Some(100), None),
            end("tcp producer->middle", None, Some(99)),
            end("tcp middle->consumer", Some(99), None),
            end("tcp middle->consumer", None, Some(97)),
        ];
        let flows = join(&Group::default(), &ends);
        let lost = |name: &str| flows.iter().find(|flow| flow.name == name).unwrap().lost;
        assert_eq!(lost("tcp producer->middle"), 1);
        assert_eq!(lost("tcp middle->consumer"), 2);
        assert_eq!(lost("tcp producer->consumer"), 3);
        assert!(flows.iter().all(|flow| !flow.is_clean()));
    }

    #[test]
    fn a_flow_that_never_sent_is_not_clean() {
        let ends = [
            end("udp a->b", Some(0), None),
            end("udp a->b", None, Some(0)),
        ];
        assert!(!join(&Group::default(), &ends)[0].is_clean());
    }
}
