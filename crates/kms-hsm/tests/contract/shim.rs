//! A vault that reaches its token through the fault-injecting module.

use crate::token::{PIN, TestToken, secret};
use kms_hsm::pkcs11::{Pin, Pkcs11Vault, Settings};
use pkcs11_shim::{Control, Counts, Function};
use std::ffi::OsString;
use std::path::Path;
use std::time::Duration;

/// The vault's way to the token, and both files of the module.
pub(crate) struct Shim {
    pub(crate) settings: Settings,
    pub(crate) counts: Counts,
    control: Control,
}

/// What the module must find in the environment of a process whose token is below `home`.
pub(crate) fn environment(home: &Path, library: &Path) -> [(&'static str, OsString); 3] {
    [
        (pkcs11_shim::MODULE, library.into()),
        (pkcs11_shim::CONTROL, home.join("control").into()),
        (pkcs11_shim::COUNTS, home.join("counts").into()),
    ]
}

impl Shim {
    /// The settings of `token`, with the module in front of its library.
    pub(crate) fn before(token: &TestToken) -> Self {
        let library = pkcs11_shim::library().unwrap();
        Self {
            settings: Settings { library, ..token.settings() },
            counts: Counts::open(&token.home.join("counts")).unwrap(),
            control: Control::new(&token.home.join("control")),
        }
    }

    pub(crate) fn open(&self) -> Pkcs11Vault {
        // A PIN that a test has made refused is another one from now on.
        let pin = Pin::new(secret(PIN));
        Pkcs11Vault::open(Settings { pin, ..self.settings.clone() }).unwrap()
    }

    /// Replaces all faults.
    pub(crate) fn order(&self, faults: &str) {
        self.control.set(faults).unwrap();
    }

    pub(crate) fn logins(&self) -> u64 {
        self.counts.of(Function::C_Login)
    }
}

/// Whether the long run was asked for; else the same test runs with fewer rounds.
pub(crate) fn long_run() -> bool {
    std::env::var_os("KEELSON_LONG").is_some()
}

/// Other work on the machine only ever makes something slower: what takes longer than it may in each attempt is the
/// vault's doing.
const ATTEMPTS: usize = 5;

/// In one attempt at least, everything that `measure` has measured is within its bound.
pub(crate) async fn take_at_most<const N: usize>(
    bounds: [Duration; N],
    what: &str,
    measure: impl AsyncFn() -> [Duration; N],
) {
    let mut seen = Vec::new();
    for _ in 0..ATTEMPTS {
        let took = measure().await;
        if took.iter().zip(bounds).all(|(took, bound)| *took <= bound) {
            return;
        }
        seen.push(took);
    }
    panic!("{what} may take {bounds:?}, and took {seen:?}");
}

/// The most attempts that pauses of 0.1, 0.2, 0.4, 0.8 and then of one second leave room for.
pub(crate) fn attempts_within(time: Duration) -> u64 {
    4 + time.saturating_sub(Duration::from_millis(500)).as_secs()
}

/// How long `work` took.
pub(crate) async fn timed<T>(work: impl Future<Output = T>) -> (T, Duration) {
    let start = tokio::time::Instant::now();
    (work.await, start.elapsed())
}
