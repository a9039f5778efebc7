//! The linear probe of He et al. (2022), as in the official `main_linprobe.py`: the frozen encoder sees the training
//! set in new random views in every epoch, and LARS trains a linear layer behind a batch normalization.

use super::features::FeatureExtractor;
use super::head::{LARS, ProbeHead};
use super::progress::ProgressReporter;
use super::ranks::Ranks;
use super::samples::{self, Augmentation, ENCODER_BATCH, TrainEpoch};
use crate::data::mixture::Mixture;
use crate::data::order::max_rank_blocks;
use crate::error::{Error, Result};
use crate::loader::DataLoader;
use crate::optim::schedule::Schedule;
use crate::rng::{Philox, Purpose};
use std::sync::Arc;
use tch::Tensor;

const MAX_EPOCHS: u64 = 1 << 24;

/// Options of the paper's recipe.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Paper {
    pub epochs: u64,
    /// Samples per update over all ranks; the whole training set if it is smaller.
    pub batch: u64,
    /// Learning rate per 256 samples of the batch. LARS updates weights in proportion to their norm and this rate, so a
    /// small set, whose batch is small, needs a higher one than the paper's.
    pub base_lr: f64,
    pub warmup_epochs: f64,
    pub augmentation: Augmentation,
}

impl Default for Paper {
    /// Returns the paper's options for ViT-B; for ViT-L and ViT-H, the paper uses 50 epochs.
    fn default() -> Self {
        Paper { epochs: 90, batch: 16384, base_lr: 0.1, warmup_epochs: 10.0, augmentation: Augmentation::Paper }
    }
}

impl Paper {
    /// Checks the ranges.
    pub fn check(&self) -> Result<()> {
        let Paper { epochs, batch, base_lr, warmup_epochs, .. } = *self;
        if !(1..MAX_EPOCHS).contains(&epochs) {
            return Err(Error::usage(format!("--epochs is {epochs}; it must be in 1..{MAX_EPOCHS}")));
        }
        if batch < 2 {
            return Err(Error::usage(format!("--batch is {batch}; the normalization needs two samples or more")));
        }
        if !(base_lr > 0.0 && base_lr.is_finite()) {
            return Err(Error::usage(format!("--base-lr is {base_lr}; it must be above 0")));
        }
        if !(warmup_epochs >= 0.0 && warmup_epochs < epochs as f64) {
            return Err(Error::usage(format!(
                "--warmup-epochs is {warmup_epochs} of --epochs {epochs}; it must be less than those, and not below 0"
            )));
        }
        Ok(())
    }

    /// Returns the learning rate schedule over updates: a linear warm-up from 0 to base · batch / 256, then half a
    /// cosine to 0.
    pub fn schedule(&self, batch: u64, updates_per_epoch: u64) -> Schedule {
        let updates_per_epoch = updates_per_epoch as f64;
        Schedule {
            peak_lr: self.base_lr * batch as f64 / 256.0,
            min_lr: 0.0,
            warmup_lr: 0.0,
            warmup_samples: self.warmup_epochs * updates_per_epoch,
            total_samples: self.epochs as f64 * updates_per_epoch,
        }
    }

    /// Returns an upper bound of the change of the classifier's weights, relative to the initial ones: each update
    /// changes a matrix by at most lr · trust / (1 − momentum) of its norm, and the average lr is about half the peak.
    pub fn max_relative_update(&self, batch: u64, updates_per_epoch: u64) -> f64 {
        let schedule = self.schedule(batch, updates_per_epoch);
        schedule.total_samples * schedule.peak_lr / 2.0 * LARS.trust_coefficient / (1.0 - LARS.momentum)
    }

    /// Trains the classifier; collective, with the same result on every rank. An epoch's last samples that do not fill
    /// a batch are dropped, as in the official code; each epoch has a different order.
    pub fn fit(
        &self,
        extractor: &FeatureExtractor,
        set: &Arc<Mixture>,
        seed: u64,
        ranks: &mut Ranks,
    ) -> Result<ProbeHead> {
        let batch = self.batch.min(set.len());
        if batch < 2 {
            return Err(Error::usage(format!("the training set {} has one sample; a probe needs more", set.name())));
        }
        let updates = set.len() / batch;
        if ranks.is_rank0() {
            self.warn_if_too_short(batch, updates);
        }
        let schedule = self.schedule(batch, updates);
        let blocks = max_rank_blocks(batch, ENCODER_BATCH, ranks.size());
        let classes = samples::count_classes(set, ranks)?;
        let mut head = ProbeHead::new(extractor.width, classes, seed);
        let mut progress = ProgressReporter::new("linear classifier", self.epochs * updates, ranks.is_rank0());
        for epoch in 0..self.epochs {
            let grid = extractor.grid();
            let seed = epoch_seed(seed, epoch);
            let epoch_samples = TrainEpoch { augmentation: self.augmentation, batch, updates, seed };
            let mut loader = samples::train_epoch(set, &epoch_samples, &extractor.config, grid, ranks)?;
            for update in 0..updates {
                let step = epoch * updates + update;
                let mut features = Vec::new();
                let mut labels = Vec::new();
                for _ in 0..blocks {
                    let (x, y) = next_block(&mut loader, extractor, classes, &set.name())?;
                    features.push(x);
                    labels.push(y);
                    ranks.mark_progress();
                }
                let lr = schedule.lr_at(step);
                let loss = head.step(&Tensor::cat(&features, 0), &Tensor::cat(&labels, 0), lr, ranks)?;
                progress.update(step + 1, &format!("epoch {}, loss {loss:.4}", epoch + 1));
            }
        }
        Ok(head)
    }

    /// Warns if the updates cannot move the classifier far enough to learn.
    fn warn_if_too_short(&self, batch: u64, updates_per_epoch: u64) {
        let change = self.max_relative_update(batch, updates_per_epoch);
        if change < 1.0 {
            tracing::warn!(
                "{} updates at --base-lr {} change the classifier by at most {:.0} % of its initial weights, too \
                 little to learn; raise --base-lr, lower --batch, or use --recipe fast",
                self.epochs * updates_per_epoch,
                self.base_lr,
                100.0 * change
            );
        }
    }
}

/// Returns features [R, D] and labels `[R]` of this rank's next block, which may be empty.
fn next_block(
    loader: &mut DataLoader,
    extractor: &FeatureExtractor,
    classes: i64,
    name: &str,
) -> Result<(Tensor, Tensor)> {
    let rows = loader.next().expect("rows of every block")?;
    let features = extractor.features(&rows)?;
    let labels = rows.side.labels.expect("a labeled set");
    if let Some(label) = Vec::<i64>::try_from(&labels)?.iter().find(|label| !(0..classes).contains(*label)) {
        return Err(Error::usage(format!(
            "a sample of {name} has the label {label}, and the data set has classes 0 to {}; pack it again",
            classes - 1
        )));
    }
    Ok((features, labels))
}

/// Returns the seed of an epoch.
fn epoch_seed(seed: u64, epoch: u64) -> u64 {
    let mut philox = Philox::new(seed, epoch, 0, Purpose::Probe, 1);
    let high = u64::from(philox.next_u32());
    let low = u64::from(philox.next_u32());
    high << 32 | low
}
