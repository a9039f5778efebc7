//! A bias and the Gaussian error linear unit behind it (Hendrycks and Gimpel, 2016), in its exact form and in the two
//! approximations of the same paper.

use super::fold;
use super::launch::{Launch, Source, blocks, by_width, wide};
use crate::bridge::{Forward, node};
use crate::fault::Result;
use tch::{Kind, Tensor};

/// Which function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// x · Φ(x), by the error function.
    Exact,
    /// 0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³))), as FLIP's code and GPT-2's have it.
    Tanh,
    /// x · σ(1.702 x), as the Image GPT and CLIP have it.
    Sigmoid,
}

/// x [.., D] + bias [D], elementwise → [.., D]. On a GPU in one pass, with x alone kept for backward.
pub fn bias_gelu(x: &Tensor, bias: Option<&Tensor>, form: Form) -> Result<Tensor> {
    if x.device().is_cuda() && KINDS.contains(&x.kind()) {
        return kernel(x, bias, form);
    }
    let x = bias.map_or_else(|| x.shallow_clone(), |bias| x + bias);
    Ok(match form {
        Form::Exact => x.gelu("none"),
        Form::Tanh => x.gelu("tanh"),
        Form::Sigmoid => (&x * 1.702).sigmoid() * &x,
    })
}

/// The reference.
pub fn formula(x: &Tensor, bias: Option<&Tensor>, form: Form) -> Tensor {
    let x = bias.map_or_else(|| x.shallow_clone(), |bias| x + bias);
    match form {
        Form::Exact => &x * 0.5 * (1.0 + (&x / 2f64.sqrt()).erf()),
        Form::Tanh => {
            let inner = (&x + &x * &x * &x * 0.044715) * std::f64::consts::FRAC_2_PI.sqrt();
            &x * 0.5 * (1.0 + inner.tanh())
        }
        Form::Sigmoid => &x / (1.0 + (&x * -1.702).exp()),
    }
}

const KINDS: [Kind; 3] = [Kind::Float, Kind::BFloat16, Kind::Half];

pub const SOURCE: Source = Source {
    name: "bias_gelu",
    built_in: include_str!("../../kernels/bias_gelu.cu"),
    variants: || KINDS.iter().flat_map(|kind| [1, 16].map(|width| by_width(*kind, width))).collect(),
};

/// The same by our kernels; x is made contiguous.
pub fn kernel(x: &Tensor, bias: Option<&Tensor>, form: Form) -> Result<Tensor> {
    let inputs: Vec<&Tensor> = std::iter::once(x).chain(bias).collect();
    let forward = |given: &[Tensor]| {
        let x = given[0].contiguous();
        let y = forward(&x, given.get(1), form)?;
        let saved = std::iter::once(x).chain(given.get(1).map(Tensor::shallow_clone)).collect();
        Ok(Forward { outputs: vec![y], saved })
    };
    let outputs = node(&inputs, forward, move |saved, gradients, wanted| {
        let (gx, gb) =
            backward(&saved[0], saved.get(1), &gradients[0].contiguous(), form, wanted.get(1) == Some(&true))?;
        Ok(wanted.iter().zip([Some(gx), gb]).map(|(wanted, gradient)| gradient.filter(|_| *wanted)).collect())
    })?;
    Ok(outputs.into_iter().next().expect("one output"))
}

fn forward(x: &Tensor, bias: Option<&Tensor>, form: Form) -> Result<Tensor> {
    let (numel, width) = (x.numel() as i64, *x.size().last().expect("a dimension"));
    let y = Tensor::empty_like(x);
    let launch = Launch {
        source: &SOURCE,
        variant: by_width(x.kind(), width),
        entry: "bias_gelu",
        grid: [blocks(numel / wide(x.kind(), width), 256), 1, 1],
        threads: 256,
        shared: 0,
    };
    launch.run(&[x.into(), bias.into(), (&y).into(), numel.into(), (width as i32).into(), (form as i32).into()])?;
    Ok(y)
}

/// Rows of one block of the backward kernel: enough blocks for every multiprocessor, few partial sums.
const ROWS: i64 = 64;

fn backward(
    x: &Tensor,
    bias: Option<&Tensor>,
    gy: &Tensor,
    form: Form,
    wants_bias: bool,
) -> Result<(Tensor, Option<Tensor>)> {
    let width = *x.size().last().expect("a dimension");
    let (rows, each) = (x.numel() as i64 / width, 32 * wide(x.kind(), width));
    let runs = blocks(rows, ROWS);
    let gx = Tensor::empty_like(x);
    let parts = wants_bias.then(|| Tensor::empty([i64::from(runs), width], (Kind::Float, x.device())));
    let launch = Launch {
        source: &SOURCE,
        variant: by_width(x.kind(), width),
        entry: "bias_gelu_backward",
        grid: [runs, blocks(width, each), 1],
        threads: 256,
        shared: 8 * each as usize * 4,
    };
    let [rows, width, of_block] = [rows, width, ROWS].map(|n| (n as i32).into());
    let tensors = [x.into(), bias.into(), gy.into(), (&gx).into(), parts.as_ref().into()];
    launch.run(&[&tensors[..], &[rows, width, of_block, (form as i32).into()]].concat())?;
    let gb = parts.map(|parts| fold::kernel(&parts, x.kind())).transpose()?;
    Ok((gx, gb))
}
