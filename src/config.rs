//! The config: JSON with comments. Each part of the program owns the numbers of its section. Reading refuses an unknown
//! key and suggests the nearest valid name; checking refuses what cannot work, with a remedy, before any work begins.

mod value; // a config as a JSON value: paths, overrides, error messages

pub use value::{differences, leaves};

use crate::data::mixture::MixtureSource;
use crate::error::{Error, Result};
use crate::grid::InputConfig;
use crate::method::catalog;
use crate::optim::update;
use crate::view::View;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::ops::RangeInclusive;
use std::path::Path;

/// The config of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Describes this config: the row of a paper's table, the hardware, the results and who measured them.
    pub about: About,
    /// Shape and normalization of the model's input.
    pub input: InputConfig,
    /// Augmentation: cropping and flipping of images, spectrograms of audio.
    #[serde(default)]
    pub view: View,
    /// The method and its numbers.
    pub method: catalog::Config,
    /// The optimizer and the learning rate schedule.
    pub optim: update::Config,
    /// The training set and how it is read.
    pub data: DataConfig,
    /// Length, batch size and precision of the training.
    pub train: TrainConfig,
    /// Interval and retention of checkpoints.
    #[serde(default)]
    pub checkpoint: CheckpointConfig,
    /// Intervals of progress lines and images.
    #[serde(default)]
    pub log: LogConfig,
    /// Communication between ranks: buckets, sharding, timeouts.
    #[serde(default)]
    pub world: WorldConfig,
}

/// Describes a config; has no influence on the training.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct About {
    /// Name of the training.
    pub title: String,
    /// Source of the numbers: paper, table, repository.
    pub source: String,
    /// Results that the source reports, and its hardware.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reported: Option<String>,
    /// Our own measurements, with date and machine; or a note that this config has not been run.
    pub measured: String,
}

/// The training set and how it is read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    /// The training set: a folder of shards, one shard, or a pattern such as `dir/train-{000000..000009}.tar`, as a
    /// path or a URL (s3://, gs://, az://, http://, https://); or a list of several with weights.
    pub train: TrainSources,
    /// Caches bytes from a store on this machine's disk, for later epochs and for the other ranks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<CacheConfig>,
    /// Seconds for which a store may be unavailable before the run ends.
    #[serde(default = "DataConfig::store_timeout_s")]
    pub store_timeout_s: f64,
    /// Decoding threads of each rank; by default its share of the cores.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threads: Option<usize>,
    /// Maximum size in MiB of the decoded samples that wait for a step. Encoded samples from a store that wait for a
    /// decoder may take the same size again.
    #[serde(default = "DataConfig::prefetch_mb")]
    pub prefetch_mb: u64,
    /// Number of shards whose samples are shuffled together.
    #[serde(default = "DataConfig::shuffle_shards")]
    pub shuffle_shards: usize,
    /// Maximum fraction of corrupt samples. Corrupt samples are logged, counted and replaced.
    #[serde(default = "DataConfig::max_corrupt_fraction")]
    pub max_corrupt_fraction: f64,
}

/// One training set, or a mixture of several.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum TrainSources {
    Single(String),
    Mixture(Vec<MixtureSource>),
}

impl TrainSources {
    /// Returns all sources with their weights.
    pub fn to_list(&self) -> Vec<MixtureSource> {
        match self {
            TrainSources::Single(url) => vec![MixtureSource { url: url.clone(), weight: 1.0 }],
            TrainSources::Mixture(sources) => sources.clone(),
        }
    }
}

/// A cache of remote bytes on this machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CacheConfig {
    /// A folder on a fast local disk; several processes may share it.
    pub folder: String,
    /// Maximum size of the cache in GB.
    pub limit_gb: f64,
}

/// Length, batch size and precision of the training.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TrainConfig {
    /// Length in steps; give this or `epochs`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub steps: Option<u64>,
    /// Length in passes over the data set; give this or `steps`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub epochs: Option<f64>,
    /// Samples of one step, over all ranks.
    pub global_batch: u64,
    /// Samples that a rank computes at a time; by default its whole part of the global batch. The gradients of several
    /// micro-batches are accumulated before they are reduced.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub micro_batch: Option<u64>,
    /// Seed of initialization, sample order, augmentation and masks.
    #[serde(default)]
    pub seed: u64,
    /// The dtype of weights and activations in the model; master weights, moments and losses are fp32.
    #[serde(default)]
    pub dtype: Dtype,
    /// Activation checkpointing (Chen et al., 2016): keeps only the inputs of a transformer block and recomputes the
    /// rest in backward. About 2 of 16 activations of a block stay in memory, for a third more computation. The numbers
    /// stay the same.
    #[serde(default)]
    pub recompute: bool,
    /// Number of steps in a row with a non-finite loss or gradient after which the training fails. Such a step does not
    /// change the weights.
    #[serde(default = "TrainConfig::max_nonfinite_steps")]
    pub max_nonfinite_steps: u64,
    /// On a GPU, captures a step as a CUDA graph where the method allows it.
    #[serde(default = "TrainConfig::cuda_graph")]
    pub cuda_graph: bool,
}

/// A floating-point type.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Dtype {
    #[default]
    Fp32,
    Bf16,
}

impl Dtype {
    /// Returns libtorch's type.
    pub fn kind(self) -> tch::Kind {
        match self {
            Dtype::Fp32 => tch::Kind::Float,
            Dtype::Bf16 => tch::Kind::BFloat16,
        }
    }
}

/// Interval and retention of checkpoints.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CheckpointConfig {
    /// Steps between checkpoints; the last step always has one.
    #[serde(default = "CheckpointConfig::every_steps")]
    pub every_steps: u64,
    /// Number of the newest checkpoints to keep.
    #[serde(default = "CheckpointConfig::keep_last")]
    pub keep_last: usize,
    /// Checkpoints whose step is a multiple of this are never removed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep_every: Option<u64>,
}

/// Intervals of progress lines and images.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LogConfig {
    /// Steps between images of reconstructions; 0 for none.
    #[serde(default = "LogConfig::image_interval_steps")]
    pub image_interval_steps: u64,
    /// Seconds between progress lines where there is no terminal.
    #[serde(default = "LogConfig::interval_s")]
    pub interval_s: f64,
}

/// Communication between ranks: buckets, sharding, timeouts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct WorldConfig {
    /// Minimum size in MB of a bucket of gradients; buckets are reduced while backward continues.
    #[serde(default = "WorldConfig::bucket_mb")]
    pub bucket_mb: f64,
    /// The dtype of gradients on the network. `bf16` halves the traffic, for 2 bytes more memory per weight: each
    /// rank's gradient is rounded before it is summed (in fp32 over MPI, as NCCL does on GPUs), and the sum is rounded
    /// again.
    #[serde(default)]
    pub grad_dtype: Dtype,
    /// Shards the optimizer state (ZeRO, stage 1, Rajbhandari et al., 2020): each of W ranks keeps and updates 1/W of
    /// master weights, moments and moving average. A weight then takes 6 + 18/W bytes of a rank's memory instead of 18
    /// in bf16, and 8 + 16/W instead of 16 in fp32. Checkpoints do not depend on this setting, so a run may change it.
    #[serde(default)]
    pub shard_optimizer: bool,
    /// Seconds without a heartbeat of a rank after which the job is ended.
    #[serde(default = "WorldConfig::heartbeat_timeout_s")]
    pub heartbeat_timeout_s: f64,
    /// Maximum seconds that a rank waits for the others in one collective, and maximum seconds of one step.
    #[serde(default = "WorldConfig::collective_timeout_s")]
    pub collective_timeout_s: f64,
}

impl DataConfig {
    fn prefetch_mb() -> u64 {
        256
    }

    fn store_timeout_s() -> f64 {
        300.0
    }

    fn shuffle_shards() -> usize {
        16
    }

    fn max_corrupt_fraction() -> f64 {
        0.001
    }
}

impl TrainConfig {
    fn max_nonfinite_steps() -> u64 {
        3
    }

    fn cuda_graph() -> bool {
        true
    }
}

impl CheckpointConfig {
    fn every_steps() -> u64 {
        1000
    }

    fn keep_last() -> usize {
        3
    }
}

impl LogConfig {
    fn image_interval_steps() -> u64 {
        500
    }

    fn interval_s() -> f64 {
        10.0
    }
}

impl WorldConfig {
    fn bucket_mb() -> f64 {
        25.0
    }

    fn heartbeat_timeout_s() -> f64 {
        60.0
    }

    fn collective_timeout_s() -> f64 {
        600.0
    }
}

/// Implements `Default` for sections in which every key has a default.
macro_rules! default_from_keys {
    ($($section:ty),*) => {$(
        impl Default for $section {
            fn default() -> Self {
                serde_json::from_str("{}").expect("every key has a default")
            }
        }
    )*};
}
default_from_keys!(CheckpointConfig, LogConfig, WorldConfig);

impl Config {
    /// Reads a file, applies overrides `path.to.key=value` in order, and checks the result.
    ///
    /// # Errors
    /// [`ExitCode::Usage`](crate::error::ExitCode::Usage) for an unknown key or a value that cannot work.
    pub fn read(path: &Path, overrides: &[String]) -> Result<Config> {
        let text = std::fs::read_to_string(path).map_err(|error| {
            Error::usage(format!(
                "{}: {error}; give a config such as configs/tiny/mae.json with --config",
                path.display()
            ))
        })?;
        Self::parse(&text, overrides).map_err(|error| error.with_context(path.display()))
    }

    /// Parses a config from text, otherwise like [`Config::read`].
    pub fn parse(text: &str, overrides: &[String]) -> Result<Config> {
        let stripped = json_comments::StripComments::new(text.as_bytes());
        let mut value: Value =
            serde_json::from_reader(stripped).map_err(|error| Error::usage(format!("not JSON: {error}")))?;
        for line in overrides {
            value::apply_override(&mut value, line)?;
        }
        let config: Config = serde_path_to_error::deserialize(value).map_err(value::describe_error)?;
        config.check()?;
        Ok(config)
    }

    /// Checks everything that can be checked without data and without other ranks.
    pub fn check(&self) -> Result<()> {
        self.view.check()?;
        if let Some(audio) = &self.view.audio {
            audio.check(&self.input)?;
        }
        self.optim.check()?;
        let grid = self.input.grid()?;
        self.input.mean_std()?;
        self.method.check(&grid)?;
        self.check_captions()?;
        self.check_micro_batch()?;
        self.check_image_view()?;
        self.check_numbers()
    }

    /// Checks that `view.image` is given exactly if the method reads images beside videos.
    fn check_image_view(&self) -> Result<()> {
        match (self.method.requirements().images_beside_video, self.view.image.is_some()) {
            (true, false) => Err(Error::usage(
                "the method reads images beside videos, and the config does not say how: give view.image, such as \
                 {\"crop\": {\"scale\": [0.2, 1.0]}}, and view.clip",
            )),
            (false, true) => Err(Error::usage(
                "view.image is given, and the method reads samples of one kind; leave it out and say it in view itself",
            )),
            _ => Ok(()),
        }
    }

    /// Checks that `view.caption` is given exactly if the method reads captions, and fits the method.
    fn check_captions(&self) -> Result<()> {
        match (&self.view.caption, self.method.requirements().captions) {
            (None, Some(text)) => Err(Error::usage(format!(
                "the method reads captions, and the config does not say how: give view.caption \
                 {{\"tokenizer\": FILE, \"context_length\": {}}}",
                text.context_length
            ))),
            (Some(_), None) => {
                Err(Error::usage("view.caption is given, and the method reads no captions; leave it out"))
            }
            (Some(caption), Some(text)) if caption.context_length != text.context_length => Err(Error::usage(format!(
                "view.caption.context_length is {}, and the method's text.context_length {}; give one number to both",
                caption.context_length, text.context_length
            ))),
            _ => Ok(()),
        }
    }

    /// Checks that a loss over the whole batch is not computed over micro-batches.
    fn check_micro_batch(&self) -> Result<()> {
        if self.method.requirements().whole_batch && self.train.global_batch < 2 {
            return Err(Error::usage(format!(
                "train.global_batch is {}, and method.{} compares the samples of a batch; give at least 2",
                self.train.global_batch,
                self.method.name()
            )));
        }
        if self.method.requirements().whole_batch && self.train.micro_batch.is_some() {
            return Err(Error::usage(
                "train.micro_batch is given, and the loss compares the samples of a whole batch, which micro-batches \
                 would cut; leave it out, and take more ranks or a smaller train.global_batch where memory is short",
            ));
        }
        Ok(())
    }

    fn check_numbers(&self) -> Result<()> {
        match (self.train.steps, self.train.epochs) {
            (Some(steps), None) => check_range("train.steps", steps as f64, 1.0..=1e12)?,
            (None, Some(epochs)) => check_range("train.epochs", epochs, 1e-6..=1e6)?,
            _ => return Err(Error::usage("train wants either steps or epochs: give one of them")),
        }
        check_range("train.global_batch", self.train.global_batch as f64, 1.0..=1e9)?;
        if let Some(micro_batch) = self.train.micro_batch {
            check_range("train.micro_batch", micro_batch as f64, 1.0..=self.train.global_batch as f64)?;
        }
        check_range("data.prefetch_mb", self.data.prefetch_mb as f64, 1.0..=1e6)?;
        check_range("data.shuffle_shards", self.data.shuffle_shards as f64, 1.0..=1e6)?;
        check_range("data.store_timeout_s", self.data.store_timeout_s, 0.0..=1e6)?;
        if let Some(cache) = &self.data.cache {
            check_range("data.cache.limit_gb", cache.limit_gb, 0.01..=1e6)?;
        }
        self.check_sources()?;
        check_range("data.max_corrupt_fraction", self.data.max_corrupt_fraction, 0.0..=1.0)?;
        if let Some(threads) = self.data.threads {
            check_range("data.threads", threads as f64, 1.0..=1024.0)?;
        }
        check_range("checkpoint.every_steps", self.checkpoint.every_steps as f64, 1.0..=1e12)?;
        check_range("checkpoint.keep_last", self.checkpoint.keep_last as f64, 1.0..=1e6)?;
        if let Some(every) = self.checkpoint.keep_every {
            check_range("checkpoint.keep_every", every as f64, 1.0..=1e12)?;
        }
        check_range("log.interval_s", self.log.interval_s, 0.0..=1e6)?;
        check_range("world.bucket_mb", self.world.bucket_mb, 1e-4..=1e5)?;
        check_range("world.heartbeat_timeout_s", self.world.heartbeat_timeout_s, 1.0..=1e6)?;
        check_range("world.collective_timeout_s", self.world.collective_timeout_s, 1.0..=1e6)
    }

    fn check_sources(&self) -> Result<()> {
        let sources = self.data.train.to_list();
        if sources.is_empty() {
            return Err(Error::usage(
                "data.train names no data set; give a path, a URL, or a list of them with weights",
            ));
        }
        // The sample order distributes 4,096 positions at a time among the sources.
        let total: f64 = sources.iter().map(|source| source.weight).sum();
        match sources.iter().find(|source| !(source.weight >= total / 4096.0 && source.weight.is_finite())) {
            Some(source) => Err(Error::usage(format!(
                "data.train: {} has weight {} of {total} in all; a weight is positive, and at least 1/4096 of the sum",
                source.url, source.weight
            ))),
            None => Ok(()),
        }
    }

    /// Returns the steps of the whole run over a data set of `samples` samples.
    pub fn total_steps(&self, samples: u64) -> u64 {
        match self.train.steps {
            Some(steps) => steps,
            None => {
                let epochs = self.train.epochs.unwrap_or(0.0);
                ((epochs * samples as f64) / self.train.global_batch as f64).round().max(1.0) as u64
            }
        }
    }

    /// Converts to JSON with all defaults filled in.
    pub fn to_json(&self) -> Value {
        serde_json::to_value(self).expect("a config is JSON")
    }

    /// Returns the values that must not change when a run is resumed: all but frequencies, speed and limits. The length
    /// is included, because the learning rate schedule depends on it, and so is the dtype of gradients on the network,
    /// because it rounds them.
    pub fn resume_identity(&self) -> Value {
        let mut value = self.to_json();
        let root = value.as_object_mut().expect("an object");
        for section in ["about", "checkpoint", "log"] {
            root.remove(section);
        }
        for (section, keys) in [
            ("world", &["bucket_mb", "shard_optimizer", "heartbeat_timeout_s", "collective_timeout_s"][..]),
            ("train", &["max_nonfinite_steps", "cuda_graph", "micro_batch", "recompute"][..]),
            ("data", &["threads", "prefetch_mb", "max_corrupt_fraction", "cache", "store_timeout_s"][..]),
        ] {
            for key in keys {
                root[section].as_object_mut().expect("a section").remove(*key);
            }
        }
        value
    }
}

/// Checks that a number is within a range.
fn check_range(name: &str, value: f64, range: RangeInclusive<f64>) -> Result<()> {
    if range.contains(&value) {
        return Ok(());
    }
    Err(Error::usage(format!("{name} is {value}; it must lie in {}..={}", range.start(), range.end())))
}

/// Returns the JSON Schema of a config.
pub fn json_schema() -> Value {
    serde_json::to_value(schemars::schema_for!(Config)).expect("a schema is JSON")
}
