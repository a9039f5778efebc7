//! The shapes at which operations are timed: those of a training step of MAE ViT-B/16 (encoder 50 tokens, 768 wide;
//! decoder 197 tokens, 512 wide), and of the short sequences of other models. Smaller batches on a CPU.

use super::Case;
use crate::bridge::{Backend, sdp_order, set_sdp_order};
use crate::fault::Result;
use crate::grid::Grid;
use crate::op::adamw::{Buffers, Table, control};
use crate::op::attention::{Windows, attention, cosine::cosine};
use crate::op::bias_gelu::{Form, bias_gelu};
use crate::op::fill::{Places, fill};
use crate::op::lerp::{self, Share};
use crate::op::patch::{Level, Scale, target};
use crate::op::{adamw, layer_norm, masked_mse::masked_mse, square_sum::square_sum};
use tch::{Device, Kind, Tensor};

type Make = Box<dyn FnOnce() -> Result<Case>>;

/// Every case; each makes its tensors when it is its turn.
pub fn all(device: Device) -> Vec<Make> {
    let gpu = device.is_cuda();
    let (batch, kind) = if gpu { (256, Kind::BFloat16) } else { (4, Kind::Float) };
    let mut all: Vec<Make> = Vec::new();
    all.push(Box::new(move || targets(device, batch)));
    all.push(Box::new(move || filled(device, kind, batch)));
    for (tokens, width) in [(50, 768), (197, 512)] {
        all.push(Box::new(move || norm(device, kind, batch * tokens, width)));
    }
    for (tokens, width) in [(50, 3072), (197, 2048)] {
        all.push(Box::new(move || gelu(device, kind, batch * tokens, width)));
    }
    all.push(Box::new(move || loss(device, kind, batch)));
    for (tokens, heads, each) in [(50, 12, 64), (65, 16, 80), (99, 16, 64), (160, 12, 64), (197, 16, 32)] {
        let shape = [batch, tokens, heads, each];
        all.push(Box::new(move || mixing(device, kind, shape)));
        let libraries: &[Backend] =
            if gpu { &[Backend::Flash, Backend::Efficient, Backend::Cudnn] } else { &[Backend::Flash] };
        for &backend in libraries {
            all.push(Box::new(move || library(device, kind, shape, backend)));
        }
    }
    // Audio-MAE's decoder: windows of 4 × 4 on a grid of 64 × 8, and what the same tokens cost without windows.
    let shape = [batch, 512, 16, 32];
    all.push(Box::new(move || in_windows(device, kind, shape)));
    all.push(Box::new(move || library(device, kind, shape, Backend::Flash)));
    let parameters = if gpu { 111_700_000 } else { 4_000_000 };
    all.extend(flat(device, kind, parameters / 128 * 128));
    all
}

fn random(shape: &[i64], kind: Kind, device: Device) -> Tensor {
    Tensor::randn(shape, (Kind::Float, device)).to_kind(kind)
}

/// A leaf that wants a gradient.
fn leaf(shape: &[i64], kind: Kind, device: Device) -> Tensor {
    random(shape, kind, device).set_requires_grad(true)
}

/// Runs forward, and backward into fresh gradients; with a product and a sum in between that everybody pays alike.
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
        run: Box::new(move || bias_gelu(&x, Some(&bias), Form::Exact).map(done)),
    })
}

/// MAE's targets: three quarters of the patches of uint8 pictures, levelled.
fn targets(device: Device, batch: i64) -> Result<Case> {
    let grid = Grid { frames: 1, rows: 14, cols: 14, channels: 3, patch_frames: 1, patch: 16 };
    let x = Tensor::randint(256, [batch, 3, 1, 224, 224], (Kind::Uint8, device));
    let drop = Tensor::rand([batch, 196], (Kind::Float, device)).argsort(1, false).narrow(1, 49, 147).contiguous();
    let scale = Scale { mean: vec![0.485, 0.456, 0.406], std: vec![0.229, 0.224, 0.225] };
    let values = (batch * 147 * 768) as f64;
    Ok(Case {
        op: "patch, levelled",
        by: "ours",
        shape: format!("[{batch}, 3, 224, 224] at 147"),
        bytes: 5.0 * values, // One byte in, four out.
        flops: 0.0,
        run: Box::new(move || target(&x, &grid, &scale, &drop, Level::Patch).map(done)),
    })
}

/// Results are of no interest.
fn done<T>(_: T) {}

/// The decoder's input.
fn filled(device: Device, kind: Kind, batch: i64) -> Result<Case> {
    let (seen, token) = (random(&[batch, 50, 512], kind, device), random(&[512], kind, device));
    let positions = random(&[196, 512], Kind::Float, device);
    let order = Tensor::rand([batch, 196], (Kind::Float, device)).argsort(1, false);
    let [keep, drop] = [(0, 49), (49, 147)].map(|(from, n)| order.narrow(1, from, n).contiguous());
    let bytes = (batch * (50 + 197) * 512) as f64 * kind.elt_size_in_bytes() as f64;
    let run = move || {
        let places = Places { positions: &positions, keep: &keep, hidden: Some((&token, &drop)) };
        fill(&seen, None, places).map(done)
    };
    Ok(Case { op: "fill", by: "ours", shape: format!("[{batch}, 197, 512]"), bytes, flops: 0.0, run: Box::new(run) })
}

/// A residual added and the sum normalised: two rows in, two out.
fn norm(device: Device, kind: Kind, rows: i64, width: i64) -> Result<Case> {
    let [x, r] = [(); 2].map(|()| random(&[rows, width], kind, device));
    let [scale, shift] = [(); 2].map(|()| random(&[width], kind, device));
    Ok(Case {
        op: "add, layer_norm",
        by: "ours",
        shape: format!("[{rows}, {width}]"),
        bytes: 4.0 * (rows * width) as f64 * kind.elt_size_in_bytes() as f64,
        flops: 0.0,
        run: Box::new(move || layer_norm::add_layer_norm(&x, &r, &scale, &shift).map(done)),
    })
}

/// The squared error and its gradient.
fn loss(device: Device, kind: Kind, batch: i64) -> Result<Case> {
    let guess = leaf(&[batch, 147, 768], kind, device);
    let truth = random(&[batch, 147, 768], Kind::Float, device);
    let bytes = (batch * 147 * 768) as f64 * (4.0 + 4.0 * kind.elt_size_in_bytes() as f64);
    let run = move || {
        let sum = masked_mse(&guess, &truth)?;
        Tensor::f_run_backward(&[sum], &[&guess], false, false)?;
        Ok(())
    };
    let shape = format!("[{batch}, 147, 768]");
    Ok(Case { op: "masked_mse, both ways", by: "ours", shape, bytes, flops: 0.0, run: Box::new(run) })
}

/// Our attention forward and backward, as the block calls it.
fn mixing(device: Device, kind: Kind, [batch, tokens, heads, each]: [i64; 4]) -> Result<Case> {
    let qkv = leaf(&[batch, tokens, 3 * heads * each], kind, device);
    let upstream = random(&[batch, tokens, heads * each], kind, device);
    Ok(Case {
        op: "attention, both ways",
        by: "ours",
        shape: format!("[{batch}, {tokens}, {heads} × {each}]"),
        bytes: moved(batch * tokens * heads * each, kind),
        flops: 14.0 * (batch * heads * tokens * tokens * each) as f64,
        run: Box::new(move || round(&[&qkv], &upstream, || attention(&qkv, heads, 0))),
    })
}

/// Our attention by cosines within shifted windows, forward and backward.
fn in_windows(device: Device, kind: Kind, [batch, tokens, heads, each]: [i64; 4]) -> Result<Case> {
    let windows = Windows::new([tokens / 8, 8], [4, 4], [2, 0], device)?;
    let seen = windows.size();
    let qkv = leaf(&[batch, tokens, 3 * heads * each], kind, device);
    let [scale, bias] = [&[heads][..], &[heads, seen, seen]].map(|shape| leaf(shape, Kind::Float, device));
    let upstream = random(&[batch, tokens, heads * each], kind, device);
    let run = move || round(&[&qkv, &scale, &bias], &upstream, || cosine(&qkv, heads, &windows, [&scale, &bias]));
    Ok(Case {
        op: "attention in windows, both ways",
        by: "ours",
        shape: format!("[{batch}, {tokens}, {heads} × {each}] by {seen}"),
        bytes: moved(batch * tokens * heads * each, kind),
        flops: 14.0 * (batch * heads * tokens * seen * each) as f64,
        run: Box::new(run),
    })
}

/// What works on all parameters at once; by our kernels on a GPU, where alone they are meant to run.
fn flat(device: Device, kind: Kind, n: i64) -> Vec<Make> {
    let shape = move || format!("[{n}]");
    let buffer = move || random(&[n], Kind::Float, device);
    let norm = move || {
        let x = buffer();
        let run = Box::new(move || square_sum(&x).map(done));
        Ok(Case { op: "square_sum", by: "ours", shape: shape(), bytes: 4.0 * n as f64, flops: 0.0, run })
    };
    let mut all: Vec<Make> = vec![Box::new(norm)];
    if device.is_cuda() {
        all.push(Box::new(move || {
            let (average, current) = (buffer(), buffer());
            let run = Box::new(move || lerp::kernel(&average, &current, Share::Number(0.01)));
            Ok(Case { op: "lerp", by: "ours", shape: shape(), bytes: 12.0 * n as f64, flops: 0.0, run })
        }));
        all.push(Box::new(move || {
            let [master, first, second, gradient] = [(); 4].map(|()| buffer());
            let (second, compute) = (second.square(), master.to_kind(kind));
            let steps = Tensor::zeros([1], (Kind::Float, device));
            let table = Table::new(std::slice::from_ref(&(0..n as usize)), &[true], n as usize, &steps);
            let control = control(1e-4, 0.05, 1.0, true, device);
            let run = move || {
                let (master, first, second, gradient) = (&master, &first, &second, &gradient);
                let buffers = Buffers { master, first, second, gradient, compute: Some(&compute) };
                adamw::kernel(buffers, &table, &control, (0.9, 0.95), 1e-8)
            };
            Ok(Case { op: "adamw", by: "ours", shape: shape(), bytes: 30.0 * n as f64, flops: 0.0, run: Box::new(run) })
        }));
    }
    all
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
