//! AdamW (Loshchilov and Hutter, 2019, algorithm 2) in the form and order of operations of PyTorch.

use super::launch::{Launch, Source, Variant, blocks, type_name};
use super::sizes;
use crate::bridge;
pub use crate::bridge::AdamW;
use crate::fault::Result;
use std::ops::Range;
use tch::{Device, Kind, Tensor};

/// Updates weights and moments in place; one `steps` tensor [1] each counts its updates.
pub fn adamw(w: &[Tensor], g: &[Tensor], m: &[Tensor], v: &[Tensor], steps: &[Tensor], with: AdamW) -> Result<()> {
    bridge::adamw(w, g, m, v, steps, with)
}

/// The reference, for one tensor at its `step`-th update (from 1).
pub fn formula(w: &mut Tensor, g: &Tensor, m: &mut Tensor, v: &mut Tensor, step: i64, with: AdamW) {
    let AdamW { lr, betas: (beta1, beta2), weight_decay, eps } = with;
    let _ = w.g_mul_scalar_(1.0 - lr * weight_decay);
    let _ = m.lerp_(g, 1.0 - beta1);
    let _ = v.g_mul_scalar_(beta2);
    let _ = v.g_add_(&(g.square() * (1.0 - beta2)));
    let first = 1.0 - beta1.powi(step as i32);
    let second = 1.0 - beta2.powi(step as i32);
    let root = (&*v / second).sqrt() + eps;
    let _ = w.g_sub_(&(&*m / root * (lr / first)));
}

/// The flat buffers of an update, [L] each, contiguous and on 16-byte boundaries.
#[derive(Clone, Copy)]
pub struct Buffers<'a> {
    /// fp32.
    pub master: &'a Tensor,
    /// AdamW's moments, fp32.
    pub first: &'a Tensor,
    pub second: &'a Tensor,
    /// fp32 or bf16.
    pub gradient: &'a Tensor,
    /// bf16 or fp16: the weights in the dtype that is computed with. None where that is fp32.
    pub compute: Option<&'a Tensor>,
}

/// Which tensor lies where in the buffers, and what one has of its own; on the buffers' device.
pub struct Table {
    /// int32 [L / 128, rounded up].
    owner: Tensor,
    /// 1 where weight decay applies, else 0; fp32 [n].
    decays: Tensor,
    /// How often each tensor has moved, fp32 [n]; counted up here.
    pub steps: Tensor,
    /// 1 for a tensor that received a gradient, and 0 for one that stays where it is; fp32 [n].
    pub used: Tensor,
}

/// Elements in a row that belong to one tensor.
const RUN: usize = 128;

impl Table {
    /// For tensors that begin at multiples of 128 in buffers of `length` elements, all of them used. `steps` is shared,
    /// not copied.
    pub fn new(places: &[Range<usize>], decays: &[bool], length: usize, steps: &Tensor) -> Table {
        let mut owner = vec![0i32; length.div_ceil(RUN)];
        for (index, place) in places.iter().enumerate() {
            assert!(place.start % RUN == 0 && place.end <= length, "{place:?} in a buffer of {length}");
            owner[place.start / RUN..place.end.div_ceil(RUN)].fill(index as i32);
        }
        let device = steps.device();
        let decays: Vec<f32> = decays.iter().map(|decays| f32::from(u8::from(*decays))).collect();
        assert_eq!(decays.len(), places.len(), "lists of one length");
        Table {
            owner: Tensor::from_slice(&owner).to_device(device),
            decays: Tensor::from_slice(&decays).to_device(device),
            steps: steps.shallow_clone(),
            used: Tensor::ones([places.len() as i64], (Kind::Float, device)),
        }
    }
}

/// What changes from step to step, as the kernel reads it: fp32 [4]. `clip_scale` multiplies the gradient; where `apply`
/// is 0 nothing moves, neither moments nor counts.
pub fn control(lr: f64, weight_decay: f64, clip_scale: f64, apply: bool, device: Device) -> Tensor {
    let apply = f32::from(u8::from(apply));
    Tensor::from_slice(&[lr as f32, weight_decay as f32, clip_scale as f32, apply]).to_device(device)
}

pub const SOURCE: Source =
    Source { name: "adamw", built_in: include_str!("../../kernels/adamw.cu"), variants: all_variants };

fn all_variants() -> Vec<Variant> {
    let weights = [Kind::Float, Kind::BFloat16, Kind::Half];
    [Kind::Float, Kind::BFloat16].iter().flat_map(|g| weights.map(|w| variant(*g, w))).collect()
}

fn variant(gradient: Kind, weight: Kind) -> Variant {
    vec![("GRADIENT", type_name(gradient).into()), ("WEIGHT", type_name(weight).into())]
}

/// One update of every tensor in two launches, which depend on nothing but device memory: one for the numbers of each
/// tensor, one for all elements. `control` is that of [`control()`]; betas lie in [0, 1).
pub fn kernel(buffers: Buffers, table: &Table, control: &Tensor, betas: (f64, f64), eps: f64) -> Result<()> {
    let Buffers { master, first, second, gradient, compute } = buffers;
    let [n] = sizes(master);
    let [tensors] = sizes(&table.steps);
    let variant = variant(gradient.kind(), compute.map_or(Kind::Float, Tensor::kind));
    let launch = |entry, grid, threads| Launch {
        source: &SOURCE,
        variant: variant.clone(),
        entry,
        grid: [grid, 1, 1],
        threads,
        shared: 0,
    };
    let numbers = Tensor::empty([tensors, 4], (Kind::Float, master.device()));
    let Table { owner, decays, steps, used } = table;
    let [log_beta1, log_beta2] = [betas.0, betas.1].map(|beta| (beta.ln() as f32).into());
    launch("adamw_numbers", blocks(tensors, 128), 128).run(&[
        control.into(),
        decays.into(),
        used.into(),
        steps.into(),
        (&numbers).into(),
        log_beta1,
        log_beta2,
        (tensors as i32).into(),
    ])?;
    launch("adamw", blocks(n, 1024), 256).run(&[
        master.into(),
        first.into(),
        second.into(),
        gradient.into(),
        compute.into(),
        owner.into(),
        (&numbers).into(),
        control.into(),
        n.into(),
        ((1.0 - betas.0) as f32).into(),
        (betas.1 as f32).into(),
        ((1.0 - betas.1) as f32).into(),
        (eps as f32).into(),
    ])
}
