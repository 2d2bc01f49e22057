//! What holds of every answer, whatever was asked: who gets one, what it tells, and what the audit log says of it.

use super::canary::assert_clean;
use super::request::Asked;
use super::world::{World, strings};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use kms_server::http::body::lower_names;
use kms_server::policy::{self, Action, Caller, Scope, iam_id};
use kms_server::store::KeyState;
use serde_json::{Value, json};
use uuid::Uuid;

/// An answer as it came, and what is read from it.
pub struct Answer {
    status: u16,
    bytes: Vec<u8>,
    pub json: Value,
}

impl Answer {
    pub fn read(bytes: Vec<u8>) -> Answer {
        let status = std::str::from_utf8(&bytes[9..12]).ok().and_then(|text| text.parse().ok());
        let body = bytes.windows(4).position(|end| end == b"\r\n\r\n").map_or(0, |at| at + 4);
        let json = serde_json::from_slice(&bytes[body..]).unwrap_or_default();
        Answer { status: status.expect("a status"), bytes, json }
    }

    pub fn is_good(&self) -> bool {
        (200..300).contains(&self.status)
    }
}

impl Asked {
    /// What the body says, member names in lower case as the service reads them; `null` for what is no JSON.
    pub fn said(&self) -> Value {
        let mut body = self.body.clone();
        lower_names(&mut body);
        serde_json::from_slice(&body).unwrap_or_default()
    }
}

/// Sends one request, and holds its answer against everything that is known.
pub fn ask(world: &mut World<'_>, asked: &Asked) {
    let send = |bytes| match asked.of_key_api {
        true => world.service.keys(bytes),
        false => world.service.tokens(bytes),
    };
    let answer = Answer::read(send(&asked.bytes));
    let records = world.trail.read();
    let caller = match asked.who.map_or(Some(false), |who| world.is_good(who)) {
        Some(true) => asked.who.map(|who| world.rights(who)),
        Some(false) => {
            assert_eq!(answer.status, 401, "{asked:?} of nobody");
            None
        }
        // A moment decides; what follows holds for either.
        None if answer.status == 401 => None,
        None => asked.who.map(|who| world.rights(who)),
    };
    match &caller {
        Some(caller) => check_records(asked, &answer, caller, &records),
        None => check_records_of_nobody(&records),
    }
    if let (Some(caller), true) = (&caller, answer.is_good()) {
        check_right(asked, caller);
        check_state(world, asked, caller);
    }
    check_secrets(world, asked, &answer);
    check_tenants(world, asked, &answer, caller.as_ref());
    if answer.is_good() {
        check_plaintext(world, asked, &answer);
        world.learn(asked, &answer);
    }
}

/// One record closes every request of somebody who is known, and one comes before every change.
fn check_records(asked: &Asked, answer: &Answer, caller: &Caller, records: &[Value]) {
    let action = asked.route.action;
    let name = match action {
        Action::CreateKey if records.iter().any(|one| one["action"] == "import_key") => {
            "import_key"
        }
        other => other.name(),
    };
    let about = |one: &Value| {
        one["action"] == name
            && one["caller"] == iam_id(caller.service_id)
            && one["peer"] == "127.0.0.1:1"
            && one["correlation"] == json!(asked.correlation)
    };
    assert!(records.iter().all(about), "{asked:?} is recorded as {records:?}");
    let (begun, closed): (Vec<_>, Vec<_>) =
        records.iter().partition(|one| one["outcome"] == "begun");
    let [closed] = closed[..] else { panic!("{} answers {asked:?}: {records:?}", answer.status) };
    assert_eq!(closed["outcome"] == "done", answer.is_good(), "{asked:?}: {records:?}");
    if !answer.is_good() {
        assert!(begun.len() <= 1, "{asked:?}: {records:?}");
        return;
    }
    assert_eq!(begun.len(), usize::from(changes(action)), "{asked:?}: {records:?}");
    assert!(begun.iter().all(|one| one["target"] == closed["target"]), "{records:?}");
    if let Some(id) = asked.id.filter(|_| asked.route.path.contains("{id}")) {
        assert_eq!(closed["target"], json!(id), "{records:?}");
    }
    if asked.of_key_api {
        assert_eq!(closed["instance"], json!(asked.place), "{records:?}");
    }
    if action == Action::CreateKey {
        assert_eq!(closed["target"], answer.json["resources"][0]["id"], "{records:?}");
    }
}

/// Who is not let in changes nothing, and no record names anybody.
fn check_records_of_nobody(records: &[Value]) {
    let refused = |one: &Value| one["action"] == "use_token" && one["caller"].is_null();
    let refused = |one: &Value| refused(one) && one["outcome"] != "done";
    assert!(records.len() <= 1 && records.iter().all(refused), "{records:?}");
}

fn changes(action: Action) -> bool {
    !matches!(
        action,
        Action::CountKeys
            | Action::ListKeys
            | Action::ReadKey
            | Action::ReadMetadata
            | Action::ListVersions
            | Action::Wrap
            | Action::Unwrap
            | Action::ListInstances
            | Action::ListServiceIds
            | Action::ListPolicies
            | Action::ListProfiles
            | Action::ListApiKeys
    )
}

/// Nobody gets what their policies do not give them.
fn check_right(asked: &Asked, caller: &Caller) {
    let action = asked.route.action;
    let allowed = match (asked.of_key_api, asked.place, asked.id) {
        (false, ..) => policy::allow_somewhere(caller, action).is_ok(),
        (true, None, _) => false,
        (true, Some(instance), Some(key)) if asked.route.path.contains("{id}") => {
            policy::allow(caller, action, Scope::Key { instance, key }).is_ok()
        }
        (true, Some(instance), _) => policy::reach(caller, action, instance).is_ok(),
    };
    assert!(allowed, "{caller:?} got {asked:?}");
}

/// A key is where it was made, and does what its state lets it.
fn check_state(world: &World<'_>, asked: &Asked, caller: &Caller) {
    let (Some(id), true) = (asked.id, asked.route.path.starts_with("/keys/{id}")) else { return };
    let key = world.key(id).unwrap_or_else(|| panic!("{caller:?} found a key by {asked:?}"));
    assert_eq!(Some(key.instance), asked.place, "a key is in one instance");
    let state = world.state(key);
    let fits = match asked.route.action {
        Action::Wrap | Action::RotateKey | Action::DisableKey => state == KeyState::Active,
        Action::Unwrap => matches!(state, KeyState::Active | KeyState::Deactivated),
        Action::EnableKey => state == KeyState::Suspended,
        Action::DeleteKey => state != KeyState::Destroyed,
        Action::PurgeKey => world.is_ripe(key),
        _ => true,
    };
    assert!(fits, "{asked:?} of a key that is {state:?}");
}

/// Secrets are in the answers that are there to give them, and in no other.
fn check_secrets(world: &World<'_>, asked: &Asked, answer: &Answer) {
    let gives = matches!(
        asked.route.action,
        Action::Wrap | Action::Unwrap | Action::CreateApiKey | Action::RotateApiKey
    );
    if !(gives && answer.is_good()) {
        assert_clean(&world.canaries, "an answer", &answer.bytes);
    }
}

/// Of a key that the caller has no right to, neither name nor id is told.
fn check_tenants(world: &World<'_>, asked: &Asked, answer: &Answer, caller: Option<&Caller>) {
    let text = String::from_utf8_lossy(&answer.bytes);
    let request = String::from_utf8_lossy(&asked.bytes);
    for key in &world.keys {
        let scope = Scope::Key { instance: key.instance, key: key.id };
        if caller.is_some_and(|caller| policy::sees(caller, scope)) {
            continue;
        }
        let (id, named) = (key.id.to_string(), key.name.starts_with("of-"));
        assert!(!(named && text.contains(&key.name)), "{asked:?} tells a name: {text}");
        assert!(!text.contains(&id) || request.contains(&id), "{asked:?} tells an id: {text}");
    }
}

/// A DEK comes out as it went in, or not at all.
fn check_plaintext(world: &World<'_>, asked: &Asked, answer: &Answer) {
    if asked.route.action != Action::Unwrap {
        return;
    }
    let aad = strings(&asked.said()["aad"]);
    let dek = STANDARD.decode(answer.json["plaintext"].as_str().unwrap_or_default());
    let dek = dek.expect("base64");
    let mut known = world.wdeks_of(asked.id.unwrap_or_default());
    let same = known.any(|wdek| wdek.aad == aad && wdek.dek == dek);
    assert!(same, "a DEK that was never wrapped with this key and {aad:?}");
}

/// At the end of a sequence: what was wrapped opens, as long as its key may open anything.
pub fn check_all_opens(world: &World<'_>) {
    if world.keys.iter().all(|key| world.wdeks_of(key.id).next().is_none()) {
        return;
    }
    let token = world.service.administrator();
    for key in &world.keys {
        let wanted = match world.state(key) {
            KeyState::Active | KeyState::Deactivated => 200,
            KeyState::Suspended => 409,
            KeyState::Destroyed if key.purged => 404,
            KeyState::Destroyed => 410,
        };
        for wdek in world.wdeks_of(key.id) {
            let body = json!({"ciphertext": wdek.text, "aad": wdek.aad});
            let answer = unwrap(world, &token, key.instance, key.id, &body);
            assert_eq!(answer.status, wanted, "{}", answer.json);
            if answer.status == 200 {
                assert_eq!(answer.json["plaintext"], STANDARD.encode(&wdek.dek));
            }
        }
    }
}

fn unwrap(world: &World<'_>, token: &str, instance: Uuid, key: Uuid, body: &Value) -> Answer {
    let body = body.to_string();
    let request = format!(
        "POST /api/v2/keys/{key}/actions/unwrap HTTP/1.1\r\nauthorization: Bearer {token}\r\n\
         icp-instance: {instance}\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    Answer::read(world.service.keys(request.as_bytes()))
}
