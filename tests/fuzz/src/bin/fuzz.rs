//! Looks for inputs that reach new code, with libFuzzer: `gangway-fuzz TARGET SECONDS [OPTION]...`, or `gangway-fuzz pack`,
//! which puts those that are needed to reach what was reached into the corpus (Makefile: `make fuzz`).
#![allow(unsafe_code)]

use std::ffi::{CString, c_char, c_int};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::OnceLock;

use gangway_fuzz::{TARGETS, Target, corpus, target};
// For the library that comes with it.
use libfuzzer_sys as _;

static CHOSEN: OnceLock<Target> = OnceLock::new();

unsafe extern "C" {
    /// libFuzzer's own main function.
    fn LLVMFuzzerRunDriver(
        argc: *mut c_int,
        argv: *mut *mut *mut c_char,
        test: unsafe extern "C" fn(*const u8, usize) -> c_int,
    ) -> c_int;
}

/// What the driver runs, with `len` bytes at `data`.
unsafe extern "C" fn test(data: *const u8, len: usize) -> c_int {
    let bytes = match len {
        0 => &[],
        // SAFETY: the driver's input, which nobody changes meanwhile.
        _ => unsafe { std::slice::from_raw_parts(data, len) },
    };
    if let Some(target) = CHOSEN.get() {
        target(bytes);
    }
    0
}

/// The crate's own entry, which [`test`] takes the place of.
// SAFETY: the name is this program's alone.
#[unsafe(no_mangle)]
#[allow(improper_ctypes_definitions)]
extern "C" fn rust_fuzzer_test_input(_: &[u8]) -> c_int {
    0
}

fn folder(name: &str) -> PathBuf {
    PathBuf::from("target/fuzz").join(name)
}

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let name = args.next().unwrap_or_default();
    let done = match (name.as_str(), target(&name)) {
        ("pack", _) => pack().map(|()| 0),
        (_, Some(target)) => {
            let seconds = args.next().unwrap_or_else(|| "60".into());
            let options = args.chain([format!("-max_total_time={seconds}")]);
            search(&name, target, options.collect()).map(|code| code as u8)
        }
        _ => Err(std::io::Error::other(format!(
            "usage: gangway-fuzz pack | TARGET SECONDS [OPTION]...; targets: {}",
            TARGETS.map(|t| t.0).join(" ")
        ))),
    };
    match done {
        Ok(code) => ExitCode::from(code),
        Err(e) => {
            eprintln!("{e}");
            ExitCode::FAILURE
        }
    }
}

fn search(name: &str, target: Target, options: Vec<String>) -> std::io::Result<c_int> {
    let dir = folder(name);
    std::fs::create_dir_all(&dir)?;
    for (n, (_, bytes)) in corpus::read(name).unwrap_or_default().iter().enumerate() {
        std::fs::write(dir.join(format!("kept-{n}")), bytes)?;
    }
    let _ = CHOSEN.set(target);
    // A panic is a finding, in whatever thread.
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        print(info);
        std::process::abort();
    }));
    // For a merge the driver has a shell run its first argument, with options behind it: this search again.
    let again = format!("{} {name} 0", std::env::current_exe()?.display());
    let args = [
        again,
        format!("-artifact_prefix={}-", dir.display()),
        "-max_len=4096".into(),
        // Inputs are sequences of steps: a short one goes nowhere.
        "-len_control=10".into(),
        "-timeout=10".into(),
        "-rss_limit_mb=4096".into(),
        "-print_final_stats=1".into(),
    ];
    let args = args
        .into_iter()
        .chain(options)
        .chain([dir.display().to_string()]);
    let args: Vec<CString> = args.map(|a| CString::new(a).unwrap_or_default()).collect();
    let mut pointers: Vec<*mut c_char> = args.iter().map(|a| a.as_ptr().cast_mut()).collect();
    let mut count = pointers.len() as c_int;
    pointers.push(std::ptr::null_mut());
    let mut argv = pointers.as_mut_ptr();
    // SAFETY: an argument vector as main gets it, of strings that live as long as this call.
    Ok(unsafe { LLVMFuzzerRunDriver(&mut count, &mut argv, test) })
}

/// Bytes of the inputs of a target that are kept, the shortest first: the corpus is replayed by each `cargo test`.
const KEPT_BYTES: usize = 6 << 10;

/// Of each target that was searched: what is said of an input stays; of the others those that are needed.
fn pack() -> std::io::Result<()> {
    for (name, _) in TARGETS {
        let dir = folder(name);
        if !dir.exists() {
            continue;
        }
        let least = folder(&format!("{name}-least"));
        let _ = std::fs::remove_dir_all(&least);
        std::fs::create_dir_all(&least)?;
        let merge = Command::new(std::env::current_exe()?)
            .args([name, "0", "-set_cover_merge=1"])
            .arg(&least)
            .status()?;
        if !merge.success() {
            return Err(std::io::Error::other(format!("{name}: merge: {merge}")));
        }
        let mut inputs = corpus::read(name).unwrap_or_default();
        inputs.retain(|i| !i.0.is_empty());
        let mut room = KEPT_BYTES;
        let fits = |b: &Vec<u8>| {
            room = room.checked_sub(b.len())?;
            Some((String::new(), b.clone()))
        };
        inputs.extend(files(&least)?.iter().map_while(fits));
        corpus::write(name, &inputs)?;
        eprintln!("{name}: {} inputs", inputs.len());
    }
    Ok(())
}

/// Their contents, shortest first.
fn files(dir: &Path) -> std::io::Result<Vec<Vec<u8>>> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        all.push(std::fs::read(entry?.path())?);
    }
    all.sort_by_key(|b| (b.len(), b.clone()));
    all.dedup();
    Ok(all)
}
