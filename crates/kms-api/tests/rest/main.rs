//! The clients against a real TLS server on loopback, which misbehaves as told.

#[cfg(test)]
mod client;
#[cfg(test)]
mod management;
#[cfg(test)]
mod server;
#[cfg(test)]
mod token;
