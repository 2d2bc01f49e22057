//! A SoftHSM2 token of its own for every test, and the plug-in on it. SoftHSM2 reads which token it is from the
//! environment, so the token is made by a tool and used by the plug-in, never by this process.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use rustix::process::Signal;
use tempfile::TempDir;

use crate::plugin::{Plugin, command, free_address, output};

pub(crate) const LABEL: &str = "keelson plugin test";
pub(crate) const PIN: &str = "canary-pin-7714";
pub(crate) const CRK: &str = "6d3f5a2e-8a4e-4c83-9a4d-1f1f0f6f2a01";
pub(crate) const OTHER_CRK: &str = "0b8f5c11-27f5-4c3e-8f0e-5a7a2b9b3c02";
const INSTANCE: &str = "3c1d9a70-5b0e-4b7d-8d55-9d7e6a4f1b03";

/// A token, and a configuration of a plug-in on it.
pub(crate) struct TestToken {
    folder: Arc<TempDir>,
    library: PathBuf,
    health: SocketAddr,
    pub(crate) settings: Settings,
}

/// What the tests change in the configuration.
pub(crate) struct Settings {
    pub(crate) pin: &'static str,
    /// As PIN_FILE.
    pub(crate) pin_in_file: bool,
    /// With REFUSED_PIN_FILE.
    pub(crate) refused_pin_file: bool,
    pub(crate) crk: &'static str,
    pub(crate) crk_version: String,
    /// A CRK that only unwraps.
    pub(crate) previous: Option<&'static str>,
    /// Further lines of SERVER_CONFIG and LOGGER.
    pub(crate) server: &'static str,
    pub(crate) logger: &'static str,
}

impl TestToken {
    /// A token with one CRK version. `None`, with a notice, where SoftHSM2 is not installed; there CI fails.
    pub(crate) fn new() -> Option<TestToken> {
        let Some(library) = library() else {
            assert_ne!(std::env::var("CI").as_deref(), Ok("true"), "SoftHSM2 is not installed");
            eprintln!("skipped: SoftHSM2 is not installed (Debian: apt-get install softhsm2)");
            return None;
        };
        let folder = Arc::new(tempfile::tempdir().unwrap());
        let health = free_address();
        let settings = Settings {
            pin: PIN,
            pin_in_file: false,
            refused_pin_file: false,
            crk: CRK,
            crk_version: String::new(),
            previous: None,
            server: "",
            logger: "",
        };
        let mut token = TestToken { folder, library, health, settings };
        token.initialise();
        token.settings.crk_version = token.new_version();
        Some(token)
    }

    fn initialise(&self) {
        std::fs::create_dir(self.objects()).unwrap();
        let conf = format!(
            "directories.tokendir = {}\nobjectstore.backend = file\nlog.level = ERROR\n",
            self.objects().display()
        );
        std::fs::write(self.softhsm_conf(), conf).unwrap();
        let mut init = Command::new("softhsm2-util");
        init.args([
            "--init-token",
            "--free",
            "--label",
            LABEL,
            "--pin",
            PIN,
            "--so-pin",
            "5678-so",
        ]);
        let (code, out, err) = output(init.env("SOFTHSM2_CONF", self.softhsm_conf()));
        assert_eq!(code, Some(0), "{out}\n{err}");
    }

    /// What `kmsplugin --new-crk-version` prints.
    pub(crate) fn new_version(&self) -> String {
        self.write_config();
        let (code, out, err) = output(self.command().arg("--new-crk-version"));
        assert_eq!((code, &*err), (Some(0), ""), "{out}");
        out.trim().to_owned()
    }

    /// The binary, with this token and configuration in its environment.
    pub(crate) fn command(&self) -> Command {
        let mut command = command();
        command.env("SOFTHSM2_CONF", self.softhsm_conf()).env("config_file", self.config());
        command
    }

    pub(crate) fn write_config(&self) {
        let Settings {
            pin,
            pin_in_file,
            refused_pin_file,
            crk,
            crk_version,
            previous,
            server,
            logger,
        } = &self.settings;
        let pin = match pin_in_file {
            true => {
                let path = self.folder.path().join("pin");
                std::fs::write(&path, pin).unwrap();
                format!("PIN_FILE: {}", path.display())
            }
            false => format!("PIN: {pin}"),
        };
        let pin = match refused_pin_file {
            true => format!("{pin}\n  REFUSED_PIN_FILE: {}", self.refused_pin_file().display()),
            false => pin,
        };
        let (socket, library) = (self.socket(), self.library.display());
        let health = self.health;
        let previous = previous.map_or(String::new(), |crk| {
            format!(
                "KP_CONFIG_PREVIOUS:\n- VERSION: 1\n  CRK_ID: {crk}\n  INSTANCE_ID: {INSTANCE}\n"
            )
        });
        // KMS v1 values name their entry by its number.
        let version = if previous.is_empty() { 1 } else { 2 };
        let text = format!(
            "SERVER_CONFIG:\n  UNIX_SOCKET_PATH: {socket}\n  HEALTHZ_PORT: {health}\n{server}\
             KP_CONFIG:\n  VERSION: {version}\n  CRK_ID: {crk}\n  INSTANCE_ID: {INSTANCE}\n{previous}\
             PKCS11:\n  LIBRARY: {library}\n  TOKEN_LABEL: {LABEL}\n  {pin}\n  \
             DEADLINE_IN_MILLISECONDS: 10000\n  CRK_VERSION: {crk_version}\n{logger}"
        );
        std::fs::write(self.config(), text).unwrap();
    }

    pub(crate) fn serving(&self) -> Plugin {
        self.write_config();
        let plugin = Plugin::spawn(self.command(), self.socket(), self.health, self.folder.clone());
        plugin.line("The Provider server is started.");
        plugin
    }

    pub(crate) fn ready(&self) -> Plugin {
        let plugin = self.serving();
        plugin.line("The HSM wraps and unwraps: ready.");
        plugin
    }

    /// Makes a running plug-in read the configuration as it is now.
    pub(crate) fn reload(&self, plugin: &Plugin) {
        self.write_config();
        plugin.signal(Signal::HUP);
        plugin.line("The configuration was read again and is in use.");
    }

    /// Takes the token away, objects and all.
    pub(crate) fn unplug(&self) {
        std::fs::rename(self.objects(), self.away()).unwrap();
        std::fs::create_dir(self.objects()).unwrap();
    }

    pub(crate) fn plug_in(&self) {
        std::fs::remove_dir_all(self.objects()).unwrap();
        std::fs::rename(self.away(), self.objects()).unwrap();
    }

    pub(crate) fn refused_pin_file(&self) -> PathBuf {
        self.folder.path().join("refused-pin")
    }

    fn objects(&self) -> PathBuf {
        self.folder.path().join("tokens")
    }

    fn away(&self) -> PathBuf {
        self.folder.path().join("away")
    }

    fn config(&self) -> PathBuf {
        self.folder.path().join("kmsplugin-config.yaml")
    }

    fn softhsm_conf(&self) -> PathBuf {
        self.folder.path().join("softhsm2.conf")
    }

    fn socket(&self) -> String {
        self.folder.path().join("kms.sock").to_str().unwrap().to_owned()
    }
}

fn library() -> Option<PathBuf> {
    let folders = ["lib/softhsm", "lib64/softhsm", "lib64/pkcs11", "lib/x86_64-linux-gnu/softhsm"];
    let places = folders
        .iter()
        .flat_map(|folder| [Path::new("/usr").join(folder), Path::new("/usr/local").join(folder)]);
    places.map(|folder| folder.join("libsofthsm2.so")).find(|library| library.exists())
}
