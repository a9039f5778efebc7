//! The one test binary: the modules below, in travel order.

mod support;

mod device;
mod launch;
mod rng;

fn main() {
    if let Ok(case) = std::env::var("OCCLUDE_CASE") {
        std::process::exit(device::case(&case));
    }
    let arguments = libtest_mimic::Arguments::from_args();
    let mut trials = Vec::new();
    trials.extend(rng::trials());
    trials.extend(device::trials());
    trials.extend(launch::trials());
    libtest_mimic::run(&arguments, trials).exit();
}
