//! The parts of a frozen probe against other people's code, on one to three ranks.

use crate::support::{Outcome, Tensors, distance, normal, oracle, read, write};
use occlude::device::World;
use occlude::device::solo::threads;
use occlude::optim::lars::{Lars, Numbers};
use occlude::run::evaluate::features::Set;
use occlude::run::evaluate::head::Head;
use occlude::run::evaluate::nearest::Vote;
use occlude::run::evaluate::paper::{Paper, piece};
use occlude::run::evaluate::progress::line;
use occlude::run::evaluate::ranks::Ranks;
use serde_json::{Value, json};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;
use tch::{Device, Kind, Tensor};

crate::trials![
    twenty_updates_of_lars_agree_with_the_published_rule,
    the_head_agrees_with_batch_norm_and_linear_of_pytorch,
    a_vote_agrees_with_one_counted_by_hand,
    shares_of_any_length_are_gathered_in_order,
    the_paper_s_rate_rises_and_falls_over_updates,
    a_batch_is_read_in_equal_pieces,
    a_line_of_progress_says_how_far_and_how_long,
];

/// What a script answers.
fn ask(script: &str, asked: &[(String, Tensor)], numbers: &Value) -> Result<Tensors, libtest_mimic::Failed> {
    let folder = tempfile::tempdir()?;
    let [request, reply] = ["request", "reply"].map(|name| folder.path().join(name));
    write(&request, asked)?;
    oracle(script, &[request.to_str().unwrap(), reply.to_str().unwrap(), &numbers.to_string()])?;
    read(&reply)
}

fn near(what: &str, ours: &Tensor, wanted: &Tensor, share: f64) {
    assert_eq!(ours.size(), wanted.size(), "{what}");
    let (off, norm) = (distance(ours, wanted), wanted.norm().double_value(&[]));
    assert!(off <= share * norm, "{what}: ‖Δ‖ = {off:e} of {norm:e}");
}

fn ranks(world: &Arc<dyn World>) -> Ranks {
    Ranks::join(world, 60.0, 60.0).expect("a channel")
}

fn twenty_updates_of_lars_agree_with_the_published_rule() -> Outcome {
    const STEPS: u64 = 20;
    for weight_decay in [0.0, 0.1] {
        // A matrix, a vector, a matrix that begins at 0, one whose gradient is 0 in between, three dimensions.
        let shapes = [&[17, 31][..], &[31], &[5, 3], &[4, 6], &[2, 3, 4]];
        let begin = |i: usize| normal(i as u64, shapes[i]) * if i == 2 { 0.0 } else { 0.3 };
        let gradient = |step: u64, i: usize| {
            let rests = i == 3 && (5..8).contains(&step);
            normal(1000 + step * 10 + i as u64, shapes[i]) * if rests { 0.0 } else { 0.1 * (1 + step % 3) as f64 }
        };
        let lr: Vec<f64> = (0..STEPS).map(|step| 6.4 * (step + 1) as f64 / STEPS as f64).collect();
        let weights: Vec<Tensor> = (0..shapes.len()).map(begin).collect();
        let mut asked: Vec<_> = weights.iter().enumerate().map(|(i, w)| (format!("weight.{i}"), w.copy())).collect();
        for step in 0..STEPS {
            asked.extend((0..shapes.len()).map(|i| (format!("grad.{step}.{i}"), gradient(step, i))));
        }
        let numbers = json!({
            "tensors": shapes.len(), "lr": lr, "momentum": 0.9, "weight_decay": weight_decay, "trust": 0.001
        });
        let theirs = ask("lars.py", &asked, &numbers)?;
        let mut lars = Lars::new(&weights, Numbers { momentum: 0.9, weight_decay, trust: 0.001 });
        for (step, &lr) in (0..).zip(&lr) {
            let gradients: Vec<Tensor> = (0..shapes.len()).map(|i| gradient(step, i)).collect();
            lars.update(&weights, &gradients, lr);
        }
        for (i, weight) in weights.iter().enumerate() {
            near(&format!("weight {i} with decay {weight_decay}"), weight, &theirs[&format!("weight.{i}")], 1e-6);
            assert!(distance(weight, &begin(i)) > 0.01 * begin(i).norm().double_value(&[]), "weight {i} has moved");
        }
    }
    Ok(())
}

/// Updates of the head: rates that move the weights by some per cent each.
const LR: [f64; 6] = [0.0, 20.0, 40.0, 60.0, 30.0, 10.0];
const WIDTH: i64 = 11;
const CLASSES: i64 = 5;
const BATCH: i64 = 23;

/// Features far from 0, and their classes.
fn batch(step: usize) -> (Tensor, Tensor) {
    let x = normal(50 + step as u64, &[BATCH, WIDTH]) * 3.0 + normal(49, &[WIDTH]) * 10.0;
    let row = Tensor::arange(BATCH, (Kind::Int64, Device::Cpu));
    (x, (&row * &row + step as i64).remainder(CLASSES))
}

/// The rows of each rank: uneven, and one rank of three has none.
fn cut(size: usize, rank: usize) -> Range<i64> {
    let bounds = [&[0, 23][..], &[0, 9, 23], &[0, 17, 17, 23]][size - 1];
    bounds[rank]..bounds[rank + 1]
}

/// What a rank finds on its way through the updates, by name.
fn train(world: &Arc<dyn World>) -> Tensors {
    let (mut ranks, mut head) = (ranks(world), Head::new(WIDTH, CLASSES, 3));
    let mut found = Tensors::new();
    for (step, lr) in LR.into_iter().enumerate() {
        let rows = cut(world.size(), world.rank());
        let (x, labels) = batch(step);
        let part = |x: &Tensor| x.narrow(0, rows.start, rows.end - rows.start);
        // The same batch by two doors: one shows its gradients, the other moves the weights.
        let mut looked = Head::new(WIDTH, CLASSES, 3);
        looked.weights = head.weights.each_ref().map(|weight| weight.detach().copy().set_requires_grad(true));
        let seen = looked.gradients(&part(&x), &part(&labels), &mut ranks).expect("gradients");
        let loss = head.step(&part(&x), &part(&labels), lr, &mut ranks).expect("an update");
        assert_eq!(loss, seen.loss);
        let [weight, bias] = seen.gradients;
        found.insert(format!("weight_gradient.{step}"), weight);
        found.insert(format!("bias_gradient.{step}"), bias);
        found.insert(format!("mean.{step}"), head.norm.mean.copy());
        found.insert(format!("variance.{step}"), head.norm.variance.copy());
        found.insert(format!("loss.{step}"), Tensor::from_slice(&[loss]));
    }
    found.insert("weight".into(), head.weights[0].detach());
    found.insert("bias".into(), head.weights[1].detach());
    found.insert("scores".into(), head.scores(&batch(77).0));
    found
}

fn the_head_agrees_with_batch_norm_and_linear_of_pytorch() -> Outcome {
    let first = Head::new(WIDTH, CLASSES, 3);
    let mut asked = vec![("test".to_string(), batch(77).0)];
    asked.extend(["weight", "bias"].iter().zip(&first.weights).map(|(name, w)| (name.to_string(), w.detach().copy())));
    for step in 0..LR.len() {
        let (x, labels) = batch(step);
        asked.extend([(format!("x.{step}"), x), (format!("labels.{step}"), labels)]);
    }
    let theirs = ask("probe_head.py", &asked, &json!({"lr": LR}))?;
    for size in 1..=3 {
        for (rank, ours) in threads(size, |world| train(&world)).into_iter().enumerate() {
            for (name, ours) in &ours {
                let what = format!("{name} on rank {rank} of {size}");
                match name.strip_prefix("loss.") {
                    Some(step) => near(&what, ours, &theirs["loss"].narrow(0, step.parse()?, 1), 1e-5),
                    None => near(&what, ours, &theirs[name], 1e-5),
                }
            }
        }
    }
    near("the first weight", &first.weights[0].std(true), &Tensor::from_slice(&[0.01f32]).squeeze(), 0.3);
    assert!(distance(&theirs["weight"], &first.weights[0]) > 0.05 * first.weights[0].norm().double_value(&[]));
    Ok(())
}

fn a_vote_agrees_with_one_counted_by_hand() -> Outcome {
    let (samples, classes) = (60, 4);
    let labels = (Tensor::arange(samples, (Kind::Int64, Device::Cpu)) * 7).remainder(classes);
    // Classes lean their own way, so that votes are neither all alike nor all right.
    let lean = normal(3, &[classes, 7]).index_select(0, &labels);
    let train = normal(1, &[samples, 7]) + lean * 0.5;
    let test = normal(2, &[50, 7]);
    let set = Set { x: train.copy(), labels: labels.copy(), left_out: 0 };
    let mut answers = Vec::new();
    // More neighbours than there are; a temperature at which the bare exponential would overflow.
    for (k, temperature) in [(20, 0.07), (1, 0.07), (7, 1.0), (100, 0.5), (20, 0.005)] {
        let asked = [("train".into(), train.copy()), ("labels".into(), labels.copy()), ("test".into(), test.copy())];
        let theirs = ask("neighbours.py", &asked, &json!({"k": k, "temperature": temperature}))?;
        let ours = Vote { k, temperature }.classes(&set, &test);
        assert_eq!(ours, theirs["classes"], "k {k}, temperature {temperature}");
        answers.push(Vec::<i64>::try_from(ours)?);
    }
    answers.dedup();
    assert!(answers.len() > 2, "the numbers of the vote make no difference");
    assert_eq!(Vote::default().classes(&set, &test.narrow(0, 0, 0)).size(), [0], "a rank without samples");
    Ok(())
}

fn shares_of_any_length_are_gathered_in_order() -> Outcome {
    for lengths in [&[4][..], &[2, 5], &[0, 7, 3], &[0, 0, 1]] {
        let total: i64 = lengths.iter().sum();
        let all = threads(lengths.len(), |world| {
            let before: i64 = lengths[..world.rank()].iter().sum();
            let whole = normal(4, &[total, 3]);
            let mut ranks = ranks(&world);
            let labels = Tensor::arange(total, (Kind::Int64, Device::Cpu)).narrow(0, before, lengths[world.rank()]);
            let rows = ranks.gather(&whole.narrow(0, before, lengths[world.rank()])).expect("rows");
            (rows, ranks.gather(&labels).expect("labels"), ranks.largest(before).expect("the largest"))
        });
        let last: i64 = lengths[..lengths.len() - 1].iter().sum();
        for (rows, labels, largest) in all {
            assert_eq!(rows, normal(4, &[total, 3]), "{lengths:?}");
            assert_eq!(labels, Tensor::arange(total, (Kind::Int64, Device::Cpu)), "{lengths:?}");
            assert_eq!(largest, last);
        }
    }
    Ok(())
}

fn the_paper_s_rate_rises_and_falls_over_updates() -> Outcome {
    let paper = Paper::default();
    let curve = paper.schedule(16384, 78);
    let close = |step: u64, wanted: f64| assert!((curve.at(step) - wanted).abs() < 1e-12, "{step}: {}", curve.at(step));
    close(0, 0.0);
    close(39, 6.4 * 0.05);
    close(780, 6.4);
    close(780 + 40 * 78, 3.2);
    close(90 * 78, 0.0);
    assert_eq!(paper.schedule(512, 10).peak, 0.2);
    // ImageNet's 1,281,167 samples, and a set too small for the paper's rate.
    assert!((paper.reach(16384, 78) - 224.64).abs() < 0.01, "{}", paper.reach(16384, 78));
    assert!(paper.reach(208, 1) < 0.05, "{}", paper.reach(208, 1));
    Ok(())
}

fn a_batch_is_read_in_equal_pieces() -> Outcome {
    for (batch, ranks, wanted) in [
        (16384, 8, 2048),
        (16384, 3, 512),
        (16384, 100, 16384),
        (208, 1, 208),
        (8192, 1, 256),
        (16381, 2, 16381),
        (3, 5, 3),
    ] {
        assert_eq!(piece(batch, ranks), wanted, "{batch} on {ranks}");
        assert_eq!(batch % wanted, 0);
    }
    Ok(())
}

fn a_line_of_progress_says_how_far_and_how_long() -> Outcome {
    let taken = Duration::from_secs(30);
    assert_eq!(line("test set", 25, 100, taken, ""), "test set: 25 %, eta 00:01:30");
    assert_eq!(line("test set", 0, 100, taken, "loss 1"), "test set: 0 %, eta unknown, loss 1");
    assert_eq!(line("test set", 0, 0, taken, ""), "test set: 0 %, eta unknown");
    Ok(())
}
