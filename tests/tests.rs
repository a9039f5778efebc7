//! The one test binary: the modules below, in travel order.

mod support;

mod rng;
mod mae;
mod watch;
mod report;

fn main() {
    let arguments = libtest_mimic::Arguments::from_args();
    let mut trials = Vec::new();
    trials.extend(rng::trials());
    trials.extend(mae::trials());
    trials.extend(watch::trials());
    trials.extend(report::trials());
    libtest_mimic::run(&arguments, trials).exit();
}
