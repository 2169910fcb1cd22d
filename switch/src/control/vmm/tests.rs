//! The VMM channel against sockets of the tests' own, and against a fake VM: this test program, started once more.

use std::fs;
use std::path::Path;

use gangway_shared::id::HoldId;
use rustix::fs::MemfdFlags;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
use tokio::net::UnixListener;

use super::process::{Process, start_time};
use super::*;

const GREETING: &[u8] = b"{\"QMP\": {\"version\": {}, \"capabilities\": []}}\r\n";
const ONE: HoldId = HoldId(1);
const TWO: HoldId = HoldId(2);

/// `web` cannot arrive, `db` can; `extra` replaces its command.
fn vmm(dir: &Path, incoming: &[&str]) -> Vmm {
    let text = format!(
        "host = {{ name = 'a', state_dir = '{0}' }}\nmigration.address = '127.0.0.1'\n\
         [[vm]]\nname = 'web'\nqmp = '{0}/web.qmp'\n\
         [[vm]]\nname = 'db'\nqmp = '{0}/db.qmp'\nincoming = {incoming:?}\n\
         [[port]]\nname = 'web0'\ntype = 'vhost-user'\nvm = 'web'\nsocket = '{0}/web0'\nmode = 'client'\n",
        dir.display()
    );
    let cfg = HostConfig::parse(&text, "test").expect("config");
    let mut vmm = Arc::into_inner(Vmm::new(&cfg)).expect("new");
    vmm.turn = Duration::from_millis(200);
    vmm
}

/// A VM that answers `query-status`, one client at a time, and counts them.
fn qmp(path: &Path, status: &'static str) -> tokio::task::JoinHandle<()> {
    let listener = UnixListener::bind(path).expect("bind");
    tokio::spawn(async move {
        while let Ok((mut s, _)) = listener.accept().await {
            let _ = s.write_all(GREETING).await;
            let mut bytes = [0; 4096];
            while let Ok(n) = s.read(&mut bytes).await {
                if n == 0 {
                    break;
                }
                for line in String::from_utf8_lossy(&bytes[..n]).lines() {
                    let answer = if line.contains("query-status") {
                        format!(
                            "{{\"return\": {{\"status\": \"{status}\", \"running\": true}}}}\r\n"
                        )
                    } else if line.contains("stop") {
                        "{\"event\": \"STOP\"}\r\n{\"return\": {}}\r\n".to_owned()
                    } else {
                        "{\"return\": {}}\r\n".to_owned()
                    };
                    let _ = s.write_all(answer.as_bytes()).await;
                }
            }
        }
    })
}

fn code<T>(result: Result<T, Refusal>) -> (RefusalCode, String) {
    match result {
        Ok(_) => panic!("must be refused"),
        Err(r) => (r.code, r.message),
    }
}

#[tokio::test]
async fn only_configured_vms_can_be_reached() {
    let dir = TempDir::new().expect("tempdir");
    let vmm = vmm(dir.path(), &["/bin/true"]);
    let _other = qmp(&dir.path().join("other.qmp"), "running");
    for name in ["other", "../web", "web.qmp", "", "\0", "/run/docker.sock"] {
        assert_eq!(
            code(vmm.open(name).await).0,
            RefusalCode::Unknown,
            "{name:?}"
        );
        assert_eq!(
            code(vmm.start(name, ONE).await).0,
            RefusalCode::Unknown,
            "{name:?}"
        );
        assert_eq!(
            code(vmm.stop(name, ONE).await).0,
            RefusalCode::Unknown,
            "{name:?}"
        );
        assert_eq!(vmm.qmp_peer_pid(name), None);
    }
    let (_, text) = code(vmm.open("wbe").await);
    assert!(text.contains("no VM 'wbe'; did you mean 'web'?"), "{text}");
    let (absent, text) = code(vmm.open("web").await);
    assert_eq!(absent, RefusalCode::State);
    assert!(
        text.contains("does not run here") && text.contains("No such file"),
        "{text}"
    );
    let (no, text) = code(vmm.start("web", ONE).await);
    assert_eq!(no, RefusalCode::State);
    assert!(text.contains("has no incoming command"), "{text}");
}

#[tokio::test]
async fn a_relay_moves_both_ways_and_keeps_others_out() {
    let dir = TempDir::new().expect("tempdir");
    let vmm = vmm(dir.path(), &["/bin/true"]);
    let _vm = qmp(&dir.path().join("web.qmp"), "running");
    let relay = vmm.open("web").await.expect("open");
    let (mut client, mut ours) = duplex(4096);
    let task = tokio::spawn(async move { relay.run(&mut ours).await });

    let mut bytes = vec![0; GREETING.len()];
    client.read_exact(&mut bytes).await.expect("greeting");
    assert_eq!(bytes, GREETING);
    client
        .write_all(b"{\"execute\": \"stop\"}\n")
        .await
        .expect("write");
    let mut answer = vec![0; 35];
    client.read_exact(&mut answer).await.expect("answer");
    assert!(answer.starts_with(b"{\"event\": \"STOP\"}"), "{answer:?}");

    let (busy, text) = code(vmm.open("web").await);
    assert_eq!(busy, RefusalCode::Busy);
    assert!(
        text.contains("another coordinator is connected to VM 'web'"),
        "{text}"
    );
    let list = vmm.list().await;
    assert_eq!(
        (list[0].status.as_str(), list[0].reachable),
        ("paused", true),
        "what passed through tells"
    );
    assert_eq!(vmm.qmp_peer_pid("web"), Some(std::process::id()));

    drop(client);
    task.await.expect("task").expect("relay");
    drop(vmm.open("web").await.expect("free again"));
}

#[tokio::test]
async fn a_vm_that_somebody_else_talks_to_is_busy() {
    let dir = TempDir::new().expect("tempdir");
    let vmm = vmm(dir.path(), &["/bin/true"]);
    // Accepted by nobody: as QEMU does while it has a client.
    let _listener = UnixListener::bind(dir.path().join("web.qmp")).expect("bind");
    let (busy, text) = code(vmm.open("web").await);
    assert_eq!(busy, RefusalCode::Busy);
    assert!(text.contains("another program is connected"), "{text}");
    assert_eq!(vmm.list().await[0].status, "busy");
}

#[tokio::test]
async fn a_vm_on_a_crowded_host_may_be_slow_to_greet() {
    let dir = TempDir::new().expect("tempdir");
    let vmm = vmm(dir.path(), &["/bin/true"]);
    let listener =
        std::os::unix::net::UnixListener::bind(dir.path().join("web.qmp")).expect("bind");
    std::thread::spawn(move || {
        std::thread::sleep(super::GREETING + std::time::Duration::from_secs(1));
        let (mut s, _) = listener.accept().expect("accept");
        let _ = std::io::Write::write_all(&mut s, GREETING);
        std::thread::sleep(std::time::Duration::from_secs(1));
    });
    drop(vmm.open("web").await.expect("open"));
}

#[tokio::test]
async fn the_list_asks_every_vm() {
    let dir = TempDir::new().expect("tempdir");
    let vmm = vmm(dir.path(), &["/bin/true"]);
    let _vm = qmp(&dir.path().join("web.qmp"), "running");
    let list = vmm.list().await;
    let short: Vec<_> = list
        .iter()
        .map(|v| {
            (
                v.name.as_str(),
                v.status.as_str(),
                v.reachable,
                v.can_arrive,
            )
        })
        .collect();
    assert_eq!(
        short,
        [
            ("web", "running", true, false),
            ("db", "absent", false, true)
        ]
    );
    assert_eq!(list[0].ports, ["web0"]);
    assert_eq!(vmm.qmp_peer_pid("web"), Some(std::process::id()));
    assert_eq!(vmm.qmp_peer_pid("db"), None);
}

/// Not a test: the VM that the tests below start. Listens on QMP and says what it has inherited.
#[test]
fn fake_vm() {
    let Some(path) = std::env::var_os("GANGWAY_FAKE_QMP") else {
        return;
    };
    let names = fs::read_dir("/proc/self/fd")
        .expect("fds")
        .filter_map(Result::ok);
    let fds: Vec<String> = names
        .filter_map(|e| Some(fs::read_link(e.path()).ok()?.display().to_string()))
        .collect();
    let session = rustix::process::getsid(None).expect("session").as_raw_pid();
    let path = Path::new(&path);
    fs::write(
        path.with_extension("seen"),
        format!("{session}\n{}", fds.join("\n")),
    )
    .expect("write");
    let _ = fs::remove_file(path);
    let listener = std::os::unix::net::UnixListener::bind(path).expect("bind");
    let deadline = std::time::Instant::now() + Duration::from_secs(60);
    while std::time::Instant::now() < deadline {
        let (mut s, _) = listener.accept().expect("accept");
        let _ = std::io::Write::write_all(&mut s, GREETING);
        let _ = std::io::copy(&mut s, &mut std::io::sink());
    }
}

/// The command of the fake VM of `db`; `before` is a piece of shell.
fn fake(dir: &Path, before: &str) -> Vec<String> {
    let exe = std::env::current_exe().expect("exe");
    let run = format!(
        "{before} GANGWAY_FAKE_QMP='{}' exec '{}' --exact control::vmm::tests::fake_vm --nocapture",
        dir.join("db.qmp").display(),
        exe.display()
    );
    vec!["/bin/sh".into(), "-c".into(), run]
}

fn with_fake(dir: &Path, before: &str) -> Vmm {
    let argv = fake(dir, before);
    vmm(dir, &argv.iter().map(String::as_str).collect::<Vec<_>>())
}

fn runs(pid: u32) -> bool {
    start_time(pid).is_some_and(|t| Process::find(pid, t).is_some())
}

#[tokio::test]
async fn a_vm_is_started_once_per_hold_and_only_that_hold_ends_it() {
    let dir = TempDir::new().expect("tempdir");
    let vmm = with_fake(dir.path(), "");
    let pid = vmm.start("db", ONE).await.expect("start");
    assert_eq!(
        vmm.start("db", ONE).await,
        Ok(pid),
        "again: the same answer"
    );
    assert_eq!(vmm.qmp_peer_pid("db"), Some(pid));
    let (state, text) = code(vmm.start("db", TWO).await);
    assert_eq!(state, RefusalCode::State);
    assert!(
        text.contains("was started here for migration 0000000000000001"),
        "{text}"
    );
    assert_eq!(code(vmm.stop("db", TWO).await).0, RefusalCode::State);
    assert!(runs(pid));
    vmm.stop("db", ONE).await.expect("stop");
    assert!(!runs(pid));
    vmm.stop("db", ONE).await.expect("stop again");
    vmm.stop("web", ONE).await.expect("nothing was started");
    let again = vmm.start("db", TWO).await.expect("free for another");
    vmm.stop("db", TWO).await.expect("stop");
    assert_ne!(pid, again);
}

#[tokio::test]
async fn a_started_vm_has_its_own_session_and_none_of_our_descriptors() {
    let dir = TempDir::new().expect("tempdir");
    let leak = rustix::fs::memfd_create("guest-memory", MemfdFlags::empty()).expect("memfd");
    let vmm = with_fake(dir.path(), "");
    let pid = vmm.start("db", ONE).await.expect("start");
    vmm.stop("db", ONE).await.expect("stop");
    drop(leak);
    let seen = fs::read_to_string(dir.path().join("db.seen")).expect("seen");
    let mut lines = seen.lines();
    assert_eq!(
        lines.next(),
        Some(pid.to_string().as_str()),
        "leads its session"
    );
    let fds: Vec<&str> = lines.collect();
    assert!(!seen.contains("guest-memory"), "{fds:?}");
    // 0, 1, 2 and the directory that the fake VM itself was reading.
    assert_eq!(fds.len(), 4, "{fds:?}");
    assert!(fds.iter().any(|f| f.ends_with("vm-db.log")), "{fds:?}");
}

#[test]
fn a_vm_outlives_the_switch_and_the_next_one_knows_it() {
    let dir = TempDir::new().expect("tempdir");
    let runtime = || tokio::runtime::Runtime::new().expect("runtime");
    let first = runtime();
    let pid = first
        .block_on(with_fake(dir.path(), "").start("db", ONE))
        .expect("start");
    drop(first);
    assert!(runs(pid));
    let second = runtime();
    let vmm = with_fake(dir.path(), "");
    assert_eq!(second.block_on(vmm.start("db", ONE)), Ok(pid));
    second.block_on(vmm.stop("db", ONE)).expect("stop");
    assert!(!runs(pid));
}

#[tokio::test]
async fn a_number_that_went_to_somebody_else_is_left_alone() {
    let dir = TempDir::new().expect("tempdir");
    let vmm = with_fake(dir.path(), "");
    let mut other = std::process::Command::new("/bin/sleep")
        .arg("60")
        .spawn()
        .expect("sleep");
    let started = start_time(other.id()).expect("runs");
    let record = format!(
        "{{\"pid\":{},\"start_time\":{},\"hold\":\"{ONE}\"}}",
        other.id(),
        started + 1
    );
    fs::write(dir.path().join("vm-db.json"), record).expect("write");
    vmm.stop("db", ONE).await.expect("ours has gone");
    assert!(runs(other.id()));
    other.kill().expect("kill");
    other.wait().expect("wait");
    fs::write(dir.path().join("vm-db.json"), "garbage").expect("write");
    vmm.stop("db", ONE).await.expect("garbage is nothing");
}

#[tokio::test]
async fn a_vm_that_ends_at_once_leaves_its_last_words() {
    let dir = TempDir::new().expect("tempdir");
    let command = [
        "/bin/sh",
        "-c",
        "echo starting; echo 'cannot open disk image' >&2; exit 3",
    ];
    let (code_, text) = code(vmm(dir.path(), &command).start("db", ONE).await);
    assert_eq!(code_, RefusalCode::Resources);
    assert!(text.contains("exit status: 3"), "{text}");
    assert!(
        text.contains("it wrote: starting | cannot open disk image"),
        "{text}"
    );
    assert!(!dir.path().join("vm-db.json").exists());
    let (_, text) = code(vmm(dir.path(), &["/no/such/qemu"]).start("db", ONE).await);
    assert!(text.contains("'/no/such/qemu': No such file"), "{text}");
}

#[tokio::test]
async fn a_vm_that_runs_already_is_not_started_again() {
    let dir = TempDir::new().expect("tempdir");
    let vmm = with_fake(dir.path(), "");
    let _vm = qmp(&dir.path().join("db.qmp"), "running");
    let (state, text) = code(vmm.start("db", ONE).await);
    assert_eq!(state, RefusalCode::State);
    assert!(text.contains("runs here already"), "{text}");
}

#[tokio::test]
async fn a_vm_that_ignores_sigterm_is_killed() {
    let dir = TempDir::new().expect("tempdir");
    let vmm = with_fake(dir.path(), "trap '' TERM;");
    let pid = vmm.start("db", ONE).await.expect("start");
    vmm.stop("db", ONE).await.expect("stop");
    assert!(!runs(pid));
}
