//! Compiles the CPU half of the bridge and tells the linker where libtorch and MPI lie at run time.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=src/bridge");
    println!("cargo:rerun-if-env-changed=OCCLUDE_DEPS");
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    let deps = std::env::var("OCCLUDE_DEPS").map(PathBuf::from).unwrap_or_else(|_| PathBuf::from(".deps"));
    let Ok(deps) = deps.canonicalize() else {
        panic!("{} does not exist: run launch/setup once", deps.display());
    };
    let torch = std::env::var("LIBTORCH").map(PathBuf::from).unwrap_or_else(|_| deps.join("site/torch"));
    for unit in ["bridge", "node"] {
        compile(unit, &torch);
    }
    println!("cargo:rustc-link-lib=c10");
    println!("cargo:rustc-link-lib=torch_cpu");
    println!("cargo:rustc-link-lib=stdc++");
    for lib in ["site/torch/lib", "site/nvidia/cu13/lib", "venv/lib", "lib"] {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{}", deps.join(lib).display());
    }
    // RUNPATH rather than RPATH, so that LD_LIBRARY_PATH can point a carried binary at another libtorch.
    println!("cargo:rustc-link-arg=-Wl,--enable-new-dtags");
}

/// The compiler with libtorch's headers.
fn compiler(torch: &Path) -> cc::Build {
    let mut build = cc::Build::new();
    build.cpp(true).std("c++20").cargo_metadata(false);
    // -isystem: libtorch's own warnings are not ours.
    for include in ["include", "include/torch/csrc/api/include"] {
        build.flag("-isystem").flag(torch.join(include).display().to_string());
    }
    build
}

/// Makes src/bridge/`unit`.cpp a static library, unless that was done for these very sources: libtorch's headers take
/// half a minute a file.
fn compile(unit: &str, torch: &Path) {
    let out = PathBuf::from(std::env::var("OUT_DIR").expect("cargo sets OUT_DIR"));
    let source = format!("src/bridge/{unit}.cpp");
    let library = format!("occlude_{unit}");
    once(&out.join(format!("lib{library}.a")), &[&source, "src/bridge/bridge.h", "build.rs"], torch, || {
        compiler(torch).file(&source).compile(&library);
    });
    println!("cargo:rustc-link-search=native={}", out.display());
    println!("cargo:rustc-link-lib=static={library}");
}

/// Runs `make` unless it has made `target` from the same sources and the same libtorch.
fn once(target: &Path, sources: &[&str], torch: &Path, make: impl FnOnce()) {
    let mut hasher = DefaultHasher::new();
    torch.hash(&mut hasher);
    std::env::var_os("CXX").hash(&mut hasher);
    for source in sources {
        std::fs::read(source).unwrap_or_else(|error| panic!("{source}: {error}")).hash(&mut hasher);
    }
    let digest = format!("{:016x}", hasher.finish());
    let stamp = target.with_extension("made");
    if target.exists() && std::fs::read_to_string(&stamp).is_ok_and(|made| made == digest) {
        return;
    }
    make();
    std::fs::write(&stamp, digest).unwrap_or_else(|error| panic!("{}: {error}", stamp.display()));
}
