//! A SoftHSM2 token of its own for every test.
//!
//! SoftHSM reads its configuration file's name from the environment, and one process can load it
//! once. So each test runs in a child: this same test binary, asked for that one test.

use kms_core::secret::SecretText;
use kms_hsm::pkcs11::{Pkcs11Vault, Settings, Token, TokenChoice, init_token};
use std::future::Future;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

pub(crate) const LABEL: &str = "keelson test";
pub(crate) const PIN: &str = "1234-user";
pub(crate) const SO_PIN: &str = "5678-so";

/// Tells a child where its token lives.
const HOME: &str = "KEELSON_TEST_TOKEN_HOME";

/// An initialised token, in a process of its own.
pub(crate) struct TestToken {
    pub(crate) home: PathBuf,
    pub(crate) library: PathBuf,
    pub(crate) identity: Token,
}

/// Runs `body` in a child process with a fresh token. `name` is the name of the calling test.
///
/// Without SoftHSM2 the test is skipped with a notice, and fails where `CI=true`.
pub(crate) fn with_token(name: &str, body: impl FnOnce(TestToken)) {
    let Some(library) = library() else {
        assert_ne!(std::env::var("CI").as_deref(), Ok("true"), "SoftHSM2 is not installed");
        eprintln!("skipped: SoftHSM2 is not installed (Debian: apt-get install softhsm2)");
        return;
    };
    if let Some(home) = std::env::var_os(HOME) {
        return body(TestToken::make(PathBuf::from(home), library));
    }
    let home = tempfile::tempdir().unwrap();
    let conf = home.path().join("softhsm2.conf");
    let tokens = home.path().join("tokens");
    std::fs::create_dir(&tokens).unwrap();
    let text = format!(
        "directories.tokendir = {}\nobjectstore.backend = file\nlog.level = ERROR\n",
        tokens.display()
    );
    std::fs::write(&conf, text).unwrap();
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env("SOFTHSM2_CONF", &conf)
        .env(HOME, home.path())
        .output()
        .unwrap();
    let (out, err) =
        (String::from_utf8_lossy(&child.stdout), String::from_utf8_lossy(&child.stderr));
    assert!(child.status.success(), "{name}: {}\n{out}\n{err}", child.status);
    assert!(out.contains("1 passed"), "the child ran no test named {name}:\n{out}");
}

pub(crate) fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_time()
        .build()
        .unwrap()
        .block_on(future)
}

/// Asks until the answer is yes. For what happens in the vault's own time.
pub(crate) async fn eventually<F: Future<Output = bool>>(what: &str, ask: impl Fn() -> F) {
    let patience = Duration::from_secs(20);
    let asking = async {
        while !ask().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    assert!(tokio::time::timeout(patience, asking).await.is_ok(), "never: {what}");
}

impl TestToken {
    fn make(home: PathBuf, library: PathBuf) -> Self {
        let identity = init_token(&library, LABEL, &secret(SO_PIN), &secret(PIN)).unwrap();
        Self { home, library, identity }
    }

    pub(crate) fn settings(&self) -> Settings {
        Settings {
            library: self.library.clone(),
            token: TokenChoice::Label(LABEL.to_owned()),
            pin: secret(PIN),
            sessions: 3,
            queue: 256,
            // Far more than SoftHSM needs: a loaded machine must not fail these tests.
            deadline: Duration::from_secs(10),
        }
    }

    pub(crate) fn open(&self) -> Pkcs11Vault {
        Pkcs11Vault::open(self.settings()).unwrap()
    }

    /// Where SoftHSM keeps the token; moved away, the token is gone.
    pub(crate) fn files(&self) -> PathBuf {
        self.home.join("tokens")
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
        // SAFETY: the same module that the vault has loaded and initialised; a slot number is all
        // that the function takes.
        let code = unsafe {
            let library = cryptoki_sys::Pkcs11::new(&self.library).unwrap();
            library.C_CloseAllSessions(self.slot.id())
        };
        assert_eq!(code, cryptoki_sys::CKR_OK);
    }
}

pub(crate) fn secret(text: &str) -> SecretText {
    SecretText::new(text.to_owned())
}

fn library() -> Option<PathBuf> {
    if let Some(named) = std::env::var_os("TEST_PKCS11_MODULE") {
        return Some(PathBuf::from(named));
    }
    ["lib/softhsm", "lib64/softhsm", "lib64/pkcs11", "lib/x86_64-linux-gnu/softhsm"]
        .iter()
        .flat_map(|folder| [Path::new("/usr").join(folder), Path::new("/usr/local").join(folder)])
        .map(|folder| folder.join("libsofthsm2.so"))
        .find(|library| library.exists())
}
