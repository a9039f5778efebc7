//! Layer normalisation over the last dimension; statistics in fp32 whatever the dtype of x. In a second form a residual
//! is added first, in the same pass.

use super::fold;
use super::launch::{Launch, Source, Variant, blocks, type_name};
use crate::bridge::{Forward, node};
use crate::fault::{Fault, Result};
use tch::{Kind, Tensor};

/// Added to the variance, everywhere (the official MAE code; `transformers` defaults to 1e-12).
pub const EPS: f64 = 1e-6;

/// x [.., D], scale [D], shift [D] → [.., D].
pub fn layer_norm(x: &Tensor, scale: &Tensor, shift: &Tensor) -> Result<Tensor> {
    if on_gpu(x, scale) {
        return kernel(x, scale, shift);
    }
    Ok(x.layer_norm(scale.size(), Some(scale), Some(shift), EPS, false))
}

/// x and r [.., D], scale [D], shift [D] → x + r, and that normalised. On a GPU in one pass, whose backward takes both
/// gradients and gives the one that x and r share.
pub fn add_layer_norm(x: &Tensor, r: &Tensor, scale: &Tensor, shift: &Tensor) -> Result<(Tensor, Tensor)> {
    if on_gpu(x, scale) {
        return add_kernel(x, r, scale, shift);
    }
    let sum = x + r;
    let y = layer_norm(&sum, scale, shift)?;
    Ok((sum, y))
}

fn on_gpu(x: &Tensor, scale: &Tensor) -> bool {
    x.device().is_cuda() && x.kind() == scale.kind() && Plan::new(x.kind(), scale.numel() as i64).is_some()
}

/// The reference.
pub fn formula(x: &Tensor, scale: &Tensor, shift: &Tensor) -> Tensor {
    let kind = x.kind();
    let wide = if kind == Kind::Double { x.shallow_clone() } else { x.to_kind(Kind::Float) };
    let mean = wide.mean_dim(-1, true, None);
    let centred = &wide - mean;
    let variance = centred.square().mean_dim(-1, true, None);
    (centred / (variance + EPS).sqrt() * scale + shift).to_kind(kind)
}

/// The reference of the second form.
pub fn add_formula(x: &Tensor, r: &Tensor, scale: &Tensor, shift: &Tensor) -> (Tensor, Tensor) {
    let sum = x + r;
    let y = formula(&sum, scale, shift);
    (sum, y)
}

/// How a row is shared out: `team` warps, of which each thread holds `packs` times `wide` neighbours.
#[derive(Clone, Copy)]
struct Plan {
    wide: i64,
    team: i64,
    packs: i64,
}

const KINDS: [Kind; 3] = [Kind::Float, Kind::BFloat16, Kind::Half];

impl Plan {
    /// By rising width. Up to 40 columns a thread in half precision (1,280 by a warp, the widest of the usual
    /// transformers) and 32 in single stay in registers.
    fn all(kind: Kind) -> Vec<Plan> {
        let (wide, alone, together): (_, &[i64], _) = match kind {
            Kind::Float => (4, &[4, 8], [2, 8]),
            _ => (8, &[1, 2, 3, 4, 5], [1, 5]),
        };
        let alone = alone.iter().map(|&packs| Plan { wide, team: 1, packs });
        alone.chain(together.map(|packs| Plan { wide, team: 8, packs })).chain([Plan::ODD]).collect()
    }

    /// For rows that are no whole number of 16 bytes.
    const ODD: Plan = Plan { wide: 1, team: 8, packs: 16 };

    fn new(kind: Kind, width: i64) -> Option<Plan> {
        if !KINDS.contains(&kind) {
            return None;
        }
        let fits = |plan: &Plan| width % plan.wide == 0 && width <= 32 * plan.wide * plan.team * plan.packs;
        Plan::all(kind).into_iter().find(fits)
    }

    fn variant(&self, kind: Kind) -> Variant {
        let Plan { wide, team, packs } = self;
        vec![
            ("ELEMENT", type_name(kind).into()),
            ("WIDE", wide.to_string()),
            ("TEAM", team.to_string()),
            ("PACKS", packs.to_string()),
        ]
    }

    /// Rows that a block of `threads` has in hand at once.
    fn teams(&self, threads: u32) -> i64 {
        i64::from(threads) / (32 * self.team)
    }
}

pub const SOURCE: Source = Source {
    name: "layer_norm",
    built_in: include_str!("../../kernels/layer_norm.cu"),
    variants: || KINDS.iter().flat_map(|&kind| Plan::all(kind).into_iter().map(move |p| p.variant(kind))).collect(),
};

/// `layer_norm` by our kernels; x is made contiguous. A fault for rows wider than they take.
pub fn kernel(x: &Tensor, scale: &Tensor, shift: &Tensor) -> Result<Tensor> {
    let run = |given: &[Tensor]| {
        let x = given[0].contiguous();
        let Made { y, stats, .. } = forward(&x, None, &given[1], &given[2])?;
        Ok(Forward { outputs: vec![y], saved: vec![x, given[1].shallow_clone(), stats] })
    };
    let outputs = node(&[x, scale, shift], run, |saved, gradients, wanted| {
        let (gx, vectors) = backward(saved, None, &gradients[0].contiguous(), wanted[1] || wanted[2])?;
        Ok([Some(gx)].into_iter().chain(vectors).zip(wanted).map(|(g, wanted)| g.filter(|_| *wanted)).collect())
    })?;
    Ok(outputs.into_iter().next().expect("one output"))
}

/// `add_layer_norm` by our kernels; x and r are made contiguous.
pub fn add_kernel(x: &Tensor, r: &Tensor, scale: &Tensor, shift: &Tensor) -> Result<(Tensor, Tensor)> {
    let run = |given: &[Tensor]| {
        let Made { sum, y, stats } =
            forward(&given[0].contiguous(), Some(&given[1].contiguous()), &given[2], &given[3])?;
        let sum = sum.expect("of a residual");
        let saved = vec![sum.shallow_clone(), given[2].shallow_clone(), stats];
        Ok(Forward { outputs: vec![sum, y], saved })
    };
    let outputs = node(&[x, r, scale, shift], run, |saved, gradients, wanted| {
        let [gs, gy] = [0, 1].map(|i: usize| gradients[i].contiguous());
        let (gx, vectors) = backward(saved, Some(&gs), &gy, wanted[2] || wanted[3])?;
        let all = [Some(gx.shallow_clone()), Some(gx)].into_iter().chain(vectors);
        Ok(all.zip(wanted).map(|(g, wanted)| g.filter(|_| *wanted)).collect())
    })?;
    let mut outputs = outputs.into_iter();
    Ok((outputs.next().expect("the sum"), outputs.next().expect("the sum normalised")))
}

struct Made {
    /// Where there is a residual.
    sum: Option<Tensor>,
    y: Tensor,
    /// fp32 [rows, 2].
    stats: Tensor,
}

/// Rows, width and how they are shared out.
fn geometry(x: &Tensor, scale: &Tensor) -> Result<(i64, i64, Plan)> {
    let width = scale.numel() as i64;
    let plan = Plan::new(x.kind(), width).ok_or_else(|| {
        Fault::failed(format!("layer_norm: no kernel for rows of {width} values in {:?}; use the formula", x.kind()))
    })?;
    Ok((x.numel() as i64 / width, width, plan))
}

fn forward(x: &Tensor, r: Option<&Tensor>, scale: &Tensor, shift: &Tensor) -> Result<Made> {
    let (rows, width, plan) = geometry(x, scale)?;
    let (sum, y) = (r.map(|_| Tensor::empty_like(x)), Tensor::empty_like(x));
    let stats = Tensor::empty([rows, 2], (Kind::Float, x.device()));
    let threads = if plan.team == 1 { 128 } else { 256 };
    let launch = Launch {
        source: &SOURCE,
        variant: plan.variant(x.kind()),
        entry: "layer_norm",
        grid: [blocks(rows, plan.teams(threads)), 1, 1],
        threads,
        shared: 4 * plan.team as usize,
    };
    let tensors = [x.into(), r.into(), scale.into(), shift.into(), sum.as_ref().into(), (&y).into(), (&stats).into()];
    launch.run(&[&tensors[..], &[(rows as i32).into(), (width as i32).into()]].concat())?;
    Ok(Made { sum, y, stats })
}

/// Blocks of the backward kernel, at most: four for each multiprocessor of a Hopper.
const MOST: i64 = 528;

/// The gradient of x, and those of scale and shift.
fn backward(
    saved: &[Tensor],
    gs: Option<&Tensor>,
    gy: &Tensor,
    vectors: bool,
) -> Result<(Tensor, [Option<Tensor>; 2])> {
    let [s, scale, stats] = saved else { unreachable!("what forward saved") };
    let (rows, width, plan) = geometry(s, scale)?;
    let threads = if plan.team == 1 { 128 } else { 256 };
    let teams = plan.teams(threads);
    let of_block = (rows + MOST * teams - 1) / (MOST * teams) * teams;
    let runs = blocks(rows, of_block);
    let gx = Tensor::empty_like(s);
    let parts = Tensor::empty([i64::from(runs), 2 * width], (Kind::Float, s.device()));
    let launch = Launch {
        source: &SOURCE,
        variant: plan.variant(s.kind()),
        entry: "layer_norm_backward",
        grid: [runs, 1, 1],
        threads,
        shared: 32 + 4 * (2 * teams * 32 * plan.team * plan.wide) as usize,
    };
    let tensors = [s.into(), scale.into(), stats.into(), gs.into(), gy.into(), (&gx).into(), (&parts).into()];
    let numbers = [rows, width, of_block].map(|n| (n as i32).into());
    launch.run(&[&tensors[..], &numbers].concat())?;
    if !vectors {
        return Ok((gx, [None, None]));
    }
    let both = fold::kernel(&parts, scale.kind())?;
    Ok((gx, [0, 1].map(|i| Some(both.narrow(0, i * width, width)))))
}
