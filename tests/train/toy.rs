//! A toy method with a teacher, a center, a queue, labels, two views and scheduled values.

use super::step::{BUCKET, SOON, input};
use occlude::data::order::rank_rows;
use occlude::dist::World;
use occlude::error::Result;
use occlude::method::{Batch, Capabilities, LossOutput, LossTerm, Method, Model, Per, Progress, Step, Teacher};
use occlude::op::shuffle::SampleKey;
use occlude::optim::flat::{FlatOptions, FlatParams, ShardOptions};
use occlude::optim::update::{Config, Updater};
use occlude::part::batch::{NO_LABEL, Side};
use occlude::part::buffers::{BufferId, BufferSpecs};
use occlude::part::cost::ModelCost;
use occlude::part::encoder::{EncodeOptions, Features};
use occlude::part::loss::BufferUpdate;
use occlude::part::params::{Init, ParamId, ParamSpecs, Weights};
use occlude::part::patchify::Patchify;
use occlude::part::teacher::Every;
use occlude::train::controls::StepRates;
use occlude::train::step::Stepper;
use occlude::train::step_mode::LocalBatch;
use serde_json::json;
use std::sync::Arc;
use tch::{Kind, Tensor, no_grad};

pub const BATCH: u64 = 12;
/// Samples of the made-up data set: an epoch ends in every third step.
pub const SAMPLES: u64 = 36;
pub const WIDTH: i64 = 6;
pub const CLASSES: i64 = 3;
pub const QUEUE: i64 = 20;

/// A projection whose output is drawn to the teacher's (a second view, centered), away from a queue, and classified.
pub struct Toy {
    patchify: Patchify,
    params: ParamSpecs,
    projection: ParamId,
    pub classifier: ParamId,
    buffers: BufferSpecs,
    center: BufferId,
    queue: BufferId,
    every: Every,
    has_queue: bool,
}

impl Toy {
    pub fn new(every: Every, has_queue: bool) -> Toy {
        let mut params = ParamSpecs::default();
        let mut buffers = BufferSpecs::default();
        Toy {
            projection: params.add("encoder.projection", &[WIDTH, 256], Init::Xavier),
            classifier: params.add("head.classifier", &[CLASSES, WIDTH], Init::Xavier),
            center: buffers.add("center", &[WIDTH], Init::Zero),
            queue: buffers.add("queue", &[QUEUE, WIDTH], Init::Normal(1.0)),
            patchify: Patchify::new(&input()).expect("an input"),
            params,
            buffers,
            every,
            has_queue,
        }
    }

    /// view uint8 [B, 1, 1, 16, 16] → [B, WIDTH] fp32.
    pub fn project(&self, w: &Weights, view: &Tensor) -> Tensor {
        let x = (view.to_kind(w.kind()) / 255.0).reshape([view.size()[0], -1]);
        x.matmul(&w[self.projection].tr()).to_kind(Kind::Float)
    }
}

impl Model for Toy {
    fn patchify(&self) -> &Patchify {
        &self.patchify
    }
    fn params(&self) -> &ParamSpecs {
        &self.params
    }
    fn cost(&self, _: &occlude::grid::Grid, _: i64) -> ModelCost {
        unreachable!("nobody times a toy")
    }
    fn set_recompute(&mut self, _: bool) {
        unreachable!("a toy has no blocks")
    }
    fn depth(&self) -> usize {
        0
    }
    fn encode(&self, step: &Step, batch: &Batch, _: EncodeOptions) -> Result<Features> {
        Ok(Features { class: None, mean: self.project(step.weights, batch.view()) })
    }
}

impl Method for Toy {
    fn capabilities(&self) -> Capabilities<'_> {
        Capabilities { varying_denominators: true, ..Capabilities::default() }
    }
    fn model(&self) -> &dyn Model {
        self
    }
    fn model_mut(&mut self) -> &mut dyn Model {
        self
    }
    fn teacher(&self) -> Option<Teacher> {
        Some(Teacher { prefix: "encoder.", momentum: 0, every: self.every })
    }
    fn buffers(&self) -> BufferSpecs {
        self.buffers.clone()
    }
    /// The teacher's momentum, and the weight of the labeled term.
    fn scheduled(&self, at: &Progress) -> Vec<f64> {
        vec![0.9 + 0.05 * at.fraction(), 0.5 + 0.1 * at.epoch()]
    }
    fn loss(&self, step: &Step, batch: &Batch) -> Result<LossOutput> {
        let teacher = step.teacher.expect("a teacher");
        let target = no_grad(|| self.project(teacher, &batch.views[1])); // [B, E]
        let output = self.project(step.weights, &batch.views[0]);
        let centered = &target - &step.buffers[self.center];
        let mut pull = (&output - centered).square().sum(Kind::Float);
        if self.has_queue {
            pull += output.matmul(&step.buffers[self.queue].tr()).softmax(-1, Kind::Float).square().sum(Kind::Float);
        }
        let logits = output.matmul(&step.weights[self.classifier].to_kind(Kind::Float).tr());
        let labeled = logits.cross_entropy_loss(batch.labels()?, None::<Tensor>, tch::Reduction::Sum, NO_LABEL, 0.0)
            * step.scheduled.get(1).to_kind(Kind::Float);
        let mut buffers = vec![BufferUpdate::Mean {
            buffer: self.center,
            sum: target.sum_dim_intlist([0i64].as_slice(), false, Kind::Float),
            per: Per::Sample,
            momentum: 0.8,
        }];
        if self.has_queue {
            buffers.push(BufferUpdate::Queue { buffer: self.queue, rows: target });
        }
        let terms = vec![
            LossTerm { name: "pull", sum: pull, per: Per::Sample },
            LossTerm { name: "class", sum: labeled, per: Per::Labeled },
        ];
        Ok(LossOutput { terms, buffers })
    }
}

pub fn optim() -> Config {
    serde_json::from_value(json!({"lr": 0.01, "weight_decay": 0.0})).expect("numbers")
}

pub fn stepper(method: Toy, world: Arc<dyn World>, kind: Kind, is_sharded: bool) -> Stepper {
    tch::set_num_threads(1);
    let rank = world.rank();
    let size = world.size();
    let flat = if is_sharded {
        FlatParams::new_sharded(
            method.params(),
            FlatOptions { seed: 7, kind, device: world.device() },
            ShardOptions { bucket_bytes: BUCKET, rank, world_size: size },
        )
    } else {
        FlatParams::new(method.params(), 7, kind, world.device())
    };
    let flat = flat.expect("buffers");
    let updater = Updater::new(&flat, &optim());
    Stepper::new(Box::new(method), flat, updater, world, BUCKET, SOON).expect("a stepper")
}

/// This rank's samples of a step: two views, and a label for two of three samples.
pub fn local_batch(step: u64, world: &dyn World, micro_batch: usize) -> LocalBatch {
    let rows: Vec<u64> = rank_rows(BATCH, world.rank(), world.size()).map(|row| step * BATCH + row).collect();
    let pixel = |position: u64, view: u64, at: u64| ((position * 31 + view * 57 + at * (7 + position % 5)) % 251) as u8;
    let view = |view: u64| {
        let pixels: Vec<u8> = rows.iter().flat_map(|&row| (0..256).map(move |at| pixel(row, view, at))).collect();
        Tensor::from_slice(&pixels).view([rows.len() as i64, 1, 1, 16, 16])
    };
    let label = |row: u64| if row.is_multiple_of(3) { NO_LABEL } else { (row / 3 % CLASSES as u64) as i64 };
    let labels: Vec<i64> = rows.iter().map(|&row| label(row)).collect();
    LocalBatch {
        views: vec![view(0), view(1)],
        keys: rows.iter().map(|&id| SampleKey { id, epoch: 0, repeat: 0 }).collect(),
        side: Side { labels: Some(Tensor::from_slice(&labels)), ..Side::default() },
        seed: 5,
        micro_batch,
    }
}

pub fn rates(step: u64) -> StepRates {
    let progress = Progress { samples: step * BATCH, global_batch: BATCH, epoch_samples: SAMPLES, total_samples: 120 };
    StepRates { lr: 0.01, progress }
}
