//! A loss of power on a real file system: ext4 on a loop device, whose backing file is what the device has. A copy of it,
//! with its journal replayed, is what the next start finds. As root; in a mount namespace of its own, so that nothing
//! stays mounted whatever becomes of the test.

use std::process::Command;

use super::*;

const INNER: &str = "GANGWAY_TEST_POWER";
const SEGMENT: u64 = 128 << 10;
/// In more segments than lie ready, so that some are used once more.
const FRAMES: u64 = 4000;

fn run(program: &str, args: &[&str]) {
    let out = Command::new(program).args(args).output();
    let out = out.unwrap_or_else(|e| panic!("{program}: {e}; needs e2fsprogs and mount"));
    assert!(out.status.success(), "{program} {args:?}, as root: {out:?}");
}

/// Mounted, until it is dropped; then its loop device is free, too.
struct Mount(std::path::PathBuf);

impl Mount {
    fn new(image: &Path, at: &Path) -> Mount {
        std::fs::create_dir_all(at).unwrap();
        let (from, to) = (image.to_str().unwrap(), at.to_str().unwrap());
        // Nothing is written but what is asked for.
        run(
            "mount",
            &[
                "-t",
                "ext4",
                "-o",
                "loop,commit=300,noauto_da_alloc",
                from,
                to,
            ],
        );
        Mount(at.to_path_buf())
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let at = self.0.to_str().unwrap_or_default();
        let done = Command::new("umount").args(["-l", at]).status();
        assert!(std::thread::panicking() || done.is_ok_and(|s| s.success()));
    }
}

/// Runs this test again, in a mount namespace of its own.
fn alone(name: &str, inner: impl FnOnce(&Path)) {
    if let Ok(dir) = std::env::var(INNER) {
        inner(Path::new(&dir));
        println!("power lost");
        return;
    }
    let dir = tmp();
    let name = format!("spool::tests::power::{name}");
    let out = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "--"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "--nocapture", &name])
        .env(INNER, dir.path())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&out.stdout);
    assert!(
        out.status.success() && text.contains("power lost"),
        "this needs root, loop devices and ext4: {text} {}",
        String::from_utf8_lossy(&out.stderr)
    );
}

/// What is on the device at this moment, taken up by the next start.
fn is_there(image: &Path, durable: u64, what: &str) {
    let dir = tmp();
    let copy = dir.path().join("copy");
    std::fs::copy(image, &copy).unwrap();
    let mount = Mount::new(&copy, &dir.path().join("mnt"));
    let cfg = config(&mount.0.join("spool"), SEGMENT, 64 * SEGMENT);
    let (spool, found) = Spool::open(&cfg).unwrap();
    let f = found.iter().find(|f| f.queue.hold() == HOLD).expect(what);
    let (seqs, bad) = all(&f.queue);
    assert!(
        seqs.iter().copied().take(durable as usize).eq(1..=durable),
        "{what}: {} of {durable}, {bad:?}",
        seqs.len()
    );
    assert!(bad.iter().all(|d| d.first_seq > durable), "{what}: {bad:?}");
    drop((found, spool));
}

/// A hold before this one has used the segments: what is written to one again changes nothing of the file system's own.
fn used(spool: &Spool) {
    let (mut w, q) = spool.create(HoldId(1), Kind::Source, &lane(0)).unwrap();
    for n in 0..FRAMES {
        put(&mut w, n, 700);
        w.commit();
    }
    q.sync().unwrap();
    drop((w, q));
    spool.remove_hold(HoldId(1)).unwrap();
    until(|| spool.used_bytes() == 0);
}

fn lost_power(dir: &Path, sync: Sync) {
    let image = dir.join("image");
    let file = std::fs::File::create(&image).unwrap();
    file.set_len(64 << 20).unwrap();
    run("mkfs.ext4", &["-q", "-F", image.to_str().unwrap()]);
    let mount = Mount::new(&image, &dir.join("mnt"));
    let mut cfg = config(&mount.0.join("spool"), SEGMENT, 64 * SEGMENT);
    cfg.sync = sync;
    let (spool, _) = Spool::open(&cfg).unwrap();
    used(&spool);
    let (mut w, q) = spool.create(HOLD, Kind::Source, &lane(0)).unwrap();
    // As when a hold is opened.
    q.sync().unwrap();
    for n in 0..FRAMES {
        put(&mut w, n, 700);
        w.commit();
        // A segment or so later.
        if n % 200 == 199 {
            match sync {
                Sync::Each => until(|| w.owed().is_none_or(|o| o.is_settled())),
                // As a freeze does.
                _ => q.sync().unwrap(),
            }
            assert_eq!(q.durable_seq(), n + 1);
            if n % 1000 == 999 {
                is_there(&image, n + 1, &format!("{sync:?} at {n}"));
            }
        }
    }
    w.seal();
    q.sync().unwrap();
    is_there(&image, FRAMES, "sealed");
    drop((w, q, spool));
}

#[test]
fn a_loss_of_power_takes_nothing_that_batch_has_forced() {
    let name = "a_loss_of_power_takes_nothing_that_batch_has_forced";
    alone(name, |dir| lost_power(dir, Sync::Batch));
}

#[test]
fn a_loss_of_power_takes_nothing_that_each_has_let_go() {
    let name = "a_loss_of_power_takes_nothing_that_each_has_let_go";
    alone(name, |dir| lost_power(dir, Sync::Each));
}
