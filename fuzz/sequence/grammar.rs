//! What a sequence is made of. Everything is symbolic: "the second key", never its id, so an input means the same in
//! every service that it is tried on.

use libfuzzer_sys::arbitrary;
use libfuzzer_sys::arbitrary::{Arbitrary, Result, Unstructured};
use std::time::Duration;

/// What is mostly not there: a request with everything wrong is refused for the first of it.
#[derive(Debug)]
pub struct Rarely<T>(pub Option<T>);

impl<'a, T: Arbitrary<'a>> Arbitrary<'a> for Rarely<T> {
    fn arbitrary(input: &mut Unstructured<'a>) -> Result<Self> {
        let usual = input.ratio(7, 8)?;
        Ok(Rarely(if usual { None } else { Some(input.arbitrary()?) }))
    }
}

#[derive(Debug, Arbitrary)]
pub struct Step {
    pub before: Rarely<Before>,
    pub ask: Ask,
}

/// What happens between two requests.
#[derive(Debug, Arbitrary)]
pub enum Before {
    LogIn(LogIn),
    /// Afterwards some log in again before they ask.
    Wait {
        time: Wait,
        log_in: bool,
    },
}

/// One request to a route of either table.
#[derive(Debug, Arbitrary)]
pub struct Ask {
    /// One of the callers, and what is wrong with their token.
    pub who: u8,
    pub token: Rarely<Token>,
    /// Of both tables, one behind the other.
    pub route: u8,
    /// One of those that there are, of the kind that the route takes.
    pub id: u8,
    pub other_id: Rarely<Id>,
    /// Mostly where the key is.
    pub place: Rarely<Place>,
    pub headers: Rarely<Headers>,
    pub query: Rarely<Query>,
    pub body: Body,
    pub bend: Rarely<Bend>,
}

#[derive(Debug, Arbitrary)]
pub enum Token {
    None,
    /// A good one but for one letter.
    Bent(u16),
    Text(String),
}

/// What stands in the place of `{id}`.
#[derive(Debug, Arbitrary)]
pub enum Id {
    None,
    /// In capitals.
    Shouted,
    /// One of another kind.
    Other(u8),
    Text(String),
}

/// What the headers say of the instance.
#[derive(Debug, Arbitrary)]
pub enum Place {
    First,
    Second,
    None,
    /// Both headers, with different ones.
    Both,
    /// A key's id.
    Key(u8),
    Text(String),
}

#[derive(Debug, Arbitrary)]
pub struct Headers {
    pub bluemix: bool,
    pub ingress: bool,
    pub representation: bool,
    pub correlation: Option<u8>,
    pub key_ring: Option<bool>,
}

#[derive(Debug, Arbitrary)]
pub enum Query {
    Page { limit: u8, offset: u8 },
    States(u8),
    Flag(u8, bool),
    Text(String),
}

/// What a body may say; each route takes what it understands.
#[derive(Debug, Arbitrary)]
pub struct Body {
    pub name: Rarely<Name>,
    /// A DEK of so many bytes.
    pub dek: Option<Length>,
    pub aad: Rarely<Vec<u8>>,
    /// One of the WDEKs that were made.
    pub wdek: u8,
    /// With whatever key.
    pub any_wdek: Rarely<()>,
    /// With other associated data than it was made with.
    pub other_aad: Rarely<Vec<u8>>,
    pub material: Rarely<Length>,
    /// Seconds from now.
    pub expires: Rarely<i16>,
    pub role: u8,
    /// Mostly the first instance.
    pub scope: Rarely<Place>,
    pub of_key: Rarely<u8>,
    pub owner: u8,
    pub overlap: Option<u16>,
}

#[derive(Debug, Arbitrary)]
pub enum Name {
    None,
    Long(u16),
    Text(String),
}

/// How many bytes: the usual numbers, those at the bounds, and others.
#[derive(Debug, Arbitrary)]
pub enum Length {
    Sixteen,
    ThirtyTwo,
    Most,
    TooMany,
    Other(u8),
}

/// What is wrong with a body.
#[derive(Debug, Arbitrary)]
pub enum Bend {
    Empty,
    Cut(u16),
    Byte(u16, u8),
    /// A member of this name more.
    Member(String),
    Bytes(Vec<u8>),
}

#[derive(Debug, Arbitrary)]
pub struct LogIn {
    pub whose: u8,
    /// One letter of the API key is another one.
    pub bend: Option<u16>,
}

#[derive(Debug, Arbitrary)]
pub enum Wait {
    Seconds(u8),
    Minutes(u8),
    Hours(u8),
}

impl Wait {
    pub fn length(&self) -> Duration {
        Duration::from_secs(match *self {
            Wait::Seconds(count) => count.into(),
            Wait::Minutes(count) => u64::from(count) * 60,
            Wait::Hours(count) => u64::from(count) * 3600,
        })
    }
}

impl Length {
    pub fn bytes(&self) -> usize {
        match *self {
            Length::Sixteen => 16,
            Length::ThirtyTwo => 32,
            Length::Most => 4096,
            Length::TooMany => 4097,
            Length::Other(bytes) => bytes.into(),
        }
    }
}
