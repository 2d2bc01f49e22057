//! What the service and the process of the HSM's library say to each other: one packet, one message.
//!
//! Both ends are the same executable, so there are no versions; but a library that has gone wild may have written
//! anything anywhere, so the reader takes nothing for granted. One message has one form, and what follows it is refused.

use super::packet::{Reader, Writer};
use crate::pkcs11::{IvChoice, IvMode, Known, TokenChoice};
use crate::statistics::Statistics;
use crate::vault::{CheckValue, Circuit, RsaPublic, Sealed, VaultError, Wrapped};
use kms_core::secret::{SecretBytes, SecretText};
use std::path::PathBuf;
use std::time::Duration;
use uuid::Uuid;
use zeroize::Zeroizing;

/// The largest packet. The most that the key service lets into a context, 126 texts of 255 letters, fits with room.
pub const MAX_PACKET: usize = 160 * 1024;

/// How many names one packet carries; a longer list comes in parts.
pub(super) const MAX_IDS: usize = 4096;

/// From the service to its worker.
#[derive(Debug)]
pub enum ToWorker {
    /// The first packet, and only that.
    Hello(Box<Hello>),
    /// A request under a number that was not used before.
    Call(u64, Call),
    /// Nobody waits for this one any more.
    Cancel(u64),
}

/// From the worker to the service.
#[derive(Debug)]
pub enum FromWorker {
    /// The answer to `Hello`.
    Opened(Result<(), VaultError>),
    /// Some names; more follow under this number.
    Part(u64, Vec<Uuid>),
    /// The answer to the request of this number.
    Answer(u64, Result<Answer, VaultError>),
    /// Sent regularly: this worker lives.
    Pulse(Pulse),
}

/// With what the worker opens its vault.
#[derive(Debug)]
pub struct Hello {
    pub(super) library: PathBuf,
    pub(super) token: TokenChoice,
    pub(super) pin: SecretText,
    pub(super) sessions: u32,
    pub(super) queue: u32,
    pub(super) deadline: Duration,
    pub(super) gcm: Option<IvChoice>,
    /// The token that an earlier worker found. Another one in its place is not ours.
    pub(super) known: Option<Known>,
}

/// One verb of the vault.
#[derive(Clone, Debug)]
pub enum Call {
    Create(Uuid),
    Import(Uuid, SecretBytes),
    Destroy(Uuid),
    Wrap(Uuid, Vec<u8>, SecretBytes),
    Unwrap(Uuid, Vec<u8>, Wrapped),
    WrapGcm(Uuid, Vec<u8>, SecretBytes),
    UnwrapGcm(Uuid, Vec<u8>, Sealed),
    Random(u32),
    MakeSigningKey(Uuid),
    PublicHalf(Uuid),
    Sign(Uuid, Vec<u8>),
    Versions,
    Incomplete,
    Probe,
    CheckValue(Uuid),
    Statistics,
}

/// What a verb returns.
#[derive(Debug)]
pub enum Answer {
    Done,
    Wrapped(Wrapped),
    Sealed(Sealed),
    Secret(SecretBytes),
    PublicKey(RsaPublic),
    Signature(Vec<u8>),
    Ids(Vec<Uuid>),
    CheckValue(CheckValue),
    Statistics(Box<Statistics>),
}

/// How the worker is.
#[derive(Debug)]
pub struct Pulse {
    /// No call into the library returns, and for so long that nobody expects it any more.
    pub(super) stuck: bool,
    /// Whether its vault lets requests through.
    pub(super) circuit: Circuit,
    /// The token, once it was found.
    pub(super) known: Option<Known>,
}

/// A packet that is no message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a packet that means nothing")]
pub struct Garbled;

impl ToWorker {
    /// The packet.
    #[must_use]
    pub fn encode(&self) -> Zeroizing<Vec<u8>> {
        let mut to = Writer::new(0);
        match self {
            Self::Hello(hello) => {
                to.u8(0);
                hello.write(&mut to);
            }
            Self::Call(number, call) => return call.packet(*number),
            Self::Cancel(number) => {
                to.u8(2);
                to.u64(*number);
            }
        }
        to.0
    }

    /// # Errors
    /// [`Garbled`].
    pub fn decode(packet: &[u8]) -> Result<Self, Garbled> {
        let from = &mut Reader(packet);
        let message = match from.u8()? {
            0 => Self::Hello(Box::new(Hello::read(from)?)),
            1 => Self::Call(from.u64()?, Call::read(from)?),
            2 => Self::Cancel(from.u64()?),
            _ => return Err(Garbled),
        };
        from.end(message)
    }
}

impl FromWorker {
    /// The packet.
    #[must_use]
    pub fn encode(&self) -> Zeroizing<Vec<u8>> {
        let mut to = Writer::new(match self {
            Self::Part(_, ids) => 16 * ids.len(),
            Self::Answer(_, Ok(answer)) => answer.weight(),
            _ => 0,
        });
        match self {
            Self::Opened(result) => {
                to.u8(0);
                to.result(result, |_, ()| ());
            }
            Self::Part(number, ids) => {
                to.u8(1);
                to.u64(*number);
                to.ids(ids);
            }
            Self::Answer(number, result) => {
                to.u8(2);
                to.u64(*number);
                to.result(result, |to, answer| answer.write(to));
            }
            Self::Pulse(pulse) => {
                to.u8(3);
                to.flag(pulse.stuck);
                to.circuit(pulse.circuit);
                to.option(pulse.known.as_ref(), Writer::known);
            }
        }
        to.0
    }

    /// # Errors
    /// [`Garbled`].
    pub fn decode(packet: &[u8]) -> Result<Self, Garbled> {
        let from = &mut Reader(packet);
        let message = match from.u8()? {
            0 => Self::Opened(from.result(|_| Ok(()))?),
            1 => Self::Part(from.u64()?, from.ids()?),
            2 => Self::Answer(from.u64()?, from.result(Answer::read)?),
            3 => Self::Pulse(Pulse {
                stuck: from.flag()?,
                circuit: from.circuit()?,
                known: from.option(Reader::known)?,
            }),
            _ => return Err(Garbled),
        };
        from.end(message)
    }
}

impl Hello {
    fn write(&self, to: &mut Writer) {
        use std::os::unix::ffi::OsStrExt;
        to.bytes(self.library.as_os_str().as_bytes());
        match &self.token {
            TokenChoice::Label(label) => to.tagged_text(0, label),
            TokenChoice::Serial(serial) => to.tagged_text(1, serial),
            TokenChoice::Slot(slot) => {
                to.u8(2);
                to.u64(*slot);
            }
        }
        to.text(self.pin.expose());
        to.u32(self.sessions);
        to.u32(self.queue);
        to.u64(self.deadline.as_secs());
        to.u32(self.deadline.subsec_nanos());
        to.u8(match self.gcm {
            None => 0,
            Some(IvChoice::Auto) => 1,
            Some(IvChoice::Only(IvMode::Caller)) => 2,
            Some(IvChoice::Only(IvMode::Appended)) => 3,
            Some(IvChoice::Only(IvMode::Filled)) => 4,
        });
        to.option(self.known.as_ref(), Writer::known);
    }

    fn read(from: &mut Reader<'_>) -> Result<Self, Garbled> {
        use std::os::unix::ffi::OsStringExt;
        Ok(Self {
            library: std::ffi::OsString::from_vec(from.bytes()?.to_vec()).into(),
            token: match from.u8()? {
                0 => TokenChoice::Label(from.text()?),
                1 => TokenChoice::Serial(from.text()?),
                2 => TokenChoice::Slot(from.u64()?),
                _ => return Err(Garbled),
            },
            pin: SecretText::new(from.text()?),
            sessions: from.u32()?,
            queue: from.u32()?,
            deadline: from.duration()?,
            gcm: match from.u8()? {
                0 => None,
                1 => Some(IvChoice::Auto),
                2 => Some(IvChoice::Only(IvMode::Caller)),
                3 => Some(IvChoice::Only(IvMode::Appended)),
                4 => Some(IvChoice::Only(IvMode::Filled)),
                _ => return Err(Garbled),
            },
            known: from.option(Reader::known)?,
        })
    }
}

impl Call {
    /// The packet of this request under a number.
    pub(super) fn packet(&self, number: u64) -> Zeroizing<Vec<u8>> {
        let mut to = Writer::new(self.weight());
        to.u8(1);
        to.u64(number);
        self.write(&mut to);
        to.0
    }

    /// Whether a second run does no harm when nobody knows how far the first one came.
    pub(super) fn may_repeat(&self) -> bool {
        !matches!(
            self,
            // Each try uses up the key a little, and is counted by the caller.
            Self::WrapGcm(..) | Self::Create(_) | Self::Import(..) | Self::Destroy(_)
        )
    }

    /// Whether it makes keys or lists them, which takes a token much longer than using one.
    pub(super) fn is_slow(&self) -> bool {
        matches!(
            self,
            Self::Create(_)
                | Self::Import(..)
                | Self::MakeSigningKey(_)
                | Self::Versions
                | Self::Incomplete
        )
    }

    /// The name of the key that it makes.
    pub(super) fn makes(&self) -> Option<Uuid> {
        match self {
            Self::Create(id) | Self::Import(id, _) => Some(*id),
            _ => None,
        }
    }

    /// About how many bytes it has beside its head.
    pub(super) fn weight(&self) -> usize {
        match self {
            Self::Import(_, material) => material.len(),
            Self::Wrap(_, context, dek) | Self::WrapGcm(_, context, dek) => {
                context.len() + dek.len()
            }
            Self::Unwrap(_, context, Wrapped { iv, ciphertext, hash }) => {
                context.len() + iv.len() + ciphertext.len() + hash.len()
            }
            Self::UnwrapGcm(_, context, Sealed { iv, ciphertext }) => {
                context.len() + iv.len() + ciphertext.len()
            }
            Self::Sign(_, data) => data.len(),
            _ => 0,
        }
    }

    fn write(&self, to: &mut Writer) {
        match self {
            Self::Create(id) => to.tagged_id(0, *id),
            Self::Import(id, material) => {
                to.tagged_id(1, *id);
                to.bytes(material.as_slice());
            }
            Self::Destroy(id) => to.tagged_id(2, *id),
            Self::Wrap(id, context, dek) => {
                to.tagged_id(3, *id);
                to.bytes(context);
                to.bytes(dek.as_slice());
            }
            Self::Unwrap(id, context, wrapped) => {
                to.tagged_id(4, *id);
                to.bytes(context);
                to.wrapped(wrapped);
            }
            Self::WrapGcm(id, context, dek) => {
                to.tagged_id(5, *id);
                to.bytes(context);
                to.bytes(dek.as_slice());
            }
            Self::UnwrapGcm(id, context, sealed) => {
                to.tagged_id(6, *id);
                to.bytes(context);
                to.sealed(sealed);
            }
            Self::Random(len) => {
                to.u8(7);
                to.u32(*len);
            }
            Self::MakeSigningKey(id) => to.tagged_id(8, *id),
            Self::Sign(id, data) => {
                to.tagged_id(9, *id);
                to.bytes(data);
            }
            Self::Versions => to.u8(10),
            Self::Incomplete => to.u8(11),
            Self::Probe => to.u8(12),
            Self::CheckValue(id) => to.tagged_id(13, *id),
            Self::Statistics => to.u8(14),
            Self::PublicHalf(id) => to.tagged_id(15, *id),
        }
    }

    fn read(from: &mut Reader<'_>) -> Result<Self, Garbled> {
        Ok(match from.u8()? {
            0 => Self::Create(from.id()?),
            1 => Self::Import(from.id()?, from.secret()?),
            2 => Self::Destroy(from.id()?),
            3 => Self::Wrap(from.id()?, from.vec()?, from.secret()?),
            4 => Self::Unwrap(from.id()?, from.vec()?, from.wrapped()?),
            5 => Self::WrapGcm(from.id()?, from.vec()?, from.secret()?),
            6 => Self::UnwrapGcm(from.id()?, from.vec()?, from.sealed()?),
            7 => Self::Random(from.u32()?),
            8 => Self::MakeSigningKey(from.id()?),
            9 => Self::Sign(from.id()?, from.vec()?),
            10 => Self::Versions,
            11 => Self::Incomplete,
            12 => Self::Probe,
            13 => Self::CheckValue(from.id()?),
            14 => Self::Statistics,
            15 => Self::PublicHalf(from.id()?),
            _ => return Err(Garbled),
        })
    }
}

impl Answer {
    fn weight(&self) -> usize {
        match self {
            Self::Done => 0,
            Self::Wrapped(wrapped) => {
                wrapped.iv.len() + wrapped.ciphertext.len() + wrapped.hash.len()
            }
            Self::Sealed(sealed) => sealed.iv.len() + sealed.ciphertext.len(),
            Self::Secret(secret) => secret.len(),
            Self::PublicKey(key) => key.n.len() + key.e.len(),
            Self::Signature(signature) => signature.len(),
            Self::Ids(ids) => 16 * ids.len(),
            Self::CheckValue(value) => value.len(),
            Self::Statistics(counted) => Writer::weight_of(counted),
        }
    }

    fn write(&self, to: &mut Writer) {
        match self {
            Self::Done => to.u8(0),
            Self::Wrapped(wrapped) => {
                to.u8(1);
                to.wrapped(wrapped);
            }
            Self::Sealed(sealed) => {
                to.u8(2);
                to.sealed(sealed);
            }
            Self::Secret(secret) => {
                to.u8(3);
                to.bytes(secret.as_slice());
            }
            Self::PublicKey(key) => {
                to.u8(4);
                to.bytes(&key.n);
                to.bytes(&key.e);
            }
            Self::Signature(signature) => {
                to.u8(5);
                to.bytes(signature);
            }
            Self::Ids(ids) => {
                to.u8(6);
                to.ids(ids);
            }
            Self::CheckValue(value) => {
                to.u8(7);
                to.bytes(value);
            }
            Self::Statistics(counted) => {
                to.u8(8);
                to.statistics(counted);
            }
        }
    }

    fn read(from: &mut Reader<'_>) -> Result<Self, Garbled> {
        Ok(match from.u8()? {
            0 => Self::Done,
            1 => Self::Wrapped(from.wrapped()?),
            2 => Self::Sealed(from.sealed()?),
            3 => Self::Secret(from.secret()?),
            4 => Self::PublicKey(RsaPublic { n: from.vec()?, e: from.vec()? }),
            5 => Self::Signature(from.vec()?),
            6 => Self::Ids(from.ids()?),
            7 => Self::CheckValue(from.vec()?.try_into().map_err(|_| Garbled)?),
            8 => Self::Statistics(Box::new(from.statistics()?)),
            _ => return Err(Garbled),
        })
    }
}

#[cfg(test)]
#[path = "wire_tests.rs"]
mod tests;
