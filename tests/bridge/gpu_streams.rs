//! Tests of streams, events, graphs and memory on a CUDA device.

use crate::support::child_process::run_case;
use crate::support::{skipped, trial_name};
use libtest_mimic::{Failed, Trial};
use occlude::bridge;
use occlude::bridge::cuda::{self, Event, Graph, GraphPool, Priority, Stream};
use occlude::bridge::{ForwardOutput, apply_function};
use occlude::error::{Error, Result};
use std::path::Path;
use tch::{Device, Kind, Tensor};

type OnDevice = fn() -> Result<()>;

/// Tests that need a device, each in its own process: test name, case name, body.
const ON_A_DEVICE: [(&str, &str, OnDevice); 8] = [
    ("a_stream_waits_for_an_event", "cuda-events", stream_waits_for_event),
    ("an_entered_stream_is_current", "cuda-current", entered_stream_is_current),
    ("an_external_stream_can_be_used", "cuda-external", external_stream),
    ("memory_recorded_on_a_stream_is_not_reused_early", "cuda-record", recorded_memory),
    ("a_replayed_graph_matches_eager_on_new_input", "cuda-graph", graph),
    ("a_backward_through_a_node_can_be_captured", "cuda-backward", backward),
    ("a_failed_capture_does_not_affect_the_next", "cuda-fault", failed_capture),
    ("device_name_and_memory_are_reported", "cuda-memory", memory),
];

pub fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for (name, case, _) in ON_A_DEVICE {
        let name = trial_name(module_path!(), name);
        trials.push(if has_device() {
            Trial::test(name, move || {
                let (code, output, why) = run_case(case)?;
                if code == Some(0) { Ok(()) } else { Err(Failed::from(format!("{code:?}\n{output}{why}"))) }
            })
        } else {
            skipped(&name, "no CUDA device here")
        });
    }
    trials
}

fn has_device() -> bool {
    Path::new("/dev/nvidiactl").exists()
}

/// Runs a case. Returns the exit code.
pub fn case(name: &str) -> i32 {
    let (_, _, case) = ON_A_DEVICE.into_iter().find(|(_, case, _)| *case == name).expect("a case");
    bridge::load_cuda();
    match case() {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("{error}");
            1
        }
    }
}

const GPU: (Kind, Device) = (Kind::Float, Device::Cuda(0));

/// Queues some milliseconds of work on the current stream; the returned values are all 1.
fn queue_work(n: i64) -> Tensor {
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

fn stream_waits_for_event() -> Result<()> {
    let [first, second] = [Stream::new(0, Priority::Normal)?, Stream::new(0, Priority::High)?];
    assert_ne!(first, second);
    let mut start = Event::with_timing()?;
    let mut end = Event::with_timing()?;
    let mut y = Tensor::zeros([4096, 512], GPU);
    let out = Tensor::zeros([4096, 512], GPU);
    cuda::synchronize(0)?;
    for _ in 0..2 {
        let entered = first.set_current()?;
        start.record(&first)?;
        y.copy_(&(queue_work(512) * 3.0));
        end.record(&first)?;
        drop(entered);
        let entered = second.set_current()?;
        second.wait(&end)?;
        out.shallow_clone().copy_(&(&y + 1.0));
        drop(entered);
        second.synchronize()?;
        // The wait covered both streams.
        assert!(end.is_done()?, "the second stream was done before the first");
        assert!(all(&out, 4.0));
        let _ = y.zero_();
        cuda::synchronize(0)?;
    }
    end.synchronize()?;
    let took = end.elapsed_since(&start)?;
    assert!(took > 0.1, "a hundred products took {took} ms");
    assert!(Event::new()?.is_done()?, "waiting for an unrecorded event returns at once");
    // Only timing events measure times.
    let mut untimed = Event::new()?;
    untimed.record(&first)?;
    untimed.synchronize()?;
    assert!(untimed.elapsed_since(&start).is_err());
    Ok(())
}

fn entered_stream_is_current() -> Result<()> {
    let usual = Stream::current(0)?;
    assert!(usual.raw().is_null(), "the default stream");
    let side = Stream::new(0, Priority::Normal)?;
    assert!(!side.raw().is_null() && side.device() == 0);
    {
        let _entered = side.set_current()?;
        assert_eq!(Stream::current(0)?, side);
        let elsewhere = std::thread::spawn(|| Stream::current(0)).join().expect("a thread");
        assert_eq!(elsewhere?, usual, "each thread has its own");
        {
            let inner = Stream::new(0, Priority::High)?;
            let _entered = inner.set_current()?;
            assert_eq!(Stream::current(0)?, inner);
        }
        assert_eq!(Stream::current(0)?, side);
    }
    assert_eq!(Stream::current(0)?, usual);
    cuda::set_device(0)?;
    assert_eq!(cuda::current_device()?, 0);
    assert!(cuda::set_device(99).is_err() && cuda::current_device()? == 0);
    let error = Stream::new(99, Priority::Normal).expect_err("no such device");
    assert!(error.message.contains("device 99 is asked for"), "{error}");
    Ok(())
}

fn external_stream() -> Result<()> {
    let reference = Stream::new(0, Priority::Normal)?;
    // SAFETY: streams of libtorch live as long as the process.
    let stream = unsafe { Stream::from_external(reference.raw(), 0)? };
    assert_eq!(stream.raw(), reference.raw());
    let entered = stream.set_current()?;
    assert_eq!(Stream::current(0)?.raw(), reference.raw());
    let y = queue_work(64) + 1.0;
    reference.synchronize()?;
    drop(entered);
    assert!(all(&y, 2.0));
    Ok(())
}

fn recorded_memory() -> Result<()> {
    let side = Stream::new(0, Priority::Normal)?;
    let out = Tensor::zeros([4096, 512], GPU);
    for _ in 0..3 {
        let x = Tensor::full([4096, 512], 5.0, GPU);
        cuda::synchronize(0)?;
        let folder = x.data_ptr();
        let entered = side.set_current()?;
        out.shallow_clone().copy_(&(queue_work(512) * &x));
        cuda::record_stream(&x, &side)?;
        drop((entered, x));
        // Without the record, the next tensor of this size would take the memory while the side stream still reads it.
        let next = Tensor::full([4096, 512], -1.0, GPU);
        assert_ne!(next.data_ptr(), folder, "memory was reused while it is read");
        side.synchronize()?;
        assert!(all(&out, 5.0));
    }
    let cpu = Tensor::zeros([4], (Kind::Float, Device::Cpu));
    assert!(cuda::record_stream(&cpu, &side).is_err(), "no stream reads it");
    Ok(())
}

/// A few operations that allocate intermediate tensors.
fn body(x: &Tensor, w: &Tensor) -> Tensor {
    x.matmul(w).tanh().layer_norm([64], None::<Tensor>, None::<Tensor>, 1e-6, false).matmul(&w.tr())
}

fn graph() -> Result<()> {
    let draw = |seed: f64, n: i64| (Tensor::arange(n * 64, GPU) * 0.37 + seed).sin().view([n, 64]);
    let x = draw(1.0, 32);
    let w = draw(2.0, 64);
    let stream = Stream::new(0, Priority::Normal)?;
    for _ in 0..3 {
        let _entered = stream.set_current()?;
        drop(body(&x, &w));
    }
    let pool = GraphPool::new()?;
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
    // The random number generator advances from replay to replay.
    let (noise, r) = Graph::capture(&stream, GraphPool::new()?, || Ok(Tensor::rand([64], GPU)))?;
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
    bridge::set_grad(&w, &sums)?;
    let x = Tensor::ones([8, 64], GPU);
    let step = || -> Result<Tensor> {
        let y = apply_function(
            &[&x, &w],
            |x| Ok(ForwardOutput { outputs: vec![x[0].matmul(&x[1])], saved: vec![x[0].shallow_clone()] }),
            |saved, g, _| Ok(vec![None, Some(saved[0].tr().matmul(&g[0]))]),
        )?;
        let loss = y[0].square().mean(Kind::Float);
        loss.f_backward()?;
        Ok(loss.detach())
    };
    let stream = Stream::new(0, Priority::Normal)?;
    for _ in 0..3 {
        let _entered = stream.set_current()?;
        drop(step()?);
    }
    let (graph, loss) = Graph::capture(&stream, GraphPool::new()?, step)?;
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

fn failed_capture() -> Result<()> {
    let x = Tensor::ones([64, 64], GPU);
    let stream = Stream::new(0, Priority::Normal)?;
    let _ = x.matmul(&x);
    let output = Graph::capture(&stream, GraphPool::new()?, || -> Result<Tensor> {
        let _ = &x * 2.0;
        Err(Error::failed("the body's own"))
    });
    assert_eq!(output.err().expect("an error").message, "the body's own");
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        Graph::capture(&stream, GraphPool::new().expect("a pool"), || -> Result<Tensor> { panic!("in a body") })
    }));
    assert!(panicked.is_err());
    let (graph, y) = Graph::capture(&stream, GraphPool::new()?, || Ok(&x * 3.0))?;
    graph.replay()?;
    assert!(all(&y, 3.0));
    assert!(all(&x.matmul(&x), 64.0), "eager execution still works");
    Ok(())
}

fn memory() -> Result<()> {
    let device = cuda::device_properties(0)?;
    println!("{device:?}");
    assert!(device.name.contains("NVIDIA") && device.compute_capability >= (7, 0), "{device:?}");
    assert!(device.multiprocessors > 0 && device.total_memory > 1 << 30, "{device:?}");
    assert!(cuda::device_properties(99).is_err());
    let before = cuda::memory_stats(0)?;
    let x = Tensor::zeros([32 << 20], GPU);
    let with = cuda::memory_stats(0)?;
    assert_eq!(with.allocated - before.allocated, 128 << 20);
    assert!(with.reserved >= with.allocated && with.peak_allocated >= with.allocated);
    drop(x);
    let after = cuda::memory_stats(0)?;
    assert_eq!(after.allocated, before.allocated);
    assert!(after.peak_allocated >= with.allocated && after.reserved == with.reserved, "cached for the next request");
    cuda::reset_peak_memory_stats(0)?;
    cuda::empty_cache()?;
    let cleared = cuda::memory_stats(0)?;
    assert_eq!(cleared.peak_allocated, cleared.allocated);
    assert!(cleared.reserved < with.reserved, "returned to the device");
    cuda::synchronize(0)
}
