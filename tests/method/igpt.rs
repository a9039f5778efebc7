//! Tests of iGPT against transformers' ImageGPT: losses, gradients and weights after three AdamW steps; of its order of
//! pixels, its palette and its samples by closed forms.

use crate::support::method_ext::MethodExt;
use crate::support::vit_mae::{input, keys, shape};
use crate::support::{Outcome, assert_lines_rejected, normal, oracle, parity, read, write};
use occlude::method::{Batch, Method, Step, igpt};
use occlude::optim::flat::FlatParams;
use occlude::part::buffers::Buffers;
use occlude::part::encoder::vit::Shape;
use occlude::part::objective::color::{ColorObjective, HiddenPixels};
use occlude::part::params::Weights;
use occlude::part::training_samples::TrainingSamples;
use serde_json::json;
use tch::{Device, Kind, Tensor};

crate::trials![
    a_grayscale_image_matches_transformers,
    an_odd_color_image_matches_transformers,
    hidden_pixels_match_transformers,
    equal_logits_cost_the_logarithm_of_the_colors,
    a_pixel_changes_no_prediction_before_it,
    one_pixel_after_the_other_is_the_whole_sequence,
    samples_follow_the_model_and_keep_what_is_given,
    the_nearest_color_matches_transformers,
    a_palette_is_learned_from_pixels,
    a_palette_of_another_set_is_rejected,
    an_invalid_config_is_rejected,
];

const STEPS: usize = 3;
const SEED: u64 = 3;

struct Case {
    batch: i64,
    channels: i64,
    side: i64,
    encoder: Shape,
    colors: i64,
    objective: ColorObjective,
}

/// Heads are 4 or 16 wide: transformers 4.57 divides scores by the root of the width, rounded down.
fn gray() -> Case {
    let objective = ColorObjective::Autoregressive;
    Case { batch: 4, channels: 1, side: 5, encoder: shape(12, 2, 3), colors: 7, objective }
}

fn bert() -> ColorObjective {
    ColorObjective::Bert(HiddenPixels { ratio: 0.3 })
}

fn a_grayscale_image_matches_transformers() -> Outcome {
    gray().check()
}

fn an_odd_color_image_matches_transformers() -> Outcome {
    Case { batch: 3, channels: 3, side: 7, encoder: shape(48, 3, 3), colors: 19, ..gray() }.check()
}

fn hidden_pixels_match_transformers() -> Outcome {
    Case { batch: 5, channels: 3, side: 6, encoder: shape(20, 2, 5), colors: 11, objective: bert() }.check()
}

impl Case {
    fn method(&self) -> Result<igpt::Igpt, occlude::error::Error> {
        let input = input(self.channels, [self.side; 2], 1);
        let Case { encoder, colors, objective, .. } = *self;
        igpt::Igpt::new(&igpt::Config { encoder, colors, palette: None, objective }, &input)
    }

    fn batch(&self, step: u64) -> Batch {
        let pixels = normal(step, &[self.batch, self.channels, 1, self.side, self.side]) * 60.0 + 128.0;
        Batch::new(pixels.clamp(0.0, 255.0).to_kind(Kind::Uint8), &keys(self.batch, step), 9)
    }

    fn check(&self) -> Outcome {
        let method = self.method()?;
        let flat = parity::perturbed_weights(&method)?;
        let buffers = Buffers::new(&method.buffers(), SEED, Device::Cpu);
        let batches: Vec<Batch> = (0..STEPS).map(|step| self.batch(step as u64)).collect();
        let mut request = Vec::new();
        for (step, batch) in batches.iter().enumerate() {
            let colors = method.model.indices(&Step::with_buffers(&flat.leaves, &buffers), batch);
            request.push((format!("color.{step}"), colors));
            if let ColorObjective::Bert(pixels) = self.objective {
                request.push((format!("hidden.{step}"), pixels.sample(batch, self.side * self.side)?));
            }
        }
        let numbers = json!({
            "colors": self.colors, "tokens": self.side * self.side, "causal": self.objective != bert(),
            "width": self.encoder.width, "depth": self.encoder.depth, "heads": self.encoder.heads,
        });
        let numbers = parity::training_numbers(STEPS, numbers);
        let reply = parity::oracle_reply(&["igpt.py"], &flat, &naming, request, &numbers)?;
        parity::assert_training_matches(Box::new(method), flat, batches, &reply, &naming)
    }
}

/// ImageGPT's linear layers hold [inputs, outputs].
fn naming(name: &str, tensor: &Tensor) -> (String, Tensor) {
    let turned = || tensor.transpose(0, 1).contiguous();
    let layer = |rest: &str| match rest {
        "norm1.weight" => ("ln_1.weight", tensor.shallow_clone()),
        "norm2.weight" => ("ln_2.weight", tensor.shallow_clone()),
        "attn.qkv.weight" => ("attn.c_attn.weight", turned()),
        "attn.proj.weight" => ("attn.c_proj.weight", turned()),
        "mlp.fc1.weight" => ("mlp.c_fc.weight", turned()),
        _ => ("mlp.c_proj.weight", turned()),
    };
    match name.strip_prefix("encoder.").unwrap_or(name) {
        "token" => ("transformer.wte.weight".to_owned(), tensor.shallow_clone()),
        "start" => ("start".to_owned(), tensor.shallow_clone()),
        "positions" => ("transformer.wpe.weight".to_owned(), tensor.shallow_clone()),
        "norm.weight" => ("transformer.ln_f.weight".to_owned(), tensor.shallow_clone()),
        "head.weight" => ("lm_head.weight".to_owned(), tensor.shallow_clone()),
        rest => {
            let (block, rest) = rest["blocks.".len()..].split_once('.').expect("a tensor of a block");
            let (name, tensor) = layer(rest);
            (format!("transformer.h.{block}.{name}"), tensor)
        }
    }
}

fn equal_logits_cost_the_logarithm_of_the_colors() -> Outcome {
    for objective in [ColorObjective::Autoregressive, bert()] {
        let case = Case { objective, ..gray() };
        let method = Box::new(case.method()?);
        let flat = FlatParams::new(method.params(), SEED, Kind::Float, Device::Cpu)?;
        let mut stepper = parity::stepper(method, flat)?;
        let mut moved = Vec::new();
        let outcome = stepper.step(&[case.batch(0)], 1e-3, |stepper, _| {
            for (index, spec) in stepper.flat.specs.iter().enumerate() {
                let gradient = stepper.flat.param_view(&stepper.flat.grad, index);
                moved.extend((gradient.abs().max().double_value(&[]) > 0.0).then(|| spec.name.clone()));
            }
            Ok(())
        })?;
        assert!((outcome.loss - 7f64.ln()).abs() < 1e-6, "{}", outcome.loss);
        // The output layer begins at 0, and so passes nothing back.
        assert_eq!(moved, ["head.weight"]);
    }
    Ok(())
}

/// Random weights of a tiny model, its head too.
fn model() -> Result<(igpt::Igpt, FlatParams, Buffers), occlude::error::Error> {
    let method = Case { side: 6, ..gray() }.method()?;
    let flat = FlatParams::new(method.params(), SEED, Kind::Float, Device::Cpu)?;
    let _ = flat.master.shallow_clone().g_add_(&(normal(1, &flat.master.size()) * 0.3));
    let buffers = Buffers::new(&method.buffers(), SEED, Device::Cpu);
    Ok((method, flat, buffers))
}

fn random_colors(samples: i64) -> Tensor {
    (normal(5, &[samples, 36]).abs() * 1e4).to_kind(Kind::Int64).remainder(7)
}

fn a_pixel_changes_no_prediction_before_it() -> Outcome {
    let (method, flat, _) = model()?;
    let colors = random_colors(2);
    let before = method.model.predict_next(&flat.leaves, &colors)?;
    for place in [0, 1, 17, 34, 35] {
        let changed = colors.copy();
        changed.narrow(1, place, 1).copy_(&((changed.narrow(1, place, 1) + 1).remainder(7)));
        let after = method.model.predict_next(&flat.leaves, &changed)?;
        let same = |range: std::ops::Range<i64>| {
            let part = |x: &Tensor| x.narrow(1, range.start, range.end - range.start);
            part(&before).equal(&part(&after))
        };
        assert!(same(0..place + 1), "pixel {place} is seen before it is predicted");
        assert!(place == 35 || !same(place + 1..36), "pixel {place} is not seen");
    }
    Ok(())
}

fn one_pixel_after_the_other_is_the_whole_sequence() -> Outcome {
    let (method, flat, buffers) = model()?;
    let step = Step::with_buffers(&flat.leaves, &buffers);
    let colors = random_colors(3);
    let likely = method.model.predict_next(&flat.leaves, &colors)?.argmax(-1, false);
    let batch = Batch::new(Tensor::zeros([3, 1, 1, 6, 6], (Kind::Uint8, Device::Cpu)), &keys(3, 0), 4);
    for place in 0..36 {
        // At a low temperature a sample is the most likely color.
        let sampled = tch::no_grad(|| method.model.sample(&step, &batch, &colors, place, 1e-4))?;
        assert!(sampled.select(1, place).equal(&likely.select(1, place)), "pixel {place}");
    }
    Ok(())
}

fn samples_follow_the_model_and_keep_what_is_given() -> Outcome {
    let (method, flat, buffers) = model()?;
    let step = Step::with_buffers(&flat.leaves, &buffers);
    let samples = 4000;
    let batch = Batch::new(Tensor::zeros([samples, 1, 1, 6, 6], (Kind::Uint8, Device::Cpu)), &keys(samples, 0), 4);
    let given = random_colors(1).repeat([samples, 1]);
    let sample =
        |kept: i64, temperature: f64| tch::no_grad(|| method.model.sample(&step, &batch, &given, kept, temperature));
    let sampled = sample(35, 1.0)?;
    assert!(sampled.narrow(1, 0, 35).equal(&given.narrow(1, 0, 35)));
    let logits = method.model.predict_next(&flat.leaves, &given.narrow(0, 0, 1))?.select(1, 35).squeeze_dim(0);
    let chance = logits.softmax(-1, Kind::Float);
    let counts = sampled.select(1, 35).bincount::<Tensor>(None, 7).to_kind(Kind::Float) / samples as f64;
    // Four standard deviations of a share of 4000 coins.
    let limit: Tensor = (&chance - chance.square()) / samples as f64;
    let limit = limit.sqrt() * 4.0 + 1e-4;
    assert!((&counts - &chance).abs().le_tensor(&limit).all() == Tensor::from(true), "{counts:?} {chance:?}");
    assert!(sample(0, 1.0)?.equal(&sample(0, 1.0)?), "samples belong to their keys");
    let cold = sample(35, 0.01)?.select(1, 35);
    assert!(
        cold.eq_tensor(&logits.argmax(0, false)).all() == Tensor::from(true),
        "cold samples are the most likely color"
    );
    Ok(())
}

fn the_nearest_color_matches_transformers() -> Outcome {
    let method = Case { channels: 3, colors: 19, side: 9, batch: 6, ..gray() }.method()?;
    let batch = Case { channels: 3, side: 9, batch: 6, ..gray() }.batch(0);
    let buffers = Buffers::new(&method.buffers(), SEED, Device::Cpu);
    let weights = Weights::new(Vec::new());
    let ours = method.model.indices(&Step::with_buffers(&weights, &buffers), &batch);
    let folder = tempfile::tempdir()?;
    let [request, reply] = ["request", "reply"].map(|name| folder.path().join(format!("{name}.safetensors")));
    let pixels = (batch.view().to_kind(Kind::Float) / 127.5 - 1.0).permute([0, 2, 3, 4, 1]).reshape([-1, 3]);
    write(&request, &[("pixels".into(), pixels), ("palette".into(), buffers.value(0).shallow_clone())])?;
    oracle("color_quantize.py", &[request.to_str().unwrap(), reply.to_str().unwrap()])?;
    assert!(read(&reply)?["indices"].equal(&ours.view(-1)));
    Ok(())
}

/// Returns training samples of one batch.
fn training_samples<'a>(
    batches: &'a mut dyn Iterator<Item = occlude::error::Result<Tensor>>,
    channels: i64,
) -> TrainingSamples<'a> {
    TrainingSamples { batches, data_set: "a set".into(), channels, seed: 1 }
}

fn a_palette_is_learned_from_pixels() -> Outcome {
    // Pixels of three colors, each with a little noise, and a rare fourth.
    let colors = [[10i64, 20, 30], [100, 90, 80], [200, 220, 210], [255, 0, 0]];
    let pixel = |index: i64| {
        let kind = if index % 97 == 0 { 3 } else { index as usize % 3 };
        colors[kind].map(|value| (value + index % 2) as u8)
    };
    let bytes: Vec<u8> = (0..1024).flat_map(pixel).collect();
    let images = Tensor::from_slice(&bytes).view([4, 16, 16, 3, 1]).permute([0, 3, 4, 1, 2]); // [R, C, T, Y, X]
    let method = Case { channels: 3, colors: 4, ..gray() }.method()?;
    let mut batches = [Ok(images)].into_iter();
    let learned = method.learn_buffers(&mut training_samples(&mut batches, 3))?;
    let bytes = (&learned[0].1 + 1.0) * 127.5;
    // Ordered from dark to bright; a color with noise is half a step brighter.
    for (index, expected) in
        [[10.5, 20.5, 30.5], [255.0, 0.5, 0.5], [100.5, 90.5, 80.5], [200.5, 220.5, 210.5]].iter().enumerate()
    {
        for (channel, value) in expected.iter().enumerate() {
            let found = bytes.double_value(&[index as i64, channel as i64]);
            assert!((found - value).abs() < 0.6, "color {index}, channel {channel}: {found}, expected {value}");
        }
    }
    let few = Tensor::zeros([1, 3, 1, 8, 8], (Kind::Uint8, Device::Cpu));
    let mut batches = [Ok(few)].into_iter();
    let error = method.learn_buffers(&mut training_samples(&mut batches, 3)).expect_err("one color");
    assert!(error.message.contains("wants a palette of 4 colors") && error.message.contains("have 1"), "{error}");
    Ok(())
}

fn a_palette_of_another_set_is_rejected() -> Outcome {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("palette.json");
    let config = |path: &std::path::Path| igpt::Config {
        encoder: shape(12, 1, 3),
        colors: 2,
        palette: Some(path.to_owned()),
        objective: ColorObjective::Autoregressive,
    };
    let learn = |text: &str| -> Result<Tensor, occlude::error::Error> {
        std::fs::write(&path, text).expect("a file");
        let method = igpt::Igpt::new(&config(&path), &input(1, [5, 5], 1))?;
        let mut batches = [].into_iter();
        Ok(method.learn_buffers(&mut training_samples(&mut batches, 1))?.remove(0).1)
    };
    let learned = learn(r#"{"data_set": "a set", "values": [[-0.5], [0.25]]}"#)?;
    assert!(learned.equal(&Tensor::from_slice2(&[[-0.5f32], [0.25]])));
    for (text, words) in [
        (
            r#"{"data_set": "others", "values": [[-0.5], [0.25]]}"#,
            "was learned from another data set; leave the key out",
        ),
        (r#"{"data_set": "a set", "values": [[-0.5]]}"#, "does not hold 2 colors of 1 channels"),
        (r#"{"data_set": "a set", "values": [[-0.5], [2.0]]}"#, "in -1..1"),
        ("[]", "is no palette.json of a run"),
    ] {
        let error = learn(text).expect_err(words);
        assert!(error.message.contains(words), "{error}");
    }
    Ok(())
}

fn an_invalid_config_is_rejected() -> Outcome {
    assert_lines_rejected(
        "igpt",
        &[
            ("method.igpt.colors=1", "method.igpt.colors is 1; it must lie in 2 to 65536"),
            ("input.width=12", "reads square images pixel by pixel"),
            ("input.patch=2", "set input.patch to 1"),
            (r#"method.igpt.objective={"bert": {"ratio": 0}}"#, "method.igpt.objective.bert.ratio is 0"),
            ("input.frames=2", "set it to 1, or choose a method for video"),
        ],
    )
}
