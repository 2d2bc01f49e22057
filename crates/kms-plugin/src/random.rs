//! The random source as an argument: IVs, nonces and jitter all come from the one that `main` passes in.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use kms_core::crypto_module::CryptoModule;

use crate::sealer::SealerError;

/// Fills a buffer with random bytes, or says that it could not.
#[derive(Clone)]
pub struct Random(Arc<Fill>);

type Fill = dyn Fn(&mut [u8]) -> Result<(), NoRandom> + Send + Sync;

/// The operating system gave no random bytes. Nothing may be sealed without them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NoRandom;

impl Random {
    pub fn new(fill: impl Fn(&mut [u8]) -> Result<(), NoRandom> + Send + Sync + 'static) -> Random {
        Random(Arc::new(fill))
    }

    /// The library's own generator, seeded by the operating system.
    pub fn system() -> Random {
        Random::new(|bytes| aws_lc_rs::rand::fill(bytes).map_err(|_| NoRandom))
    }

    /// # Errors
    /// If the source has none.
    pub fn bytes<const N: usize>(&self) -> Result<[u8; N], NoRandom> {
        let mut bytes = [0; N];
        (self.0)(&mut bytes)?;
        Ok(bytes)
    }

    /// For AES-GCM: none where the FIPS module draws it, which approves of no nonce from outside.
    ///
    /// # Errors
    /// If the source has none.
    pub fn nonce<const N: usize>(&self) -> Result<Option<[u8; N]>, NoRandom> {
        if CryptoModule::linked().fips { Ok(None) } else { self.bytes().map(Some) }
    }

    /// Some time from `least` to `most`, so that many who met once (in an outage, at a start) do not meet again. The
    /// longest where there is no chance.
    pub fn between(&self, least: Duration, most: Duration) -> Duration {
        let chance = self.bytes().map_or(u16::MAX, u16::from_be_bytes);
        least + most.saturating_sub(least) * u32::from(chance) / u32::from(u16::MAX)
    }
}

impl fmt::Debug for Random {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Random")
    }
}

impl From<NoRandom> for SealerError {
    fn from(_: NoRandom) -> SealerError {
        SealerError::Unavailable { text: "this node has no random bytes".into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_between_two_is_never_outside_them_and_seldom_the_same() {
        let (least, most) = (Duration::from_secs(15), Duration::from_secs(20));
        let times: Vec<_> = (0..100).map(|_| Random::system().between(least, most)).collect();
        assert!(times.iter().all(|time| (least..=most).contains(time)), "{times:?}");
        let distinct: std::collections::BTreeSet<_> = times.iter().collect();
        assert!(distinct.len() > 90, "{times:?}");
        let constant = |byte| {
            Random::new(move |bytes| {
                bytes.fill(byte);
                Ok(())
            })
        };
        assert_eq!(constant(0).between(least, most), least);
        assert_eq!(constant(0xff).between(least, most), most);
        assert_eq!(Random::new(|_| Err(NoRandom)).between(least, most), most);
    }
}
