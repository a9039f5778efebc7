//! Images and captions of the whole batch, each to find the other (CLIP, Radford et al., 2021, figure 3).

use super::gather::Gather;
use crate::fault::Result;
use crate::op::info_nce::symmetric;
use tch::Tensor;

/// This rank's images and captions, unit vectors fp32 [B, E], row by row the pairs; `scale` [] multiplies their dot
/// products → half the cross entropies of both directions, summed over this rank's samples, fp32 [].
///
/// Each rank scores its own rows against those of all ranks, so that it holds B of G rows of logits. Gradients reach the
/// other ranks' rows through the gather. Summed over ranks that is the loss of the whole batch, and its gradient; without
/// the way back through the gather it would be neither that nor a multiple of it.
pub fn contrastive(image: &Tensor, text: &Tensor, scale: &Tensor, ranks: &Gather) -> Result<Tensor> {
    let all = ranks.all(&Tensor::cat(&[image, text], 1))?.chunk(2, 1); // [G, 2E]
    Ok(symmetric([image, text], [&all[0], &all[1]], scale, ranks.first(image.size()[0]))? * 0.5)
}
