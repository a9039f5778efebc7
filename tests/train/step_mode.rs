//! Tests of pipelined steps, as far as they go without a device: the decisions of the device run on the CPU, and the
//! operators of a step are recorded.

use crate::architecture::{files, read_text, relative_path};
use crate::method::flip;
use crate::support::Outcome;
use crate::support::child_process::run_case;
use crate::support::method_ext::MethodExt;
use crate::train::step::{BATCH, BUCKET, LR, Trajectory, input, pipelined_batch, state_bytes, stepper, tiny_mae};
use occlude::bridge::record::{Recorder, TraceSpan};
use occlude::bridge::{allocated_bytes, install_caching_allocator};
use occlude::dist::World;
use occlude::dist::solo::{SoloWorld, run_on_threads};
use occlude::error::{ExitCode, Result};
use occlude::grid::InputConfig;
use occlude::method::{Batch, LossOutput, LossTerm, MaskPolicy, Method, Model, Step, mae};
use occlude::train::outcome;
use occlude::train::step::Stepper;
use occlude::train::step_mode::{LocalBatch, StepMode, StepPipeline, can_capture};
use occlude::train::tracker::{InFlight, StepTracker};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tch::{Device, Kind, Tensor};

crate::trials![
    pipelined_steps_match_synchronous_steps,
    outcomes_arrive_one_step_late_and_flush_returns_the_last,
    a_non_finite_pipelined_step_is_rejected_by_all_ranks,
    a_pipelined_step_never_synchronizes_with_the_device,
    a_pipelined_step_with_captions_never_synchronizes,
    a_host_sync_in_a_loss_is_detected,
    no_part_of_a_loss_copies_between_host_and_device,
    a_pipelined_step_leaks_no_memory,
    a_local_batch_of_another_size_or_dtype_is_rejected,
    on_a_cpu_steps_are_synchronous,
    a_method_with_host_masks_is_not_capturable,
    late_outcomes_belong_to_their_steps_and_too_many_non_finite_ones_stop,
];

fn alone() -> Arc<dyn World> {
    Arc::new(SoloWorld::new(Device::Cpu))
}

/// A pipelined training of a method, on the CPU.
struct PipelinedRun {
    stepper: Stepper,
    pipeline: StepPipeline,
    world: Arc<dyn World>,
}

impl PipelinedRun {
    fn new(method: impl Method + 'static, world: Arc<dyn World>) -> PipelinedRun {
        let stepper = stepper(method, world.clone(), Kind::Float, BUCKET);
        let pipeline = StepPipeline::new(BATCH, &stepper, &world).expect("a pipeline");
        PipelinedRun { stepper, pipeline, world }
    }
    fn step(&mut self, step: u64) -> Option<outcome::Outcome> {
        let load = pipelined_batch(step, BATCH, self.world.as_ref(), 4);
        self.pipeline.step(&mut self.stepper, &load, LR).expect("a step")
    }
}

fn pipelined_steps_match_synchronous_steps() -> Outcome {
    let alone = Trajectory::train_solo(8, BATCH);
    for (size, micro) in [(1, 10), (1, 3), (2, 2), (3, 10)] {
        for (path, captured) in run_on_threads(size, |world| Trajectory::train_pipelined(world, 8, BATCH, micro)) {
            path.assert_matches(&alone, &format!("ahead, {size} ranks, micro-batches of {micro}"));
            assert_eq!(captured, 0, "there is nothing to capture on a CPU");
        }
    }
    // Two samples on three ranks: one rank has none.
    let few = Trajectory::train_solo(4, 2);
    run_on_threads(3, |world| Trajectory::train_pipelined(world, 4, 2, 1))
        .iter()
        .for_each(|(path, _)| path.assert_matches(&few, "a rank without any"));
    Ok(())
}

fn outcomes_arrive_one_step_late_and_flush_returns_the_last() -> Outcome {
    let mut run = PipelinedRun::new(tiny_mae(), alone());
    let mut plain = stepper(tiny_mae(), alone(), Kind::Float, BUCKET);
    let mut expected = Vec::new();
    for step in 0..3 {
        let batches = pipelined_batch(step, BATCH, run.world.as_ref(), 4).micro_batches(Device::Cpu)?;
        expected.push(plain.step(&batches, LR, |_, _| Ok(()))?);
        let output = run.step(step);
        assert_eq!(output.is_some(), step > 0, "step {step}");
        if let Some(output) = output {
            let before = &expected[step as usize - 1];
            assert!((output.loss - before.loss).abs() <= 1e-5 * before.loss, "{output:?} for {before:?}");
            assert!(
                (output.grad_norm - before.grad_norm).abs() <= 1e-3 * before.grad_norm,
                "{output:?} for {before:?}"
            );
            assert!((output.local_loss - before.local_loss).abs() <= 1e-5 * before.loss);
            assert_eq!(output.terms.len(), before.terms.len());
        }
    }
    let last = run.pipeline.flush(&run.stepper)?.expect("the last outcome");
    assert!((last.loss - expected[2].loss).abs() <= 1e-5 * last.loss);
    assert!(run.pipeline.flush(&run.stepper)?.is_none(), "once");
    Ok(())
}

/// Returns the local batch as floats, with one NaN value on one rank.
fn with_nan(step: u64, world: &dyn World, rank: usize) -> LocalBatch {
    let mut batch = pipelined_batch(step, BATCH, world, 2);
    batch.views[0] = batch.views[0].to_kind(Kind::Float) / 64.0 - 2.0;
    if world.rank() == rank {
        let _ = batch.views[0].get(0).get(0).get(0).get(9).get(5).fill_(f64::NAN);
    }
    batch
}

fn a_non_finite_pipelined_step_is_rejected_by_all_ranks() -> Outcome {
    const NOBODY: usize = 9;
    for bad in [0, 2] {
        let run = |world: Arc<dyn World>, steps: &[(u64, usize)]| {
            let mut stepper = stepper(tiny_mae(), world.clone(), Kind::Float, BUCKET);
            let mut pipeline = StepPipeline::new(BATCH, &stepper, &world).expect("a pipeline");
            let mut output = Vec::new();
            let mut states = Vec::new();
            for (step, rank) in steps {
                output
                    .extend(pipeline.step(&mut stepper, &with_nan(*step, world.as_ref(), *rank), LR).expect("a step"));
                states.push(state_bytes(&stepper));
            }
            output.extend(pipeline.flush(&stepper).expect("the last"));
            let output: Vec<_> = output.into_iter().map(|outcome| (outcome.loss, outcome.bad_ranks)).collect();
            (output, states)
        };
        let with = run_on_threads(3, |world| run(world, &[(0, NOBODY), (1, bad), (2, NOBODY)]));
        let without = run_on_threads(3, |world| run(world, &[(0, NOBODY), (2, NOBODY)]));
        for ((output, states), (fine, untouched)) in with.iter().zip(&without) {
            assert_eq!(output[1].1, [bad], "{output:?}");
            assert!(output[0].1.is_empty() && output[2].1.is_empty() && !output[1].0.is_finite(), "{output:?}");
            assert!(states[1] == states[0], "a rejected step has changed something");
            assert!(states[2] == untouched[1] && output[2] == fine[1], "a rejected step changed later steps");
        }
    }
    Ok(())
}

/// Operators that synchronize with the device or copy to or from it, wherever they are called.
const SYNCHRONIZING_OPERATORS: [&str; 7] = [
    "aten::item",
    "aten::_local_scalar_dense",
    "aten::is_nonzero",
    "aten::nonzero",
    "aten::masked_select",
    "aten::equal",
    "aten::_unique2",
];

/// Returns the operators of one step in order, from the spans of its parts: what a graph would hold. Masks are left
/// out: they are sampled on the host without a device, and by one kernel with it.
fn step_operators(spans: &[TraceSpan]) -> Vec<&TraceSpan> {
    let named = |name: &str| spans.iter().filter(|span| span.name == name).collect::<Vec<_>>();
    let parts = named("part");
    // A kernel samples these on a device; here the host does.
    let sampled = [named("mask"), named("noise")].concat();
    assert!(!parts.is_empty(), "a step has parts");
    let inside = |all: &[&TraceSpan], span: &TraceSpan| all.iter().any(|outer| outer.contains(span));
    spans.iter().filter(|span| inside(&parts, span) && !inside(&sampled, span)).collect()
}

/// Returns those operators that would stall a device or invalidate a graph. A tensor from host values begins as an
/// otherwise unused tensor of zeros.
fn synchronizing_operators(request: &[&TraceSpan]) -> BTreeSet<String> {
    let alone = |span: &TraceSpan| {
        let outer = |other: &&TraceSpan| other.name.starts_with("aten::") && other.contains(span) && *other != span;
        !request.iter().any(outer)
    };
    let stalls = |span: &TraceSpan| {
        SYNCHRONIZING_OPERATORS.contains(&span.name.as_str()) || (span.name == "aten::zeros" && alone(span))
    };
    request.iter().filter(|span| stalls(span)).map(|span| span.name.clone()).collect()
}

/// Returns the spans of each of some steps.
fn record_steps(method: impl Method + 'static) -> Vec<Vec<TraceSpan>> {
    let mut run = PipelinedRun::new(method, alone());
    record_spans(|step| drop(run.step(step)))
}

pub fn record_spans(mut step: impl FnMut(u64)) -> Vec<Vec<TraceSpan>> {
    let mut recorded = |at| {
        let recorder = Recorder::start().expect("a recorder");
        step(at);
        recorder.stop()
    };
    (0..4).map(&mut recorded).collect()
}

fn a_pipelined_step_never_synchronizes_with_the_device() -> Outcome {
    assert_no_synchronization(&record_steps(tiny_mae()));
    Ok(())
}

fn a_pipelined_step_with_captions_never_synchronizes() -> Outcome {
    let hidden = json!({"ratio": 0.5, "padding_first": true, "padding": 3});
    for (towers, words) in [("flip", Value::Null), ("clip", Value::Null), ("flip", hidden.clone()), ("clip", hidden)] {
        let world = alone();
        let mut pairs = flip::tiny(towers);
        pairs.words = words;
        let mut stepper = stepper(pairs.method(), world.clone(), Kind::Float, BUCKET);
        let mut pipeline = StepPipeline::new(flip::PAIRS, &stepper, &world)?;
        assert_no_synchronization(&record_spans(|step| {
            drop(pipeline.step(&mut stepper, &flip::local_batch(step, world.as_ref()), LR).expect("a step"));
        }));
    }
    Ok(())
}

pub fn assert_no_synchronization(steps: &[Vec<TraceSpan>]) {
    let request: Vec<_> = steps.iter().map(|spans| step_operators(spans)).collect();
    for (step, request) in request.iter().enumerate() {
        assert!(request.len() > 500, "step {step} has only {} operators", request.len());
        assert_eq!(synchronizing_operators(request), BTreeSet::new(), "step {step}");
        let names: BTreeSet<&str> = request.iter().map(|span| span.name.as_str()).collect();
        for phase in ["forward", "backward", "reduce", "update"] {
            assert!(names.contains(phase), "{phase} is not among them");
        }
    }
    let names = |request: &[&TraceSpan]| request.iter().map(|span| span.name.clone()).collect::<Vec<_>>();
    for later in &request[2..] {
        assert_eq!(names(later), names(&request[1]), "the same operators in every step");
    }
}

/// A method whose loss reads a number on the host.
struct SynchronizingLoss(mae::Mae, fn(&Tensor) -> Tensor);

impl Method for SynchronizingLoss {
    fn model(&self) -> &dyn Model {
        self.0.model()
    }
    fn model_mut(&mut self) -> &mut dyn Model {
        self.0.model_mut()
    }
    fn mask(&self) -> Option<&dyn MaskPolicy> {
        self.0.mask()
    }
    fn loss(&self, step: &Step, batch: &Batch) -> Result<LossOutput> {
        let output = self.0.loss(step, batch)?;
        let terms = output.terms.into_iter().map(|term| LossTerm { sum: self.1(&term.sum), ..term }).collect();
        Ok(LossOutput { terms, ..output })
    }
}

/// Returns a method whose loss copies a number to the host.
pub fn synchronizing_loss() -> impl Method {
    SynchronizingLoss(tiny_mae(), |sum| sum * if sum.double_value(&[]) > 0.0 { 1.0 } else { 2.0 })
}

fn a_host_sync_in_a_loss_is_detected() -> Outcome {
    type Look = fn(&Tensor) -> Tensor;
    let looks: [(&str, Look); 3] = [
        ("aten::item", |sum| sum * if sum.double_value(&[]) > 0.0 { 1.0 } else { 2.0 }),
        ("aten::zeros", |sum| sum * Tensor::from_slice(&[1f32]).sum(Kind::Float)),
        ("aten::nonzero", |sum| sum * sum.view([1]).nonzero().numel() as f64),
    ];
    for (name, look) in looks {
        let steps = record_steps(SynchronizingLoss(tiny_mae(), look));
        let found = synchronizing_operators(&step_operators(&steps[2]));
        assert!(found.contains(name), "{name} is not among {found:?}");
    }
    Ok(())
}

/// Files in which host values become constants of a device once, are learned before the first step, are drawn for
/// pictures, or are a kernel's reference.
const MAKERS: [&str; 10] = [
    "src/op/adamw.rs",
    "src/op/attention/windows.rs",
    "src/op/k_means.rs",
    "src/op/noise.rs",
    "src/op/shuffle.rs",
    "src/part/buffers.rs",
    "src/part/decoder/windows.rs",
    "src/part/encoder/position.rs",
    "src/part/objective/draw_hog.rs",
    "src/part/palette.rs",
];

/// Without a device, a copy to it does nothing and is not recorded above, so the sources are searched. Batches are
/// stacked on the host.
fn no_part_of_a_loss_copies_between_host_and_device() -> Outcome {
    const MOVES: [&str; 5] = [".to_device(", "from_slice(", "double_value(", "int64_value(", "try_from(&"];
    let mut looked_at = 0;
    for folder in ["src/op", "src/part", "src/method"] {
        for path in files(folder, "rs") {
            let name = relative_path(&path);
            let text = read_text(&path);
            if MAKERS.contains(&name.as_str()) || name == "src/part/batch.rs" {
                continue;
            }
            looked_at += 1;
            for line in text.lines().map(|line| line.split("//").next().unwrap_or("")) {
                assert!(
                    !MOVES.iter().any(|call| line.contains(call)),
                    "{name}: a captured step cannot do this: {line}"
                );
            }
        }
    }
    assert!(looked_at > 40, "{looked_at} files");
    Ok(())
}

/// Prints the bytes of tensors after each step, in a process of its own. Returns the exit code.
pub fn case() -> i32 {
    install_caching_allocator();
    let mut run = PipelinedRun::new(tiny_mae(), alone());
    for step in 0..6 {
        let _ = run.step(step);
        println!("{}", allocated_bytes());
    }
    0
}

fn a_pipelined_step_leaks_no_memory() -> Outcome {
    let (code, output, why) = run_case("pace-memory")?;
    assert_eq!(code, Some(0), "{why}");
    let held: Vec<usize> = output.lines().map(|line| line.parse().expect("bytes")).collect();
    assert_eq!(held.len(), 6, "{output}");
    assert!(held[1] > 100_000 && held[1..].iter().all(|bytes| *bytes == held[1]), "{held:?}");
    Ok(())
}

fn a_local_batch_of_another_size_or_dtype_is_rejected() -> Outcome {
    let mut run = PipelinedRun::new(tiny_mae(), alone());
    let other = pipelined_batch(0, BATCH - 1, run.world.as_ref(), 4);
    let error = run.pipeline.step(&mut run.stepper, &other, LR).expect_err("9 samples of 10");
    assert!(error.message.contains("9 samples") && error.message.contains("part of the batch is 10"), "{error}");
    let _ = run.step(0);
    let floats = LocalBatch { micro_batch: 4, ..with_nan(1, run.world.as_ref(), usize::MAX) };
    let error = run.pipeline.step(&mut run.stepper, &floats, LR).expect_err("floats after bytes");
    assert!(error.message.contains("Float, [") && error.message.contains("seed 5, after"), "{error}");
    assert!(error.message.contains("Uint8"), "{error}");
    Ok(())
}

fn on_a_cpu_steps_are_synchronous() -> Outcome {
    assert_eq!(can_capture(&tiny_mae(), alone().as_ref()), Ok(()), "only the device is missing");
    let world = alone();
    let mut stepper = stepper(tiny_mae(), world.clone(), Kind::Float, BUCKET);
    let mut mode = StepMode::new(true, BATCH, &stepper, &world)?;
    assert!(matches!(mode, StepMode::Synchronous));
    let outcome = mode.step(&mut stepper, &pipelined_batch(0, BATCH, world.as_ref(), 4), LR)?;
    assert!(outcome.is_some_and(|outcome| outcome.loss > 0.0), "at once");
    assert!(mode.flush(&stepper)?.is_none());
    Ok(())
}

fn a_method_with_host_masks_is_not_capturable() -> Outcome {
    let wide = InputConfig { height: 260, width: 260, ..input() };
    let config = json!({
        "encoder": {"width": 4, "depth": 1, "heads": 1}, "decoder": {"width": 4, "depth": 1, "heads": 1},
        "mask": {"ratio": 0.75},
    });
    let method = mae::Mae::new(&serde_json::from_value(config)?, &wide)?;
    assert_eq!(method.grid().tokens(), 65 * 65);
    assert!(can_capture(&method, alone().as_ref()).is_err_and(|why| why.contains("sampled on the host")));
    Ok(())
}

fn late_outcomes_belong_to_their_steps_and_too_many_non_finite_ones_stop() -> Outcome {
    let outcome = |bad: bool| outcome::Outcome {
        loss: 1.0,
        terms: Vec::new(),
        local_loss: 1.0,
        grad_norm: 1.0,
        clip_scale: 1.0,
        bad_ranks: if bad { vec![1] } else { Vec::new() },
        comm_wait: Duration::ZERO,
    };
    for late in [0, 1] {
        let mut tracker = StepTracker::new(3, false);
        let in_flight = |step| InFlight { step, lr: 0.1, start: Instant::now(), data_wait: Duration::ZERO, frames: 1 };
        let bad = [true, true, false, true, true, true];
        let mut output = Vec::new();
        for step in 0..bad.len() + late {
            tracker.push(in_flight(step as u64));
            if let Some(due) = step.checked_sub(late) {
                match tracker.complete(&outcome(bad[due])) {
                    Ok((done, _)) => output.push(done.step),
                    Err(error) => {
                        assert_eq!((error.code, step), (ExitCode::Failed, 5 + late), "{error}");
                        assert!(
                            error.message.contains("3 steps in a row") && error.message.contains("step 5"),
                            "{error}"
                        );
                        output.push(99);
                    }
                }
            }
        }
        assert_eq!(output, [0, 1, 2, 3, 4, 99], "{late} steps late");
    }
    // Overlapping steps share the time; one that began after the last outcome has its own.
    let mut tracker = StepTracker::new(3, false);
    let long_ago = Instant::now() - Duration::from_secs(60);
    for step in [0, 1] {
        tracker.push(InFlight { step, lr: 0.1, start: long_ago, data_wait: Duration::ZERO, frames: 1 });
    }
    assert!(tracker.complete(&outcome(false))?.1 >= Duration::from_secs(60));
    assert!(tracker.complete(&outcome(false))?.1 < Duration::from_secs(30), "counted from the outcome before");
    Ok(())
}
