//! Flat buffers from the first day: fp32 master weights, weights in the compute dtype (the same storage in fp32) and fp32
//! gradients; beside them the two moments. Every tensor lies on a 256-byte boundary, in reverse order of use, so that
//! gradients fill the buffer from its front while backward goes on.
//!
//! Weights and gradients are whole on every rank, [L]. Master weights, moments and the summed gradient are what this rank
//! updates, [K]: all of it, or a share where the optimizer is sharded.

use super::layout::{ALIGN, Shards, lay_out};
use crate::bridge;
use crate::fault::Result;
use crate::part::weights::{Spec, Table, Weights};
use std::ops::Range;
use tch::{Device, Kind, Tensor, no_grad};

pub struct Flat {
    pub specs: Vec<Spec>,
    /// Each tensor's place in the whole buffers, in the table's order.
    pub places: Vec<Range<usize>>,
    /// The place of what this rank keeps of it: the same, or where the optimizer is sharded a part, maybe an empty one.
    pub kept: Vec<Range<usize>>,
    /// Which parts ranks keep, where the optimizer is sharded.
    pub shards: Option<Shards>,
    /// The compute dtype [L].
    pub compute: Tensor,
    /// fp32 [L]; the leaves' `.grad` are views of it, zeroed in place and never undefined.
    pub gradient: Tensor,
    /// fp32 [K].
    pub master: Tensor,
    /// The master weights in the compute dtype [K]: their own storage where that is fp32, that of `compute` unless sharded.
    pub narrowed: Tensor,
    /// The gradient once it is summed over ranks, fp32 [K]: the storage of `gradient` unless sharded.
    pub summed: Tensor,
    /// AdamW's moments, fp32 [K].
    pub first: Tensor,
    pub second: Tensor,
    /// How often each tensor has moved, fp32 [n].
    pub steps: Tensor,
    /// The leaves that a method computes with: views of `compute`.
    pub leaves: Weights,
}

impl Flat {
    /// Buffers for a table, with first values drawn from `seed`; this rank keeps all of them.
    pub fn new(table: &Table, seed: u64, kind: Kind, device: Device) -> Result<Flat> {
        let (places, cut) = lay_out(table.specs(), usize::MAX, ALIGN);
        Self::build(table, seed, (kind, device), places, cut.length(), None)
    }

    /// The same as rank `rank` of `ranks`, of which each keeps its share of every bucket of at least `bytes`.
    pub fn sharded(
        table: &Table,
        seed: u64,
        (kind, device): (Kind, Device),
        bytes: usize,
        (rank, ranks): (usize, usize),
    ) -> Result<Flat> {
        let (places, cut) = lay_out(table.specs(), bytes / 4, ALIGN * ranks);
        let length = cut.length();
        Self::build(table, seed, (kind, device), places, length, Some(Shards { cut, rank, ranks }))
    }

    fn build(
        table: &Table,
        seed: u64,
        (kind, device): (Kind, Device),
        places: Vec<Range<usize>>,
        length: usize,
        shards: Option<Shards>,
    ) -> Result<Flat> {
        let specs = table.specs().to_vec();
        let zeros = |length: usize, kind| Tensor::zeros([length as i64], (kind, device));
        let share = shards.as_ref().map_or(length, |shards| length / shards.ranks);
        let (master, gradient) = (zeros(share, Kind::Float), zeros(length, Kind::Float));
        let own = |kind| if kind == Kind::Float { master.shallow_clone() } else { zeros(share, kind) };
        let (narrowed, summed) = (own(kind), shards.as_ref().map(|_| zeros(share, Kind::Float)));
        let compute = if shards.is_some() { zeros(length, kind) } else { narrowed.shallow_clone() };
        let mut leaves = Vec::with_capacity(specs.len());
        for (spec, place) in specs.iter().zip(&places) {
            let leaf = view(&compute, place, &spec.shape).detach().set_requires_grad(true);
            bridge::set_gradient(&leaf, &view(&gradient, place, &spec.shape))?;
            leaves.push(leaf);
        }
        let piece = |(index, place): (usize, &Range<usize>)| match &shards {
            Some(shards) => shards.piece(index, place),
            None => place.clone(),
        };
        let mut flat = Flat {
            kept: places.iter().enumerate().map(piece).collect(),
            steps: zeros(specs.len(), Kind::Float),
            first: zeros(share, Kind::Float),
            second: zeros(share, Kind::Float),
            summed: summed.unwrap_or_else(|| gradient.shallow_clone()),
            leaves: Weights::new(leaves),
            specs,
            places,
            shards,
            master,
            compute,
            narrowed,
            gradient,
        };
        for index in 0..flat.specs.len() {
            let spec = &flat.specs[index];
            flat.begin(index, &Tensor::from_slice(&spec.draw(seed)).view(spec.shape.as_slice()));
        }
        flat.refresh();
        Ok(flat)
    }

    /// One tensor's part of a whole buffer [L], in its shape.
    pub fn part(&self, buffer: &Tensor, index: usize) -> Tensor {
        view(buffer, &self.places[index], &self.specs[index].shape)
    }

    /// What this rank keeps of a tensor, in a buffer [K] of such: one dimension, maybe no element.
    pub fn piece(&self, buffer: &Tensor, index: usize) -> Tensor {
        let Range { start, end } = self.kept[index];
        buffer.narrow(0, start as i64, (end - start) as i64)
    }

    /// Puts this rank's piece of a whole tensor into a buffer [K].
    pub fn keep(&self, buffer: &Tensor, index: usize, whole: &Tensor) {
        let mut piece = self.piece(buffer, index);
        let before = self
            .shards
            .as_ref()
            .map_or(0, |shards| shards.own(shards.cut.owner[index]).start.saturating_sub(self.places[index].start));
        if piece.numel() > 0 {
            no_grad(|| piece.copy_(&whole.reshape(-1).narrow(0, before as i64, piece.size()[0])));
        }
    }

    /// Gives a tensor its value: to the piece of the master weights and to the whole that is computed with. Comes before a
    /// [`refresh`](Self::refresh).
    pub fn begin(&self, index: usize, whole: &Tensor) {
        self.keep(&self.master, index, whole);
        no_grad(|| self.part(&self.compute, index).copy_(whole));
    }

    /// The table's tensors as views of a whole buffer, without gradients: the weights, say, or a teacher's.
    pub fn weights(&self, buffer: &Tensor) -> Weights {
        Weights::new((0..self.specs.len()).map(|index| self.part(buffer, index)).collect())
    }

    /// Brings the compute weights, of what is kept, up to the master weights.
    pub fn refresh(&mut self) {
        if self.narrowed.kind() != Kind::Float {
            no_grad(|| self.narrowed.copy_(&self.master));
        }
    }

    pub fn zero_gradient(&mut self) {
        let _ = self.gradient.zero_();
    }
}

fn view(buffer: &Tensor, place: &Range<usize>, shape: &[i64]) -> Tensor {
    buffer.narrow(0, place.start as i64, place.len() as i64).view(shape)
}
