//! What the plug-ins of the tests are set to, unless a test is about a setting.

use std::time::Duration;

use kms_plugin::keys::Policy;

pub(crate) const HOUR: Duration = Duration::from_secs(3600);

pub(crate) fn policy() -> Policy {
    Policy {
        new_dek: false,
        lifetime: HOUR,
        max_age: 168 * HOUR,
        max_uses: 1_000_000,
        capacity: 1000,
        len_bytes: 4,
        accept_unauthenticated: false,
    }
}
