//! Frozen probes: what an encoder's features are worth without training it further.

use super::{checkpoint, state};
use crate::config::Config;
use crate::data::decode::Limits;
use crate::data::mix::Mix;
use crate::data::set::DataSet;
use crate::fault::{Fault, Result};
use crate::feed::{Feed, Source};
use crate::method::{Batch, Method};
use crate::op::adamw::{AdamW, adamw};
use crate::op::shuffle::Origin;
use crate::optim::flat::Flat;
use crate::rng::{Draw, Purpose};
use serde::Serialize;
use std::sync::Arc;
use tch::{Device, Kind, Tensor, no_grad};

/// How features are judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// The weighted vote of the 20 nearest training samples by cosine (Wu et al., 2018; temperature 0.07).
    Knn,
    /// A linear classifier on normalised features.
    Linear,
}

/// Which features of the encoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Feature {
    /// The class token.
    Class,
    /// The mean of the patch tokens.
    Mean,
}

/// What to evaluate.
#[derive(Clone, Debug)]
pub struct Question {
    pub checkpoint: String,
    pub train: String,
    pub test: String,
    pub protocol: Protocol,
    pub feature: Feature,
    /// Judge the same encoder with the weights it began with instead of the trained ones.
    pub random: bool,
    /// The seed of those first weights and of the probe.
    pub seed: Option<u64>,
}

/// The last line of standard output.
#[derive(Clone, Debug, Serialize)]
pub struct Answer {
    /// "pretrained" or "random".
    pub checkpoint: &'static str,
    pub step: u64,
    pub protocol: Protocol,
    pub feature: Feature,
    pub top1: f64,
    pub n_train: i64,
    pub n_test: i64,
    pub seed: u64,
}

pub fn evaluate(question: &Question) -> Result<Answer> {
    let loaded = checkpoint::open(&question.checkpoint)?;
    let (config, method, mut flat) = state::model(&loaded, Device::Cpu)?;
    let seed = question.seed.unwrap_or(config.train.seed);
    if question.random {
        flat = Flat::new(method.table(), seed, Kind::Float, Device::Cpu)?;
    }
    let train = features(&config, method.as_ref(), &flat, &question.train, question.feature)?;
    let test = features(&config, method.as_ref(), &flat, &question.test, question.feature)?;
    let guesses = match question.protocol {
        Protocol::Knn => nearest(&train, &test.x),
        Protocol::Linear => linear(&train, &test.x, seed)?,
    };
    let right = guesses.eq_tensor(&test.labels).sum(Kind::Int64).int64_value(&[]);
    Ok(Answer {
        checkpoint: if question.random { "random" } else { "pretrained" },
        step: if question.random { 0 } else { loaded.manifest.step },
        protocol: question.protocol,
        feature: question.feature,
        top1: right as f64 / test.labels.numel() as f64,
        n_train: train.labels.numel() as i64,
        n_test: test.labels.numel() as i64,
        seed,
    })
}

/// Features [R, D] and classes [R] of a data set.
pub struct Set {
    pub x: Tensor,
    pub labels: Tensor,
}

fn features(config: &Config, method: &dyn Method, flat: &Flat, url: &str, feature: Feature) -> Result<Set> {
    let set = Arc::new(Mix::one(DataSet::open(url)?));
    if !set.labelled()? {
        return Err(Fault::usage(format!("{url} has no labels (.cls members); a probe wants a labelled set")));
    }
    let (grid, view) = (*method.grid(), config.view.clone());
    let source = Source {
        set,
        cache: None,
        view: Arc::new(move |picture, _, _, out| view.eval(&grid, picture, out)),
        shape: grid.pixels(),
        limits: Limits::default(),
        seed: config.train.seed,
        threads: std::thread::available_parallelism().map_or(1, usize::from),
        prefetch_bytes: 64 << 20,
        max_bad_share: config.data.max_bad_share,
    };
    let (mut x, mut labels) = (Vec::new(), Vec::new());
    for rows in Feed::sweep(source, 256, 0, 1)? {
        let rows = rows?;
        let shape = [&[rows.ids.len() as i64][..], &grid.pixels()].concat();
        let batch = Batch {
            pixels: Tensor::f_from_data_size(&rows.pixels, &shape, Kind::Uint8)?,
            origins: rows.ids.iter().map(|&id| Origin { id, epoch: 0, repeat: 0 }).collect(),
            seed: config.train.seed,
        };
        let found = no_grad(|| method.features(&flat.leaves, &batch))?;
        x.push(match feature {
            Feature::Class => found.class,
            Feature::Mean => found.mean,
        });
        labels.push(Tensor::from_slice(&rows.labels.unwrap_or_default()));
    }
    Ok(Set { x: Tensor::cat(&x, 0), labels: Tensor::cat(&labels, 0) })
}

/// The weighted vote of the 20 nearest training samples → classes int64 [R].
pub fn nearest(train: &Set, x: &Tensor) -> Tensor {
    let unit = |x: &Tensor| x / x.square().sum_dim_intlist(-1, true, Kind::Float).sqrt().clamp_min(1e-12);
    let classes = train.labels.max().int64_value(&[]) + 1;
    let near = train.labels.numel().min(20) as i64;
    let bank = unit(&train.x).transpose(0, 1);
    let vote = |x: &Tensor| {
        let (likeness, at) = unit(x).matmul(&bank).topk(near, 1, true, true); // [R, 20]
        let weight = (likeness / 0.07).exp();
        let votes = Tensor::zeros([x.size()[0], classes], (Kind::Float, x.device()));
        votes.scatter_add(1, &train.labels.index_select(0, &at.view(-1)).view_as(&at), &weight).argmax(1, false)
    };
    Tensor::cat(&x.split(1024, 0).iter().map(vote).collect::<Vec<_>>(), 0)
}

/// A linear classifier on features with mean 0 and deviation 1 over the training set (the official probe's batch
/// normalisation without affine part): AdamW without decay, 100 passes in batches of 256, learning rate 0.01 falling
/// along half a cosine. → classes int64 [R].
pub fn linear(train: &Set, x: &Tensor, seed: u64) -> Result<Tensor> {
    const PASSES: usize = 100;
    let mean = train.x.mean_dim(0, true, Kind::Float);
    let deviation = train.x.std_dim(0, true, true).clamp_min(1e-6);
    let normal = |x: &Tensor| (x - &mean) / &deviation;
    let (samples, width) = (train.x.size()[0], train.x.size()[1]);
    let classes = train.labels.max().int64_value(&[]) + 1;
    let features = normal(&train.x);
    let zeros = |shape: &[i64]| Tensor::zeros(shape, (Kind::Float, Device::Cpu));
    let mut w = [zeros(&[classes, width]), zeros(&[classes])].map(|t| t.set_requires_grad(true));
    let (first, second) = (w.each_ref().map(Tensor::zeros_like), w.each_ref().map(Tensor::zeros_like));
    let counts = [zeros(&[]), zeros(&[])];
    let steps = PASSES * (samples as usize).div_ceil(256);
    let mut step = 0;
    for pass in 0..PASSES {
        let order: Vec<i64> = Draw::new(seed, 0, pass as u64, Purpose::Probe, 0)
            .order(samples as usize)
            .into_iter()
            .map(i64::from)
            .collect();
        for rows in order.chunks(256) {
            let at = Tensor::from_slice(rows);
            let scores = features.index_select(0, &at).matmul(&w[0].transpose(0, 1)) + &w[1];
            let loss = scores.cross_entropy_for_logits(&train.labels.index_select(0, &at));
            w.iter_mut().for_each(|t| t.zero_grad());
            loss.backward();
            let lr = 0.005 * (1.0 + (std::f64::consts::PI * step as f64 / steps as f64).cos());
            let gradients = w.each_ref().map(Tensor::grad);
            let with = AdamW { lr, betas: (0.9, 0.999), weight_decay: 0.0, eps: 1e-8 };
            adamw(&w.each_ref().map(Tensor::detach), &gradients, &first, &second, &counts, with)?;
            step += 1;
        }
    }
    Ok(no_grad(|| (normal(x).matmul(&w[0].transpose(0, 1)) + &w[1]).argmax(1, false)))
}
