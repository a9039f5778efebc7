//! Tests of C-MAE against the encoder and the decoder's blocks of transformers, with torch's cross entropy: losses,
//! gradients and weights after three AdamW steps; and of its loss by closed forms.

use crate::support::method_ext::MethodExt;
use crate::support::vit_mae::{Question, VitMaeCase, shape};
use crate::support::{Outcome, assert_lines_rejected, parity};
use occlude::interop;
use occlude::method::contrastive_mae::{self, SecondView};
use occlude::method::{Batch, Method};
use occlude::part::mask::{Ratio, random_keep};
use occlude::part::projection;
use serde_json::json;
use tch::{Kind, Tensor};

crate::trials![
    a_grayscale_image_matches_transformers,
    an_odd_color_image_matches_transformers,
    an_independent_view_matches_transformers,
    equal_embeddings_cost_the_logarithm_of_the_batch,
    an_invalid_config_is_rejected,
];

const STEPS: u64 = 3;

#[derive(Clone, Copy)]
struct Case {
    model: VitMaeCase,
    second_view: SecondView,
}

fn gray() -> Case {
    Case { model: VitMaeCase::gray(), second_view: SecondView::Complement }
}

fn a_grayscale_image_matches_transformers() -> Outcome {
    gray().check()
}

fn an_odd_color_image_matches_transformers() -> Outcome {
    let shapes = VitMaeCase { encoder: shape(60, 2, 5), decoder: shape(36, 2, 3), ..VitMaeCase::gray() };
    Case { model: VitMaeCase { batch: 3, channels: 3, side: 24, patch: 6, ratio: 0.75, ..shapes }, ..gray() }.check()
}

fn an_independent_view_matches_transformers() -> Outcome {
    let shapes = VitMaeCase { encoder: shape(44, 2, 11), decoder: shape(28, 1, 7), ..VitMaeCase::gray() };
    let model = VitMaeCase { batch: 7, channels: 3, side: 32, patch: 8, ratio: 0.5, ..shapes };
    Case { model, second_view: SecondView::Independent }.check()
}

impl Case {
    fn method(&self) -> Result<contrastive_mae::ContrastiveMae, occlude::error::Error> {
        let config = contrastive_mae::Config {
            encoder: self.model.encoder,
            decoder: self.model.decoder,
            mask: Ratio { ratio: self.model.ratio },
            second_view: self.second_view,
            head: projection::Config { hidden: 20, embed_dim: 12 },
            temperature: 0.2,
        };
        contrastive_mae::ContrastiveMae::new(&config, &self.model.input())
    }

    fn check(&self) -> Outcome {
        let mut method = self.method()?;
        let grid = method.grid();
        let flat = parity::perturbed_weights(&method)?;
        let batches: Vec<Batch> = (0..STEPS).map(|step| self.model.batch(step)).collect();
        let official = |name: &str, tensor: &Tensor| {
            if name.starts_with("head.") {
                return parity::same_name(name, tensor);
            }
            interop::to_official("mae", name, tensor, &grid)
        };
        let numbers = json!({"hidden": 20, "embed_dim": 12, "temperature": 0.2});
        let mut question = Question { batches: &batches, numbers, more: Vec::new() };
        if self.second_view == SecondView::Independent {
            for (step, batch) in batches.iter().enumerate() {
                let mask = random_keep(&grid, method.visible(&grid), !batch.seed, &batch.keys);
                let order = mask.restore().to_kind(Kind::Float);
                question.more.push((format!("second.{step}"), order / grid.tokens()));
            }
        }
        let reply = self.model.oracle_reply("contrastive_mae.py", &method, &flat, &official, question)?;
        method.model.encoder.set_positions(reply["fp32.positions"].shallow_clone());
        method.model.filler.positions = reply["fp32.decoder_positions"].shallow_clone().into();
        parity::assert_training_matches(Box::new(method), flat, batches, &reply, &official)
    }
}

fn equal_embeddings_cost_the_logarithm_of_the_batch() -> Outcome {
    let case = gray();
    let method = case.method()?;
    let flat = parity::perturbed_weights(&method)?;
    let last = method.params().specs().iter().position(|spec| spec.name == "head.fc3.weight").expect("the last layer");
    let _ = flat.param_view(&flat.master, last).zero_();
    let mut stepper = parity::stepper(Box::new(method), flat)?;
    let outcome = stepper.step(&[case.model.batch(0)], 1e-3, |_, _| Ok(()))?;
    assert!((outcome.loss - 5f64.ln()).abs() < 1e-6, "{}", outcome.loss);
    Ok(())
}

fn an_invalid_config_is_rejected() -> Outcome {
    assert_lines_rejected(
        "contrastive_mae",
        &[
            ("method.contrastive_mae.temperature=0", "method.contrastive_mae.temperature is 0"),
            ("method.contrastive_mae.second_view=same", "unknown value `same`"),
            (
                "method.contrastive_mae.head.hidden=0",
                "method.contrastive_mae.head.hidden is 0; it must lie in 1..=65536",
            ),
            ("train.micro_batch=8", "train.micro_batch"),
            ("input.frames=2", "set it to 1, or choose a method for video"),
        ],
    )
}
