//! One message has one form, and no packet does harm.

use super::super::packet::HEAD;
use super::*;
use crate::pkcs11::Token;
use crate::statistics::{BOUNDS, Times};
use proptest::collection::vec;
use proptest::prelude::*;

fn bytes() -> impl Strategy<Value = Vec<u8>> {
    vec(any::<u8>(), 0..80)
}

fn secret() -> impl Strategy<Value = SecretBytes> {
    bytes().prop_map(SecretBytes::new)
}

fn id() -> impl Strategy<Value = Uuid> {
    any::<u128>().prop_map(Uuid::from_u128)
}

fn ids() -> impl Strategy<Value = Vec<Uuid>> {
    vec(id(), 0..6)
}

fn wrapped() -> impl Strategy<Value = Wrapped> {
    (bytes(), bytes(), bytes()).prop_map(|(iv, ciphertext, hash)| Wrapped { iv, ciphertext, hash })
}

fn sealed() -> impl Strategy<Value = Sealed> {
    (bytes(), bytes()).prop_map(|(iv, ciphertext)| Sealed { iv, ciphertext })
}

fn known() -> impl Strategy<Value = Option<Known>> {
    let known = (".{0,9}", ".{0,9}", any::<u64>(), bytes());
    proptest::option::of(known.prop_map(|(label, serial, slot, check_value)| Known {
        token: Token { label, serial, slot },
        check_value,
    }))
}

fn error() -> impl Strategy<Value = VaultError> {
    prop_oneof![
        Just(VaultError::NotFound),
        Just(VaultError::NotAuthentic),
        ".{0,9}".prop_map(VaultError::BadInput),
        Just(VaultError::Exists),
        ".{0,9}".prop_map(VaultError::Capacity),
        ".{0,9}".prop_map(VaultError::Credential),
        ".{0,9}".prop_map(VaultError::Policy),
        ".{0,9}".prop_map(|cause| VaultError::Unavailable { cause }),
        Just(VaultError::TimedOut),
        Just(VaultError::Busy),
    ]
}

fn call() -> impl Strategy<Value = Call> {
    prop_oneof![
        id().prop_map(Call::Create),
        (id(), secret()).prop_map(|(id, material)| Call::Import(id, material)),
        id().prop_map(Call::Destroy),
        (id(), bytes(), secret()).prop_map(|(id, context, dek)| Call::Wrap(id, context, dek)),
        (id(), bytes(), wrapped()).prop_map(|(id, context, it)| Call::Unwrap(id, context, it)),
        (id(), bytes(), secret()).prop_map(|(id, context, dek)| Call::WrapGcm(id, context, dek)),
        (id(), bytes(), sealed()).prop_map(|(id, context, it)| Call::UnwrapGcm(id, context, it)),
        any::<u32>().prop_map(Call::Random),
        id().prop_map(Call::MakeSigningKey),
        id().prop_map(Call::PublicHalf),
        (id(), bytes()).prop_map(|(id, data)| Call::Sign(id, data)),
        Just(Call::Versions),
        Just(Call::Incomplete),
        Just(Call::Probe),
        id().prop_map(Call::CheckValue),
        Just(Call::Statistics),
    ]
}

fn hello() -> impl Strategy<Value = Hello> {
    let token = prop_oneof![
        ".{0,9}".prop_map(TokenChoice::Label),
        ".{0,9}".prop_map(TokenChoice::Serial),
        any::<u64>().prop_map(TokenChoice::Slot),
    ];
    let gcm = prop::sample::select(vec![
        None,
        Some(IvChoice::Auto),
        Some(IvChoice::Only(IvMode::Caller)),
        Some(IvChoice::Only(IvMode::Appended)),
        Some(IvChoice::Only(IvMode::Filled)),
    ]);
    let numbers = (any::<u32>(), any::<u32>(), any::<Duration>());
    ("/.{0,9}", token, ".{0,9}", numbers, gcm, known()).prop_map(
        |(library, token, pin, (sessions, queue, deadline), gcm, known)| Hello {
            library: library.into(),
            token,
            pin: SecretText::new(pin),
            sessions,
            queue,
            deadline,
            gcm,
            known,
        },
    )
}

fn to_worker() -> impl Strategy<Value = ToWorker> {
    prop_oneof![
        hello().prop_map(|hello| ToWorker::Hello(Box::new(hello))),
        (any::<u64>(), call()).prop_map(|(number, call)| ToWorker::Call(number, call)),
        any::<u64>().prop_map(ToWorker::Cancel),
    ]
}

fn statistics() -> impl Strategy<Value = Statistics> {
    let times = || {
        (any::<[u64; BOUNDS.len() + 1]>(), any::<u64>())
            .prop_map(|(counts, nanos)| Times { counts, sum: Duration::from_nanos(nanos) })
    };
    let functions = proptest::collection::btree_map(".{0,30}", times(), 0..20);
    let codes = proptest::collection::btree_map(".{0,30}", any::<u64>(), 0..20);
    (functions, codes, times(), any::<[u64; 7]>()).prop_map(|(functions, codes, waits, rest)| {
        let [logins, reconnects, sessions, busy, most_sessions, queued, most_queued] = rest;
        Statistics {
            functions,
            codes,
            waits,
            logins,
            reconnects,
            sessions,
            busy,
            most_sessions,
            queued,
            most_queued,
        }
    })
}

fn answer() -> impl Strategy<Value = Answer> {
    prop_oneof![
        any::<()>().prop_map(|()| Answer::Done),
        wrapped().prop_map(Answer::Wrapped),
        sealed().prop_map(Answer::Sealed),
        secret().prop_map(Answer::Secret),
        (bytes(), bytes()).prop_map(|(n, e)| Answer::PublicKey(RsaPublic { n, e })),
        bytes().prop_map(Answer::Signature),
        ids().prop_map(Answer::Ids),
        any::<[u8; 16]>().prop_map(Answer::CheckValue),
        statistics().prop_map(|counted| Answer::Statistics(Box::new(counted))),
    ]
}

fn from_worker() -> impl Strategy<Value = FromWorker> {
    let result = prop_oneof![answer().prop_map(Ok), error().prop_map(Err)];
    prop_oneof![
        prop_oneof![Just(Ok(())), error().prop_map(Err)].prop_map(FromWorker::Opened),
        (any::<u64>(), ids()).prop_map(|(number, ids)| FromWorker::Part(number, ids)),
        (any::<u64>(), result).prop_map(|(number, result)| FromWorker::Answer(number, result)),
        (any::<bool>(), prop::sample::select(Circuit::ALL.to_vec()), known())
            .prop_map(|(stuck, circuit, known)| FromWorker::Pulse(Pulse { stuck, circuit, known })),
    ]
}

/// With the secrets in it, which `Debug` does not show.
fn shown(message: &ToWorker) -> String {
    let secret = match message {
        ToWorker::Call(_, Call::Import(_, secret) | Call::Wrap(_, _, secret)) => secret.as_slice(),
        ToWorker::Call(_, Call::WrapGcm(_, _, secret)) => secret.as_slice(),
        ToWorker::Hello(hello) => hello.pin.expose().as_bytes(),
        _ => &[],
    };
    format!("{message:?} {secret:?}")
}

proptest! {
    #[test]
    fn what_is_said_to_the_worker_arrives(message in to_worker()) {
        let packet = message.encode();
        let arrived = ToWorker::decode(&packet).unwrap();
        prop_assert_eq!(shown(&arrived), shown(&message));
        for len in 0..packet.len() {
            prop_assert!(ToWorker::decode(&packet[..len]).is_err(), "{len} of {}", packet.len());
        }
    }

    #[test]
    fn what_the_worker_says_arrives(message in from_worker()) {
        let packet = message.encode();
        let arrived = FromWorker::decode(&packet).unwrap();
        prop_assert_eq!(format!("{arrived:?}"), format!("{message:?}"));
        let secret = |message: &FromWorker| match message {
            FromWorker::Answer(_, Ok(Answer::Secret(secret))) => secret.as_slice().to_vec(),
            _ => Vec::new(),
        };
        prop_assert_eq!(secret(&arrived), secret(&message));
        for len in 0..packet.len() {
            prop_assert!(FromWorker::decode(&packet[..len]).is_err(), "{len} of {}", packet.len());
        }
    }

    #[test]
    fn any_bytes_are_a_message_of_that_form_or_none(packet in vec(prop_oneof![0..14u8, any::<u8>()], 0..200)) {
        if let Ok(message) = ToWorker::decode(&packet) {
            prop_assert!(*message.encode() == packet, "{message:?}");
        }
        if let Ok(message) = FromWorker::decode(&packet) {
            prop_assert!(*message.encode() == packet, "{message:?}");
        }
    }
}

#[test]
fn a_packet_that_holds_a_secret_is_never_moved_while_it_grows() {
    let context = vec![0; 100_000];
    let call = Call::Wrap(Uuid::nil(), context, SecretBytes::new(vec![1; 4096]));
    let packet = ToWorker::Call(1, call).encode();
    assert!(packet.capacity() <= HEAD + 104_096, "it has grown to {}", packet.capacity());
    assert!(packet.len() <= MAX_PACKET);
    let answer = Answer::Secret(SecretBytes::new(vec![1; 4096]));
    let packet = FromWorker::Answer(1, Ok(answer)).encode();
    assert!(packet.capacity() <= HEAD + 4096);
}

/// Whoever asked for them decides whether they are asked for again: to make a key, and to use one up a little.
#[test]
fn what_does_harm_is_not_repeated() {
    let id = Uuid::from_u128(1);
    let dek = || SecretBytes::new(vec![1; 32]);
    let once = [
        Call::Create(id),
        Call::Import(id, dek()),
        Call::Destroy(id),
        Call::WrapGcm(id, vec![], dek()),
    ];
    assert!(once.iter().all(|call| !call.may_repeat()));
    assert!([Call::Wrap(id, vec![], dek()), Call::Probe].iter().all(Call::may_repeat));
}
