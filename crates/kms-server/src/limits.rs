//! How much of this server one peer, one instance and all of them together may take. What is too much is refused
//! soon and cheaply: under overload the requests that are let in are still answered in time.

use kms_core::clock::Clock;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::IpAddr;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::time::timeout;
use uuid::Uuid;

/// Instances whose rate is remembered. One that was quiet for a moment has nothing to remember.
const MOST_BUCKETS: usize = 10_000;
/// With the time that a body may take before it, no more than a request may take altogether.
const LONGEST_TURN: Duration = Duration::from_secs(50);
/// A connection can be refused twenty times a second, and no caller takes this for a late answer.
const MOMENT: Duration = Duration::from_millis(50);

/// What the operator allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// Open at once, on both ports together.
    pub connections: usize,
    /// Of them, from one address.
    pub connections_per_address: usize,
    /// Requests of callers with a token that are worked on at once.
    pub requests: usize,
    /// Logins that are worked on at once. Anybody can try one: they never take a turn of those who are let in.
    pub logins: usize,
    /// Requests to the key API in one second, for each instance; 0: as many as come.
    pub rate_per_instance: u32,
    /// How long a connection may wait for its next request, until the last byte of that request's head.
    pub idle: Duration,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            connections: 512,
            connections_per_address: 256,
            requests: 256,
            logins: 64,
            rate_per_instance: 2000,
            // Ours keep an idle connection for 90 s.
            idle: Duration::from_secs(100),
        }
    }
}

/// The limits, and how far they are used up.
#[derive(Debug)]
pub struct Limits {
    settings: Settings,
    open: Arc<Mutex<HashMap<IpAddr, usize>>>,
    requests: Semaphore,
    logins: Semaphore,
    buckets: Mutex<HashMap<Uuid, Bucket>>,
    clock: Arc<dyn Clock>,
    refused: [AtomicU64; 5],
}

/// Why something is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TooMuch {
    #[error("as many connections are open as MAX_CONNECTIONS allows")]
    Connections,
    #[error("as many connections are open from this address as MAX_CONNECTIONS_PER_ADDRESS allows")]
    ConnectionsOfAddress,
    #[error("as many requests are worked on as MAX_REQUESTS allows")]
    Requests,
    #[error("as many logins are worked on as MAX_LOGINS allows")]
    Logins,
    #[error("this instance has more requests a second than MAX_RATE_PER_INSTANCE allows")]
    Rate,
}

impl TooMuch {
    pub const ALL: [TooMuch; 5] = [
        TooMuch::Connections,
        TooMuch::ConnectionsOfAddress,
        TooMuch::Requests,
        TooMuch::Logins,
        TooMuch::Rate,
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
        }
    }
}

/// Tokens that grow back with time; one buys a request.
#[derive(Debug, Clone, Copy)]
struct Bucket {
    tokens: f64,
    at: Duration,
}

/// A connection's place among the open ones, until it is dropped.
#[derive(Debug)]
pub struct Place {
    open: Arc<Mutex<HashMap<IpAddr, usize>>>,
    address: IpAddr,
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

    /// Lets a connection from `address` in.
    ///
    /// # Errors
    /// `Connections` or `ConnectionsOfAddress`.
    pub fn connect(&self, address: IpAddr) -> Result<Place, TooMuch> {
        // An IPv4 peer on an IPv6 socket is the same peer.
        let address = address.to_canonical();
        let mut open = lock(&self.open);
        if open.values().sum::<usize>() >= self.settings.connections {
            return Err(self.refuse(TooMuch::Connections));
        }
        let of_address = open.entry(address).or_default();
        if *of_address >= self.settings.connections_per_address {
            return Err(self.refuse(TooMuch::ConnectionsOfAddress));
        }
        *of_address += 1;
        Ok(Place { open: self.open.clone(), address })
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

    /// Counts a request against the rate of `instance`. As many as come in one second may come at once.
    ///
    /// # Errors
    /// `Rate`.
    pub fn spend(&self, instance: Uuid) -> Result<(), TooMuch> {
        if self.settings.rate_per_instance == 0 {
            return Ok(());
        }
        let (rate, now) = (f64::from(self.settings.rate_per_instance), self.clock.now());
        let mut buckets = lock(&self.buckets);
        if buckets.len() >= MOST_BUCKETS {
            buckets.retain(|_, bucket| bucket.level(rate, now) < rate);
        }
        let full = Bucket { tokens: rate, at: now };
        let bucket = match buckets.entry(instance) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => new.insert(full),
        };
        let level = bucket.level(rate, now);
        if level < 1.0 {
            return Err(self.refuse(TooMuch::Rate));
        }
        *bucket = Bucket { tokens: level - 1.0, at: now };
        Ok(())
    }

    /// How many are open now.
    #[must_use]
    pub fn connections(&self) -> usize {
        lock(&self.open).values().sum()
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
    pub fn refused(&self) -> [(TooMuch, u64); 5] {
        TooMuch::ALL.map(|why| (why, self.count(why).load(Ordering::Relaxed)))
    }

    fn refuse(&self, why: TooMuch) -> TooMuch {
        self.count(why).fetch_add(1, Ordering::Relaxed);
        why
    }

    fn count(&self, why: TooMuch) -> &AtomicU64 {
        let [connections, of_address, requests, logins, rate] = &self.refused;
        match why {
            TooMuch::Connections => connections,
            TooMuch::ConnectionsOfAddress => of_address,
            TooMuch::Requests => requests,
            TooMuch::Logins => logins,
            TooMuch::Rate => rate,
        }
    }
}

impl Bucket {
    fn level(&self, rate: f64, now: Duration) -> f64 {
        let grown = now.saturating_sub(self.at).as_secs_f64() * rate;
        (self.tokens + grown).min(rate)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut open = lock(&self.open);
        if let Entry::Occupied(mut count) = open.entry(self.address) {
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
mod tests {
    use super::*;
    use kms_core::clock::ManualClock;
    use tokio::sync::oneshot;
    use tokio::time::Instant;

    fn limits(settings: Settings) -> (Limits, Arc<ManualClock>) {
        let clock = Arc::new(ManualClock::new());
        (Limits::new(settings, clock.clone()), clock)
    }

    #[test]
    fn connections_are_counted_by_address_and_together() {
        let settings =
            Settings { connections: 3, connections_per_address: 2, ..Settings::default() };
        let (limits, _) = limits(settings);
        let [one, same, two]: [IpAddr; 3] =
            ["10.0.0.1", "::ffff:10.0.0.1", "10.0.0.2"].map(|text| text.parse().unwrap());
        let first = limits.connect(one).unwrap();
        let _second = limits.connect(same).unwrap();
        assert_eq!(limits.connect(one).unwrap_err(), TooMuch::ConnectionsOfAddress);
        let _third = limits.connect(two).unwrap();
        assert_eq!(limits.connect(two).unwrap_err(), TooMuch::Connections);
        drop(first);
        let _fourth = limits.connect(one).unwrap();
        assert_eq!(limits.connections(), 3);
        assert_eq!(limits.refused().map(|(_, count)| count), [1, 1, 0, 0, 0]);
    }

    #[tokio::test(start_paused = true)]
    async fn requests_take_turns_that_are_not_those_of_logins_and_a_refusal_takes_a_moment() {
        let (limits, _) = limits(Settings { requests: 1, logins: 1, ..Settings::default() });
        let beside = async {
            let began = Instant::now();
            assert_eq!(limits.request(async {}).await.unwrap_err(), TooMuch::Requests);
            assert!(began.elapsed() >= MOMENT);
            let second = limits.login(async { limits.login(async {}).await });
            assert_eq!(second.await.unwrap().unwrap_err(), TooMuch::Logins);
            limits.requests()
        };
        assert_eq!(limits.request(beside).await, Ok(1));
        assert_eq!(limits.refused().map(|(_, count)| count), [0, 0, 1, 1, 0]);
        assert_eq!(limits.request(async { 7 }).await, Ok(7));
    }

    #[tokio::test(start_paused = true)]
    async fn work_that_hangs_is_not_torn_and_gives_its_turn_back() {
        let (limits, _) = limits(Settings { requests: 1, ..Settings::default() });
        let limits = Arc::new(limits);
        let (end, ended) = oneshot::channel();
        let hanging = tokio::spawn({
            let limits = limits.clone();
            async move { limits.request(ended).await }
        });
        tokio::time::sleep(LONGEST_TURN - MOMENT).await;
        assert_eq!(limits.requests(), 1);
        tokio::time::sleep(MOMENT * 2).await;
        assert_eq!(limits.request(async {}).await, Ok(()));
        end.send("done").unwrap();
        assert_eq!(hanging.await.unwrap(), Ok(Ok("done")));
    }

    #[test]
    fn a_rate_is_that_of_one_instance_and_comes_back_with_time() {
        let (limits, clock) = limits(Settings { rate_per_instance: 10, ..Settings::default() });
        let [noisy, quiet] = [1, 2].map(Uuid::from_u128);
        let spend = |instance| (0..100).filter(|_| limits.spend(instance).is_ok()).count();
        assert_eq!(spend(noisy), 10);
        assert_eq!(spend(quiet), 10, "another instance is not told of it");
        clock.advance(Duration::from_millis(500));
        assert_eq!(spend(noisy), 5);
        clock.advance(Duration::from_secs(3600));
        assert_eq!(spend(noisy), 10, "no more than a second's worth is saved up");
    }

    #[test]
    fn no_rate_is_no_limit_and_many_instances_are_not_kept_for_ever() {
        let (unlimited, _) = limits(Settings { rate_per_instance: 0, ..Settings::default() });
        assert!((0..10_000).all(|_| unlimited.spend(Uuid::nil()).is_ok()));
        let (limits, clock) = limits(Settings::default());
        for instance in 0..25_000 {
            clock.advance(Duration::from_millis(1));
            limits.spend(Uuid::from_u128(instance)).unwrap();
        }
        assert!(lock(&limits.buckets).len() <= MOST_BUCKETS);
    }
}
