//! The one test binary: the modules below, in travel order.

mod support;

mod rng;
mod shard;
mod order;
mod decode;
mod view;
mod feed;

fn main() {
    let arguments = libtest_mimic::Arguments::from_args();
    let mut trials = Vec::new();
    trials.extend(rng::trials());
    trials.extend(shard::trials());
    trials.extend(order::trials());
    trials.extend(decode::trials());
    trials.extend(view::trials());
    trials.extend(feed::trials());
    libtest_mimic::run(&arguments, trials).exit();
}
