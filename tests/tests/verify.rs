//! `gangway verify` as a user calls it, on two real switches with real files of the ledger: where a frame is missing it is named, and
//! each exit code is what docs/operating/verify.md says. Without VMs and without root.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::Duration;

use gangway_shared::api::{HoldState, Role};
use gangway_shared::config::valid::{LedgerConfig, SpoolConfig, SpoolLimits, Sync};
use gangway_shared::id::{HoldId, LaneKey};
use gangway_shared::ledger::{Account, LaneKind, Ledger, LedgerLane, Stage};
use gangway_switch::ledger::{Book, counted, write};
use gangway_switch::port::{Frame, VnetHdr};
use gangway_switch::spool::{Kind, Origin, Queue, Spool};
use gangway_tests::lab::gangway::Programs;
use gangway_tests::lab::process::{Process, until};
use serde_json::Value;

/// Moved, and clean.
const CLEAN: &str = "00000000000000c1";
/// Moved; a frame was damaged on the target's disk.
const LACKS: &str = "00000000000000ba";
/// Put back.
const BACK: &str = "00000000000000bc";
/// Only the source has a record.
const HALF: &str = "00000000000000aa";
const FRAMES: u64 = 20;
const TIME: u64 = 1_796_055_721_000_000_000;

fn frame(n: u64) -> Vec<u8> {
    (0..60 + n as usize)
        .map(|i| (n as usize * 31 + i) as u8)
        .collect()
}

/// A host's part of a hold that is over, made by the switch's own spool and ledger.
struct Part<'a> {
    host: &'a Path,
    hold: &'a str,
    role: Role,
    state: HoldState,
    /// A bit of this frame is flipped in the spool before the end.
    damaged: Option<u64>,
}

impl Part<'_> {
    fn write(&self) {
        let source = self.role == Role::Source;
        let hold: HoldId = self.hold.parse().unwrap();
        let cfg = SpoolConfig {
            dir: self.host.join(format!("spool-{}", self.hold)),
            segment_bytes: 128 << 10,
            quota_bytes: 16 << 20,
            sync: Sync::None,
            limits: SpoolLimits::default(),
        };
        let (spool, _) = Spool::open(&cfg).unwrap();
        let key = LaneKey {
            from: "web0".into(),
            queue: 0,
            to: "db0".into(),
        };
        let kind = if source { Kind::Source } else { Kind::Incoming };
        let (mut w, queue) = spool.create(hold, kind, &key).unwrap();
        for n in 1..=FRAMES {
            let bytes = frame(n);
            let f = Frame::from_slice(VnetHdr::default(), &bytes);
            w.append(TIME + n, &f, Origin::NONE).unwrap();
            w.commit();
        }
        w.seal();
        let mut book = Book {
            lane: LedgerLane {
                lane: key,
                kind: LaneKind::Shipped,
                inside: true,
                stages: Vec::new(),
                lost: Vec::new(),
                lost_more: 0,
                dropped: 0,
                indexed: false,
                kept: false,
            },
            again: None,
        };
        let written = counted(queue.progress());
        let moved = self.state == HoldState::Released;
        if source {
            for stage in [Stage::Accept, Stage::Ship, Stage::Acknowledge] {
                book.note(stage, written);
            }
            book.again = Some((queue.clone(), Stage::Spool));
        } else {
            book.note(Stage::Receive, written);
            if moved {
                book.again = Some((queue.clone(), Stage::Store));
            }
        }
        if let Some(n) = self.damaged {
            flip(&cfg.dir, &frame(n));
        }
        if source != moved {
            let (flush, deliver) = drained(&queue);
            book.note(Stage::Flush, flush);
            book.note(Stage::Deliver, deliver);
        }
        let ledger = Ledger {
            hold,
            role: self.role,
            state: self.state,
            host: if source { "alpha" } else { "beta" }.into(),
            peer: if source { "beta" } else { "alpha" }.into(),
            vms: vec!["web".into(), "db".into()],
            frozen_ns: TIME,
            thawed_ns: TIME,
            drained_ns: TIME,
            made_ns: TIME,
            lanes: 1,
        };
        let cfg = LedgerConfig {
            dir: self.host.join("state/ledger"),
            keep_days: 30,
            keep_bytes: 1 << 30,
            frames_bytes: if self.hold == CLEAN { 1 << 20 } else { 0 },
        };
        assert!(write(&cfg, &ledger, vec![book]).unwrap().is_some());
    }
}

/// Flips a bit of the only place in the spool's segments that has these bytes.
fn flip(spool: &Path, bytes: &[u8]) {
    let mut segments = Vec::new();
    let mut folders = vec![spool.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => folders.push(path),
                false => segments.push(path),
            }
        }
    }
    let mut found = 0;
    for path in segments {
        let all = fs::read(&path).unwrap();
        for (at, _) in all
            .windows(bytes.len())
            .enumerate()
            .filter(|w| w.1 == bytes)
        {
            let file = File::options().write(true).open(&path).unwrap();
            let at = at + bytes.len() / 2;
            file.write_all_at(&[all[at] ^ 1], at as u64).unwrap();
            found += 1;
        }
    }
    assert_eq!(found, 1);
}

/// What a drain of the queue counts: it passes over what is damaged.
fn drained(queue: &Arc<Queue>) -> (Account, Account) {
    let (mut flush, mut deliver) = (Account::default(), Account::default());
    let mut r = queue.reader();
    loop {
        match r.peek_batch() {
            Ok(None) => break,
            Ok(Some(b)) => {
                for record in b.records() {
                    flush.frame(record.seq, record.frame.len() as u32);
                    deliver.frame(record.seq, record.frame.len() as u32);
                }
                flush.batch(b.first_seq, b.crc);
            }
            Err(_) => {}
        }
        r.advance_batch();
    }
    flush.roll = None;
    (flush, deliver)
}

/// Two hosts with a switch each, and somebody's computer with `gangway` on it.
struct Site {
    alpha: Process,
    _beta: Process,
    programs: Programs,
    dir: tempfile::TempDir,
}

impl Site {
    fn start() -> Site {
        let programs = Programs::find().unwrap();
        let dir = tempfile::tempdir().unwrap();
        for (role, host) in [(Role::Source, "alpha"), (Role::Target, "beta")] {
            let folder = dir.path().join(host);
            fs::create_dir(&folder).unwrap();
            let mut part = Part {
                host: &folder,
                hold: CLEAN,
                role,
                state: HoldState::Released,
                damaged: None,
            };
            part.write();
            part.hold = LACKS;
            part.damaged = (role == Role::Target).then_some(17);
            part.write();
            (part.hold, part.state, part.damaged) = (BACK, HoldState::Aborted, None);
            part.write();
            if role == Role::Source {
                part.hold = HALF;
                part.write();
            }
        }
        let switch = |host: &str| {
            let d = dir.path().join(host).to_string_lossy().into_owned();
            let config = format!(
                "[host]\nname = \"{host}\"\nstate_dir = \"{d}/state\"\n\
                 [control]\nsocket = \"{d}/switch.sock\"\n\
                 [[vm]]\nname = \"web\"\nqmp = \"{d}/web.qmp\"\n\
                 [[port]]\nname = \"web0\"\ntype = \"vhost-user\"\nvm = \"web\"\nsocket = \"{d}/web.sock\"\nmode = \"client\"\n"
            );
            fs::write(format!("{d}/host.toml"), config).unwrap();
            let mut command = Command::new(&programs.switch);
            command.args(["--config", &format!("{d}/host.toml")]);
            let log = PathBuf::from(format!("{d}/switch.log"));
            Process::start("gangway-switch", command, &log).unwrap()
        };
        let (alpha, beta) = (switch("alpha"), switch("beta"));
        let hosts: String = ["alpha", "beta"]
            .map(|h| format!("[[host]]\nname = \"{h}\"\nsocket = \"{h}/switch.sock\"\n"))
            .concat();
        fs::write(dir.path().join("hosts.toml"), hosts).unwrap();
        let site = Site {
            alpha,
            _beta: beta,
            programs,
            dir,
        };
        for host in ["alpha", "beta"] {
            until("answer of the switch", Duration::from_secs(20), || {
                let shown = site.gangway(&["host", "show", host]);
                Ok(shown.status.success().then_some(()))
            })
            .unwrap();
        }
        site
    }

    fn gangway(&self, args: &[&str]) -> Output {
        Command::new(&self.programs.gangway)
            .args(args)
            .env("GANGWAY_HOSTS", self.dir.path().join("hosts.toml"))
            .env("GANGWAY_STATE", self.dir.path().join("somebody"))
            .output()
            .unwrap()
    }

    /// Exit code, standard output, standard error, without the journal of who moved the VMs.
    fn verify(&self, hold: &str, more: &[&str]) -> (i32, String, String) {
        let mut args = vec!["verify", hold, "--from", "alpha", "--to", "beta"];
        args.extend(more);
        let out = self.gangway(&args);
        let text = |b: &[u8]| String::from_utf8(b.to_vec()).unwrap();
        (
            out.status.code().unwrap(),
            text(&out.stdout),
            text(&out.stderr),
        )
    }
}

#[test]
fn anybody_can_compare_what_two_hosts_remember() {
    let site = Site::start();
    let path = |name: &str| site.dir.path().join(name);
    let (ledger, pcapng) = (path("both.json"), path("held.pcapng"));
    let files = [
        "--ledger",
        ledger.to_str().unwrap(),
        "--pcapng",
        pcapng.to_str().unwrap(),
    ];

    // Clean.
    let (code, out, err) = site.verify(CLEAN, &files);
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    let first = out.lines().next().unwrap();
    let bytes: usize = (1..=FRAMES).map(|n| frame(n).len()).sum();
    assert_eq!(
        first,
        format!("migration {CLEAN} (moved): 20 frames, {bytes} bytes: clean")
    );
    let stages = "accept,spool,ship,acknowledge,receive,store,flush,deliver";
    assert!(out.contains(stages) && out.contains("yes"), "{out}");
    assert!(!out.contains("NO") && !out.contains("fault"), "{out}");
    let both: Value = serde_json::from_slice(&fs::read(&ledger).unwrap()).unwrap();
    for (end, host, last) in [
        ("source", "alpha", "acknowledge"),
        ("target", "beta", "deliver"),
    ] {
        let end = &both[end];
        assert_eq!(
            (&end["ledger"]["host"], &end["ledger"]["lanes"]),
            (&host.into(), &1.into())
        );
        let lane = &end["lanes"][0];
        let stages = lane["lane"]["stages"].as_array().unwrap();
        assert_eq!(stages.last().unwrap()["stage"], last);
        assert_eq!(stages.last().unwrap()["account"]["frames"], FRAMES);
        let index = lane["index"].as_array().unwrap();
        let lens: Vec<u64> = index
            .iter()
            .flat_map(|b| b["frames"].as_array().unwrap())
            .map(|f| f["len"].as_u64().unwrap())
            .collect();
        assert_eq!(lens, (61..=60 + FRAMES).collect::<Vec<_>>());
        assert_eq!(index[16]["first_seq"], 17);
        assert_eq!(index[16]["time_ns"], TIME + 17);
    }
    let held = fs::read(&pcapng).unwrap();
    for n in 1..=FRAMES {
        let bytes = frame(n);
        let comment = format!("seq {n}\0");
        let at = held.windows(bytes.len()).position(|w| w == bytes);
        let behind = &held[at.unwrap() + bytes.len()..][..20];
        let said = behind
            .windows(comment.len())
            .any(|w| w == comment.as_bytes());
        assert!(said, "frame {n}: {behind:?}");
    }

    // A frame is missing: it is named by its lane and number, and each stage that it did not pass is marked.
    let (code, out, err) = site.verify(LACKS, &[]);
    assert_eq!(code, 1, "{out}{err}");
    assert!(out.starts_with(&format!(
        "migration {LACKS} (moved): 20 frames, {bytes} bytes: NOT CLEAN"
    )));
    let stages = "accept,spool,ship,acknowledge,receive,store!,flush!,deliver!";
    let row = out.lines().find(|l| l.contains(stages));
    assert!(row.is_some_and(|r| r.contains("NO")), "{out}");
    let at = TIME + 17;
    let missing = format!(
        "fault: web0.0 -> db0: beta, store: frame 17: missing (77 bytes, accepted at {at} ns)"
    );
    assert!(out.lines().any(|l| l == missing), "{out}");
    let other = |l: &&str| l.contains(": missing") && *l != missing;
    assert_eq!(out.lines().find(other), None);
    assert!(
        err.starts_with(&format!("gangway: migration {LACKS} is not clean")),
        "{err}"
    );
    let (code, out, _) = site.verify(LACKS, &["-o", "json"]);
    let verdict: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, &verdict["clean"]), (1, &false.into()));
    let faults = verdict["lanes"][0]["faults"].as_array().unwrap();
    let named = |f: &&Value| (&f["first_seq"], &f["last_seq"]) == (&17.into(), &17.into());
    assert!(faults.iter().any(|f| named(&f)), "{verdict}");

    // Put back.
    let (code, out, err) = site.verify(BACK, &[]);
    assert_eq!(code, 0, "{out}{err}");
    assert!(
        out.starts_with(&format!("migration {BACK} (put_back): 20 frames")),
        "{out}"
    );
    assert!(out.contains("accept,spool,flush,deliver"), "{out}");

    // What can't be.
    let (code, _, err) = site.verify(BACK, &["--pcapng", pcapng.to_str().unwrap()]);
    assert_eq!(code, 2, "{err}");
    assert!(err.contains("ledger.frames_bytes"), "{err}");
    let out = site.gangway(&["verify", CLEAN]);
    let err = String::from_utf8(out.stderr).unwrap();
    assert_eq!(out.status.code(), Some(2));
    assert!(
        err.contains("no migration") && err.contains("--from HOST --to HOST"),
        "{err}"
    );
    let (code, _, err) = site.verify(HALF, &[]);
    assert_eq!(code, 5, "{err}");
    assert!(
        err.contains("host beta has no ledger of hold 00000000000000aa (Target)"),
        "{err}"
    );
    site.alpha.kill();
    let (code, _, err) = site.verify(CLEAN, &[]);
    assert_eq!(code, 4, "{err}");
    assert!(
        err.contains("alpha") && err.contains("cannot be reached"),
        "{err}"
    );
}
