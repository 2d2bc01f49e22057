//! The only place where a failure becomes a gRPC code. kube-apiserver acts on none of them, but shows the text to the
//! user and counts the code in its metrics; so the text says what is wrong, and never holds anything secret.

use tonic::{Code, Status};

use crate::sealer::{Refusal, SealerError};

/// What the caller is told.
pub(super) fn of(error: SealerError) -> Status {
    Status::new(code(&error), error.to_string())
}

/// What we are about to send breaks the contract; kube-apiserver would discard it with a worse message.
pub(super) fn unsendable(what: &str) -> Status {
    Status::internal(format!("the answer breaks the KMS contract: {what}"))
}

/// The code as gRPC spells it.
pub(super) fn name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        _ => "OTHER",
    }
}

fn code(error: &SealerError) -> Code {
    match error {
        SealerError::TooLarge { .. } | SealerError::NotAuthentic => Code::InvalidArgument,
        SealerError::UnknownKey(_) => Code::NotFound,
        SealerError::Refused { refusal, .. } => match refusal {
            // Operators search for the service's words behind exactly "code = Unknown desc = ".
            Refusal::Access | Refusal::Request => Code::Unknown,
            Refusal::NoSuchKey => Code::Unavailable,
            Refusal::KeyState | Refusal::NoWrap | Refusal::Replaced => Code::FailedPrecondition,
        },
        SealerError::Unavailable { .. } => Code::Unavailable,
        SealerError::TimedOut(_) => Code::DeadlineExceeded,
        SealerError::Overloaded(_) => Code::ResourceExhausted,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::provider::Backend;

    #[test]
    fn every_failure_has_its_code() {
        let refused = |refusal| SealerError::Refused { refusal, text: "no".into() };
        for (error, expected) in [
            (SealerError::TooLarge { what: "it", bytes: 2, limit: 1 }, "INVALID_ARGUMENT"),
            (SealerError::NotAuthentic, "INVALID_ARGUMENT"),
            (SealerError::UnknownKey(String::new()), "NOT_FOUND"),
            (refused(Refusal::Access), "UNKNOWN"),
            (refused(Refusal::Request), "UNKNOWN"),
            (refused(Refusal::NoSuchKey), "UNAVAILABLE"),
            (refused(Refusal::KeyState), "FAILED_PRECONDITION"),
            (refused(Refusal::Replaced), "FAILED_PRECONDITION"),
            (SealerError::Unavailable { text: String::new() }, "UNAVAILABLE"),
            (SealerError::TimedOut(Backend::Hsm), "DEADLINE_EXCEEDED"),
            (SealerError::Overloaded(Backend::Hsm), "RESOURCE_EXHAUSTED"),
        ] {
            assert_eq!(name(of(error.clone()).code()), expected, "{error:?}");
        }
    }

    #[test]
    fn the_words_of_the_service_come_first() {
        let text = "BXNIM0415E:Provided API key could not be found";
        let status = of(SealerError::Refused { refusal: Refusal::Access, text: text.into() });
        assert_eq!((status.code(), status.message()), (Code::Unknown, text));
    }
}
