//! Tests of the process groups: one suite for every world, on inputs whose sums are exact, with the same bits from
//! threads and MPI. Process-wide cases run in copies of this binary, started under mpirun with OCCLUDE_CASE set.

use crate::support::{Outcome, root};
use libtest_mimic::Failed;
use occlude::dist::DelayedWorld;
use occlude::dist::heartbeat::{PeerFailure, PeerMonitor};
use occlude::dist::solo::{SoloWorld, run_on_threads};
use occlude::dist::{Channel, HeartbeatTimeouts, Phase, ReduceOp, World, check_agreement};
use occlude::error::ExitCode;
use occlude::rng::{Philox, Purpose};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tch::{Device, Kind, Tensor};

crate::trials![
    the_solo_world_passes_the_suite,
    thread_worlds_pass_the_suite,
    two_mpi_ranks_pass_the_suite,
    three_mpi_ranks_pass_the_suite,
    a_panic_unblocks_the_other_ranks,
    delayed_reductions_overlap_with_the_caller,
    the_heartbeat_monitor_distinguishes_frozen_from_slow,
];

/// Long enough for a busy machine; never reached when all is well.
const SOON: Duration = Duration::from_secs(30);

/// Runs the suite in one rank of a world of processes. Returns the exit code.
pub fn case() -> i32 {
    let world = occlude::dist::init_world().expect("a launcher");
    run_suite(world.as_ref());
    check_errors(world.as_ref());
    time_all_reduce(world.as_ref());
    let digest = digest(world.as_ref());
    if world.rank() == 0 {
        println!("digest {digest}");
    }
    world.leave(SOON).expect("every rank leaves");
    0
}

fn the_solo_world_passes_the_suite() -> Outcome {
    run_suite(&SoloWorld::new(Device::Cpu));
    Ok(())
}

fn thread_worlds_pass_the_suite() -> Outcome {
    for size in 1..=4 {
        run_on_threads(size, |world| {
            run_suite(world.as_ref());
            check_errors(world.as_ref());
        });
    }
    Ok(())
}

fn two_mpi_ranks_pass_the_suite() -> Outcome {
    run_suite_over_mpi(2)
}

fn three_mpi_ranks_pass_the_suite() -> Outcome {
    run_suite_over_mpi(3)
}

/// Runs the suite over MPI; its random sums have the same bits as those between threads.
fn run_suite_over_mpi(size: usize) -> Outcome {
    let output = Command::new(root().join("launch/mpirun"))
        .args(["-n", &size.to_string()])
        .arg(std::env::current_exe()?)
        .envs([("OCCLUDE_CASE", "conformance"), ("OMP_NUM_THREADS", "1")])
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        return Err(format!("{}\n{text}{}", output.status, String::from_utf8_lossy(&output.stderr)).into());
    }
    let expected = format!("digest {}", run_on_threads(size, |world| digest(world.as_ref()))[0]);
    if !text.lines().any(|line| line == expected) {
        return Err(Failed::from(format!("threads give {expected}, MPI says:\n{text}")));
    }
    Ok(())
}

/// The suite. Sums of small integers are exact in every dtype.
fn run_suite(world: &dyn World) {
    let mut channel = world.open_channel("conformance").expect("a channel");
    let size = world.size();
    assert!(world.rank() < size && world.local_rank() < world.local_size() && world.local_size() <= size);
    check_collectives(channel.as_mut(), world, Device::Cpu);
    check_strided(channel.as_mut(), world);
    check_large(channel.as_mut(), world);
    check_bf16_sum(channel.as_mut(), world);
    let mut max = Tensor::from_slice(&[if world.rank() == size - 1 { f32::NAN } else { 1.0 }, -1.0]);
    max = channel.all_reduce(&max, ReduceOp::Max).wait(SOON).expect("max");
    assert!(max.double_value(&[0]).is_nan() && max.double_value(&[1]) == -1.0, "a NaN was lost in a maximum");
    channel.barrier().wait_done(SOON).expect("barrier");
    check_concurrent_channels(world);
    check_agreement(world, &[("config", "a1".into()), ("build", "b7".into())]).expect("equal digests");
}

/// Checks every collective of a channel with tensors on a device.
pub fn check_collectives(channel: &mut dyn Channel, world: &dyn World, device: Device) {
    let size = world.size();
    for elements in [0, 1, size - 1, size, 7, 58, 59, 100_003] {
        for kind in [Kind::Float, Kind::Double, Kind::BFloat16, Kind::Int64] {
            check_reductions(channel, world, elements as i64, kind, device);
        }
        check_copies(channel, world, elements as i64, device);
    }
}

/// Returns the values of a rank: small integers, different on each rank.
fn values(rank: usize, elements: i64, kind: Kind) -> Tensor {
    ((Tensor::arange(elements, (Kind::Int64, Device::Cpu)) + 3 * rank as i64).remainder(11) - 5).to_kind(kind)
}

fn check_reductions(channel: &mut dyn Channel, world: &dyn World, elements: i64, kind: Kind, device: Device) {
    let rank = world.rank();
    let size = world.size();
    let values = |rank, elements, kind| values(rank, elements, kind).to_device(device);
    let label = format!("{elements} of {kind:?}, rank {rank} of {size}");
    let all: Vec<Tensor> = (0..size).map(|r| values(r, elements, Kind::Int64)).collect();
    let all = Tensor::stack(&all, 0);
    let tensor = values(rank, elements, kind);
    let pending = channel.all_reduce(&tensor, ReduceOp::Sum);
    let result = pending.wait(SOON).expect(&label);
    let sum = all.sum_dim_intlist([0i64].as_slice(), false, Kind::Int64);
    assert!(tensor.to_kind(Kind::Int64).equal(&sum), "all_reduce (sum), {label}");
    assert_eq!(result.data_ptr(), tensor.data_ptr(), "all_reduce is not in place");
    let tensor = values(rank, elements, kind);
    channel.all_reduce(&tensor, ReduceOp::Max).wait_done(SOON).expect(&label);
    assert!(tensor.to_kind(Kind::Int64).equal(&all.amax([0i64].as_slice(), false)), "all_reduce (max), {label}");
    let long = values(rank, elements * size as i64, kind).reshape([elements * size as i64, 1]);
    let part = channel.reduce_scatter(&long).wait(SOON).expect(&label);
    let sum: Tensor = (0..size).map(|r| values(r, elements * size as i64, Kind::Int64)).sum();
    let local = sum.narrow(0, elements * rank as i64, elements).reshape([elements, 1]);
    assert!(part.to_kind(Kind::Int64).equal(&local), "reduce_scatter, {label}");
}

fn check_copies(channel: &mut dyn Channel, world: &dyn World, elements: i64, device: Device) {
    let rank = world.rank();
    let size = world.size();
    let values = |rank, elements, kind| values(rank, elements, kind).to_device(device);
    for kind in [Kind::Float, Kind::Double, Kind::BFloat16, Kind::Int64, Kind::Uint8] {
        let rank_values = |rank: usize| (values(rank, elements, Kind::Int64) + 5).to_kind(kind);
        let all = channel.all_gather(&rank_values(rank)).wait(SOON).expect("all_gather");
        let expected: Vec<Tensor> = (0..size).map(rank_values).collect();
        assert!(all.equal(&Tensor::stack(&expected, 0)), "all_gather of {elements} {kind:?} on {size}");
        for root in 0..size {
            let tensor = rank_values(rank);
            channel.broadcast(&tensor, root).wait_done(SOON).expect("broadcast");
            assert!(tensor.equal(&rank_values(root)), "broadcast of {elements} {kind:?} from {root} of {size}");
        }
    }
    let [first, second] = [Kind::Float, Kind::Int64].map(|kind| values(rank, elements, kind));
    channel.broadcast_all(&[&first, &second], size - 1).wait_done(SOON).expect("broadcast_all");
    let [floats, integers] = [Kind::Float, Kind::Int64].map(|kind| values(size - 1, elements, kind));
    assert!(first.equal(&floats) && second.equal(&integers), "broadcast_all of {elements} on {size}");
}

/// A non-contiguous view and a leaf that requires a gradient are reduced in place as well.
fn check_strided(channel: &mut dyn Channel, world: &dyn World) {
    let base = values(world.rank(), 600, Kind::Float).reshape([20, 30]);
    let expected: Tensor = (0..world.size()).map(|r| values(r, 600, Kind::Float).reshape([20, 30])).sum();
    channel.all_reduce(&base.transpose(0, 1), ReduceOp::Sum).wait_done(SOON).expect("a view");
    assert!(base.equal(&expected), "a transposed view was not reduced in place");
    let leaf = values(world.rank(), 600, Kind::Float).set_requires_grad(true);
    channel.all_reduce(&leaf, ReduceOp::Sum).wait_done(SOON).expect("a leaf");
    assert!(leaf.detach().equal(&expected.reshape([-1])), "a leaf was not reduced in place");
}

/// More than one chunk is sent, and the last is not full.
fn check_large(channel: &mut dyn Channel, world: &dyn World) {
    let elements = 5_000_011;
    let tensor = values(world.rank(), elements, Kind::Float);
    let expected: Tensor = (0..world.size()).map(|r| values(r, elements, Kind::Float)).sum();
    channel.all_reduce(&tensor, ReduceOp::Sum).wait_done(SOON).expect("a large sum");
    assert!(tensor.equal(&expected), "a large sum is wrong");
    // Chunks of a world that is no power of two begin on whole elements too.
    let length = 5_000_011;
    let ones = Tensor::ones([world.size() as i64 * length], (Kind::Float, world.device()));
    let part = channel.reduce_scatter(&ones).wait(SOON).expect("a large reduce_scatter");
    let sum = part.to_kind(Kind::Double).sum(Kind::Double).double_value(&[]);
    assert_eq!(sum, (world.size() as i64 * length) as f64, "reduce_scatter of shards of {length} elements");
}

/// 256 + 1 + … is lost in bf16 unless it is summed in fp32.
fn check_bf16_sum(channel: &mut dyn Channel, world: &dyn World) {
    let mine = if world.rank() == 0 { 256.0 } else { 1.0 };
    let tensor = Tensor::full([3], mine, (Kind::BFloat16, Device::Cpu));
    channel.all_reduce(&tensor, ReduceOp::Sum).wait_done(SOON).expect("bf16");
    let exact = Tensor::from(256.0 + (world.size() - 1) as f64).to_kind(Kind::BFloat16);
    assert_eq!(tensor.double_value(&[1]), exact.double_value(&[]), "bf16 was rounded on the way");
}

/// Two threads with a channel each, at different speeds.
fn check_concurrent_channels(world: &dyn World) {
    let mut one = world.open_channel("one").expect("a channel");
    let mut two = world.open_channel("two").expect("a channel");
    let rounds = |channel: &mut dyn Channel, elements: i64, slow: bool| {
        for round in 0..20i64 {
            if slow && round as usize % 5 == world.rank() {
                std::thread::sleep(Duration::from_millis(3));
            }
            let tensor = Tensor::full([elements], round, (Kind::Int64, Device::Cpu));
            channel.all_reduce(&tensor, ReduceOp::Sum).wait_done(SOON).expect("a round");
            assert_eq!(tensor.int64_value(&[elements - 1]), round * world.size() as i64);
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(|| rounds(one.as_mut(), 5_000, true));
        scope.spawn(|| rounds(two.as_mut(), 3, false));
    });
}

/// Errors have the right exit code and never hang.
fn check_errors(world: &dyn World) {
    let wrong = world
        .open_channel("kinds")
        .expect("a channel")
        .all_reduce(&Tensor::from_slice(&[1u8]), ReduceOp::Sum)
        .wait(SOON);
    assert!(wrong.expect_err("u8 was summed").message.contains("Uint8"));
    if world.size() == 1 {
        return;
    }
    // Another count, another order of reductions, another kind of collective: each on its own channel.
    for (name, call) in mismatches() {
        let mut channel = world.open_channel(name).expect("a channel");
        let error = call(channel.as_mut(), world.rank()).wait(SOON).expect_err("a mismatch was not detected");
        assert_eq!(error.code, ExitCode::RankMismatch, "{error}");
        assert!(error.message.contains("rank 0 is at collective 1, ") && error.message.contains(name), "{error}");
    }
    let odd = [("config", format!("c{}", world.rank().min(1))), ("build", "b7".into())];
    let error = check_agreement(world, &odd).expect_err("different digests");
    assert!(
        error.code == ExitCode::RankMismatch && error.message.contains("config: c0 on rank 0; c1 on rank"),
        "{error}"
    );
    assert!(!error.message.contains("b7"), "matching values are not reported: {error}");
    check_deadline(world);
}

type Mismatch = fn(&mut dyn Channel, usize) -> occlude::dist::Pending;

fn mismatches() -> [(&'static str, Mismatch); 3] {
    [
        ("counts", |channel, rank| {
            channel.all_reduce(&Tensor::ones([5000 + rank as i64], (Kind::Float, Device::Cpu)), ReduceOp::Sum)
        }),
        ("order", |channel, rank| {
            let op = if rank == 0 { ReduceOp::Sum } else { ReduceOp::Max };
            channel.all_reduce(&Tensor::ones([5], (Kind::Float, Device::Cpu)), op)
        }),
        ("acts", |channel, rank| {
            if rank == 0 {
                return channel.barrier();
            }
            channel.broadcast(&Tensor::ones([5], (Kind::Float, Device::Cpu)), 0)
        }),
    ]
}

/// Rank 0 waits for ranks that do not come, first until the deadline and then until it aborts the channel.
fn check_deadline(world: &dyn World) {
    let mut meeting = world.open_channel("meeting").expect("a channel");
    let mut channel = world.open_channel("late").expect("a channel");
    if world.rank() == 0 {
        let tensor = Tensor::ones([2000], (Kind::Float, Device::Cpu));
        let start = Instant::now();
        let first = channel.all_reduce(&tensor, ReduceOp::Sum);
        let second = channel.barrier();
        let error = first.wait(Duration::from_millis(300)).expect_err("nobody came");
        assert!(start.elapsed() < Duration::from_secs(5), "the deadline was overrun");
        assert_eq!(error.code, ExitCode::Failed);
        for word in ["channel late", "collective 1", "all_reduce (sum)", "2000 f32", "0.3 s"] {
            assert!(error.message.contains(word), "no `{word}` in: {error}");
        }
        channel.abort();
        let error = second.wait(Duration::from_secs(10)).expect_err("after abort");
        assert!(error.message.contains("aborted"), "{error}");
        assert!(channel.barrier().wait(SOON).is_err(), "an aborted channel still works");
    }
    meeting.barrier().wait_done(SOON).expect("the other channel still works");
}

/// Times an all-reduce of 64 MB, for the notes.
fn time_all_reduce(world: &dyn World) {
    let mut channel = world.open_channel("speed").expect("a channel");
    let tensor = Tensor::ones([16 << 20], (Kind::Float, Device::Cpu));
    let mut best = Duration::MAX;
    for _ in 0..5 {
        channel.barrier().wait_done(SOON).expect("barrier");
        let start = Instant::now();
        channel.all_reduce(&tensor, ReduceOp::Max).wait_done(SOON).expect("64 MB");
        best = best.min(start.elapsed());
    }
    let small = Tensor::ones([4], (Kind::Float, Device::Cpu));
    let start = Instant::now();
    (0..100).for_each(|_| channel.all_reduce(&small, ReduceOp::Max).wait_done(SOON).expect("16 bytes"));
    if world.rank() == 0 {
        println!("64 MB: {best:.1?}; 16 bytes: {:.1?}", start.elapsed() / 100);
    }
}

/// Returns a digest of random sums in every floating-point dtype.
fn digest(world: &dyn World) -> String {
    let mut channel = world.open_channel("digest").expect("a channel");
    let mut hash = blake3::Hasher::new();
    for (kind, elements) in [(Kind::Float, 50), (Kind::Float, 3_000_001), (Kind::BFloat16, 70_001), (Kind::Double, 997)]
    {
        let noise = Philox::new(5, world.rank() as u64, 0, Purpose::Mask, 0).permutation(elements);
        let noise: Vec<f64> = noise.iter().map(|&n| (f64::from(n) * 0.37 + 1.0).ln() - 5.0).collect();
        let tensor = Tensor::from_slice(&noise).to_kind(kind);
        channel.all_reduce(&tensor, ReduceOp::Sum).wait_done(SOON).expect("a sum");
        hash.update(occlude::bridge::bytes(&tensor));
    }
    hash.finalize().to_hex().to_string()
}

fn a_panic_unblocks_the_other_ranks() -> Outcome {
    let start = Instant::now();
    let panic = std::panic::catch_unwind(|| {
        run_on_threads(3, |world| {
            let mut channel = world.open_channel("panic").expect("a channel");
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
    run_on_threads(2, |world| {
        let world = Arc::new(DelayedWorld::new(world, delay));
        let mut channel = world.open_channel("grads").expect("a channel");
        let tensors = [(); 2].map(|()| Tensor::ones([8], (Kind::Float, Device::Cpu)));
        let start = Instant::now();
        let pending: Vec<_> = tensors.iter().map(|tensor| channel.all_reduce(tensor, ReduceOp::Sum)).collect();
        assert!(start.elapsed() < delay, "starting a reduction blocks");
        pending.into_iter().for_each(|pending| pending.wait_done(SOON).expect("a sum"));
        assert!(start.elapsed() >= 2 * delay, "the delays were not sequential");
        let events = world.events();
        assert_eq!(events.iter().map(|event| event.index).collect::<Vec<_>>(), [0, 1]);
        assert!(events[1].started < events[0].finished && events[1].finished - events[0].finished >= delay);
    });
    Ok(())
}

fn the_heartbeat_monitor_distinguishes_frozen_from_slow() -> Outcome {
    let seconds = Duration::from_secs;
    let limits = || {
        HeartbeatTimeouts { silence: seconds(3), ..HeartbeatTimeouts::default() }.with_phase(Phase::Compute, seconds(5))
    };
    let half = Duration::from_millis(500);
    let compute = Phase::Compute as u64;
    // This process sleeps half of the time, as under alternating SIGSTOP and SIGCONT: no alarm.
    let mut watch = PeerMonitor::new(limits());
    for step in 0..100 {
        assert_eq!(watch.tick(half), None);
        assert_eq!(watch.tick(seconds(2)), None, "the sleep of the monitor was counted as silence of its peer");
        watch.receive([step, compute, 0]);
    }
    // Silence of the peer.
    let alarm = (0..20).find(|_| watch.tick(half).is_some());
    assert_eq!(alarm, Some(6), "3 s of silence are 6 ticks of half a second; the next one alarms");
    // Heartbeats without progress, then progress.
    let mut watch = PeerMonitor::new(limits());
    let mut stuck = None;
    for tick in 0..20 {
        watch.receive([7, compute, 0]);
        stuck = stuck.or(watch.tick(half).map(|trouble| (tick, trouble)));
    }
    assert!(matches!(stuck, Some((10, PeerFailure::Stuck(_)))), "{stuck:?}");
    watch.receive([8, compute, 0]);
    assert_eq!(watch.tick(half), None, "a new step is progress");
    // A peer that has left is not missed.
    watch.receive([9, compute, 1]);
    assert!((0..20).all(|_| watch.tick(seconds(1)).is_none()), "a rank that has left raised an alarm");
    Ok(())
}
