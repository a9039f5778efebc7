//! Features of labeled samples, from a frozen encoder.

use super::Feature;
use super::progress::ProgressReporter;
use super::ranks::Ranks;
use super::samples::{self, ENCODER_BATCH};
use crate::checkpoint::weights::SavedModel;
use crate::config::Config;
use crate::data::mixture::Mixture;
use crate::data::modality::Modality;
use crate::error::{Error, ExitCode, Result};
use crate::grid::Grid;
use crate::loader::LoadedRows;
use crate::method::{Batch, Features, Method, Step};
use crate::op::shuffle::SampleKey;
use crate::optim::flat::FlatParams;
use crate::part::batch::Side;
use crate::part::buffers::Buffers;
use crate::part::encoder::EncodeOptions;
use crate::part::mask::MaskPolicy;
use crate::view::log_mel::LogMel;
use std::sync::Arc;
use tch::{Device, Kind, Tensor, no_grad};

/// A checkpoint's encoder with frozen weights.
pub struct FeatureExtractor {
    pub config: Config,
    pub method: Box<dyn Method>,
    pub flat: FlatParams,
    pub buffers: Buffers,
    pub feature: Feature,
    /// The block whose input the features are; the model's own choice without one.
    pub layer: Option<usize>,
    /// Converts waveforms to spectrograms, if the view returns waveforms.
    log_mel: Option<LogMel>,
    /// Number of features D.
    pub width: i64,
}

impl FeatureExtractor {
    /// Creates an extractor of `requested`, else of the class token if the model has one, else of the mean; at the input
    /// of block `layer`, else where the model likes best (see [`Model::encode`]).
    ///
    /// # Errors
    /// [`ExitCode::Usage`] if the model lacks the requested feature or the layer.
    ///
    /// [`Model::encode`]: crate::part::model::Model::encode
    pub fn new(model: SavedModel, requested: Option<Feature>, layer: Option<usize>) -> Result<FeatureExtractor> {
        let SavedModel { mut config, method, flat, buffers } = model;
        let depth = method.model().depth();
        if let Some(layer) = layer.filter(|&layer| layer > depth) {
            return Err(Error::usage(format!(
                "--layer is {layer}, and the encoder has {depth} blocks; give 0 to {depth}, where {depth} is after the last"
            )));
        }
        let grid = method.model().patchify().grid;
        let device = flat.master.device();
        config.view = config.view.for_device(device);
        let log_mel = config.view.log_mel(&grid, device)?;
        let modality = config.view.modality();
        let bands = config.input.width;
        let shape = [&[1][..], &config.view.shape(&grid)].concat();
        let dummy = Tensor::f_zeros(&shape, (modality.kind(), device))?;
        let mut extractor =
            FeatureExtractor { config, method, flat, buffers, feature: Feature::Mean, layer, log_mel, width: 0 };
        // The width must be known before the first sample, because a rank may have none.
        let features = extractor.encode(&extractor.batch(dummy, &[0], None)?, None)?;
        let has_class_token = features.class.is_some();
        extractor.width = features.mean.size()[1];
        extractor.feature = requested.unwrap_or(if has_class_token { Feature::Class } else { Feature::Mean });
        match extractor.feature {
            Feature::Statistics if modality != Modality::Audio => {
                return Err(Error::usage("--feature statistics is about spectrograms, and this model is for images"));
            }
            Feature::Class if !has_class_token => {
                return Err(Error::usage(
                    "the model has no class token; use --feature mean, or omit it to let the model decide",
                ));
            }
            Feature::Statistics => extractor.width = 2 * bands,
            Feature::Class | Feature::Mean => {}
        }
        Ok(extractor)
    }

    /// Returns the features of whole rows, fp32 [R, D] on the CPU.
    pub fn features(&self, rows: &LoadedRows) -> Result<Tensor> {
        self.masked_features(rows, None)
    }

    /// The same of what a policy shows of them.
    pub fn masked_features(&self, rows: &LoadedRows, mask: Option<&dyn MaskPolicy>) -> Result<Tensor> {
        let device = self.flat.master.device();
        let mut parts = vec![self.empty_features()];
        for (index, ids) in rows.ids.chunks(ENCODER_BATCH as usize).enumerate() {
            let start = index * ENCODER_BATCH as usize;
            let range = start..start + ids.len();
            let valid = rows.side.valid.as_ref().map(|valid| valid[range.clone()].to_vec());
            let batch = self.batch(rows.to_device(range, device)?, ids, valid)?;
            let features = match self.feature {
                Feature::Class => self.encode(&batch, mask)?.class.expect("checked in new"),
                Feature::Mean => self.encode(&batch, mask)?.mean,
                Feature::Statistics => {
                    band_statistics(batch.view(), batch.side.valid.as_deref().expect("valid lengths"))
                }
            };
            parts.push(features.to_kind(Kind::Float).to_device(Device::Cpu));
        }
        Ok(Tensor::cat(&parts, 0))
    }

    /// Returns the token grid of the model.
    pub fn grid(&self) -> Grid {
        self.method.model().patchify().grid
    }

    /// Returns the features of no sample, [0, D].
    pub fn empty_features(&self) -> Tensor {
        Tensor::zeros([0, self.width], (Kind::Float, Device::Cpu))
    }

    /// Returns the batch that the method reads.
    fn batch(&self, pixels: Tensor, ids: &[u64], valid: Option<Vec<u32>>) -> Result<Batch> {
        let keys: Vec<SampleKey> = ids.iter().map(|&id| SampleKey { id, epoch: 0, repeat: 0 }).collect();
        let side = Side { valid, ..Side::default() };
        let batch = Batch::new(pixels, &keys, self.config.train.seed).with_side(side);
        batch.with_spectrograms(self.log_mel.as_ref())
    }

    fn encode(&self, batch: &Batch, mask: Option<&dyn MaskPolicy>) -> Result<Features> {
        let step = Step::with_buffers(&self.flat.leaves, &self.buffers);
        no_grad(|| self.method.model().encode(&step, batch, EncodeOptions { layer: self.layer, mask }))
    }
}

/// Returns mean and standard deviation over time of each mel band, [R, 2X], of spectrograms [R, 1, 1, Y, X] whose first
/// `valid` rows (time steps) are not padding.
fn band_statistics(spectrograms: &Tensor, valid: &[u32]) -> Tensor {
    let y = spectrograms.size()[3];
    let x = spectrograms.size()[4];
    let rows = spectrograms.view([-1, y, x]);
    let valid: Vec<f32> = valid.iter().map(|&rows| rows.max(1) as f32).collect();
    let valid = Tensor::from_slice(&valid).view([-1, 1, 1]).to_device(rows.device());
    let padding = Tensor::arange(y, (Kind::Float, rows.device())).view([1, y, 1]).ge_tensor(&valid);
    let masked_mean = |values: Tensor| {
        values.masked_fill(&padding, 0.0).sum_dim_intlist([1i64].as_slice(), true, Kind::Float) / &valid // [R, 1, X]
    };
    let mean = masked_mean(rows.shallow_clone());
    let std = masked_mean((&rows - &mean).square()).sqrt();
    Tensor::cat(&[mean, std], 2).squeeze_dim(1)
}

/// Features and labels of a data set.
pub struct FeatureSet {
    /// fp32 [R, D].
    pub features: Tensor,
    /// int64 `[R]`.
    pub labels: Tensor,
    /// Number of samples that could not be decoded.
    pub skipped: i64,
}

impl FeatureSet {
    /// Extracts the features of this rank's part of a data set in the evaluation view; `title` is for the progress
    /// display.
    pub fn extract(
        extractor: &FeatureExtractor,
        set: &Arc<Mixture>,
        ranks: &mut Ranks,
        title: &'static str,
    ) -> Result<FeatureSet> {
        let samples = samples::local_len(set, ranks);
        let mut progress = ProgressReporter::new(title, samples, ranks.is_rank0());
        let mut features = vec![extractor.empty_features()];
        let mut labels = vec![Tensor::zeros([0], (Kind::Int64, Device::Cpu))];
        let loader = samples::sequential(set, &extractor.config, extractor.grid(), ranks)?;
        for (rows, step) in loader.zip(1..) {
            let rows = rows?;
            features.push(extractor.features(&rows)?);
            labels.extend(rows.side.labels);
            ranks.mark_progress();
            progress.update((step * ENCODER_BATCH).min(samples), "");
        }
        let labels = Tensor::cat(&labels, 0);
        check_labels(&labels)?;
        let skipped = samples as i64 - labels.numel() as i64;
        Ok(FeatureSet { features: Tensor::cat(&features, 0), labels, skipped })
    }

    /// Returns the samples of all ranks in the order of the data set, on every rank; collective. `skipped` stays that
    /// of this rank.
    ///
    /// # Errors
    /// [`ExitCode::Corrupt`] with the set's `name` if there is no sample.
    pub fn all_gather(&self, ranks: &mut Ranks, name: &str) -> Result<FeatureSet> {
        let features = ranks.all_gather(&self.features)?;
        let labels = ranks.all_gather(&self.labels)?;
        if labels.numel() == 0 {
            return Err(no_samples_error(name));
        }
        Ok(FeatureSet { features, labels, skipped: self.skipped })
    }
}

/// Returns the dot products of rows [R, D] with rows [S, D], fp32 [R, S]. They are summed in fp64 and then rounded, so
/// that they depend neither on the number of rows nor on that of threads, and equal rows have equal products.
pub fn dot_products(x: &Tensor, y: &Tensor) -> Tensor {
    x.to_kind(Kind::Double).matmul(&y.to_kind(Kind::Double).transpose(0, 1)).to_kind(Kind::Float)
}

/// Returns the error of a data set without a sample that could be decoded.
pub fn no_samples_error(name: &str) -> Error {
    Error::new(ExitCode::Corrupt, format!("no sample of {name} could be decoded; fetch or pack the data again"))
}

/// Checks that labels are not negative.
fn check_labels(labels: &Tensor) -> Result<()> {
    if labels.numel() == 0 {
        return Ok(());
    }
    let min = labels.min().int64_value(&[]);
    if min < 0 {
        return Err(Error::usage(format!(
            "a sample has the label {min}, and labels start at 0; correct its .cls, or pack the data again"
        )));
    }
    Ok(())
}
