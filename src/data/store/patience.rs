//! Riding out an outage: a call is made again until it succeeds, fails for good, or the store was away too long.

use super::words::{self, Kind};
use std::hash::{BuildHasher, RandomState};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Between the first two attempts; then twice as long each time.
const FIRST: Duration = Duration::from_millis(200);
const LONGEST: Duration = Duration::from_secs(10);
/// Between two words to the user about one outage.
const WORDS: Duration = Duration::from_secs(15);

/// How long a store may be away.
pub(super) struct Patience {
    name: String,
    limit: Duration,
    /// When the user was last told.
    told: Mutex<Option<Instant>>,
}

impl Patience {
    pub fn new(name: &str, limit: Duration) -> Patience {
        Patience { name: name.to_owned(), limit, told: Mutex::new(None) }
    }

    pub fn limit(&self) -> Duration {
        self.limit
    }

    /// Makes an idempotent call until it succeeds, or fails in a way that does not pass, or fails for the limit's
    /// time. Repetitions are spread at random, so that many ranks do not come back at once.
    pub async fn over<T, F>(&self, call: impl Fn() -> F) -> object_store::Result<T>
    where
        F: Future<Output = object_store::Result<T>>,
    {
        let began = Instant::now();
        let mut pause = FIRST;
        loop {
            let error = match call().await {
                Err(error) if words::kind(&error) == Kind::Passing => error,
                done => return done,
            };
            let spent = began.elapsed();
            if spent + pause > self.limit {
                return Err(error);
            }
            self.tell(spent, &error);
            // Any random number will do, and the standard library's hasher begins with one.
            let chance = RandomState::new().hash_one(0) as f64 / u64::MAX as f64;
            tokio::time::sleep(pause.mul_f64(0.5 + 0.5 * chance)).await;
            pause = (pause * 2).min(LONGEST);
        }
    }

    /// Says from time to time that the store is away.
    fn tell(&self, spent: Duration, error: &object_store::Error) {
        let mut told = self.told.lock().expect("no panic while held");
        // A single failed request is everyday life.
        if spent > Duration::from_secs(2) && told.is_none_or(|last| last.elapsed() > WORDS) {
            *told = Some(Instant::now());
            tracing::warn!(
                "{} is away for {} s ({}); trying on for up to {} s",
                self.name,
                spent.as_secs(),
                words::shortly(error),
                self.limit.as_secs()
            );
        }
    }
}
