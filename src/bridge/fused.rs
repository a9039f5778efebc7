//! Fused operations of libtorch that tch does not expose, and the priority of its attention kernels.

use super::check;
use crate::error::{Error, Result};
use tch::Tensor;
use torch_sys::C_tensor;

/// Inputs of the backward pass of layer norm; mirrored in C++.
#[repr(C)]
struct LayerNormInputs {
    gradient: *const C_tensor,
    x: *const C_tensor,
    mean: *const C_tensor,
    rstd: *const C_tensor,
    scale: *const C_tensor,
    shift: *const C_tensor,
}

/// Lists of `n` tensors each; mirrored in C++.
#[repr(C)]
struct AdamWTensors {
    weights: *const *const C_tensor,
    gradients: *const *const C_tensor,
    exp_avg: *const *const C_tensor,
    exp_avg_sq: *const *const C_tensor,
    steps: *const *const C_tensor,
    n: usize,
}

/// [`AdamWOptions`] as C reads them; mirrored in C++.
#[repr(C)]
struct AdamWScalars {
    lr: f64,
    beta1: f64,
    beta2: f64,
    weight_decay: f64,
    eps: f64,
}

unsafe extern "C" {
    fn occlude_linear(out: *mut *mut C_tensor, x: *const C_tensor, w: *const C_tensor, b: *const C_tensor) -> bool;
    fn occlude_layer_norm_backward(
        out: *mut *mut C_tensor,
        inputs: *const LayerNormInputs,
        needs_grad: *const bool,
    ) -> bool;
    fn occlude_adamw(tensors: *const AdamWTensors, scalars: *const AdamWScalars) -> bool;
    fn occlude_set_sdp_backends(backends: *const i64, n: usize) -> bool;
    fn occlude_sdp_backends(backends: *mut i64, n: usize) -> usize;
}

/// Computes `x [.., K] · w [N, K]ᵀ + b [N] → [.., N]` on a CPU with oneDNN, differentiably.
pub fn linear(x: &Tensor, w: &Tensor, b: &Tensor) -> Result<Tensor> {
    let mut out = std::ptr::null_mut();
    // SAFETY: the handles live through the call; on success `out` is a new handle that the returned tensor owns.
    unsafe {
        check(occlude_linear(&mut out, x.as_ptr(), w.as_ptr(), b.as_ptr()), "linear")?;
        Ok(Tensor::from_ptr(out))
    }
}

/// Returns the gradients of x, scale and shift for [`Tensor::native_layer_norm`] over the last dimension, each only if
/// `needs_grad` asks for it. `gradient` and `x` are [.., D]; `mean` and `rstd` are the [.., 1] outputs of the forward
/// pass; `scale` and `shift` are `[D]`.
pub fn layer_norm_backward(
    gradient: &Tensor,
    x: &Tensor,
    [mean, rstd]: [&Tensor; 2],
    [scale, shift]: [&Tensor; 2],
    needs_grad: [bool; 3],
) -> Result<[Option<Tensor>; 3]> {
    let mut out = [std::ptr::null_mut(); 3];
    let inputs = LayerNormInputs {
        gradient: gradient.as_ptr(),
        x: x.as_ptr(),
        mean: mean.as_ptr(),
        rstd: rstd.as_ptr(),
        scale: scale.as_ptr(),
        shift: shift.as_ptr(),
    };
    // SAFETY: the handles live through the call; `out` and `needs_grad` have three elements each.
    let success = unsafe { occlude_layer_norm_backward(out.as_mut_ptr(), &inputs, needs_grad.as_ptr()) };
    check(success, "layer norm, backward")?;
    // SAFETY: each element is a new handle, owned by the tensor that is made of it, or null.
    Ok(out.map(|handle| (!handle.is_null()).then(|| unsafe { Tensor::from_ptr(handle) })))
}

/// Hyperparameters of one AdamW update.
#[derive(Clone, Copy, Debug)]
pub struct AdamWOptions {
    pub lr: f64,
    pub betas: [f64; 2],
    pub weight_decay: f64,
    pub eps: f64,
}

/// Updates lists of tensors in place with libtorch's fused AdamW. Each of `steps`, a tensor of one element, counts the
/// updates of its tensor and is incremented here.
///
/// # Panics
/// If the lists differ in length.
pub fn adamw(
    weights: &[Tensor],
    gradients: &[Tensor],
    exp_avg: &[Tensor],
    exp_avg_sq: &[Tensor],
    steps: &[Tensor],
    options: AdamWOptions,
) -> Result<()> {
    let n = weights.len();
    assert!([gradients, exp_avg, exp_avg_sq, steps].iter().all(|list| list.len() == n), "lists of one length");
    if n == 0 {
        // libtorch finds no kernel for empty lists.
        return Ok(());
    }
    let [weights, gradients, exp_avg, exp_avg_sq, steps] =
        [weights, gradients, exp_avg, exp_avg_sq, steps].map(handles);
    let tensors = AdamWTensors {
        weights: weights.as_ptr(),
        gradients: gradients.as_ptr(),
        exp_avg: exp_avg.as_ptr(),
        exp_avg_sq: exp_avg_sq.as_ptr(),
        steps: steps.as_ptr(),
        n,
    };
    let AdamWOptions { lr, betas: [beta1, beta2], weight_decay, eps } = options;
    let scalars = AdamWScalars { lr, beta1, beta2, weight_decay, eps };
    // SAFETY: five arrays of `n` live handles.
    check(unsafe { occlude_adamw(&tensors, &scalars) }, "AdamW")
}

fn handles(tensors: &[Tensor]) -> Vec<*const C_tensor> {
    tensors.iter().map(Tensor::as_ptr).collect()
}

/// A kernel of `scaled_dot_product_attention`. The values are those of `at::SDPBackend`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i64)]
pub enum SdpBackend {
    /// The formula, operation by operation.
    Math = 0,
    Flash = 1,
    /// Memory-efficient attention (xFormers); accepts any mask and dtype.
    Efficient = 2,
    Cudnn = 3,
}

const BACKENDS: [SdpBackend; 4] = [SdpBackend::Math, SdpBackend::Flash, SdpBackend::Efficient, SdpBackend::Cudnn];

/// Restricts `scaled_dot_product_attention` to these kernels, for the whole process. The first one that supports the
/// shapes is used; if none does, attention fails. On a CPU the order has no effect: flash has priority over math.
///
/// # Errors
/// [`ExitCode::Usage`](crate::error::ExitCode::Usage) if the list is empty or names a kernel twice.
pub fn set_sdp_backends(backends: &[SdpBackend]) -> Result<()> {
    let repeated = backends.iter().enumerate().any(|(index, backend)| backends[..index].contains(backend));
    if backends.is_empty() || repeated {
        return Err(Error::usage(format!("kernels for attention: wanted one or more, each once; got {backends:?}")));
    }
    let values: Vec<i64> = backends.iter().map(|&backend| backend as i64).collect();
    // SAFETY: an array with its length, which is copied.
    check(unsafe { occlude_set_sdp_backends(values.as_ptr(), values.len()) }, "the priority of attention kernels")
}

/// Returns the kernels that `scaled_dot_product_attention` may use, in order of priority.
pub fn sdp_backends() -> Vec<SdpBackend> {
    let mut values = [0; 8];
    // SAFETY: an array with its length; no more than that is written.
    let n = unsafe { occlude_sdp_backends(values.as_mut_ptr(), values.len()) };
    let from_value = |value: &i64| BACKENDS.into_iter().find(|&backend| backend as i64 == *value);
    values[..n].iter().filter_map(from_value).collect()
}
