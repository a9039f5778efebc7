//! The command line: runs one verb.

pub mod arguments; // verbs, options and their help
pub mod evaluate_arguments; // the options of `evaluate`

use crate::config;
use crate::data::pack;
use crate::dist::{self, SignalRequests};
use crate::error::{Error, Result};
use crate::evaluate::{self, captions, cka};
use crate::train::session::Resume;
use crate::{bench, doctor, inspect, interop, reconstruct, report, sample, train};
use arguments::{BenchArguments, BenchTarget, ImportArguments, InspectArguments, PackArguments, TrainArguments, Verb};
use evaluate_arguments::{EvalKind, EvaluateArguments};
use std::io::Write;

/// Runs a verb to its end.
pub fn run(verb: Verb) -> Result<()> {
    match verb {
        Verb::Pack(arguments) => run_pack(&arguments),
        Verb::Inspect(arguments) => run_inspect(arguments),
        Verb::Train(arguments) => run_train(arguments),
        Verb::Evaluate(arguments) => run_evaluate(arguments),
        Verb::Reconstruct(arguments) => {
            let files = reconstruct::reconstruct_files(&arguments.checkpoint, &arguments.input, &arguments.out)?;
            files.iter().for_each(|path| println!("{}", path.display()));
            Ok(())
        }
        Verb::Sample(arguments) => {
            let options = arguments.options();
            sample::sample(&options)?;
            println!("{}", options.out.display());
            Ok(())
        }
        Verb::Import(arguments) => run_import(arguments),
        Verb::Export(arguments) => {
            let lines = interop::export(arguments.format, &arguments.checkpoint, &arguments.out)?;
            lines.iter().for_each(|line| println!("{line}"));
            Ok(())
        }
        Verb::Report(arguments) => {
            let out = arguments.out.unwrap_or_else(|| arguments.runs[0].join("report.html"));
            report::write(&arguments.runs, &out)?;
            println!("{}", out.display());
            Ok(())
        }
        Verb::Bench(arguments) => run_bench(&arguments),
        Verb::Doctor(arguments) => match arguments.kernels {
            Some(folder) => doctor::compile_kernels(&folder),
            None => doctor::run_doctor(),
        },
        Verb::Schema => {
            let text = serde_json::to_string_pretty(&config::json_schema()).expect("a schema is JSON");
            // A reader such as `head` may close the pipe early.
            let _ = writeln!(std::io::stdout(), "{text}");
            Ok(())
        }
    }
}

fn run_pack(arguments: &PackArguments) -> Result<()> {
    let report = pack::pack(&arguments.source, &arguments.url, &arguments.options())?;
    for (url, set) in &report.data_sets {
        println!("{url}: {} samples in {} shards", set.samples, set.shards.len());
    }
    if !report.skipped.is_empty() {
        println!("{} samples were skipped", report.skipped.len());
    }
    if report.existing_shards > 0 {
        println!("{} shards existed already", report.existing_shards);
    }
    Ok(())
}

fn run_inspect(arguments: InspectArguments) -> Result<()> {
    let InspectArguments { url, index, sheet, sample } = arguments;
    let options = inspect::InspectOptions { url, write_index: index, sheet, max_samples: sample };
    let report = inspect::inspect(&options)?;
    println!("{}", report.summary());
    println!("{}", serde_json::to_string(&report).expect("a report is JSON"));
    report.check()
}

fn run_train(arguments: TrainArguments) -> Result<()> {
    let config = arguments.config.read();
    let requests = SignalRequests::listen()?;
    let world = dist::init_world()?;
    let resume = arguments.init.map_or(arguments.resume, Resume::Weights);
    let options = train::TrainOptions { run: arguments.run, resume, dump_steps: arguments.dump_steps };
    let work = || train::train(&config?, &options, &world, &requests);
    dist::run_to_end(world.as_ref(), work).map_err(|error| {
        // All ranks stop on request; only rank 0 prints the message.
        if world.rank() == 0 { error } else { Error { message: String::new(), ..error } }
    })
}

fn run_evaluate(arguments: EvaluateArguments) -> Result<()> {
    let options = arguments.options();
    let world = dist::init_world()?;
    dist::run_to_end(world.as_ref(), || {
        let report = match options? {
            EvalKind::Probe(options) => serde_json::to_string(&evaluate::evaluate(&options, &world)?),
            EvalKind::Captions(options) => serde_json::to_string(&captions::evaluate(&options, &world)?),
            EvalKind::Cka(options) => serde_json::to_string(&cka::evaluate(&options, &world)?),
        };
        if world.rank() == 0 {
            println!("{}", report.expect("a report is JSON"));
        }
        Ok(())
    })
}

fn run_import(arguments: ImportArguments) -> Result<()> {
    let ImportArguments { format, from, out, config, set } = arguments;
    let lines = interop::import(&interop::ImportOptions { format, from, out, config, overrides: set })?;
    lines.iter().for_each(|line| println!("{line}"));
    Ok(())
}

fn run_bench(arguments: &BenchArguments) -> Result<()> {
    arguments.check()?;
    if arguments.target == BenchTarget::Op {
        return bench::ops::bench_ops(tch::Device::cuda_if_available(), arguments.out.as_deref());
    }
    let config = arguments.config()?;
    let world = dist::init_world()?;
    dist::run_to_end(world.as_ref(), || match arguments.target {
        BenchTarget::Data => bench::data::bench_data(&config, &world, arguments.seconds.unwrap_or(10.0)),
        _ if arguments.interleaved => bench::bench_interleaved(&config, &world),
        _ => bench::bench_step(&config, &world, &arguments.options()),
    })
}
