//! Steps ahead of the device, as far as they go without one: the device's own decisions run on the CPU, and what a step
//! asks of it is written down.

use crate::architecture::{files, short, text};
use crate::bridge::run;
use crate::flip;
use crate::step::{BATCH, BUCKET, LR, Path, input, load, state, stepper, tiny};
use crate::support::Outcome;
use occlude::bridge::record::{Recorder, Span};
use occlude::bridge::{keep_memory, memory_in_use};
use occlude::device::World;
use occlude::device::solo::{Solo, threads};
use occlude::fault::{Code, Result};
use occlude::grid::{Grid, Input};
use occlude::method::{Batch, Features, Method, Reconstruction, Term, mae};
use occlude::part::mask::Mask;
use occlude::part::weights::{Table, Weights};
use occlude::part::work::Work;
use occlude::run::ledger::{Ledger, Taken};
use occlude::run::pace::{Ahead, Pace, Share};
use occlude::run::step::{self, Stepper};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tch::{Device, Kind, Tensor};

crate::trials![
    steps_ahead_take_the_path_of_steps_one_at_a_time,
    an_outcome_comes_one_step_late_and_the_last_when_it_is_asked_for,
    a_bad_step_ahead_is_refused_by_all_ranks,
    a_step_ahead_asks_nothing_of_the_device,
    a_step_ahead_with_captions_asks_nothing_of_the_device,
    a_question_in_a_loss_is_noticed,
    nothing_that_a_loss_is_made_of_moves_numbers_between_host_and_device,
    a_step_ahead_leaves_no_memory_behind,
    a_share_of_another_size_or_kind_is_refused,
    on_a_cpu_the_host_looks_at_every_step,
    a_method_whose_masks_are_drawn_on_the_host_is_not_captured,
    late_outcomes_are_those_of_their_steps_and_too_many_bad_ones_end_the_training,
];

fn alone() -> Arc<dyn World> {
    Arc::new(Solo::new(Device::Cpu))
}

/// A training ahead, of a method, on the CPU.
struct Run {
    stepper: Stepper,
    ahead: Ahead,
    world: Arc<dyn World>,
}

impl Run {
    fn new(method: impl Method + 'static, world: Arc<dyn World>) -> Run {
        let stepper = stepper(method, world.clone(), Kind::Float, BUCKET);
        let ahead = Ahead::new(BATCH, &stepper, &world).expect("a pace");
        Run { stepper, ahead, world }
    }
    fn step(&mut self, step: u64) -> Option<step::Outcome> {
        let load = load(step, BATCH, self.world.as_ref(), 4);
        self.ahead.step(&mut self.stepper, &load, LR).expect("a step")
    }
}

fn steps_ahead_take_the_path_of_steps_one_at_a_time() -> Outcome {
    let alone = Path::solo(8, BATCH);
    for (size, micro) in [(1, 10), (1, 3), (2, 2), (3, 10)] {
        for (path, captured) in threads(size, |world| Path::ahead(world, 8, BATCH, micro)) {
            path.agrees(&alone, &format!("ahead, {size} ranks, micro-batches of {micro}"));
            assert_eq!(captured, 0, "there is nothing to capture on a CPU");
        }
    }
    // Two samples on three ranks: one rank has none.
    let few = Path::solo(4, 2);
    threads(3, |world| Path::ahead(world, 4, 2, 1))
        .iter()
        .for_each(|(path, _)| path.agrees(&few, "a rank without any"));
    Ok(())
}

fn an_outcome_comes_one_step_late_and_the_last_when_it_is_asked_for() -> Outcome {
    let mut run = Run::new(tiny(), alone());
    let mut plain = stepper(tiny(), alone(), Kind::Float, BUCKET);
    let mut wanted = Vec::new();
    for step in 0..3 {
        let batches = load(step, BATCH, run.world.as_ref(), 4).batches(Device::Cpu)?;
        wanted.push(plain.step(&batches, LR, |_, _| Ok(()))?);
        let told = run.step(step);
        assert_eq!(told.is_some(), step > 0, "step {step}");
        if let Some(told) = told {
            let before = &wanted[step as usize - 1];
            assert!((told.loss - before.loss).abs() <= 1e-5 * before.loss, "{told:?} for {before:?}");
            assert!((told.grad_norm - before.grad_norm).abs() <= 1e-3 * before.grad_norm, "{told:?} for {before:?}");
            assert!((told.local_loss - before.local_loss).abs() <= 1e-5 * before.loss);
            assert_eq!(told.terms.len(), before.terms.len());
        }
    }
    let last = run.ahead.settle(&run.stepper)?.expect("the last one's");
    assert!((last.loss - wanted[2].loss).abs() <= 1e-5 * last.loss);
    assert!(run.ahead.settle(&run.stepper)?.is_none(), "once");
    Ok(())
}

/// The share as floats, with one value of a rank that is no number.
fn spoiled(step: u64, world: &dyn World, rank: usize) -> Share {
    let mut share = load(step, BATCH, world, 2);
    share.pixels = share.pixels.to_kind(Kind::Float) / 64.0 - 2.0;
    if world.rank() == rank {
        let _ = share.pixels.get(0).get(0).get(0).get(9).get(5).fill_(f64::NAN);
    }
    share
}

fn a_bad_step_ahead_is_refused_by_all_ranks() -> Outcome {
    const NOBODY: usize = 9;
    for bad in [0, 2] {
        let run = |world: Arc<dyn World>, steps: &[(u64, usize)]| {
            let mut stepper = stepper(tiny(), world.clone(), Kind::Float, BUCKET);
            let mut ahead = Ahead::new(BATCH, &stepper, &world).expect("a pace");
            let (mut told, mut states) = (Vec::new(), Vec::new());
            for (step, rank) in steps {
                told.extend(ahead.step(&mut stepper, &spoiled(*step, world.as_ref(), *rank), LR).expect("a step"));
                states.push(state(&stepper));
            }
            told.extend(ahead.settle(&stepper).expect("the last"));
            let told: Vec<_> = told.into_iter().map(|outcome| (outcome.loss, outcome.bad_ranks)).collect();
            (told, states)
        };
        let with = threads(3, |world| run(world, &[(0, NOBODY), (1, bad), (2, NOBODY)]));
        let without = threads(3, |world| run(world, &[(0, NOBODY), (2, NOBODY)]));
        for ((told, states), (fine, untouched)) in with.iter().zip(&without) {
            assert_eq!(told[1].1, [bad], "{told:?}");
            assert!(told[0].1.is_empty() && told[2].1.is_empty() && !told[1].0.is_finite(), "{told:?}");
            assert!(states[1] == states[0], "a refused step has moved something");
            assert!(states[2] == untouched[1] && told[2] == fine[1], "a refused step left a trace");
        }
    }
    Ok(())
}

/// Operations that wait for the device or bring numbers to or from it, wherever they are called.
const QUESTIONS: [&str; 7] = [
    "aten::item",
    "aten::_local_scalar_dense",
    "aten::is_nonzero",
    "aten::nonzero",
    "aten::masked_select",
    "aten::equal",
    "aten::_unique2",
];

/// What one step asks, in order, from the spans of its parts: what a graph would hold. Masks are left out, which are
/// drawn on the host without a device, and by one kernel with it.
fn asked(spans: &[Span]) -> Vec<&Span> {
    let named = |name: &str| spans.iter().filter(|span| span.name == name).collect::<Vec<_>>();
    let (parts, masks) = (named("part"), named("mask"));
    assert!(!parts.is_empty() && !masks.is_empty(), "a step has parts and draws masks");
    let inside = |all: &[&Span], span: &Span| all.iter().any(|outer| outer.holds(span));
    spans.iter().filter(|span| inside(&parts, span) && !inside(&masks, span)).collect()
}

/// Those of them that would stall a device or spoil a graph. A tensor from numbers of the host begins as one of zeros
/// that no other operation asks for.
fn questions(asked: &[&Span]) -> BTreeSet<String> {
    let alone = |span: &Span| {
        let outer = |other: &&Span| other.name.starts_with("aten::") && other.holds(span) && *other != span;
        !asked.iter().any(outer)
    };
    let stalls = |span: &Span| QUESTIONS.contains(&span.name.as_str()) || (span.name == "aten::zeros" && alone(span));
    asked.iter().filter(|span| stalls(span)).map(|span| span.name.clone()).collect()
}

/// The spans of each of some steps.
fn recorded(method: impl Method + 'static) -> Vec<Vec<Span>> {
    let mut run = Run::new(method, alone());
    spans(|step| drop(run.step(step)))
}

pub fn spans(mut step: impl FnMut(u64)) -> Vec<Vec<Span>> {
    let mut recorded = |at| {
        let recorder = Recorder::start().expect("a recorder");
        step(at);
        recorder.stop()
    };
    (0..4).map(&mut recorded).collect()
}

fn a_step_ahead_asks_nothing_of_the_device() -> Outcome {
    asks_nothing(&recorded(tiny()));
    Ok(())
}

fn a_step_ahead_with_captions_asks_nothing_of_the_device() -> Outcome {
    let hidden = json!({"ratio": 0.5, "prioritised": true, "padding": 3});
    for (towers, words) in [("plain", Value::Null), ("clip", Value::Null), ("plain", hidden.clone()), ("clip", hidden)]
    {
        let world = alone();
        let mut pairs = flip::tiny(towers);
        pairs.words = words;
        let mut stepper = stepper(pairs.method(), world.clone(), Kind::Float, BUCKET);
        let mut ahead = Ahead::new(flip::PAIRS, &stepper, &world)?;
        asks_nothing(&spans(|step| {
            drop(ahead.step(&mut stepper, &flip::share(step, world.as_ref()), LR).expect("a step"));
        }));
    }
    Ok(())
}

pub fn asks_nothing(steps: &[Vec<Span>]) {
    let asked: Vec<_> = steps.iter().map(|spans| asked(spans)).collect();
    for (step, asked) in asked.iter().enumerate() {
        assert!(asked.len() > 500, "step {step} asks for {} operations only", asked.len());
        assert_eq!(questions(asked), BTreeSet::new(), "step {step}");
        let names: BTreeSet<&str> = asked.iter().map(|span| span.name.as_str()).collect();
        for phase in ["forward", "backward", "reduce", "update"] {
            assert!(names.contains(phase), "{phase} is not among them");
        }
    }
    let names = |asked: &[&Span]| asked.iter().map(|span| span.name.clone()).collect::<Vec<_>>();
    for later in &asked[2..] {
        assert_eq!(names(later), names(&asked[1]), "the same operations in every step");
    }
}

/// A method whose loss looks at a number.
struct Curious(mae::Mae, fn(&Tensor) -> Tensor);

impl Method for Curious {
    fn loss(&self, w: &Weights, batch: &Batch) -> Result<Vec<Term>> {
        let terms = self.0.loss(w, batch)?;
        Ok(terms.into_iter().map(|term| Term { name: term.name, sum: self.1(&term.sum) }).collect())
    }
    fn recompute(&mut self) {
        self.0.recompute();
    }
    fn work(&self, batch: u64) -> Work {
        self.0.work(batch)
    }
    fn name(&self) -> &'static str {
        self.0.name()
    }
    fn grid(&self) -> &Grid {
        self.0.grid()
    }
    fn table(&self) -> &Table {
        self.0.table()
    }
    fn counts(&self, samples: i64) -> Vec<(&'static str, f64)> {
        self.0.counts(samples)
    }
    fn mask(&self, batch: &Batch) -> Mask {
        self.0.mask(batch)
    }
    fn normalised(&self, batch: &Batch) -> Result<Tensor> {
        self.0.normalised(batch)
    }
    fn features(&self, w: &Weights, batch: &Batch) -> Result<Features> {
        self.0.features(w, batch)
    }
    fn reconstruct(&self, w: &Weights, batch: &Batch) -> Result<Reconstruction> {
        self.0.reconstruct(w, batch)
    }
}

/// One whose loss brings a number to the host.
pub fn curious() -> impl Method {
    Curious(tiny(), |sum| sum * if sum.double_value(&[]) > 0.0 { 1.0 } else { 2.0 })
}

fn a_question_in_a_loss_is_noticed() -> Outcome {
    type Look = fn(&Tensor) -> Tensor;
    let looks: [(&str, Look); 3] = [
        ("aten::item", |sum| sum * if sum.double_value(&[]) > 0.0 { 1.0 } else { 2.0 }),
        ("aten::zeros", |sum| sum * Tensor::from_slice(&[1f32]).sum(Kind::Float)),
        ("aten::nonzero", |sum| sum * sum.view([1]).nonzero().numel() as f64),
    ];
    for (name, look) in looks {
        let steps = recorded(Curious(tiny(), look));
        let found = questions(&asked(&steps[2]));
        assert!(found.contains(name), "{name} is not among {found:?}");
    }
    Ok(())
}

/// Where numbers of the host become constants of a device, once.
const MAKERS: [&str; 5] = [
    "src/op/adamw.rs",
    "src/op/attention/windows.rs",
    "src/op/shuffle.rs",
    "src/part/decoder/windows.rs",
    "src/part/encoder/position.rs",
];

/// Without a device, a copy to it does nothing and is not noticed above: the sources are looked at. Views are the host's.
fn nothing_that_a_loss_is_made_of_moves_numbers_between_host_and_device() -> Outcome {
    const MOVES: [&str; 5] = [".to_device(", "from_slice(", "double_value(", "int64_value(", "try_from(&"];
    let mut looked_at = 0;
    for folder in ["src/op", "src/part", "src/method"] {
        for path in files(folder, "rs") {
            let (place, text) = (short(&path), text(&path));
            if MAKERS.contains(&place.as_str()) || place.starts_with("src/part/view/") {
                continue;
            }
            looked_at += 1;
            for line in text.lines().map(|line| line.split("//").next().unwrap_or("")) {
                assert!(
                    !MOVES.iter().any(|call| line.contains(call)),
                    "{place}: a captured step cannot do this: {line}"
                );
            }
        }
    }
    assert!(looked_at > 40, "{looked_at} files");
    Ok(())
}

/// Bytes of tensors after each step, in a process of its own. Returns the exit code.
pub fn case() -> i32 {
    keep_memory();
    let mut run = Run::new(tiny(), alone());
    for step in 0..6 {
        let _ = run.step(step);
        println!("{}", memory_in_use());
    }
    0
}

fn a_step_ahead_leaves_no_memory_behind() -> Outcome {
    let (code, told, why) = run("pace-memory")?;
    assert_eq!(code, Some(0), "{why}");
    let held: Vec<usize> = told.lines().map(|line| line.parse().expect("bytes")).collect();
    assert_eq!(held.len(), 6, "{told}");
    assert!(held[1] > 100_000 && held[1..].iter().all(|bytes| *bytes == held[1]), "{held:?}");
    Ok(())
}

fn a_share_of_another_size_or_kind_is_refused() -> Outcome {
    let mut run = Run::new(tiny(), alone());
    let other = load(0, BATCH - 1, run.world.as_ref(), 4);
    let fault = run.ahead.step(&mut run.stepper, &other, LR).expect_err("9 samples of 10");
    assert!(fault.message.contains("9 samples") && fault.message.contains("share is 10"), "{fault}");
    let _ = run.step(0);
    let floats = Share { micro: 4, ..spoiled(1, run.world.as_ref(), usize::MAX) };
    let fault = run.ahead.step(&mut run.stepper, &floats, LR).expect_err("floats after bytes");
    assert!(fault.message.contains("Float, seed 5, after") && fault.message.contains("Uint8"), "{fault}");
    Ok(())
}

fn on_a_cpu_the_host_looks_at_every_step() -> Outcome {
    assert_eq!(tiny().capturable(), Ok(()), "it is the device that is missing");
    let world = alone();
    let mut stepper = stepper(tiny(), world.clone(), Kind::Float, BUCKET);
    let mut pace = Pace::new(true, BATCH, &stepper, &world)?;
    assert!(matches!(pace, Pace::Watched));
    let outcome = pace.step(&mut stepper, &load(0, BATCH, world.as_ref(), 4), LR)?;
    assert!(outcome.is_some_and(|outcome| outcome.loss > 0.0), "at once");
    assert!(pace.settle(&stepper)?.is_none());
    Ok(())
}

fn a_method_whose_masks_are_drawn_on_the_host_is_not_captured() -> Outcome {
    let wide = Input { height: 260, width: 260, ..input() };
    let config = json!({
        "encoder": {"width": 4, "depth": 1, "heads": 1}, "decoder": {"width": 4, "depth": 1, "heads": 1},
        "mask": {"ratio": 0.75},
    });
    let method = mae::Mae::new(&serde_json::from_value(config)?, &wide)?;
    assert_eq!(method.grid().tokens(), 65 * 65);
    assert!(method.capturable().is_err_and(|why| why.contains("drawn on the host")));
    Ok(())
}

fn late_outcomes_are_those_of_their_steps_and_too_many_bad_ones_end_the_training() -> Outcome {
    let outcome = |bad: bool| step::Outcome {
        loss: 1.0,
        terms: Vec::new(),
        local_loss: 1.0,
        grad_norm: 1.0,
        clip_scale: 1.0,
        bad_ranks: if bad { vec![1] } else { Vec::new() },
        comm_wait: Duration::ZERO,
    };
    for late in [0, 1] {
        let mut ledger = Ledger::new(3, false);
        let taken = |step| Taken { step, lr: 0.1, began: Instant::now(), waited: Duration::ZERO, frames: 1 };
        let bad = [true, true, false, true, true, true];
        let mut told = Vec::new();
        for step in 0..bad.len() + late {
            ledger.taken(taken(step as u64));
            if let Some(due) = step.checked_sub(late) {
                match ledger.told(&outcome(bad[due])) {
                    Ok((taken, _)) => told.push(taken.step),
                    Err(fault) => {
                        assert_eq!((fault.code, step), (Code::Failed, 5 + late), "{fault}");
                        assert!(
                            fault.message.contains("3 steps in a row") && fault.message.contains("step 5"),
                            "{fault}"
                        );
                        told.push(99);
                    }
                }
            }
        }
        assert_eq!(told, [0, 1, 2, 3, 4, 99], "{late} steps late");
    }
    // Steps that overlap share the time; one that began after the last outcome has its own.
    let mut ledger = Ledger::new(3, false);
    let long_ago = Instant::now() - Duration::from_secs(60);
    for step in [0, 1] {
        ledger.taken(Taken { step, lr: 0.1, began: long_ago, waited: Duration::ZERO, frames: 1 });
    }
    assert!(ledger.told(&outcome(false))?.1 >= Duration::from_secs(60));
    assert!(ledger.told(&outcome(false))?.1 < Duration::from_secs(30), "counted from the outcome before");
    Ok(())
}
