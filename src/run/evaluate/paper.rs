//! The linear probe of He et al. (2022) as the official `main_linprobe.py` runs it: the frozen encoder meets the training set in
//! new random views in every epoch, and LARS trains a linear layer behind a normalisation.

use super::features::{Encoder, ROWS};
use super::head::{Head, LARS};
use super::progress::Progress;
use super::ranks::Ranks;
use super::samples::{self, Augmentation};
use crate::data::mix::Mix;
use crate::fault::{Fault, Result};
use crate::optim::schedule::Schedule;
use crate::rng::{Draw, Purpose};
use std::sync::Arc;
use tch::Tensor;

/// The numbers of the recipe.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Paper {
    pub epochs: u64,
    /// Samples of one update, over all ranks; the whole training set where that is smaller.
    pub batch: u64,
    /// Learning rate per 256 samples of the batch. LARS moves the weights by a share of themselves that is
    /// proportional to it, so that a small set, whose batch is small, wants more than the paper's.
    pub base_lr: f64,
    pub warmup_epochs: f64,
    pub augmentation: Augmentation,
}

impl Default for Paper {
    /// The paper's, for ViT-B; 50 epochs are enough for ViT-L and ViT-H.
    fn default() -> Self {
        Paper { epochs: 90, batch: 16384, base_lr: 0.1, warmup_epochs: 10.0, augmentation: Augmentation::Paper }
    }
}

impl Paper {
    pub fn check(&self) -> Result<()> {
        let Paper { epochs, batch, base_lr, warmup_epochs, .. } = *self;
        if !(1..1 << 24).contains(&epochs) {
            return Err(Fault::usage(format!("--epochs is {epochs}; it must lie in 1..{}", 1 << 24)));
        }
        if batch < 2 {
            return Err(Fault::usage(format!("--batch is {batch}; the normalisation wants two samples or more")));
        }
        if !(base_lr > 0.0 && base_lr.is_finite()) {
            return Err(Fault::usage(format!("--base-lr is {base_lr}; it must be above 0")));
        }
        if !(warmup_epochs >= 0.0 && warmup_epochs < epochs as f64) {
            return Err(Fault::usage(format!(
                "--warmup-epochs is {warmup_epochs} of --epochs {epochs}; it must be less than those, and not below 0"
            )));
        }
        Ok(())
    }

    /// The rate over updates: base · batch / 256 after a linear warm-up from 0, then half a cosine to 0.
    pub fn schedule(&self, batch: u64, updates_per_epoch: u64) -> Schedule {
        let each = updates_per_epoch as f64;
        Schedule {
            peak: self.base_lr * batch as f64 / 256.0,
            least: 0.0,
            warmup: self.warmup_epochs * each,
            total: self.epochs as f64 * each,
        }
    }

    /// How far the classifier can get, in multiples of its first weights: each update moves a matrix by at most
    /// lr · trust / (1 − momentum) of its norm, and the rates of all updates average about half of the peak.
    pub fn reach(&self, batch: u64, updates_per_epoch: u64) -> f64 {
        let schedule = self.schedule(batch, updates_per_epoch);
        schedule.total * schedule.peak / 2.0 * LARS.trust / (1.0 - LARS.momentum)
    }

    /// The trained classifier, the same on every rank; collective. An epoch's last samples that fill no batch are
    /// left to chance, as in the official code: each epoch has an order of its own.
    pub fn fit(&self, encoder: &Encoder, set: &Arc<Mix>, seed: u64, ranks: &mut Ranks) -> Result<Head> {
        let batch = self.batch.min(set.len());
        if batch < 2 {
            return Err(Fault::usage(format!("the training set {} has one sample; a probe wants more", set.name())));
        }
        let updates = set.len() / batch;
        let schedule = self.schedule(batch, updates);
        let reach = self.reach(batch, updates);
        if reach < 1.0 && ranks.first() {
            tracing::warn!(
                "{} updates at --base-lr {} move the classifier by at most {:.0} % of its first weights, too little to \
                 learn; raise --base-lr, take a smaller --batch, or use --recipe fast",
                self.epochs * updates,
                self.base_lr,
                100.0 * reach
            );
        }
        let piece = piece(batch, ranks.size() as u64);
        let classes = samples::classes(set, ranks)?;
        let mut head = Head::new(encoder.width, classes, seed);
        let mut progress = Progress::begin("linear classifier", self.epochs * updates, ranks.first());
        for epoch in 0..self.epochs {
            let pieces = (piece, updates * (batch / piece));
            let of_epoch = epoch_seed(seed, epoch);
            let (config, grid) = (&encoder.config, *encoder.method.grid());
            let mut feed = samples::epoch(set, self.augmentation, pieces, of_epoch, config, grid, ranks)?;
            for update in 0..updates {
                let (mut x, mut labels) = (Vec::new(), Vec::new());
                for _ in 0..batch / piece {
                    let rows = feed.next().expect("rows for every piece")?;
                    x.push(encoder.features(&rows)?);
                    labels.push(known(rows.labels.unwrap_or_default(), classes, &set.name())?);
                    ranks.beat();
                }
                let step = epoch * updates + update;
                let lr = schedule.at(step);
                let loss = head.step(&Tensor::cat(&x, 0), &Tensor::cat(&labels, 0), lr, ranks)?;
                progress.at(step + 1, &format!("epoch {}, loss {loss:.4}", epoch + 1));
            }
        }
        Ok(head)
    }
}

/// The seed of everything random in one epoch.
fn epoch_seed(seed: u64, epoch: u64) -> u64 {
    let mut draw = Draw::new(seed, epoch, 0, Purpose::Probe, 1);
    u64::from(draw.bits()) << 32 | u64::from(draw.bits())
}

/// How many samples of a batch are read at a time, over all ranks: a divisor of the batch that gives each rank at most
/// [`ROWS`], so that a rank never holds the pixels of 16,384 samples. A batch with no such divisor of a useful size is
/// read whole.
pub fn piece(batch: u64, ranks: u64) -> u64 {
    let most = (ROWS as u64 * ranks).min(batch);
    let largest = (1..=most).rev().find(|piece| batch.is_multiple_of(*piece)).unwrap_or(batch);
    if largest < most.min(16 * ranks) { batch } else { largest }
}

/// Labels that the classifier has a place for.
fn known(labels: Vec<i64>, classes: i64, name: &str) -> Result<Tensor> {
    match labels.iter().find(|label| !(0..classes).contains(*label)) {
        None => Ok(Tensor::from_slice(&labels)),
        Some(label) => Err(Fault::usage(format!(
            "a sample of {name} has the label {label}, and the data set has classes 0 to {}; pack it again",
            classes - 1
        ))),
    }
}
