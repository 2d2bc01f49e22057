//! A token of its own for every test, in SoftHSM2 or in Kryoptic.
//!
//! Both read where their tokens are from the environment, and one process can load a module once. So
//! each test runs in a child: this same test binary, asked for that one test.

use crate::shim;
use kms_core::secret::SecretText;
use kms_hsm::pkcs11::{IvChoice, Pkcs11Vault, Settings, Token, TokenChoice, init_token};
use std::future::Future;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

pub(crate) const LABEL: &str = "keelson test";
pub(crate) const PIN: &str = "1234-user";
pub(crate) const SO_PIN: &str = "5678-so";

/// Tells a child where its token lives.
const HOME: &str = "KEELSON_TEST_TOKEN_HOME";
/// Where `cargo xtask test` has put Kryoptic's module.
const KRYOPTIC: &str = "KEELSON_KRYOPTIC";

/// A software token that the vault is tested with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Model {
    SoftHsm,
    Kryoptic,
}

/// An initialised token, in a process of its own.
pub(crate) struct TestToken {
    model: Model,
    pub(crate) home: PathBuf,
    pub(crate) library: PathBuf,
    pub(crate) identity: Token,
}

/// Runs `body` in a child process with a fresh token. `name` is the name of the calling test.
///
/// Without the module the test is skipped with a notice, and fails where `CI=true`.
pub(crate) fn with_token(model: Model, name: &str, body: impl FnOnce(TestToken)) {
    let Some(library) = model.library() else {
        let remedy = model.remedy();
        assert_ne!(std::env::var("CI").as_deref(), Ok("true"), "no {model:?}: {remedy}");
        eprintln!("skipped, no {model:?}: {remedy}");
        return;
    };
    if let Some(home) = std::env::var_os(HOME) {
        return body(TestToken::make(model, PathBuf::from(home), library));
    }
    let home = tempfile::tempdir().unwrap();
    let (variable, conf) = model.configure(home.path());
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env(variable, &conf)
        .env(HOME, home.path())
        .envs(shim::environment(home.path(), &library))
        .output()
        .unwrap();
    let (out, err) =
        (String::from_utf8_lossy(&child.stdout), String::from_utf8_lossy(&child.stderr));
    assert!(child.status.success(), "{name}: {}\n{out}\n{err}", child.status);
    assert!(out.contains("1 passed"), "the child ran no test named {name}:\n{out}");
    // For who asked for it with --nocapture.
    eprint!("{err}");
}

impl Model {
    fn library(self) -> Option<PathBuf> {
        match self {
            Self::SoftHsm => softhsm(),
            Self::Kryoptic => std::env::var_os(KRYOPTIC).map(PathBuf::from),
        }
    }

    fn remedy(self) -> String {
        match self {
            Self::SoftHsm => "apt-get install softhsm2".to_owned(),
            Self::Kryoptic => {
                format!("`cargo xtask test` builds its module; {KRYOPTIC} names one that is there")
            }
        }
    }

    /// Room for tokens below `home`. Returns the variable that names the configuration, and it.
    fn configure(self, home: &Path) -> (&'static str, PathBuf) {
        let tokens = home.join("tokens");
        std::fs::create_dir(&tokens).unwrap();
        let tokens = tokens.display();
        let (variable, text) = match self {
            Self::SoftHsm => (
                "SOFTHSM2_CONF",
                format!(
                    "directories.tokendir = {tokens}\nobjectstore.backend = file\nlog.level = ERROR\n"
                ),
            ),
            // SoftHSM always has one more slot for a token to be; here each is named.
            Self::Kryoptic => ("KRYOPTIC_CONF", (1..=2).map(|slot| {
                format!("[[slots]]\nslot = {slot}\ndbtype = \"sqlite\"\ndbargs = \"{tokens}/{slot}.sql\"\n")
            }).collect()),
        };
        let conf = home.join("token.conf");
        std::fs::write(&conf, text).unwrap();
        (variable, conf)
    }
}

pub(crate) fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
        .block_on(future)
}

/// Asks until the answer is yes. For what happens in the vault's own time.
pub(crate) async fn eventually<F: Future<Output = bool>>(what: &str, ask: impl Fn() -> F) {
    let patience = Duration::from_secs(60);
    let asking = async {
        while !ask().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    assert!(tokio::time::timeout(patience, asking).await.is_ok(), "never: {what}");
}

impl TestToken {
    fn make(model: Model, home: PathBuf, library: PathBuf) -> Self {
        let identity = init_token(&library, LABEL, &secret(SO_PIN), &secret(PIN)).unwrap();
        Self { model, home, library, identity }
    }

    pub(crate) fn settings(&self) -> Settings {
        Settings {
            library: self.library.clone(),
            token: TokenChoice::Label(LABEL.to_owned()),
            pin: secret(PIN).into(),
            sessions: 3,
            queue: 256,
            // Far more than SoftHSM needs: a loaded machine must not fail these tests.
            deadline: Duration::from_secs(10),
            gcm: Some(IvChoice::Auto),
        }
    }

    pub(crate) fn open(&self) -> Pkcs11Vault {
        Pkcs11Vault::open(self.settings()).unwrap()
    }

    /// Takes the tokens away: a library that is initialised now finds none.
    pub(crate) fn unplug(&self) {
        std::fs::rename(self.files(), self.away()).unwrap();
        std::fs::create_dir(self.files()).unwrap();
    }

    pub(crate) fn plug_in(&self) {
        std::fs::remove_dir_all(self.files()).unwrap();
        std::fs::rename(self.away(), self.files()).unwrap();
    }

    /// Puts a token without anything in the place of ours.
    pub(crate) fn remove(&self) {
        std::fs::remove_dir_all(self.files()).unwrap();
        std::fs::create_dir(self.files()).unwrap();
    }

    /// Takes away what the tokens hold, under sessions that live on.
    pub(crate) fn vanish(&self) {
        match self.model {
            // It opens a file whenever it needs it.
            Model::SoftHsm => self.unplug(),
            // It keeps its file open, wherever that is moved.
            Model::Kryoptic => {
                std::fs::copy(self.database(), self.away()).unwrap();
                self.rewrite(&[]);
            }
        }
    }

    /// The opposite of [`TestToken::vanish`].
    pub(crate) fn reappear(&self) {
        match self.model {
            Model::SoftHsm => self.plug_in(),
            Model::Kryoptic => self.rewrite(&std::fs::read(self.away()).unwrap()),
        }
    }

    /// In place: another file of that name would be none of an open database's business.
    fn rewrite(&self, content: &[u8]) {
        std::fs::write(self.database(), content).unwrap();
    }

    fn files(&self) -> PathBuf {
        self.home.join("tokens")
    }

    fn away(&self) -> PathBuf {
        self.home.join("away")
    }

    fn database(&self) -> PathBuf {
        self.files().join("1.sql")
    }

    /// A second door into the same library in the same process, past the vault.
    pub(crate) fn back_door(&self) -> BackDoor {
        let context = cryptoki::context::Pkcs11::new(&self.library).unwrap();
        let slots = context.get_slots_with_initialized_token().unwrap();
        let slot = slots
            .into_iter()
            .find(|slot| context.get_token_info(*slot).unwrap().label() == LABEL)
            .unwrap();
        BackDoor { context, slot, library: self.library.clone() }
    }
}

/// What an intruder, an administrator or a fault in the same process can do.
pub(crate) struct BackDoor {
    pub(crate) context: cryptoki::context::Pkcs11,
    pub(crate) slot: cryptoki::slot::Slot,
    library: PathBuf,
}

impl BackDoor {
    /// A session; logged in, because the vault's login holds for the whole process.
    pub(crate) fn session(&self) -> cryptoki::session::Session {
        self.context.open_rw_session(self.slot).unwrap()
    }

    /// C_CloseAllSessions, which the safe wrapper does not offer.
    #[expect(unsafe_code, reason = "PKCS#11 is a C interface")]
    pub(crate) fn close_all_sessions(&self) {
        let mut list: *mut cryptoki_sys::CK_FUNCTION_LIST = std::ptr::null_mut();
        // SAFETY: the same module that the vault has loaded and initialised. It fills the place with
        // its function list, which lives as long as the module; a slot number is all that the
        // function in it takes.
        let code = unsafe {
            let library = cryptoki_sys::Pkcs11::new(&self.library).unwrap();
            assert_eq!(library.C_GetFunctionList(&raw mut list), cryptoki_sys::CKR_OK);
            (*list).C_CloseAllSessions.unwrap()(self.slot.id())
        };
        assert_eq!(code, cryptoki_sys::CKR_OK);
    }
}

pub(crate) fn secret(text: &str) -> SecretText {
    SecretText::new(text.to_owned())
}

fn softhsm() -> Option<PathBuf> {
    ["lib/softhsm", "lib64/softhsm", "lib64/pkcs11", "lib/x86_64-linux-gnu/softhsm"]
        .iter()
        .flat_map(|folder| [Path::new("/usr").join(folder), Path::new("/usr/local").join(folder)])
        .map(|folder| folder.join("libsofthsm2.so"))
        .find(|library| library.exists())
}
