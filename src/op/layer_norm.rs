//! Layer normalization over the last dimension, with statistics in fp32 whatever the dtype of x; optionally of the sum
//! of x and a residual, in the same pass.

use super::launch::{KernelSource, Launch, Variant, block_count, type_name};
use super::sum_partials;
use crate::bridge::{ForwardOutput, apply_function};
use crate::error::{Error, Result};
use tch::{Kind, Tensor};

/// Added to the variance (official MAE code; the default of `transformers` is 1e-12).
pub const EPS: f64 = 1e-6;

/// x [.., D], scale `[D]`, shift `[D]` → [.., D].
pub fn layer_norm(x: &Tensor, scale: &Tensor, shift: &Tensor) -> Result<Tensor> {
    if is_supported(x, scale) {
        return kernel(x, scale, shift);
    }
    Ok(x.layer_norm(scale.size(), Some(scale), Some(shift), EPS, false))
}

/// x and r [.., D], scale `[D]`, shift `[D]` → x + r, and its normalization. On a GPU in one pass, whose backward takes
/// the gradients of both outputs and returns the one that x and r share.
pub fn add_layer_norm(x: &Tensor, r: &Tensor, scale: &Tensor, shift: &Tensor) -> Result<(Tensor, Tensor)> {
    if is_supported(x, scale) {
        return add_kernel(x, r, scale, shift);
    }
    let sum = x + r;
    let y = layer_norm(&sum, scale, shift)?;
    Ok((sum, y))
}

fn is_supported(x: &Tensor, scale: &Tensor) -> bool {
    x.device().is_cuda() && x.kind() == scale.kind() && RowTiling::new(x.kind(), scale.numel() as i64).is_some()
}

/// The reference.
pub fn formula(x: &Tensor, scale: &Tensor, shift: &Tensor) -> Tensor {
    let kind = x.kind();
    let x = if kind == Kind::Double { x.shallow_clone() } else { x.to_kind(Kind::Float) };
    let mean = x.mean_dim(-1, true, None);
    let centered = &x - mean;
    let variance = centered.square().mean_dim(-1, true, None);
    (centered / (variance + EPS).sqrt() * scale + shift).to_kind(kind)
}

/// The reference of [`add_layer_norm`].
pub fn add_formula(x: &Tensor, r: &Tensor, scale: &Tensor, shift: &Tensor) -> (Tensor, Tensor) {
    let sum = x + r;
    let y = formula(&sum, scale, shift);
    (sum, y)
}

/// How a row is divided among threads: `team` warps, each of whose threads holds `packs` packs of `vector_width`
/// neighboring elements.
#[derive(Clone, Copy)]
struct RowTiling {
    vector_width: i64,
    team: i64,
    packs: i64,
}

const KINDS: [Kind; 3] = [Kind::Float, Kind::BFloat16, Kind::Half];

impl RowTiling {
    /// Returns all tilings by increasing width. Up to 40 columns per thread in half precision (1,280 columns by one
    /// warp, the widest of the usual transformers) and 32 in single precision stay in registers.
    fn all(kind: Kind) -> Vec<RowTiling> {
        let (vector_width, warp_packs, block_packs): (_, &[i64], _) = match kind {
            Kind::Float => (4, &[4, 8], [2, 8]),
            _ => (8, &[1, 2, 3, 4, 5], [1, 5]),
        };
        let by_warp = warp_packs.iter().map(|&packs| RowTiling { vector_width, team: 1, packs });
        let by_block = block_packs.map(|packs| RowTiling { vector_width, team: 8, packs });
        by_warp.chain(by_block).chain([RowTiling::UNALIGNED]).collect()
    }

    /// For rows whose length is not a multiple of 16 bytes.
    const UNALIGNED: RowTiling = RowTiling { vector_width: 1, team: 8, packs: 16 };

    fn new(kind: Kind, width: i64) -> Option<RowTiling> {
        if !KINDS.contains(&kind) {
            return None;
        }
        RowTiling::all(kind).into_iter().find(|tiling| tiling.fits(width))
    }

    fn fits(&self, width: i64) -> bool {
        width % self.vector_width == 0 && width <= 32 * self.vector_width * self.team * self.packs
    }

    fn variant(&self, kind: Kind) -> Variant {
        let RowTiling { vector_width, team, packs } = self;
        vec![
            ("ELEMENT", type_name(kind).into()),
            ("WIDE", vector_width.to_string()),
            ("TEAM", team.to_string()),
            ("PACKS", packs.to_string()),
        ]
    }

    /// Threads per block.
    fn threads(&self) -> u32 {
        if self.team == 1 { 128 } else { 256 }
    }

    /// Rows that a block processes at once.
    fn teams(&self) -> i64 {
        i64::from(self.threads()) / (32 * self.team)
    }
}

/// Kernel source.
pub const SOURCE: KernelSource =
    KernelSource { name: "layer_norm", embedded: include_str!("../../kernels/layer_norm.cu"), variants };

fn variants() -> Vec<Variant> {
    let by_kind = |&kind: &Kind| RowTiling::all(kind).into_iter().map(move |tiling| tiling.variant(kind));
    KINDS.iter().flat_map(by_kind).collect()
}

/// [`layer_norm`] by the kernels. Makes x contiguous.
///
/// # Errors
/// If rows are wider than the kernels support.
pub fn kernel(x: &Tensor, scale: &Tensor, shift: &Tensor) -> Result<Tensor> {
    let forward = |inputs: &[Tensor]| {
        let x = inputs[0].contiguous();
        let NormOutput { y, stats, .. } = launch_forward(&x, None, &inputs[1], &inputs[2])?;
        Ok(ForwardOutput { outputs: vec![y], saved: vec![x, inputs[1].shallow_clone(), stats] })
    };
    let outputs = apply_function(&[x, scale, shift], forward, |saved, gradients, needed| {
        let (g_x, vectors) = launch_backward(saved, None, &gradients[0].contiguous(), needed[1] || needed[2])?;
        Ok([Some(g_x)].into_iter().chain(vectors).zip(needed).map(|(g, needed)| g.filter(|_| *needed)).collect())
    })?;
    Ok(outputs.into_iter().next().expect("one output"))
}

/// [`add_layer_norm`] by the kernels. Makes x and r contiguous.
///
/// # Errors
/// The same as [`kernel`].
pub fn add_kernel(x: &Tensor, r: &Tensor, scale: &Tensor, shift: &Tensor) -> Result<(Tensor, Tensor)> {
    let forward = |inputs: &[Tensor]| {
        let x = inputs[0].contiguous();
        let r = inputs[1].contiguous();
        let NormOutput { sum, y, stats } = launch_forward(&x, Some(&r), &inputs[2], &inputs[3])?;
        let sum = sum.expect("the sum of x and r");
        let saved = vec![sum.shallow_clone(), inputs[2].shallow_clone(), stats];
        Ok(ForwardOutput { outputs: vec![sum, y], saved })
    };
    let outputs = apply_function(&[x, r, scale, shift], forward, |saved, gradients, needed| {
        let g_sum = gradients[0].contiguous();
        let g_y = gradients[1].contiguous();
        let (g_x, vectors) = launch_backward(saved, Some(&g_sum), &g_y, needed[2] || needed[3])?;
        let all = [Some(g_x.shallow_clone()), Some(g_x)].into_iter().chain(vectors);
        Ok(all.zip(needed).map(|(g, needed)| g.filter(|_| *needed)).collect())
    })?;
    let mut outputs = outputs.into_iter();
    Ok((outputs.next().expect("the sum"), outputs.next().expect("the normalized sum")))
}

/// The outputs of the forward kernel.
struct NormOutput {
    /// x + r, if there is a residual.
    sum: Option<Tensor>,
    y: Tensor,
    /// Mean and inverse standard deviation of each row, fp32 [rows, 2].
    stats: Tensor,
}

/// The rows of a tensor and their tiling.
struct NormRows {
    count: i64,
    width: i64,
    tiling: RowTiling,
}

impl NormRows {
    fn new(x: &Tensor, scale: &Tensor) -> Result<NormRows> {
        let width = scale.numel() as i64;
        let tiling = RowTiling::new(x.kind(), width).ok_or_else(|| {
            Error::failed(format!(
                "layer_norm: no kernel for rows of {width} values in {:?}; use the formula",
                x.kind()
            ))
        })?;
        Ok(NormRows { count: x.numel() as i64 / width, width, tiling })
    }
}

fn launch_forward(x: &Tensor, r: Option<&Tensor>, scale: &Tensor, shift: &Tensor) -> Result<NormOutput> {
    let NormRows { count, width, tiling } = NormRows::new(x, scale)?;
    let sum = r.map(|_| Tensor::empty_like(x));
    let y = Tensor::empty_like(x);
    let stats = Tensor::empty([count, 2], (Kind::Float, x.device()));
    let launch = Launch {
        source: &SOURCE,
        variant: tiling.variant(x.kind()),
        entry: "layer_norm",
        grid: [block_count(count, tiling.teams()), 1, 1],
        threads: tiling.threads(),
        shared_bytes: 4 * tiling.team as usize,
    };
    launch.run(&[
        x.into(),
        r.into(),
        scale.into(),
        shift.into(),
        sum.as_ref().into(),
        (&y).into(),
        (&stats).into(),
        (count as i32).into(),
        (width as i32).into(),
    ])?;
    Ok(NormOutput { sum, y, stats })
}

/// Maximum number of blocks of the backward kernel: four per multiprocessor of a Hopper.
const MAX_BACKWARD_BLOCKS: i64 = 528;

/// Returns the gradient of x and, if needed, those of scale and shift.
fn launch_backward(
    saved: &[Tensor],
    g_sum: Option<&Tensor>,
    g_y: &Tensor,
    needs_vectors: bool,
) -> Result<(Tensor, [Option<Tensor>; 2])> {
    let [x, scale, stats] = saved else { unreachable!("the forward pass saves three tensors") };
    let NormRows { count, width, tiling } = NormRows::new(x, scale)?;
    let teams = tiling.teams();
    let rows_per_block = (count + MAX_BACKWARD_BLOCKS * teams - 1) / (MAX_BACKWARD_BLOCKS * teams) * teams;
    let runs = block_count(count, rows_per_block);
    let g_x = Tensor::empty_like(x);
    let parts = Tensor::empty([i64::from(runs), 2 * width], (Kind::Float, x.device()));
    let launch = Launch {
        source: &SOURCE,
        variant: tiling.variant(x.kind()),
        entry: "layer_norm_backward",
        grid: [runs, 1, 1],
        threads: tiling.threads(),
        shared_bytes: 32 + 4 * (2 * teams * 32 * tiling.team * tiling.vector_width) as usize,
    };
    launch.run(&[
        x.into(),
        scale.into(),
        stats.into(),
        g_sum.into(),
        g_y.into(),
        (&g_x).into(),
        (&parts).into(),
        (count as i32).into(),
        (width as i32).into(),
        (rows_per_block as i32).into(),
    ])?;
    if !needs_vectors {
        return Ok((g_x, [None, None]));
    }
    let sums = sum_partials::kernel(&parts, scale.kind())?;
    let g_scale = sums.narrow(0, 0, width);
    let g_shift = sums.narrow(0, width, width);
    Ok((g_x, [Some(g_scale), Some(g_shift)]))
}
