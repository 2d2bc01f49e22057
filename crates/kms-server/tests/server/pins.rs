//! A wrong PIN before the real binary: one login, however often it is started and whoever else asks.

use crate::harness::rig::{Rig, stderr};
use pkcs11_shim::{Counts, Function};
use std::fs;

/// The configuration reads the PIN from a file with this in it.
fn pin_file(rig: &Rig, pin: &str) {
    fs::write(rig.path("pin"), pin).unwrap();
    let file = rig.path("kms-server.yaml");
    let named = format!("PIN_FILE: \"{}\"", rig.path("pin").display());
    let text = fs::read_to_string(&file).unwrap().replace("PIN: \"582910\"", &named);
    fs::write(&file, text).unwrap();
}

async fn one_login(isolation: &str) {
    let Some(mut rig) = Rig::make() else { return };
    rig.configure(isolation);
    let counts = Counts::open(&rig.path("counts")).unwrap();
    let before = counts.of(Function::C_Login);
    let logins = || counts.of(Function::C_Login) - before;
    pin_file(&rig, "wrong-pin\n");
    for _ in 0..3 {
        rig.spawn();
        let said = rig.becomes("HSM: the HSM refuses the PIN").await;
        assert!(said.starts_with("HTTP/1.0 503"), "{said}");
        rig.kill();
    }
    for command in ["check", "check"] {
        let refused = rig.run(&[command]);
        assert_eq!(refused.status.code(), Some(1));
        assert!(stderr(&refused).contains("was refused before"), "{}", stderr(&refused));
    }
    assert_eq!(logins(), 1, "of three starts and two commands");
    let refused = rig.path("kms.db.refused-pin");
    assert!(rig.log().contains(refused.to_str().unwrap()), "what to remove: {}", rig.log());

    // The right one is taken over by the server that runs.
    rig.spawn();
    rig.becomes("HSM: the HSM refuses the PIN").await;
    pin_file(&rig, "582910\n");
    rig.becomes("200 OK").await;
    assert_eq!(logins(), 2);
    for _ in 0..6000 {
        if !refused.exists() {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    assert!(!refused.exists(), "a PIN that is not in use any more is forgotten");
    assert!(rig.client().log_in(&rig.api_key).await.is_some());
    assert!(!rig.log().contains("wrong-pin") && !rig.log().contains("582910"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_pin_is_tried_once_over_many_starts_in_another_process() {
    one_login("process").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_pin_is_tried_once_over_many_starts_in_its_own_process() {
    one_login("none").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_operator_has_a_refused_pin_tried_once_more() {
    let Some(mut rig) = Rig::make() else { return };
    let counts = Counts::open(&rig.path("counts")).unwrap();
    pin_file(&rig, "582910\n");
    let before = counts.of(Function::C_Login);
    // The token refuses the right PIN, until somebody has put that in order.
    rig.control.set("fail C_Login CKR_PIN_INCORRECT").unwrap();
    rig.spawn();
    rig.becomes("HSM: the HSM refuses the PIN").await;
    rig.control.clear().unwrap();
    fs::remove_file(rig.path("kms.db.refused-pin")).unwrap();
    rig.becomes("200 OK").await;
    assert_eq!(counts.of(Function::C_Login) - before, 2);
}
