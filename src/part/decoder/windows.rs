//! A decoder with local attention: windows that are shifted in every second block, cosine attention, and normalization
//! after attention and MLP (Audio-MAE, Huang et al., 2022, section 3, "Decoder with local attention", as in its code:
//! facebookresearch/AudioMAE models_mae.py and timm_patch/swin_transformer.py, an early form of timm's
//! `swin_transformer_v2_cr`). In training, that code applies dropout of 0.1 inside the network that computes position
//! biases; this decoder does not, because such noise would depend on the rank, not on the sample.

use super::Decode;
use crate::error::Result;
use crate::grid::Grid;
use crate::op::attention::{Windows, cosine_attention};
use crate::op::bias_gelu::Gelu;
use crate::op::tokens::{TokenLayout, assemble_tokens};
use crate::op::{at_least_float, patch::gather, sizes};
use crate::part::cost::{self, OpCost, Traffic};
use crate::part::encoder::position::Positions;
use crate::part::encoder::vit::Shape;
use crate::part::mask::Mask;
use crate::part::params::{Init, LayerNorm, Linear, ParamId, ParamSpecs, Weights};
use crate::part::recompute::{Leaves, recompute_in_backward};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::cell::RefCell;
use std::rc::Rc;
use tch::{Device, Tensor};

/// The windows of a decoder: the config's `attention.windows`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Rows and columns of patches in a window (official code: 4 and 4). A smaller grid is one window.
    #[serde(default = "Config::default_size")]
    pub size: [i64; 2],
    /// Rows and columns by which the windows of every second block are shifted (official code: 2 and 0).
    #[serde(default = "Config::default_shift")]
    pub shift: [i64; 2],
}

impl Default for Config {
    fn default() -> Self {
        Config { size: Config::default_size(), shift: Config::default_shift() }
    }
}

impl Config {
    fn default_size() -> [i64; 2] {
        [4, 4]
    }
    fn default_shift() -> [i64; 2] {
        [2, 0]
    }

    /// Limits the windows to a grid: along an axis where the grid is not larger than the window, the window has the
    /// grid's length and is not shifted.
    fn limited_to(&self, grid: &Grid) -> Config {
        let sides = [grid.rows, grid.cols];
        let size = [0, 1].map(|axis| self.size[axis].min(sides[axis]));
        let shift = [0, 1].map(|axis| if sides[axis] <= size[axis] { 0 } else { self.shift[axis] });
        Config { size, shift }
    }

    /// Checks the windows, which are at `path` in the config.
    ///
    /// # Errors
    /// A usage error if windows do not divide the grid.
    pub fn check(&self, path: &str, grid: &Grid) -> Result<()> {
        let Config { size, shift } = self.limited_to(grid);
        let windows = Windows::new([grid.rows, grid.cols], size, shift, Device::Cpu);
        windows.map(drop).map_err(|error| error.with_context(path))
    }
}

/// Options of a decoder besides its shape.
pub struct WindowDecoderOptions {
    /// Initializer of the mask token.
    pub mask_token: Init,
    /// Fixed positions, fp32 [N, D].
    pub positions: Tensor,
    pub windows: Config,
}

/// A decoder with windowed attention.
pub struct WindowDecoder {
    embed: Linear,
    mask_token: ParamId,
    blocks: Vec<WindowBlock>,
    norm: LayerNorm,
    pred: Linear,
    positions: Positions,
    /// Rows and columns of the grid.
    grid: [i64; 2],
    /// Size and shift of the windows.
    windows: Config,
    /// Geometries by device and number of rows. They are never freed, because captured graphs read them at their
    /// address.
    geometries: RefCell<Vec<Rc<WindowGeometry>>>,
    recompute: bool,
    /// The encoder's width.
    inputs: i64,
    /// Values per predicted patch.
    outputs: i64,
    shape: Shape,
}

/// The windows of a grid of which the first `rows` rows hold tokens, on one device.
struct WindowGeometry {
    device: Device,
    rows: i64,
    /// Windows of blocks 0, 2, .. and of blocks 1, 3, ..
    windows: [Windows; 2],
    /// Offsets from key to query in a window, in rows and columns, fp32 [T · T, 2].
    offsets: Tensor,
}

impl WindowGeometry {
    /// The windows may extend beyond the `rows` rows.
    fn new(rows: i64, columns: i64, windows: &Config, device: Device) -> Result<WindowGeometry> {
        let Config { size, shift } = *windows;
        let grid = [rows + padding_rows(rows, size[0]), columns];
        // If one window holds all rows, they are not shifted, as on a grid of their own.
        let shift = if grid[0] == size[0] { [0, shift[1]] } else { shift };
        let regular = Windows::with_valid_rows(grid, rows, size, [0, 0], device)?;
        let shifted = Windows::with_valid_rows(grid, rows, size, shift, device)?;
        Ok(WindowGeometry { device, rows, windows: [regular, shifted], offsets: log_offsets(size).to_device(device) })
    }
}

/// Returns the number of rows by which windows of `window` rows extend beyond `rows` rows.
fn padding_rows(rows: i64, window: i64) -> i64 {
    (window - rows % window) % window
}

/// Returns sign(Δ) · ln(1 + |Δ|) of the offset Δ from each key to each query, fp32 [T · T, 2] (Swin Transformer V2, Liu
/// et al., 2022, equation 4).
fn log_offsets([rows, columns]: [i64; 2]) -> Tensor {
    let tokens = rows * columns;
    let mut offsets = Vec::with_capacity((tokens * tokens * 2) as usize);
    for query in 0..tokens {
        for key in 0..tokens {
            offsets.push(log_offset(query / columns - key / columns));
            offsets.push(log_offset(query % columns - key % columns));
        }
    }
    Tensor::from_slice(&offsets).view([tokens * tokens, 2])
}

fn log_offset(delta: i64) -> f32 {
    (delta.signum() as f64 * (delta.unsigned_abs() as f64).ln_1p()) as f32
}

impl WindowDecoder {
    /// Declares `<name>.embed`, `.mask_token`, `.blocks.<i>`, `.norm` and `.pred`. `inputs` is the encoder's width.
    ///
    /// # Errors
    /// A usage error if windows do not divide the grid.
    pub fn new(
        params: &mut ParamSpecs,
        name: &str,
        grid: &Grid,
        inputs: i64,
        shape: &Shape,
        options: WindowDecoderOptions,
    ) -> Result<Self> {
        let Shape { width, depth, .. } = *shape;
        options.windows.check(name, grid)?;
        Ok(WindowDecoder {
            embed: Linear::new(params, &format!("{name}.embed"), inputs, width),
            mask_token: params.add(format!("{name}.mask_token"), &[1, 1, width], options.mask_token),
            blocks: (0..depth).map(|i| WindowBlock::new(params, &format!("{name}.blocks.{i}"), shape)).collect(),
            norm: LayerNorm::new(params, &format!("{name}.norm"), width),
            pred: Linear::new(params, &format!("{name}.pred"), width, grid.patch_values()),
            positions: options.positions.into(),
            grid: [grid.rows, grid.cols],
            windows: options.windows.limited_to(grid),
            geometries: RefCell::default(),
            recompute: false,
            inputs,
            outputs: grid.patch_values(),
            shape: *shape,
        })
    }

    /// Runs x [B, N, D], in row-major order, through all blocks → [B, N, D], or → [B, M, D] for the tokens `only` int64
    /// [B, M]; the last block computes its MLP for them alone. N may be less than that of the grid: x then holds its
    /// first rows, and there are no others.
    pub fn forward_blocks(&self, w: &Weights, x: Tensor, only: Option<&Tensor>) -> Result<Tensor> {
        let [_, tokens, _] = sizes(&x);
        let [_, columns] = self.grid;
        let rows = tokens / columns;
        let geometry = self.geometry(rows, x.device())?;
        let leaves = (self.recompute && x.requires_grad()).then(|| Leaves::new(w));
        let padding = padding_rows(rows, self.windows.size[0]) * columns;
        let mut x = if padding > 0 { x.pad([0, 0, 0, padding], "constant", 0.0) } else { x };
        for (i, block) in self.blocks.iter().enumerate() {
            let constants = BlockConstants {
                windows: &geometry.windows[i % 2],
                offsets: &geometry.offsets,
                only: only.filter(|_| i + 1 == self.blocks.len()),
            };
            x = match &leaves {
                Some(leaves) => block.forward_checkpointed(w, leaves, x, constants)?,
                None => block.forward(w, &x, constants)?,
            };
        }
        Ok(if only.is_some() { x } else { x.narrow(1, 0, tokens) })
    }

    /// Returns the geometry of `rows` rows on a device, computed on first use.
    fn geometry(&self, rows: i64, device: Device) -> Result<Rc<WindowGeometry>> {
        let mut geometries = self.geometries.borrow_mut();
        let existing = geometries.iter().find(|geometry| geometry.rows == rows && geometry.device == device);
        if let Some(existing) = existing {
            return Ok(existing.clone());
        }
        let geometry = Rc::new(WindowGeometry::new(rows, self.grid[1], &self.windows, device)?);
        geometries.push(geometry.clone());
        Ok(geometry)
    }
}

impl Decode for WindowDecoder {
    /// Ignores the features of a class token.
    fn forward(&self, w: &Weights, features: &Tensor, mask: &Mask) -> Result<Tensor> {
        let [_, kept] = sizes(&mask.keep);
        let visible = self.embed.forward(w, &features.narrow(1, features.size()[1] - kept, kept))?; // [B, K, D]
        let positions = self.positions.table(visible.device());
        let hidden = Some((&w[self.mask_token].view(-1), &mask.drop));
        let layout = TokenLayout { positions: &positions, keep: &mask.keep, hidden };
        let tokens = assemble_tokens(&visible, None, layout)?;
        // Windows need row-major order, restored once for all blocks.
        let x = self.forward_blocks(w, gather(&tokens, &mask.restore()), Some(&mask.drop))?;
        self.pred.forward(w, &self.norm.forward(w, &x)?)
    }

    fn set_recompute(&mut self, on: bool) {
        self.recompute = on;
    }

    /// Leaves out the network that computes position biases, which runs once per batch.
    fn cost(&self, visible: i64, hidden: i64, _class_tokens: i64) -> Vec<OpCost> {
        let Shape { width, depth, mlp_ratio, .. } = self.shape;
        let tokens = visible + hidden;
        let window_tokens = self.windows.size[0] * self.windows.size[1];
        let reorder = Traffic { values: [2 * tokens * width; 2], ..Traffic::default() };
        let mut ops = vec![
            cost::linear(visible, self.inputs, width),
            cost::assemble_tokens(visible, tokens, width),
            OpCost::MemoryBound { fused: reorder, unfused: reorder },
        ];
        for i in 0..depth {
            let outputs = if i + 1 == depth { hidden } else { tokens };
            ops.extend(cost::windowed_block(tokens, outputs, window_tokens, width, mlp_ratio * width));
        }
        ops.extend([cost::layer_norm(hidden, width), cost::linear(hidden, width, self.outputs)]);
        ops
    }
}

/// Hidden width of the network that computes position biases.
const BIAS_HIDDEN_WIDTH: i64 = 384;

/// Minimum of the temperature that each head divides its cosines by, which is initialized to 1.
const MIN_TAU: f64 = 0.01;

/// The inputs of a block without gradient.
#[derive(Clone, Copy)]
struct BlockConstants<'a> {
    windows: &'a Windows,
    /// [`WindowGeometry::offsets`].
    offsets: &'a Tensor,
    /// The tokens to compute after attention, int64 [B, M]; `None` computes all.
    only: Option<&'a Tensor>,
}

/// A block of windowed attention: x + norm(attention(x)), then x + norm(mlp(x)).
#[derive(Clone, Copy)]
struct WindowBlock {
    qkv: Linear,
    /// Temperature per head, `[H]`.
    tau: ParamId,
    /// The network that computes position biases.
    bias_mlp: [Linear; 2],
    proj: Linear,
    norm1: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    norm2: LayerNorm,
    heads: i64,
}

impl WindowBlock {
    /// Declares tensors named as in the official code: `<name>.attn.tau`, `<name>.attn.meta_mlp.fc1.weight` and so on.
    fn new(params: &mut ParamSpecs, name: &str, shape: &Shape) -> Self {
        let Shape { width, heads, mlp_ratio, .. } = *shape;
        let hidden_width = mlp_ratio * width;
        WindowBlock {
            qkv: Linear::new(params, &format!("{name}.attn.qkv"), width, 3 * width),
            tau: params.add(format!("{name}.attn.tau"), &[heads], Init::One),
            bias_mlp: [
                Linear::new(params, &format!("{name}.attn.meta_mlp.fc1"), 2, BIAS_HIDDEN_WIDTH),
                Linear::new(params, &format!("{name}.attn.meta_mlp.fc2"), BIAS_HIDDEN_WIDTH, heads),
            ],
            proj: Linear::new(params, &format!("{name}.attn.proj"), width, width),
            norm1: LayerNorm::new(params, &format!("{name}.norm1"), width),
            fc1: Linear::new(params, &format!("{name}.mlp.fc1"), width, hidden_width),
            fc2: Linear::new(params, &format!("{name}.mlp.fc2"), hidden_width, width),
            norm2: LayerNorm::new(params, &format!("{name}.norm2"), width),
            heads,
        }
    }

    /// x [B, N, D] → [B, N, D], or → [B, M, D] for the tokens `constants.only`.
    fn forward(&self, w: &Weights, x: &Tensor, constants: BlockConstants) -> Result<Tensor> {
        let BlockConstants { windows, offsets, only } = constants;
        let scale = at_least_float(&w[self.tau]).clamp_min(MIN_TAU).reciprocal(); // [H]
        let bias = self.bias(w, offsets, windows.size())?;
        let attended = cosine_attention(&self.qkv.forward(w, x)?, self.heads, windows, [&scale, &bias])?;
        let select = |x: &Tensor| only.map_or_else(|| x.shallow_clone(), |only| gather(x, only));
        let x = select(x) + self.norm1.forward(w, &self.proj.forward(w, &select(&attended))?)?;
        let hidden = self.fc1.forward_gelu(w, &x, Gelu::Exact)?;
        Ok(&x + self.norm2.forward(w, &self.fc2.forward(w, &hidden)?)?)
    }

    /// The same under activation checkpointing.
    fn forward_checkpointed(
        &self,
        w: &Weights,
        leaves: &Leaves,
        x: Tensor,
        constants: BlockConstants,
    ) -> Result<Tensor> {
        let block = *self;
        let BlockConstants { windows, offsets, only } = constants;
        let constants = (windows.shallow_clone(), offsets.shallow_clone(), only.map(Tensor::shallow_clone));
        let run = move |w: &Weights, (windows, offsets, only): &(Windows, Tensor, Option<Tensor>), x: &[Tensor]| {
            let constants = BlockConstants { windows, offsets, only: only.as_ref() };
            Ok(vec![block.forward(w, &x[0], constants)?])
        };
        Ok(recompute_in_backward(w, leaves, constants, &[x], run)?.remove(0))
    }

    /// Returns the position bias of each head from query to key, fp32 [H, T, T].
    fn bias(&self, w: &Weights, offsets: &Tensor, tokens: i64) -> Result<Tensor> {
        let [fc1, fc2] = &self.bias_mlp;
        let hidden = fc1.forward(w, &offsets.to_kind(w.kind()))?.relu();
        let biases = fc2.forward(w, &hidden)?; // [T · T, H]
        Ok(at_least_float(&biases).transpose(0, 1).reshape([self.heads, tokens, tokens]))
    }
}
