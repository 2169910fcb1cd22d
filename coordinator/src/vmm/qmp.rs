//! A client of QEMU's machine protocol over any stream (QEMU's docs/interop/qmp-spec.txt).
//!
//! Commands are numbered, so any number may be under way; events are kept with QEMU's own time stamps.
//! Invariant: nothing that the peer sends makes it panic or grow without bound.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{
    AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, BufReader,
};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::time::timeout;

/// Time for a command.
const COMMAND: Duration = Duration::from_secs(10);
/// The longest line that is accepted; `query-qmp-schema` has 200 kB.
const LINE_MAX: u64 = 4 << 20;
/// So many events are remembered.
const EVENTS_MAX: usize = 4096;

/// What went wrong, and whose fault it is.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QmpError {
    /// Nothing but silence: QEMU serves one client at a time.
    #[error("QMP sends no greeting: another client holds it, or QEMU hangs")]
    NoGreeting,
    /// QEMU says no.
    #[error("QEMU refuses {command}: {desc}")]
    Refused {
        /// The command.
        command: String,
        /// QEMU's words.
        desc: String,
    },
    /// The stream has ended.
    #[error("the QMP connection is gone: {0}")]
    Gone(String),
    /// No answer.
    #[error("QEMU did not answer {0} in time")]
    Late(String),
    /// Not QMP.
    #[error("the peer does not speak QMP: {0}")]
    Protocol(String),
}

/// An asynchronous message of QEMU.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// `STOP`, `RESUME`, `MIGRATION`, ...
    pub name: String,
    /// QEMU's clock, nanoseconds since the Unix epoch (microseconds' precision).
    pub at_ns: u64,
    /// What belongs to it.
    pub data: Value,
}

/// A connection that has negotiated its capabilities. Cheap to clone.
#[derive(Clone)]
pub struct Qmp {
    shared: Arc<Shared>,
    lines: mpsc::UnboundedSender<String>,
    /// Ends reader and writer, and with them the connection, when the last clone goes.
    _tasks: Arc<Tasks>,
}

struct Tasks(Vec<tokio::task::AbortHandle>);

impl Drop for Tasks {
    fn drop(&mut self) {
        for t in &self.0 {
            t.abort();
        }
    }
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    news: Notify,
}

#[derive(Default)]
struct State {
    next_id: u64,
    waiting: HashMap<u64, oneshot::Sender<Result<Value, String>>>,
    events: VecDeque<Event>,
    /// Number of events that were forgotten.
    forgotten: usize,
    gone: Option<String>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn gone(&self, why: &str) {
        let mut s = self.state();
        s.gone.get_or_insert_with(|| why.to_owned());
        s.waiting.clear();
        drop(s);
        self.news.notify_waiters();
    }

    fn take(&self, line: &str) {
        let Ok(mut v) = serde_json::from_str::<Value>(line) else {
            return self.gone("it sent a line that is not JSON");
        };
        if let Some(name) = v.get("event").and_then(Value::as_str) {
            let stamp = |k: &str| {
                v.pointer(&format!("/timestamp/{k}"))
                    .and_then(Value::as_u64)
                    .unwrap_or(0)
            };
            let at_ns = stamp("seconds")
                .saturating_mul(1_000_000_000)
                .saturating_add(stamp("microseconds").saturating_mul(1000));
            let event = Event {
                name: name.to_owned(),
                at_ns,
                data: v["data"].take(),
            };
            let mut s = self.state();
            if s.events.len() == EVENTS_MAX {
                s.events.pop_front();
                s.forgotten += 1;
            }
            s.events.push_back(event);
            drop(s);
            self.news.notify_waiters();
        } else if let Some(waiter) = v
            .get("id")
            .and_then(Value::as_u64)
            .and_then(|id| self.state().waiting.remove(&id))
        {
            let answer = match v.pointer("/error/desc").and_then(Value::as_str) {
                Some(desc) => Err(desc.to_owned()),
                None => Ok(v["return"].take()),
            };
            // The caller may have given up.
            let _ = waiter.send(answer);
        }
    }
}

impl Qmp {
    /// Waits for the greeting and negotiates.
    pub async fn connect<S>(stream: S, within: Duration) -> Result<Qmp, QmpError>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let (read, mut write) = tokio::io::split(stream);
        let mut read = BufReader::with_capacity(16 << 10, read);
        let greeting = timeout(within, read_line(&mut read))
            .await
            .map_err(|_| QmpError::NoGreeting)??;
        let is_qmp = serde_json::from_str::<Value>(&greeting).is_ok_and(|v| v.get("QMP").is_some());
        if !is_qmp {
            return Err(QmpError::Protocol(greeting.chars().take(60).collect()));
        }
        let shared = Arc::new(Shared::default());
        let (lines, mut outgoing) = mpsc::unbounded_channel::<String>();
        let writer = {
            let shared = shared.clone();
            tokio::spawn(async move {
                while let Some(line) = outgoing.recv().await {
                    if let Err(e) = async {
                        write.write_all(line.as_bytes()).await?;
                        write.flush().await
                    }
                    .await
                    {
                        return shared.gone(&e.to_string());
                    }
                }
            })
        };
        let reader = {
            let shared = shared.clone();
            tokio::spawn(async move {
                loop {
                    match read_line(&mut read).await {
                        Ok(line) => shared.take(&line),
                        Err(e) => return shared.gone(&e.to_string()),
                    }
                }
            })
        };
        let tasks = Arc::new(Tasks(vec![writer.abort_handle(), reader.abort_handle()]));
        let qmp = Qmp {
            shared,
            lines,
            _tasks: tasks,
        };
        qmp.execute("qmp_capabilities", Value::Null).await?;
        Ok(qmp)
    }

    /// Runs a command and waits for its answer.
    pub async fn execute(&self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        let (id, answer) = {
            let mut s = self.shared.state();
            if let Some(why) = &s.gone {
                return Err(QmpError::Gone(why.clone()));
            }
            s.next_id += 1;
            let (tx, rx) = oneshot::channel();
            let id = s.next_id;
            s.waiting.insert(id, tx);
            (id, rx)
        };
        let mut line = json!({"execute": command, "id": id});
        if !arguments.is_null() {
            line["arguments"] = arguments;
        }
        let why_gone = || {
            QmpError::Gone(
                self.shared
                    .state()
                    .gone
                    .clone()
                    .unwrap_or_else(|| "closed".into()),
            )
        };
        if self.lines.send(format!("{line}\n")).is_err() {
            return Err(why_gone());
        }
        match timeout(COMMAND, answer).await {
            Ok(Ok(Ok(value))) => Ok(value),
            Ok(Ok(Err(desc))) => Err(QmpError::Refused {
                command: command.to_owned(),
                desc,
            }),
            Ok(Err(_)) => Err(why_gone()),
            Err(_) => {
                self.shared.state().waiting.remove(&id);
                Err(QmpError::Late(command.to_owned()))
            }
        }
    }

    /// A mark: [`Qmp::event`] looks at what comes after it.
    pub fn mark(&self) -> usize {
        let s = self.shared.state();
        s.forgotten + s.events.len()
    }

    /// The first event after `mark` that `wanted` accepts, waiting for it.
    pub async fn event(
        &self,
        mark: usize,
        within: Duration,
        what: &str,
        wanted: impl Fn(&Event) -> bool,
    ) -> Result<Event, QmpError> {
        let wait = async {
            loop {
                let news = self.shared.news.notified();
                tokio::pin!(news);
                news.as_mut().enable();
                if let Some(e) = self.seen(mark, &wanted) {
                    return Ok(e);
                }
                if let Some(why) = &self.shared.state().gone {
                    return Err(QmpError::Gone(why.clone()));
                }
                news.await;
            }
        };
        timeout(within, wait)
            .await
            .map_err(|_| QmpError::Late(what.to_owned()))?
    }

    /// True once the connection has ended.
    pub fn is_gone(&self) -> bool {
        self.shared.state().gone.is_some()
    }

    /// The last event of this name.
    pub fn last(&self, name: &str) -> Option<Event> {
        self.shared
            .state()
            .events
            .iter()
            .rev()
            .find(|e| e.name == name)
            .cloned()
    }

    /// The first event after `mark` that `wanted` accepts, if it is already here.
    pub fn seen(&self, mark: usize, wanted: impl Fn(&Event) -> bool) -> Option<Event> {
        let s = self.shared.state();
        s.events
            .iter()
            .skip(mark.saturating_sub(s.forgotten))
            .find(|e| wanted(e))
            .cloned()
    }
}

async fn read_line<R: AsyncRead + Unpin>(read: &mut BufReader<R>) -> Result<String, QmpError> {
    loop {
        let mut line = Vec::new();
        let n = read
            .take(LINE_MAX)
            .read_until(b'\n', &mut line)
            .await
            .map_err(|e| QmpError::Gone(e.to_string()))?;
        if n == 0 {
            return Err(QmpError::Gone("QEMU or its switch closed it".into()));
        }
        if line.last() != Some(&b'\n') && n as u64 == LINE_MAX {
            return Err(QmpError::Protocol(format!(
                "a line of more than {LINE_MAX} bytes"
            )));
        }
        let text = String::from_utf8_lossy(&line).trim().to_owned();
        if !text.is_empty() {
            return Ok(text);
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::DuplexStream;

    use super::*;

    const GREETING: &str = "{\"QMP\": {\"version\": {}, \"capabilities\": []}}\r\n";

    /// Plays a script: each line that must come, and what is then sent.
    async fn peer(stream: DuplexStream, script: Vec<(&'static str, &'static str)>) -> DuplexStream {
        let mut stream = BufReader::new(stream);
        stream.write_all(GREETING.as_bytes()).await.expect("greet");
        for (expect, answer) in script {
            let mut line = String::new();
            stream.read_line(&mut line).await.expect("read");
            assert!(line.contains(expect), "{line} is not {expect}");
            stream.write_all(answer.as_bytes()).await.expect("write");
        }
        stream.into_inner()
    }

    #[tokio::test]
    async fn answers_find_their_command_also_out_of_order() {
        let (ours, theirs) = tokio::io::duplex(64);
        let p = tokio::spawn(peer(
            theirs,
            vec![
                ("qmp_capabilities", "{\"return\": {}, \"id\": 1}\n"),
                ("query-status", ""),
                (
                    "stop",
                    "{\"timestamp\": {\"seconds\": 7, \"microseconds\": 5}, \"event\": \"STOP\"}\n{\"id\": 3, \"error\": {\"class\": \"x\", \"desc\": \"no\"}}\n{\"id\": 2, \"return\": {\"status\": \"running\"}}\n",
                ),
            ],
        ));
        let qmp = Qmp::connect(ours, COMMAND).await.expect("connect");
        let mark = qmp.mark();
        let (status, stop) = tokio::join!(
            qmp.execute("query-status", Value::Null),
            qmp.execute("stop", json!({"a": 1}))
        );
        assert_eq!(status.expect("status")["status"], "running");
        assert_eq!(
            stop,
            Err(QmpError::Refused {
                command: "stop".into(),
                desc: "no".into()
            })
        );
        let e = qmp
            .event(mark, COMMAND, "STOP", |e| e.name == "STOP")
            .await
            .expect("event");
        assert_eq!(e.at_ns, 7_000_005_000);
        drop(p.await.expect("peer"));
        assert!(matches!(
            qmp.execute("x", Value::Null).await,
            Err(QmpError::Gone(_))
        ));
        assert!(matches!(
            qmp.event(qmp.mark(), COMMAND, "X", |_| true).await,
            Err(QmpError::Gone(_))
        ));
    }

    #[tokio::test]
    async fn garbage_and_silence_are_errors() {
        let (ours, _theirs) = tokio::io::duplex(64);
        assert_eq!(
            Qmp::connect(ours, Duration::from_millis(10)).await.err(),
            Some(QmpError::NoGreeting)
        );
        let (ours, mut theirs) = tokio::io::duplex(64);
        theirs.write_all(b"SSH-2.0\r\n").await.expect("write");
        assert!(matches!(
            Qmp::connect(ours, COMMAND).await.err(),
            Some(QmpError::Protocol(_))
        ));
        let (ours, theirs) = tokio::io::duplex(64);
        let p = tokio::spawn(peer(
            theirs,
            vec![
                ("qmp_cap", "{\"id\":1,\"return\":{}}\n"),
                ("a", "\u{0}garbage\n"),
            ],
        ));
        let qmp = Qmp::connect(ours, COMMAND).await.expect("connect");
        assert!(matches!(
            qmp.execute("a", Value::Null).await,
            Err(QmpError::Gone(_))
        ));
        drop(p);
    }

    #[tokio::test]
    async fn events_are_bounded() {
        let shared = Shared::default();
        for i in 0..EVENTS_MAX + 10 {
            shared.take(&format!("{{\"event\": \"E{i}\"}}"));
        }
        assert_eq!(shared.state().events.len(), EVENTS_MAX);
        assert_eq!(shared.state().forgotten, 10);
    }
}
