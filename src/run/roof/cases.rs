//! The shapes at which operations are timed: those of a training step of MAE ViT-B/16 (encoder 50 tokens, 768 wide;
//! decoder 197 tokens, 512 wide), and of the short sequences of other models. Smaller batches on a CPU.

use super::Case;
use crate::bridge::{Backend, sdp_order, set_sdp_order};
use crate::fault::Result;
use crate::op::bias_gelu::{self, Form};
use tch::{Device, Kind, Tensor};

type Make = Box<dyn FnOnce() -> Result<Case>>;

/// Every case; each makes its tensors when it is its turn.
pub fn all(device: Device) -> Vec<Make> {
    let gpu = device.is_cuda();
    let (batch, kind) = if gpu { (256, Kind::BFloat16) } else { (4, Kind::Float) };
    let mut all: Vec<Make> = Vec::new();
    for (tokens, width) in [(50, 3072), (197, 2048)] {
        all.push(Box::new(move || gelu(device, kind, batch * tokens, width)));
    }
    for (tokens, heads, each) in [(50, 12, 64), (65, 16, 80), (99, 16, 64), (160, 12, 64), (197, 16, 32)] {
        let libraries: &[Backend] =
            if gpu { &[Backend::Flash, Backend::Efficient, Backend::Cudnn] } else { &[Backend::Flash] };
        for &backend in libraries {
            all.push(Box::new(move || library(device, kind, [batch, tokens, heads, each], backend)));
        }
    }
    all
}

fn random(shape: &[i64], kind: Kind, device: Device) -> Tensor {
    Tensor::randn(shape, (Kind::Float, device)).to_kind(kind)
}

/// A leaf that wants a gradient.
fn leaf(shape: &[i64], kind: Kind, device: Device) -> Tensor {
    random(shape, kind, device).set_requires_grad(true)
}

/// Runs forward, and backward into fresh gradients.
fn round(inputs: &[&Tensor], upstream: &Tensor, forward: impl Fn() -> Result<Tensor>) -> Result<()> {
    let y = forward()?;
    Tensor::f_run_backward(&[(&y * upstream).sum(Kind::Float)], inputs, false, false)?;
    Ok(())
}

fn gelu(device: Device, kind: Kind, rows: i64, width: i64) -> Result<Case> {
    let (x, bias) = (random(&[rows, width], kind, device), random(&[width], kind, device));
    Ok(Case {
        op: "bias_gelu",
        by: "ours",
        shape: format!("[{rows}, {width}]"),
        bytes: 2.0 * (rows * width) as f64 * kind.elt_size_in_bytes() as f64,
        flops: 0.0,
        run: Box::new(move || bias_gelu::bias_gelu(&x, Some(&bias), Form::Exact).map(drop)),
    })
}

/// Attention forward and backward by one of libtorch's kernels: queries, keys, values and output in, and as much again
/// of gradients out.
fn library(device: Device, kind: Kind, [batch, tokens, heads, each]: [i64; 4], backend: Backend) -> Result<Case> {
    let qkv = leaf(&[batch, tokens, 3, heads, each], kind, device);
    let upstream = random(&[batch, heads, tokens, each], kind, device);
    let by = match backend {
        Backend::Math => "formula",
        Backend::Flash => "flash",
        Backend::Efficient => "efficient",
        Backend::Cudnn => "cudnn",
    };
    let run = move || {
        let before = sdp_order();
        set_sdp_order(&[backend])?;
        let result = round(&[&qkv], &upstream, || {
            let [q, k, v] = [0, 1, 2].map(|part| qkv.select(2, part).transpose(1, 2));
            Ok(Tensor::f_scaled_dot_product_attention(&q, &k, &v, None::<Tensor>, 0.0, false, None, false)?)
        });
        set_sdp_order(&before)?;
        result
    };
    Ok(Case {
        op: "attention, both ways",
        by,
        shape: format!("[{batch}, {tokens}, {heads} × {each}]"),
        bytes: moved(batch * tokens * heads * each, kind),
        flops: 14.0 * (batch * heads * tokens * tokens * each) as f64,
        run: Box::new(run),
    })
}

/// Forward: q, k, v in, o out; backward: q, k, v, o and its gradient in, three gradients out.
fn moved(numbers: i64, kind: Kind) -> f64 {
    12.0 * numbers as f64 * kind.elt_size_in_bytes() as f64
}
