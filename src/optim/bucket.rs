//! Gradients are reduced over ranks while backward goes on. A bucket is a run of the flat gradient; it starts on its way
//! when the last of its tensors has its gradient and all buckets before it have started, so that every rank starts them
//! in one order. What has not fired by the end of backward is flushed.

use super::flat::Flat;
use crate::bridge::Hooks;
use crate::device::{Channel, Pending, Reduce};
use crate::fault::Result;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use tch::Tensor;

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
    /// Each bucket's part of the flat gradient.
    parts: Vec<Tensor>,
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
    events: Vec<Event>,
}

impl Buckets {
    /// Buckets of at least `bytes` over the leaves of `flat`, reduced over `channel`.
    pub fn new(flat: &Flat, bytes: usize, channel: Box<dyn Channel>) -> Result<Buckets> {
        let (ranges, owner) = cut(flat, bytes / 4);
        let mut members = vec![0; ranges.len()];
        owner.iter().for_each(|&bucket| members[bucket] += 1);
        let part = |range: &Range<usize>| flat.gradient.narrow(0, range.start as i64, range.len() as i64);
        let state = Arc::new(Mutex::new(State {
            channel,
            parts: ranges.iter().map(part).collect(),
            used: vec![false; owner.len()],
            missing: members.clone(),
            owner,
            members,
            armed: false,
            pending: Vec::new(),
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
    }

    /// Before each backward pass: `last` says that no further one adds to these gradients.
    pub fn arm(&self, last: bool) {
        let mut state = lock(&self.state);
        state.armed = last;
        state.missing = state.members.clone();
    }

    /// After the last backward pass: starts what has not started, and waits for all. Afterwards every rank holds the
    /// sum.
    pub fn finish(&self, deadline: Duration) -> Result<()> {
        let pending = {
            let mut state = lock(&self.state);
            state.start(true);
            state.armed = false;
            std::mem::take(&mut state.pending)
        };
        for bucket in pending {
            let _ = bucket.wait(deadline)?;
        }
        Ok(())
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

impl State {
    fn fired(&mut self, tensor: usize) {
        self.used[tensor] = true;
        self.missing[self.owner[tensor]] -= 1;
        self.events.push(Event::Gradient(tensor));
        if self.armed {
            self.start(false);
        }
    }

    /// Starts the next buckets that are complete, or all that are left.
    fn start(&mut self, all: bool) {
        while self.pending.len() < self.parts.len() && (all || self.missing[self.pending.len()] == 0) {
            self.events.push(Event::Start(self.pending.len()));
            let bucket = self.channel.all_reduce(&self.parts[self.pending.len()], Reduce::Sum);
            self.pending.push(bucket);
        }
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().expect("no thread dies holding the buckets")
}

/// Runs of at least `least` elements along the buffer, and each tensor's run.
fn cut(flat: &Flat, least: usize) -> (Vec<Range<usize>>, Vec<usize>) {
    let mut order: Vec<usize> = (0..flat.places.len()).collect();
    order.sort_by_key(|&tensor| flat.places[tensor].start);
    let mut owner = vec![0; order.len()];
    let mut ranges: Vec<Range<usize>> = Vec::new();
    let mut begin = 0;
    for (at, &tensor) in order.iter().enumerate() {
        owner[tensor] = ranges.len();
        let end = flat.places[tensor].end;
        if end - begin >= least || at + 1 == order.len() {
            ranges.push(begin..end);
            begin = order.get(at + 1).map_or(end, |&next| flat.places[next].start);
        }
    }
    (ranges, owner)
}
