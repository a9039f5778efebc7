//! Tests of the parts of a frozen probe against other implementations, on one to three ranks.

use crate::support::{Outcome, Tensors, distance, normal, oracle, read, write};
use occlude::dist::World;
use occlude::dist::solo::run_on_threads;
use occlude::evaluate::features::{FeatureSet, dot_products};
use occlude::evaluate::head::ProbeHead;
use occlude::evaluate::knn::KnnOptions;
use occlude::evaluate::linear_paper::Paper;
use occlude::evaluate::progress::format_line;
use occlude::evaluate::ranks::Ranks;
use occlude::optim::lars::{Lars, LarsOptions};
use serde_json::{Value, json};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;
use tch::{Device, Kind, Tensor};

crate::trials![
    twenty_lars_updates_match_the_published_rule,
    the_head_matches_batch_norm_and_linear_of_pytorch,
    nearest_neighbor_votes_match_a_manual_count,
    local_results_of_any_length_are_gathered_in_order,
    the_paper_learning_rate_warms_up_and_decays,
    equal_rows_have_equal_dot_products,
    a_progress_line_shows_fraction_and_remaining_time,
];

/// Returns the tensors that a script replies.
fn query_oracle(script: &str, query: &[(String, Tensor)], numbers: &Value) -> Result<Tensors, libtest_mimic::Failed> {
    let folder = tempfile::tempdir()?;
    let [request, reply] = ["request", "reply"].map(|name| folder.path().join(name));
    write(&request, query)?;
    oracle(script, &[request.to_str().unwrap(), reply.to_str().unwrap(), &numbers.to_string()])?;
    read(&reply)
}

fn assert_close(label: &str, ours: &Tensor, expected: &Tensor, local_batch: f64) {
    assert_eq!(ours.size(), expected.size(), "{label}");
    let difference = distance(ours, expected);
    let norm = expected.norm().double_value(&[]);
    assert!(difference <= local_batch * norm, "{label}: ‖Δ‖ = {difference:e} of {norm:e}");
}

fn ranks(world: &Arc<dyn World>) -> Ranks {
    Ranks::join(world, 60.0, 60.0).expect("a channel")
}

fn twenty_lars_updates_match_the_published_rule() -> Outcome {
    const STEPS: u64 = 20;
    for weight_decay in [0.0, 0.1] {
        // A matrix, a vector, a matrix that starts at 0, one whose gradient is 0 in between, three dimensions.
        let shapes = [&[17, 31][..], &[31], &[5, 3], &[4, 6], &[2, 3, 4]];
        let begin = |i: usize| normal(i as u64, shapes[i]) * if i == 2 { 0.0 } else { 0.3 };
        let gradient = |step: u64, i: usize| {
            let rests = i == 3 && (5..8).contains(&step);
            normal(1000 + step * 10 + i as u64, shapes[i]) * if rests { 0.0 } else { 0.1 * (1 + step % 3) as f64 }
        };
        let lr: Vec<f64> = (0..STEPS).map(|step| 6.4 * (step + 1) as f64 / STEPS as f64).collect();
        let weights: Vec<Tensor> = (0..shapes.len()).map(begin).collect();
        let mut request: Vec<_> = weights.iter().enumerate().map(|(i, w)| (format!("weight.{i}"), w.copy())).collect();
        for step in 0..STEPS {
            request.extend((0..shapes.len()).map(|i| (format!("grad.{step}.{i}"), gradient(step, i))));
        }
        let numbers = json!({
            "tensors": shapes.len(), "lr": lr, "momentum": 0.9, "weight_decay": weight_decay, "trust": 0.001
        });
        let reference = query_oracle("lars.py", &request, &numbers)?;
        let mut lars = Lars::new(&weights, LarsOptions { momentum: 0.9, weight_decay, trust_coefficient: 0.001 });
        for (step, &lr) in (0..).zip(&lr) {
            let gradients: Vec<Tensor> = (0..shapes.len()).map(|i| gradient(step, i)).collect();
            lars.update(&weights, &gradients, lr);
        }
        for (i, weight) in weights.iter().enumerate() {
            assert_close(
                &format!("weight {i} with decay {weight_decay}"),
                weight,
                &reference[&format!("weight.{i}")],
                1e-6,
            );
            assert!(distance(weight, &begin(i)) > 0.01 * begin(i).norm().double_value(&[]), "weight {i} has changed");
        }
    }
    Ok(())
}

/// Learning rates of the head, which move the weights by some percent per update.
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

/// Returns the rows of each rank: uneven, and one rank of three has none.
fn local_rows(size: usize, rank: usize) -> Range<i64> {
    let bounds = [&[0, 23][..], &[0, 9, 23], &[0, 17, 17, 23]][size - 1];
    bounds[rank]..bounds[rank + 1]
}

/// Returns the values that a rank records during the updates, by name.
fn train(world: &Arc<dyn World>) -> Tensors {
    let mut ranks = ranks(world);
    let mut head = ProbeHead::new(WIDTH, CLASSES, 3);
    let mut found = Tensors::new();
    for (step, lr) in LR.into_iter().enumerate() {
        let rows = local_rows(world.size(), world.rank());
        let (x, labels) = batch(step);
        let part = |x: &Tensor| x.narrow(0, rows.start, rows.end - rows.start);
        // The same batch in two ways: one exposes its gradients, the other updates the weights.
        let mut looked = ProbeHead::new(WIDTH, CLASSES, 3);
        looked.weights = head.weights.each_ref().map(|weight| weight.detach().copy().set_requires_grad(true));
        let visible = looked.loss_and_gradients(&part(&x), &part(&labels), &mut ranks).expect("gradients");
        let loss = head.step(&part(&x), &part(&labels), lr, &mut ranks).expect("an update");
        assert_eq!(loss, visible.loss);
        let [weight, bias] = visible.gradients;
        found.insert(format!("weight_gradient.{step}"), weight);
        found.insert(format!("bias_gradient.{step}"), bias);
        found.insert(format!("mean.{step}"), head.batch_norm.running_mean.copy());
        found.insert(format!("variance.{step}"), head.batch_norm.running_var.copy());
        found.insert(format!("loss.{step}"), Tensor::from_slice(&[loss]));
    }
    found.insert("weight".into(), head.weights[0].detach());
    found.insert("bias".into(), head.weights[1].detach());
    found.insert("scores".into(), head.logits(&batch(77).0));
    found
}

fn the_head_matches_batch_norm_and_linear_of_pytorch() -> Outcome {
    let first = ProbeHead::new(WIDTH, CLASSES, 3);
    let mut request = vec![("test".to_string(), batch(77).0)];
    request
        .extend(["weight", "bias"].iter().zip(&first.weights).map(|(name, w)| (name.to_string(), w.detach().copy())));
    for step in 0..LR.len() {
        let (x, labels) = batch(step);
        request.extend([(format!("x.{step}"), x), (format!("labels.{step}"), labels)]);
    }
    let reference = query_oracle("probe_head.py", &request, &json!({"lr": LR}))?;
    for size in 1..=3 {
        for (rank, ours) in run_on_threads(size, |world| train(&world)).into_iter().enumerate() {
            for (name, ours) in &ours {
                let label = format!("{name} on rank {rank} of {size}");
                match name.strip_prefix("loss.") {
                    Some(step) => assert_close(&label, ours, &reference["loss"].narrow(0, step.parse()?, 1), 1e-5),
                    None => assert_close(&label, ours, &reference[name], 1e-5),
                }
            }
        }
    }
    assert_close("the first weight", &first.weights[0].std(true), &Tensor::from_slice(&[0.01f32]).squeeze(), 0.3);
    assert!(distance(&reference["weight"], &first.weights[0]) > 0.05 * first.weights[0].norm().double_value(&[]));
    Ok(())
}

fn nearest_neighbor_votes_match_a_manual_count() -> Outcome {
    let samples = 60;
    let classes = 4;
    let labels = (Tensor::arange(samples, (Kind::Int64, Device::Cpu)) * 7).remainder(classes);
    // Classes have different means, so that votes are neither all alike nor all right.
    let lean = normal(3, &[classes, 7]).index_select(0, &labels);
    let train = normal(1, &[samples, 7]) + lean * 0.5;
    let test = normal(2, &[50, 7]);
    let set = FeatureSet { features: train.copy(), labels: labels.copy(), skipped: 0 };
    let mut replies = Vec::new();
    // More neighbors than there are samples; a temperature at which the plain exponential would overflow.
    for (k, temperature) in [(20, 0.07), (1, 0.07), (7, 1.0), (100, 0.5), (20, 0.005)] {
        let request = [("train".into(), train.copy()), ("labels".into(), labels.copy()), ("test".into(), test.copy())];
        let reference = query_oracle("neighbors.py", &request, &json!({"k": k, "temperature": temperature}))?;
        let ours = KnnOptions { k, temperature }.predict(&set, &test);
        assert_eq!(ours, reference["classes"], "k {k}, temperature {temperature}");
        replies.push(Vec::<i64>::try_from(ours)?);
    }
    replies.dedup();
    assert!(replies.len() > 2, "k and temperature have no effect");
    assert_eq!(KnnOptions::default().predict(&set, &test.narrow(0, 0, 0)).size(), [0], "a rank without samples");
    Ok(())
}

fn local_results_of_any_length_are_gathered_in_order() -> Outcome {
    for lengths in [&[4][..], &[2, 5], &[0, 7, 3], &[0, 0, 1]] {
        let total: i64 = lengths.iter().sum();
        let all = run_on_threads(lengths.len(), |world| {
            let before: i64 = lengths[..world.rank()].iter().sum();
            let full = normal(4, &[total, 3]);
            let mut ranks = ranks(&world);
            let labels = Tensor::arange(total, (Kind::Int64, Device::Cpu)).narrow(0, before, lengths[world.rank()]);
            let rows = ranks.all_gather(&full.narrow(0, before, lengths[world.rank()])).expect("rows");
            (rows, ranks.all_gather(&labels).expect("labels"), ranks.all_reduce_max(before).expect("the largest"))
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

fn the_paper_learning_rate_warms_up_and_decays() -> Outcome {
    let paper = Paper::default();
    let curve = paper.schedule(16384, 78);
    let close = |step: u64, expected: f64| {
        assert!((curve.lr_at(step) - expected).abs() < 1e-12, "{step}: {}", curve.lr_at(step))
    };
    close(0, 0.0);
    close(39, 6.4 * 0.05);
    close(780, 6.4);
    close(780 + 40 * 78, 3.2);
    close(90 * 78, 0.0);
    assert_eq!(paper.schedule(512, 10).peak_lr, 0.2);
    // The 1,281,167 samples of ImageNet, and a set too small for the learning rate of the paper.
    assert!((paper.max_relative_update(16384, 78) - 224.64).abs() < 0.01, "{}", paper.max_relative_update(16384, 78));
    assert!(paper.max_relative_update(208, 1) < 0.05, "{}", paper.max_relative_update(208, 1));
    Ok(())
}

/// The dot product depends neither on the position of a row nor on the number of the others.
fn equal_rows_have_equal_dot_products() -> Outcome {
    let rows = normal(8, &[7, 45]);
    let x = normal(9, &[31, 45]);
    let y = Tensor::cat(&[&rows; 9], 0);
    let all = dot_products(&x, &y);
    for part in all.split(7, 1) {
        assert_eq!(part, all.narrow(1, 0, 7));
    }
    for first in 0..31 {
        assert_eq!(dot_products(&x.narrow(0, first, 31 - first), &y), all.narrow(0, first, 31 - first));
    }
    Ok(())
}

fn a_progress_line_shows_fraction_and_remaining_time() -> Outcome {
    let done = Duration::from_secs(30);
    assert_eq!(format_line("test set", 25, 100, done, ""), "test set: 25 %, eta 00:01:30");
    assert_eq!(format_line("test set", 0, 100, done, "loss 1"), "test set: 0 %, eta unknown, loss 1");
    assert_eq!(format_line("test set", 0, 0, done, ""), "test set: 0 %, eta unknown");
    Ok(())
}
