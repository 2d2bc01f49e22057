//! What stays of a PIN that the token has refused, so that the next process does not try it again: a supervisor that
//! restarts a service would otherwise lock the token with one wrong PIN.
//!
//! A slow, salted hash: the PIN itself is never written. The file's times or its number would give nothing away, but
//! tools that write a PIN file anew with the same PIN in it, and volumes that are mounted anew, change those, and each
//! change would be one more login. What the hash gives away to those who can read the file, its owner alone, is the
//! chance to guess at a PIN that was refused.

use aws_lc_rs::pbkdf2::{self, PBKDF2_HMAC_SHA256};
use aws_lc_rs::rand;
use kms_core::secret::SecretText;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::num::NonZeroU32;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// What OWASP asks of PBKDF2 with SHA-256; a PIN has few digits, so this only makes guessing slow.
const ROUNDS: NonZeroU32 = NonZeroU32::new(600_000).unwrap();
const SALT: usize = 16;
const HASH: usize = 32;

/// The file of one refused PIN. It may be removed at any time: then that PIN is tried once more.
#[derive(Clone, Debug)]
pub(super) struct Refused {
    file: PathBuf,
    /// Another token refuses another PIN.
    of: String,
}

impl Refused {
    pub(super) fn new(file: PathBuf, of: String) -> Self {
        Self { file, of }
    }

    pub(super) fn file(&self) -> &Path {
        &self.file
    }

    /// Whether something is kept. What cannot be looked at is taken to be there: nobody has removed it.
    pub(super) fn is_there(&self) -> bool {
        !matches!(fs::symlink_metadata(&self.file), Err(error) if error.kind() == io::ErrorKind::NotFound)
    }

    /// Whether it is `pin` that was refused.
    ///
    /// # Errors
    /// The file is there, but cannot be read, or is none of ours.
    pub(super) fn is(&self, pin: &SecretText) -> io::Result<bool> {
        let kept = match fs::read(&self.file) {
            Ok(kept) => kept,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error),
        };
        let kept: &[u8; SALT + HASH] =
            kept.as_slice().try_into().map_err(|_| io::Error::other("it has another length"))?;
        let (salt, hash) = kept.split_at(SALT);
        let pin = pin.expose().as_bytes();
        Ok(pbkdf2::verify(PBKDF2_HMAC_SHA256, ROUNDS, &self.salted(salt), pin, hash).is_ok())
    }

    /// Keeps that `pin` was refused, instead of another one. Durable when it returns.
    ///
    /// # Errors
    /// Those of the file system.
    pub(super) fn keep(&self, pin: &SecretText) -> io::Result<()> {
        let mut kept = [0; SALT + HASH];
        let (salt, hash) = kept.split_at_mut(SALT);
        rand::fill(salt).map_err(|_| io::Error::other("no random bytes"))?;
        let pin = pin.expose().as_bytes();
        pbkdf2::derive(PBKDF2_HMAC_SHA256, ROUNDS, &self.salted(salt), pin, hash);
        let mut unfinished = self.file.clone().into_os_string();
        unfinished.push(".new");
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&unfinished)?;
        file.write_all(&kept)?;
        file.sync_all()?;
        fs::rename(&unfinished, &self.file)?;
        let folder = self.file.parent().filter(|folder| !folder.as_os_str().is_empty());
        File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
    }

    /// # Errors
    /// Those of the file system; that it is not there is none.
    pub(super) fn forget(&self) -> io::Result<()> {
        match fs::remove_file(&self.file) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result,
        }
    }

    fn salted(&self, salt: &[u8]) -> Vec<u8> {
        [salt, self.of.as_bytes()].concat()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::PermissionsExt;

    fn text(pin: &str) -> SecretText {
        SecretText::new(pin.to_owned())
    }

    fn of(folder: &Path, token: &str) -> Refused {
        Refused::new(folder.join("kms.db.refused-pin"), token.to_owned())
    }

    #[test]
    fn a_pin_is_known_again_and_its_file_does_not_hold_it() {
        let folder = tempfile::tempdir().unwrap();
        let refused = of(folder.path(), "token a");
        assert!(!refused.is_there());
        assert!(!refused.is(&text("493817")).unwrap());
        refused.keep(&text("493817")).unwrap();
        assert!(refused.is_there());
        assert!(refused.is(&text("493817")).unwrap());
        assert!(!refused.is(&text("493818")).unwrap());
        assert!(!of(folder.path(), "token b").is(&text("493817")).unwrap());
        let bytes = fs::read(refused.file()).unwrap();
        assert!(!bytes.windows(6).any(|part| part == b"493817"));
        assert_eq!(fs::metadata(refused.file()).unwrap().permissions().mode() & 0o777, 0o600);
        refused.keep(&text("493817")).unwrap();
        assert_ne!(fs::read(refused.file()).unwrap(), bytes, "another salt");
        refused.forget().unwrap();
        assert!(!refused.is(&text("493817")).unwrap());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn any_other_file_is_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assume!(bytes.len() != SALT + HASH);
            let folder = tempfile::tempdir().unwrap();
            let refused = of(folder.path(), "token");
            fs::write(refused.file(), bytes).unwrap();
            prop_assert!(refused.is(&text("1234")).is_err());
        }
    }
}
