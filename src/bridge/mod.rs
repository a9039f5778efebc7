//! What tch leaves out: autograd nodes, gradient hooks, `.grad` as views of a buffer of our own, the fused CPU forms of
//! operations, the bytes of a tensor. Together with `device/mpi.rs` the only place for `unsafe`.

pub mod cuda; // the CUDA half: streams, events, graphs, memory
mod fused; // fused operations; the order of attention kernels
pub mod lend; // a tensor over bytes of ours
pub mod jpeg; // libjpeg-turbo: a JPEG's header, and its pixels
mod node; // an autograd node of closures
pub mod record; // what libtorch runs, by name and time
pub mod profile; // the same, and what a GPU runs, for the tools that people look with

pub use fused::{AdamW, Backend, adamw, layer_norm_backward, linear, sdp_order, set_sdp_order};
pub use node::{Forward, backward, node};

use crate::fault::{Fault, Result};
use std::ffi::{CStr, c_char, c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use tch::{Device, Tensor};
use torch_sys::C_tensor;

unsafe extern "C" {
    fn occlude_reason() -> *const c_char;
    fn occlude_open_cuda() -> bool;
    fn occlude_keep_memory();
    fn occlude_mask_signals(numbers: *const c_int, n: usize, keep: bool) -> bool;
    fn occlude_memory_in_use() -> usize;
    fn occlude_copy(to: *const C_tensor, from: *const C_tensor) -> bool;
    fn occlude_on_gradient(
        leaf: *const C_tensor,
        call: extern "C" fn(*mut c_void, usize),
        context: *mut c_void,
        index: usize,
    ) -> bool;
    fn occlude_set_gradient(leaf: *const C_tensor, gradient: *const C_tensor) -> bool;
}

/// What the last failed call of this thread said, in one line.
fn reason() -> String {
    // SAFETY: the reason is a C string that lives until this thread's next failing call.
    let reason = unsafe { CStr::from_ptr(occlude_reason()) }.to_string_lossy().into_owned();
    reason.lines().next().unwrap_or("no reason given").to_string()
}

fn checked(good: bool, what: &str) -> Result<()> {
    if good { Ok(()) } else { Err(Fault::failed(format!("{what}: {}", reason()))) }
}

/// Opens libtorch's CUDA half, which the linker drops because nothing refers to it, and then ours ([`cuda`]). It must
/// come before any question about CUDA, since libtorch keeps its first answer. Returns whether libtorch has such a half.
pub fn open_cuda() -> bool {
    // SAFETY: dlopen of a library that libtorch itself ships.
    let there = unsafe { occlude_open_cuda() };
    cuda::open(there);
    there
}

/// Keeps large CPU blocks for the next step instead of giving them back to the kernel. Call once, at the start.
pub fn keep_memory() {
    // SAFETY: installs an allocator that lives as long as the process.
    unsafe { occlude_keep_memory() }
}

/// Keeps signals from this thread and from those that it will start, or lets them through to it again.
pub fn mask_signals(numbers: &[c_int], keep: bool) -> Result<()> {
    // SAFETY: the numbers live through the call.
    match unsafe { occlude_mask_signals(numbers.as_ptr(), numbers.len(), keep) } {
        true => Ok(()),
        false => Err(Fault::failed("the system refuses to mask signals")),
    }
}

/// Bytes of CPU tensors that live, of those made since [`keep_memory`]; with what the C library adds to each.
pub fn memory_in_use() -> usize {
    // SAFETY: no arguments.
    unsafe { occlude_memory_in_use() }
}

/// Hooks on the gradients of leaves; they fall silent when this is dropped together with its leaves.
pub struct Hooks {
    // Boxed so that the address handed to C++ stays; never touched from this side after the hooks are set.
    _call: Box<Call>,
}

struct Call {
    fired: Box<dyn Fn(usize) + Send + Sync>,
}

extern "C" fn fired(context: *mut c_void, index: usize) {
    // SAFETY: `context` is the `Call` that `Hooks` keeps alive for as long as its leaves are trained.
    let call = unsafe { &*context.cast::<Call>() };
    // A panic must not unwind through C++ frames: say what happened and end the process.
    if catch_unwind(AssertUnwindSafe(|| (call.fired)(index))).is_err() {
        eprintln!("a gradient hook panicked at tensor {index}");
        std::process::abort();
    }
}

impl Hooks {
    /// Calls `then(i)` on the thread of the autograd engine each time the gradient of `leaves[i]` has been
    /// accumulated, in the order in which backward reaches them. The hooks stay for the life of the leaves, so the
    /// returned value must outlive every backward pass through them.
    pub fn set(leaves: &[Tensor], then: impl Fn(usize) + Send + Sync + 'static) -> Result<Hooks> {
        let call = Box::new(Call { fired: Box::new(then) });
        let context: *const Call = &*call;
        for (index, leaf) in leaves.iter().enumerate() {
            // SAFETY: `context` outlives the hooks, see above.
            let good = unsafe { occlude_on_gradient(leaf.as_ptr(), fired, context.cast_mut().cast(), index) };
            checked(good, "gradient hook")?;
        }
        Ok(Hooks { _call: call })
    }
}

/// Makes `gradient` (same shape, any float dtype) the `.grad` of `leaf`: backward adds into it in place.
pub fn set_gradient(leaf: &Tensor, gradient: &Tensor) -> Result<()> {
    // SAFETY: both handles live through the call; libtorch counts its own reference to the gradient.
    checked(unsafe { occlude_set_gradient(leaf.as_ptr(), gradient.as_ptr()) }, "set gradient")
}

/// Copies into `to`, of the same shape, as `Tensor::copy_` does but without waiting: between a GPU and pinned memory the
/// copy is queued on the current stream, and neither tensor's values are to be relied on before that has come so far.
pub fn copy(to: &Tensor, from: &Tensor) -> Result<()> {
    // SAFETY: both handles live through the call; libtorch keeps pinned memory that is freed until the copy is done.
    checked(unsafe { occlude_copy(to.as_ptr(), from.as_ptr()) }, "copy")
}

/// The bytes of a contiguous CPU tensor, read where they lie.
pub fn bytes(tensor: &Tensor) -> &[u8] {
    assert!(tensor.device() == Device::Cpu && tensor.is_contiguous(), "bytes() wants a contiguous CPU tensor");
    let length = tensor.numel() * tensor.kind().elt_size_in_bytes();
    if length == 0 {
        return &[];
    }
    // SAFETY: the tensor owns `length` contiguous bytes for as long as it is borrowed.
    unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast::<u8>(), length) }
}

/// The bytes of a contiguous CPU tensor, to be written. The caller sees to it that no other view is read meanwhile.
pub fn bytes_mut(tensor: &mut Tensor) -> &mut [u8] {
    assert!(tensor.device() == Device::Cpu && tensor.is_contiguous(), "bytes_mut() wants a contiguous CPU tensor");
    let length = tensor.numel() * tensor.kind().elt_size_in_bytes();
    if length == 0 {
        return &mut [];
    }
    // SAFETY: as in `bytes`; the exclusive borrow of the handle stands for the exclusive use of the memory.
    unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast::<u8>(), length) }
}
