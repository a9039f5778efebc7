//! The numbers that change from step to step beside the samples, as one f64 vector on the device: a captured graph
//! reads new ones at every launch.

use crate::error::Result;
use crate::method::{LossDenominators, LossTerm, Per, Progress};
use tch::{Device, Kind, Tensor};

/// Values that the host sets for a step.
#[derive(Clone, Copy, Debug, Default)]
pub struct StepRates {
    pub lr: f64,
    pub progress: Progress,
}

impl From<f64> for StepRates {
    /// A learning rate at the start of a training.
    fn from(lr: f64) -> StepRates {
        StepRates { lr, progress: Progress::default() }
    }
}

/// Learning rate, weight decay and gradient norm limit, as [`Updater::hyperparams`] gives them.
///
/// [`Updater::hyperparams`]: crate::optim::update::Updater::hyperparams
const HYPERPARAMS: i64 = 3;
/// Index of the teacher's momentum: 1 where it does not move.
const MOMENTUM: i64 = HYPERPARAMS;
/// Counts over this rank's samples of the step.
const LOCAL: i64 = MOMENTUM + 1;
/// Counts over the global batch.
const GLOBAL: i64 = LOCAL + LossDenominators::COUNT;
/// The method's scheduled values.
const SCHEDULED: i64 = GLOBAL + LossDenominators::COUNT;

/// The vector on the device.
#[derive(Debug)]
pub struct Controls(Tensor);

impl Controls {
    /// Room for this many scheduled values.
    pub fn new(scheduled: usize, device: Device) -> Controls {
        Controls(Tensor::zeros([SCHEDULED + scheduled as i64], (Kind::Double, device)))
    }

    /// Lays out a step's numbers.
    pub fn layout(
        hyperparams: [f64; 3],
        momentum: f64,
        local: LossDenominators,
        global: LossDenominators,
        scheduled: &[f64],
    ) -> Tensor {
        let mut all = hyperparams.to_vec();
        all.push(momentum);
        all.extend(local.to_array());
        all.extend(global.to_array());
        all.extend(scheduled);
        Tensor::from_slice(&all)
    }

    /// Sets all numbers.
    pub fn set(&mut self, values: &Tensor) -> Result<()> {
        crate::bridge::copy_non_blocking(&self.0, values)
    }

    /// Returns the hyperparameters of the step, as the update reads them.
    pub fn hyperparams(&self) -> Tensor {
        self.0.narrow(0, 0, HYPERPARAMS)
    }

    /// How far the teacher moves towards the student, `[1]`.
    pub fn teacher_weight(&self) -> Tensor {
        -(self.0.narrow(0, MOMENTUM, 1) - 1.0)
    }

    /// The method's scheduled values, `[n]`.
    pub fn scheduled(&self) -> Tensor {
        self.0.narrow(0, SCHEDULED, self.0.size()[0] - SCHEDULED)
    }

    /// A count over this rank's samples, `[1]`.
    pub fn local_count(&self, per: Per) -> Tensor {
        self.0.narrow(0, LOCAL + per as i64, 1)
    }

    /// A count over the global batch, `[1]`; at least 1, so that a step without a labeled sample has a term of 0.
    pub fn global_count(&self, per: Per) -> Tensor {
        self.0.narrow(0, GLOBAL + per as i64, 1).clamp_min(1.0)
    }

    /// The counts over this rank's samples, and where those of the global batch are.
    pub fn counts(&self) -> (Tensor, Tensor) {
        let counts = |first| self.0.narrow(0, first, LossDenominators::COUNT);
        (counts(LOCAL), counts(GLOBAL))
    }

    /// A term's part of its mean over the global batch, fp32 [].
    pub fn mean(&self, term: &LossTerm) -> Tensor {
        &term.sum / self.global_count(term.per).to_kind(Kind::Float).view([])
    }
}
