//! Key servers have made the same mistakes again and again; twenty-one of them are known by name. Each has a number
//! that it keeps, and tests that bear it: `pitfall_03_all_unwraps_that_fail_look_alike_and_take_as_long`. This is the
//! list, and the proof that none of them lost its tests. `cargo test --workspace pitfall_` runs them.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail loudly, as tests do")]

mod numbered;

use numbered::Numbered;

const PITFALLS: [&str; 21] = [
    "a root key that may also wrap, be copied or be changed",
    "root keys that can be taken out of the token",
    "an oracle in how an unwrap fails",
    "an AES-GCM IV that repeats",
    "short ciphertexts that crash the server",
    "associated data that is dropped, reordered or joined",
    "a ciphertext that opens under another key or version, or after rows were swapped",
    "reading across tenants, and lists that tell of them",
    "a new action that borrows another's permission",
    "a way to the HSM past the policy",
    "a cache that outlives a disabled key or a withdrawn right",
    "a state that is checked, and changed before it is acted on",
    "forged and stale tokens",
    "secrets in logs, errors and audit",
    "paths that mean the same in two ways",
    "times that tell what exists",
    "requests that cost more than they may",
    "routes that answer and do nothing",
    "bad ciphertexts that harm the good traffic",
    "settings that turn checks off",
    "another token in the place of the right one",
];

#[test]
fn every_pitfall_has_a_test_of_its_name() {
    Numbered::of("pitfall_").cover(&PITFALLS);
}
