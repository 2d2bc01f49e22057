//! From a symbol to bytes: the request that a step stands for, in the world as it is now.

use super::grammar::{Ask, Bend, Body, Headers, Id, Name, Place, Query, Rarely, Token};
use super::world::World;
use crate::asked::OTHER_ISSUER;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use kms_server::http::{KEY_PREFIXES, KEY_ROUTES, MANAGEMENT_ROUTES, Route};
use kms_server::policy::{Action, Role};
use serde_json::{Map, Value, json};
use std::fmt;
use uuid::Uuid;

/// A request, and what of it the rules need to know.
pub struct Asked {
    pub route: &'static Route,
    pub of_key_api: bool,
    /// Whose good token it has, among the callers of the world.
    pub who: Option<usize>,
    /// What stands in the path, where that is an id in its proper form.
    pub id: Option<Uuid>,
    /// What the header names, if it names one instance.
    pub place: Option<Uuid>,
    pub correlation: Option<String>,
    pub body: Vec<u8>,
    /// Head and body.
    pub bytes: Vec<u8>,
}

impl fmt::Debug for Asked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "caller {:?}: {}", self.who, String::from_utf8_lossy(&self.bytes))
    }
}

impl Ask {
    pub fn request(&self, world: &mut World<'_>) -> Asked {
        let all = KEY_ROUTES.len() + MANAGEMENT_ROUTES.len();
        let index = usize::from(self.route) % all;
        let of_key_api = index < KEY_ROUTES.len();
        let route = KEY_ROUTES.iter().chain(MANAGEMENT_ROUTES).nth(index).expect("an index in it");
        let (who, bearer) = self.bearer(world);
        let id = self.id(world, route);
        let place = place(world, self.place.0.as_ref(), &id);
        let body = self.bent(self.body(world, route.action, &place, &id));
        let correlation = self.headers().correlation.map(|number| format!("call-{number}"));
        let mut head =
            format!("{} {} HTTP/1.1\r\n", route.method, self.path(route, of_key_api, &id));
        for (name, value) in self.sent(bearer, &correlation, &place) {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        head.push_str(&format!("content-length: {}\r\n\r\n", body.len()));
        let place = match &place[..] {
            [one] => Uuid::try_parse(one).ok().filter(|_| one.len() == 36),
            _ => None,
        };
        let bytes = [head.as_bytes(), &body].concat();
        Asked { route, of_key_api, who, id: canonical(&id), place, correlation, body, bytes }
    }

    /// Whose token it is if it is a good one, and what is shown.
    fn bearer(&self, world: &mut World<'_>) -> (Option<usize>, Option<String>) {
        let index = usize::from(self.who) % world.callers.len();
        let token = world.token(index);
        match &self.token.0 {
            None => (token.is_some().then_some(index), token),
            Some(Token::None) => (None, None),
            Some(Token::Bent(at)) => (None, token.map(|token| bent(&token, *at))),
            Some(Token::Text(text)) => (None, Some(visible(text))),
        }
    }

    fn id(&self, world: &World<'_>, route: &Route) -> String {
        let kind = Kind::of(route);
        match &self.other_id.0 {
            None => world.id(kind, self.id),
            Some(Id::None) => Uuid::from_u128(self.id.into()).to_string(),
            Some(Id::Shouted) => world.id(kind, self.id).to_uppercase(),
            Some(Id::Other(any)) => world.id(kind.next(), *any),
            Some(Id::Text(text)) => match in_path(text) {
                text if text.is_empty() => "_".into(),
                text => text,
            },
        }
    }

    fn path(&self, route: &Route, of_key_api: bool, id: &str) -> String {
        let path = route.path.replace("{id}", id);
        let prefix = KEY_PREFIXES[usize::from(self.headers().ingress)];
        let path = if of_key_api { format!("{prefix}{path}") } else { path };
        let Some(query) = &self.query.0 else { return path };
        let query = match query {
            Query::Page { limit, offset } => {
                format!("limit={limit}&offset={offset}&totalCount=true")
            }
            Query::States(state) => format!("state=1,{}", state % 7),
            Query::Flag(which, value) => {
                let names = ["extractable", "allKeyStates", "totalCount", "search", "filter"];
                format!("{}={value}", names[usize::from(*which) % names.len()])
            }
            Query::Text(text) => in_path(text).replace("action", "_"),
        };
        let separator = if path.contains('?') { '&' } else { '?' };
        format!("{path}{separator}{query}")
    }

    fn sent(
        &self,
        bearer: Option<String>,
        correlation: &Option<String>,
        place: &[String],
    ) -> Vec<(&'static str, String)> {
        let mut names = ["icp-instance", "bluemix-instance"];
        let Headers { bluemix, representation, key_ring, .. } = self.headers();
        if *bluemix {
            names.reverse();
        }
        let mut headers: Vec<_> = names.into_iter().zip(place.iter().cloned()).collect();
        headers.extend(bearer.map(|token| ("authorization", format!("Bearer {token}"))));
        headers.extend(correlation.clone().map(|id| ("correlation-id", id)));
        if *representation {
            headers.push(("prefer", "return=representation".into()));
        }
        if let Some(default) = key_ring {
            headers.push(("x-kms-key-ring", if *default { "default" } else { "mine" }.into()));
        }
        headers
    }

    fn headers(&self) -> &Headers {
        const USUAL: &Headers = &Headers {
            bluemix: false,
            ingress: false,
            representation: false,
            correlation: None,
            key_ring: None,
        };
        self.headers.0.as_ref().unwrap_or(USUAL)
    }

    /// What fits the route.
    fn body(&self, world: &mut World<'_>, action: Action, place: &[String], id: &str) -> Value {
        let body = &self.body;
        match action {
            Action::CreateKey => new_key(world, body, place),
            Action::Wrap => wrap(world, body),
            Action::Unwrap => unwrap(world, body, id),
            Action::RotateKey => match &body.material.0 {
                Some(length) => json!({"payload": STANDARD.encode(world.secret(length.bytes()))}),
                None => Value::Null,
            },
            Action::CreateInstance => json!({"name": name(world, &body.name, "instance")}),
            Action::CreateServiceId | Action::CreatePolicy => self.granted(world, action),
            Action::CreateApiKey => json!({
                "name": name(world, &body.name, "key"),
                "service_id": world.id(Kind::ServiceId, body.owner),
            }),
            Action::CreateProfile => json!({
                "name": name(world, &body.name, "profile"),
                "service_id": world.id(Kind::ServiceId, body.owner),
                "issuer": OTHER_ISSUER,
                "subject": "somebody",
            }),
            Action::RotateApiKey => match body.overlap {
                Some(seconds) => json!({"overlap_seconds": u32::from(seconds) * 16}),
                None => Value::Null,
            },
            _ => Value::Null,
        }
    }

    /// A role, and where it holds.
    fn granted(&self, world: &mut World<'_>, action: Action) -> Value {
        let body = &self.body;
        let role = Role::ALL[usize::from(body.role) % Role::ALL.len()];
        let mut said = Map::from_iter([("role".into(), json!(role.name()))]);
        let key = body.of_key.0.map(|any| world.id(Kind::Key, any));
        let scope = place(world, body.scope.0.as_ref(), key.as_deref().unwrap_or_default());
        if let [instance] = &scope[..] {
            said.insert("instance_id".into(), json!(instance));
        }
        if let Some(key) = key {
            said.insert("key_id".into(), json!(key));
        }
        let (member, value) = match action {
            Action::CreatePolicy => ("service_id", world.id(Kind::ServiceId, body.owner)),
            _ => ("name", name(world, &body.name, "somebody")),
        };
        said.insert(member.into(), json!(value));
        said.into()
    }

    fn bent(&self, body: Value) -> Vec<u8> {
        let mut bytes = if body.is_null() { Vec::new() } else { body.to_string().into_bytes() };
        match &self.bend.0 {
            None => {}
            Some(Bend::Empty) => bytes.clear(),
            Some(Bend::Cut(at)) => bytes.truncate(usize::from(*at)),
            Some(Bend::Byte(at, value)) => {
                let at = usize::from(*at) % bytes.len().max(1);
                if let Some(byte) = bytes.get_mut(at) {
                    *byte = *value;
                }
            }
            Some(Bend::Member(name)) => match body {
                Value::Object(mut members) => {
                    members.insert(name.clone(), json!(1));
                    bytes = Value::from(members).to_string().into_bytes();
                }
                _ => bytes = json!({ name: 1 }).to_string().into_bytes(),
            },
            Some(Bend::Bytes(others)) => bytes = others.clone(),
        }
        bytes
    }
}

/// What an id names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Key,
    ServiceId,
    Policy,
    ApiKey,
    Profile,
}

impl Kind {
    fn of(route: &Route) -> Kind {
        match route.action {
            Action::DeleteServiceId => Kind::ServiceId,
            Action::DeletePolicy => Kind::Policy,
            Action::DeleteProfile => Kind::Profile,
            _ if route.path.starts_with("/v1/apikeys") => Kind::ApiKey,
            _ => Kind::Key,
        }
    }

    fn next(self) -> Kind {
        match self {
            Kind::Key => Kind::ApiKey,
            Kind::ApiKey => Kind::Policy,
            Kind::Policy => Kind::ServiceId,
            Kind::ServiceId | Kind::Profile => Kind::Key,
        }
    }
}

fn new_key(world: &mut World<'_>, body: &Body, place: &[String]) -> Value {
    let theirs = matches!(place, [one] if *one == world.theirs.to_string());
    let usual = if theirs { "of-theirs" } else { "of-mine" };
    let mut key = Map::from_iter([
        ("type".into(), json!("application/vnd.ibm.kms.key+json")),
        ("extractable".into(), json!(false)),
        ("name".into(), json!(name(world, &body.name, usual))),
    ]);
    if let Some(length) = &body.material.0 {
        let material = world.secret(length.bytes());
        key.insert("payload".into(), json!(STANDARD.encode(material)));
    }
    if let Some(seconds) = body.expires.0 {
        key.insert("expirationDate".into(), json!(world.in_seconds(seconds.into())));
    }
    json!({"resources": [key]})
}

fn wrap(world: &mut World<'_>, body: &Body) -> Value {
    let mut said = Map::new();
    if let Some(length) = &body.dek {
        said.insert("plaintext".into(), json!(STANDARD.encode(world.secret(length.bytes()))));
    }
    if let Some(numbers) = &body.aad.0 {
        said.insert("aad".into(), json!(aad(numbers)));
    }
    if said.is_empty() { Value::Null } else { said.into() }
}

fn unwrap(world: &World<'_>, body: &Body, id: &str) -> Value {
    let key = canonical(id).filter(|_| body.any_wdek.0.is_none());
    match (world.wdek(key, body.wdek), &body.other_aad.0) {
        (None, _) => json!({"ciphertext": STANDARD.encode("{}")}),
        (Some(wdek), None) => json!({"ciphertext": wdek.text, "aad": wdek.aad}),
        (Some(wdek), Some(other)) => json!({"ciphertext": wdek.text, "aad": aad(other)}),
    }
}

/// What names the instance of a request or a policy: none, one or two.
fn place(world: &World<'_>, place: Option<&Place>, id: &str) -> Vec<String> {
    let key = world.keys.iter().find(|key| key.id.to_string() == id);
    match place {
        None => vec![key.map_or(world.mine, |key| key.instance).to_string()],
        Some(Place::First) => vec![world.mine.to_string()],
        Some(Place::Second) => vec![world.theirs.to_string()],
        Some(Place::None) => Vec::new(),
        Some(Place::Both) => vec![world.mine.to_string(), world.theirs.to_string()],
        Some(Place::Key(any)) => vec![world.id(Kind::Key, *any)],
        Some(Place::Text(text)) => vec![visible(text)],
    }
}

fn aad(numbers: &[u8]) -> Vec<String> {
    numbers.iter().take(130).map(|number| "x".repeat(usize::from(*number))).collect()
}

fn name(world: &World<'_>, name: &Rarely<Name>, usual: &str) -> String {
    match &name.0 {
        None => format!("{usual}-{:08}", world.number()),
        Some(Name::None) => String::new(),
        Some(Name::Long(chars)) => "n".repeat(usize::from(*chars)),
        Some(Name::Text(text)) => text.clone(),
    }
}

/// The letters of it that may stand in one segment of a path, or in a query: others are for the HTTP library to refuse.
fn in_path(text: &str) -> String {
    let stands = |c: &char| c.is_ascii_alphanumeric() || "-._~!$&'()*+,;=:@".contains(*c);
    text.chars().filter(stands).collect()
}

/// The letters of it that may stand in a header.
fn visible(text: &str) -> String {
    text.chars().filter(char::is_ascii_graphic).collect()
}

fn bent(token: &str, at: u16) -> String {
    let mut letters = token.as_bytes().to_vec();
    let at = usize::from(at) % letters.len();
    letters[at] = if letters[at] == b'A' { b'B' } else { b'A' };
    String::from_utf8_lossy(&letters).into_owned()
}

fn canonical(id: &str) -> Option<Uuid> {
    let bare = id.split_once('-').filter(|(prefix, _)| prefix.len() != 8).map_or(id, |(_, id)| id);
    Uuid::try_parse(bare).ok().filter(|id| id.to_string() == bare)
}
