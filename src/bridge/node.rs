//! An autograd node whose forward and backward are closures: what `torch.autograd.Function` is to Python.

use super::checked;
use crate::fault::{Fault, Result};
use std::any::Any;
use std::ffi::{c_char, c_void};
use std::mem::ManuallyDrop;
use std::panic::{AssertUnwindSafe, catch_unwind};
use tch::Tensor;
use torch_sys::C_tensor;

/// Gradients of the inputs, of the saved tensors, the gradients of the outputs, and which inputs want one.
type Backward = Box<dyn Fn(&[Tensor], &[Tensor], &[bool]) -> Result<Vec<Option<Tensor>>> + Send + Sync>;

type Call = extern "C" fn(
    *const c_void,
    *const *mut C_tensor,
    usize,
    *const *mut C_tensor,
    usize,
    *const bool,
    *mut *mut C_tensor,
    usize,
) -> bool;

unsafe extern "C" {
    fn occlude_refuse(text: *const c_char, length: usize);
    fn occlude_is_recorded(inputs: *const *const C_tensor, n: usize) -> bool;
    fn occlude_backward(outputs: *const *const C_tensor, gradients: *const *const C_tensor, n: usize) -> bool;
    fn occlude_node(
        inputs: *const *const C_tensor,
        n_inputs: usize,
        outputs: *const *const C_tensor,
        results: *mut *mut C_tensor,
        n_outputs: usize,
        saved: *const *const C_tensor,
        n_saved: usize,
        call: Call,
        drop: extern "C" fn(*mut c_void),
        context: *mut c_void,
    ) -> bool;
}

/// What a node's forward gives: outputs, and what its backward wants to see again.
pub struct Forward {
    /// Not written to in place where one of them is an input or a view of one: backward would not know.
    pub outputs: Vec<Tensor>,
    /// Inputs, outputs or anything between. Whoever changes one of them in place makes backward fail.
    pub saved: Vec<Tensor>,
}

/// Runs `forward` on `inputs` without recording it, and makes its outputs depend on the inputs through `backward`:
/// (saved, one gradient per output, which of the inputs want one) → one gradient per input, None where there is none.
///
/// - An output that nobody differentiates has a gradient of zeros. Outputs of whole numbers have no derivative.
/// - A gradient has its input's shape (or one that sums to it); libtorch casts it to the dtype of the input's gradient.
/// - Where no input wants a gradient, or gradients are off, nothing is recorded and nothing saved.
/// - `backward` and what it saved are dropped after the first backward pass, unless the graph is kept. It runs on a
///   thread of the autograd engine, not recorded: a pass that would record it (`create_graph`) fails.
/// - A fault or a panic in `backward` ends the pass: `Tensor::f_backward` returns an error with its text.
///
/// # Errors
/// What `forward` gives.
pub fn node(
    inputs: &[&Tensor],
    forward: impl FnOnce(&[Tensor]) -> Result<Forward>,
    backward: impl Fn(&[Tensor], &[Tensor], &[bool]) -> Result<Vec<Option<Tensor>>> + Send + Sync + 'static,
) -> Result<Vec<Tensor>> {
    let given: Vec<Tensor> = inputs.iter().map(|input| input.shallow_clone()).collect();
    let Forward { outputs, saved } = {
        let _unrecorded = tch::no_grad_guard();
        forward(&given)?
    };
    let given = handles(&given);
    // SAFETY: `inputs` keeps the handles alive.
    if !unsafe { occlude_is_recorded(given.as_ptr(), given.len()) } {
        return Ok(outputs.iter().map(Tensor::detach).collect());
    }
    let (outgoing, kept) = (handles(&outputs), handles(&saved));
    let mut results = vec![std::ptr::null_mut(); outputs.len()];
    let context: *mut Backward = Box::into_raw(Box::new(Box::new(backward)));
    // SAFETY: four arrays with their lengths, of handles that live through the call. The context is the node's from here
    // on; it gives it to `call` until it gives it to `drop`, once.
    let good = unsafe {
        occlude_node(
            given.as_ptr(),
            given.len(),
            outgoing.as_ptr(),
            results.as_mut_ptr(),
            results.len(),
            kept.as_ptr(),
            kept.len(),
            call,
            drop_closure,
            context.cast(),
        )
    };
    checked(good, "an autograd node")?;
    // SAFETY: new handles, each owned by the one tensor that is made of it here.
    Ok(results.into_iter().map(|result| unsafe { Tensor::from_ptr(result) }).collect())
}

/// Goes backward from `outputs`, each with its gradient, into every leaf behind them: adds to its `.grad`, and its hook
/// fires. May be called in a node's backward, on a graph that was recorded there.
///
/// # Panics
/// Where there are more of one than of the other.
pub fn backward(outputs: &[Tensor], gradients: &[Tensor]) -> Result<()> {
    assert_eq!(outputs.len(), gradients.len(), "a gradient for each output");
    let [from, with] = [outputs, gradients].map(handles);
    // SAFETY: two arrays of `n` live handles.
    checked(unsafe { occlude_backward(from.as_ptr(), with.as_ptr(), from.len()) }, "a backward pass")
}

fn handles(tensors: &[Tensor]) -> Vec<*const C_tensor> {
    tensors.iter().map(Tensor::as_ptr).collect()
}

/// What libtorch's engine calls. A panic must not unwind through its frames: it becomes the reason of a failure.
extern "C" fn call(
    context: *const c_void,
    saved: *const *mut C_tensor,
    n_saved: usize,
    gradients: *const *mut C_tensor,
    n_gradients: usize,
    wanted: *const bool,
    out: *mut *mut C_tensor,
    n_inputs: usize,
) -> bool {
    // SAFETY: the node's context is the closure until it is dropped, and it is called only before.
    let backward = unsafe { &*context.cast::<Backward>() };
    // SAFETY: arrays with their lengths; of the tensors each handle is owned by the one made of it here; `out` is ours
    // alone.
    let (saved, gradients, wanted, out) = unsafe {
        let owned =
            |from: *const *mut C_tensor, n| -> Vec<Tensor> { (0..n).map(|i| Tensor::from_ptr(*from.add(i))).collect() };
        let wanted: Vec<bool> = (0..n_inputs).map(|i| *wanted.add(i)).collect();
        (owned(saved, n_saved), owned(gradients, n_gradients), wanted, out)
    };
    let answer = catch_unwind(AssertUnwindSafe(|| backward(&saved, &gradients, &wanted)))
        .unwrap_or_else(|panic| Err(Fault::failed(format!("a panic in a node's backward: {}", said(&panic)))))
        .and_then(|answer| match answer.len() == n_inputs {
            true => Ok(answer),
            false => Err(Fault::failed(format!(
                "a node's backward gave {} gradients; one for each of its {n_inputs} inputs is wanted, None included",
                answer.len()
            ))),
        });
    match answer {
        Ok(answer) => {
            for (i, gradient) in answer.into_iter().enumerate() {
                // The other side frees the handle.
                let handle = gradient.map_or(std::ptr::null(), |gradient| ManuallyDrop::new(gradient).as_ptr());
                // SAFETY: `out` has a place for each input.
                unsafe { *out.add(i) = handle.cast_mut() };
            }
            true
        }
        Err(fault) => {
            // SAFETY: a text with its length, which is copied.
            unsafe { occlude_refuse(fault.message.as_ptr().cast(), fault.message.len()) };
            false
        }
    }
}

/// The node lets go of its closure.
extern "C" fn drop_closure(context: *mut c_void) {
    // SAFETY: made by `Box::into_raw` in `node`, and given back once.
    let closure = unsafe { Box::from_raw(context.cast::<Backward>()) };
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| drop(closure))) {
        tracing::error!("a panic while a node's backward was dropped: {}", said(&panic));
    }
}

/// The text of a panic.
fn said(panic: &Box<dyn Any + Send>) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("it says nothing")
}
