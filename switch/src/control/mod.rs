//! The control path (tokio): one handler behind the unix socket and QUIC.
//!
//! [`server::Server`] accepts, `session` reads calls and answers them: the greeting itself, `Vmm*` and `VmList`
//! through [`vmm::Vmm`], everything else through the [`Handler`]. QUIC connections that ship go to the
//! [`ShipAcceptor`].
//!
//! Invariant: nothing a peer sends makes this panic or costs more memory than its bounded streams and messages.
//! Invariant: a peer reaches what the configuration names, and no other socket or program of this host.

pub mod notify;
pub mod preflight;
pub mod quic;
pub mod server;
mod session;
pub mod vmm;
pub mod wire;

#[cfg(test)]
mod tests;

use gangway_shared::api::{Refusal, RefusalCode, Reply, Request};
use gangway_shared::pki::Identity;

pub use server::{ServeError, Server, serve};
pub use vmm::Vmm;

/// What carries out the requests that concern ports, links and holds; everything but `Hello`, `VmList` and `Vmm*`.
/// Blocking: shells call it on a thread that may wait.
pub trait Handler: Send + Sync + 'static {
    /// Carries out one request.
    fn call(&self, request: Request) -> Reply;
}

/// What takes the connections of other switches (ALPN [`gangway_shared::ship::ALPN`]).
pub trait ShipAcceptor: Send + Sync + 'static {
    /// Takes over a connection. `peer` is proven: a host of our authority. Called inside the runtime; must not block.
    fn accept(&self, conn: quinn::Connection, peer: Identity);
}

/// A refusal as an answer.
fn refuse(code: RefusalCode, message: impl Into<String>) -> Reply {
    Reply::Refused(refusal(code, message))
}

/// A refusal; its text is kept on one line.
fn refusal(code: RefusalCode, message: impl Into<String>) -> Refusal {
    let message: String = message.into();
    Refusal {
        code,
        message: message.replace(['\n', '\r'], " "),
    }
}
