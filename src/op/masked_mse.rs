//! The squared error at the hidden patches.

use super::launch::{Launch, Source, blocks, by_width, wide};
use super::{fold, scale};
use crate::bridge::{Forward, node};
use crate::fault::Result;
use tch::{Kind, Tensor};

/// guess [.., P] and truth fp32 [.., P] → the sum over patches of the mean over a patch's values, fp32 []. The truth has
/// no gradient. On a GPU in one pass, which also makes the gradient and keeps that alone.
pub fn masked_mse(guess: &Tensor, truth: &Tensor) -> Result<Tensor> {
    if guess.device().is_cuda() && KINDS.contains(&guess.kind()) {
        return kernel(guess, truth);
    }
    Ok(formula(guess, truth))
}

/// The reference; in fp64 where the guess is.
pub fn formula(guess: &Tensor, truth: &Tensor) -> Tensor {
    let kind = if guess.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    (guess.to_kind(kind) - truth).square().mean_dim(-1, false, kind).sum(kind)
}

const KINDS: [Kind; 2] = [Kind::Float, Kind::BFloat16];

pub const SOURCE: Source = Source {
    name: "masked_mse",
    built_in: include_str!("../../kernels/masked_mse.cu"),
    variants: || KINDS.iter().flat_map(|&kind| [1, 8].map(|numel| by_width(kind, numel))).collect(),
};

/// Blocks at most: eight for each multiprocessor of a Hopper, all of them at work at once.
const MOST: u32 = 1056;

/// The same by our kernel; guess and truth are made contiguous.
pub fn kernel(guess: &Tensor, truth: &Tensor) -> Result<Tensor> {
    let trained = guess.requires_grad();
    let truth = truth.to_kind(Kind::Float).contiguous();
    let run = |given: &[Tensor]| {
        let guess = given[0].contiguous();
        let (numel, patch) = (guess.numel() as i64, *guess.size().last().expect("a dimension"));
        let gradient = trained.then(|| Tensor::empty_like(&guess));
        let grid = blocks(numel / wide(guess.kind(), numel), 256).min(MOST);
        let parts = Tensor::empty([i64::from(grid), 1], (Kind::Float, guess.device()));
        let launch = Launch {
            source: &SOURCE,
            variant: by_width(guess.kind(), numel),
            entry: "masked_mse",
            grid: [grid, 1, 1],
            threads: 256,
            shared: 4 * 8,
        };
        let tensors = [(&guess).into(), (&truth).into(), gradient.as_ref().into(), (&parts).into()];
        launch.run(&[&tensors[..], &[numel.into(), (1.0 / patch as f32).into()]].concat())?;
        let sum = fold::kernel(&parts, Kind::Float)?.view([]);
        Ok(Forward { outputs: vec![sum], saved: gradient.into_iter().collect() })
    };
    let outputs = node(&[guess], run, |saved, gradients, _| Ok(vec![Some(scale::kernel(&saved[0], &gradients[0])?)]))?;
    Ok(outputs.into_iter().next().expect("one output"))
}
