//! The least of an HTTP/2 client that can ask a plug-in in every form in which an API server asks (RFC 9113): real
//! HTTP/2 libraries refuse to send a socket path as `:authority`, and kube-apiserver sends just that.
//!
//! One request fits into one frame and into the first window, which holds for everything this command sends. No
//! deadline is kept here: whoever asks sets one around it.

use std::io;

use thiserror::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::hpack::{self, Said};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const DATA: u8 = 0x0;
const HEADERS: u8 = 0x1;
const RST_STREAM: u8 = 0x3;
const SETTINGS: u8 = 0x4;
const PING: u8 = 0x6;
const GOAWAY: u8 = 0x7;
const WINDOW_UPDATE: u8 = 0x8;
const CONTINUATION: u8 = 0x9;

const END_STREAM: u8 = 0x1;
const ACK: u8 = 0x1;
const END_HEADERS: u8 = 0x4;
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;

/// SETTINGS_HEADER_TABLE_SIZE = 0: see `hpack`. SETTINGS_INITIAL_WINDOW_SIZE = 1 MiB: no answer waits for a window.
const OURS: [u8; 12] = [0, 1, 0, 0, 0, 0, 0, 4, 0, 0x10, 0, 0];
/// Reason of RST_STREAM when the caller no longer wants the answer.
const CANCEL: u32 = 8;
/// More than all answers of one connection.
const WINDOW: u32 = 1 << 24;
/// The largest frame that may come unasked (SETTINGS_MAX_FRAME_SIZE).
const MAX_FRAME: usize = 16_384;
const MAX_HEADERS: usize = 64 * 1024;
const MAX_ANSWER: usize = 1024 * 1024;

/// One unary gRPC request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Request<'a> {
    pub(super) path: &'a str,
    pub(super) authority: Option<&'a str>,
    /// In gRPC's form, such as `3S`.
    pub(super) timeout: &'a str,
    pub(super) message: &'a [u8],
}

/// What came back on the request's stream.
#[derive(Debug, Default)]
pub(super) struct Answer {
    pub(super) said: Said,
    data: Vec<u8>,
}

/// Why nothing came back.
#[derive(Debug, Error)]
pub(super) enum Broken {
    #[error("the stream was reset with {}", reason(*.0))]
    Reset(u32),
    #[error("the connection was ended with GOAWAY {}", reason(*.0))]
    Ended(u32),
    #[error("the connection was lost: {0}")]
    Lost(#[from] io::Error),
    #[error("the answer is not HTTP/2: {0}")]
    Malformed(&'static str),
}

/// A connection of its own to the socket.
pub(super) struct Connection {
    stream: UnixStream,
    next_id: u32,
}

impl Connection {
    /// `address` is a path, or a name in the abstract namespace behind NUL.
    pub(super) async fn open(address: &str) -> Result<Connection, Broken> {
        let mut bytes = PREFACE.to_vec();
        write_frame(SETTINGS, 0, 0, &OURS, &mut bytes);
        write_frame(WINDOW_UPDATE, 0, 0, &WINDOW.to_be_bytes(), &mut bytes);
        let mut stream = UnixStream::connect(address).await?;
        stream.write_all(&bytes).await?;
        Ok(Connection { stream, next_id: 1 })
    }

    /// Asks and waits for the end of the answer.
    pub(super) async fn ask(&mut self, request: &Request<'_>) -> Result<Answer, Broken> {
        let id = self.start(request).await?;
        let mut answer = Answer::default();
        loop {
            let frame = self.frame().await?;
            let ends = frame.id == id && frame.ends_stream();
            match frame.kind {
                RST_STREAM if frame.id == id => return Err(Broken::Reset(frame.number(0)?)),
                HEADERS if frame.id == id => {
                    let block = self.whole_block(&frame).await?;
                    hpack::read(&block, &mut answer.said)
                        .map_err(|_| Broken::Malformed("a header block"))?;
                }
                DATA if frame.id == id => answer.take(frame.content()?)?,
                _ => {}
            }
            if ends {
                return Ok(answer);
            }
        }
    }

    /// Sends a request and gives the number of its stream.
    pub(super) async fn start(&mut self, request: &Request<'_>) -> Result<u32, Broken> {
        let id = self.next_id;
        self.next_id += 2;
        let mut bytes = Vec::new();
        write_frame(HEADERS, END_HEADERS, id, &headers(request), &mut bytes);
        write_frame(DATA, END_STREAM, id, &message(request.message), &mut bytes);
        self.stream.write_all(&bytes).await?;
        Ok(id)
    }

    /// Tells the server that nobody waits for these answers any more.
    pub(super) async fn cancel(&mut self, ids: &[u32]) -> Result<(), Broken> {
        let mut bytes = Vec::new();
        for id in ids {
            write_frame(RST_STREAM, 0, *id, &CANCEL.to_be_bytes(), &mut bytes);
        }
        Ok(self.stream.write_all(&bytes).await?)
    }

    /// The next frame. What HTTP/2 itself wants answered is answered.
    async fn frame(&mut self) -> Result<Frame, Broken> {
        let mut head = [0; 9];
        self.stream.read_exact(&mut head).await?;
        let [l2, l1, l0, kind, flags, id @ ..] = head;
        let length = usize::from(l2) << 16 | usize::from(l1) << 8 | usize::from(l0);
        if length > MAX_FRAME {
            return Err(Broken::Malformed("a frame longer than allowed"));
        }
        let mut payload = vec![0; length];
        self.stream.read_exact(&mut payload).await?;
        let frame = Frame { kind, flags, id: u32::from_be_bytes(id) & (u32::MAX >> 1), payload };
        match kind {
            SETTINGS if flags & ACK == 0 => self.send(SETTINGS, ACK, &[]).await?,
            PING if flags & ACK == 0 => self.send(PING, ACK, &frame.payload).await?,
            GOAWAY => return Err(Broken::Ended(frame.number(4)?)),
            _ => {}
        }
        Ok(frame)
    }

    async fn whole_block(&mut self, first: &Frame) -> Result<Vec<u8>, Broken> {
        let mut block = first.content()?.to_vec();
        let mut complete = first.flags & END_HEADERS != 0;
        while !complete {
            let more = self.frame().await?;
            if more.kind != CONTINUATION || block.len() > MAX_HEADERS {
                return Err(Broken::Malformed("a header block without end"));
            }
            block.extend_from_slice(&more.payload);
            complete = more.flags & END_HEADERS != 0;
        }
        Ok(block)
    }

    async fn send(&mut self, kind: u8, flags: u8, payload: &[u8]) -> Result<(), Broken> {
        let mut bytes = Vec::new();
        write_frame(kind, flags, 0, payload, &mut bytes);
        Ok(self.stream.write_all(&bytes).await?)
    }
}

impl Answer {
    /// The message, if a whole one came: behind a flag and its length.
    pub(super) fn message(&self) -> Option<&[u8]> {
        let (head, message) = self.data.split_first_chunk::<5>()?;
        let [0, length @ ..] = head else { return None };
        let length = usize::try_from(u32::from_be_bytes(*length)).ok()?;
        message.get(..length)
    }

    fn take(&mut self, data: &[u8]) -> Result<(), Broken> {
        self.data.extend_from_slice(data);
        if self.data.len() > MAX_ANSWER {
            return Err(Broken::Malformed("an answer without end"));
        }
        Ok(())
    }
}

struct Frame {
    kind: u8,
    flags: u8,
    id: u32,
    payload: Vec<u8>,
}

impl Frame {
    fn ends_stream(&self) -> bool {
        matches!(self.kind, DATA | HEADERS) && self.flags & END_STREAM != 0
    }

    /// Of DATA or HEADERS, without padding and priority.
    fn content(&self) -> Result<&[u8], Broken> {
        const CUT: Broken = Broken::Malformed("a frame shorter than its own fields");
        let mut content = self.payload.as_slice();
        if self.flags & PADDED != 0 {
            let (&padding, rest) = content.split_first().ok_or(CUT)?;
            let length = rest.len().checked_sub(usize::from(padding)).ok_or(CUT)?;
            content = &rest[..length];
        }
        if self.kind == HEADERS && self.flags & PRIORITY != 0 {
            content = content.get(5..).ok_or(CUT)?;
        }
        Ok(content)
    }

    fn number(&self, at: usize) -> Result<u32, Broken> {
        let bytes = self.payload.get(at..).and_then(|rest| rest.first_chunk());
        bytes.map(|bytes| u32::from_be_bytes(*bytes)).ok_or(Broken::Malformed("a cut frame"))
    }
}

/// As grpc-go sends them, in its order.
fn headers(request: &Request<'_>) -> Vec<u8> {
    let mut block = Vec::new();
    hpack::write(":method", "POST", &mut block);
    hpack::write(":scheme", "http", &mut block);
    hpack::write(":path", request.path, &mut block);
    if let Some(authority) = request.authority {
        hpack::write(":authority", authority, &mut block);
    }
    hpack::write("content-type", "application/grpc", &mut block);
    hpack::write("user-agent", "kmsctl-conformance", &mut block);
    hpack::write("te", "trailers", &mut block);
    hpack::write("grpc-timeout", request.timeout, &mut block);
    block
}

fn message(content: &[u8]) -> Vec<u8> {
    let length = u32::try_from(content.len()).unwrap_or(u32::MAX);
    [&[0][..], &length.to_be_bytes(), content].concat()
}

fn write_frame(kind: u8, flags: u8, id: u32, payload: &[u8], out: &mut Vec<u8>) {
    let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
    out.extend_from_slice(&length.to_be_bytes()[1..]);
    out.extend_from_slice(&[kind, flags]);
    out.extend_from_slice(&id.to_be_bytes());
    out.extend_from_slice(payload);
}

/// RFC 9113, 7.
fn reason(code: u32) -> String {
    let known = match code {
        0 => "NO_ERROR",
        1 => "PROTOCOL_ERROR",
        2 => "INTERNAL_ERROR",
        3 => "FLOW_CONTROL_ERROR",
        5 => "STREAM_CLOSED",
        7 => "REFUSED_STREAM",
        8 => "CANCEL",
        9 => "COMPRESSION_ERROR",
        11 => "ENHANCE_YOUR_CALM",
        _ => return format!("reason {code}"),
    };
    known.to_owned()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokio::net::UnixListener;

    use super::*;

    const REQUEST: Request<'_> =
        Request { path: "/p", authority: Some("/a"), timeout: "3S", message: b"hi" };

    /// What the client makes of a server that sends these bytes and is gone.
    async fn answer_to(bytes: Vec<u8>) -> Result<Answer, Broken> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let serve = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(&bytes).await.unwrap();
            stream.shutdown().await.unwrap();
            // The client may have seen enough before it read everything.
            let _ = stream.read_to_end(&mut Vec::new()).await;
        };
        let ask = async { Connection::open(path.to_str().unwrap()).await?.ask(&REQUEST).await };
        tokio::join!(serve, ask).1
    }

    fn frames(frames: &[(u8, u8, u32, &[u8])]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (kind, flags, id, payload) in frames {
            write_frame(*kind, *flags, *id, payload, &mut bytes);
        }
        bytes
    }

    #[tokio::test]
    async fn an_answer_is_put_together_from_all_its_frames() {
        let bytes = frames(&[
            (SETTINGS, 0, 0, &[]),
            (HEADERS, END_HEADERS, 3, b"another stream"),
            (HEADERS, PADDED | PRIORITY, 1, &[1, 0, 0, 0, 0, 7, 0x88, 0]),
            (CONTINUATION, END_HEADERS, 1, b"\x00\x01a\x01b"),
            (PING, 0, 0, b"12345678"),
            (DATA, 0, 1, &[0, 0, 0, 0, 2, b'h']),
            (DATA, PADDED, 1, &[2, b'o', 0, 0]),
            (HEADERS, END_HEADERS | END_STREAM, 1, b"\x00\x0bgrpc-status\x010"),
        ]);
        let answer = answer_to(bytes).await.unwrap();
        assert_eq!(answer.message(), Some(&b"ho"[..]));
        assert_eq!((answer.said.http_status, answer.said.grpc_status), (Some(200), Some(0)));
    }

    #[tokio::test]
    async fn an_end_without_an_answer_says_how() {
        let reset = answer_to(frames(&[(RST_STREAM, 0, 1, &[0, 0, 0, 1])])).await.unwrap_err();
        assert_eq!(reset.to_string(), "the stream was reset with PROTOCOL_ERROR");
        let ended = answer_to(frames(&[(GOAWAY, 0, 0, &[0, 0, 0, 1, 0, 0, 0, 11])])).await;
        let text = "the connection was ended with GOAWAY ENHANCE_YOUR_CALM";
        assert_eq!(ended.unwrap_err().to_string(), text);
        assert!(matches!(answer_to(vec![]).await.unwrap_err(), Broken::Lost(_)));
        assert!(matches!(answer_to(vec![0xff; 9]).await.unwrap_err(), Broken::Malformed(_)));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn any_frame_is_read_or_refused(kind in 0_u8..10, flags: u8, payload: Vec<u8>) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let bytes = frames(&[(kind, flags, 1, &payload)]);
            let answer = runtime.unwrap().block_on(answer_to(bytes));
            let ended = matches!(kind, DATA | HEADERS) && flags & END_STREAM != 0;
            prop_assert!(ended || answer.is_err());
        }
    }
}
