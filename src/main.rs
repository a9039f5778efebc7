//! The program `occlude`: loads CUDA, starts logging, parses the command line and runs the verb.

use clap::Parser;
use occlude::bridge;
use occlude::cli::{self, arguments::Arguments};
use occlude::dist;
use std::process::ExitCode;
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    dist::restart_with_passive_threads();
    // Before any call into libtorch: it caches its first answer to the question whether CUDA is available.
    bridge::load_cuda();
    bridge::install_caching_allocator();
    // The object store's client logs every retry; we log outages instead.
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info,object_store=error"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false)
        .without_time()
        .init();
    let verb = Arguments::parse().verb;
    match cli::run(verb) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            if !error.message.is_empty() {
                eprintln!("occlude: {error}");
            }
            ExitCode::from(error.code as u8)
        }
    }
}
