//! The command line: verbs, options and their help.

use super::evaluate_arguments::EvaluateArguments;
use crate::config::Config;
use crate::data::modality::Modality;
use crate::data::pack;
use crate::error::{Error, Result};
use crate::sample::SampleOptions;
use crate::train::session::Resume;
use crate::{bench, interop};
use clap::{Parser, Subcommand};
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
    /// Write images, videos or audio as shards that training reads
    Pack(PackArguments),
    /// Check shards: counts, classes, sizes, damage; the last line is one JSON object
    Inspect(InspectArguments),
    /// Train a model; under mpirun, on all of its ranks
    Train(TrainArguments),
    /// Evaluate a checkpoint's frozen model on labeled or captioned shards, alone or under mpirun; the last line is one
    /// JSON object
    Evaluate(EvaluateArguments),
    /// Draw a checkpoint's reconstructions of your own files
    Reconstruct(ReconstructArguments),
    /// Sample images from a checkpoint that generates them, or complete the lower half of your own
    Sample(SampleArguments),
    /// Convert weights from the MAE repository, timm or transformers to a checkpoint
    Import(ImportArguments),
    /// Convert a checkpoint's weights for the MAE repository, timm or transformers
    Export(ExportArguments),
    /// Rebuild report.html of one run, or compare several
    Report(ReportArguments),
    /// Benchmark a config's training step, its data path, or single operations
    Bench(BenchArguments),
    /// Check what training needs on this machine
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
    /// Reads the config with the overrides applied.
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
    /// auto, never, or the checkpoint or run to start from
    #[arg(long, default_value = "auto")]
    pub resume: Resume,
    /// Start a new training from the weights of this checkpoint or run: no moments, from step 0, under any recipe
    #[arg(long, value_name = "URL", conflicts_with = "resume")]
    pub init: Option<String>,
    /// Write all tensors of the first N steps, for comparison with other implementations
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub dump_steps: u64,
}

#[derive(clap::Args)]
pub struct PackArguments {
    /// A folder of images, videos or audio, whose sub-folders are classes, or a .csv, .tsv, .jsonl or .parquet file
    /// with the columns path, label, caption; a path or a URL
    pub source: String,
    /// The folder for the shards, a path or a URL
    pub url: String,
    /// The data set's name, part of every sample's identity [default: the output folder's name]
    #[arg(long)]
    pub name: Option<String>,
    /// Maximum number of samples of a shard
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    pub samples_per_shard: u64,
    /// Maximum size of a shard in MiB
    #[arg(long, value_name = "MIB", default_value_t = 1024)]
    pub shard_mb: u64,
    /// Put this fraction of the samples into test/ and the others into train/
    #[arg(long, value_name = "FRACTION", default_value_t = 0.0)]
    pub test_fraction: f64,
    /// Downscale larger images to this length of the shorter side
    #[arg(long, value_name = "PIXELS")]
    pub resize: Option<u32>,
    /// Decode all images and encode them in this format; without this and --resize, bytes are stored unchanged
    #[arg(long, value_name = "FORMAT", value_enum)]
    pub encode: Option<ImageFormatArgument>,
    /// Quality of encoded JPEGs and videos, 1 to 100 [default: 90, H.264: 60]
    #[arg(long)]
    pub quality: Option<u8>,
    /// Encode all videos with this codec; without this, --resize, --fps and --gop, bytes are stored unchanged
    #[arg(long, value_name = "CODEC", value_enum)]
    pub encode_video: Option<VideoCodecArgument>,
    /// Maximum frame rate of videos; higher ones are reduced to it
    #[arg(long, value_name = "N")]
    pub fps: Option<f64>,
    /// H.264: maximum keyframe interval, in frames [default: 12]
    #[arg(long, value_name = "N")]
    pub gop: Option<u32>,
    /// Pack audio: .wav, .flac, .mp3, .ogg (Vorbis) and .opus files
    #[arg(long)]
    pub audio: bool,
    /// Decode all audio and store it as 16-bit mono WAV at this sample rate
    #[arg(long, value_name = "HZ", requires = "audio")]
    pub sample_rate: Option<u32>,
    /// Train a vocabulary (WordPiece, uncased) of this many tokens on the captions, except those of the test part; for
    /// view.caption
    #[arg(long, value_name = "N", requires = "tokenizer_out")]
    pub train_tokenizer: Option<usize>,
    /// File for that vocabulary, a tokenizer.json
    #[arg(long, value_name = "FILE", requires = "train_tokenizer")]
    pub tokenizer_out: Option<PathBuf>,
    /// Threads that read and encode; 0: one for each core
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub threads: usize,
}

/// The formats of `pack --encode`.
#[derive(Clone, Copy, clap::ValueEnum)]
pub enum ImageFormatArgument {
    Jpeg,
    Png,
    Webp,
}

impl From<ImageFormatArgument> for pack::ImageEncoding {
    fn from(format: ImageFormatArgument) -> Self {
        match format {
            ImageFormatArgument::Jpeg => pack::ImageEncoding::Jpeg,
            ImageFormatArgument::Png => pack::ImageEncoding::Png,
            ImageFormatArgument::Webp => pack::ImageEncoding::Webp,
        }
    }
}

/// The codecs of `pack --encode-video`.
#[derive(Clone, Copy, clap::ValueEnum)]
pub enum VideoCodecArgument {
    H264,
    Mjpeg,
}

impl From<VideoCodecArgument> for pack::VideoCodec {
    fn from(codec: VideoCodecArgument) -> Self {
        match codec {
            VideoCodecArgument::H264 => pack::VideoCodec::H264,
            VideoCodecArgument::Mjpeg => pack::VideoCodec::Mjpeg,
        }
    }
}

impl PackArguments {
    /// Converts to the options of [`pack::pack`].
    pub fn options(&self) -> pack::PackOptions {
        pack::PackOptions {
            name: self.name.clone(),
            samples_per_shard: self.samples_per_shard,
            shard_bytes: self.shard_mb.saturating_mul(1 << 20),
            test_fraction: self.test_fraction,
            resize: self.resize,
            encode: self.encode.map(Into::into),
            quality: self.quality,
            video: pack::VideoOptions { encode: self.encode_video.map(Into::into), fps: self.fps, gop: self.gop },
            modality: if self.audio { Modality::Audio } else { Modality::Image },
            sample_rate: self.sample_rate,
            tokenizer: self.train_tokenizer.zip(self.tokenizer_out.clone()),
            threads: self.threads,
            ..Default::default()
        }
    }
}

#[derive(clap::Args)]
pub struct InspectArguments {
    /// Shards, as in `data.train`: a folder, one tar, or name-{000000..000009}.tar; a path or a URL
    pub url: String,
    /// Write an index with digests for each tar that has none
    #[arg(long)]
    pub index: bool,
    /// The contact sheet to write [default: NAME-sheet.png in this folder]
    #[arg(long, value_name = "FILE.png")]
    pub sheet: Option<PathBuf>,
    /// Read only this many samples, evenly spaced
    #[arg(long, value_name = "N")]
    pub sample: Option<u64>,
}

#[derive(clap::Args)]
pub struct ReconstructArguments {
    /// A run or a checkpoint
    #[arg(long)]
    pub checkpoint: String,
    /// Image, video or audio files
    #[arg(long, num_args = 1.., required = true)]
    pub input: Vec<PathBuf>,
    /// The folder for the sheets
    #[arg(long)]
    pub out: PathBuf,
}

#[derive(clap::Args)]
pub struct ImportArguments {
    #[arg(long, value_enum)]
    pub format: interop::WeightFormat,
    /// A .safetensors, .pth or .bin file, or a folder with model.safetensors; a config.json next to it is read too
    #[arg(long)]
    pub from: PathBuf,
    /// The run to create: its only checkpoint is of step 0, for --resume and --checkpoint
    #[arg(long)]
    pub out: String,
    /// The model's config [default: derived from the file]
    #[arg(long)]
    pub config: Option<PathBuf>,
    /// Override a key of the config: --set method.mae.encoder.heads=16
    #[arg(long, value_name = "PATH=VALUE")]
    pub set: Vec<String>,
}

#[derive(clap::Args)]
pub struct SampleArguments {
    /// A run or a checkpoint of an autoregressive method
    #[arg(long)]
    pub checkpoint: String,
    /// The PNG to write
    #[arg(long, value_name = "FILE.png")]
    pub out: PathBuf,
    /// Number of images, or of completions of each file
    #[arg(long, default_value_t = 8)]
    pub count: i64,
    /// Divides logits: below 1, images are more alike
    #[arg(long, default_value_t = 1.0)]
    pub temperature: f64,
    /// Seed of the samples
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Files whose upper half is kept and whose lower half is sampled
    pub input: Vec<PathBuf>,
}

impl SampleArguments {
    /// Converts to the options of `occlude sample`.
    pub fn options(self) -> SampleOptions {
        let SampleArguments { checkpoint, out, count, temperature, seed, input: inputs } = self;
        SampleOptions { checkpoint, out, count, temperature, seed, inputs }
    }
}

#[derive(clap::Args)]
pub struct ExportArguments {
    #[arg(long, value_enum)]
    pub format: interop::WeightFormat,
    /// A run or a checkpoint
    #[arg(long)]
    pub checkpoint: String,
    /// The folder for model.safetensors and its settings
    #[arg(long)]
    pub out: PathBuf,
}

#[derive(clap::Args)]
pub struct ReportArguments {
    /// Run folders
    #[arg(required = true)]
    pub runs: Vec<PathBuf>,
    /// The page to write [default: report.html in the first run]
    #[arg(long)]
    pub out: Option<PathBuf>,
}

#[derive(clap::Args)]
pub struct DoctorArguments {
    /// Instead, compile every kernel for every architecture into this folder
    #[arg(long, value_name = "FOLDER")]
    pub kernels: Option<PathBuf>,
}

/// The subject of a benchmark.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum BenchTarget {
    Step,
    Data,
    Op,
}

impl BenchTarget {
    fn name(self) -> &'static str {
        match self {
            BenchTarget::Step => "step",
            BenchTarget::Data => "data",
            BenchTarget::Op => "op",
        }
    }
}

#[derive(clap::Args)]
pub struct BenchArguments {
    /// The training step by its stages (on random samples if the config's data cannot be opened), the data path without
    /// a model, or every operation by itself
    #[arg(value_enum, default_value = "step")]
    pub target: BenchTarget,
    /// step, data: the config
    #[arg(long, required_if_eq_any([("target", "step"), ("target", "data")]))]
    config: Option<PathBuf>,
    /// step, data: override a key: --set train.steps=100
    #[arg(long, value_name = "PATH=VALUE")]
    set: Vec<String>,
    /// step: number of steps to time [default: 20]
    #[arg(long)]
    pub steps: Option<usize>,
    /// data: seconds to measure [default: 10]
    #[arg(long)]
    pub seconds: Option<f64>,
    /// step: run the number of steps that each line of standard input gives (an empty line is one), on random samples
    #[arg(long, conflicts_with_all = ["steps", "out", "trace", "nvtx"])]
    pub interleaved: bool,
    /// step, op: file for the table as JSON
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// step: file for a Chrome trace of some steps, for Perfetto or chrome://tracing
    #[arg(long, value_name = "FILE.json", conflicts_with = "nvtx")]
    pub trace: Option<PathBuf>,
    /// step: emit NVTX ranges, for `nsys profile`
    #[arg(long)]
    pub nvtx: bool,
}

impl BenchArguments {
    /// Refuses options that do not belong to the target.
    pub fn check(&self) -> Result<()> {
        let step: &[BenchTarget] = &[BenchTarget::Step];
        let data: &[BenchTarget] = &[BenchTarget::Data];
        let step_or_data: &[BenchTarget] = &[BenchTarget::Step, BenchTarget::Data];
        let step_or_op: &[BenchTarget] = &[BenchTarget::Step, BenchTarget::Op];
        let options = [
            ("--config", self.config.is_some(), step_or_data),
            ("--set", !self.set.is_empty(), step_or_data),
            ("--steps", self.steps.is_some(), step),
            ("--interleaved", self.interleaved, step),
            ("--seconds", self.seconds.is_some(), data),
            ("--trace", self.trace.is_some(), step),
            ("--nvtx", self.nvtx, step),
            ("--out", self.out.is_some(), step_or_op),
        ];
        let misplaced = options.iter().find(|(_, is_given, targets)| *is_given && !targets.contains(&self.target));
        let Some((option, _, targets)) = misplaced else { return Ok(()) };
        let owners: Vec<String> = targets.iter().map(|target| format!("bench {}", target.name())).collect();
        let owners = owners.join(" and ");
        Err(Error::usage(format!("{option} belongs to {owners}, not to bench {}", self.target.name())))
    }

    /// Returns the options of `bench step` beyond the config.
    pub fn options(&self) -> bench::BenchOptions {
        let steps = self.steps.unwrap_or(20);
        bench::BenchOptions { steps, out: self.out.clone(), trace: self.trace.clone(), nvtx: self.nvtx }
    }

    /// Reads the config of `bench step` or `bench data`.
    pub fn config(&self) -> Result<Config> {
        let path = self.config.as_ref().ok_or_else(|| Error::usage("--config FILE is missing"))?;
        Config::read(path, &self.set)
    }
}
