//! The socket between the service and its worker. It keeps packets whole, so nothing has to be put together again.

use super::wire::MAX_PACKET;
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_send_buffer_size, set_socket_timeout, socket_type};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair,
};
use std::io;
use std::ops::Deref;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;
use tokio::io::unix::AsyncFd;
use zeroize::{Zeroize, Zeroizing};

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
    let mut inbox = Inbox::new();
    match read(end, RecvFlags::empty(), &mut inbox.0) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            Err(io::ErrorKind::TimedOut.into())
        }
        result => Ok(inbox.packet(result?).map(|packet| Zeroizing::new(packet.to_vec()))),
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

/// Where packets arrive. Made once, as long as the longest packet: no call is spent on asking for the length of each.
pub(super) struct Inbox(Vec<u8>);

/// A packet in an [`Inbox`], which is wiped behind it.
pub(super) struct Packet<'a>(&'a mut [u8]);

impl Inbox {
    pub(super) fn new() -> Self {
        Self(vec![0; MAX_PACKET])
    }

    /// Waits until there is a packet; `None` when the other end is gone.
    ///
    /// # Errors
    /// The operating system's.
    pub(super) async fn next(&mut self, end: &AsyncFd<OwnedFd>) -> io::Result<Option<Packet<'_>>> {
        let len = loop {
            let mut ready = end.readable().await?;
            let inbox = &mut self.0;
            if let Ok(len) = ready.try_io(|end| read(end.get_ref(), RecvFlags::DONTWAIT, inbox)) {
                break len?;
            }
        };
        Ok(self.packet(len))
    }

    /// Messages are never empty: that is how the end looks.
    fn packet(&mut self, len: usize) -> Option<Packet<'_>> {
        self.0.get_mut(..len).filter(|packet| !packet.is_empty()).map(Packet)
    }
}

impl Deref for Packet<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.0
    }
}

impl Drop for Packet<'_> {
    fn drop(&mut self) {
        self.0.zeroize();
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

fn read(end: &OwnedFd, flags: RecvFlags, inbox: &mut [u8]) -> io::Result<usize> {
    match recv(end, inbox, flags | RecvFlags::TRUNC) {
        Ok((_, len)) if len > MAX_PACKET => Err(io::ErrorKind::InvalidData.into()),
        Ok((_, len)) => Ok(len),
        // So the end looks where the other one has died with packets unread.
        Err(Errno::CONNRESET) => Ok(0),
        Err(error) => Err(error.into()),
    }
}
