//! AdamW with the numbers of a config: weight-decay groups, clipping, the moving average.

use super::flat::Flat;
use super::schedule::{Schedule, Span};
use crate::fault::{Fault, Result};
use crate::op::adamw::{self, AdamW, Buffers, Table, adamw};
use crate::op::lerp::{self, Share, lerp};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor, no_grad};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Learning rate per 256 samples of the global batch; multiplied by global_batch / 256 (Goyal et al., 2017). Give
    /// this or `lr`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_lr: Option<f64>,
    /// The peak learning rate itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lr: Option<f64>,
    /// Where the cosine ends.
    #[serde(default)]
    pub min_lr: f64,
    /// Linear warm-up from 0.
    #[serde(default = "Config::no_warmup")]
    pub warmup: Span,
    /// AdamW's decay rates of the two moments.
    #[serde(default = "Config::betas")]
    pub betas: [f64; 2],
    #[serde(default = "Config::eps")]
    pub eps: f64,
    /// Decoupled; spares biases, norms' scales and shifts.
    #[serde(default = "Config::weight_decay")]
    pub weight_decay: f64,
    /// The greatest global gradient norm; larger ones are scaled down to it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clip: Option<f64>,
    /// Keeps a moving average of the weights that decays by this factor each step; evaluation and export then use it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ema: Option<f64>,
}

impl Config {
    fn no_warmup() -> Span {
        Span::Samples(0)
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

    pub fn check(&self) -> Result<()> {
        let range = |name: &str, value: f64, low: f64, high: f64| match (low..=high).contains(&value) {
            true => Ok(()),
            false => Err(Fault::usage(format!("optim.{name} is {value}; it must lie in [{low}, {high}]"))),
        };
        match (self.base_lr, self.lr) {
            (Some(lr), None) => range("base_lr", lr, 0.0, 10.0)?,
            (None, Some(lr)) => range("lr", lr, 0.0, 10.0)?,
            _ => {
                return Err(Fault::usage(
                    "optim wants either base_lr (per 256 samples) or lr (absolute): give one of them",
                ));
            }
        }
        range("min_lr", self.min_lr, 0.0, 10.0)?;
        range("betas[0]", self.betas[0], 0.0, 0.999_999)?;
        range("betas[1]", self.betas[1], 0.0, 0.999_999)?;
        range("eps", self.eps, 1e-16, 1.0)?;
        range("weight_decay", self.weight_decay, 0.0, 10.0)?;
        if let Some(clip) = self.clip {
            range("clip", clip, 1e-9, 1e9)?;
        }
        if let Some(ema) = self.ema {
            range("ema", ema, 0.0, 0.999_999_9)?;
        }
        self.warmup.check("optim.warmup")
    }

    /// The peak learning rate for a global batch.
    pub fn peak(&self, global_batch: u64) -> f64 {
        self.lr.unwrap_or_else(|| self.base_lr.unwrap_or(0.0) * global_batch as f64 / 256.0)
    }

    /// The curve over `total` samples.
    pub fn schedule(&self, data_set: u64, global_batch: u64, total: u64) -> Schedule {
        Schedule {
            peak: self.peak(global_batch),
            least: self.min_lr,
            warmup: self.warmup.samples(data_set, global_batch),
            total: total as f64,
        }
    }
}

/// Views of what this rank keeps of every tensor in each of the flat buffers, made once.
pub struct Updater {
    config: Config,
    tensors: Vec<Views>,
    table: Table,
    /// The moving average of the master weights, fp32 [K].
    pub average: Option<Tensor>,
}

struct Views {
    decays: bool,
    weight: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    steps: Tensor,
}

impl Updater {
    pub fn new(flat: &Flat, config: &Config) -> Updater {
        let views = |index: usize| Views {
            decays: flat.specs[index].decays,
            weight: flat.piece(&flat.master, index),
            gradient: flat.piece(&flat.summed, index),
            first: flat.piece(&flat.first, index),
            second: flat.piece(&flat.second, index),
            steps: flat.steps.narrow(0, index as i64, 1).view([]),
        };
        let decays: Vec<bool> = flat.specs.iter().map(|spec| spec.decays).collect();
        Updater {
            config: config.clone(),
            tensors: (0..flat.specs.len()).map(views).collect(),
            table: Table::new(&flat.kept, &decays, flat.master.numel(), &flat.steps),
            average: config.ema.map(|_| flat.master.copy()),
        }
    }

    /// The factor that brings a gradient of this norm within the limit (PyTorch's `clip_grad_norm_`).
    pub fn clip_scale(&self, norm: f64) -> f64 {
        self.config.clip.map_or(1.0, |limit| (limit / (norm + 1e-6)).min(1.0))
    }

    /// One update of what this rank keeps of the tensors that are `used`; the others stay where they are, moments and
    /// counts included. Where the optimizer is sharded, [`Buckets::spread`](super::bucket::Buckets::spread) comes next.
    pub fn update(&mut self, flat: &mut Flat, used: &[bool], lr: f64, clip_scale: f64) -> Result<()> {
        if flat.master.device().is_cuda() {
            self.all_at_once(flat, used, lr, clip_scale)?;
        } else {
            self.by_tensor(flat, used, lr, clip_scale)?;
        }
        if let (Some(average), Some(decay)) = (&mut self.average, self.config.ema) {
            no_grad(|| lerp(average, &flat.master, 1.0 - decay));
        }
        Ok(())
    }

    /// The numbers of a step that [`Updater::queue`] reads: learning rate, weight decay, and the greatest norm.
    pub fn rates(&self, lr: f64) -> [f64; 3] {
        [lr, self.config.weight_decay, self.config.clip.unwrap_or(f64::INFINITY)]
    }

    /// The same update where the device decides, and nothing waits: `used` f64 [n] is 0 for the unused, `rates` f64 [3]
    /// are those of [`Updater::rates`], `norm` f64 [1] is the gradient's, and where `good` bool [1] says no, nothing
    /// moves. All of them on the buffers' device.
    pub fn queue(&mut self, flat: &Flat, used: &Tensor, rates: &Tensor, norm: &Tensor, good: &Tensor) -> Result<()> {
        self.table.used.copy_(&used.gt(0.0));
        let scale = (rates.narrow(0, 2, 1) / (norm + 1e-6)).clamp_max(1.0);
        let apply = good.to_kind(Kind::Double);
        let control = Tensor::cat(&[&rates.narrow(0, 0, 2), &scale, &apply], 0).to_kind(Kind::Float);
        self.by_kernel(flat, &control)?;
        match (&self.average, self.config.ema) {
            (Some(average), Some(decay)) => {
                let share = (apply * (1.0 - decay)).to_kind(Kind::Float);
                lerp::kernel(average, &flat.master, Share::Value(&share))
            }
            _ => Ok(()),
        }
    }

    /// By our kernel.
    fn all_at_once(&mut self, flat: &Flat, used: &[bool], lr: f64, clip_scale: f64) -> Result<()> {
        let used: Vec<f32> = used.iter().map(|used| f32::from(u8::from(*used))).collect();
        self.table.used.copy_(&Tensor::from_slice(&used));
        let control = adamw::control(lr, self.config.weight_decay, clip_scale, true, flat.master.device());
        self.by_kernel(flat, &control)
    }

    fn by_kernel(&self, flat: &Flat, control: &Tensor) -> Result<()> {
        let Config { betas, eps, .. } = self.config;
        let buffers = Buffers {
            master: &flat.master,
            first: &flat.first,
            second: &flat.second,
            gradient: &flat.summed,
            compute: (flat.narrowed.kind() != flat.master.kind()).then_some(&flat.narrowed),
        };
        adamw::kernel(buffers, &self.table, control, (betas[0], betas[1]), eps)
    }

    /// By the library, group by group.
    fn by_tensor(&mut self, flat: &mut Flat, used: &[bool], lr: f64, clip_scale: f64) -> Result<()> {
        let Config { betas, eps, weight_decay, .. } = self.config;
        if clip_scale < 1.0 {
            let _ = flat.summed.g_mul_scalar_(clip_scale);
        }
        let moved = self.tensors.iter_mut().zip(used).filter(|(_, used)| **used).map(|(t, _)| t);
        let (here, elsewhere): (Vec<_>, Vec<_>) = moved.partition(|t| t.weight.numel() > 0);
        // Every rank counts the updates of all tensors.
        elsewhere.into_iter().for_each(|t| drop(t.steps.g_add_scalar_(1.0)));
        for decays in [true, false] {
            let group: Vec<&Views> = here.iter().filter(|t| t.decays == decays).map(|t| &**t).collect();
            let pick = |of: fn(&Views) -> &Tensor| group.iter().map(|t| of(t).shallow_clone()).collect::<Vec<_>>();
            let weight_decay = if decays { weight_decay } else { 0.0 };
            adamw(
                &pick(|t| &t.weight),
                &pick(|t| &t.gradient),
                &pick(|t| &t.first),
                &pick(|t| &t.second),
                &pick(|t| &t.steps),
                AdamW { lr, betas: (betas[0], betas[1]), weight_decay, eps },
            )?;
        }
        flat.refresh();
        Ok(())
    }
}
