//! Tests of SupMAE against transformers and torch: losses, gradients, weights and running statistics after three AdamW
//! steps; and against MAE, which it is where the class term weighs nothing.

use crate::method::every_method::{synthetic_batch, tiny_config};
use crate::support::method_ext::MethodExt;
use crate::support::parity;
use crate::support::tolerance::assert_near_reference;
use crate::support::{Outcome, normal};
use occlude::grid::InputConfig;
use occlude::interop;
use occlude::method::{Batch, Method, mae, supmae};
use occlude::op::shuffle::SampleKey;
use occlude::part::batch::{NO_LABEL, Side};
use occlude::part::encoder::vit::Shape;
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
    the_class_term_begins_at_the_logarithm_of_the_classes,
];

const STEPS: usize = 3;

struct Case {
    batch: i64,
    channels: i64,
    side: i64,
    patch: i64,
    encoder: Shape,
    decoder: Shape,
    classes: i64,
    unlabeled: bool,
}

fn shape(width: i64, depth: i64, heads: i64) -> Shape {
    Shape { width, depth, heads, mlp_ratio: 4 }
}

fn a_grayscale_image_matches_transformers() -> Outcome {
    let case = Case {
        batch: 5,
        channels: 1,
        side: 20,
        patch: 4,
        encoder: shape(24, 1, 3),
        decoder: shape(16, 1, 2),
        classes: 3,
        unlabeled: false,
    };
    case.check()
}

fn an_odd_color_image_matches_transformers() -> Outcome {
    let case = Case {
        batch: 7,
        channels: 3,
        side: 42,
        patch: 6,
        encoder: shape(60, 3, 5),
        decoder: shape(36, 2, 3),
        classes: 11,
        unlabeled: false,
    };
    case.check()
}

fn a_batch_with_unlabeled_samples_matches_transformers() -> Outcome {
    let case = Case {
        batch: 6,
        channels: 3,
        side: 24,
        patch: 8,
        encoder: shape(44, 2, 11),
        decoder: shape(28, 1, 7),
        classes: 4,
        unlabeled: true,
    };
    case.check()
}

impl Case {
    fn method(&self) -> Result<supmae::SupMae, occlude::error::Error> {
        let input = InputConfig {
            channels: self.channels,
            frames: 1,
            height: self.side,
            width: self.side,
            patch: self.patch,
            patch_frames: 1,
            mean: vec![],
            std: vec![],
        };
        let config = supmae::Config {
            encoder: self.encoder,
            decoder: self.decoder,
            mask: Ratio { ratio: 0.6 },
            target: pixel::Config { normalize: true },
            classes: self.classes,
            class_weight: 0.3,
            temperature: 2.5,
        };
        supmae::SupMae::new(&config, &input)
    }

    fn check(&self) -> Outcome {
        let mut method = self.method()?;
        let grid = method.grid();
        let flat = parity::perturbed_weights(&method)?;
        let batches: Vec<Batch> = (0..STEPS).map(|step| self.batch(step as u64)).collect();
        let mut request = Vec::new();
        for (step, batch) in batches.iter().enumerate() {
            request.push((format!("input.{step}"), batch.view().squeeze_dim(2)));
            request.push((
                format!("noise.{step}"),
                method.sample_mask(batch).restore().to_kind(Kind::Float) / grid.tokens(),
            ));
            request.push((format!("label.{step}"), batch.labels()?.shallow_clone()));
        }
        let official = |name: &str, tensor: &Tensor| interop::to_official("mae", name, tensor, &grid);
        let reply = parity::oracle_reply(&["supmae.py"], &flat, &official, request, &self.reference_config())?;
        method.model.encoder.set_positions(reply["fp32.positions"].shallow_clone());
        method.model.decoder.positions = reply["fp32.decoder_positions"].shallow_clone().into();
        let stepper = parity::assert_steps_match(Box::new(method), flat, batches, &reply, &official)?;
        for (name, ours) in stepper.buffers.iter() {
            let name = name.rsplit('.').next().expect("a name");
            assert_near_reference(&reply, name, ours, 1e-5 * reply[name].norm().double_value(&[]));
        }
        Ok(())
    }

    fn batch(&self, step: u64) -> Batch {
        let keys: Vec<SampleKey> = (0..self.batch as u64).map(|id| SampleKey { id, epoch: step, repeat: 0 }).collect();
        let label =
            |row: i64| if self.unlabeled && row % 3 == 1 { NO_LABEL } else { (row * 7 + step as i64) % self.classes };
        let labels: Vec<i64> = (0..self.batch).map(label).collect();
        let side = Side { labels: Some(Tensor::from_slice(&labels)), ..Side::default() };
        Batch::new(normal(step, &[self.batch, self.channels, 1, self.side, self.side]), &keys, 9).with_side(side)
    }

    fn reference_config(&self) -> serde_json::Value {
        let numbers = json!({
            "image_size": self.side, "patch_size": self.patch, "num_channels": self.channels,
            "hidden_size": self.encoder.width, "num_hidden_layers": self.encoder.depth,
            "num_attention_heads": self.encoder.heads, "intermediate_size": 4 * self.encoder.width,
            "decoder_hidden_size": self.decoder.width, "decoder_num_hidden_layers": self.decoder.depth,
            "decoder_num_attention_heads": self.decoder.heads, "decoder_intermediate_size": 4 * self.decoder.width,
            "mask_ratio": 0.6, "norm_pix_loss": true,
            "classes": self.classes, "class_weight": 0.3, "temperature": 2.5,
        });
        parity::training_numbers(STEPS, numbers)
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

fn the_class_term_begins_at_the_logarithm_of_the_classes() -> Outcome {
    let [method, _] = pair(1.0)?;
    let config = tiny_config("supmae")?;
    let batch = synthetic_batch(&config, &method.grid(), 0, 0..64)?;
    let flat = occlude::optim::flat::FlatParams::new(method.params(), 3, Kind::Float, Device::Cpu)?;
    let mut stepper = parity::stepper(method, flat)?;
    let outcome = stepper.step(&[batch], 1e-3, |_, _| Ok(()))?;
    let (name, class) = outcome.terms[1];
    assert_eq!(name, "class");
    // Logits are divided by 10, and so are nearly alike.
    assert!((class - 10f64.ln()).abs() < 0.02, "{class}");
    Ok(())
}
