//! The cases that hold for every vault. Each makes its own keys; none minds what others left.

use aws_lc_rs::cipher::{
    AES_128, AES_192, AES_256, DecryptionContext, PaddedBlockDecryptingKey, UnboundCipherKey,
};
use aws_lc_rs::iv::FixedLength;
use aws_lc_rs::rsa::PublicKeyComponents;
use aws_lc_rs::signature::RSA_PKCS1_2048_8192_SHA256;
use kms_core::secret::SecretBytes;
use kms_core::wdek::mac_context;
use kms_hsm::{MAX_PLAINTEXT, MAX_RANDOM, RsaPublic, Sealed, Vault, VaultError, Wrapped};
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use uuid::Uuid;

type Shared = Arc<dyn Vault>;
type Case = fn(Shared) -> Pin<Box<dyn Future<Output = ()>>>;

macro_rules! cases {
    ($($name:ident),+ $(,)?) => {
        vec![$((stringify!($name), (|vault| Box::pin($name(vault))) as Case)),+]
    };
}

pub(crate) fn all() -> Vec<(&'static str, Case)> {
    cases![
        what_is_wrapped_is_unwrapped,
        no_two_wraps_are_alike,
        gcm_binds_and_opens_as_the_other_format,
        input_that_cannot_be_wrapped_is_refused,
        another_version_or_context_is_not_authentic,
        every_flipped_bit_is_not_authentic,
        every_other_length_is_not_authentic,
        a_version_is_made_once_and_destroyed_once,
        two_creators_of_one_version_make_one,
        an_imported_key_is_the_one_that_wraps,
        key_material_of_other_lengths_is_refused,
        a_check_value_names_one_version_only,
        random_bytes_do_not_repeat,
        signatures_verify_outside,
        one_signing_key_for_all_who_ask,
        many_callers_at_once,
        what_was_just_made_is_there_for_everyone,
        a_probe_passes,
    ]
}

async fn what_is_wrapped_is_unwrapped(vault: Shared) {
    let id = fresh_version(&vault).await;
    for len in [1, 15, 16, 17, 32, 64, MAX_PLAINTEXT] {
        let context = mac_context("instance", "key", "version", &[format!("aad {len}")]);
        let wrapped = vault.wrap(id, &context, pattern(len)).await.unwrap();
        assert_eq!(wrapped.iv.len(), 16);
        assert_eq!(wrapped.ciphertext.len(), (len / 16 + 1) * 16);
        assert_eq!(wrapped.hash.len(), 64);
        let opened = vault.unwrap(id, &context, wrapped).await.unwrap();
        assert_eq!(opened.as_slice(), pattern(len).as_slice());
    }
}

async fn no_two_wraps_are_alike(vault: Shared) {
    let id = fresh_version(&vault).await;
    let one = vault.wrap(id, b"c", pattern(32)).await.unwrap();
    let two = vault.wrap(id, b"c", pattern(32)).await.unwrap();
    assert_ne!(one.iv, two.iv);
    assert_ne!(one.ciphertext, two.ciphertext);
    assert_ne!(one.hash, two.hash);
}

async fn gcm_binds_and_opens_as_the_other_format(vault: Shared) {
    let (id, other) = (fresh_version(&vault).await, fresh_version(&vault).await);
    for len in [1, 16, 32, MAX_PLAINTEXT] {
        let sealed = vault.wrap_gcm(id, b"c", pattern(len)).await.unwrap();
        assert_eq!(sealed.ciphertext.len(), len + 16);
        let opened = vault.unwrap_gcm(id, b"c", sealed).await.unwrap();
        assert_eq!(opened.as_slice(), pattern(len).as_slice());
    }
    for len in [0, MAX_PLAINTEXT + 1] {
        let refused = vault.wrap_gcm(id, b"c", pattern(len)).await;
        assert!(matches!(refused, Err(VaultError::BadInput(_))), "{len}: {refused:?}");
    }
    let one = vault.wrap_gcm(id, b"c", pattern(32)).await.unwrap();
    let two = vault.wrap_gcm(id, b"c", pattern(32)).await.unwrap();
    assert!(one.iv != two.iv && one.ciphertext != two.ciphertext);
    let mixed = Sealed { iv: two.iv, ..one.clone() };
    let short = Sealed { ciphertext: one.ciphertext[..15].to_vec(), ..one.clone() };
    let no_iv = Sealed { iv: Vec::new(), ..one.clone() };
    for (id, context, sealed) in [
        (other, &b"c"[..], one.clone()),
        (id, b"d", one.clone()),
        (id, b"c", mixed),
        (id, b"c", short),
        (id, b"c", no_iv),
    ] {
        let refused = vault.unwrap_gcm(id, context, sealed.clone()).await.map(|_| ());
        assert_eq!(refused, Err(VaultError::NotAuthentic), "{sealed:?}");
    }
    let unknown = vault.unwrap_gcm(Uuid::new_v4(), b"c", one).await.map(|_| ());
    assert_eq!(unknown, Err(VaultError::NotFound));
}

async fn input_that_cannot_be_wrapped_is_refused(vault: Shared) {
    let id = fresh_version(&vault).await;
    for len in [0, MAX_PLAINTEXT + 1] {
        let refused = vault.wrap(id, b"c", pattern(len)).await;
        assert!(matches!(refused, Err(VaultError::BadInput(_))), "{len}: {refused:?}");
    }
    let unknown = Uuid::new_v4();
    assert_eq!(vault.wrap(unknown, b"c", pattern(32)).await, Err(VaultError::NotFound));
}

async fn another_version_or_context_is_not_authentic(vault: Shared) {
    let (id, other) = (fresh_version(&vault).await, fresh_version(&vault).await);
    let aad = |entries: &[&str]| {
        let entries: Vec<String> = entries.iter().map(ToString::to_string).collect();
        mac_context("instance", "key", "version", &entries)
    };
    let wrapped = vault.wrap(id, &aad(&["a", "b"]), pattern(32)).await.unwrap();
    let contexts = [
        aad(&[]),
        aad(&[""]),
        aad(&["a"]),
        aad(&["b", "a"]),
        aad(&["ab"]),
        aad(&["a", "b", ""]),
        mac_context("another", "key", "version", &["a".to_owned(), "b".to_owned()]),
        mac_context("instance", "another", "version", &["a".to_owned(), "b".to_owned()]),
        mac_context("instance", "key", "another", &["a".to_owned(), "b".to_owned()]),
        Vec::new(),
    ];
    for context in contexts {
        not_authentic(&vault, id, &context, wrapped.clone(), "context").await;
    }
    not_authentic(&vault, other, &aad(&["a", "b"]), wrapped.clone(), "version").await;
    let unknown = vault.unwrap(Uuid::new_v4(), &aad(&["a", "b"]), wrapped.clone()).await;
    assert_eq!(unknown.unwrap_err(), VaultError::NotFound);
    assert!(vault.unwrap(id, &aad(&["a", "b"]), wrapped).await.is_ok());
}

async fn every_flipped_bit_is_not_authentic(vault: Shared) {
    let id = fresh_version(&vault).await;
    let wrapped = vault.wrap(id, b"c", pattern(32)).await.unwrap();
    let fields: [fn(&mut Wrapped) -> &mut Vec<u8>; 3] =
        [|w| &mut w.iv, |w| &mut w.ciphertext, |w| &mut w.hash];
    for field in fields {
        for bit in 0..field(&mut wrapped.clone()).len() * 8 {
            let mut changed = wrapped.clone();
            field(&mut changed)[bit / 8] ^= 1 << (bit % 8);
            not_authentic(&vault, id, b"c", changed, "a flipped bit").await;
        }
    }
}

async fn every_other_length_is_not_authentic(vault: Shared) {
    let id = fresh_version(&vault).await;
    let wrapped = vault.wrap(id, b"c", pattern(32)).await.unwrap();
    for len in 0..wrapped.ciphertext.len() {
        let ciphertext = wrapped.ciphertext[..len].to_vec();
        not_authentic(&vault, id, b"c", Wrapped { ciphertext, ..wrapped.clone() }, "cut").await;
    }
    for len in (0..16).chain([17, 32]) {
        let iv = wrapped.iv.iter().cycle().take(len).copied().collect();
        not_authentic(&vault, id, b"c", Wrapped { iv, ..wrapped.clone() }, "iv").await;
    }
    for len in (0..64).chain([65, 128]) {
        let hash = wrapped.hash.iter().cycle().take(len).copied().collect();
        not_authentic(&vault, id, b"c", Wrapped { hash, ..wrapped.clone() }, "hash").await;
    }
    // The same bytes in a row, cut elsewhere: the code must cover where the IV ends.
    let mut shifted = wrapped.clone();
    shifted.iv.extend(shifted.ciphertext.drain(..16));
    not_authentic(&vault, id, b"c", shifted, "a moved border").await;
}

async fn a_version_is_made_once_and_destroyed_once(vault: Shared) {
    let id = fresh_version(&vault).await;
    let wrapped = vault.wrap(id, b"c", pattern(32)).await.unwrap();
    assert!(vault.versions().await.unwrap().contains(&id));
    assert_eq!(vault.incomplete().await, Ok(vec![]));
    assert_eq!(vault.create_version(id).await, Err(VaultError::Exists));
    let material = SecretBytes::new(vec![1; 32]);
    assert_eq!(vault.import_version(id, material).await, Err(VaultError::Exists));
    // What was refused has harmed nothing.
    assert!(vault.unwrap(id, b"c", wrapped.clone()).await.is_ok());

    assert_eq!(vault.destroy_version(id).await, Ok(()));
    assert_eq!(vault.destroy_version(id).await, Err(VaultError::NotFound));
    assert_eq!(vault.unwrap(id, b"c", wrapped.clone()).await.unwrap_err(), VaultError::NotFound);
    assert!(!vault.versions().await.unwrap().contains(&id));

    // The name may be used again; the key is another.
    assert_eq!(vault.create_version(id).await, Ok(()));
    not_authentic(&vault, id, b"c", wrapped, "the next key of this name").await;
}

async fn two_creators_of_one_version_make_one(vault: Shared) {
    let id = Uuid::new_v4();
    let (one, two) = tokio::join!(vault.create_version(id), vault.create_version(id));
    let made = [&one, &two].into_iter().filter(|made| made.is_ok()).count();
    assert_eq!(made, 1, "{one:?} {two:?}");
    assert!(one == Err(VaultError::Exists) || two == Err(VaultError::Exists));
    assert!(vault.wrap(id, b"c", pattern(32)).await.is_ok());
}

async fn an_imported_key_is_the_one_that_wraps(vault: Shared) {
    for (len, algorithm) in [(16, &AES_128), (24, &AES_192), (32, &AES_256)] {
        let id = Uuid::new_v4();
        let material = pattern(len);
        vault.import_version(id, material.clone()).await.unwrap();
        let wrapped = vault.wrap(id, b"c", pattern(33)).await.unwrap();

        let key = UnboundCipherKey::new(algorithm, material.as_slice()).unwrap();
        let key = PaddedBlockDecryptingKey::cbc_pkcs7(key).unwrap();
        let iv: [u8; 16] = wrapped.iv.as_slice().try_into().unwrap();
        let mut text = wrapped.ciphertext.clone();
        let context = DecryptionContext::Iv128(FixedLength::from(iv));
        assert_eq!(key.decrypt(&mut text, context).unwrap(), pattern(33).as_slice());

        let opened = vault.unwrap(id, b"c", wrapped).await.unwrap();
        assert_eq!(opened.as_slice(), pattern(33).as_slice());
    }
}

async fn key_material_of_other_lengths_is_refused(vault: Shared) {
    for len in [0, 1, 15, 17, 31, 33, 64] {
        let id = Uuid::new_v4();
        let refused = vault.import_version(id, SecretBytes::new(vec![7; len])).await;
        assert!(matches!(refused, Err(VaultError::BadInput(_))), "{len}: {refused:?}");
        assert!(!vault.versions().await.unwrap().contains(&id));
    }
}

async fn a_check_value_names_one_version_only(vault: Shared) {
    let (one, other) = (fresh_version(&vault).await, fresh_version(&vault).await);
    let value = vault.check_value(one).await.unwrap();
    assert_eq!(vault.check_value(one).await.unwrap(), value);
    assert_ne!(vault.check_value(other).await.unwrap(), value);
    let material = || SecretBytes::new(vec![7; 32]);
    let [first, second] = [Uuid::new_v4(), Uuid::new_v4()];
    vault.import_version(first, material()).await.unwrap();
    vault.import_version(second, material()).await.unwrap();
    let values =
        [vault.check_value(first).await.unwrap(), vault.check_value(second).await.unwrap()];
    assert_ne!(values[0], values[1], "one key, but not one version");
    vault.destroy_version(one).await.unwrap();
    assert_eq!(vault.check_value(one).await, Err(VaultError::NotFound));
    assert!(vault.serial().is_some_and(|serial| !serial.is_empty()));
}

async fn random_bytes_do_not_repeat(vault: Shared) {
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..100 {
        let bytes = vault.random(32).await.unwrap();
        assert_eq!(bytes.len(), 32);
        assert!(seen.insert(bytes.as_slice().to_vec()));
    }
    assert_eq!(vault.random(MAX_RANDOM).await.unwrap().len(), MAX_RANDOM);
    let refused = vault.random(MAX_RANDOM + 1).await;
    assert!(matches!(refused, Err(VaultError::BadInput(_))));
}

async fn signatures_verify_outside(vault: Shared) {
    let id = Uuid::new_v4();
    assert_eq!(vault.sign(id, b"too early").await, Err(VaultError::NotFound));
    let public = vault.make_signing_key(id).await.unwrap();
    let signature = vault.sign(id, b"token").await.unwrap();
    assert!(verifies(&public, b"token", &signature));
    assert!(!verifies(&public, b"another token", &signature));
}

async fn one_signing_key_for_all_who_ask(vault: Shared) {
    let id = Uuid::new_v4();
    let (one, two) = tokio::join!(vault.make_signing_key(id), vault.make_signing_key(id));
    let public = one.unwrap();
    assert_eq!(public, two.unwrap());
    assert_eq!(public, vault.make_signing_key(id).await.unwrap());
    assert!(public.n.len() >= 256 && public.n[0] & 0x80 != 0, "{} bytes", public.n.len());
    assert_eq!(public.e, [1, 0, 1]);
    assert_ne!(public.n, vault.make_signing_key(Uuid::new_v4()).await.unwrap().n);
    assert!(!vault.versions().await.unwrap().contains(&id), "a signing key is no CRK version");
}

async fn many_callers_at_once(vault: Shared) {
    let ids = [fresh_version(&vault).await, fresh_version(&vault).await];
    let callers: Vec<_> = (0..16)
        .map(|caller: usize| {
            let vault = vault.clone();
            let id = ids[caller % 2];
            tokio::spawn(async move {
                for round in 0..25 {
                    let context = format!("caller {caller} round {round}").into_bytes();
                    let dek = pattern(16 + caller);
                    let wrapped = vault.wrap(id, &context, dek.clone()).await.unwrap();
                    let opened = vault.unwrap(id, &context, wrapped).await.unwrap();
                    assert_eq!(opened.as_slice(), dek.as_slice());
                }
            })
        })
        .collect();
    for caller in callers {
        caller.await.unwrap();
    }
}

/// Versions are made and destroyed while others are looked for: every session sees the whole version once it is made.
async fn what_was_just_made_is_there_for_everyone(vault: Shared) {
    let makers: Vec<_> = (0..6)
        .map(|maker: usize| {
            let vault = vault.clone();
            tokio::spawn(async move {
                for round in 0..20 {
                    let told = format!("maker {maker}, round {round}");
                    let id = Uuid::new_v4();
                    vault.create_version(id).await.expect(&told);
                    let value = vault.check_value(id).await.expect(&told);
                    let wrapped = vault.wrap(id, b"", pattern(32)).await.expect(&told);
                    vault.unwrap(id, b"", wrapped).await.expect(&told);
                    assert_eq!(vault.check_value(id).await.expect(&told), value, "{told}");
                    if round % 2 == 0 {
                        vault.destroy_version(id).await.expect(&told);
                    }
                }
            })
        })
        .collect();
    for maker in makers {
        maker.await.unwrap();
    }
}

async fn a_probe_passes(vault: Shared) {
    assert_eq!(vault.probe().await, Ok(()));
}

async fn fresh_version(vault: &Shared) -> Uuid {
    let id = Uuid::new_v4();
    vault.create_version(id).await.unwrap();
    id
}

async fn not_authentic(vault: &Shared, id: Uuid, context: &[u8], wrapped: Wrapped, what: &str) {
    let refused = vault.unwrap(id, context, wrapped).await.map(|_| ());
    assert_eq!(refused, Err(VaultError::NotAuthentic), "{what}");
}

fn verifies(public: &RsaPublic, data: &[u8], signature: &[u8]) -> bool {
    PublicKeyComponents { n: &public.n, e: &public.e }
        .to_parsed_public_key(&RSA_PKCS1_2048_8192_SHA256)
        .unwrap()
        .verify_sig(data, signature)
        .is_ok()
}

/// Bytes of which no two prefixes repeat.
pub(crate) fn pattern(len: usize) -> SecretBytes {
    SecretBytes::new((0..len).map(|i| u8::try_from(i * 7 % 251).unwrap()).collect())
}
