//! Tests of R-MAE against two decoders and one encoder of transformers; and the three proofs of its reading: with the
//! target for the second prediction it is MAE, the anchor draws the second prediction there, and without the anchor
//! constant predictions are a solution.

use crate::support::method_ext::MethodExt;
use crate::support::parity;
use crate::support::vit_mae::{Question, VitMaeCase, shape};
use crate::support::{Outcome, normal};
use occlude::interop;
use occlude::method::rmae;
use occlude::part::loss::{masked_mse, mse_between};
use occlude::part::mask::Ratio;
use occlude::part::objective::pixel;
use serde_json::json;
use tch::{Kind, Tensor};

crate::trials![
    a_grayscale_image_matches_transformers,
    an_odd_color_image_matches_transformers,
    a_stopped_gradient_matches_transformers,
    with_the_target_for_the_second_prediction_it_is_mae,
    a_heavier_anchor_draws_the_second_prediction_to_the_target,
    without_an_anchor_constant_predictions_are_a_solution,
];

const STEPS: u64 = 3;

#[derive(Clone, Copy)]
struct Case {
    model: VitMaeCase,
    anchor: f64,
    stop_gradient: bool,
}

fn gray() -> Case {
    Case { model: VitMaeCase::gray(), anchor: 1.0, stop_gradient: false }
}

fn a_grayscale_image_matches_transformers() -> Outcome {
    gray().check()
}

fn an_odd_color_image_matches_transformers() -> Outcome {
    let shapes = VitMaeCase { encoder: shape(60, 2, 5), decoder: shape(36, 2, 3), ..VitMaeCase::gray() };
    let model = VitMaeCase { batch: 3, channels: 3, side: 24, patch: 6, ratio: 0.75, ..shapes };
    Case { model, anchor: 0.4, ..gray() }.check()
}

fn a_stopped_gradient_matches_transformers() -> Outcome {
    let shapes = VitMaeCase { encoder: shape(44, 2, 11), decoder: shape(28, 3, 7), ..VitMaeCase::gray() };
    let model = VitMaeCase { batch: 2, channels: 3, side: 32, patch: 8, ratio: 0.5, ..shapes };
    Case { model, stop_gradient: true, ..gray() }.check()
}

impl Case {
    fn method(&self) -> Result<rmae::RMae, occlude::error::Error> {
        let config = rmae::Config {
            encoder: self.model.encoder,
            decoder: self.model.decoder,
            mask: Ratio { ratio: self.model.ratio },
            target: pixel::Config { normalize: true },
            anchor: self.anchor,
            stop_gradient: self.stop_gradient,
        };
        rmae::RMae::new(&config, &self.model.input())
    }

    fn check(&self) -> Outcome {
        let mut method = self.method()?;
        let grid = method.grid();
        let flat = parity::perturbed_weights(&method)?;
        let batches: Vec<_> = (0..STEPS).map(|step| self.model.batch(step)).collect();
        let official = |name: &str, tensor: &Tensor| match name.strip_prefix("anchor_") {
            Some(decoder) => {
                let (name, tensor) = interop::to_official("mae", decoder, tensor, &grid);
                (format!("anchor_{name}"), tensor)
            }
            None => interop::to_official("mae", name, tensor, &grid),
        };
        let numbers = json!({"anchor": self.anchor, "stop_gradient": self.stop_gradient});
        let question = Question { batches: &batches, numbers, more: Vec::new() };
        let reply = self.model.oracle_reply("rmae.py", &method, &flat, &official, question)?;
        let decoder_positions = &reply["fp32.decoder_positions"];
        method.model.encoder.set_positions(reply["fp32.positions"].shallow_clone());
        method.model.decoder.filler.positions = decoder_positions.shallow_clone().into();
        method.anchor_decoder.filler.positions = decoder_positions.shallow_clone().into();
        parity::assert_training_matches(Box::new(method), flat, batches, &reply, &official)
    }
}

fn with_the_target_for_the_second_prediction_it_is_mae() -> Outcome {
    let pred = normal(1, &[3, 5, 12]).set_requires_grad(true);
    let target = normal(2, &[3, 5, 12]);
    mse_between(&pred, &target).backward();
    let siamese = pred.grad();
    let again = pred.detach().set_requires_grad(true);
    let mae = masked_mse(&again, &target)?;
    mae.backward();
    let difference = (mse_between(&pred, &target) - mae).abs().double_value(&[]);
    assert!(difference < 1e-6, "{difference:e}");
    assert!((siamese - again.grad()).abs().max().double_value(&[]) < 1e-7);
    Ok(())
}

/// Minimizes the loss over two free predictions, the first of which is also drawn to 1, with a target of 0; returns the
/// second.
fn second_prediction(anchor: f64) -> Result<f64, libtest_mimic::Failed> {
    let pair = Tensor::ones([2, 1, 4], (Kind::Float, tch::Device::Cpu)).set_requires_grad(true);
    let ones = Tensor::ones([1, 4], (Kind::Float, tch::Device::Cpu));
    for _ in 0..3000 {
        let first = pair.get(0);
        let second = pair.get(1);
        let anchored = masked_mse(&second, &ones.zeros_like())? * anchor;
        let loss = mse_between(&first, &second) + anchored + masked_mse(&first, &ones)?;
        let gradient = Tensor::run_backward(&[loss], &[&pair], false, false).remove(0);
        let _ = tch::no_grad(|| pair.shallow_clone().g_sub_(&(gradient / (1.0 + anchor))));
    }
    Ok(pair.get(1).mean(Kind::Float).double_value(&[]))
}

fn a_heavier_anchor_draws_the_second_prediction_to_the_target() -> Outcome {
    for anchor in [0.1, 1.0, 10.0, 100.0] {
        let second = second_prediction(anchor)?;
        let expected = 1.0 / (1.0 + 2.0 * anchor);
        assert!((second - expected).abs() < 1e-4, "{anchor}: {second} against {expected}");
    }
    Ok(())
}

fn without_an_anchor_constant_predictions_are_a_solution() -> Outcome {
    let method = Case { anchor: 0.0, ..gray() }.method()?;
    let flat = parity::perturbed_weights(&method)?;
    // Both prediction layers answer 0.7, whatever they read.
    for (index, spec) in flat.specs.iter().enumerate() {
        match spec.name.as_str() {
            "decoder.pred.weight" | "anchor_decoder.pred.weight" => {
                drop(flat.param_view(&flat.master, index).fill_(0.0))
            }
            "decoder.pred.bias" | "anchor_decoder.pred.bias" => drop(flat.param_view(&flat.master, index).fill_(0.7)),
            _ => {}
        }
    }
    let batch = gray().model.batch(0);
    let sums: Vec<f64> = method.terms(&flat.leaves, &batch)?.iter().map(|term| term.sum.double_value(&[])).collect();
    assert_eq!(sums, [0.0, 0.0]);
    let anchored = gray().method()?;
    let anchor = anchored.terms(&flat.leaves, &batch)?[1].sum.double_value(&[]);
    assert!(anchor > 1.0, "the anchor forbids it: {anchor}");
    Ok(())
}
