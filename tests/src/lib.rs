//! The lab of real VMs: what runs in the guests ([`workload`]) and what builds two hosts around them ([`lab`]).

#[cfg(feature = "lab")]
pub mod lab;
pub mod workload;
