//! Assembles the input of a transformer: class token, visible tokens, mask tokens and positions in one sequence.

use super::launch::{Argument, KernelSource, Launch, block_count, variant_by_width, vector_width};
use super::{patch::gather, sizes, sum_partials};
use crate::bridge::{ForwardOutput, apply_function};
use crate::error::Result;
use tch::{Kind, Tensor};

/// The layout of a sequence of tokens.
#[derive(Clone, Copy)]
pub struct TokenLayout<'a> {
    /// Positions [N, D], fixed: no gradient reaches them. The class token has no position.
    pub positions: &'a Tensor,
    /// Positions of the visible tokens, int64 [B, K].
    pub keep: &'a Tensor,
    /// The mask token `[D]` and the positions where it is inserted, int64 [B, M]; `None` inserts no mask tokens.
    pub hidden: Option<(&'a Tensor, &'a Tensor)>,
}

impl TokenLayout<'_> {
    fn hidden_tokens(&self) -> i64 {
        self.hidden.map_or(0, |(_, drop)| drop.size()[1])
    }
}

/// visible [B, K, D] and the class token `[D]`, or visible [B, 1+K, D] with the class tokens first → [B, 1+K+M, D]:
/// class, visible, hidden. visible [B, K, D] without class token → [B, K+M, D]. Tokens are not unshuffled: attention
/// does not depend on their order, and each carries its position. On a GPU in one pass, with positions added in fp32.
pub fn assemble_tokens(visible: &Tensor, class: Option<&Tensor>, layout: TokenLayout) -> Result<Tensor> {
    if visible.device().is_cuda() && KINDS.contains(&visible.kind()) {
        return kernel(visible, class, layout);
    }
    Ok(formula(visible, class, layout))
}

/// The reference; positions are rounded to the dtype of the tokens.
pub fn formula(visible: &Tensor, class: Option<&Tensor>, layout: TokenLayout) -> Tensor {
    let [batch, _, width] = sizes(visible);
    let [_, kept] = sizes(layout.keep);
    let positions = layout.positions.to_kind(visible.kind());
    let positions = positions.unsqueeze(0).expand([batch, positions.size()[0], width], false);
    let class_tokens = visible.size()[1] - kept;
    let (class, visible) = match class {
        Some(class) => (class.view([1, 1, width]).expand([batch, 1, width], false), visible.shallow_clone()),
        None => (visible.narrow(1, 0, class_tokens), visible.narrow(1, class_tokens, kept)),
    };
    let visible = visible + gather(&positions, layout.keep);
    let hidden = layout.hidden.map(|(mask_token, drop)| gather(&positions, drop) + mask_token);
    Tensor::cat(&[class, visible].into_iter().chain(hidden).collect::<Vec<_>>(), 1)
}

const KINDS: [Kind; 2] = [Kind::Float, Kind::BFloat16];

/// Kernel source.
pub const SOURCE: KernelSource = KernelSource {
    name: "tokens",
    embedded: include_str!("../../kernels/tokens.cu"),
    variants: || KINDS.iter().flat_map(|&kind| [1, 8].map(|width| variant_by_width(kind, width))).collect(),
};

/// The sizes of a sequence.
#[derive(Clone, Copy)]
struct TokenCounts {
    batch: i64,
    width: i64,
    kept: i64,
    hidden: i64,
    /// Class tokens per sample: one or none.
    class_tokens: i64,
    /// True if the class token is already part of the input.
    class_in_input: bool,
}

impl TokenCounts {
    fn input_size(&self) -> [i64; 3] {
        [self.batch, self.kept + i64::from(self.class_in_input), self.width]
    }

    fn output_size(&self) -> [i64; 3] {
        [self.batch, self.class_tokens + self.kept + self.hidden, self.width]
    }

    fn rows(&self) -> i64 {
        self.batch * self.output_size()[1]
    }

    fn launch(&self, entry: &'static str, kind: Kind, rows_per_block: i64, shared_bytes: usize) -> Launch<'static> {
        let columns = block_count(self.width, 32 * vector_width(kind, self.width));
        let grid = [block_count(self.rows(), rows_per_block), columns, 1];
        Launch { source: &SOURCE, variant: variant_by_width(kind, self.width), entry, grid, threads: 256, shared_bytes }
    }

    /// The sizes as both kernels take them.
    fn arguments(&self) -> [Argument<'static>; 5] {
        [self.rows(), self.width, self.kept, self.hidden, self.class_tokens].map(|n| (n as i32).into())
    }
}

/// Rows per block of the forward and the backward kernel.
const FORWARD_ROWS: i64 = 32;
const BACKWARD_ROWS: i64 = 64;

/// The same by the kernels. Makes tokens contiguous.
pub fn kernel(visible: &Tensor, class: Option<&Tensor>, layout: TokenLayout) -> Result<Tensor> {
    let [batch, tokens, width] = sizes(visible);
    let [_, kept] = sizes(layout.keep);
    let class_in_input = class.is_none() && tokens > kept;
    let class_tokens = if class.is_some() { 1 } else { tokens - kept };
    let hidden = layout.hidden_tokens();
    let counts = TokenCounts { batch, width, kept, hidden, class_tokens, class_in_input };
    let mask_token = layout.hidden.map(|(mask_token, _)| mask_token);
    let inputs: Vec<&Tensor> = std::iter::once(visible).chain(class).chain(mask_token).collect();
    let positions = layout.positions.to_kind(Kind::Float).contiguous();
    let keep = layout.keep.contiguous();
    let drop = layout.hidden.map(|(_, drop)| drop.contiguous());
    let forward = |inputs: &[Tensor]| {
        let inputs: Vec<Tensor> = inputs.iter().map(Tensor::contiguous).collect();
        let class = class.map(|_| &inputs[1]);
        let mask_token = mask_token.and(inputs.last());
        let out = Tensor::empty(counts.output_size(), (visible.kind(), visible.device()));
        let tensors = [
            Argument::from(&inputs[0]),
            class.into(),
            mask_token.into(),
            (&positions).into(),
            (&keep).into(),
            drop.as_ref().into(),
            (&out).into(),
        ];
        let launch = counts.launch("assemble_tokens", visible.kind(), FORWARD_ROWS, 0);
        launch.run(&[&tensors[..], &counts.arguments(), &[(FORWARD_ROWS as i32).into()]].concat())?;
        Ok(ForwardOutput { outputs: vec![out], saved: vec![] })
    };
    let has_class = class.is_some();
    let has_mask_token = mask_token.is_some();
    let outputs = apply_function(&inputs, forward, move |_, gradients, needed| {
        let TokenGradients { visible, mask_token, class } = backward(&gradients[0].contiguous(), counts, needed)?;
        let class = has_class.then_some(class);
        let mask_token = has_mask_token.then_some(mask_token);
        let all = std::iter::once(visible).chain(class).chain(mask_token);
        Ok(all.zip(needed).map(|(gradient, needed)| gradient.filter(|_| *needed)).collect())
    })?;
    Ok(outputs.into_iter().next().expect("one output"))
}

/// The gradients of the visible tokens [B, K, D] or [B, 1+K, D], and of the mask token and the class token `[D]`.
struct TokenGradients {
    visible: Option<Tensor>,
    mask_token: Option<Tensor>,
    class: Option<Tensor>,
}

fn backward(g_out: &Tensor, counts: TokenCounts, needed: &[bool]) -> Result<TokenGradients> {
    if (counts.class_in_input || counts.class_tokens == 0) && counts.hidden == 0 {
        // The forward pass only added positions.
        return Ok(TokenGradients { visible: Some(g_out.shallow_clone()), mask_token: None, class: None });
    }
    let visible = needed[0].then(|| Tensor::empty(counts.input_size(), (g_out.kind(), g_out.device())));
    let columns_per_block = 32 * vector_width(g_out.kind(), counts.width) as usize;
    let launch = counts.launch("assemble_tokens_backward", g_out.kind(), BACKWARD_ROWS, 4 * 8 * columns_per_block);
    let runs = i64::from(launch.grid[0]);
    let needs_vectors = needed[1..].contains(&true);
    let parts = needs_vectors.then(|| Tensor::empty([runs, 2 * counts.width], (Kind::Float, g_out.device())));
    let tensors = [g_out.into(), visible.as_ref().into(), parts.as_ref().into()];
    let flags = [i32::from(counts.class_in_input), BACKWARD_ROWS as i32].map(Argument::from);
    launch.run(&[&tensors[..], &counts.arguments(), &flags].concat())?;
    let Some(parts) = parts else { return Ok(TokenGradients { visible, mask_token: None, class: None }) };
    let sums = sum_partials::kernel(&parts, g_out.kind())?;
    let mask_token = Some(sums.narrow(0, 0, counts.width));
    let class = Some(sums.narrow(0, counts.width, counts.width));
    Ok(TokenGradients { visible, mask_token, class })
}
