//! How alike the features of whole and of masked samples are: linear centered kernel alignment over mask ratios
//! (Kornblith et al., 2019, equation 3 with linear kernels), which compares features up to rotation and scale. Kong and
//! Zhang (2023) ask this of masked image modeling.

use super::features::{FeatureExtractor, no_samples_error};
use super::model_source::{LoadedModel, ModelSource};
use super::progress::ProgressReporter;
use super::ranks::{self, Ranks};
use super::samples::{self, ENCODER_BATCH};
use super::{Feature, Protocol};
use crate::data::mixture::Mixture;
use crate::data::set::DataSet;
use crate::dist::World;
use crate::error::{Error, Result};
use crate::log::chart::{LineStyle, Series, line_chart};
use crate::part::mask::RandomMask;
use serde::Serialize;
use std::path::PathBuf;
use std::sync::Arc;
use tch::{Kind, Tensor};

/// Shares of patches that are hidden.
const RATIOS: [f64; 9] = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9];

/// Options of the comparison.
#[derive(Clone, Debug)]
pub struct CkaOptions {
    pub model: ModelSource,
    /// URL of the samples.
    pub test: String,
    pub feature: Option<Feature>,
    /// The block whose input is compared; the model's own choice without one.
    pub layer: Option<usize>,
    /// The SVG to draw.
    pub plot: Option<PathBuf>,
}

/// The result: the last line of standard output.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CkaReport {
    /// "pretrained" or "random".
    pub checkpoint: &'static str,
    /// Training steps of the checkpoint.
    pub step: u64,
    pub protocol: Protocol,
    pub feature: Feature,
    /// Shares of patches that are hidden.
    pub ratios: Vec<f64>,
    /// Similarity to the features of whole samples at each ratio, in 0..1.
    pub cka: Vec<f64>,
    /// Number of samples compared.
    pub n_test: i64,
    /// Number of samples that could not be decoded.
    pub n_skipped: i64,
    pub seed: u64,
    /// Number of ranks.
    pub ranks: usize,
}

/// Compares the features of a set's whole samples with those under random masks; collective, with the same result on
/// every rank.
///
/// # Errors
/// [`ExitCode::Usage`](crate::error::ExitCode::Usage) if the model cannot hide patches or the feature needs no encoder;
/// [`ExitCode::RankMismatch`](crate::error::ExitCode::RankMismatch) if ranks have different options, weights or data;
/// [`ExitCode::Corrupt`](crate::error::ExitCode::Corrupt) if no sample can be decoded.
pub fn evaluate(options: &CkaOptions, world: &Arc<dyn World>) -> Result<CkaReport> {
    if options.feature == Some(Feature::Statistics) {
        return Err(Error::usage("--feature statistics has no encoder, from which patches could be hidden"));
    }
    let LoadedModel { model, step, seed } = options.model.load(world.device())?;
    let set = Arc::new(Mixture::from_set(DataSet::open(&options.test)?));
    let texts = [
        ("feature", format!("{:?}", options.feature)),
        ("layer", format!("{:?}", options.layer)),
        ("seed", seed.to_string()),
        ("test set", ranks::short_hash(&set.digest())),
    ];
    ranks::check_ranks_agree(world.as_ref(), &model.config, &model.flat.master, &texts)?;
    let timeouts = &model.config.world;
    let mut ranks = Ranks::join(world, timeouts.heartbeat_timeout_s, timeouts.collective_timeout_s)?;
    let extractor = FeatureExtractor::new(model, options.feature, options.layer)?;

    let samples = samples::local_len(&set, &ranks);
    let mut progress = ProgressReporter::new("test set", samples, ranks.is_rank0());
    // Whole samples, then those of each ratio.
    let mut parts: Vec<Vec<Tensor>> = (0..=RATIOS.len()).map(|_| vec![extractor.empty_features()]).collect();
    for (rows, step) in samples::sequential(&set, &extractor.config, extractor.grid(), &ranks)?.zip(1..) {
        let rows = rows?;
        parts[0].push(extractor.features(&rows)?);
        for (part, ratio) in parts[1..].iter_mut().zip(RATIOS) {
            let mask = RandomMask { ratio, truncate_hidden: false };
            part.push(extractor.masked_features(&rows, Some(&mask))?);
        }
        ranks.mark_progress();
        progress.update((step * ENCODER_BATCH).min(samples), "");
    }
    let gathered = parts.iter().map(|part| ranks.all_gather(&Tensor::cat(part, 0)));
    let features = gathered.collect::<Result<Vec<_>>>()?;
    let found = features[0].size()[0];
    if found == 0 {
        return Err(no_samples_error(&options.test));
    }
    let cka: Vec<f64> = features[1..].iter().map(|masked| linear_cka(&features[0], masked)).collect();
    if let (Some(path), true) = (&options.plot, ranks.is_rank0()) {
        let points = RATIOS.iter().copied().zip(cka.iter().copied()).collect();
        let svg = line_chart(&[Series { points, color: 0, style: LineStyle::Dots }], true);
        std::fs::write(path, svg).map_err(|error| Error::disk(path.display(), error))?;
    }
    let size = ranks.size();
    ranks.finish();
    Ok(CkaReport {
        checkpoint: options.model.weights_label(),
        step,
        protocol: Protocol::Cka,
        feature: extractor.feature,
        ratios: RATIOS.to_vec(),
        cka,
        n_test: found,
        n_skipped: set.len() as i64 - found,
        seed,
        ranks: size,
    })
}

/// x [n, D] and y [n, E], a row a sample → their linear centered kernel alignment in 0..1; NaN if all rows of one are
/// equal.
pub fn linear_cka(x: &Tensor, y: &Tensor) -> f64 {
    let center = |x: &Tensor| {
        let x = x.to_kind(Kind::Double);
        &x - x.mean_dim(0, true, Kind::Double)
    };
    let x = center(x);
    let y = center(y);
    let norm = |a: &Tensor, b: &Tensor| a.transpose(0, 1).matmul(b).norm().double_value(&[]);
    norm(&y, &x).powi(2) / (norm(&x, &x) * norm(&y, &y))
}
