//! How a training takes its steps: one at a time, the host looking at each; or ahead of the device, which decides by
//! itself, and whose outcomes are read one step late.
//!
//! Ahead, a step's samples lie where the steps before had theirs. They are copied from pinned memory to a place of their
//! own, on a stream of its own, while the device still computes the step before, and moved from there when their turn
//! comes. So the host has the time of a whole step to prepare the next one, and the device never waits for it.

use super::capture::{Graphs, Part};
use super::landing::Landing;
use super::step::{Counts, Outcome, Stepper};
use crate::bridge::copy;
use crate::bridge::cuda::{Entered, Event, Priority, Stream, synchronize};
use crate::bridge::record::scope;
use crate::data::order;
use crate::device::World;
use crate::fault::{Fault, Result};
use crate::feed::to_device;
use crate::method::Batch;
use crate::op::shuffle::Origin;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use tch::{Device, Kind, Tensor};

/// This rank's samples of one step.
pub struct Share {
    /// As [`Batch`] has them before it is heard, on the CPU or where the model is.
    pub pixels: Tensor,
    pub origins: Vec<Origin>,
    /// Ids of the captions [B, L], where the config reads captions; they lie where the pixels do.
    pub text: Option<Tensor>,
    /// Of each sample, how many rows show it, as [`Batch`] has it.
    pub valid: Option<Vec<u32>>,
    /// The run's seed.
    pub seed: u64,
    /// Samples that go through the model at a time.
    pub micro: usize,
}

impl Share {
    /// Cut into micro-batches on a device.
    pub fn batches(&self, device: Device) -> Result<Vec<Batch>> {
        let batch = |rows: Range<usize>| {
            let text = self.text.as_ref().map(|text| to_device(text, rows.clone(), device)).transpose()?;
            let valid = self.valid.as_ref().map(|valid| valid[rows.clone()].to_vec());
            let pixels = to_device(&self.pixels, rows.clone(), device)?;
            Ok(Batch::new(pixels, &self.origins[rows], self.seed).with_text(text).with_valid(valid))
        };
        self.cut().map(batch).collect()
    }

    fn cut(&self) -> impl Iterator<Item = Range<usize>> {
        let (rows, most) = (self.origins.len(), self.micro.max(1));
        (0..rows).step_by(most).map(move |first| first..(first + most).min(rows))
    }
}

/// How steps are taken.
pub enum Pace {
    /// The host looks at the losses and gradients of each step and decides.
    Watched,
    Ahead(Box<Ahead>),
}

impl Pace {
    /// Ahead on a GPU where the method allows it and it is `wanted`; rank 0 says why not.
    pub fn new(wanted: bool, global_batch: u64, stepper: &Stepper, world: &Arc<dyn World>) -> Result<Pace> {
        if !world.device().is_cuda() {
            return Ok(Pace::Watched);
        }
        let why = if wanted { stepper.method.capturable().err() } else { Some("train.graph is false") };
        match why {
            Some(why) => {
                if world.rank() == 0 {
                    tracing::info!("steps are not captured as CUDA graphs: {why}");
                }
                Ok(Pace::Watched)
            }
            None => Ok(Pace::Ahead(Box::new(Ahead::new(global_batch, stepper, world)?))),
        }
    }

    /// Takes a step. Returns what is known by now: its own outcome, or that of the step before if there is one.
    pub fn step(&mut self, stepper: &mut Stepper, share: &Share, lr: f64) -> Result<Option<Outcome>> {
        match self {
            Pace::Watched => {
                let batches = {
                    let _copy = scope("copy");
                    share.batches(stepper.flat.master.device())?
                };
                stepper.step(&batches, lr, |_, _| Ok(())).map(Some)
            }
            Pace::Ahead(ahead) => ahead.step(stepper, share, lr),
        }
    }

    /// The outcome that has not been told yet, if any, once it is there. Nothing is under way afterwards, and every rank
    /// can compute with the weights of the last step. Collective.
    pub fn settle(&mut self, stepper: &Stepper) -> Result<Option<Outcome>> {
        match self {
            Pace::Watched => Ok(None),
            Pace::Ahead(ahead) => ahead.settle(stepper),
        }
    }
}

/// Steps that are queued while the one before is computed. On a CPU, in tests, the same, but that nothing is captured.
pub struct Ahead {
    /// None on a CPU.
    gpu: Option<Gpu>,
    /// Samples of this rank's share, and what sums are divided by.
    samples: usize,
    counts: Counts,
    /// What changes from step to step beside the samples, f64 [3] on the device.
    rates: Tensor,
    /// Where a micro-batch of so many samples of so many frames lies.
    inputs: HashMap<[i64; 2], Batch>,
    /// The step before, not told yet: which of `slots` its numbers come to, and when they are there.
    late: Option<(usize, Option<Event>)>,
    /// Numbers on the host, f64, pinned for a GPU.
    slots: [Tensor; 2],
}

impl Ahead {
    /// For steps of this many samples over all ranks, as [`order::rows`] shares them out. On a GPU a stream of its own
    /// is this thread's current one from here on.
    pub fn new(global_batch: u64, stepper: &Stepper, world: &Arc<dyn World>) -> Result<Ahead> {
        let (rank, ranks, device) = (world.rank(), world.size(), world.device());
        let samples = |rank| order::rows(global_batch, rank, ranks).count();
        // Every rank knows every rank's share: nobody has to ask.
        let shares = (0..ranks).map(|rank| stepper.counts(samples(rank) as i64));
        let all = shares.reduce(|sum, own| sum.iter().zip(own).map(|(a, b)| a + b).collect()).expect("a rank");
        let counts = Counts { own: stepper.counts(samples(rank) as i64), all };
        let gpu = match device {
            Device::Cuda(index) => Some(Gpu::new(index, stepper, world)?),
            _ => None,
        };
        let slot = || -> Result<Tensor> {
            let slot = Tensor::f_zeros([stepper.told()], (Kind::Double, Device::Cpu))?;
            Ok(if gpu.is_some() { slot.f_pin_memory(device)? } else { slot })
        };
        let rates = Tensor::f_zeros([3], (Kind::Double, device))?;
        let (slots, inputs) = ([slot()?, slot()?], HashMap::new());
        Ok(Ahead { gpu, samples: samples(rank), counts, rates, inputs, late: None, slots })
    }

    /// As [`Pace::step`].
    pub fn step(&mut self, stepper: &mut Stepper, share: &Share, lr: f64) -> Result<Option<Outcome>> {
        if share.origins.len() != self.samples {
            let (got, wanted) = (share.origins.len(), self.samples);
            return Err(Fault::failed(format!("a step got {got} samples for this rank, whose share is {wanted}")));
        }
        let origins = Origin::table(&share.origins, Device::Cpu);
        let mut load = vec![Tensor::from_slice(&stepper.updater.rates(lr)), share.pixels.shallow_clone(), origins];
        load.extend(share.text.as_ref().map(Tensor::shallow_clone));
        if let Some(gpu) = &mut self.gpu {
            let _copy = scope("copy");
            load = gpu.landing.bring(load)?;
        }
        let mut load = load.into_iter();
        let [rates, pixels, origins] = std::array::from_fn(|_| load.next().expect("loaded above"));
        let whole = Batch { pixels, origins, text: load.next(), valid: None, seed: share.seed };
        copy(&self.rates, &rates)?;
        // What a step of another pace has sent on its way: graphs hold what they began themselves.
        stepper.buckets.gathered(stepper.deadline)?;
        stepper.begin()?;
        let mut cuts: Vec<Range<usize>> = share.cut().collect();
        if cuts.is_empty() {
            // A rank without samples has its part in the reduction all the same.
            cuts.push(0..0);
        }
        let (most, mut numbers) = (cuts.len(), None);
        for (index, rows) in cuts.iter().enumerate() {
            let last = index + 1 == most;
            self.lay(&whole, rows)?;
            if let (Some(gpu), true) = (&mut self.gpu, last) {
                gpu.landing.free()?;
            }
            let part = Part {
                size: [rows.len() as i64, whole.pixels.size()[2]],
                gathers: index == 0 && stepper.flat.shards.is_some(),
                last,
            };
            numbers = self.part(stepper, part)?;
        }
        let numbers = numbers.expect("the last part's");
        let slot = self.late.as_ref().map_or(0, |(slot, _)| 1 - slot);
        copy(&self.slots[slot], &numbers)?;
        let there = self.gpu.as_ref().map(Gpu::mark).transpose()?;
        let before = self.told(stepper)?;
        self.late = Some((slot, there));
        Ok(before)
    }

    /// Puts some of the samples where their part reads them.
    fn lay(&mut self, whole: &Batch, rows: &Range<usize>) -> Result<()> {
        if rows.is_empty() {
            return Ok(());
        }
        let part = whole.part(rows.clone())?;
        let place = |like: &Tensor| Tensor::empty(like.size().as_slice(), (like.kind(), self.rates.device()));
        // What is captured does the same whatever is padding.
        let fresh = || Batch {
            pixels: place(&part.pixels),
            origins: place(&part.origins),
            text: part.text.as_ref().map(place),
            valid: None,
            seed: part.seed,
        };
        let input = self.inputs.entry([rows.len() as i64, part.pixels.size()[2]]).or_insert_with(fresh);
        let [got, before] = [&part, &*input].map(described);
        if got != before {
            return Err(Fault::failed(format!(
                "a step got {got}, after {before}; ahead of the device they stay alike"
            )));
        }
        copy(&input.pixels, &part.pixels)?;
        copy(&input.origins, &part.origins)?;
        if let (Some(place), Some(text)) = (&input.text, &part.text) {
            copy(place, text)?;
        }
        Ok(())
    }

    /// Queues a part of the step; the last gives its numbers.
    fn part(&mut self, stepper: &mut Stepper, part: Part) -> Result<Option<Tensor>> {
        let _part = scope("part");
        let (input, counts, rates) = (self.inputs.get(&part.size), &self.counts, &self.rates);
        let mut body = || {
            if part.gathers {
                stepper.buckets.spread();
            }
            if let Some(input) = input {
                stepper.accumulate(input, counts, part.last)?;
            }
            if part.last {
                return stepper.conclude(rates).map(Some);
            }
            // A graph ends all that it began.
            stepper.buckets.gathered(stepper.deadline)?;
            Ok(None)
        };
        match &mut self.gpu {
            Some(gpu) => gpu.graphs.run(part, body),
            None => body(),
        }
    }

    /// As [`Pace::settle`].
    pub fn settle(&mut self, stepper: &Stepper) -> Result<Option<Outcome>> {
        let last = self.told(stepper)?;
        stepper.buckets.spread();
        stepper.buckets.gathered(stepper.deadline)?;
        Ok(last)
    }

    /// The outcome of the step before, once it is there.
    fn told(&mut self, stepper: &Stepper) -> Result<Option<Outcome>> {
        let Some((slot, there)) = self.late.take() else { return Ok(None) };
        if let Some(there) = there {
            there.synchronize()?;
        }
        let numbers = Vec::<f64>::try_from(&self.slots[slot])?;
        Ok(Some(stepper.outcome(&numbers, &self.counts)))
    }

    /// How many parts of a step have been captured as graphs.
    pub fn captured(&self) -> usize {
        self.gpu.as_ref().map_or(0, |gpu| gpu.graphs.captured())
    }
}

/// What of a batch must stay as it is from step to step.
fn described(batch: &Batch) -> String {
    let of = |tensor: &Tensor| format!("{:?} {:?}", tensor.size(), tensor.kind());
    let text = batch.text.as_ref().map_or(String::new(), |text| format!("captions {}, ", of(text)));
    format!("samples {}, {text}seed {}", of(&batch.pixels), batch.seed)
}

/// What a GPU has for steps ahead of it.
struct Gpu {
    graphs: Graphs,
    landing: Landing,
    /// Where the device computes, current while the last one lives.
    stream: Stream,
    _entered: Entered,
}

impl Gpu {
    fn new(index: usize, stepper: &Stepper, world: &Arc<dyn World>) -> Result<Gpu> {
        // What the model is made of was made on the stream that was current until now.
        synchronize(index)?;
        let stream = Stream::new(index, Priority::Normal)?;
        Ok(Gpu {
            _entered: stream.enter()?,
            graphs: Graphs::new(stream, world.clone(), stepper.deadline)?,
            landing: Landing::new(stream)?,
            stream,
        })
    }

    /// When all that is queued by now is done.
    fn mark(&self) -> Result<Event> {
        let mut event = Event::new()?;
        event.record(&self.stream)?;
        Ok(event)
    }
}
