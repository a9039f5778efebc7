//! Frozen probes: what an encoder's features are worth without training it further, on one to many ranks.
//!
//! Every rank takes its share of each data set. Shares differ in length by at most one and nothing is padded, so that
//! each sample counts once whatever the number of ranks; one that cannot be decoded is left out and counted.

pub mod captions; // images and captions, without a classifier
pub mod fast;
pub mod features;
pub mod head;
pub mod nearest;
pub mod norm;
pub mod paper;
pub mod progress;
pub mod ranks;
pub mod samples;
pub mod subject;

use crate::data::mix::Mix;
use crate::device::World;
use crate::fault::Result;
use fast::Linear;
use features::{Encoder, Set, nothing};
use nearest::Vote;
use paper::Paper;
use ranks::Ranks;
use samples::Augmentation;
use serde::Serialize;
use std::sync::Arc;
use subject::{Opened, Subject};
use tch::{Kind, Tensor};

/// How features are judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Protocol {
    /// The weighted vote of the nearest training samples by cosine (Wu et al., 2018)
    Knn,
    /// A linear classifier on normalised features
    Linear,
    /// The class whose name, in several sentences, is the likeliest caption; of models that read captions
    ZeroShot,
    /// Each image's own caption among all, and each caption's image; of models that read captions
    Retrieval,
}

/// How the linear classifier is trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Recipe {
    /// AdamW on features that are worked out once, without augmentation
    Fast,
    /// LARS on new random views in every epoch (He et al., 2022)
    Paper,
}

/// A protocol with its numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Probe {
    Nearest(Vote),
    Fast,
    Paper(Paper),
}

/// Which features of the encoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Feature {
    /// The class token
    Class,
    /// The mean of the patch tokens
    Mean,
    /// No encoder's: over time, the mean and the deviation of each band of a spectrogram, for comparison
    Statistics,
}

/// What to evaluate.
#[derive(Clone, Debug)]
pub struct Question {
    pub subject: Subject,
    pub train: String,
    pub test: String,
    pub probe: Probe,
    /// The class token where the model has one, else the mean, when left out.
    pub feature: Option<Feature>,
}

/// The last line of standard output.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Answer {
    /// "pretrained" or "random".
    pub checkpoint: &'static str,
    pub step: u64,
    pub protocol: Protocol,
    #[serde(flatten)]
    pub numbers: Numbers,
    pub feature: Feature,
    pub top1: f64,
    /// The paper's recipe alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top5: Option<f64>,
    /// Samples that were learned from.
    pub n_train: i64,
    /// Samples that were judged.
    pub n_test: i64,
    /// Samples of either set that could not be decoded. The paper's recipe replaces those of the training set, as
    /// training does, and counts those of the test set alone.
    pub n_left_out: i64,
    pub seed: u64,
    pub ranks: usize,
}

/// The numbers of the protocol, as they were used.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Numbers {
    Nearest { k: i64, temperature: f64 },
    Fast { recipe: Recipe, epochs: u64 },
    Paper { recipe: Recipe, epochs: u64, batch: u64, base_lr: f64, warmup_epochs: f64, augmentation: Augmentation },
}

/// What a probe makes of this rank's share.
struct Judged {
    /// The likeliest classes of each test sample, the likeliest in front, int64 [R, n].
    guesses: Tensor,
    test: Set,
    /// This rank's part of the training set: samples learned from, samples left out.
    learned: i64,
    left_out: i64,
}

/// Judges a checkpoint's encoder; collective, with the same answer on every rank.
///
/// # Errors
/// Code::Usage where a set has no labels, a number is out of range or there is no checkpoint; Code::Disagree where
/// ranks have another question, weights or data; Code::Corrupt past the share of samples that may be undecodable.
pub fn evaluate(question: &Question, world: &Arc<dyn World>) -> Result<Answer> {
    question.probe.check()?;
    let Opened { config, method, flat, step, seed } = question.subject.open(world.device())?;
    let (train, test) = (samples::open(&question.train)?, samples::open(&question.test)?);
    let digest = |bytes: &[u8]| blake3::hash(bytes).to_hex()[..16].to_string();
    let texts = [
        ("probe", format!("{:?}", question.probe)),
        ("feature", format!("{:?}", question.feature)),
        ("seed", seed.to_string()),
        ("training set", format!("{}, {} classes named", digest(&train.digest()), train.sets()[0].classes.len())),
        ("test set", digest(&test.digest())),
    ];
    ranks::agree(world.as_ref(), &config, &flat.master, &texts)?;
    let mut ranks = Ranks::join(world, config.world.frozen_s, config.world.deadline_s)?;
    let encoder = Encoder::new(config, method, flat, question.feature)?;

    let judged = judge(question, &encoder, [&train, &test], seed, &mut ranks)?;
    let [n_train, n_test, n_left_out, first, any] = judged.count(&mut ranks)?;
    if n_test == 0 {
        return Err(nothing(&question.test));
    }
    let size = ranks.size();
    ranks.leave();
    Ok(Answer {
        checkpoint: question.subject.name(),
        step,
        protocol: question.probe.protocol(),
        numbers: question.probe.numbers(train.len()),
        feature: encoder.feature,
        top1: first as f64 / n_test as f64,
        top5: matches!(question.probe, Probe::Paper(_)).then_some(any as f64 / n_test as f64),
        n_train,
        n_test,
        n_left_out,
        seed,
        ranks: size,
    })
}

/// Features, classifier and guesses; collective.
fn judge(
    question: &Question,
    encoder: &Encoder,
    [train, test]: [&Arc<Mix>; 2],
    seed: u64,
    ranks: &mut Ranks,
) -> Result<Judged> {
    if let Probe::Paper(paper) = &question.probe {
        let head = paper.fit(encoder, train, seed, ranks)?;
        let test = Set::sweep(encoder, test, ranks, "test set")?;
        let learned = samples::share(train, ranks) as i64;
        return Ok(Judged { guesses: head.classes(&test.x, 5), test, learned, left_out: 0 });
    }
    let own = Set::sweep(encoder, train, ranks, "training set")?;
    let test = Set::sweep(encoder, test, ranks, "test set")?;
    let all = own.gather(ranks, &question.train)?;
    let guesses = match &question.probe {
        Probe::Nearest(vote) => vote.classes(&all, &test.x),
        _ => Linear::fit(&all, seed, ranks)?.classes(&test.x),
    };
    let (learned, left_out) = (own.labels.numel() as i64, own.left_out);
    Ok(Judged { guesses: guesses.unsqueeze(1), test, learned, left_out })
}

impl Judged {
    /// Over all ranks: samples learned from, samples judged, samples left out, and how often the first guess and any
    /// of them was right.
    fn count(&self, ranks: &mut Ranks) -> Result<[i64; 5]> {
        let right = self.guesses.eq_tensor(&self.test.labels.unsqueeze(1)).to_kind(Kind::Int64); // [R, n]
        let sum = |x: Tensor| x.sum(Kind::Int64).int64_value(&[]);
        let counts = Tensor::from_slice(&[
            self.learned,
            self.test.labels.numel() as i64,
            self.left_out + self.test.left_out,
            sum(right.narrow(1, 0, 1)),
            sum(right),
        ]);
        ranks.sum(&[&counts])?;
        Ok(Vec::<i64>::try_from(counts)?.try_into().expect("five counts"))
    }
}

impl Probe {
    pub fn check(&self) -> Result<()> {
        match self {
            Probe::Nearest(vote) => vote.check(),
            Probe::Fast => Ok(()),
            Probe::Paper(paper) => paper.check(),
        }
    }

    pub fn protocol(&self) -> Protocol {
        match self {
            Probe::Nearest(_) => Protocol::Knn,
            Probe::Fast | Probe::Paper(_) => Protocol::Linear,
        }
    }

    /// What the answer says of it, on a training set of so many samples.
    fn numbers(&self, samples: u64) -> Numbers {
        match *self {
            Probe::Nearest(Vote { k, temperature }) => Numbers::Nearest { k, temperature },
            Probe::Fast => Numbers::Fast { recipe: Recipe::Fast, epochs: fast::PASSES },
            Probe::Paper(Paper { epochs, batch, base_lr, warmup_epochs, augmentation }) => {
                let batch = batch.min(samples);
                Numbers::Paper { recipe: Recipe::Paper, epochs, batch, base_lr, warmup_epochs, augmentation }
            }
        }
    }
}
