//! What one worker thread works with: its own logged-in session, and the handles all workers share.
//!
//! Finding a key by its CKA_ID costs more than using it (SoftHSM with 5,000 keys: nine uses a
//! second), so handles are kept. They are worth nothing after the next login: a new crew of workers
//! starts with an empty map.

use crate::pkcs11::error::{Class, Fault};
use crate::pkcs11::keys::{self, Kind};
use crate::pkcs11::module::Module;
use crate::pkcs11::raw::{BLOCK, Raw};
use crate::vault::VaultError;
use cryptoki::mechanism::Mechanism;
use cryptoki::object::{Attribute, ObjectHandle};
use cryptoki::session::{Session, SessionState};
use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
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

/// Object handles by CKA_ID and kind, valid for one login.
#[derive(Debug, Default)]
pub(super) struct Handles(Mutex<HashMap<(Uuid, Kind), ObjectHandle>>);

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
    /// `NotFound` only when a logged-in session says so.
    pub(super) fn key(&self, id: Uuid, kind: Kind) -> Result<ObjectHandle, Fault> {
        if let Some(handle) = self.handles.lock().get(&(id, kind)) {
            return Ok(*handle);
        }
        let found = self.find(&kind.search(id))?;
        match found.as_slice() {
            [] => Err(VaultError::NotFound.into()),
            [handle] => {
                self.remember(id, kind, *handle);
                Ok(*handle)
            }
            several => Err(VaultError::Policy(format!(
                "the token holds {} objects where there may be one: {kind:?} {id}",
                several.len()
            ))
            .into()),
        }
    }

    /// All objects that fit, as a logged-in session sees them.
    ///
    /// A session that was logged out behind our back sees no private objects, and would report
    /// every key as lost; so an answer counts only while the login lasts.
    pub(super) fn find(&self, search: &[Attribute]) -> Result<Vec<ObjectHandle>, Fault> {
        let found = self
            .session
            .iter_objects_with_cache_size(search, FIND_AT_ONCE)?
            .collect::<Result<Vec<_>, _>>()?;
        match self.session.get_session_info()?.session_state() {
            SessionState::RwUser | SessionState::RoUser => Ok(found),
            state => Err(Fault::session(format!("no longer logged in ({state:?})"))),
        }
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

    /// Encrypts and decrypts with a throw-away key.
    ///
    /// # Errors
    /// A lost session, or else a lost device: an answer about data would prove nothing here.
    pub(super) fn canary(&self) -> Result<(), Fault> {
        self.sing().map_err(|fault| match fault {
            Fault::Token { class: Class::Session, .. } => fault,
            Fault::Token { what, .. } => Fault::device(format!("canary: {what}")),
            Fault::Answer(error) => Fault::device(format!("canary: {error}")),
        })
    }

    fn sing(&self) -> Result<(), Fault> {
        let known = [0x5a; 2 * BLOCK];
        let iv = [0; BLOCK];
        let key = self.session.generate_key(&Mechanism::AesKeyGen, &keys::canary())?;
        let ciphertext = self.raw().encrypt(&self.session, key, &iv, &known)?;
        let plaintext = self.raw().decrypt(&self.session, key, &iv, &ciphertext)?;
        self.session.destroy_object(key)?;
        if ciphertext.starts_with(&known) || plaintext.as_slice() != known {
            return Err(Fault::device("the token computes wrongly"));
        }
        Ok(())
    }
}

impl Handles {
    fn lock(&self) -> MutexGuard<'_, HashMap<(Uuid, Kind), ObjectHandle>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
