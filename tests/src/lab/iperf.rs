//! iperf3 between guests (of a group with tools), and between a guest and the outside.

use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::time::Duration;

use super::process::until;
use super::traffic::Traffic;

/// What a client of iperf3 saw.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Throughput {
    /// Bytes that the other end took.
    pub bytes: u64,
    /// The same per second, in bits.
    pub bits_per_s: f64,
    /// Segments sent again.
    pub retransmits: u64,
    /// Of UDP: datagrams that were lost.
    pub lost: u64,
}

impl Throughput {
    /// Of what `iperf3 --json` prints.
    pub fn parse(text: &str) -> Result<Self> {
        let json: Value = serde_json::from_str(text).with_context(|| text.to_owned())?;
        if let Some(error) = json["error"].as_str() {
            bail!("iperf3: {error}");
        }
        let end = &json["end"];
        // Of UDP there is one sum.
        let received = match &end["sum_received"] {
            Value::Null => &end["sum"],
            sum => sum,
        };
        let bytes = received["bytes"].as_u64().context("end.sum.bytes")?;
        Ok(Self {
            bytes,
            bits_per_s: received["bits_per_second"].as_f64().unwrap_or(0.0),
            retransmits: end["sum_sent"]["retransmits"].as_u64().unwrap_or(0),
            lost: end["sum"]["lost_packets"].as_u64().unwrap_or(0),
        })
    }
}

/// Starts a server in a guest, for as many clients as come.
pub fn serve(traffic: &Traffic, vm: &str) -> Result<()> {
    let script = "pidof iperf3 >/dev/null || iperf3 -s -D --logfile /tmp/iperf3-server.log";
    traffic.shell(vm, script).map(drop)
}

/// Starts a client in a guest: `iperf3 -c` with these arguments.
pub fn start(traffic: &Traffic, vm: &str, args: &str) -> Result<()> {
    let script = format!(
        "rm -f /tmp/iperf3.done; (iperf3 -J -i 0 -c {args} >/tmp/iperf3.json 2>&1; touch /tmp/iperf3.done) \
         </dev/null >/dev/null 2>&1 &"
    );
    traffic.shell(vm, &script).map(drop)
}

/// Waits for the end of [`start`]'s client.
pub fn finish(traffic: &Traffic, vm: &str, patience: Duration) -> Result<Throughput> {
    until(&format!("end of iperf3 in {vm}"), patience, || {
        let script = "[ -e /tmp/iperf3.done ] && cat /tmp/iperf3.json || true";
        let text = traffic.shell(vm, script)?;
        Ok((!text.is_empty()).then_some(text))
    })
    .and_then(|text| Throughput::parse(&text).with_context(|| format!("iperf3 in {vm}")))
}

/// Both, for a client of some seconds.
pub fn run(traffic: &Traffic, vm: &str, args: &str) -> Result<Throughput> {
    start(traffic, vm, args)?;
    finish(traffic, vm, Duration::from_secs(40))
}
