//! How much of this server one peer, one caller, one instance and all of them together may take. What is too much is
//! refused soon and cheaply: under overload the requests that are let in are still answered in time.

use crate::policy::{Caller, Credential};
use kms_core::clock::Clock;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::{IpAddr, Ipv6Addr};
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::time::timeout;
use uuid::Uuid;

/// Those whose rate is remembered. One that was quiet for a moment has nothing to remember.
const MOST_BUCKETS: usize = 10_000;
/// Whoever holds fewer connections may have one of the last places.
const FEW: usize = 4;
/// With the time that a body may take before it, no more than a request may take altogether.
const LONGEST_TURN: Duration = Duration::from_secs(50);
/// All nodes of a cluster may start together and share one service ID: one whose login is refused cannot read a secret.
/// What logins cost the HSM at once has a limit of its own.
const SECONDS_OF_LOGINS: f64 = 5.0;
/// A connection can be refused twenty times a second, and no caller takes this for a late answer.
const MOMENT: Duration = Duration::from_millis(50);

/// What whoever asks more often than a rate allows hears, and how it is counted in the audit log.
pub const TOO_OFTEN: &str = "TOO_MANY_REQUESTS_ERR";

/// What the operator allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// Open at once, on both ports together; on one of them three quarters of that. Of either the last eighth is for
    /// peers that hold few.
    pub connections: usize,
    /// Of them, from one IPv4 address or IPv6 network of 64 bits.
    pub connections_per_address: usize,
    /// Requests of callers with a token that are worked on at once.
    pub requests: usize,
    /// Logins that are worked on at once. Anybody can try one: they never take a turn of those who are let in.
    pub logins: usize,
    /// Requests to the key API in one second, for each instance; 0: as many as come.
    pub rate_per_instance: u32,
    /// The same for each service ID or profile, whatever instance it names.
    pub rate_per_caller: u32,
    /// Its requests to the management in one second; 0: as many as come.
    pub management_rate_per_caller: u32,
    /// Its logins in one second, of which more may come at once than of anything else; 0: as many as come.
    pub login_rate_per_caller: u32,
    /// How long a connection may wait for its next request, until the last byte of that request's head.
    pub idle: Duration,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            connections: 512,
            connections_per_address: Settings::share_of_address(512),
            requests: 256,
            logins: 64,
            rate_per_instance: 2000,
            // Half of an instance's, so that nobody takes all of that from the others there.
            rate_per_caller: 1000,
            // A `kmsctl` in a script asks some times a second.
            management_rate_per_caller: 50,
            // A plug-in logs in once an hour, but those of a thousand nodes under one service ID together at a start.
            login_rate_per_caller: 500,
            // Ours keep an idle connection for 90 s.
            idle: Duration::from_secs(100),
        }
    }
}

impl Settings {
    /// How many connections one address may have where nothing is said of that, of so many altogether.
    #[must_use]
    pub fn share_of_address(connections: usize) -> usize {
        (connections / 4).max(16).min(connections)
    }
}

/// The limits, and how far they are used up.
#[derive(Debug)]
pub struct Limits {
    settings: Settings,
    open: Arc<Mutex<Open>>,
    requests: Semaphore,
    logins: Semaphore,
    buckets: Mutex<HashMap<Whose, Bucket>>,
    clock: Arc<dyn Clock>,
    refused: [AtomicU64; TooMuch::ALL.len()],
}

/// The ports that share the connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Port {
    Keys,
    Tokens,
}

/// What a rate is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Whose {
    /// Requests to the key API about this instance, of all who may be there.
    Instance(Uuid),
    /// Requests to the key API by this service ID or profile.
    Caller(Uuid),
    /// Its requests to the management.
    Management(Uuid),
    /// Its logins.
    Logins(Uuid),
}

impl Whose {
    #[must_use]
    pub fn caller(caller: &Caller) -> Whose {
        Whose::Caller(id(caller))
    }

    #[must_use]
    pub fn management(caller: &Caller) -> Whose {
        Whose::Management(id(caller))
    }

    #[must_use]
    pub fn logins(caller: &Caller) -> Whose {
        Whose::Logins(id(caller))
    }

    fn limit(self) -> TooMuch {
        match self {
            Whose::Instance(_) => TooMuch::Rate,
            Whose::Caller(_) => TooMuch::RateOfCaller,
            Whose::Management(_) => TooMuch::ManagementRate,
            Whose::Logins(_) => TooMuch::LoginRate,
        }
    }

    /// How many may come at once.
    fn most(self, rate: f64) -> f64 {
        match self {
            Whose::Logins(_) => rate * SECONDS_OF_LOGINS,
            Whose::Instance(_) | Whose::Caller(_) | Whose::Management(_) => rate,
        }
    }

    /// All for whom there is no room.
    fn rest(self) -> Whose {
        match self {
            Whose::Instance(_) => Whose::Instance(Uuid::nil()),
            Whose::Caller(_) => Whose::Caller(Uuid::nil()),
            Whose::Management(_) => Whose::Management(Uuid::nil()),
            Whose::Logins(_) => Whose::Logins(Uuid::nil()),
        }
    }
}

/// A profile is somebody apart from the service ID whose rights it has: not every login under it is the same machine.
fn id(caller: &Caller) -> Uuid {
    match caller.credential {
        Credential::ApiKey(_) => caller.service_id,
        Credential::Profile(profile) => profile,
    }
}

/// Whoever has one IPv6 address has 2^64 of them: the interface's half of it is theirs to choose (RFC 4291, 2.5.4). An
/// IPv4 peer on an IPv6 socket is the same peer.
#[must_use]
pub fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => {
            Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX)).into()
        }
        address => address,
    }
}

/// Why something is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TooMuch {
    #[error(
        "as many connections are open as MAX_CONNECTIONS allows; of it one port has three quarters, and peers with few \
         connections the last eighth"
    )]
    Connections,
    #[error("as many connections are open from this address as MAX_CONNECTIONS_PER_ADDRESS allows")]
    ConnectionsOfAddress,
    #[error("as many requests are worked on as MAX_REQUESTS allows")]
    Requests,
    #[error("as many logins are worked on as MAX_LOGINS allows")]
    Logins,
    #[error("this instance has more requests a second than MAX_RATE_PER_INSTANCE allows")]
    Rate,
    #[error(
        "this service ID or profile has more requests a second than MAX_RATE_PER_CALLER allows"
    )]
    RateOfCaller,
    #[error(
        "this service ID or profile has more requests to the management a second than \
         MAX_MANAGEMENT_RATE_PER_CALLER allows"
    )]
    ManagementRate,
    #[error(
        "this service ID or profile has more logins a second than MAX_LOGIN_RATE_PER_CALLER allows"
    )]
    LoginRate,
}

impl TooMuch {
    pub const ALL: [TooMuch; 8] = [
        TooMuch::Connections,
        TooMuch::ConnectionsOfAddress,
        TooMuch::Requests,
        TooMuch::Logins,
        TooMuch::Rate,
        TooMuch::RateOfCaller,
        TooMuch::ManagementRate,
        TooMuch::LoginRate,
    ];

    /// What metrics call it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            TooMuch::Connections => "connections",
            TooMuch::ConnectionsOfAddress => "connections_per_address",
            TooMuch::Requests => "requests",
            TooMuch::Logins => "logins",
            TooMuch::Rate => "rate_per_instance",
            TooMuch::RateOfCaller => "rate_per_caller",
            TooMuch::ManagementRate => "management_rate_per_caller",
            TooMuch::LoginRate => "login_rate_per_caller",
        }
    }

    /// Somebody who is known asks too often, and would be served a moment later.
    #[must_use]
    pub fn is_rate(self) -> bool {
        match self {
            TooMuch::Rate
            | TooMuch::RateOfCaller
            | TooMuch::ManagementRate
            | TooMuch::LoginRate => true,
            TooMuch::Connections
            | TooMuch::ConnectionsOfAddress
            | TooMuch::Requests
            | TooMuch::Logins => false,
        }
    }
}

/// Tokens that grow back with time; one buys a request.
#[derive(Debug, Clone, Copy)]
struct Bucket {
    tokens: f64,
    at: Duration,
}

/// How many are open.
#[derive(Debug, Default)]
struct Open {
    networks: HashMap<IpAddr, usize>,
    keys: usize,
    tokens: usize,
}

impl Open {
    fn of(&mut self, port: Port) -> &mut usize {
        match port {
            Port::Keys => &mut self.keys,
            Port::Tokens => &mut self.tokens,
        }
    }
}

/// A connection's place among the open ones, until it is dropped.
#[derive(Debug)]
pub struct Place {
    open: Arc<Mutex<Open>>,
    port: Port,
    network: IpAddr,
}

impl Limits {
    #[must_use]
    pub fn new(settings: Settings, clock: Arc<dyn Clock>) -> Limits {
        Limits {
            settings,
            open: Arc::default(),
            requests: Semaphore::new(settings.requests),
            logins: Semaphore::new(settings.logins),
            buckets: Mutex::default(),
            clock,
            refused: Default::default(),
        }
    }

    #[must_use]
    pub fn settings(&self) -> Settings {
        self.settings
    }

    /// Lets a connection from `address` to `port` in.
    ///
    /// # Errors
    /// `Connections` or `ConnectionsOfAddress`.
    pub fn connect(&self, port: Port, address: IpAddr) -> Result<Place, TooMuch> {
        let (all, network) = (self.settings.connections, network(address));
        let mut open = lock(&self.open);
        let own = open.networks.get(&network).copied().unwrap_or_default();
        // A few addresses must not take what others need to come in at all, nor one port what the other does.
        let full =
            |taken: usize, most: usize| taken >= if own < FEW { most } else { most - most / 8 };
        if full(open.keys + open.tokens, all) || full(*open.of(port), all - all / 4) {
            return Err(self.refuse(TooMuch::Connections));
        }
        if own >= self.settings.connections_per_address {
            return Err(self.refuse(TooMuch::ConnectionsOfAddress));
        }
        *open.of(port) += 1;
        open.networks.insert(network, own + 1);
        Ok(Place { open: self.open.clone(), port, network })
    }

    /// Works on the request of a caller with a token, or refuses it, which takes a moment: whoever asks again as soon
    /// as it is refused would take the processors from those who are served.
    ///
    /// # Errors
    /// `Requests`.
    pub async fn request<T>(&self, work: impl Future<Output = T>) -> Result<T, TooMuch> {
        self.in_turn(&self.requests, TooMuch::Requests, work).await
    }

    /// The same for a login.
    ///
    /// # Errors
    /// `Logins`.
    pub async fn login<T>(&self, work: impl Future<Output = T>) -> Result<T, TooMuch> {
        self.in_turn(&self.logins, TooMuch::Logins, work).await
    }

    async fn in_turn<T>(
        &self,
        turns: &Semaphore,
        limit: TooMuch,
        work: impl Future<Output = T>,
    ) -> Result<T, TooMuch> {
        let Ok(turn) = turns.try_acquire() else {
            let why = self.refuse(limit);
            tokio::time::sleep(MOMENT).await;
            return Err(why);
        };
        let mut work = pin!(work);
        if let Ok(done) = timeout(LONGEST_TURN, work.as_mut()).await {
            return Ok(done);
        }
        // Its caller is soon told that it takes too long. It is not torn in the middle: calls of the HSM, locks of the
        // database and audit records end by deadlines of their own, a disk that hangs when it likes. Nobody must wait.
        drop(turn);
        Ok(work.await)
    }

    /// Counts one against a rate. As many as may come in one second may come at once, of logins in [`SECONDS_OF_LOGINS`].
    ///
    /// # Errors
    /// The limit of that rate.
    pub fn spend(&self, whose: Whose) -> Result<(), TooMuch> {
        let (rate, now) = (self.rate(whose), self.clock.now());
        if rate == 0.0 {
            return Ok(());
        }
        let mut buckets = lock(&self.buckets);
        let mut whose = whose;
        if buckets.len() >= MOST_BUCKETS && !buckets.contains_key(&whose) {
            buckets.retain(|whose, bucket| {
                let rate = self.rate(*whose);
                bucket.level(*whose, rate, now) < whose.most(rate)
            });
            if buckets.len() >= MOST_BUCKETS {
                whose = whose.rest();
            }
        }
        let bucket = buckets.entry(whose).or_insert(Bucket { tokens: whose.most(rate), at: now });
        let level = bucket.level(whose, rate, now);
        if level < 1.0 {
            return Err(self.refuse(whose.limit()));
        }
        *bucket = Bucket { tokens: level - 1.0, at: now };
        Ok(())
    }

    fn rate(&self, whose: Whose) -> f64 {
        f64::from(match whose {
            Whose::Instance(_) => self.settings.rate_per_instance,
            Whose::Caller(_) => self.settings.rate_per_caller,
            Whose::Management(_) => self.settings.management_rate_per_caller,
            Whose::Logins(_) => self.settings.login_rate_per_caller,
        })
    }

    /// How many are open now.
    #[must_use]
    pub fn connections(&self) -> usize {
        let open = lock(&self.open);
        open.keys + open.tokens
    }

    /// How many are worked on now.
    #[must_use]
    pub fn requests(&self) -> usize {
        self.settings.requests.saturating_sub(self.requests.available_permits())
    }

    /// How many of the logins are worked on now.
    #[must_use]
    pub fn logins(&self) -> usize {
        self.settings.logins.saturating_sub(self.logins.available_permits())
    }

    /// How often each limit has refused something.
    #[must_use]
    pub fn refused(&self) -> [(TooMuch, u64); TooMuch::ALL.len()] {
        TooMuch::ALL.map(|why| (why, self.count(why).load(Ordering::Relaxed)))
    }

    fn refuse(&self, why: TooMuch) -> TooMuch {
        self.count(why).fetch_add(1, Ordering::Relaxed);
        why
    }

    fn count(&self, why: TooMuch) -> &AtomicU64 {
        let [connections, of_address, requests, logins, rate, of_caller, management, login_rate] =
            &self.refused;
        match why {
            TooMuch::Connections => connections,
            TooMuch::ConnectionsOfAddress => of_address,
            TooMuch::Requests => requests,
            TooMuch::Logins => logins,
            TooMuch::Rate => rate,
            TooMuch::RateOfCaller => of_caller,
            TooMuch::ManagementRate => management,
            TooMuch::LoginRate => login_rate,
        }
    }
}

impl Bucket {
    fn level(&self, whose: Whose, rate: f64, now: Duration) -> f64 {
        let grown = now.saturating_sub(self.at).as_secs_f64() * rate;
        (self.tokens + grown).min(whose.most(rate))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut open = lock(&self.open);
        *open.of(self.port) -= 1;
        if let Entry::Occupied(mut count) = open.networks.entry(self.network) {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
