//! A PKCS#11 token for a plug-in straight on an HSM, in SoftHSM2 or in Kryoptic: made with pkcs11-tool as an operator
//! would, taken away and given back.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::{Error, Result};
use crate::pki::write_file;
use crate::process;
use crate::softhsm::SoftHsm;

/// Names Kryoptic's module; `cargo xtask test` sets it.
const KRYOPTIC: &str = "KEELSON_KRYOPTIC";

pub const LABEL: &str = "keelson on hsm";
pub const PIN: &str = "58291077";
const SO_PIN: &str = "31415926";

/// Whose token it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Model {
    SoftHsm,
    Kryoptic,
}

/// An initialised token below `dir`.
#[derive(Debug)]
pub struct Token {
    model: Model,
    pub library: PathBuf,
    /// The variable by which the library finds its configuration, and that.
    pub env: (&'static str, PathBuf),
    tokens: PathBuf,
    away: PathBuf,
}

impl Token {
    /// Makes a token with its PINs.
    ///
    /// # Errors
    /// When the module or pkcs11-tool is missing or fails.
    pub fn create(model: Model, dir: &Path) -> Result<Self> {
        let tokens = dir.join("tokens");
        let (library, env) = match model {
            Model::SoftHsm => {
                let SoftHsm { library, config } = SoftHsm::create(dir)?;
                (library, ("SOFTHSM2_CONF", config))
            }
            Model::Kryoptic => (kryoptic()?, ("KRYOPTIC_CONF", configure_kryoptic(dir, &tokens)?)),
        };
        let token = Self { model, library, env, tokens, away: dir.join("tokens-away") };
        token.tool(&["--init-token", "--slot-index", "0", "--label", LABEL, "--so-pin", SO_PIN])?;
        let so = ["--login", "--login-type", "so", "--so-pin", SO_PIN];
        token.tool(&[&["--token-label", LABEL, "--init-pin", "--pin", PIN], &so[..]].concat())?;
        Ok(token)
    }

    /// Takes the token from a library that is not loaded now, or that opens its files whenever it needs them.
    ///
    /// # Errors
    /// When the machine refuses.
    pub fn unplug(&self) -> Result<()> {
        fs::rename(&self.tokens, &self.away).map_err(Error::machine("move a token"))?;
        fs::create_dir(&self.tokens).map_err(Error::machine("make a folder"))
    }

    /// The opposite of [`Token::unplug`].
    ///
    /// # Errors
    /// When the machine refuses.
    pub fn plug_in(&self) -> Result<()> {
        fs::remove_dir_all(&self.tokens).map_err(Error::machine("remove a folder"))?;
        fs::rename(&self.away, &self.tokens).map_err(Error::machine("move a token"))
    }

    /// Takes from a library in use what the token holds.
    ///
    /// # Errors
    /// When the machine refuses.
    pub fn lose(&self) -> Result<()> {
        match self.model {
            Model::SoftHsm => self.unplug(),
            // It keeps its file open wherever that is moved: emptied in place, it is lost.
            Model::Kryoptic => fs::copy(self.database(), &self.away)
                .and_then(|_| fs::write(self.database(), b""))
                .map_err(Error::machine("empty a token")),
        }
    }

    /// The opposite of [`Token::lose`].
    ///
    /// # Errors
    /// When the machine refuses.
    pub fn give_back(&self) -> Result<()> {
        match self.model {
            Model::SoftHsm => self.plug_in(),
            Model::Kryoptic => fs::read(&self.away)
                .and_then(|content| fs::write(self.database(), content))
                .and_then(|()| fs::remove_file(&self.away))
                .map_err(Error::machine("fill a token")),
        }
    }

    fn database(&self) -> PathBuf {
        self.tokens.join("token.sql")
    }

    fn tool(&self, args: &[&str]) -> Result<()> {
        let mut tool = Command::new("pkcs11-tool");
        tool.arg("--module").arg(&self.library).args(args).env(self.env.0, &self.env.1);
        process::stdout(tool, b"").map(drop)
    }
}

fn kryoptic() -> Result<PathBuf> {
    std::env::var_os(KRYOPTIC).map(PathBuf::from).ok_or_else(|| Error::Missing {
        what: format!("Kryoptic's PKCS#11 module ({KRYOPTIC})"),
        remedy: format!(
            "run `cargo xtask test`, or set {KRYOPTIC} to what `cargo xtask kryoptic` prints"
        ),
    })
}

fn configure_kryoptic(dir: &Path, tokens: &Path) -> Result<PathBuf> {
    fs::create_dir_all(tokens).map_err(Error::machine(format!("make {}", tokens.display())))?;
    let config = dir.join("kryoptic.conf");
    let text = format!(
        "[[slots]]\nslot = 1\ndbtype = \"sqlite\"\ndbargs = \"{}/token.sql\"\n",
        tokens.display()
    );
    write_file(&config, &text)?;
    Ok(config)
}
