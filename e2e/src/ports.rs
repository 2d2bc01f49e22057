//! TCP ports on the loopback address.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener};
use std::sync::{Mutex, PoisonError};

use crate::error::{Error, Result};

/// `wanted` if nobody listens there, else a free one.
///
/// # Errors
/// When the machine has no free port.
pub fn prefer(wanted: u16) -> Result<u16> {
    if TcpListener::bind(SocketAddrV4::new(Ipv4Addr::LOCALHOST, wanted)).is_ok() {
        Ok(wanted)
    } else {
        free()
    }
}

/// A port that nobody listens on and that was not given out before by this process.
///
/// # Errors
/// When the machine has no free port.
pub fn free() -> Result<u16> {
    static GIVEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());
    let mut given = GIVEN.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        let port = TcpListener::bind(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0))
            .and_then(|listener| listener.local_addr())
            .map_err(Error::machine("find a free TCP port"))?
            .port();
        if given.insert(port) {
            return Ok(port);
        }
    }
}
