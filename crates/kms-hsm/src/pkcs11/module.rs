//! A loaded PKCS#11 library: initialise it, find the token, open sessions, log in.
//!
//! The login belongs to the whole process, not to a session, and the last wrong PINs lock a token
//! for good. So there is one login for all sessions, and after one refusal no other is tried.

use crate::pkcs11::error::Fault;
use crate::pkcs11::raw::Raw;
use crate::pkcs11::{Token, TokenChoice};
use crate::statistics::timed;
use crate::vault::VaultError;
use cryptoki::context::{CInitializeArgs, CInitializeFlags, Function, Pkcs11};
use cryptoki::error::{Error, RvError};
use cryptoki::session::{Session, UserType};
use cryptoki::slot::{Slot, TokenInfo};
use cryptoki::types::AuthPin;
use kms_core::secret::SecretText;
use std::path::Path;

/// The library, in the process's memory but not necessarily initialised.
#[derive(Debug)]
pub(super) struct Module {
    context: Pkcs11,
    raw: Raw,
}

impl Module {
    /// Loads the library. Do not fork afterwards: PKCS#11 leaves a child's state undefined.
    pub(super) fn load(library: &Path) -> Result<Self, Fault> {
        let in_file = |fault: Fault| match fault {
            Fault::Token { class, what } => {
                Fault::Token { class, what: format!("{}: {what}", library.display()) }
            }
            answer @ Fault::Answer(_) => answer,
        };
        let raw = Raw::load(library).map_err(in_file)?;
        let context = Pkcs11::new(library).map_err(|error| in_file(error.into()))?;
        Ok(Self { context, raw })
    }

    pub(super) fn raw(&self) -> &Raw {
        &self.raw
    }

    /// C_Initialize, with the threads of this process let in. Twice does no harm.
    pub(super) fn initialise(&self) -> Result<(), Fault> {
        let arguments = CInitializeArgs::new(CInitializeFlags::OS_LOCKING_OK);
        match timed(Function::Initialize, || self.context.initialize(arguments)) {
            Err(Error::Pkcs11(RvError::CryptokiAlreadyInitialized, _)) => Ok(()),
            result => Ok(result?),
        }
    }

    /// C_Finalize. Every session of this process must be gone and no call may be under way.
    pub(super) fn finalise(&self) {
        if let Err(error) = timed(Function::Finalize, || self.context.clone().finalize()) {
            tracing::debug!("C_Finalize: {}", Fault::from(error).into_answer());
        }
    }

    /// The token that the operator chose.
    pub(super) fn token(&self, choice: &TokenChoice) -> Result<Token, Fault> {
        let mut found = self.tokens()?.into_iter().filter(|token| choice.fits(token));
        let Some(token) = found.next() else {
            return Err(Fault::device(format!("no token with {choice}")));
        };
        if let Some(second) = found.next() {
            let serials = format!("{} and {}", token.serial, second.serial);
            return Err(Fault::device(format!(
                "more than one token with {choice} (serials {serials}): choose by serial"
            )));
        }
        Ok(token)
    }

    /// Every initialised token.
    pub(super) fn tokens(&self) -> Result<Vec<Token>, Fault> {
        let mut tokens = Vec::new();
        for slot in self.raw.slots_with_token()? {
            let slot = Slot::try_from(slot)?;
            let info = self.token_info(slot)?;
            if info.token_initialized() {
                tokens.push(Token {
                    label: info.label().to_owned(),
                    serial: info.serial_number().to_owned(),
                    slot: slot.id(),
                });
            }
        }
        Ok(tokens)
    }

    /// Whether objects may not be looked for while one is made. SoftHSM 2.6 re-reads every object's
    /// file in a search, also one that another session is half-way through writing; C_GenerateKey
    /// then fails with CKR_GENERAL_ERROR or CKR_TEMPLATE_INCONSISTENT.
    pub(super) fn by_turns(&self, token: &Token) -> Result<bool, Fault> {
        let info = self.token_info(Slot::try_from(token.slot)?)?;
        Ok(info.manufacturer_id().starts_with("SoftHSM"))
    }

    /// A read-write session, which the one who opened it must close.
    pub(super) fn open_session(&self, token: &Token) -> Result<Session, Fault> {
        let slot = Slot::try_from(token.slot)?;
        Ok(timed(Function::OpenSession, || self.context.open_rw_session_no_drop(slot))?)
    }

    /// Whether a login makes sense: a PIN that cannot be right must not be tried.
    pub(super) fn lets_users_in(&self, token: &Token) -> Result<(), Fault> {
        let info = self.token_info(Slot::try_from(token.slot)?)?;
        if info.user_pin_locked() {
            return Err(VaultError::Credential("the PIN of the token is locked".to_owned()).into());
        }
        if !info.user_pin_initialized() {
            let what = "the token has no user PIN yet".to_owned();
            return Err(VaultError::Credential(what).into());
        }
        Ok(())
    }

    /// Makes a token labelled `label` in the first slot that holds an uninitialised one.
    pub(super) fn make_token(
        &self,
        label: &str,
        so_pin: &SecretText,
        user_pin: &SecretText,
    ) -> Result<Token, Fault> {
        let choice = TokenChoice::Label(label.to_owned());
        if self.tokens()?.iter().any(|token| choice.fits(token)) {
            return Err(VaultError::Exists.into());
        }
        let slot = self.free_slot()?;
        self.context.init_token(slot, &auth_pin(so_pin), label)?;
        let session = self.context.open_rw_session(slot)?;
        session.login(UserType::So, Some(&auth_pin(so_pin)))?;
        session.init_pin(&auth_pin(user_pin))?;
        session.logout()?;
        drop(session);
        self.token(&choice)
    }

    fn free_slot(&self) -> Result<Slot, Fault> {
        for slot in self.raw.slots_with_token()? {
            let slot = Slot::try_from(slot)?;
            if !self.token_info(slot)?.token_initialized() {
                return Ok(slot);
            }
        }
        Err(VaultError::Capacity("no slot holds an uninitialised token".to_owned()).into())
    }

    fn token_info(&self, slot: Slot) -> Result<TokenInfo, Fault> {
        Ok(timed(Function::GetTokenInfo, || self.context.get_token_info(slot))?)
    }
}

pub(super) fn log_in(session: &Session, pin: &SecretText) -> Result<(), Fault> {
    match timed(Function::Login, || session.login(UserType::User, Some(&auth_pin(pin)))) {
        Err(Error::Pkcs11(RvError::UserAlreadyLoggedIn, _)) => Ok(()),
        result => Ok(result?),
    }
}

fn auth_pin(pin: &SecretText) -> AuthPin {
    AuthPin::new(pin.expose().into())
}
