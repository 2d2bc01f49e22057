//! Sessions, logins and tokens that are lost while the vault is in use.

use crate::cases::pattern;
use crate::token::{BackDoor, LABEL, PIN, SO_PIN, TestToken, eventually, secret};
use cryptoki::object::Attribute;
use cryptoki::types::AuthPin;
use kms_hsm::pkcs11::{Pkcs11Vault, Settings, init_token};
use kms_hsm::{Vault, VaultError};
use std::sync::Arc;
use tokio::task::JoinSet;
use uuid::Uuid;

pub(crate) async fn closed_sessions_fail_no_request(token: TestToken) {
    after_each_wave(&token, BackDoor::close_all_sessions).await;
}

pub(crate) async fn a_logout_behind_our_back_fails_no_request(token: TestToken) {
    after_each_wave(&token, |door| {
        door.session().logout().unwrap();
    })
    .await;
}

pub(crate) async fn a_finalised_library_is_initialised_again(token: TestToken) {
    let vault = token.open();
    let id = Uuid::new_v4();
    vault.create_version(id).await.unwrap();
    let wrapped = vault.wrap(id, b"c", pattern(32)).await.unwrap();
    token.back_door().context.finalize().unwrap();
    // Not one request is lost: the first finds out, and is served after the repair.
    assert!(vault.unwrap(id, b"c", wrapped).await.is_ok());
    assert!(vault.create_version(Uuid::new_v4()).await.is_ok());
}

pub(crate) async fn a_token_that_goes_and_returns_is_served_again(token: TestToken) {
    let vault = token.open();
    let id = Uuid::new_v4();
    vault.create_version(id).await.unwrap();
    let wrapped = vault.wrap(id, b"c", pattern(32)).await.unwrap();
    let door = token.back_door();
    token.unplug();
    door.context.finalize().unwrap();

    let gone = vault.unwrap(id, b"c", wrapped.clone()).await.unwrap_err();
    let cause = format!("no token with label \"{LABEL}\"");
    assert_eq!(gone, VaultError::Unavailable { cause });
    // While it is away, answers come from memory.
    for _ in 0..1000 {
        assert!(matches!(vault.probe().await, Err(VaultError::Unavailable { .. })));
    }

    token.plug_in();
    eventually("the token is served again", async || vault.probe().await.is_ok()).await;
    assert!(vault.unwrap(id, b"c", wrapped).await.is_ok());
}

pub(crate) async fn a_token_whose_files_vanish_says_unavailable_not_absent(token: TestToken) {
    let vault = token.open();
    let id = Uuid::new_v4();
    vault.create_version(id).await.unwrap();
    let wrapped = vault.wrap(id, b"c", pattern(32)).await.unwrap();
    // SoftHSM notices nothing: its sessions live on, over a token without objects. Kryoptic's fail.
    token.vanish();
    let lost = |answer: Result<(), VaultError>| {
        assert!(matches!(answer, Err(VaultError::Unavailable { .. })), "{answer:?}");
    };
    lost(vault.unwrap(id, b"c", wrapped.clone()).await.map(|_| ()));
    lost(vault.versions().await.map(|_| ()));
    lost(vault.create_version(Uuid::new_v4()).await);
    lost(vault.destroy_version(id).await);
    lost(vault.probe().await);
    token.reappear();
    eventually("the token is served again", async || vault.probe().await.is_ok()).await;
    assert!(vault.unwrap(id, b"c", wrapped).await.is_ok());
}

pub(crate) async fn pitfall_21_another_token_in_its_place_is_refused(token: TestToken) {
    let vault = token.open();
    assert_eq!(vault.probe().await, Ok(()));
    token.back_door().context.finalize().unwrap();
    token.remove();
    let clone = init_token(&token.library, LABEL, &secret(SO_PIN), &secret(PIN)).unwrap();

    let Err(VaultError::Unavailable { cause }) = vault.probe().await else {
        panic!("a token with other keys was taken for ours")
    };
    let (now, before) = (clone.serial, token.identity.serial);
    assert_eq!(cause, format!("token {now} is in the place of token {before}"));
}

pub(crate) async fn a_wrong_pin_is_tried_once(token: TestToken) {
    let wrong = Settings { pin: secret("not the pin").into(), ..token.settings() };
    let refused = Pkcs11Vault::open(wrong).unwrap();
    let cause = VaultError::Credential("C_Login: CKR_PIN_INCORRECT".to_owned());
    assert_eq!(refused.probe().await, Err(cause));
    drop(refused);
    assert_eq!(token.open().probe().await, Ok(()));
}

pub(crate) async fn a_pin_that_was_changed_stops_the_vault_until_it_hears_the_new_one(
    token: TestToken,
) {
    let settings = token.settings();
    let known = settings.pin.clone();
    let vault = Pkcs11Vault::open(settings).unwrap();
    assert_eq!(vault.probe().await, Ok(()));
    let door = token.back_door();
    let pin = |text: &str| AuthPin::new(text.into());
    door.session().set_pin(&pin(PIN), &pin("another pin")).unwrap();
    assert_eq!(vault.probe().await, Ok(()), "the login still holds");
    door.close_all_sessions();
    for _ in 0..100 {
        assert!(matches!(vault.probe().await, Err(VaultError::Credential(_))));
    }
    assert!(!known.replace(secret(PIN)), "the refused one is not tried again");
    assert!(matches!(vault.probe().await, Err(VaultError::Credential(_))));
    assert!(known.replace(secret("another pin")));
    eventually("the other PIN opens the token", async || vault.probe().await.is_ok()).await;
}

pub(crate) async fn a_key_destroyed_elsewhere_is_not_found(token: TestToken) {
    let vault = token.open();
    let id = Uuid::new_v4();
    vault.create_version(id).await.unwrap();
    assert!(vault.wrap(id, b"c", pattern(32)).await.is_ok(), "its handles are known now");
    let session = token.back_door().session();
    for object in session.find_objects(&[Attribute::Id(id.as_bytes().to_vec())]).unwrap() {
        session.destroy_object(object).unwrap();
    }
    assert_eq!(vault.wrap(id, b"c", pattern(32)).await, Err(VaultError::NotFound));
    assert_eq!(vault.probe().await, Ok(()));
}

/// Sixteen callers ask at once, again and again; before each wave `harm` is done. None may fail.
///
/// Between the waves and not within, because SoftHSM itself crashes when a session is closed under
/// a running call.
async fn after_each_wave(token: &TestToken, harm: impl Fn(&BackDoor)) {
    let vault = Arc::new(token.open());
    let id = Uuid::new_v4();
    vault.create_version(id).await.unwrap();
    let kept = vault.wrap(id, b"c", pattern(32)).await.unwrap();
    let door = token.back_door();
    for _ in 0..50 {
        harm(&door);
        let mut wave = JoinSet::new();
        for _ in 0..16 {
            let (vault, kept) = (vault.clone(), kept.clone());
            wave.spawn(async move {
                let opened = vault.unwrap(id, b"c", kept).await.unwrap();
                assert_eq!(opened.as_slice(), pattern(32).as_slice());
                vault.wrap(id, b"c", opened).await.unwrap();
            });
        }
        while let Some(caller) = wave.join_next().await {
            caller.unwrap();
        }
    }
    door.close_all_sessions();
    assert!(vault.create_version(Uuid::new_v4()).await.is_ok());
}
