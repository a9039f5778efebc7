//! The config: JSON (comments allowed), each part's numbers owned by that part. Reading refuses unknown keys with the
//! nearest valid name; checking refuses what cannot work, with the remedy, before any work begins.

mod value; // a config before it is one: paths, overrides, complaints

pub use value::{differences, leaves};

use crate::data::mix;
use crate::fault::{Fault, Result};
use crate::grid::Input;
use crate::method::catalog;
use crate::optim::update;
use crate::part::view;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::path::Path;

/// A whole run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// What this config is: the row of a paper's table, the hardware, what it reached and who measured it.
    pub about: About,
    /// What the model sees of a sample.
    pub input: Input,
    /// How a picture is cropped and flipped, or a sound becomes a spectrogram.
    #[serde(default)]
    pub view: view::View,
    /// The method and its numbers.
    pub method: catalog::Config,
    pub optim: update::Config,
    pub data: Data,
    pub train: Train,
    #[serde(default)]
    pub checkpoint: Checkpoint,
    #[serde(default)]
    pub log: Log,
    #[serde(default)]
    pub world: World,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct About {
    /// What it trains.
    pub title: String,
    /// Where the numbers come from: paper, table, repository.
    pub source: String,
    /// What the source reports, and on what hardware.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reported: Option<String>,
    /// What we measured ourselves, with date and machine; or that we have not run it.
    pub measured: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Data {
    /// The training set: a folder of shards, one shard, or a pattern such as `dir/train-{000000..000009}.tar`, as a
    /// path or as a URL (s3://, gs://, az://, http://, https://); or several of them with weights.
    pub train: Sources,
    /// Keeps what is fetched from a store on this machine's disk, for later epochs and for the other ranks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<Cache>,
    /// How long a store may be away before the run ends.
    #[serde(default = "Data::patience_s")]
    pub patience_s: f64,
    /// Decoding threads of each rank; as many as its share of the cores when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threads: Option<usize>,
    /// The most that waits, decoded, ahead of the step; and as much again that was fetched from a store and waits for a
    /// decoder.
    #[serde(default = "Data::prefetch_mb")]
    pub prefetch_mb: u64,
    /// Shards whose samples are mixed with each other at a time.
    #[serde(default = "Data::open_shards")]
    pub open_shards: usize,
    /// The greatest share of samples that may be unreadable; they are named, counted and replaced.
    #[serde(default = "Data::max_bad_share")]
    pub max_bad_share: f64,
}

/// One training set, or a mixture.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Sources {
    One(String),
    Several(Vec<mix::Source>),
}

impl Sources {
    /// Each with its weight.
    pub fn list(&self) -> Vec<mix::Source> {
        match self {
            Sources::One(url) => vec![mix::Source { url: url.clone(), weight: 1.0 }],
            Sources::Several(sources) => sources.clone(),
        }
    }
}

/// Bytes kept on this machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Cache {
    /// A folder on a fast local disk; processes may share it.
    pub folder: String,
    /// The most that it holds.
    pub limit_gb: f64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Train {
    /// How long: in steps, or in `epochs`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub steps: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub epochs: Option<f64>,
    /// Samples of one step, over all ranks.
    pub global_batch: u64,
    /// Samples that a rank takes through the model at a time; its whole share when left out. Gradients of several
    /// micro-batches add up before they are reduced.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub micro_batch: Option<u64>,
    #[serde(default)]
    pub seed: u64,
    /// The dtype of weights and activations in the model; master weights, moments and losses are fp32.
    #[serde(default)]
    pub dtype: Dtype,
    /// Keeps nothing of a transformer block for backward but what flows into it, and runs the block again there: some 2 of
    /// 16 activations a block stay in memory, for a third more to compute. The numbers stay the same.
    #[serde(default)]
    pub recompute: bool,
    /// Refused steps (loss or gradient not finite on some rank) in a row before training gives up.
    #[serde(default = "Train::bad_steps")]
    pub bad_steps: u64,
    /// On a GPU, a step is captured as a CUDA graph and launched whole, where the method allows it.
    #[serde(default = "Train::graph")]
    pub graph: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Dtype {
    #[default]
    Fp32,
    Bf16,
}

impl Dtype {
    pub fn kind(self) -> tch::Kind {
        match self {
            Dtype::Fp32 => tch::Kind::Float,
            Dtype::Bf16 => tch::Kind::BFloat16,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Checkpoint {
    /// Steps between checkpoints; there is always one at the end.
    #[serde(default = "Checkpoint::every_steps")]
    pub every_steps: u64,
    /// How many of the newest are kept.
    #[serde(default = "Checkpoint::keep_last")]
    pub keep_last: usize,
    /// Those whose step is a multiple of this are kept for good.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep_every: Option<u64>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Log {
    /// Steps between pictures of reconstructions; none when 0.
    #[serde(default = "Log::pictures_every_steps")]
    pub pictures_every_steps: u64,
    /// Seconds between progress lines where there is no terminal.
    #[serde(default = "Log::every_s")]
    pub every_s: f64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct World {
    /// Gradients are reduced in buckets of at least this size while backward goes on.
    #[serde(default = "World::bucket_mb")]
    pub bucket_mb: f64,
    /// The dtype that gradients travel in. `bf16` halves what travels, for 2 bytes a weight more of memory: each rank's
    /// gradient is rounded to it before it is summed, in fp32 over MPI and as NCCL does on GPUs, and so is the sum.
    #[serde(default)]
    pub wire: Dtype,
    /// Shares the optimizer's state out among ranks (ZeRO, stage 1): of master weights, moments and moving average each of W
    /// ranks keeps and updates its share alone. A weight then takes 6 + 18/W bytes of a rank's memory instead of 18 in
    /// bf16, and 8 + 16/W instead of 16 in fp32. Checkpoints are the same with and without it, and so may change hands.
    #[serde(default)]
    pub shard_optimizer: bool,
    /// How long a rank may be silent before the job is ended.
    #[serde(default = "World::frozen_s")]
    pub frozen_s: f64,
    /// How long a rank waits for the others in one collective, and may take over one step.
    #[serde(default = "World::deadline_s")]
    pub deadline_s: f64,
}

impl Data {
    fn prefetch_mb() -> u64 {
        256
    }
    fn patience_s() -> f64 {
        300.0
    }
    fn open_shards() -> usize {
        16
    }
    fn max_bad_share() -> f64 {
        0.001
    }
}
impl Train {
    fn bad_steps() -> u64 {
        3
    }
    fn graph() -> bool {
        true
    }
}
impl Checkpoint {
    fn every_steps() -> u64 {
        1000
    }
    fn keep_last() -> usize {
        3
    }
}
impl Log {
    fn pictures_every_steps() -> u64 {
        500
    }
    fn every_s() -> f64 {
        10.0
    }
}
impl World {
    fn bucket_mb() -> f64 {
        25.0
    }
    fn frozen_s() -> f64 {
        60.0
    }
    fn deadline_s() -> f64 {
        600.0
    }
}

/// The defaults of a section are those of its keys.
macro_rules! default_from_keys {
    ($($section:ty),*) => {$(
        impl Default for $section {
            fn default() -> Self {
                serde_json::from_str("{}").expect("every key has a default")
            }
        }
    )*};
}
default_from_keys!(Checkpoint, Log, World);

impl Config {
    /// Reads a file, applies `path.to.key=value` overrides in order, refuses what is unknown or out of range.
    pub fn read(path: &Path, overrides: &[String]) -> Result<Config> {
        let text = std::fs::read_to_string(path).map_err(|error| {
            Fault::usage(format!(
                "{}: {error}; give a config such as configs/tiny/mae.json with --config",
                path.display()
            ))
        })?;
        Self::parse(&text, overrides).map_err(|fault| fault.at(path.display()))
    }

    /// As `read`, from text.
    pub fn parse(text: &str, overrides: &[String]) -> Result<Config> {
        let stripped = json_comments::StripComments::new(text.as_bytes());
        let mut value: Value =
            serde_json::from_reader(stripped).map_err(|error| Fault::usage(format!("not JSON: {error}")))?;
        for line in overrides {
            value::set(&mut value, line)?;
        }
        let config: Config = serde_path_to_error::deserialize(value).map_err(value::explain)?;
        config.check()?;
        Ok(config)
    }

    /// Everything that can be said without data and without a world.
    pub fn check(&self) -> Result<()> {
        self.view.check()?;
        self.view.sound.as_ref().map_or(Ok(()), |sound| sound.check(&self.input))?;
        self.optim.check()?;
        let grid = self.input.grid()?;
        self.input.scale()?;
        self.method.check(&grid)?;
        self.check_captions()?;
        self.check_stills()?;
        self.check_numbers()
    }

    /// A method that reads still pictures beside clips is told how, and no other is.
    fn check_stills(&self) -> Result<()> {
        match (self.method.stills(), self.view.still.is_some()) {
            (true, false) => Err(Fault::usage(
                "the method reads still pictures beside clips, and the config does not say how: give view.still, such as \
                 {\"crop\": {\"scale\": [0.2, 1.0]}}, and view.clip",
            )),
            (false, true) => Err(Fault::usage(
                "view.still is given, and the method reads samples of one kind; leave it out and say it in view itself",
            )),
            _ => Ok(()),
        }
    }

    /// A method that reads captions is told how, and no other is.
    fn check_captions(&self) -> Result<()> {
        let needs = self.method.needs();
        match (&self.view.caption, self.method.text()) {
            (None, Some(text)) => Err(Fault::usage(format!(
                "the method reads captions, and the config does not say how: give view.caption \
                 {{\"tokenizer\": FILE, \"length\": {}}}",
                text.length
            ))),
            (Some(_), None) => {
                Err(Fault::usage("view.caption is given, and the method reads no captions; leave it out"))
            }
            (Some(caption), Some(text)) if caption.length != text.length => Err(Fault::usage(format!(
                "view.caption.length is {}, and the method's text.length {}; give one number to both",
                caption.length, text.length
            ))),
            _ if needs.whole_batch && self.train.micro_batch.is_some() => Err(Fault::usage(
                "train.micro_batch is given, and the loss compares the samples of a whole batch, which micro-batches would \
                 cut; leave it out, and take more ranks or a smaller train.global_batch where memory is short",
            )),
            _ => Ok(()),
        }
    }

    fn check_numbers(&self) -> Result<()> {
        let at_least = |name: &str, value: f64, least: f64, most: f64| match (least..=most).contains(&value) {
            true => Ok(()),
            false => Err(Fault::usage(format!("{name} is {value}; it must lie in {least}..={most}"))),
        };
        match (self.train.steps, self.train.epochs) {
            (Some(steps), None) => at_least("train.steps", steps as f64, 1.0, 1e12)?,
            (None, Some(epochs)) => at_least("train.epochs", epochs, 1e-6, 1e6)?,
            _ => return Err(Fault::usage("train wants either steps or epochs: give one of them")),
        }
        at_least("train.global_batch", self.train.global_batch as f64, 1.0, 1e9)?;
        if let Some(micro) = self.train.micro_batch {
            at_least("train.micro_batch", micro as f64, 1.0, self.train.global_batch as f64)?;
        }
        at_least("data.prefetch_mb", self.data.prefetch_mb as f64, 1.0, 1e6)?;
        at_least("data.open_shards", self.data.open_shards as f64, 1.0, 1e6)?;
        at_least("data.patience_s", self.data.patience_s, 0.0, 1e6)?;
        if let Some(cache) = &self.data.cache {
            at_least("data.cache.limit_gb", cache.limit_gb, 0.01, 1e6)?;
        }
        self.check_sources()?;
        at_least("data.max_bad_share", self.data.max_bad_share, 0.0, 1.0)?;
        if let Some(threads) = self.data.threads {
            at_least("data.threads", threads as f64, 1.0, 1024.0)?;
        }
        at_least("checkpoint.every_steps", self.checkpoint.every_steps as f64, 1.0, 1e12)?;
        at_least("checkpoint.keep_last", self.checkpoint.keep_last as f64, 1.0, 1e6)?;
        if let Some(every) = self.checkpoint.keep_every {
            at_least("checkpoint.keep_every", every as f64, 1.0, 1e12)?;
        }
        at_least("log.every_s", self.log.every_s, 0.0, 1e6)?;
        at_least("world.bucket_mb", self.world.bucket_mb, 1e-4, 1e5)?;
        at_least("world.frozen_s", self.world.frozen_s, 1.0, 1e6)?;
        at_least("world.deadline_s", self.world.deadline_s, 1.0, 1e6)
    }

    fn check_sources(&self) -> Result<()> {
        let sources = self.data.train.list();
        let whole: f64 = sources.iter().map(|source| source.weight).sum();
        if sources.is_empty() {
            return Err(Fault::usage(
                "data.train names no data set; give a path, a URL, or a list of them with weights",
            ));
        }
        // An order shares out 4,096 positions at a time.
        match sources.iter().find(|source| !(source.weight >= whole / 4096.0 && source.weight.is_finite())) {
            Some(source) => Err(Fault::usage(format!(
                "data.train: {} has weight {} of {whole} in all; a weight is positive, and at least 1/4096 of the sum",
                source.url, source.weight
            ))),
            None => Ok(()),
        }
    }

    /// Steps of the whole run over a data set of `samples`.
    pub fn steps(&self, samples: u64) -> u64 {
        match (self.train.steps, self.train.epochs) {
            (Some(steps), _) => steps,
            (None, epochs) => {
                ((epochs.unwrap_or(0.0) * samples as f64) / self.train.global_batch as f64).round().max(1.0) as u64
            }
        }
    }

    /// As JSON, every default written out.
    pub fn resolved(&self) -> Value {
        serde_json::to_value(self).expect("a config is JSON")
    }

    /// What must not change when a run is resumed: everything but how often and how fast. The length counts, for the
    /// learning rate falls over the whole of it; and the dtype on the wire, for it rounds.
    pub fn identity(&self) -> Value {
        let mut value = self.resolved();
        let root = value.as_object_mut().expect("an object");
        for section in ["about", "checkpoint", "log"] {
            root.remove(section);
        }
        for (section, keys) in [
            ("world", &["bucket_mb", "shard_optimizer", "frozen_s", "deadline_s"][..]),
            ("train", &["bad_steps", "graph", "micro_batch", "recompute"][..]),
            ("data", &["threads", "prefetch_mb", "max_bad_share", "cache", "patience_s"][..]),
        ] {
            for key in keys {
                root[section].as_object_mut().expect("a section").remove(*key);
            }
        }
        value
    }
}

/// The JSON Schema of a config.
pub fn schema() -> Value {
    serde_json::to_value(schemars::schema_for!(Config)).expect("a schema is JSON")
}
