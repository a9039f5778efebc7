//! Opens the ground, parses, joins the world, runs the verb.

mod arguments;

use arguments::{Arguments, Asked, Benched, ImportArguments, InspectArguments, Verb};
use clap::Parser;
use occlude::data::pack;
use occlude::device::{self, Requests};
use occlude::fault::{Fault, Result};
use occlude::run::evaluate::captions;
use occlude::run::open::Resume;
use occlude::run::{bench, budget, doctor, evaluate, exchange, inspect, reconstruct, report, roof, train};
use occlude::{bridge, config};
use std::io::Write;
use std::process::ExitCode;
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    bridge::open_cuda();
    bridge::keep_memory();
    // The store's client would tell of every request that it makes again; we tell of outages.
    let told = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info,object_store=error"));
    tracing_subscriber::fmt()
        .with_env_filter(told)
        .with_writer(std::io::stderr)
        .with_target(false)
        .without_time()
        .init();
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
            let requests = Requests::listen()?;
            let world = device::join()?;
            let resume = a.init.map_or(a.resume, Resume::Weights);
            let order = train::Order { run: a.run, resume, dump_steps: a.dump_steps };
            let work = || train::train(&config?, &order, &world, &requests);
            // A stop on request is every rank's, and one rank tells it.
            device::together(world.as_ref(), work).map_err(|fault| match world.rank() {
                0 => fault,
                _ => Fault { message: String::new(), ..fault },
            })
        }
        Verb::Pack(a) => {
            let packed = pack::pack(&a.source, &a.url, &a.options())?;
            for (place, set) in &packed.sets {
                println!("{place}: {} samples in {} shards", set.samples, set.shards.len());
            }
            let told = [(packed.bad.len(), "pictures were left out"), (packed.kept, "shards stood there already")];
            told.iter().filter(|(count, _)| *count > 0).for_each(|(count, what)| println!("{count} {what}"));
            Ok(())
        }
        Verb::Inspect(a) => {
            let InspectArguments { url, index, sheet, sample } = a;
            let found = inspect::inspect(&inspect::Question { url, index, sheet, sample })?;
            println!("{}", found.summary());
            println!("{}", serde_json::to_string(&found).expect("a report is JSON"));
            found.verdict()
        }
        Verb::Evaluate(a) => {
            let question = a.question();
            let world = device::join()?;
            device::together(world.as_ref(), || {
                let answer = match question? {
                    Asked::Probe(question) => serde_json::to_string(&evaluate::evaluate(&question, &world)?),
                    Asked::Captions(question) => serde_json::to_string(&captions::evaluate(&question, &world)?),
                };
                if world.rank() == 0 {
                    println!("{}", answer.expect("an answer is JSON"));
                }
                Ok(())
            })
        }
        Verb::Reconstruct(a) => {
            let written = reconstruct::files(&a.checkpoint, &a.input, &a.out)?;
            written.iter().for_each(|path| println!("{}", path.display()));
            Ok(())
        }
        Verb::Import(a) => {
            let ImportArguments { format, from, out, config, set } = a;
            let told = exchange::import(&exchange::Order { format, from, out, config, set })?;
            told.iter().for_each(|line| println!("{line}"));
            Ok(())
        }
        Verb::Export(a) => {
            let told = exchange::export(a.format, &a.checkpoint, &a.out)?;
            told.iter().for_each(|line| println!("{line}"));
            Ok(())
        }
        Verb::Report(a) => {
            let out = a.out.unwrap_or_else(|| a.runs[0].join("report.html"));
            report::write(&a.runs, &out)?;
            println!("{}", out.display());
            Ok(())
        }
        Verb::Bench(a) => {
            a.check()?;
            if a.what == Benched::Op {
                return roof::roof(tch::Device::cuda_if_available(), a.out.as_deref());
            }
            let (config, world) = (a.config()?, device::join()?);
            device::together(world.as_ref(), || match a.what {
                Benched::Data => budget::data(&config, &world, a.seconds.unwrap_or(10.0)),
                _ if a.by_turns => bench::by_turns(&config, &world),
                _ => bench::bench(&config, &world, &a.order()),
            })
        }
        Verb::Doctor(a) => a.kernels.map_or_else(doctor::doctor, |folder| doctor::kernels(&folder)),
        Verb::Schema => {
            let text = serde_json::to_string_pretty(&config::schema()).expect("a schema is JSON");
            // A reader that has seen enough, as `head` has, closes the pipe.
            let _ = writeln!(std::io::stdout(), "{text}");
            Ok(())
        }
    }
}
