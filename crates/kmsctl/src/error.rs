//! Everything that can go wrong for the operator: what it was, and what to do next. Texts of the services are
//! shown as they came, because that is what people search for.

use std::io;
use std::process::ExitCode;

use kms_api::client::{self, causes};
use kms_api::etcd::EtcdError;
use thiserror::Error;

#[derive(Debug, Error)]
pub(crate) enum Error {
    /// A setting that the command needs was not given.
    #[error("{what} is not known")]
    Missing { what: &'static str, option: &'static str },
    /// A setting that cannot work.
    #[error(transparent)]
    Setup(#[from] client::SetupError),
    /// Something was read that the command can make nothing of.
    #[error("{what}: {cause}")]
    Input { what: String, cause: String },
    /// The services did not do it.
    #[error(transparent)]
    Service(#[from] client::Error),
    /// A file that cannot be read or written.
    #[error("{path}: {cause}")]
    File { path: String, cause: io::Error },
    #[error("nothing was changed: the answer is not {expected}")]
    NotConfirmed { expected: String },
    #[error("nobody answers on the socket {socket}: {cause}")]
    Socket { socket: String, cause: String },
    #[error("not one of {calls} calls succeeded; the first failed with: {first}")]
    AllCallsFailed { calls: u64, first: String },
    #[error("{failed} of {cases} cases failed")]
    NotConforming { failed: usize, cases: usize },
    /// etcd gave nothing.
    #[error(transparent)]
    Etcd(#[from] EtcdError),
    #[error("this etcd holds nothing under {prefix}")]
    NothingStored { prefix: String },
    #[error("the plug-in at {socket} has no current key_id: {cause}")]
    Status { socket: String, cause: String },
    /// An outcome of `verify`, not a mishap.
    #[error("{left} of {objects} objects are not as they would be written now")]
    Left { left: u64, objects: u64 },
    /// An outcome of `audit verify`, not a mishap.
    #[error("the audit log was tampered with or damaged: {findings} findings")]
    Tampered { findings: u64 },
    /// `verify` found out nothing, which must not look like an outcome.
    #[error(transparent)]
    NotVerified(Box<Error>),
    #[error("the asynchronous runtime cannot start: {0}")]
    Runtime(io::Error),
    #[error("the result cannot be printed: {0}")]
    Output(io::Error),
}

impl Error {
    /// Nobody accepts on this socket.
    pub(crate) fn socket(socket: &str, cause: &(dyn std::error::Error + 'static)) -> Error {
        Error::Socket { socket: socket.to_owned(), cause: causes(cause) }
    }

    /// Prints what happened and what to do, and gives the exit code.
    pub(crate) fn report(&self) -> ExitCode {
        if let Error::Output(error) = self
            && error.kind() == io::ErrorKind::BrokenPipe
        {
            // `kmsctl … | head` has seen enough; that is no failure.
            return ExitCode::SUCCESS;
        }
        eprintln!("kmsctl: {self}");
        if let Error::Service(client::Error::Refused { reason: Some(reason), .. }) = self {
            eprintln!("        {reason}");
        }
        if let Some(remedy) = self.remedy() {
            eprintln!("        {remedy}");
        }
        self.exit_code()
    }

    fn exit_code(&self) -> ExitCode {
        match self {
            Error::Missing { .. } | Error::Setup(_) | Error::NotVerified(_) => ExitCode::from(2),
            _ => ExitCode::FAILURE,
        }
    }

    /// What to do next, where there is something better than trying again.
    fn remedy(&self) -> Option<String> {
        Some(match self {
            Error::Missing { option, .. } => format!("Give it with {option}."),
            Error::Service(error) => return service_remedy(error).map(str::to_owned),
            Error::NotConfirmed { .. } => "Type the id exactly, or give --yes.".to_owned(),
            Error::Socket { .. } => {
                "Is the plug-in running, and is this its UNIX_SOCKET_PATH? Its log says where it listens.".to_owned()
            }
            Error::AllCallsFailed { .. } => "The plug-in's log has more about these calls.".to_owned(),
            Error::NotConforming { .. } => {
                "Each is explained in the report, with why it matters to kube-apiserver.".to_owned()
            }
            Error::File { cause, .. } => match cause.kind() {
                io::ErrorKind::PermissionDenied => "Run as a user who may use this file.".to_owned(),
                io::ErrorKind::AlreadyExists => "Choose another name; existing files are never overwritten.".to_owned(),
                _ => return None,
            },
            Error::Etcd(error) => return etcd_remedy(error).map(str::to_owned),
            Error::NothingStored { .. } => {
                "Is this the cluster's etcd, and --etcd-prefix what kube-apiserver has?".to_owned()
            }
            Error::Status { .. } => {
                "Repair the plug-in (its readiness probe says more), or give the key_id with --key-id.".to_owned()
            }
            Error::NotVerified(cause) => return cause.remedy(),
            Error::Setup(_)
            | Error::Input { .. }
            | Error::Left { .. }
            | Error::Tampered { .. }
            | Error::Runtime(_)
            | Error::Output(_) => return None,
        })
    }
}

fn etcd_remedy(error: &EtcdError) -> Option<&'static str> {
    Some(match error {
        EtcdError::Setup(client::SetupError::NoCa { .. }) => {
            "Give it with --etcd-cacert FILE (kubeadm: /etc/kubernetes/pki/etcd/ca.crt)."
        }
        EtcdError::Unreachable { cause, .. } if cause.contains("certificate") => {
            "Check --etcd-cacert and, where etcd wants a client certificate, --etcd-cert and --etcd-key."
        }
        EtcdError::Unreachable { .. } => {
            "Is etcd running there? Give its client URL with --etcd-endpoints."
        }
        EtcdError::Setup(_)
        | EtcdError::Identity { .. }
        | EtcdError::Refused { .. }
        | EtcdError::TooLong { .. } => return None,
    })
}

fn service_remedy(error: &client::Error) -> Option<&'static str> {
    match error {
        client::Error::Iam { code, .. } if code == "BXNIM0415E" => Some(
            "The token service does not know this API key: it is mistyped or revoked. Take another, or let an \
             administrator run `kmsctl api-keys create`.",
        ),
        client::Error::Iam { code, .. } if code == "BXNIM0407E" => Some(
            "The token is for another audience or of an issuer that is not trusted, or it has ended.",
        ),
        client::Error::Iam { status: 403, .. }
        | client::Error::Refused { status: 401 | 403, .. } => Some(
            "You are known but may not do this: check the role and the instance (`kmsctl service-ids list`), and where \
             you log in with another issuer's token, that the profile trusts its subject (`kmsctl profiles list`).",
        ),
        client::Error::Refused { status: 404, .. } => {
            Some("List what there is with `kmsctl keys list`, and check --instance.")
        }
        client::Error::Refused { status: 400, message, .. }
            if message.contains("Instance Header") =>
        {
            Some(
                "Give the instance's UUID with --instance or KMS_INSTANCE_ID; `kmsctl instances list` shows it.",
            )
        }
        client::Error::Refused { .. } | client::Error::Iam { .. } => None,
        client::Error::Unreachable { cause, .. } if cause.contains("certificate") => Some(
            "The certificate is not of this CA or not for this name: check --ca-file and the URL.",
        ),
        client::Error::Unreachable { .. } => Some(
            "Is the service running, and is the URL right? Its probe is /readyz on the health port.",
        ),
        client::Error::TimedOut { .. } => {
            Some("Try again with a longer --timeout, and look at the service's log.")
        }
        client::Error::BadAnswer { .. } => {
            Some("Is this the URL of the service itself, and not of something else?")
        }
        client::Error::ApiKeyFile { .. } => Some("It must hold the API key and nothing else."),
        client::Error::CrTokenFile { .. } => {
            Some("It must hold a token that has not ended, such as `kubectl create token` prints.")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usage_and_failure_have_their_own_exit_codes() {
        let missing = Error::Missing { what: "the URL", option: "--url" };
        assert_eq!(missing.exit_code(), ExitCode::from(2));
        let timed_out = client::Error::TimedOut { what: "the key service".to_owned() };
        assert_eq!(Error::Service(timed_out).exit_code(), ExitCode::FAILURE);
    }

    #[test]
    fn an_unknown_api_key_is_shown_as_the_service_says_it() {
        let (code, message) =
            ("BXNIM0415E".to_owned(), "Provided API key could not be found".to_owned());
        let error = Error::Service(client::Error::Iam { status: 400, code, message });
        assert_eq!(error.to_string(), "BXNIM0415E:Provided API key could not be found");
        assert!(error.remedy().is_some_and(|text| text.contains("kmsctl api-keys create")));
    }
}
