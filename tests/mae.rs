//! MAE against other people's code: losses, gradients and weights after three AdamW steps.

use crate::support::{Outcome, distance, oracle, read, write};
use occlude::device::solo::Solo;
use occlude::grid::Input;
use occlude::method::{Batch, Method, mae};
use occlude::op::shuffle::Origin;
use occlude::optim::{flat::Flat, update, update::Updater};
use occlude::part::encoder::vit::Shape;
use occlude::part::{mask::Ratio, target::pixel};
use occlude::run::{exchange, step::Stepper};
use std::sync::Arc;
use std::time::Duration;
use tch::{Device, Kind, Tensor};

crate::trials![
    a_grey_image_with_one_block_agrees,
    an_odd_colour_image_with_normalised_patches_agrees,
    a_wide_image_with_positions_handed_over_agrees,
    positions_are_the_official_table,
];

const STEPS: usize = 3;
const LR: f64 = 1e-3;
const DECAY: f64 = 0.05;

struct Case {
    batch: i64,
    channels: i64,
    size: (i64, i64),
    patch: i64,
    encoder: Shape,
    decoder: Shape,
    ratio: f64,
    normalize: bool,
}

fn shape(width: i64, depth: i64, heads: i64) -> Shape {
    Shape { width, depth, heads, mlp_ratio: 4 }
}

fn a_grey_image_with_one_block_agrees() -> Outcome {
    Case {
        batch: 5,
        channels: 1,
        size: (20, 20),
        patch: 4,
        encoder: shape(24, 1, 3),
        decoder: shape(16, 1, 2),
        ratio: 0.6,
        normalize: false,
    }
    .check()
}

fn an_odd_colour_image_with_normalised_patches_agrees() -> Outcome {
    Case {
        batch: 3,
        channels: 3,
        size: (42, 42),
        patch: 6,
        encoder: shape(60, 3, 5),
        decoder: shape(36, 2, 3),
        ratio: 0.75,
        normalize: true,
    }
    .check()
}

fn a_wide_image_with_positions_handed_over_agrees() -> Outcome {
    Case {
        batch: 2,
        channels: 3,
        size: (24, 56),
        patch: 8,
        encoder: shape(44, 2, 11),
        decoder: shape(28, 3, 7),
        ratio: 0.5,
        normalize: true,
    }
    .check()
}

impl Case {
    fn check(&self) -> Outcome {
        tch::manual_seed(1);
        let input = Input {
            channels: self.channels,
            frames: 1,
            height: self.size.0,
            width: self.size.1,
            patch: self.patch,
            patch_frames: 1,
            mean: vec![],
            std: vec![],
        };
        let config = mae::Config {
            encoder: self.encoder,
            decoder: self.decoder,
            mask: Ratio { ratio: self.ratio },
            target: pixel::Config { normalize: self.normalize },
            mask_tokens: mae::MaskTokens::Decoder,
            trained_grid: None,
        };
        let mut method = mae::Mae::new(&config, &input)?;
        let grid = *method.grid();
        let flat = Flat::new(method.table(), 3, Kind::Float, Device::Cpu)?;
        // Biases and scales begin at 0 and 1, which would hide a mistake: move everything a little.
        let noise = Tensor::randn(flat.master.size(), (Kind::Float, Device::Cpu)) * 0.02;
        let _ = flat.master.shallow_clone().g_add_(&noise);

        let batches: Vec<Batch> = (0..STEPS).map(|step| self.batch(step as u64)).collect();
        let mut asked = Vec::new();
        for (index, spec) in flat.specs.iter().enumerate() {
            let (name, tensor) = exchange::official("mae", &spec.name, &flat.part(&flat.master, index), &grid);
            asked.push((format!("weight.{name}"), tensor));
        }
        for (step, batch) in batches.iter().enumerate() {
            let mask = method.mask(batch);
            asked.push((format!("input.{step}"), batch.pixels.squeeze_dim(2)));
            // The noise whose ascending order is our order of tokens.
            asked.push((format!("noise.{step}"), mask.restore().to_kind(Kind::Float) / grid.tokens()));
        }
        let folder = tempfile::tempdir()?;
        let (request, reply) = (folder.path().join("request.safetensors"), folder.path().join("reply.safetensors"));
        write(&request, &asked)?;
        oracle("vit_mae.py", &[request.to_str().unwrap(), reply.to_str().unwrap(), &self.theirs()])?;
        let reply = read(&reply)?;

        method.model.encoder.positions = reply["positions"].shallow_clone().into();
        method.model.decoder.positions = reply["decoder_positions"].shallow_clone().into();
        let optim: update::Config =
            serde_json::from_value(serde_json::json!({"lr": LR, "weight_decay": DECAY, "betas": [0.9, 0.95]}))?;
        let updater = Updater::new(&flat, &optim);
        let mut stepper = Stepper::new(
            Box::new(method),
            flat,
            updater,
            Arc::new(Solo::new(Device::Cpu)),
            1 << 12,
            Duration::from_secs(5),
        )?;
        for (step, batch) in batches.into_iter().enumerate() {
            let outcome = stepper.step(&[batch], LR, |stepper, _| {
                if step == 0 { self.check_gradients(stepper, &grid, &reply) } else { Ok(()) }
            })?;
            let theirs = reply[&format!("loss.{step}")].double_value(&[0]);
            let off = (outcome.loss - theirs).abs() / theirs;
            assert!(off <= 1e-5, "loss of step {step}: {} against {theirs}, off by {off:e}", outcome.loss);
        }
        for (index, spec) in stepper.flat.specs.iter().enumerate() {
            let (name, ours) =
                exchange::official("mae", &spec.name, &stepper.flat.part(&stepper.flat.master, index), &grid);
            let off = (&ours - reply[&format!("weight.{name}")].view_as(&ours)).abs();
            if name.ends_with("qkv.bias") {
                // Softmax does not see the bias of the keys: its gradient is pure rounding, which AdamW blows up to ±lr.
                let _ = off.chunk(3, 0)[1].zero_();
            }
            let off = off.max().double_value(&[]);
            assert!(off <= 0.1 * LR * STEPS as f64, "{name} is off by {off:e} after {STEPS} steps");
        }
        Ok(())
    }

    fn check_gradients(
        &self,
        stepper: &Stepper,
        grid: &occlude::grid::Grid,
        reply: &crate::support::Tensors,
    ) -> occlude::fault::Result<()> {
        let theirs: Vec<&Tensor> = reply.iter().filter(|(name, _)| name.starts_with("grad.")).map(|(_, t)| t).collect();
        assert_eq!(theirs.len(), stepper.flat.specs.len(), "as many gradients as tensors");
        let greatest = theirs.iter().map(|t| t.abs().max().double_value(&[])).fold(0.0, f64::max);
        for (index, spec) in stepper.flat.specs.iter().enumerate() {
            let flat = &stepper.flat;
            let (name, ours) = exchange::official("mae", &spec.name, &flat.part(&flat.gradient, index), grid);
            let wanted = reply[&format!("grad.{name}")].view_as(&ours);
            let (off, norm) = (distance(&ours, &wanted), wanted.norm().double_value(&[]));
            let within = 1e-5 * norm + 1e-7 * greatest;
            assert!(off <= within, "gradient of {name}: ‖Δ‖ = {off:e}, ‖g‖ = {norm:e}, allowed {within:e}");
        }
        Ok(())
    }

    fn batch(&self, step: u64) -> Batch {
        let size = [self.batch, self.channels, 1, self.size.0, self.size.1];
        let origins: Vec<Origin> = (0..self.batch as u64).map(|id| Origin { id, epoch: step, repeat: 0 }).collect();
        Batch::new(Tensor::randn(size, (Kind::Float, Device::Cpu)), &origins, 9)
    }

    fn theirs(&self) -> String {
        // Their own tables are square: build the nearest and let them interpolate.
        let side = self.size.0.max(self.size.1);
        serde_json::json!({
            "steps": STEPS, "lr": LR, "weight_decay": DECAY, "size": [self.size.0, self.size.1],
            "image_size": side, "patch_size": self.patch, "num_channels": self.channels,
            "hidden_size": self.encoder.width, "num_hidden_layers": self.encoder.depth,
            "num_attention_heads": self.encoder.heads, "intermediate_size": 4 * self.encoder.width,
            "decoder_hidden_size": self.decoder.width, "decoder_num_hidden_layers": self.decoder.depth,
            "decoder_num_attention_heads": self.decoder.heads, "decoder_intermediate_size": 4 * self.decoder.width,
            "mask_ratio": self.ratio, "norm_pix_loss": self.normalize,
        })
        .to_string()
    }
}

fn positions_are_the_official_table() -> Outcome {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("positions.safetensors");
    for (rows, cols, width) in [(7, 7, 48), (3, 5, 16), (14, 9, 132)] {
        oracle("positions.py", &[path.to_str().unwrap(), &rows.to_string(), &cols.to_string(), &width.to_string()])?;
        let grid = occlude::grid::Grid { frames: 1, rows, cols, channels: 3, patch_frames: 1, patch: 4 };
        let ours = occlude::part::encoder::position::sine_cosine(&grid, width);
        let off = (ours - &read(&path)?["positions"]).abs().max().double_value(&[]);
        assert!(off <= 1e-6, "a {rows} × {cols} table of width {width} is off by {off:e}");
    }
    Ok(())
}
