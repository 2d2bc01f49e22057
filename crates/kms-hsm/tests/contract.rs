//! The promises of the trait `Vault`, kept by every vault: the same cases for the one in memory
//! and for the one in SoftHSM2, and what only a real token can show.

#[cfg(test)]
#[path = "contract/cases.rs"]
mod cases;
#[cfg(test)]
#[path = "contract/recovery.rs"]
mod recovery;
#[cfg(test)]
#[path = "contract/token.rs"]
mod token;
#[cfg(test)]
#[path = "contract/token_cases.rs"]
mod token_cases;

use token::{block_on, with_token};

#[cfg(feature = "memory")]
#[test]
fn memory_keeps_the_contract() {
    block_on(async {
        for (name, case) in cases::all() {
            eprintln!("memory: {name}");
            case(std::sync::Arc::new(kms_hsm::memory::MemoryVault::new())).await;
        }
    });
}

#[test]
fn softhsm_keeps_the_contract() {
    with_token("softhsm_keeps_the_contract", |token| {
        let vault = std::sync::Arc::new(token.open());
        block_on(async {
            for (name, case) in cases::all() {
                eprintln!("SoftHSM2: {name}");
                case(vault.clone()).await;
            }
        });
    });
}

macro_rules! on_a_token {
    ($($module:ident :: $name:ident),+ $(,)?) => {
        $(#[test]
        fn $name() {
            with_token(stringify!($name), |token| block_on($module::$name(token)));
        })+
    };
}

on_a_token!(
    token_cases::keys_are_as_strong_as_they_were_ordered,
    token_cases::key_values_never_come_out,
    token_cases::half_a_version_is_reported_and_not_used,
    token_cases::two_objects_of_one_name_are_refused,
    token_cases::an_existing_token_is_not_initialised_again,
    token_cases::a_token_is_found_by_label_serial_and_slot,
    token_cases::settings_that_cannot_work_are_refused,
    token_cases::a_full_queue_says_busy,
    token_cases::a_call_that_does_not_return_is_not_waited_for,
    token_cases::a_creation_that_nobody_waits_for_leaves_nothing,
    recovery::closed_sessions_fail_no_request,
    recovery::a_logout_behind_our_back_fails_no_request,
    recovery::a_finalised_library_is_initialised_again,
    recovery::a_token_that_goes_and_returns_is_served_again,
    recovery::another_token_in_its_place_is_refused,
    recovery::a_token_whose_files_vanish_says_unavailable_not_absent,
    recovery::a_wrong_pin_is_tried_once,
    recovery::a_pin_that_was_changed_stops_the_vault,
    recovery::a_key_destroyed_elsewhere_is_not_found,
);
