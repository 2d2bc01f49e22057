//! Any bytes as a request body: only letters change, only their case, and JSON stays the JSON that it was but for the
//! names of its members.
#![no_main]

use libfuzzer_sys::fuzz_target;
use serde_json::Value;
use std::collections::BTreeSet;

fuzz_target!(|data: &[u8]| {
    let mut lowered = data.to_vec();
    kms_server::http::body::lower_names(&mut lowered);
    assert!(lowered.eq_ignore_ascii_case(data));
    let Ok(before) = serde_json::from_slice::<Value>(data) else { return };
    let after = serde_json::from_slice::<Value>(&lowered).expect("still JSON");
    // Two names that became one hide a value; no value may be new.
    assert!(strings(&after).is_subset(&strings(&before)));
});

/// All values that are strings.
fn strings(value: &Value) -> BTreeSet<&str> {
    let mut found = BTreeSet::new();
    collect(value, &mut found);
    found
}

fn collect<'v>(value: &'v Value, found: &mut BTreeSet<&'v str>) {
    match value {
        Value::String(text) => {
            found.insert(text);
        }
        Value::Array(values) => values.iter().for_each(|one| collect(one, found)),
        Value::Object(members) => members.values().for_each(|one| collect(one, found)),
        _ => {}
    }
}
