//! The one test binary: the modules below, in travel order.

mod support;

mod rng;
mod store;
mod lease;
mod checkpoint;
mod damage;
mod full_disk;

fn main() {
    let arguments = libtest_mimic::Arguments::from_args();
    let mut trials = Vec::new();
    trials.extend(rng::trials());
    trials.extend(store::trials());
    trials.extend(lease::trials());
    trials.extend(checkpoint::trials());
    trials.extend(damage::trials());
    trials.extend(full_disk::trials());
    libtest_mimic::run(&arguments, trials).exit();
}
