//! Tests of MAE against transformers: losses, gradients and weights after three AdamW steps.

use crate::support::method_ext::MethodExt;
use crate::support::parity;
use crate::support::{Outcome, normal, oracle, read};
use occlude::grid::InputConfig;
use occlude::interop;
use occlude::method::{Batch, mae};
use occlude::op::shuffle::SampleKey;
use occlude::part::encoder::vit::Shape;
use occlude::part::mask::Ratio;
use occlude::part::objective::pixel;
use tch::{Kind, Tensor};

crate::trials![
    a_grayscale_image_with_one_block_matches_transformers,
    an_odd_color_image_with_normalized_patches_matches_transformers,
    a_wide_image_with_given_positions_matches_transformers,
    positions_match_the_official_table,
];

const STEPS: usize = 3;

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

fn a_grayscale_image_with_one_block_matches_transformers() -> Outcome {
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

fn an_odd_color_image_with_normalized_patches_matches_transformers() -> Outcome {
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

fn a_wide_image_with_given_positions_matches_transformers() -> Outcome {
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
        let input = InputConfig {
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
        let grid = method.grid();
        let flat = parity::perturbed_weights(&method)?;
        let batches: Vec<Batch> = (0..STEPS).map(|step| self.batch(step as u64)).collect();
        let mut request = Vec::new();
        for (step, batch) in batches.iter().enumerate() {
            request.push((format!("input.{step}"), batch.view().squeeze_dim(2)));
            // The noise whose ascending order is our order of tokens.
            let noise = method.sample_mask(batch).restore().to_kind(Kind::Float) / grid.tokens();
            request.push((format!("noise.{step}"), noise));
        }
        let official = |name: &str, tensor: &Tensor| interop::to_official("mae", name, tensor, &grid);
        let reply = parity::oracle_reply(&["vit_mae.py"], &flat, &official, request, &self.reference_config())?;
        method.model.encoder.set_positions(reply["fp32.positions"].shallow_clone());
        method.model.decoder.filler.positions = reply["fp32.decoder_positions"].shallow_clone().into();
        parity::assert_training_matches(Box::new(method), flat, batches, &reply, &official)
    }

    fn batch(&self, step: u64) -> Batch {
        let size = [self.batch, self.channels, 1, self.size.0, self.size.1];
        let keys: Vec<SampleKey> = (0..self.batch as u64).map(|id| SampleKey { id, epoch: step, repeat: 0 }).collect();
        Batch::new(normal(step, &size), &keys, 9)
    }

    fn reference_config(&self) -> serde_json::Value {
        // Tables of transformers are square: build the nearest and let it interpolate.
        let side = self.size.0.max(self.size.1);
        let numbers = serde_json::json!({
            "size": [self.size.0, self.size.1],
            "image_size": side, "patch_size": self.patch, "num_channels": self.channels,
            "hidden_size": self.encoder.width, "num_hidden_layers": self.encoder.depth,
            "num_attention_heads": self.encoder.heads, "intermediate_size": 4 * self.encoder.width,
            "decoder_hidden_size": self.decoder.width, "decoder_num_hidden_layers": self.decoder.depth,
            "decoder_num_attention_heads": self.decoder.heads, "decoder_intermediate_size": 4 * self.decoder.width,
            "mask_ratio": self.ratio, "norm_pix_loss": self.normalize,
        });
        parity::training_numbers(STEPS, numbers)
    }
}

fn positions_match_the_official_table() -> Outcome {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("positions.safetensors");
    for (rows, cols, width) in [(7, 7, 48), (3, 5, 16), (14, 9, 132)] {
        oracle("positions.py", &[path.to_str().unwrap(), &rows.to_string(), &cols.to_string(), &width.to_string()])?;
        let grid = occlude::grid::Grid { frames: 1, rows, cols, channels: 3, patch_frames: 1, patch: 4 };
        let ours = occlude::part::encoder::position::sincos_2d(&grid, width);
        let difference = (ours - &read(&path)?["positions"]).abs().max().double_value(&[]);
        assert!(difference <= 1e-6, "a {rows} × {cols} table of width {width} is off by {difference:e}");
    }
    Ok(())
}
