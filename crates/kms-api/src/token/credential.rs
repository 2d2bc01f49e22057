//! What a token is got with: an API key, or the token of a service account, read where it lies and put into a form.
//! Nothing is kept here: a file may hold something else a minute later.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;
use kms_core::secret::SecretText;
use serde::Deserialize;
use zeroize::Zeroizing;

use crate::client::Error;
use crate::client::https::WipedBuffer;
use crate::rest::{API_KEY_GRANT, CR_TOKEN_GRANT};

/// A real API key has 44 characters.
const MAX_API_KEY: usize = 4096;
/// A service account's token has about 1,000 bytes; kms-server takes none that is longer than this.
const MAX_CR_TOKEN: usize = 16 * 1024;

/// How somebody proves who they are. Files are read anew for each token, so a changed one needs no restart; white space
/// around their content is ignored.
#[derive(Debug, Clone)]
pub enum Credential {
    ApiKey(SecretText),
    ApiKeyFile(PathBuf),
    /// A token that another issuer made and somebody keeps fresh in this file, as kubelet does for a service account.
    CrTokenFile {
        path: PathBuf,
        profile: Profile,
    },
}

/// The profile that trusts such a token: its id, its name, or both.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Profile {
    pub id: Option<String>,
    pub name: Option<String>,
}

/// A credential as it is at this moment.
pub(super) struct Shown {
    /// The body of the request for a token.
    pub(super) form: WipedBuffer,
    /// Where it is another issuer's token.
    pub(super) foreign: Option<Foreign>,
}

/// The token that lay in a file.
pub(super) struct Foreign {
    path: PathBuf,
    /// By its own word.
    ends: Option<SystemTime>,
}

/// kms-server's answer to a token that is not genuine, or not now; one that is and may do nothing gets another.
const INVALID_TOKEN: &str = "BXNIM0407E";

impl Credential {
    /// # Errors
    /// `ApiKeyFile`, `CrTokenFile`.
    pub(super) fn show(&self) -> Result<Shown, Error> {
        match self {
            Credential::ApiKey(key) => Ok(Shown::api_key(key)),
            Credential::ApiKeyFile(path) => match read_file(path, MAX_API_KEY) {
                Ok(key) => Ok(Shown::api_key(&key)),
                Err(cause) => Err(Error::ApiKeyFile { path: shown(path), cause }),
            },
            Credential::CrTokenFile { path, profile } => match read_file(path, MAX_CR_TOKEN) {
                Ok(token) => Ok(Shown::cr_token(path, &token, profile)),
                Err(cause) => Err(Error::CrTokenFile { path: shown(path), cause }),
            },
        }
    }
}

impl Shown {
    fn api_key(key: &SecretText) -> Shown {
        let members = [("response_type", Some("cloud_iam")), ("apikey", Some(key.expose()))];
        Shown { form: form(API_KEY_GRANT, &members), foreign: None }
    }

    fn cr_token(path: &Path, token: &SecretText, profile: &Profile) -> Shown {
        let members = [
            ("profile_id", profile.id.as_deref()),
            ("profile_name", profile.name.as_deref()),
            ("cr_token", Some(token.expose())),
        ];
        let ends = expiry(token.expose())
            .and_then(|seconds| UNIX_EPOCH.checked_add(Duration::from_secs(seconds)));
        let foreign = Some(Foreign { path: path.to_owned(), ends });
        Shown { form: form(CR_TOKEN_GRANT, &members), foreign }
    }
}

impl Foreign {
    /// What the token service's refusal means. That a token is not good now says nothing about what its owner may do: it
    /// was not replaced in time, or the token service has a wrong clock or the issuer's keys of yesterday. Such an outage
    /// must not end what all plug-ins of the token service hold in memory.
    pub(super) fn explain(&self, refusal: Error, now: SystemTime) -> Error {
        if !matches!(&refusal, Error::Iam { code, .. } if code == INVALID_TOKEN) {
            return refusal;
        }
        let cause = match self.ends.and_then(|ends| now.duration_since(ends).ok()) {
            Some(since) => {
                format!("the token in it ended {} s ago and was not replaced", since.as_secs())
            }
            None => format!(
                "{refusal}. Is it of a trusted issuer and for the right audience, are the clocks right, and has the token \
                 service the issuer's present keys?"
            ),
        };
        Error::CrTokenFile { path: shown(&self.path), cause }
    }
}

/// The `exp` of a token, in seconds since 1970, which nobody has proved. Anything else than a JWT has none.
pub fn expiry(token: &str) -> Option<u64> {
    #[derive(Deserialize)]
    struct Claims {
        exp: u64,
    }
    let claims = BASE64URL.decode(token.split('.').nth(1)?).map(Zeroizing::new).ok()?;
    serde_json::from_slice(&claims).ok().map(|Claims { exp }| exp)
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

fn read_file(path: &Path, most: usize) -> Result<SecretText, String> {
    let mut text = Zeroizing::new(String::with_capacity(most + 1));
    let file = std::fs::File::open(path).map_err(|error| error.to_string())?;
    let limit = u64::try_from(most).unwrap_or(u64::MAX).saturating_add(1);
    file.take(limit).read_to_string(&mut text).map_err(|error| error.to_string())?;
    match text.trim() {
        "" => Err("it is empty".to_owned()),
        _ if text.len() > most => Err(format!("it is longer than {most} bytes")),
        content => Ok(SecretText::new(content.to_owned())),
    }
}

fn form(grant: &str, members: &[(&str, Option<&str>)]) -> WipedBuffer {
    let mut form = WipedBuffer::with_capacity(256);
    form.push(b"grant_type=");
    push_escaped(&mut form, grant);
    for (name, value) in members {
        let Some(value) = value else { continue };
        form.push(b"&");
        form.push(name.as_bytes());
        form.push(b"=");
        push_escaped(&mut form, value);
    }
    form
}

fn push_escaped(form: &mut WipedBuffer, text: &str) {
    const HEX: &[u8; 16] = b"0123456789ABCDEF";
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            form.push(&[byte]);
        } else {
            form.push(&[b'%', HEX[usize::from(byte >> 4)], HEX[usize::from(byte & 15)]]);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn text(shown: Shown) -> String {
        String::from_utf8(shown.form.into_bytes().to_vec()).unwrap()
    }

    fn token(claims: &str) -> String {
        format!("eyJhbGciOiJSUzI1NiJ9.{}.c2ln", BASE64URL.encode(claims))
    }

    #[test]
    fn what_is_shown_is_escaped_in_the_form() {
        let key = Credential::ApiKey(SecretText::new("a+b&c=d/é".to_owned()));
        assert_eq!(
            text(key.show().unwrap()),
            "grant_type=urn%3Aibm%3Aparams%3Aoauth%3Agrant-type%3Aapikey\
             &response_type=cloud_iam&apikey=a%2Bb%26c%3Dd%2F%C3%A9"
        );
        let profile = Profile { id: None, name: Some("node & co".to_owned()) };
        let shown =
            Shown::cr_token("f".as_ref(), &SecretText::new("eyJ.a-b_c.x".to_owned()), &profile);
        assert_eq!(
            text(shown),
            "grant_type=urn%3Aibm%3Aparams%3Aoauth%3Agrant-type%3Acr-token\
             &profile_name=node%20%26%20co&cr_token=eyJ.a-b_c.x"
        );
    }

    #[test]
    fn a_token_that_is_not_good_now_is_no_refusal_of_its_owner() {
        let ended = |now: u64, error: Error| {
            let token = SecretText::new(token(r#"{"exp":1000}"#));
            let shown = Shown::cr_token("f".as_ref(), &token, &Profile::default());
            shown.foreign.unwrap().explain(error, UNIX_EPOCH + Duration::from_secs(now))
        };
        let refusal = |status: u16, code: &str| Error::Iam {
            status,
            code: code.into(),
            message: "no".into(),
        };
        for (now, cause) in [
            (1007, "the token in it ended 7 s ago and was not replaced"),
            (
                999,
                "BXNIM0407E:no. Is it of a trusted issuer and for the right audience, are the clocks right, and has the token \
                 service the issuer's present keys?",
            ),
        ] {
            let outage = ended(now, refusal(400, "BXNIM0407E"));
            assert!(outage.is_outage() && !outage.is_refusal(), "{outage:?}");
            let text = format!("the service account's token in f cannot be used: {cause}");
            assert_eq!(outage.to_string(), text);
        }
        let refused = refusal(403, "BXNIM0513E");
        assert_eq!(ended(999, refused.clone()), refused, "no profile trusts its owner");
        assert_eq!(ended(1007, refused.clone()), refused);
        let away = Error::TimedOut { what: "the token service".into() };
        assert_eq!(ended(1007, away.clone()), away);
    }

    #[test]
    fn a_token_that_tells_no_time_has_no_end() {
        for token in ["", "eyJ", "a.b", "..", &token("{}"), &token(r#"{"exp":-1}"#)] {
            assert_eq!(expiry(token), None, "{token}");
        }
        let never = SecretText::new(token(&format!(r#"{{"exp":{}}}"#, u64::MAX)));
        let shown = Shown::cr_token("f".as_ref(), &never, &Profile::default());
        assert!(shown.foreign.unwrap().ends.is_none());
    }

    #[test]
    fn a_file_that_is_too_long_is_not_cut() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "k".repeat(MAX_API_KEY + 1)).unwrap();
        let error = read_file(file.path(), MAX_API_KEY).unwrap_err();
        assert_eq!(error, "it is longer than 4096 bytes");
        std::fs::write(file.path(), "k".repeat(MAX_API_KEY)).unwrap();
        assert_eq!(read_file(file.path(), MAX_API_KEY).unwrap().expose().len(), MAX_API_KEY);
    }

    proptest! {
        #[test]
        fn any_text_has_an_end_or_none(text: String) {
            let _ = expiry(&text);
            let _ = expiry(&token(&text));
        }

        #[test]
        fn the_end_that_a_token_names_is_found(exp: u64, more: String) {
            let claims = serde_json::json!({"exp": exp, "sub": more}).to_string();
            prop_assert_eq!(expiry(&token(&claims)), Some(exp));
        }
    }
}
