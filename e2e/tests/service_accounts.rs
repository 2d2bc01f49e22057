//! The service accounts of a real cluster at kms-server: its tokens come from kube-apiserver's TokenRequest, the keys to
//! check them from its discovery document. What a profile gives them, what is refused, and what is not seen.

use std::fs;
use std::time::Duration;

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;
use keelson_e2e::assets::Kubernetes;
use keelson_e2e::chain::{Chain, SecretsThrough, Shared, run_folder};
use keelson_e2e::clock::{Wrong, WrongClock};
use keelson_e2e::key_service::KeyService;
use keelson_e2e::service_account::{self as account, ACCOUNT, AUDIENCE, NAMESPACE};
use keelson_e2e::{Error, Result, wait};
use kms_api::client::{Ca, Call, ClientSettings, Error as ClientError, KeyProtect, USER_AGENT};
use tokio::runtime::Runtime;

const NAME: &str = "service-accounts";
const PROFILE: &str = "node";
const SOON: Duration = Duration::from_secs(60);
/// kube-apiserver gives no token for less.
const SHORTEST: &str = "10m";

/// A chain whose cluster is trusted as an issuer, with a profile for one service account and one key.
static CHAIN: Shared = Shared::new(|| {
    let mut chain = Chain::for_test(NAME, Some(Kubernetes::V1_37), SecretsThrough::V2, |_| ())?;
    let policy = ["--role", "Reader", "--key", &chain.crk_id.clone()];
    account::trust_own_cluster(&mut chain, PROFILE, &policy)?;
    Ok(chain)
});

#[test]
fn a_service_account_may_what_its_profile_may_and_nothing_else() -> Result<()> {
    CHAIN.with(|chain| {
        let file = run_folder(&format!("e2e/{NAME}")).join("account.token");
        account::place(&file, &account::token(chain.kubectl()?, "1h")?)?;
        let (service, call) = (&chain.key_service, Call::within(Duration::from_secs(10)));
        let ca = Some(Ca::File(service.ca.clone()));
        let settings = ClientSettings {
            url: service.url.clone(),
            instance_id: service.instance_id.clone(),
            ca,
            max_connections: 1,
            user_agent: USER_AGENT.to_owned(),
        };
        let tokens = account::tokens(service, file.clone(), PROFILE)?;
        let client = KeyProtect::new(&settings, tokens).map_err(told)?;
        let runtime = Runtime::new().map_err(Error::machine("start a runtime"))?;
        let (mine, other) = (chain.crk_id.clone(), chain.kmsctl.create_key("another")?);
        let made = runtime.block_on(client.wrap(&mine, None, &[], call)).map_err(told)?;
        let wdek = made.ciphertext;
        let opened = runtime.block_on(client.unwrap(&mine, &wdek, &[], call)).map_err(told)?;
        assert_eq!(
            made.plaintext.map(|dek| dek.expose().to_owned()).as_deref(),
            Some(opened.plaintext.expose())
        );

        let refused = |what: &str, answer: std::result::Result<(), ClientError>| {
            let status = answer.as_ref().err().and_then(ClientError::status);
            assert!(matches!(status, Some(401 | 403 | 404)), "{what}: {answer:?}");
        };
        refused("another key", runtime.block_on(client.wrap(&other, None, &[], call)).map(drop));
        refused("a rotation", runtime.block_on(client.rotate_key(&mine, None, call)));
        refused("a deletion", runtime.block_on(client.delete_key(&mine, call)));
        // kmsctl logs in in the same way. Its list holds what the account reaches, and it manages nothing.
        let as_account = ["--cr-token-file", &file.display().to_string(), "--profile", PROFILE];
        let list = chain.kmsctl.json(&[&["keys", "list"], &as_account[..]].concat(), b"")?;
        let ids: Vec<_> =
            list.as_array().into_iter().flatten().map(|key| text(key, "id")).collect();
        assert_eq!(ids, [mine], "{list}");
        let managed = chain.kmsctl.run(&[&["profiles", "list"], &as_account[..]].concat(), b"");
        let said = managed.err().map(|error| error.to_string()).unwrap_or_default();
        assert!(said.contains("BXNIM0513E"), "{said}");

        let audit = fs::read_to_string(&service.audit).map_err(Error::machine("read a file"))?;
        let mut wraps = audit.lines().filter(|line| line.contains(r#""action":"wrap""#));
        assert!(wraps.next_back().is_some_and(|line| line.contains("iam-Profile-")), "{audit}");
        Ok(())
    })
}

#[test]
fn tokens_for_somebody_else_or_by_somebody_else_are_refused() -> Result<()> {
    CHAIN.with(|chain| {
        let kubectl = chain.kubectl()?.clone();
        let (service, good) = (&chain.key_service, account::token(&kubectl, "1h")?);
        assert!(account::log_in(service, &good, PROFILE)?.is_ok());
        account::create(&kubectl, NAMESPACE, "another")?;
        account::create(&kubectl, "default", ACCOUNT)?;
        let for_us = ["--audience", AUDIENCE];
        let of =
            |namespace, name, more: &[&str]| account::token_of(&kubectl, namespace, name, more);
        for (what, token) in [
            ("the API server's audience", of(NAMESPACE, ACCOUNT, &[])?),
            ("another audience", of(NAMESPACE, ACCOUNT, &["--audience", "vault"])?),
            ("another key", signed_by_a_stranger(&good)?),
            (
                "no signature",
                good.rsplit_once('.').map(|(text, _)| format!("{text}.")).unwrap_or_default(),
            ),
        ] {
            is_refused(what, account::log_in(service, &token, PROFILE)?);
        }
        for (what, namespace, name) in
            [("another account", NAMESPACE, "another"), ("another namespace", "default", ACCOUNT)]
        {
            let token = of(namespace, name, &for_us)?;
            is_nobody(what, account::log_in(service, &token, PROFILE)?);
        }
        is_nobody("another profile", account::log_in(service, &good, "other")?);
        assert!(account::log_in(service, &good, PROFILE)?.is_ok());
        Ok(())
    })
}

/// Both clusters are trusted, and in both there is an account of this name; the profile is for one of them.
#[test]
fn another_trusted_clusters_account_of_the_same_name_is_refused() -> Result<()> {
    CHAIN.with(|chain| {
        let dir = run_folder(&format!("e2e/{NAME}")).join("another-cluster");
        let (_etcd, other) = &account::another_cluster(&dir)?;
        let first = (chain.cluster()?.apiserver.url.clone(), chain.cluster()?.apiserver.ca.clone());
        let both = [(&*first.0, &*first.1), (&*other.url, &*other.ca)];
        chain.key_service.trust(&both, AUDIENCE)?;
        let service = &chain.key_service;
        let theirs = account::token(&other.kubectl, "1h")?;
        is_nobody("another cluster", account::log_in(service, &theirs, PROFILE)?);
        account::profile(chain, other, "theirs", &["--role", "Viewer"])?;
        assert!(account::log_in(service, &theirs, "theirs")?.is_ok(), "it is trusted");
        let ours = account::token(chain.kubectl()?, "1h")?;
        is_nobody("the first cluster", account::log_in(service, &ours, "theirs")?);
        chain.key_service.trust(&both[..1], AUDIENCE)?;
        is_refused("no longer trusted", account::log_in(&chain.key_service, &theirs, "theirs")?);
        assert!(account::log_in(&chain.key_service, &ours, PROFILE)?.is_ok());
        Ok(())
    })
}

/// Who shows no credential may not read an issuer's keys in a cluster as it is installed.
#[test]
fn an_issuer_that_hides_its_keys_is_told_from_a_bad_token() -> Result<()> {
    CHAIN.with(|chain| {
        let kubectl = chain.kubectl()?.clone();
        let token = account::token(&kubectl, "1h")?;
        account::hide_keys(&kubectl)?;
        forget_keys(chain)?;
        is_unavailable_soon(chain, &token)?;
        let log = log_of(&chain.key_service)?;
        assert!(log.contains("The keys of issuer") && log.contains("403"), "{log}");
        account::publish_keys(&kubectl)?;
        log_in_soon(chain, &token)
    })
}

/// What is checked here is the token. Whether the account still exists, only its own API server knows.
#[test]
fn a_deleted_account_gets_no_more_tokens_and_those_it_has_end_by_themselves() -> Result<()> {
    CHAIN.with(|chain| {
        let clock = clock_of_the_key_service(chain)?;
        let kubectl = chain.kubectl()?.clone();
        let token = account::token(&kubectl, SHORTEST)?;
        kubectl.run(&["delete", "serviceaccount", ACCOUNT, "-n", NAMESPACE], b"")?;
        assert!(account::token(&kubectl, SHORTEST).is_err());
        assert!(account::log_in(&chain.key_service, &token, PROFILE)?.is_ok(), "not seen");
        clock.set("+660")?;
        is_refused("an expired token", account::log_in(&chain.key_service, &token, PROFILE)?);
        clock.set("+0")?;
        // What ends it at once is the profile.
        let (owner, issuer) = account::delete_profile(chain, PROFILE)?;
        is_nobody("no profile", account::log_in(&chain.key_service, &token, PROFILE)?);

        account::create(&kubectl, NAMESPACE, ACCOUNT)?;
        account::profile_for(chain, &owner, &issuer, PROFILE)?;
        assert!(account::log_in(&chain.key_service, &token, PROFILE)?.is_ok());
        Ok(())
    })
}

/// For an hour, by a clock that no test with real processes can move: `a_withdrawn_key_ends_within_the_hour_…` in
/// `kms-server` sees the end of it.
#[test]
fn while_the_api_server_is_away_its_last_keys_go_on() -> Result<()> {
    CHAIN.with(|chain| {
        let token = account::token(chain.kubectl()?, "1h")?;
        log_in_soon(chain, &token)?;
        chain.cluster_mut()?.apiserver.server.kill()?;
        assert!(account::log_in(&chain.key_service, &token, PROFILE)?.is_ok());
        // A key that it never had makes kms-server ask in vain, and takes nothing from those that it has.
        let (_, rest) = token.split_once('.').unwrap_or_default();
        let header = BASE64URL.encode(r#"{"alg":"ES256","kid":"unheard-of"}"#);
        wait::until("a question in vain", SOON, &[], || {
            let answer = account::log_in(&chain.key_service, &format!("{header}.{rest}"), PROFILE);
            is_refused("an unknown key", answer.map_err(|e| e.to_string())?);
            let log = log_of(&chain.key_service).map_err(|e| e.to_string())?;
            let asked = log.contains("The keys of issuer") && log.contains("Connection refused");
            if asked { Ok(()) } else { Err(log) }
        })?;
        assert!(account::log_in(&chain.key_service, &token, PROFILE)?.is_ok());
        // A key service that starts meanwhile has nothing to go on with.
        forget_keys(chain)?;
        is_unavailable_soon(chain, &token)?;
        chain.cluster_mut()?.apiserver.start_again()?;
        log_in_soon(chain, &token)
    })
}

/// kube-apiserver is asked for its keys once in a few seconds at most.
fn log_in_soon(chain: &Chain, token: &str) -> Result<()> {
    wait::until("a login", SOON, &[], || {
        match account::log_in(&chain.key_service, token, PROFILE).map_err(|e| e.to_string())? {
            Ok(_) => Ok(()),
            Err(error) => Err(error.to_string()),
        }
    })
}

/// Nobody can say whether the token is good, which is no refusal.
fn is_unavailable_soon(chain: &Chain, token: &str) -> Result<()> {
    wait::until("an issuer that is away", SOON, &[], || {
        match account::log_in(&chain.key_service, token, PROFILE).map_err(|e| e.to_string())? {
            Err(error @ ClientError::Iam { status: 503, .. })
                if error.to_string().starts_with("ISSUER_UNAVAILABLE_ERR") =>
            {
                assert!(error.is_outage() && !error.is_refusal());
                Ok(())
            }
            other => Err(format!("{other:?}")),
        }
    })
}

fn forget_keys(chain: &mut Chain) -> Result<()> {
    chain.key_service.server.stop()?;
    chain.key_service.server.start()?;
    chain.key_service.wait_until_ready()
}

fn log_of(service: &KeyService) -> Result<String> {
    let log = service.config.with_file_name("kms-server.log");
    fs::read_to_string(log).map_err(Error::machine("read a log"))
}

fn clock_of_the_key_service(chain: &mut Chain) -> Result<WrongClock> {
    let clock = WrongClock::create(&run_folder(&format!("e2e/{NAME}")), "kms-server")?;
    chain.key_service.server.add_env(clock.envs(Wrong::TimeOfDay));
    forget_keys(chain)?;
    Ok(clock)
}

/// The same header and claims, `kid` included, under the signature of a key that the cluster does not have.
fn signed_by_a_stranger(token: &str) -> Result<String> {
    let unspecified = |_| Error::answer("the signature", "it cannot be made");
    let key = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).map_err(unspecified)?;
    let (text, signature) = token.rsplit_once('.').unwrap_or_default();
    let forged = key.sign(&SystemRandom::new(), text.as_bytes()).map_err(unspecified)?;
    let forged = BASE64URL.encode(forged);
    assert_eq!(forged.len(), signature.len(), "it is of the kind that kube-apiserver makes");
    Ok(format!("{text}.{forged}"))
}

type Answer<T> = std::result::Result<T, ClientError>;

/// It proves nothing: what it says of anybody's rights is no refusal of its owner.
fn is_refused<T: std::fmt::Debug>(what: &str, answer: Answer<T>) {
    let told = matches!(&answer, Err(ClientError::CrTokenFile { cause, .. }) if cause.starts_with("BXNIM0407E:"));
    assert!(told, "{what}: {answer:?}");
}

/// It is genuine, and no profile of that name trusts whose it is.
fn is_nobody<T: std::fmt::Debug>(what: &str, answer: Answer<T>) {
    let told =
        matches!(&answer, Err(ClientError::Iam { status: 403, code, .. }) if code == "BXNIM0513E");
    assert!(told, "{what}: {answer:?}");
}

fn text(answer: &serde_json::Value, member: &str) -> String {
    answer[member].as_str().unwrap_or_default().to_owned()
}

fn told(error: impl std::fmt::Display) -> Error {
    Error::answer("kms-server", error.to_string())
}
