//! Compiles the CPU half of the bridge and tells the linker where libtorch and MPI lie at run time.

use std::path::PathBuf;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=src/bridge/bridge.cpp");
    println!("cargo:rerun-if-env-changed=OCCLUDE_DEPS");
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    let deps = std::env::var("OCCLUDE_DEPS").map(PathBuf::from).unwrap_or_else(|_| PathBuf::from(".deps"));
    let Ok(deps) = deps.canonicalize() else {
        panic!("{} does not exist: run launch/setup once", deps.display());
    };
    let torch = std::env::var("LIBTORCH").map(PathBuf::from).unwrap_or_else(|_| deps.join("site/torch"));
    cc::Build::new()
        .cpp(true)
        .std("c++20")
        .file("src/bridge/bridge.cpp")
        // -isystem: libtorch's own warnings are not ours.
        .flag("-isystem")
        .flag(torch.join("include").display().to_string())
        .flag("-isystem")
        .flag(torch.join("include/torch/csrc/api/include").display().to_string())
        .compile("occlude_bridge");
    println!("cargo:rustc-link-lib=c10");
    println!("cargo:rustc-link-lib=torch_cpu");
    for lib in ["site/torch/lib", "site/nvidia/cu13/lib", "venv/lib", "lib"] {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{}", deps.join(lib).display());
    }
    // RUNPATH rather than RPATH, so that LD_LIBRARY_PATH can point a carried binary at another libtorch.
    println!("cargo:rustc-link-arg=-Wl,--enable-new-dtags");
}
