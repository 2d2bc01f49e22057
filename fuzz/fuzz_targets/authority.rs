//! Any bytes of a client: followed without a panic, the same in whatever chunks they come, and never much more than
//! came in.
#![no_main]

use kms_plugin::authority::Follower;
use libfuzzer_sys::fuzz_target;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

fuzz_target!(|data: &[u8]| {
    let Some((&chunk, frames)) = data.split_first() else { return };
    let input = [PREFACE, frames].concat();
    let whole = followed(&input, input.len());
    assert_eq!(followed(&input, usize::from(chunk) + 1), whole);
    // An authority without its Huffman coding is at most 8/5 as long.
    assert!(whole.len() <= input.len() * 2);
});

fn followed(input: &[u8], chunk: usize) -> Vec<u8> {
    let mut follower = Follower::new();
    let mut out = Vec::new();
    for chunk in input.chunks(chunk) {
        follower.feed(chunk, &mut out);
    }
    follower.finish(&mut out);
    out
}
