//! Square images and the shapes of transformers' ViTMAE, from which methods on its parts and their oracles are built.

use crate::support::method_ext::MethodExt;
use crate::support::{Tensors, normal, parity};
use libtest_mimic::Failed;
use occlude::grid::InputConfig;
use occlude::method::{Batch, Method};
use occlude::op::shuffle::SampleKey;
use occlude::optim::flat::FlatParams;
use occlude::part::encoder::vit::Shape;
use serde_json::{Value, json};
use tch::{Kind, Tensor};

/// Sizes of a model and its samples.
#[derive(Clone, Copy)]
pub struct VitMaeCase {
    pub batch: i64,
    pub channels: i64,
    pub side: i64,
    pub patch: i64,
    pub encoder: Shape,
    pub decoder: Shape,
    pub ratio: f64,
}

pub fn shape(width: i64, depth: i64, heads: i64) -> Shape {
    Shape { width, depth, heads, mlp_ratio: 4 }
}

/// Returns the input of images or clips with default mean and deviation.
pub fn input(channels: i64, size: [i64; 2], patch: i64) -> InputConfig {
    let [height, width] = size;
    InputConfig { channels, frames: 1, height, width, patch, patch_frames: 1, mean: vec![], std: vec![] }
}

/// Returns the keys of the samples of a step.
pub fn keys(count: i64, step: u64) -> Vec<SampleKey> {
    (0..count as u64).map(|id| SampleKey { id, epoch: step, repeat: 0 }).collect()
}

/// The steps that an oracle is asked about.
pub struct Question<'a> {
    pub batches: &'a [Batch],
    /// Numbers of the method beside those of ViTMAE.
    pub numbers: Value,
    /// Tensors of the method beside those of ViTMAE.
    pub more: Vec<(String, Tensor)>,
}

impl VitMaeCase {
    /// Grayscale images and one block on either side.
    pub fn gray() -> VitMaeCase {
        let encoder = shape(24, 1, 3);
        VitMaeCase { batch: 5, channels: 1, side: 20, patch: 4, encoder, decoder: shape(16, 1, 2), ratio: 0.6 }
    }

    pub fn input(&self) -> InputConfig {
        input(self.channels, [self.side; 2], self.patch)
    }

    /// Returns standardized pixels of a step.
    pub fn batch(&self, step: u64) -> Batch {
        Batch::new(normal(step, &[self.batch, self.channels, 1, self.side, self.side]), &keys(self.batch, step), 9)
    }

    /// Asks an oracle about some steps: `input.<i>`, `noise.<i>`, and the labels if there are any.
    pub fn oracle_reply(
        &self,
        script: &str,
        method: &dyn Method,
        flat: &FlatParams,
        naming: parity::Naming,
        question: Question,
    ) -> Result<Tensors, Failed> {
        let Question { batches, numbers, more } = question;
        let mut request = more;
        for (step, batch) in batches.iter().enumerate() {
            request.push((format!("input.{step}"), batch.view().squeeze_dim(2)));
            // The noise whose ascending order is our order of tokens.
            let order = method.sample_mask(batch).restore().to_kind(Kind::Float);
            request.push((format!("noise.{step}"), order / method.grid().tokens()));
            let labels = batch.side.labels.as_ref().map(Tensor::shallow_clone);
            request.extend(labels.map(|labels| (format!("label.{step}"), labels)));
        }
        let mut all = parity::training_numbers(batches.len(), self.numbers());
        all.as_object_mut().expect("an object").extend(numbers.as_object().expect("an object").clone());
        parity::oracle_reply(&[script], flat, naming, request, &all)
    }

    fn numbers(&self) -> Value {
        json!({
            "image_size": self.side, "patch_size": self.patch, "num_channels": self.channels,
            "hidden_size": self.encoder.width, "num_hidden_layers": self.encoder.depth,
            "num_attention_heads": self.encoder.heads, "intermediate_size": 4 * self.encoder.width,
            "decoder_hidden_size": self.decoder.width, "decoder_num_hidden_layers": self.decoder.depth,
            "decoder_num_attention_heads": self.decoder.heads, "decoder_intermediate_size": 4 * self.decoder.width,
            "mask_ratio": self.ratio, "norm_pix_loss": true,
        })
    }
}
