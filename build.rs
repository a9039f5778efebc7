//! Compiles the CPU half of the bridge and tells the linker where libtorch and MPI lie at run time.

use std::path::PathBuf;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=OCCLUDE_DEPS");
    let deps = std::env::var("OCCLUDE_DEPS").map(PathBuf::from).unwrap_or_else(|_| PathBuf::from(".deps"));
    let Ok(deps) = deps.canonicalize() else {
        panic!("{} does not exist: run launch/setup once", deps.display());
    };
    for lib in ["site/torch/lib", "site", "lib"] {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{}", deps.join(lib).display());
    }
    // RUNPATH rather than RPATH, so that LD_LIBRARY_PATH can point a carried binary at another libtorch.
    println!("cargo:rustc-link-arg=-Wl,--enable-new-dtags");
}
