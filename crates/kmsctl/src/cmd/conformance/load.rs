//! Many calls at once: to see what they do to each other, and to Status.

use std::future::Future;
use std::panic::resume_unwind;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::report::{Unmet, Verdict};
use super::subject::{Failure, RESOURCE_EXHAUSTED, Sealed, Subject};

const CALLERS: usize = 100;

/// 27, KMS v2
pub(super) async fn v2_callers(subject: &Subject) -> Verdict {
    callers(subject, |subject, payload| async move {
        let sealed = subject.encrypt(payload).await?;
        subject.decrypt(sealed).await
    })
    .await
}

/// 27, KMS v1
pub(super) async fn v1_callers(subject: &Subject) -> Verdict {
    callers(subject, |subject, payload| async move {
        let cipher = subject.v1_encrypt(payload).await?;
        subject.v1_decrypt(cipher).await
    })
    .await
}

async fn callers<F>(subject: &Subject, there_and_back: fn(Subject, Vec<u8>) -> F) -> Verdict
where
    F: Future<Output = Result<Vec<u8>, Failure>> + Send + 'static,
{
    let payloads = (0..CALLERS).map(|_| subject.payload(32)).collect();
    let work = |payload: Vec<u8>| {
        let opened = there_and_back(subject.clone(), payload.clone());
        async move { opened.await.map(|opened| opened == payload) }
    };
    let mut full = 0;
    for opened in at_once(payloads, CALLERS, work).await {
        match opened {
            Ok(true) => {}
            Ok(false) => return Err("a caller got the payload of another one".into()),
            Err(failure) if failure.has(RESOURCE_EXHAUSTED) => full += 1,
            Err(failure) => return Err(format!("one of {CALLERS} callers: {failure}").into()),
        }
    }
    match full {
        0 => Ok(format!("{CALLERS} callers got back what they gave")),
        CALLERS => Err(format!("all {CALLERS} were refused with RESOURCE_EXHAUSTED").into()),
        _ => Ok(format!("{} callers got back what they gave, {full} were refused", CALLERS - full)),
    }
}

/// `count` payloads of this plug-in, sealed.
pub(super) async fn sealed(subject: &Subject, count: usize) -> Result<Vec<Sealed>, Failure> {
    let payloads = (0..count).map(|_| subject.payload(32)).collect();
    let work = |payload| {
        let subject = subject.clone();
        async move { subject.encrypt(payload).await }
    };
    at_once(payloads, CALLERS / 2, work).await.into_iter().collect()
}

/// Does all jobs, `width` of them at a time. The results come in no order.
pub(super) async fn at_once<J, T, F>(jobs: Vec<J>, width: usize, work: impl Fn(J) -> F) -> Vec<T>
where
    T: Send + 'static,
    F: Future<Output = T> + Send + 'static,
{
    let mut results = Vec::with_capacity(jobs.len());
    let mut running = JoinSet::new();
    let mut jobs = jobs.into_iter();
    loop {
        running_up_to(width, &mut running, jobs.by_ref().map(&work));
        match running.join_next().await {
            Some(Ok(result)) => results.push(result),
            Some(Err(error)) => resume_unwind(error.into_panic()),
            None => return results,
        }
    }
}

fn running_up_to<T, F>(width: usize, running: &mut JoinSet<T>, more: impl Iterator<Item = F>)
where
    T: Send + 'static,
    F: Future<Output = T> + Send + 'static,
{
    for work in more.take(width.saturating_sub(running.len())) {
        running.spawn(work);
    }
}

/// Decrypts without end, on a thread and a connection of their own: what is measured meanwhile should be the plug-in,
/// not this program.
pub(super) struct Load {
    shared: Arc<Shared>,
    thread: thread::JoinHandle<()>,
}

struct Shared {
    stop: AtomicBool,
    decrypts: AtomicU64,
    /// One permit for each Decrypt that has ended, well or not.
    ended: Semaphore,
}

impl Load {
    /// One caller for each of the sealed values. Returns when as many Decrypts have ended as there are callers: before,
    /// some of them may not have reached the plug-in yet.
    pub(super) async fn start(subject: &Subject, sealed: Vec<Sealed>) -> Result<Load, Unmet> {
        let stop = AtomicBool::new(false);
        let shared = Shared { stop, decrypts: AtomicU64::new(0), ended: Semaphore::new(0) };
        let shared = Arc::new(shared);
        let callers = u32::try_from(sealed.len()).unwrap_or(u32::MAX);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let thread = thread::spawn({
            let (shared, subject) = (Arc::clone(&shared), subject.clone());
            move || runtime.block_on(decrypt(subject, sealed, shared))
        });
        let load = Load { shared, thread };
        // None of them takes longer than the limit.
        let limit = subject.limit * 2;
        if timeout(limit, load.shared.ended.acquire_many(callers)).await.is_ok() {
            return Ok(load);
        }
        load.stop();
        Err(format!("{callers} Decrypts at a time do not end within {limit:?}").into())
    }

    /// Ends it, and says how many Decrypts were answered.
    pub(super) fn stop(self) -> u64 {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Err(panic) = self.thread.join() {
            resume_unwind(panic);
        }
        self.shared.decrypts.load(Ordering::Relaxed)
    }
}

async fn decrypt(subject: Subject, sealed: Vec<Sealed>, shared: Arc<Shared>) {
    let Ok(subject) = subject.connected_anew().await else { return };
    let callers = sealed.len();
    let work = |sealed: Sealed| {
        let (subject, shared) = (subject.clone(), Arc::clone(&shared));
        async move {
            while !shared.stop.load(Ordering::Relaxed) {
                if subject.decrypt(sealed.clone()).await.is_ok() {
                    shared.decrypts.fetch_add(1, Ordering::Relaxed);
                }
                shared.ended.add_permits(1);
                // A plug-in that refuses at once would keep this thread from its timers.
                tokio::task::yield_now().await;
            }
        }
    };
    at_once(sealed, callers, work).await;
}
