//! Tests of FLIP against open_clip (loss and gradients), and on several ranks against one.

use crate::support::method_ext::MethodExt;
use crate::support::parity;
use crate::support::tolerance::assert_near_reference;
use crate::support::{Outcome, distance, normal, root};
use crate::train::step::{LR, SOON};
use occlude::config::Config;
use occlude::dist::World;
use occlude::dist::solo::{SoloWorld, run_on_threads};
use occlude::error::ExitCode;
use occlude::grid::InputConfig;
use occlude::method::{Batch, flip};
use occlude::op::shuffle::SampleKey;
use occlude::optim::{flat::FlatParams, update, update::Updater};
use occlude::part::batch::Side;
use occlude::part::encoder::position;
use occlude::part::model::ImageText;
use occlude::rng::{Philox, Purpose};
use occlude::train::step::Stepper;
use occlude::train::step_mode::{LocalBatch, StepPipeline, can_capture};
use serde_json::{Value, json};
use std::sync::Arc;
use tch::{Device, Kind, Tensor, no_grad};

crate::trials![
    flip_towers_match_open_clip,
    a_wide_image_at_ratio_0_75_matches_open_clip,
    clip_towers_match_open_clip,
    ratio_0_matches_open_clip,
    masked_captions_match_open_clip,
    the_pooled_token_is_visible_and_padding_is_hidden_first,
    a_mismatched_caption_mask_is_rejected,
    one_to_four_ranks_share_one_contrastive_batch,
    pipelined_steps_carry_captions,
    captions_of_changing_length_are_rejected,
    only_a_single_rank_is_capturable,
    the_logit_scale_is_clamped_between_1_and_100,
    unequal_local_batches_are_rejected,
];

pub struct Case {
    size: (i64, i64),
    patch: i64,
    /// Width, depth and heads of the image tower and of the text tower.
    image: [i64; 3],
    text: [i64; 3],
    embed: i64,
    ratio: f64,
    towers: &'static str,
    batch: i64,
    /// `text.mask`.
    pub words: Value,
}

const VOCABULARY: i64 = 101;
const LENGTH: i64 = 9;

fn flip_towers_match_open_clip() -> Outcome {
    let image = [36, 2, 3];
    let text = [28, 3, 7];
    Case { size: (42, 42), patch: 6, image, text, embed: 20, batch: 5, ..tiny("flip") }.check()
}

fn a_wide_image_at_ratio_0_75_matches_open_clip() -> Outcome {
    let image = [44, 3, 11];
    let text = [20, 1, 2];
    Case { size: (24, 56), patch: 8, image, text, embed: 12, ratio: 0.75, batch: 3, ..tiny("flip") }.check()
}

fn clip_towers_match_open_clip() -> Outcome {
    let image = [60, 2, 5];
    let text = [24, 2, 3];
    Case { size: (30, 42), patch: 6, image, text, embed: 16, batch: 7, ..tiny("clip") }.check()
}

fn ratio_0_matches_open_clip() -> Outcome {
    let image = [24, 1, 2];
    let text = [16, 2, 4];
    Case { size: (20, 20), patch: 4, image, text, embed: 8, ratio: 0.0, batch: 4, ..tiny("flip") }.check()
}

fn masked_captions_match_open_clip() -> Outcome {
    for (towers, padding_first) in [("flip", true), ("flip", false), ("clip", true), ("clip", false)] {
        let image = [24, 1, 2];
        let text = [20, 2, 2];
        let words = json!({"ratio": 0.5, "padding_first": padding_first, "padding": 3});
        Case { size: (20, 20), patch: 4, image, text, embed: 8, ratio: 0.5, towers, batch: 6, words }.check()?;
    }
    Ok(())
}

/// Nine tokens of which four are kept, for captions of one to nine tokens.
fn the_pooled_token_is_visible_and_padding_is_hidden_first() -> Outcome {
    let rows: Vec<[i64; 9]> =
        (1..=9).map(|length| std::array::from_fn(|at| if at < length { 10 + at as i64 } else { 3 })).collect();
    let ids = Tensor::from_slice(&rows.concat()).view([9, 9]);
    let speaker = |towers, row: usize| if towers == "flip" { 0 } else { row as i64 };
    for (towers, padding_first) in [("flip", true), ("flip", false), ("clip", true), ("clip", false)] {
        let words = json!({"ratio": 0.5, "padding_first": padding_first, "padding": 3});
        let pair = Case { words, ..tiny(towers) }.method().model;
        let mut visible = [[0; 9]; 9];
        for epoch in 0..60 {
            let keys: Vec<SampleKey> = (0..9).map(|id| SampleKey { id, epoch, repeat: 0 }).collect();
            let keep =
                pair.sample_visible_tokens(&ids, 9, &SampleKey::stack(&keys, Device::Cpu)).expect("some are hidden");
            assert_eq!(keep.size(), [9, 4]);
            for (row, visible) in visible.iter_mut().enumerate() {
                let keep: Vec<i64> = Vec::try_from(keep.get(row as i64))?;
                assert!(keep.windows(2).all(|pair| pair[0] < pair[1]), "{towers}: {keep:?} in order");
                assert!(keep.contains(&speaker(towers, row)), "{towers}: {keep:?} without the pooled token");
                let words = keep.iter().filter(|&&at| at <= row as i64).count();
                assert!(!padding_first || words == 4.min(row + 1), "{towers}: {keep:?} of {} words", row + 1);
                keep.iter().for_each(|&at| visible[at as usize] += 1);
            }
        }
        // Each of nine tokens but the pooled one is kept in three eighths of the epochs.
        let others = (0..9).filter(|&at| at as i64 != speaker(towers, 8)).map(|at| visible[8][at]);
        assert!(others.clone().all(|times| (9..38).contains(&times)), "{towers}: {:?}", visible[8]);
    }
    Ok(())
}

fn a_mismatched_caption_mask_is_rejected() -> Outcome {
    for (words, output) in [
        (json!({"ratio": 0.95}), "method.flip.text.mask.ratio is 0.95, which keeps 0 of 16 tokens"),
        (json!({"ratio": 0.0}), "method.flip.text.mask.ratio is 0, which keeps 16 of 16"),
        (json!({"ration": 0.5}), "did you mean `ratio`?"),
    ] {
        let path = root().join("configs/tiny/flip.json");
        let error = Config::read(&path, &[format!("method.flip.text.mask={words}")]).expect_err("refused");
        assert!(error.code == ExitCode::Usage && error.message.contains(output), "{error}");
    }
    Ok(())
}

/// Two blocks per tower, for images of 16 × 16.
pub fn tiny(towers: &'static str) -> Case {
    let image = [16, 2, 2];
    let text = [16, 2, 2];
    Case { size: (16, 16), patch: 4, image, text, embed: 8, ratio: 0.5, towers, batch: 4, words: Value::Null }
}

impl Case {
    pub fn method(&self) -> flip::Flip {
        let (height, width) = self.size;
        let input = InputConfig {
            channels: 3,
            frames: 1,
            height,
            width,
            patch: self.patch,
            patch_frames: 1,
            mean: vec![],
            std: vec![],
        };
        let shape = |[width, depth, heads]: [i64; 3]| json!({"width": width, "depth": depth, "heads": heads});
        let config = json!({
            "encoder": shape(self.image), "mask": {"ratio": self.ratio}, "embed_dim": self.embed, "towers": self.towers,
            "text": {"shape": shape(self.text), "vocab_size": VOCABULARY, "context_length": LENGTH, "mask": self.words},
        });
        flip::Flip::new(&serde_json::from_value(config).expect("numbers"), &input).expect("a method")
    }

    fn check(&self) -> Outcome {
        let method = self.method();
        let grid = method.grid();
        let flat = parity::perturbed_weights(&method)?;
        let batch = batch(&normal(1, &[self.batch, 3, 1, self.size.0, self.size.1]));
        let mask = method.sample_mask(&batch);
        let captions = batch.captions()?;
        let words = method.model.sample_visible_tokens(captions, batch.seed, &batch.keys);
        let mut request: Vec<(String, Tensor)> = vec![
            ("input".into(), batch.view().squeeze_dim(2)),
            ("text".into(), captions.shallow_clone()),
            ("order".into(), Tensor::cat(&[&mask.keep, &mask.drop], 1)),
            ("positions".into(), position::sincos_2d(&grid, self.image[0])),
        ];
        request.extend(words.map(|words| ("words".into(), words)));
        let reply = parity::oracle_reply(&["flip.py"], &flat, &parity::same_name, request, &self.reference_config())?;

        let loss = &method.terms(&flat.leaves, &batch)?[0].sum / self.batch;
        parity::assert_loss_matches(loss.double_value(&[]), &reply, 0);
        loss.backward();
        parity::assert_gradients_match(&flat, "grad.0.", &reply, &parity::same_name);
        let image = no_grad(|| method.model.encode_image(&flat.leaves, &batch))?;
        let caption = no_grad(|| method.model.encode_text(&flat.leaves, batch.captions()?))?;
        for (label, ours) in [("image", image), ("caption", caption)] {
            assert_near_reference(&reply, label, &ours, 2e-6);
        }
        Ok(())
    }

    fn reference_config(&self) -> Value {
        let [width, depth, heads] = self.image;
        let [text_width, text_depth, text_heads] = self.text;
        json!({
            "size": [self.size.0, self.size.1], "patch": self.patch, "width": width, "depth": depth, "heads": heads,
            "text_width": text_width, "text_depth": text_depth, "text_heads": text_heads, "embed_dim": self.embed,
            "ratio": self.ratio, "towers": self.towers, "vocab_size": VOCABULARY, "context_length": LENGTH,
        })
    }
}

/// Pixels [B, C, 1, Y, X] with one caption each; one token id of a caption is the greatest.
pub fn batch(pixels: &Tensor) -> Batch {
    let rows = pixels.size()[0];
    let mut draw = Philox::new(4, 5, 0, Purpose::Order, 0);
    let mut ids: Vec<i64> = (0..rows * LENGTH).map(|_| draw.uniform_int(VOCABULARY as u64 - 1) as i64).collect();
    (0..rows).for_each(|row| ids[(row * LENGTH) as usize + draw.uniform_int(LENGTH as u64) as usize] = VOCABULARY - 1);
    let keys: Vec<SampleKey> = (0..rows as u64).map(|id| SampleKey { id, epoch: 0, repeat: 0 }).collect();
    let captions = Tensor::from_slice(&ids).view([rows, LENGTH]);
    Batch::new(pixels.shallow_clone(), &keys, 9).with_side(Side { captions: Some(captions), ..Side::default() })
}

/// Returns the loss and the gradient of twelve samples, on this rank of `world`.
fn loss_and_gradient(world: Arc<dyn World>) -> (f64, Tensor) {
    tch::set_num_threads(1);
    let image = [24, 2, 2];
    let text = [20, 2, 2];
    let case = Case { size: (20, 24), patch: 4, image, text, embed: 12, batch: 12, ..tiny("flip") };
    let method = case.method();
    let flat = parity::perturbed_weights(&method).expect("weights");
    let optim: update::Config = serde_json::from_value(json!({"lr": 1e-3})).expect("numbers");
    let updater = Updater::new(&flat, &optim);
    let all = batch(&normal(6, &[case.batch, 3, 1, 20, 24]));
    let rows = case.batch as usize / world.size();
    let first = world.rank() * rows;
    let local = all.slice(first..first + rows).expect("rows");
    // Small buckets, so that gradients are reduced before the backward pass of the gather.
    let mut stepper = Stepper::new(Box::new(method), flat, updater, world, 1 << 10, SOON).expect("a stepper");
    let mut gradient = Tensor::new();
    let outcome = stepper.step(&[local], 1e-3, |stepper, _| {
        gradient = stepper.flat.grad.copy();
        Ok(())
    });
    (outcome.expect("a step").loss, gradient)
}

fn one_to_four_ranks_share_one_contrastive_batch() -> Outcome {
    let (loss, gradient) = loss_and_gradient(Arc::new(SoloWorld::new(Device::Cpu)));
    for ranks in [1, 2, 3, 4] {
        for (rank, (other, theirs)) in run_on_threads(ranks, loss_and_gradient).into_iter().enumerate() {
            let difference = (other - loss).abs() / loss;
            assert!(difference <= 1e-5, "{ranks} ranks, rank {rank}: loss {other} against {loss}");
            let difference = distance(&theirs, &gradient) / gradient.norm().double_value(&[]);
            assert!(
                difference <= 1e-5,
                "{ranks} ranks, rank {rank}: the gradient has a relative error of {difference:e}"
            );
        }
    }
    Ok(())
}

/// Pairs of a global batch.
pub const PAIRS: u64 = 12;

/// Returns the local batch of this rank; every step has other samples.
pub fn local_batch(step: u64, world: &dyn World) -> LocalBatch {
    let all = batch(&normal(6 + step, &[PAIRS as i64, 3, 1, 16, 16]));
    let rows = PAIRS as usize / world.size();
    let local = world.rank() * rows..(world.rank() + 1) * rows;
    let part = all.slice(local.clone()).expect("rows");
    let keys = local.map(|id| SampleKey { id: id as u64, epoch: step, repeat: 0 }).collect();
    LocalBatch { views: part.views, keys, side: part.side, seed: 9, micro_batch: rows }
}

pub fn stepper(towers: &'static str, world: Arc<dyn World>) -> Stepper {
    crate::train::step::stepper(tiny(towers).method(), world, Kind::Float, 1 << 10)
}

fn pipelined_steps_carry_captions() -> Outcome {
    let alone: Arc<dyn World> = Arc::new(SoloWorld::new(Device::Cpu));
    let mut synchronous = stepper("flip", alone.clone());
    let step = |step| {
        let batches = local_batch(step, alone.as_ref()).micro_batches(Device::Cpu).expect("a batch");
        synchronous.step(&batches, LR, |_, _| Ok(())).expect("a step").loss
    };
    let expected: Vec<f64> = (0..4).map(step).collect();
    assert!(expected.windows(2).all(|pair| pair[0] != pair[1]), "each step has its own captions");
    for size in [1, 2, 3] {
        let output = run_on_threads(size, |world| {
            let mut stepper = stepper("flip", world.clone());
            let mut pipeline = StepPipeline::new(PAIRS, &stepper, &world).expect("a pipelined step mode");
            let step = |step| pipeline.step(&mut stepper, &local_batch(step, world.as_ref()), LR).expect("a step");
            let mut output: Vec<_> = (0..4).flat_map(step).collect();
            output.extend(pipeline.flush(&stepper).expect("the last"));
            output.into_iter().map(|outcome| outcome.loss).collect::<Vec<_>>()
        });
        for ours in output {
            let same = ours.iter().zip(&expected).all(|(ours, expected)| (ours - expected).abs() <= 1e-5 * expected);
            assert!(same && ours.len() == 4, "{size} ranks: {ours:?} for {expected:?}");
        }
    }
    Ok(())
}

fn captions_of_changing_length_are_rejected() -> Outcome {
    let world: Arc<dyn World> = Arc::new(SoloWorld::new(Device::Cpu));
    let mut stepper = stepper("flip", world.clone());
    let mut pipeline = StepPipeline::new(PAIRS, &stepper, &world)?;
    let _ = pipeline.step(&mut stepper, &local_batch(0, world.as_ref()), LR)?;
    for text in [None, Some(Tensor::zeros([PAIRS as i64, LENGTH - 1], (Kind::Int64, Device::Cpu)))] {
        let side = Side { captions: text, ..Side::default() };
        let other = LocalBatch { side, ..local_batch(1, world.as_ref()) };
        let error = pipeline.step(&mut stepper, &other, LR).expect_err("other captions");
        assert!(error.message.contains(&format!("[{PAIRS}, {LENGTH}] Int64, seed")), "{error}");
    }
    Ok(())
}

fn only_a_single_rank_is_capturable() -> Outcome {
    let capturable = |world: Arc<dyn World>| {
        let method = tiny("flip").method();
        can_capture(&method, world.as_ref())
    };
    assert_eq!(run_on_threads(1, capturable), [Ok(())]);
    assert!(run_on_threads(2, capturable).iter().all(|output| output.is_err_and(|why| why.contains("from all ranks"))));
    let wide = Case { size: (260, 260), ..tiny("flip") };
    let world = SoloWorld::new(Device::Cpu);
    assert!(can_capture(&wide.method(), &world).is_err_and(|why| why.contains("sampled on the host")));
    let full = Case { ratio: 0.0, ..wide };
    assert_eq!(can_capture(&full.method(), &world), Ok(()), "there is no mask to sample");
    Ok(())
}

fn the_logit_scale_is_clamped_between_1_and_100() -> Outcome {
    let image = [16, 1, 2];
    let text = [16, 1, 2];
    let case = Case { size: (16, 16), patch: 4, image, text, embed: 8, batch: 4, ..tiny("flip") };
    let method = case.method();
    let flat = FlatParams::new(method.params(), 3, Kind::Float, Device::Cpu)?;
    let scale = flat.specs.iter().position(|spec| spec.name == "logit_scale").expect("a scale");
    assert!((flat.param_view(&flat.master, scale).double_value(&[0, 0]) - (1.0f64 / 0.07).ln()).abs() < 1e-6);
    let batch = batch(&normal(1, &[4, 3, 1, 16, 16]));
    let mut losses = Vec::new();
    for (value, moves) in [(2.0, true), (100f64.ln() + 1.0, false), (100f64.ln(), true), (-1.0, false), (0.0, true)] {
        let _ = no_grad(|| flat.param_view(&flat.master, scale).fill_(value));
        let _ = flat.grad.shallow_clone().zero_();
        let loss = method.terms(&flat.leaves, &batch)?.remove(0).sum;
        loss.backward();
        let gradient = flat.param_view(&flat.grad, scale).double_value(&[0, 0]);
        assert_eq!(gradient != 0.0, moves, "at {value} the gradient is {gradient}");
        losses.push(loss.double_value(&[]));
    }
    assert!((losses[1] - losses[2]).abs() <= 1e-5 * losses[2] && (losses[3] - losses[4]).abs() <= 1e-5 * losses[4]);
    Ok(())
}

fn unequal_local_batches_are_rejected() -> Outcome {
    // Ranks with different numbers of rows are detected by the channel, whatever the config allowed.
    let refused = run_on_threads(2, |world| {
        let ranks = occlude::part::gather::AllGather::open(&world, SOON).expect("a channel");
        let error = ranks
            .forward(&Tensor::zeros([2 + world.rank() as i64, 3], (Kind::Float, Device::Cpu)))
            .expect_err("uneven");
        error.code
    });
    assert!(refused.iter().all(|code| *code == occlude::error::ExitCode::RankMismatch), "{refused:?}");
    Ok(())
}
