//! Any sequence of requests, by callers with other rights, with good tokens and bad ones, in two instances, while time
//! goes by. Not only that nothing breaks: nobody gets what their policies do not give them, one tenant learns nothing of
//! another, what was wrapped opens and only as what it was, every use and every change is in the audit log, and no
//! secret is where it has no business (`sequence/rules.rs`).
#![no_main]

#[path = "../asked.rs"]
mod asked;
#[path = "../sequence/mod.rs"]
mod sequence;

use libfuzzer_sys::arbitrary::Unstructured;
use libfuzzer_sys::fuzz_target;

/// Longer ones find no more than several short ones, and take longer.
const STEPS: usize = 24;
/// Each sequence leaves two instances and half a dozen service IDs behind, among which the service then looks.
const LIFE: u32 = 100;

fuzz_target!(|data: &[u8]| {
    let mut input = Unstructured::new(data);
    let steps = std::iter::from_fn(|| (!input.is_empty()).then(|| input.arbitrary().ok())?);
    asked::with(LIFE, |service| sequence::run(service, steps.take(STEPS)));
});
