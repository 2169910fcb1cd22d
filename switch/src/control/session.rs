//! One conversation: the greeting, then calls, each answered by the part that it concerns.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use gangway_shared::api::{Refusal, RefusalCode, Reply, Request, VERSION};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::vmm::{Relay, Vmm};
use super::wire::{self, SLOW, WireError};
use super::{Handler, refusal, refuse};
use crate::said::Said;

/// Calls that the handler may be busy with at once; each has a thread.
const HANDLERS_MAX: usize = 64;
/// How long a connection may take to say hello.
const HELLO: Duration = Duration::from_secs(5);

/// What answers calls, for all connections.
pub struct Control {
    host: String,
    handler: Arc<dyn Handler>,
    vmm: Arc<Vmm>,
    handlers: Semaphore,
    /// Who was refused what.
    pub(super) said: Said,
}

/// How a call left the stream.
pub enum After {
    /// Ready for another call.
    Next,
    /// The peer closed it, or the relay that it carried has ended.
    Closed,
    /// The peer broke the protocol, and was told: close the connection.
    Misbehaved,
}

/// A connection's memory.
pub struct Session {
    /// The peer, for the log.
    who: String,
    greeted: AtomicBool,
}

impl Session {
    /// Not greeted yet.
    pub fn new(who: impl Into<String>) -> Session {
        Session {
            who: who.into(),
            greeted: AtomicBool::new(false),
        }
    }
}

impl Control {
    /// For a host of this name.
    pub fn new(host: String, handler: Arc<dyn Handler>, vmm: Arc<Vmm>) -> Control {
        Control {
            host,
            handler,
            vmm,
            handlers: Semaphore::new(HANDLERS_MAX),
            said: Said::default(),
        }
    }

    /// Reads one request, carries it out, answers it. `first`: how long the stream may stay silent before.
    pub async fn call<S>(
        &self,
        session: &Session,
        stream: &mut S,
        first: Option<Duration>,
    ) -> Result<After, WireError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let greeted = session.greeted.load(Ordering::Acquire);
        let request = match wire::read(stream, if greeted { first } else { Some(HELLO) }).await {
            Ok(Some(request)) => request,
            Ok(None) => return Ok(After::Closed),
            Err(WireError::Malformed(e)) => {
                let r = refusal(RefusalCode::Malformed, e.to_string());
                return self.misbehaved(session, stream, "a call", r).await;
            }
            Err(e) => return Err(e),
        };
        match request {
            Request::Hello { version } if version == VERSION => {
                session.greeted.store(true, Ordering::Release);
                let host = self.host.clone();
                wire::write(stream, &Reply::Hello { version, host }).await?;
                Ok(After::Next)
            }
            Request::Hello { version } => {
                let message = format!(
                    "the coordinator speaks version {version} of the control API, this switch version {VERSION}; \
                     install the same release on both"
                );
                let r = refusal(RefusalCode::Version, message);
                self.misbehaved(session, stream, "Hello", r).await
            }
            request if !greeted => {
                let message = "the first call of a connection must be Hello";
                let r = refusal(RefusalCode::Malformed, message);
                self.misbehaved(session, stream, request.name(), r).await
            }
            Request::VmmOpen { vm } => match self.vmm.open(&vm).await {
                Ok(relay) => {
                    wire::write(stream, &Reply::Ok).await?;
                    relay_all(relay, stream).await
                }
                Err(r) => {
                    self.refused(session, "VmmOpen", &r);
                    wire::write(stream, &Reply::Refused(r)).await?;
                    Ok(After::Next)
                }
            },
            request => {
                let what = request.name();
                let reply = self.answer(request).await;
                if let Reply::Refused(r) = &reply {
                    self.refused(session, what, r);
                }
                self.write(stream, &reply).await?;
                Ok(After::Next)
            }
        }
    }

    /// Not now, or not like this: for the log, once.
    fn refused(&self, session: &Session, what: &str, r: &Refusal) {
        self.said.info(&session.who, format!("refused {what}: {r}"));
    }

    /// The peer is told what is wrong, and the connection is over.
    async fn misbehaved<S: AsyncWrite + Unpin>(
        &self,
        session: &Session,
        stream: &mut S,
        what: &str,
        r: Refusal,
    ) -> Result<After, WireError> {
        let line = format!("refused {what}, and the connection: {r}");
        self.said.warn(&session.who, line);
        wire::write(stream, &Reply::Refused(r)).await?;
        Ok(After::Misbehaved)
    }

    /// An answer that is too long is a refusal, not a lost connection.
    async fn write<S: AsyncWrite + Unpin>(
        &self,
        stream: &mut S,
        reply: &Reply,
    ) -> Result<(), WireError> {
        match wire::write(stream, reply).await {
            Err(WireError::Malformed(e)) => {
                let message = format!("the answer does not fit into a message: {e}");
                wire::write(stream, &refuse(RefusalCode::Resources, message)).await
            }
            other => other,
        }
    }

    async fn answer(&self, request: Request) -> Reply {
        match request {
            Request::VmList => Reply::Vms(self.vmm.list().await),
            Request::VmmStart { vm, hold } => match self.vmm.start(&vm, hold).await {
                Ok(pid) => Reply::Started { pid },
                Err(r) => Reply::Refused(r),
            },
            Request::VmmStop { vm, hold } => match self.vmm.stop(&vm, hold).await {
                Ok(()) => Reply::Ok,
                Err(r) => Reply::Refused(r),
            },
            request => self.handle(request).await,
        }
    }

    async fn handle(&self, request: Request) -> Reply {
        let Ok(Ok(_permit)) = timeout(SLOW, self.handlers.acquire()).await else {
            let message = format!("{HANDLERS_MAX} calls are being worked on already; try again");
            return refuse(RefusalCode::Busy, message);
        };
        let handler = Arc::clone(&self.handler);
        match tokio::task::spawn_blocking(move || handler.call(request)).await {
            Ok(reply) => reply,
            Err(e) => {
                tracing::error!("a control call panicked: {e}");
                refuse(
                    RefusalCode::Internal,
                    "the switch failed at this call; see its log",
                )
            }
        }
    }
}

async fn relay_all<S>(relay: Relay, stream: &mut S) -> Result<After, WireError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    relay.run(stream).await?;
    Ok(After::Closed)
}
