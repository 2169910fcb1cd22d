//! Moving a group: the table of steps, the machine that walks it, and the shells that act.
//!
//! Invariant: [`steps`], [`orders`], [`machine`], [`brink`] and [`report`] are pure: no clock, no socket, no file.

pub mod act;
pub mod brink;
pub mod journal;
pub mod look;
pub mod machine;
pub mod orders;
pub mod plan;
pub mod report;
pub mod run;
pub mod steps;
pub mod undo;
