//! A coordinator's stream and a QMP socket, joined.

use std::io;
use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::OwnedSemaphorePermit;

use super::Vm;
use super::qmp::Watch;

/// Bytes moved at once.
const PIECE: usize = 16 << 10;

/// An open connection to a VM's QMP socket; nobody else gets one as long as it lives.
pub struct Relay {
    vm: Arc<Vm>,
    _permit: OwnedSemaphorePermit,
    qmp: UnixStream,
    greeting: Vec<u8>,
}

impl Relay {
    pub(super) fn new(
        vm: Arc<Vm>,
        permit: OwnedSemaphorePermit,
        qmp: UnixStream,
        greeting: Vec<u8>,
    ) -> Relay {
        Relay {
            vm,
            _permit: permit,
            qmp,
            greeting,
        }
    }

    /// Moves bytes both ways until one side closes.
    pub async fn run<S>(mut self, client: &mut S) -> io::Result<()>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let vm = Arc::clone(&self.vm);
        let mut watch = Watch::default();
        let mut learn = |bytes: &[u8]| {
            if let Some(status) = watch.bytes(bytes) {
                vm.learn(|s| s.status = Some(status));
            }
        };
        learn(&self.greeting);
        client.write_all(&self.greeting).await?;
        client.flush().await?;

        let (mut from_client, mut to_client) = tokio::io::split(client);
        let (mut from_qmp, mut to_qmp) = self.qmp.split();
        // Two copies side by side: a side that does not read holds up only what goes its way.
        let up = async {
            let mut piece = vec![0; PIECE];
            loop {
                let n = from_client.read(&mut piece).await?;
                if n == 0 {
                    return io::Result::Ok(());
                }
                to_qmp.write_all(&piece[..n]).await?;
            }
        };
        let down = async {
            let mut piece = vec![0; PIECE];
            loop {
                let n = from_qmp.read(&mut piece).await?;
                if n == 0 {
                    return io::Result::Ok(());
                }
                learn(&piece[..n]);
                to_client.write_all(&piece[..n]).await?;
                to_client.flush().await?;
            }
        };
        tokio::select! {
            ended = up => ended,
            ended = down => ended,
        }
    }
}
