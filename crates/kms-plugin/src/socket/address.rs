//! How the socket is named. kube-apiserver takes a URL and misreads some of them without a word; what it would misread
//! is refused here, so that both ends always mean the same socket.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use thiserror::Error;

/// Longest file name or abstract name: `sun_path` has 108 bytes, one of them NUL (unix(7)). A file needs a few more
/// while it is put into place.
pub const MAX_NAME: usize = 107;
const PLACING: usize = "/.k99".len();

/// A socket in the file system or in the abstract namespace of the network namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SocketAddress {
    /// Absolute.
    File(PathBuf),
    /// Without the `@` by which it is written.
    Abstract(String),
}

/// Why a text names no socket that kube-apiserver would find.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum AddressError {
    #[error("{0:?} is neither an absolute path nor @ and a name")]
    Form(String),
    #[error("{text:?} would make kube-apiserver dial {dialled}: write {meant:?}")]
    Misread { text: String, dialled: String, meant: String },
    #[error(
        "{0:?} has a character that kube-apiserver changes or drops (%, ? or #): write the path alone"
    )]
    Escaped(String),
    #[error("{text:?} is too long: at most {limit} bytes")]
    TooLong { text: String, limit: usize },
}

impl FromStr for SocketAddress {
    type Err = AddressError;

    /// Takes a path, `@name`, and the URLs `unix:///path`, `unix:/path`, `unix:///@name` and `unix:/@name`.
    fn from_str(text: &str) -> Result<SocketAddress, AddressError> {
        let path = match text.strip_prefix("unix:") {
            Some(rest) => path_of_url(text, rest)?,
            None if text.starts_with("/@") => {
                return Err(misread(text, "an abstract socket", text));
            }
            None => text,
        };
        if let Some(name) = path.strip_prefix('@') {
            return abstract_name(text, name);
        }
        file(text, path)
    }
}

impl fmt::Display for SocketAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SocketAddress::File(path) => path.display().fmt(f),
            SocketAddress::Abstract(name) => write!(f, "@{name}"),
        }
    }
}

/// What kube-apiserver makes of a URL: host and path are told apart by Go's `net/url`, and only the path is dialled.
fn path_of_url<'a>(text: &str, rest: &'a str) -> Result<&'a str, AddressError> {
    if rest.contains(['%', '?', '#']) {
        return Err(AddressError::Escaped(text.to_owned()));
    }
    let path = match rest.strip_prefix("//") {
        Some(after_host) if !after_host.starts_with('/') => {
            let dialled = after_host.find('/').map_or("nothing", |slash| &after_host[slash..]);
            return Err(misread(text, dialled, after_host));
        }
        Some(path) => path,
        None if rest.starts_with('/') => rest,
        None => return Err(misread(text, "nothing", rest)),
    };
    Ok(if path.starts_with("/@") { &path[1..] } else { path })
}

fn misread(text: &str, dialled: &str, name: &str) -> AddressError {
    let name = name.trim_start_matches('/');
    let root = if name.starts_with('@') { "" } else { "/" };
    let meant = format!("{root}{name}");
    AddressError::Misread { text: text.to_owned(), dialled: dialled.to_owned(), meant }
}

fn abstract_name(text: &str, name: &str) -> Result<SocketAddress, AddressError> {
    if name.is_empty() || name.contains('\0') {
        return Err(AddressError::Form(text.to_owned()));
    }
    within(MAX_NAME, text, name)?;
    Ok(SocketAddress::Abstract(name.to_owned()))
}

fn file(text: &str, path: &str) -> Result<SocketAddress, AddressError> {
    let named = Path::new(path).file_name().is_some() && !path.ends_with('/');
    if !path.starts_with('/') || !named || path.contains('\0') {
        return Err(AddressError::Form(text.to_owned()));
    }
    within(MAX_NAME - PLACING, text, path)?;
    Ok(SocketAddress::File(path.into()))
}

fn within(limit: usize, text: &str, name: &str) -> Result<(), AddressError> {
    if name.len() <= limit {
        return Ok(());
    }
    Err(AddressError::TooLong { text: text.to_owned(), limit })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn case_04_what_kube_apiserver_reads_right_is_taken() {
        for text in ["/var/run/kms.sock", "unix:///var/run/kms.sock", "unix:/var/run/kms.sock"] {
            assert_eq!(text.parse(), Ok(SocketAddress::File("/var/run/kms.sock".into())), "{text}");
        }
        for text in ["@kms.sock", "unix:///@kms.sock", "unix:/@kms.sock"] {
            assert_eq!(text.parse(), Ok(SocketAddress::Abstract("kms.sock".into())), "{text}");
        }
    }

    #[test]
    fn case_04_what_it_misreads_is_refused_and_the_right_form_is_told() {
        for (text, dialled, meant) in [
            ("unix://var/run/kms.sock", "/run/kms.sock", "/var/run/kms.sock"),
            ("unix://@kms.sock", "nothing", "@kms.sock"),
            ("unix:@kms.sock", "nothing", "@kms.sock"),
            ("unix:kms.sock", "nothing", "/kms.sock"),
            ("/@kms.sock", "an abstract socket", "@kms.sock"),
        ] {
            let error = text.parse::<SocketAddress>().unwrap_err();
            let expected =
                format!("{text:?} would make kube-apiserver dial {dialled}: write {meant:?}");
            assert_eq!(error.to_string(), expected);
        }
        for text in ["unix:///a%20b.sock", "unix:///a.sock?x", "unix:///a.sock#y"] {
            assert_eq!(text.parse::<SocketAddress>(), Err(AddressError::Escaped(text.into())));
        }
    }

    #[test]
    fn what_names_no_socket_is_refused() {
        for text in [
            "",
            "kms.sock",
            "./kms.sock",
            "@",
            "/",
            "/run/",
            "/run/..",
            "unix:///",
            "/a\0b",
            "@a\0b",
        ] {
            assert_eq!(text.parse::<SocketAddress>(), Err(AddressError::Form(text.into())));
        }
    }

    #[test]
    fn the_longest_names_are_known() {
        assert!(format!("@{}", "n".repeat(107)).parse::<SocketAddress>().is_ok());
        assert!(format!("@{}", "n".repeat(108)).parse::<SocketAddress>().is_err());
        assert!(format!("/{}", "n".repeat(101)).parse::<SocketAddress>().is_ok());
        assert!(format!("/{}", "n".repeat(102)).parse::<SocketAddress>().is_err());
    }

    proptest! {
        #[test]
        fn what_was_taken_reads_the_same_again(text in "(unix:)?(//)?/?@?[a-z/.%?#@]{0,20}") {
            if let Ok(address) = text.parse::<SocketAddress>() {
                prop_assert_eq!(address.to_string().parse(), Ok(address));
            }
        }
    }
}
