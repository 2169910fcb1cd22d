//! The control path (tokio): one handler behind the unix socket and QUIC.

use gangway_shared::api::{Reply, Request};

/// What carries out the requests that concern ports, links and holds; everything but `Hello` and `Vmm*`.
/// Blocking: shells call it on a thread that may wait.
pub trait Handler: Send + Sync + 'static {
    /// Carries out one request.
    fn call(&self, request: Request) -> Reply;
}
