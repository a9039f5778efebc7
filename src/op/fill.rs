//! The decoder's input: visible tokens, mask tokens and positions in one sequence.

use super::{patch::gather, sizes};
use tch::Tensor;

/// seen [B, 1+K, D] with the class token first or [B, K, D] without one, mask token [D], positions [N, D] (the class
/// token has none), keep [B, K], drop [B, M] → [B, 1+K+M, D] or [B, K+M, D]: class, visible, hidden. Attention does not
/// know order, so nothing is unshuffled: every token carries the position that it stands for.
pub fn fill(seen: &Tensor, token: &Tensor, positions: &Tensor, keep: &Tensor, drop: &Tensor) -> Tensor {
    let [batch, all, width] = sizes(seen);
    let front = all - keep.size()[1];
    let at = positions.unsqueeze(0).expand([batch, positions.size()[0], width], false);
    let class = seen.narrow(1, 0, front);
    let visible = seen.narrow(1, front, keep.size()[1]) + gather(&at, keep);
    let hidden = gather(&at, drop) + token;
    Tensor::cat(&[class, visible, hidden], 1)
}
