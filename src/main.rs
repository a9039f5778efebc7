//! Opens the ground, parses, joins the world, runs the verb.

use clap::{Parser, Subcommand};
use occlude::bridge;
use occlude::config::{self, Config};
use occlude::data::pack;
use occlude::device::{self, Requests};
use occlude::fault::{Fault, Result};
use occlude::run::{bench, doctor, evaluate, open::Resume, reconstruct, report, train};
use std::path::PathBuf;
use std::process::ExitCode;

/// Pre-trains masked autoencoders.
#[derive(Parser)]
#[command(version, max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Write a folder of images as shards that training reads
    Pack(PackArguments),
    /// Train a model; under mpirun, on all of its ranks
    Train(TrainArguments),
    /// Judge a checkpoint's frozen encoder on labelled shards; the last line is one JSON object
    Evaluate(EvaluateArguments),
    /// Draw what a checkpoint's model makes of your own files
    Reconstruct(ReconstructArguments),
    /// Rebuild report.html of one run, or compare several
    Report(ReportArguments),
    /// Time the step of a config on made-up input
    Bench(BenchArguments),
    /// Say what this machine has and what it lacks
    Doctor,
    /// Print the JSON Schema of a config
    Schema,
}

#[derive(clap::Args)]
struct ConfigArguments {
    /// The config, such as configs/tiny/mae.json
    #[arg(long)]
    config: PathBuf,
    /// Override a key: --set train.steps=100
    #[arg(long, value_name = "PATH=VALUE")]
    set: Vec<String>,
}

impl ConfigArguments {
    fn read(&self) -> Result<Config> {
        Config::read(&self.config, &self.set)
    }
}

#[derive(clap::Args)]
struct TrainArguments {
    #[command(flatten)]
    config: ConfigArguments,
    /// The run's folder
    #[arg(long, default_value = "runs/run")]
    run: String,
    /// auto, never, or the checkpoint or run to begin from
    #[arg(long, default_value = "auto")]
    resume: Resume,
    /// Write the first so many steps whole, for comparison with other implementations
    #[arg(long, value_name = "N", default_value_t = 0)]
    dump_steps: u64,
}

#[derive(clap::Args)]
struct PackArguments {
    /// A folder of images; its sub-folders are classes
    source: PathBuf,
    /// Where the shards go
    url: PathBuf,
    /// The data set's name, part of every sample's identity; the output folder's name when left out
    #[arg(long)]
    name: Option<String>,
    #[arg(long, default_value_t = 10_000)]
    samples_per_shard: u64,
    /// Put this share of the samples into test/ and the others into train/
    #[arg(long, default_value_t = 0.0)]
    test_share: f64,
}

#[derive(clap::Args)]
struct EvaluateArguments {
    /// A run or a checkpoint
    #[arg(long)]
    checkpoint: String,
    /// Labelled shards that the probe learns from
    #[arg(long)]
    train: String,
    /// Labelled shards that it is judged on
    #[arg(long)]
    test: String,
    #[arg(long, value_enum)]
    protocol: evaluate::Protocol,
    #[arg(long, value_enum, default_value = "class")]
    feature: evaluate::Feature,
    /// Judge the same encoder with freshly drawn weights instead
    #[arg(long)]
    random: bool,
    /// Seed of the probe and of freshly drawn weights; the run's own when left out
    #[arg(long)]
    seed: Option<u64>,
}

#[derive(clap::Args)]
struct ReconstructArguments {
    /// A run or a checkpoint
    #[arg(long)]
    checkpoint: String,
    /// Image files
    #[arg(long, num_args = 1.., required = true)]
    input: Vec<PathBuf>,
    /// The folder for the pictures
    #[arg(long)]
    out: PathBuf,
}

#[derive(clap::Args)]
struct ReportArguments {
    /// Run folders
    #[arg(required = true)]
    runs: Vec<PathBuf>,
    /// The page to write; report.html in the first run when left out
    #[arg(long)]
    out: Option<PathBuf>,
}

#[derive(clap::Args)]
struct BenchArguments {
    #[command(flatten)]
    config: ConfigArguments,
    #[arg(long, default_value_t = 20)]
    steps: usize,
    /// One step for every line on standard input instead
    #[arg(long)]
    by_turns: bool,
}

fn main() -> ExitCode {
    bridge::open_cuda();
    bridge::keep_memory();
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_target(false).without_time().init();
    let verb = Arguments::parse().verb;
    match run(verb) {
        Ok(()) => ExitCode::SUCCESS,
        Err(fault) => {
            if !fault.message.is_empty() {
                eprintln!("occlude: {fault}");
            }
            ExitCode::from(fault.code as u8)
        }
    }
}

fn run(verb: Verb) -> Result<()> {
    match verb {
        Verb::Train(a) => {
            let config = a.config.read();
            let world = device::join()?;
            let requests = Requests::listen()?;
            let order = train::Order { run: a.run, resume: a.resume, dump_steps: a.dump_steps };
            let work = || train::train(&config?, &order, &world, &requests);
            // A stop on request is every rank's, and one rank tells it.
            device::together(world.as_ref(), work).map_err(|fault| match world.rank() {
                0 => fault,
                _ => Fault { message: String::new(), ..fault },
            })
        }
        Verb::Pack(a) => {
            let PackArguments { source, url, name, samples_per_shard, test_share } = a;
            let options = pack::Options { name, samples_per_shard, test_share, ..Default::default() };
            let packed = pack::pack(&source, &url, &options)?;
            for (folder, set) in &packed.sets {
                println!("{}: {} samples in {} shards", folder.display(), set.samples, set.shards.len());
            }
            Ok(())
        }
        Verb::Evaluate(a) => {
            device::ground(None);
            let EvaluateArguments { checkpoint, train, test, protocol, feature, random, seed } = a;
            let question = evaluate::Question { checkpoint, train, test, protocol, feature, random, seed };
            let answer = evaluate::evaluate(&question)?;
            println!("{}", serde_json::to_string(&answer).expect("an answer is JSON"));
            Ok(())
        }
        Verb::Reconstruct(a) => {
            let written = reconstruct::files(&a.checkpoint, &a.input, &a.out)?;
            written.iter().for_each(|path| println!("{}", path.display()));
            Ok(())
        }
        Verb::Report(a) => {
            let out = a.out.unwrap_or_else(|| a.runs[0].join("report.html"));
            report::write(&a.runs, &out)?;
            println!("{}", out.display());
            Ok(())
        }
        Verb::Bench(a) => {
            let config = a.config.read()?;
            let world = device::join()?;
            if a.by_turns { bench::by_turns(&config, &world) } else { bench::bench(&config, &world, a.steps) }
        }
        Verb::Doctor => doctor::doctor(),
        Verb::Schema => {
            println!("{}", serde_json::to_string_pretty(&config::schema()).expect("a schema is JSON"));
            Ok(())
        }
    }
}
