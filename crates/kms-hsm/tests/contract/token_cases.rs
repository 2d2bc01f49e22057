//! What only a real token can show: how keys look from outside the vault, and its limits.

use crate::cases::pattern;
use crate::shim::Shim;
use crate::token::{LABEL, PIN, SO_PIN, TestToken, eventually, secret};
use cryptoki::mechanism::Mechanism;
use cryptoki::object::{
    Attribute, AttributeInfo, AttributeType, KeyType, ObjectClass, ObjectHandle,
};
use cryptoki::session::Session;
use kms_core::secret::SecretBytes;
use kms_hsm::pkcs11::{Pkcs11Vault, Settings, TokenChoice, init_token};
use kms_hsm::{Vault, VaultError};
use std::fmt::{Debug, Write as _};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tracing::field::Field;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata};
use uuid::Uuid;

pub(crate) async fn keys_are_as_strong_as_they_were_ordered(token: TestToken) {
    let vault = token.open();
    let (made, brought) = (Uuid::new_v4(), Uuid::new_v4());
    vault.create_version(made).await.unwrap();
    vault.import_version(brought, SecretBytes::new(vec![9; 32])).await.unwrap();
    let session = token.back_door().session();
    for id in [made, brought] {
        let flags = |kind| flags(&session, find(&session, id, kind));
        // Encrypt, Decrypt, Sign, Verify, Wrap, Unwrap, Derive, Token, Private, Sensitive,
        // Extractable, Modifiable, Copyable
        let (t, f) = (true, false);
        assert_eq!(flags(KeyType::AES), [t, t, f, f, f, f, f, t, t, t, f, f, f]);
        assert_eq!(flags(KeyType::GENERIC_SECRET), [f, f, t, t, f, f, f, t, t, t, f, f, f]);
    }
    let local = |id| read(&session, find(&session, id, KeyType::AES), AttributeType::Local);
    assert_eq!(local(made), Attribute::Local(true));
    assert_eq!(local(brought), Attribute::Local(false));
}

pub(crate) async fn pitfall_01_key_values_never_come_out(token: TestToken) {
    let vault = token.open();
    let id = Uuid::new_v4();
    vault.create_version(id).await.unwrap();
    let session = token.back_door().session();
    let thief = [
        Attribute::Token(false),
        Attribute::ValueLen(32.into()),
        Attribute::Wrap(true),
        Attribute::Encrypt(true),
    ];
    let thief = session.generate_key(&Mechanism::AesKeyGen, &thief).unwrap();
    for kind in [KeyType::AES, KeyType::GENERIC_SECRET] {
        let key = find(&session, id, kind);
        let info = session.get_attribute_info(key, &[AttributeType::Value]).unwrap();
        assert!(matches!(info[..], [AttributeInfo::Sensitive]), "{info:?}");
        assert!(session.wrap_key(&Mechanism::AesKeyWrap, thief, key).is_err());
        assert!(session.copy_object(key, &[Attribute::Extractable(true)]).is_err());
        for change in [
            Attribute::Extractable(true),
            Attribute::Sensitive(false),
            Attribute::Wrap(true),
            Attribute::Label(b"another".to_vec()),
        ] {
            assert!(session.update_attributes(key, std::slice::from_ref(&change)).is_err());
        }
    }
    assert!(vault.probe().await.is_ok());
}

pub(crate) async fn pitfall_02_keys_that_may_leave_the_token_are_reported(token: TestToken) {
    let vault = token.open();
    let (good, planted) = (Uuid::new_v4(), Uuid::new_v4());
    vault.create_version(good).await.unwrap();
    let session = token.back_door().session();
    for (mechanism, length) in [(Mechanism::AesKeyGen, 32), (Mechanism::GenericSecretKeyGen, 64)] {
        let template = [
            Attribute::Token(true),
            Attribute::Id(planted.as_bytes().to_vec()),
            Attribute::ValueLen(length.into()),
            Attribute::Sensitive(true),
            Attribute::Extractable(true),
        ];
        session.generate_key(&mechanism, &template).unwrap();
    }
    let heard = Heard::default();
    tracing::subscriber::set_global_default(heard.clone()).unwrap();
    let mut both = vec![good, planted];
    both.sort();
    assert_eq!(vault.versions().await, Ok(both));
    let said = heard.0.lock().unwrap().clone();
    assert!(said.contains(&format!("a key of CRK version {planted} leave it")), "{said}");
    assert!(!said.contains(&good.to_string()), "{said}");
}

/// What is logged, as one text.
#[derive(Clone, Default)]
struct Heard(Arc<Mutex<String>>);

impl tracing::Subscriber for Heard {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        event.record(&mut |_: &Field, value: &dyn Debug| {
            let mut text = self.0.lock().unwrap();
            let _ = writeln!(text, "{value:?}");
        });
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

pub(crate) async fn half_a_version_is_reported_and_not_used(token: TestToken) {
    let vault = token.open();
    let (whole, half) = (Uuid::new_v4(), Uuid::new_v4());
    vault.create_version(whole).await.unwrap();
    plant(&token.back_door().session(), half);
    assert_eq!(vault.versions().await, Ok(vec![whole]));
    assert_eq!(vault.incomplete().await, Ok(vec![half]));
    assert_eq!(vault.wrap(half, b"c", pattern(32)).await, Err(VaultError::NotFound));
    assert_eq!(vault.create_version(half).await, Err(VaultError::Exists));
    assert_eq!(vault.destroy_version(half).await, Ok(()));
    assert_eq!(vault.incomplete().await, Ok(vec![]));
    assert_eq!(vault.versions().await, Ok(vec![whole]));
}

/// Whoever looks changes nothing, and whoever makes does not make anew what may be in use.
pub(crate) async fn half_a_key_pair_is_left_as_it_is(token: TestToken) {
    let vault = token.open();
    let session = token.back_door().session();
    let objects = |id: Uuid, class| {
        let search = [Attribute::Class(class), Attribute::Id(id.as_bytes().to_vec())];
        session.find_objects(&search).unwrap()
    };
    let halves = [ObjectClass::PUBLIC_KEY, ObjectClass::PRIVATE_KEY];
    let [without_public, without_private] = [Uuid::new_v4(), Uuid::new_v4()];
    let mut made = Vec::new();
    for (id, lost) in [without_public, without_private].into_iter().zip(halves) {
        assert_eq!(vault.public_half(id).await, Err(VaultError::NotFound), "nothing is made");
        made.push(vault.make_signing_key(id).await.unwrap());
        session.destroy_object(objects(id, lost)[0]).unwrap();
    }
    for _ in 0..2 {
        assert_eq!(vault.public_half(without_public).await, Err(VaultError::NotFound));
        let signature = vault.sign(without_public, b"token").await.unwrap();
        assert!(made[0].verifies(b"token", &signature));
        assert!(!made[1].verifies(b"token", &signature));
        assert_eq!(vault.public_half(without_private).await.as_ref(), Ok(&made[1]));
        assert_eq!(vault.sign(without_private, b"token").await, Err(VaultError::NotFound));
        for id in [without_public, without_private] {
            assert_eq!(vault.make_signing_key(id).await, Err(VaultError::Exists));
            let left = halves.map(|half| objects(id, half).len());
            assert_eq!(left, if id == without_public { [0, 1] } else { [1, 0] });
        }
    }
}

pub(crate) async fn two_objects_of_one_name_are_refused(token: TestToken) {
    let vault = token.open();
    let (id, signing) = (Uuid::new_v4(), Uuid::new_v4());
    vault.create_version(id).await.unwrap();
    vault.make_signing_key(signing).await.unwrap();
    let session = token.back_door().session();
    plant(&session, id);
    let named = [Attribute::Token(true), Attribute::Id(signing.as_bytes().to_vec())];
    let length = [named.to_vec(), vec![Attribute::ModulusBits(2048.into())]].concat();
    session.generate_key_pair(&Mechanism::RsaPkcsKeyPairGen, &length, &named).unwrap();
    let said = |answer: Option<VaultError>, kind: &str, id: Uuid| {
        let wanted = format!("2 objects that are not one key have the name {id} ({kind})");
        let Some(VaultError::Policy(why)) = answer else { panic!("{kind}: {answer:?}") };
        assert!(why.starts_with(&wanted), "{why}");
    };
    said(vault.wrap(id, b"c", pattern(32)).await.err(), "Root", id);
    said(vault.sign(signing, b"d").await.err(), "Signing", signing);
    said(vault.public_half(signing).await.err(), "Verifying", signing);
    assert_eq!(vault.incomplete().await, Ok(vec![id]));
    assert_eq!(vault.versions().await, Ok(vec![]));
}

/// Two objects that compute alike are one key, wherever the second comes from.
pub(crate) async fn two_objects_of_one_key_are_one(token: TestToken) {
    let vault = token.open();
    let id = Uuid::new_v4();
    let put = |session: &Session, kind: KeyType, value: u8, length: usize| {
        let mac = kind == KeyType::GENERIC_SECRET;
        let template = [
            Attribute::Class(ObjectClass::SECRET_KEY),
            Attribute::KeyType(kind),
            Attribute::Token(true),
            Attribute::Id(id.as_bytes().to_vec()),
            Attribute::Sensitive(true),
            Attribute::Extractable(false),
            Attribute::Encrypt(!mac),
            Attribute::Decrypt(!mac),
            Attribute::Sign(mac),
            Attribute::Value(vec![value; length]),
        ];
        session.create_object(&template).unwrap()
    };
    let session = token.back_door().session();
    for _ in 0..3 {
        put(&session, KeyType::AES, 7, 32);
        put(&session, KeyType::GENERIC_SECRET, 8, 64);
    }
    let wrapped = vault.wrap(id, b"c", pattern(32)).await.unwrap();
    assert_eq!((vault.versions().await, vault.incomplete().await), (Ok(vec![id]), Ok(vec![])));
    // Whoever comes now has no handles yet, and ends the sessions of those before.
    let vault = token.open();
    let session = token.back_door().session();
    // One more that is another key, and nobody knows which of them was meant.
    let other = put(&session, KeyType::GENERIC_SECRET, 9, 64);
    let refused = vault.unwrap(id, b"c", wrapped.clone()).await;
    assert!(matches!(refused, Err(VaultError::Policy(_))), "{refused:?}");
    assert_eq!((vault.versions().await, vault.incomplete().await), (Ok(vec![]), Ok(vec![id])));
    session.destroy_object(other).unwrap();
    let opened = vault.unwrap(id, b"c", wrapped).await.unwrap();
    assert_eq!(opened.as_slice(), pattern(32).as_slice());
}

/// As SoftHSM does with objects that another process has made.
pub(crate) async fn an_object_that_is_shown_twice_is_one(token: TestToken) {
    let shim = Shim::before(&token);
    let (id, signing) = (Uuid::new_v4(), Uuid::new_v4());
    let vault = shim.open();
    vault.create_version(id).await.unwrap();
    let public = vault.make_signing_key(signing).await.unwrap();
    let wrapped = vault.wrap(id, b"c", pattern(32)).await.unwrap();
    let signature = vault.sign(signing, b"d").await.unwrap();
    drop(vault);
    // Whoever comes now has no handles yet.
    shim.order("objects twice");
    let vault = shim.open();
    let opened = vault.unwrap(id, b"c", wrapped).await.unwrap();
    assert_eq!(opened.as_slice(), pattern(32).as_slice());
    assert_eq!(vault.sign(signing, b"d").await, Ok(signature));
    assert_eq!(vault.public_half(signing).await.as_ref(), Ok(&public));
    assert_eq!(vault.make_signing_key(signing).await, Ok(public), "it is there already");
    let later = Uuid::new_v4();
    vault.create_version(later).await.unwrap();
    let mut both = vec![id, later];
    both.sort();
    assert_eq!((vault.versions().await, vault.incomplete().await), (Ok(both), Ok(vec![])));
    assert_eq!(vault.destroy_version(id).await, Ok(()));
    assert_eq!(vault.versions().await, Ok(vec![later]));
}

pub(crate) async fn an_existing_token_is_not_initialised_again(token: TestToken) {
    let again = init_token(&token.library, LABEL, &secret(SO_PIN), &secret(PIN));
    assert_eq!(again, Err(VaultError::Exists));
    let other = init_token(&token.library, "another", &secret(SO_PIN), &secret(PIN)).unwrap();
    assert_eq!(other.label, "another");
    assert_ne!(other.serial, token.identity.serial);
    for label in [String::new(), "x".repeat(33)] {
        let refused = init_token(&token.library, &label, &secret(SO_PIN), &secret(PIN));
        assert!(matches!(refused, Err(VaultError::BadInput(_))));
    }
    assert_eq!(token.open().probe().await, Ok(()));
}

pub(crate) async fn a_token_is_found_by_label_serial_and_slot(token: TestToken) {
    let known = token.open().token().unwrap();
    assert_eq!(known.serial, token.identity.serial);
    for choice in [
        TokenChoice::Label(LABEL.to_owned()),
        TokenChoice::Serial(known.serial.clone()),
        TokenChoice::Slot(known.slot),
    ] {
        let settings = Settings { token: choice, ..token.settings() };
        let vault = Pkcs11Vault::open(settings).unwrap();
        assert_eq!(vault.token(), Some(known.clone()));
        assert_eq!(vault.probe().await, Ok(()));
    }
    let choice = TokenChoice::Label("absent".to_owned());
    let vault = Pkcs11Vault::open(Settings { token: choice, ..token.settings() }).unwrap();
    let cause = "no token with label \"absent\"".to_owned();
    assert_eq!(vault.probe().await, Err(VaultError::Unavailable { cause }));
    assert_eq!(vault.token(), None);
}

pub(crate) async fn settings_that_cannot_work_are_refused(token: TestToken) {
    let absent = Settings { library: PathBuf::from("/absent.so"), ..token.settings() };
    let Err(VaultError::Unavailable { cause }) = Pkcs11Vault::open(absent) else {
        panic!("a library that is not there was loaded")
    };
    assert!(cause.starts_with("/absent.so: "), "{cause}");
    for settings in
        [Settings { sessions: 0, ..token.settings() }, Settings { queue: 0, ..token.settings() }]
    {
        assert!(matches!(Pkcs11Vault::open(settings), Err(VaultError::BadInput(_))));
    }
}

pub(crate) async fn a_full_queue_says_busy(token: TestToken) {
    let settings = Settings { sessions: 1, queue: 2, ..token.settings() };
    let vault = Pkcs11Vault::open(settings).unwrap();
    let id = Uuid::new_v4();
    vault.create_version(id).await.unwrap();
    // An RSA key pair keeps the only session busy for longer than it takes to ask 64 times, unless the machine stands
    // still meanwhile.
    let mut most = 0;
    for _ in 0..10 {
        let slow = vault.make_signing_key(Uuid::new_v4());
        let asks = (0..64).map(|_| vault.wrap(id, b"c", pattern(32)));
        let answers = async {
            let mut asked = Vec::new();
            for ask in asks {
                asked.push(Box::pin(ask));
            }
            poll_all(asked).await
        };
        let (slow, answers) = tokio::join!(biased; slow, answers);
        assert!(slow.is_ok());
        let busy = answers.iter().filter(|answer| **answer == Err(VaultError::Busy)).count();
        let served = answers.iter().filter(|answer| answer.is_ok()).count();
        assert_eq!(busy + served, 64, "{answers:?}");
        assert!(served >= 1, "nobody was served");
        most = most.max(busy);
        if most >= 61 {
            break;
        }
    }
    assert!(most >= 61, "only {most} were refused");
}

pub(crate) async fn a_call_that_does_not_return_is_not_waited_for(token: TestToken) {
    // Making an RSA key pair stands for the call that hangs.
    let hasty = Settings { sessions: 1, deadline: Duration::from_millis(2), ..token.settings() };
    let vault = Pkcs11Vault::open(hasty).unwrap();
    eventually("the only session is stuck and the vault says so at once", async || {
        let late = vault.make_signing_key(Uuid::new_v4()).await;
        let next = vault.random(16).await.map(|_| ());
        let cause = "no call into the PKCS#11 library returns".to_owned();
        late == Err(VaultError::TimedOut) && next == Err(VaultError::Unavailable { cause })
    })
    .await;
    eventually("the call has returned", async || vault.random(16).await.is_ok()).await;
}

pub(crate) async fn a_creation_that_nobody_waits_for_leaves_nothing(token: TestToken) {
    let vault = Pkcs11Vault::open(Settings { sessions: 1, ..token.settings() }).unwrap();
    let mut made = Vec::new();
    for millis in 0..20 {
        let id = Uuid::new_v4();
        let creation = vault.create_version(id);
        if tokio::time::timeout(Duration::from_millis(millis), creation).await.is_ok() {
            made.push(id);
        }
    }
    made.sort();
    // One session: this list is read after whatever was begun has ended.
    assert_eq!(vault.versions().await, Ok(made));
    assert_eq!(vault.incomplete().await, Ok(vec![]));
}

/// What a crash between the two objects leaves.
fn plant(session: &Session, id: Uuid) {
    let template = [
        Attribute::Token(true),
        Attribute::Id(id.as_bytes().to_vec()),
        Attribute::ValueLen(32.into()),
        Attribute::Encrypt(true),
    ];
    session.generate_key(&Mechanism::AesKeyGen, &template).unwrap();
}

fn find(session: &Session, id: Uuid, kind: KeyType) -> ObjectHandle {
    let search = [
        Attribute::Class(ObjectClass::SECRET_KEY),
        Attribute::KeyType(kind),
        Attribute::Id(id.as_bytes().to_vec()),
    ];
    let found = session.find_objects(&search).unwrap();
    assert_eq!(found.len(), 1);
    found[0]
}

fn read(session: &Session, key: ObjectHandle, kind: AttributeType) -> Attribute {
    session.get_attributes(key, &[kind]).unwrap().remove(0)
}

fn flags(session: &Session, key: ObjectHandle) -> [bool; 13] {
    [
        AttributeType::Encrypt,
        AttributeType::Decrypt,
        AttributeType::Sign,
        AttributeType::Verify,
        AttributeType::Wrap,
        AttributeType::Unwrap,
        AttributeType::Derive,
        AttributeType::Token,
        AttributeType::Private,
        AttributeType::Sensitive,
        AttributeType::Extractable,
        AttributeType::Modifiable,
        AttributeType::Copyable,
    ]
    .map(|kind| match read(session, key, kind) {
        Attribute::Encrypt(flag)
        | Attribute::Decrypt(flag)
        | Attribute::Sign(flag)
        | Attribute::Verify(flag)
        | Attribute::Wrap(flag)
        | Attribute::Unwrap(flag)
        | Attribute::Derive(flag)
        | Attribute::Token(flag)
        | Attribute::Private(flag)
        | Attribute::Sensitive(flag)
        | Attribute::Extractable(flag)
        | Attribute::Modifiable(flag)
        | Attribute::Copyable(flag) => flag,
        other => panic!("{other:?}"),
    })
}

/// Polls every future once before it waits for any.
async fn poll_all<F: Future + Unpin>(mut futures: Vec<F>) -> Vec<F::Output> {
    let mut outputs: Vec<Option<F::Output>> = futures.iter().map(|_| None).collect();
    std::future::poll_fn(|context| {
        let mut waiting = false;
        for (future, output) in futures.iter_mut().zip(&mut outputs) {
            if output.is_some() {
                continue;
            }
            match std::pin::Pin::new(future).poll(context) {
                std::task::Poll::Ready(value) => *output = Some(value),
                std::task::Poll::Pending => waiting = true,
            }
        }
        if waiting { std::task::Poll::Pending } else { std::task::Poll::Ready(()) }
    })
    .await;
    outputs.into_iter().flatten().collect()
}
