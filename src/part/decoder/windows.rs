//! A decoder whose tokens look at their neighbours alone: local windows, every second block's moved, with attention by the
//! cosine and normalisation behind each half (Audio-MAE, Huang et al., 2022, section 3, "Decoder with local attention",
//! as its code has it: facebookresearch/AudioMAE models_mae.py and timm_patch/swin_transformer.py, an early form of timm's
//! `swin_transformer_v2_cr`). In training that code drops a tenth of the numbers inside the network that makes the biases
//! of places; here none is dropped, since such noise would be a rank's, not a sample's.

use super::Decode;
use crate::fault::Result;
use crate::grid::Grid;
use crate::op::attention::{Windows, cosine};
use crate::op::bias_gelu::Form;
use crate::op::fill::{Places, fill};
use crate::op::{patch::gather, sizes};
use crate::part::again::{Leaves, again};
use crate::part::encoder::position::Positions;
use crate::part::encoder::vit::Shape;
use crate::part::mask::Mask;
use crate::part::weights::{Init, Linear, Norm, Slot, Table, Weights};
use crate::part::work::{self, Moved, Op};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::cell::RefCell;
use std::rc::Rc;
use tch::{Device, Kind, Tensor};

/// The windows of a decoder: the config's `attention.windows`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Rows and columns of patches in a window (official code: 4 and 4). A grid of fewer is one window.
    #[serde(default = "Config::size")]
    pub size: [i64; 2],
    /// Rows and columns by which the windows of every second block are moved (official code: 2 and 0).
    #[serde(default = "Config::shift")]
    pub shift: [i64; 2],
}

impl Default for Config {
    fn default() -> Self {
        Config { size: Config::size(), shift: Config::shift() }
    }
}

impl Config {
    fn size() -> [i64; 2] {
        [4, 4]
    }
    fn shift() -> [i64; 2] {
        [2, 0]
    }

    /// On a grid: where it has fewer rows or columns, a window has the grid's, and is not moved along that axis.
    fn on(&self, grid: &Grid) -> Config {
        let sides = [grid.rows, grid.cols];
        let size = [0, 1].map(|axis| self.size[axis].min(sides[axis]));
        let shift = [0, 1].map(|axis| if sides[axis] <= size[axis] { 0 } else { self.shift[axis] });
        Config { size, shift }
    }

    /// Refuses windows that do not divide the grid; they stand at `at` in the config.
    pub fn check(&self, at: &str, grid: &Grid) -> Result<()> {
        let Config { size, shift } = self.on(grid);
        Windows::new([grid.rows, grid.cols], size, shift, Device::Cpu).map(drop).map_err(|fault| fault.at(at))
    }
}

/// What sets one paper's decoder apart from another's, beside its shape.
pub struct Make {
    /// How the mask token begins.
    pub token: Init,
    /// fp32 [N, D], fixed.
    pub positions: Tensor,
    pub windows: Config,
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
    /// Made once for a device and a number of rows, and there for good, since a captured graph reads them where they lay.
    placed: RefCell<Vec<Rc<Local>>>,
    recompute: bool,
    /// The encoder's width, and how many values a guess has.
    ends: [i64; 2],
    shape: Shape,
}

/// What blocks know of places, on one device, where so many rows of the grid are there.
struct Local {
    device: Device,
    rows: i64,
    /// Of blocks 0, 2, .. and of blocks 1, 3, ..
    windows: [Windows; 2],
    /// fp32 [T · T, 2]: from key to query in a window, rows and columns.
    apart: Tensor,
}

impl Local {
    /// `columns` of the first `rows` rows of a grid, which the last windows may reach beyond.
    fn new([rows, columns]: [i64; 2], window: [i64; 2], shift: [i64; 2], device: Device) -> Result<Local> {
        let grid = [rows + beyond(rows, window[0]), columns];
        // Rows that one window holds are not torn apart, as on a grid of their own.
        let shift = if grid[0] == window[0] { [0, shift[1]] } else { shift };
        let [still, moved] = [[0, 0], shift].map(|shift| Windows::cut(grid, rows, window, shift, device));
        Ok(Local { device, rows, windows: [still?, moved?], apart: apart(window).to_device(device) })
    }
}

/// Rows by which windows of `window` rows reach beyond `rows` rows.
fn beyond(rows: i64, window: i64) -> i64 {
    (window - rows % window) % window
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
        make.windows.check(name, grid)?;
        let Config { size: window, shift } = make.windows.on(grid);
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
            placed: RefCell::default(),
            recompute: false,
            ends: [inputs, grid.values()],
            shape: *shape,
        })
    }

    /// x [B, N, D] in row-major order through all blocks → [B, N, D], or where `only` int64 [B, M] names the tokens that
    /// are wanted, theirs [B, M, D]: the last block's second half is computed for them alone. N may be less than the grid's:
    /// of its first rows alone, as if there were no others.
    pub fn transform(&self, w: &Weights, x: Tensor, only: Option<&Tensor>) -> Result<Tensor> {
        let [_, tokens, _] = sizes(&x);
        let rows = tokens / self.grid[1];
        let local = self.local(rows, x.device())?;
        let leaves = (self.recompute && x.requires_grad()).then(|| Leaves::of(w));
        let absent = beyond(rows, self.window[0]) * self.grid[1];
        let mut x = if absent > 0 { x.pad([0, 0, 0, absent], "constant", 0.0) } else { x };
        for (i, block) in self.blocks.iter().enumerate() {
            let only = only.filter(|_| i + 1 == self.blocks.len());
            let windows = &local.windows[i % 2];
            x = match &leaves {
                Some(leaves) => block.forgetful(w, leaves, x, (windows, &local.apart), only)?,
                None => block.forward(w, &x, (windows, &local.apart), only)?,
            };
        }
        Ok(if only.is_some() { x } else { x.narrow(1, 0, tokens) })
    }

    /// The places of so many rows on a device.
    fn local(&self, rows: i64, device: Device) -> Result<Rc<Local>> {
        let mut placed = self.placed.borrow_mut();
        if let Some(there) = placed.iter().find(|local| (local.rows, local.device) == (rows, device)) {
            return Ok(there.clone());
        }
        placed.push(Rc::new(Local::new([rows, self.grid[1]], self.window, self.shift, device)?));
        Ok(placed[placed.len() - 1].clone())
    }
}

impl Decode for Decoder {
    /// A class token's features are not read.
    fn guess(&self, w: &Weights, features: &Tensor, mask: &Mask) -> Result<Tensor> {
        let kept = mask.keep.size()[1];
        let seen = self.embed.forward(w, &features.narrow(1, features.size()[1] - kept, kept))?; // [B, K, D]
        let positions = self.positions.on(seen.device());
        let hidden = Some((&w[self.token].view(-1), &mask.drop));
        let mixed = fill(&seen, None, Places { positions: &positions, keep: &mask.keep, hidden })?;
        // Windows are of the grid: its order comes back, once for all blocks.
        let x = self.transform(w, gather(&mixed, &mask.restore()), Some(&mask.drop))?;
        self.pred.forward(w, &self.norm.forward(w, &x)?)
    }

    fn recompute(&mut self) {
        self.recompute = true;
    }

    /// What makes the biases works once for a batch, however large, and is left out.
    fn work(&self, seen: i64, hidden: i64, _class: i64) -> Vec<Op> {
        let ([inputs, values], Shape { width, depth, mlp_ratio, .. }) = (self.ends, self.shape);
        let (all, tokens) = (seen + hidden, self.window[0] * self.window[1]);
        let order = Moved { values: [2 * all * width; 2], ..Moved::default() };
        let mut ops = vec![
            work::linear(seen, inputs, width),
            work::fill(seen, all, width),
            Op::Pass { fused: order, plain: order },
        ];
        for i in 0..depth {
            let answered = if i + 1 == depth { hidden } else { all };
            ops.extend(work::windowed_block([all, answered], tokens, width, mlp_ratio * width));
        }
        ops.extend([work::norm(hidden, width), work::linear(hidden, width, values)]);
        ops
    }
}

/// The width of the network that makes biases from places.
const INSIDE: i64 = 384;

/// What a head divides its cosines by begins at one and is never less than this.
const LEAST: f64 = 0.01;

/// A block of windows: x + norm(attention(x)), then x + norm(perceptron(x)).
#[derive(Clone, Copy)]
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

    /// The same of a block that keeps its input alone for backward.
    fn forgetful(
        &self,
        w: &Weights,
        leaves: &Leaves,
        x: Tensor,
        (windows, apart): (&Windows, &Tensor),
        only: Option<&Tensor>,
    ) -> Result<Tensor> {
        let block = *self;
        let beside = (windows.shallow_clone(), apart.shallow_clone(), only.map(Tensor::shallow_clone));
        let run = move |w: &Weights, (windows, apart, only): &(Windows, Tensor, Option<Tensor>), x: &[Tensor]| {
            Ok(vec![block.forward(w, &x[0], (windows, apart), only.as_ref())?])
        };
        Ok(again(w, leaves, beside, &[x], run)?.remove(0))
    }

    /// fp32 [H, T, T]: what each head adds to the score of each query with each key of a window.
    fn bias(&self, w: &Weights, apart: &Tensor, tokens: i64) -> Result<Tensor> {
        let [first, second] = &self.from_places;
        let inside = first.forward(w, &apart.to_kind(w.kind()))?.relu();
        let biases = second.forward(w, &inside)?; // [T · T, H]
        Ok(biases.to_kind(Kind::Float).transpose(0, 1).reshape([self.heads, tokens, tokens]))
    }
}
