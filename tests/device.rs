//! Ranks that talk: one suite for every world, on inputs whose sums are exact, and the same bits from threads and MPI.
//! What concerns a whole process runs in copies of this binary, started under mpirun with OCCLUDE_CASE set.

use crate::support::{Outcome, root};
use libtest_mimic::Failed;
use occlude::device::pulse::{Trouble, Watch};
use occlude::device::solo::{Solo, threads};
use occlude::device::world::Delayed;
use occlude::device::{Channel, Limits, Phase, Reduce, World, agree};
use occlude::fault::Code;
use occlude::rng::{Draw, Purpose};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tch::{Device, Kind, Tensor};

crate::trials![
    solo_conforms,
    threads_conform,
    two_ranks_over_mpi_conform,
    three_ranks_over_mpi_conform,
    a_panic_frees_the_other_threads,
    delayed_reductions_overlap_with_the_caller,
    the_watch_tells_frozen_from_slow,
];

/// Long enough for a busy machine; nothing here takes it when all is well.
const SOON: Duration = Duration::from_secs(30);

/// The process-wide cases. Returns the exit code.
pub fn case(name: &str) -> i32 {
    match name {
        "conformance" => {
            let world = occlude::device::join().expect("a launcher");
            conforms(world.as_ref());
            refuses(world.as_ref());
            speed(world.as_ref());
            let digest = digest(world.as_ref());
            if world.rank() == 0 {
                println!("digest {digest}");
            }
            world.leave(SOON).expect("every rank leaves");
            0
        }
        other => crate::launch::case(other),
    }
}

fn solo_conforms() -> Outcome {
    conforms(&Solo::new(Device::Cpu));
    Ok(())
}

fn threads_conform() -> Outcome {
    for size in 1..=4 {
        threads(size, |world| {
            conforms(world.as_ref());
            refuses(world.as_ref());
        });
    }
    Ok(())
}

fn two_ranks_over_mpi_conform() -> Outcome {
    over_mpi(2)
}

fn three_ranks_over_mpi_conform() -> Outcome {
    over_mpi(3)
}

/// The suite over MPI, whose random sums have the bits of those between threads.
fn over_mpi(size: usize) -> Outcome {
    let output = Command::new(root().join("launch/mpirun"))
        .args(["-n", &size.to_string()])
        .arg(std::env::current_exe()?)
        .envs([("OCCLUDE_CASE", "conformance"), ("OMP_NUM_THREADS", "1")])
        .output()?;
    let told = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        return Err(format!("{}\n{told}{}", output.status, String::from_utf8_lossy(&output.stderr)).into());
    }
    let expected = format!("digest {}", threads(size, |world| digest(world.as_ref()))[0]);
    if !told.lines().any(|line| line == expected) {
        return Err(Failed::from(format!("threads give {expected}, MPI says:\n{told}")));
    }
    Ok(())
}

/// The suite. Small whole numbers sum exactly in every kind.
fn conforms(world: &dyn World) {
    let mut channel = world.channel("conformance").expect("a channel");
    let size = world.size();
    assert!(world.rank() < size && world.local_rank() < world.local_size() && world.local_size() <= size);
    carries(channel.as_mut(), world, Device::Cpu);
    strided(channel.as_mut(), world);
    large(channel.as_mut(), world);
    rounds_once(channel.as_mut(), world);
    let mut max = Tensor::from_slice(&[if world.rank() == size - 1 { f32::NAN } else { 1.0 }, -1.0]);
    max = channel.all_reduce(&max, Reduce::Max).wait(SOON).expect("max");
    assert!(max.double_value(&[0]).is_nan() && max.double_value(&[1]) == -1.0, "a NaN was lost in a maximum");
    channel.barrier().done(SOON).expect("barrier");
    two_at_once(world);
    agree(world, &[("config", "a1".into()), ("build", "b7".into())]).expect("equal digests");
}

/// What every channel does with tensors on a device.
pub fn carries(channel: &mut dyn Channel, world: &dyn World, device: Device) {
    let size = world.size();
    for elements in [0, 1, size - 1, size, 7, 58, 59, 100_003] {
        for kind in [Kind::Float, Kind::Double, Kind::BFloat16, Kind::Int64] {
            reduces(channel, world, elements as i64, kind, device);
        }
        moves(channel, world, elements as i64, device);
    }
}

/// Rank r's i-th value: small, different on each rank.
fn values(rank: usize, elements: i64, kind: Kind) -> Tensor {
    ((Tensor::arange(elements, (Kind::Int64, Device::Cpu)) + 3 * rank as i64).remainder(11) - 5).to_kind(kind)
}

fn reduces(channel: &mut dyn Channel, world: &dyn World, elements: i64, kind: Kind, device: Device) {
    let (rank, size) = (world.rank(), world.size());
    let values = |rank, elements, kind| values(rank, elements, kind).to_device(device);
    let what = format!("{elements} of {kind:?}, rank {rank} of {size}");
    let all: Vec<Tensor> = (0..size).map(|r| values(r, elements, Kind::Int64)).collect();
    let all = Tensor::stack(&all, 0);
    let tensor = values(rank, elements, kind);
    let pending = channel.all_reduce(&tensor, Reduce::Sum);
    let result = pending.wait(SOON).expect(&what);
    let sum = all.sum_dim_intlist([0i64].as_slice(), false, Kind::Int64);
    assert!(tensor.to_kind(Kind::Int64).equal(&sum), "all_reduce (sum), {what}");
    assert_eq!(result.data_ptr(), tensor.data_ptr(), "all_reduce is not in place");
    let tensor = values(rank, elements, kind);
    channel.all_reduce(&tensor, Reduce::Max).done(SOON).expect(&what);
    assert!(tensor.to_kind(Kind::Int64).equal(&all.amax([0i64].as_slice(), false)), "all_reduce (max), {what}");
    let long = values(rank, elements * size as i64, kind).reshape([elements * size as i64, 1]);
    let part = channel.reduce_scatter(&long).wait(SOON).expect(&what);
    let sum: Tensor = (0..size).map(|r| values(r, elements * size as i64, Kind::Int64)).sum();
    let own = sum.narrow(0, elements * rank as i64, elements).reshape([elements, 1]);
    assert!(part.to_kind(Kind::Int64).equal(&own), "reduce_scatter, {what}");
}

fn moves(channel: &mut dyn Channel, world: &dyn World, elements: i64, device: Device) {
    let (rank, size) = (world.rank(), world.size());
    let values = |rank, elements, kind| values(rank, elements, kind).to_device(device);
    for kind in [Kind::Float, Kind::Double, Kind::BFloat16, Kind::Int64, Kind::Uint8] {
        let of = |rank: usize| (values(rank, elements, Kind::Int64) + 5).to_kind(kind);
        let all = channel.all_gather(&of(rank)).wait(SOON).expect("all_gather");
        let expected: Vec<Tensor> = (0..size).map(of).collect();
        assert!(all.equal(&Tensor::stack(&expected, 0)), "all_gather of {elements} {kind:?} on {size}");
        for root in 0..size {
            let tensor = of(rank);
            channel.broadcast(&tensor, root).done(SOON).expect("broadcast");
            assert!(tensor.equal(&of(root)), "broadcast of {elements} {kind:?} from {root} of {size}");
        }
    }
    let [first, second] = [Kind::Float, Kind::Int64].map(|kind| values(rank, elements, kind));
    channel.broadcast_all(&[&first, &second], size - 1).done(SOON).expect("broadcast_all");
    let [wanted, also] = [Kind::Float, Kind::Int64].map(|kind| values(size - 1, elements, kind));
    assert!(first.equal(&wanted) && second.equal(&also), "broadcast_all of {elements} on {size}");
}

/// A view that is not contiguous, and a leaf that wants a gradient, are reduced in place too.
fn strided(channel: &mut dyn Channel, world: &dyn World) {
    let base = values(world.rank(), 600, Kind::Float).reshape([20, 30]);
    let expected: Tensor = (0..world.size()).map(|r| values(r, 600, Kind::Float).reshape([20, 30])).sum();
    channel.all_reduce(&base.transpose(0, 1), Reduce::Sum).done(SOON).expect("a view");
    assert!(base.equal(&expected), "a transposed view was not reduced in place");
    let leaf = values(world.rank(), 600, Kind::Float).set_requires_grad(true);
    channel.all_reduce(&leaf, Reduce::Sum).done(SOON).expect("a leaf");
    assert!(leaf.detach().equal(&expected.reshape([-1])), "a leaf was not reduced in place");
}

/// More than one piece travels, and the last is not full.
fn large(channel: &mut dyn Channel, world: &dyn World) {
    let elements = 5_000_011;
    let tensor = values(world.rank(), elements, Kind::Float);
    let expected: Tensor = (0..world.size()).map(|r| values(r, elements, Kind::Float)).sum();
    channel.all_reduce(&tensor, Reduce::Sum).done(SOON).expect("a large sum");
    assert!(tensor.equal(&expected), "a large sum is wrong");
}

/// 256 + 1 + … is lost in bf16 unless it is summed in fp32.
fn rounds_once(channel: &mut dyn Channel, world: &dyn World) {
    let mine = if world.rank() == 0 { 256.0 } else { 1.0 };
    let tensor = Tensor::full([3], mine, (Kind::BFloat16, Device::Cpu));
    channel.all_reduce(&tensor, Reduce::Sum).done(SOON).expect("bf16");
    let exact = Tensor::from(256.0 + (world.size() - 1) as f64).to_kind(Kind::BFloat16);
    assert_eq!(tensor.double_value(&[1]), exact.double_value(&[]), "bf16 was rounded on the way");
}

/// Two threads, a channel each, in opposite rhythm.
fn two_at_once(world: &dyn World) {
    let mut one = world.channel("one").expect("a channel");
    let mut two = world.channel("two").expect("a channel");
    let rounds = |channel: &mut dyn Channel, elements: i64, slow: bool| {
        for round in 0..20i64 {
            if slow && round as usize % 5 == world.rank() {
                std::thread::sleep(Duration::from_millis(3));
            }
            let tensor = Tensor::full([elements], round, (Kind::Int64, Device::Cpu));
            channel.all_reduce(&tensor, Reduce::Sum).done(SOON).expect("a round");
            assert_eq!(tensor.int64_value(&[elements - 1]), round * world.size() as i64);
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(|| rounds(one.as_mut(), 5_000, true));
        scope.spawn(|| rounds(two.as_mut(), 3, false));
    });
}

/// What goes wrong is told, by its exit code, and never hangs.
fn refuses(world: &dyn World) {
    let wrong =
        world.channel("kinds").expect("a channel").all_reduce(&Tensor::from_slice(&[1u8]), Reduce::Sum).wait(SOON);
    assert!(wrong.expect_err("u8 was summed").message.contains("Uint8"));
    if world.size() == 1 {
        return;
    }
    // Another count, another order of reductions, another kind of collective: each on its own channel.
    for (name, call) in mismatches() {
        let mut channel = world.channel(name).expect("a channel");
        let fault = call(channel.as_mut(), world.rank()).wait(SOON).expect_err("a mismatch went through");
        assert_eq!(fault.code, Code::Disagree, "{fault}");
        assert!(fault.message.contains("rank 0 is at collective 1, ") && fault.message.contains(name), "{fault}");
    }
    let odd = [("config", format!("c{}", world.rank().min(1))), ("build", "b7".into())];
    let fault = agree(world, &odd).expect_err("different digests");
    assert!(fault.code == Code::Disagree && fault.message.contains("config: c0 on rank 0; c1 on rank"), "{fault}");
    assert!(!fault.message.contains("b7"), "what agrees is not told: {fault}");
    late(world);
}

type Mismatch = fn(&mut dyn Channel, usize) -> occlude::device::Pending;

fn mismatches() -> [(&'static str, Mismatch); 3] {
    [
        ("counts", |channel, rank| {
            channel.all_reduce(&Tensor::ones([5000 + rank as i64], (Kind::Float, Device::Cpu)), Reduce::Sum)
        }),
        ("order", |channel, rank| {
            let how = if rank == 0 { Reduce::Sum } else { Reduce::Max };
            channel.all_reduce(&Tensor::ones([5], (Kind::Float, Device::Cpu)), how)
        }),
        ("acts", |channel, rank| {
            if rank == 0 {
                return channel.barrier();
            }
            channel.broadcast(&Tensor::ones([5], (Kind::Float, Device::Cpu)), 0)
        }),
    ]
}

/// Rank 0 waits for ranks that do not come: first with a deadline, then it gives up.
fn late(world: &dyn World) {
    let mut meeting = world.channel("meeting").expect("a channel");
    let mut channel = world.channel("late").expect("a channel");
    if world.rank() == 0 {
        let tensor = Tensor::ones([2000], (Kind::Float, Device::Cpu));
        let start = Instant::now();
        let first = channel.all_reduce(&tensor, Reduce::Sum);
        let second = channel.barrier();
        let fault = first.wait(Duration::from_millis(300)).expect_err("nobody came");
        assert!(start.elapsed() < Duration::from_secs(5), "the deadline was overrun");
        assert_eq!(fault.code, Code::Failed);
        for word in ["channel late", "collective 1", "all_reduce (sum)", "2000 f32", "0.3 s"] {
            assert!(fault.message.contains(word), "no `{word}` in: {fault}");
        }
        channel.abort();
        let fault = second.wait(Duration::from_secs(10)).expect_err("after abort");
        assert!(fault.message.contains("given up"), "{fault}");
        assert!(channel.barrier().wait(SOON).is_err(), "a channel that was given up still works");
    }
    meeting.barrier().done(SOON).expect("the other channel is whole");
}

/// 64 MB between the ranks, told for the notes.
fn speed(world: &dyn World) {
    let mut channel = world.channel("speed").expect("a channel");
    let tensor = Tensor::ones([16 << 20], (Kind::Float, Device::Cpu));
    let mut best = Duration::MAX;
    for _ in 0..5 {
        channel.barrier().done(SOON).expect("barrier");
        let start = Instant::now();
        channel.all_reduce(&tensor, Reduce::Max).done(SOON).expect("64 MB");
        best = best.min(start.elapsed());
    }
    let small = Tensor::ones([4], (Kind::Float, Device::Cpu));
    let start = Instant::now();
    (0..100).for_each(|_| channel.all_reduce(&small, Reduce::Max).done(SOON).expect("16 bytes"));
    if world.rank() == 0 {
        println!("64 MB: {best:.1?}; 16 bytes: {:.1?}", start.elapsed() / 100);
    }
}

/// A digest of random sums in every kind that rounds.
fn digest(world: &dyn World) -> String {
    let mut channel = world.channel("digest").expect("a channel");
    let mut hash = blake3::Hasher::new();
    for (kind, elements) in [(Kind::Float, 50), (Kind::Float, 3_000_001), (Kind::BFloat16, 70_001), (Kind::Double, 997)]
    {
        let noise = Draw::new(5, world.rank() as u64, 0, Purpose::Mask, 0).order(elements);
        let noise: Vec<f64> = noise.iter().map(|&n| (f64::from(n) * 0.37 + 1.0).ln() - 5.0).collect();
        let tensor = Tensor::from_slice(&noise).to_kind(kind);
        channel.all_reduce(&tensor, Reduce::Sum).done(SOON).expect("a sum");
        hash.update(occlude::bridge::bytes(&tensor));
    }
    hash.finalize().to_hex().to_string()
}

fn a_panic_frees_the_other_threads() -> Outcome {
    let start = Instant::now();
    let panic = std::panic::catch_unwind(|| {
        threads(3, |world| {
            let mut channel = world.channel("panic").expect("a channel");
            if world.rank() == 1 {
                std::panic::panic_any("the cause");
            }
            assert!(channel.barrier().wait(SOON).is_err(), "a barrier without rank 1");
        })
    });
    assert_eq!(panic.expect_err("no panic").downcast_ref(), Some(&"the cause"));
    assert!(start.elapsed() < Duration::from_secs(10), "the others hung");
    Ok(())
}

fn delayed_reductions_overlap_with_the_caller() -> Outcome {
    let delay = Duration::from_millis(120);
    threads(2, |world| {
        let world = Arc::new(Delayed::new(world, delay));
        let mut channel = world.channel("grads").expect("a channel");
        let tensors = [(); 2].map(|()| Tensor::ones([8], (Kind::Float, Device::Cpu)));
        let start = Instant::now();
        let pending: Vec<_> = tensors.iter().map(|tensor| channel.all_reduce(tensor, Reduce::Sum)).collect();
        assert!(start.elapsed() < delay, "starting waits");
        pending.into_iter().for_each(|pending| pending.done(SOON).expect("a sum"));
        assert!(start.elapsed() >= 2 * delay, "the delays were not taken one after the other");
        let events = world.events();
        assert_eq!(events.iter().map(|event| event.number).collect::<Vec<_>>(), [0, 1]);
        assert!(events[1].started < events[0].finished && events[1].finished - events[0].finished >= delay);
    });
    Ok(())
}

fn the_watch_tells_frozen_from_slow() -> Outcome {
    let seconds = Duration::from_secs;
    let limits = || Limits { silence: seconds(3), ..Limits::default() }.with(Phase::Compute, seconds(5));
    let half = Duration::from_millis(500);
    let compute = Phase::Compute as u64;
    // Half of the time asleep, as under SIGSTOP and SIGCONT in turn: no alarm.
    let mut watch = Watch::new(limits());
    for step in 0..100 {
        assert_eq!(watch.tick(half), None);
        assert_eq!(watch.tick(seconds(2)), None, "the listener's own sleep was held against the other rank");
        watch.hear([step, compute, 0]);
    }
    // Silence.
    let alarm = (0..20).find(|_| watch.tick(half).is_some());
    assert_eq!(alarm, Some(6), "3 s of silence are 6 ticks of half a second; the next one tells");
    // Pulses without progress, then progress.
    let mut watch = Watch::new(limits());
    let mut stuck = None;
    for tick in 0..20 {
        watch.hear([7, compute, 0]);
        stuck = stuck.or(watch.tick(half).map(|trouble| (tick, trouble)));
    }
    assert!(matches!(stuck, Some((10, Trouble::Stuck(_)))), "{stuck:?}");
    watch.hear([8, compute, 0]);
    assert_eq!(watch.tick(half), None, "a new step is progress");
    // Who has left is not missed.
    watch.hear([9, compute, 1]);
    assert!((0..20).all(|_| watch.tick(seconds(1)).is_none()), "a rank that has left was missed");
    Ok(())
}
