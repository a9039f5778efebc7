//! The heartbeat, which ends a job with a frozen or hung rank: neither MPI nor its launcher does.
//!
//! Twice a second each rank sends the step and phase of its training thread to the next rank. A rank that receives
//! nothing for too long, or the same step and phase for too long, reports it once and ends the job with exit code 70.
//! Silence is measured in the receiver's own ticks, so that time during which the job or the receiver was suspended
//! does not count.

use super::world::{HeartbeatLink, HeartbeatMessage, World};
use crate::bridge::bytes;
use crate::error::{Error, ExitCode, Result};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tch::Tensor;

/// Phase of the training thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Before the first step: config, model, checkpoint.
    Start,
    /// Waiting for samples.
    Data,
    /// Forward, backward, update.
    Compute,
    /// Waiting for the other ranks.
    Reduce,
    /// Writing a checkpoint.
    Save,
    /// Evaluation and images.
    Evaluate,
}

impl Phase {
    const ALL: [Phase; 6] = [Phase::Start, Phase::Data, Phase::Compute, Phase::Reduce, Phase::Save, Phase::Evaluate];

    fn name(self) -> &'static str {
        ["start", "data", "compute", "reduce", "save", "evaluate"][self as usize]
    }
}

/// Time-outs of the heartbeat.
#[derive(Clone, Debug)]
pub struct HeartbeatTimeouts {
    /// Maximum time without a message.
    pub silence: Duration,
    /// Maximum time at one step in one phase, by [`Phase`]. That of `Reduce` is longer than that of `Compute` and
    /// `Data`, so that the rank that blocks the others is reported before those that wait for it.
    pub phase: [Duration; 6],
}

impl Default for HeartbeatTimeouts {
    fn default() -> Self {
        HeartbeatTimeouts {
            silence: Duration::from_secs(60),
            phase: [1800, 900, 600, 1200, 1800, 1800].map(Duration::from_secs),
        }
    }
}

impl HeartbeatTimeouts {
    /// Replaces the time-out of `phase`.
    pub fn with_phase(mut self, phase: Phase, timeout: Duration) -> Self {
        self.phase[phase as usize] = timeout;
        self
    }
}

/// Handle with which the training thread reports its progress. A report is one store to memory.
#[derive(Clone, Default)]
pub struct ProgressHandle(Arc<AtomicU64>);

impl ProgressHandle {
    /// Reports the current step and phase.
    pub fn report(&self, step: u64, phase: Phase) {
        self.0.store(step << 3 | phase as u64, Ordering::Relaxed);
    }
    fn read(&self) -> (u64, Phase) {
        let packed = self.0.load(Ordering::Relaxed);
        (packed >> 3, Phase::ALL[(packed & 7) as usize])
    }
}

/// Failure of the previous rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerFailure {
    /// No message arrived for this time.
    Silent(Duration),
    /// Messages arrive, but the training thread made no progress for this time.
    Stuck(Duration),
}

/// Decides whether the previous rank has failed, without a clock or a connection of its own.
pub struct PeerMonitor {
    timeouts: HeartbeatTimeouts,
    step: u64,
    phase: Phase,
    silent_for: Duration,
    stuck_for: Duration,
    has_left: bool,
}

impl PeerMonitor {
    /// Creates a monitor of a rank in [`Phase::Start`].
    pub fn new(timeouts: HeartbeatTimeouts) -> Self {
        PeerMonitor {
            timeouts,
            step: 0,
            phase: Phase::Start,
            silent_for: Duration::ZERO,
            stuck_for: Duration::ZERO,
            has_left: false,
        }
    }
    /// Records a message of the rank.
    pub fn receive(&mut self, [step, phase, leaves]: HeartbeatMessage) {
        let phase = Phase::ALL[phase as usize % Phase::ALL.len()];
        if (step, phase) != (self.step, self.phase) {
            self.stuck_for = Duration::ZERO;
        }
        self.step = step;
        self.phase = phase;
        self.silent_for = Duration::ZERO;
        self.has_left = leaves != 0;
    }
    /// Advances the time by `elapsed` since the last call, and returns the failure of the rank, if there is one.
    pub fn tick(&mut self, elapsed: Duration) -> Option<PeerFailure> {
        if self.has_left {
            return None;
        }
        // A longer time means that this process was suspended, which does not count as silence of its peer.
        let elapsed = elapsed.min(2 * PERIOD);
        self.silent_for += elapsed;
        // A rank is stuck only while its messages arrive.
        if self.silent_for <= 2 * PERIOD {
            self.stuck_for += elapsed;
        }
        if self.silent_for > self.timeouts.silence {
            Some(PeerFailure::Silent(self.silent_for))
        } else if self.stuck_for > self.timeouts.phase[self.phase as usize] {
            Some(PeerFailure::Stuck(self.stuck_for))
        } else {
            None
        }
    }
}

/// Time between two messages.
const PERIOD: Duration = Duration::from_millis(500);

/// The heartbeat of this rank. Dropping it stops the messages without a goodbye.
pub struct Heartbeat {
    progress: ProgressHandle,
    thread: Option<(JoinHandle<()>, Arc<Flags>)>,
}

#[derive(Default)]
struct Flags {
    leaving: AtomicBool,
    dropped: AtomicBool,
}

impl Heartbeat {
    /// Starts the heartbeat; collective. It does nothing in a world without a [`HeartbeatLink`].
    pub fn start(world: &Arc<dyn World>, timeouts: HeartbeatTimeouts) -> Result<Self> {
        let progress = ProgressHandle::default();
        let Some(link) = world.heartbeat_link()? else { return Ok(Heartbeat { progress, thread: None }) };
        let flags = Arc::new(Flags::default());
        let mut heartbeat = HeartbeatThread {
            link,
            progress: progress.clone(),
            flags: flags.clone(),
            monitor: PeerMonitor::new(timeouts),
            hosts: gather_hosts(world.as_ref())?,
            world: world.clone(),
            previous_rank: (world.rank() + world.size() - 1) % world.size(),
            sent_at: None,
            goodbye_sent: false,
        };
        let thread = std::thread::Builder::new().name("heartbeat".into()).spawn(move || heartbeat.run());
        let thread = thread.map_err(|error| Error::failed(format!("heartbeat: cannot start its thread: {error}.")))?;
        Ok(Heartbeat { progress, thread: Some((thread, flags)) })
    }
    /// Returns a handle for the training thread.
    pub fn progress_handle(&self) -> ProgressHandle {
        self.progress.clone()
    }
    /// Ends the heartbeat with a goodbye, and waits until the previous rank has left as well; collective. If a rank
    /// ends without this, the next rank reports it as silent.
    pub fn finish(mut self) {
        if let Some((thread, flags)) = self.thread.take() {
            flags.leaving.store(true, Ordering::SeqCst);
            // The thread has reported its panic itself.
            let _ = thread.join();
        }
    }
}

impl Drop for Heartbeat {
    fn drop(&mut self) {
        if let Some((_, flags)) = &self.thread {
            flags.dropped.store(true, Ordering::SeqCst);
        }
    }
}

struct HeartbeatThread {
    link: Box<dyn HeartbeatLink>,
    progress: ProgressHandle,
    flags: Arc<Flags>,
    monitor: PeerMonitor,
    /// Host of each rank.
    hosts: Vec<String>,
    world: Arc<dyn World>,
    previous_rank: usize,
    sent_at: Option<Instant>,
    goodbye_sent: bool,
}

impl HeartbeatThread {
    fn run(&mut self) {
        let mut ticked_at = Instant::now();
        while !self.flags.dropped.load(Ordering::SeqCst) {
            if let Err(error) = self.exchange() {
                // An unreachable neighbor usually means that another rank has reported the reason and is ending the
                // job: the launcher kills this rank within the second.
                std::thread::sleep(2 * PERIOD);
                eprintln!("heartbeat of rank {}: {error}", self.world.rank());
                self.world.abort(ExitCode::Failed);
            }
            if let Some(failure) = self.monitor.tick(ticked_at.elapsed()) {
                eprintln!("{}", self.describe(failure));
                self.world.abort(ExitCode::Failed);
            }
            ticked_at = Instant::now();
            if self.goodbye_sent && self.monitor.has_left {
                return;
            }
            std::thread::sleep(PERIOD / 10);
        }
    }

    /// Sends a message if it is time, and receives the messages that have arrived.
    fn exchange(&mut self) -> Result<()> {
        let leaving = self.flags.leaving.load(Ordering::SeqCst);
        let is_due = leaving || self.sent_at.is_none_or(|sent_at| sent_at.elapsed() >= PERIOD);
        if is_due && !self.goodbye_sent {
            let (step, phase) = self.progress.read();
            if self.link.send([step, phase as u64, u64::from(leaving)])? {
                self.sent_at = Some(Instant::now());
                self.goodbye_sent = leaving;
            }
        }
        while let Some(message) = self.link.receive()? {
            self.monitor.receive(message);
        }
        Ok(())
    }

    fn describe(&self, failure: PeerFailure) -> String {
        let rank = self.previous_rank;
        let host = &self.hosts[rank];
        let timeouts = &self.monitor.timeouts;
        let phase = self.monitor.phase;
        let place = format!("step {}, phase {}", self.monitor.step, phase.name());
        match failure {
            PeerFailure::Silent(time) => format!(
                "Rank {rank} on host {host} has given no sign of life for {:.1} s (limit {:.1} s); its last message \
                 was from {place}. Its process is stopped, or its host is overloaded or out of reach. Ending the job.",
                time.as_secs_f64(),
                timeouts.silence.as_secs_f64()
            ),
            PeerFailure::Stuck(time) => format!(
                "Rank {rank} on host {host} lives but has been at {place} for {:.1} s (limit {:.1} s). Ending the job.",
                time.as_secs_f64(),
                timeouts.phase[phase as usize].as_secs_f64()
            ),
        }
    }
}

/// Gathers the host names of all ranks; collective.
fn gather_hosts(world: &dyn World) -> Result<Vec<String>> {
    const WIDTH: usize = 64;
    let mut name = rustix::system::uname().nodename().to_string_lossy().into_owned().into_bytes();
    name.resize(WIDTH, 0);
    let names = world.open_channel("hosts")?.all_gather(&Tensor::from_slice(&name)).wait(Duration::from_secs(600))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end_matches('\0').to_string();
    Ok(bytes(&names).chunks(WIDTH).map(text).collect())
}
