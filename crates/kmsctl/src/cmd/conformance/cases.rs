//! The cases in the order in which they are run: number, name, which versions they need, how they are judged, and why
//! anybody should care. The numbers are those under which a plug-in's makers talk about them; they never change.

use std::future::Future;
use std::pin::Pin;

use super::report::Verdict;
use super::subject::{Api, Subject};
use super::{load, status, tamper, v1, v2, wire};

/// Those of the thirty that need more than the socket.
pub(super) const NOT_JUDGED: &[u8] = &[4, 5, 7, 15, 18, 20, 21, 22, 26, 29, 30];

pub(super) struct Case {
    pub(super) number: u8,
    pub(super) name: &'static str,
    /// Versions without which there is nothing to judge.
    pub(super) needs: &'static [Api],
    pub(super) check: Check,
    pub(super) why: &'static str,
}

type Check = for<'a> fn(&'a Subject) -> Pin<Box<dyn Future<Output = Verdict> + 'a>>;

const ANY: &[Api] = &[];
const V1: &[Api] = &[Api::V1];
const V2: &[Api] = &[Api::V2];
const BOTH: &[Api] = &[Api::V1, Api::V2];

macro_rules! cases {
    ($($number:literal $name:literal $needs:ident $check:path, $why:literal;)*) => {
        &[$(Case {
            number: $number,
            name: $name,
            needs: $needs,
            check: |subject| Box::pin($check(subject)),
            why: $why,
        }),*]
    };
}

pub(super) const CASES: &[Case] = cases! {
    23 "encrypt-before-version" V1 v1::encrypt_first,
        "kube-apiserver asks for the Version once per connection; a plug-in that was restarted since then is not \
         asked again.";
    1 "unknown-fields" ANY wire::unknown_fields,
        "A later Kubernetes may send fields that this plug-in does not know; proto3 says to ignore them.";
    1 "invalid-utf8" ANY wire::invalid_utf8,
        "proto3 strings are UTF-8. What is taken as it comes ends up in logs and in later lookups.";
    2 "services" ANY wire::services,
        "kube-apiserver finds a plug-in by the name of its gRPC service: v1beta1 or v2.";
    2 "unknown-method" ANY wire::unknown_method,
        "UNIMPLEMENTED is how a client learns that a plug-in is older than itself. Any other code looks like an \
         outage.";
    3 "authority-localhost" ANY wire::authority_localhost,
        "KMS v2 sends `localhost` since Kubernetes 1.32.";
    3 "authority-abstract" ANY wire::authority_abstract,
        "For a socket in the abstract namespace, KMS v1 (and v2 before 1.32) sends its name.";
    3 "authority-encoded-path" ANY wire::authority_encoded,
        "KMS v1 sends the socket path percent-encoded, and so does v2 before 1.32. Many HTTP/2 libraries refuse \
         that before the plug-in sees it.";
    3 "authority-raw-path" ANY wire::authority_raw,
        "Kubernetes 1.28 and older send the bare socket path. Many HTTP/2 libraries refuse that before the \
         plug-in sees it.";
    3 "authority-absent" ANY wire::authority_absent,
        "gRPC makes it optional. No API server leaves it out, so a refusal will do; silence will not.";
    6 "status" V2 status::healthy,
        "kube-apiserver goes on writing while healthz says anything but ok beside a valid key_id: only an error \
         from Status stops it. And an ok that cannot encrypt hides an outage until the next restart.";
    9 "status-prompt" V2 status::prompt,
        "kube-apiserver holds a lock while it asks, and /readyz waits for it. A Status that queues behind \
         Decrypts makes a busy API server look dead.";
    10 "status-shared" V2 status::shared,
        "Every probe of every API server asks. If each answer takes an operation of the HSM, probes alone can \
         overload it.";
    11 "round-trip" V2 v2::round_trip,
        "It is what kube-apiserver does with each of its seeds.";
    11 "payload-sizes" V2 v2::sizes,
        "kube-apiserver sends 32 bytes today. Another size must come back whole or be refused in words; never \
         break the connection.";
    11 "uids" V2 v2::uids,
        "Each call has a new uid, which only helps to find it in logs. Nothing may depend on it.";
    12 "limits" V2 v2::limits,
        "kube-apiserver discards an answer whose ciphertext or key_id is empty or longer than 1024 bytes, and \
         stays unhealthy.";
    13 "annotations" V2 v2::annotations,
        "kube-apiserver discards an answer with a bad annotation name or more than 32 KiB of them; and it stores \
         them unencrypted in every object.";
    14 "changed-key-id" V2 tamper::key_id,
        "Whoever can write to etcd could otherwise make one key's values pass for another's.";
    14 "changed-annotations" V2 tamper::annotations,
        "Whoever can write to etcd can change them, so they must be authenticated like the rest.";
    14 "changed-ciphertext" V2 tamper::ciphertext,
        "Whoever can write to etcd can change it. A changed seed opens nothing or, worse, something chosen.";
    14 "refused-alike" V2 tamper::alike,
        "Texts that tell which check failed help whoever changes values step by step until one opens.";
    16 "unknown-key-id" V2 tamper::unknown_key_id,
        "A key_id that was never reported belongs to another cluster or was made up; guessing a key for it hides \
         that.";
    17 "never-twice" V2 v2::never_twice,
        "kube-apiserver's cache finds a seed by these bytes; two seeds under one name give the wrong one. And a \
         value that repeats hints at a nonce that repeats.";
    19 "status-and-encrypt-agree" V2 status::agrees,
        "kube-apiserver discards an Encrypt whose key_id is not that of the Status before it, and stays \
         unhealthy.";
    23 "version" V1 v1::version,
        "kube-apiserver takes exactly v1beta1, and makes no other call before that.";
    24 "ping" V1 v1::ping,
        "kube-apiserver's health check encrypts and decrypts these four bytes. A plug-in that insists on 32 is \
         never healthy.";
    24 "v1-round-trip" V1 v1::round_trip,
        "It is what kube-apiserver does with the key of each object. A cipher over 65,535 bytes fails the write; \
         an empty one is stored and lost.";
    25 "empty" V1 v1::empty,
        "KMS v1 checks no lengths in kube-apiserver: an empty cipher that is opened would be somebody's lost \
         secret.";
    25 "empty-ciphertext" V2 tamper::empty_ciphertext,
        "Nothing was sealed, so nothing can be opened.";
    25 "changed-cipher" V1 v1::cipher,
        "KMS v1 has no other protection: kube-apiserver believes what Decrypt returns, and whoever can write to \
         etcd can change the cipher.";
    25 "exchanged" BOTH v1::exchanged,
        "Both versions may share one key. A value of one that opens in the other escapes the checks of its own.";
    27 "callers" V2 load::v2_callers,
        "On a cold cache kube-apiserver decrypts many seeds at once. Each caller must get its own, and none may \
         hang.";
    27 "v1-callers" V1 load::v1_callers,
        "KMS v1 encrypts on every write, so a busy API server calls many times at once.";
    27 "expired-deadline" ANY wire::expired,
        "A call whose time is over must end, or it holds a session of the HSM that others wait for.";
    27 "cancelled-calls" ANY wire::cancelled,
        "kube-apiserver cancels what its own callers give up, over the one connection that all others use.";
    8 "status-version" V2 status::constant,
        "kube-apiserver remembers the first version it saw; after a change the plug-in is unhealthy until the API \
         server restarts.";
    28 "status-texts" ANY wire::texts,
        "kube-apiserver shows them to its users and writes them to its log.";
};

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn all_thirty_are_judged_or_named_as_not_judged() {
        let judged: BTreeSet<u8> = CASES.iter().map(|case| case.number).collect();
        let not: BTreeSet<u8> = NOT_JUDGED.iter().copied().collect();
        assert!(judged.is_disjoint(&not));
        assert_eq!(judged.union(&not).copied().collect::<Vec<_>>(), (1..=30).collect::<Vec<_>>());
        let listed: Vec<String> = NOT_JUDGED.iter().map(u8::to_string).collect();
        let (last, others) = listed.split_last().unwrap();
        let help = super::super::EXAMPLES.replace('\n', " ");
        assert!(help.contains(&format!("{} and {last}", others.join(", "))), "{help}");
    }

    #[test]
    fn names_are_unique() {
        let names: BTreeSet<&str> = CASES.iter().map(|case| case.name).collect();
        assert_eq!(names.len(), CASES.len());
    }
}
