//! The test binary: one module for each module of src, in the same order.

mod support;

modules![
    rng,
    bridge,
    dist,
    op,
    data,
    view,
    part,
    loader,
    log,
    method,
    optim,
    config,
    checkpoint,
    interop,
    train,
    evaluate,
    bench,
    inspect,
    report,
    doctor,
    cli,
    launch,
    architecture,
];

fn main() {
    // Cases that need their own process or world run this binary again.
    if let Ok(case) = std::env::var("OCCLUDE_CASE") {
        std::process::exit(support::child_process::dispatch(&case));
    }
    // The cache folder of the program is temporary during the tests, but for compiled kernels, which have the digest of
    // their source in their names.
    if std::env::var_os("OCCLUDE_TESTS").is_none() {
        let cache = tempfile::tempdir().expect("a folder");
        let kernels = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("kernels");
        std::fs::create_dir_all(&kernels).expect("a folder");
        std::fs::create_dir(cache.path().join("occlude")).expect("a folder");
        std::os::unix::fs::symlink(kernels, cache.path().join("occlude/kernels")).expect("a link");
        let mut child = std::process::Command::new(std::env::current_exe().expect("this binary"));
        child.args(std::env::args_os().skip(1)).env("OCCLUDE_TESTS", "1").env("XDG_CACHE_HOME", cache.path());
        // This binary is not in the folder of the programs.
        child.env("OCCLUDE_DECODE", env!("CARGO_BIN_EXE_occlude-decode"));
        let status = child.status().expect("this binary starts");
        drop(cache);
        std::process::exit(status.code().unwrap_or(101));
    }
    // Kernels are also tested on a GPU where there is one; libtorch caches its first answer about CUDA, so open it
    // first.
    if std::path::Path::new("/dev/nvidiactl").exists() {
        occlude::bridge::load_cuda();
    }
    let arguments = libtest_mimic::Arguments::from_args();
    let conclusion = libtest_mimic::run(&arguments, trials());
    support::training_job::remove_shared_data();
    method::captioned_images::remove_shared_data();
    conclusion.exit();
}
