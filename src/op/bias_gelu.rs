//! A bias followed by the Gaussian error linear unit (Hendrycks and Gimpel, 2016), exact or in one of the paper's two
//! approximations.

use super::launch::{KernelSource, Launch, block_count, variant_by_width, vector_width};
use super::sum_partials;
use crate::bridge::{ForwardOutput, apply_function};
use crate::error::Result;
use tch::{Kind, Tensor};

/// A form of the Gaussian error linear unit. The kernel uses the same numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gelu {
    /// x · Φ(x), by the error function.
    Exact,
    /// 0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³))), as in the code of FLIP and GPT-2.
    Tanh,
    /// x · σ(1.702 x), as in Image GPT and CLIP.
    Quick,
}

/// x [.., D] + bias `[D]`, elementwise → [.., D]. On a GPU in one pass, which keeps only x and the bias for backward.
pub fn bias_gelu(x: &Tensor, bias: Option<&Tensor>, gelu: Gelu) -> Result<Tensor> {
    if x.device().is_cuda() && KINDS.contains(&x.kind()) {
        return kernel(x, bias, gelu);
    }
    let x = bias.map_or_else(|| x.shallow_clone(), |bias| x + bias);
    Ok(match gelu {
        Gelu::Exact => x.gelu("none"),
        Gelu::Tanh => x.gelu("tanh"),
        Gelu::Quick => (&x * 1.702).sigmoid() * &x,
    })
}

/// The reference.
pub fn formula(x: &Tensor, bias: Option<&Tensor>, gelu: Gelu) -> Tensor {
    let x = bias.map_or_else(|| x.shallow_clone(), |bias| x + bias);
    match gelu {
        Gelu::Exact => &x * 0.5 * (1.0 + (&x / 2f64.sqrt()).erf()),
        Gelu::Tanh => {
            let inner = (&x + &x * &x * &x * 0.044715) * std::f64::consts::FRAC_2_PI.sqrt();
            &x * 0.5 * (1.0 + inner.tanh())
        }
        Gelu::Quick => &x / (1.0 + (&x * -1.702).exp()),
    }
}

const KINDS: [Kind; 3] = [Kind::Float, Kind::BFloat16, Kind::Half];

/// Kernel source.
pub const SOURCE: KernelSource = KernelSource {
    name: "bias_gelu",
    embedded: include_str!("../../kernels/bias_gelu.cu"),
    variants: || KINDS.iter().flat_map(|kind| [1, 16].map(|width| variant_by_width(*kind, width))).collect(),
};

/// The same by the kernels. Makes x contiguous.
pub fn kernel(x: &Tensor, bias: Option<&Tensor>, gelu: Gelu) -> Result<Tensor> {
    let inputs: Vec<&Tensor> = std::iter::once(x).chain(bias).collect();
    let forward = |inputs: &[Tensor]| {
        let x = inputs[0].contiguous();
        let y = launch_forward(&x, inputs.get(1), gelu)?;
        let saved = std::iter::once(x).chain(inputs.get(1).map(Tensor::shallow_clone)).collect();
        Ok(ForwardOutput { outputs: vec![y], saved })
    };
    let outputs = apply_function(&inputs, forward, move |saved, gradients, needed| {
        let needs_bias = needed.get(1) == Some(&true);
        let (g_x, g_bias) = launch_backward(&saved[0], saved.get(1), &gradients[0].contiguous(), gelu, needs_bias)?;
        Ok(needed.iter().zip([Some(g_x), g_bias]).map(|(needed, gradient)| gradient.filter(|_| *needed)).collect())
    })?;
    Ok(outputs.into_iter().next().expect("one output"))
}

fn launch_forward(x: &Tensor, bias: Option<&Tensor>, gelu: Gelu) -> Result<Tensor> {
    let numel = x.numel() as i64;
    let width = *x.size().last().expect("at least one dimension");
    let y = Tensor::empty_like(x);
    let launch = Launch {
        source: &SOURCE,
        variant: variant_by_width(x.kind(), width),
        entry: "bias_gelu",
        grid: [block_count(numel / vector_width(x.kind(), width), 256), 1, 1],
        threads: 256,
        shared_bytes: 0,
    };
    launch.run(&[x.into(), bias.into(), (&y).into(), numel.into(), (width as i32).into(), (gelu as i32).into()])?;
    Ok(y)
}

/// Rows per block of the backward kernel: enough blocks for every multiprocessor, few partial sums.
const ROWS_PER_BLOCK: i64 = 64;

/// Returns the gradients of x and, if needed, of the bias.
fn launch_backward(
    x: &Tensor,
    bias: Option<&Tensor>,
    g_y: &Tensor,
    gelu: Gelu,
    needs_bias: bool,
) -> Result<(Tensor, Option<Tensor>)> {
    let width = *x.size().last().expect("at least one dimension");
    let rows = x.numel() as i64 / width;
    let columns_per_block = 32 * vector_width(x.kind(), width);
    let runs = block_count(rows, ROWS_PER_BLOCK);
    let g_x = Tensor::empty_like(x);
    let parts = needs_bias.then(|| Tensor::empty([i64::from(runs), width], (Kind::Float, x.device())));
    let launch = Launch {
        source: &SOURCE,
        variant: variant_by_width(x.kind(), width),
        entry: "bias_gelu_backward",
        grid: [runs, block_count(width, columns_per_block), 1],
        threads: 256,
        shared_bytes: 8 * columns_per_block as usize * 4,
    };
    launch.run(&[
        x.into(),
        bias.into(),
        g_y.into(),
        (&g_x).into(),
        parts.as_ref().into(),
        (rows as i32).into(),
        (width as i32).into(),
        (ROWS_PER_BLOCK as i32).into(),
        (gelu as i32).into(),
    ])?;
    let g_bias = parts.map(|parts| sum_partials::kernel(&parts, x.kind())).transpose()?;
    Ok((g_x, g_bias))
}
