//! libtorch's fused operations that tch leaves out, and which of its attention kernels may run.

use super::checked;
use crate::fault::{Fault, Result};
use tch::Tensor;
use torch_sys::C_tensor;

unsafe extern "C" {
    fn occlude_linear(out: *mut *mut C_tensor, x: *const C_tensor, w: *const C_tensor, b: *const C_tensor) -> bool;
    fn occlude_layer_norm_backward(
        out: *mut *mut C_tensor,
        gradient: *const C_tensor,
        x: *const C_tensor,
        mean: *const C_tensor,
        rstd: *const C_tensor,
        scale: *const C_tensor,
        shift: *const C_tensor,
        wanted: *const bool,
    ) -> bool;
    fn occlude_adamw(
        weights: *const *const C_tensor,
        gradients: *const *const C_tensor,
        first: *const *const C_tensor,
        second: *const *const C_tensor,
        steps: *const *const C_tensor,
        n: usize,
        lr: f64,
        beta1: f64,
        beta2: f64,
        weight_decay: f64,
        eps: f64,
    ) -> bool;
    fn occlude_set_sdp_order(order: *const i64, n: usize) -> bool;
    fn occlude_sdp_order(order: *mut i64, n: usize) -> usize;
}

/// x [.., K] · w [N, K]ᵀ + b [N] → [.., N] on a CPU through oneDNN, with its gradients.
pub fn linear(x: &Tensor, w: &Tensor, b: &Tensor) -> Result<Tensor> {
    let mut out = std::ptr::null_mut();
    // SAFETY: the handles live through the call; on success `out` is a new handle that the returned tensor owns.
    unsafe {
        checked(occlude_linear(&mut out, x.as_ptr(), w.as_ptr(), b.as_ptr()), "linear")?;
        Ok(Tensor::from_ptr(out))
    }
}

/// The gradients of [`Tensor::native_layer_norm`] over the last dimension, of those of x, scale and shift that are
/// `wanted`: gradient and x [.., D], mean and rstd [.., 1] as the forward gave them, scale and shift [D].
pub fn layer_norm_backward(
    gradient: &Tensor,
    x: &Tensor,
    [mean, rstd]: [&Tensor; 2],
    [scale, shift]: [&Tensor; 2],
    wanted: [bool; 3],
) -> Result<[Option<Tensor>; 3]> {
    let mut out = [std::ptr::null_mut(); 3];
    // SAFETY: the handles live through the call; `out` and `wanted` have three places each.
    let good = unsafe {
        occlude_layer_norm_backward(
            out.as_mut_ptr(),
            gradient.as_ptr(),
            x.as_ptr(),
            mean.as_ptr(),
            rstd.as_ptr(),
            scale.as_ptr(),
            shift.as_ptr(),
            wanted.as_ptr(),
        )
    };
    checked(good, "layer norm, backward")?;
    // SAFETY: each place holds a new handle, owned by the tensor that is made of it, or null.
    Ok(out.map(|handle| (!handle.is_null()).then(|| unsafe { Tensor::from_ptr(handle) })))
}

/// The numbers of one AdamW update.
#[derive(Clone, Copy, Debug)]
pub struct AdamW {
    pub lr: f64,
    pub betas: (f64, f64),
    pub weight_decay: f64,
    pub eps: f64,
}

/// libtorch's fused AdamW over lists of tensors, in place; `steps` [1] each, counted up here.
pub fn adamw(
    weights: &[Tensor],
    gradients: &[Tensor],
    first: &[Tensor],
    second: &[Tensor],
    steps: &[Tensor],
    with: AdamW,
) -> Result<()> {
    let n = weights.len();
    assert!([gradients.len(), first.len(), second.len(), steps.len()].iter().all(|&l| l == n), "lists of one length");
    if n == 0 {
        // libtorch finds no kernel for lists of nothing.
        return Ok(());
    }
    let handles = |tensors: &[Tensor]| tensors.iter().map(|t| t.as_ptr()).collect::<Vec<_>>();
    let [w, g, m, v, s] = [weights, gradients, first, second, steps].map(handles);
    // SAFETY: five arrays of `n` live handles.
    let good = unsafe {
        occlude_adamw(
            w.as_ptr(),
            g.as_ptr(),
            m.as_ptr(),
            v.as_ptr(),
            s.as_ptr(),
            n,
            with.lr,
            with.betas.0,
            with.betas.1,
            with.weight_decay,
            with.eps,
        )
    };
    checked(good, "AdamW")
}

/// A kernel behind `scaled_dot_product_attention`. The numbers are those of `at::SDPBackend`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i64)]
pub enum Backend {
    /// The formula, operation by operation.
    Math = 0,
    Flash = 1,
    /// Memory-efficient attention, as xFormers has it; takes any mask and dtype.
    Efficient = 2,
    Cudnn = 3,
}

const BACKENDS: [Backend; 4] = [Backend::Math, Backend::Flash, Backend::Efficient, Backend::Cudnn];

/// Lets `scaled_dot_product_attention` use these kernels and no other, the first that takes the shapes, in this
/// order, for the whole process. Where none takes them, attention fails. On a CPU the order does not count: flash is
/// taken where it is allowed, then the formula.
///
/// # Errors
/// [`Code::Usage`](crate::fault::Code::Usage) where no kernel is named, or one twice.
pub fn set_sdp_order(order: &[Backend]) -> Result<()> {
    let twice = order.iter().enumerate().any(|(at, backend)| order[..at].contains(backend));
    if order.is_empty() || twice {
        return Err(Fault::usage(format!("kernels for attention: wanted one or more, each once; got {order:?}")));
    }
    let numbers: Vec<i64> = order.iter().map(|&backend| backend as i64).collect();
    // SAFETY: an array with its length, which is copied.
    checked(unsafe { occlude_set_sdp_order(numbers.as_ptr(), numbers.len()) }, "the order of attention kernels")
}

/// The kernels that `scaled_dot_product_attention` may use, in the order in which they are tried.
pub fn sdp_order() -> Vec<Backend> {
    let mut numbers = [0; 8];
    // SAFETY: an array with its length; no more than that is written.
    let n = unsafe { occlude_sdp_order(numbers.as_mut_ptr(), numbers.len()) };
    let known = |number: &i64| BACKENDS.into_iter().find(|&backend| backend as i64 == *number);
    numbers[..n].iter().filter_map(known).collect()
}
