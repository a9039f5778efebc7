//! The heartbeat: what ends a job whose rank is frozen or stuck, for neither MPI nor its launcher ever would.
//!
//! Twice a second each rank tells the next one the step and phase that its training thread last reported. Who hears
//! nothing for too long, or always the same, says so once and ends the job with exit code 70. Silence is counted in
//! the listener's own ticks, so that a whole job that was suspended, or a listener that was, accuses nobody.

use super::world::World;
use crate::fault::{Code, Fault, Result};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tch::Tensor;

/// What a rank tells the next one: step, phase, whether it has left.
pub type Word = [u64; 3];

/// A line to the next rank and from the one before.
pub trait Ring: Send {
    /// Sends `word` unless the one before is still under way; whether it did.
    fn send(&mut self, word: Word) -> Result<bool>;
    /// The next word that has come, if any.
    fn receive(&mut self) -> Result<Option<Word>>;
}

/// What the training thread is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Before the first step: reading the config, the model, a checkpoint.
    Start,
    /// Waiting for samples.
    Data,
    /// Forward, backward, update.
    Compute,
    /// Waiting for the other ranks.
    Reduce,
    /// Writing a checkpoint.
    Save,
    /// Evaluating, drawing pictures.
    Evaluate,
}

impl Phase {
    const ALL: [Phase; 6] = [Phase::Start, Phase::Data, Phase::Compute, Phase::Reduce, Phase::Save, Phase::Evaluate];

    fn name(self) -> &'static str {
        ["start", "data", "compute", "reduce", "save", "evaluate"][self as usize]
    }
}

/// How long is too long.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Without any sign of a rank.
    pub silence: Duration,
    /// At the same step in the same phase, by [`Phase`]. That of `Reduce` is the longest but for saving, so that the
    /// rank that holds up the others is named before those that wait for it.
    pub phase: [Duration; 6],
}

impl Default for Limits {
    fn default() -> Self {
        let seconds = Duration::from_secs;
        Limits { silence: seconds(60), phase: [1800, 900, 600, 1200, 1800, 1800].map(seconds) }
    }
}

impl Limits {
    /// These limits with another one for `phase`.
    pub fn with(mut self, phase: Phase, limit: Duration) -> Self {
        self.phase[phase as usize] = limit;
        self
    }
}

/// The training thread's end of the heartbeat; costs one store to memory.
#[derive(Clone, Default)]
pub struct Beat(Arc<AtomicU64>);

impl Beat {
    /// Reports where the training is.
    pub fn at(&self, step: u64, phase: Phase) {
        self.0.store(step << 3 | phase as u64, Ordering::Relaxed);
    }
    fn read(&self) -> (u64, Phase) {
        let now = self.0.load(Ordering::Relaxed);
        (now >> 3, Phase::ALL[(now & 7) as usize])
    }
}

/// What is wrong with the rank before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// Nothing has come from it.
    Silent(Duration),
    /// It lives, and its training thread does not get on.
    Stuck(Duration),
}

/// The judgement alone, without a clock or a wire.
pub struct Watch {
    limits: Limits,
    at: (u64, Phase),
    silence: Duration,
    standstill: Duration,
    gone: bool,
}

impl Watch {
    pub fn new(limits: Limits) -> Self {
        let at = (0, Phase::Start);
        Watch { limits, at, silence: Duration::ZERO, standstill: Duration::ZERO, gone: false }
    }
    /// A word has come.
    pub fn hear(&mut self, [step, phase, left]: Word) {
        let at = (step, Phase::ALL[phase as usize % Phase::ALL.len()]);
        if at != self.at {
            self.standstill = Duration::ZERO;
        }
        (self.at, self.silence, self.gone) = (at, Duration::ZERO, left != 0);
    }
    /// `passed` since the last call; what is wrong by now.
    pub fn tick(&mut self, passed: Duration) -> Option<Trouble> {
        if self.gone {
            return None;
        }
        // Who was stopped itself has no right to a long silence of others.
        let passed = passed.min(2 * PERIOD);
        self.silence += passed;
        // Standing still is held only against a rank whose pulses still come.
        if self.silence <= 2 * PERIOD {
            self.standstill += passed;
        }
        match () {
            () if self.silence > self.limits.silence => Some(Trouble::Silent(self.silence)),
            () if self.standstill > self.limits.phase[self.at.1 as usize] => Some(Trouble::Stuck(self.standstill)),
            () => None,
        }
    }
}

const PERIOD: Duration = Duration::from_millis(500);

/// The heartbeat of this rank, while it lives.
pub struct Pulse {
    beat: Beat,
    thread: Option<(JoinHandle<()>, Arc<Flags>)>,
}

#[derive(Default)]
struct Flags {
    leaving: AtomicBool,
    dropped: AtomicBool,
}

impl Pulse {
    /// Starts the heartbeat; collective. Where ranks cannot freeze one by one there is none.
    pub fn start(world: &Arc<dyn World>, limits: Limits) -> Result<Self> {
        let beat = Beat::default();
        let Some(ring) = world.ring()? else { return Ok(Pulse { beat, thread: None }) };
        let hosts = hosts(world.as_ref())?;
        let flags = Arc::new(Flags::default());
        let mut heart = Heart {
            ring,
            beat: beat.clone(),
            flags: flags.clone(),
            watch: Watch::new(limits),
            hosts,
            world: world.clone(),
            before: (world.rank() + world.size() - 1) % world.size(),
        };
        let thread = std::thread::Builder::new().name("heartbeat".into()).spawn(move || heart.run());
        let thread = thread.map_err(|error| Fault::failed(format!("heartbeat: no thread for it: {error}.")))?;
        Ok(Pulse { beat, thread: Some((thread, flags)) })
    }
    /// A handle for the training thread.
    pub fn beat(&self) -> Beat {
        self.beat.clone()
    }
    /// Ends the heartbeat; collective: returns once the rank before has left as well. A rank that goes without this
    /// is missed by the next one.
    pub fn finish(mut self) {
        if let Some((thread, flags)) = self.thread.take() {
            flags.leaving.store(true, Ordering::SeqCst);
            // A panic of the thread has been told.
            let _ = thread.join();
        }
    }
}

impl Drop for Pulse {
    fn drop(&mut self) {
        if let Some((_, flags)) = &self.thread {
            flags.dropped.store(true, Ordering::SeqCst);
        }
    }
}

struct Heart {
    ring: Box<dyn Ring>,
    beat: Beat,
    flags: Arc<Flags>,
    watch: Watch,
    hosts: Vec<String>,
    world: Arc<dyn World>,
    before: usize,
}

impl Heart {
    fn run(&mut self) {
        let (mut sent, mut looked) = (Instant::now() - PERIOD, Instant::now());
        let mut farewell = false;
        while !self.flags.dropped.load(Ordering::SeqCst) {
            if let Err(fault) = self.exchange(&mut sent, &mut farewell) {
                // A neighbour out of reach mostly means that the job is being ended, and who ended it has told why:
                // the launcher kills this rank within the second.
                std::thread::sleep(2 * PERIOD);
                eprintln!("heartbeat of rank {}: {fault}", self.world.rank());
                self.world.abort(Code::Failed);
            }
            if let Some(trouble) = self.watch.tick(looked.elapsed()) {
                eprintln!("{}", self.story(trouble));
                self.world.abort(Code::Failed);
            }
            looked = Instant::now();
            if farewell && self.watch.gone {
                return;
            }
            std::thread::sleep(PERIOD / 10);
        }
    }

    fn exchange(&mut self, sent: &mut Instant, farewell: &mut bool) -> Result<()> {
        let leaving = self.flags.leaving.load(Ordering::SeqCst);
        if !*farewell && (leaving || sent.elapsed() >= PERIOD) {
            let (step, phase) = self.beat.read();
            if self.ring.send([step, phase as u64, u64::from(leaving)])? {
                (*sent, *farewell) = (Instant::now(), leaving);
            }
        }
        while let Some(word) = self.ring.receive()? {
            self.watch.hear(word);
        }
        Ok(())
    }

    fn story(&self, trouble: Trouble) -> String {
        let ((step, phase), rank, host) = (self.watch.at, self.before, &self.hosts[self.before]);
        let place = format!("step {step}, phase {}", phase.name());
        match trouble {
            Trouble::Silent(time) => format!(
                "Rank {rank} on host {host} has given no sign of life for {:.1} s (limit {:.1} s); it was last heard \
                 of at {place}. Its process is stopped, or its host is overloaded or out of reach. Ending the job.",
                time.as_secs_f64(),
                self.watch.limits.silence.as_secs_f64()
            ),
            Trouble::Stuck(time) => format!(
                "Rank {rank} on host {host} lives but has been at {place} for {:.1} s (limit {:.1} s). Ending the job.",
                time.as_secs_f64(),
                self.watch.limits.phase[phase as usize].as_secs_f64()
            ),
        }
    }
}

/// The host of every rank.
fn hosts(world: &dyn World) -> Result<Vec<String>> {
    const WIDTH: usize = 64;
    let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let mut own = name.into_bytes();
    own.resize(WIDTH, 0);
    let all = world.channel("hosts")?.all_gather(&Tensor::from_slice(&own)).wait(Duration::from_secs(600))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end_matches('\0').to_string();
    Ok(crate::bridge::bytes(&all).chunks(WIDTH).map(text).collect())
}
