//! Tests of MaskFeat against timm's vision transformer and histograms of torch's operations: losses, gradients and
//! weights after three AdamW steps, on images and clips; and of its blocks by counting.

use crate::support::method_ext::MethodExt;
use crate::support::parity;
use crate::support::vit_mae::{input, keys, shape};
use crate::support::{Outcome, assert_lines_rejected, normal};
use occlude::grid::InputConfig;
use occlude::interop;
use occlude::method::{Batch, maskfeat};
use occlude::part::encoder::vit::Shape;
use occlude::part::mask::BlockMask;
use occlude::part::objective::draw_hog::draw_hog;
use occlude::part::objective::hog::hog_target;
use serde_json::json;
use tch::{Kind, Tensor};

crate::trials![
    a_grayscale_image_matches_timm,
    an_odd_color_image_matches_timm,
    a_clip_of_cubes_matches_timm,
    histograms_do_not_depend_on_brightness_and_contrast,
    every_sample_hides_the_same_number_in_blocks,
    an_edge_is_drawn_along_itself,
    an_invalid_config_is_rejected,
];

const STEPS: usize = 3;

struct Case {
    batch: i64,
    channels: i64,
    frames: i64,
    patch_frames: i64,
    size: [i64; 2],
    patch: i64,
    encoder: Shape,
    mask: BlockMask,
}

fn blocks(ratio: f64) -> BlockMask {
    BlockMask { ratio, unit: [1; 3], min_block: 0.2, max_tries: 10 }
}

fn image() -> Case {
    Case {
        batch: 3,
        channels: 1,
        frames: 1,
        patch_frames: 1,
        size: [40, 40],
        patch: 8,
        encoder: shape(24, 2, 3),
        mask: blocks(0.4),
    }
}

fn a_grayscale_image_matches_timm() -> Outcome {
    image().check()
}

fn an_odd_color_image_matches_timm() -> Outcome {
    let encoder = shape(60, 3, 5);
    Case { batch: 2, channels: 3, size: [64, 48], patch: 16, encoder, mask: blocks(0.5), ..image() }.check()
}

fn a_clip_of_cubes_matches_timm() -> Outcome {
    let encoder = shape(28, 2, 7);
    let mask = BlockMask { unit: [1, 2, 2], max_tries: 100, ..blocks(0.4) };
    Case { batch: 2, channels: 3, frames: 6, patch_frames: 2, size: [32, 48], encoder, mask, ..image() }.check()
}

impl Case {
    fn method(&self) -> Result<maskfeat::MaskFeat, occlude::error::Error> {
        let Case { frames, patch_frames, .. } = *self;
        let input = InputConfig { frames, patch_frames, ..input(self.channels, self.size, self.patch) };
        maskfeat::MaskFeat::new(&maskfeat::Config { encoder: self.encoder, mask: self.mask }, &input)
    }

    fn batch(&self, step: u64) -> Batch {
        let [height, width] = self.size;
        let pixels = normal(step, &[self.batch, self.channels, self.frames, height, width]);
        Batch::new(pixels, &keys(self.batch, step), 9)
    }

    fn check(&self) -> Outcome {
        let method = self.method()?;
        let grid = method.grid();
        let flat = parity::perturbed_weights(&method)?;
        let batches: Vec<Batch> = (0..STEPS).map(|step| self.batch(step as u64)).collect();
        let mut request = Vec::new();
        for (step, batch) in batches.iter().enumerate() {
            request.push((format!("input.{step}"), batch.view().shallow_clone()));
            request.push((format!("drop.{step}"), method.sample_mask(batch).drop));
        }
        let family = if self.frames > 1 { "videomae" } else { "mae" };
        let naming = |name: &str, tensor: &Tensor| match name {
            "encoder.positions" => ("pos_embed".to_owned(), tensor.unsqueeze(0)),
            "encoder.cls_token" | "encoder.mask_token" => (name.replace("encoder.", ""), tensor.shallow_clone()),
            // Both families agree on the patch embedding alone.
            _ if name.starts_with("encoder.embed.") => {
                let (_, tensor) = interop::to_official(family, name, tensor, &grid);
                (name.replace("encoder.embed.", "patch_embed.proj."), tensor)
            }
            _ => interop::to_official("mae", name, tensor, &grid),
        };
        let numbers = json!({
            "patch": self.patch, "patch_frames": self.patch_frames, "width": self.encoder.width,
            "depth": self.encoder.depth, "heads": self.encoder.heads,
        });
        let numbers = parity::training_numbers(STEPS, numbers);
        let reply = parity::oracle_reply(&["maskfeat.py"], &flat, &naming, request, &numbers)?;
        parity::assert_training_matches(Box::new(method), flat, batches, &reply, &naming)
    }
}

fn histograms_do_not_depend_on_brightness_and_contrast() -> Outcome {
    let method = image().method()?;
    let batch = image().batch(0);
    let patchify = &method.model.patchify;
    let histograms = hog_target(patchify, batch.view())?;
    for (factor, offset) in [(2.0, 0.0), (0.5, 3.0), (-1.0, 1.0)] {
        let other = hog_target(patchify, &(batch.view() * factor + offset))?;
        // A pixel whose direction is on the border of two bins may change sides.
        let differing = (&other - &histograms).abs().gt(1e-4).sum(Kind::Int64).int64_value(&[]);
        assert!(differing <= 4, "· {factor} + {offset}: {differing} of {} values differ", histograms.numel());
    }
    let norm = histograms.reshape([-1, 9]).norm_scalaropt_dim(2.0, [1i64].as_slice(), false);
    assert!((norm - 1.0).abs().max().double_value(&[]) < 1e-5, "each cell has length one");
    Ok(())
}

fn every_sample_hides_the_same_number_in_blocks() -> Outcome {
    let case = Case { batch: 50, size: [112, 112], ..image() };
    let method = case.method()?;
    let mask = method.sample_mask(&case.batch(1));
    assert_eq!((mask.keep.size(), mask.drop.size()), (vec![50, 118], vec![50, 78]), "round(0.4 · 196) hidden");
    // Neighbors of hidden tokens are hidden far more often than at random.
    let mut pairs = 0;
    for row in 0..50 {
        let hidden = Vec::<i64>::try_from(mask.drop.get(row))?;
        pairs += hidden.iter().filter(|&&token| token % 14 < 13 && hidden.contains(&(token + 1))).count();
    }
    let random = 50.0 * 78.0 * (77.0 / 195.0) * (13.0 / 14.0);
    assert!(pairs as f64 > 1.6 * random, "{pairs} neighbors against {random:.0} at random");
    Ok(())
}

fn an_edge_is_drawn_along_itself() -> Outcome {
    // A vertical edge inside a cell: dark left, bright right.
    let case = Case { batch: 1, size: [24, 24], ..image() };
    let method = case.method()?;
    let pixels = Tensor::zeros([1, 1, 1, 24, 24], (Kind::Float, tch::Device::Cpu));
    let _ = pixels.narrow(4, 12, 12).fill_(1.0);
    let batch = Batch::new(pixels, &keys(1, 0), 9);
    let mask = method.sample_mask(&batch);
    let pred = hog_target(&method.model.patchify, batch.view())?;
    let pred = occlude::op::patch::gather(&pred, &mask.drop);
    let drawn = draw_hog(&method.model.patchify, batch.view(), &pred, &mask)?;
    assert!(drawn.predicted == drawn.original, "a perfect prediction is the target");
    let cell = drawn.original.squeeze().narrow(0, 8, 8).narrow(1, 8, 8);
    let columns = cell.sum_dim_intlist([0i64].as_slice(), false, Kind::Float);
    let rows = cell.sum_dim_intlist([1i64].as_slice(), false, Kind::Float);
    let spread = |x: &Tensor| x.std(false).double_value(&[]);
    assert!(spread(&columns) > 2.0 * spread(&rows), "the stroke is upright: {columns:?} {rows:?}");
    Ok(())
}

fn an_invalid_config_is_rejected() -> Outcome {
    assert_lines_rejected(
        "maskfeat",
        &[
            ("input.patch=4", "input.patch is 4; method.maskfeat predicts histograms of cells of 8 pixels"),
            ("method.maskfeat.mask.ratio=1", "the share hidden must lie in (0, 1)"),
            ("method.maskfeat.mask.ratio=0.99", "at least one must be kept and one hidden"),
            ("method.maskfeat.mask.unit=[1,4,4]", "does not divide the [1, 6, 6] tokens"),
            ("method.maskfeat.mask.unit=[1,0,1]", "does not divide the [1, 6, 6] tokens"),
            ("method.maskfeat.mask.max_tries=0", "max_tries"),
            ("method.maskfeat.mask.rato=1", "did you mean `ratio`?"),
        ],
    )
}
