//! What kube-apiserver demands of a KMS plug-in comes down to thirty cases. Each has a number that it keeps (`kmsctl
//! conformance` prints the same ones), and tests that bear it in their name: `case_05_a_stale_socket_is_replaced`.
//! This is the list, and the proof that none of them lost its tests. `cargo test --workspace case_` runs them.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail loudly, as tests do")]

mod numbered;

use numbered::Numbered;

const CASES: [&str; 30] = [
    "the bytes of all messages; unknown fields, invalid UTF-8",
    "both services on a file and an abstract socket; unknown methods",
    "every form of :authority",
    "endpoints that kube-apiserver misreads",
    "stale and live sockets; mode and owner",
    "Status is ok only if the key wraps and unwraps",
    "Status fails when it does not, and never reports a text instead",
    "Status' version never changes",
    "Status is prompt, whatever else goes on",
    "many Status calls cost no more than one",
    "payloads of every size",
    "ciphertext and key_id within the limits, or refused at the start",
    "annotations within the rules",
    "whatever is changed, the refusal is the same",
    "old key_ids after rotations and a restart",
    "unknown key_ids",
    "no two sealed values are alike",
    "two nodes read each other's values",
    "Status and Encrypt agree in every interleaving",
    "a rotation that fails",
    "no key_id comes back",
    "nodes of which one has rotated",
    "KMS v1: Version",
    "KMS v1: ping, write rate, cold lists",
    "KMS v1: changed, empty and foreign values",
    "crash, outage, orderly end",
    "cancelled and late calls; a full queue",
    "no secret in a log or a status; the uid in every line",
    "an API server through hours of virtual time, and a real one",
    "what is stored, read offline",
];

#[test]
fn every_case_of_the_contract_has_a_test_of_its_name() {
    Numbered::of("case_").cover(&CASES);
}

#[test]
fn only_what_is_run_as_a_test_counts() {
    let text = "
        // fn case_01_a_comment() {
        fn case_02_a_helper() {}
        #[ignore]
        #[test]
        fn case_03_left_out() {}
        #[test]
        #[should_panic]
        fn case_04_a_test() {}
        #[tokio::test(flavor = \"multi_thread\")]
        async fn case_05_another() {
        #[test]
        fn something_else() {}
        on_every_token!(
            cases::case_06_named_in_a_list,
            // cases::case_07_named_in_a_comment,
    ";
    let found = numbered::tests_of(text, "case_");
    assert_eq!(found, ["case_04_a_test", "case_05_another", "case_06_named_in_a_list"]);
}
