//! What is refused, counted. Whoever guesses, goes on with what was locked, or tries what they may not do must be seen in the
//! audit log; and nobody may fill its disk with that. So the first refusals of somebody for one reason have a record each, and
//! the others one together, with their number. Whose login or token was not taken is known by address, others by name.
//!
//! Nothing that was shown is kept here.

use crate::limits::network;
use crate::ops::Error;
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How often those without a record of their own get one together.
pub const PERIOD: Duration = Duration::from_secs(60);
/// So many of one address and reason have a record of their own in a period.
const FIRST: u64 = 3;
/// So many addresses and reasons are told apart in a period, of logins and of tokens each. With the above: 256 records a
/// minute of each at most, and one for each reason that there is.
const MOST: usize = 64;
/// The same for one caller and reason: as many uses of a key that was disabled can each be followed.
const FIRST_OF_CALLER: u64 = 60;
/// There are some twenty reasons.
const MOST_OF_CALLERS: usize = 1024;

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
            Error::NotTrusted | Error::NoProfile => Some(Cause::Token),
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

/// One refusal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    pub peer: SocketAddr,
    /// The name of whoever is known.
    pub caller: Option<String>,
    /// What they wanted, as audit records say it.
    pub action: &'static str,
    pub code: &'static str,
}

/// Those of this period, counted.
#[derive(Debug)]
pub struct Failures {
    first: u64,
    most: usize,
    tallies: Mutex<HashMap<From, Tally>>,
}

/// No name: all of those for whom there was no room.
type From = (Option<Who>, &'static str);

#[derive(Debug, PartialEq, Eq, Hash)]
enum Who {
    Network(IpAddr),
    Caller(String),
}

#[derive(Debug)]
struct Tally {
    recorded: u64,
    others: u64,
    last: Refused,
}

/// Those of one address or caller, and of one reason, that have no record of their own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Repeated {
    /// The last of them; of any peer and nobody's, where there were too many to tell them apart.
    pub last: Refused,
    pub count: u64,
}

impl Failures {
    /// Of those who were not let in.
    #[must_use]
    pub fn of_strangers() -> Failures {
        Failures { first: FIRST, most: MOST, tallies: Mutex::default() }
    }

    /// Of those who are known.
    #[must_use]
    pub fn of_callers() -> Failures {
        Failures { first: FIRST_OF_CALLER, most: MOST_OF_CALLERS, tallies: Mutex::default() }
    }

    /// Counts one; true where it gets a record of its own.
    #[must_use]
    pub fn add(&self, refused: &Refused) -> bool {
        let mut tallies = self.tallies();
        let (tally, own) = self.tally(&mut tallies, refused);
        if own && tally.recorded < self.first {
            tally.recorded += 1;
            return true;
        }
        tally.others += 1;
        false
    }

    /// Counts one that gets no record of its own.
    pub fn count(&self, refused: &Refused) {
        self.tally(&mut self.tallies(), refused).0.others += 1;
    }

    /// Ends the period: those that have no record yet.
    #[must_use]
    pub fn take(&self) -> Vec<Repeated> {
        let tallies = std::mem::take(&mut *self.tallies());
        let repeated = tallies.into_values();
        let repeated = repeated.map(|tally| Repeated { last: tally.last, count: tally.others });
        repeated.filter(|repeated| repeated.count > 0).collect()
    }

    /// For the next period.
    pub fn put_back(&self, repeated: &Repeated) {
        self.tally(&mut self.tallies(), &repeated.last).0.others += repeated.count;
    }

    /// Where this one is counted, and whether that is a place of its own.
    fn tally<'t>(
        &self,
        tallies: &'t mut HashMap<From, Tally>,
        refused: &Refused,
    ) -> (&'t mut Tally, bool) {
        let who = match &refused.caller {
            Some(name) => Who::Caller(name.clone()),
            None => Who::Network(network(refused.peer.ip())),
        };
        let own = (Some(who), refused.code);
        let room = tallies.len() < self.most || tallies.contains_key(&own);
        let mut last = refused.clone();
        let mut key = own;
        if !room {
            key.0 = None;
            last.caller = None;
        }
        let tally = tallies.entry(key).or_insert_with(|| {
            let last = last.clone();
            Tally { recorded: 0, others: 0, last }
        });
        tally.last = last;
        (tally, room)
    }

    fn tallies(&self) -> MutexGuard<'_, HashMap<From, Tally>> {
        self.tallies.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CODE: &str = "UNKNOWN_API_KEY";

    fn from(peer: &str, code: &'static str) -> Refused {
        Refused { peer: peer.parse().unwrap(), caller: None, action: "issue_token", code }
    }

    #[test]
    fn the_first_have_records_and_the_others_one_for_each_address_and_reason() {
        let failures = Failures::of_strangers();
        let own =
            |refused: &Refused, times: u64| (0..times).filter(|_| failures.add(refused)).count();
        let (one, same) = (from("10.0.0.1:1", CODE), from("[::ffff:10.0.0.1]:2", CODE));
        assert_eq!(own(&one, 2), 2);
        assert_eq!(own(&same, 1000), 1);
        assert_eq!(own(&from("10.0.0.1:1", "UNTRUSTED_TOKEN"), 3), 3, "another reason");
        assert_eq!(own(&from("10.0.0.2:1", CODE), 3), 3, "another address");
        let others = Repeated { last: same.clone(), count: 999 };
        assert_eq!(failures.take(), std::slice::from_ref(&others));
        assert_eq!(failures.take(), []);
        // What could not be recorded is not lost, and the next period begins anew.
        failures.put_back(&others);
        assert_eq!(own(&same, 4), 3);
        assert_eq!(failures.take(), [Repeated { count: 1000, ..others }]);
    }

    #[test]
    fn any_number_of_addresses_makes_no_more_than_so_many_records() {
        let failures = Failures::of_strangers();
        let mut records = 0;
        for address in 0..10_000_u32 {
            let peer = SocketAddr::from((address.to_be_bytes(), 1));
            let refused = Refused { peer, ..from("10.0.0.1:1", CODE) };
            records += (0..5).filter(|_| failures.add(&refused)).count();
        }
        let together = failures.take();
        assert_eq!((records, together.len()), (64 * 3, 64 + 1));
        let counted: u64 = together.iter().map(|repeated| repeated.count).sum();
        assert_eq!(counted, 50_000 - 64 * 3, "each is in one record or another");
    }

    #[test]
    fn an_ipv6_network_takes_one_place_however_many_addresses_it_has() {
        let failures = Failures::of_strangers();
        for host in 1..=1000 {
            let _ = failures.add(&from(&format!("[2001:db8::{host:x}]:1"), CODE));
        }
        assert!(failures.add(&from("192.0.2.1:1", CODE)), "others have records of their own");
        assert_eq!(failures.take().len(), 1);
    }

    #[test]
    fn callers_are_told_apart_by_name_and_what_came_too_often_has_no_record_of_its_own() {
        let failures = Failures::of_callers();
        let by = |name: &str| Refused { caller: Some(name.into()), ..from("10.0.0.1:1", CODE) };
        let own = |refused: &Refused| (0..100).filter(|_| failures.add(refused)).count();
        assert_eq!(own(&by("a")), 60);
        assert_eq!(own(&by("b")), 60, "another caller at the same address");
        let often = Refused { code: "TOO_MANY_REQUESTS_ERR", ..by("a") };
        failures.count(&often);
        let mut together = failures.take();
        together.sort_by_key(|repeated| (repeated.count, repeated.last.caller.clone()));
        let expected = [(often, 1), (by("a"), 40), (by("b"), 40)];
        assert_eq!(together, expected.map(|(last, count)| Repeated { last, count }));
        for number in 0..5000 {
            failures.count(&by(&number.to_string()));
        }
        let together = failures.take();
        assert_eq!(together.len(), 1024 + 1);
        let nobodys = together.iter().find(|repeated| repeated.last.caller.is_none());
        assert_eq!(nobodys.map(|repeated| repeated.count), Some(5000 - 1024));
    }
}
