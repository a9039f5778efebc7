//! The contrastive loss of images and captions over the global batch (CLIP, Radford et al., 2021, figure 3).

use crate::error::Result;
use crate::op::info_nce::symmetric_info_nce;
use crate::part::gather::AllGather;
use tch::Tensor;

/// Computes half the cross entropies of both directions, summed over this rank's samples, fp32 []. `image` and `text`
/// are the embeddings of this rank's pairs, unit vectors fp32 [B, E]; `scale` [] multiplies their dot products.
///
/// Each rank scores its own rows against those of all ranks, so that it holds B of G rows of logits. Gradients reach
/// the rows of other ranks through the all-gather; only with them is the sum over ranks the loss of the global batch
/// with its gradient.
pub fn contrastive(image: &Tensor, text: &Tensor, scale: &Tensor, ranks: &AllGather) -> Result<Tensor> {
    let all = ranks.forward(&Tensor::cat(&[image, text], 1))?.chunk(2, 1); // [G, 2E]
    let offset = ranks.row_offset(image.size()[0]);
    Ok(symmetric_info_nce([image, text], [&all[0], &all[1]], scale, offset)? * 0.5)
}
