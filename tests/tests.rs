//! The one test binary: the modules below, in travel order.

mod support;

mod rng;
mod store;

fn main() {
    let arguments = libtest_mimic::Arguments::from_args();
    let mut trials = Vec::new();
    trials.extend(rng::trials());
    trials.extend(store::trials());
    libtest_mimic::run(&arguments, trials).exit();
}
