//! Parts of a model of which nothing is kept for backward but what flows into them: there they run once more (Chen, Xu,
//! Zhang and Guestrin, "Training deep nets with sublinear memory cost", 2016).

use crate::bridge::{self, Forward, node};
use crate::fault::Result;
use crate::part::weights::Weights;
use std::sync::{Arc, Mutex, PoisonError};
use tch::Tensor;

/// Handles of a model's leaves, for what runs again in backward.
#[derive(Clone)]
pub struct Leaves(Arc<Mutex<Weights>>);

impl Leaves {
    pub fn of(w: &Weights) -> Leaves {
        Leaves(Arc::new(Mutex::new(Weights::new(w.0.iter().map(Tensor::shallow_clone).collect()))))
    }
}

/// Runs a part that keeps its inputs alone. Backward runs it again, recorded, and goes back through that at once: into
/// the leaves, whose hooks fire as they would have, and into the inputs. What it reads `beside` them has no gradient.
pub fn again<S: Send + 'static>(
    w: &Weights,
    leaves: &Leaves,
    beside: S,
    inputs: &[Tensor],
    run: impl Fn(&Weights, &S, &[Tensor]) -> Result<Vec<Tensor>> + Send + Sync + 'static,
) -> Result<Vec<Tensor>> {
    let part = Arc::new((run, Mutex::new(beside)));
    let (first, leaves) = (part.clone(), leaves.clone());
    let forward = move |given: &[Tensor]| {
        let (run, beside) = &*first;
        let outputs = run(w, &held(beside), given)?;
        Ok(Forward { outputs, saved: given.iter().map(Tensor::shallow_clone).collect() })
    };
    let backward = move |saved: &[Tensor], gradients: &[Tensor], wanted: &[bool]| {
        let inputs: Vec<Tensor> =
            saved.iter().zip(wanted).map(|(input, wanted)| input.detach().set_requires_grad(*wanted)).collect();
        let outputs = {
            let (run, beside) = &*part;
            let (w, beside) = (held(&leaves.0), held(beside));
            tch::with_grad(|| run(&w, &beside, &inputs))?
        };
        bridge::backward(&outputs, gradients)?;
        Ok(inputs.iter().zip(wanted).map(|(input, wanted)| wanted.then(|| input.grad())).collect())
    };
    node(&inputs.iter().collect::<Vec<_>>(), forward, backward)
}

fn held<T>(of: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}
