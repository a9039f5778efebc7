//! AdamW (Loshchilov and Hutter, 2019, algorithm 2) in PyTorch's form and order of operations.

use super::launch::{KernelSource, Launch, Variant, block_count, type_name};
use super::sizes;
use crate::bridge;
pub use crate::bridge::AdamWOptions;
use crate::error::Result;
use std::ops::Range;
use tch::{Device, Kind, Tensor};

/// Updates weights and moments in place and increments `steps`, one tensor `[1]` per weight.
pub fn adamw(
    w: &[Tensor],
    g: &[Tensor],
    m: &[Tensor],
    v: &[Tensor],
    steps: &[Tensor],
    options: AdamWOptions,
) -> Result<()> {
    bridge::adamw(w, g, m, v, steps, options)
}

/// The reference: the `step`-th update (from 1) of one tensor.
pub fn formula(w: &mut Tensor, g: &Tensor, m: &mut Tensor, v: &mut Tensor, step: i64, options: AdamWOptions) {
    let AdamWOptions { lr, betas: [beta1, beta2], weight_decay, eps } = options;
    let _ = w.g_mul_scalar_(1.0 - lr * weight_decay);
    let _ = m.lerp_(g, 1.0 - beta1);
    let _ = v.g_mul_scalar_(beta2);
    let _ = v.g_add_(&(g.square() * (1.0 - beta2)));
    let correction1 = 1.0 - beta1.powi(step as i32);
    let correction2 = 1.0 - beta2.powi(step as i32);
    let denominator = (&*v / correction2).sqrt() + eps;
    let _ = w.g_sub_(&(&*m / denominator * (lr / correction1)));
}

/// The flat buffers of an update, `[L]` each, contiguous and 16-byte aligned.
#[derive(Clone, Copy)]
pub struct AdamWBuffers<'a> {
    /// Master weights, fp32.
    pub master: &'a Tensor,
    /// First moment, fp32.
    pub exp_avg: &'a Tensor,
    /// Second moment, fp32.
    pub exp_avg_sq: &'a Tensor,
    /// Gradient, fp32 or bf16.
    pub gradient: &'a Tensor,
    /// Weights in the compute dtype, bf16 or fp16; `None` for fp32.
    pub compute_weights: Option<&'a Tensor>,
}

/// State per tensor of the flat buffers, on their device.
pub struct TensorState {
    /// Index of the tensor that each run of 128 elements belongs to, int32 [L / 128, rounded up].
    owner: Tensor,
    /// 1 for tensors with weight decay, else 0; fp32 `[n]`.
    decays: Tensor,
    /// Number of updates of each tensor, fp32 `[n]`; incremented by [`kernel`].
    pub steps: Tensor,
    /// 1 for tensors that received a gradient, 0 for tensors to skip; fp32 `[n]`.
    pub used: Tensor,
}

/// Consecutive elements that belong to one tensor.
const RUN_ELEMENTS: usize = 128;

impl TensorState {
    /// Describes tensors that start at multiples of 128 in buffers of `length` elements, all of them used. `steps` is
    /// shared, not copied.
    pub fn new(ranges: &[Range<usize>], decays: &[bool], length: usize, steps: &Tensor) -> TensorState {
        let mut owner = vec![0i32; length.div_ceil(RUN_ELEMENTS)];
        for (index, range) in ranges.iter().enumerate() {
            assert!(range.start % RUN_ELEMENTS == 0 && range.end <= length, "{range:?} in a buffer of {length}");
            owner[range.start / RUN_ELEMENTS..range.end.div_ceil(RUN_ELEMENTS)].fill(index as i32);
        }
        let device = steps.device();
        let decays: Vec<f32> = decays.iter().map(|decays| f32::from(u8::from(*decays))).collect();
        assert_eq!(decays.len(), ranges.len(), "one decay flag per range");
        TensorState {
            owner: Tensor::from_slice(&owner).to_device(device),
            decays: Tensor::from_slice(&decays).to_device(device),
            steps: steps.shallow_clone(),
            used: Tensor::ones([ranges.len() as i64], (Kind::Float, device)),
        }
    }
}

/// Returns the values that change from step to step as the kernel reads them, fp32 `[4]`. `clip_scale` multiplies the
/// gradient; if `apply` is false, the kernel changes neither weights nor moments nor step counts.
pub fn control(lr: f64, weight_decay: f64, clip_scale: f64, apply: bool, device: Device) -> Tensor {
    let apply = f32::from(u8::from(apply));
    Tensor::from_slice(&[lr as f32, weight_decay as f32, clip_scale as f32, apply]).to_device(device)
}

/// Kernel source.
pub const SOURCE: KernelSource =
    KernelSource { name: "adamw", embedded: include_str!("../../kernels/adamw.cu"), variants };

fn variants() -> Vec<Variant> {
    let weights = [Kind::Float, Kind::BFloat16, Kind::Half];
    [Kind::Float, Kind::BFloat16].iter().flat_map(|g| weights.map(|w| variant(*g, w))).collect()
}

fn variant(gradient: Kind, weight: Kind) -> Variant {
    vec![("GRADIENT", type_name(gradient).into()), ("WEIGHT", type_name(weight).into())]
}

/// Updates every tensor in two launches, one over tensors and one over elements, whose inputs are all in device memory.
/// `control` is a tensor of [`control()`]; betas are in [0, 1).
pub fn kernel(buffers: AdamWBuffers, state: &TensorState, control: &Tensor, betas: [f64; 2], eps: f64) -> Result<()> {
    let AdamWBuffers { master, exp_avg, exp_avg_sq, gradient, compute_weights } = buffers;
    let [n] = sizes(master);
    let [tensors] = sizes(&state.steps);
    let variant = variant(gradient.kind(), compute_weights.map_or(Kind::Float, Tensor::kind));
    let launch = |entry, grid, threads| Launch {
        source: &SOURCE,
        variant: variant.clone(),
        entry,
        grid: [grid, 1, 1],
        threads,
        shared_bytes: 0,
    };
    let scalars = Tensor::empty([tensors, 4], (Kind::Float, master.device()));
    let TensorState { owner, decays, steps, used } = state;
    let [beta1, beta2] = betas;
    launch("adamw_scalars", block_count(tensors, 128), 128).run(&[
        control.into(),
        decays.into(),
        used.into(),
        steps.into(),
        (&scalars).into(),
        (beta1.ln() as f32).into(),
        (beta2.ln() as f32).into(),
        (tensors as i32).into(),
    ])?;
    launch("adamw", block_count(n, 1024), 256).run(&[
        master.into(),
        exp_avg.into(),
        exp_avg_sq.into(),
        gradient.into(),
        compute_weights.into(),
        owner.into(),
        (&scalars).into(),
        control.into(),
        n.into(),
        ((1.0 - beta1) as f32).into(),
        (beta2 as f32).into(),
        ((1.0 - beta2) as f32).into(),
        (eps as f32).into(),
    ])
}
