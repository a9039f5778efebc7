//! Activation checkpointing (Chen, Xu, Zhang and Guestrin, "Training deep nets with sublinear memory cost", 2016): a
//! part of a model keeps only its inputs and is recomputed in backward.

use crate::bridge::{self, ForwardOutput, apply_function};
use crate::error::Result;
use crate::part::params::Weights;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tch::Tensor;

/// Handles of a model's leaf tensors, for the recomputation in backward.
#[derive(Clone)]
pub struct Leaves(Arc<Mutex<Weights>>);

impl Leaves {
    /// Shares the tensors of `w`, without its hook.
    pub fn new(w: &Weights) -> Leaves {
        Leaves(Arc::new(Mutex::new(Weights::new(w.0.iter().map(Tensor::shallow_clone).collect()))))
    }
}

/// Runs a part of a model and keeps only its inputs. Backward runs the part again with gradients and immediately
/// propagates through it: into the leaves, whose hooks fire as usual, and into the inputs. `constants` are values that
/// the part reads besides its inputs; they have no gradient.
pub fn recompute_in_backward<S: Send + 'static>(
    w: &Weights,
    leaves: &Leaves,
    constants: S,
    inputs: &[Tensor],
    run: impl Fn(&Weights, &S, &[Tensor]) -> Result<Vec<Tensor>> + Send + Sync + 'static,
) -> Result<Vec<Tensor>> {
    let part = Arc::new((run, Mutex::new(constants)));
    let forward_part = part.clone();
    let leaves = leaves.clone();
    let forward = move |inputs: &[Tensor]| {
        let (run, constants) = &*forward_part;
        let outputs = run(w, &lock(constants), inputs)?;
        Ok(ForwardOutput { outputs, saved: inputs.iter().map(Tensor::shallow_clone).collect() })
    };
    let backward = move |saved: &[Tensor], gradients: &[Tensor], needed: &[bool]| {
        let inputs: Vec<Tensor> =
            saved.iter().zip(needed).map(|(input, needed)| input.detach().set_requires_grad(*needed)).collect();
        let outputs = {
            let (run, constants) = &*part;
            let w = lock(&leaves.0);
            let constants = lock(constants);
            tch::with_grad(|| run(&w, &constants, &inputs))?
        };
        bridge::backward(&outputs, gradients)?;
        Ok(inputs.iter().zip(needed).map(|(input, needed)| needed.then(|| input.grad())).collect())
    };
    apply_function(&inputs.iter().collect::<Vec<_>>(), forward, backward)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
