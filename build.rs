//! Compiles the two halves of the bridge and tells the linker where libtorch and MPI lie at run time.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    for source in ["bridge.h", "bridge.cpp", "autograd.cpp", "record.cpp", "profile.cpp", "cuda.cpp", "cuda.map"] {
        println!("cargo:rerun-if-changed=src/bridge/{source}");
    }
    println!("cargo:rerun-if-env-changed=OCCLUDE_DEPS");
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    let deps = std::env::var("OCCLUDE_DEPS").map(PathBuf::from).unwrap_or_else(|_| PathBuf::from(".deps"));
    let Ok(deps) = deps.canonicalize() else {
        panic!("{} does not exist: run launch/setup once", deps.display());
    };
    let torch = std::env::var("LIBTORCH").map(PathBuf::from).unwrap_or_else(|_| deps.join("site/torch"));
    for unit in ["bridge", "autograd", "record", "profile"] {
        compile(unit, &torch);
    }
    cuda(&torch);
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

const HALF_SOURCES: [&str; 3] = ["src/bridge/cuda.cpp", "src/bridge/cuda.map", "src/bridge/bridge.h"];

/// Lays the CUDA half of the bridge beside the program, where the CUDA headers are. The program opens it at its start,
/// and is not linked with it: they know each other by the sources, whose digest is in the file's name, so that builds of
/// several trees into one target folder do not take each other's.
fn cuda(torch: &Path) {
    let version = digest(&HALF_SOURCES);
    println!("cargo:rustc-env=OCCLUDE_CUDA_VERSION={version:016x}");
    let name = format!("libocclude_cuda-{version:016x}.so");
    let out = PathBuf::from(std::env::var("OUT_DIR").expect("cargo sets OUT_DIR"));
    let toolkit = torch.with_file_name("nvidia/cu13");
    let lacking: Vec<String> = [
        torch.join("lib/libtorch_cuda.so"),
        torch.join("include/ATen/cuda/CUDAGraph.h"),
        toolkit.join("include/cuda_runtime_api.h"),
        toolkit.join("include/crt/host_defines.h"),
        toolkit.join("lib/libcudart.so.13"),
    ]
    .iter()
    .filter(|path| !path.exists())
    .map(|path| path.display().to_string())
    .collect();
    if !lacking.is_empty() {
        println!("cargo:warning=built without the CUDA half of the bridge: there is no {}", lacking.join(", no "));
        return;
    }
    let half = out.join(&name);
    once(&half, &[&HALF_SOURCES[..], &["build.rs"]].concat(), torch, || {
        let mut build = compiler(torch);
        build.flag("-isystem").flag(toolkit.join("include").display().to_string());
        build.flag("-fvisibility=hidden").define("OCCLUDE_CUDA_VERSION", format!("{version}ull").as_str());
        let mut command = build.get_compiler().to_command();
        command.arg("-shared").arg("src/bridge/cuda.cpp").arg("-o").arg(&half);
        command.arg("-Wl,--no-undefined").arg("-Wl,--version-script=src/bridge/cuda.map");
        // No search path: libtorch_cuda, open by then, has loaded all of them.
        command.arg("-L").arg(torch.join("lib")).arg("-L").arg(toolkit.join("lib"));
        command.args(["-ltorch_cuda", "-lc10_cuda", "-ltorch_cpu", "-lc10", "-l:libcudart.so.13"]);
        let status = command.status().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        assert!(status.success(), "the CUDA half of the bridge does not compile, see above");
    });
    // OUT_DIR is <profile>/build/<package>/out. Renamed into its place: a program that runs keeps the file it has opened.
    let beside = out.ancestors().nth(3).expect("cargo's folders").join(&name);
    let part = beside.with_extension("part");
    std::fs::copy(&half, &part)
        .and_then(|_| std::fs::rename(&part, &beside))
        .unwrap_or_else(|error| panic!("{}: {error}", beside.display()));
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
    let compiler = std::env::var("CXX").unwrap_or_default();
    let wanted = format!("{} {compiler} {}", digest(sources), torch.display());
    let stamp = target.with_extension("made");
    if target.exists() && std::fs::read_to_string(&stamp).is_ok_and(|made| made == wanted) {
        return;
    }
    make();
    std::fs::write(&stamp, wanted).unwrap_or_else(|error| panic!("{}: {error}", stamp.display()));
}

fn digest(sources: &[&str]) -> u64 {
    let mut hasher = DefaultHasher::new();
    for source in sources {
        std::fs::read(source).unwrap_or_else(|error| panic!("{source}: {error}")).hash(&mut hasher);
    }
    hasher.finish()
}
