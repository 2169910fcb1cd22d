//! What goes wrong around a move, with real VMs: every refusal says what to do, and the group runs on where it was with
//! clean traffic.

use gangway_tests::lab::baseline::Phases;
use gangway_tests::lab::demo::{Freeze, Ports};
use gangway_tests::lab::gangway::Programs;
use gangway_tests::lab::group::Group;
use gangway_tests::lab::moved::{self, World};
use gangway_tests::lab::{CRASH, once_more_after_a_crash};

use gangway_tests::lab::process::{Process, run, until};
use gangway_tests::lab::traffic::Flow;
use serde_json::{Value, json};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(60);
const MIB: u64 = 1 << 20;

/// A command's exit code and all that it says.
#[derive(Debug)]
struct Said {
    code: Option<i32>,
    text: String,
}

impl Said {
    fn of(command: &mut Command) -> Self {
        let out = command.output().unwrap();
        let text = [out.stdout, out.stderr].concat();
        let said = Self {
            code: out.status.code(),
            text: String::from_utf8_lossy(&text).into_owned(),
        };
        let last = said.text.lines().last().unwrap_or_default();
        eprintln!("{:?} {}", said.code, last.get(..600).unwrap_or(last));
        assert!(!said.text.contains("panicked"), "{said:?}");
        said
    }

    /// It ended so, and names all that a person needs.
    fn is(&self, code: i32, words: &[&str]) {
        assert_eq!(self.code, Some(code), "{self:?}");
        for word in words {
            assert!(self.text.contains(word), "no {word:?} in {self:?}");
        }
    }
}

fn ask(world: &World, args: &[&str]) -> Said {
    Said::of(&mut world.coordinator.command(args))
}

fn migrate(world: &World) -> Said {
    Said::of(&mut world.coordinator.migrate(&world.group, Freeze::Switchover))
}

/// All run on A, none is on B, no hold is left, and what was held on A has been given back.
fn all_run_on_a(world: &mut World, when: &str) {
    for vm in &mut world.sources {
        let status = vm.qmp.execute("query-status", json!({})).unwrap();
        assert_eq!(status["status"], "running", "{} after {when}", vm.name);
    }
    let vms = shown(world, &["vm", "list", "b"]);
    for vm in vms.as_array().unwrap() {
        assert_eq!(vm["vm"]["status"], "absent", "{when}: {vm}");
    }
    for host in ["a", "b"] {
        // What was held flows back first.
        let mut last = Value::Null;
        until(
            &format!("end of the hold on {host}"),
            Duration::from_secs(20),
            || {
                let shown = shown(world, &["host", "show", host]);
                let mut holds = shown["holds"].as_array().unwrap().iter();
                let over = holds.all(|hold| hold["state"] == "aborted");
                let empty = shown["host"]["spool_used_bytes"] == 0;
                last = json!([shown["host"], shown["holds"]]);
                Ok((over && empty).then_some(()))
            },
        )
        .unwrap_or_else(|error| panic!("after {when}: {error}: {last}"));
    }
}

/// What a command that only looks has to say.
fn shown(world: &World, args: &[&str]) -> Value {
    let text = world.coordinator.ask(&[args, &["-o", "json"]].concat());
    serde_json::from_str(&text.unwrap()).unwrap()
}

fn is_clean(flows: &[Flow], when: &str) {
    assert!(!flows.is_empty());
    for flow in flows {
        assert!(flow.is_clean(), "{when}: {flow:#?}");
    }
}

/// A world whose logs are kept when what is done in it fails.
fn in_world(name: &str, group: &Group, act: impl Fn(&mut World)) {
    once_more_after_a_crash(|| in_world_once(name, group, &act));
}

fn in_world_once(name: &str, group: &Group, act: impl Fn(&mut World)) {
    let logs = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let mut world = World::new(group, Ports::VhostUser, &logs).unwrap();
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| act(&mut world))) {
        world.lab.keep_logs(&logs).unwrap();
        eprintln!("{}", world.drops());
        eprintln!("logs in {}", logs.display());
        let crashed = world.lab.crashed();
        assert!(crashed.is_empty(), "{CRASH}: {crashed:?}");
        resume_unwind(panic);
    }
}

/// A hosts file beside the lab's own with other credentials.
fn with_credentials(world: &World, name: &str, credentials: &str) -> Said {
    let dir = world.lab.dir();
    let own = std::fs::read_to_string(dir.join("hosts.toml")).unwrap();
    let (hosts, _) = own.split_once("[tls]").unwrap();
    let file = dir.join(name);
    std::fs::write(&file, format!("{hosts}[tls]\n{credentials}")).unwrap();
    let file = file.to_string_lossy().into_owned();
    ask(
        world,
        &[
            "--hosts",
            &file,
            "migrate",
            "producer,middle,consumer",
            "--to",
            "b",
        ],
    )
}

/// A small file system in a host's folder. The lab takes it away with the folder.
fn small_disk(world: &World, host: &str, name: &str, bytes: u64, filled: u64) -> PathBuf {
    let dir = world.lab.dir().join(host).join(name);
    std::fs::create_dir_all(&dir).unwrap();
    let size = format!("size={bytes}");
    run(Command::new("mount")
        .args(["-t", "tmpfs", "-o", &size, "gangway-lab"])
        .arg(&dir))
    .unwrap();
    if filled > 0 {
        let _ = std::fs::write(dir.join("junk"), vec![1; filled as usize]);
    }
    dir
}

#[test]
fn refused_moves_leave_the_group_where_it_is() {
    in_world("refused-moves", &Group::default(), |world| {
        let programs = Programs::find().unwrap();
        let (a, b) = (world.config(&world.lab.a), world.config(&world.lab.b));
        let tiny = |config: &str| {
            let spool = format!("[spool]\nquota_bytes = {MIB}\n");
            assert!(config.contains("[spool]\n"));
            config.replace("[spool]\n", &spool)
        };
        let spool_on = |config: &str, host: &str, dir: &Path| {
            let own = format!("{}/spool\"", world.lab.dir().join(host).display());
            assert!(config.contains(&own));
            config.replace(&own, &format!("{}\"", dir.display()))
        };
        // Made before any switch starts: one that runs does not see what is mounted later.
        let full = small_disk(world, "b", "full", 4 * MIB, 4 * MIB);
        let small = small_disk(world, "b", "small", 4 * MIB, 0);
        let small_a = small_disk(world, "a", "small", 4 * MIB, 0);
        let (b_full, b_small) = (spool_on(&b, "b", &full), spool_on(&b, "b", &small));
        let a_small = spool_on(&a, "a", &small_a);

        // The source's quota is too small for the group's lanes, as long as nothing else is wrong.
        world.restart_switch(true, &tiny(&a)).unwrap();
        world.traffic.start().unwrap();

        // Credentials of another authority; then of our own for an authority that is not ours.
        let pki = world.lab.dir().join("foreign");
        let foreign = pki.to_string_lossy().into_owned();
        for args in [
            vec!["init", &foreign],
            vec!["issue", &foreign, "admin", "--coordinator"],
        ] {
            Said::of(Command::new(&programs.gangway).arg("pki").args(args)).is(0, &[]);
        }
        let credentials = |ca: &str| {
            format!(
                "cert = \"foreign/admin.pem\"\nkey = \"foreign/admin.key\"\nca = \"{ca}/ca.pem\"\n"
            )
        };
        let said = with_credentials(world, "foreign.toml", &credentials("foreign"));
        said.is(
            4,
            &["invalid peer certificate", "same authority", "host 'a'"],
        );
        let said = with_credentials(world, "foreign-cert.toml", &credentials("pki"));
        said.is(2, &["foreign/admin.pem", "not issued by", "pki/ca.pem"]);
        all_run_on_a(world, "foreign credentials");

        // The source's spool.
        let said = migrate(world);
        said.is(
            3,
            &["rolled back", "switch of host 'a'", "spool.quota_bytes"],
        );
        all_run_on_a(world, "a small quota on the source");

        // The target lacks a port.
        let at = b.find("\n[[port]]\nname = \"consumer0\"").unwrap();
        world.restart_switch(false, &b[..at]).unwrap();
        let said = migrate(world);
        said.is(2, &["consumer0", "VM 'consumer'", "host 'b'", "add it"]);
        all_run_on_a(world, "a missing port");

        // The target's spool.
        for (config, words, what) in [
            (tiny(&b), "spool.quota_bytes", "a small quota"),
            (b_small, "/b/small/", "a small disk"),
            (b_full, "/b/full/", "a full disk"),
        ] {
            world.restart_switch(false, &config).unwrap();
            let said = migrate(world);
            said.is(3, &["rolled back", "switch of host 'b'", "no spool", words]);
            all_run_on_a(world, what);
        }
        is_clean(&world.traffic.stop().unwrap(), "refused moves");

        // The source's disk.
        world.restart_switch(false, &b).unwrap();
        world.restart_switch(true, &a_small).unwrap();
        world.traffic.start().unwrap();
        let said = migrate(world);
        said.is(3, &["rolled back", "switch of host 'a'", "/a/small/"]);
        all_run_on_a(world, "a small disk on the source");
        let flows = world.traffic.stop().unwrap();
        is_clean(&flows, "a small disk on the source");

        // The group's ends have nothing to say to each other: that is said, and they move all the same.
        world.restart_switch(true, &a).unwrap();
        world.traffic.start().unwrap();
        thread::sleep(Duration::from_secs(1));
        let ends = "producer,consumer";
        let said = ask(world, &["migrate", ends, "--to", "b", "--dry-run"]);
        said.is(0, &["not connected", "producer", "consumer"]);
        let said = ask(world, &["migrate", ends, "--to", "b"]);
        said.is(0, &["not connected"]);
        thread::sleep(Duration::from_secs(1));
        let flows = world.traffic.stop().unwrap();
        is_clean(&flows, "the group's ends have moved");
    });
}

/// A coordinator that has stopped at a step, and its migration's folder.
fn paused_at(world: &World, freeze: Freeze, step: &str) -> (Process, PathBuf) {
    let mut command = world.coordinator.migrate(&world.group, freeze);
    command.env("GANGWAY_PAUSE_AT", step);
    let log = world.lab.dir().join("a/migrate.log");
    let process = Process::start("gangway migrate", command, &log).unwrap();
    let state = world.lab.dir().join("coordinator");
    let folder = until(&format!("pause at {step}"), PATIENCE, || {
        if let Some(status) = process.ended() {
            anyhow::bail!("it ended: {status}");
        }
        let folders = std::fs::read_dir(&state).into_iter().flatten().flatten();
        let mut paths = folders.map(|folder| folder.path());
        Ok(paths.find(|path| path.join("paused").exists()))
    });
    (process, folder.unwrap())
}

/// The flows in which a VM has no part.
fn without(flows: Vec<Flow>, vm: &str) -> Vec<Flow> {
    let names = |flow: &Flow| flow.name.contains(vm);
    flows.into_iter().filter(|flow| !names(flow)).collect()
}

#[test]
fn early_freezes_are_undone_and_a_guest_that_resets_its_card_harms_nobody() {
    in_world("resets", &Group::roomy(), |world| {
        world.traffic.start().unwrap();
        for step in ["freeze-inside:after", "freeze:after"] {
            let (migrate, folder) = paused_at(world, Freeze::Early, step);
            thread::sleep(Duration::from_millis(300));
            ask(world, &["abort"]).is(0, &[]);
            let status = migrate.wait(PATIENCE).unwrap();
            assert_eq!(status.code(), Some(3), "rolled back at {step}");
            all_run_on_a(world, step);
            std::fs::remove_file(folder.join("paused")).unwrap();
        }
        is_clean(&world.traffic.stop().unwrap(), "aborts of an early freeze");

        // The driver lets go of the card and takes it again, then the whole machine starts anew, both under traffic.
        world.traffic.start().unwrap();
        let serial = |world: &World, sign: &str, times: usize| {
            let file = world.sources[2].files.serial.clone();
            until(&format!("{times} times {sign:?}"), PATIENCE, || {
                let text = std::fs::read(&file).unwrap_or_default();
                let seen = String::from_utf8_lossy(&text).matches(sign).count();
                Ok((seen >= times).then_some(()))
            })
            .unwrap();
        };
        world.traffic.tell("consumer", "rebind").unwrap();
        serial(world, "the card is back", 1);
        world.traffic.tell("consumer", "ping").unwrap();
        let consumer = &mut world.sources[2].qmp;
        // The lab's QEMUs end instead of starting anew.
        consumer
            .execute("set-action", json!({"reboot": "reset"}))
            .unwrap();
        consumer.execute("system_reset", json!({})).unwrap();
        serial(world, "is ready", 2);
        world.traffic.tell("consumer", "ping").unwrap();
        assert!(world.lab.a.switch.as_ref().unwrap().ended().is_none());
        for port in shown(world, &["host", "show", "a"])["ports"]
            .as_array()
            .unwrap()
        {
            assert_eq!(port["state"], "up", "{port}");
        }

        // It moves as any other.
        migrate(world).is(0, &[]);
        world.traffic.tell("consumer", "ping").unwrap();
        let flows = without(world.traffic.stop().unwrap(), "consumer");
        let flows: Vec<Flow> = flows
            .into_iter()
            // The stream through the chain broke with its end.
            .filter(|flow| !flow.name.starts_with("tcp"))
            .collect();
        assert!(flows.iter().any(|flow| flow.name == "udp producer->middle"));
        is_clean(&flows, "the others' flows");
    });
}

#[test]
fn a_group_of_one_moves_without_losing_a_frame() {
    let logs = Path::new(env!("CARGO_TARGET_TMPDIR")).join("solo");
    let (group, say) = (Group::chain(&["solo"]), &mut |text: &str| {
        eprintln!("solo: {text}")
    });
    let phases = Phases {
        warm: Duration::from_secs(1),
        settle: Duration::from_secs(1),
    };
    let (ports, freeze) = (Ports::VhostUser, Freeze::Switchover);
    let run = once_more_after_a_crash(|| {
        moved::run(&group, ports, freeze, phases, &logs, say).unwrap_or_else(|e| panic!("{e:#}"))
    });
    assert_eq!(run.order, ["solo"]);
    assert!(run.clean, "{run:#?}");
}

#[test]
fn a_switch_with_a_bad_file_says_where_and_what() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("host.toml");
    let switch = Programs::find().unwrap().switch;
    let start = |text: &[u8]| {
        std::fs::write(&file, text).unwrap();
        Said::of(Command::new(&switch).arg("--config").arg(&file))
    };
    let name = file.to_string_lossy().into_owned();
    let unknown = b"[host]\nname = \"a\"\n\n[spool]\nquota_byte = 5\n";
    start(unknown).is(
        2,
        &[&format!(
            "{name}:5: spool.quota_byte: unknown key; did you mean 'quota_bytes'?"
        )],
    );
    start(b"[host\nname =").is(2, &[&format!("{name}:1")]);
    start(&[0xff, 0, 0x7f, b'E', b'L', b'F', 0x80]).is(2, &[&name]);
    start(b"").is(2, &[&name, "host.name: missing"]);
    std::fs::remove_file(&file).unwrap();
    Said::of(Command::new(&switch).arg("--config").arg(&file)).is(2, &[&name]);
}
