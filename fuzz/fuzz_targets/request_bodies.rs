//! Any body for every route of both ports, by somebody who may do everything: an answer that blames the caller, never a
//! panic, and never the answer of a server that broke.
#![no_main]

#[path = "../asked.rs"]
mod asked;

use kms_server::http::{KEY_ROUTES, MANAGEMENT_ROUTES, Route};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((&choice, body)) = data.split_first() else { return };
    let choice = usize::from(choice) % (KEY_ROUTES.len() + MANAGEMENT_ROUTES.len() + 1);
    let of_key_api = KEY_ROUTES.get(choice);
    let (method, path) = match of_key_api {
        Some(Route { method, path, .. }) => (*method, format!("/api/v2{path}")),
        None => match MANAGEMENT_ROUTES.get(choice - KEY_ROUTES.len()) {
            Some(Route { method, path, .. }) => (*method, (*path).to_owned()),
            None => ("POST", "/oidc/token".to_owned()),
        },
    };
    asked::with(asked::LIFE, |asked| {
        let (path, headers) = (path.replace("{id}", &asked.key), asked.headers());
        let len = body.len();
        let head = format!("{method} {path} HTTP/1.1\r\n{headers}\r\ncontent-length: {len}\r\n\r\n");
        let request = [head.as_bytes(), body].concat();
        if of_key_api.is_some() { asked.keys(&request) } else { asked.tokens(&request) };
    });
});
