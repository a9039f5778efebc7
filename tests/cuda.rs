//! The CUDA half of the bridge: how it is built, found and refused, what it says without a device, and, on a device,
//! streams, events, graphs and memory.

use crate::bridge::run;
use crate::support::{Outcome, root, skipped, trial};
use libtest_mimic::{Failed, Trial};
use occlude::bridge::cuda::{self, Event, FILE, Graph, Pool, Priority, Stream};
use occlude::bridge::{self, Forward, node};
use occlude::fault::{Fault, Result};
use std::path::{Path, PathBuf};
use std::process::Command;
use tch::{Device, Kind, Tensor};

type OnDevice = fn() -> Result<()>;
type Anywhere = fn() -> Outcome;

/// What needs a device, each in a process of its own: test, case, body.
const ON_A_DEVICE: [(&str, &str, OnDevice); 8] = [
    ("a_stream_waits_for_an_event", "cuda-events", events),
    ("a_stream_is_current_while_it_is_entered", "cuda-current", current),
    ("a_stream_made_elsewhere_can_be_worked_on", "cuda-external", external),
    ("recorded_memory_is_not_given_away_early", "cuda-record", recorded),
    ("a_replayed_graph_equals_eager_on_new_input", "cuda-graph", graph),
    ("a_backward_through_a_node_can_be_captured", "cuda-backward", backward),
    ("a_fault_inside_a_capture_leaves_the_next_one_whole", "cuda-fault", fault_inside),
    ("devices_and_their_memory_are_told", "cuda-memory", memory),
];

pub fn trials() -> Vec<Trial> {
    let mut trials = anywhere();
    for (name, case, _) in ON_A_DEVICE {
        let name = format!("cuda::{name}");
        trials.push(match device_here() {
            true => Trial::test(name, move || {
                let (code, told, why) = run(case)?;
                if code == Some(0) { Ok(()) } else { Err(Failed::from(format!("{code:?}\n{told}{why}"))) }
            }),
            false => skipped(&name, "no CUDA device here"),
        });
    }
    trials
}

fn anywhere() -> Vec<Trial> {
    let mut trials = vec![
        trial("cuda::the_mirror_lists_the_functions_of_the_table", the_mirror_lists_the_functions_of_the_table),
        trial("cuda::it_is_not_there_until_it_is_opened", it_is_not_there_until_it_is_opened),
        trial("cuda::a_program_without_its_half_says_so", a_program_without_its_half_says_so),
        trial("cuda::a_half_from_another_build_is_refused", a_half_from_another_build_is_refused),
        trial("cuda::a_file_that_is_no_library_is_refused", a_file_that_is_no_library_is_refused),
    ];
    let built: [(&str, Anywhere); 3] = [
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

fn device_here() -> bool {
    Path::new("/dev/nvidiactl").exists()
}

/// The cases that want a process of their own. Returns the exit code.
pub fn case(name: &str) -> i32 {
    if name == "cuda-half" {
        let libtorch = bridge::open_cuda();
        println!("libtorch's {libtorch}, ours {}", told(cuda::opened().map(Path::display)));
        return 0;
    }
    if name == "cuda-closed" {
        println!("{}", told(Stream::current(0).map(|_| "a stream")));
        return 0;
    }
    if name == "cuda-calls" {
        bridge::open_cuda();
        every_call().into_iter().for_each(|(call, said)| println!("{call}: {said}"));
        return 0;
    }
    let (_, _, case) = ON_A_DEVICE.into_iter().find(|(_, case, _)| *case == name).expect("a case");
    bridge::open_cuda();
    match case() {
        Ok(()) => 0,
        Err(fault) => {
            eprintln!("{fault}");
            1
        }
    }
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
        ("synchronize", said(cuda::synchronize(0))),
        ("memory", said(cuda::memory(0).map(drop))),
        ("peak", said(cuda::reset_peak(0))),
        ("cache", said(cuda::empty_cache())),
        ("shape", format!("{:?}", x.size())),
    ]
}

// ---- anywhere ------------------------------------------------------------------------------------------------------

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
    assert_eq!(lines.len(), 12, "{told}");
    for line in &lines[..11] {
        assert!(line.ends_with(": no CUDA here: libtorch finds no usable device"), "{line}");
    }
    assert_eq!(lines[11], "shape: [4]", "tensors are as they were");
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

// ---- on a device ---------------------------------------------------------------------------------------------------

const GPU: (Kind, Device) = (Kind::Float, Device::Cuda(0));

/// Some milliseconds of work on the current stream, after which the returned values are all 1.
fn long(n: i64) -> Tensor {
    let mean = Tensor::full([4096, 4096], 1.0 / 4096.0, GPU);
    let mut x = Tensor::ones([4096, n], GPU);
    for _ in 0..100 {
        x = mean.matmul(&x);
    }
    x
}

fn all(tensor: &Tensor, value: f64) -> bool {
    (tensor - value).abs().max().double_value(&[]) < 1e-3
}

fn events() -> Result<()> {
    let [first, second] = [Stream::new(0, Priority::Normal)?, Stream::new(0, Priority::High)?];
    assert_ne!(first, second);
    let (mut start, mut end) = (Event::timed()?, Event::timed()?);
    let mut y = Tensor::zeros([4096, 512], GPU);
    let out = Tensor::zeros([4096, 512], GPU);
    cuda::synchronize(0)?;
    for _ in 0..2 {
        let entered = first.enter()?;
        start.record(&first)?;
        y.copy_(&(long(512) * 3.0));
        end.record(&first)?;
        drop(entered);
        let entered = second.enter()?;
        second.wait(&end)?;
        out.shallow_clone().copy_(&(&y + 1.0));
        drop(entered);
        second.synchronize()?;
        // The wait went through both streams.
        assert!(end.is_done()?, "the second stream was done before the first");
        assert!(all(&out, 4.0));
        let _ = y.zero_();
        cuda::synchronize(0)?;
    }
    end.synchronize()?;
    let took = end.since(&start)?;
    assert!(took > 0.1, "a hundred products took {took} ms");
    assert!(Event::new()?.is_done()?, "an event that was never recorded is waited for by nobody");
    // Times are only taken by events made for it.
    let mut untimed = Event::new()?;
    untimed.record(&first)?;
    untimed.synchronize()?;
    assert!(untimed.since(&start).is_err());
    Ok(())
}

fn current() -> Result<()> {
    let usual = Stream::current(0)?;
    assert!(usual.raw().is_null(), "the default stream");
    let side = Stream::new(0, Priority::Normal)?;
    assert!(!side.raw().is_null() && side.device() == 0);
    {
        let _entered = side.enter()?;
        assert_eq!(Stream::current(0)?, side);
        let elsewhere = std::thread::spawn(|| Stream::current(0)).join().expect("a thread");
        assert_eq!(elsewhere?, usual, "each thread has its own");
        {
            let inner = Stream::new(0, Priority::High)?;
            let _entered = inner.enter()?;
            assert_eq!(Stream::current(0)?, inner);
        }
        assert_eq!(Stream::current(0)?, side);
    }
    assert_eq!(Stream::current(0)?, usual);
    let fault = Stream::new(99, Priority::Normal).expect_err("no such device");
    assert!(fault.message.contains("device 99 is asked for"), "{fault}");
    Ok(())
}

fn external() -> Result<()> {
    let theirs = Stream::new(0, Priority::Normal)?;
    // SAFETY: libtorch's streams live as long as the process.
    let stream = unsafe { Stream::external(theirs.raw(), 0)? };
    assert_eq!(stream.raw(), theirs.raw());
    let entered = stream.enter()?;
    assert_eq!(Stream::current(0)?.raw(), theirs.raw());
    let y = long(64) + 1.0;
    theirs.synchronize()?;
    drop(entered);
    assert!(all(&y, 2.0));
    Ok(())
}

fn recorded() -> Result<()> {
    let side = Stream::new(0, Priority::Normal)?;
    let out = Tensor::zeros([4096, 512], GPU);
    for _ in 0..3 {
        let x = Tensor::full([4096, 512], 5.0, GPU);
        cuda::synchronize(0)?;
        let place = x.data_ptr();
        let entered = side.enter()?;
        out.shallow_clone().copy_(&(long(512) * &x));
        cuda::record_stream(&x, &side)?;
        drop((entered, x));
        // Without the record, the next tensor of this size takes the memory while the side stream still reads it.
        let next = Tensor::full([4096, 512], -1.0, GPU);
        assert_ne!(next.data_ptr(), place, "given away while it is read");
        side.synchronize()?;
        assert!(all(&out, 5.0));
    }
    let cpu = Tensor::zeros([4], (Kind::Float, Device::Cpu));
    assert!(cuda::record_stream(&cpu, &side).is_err(), "no stream reads it");
    Ok(())
}

/// A few operations that allocate on the way.
fn body(x: &Tensor, w: &Tensor) -> Tensor {
    x.matmul(w).tanh().layer_norm([64], None::<Tensor>, None::<Tensor>, 1e-6, false).matmul(&w.tr())
}

fn graph() -> Result<()> {
    let draw = |seed: f64, n: i64| (Tensor::arange(n * 64, GPU) * 0.37 + seed).sin().view([n, 64]);
    let (x, w) = (draw(1.0, 32), draw(2.0, 64));
    let stream = Stream::new(0, Priority::Normal)?;
    for _ in 0..3 {
        let _entered = stream.enter()?;
        drop(body(&x, &w));
    }
    let pool = Pool::new()?;
    let (first, y) = Graph::capture(&stream, pool, || Ok(body(&x, &w)))?;
    let (second, z) = Graph::capture(&stream, pool, || Ok(&y * 2.0))?;
    assert_eq!(Stream::current(0)?.raw(), std::ptr::null_mut(), "the stream before is current again");
    for pass in 0..3 {
        let new = draw(pass as f64, 32);
        x.shallow_clone().copy_(&new);
        first.replay()?;
        second.replay()?;
        let eager = body(&new, &w);
        assert!((&y - &eager).abs().max().double_value(&[]) == 0.0, "pass {pass}");
        assert!((&z - eager * 2.0).abs().max().double_value(&[]) == 0.0, "pass {pass}");
    }
    // Random numbers go on from replay to replay.
    let (noise, r) = Graph::capture(&stream, Pool::new()?, || Ok(Tensor::rand([64], GPU)))?;
    noise.replay()?;
    let before = r.copy();
    noise.replay()?;
    assert!((&r - before).abs().max().double_value(&[]) > 0.0);
    second.reset()?;
    first.reset()
}

fn backward() -> Result<()> {
    let w = Tensor::ones([64, 64], GPU).set_requires_grad(true);
    let sums = Tensor::zeros([64, 64], GPU);
    bridge::set_gradient(&w, &sums)?;
    let x = Tensor::ones([8, 64], GPU);
    let step = || -> Result<Tensor> {
        let y = node(
            &[&x, &w],
            |x| Ok(Forward { outputs: vec![x[0].matmul(&x[1])], saved: vec![x[0].shallow_clone()] }),
            |saved, g, _| Ok(vec![None, Some(saved[0].tr().matmul(&g[0]))]),
        )?;
        let loss = y[0].square().mean(Kind::Float);
        loss.f_backward()?;
        Ok(loss.detach())
    };
    let stream = Stream::new(0, Priority::Normal)?;
    for _ in 0..3 {
        let _entered = stream.enter()?;
        drop(step()?);
    }
    let (graph, loss) = Graph::capture(&stream, Pool::new()?, step)?;
    for value in [0.5, 2.0] {
        let _ = x.shallow_clone().fill_(value);
        let _ = sums.shallow_clone().zero_();
        graph.replay()?;
        let replayed = (loss.double_value(&[]), sums.copy());
        let _ = sums.shallow_clone().zero_();
        let eager = step()?.double_value(&[]);
        assert!((replayed.0 - eager).abs() <= 1e-6 * eager, "{} for {eager}", replayed.0);
        assert!((replayed.1 - &sums).abs().max().double_value(&[]) <= 1e-6 * sums.abs().max().double_value(&[]));
    }
    Ok(())
}

fn fault_inside() -> Result<()> {
    let x = Tensor::ones([64, 64], GPU);
    let stream = Stream::new(0, Priority::Normal)?;
    let _ = x.matmul(&x);
    let told = Graph::capture(&stream, Pool::new()?, || -> Result<Tensor> {
        let _ = &x * 2.0;
        Err(Fault::failed("the body's own"))
    });
    assert_eq!(told.err().expect("a fault").message, "the body's own");
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        Graph::capture(&stream, Pool::new().expect("a pool"), || -> Result<Tensor> { panic!("in a body") })
    }));
    assert!(panicked.is_err());
    let (graph, y) = Graph::capture(&stream, Pool::new()?, || Ok(&x * 3.0))?;
    graph.replay()?;
    assert!(all(&y, 3.0));
    assert!(all(&x.matmul(&x), 64.0), "eager work goes on");
    Ok(())
}

fn memory() -> Result<()> {
    let device = cuda::device(0)?;
    println!("{device:?}");
    assert!(device.name.contains("NVIDIA") && device.capability >= (7, 0), "{device:?}");
    assert!(device.multiprocessors > 0 && device.memory > 1 << 30, "{device:?}");
    assert!(cuda::device(99).is_err());
    let before = cuda::memory(0)?;
    let x = Tensor::zeros([32 << 20], GPU);
    let with = cuda::memory(0)?;
    assert_eq!(with.allocated - before.allocated, 128 << 20);
    assert!(with.reserved >= with.allocated && with.peak_allocated >= with.allocated);
    drop(x);
    let after = cuda::memory(0)?;
    assert_eq!(after.allocated, before.allocated);
    assert!(after.peak_allocated >= with.allocated && after.reserved == with.reserved, "kept for the next");
    cuda::reset_peak(0)?;
    cuda::empty_cache()?;
    let cleared = cuda::memory(0)?;
    assert_eq!(cleared.peak_allocated, cleared.allocated);
    assert!(cleared.reserved < with.reserved, "given back to the device");
    cuda::synchronize(0)
}
