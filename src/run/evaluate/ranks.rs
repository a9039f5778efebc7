//! The ranks of one evaluation: what they tell each other, and the heartbeat that ends a hung one.

use crate::bridge::bytes;
use crate::config::Config;
use crate::device::{self, Channel, Limits, Phase, Pulse, Reduce, World};
use crate::fault::Result;
use std::sync::Arc;
use std::time::Duration;
use tch::{Device, Kind, Tensor};

/// Ranks wait for the slowest of them through a whole pass over a data set; the heartbeat, not this, ends a hang.
const PATIENCE: Duration = Duration::from_secs(24 * 3600);

/// One rank's end of the talk. Tensors that travel lie on the CPU.
pub struct Ranks {
    world: Arc<dyn World>,
    channel: Box<dyn Channel>,
    pulse: Pulse,
    /// Pieces of work done, for the heartbeat.
    done: u64,
}

impl Ranks {
    /// Starts the heartbeat and opens the channel; collective. A rank may be silent for `frozen_s`, and stay at one
    /// piece of work for `deadline_s`.
    pub fn join(world: &Arc<dyn World>, frozen_s: f64, deadline_s: f64) -> Result<Ranks> {
        let limits = Limits { silence: Duration::from_secs_f64(frozen_s), ..Limits::default() }
            .with(Phase::Evaluate, Duration::from_secs_f64(deadline_s))
            .with(Phase::Reduce, PATIENCE);
        let pulse = Pulse::start(world, limits)?;
        Ok(Ranks { channel: world.channel("evaluation")?, world: world.clone(), pulse, done: 0 })
    }

    pub fn rank(&self) -> usize {
        self.world.rank()
    }

    pub fn size(&self) -> usize {
        self.world.size()
    }

    /// Whether this rank tells the story.
    pub fn first(&self) -> bool {
        self.rank() == 0
    }

    /// Ranks on this host.
    pub fn neighbours(&self) -> usize {
        self.world.local_size()
    }

    /// Tells the heartbeat that a piece of work is done.
    pub fn beat(&mut self) {
        self.done += 1;
        self.pulse.beat().at(self.done, Phase::Evaluate);
    }

    /// Sums tensors over ranks in place; collective.
    pub fn sum(&mut self, tensors: &[&Tensor]) -> Result<()> {
        self.reduce(tensors, Reduce::Sum)
    }

    /// The largest of a number over ranks; collective.
    pub fn largest(&mut self, own: i64) -> Result<i64> {
        let all = Tensor::from_slice(&[own]);
        self.reduce(&[&all], Reduce::Max)?;
        Ok(all.int64_value(&[0]))
    }

    fn reduce(&mut self, tensors: &[&Tensor], how: Reduce) -> Result<()> {
        self.wait();
        let under_way: Vec<_> = tensors.iter().map(|tensor| self.channel.all_reduce(tensor, how)).collect();
        under_way.into_iter().try_for_each(|pending| pending.done(PATIENCE))?;
        self.beat();
        Ok(())
    }

    /// Rank 0's tensors into everyone's, in place; collective.
    pub fn take_from_first(&mut self, tensors: &[&Tensor]) -> Result<()> {
        self.wait();
        for tensor in tensors {
            self.channel.broadcast(tensor, 0).done(PATIENCE)?;
        }
        self.beat();
        Ok(())
    }

    /// Every rank's rows, in rank order: [R_r, ..] of any lengths → [Σ R_r, ..]; collective. The collective carries
    /// equal shares, so shorter ones are padded on the way and cut afterwards: no padded row is ever seen.
    pub fn gather(&mut self, own: &Tensor) -> Result<Tensor> {
        self.wait();
        let length = Tensor::from_slice(&[own.size()[0]]);
        let lengths = Vec::<i64>::try_from(self.channel.all_gather(&length).wait(PATIENCE)?.reshape([-1]))?;
        let longest = lengths.iter().copied().max().unwrap_or(0);
        let mut shape = own.size();
        shape[0] = longest - shape[0];
        let padding = Tensor::zeros(shape, (own.kind(), Device::Cpu));
        let all = self.channel.all_gather(&Tensor::cat(&[own, &padding], 0)).wait(PATIENCE)?; // [W, longest, ..]
        let rows: Vec<Tensor> =
            lengths.iter().zip(0..).map(|(&length, rank)| all.get(rank).narrow(0, 0, length)).collect();
        self.beat();
        Ok(Tensor::cat(&rows, 0))
    }

    /// From here on this rank waits for others, which the heartbeat does not hold against it.
    fn wait(&mut self) {
        self.pulse.beat().at(self.done, Phase::Reduce);
    }

    /// Takes leave of the other ranks; collective.
    pub fn leave(self) {
        self.pulse.finish();
    }
}

/// Refuses ranks that would not judge the same thing: collective, before any work. Weights count by value, so that a
/// run that is still being written cannot give one rank an older checkpoint than another; data sets by their digests,
/// for hosts may reach the same shards by different paths.
pub fn agree(world: &dyn World, config: &Config, weights: &Tensor, others: &[(&str, String)]) -> Result<()> {
    let hash = |bytes: &[u8]| blake3::hash(bytes).to_hex()[..16].to_string();
    let program = std::env::current_exe().and_then(std::fs::read).unwrap_or_default();
    let mut texts = vec![
        ("build", format!("{} {}", env!("CARGO_PKG_VERSION"), hash(&program))),
        ("config of the checkpoint", hash(config.resolved().to_string().as_bytes())),
        ("weights", hash(bytes(&weights.to_kind(Kind::Float).to_device(Device::Cpu).contiguous()))),
    ];
    texts.extend(others.iter().map(|(label, text)| (*label, text.clone())));
    device::agree(world, &texts)
}
