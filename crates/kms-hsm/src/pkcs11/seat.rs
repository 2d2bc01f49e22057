//! What one worker thread works with: its own logged-in session, and the handles all workers share.
//!
//! Finding a key by its CKA_ID costs more than using it (SoftHSM with 5,000 keys: nine uses a
//! second), so handles are kept. They are worth nothing after the next login: a new crew of workers
//! starts with an empty map.

use crate::pkcs11::error::{Class, Fault};
use crate::pkcs11::gcm::{self, IvChoice, IvMode};
use crate::pkcs11::keys::{self, Kind};
use crate::pkcs11::module::Module;
use crate::pkcs11::raw::{BLOCK, Raw};
use crate::statistics::timed;
use crate::vault::VaultError;
use cryptoki::context::Function;
use cryptoki::object::{Attribute, AttributeType, ObjectHandle};
use cryptoki::session::{Session, SessionState};
use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};
use uuid::Uuid;

/// How many handles one C_FindObjects may return. A token of 5,000 versions answers in 40 calls.
const FIND_AT_ONCE: NonZeroUsize = NonZeroUsize::new(256).unwrap();

/// A session, and everything that goes with it.
#[derive(Debug)]
pub(super) struct Seat {
    session: Session,
    handles: Arc<Handles>,
    module: Arc<Module>,
}

/// What holds for one login: object handles by CKA_ID and kind, and what the self-test has found.
#[derive(Debug, Default)]
pub(super) struct Handles {
    known: Mutex<HashMap<(Uuid, Kind), ObjectHandle>>,
    iv_mode: OnceLock<Result<IvMode, String>>,
    /// Where the library cannot look for objects while one is made, whoever makes or destroys one is alone.
    turns: Option<RwLock<()>>,
}

impl Seat {
    pub(super) fn new(session: Session, handles: Arc<Handles>, module: Arc<Module>) -> Self {
        Self { session, handles, module }
    }

    pub(super) fn session(&self) -> &Session {
        &self.session
    }

    pub(super) fn raw(&self) -> &Raw {
        self.module.raw()
    }

    /// The handle of a key, from memory or from the token.
    ///
    /// # Errors
    /// `NotFound` only when a logged-in session says so that still sees the canary.
    pub(super) fn key(&self, id: Uuid, kind: Kind) -> Result<ObjectHandle, Fault> {
        if let Some(handle) = self.handles.lock().get(&(id, kind)) {
            return Ok(*handle);
        }
        let found = self.find(&kind.search(id))?;
        let handle = match found.as_slice() {
            [] => return Err(self.missing()),
            // Two replicas that start together on a new token may both plant one.
            [first, ..] if kind == Kind::Canary => *first,
            [only] => *only,
            several => {
                let what = format!("{} objects where one may be: {kind:?} {id}", several.len());
                return Err(VaultError::Policy(what).into());
            }
        };
        self.remember(id, kind, handle);
        Ok(handle)
    }

    /// All objects that fit, as a logged-in session sees them.
    ///
    /// A session that was logged out behind our back sees no private objects, and would report
    /// every key as lost; so an answer counts only while the login lasts.
    pub(super) fn find(&self, search: &[Attribute]) -> Result<Vec<ObjectHandle>, Fault> {
        let found = self.look(Function::FindObjects, |session| {
            session
                .iter_objects_with_cache_size(search, FIND_AT_ONCE)?
                .collect::<Result<Vec<_>, _>>()
        })?;
        match self.session.get_session_info()?.session_state() {
            SessionState::RwUser | SessionState::RoUser => Ok(found),
            state => Err(Fault::session(format!("no longer logged in ({state:?})"))),
        }
    }

    /// What a token says of an object that somebody else may have made just now.
    pub(super) fn attributes(
        &self,
        object: ObjectHandle,
        types: &[AttributeType],
    ) -> Result<Vec<Attribute>, Fault> {
        self.look(Function::GetAttributeValue, |session| session.get_attributes(object, types))
    }

    fn look<T>(
        &self,
        function: Function,
        call: impl FnOnce(&Session) -> Result<T, cryptoki::error::Error>,
    ) -> Result<T, Fault> {
        let _beside_others = self.handles.turns.as_ref().map(RwLock::read);
        Ok(timed(function, || call(&self.session))?)
    }

    /// Makes or destroys objects. Where it must, it waits for all who look for some.
    pub(super) fn change<T>(
        &self,
        function: Function,
        call: impl FnOnce(&Session) -> Result<T, cryptoki::error::Error>,
    ) -> Result<T, Fault> {
        let _alone = self.handles.turns.as_ref().map(RwLock::write);
        Ok(timed(function, || call(&self.session))?)
    }

    pub(super) fn destroy_object(&self, object: ObjectHandle) -> Result<(), Fault> {
        self.change(Function::DestroyObject, |session| session.destroy_object(object))
    }

    pub(super) fn remember(&self, id: Uuid, kind: Kind, handle: ObjectHandle) {
        self.handles.lock().insert((id, kind), handle);
    }

    pub(super) fn forget(&self, id: Uuid) {
        self.handles.lock().retain(|(known, _), _| *known != id);
    }

    pub(super) fn forget_all(&self) {
        self.handles.lock().clear();
    }

    /// Has the self-test find out who makes the IV of AES-GCM on this token.
    ///
    /// # Errors
    /// Those of a token that is lost meanwhile; a test that is not passed is remembered.
    pub(super) fn test_iv(&self, choice: IvChoice) -> Result<(), Fault> {
        let found = gcm::self_test(self, choice)?;
        match &found {
            Ok(mode) => tracing::info!("AES-GCM has passed its self-test, IV mode \"{mode}\""),
            Err(cause) => tracing::error!("{cause}"),
        }
        let _first_of_this_login = self.handles.iv_mode.set(found);
        Ok(())
    }

    /// What [`Seat::test_iv`] has found.
    ///
    /// # Errors
    /// `Policy` where no mode is safe, or none was looked for.
    pub(super) fn iv_mode(&self) -> Result<IvMode, Fault> {
        let refused = |cause: &str| Fault::from(VaultError::Policy(cause.to_owned()));
        match self.handles.iv_mode.get() {
            Some(Ok(mode)) => Ok(*mode),
            Some(Err(cause)) => Err(refused(cause)),
            None => Err(refused("AES-GCM is not switched on")),
        }
    }

    /// Finds the canary, encrypts and decrypts with it.
    ///
    /// # Errors
    /// A stale handle, a lost session, or else a lost device: an answer about data would prove
    /// nothing here.
    pub(super) fn canary(&self) -> Result<(), Fault> {
        self.check_value().map(drop)
    }

    /// Like [`Seat::canary`]; returns what every token with this canary key, and no other, makes of
    /// the same input.
    pub(super) fn check_value(&self) -> Result<Vec<u8>, Fault> {
        self.sing().map_err(|fault| match fault {
            Fault::Token { class: Class::Handle | Class::Session, .. } => fault,
            Fault::Token { what, .. } => Fault::device(format!("canary: {what}")),
            Fault::Answer(error) => Fault::device(format!("canary: {error}")),
        })
    }

    fn sing(&self) -> Result<Vec<u8>, Fault> {
        let known = [0x5a; 2 * BLOCK];
        let iv = [0; BLOCK];
        let key = self.key(keys::CANARY, Kind::Canary)?;
        let ciphertext = self.raw().encrypt(&self.session, key, &iv, &known)?;
        let plaintext = self.raw().decrypt(&self.session, key, &iv, &ciphertext)?;
        if ciphertext.starts_with(&known) || plaintext.as_slice() != known {
            return Err(Fault::device("the token computes wrongly"));
        }
        Ok(ciphertext)
    }

    /// What it means that a key was not found. SoftHSM, when its volume is unmounted, goes on as a
    /// token without objects; taken for an answer, that would make callers drop their data keys.
    pub(super) fn missing(&self) -> Fault {
        match self.find(&Kind::Canary.search(keys::CANARY)) {
            Ok(found) if found.is_empty() => emptied(),
            Ok(_) => VaultError::NotFound.into(),
            Err(fault) => fault,
        }
    }
}

/// The fault of a token whose objects are gone.
pub(super) fn emptied() -> Fault {
    Fault::device("the token no longer holds the objects it held")
}

impl Handles {
    /// `by_turns` as [`Module::by_turns`] says.
    pub(super) fn new(by_turns: bool) -> Self {
        Self { turns: by_turns.then(RwLock::default), ..Self::default() }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<(Uuid, Kind), ObjectHandle>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
