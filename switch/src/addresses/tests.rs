//! With real FDBs; the restart of a whole switch is in `run.rs`, that of a hold in `hold/tests`.

use super::*;
use crate::datapath::Engine;
use crate::datapath::tests::{config, mac};

const NOW: Now = Now {
    boot: [7; 16],
    at_s: 1000,
};

struct Host {
    cfg: HostConfig,
    engine: Arc<Engine>,
    addresses: Arc<Addresses>,
}

impl Drop for Host {
    fn drop(&mut self) {
        self.engine.stop();
    }
}

fn host(dir: &Path, edit: impl FnOnce(&mut HostConfig)) -> Host {
    let mut cfg = config(&["a", "b", "up"], 1, dir.to_owned());
    edit(&mut cfg);
    let engine = Engine::start(&cfg).unwrap();
    let addresses = Addresses::new(&cfg, engine.shared().clone());
    Host {
        cfg,
        engine,
        addresses,
    }
}

impl Host {
    fn fdb(&self) -> &crate::datapath::fdb::Fdb {
        &self.engine.shared().fdb
    }

    fn at(&self, n: u8) -> Option<usize> {
        self.fdb().lookup(mac(n), self.engine.shared().now_s())
    }

    fn kept(&self, ages: &[(u8, u16, u32)]) -> Kept {
        let address = |&(n, port, age_s): &(u8, u16, u32)| KeptAddress {
            mac: mac(n),
            port,
            age_s,
        };
        Kept {
            boot: NOW.boot,
            at_s: NOW.at_s,
            ports: self.addresses.ports.clone(),
            addresses: ages.iter().map(address).collect(),
        }
    }
}

#[test]
fn what_one_run_learned_the_next_one_knows_at_ports_of_the_same_name() {
    let dir = tempfile::tempdir().unwrap();
    let first = host(dir.path(), |_| ());
    first.fdb().learn(mac(1), 0, 0);
    first.fdb().learn(mac(2), 2, 0);
    first.fdb().set(mac(3), 1, true, 0);
    first.addresses.save();
    let next = host(dir.path(), |cfg| cfg.ports.reverse());
    next.addresses.take_up();
    assert_eq!(
        [1, 2, 3].map(|n| next.at(n)),
        [Some(2), Some(0), Some(1)],
        "their numbers have changed"
    );
    next.fdb().learn(mac(3), 0, 1);
    assert_eq!(next.at(3), Some(0), "none of them is fixed");
}

#[test]
fn ages_go_on_while_no_switch_runs() {
    let dir = tempfile::tempdir().unwrap();
    let h = host(dir.path(), |_| ());
    let kept = h.kept(&[(1, 0, 0), (2, 0, 289), (3, 0, 291), (4, 0, u32::MAX)]);
    let taken = h.addresses.take(&kept, NOW.at_s + 10);
    assert_eq!((taken.known, taken.aged), (2, 2));
    let now = h.engine.shared().now_s();
    assert_eq!(h.fdb().lookup(mac(2), now + 1), Some(0));
    assert_eq!(h.fdb().lookup(mac(2), now + 2), None);
    let taken = h.addresses.take(&h.kept(&[(5, 0, 0)]), NOW.at_s - 1);
    assert_eq!(taken.aged, 1, "a clock that went back");
}

#[test]
fn configuration_ports_and_what_is_known_are_right_and_the_file_is_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let h = host(dir.path(), |cfg| {
        cfg.ports[1].mac = Some(mac(2));
        cfg.ports[0].vm = Some("web".into());
    });
    let shared = h.engine.shared();
    h.fdb().set(mac(1), 1, true, 0);
    let kept = h.kept(&[(1, 0, 0), (2, 2, 0), (3, 0, 0), (4, 1, 0)]);
    let taken = h.addresses.take(&kept, NOW.at_s);
    assert_eq!((taken.known, taken.overruled), (2, 2));
    assert_eq!(
        [1, 2, 3, 4].map(|n| h.at(n)),
        [Some(1), None, Some(0), Some(1)]
    );

    let mut other = h.kept(&[(5, 0, 0), (6, 1, 0)]);
    other.ports[0].vm = Some("another".into());
    other.ports[1].name = "renamed".into();
    assert_eq!(h.addresses.take(&other, NOW.at_s).gone, 2);

    shared.ports[0].set_mode(Mode::Departed);
    let taken = h.addresses.take(&h.kept(&[(7, 0, 0)]), NOW.at_s);
    assert_eq!(taken.overruled, 1, "a VM that a hold says is elsewhere");
    let group = KeptAddress {
        mac: gangway_shared::id::MacAddr::BROADCAST,
        port: 1,
        age_s: 0,
    };
    let mut bad = h.kept(&[]);
    bad.addresses = vec![group];
    assert_eq!(h.addresses.take(&bad, NOW.at_s).known, 0);
}

#[test]
fn another_boots_file_and_a_damaged_one_cost_flooding_only() {
    let dir = tempfile::tempdir().unwrap();
    let h = host(dir.path(), |_| ());
    h.fdb().learn(mac(1), 0, 0);
    h.addresses.save();
    let path = h.cfg.state_dir.join(FILE);
    let here = Now::read().unwrap();
    let next = host(dir.path(), |_| ());
    let rebooted = Now {
        boot: [9; 16],
        ..here
    };
    assert_eq!(next.addresses.read(rebooted), Ok(None));
    let good = fs::read(&path).unwrap();
    for damage in [&good[..good.len() - 1], b"", &[0xff; 4096]] {
        fs::write(&path, damage).unwrap();
        assert!(next.addresses.read(here).is_err());
        next.addresses.take_up();
        assert_eq!(next.at(1), None);
    }
    fs::write(&path, &good).unwrap();
    next.addresses.take_up();
    assert_eq!(next.at(1), Some(0));
}

#[test]
fn a_file_that_cannot_be_written_is_not_left_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let h = host(dir.path(), |_| ());
    h.fdb().learn(mac(1), 0, 0);
    h.addresses.save();
    let path = h.cfg.state_dir.join(FILE);
    assert!(path.exists());
    // In the way of the new one.
    fs::create_dir_all(path.with_extension("new")).unwrap();
    h.addresses.save();
    assert!(!path.exists(), "what may not be so any more");
    fs::remove_dir(path.with_extension("new")).unwrap();
    h.addresses.save();
    assert!(path.exists());
}

#[test]
fn the_file_follows_the_table_and_is_left_alone_when_nothing_is_new() {
    let dir = tempfile::tempdir().unwrap();
    let h = host(dir.path(), |_| ());
    let following = h.addresses.follow().unwrap();
    h.fdb().learn(mac(1), 0, 0);
    let path = h.cfg.state_dir.join(FILE);
    let says = |n: usize| {
        let kept = fs::read(&path).ok().map(|b| format::decode(&b).unwrap());
        kept.is_some_and(|k| k.addresses.len() == n)
    };
    crate::datapath::tests::eventually("it is written", || says(1));
    // Seen again: an age, which is no change.
    h.fdb().learn(mac(1), 0, 1);
    assert!(!h.fdb().has_changed());
    h.fdb().learn(mac(2), 0, 1);
    crate::datapath::tests::eventually("so is the next one", || says(2));
    h.fdb().forget_port(0);
    following.end();
    assert!(says(0), "a last time at the end");
}
