//! What our keys look like in a token: every attribute said aloud, and read back afterwards.
//!
//! Tokens fill gaps in a template with whatever their vendor liked: SoftHSM lets a bare AES key
//! wrap, sign and be modified. A key that may wrap and decrypt hands out other keys (Clulow, 2003).

use crate::pkcs11::error::Fault;
use crate::pkcs11::seat::Seat;
use crate::vault::VaultError;
use cryptoki::object::{Attribute, AttributeType, KeyType, ObjectClass, ObjectHandle};
use cryptoki::types::Ulong;
use uuid::Uuid;

/// The name of the canary key: no UUID that anyone draws at random.
pub(super) const CANARY: Uuid = Uuid::from_bytes(*b"keelson canary k");

pub(super) const ROOT_KEY_LEN: u64 = 32;
pub(super) const MAC_KEY_LEN: u64 = 64;
pub(super) const RSA_BITS: u64 = 2048;
const RSA_EXPONENT: [u8; 3] = [1, 0, 1];

/// The objects that we keep in a token. Their CKA_ID is the UUID; labels are for people only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Kind {
    /// The AES key of a CRK version.
    Root,
    /// The HMAC key of a CRK version.
    Mac,
    /// An AES key that protects nothing: its use shows that the token works, and its sight that the
    /// token still holds what it held.
    Canary,
    /// The private half of a signing key.
    Signing,
    /// The public half of a signing key.
    Verifying,
}

impl Kind {
    /// How to find it.
    pub(super) fn search(self, id: Uuid) -> Vec<Attribute> {
        let (class, key_type) = self.class();
        vec![
            Attribute::Class(class),
            Attribute::KeyType(key_type),
            Attribute::Token(true),
            Attribute::Id(id.as_bytes().to_vec()),
        ]
    }

    /// How to make it. The length is left to the one who knows it.
    pub(super) fn template(self, id: Uuid) -> Vec<Attribute> {
        let mut attributes = self.search(id);
        attributes.extend([
            Attribute::Label(self.label(id).into_bytes()),
            Attribute::Private(self != Self::Verifying),
            Attribute::Copyable(false),
            Attribute::Derive(false),
        ]);
        attributes.extend(self.uses());
        if self != Self::Verifying {
            attributes.extend([Attribute::Sensitive(true), Attribute::Extractable(false)]);
        }
        // Last: SoftHSM follows the template in order, and then changes nothing more.
        attributes.push(Attribute::Modifiable(false));
        attributes
    }

    fn class(self) -> (ObjectClass, KeyType) {
        match self {
            Self::Root | Self::Canary => (ObjectClass::SECRET_KEY, KeyType::AES),
            Self::Mac => (ObjectClass::SECRET_KEY, KeyType::GENERIC_SECRET),
            Self::Signing => (ObjectClass::PRIVATE_KEY, KeyType::RSA),
            Self::Verifying => (ObjectClass::PUBLIC_KEY, KeyType::RSA),
        }
    }

    fn label(self, id: Uuid) -> String {
        match self {
            Self::Root => format!("keelson root key {id}"),
            Self::Mac => format!("keelson code key {id}"),
            Self::Canary => "keelson canary".to_owned(),
            Self::Signing | Self::Verifying => format!("keelson signing key {id}"),
        }
    }

    fn uses(self) -> Vec<Attribute> {
        let mac = self == Self::Mac;
        match self {
            Self::Root | Self::Mac | Self::Canary => vec![
                Attribute::Encrypt(!mac),
                Attribute::Decrypt(!mac),
                Attribute::Sign(mac),
                Attribute::Verify(mac),
                Attribute::Wrap(false),
                Attribute::Unwrap(false),
            ],
            Self::Signing => vec![
                Attribute::Sign(true),
                Attribute::SignRecover(false),
                Attribute::Decrypt(false),
                Attribute::Unwrap(false),
            ],
            Self::Verifying => vec![
                Attribute::Verify(true),
                Attribute::VerifyRecover(false),
                Attribute::Encrypt(false),
                Attribute::Wrap(false),
            ],
        }
    }
}

/// What only a key that was made inside the token can show.
pub(super) fn made_inside() -> [Attribute; 3] {
    [Attribute::Local(true), Attribute::AlwaysSensitive(true), Attribute::NeverExtractable(true)]
}

/// The length of an RSA key pair, for the template of its public half.
pub(super) fn rsa_length() -> [Attribute; 2] {
    [
        Attribute::ModulusBits(Ulong::from(RSA_BITS)),
        Attribute::PublicExponent(RSA_EXPONENT.to_vec()),
    ]
}

/// The halves of the throw-away pair under which imported key material travels into the token.
pub(super) fn transport_pair() -> (Vec<Attribute>, Vec<Attribute>) {
    let mut public = vec![
        Attribute::Token(false),
        Attribute::Private(false),
        Attribute::Wrap(true),
        Attribute::Encrypt(false),
        Attribute::Verify(false),
    ];
    public.extend(rsa_length());
    let private = vec![
        Attribute::Token(false),
        Attribute::Private(true),
        Attribute::Sensitive(true),
        Attribute::Extractable(false),
        Attribute::Unwrap(true),
        Attribute::Decrypt(false),
        Attribute::Sign(false),
    ];
    (public, private)
}

/// Reads back from the token what it says of `object`, and compares it with `wanted`.
///
/// # Errors
/// `Policy` for the first attribute that is missing or different, and for a readable value.
pub(super) fn check(seat: &Seat, object: ObjectHandle, wanted: &[Attribute]) -> Result<(), Fault> {
    let types: Vec<AttributeType> = wanted.iter().map(Attribute::attribute_type).collect();
    let found = seat.attributes(object, &types)?;
    for attribute in wanted {
        let kind = attribute.attribute_type();
        match found.iter().find(|candidate| candidate.attribute_type() == kind) {
            Some(same) if same == attribute => {}
            // Never shown as false by tokens from before PKCS#11 2.40, which do not know it.
            None if kind == AttributeType::Copyable => {}
            Some(other) => return Err(weaker(format!("made {other:?}, not {attribute:?}"))),
            None => return Err(weaker(format!("does not say whether it made {attribute:?}"))),
        }
    }
    let secret = wanted.contains(&Attribute::Sensitive(true));
    let rsa = wanted.contains(&Attribute::KeyType(KeyType::RSA));
    let value = if rsa { AttributeType::PrivateExponent } else { AttributeType::Value };
    if secret && seat.shows(object, value)? {
        return Err(weaker("shows the value of a sensitive key".to_owned()));
    }
    Ok(())
}

fn weaker(what: String) -> Fault {
    VaultError::Policy(format!("the token {what}")).into()
}
