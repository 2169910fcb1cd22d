//! The plan as a picture.
//!
//! Names are quoted for each format, so that a VM's name cannot break the drawing.

use std::fmt::Write as _;

use super::Plan;
use crate::table::bytes;

/// For people.
pub fn text(plan: &Plan) -> String {
    let mut out = format!(
        "order: {}{}\n",
        plan.order.join(" -> "),
        if plan.overridden {
            " (given by --order)"
        } else {
            ""
        }
    );
    for line in &plan.why {
        let _ = writeln!(out, "  {line}");
    }
    for l in &plan.links {
        let _ = writeln!(
            out,
            "link: {} -> {}: {} there, {} back, net {}",
            l.from,
            l.to,
            bytes(l.payload_bytes),
            bytes(l.back_bytes),
            bytes(l.net_bytes)
        );
    }
    for c in &plan.cycles {
        let _ = writeln!(
            out,
            "circle: {} depend on each other; ordered by net flow",
            c.join(", ")
        );
    }
    if plan.order.len() == 1 {
        let _ = writeln!(
            out,
            "note: a group of one VM: nothing inside to hold, its links to others are held at the switchover"
        );
    } else if !plan.unconnected.is_empty() {
        let _ = writeln!(
            out,
            "note: not connected with the rest of the group: {}",
            plan.unconnected.join(", ")
        );
    }
    out
}

/// Graphviz.
pub fn dot(plan: &Plan) -> String {
    let q = |s: &str| format!("\"{}\"", s.replace('\\', "\\\\").replace('"', "\\\""));
    let mut out = "digraph plan {\n  rankdir=LR;\n  node [shape=box];\n".to_owned();
    for (i, vm) in plan.order.iter().enumerate() {
        let _ = writeln!(
            out,
            "  {} [label={}];",
            q(vm),
            q(&format!("{}. {vm}", i + 1))
        );
    }
    for l in &plan.links {
        let style = if l.net_bytes == 0 { ", dir=both" } else { "" };
        let _ = writeln!(
            out,
            "  {} -> {} [label={}{style}];",
            q(&l.from),
            q(&l.to),
            q(&bytes(l.net_bytes))
        );
    }
    out + "}\n"
}

/// Mermaid.
pub fn mermaid(plan: &Plan) -> String {
    let place = |vm: &str| plan.order.iter().position(|o| o == vm).unwrap_or(0);
    let q = |s: &str| s.replace('"', "#quot;");
    let mut out = "flowchart LR\n".to_owned();
    for (i, vm) in plan.order.iter().enumerate() {
        let _ = writeln!(out, "  v{i}[\"{}. {}\"]", i + 1, q(vm));
    }
    for l in &plan.links {
        let arrow = if l.net_bytes == 0 { "<-->" } else { "-->" };
        let _ = writeln!(
            out,
            "  v{} {arrow}|\"{}\"| v{}",
            place(&l.from),
            bytes(l.net_bytes),
            place(&l.to)
        );
    }
    out
}

/// A small picture: the VMs in order from left to right, links as arcs; those against the order below.
pub fn svg(plan: &Plan) -> String {
    let q = |s: &str| {
        s.replace('&', "&amp;")
            .replace('<', "&lt;")
            .replace('"', "&quot;")
    };
    let place = |vm: &str| plan.order.iter().position(|o| o == vm).unwrap_or(0);
    let x = |i: usize| 90 + 180 * i as i64;
    let width = 180 * plan.order.len().max(1) as i64;
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"240\" font-family=\"sans-serif\" font-size=\"13\">\n\
         <defs><marker id=\"a\" viewBox=\"0 0 8 8\" refX=\"8\" refY=\"4\" markerWidth=\"7\" markerHeight=\"7\" orient=\"auto\"><path d=\"M0 0L8 4L0 8z\"/></marker></defs>\n"
    );
    for l in &plan.links {
        let (a, b) = (place(&l.from), place(&l.to));
        let (side, label_side) = if a < b { (100, -1) } else { (140, 1) };
        let bend = side + label_side * (20 + 25 * a.abs_diff(b) as i64);
        let _ = writeln!(
            out,
            "<path d=\"M{} {side}Q{} {bend} {} {side}\" fill=\"none\" stroke=\"black\" marker-end=\"url(#a)\"/>\
             <text x=\"{}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
            x(a),
            (x(a) + x(b)) / 2,
            x(b),
            (x(a) + x(b)) / 2,
            (side + bend) / 2 + label_side * 6,
            bytes(l.net_bytes)
        );
    }
    for (i, vm) in plan.order.iter().enumerate() {
        let _ = writeln!(
            out,
            "<rect x=\"{}\" y=\"100\" width=\"140\" height=\"40\" rx=\"6\" fill=\"#eef\" stroke=\"black\"/>\
             <text x=\"{}\" y=\"125\" text-anchor=\"middle\">{}. {}</text>",
            x(i) - 70,
            x(i),
            i + 1,
            q(vm)
        );
    }
    out + "</svg>\n"
}
