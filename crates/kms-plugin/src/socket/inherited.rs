//! A socket that the service manager bound, for activation (sd_listen_fds(3)): descriptor 3, announced in LISTEN_FDS
//! for the process in LISTEN_PID.
//!
//! Nothing is bound or removed here. What was passed is served only if it is the socket that the configuration names:
//! kube-apiserver and the liveness check go by that one.

use std::os::unix::net as unix;

use kms_daemon::settings::Environment;
use listenfd::ListenFd;

use super::{SocketAddress, SocketError, SocketFile, failed};

/// The socket that this process was started with, if any. Takes the announcement out of the process's environment, so
/// it must be called once, before there is a second thread.
///
/// # Errors
/// Something else was passed.
pub fn inherited(environment: &Environment) -> Result<Option<unix::UnixListener>, SocketError> {
    // Without this check a process that inherits the environment, but not the socket, would take any descriptor 3.
    let own = std::process::id().to_string();
    if environment.get("LISTEN_PID").is_none_or(|pid| *pid != own) {
        return Ok(None);
    }
    let mut passed = ListenFd::from_env();
    if passed.len() > 1 {
        let text = format!("{} sockets instead of one (ListenStream=)", passed.len());
        return Err(SocketError::NotInherited(text));
    }
    passed.take_unix_listener(0).map_err(|error| SocketError::NotInherited(error.to_string()))
}

/// The file of a socket that was passed, once it is known to be the one that `address` names.
pub(super) fn file(
    listener: &unix::UnixListener,
    address: &SocketAddress,
) -> Result<Option<SocketFile>, SocketError> {
    use std::os::linux::net::SocketAddrExt;
    let passed = listener.local_addr().map_err(failed("look at", address.to_string().as_ref()))?;
    let another = || SocketError::AnotherSocket {
        passed: format!("{passed:?}"),
        address: address.to_string(),
    };
    match (address, passed.as_pathname(), passed.as_abstract_name()) {
        (SocketAddress::Abstract(name), _, Some(found)) if found == name.as_bytes() => Ok(None),
        (SocketAddress::File(path), Some(found), _) => {
            // Two paths may lead to one socket, as /var/run and /run do.
            let ends = path.symlink_metadata().and_then(|a| Ok((a, found.symlink_metadata()?)));
            let (ours, theirs) = ends.map_err(|_| another())?;
            let ours = SocketFile::new(path, &ours, true);
            let theirs = SocketFile::new(path, &theirs, true);
            if ours == theirs { Ok(Some(ours)) } else { Err(another()) }
        }
        _ => Err(another()),
    }
}
