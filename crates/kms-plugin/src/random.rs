//! The random source as an argument: IVs, nonces and jitter all come from the one that `main` passes in.

use std::fmt;
use std::sync::Arc;

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
