//! The promises of the trait `Vault`, kept by every vault: the same cases for the one in memory and
//! for those in SoftHSM2 and Kryoptic, and what only a real token can show.

#[cfg(test)]
#[path = "contract/cases.rs"]
mod cases;
#[cfg(test)]
#[path = "contract/codes.rs"]
mod codes;
#[cfg(test)]
#[path = "contract/faults.rs"]
mod faults;
#[cfg(test)]
#[path = "contract/isolated.rs"]
mod isolated;
#[cfg(test)]
#[path = "contract/recovery.rs"]
mod recovery;
#[cfg(test)]
#[path = "contract/shim.rs"]
mod shim;
#[cfg(test)]
#[path = "contract/statistics.rs"]
mod statistics;
#[cfg(test)]
#[path = "contract/token.rs"]
mod token;
#[cfg(test)]
#[path = "contract/token_cases.rs"]
mod token_cases;

#[cfg(test)]
#[path = "contract/vendors.rs"]
mod vendors;

use token::{Model, block_on, with_token};

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

fn keeps_the_contract(model: Model, name: &str) {
    with_token(model, name, |token| {
        let vault = std::sync::Arc::new(token.open());
        block_on(async {
            for (name, case) in cases::all() {
                eprintln!("{model:?}: {name}");
                case(vault.clone()).await;
            }
        });
    });
}

#[test]
fn a_vault_in_another_process_keeps_the_contract() {
    with_token(Model::SoftHsm, "a_vault_in_another_process_keeps_the_contract", |token| {
        block_on(async {
            let vault = std::sync::Arc::new(isolated::open(token.settings()));
            for (name, case) in cases::all() {
                eprintln!("isolated: {name}");
                case(vault.clone()).await;
            }
        });
    });
}

/// A module of tests on tokens of one model: the contract, and each of the cases named.
macro_rules! on {
    ($model:ident, $place:ident: $($module:ident :: $name:ident),+ $(,)?) => {
        mod $place {
            use super::*;

            #[test]
            fn keeps_the_contract() {
                let name = concat!(stringify!($place), "::keeps_the_contract");
                super::keeps_the_contract(Model::$model, name);
            }

            $(#[test]
            fn $name() {
                let name = concat!(stringify!($place), "::", stringify!($name));
                with_token(Model::$model, name, |token| block_on($module::$name(token)));
            })+
        }
    };
}

/// Tests of a vault whose library runs in another process.
macro_rules! isolated {
    ($($name:ident),+ $(,)?) => {
        mod in_another_process {
            use super::*;

            $(#[test]
            fn $name() {
                let name = concat!("in_another_process::", stringify!($name));
                with_token(Model::SoftHsm, name, |token| block_on(isolated::$name(token)));
            })+
        }
    };
}

isolated!(
    a_crash_under_load_fails_no_request,
    a_crash_while_a_key_is_made_is_no_answer,
    a_call_that_hangs_holds_nobody_else,
    calls_that_all_hang_end_and_the_worker_is_replaced,
    a_library_that_hangs_at_the_start_is_waited_for,
    a_worker_that_is_killed_or_stopped_is_replaced,
    no_worker_outlives_its_service,
    a_library_that_crashes_at_every_start_is_tried_with_pauses,
    crashes_leave_no_process_and_no_file_open,
    a_refused_pin_is_tried_by_one_worker_only,
    another_token_is_refused_by_the_next_worker_too,
    a_creation_that_nobody_waits_for_leaves_no_key,
    a_long_list_arrives_whole,
    the_price_is_told_and_bounded,
);

macro_rules! on_every_token {
    ($($cases:tt)+) => {
        on!(SoftHsm, softhsm: $($cases)+);
        on!(Kryoptic, kryoptic: $($cases)+);
    };
}

on_every_token!(
    codes::every_code_at_every_call_of_a_use,
    codes::every_code_at_every_call_of_a_listing,
    codes::every_class_at_every_call_of_a_change,
    codes::every_class_at_every_call_of_a_reconnection,
    faults::sessions_that_die_under_load_fail_no_request,
    faults::a_token_that_is_gone_is_said_at_once_and_found_again,
    faults::a_vault_opens_while_its_token_is_away,
    faults::logins_that_fail_are_tried_with_pauses,
    faults::a_refused_pin_is_tried_once_and_never_again,
    faults::a_refused_pin_is_tried_once_over_many_processes,
    faults::a_call_that_hangs_holds_nobody,
    faults::sessions_never_leak,
    faults::pitfall_19_a_flood_of_bad_unwraps_harms_nobody,
    faults::a_canary_tells_bad_data_from_a_dead_device,
    faults::a_steady_use_takes_few_calls,
    faults::a_token_that_lies_about_a_key_keeps_none,
    faults::a_lost_answer_makes_no_second_key,
    faults::a_copy_with_other_keys_is_refused,
    statistics::every_call_is_counted,
    statistics::every_call_of_a_worker_is_counted,
    statistics::the_circuit_is_told,
    vendors::the_token_as_it_is,
    vendors::luna_makes_the_iv_and_appends_it,
    vendors::luna_in_strict_mode_takes_no_iv,
    vendors::nshield_and_cloudhsm_fill_the_iv,
    vendors::pitfall_04_an_iv_that_repeats_is_refused_and_cbc_goes_on,
    vendors::a_mode_that_is_not_the_tokens_is_refused,
    vendors::one_call_uses_a_key_once_whatever_is_lost,
    vendors::what_is_no_wrapped_key_of_gcm_is_not_authentic,
    token_cases::keys_are_as_strong_as_they_were_ordered,
    token_cases::pitfall_01_key_values_never_come_out,
    token_cases::pitfall_02_keys_that_may_leave_the_token_are_reported,
    token_cases::half_a_version_is_reported_and_not_used,
    token_cases::half_a_key_pair_is_left_as_it_is,
    token_cases::two_objects_of_one_name_are_refused,
    token_cases::two_objects_of_one_key_are_one,
    token_cases::an_object_that_is_shown_twice_is_one,
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
    recovery::pitfall_21_another_token_in_its_place_is_refused,
    recovery::a_token_whose_files_vanish_says_unavailable_not_absent,
    recovery::a_wrong_pin_is_tried_once,
    recovery::a_pin_that_was_changed_stops_the_vault_until_it_hears_the_new_one,
    recovery::a_key_destroyed_elsewhere_is_not_found,
);
