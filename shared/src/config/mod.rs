//! The host's configuration file: TOML as people write it ([`raw`]), checked into what the switch uses ([`valid`]).
//!
//! Invariant: every error names the file, the line, the key and what to do; an unknown key is an error.

pub mod raw;
pub mod valid;

pub use valid::HostConfig;
