//! Another version wraps than the one that is reported: after a rotation, or because the service was restored from a
//! backup. A service that was rotated still opens what was sealed before; one that was restored does not.
//!
//! Nothing here decides what is reported; that is [`Keys`](crate::keys::Keys).

use std::sync::Arc;

use crate::keys::{Asked, Crk, NotAdopted, Sealing, Wrapped};
use crate::provider::{Error, NewDek};
use crate::sealer::{Call, Sealer, SealerError};

/// Whether the service still gives out the DEK that seals.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Opens {
    Yes,
    /// There is none, or it did not say.
    Unknown,
    /// A replica may lag: to be asked again.
    NotYet,
    Lost,
}

/// An HSM's passing fault can look like a WDEK that is unknown; two in a row hardly.
const ATTEMPTS: usize = 2;

impl Sealer {
    /// [`Sealer::adopt`], after a look at what is lost with it.
    pub(crate) async fn take_over(
        &self,
        asked: &Asked,
        new: &NewDek,
        call: &Call,
    ) -> Result<Sealing, NotAdopted> {
        // A version that the configuration names was chosen.
        let is_chosen = asked.crk.service.named_version().is_some();
        let is_news = !is_chosen && {
            let keys = self.keys();
            keys.is_news(&asked.crk.name, &new.version) && !keys.has_lost()
        };
        // What it does not say is no reason to wait: rotating is also the cure for a version that the HSM has lost.
        let opens = if is_news {
            self.opens_what_seals(call).await.unwrap_or(Opens::Unknown)
        } else {
            Opens::Yes
        };
        if opens == Opens::NotYet {
            return Err(NotAdopted::Stale);
        }
        let before = self.keys().sealing();
        let sealing = self.adopt(asked, new)?;
        if let Some(before) = before.filter(|_| opens == Opens::Lost) {
            self.mourn(asked, &before, &new.version);
        }
        Ok(sealing)
    }

    /// # Errors
    /// If it did not say.
    pub(crate) async fn opens_what_seals(&self, call: &Call) -> Result<Opens, SealerError> {
        let sealing = self.keys().sealing();
        let Some(Wrapped { crk, wdek, .. }) = sealing else { return Ok(Opens::Unknown) };
        for _ in 0..ATTEMPTS {
            match self.ask_again(&crk, &wdek, call).await {
                Ok(()) => return Ok(Opens::Yes),
                Err(Error::NotAuthentic) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let lost = self.keys().lose(&wdek, self.now());
        Ok(if lost { Opens::Lost } else { Opens::NotYet })
    }

    /// Unwraps a WDEK whose DEK is held, so that it may be held for longer.
    pub(crate) async fn ask_again(
        &self,
        crk: &Crk,
        wdek: &Arc<[u8]>,
        call: &Call,
    ) -> Result<(), Error> {
        let grant = self.keys().grant(&crk.name);
        let unwrapped = self.learn(crk, crk.service.unwrap(wdek, call).await)?;
        self.keys().confirm(grant, wdek, &unwrapped.dek, self.now());
        self.keep(crk, grant, wdek.clone(), &unwrapped.dek);
        Ok(())
    }

    fn mourn(&self, asked: &Asked, before: &Wrapped, version: &str) {
        let (backend, lost) = (asked.crk.service.backend(), before.key_id.version());
        let text = format!(
            "the {backend} wraps with version {version} and does not open what version {lost} wrapped: if it was restored \
             from a backup, restart nothing, rotate the key unless that was done since (`kmsctl keys rotate`), and write every object anew"
        );
        tracing::error!("What was sealed until now can be opened from memory only: {text}");
        self.keys().mourn(SealerError::Unavailable { text });
    }
}
