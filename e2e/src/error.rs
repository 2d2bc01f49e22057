//! Why a part of the chain could not be started or driven, grouped by who must act.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

/// The result of everything in this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong with a process of the chain.
#[derive(thiserror::Error)]
pub enum Error {
    /// The machine lacks a program or a library: the user installs or builds it.
    #[error("{what} is missing: {remedy}")]
    Missing { what: String, remedy: String },

    /// The machine refused: a file or a process.
    #[error("cannot {action}: {source}")]
    Machine { action: String, source: std::io::Error },

    /// A command that should succeed did not.
    #[error("{command} failed ({status}):\n{output}")]
    Command { command: String, status: String, output: String },

    /// A server ended although it should run.
    #[error("{name} ended ({status}) while {waiting_for} was awaited; last lines of {}:\n{tail}", log.display())]
    Ended { name: String, status: String, waiting_for: String, log: PathBuf, tail: String },

    /// Something did not happen in time.
    #[error("{what} did not happen within {} s; last seen: {last}{tails}", within.as_secs())]
    TimedOut { what: String, within: Duration, last: String, tails: String },

    /// A program answered, but not as it should.
    #[error("unexpected answer from {from}: {text}")]
    Answer { from: String, text: String },

    /// The plug-in refused a call; the text is what kube-apiserver would show.
    #[error("rpc error: code = {:?} desc = {}", .0.code(), .0.message())]
    Rpc(#[from] Box<tonic::Status>),

    /// The private CA could not be made.
    #[error("cannot make a certificate: {0}")]
    Certificate(#[from] rcgen::Error),
}

impl Error {
    /// For `map_err`: says what was tried when the machine refused.
    pub fn machine(action: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let action = action.into();
        move |source| Self::Machine { action, source }
    }

    /// A program answered, but not as it should.
    pub fn answer(from: impl Into<String>, text: impl Into<String>) -> Self {
        Self::Answer { from: from.into(), text: text.into() }
    }
}

/// A test that fails with this shows it by Debug: readable text and whole log lines, not one escaped string.
impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl From<tonic::Status> for Error {
    fn from(status: tonic::Status) -> Self {
        Self::Rpc(Box::new(status))
    }
}
