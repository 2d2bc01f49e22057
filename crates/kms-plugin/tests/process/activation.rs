//! Started by a service manager: with a socket that is bound already, and with somebody who waits for news.

use std::os::unix::net::{UnixDatagram, UnixListener};
use std::time::Duration;

use rustix::process::Signal;

use crate::plugin::{Setup, activated, command, output};
use crate::service::Service;

const API_KEY: &str = "canary-api-key-93ab";

#[tokio::test(flavor = "multi_thread")]
async fn who_connects_before_the_process_exists_is_served_by_it() {
    let service = Service::start(API_KEY).await;
    let setup = Setup::for_service(&service);
    let listener = UnixListener::bind(setup.socket()).unwrap();
    let early = kms_api::grpc::connect(&setup.socket()).await.unwrap();
    let early = tokio::spawn(async move {
        let request = kms_api::grpc::v2::EncryptRequest { plaintext: vec![7; 32], uid: "u".into() };
        kms_api::grpc::v2::key_management_service_client::KeyManagementServiceClient::new(early)
            .encrypt(request)
            .await
    });
    let mut plugin = setup.start_by(activated(&listener));
    assert!(early.await.unwrap().is_ok());
    assert_eq!(plugin.health("/healthz/liveness").await, (200, "ok\n".into()));
    assert_eq!(plugin.terminate().code(), Some(0));
    assert!(std::path::Path::new(&setup.socket()).exists(), "the socket is the manager's");
}

/// systemd's own sender of LISTEN_FDS and LISTEN_PID, in the place of the double above.
#[tokio::test(flavor = "multi_thread")]
async fn what_systemd_passes_is_served_from_the_first_connection_on() {
    if !systemd_is_installed() {
        return;
    }
    let service = Service::start(API_KEY).await;
    let setup = Setup::for_service(&service);
    setup.write_config();
    let notify = setup.folder.path().join("notify");
    let manager = UnixDatagram::bind(&notify).unwrap();
    manager.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let mut sender = std::process::Command::new("systemd-socket-activate");
    // It hands on nothing of its own environment but what is named.
    sender
        .arg(format!("--listen={}", setup.socket()))
        .arg(format!("--setenv=config_file={}", setup.config().display()))
        .arg(format!("--setenv=NOTIFY_SOCKET={}", notify.display()))
        .arg(env!("CARGO_BIN_EXE_kmsplugin"));
    let mut plugin = setup.start_by(sender);
    plugin.line("Listening on");
    assert!(!plugin.lines().iter().any(|line| line.contains("started.")), "nobody connected yet");
    plugin.encrypt_v1(b"ping").await.unwrap();
    let mut bytes = [0; 64];
    let length = manager.recv(&mut bytes).unwrap();
    assert_eq!(&bytes[..length], b"READY=1");
    assert_eq!(plugin.terminate().code(), Some(0));
    assert!(std::path::Path::new(&setup.socket()).exists(), "the socket is the manager's");
}

/// Without systemd such a test is skipped with a notice, and fails where `CI=true`.
fn systemd_is_installed() -> bool {
    let mut version = std::process::Command::new("systemd-socket-activate");
    let installed = version.arg("--version").output().is_ok();
    if !installed {
        assert_ne!(std::env::var("CI").as_deref(), Ok("true"), "systemd is not installed");
        eprintln!("skipped: systemd is not installed (Debian: apt-get install systemd)");
    }
    installed
}

/// The units hold what their comments say, by systemd's own measure.
#[test]
fn systemd_finds_the_units_sound_and_well_confined() {
    if !systemd_is_installed() {
        return;
    }
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../deploy/systemd");
    let [service, socket] = ["service", "socket"].map(|kind| format!("{folder}/kmsplugin.{kind}"));
    let analyze = |arguments: &[&str]| {
        std::process::Command::new("systemd-analyze").args(arguments).output().unwrap()
    };
    let verified = analyze(&["verify", "--man=no", &service, &socket]);
    let said = String::from_utf8(verified.stderr).unwrap();
    // What the machine at hand lacks is no fault of the unit.
    let faults: Vec<_> = said
        .lines()
        .filter(|line| line.contains("kmsplugin.") && !line.contains("/usr/local/bin/kmsplugin"))
        .collect();
    assert!(faults.is_empty(), "{said}");
    let judged = analyze(&["security", "--offline=true", "--threshold=20", &service]);
    let said = String::from_utf8(judged.stdout).unwrap();
    assert!(judged.status.success() && said.contains("Overall exposure level"), "{said}");
}

#[test]
fn another_socket_than_the_configured_one_is_not_served() {
    let setup = Setup::new();
    let another = setup.folder.path().join("another.sock");
    let listener = UnixListener::bind(&another).unwrap();
    let plugin = setup.start_by(activated(&listener));
    let line = plugin.line("The Provider server failed");
    for text in ["another.sock", &setup.socket(), "ListenStream="] {
        assert!(line.contains(text), "{line}");
    }
    assert!(!plugin.lines().iter().any(|line| line.contains("The Provider server is started.")));
}

#[test]
fn a_socket_that_lies_behind_a_link_is_the_configured_one() {
    let setup = Setup::new();
    let folder = tempfile::tempdir().unwrap();
    let link = folder.path().join("run");
    std::os::unix::fs::symlink(setup.folder.path(), &link).unwrap();
    let listener = UnixListener::bind(link.join("kms.sock")).unwrap();
    setup.start_by(activated(&listener)).line("The Provider server is started.");
}

#[test]
fn what_was_passed_to_another_process_is_not_taken() {
    let setup = Setup::new();
    let mut stray = command();
    stray.env("LISTEN_FDS", "1").env("LISTEN_PID", "1");
    setup.start_by(stray).line("The Provider server is started.");
}

#[test]
fn what_is_no_socket_ends_it_with_the_cause() {
    let setup = Setup::new();
    let mut wrong = std::process::Command::new("/bin/sh");
    let script = r#"exec 3</dev/null; LISTEN_FDS=1 LISTEN_PID=$$ exec "$0""#;
    wrong.env_clear().args(["-c", script, env!("CARGO_BIN_EXE_kmsplugin")]);
    let mut plugin = setup.start_by(wrong);
    assert_eq!(plugin.wait().code(), Some(1));
    assert!(plugin.all_lines()[0].contains("the service manager passed no socket"));
}

#[test]
fn the_manager_hears_when_it_serves_and_when_it_ends() {
    let setup = Setup::new();
    let path = setup.folder.path().join("notify");
    let manager = UnixDatagram::bind(&path).unwrap();
    manager.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let heard = || {
        let mut bytes = [0; 64];
        let length = manager.recv(&mut bytes).unwrap();
        String::from_utf8(bytes[..length].to_vec()).unwrap()
    };
    let mut managed = command();
    managed.env("NOTIFY_SOCKET", &path);
    let mut plugin = setup.start_by(managed);
    assert_eq!(heard(), "READY=1");
    assert!(std::os::unix::net::UnixStream::connect(setup.socket()).is_ok());
    plugin.signal(Signal::TERM);
    assert_eq!(heard(), "STOPPING=1");
    assert_eq!(plugin.wait().code(), Some(0));
}

#[test]
fn the_units_agree_with_each_other_and_with_the_binary() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../deploy/systemd/kmsplugin");
    let unit = |suffix: &str| std::fs::read_to_string(format!("{folder}.{suffix}")).unwrap();
    let (socket, service) = (unit("socket"), unit("service"));
    let value = |unit: &str, name: &str| {
        let line = unit.lines().find_map(|line| line.strip_prefix(&format!("{name}=")));
        line.unwrap_or_else(|| panic!("no {name}= in {unit}")).to_owned()
    };
    let address = value(&socket, "ListenStream");
    assert!(address.parse::<kms_plugin::socket::SocketAddress>().is_ok(), "{address}");
    assert!(service.contains(&format!("#   UNIX_SOCKET_PATH: \"{address}\"")));
    let credential = value(&service, "LoadCredential");
    let (name, _) = credential.split_once(':').unwrap();
    let path = format!("/run/credentials/kmsplugin.service/{name}");
    assert!(service.contains(&format!("#   API_KEY_FILE: \"{path}\"")));
    assert_eq!(value(&service, "Type"), "notify");
    assert_eq!(value(&service, "LimitMEMLOCK"), "infinity");
    // What is started is started with a file; the binary knows the option.
    let start = value(&service, "ExecStart");
    let (_, arguments) = start.split_once(' ').unwrap();
    let mut check = command();
    check.args(arguments.split(' ')).arg("--check-config");
    let (code, _, stderr) = output(&mut check);
    assert_eq!(code, Some(64));
    assert!(stderr.contains("/etc/kmsplugin/kmsplugin-config.yaml cannot be read"), "{stderr}");
}
