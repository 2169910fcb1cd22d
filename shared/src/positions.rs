//! How a keeper knows whether a switch has noted where rings are, in the file beside its socket
//! ([`crate::config::HostConfig::kept_positions`]). What else is in the file is the switch's alone.

/// What a file begins with, at [`AT`]. One of a switch that noted nothing of packed rings has another one.
pub const MAGIC: [u8; 8] = *b"GWposn02";
/// Bytes before it.
pub const AT: usize = 256;

/// Whether these are the first bytes of a file with notes of packed rings.
pub fn has_packed(start: &[u8]) -> bool {
    start.get(AT..).is_some_and(|rest| rest.starts_with(&MAGIC))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_file_of_this_kind_has_them() {
        let mut file = vec![0; AT];
        assert!(!has_packed(&file) && !has_packed(&[]));
        file.extend(*b"GWposn01");
        assert!(!has_packed(&file));
        file.truncate(AT);
        file.extend(MAGIC);
        assert!(has_packed(&file));
    }
}
