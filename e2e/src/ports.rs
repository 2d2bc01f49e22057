//! TCP ports on the loopback address.

use std::net::{Ipv4Addr, SocketAddrV4, TcpListener};
use std::sync::atomic::{AtomicU16, Ordering};

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

/// A port that nobody listens on and that was not given out before by this process. Nor will another connection of this
/// machine take it as its own end before the program that it is for has started: it is none of those that the kernel
/// gives out by itself.
///
/// # Errors
/// When the machine has no free port.
pub fn free() -> Result<u16> {
    static GIVEN: AtomicU16 = AtomicU16::new(0);
    // Another process with the harness in it begins elsewhere.
    let [_, _, high, low] = std::process::id().wrapping_mul(0x9e37_79b9).to_be_bytes();
    let begin = u16::from_be_bytes([high, low]) % COUNT;
    loop {
        let given = GIVEN.fetch_add(1, Ordering::Relaxed);
        let port = FIRST + (begin + given % COUNT) % COUNT;
        match TcpListener::bind(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port)) {
            Ok(_) => return Ok(port),
            Err(error) if given >= COUNT => {
                return Err(Error::machine("find a free TCP port")(error));
            }
            Err(_) => {}
        }
    }
}

/// Below those that Linux gives out, and none of them the usual one of a program.
const FIRST: u16 = 21_000;
const COUNT: u16 = 7_000;
