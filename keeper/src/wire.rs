//! Messages over a unix socket, with their descriptors.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use crate::message::{self, FDS_MAX, HEADER};

/// A message as it is on the wire.
pub type Message = message::Message<Arc<OwnedFd>>;

/// Receives a message. `None` if the other side has hung up between two of them.
///
/// # Errors
/// If it hangs up within one, or sends what is none.
pub fn receive(socket: &UnixStream) -> io::Result<Option<Message>> {
    let mut fds = Vec::new();
    let mut head = [0; HEADER];
    if !fill(socket, &mut head, &mut fds)? {
        return Ok(None);
    }
    let (request, flags, size) = message::header(head).map_err(bad)?;
    let mut body = vec![0; size];
    if !fill(socket, &mut body, &mut fds)? {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(Some(Message {
        request,
        flags,
        body,
        fds,
    }))
}

fn bad(why: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

/// Fills the buffer, and adds what descriptors come with it. False if the other side has hung up before its first byte.
fn fill(socket: &UnixStream, to: &mut [u8], fds: &mut Vec<Arc<OwnedFd>>) -> io::Result<bool> {
    let mut done = 0;
    while done < to.len() {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(&mut to[done..])];
        let got = recvmsg(
            socket.as_fd(),
            &mut parts,
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        );
        let got = match got {
            Err(rustix::io::Errno::INTR) => continue,
            got => got?,
        };
        for m in control.drain() {
            if let RecvAncillaryMessage::ScmRights(more) = m {
                fds.extend(more.map(Arc::new));
            }
        }
        // Each part of a message may bring some: before there are more of them than we may have.
        if fds.len() > FDS_MAX || got.flags.contains(ReturnFlags::CTRUNC) {
            return Err(bad(format!(
                "more than {FDS_MAX} descriptors with one message"
            )));
        }
        match (got.bytes, done) {
            (0, 0) => return Ok(false),
            (0, _) => return Err(io::ErrorKind::UnexpectedEof.into()),
            (n, _) => done += n,
        }
    }
    Ok(true)
}

/// Sends a message.
///
/// # Errors
/// If the other side has hung up.
pub fn send(socket: &UnixStream, m: &Message) -> io::Result<()> {
    let bytes = m.bytes();
    let fds: Vec<_> = m.fds.iter().map(|fd| fd.as_fd()).collect();
    let mut done = 0;
    while done < bytes.len() {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        // With the first byte.
        if done == 0 && !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&fds)) {
            return Err(bad("too many descriptors"));
        }
        let parts = [IoSlice::new(&bytes[done..])];
        match sendmsg(socket.as_fd(), &parts, &mut control, SendFlags::NOSIGNAL) {
            Err(rustix::io::Errno::INTR) => {}
            sent => done += sent?,
        }
    }
    Ok(())
}
