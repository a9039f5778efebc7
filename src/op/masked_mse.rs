//! Mean squared error of the hidden patches.

use super::launch::{KernelSource, Launch, block_count, variant_by_width, vector_width};
use super::{scale, sum_partials};
use crate::bridge::{ForwardOutput, apply_function};
use crate::error::Result;
use tch::{Kind, Tensor};

/// pred [.., P] and target fp32 [.., P] → the sum over patches of the mean over a patch's values, fp32 []. The target
/// has no gradient. On a GPU in one pass, which also computes the gradient and keeps only that.
pub fn masked_mse(pred: &Tensor, target: &Tensor) -> Result<Tensor> {
    if pred.device().is_cuda() && KINDS.contains(&pred.kind()) {
        return kernel(pred, target);
    }
    Ok(formula(pred, target))
}

/// The reference; in fp64 if the prediction is.
pub fn formula(pred: &Tensor, target: &Tensor) -> Tensor {
    let kind = if pred.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    (pred.to_kind(kind) - target).square().mean_dim(-1, false, kind).sum(kind)
}

const KINDS: [Kind; 2] = [Kind::Float, Kind::BFloat16];

/// Kernel source.
pub const SOURCE: KernelSource = KernelSource {
    name: "masked_mse",
    embedded: include_str!("../../kernels/masked_mse.cu"),
    variants: || KINDS.iter().flat_map(|&kind| [1, 8].map(|numel| variant_by_width(kind, numel))).collect(),
};

/// Maximum number of blocks: eight per multiprocessor of a Hopper, all resident at once.
const MAX_BLOCKS: u32 = 1056;

/// The same by the kernel. Makes pred and target contiguous.
pub fn kernel(pred: &Tensor, target: &Tensor) -> Result<Tensor> {
    let needs_gradient = pred.requires_grad();
    let target = target.to_kind(Kind::Float).contiguous();
    let forward = |inputs: &[Tensor]| {
        let pred = inputs[0].contiguous();
        let numel = pred.numel() as i64;
        let patch_values = *pred.size().last().expect("at least one dimension");
        let gradient = needs_gradient.then(|| Tensor::empty_like(&pred));
        let grid = block_count(numel / vector_width(pred.kind(), numel), 256).min(MAX_BLOCKS);
        let parts = Tensor::empty([i64::from(grid), 1], (Kind::Float, pred.device()));
        let launch = Launch {
            source: &SOURCE,
            variant: variant_by_width(pred.kind(), numel),
            entry: "masked_mse",
            grid: [grid, 1, 1],
            threads: 256,
            shared_bytes: 4 * 8,
        };
        launch.run(&[
            (&pred).into(),
            (&target).into(),
            gradient.as_ref().into(),
            (&parts).into(),
            numel.into(),
            (1.0 / patch_values as f32).into(),
        ])?;
        let sum = sum_partials::kernel(&parts, Kind::Float)?.view([]);
        Ok(ForwardOutput { outputs: vec![sum], saved: gradient.into_iter().collect() })
    };
    let backward =
        |saved: &[Tensor], gradients: &[Tensor], _: &[bool]| Ok(vec![Some(scale::kernel(&saved[0], &gradients[0])?)]);
    let outputs = apply_function(&[pred], forward, backward)?;
    Ok(outputs.into_iter().next().expect("one output"))
}
