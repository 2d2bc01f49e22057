//! SoftHSM2 with a token directory of its own. Only children see it, through SOFTHSM2_CONF.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::pki::write_file;

/// A token directory and the library that reads it.
#[derive(Debug, Clone)]
pub struct SoftHsm {
    pub library: PathBuf,
    pub config: PathBuf,
}

impl SoftHsm {
    /// An empty token directory in `dir`. `kms-server init` makes the token.
    ///
    /// # Errors
    /// When SoftHSM2 is not installed or a file cannot be written.
    pub fn create(dir: &Path) -> Result<Self> {
        let library = library().ok_or_else(|| Error::Missing {
            what: "SoftHSM2 (libsofthsm2.so)".to_owned(),
            remedy: "install the Debian package softhsm2, or run `cargo xtask packages`".to_owned(),
        })?;
        let tokens = dir.join("tokens");
        fs::create_dir_all(&tokens)
            .map_err(Error::machine(format!("make {}", tokens.display())))?;
        let config = dir.join("softhsm2.conf");
        let text = format!(
            "directories.tokendir = {}\nobjectstore.backend = file\nlog.level = ERROR\nslots.removable = false\n",
            tokens.display()
        );
        write_file(&config, &text)?;
        Ok(Self { library, config })
    }
}

/// Where the distribution put the PKCS#11 library.
pub fn library() -> Option<PathBuf> {
    LIBRARIES.iter().map(PathBuf::from).find(|path| path.is_file())
}

const LIBRARIES: &[&str] = &[
    "/usr/lib/softhsm/libsofthsm2.so",
    "/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so",
    "/usr/lib/aarch64-linux-gnu/softhsm/libsofthsm2.so",
    "/usr/lib64/pkcs11/libsofthsm2.so",
    "/usr/lib64/softhsm/libsofthsm2.so",
];
