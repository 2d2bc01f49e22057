//! The header of anybody who may call: refused, or read as one that reads the same when it is handed on.
#![no_main]

use kms_api::trace::TraceParent;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Some(read) = TraceParent::parse(text) {
        assert_eq!(TraceParent::parse(&read.to_string()), Some(read));
        assert_eq!(read.child([1; 8]).trace_id(), read.trace_id());
    }
});
