//! Custom autograd functions whose forward and backward are closures, as `torch.autograd.Function` is for Python.

use super::check;
use crate::error::{Error, Result};
use std::any::Any;
use std::ffi::{c_char, c_void};
use std::mem::ManuallyDrop;
use std::panic::{AssertUnwindSafe, catch_unwind};
use tch::Tensor;
use torch_sys::C_tensor;

/// Computes the gradients of the inputs from the saved tensors, the gradients of the outputs, and which inputs need
/// one.
type Backward = Box<dyn Fn(&[Tensor], &[Tensor], &[bool]) -> Result<Vec<Option<Tensor>>> + Send + Sync>;

/// Borrowed handles of `n` tensors; mirrored in C++.
#[repr(C)]
#[derive(Clone, Copy)]
struct HandleList {
    handles: *const *const C_tensor,
    n: usize,
}

/// Handles of `n` tensors that the receiver owns; mirrored in C++.
#[repr(C)]
struct OwnedHandleList {
    handles: *const *mut C_tensor,
    n: usize,
}

/// The arguments of a backward call. `needs_grad` and `out` have one element per input; mirrored in C++.
#[repr(C)]
struct BackwardArgs {
    saved: OwnedHandleList,
    gradients: OwnedHandleList,
    needs_grad: *const bool,
    out: *mut *mut C_tensor,
    n_inputs: usize,
}

/// A closure for C++: `context` is passed to each call; mirrored in C++.
#[repr(C)]
struct BackwardCallback {
    call: extern "C" fn(*const c_void, *const BackwardArgs) -> bool,
    drop: extern "C" fn(*mut c_void),
    context: *mut c_void,
}

unsafe extern "C" {
    fn occlude_set_last_error(text: *const c_char, length: usize);
    fn occlude_needs_recording(inputs: HandleList) -> bool;
    fn occlude_backward(outputs: HandleList, gradients: HandleList) -> bool;
    fn occlude_record_node(
        inputs: HandleList,
        outputs: HandleList,
        saved: HandleList,
        results: *mut *mut C_tensor,
        callback: *const BackwardCallback,
    ) -> bool;
}

/// Result of the forward closure of [`apply_function`].
pub struct ForwardOutput {
    /// Outputs. They must not be modified in place if one of them is an input or a view of one.
    pub outputs: Vec<Tensor>,
    /// Tensors for backward: inputs, outputs or intermediates. If one is modified in place later, backward fails.
    pub saved: Vec<Tensor>,
}

/// Runs `forward` on `inputs` without recording it, and makes its outputs depend on the inputs through `backward`:
/// (saved tensors, gradients of the outputs, which inputs need a gradient) → one gradient per input, or `None`.
///
/// - An output that does not contribute to the loss has a gradient of zeros. Integer outputs have no derivative.
/// - A gradient has its input's shape (or one that sums to it); libtorch casts it to the dtype of the input's gradient.
/// - If no input needs a gradient, or gradients are disabled, nothing is recorded or saved.
/// - `backward` and its saved tensors are dropped after the first backward pass, unless the graph is retained. It runs
///   on a thread of the autograd engine and is not recorded: a backward pass with `create_graph` fails.
/// - An error or a panic in `backward` ends the pass: `Tensor::f_backward` returns an error with its text.
///
/// # Errors
/// The errors of `forward`.
pub fn apply_function(
    inputs: &[&Tensor],
    forward: impl FnOnce(&[Tensor]) -> Result<ForwardOutput>,
    backward: impl Fn(&[Tensor], &[Tensor], &[bool]) -> Result<Vec<Option<Tensor>>> + Send + Sync + 'static,
) -> Result<Vec<Tensor>> {
    let inputs: Vec<Tensor> = inputs.iter().map(|input| input.shallow_clone()).collect();
    let ForwardOutput { outputs, saved } = {
        let _no_grad = tch::no_grad_guard();
        forward(&inputs)?
    };
    let input_handles = handles(&inputs);
    // SAFETY: `inputs` keeps the handles alive.
    if !unsafe { occlude_needs_recording(list(&input_handles)) } {
        return Ok(outputs.iter().map(Tensor::detach).collect());
    }
    let output_handles = handles(&outputs);
    let saved_handles = handles(&saved);
    let mut results = vec![std::ptr::null_mut(); outputs.len()];
    let closure: Box<Backward> = Box::new(Box::new(backward));
    let callback =
        BackwardCallback { call: call_backward, drop: drop_backward, context: Box::into_raw(closure).cast() };
    // SAFETY: handles that live through the call, and a place for each result. The node owns the context from here on;
    // it passes it to `call` until it passes it to `drop`, once.
    let success = unsafe {
        occlude_record_node(
            list(&input_handles),
            list(&output_handles),
            list(&saved_handles),
            results.as_mut_ptr(),
            &callback,
        )
    };
    check(success, "an autograd node")?;
    // SAFETY: new handles, each owned by the one tensor that is made of it here.
    Ok(results.into_iter().map(|result| unsafe { Tensor::from_ptr(result) }).collect())
}

/// Runs backward from `outputs` with their gradients into every leaf: accumulates into `.grad` and calls the hooks. May
/// be called in the backward of a function, on a graph that was recorded there.
///
/// # Panics
/// If there is not exactly one gradient per output.
pub fn backward(outputs: &[Tensor], gradients: &[Tensor]) -> Result<()> {
    assert_eq!(outputs.len(), gradients.len(), "a gradient for each output");
    let output_handles = handles(outputs);
    let gradient_handles = handles(gradients);
    // SAFETY: live handles, as many of one as of the other.
    check(unsafe { occlude_backward(list(&output_handles), list(&gradient_handles)) }, "a backward pass")
}

fn handles(tensors: &[Tensor]) -> Vec<*const C_tensor> {
    tensors.iter().map(Tensor::as_ptr).collect()
}

fn list(handles: &[*const C_tensor]) -> HandleList {
    HandleList { handles: handles.as_ptr(), n: handles.len() }
}

impl OwnedHandleList {
    /// # Safety
    /// The list has `n` valid handles, and this is the only call on it.
    unsafe fn take_tensors(&self) -> Vec<Tensor> {
        // SAFETY: the caller's promise.
        (0..self.n).map(|index| unsafe { Tensor::from_ptr(*self.handles.add(index)) }).collect()
    }
}

/// Runs the backward closure for libtorch's engine. A panic must not unwind through the engine's frames: it becomes the
/// error of the pass.
extern "C" fn call_backward(context: *const c_void, args: *const BackwardArgs) -> bool {
    // SAFETY: the node's context is the closure until it is dropped, and it is called only before.
    let backward = unsafe { &*context.cast::<Backward>() };
    // SAFETY: a structure that lives through the call.
    let args = unsafe { &*args };
    // SAFETY: called once for each list, whose handles are handed over.
    let saved = unsafe { args.saved.take_tensors() };
    // SAFETY: as above.
    let gradients = unsafe { args.gradients.take_tensors() };
    // SAFETY: one flag per input.
    let needs_grad: Vec<bool> = (0..args.n_inputs).map(|index| unsafe { *args.needs_grad.add(index) }).collect();
    match run_backward(backward, &saved, &gradients, &needs_grad) {
        Ok(results) => {
            for (index, gradient) in results.into_iter().enumerate() {
                // C++ frees the handle.
                let handle = gradient.map_or(std::ptr::null(), |gradient| ManuallyDrop::new(gradient).as_ptr());
                // SAFETY: `out` has an element for each input.
                unsafe { *args.out.add(index) = handle.cast_mut() };
            }
            true
        }
        Err(error) => {
            // SAFETY: a text with its length, which is copied.
            unsafe { occlude_set_last_error(error.message.as_ptr().cast(), error.message.len()) };
            false
        }
    }
}

fn run_backward(
    backward: &Backward,
    saved: &[Tensor],
    gradients: &[Tensor],
    needs_grad: &[bool],
) -> Result<Vec<Option<Tensor>>> {
    let results =
        catch_unwind(AssertUnwindSafe(|| backward(saved, gradients, needs_grad))).unwrap_or_else(|panic| {
            Err(Error::failed(format!("a panic in a node's backward: {}", panic_message(panic.as_ref()))))
        })?;
    if results.len() == needs_grad.len() {
        return Ok(results);
    }
    Err(Error::failed(format!(
        "a node's backward gave {} gradients; one for each of its {} inputs is wanted, None included",
        results.len(),
        needs_grad.len()
    )))
}

/// Drops the closure when the node releases it.
extern "C" fn drop_backward(context: *mut c_void) {
    // SAFETY: made by `Box::into_raw` in `apply_function`, and passed here once.
    let closure = unsafe { Box::from_raw(context.cast::<Backward>()) };
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| drop(closure))) {
        tracing::error!("a panic while a node's backward was dropped: {}", panic_message(panic.as_ref()));
    }
}

fn panic_message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("without a message")
}
