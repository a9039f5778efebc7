//! Gradients are reduced while backward goes on: by the order of events, and by the time that it hides.

use crate::sharded::{Make, PLAIN, stepper};
use crate::step::{BATCH, BUCKET, Counted, LR, SOON, input, share, tiny};
use crate::support::Outcome;
use occlude::device::solo::{Solo, threads};
use occlude::device::world::{Delayed, Event as Noted};
use occlude::device::{Channel, Reduce, World};
use occlude::fault::{Code, Result};
use occlude::method::{Batch, mae};
use occlude::op::shuffle::Origin;
use occlude::optim::bucket::Event;
use occlude::run::pace::{Ahead, Share};
use occlude::run::step::Stepper;
use serde_json::json;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tch::{Device, Kind, Tensor};

crate::trials![
    buckets_start_in_order_and_before_backward_has_ended,
    buckets_of_shards_start_in_order_and_before_backward_has_ended,
    seven_tenths_of_a_slow_network_are_hidden,
    seven_tenths_of_a_slow_network_are_hidden_from_shards,
    what_starts_after_backward_is_not_hidden,
    seven_tenths_of_slow_gathers_are_hidden_under_the_next_forward,
    seven_tenths_of_slow_gathers_are_hidden_in_a_step_ahead,
    weights_wait_for_their_own_bucket_alone,
    weights_that_do_not_come_are_a_fault,
];

const SHARDED: Make = Make { sharded: true, ..PLAIN };

fn buckets_start_in_order_and_before_backward_has_ended() -> Outcome {
    buckets_start_early(PLAIN)
}

fn buckets_of_shards_start_in_order_and_before_backward_has_ended() -> Outcome {
    buckets_start_early(SHARDED)
}

fn buckets_start_early(make: Make) -> Outcome {
    threads(2, |world| {
        let mut stepper = stepper(tiny(), &world, BUCKET, make);
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
/// About what a step takes alone.
const STEP_S: f64 = 0.3;

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
    let alone: Arc<dyn World> = Arc::new(Solo::new(Device::Cpu));
    let mut alone = stepper(eight(), &alone, BLOCK, PLAIN);
    timed(&mut alone, 32);
    let each = timed(&mut alone, 32).min(timed(&mut alone, 32)) / 32.0;
    ((STEP_S / each) as i64).clamp(8, 4096)
}

/// A stepper whose buckets take `delay` longer, and what is noted of them.
fn slowed(world: &Arc<dyn World>, delay: Duration, bytes: usize, make: Make) -> (Stepper, Arc<Delayed>) {
    let noted = Arc::new(Delayed::new(world.clone(), delay));
    let split: Arc<dyn World> = Arc::new(Split { gradients: noted.clone(), rest: world.clone() });
    (stepper(eight(), &split, bytes, make), noted)
}

/// The buckets of one step, and when its backward had ended.
fn buckets(stepper: &mut Stepper, noted: &Delayed, rows: i64) -> (Vec<Noted>, Instant) {
    let before = noted.events().len();
    let outcome = stepper.step(&[noise(rows)], 1e-6, |_, _| Ok(())).expect("a step");
    let mut buckets = noted.events().split_off(before);
    // The norm of shards is summed too.
    buckets.retain(|event| event.elements > 1 && !event.gathers);
    let last = buckets.last().expect("a bucket").finished;
    (buckets, last - outcome.comm_wait)
}

/// The share of the delays of one step that passed before backward had ended, on the slower of two ranks; what comes
/// after that makes the step longer. The delays are as long as backward is, of which the machine may be busy with much
/// else: each takes half of the time from one bucket to the next, so that a bucket never waits for the one before it.
fn share_hidden(world: &Arc<dyn World>, bytes: usize, make: Make, rows: i64, began: Instant) -> f64 {
    let mut meeting = world.channel("meeting").expect("a channel");
    let mut greatest = |number: f64| {
        let all = meeting.all_reduce(&Tensor::from_slice(&[number]), Reduce::Max).wait(SOON);
        all.expect("a maximum").double_value(&[0])
    };
    let (mut plain, noted) = slowed(world, Duration::ZERO, BLOCK, make);
    buckets(&mut plain, &noted, rows);
    let (all, _) = buckets(&mut plain, &noted, rows);
    assert!((4..=12).contains(&all.len()), "{} buckets", all.len());
    let between = (all[all.len() - 1].started - all[0].started).as_secs_f64() / (all.len() - 1) as f64;
    let delay = -0.5 * greatest(-between);

    let (mut delayed, noted) = slowed(world, Duration::from_secs_f64(delay), bytes, make);
    let (all, end) = buckets(&mut delayed, &noted, rows);
    let since = |moment: Instant| (moment - began).as_secs_f64();
    let end = greatest(since(end));
    let late: f64 = all.iter().map(|bucket| (since(bucket.finished) - since(bucket.came).max(end)).max(0.0)).sum();
    let whole: f64 = all.iter().map(|bucket| since(bucket.finished) - since(bucket.came)).sum();
    1.0 - greatest(late / whole)
}

/// Of one step each, the best of up to eight: another process may take the processor away in the middle of backward, and
/// nothing makes a delay that starts after backward look hidden.
fn best_share_hidden(bytes: usize, make: Make, enough: f64) -> Vec<f64> {
    let (rows, began) = (calibrated(), Instant::now());
    let all = threads(2, |world| {
        let mut shares = Vec::new();
        while shares.len() < 8 && shares.last().is_none_or(|&share| share < enough) {
            shares.push(share_hidden(&world, bytes, make, rows, began));
        }
        shares
    });
    all[0].clone()
}

/// Only the last bucket, which is complete when backward ends, has to be waited for: one of seven.
fn seven_tenths_of_a_slow_network_are_hidden() -> Outcome {
    let shares = best_share_hidden(BLOCK, PLAIN, 0.7);
    assert!(shares[shares.len() - 1] >= 0.7, "hidden, step by step: {shares:.2?}");
    Ok(())
}

fn seven_tenths_of_a_slow_network_are_hidden_from_shards() -> Outcome {
    let shares = best_share_hidden(BLOCK, SHARDED, 0.7);
    assert!(shares[shares.len() - 1] >= 0.7, "hidden, step by step: {shares:.2?}");
    Ok(())
}

/// The measure itself: a single bucket cannot start before backward has ended.
fn what_starts_after_backward_is_not_hidden() -> Outcome {
    for make in [PLAIN, SHARDED] {
        let shares = best_share_hidden(1 << 40, make, -1.0);
        assert!(shares[0] < 0.1, "hidden: {shares:.2?}");
    }
    Ok(())
}

/// Gathers, one after the other, each for half of the time in which a forward passes a bucket: only the first, whose
/// weights are wanted at once, has to be waited for.
fn seven_tenths_of_slow_gathers_are_hidden_under_the_next_forward() -> Outcome {
    enough_of_gathers_is_hidden(|stepper, rows, _| {
        // The weights of the step before are on their way.
        stepper.buckets.begin();
        stepper.method.loss(&stepper.flat.leaves, &noise(rows)).expect("a loss");
    })
}

/// What a graph holds: the step begins with the gathers, and ends with none under way.
fn seven_tenths_of_slow_gathers_are_hidden_in_a_step_ahead() -> Outcome {
    enough_of_gathers_is_hidden(|stepper, rows, world| {
        let mut ahead = Ahead::new(rows as u64 * world.size() as u64, stepper, world).expect("a pace");
        let origins = (0..rows as u64).map(|id| Origin { id, epoch: 0, repeat: 0 }).collect();
        let pixels = noise(rows).pixels;
        let share = Share { pixels, origins, text: None, valid: None, seed: 5, micro: rows as usize };
        ahead.step(stepper, &share, 1e-6).expect("a step");
    })
}

/// `step` waits for weights, of which the stepper keeps count.
fn enough_of_gathers_is_hidden(step: fn(&mut Stepper, i64, &Arc<dyn World>)) -> Outcome {
    let rows = calibrated();
    let all = threads(2, |world| {
        let mut shares = Vec::new();
        while shares.len() < 8 && shares.last().is_none_or(|&share| share < 0.7) {
            shares.push(share_of_gathers_hidden(&world, rows, step));
        }
        shares
    });
    assert!(all[0].last().is_some_and(|&share| share >= 0.7), "hidden, step by step: {:.2?}", all[0]);
    Ok(())
}

fn share_of_gathers_hidden(world: &Arc<dyn World>, rows: i64, step: fn(&mut Stepper, i64, &Arc<dyn World>)) -> f64 {
    let mut meeting = world.channel("meeting").expect("a channel");
    let mut greatest = |number: f64| {
        let all = meeting.all_reduce(&Tensor::from_slice(&[number]), Reduce::Max).wait(SOON);
        all.expect("a maximum").double_value(&[0])
    };
    let forward = |stepper: &Stepper| {
        let began = Instant::now();
        stepper.method.loss(&stepper.flat.leaves, &noise(rows)).expect("a loss");
        began.elapsed().as_secs_f64()
    };
    let (mut plain, _) = slowed(world, Duration::ZERO, BLOCK, SHARDED);
    timed(&mut plain, rows);
    let count = plain.bucket_count() as f64;
    let delay = -0.5 * greatest(-forward(&plain)) / count;
    let (mut delayed, _) = slowed(world, Duration::from_secs_f64(delay), BLOCK, SHARDED);
    timed(&mut delayed, rows);
    step(&mut delayed, rows, world);
    1.0 - greatest(delayed.buckets.waited().as_secs_f64()) / (delay * count)
}

/// While the last tensors of a model are still on their way, the first can be used.
fn weights_wait_for_their_own_bucket_alone() -> Outcome {
    threads(2, |world| {
        let (mut stepper, noted) = slowed(&world, Duration::from_millis(150), BLOCK, SHARDED);
        stepper.step(&[noise(4)], 1e-6, |_, _| Ok(())).expect("a step");
        let gathers = || noted.events().iter().filter(|event| event.gathers).count();
        let arrive = stepper.buckets.arrival(SOON);
        arrive(0);
        assert_eq!(gathers(), 1, "the first tensor waits for others' buckets");
        arrive(stepper.flat.specs.len() - 1);
        assert_eq!(gathers(), stepper.bucket_count());
        arrive(0);
    });
    Ok(())
}

fn weights_that_do_not_come_are_a_fault() -> Outcome {
    threads(2, |world| {
        let (mut stepper, _) = slowed(&world, Duration::from_millis(400), BLOCK, SHARDED);
        stepper.step(&[noise(4)], 1e-6, |_, _| Ok(())).expect("a step");
        stepper.buckets.arrival(Duration::from_millis(1))(0);
        let fault = stepper.step(&[noise(4)], 1e-6, |_, _| Ok(())).expect_err("weights have not come");
        assert_eq!(fault.code, Code::Failed, "{fault}");
    });
    Ok(())
}
