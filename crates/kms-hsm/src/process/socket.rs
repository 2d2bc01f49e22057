//! The socket between the service and its worker. It keeps packets whole, so nothing has to be put together again.

use super::wire::MAX_PACKET;
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_send_buffer_size, set_socket_timeout, socket_type};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair,
};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;
use tokio::io::unix::AsyncFd;
use zeroize::Zeroizing;

/// How many of the largest packets may be on their way.
const IN_FLIGHT: usize = 8;

/// The service's end and the worker's.
///
/// # Errors
/// The operating system refuses.
pub(super) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let (ours, theirs) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    for end in [&ours, &theirs] {
        // A smaller buffer holds one packet still, and only makes senders wait more often.
        let _ = set_socket_send_buffer_size(end, IN_FLIGHT * MAX_PACKET);
    }
    Ok((ours, theirs))
}

/// The end for tasks of a runtime, in which this is called.
///
/// # Errors
/// The operating system refuses.
#[expect(unsafe_code, reason = "tokio cannot know which descriptors stay what they are")]
pub(super) fn for_tasks(end: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    rustix::io::ioctl_fionbio(&end, true)?;
    // SAFETY: an OwnedFd names the same open descriptor as long as it lives, and the AsyncFd owns it.
    Ok(unsafe { AsyncFd::register(end) }?)
}

/// Whether `end` is one of a pair.
pub(super) fn is_one(end: impl AsFd) -> bool {
    socket_type(end) == Ok(SocketType::SEQPACKET)
}

/// Blocks until there is a packet; `None` when the other end is gone.
///
/// # Errors
/// `TimedOut` when none has come within `patience`.
pub(super) fn receive(
    end: &OwnedFd,
    patience: Option<Duration>,
) -> io::Result<Option<Zeroizing<Vec<u8>>>> {
    set_socket_timeout(end, Timeout::Recv, patience)?;
    match read(end, RecvFlags::empty()) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            Err(io::ErrorKind::TimedOut.into())
        }
        result => result,
    }
}

/// Sends a packet, or says that there is no room.
///
/// # Errors
/// `WouldBlock`; `BrokenPipe` when the other end is gone.
pub(super) fn try_send(end: impl AsFd, packet: &[u8]) -> io::Result<()> {
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    loop {
        match send(end.as_fd(), packet, flags) {
            Err(Errno::INTR) => {}
            result => return Ok(result.map(drop)?),
        }
    }
}

/// Waits until there is a packet; `None` when the other end is gone.
///
/// # Errors
/// The operating system's.
pub(super) async fn next(end: &AsyncFd<OwnedFd>) -> io::Result<Option<Zeroizing<Vec<u8>>>> {
    loop {
        let mut ready = end.readable().await?;
        if let Ok(result) = ready.try_io(|end| read(end.get_ref(), RecvFlags::DONTWAIT)) {
            return result;
        }
    }
}

/// Waits until there is room for the packet.
///
/// # Errors
/// `BrokenPipe` when the other end is gone.
pub(super) async fn deliver(end: &AsyncFd<OwnedFd>, packet: &[u8]) -> io::Result<()> {
    // Almost always there is room, and nobody needs to be asked for it.
    match try_send(end.get_ref(), packet) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
        result => return result,
    }
    loop {
        let mut ready = end.writable().await?;
        if let Ok(result) = ready.try_io(|end| try_send(end.get_ref(), packet)) {
            return result;
        }
    }
}

fn read(end: &OwnedFd, flags: RecvFlags) -> io::Result<Option<Zeroizing<Vec<u8>>>> {
    // One look at the length, so that small packets do not cost a large buffer.
    let nothing: &mut [u8] = &mut [];
    let len = match recv(end, nothing, flags | RecvFlags::PEEK | RecvFlags::TRUNC) {
        Ok((_, len)) => len,
        // So the end looks where the other one has died with packets unread.
        Err(Errno::CONNRESET) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    if len > MAX_PACKET {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut packet = Zeroizing::new(vec![0; len]);
    let (_, _) = recv(end, packet.as_mut_slice(), flags)?;
    // Messages are never empty: that is how the end looks.
    Ok((len > 0).then_some(packet))
}
