//! What a switch had taken and not delivered when it died, found by the next one in the keeper's folder.

use std::path::Path;

use super::*;

/// One run of a switch.
struct Run {
    engine: Arc<Engine>,
    ports: Vec<MemoryPort>,
}

/// A folder in memory, as the keeper's is.
fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").expect("a folder in memory")
}

impl Run {
    /// As [`crate::run::Switch`] starts: receivers, what is left, senders. Senders are those of before. Returns also how many frames
    /// were left.
    fn start(dir: &Path, names: &[&str], workers: usize, ports: &[MemoryPort]) -> (Run, usize) {
        let run = Run::start_before(dir, names, workers, ports);
        let left = run.engine.take_up().expect("workers answer");
        run.attach();
        (run, left)
    }

    /// Without what is left, and without senders.
    fn start_before(dir: &Path, names: &[&str], workers: usize, ports: &[MemoryPort]) -> Run {
        let mut cfg = config(names, workers, dir.join("spool"));
        cfg.keeper_dir = Some(dir.to_path_buf());
        let engine = Engine::start(&cfg).expect("workers");
        for (n, p) in ports.iter().enumerate() {
            engine.set_tx(n, vec![(0, p.queues().1)]);
        }
        for n in 1..=names.len() as u8 {
            let at = usize::from(n) - 1;
            engine.shared().fdb.set(mac(n), at, true, 0);
        }
        let ports = ports.to_vec();
        Run { engine, ports }
    }

    fn attach(&self) {
        for (n, p) in self.ports.iter().enumerate() {
            self.engine.attach_rx(n, 0, p.queues().0);
        }
    }

    fn sends(&self, from: usize, to: u8, numbers: std::ops::RangeInclusive<u32>) {
        for n in numbers {
            self.ports[from].push(frame(from as u8 + 1, mac(to), n));
        }
        eventually("they are taken", || self.ports[from].waiting() == 0);
    }
}

fn files(dir: &Path) -> usize {
    std::fs::read_dir(dir.join("backlog"))
        .expect("a folder")
        .count()
}

#[test]
fn what_waits_for_a_receiver_outlives_the_switch() {
    for (before, after) in [(1, 1), (2, 2), (3, 1), (1, 2)] {
        let dir = folder();
        let names = ["a", "b", "c"];
        let ports = [(); 3].map(|()| MemoryPort::default());
        let (w, left) = Run::start(dir.path(), &names, before, &ports);
        assert_eq!(left, 0);
        ports[1].set_room(7);
        w.sends(0, 2, 1..=500);
        w.sends(2, 2, 1..=300);
        eventually("it is full", || ports[1].delivered_count() == 7);
        w.engine.stop();
        drop(w);

        // Once more, and nobody has taken anything meanwhile.
        let (w, left) = Run::start(dir.path(), &names, after, &ports);
        assert_eq!(left, 793, "{before} and {after} workers");
        w.engine.stop();
        drop(w);

        let (w, left) = Run::start(dir.path(), &names, after, &ports);
        assert_eq!(left, 793);
        w.sends(0, 2, 501..=600);
        w.sends(2, 2, 301..=400);
        ports[1].set_room(usize::MAX);
        eventually("all of a", || numbers(&ports[1], 1).len() == 600);
        eventually("all of c", || numbers(&ports[1], 3).len() == 400);
        assert_eq!(numbers(&ports[1], 1), (1..=600).collect::<Vec<_>>());
        assert_eq!(numbers(&ports[1], 3), (1..=400).collect::<Vec<_>>());
        assert!(w.engine.rest(Duration::from_secs(20)).expect("it answers"));
        w.engine.stop();
        drop(w);

        // Nothing is left, also no file.
        let (w, left) = Run::start(dir.path(), &names, after, &ports);
        assert_eq!((left, files(dir.path())), (0, 0));
        assert_eq!(ports[1].delivered_count(), 1000);
        w.engine.stop();
    }
}

#[test]
fn what_cannot_be_delivered_any_more_is_not_in_the_way() {
    let dir = folder();
    let ports = [(); 3].map(|()| MemoryPort::default());
    let (w, _) = Run::start(dir.path(), &["a", "b", "c"], 1, &ports);
    ports[1].set_room(0);
    ports[2].set_room(0);
    w.sends(0, 2, 1..=50);
    w.sends(0, 3, 1..=50);
    w.engine.stop();
    drop(w);
    // Garbage beside it, and a port that is gone.
    let folder = dir.path().join("backlog");
    std::fs::write(folder.join("a~0~a.frames"), [7; 9]).expect("a file");
    std::fs::write(folder.join("whatever"), []).expect("a file");
    let (w, left) = Run::start(dir.path(), &["a", "b", "d"], 1, &ports);
    assert_eq!((left, files(dir.path())), (50, 1));
    ports[1].set_room(usize::MAX);
    eventually("what waited for b", || ports[1].delivered_count() == 50);
    w.engine.stop();
}

#[test]
fn a_lane_that_was_cut_first_takes_what_waited_before() {
    let dir = folder();
    let ports = [(); 2].map(|()| MemoryPort::default());
    let (w, _) = Run::start(dir.path(), &["a", "b"], 1, &ports);
    ports[1].set_room(0);
    w.sends(0, 2, 1..=50);
    w.engine.stop();
    drop(w);
    let (w, left) = Run::start(dir.path(), &["a", "b"], 1, &ports);
    assert_eq!(left, 50);
    // The freeze of a hold: all of it is in the spool, and nothing in the file.
    let spool_dir = tempfile::tempdir().expect("a folder");
    let cfg = config(&["a", "b"], 1, spool_dir.path().into());
    let (spool, _) = Spool::open(&cfg.spool).expect("a spool");
    let key = LaneKey {
        from: "a".into(),
        queue: 0,
        to: "b".into(),
    };
    let (writer, queue) = spool.create(HoldId(1), Kind::Source, &key).expect("room");
    let seat = w.engine.pin().seats(0)[0];
    let out = w.engine.batch(vec![Command::Hold(seat, 1, writer)]);
    assert_eq!(out.expect("it answers").refused, []);
    assert_eq!(queue.last_seq(), 50);
    w.engine.stop();
    drop(w);
    let (w, left) = Run::start(dir.path(), &["a", "b"], 1, &ports);
    assert_eq!(left, 0, "it would come twice");
    w.engine.stop();
}

#[test]
fn what_waited_too_long_without_a_switch_is_not_delivered() {
    let dir = folder();
    let ports = [(); 2].map(|()| MemoryPort::default());
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime).tv_sec;
    for (age_s, want) in [(3, 50), (60, 0)] {
        let (w, _) = Run::start(dir.path(), &["a", "b"], 1, &ports);
        ports[1].set_room(0);
        w.sends(0, 2, 1..=50);
        w.engine.stop();
        drop(w);
        let alive = dir.path().join("backlog/alive");
        std::fs::write(&alive, (now - age_s).to_string()).expect("a file");
        ports[1].set_room(usize::MAX);
        let (w, left) = Run::start(dir.path(), &["a", "b"], 1, &ports);
        assert_eq!(left, want, "{age_s} s");
        assert!(w.engine.rest(Duration::from_secs(20)).expect("it answers"));
        w.engine.stop();
        drop(w);
        std::fs::remove_file(&alive).expect("it stays");
    }
}

/// The spool has room for a part of what waited only: the rest follows as there is room, and nothing newer goes before it.
#[test]
fn what_finds_no_room_behind_a_cut_waits_and_stays_in_front() {
    let dir = folder();
    let ports = [(); 2].map(|()| MemoryPort::default());
    let (w, _) = Run::start(dir.path(), &["a", "b"], 1, &ports);
    ports[1].set_room(0);
    w.sends(0, 2, 1..=5000);
    w.engine.stop();
    drop(w);
    let w = Run::start_before(dir.path(), &["a", "b"], 1, &ports);
    let spool_dir = tempfile::tempdir().expect("a folder");
    let mut cfg = config(&["a", "b"], 1, spool_dir.path().into());
    cfg.spool.segment_bytes = 128 << 10;
    let (spool, _) = Spool::open(&cfg.spool).expect("a spool");
    let key = LaneKey {
        from: "a".into(),
        queue: 0,
        to: "b".into(),
    };
    let (writer, queue) = spool.create(HoldId(1), Kind::Source, &key).expect("room");
    let seat = w.engine.pin().seats(0)[0];
    let out = w.engine.batch(vec![Command::Hold(seat, 1, writer)]);
    assert_eq!(out.expect("it answers").refused, []);
    // As a restart does it: the hold first, then what waited.
    assert_eq!(w.engine.take_up().expect("workers answer"), 5000);
    w.attach();
    for n in 5001..=5100 {
        ports[0].push(frame(1, mac(2), n));
    }
    eventually("all is held", || queue.last_seq() == 5100);
    let mut reader = queue.reader();
    for n in 1..=5100u32 {
        let record = reader.peek().expect("intact").expect("a record");
        assert_eq!(record.frame[20..24], n.to_be_bytes());
        reader.advance();
    }
    assert_eq!(ports[1].delivered_count(), 0, "behind the cut");
    w.engine.stop();
}

#[test]
fn a_lane_that_was_behind_once_gives_its_memory_back() {
    use std::os::unix::fs::MetadataExt;
    let dir = folder();
    let ports = [(); 2].map(|()| MemoryPort::default());
    let (w, _) = Run::start(dir.path(), &["a", "b"], 1, &ports);
    ports[1].set_room(0);
    w.sends(0, 2, 1..=5000);
    let file = dir.path().join("backlog/a~0~b.frames");
    let blocks = || std::fs::metadata(&file).expect("a file").blocks();
    (0..2).for_each(|_| w.engine.trim());
    assert!(blocks() * 512 > 400_000, "all of it waits");
    ports[1].set_room(usize::MAX);
    eventually("all", || ports[1].delivered_count() == 5000);
    assert!(w.engine.rest(Duration::from_secs(20)).expect("it answers"));
    (0..2).for_each(|_| w.engine.trim());
    assert!(blocks() * 512 <= 4096);
    w.engine.stop();
}
