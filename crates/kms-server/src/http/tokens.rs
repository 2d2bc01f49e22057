//! The token service: an API key or another issuer's token for a token of ours, and the key that tokens are checked with.

use super::body::{self, Body};
use super::problem::Problem;
use super::{Answer, auth};
use crate::app::App;
use crate::ops::issue_token::{Login, ProfileName, issue_token, trade_token};
use crate::ops::{Error, Origin, refused};
use crate::token::Issued;
use http::{Request, StatusCode};
use hyper::body::Incoming;
use kms_api::rest::{API_KEY_GRANT, CR_TOKEN_GRANT, JWT_BEARER_GRANT, TokenAnswer};
use kms_core::secret::SecretText;

const JSON: &str = "application/json";

/// Form members come in any order; unknown ones and a Basic header are ignored.
pub(super) async fn issue(
    app: &App,
    request: Request<Incoming>,
    origin: Origin,
) -> Result<Answer, Problem> {
    let body = body::read(request.into_body()).await?;
    app.limits.login(answer(app, body, origin)).await?
}

async fn answer(app: &App, body: Body, origin: Origin) -> Result<Answer, Problem> {
    let issued = match log_in(app, body.as_slice(), origin.clone()).await {
        Ok(issued) => issued,
        Err(problem) => {
            if let Problem::Op(error) = &problem {
                refused::login(app, error, problem.code(), origin).await?;
            }
            return Err(problem);
        }
    };
    let answer = TokenAnswer {
        access_token: issued.token,
        refresh_token: Some(SecretText::new("not_supported".into())),
        token_type: "Bearer".into(),
        expires_in: issued.expires_in,
        expiration: issued.expiration,
        scope: "ibm openid".into(),
    };
    Ok(Answer::json(StatusCode::OK, JSON, &answer))
}

async fn log_in(app: &App, body: &[u8], origin: Origin) -> Result<Issued, Problem> {
    Ok(match Asked::read(body)? {
        Asked::ApiKey(api_key) => issue_token(app, &api_key, origin).await?,
        Asked::Login(login) => trade_token(app, login, origin).await?,
    })
}

pub(super) fn signing_keys(app: &App) -> Answer {
    let keys = serde_json::json!({ "keys": [app.issuer.jwk()] });
    Answer::json(StatusCode::OK, JSON, &keys)
}

/// What a token request shows.
#[derive(Debug)]
enum Asked {
    ApiKey(SecretText),
    Login(Login),
}

impl Asked {
    /// # Errors
    /// `MissingProperty`, `UnknownGrant`, `BadBody`.
    fn read(body: &[u8]) -> Result<Asked, Problem> {
        let form = Form::read(body)?;
        match form.text("grant_type") {
            None => Err(Problem::MissingProperty("grant_type")),
            Some(API_KEY_GRANT) => Ok(Asked::ApiKey(form.required("apikey")?)),
            Some(CR_TOKEN_GRANT) => form.login(CR_TOKEN_GRANT, "cr_token"),
            Some(JWT_BEARER_GRANT) => form.login(JWT_BEARER_GRANT, "assertion"),
            Some(_) => Err(Problem::UnknownGrant),
        }
    }
}

/// The members of a form that mean something here, each once.
#[derive(Debug, Default)]
struct Form(Vec<(&'static str, SecretText)>);

impl Form {
    const MEMBERS: [&str; 6] =
        ["grant_type", "apikey", "cr_token", "assertion", "profile_id", "profile_name"];

    fn read(body: &[u8]) -> Result<Form, Problem> {
        let mut form = Form::default();
        for (name, value) in form_urlencoded::parse(body) {
            let Some(name) = Form::MEMBERS.into_iter().find(|known| *known == name) else {
                continue;
            };
            if form.0.iter().any(|(there, _)| *there == name) {
                // Nobody can say which was meant.
                return Err(Problem::BadBody(format!("{name} is there twice")));
            }
            form.0.push((name, SecretText::new(value.into_owned())));
        }
        Ok(form)
    }

    /// An empty member is none.
    fn find(&self, name: &str) -> Option<&SecretText> {
        let found = self.0.iter().find(|(there, _)| *there == name);
        found.map(|(_, value)| value).filter(|value| !value.is_empty())
    }

    fn text(&self, name: &str) -> Option<&str> {
        self.find(name).map(SecretText::expose)
    }

    fn required(&self, name: &'static str) -> Result<SecretText, Problem> {
        self.find(name).cloned().ok_or(Problem::MissingProperty(name))
    }

    /// Whoever names no profile would depend on how many fit, and so on what the administrators of other instances make.
    fn login(&self, grant: &'static str, member: &'static str) -> Result<Asked, Problem> {
        let profile = self.profile()?;
        if profile == ProfileName::default() {
            return Err(Problem::MissingProperty("profile_id or profile_name"));
        }
        Ok(Asked::Login(Login { grant, token: self.required(member)?, profile }))
    }

    /// A profile that cannot be one gets the answer of one that does not exist.
    fn profile(&self) -> Result<ProfileName, Problem> {
        let bare = |text: &str| auth::uuid(text.strip_prefix("Profile-").unwrap_or(text));
        let id = self.text("profile_id").map(|text| bare(text).ok_or(Error::NotTrusted));
        let name = self.text("profile_name").map(str::to_owned);
        Ok(ProfileName { id: id.transpose()?, name })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn api_key(form: &str) -> Result<String, Problem> {
        match Asked::read(form.as_bytes())? {
            Asked::ApiKey(key) => Ok(key.expose().to_owned()),
            Asked::Login(login) => panic!("{login:?}"),
        }
    }

    fn login(form: &str) -> Result<(String, ProfileName), Problem> {
        match Asked::read(form.as_bytes())? {
            Asked::ApiKey(_) => panic!("no login"),
            Asked::Login(login) => Ok((login.token.expose().to_owned(), login.profile)),
        }
    }

    #[test]
    fn the_forms_of_the_clients_are_read() {
        for form in [
            "grant_type=urn:ibm:params:oauth:grant-type:apikey&apikey=k-1&response_type=cloud_iam",
            "response_type=cloud_iam&uaa_client_id=cf&uaa_client_secret=&\
             grant_type=urn%3Aibm%3Aparams%3Aoauth%3Agrant-type%3Aapikey&apikey=k-1",
        ] {
            assert_eq!(api_key(form).unwrap(), "k-1");
        }
        let id = "00000000-0000-4000-8000-000000000001";
        let form =
            format!("grant_type={CR_TOKEN_GRANT}&cr_token=a.b.c&profile_id=Profile-{id}&scope=");
        let wanted = ProfileName { id: Some(id.parse().unwrap()), name: None };
        assert_eq!(login(&form).unwrap(), ("a.b.c".to_owned(), wanted));
        let form = format!("profile_name=node&cr_token=a.b.c&grant_type={CR_TOKEN_GRANT}&apikey=");
        let wanted = ProfileName { id: None, name: Some("node".into()) };
        assert_eq!(login(&form).unwrap(), ("a.b.c".to_owned(), wanted));
        let form = format!("grant_type={JWT_BEARER_GRANT}&assertion=a.b.c&profile_name=node");
        let wanted = ProfileName { id: None, name: Some("node".into()) };
        assert_eq!(login(&form).unwrap(), ("a.b.c".to_owned(), wanted));
    }

    #[test]
    fn what_is_missing_is_named_and_other_grants_are_refused() {
        assert!(matches!(api_key("apikey=k"), Err(Problem::MissingProperty("grant_type"))));
        let grant = format!("grant_type={API_KEY_GRANT}");
        assert!(matches!(api_key(&grant), Err(Problem::MissingProperty("apikey"))));
        let empty = format!("{grant}&apikey=");
        assert!(matches!(api_key(&empty), Err(Problem::MissingProperty("apikey"))));
        let twice = format!("{grant}&apikey=a&apikey=b");
        assert!(matches!(api_key(&twice), Err(Problem::BadBody(_))));
        let password = "grant_type=password&username=u";
        assert!(matches!(api_key(password), Err(Problem::UnknownGrant)));
        let grant = format!("grant_type={CR_TOKEN_GRANT}&profile_name=node");
        assert!(matches!(login(&grant), Err(Problem::MissingProperty("cr_token"))));
        for nobody in [
            format!("grant_type={CR_TOKEN_GRANT}&cr_token=a.b.c"),
            format!("grant_type={JWT_BEARER_GRANT}&assertion=a.b.c&profile_id="),
        ] {
            assert!(matches!(login(&nobody), Err(Problem::MissingProperty(_))));
        }
        let no_id = format!("{grant}&cr_token=a.b.c&profile_id=me");
        assert!(matches!(login(&no_id), Err(Problem::Op(Error::NotTrusted))));
    }
}
