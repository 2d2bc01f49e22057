//! Single flight: however many callers want the same thing at once, the work is done once.
//!
//! Nothing is remembered here: an answer goes to those who waited for it and to nobody else. One that tells only of the
//! caller who did the work, such as that its deadline passed, goes to nobody else at all.

use std::collections::HashMap;
use std::future::Future;
use std::hash::Hash;
use std::sync::{Mutex, PoisonError};

use tokio::sync::watch;

/// The pieces of work that are being done now, by what they are for.
#[derive(Debug)]
pub struct Flights<K, T> {
    flying: Mutex<HashMap<K, watch::Receiver<Option<T>>>>,
    is_own: fn(&T) -> bool,
}

/// Whether a caller did the work or waited for another's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seat {
    Pilot,
    Passenger,
}

impl<K: Clone + Eq + Hash, T: Clone> Flights<K, T> {
    /// `is_own` says of which answers nobody but the caller who did the work may hear.
    pub fn new(is_own: fn(&T) -> bool) -> Flights<K, T> {
        Flights { flying: Mutex::new(HashMap::new()), is_own }
    }

    /// Does `work`, or waits for whoever does it already. If that caller goes away before the end (its
    /// client gave up), or its answer is its own, one of the waiting starts again.
    pub async fn join<F: Future<Output = T>>(&self, key: K, work: impl FnOnce() -> F) -> (T, Seat) {
        loop {
            let mut answer = match self.board(&key) {
                Ok(landing) => return (landing.fly(work()).await, Seat::Pilot),
                Err(answer) => answer,
            };
            if let Ok(answer) = answer.wait_for(Option::is_some).await
                && let Some(answer) = answer.clone()
            {
                return (answer, Seat::Passenger);
            }
        }
    }

    fn board(&self, key: &K) -> Result<Landing<'_, K, T>, watch::Receiver<Option<T>>> {
        let mut flying = self.flying.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(answer) = flying.get(key) {
            return Err(answer.clone());
        }
        let (result, answer) = watch::channel(None);
        flying.insert(key.clone(), answer);
        Ok(Landing { flights: self, key: key.clone(), result })
    }
}

/// Clears the runway also when its caller is dropped in the middle of the work.
struct Landing<'a, K: Eq + Hash, T> {
    flights: &'a Flights<K, T>,
    key: K,
    result: watch::Sender<Option<T>>,
}

impl<K: Eq + Hash, T: Clone> Landing<'_, K, T> {
    async fn fly(self, work: impl Future<Output = T>) -> T {
        let answer = work.await;
        if !(self.flights.is_own)(&answer) {
            self.result.send_replace(Some(answer.clone()));
        }
        answer
    }
}

impl<K: Eq + Hash, T> Drop for Landing<'_, K, T> {
    fn drop(&mut self) {
        self.flights.flying.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use tokio::sync::Semaphore;

    #[tokio::test]
    async fn a_thousand_callers_cost_one_piece_of_work() {
        let flights = Arc::new(Flights::<u8, usize>::new(|_| false));
        let (worked, gate) = (Arc::new(AtomicUsize::new(0)), Arc::new(Semaphore::new(0)));
        let callers: Vec<_> = (0..1000)
            .map(|_| {
                let (flights, worked, gate) = (flights.clone(), worked.clone(), gate.clone());
                tokio::spawn(async move {
                    flights
                        .join(7, || async move {
                            gate.acquire().await.unwrap().forget();
                            worked.fetch_add(1, Ordering::Relaxed) + 41
                        })
                        .await
                })
            })
            .collect();
        tokio::task::yield_now().await;
        gate.add_permits(1);
        let mut pilots = 0;
        for caller in callers {
            let (answer, seat) = caller.await.unwrap();
            assert_eq!(answer, 41);
            pilots += usize::from(seat == Seat::Pilot);
        }
        assert_eq!((pilots, worked.load(Ordering::Relaxed)), (1, 1));
    }

    #[tokio::test]
    async fn when_the_pilot_goes_away_a_passenger_takes_over() {
        let flights = Arc::new(Flights::<u8, &str>::new(|_| false));
        let pilot = tokio::spawn({
            let flights = flights.clone();
            async move { flights.join(7, std::future::pending).await }
        });
        tokio::task::yield_now().await;
        let passenger = tokio::spawn({
            let flights = flights.clone();
            async move { flights.join(7, || async { "second" }).await }
        });
        tokio::task::yield_now().await;
        pilot.abort();
        assert_eq!(passenger.await.unwrap(), ("second", Seat::Pilot));
        let (answer, _) = flights.join(7, || async { "third" }).await;
        assert_eq!(answer, "third", "nothing is remembered");
    }

    #[tokio::test]
    async fn what_tells_only_of_the_pilot_no_passenger_hears() {
        let flights = Arc::new(Flights::<u8, &str>::new(|answer| *answer == "my deadline passed"));
        let gate = Arc::new(Semaphore::new(0));
        let pilot = tokio::spawn({
            let (flights, gate) = (flights.clone(), gate.clone());
            async move {
                let work = || async {
                    gate.acquire().await.unwrap().forget();
                    "my deadline passed"
                };
                flights.join(7, work).await
            }
        });
        tokio::task::yield_now().await;
        let passengers = [(); 3].map(|()| {
            let flights = flights.clone();
            tokio::spawn(async move { flights.join(7, || async { "found" }).await.0 })
        });
        tokio::task::yield_now().await;
        gate.add_permits(1);
        assert_eq!(pilot.await.unwrap(), ("my deadline passed", Seat::Pilot));
        for passenger in passengers {
            assert_eq!(passenger.await.unwrap(), "found");
        }
    }
}
