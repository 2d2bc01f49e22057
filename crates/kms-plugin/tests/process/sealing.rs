//! Both APIs over the real socket, what the log shows of them, and how failures of the key service read.

use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use kms_api::grpc::v2::EncryptRequest;
use kms_api::grpc::v2::key_management_service_client::KeyManagementServiceClient as V2;
use tokio::time::Instant;
use tonic::Request;

use crate::plugin::{Plugin, Setup};
use crate::service::{Service, TOKEN};

const API_KEY: &str = "canary-api-key-93ab";
const PAYLOAD: &[u8; 32] = b"canary-payload-of-32-bytes-here!";

async fn use_everything(plugin: &Plugin) {
    let cipher = plugin.encrypt_v1(PAYLOAD).await.unwrap();
    assert_eq!(plugin.decrypt_v1(&cipher).await.unwrap(), PAYLOAD);
    let sealed = plugin.encrypt_v2(PAYLOAD).await.unwrap();
    assert_eq!(plugin.decrypt_v2(&sealed).await.unwrap(), PAYLOAD);
    let status = plugin.status().await.unwrap();
    assert_eq!((&*status.version, &*status.healthz), ("v2", "ok"));
    assert_eq!(status.key_id, sealed.key_id);
    let mut forged = sealed;
    forged.key_id.push('9');
    assert!(plugin.decrypt_v2(&forged).await.is_err());
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn case_28_no_secret_is_ever_logged_whatever_is_set() {
    let service = Service::start(API_KEY).await;
    let setup = Setup::for_service(&service)
        .with("LOG_LEVEL", "debug")
        .with("LOG_ALL_VALUES", "true")
        .with("CACHE_TIMEOUT_IN_HOURS", "0");
    let mut plugin = setup.ready();
    use_everything(&plugin).await;
    plugin.terminate();
    let log = plugin.all_lines().join("\n");
    let deks = service.deks();
    let raw_deks: Vec<_> = deks.iter().map(|dek| STANDARD.decode(dek).unwrap()).collect();
    let mut secrets = vec![API_KEY.to_owned(), TOKEN.to_owned()];
    secrets.extend(deks);
    for bytes in raw_deks.iter().map(Vec::as_slice).chain([&PAYLOAD[..]]) {
        let text = String::from_utf8_lossy(&bytes[8..]).into_owned();
        secrets.extend([text, hex(bytes), STANDARD.encode(bytes), format!("{bytes:?}")]);
    }
    for secret in secrets {
        assert!(!log.contains(&secret), "{secret} was logged:\n{log}");
    }
    let (_, wdek) = log.split_once("wdek=").expect("LOG_ALL_VALUES shows WDEKs");
    assert!(service.wdeks().iter().any(|known| wdek.starts_with(known)), "{wdek}");
    assert!(log.contains("key_id=keelson/instance/crk/v1"), "request fields are shown");
    assert!(log.contains("canary-uid"), "and so are uids");
}

#[tokio::test(flavor = "multi_thread")]
async fn wrapped_values_are_logged_only_when_asked_for() {
    let service = Service::start(API_KEY).await;
    let mut plugin = Setup::for_service(&service).with("LOG_LEVEL", "debug").ready();
    use_everything(&plugin).await;
    plugin.terminate();
    let log = plugin.all_lines().join("\n");
    assert!(service.wdeks().iter().all(|wdek| !log.contains(wdek)), "{log}");
    assert!(log.contains(r#""level":"debug""#), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn at_info_requests_leave_no_line() {
    let service = Service::start(API_KEY).await;
    let mut plugin = Setup::for_service(&service).ready();
    let cipher = plugin.encrypt_v1(PAYLOAD).await.unwrap();
    plugin.decrypt_v1(&cipher).await.unwrap();
    plugin.terminate();
    let log = plugin.all_lines().join("\n");
    assert!(!log.contains(r#""level":"debug""#) && !log.contains("Encrypt"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn kubernetes_1_28_gets_the_version_it_wants() {
    let service = Service::start(API_KEY).await;
    let setup = Setup::for_service(&service).with("KMS_V2_STATUS_VERSION", "v2beta1");
    assert_eq!(setup.ready().status().await.unwrap().version, "v2beta1");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_api_key_and_a_wrong_crk_read_as_operators_know_them() {
    let service = Service::start("another").await;
    let plugin = Setup::for_service(&service).serving();
    plugin.line("not ready");
    for error in [
        plugin.encrypt_v1(b"ping").await.unwrap_err(),
        plugin.encrypt_v2(PAYLOAD).await.unwrap_err(),
        plugin.status().await.unwrap_err(),
    ] {
        // What Go prints as `code = Unknown desc = ...`.
        assert_eq!(i32::from(error.code()), 2);
        assert_eq!(error.message(), "BXNIM0415E:Provided API key could not be found");
    }
    let service = Service::start(API_KEY).await;
    let plugin = Setup::for_service(&service).with("CRK_ID", "wrong").serving();
    plugin.line("not ready");
    let error = plugin.encrypt_v1(b"ping").await.unwrap_err();
    assert_eq!(i32::from(error.code()), 14, "Unavailable: {error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_is_away_or_hangs_is_named_in_time() {
    let plugin = Setup::new().serving();
    let error = plugin.encrypt_v1(b"ping").await.unwrap_err();
    assert_eq!(i32::from(error.code()), 14, "{error:?}");
    assert!(
        error.message().starts_with("Unavailable: the key service cannot be reached"),
        "{error:?}"
    );
    assert!(!error.message().contains("127.0.0.1"), "no host: {error:?}");

    let service = Service::start(API_KEY).await;
    service.answers(false);
    // Other work on the machine only ever makes it later.
    let mut best = Duration::MAX;
    for _ in 0..10 {
        let plugin = Setup::for_service(&service).serving();
        let started = Instant::now();
        let error = plugin.encrypt_v1(b"ping").await.unwrap_err();
        best = best.min(started.elapsed());
        assert_eq!(error.message(), "the key service did not answer in time");
        if best < Duration::from_secs(3) {
            return;
        }
    }
    panic!("{best:?} at best");
}

#[tokio::test(flavor = "multi_thread")]
async fn values_survive_an_outage_and_the_metrics_tell_of_it() {
    let service = Service::start(API_KEY).await;
    let plugin = Setup::for_service(&service).with("REGION", "eu").ready();
    let sealed = plugin.encrypt_v2(PAYLOAD).await.unwrap();
    service.answers(false);
    assert_eq!(plugin.decrypt_v2(&sealed).await.unwrap(), PAYLOAD);
    assert_eq!(plugin.status().await.unwrap().key_id, sealed.key_id);
    let (_, metrics) = plugin.health("/metrics").await;
    let hash = kms_core::key_id::KeyId::parse(&sealed.key_id).unwrap().hash();
    for line in [
        r#"kmsplugin_requests_total{region="eu",api="v2",method="Decrypt",code="OK"} 1"#.to_owned(),
        r#"kmsplugin_provider_calls_total{region="eu",operation="wrap",outcome="ok"} 1"#.to_owned(),
        r#"kmsplugin_dek_uses{region="eu"} 1"#.to_owned(),
        r#"kmsplugin_breakers_open{region="eu"} 0"#.to_owned(),
        // The token service said 3600 s; most of them are left.
        r#"kmsplugin_token_life_left_seconds{region="eu"} 3"#.to_owned(),
        format!(r#"kmsplugin_key_id_info{{region="eu",key_id_hash="{hash}"}} 1"#),
    ] {
        assert!(metrics.contains(&line), "{line} is not in\n{metrics}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_is_named_alike_in_kube_apiserver_and_key_service() {
    let service = Service::start(API_KEY).await;
    let setup = Setup::for_service(&service)
        .with("NEW_DEK", "true")
        .with("CACHE_TIMEOUT_IN_HOURS", "0")
        .with("PROBE_INTERVAL_IN_SECONDS", "3600");
    let plugin = setup.ready();
    let asked = |action| service.correlation_ids(&format!("/api/v2/keys/crk?action={action}"));
    for action in ["wrap", "unwrap"] {
        let own = asked(action);
        let probes = own.iter().all(|id| id.starts_with("probe-") && id.len() == 22);
        assert!(probes && !own.is_empty(), "background work has names of its own: {own:?}");
    }
    let (wraps, unwraps) = (asked("wrap").len(), asked("unwrap").len());
    let sealed = plugin.encrypt_v2(PAYLOAD).await.unwrap();
    assert_eq!(asked("wrap")[wraps..], ["canary-uid"]);
    plugin.decrypt_v2(&sealed).await.unwrap();
    assert_eq!(asked("unwrap")[unwraps..], ["canary-uid"]);
    // KMS v1 has no uid, so the plug-in names the request, in its log as to the service.
    plugin.encrypt_v1(PAYLOAD).await.unwrap();
    let named = &asked("wrap")[wraps + 1..];
    assert!(named.len() == 1 && named[0].starts_with("v1-"), "{named:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trace_goes_through_log_lines_to_the_key_service() {
    const TRACE: &str = "0123456789abcdef0123456789abcdef";
    let service = Service::start(API_KEY).await;
    let setup = Setup::for_service(&service)
        .with("LOG_LEVEL", "debug")
        .with("LOG_ALL_VALUES", "true")
        .with("NEW_DEK", "true")
        .with("PROBE_INTERVAL_IN_SECONDS", "3600");
    let plugin = setup.ready();
    let before = plugin.lines().len();
    let encrypt = async |uid: &str, traceparent: &str| {
        let message = EncryptRequest { plaintext: PAYLOAD.into(), uid: uid.into() };
        let mut request = Request::new(message);
        request.metadata_mut().insert("traceparent", traceparent.parse().unwrap());
        V2::new(plugin.channel().await).encrypt(request).await.unwrap();
        plugin.line(&format!("uid={uid}"));
        service.traceparents(uid)
    };
    let caller = format!("00-{TRACE}-fedcba9876543210-01");
    let (first, second) = (encrypt("first", &caller).await, encrypt("second", &caller).await);
    for sent in [&first[..], &second] {
        assert!(matches!(sent, [one] if one.starts_with(&format!("00-{TRACE}-"))), "{sent:?}");
        assert!(sent[0].ends_with("-01") && sent[0] != caller, "a span of its own: {sent:?}");
    }
    assert_ne!(first, second);
    // What does not follow the standard is nobody's trace, and no reason to fail.
    for (uid, strange) in [("third", "00-x-y-01"), ("fourth", &caller.to_uppercase())] {
        assert_eq!(encrypt(uid, strange).await, [""]);
    }
    let lines = plugin.lines().split_off(before);
    let of_trace = format!("trace_id={TRACE}");
    let traced = |uid: &str| {
        let own: Vec<_> =
            lines.iter().filter(|line| line.contains(&format!("uid={uid}"))).collect();
        assert!(own.len() >= 3, "{lines:#?}");
        own.iter().all(|line| line.contains(&of_trace))
    };
    assert!(traced("first") && traced("second"), "{lines:#?}");
    assert!(!lines.iter().any(|line| line.contains("uid=third") && line.contains("trace_id")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_is_down_shows_in_the_metrics() {
    let plugin = Setup::new().serving();
    for _ in 0..3 {
        assert!(plugin.encrypt_v2(PAYLOAD).await.is_err());
    }
    let (_, metrics) = plugin.health("/metrics").await;
    for line in ["kmsplugin_breakers_open 1", "kmsplugin_token_life_left_seconds 0"] {
        assert!(metrics.contains(line), "{line} is not in\n{metrics}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn case_28_every_line_of_a_request_has_its_uid_and_no_text_a_secret() {
    let service = Service::start(API_KEY).await;
    let setup = Setup::for_service(&service)
        .with("LOG_LEVEL", "debug")
        .with("LOG_ALL_VALUES", "true")
        .with("CACHE_TIMEOUT_IN_HOURS", "0")
        .with("PROBE_INTERVAL_IN_SECONDS", "3600");
    let plugin = setup.ready();
    let before = plugin.lines().len();
    let sealed = plugin.encrypt_v2(PAYLOAD).await.unwrap();
    plugin.line("v2 Encrypt answered");
    let mut texts = Vec::new();
    for at in [0, sealed.ciphertext.len() / 2, sealed.ciphertext.len() - 1] {
        let mut forged = sealed.clone();
        forged.ciphertext[at] ^= 1;
        texts.push(plugin.decrypt_v2(&forged).await.unwrap_err().message().to_owned());
    }
    assert_eq!(plugin.decrypt_v2(&sealed).await.unwrap(), PAYLOAD);
    plugin.line("v2 Decrypt answered");
    let cipher = plugin.encrypt_v1(PAYLOAD).await.unwrap();
    plugin.line("v1beta1 Encrypt answered");

    let lines = plugin.lines().split_off(before);
    let named = |line: &&String| line.contains("canary-uid") || line.contains("uid=v1-");
    let unnamed: Vec<_> = lines.iter().filter(|line| !named(line)).collect();
    assert!(unnamed.is_empty() && lines.len() > 7, "{unnamed:#?} of {lines:#?}");
    texts.extend(lines);
    for bytes in [&sealed.ciphertext[..], &cipher, PAYLOAD] {
        let text = String::from_utf8_lossy(bytes).into_owned();
        for secret in [text, hex(bytes), STANDARD.encode(bytes), format!("{bytes:?}")] {
            assert!(!texts.iter().any(|text| text.contains(&secret)), "{secret} in {texts:#?}");
        }
    }
}
