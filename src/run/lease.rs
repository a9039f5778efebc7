//! One writer per run, by a lease in the run's store.
//!
//! ```text
//! <run>/lease/000012.json   the twelfth holder: who, and since when; made by `create`, so only one can be
//!             000012.beat   a counter that the holder overwrites every third of the time-to-live
//! ```
//!
//! No clock is ever compared with another machine's: a waiting job watches the counter for one time-to-live on its own
//! monotonic clock. A released lease keeps its file, marked so, that the next epoch be larger than every one before.

use super::checkpoint::{Fence, survey};
use crate::data::store::Store;
use crate::fault::{Code, Fault, Result};
use serde::{Deserialize, Serialize};
use std::io::Read;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// How long a holder may be silent before another takes the run.
pub const TIME_TO_LIVE: Duration = Duration::from_secs(15);

/// The right to write a run, held until it is dropped.
#[derive(Debug)]
pub struct Lease {
    run: Store,
    record: Record,
    beats: Option<(Sender<()>, JoinHandle<()>)>,
}

/// What a lease file says.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Record {
    epoch: u64,
    #[serde(flatten)]
    holder: Holder,
    nonce: String,
    /// UTC, for people only.
    since: String,
    released: bool,
    fence: Option<Fence>,
}

/// A process, told apart from every other.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Holder {
    host: String,
    /// Drawn by the kernel at every boot.
    boot: String,
    /// The process-id namespace: containers on one host may share all else and yet not see each other's processes.
    namespace: String,
    pid: u32,
    /// The process's start time in clock ticks since boot: process ids are used again.
    started: u64,
}

impl Lease {
    /// Takes the run, for writing.
    ///
    /// A holder that released it, or that ran on this host and is dead, is succeeded at once. Any other is watched
    /// for at most `time_to_live`: if it beats, the run is held (exit code 73, naming it); if it stays silent, it is
    /// succeeded and will find out before its next commit.
    pub fn acquire(run: &Store, time_to_live: Duration) -> Result<Lease> {
        let holder = Holder::here()?;
        let before = latest(run)?;
        if let Some((epoch, record)) = &before {
            watch(run, *epoch, record.as_ref(), &holder, time_to_live)?;
        }
        // Checkpoints may have been copied here without their leases.
        let committed = survey(run, None)?.iter().filter_map(|e| Some(e.usable()?.0.epoch)).max();
        let epoch = before.as_ref().map(|(epoch, _)| *epoch).max(committed).unwrap_or(0) + 1;
        let inherited = before.and_then(|(_, record)| record?.fence);
        let mut record =
            Record { epoch, holder, nonce: nonce()?, since: utc(SystemTime::now()), released: false, fence: inherited };
        let taken = run.create(&record_path(epoch), &record.to_bytes())?;
        // Whoever made this file since it was looked for has just shown that it lives, and so has any later one.
        match latest(run)? {
            Some((newest, other)) if !taken || newest > epoch => {
                if taken {
                    run.delete(&record_path(epoch))?;
                }
                return Err(held(run, newest, other.as_ref()));
            }
            None => return Err(Fault::new(Code::Store, format!("{}: a lease written there is gone again", run.url()))),
            Some(_) => {}
        }
        let newest = survey(run, inherited)?.iter().rev().find_map(|entry| Some(entry.usable()?.0.step));
        record.fence = Some(Fence { epoch, step: newest });
        run.put(&record_path(epoch), &record.to_bytes())?;
        run.put(&beat_path(epoch), format!("{} 0", record.nonce).as_bytes())?;
        clean(run, epoch);
        let beats = start_beats(run.clone(), epoch, record.nonce.clone(), time_to_live / 3)?;
        Ok(Lease { run: run.clone(), record, beats: Some(beats) })
    }

    /// Larger than that of every holder before.
    pub fn epoch(&self) -> u64 {
        self.record.epoch
    }

    /// Reads the lease again. A fault with exit code 73 when another took the run, with the store's own code when
    /// that cannot be told.
    pub fn check(&self) -> Result<()> {
        match latest(&self.run)? {
            Some((epoch, Some(record))) if epoch == self.record.epoch && record.nonce == self.record.nonce => Ok(()),
            Some((epoch, record)) if epoch >= self.record.epoch => Err(held(&self.run, epoch, record.as_ref())),
            _ => Err(Fault::new(
                Code::Held,
                format!(
                    "{}: the lease of this job (epoch {}) is gone. Somebody removed the run's lease folder; resume \
                     to take the run again.",
                    self.run.url(),
                    self.record.epoch
                ),
            )),
        }
    }

    /// Whether [`Lease::check`] passes.
    pub fn still_mine(&self) -> bool {
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
        if let Some((stop, thread)) = self.beats.take() {
            drop(stop);
            let _ = thread.join();
        }
        if let Err(fault) = self.release() {
            tracing::warn!("the run's lease was not released: {fault}");
        }
    }
}

impl Record {
    fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec_pretty(self).expect("a lease is plain JSON")
    }
}

impl Holder {
    /// This process.
    fn here() -> Result<Holder> {
        let read = |path: &str| std::fs::read_to_string(path).map_err(|error| Fault::disk(path, error));
        let namespace = std::fs::read_link("/proc/self/ns/pid").map_err(|e| Fault::disk("/proc/self/ns/pid", e))?;
        let pid = std::process::id();
        Ok(Holder {
            host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
            boot: read("/proc/sys/kernel/random/boot_id")?.trim().to_owned(),
            namespace: namespace.to_string_lossy().into_owned(),
            pid,
            started: started(pid).ok_or_else(|| Fault::failed("/proc/self/stat: no start time of this process"))?,
        })
    }

    /// Whether `self` is a process that `here` can see to be dead.
    fn seen_dead_by(&self, here: &Holder) -> bool {
        let near = (&self.host, &self.boot, &self.namespace) == (&here.host, &here.boot, &here.namespace);
        near && started(self.pid) != Some(self.started)
    }
}

/// The start time of a process in clock ticks since boot (field 22 of its stat); None when it is dead or a zombie.
fn started(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the program's name in parentheses and may itself hold any character.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    let state = fields.next()?;
    if matches!(state, "Z" | "X") { None } else { fields.nth(18)?.parse().ok() }
}

/// The newest holder's fence, for readers of checkpoints.
pub(super) fn fence(run: &Store) -> Result<Option<Fence>> {
    Ok(latest(run)?.and_then(|(_, record)| record?.fence))
}

/// 32 hexadecimal digits that nobody else draws.
pub(super) fn nonce() -> Result<String> {
    let mut bytes = [0; 16];
    let source = "/dev/urandom";
    std::fs::File::open(source).and_then(|mut f| f.read_exact(&mut bytes)).map_err(|e| Fault::disk(source, e))?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

fn record_path(epoch: u64) -> String {
    format!("lease/{epoch:06}.json")
}

fn beat_path(epoch: u64) -> String {
    format!("lease/{epoch:06}.beat")
}

/// The newest lease: its epoch, and what it says if that can be read.
fn latest(run: &Store) -> Result<Option<(u64, Option<Record>)>> {
    loop {
        let newest = run.list("lease")?.iter().filter_map(|(path, _)| epoch_of(path)).max();
        let Some(epoch) = newest else { return Ok(None) };
        // Absent now: its successor cleaned it away, so look again.
        if let Some(bytes) = run.get_if_there(&record_path(epoch))? {
            return Ok(Some((epoch, serde_json::from_slice(&bytes).ok())));
        }
    }
}

fn epoch_of(path: &str) -> Option<u64> {
    let epoch = path.strip_prefix("lease/")?.strip_suffix(".json")?.parse().ok()?;
    (record_path(epoch) == path).then_some(epoch)
}

/// Returns when the holder of `epoch` may be succeeded; a fault when it lives.
fn watch(run: &Store, epoch: u64, record: Option<&Record>, here: &Holder, time_to_live: Duration) -> Result<()> {
    let vacant = |record: Option<&Record>| record.is_some_and(|r| r.released || r.holder.seen_dead_by(here));
    if vacant(record) {
        return Ok(());
    }
    let first = run.get_if_there(&beat_path(epoch))?;
    let begun = Instant::now();
    tracing::info!("{}: waiting up to {time_to_live:?} for a sign of life from the job that holds it", run.url());
    while begun.elapsed() < time_to_live {
        std::thread::sleep(time_to_live / 20);
        match latest(run)? {
            Some((newest, record)) if newest == epoch => {
                if vacant(record.as_ref()) {
                    return Ok(());
                }
                if run.get_if_there(&beat_path(epoch))? != first {
                    return Err(held(run, epoch, record.as_ref()));
                }
            }
            Some((newest, record)) => return Err(held(run, newest, record.as_ref())),
            None => return Ok(()),
        }
    }
    Ok(())
}

fn held(run: &Store, epoch: u64, record: Option<&Record>) -> Fault {
    let who = record.map_or("another job".to_owned(), |record| {
        let Holder { host, pid, .. } = &record.holder;
        format!("process {pid} on {host} since {}", record.since)
    });
    let remedy = "Wait for that job or stop it, or choose another run.";
    Fault::new(Code::Held, format!("{}: held by {who} (epoch {epoch}). {remedy}", run.url()))
}

/// Removes what holders before `epoch` left. A file that stays harms nothing.
fn clean(run: &Store, epoch: u64) {
    let Ok(files) = run.list("lease") else { return };
    for (path, _) in files {
        let old = epoch_of(&path.replace(".beat", ".json")).is_some_and(|of| of < epoch);
        if old && let Err(fault) = run.delete(&path) {
            tracing::warn!("an old lease was not removed: {fault}");
        }
    }
}

/// Starts the thread that counts; it ends when the sender is dropped, or another holds the run.
fn start_beats(run: Store, epoch: u64, nonce: String, period: Duration) -> Result<(Sender<()>, JoinHandle<()>)> {
    let (stop, stopped) = channel();
    let thread = std::thread::Builder::new()
        .name("lease".into())
        .spawn(move || beat(&run, epoch, &nonce, period, &stopped))
        .map_err(|error| Fault::failed(format!("cannot start the thread that keeps the run's lease: {error}")))?;
    Ok((stop, thread))
}

fn beat(run: &Store, epoch: u64, nonce: &str, period: Duration, stopped: &Receiver<()>) {
    for count in 1u64.. {
        if stopped.recv_timeout(period) != Err(RecvTimeoutError::Timeout) {
            return;
        }
        match latest(run) {
            Ok(Some((newest, record))) if newest > epoch => {
                tracing::error!("{}", held(run, newest, record.as_ref()));
                return;
            }
            _ => {}
        }
        if let Err(fault) = run.put(&beat_path(epoch), format!("{nonce} {count}").as_bytes()) {
            tracing::warn!("the run's lease was not renewed: {fault}");
        }
    }
}

/// `2026-01-31 23:59:59 UTC`, by the days-to-date rule of the proleptic Gregorian calendar.
fn utc(time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    // Days since 1 March of the year 0, so that leap days come last.
    let days = seconds / 86_400 + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let date = day - (153 * month + 2) / 5 + 1;
    let (month, ahead) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    let clock = seconds % 86_400;
    let year = year + era * 400 + ahead;
    format!("{year:04}-{month:02}-{date:02} {:02}:{:02}:{:02} UTC", clock / 3_600, clock / 60 % 60, clock % 60)
}
