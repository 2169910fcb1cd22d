//! Whole migrations of fake VMs between two fake switches: each step fails, is aborted, or loses its coordinator.

mod fake;

use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::Duration;

use fake::qemu::{FakeHost, Status};
use fake::{FakeSwitch, FakeVm, Incoming};
use gangway::migration::act::End;
use gangway::migration::orders::{Order, Task, phases};
use gangway::migration::steps::{NO_RETURN, Step, TABLE, Undo};
use serde_json::Value;
use tokio::process::Command;

const VMS: [&str; 3] = ["producer", "middle", "consumer"];

struct World {
    dir: tempfile::TempDir,
    a: FakeSwitch,
    b: FakeSwitch,
    vms_a: FakeHost,
    vms_b: FakeHost,
}

impl World {
    fn new() -> World {
        let dir = tempfile::tempdir().expect("tempdir");
        let d = dir.path();
        let vms_a = FakeHost::default();
        let vms_b = vms_a.peer();
        let vms = |host: &str, incoming: &dyn Fn() -> Incoming| -> Vec<FakeVm> {
            let vm = |name: &&str| FakeVm {
                name: name.to_string(),
                qmp: d.join(format!("{host}-{name}.qmp")),
                incoming: incoming(),
            };
            VMS.iter().map(vm).collect()
        };
        let link = |a: &str, b: &str, n| (a.to_owned(), b.to_owned(), n);
        let links = vec![
            link("producer", "middle", 1000),
            link("middle", "consumer", 900),
            link("consumer", "middle", 9),
        ];
        let on_a = vms("a", &|| Incoming::Never);
        for v in &on_a {
            vms_a.start(&v.name, &v.qmp, Status::Running);
        }
        let a = FakeSwitch::start("a", &d.join("a.sock"), on_a, links);
        let b = FakeSwitch::start(
            "b",
            &d.join("b.sock"),
            vms("b", &|| Incoming::Fake(vms_b.clone())),
            Vec::new(),
        );
        let hosts = "[[host]]\nname = \"a\"\nsocket = \"a.sock\"\naddress = \"127.0.0.1:1\"\n\
                     [[host]]\nname = \"b\"\nsocket = \"b.sock\"\naddress = \"127.0.0.1:2\"\n\
                     [[group]]\nname = \"chain\"\nvms = [\"consumer\", \"middle\", \"producer\"]\n";
        std::fs::write(d.join("hosts.toml"), hosts).expect("hosts.toml");
        World {
            dir,
            a,
            b,
            vms_a,
            vms_b,
        }
    }

    fn command(&self, line: &str) -> Command {
        let mut c = Command::new(env!("CARGO_BIN_EXE_gangway"));
        c.args(line.split(' '))
            .env("GANGWAY_HOSTS", self.path("hosts.toml"))
            .env("GANGWAY_STATE", self.path("state"));
        c.stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        c
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    async fn run(&self, line: &str) -> Output {
        tokio::time::timeout(Duration::from_secs(60), self.command(line).output())
            .await
            .expect("in time")
            .expect("run")
    }

    async fn migrate_with(&self, key: &str, value: &str) -> Output {
        let mut c = self.command("migrate chain --to b -o json");
        c.env(key, value);
        tokio::time::timeout(Duration::from_secs(60), c.output())
            .await
            .expect("in time")
            .expect("run")
    }

    /// Starts a migration that waits at a step; answers it and its folder.
    async fn paused_at(&self, point: &str) -> (tokio::process::Child, PathBuf) {
        let mut child = self
            .command("migrate chain --to b")
            .env("GANGWAY_PAUSE_AT", point)
            .spawn()
            .expect("spawn");
        for _ in 0..1500 {
            let folder = std::fs::read_dir(self.path("state"))
                .ok()
                .and_then(|mut d| {
                    d.find_map(|e| Some(e.ok()?.path()).filter(|p| p.join("paused").exists()))
                });
            if let Some(f) = folder {
                return (child, f);
            }
            assert!(
                child.try_wait().expect("wait").is_none(),
                "{point}: it ended before the pause"
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("{point}: no pause");
    }

    /// All VMs run on A, none is left on B, and no hold is left.
    fn assert_as_before(&self, what: &str) {
        for vm in VMS {
            assert_eq!(
                self.vms_a.status(vm),
                Some(Status::Running),
                "{what}: {vm} on a"
            );
            assert_eq!(self.vms_b.status(vm), None, "{what}: {vm} on b");
        }
        for s in [&self.a, &self.b] {
            use gangway_shared::api::HoldState;
            assert!(
                s.hold_states().iter().all(|h| *h == HoldState::Aborted),
                "{what}: {:?}",
                s.hold_states()
            );
        }
    }

    fn assert_moved(&self, what: &str) {
        for vm in VMS {
            assert_eq!(
                self.vms_b.status(vm),
                Some(Status::Running),
                "{what}: {vm} on b"
            );
            assert_eq!(self.vms_a.status(vm), None, "{what}: {vm} on a");
        }
    }
}

fn text(o: &Output) -> String {
    format!(
        "{:?}\n{}\n{}",
        o.status,
        String::from_utf8_lossy(&o.stdout),
        String::from_utf8_lossy(&o.stderr)
    )
}

fn before_return() -> impl Iterator<Item = Step> {
    TABLE
        .iter()
        .map(|r| r.step)
        .filter(|s| *s < NO_RETURN && *s != Step::FreezeInside)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_moves_in_dependency_order_and_the_report_says_so() {
    let w = World::new();
    let report = w.path("out.json");
    let out = w
        .run(&format!(
            "migrate chain --to b --report {}",
            report.display()
        ))
        .await;
    assert_eq!(out.status.code(), Some(0), "{}", text(&out));
    w.assert_moved("moved");
    let r: Value = serde_json::from_slice(&std::fs::read(&report).expect("report")).expect("json");
    assert_eq!(r["outcome"], "moved");
    assert_eq!(
        r["order"],
        serde_json::json!(["producer", "middle", "consumer"])
    );
    assert!(r["blackout_ms"].as_f64().is_some_and(|ms| ms > 0.0), "{r}");
    let resumed: Vec<u64> = r["vms"]
        .as_array()
        .expect("vms")
        .iter()
        .filter_map(|v| v["resume_ns"].as_u64())
        .collect();
    assert!(resumed.len() == 3 && resumed.is_sorted(), "{resumed:?}");
    assert!(
        r["links"]
            .as_array()
            .is_some_and(|l| l.len() == 2 && l.iter().all(|l| l["agree"] == true)),
        "{r}"
    );
    assert!(
        out.stderr.windows(6).any(|w| w == b"commit"),
        "{}",
        text(&out)
    );

    let out = w.run("status").await;
    assert!(
        String::from_utf8_lossy(&out.stdout).contains("moved"),
        "{}",
        text(&out)
    );
    let out = w.run("report -o json").await;
    assert_eq!(
        serde_json::from_slice::<Value>(&out.stdout).expect("json"),
        r
    );
    assert_eq!(w.run("abort").await.status.code(), Some(5), "too late");
}

/// By what a switch, or a VM's QMP, was asked; none for what is asked for other reasons, too.
fn command(order: Order) -> Option<(bool, &'static str)> {
    let (of_switch, name) = match order {
        Order::Show | Order::Status | Order::VmShow => return None,
        Order::Prepare => (true, "IncomingPrepare"),
        Order::Open => (true, "HoldOpen"),
        Order::Freeze(_) => (true, "Freeze"),
        Order::Seal => (true, "Seal"),
        Order::Restore => (true, "IncomingRestore"),
        Order::Commit => (true, "Commit"),
        Order::Announce => (true, "Announce"),
        Order::Depart => (true, "Depart"),
        Order::Release => (true, "HoldRelease"),
        Order::Abort => (true, "HoldAbort"),
        Order::VmStart => (true, "VmmStart"),
        Order::VmEnd => (true, "VmmStop"),
        Order::VmMigrate => (false, "migrate"),
        Order::VmStop => (false, "stop"),
        Order::VmSwitchover => (false, "migrate-continue"),
        Order::VmCont => (false, "cont"),
        Order::VmCancel => (false, "migrate_cancel"),
        Order::VmQuit => (false, "quit"),
    };
    Some((of_switch, name))
}

/// The simulation and the model do what the table of orders says: so does the coordinator.
#[tokio::test(flavor = "multi_thread")]
async fn the_hosts_are_asked_for_what_the_table_of_orders_says() {
    for fails in [false, true] {
        let w = World::new();
        let mut migrate = w.command("migrate chain --to b --freeze early");
        let mut tasks: Vec<Task> = TABLE.iter().map(|r| Task::Step(r.step)).collect();
        if fails {
            // There is a transfer to cancel, and VMs stand still.
            migrate.env("GANGWAY_FAIL_AT", "stop:after");
            tasks.retain(|t| *t <= Task::Step(Step::Stop));
            tasks.extend(Undo::ALL.map(Task::Undo));
        }
        let out = migrate.output().await.expect("run");
        let code = if fails { 3 } else { 0 };
        assert_eq!(out.status.code(), Some(code), "{}", text(&out));
        let asks: Vec<(End, Order)> = tasks
            .into_iter()
            .flat_map(phases)
            .flat_map(|p| p.asks)
            .copied()
            .collect();
        let all = TABLE.iter().map(|r| Task::Step(r.step));
        let all: Vec<&str> = all
            .chain(Undo::ALL.map(Task::Undo))
            .flat_map(phases)
            .flat_map(|p| p.asks)
            .filter_map(|(_, o)| Some(command(*o)?.1))
            .collect();
        for (end, switch, vms) in [(End::Source, &w.a, &w.vms_a), (End::Target, &w.b, &w.vms_b)] {
            for of_switch in [true, false] {
                let mut wanted = Vec::new();
                for (at, order) in &asks {
                    match command(*order) {
                        Some((to, name)) if *at == end && to == of_switch => {
                            let times = if order.is_for_vms() { VMS.len() } else { 1 };
                            wanted.extend(std::iter::repeat_n(name, times));
                        }
                        _ => {}
                    }
                }
                let heard = if of_switch {
                    switch.calls()
                } else {
                    vms.commands()
                };
                let heard = heard.iter().filter_map(|c| c.split(' ').next());
                let heard: Vec<&str> = heard.filter(|c| all.contains(c)).collect();
                assert_eq!(heard, wanted, "{end:?}, fails: {fails}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn freeze_early_cuts_inside_first() {
    let w = World::new();
    let out = w
        .run("migrate @discover --from a --to b --freeze early")
        .await;
    assert_eq!(out.status.code(), Some(0), "{}", text(&out));
    assert_eq!(w.a.calls().iter().filter(|c| *c == "Freeze").count(), 2);
    w.assert_moved("early");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failure_of_any_step_before_the_commit_puts_everything_back() {
    let mut set = tokio::task::JoinSet::new();
    for step in before_return() {
        for suffix in ["", ":after"] {
            let point = format!("{}{suffix}", step.name());
            set.spawn(async move {
                let w = World::new();
                let out = w.migrate_with("GANGWAY_FAIL_AT", &point).await;
                let code = if step == Step::Check { 1 } else { 3 };
                assert_eq!(out.status.code(), Some(code), "{point}: {}", text(&out));
                w.assert_as_before(&point);
                // And it can be tried again.
                let out = w.run("migrate chain --to b -q").await;
                assert_eq!(out.status.code(), Some(0), "{point}, again: {}", text(&out));
            });
            if set.len() >= 4 {
                set.join_next().await.expect("one").expect("passes");
            }
        }
    }
    while let Some(r) = set.join_next().await {
        r.expect("passes");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn past_the_commit_failures_are_tried_again() {
    for step in TABLE.iter().map(|r| r.step).filter(|s| *s >= NO_RETURN) {
        let w = World::new();
        let out = w.migrate_with("GANGWAY_FAIL_AT", step.name()).await;
        assert_eq!(
            out.status.code(),
            Some(0),
            "{}: {}",
            step.name(),
            text(&out)
        );
        w.assert_moved(step.name());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_commit_has_not_happened_and_is_undone() {
    let w = World::new();
    w.b.refuse("Commit", 1);
    let out = w.run("migrate chain --to b").await;
    assert_eq!(out.status.code(), Some(3), "{}", text(&out));
    w.assert_as_before("refused commit");
}

#[tokio::test(flavor = "multi_thread")]
async fn abort_in_every_phase_before_the_commit() {
    for step in before_return().filter(|s| *s != Step::Check) {
        let point = format!("{}:after", step.name());
        let w = World::new();
        let (child, _) = w.paused_at(&point).await;
        let abort = w.run("abort").await;
        assert_eq!(abort.status.code(), Some(0), "{point}: {}", text(&abort));
        let out = child.wait_with_output().await.expect("wait");
        assert_eq!(out.status.code(), Some(3), "{point}: {}", text(&out));
        w.assert_as_before(&point);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_coordinator_is_replaced_by_abort() {
    for r in TABLE
        .iter()
        .filter(|r| r.step != Step::Check && r.step != Step::FreezeInside)
    {
        for point in [r.name.to_owned(), format!("{}:after", r.name)] {
            let w = World::new();
            let (mut child, folder) = w.paused_at(&point).await;
            child.kill().await.expect("kill -9");
            let status = w.run("status").await;
            assert!(
                String::from_utf8_lossy(&status.stdout).contains("is dead"),
                "{point}: {}",
                text(&status)
            );
            let busy = w.run("migrate middle --from a --to b").await;
            assert_eq!(busy.status.code(), Some(5), "{point}: {}", text(&busy));
            tear(&folder.join("journal"));
            let abort = w.run("abort").await;
            assert_eq!(abort.status.code(), Some(0), "{point}: {}", text(&abort));
            match r.step < NO_RETURN {
                true => w.assert_as_before(&point),
                false => w.assert_moved(&point),
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_that_takes_over_tells_what_became_of_the_hold() {
    let w = World::new();
    let (mut child, _) = w.paused_at("freeze:after").await;
    child.kill().await.expect("kill -9");
    w.a.put_back("this host has put it back: nobody has asked");
    let abort = w.run("abort").await;
    assert_eq!(abort.status.code(), Some(0), "{}", text(&abort));
    w.assert_as_before("put back by its host");
    let report = w.run("report -o json").await;
    let r: Value = serde_json::from_slice(&report.stdout).expect("json");
    let told = "host 'a' has the hold as Aborted on the Source: this host has put it back: nobody has asked";
    assert_eq!(r["troubles"], serde_json::json!([told]));
    assert!(text(&abort).contains(told), "{}", text(&abort));
}

/// What nobody asks for is overdue: so it asks while it works, too.
#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_that_takes_over_goes_on_asking_for_the_hold() {
    let w = World::new();
    let (mut child, _) = w.paused_at("announce").await;
    child.kill().await.expect("kill -9");
    let before = w.b.asked();
    // Tried again, later each time: more than a second in all.
    w.b.refuse("Announce", 5);
    let abort = w.run("abort").await;
    assert_eq!(abort.status.code(), Some(0), "{}", text(&abort));
    w.assert_moved("taken over");
    // Once when it came, once in `settle`.
    let more = w.b.asked() - before;
    assert!(more > 3, "asked {more} times");
}

/// A crash in the middle of a line.
fn tear(journal: &Path) {
    let mut text = std::fs::read(journal).expect("journal");
    text.extend(b"{\"at_ns\": 12");
    std::fs::write(journal, text).expect("write");
}

#[tokio::test(flavor = "multi_thread")]
async fn ctrl_c_is_an_abort() {
    let w = World::new();
    let (child, _) = w.paused_at("precopy:after").await;
    let pid = child.id().expect("pid");
    let killed = Command::new("kill")
        .args(["-INT", &pid.to_string()])
        .status()
        .await
        .expect("kill");
    assert!(killed.success());
    let out = child.wait_with_output().await.expect("wait");
    assert_eq!(out.status.code(), Some(3), "{}", text(&out));
    w.assert_as_before("ctrl-c");
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_input_is_one_clear_line() {
    let w = World::new();
    for (line, code, word) in [
        (
            "migrate prodcuer --from a --to b",
            2,
            "did you mean 'producer'",
        ),
        ("migrate producer --to c", 2, "knows no host 'c'"),
        (
            "migrate producer --from a --to a",
            2,
            "already run on host 'a'",
        ),
        ("migrate producer,producer --to b", 2, "named twice"),
        ("migrate nobody --to b", 2, "no host knows a VM 'nobody'"),
        ("migrate @discover --to b", 2, "needs --from"),
        (
            "migrate chain --to b --order producer,middle",
            2,
            "--order must name each VM",
        ),
        ("migrate producer --from b --to a", 5, "absent"),
        ("report 0000000000000001", 2, "no migration"),
        ("abort", 2, "no migration"),
        ("host show xyz", 2, "there is: a, b"),
    ] {
        let out = w.run(line).await;
        let err = String::from_utf8_lossy(&out.stderr).into_owned();
        assert_eq!(out.status.code(), Some(code), "{line}: {}", text(&out));
        let last = err.lines().last().unwrap_or_default();
        assert!(
            last.starts_with("gangway: ") && last.contains(word),
            "{line}: {err}"
        );
    }
    std::fs::remove_file(w.path("b.sock")).expect("remove");
    let out = w.run("migrate chain --from a --to b").await;
    assert_eq!(out.status.code(), Some(4), "{}", text(&out));
    assert!(text(&out).contains("cannot be reached"), "{}", text(&out));
    w.assert_as_before("nothing happened");
}

/// One error, and nothing else on standard error; what it is, and the exit code, are the same. Nobody is asked anything: standard input stays open, and silent.
#[tokio::test(flavor = "multi_thread")]
async fn quiet_is_silent_and_asks_nothing_and_fails_the_same() {
    let cases = [
        ("migrate chain --to b", None, 0),
        ("migrate chain --to b", Some("check"), 1),
        ("migrate chain --to b", Some("seal"), 3),
        ("migrate chain --to b", Some("settle"), 0),
        ("migrate prodcuer --from a --to b", None, 2),
        ("migrate producer --from b --to a", None, 5),
    ];
    for (line, fails_at, code) in cases {
        let mut said = Vec::new();
        for quiet in ["", " --quiet"] {
            let w = World::new();
            let what = format!("{line}{quiet}, fails at {fails_at:?}");
            let mut c = w.command(&format!("{line}{quiet}"));
            c.stdin(Stdio::piped());
            if let Some(step) = fails_at {
                c.env("GANGWAY_FAIL_AT", step);
            }
            let mut child = c.spawn().expect("spawn");
            let _silent = child.stdin.take().expect("a pipe");
            let out = tokio::time::timeout(Duration::from_secs(60), child.wait_with_output())
                .await
                .expect("in time")
                .expect("run");
            assert_eq!(out.status.code(), Some(code), "{what}: {}", text(&out));
            // What it came to is printed in either case.
            let begun = fails_at.is_some() || code == 0;
            assert_eq!(out.stdout.is_empty(), !begun, "{what}: {}", text(&out));
            let err = String::from_utf8(out.stderr).expect("text");
            let lines: Vec<&str> = err.lines().collect();
            if !quiet.is_empty() {
                let most = usize::from(code != 0);
                assert_eq!(lines.len(), most, "{what}: {err}");
            } else if begun {
                assert!(err.contains("1/17 check") || code == 1, "{what}: {err}");
            }
            let error = lines.last().filter(|_| code != 0).copied();
            said.push(error.map(|e| {
                assert!(e.starts_with("gangway: "), "{what}: {err}");
                e.split(' ').map(unnumbered).collect::<Vec<_>>().join(" ")
            }));
        }
        assert_eq!(said[0], said[1], "{line}");
    }
}

/// A migration's number is another each time.
fn unnumbered(word: &str) -> &str {
    let number = word.len() == 16 && word.bytes().all(|b| b.is_ascii_hexdigit());
    if number { "ID" } else { word }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_vm_and_unconnected_vms_may_move_and_it_is_said() {
    let w = World::new();
    let out = w.run("migrate producer,consumer --to b").await;
    assert_eq!(out.status.code(), Some(0), "{}", text(&out));
    assert!(
        text(&out).contains("not connected with the rest"),
        "{}",
        text(&out)
    );
    let out = w.run("migrate middle --to b").await;
    assert_eq!(out.status.code(), Some(0), "{}", text(&out));
    assert!(text(&out).contains("a group of one VM"), "{}", text(&out));
}

#[tokio::test(flavor = "multi_thread")]
async fn listings_print_text_and_json() {
    let w = World::new();
    for line in [
        "host list",
        "host show a",
        "vm list",
        "vm list a",
        "flows a",
        "discover a",
        "plan chain",
        "status",
        "migrate chain --to b --dry-run",
    ] {
        let out = w.run(line).await;
        assert!(
            out.status.success() && !out.stdout.is_empty(),
            "{line}: {}",
            text(&out)
        );
        let out = w.run(&format!("{line} -o json")).await;
        assert!(out.status.success(), "{line}: {}", text(&out));
        serde_json::from_slice::<Value>(&out.stdout).unwrap_or_else(|e| panic!("{line}: {e}"));
    }
    for format in ["dot", "mermaid", "svg"] {
        assert!(
            w.run(&format!("plan chain -o {format}"))
                .await
                .status
                .success()
        );
    }
    assert!(
        w.a.calls().iter().all(|c| c != "HoldOpen"),
        "a dry run changes nothing"
    );
}
