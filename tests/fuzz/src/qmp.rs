//! What QEMU says, or somebody in its place.

use std::time::Duration;

use gangway::vmm::qemu::Qemu;
use gangway::vmm::qmp::Qmp;
use gangway_switch::control::vmm::qmp::Watch;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};

/// In a runtime of its own.
pub fn block_on<T>(work: impl Future<Output = T>) -> T {
    thread_local! {
        static RUNTIME: tokio::runtime::Runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .expect("a runtime");
    }
    RUNTIME.with(|r| r.block_on(work))
}

/// A byte that says how, then what is said.
pub fn run(data: &[u8]) {
    let Some((how, said)) = data.split_first() else {
        return;
    };
    let mut whole = Watch::default();
    let mut pieces = Watch::default();
    let told = said
        .chunks(usize::from(*how >> 1).max(1))
        .filter_map(|c| pieces.bytes(c))
        .last();
    assert_eq!(whole.bytes(said), told, "whatever the pieces");
    if how & 1 == 0 {
        block_on(stream(said));
    } else {
        block_on(answers(said));
    }
}

/// The bytes are all that comes.
async fn stream(said: &[u8]) {
    let mut all = b"{\"QMP\": {}}\n{\"return\": {}, \"id\": 1}\n".to_vec();
    all.extend(said);
    let stream = tokio::io::join(std::io::Cursor::new(all), tokio::io::sink());
    if let Ok(qmp) = Qmp::connect(stream, Duration::from_secs(5)).await {
        ask(qmp).await;
    }
}

/// Each line is the answer to a question.
async fn answers(said: &[u8]) {
    let (ours, theirs) = tokio::io::duplex(64 << 10);
    let said = said.to_vec();
    let peer = tokio::spawn(async move {
        let (read, mut write) = tokio::io::split(theirs);
        let mut asked = BufReader::new(read).lines();
        let _ = write.write_all(b"{\"QMP\": {}}\n").await;
        let mut answers = said.split(|b| *b == b'\n');
        let mut first = true;
        while let Ok(Some(question)) = asked.next_line().await {
            let question: Value = serde_json::from_str(&question).expect("what we ask is JSON");
            let id = &question["id"];
            let line = match answers.next() {
                _ if std::mem::take(&mut first) => format!("{{\"return\": {{}}, \"id\": {id}}}\n"),
                Some(a) => format!(
                    "{{\"return\": {}, \"id\": {id}}}\n",
                    String::from_utf8_lossy(a)
                ),
                None => break,
            };
            if write.write_all(line.as_bytes()).await.is_err() {
                break;
            }
        }
    });
    if let Ok(qmp) = Qmp::connect(ours, Duration::from_secs(5)).await {
        ask(qmp).await;
    }
    let _ = peer.await;
}

async fn ask(qmp: Qmp) {
    let qemu = Qemu::over("vm", "host", qmp);
    let _ = qemu.status().await;
    let _ = qemu.limits().await;
    if let Ok(progress) = qemu.progress().await {
        let _ = progress.under_way();
    }
    let _ = qemu.healthy().await;
    let _ = qemu.set_capabilities(true).await;
    if let Some(event) = qemu.events().last("STOP") {
        assert_eq!(event.name, "STOP");
    }
}
