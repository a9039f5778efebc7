//! What images and captions have learned of each other, without a classifier and without training: zero-shot
//! classification by names, and retrieval both ways.

use super::features::{ROWS, nothing};
use super::progress::Progress;
use super::ranks::{self, Ranks};
use super::subject::{Opened, Subject};
use super::{Protocol, samples};
use crate::config::Config;
use crate::data::caption::Tokenizer;
use crate::data::mix::Mix;
use crate::data::set::DataSet;
use crate::device::World;
use crate::fault::{Fault, Result};
use crate::feed::Rows;
use crate::method::{Batch, Method};
use crate::op::shuffle::Origin;
use crate::optim::flat::Flat;
use crate::run::open;
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tch::{Device, Kind, Tensor, no_grad};

/// The seven templates that do as well as CLIP's eighty on ImageNet (FLIP, appendix A; CLIP's notebook on prompts).
pub const TEMPLATES: [&str; 7] = [
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
];
/// Samples that one may be found among, for the recalls that are told.
const AMONG: [i64; 3] = [1, 5, 10];
/// The most likenesses in memory at a time (256 MB in fp32).
const LIKENESSES: i64 = 64 << 20;

/// What to ask.
#[derive(Clone, Debug)]
pub struct Question {
    pub subject: Subject,
    pub test: String,
    pub task: Task,
    /// The vocabulary, where it does not lie any more where the training found it.
    pub tokenizer: Option<String>,
}

#[derive(Clone, Debug)]
pub enum Task {
    /// Names of the classes, a line each, or those of the set; templates, a line each with {} for the name, or
    /// [`TEMPLATES`].
    ZeroShot {
        classes: Option<PathBuf>,
        templates: Option<PathBuf>,
    },
    Retrieval,
}

impl Task {
    fn protocol(&self) -> Protocol {
        match self {
            Task::ZeroShot { .. } => Protocol::ZeroShot,
            Task::Retrieval => Protocol::Retrieval,
        }
    }
}

/// The last line of standard output.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Answer {
    /// "pretrained" or "random".
    pub checkpoint: &'static str,
    pub step: u64,
    pub protocol: Protocol,
    #[serde(flatten)]
    pub found: Found,
    /// Samples that were judged.
    pub n_test: i64,
    /// Samples that could not be decoded.
    pub n_left_out: i64,
    pub ranks: usize,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Found {
    ZeroShot {
        classes: usize,
        templates: usize,
        top1: f64,
        top5: f64,
    },
    /// Of all images, the share whose own caption is the likeliest, and one of the five and ten likeliest; and of all
    /// captions.
    Retrieval {
        image_to_text: Recall,
        text_to_image: Recall,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Recall {
    pub r1: f64,
    pub r5: f64,
    pub r10: f64,
}

/// A model that has learned captions, and its vocabulary.
struct Model {
    config: Config,
    method: Box<dyn Method>,
    flat: Flat,
    captions: Arc<Tokenizer>,
}

/// Collective, with the same answer on every rank.
///
/// # Errors
/// Code::Usage where the model reads no captions, or the set lacks what the task is about; Code::Disagree where ranks have
/// another question, weights or data; Code::Corrupt past the share of samples that may be undecodable.
pub fn evaluate(question: &Question, world: &Arc<dyn World>) -> Result<Answer> {
    let Opened { mut config, method, flat, step, .. } = question.subject.open(world.device())?;
    if let (Some(caption), Some(file)) = (&mut config.view.caption, &question.tokenizer) {
        caption.tokenizer = file.clone();
    }
    let captions = open::tokenizer(&config)?.ok_or_else(|| method.no_captions())?;
    let protocol = question.task.protocol();
    let retrieves = protocol == Protocol::Retrieval;
    let set =
        if retrieves { Arc::new(Mix::one(DataSet::open(&question.test)?)) } else { samples::open(&question.test)? };
    open::captioned(&set.sets()[0], retrieves)?;
    let (classes, templates) = names(&question.task, &set)?;
    let hash = |text: String| blake3::hash(text.as_bytes()).to_hex()[..16].to_string();
    let texts = [
        ("protocol", format!("{protocol:?}")),
        ("classes and templates", hash(format!("{classes:?} {templates:?}"))),
        ("tokenizer", captions.digest().to_owned()),
        ("test set", blake3::hash(&set.digest()).to_hex()[..16].to_string()),
    ];
    ranks::agree(world.as_ref(), &config, &flat.master, &texts)?;
    let mut ranks = Ranks::join(world, config.world.frozen_s, config.world.deadline_s)?;
    let model = Model { config, method, flat, captions };
    let (found, n_test, left_out) = match retrieves {
        true => model.retrieval(&set, &mut ranks)?,
        false => model.zero_shot(&set, &classes, &templates, &mut ranks)?,
    };
    if n_test == 0 {
        return Err(nothing(&question.test));
    }
    let size = ranks.size();
    ranks.leave();
    Ok(Answer { checkpoint: question.subject.name(), step, protocol, found, n_test, n_left_out: left_out, ranks: size })
}

/// The classes' names and the templates; none for a task without.
fn names(task: &Task, set: &Mix) -> Result<(Vec<String>, Vec<String>)> {
    let Task::ZeroShot { classes, templates } = task else { return Ok(Default::default()) };
    let classes = classes.as_deref().map_or_else(|| Ok(set.sets()[0].classes.clone()), lines)?;
    let own = || Ok(TEMPLATES.map(str::to_owned).to_vec());
    let templates = templates.as_deref().map_or_else(own, lines)?;
    if classes.is_empty() {
        return Err(Fault::usage("the set does not name its classes; give --classes FILE, a name a line"));
    }
    match templates.iter().find(|template| !template.contains("{}")) {
        Some(template) => Err(Fault::usage(format!("the template `{template}` has no {{}} for the name of a class"))),
        None if templates.is_empty() => Err(Fault::usage("there is no template; give one a line, as a photo of a {}.")),
        None => Ok((classes, templates)),
    }
}

fn lines(path: &Path) -> Result<Vec<String>> {
    let text = std::fs::read_to_string(path).map_err(|error| Fault::usage(format!("{}: {error}", path.display())))?;
    Ok(text.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned).collect())
}

impl Model {
    fn images(&self, rows: &Rows) -> Result<Tensor> {
        let pixels = rows.to_device(0..rows.ids.len(), self.flat.master.device())?;
        let origins: Vec<Origin> = rows.ids.iter().map(|&id| Origin { id, epoch: 0, repeat: 0 }).collect();
        let batch = Batch::new(pixels, &origins, self.config.train.seed);
        no_grad(|| self.method.match_images(&self.flat.leaves, &batch)).map(|x| x.to_device(Device::Cpu))
    }

    fn texts(&self, ids: &Tensor) -> Result<Tensor> {
        let ids = ids.to_device(self.flat.master.device());
        no_grad(|| self.method.match_captions(&self.flat.leaves, &ids)).map(|x| x.to_device(Device::Cpu))
    }

    /// A unit vector for each class [C, E]: the mean of its name's in all templates.
    fn prompts(&self, classes: &[String], templates: &[String], ranks: &mut Ranks) -> Result<Tensor> {
        let mut all = Vec::new();
        for class in classes {
            let ids = templates.iter().map(|template| self.captions.ids(&template.replace("{}", class)));
            let ids: Vec<i64> = ids.collect::<Result<Vec<_>>>()?.concat();
            let vectors = self.texts(&Tensor::from_slice(&ids).view([templates.len() as i64, -1]))?;
            let mean = vectors.mean_dim(0, false, Kind::Float);
            all.push(&mean / mean.norm().clamp_min(1e-12));
            ranks.beat();
        }
        Ok(Tensor::stack(&all, 0))
    }

    fn zero_shot(
        &self,
        set: &Arc<Mix>,
        classes: &[String],
        templates: &[String],
        ranks: &mut Ranks,
    ) -> Result<(Found, i64, i64)> {
        let prompts = self.prompts(classes, templates, ranks)?.transpose(0, 1);
        let known = classes.len() as i64;
        let mut counts = [0i64; 4];
        self.sweep(set, None, ranks, |rows| {
            let labels = Tensor::from_slice(rows.labels.as_deref().unwrap_or_default());
            if labels.numel() > 0 && labels.max().int64_value(&[]) >= known {
                return Err(Fault::usage(format!(
                    "a sample has the label {}, and {known} classes are named; name all of them, in their order",
                    labels.max().int64_value(&[])
                )));
            }
            let guesses = self.images(rows)?.matmul(&prompts).topk(known.min(5), 1, true, true).1;
            let right = guesses.eq_tensor(&labels.unsqueeze(1)).to_kind(Kind::Int64);
            counts[0] += right.narrow(1, 0, 1).sum(Kind::Int64).int64_value(&[]);
            counts[1] += right.sum(Kind::Int64).int64_value(&[]);
            counts[2] += labels.numel() as i64;
            Ok(())
        })?;
        counts[3] = samples::share(set, ranks) as i64 - counts[2];
        let [first, any, judged, left_out] = total(counts, ranks)?;
        let share = |count: i64| count as f64 / judged.max(1) as f64;
        let (classes, templates) = (classes.len(), templates.len());
        Ok((Found::ZeroShot { classes, templates, top1: share(first), top5: share(any) }, judged, left_out))
    }

    fn retrieval(&self, set: &Arc<Mix>, ranks: &mut Ranks) -> Result<(Found, i64, i64)> {
        let none = || Tensor::zeros([0, 1], (Kind::Float, Device::Cpu));
        let (mut images, mut texts) = (Vec::new(), Vec::new());
        self.sweep(set, Some(self.captions.clone()), ranks, |rows| {
            images.push(self.images(rows)?);
            texts.push(self.texts(rows.text.as_ref().expect("captions were asked for"))?);
            Ok(())
        })?;
        // A rank without samples learns the width from the others.
        let width = ranks.largest(images.first().map_or(0, |x| x.size()[1]))?;
        let joined = |parts: &[Tensor]| match parts {
            [] => none().expand([0, width], false),
            parts => Tensor::cat(parts, 0),
        };
        let own = [joined(&images), joined(&texts)];
        let rows = own[0].size()[0];
        let all = [ranks.gather(&own[0])?, ranks.gather(&own[1])?];
        let lengths = Vec::<i64>::try_from(ranks.gather(&Tensor::from_slice(&[rows]))?)?;
        let first: i64 = lengths[..ranks.rank()].iter().sum();
        let there = hits(&own[0], &all[1], first);
        let back = hits(&own[1], &all[0], first);
        let left_out = samples::share(set, ranks) as i64 - rows;
        let [a, b, c, d, e, f, judged, left_out] =
            total([there[0], there[1], there[2], back[0], back[1], back[2], rows, left_out], ranks)?;
        let share = |count: i64| count as f64 / judged.max(1) as f64;
        let recall = |[r1, r5, r10]: [i64; 3]| Recall { r1: share(r1), r5: share(r5), r10: share(r10) };
        let found = Found::Retrieval { image_to_text: recall([a, b, c]), text_to_image: recall([d, e, f]) };
        Ok((found, judged, left_out))
    }

    /// Each sample of this rank's share, in evaluation's view.
    fn sweep(
        &self,
        set: &Arc<Mix>,
        captions: Option<Arc<Tokenizer>>,
        ranks: &mut Ranks,
        mut each: impl FnMut(&Rows) -> Result<()>,
    ) -> Result<()> {
        let share = samples::share(set, ranks);
        let mut progress = Progress::begin("test set", share, ranks.first());
        let feed = samples::captioned(set, ROWS as u64, captions, &self.config, *self.method.grid(), ranks)?;
        for (rows, step) in feed.zip(1..) {
            let rows = rows?;
            if !rows.ids.is_empty() {
                each(&rows)?;
            }
            ranks.beat();
            progress.at((step * ROWS as u64).min(share), "");
        }
        Ok(())
    }
}

/// Of queries [R, E], whose own among all [G, E] begin at `first`, how many have it among the likeliest 1, 5 and 10. Of
/// equally likely ones the earlier come first, so that a model that tells nothing apart finds nothing.
fn hits(queries: &Tensor, all: &Tensor, first: i64) -> [i64; 3] {
    let mut counts = [0; 3];
    let piece = (LIKENESSES / all.size()[0].max(1)).clamp(1, 1024);
    let keys = all.transpose(0, 1);
    for begin in (0..queries.size()[0]).step_by(piece as usize) {
        let rows = piece.min(queries.size()[0] - begin);
        let likeness = queries.narrow(0, begin, rows).matmul(&keys); // [r, G]
        let own = Tensor::arange_start(first + begin, first + begin + rows, (Kind::Int64, Device::Cpu)).unsqueeze(1);
        let score = likeness.gather(1, &own, false);
        let earlier = Tensor::arange(all.size()[0], (Kind::Int64, Device::Cpu)).unsqueeze(0).lt_tensor(&own);
        let ahead = likeness.gt_tensor(&score).logical_or(&likeness.eq_tensor(&score).logical_and(&earlier));
        let place = ahead.sum_dim_intlist([1i64].as_slice(), false, Kind::Int64);
        for (count, among) in counts.iter_mut().zip(AMONG) {
            *count += place.lt(among).sum(Kind::Int64).int64_value(&[]);
        }
    }
    counts
}

/// Counts summed over ranks.
fn total<const N: usize>(own: [i64; N], ranks: &mut Ranks) -> Result<[i64; N]> {
    let counts = Tensor::from_slice(&own);
    ranks.sum(&[&counts])?;
    Ok(Vec::<i64>::try_from(counts)?.try_into().expect("as many counts"))
}
