//! Tests of gradient reduction during backward and of gathers under the next forward, by the order of events. What they
//! hide is a matter of time, and no test's.

use crate::optim::sharded_state::{PLAIN, StepperOptions, stepper};
use crate::support::Outcome;
use crate::support::method_ext::MethodExt;
use crate::train::step::{BATCH, BUCKET, CountBuckets, LR, SOON, input, micro_batches, tiny_mae};
use occlude::dist::DelayedWorld;
use occlude::dist::solo::{SoloWorld, run_on_threads};
use occlude::dist::{Channel, World};
use occlude::error::{ExitCode, Result};
use occlude::method::{Batch, mae};
use occlude::op::shuffle::SampleKey;
use occlude::optim::bucket::BucketEvent;
use occlude::part::batch::Side;
use occlude::train::step::Stepper;
use occlude::train::step_mode::{LocalBatch, StepPipeline};
use serde_json::json;
use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tch::{Device, Kind, Tensor};

crate::trials![
    buckets_start_in_order_before_backward_ends,
    sharded_buckets_start_in_order_before_backward_ends,
    a_forward_pass_uses_weights_in_the_order_of_their_gathers,
    a_pipelined_step_begins_with_its_gathers_and_finishes_them,
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

fn noise(rows: i64) -> Batch {
    let keys: Vec<SampleKey> = (0..rows as u64).map(|id| SampleKey { id, epoch: 0, repeat: 0 }).collect();
    let pixels = Tensor::arange(rows * 256, (Kind::Int64, Device::Cpu)).remainder(253).to_kind(Kind::Uint8);
    Batch::new(pixels.view([rows, 1, 1, 16, 16]), &keys, 5)
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

/// Gathers run in the order of the tensors, so that a forward pass in that order waits for the first bucket alone while
/// the others are on their way.
fn a_forward_pass_uses_weights_in_the_order_of_their_gathers() -> Outcome {
    let alone: Arc<dyn World> = Arc::new(SoloWorld::new(Device::Cpu));
    let mut stepper = stepper(eight_blocks(), &alone, BLOCK, PLAIN);
    let used = Arc::new(Mutex::new(Vec::new()));
    let record = used.clone();
    stepper.flat.leaves.on_use(move |index| record.lock().expect("indices").push(index));
    stepper.method.terms(&stepper.flat.leaves, &noise(4))?;
    let mut seen = HashSet::new();
    let first_uses: Vec<usize> =
        used.lock().expect("indices").iter().copied().filter(|&index| seen.insert(index)).collect();
    assert_eq!(first_uses.len(), stepper.flat.specs.len(), "every tensor is used");
    // A block's tensors are one after the other; the class token comes right after the embedding that stands before it.
    let late = first_uses.iter().enumerate().filter(|&(place, &index)| place.abs_diff(index) > 2).count();
    assert_eq!(late, 0, "{first_uses:?}");
    Ok(())
}

/// The step is as in a captured graph: it begins with the gathers and ends with none in flight.
fn a_pipelined_step_begins_with_its_gathers_and_finishes_them() -> Outcome {
    run_on_threads(2, |world| {
        let (mut stepper, recorded) = slowed_stepper(&world, Duration::ZERO, BLOCK, SHARDED);
        let mut pipeline = StepPipeline::new(8, &stepper, &world).expect("a pipeline");
        let batch = || {
            let keys = (0..4).map(|id| SampleKey { id, epoch: 0, repeat: 0 }).collect();
            LocalBatch { views: noise(4).views, keys, side: Side::default(), seed: 5, micro_batch: 4 }
        };
        pipeline.step(&mut stepper, &batch(), 1e-6).expect("a step");
        let before = recorded.events().len();
        pipeline.step(&mut stepper, &batch(), 1e-6).expect("a step");
        let events = recorded.events().split_off(before);
        let (gathers, reductions): (Vec<_>, Vec<_>) =
            events.into_iter().filter(|event| event.elements > 1).partition(|event| event.is_all_gather);
        assert_eq!(gathers.len(), stepper.bucket_count(), "all gathers of the step have finished");
        let first = reductions.iter().map(|event| event.started).min().expect("reductions");
        assert!(gathers.iter().all(|gather| gather.started < first), "gathers start before the first reduction");
    });
    Ok(())
}

/// The first tensors of a model can be used while the last ones are still being gathered.
fn weights_wait_only_for_their_bucket() -> Outcome {
    run_on_threads(2, |world| {
        let (mut stepper, recorded) = slowed_stepper(&world, Duration::from_millis(400), BLOCK, SHARDED);
        stepper.step(&[noise(4)], 1e-6, |_, _| Ok(())).expect("a step");
        let gathers = || recorded.events().iter().filter(|event| event.is_all_gather).count();
        let arrive = stepper.buckets.wait_hook(SOON);
        arrive(0);
        assert!(gathers() < stepper.bucket_count(), "the first tensor waits for other buckets");
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
