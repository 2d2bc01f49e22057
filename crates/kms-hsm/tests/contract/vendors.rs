//! AES-GCM as the vendors do it, with the fault-injecting module in their place.

use crate::cases::pattern;
use crate::shim::Shim;
use crate::token::TestToken;
use kms_hsm::pkcs11::{IvChoice, IvMode, Pkcs11Vault, Settings};
use kms_hsm::{Sealed, Vault, VaultError};
use pkcs11_shim::Function;
use std::collections::BTreeSet;
use uuid::Uuid;

/// SoftHSM and Kryoptic take the caller's IV: three calls a wrap, and two an unwrap.
pub(crate) async fn the_token_as_it_is(token: TestToken) {
    let shim = Shim::before(&token);
    passes(&shim, IvChoice::Auto, 12, 3).await;
    passes(&shim, IvChoice::Only(IvMode::Caller), 12, 3).await;
}

pub(crate) async fn luna_makes_the_iv_and_appends_it(token: TestToken) {
    let shim = Shim::before(&token);
    shim.order("iv appended");
    passes(&shim, IvChoice::Auto, 16, 2).await;
    passes(&shim, IvChoice::Only(IvMode::Appended), 16, 2).await;
}

pub(crate) async fn luna_in_strict_mode_takes_no_iv(token: TestToken) {
    let shim = Shim::before(&token);
    shim.order("iv appended strict");
    passes(&shim, IvChoice::Auto, 16, 2).await;
    refuses(&shim, IvChoice::Only(IvMode::Caller)).await;
}

pub(crate) async fn nshield_and_cloudhsm_fill_the_iv(token: TestToken) {
    let shim = Shim::before(&token);
    shim.order("iv filled");
    passes(&shim, IvChoice::Auto, 12, 2).await;
    passes(&shim, IvChoice::Only(IvMode::Filled), 12, 2).await;
}

/// A token that repeats an IV is found out before anything was wrapped, whatever the settings say.
pub(crate) async fn pitfall_04_an_iv_that_repeats_is_refused_and_cbc_goes_on(token: TestToken) {
    let shim = Shim::before(&token);
    for (order, mode) in
        [("iv appended same", IvMode::Appended), ("iv filled same", IvMode::Filled)]
    {
        shim.order(order);
        refuses(&shim, IvChoice::Only(mode)).await;
        refuses(&shim, IvChoice::Auto).await;
    }
}

/// Luna's and nShield's modes on a token that wants the caller's IV would give the same key stream each time.
pub(crate) async fn a_mode_that_is_not_the_tokens_is_refused(token: TestToken) {
    let shim = Shim::before(&token);
    refuses(&shim, IvChoice::Only(IvMode::Appended)).await;
    refuses(&shim, IvChoice::Only(IvMode::Filled)).await;
    shim.order("iv filled");
    refuses(&shim, IvChoice::Only(IvMode::Appended)).await;
    refuses(&shim, IvChoice::Only(IvMode::Caller)).await;
}

/// The sessions die after the token has encrypted and before anybody hears of it: only who counts the uses may ask again.
pub(crate) async fn one_call_uses_a_key_once_whatever_is_lost(token: TestToken) {
    let shim = Shim::before(&token);
    let vault = opened(&shim, IvChoice::Auto);
    let id = Uuid::new_v4();
    vault.create_version(id).await.unwrap();
    vault.wrap_gcm(id, b"c", pattern(32)).await.unwrap();
    shim.order("fail C_Encrypt CKR_SESSION_HANDLE_INVALID late times=1");
    let before = shim.counts.all();
    let lost = vault.wrap_gcm(id, b"c", pattern(32)).await.map(|_| ());
    assert!(matches!(lost, Err(VaultError::Unavailable { .. })), "{lost:?}");
    // The sessions were made anew, and the call was not.
    let with = shim.counts.since(&before);
    assert!(with.iter().any(|(function, _)| *function == Function::C_Login), "{with:?}");
    shim.order("fail C_Encrypt CKR_SESSION_HANDLE_INVALID late times=1");
    vault.wrap(id, b"c", pattern(32)).await.unwrap();
    vault.wrap_gcm(id, b"c", pattern(32)).await.unwrap();
}

pub(crate) async fn what_is_no_wrapped_key_of_gcm_is_not_authentic(token: TestToken) {
    let shim = Shim::before(&token);
    let vault = shim.open();
    let (id, other) = (Uuid::new_v4(), Uuid::new_v4());
    vault.create_version(id).await.unwrap();
    vault.create_version(other).await.unwrap();
    let good = vault.wrap_gcm(id, b"c", pattern(32)).await.unwrap();
    let opened = shim.counts.of(Function::C_OpenSession);
    let mut bad = vec![
        Sealed { iv: vec![], ..good.clone() },
        Sealed { iv: vec![1; 13], ..good.clone() },
        Sealed { iv: [&good.iv[..], &[0; 4]].concat(), ..good.clone() },
    ];
    bad.extend((0..64).filter(|len| *len != good.ciphertext.len()).map(|len| {
        let ciphertext = good.ciphertext.iter().cycle().take(len).copied().collect();
        Sealed { ciphertext, ..good.clone() }
    }));
    for at in 0..good.ciphertext.len() {
        let mut changed = good.clone();
        changed.ciphertext[at] ^= 1;
        bad.push(changed);
    }
    for sealed in bad {
        let answer = vault.unwrap_gcm(id, b"c", sealed.clone()).await.map(|_| ());
        assert_eq!(answer, Err(VaultError::NotAuthentic), "{sealed:?}");
    }
    for (id, context) in [(id, &b"another"[..]), (id, b""), (other, b"c")] {
        let answer = vault.unwrap_gcm(id, context, good.clone()).await.map(|_| ());
        assert_eq!(answer, Err(VaultError::NotAuthentic));
    }
    assert_eq!(shim.counts.of(Function::C_OpenSession), opened, "a session was given up");
    assert!(vault.unwrap_gcm(id, b"c", good).await.is_ok());
}

/// What is wrapped is unwrapped, each time with another IV, in as few calls as can be.
async fn passes(shim: &Shim, choice: IvChoice, iv_len: usize, calls: u64) {
    let vault = opened(shim, choice);
    let id = Uuid::new_v4();
    vault.create_version(id).await.unwrap();
    vault.wrap_gcm(id, b"c", pattern(1)).await.unwrap();
    let mut ivs = BTreeSet::new();
    for len in [1, 15, 16, 17, 32, 4096] {
        let before = shim.counts.all();
        let sealed = vault.wrap_gcm(id, b"c", pattern(len)).await.unwrap();
        let called: u64 = shim.counts.since(&before).iter().map(|(_, count)| count).sum();
        assert_eq!(called, calls, "{:?}", shim.counts.since(&before));
        assert_eq!((sealed.iv.len(), sealed.ciphertext.len()), (iv_len, len + 16));
        assert!(ivs.insert(sealed.iv.clone()));
        let before = shim.counts.all();
        let dek = vault.unwrap_gcm(id, b"c", sealed).await.unwrap();
        assert_eq!(dek.as_slice(), pattern(len).as_slice());
        let called: u64 = shim.counts.since(&before).iter().map(|(_, count)| count).sum();
        assert_eq!(called, 2);
    }
}

/// AES-GCM is refused with its cause; what needs it not goes on.
async fn refuses(shim: &Shim, choice: IvChoice) {
    let vault = opened(shim, choice);
    let id = Uuid::new_v4();
    vault.create_version(id).await.unwrap();
    let Err(VaultError::Policy(cause)) = vault.wrap_gcm(id, b"c", pattern(32)).await else {
        panic!("{choice:?} was accepted")
    };
    assert!(cause.contains("no IV mode that is safe"), "{cause}");
    assert!(vault.wrap(id, b"c", pattern(32)).await.is_ok());
}

fn opened(shim: &Shim, choice: IvChoice) -> Pkcs11Vault {
    Pkcs11Vault::open(Settings { gcm: Some(choice), ..shim.settings.clone() }).unwrap()
}
