//! The operations and shapes that `occlude bench op` times: those of a training step of MAE ViT-B/16 (encoder: 50
//! tokens, width 768; decoder: 197 tokens, width 512), and the short sequences of other models. A CPU gets smaller
//! batches.

use crate::bridge::{SdpBackend, sdp_backends, set_sdp_backends};
use crate::error::Result;
use crate::grid::Grid;
use crate::op::adamw::{AdamWBuffers, TensorState, control};
use crate::op::attention::{Windows, attention, cosine::cosine_attention};
use crate::op::bias_gelu::{Gelu, bias_gelu};
use crate::op::lerp::{self, LerpWeight};
use crate::op::patch::{ChannelStats, PatchNorm, gather_target};
use crate::op::tokens::{TokenLayout, assemble_tokens};
use crate::op::{adamw, layer_norm, masked_mse::masked_mse, square_sum::square_sum};
use tch::{Device, Kind, Tensor};

/// One operation at one shape.
pub struct Case {
    pub op: &'static str,
    /// The implementation: "ours", or the name of a library's kernel.
    pub implementation: &'static str,
    pub shape: String,
    /// Bytes that the operation must move.
    pub bytes: f64,
    /// FLOP of its matrix products.
    pub flops: f64,
    pub run: Box<dyn FnMut() -> Result<()>>,
}

/// Builds a case, tensors included, at the time it is run, so that only one case's tensors exist at a time.
type BuildCase = Box<dyn FnOnce() -> Result<Case>>;

/// Shape of the queries, keys and values of an attention case.
#[derive(Clone, Copy)]
struct QkvShape {
    batch: i64,
    tokens: i64,
    heads: i64,
    head_width: i64,
}

impl QkvShape {
    fn new(batch: i64, tokens: i64, heads: i64, head_width: i64) -> QkvShape {
        QkvShape { batch, tokens, heads, head_width }
    }

    /// Number of features of a token.
    fn width(&self) -> i64 {
        self.heads * self.head_width
    }

    /// Bytes moved by forward (q, k, v in, output out) and backward (q, k, v, output and its gradient in, three
    /// gradients out).
    fn bytes(&self, kind: Kind) -> f64 {
        12.0 * (self.batch * self.tokens * self.width()) as f64 * kind.elt_size_in_bytes() as f64
    }

    /// FLOP of forward and backward where every token attends to `keys` tokens.
    fn flops(&self, keys: i64) -> f64 {
        14.0 * (self.batch * self.heads * self.tokens * keys * self.head_width) as f64
    }
}

impl std::fmt::Display for QkvShape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "[{}, {}, {} × {}]", self.batch, self.tokens, self.heads, self.head_width)
    }
}

/// Returns all cases of a device.
pub fn all_cases(device: Device) -> Vec<BuildCase> {
    let is_gpu = device.is_cuda();
    let batch = if is_gpu { 256 } else { 4 };
    let kind = if is_gpu { Kind::BFloat16 } else { Kind::Float };
    let mut cases: Vec<BuildCase> = Vec::new();
    cases.push(Box::new(move || target_case(device, batch)));
    cases.push(Box::new(move || assemble_tokens_case(device, kind, batch)));
    for (tokens, width) in [(50, 768), (197, 512)] {
        cases.push(Box::new(move || layer_norm_case(device, kind, batch * tokens, width)));
    }
    for (tokens, width) in [(50, 3072), (197, 2048)] {
        cases.push(Box::new(move || gelu_case(device, kind, batch * tokens, width)));
    }
    cases.push(Box::new(move || masked_mse_case(device, kind, batch)));
    for (tokens, heads, head_width) in [(50, 12, 64), (65, 16, 80), (99, 16, 64), (160, 12, 64), (197, 16, 32)] {
        let shape = QkvShape::new(batch, tokens, heads, head_width);
        cases.push(Box::new(move || attention_case(device, kind, shape)));
        let backends: &[SdpBackend] =
            if is_gpu { &[SdpBackend::Flash, SdpBackend::Efficient, SdpBackend::Cudnn] } else { &[SdpBackend::Flash] };
        for &backend in backends {
            cases.push(Box::new(move || sdpa_case(device, kind, shape, backend)));
        }
    }
    // Audio-MAE's decoder: windows of 4 × 4 on a grid of 64 × 8, and the same tokens without windows for comparison.
    let shape = QkvShape::new(batch, 512, 16, 32);
    cases.push(Box::new(move || window_attention_case(device, kind, shape)));
    cases.push(Box::new(move || sdpa_case(device, kind, shape, SdpBackend::Flash)));
    let parameters: i64 = if is_gpu { 111_700_000 } else { 4_000_000 };
    cases.extend(optimizer_cases(device, kind, parameters / 128 * 128));
    cases
}

fn random(shape: &[i64], kind: Kind, device: Device) -> Tensor {
    Tensor::randn(shape, (Kind::Float, device)).to_kind(kind)
}

/// Returns a random leaf tensor that requires a gradient.
fn leaf(shape: &[i64], kind: Kind, device: Device) -> Tensor {
    random(shape, kind, device).set_requires_grad(true)
}

/// Runs forward, and backward into new gradients. The product with `upstream` and the sum in between cost every
/// implementation the same.
fn forward_backward(inputs: &[&Tensor], upstream: &Tensor, forward: impl Fn() -> Result<Tensor>) -> Result<()> {
    let y = forward()?;
    Tensor::f_run_backward(&[(&y * upstream).sum(Kind::Float)], inputs, false, false)?;
    Ok(())
}

fn gelu_case(device: Device, kind: Kind, rows: i64, width: i64) -> Result<Case> {
    let x = random(&[rows, width], kind, device);
    let bias = random(&[width], kind, device);
    Ok(Case {
        op: "bias_gelu",
        implementation: "ours",
        shape: format!("[{rows}, {width}]"),
        bytes: 2.0 * (rows * width) as f64 * kind.elt_size_in_bytes() as f64,
        flops: 0.0,
        run: Box::new(move || bias_gelu(&x, Some(&bias), Gelu::Exact).map(drop)),
    })
}

/// MAE's targets: three quarters of the patches of uint8 images, normalized per patch.
fn target_case(device: Device, batch: i64) -> Result<Case> {
    let grid = Grid { frames: 1, rows: 14, cols: 14, channels: 3, patch_frames: 1, patch: 16 };
    let x = Tensor::randint(256, [batch, 3, 1, 224, 224], (Kind::Uint8, device));
    let drop = Tensor::rand([batch, 196], (Kind::Float, device)).argsort(1, false).narrow(1, 49, 147).contiguous();
    let stats = ChannelStats { mean: vec![0.485, 0.456, 0.406], std: vec![0.229, 0.224, 0.225] };
    let values = (batch * 147 * 768) as f64;
    Ok(Case {
        op: "patch, normalized",
        implementation: "ours",
        shape: format!("[{batch}, 3, 224, 224] at 147"),
        bytes: 5.0 * values, // Reads 1 byte and writes 4 per value.
        flops: 0.0,
        run: Box::new(move || gather_target(&x, &grid, &stats, &drop, PatchNorm::PerPatch).map(discard)),
    })
}

/// Drops a result; `drop` is the name of the hidden tokens here.
fn discard<T>(_: T) {}

/// The decoder's input sequence.
fn assemble_tokens_case(device: Device, kind: Kind, batch: i64) -> Result<Case> {
    let visible = random(&[batch, 50, 512], kind, device);
    let mask_token = random(&[512], kind, device);
    let positions = random(&[196, 512], Kind::Float, device);
    let order = Tensor::rand([batch, 196], (Kind::Float, device)).argsort(1, false);
    let keep = order.narrow(1, 0, 49).contiguous();
    let drop = order.narrow(1, 49, 147).contiguous();
    let bytes = (batch * (50 + 197) * 512) as f64 * kind.elt_size_in_bytes() as f64;
    let run = move || {
        let layout = TokenLayout { positions: &positions, keep: &keep, hidden: Some((&mask_token, &drop)) };
        assemble_tokens(&visible, None, layout).map(discard)
    };
    Ok(Case {
        op: "assemble_tokens",
        implementation: "ours",
        shape: format!("[{batch}, 197, 512]"),
        bytes,
        flops: 0.0,
        run: Box::new(run),
    })
}

/// Residual addition and layer norm: two tensors in, two out.
fn layer_norm_case(device: Device, kind: Kind, rows: i64, width: i64) -> Result<Case> {
    let x = random(&[rows, width], kind, device);
    let residual = random(&[rows, width], kind, device);
    let scale = random(&[width], kind, device);
    let shift = random(&[width], kind, device);
    Ok(Case {
        op: "add, layer_norm",
        implementation: "ours",
        shape: format!("[{rows}, {width}]"),
        bytes: 4.0 * (rows * width) as f64 * kind.elt_size_in_bytes() as f64,
        flops: 0.0,
        run: Box::new(move || layer_norm::add_layer_norm(&x, &residual, &scale, &shift).map(drop)),
    })
}

/// The squared error and its gradient.
fn masked_mse_case(device: Device, kind: Kind, batch: i64) -> Result<Case> {
    let pred = leaf(&[batch, 147, 768], kind, device);
    let target = random(&[batch, 147, 768], Kind::Float, device);
    let bytes = (batch * 147 * 768) as f64 * (4.0 + 4.0 * kind.elt_size_in_bytes() as f64);
    let run = move || {
        let sum = masked_mse(&pred, &target)?;
        Tensor::f_run_backward(&[sum], &[&pred], false, false)?;
        Ok(())
    };
    let shape = format!("[{batch}, 147, 768]");
    let op = "masked_mse, both ways";
    Ok(Case { op, implementation: "ours", shape, bytes, flops: 0.0, run: Box::new(run) })
}

/// Our attention forward and backward, as the transformer block calls it.
fn attention_case(device: Device, kind: Kind, shape: QkvShape) -> Result<Case> {
    let QkvShape { batch, tokens, heads, .. } = shape;
    let qkv = leaf(&[batch, tokens, 3 * shape.width()], kind, device);
    let upstream = random(&[batch, tokens, shape.width()], kind, device);
    Ok(Case {
        op: "attention, both ways",
        implementation: "ours",
        shape: shape.to_string(),
        bytes: shape.bytes(kind),
        flops: shape.flops(tokens),
        run: Box::new(move || forward_backward(&[&qkv], &upstream, || attention(&qkv, heads, 0))),
    })
}

/// Our cosine attention within shifted windows, forward and backward.
fn window_attention_case(device: Device, kind: Kind, shape: QkvShape) -> Result<Case> {
    let QkvShape { batch, tokens, heads, .. } = shape;
    let windows = Windows::new([tokens / 8, 8], [4, 4], [2, 0], device)?;
    let window_size = windows.size();
    let qkv = leaf(&[batch, tokens, 3 * shape.width()], kind, device);
    let scale = leaf(&[heads], Kind::Float, device);
    let bias = leaf(&[heads, window_size, window_size], Kind::Float, device);
    let upstream = random(&[batch, tokens, shape.width()], kind, device);
    let run = move || {
        let forward = || cosine_attention(&qkv, heads, &windows, [&scale, &bias]);
        forward_backward(&[&qkv, &scale, &bias], &upstream, forward)
    };
    Ok(Case {
        op: "attention in windows, both ways",
        implementation: "ours",
        shape: format!("{shape} by {window_size}"),
        bytes: shape.bytes(kind),
        flops: shape.flops(window_size),
        run: Box::new(run),
    })
}

/// The operations over all parameters at once; on a GPU including the kernels that only run there.
fn optimizer_cases(device: Device, kind: Kind, n: i64) -> Vec<BuildCase> {
    let mut cases: Vec<BuildCase> = vec![Box::new(move || square_sum_case(device, n))];
    if device.is_cuda() {
        cases.push(Box::new(move || lerp_case(device, n)));
        cases.push(Box::new(move || adamw_case(device, kind, n)));
    }
    cases
}

fn square_sum_case(device: Device, n: i64) -> Result<Case> {
    let x = random(&[n], Kind::Float, device);
    let run = Box::new(move || square_sum(&x).map(drop));
    let shape = format!("[{n}]");
    Ok(Case { op: "square_sum", implementation: "ours", shape, bytes: 4.0 * n as f64, flops: 0.0, run })
}

fn lerp_case(device: Device, n: i64) -> Result<Case> {
    let average = random(&[n], Kind::Float, device);
    let current = random(&[n], Kind::Float, device);
    let run = Box::new(move || lerp::kernel(&average, &current, LerpWeight::Scalar(0.01)));
    let shape = format!("[{n}]");
    Ok(Case { op: "lerp", implementation: "ours", shape, bytes: 12.0 * n as f64, flops: 0.0, run })
}

fn adamw_case(device: Device, kind: Kind, n: i64) -> Result<Case> {
    let master = random(&[n], Kind::Float, device);
    let exp_avg = random(&[n], Kind::Float, device);
    let exp_avg_sq = random(&[n], Kind::Float, device).square();
    let gradient = random(&[n], Kind::Float, device);
    let compute = master.to_kind(kind);
    let steps = Tensor::zeros([1], (Kind::Float, device));
    let state = TensorState::new(std::slice::from_ref(&(0..n as usize)), &[true], n as usize, &steps);
    let control = control(1e-4, 0.05, 1.0, true, device);
    let run = move || {
        let buffers = AdamWBuffers {
            master: &master,
            exp_avg: &exp_avg,
            exp_avg_sq: &exp_avg_sq,
            gradient: &gradient,
            compute_weights: Some(&compute),
        };
        adamw::kernel(buffers, &state, &control, [0.9, 0.95], 1e-8)
    };
    let shape = format!("[{n}]");
    Ok(Case { op: "adamw", implementation: "ours", shape, bytes: 30.0 * n as f64, flops: 0.0, run: Box::new(run) })
}

/// Attention forward and backward by one of libtorch's kernels.
fn sdpa_case(device: Device, kind: Kind, shape: QkvShape, backend: SdpBackend) -> Result<Case> {
    let QkvShape { batch, tokens, heads, head_width } = shape;
    let qkv = leaf(&[batch, tokens, 3, heads, head_width], kind, device);
    let upstream = random(&[batch, heads, tokens, head_width], kind, device);
    let implementation = match backend {
        SdpBackend::Math => "formula",
        SdpBackend::Flash => "flash",
        SdpBackend::Efficient => "efficient",
        SdpBackend::Cudnn => "cudnn",
    };
    let run = move || {
        let previous = sdp_backends();
        set_sdp_backends(&[backend])?;
        let result = forward_backward(&[&qkv], &upstream, || {
            let [q, k, v] = [0, 1, 2].map(|part| qkv.select(2, part).transpose(1, 2));
            Ok(Tensor::f_scaled_dot_product_attention(&q, &k, &v, None::<Tensor>, 0.0, false, None, false)?)
        });
        set_sdp_backends(&previous)?;
        result
    };
    Ok(Case {
        op: "attention, both ways",
        implementation,
        shape: shape.to_string(),
        bytes: shape.bytes(kind),
        flops: shape.flops(tokens),
        run: Box::new(run),
    })
}
