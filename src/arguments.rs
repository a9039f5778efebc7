//! The command line: what may be typed, and its help.

use clap::{Parser, Subcommand};
use occlude::config::Config;
use occlude::data::medium::Medium;
use occlude::data::pack;
use occlude::fault::{Fault, Result};
use occlude::run::evaluate::{self, Probe, Protocol, Question, Recipe, captions};
use occlude::run::evaluate::{nearest::Vote, paper::Paper, samples::Augmentation, subject::Subject};
use occlude::run::{bench, exchange, open::Resume};
use std::path::PathBuf;

/// Pre-trains masked autoencoders.
#[derive(Parser)]
#[command(version, max_term_width = 100)]
pub struct Arguments {
    #[command(subcommand)]
    pub verb: Verb,
}

#[derive(Subcommand)]
pub enum Verb {
    /// Write images, videos or sounds as shards that training reads
    Pack(PackArguments),
    /// Look at shards: counts, classes, sizes, whether they are whole; the last line is one JSON object
    Inspect(InspectArguments),
    /// Train a model; under mpirun, on all of its ranks
    Train(TrainArguments),
    /// Judge a checkpoint's frozen model on labelled or captioned shards, alone or under mpirun; the last line is one JSON
    /// object
    Evaluate(EvaluateArguments),
    /// Draw what a checkpoint's model makes of your own files
    Reconstruct(ReconstructArguments),
    /// Make a checkpoint of weights from the MAE repository, timm or transformers
    Import(ImportArguments),
    /// Write a checkpoint's weights as the MAE repository, timm or transformers load them
    Export(ExportArguments),
    /// Rebuild report.html of one run, or compare several
    Report(ReportArguments),
    /// Tell where the time of a config's step goes, beside what this machine could do; or of its data
    Bench(BenchArguments),
    /// Say what this machine has and what it lacks
    Doctor(DoctorArguments),
    /// Print the JSON Schema of a config
    Schema,
}

#[derive(clap::Args)]
pub struct ConfigArguments {
    /// The config, such as configs/tiny/mae.json
    #[arg(long)]
    pub config: PathBuf,
    /// Override a key: --set train.steps=100
    #[arg(long, value_name = "PATH=VALUE")]
    pub set: Vec<String>,
}

impl ConfigArguments {
    pub fn read(&self) -> Result<Config> {
        Config::read(&self.config, &self.set)
    }
}

#[derive(clap::Args)]
pub struct TrainArguments {
    #[command(flatten)]
    pub config: ConfigArguments,
    /// The run's folder
    #[arg(long, default_value = "runs/run")]
    pub run: String,
    /// auto, never, or the checkpoint or run to begin from
    #[arg(long, default_value = "auto")]
    pub resume: Resume,
    /// Begin another training with the weights of this checkpoint or run alone: no moments, from step 0, under any recipe
    #[arg(long, value_name = "URL", conflicts_with = "resume")]
    pub init: Option<String>,
    /// Write the first so many steps whole, for comparison with other implementations
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub dump_steps: u64,
}

#[derive(clap::Args)]
pub struct PackArguments {
    /// A folder of images, videos or sounds, whose sub-folders are classes, or a .csv, .tsv, .jsonl or .parquet file with
    /// the columns path, label, caption; a path or a URL
    pub source: String,
    /// The folder for the shards, a path or a URL
    pub url: String,
    /// The data set's name, part of every sample's identity; the output folder's name when left out
    #[arg(long)]
    pub name: Option<String>,
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    pub samples_per_shard: u64,
    /// Close a shard before it passes this many MiB
    #[arg(long, value_name = "MIB", default_value_t = 1024)]
    pub shard_mb: u64,
    /// Put this share of the samples into test/ and the others into train/
    #[arg(long, value_name = "SHARE", default_value_t = 0.0)]
    pub test_share: f64,
    /// Bring the shorter side of larger images down to this many pixels
    #[arg(long, value_name = "PIXELS")]
    pub resize: Option<u32>,
    /// Decode all images and encode them in this format; without this and --resize bytes stay as they are
    #[arg(long, value_name = "FORMAT", value_enum)]
    pub encode: Option<Format>,
    /// Quality of JPEGs and videos that are encoded, 1 to 100 [default: 90, of H.264 60]
    #[arg(long)]
    pub quality: Option<u8>,
    /// Encode all videos anew; without this, --resize, --fps and --gop their bytes stay as they are
    #[arg(long, value_name = "CODING", value_enum)]
    pub encode_video: Option<Coding>,
    /// Bring videos of more frames a second down to this many
    #[arg(long, value_name = "N")]
    pub fps: Option<f64>,
    /// Of H.264: the most frames from one that stands alone to the next [default: 12]
    #[arg(long, value_name = "N")]
    pub gop: Option<u32>,
    /// Pack sounds: .wav, .flac, .mp3, .ogg (Vorbis) and .opus files
    #[arg(long)]
    pub sound: bool,
    /// Decode all sounds and store them as 16-bit WAV of one channel at this many samples a second
    #[arg(long, value_name = "HZ", requires = "sound")]
    pub rate: Option<u32>,
    /// Learn a vocabulary (WordPiece, uncased) of this many tokens from the captions, but for the test part's: for
    /// view.caption
    #[arg(long, value_name = "N", requires = "tokenizer_out")]
    pub train_tokenizer: Option<usize>,
    /// Where that vocabulary is written, as a tokenizer.json
    #[arg(long, value_name = "FILE", requires = "train_tokenizer")]
    pub tokenizer_out: Option<PathBuf>,
    /// Threads that read and encode; 0: one for each core
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub threads: usize,
}

/// The formats of `pack --encode`.
#[derive(Clone, Copy, clap::ValueEnum)]
pub enum Format {
    Jpeg,
    Png,
    Webp,
}

/// The codings of `pack --encode-video`.
#[derive(Clone, Copy, clap::ValueEnum)]
pub enum Coding {
    H264,
    Mjpeg,
}

impl PackArguments {
    /// What `pack` is told beside source and destination.
    pub fn options(&self) -> pack::Options {
        let encode = |format| match format {
            Format::Jpeg => pack::Encode::Jpeg,
            Format::Png => pack::Encode::Png,
            Format::Webp => pack::Encode::Webp,
        };
        let coding = |coding| match coding {
            Coding::H264 => pack::EncodeVideo::H264,
            Coding::Mjpeg => pack::EncodeVideo::Mjpeg,
        };
        pack::Options {
            name: self.name.clone(),
            samples_per_shard: self.samples_per_shard,
            shard_bytes: self.shard_mb.saturating_mul(1 << 20),
            test_share: self.test_share,
            resize: self.resize,
            encode: self.encode.map(encode),
            quality: self.quality,
            video: pack::Videos { encode: self.encode_video.map(coding), fps: self.fps, gop: self.gop },
            medium: if self.sound { Medium::Sound } else { Medium::Picture },
            rate: self.rate,
            tokenizer: self.train_tokenizer.zip(self.tokenizer_out.clone()),
            threads: self.threads,
            ..Default::default()
        }
    }
}

#[derive(clap::Args)]
pub struct InspectArguments {
    /// Shards, as `data.train` names them: a folder, one tar, or name-{000000..000009}.tar; a path or a URL
    pub url: String,
    /// Write an index, with digests, beside each tar that has none
    #[arg(long)]
    pub index: bool,
    /// The contact sheet to write; NAME-sheet.png in this folder when left out
    #[arg(long, value_name = "FILE.png")]
    pub sheet: Option<PathBuf>,
    /// Look at this many samples only, spread evenly
    #[arg(long, value_name = "N")]
    pub sample: Option<u64>,
}

#[derive(clap::Args)]
pub struct EvaluateArguments {
    /// A run or a checkpoint
    #[arg(long)]
    pub checkpoint: String,
    /// knn, linear: labelled shards that the probe learns from
    #[arg(long)]
    pub train: Option<String>,
    /// Shards that it is judged on: labelled, or for retrieval captioned
    #[arg(long)]
    pub test: String,
    #[arg(long, value_enum)]
    pub protocol: Protocol,
    /// Which features; the class token's where the model has one, else the mean [default: by the model]
    #[arg(long, value_enum)]
    pub feature: Option<evaluate::Feature>,
    /// Judge the same encoder with freshly drawn weights instead
    #[arg(long)]
    pub random: bool,
    /// Seed of the probe and of freshly drawn weights; the run's own when left out
    #[arg(long)]
    pub seed: Option<u64>,
    /// zero-shot: the classes' names, a line each; the set's own when left out
    #[arg(long, value_name = "FILE")]
    pub classes: Option<PathBuf>,
    /// zero-shot: sentences with {} for a class's name, a line each; seven of CLIP's when left out
    #[arg(long, value_name = "FILE")]
    pub templates: Option<PathBuf>,
    /// zero-shot, retrieval: the vocabulary, where it lies elsewhere than in the training
    #[arg(long, value_name = "FILE")]
    pub tokenizer: Option<String>,
    /// knn: how many training samples vote [default: 20]
    #[arg(long)]
    pub k: Option<i64>,
    /// knn: the smaller, the more the nearest alone decides [default: 0.07]
    #[arg(long)]
    pub temperature: Option<f64>,
    /// linear: how the classifier is trained [default: fast]
    #[arg(long, value_enum)]
    pub recipe: Option<Recipe>,
    /// linear, paper: passes over the training set [default: 90]
    #[arg(long)]
    pub epochs: Option<u64>,
    /// linear, paper: samples of one update, over all ranks; at most the training set [default: 16384]
    #[arg(long)]
    pub batch: Option<u64>,
    /// linear, paper: learning rate per 256 samples of the batch [default: 0.1]
    #[arg(long)]
    pub base_lr: Option<f64>,
    /// linear, paper: epochs over which the learning rate rises [default: 10]
    #[arg(long)]
    pub warmup_epochs: Option<f64>,
    /// linear, paper: the random views that it learns from [default: paper]
    #[arg(long, value_enum)]
    pub augmentation: Option<Augmentation>,
}

impl EvaluateArguments {
    /// The question, or a fault where an option belongs to another protocol or recipe than the one asked for.
    pub fn question(self) -> Result<Asked> {
        let votes = [("--k", self.k.is_some()), ("--temperature", self.temperature.is_some())];
        let recipes = [
            ("--epochs", self.epochs.is_some()),
            ("--batch", self.batch.is_some()),
            ("--base-lr", self.base_lr.is_some()),
            ("--warmup-epochs", self.warmup_epochs.is_some()),
            ("--augmentation", self.augmentation.is_some()),
        ];
        let named = [("--classes", self.classes.is_some()), ("--templates", self.templates.is_some())];
        let vocabulary = [("--tokenizer", self.tokenizer.is_some())];
        match self.protocol {
            Protocol::Knn | Protocol::Linear => {
                refuse(&named, "--protocol zero-shot")?;
                refuse(&vocabulary, "--protocol zero-shot or retrieval")?;
            }
            Protocol::ZeroShot | Protocol::Retrieval => {
                let learns = [("--train", self.train.is_some()), ("--recipe", self.recipe.is_some())];
                let feature = [("--feature", self.feature.is_some())];
                refuse(&[&learns[..], &feature, &votes, &recipes].concat(), "--protocol knn or linear")?;
                if self.protocol == Protocol::Retrieval {
                    refuse(&named, "--protocol zero-shot")?;
                }
            }
        }
        let probe = match (self.protocol, self.recipe.unwrap_or(Recipe::Fast)) {
            (Protocol::ZeroShot | Protocol::Retrieval, _) => return Ok(self.about_captions()),
            (Protocol::Knn, _) => {
                refuse(&[("--recipe", self.recipe.is_some())], "--protocol linear")?;
                refuse(&recipes, "--protocol linear --recipe paper")?;
                let usual = Vote::default();
                let temperature = self.temperature.unwrap_or(usual.temperature);
                Probe::Nearest(Vote { k: self.k.unwrap_or(usual.k), temperature })
            }
            (Protocol::Linear, Recipe::Fast) => {
                refuse(&votes, "--protocol knn")?;
                refuse(&recipes, "--recipe paper")?;
                Probe::Fast
            }
            (Protocol::Linear, Recipe::Paper) => {
                refuse(&votes, "--protocol knn")?;
                let usual = Paper::default();
                Probe::Paper(Paper {
                    epochs: self.epochs.unwrap_or(usual.epochs),
                    batch: self.batch.unwrap_or(usual.batch),
                    base_lr: self.base_lr.unwrap_or(usual.base_lr),
                    warmup_epochs: self.warmup_epochs.unwrap_or(usual.warmup_epochs),
                    augmentation: self.augmentation.unwrap_or(usual.augmentation),
                })
            }
        };
        let subject = self.subject();
        let EvaluateArguments { train, test, feature, .. } = self;
        let train =
            train.ok_or_else(|| Fault::usage("--train is missing: labelled shards that the probe learns from"))?;
        Ok(Asked::Probe(Question { subject, train, test, probe, feature }))
    }

    /// The question of a protocol that compares images with captions.
    fn about_captions(self) -> Asked {
        let subject = self.subject();
        let EvaluateArguments { test, protocol, classes, templates, tokenizer, .. } = self;
        let task = match protocol {
            Protocol::Retrieval => captions::Task::Retrieval,
            _ => captions::Task::ZeroShot { classes, templates },
        };
        Asked::Captions(captions::Question { subject, test, task, tokenizer })
    }

    fn subject(&self) -> Subject {
        Subject { checkpoint: self.checkpoint.clone(), random: self.random, seed: self.seed }
    }
}

/// What `evaluate` is asked: to train a probe, or to compare with captions.
pub enum Asked {
    Probe(Question),
    Captions(captions::Question),
}

/// Refuses the first option that was given and belongs to something else.
fn refuse(options: &[(&str, bool)], owner: &str) -> Result<()> {
    match options.iter().find(|(_, given)| *given) {
        None => Ok(()),
        Some((option, _)) => Err(Fault::usage(format!("{option} belongs to {owner}; give that, or leave it out"))),
    }
}

#[derive(clap::Args)]
pub struct ReconstructArguments {
    /// A run or a checkpoint
    #[arg(long)]
    pub checkpoint: String,
    /// Image files
    #[arg(long, num_args = 1.., required = true)]
    pub input: Vec<PathBuf>,
    /// The folder for the pictures
    #[arg(long)]
    pub out: PathBuf,
}

#[derive(clap::Args)]
pub struct ImportArguments {
    #[arg(long, value_enum)]
    pub format: exchange::Format,
    /// A .safetensors, .pth or .bin file, or a folder with model.safetensors; config.json beside it is read too
    #[arg(long)]
    pub from: PathBuf,
    /// The run to make: its only checkpoint is of step 0, for --resume and --checkpoint
    #[arg(long)]
    pub out: String,
    /// The model's config; derived from the file when left out
    #[arg(long)]
    pub config: Option<PathBuf>,
    /// Override a key of either: --set method.mae.encoder.heads=16
    #[arg(long, value_name = "PATH=VALUE")]
    pub set: Vec<String>,
}

#[derive(clap::Args)]
pub struct ExportArguments {
    #[arg(long, value_enum)]
    pub format: exchange::Format,
    /// A run or a checkpoint
    #[arg(long)]
    pub checkpoint: String,
    /// The folder for model.safetensors and the settings beside it
    #[arg(long)]
    pub out: PathBuf,
}

#[derive(clap::Args)]
pub struct ReportArguments {
    /// Run folders
    #[arg(required = true)]
    pub runs: Vec<PathBuf>,
    /// The page to write; report.html in the first run when left out
    #[arg(long)]
    pub out: Option<PathBuf>,
}

#[derive(clap::Args)]
pub struct DoctorArguments {
    /// Instead, compile every kernel for every architecture into a folder
    #[arg(long, value_name = "FOLDER")]
    pub kernels: Option<PathBuf>,
}

/// What is timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Benched {
    Step,
    Data,
    Op,
}

#[derive(clap::Args)]
pub struct BenchArguments {
    /// The step by its stages (on noise where the config's data do not open), the data with nobody computing behind
    /// them, or every operation by itself
    #[arg(value_enum, default_value = "step")]
    pub what: Benched,
    /// The config, of a step or of data
    #[arg(long, required_if_eq_any([("what", "step"), ("what", "data")]))]
    config: Option<PathBuf>,
    /// Override a key: --set train.steps=100
    #[arg(long, value_name = "PATH=VALUE")]
    set: Vec<String>,
    /// Of the step: how many to time [default: 20]
    #[arg(long)]
    pub steps: Option<usize>,
    /// Of data: how long to measure [default: 10]
    #[arg(long)]
    pub seconds: Option<f64>,
    /// Of the step: instead, for every line on standard input as many as it says (one where it is empty), on noise
    #[arg(long, conflicts_with_all = ["steps", "out", "trace", "nvtx"])]
    pub by_turns: bool,
    /// Of the step or of operations: a file for the same table as JSON
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// Of the step: a file for a Chrome trace of some steps, for Perfetto or chrome://tracing
    #[arg(long, value_name = "FILE.json", conflicts_with = "nvtx")]
    pub trace: Option<PathBuf>,
    /// Of the step: NVTX ranges, for `nsys profile`
    #[arg(long)]
    pub nvtx: bool,
}

impl BenchArguments {
    /// Refuses what the thing timed has no use for.
    pub fn check(&self) -> Result<()> {
        let given = [
            ("--config", self.config.is_some(), &[Benched::Step, Benched::Data][..]),
            ("--set", !self.set.is_empty(), &[Benched::Step, Benched::Data]),
            ("--steps", self.steps.is_some(), &[Benched::Step]),
            ("--by-turns", self.by_turns, &[Benched::Step]),
            ("--seconds", self.seconds.is_some(), &[Benched::Data]),
            ("--trace", self.trace.is_some(), &[Benched::Step]),
            ("--nvtx", self.nvtx, &[Benched::Step]),
            ("--out", self.out.is_some(), &[Benched::Step, Benched::Op]),
        ];
        if let Some((option, _, of)) = given.iter().find(|(_, given, of)| *given && !of.contains(&self.what)) {
            let of: Vec<String> = of.iter().map(|what| format!("bench {what:?}").to_lowercase()).collect();
            let got = format!("{:?}", self.what).to_lowercase();
            return Err(Fault::usage(format!("{option} belongs to {}, not to bench {got}", of.join(" and "))));
        }
        Ok(())
    }

    /// What `bench step` is told beside the config.
    pub fn order(&self) -> bench::Order {
        let steps = self.steps.unwrap_or(20);
        bench::Order { steps, out: self.out.clone(), trace: self.trace.clone(), nvtx: self.nvtx }
    }

    /// The config of a step or of data.
    pub fn config(&self) -> Result<Config> {
        let path = self.config.as_ref().ok_or_else(|| Fault::usage("--config FILE is missing"))?;
        Config::read(path, &self.set)
    }
}
