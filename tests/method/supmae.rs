//! Tests of SupMAE against transformers and torch: losses, gradients, weights and running statistics after three AdamW
//! steps; and against MAE, which it is where the class term weighs nothing.

use crate::method::every_method::{synthetic_batch, tiny_config};
use crate::support::Outcome;
use crate::support::method_ext::MethodExt;
use crate::support::parity;
use crate::support::tolerance::assert_near_reference;
use crate::support::vit_mae::{Question, VitMaeCase, shape};
use occlude::interop;
use occlude::method::{Batch, Method, mae, supmae};
use occlude::part::batch::{NO_LABEL, Side};
use occlude::part::mask::Ratio;
use occlude::part::objective::pixel;
use occlude::train::step::Stepper;
use serde_json::json;
use tch::{Device, Kind, Tensor};

crate::trials![
    a_grayscale_image_matches_transformers,
    an_odd_color_image_matches_transformers,
    a_batch_with_unlabeled_samples_matches_transformers,
    without_a_class_weight_it_is_mae_to_the_bit,
    without_labels_it_is_mae_to_the_bit,
    equal_logits_cost_the_logarithm_of_the_classes,
];

const STEPS: u64 = 3;

#[derive(Clone, Copy)]
struct Case {
    model: VitMaeCase,
    classes: i64,
    has_unlabeled: bool,
}

fn a_grayscale_image_matches_transformers() -> Outcome {
    Case { model: VitMaeCase::gray(), classes: 3, has_unlabeled: false }.check()
}

fn an_odd_color_image_matches_transformers() -> Outcome {
    let shapes = VitMaeCase { encoder: shape(60, 3, 5), decoder: shape(36, 2, 3), ..VitMaeCase::gray() };
    let model = VitMaeCase { batch: 7, channels: 3, side: 42, patch: 6, ..shapes };
    Case { model, classes: 11, has_unlabeled: false }.check()
}

fn a_batch_with_unlabeled_samples_matches_transformers() -> Outcome {
    let shapes = VitMaeCase { encoder: shape(44, 2, 11), decoder: shape(28, 1, 7), ..VitMaeCase::gray() };
    let model = VitMaeCase { batch: 6, channels: 3, side: 24, patch: 8, ..shapes };
    Case { model, classes: 4, has_unlabeled: true }.check()
}

impl Case {
    fn method(&self) -> Result<supmae::SupMae, occlude::error::Error> {
        let config = supmae::Config {
            encoder: self.model.encoder,
            decoder: self.model.decoder,
            mask: Ratio { ratio: self.model.ratio },
            target: pixel::Config { normalize: true },
            classes: self.classes,
            class_weight: 0.3,
            temperature: 2.5,
        };
        supmae::SupMae::new(&config, &self.model.input())
    }

    fn check(&self) -> Outcome {
        let mut method = self.method()?;
        let grid = method.grid();
        let flat = parity::perturbed_weights(&method)?;
        let batches: Vec<Batch> = (0..STEPS).map(|step| self.batch(step)).collect();
        let official = |name: &str, tensor: &Tensor| interop::to_official("mae", name, tensor, &grid);
        let numbers = json!({"classes": self.classes, "class_weight": 0.3, "temperature": 2.5});
        let question = Question { batches: &batches, numbers, more: Vec::new() };
        let reply = self.model.oracle_reply("supmae.py", &method, &flat, &official, question)?;
        method.model.encoder.set_positions(reply["fp32.positions"].shallow_clone());
        method.model.decoder.filler.positions = reply["fp32.decoder_positions"].shallow_clone().into();
        let stepper = parity::assert_steps_match(Box::new(method), flat, batches, &reply, &official)?;
        for (name, ours) in stepper.buffers.iter() {
            let name = name.rsplit('.').next().expect("a name");
            assert_near_reference(&reply, name, ours, 1e-5 * reply[name].norm().double_value(&[]));
        }
        Ok(())
    }

    fn batch(&self, step: u64) -> Batch {
        let is_unlabeled = |row: i64| self.has_unlabeled && row % 3 == 1;
        let class = |row: i64| (row * 7 + step as i64) % self.classes;
        let labels: Vec<i64> =
            (0..self.model.batch).map(|row| if is_unlabeled(row) { NO_LABEL } else { class(row) }).collect();
        self.model.batch(step).with_side(Side { labels: Some(Tensor::from_slice(&labels)), ..Side::default() })
    }
}

/// Trains some steps and returns the losses of the pixel term and the weights of encoder and decoder.
fn train(method: Box<dyn Method>, label: Option<i64>) -> Result<(Vec<f64>, Tensor), libtest_mimic::Failed> {
    let flat = occlude::optim::flat::FlatParams::new(method.params(), 3, Kind::Float, Device::Cpu)?;
    let grid = method.grid();
    let mut stepper: Stepper = parity::stepper(method, flat)?;
    let mut losses = Vec::new();
    for step in 0..5 {
        let mut batch = synthetic_batch(&tiny_config("supmae")?, &grid, step, 0..6)?;
        if let Some(label) = label {
            batch.side.labels = Some(Tensor::full([6], label, (Kind::Int64, Device::Cpu)));
        }
        losses.push(stepper.step(&[batch], 1e-3, |_, _| Ok(()))?.terms[0].1);
    }
    let mut weights = Vec::new();
    for (index, spec) in stepper.flat.specs.iter().enumerate().filter(|(_, spec)| !spec.name.starts_with("head.")) {
        assert!(spec.name.contains('.'));
        weights.push(stepper.flat.param_view(&stepper.flat.master, index).reshape([-1]));
    }
    Ok((losses, Tensor::cat(&weights, 0)))
}

fn pair(class_weight: f64) -> Result<[Box<dyn Method>; 2], libtest_mimic::Failed> {
    let config = tiny_config("supmae")?;
    let occlude::method::catalog::Config::SupMae(options) = &config.method else { panic!("SupMAE") };
    let plain = mae::Config {
        encoder: options.encoder,
        decoder: options.decoder,
        mask: options.mask,
        target: options.target,
        mask_tokens: mae::MaskTokens::Decoder,
        trained_grid: None,
    };
    let options = supmae::Config { class_weight, ..options.clone() };
    Ok([Box::new(supmae::SupMae::new(&options, &config.input)?), Box::new(mae::Mae::new(&plain, &config.input)?)])
}

fn without_a_class_weight_it_is_mae_to_the_bit() -> Outcome {
    let [ours, mae] = pair(0.0)?;
    assert!(train(ours, None)? == train(mae, None)?);
    let [ours, mae] = pair(0.01)?;
    assert!(train(ours, None)? != train(mae, None)?, "the class term reaches the encoder");
    Ok(())
}

fn without_labels_it_is_mae_to_the_bit() -> Outcome {
    let [ours, mae] = pair(0.01)?;
    assert!(train(ours, Some(NO_LABEL))? == train(mae, Some(NO_LABEL))?);
    Ok(())
}

fn equal_logits_cost_the_logarithm_of_the_classes() -> Outcome {
    let [method, _] = pair(1.0)?;
    let config = tiny_config("supmae")?;
    let batch = synthetic_batch(&config, &method.grid(), 0, 0..64)?;
    let flat = occlude::optim::flat::FlatParams::new(method.params(), 3, Kind::Float, Device::Cpu)?;
    let fc2 = method.params().specs().iter().position(|spec| spec.name == "head.fc2.weight").expect("the last layer");
    let _ = flat.param_view(&flat.master, fc2).zero_();
    let mut stepper = parity::stepper(method, flat)?;
    let outcome = stepper.step(&[batch], 1e-3, |_, _| Ok(()))?;
    let (name, class) = outcome.terms[1];
    assert_eq!(name, "class");
    assert!((class - 10f64.ln()).abs() < 1e-6, "{class}");
    Ok(())
}
