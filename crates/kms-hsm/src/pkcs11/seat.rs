//! What one worker thread works with: its own logged-in session, and the handles all workers share.
//!
//! Finding a key by its CKA_ID costs more than using it (SoftHSM with 5,000 keys: nine uses a
//! second), so handles are kept. They are worth nothing after the next login: a new crew of workers
//! starts with an empty map.

use crate::pkcs11::Token;
use crate::pkcs11::error::{Class, Fault};
use crate::pkcs11::gcm::{self, IvChoice, IvMode};
use crate::pkcs11::keys::{self, Kind};
use crate::pkcs11::module::{Module, log_in};
use crate::pkcs11::raw::{BLOCK, Raw};
use crate::statistics::timed;
use crate::vault::VaultError;
use cryptoki::context::Function;
use cryptoki::object::{Attribute, AttributeInfo, AttributeType, ObjectHandle};
use cryptoki::session::{Session, SessionState};
use kms_core::secret::SecretText;
use std::cell::RefCell;
use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::sync::{
    Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
};
use uuid::Uuid;

/// How many handles one C_FindObjects may return. A token of 5,000 versions answers in 40 calls.
const FIND_AT_ONCE: NonZeroUsize = NonZeroUsize::new(256).unwrap();
/// How many IVs one C_GenerateRandom makes: a call for each wrap would be a fifth of its time over a network.
const IVS_AT_ONCE: usize = 64;

/// A session, and everything that goes with it.
#[derive(Debug)]
pub(super) struct Seat {
    session: Session,
    handles: Arc<Handles>,
    module: Arc<Module>,
    /// Random bytes of the token for the next IVs. Each is used once, and nobody sees it before.
    ivs: RefCell<Vec<[u8; BLOCK]>>,
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
    /// Up to `wanted` seats in front of `token`, logged in. There is at least one.
    pub(super) fn take(
        module: &Arc<Module>,
        token: &Token,
        wanted: usize,
        pin: &SecretText,
    ) -> Result<Vec<Self>, Fault> {
        module.lets_users_in(token)?;
        let handles = Arc::new(Handles::new(module.by_turns(token)?));
        let open = || -> Result<Self, Fault> {
            let session = module.open_session(token)?;
            let (handles, module) = (Arc::clone(&handles), Arc::clone(module));
            Ok(Self { session, handles, module, ivs: RefCell::default() })
        };
        let mut seats = vec![open()?];
        // One login lets all sessions of the process in.
        seats.first().map_or(Ok(()), |first| log_in(&first.session, pin))?;
        while seats.len() < wanted {
            match open() {
                Ok(seat) => seats.push(seat),
                Err(fault) if fault.class() == Some(Class::Capacity) => {
                    tracing::warn!(
                        "the token grants {} sessions of the {wanted} in the settings",
                        seats.len()
                    );
                    break;
                }
                Err(fault) => return Err(fault),
            }
        }
        Ok(seats)
    }

    pub(super) fn session(&self) -> &Session {
        &self.session
    }

    /// Fills `bytes` from the token's random source.
    pub(super) fn random(&self, bytes: &mut [u8]) -> Result<(), Fault> {
        Ok(timed(Function::GenerateRandom, || self.session.generate_random_slice(bytes))?)
    }

    /// An IV that nobody can foretell, as CBC needs it.
    ///
    /// # Errors
    /// Those of the token.
    pub(super) fn iv(&self) -> Result<[u8; BLOCK], Fault> {
        let mut ivs = self.ivs.borrow_mut();
        if let Some(iv) = ivs.pop() {
            return Ok(iv);
        }
        let mut bytes = [0; BLOCK * IVS_AT_ONCE];
        self.random(&mut bytes)?;
        let (blocks, _) = bytes.as_chunks::<BLOCK>();
        ivs.extend_from_slice(blocks);
        ivs.pop().ok_or_else(|| Fault::device("C_GenerateRandom: nothing"))
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
            [first, ..] if self.are_one(kind, &found)? => *first,
            several => {
                let what = format!(
                    "{} objects that are not one key have the name {id} ({kind:?}), so none of them is used: remove those \
                     that do not belong there (CKA_ID is the 16 bytes of that name)",
                    several.len()
                );
                return Err(VaultError::Policy(what).into());
            }
        };
        self.remember(id, kind, handle);
        Ok(handle)
    }

    /// Whether these objects are one key that is shown several times. While several processes make objects in one token,
    /// SoftHSM 2.6 may show one of them twice, for as long as the process lives; what computes alike is the same key.
    pub(super) fn are_one(&self, kind: Kind, objects: &[ObjectHandle]) -> Result<bool, Fault> {
        let mut made = Vec::with_capacity(objects.len());
        for object in objects {
            match self.fingerprint(kind, *object) {
                // Ours could.
                Err(fault) if fault.class() == Some(Class::Refused) => return Ok(false),
                other => made.push(other?),
            }
        }
        made.dedup();
        Ok(made.len() == 1)
    }

    /// What no other key makes, of the same input.
    fn fingerprint(&self, kind: Kind, object: ObjectHandle) -> Result<Vec<u8>, Fault> {
        let (raw, input) = (self.raw(), [0; BLOCK]);
        match kind {
            Kind::Root | Kind::Canary => raw.encrypt(&self.session, object, &input, &input),
            Kind::Mac => raw.hmac(&self.session, object, &input).map(|code| code.to_vec()),
            // PKCS #1 v1.5 has no random part.
            Kind::Signing => raw.sign(&self.session, object, &input),
            Kind::Verifying => {
                let shown = self.attributes(object, &[AttributeType::Modulus])?;
                let modulus = shown.into_iter().find_map(|one| match one {
                    Attribute::Modulus(modulus) => Some(modulus),
                    _ => None,
                });
                modulus.ok_or_else(|| Fault::device("a public key without a modulus"))
            }
        }
    }

    /// All objects that fit, as a logged-in session sees them.
    ///
    /// A session that was logged out behind our back sees no private objects, and would report
    /// every key as lost; so an answer counts only while the login lasts.
    pub(super) fn find(&self, search: &[Attribute]) -> Result<Vec<ObjectHandle>, Fault> {
        let found = self.search(search)?;
        let info = timed(Function::GetSessionInfo, || self.session.get_session_info())?;
        match info.session_state() {
            SessionState::RwUser | SessionState::RoUser => Ok(found),
            state => Err(Fault::session(format!("no longer logged in ({state:?})"))),
        }
    }

    fn search(&self, search: &[Attribute]) -> Result<Vec<ObjectHandle>, Fault> {
        let _beside_others = self.look();
        let mut objects = timed(Function::FindObjectsInit, || {
            self.session.iter_objects_with_cache_size(search, FIND_AT_ONCE)
        })?;
        let mut found = Vec::new();
        // The iterator asks the token for so many at a time, and never again after it got fewer.
        let mut more = || {
            timed(Function::FindObjects, || {
                objects.by_ref().take(FIND_AT_ONCE.get()).collect::<Result<Vec<_>, _>>()
            })
        };
        let outcome = loop {
            match more() {
                Ok(some) => {
                    found.extend_from_slice(&some);
                    if some.len() < FIND_AT_ONCE.get() {
                        break Ok(found);
                    }
                }
                Err(error) => break Err(error.into()),
            }
        };
        timed(Function::FindObjectsFinal, || drop(objects));
        outcome
    }

    /// What a token says of an object that somebody else may have made just now.
    pub(super) fn attributes(
        &self,
        object: ObjectHandle,
        types: &[AttributeType],
    ) -> Result<Vec<Attribute>, Fault> {
        let _beside_others = self.look();
        self.raw().attributes(&self.session, object, types)
    }

    /// Whether the token shows this attribute; it is not asked for its value.
    pub(super) fn shows(&self, object: ObjectHandle, kind: AttributeType) -> Result<bool, Fault> {
        let _beside_others = self.look();
        let info = timed(Function::GetAttributeValue, || {
            self.session.get_attribute_info(object, &[kind])
        })?;
        Ok(info.iter().any(|info| matches!(info, AttributeInfo::Available(_))))
    }

    fn look(&self) -> Option<RwLockReadGuard<'_, ()>> {
        let turns = self.handles.turns.as_ref()?;
        Some(turns.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn alone(&self) -> Option<RwLockWriteGuard<'_, ()>> {
        let turns = self.handles.turns.as_ref()?;
        Some(turns.write().unwrap_or_else(PoisonError::into_inner))
    }

    /// Makes or destroys objects. Where it must, it waits for all who look for some.
    pub(super) fn change<T>(
        &self,
        function: Function,
        call: impl FnOnce(&Session) -> Result<T, cryptoki::error::Error>,
    ) -> Result<T, Fault> {
        let _alone = self.alone();
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

impl Drop for Seat {
    fn drop(&mut self) {
        if let Err(fault) = self.raw().close_session(&self.session) {
            tracing::debug!("a session that was lost: {}", fault.into_answer());
        }
    }
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
