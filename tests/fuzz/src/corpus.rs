//! The inputs of a target: `corpus/<target>.hex`, one a line; a line that starts with `#` says what the next one is for.

use std::io;
use std::path::PathBuf;

/// The file of a target's inputs.
pub fn file(target: &str) -> PathBuf {
    let here = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    here.join("corpus").join(target).with_extension("hex")
}

/// The inputs, each with what is said about it.
///
/// # Errors
/// If the file cannot be read, or a line is not hexadecimal.
pub fn read(target: &str) -> io::Result<Vec<(String, Vec<u8>)>> {
    let text = std::fs::read_to_string(file(target))?;
    let mut out = Vec::new();
    let mut about = String::new();
    for line in text.lines() {
        match line.strip_prefix("# ") {
            Some(said) => about = said.to_owned(),
            None => {
                let bytes = hex::decode(line).map_err(io::Error::other)?;
                out.push((std::mem::take(&mut about), bytes));
            }
        }
    }
    Ok(out)
}

/// Writes them back: first those of which something is said.
///
/// # Errors
/// If the file cannot be written.
pub fn write(target: &str, inputs: &[(String, Vec<u8>)]) -> io::Result<()> {
    let mut text = String::new();
    for (about, bytes) in inputs.iter().filter(|i| !i.0.is_empty()) {
        text += &format!("# {about}\n{}\n", hex::encode(bytes));
    }
    for (_, bytes) in inputs.iter().filter(|i| i.0.is_empty()) {
        text += &format!("{}\n", hex::encode(bytes));
    }
    std::fs::write(file(target), text)
}
