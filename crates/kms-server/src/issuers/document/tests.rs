use super::*;
use proptest::prelude::*;
use serde_json::{Value, json};

const ISSUER: &str = "https://issuer.test";

fn modulus(bytes: usize) -> String {
    BASE64URL.encode(vec![0xC5; bytes])
}

fn rsa(kid: &str) -> Value {
    json!({"kty": "RSA", "kid": kid, "n": modulus(256), "e": "AQAB"})
}

fn keys(keys: &[Value]) -> Result<Keys, DocumentError> {
    Keys::parse(json!({ "keys": keys }).to_string().as_bytes())
}

fn with(mut key: Value, name: &str, value: Value) -> Value {
    key[name] = value;
    key
}

#[test]
fn a_discovery_document_speaks_for_its_own_issuer_only() {
    let read = |issuer: &str, uri: &str| {
        let text = json!({"issuer": issuer, "jwks_uri": uri, "other": [1, 2]}).to_string();
        jwks_uri(text.as_bytes(), ISSUER)
    };
    assert_eq!(read(ISSUER, "https://a/keys").unwrap(), "https://a/keys");
    for other in ["https://issuer.test/", "https://ISSUER.test", "http://issuer.test", ""] {
        assert!(matches!(read(other, "https://a/keys"), Err(DocumentError::OtherIssuer { .. })));
    }
    for uri in ["http://a/keys", "file:///etc/keys", "//a/keys", ""] {
        assert_eq!(read(ISSUER, uri), Err(DocumentError::NotHttps));
    }
}

#[test]
fn a_key_is_good_for_one_algorithm() {
    let read = keys(&[rsa("a"), with(rsa("b"), "alg", json!("PS384"))]).unwrap();
    assert!(read.find("a").unwrap().names("RS256") && read.find("b").unwrap().names("PS384"));
    for other in ["RS384", "PS256", "HS256", "none", "rs256", ""] {
        assert!(!read.find("a").unwrap().names(other), "{other}");
    }
    assert!(read.find("c").is_none());
}

#[test]
fn keys_of_other_kinds_are_passed_over() {
    let short = json!({"kty": "RSA", "kid": "k", "n": modulus(128), "e": "AQAB"});
    let padded = json!({"kty": "RSA", "kid": "k", "n": BASE64URL.encode([0; 256]), "e": "AQAB"});
    let curve = json!({"kty": "EC", "kid": "k", "crv": "P-256", "x": "AA", "y": "AA"});
    for other in [
        json!({"kty": "oct", "kid": "k", "k": "c2VjcmV0"}),
        json!({"kty": "RSA", "n": modulus(256), "e": "AQAB"}),
        with(rsa("k"), "use", json!("enc")),
        with(rsa("k"), "alg", json!("HS256")),
        with(rsa("k"), "alg", json!("ES256")),
        with(rsa("k"), "n", json!("not base64!")),
        with(rsa(""), "kid", json!("")),
        json!({"kty": "RSA", "kid": "k", "n": modulus(1025), "e": "AQAB"}),
        short,
        padded,
        curve,
    ] {
        assert_eq!(
            keys(std::slice::from_ref(&other)).unwrap_err(),
            DocumentError::NoKeys,
            "{other}"
        );
        assert!(keys(&[other, rsa("good")]).unwrap().find("k").is_none());
    }
}

#[test]
fn what_is_ambiguous_or_too_much_is_refused() {
    assert_eq!(keys(&[rsa("a"), rsa("a")]).unwrap_err(), DocumentError::TwoOfOneKid);
    let many: Vec<Value> = (0..65).map(|n| rsa(&n.to_string())).collect();
    assert_eq!(keys(&many).unwrap_err(), DocumentError::TooManyKeys);
    let long = vec![b' '; MAX_DOCUMENT + 1];
    assert_eq!(Keys::parse(&long).unwrap_err(), DocumentError::TooLong);
    assert!(matches!(Keys::parse(b"{\"keys\":[],\"keys\":[]}"), Err(DocumentError::Form(_))));
}

#[test]
fn a_service_account_is_the_same_in_both_places() {
    let claims = |sub: &str, kubernetes: Value| {
        let text = json!({"iss": ISSUER, "sub": sub, "exp": 1, "kubernetes.io": kubernetes});
        let token = format!("x.{}.x", BASE64URL.encode(text.to_string()));
        Claims::of(&token).unwrap().names_one_subject()
    };
    let account =
        json!({"namespace": "ns", "serviceaccount": {"name": "sa"}, "pod": {"name": "p"}});
    assert!(claims("system:serviceaccount:ns:sa", account.clone()));
    assert!(claims("somebody", Value::Null));
    for sub in ["system:serviceaccount:ns:other", "system:serviceaccount:kube-system:sa", "sa"] {
        assert!(!claims(sub, account.clone()), "{sub}");
    }
    assert!(!claims("system:serviceaccount:ns:sa", json!({"namespace": "ns"})));
    assert!(!claims("", Value::Null) && !claims(&"x".repeat(513), Value::Null));
}

proptest! {
    #[test]
    fn any_bytes_are_a_document_or_none(bytes: Vec<u8>) {
        let _ = jwks_uri(&bytes, ISSUER);
        let _ = Keys::parse(&bytes);
    }

    #[test]
    fn any_key_is_used_safely_or_not_at_all(
        kty in "RSA|EC|oct|[a-z]{0,3}", alg in proptest::option::of("RS256|ES256|HS256|none|[A-Z]{0,4}"),
        crv in "P-256|P-384|x", n in "[A-Za-z0-9_-]{0,400}", e in "[A-Za-z0-9_-]{0,8}",
    ) {
        let key = json!({"kty": kty, "kid": "k", "alg": alg, "crv": crv, "n": n, "e": e, "x": n, "y": e});
        if let Ok(keys) = keys(&[key]) {
            let name = format!("{:?}", keys.find("k").unwrap().algorithm());
            prop_assert!(!name.starts_with('H') && keys.find("k").unwrap().names(&name));
        }
    }

    #[test]
    fn any_token_has_a_header_and_claims_or_none(token in ".{0,300}", json in ".{0,200}") {
        let _ = (Header::of(&token), Claims::of(&token));
        let wrapped = format!("{0}.{0}.x", BASE64URL.encode(&json));
        let _ = (Header::of(&wrapped), Claims::of(&wrapped).map(|claims| claims.names_one_subject()));
    }
}
