//! Any request line and headers, with and without a good token: an answer that blames the caller, never a panic, and
//! never the answer of a server that broke.
#![no_main]

#[path = "../asked.rs"]
mod asked;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((&choice, head)) = data.split_first() else { return };
    asked::with(asked::LIFE, |asked| {
        // A path that names a key may name one that exists.
        let mut request = with_key(head, &asked.key);
        if choice & 1 != 0 {
            request.extend_from_slice(b"\r\n");
            request.extend_from_slice(asked.headers().as_bytes());
        }
        request.extend_from_slice(b"\r\n\r\n");
        if choice & 2 == 0 { asked.keys(&request) } else { asked.tokens(&request) };
    });
});

fn with_key(head: &[u8], key: &str) -> Vec<u8> {
    match head.windows(4).position(|part| part == b"{id}") {
        Some(at) => [&head[..at], key.as_bytes(), &head[at + 4..]].concat(),
        None => head.to_vec(),
    }
}
