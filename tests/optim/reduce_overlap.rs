//! Tests of gradient reduction during backward: by the order of events, and by the time that it hides.

use crate::optim::sharded_state::{PLAIN, StepperOptions, stepper};
use crate::support::Outcome;
use crate::support::method_ext::MethodExt;
use crate::train::step::{BATCH, BUCKET, CountBuckets, LR, SOON, input, micro_batches, tiny_mae};
use occlude::dist::solo::{SoloWorld, run_on_threads};
use occlude::dist::{Channel, ReduceOp, World};
use occlude::dist::{CollectiveEvent, DelayedWorld};
use occlude::error::{ExitCode, Result};
use occlude::method::{Batch, mae};
use occlude::op::shuffle::SampleKey;
use occlude::optim::bucket::BucketEvent;
use occlude::part::batch::Side;
use occlude::train::step::Stepper;
use occlude::train::step_mode::{LocalBatch, StepPipeline};
use serde_json::json;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tch::{Device, Kind, Tensor};

crate::trials![
    buckets_start_in_order_before_backward_ends,
    sharded_buckets_start_in_order_before_backward_ends,
    seventy_percent_of_slow_reductions_are_hidden,
    seventy_percent_of_slow_sharded_reductions_are_hidden,
    reductions_started_after_backward_are_not_hidden,
    seventy_percent_of_slow_gathers_are_hidden_by_the_next_forward,
    seventy_percent_of_slow_gathers_are_hidden_in_pipelined_steps,
    weights_wait_only_for_their_bucket,
    missing_weights_are_an_error,
];

const SHARDED: StepperOptions = StepperOptions { sharded: true, ..PLAIN };

fn buckets_start_in_order_before_backward_ends() -> Outcome {
    buckets_start_early(PLAIN)
}

fn sharded_buckets_start_in_order_before_backward_ends() -> Outcome {
    buckets_start_early(SHARDED)
}

fn buckets_start_early(options: StepperOptions) -> Outcome {
    run_on_threads(2, |world| {
        let mut stepper = stepper(tiny_mae(), &world, BUCKET, options);
        let count = stepper.bucket_count();
        assert!(count >= 4, "{count} buckets");
        stepper.step(&micro_batches(0, BATCH, world.as_ref(), 2), LR, |_, _| Ok(())).expect("a step");
        let events = stepper.buckets.events();
        let starts: Vec<usize> =
            (0..events.len()).filter(|&at| matches!(events[at], BucketEvent::ReduceStarted(_))).collect();
        let order: Vec<BucketEvent> = starts.iter().map(|&at| events[at]).collect();
        assert_eq!(order, (0..count).map(BucketEvent::ReduceStarted).collect::<Vec<_>>(), "in one order, once each");
        let tensors = stepper.flat.specs.len();
        let micro = micro_batches(0, BATCH, world.as_ref(), 2).len();
        assert!(micro > 1 && starts[0] >= (micro - 1) * tensors, "nothing is reduced while gradients accumulate");
        let last = events.iter().rposition(|event| matches!(event, BucketEvent::GradReady(_))).expect("a gradient");
        assert!(starts[0] < last, "the first bucket waits for the end of backward");
        // All buckets but those of the last few tensors are on their way when the last gradient is ready.
        let early = starts.iter().filter(|&&at| at < last).count();
        assert!(early + 1 >= count, "{early} of {count} buckets started during backward");
        assert_eq!(events.iter().filter(|event| matches!(event, BucketEvent::GradReady(_))).count(), micro * tensors);
    });
    Ok(())
}

/// Gradients use one world, everything else another.
struct SplitWorld {
    gradients: Arc<dyn World>,
    rest: Arc<dyn World>,
}

impl World for SplitWorld {
    fn rank(&self) -> usize {
        self.rest.rank()
    }
    fn size(&self) -> usize {
        self.rest.size()
    }
    fn local_rank(&self) -> usize {
        self.rest.local_rank()
    }
    fn local_size(&self) -> usize {
        self.rest.local_size()
    }
    fn device(&self) -> Device {
        self.rest.device()
    }
    fn open_channel(&self, name: &str) -> Result<Box<dyn Channel>> {
        if name == "gradients" { self.gradients.open_channel(name) } else { self.rest.open_channel(name) }
    }
    fn abort(&self, code: ExitCode) -> ! {
        self.rest.abort(code)
    }
}

/// Eight encoder blocks of one size and a small decoder.
fn eight_blocks() -> mae::Mae {
    let config = json!({
        "encoder": {"width": 128, "depth": 8, "heads": 4}, "decoder": {"width": 16, "depth": 1, "heads": 2},
        "mask": {"ratio": 0.25},
    });
    mae::Mae::new(&serde_json::from_value(config).expect("numbers"), &input()).expect("a method")
}

/// A little more than a block, in bytes: seven buckets, and the last is not a small remainder.
const BLOCK: usize = 800_000;
/// Approximate duration of a step alone.
const STEP_S: f64 = 0.3;

fn noise(rows: i64) -> Batch {
    let keys: Vec<SampleKey> = (0..rows as u64).map(|id| SampleKey { id, epoch: 0, repeat: 0 }).collect();
    let pixels = Tensor::arange(rows * 256, (Kind::Int64, Device::Cpu)).remainder(253).to_kind(Kind::Uint8);
    Batch::new(pixels.view([rows, 1, 1, 16, 16]), &keys, 5)
}

fn timed(stepper: &mut Stepper, rows: i64) -> f64 {
    let start = Instant::now();
    stepper.step(&[noise(rows)], 1e-6, |_, _| Ok(())).expect("a step");
    start.elapsed().as_secs_f64()
}

/// Returns the number of rows for a step of about `STEP_S` on this machine.
fn calibrate_rows() -> i64 {
    let alone: Arc<dyn World> = Arc::new(SoloWorld::new(Device::Cpu));
    let mut alone = stepper(eight_blocks(), &alone, BLOCK, PLAIN);
    timed(&mut alone, 32);
    let each = timed(&mut alone, 32).min(timed(&mut alone, 32)) / 32.0;
    ((STEP_S / each) as i64).clamp(8, 4096)
}

/// Returns a stepper whose buckets take `delay` longer, and the recorder of their events.
fn slowed_stepper(
    world: &Arc<dyn World>,
    delay: Duration,
    bytes: usize,
    options: StepperOptions,
) -> (Stepper, Arc<DelayedWorld>) {
    let recorded = Arc::new(DelayedWorld::new(world.clone(), delay));
    let split: Arc<dyn World> = Arc::new(SplitWorld { gradients: recorded.clone(), rest: world.clone() });
    (stepper(eight_blocks(), &split, bytes, options), recorded)
}

/// Returns the buckets of one step and the end of its backward pass.
fn step_buckets(stepper: &mut Stepper, recorded: &DelayedWorld, rows: i64) -> (Vec<CollectiveEvent>, Instant) {
    let before = recorded.events().len();
    let outcome = stepper.step(&[noise(rows)], 1e-6, |_, _| Ok(())).expect("a step");
    let mut buckets = recorded.events().split_off(before);
    // The norm of shards is reduced too.
    buckets.retain(|event| event.elements > 1 && !event.is_all_gather);
    let last = buckets.last().expect("a bucket").finished;
    (buckets, last - outcome.comm_wait)
}

/// Returns the share of the delays of one step that passed before the end of backward, on the slower of two ranks; the
/// rest makes the step longer. The delays together are as long as backward, during which the machine may be busy: each
/// takes half of the time between two buckets, so that a bucket never waits for the one before it.
fn hidden_fraction(world: &Arc<dyn World>, bytes: usize, options: StepperOptions, rows: i64, start: Instant) -> f64 {
    let mut meeting = world.open_channel("meeting").expect("a channel");
    let mut greatest = |number: f64| {
        let all = meeting.all_reduce(&Tensor::from_slice(&[number]), ReduceOp::Max).wait(SOON);
        all.expect("a maximum").double_value(&[0])
    };
    let (mut plain, recorded) = slowed_stepper(world, Duration::ZERO, BLOCK, options);
    step_buckets(&mut plain, &recorded, rows);
    let (all, _) = step_buckets(&mut plain, &recorded, rows);
    assert!((4..=12).contains(&all.len()), "{} buckets", all.len());
    let between = (all[all.len() - 1].started - all[0].started).as_secs_f64() / (all.len() - 1) as f64;
    let delay = -0.5 * greatest(-between);

    let (mut delayed, recorded) = slowed_stepper(world, Duration::from_secs_f64(delay), bytes, options);
    let (all, end) = step_buckets(&mut delayed, &recorded, rows);
    let since = |moment: Instant| (moment - start).as_secs_f64();
    let end = greatest(since(end));
    let late: f64 = all.iter().map(|bucket| (since(bucket.finished) - since(bucket.arrived).max(end)).max(0.0)).sum();
    let full: f64 = all.iter().map(|bucket| since(bucket.finished) - since(bucket.arrived)).sum();
    1.0 - greatest(late / full)
}

/// Returns the best of up to eight steps, per bucket size: another process may take the processor away in the middle of
/// backward, and nothing makes a delay that starts after backward look hidden.
fn best_hidden_fraction(bytes: usize, options: StepperOptions, enough: f64) -> Vec<f64> {
    let rows = calibrate_rows();
    let start = Instant::now();
    let all = run_on_threads(2, |world| {
        let mut shares = Vec::new();
        while shares.len() < 8 && shares.last().is_none_or(|&fraction| fraction < enough) {
            shares.push(hidden_fraction(&world, bytes, options, rows, start));
        }
        shares
    });
    all[0].clone()
}

/// Only the last of seven buckets, which is complete when backward ends, has to be waited for.
fn seventy_percent_of_slow_reductions_are_hidden() -> Outcome {
    let shares = best_hidden_fraction(BLOCK, PLAIN, 0.7);
    assert!(shares[shares.len() - 1] >= 0.7, "hidden, step by step: {shares:.2?}");
    Ok(())
}

fn seventy_percent_of_slow_sharded_reductions_are_hidden() -> Outcome {
    let shares = best_hidden_fraction(BLOCK, SHARDED, 0.7);
    assert!(shares[shares.len() - 1] >= 0.7, "hidden, step by step: {shares:.2?}");
    Ok(())
}

/// Checks the measure itself: a single bucket cannot start before backward has ended.
fn reductions_started_after_backward_are_not_hidden() -> Outcome {
    for options in [PLAIN, SHARDED] {
        let shares = best_hidden_fraction(1 << 40, options, -1.0);
        assert!(shares[0] < 0.1, "hidden: {shares:.2?}");
    }
    Ok(())
}

/// Gathers, one after the other, each for half of the time in which a forward passes a bucket: only the first, whose
/// weights are needed at once, has to be waited for.
fn seventy_percent_of_slow_gathers_are_hidden_by_the_next_forward() -> Outcome {
    assert_gathers_hidden(|stepper, rows, _| {
        // The weights of the step before are being gathered.
        stepper.buckets.begin_step();
        stepper.method.terms(&stepper.flat.leaves, &noise(rows)).expect("a loss");
    })
}

/// The step is as in a captured graph: it begins with the gathers and ends with none in flight.
fn seventy_percent_of_slow_gathers_are_hidden_in_pipelined_steps() -> Outcome {
    assert_gathers_hidden(|stepper, rows, world| {
        let mut pipeline = StepPipeline::new(rows as u64 * world.size() as u64, stepper, world).expect("a pipeline");
        let keys = (0..rows as u64).map(|id| SampleKey { id, epoch: 0, repeat: 0 }).collect();
        let views = noise(rows).views;
        let batch = LocalBatch { views, keys, side: Side::default(), seed: 5, micro_batch: rows as usize };
        pipeline.step(stepper, &batch, 1e-6).expect("a step");
    })
}

/// `step` waits for weights; the stepper measures the waiting time.
fn assert_gathers_hidden(step: fn(&mut Stepper, i64, &Arc<dyn World>)) -> Outcome {
    let rows = calibrate_rows();
    let all = run_on_threads(2, |world| {
        let mut shares = Vec::new();
        while shares.len() < 8 && shares.last().is_none_or(|&share| share < 0.7) {
            shares.push(hidden_gather_fraction(&world, rows, step));
        }
        shares
    });
    assert!(all[0].last().is_some_and(|&share| share >= 0.7), "hidden, step by step: {:.2?}", all[0]);
    Ok(())
}

fn hidden_gather_fraction(world: &Arc<dyn World>, rows: i64, step: fn(&mut Stepper, i64, &Arc<dyn World>)) -> f64 {
    let mut meeting = world.open_channel("meeting").expect("a channel");
    let mut greatest = |number: f64| {
        let all = meeting.all_reduce(&Tensor::from_slice(&[number]), ReduceOp::Max).wait(SOON);
        all.expect("a maximum").double_value(&[0])
    };
    let forward = |stepper: &Stepper| {
        let start = Instant::now();
        stepper.method.terms(&stepper.flat.leaves, &noise(rows)).expect("a loss");
        start.elapsed().as_secs_f64()
    };
    let (mut plain, _) = slowed_stepper(world, Duration::ZERO, BLOCK, SHARDED);
    timed(&mut plain, rows);
    let count = plain.bucket_count() as f64;
    let delay = -0.5 * greatest(-forward(&plain)) / count;
    let (mut delayed, _) = slowed_stepper(world, Duration::from_secs_f64(delay), BLOCK, SHARDED);
    timed(&mut delayed, rows);
    step(&mut delayed, rows, world);
    1.0 - greatest(delayed.buckets.gather_wait().as_secs_f64()) / (delay * count)
}

/// The first tensors of a model can be used while the last ones are still being gathered.
fn weights_wait_only_for_their_bucket() -> Outcome {
    run_on_threads(2, |world| {
        let (mut stepper, recorded) = slowed_stepper(&world, Duration::from_millis(150), BLOCK, SHARDED);
        stepper.step(&[noise(4)], 1e-6, |_, _| Ok(())).expect("a step");
        let gathers = || recorded.events().iter().filter(|event| event.is_all_gather).count();
        let arrive = stepper.buckets.wait_hook(SOON);
        arrive(0);
        assert_eq!(gathers(), 1, "the first tensor waits for other buckets");
        arrive(stepper.flat.specs.len() - 1);
        assert_eq!(gathers(), stepper.bucket_count());
        arrive(0);
    });
    Ok(())
}

fn missing_weights_are_an_error() -> Outcome {
    run_on_threads(2, |world| {
        let (mut stepper, _) = slowed_stepper(&world, Duration::from_millis(400), BLOCK, SHARDED);
        stepper.step(&[noise(4)], 1e-6, |_, _| Ok(())).expect("a step");
        stepper.buckets.wait_hook(Duration::from_millis(1))(0);
        let error = stepper.step(&[noise(4)], 1e-6, |_, _| Ok(())).expect_err("weights have not arrived");
        assert_eq!(error.code, ExitCode::Failed, "{error}");
    });
    Ok(())
}
