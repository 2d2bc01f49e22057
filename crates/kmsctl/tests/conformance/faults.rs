//! One run for each fault.

use crate::double::Fault;
use crate::program::{ATTEMPTS, is_late, names, report};
use crate::server::Server;

/// Each fault, and the names of the cases that must fail, in the order of the report.
async fn found(faults: &[(Fault, &[&str])]) {
    for (fault, expected) in faults {
        // Some misbehave once: a machine that was too slow for them meets another one.
        let mut judged = report(&Server::start(*fault), &[], "2s").await;
        for _ in 0..ATTEMPTS {
            if !is_late(&judged.1, expected) {
                break;
            }
            judged = report(&Server::start(*fault), &[], "2s").await;
        }
        let (code, report) = judged;
        assert_eq!(names(&report, "fail"), *expected, "{fault:?}: {report:#}");
        assert_eq!(code, Some(1), "{fault:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn below_the_messages() {
    found(&[
        (Fault::NeitherService, &["services"]),
        (Fault::StockAuthority, &["authority-encoded-path", "authority-raw-path"]),
        (Fault::SilentWithoutAuthority, &["authority-absent"]),
        (Fault::UnknownMethodIsUnknown, &["unknown-method"]),
        (Fault::RefusesUnknownFields, &["unknown-fields"]),
        (Fault::TakesInvalidUtf8, &["invalid-utf8"]),
        (Fault::HangsWhenExpired, &["expired-deadline"]),
        (Fault::KeepsCancelledCalls, &["cancelled-calls"]),
    ])
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn in_status() {
    found(&[
        (Fault::UnhealthyInWords, &["status"]),
        (Fault::EmptyKeyId, &["status", "limits", "unknown-key-id"]),
        (Fault::LongKeyId, &["status", "limits"]),
        (Fault::OldVersion, &["status-version"]),
        (Fault::VersionChanges, &["status-version"]),
        (Fault::KeyIdChanges, &["status-version", "status-shared", "status-and-encrypt-agree"]),
        (Fault::StatusWaitsForDecrypts, &["status-prompt"]),
        (Fault::StatusOneByOne, &["status-shared"]),
    ])
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn in_kms_v2() {
    found(&[
        (Fault::FourBytesHang, &["payload-sizes"]),
        (Fault::OpensOnlyWhatIsShort, &["payload-sizes"]),
        (Fault::UidMustBeAscii, &["uids"]),
        (Fault::LongCiphertext, &["limits"]),
        (Fault::AnnotationWithSlash, &["annotations"]),
        (Fault::TooManyAnnotations, &["annotations"]),
        (Fault::PayloadInAnnotation, &["annotations"]),
        (Fault::KeyIdIgnored, &["changed-key-id", "unknown-key-id"]),
        (Fault::EmptyKeyIdTaken, &["unknown-key-id"]),
        (Fault::AnnotationsIgnored, &["changed-annotations"]),
        (Fault::LastByteIgnored, &["changed-ciphertext"]),
        (Fault::TellsWhichCheck, &["refused-alike"]),
        (Fault::Repeats, &["never-twice"]),
        (Fault::OtherKeyIdFromEncrypt, &["status-and-encrypt-agree"]),
        (Fault::OpensNothing, &["empty-ciphertext"]),
        (Fault::OneBufferForAll, &["callers"]),
        (Fault::FullAtOnce, &["callers"]),
        (Fault::PayloadInText, &["status-texts"]),
    ])
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn in_kms_v1() {
    found(&[
        (Fault::VersionFirst, &["encrypt-before-version"]),
        (Fault::OtherV1Version, &["version"]),
        (Fault::InsistsOn32Bytes, &["ping"]),
        (Fault::LongCipher, &["v1-round-trip"]),
        (Fault::OpensEmptyCipher, &["empty"]),
        (Fault::V1LastByteIgnored, &["changed-cipher"]),
        (Fault::V1OpensV2, &["exchanged"]),
        (Fault::V2OpensV1, &["exchanged"]),
        (Fault::V1OneBufferForAll, &["v1-callers"]),
    ])
    .await;
}

/// Where nothing works, many cases say so; the one about it must be among them.
#[tokio::test(flavor = "multi_thread")]
async fn what_breaks_everything_is_named_where_it_belongs() {
    for (fault, expected) in [
        (Fault::CannotSeal, ["status", "round-trip"]),
        (Fault::StatusHangs, ["status", "status-prompt"]),
        (Fault::PayloadsTurnRound, ["status", "round-trip"]),
        (Fault::SameUidForBoth, ["round-trip", "uids"]),
    ] {
        let server = Server::start(fault);
        let (code, report) = report(&server, &[], "300ms").await;
        let failed = names(&report, "fail");
        assert!(expected.iter().all(|name| failed.contains(name)), "{fault:?}: {failed:?}");
        assert!(names(&report, "pass").contains(&"services"), "{fault:?}: {report:#}");
        assert_eq!(code, Some(1));
    }
}
