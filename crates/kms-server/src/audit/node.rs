//! Which server writes a log: each has a chain of its own, and this names it.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

/// The longest name.
const MAX_NAME: usize = 63;

/// The operator: this server has no name.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    #[error("cannot keep the name of this node in {}: {cause}; set NODE_ID", path.display())]
    File { path: PathBuf, cause: io::Error },
    #[error("{} does not hold the name of a node; set NODE_ID", path.display())]
    Unusable { path: PathBuf },
}

/// Whether `name` can name a node: letters, digits, `.`, `_` and `-`.
#[must_use]
pub fn is_name(name: &str) -> bool {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    (1..=MAX_NAME).contains(&name.len()) && name.bytes().all(fits)
}

/// The name that was configured; else the one that is kept beside the audit log, which is the host's name on the first
/// day. A container whose host name changes stays who it was as long as its log stays.
///
/// # Errors
/// [`NodeError`].
pub fn name(configured: Option<&str>, audit_file: &Path) -> Result<String, NodeError> {
    match configured {
        Some(name) => Ok(name.to_owned()),
        None => kept(&beside(audit_file, "node")),
    }
}

/// A file that belongs to the audit log and lies beside it, under a name that no pattern for rotated logs matches.
pub(super) fn beside(audit_file: &Path, extension: &str) -> PathBuf {
    audit_file.with_extension(extension)
}

fn kept(path: &Path) -> Result<String, NodeError> {
    let failed = |cause| NodeError::File { path: path.to_owned(), cause };
    let name = match fs::read_to_string(path) {
        Err(cause) if cause.kind() == ErrorKind::NotFound => {
            let name = fs::read_to_string("/proc/sys/kernel/hostname").map_err(failed)?;
            fs::write(path, &name).map_err(failed)?;
            name
        }
        read => read.map_err(failed)?,
    };
    let name = name.trim();
    if is_name(name) {
        Ok(name.to_owned())
    } else {
        Err(NodeError::Unusable { path: path.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_was_kept_outlives_the_host_name() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("audit.log");
        let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
        assert_eq!(name(None, &log).unwrap(), host.trim());
        fs::write(folder.path().join("audit.node"), "the-first\n").unwrap();
        assert_eq!(name(None, &log).unwrap(), "the-first");
        assert_eq!(name(Some("configured"), &log).unwrap(), "configured");
        fs::write(folder.path().join("audit.node"), "two words").unwrap();
        let error = name(None, &log).unwrap_err().to_string();
        assert!(error.contains("audit.node") && error.contains("set NODE_ID"), "{error}");
    }

    #[test]
    fn names_are_plain() {
        for good in ["a", "kms-0.zone_1", &"x".repeat(63)] {
            assert!(is_name(good), "{good}");
        }
        for bad in ["", "a b", "\"", "é", "a\n", &"x".repeat(64)] {
            assert!(!is_name(bad), "{bad}");
        }
    }
}
