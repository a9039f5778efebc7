//! Causal attention of one token at a time, for sampling: keys and values of the tokens before it are kept.

use super::{merge_heads, sdpa, split_heads};
use crate::op::sizes;
use tch::Tensor;

/// Keys and values of the tokens so far, of one block.
pub struct KeyValueCache {
    /// [B, H, capacity, d].
    keys: Tensor,
    values: Tensor,
    tokens: i64,
}

impl KeyValueCache {
    /// Allocates room for `capacity` tokens of the sequences of x [B, .., D].
    pub fn new(x: &Tensor, heads: i64, capacity: i64) -> KeyValueCache {
        let size = x.size();
        let shape = [size[0], heads, capacity, size[size.len() - 1] / heads];
        let room = || x.new_zeros(shape, (x.kind(), x.device()));
        KeyValueCache { keys: room(), values: room(), tokens: 0 }
    }

    /// qkv [B, 1, 3·D] of the next token, as the projection writes it → its output [B, 1, D], as
    /// [`causal_attention`](super::causal_attention) has it in the whole sequence. Without gradients.
    ///
    /// # Panics
    /// If there is no room for another token.
    pub fn attend(&mut self, qkv: &Tensor) -> Tensor {
        let [_, heads, _, _] = sizes(&self.keys);
        let [q, k, v] = split_heads(qkv, heads, 0);
        self.keys.narrow(2, self.tokens, 1).copy_(&k);
        self.values.narrow(2, self.tokens, 1).copy_(&v);
        self.tokens += 1;
        let visible = |all: &Tensor| all.narrow(2, 0, self.tokens);
        merge_heads(&sdpa(&q, &visible(&self.keys), &visible(&self.values), None, false))
    }
}
