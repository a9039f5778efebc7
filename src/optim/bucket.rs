//! Gradients are reduced over ranks while backward goes on. A bucket is a run of the flat gradient; it starts on its way
//! when the last of its tensors has its gradient and all buckets before it have started, so that every rank starts them
//! in one order. What has not fired by the end of backward is flushed.
//!
//! Where the optimizer is sharded each rank receives the sum of what it keeps. The updated weights are gathered while the
//! next forward goes on: a bucket is waited for when the first of its tensors is used.

use super::flat::Flat;
use super::layout::{ALIGN, Cut, lay_out};
use crate::bridge::Hooks;
use crate::device::{Channel, Pending, Reduce};
use crate::fault::{Fault, Result};
use crate::op::square_sum::square_sum;
use crate::part::weights::Weights;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};
use tch::{Kind, Tensor, no_grad};

/// How gradients travel.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Wire {
    /// The least size of a bucket, counted in fp32. A sharded flat buffer has been cut before.
    pub bytes: usize,
    /// fp32 or bf16. In bf16 each rank's gradient is rounded before it is summed, and the sum once more.
    pub kind: Kind,
}

impl From<usize> for Wire {
    /// Buckets of at least so many bytes, in fp32.
    fn from(bytes: usize) -> Wire {
        Wire { bytes, kind: Kind::Float }
    }
}

/// What happened in the last step, in order: for tests and for people who look where time goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A tensor's gradient exists.
    Gradient(usize),
    /// A bucket started.
    Start(usize),
}

pub struct Buckets {
    state: Arc<Mutex<State>>,
    _hooks: Hooks,
}

struct State {
    channel: Box<dyn Channel>,
    parts: Vec<Part>,
    /// Each rank receives what it keeps of a sum, not all of it.
    sharded: bool,
    /// Which bucket a tensor belongs to.
    owner: Vec<usize>,
    /// How many tensors each bucket has.
    members: Vec<usize>,
    /// How many of them still miss their gradient in this pass.
    missing: Vec<usize>,
    /// Whether each tensor has received a gradient in this step.
    used: Vec<bool>,
    /// Reduce in this pass; not while gradients still accumulate.
    armed: bool,
    pending: Vec<Pending>,
    /// Whole weights under way, by bucket.
    coming: Vec<Option<Pending>>,
    /// How long computing has waited for them since `begin`, and what went wrong.
    waited: Duration,
    lost: Option<Fault>,
    events: Vec<Event>,
}

/// One bucket's part of each buffer.
struct Part {
    gradient: Tensor,
    /// What travels in its place, where that is of another dtype.
    staged: Option<Tensor>,
    /// Where the sum goes.
    summed: Tensor,
    /// What this rank keeps of the weights, and the whole.
    narrowed: Tensor,
    compute: Tensor,
}

impl Part {
    fn of(flat: &Flat, wire: Wire, cut: &Cut, bucket: usize) -> Part {
        let narrow = |buffer: &Tensor, range: &Range<usize>| buffer.narrow(0, range.start as i64, range.len() as i64);
        let whole = &cut.buckets[bucket];
        let kept = flat.shards.as_ref().map_or(whole.clone(), |shards| shards.kept(bucket));
        let gradient = narrow(&flat.gradient, whole);
        Part {
            staged: (wire.kind != Kind::Float).then(|| gradient.to_kind(wire.kind)),
            summed: narrow(&flat.summed, &kept),
            narrowed: narrow(&flat.narrowed, &kept),
            // What arrives amid a forward is no change behind the back of what that has kept of other tensors.
            compute: narrow(&flat.compute.data(), whole),
            gradient,
        }
    }
}

impl Buckets {
    /// Buckets over the leaves of `flat`, reduced over `channel`.
    pub fn new(flat: &Flat, wire: impl Into<Wire>, channel: Box<dyn Channel>) -> Result<Buckets> {
        let wire = wire.into();
        let cut = match &flat.shards {
            Some(shards) => shards.cut.clone(),
            None => lay_out(&flat.specs, wire.bytes / 4, ALIGN).1,
        };
        let mut members = vec![0; cut.buckets.len()];
        cut.owner.iter().for_each(|&bucket| members[bucket] += 1);
        let state = Arc::new(Mutex::new(State {
            channel,
            parts: (0..cut.buckets.len()).map(|bucket| Part::of(flat, wire, &cut, bucket)).collect(),
            sharded: flat.shards.is_some(),
            used: vec![false; cut.owner.len()],
            missing: members.clone(),
            owner: cut.owner,
            members,
            armed: false,
            pending: Vec::new(),
            coming: Vec::new(),
            waited: Duration::ZERO,
            lost: None,
            events: Vec::new(),
        }));
        let seen = state.clone();
        let hooks = Hooks::set(&flat.leaves.0, move |tensor| lock(&seen).fired(tensor))?;
        Ok(Buckets { state, _hooks: hooks })
    }

    /// Before the first backward pass of a step.
    pub fn begin(&self) {
        let mut state = lock(&self.state);
        state.used.fill(false);
        state.events.clear();
        state.waited = Duration::ZERO;
    }

    /// Before each backward pass: `last` says that no further one adds to these gradients.
    pub fn arm(&self, last: bool) {
        let mut state = lock(&self.state);
        state.armed = last;
        state.missing = state.members.clone();
    }

    /// After the last backward pass: starts what has not started, and waits for all. Afterwards every rank holds the
    /// sum of what it keeps.
    pub fn finish(&self, deadline: Duration) -> Result<()> {
        let (pending, landing) = {
            let mut state = lock(&self.state);
            state.start(true);
            state.armed = false;
            (std::mem::take(&mut state.pending), state.landing())
        };
        for (bucket, target) in pending.into_iter().zip(landing) {
            let sum = bucket.wait(deadline)?;
            if let Some(mut target) = target {
                no_grad(|| target.copy_(&sum));
            }
        }
        Ok(())
    }

    /// The squared norm of the summed gradient over all ranks, where each keeps a share; fp32 [] on the buffers' device,
    /// not finite if any value is not.
    pub fn square_sum(&self, flat: &Flat, deadline: Duration) -> Result<Tensor> {
        let own = square_sum(&flat.summed)?;
        let mut state = lock(&self.state);
        if !state.sharded {
            return Ok(own);
        }
        let all = state.channel.all_reduce(&own.to_kind(Kind::Double), Reduce::Sum).wait(deadline)?;
        Ok(all.to_kind(Kind::Float))
    }

    /// After an update: starts to bring the weights that each rank keeps to all ranks, in the order in which the next
    /// forward uses them. Does nothing unless the optimizer is sharded.
    pub fn spread(&self) {
        let state = &mut *lock(&self.state);
        if state.sharded {
            let gather = |part: &Part| Some(state.channel.all_gather(&part.narrowed));
            state.coming = state.parts.iter().rev().map(gather).collect();
            state.coming.reverse();
        }
    }

    /// What a method that computes with the leaves calls before it uses one: waits until its bucket has come, for
    /// `deadline` at most. A fault is kept for [`gathered`](Self::gathered).
    pub fn arrival(&self, deadline: Duration) -> impl Fn(usize) + Send + Sync + 'static {
        let state = self.state.clone();
        move |tensor| {
            let mut state = lock(&state);
            let bucket = state.owner[tensor];
            state.arrive(bucket, deadline);
        }
    }

    /// Waits until all weights under way have come.
    pub fn gathered(&self, deadline: Duration) -> Result<()> {
        let mut state = lock(&self.state);
        (0..state.coming.len()).rev().for_each(|bucket| state.arrive(bucket, deadline));
        state.lost.take().map_or(Ok(()), Err)
    }

    /// How long computing has waited for weights since `begin`.
    pub fn waited(&self) -> Duration {
        lock(&self.state).waited
    }

    /// Calls `with` for every tensor of a buffer [K] of what ranks keep (the weights, a moment), whole, in the table's
    /// order. Where the optimizer is sharded this is collective, and no more than a bucket is gathered at a time.
    pub fn whole(
        &self,
        flat: &Flat,
        buffer: &Tensor,
        deadline: Duration,
        mut with: impl FnMut(usize, &Tensor) -> Result<()>,
    ) -> Result<()> {
        let tensors = 0..flat.specs.len();
        let Some(shards) = &flat.shards else {
            return tensors.into_iter().try_for_each(|index| with(index, &flat.part(buffer, index)));
        };
        for (bucket, range) in shards.cut.buckets.iter().enumerate().rev() {
            let kept = shards.kept(bucket);
            let own = buffer.narrow(0, kept.start as i64, kept.len() as i64);
            let gathering = lock(&self.state).channel.all_gather(&own);
            let all = gathering.wait(deadline)?.view(-1);
            for index in tensors.clone().filter(|&index| shards.cut.owner[index] == bucket) {
                let (place, spec) = (&flat.places[index], &flat.specs[index]);
                let whole = all.narrow(0, (place.start - range.start) as i64, place.len() as i64);
                with(index, &whole.view(spec.shape.as_slice()))?;
            }
        }
        Ok(())
    }

    /// The weights in fp32 as one rank has them by itself: the master weights, or where other ranks keep some of those,
    /// what is computed with.
    pub fn weights(&self, flat: &Flat, deadline: Duration) -> Result<Weights> {
        if flat.shards.is_none() {
            return Ok(flat.weights(&flat.master));
        }
        self.gathered(deadline)?;
        Ok(flat.weights(&flat.compute.to_kind(Kind::Float)))
    }

    /// Which tensors received a gradient since `begin`, on this rank.
    pub fn used(&self) -> Vec<bool> {
        lock(&self.state).used.clone()
    }

    /// What happened since `begin`.
    pub fn events(&self) -> Vec<Event> {
        lock(&self.state).events.clone()
    }
}

impl Drop for Buckets {
    /// Weights that come nowhere any more are sent nevertheless, for other ranks may wait for them.
    fn drop(&mut self) {
        // Whoever is lost has been told of elsewhere.
        let _ = self.gathered(Duration::from_secs(5));
    }
}

impl State {
    fn fired(&mut self, tensor: usize) {
        self.used[tensor] = true;
        self.missing[self.owner[tensor]] -= 1;
        self.events.push(Event::Gradient(tensor));
        if self.armed {
            self.start(false);
        }
    }

    /// Brings a bucket of weights to its place, if it is under way.
    fn arrive(&mut self, bucket: usize, deadline: Duration) {
        let Some(coming) = self.coming.get_mut(bucket).and_then(Option::take) else { return };
        let began = Instant::now();
        match coming.wait(deadline) {
            Ok(all) => no_grad(|| self.parts[bucket].compute.copy_(&all.view(-1))),
            Err(fault) => self.lost = self.lost.take().or(Some(fault)),
        }
        self.waited += began.elapsed();
    }

    /// Starts the next buckets that are complete, or all that are left.
    fn start(&mut self, all: bool) {
        while self.pending.len() < self.parts.len() && (all || self.missing[self.pending.len()] == 0) {
            self.events.push(Event::Start(self.pending.len()));
            let part = &mut self.parts[self.pending.len()];
            let travels = match &mut part.staged {
                None => &part.gradient,
                Some(staged) => {
                    no_grad(|| staged.copy_(&part.gradient));
                    &*staged
                }
            };
            self.pending.push(match self.sharded {
                true => self.channel.reduce_scatter(travels),
                false => self.channel.all_reduce(travels, Reduce::Sum),
            });
        }
    }

    /// Where each sum is brought to, if it does not arise there.
    fn landing(&self) -> Vec<Option<Tensor>> {
        let elsewhere = |part: &Part| self.sharded || part.staged.is_some();
        self.parts.iter().map(|part| elsewhere(part).then(|| part.summed.shallow_clone())).collect()
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().expect("no thread dies holding the buckets")
}
