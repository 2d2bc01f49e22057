//! The token service: an API key for a token, and the key that tokens are checked with.

use super::problem::Problem;
use super::{Answer, body};
use crate::app::App;
use crate::ops::issue_token::issue_token;
use http::{Request, StatusCode};
use hyper::body::Incoming;
use kms_api::rest::{API_KEY_GRANT, TokenAnswer};
use kms_core::secret::SecretText;

const JSON: &str = "application/json";

/// Form members come in any order; unknown ones and a Basic header are ignored.
pub(super) async fn issue(
    app: &App,
    request: Request<Incoming>,
    correlation: Option<String>,
) -> Result<Answer, Problem> {
    let body = body::read(request).await?;
    let api_key = api_key(body.as_slice())?;
    let issued = issue_token(app, &api_key, correlation).await?;
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

pub(super) fn signing_keys(app: &App) -> Answer {
    let keys = serde_json::json!({ "keys": [app.issuer.jwk()] });
    Answer::json(StatusCode::OK, JSON, &keys)
}

/// The API key in the form `body` of a token request.
fn api_key(body: &[u8]) -> Result<SecretText, Problem> {
    let (mut grant, mut api_key) = (None, None);
    for (name, value) in form_urlencoded::parse(body) {
        match &*name {
            "grant_type" if grant.is_none() => grant = Some(value.into_owned()),
            "apikey" if api_key.is_none() => api_key = Some(SecretText::new(value.into_owned())),
            // One member twice: nobody can say which was meant.
            "grant_type" | "apikey" => {
                return Err(Problem::BadBody(format!("{name} is there twice")));
            }
            _ => {}
        }
    }
    match grant.as_deref() {
        None | Some("") => return Err(Problem::MissingProperty("grant_type")),
        Some(API_KEY_GRANT) => {}
        Some(_) => return Err(Problem::UnknownGrant),
    }
    api_key.filter(|key| !key.is_empty()).ok_or(Problem::MissingProperty("apikey"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_forms_of_the_clients_are_read() {
        for form in [
            "grant_type=urn:ibm:params:oauth:grant-type:apikey&apikey=k-1&response_type=cloud_iam",
            "response_type=cloud_iam&uaa_client_id=cf&uaa_client_secret=&\
             grant_type=urn%3Aibm%3Aparams%3Aoauth%3Agrant-type%3Aapikey&apikey=k-1",
        ] {
            assert_eq!(api_key(form.as_bytes()).unwrap().expose(), "k-1");
        }
    }

    #[test]
    fn what_is_missing_is_named_and_other_grants_are_refused() {
        assert!(matches!(api_key(b"apikey=k"), Err(Problem::MissingProperty("grant_type"))));
        let grant = format!("grant_type={API_KEY_GRANT}");
        assert!(matches!(api_key(grant.as_bytes()), Err(Problem::MissingProperty("apikey"))));
        let empty = format!("{grant}&apikey=");
        assert!(matches!(api_key(empty.as_bytes()), Err(Problem::MissingProperty("apikey"))));
        let twice = format!("{grant}&apikey=a&apikey=b");
        assert!(matches!(api_key(twice.as_bytes()), Err(Problem::BadBody(_))));
        assert!(matches!(api_key(b"grant_type=password&username=u"), Err(Problem::UnknownGrant)));
    }
}
