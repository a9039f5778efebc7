//! The weight update: AdamW with weight-decay groups, gradient clipping, and a moving average of the weights.

use super::flat::FlatParams;
use super::schedule::{Schedule, TrainingLength};
use crate::error::{Error, Result};
use crate::op::adamw::{self, AdamWBuffers, AdamWOptions, TensorState, adamw};
use crate::op::lerp::{self, LerpWeight, lerp};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor, no_grad};

/// The config's `optim`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Learning rate per 256 samples of the global batch; multiplied by global_batch / 256 (Goyal et al., 2017). Give
    /// this or `lr`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_lr: Option<f64>,
    /// Peak learning rate, not scaled by the batch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lr: Option<f64>,
    /// Learning rate at the end of the cosine.
    #[serde(default)]
    pub min_lr: f64,
    /// Length of the linear warm-up.
    #[serde(default = "Config::no_warmup")]
    pub warmup: TrainingLength,
    /// Learning rate at the start of the warm-up.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub warmup_lr: f64,
    /// AdamW's decay rates of the two moments.
    #[serde(default = "Config::betas")]
    pub betas: [f64; 2],
    /// AdamW's term in the denominator.
    #[serde(default = "Config::eps")]
    pub eps: f64,
    /// Decoupled weight decay; biases and the scales and shifts of norms do not decay.
    #[serde(default = "Config::weight_decay")]
    pub weight_decay: f64,
    /// Maximum global gradient norm; larger gradients are scaled down to it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clip_grad_norm: Option<f64>,
    /// Keeps a moving average of the weights with this decay per step; evaluation and export then use it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ema_decay: Option<f64>,
}

impl Config {
    fn no_warmup() -> TrainingLength {
        TrainingLength::Samples(0)
    }
    fn betas() -> [f64; 2] {
        [0.9, 0.95]
    }
    fn eps() -> f64 {
        1e-8
    }
    fn weight_decay() -> f64 {
        0.05
    }

    /// Refuses values out of range, and both or neither of `base_lr` and `lr`.
    pub fn check(&self) -> Result<()> {
        match (self.base_lr, self.lr) {
            (Some(lr), None) => check_range("base_lr", lr, 0.0, 10.0)?,
            (None, Some(lr)) => check_range("lr", lr, 0.0, 10.0)?,
            _ => {
                return Err(Error::usage(
                    "optim needs either base_lr (per 256 samples) or lr (absolute): give one of them",
                ));
            }
        }
        check_range("min_lr", self.min_lr, 0.0, 10.0)?;
        check_range("warmup_lr", self.warmup_lr, 0.0, 10.0)?;
        check_range("betas[0]", self.betas[0], 0.0, 0.999_999)?;
        check_range("betas[1]", self.betas[1], 0.0, 0.999_999)?;
        check_range("eps", self.eps, 1e-16, 1.0)?;
        check_range("weight_decay", self.weight_decay, 0.0, 10.0)?;
        if let Some(max_norm) = self.clip_grad_norm {
            check_range("clip_grad_norm", max_norm, 1e-9, 1e9)?;
        }
        if let Some(decay) = self.ema_decay {
            check_range("ema_decay", decay, 0.0, 0.999_999_9)?;
        }
        self.warmup.check("optim.warmup")
    }

    /// Returns the peak learning rate for a global batch size.
    pub fn peak_lr(&self, global_batch: u64) -> f64 {
        self.lr.unwrap_or_else(|| self.base_lr.unwrap_or(0.0) * global_batch as f64 / 256.0)
    }

    /// Returns the schedule over `total_samples`; `data_set` is the number of samples of an epoch.
    pub fn schedule(&self, data_set: u64, global_batch: u64, total_samples: u64) -> Schedule {
        Schedule {
            peak_lr: self.peak_lr(global_batch),
            min_lr: self.min_lr,
            warmup_lr: self.warmup_lr,
            warmup_samples: self.warmup.to_samples(data_set, global_batch),
            total_samples: total_samples as f64,
        }
    }
}

fn is_zero(value: &f64) -> bool {
    *value == 0.0
}

fn check_range(key: &str, value: f64, min: f64, max: f64) -> Result<()> {
    if (min..=max).contains(&value) {
        return Ok(());
    }
    Err(Error::usage(format!("optim.{key} is {value}; it must lie in [{min}, {max}]")))
}

/// Applies AdamW to this rank's shard of a [`FlatParams`].
pub struct Updater {
    config: Config,
    tensors: Vec<ParamViews>,
    state: TensorState,
    /// Moving average of the master weights, fp32 `[K]`.
    pub ema: Option<Tensor>,
}

/// Views of this rank's part of one tensor in the flat buffers.
struct ParamViews {
    weight_decay: bool,
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    steps: Tensor,
}

impl ParamViews {
    fn new(flat: &FlatParams, index: usize) -> ParamViews {
        ParamViews {
            weight_decay: flat.specs[index].weight_decay,
            weight: flat.shard_of(&flat.master, index),
            grad: flat.shard_of(&flat.reduced_grad, index),
            exp_avg: flat.shard_of(&flat.exp_avg, index),
            exp_avg_sq: flat.shard_of(&flat.exp_avg_sq, index),
            steps: flat.steps.narrow(0, index as i64, 1).view([]),
        }
    }
}

impl Updater {
    /// Makes an updater for the buffers of `flat`.
    pub fn new(flat: &FlatParams, config: &Config) -> Updater {
        let weight_decay: Vec<bool> = flat.specs.iter().map(|spec| spec.weight_decay).collect();
        Updater {
            config: config.clone(),
            tensors: (0..flat.specs.len()).map(|index| ParamViews::new(flat, index)).collect(),
            state: TensorState::new(&flat.shard_ranges, &weight_decay, flat.master.numel(), &flat.steps),
            ema: config.ema_decay.map(|_| flat.master.copy()),
        }
    }

    /// Returns the factor that scales a gradient of this norm down to the maximum (PyTorch's `clip_grad_norm_`).
    pub fn clip_scale(&self, norm: f64) -> f64 {
        self.config.clip_grad_norm.map_or(1.0, |max_norm| (max_norm / (norm + 1e-6)).min(1.0))
    }

    /// Updates this rank's shard of the tensors that are `used`; weights, moments and step counts of the others do not
    /// change. Where the optimizer is sharded, call
    /// [`Buckets::start_weight_gather`](super::bucket::Buckets::start_weight_gather) next.
    pub fn update(&mut self, flat: &mut FlatParams, used: &[bool], lr: f64, clip_scale: f64) -> Result<()> {
        if flat.master.device().is_cuda() {
            self.update_cuda(flat, used, lr, clip_scale)?;
        } else {
            self.update_cpu(flat, used, lr, clip_scale)?;
        }
        if let (Some(ema), Some(decay)) = (&mut self.ema, self.config.ema_decay) {
            no_grad(|| lerp(ema, &flat.master, 1.0 - decay));
        }
        Ok(())
    }

    /// Returns the hyperparameters of a step that [`Updater::enqueue_update`] reads: learning rate, weight decay,
    /// maximum gradient norm.
    pub fn hyperparams(&self, lr: f64) -> [f64; 3] {
        [lr, self.config.weight_decay, self.config.clip_grad_norm.unwrap_or(f64::INFINITY)]
    }

    /// Enqueues the same update without host synchronization. All arguments are on the buffers' device: `used` f64
    /// [number of tensors] is 0 for unused tensors, `hyperparams` f64 `[3]` are those of [`Updater::hyperparams`] and
    /// `norm` f64 `[1]` is the gradient's norm; where `apply` bool `[1]` is false, nothing changes.
    pub fn enqueue_update(
        &mut self,
        flat: &FlatParams,
        used: &Tensor,
        hyperparams: &Tensor,
        norm: &Tensor,
        apply: &Tensor,
    ) -> Result<()> {
        self.state.used.copy_(&used.gt(0.0));
        let clip_scale = (hyperparams.narrow(0, 2, 1) / (norm + 1e-6)).clamp_max(1.0);
        let apply = apply.to_kind(Kind::Double);
        let control = Tensor::cat(&[&hyperparams.narrow(0, 0, 2), &clip_scale, &apply], 0).to_kind(Kind::Float);
        self.launch_kernel(flat, &control)?;
        if let (Some(ema), Some(decay)) = (&self.ema, self.config.ema_decay) {
            let weight = (apply * (1.0 - decay)).to_kind(Kind::Float);
            lerp::kernel(ema, &flat.master, LerpWeight::Device(&weight))?;
        }
        Ok(())
    }

    /// Updates all tensors with one kernel.
    fn update_cuda(&mut self, flat: &FlatParams, used: &[bool], lr: f64, clip_scale: f64) -> Result<()> {
        let used: Vec<f32> = used.iter().map(|used| f32::from(u8::from(*used))).collect();
        self.state.used.copy_(&Tensor::from_slice(&used));
        let control = adamw::control(lr, self.config.weight_decay, clip_scale, true, flat.master.device());
        self.launch_kernel(flat, &control)
    }

    fn launch_kernel(&self, flat: &FlatParams, control: &Tensor) -> Result<()> {
        let Config { betas, eps, .. } = self.config;
        let buffers = AdamWBuffers {
            master: &flat.master,
            exp_avg: &flat.exp_avg,
            exp_avg_sq: &flat.exp_avg_sq,
            gradient: &flat.reduced_grad,
            compute_weights: (flat.compute_shard.kind() != flat.master.kind()).then_some(&flat.compute_shard),
        };
        adamw::kernel(buffers, &self.state, control, betas, eps)
    }

    /// Updates with libtorch's fused AdamW, one call per weight-decay group.
    fn update_cpu(&mut self, flat: &mut FlatParams, used: &[bool], lr: f64, clip_scale: f64) -> Result<()> {
        let Config { betas, eps, weight_decay, .. } = self.config;
        if clip_scale < 1.0 {
            let _ = flat.reduced_grad.g_mul_scalar_(clip_scale);
        }
        let used_tensors = self.tensors.iter_mut().zip(used).filter(|(_, used)| **used).map(|(t, _)| t);
        let (local, remote): (Vec<_>, Vec<_>) = used_tensors.partition(|t| t.weight.numel() > 0);
        // Every rank counts the updates of all tensors.
        remote.into_iter().for_each(|t| drop(t.steps.g_add_scalar_(1.0)));
        for decays in [true, false] {
            let group: Vec<&ParamViews> = local.iter().filter(|t| t.weight_decay == decays).map(|t| &**t).collect();
            let collect =
                |field: fn(&ParamViews) -> &Tensor| group.iter().map(|t| field(t).shallow_clone()).collect::<Vec<_>>();
            let weight_decay = if decays { weight_decay } else { 0.0 };
            adamw(
                &collect(|t| &t.weight),
                &collect(|t| &t.grad),
                &collect(|t| &t.exp_avg),
                &collect(|t| &t.exp_avg_sq),
                &collect(|t| &t.steps),
                AdamWOptions { lr, betas, weight_decay, eps },
            )?;
        }
        flat.sync_compute_weights();
        Ok(())
    }
}
