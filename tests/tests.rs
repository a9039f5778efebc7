//! The one test binary: the modules below, in travel order.

mod bar;
mod heap;
mod job;
mod support;

mod rng;
mod bridge;
mod record;
mod node;
mod fused;
mod cuda;
mod gpu;
mod device;
mod nccl;
mod launch;
mod launchers;
mod emulator;
mod op;
mod kernel;
mod kernel_attention;
mod kernel_tokens;
mod kernel_flat;
mod kernel_targets;
mod nvrtc;
mod store;
mod shard;
mod order;
mod decode;
mod hostile;
mod clip;
mod footage;
mod view;
mod augment;
mod timm;
mod mix;
mod sound;
mod sound_speed;
mod feed;
mod server;
mod stream;
mod cloud;
mod far;
mod steady;
mod pack;
mod inspect;
mod listen;
mod mae;
mod videomae;
mod work;
mod optim;
mod config;
mod step;
mod gpu_step;
mod probe;
mod overlap;
mod lease;
mod checkpoint;
mod damage;
mod full_disk;
mod watch;
mod report;
mod resume;
mod asked;
mod elsewhere;
mod trouble;
mod refuse;
mod small_disk;
mod evaluate;
mod verbs;
mod exchange;
mod exchange_videomae;
mod pth;
mod architecture;

fn main() {
    // Cases that want a process, or a world, of their own run this binary again.
    if let Ok(case) = std::env::var("OCCLUDE_CASE") {
        std::process::exit(bridge::case(&case));
    }
    // What the program keeps between runs, it keeps for the tests in a folder that goes with them.
    if std::env::var_os("OCCLUDE_TESTS").is_none() {
        let cache = tempfile::tempdir().expect("a folder");
        let mut again = std::process::Command::new(std::env::current_exe().expect("this binary"));
        again.args(std::env::args_os().skip(1)).env("OCCLUDE_TESTS", "1").env("XDG_CACHE_HOME", cache.path());
        // This binary lies in another folder than the programs.
        again.env("OCCLUDE_DECODE", env!("CARGO_BIN_EXE_occlude-decode"));
        let status = again.status().expect("this binary starts");
        drop(cache);
        std::process::exit(status.code().unwrap_or(101));
    }
    // Kernels are tested on a GPU too, where there is one; libtorch's first answer about CUDA is its last.
    if std::path::Path::new("/dev/nvidiactl").exists() {
        occlude::bridge::open_cuda();
    }
    let arguments = libtest_mimic::Arguments::from_args();
    let mut trials = Vec::new();
    trials.extend(rng::trials());
    trials.extend(bridge::trials());
    trials.extend(record::trials());
    trials.extend(node::trials());
    trials.extend(fused::trials());
    trials.extend(cuda::trials());
    trials.extend(gpu::trials());
    trials.extend(device::trials());
    trials.extend(nccl::trials());
    trials.extend(launch::trials());
    trials.extend(launchers::trials());
    trials.extend(emulator::trials());
    trials.extend(op::trials());
    trials.extend(kernel::trials());
    trials.extend(kernel_attention::trials());
    trials.extend(kernel_tokens::trials());
    trials.extend(kernel_flat::trials());
    trials.extend(kernel_targets::trials());
    trials.extend(nvrtc::trials());
    trials.extend(store::trials());
    trials.extend(shard::trials());
    trials.extend(order::trials());
    trials.extend(decode::trials());
    trials.extend(hostile::trials());
    trials.extend(clip::trials());
    trials.extend(footage::trials());
    trials.extend(view::trials());
    trials.extend(augment::trials());
    trials.extend(timm::trials());
    trials.extend(mix::trials());
    trials.extend(sound::trials());
    trials.extend(sound_speed::trials());
    trials.extend(feed::trials());
    trials.extend(stream::trials());
    trials.extend(cloud::trials());
    trials.extend(far::trials());
    trials.extend(steady::trials());
    trials.extend(pack::trials());
    trials.extend(inspect::trials());
    trials.extend(listen::trials());
    trials.extend(mae::trials());
    trials.extend(videomae::trials());
    trials.extend(work::trials());
    trials.extend(optim::trials());
    trials.extend(config::trials());
    trials.extend(step::trials());
    trials.extend(gpu_step::trials());
    trials.extend(probe::trials());
    trials.extend(overlap::trials());
    trials.extend(lease::trials());
    trials.extend(checkpoint::trials());
    trials.extend(damage::trials());
    trials.extend(full_disk::trials());
    trials.extend(watch::trials());
    trials.extend(report::trials());
    trials.extend(resume::trials());
    trials.extend(asked::trials());
    trials.extend(elsewhere::trials());
    trials.extend(trouble::trials());
    trials.extend(refuse::trials());
    trials.extend(small_disk::trials());
    trials.extend(evaluate::trials());
    trials.extend(verbs::trials());
    trials.extend(exchange::trials());
    trials.extend(exchange_videomae::trials());
    trials.extend(pth::trials());
    trials.extend(architecture::trials());
    let conclusion = libtest_mimic::run(&arguments, trials);
    job::clean();
    conclusion.exit();
}
