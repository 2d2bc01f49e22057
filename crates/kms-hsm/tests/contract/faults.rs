//! What the HSM layer promises for bad days, with the fault-injecting module between vault and token.

use crate::cases::pattern;
use crate::isolated;
use crate::shim::{Shim, attempts_within, long_run, take_at_most, timed};
use crate::token::{LABEL, PIN, SO_PIN, TestToken, eventually, secret};
use kms_core::secret::SecretBytes;
use kms_hsm::pkcs11::{Pin, Pkcs11Vault, Settings, init_token};
use kms_hsm::{Circuit, Vault, VaultError};
use pkcs11_shim::Function;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;
use uuid::Uuid;

/// Two hundred requests a second while every session dies five times: none fails, none takes a second.
pub(crate) async fn sessions_that_die_under_load_fail_no_request(token: TestToken) {
    let shim = Shim::before(&token);
    let vault = Arc::new(shim.open());
    let id = Uuid::new_v4();
    vault.create_version(id).await.unwrap();
    take_at_most([Duration::from_secs(1)], "the longest request", async || {
        let logins = shim.logins();
        let longest = under_load(&vault, id, || shim.order("sessions die")).await;
        assert_eq!(shim.logins(), logins + 5, "one login for each loss");
        [longest]
    })
    .await;
}

/// A thousand requests, of which none may fail, and five times `harm` among them. How long the longest took.
async fn under_load(vault: &Arc<Pkcs11Vault>, id: Uuid, harm: impl Fn()) -> Duration {
    let mut beat = tokio::time::interval(Duration::from_millis(5));
    // A machine that stood still is not flooded with what it has missed.
    beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut requests = JoinSet::new();
    let mut longest = Duration::ZERO;
    let mut note = |request: Result<(Result<SecretBytes, VaultError>, Duration), _>| {
        let (answer, took) = request.unwrap();
        assert_eq!(answer.unwrap().as_slice(), pattern(32).as_slice());
        longest = longest.max(took);
    };
    for number in 0..1000 {
        beat.tick().await;
        while requests.len() >= 100 {
            note(requests.join_next().await.unwrap());
        }
        if number % 200 == 100 {
            harm();
        }
        let vault = vault.clone();
        requests.spawn(async move {
            timed(async move {
                let wrapped = vault.wrap(id, b"c", pattern(32)).await?;
                vault.unwrap(id, b"c", wrapped).await
            })
            .await
        });
    }
    while let Some(request) = requests.join_next().await {
        note(request);
    }
    longest
}

/// While the token is gone every answer comes at once, and logins are not tried against a token that is not there.
pub(crate) async fn a_token_that_is_gone_is_said_at_once_and_found_again(token: TestToken) {
    let shim = Shim::before(&token);
    let vault = shim.open();
    let id = Uuid::new_v4();
    vault.create_version(id).await.unwrap();
    let away = Duration::from_secs(if long_run() { 30 } else { 3 });
    let bounds = [Duration::from_millis(250), Duration::from_secs(2)];
    take_at_most(bounds, "the longest refusal, and until it is found again", async || {
        let logins = shim.logins();
        shim.order("token gone");
        let (start, mut longest) = (tokio::time::Instant::now(), Duration::ZERO);
        while start.elapsed() < away {
            let (answer, took) = timed(vault.wrap(id, b"c", pattern(32))).await;
            assert!(matches!(answer, Err(VaultError::Unavailable { .. })), "{answer:?}");
            longest = longest.max(took);
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(shim.logins(), logins);
        shim.order("");
        let back = async {
            while vault.wrap(id, b"c", pattern(32)).await.is_err() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        let ((), found) = timed(back).await;
        assert_eq!(shim.logins(), logins + 1);
        [longest, found]
    })
    .await;
}

/// A vault opens without its token, names the cause, and serves when the token comes.
pub(crate) async fn a_vault_opens_while_its_token_is_away(token: TestToken) {
    let shim = Shim::before(&token);
    shim.order("token gone");
    let (vault, took) = timed(async { shim.open() }).await;
    assert!(took <= Duration::from_secs(5), "it opened after {took:?}");
    assert_eq!(vault.token(), None);
    let Err(VaultError::Unavailable { cause }) = vault.probe().await else {
        panic!("a token that is away answered")
    };
    assert_eq!(cause, format!("no token with label \"{LABEL}\""));
    shim.order("");
    eventually("the token is found", async || vault.probe().await.is_ok()).await;
    assert_eq!(vault.token().unwrap().serial, token.identity.serial);
    assert_eq!(shim.logins(), 1);
}

/// A token that lets nobody in is asked with pauses that grow: 0.1, 0.2, 0.4, 0.8, then every second.
pub(crate) async fn logins_that_fail_are_tried_with_pauses(token: TestToken) {
    let shim = Shim::before(&token);
    let vault = shim.open();
    let logins = shim.logins();
    shim.order("sessions die\nfail C_Login CKR_DEVICE_ERROR");
    let start = tokio::time::Instant::now();
    while start.elapsed() < Duration::from_secs(3) {
        assert!(matches!(vault.probe().await, Err(VaultError::Unavailable { .. })));
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let tried = shim.logins() - logins;
    let most = attempts_within(start.elapsed());
    assert!((3..=most).contains(&tried), "{tried} logins in {:?}", start.elapsed());
    shim.order("");
    eventually("it is let in again", async || vault.probe().await.is_ok()).await;
}

pub(crate) async fn a_refused_pin_is_tried_once_and_never_again(token: TestToken) {
    let shim = Shim::before(&token);
    let wrong = Settings { pin: Pin::new(secret("not the pin")), ..shim.settings.clone() };
    let refused = Pkcs11Vault::open(wrong).unwrap();
    assert!(matches!(refused.probe().await, Err(VaultError::Credential(_))));
    drop(refused);
    assert_eq!(shim.logins(), 1);
    let vault = shim.open();
    shim.order("sessions die\nfail C_Login CKR_PIN_INCORRECT");
    for _ in 0..200 {
        assert!(matches!(vault.probe().await, Err(VaultError::Credential(_))));
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(shim.logins(), 3, "one wrong, one right, one refused");
}

/// Each vault is what another process would open, in this process or with a worker.
pub(crate) async fn a_refused_pin_is_tried_once_over_many_processes(token: TestToken) {
    let shim = Shim::before(&token);
    let file = token.home.join("refused-pin");
    let pin = |text| Pin::remembered(secret(text), file.clone(), LABEL.to_owned());
    let with = |pin: &Pin| Settings { pin: pin.clone(), ..shim.settings.clone() };
    let refused = async |vault: &dyn Vault| {
        let answer = vault.probe().await;
        assert!(matches!(answer, Err(VaultError::Credential(_))), "{answer:?}");
    };
    for round in 1..=2 {
        for _ in 0..3 {
            refused(&isolated::open(with(&pin("not the pin")))).await;
            refused(&Pkcs11Vault::open(with(&pin("not the pin"))).unwrap()).await;
        }
        assert_eq!(shim.logins(), round, "once, however often it starts");
        // The operator wants it tried once more.
        std::fs::remove_file(&file).unwrap();
    }
    let corrected = async |vault: &dyn Vault, pin: &Pin| {
        refused(vault).await;
        assert!(file.exists());
        assert!(pin.replace(secret(PIN)));
        eventually("another PIN is taken over", async || vault.probe().await.is_ok()).await;
        eventually("what was refused is forgotten", async || !file.exists()).await;
    };
    let wrong = pin("not the pin");
    corrected(&isolated::open(with(&wrong)), &wrong).await;
    let wrong = pin("not the pin");
    corrected(&Pkcs11Vault::open(with(&wrong)).unwrap(), &wrong).await;
    assert_eq!(shim.logins(), 6, "two before, and in each vault a wrong one and the right one");
}

/// A call that hangs is left behind at the deadline; the others are told at once, and served when it returns.
pub(crate) async fn a_call_that_hangs_holds_nobody(token: TestToken) {
    let shim = Shim::before(&token);
    // What does not hang is well within it on any machine.
    let deadline = Duration::from_secs(2);
    let vault = Pkcs11Vault::open(Settings { deadline, ..shim.settings.clone() }).unwrap();
    let id = Uuid::new_v4();
    vault.create_version(id).await.unwrap();
    let wrapped = vault.wrap(id, b"c", pattern(32)).await.unwrap();
    shim.order("hang C_Encrypt");
    let three = async { tokio::join!(wrap(&vault, id), wrap(&vault, id), wrap(&vault, id)) };
    let (answers, took) = timed(three).await;
    assert_eq!(
        answers,
        (Err(VaultError::TimedOut), Err(VaultError::TimedOut), Err(VaultError::TimedOut))
    );
    assert!(took < 2 * deadline, "they waited {took:?}, each for itself and not one for the other");
    take_at_most([Duration::from_millis(100)], "to be told", async || {
        let (answer, took) = timed(vault.unwrap(id, b"c", wrapped.clone())).await;
        assert!(matches!(answer, Err(VaultError::Unavailable { .. })), "{answer:?}");
        [took]
    })
    .await;
    shim.order("");
    eventually("the calls have returned", async || wrap(&vault, id).await.is_ok()).await;
    assert!(vault.unwrap(id, b"c", wrapped).await.is_ok());
}

/// Failures of every kind among good requests: the sessions are never more than allowed, and none is lost.
pub(crate) async fn sessions_never_leak(token: TestToken) {
    let shim = Shim::before(&token);
    // The token grants two of the three sessions in the settings.
    shim.order("sessions at-most 2");
    let vault = Arc::new(shim.open());
    let id = Uuid::new_v4();
    vault.create_version(id).await.unwrap();
    assert_eq!(shim.counts.open_sessions(), 2);
    let rounds = if long_run() { 10_000 } else { 160 };
    let codes = ["CKR_SESSION_CLOSED", "CKR_DEVICE_ERROR", "CKR_GENERAL_ERROR", "CKR_HOST_MEMORY"];
    let functions = ["C_EncryptInit", "C_Encrypt", "C_SignInit", "C_Sign"];
    let mut failed = 0;
    for round in 0..rounds {
        let (code, function) = (codes[round % 4], functions[round / 4 % 4]);
        // A session that does not close when it is given up is gone all the same.
        shim.order(&format!(
            "sessions at-most 2\nfail {function} {code} after=3 times=1\nfail C_CloseSession {code} times=1"
        ));
        for _ in 0..10 {
            failed += usize::from(vault.wrap(id, b"c", pattern(32)).await.is_err());
        }
    }
    // A lost session or device is repaired. The two other codes are the answer, once a canary has sung.
    assert_eq!(failed, rounds / 2, "of {rounds} injected errors");
    shim.order("sessions at-most 2");
    eventually("all is well", async || vault.probe().await.is_ok()).await;
    assert_eq!(shim.counts.open_sessions(), 2);
    assert_eq!(shim.counts.most_sessions(), 2);
    drop(vault);
    assert_eq!(shim.counts.open_sessions(), 0);
}

/// A flood of wrapped keys that nobody made: no session is given up, the breaker stays closed, and good requests go on.
///
/// Up to 1,000 bad and 200 good unwraps a second (fewer on a machine that would be busy with them all the time), in turns
/// with the good ones alone. Other work on the machine only ever slows a turn down, so the best turns of either kind are
/// compared: a harm that the flood does is in all of them.
pub(crate) async fn pitfall_19_a_flood_of_bad_unwraps_harms_nobody(token: TestToken) {
    let shim = Shim::before(&token);
    let vault = Arc::new(shim.open());
    let id = Uuid::new_v4();
    vault.create_version(id).await.unwrap();
    let good = vault.wrap(id, b"c", pattern(32)).await.unwrap();
    let mut bad = good.clone();
    bad.hash[0] ^= 1;
    let round = async |flood: usize| {
        let mut requests = JoinSet::new();
        for (wrapped, wanted) in
            std::iter::repeat_n((&bad, false), flood).chain(std::iter::repeat_n((&good, true), 2))
        {
            let (vault, wrapped) = (vault.clone(), wrapped.clone());
            requests.spawn(async move {
                let answer = vault.unwrap(id, b"c", wrapped).await.map(|_| ());
                assert_eq!(answer, if wanted { Ok(()) } else { Err(VaultError::NotAuthentic) });
            });
        }
        requests.join_all().await;
        assert_eq!(vault.circuit(), Circuit::Closed);
    };
    let mut busy = Duration::MAX;
    for _ in 0..25 {
        busy = busy.min(timed(round(10)).await.1);
    }
    let turn = async |flood: usize| {
        let mut beat = tokio::time::interval(Duration::from_millis(10).max(4 * busy));
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let rounds = async {
            for _ in 0..25 {
                beat.tick().await;
                round(flood).await;
            }
        };
        timed(rounds).await.1
    };
    let (sessions, before) = (shim.counts.of(Function::C_OpenSession), shim.counts.all());
    let (mut alone, mut beside) = (Duration::MAX, Duration::MAX);
    for _ in 0..if long_run() { 120 } else { 12 } {
        alone = alone.min(turn(0).await);
        beside = beside.min(turn(10).await);
    }
    eprintln!("25 rounds of two good unwraps: {alone:?} alone, {beside:?} beside 250 bad ones");
    assert!(
        alone.as_secs_f64() >= 0.9 * beside.as_secs_f64(),
        "{alone:?} alone, {beside:?} beside"
    );
    let called = shim.counts.since(&before);
    assert!(called.iter().all(|(function, _)| HOT.contains(function)), "{called:?}");
    assert_eq!(shim.counts.of(Function::C_OpenSession), sessions, "a session was given up");
    assert_eq!(shim.counts.open_sessions(), 3);
}

/// Codes that vendors use for bad data and for dead devices alike: the canary tells which.
pub(crate) async fn a_canary_tells_bad_data_from_a_dead_device(token: TestToken) {
    let shim = Shim::before(&token);
    let vault = shim.open();
    let id = Uuid::new_v4();
    vault.create_version(id).await.unwrap();
    let opened = || shim.counts.of(Function::C_OpenSession);
    for code in ["CKR_GENERAL_ERROR", "CKR_FUNCTION_FAILED", "0x80000401"] {
        let before = opened();
        shim.order(&format!("fail C_Encrypt {code} times=1"));
        assert!(matches!(wrap(&vault, id).await, Err(VaultError::BadInput(_))), "{code}");
        assert_eq!(opened(), before, "{code}: a session was given up");
        shim.order(&format!("fail C_Encrypt {code} times=2"));
        assert_eq!(wrap(&vault, id).await, Ok(()), "{code}: the device was lost, and found again");
        assert_eq!(opened(), before + 3, "{code}");
    }
}

/// A wrap is four calls and an unwrap as many, and none of them looks for a key, a session or a login; each session
/// gets the IVs of 64 wraps in one call more.
pub(crate) async fn a_steady_use_takes_few_calls(token: TestToken) {
    let shim = Shim::before(&token);
    let vault = shim.open();
    let mut ids = Vec::new();
    for _ in 0..if long_run() { 5000 } else { 20 } {
        let id = Uuid::new_v4();
        vault.create_version(id).await.unwrap();
        vault.wrap(id, b"c", pattern(32)).await.unwrap();
        ids.push(id);
    }
    for ids in [&ids[..1], &ids[..]] {
        let (uses, before) = (ids.len() as u64, shim.counts.all());
        let mut kept = Vec::new();
        for id in ids {
            kept.push(vault.wrap(*id, b"c", pattern(32)).await.unwrap());
        }
        use Function as F;
        let wrap = [F::C_EncryptInit, F::C_Encrypt, F::C_SignInit, F::C_Sign];
        let (random, others): (Vec<_>, Vec<_>) = shim
            .counts
            .since(&before)
            .into_iter()
            .partition(|(function, _)| *function == F::C_GenerateRandom);
        assert_eq!(others, wrap.map(|function| (function, uses)));
        let random: u64 = random.into_iter().map(|(_, times)| times).sum();
        assert!(random <= uses / 64 + shim.counts.open_sessions(), "{random} for {uses} wraps");
        let before = shim.counts.all();
        for (id, wrapped) in ids.iter().zip(kept) {
            vault.unwrap(*id, b"c", wrapped).await.unwrap();
        }
        let unwrap = [F::C_DecryptInit, F::C_Decrypt, F::C_SignInit, F::C_Sign];
        assert_eq!(shim.counts.since(&before), unwrap.map(|function| (function, uses)));
    }
}

/// A token that says of any attribute something else than was ordered gets no root key, and keeps none.
pub(crate) async fn a_token_that_lies_about_a_key_keeps_none(token: TestToken) {
    let shim = Shim::before(&token);
    let vault = shim.open();
    // The numbers of the standard: private, sensitive, encrypt, decrypt, wrap, unwrap, sign, verify, derive, extractable,
    // local, never extractable, always sensitive, modifiable, copyable.
    let (t, f) = ("01", "00");
    for (attribute, lies) in [
        (0x2, [f, f]),
        (0x103, [f, f]),
        (0x104, [t, f]),
        (0x105, [t, f]),
        (0x106, [t, t]),
        (0x107, [t, t]),
        (0x108, [t, f]),
        (0x10a, [t, f]),
        (0x10c, [t, t]),
        (0x162, [t, t]),
        (0x163, [f, f]),
        (0x164, [f, f]),
        (0x165, [f, f]),
        (0x170, [t, t]),
        (0x171, [t, t]),
        (0x1, [f, f]),
    ] {
        for lie in lies {
            shim.order(&format!("attribute 0x{attribute:x} {lie}"));
            let id = Uuid::new_v4();
            let made = vault.create_version(id).await;
            assert!(matches!(made, Err(VaultError::Policy(_))), "0x{attribute:x} {lie}: {made:?}");
        }
    }
    // A value that can be read is no secret.
    shim.order(&format!("attribute 0x11 {}", "00".repeat(32)));
    let made = vault.create_version(Uuid::new_v4()).await;
    assert!(matches!(made, Err(VaultError::Policy(_))), "{made:?}");
    shim.order("");
    assert_eq!(vault.versions().await, Ok(vec![]));
    assert_eq!(vault.incomplete().await, Ok(vec![]));
}

/// A key that was made although the answer was lost is not made twice, and does not stay.
pub(crate) async fn a_lost_answer_makes_no_second_key(token: TestToken) {
    let shim = Shim::before(&token);
    let vault = shim.open();
    for after in [0, 1] {
        let id = Uuid::new_v4();
        shim.order(&format!("fail C_GenerateKey CKR_DEVICE_ERROR late after={after} times=1"));
        assert_eq!(vault.create_version(id).await, Ok(()));
        assert_eq!(wrap(&vault, id).await, Ok(()));
        let id = Uuid::new_v4();
        shim.order(&format!("fail C_GenerateKey CKR_DEVICE_MEMORY late after={after} times=1"));
        assert!(matches!(vault.create_version(id).await, Err(VaultError::Capacity(_))));
        assert_eq!(wrap(&vault, id).await, Err(VaultError::NotFound));
    }
    assert_eq!(vault.versions().await.unwrap().len(), 2);
    assert_eq!(vault.incomplete().await, Ok(vec![]));
}

/// A token that shows the serial number of ours, and a canary key of its own.
pub(crate) async fn a_copy_with_other_keys_is_refused(token: TestToken) {
    let shim = Shim::before(&token);
    shim.order("token serial 4711");
    let vault = shim.open();
    assert_eq!(vault.token().unwrap().serial, "4711");
    token.back_door().context.finalize().unwrap();
    token.remove();
    init_token(&token.library, LABEL, &secret(SO_PIN), &secret(PIN)).unwrap();
    // Opened once by another vault, it has a canary.
    assert_eq!(token.open().probe().await, Ok(()));
    let Err(VaultError::Unavailable { cause }) = vault.probe().await else {
        panic!("a token with other keys was taken for ours")
    };
    assert!(cause.contains("holds another canary key than before"), "{cause}");
}

/// The functions that a use of a known key may call.
const HOT: [Function; 7] = [
    Function::C_EncryptInit,
    Function::C_Encrypt,
    Function::C_DecryptInit,
    Function::C_Decrypt,
    Function::C_SignInit,
    Function::C_Sign,
    Function::C_GenerateRandom,
];

async fn wrap(vault: &Pkcs11Vault, id: Uuid) -> Result<(), VaultError> {
    vault.wrap(id, b"c", pattern(32)).await.map(|_| ())
}
