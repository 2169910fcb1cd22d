//! Against a plain model: every order that is claimed must follow every edge that is not part of a circle.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

fn info(from: &str, to: &str, payload: u64) -> LinkInfo {
    LinkInfo {
        from: format!("{from}-p"),
        from_vm: Some(from.to_owned()),
        to: format!("{to}-p"),
        to_vm: Some(to.to_owned()),
        frames: 1,
        bytes: payload,
        payload_bytes: payload,
        idle_ms: 0,
    }
}

#[test]
fn a_chain_goes_from_producer_to_consumer() {
    let vms = ["c", "m", "p"].into();
    let p = plan(
        &vms,
        &[
            info("p", "m", 1000),
            info("m", "p", 10),
            info("m", "c", 900),
            info("c", "m", 9),
            info("x", "p", 99),
        ],
    );
    assert_eq!(p.order, ["p", "m", "c"]);
    assert_eq!(p.links[0].net_bytes, 891);
    assert!(p.cycles.is_empty() && p.unconnected.is_empty());
    assert_eq!(p.why[0], "1. p: sends 990 bytes net to m");
    let o = p
        .clone()
        .overridden(&["c".into(), "m".into(), "p".into()])
        .expect("a permutation");
    assert!(o.why[0].contains("against this order"));
    assert!(p.overridden(&["c".into(), "c".into(), "p".into()]).is_err());
}

#[test]
fn a_circle_is_condensed_and_ordered_by_net_flow() {
    let vms = ["a", "b", "c", "z"].into();
    let p = plan(
        &vms,
        &[
            info("a", "b", 5),
            info("b", "c", 50),
            info("c", "a", 10),
            info("z", "a", 1),
        ],
    );
    assert_eq!(p.order, ["z", "b", "a", "c"]);
    assert_eq!(p.cycles, [["b", "a", "c"]]);
}

#[test]
fn lonely_vms_are_named() {
    let vms = ["a", "b"].into();
    let p = plan(&vms, &[]);
    assert_eq!(p.unconnected, ["a", "b"]);
    assert!(draw::text(&p).contains("not connected"));
}

proptest! {
    #[test]
    fn the_order_is_a_permutation_and_follows_every_acyclic_edge(
        flows in prop::collection::vec((0usize..7, 0usize..7, 0u64..20), 0..30),
        seed in any::<u64>(),
    ) {
        let names = ["a", "b", "c", "d", "e", "f", "g"];
        let vms: BTreeSet<&str> = names.into();
        let mut infos: Vec<LinkInfo> = flows.iter().map(|&(a, b, n)| info(names[a], names[b], n)).collect();
        let p = plan(&vms, &infos);

        // The model: net flows by plain sums, reachability by Floyd and Warshall.
        let mut net: BTreeMap<(usize, usize), i64> = BTreeMap::new();
        for &(a, b, n) in &flows {
            if a != b {
                *net.entry((a, b)).or_default() += n as i64;
                *net.entry((b, a)).or_default() -= n as i64;
            }
        }
        let mut reach = [[false; 7]; 7];
        for (&(a, b), &n) in &net {
            reach[a][b] = n > 0;
        }
        for k in 0..7 {
            for i in 0..7 {
                for j in 0..7 {
                    reach[i][j] |= reach[i][k] && reach[k][j];
                }
            }
        }
        let place = |i: usize| p.order.iter().position(|o| o == names[i]).expect("in the order");
        prop_assert_eq!(p.order.iter().map(String::as_str).collect::<BTreeSet<_>>(), vms.clone());
        prop_assert_eq!(p.order.len(), 7);
        for i in 0..7 {
            for j in 0..7 {
                if reach[i][j] && !reach[j][i] {
                    prop_assert!(place(i) < place(j), "{} before {} in {:?}", names[i], names[j], p.order);
                }
                let together = p.cycles.iter().any(|c| c.contains(&names[i].to_owned()) && c.contains(&names[j].to_owned()));
                if i != j {
                    prop_assert_eq!(together, reach[i][j] && reach[j][i]);
                }
            }
        }
        // The sequence of the links does not matter.
        if !infos.is_empty() {
            let n = infos.len();
            infos.rotate_left((seed as usize) % n);
            prop_assert_eq!(plan(&vms, &infos), p);
        }
    }
}
