//! How the socket comes into being, whom it replaces and whom it lets in.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kms_plugin::socket::{Bound, Options, Peers, SocketError, bind};
use tempfile::TempDir;
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio_stream::StreamExt;

fn place() -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("kms.sock");
    (dir, path)
}

fn bind_with(path: &Path, options: &Options) -> Result<Bound, SocketError> {
    bind(&path.to_str().unwrap().parse().unwrap(), options)
}

fn bind_plainly(path: &Path) -> Result<Bound, SocketError> {
    bind_with(path, &Options::default())
}

fn mode_of(path: &Path) -> u32 {
    path.metadata().unwrap().mode() & 0o7777
}

fn names_in(dir: &TempDir) -> Vec<String> {
    let names = fs::read_dir(dir.path()).unwrap();
    names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[tokio::test]
async fn case_05_the_socket_has_its_mode_before_anybody_is_accepted() {
    let (dir, path) = place();
    let _bound = bind_plainly(&path).unwrap();
    assert_eq!(mode_of(&path), 0o600);
    assert_eq!(names_in(&dir), ["kms.sock"]);

    // Other users are let in by uid, so the file must not keep them out.
    let (_dir, path) = place();
    let options = Options { peers: Peers::new(vec![0, 4711]), ..Options::default() };
    let _bound = bind_with(&path, &options).unwrap();
    assert_eq!(mode_of(&path), 0o666);
}

/// Somebody who watches the path sees the socket with its mode and owner from the first moment on.
#[tokio::test(flavor = "multi_thread")]
async fn case_05_at_no_moment_is_there_a_socket_with_another_mode_or_owner() {
    let (dir, path) = place();
    let bound = Arc::new(AtomicBool::new(false));
    let watching = std::thread::spawn({
        let (path, bound) = (path.clone(), bound.clone());
        move || {
            let mut seen = Vec::new();
            while !bound.load(Ordering::Relaxed) {
                let found = path.symlink_metadata();
                seen.extend(found.map(|found| (found.mode() & 0o7777, found.uid())));
            }
            seen
        }
    });
    let owner = dir.path().metadata().unwrap().uid();
    for _ in 0..300 {
        drop(bind_plainly(&path).unwrap().incoming());
    }
    let last = bind_plainly(&path).unwrap();
    bound.store(true, Ordering::Relaxed);
    let seen = watching.join().unwrap();
    assert!(seen.iter().all(|seen| *seen == (0o600, owner)), "{seen:?}");
    drop(last);
}

#[tokio::test]
async fn case_05_a_stale_socket_is_replaced() {
    let (_dir, path) = place();
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists(), "a killed process leaves its socket behind");
    let mut incoming = bind_plainly(&path).unwrap().incoming();
    let _client = UnixStream::connect(&path).await.unwrap();
    assert!(incoming.next().await.unwrap().is_ok());
}

#[tokio::test]
async fn case_05_a_live_socket_is_not_stolen_unless_asked() {
    let (_dir, path) = place();
    let mut old = bind_plainly(&path).unwrap().incoming();
    let inode = path.metadata().unwrap().ino();

    let error = bind_plainly(&path).unwrap_err();
    let pid = i32::try_from(std::process::id()).unwrap();
    assert!(
        matches!(error, SocketError::InUse { pid: Some(found), .. } if found == pid),
        "{error}"
    );
    assert!(error.to_string().contains("TAKE_OVER_SOCKET"), "{error}");
    assert_eq!(path.metadata().unwrap().ino(), inode);
    assert!(
        old.next().await.unwrap().is_ok(),
        "the look was a connection, and the old one answers"
    );

    let new = bind_with(&path, &Options { take_over: true, ..Options::default() }).unwrap();
    assert_ne!(path.metadata().unwrap().ino(), inode);
    drop(old);
    assert!(path.exists(), "the old process must not remove what is no longer its own");
    let mut new = new.incoming();
    let _client = UnixStream::connect(&path).await.unwrap();
    assert!(new.next().await.unwrap().is_ok());
    drop(new);
    assert!(!path.exists(), "a clean end leaves nothing behind");
}

#[tokio::test]
async fn a_file_that_is_no_socket_stays() {
    let (_dir, path) = place();
    fs::write(&path, "mine").unwrap();
    let options = Options { take_over: true, ..Options::default() };
    assert!(matches!(bind_with(&path, &options), Err(SocketError::NotASocket(_))));
    assert_eq!(fs::read(&path).unwrap(), b"mine");
}

#[tokio::test]
async fn a_directory_in_which_others_could_replace_the_socket_is_refused() {
    let (dir, path) = place();
    for (mode, accepted) in [
        (0o755, true),
        (0o700, true),
        (0o1777, true),
        (0o777, false),
        (0o775, false),
        (0o757, false),
    ] {
        fs::set_permissions(dir.path(), Permissions::from_mode(mode)).unwrap();
        let result = bind_plainly(&path).map(Bound::incoming);
        assert_eq!(result.is_ok(), accepted, "{mode:o}: {:?}", result.err());
        assert_eq!(names_in(&dir).is_empty(), !accepted, "{mode:o}");
    }
    fs::set_permissions(dir.path(), Permissions::from_mode(0o777)).unwrap();
    let options = Options { shared_directory: true, ..Options::default() };
    assert!(bind_with(&path, &options).is_ok());
}

#[tokio::test]
async fn a_missing_directory_is_named() {
    let (dir, _) = place();
    let error = bind_plainly(&dir.path().join("missing/kms.sock")).unwrap_err();
    assert!(matches!(error, SocketError::NoDirectory { .. }), "{error}");
    assert!(error.to_string().contains("missing"), "{error}");

    fs::write(dir.path().join("file"), "").unwrap();
    let error = bind_plainly(&dir.path().join("file/kms.sock")).unwrap_err();
    assert!(matches!(error, SocketError::NoDirectory { .. }), "{error}");
}

#[tokio::test]
async fn leftovers_of_a_killed_start_are_in_nobodys_way() {
    let (dir, path) = place();
    fs::create_dir(dir.path().join(".k0")).unwrap();
    let _bound = bind_plainly(&path).unwrap();
    assert!(path.exists());
}

#[tokio::test]
async fn the_longest_path_that_is_taken_can_be_bound() {
    let (dir, _) = place();
    let name = "n".repeat(102 - dir.path().as_os_str().len() - 1);
    let _bound = bind_plainly(&dir.path().join(name)).unwrap();
}

#[tokio::test]
async fn an_abstract_name_belongs_to_whoever_came_first() {
    let address = format!("@keelson-first-{}", std::process::id()).parse().unwrap();
    let _first = bind(&address, &Options::default()).unwrap();
    assert!(matches!(bind(&address, &Options::default()), Err(SocketError::InUse { .. })));
}

#[tokio::test]
async fn whoever_is_not_on_the_list_is_hung_up_on() {
    let (_dir, path) = place();
    let options = Options { peers: Peers::new(vec![4711]), ..Options::default() };
    let mut incoming = bind_with(&path, &options).unwrap().incoming();
    let mut client = UnixStream::connect(&path).await.unwrap();
    let mut bytes = [0; 1];
    tokio::select! {
        _ = incoming.next() => panic!("it was let in"),
        read = client.read(&mut bytes) => assert_eq!(read.unwrap(), 0),
    }
}
