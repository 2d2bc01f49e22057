//! What happens on the way of a call: it is counted, the control file is looked at, faults strike.

use crate::control::{Effect, Orders};
use crate::counts::Counts;
use crate::functions::Function;
use crate::gcm::Pending;
use cryptoki_sys::{
    CK_FUNCTION_LIST, CK_RV, CK_SESSION_HANDLE, CKR_DEVICE_REMOVED, CKR_FUNCTION_NOT_SUPPORTED,
    CKR_LIBRARY_LOAD_FAILED, CKR_SESSION_HANDLE_INVALID, CKR_TOKEN_NOT_PRESENT,
};
use std::collections::{HashMap, HashSet};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

/// What a function works on.
#[derive(Clone, Copy)]
pub(crate) enum Place {
    Library,
    Slot,
    Session(CK_SESSION_HANDLE),
}

/// The real module, and everything about it.
pub(crate) struct Shim {
    real: CK_FUNCTION_LIST,
    _module: cryptoki_sys::Pkcs11,
    control: Option<PathBuf>,
    counts: Counts,
    state: Mutex<State>,
}

#[derive(Default)]
pub(crate) struct State {
    /// Of the control file that was read last.
    seen: Option<Look>,
    pub(crate) orders: Arc<Orders>,
    pub(crate) open: HashSet<CK_SESSION_HANDLE>,
    /// Open in the real module, but not for the application any more.
    pub(crate) dead: HashSet<CK_SESSION_HANDLE>,
    pub(crate) pending: HashMap<CK_SESSION_HANDLE, Pending>,
}

/// Length, inode and time: what changes with a file.
type Look = (u64, u64, i64, i64);

/// How often a call that hangs looks whether it may go on.
const BLINK: Duration = Duration::from_millis(1);

static SHIM: OnceLock<Result<Shim, String>> = OnceLock::new();

/// The way of every call.
pub(crate) fn call(
    function: Function,
    place: Place,
    pass_on: impl FnOnce(&Shim) -> CK_RV,
) -> CK_RV {
    let shim = match SHIM.get_or_init(Shim::load) {
        Ok(shim) => shim,
        Err(cause) => {
            eprintln!("pkcs11-shim: {cause}");
            return CKR_LIBRARY_LOAD_FAILED;
        }
    };
    shim.counts.count(function);
    let orders = shim.orders();
    for fault in orders.faults.iter().filter(|fault| fault.strikes(function)) {
        if fault.once && !shim.claims() {
            continue;
        }
        match fault.effect {
            Effect::Fail(code) => {
                if fault.late || ends_something(function) {
                    pass_on(shim);
                }
                return code;
            }
            Effect::Delay(time) => std::thread::sleep(time),
            Effect::Hang => {
                while Arc::ptr_eq(&orders, &shim.orders()) {
                    std::thread::sleep(BLINK);
                }
            }
            // SAFETY: none; this is the crash that was ordered.
            Effect::Segv => unsafe { std::ptr::without_provenance_mut::<u8>(8).write_volatile(0) },
            Effect::Abort => std::process::abort(),
            Effect::Kill => {
                if fault.late {
                    pass_on(shim);
                }
                kill_this_process()
            }
        }
    }
    match shim.refuses(function, place) {
        Some(code) => code,
        None => pass_on(shim),
    }
}

/// As nobody can prevent: no handler runs, nothing is written that was not.
fn kill_this_process() -> ! {
    let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    std::process::abort()
}

/// What is over even where it fails: else the next operation would meet a session that is still busy with this one, and
/// tests would count the sessions that the module does not let go as the application's.
fn ends_something(function: Function) -> bool {
    use Function as F;
    [F::C_Encrypt, F::C_Decrypt, F::C_Sign, F::C_FindObjectsFinal, F::C_CloseSession, F::C_Finalize]
        .contains(&function)
}

/// Calls what the real module has of a function.
pub(crate) fn forward<F>(function: Option<F>, call: impl FnOnce(F) -> CK_RV) -> CK_RV {
    function.map_or(CKR_FUNCTION_NOT_SUPPORTED, call)
}

impl Shim {
    pub(crate) fn real(&self) -> &CK_FUNCTION_LIST {
        &self.real
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// To be called whenever sessions were opened or closed.
    pub(crate) fn note_sessions(&self, state: &State) {
        self.counts.sessions(state.open.len());
    }

    fn load() -> Result<Self, String> {
        let path = |name: &str| std::env::var_os(name).map(PathBuf::from);
        let module = path(crate::MODULE).ok_or(format!("{} is not set", crate::MODULE))?;
        // SAFETY: the test names the module; its initialisers run as for any linked library.
        let library = unsafe { cryptoki_sys::Pkcs11::new(&module) };
        let library = library.map_err(|error| format!("{}: {error}", module.display()))?;
        let list_of = library.C_GetFunctionList.as_ref().map_err(ToString::to_string)?;
        let mut list = std::ptr::null_mut();
        // SAFETY: the argument is a valid place for one pointer.
        let code = unsafe { list_of(&raw mut list) };
        if code != 0 || list.is_null() {
            return Err(format!("{} has no function list: {code:#x}", module.display()));
        }
        // SAFETY: not null, and of the version that every module can give; the module stays loaded.
        let real = unsafe { *list };
        let counts = path(crate::COUNTS).map(|path| Counts::open(&path)).transpose();
        let counts = counts.map_err(|error| format!("{}: {error}", crate::COUNTS))?;
        Ok(Self {
            real,
            _module: library,
            control: path(crate::CONTROL),
            counts: counts.unwrap_or_else(Counts::private),
            state: Mutex::default(),
        })
    }

    /// What the control file says now.
    fn orders(&self) -> Arc<Orders> {
        let Some(path) = &self.control else { return Arc::default() };
        let look = std::fs::metadata(path)
            .ok()
            .map(|file| (file.len(), file.ino(), file.mtime(), file.mtime_nsec()));
        let mut state = self.state();
        if look == state.seen {
            return Arc::clone(&state.orders);
        }
        let text = if look.is_some() { std::fs::read_to_string(path) } else { Ok(String::new()) };
        let orders = text.map_err(|error| error.to_string());
        match orders.and_then(|text| Orders::parse(&text).map_err(|error| error.to_string())) {
            Ok(orders) => state.obey(orders),
            Err(mistake) => eprintln!("pkcs11-shim: {mistake}"),
        }
        state.seen = look;
        Arc::clone(&state.orders)
    }

    /// Whether this call is the one that takes the control file away.
    fn claims(&self) -> bool {
        self.control.as_ref().is_some_and(|path| std::fs::remove_file(path).is_ok())
    }

    fn refuses(&self, function: Function, place: Place) -> Option<CK_RV> {
        let state = self.state();
        let gone = state.orders.token_gone;
        match place {
            Place::Session(handle) if function != Function::C_CloseSession => {
                let lost = if gone { CKR_DEVICE_REMOVED } else { CKR_SESSION_HANDLE_INVALID };
                state.dead.contains(&handle).then_some(lost)
            }
            Place::Slot if function != Function::C_CloseAllSessions => {
                gone.then_some(CKR_TOKEN_NOT_PRESENT)
            }
            _ => None,
        }
    }
}

impl State {
    fn obey(&mut self, orders: Orders) {
        if orders.kill_sessions || orders.token_gone {
            self.dead.clone_from(&self.open);
        }
        self.orders = Arc::new(orders);
    }
}
