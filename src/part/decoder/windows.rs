//! A decoder whose tokens look at their neighbours alone: local windows, every second block's moved, with attention by the
//! cosine and normalisation behind each half (Audio-MAE, Huang et al., 2022, section 3, "Decoder with local attention",
//! as its code has it: facebookresearch/AudioMAE models_mae.py and timm_patch/swin_transformer.py, an early form of timm's
//! `swin_transformer_v2_cr`). In training that code drops a tenth of the numbers inside the network that makes the biases
//! of places; here none is dropped, since such noise would be a rank's, not a sample's.

use crate::fault::Result;
use crate::grid::Grid;
use crate::op::attention::{Windows, cosine};
use crate::op::bias_gelu::Form;
use crate::op::fill::{Places, fill};
use crate::op::patch::gather;
use crate::part::encoder::position::Positions;
use crate::part::encoder::vit::Shape;
use crate::part::mask::Mask;
use crate::part::weights::{Init, Linear, Norm, Slot, Table, Weights};
use std::cell::{Ref, RefCell};
use tch::{Device, Kind, Tensor};

/// What sets one paper's decoder apart from another's, beside its shape.
pub struct Make {
    /// How the mask token begins.
    pub token: Init,
    /// fp32 [N, D], fixed.
    pub positions: Tensor,
    /// Rows and columns of a window. Where the grid has fewer, a window has the grid's.
    pub window: [i64; 2],
    /// Rows and columns by which the windows of every second block, from the second on, are moved; along an axis that one
    /// window fills, they are not.
    pub shift: [i64; 2],
}

pub struct Decoder {
    embed: Linear,
    token: Slot,
    blocks: Vec<Block>,
    norm: Norm,
    pred: Linear,
    positions: Positions,
    grid: [i64; 2],
    window: [i64; 2],
    shift: [i64; 2],
    placed: RefCell<Local>,
}

/// What blocks know of places, on one device.
struct Local {
    device: Device,
    /// Of blocks 0, 2, .. and of blocks 1, 3, ..
    windows: [Windows; 2],
    /// fp32 [T · T, 2]: from key to query in a window, rows and columns.
    apart: Tensor,
}

impl Local {
    fn new(grid: [i64; 2], window: [i64; 2], shift: [i64; 2], device: Device) -> Result<Local> {
        let windows = [Windows::new(grid, window, [0, 0], device)?, Windows::new(grid, window, shift, device)?];
        Ok(Local { device, windows, apart: apart(window).to_device(device) })
    }
}

/// fp32 [T · T, 2]: sign(Δ) · ln(1 + |Δ|) of the way from each key to each query (Swin Transformer V2, Liu et al., 2022,
/// equation 4).
fn apart([rows, columns]: [i64; 2]) -> Tensor {
    let along = |delta: i64| (delta.signum() as f64 * (delta.unsigned_abs() as f64).ln_1p()) as f32;
    let tokens = rows * columns;
    let pairs = (0..tokens).flat_map(|query| (0..tokens).map(move |key| (query, key)));
    let ways =
        pairs.flat_map(|(query, key)| [along(query / columns - key / columns), along(query % columns - key % columns)]);
    Tensor::from_slice(&ways.collect::<Vec<f32>>()).view([tokens * tokens, 2])
}

impl Decoder {
    /// `inputs` is the encoder's width. Tensors: `<name>.embed`, `.mask_token`, `.blocks.<i>`, `.norm`, `.pred`.
    ///
    /// # Errors
    /// The user's, where windows do not divide the grid.
    pub fn new(table: &mut Table, name: &str, grid: &Grid, inputs: i64, shape: &Shape, make: Make) -> Result<Self> {
        let Shape { width, depth, heads, mlp_ratio } = *shape;
        let sides = [grid.rows, grid.cols];
        let window = [0, 1].map(|axis| make.window[axis].min(sides[axis]));
        let shift = [0, 1].map(|axis| if sides[axis] <= window[axis] { 0 } else { make.shift[axis] });
        Ok(Decoder {
            embed: Linear::new(table, &format!("{name}.embed"), inputs, width),
            token: table.add(format!("{name}.mask_token"), &[1, 1, width], make.token),
            blocks: (0..depth)
                .map(|i| Block::new(table, &format!("{name}.blocks.{i}"), width, heads, mlp_ratio * width))
                .collect(),
            norm: Norm::new(table, &format!("{name}.norm"), width),
            pred: Linear::new(table, &format!("{name}.pred"), width, grid.values()),
            positions: make.positions.into(),
            grid: sides,
            window,
            shift,
            placed: RefCell::new(Local::new(sides, window, shift, Device::Cpu)?),
        })
    }

    /// Guesses at the dropped places [B, M, P] from the features of visible tokens [B, K, D of the encoder], or [B, 1+K, D]
    /// behind a class token, which this decoder does not read.
    pub fn guess(&self, w: &Weights, features: &Tensor, mask: &Mask) -> Result<Tensor> {
        let kept = mask.keep.size()[1];
        let seen = self.embed.forward(w, &features.narrow(1, features.size()[1] - kept, kept))?; // [B, K, D]
        let positions = self.positions.on(seen.device());
        let hidden = Some((&w[self.token].view(-1), &mask.drop));
        let mixed = fill(&seen, None, Places { positions: &positions, keep: &mask.keep, hidden })?;
        // Windows are of the grid: its order comes back, once for all blocks.
        let x = self.transform(w, gather(&mixed, &mask.restore()), Some(&mask.drop))?;
        self.pred.forward(w, &self.norm.forward(w, &x)?)
    }

    /// x [B, N, D] in row-major order through all blocks → [B, N, D], or where `only` int64 [B, M] names the tokens that
    /// are wanted, theirs [B, M, D]: the last block's second half is computed for them alone.
    pub fn transform(&self, w: &Weights, mut x: Tensor, only: Option<&Tensor>) -> Result<Tensor> {
        let local = self.local(x.device())?;
        for (i, block) in self.blocks.iter().enumerate() {
            let only = only.filter(|_| i + 1 == self.blocks.len());
            x = block.forward(w, &x, (&local.windows[i % 2], &local.apart), only)?;
        }
        Ok(x)
    }

    /// The places on a device, where they stay until another is asked for.
    fn local(&self, device: Device) -> Result<Ref<'_, Local>> {
        if self.placed.borrow().device != device {
            self.placed.replace(Local::new(self.grid, self.window, self.shift, device)?);
        }
        Ok(self.placed.borrow())
    }
}

/// The width of the network that makes biases from places.
const INSIDE: i64 = 384;

/// What a head divides its cosines by begins at one and is never less than this.
const LEAST: f64 = 0.01;

/// A block of windows: x + norm(attention(x)), then x + norm(perceptron(x)).
struct Block {
    qkv: Linear,
    /// [H].
    tau: Slot,
    from_places: [Linear; 2],
    proj: Linear,
    norm1: Norm,
    fc1: Linear,
    fc2: Linear,
    norm2: Norm,
    heads: i64,
}

impl Block {
    /// Tensors are called as in the official code: `<name>.attn.tau`, `<name>.attn.meta_mlp.fc1.weight` and so on.
    fn new(table: &mut Table, name: &str, width: i64, heads: i64, hidden: i64) -> Self {
        let linear = |table: &mut Table, of: &str, [inputs, outputs]: [i64; 2]| {
            Linear::new(table, &format!("{name}.{of}"), inputs, outputs)
        };
        Block {
            qkv: linear(table, "attn.qkv", [width, 3 * width]),
            tau: table.add(format!("{name}.attn.tau"), &[heads], Init::One),
            from_places: [
                linear(table, "attn.meta_mlp.fc1", [2, INSIDE]),
                linear(table, "attn.meta_mlp.fc2", [INSIDE, heads]),
            ],
            proj: linear(table, "attn.proj", [width, width]),
            norm1: Norm::new(table, &format!("{name}.norm1"), width),
            fc1: linear(table, "mlp.fc1", [width, hidden]),
            fc2: linear(table, "mlp.fc2", [hidden, width]),
            norm2: Norm::new(table, &format!("{name}.norm2"), width),
            heads,
        }
    }

    /// x [B, N, D] → [B, N, D], or of the tokens `only` [B, M] names → [B, M, D].
    fn forward(
        &self,
        w: &Weights,
        x: &Tensor,
        (windows, apart): (&Windows, &Tensor),
        only: Option<&Tensor>,
    ) -> Result<Tensor> {
        let scale = w[self.tau].to_kind(Kind::Float).clamp_min(LEAST).reciprocal(); // [H]
        let bias = self.bias(w, apart, windows.size())?;
        let mixed = cosine(&self.qkv.forward(w, x)?, self.heads, windows, [&scale, &bias])?;
        let of = |x: &Tensor| only.map_or_else(|| x.shallow_clone(), |only| gather(x, only));
        let x = of(x) + self.norm1.forward(w, &self.proj.forward(w, &of(&mixed))?)?;
        let hidden = self.fc1.through_gelu(w, &x, Form::Exact)?;
        Ok(&x + self.norm2.forward(w, &self.fc2.forward(w, &hidden)?)?)
    }

    /// fp32 [H, T, T]: what each head adds to the score of each query with each key of a window.
    fn bias(&self, w: &Weights, apart: &Tensor, tokens: i64) -> Result<Tensor> {
        let [first, second] = &self.from_places;
        let inside = first.forward(w, &apart.to_kind(w.kind()))?.relu();
        let biases = second.forward(w, &inside)?; // [T · T, H]
        Ok(biases.to_kind(Kind::Float).transpose(0, 1).reshape([self.heads, tokens, tokens]))
    }
}
