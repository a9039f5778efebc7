//! Retries over an outage: a call is repeated until it succeeds, fails permanently, or the store was unavailable too
//! long.

use super::error::{self, StoreErrorKind};
use std::hash::{BuildHasher, RandomState};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Pause between the first two attempts; it doubles with each further attempt.
const INITIAL_PAUSE: Duration = Duration::from_millis(200);
const MAX_PAUSE: Duration = Duration::from_secs(10);
/// Time between two warnings about one outage.
const WARNING_INTERVAL: Duration = Duration::from_secs(15);
/// Time of failures before the first warning, because single failed requests are normal.
const WARNING_DELAY: Duration = Duration::from_secs(2);

/// The time for which a store may be unavailable.
pub(super) struct RetryBudget {
    /// Name of the store, for warnings.
    name: String,
    limit: Duration,
    last_warning: Mutex<Option<Instant>>,
}

impl RetryBudget {
    /// Makes a budget of `limit` for the store called `name` in warnings.
    pub fn new(name: &str, limit: Duration) -> RetryBudget {
        RetryBudget { name: name.to_owned(), limit, last_warning: Mutex::new(None) }
    }

    /// Returns the maximum time of retries; zero for none.
    pub fn limit(&self) -> Duration {
        self.limit
    }

    /// Makes an idempotent call until it succeeds, fails with a permanent error, or failed for the time of the limit.
    /// Pauses have random jitter, so that many ranks do not return at once.
    pub async fn retry<T, F>(&self, call: impl Fn() -> F) -> object_store::Result<T>
    where
        F: Future<Output = object_store::Result<T>>,
    {
        let start = Instant::now();
        let mut pause = INITIAL_PAUSE;
        loop {
            let error = match call().await {
                Err(error) if error::classify(&error) == StoreErrorKind::Transient => error,
                result => return result,
            };
            let elapsed = start.elapsed();
            if elapsed + pause > self.limit {
                return Err(error);
            }
            self.warn(elapsed, &error);
            // The standard library's hasher is seeded with a random number, which suffices here.
            let jitter = RandomState::new().hash_one(0) as f64 / u64::MAX as f64;
            tokio::time::sleep(pause.mul_f64(0.5 + 0.5 * jitter)).await;
            pause = (pause * 2).min(MAX_PAUSE);
        }
    }

    /// Warns at intervals that the store is unavailable.
    fn warn(&self, elapsed: Duration, error: &object_store::Error) {
        let mut last_warning = self.last_warning.lock().expect("the lock is not poisoned");
        if elapsed > WARNING_DELAY && last_warning.is_none_or(|last| last.elapsed() > WARNING_INTERVAL) {
            *last_warning = Some(Instant::now());
            tracing::warn!(
                "{} has been unavailable for {} s ({}); retrying for up to {} s",
                self.name,
                elapsed.as_secs(),
                error::summarize(error),
                self.limit.as_secs()
            );
        }
    }
}
