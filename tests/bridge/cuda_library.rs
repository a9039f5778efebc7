//! Tests of the CUDA library of the bridge: how it is built, found and rejected, and its errors without a device.

use crate::support::child_process::run_case;
use crate::support::{Outcome, root};
use libtest_mimic::Failed;
use occlude::bridge;
use occlude::bridge::cuda::{self, Event, GraphPool, LIBRARY_FILE, Priority, Stream};
use occlude::error::Result;
use std::path::{Path, PathBuf};
use std::process::Command;
use tch::{Device, Kind, Tensor};

crate::trials![
    the_rust_table_matches_the_c_function_table,
    calls_fail_before_the_library_is_opened,
    a_missing_library_is_reported,
    a_library_of_another_build_is_rejected,
    a_file_that_is_not_a_library_is_rejected;
    no_cuda_headers:
    the_library_exports_one_function,
    the_library_opens_without_a_driver,
    every_call_returns_an_error_without_a_device,
];

fn no_cuda_headers() -> Option<&'static str> {
    let headers = root().join(".deps/site/nvidia/cu13/include/cuda_runtime_api.h");
    (!headers.exists()).then_some("there are no CUDA headers")
}

/// Runs a case that needs its own process. Returns the exit code.
pub fn case(name: &str) -> i32 {
    match name {
        "cuda-closed" => println!("{}", result_text(Stream::current(0).map(|_| "a stream"))),
        "cuda-half" => {
            let libtorch = bridge::load_cuda();
            println!("libtorch's {libtorch}, ours {}", result_text(cuda::library_path().map(Path::display)));
        }
        "cuda-calls" => {
            bridge::load_cuda();
            call_everything().into_iter().for_each(|(call, printed)| println!("{call}: {printed}"));
        }
        other => return crate::bridge::gpu_streams::case(other),
    }
    0
}

fn result_text(reply: Result<impl std::fmt::Display>) -> String {
    reply.map_or_else(|error| error.message, |reply| reply.to_string())
}

/// Returns the result of every call that creates something.
fn call_everything() -> Vec<(&'static str, String)> {
    let printed = |reply: Result<()>| result_text(reply.map(|()| "done"));
    let x = Tensor::zeros([4], (Kind::Float, Device::Cpu));
    vec![
        ("current", printed(Stream::current(0).map(drop))),
        ("stream", printed(Stream::new(0, Priority::High).map(drop))),
        // SAFETY: the default stream always exists.
        ("external", printed(unsafe { Stream::from_external(std::ptr::null_mut(), 0) }.map(drop))),
        ("event", printed(Event::new().map(drop))),
        ("timed event", printed(Event::with_timing().map(drop))),
        ("pool", printed(GraphPool::new().map(drop))),
        ("device", printed(cuda::device_properties(0).map(drop))),
        ("current device", printed(cuda::current_device().map(drop))),
        ("use device", printed(cuda::set_device(0))),
        ("synchronize", printed(cuda::synchronize(0))),
        ("memory", printed(cuda::memory_stats(0).map(drop))),
        ("peak", printed(cuda::reset_peak_memory_stats(0))),
        ("cache", printed(cuda::empty_cache())),
        ("shape", format!("{:?}", x.size())),
    ]
}

fn the_rust_table_matches_the_c_function_table() -> Outcome {
    let source = std::fs::read_to_string(root().join("src/bridge/cuda.cpp"))?;
    let listed: Vec<&str> = source.split("X(").skip(1).filter_map(|rest| rest.split(')').next()).collect();
    let mirror = std::fs::read_to_string(root().join("src/bridge/cuda/functions.rs"))?;
    let table = mirror.split("pub struct CudaFns {").nth(1).expect("the table");
    let mirrored: Vec<&str> =
        table.lines().filter_map(|line| line.trim().strip_prefix("pub ")?.split(':').next()).collect();
    assert!(listed.len() > 20, "{listed:?}");
    assert_eq!(mirrored[..2], ["version", "size"]);
    assert_eq!(mirrored[2..], listed, "the same functions in the same order");
    Ok(())
}

fn calls_fail_before_the_library_is_opened() -> Outcome {
    let (code, output, why) = run_case("cuda-closed")?;
    assert_eq!(code, Some(0), "{why}");
    assert_eq!(output.trim(), "no CUDA here: load_cuda was not called");
    Ok(())
}

/// Returns the path of the library, in the folder of the test binary or its parent.
fn library_path() -> PathBuf {
    let program = std::env::current_exe().expect("this binary");
    let mut positions = program.ancestors().skip(1).take(2).map(|folder| folder.join(LIBRARY_FILE));
    positions.find(|path| path.exists()).expect("the CUDA half of the bridge, where its headers are")
}

fn the_library_exports_one_function() -> Outcome {
    let ask = |tool: &str, words: &[&str]| -> Result<String, Failed> {
        let output = Command::new(tool).args(words).arg(library_path()).output()?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let exported = ask("nm", &["-D", "--defined-only"])?;
    let names: Vec<&str> = exported.lines().filter_map(|line| line.split_whitespace().last()).collect();
    assert_eq!(names, ["occlude_cuda_functions"]);
    let dynamic = ask("readelf", &["-d"])?;
    assert!(dynamic.contains("libtorch_cuda.so") && dynamic.contains("libc10_cuda.so"), "{dynamic}");
    assert!(!dynamic.contains("PATH"), "it has a run path of this machine: {dynamic}");
    Ok(())
}

fn the_library_opens_without_a_driver() -> Outcome {
    let (code, output, why) = run_case("cuda-half")?;
    assert_eq!(code, Some(0), "{why}");
    assert_eq!(output.trim(), format!("libtorch's true, ours {}", library_path().display()));
    Ok(())
}

fn every_call_returns_an_error_without_a_device() -> Outcome {
    let output = Command::new(std::env::current_exe()?)
        .env("OCCLUDE_CASE", "cuda-calls")
        .env("CUDA_VISIBLE_DEVICES", "")
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 14, "{text}");
    for line in &lines[..13] {
        assert!(line.ends_with(": no CUDA here: libtorch finds no usable device"), "{line}");
    }
    assert_eq!(lines[13], "shape: [4]", "tensors are unchanged");
    Ok(())
}

/// Runs a copy of this binary in another folder, which `prepare` may fill, and returns what it prints about the
/// library.
fn run_copy(lay: impl FnOnce(&Path) -> Outcome) -> Result<String, Failed> {
    let program = std::env::current_exe()?;
    let path = tempfile::tempdir_in(program.parent().expect("a folder"))?;
    // Two folders down, so that the built library is not in the parent folder.
    let folder = path.path().join("a/b");
    std::fs::create_dir_all(&folder)?;
    std::fs::hard_link(&program, folder.join("tests"))?;
    lay(&folder.join(LIBRARY_FILE))?;
    let output = Command::new(folder.join("tests")).env("OCCLUDE_CASE", "cuda-half").output()?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_string())
}

fn libtorch_has_cuda() -> bool {
    root().join(".deps/site/torch/lib/libtorch_cuda.so").exists()
}

fn a_missing_library_is_reported() -> Outcome {
    let output = run_copy(|_| Ok(()))?;
    let expected = if libtorch_has_cuda() {
        format!("libtorch's true, ours no CUDA here: {LIBRARY_FILE} is not beside the program")
    } else {
        "libtorch's false, ours no CUDA here: this libtorch has no CUDA".to_string()
    };
    assert!(output.starts_with(&expected), "{output}");
    Ok(())
}

fn a_library_of_another_build_is_rejected() -> Outcome {
    let output = run_copy(|path| {
        let source = path.with_extension("c");
        let table = "static const unsigned long long table[2] = {7, 8};\n";
        std::fs::write(&source, format!("{table}const void* occlude_cuda_functions(void) {{ return table; }}\n"))?;
        let status = Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(path).arg(&source).status()?;
        assert!(status.success(), "cc");
        Ok(())
    })?;
    let expected = if libtorch_has_cuda() { "is from another build than the program" } else { "has no CUDA" };
    assert!(output.contains(expected), "{output}");
    Ok(())
}

fn a_file_that_is_not_a_library_is_rejected() -> Outcome {
    let output = run_copy(|path| Ok(std::fs::write(path, "a text that is long enough to be read as a header")?))?;
    let expected = if libtorch_has_cuda() { "cannot be loaded: " } else { "has no CUDA" };
    assert!(output.contains(expected), "{output}");
    Ok(())
}
