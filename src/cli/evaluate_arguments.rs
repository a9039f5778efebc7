//! The command line of `occlude evaluate`.

use crate::error::{Error, Result};
use crate::evaluate::cka::CkaOptions;
use crate::evaluate::knn::KnnOptions;
use crate::evaluate::layer::ProbeLayer;
use crate::evaluate::linear_paper::Paper;
use crate::evaluate::model_source::ModelSource;
use crate::evaluate::samples::Augmentation;
use crate::evaluate::{EvalOptions, Feature, Probe, Protocol, Recipe, captions};
use std::path::PathBuf;

#[derive(clap::Args)]
pub struct EvaluateArguments {
    /// A run or a checkpoint
    #[arg(long)]
    pub checkpoint: String,
    /// knn, linear: labeled shards for training the probe
    #[arg(long)]
    pub train: Option<String>,
    /// Shards for testing: labeled, or for retrieval captioned
    #[arg(long)]
    pub test: String,
    #[arg(long, value_enum)]
    pub protocol: Protocol,
    /// The features [default: the class token where the model has one, otherwise the mean]
    #[arg(long, value_enum)]
    pub feature: Option<Feature>,
    /// knn, linear: the block whose input the features are, counted from 0, or for linear `search`: the one whose
    /// features classify a tenth of the training samples best [default: the model's own choice, mostly after the last]
    #[arg(long, value_name = "BLOCK")]
    pub layer: Option<ProbeLayer>,
    /// cka: the SVG to draw, similarity over the share of hidden patches
    #[arg(long, value_name = "FILE.svg")]
    pub plot: Option<PathBuf>,
    /// Evaluate the same encoder with random weights instead
    #[arg(long)]
    pub random_init: bool,
    /// Seed of the probe and of random weights [default: the run's]
    #[arg(long)]
    pub seed: Option<u64>,
    /// zero-shot: file of class names, one a line [default: the data set's]
    #[arg(long, value_name = "FILE")]
    pub classes: Option<PathBuf>,
    /// zero-shot: file of prompts with {} for the class name, one a line [default: seven of CLIP's]
    #[arg(long, value_name = "FILE")]
    pub templates: Option<PathBuf>,
    /// zero-shot, retrieval: the tokenizer file [default: the path in the checkpoint's config]
    #[arg(long, value_name = "FILE")]
    pub tokenizer: Option<String>,
    /// knn: number of neighbors [default: 20]
    #[arg(long)]
    pub k: Option<i64>,
    /// knn: temperature of the votes; a lower one gives the nearest neighbors more weight [default: 0.07]
    #[arg(long)]
    pub temperature: Option<f64>,
    /// linear: how the classifier is trained [default: fast]
    #[arg(long, value_enum)]
    pub recipe: Option<Recipe>,
    /// linear, paper: passes over the training set [default: 90]
    #[arg(long)]
    pub epochs: Option<u64>,
    /// linear, paper: batch size over all ranks, at most the training set [default: 16384]
    #[arg(long)]
    pub batch: Option<u64>,
    /// linear, paper: learning rate per 256 samples of the batch [default: 0.1]
    #[arg(long)]
    pub base_lr: Option<f64>,
    /// linear, paper: epochs of learning rate warmup [default: 10]
    #[arg(long)]
    pub warmup_epochs: Option<f64>,
    /// linear, paper: augmentation of the training samples [default: paper]
    #[arg(long, value_enum)]
    pub augmentation: Option<Augmentation>,
}

/// Names of options, and whether each was given.
type GivenOptions = Vec<(&'static str, bool)>;

impl EvaluateArguments {
    /// Converts to the options of an evaluation.
    ///
    /// # Errors
    /// [`ExitCode::Usage`](crate::error::ExitCode::Usage) if an option belongs to another protocol or recipe.
    pub fn options(self) -> Result<EvalKind> {
        match self.protocol {
            Protocol::Knn | Protocol::Linear => Ok(EvalKind::Probe(self.probe_options()?)),
            Protocol::ZeroShot | Protocol::Retrieval => Ok(EvalKind::Captions(self.caption_options()?)),
            Protocol::Cka => Ok(EvalKind::Cka(self.cka_options()?)),
        }
    }

    /// Returns the options of a protocol that trains a probe.
    fn probe_options(self) -> Result<EvalOptions> {
        refuse(&self.zero_shot_options(), "--protocol zero-shot")?;
        refuse(&[("--tokenizer", self.tokenizer.is_some())], "--protocol zero-shot or retrieval")?;
        refuse(&[("--plot", self.plot.is_some())], "--protocol cka")?;
        let probe = match (self.protocol, self.recipe.unwrap_or(Recipe::Fast)) {
            (Protocol::Linear, Recipe::Fast) => {
                refuse(&self.knn_options(), "--protocol knn")?;
                refuse(&self.paper_options(), "--recipe paper")?;
                Probe::Fast
            }
            (Protocol::Linear, Recipe::Paper) => {
                refuse(&self.knn_options(), "--protocol knn")?;
                let default = Paper::default();
                Probe::Paper(Paper {
                    epochs: self.epochs.unwrap_or(default.epochs),
                    batch: self.batch.unwrap_or(default.batch),
                    base_lr: self.base_lr.unwrap_or(default.base_lr),
                    warmup_epochs: self.warmup_epochs.unwrap_or(default.warmup_epochs),
                    augmentation: self.augmentation.unwrap_or(default.augmentation),
                })
            }
            _ => {
                refuse(&[("--recipe", self.recipe.is_some())], "--protocol linear")?;
                refuse(&[("--layer search", self.layer == Some(ProbeLayer::Search))], "--protocol linear")?;
                refuse(&self.paper_options(), "--protocol linear --recipe paper")?;
                let default = KnnOptions::default();
                let temperature = self.temperature.unwrap_or(default.temperature);
                Probe::Knn(KnnOptions { k: self.k.unwrap_or(default.k), temperature })
            }
        };
        let model = self.model();
        let EvaluateArguments { train, test, feature, layer, .. } = self;
        let train = train.ok_or_else(|| Error::usage("--train is missing: labeled shards for training the probe"))?;
        Ok(EvalOptions { model, train, test, probe, feature, layer: layer.unwrap_or(ProbeLayer::Default) })
    }

    /// Returns the options of a protocol that compares images with captions.
    fn caption_options(self) -> Result<captions::CaptionEvalOptions> {
        let probe_options: GivenOptions = vec![
            ("--train", self.train.is_some()),
            ("--recipe", self.recipe.is_some()),
            ("--feature", self.feature.is_some()),
            ("--layer", self.layer.is_some()),
        ];
        let probe_options = [probe_options, self.knn_options(), self.paper_options()].concat();
        refuse(&probe_options, "--protocol knn or linear")?;
        refuse(&[("--plot", self.plot.is_some())], "--protocol cka")?;
        if self.protocol == Protocol::Retrieval {
            refuse(&self.zero_shot_options(), "--protocol zero-shot")?;
        }
        let model = self.model();
        let EvaluateArguments { test, protocol, classes, templates, tokenizer, .. } = self;
        let task = match protocol {
            Protocol::Retrieval => captions::Task::Retrieval,
            _ => captions::Task::ZeroShot { classes, templates },
        };
        Ok(captions::CaptionEvalOptions { model, test, task, tokenizer })
    }

    /// Returns the options of the comparison of whole and masked samples.
    fn cka_options(self) -> Result<CkaOptions> {
        let probe_options: GivenOptions = vec![("--train", self.train.is_some()), ("--recipe", self.recipe.is_some())];
        refuse(&[probe_options, self.knn_options(), self.paper_options()].concat(), "--protocol knn or linear")?;
        let caption_options = [self.zero_shot_options(), vec![("--tokenizer", self.tokenizer.is_some())]].concat();
        refuse(&caption_options, "--protocol zero-shot or retrieval")?;
        refuse(&[("--layer search", self.layer == Some(ProbeLayer::Search))], "--protocol linear")?;
        let layer = self.layer.and_then(ProbeLayer::fixed);
        let model = self.model();
        let EvaluateArguments { test, feature, plot, .. } = self;
        Ok(CkaOptions { model, test, feature, layer, plot })
    }

    fn model(&self) -> ModelSource {
        ModelSource { checkpoint: self.checkpoint.clone(), random_init: self.random_init, seed: self.seed }
    }

    fn knn_options(&self) -> GivenOptions {
        vec![("--k", self.k.is_some()), ("--temperature", self.temperature.is_some())]
    }

    fn paper_options(&self) -> GivenOptions {
        vec![
            ("--epochs", self.epochs.is_some()),
            ("--batch", self.batch.is_some()),
            ("--base-lr", self.base_lr.is_some()),
            ("--warmup-epochs", self.warmup_epochs.is_some()),
            ("--augmentation", self.augmentation.is_some()),
        ]
    }

    fn zero_shot_options(&self) -> GivenOptions {
        vec![("--classes", self.classes.is_some()), ("--templates", self.templates.is_some())]
    }
}

/// The kind of an evaluation: with a probe on features, of images against captions, or of whole against masked samples.
pub enum EvalKind {
    Probe(EvalOptions),
    Captions(captions::CaptionEvalOptions),
    Cka(CkaOptions),
}

/// Refuses the first option that was given and belongs to something else.
fn refuse(options: &[(&str, bool)], owner: &str) -> Result<()> {
    match options.iter().find(|(_, is_given)| *is_given) {
        None => Ok(()),
        Some((option, _)) => Err(Error::usage(format!("{option} belongs to {owner}; give that, or leave it out"))),
    }
}
