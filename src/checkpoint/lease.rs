//! One writer per run, by a lease in the run's store.
//!
//! ```text
//! <run>/lease/000012.json   the holder of epoch 12 and when it took the run; written with `create`, so that only one
//!                           job can take an epoch
//!             000012.beat   a heartbeat counter that the holder overwrites every third of the time-to-live
//! ```
//!
//! Clocks of different machines are never compared: a waiting job observes the counter for one time-to-live on its own
//! monotonic clock. A released lease keeps its file, marked as released, so that the next epoch is larger than all
//! before.

use super::{Fence, scan};
use crate::data::store::Store;
use crate::error::{Error, ExitCode, Result};
use serde::{Deserialize, Serialize};
use std::io::Read;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Time without a heartbeat after which another job may take the run.
pub const TIME_TO_LIVE: Duration = Duration::from_secs(15);

/// The exclusive right to write a run; released on drop.
#[derive(Debug)]
pub struct Lease {
    run: Store,
    record: LeaseRecord,
    heartbeat: Option<(Sender<()>, JoinHandle<()>)>,
}

/// The contents of a lease file.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct LeaseRecord {
    epoch: u64,
    #[serde(flatten)]
    holder: Holder,
    nonce: String,
    /// UTC, for display only.
    since: String,
    released: bool,
    fence: Option<Fence>,
}

/// The identity of a process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Holder {
    host: String,
    /// The kernel's random id of this boot.
    boot: String,
    /// The process-id namespace: containers on one host may have equal host names and not see each other's processes.
    namespace: String,
    pid: u32,
    /// The process's start time in clock ticks since boot, because process ids are reused.
    started: u64,
}

impl Lease {
    /// Takes the run for writing.
    ///
    /// A run whose holder released it, or ran on this host and is dead, is taken at once. Any other holder is observed
    /// for at most `time_to_live`. If its counter changes, the run is held. If not, the run is taken, and the old
    /// holder finds out before its next commit.
    ///
    /// # Errors
    /// [`ExitCode::LeaseHeld`] if another job holds the run; the message names it.
    pub fn acquire(run: &Store, time_to_live: Duration) -> Result<Lease> {
        let holder = Holder::current_process()?;
        let previous = latest(run)?;
        if let Some((epoch, record)) = &previous {
            wait_until_vacant(run, *epoch, record.as_ref(), &holder, time_to_live)?;
        }
        // Checkpoints may have been copied here without their leases.
        let committed = scan(run, None)?.iter().filter_map(|entry| Some(entry.usable_manifest()?.0.epoch)).max();
        let epoch = previous.as_ref().map(|(epoch, _)| *epoch).max(committed).unwrap_or(0) + 1;
        let inherited = previous.and_then(|(_, record)| record?.fence);
        let since = format_utc(SystemTime::now());
        let mut record =
            LeaseRecord { epoch, holder, nonce: random_nonce()?, since, released: false, fence: inherited };
        let is_created = run.create(&record_path(epoch), &record.to_bytes())?;
        // A job that created this file, or a later one, since the first look is alive.
        match latest(run)? {
            Some((newest, other)) if !is_created || newest > epoch => {
                if is_created {
                    run.delete(&record_path(epoch))?;
                }
                return Err(lease_held(run, newest, other.as_ref()));
            }
            None => {
                let message = format!("{}: a lease written there is gone again", run.url());
                return Err(Error::new(ExitCode::Store, message));
            }
            Some(_) => {}
        }
        let newest_step = scan(run, inherited)?.iter().rev().find_map(|entry| Some(entry.usable_manifest()?.0.step));
        record.fence = Some(Fence { epoch, step: newest_step });
        run.put(&record_path(epoch), &record.to_bytes())?;
        run.put(&beat_path(epoch), format!("{} 0", record.nonce).as_bytes())?;
        remove_older(run, epoch);
        let heartbeat = start_heartbeat(run.clone(), epoch, record.nonce.clone(), time_to_live / 3)?;
        Ok(Lease { run: run.clone(), record, heartbeat: Some(heartbeat) })
    }

    /// Returns this holder's epoch, which is larger than that of every holder before.
    pub fn epoch(&self) -> u64 {
        self.record.epoch
    }

    /// Reads the lease again and checks that this job still holds it.
    ///
    /// # Errors
    /// [`ExitCode::LeaseHeld`] if another job took the run; the store's own code if the lease cannot be read.
    pub fn check(&self) -> Result<()> {
        match latest(&self.run)? {
            Some((epoch, Some(record))) if epoch == self.record.epoch && record.nonce == self.record.nonce => Ok(()),
            Some((epoch, record)) if epoch >= self.record.epoch => Err(lease_held(&self.run, epoch, record.as_ref())),
            _ => Err(Error::new(
                ExitCode::LeaseHeld,
                format!(
                    "{}: the lease of this job (epoch {}) is gone. Somebody removed the run's lease folder; resume \
                     to take the run again.",
                    self.run.url(),
                    self.record.epoch
                ),
            )),
        }
    }

    /// Returns whether [`Lease::check`] succeeds.
    pub fn is_held(&self) -> bool {
        self.check().is_ok()
    }

    fn release(&mut self) -> Result<()> {
        self.check()?;
        self.record.released = true;
        self.run.put(&record_path(self.record.epoch), &self.record.to_bytes())?;
        self.run.delete(&beat_path(self.record.epoch))
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some((stop, thread)) = self.heartbeat.take() {
            drop(stop);
            let _ = thread.join();
        }
        if let Err(error) = self.release() {
            tracing::warn!("the run's lease was not released: {error}");
        }
    }
}

impl LeaseRecord {
    fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec_pretty(self).expect("a lease is plain JSON")
    }

    /// Returns whether the lease was released or its holder is known to be dead.
    fn is_vacant(&self, observer: &Holder) -> bool {
        self.released || self.holder.is_known_dead(observer)
    }
}

impl Holder {
    /// Returns the identity of this process.
    fn current_process() -> Result<Holder> {
        let read = |path: &str| std::fs::read_to_string(path).map_err(|error| Error::disk(path, error));
        let namespace_path = "/proc/self/ns/pid";
        let namespace = std::fs::read_link(namespace_path).map_err(|error| Error::disk(namespace_path, error))?;
        let pid = std::process::id();
        Ok(Holder {
            host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
            boot: read("/proc/sys/kernel/random/boot_id")?.trim().to_owned(),
            namespace: namespace.to_string_lossy().into_owned(),
            pid,
            started: start_time(pid).ok_or_else(|| Error::failed("/proc/self/stat: no start time of this process"))?,
        })
    }

    /// Returns whether `observer` can see this process's namespace and the process is dead.
    fn is_known_dead(&self, observer: &Holder) -> bool {
        let is_visible =
            self.host == observer.host && self.boot == observer.boot && self.namespace == observer.namespace;
        is_visible && start_time(self.pid) != Some(self.started)
    }
}

/// Returns the start time of a process in clock ticks since boot (field 22 of `/proc/<pid>/stat`), or `None` if the
/// process is dead or a zombie.
fn start_time(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the program's name in parentheses, which may itself contain any character.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    let state = fields.next()?;
    if matches!(state, "Z" | "X") { None } else { fields.nth(18)?.parse().ok() }
}

/// Reads the newest holder's fence, for readers of checkpoints.
pub(super) fn read_fence(run: &Store) -> Result<Option<Fence>> {
    Ok(latest(run)?.and_then(|(_, record)| record?.fence))
}

/// Returns 32 random hexadecimal digits.
pub(super) fn random_nonce() -> Result<String> {
    let mut bytes = [0; 16];
    let source = "/dev/urandom";
    let file = std::fs::File::open(source);
    file.and_then(|mut file| file.read_exact(&mut bytes)).map_err(|error| Error::disk(source, error))?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

fn record_path(epoch: u64) -> String {
    format!("lease/{epoch:06}.json")
}

fn beat_path(epoch: u64) -> String {
    format!("lease/{epoch:06}.beat")
}

/// Returns the newest lease: its epoch, and its record if that can be parsed.
fn latest(run: &Store) -> Result<Option<(u64, Option<LeaseRecord>)>> {
    loop {
        let newest = run.list("lease")?.iter().filter_map(|(path, _)| epoch_of(path)).max();
        let Some(epoch) = newest else { return Ok(None) };
        // If the file is gone, its successor has removed it: list again.
        if let Some(bytes) = run.get_optional(&record_path(epoch))? {
            return Ok(Some((epoch, serde_json::from_slice(&bytes).ok())));
        }
    }
}

fn epoch_of(path: &str) -> Option<u64> {
    let epoch = path.strip_prefix("lease/")?.strip_suffix(".json")?.parse().ok()?;
    (record_path(epoch) == path).then_some(epoch)
}

/// Returns when the run may be taken from the holder of `epoch`.
///
/// # Errors
/// [`ExitCode::LeaseHeld`] if the holder is alive.
fn wait_until_vacant(
    run: &Store,
    epoch: u64,
    record: Option<&LeaseRecord>,
    observer: &Holder,
    time_to_live: Duration,
) -> Result<()> {
    if record.is_some_and(|record| record.is_vacant(observer)) {
        return Ok(());
    }
    let first_beat = run.get_optional(&beat_path(epoch))?;
    let start = Instant::now();
    tracing::info!("{}: waiting up to {time_to_live:?} for a heartbeat of the job that holds it", run.url());
    while start.elapsed() < time_to_live {
        std::thread::sleep(time_to_live / 20);
        match latest(run)? {
            Some((newest, record)) if newest == epoch => {
                if record.as_ref().is_some_and(|record| record.is_vacant(observer)) {
                    return Ok(());
                }
                if run.get_optional(&beat_path(epoch))? != first_beat {
                    return Err(lease_held(run, epoch, record.as_ref()));
                }
            }
            Some((newest, record)) => return Err(lease_held(run, newest, record.as_ref())),
            None => return Ok(()),
        }
    }
    Ok(())
}

fn lease_held(run: &Store, epoch: u64, record: Option<&LeaseRecord>) -> Error {
    let holder = record.map_or("another job".to_owned(), |record| {
        let Holder { host, pid, .. } = &record.holder;
        format!("process {pid} on {host} since {}", record.since)
    });
    let remedy = "Wait for that job or stop it, or choose another run.";
    Error::new(ExitCode::LeaseHeld, format!("{}: held by {holder} (epoch {epoch}). {remedy}", run.url()))
}

/// Removes the files of holders before `epoch`. A file that cannot be removed does no harm.
fn remove_older(run: &Store, epoch: u64) {
    let Ok(files) = run.list("lease") else { return };
    for (path, _) in files {
        let is_older = epoch_of(&path.replace(".beat", ".json")).is_some_and(|other| other < epoch);
        if is_older && let Err(error) = run.delete(&path) {
            tracing::warn!("an old lease was not removed: {error}");
        }
    }
}

/// Starts the heartbeat thread. It ends when the sender is dropped or another job holds the run.
fn start_heartbeat(run: Store, epoch: u64, nonce: String, period: Duration) -> Result<(Sender<()>, JoinHandle<()>)> {
    let (stop, stop_receiver) = channel();
    let thread = std::thread::Builder::new()
        .name("lease".into())
        .spawn(move || run_heartbeat(&run, epoch, &nonce, period, &stop_receiver))
        .map_err(|error| Error::failed(format!("cannot start the thread that renews the run's lease: {error}")))?;
    Ok((stop, thread))
}

fn run_heartbeat(run: &Store, epoch: u64, nonce: &str, period: Duration, stop: &Receiver<()>) {
    for count in 1u64.. {
        if stop.recv_timeout(period) != Err(RecvTimeoutError::Timeout) {
            return;
        }
        match latest(run) {
            Ok(Some((newest, record))) if newest > epoch => {
                tracing::error!("{}", lease_held(run, newest, record.as_ref()));
                return;
            }
            _ => {}
        }
        if let Err(error) = run.put(&beat_path(epoch), format!("{nonce} {count}").as_bytes()) {
            tracing::warn!("the run's lease was not renewed: {error}");
        }
    }
}

/// Formats a time as `2026-01-31 23:59:59 UTC`, with the days-to-date algorithm of the proleptic Gregorian calendar
/// (Howard Hinnant, "chrono-compatible low-level date algorithms", `civil_from_days`).
fn format_utc(time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs());
    // Days since 1 March of year 0: a year that begins in March has its leap day last.
    let days = seconds / 86_400 + 719_468;
    let era = days / 146_097;
    let day_of_era = days % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let second_of_day = seconds % 86_400;
    let hour = second_of_day / 3_600;
    let minute = second_of_day / 60 % 60;
    let second = second_of_day % 60;
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02} UTC")
}
