//! The ranks of one evaluation: their collectives, and the heartbeat that ends a hung evaluation.

use crate::bridge::bytes;
use crate::config::Config;
use crate::dist::{self, Channel, Heartbeat, HeartbeatTimeouts, Phase, ReduceOp, World};
use crate::error::Result;
use std::sync::Arc;
use std::time::Duration;
use tch::{Device, Kind, Tensor};

/// Timeout of collectives. A rank may wait for the slowest one through a whole pass over a data set; a hang is ended by
/// the heartbeat instead.
const COLLECTIVE_TIMEOUT: Duration = Duration::from_secs(24 * 3600);

/// The collectives of an evaluation. Their tensors are on the CPU.
pub struct Ranks {
    world: Arc<dyn World>,
    channel: Box<dyn Channel>,
    heartbeat: Heartbeat,
    /// Number of finished work items, for the heartbeat.
    done: u64,
}

impl Ranks {
    /// Starts the heartbeat and opens the channel; collective. A rank may be silent for `heartbeat_timeout_s` and work
    /// on one item for `item_timeout_s`.
    pub fn join(world: &Arc<dyn World>, heartbeat_timeout_s: f64, item_timeout_s: f64) -> Result<Ranks> {
        let silence = Duration::from_secs_f64(heartbeat_timeout_s);
        let timeouts = HeartbeatTimeouts { silence, ..HeartbeatTimeouts::default() }
            .with_phase(Phase::Evaluate, Duration::from_secs_f64(item_timeout_s))
            .with_phase(Phase::Reduce, COLLECTIVE_TIMEOUT);
        let heartbeat = Heartbeat::start(world, timeouts)?;
        let channel = world.open_channel("evaluation")?;
        Ok(Ranks { channel, world: world.clone(), heartbeat, done: 0 })
    }

    /// Returns the index of this rank.
    pub fn rank(&self) -> usize {
        self.world.rank()
    }

    /// Returns the number of ranks.
    pub fn size(&self) -> usize {
        self.world.size()
    }

    /// Returns true on rank 0, which prints.
    pub fn is_rank0(&self) -> bool {
        self.rank() == 0
    }

    /// Returns the number of ranks on this host.
    pub fn local_size(&self) -> usize {
        self.world.local_size()
    }

    /// Reports to the heartbeat that a work item is finished.
    pub fn mark_progress(&mut self) {
        self.done += 1;
        self.heartbeat.progress_handle().report(self.done, Phase::Evaluate);
    }

    /// Sums tensors over ranks in place; collective.
    pub fn all_reduce_sum(&mut self, tensors: &[&Tensor]) -> Result<()> {
        self.all_reduce(tensors, ReduceOp::Sum)
    }

    /// Returns the maximum of `local` over ranks; collective.
    pub fn all_reduce_max(&mut self, local: i64) -> Result<i64> {
        let max = Tensor::from_slice(&[local]);
        self.all_reduce(&[&max], ReduceOp::Max)?;
        Ok(max.int64_value(&[0]))
    }

    /// Returns the sums of counts over ranks; collective.
    pub fn sum_counts<const N: usize>(&mut self, local: [i64; N]) -> Result<[i64; N]> {
        let counts = Tensor::from_slice(&local);
        self.all_reduce_sum(&[&counts])?;
        Ok(Vec::<i64>::try_from(counts)?.try_into().expect("N counts"))
    }

    fn all_reduce(&mut self, tensors: &[&Tensor], op: ReduceOp) -> Result<()> {
        self.start_collective();
        let pending: Vec<_> = tensors.iter().map(|tensor| self.channel.all_reduce(tensor, op)).collect();
        pending.into_iter().try_for_each(|pending| pending.wait_done(COLLECTIVE_TIMEOUT))?;
        self.mark_progress();
        Ok(())
    }

    /// Overwrites tensors with those of rank 0; collective.
    pub fn broadcast(&mut self, tensors: &[&Tensor]) -> Result<()> {
        self.start_collective();
        for tensor in tensors {
            self.channel.broadcast(tensor, 0).wait_done(COLLECTIVE_TIMEOUT)?;
        }
        self.mark_progress();
        Ok(())
    }

    /// Concatenates the rows of all ranks in rank order, [R_r, ..] → [Σ R_r, ..]; collective. Rows are padded to equal
    /// numbers for the collective only.
    pub fn all_gather(&mut self, local: &Tensor) -> Result<Tensor> {
        self.start_collective();
        let length = Tensor::from_slice(&[local.size()[0]]);
        let lengths = self.channel.all_gather(&length).wait(COLLECTIVE_TIMEOUT)?.reshape([-1]);
        let lengths = Vec::<i64>::try_from(lengths)?;
        let max_length = lengths.iter().copied().max().unwrap_or(0);
        let mut padding_shape = local.size();
        padding_shape[0] = max_length - padding_shape[0];
        let padding = Tensor::zeros(padding_shape, (local.kind(), Device::Cpu));
        let padded = Tensor::cat(&[local, &padding], 0);
        let gathered = self.channel.all_gather(&padded).wait(COLLECTIVE_TIMEOUT)?; // [W, max_length, ..]
        let rows: Vec<Tensor> =
            lengths.iter().zip(0..).map(|(&length, rank)| gathered.get(rank).narrow(0, 0, length)).collect();
        self.mark_progress();
        Ok(Tensor::cat(&rows, 0))
    }

    /// Reports to the heartbeat that this rank may now wait for others.
    fn start_collective(&mut self) {
        self.heartbeat.progress_handle().report(self.done, Phase::Reduce);
    }

    /// Stops the heartbeat; collective.
    pub fn finish(self) {
        self.heartbeat.finish();
    }
}

/// Checks that all ranks evaluate the same model on the same data; collective. Weights are compared by value, because a
/// run that is still being written may give ranks different checkpoints; data sets are compared by digest, because
/// hosts may reach the same shards by different paths.
///
/// # Errors
/// [`ExitCode::RankMismatch`](crate::error::ExitCode::RankMismatch) on every rank if they differ.
pub fn check_ranks_agree(
    world: &dyn World,
    config: &Config,
    weights: &Tensor,
    others: &[(&str, String)],
) -> Result<()> {
    let program = std::env::current_exe().and_then(std::fs::read).unwrap_or_default();
    let weights = weights.to_kind(Kind::Float).to_device(Device::Cpu).contiguous();
    let mut texts = vec![
        ("build", format!("{} {}", env!("CARGO_PKG_VERSION"), short_hash(&program))),
        ("config of the checkpoint", short_hash(config.to_json().to_string().as_bytes())),
        ("weights", short_hash(bytes(&weights))),
    ];
    texts.extend(others.iter().map(|(label, text)| (*label, text.clone())));
    dist::check_agreement(world, &texts)
}

/// Returns the first 64 bits of the BLAKE3 hash in hexadecimal.
pub fn short_hash(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex()[..16].to_string()
}
