//! The socket that kube-apiserver connects to: which one, how it comes into being, who may connect.
//!
//! It is bound and given its mode inside a private directory and then renamed into place, so that at no moment is there
//! a socket with other permissions, none at all, or a stale one. (A umask would do the first only, and belongs to the
//! whole process.) A socket that somebody else serves is never replaced unless that was asked for, and a file that is
//! no socket never at all. Or the service manager bound it before and passes it on (`inherited`).

mod address;
mod inherited;

use std::fs::{self, DirBuilder, Metadata, Permissions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net as unix;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use thiserror::Error;
use tokio::net::{UnixListener, UnixStream};
use tokio::time::Sleep;
use tokio_stream::Stream;

pub use address::{AddressError, MAX_NAME, SocketAddress};
pub use inherited::inherited;

/// Pause after an accept that failed for want of descriptors or memory: trying again at once cannot help.
const PAUSE: Duration = Duration::from_secs(1);
/// How often it is looked whether the socket file still exists.
const WATCH: Duration = Duration::from_secs(1);
/// Leftovers of processes that died within the milliseconds of a bind; more there will not be.
const STAGING_NAMES: u8 = 100;
const OTHERS_MAY_WRITE: u32 = 0o022;
const STICKY: u32 = 0o1000;

/// Why there is no socket, by what must be done.
#[derive(Debug, Error)]
pub enum SocketError {
    #[error("{address} is served by another process{}: stop that one, or set TAKE_OVER_SOCKET to true to replace it",
            pid.map(|pid| format!(" (pid {pid})")).unwrap_or_default())]
    InUse { address: String, pid: Option<i32> },
    #[error("{} is a file and no socket: remove it or choose another UNIX_SOCKET_PATH", .0.display())]
    NotASocket(PathBuf),
    #[error("the socket's directory {} cannot be used ({cause}): create it, owned by root, mode 0755", dir.display())]
    NoDirectory { dir: PathBuf, cause: io::Error },
    #[error(
        "others than root and uid {euid} could replace the socket, because {} has owner {owner} and mode {mode:04o}: \
         change them (chmod go-w), choose another directory, or set ALLOW_SHARED_DIRECTORY to true if only trusted \
         containers share it", dir.display()
    )]
    SharedDirectory { dir: PathBuf, owner: u32, mode: u32, euid: u32 },
    #[error("the service manager passed no socket that can be served: {0}")]
    NotInherited(String),
    #[error(
        "the service manager listens on {passed}, which is not UNIX_SOCKET_PATH {address}: name the same in both \
         (ListenStream=), and if the file was removed, restart the .socket unit"
    )]
    AnotherSocket { passed: String, address: String },
    #[error("cannot {what} {}: {cause}", path.display())]
    Io { what: &'static str, path: PathBuf, cause: io::Error },
}

/// What the operator decided about the socket.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Replace a socket that another process serves: for an upgrade without a gap.
    pub take_over: bool,
    /// Take a directory in which others could replace the socket, such as a volume shared inside one pod.
    pub shared_directory: bool,
    pub peers: Peers,
}

/// Whose connections are taken. SO_PEERCRED tells; nobody can forge it.
#[derive(Debug, Clone)]
pub struct Peers(Vec<u32>);

impl Peers {
    /// These and nobody else; an empty list means root and the user that this process runs as.
    pub fn new(uids: Vec<u32>) -> Peers {
        if uids.is_empty() { Peers::default() } else { Peers(uids) }
    }

    fn admit(&self, uid: u32) -> bool {
        self.0.contains(&uid)
    }

    /// Permissions on the file serve as a second lock; they cannot name a list of users.
    fn socket_mode(&self) -> u32 {
        let default = Peers::default();
        if self.0.iter().all(|uid| default.admit(*uid)) { 0o600 } else { 0o666 }
    }
}

impl Default for Peers {
    fn default() -> Peers {
        Peers(vec![0, rustix::process::geteuid().as_raw()])
    }
}

/// A socket that clients can already connect to, although nobody accepts yet.
#[derive(Debug)]
pub struct Bound {
    listener: UnixListener,
    file: Option<SocketFile>,
    peers: Peers,
}

/// Binds the socket, for the runtime that this is called in.
///
/// # Errors
/// See [`SocketError`]. Nothing is changed or left behind then.
pub fn bind(address: &SocketAddress, options: &Options) -> Result<Bound, SocketError> {
    let (listener, file) = match address {
        SocketAddress::File(path) => {
            let (listener, file) = bind_file(path, options)?;
            (listener, Some(file))
        }
        SocketAddress::Abstract(name) => (bind_abstract(name, address)?, None),
    };
    Bound::new(listener, file, address, options)
}

/// Serves a socket that the service manager bound and keeps: clients can connect before this process runs, and between
/// two processes of an upgrade.
///
/// # Errors
/// See [`SocketError`]; above all, it is not the socket that `address` names.
pub fn adopt(
    listener: &unix::UnixListener,
    address: &SocketAddress,
    options: &Options,
) -> Result<Bound, SocketError> {
    let file = inherited::file(listener, address)?;
    if let SocketAddress::File(path) = address {
        check_directory(path.parent().unwrap_or(Path::new("/")), options)?;
    }
    let listener =
        listener.try_clone().map_err(failed("share", Path::new(&address.to_string())))?;
    Bound::new(listener, file, address, options)
}

impl Bound {
    fn new(
        listener: unix::UnixListener,
        file: Option<SocketFile>,
        address: &SocketAddress,
        options: &Options,
    ) -> Result<Bound, SocketError> {
        let listener = listener
            .set_nonblocking(true)
            .and_then(|()| UnixListener::from_std(listener))
            .map_err(failed("listen on", Path::new(&address.to_string())))?;
        Ok(Bound { listener, file, peers: options.peers.clone() })
    }

    /// The connections of those who may have one. Dropping the stream ends the listening and removes the file.
    pub fn incoming(self) -> Incoming {
        Incoming { listener: self.listener, file: self.file, peers: self.peers, pause: None }
    }

    /// Returns when the socket's file no longer exists, so that nobody can connect any more; for an abstract
    /// socket never.
    pub fn gone(&self) -> impl Future<Output = ()> + use<> {
        let file = self.file.clone();
        async move {
            let Some(file) = file else { return std::future::pending().await };
            while file.path.symlink_metadata().is_ok() {
                tokio::time::sleep(WATCH).await;
            }
        }
    }
}

/// See [`Bound::incoming`].
#[derive(Debug)]
pub struct Incoming {
    listener: UnixListener,
    file: Option<SocketFile>,
    peers: Peers,
    pause: Option<Pin<Box<Sleep>>>,
}

impl Stream for Incoming {
    type Item = io::Result<UnixStream>;

    /// Never ends and never fails: what cannot be accepted now is tried again.
    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        loop {
            if let Some(pause) = &mut this.pause {
                ready!(pause.as_mut().poll(cx));
                this.pause = None;
            }
            match ready!(this.listener.poll_accept(cx)) {
                Ok((stream, _)) if this.admits(&stream) => return Poll::Ready(Some(Ok(stream))),
                Ok(_) => {}
                Err(error) => {
                    tracing::error!("Could not accept a connection, will try again: {error}");
                    this.pause = Some(Box::pin(tokio::time::sleep(PAUSE)));
                }
            }
        }
    }
}

impl Incoming {
    fn admits(&self, stream: &UnixStream) -> bool {
        match stream.peer_cred() {
            Ok(peer) if self.peers.admit(peer.uid()) => true,
            Ok(peer) => {
                let pid = peer.pid().unwrap_or(0);
                tracing::warn!(
                    "Refused a connection of uid {} (pid {pid}): it is not in ALLOWED_UIDS.",
                    peer.uid()
                );
                false
            }
            Err(error) => {
                tracing::warn!("Refused a connection, because its user is unknown: {error}");
                false
            }
        }
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if let Some(file) = &self.file {
            file.remove_if_ours();
        }
    }
}

/// The name in the file system, and by what it is recognised as ours.
#[derive(Debug, Clone, PartialEq, Eq)]
struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
    /// The service manager's: it outlives this process.
    stays: bool,
}

impl SocketFile {
    fn new(path: &Path, found: &Metadata, stays: bool) -> SocketFile {
        SocketFile { path: path.to_owned(), device: found.dev(), inode: found.ino(), stays }
    }

    /// Whoever replaced the file has taken over; theirs must stay.
    fn remove_if_ours(&self) {
        let same = |found: Metadata| found.dev() == self.device && found.ino() == self.inode;
        let ours = !self.stays && self.path.symlink_metadata().is_ok_and(same);
        if ours && let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!("The socket {} stays behind: {error}", self.path.display());
        }
    }
}

fn bind_abstract(name: &str, address: &SocketAddress) -> Result<unix::UnixListener, SocketError> {
    use std::os::linux::net::SocketAddrExt;
    unix::SocketAddr::from_abstract_name(name)
        .and_then(|name| unix::UnixListener::bind_addr(&name))
        .map_err(|cause| match cause.kind() {
            ErrorKind::AddrInUse => SocketError::InUse { address: address.to_string(), pid: None },
            _ => failed("bind", Path::new(&address.to_string()))(cause),
        })
}

fn bind_file(
    path: &Path,
    options: &Options,
) -> Result<(unix::UnixListener, SocketFile), SocketError> {
    let dir = path.parent().unwrap_or(Path::new("/"));
    check_directory(dir, options)?;
    check_free(path, options)?;
    let staging = Staging::create(dir)?;
    let staged = staging.0.join(path.file_name().unwrap_or_default());
    let listener = unix::UnixListener::bind(&staged).map_err(failed("bind", path))?;
    let mode = Permissions::from_mode(options.peers.socket_mode());
    fs::set_permissions(&staged, mode).map_err(failed("set the mode of", path))?;
    let made = staged.symlink_metadata().map_err(failed("look at", path))?;
    fs::rename(&staged, path).map_err(failed("put into place", path))?;
    Ok((listener, SocketFile::new(path, &made, false)))
}

/// Whoever may write to the directory can put a socket of his own in the place of ours, and is then handed every key
/// that kube-apiserver wants encrypted. With the sticky bit only its owner can.
fn check_directory(dir: &Path, options: &Options) -> Result<(), SocketError> {
    let unusable = |cause| SocketError::NoDirectory { dir: dir.to_owned(), cause };
    let found = dir.metadata().map_err(unusable)?;
    if !found.is_dir() {
        return Err(unusable(ErrorKind::NotADirectory.into()));
    }
    let (owner, mode) = (found.uid(), found.mode() & 0o7777);
    let euid = rustix::process::geteuid().as_raw();
    let others_write = mode & OTHERS_MAY_WRITE != 0;
    let shared = others_write && mode & STICKY == 0 || ![0, euid].contains(&owner);
    if shared && !options.shared_directory {
        return Err(SocketError::SharedDirectory { dir: dir.to_owned(), owner, mode, euid });
    }
    if shared || others_write {
        tracing::warn!("Others may create files in the socket's directory {} too.", dir.display());
    }
    Ok(())
}

fn check_free(path: &Path, options: &Options) -> Result<(), SocketError> {
    let found = match path.symlink_metadata() {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        found => found.map_err(failed("look at", path))?,
    };
    if !found.file_type().is_socket() {
        return Err(SocketError::NotASocket(path.to_owned()));
    }
    match server_of(path).map_err(|errno| failed("find out who serves", path)(errno.into()))? {
        Some(pid) if !options.take_over => {
            Err(SocketError::InUse { address: path.display().to_string(), pid })
        }
        Some(_) => {
            tracing::info!("Replacing the socket {} of another process.", path.display());
            Ok(())
        }
        None => Ok(()),
    }
}

/// Who listens on a socket file, as far as can be told; `None` if the file is stale.
fn server_of(path: &Path) -> rustix::io::Result<Option<Option<i32>>> {
    // Non-blocking: with a full backlog a blocking connect would wait for a process that may be stopped.
    let probe = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::NONBLOCK | SocketFlags::CLOEXEC,
        None,
    )?;
    match rustix::net::connect(&probe, &SocketAddrUnix::new(path)?) {
        Ok(()) => {
            let peer = rustix::net::sockopt::socket_peercred(&probe).ok();
            Ok(Some(peer.map(|peer| peer.pid.as_raw_nonzero().get())))
        }
        Err(Errno::AGAIN | Errno::PROTOTYPE) => Ok(Some(None)),
        Err(Errno::CONNREFUSED | Errno::NOENT) => Ok(None),
        Err(errno) => Err(errno),
    }
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SocketError {
    let path = path.to_owned();
    move |cause| SocketError::Io { what, path, cause }
}

/// A directory that nobody else can enter, in which the socket gets ready; gone when dropped.
struct Staging(PathBuf);

impl Staging {
    /// Takes the first name that is free. Creating a directory is exclusive, so two processes never share one.
    fn create(dir: &Path) -> Result<Staging, SocketError> {
        let mut name = dir.join(".k");
        let mut cause = io::Error::from(ErrorKind::AlreadyExists);
        for number in 0..STAGING_NAMES {
            name = dir.join(format!(".k{number}"));
            match DirBuilder::new().mode(0o700).create(&name) {
                Ok(()) => return Ok(Staging(name)),
                Err(error) => cause = error,
            }
            if cause.kind() != ErrorKind::AlreadyExists {
                break;
            }
        }
        Err(SocketError::Io { what: "create the directory", path: name, cause })
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // Fails only if somebody with our rights put something in or took it away; then it is theirs.
        let _ = fs::remove_dir_all(&self.0);
    }
}
