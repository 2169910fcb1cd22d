//! The lab of real VMs: what runs in the guests ([`workload`]) what builds two hosts around them ([`lab`]),
//! and what breaks them at every step of a migration ([`chaos`]).

#[cfg(feature = "lab")]
pub mod chaos;
#[cfg(feature = "lab")]
pub mod lab;
pub mod workload;
