//! Evaluation of models of images and captions, without a classifier and without training: zero-shot classification by
//! class names, and retrieval in both directions.

use super::Protocol;
use super::features::{dot_products, no_samples_error};
use super::model_source::{LoadedModel, ModelSource};
use super::progress::ProgressReporter;
use super::ranks::{self, Ranks};
use super::samples::{self, ENCODER_BATCH};
use crate::checkpoint::weights::SavedModel;
use crate::config::Config;
use crate::data::caption::Tokenizer;
use crate::data::mixture::Mixture;
use crate::data::order::rank_rows;
use crate::data::set::DataSet;
use crate::dist::World;
use crate::error::{Error, Result};
use crate::loader::LoadedRows;
use crate::method::{Batch, ImageText, Method, no_captions_error};
use crate::op::shuffle::SampleKey;
use crate::optim::flat::FlatParams;
use crate::setup;
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tch::{Device, Kind, Tensor, no_grad};

/// Seven prompt templates that perform on ImageNet like the full set of 80 (FLIP, appendix A; CLIP's prompt notebook).
pub const TEMPLATES: [&str; 7] = [
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
];
/// The k of the recalls at k.
const RECALL_AT: [i64; 3] = [1, 5, 10];
/// Maximum number of similarities in memory at a time (256 MB in fp64).
const MAX_SIMILARITIES: i64 = 32 << 20;

/// Options of an evaluation with captions.
#[derive(Clone, Debug)]
pub struct CaptionEvalOptions {
    pub model: ModelSource,
    /// URL of the test set.
    pub test: String,
    pub task: Task,
    /// Path of the tokenizer, if it differs from that in the checkpoint's config.
    pub tokenizer: Option<String>,
}

/// An evaluation task.
#[derive(Clone, Debug)]
pub enum Task {
    /// Classification by the similarity of image and class name.
    ZeroShot {
        /// A file with a class name per line; by default the names of the set.
        classes: Option<PathBuf>,
        /// A file with a template per line, with {} for the name; by default [`TEMPLATES`].
        templates: Option<PathBuf>,
    },
    /// Retrieval of captions by images and of images by captions.
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

/// The result of an evaluation with captions: the last line of standard output.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CaptionEvalReport {
    /// "pretrained" or "random".
    pub checkpoint: &'static str,
    /// Training steps of the checkpoint.
    pub step: u64,
    pub protocol: Protocol,
    #[serde(flatten)]
    pub metrics: CaptionMetrics,
    /// Number of test samples evaluated.
    pub n_test: i64,
    /// Number of samples that could not be decoded.
    pub n_skipped: i64,
    /// Number of ranks.
    pub ranks: usize,
}

/// The metrics of a task.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum CaptionMetrics {
    ZeroShot {
        /// Number of classes.
        classes: usize,
        /// Number of templates.
        templates: usize,
        top1: f64,
        top5: f64,
    },
    Retrieval {
        image_to_text: Recall,
        text_to_image: Recall,
    },
}

/// Fraction of queries whose match is among the 1, 5 and 10 most similar candidates.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Recall {
    pub r1: f64,
    pub r5: f64,
    pub r10: f64,
}

/// A model trained with captions, with its tokenizer.
struct CaptionModel {
    config: Config,
    method: Box<dyn Method>,
    flat: FlatParams,
    tokenizer: Arc<Tokenizer>,
}

/// The metrics with their counts over all ranks.
struct TaskResult {
    metrics: CaptionMetrics,
    evaluated: i64,
    skipped: i64,
}

/// The text inputs of zero-shot classification.
#[derive(Debug, Default)]
struct Prompts {
    classes: Vec<String>,
    templates: Vec<String>,
}

/// Evaluates a model trained with captions; collective, with the same result on every rank.
///
/// # Errors
/// [`ExitCode::Usage`](crate::error::ExitCode::Usage) if the model reads no captions or the set lacks what the task
/// needs; [`ExitCode::RankMismatch`](crate::error::ExitCode::RankMismatch) if ranks have different options, weights or
/// data; [`ExitCode::Corrupt`](crate::error::ExitCode::Corrupt) if too many samples cannot be decoded.
pub fn evaluate(options: &CaptionEvalOptions, world: &Arc<dyn World>) -> Result<CaptionEvalReport> {
    let LoadedModel { model, step, .. } = options.model.load(world.device())?;
    let SavedModel { mut config, method, flat, .. } = model;
    if let (Some(caption), Some(file)) = (&mut config.view.caption, &options.tokenizer) {
        caption.tokenizer = file.clone();
    }
    let tokenizer = setup::open_tokenizer(&config)?.ok_or_else(|| no_captions_error(config.method.name()))?;
    let protocol = options.task.protocol();
    let is_retrieval = protocol == Protocol::Retrieval;
    let set = if is_retrieval {
        Arc::new(Mixture::from_set(DataSet::open(&options.test)?))
    } else {
        samples::open_labeled(&options.test)?
    };
    setup::check_captions(&set.sets()[0], is_retrieval)?;
    let prompts = read_prompts(&options.task, &set)?;
    let texts = [
        ("protocol", format!("{protocol:?}")),
        ("classes and templates", ranks::short_hash(format!("{prompts:?}").as_bytes())),
        ("tokenizer", tokenizer.digest().to_owned()),
        ("test set", ranks::short_hash(&set.digest())),
    ];
    ranks::check_ranks_agree(world.as_ref(), &config, &flat.master, &texts)?;
    let mut ranks = Ranks::join(world, config.world.heartbeat_timeout_s, config.world.collective_timeout_s)?;
    let model = CaptionModel { config, method, flat, tokenizer };
    let result =
        if is_retrieval { model.retrieval(&set, &mut ranks)? } else { model.zero_shot(&set, &prompts, &mut ranks)? };
    if result.evaluated == 0 {
        return Err(no_samples_error(&options.test));
    }
    let size = ranks.size();
    ranks.finish();
    Ok(CaptionEvalReport {
        checkpoint: options.model.weights_label(),
        step,
        protocol,
        metrics: result.metrics,
        n_test: result.evaluated,
        n_skipped: result.skipped,
        ranks: size,
    })
}

/// Reads class names and templates; empty for a task without them.
fn read_prompts(task: &Task, set: &Mixture) -> Result<Prompts> {
    let Task::ZeroShot { classes, templates } = task else { return Ok(Prompts::default()) };
    let classes = match classes {
        Some(path) => read_lines(path)?,
        None => set.sets()[0].classes.clone(),
    };
    let templates = match templates {
        Some(path) => read_lines(path)?,
        None => TEMPLATES.map(str::to_owned).to_vec(),
    };
    if classes.is_empty() {
        return Err(Error::usage("the set has no class names; give --classes FILE, one name per line"));
    }
    if templates.is_empty() {
        return Err(Error::usage("there is no template; give one per line, such as: a photo of a {}."));
    }
    if let Some(template) = templates.iter().find(|template| !template.contains("{}")) {
        return Err(Error::usage(format!("the template `{template}` has no {{}} for the name of a class")));
    }
    Ok(Prompts { classes, templates })
}

/// Reads the lines of a file that are not empty.
fn read_lines(path: &Path) -> Result<Vec<String>> {
    let text = std::fs::read_to_string(path).map_err(|error| Error::usage(format!("{}: {error}", path.display())))?;
    Ok(text.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned).collect())
}

impl CaptionModel {
    fn image_text(&self) -> Result<&dyn ImageText> {
        self.method.capabilities().image_text.ok_or_else(|| no_captions_error(self.config.method.name()))
    }

    /// Returns the unit embeddings of images, [R, E] on the CPU.
    fn encode_images(&self, rows: &LoadedRows) -> Result<Tensor> {
        let pixels = rows.to_device(0..rows.ids.len(), self.flat.master.device())?;
        let keys: Vec<SampleKey> = rows.ids.iter().map(|&id| SampleKey { id, epoch: 0, repeat: 0 }).collect();
        let batch = Batch::new(pixels, &keys, self.config.train.seed);
        no_grad(|| self.image_text()?.encode_image(&self.flat.leaves, &batch)).map(|x| x.to_device(Device::Cpu))
    }

    /// Returns the unit embeddings of token ids [R, L], [R, E] on the CPU.
    fn encode_texts(&self, ids: &Tensor) -> Result<Tensor> {
        let ids = ids.to_device(self.flat.master.device());
        no_grad(|| self.image_text()?.encode_text(&self.flat.leaves, &ids)).map(|x| x.to_device(Device::Cpu))
    }

    /// Returns a unit embedding per class [C, E]: the normalized mean over the templates.
    fn encode_classes(&self, prompts: &Prompts, ranks: &mut Ranks) -> Result<Tensor> {
        let mut embeddings = Vec::new();
        for class in &prompts.classes {
            let texts = prompts.templates.iter().map(|template| template.replace("{}", class));
            let ids: Vec<i64> = texts.map(|text| self.tokenizer.encode(&text)).collect::<Result<Vec<_>>>()?.concat();
            let ids = Tensor::from_slice(&ids).view([prompts.templates.len() as i64, -1]);
            let mean = self.encode_texts(&ids)?.mean_dim(0, false, Kind::Float);
            embeddings.push(&mean / mean.norm().clamp_min(1e-12));
            ranks.mark_progress();
        }
        Ok(Tensor::stack(&embeddings, 0))
    }

    fn zero_shot(&self, set: &Arc<Mixture>, prompts: &Prompts, ranks: &mut Ranks) -> Result<TaskResult> {
        let class_embeddings = self.encode_classes(prompts, ranks)?;
        let classes = prompts.classes.len() as i64;
        let mut evaluated = 0;
        let mut correct_first = 0;
        let mut correct_any = 0;
        self.for_each_batch(set, None, ranks, |rows| {
            let labels = rows.side.labels.as_ref().expect("a labeled set");
            let max_label = labels.max().int64_value(&[]);
            if max_label >= classes {
                return Err(Error::usage(format!(
                    "a sample has the label {max_label}, and {classes} classes are named; name all of them, in order"
                )));
            }
            let similarities = dot_products(&self.encode_images(rows)?, &class_embeddings);
            let predictions = similarities.topk(classes.min(5), 1, true, true).1;
            let correct = predictions.eq_tensor(&labels.unsqueeze(1)).to_kind(Kind::Int64);
            correct_first += correct.narrow(1, 0, 1).sum(Kind::Int64).int64_value(&[]);
            correct_any += correct.sum(Kind::Int64).int64_value(&[]);
            evaluated += labels.numel() as i64;
            Ok(())
        })?;
        let skipped = samples::local_len(set, ranks) as i64 - evaluated;
        let [correct_first, correct_any, evaluated, skipped] =
            ranks.sum_counts([correct_first, correct_any, evaluated, skipped])?;
        let metrics = CaptionMetrics::ZeroShot {
            classes: prompts.classes.len(),
            templates: prompts.templates.len(),
            top1: fraction(correct_first, evaluated),
            top5: fraction(correct_any, evaluated),
        };
        Ok(TaskResult { metrics, evaluated, skipped })
    }

    fn retrieval(&self, set: &Arc<Mixture>, ranks: &mut Ranks) -> Result<TaskResult> {
        let mut images = Vec::new();
        let empty = Tensor::zeros([0, self.tokenizer.context_length() as i64], (Kind::Int64, Device::Cpu));
        let mut ids = vec![empty];
        self.for_each_batch(set, Some(self.tokenizer.clone()), ranks, |rows| {
            images.push(self.encode_images(rows)?);
            ids.push(rows.side.captions.as_ref().expect("captions were requested").copy());
            Ok(())
        })?;
        let ids = Tensor::cat(&ids, 0);
        let rows = ids.size()[0];
        let lengths = Vec::<i64>::try_from(ranks.all_gather(&Tensor::from_slice(&[rows]))?)?;
        let offset: i64 = lengths[..ranks.rank()].iter().sum();
        let images = all_gather_blocks(&images, ranks)?;
        let texts = self.encode_unique_texts(&ranks.all_gather(&ids)?, ranks)?;
        let image_hits = ranks.sum_counts(count_hits(&images.narrow(0, offset, rows), &texts, offset))?;
        let text_hits = ranks.sum_counts(count_hits(&texts.narrow(0, offset, rows), &images, offset))?;
        let skipped = samples::local_len(set, ranks) as i64 - rows;
        let [evaluated, skipped] = ranks.sum_counts([rows, skipped])?;
        let metrics = CaptionMetrics::Retrieval {
            image_to_text: Recall::from_hits(image_hits, evaluated),
            text_to_image: Recall::from_hits(text_hits, evaluated),
        };
        Ok(TaskResult { metrics, evaluated, skipped })
    }

    /// Returns the unit embeddings [R, E] of token ids [R, L], which must be equal on all ranks; collective. Each
    /// distinct caption is encoded once, so that equal captions have similarities that are equal to the bit.
    fn encode_unique_texts(&self, ids: &Tensor, ranks: &mut Ranks) -> Result<Tensor> {
        let (unique, index, _) = ids.unique_dim(0, true, true, false);
        let blocks = unique.split(ENCODER_BATCH as i64, 0);
        let local = rank_rows(blocks.len() as u64, ranks.rank(), ranks.size());
        let mut embeddings = Vec::new();
        for block in &blocks[local.start as usize..local.end as usize] {
            embeddings.push(self.encode_texts(block)?);
            ranks.mark_progress();
        }
        Ok(all_gather_blocks(&embeddings, ranks)?.index_select(0, &index))
    }

    /// Calls `visit` with each batch of this rank's part of the set in the evaluation view, except empty ones.
    fn for_each_batch(
        &self,
        set: &Arc<Mixture>,
        tokenizer: Option<Arc<Tokenizer>>,
        ranks: &mut Ranks,
        mut visit: impl FnMut(&LoadedRows) -> Result<()>,
    ) -> Result<()> {
        let samples = samples::local_len(set, ranks);
        let mut progress = ProgressReporter::new("test set", samples, ranks.is_rank0());
        let grid = self.method.model().patchify().grid;
        let loader = samples::sequential_with_captions(set, tokenizer, &self.config, grid, ranks)?;
        for (rows, step) in loader.zip(1..) {
            let rows = rows?;
            if !rows.ids.is_empty() {
                visit(&rows)?;
            }
            ranks.mark_progress();
            progress.update((step * ENCODER_BATCH).min(samples), "");
        }
        Ok(())
    }
}

impl Recall {
    fn from_hits(hits: [i64; 3], queries: i64) -> Recall {
        let [r1, r5, r10] = hits.map(|count| fraction(count, queries));
        Recall { r1, r5, r10 }
    }
}

fn fraction(count: i64, total: i64) -> f64 {
    count as f64 / total.max(1) as f64
}

/// Returns the rows of the blocks [.., E] of all ranks, in rank order, on every rank; collective.
fn all_gather_blocks(blocks: &[Tensor], ranks: &mut Ranks) -> Result<Tensor> {
    // A rank without blocks gets the width from the others.
    let width = ranks.all_reduce_max(blocks.first().map_or(0, |x| x.size()[1]))?;
    if blocks.is_empty() {
        return ranks.all_gather(&Tensor::zeros([0, width], (Kind::Float, Device::Cpu)));
    }
    ranks.all_gather(&Tensor::cat(blocks, 0))
}

/// Counts the queries [R, E] whose match is among the 1, 5 and 10 most similar of the candidates [G, E]; the match of
/// query i is candidate `offset` + i. Among equal similarities the lower index ranks higher, so that a model that maps
/// everything to one point finds nothing.
fn count_hits(queries: &Tensor, candidates: &Tensor, offset: i64) -> [i64; 3] {
    let mut counts = [0; 3];
    let chunk = (MAX_SIMILARITIES / candidates.size()[0].max(1)).clamp(1, 1024);
    for start in (0..queries.size()[0]).step_by(chunk as usize) {
        let rows = chunk.min(queries.size()[0] - start);
        let similarity = dot_products(&queries.narrow(0, start, rows), candidates); // [r, G]
        let first = offset + start;
        let matches = Tensor::arange_start(first, first + rows, (Kind::Int64, Device::Cpu)).unsqueeze(1);
        let score = similarity.gather(1, &matches, false);
        let is_before =
            Tensor::arange(candidates.size()[0], (Kind::Int64, Device::Cpu)).unsqueeze(0).lt_tensor(&matches);
        let ranks_higher =
            similarity.gt_tensor(&score).logical_or(&similarity.eq_tensor(&score).logical_and(&is_before));
        let position = ranks_higher.sum_dim_intlist([1i64].as_slice(), false, Kind::Int64);
        for (count, k) in counts.iter_mut().zip(RECALL_AT) {
            *count += position.lt(k).sum(Kind::Int64).int64_value(&[]);
        }
    }
    counts
}
