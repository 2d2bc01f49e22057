//! The small world of one sequence: two instances, some callers, and all that the answers have told of what is there
//! now. Whatever the service says next must agree with it.

use super::canary::Canary;
use super::request::{Asked, Kind};
use super::rules::Answer;
use super::trail::Trail;
use crate::asked::{self, Asked as Service};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use kms_core::clock::Clock;
use kms_core::secret::SecretText;
use kms_server::ops::issue_token::hash;
use kms_server::ops::refused::record_rest;
use kms_server::policy::{Action, ApiKeySecret, Caller, Credential, Grant, Role, Scope};
use kms_server::store::{self, Instance, KeyState};
use kms_server::token::random_uuid;
use serde_json::{Value, json};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use uuid::Uuid;

/// What is shorter could be anything.
const SECRET: usize = 12;
const LIFETIME: Duration = Duration::from_secs(3600);
/// Around the end of a token or of an old secret nothing is predicted.
const UNSURE: Duration = Duration::from_secs(6);

pub struct World<'s> {
    pub service: &'s Service,
    pub mine: Uuid,
    pub theirs: Uuid,
    pub callers: Vec<Login>,
    pub keys: Vec<Key>,
    pub canaries: Vec<Canary>,
    pub trail: Trail,
    wdeks: Vec<Wdek>,
    service_ids: Vec<Uuid>,
    policies: Vec<Policy>,
    api_keys: Vec<ApiKey>,
    profiles: Vec<Uuid>,
}

/// Somebody with one secret of an API key, and the last token that it got.
pub struct Login {
    pub service_id: Uuid,
    api_key: Uuid,
    secret: String,
    token: Option<(String, SystemTime)>,
    /// When the secret was replaced, or will be.
    ends: Option<SystemTime>,
}

pub struct Key {
    pub id: Uuid,
    pub instance: Uuid,
    pub name: String,
    pub purged: bool,
    marked: KeyState,
    /// Since when it is destroyed.
    deleted: Option<SystemTime>,
    expires: Option<OffsetDateTime>,
}

pub struct Wdek {
    pub key: Uuid,
    pub text: String,
    pub aad: Vec<String>,
    pub dek: Vec<u8>,
}

struct Policy {
    id: Uuid,
    service_id: Uuid,
    grant: Grant,
}

struct ApiKey {
    id: Uuid,
    locked: bool,
    revoked: bool,
}

impl<'s> World<'s> {
    pub fn new(service: &'s Service) -> World<'s> {
        let mut world = World {
            service,
            mine: Uuid::nil(),
            theirs: Uuid::nil(),
            callers: Vec::new(),
            keys: Vec::new(),
            canaries: Vec::new(),
            trail: Trail::end_of(service.app.audit.path()),
            wdeks: Vec::new(),
            service_ids: Vec::new(),
            policies: Vec::new(),
            api_keys: Vec::new(),
            profiles: Vec::new(),
        };
        // A period of its own: what is refused in this sequence has a record each.
        service.runtime.block_on(record_rest(&service.app));
        (world.mine, world.theirs) = (world.instance(), world.instance());
        let token = service.administrator();
        for instance in [world.mine, world.theirs, world.mine] {
            world.first_key(&token, instance);
        }
        let (mine, theirs) = (Scope::Instance(world.mine), Scope::Instance(world.theirs));
        let one = Scope::Key { instance: world.mine, key: world.keys[0].id };
        for (role, scope) in [
            (Role::ClusterAdministrator, Scope::Everywhere),
            (Role::Administrator, mine),
            (Role::Manager, mine),
            (Role::Reader, mine),
            (Role::Reader, one),
            (Role::Manager, theirs),
            (Role::KeyPurge, mine),
        ] {
            world.caller(Grant { role, scope });
        }
        world.trail.read();
        world
    }

    /// One that was never used in this process.
    pub fn number(&self) -> u64 {
        static NUMBERS: AtomicU64 = AtomicU64::new(1);
        NUMBERS.fetch_add(1, Ordering::Relaxed)
    }

    /// So many bytes that must not be seen where they have no business.
    pub fn secret(&mut self, bytes: usize) -> Vec<u8> {
        let mut state = self.number();
        let mut next = || {
            // A generator of Marsaglia's: any will do that does not repeat itself.
            state = (state ^ 0x9E37_79B9_7F4A_7C15).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            state ^= state >> 29;
            state.to_le_bytes()[0]
        };
        let secret: Vec<u8> = (0..bytes).map(|_| next()).collect();
        self.watch("a DEK or the material of a key", &secret);
        secret
    }

    pub fn now(&self) -> SystemTime {
        self.service.clock.wall()
    }

    pub fn in_seconds(&self, seconds: i64) -> String {
        let at = OffsetDateTime::from(self.now()) + time::Duration::seconds(seconds);
        at.format(&Rfc3339).expect("a time of this century")
    }

    pub fn id(&self, kind: Kind, any: u8) -> String {
        let (prefix, ids): (_, Vec<Uuid>) = match kind {
            Kind::Key => ("", self.keys.iter().map(|key| key.id).collect()),
            Kind::ServiceId => ("ServiceId-", self.service_ids.clone()),
            Kind::Policy => ("Policy-", self.policies.iter().map(|policy| policy.id).collect()),
            Kind::ApiKey => ("ApiKey-", self.api_keys.iter().map(|key| key.id).collect()),
            Kind::Profile => ("Profile-", self.profiles.clone()),
        };
        let found = usize::from(any).checked_rem(ids.len()).map(|index| ids[index]);
        format!("{prefix}{}", found.unwrap_or_default())
    }

    /// One of those that this key has wrapped; without a key, of all.
    pub fn wdek(&self, key: Option<Uuid>, any: u8) -> Option<&Wdek> {
        let fitting = || self.wdeks.iter().filter(|wdek| key.is_none_or(|key| wdek.key == key));
        fitting().nth(usize::from(any).checked_rem(fitting().count())?)
    }

    pub fn wdeks_of(&self, key: Uuid) -> impl Iterator<Item = &Wdek> {
        self.wdeks.iter().filter(move |wdek| wdek.key == key)
    }

    /// The key of this id, unless it is gone for good.
    pub fn key(&self, id: Uuid) -> Option<&Key> {
        self.keys.iter().find(|key| key.id == id && !key.purged)
    }

    /// Whether this key was destroyed long enough ago.
    pub fn is_ripe(&self, key: &Key) -> bool {
        let wait = self.service.app.settings.min_purge_wait;
        key.deleted.is_some_and(|at| at + wait <= self.now())
    }

    pub fn state(&self, key: &Key) -> KeyState {
        let ended = key.expires.is_some_and(|end| end <= OffsetDateTime::from(self.now()));
        if key.marked == KeyState::Active && ended { KeyState::Deactivated } else { key.marked }
    }

    /// Whoever asks next logs in first.
    pub fn forget_tokens(&mut self) {
        self.callers.iter_mut().for_each(|login| login.token = None);
    }

    /// The token of this caller; the first time it is got.
    pub fn token(&mut self, caller: usize) -> Option<String> {
        if self.callers[caller].token.is_none() {
            self.log_in(caller);
        }
        Some(self.callers[caller].token.as_ref()?.0.clone())
    }

    /// A new token for this caller, which must get one exactly where its API key is good.
    pub fn log_in(&mut self, caller: usize) {
        let login = &self.callers[caller];
        let token = self.service.log_in(&login.secret);
        let good = self.secret_is_good(login);
        assert!(good.is_none_or(|good| good == token.is_some()), "API key good: {good:?}");
        let (service_id, now) = (login.service_id, self.now());
        self.trail.logged_in(token.is_some().then_some(service_id));
        if let Some(token) = token {
            self.watch("a token", token.as_bytes());
            self.callers[caller].token = Some((token, now));
        }
    }

    /// One letter of an API key is another one.
    pub fn log_in_with_none(&mut self, caller: usize, at: u16) {
        let mut secret = self.callers[caller].secret.clone().into_bytes();
        let at = usize::from(at) % secret.len();
        secret[at] = if secret[at] == b'a' { b'b' } else { b'a' };
        let secret = String::from_utf8_lossy(&secret);
        assert_eq!(self.service.log_in(&secret), None);
        self.trail.logged_in(None);
    }

    /// Whether the token of this caller must be taken; `None` where a moment decides.
    pub fn is_good(&self, caller: usize) -> Option<bool> {
        let login = &self.callers[caller];
        let Some((_, since)) = &login.token else { return Some(false) };
        let lives = before(self.now(), *since + LIFETIME);
        match (lives, self.secret_is_good(login)) {
            (Some(false), _) | (_, Some(false)) => Some(false),
            (Some(true), Some(true)) => Some(true),
            _ => None,
        }
    }

    /// What this caller may do.
    pub fn rights(&self, caller: usize) -> Caller {
        let Login { service_id, api_key, .. } = self.callers[caller];
        let mine = self.policies.iter().filter(|policy| policy.service_id == service_id);
        let secret = ApiKeySecret { api_key, generation: 1 };
        let grants = mine.map(|policy| policy.grant).collect();
        Caller { service_id, credential: Credential::ApiKey(secret), grants }
    }

    /// Takes in what a good answer tells.
    pub fn learn(&mut self, asked: &Asked, answer: &Answer) {
        let (id, json) = (asked.id.unwrap_or_default(), &answer.json);
        match asked.route.action {
            Action::CreateKey => self.learn_key(&json["resources"][0], asked.place),
            Action::DisableKey => self.mark(id, KeyState::Suspended),
            Action::EnableKey => self.mark(id, KeyState::Active),
            Action::DeleteKey => self.mark(id, KeyState::Destroyed),
            Action::PurgeKey => self.change_key(id, |key| key.purged = true),
            Action::Wrap => self.learn_wdek(asked, answer),
            Action::Unwrap => self.learn_rewrapped(asked, answer),
            Action::CreateServiceId => {
                self.service_ids.push(named(&json["id"]));
                json["policies"].as_array().into_iter().flatten().for_each(|one| self.grant(one));
            }
            Action::DeleteServiceId => self.remove_service_id(id),
            Action::CreatePolicy => self.grant(json),
            Action::DeletePolicy => self.policies.retain(|policy| policy.id != id),
            Action::CreateProfile => self.profiles.push(named(&json["id"])),
            Action::DeleteProfile => self.profiles.retain(|profile| *profile != id),
            Action::CreateApiKey => {
                self.api_keys.push(ApiKey {
                    id: named(&json["id"]),
                    locked: false,
                    revoked: false,
                });
                self.learn_secret(json);
            }
            Action::RotateApiKey => {
                let overlap = asked.said()["overlap_seconds"].as_u64().unwrap_or_default();
                self.replace(id, Duration::from_secs(overlap));
                self.learn_secret(json);
            }
            Action::LockApiKey => self.change(id, |key| key.locked = true),
            Action::UnlockApiKey => self.change(id, |key| key.locked = false),
            Action::DeleteApiKey => self.change(id, |key| key.revoked = true),
            _ => {}
        }
    }

    fn learn_key(&mut self, made: &Value, instance: Option<Uuid>) {
        let expires = made["expirationDate"].as_str();
        self.keys.push(Key {
            id: named(&made["id"]),
            instance: instance.expect("a key is made in an instance"),
            name: text(&made["name"]),
            purged: false,
            marked: KeyState::Active,
            deleted: None,
            expires: expires.and_then(|text| OffsetDateTime::parse(text, &Rfc3339).ok()),
        });
    }

    fn learn_wdek(&mut self, asked: &Asked, answer: &Answer) {
        let said = asked.said();
        let given = said["plaintext"].as_str().filter(|text| !text.is_empty());
        let dek = given.or(answer.json["plaintext"].as_str()).expect("a DEK");
        let dek = STANDARD.decode(dek).expect("base64");
        self.watch("a DEK", &dek);
        let (key, aad) = (asked.id.unwrap_or_default(), strings(&said["aad"]));
        self.wdeks.push(Wdek { key, text: text(&answer.json["ciphertext"]), aad, dek });
    }

    fn learn_rewrapped(&mut self, asked: &Asked, answer: &Answer) {
        let Some(newer) = answer.json["ciphertext"].as_str() else { return };
        let dek = STANDARD.decode(text(&answer.json["plaintext"])).expect("base64");
        let (key, aad) = (asked.id.unwrap_or_default(), strings(&asked.said()["aad"]));
        self.wdeks.push(Wdek { key, text: newer.to_owned(), aad, dek });
    }

    fn learn_secret(&mut self, json: &Value) {
        let secret = text(&json["apikey"]);
        self.watch("an API key", secret.as_bytes());
        let (service_id, api_key) = (named(&json["service_id"]), named(&json["id"]));
        self.callers.push(Login { service_id, api_key, secret, token: None, ends: None });
    }

    fn grant(&mut self, policy: &Value) {
        let role = Role::parse(&text(&policy["role"])).expect("a role");
        let place = |member: &str| policy[member].as_str().map(|_| named(&policy[member]));
        let scope = match (place("instance_id"), place("key_id")) {
            (Some(instance), Some(key)) => Scope::Key { instance, key },
            (instance, _) => Scope::of(instance),
        };
        let (id, service_id) = (named(&policy["id"]), named(&policy["service_id"]));
        self.policies.push(Policy { id, service_id, grant: Grant { role, scope } });
    }

    fn mark(&mut self, id: Uuid, state: KeyState) {
        let now = self.now();
        self.change_key(id, |key| {
            key.marked = state;
            key.deleted = (state == KeyState::Destroyed).then_some(now);
        });
    }

    fn change_key(&mut self, id: Uuid, change: impl FnOnce(&mut Key)) {
        if let Some(key) = self.keys.iter_mut().find(|key| key.id == id) {
            change(key);
        }
    }

    /// With all that it could log in with.
    fn remove_service_id(&mut self, id: Uuid) {
        self.service_ids.retain(|one| *one != id);
        self.policies.retain(|policy| policy.service_id != id);
        for login in self.callers.iter().filter(|login| login.service_id == id) {
            let mut keys = self.api_keys.iter_mut();
            keys.find(|key| key.id == login.api_key).expect("it was made").revoked = true;
        }
    }

    fn change(&mut self, id: Uuid, change: impl FnOnce(&mut ApiKey)) {
        if let Some(key) = self.api_keys.iter_mut().find(|key| key.id == id) {
            change(key);
        }
    }

    /// The newest secret of an API key ends when `overlap` is over, those before it at once.
    fn replace(&mut self, api_key: Uuid, overlap: Duration) {
        let now = self.now();
        let secrets = self.callers.iter_mut().filter(|login| login.api_key == api_key);
        for (age, login) in secrets.rev().enumerate() {
            let end = if age == 0 { now + overlap } else { now };
            login.ends = Some(login.ends.map_or(end, |before| before.min(end)));
        }
    }

    fn secret_is_good(&self, login: &Login) -> Option<bool> {
        let key = self.api_keys.iter().find(|key| key.id == login.api_key).expect("it was made");
        if key.locked || key.revoked {
            return Some(false);
        }
        match login.ends {
            Some(end) if end <= self.now() => Some(false),
            Some(end) => before(self.now(), end),
            None => Some(true),
        }
    }

    fn watch(&mut self, name: &'static str, secret: &[u8]) {
        if secret.len() >= SECRET {
            self.canaries.push(Canary::new(name, secret));
        }
    }

    fn instance(&self) -> Uuid {
        let id = self.random();
        let instance = Instance { id, name: format!("of {id}"), created_at: self.now().into() };
        self.service
            .runtime
            .block_on(self.service.app.store.add_instance(&instance))
            .expect("room");
        id
    }

    fn first_key(&mut self, token: &str, instance: Uuid) {
        let name = if instance == self.mine { "of-mine" } else { "of-theirs" };
        let name = format!("{name}-{:08}", self.number());
        let body = json!({"resources": [{"name": name, "extractable": false}]}).to_string();
        let request = format!(
            "POST /api/v2/keys HTTP/1.1\r\nauthorization: Bearer {token}\r\nicp-instance: {instance}\r\n\
             content-length: {}\r\n\r\n{body}",
            body.len()
        );
        let made = asked::json(&self.service.keys(request.as_bytes()));
        self.learn_key(&made["resources"][0], Some(instance));
    }

    fn caller(&mut self, grant: Grant) {
        let (id, api_key, created_at) = (self.random(), self.random(), self.now().into());
        let secret = format!("{}{}", self.random().simple(), self.random().simple());
        let owner = store::ServiceId::with(id, "somebody".into(), grant, created_at);
        let key = store::ApiKey::new(api_key, id, "key".into(), created_at);
        let hash = hash(&SecretText::new(secret.clone()));
        let store = self.service.app.store.clone();
        self.service.runtime.block_on(async {
            store.add_service_id(&owner).await.expect("room");
            store.add_api_key(&key, &hash).await.expect("room");
        });
        self.watch("an API key", secret.as_bytes());
        self.service_ids.push(id);
        // The first policy has the id of its service ID.
        self.policies.push(Policy { id, service_id: id, grant });
        self.api_keys.push(ApiKey { id: api_key, locked: false, revoked: false });
        self.callers.push(Login { service_id: id, api_key, secret, token: None, ends: None });
    }

    fn random(&self) -> Uuid {
        let id = random_uuid(&*self.service.app.vault);
        self.service.runtime.block_on(id).expect("a random id")
    }
}

/// Whether `now` is before `end`, and so much before that it matters to nobody.
fn before(now: SystemTime, end: SystemTime) -> Option<bool> {
    if now + UNSURE < end {
        return Some(true);
    }
    (end + UNSURE < now).then_some(false)
}

/// The UUID behind the prefix that says what it is of.
fn named(id: &Value) -> Uuid {
    let text = text(id);
    let at = text.len().checked_sub(36).expect("an id");
    text[at..].parse().expect("an id")
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_else(|| panic!("no text but {value}")).to_owned()
}

pub fn strings(value: &Value) -> Vec<String> {
    value.as_array().into_iter().flatten().map(text).collect()
}
