//! Logins that are refused. Whoever guesses, or goes on with what was locked, must be seen in the audit log; and nobody
//! who has no right at all may fill its disk. So the first ones from an address have a record each, and the others one
//! together, with their number.
//!
//! Nothing that was shown at a login is kept here.

use crate::ops::Error;
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How often those without a record of their own get one together.
pub const PERIOD: Duration = Duration::from_secs(60);
/// So many of one address and reason have a record of their own in a period.
const FIRST: u64 = 3;
/// So many addresses and reasons are told apart in a period. With the above: 256 records a minute at most, and one for
/// each reason that there is.
const MOST: usize = 64;

/// Why somebody who asked for a token got none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// Unknown, locked, replaced or revoked: from outside all are one.
    ApiKey,
    /// Of another issuer.
    Token,
    /// Whether the token is genuine could not be found out.
    IssuerAway,
}

impl Cause {
    /// `None` for what says nothing about who asks.
    #[must_use]
    pub fn of(error: &Error) -> Option<Cause> {
        match error {
            Error::UnknownApiKey => Some(Cause::ApiKey),
            Error::NotTrusted => Some(Cause::Token),
            Error::IssuerAway(_) => Some(Cause::IssuerAway),
            _ => None,
        }
    }

    /// What metrics call it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Cause::ApiKey => "api_key",
            Cause::Token => "token",
            Cause::IssuerAway => "issuer_away",
        }
    }
}

/// Those of this period, counted.
#[derive(Debug, Default)]
pub struct Failures(Mutex<HashMap<From, Tally>>);

/// No address: all of the addresses for which there was no room.
type From = (Option<IpAddr>, &'static str);

#[derive(Debug)]
struct Tally {
    recorded: u64,
    others: u64,
    /// Of the last of them.
    peer: SocketAddr,
}

/// Those of one address and reason that have no record of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Repeated {
    /// The last of them; of any address, where there were too many to tell them apart.
    pub peer: SocketAddr,
    pub code: &'static str,
    pub count: u64,
}

impl Failures {
    /// Counts one; true where it gets a record of its own.
    pub fn add(&self, peer: SocketAddr, code: &'static str) -> bool {
        let mut tallies = self.tallies();
        let (tally, recorded) = Failures::tally(&mut tallies, peer, code);
        tally.peer = peer;
        if recorded && tally.recorded < FIRST {
            tally.recorded += 1;
            return true;
        }
        tally.others += 1;
        false
    }

    /// Ends the period: those that have no record yet.
    pub fn take(&self) -> Vec<Repeated> {
        let tallies = std::mem::take(&mut *self.tallies());
        let repeated = tallies.into_iter().map(|((_, code), tally)| Repeated {
            peer: tally.peer,
            code,
            count: tally.others,
        });
        repeated.filter(|repeated| repeated.count > 0).collect()
    }

    /// For the next period.
    pub fn put_back(&self, repeated: Repeated) {
        let mut tallies = self.tallies();
        let (tally, _) = Failures::tally(&mut tallies, repeated.peer, repeated.code);
        tally.others += repeated.count;
    }

    /// Where `peer` is counted, and whether that is a place of its own.
    fn tally<'t>(
        tallies: &'t mut HashMap<From, Tally>,
        peer: SocketAddr,
        code: &'static str,
    ) -> (&'t mut Tally, bool) {
        // An IPv4 peer on an IPv6 socket is the same peer.
        let own = (Some(peer.ip().to_canonical()), code);
        let room = tallies.len() < MOST || tallies.contains_key(&own);
        let key = if room { own } else { (None, code) };
        let tally = tallies.entry(key).or_insert(Tally { recorded: 0, others: 0, peer });
        (tally, room)
    }

    fn tallies(&self) -> MutexGuard<'_, HashMap<From, Tally>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CODE: &str = "UNKNOWN_API_KEY";

    fn peer(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn the_first_have_records_and_the_others_one_for_each_address_and_reason() {
        let failures = Failures::default();
        let own = |peer, code, times: u64| (0..times).filter(|_| failures.add(peer, code)).count();
        let (one, same) = (peer("10.0.0.1:1"), peer("[::ffff:10.0.0.1]:2"));
        assert_eq!(own(one, CODE, 2), 2);
        assert_eq!(own(same, CODE, 1000), 1);
        assert_eq!(own(one, "UNTRUSTED_TOKEN", 3), 3, "another reason");
        assert_eq!(own(peer("10.0.0.2:1"), CODE, 3), 3, "another address");
        let others = Repeated { peer: same, code: CODE, count: 999 };
        assert_eq!(failures.take(), [others]);
        assert_eq!(failures.take(), []);
        // What could not be recorded is not lost, and the next period begins anew.
        failures.put_back(others);
        assert_eq!(own(same, CODE, 4), 3);
        assert_eq!(failures.take(), [Repeated { count: 1000, ..others }]);
    }

    #[test]
    fn any_number_of_addresses_makes_no_more_than_so_many_records() {
        let failures = Failures::default();
        let mut records = 0;
        for address in 0..10_000_u32 {
            let peer = SocketAddr::from((address.to_be_bytes(), 1));
            records += (0..5).filter(|_| failures.add(peer, CODE)).count();
        }
        let together = failures.take();
        assert_eq!((records, together.len()), (64 * 3, 64 + 1));
        let counted: u64 = together.iter().map(|repeated| repeated.count).sum();
        assert_eq!(counted, 50_000 - 64 * 3, "each is in one record or another");
    }
}
