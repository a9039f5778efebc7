//! Gradients are reduced while backward goes on: by the order of events, and by the time that it hides.

use crate::step::{BATCH, BUCKET, Counted, LR, SOON, input, share, stepper, tiny};
use crate::support::Outcome;
use occlude::device::solo::{Solo, threads};
use occlude::device::world::Delayed;
use occlude::device::{Channel, Reduce, World};
use occlude::fault::{Code, Result};
use occlude::method::{Batch, mae};
use occlude::op::shuffle::Origin;
use occlude::optim::bucket::Event;
use occlude::run::step::Stepper;
use serde_json::json;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tch::{Device, Kind, Tensor};

crate::trials![buckets_start_in_order_and_before_backward_has_ended, seven_tenths_of_a_slow_network_are_hidden,];

fn buckets_start_in_order_and_before_backward_has_ended() -> Outcome {
    threads(2, |world| {
        let mut stepper = stepper(tiny(), world.clone(), Kind::Float, BUCKET);
        let count = stepper.bucket_count();
        assert!(count >= 4, "{count} buckets");
        stepper.step(&share(0, BATCH, world.as_ref(), 2), LR, |_, _| Ok(())).expect("a step");
        let events = stepper.buckets.events();
        let starts: Vec<usize> = (0..events.len()).filter(|&at| matches!(events[at], Event::Start(_))).collect();
        let order: Vec<Event> = starts.iter().map(|&at| events[at]).collect();
        assert_eq!(order, (0..count).map(Event::Start).collect::<Vec<_>>(), "in one order, once each");
        let tensors = stepper.flat.specs.len();
        let micro = share(0, BATCH, world.as_ref(), 2).len();
        assert!(micro > 1 && starts[0] >= (micro - 1) * tensors, "nothing is reduced while gradients still add up");
        let last = events.iter().rposition(|event| matches!(event, Event::Gradient(_))).expect("a gradient");
        assert!(starts[0] < last, "the first bucket waits for the end of backward");
        // All but what the last few tensors hold back are on their way when the last gradient comes.
        let early = starts.iter().filter(|&&at| at < last).count();
        assert!(early + 1 >= count, "{early} of {count} buckets started during backward");
        assert_eq!(events.iter().filter(|event| matches!(event, Event::Gradient(_))).count(), micro * tensors);
    });
    Ok(())
}

/// The gradients travel over one world, everything else over another.
struct Split {
    gradients: Arc<dyn World>,
    rest: Arc<dyn World>,
}

impl World for Split {
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
    fn channel(&self, name: &str) -> Result<Box<dyn Channel>> {
        if name == "gradients" { self.gradients.channel(name) } else { self.rest.channel(name) }
    }
    fn abort(&self, code: Code) -> ! {
        self.rest.abort(code)
    }
}

/// Eight encoder blocks of one size and a small decoder.
fn eight() -> mae::Mae {
    let config = json!({
        "encoder": {"width": 128, "depth": 8, "heads": 4}, "decoder": {"width": 16, "depth": 1, "heads": 2},
        "mask": {"ratio": 0.25},
    });
    mae::Mae::new(&serde_json::from_value(config).expect("numbers"), &input()).expect("a method")
}

/// A little more than a block, in bytes: seven buckets, and the last is no small rest.
const BLOCK: usize = 800_000;
const DELAY: Duration = Duration::from_millis(50);
/// What a step takes alone. Two thirds of it are backward, more than all delays together; two ranks only take longer.
const STEP_S: f64 = 0.6;

fn noise(rows: i64) -> Batch {
    let origins: Vec<Origin> = (0..rows as u64).map(|id| Origin { id, epoch: 0, repeat: 0 }).collect();
    let pixels = Tensor::arange(rows * 256, (Kind::Int64, Device::Cpu)).remainder(253).to_kind(Kind::Uint8);
    Batch::new(pixels.view([rows, 1, 1, 16, 16]), &origins, 5)
}

fn timed(stepper: &mut Stepper, rows: i64) -> f64 {
    let began = Instant::now();
    stepper.step(&[noise(rows)], 1e-6, |_, _| Ok(())).expect("a step");
    began.elapsed().as_secs_f64()
}

/// Rows for a step of about `STEP_S` on this machine.
fn calibrated() -> i64 {
    let mut alone = stepper(eight(), Arc::new(Solo::new(Device::Cpu)), Kind::Float, BLOCK);
    timed(&mut alone, 32);
    let each = timed(&mut alone, 32).min(timed(&mut alone, 32)) / 32.0;
    ((STEP_S / each) as i64).clamp(8, 4096)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Only the last bucket, which completes as backward ends, has to be waited for: one of seven. A busy machine blurs the
/// times of single steps, so up to eight times as many pairs are taken as a quiet one needs.
fn seven_tenths_of_a_slow_network_are_hidden() -> Outcome {
    let rows = calibrated();
    let shares = threads(2, |world| {
        let slow = Arc::new(Delayed::new(world.clone(), DELAY));
        let slow = Arc::new(Split { gradients: slow, rest: world.clone() });
        let mut plain = stepper(eight(), world.clone(), Kind::Float, BLOCK);
        let mut delayed = stepper(eight(), slow, Kind::Float, BLOCK);
        let mut meeting = world.channel("meeting").expect("a channel");
        let count = plain.bucket_count();
        assert!((4..=12).contains(&count), "{count} buckets");
        let injected = DELAY.as_secs_f64() * count as f64;
        // Seconds of the slower rank, the same number on both.
        let mut together = |stepper: &mut Stepper| {
            meeting.barrier().done(SOON).expect("a barrier");
            let slower = meeting.all_reduce(&Tensor::from_slice(&[timed(stepper, rows)]), Reduce::Max);
            slower.wait(SOON).expect("a maximum").double_value(&[0])
        };
        together(&mut plain);
        together(&mut delayed);
        let (mut added, mut shares) = (Vec::new(), Vec::new());
        while shares.len() < 8 && shares.last().is_none_or(|&share| share < 0.7) {
            for pair in 0..5 {
                // In turns, so that a drift of the machine favours neither.
                let before = (pair % 2 == 0).then(|| together(&mut plain));
                let slow = together(&mut delayed);
                added.push(slow - before.unwrap_or_else(|| together(&mut plain)));
            }
            shares.push(1.0 - median(added.clone()) / injected);
        }
        shares
    });
    let share = shares[0].last().copied().unwrap_or_default();
    assert!(share >= 0.7, "of the delay, {:.0} % is hidden; after 5, 10, .. pairs: {:.2?}", 100.0 * share, shares[0]);
    Ok(())
}
