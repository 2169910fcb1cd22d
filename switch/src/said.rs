//! What is said once. Who is refused tries again, many every second: its refusal stands in the log once, and again only after
//! an hour without it. What repeats it is there at level debug.
//!
//! Invariant: bounded, whatever peers do: at most 256 lines an hour, each of at most 500 characters.

use std::collections::HashMap;
use std::fmt::Display;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What has not happened for so long is news.
const FORGET: Duration = Duration::from_secs(3600);
/// Lines that are remembered; what is new beyond them is no news.
const MOST: usize = 256;
/// Of a line. Part of it may be a peer's own words.
const TEXT: usize = 500;

/// Remembers what was said, and when it happened last.
#[derive(Debug, Default)]
pub struct Said(Mutex<HashMap<String, Instant>>);

impl Said {
    /// For what only a peer does that has no business here.
    pub fn warn(&self, peer: impl Display, what: impl Display) {
        match self.line(&peer, &what, Instant::now()) {
            (line, true) => tracing::warn!("{line}"),
            (line, false) => tracing::debug!("{line}"),
        }
    }

    /// For what a peer may ask for and does not get.
    pub fn info(&self, peer: impl Display, what: impl Display) {
        match self.line(&peer, &what, Instant::now()) {
            (line, true) => tracing::info!("{line}"),
            (line, false) => tracing::debug!("{line}"),
        }
    }

    /// The line, and whether it is news.
    fn line(&self, peer: &dyn Display, what: &dyn Display, now: Instant) -> (String, bool) {
        let plain = |c: char| if c.is_control() { ' ' } else { c };
        let text = format!("{peer}: {what}");
        let line: String = text.chars().take(TEXT).map(plain).collect();
        let mut said = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        said.retain(|_, last| now.saturating_duration_since(*last) < FORGET);
        let known = said.contains_key(&line);
        if known || said.len() < MOST {
            said.insert(line.clone(), now);
            return (line, !known);
        }
        (line, false)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::io::Write;
    use std::sync::Once;

    use super::*;

    static LOG: Mutex<Vec<u8>> = Mutex::new(Vec::new());

    struct Log;

    impl Write for Log {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            let mut log = LOG.lock().unwrap_or_else(PoisonError::into_inner);
            log.extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    /// From now on what this process logs (at info and above) can be looked at. All tests in it share the log: each looks
    /// for words that only its own lines have.
    pub(crate) fn listen() {
        static ONCE: Once = Once::new();
        ONCE.call_once(|| {
            tracing_subscriber::fmt()
                .with_ansi(false)
                .with_max_level(tracing::Level::INFO)
                .with_writer(|| Log)
                .init();
        });
    }

    /// The lines so far that have all these words.
    pub(crate) fn logged(words: &[&str]) -> Vec<String> {
        let log = LOG.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let log = String::from_utf8_lossy(&log);
        let has = |line: &&str| words.iter().all(|w| line.contains(w));
        log.lines().filter(has).map(str::to_owned).collect()
    }

    #[test]
    fn a_repetition_is_no_news_until_there_was_none_for_an_hour() {
        let said = Said::default();
        let start = Instant::now();
        let news = |what: &str, s: u64| said.line(&"a", &what, start + Duration::from_secs(s)).1;
        assert!(news("no", 0) && news("not this either", 1));
        for s in [1, 3000, 6000, 9000] {
            assert!(!news("no", s), "{s}");
        }
        assert!(news("no", 12_600));
        assert!(news("not this either", 12_601));
        assert!(!news("no", 12_602));
    }

    #[test]
    fn what_peers_say_is_bounded_and_on_one_line() {
        let said = Said::default();
        let now = Instant::now();
        let (line, _) = said.line(&"a\nb", &"x".repeat(1 << 20), now);
        assert!(line.starts_with("a b: xxx") && line.len() == TEXT, "{line}");
        let news = (0..1000).filter(|n| said.line(&"a", n, now).1).count();
        assert_eq!(news, MOST - 1);
        assert!(said.line(&"a", &1, now + FORGET).1, "there is room again");
    }

    #[test]
    fn the_log_has_it_once() {
        listen();
        let said = Said::default();
        for _ in 0..3 {
            said.warn("the peer of this test", "has no business here");
            said.info("the peer of this test", "may not have this");
        }
        let lines = logged(&["the peer of this test: "]);
        assert_eq!(lines.len(), 2, "{lines:?}");
        assert!(lines[0].contains("WARN") && lines[1].contains("INFO"));
    }
}
