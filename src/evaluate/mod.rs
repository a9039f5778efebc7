//! Frozen probes: the quality of an encoder's features without further training, on one or more ranks.
//!
//! Every rank takes its part of each data set. Nothing is padded, so that each sample counts once whatever the number
//! of ranks; samples that cannot be decoded are skipped and counted. Parts are divided between blocks of 64 samples,
//! and the encoder takes one block at a time: with the same number of threads each, any number of ranks computes
//! features that are equal to the bit.

pub mod cka; // whole against masked samples
pub mod captions; // zero-shot classification and retrieval
pub mod linear_fast;
pub mod features;
pub mod head;
pub mod knn;
pub mod layer; // which block's features
pub mod batch_norm;
pub mod linear_paper;
pub mod progress;
pub mod ranks;
pub mod samples;
pub mod model_source;

use crate::data::mixture::Mixture;
use crate::dist::World;
use crate::error::Result;
use features::{FeatureExtractor, FeatureSet, no_samples_error};
use knn::KnnOptions;
use layer::ProbeLayer;
use linear_fast::LinearProbe;
use linear_paper::Paper;
use model_source::{LoadedModel, ModelSource};
use ranks::Ranks;
use samples::Augmentation;
use serde::Serialize;
use std::sync::Arc;
use tch::{Kind, Tensor};

/// An evaluation protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Protocol {
    /// A weighted vote of the nearest training samples by cosine similarity (Wu et al., 2018)
    Knn,
    /// A linear classifier on normalized features
    Linear,
    /// The class whose name, in several sentences, is the most similar caption; for models trained with captions
    ZeroShot,
    /// How alike the features of whole and of masked samples are, by linear centered kernel alignment
    Cka,
    /// The caption of each image among all captions, and the image of each caption; for models trained with captions
    Retrieval,
}

/// A training recipe of the linear classifier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Recipe {
    /// AdamW on features that are computed once, without augmentation
    Fast,
    /// LARS on new random views in every epoch (He et al., 2022)
    Paper,
}

/// A classifier on frozen features, with its options.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Probe {
    Knn(KnnOptions),
    Fast,
    Paper(Paper),
}

/// The features to evaluate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Feature {
    /// The class token
    Class,
    /// The mean of the patch tokens
    Mean,
    /// Without the encoder, for comparison: mean and standard deviation over time of each mel band
    Statistics,
}

/// Options of an evaluation with labels.
#[derive(Clone, Debug)]
pub struct EvalOptions {
    pub model: ModelSource,
    /// URL of the training set.
    pub train: String,
    /// URL of the test set.
    pub test: String,
    pub probe: Probe,
    /// Features to use; by default the class token if the model has one, else the mean.
    pub feature: Option<Feature>,
    pub layer: ProbeLayer,
}

/// The result of an evaluation with labels: the last line of standard output.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct EvalReport {
    /// "pretrained" or "random".
    pub checkpoint: &'static str,
    /// Training steps of the checkpoint.
    pub step: u64,
    pub protocol: Protocol,
    #[serde(flatten)]
    pub settings: ProbeSettings,
    pub feature: Feature,
    /// The block whose input the features are; left out where the model chose.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layer: Option<usize>,
    /// Accuracy of each block's features on held-out training samples, where the layer was searched.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub searched: Option<Vec<f64>>,
    pub top1: f64,
    /// Only for the paper's recipe.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top5: Option<f64>,
    /// Number of training samples used.
    pub n_train: i64,
    /// Number of test samples evaluated.
    pub n_test: i64,
    /// Number of samples of both sets that could not be decoded. The paper's recipe replaces those of the training set,
    /// as training does, and counts only those of the test set.
    pub n_skipped: i64,
    pub seed: u64,
    /// Number of ranks.
    pub ranks: usize,
}

/// The options of a probe as they were used.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum ProbeSettings {
    Knn { k: i64, temperature: f64 },
    Fast { recipe: Recipe, epochs: u64 },
    Paper { recipe: Recipe, epochs: u64, batch: u64, base_lr: f64, warmup_epochs: f64, augmentation: Augmentation },
}

/// The result of a probe on this rank's part of the data sets.
struct ProbeResult {
    /// The most likely classes of each test sample, the most likely first, int64 [R, n].
    predictions: Tensor,
    test: FeatureSet,
    /// Number of training samples used.
    train_used: i64,
    /// Number of training samples skipped.
    train_skipped: i64,
}

/// Counts over all ranks.
struct ProbeCounts {
    train_used: i64,
    evaluated: i64,
    skipped: i64,
    /// Test samples whose first prediction is right.
    correct_first: i64,
    /// Test samples for which any prediction is right.
    correct_any: i64,
}

/// Evaluates a checkpoint's encoder; collective, with the same result on every rank.
///
/// # Errors
/// [`ExitCode::Usage`](crate::error::ExitCode::Usage) if a set has no labels, an option is out of range or there is no
/// checkpoint; [`ExitCode::RankMismatch`](crate::error::ExitCode::RankMismatch) if ranks have different options,
/// weights or data; [`ExitCode::Corrupt`](crate::error::ExitCode::Corrupt) if too many samples cannot be decoded.
pub fn evaluate(options: &EvalOptions, world: &Arc<dyn World>) -> Result<EvalReport> {
    options.probe.check()?;
    let LoadedModel { model, step, seed } = options.model.load(world.device())?;
    let train = samples::open_labeled(&options.train)?;
    let test = samples::open_labeled(&options.test)?;
    let train_classes = train.sets()[0].classes.len();
    let texts = [
        ("probe", format!("{:?}", options.probe)),
        ("feature", format!("{:?}", options.feature)),
        ("layer", format!("{:?}", options.layer)),
        ("seed", seed.to_string()),
        ("training set", format!("{}, {train_classes} classes named", ranks::short_hash(&train.digest()))),
        ("test set", ranks::short_hash(&test.digest())),
    ];
    ranks::check_ranks_agree(world.as_ref(), &model.config, &model.flat.master, &texts)?;
    let mut ranks =
        Ranks::join(world, model.config.world.heartbeat_timeout_s, model.config.world.collective_timeout_s)?;
    let mut extractor = FeatureExtractor::new(model, options.feature, options.layer.fixed())?;
    let searched = match options.layer {
        ProbeLayer::Search => Some(layer::search(&mut extractor, &train, &options.train, seed, &mut ranks)?),
        _ => None,
    };

    let result = run_probe(options, &extractor, [&train, &test], seed, &mut ranks)?;
    let counts = result.count(&mut ranks)?;
    if counts.evaluated == 0 {
        return Err(no_samples_error(&options.test));
    }
    let size = ranks.size();
    ranks.finish();
    let fraction = |count: i64| count as f64 / counts.evaluated as f64;
    Ok(EvalReport {
        checkpoint: options.model.weights_label(),
        step,
        protocol: options.probe.protocol(),
        settings: options.probe.settings(train.len()),
        feature: extractor.feature,
        layer: extractor.layer,
        searched,
        top1: fraction(counts.correct_first),
        top5: matches!(options.probe, Probe::Paper(_)).then(|| fraction(counts.correct_any)),
        n_train: counts.train_used,
        n_test: counts.evaluated,
        n_skipped: counts.skipped,
        seed,
        ranks: size,
    })
}

/// Computes features, trains the classifier and predicts; collective.
fn run_probe(
    options: &EvalOptions,
    extractor: &FeatureExtractor,
    [train, test]: [&Arc<Mixture>; 2],
    seed: u64,
    ranks: &mut Ranks,
) -> Result<ProbeResult> {
    if let Probe::Paper(paper) = &options.probe {
        let head = paper.fit(extractor, train, seed, ranks)?;
        let test = FeatureSet::extract(extractor, test, ranks, "test set")?;
        let predictions = head.predict_topk(&test.features, 5);
        return Ok(ProbeResult {
            predictions,
            test,
            train_used: samples::local_len(train, ranks) as i64,
            train_skipped: 0,
        });
    }
    let local_train = FeatureSet::extract(extractor, train, ranks, "training set")?;
    let test = FeatureSet::extract(extractor, test, ranks, "test set")?;
    let train = local_train.all_gather(ranks, &options.train)?;
    let predictions = match &options.probe {
        Probe::Knn(knn) => knn.predict(&train, &test.features),
        _ => LinearProbe::fit(&train, seed, ranks)?.predict(&test.features),
    };
    Ok(ProbeResult {
        predictions: predictions.unsqueeze(1),
        test,
        train_used: local_train.labels.numel() as i64,
        train_skipped: local_train.skipped,
    })
}

impl ProbeResult {
    /// Sums the counts over ranks; collective.
    fn count(&self, ranks: &mut Ranks) -> Result<ProbeCounts> {
        let correct = self.predictions.eq_tensor(&self.test.labels.unsqueeze(1)).to_kind(Kind::Int64); // [R, n]
        let [train_used, evaluated, skipped, correct_first, correct_any] = ranks.sum_counts([
            self.train_used,
            self.test.labels.numel() as i64,
            self.train_skipped + self.test.skipped,
            correct.narrow(1, 0, 1).sum(Kind::Int64).int64_value(&[]),
            correct.sum(Kind::Int64).int64_value(&[]),
        ])?;
        Ok(ProbeCounts { train_used, evaluated, skipped, correct_first, correct_any })
    }
}

impl Probe {
    /// Checks the ranges of the options.
    pub fn check(&self) -> Result<()> {
        match self {
            Probe::Knn(knn) => knn.check(),
            Probe::Fast => Ok(()),
            Probe::Paper(paper) => paper.check(),
        }
    }

    /// Returns the protocol to which the probe belongs.
    pub fn protocol(&self) -> Protocol {
        match self {
            Probe::Knn(_) => Protocol::Knn,
            Probe::Fast | Probe::Paper(_) => Protocol::Linear,
        }
    }

    /// Returns the options as they are used with `samples` training samples.
    fn settings(&self, samples: u64) -> ProbeSettings {
        match *self {
            Probe::Knn(KnnOptions { k, temperature }) => ProbeSettings::Knn { k, temperature },
            Probe::Fast => ProbeSettings::Fast { recipe: Recipe::Fast, epochs: linear_fast::EPOCHS },
            Probe::Paper(Paper { epochs, batch, base_lr, warmup_epochs, augmentation }) => {
                let batch = batch.min(samples);
                ProbeSettings::Paper { recipe: Recipe::Paper, epochs, batch, base_lr, warmup_epochs, augmentation }
            }
        }
    }
}
