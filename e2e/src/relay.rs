//! A port that leads to another one until it is cut: one of two services of a process goes away, the other stays.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddrV4, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::error::{Error, Result};

/// Passes bytes on, whatever they are.
#[derive(Debug)]
pub struct Relay {
    pub port: u16,
    shared: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    cut: bool,
    ended: bool,
    open: Vec<TcpStream>,
}

impl Relay {
    /// Listens on a free port of the loopback address and leads to `target`.
    ///
    /// # Errors
    /// When the machine refuses.
    pub fn to(target: u16) -> Result<Self> {
        let refused = || Error::machine("open a relay");
        let listener = TcpListener::bind(address(0)).map_err(refused())?;
        listener.set_nonblocking(true).map_err(refused())?;
        let port = listener.local_addr().map_err(refused())?.port();
        let shared = Arc::new(Mutex::new(State::default()));
        std::thread::spawn({
            let shared = shared.clone();
            move || accept(&listener, target, &shared)
        });
        Ok(Self { port, shared })
    }

    /// Ends every connection; new ones are ended at once.
    pub fn cut(&self) {
        let mut state = lock(&self.shared);
        state.cut = true;
        for stream in state.open.drain(..) {
            // It may have ended by itself.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Leads there again.
    pub fn mend(&self) {
        lock(&self.shared).cut = false;
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.cut();
        lock(&self.shared).ended = true;
    }
}

fn accept(listener: &TcpListener, target: u16, shared: &Mutex<State>) {
    loop {
        if lock(shared).ended {
            return;
        }
        match listener.accept() {
            // A caller that finds nobody behind the relay sees its connection end.
            Ok((from, _)) => drop(pass(from, target, shared)),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(_) => return,
        }
    }
}

fn pass(from: TcpStream, target: u16, shared: &Mutex<State>) -> std::io::Result<()> {
    let mut state = lock(shared);
    if state.cut {
        return Ok(());
    }
    from.set_nonblocking(false)?;
    let to = TcpStream::connect(address(target))?;
    state.open.extend([from.try_clone()?, to.try_clone()?]);
    let (back_from, back_to) = (to.try_clone()?, from.try_clone()?);
    std::thread::spawn(move || copy(from, to));
    std::thread::spawn(move || copy(back_from, back_to));
    Ok(())
}

fn copy(mut from: TcpStream, mut to: TcpStream) {
    let mut buffer = [0; 16 * 1024];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        if to.write_all(&buffer[..count]).is_err() {
            break;
        }
    }
    // Both ends: half a connection is of no use to TLS.
    let _ = to.shutdown(Shutdown::Both);
    let _ = from.shutdown(Shutdown::Both);
}

fn address(port: u16) -> SocketAddrV4 {
    SocketAddrV4::new(Ipv4Addr::LOCALHOST, port)
}

fn lock(shared: &Mutex<State>) -> MutexGuard<'_, State> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}
