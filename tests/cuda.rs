//! The CUDA half of the bridge: how it is built, found and refused, and what it says without a device.

use crate::bridge::run;
use crate::support::{Outcome, root, skipped, trial};
use libtest_mimic::{Failed, Trial};
use occlude::bridge;
use occlude::bridge::cuda::{self, Event, FILE, Pool, Priority, Stream};
use occlude::fault::Result;
use std::path::{Path, PathBuf};
use std::process::Command;
use tch::{Device, Kind, Tensor};

type Case = fn() -> Outcome;

pub fn trials() -> Vec<Trial> {
    let mut trials = vec![
        trial("cuda::the_mirror_lists_the_functions_of_the_table", the_mirror_lists_the_functions_of_the_table),
        trial("cuda::it_is_not_there_until_it_is_opened", it_is_not_there_until_it_is_opened),
        trial("cuda::a_program_without_its_half_says_so", a_program_without_its_half_says_so),
        trial("cuda::a_half_from_another_build_is_refused", a_half_from_another_build_is_refused),
        trial("cuda::a_file_that_is_no_library_is_refused", a_file_that_is_no_library_is_refused),
    ];
    let built: [(&str, Case); 3] = [
        ("it_is_built_and_exports_one_function", it_is_built_and_exports_one_function),
        ("it_opens_without_a_driver", it_opens_without_a_driver),
        ("without_a_device_every_call_is_a_fault", without_a_device_every_call_is_a_fault),
    ];
    for (name, case) in built {
        let name = format!("cuda::{name}");
        let headers = root().join(".deps/site/nvidia/cu13/include/cuda_runtime_api.h").exists();
        trials.push(if headers { trial(&name, case) } else { skipped(&name, "there are no CUDA headers") });
    }
    trials
}

/// The cases that want a process of their own. Returns the exit code.
pub fn case(name: &str) -> i32 {
    match name {
        "cuda-closed" => println!("{}", told(Stream::current(0).map(|_| "a stream"))),
        "cuda-half" => {
            let libtorch = bridge::open_cuda();
            println!("libtorch's {libtorch}, ours {}", told(cuda::opened().map(Path::display)));
        }
        "cuda-calls" => {
            bridge::open_cuda();
            every_call().into_iter().for_each(|(call, said)| println!("{call}: {said}"));
        }
        other => return crate::gpu::case(other),
    }
    0
}

fn told(answer: Result<impl std::fmt::Display>) -> String {
    answer.map_or_else(|fault| fault.message, |answer| answer.to_string())
}

/// What each call that makes something says.
fn every_call() -> Vec<(&'static str, String)> {
    let said = |answer: Result<()>| told(answer.map(|()| "done"));
    let x = Tensor::zeros([4], (Kind::Float, Device::Cpu));
    vec![
        ("current", said(Stream::current(0).map(drop))),
        ("stream", said(Stream::new(0, Priority::High).map(drop))),
        // SAFETY: the default stream, which is always there.
        ("external", said(unsafe { Stream::external(std::ptr::null_mut(), 0) }.map(drop))),
        ("event", said(Event::new().map(drop))),
        ("timed event", said(Event::timed().map(drop))),
        ("pool", said(Pool::new().map(drop))),
        ("device", said(cuda::device(0).map(drop))),
        ("current device", said(cuda::current_device().map(drop))),
        ("use device", said(cuda::use_device(0))),
        ("synchronize", said(cuda::synchronize(0))),
        ("memory", said(cuda::memory(0).map(drop))),
        ("peak", said(cuda::reset_peak(0))),
        ("cache", said(cuda::empty_cache())),
        ("shape", format!("{:?}", x.size())),
    ]
}

fn the_mirror_lists_the_functions_of_the_table() -> Outcome {
    let source = std::fs::read_to_string(root().join("src/bridge/cuda.cpp"))?;
    let listed: Vec<&str> = source.split("X(").skip(1).filter_map(|rest| rest.split(')').next()).collect();
    let mirror = std::fs::read_to_string(root().join("src/bridge/cuda/table.rs"))?;
    let table = mirror.split("pub struct Table {").nth(1).expect("the table");
    let mirrored: Vec<&str> =
        table.lines().filter_map(|line| line.trim().strip_prefix("pub ")?.split(':').next()).collect();
    assert!(listed.len() > 20, "{listed:?}");
    assert_eq!(mirrored[..2], ["version", "size"]);
    assert_eq!(mirrored[2..], listed, "the same functions in the same order");
    Ok(())
}

fn it_is_not_there_until_it_is_opened() -> Outcome {
    let (code, told, why) = run("cuda-closed")?;
    assert_eq!(code, Some(0), "{why}");
    assert_eq!(told.trim(), "no CUDA here: open_cuda was not called");
    Ok(())
}

/// The half beside the tests' program, or one folder up.
fn half() -> PathBuf {
    let program = std::env::current_exe().expect("this binary");
    let mut places = program.ancestors().skip(1).take(2).map(|folder| folder.join(FILE));
    places.find(|path| path.exists()).expect("the CUDA half of the bridge, where its headers are")
}

fn it_is_built_and_exports_one_function() -> Outcome {
    let ask = |tool: &str, words: &[&str]| -> Result<String, Failed> {
        let output = Command::new(tool).args(words).arg(half()).output()?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let exported = ask("nm", &["-D", "--defined-only"])?;
    let names: Vec<&str> = exported.lines().filter_map(|line| line.split_whitespace().last()).collect();
    assert_eq!(names, ["occlude_cuda_table"]);
    let dynamic = ask("readelf", &["-d"])?;
    assert!(dynamic.contains("libtorch_cuda.so") && dynamic.contains("libc10_cuda.so"), "{dynamic}");
    assert!(!dynamic.contains("PATH"), "it would look for libraries where this machine has them: {dynamic}");
    Ok(())
}

fn it_opens_without_a_driver() -> Outcome {
    let (code, told, why) = run("cuda-half")?;
    assert_eq!(code, Some(0), "{why}");
    assert_eq!(told.trim(), format!("libtorch's true, ours {}", half().display()));
    Ok(())
}

fn without_a_device_every_call_is_a_fault() -> Outcome {
    let output = Command::new(std::env::current_exe()?)
        .env("OCCLUDE_CASE", "cuda-calls")
        .env("CUDA_VISIBLE_DEVICES", "")
        .output()?;
    let told = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{told}{}", String::from_utf8_lossy(&output.stderr));
    let lines: Vec<&str> = told.lines().collect();
    assert_eq!(lines.len(), 14, "{told}");
    for line in &lines[..13] {
        assert!(line.ends_with(": no CUDA here: libtorch finds no usable device"), "{line}");
    }
    assert_eq!(lines[13], "shape: [4]", "tensors are as they were");
    Ok(())
}

/// This binary under another path, with or without a file that calls itself the half: what it says of it.
fn elsewhere(lay: impl FnOnce(&Path) -> Outcome) -> Result<String, Failed> {
    let program = std::env::current_exe()?;
    let place = tempfile::tempdir_in(program.parent().expect("a folder"))?;
    // Two folders down, so that the built half is not one folder up.
    let folder = place.path().join("a/b");
    std::fs::create_dir_all(&folder)?;
    std::fs::hard_link(&program, folder.join("tests"))?;
    lay(&folder.join(FILE))?;
    let output = Command::new(folder.join("tests")).env("OCCLUDE_CASE", "cuda-half").output()?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_string())
}

fn libtorch_has_a_cuda_half() -> bool {
    root().join(".deps/site/torch/lib/libtorch_cuda.so").exists()
}

fn a_program_without_its_half_says_so() -> Outcome {
    let told = elsewhere(|_| Ok(()))?;
    let wanted = match libtorch_has_a_cuda_half() {
        true => format!("libtorch's true, ours no CUDA here: {FILE} is not beside the program"),
        false => "libtorch's false, ours no CUDA here: libtorch has no CUDA half".to_string(),
    };
    assert!(told.starts_with(&wanted), "{told}");
    Ok(())
}

fn a_half_from_another_build_is_refused() -> Outcome {
    let told = elsewhere(|path| {
        let source = path.with_extension("c");
        let table = "static const unsigned long long table[2] = {7, 8};\n";
        std::fs::write(&source, format!("{table}const void* occlude_cuda_table(void) {{ return table; }}\n"))?;
        let status = Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(path).arg(&source).status()?;
        assert!(status.success(), "cc");
        Ok(())
    })?;
    let wanted = if libtorch_has_a_cuda_half() { "is from another build than the program" } else { "has no CUDA half" };
    assert!(told.contains(wanted), "{told}");
    Ok(())
}

fn a_file_that_is_no_library_is_refused() -> Outcome {
    let told = elsewhere(|path| Ok(std::fs::write(path, "a text that is long enough to be read as a header")?))?;
    let wanted = if libtorch_has_a_cuda_half() { "does not open: " } else { "has no CUDA half" };
    assert!(told.contains(wanted), "{told}");
    Ok(())
}
