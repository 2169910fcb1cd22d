//! The choreography with real QEMUs (and a fake switch): slow, needs root, the lab's guest image, and a quiet machine.
//!
//! `cargo test -p gangway --test qemu -- --ignored --nocapture`; `GANGWAY_LAB_IMAGE` names the folder of `vmlinux` and
//! `initramfs.cpio` (default: target/lab), `RUNS` how often the group moves.

mod fake;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use fake::{FakeSwitch, FakeVm, Incoming};
use serde_json::Value;

const VMS: [(&str, u32); 3] = [("producer", 5), ("middle", 5), ("consumer", 5)];

struct Source(Child);

impl Drop for Source {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn line(image: &Path, name: &str, dirty_mb: u32, qmp: &Path, log: &Path, incoming: bool) -> String {
    // No multiple of 64 pages: see tests/src/lab/qemu.rs, `memory_kb`.
    let kb = 128 * 1024 + 8;
    format!(
        "qemu-system-x86_64 -name {name} -accel tcg,thread=multi -cpu qemu64 -smp 1 -m {kb}k \
         -object memory-backend-memfd,id=m0,size={kb}k,share=on -machine pc,memory-backend=m0 -nodefaults \
         -no-user-config -display none -kernel {i}/vmlinux -initrd {i}/initramfs.cpio \
         -append 'console=ttyS0 quiet tsc=reliable no_timer_check panic=1 gw.name={name} gw.addr=10.78.0.11/24 gw.dirty_mb={dirty_mb}' \
         -serial file:{log} -qmp unix:{qmp},server=on,wait=off -device virtio-rng-pci{inc}",
        i = image.display(),
        log = log.display(),
        qmp = qmp.display(),
        inc = if incoming { " -incoming defer -S" } else { "" },
    )
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "real QEMUs"]
async fn a_real_group_moves() {
    let image = std::env::var_os("GANGWAY_LAB_IMAGE").map_or_else(
        || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../target/lab")),
        PathBuf::from,
    );
    let runs: u32 = std::env::var("RUNS")
        .ok()
        .and_then(|r| r.parse().ok())
        .unwrap_or(1);
    let extra = std::env::var("MIGRATE_ARGS").unwrap_or_default();
    for run in 0..runs {
        let dir = tempfile::tempdir().expect("tempdir");
        let d = dir.path();
        let mut sources = Vec::new();
        let mut vms = [Vec::new(), Vec::new()];
        for (name, dirty) in VMS {
            for (i, host) in ["a", "b"].iter().enumerate() {
                let qmp = d.join(format!("{host}-{name}.qmp"));
                let command = line(
                    &image,
                    name,
                    dirty,
                    &qmp,
                    &d.join(format!("{host}-{name}.log")),
                    i == 1,
                );
                if i == 0 {
                    let child = Command::new("sh")
                        .arg("-c")
                        .arg(format!("exec {command}"))
                        .spawn()
                        .expect("qemu");
                    sources.push(Source(child));
                }
                let incoming = if i == 0 {
                    Incoming::Never
                } else {
                    Incoming::Command(command)
                };
                vms[i].push(FakeVm {
                    name: name.to_owned(),
                    qmp,
                    incoming,
                });
            }
        }
        tokio::time::sleep(Duration::from_secs(6)).await;
        let link = |a: &str, b: &str, n| (a.to_owned(), b.to_owned(), n);
        let [on_a, on_b] = vms;
        let links = vec![
            link("producer", "middle", 1000),
            link("middle", "consumer", 900),
        ];
        let _a = FakeSwitch::start("a", &d.join("a.sock"), on_a, links);
        let b = FakeSwitch::start("b", &d.join("b.sock"), on_b, Vec::new());
        let hosts = "[[host]]\nname = \"a\"\nsocket = \"a.sock\"\naddress = \"127.0.0.1:1\"\n\
                     [[host]]\nname = \"b\"\nsocket = \"b.sock\"\naddress = \"127.0.0.1:2\"\n";
        std::fs::write(d.join("hosts.toml"), hosts).expect("hosts");
        let out = tokio::process::Command::new(env!("CARGO_BIN_EXE_gangway"))
            .args(
                "migrate producer,middle,consumer --to b -o json"
                    .split(' ')
                    .chain(extra.split_whitespace()),
            )
            .env("GANGWAY_HOSTS", d.join("hosts.toml"))
            .env("GANGWAY_STATE", d.join("state"))
            .stdout(Stdio::piped())
            .spawn()
            .expect("spawn")
            .wait_with_output()
            .await
            .expect("run");
        let r: Value = serde_json::from_slice(&out.stdout).unwrap_or_default();
        println!(
            "run {run}: {} blackout {} ms, early {}",
            r["outcome"], r["blackout_ms"], r["stopped_early"]
        );
        for v in r["vms"].as_array().into_iter().flatten() {
            println!(
                "  {} pause {} left {} precopy {} passes {} qemu {}",
                v["name"],
                v["pause_ms"],
                v["left_bytes"],
                v["precopy_bytes"],
                v["passes"],
                v["downtime_qemu_ms"]
            );
        }
        for s in r["steps"].as_array().into_iter().flatten() {
            print!("  {} {}", s["step"], s["ms"]);
        }
        println!();
        for (name, _) in VMS {
            b.stop_child(name);
        }
        assert!(out.status.success(), "run {run}: {:?}", out.status);
    }
}
