//! Teachers, buffers, scheduled values, labels and views, proven by a toy method that uses all of them: the same on 1 to 4
//! ranks, in micro-batches, pipelined and with a sharded optimizer; resumed to the bit; unmoved by a refused step.

use super::step::SOON;
use super::toy::{BATCH, CLASSES, QUEUE, Toy, WIDTH, local_batch, rates, stepper};
use crate::support::Outcome;
use occlude::bridge::bytes;
use occlude::checkpoint::{FORMAT_VERSION, LoadedCheckpoint, Manifest, NamedTensor};
use occlude::dist::World;
use occlude::dist::solo::{SoloWorld, run_on_threads};
use occlude::part::batch::NO_LABEL;
use occlude::part::teacher::Every;
use occlude::train::state;
use occlude::train::step::Stepper;
use occlude::train::step_mode::StepPipeline;
use serde_json::json;
use std::sync::Arc;
use tch::{Device, Kind, Tensor, no_grad};

crate::trials![
    one_to_four_ranks_move_teacher_center_and_queue_alike,
    micro_batches_move_teacher_and_center_alike,
    a_pipelined_step_moves_teacher_center_and_queue_alike,
    a_sharded_teacher_is_the_plain_one,
    a_teacher_by_epoch_moves_in_the_last_step_of_an_epoch,
    a_teacher_in_bf16_moves_because_its_average_is_fp32,
    a_queue_holds_the_newest_rows_in_the_order_of_the_global_batch,
    samples_without_a_label_have_no_part_in_the_labeled_term,
    a_refused_step_moves_neither_teacher_nor_buffers,
    a_restored_training_goes_on_to_the_bit,
    a_dump_holds_teacher_buffers_labels_views_and_scheduled_values,
    no_gradient_reaches_teacher_or_buffers,
];

/// The state that a training leaves.
#[derive(Debug)]
struct State {
    losses: Vec<f64>,
    weights: Tensor,
    teacher: Tensor,
    center: Tensor,
    queue: Tensor,
}

impl State {
    fn of(stepper: &Stepper, losses: Vec<f64>) -> State {
        let teacher = stepper.teacher.as_ref().expect("a teacher");
        let values: Vec<Tensor> = stepper.buffers.iter().map(|(_, value)| value.copy()).collect();
        let [center, queue] = <[Tensor; 2]>::try_from(values).expect("two buffers");
        let full = |buffer: &Tensor| {
            let mut all = Vec::new();
            let visit = |_: usize, full: &Tensor| {
                all.push(full.reshape([-1]).copy());
                Ok(())
            };
            stepper.buckets.for_each_full(&stepper.flat, buffer, SOON, visit).expect("full tensors");
            all.sort_by_key(Tensor::numel);
            Tensor::cat(&all, 0)
        };
        State {
            losses,
            weights: full(&stepper.flat.master),
            // The projection is the larger of the two parameters.
            teacher: full(&teacher.average).narrow(0, CLASSES * WIDTH, WIDTH * 256),
            center,
            queue,
        }
    }

    fn agrees(&self, other: &State, what: &str) {
        let off =
            |a: &Tensor, b: &Tensor| (a - b).abs().max().double_value(&[]) / b.abs().max().double_value(&[]).max(1e-6);
        for (step, (a, b)) in self.losses.iter().zip(&other.losses).enumerate() {
            assert!((a - b).abs() <= 1e-5 * b.abs(), "{what}, step {step}: loss {a} against {b}");
        }
        assert_eq!(self.losses.len(), other.losses.len());
        let pairs = [
            ("weights", &self.weights, &other.weights),
            ("teacher", &self.teacher, &other.teacher),
            ("center", &self.center, &other.center),
            ("queue", &self.queue, &other.queue),
        ];
        for (name, a, b) in pairs {
            assert!(off(a, b) <= 1e-5, "{what}: {name} off by {:e}", off(a, b));
        }
    }

    fn bytes(&self) -> Vec<u8> {
        [&self.weights, &self.teacher, &self.center, &self.queue].iter().flat_map(|x| bytes(x).to_vec()).collect()
    }
}

/// A training of some steps in micro-batches of this size.
fn train(world: Arc<dyn World>, method: Toy, steps: u64, micro_batch: usize, is_sharded: bool) -> State {
    let mut stepper = stepper(method, world.clone(), Kind::Float, is_sharded);
    let losses = (0..steps).map(|step| take(&mut stepper, step, world.as_ref(), micro_batch)).collect();
    State::of(&stepper, losses)
}

fn take(stepper: &mut Stepper, step: u64, world: &dyn World, micro_batch: usize) -> f64 {
    let batches = local_batch(step, world, micro_batch).micro_batches(Device::Cpu).expect("batches");
    let outcome = stepper.step(&batches, rates(step), |_, _| Ok(())).expect("a step");
    assert!(outcome.bad_ranks.is_empty());
    outcome.loss
}

fn alone() -> Arc<dyn World> {
    Arc::new(SoloWorld::new(Device::Cpu))
}

fn one_to_four_ranks_move_teacher_center_and_queue_alike() -> Outcome {
    for every in [Every::Step, Every::Epoch] {
        let expected = train(alone(), Toy::new(every, true), 8, 64, false);
        let fresh = train(alone(), Toy::new(every, true), 0, 64, false);
        for (name, a, b) in [
            ("teacher", &expected.teacher, &fresh.teacher),
            ("center", &expected.center, &fresh.center),
            ("queue", &expected.queue, &fresh.queue),
        ] {
            assert!(a != b, "{name} has moved");
        }
        for size in 1..=4 {
            let all = run_on_threads(size, |world| train(world, Toy::new(every, true), 8, 64, false));
            all.iter().for_each(|state| state.agrees(&expected, &format!("{size} ranks, {every:?}")));
            assert!(all.windows(2).all(|pair| pair[0].bytes() == pair[1].bytes()), "all ranks hold the same");
        }
    }
    Ok(())
}

fn micro_batches_move_teacher_and_center_alike() -> Outcome {
    let expected = train(alone(), Toy::new(Every::Step, false), 6, 64, false);
    for (ranks, micro_batch) in [(1, 5), (2, 4), (3, 1)] {
        let all = run_on_threads(ranks, |world| train(world, Toy::new(Every::Step, false), 6, micro_batch, false));
        all.iter().for_each(|state| state.agrees(&expected, &format!("{ranks} ranks, micro-batches of {micro_batch}")));
    }
    Ok(())
}

fn a_pipelined_step_moves_teacher_center_and_queue_alike() -> Outcome {
    let expected = train(alone(), Toy::new(Every::Epoch, true), 8, 64, false);
    for size in 1..=3 {
        let all = run_on_threads(size, |world| {
            let mut stepper = stepper(Toy::new(Every::Epoch, true), world.clone(), Kind::Float, false);
            let mut pipeline = StepPipeline::new(BATCH, &stepper, &world).expect("a pipeline");
            let mut losses = Vec::new();
            for step in 0..8 {
                let local = local_batch(step, world.as_ref(), 64);
                losses.extend(pipeline.step(&mut stepper, &local, rates(step)).expect("a step").map(|o| o.loss));
            }
            losses.extend(pipeline.flush(&stepper).expect("the last step").map(|outcome| outcome.loss));
            State::of(&stepper, losses)
        });
        all.iter().for_each(|state| state.agrees(&expected, &format!("{size} ranks, pipelined")));
    }
    Ok(())
}

fn a_sharded_teacher_is_the_plain_one() -> Outcome {
    let expected = train(alone(), Toy::new(Every::Step, true), 6, 64, false);
    for size in 2..=4 {
        let all = run_on_threads(size, |world| train(world, Toy::new(Every::Step, true), 6, 64, true));
        all.iter().for_each(|state| state.agrees(&expected, &format!("{size} shards")));
    }
    Ok(())
}

fn a_teacher_by_epoch_moves_in_the_last_step_of_an_epoch() -> Outcome {
    let world = alone();
    let mut stepper = stepper(Toy::new(Every::Epoch, true), world.clone(), Kind::Float, false);
    let mut moved = Vec::new();
    let mut before = State::of(&stepper, vec![]);
    for step in 0..7 {
        take(&mut stepper, step, world.as_ref(), 64);
        let after = State::of(&stepper, vec![]);
        moved.push(after.teacher != before.teacher);
        if moved[step as usize] {
            // Closed form: m · teacher + (1 − m) · student.
            let momentum = 0.9 + 0.05 * rates(step).progress.fraction();
            let student = after.weights.narrow(0, CLASSES * WIDTH, WIDTH * 256);
            let expected = &before.teacher * momentum + student * (1.0 - momentum);
            assert!((expected - &after.teacher).abs().max().double_value(&[]) < 1e-6);
        }
        before = after;
    }
    assert_eq!(moved, [false, false, true, false, false, true, false]);
    Ok(())
}

fn a_teacher_in_bf16_moves_because_its_average_is_fp32() -> Outcome {
    let world = alone();
    let mut stepper = stepper(Toy::new(Every::Step, true), world.clone(), Kind::BFloat16, false);
    let before = State::of(&stepper, vec![]);
    for step in 0..3 {
        take(&mut stepper, step, world.as_ref(), 64);
    }
    let after = State::of(&stepper, vec![]);
    assert!(before.teacher != after.teacher);
    let teacher = stepper.teacher.as_ref().expect("a teacher");
    assert_eq!(teacher.average.kind(), Kind::Float);
    let computed = &teacher.weights.0[0];
    assert_eq!(computed.kind(), Kind::BFloat16);
    let rounded = stepper.flat.param_view(&teacher.average, 0).to_kind(Kind::BFloat16);
    assert!(*computed == rounded, "the loss computes with the average of now");
    Ok(())
}

fn a_queue_holds_the_newest_rows_in_the_order_of_the_global_batch() -> Outcome {
    let method = || Toy::new(Every::Epoch, true);
    // The teacher stays as it began in the first two steps, so that rows can be computed again.
    let all = run_on_threads(3, |world| train(world, method(), 2, 64, false));
    let stepper = stepper(method(), alone(), Kind::Float, false);
    let toy = method();
    let rows = (0..2).map(|step| {
        let batch = local_batch(step, alone().as_ref(), 64).micro_batches(Device::Cpu).expect("a batch");
        no_grad(|| toy.project(&stepper.flat.leaves, &batch[0].views[1]))
    });
    let rows = Tensor::cat(&rows.collect::<Vec<_>>(), 0); // [2 · BATCH, WIDTH]
    let expected = rows.narrow(0, 2 * BATCH as i64 - QUEUE, QUEUE);
    for state in all {
        assert!((&state.queue - &expected).abs().max().double_value(&[]) < 1e-5);
    }
    Ok(())
}

fn samples_without_a_label_have_no_part_in_the_labeled_term() -> Outcome {
    let world = alone();
    let mut stepper = stepper(Toy::new(Every::Step, true), world.clone(), Kind::Float, false);
    let batches = local_batch(0, world.as_ref(), 64).micro_batches(Device::Cpu).expect("a batch");
    let toy = Toy::new(Every::Step, true);
    let (logits, labels) = no_grad(|| {
        let w = &stepper.flat.leaves;
        (toy.project(w, &batches[0].views[0]).matmul(&w[toy.classifier].tr()), batches[0].labels().expect("labels"))
    });
    let rows: Vec<i64> = (0..BATCH as i64).filter(|&row| labels.int64_value(&[row]) != NO_LABEL).collect();
    assert_eq!(rows.len(), 8);
    let nll = |row: &i64| -logits.get(*row).log_softmax(0, Kind::Double).double_value(&[labels.int64_value(&[*row])]);
    let expected = 0.5 * rows.iter().map(nll).sum::<f64>() / 8.0;
    let outcome = stepper.step(&batches, rates(0), |_, _| Ok(())).expect("a step");
    let (name, class) = outcome.terms[1];
    assert_eq!(name, "class");
    assert!((class - expected).abs() < 1e-6 * expected, "{class} against {expected}");
    // A batch without any label has a term of 0, and trains.
    let none = Tensor::full([BATCH as i64], NO_LABEL, (Kind::Int64, Device::Cpu));
    let mut local = local_batch(1, world.as_ref(), 64);
    local.side.labels = Some(none);
    let outcome =
        stepper.step(&local.micro_batches(Device::Cpu).expect("a batch"), rates(1), |_, _| Ok(())).expect("a step");
    assert!(outcome.bad_ranks.is_empty() && outcome.terms[1].1 == 0.0 && outcome.grad_norm > 0.0);
    Ok(())
}

fn a_refused_step_moves_neither_teacher_nor_buffers() -> Outcome {
    for is_pipelined in [false, true] {
        run_on_threads(2, |world| {
            let mut stepper = stepper(Toy::new(Every::Step, true), world.clone(), Kind::Float, false);
            let mut pipeline = StepPipeline::new(BATCH, &stepper, &world).expect("a pipeline");
            let mut run = |stepper: &mut Stepper, step: u64, is_bad: bool| {
                let mut local = local_batch(step, world.as_ref(), 64);
                local.views = local.views.iter().map(|view| view.to_kind(Kind::Float)).collect();
                if is_bad && world.rank() == 1 {
                    let _ = local.views[1].get(0).fill_(f64::NAN);
                }
                if is_pipelined {
                    pipeline.step(stepper, &local, rates(step)).expect("a step");
                    return pipeline.flush(stepper).expect("its outcome").expect("an outcome");
                }
                let batches = local.micro_batches(Device::Cpu).expect("batches");
                stepper.step(&batches, rates(step), |_, _| Ok(())).expect("a step")
            };
            assert!(run(&mut stepper, 0, false).bad_ranks.is_empty());
            let before = State::of(&stepper, vec![]).bytes();
            assert_eq!(run(&mut stepper, 1, true).bad_ranks, [1]);
            assert!(State::of(&stepper, vec![]).bytes() == before, "a refused step has moved something");
            assert!(run(&mut stepper, 2, false).bad_ranks.is_empty());
            assert!(State::of(&stepper, vec![]).bytes() != before);
        });
    }
    Ok(())
}

/// A checkpoint as it is read back.
fn checkpoint_of(step: u64, tensors: Vec<NamedTensor>) -> LoadedCheckpoint {
    let manifest = Manifest {
        format: FORMAT_VERSION,
        build: String::new(),
        step,
        samples: step * BATCH,
        world: 1,
        epoch: 0,
        nonce: String::new(),
        previous: None,
        tensors: tensors.len(),
        parts: vec![],
        meta: json!({}),
        seal: String::new(),
    };
    LoadedCheckpoint { manifest, tensors: tensors.into_iter().map(|tensor| (tensor.name.clone(), tensor)).collect() }
}

/// Restores a stepper from the snapshot of another, as if through a checkpoint.
pub fn restore_from(second: &mut Stepper, first: &Stepper, step: u64, world: &Arc<dyn World>) {
    let snapshot = state::snapshot_tensors(first, world.as_ref()).expect("a snapshot");
    let loaded = snapshot.map(|tensors| checkpoint_of(step, tensors));
    let mut channel = world.open_channel("restore").expect("a channel");
    let restored = state::restore(second, loaded.as_ref(), channel.as_mut()).expect("restored");
    assert_eq!(restored, Some(step));
}

fn a_restored_training_goes_on_to_the_bit() -> Outcome {
    for (size, is_sharded) in [(1, false), (2, false), (3, true)] {
        let whole = run_on_threads(size, |world| train(world, Toy::new(Every::Epoch, true), 7, 64, is_sharded));
        let parts = run_on_threads(size, |world| {
            let mut first = stepper(Toy::new(Every::Epoch, true), world.clone(), Kind::Float, is_sharded);
            for step in 0..4 {
                take(&mut first, step, world.as_ref(), 64);
            }
            let mut second = stepper(Toy::new(Every::Epoch, true), world.clone(), Kind::Float, is_sharded);
            restore_from(&mut second, &first, 4, &world);
            drop(first);
            let losses = (4..7).map(|step| take(&mut second, step, world.as_ref(), 64)).collect();
            State::of(&second, losses)
        });
        for (whole, parts) in whole.iter().zip(&parts) {
            assert_eq!(whole.losses[4..], parts.losses, "{size} ranks");
            assert!(whole.bytes() == parts.bytes(), "{size} ranks");
        }
    }
    Ok(())
}

fn a_dump_holds_teacher_buffers_labels_views_and_scheduled_values() -> Outcome {
    let world = alone();
    let folder = tempfile::tempdir()?;
    let mut stepper = stepper(Toy::new(Every::Step, true), world.clone(), Kind::Float, false);
    let batches = local_batch(0, world.as_ref(), 64).micro_batches(Device::Cpu)?;
    stepper.step(&batches, rates(0), |stepper, outcome| {
        let dump = occlude::train::dump::StepDump {
            step: 0,
            rank: 0,
            method: "toy",
            micro_batches: &batches,
            outcome,
            lr: 0.01,
            weight_decay: 0.0,
        };
        occlude::train::dump::write_step(folder.path(), stepper, &dump)
    })?;
    let file = folder.path().join("dump/step-00000000-rank-0.safetensors");
    let names: Vec<String> = Tensor::read_safetensors(file)?.into_iter().map(|(name, _)| name).collect();
    for name in [
        "teacher.encoder.projection",
        "buffer.center",
        "buffer.queue",
        "scheduled",
        "label",
        "input",
        "input.1",
        "loss",
    ] {
        assert!(names.iter().any(|found| found == name), "{name} is missing from {names:?}");
    }
    assert!(!names.iter().any(|name| name == "teacher.head.classifier"), "the teacher has no classifier");
    Ok(())
}

fn no_gradient_reaches_teacher_or_buffers() -> Outcome {
    let world = alone();
    let mut stepper = stepper(Toy::new(Every::Step, true), world.clone(), Kind::Float, false);
    take(&mut stepper, 0, world.as_ref(), 64);
    let teacher = stepper.teacher.as_ref().expect("a teacher");
    assert!(!teacher.weights.0[0].requires_grad() && !teacher.weights.0[0].grad().defined());
    for (name, value) in stepper.buffers.iter() {
        assert!(!value.requires_grad() && !value.grad().defined(), "{name}");
    }
    Ok(())
}
