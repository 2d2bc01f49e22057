//! The verbs of the vault as PKCS#11 calls on one session. A wrap is four calls and an unwrap as many; every 64th wrap
//! is one more, for the next IVs.
//!
//! Each may run twice, because the session can be lost half-way: what makes something says how a
//! second run treats what the first one left.

use crate::check::{CHECKED, check_input, first_quarter};
use crate::pkcs11::error::{Class, Fault};
use crate::pkcs11::keys::{self, Kind};
use crate::pkcs11::raw::BLOCK;
use crate::pkcs11::seat::{Seat, emptied};
use crate::vault::{CheckValue, RsaPublic, VaultError, Wrapped};
use aws_lc_rs::constant_time::verify_slices_are_equal;
use aws_lc_rs::rsa::{
    OAEP_SHA1_MGF1SHA1, OaepPublicEncryptingKey, PublicEncryptingKey, PublicKeyComponents,
};
use cryptoki::context::Function;
use cryptoki::mechanism::rsa::{PkcsMgfType, PkcsOaepParams, PkcsOaepSource};
use cryptoki::mechanism::{Mechanism, MechanismType};
use cryptoki::object::{Attribute, AttributeType, KeyType, ObjectClass, ObjectHandle};
use cryptoki::types::Ulong;
use kms_core::secret::SecretBytes;
use kms_core::wdek::mac_input;
use std::collections::BTreeMap;
use uuid::Uuid;

/// Where the AES key of a new CRK version comes from.
#[derive(Debug)]
pub(super) enum Origin {
    /// The token makes it.
    Token,
    /// The user brought it.
    Import(SecretBytes),
}

/// What the token holds of CRK versions.
#[derive(Debug, Default)]
pub(super) struct Inventory {
    pub(super) whole: Vec<Uuid>,
    pub(super) incomplete: Vec<Uuid>,
    /// Those of which a key may leave the token or shows its value: somebody else put it there, or a restore from a
    /// backup lost what was said of it. They are used all the same, because what they wrapped must stay readable.
    pub(super) exposed: Vec<Uuid>,
}

pub(super) fn wrap(
    seat: &Seat,
    id: Uuid,
    context: &[u8],
    dek: &SecretBytes,
) -> Result<Wrapped, Fault> {
    let root = seat.key(id, Kind::Root)?;
    let mac = seat.key(id, Kind::Mac)?;
    let iv = seat.iv()?;
    let ciphertext = seat.raw().encrypt(seat.session(), root, &iv, dek.as_slice())?;
    let hash = seat.raw().hmac(seat.session(), mac, &mac_input(context, &iv, &ciphertext))?;
    Ok(Wrapped { iv: iv.to_vec(), ciphertext, hash: hash.to_vec() })
}

/// The code first: CBC without it is a padding oracle.
pub(super) fn unwrap(
    seat: &Seat,
    id: Uuid,
    context: &[u8],
    wrapped: &Wrapped,
) -> Result<SecretBytes, Fault> {
    let root = seat.key(id, Kind::Root)?;
    let mac = seat.key(id, Kind::Mac)?;
    let covered = mac_input(context, &wrapped.iv, &wrapped.ciphertext);
    let hash = seat.raw().hmac(seat.session(), mac, &covered)?;
    // Compared here and not by C_Verify, whose time is the vendor's affair.
    verify_slices_are_equal(&hash, &wrapped.hash).map_err(|_| VaultError::NotAuthentic)?;
    let iv = wrapped.iv.as_slice().try_into().map_err(|_| VaultError::NotAuthentic)?;
    let mut dek = seat.raw().decrypt(seat.session(), root, iv, &wrapped.ciphertext)?;
    Ok(SecretBytes::new(std::mem::take(&mut *dek)))
}

pub(super) fn check_value(seat: &Seat, id: Uuid) -> Result<CheckValue, Fault> {
    let root = seat.key(id, Kind::Root)?;
    let mac = seat.key(id, Kind::Mac)?;
    let ciphertext = seat.raw().encrypt(seat.session(), root, &[0; BLOCK], &CHECKED)?;
    let code = seat.raw().hmac(seat.session(), mac, &check_input(&ciphertext))?;
    Ok(first_quarter(&code)?)
}

pub(super) fn random(seat: &Seat, len: usize) -> Result<SecretBytes, Fault> {
    let mut bytes = zeroize::Zeroizing::new(vec![0; len]);
    seat.random(&mut bytes)?;
    Ok(SecretBytes::new(std::mem::take(&mut *bytes)))
}

/// Makes both keys of a version, or leaves nothing.
///
/// `begun` is false on the first run, and is set once the name was seen to be free. Only from then
/// on is what carries the name a leftover of ours, which a second run may destroy.
///
/// # Errors
/// `Exists` when the name was not free.
pub(super) fn create(
    seat: &Seat,
    id: Uuid,
    origin: &Origin,
    begun: &mut bool,
) -> Result<(), Fault> {
    if *begun {
        clear(seat, id)?;
    } else if !parts(seat, id)?.is_empty() {
        return Err(VaultError::Exists.into());
    }
    *begun = true;
    make(seat, id, origin).inspect_err(|_| {
        // The one who asked hears of the first failure; a part that stays shows as incomplete.
        if let Err(fault) = clear(seat, id) {
            tracing::warn!("a part of CRK version {id} stays in the token: {fault:?}");
        }
    })
}

/// Destroys what there is of a version. `begun` is set once there was something to destroy.
///
/// # Errors
/// `NotFound` when there never was.
pub(super) fn destroy(seat: &Seat, id: Uuid, begun: &mut bool) -> Result<(), Fault> {
    if !*begun && parts(seat, id)?.is_empty() {
        return Err(seat.missing());
    }
    *begun = true;
    clear(seat, id)
}

pub(super) fn sign(seat: &Seat, id: Uuid, data: &[u8]) -> Result<Vec<u8>, Fault> {
    let key = seat.key(id, Kind::Signing)?;
    seat.raw().sign(seat.session(), key, data)
}

/// Makes a key pair where nothing carries its name; one that is whole stays as it is.
///
/// `begun` is false on the first run, and is set once the name was seen to be free. Only from then on is one half
/// alone a leftover of ours, which a second run may destroy.
///
/// # Errors
/// `Exists` where one half is alone: somebody's tokens may hang on it.
pub(super) fn make_signing_key(
    seat: &Seat,
    id: Uuid,
    begun: &mut bool,
) -> Result<RsaPublic, Fault> {
    let halves = [Kind::Verifying, Kind::Signing].map(|kind| present(seat.key(id, kind)));
    match halves {
        [Ok(Some(public)), Ok(Some(private))] => {
            check_pair(seat, id, public, private)?;
            public_numbers(seat, public)
        }
        [Ok(None), Ok(None)] => {
            *begun = true;
            generate_pair(seat, id)
        }
        [Ok(public), Ok(private)] if *begun => {
            seat.forget(id);
            for half in public.into_iter().chain(private) {
                seat.destroy_object(half)?;
            }
            generate_pair(seat, id)
        }
        [Ok(_), Ok(_)] => Err(VaultError::Exists.into()),
        [Err(fault), _] | [_, Err(fault)] => Err(fault),
    }
}

pub(super) fn public_half(seat: &Seat, id: Uuid) -> Result<RsaPublic, Fault> {
    public_numbers(seat, seat.key(id, Kind::Verifying)?)
}

/// Reads which versions there are, and remembers their handles on the way.
pub(super) fn inventory(seat: &Seat) -> Result<Inventory, Fault> {
    let search = [Attribute::Class(ObjectClass::SECRET_KEY), Attribute::Token(true)];
    let mut found: BTreeMap<Uuid, Vec<(Kind, ObjectHandle)>> = BTreeMap::new();
    let mut inventory = Inventory::default();
    for object in seat.find(&search)? {
        if let Some((id, kind, safe)) = identify(seat, object)? {
            found.entry(id).or_default().push((kind, object));
            if !safe {
                inventory.exposed.push(id);
            }
        }
    }
    found.remove(&keys::CANARY).ok_or_else(emptied)?;
    for (id, mut parts) in found {
        parts.sort_by_key(|(kind, _)| *kind != Kind::Root);
        parts.dedup_by(|(kind, twin), (first, object)| {
            // Where that cannot be found out, it shows as incomplete.
            kind == first && seat.are_one(*kind, &[*object, *twin]).unwrap_or(false)
        });
        if let [(Kind::Root, root), (Kind::Mac, mac)] = parts[..] {
            seat.remember(id, Kind::Root, root);
            seat.remember(id, Kind::Mac, mac);
            inventory.whole.push(id);
        } else {
            inventory.incomplete.push(id);
        }
    }
    Ok(inventory)
}

/// Makes the canary key if there is none: once in the life of a token.
pub(super) fn plant_canary(seat: &Seat) -> Result<(), Fault> {
    if seat.find(&Kind::Canary.search(keys::CANARY))?.is_empty() {
        generate(seat, keys::CANARY, Kind::Canary, keys::ROOT_KEY_LEN)?;
    }
    Ok(())
}

fn make(seat: &Seat, id: Uuid, origin: &Origin) -> Result<(), Fault> {
    match origin {
        Origin::Token => generate(seat, id, Kind::Root, keys::ROOT_KEY_LEN)?,
        Origin::Import(material) => import(seat, id, material)?,
    }
    generate(seat, id, Kind::Mac, keys::MAC_KEY_LEN)
}

fn generate(seat: &Seat, id: Uuid, kind: Kind, len: u64) -> Result<(), Fault> {
    let mechanism = match kind {
        Kind::Mac => Mechanism::GenericSecretKeyGen,
        _ => Mechanism::AesKeyGen,
    };
    let mut template = kind.template(id);
    template.push(Attribute::ValueLen(Ulong::from(len)));
    let key =
        seat.change(Function::GenerateKey, |session| session.generate_key(&mechanism, &template))?;
    template.extend(keys::made_inside());
    keys::check(seat, key, &template)
}

/// Key material enters encrypted, under a key pair that the token makes for this one import, and
/// is an object only inside. SHA-1 in OAEP because SoftHSM knows no other; OAEP does not rest on
/// collision resistance.
fn import(seat: &Seat, id: Uuid, material: &SecretBytes) -> Result<(), Fault> {
    let (public, private) = keys::transport_pair();
    let (public, private) = generate_key_pair(seat, &public, &private)?;
    let template = Kind::Root.template(id);
    let imported = public_numbers(seat, public)
        .and_then(|numbers| pack(&numbers, material))
        .and_then(|parcel| {
            seat.change(Function::UnwrapKey, |session| {
                session.unwrap_key(&oaep(), private, &parcel, &template)
            })
        });
    seat.destroy_object(private)?;
    seat.destroy_object(public)?;
    keys::check(seat, imported?, &template)
}

fn oaep() -> Mechanism<'static> {
    Mechanism::RsaPkcsOaep(PkcsOaepParams::new(
        MechanismType::SHA1,
        PkcsMgfType::MGF1_SHA1,
        PkcsOaepSource::empty(),
    ))
}

fn pack(public: &RsaPublic, material: &SecretBytes) -> Result<Vec<u8>, Fault> {
    let broken = |_| Fault::device("the token made an RSA key that does not encrypt");
    let numbers = PublicKeyComponents { n: &public.n, e: &public.e };
    let key: PublicEncryptingKey = numbers.try_into().map_err(broken)?;
    let key = OaepPublicEncryptingKey::new(key).map_err(broken)?;
    let mut parcel = vec![0; key.ciphertext_size()];
    let len = key
        .encrypt(&OAEP_SHA1_MGF1SHA1, material.as_slice(), &mut parcel, None)
        .map_err(broken)?
        .len();
    parcel.truncate(len);
    Ok(parcel)
}

fn generate_pair(seat: &Seat, id: Uuid) -> Result<RsaPublic, Fault> {
    let mut template = Kind::Verifying.template(id);
    template.extend(keys::rsa_length());
    let (public, private) = generate_key_pair(seat, &template, &Kind::Signing.template(id))?;
    let checked = check_pair(seat, id, public, private);
    if checked.is_err() {
        seat.destroy_object(private)?;
        seat.destroy_object(public)?;
    }
    checked.and_then(|()| public_numbers(seat, public))
}

fn generate_key_pair(
    seat: &Seat,
    public: &[Attribute],
    private: &[Attribute],
) -> Result<(ObjectHandle, ObjectHandle), Fault> {
    seat.change(Function::GenerateKeyPair, |session| {
        session.generate_key_pair(&Mechanism::RsaPkcsKeyPairGen, public, private)
    })
}

fn check_pair(
    seat: &Seat,
    id: Uuid,
    public: ObjectHandle,
    private: ObjectHandle,
) -> Result<(), Fault> {
    let mut wanted_public = Kind::Verifying.template(id);
    wanted_public.extend(keys::rsa_length());
    let mut wanted_private = Kind::Signing.template(id);
    wanted_private.extend(keys::made_inside());
    keys::check(seat, public, &wanted_public)?;
    keys::check(seat, private, &wanted_private)
}

fn present(found: Result<ObjectHandle, Fault>) -> Result<Option<ObjectHandle>, Fault> {
    match found {
        Err(Fault::Answer(VaultError::NotFound)) => Ok(None),
        found => found.map(Some),
    }
}

fn public_numbers(seat: &Seat, public: ObjectHandle) -> Result<RsaPublic, Fault> {
    let types = [AttributeType::Modulus, AttributeType::PublicExponent];
    let mut numbers = RsaPublic { n: Vec::new(), e: Vec::new() };
    for attribute in seat.attributes(public, &types)? {
        match attribute {
            Attribute::Modulus(n) => numbers.n = without_zeros(n),
            Attribute::PublicExponent(e) => numbers.e = without_zeros(e),
            _ => {}
        }
    }
    Ok(numbers)
}

fn without_zeros(mut number: Vec<u8>) -> Vec<u8> {
    let zeros = number.iter().take_while(|byte| **byte == 0).count();
    number.drain(..zeros);
    number
}

fn parts(seat: &Seat, id: Uuid) -> Result<Vec<ObjectHandle>, Fault> {
    let mut parts = seat.find(&Kind::Root.search(id))?;
    parts.extend(seat.find(&Kind::Mac.search(id))?);
    Ok(parts)
}

fn clear(seat: &Seat, id: Uuid) -> Result<(), Fault> {
    let parts = parts(seat, id)?;
    seat.forget(id);
    let mut gone = None;
    for part in parts {
        match seat.destroy_object(part) {
            // One that was shown twice is destroyed once.
            Err(fault) if fault.class() == Some(Class::Handle) => gone = Some(fault),
            other => other?,
        }
    }
    match gone {
        Some(fault) if !self::parts(seat, id)?.is_empty() => Err(fault),
        _ => Ok(()),
    }
}

/// Which of our secret keys this is, and whether it stays in the token; `None` for a stranger's.
fn identify(seat: &Seat, object: ObjectHandle) -> Result<Option<(Uuid, Kind, bool)>, Fault> {
    let types = [
        AttributeType::Id,
        AttributeType::KeyType,
        AttributeType::Sensitive,
        AttributeType::Extractable,
    ];
    let (mut id, mut kind) = (None, None);
    let (mut sensitive, mut extractable) = (false, true);
    for attribute in seat.attributes(object, &types)? {
        match attribute {
            Attribute::Id(bytes) => id = Uuid::from_slice(&bytes).ok(),
            Attribute::KeyType(KeyType::AES) => kind = Some(Kind::Root),
            Attribute::KeyType(KeyType::GENERIC_SECRET) => kind = Some(Kind::Mac),
            Attribute::Sensitive(said) => sensitive = said,
            Attribute::Extractable(said) => extractable = said,
            _ => {}
        }
    }
    Ok(id.zip(kind).map(|(id, kind)| (id, kind, sensitive && !extractable)))
}
