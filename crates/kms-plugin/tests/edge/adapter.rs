//! The adapter against the HTTP/2 stack that the server uses: whatever a client writes, the stack must read the same
//! headers as without the adapter, the refused authority excepted.

use std::time::Duration;

use http::uri::Authority;
use kms_plugin::authority::{Adapter, Follower, MAX_BLOCK};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream};

use crate::wire::{
    DATA, Encoder, Field, Form, Framing, PREFACE, SETTINGS, write_block, write_frame,
};

/// One request of a generated connection.
#[derive(Debug, Clone)]
struct Request {
    resize: Option<usize>,
    authority: Option<Field>,
    fields: Vec<Field>,
    framing: Framing,
}

/// What the HTTP/2 stack made of a request.
#[derive(Debug, PartialEq)]
struct Seen {
    authority: Option<Vec<u8>>,
    fields: Vec<(Vec<u8>, Vec<u8>)>,
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn the_stack_reads_what_the_client_wrote(
        requests in vec(request(any_authority().boxed()), 1..12),
        chunk in 1..2000_usize,
    ) {
        let seen = judge(&connection(&requests), chunk, requests.len(), Adapter::new);
        let expected: Vec<Seen> = requests.iter().map(expected).collect();
        prop_assert_eq!(seen, expected);
    }

    #[test]
    fn what_needs_no_help_passes_byte_for_byte(
        requests in vec(request(good_authority().boxed()), 1..12),
    ) {
        let bytes = connection(&requests);
        prop_assert_eq!(followed(&bytes, bytes.len()), bytes);
    }

    #[test]
    fn chunks_change_nothing(
        requests in vec(request(any_authority().boxed()), 1..6),
        garbage in vec(any::<u8>(), 0..200),
        flips in vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        chunk in 1..50_usize,
    ) {
        let mut bytes = connection(&requests);
        bytes.extend(garbage);
        for (index, flip) in flips {
            let at = index.index(bytes.len());
            bytes[at] ^= flip;
        }
        prop_assert_eq!(followed(&bytes, chunk), followed(&bytes, bytes.len()));
    }

    #[test]
    fn what_is_no_http2_passes_untouched(bytes in vec(any::<u8>(), 0..500), chunk in 1..50_usize) {
        prop_assert_eq!(followed(&bytes, chunk), bytes);
    }
}

#[test]
fn a_block_that_outgrows_its_frame_goes_on_in_a_continuation() {
    let mut authority = vec![b'0'; 26_000];
    authority[0] = b'%';
    let request = Request {
        resize: None,
        authority: Some(Field::usual(":authority", &authority)),
        fields: vec![],
        framing: Framing { priority: true, end_stream: true, ..Framing::default() },
    };
    let bytes = connection(std::slice::from_ref(&request));
    assert!(bytes.len() < 16 * 1024 + 100, "the client needs one frame only");
    assert_eq!(judge(&bytes, 4096, 1, Adapter::new), [expected(&request)]);
}

#[test]
fn case_03_without_the_adapter_the_stack_refuses_a_path() {
    for (authority, served) in [("localhost", 1), ("/run/kms.sock", 0), ("%2Frun%2Fkms.sock", 0)] {
        let request = Request {
            resize: None,
            authority: Some(Field::usual(":authority", authority.as_bytes())),
            fields: vec![],
            framing: Framing { end_stream: true, ..Framing::default() },
        };
        let bytes = connection(&[request]);
        assert_eq!(judge(&bytes, 4096, 1, |stream| stream).len(), served, "{authority}");
    }
}

#[test]
fn a_block_is_held_only_up_to_its_bound() {
    let mut bytes = start();
    let endless = Framing { fragments: vec![0; MAX_BLOCK], ..Framing::default() };
    write_block(1, b"", &endless, &mut bytes);
    let mut follower = Follower::new();
    let (mut out, mut held_most) = (Vec::new(), 0);
    for (at, byte) in bytes.iter().enumerate() {
        follower.feed(&[*byte], &mut out);
        held_most = held_most.max(at + 1 - out.len());
    }
    assert!(held_most < MAX_BLOCK + 9, "a frame header may wait too, but {held_most}");
    assert!(follower.is_lost());
    assert_eq!(out, bytes);
}

#[test]
fn data_does_not_wait_for_the_rest_of_its_frame() {
    let mut bytes = start();
    write_frame(DATA, 0, 1, &[7; 10_000], &mut bytes);
    bytes.truncate(bytes.len() - 9_000);
    let mut out = Vec::new();
    Follower::new().feed(&bytes, &mut out);
    assert_eq!(out, bytes);
}

#[test]
fn broken_blocks_and_frames_pass_untouched() {
    let broken: [(&str, u8, u8, &[u8]); 6] = [
        ("integer without end", 1, 4, &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x00]),
        ("string cut short", 1, 4, &[0x41, 0x05, b'%']),
        ("Huffman code for EOS", 1, 4, &[0x41, 0x84, 0xff, 0xff, 0xff, 0xff]),
        ("padding longer than the frame", 1, 4 | 8, &[5, 0x82]),
        ("continuation of nothing", 9, 4, &[0x82]),
        ("promise by a client", 5, 4, &[0, 0, 0, 2, 0x82]),
    ];
    for (what, kind, flags, payload) in broken {
        let mut bytes = start();
        write_frame(kind, flags, 1, payload, &mut bytes);
        // An authority that would be replaced, if anybody still looked.
        write_frame(1, 4, 3, b"\x41\x03%2F", &mut bytes);
        assert_eq!(followed(&bytes, 1), bytes, "{what}");
    }
}

fn request(authority: BoxedStrategy<Vec<u8>>) -> impl Strategy<Value = Request> {
    let name = select(vec!["content-type", "grpc-timeout", "user-agent", "x-one", "x-two"]);
    let value = prop_oneof![
        select(vec!["application/grpc", "2999876u", ""]).prop_map(|text| text.as_bytes().to_vec()),
        vec(0x20..0x7f_u8, 0..300),
    ];
    let field = (name.prop_map(Vec::from), value);
    (
        prop::option::weighted(0.1, 0..=4096_usize),
        prop::option::weighted(0.9, written((Just(b":authority".to_vec()), authority))),
        vec(written(field), 0..5),
        framing(),
    )
        .prop_map(|(resize, authority, fields, framing)| Request {
            resize,
            authority,
            fields,
            framing,
        })
}

fn any_authority() -> impl Strategy<Value = Vec<u8>> {
    let path = select(vec!["%2Fvar%2Frun%2Fkms.sock", "/var/run/kms.sock", "a:b:c", "@"]);
    prop_oneof![
        3 => path.prop_map(|text| text.as_bytes().to_vec()),
        1 => vec(any::<u8>(), 1..400),
        2 => good_authority(),
    ]
}

fn good_authority() -> impl Strategy<Value = Vec<u8>> {
    select(vec!["localhost", "@kms.sock", "[::1]:80", "a.b-c_d:1"])
        .prop_map(|text| text.as_bytes().to_vec())
}

fn written(field: impl Strategy<Value = (Vec<u8>, Vec<u8>)>) -> impl Strategy<Value = Field> {
    let form = select(vec![Form::Indexing, Form::Indexing, Form::Without, Form::Never]);
    (field, form, any::<bool>(), any::<(bool, bool)>()).prop_map(
        |((name, value), form, by_index, huffman)| Field { name, value, form, by_index, huffman },
    )
}

fn framing() -> impl Strategy<Value = Framing> {
    (prop::option::of(any::<u8>()), any::<bool>(), vec(0..60_usize, 0..4)).prop_map(
        |(padding, priority, fragments)| Framing { padding, priority, fragments, end_stream: true },
    )
}

fn start() -> Vec<u8> {
    let mut bytes = PREFACE.to_vec();
    write_frame(SETTINGS, 0, 0, &[], &mut bytes);
    bytes
}

/// The whole connection as the client writes it.
fn connection(requests: &[Request]) -> Vec<u8> {
    let mut bytes = start();
    let mut encoder = Encoder::new();
    for (stream, request) in (1..).step_by(2).zip(requests) {
        let mut block = Vec::new();
        if let Some(limit) = request.resize {
            encoder.resize(limit, &mut block);
        }
        for (name, value) in [(":method", "POST"), (":scheme", "http"), (":path", "/a")] {
            encoder.field(&Field::usual(name, value.as_bytes()), &mut block);
        }
        for field in request.authority.iter().chain(&request.fields) {
            encoder.field(field, &mut block);
        }
        write_block(stream, &block, &request.framing, &mut bytes);
    }
    bytes
}

fn followed(bytes: &[u8], chunk: usize) -> Vec<u8> {
    let mut follower = Follower::new();
    let mut out = Vec::new();
    for chunk in bytes.chunks(chunk.max(1)) {
        follower.feed(chunk, &mut out);
    }
    follower.finish(&mut out);
    out
}

fn expected(request: &Request) -> Seen {
    let fields = request.fields.iter().map(|field| (field.name.clone(), field.value.clone()));
    let mut fields: Vec<_> = fields.collect();
    fields.sort();
    Seen { authority: request.authority.as_ref().map(|field| served(&field.value)), fields }
}

/// The authority that the server sees: as it was, or of the same length and beyond reproach.
fn served(value: &[u8]) -> Vec<u8> {
    if Authority::try_from(value).is_ok() {
        return value.to_vec();
    }
    let harmless = |byte: &u8| byte.is_ascii_alphanumeric() || b"._".contains(byte);
    value.iter().map(|byte| if harmless(byte) { *byte } else { b'-' }).collect()
}

/// Sends `bytes` through `between` into a real HTTP/2 server and reports the first `count` requests that it sees.
fn judge<S: AsyncRead + AsyncWrite + Unpin>(
    bytes: &[u8],
    chunk: usize,
    count: usize,
    between: impl FnOnce(DuplexStream) -> S,
) -> Vec<Seen> {
    // Paused time jumps as soon as nobody has anything to do: a request that never comes costs no waiting.
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = runtime.enable_time().start_paused(true).build().unwrap();
    runtime.block_on(async {
        let (client, server) = tokio::io::duplex(chunk);
        let (mut answers, mut requests) = tokio::io::split(client);
        let bytes = bytes.to_vec();
        tokio::spawn(async move { requests.write_all(&bytes).await });
        tokio::spawn(async move { answers.read_to_end(&mut Vec::new()).await });
        let mut connection = h2::server::handshake(between(server)).await.unwrap();
        let mut seen = Vec::new();
        while seen.len() < count {
            let next = tokio::time::timeout(Duration::from_secs(1), connection.accept());
            let Ok(Some(Ok((request, mut respond)))) = next.await else { break };
            respond.send_response(http::Response::new(()), true).unwrap();
            let mut fields: Vec<_> = request
                .headers()
                .iter()
                .map(|(name, value)| (name.as_str().into(), value.as_bytes().to_vec()))
                .collect();
            fields.sort();
            let authority = request.uri().authority().map(|text| text.as_str().into());
            seen.push(Seen { authority, fields });
        }
        seen
    })
}
