//! What is said once. Who is refused tries again, many every second: its refusal stands in the log once, and again only after
//! an hour without it. What repeats it is there at level debug.
//!
//! Invariant: bounded, whatever peers do: at most 256 different lines an hour, each of at most 500 characters, and one that says that
//! there are more.

use std::collections::HashMap;
use std::fmt::Display;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What has not happened for so long is news.
const FORGET: Duration = Duration::from_secs(3600);
/// Lines that are remembered. What is new beyond them is counted.
const MOST: usize = 256;
/// Of a line. Part of it may be a peer's own words.
const TEXT: usize = 500;

/// Remembers what was said, and when it happened last.
#[derive(Debug, Default)]
pub struct Said(Mutex<Lines>);

#[derive(Debug, Default)]
struct Lines {
    last: HashMap<String, Instant>,
    /// What was new and not shown, since there was room.
    hidden: u64,
}

/// What comes of a line.
#[derive(Debug, PartialEq, Eq)]
struct Verdict {
    line: String,
    /// It is to be seen.
    news: bool,
    /// What is to be said of lines that are not seen.
    more: Option<String>,
}

impl Said {
    /// For what only a peer does that has no business here.
    pub fn warn(&self, peer: impl Display, what: impl Display) {
        let (line, news) = self.told(&peer, &what);
        match news {
            true => tracing::warn!("{line}"),
            false => tracing::debug!("{line}"),
        }
    }

    /// For what a peer may ask for and does not get.
    pub fn info(&self, peer: impl Display, what: impl Display) {
        let (line, news) = self.told(&peer, &what);
        match news {
            true => tracing::info!("{line}"),
            false => tracing::debug!("{line}"),
        }
    }

    fn told(&self, peer: &dyn Display, what: &dyn Display) -> (String, bool) {
        let v = self.verdict(peer, what, Instant::now());
        if let Some(more) = v.more {
            tracing::warn!("{more}");
        }
        (v.line, v.news)
    }

    fn verdict(&self, peer: &dyn Display, what: &dyn Display, now: Instant) -> Verdict {
        let plain = |c: char| if c.is_control() { ' ' } else { c };
        let text = format!("{peer}: {what}");
        let line: String = text.chars().take(TEXT).map(plain).collect();
        let mut said = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        said.last
            .retain(|_, last| now.saturating_duration_since(*last) < FORGET);
        let known = said.last.contains_key(&line);
        let news = !known && said.last.len() < MOST;
        let more = if news && said.hidden > 0 {
            let hidden = std::mem::take(&mut said.hidden);
            Some(format!("{hidden} refusals were not shown until now"))
        } else if !known && !news {
            said.hidden += 1;
            (said.hidden == 1).then(|| {
                format!(
                    "{MOST} different refusals within an hour: what comes on top is not shown but counted; see who comes to \
                     control.listen, or log at level debug"
                )
            })
        } else {
            None
        };
        if known || news {
            said.last.insert(line.clone(), now);
        }
        Verdict { line, news, more }
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
        let news = |what: &str, s: u64| {
            let v = said.verdict(&"a", &what, start + Duration::from_secs(s));
            assert_eq!(v.more, None);
            v.news
        };
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
        let line = said.verdict(&"a\nb", &"x".repeat(1 << 20), now).line;
        assert!(line.starts_with("a b: xxx") && line.len() == TEXT, "{line}");
        let all: Vec<_> = (0..1000).map(|n| said.verdict(&"a", &n, now)).collect();
        assert!(all[..MOST - 1].iter().all(|v| v.news && v.more.is_none()));
        // From here on they are not seen, which is said, once.
        assert!(all[MOST - 1..].iter().all(|v| !v.news));
        let more: Vec<_> = all.iter().filter_map(|v| v.more.as_ref()).collect();
        assert_eq!(more, [all[MOST - 1].more.as_ref().unwrap()]);
        assert!(more[0].contains("256 different refusals"), "{more:?}");
        // What is known takes no room, and is not counted.
        assert_eq!(said.verdict(&"a", &1, now).more, None);
        let later = said.verdict(&"a", &1, now + FORGET);
        assert!(later.news, "there is room again");
        let hidden = 1000 - (MOST - 1);
        let told = format!("{hidden} refusals were not shown until now");
        assert_eq!(later.more, Some(told));
        assert_eq!(said.verdict(&"a", &2, now + FORGET).more, None);
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
