//! Lets clients in whose `:authority` is the socket's path.
//!
//! kube-apiserver sends `%2Fvar%2Frun%2Fkms.sock` for KMS v1, and before 1.32 the path for both versions (raw in
//! 1.28). The HTTP/2 stack below tonic refuses that with PROTOCOL_ERROR before any handler runs. So [`Adapter`] stands
//! between the accepted socket and the stack, and replaces such a value and nothing else: `frames` follows the frames,
//! `hpack` the header blocks. What is in a DATA frame is never looked at, what goes to the client never touched.

mod frames;
mod hpack;

use std::io::Result;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tonic::transport::server::Connected;

pub use frames::{Follower, MAX_BLOCK};

/// Above this the outgoing buffer is given back once it is drained.
const KEEP: usize = 16 * 1024;

/// A client's connection as the HTTP/2 stack shall see it.
#[derive(Debug)]
pub struct Adapter<S> {
    inner: S,
    follower: Follower,
    ready: Vec<u8>,
    drained: usize,
}

impl<S> Adapter<S> {
    /// `inner` must not have been read from.
    pub fn new(inner: S) -> Adapter<S> {
        Adapter { inner, follower: Follower::new(), ready: Vec::new(), drained: 0 }
    }

    fn drain(&mut self, buf: &mut ReadBuf<'_>) {
        let rest = &self.ready[self.drained..];
        let (now, later) = rest.split_at(rest.len().min(buf.remaining()));
        buf.put_slice(now);
        self.drained += now.len();
        if later.is_empty() {
            self.ready.clear();
            self.ready.shrink_to(KEEP);
            self.drained = 0;
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Adapter<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<Result<()>> {
        let this = self.get_mut();
        // Without room to read into, nothing read would look like the end of the connection.
        while this.ready.is_empty() && buf.remaining() > 0 {
            let before = buf.filled().len();
            ready!(Pin::new(&mut this.inner).poll_read(cx, buf))?;
            if this.follower.is_lost() {
                return Poll::Ready(Ok(()));
            }
            match &buf.filled()[before..] {
                [] => {
                    this.follower.finish(&mut this.ready);
                    break;
                }
                came => this.follower.feed(came, &mut this.ready),
            }
            buf.set_filled(before);
        }
        this.drain(buf);
        Poll::Ready(Ok(()))
    }
}

/// Vectored writes are not offered, whatever `inner` can do: with them the HTTP/2 stack sends an answer of more than
/// 256 bytes apart from the trailers that end it, which costs each Encrypt a second system call and its client a
/// second wake-up. Without them it copies an answer of up to 1 KiB and sends all of it at once.
impl<S: AsyncWrite + Unpin> AsyncWrite for Adapter<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

impl<S: Connected> Connected for Adapter<S> {
    type ConnectInfo = S::ConnectInfo;

    fn connect_info(&self) -> S::ConnectInfo {
        self.inner.connect_info()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_answer_is_not_torn_from_its_trailers() {
        let (stream, _) = tokio::net::UnixStream::pair().unwrap();
        assert!(stream.is_write_vectored(), "the socket itself could");
        assert!(!Adapter::new(stream).is_write_vectored());
    }
}
