//! What a daemon tells the service manager that started it (sd_notify(3)): that it serves, that it is ending.
//!
//! Never here: anything that could keep a daemon from serving. Without a manager, or with one that does not listen,
//! nothing happens.

use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// Where the manager listens, if there is one.
#[derive(Debug, Clone, Default)]
pub struct Manager(Option<SocketAddr>);

impl Manager {
    /// `socket` is the value of NOTIFY_SOCKET: a path, or `@name` in the abstract namespace.
    pub fn new(socket: Option<&str>) -> Manager {
        let Some(socket) = socket.filter(|socket| !socket.is_empty()) else {
            return Manager::default();
        };
        let address = match socket.strip_prefix('@') {
            Some(name) => SocketAddr::from_abstract_name(name),
            None => SocketAddr::from_pathname(socket),
        };
        let address = address.inspect_err(|error| {
            tracing::warn!("NOTIFY_SOCKET {socket} cannot be used: {error}");
        });
        Manager(address.ok())
    }

    /// Clients are served from now on.
    pub fn ready(&self) {
        self.tell("READY=1");
    }

    /// The end was asked for; what runs is being finished.
    pub fn stopping(&self) {
        self.tell("STOPPING=1");
    }

    fn tell(&self, state: &str) {
        let Some(address) = &self.0 else { return };
        if let Err(error) = send(address, state) {
            tracing::warn!("The service manager was not told {state}: {error}");
        }
    }
}

fn send(address: &SocketAddr, state: &str) -> io::Result<()> {
    let socket = UnixDatagram::unbound()?;
    // A manager that does not read must not stop us.
    socket.set_nonblocking(true)?;
    socket.send_to_addr(state.as_bytes(), address).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heard(socket: &UnixDatagram) -> String {
        let mut bytes = [0; 64];
        let length = socket.recv(&mut bytes).unwrap();
        String::from_utf8(bytes[..length].to_vec()).unwrap()
    }

    #[test]
    fn it_tells_a_manager_at_a_path_and_in_the_abstract_namespace() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let name = format!("keelson-manager-{}", std::process::id());
        let abstract_address = SocketAddr::from_abstract_name(&name).unwrap();
        for (socket, address) in [
            (UnixDatagram::bind(&path).unwrap(), path.to_str().unwrap().to_owned()),
            (UnixDatagram::bind_addr(&abstract_address).unwrap(), format!("@{name}")),
        ] {
            let manager = Manager::new(Some(&address));
            manager.ready();
            assert_eq!(heard(&socket), "READY=1");
            manager.stopping();
            assert_eq!(heard(&socket), "STOPPING=1");
        }
    }

    #[test]
    fn without_a_manager_nothing_happens_and_a_dead_or_silent_one_stops_nobody() {
        Manager::new(None).ready();
        Manager::new(Some("")).ready();
        Manager::new(Some(&"x".repeat(200))).ready();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        Manager::new(path.to_str()).ready();
        let _silent = UnixDatagram::bind(&path).unwrap();
        let manager = Manager::new(path.to_str());
        // More than any queue of datagrams holds.
        (0..10_000).for_each(|_| manager.ready());
    }
}
