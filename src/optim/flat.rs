//! Three flat buffers from the first day: fp32 master weights, weights in the compute dtype (the same storage in fp32)
//! and fp32 gradients; beside them the two moments. Every tensor lies on a 256-byte boundary, in reverse order of use, so
//! that gradients fill the buffer from its front while backward goes on.

use crate::bridge;
use crate::fault::Result;
use crate::part::weights::{Spec, Table, Weights};
use std::ops::Range;
use tch::{Device, Kind, Tensor, no_grad};

/// Elements; 256 bytes in the narrowest compute dtype (bf16).
const ALIGN: usize = 128;

pub struct Flat {
    pub specs: Vec<Spec>,
    /// Each tensor's place in the buffers, in the table's order.
    pub places: Vec<Range<usize>>,
    /// fp32 [L].
    pub master: Tensor,
    /// The compute dtype [L]; the storage of `master` when that is fp32.
    pub compute: Tensor,
    /// fp32 [L]; the leaves' `.grad` are views of it, zeroed in place and never undefined.
    pub gradient: Tensor,
    /// AdamW's moments, fp32 [L].
    pub first: Tensor,
    pub second: Tensor,
    /// How often each tensor has moved, fp32 [n].
    pub steps: Tensor,
    /// The leaves that a method computes with: views of `compute`.
    pub leaves: Weights,
}

impl Flat {
    /// Buffers for a table, with first values drawn from `seed`.
    pub fn new(table: &Table, seed: u64, kind: Kind, device: Device) -> Result<Flat> {
        let specs = table.specs().to_vec();
        let (places, length) = lay_out(&specs);
        let zeros = || Tensor::zeros([length as i64], (Kind::Float, device));
        let master = zeros();
        let compute = if kind == Kind::Float { master.shallow_clone() } else { master.to_kind(kind) };
        let gradient = zeros();
        let mut leaves = Vec::with_capacity(specs.len());
        for (spec, place) in specs.iter().zip(&places) {
            view(&master, place, &spec.shape).copy_(&Tensor::from_slice(&spec.draw(seed)).view(spec.shape.as_slice()));
            let leaf = view(&compute, place, &spec.shape).detach().set_requires_grad(true);
            bridge::set_gradient(&leaf, &view(&gradient, place, &spec.shape))?;
            leaves.push(leaf);
        }
        let mut flat = Flat {
            steps: Tensor::zeros([specs.len() as i64], (Kind::Float, device)),
            first: zeros(),
            second: zeros(),
            leaves: Weights(leaves),
            specs,
            places,
            master,
            compute,
            gradient,
        };
        flat.refresh();
        Ok(flat)
    }

    /// One tensor's part of a buffer, in its shape.
    pub fn part(&self, buffer: &Tensor, index: usize) -> Tensor {
        view(buffer, &self.places[index], &self.specs[index].shape)
    }

    /// The table's tensors as views of a buffer, without gradients: the master weights, say, or their moving average.
    pub fn weights(&self, buffer: &Tensor) -> Weights {
        Weights((0..self.specs.len()).map(|index| self.part(buffer, index)).collect())
    }

    /// Brings the compute weights up to the master weights.
    pub fn refresh(&mut self) {
        if self.compute.kind() != Kind::Float {
            no_grad(|| self.compute.copy_(&self.master));
        }
    }

    pub fn zero_gradient(&mut self) {
        let _ = self.gradient.zero_();
    }
}

fn view(buffer: &Tensor, place: &Range<usize>, shape: &[i64]) -> Tensor {
    buffer.narrow(0, place.start as i64, place.len() as i64).view(shape)
}

/// Each tensor's range, last used first, and the length of the buffers.
fn lay_out(specs: &[Spec]) -> (Vec<Range<usize>>, usize) {
    let mut places = vec![0..0; specs.len()];
    let mut at = 0;
    for (spec, place) in specs.iter().zip(&mut places).rev() {
        *place = at..at + spec.numel();
        at = place.end.next_multiple_of(ALIGN);
    }
    (places, at)
}
