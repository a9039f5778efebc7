//! Parts of libtorch that tch does not expose: autograd nodes, gradient hooks, `.grad` as views of a buffer, fused CPU
//! operations, the bytes of a tensor, CUDA streams and graphs. Also the safe interface to libjpeg-turbo.

pub mod cuda; // the CUDA library of the bridge: streams, events, graphs, memory
mod fused; // fused operations; priority of the attention kernels
pub mod from_blob; // a tensor over foreign memory
pub mod jpeg; // libjpeg-turbo: the header and the pixels of a JPEG
mod autograd; // custom autograd functions with closures
pub mod record; // names and times of libtorch's operations
pub mod profile; // Chrome traces and NVTX ranges

pub use autograd::{ForwardOutput, apply_function, backward};
pub use fused::{AdamWOptions, SdpBackend, adamw, layer_norm_backward, linear, sdp_backends, set_sdp_backends};

use crate::error::{Error, Result};
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use tch::{Device, Tensor};
use torch_sys::C_tensor;

unsafe extern "C" {
    fn occlude_last_error() -> *const c_char;
    fn occlude_load_cuda() -> bool;
    fn occlude_install_caching_allocator();
    fn occlude_mask_signals(signals: *const c_int, n: usize, block: bool) -> bool;
    fn occlude_execute(program: *const c_char, arguments: *const *const c_char, environment: *const *const c_char);
    fn occlude_allocated_bytes() -> usize;
    fn occlude_copy_non_blocking(to: *const C_tensor, from: *const C_tensor) -> bool;
    fn occlude_register_grad_hook(
        leaf: *const C_tensor,
        hook: extern "C" fn(*mut c_void, usize),
        context: *mut c_void,
        index: usize,
    ) -> bool;
    fn occlude_set_grad(leaf: *const C_tensor, gradient: *const C_tensor) -> bool;
}

/// Returns the first line of the error of this thread's last failed call.
fn last_error() -> String {
    // SAFETY: the error is a C string that lives until this thread's next failing call.
    let text = unsafe { CStr::from_ptr(occlude_last_error()) }.to_string_lossy().into_owned();
    text.lines().next().unwrap_or("no reason given").to_string()
}

/// Turns the status of a bridge call into a result; `what` names the call in the error.
fn check(success: bool, what: &str) -> Result<()> {
    if success { Ok(()) } else { Err(Error::failed(format!("{what}: {}", last_error()))) }
}

/// Loads libtorch_cuda, which the linker drops because nothing refers to it, and then the bridge's own CUDA library
/// ([`cuda`]). Must be called before any question about CUDA, because libtorch caches its first answer. Returns whether
/// libtorch_cuda was loaded.
pub fn load_cuda() -> bool {
    // SAFETY: dlopen of a library that libtorch itself ships.
    let loaded = unsafe { occlude_load_cuda() };
    cuda::load_library(loaded);
    loaded
}

/// Installs a caching allocator for CPU tensors, which keeps large blocks for the next step instead of returning them
/// to the kernel. Must be called once, at the start.
pub fn install_caching_allocator() {
    // SAFETY: installs an allocator that lives as long as the process.
    unsafe { occlude_install_caching_allocator() }
}

/// Blocks signals for this thread and the threads that it starts afterwards, or unblocks them.
pub fn mask_signals(signals: &[c_int], block: bool) -> Result<()> {
    // SAFETY: the signals live through the call.
    if unsafe { occlude_mask_signals(signals.as_ptr(), signals.len(), block) } {
        Ok(())
    } else {
        Err(Error::failed("the system does not allow to mask signals"))
    }
}

/// Replaces this process by another program; returns only if that fails. Blocked and ignored signals stay so.
pub fn execute(program: &CStr, arguments: &[CString], environment: &[CString]) {
    let arguments = null_terminated(arguments);
    let environment = null_terminated(environment);
    // SAFETY: both arrays end with a null pointer, and the strings live through the call.
    unsafe { occlude_execute(program.as_ptr(), arguments.as_ptr(), environment.as_ptr()) }
}

/// Returns pointers to the strings and a null pointer.
fn null_terminated(strings: &[CString]) -> Vec<*const c_char> {
    strings.iter().map(|string| string.as_ptr()).chain([std::ptr::null()]).collect()
}

/// Returns the bytes of all live CPU tensors made since [`install_caching_allocator`], including the overhead of the
/// C library.
pub fn allocated_bytes() -> usize {
    // SAFETY: no arguments.
    unsafe { occlude_allocated_bytes() }
}

/// Hooks that are called when the gradients of leaf tensors have been accumulated. Must outlive every backward pass
/// through its leaves.
pub struct GradHooks {
    // Boxed so that its address, which C++ holds, does not change.
    _closure: Box<HookClosure>,
}

struct HookClosure {
    hook: Box<dyn Fn(usize) + Send + Sync>,
}

extern "C" fn call_hook(context: *mut c_void, index: usize) {
    // SAFETY: `context` is the `HookClosure` that `GradHooks` keeps alive for as long as its leaves are trained.
    let closure = unsafe { &*context.cast::<HookClosure>() };
    // A panic must not unwind through C++ frames.
    if catch_unwind(AssertUnwindSafe(|| (closure.hook)(index))).is_err() {
        eprintln!("a gradient hook panicked at tensor {index}");
        std::process::abort();
    }
}

impl GradHooks {
    /// Registers `hook(i)`, which the autograd engine calls on one of its threads each time the gradient of `leaves[i]`
    /// has been accumulated, in the order in which backward reaches the leaves. The hooks stay for the life of the
    /// leaves.
    pub fn register(leaves: &[Tensor], hook: impl Fn(usize) + Send + Sync + 'static) -> Result<GradHooks> {
        let closure = Box::new(HookClosure { hook: Box::new(hook) });
        let context: *const HookClosure = &*closure;
        for (index, leaf) in leaves.iter().enumerate() {
            // SAFETY: `context` outlives the hooks, see above.
            let success =
                unsafe { occlude_register_grad_hook(leaf.as_ptr(), call_hook, context.cast_mut().cast(), index) };
            check(success, "gradient hook")?;
        }
        Ok(GradHooks { _closure: closure })
    }
}

/// Sets the `.grad` of `leaf` to `gradient` (same shape, any float dtype); backward adds into it in place.
pub fn set_grad(leaf: &Tensor, gradient: &Tensor) -> Result<()> {
    // SAFETY: both handles live through the call; libtorch counts its own reference to the gradient.
    check(unsafe { occlude_set_grad(leaf.as_ptr(), gradient.as_ptr()) }, "set gradient")
}

/// Copies `from` into `to`, of the same shape, as `to.copy_(from, non_blocking=True)` does: between a GPU and pinned
/// memory the copy is queued on the current stream. The values must not be read before the stream has completed it.
pub fn copy_non_blocking(to: &Tensor, from: &Tensor) -> Result<()> {
    // SAFETY: both handles live through the call; libtorch keeps pinned memory that is freed until the copy is done.
    check(unsafe { occlude_copy_non_blocking(to.as_ptr(), from.as_ptr()) }, "copy")
}

/// Returns the bytes of a contiguous CPU tensor without a copy.
///
/// # Panics
/// If the tensor is on another device or not contiguous.
pub fn bytes(tensor: &Tensor) -> &[u8] {
    let length = contiguous_length(tensor);
    if length == 0 {
        return &[];
    }
    // SAFETY: the tensor owns `length` contiguous bytes for as long as it is borrowed.
    unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast::<u8>(), length) }
}

/// Returns the mutable bytes of a contiguous CPU tensor. The caller must not use other views of the same memory
/// meanwhile.
///
/// # Panics
/// If the tensor is on another device or not contiguous.
pub fn bytes_mut(tensor: &mut Tensor) -> &mut [u8] {
    let length = contiguous_length(tensor);
    if length == 0 {
        return &mut [];
    }
    // SAFETY: as in `bytes`; the exclusive borrow of the handle stands for the exclusive use of the memory.
    unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast::<u8>(), length) }
}

fn contiguous_length(tensor: &Tensor) -> usize {
    assert!(tensor.device() == Device::Cpu && tensor.is_contiguous(), "only a contiguous CPU tensor has plain bytes");
    tensor.numel() * tensor.kind().elt_size_in_bytes()
}
