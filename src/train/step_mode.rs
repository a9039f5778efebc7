//! How a training takes its steps: synchronously, the host reading each outcome; or pipelined, where the device decides
//! by itself and outcomes are read one step late.
//!
//! Pipelined, a step's samples are in the same memory at every step. They are copied from pinned memory into a staging
//! buffer, on a stream of its own, while the device still computes the step before, and from there into place when
//! their turn comes. So the host has the time of a whole step to prepare the next one, and the device never waits for
//! it.

use super::capture::{GraphCache, StepPart};
use super::controls::StepRates;
use super::outcome::Outcome;
use super::staging::InputStaging;
use super::step::Stepper;
use crate::bridge::copy_non_blocking;
use crate::bridge::cuda::{Event, Priority, Stream, StreamGuard, synchronize};
use crate::bridge::record::scope;
use crate::data::order;
use crate::dist::World;
use crate::error::{Error, Result};
use crate::method::{Batch, Method};
use crate::op::shuffle::SampleKey;
use crate::part::batch::{Side, to_device};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ops::Range;
use std::sync::Arc;
use tch::{Device, Kind, Tensor};

/// This rank's samples of one step.
#[derive(Debug, Default)]
pub struct LocalBatch {
    /// Views as in [`Batch`], on the CPU or on the device of the model.
    pub views: Vec<Tensor>,
    pub keys: Vec<SampleKey>,
    pub side: Side,
    /// The run's seed.
    pub seed: u64,
    /// Samples that go through the model at a time.
    pub micro_batch: usize,
}

impl LocalBatch {
    /// Cuts the samples into micro-batches on a device.
    pub fn micro_batches(&self, device: Device) -> Result<Vec<Batch>> {
        self.micro_batch_ranges().map(|rows| self.to_batch(rows, device)).collect()
    }

    fn to_batch(&self, rows: Range<usize>, device: Device) -> Result<Batch> {
        let views = self.views.iter().map(|view| to_device(view, rows.clone(), device));
        Ok(Batch {
            views: views.collect::<Result<_>>()?,
            side: self.side.to_device(rows.clone(), device)?,
            keys: SampleKey::stack(&self.keys[rows], device),
            seed: self.seed,
        })
    }

    /// All samples as one batch where they are, keys on the host.
    fn to_whole_batch(&self) -> Result<Batch> {
        Ok(Batch {
            views: self.views.iter().map(Tensor::shallow_clone).collect(),
            side: self.side.slice(0..self.keys.len())?,
            keys: SampleKey::stack(&self.keys, Device::Cpu),
            seed: self.seed,
        })
    }

    fn micro_batch_ranges(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let rows = self.keys.len();
        let size = self.micro_batch.max(1);
        (0..rows).step_by(size).map(move |first| first..(first + size).min(rows))
    }
}

/// How steps are taken.
pub enum StepMode {
    /// The host looks at the losses and gradients of each step and decides.
    Synchronous,
    Pipelined(Box<StepPipeline>),
}

/// Says whether a method's steps can be captured as CUDA graphs, or why not.
pub fn can_capture(method: &dyn Method, world: &dyn World) -> Result<(), &'static str> {
    let capabilities = method.capabilities();
    if let Some(reason) = capabilities.not_capturable {
        return Err(reason);
    }
    if capabilities.gathers && world.size() > 1 {
        // Backward would fork the captured stream from the autograd engine's thread and wait there.
        return Err("the loss gathers features from all ranks, which has not been shown to work within a graph");
    }
    method.mask().map_or(Ok(()), |mask| mask.can_capture(&method.model().patchify().grid))
}

impl StepMode {
    /// Pipelined on a GPU where the method allows it and it is `wanted`; rank 0 logs why not.
    pub fn new(wanted: bool, global_batch: u64, stepper: &Stepper, world: &Arc<dyn World>) -> Result<StepMode> {
        if !world.device().is_cuda() {
            return Ok(StepMode::Synchronous);
        }
        let capture = if wanted {
            can_capture(stepper.method.as_ref(), world.as_ref())
        } else {
            Err("train.cuda_graph is false")
        };
        if let Err(reason) = capture {
            if world.rank() == 0 {
                tracing::info!("steps are not captured as CUDA graphs: {reason}");
            }
            return Ok(StepMode::Synchronous);
        }
        Ok(StepMode::Pipelined(Box::new(StepPipeline::new(global_batch, stepper, world)?)))
    }

    /// Takes a step. Returns the outcome that is known by now: the step's own, or that of the step before if there is
    /// one.
    pub fn step(
        &mut self,
        stepper: &mut Stepper,
        local: &LocalBatch,
        rates: impl Into<StepRates>,
    ) -> Result<Option<Outcome>> {
        match self {
            StepMode::Synchronous => {
                let batches = {
                    let _scope = scope("copy");
                    local.micro_batches(stepper.flat.master.device())?
                };
                stepper.step(&batches, rates, |_, _| Ok(())).map(Some)
            }
            StepMode::Pipelined(pipeline) => pipeline.step(stepper, local, rates),
        }
    }

    /// Waits for the outcome that has not been returned yet, if any. Afterwards nothing is in flight, and every rank
    /// can compute with the weights of the last step. Collective.
    pub fn flush(&mut self, stepper: &Stepper) -> Result<Option<Outcome>> {
        match self {
            StepMode::Synchronous => Ok(None),
            StepMode::Pipelined(pipeline) => pipeline.flush(stepper),
        }
    }
}

/// Steps that are queued while the one before is computed. On a CPU, in tests, the same without capture.
pub struct StepPipeline {
    /// None on a CPU.
    gpu: Option<GpuPipeline>,
    /// Samples of this rank in a step.
    samples: usize,
    /// Samples of all ranks per sample of this one.
    global_per_local: f64,
    /// The static inputs of a micro-batch, by its number of samples and of their frames.
    inputs: HashMap<[i64; 2], Batch>,
    /// The step before: which of `report_slots` its numbers come to, and when they are there.
    in_flight: Option<(usize, Option<Event>)>,
    /// Reports on the host, f64, pinned for a GPU.
    report_slots: [Tensor; 2],
}

impl StepPipeline {
    /// For steps of this many samples over all ranks, as [`order::rank_rows`] divides them. On a GPU a stream of its
    /// own is this thread's current one from here on.
    pub fn new(global_batch: u64, stepper: &Stepper, world: &Arc<dyn World>) -> Result<StepPipeline> {
        let device = world.device();
        let samples = order::rank_rows(global_batch, world.rank(), world.size()).count();
        let gpu = match device {
            Device::Cuda(index) => Some(GpuPipeline::new(index, stepper, world)?),
            _ => None,
        };
        let slot = || -> Result<Tensor> {
            let slot = Tensor::f_zeros([stepper.report_len()], (Kind::Double, Device::Cpu))?;
            Ok(if gpu.is_some() { slot.f_pin_memory(device)? } else { slot })
        };
        let report_slots = [slot()?, slot()?];
        Ok(StepPipeline {
            gpu,
            samples,
            global_per_local: global_batch as f64 / samples.max(1) as f64,
            inputs: HashMap::new(),
            in_flight: None,
            report_slots,
        })
    }

    /// Implements [`StepMode::step`].
    pub fn step(
        &mut self,
        stepper: &mut Stepper,
        local: &LocalBatch,
        rates: impl Into<StepRates>,
    ) -> Result<Option<Outcome>> {
        if local.keys.len() != self.samples {
            return Err(Error::failed(format!(
                "a step got {} samples for this rank, whose part of the batch is {}",
                local.keys.len(),
                self.samples
            )));
        }
        let batch = local.to_whole_batch()?;
        let counts = stepper.method.denominators(&batch)?;
        // Every sample counts alike, or the ranks sum the counts on the device: nobody has to ask another rank.
        let mut load = vec![stepper.host_controls(&rates.into(), counts, counts * self.global_per_local)];
        load.extend(batch.tensors().into_iter().map(Tensor::shallow_clone));
        if let Some(gpu) = &mut self.gpu {
            let _scope = scope("copy");
            load = gpu.staging.upload(load)?;
        }
        let mut staged = load.into_iter();
        stepper.controls.set(&staged.next().expect("the controls"))?;
        let batch = batch.map(|_| Ok(staged.next().expect("as many as were uploaded")))?;
        // Gathers that a step of another mode has started: graphs hold what they began themselves.
        stepper.buckets.finish_weight_gather(stepper.timeout)?;
        stepper.begin();
        let mut ranges: Vec<Range<usize>> = local.micro_batch_ranges().collect();
        if ranges.is_empty() {
            // A rank without samples takes part in the reduction all the same.
            ranges.push(0..0);
        }
        let parts = ranges.len();
        let mut report = None;
        for (index, rows) in ranges.iter().enumerate() {
            let is_last = index + 1 == parts;
            self.stage_input(&batch, rows, stepper.flat.master.device())?;
            if let (Some(gpu), true) = (&mut self.gpu, is_last) {
                gpu.staging.release()?;
            }
            let part = StepPart {
                size: [rows.len() as i64, batch.view().size()[2]],
                gathers_weights: index == 0 && stepper.flat.sharding.is_some(),
                sums_counts: index == 0 && stepper.method.capabilities().varying_denominators,
                is_last,
            };
            report = self.queue_part(stepper, part)?;
        }
        let report = report.expect("the last part's");
        let slot = self.in_flight.as_ref().map_or(0, |(slot, _)| 1 - slot);
        copy_non_blocking(&self.report_slots[slot], &report)?;
        let arrival = self.gpu.as_ref().map(GpuPipeline::record_event).transpose()?;
        let before = self.read_outcome(stepper)?;
        self.in_flight = Some((slot, arrival));
        Ok(before)
    }

    /// Copies some of the samples to where their part reads them.
    fn stage_input(&mut self, batch: &Batch, rows: &Range<usize>, device: Device) -> Result<()> {
        if rows.is_empty() {
            return Ok(());
        }
        let part = batch.slice(rows.clone())?;
        let key = [rows.len() as i64, part.view().size()[2]];
        if let Entry::Vacant(entry) = self.inputs.entry(key) {
            let like = part.map(|tensor| Ok(Tensor::f_empty(tensor.size(), (tensor.kind(), device))?))?;
            // A captured step does the same whatever is padding.
            entry.insert(Batch { side: Side { valid: None, ..like.side }, ..like });
        }
        let input = &self.inputs[&key];
        let got = describe_batch(&part);
        let expected = describe_batch(input);
        if got != expected {
            return Err(Error::failed(format!("a step got {got}, after {expected}; pipelined steps must be alike")));
        }
        part.tensors().into_iter().zip(input.tensors()).try_for_each(|(from, to)| copy_non_blocking(to, from))
    }

    /// Queues a part of the step; the last returns its report.
    fn queue_part(&mut self, stepper: &mut Stepper, part: StepPart) -> Result<Option<Tensor>> {
        let _scope = scope("part");
        let input = self.inputs.get(&part.size);
        let mut body = || {
            if part.gathers_weights {
                stepper.buckets.start_weight_gather();
            }
            if part.sums_counts {
                stepper.reduce_counts()?;
            }
            if let Some(input) = input {
                stepper.accumulate(input, part.is_last)?;
            }
            if part.is_last {
                return stepper.finish().map(Some);
            }
            // A graph ends everything that it began.
            stepper.buckets.finish_weight_gather(stepper.timeout)?;
            Ok(None)
        };
        match &mut self.gpu {
            Some(gpu) => gpu.graphs.run(part, body),
            None => body(),
        }
    }

    /// Implements [`StepMode::flush`].
    pub fn flush(&mut self, stepper: &Stepper) -> Result<Option<Outcome>> {
        let last = self.read_outcome(stepper)?;
        stepper.buckets.start_weight_gather();
        stepper.buckets.finish_weight_gather(stepper.timeout)?;
        Ok(last)
    }

    /// Reads the outcome of the step before, once it is there.
    fn read_outcome(&mut self, stepper: &Stepper) -> Result<Option<Outcome>> {
        let Some((slot, arrival)) = self.in_flight.take() else { return Ok(None) };
        if let Some(arrival) = arrival {
            arrival.synchronize()?;
        }
        let report = Vec::<f64>::try_from(&self.report_slots[slot])?;
        Ok(Some(stepper.decode_report(&report)))
    }

    /// Number of parts of a step that have been captured as graphs.
    pub fn captured_parts(&self) -> usize {
        self.gpu.as_ref().map_or(0, |gpu| gpu.graphs.captured_parts())
    }
}

/// Describes the properties that must stay the same from step to step.
fn describe_batch(batch: &Batch) -> String {
    let tensors: Vec<String> =
        batch.tensors().into_iter().map(|tensor| format!("{:?} {:?}", tensor.size(), tensor.kind())).collect();
    format!("tensors {}, seed {}", tensors.join(", "), batch.seed)
}

/// State of pipelined steps on a GPU.
struct GpuPipeline {
    graphs: GraphCache,
    staging: InputStaging,
    /// The stream of the computation, current while `_entered` lives.
    stream: Stream,
    _entered: StreamGuard,
}

impl GpuPipeline {
    fn new(index: usize, stepper: &Stepper, world: &Arc<dyn World>) -> Result<GpuPipeline> {
        // The model was made on the stream that was current until now.
        synchronize(index)?;
        let stream = Stream::new(index, Priority::Normal)?;
        Ok(GpuPipeline {
            _entered: stream.set_current()?,
            graphs: GraphCache::new(stream, world.clone(), stepper.timeout)?,
            staging: InputStaging::new(stream)?,
            stream,
        })
    }

    /// Marks when all that is queued by now is done.
    fn record_event(&self) -> Result<Event> {
        let mut event = Event::new()?;
        event.record(&self.stream)?;
        Ok(event)
    }
}
