//! FLIP against open_clip: loss and gradients; and against itself on several ranks.

use crate::parity;
use crate::step::{LR, SOON};
use crate::support::{Outcome, distance, normal, root};
use occlude::config::Config;
use occlude::device::World;
use occlude::device::solo::{Solo, threads};
use occlude::fault::Code;
use occlude::grid::Input;
use occlude::method::{Batch, Method, flip};
use occlude::op::shuffle::Origin;
use occlude::optim::{flat::Flat, update, update::Updater};
use occlude::part::encoder::position;
use occlude::rng::{Draw, Purpose};
use occlude::run::pace::{Ahead, Share};
use occlude::run::step::Stepper;
use serde_json::{Value, json};
use std::sync::Arc;
use tch::{Device, Kind, Tensor, no_grad};

crate::trials![
    the_papers_towers_agree_with_open_clip,
    three_quarters_hidden_of_a_wide_image_agree_with_open_clip,
    clips_towers_agree_with_open_clip,
    nothing_hidden_agrees_with_open_clip,
    captions_with_tokens_hidden_agree_with_open_clip,
    the_token_that_speaks_is_seen_and_padding_is_hidden_first,
    a_mask_of_captions_that_does_not_fit_is_refused,
    one_to_four_ranks_see_one_batch,
    captions_go_along_with_steps_ahead,
    captions_that_change_their_length_are_refused,
    one_rank_alone_is_captured,
    the_scale_is_held_between_one_and_a_hundred,
    ranks_without_equal_shares_are_told_apart,
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

fn the_papers_towers_agree_with_open_clip() -> Outcome {
    let (image, text) = ([36, 2, 3], [28, 3, 7]);
    Case { size: (42, 42), patch: 6, image, text, embed: 20, batch: 5, ..tiny("plain") }.check()
}

fn three_quarters_hidden_of_a_wide_image_agree_with_open_clip() -> Outcome {
    let (image, text) = ([44, 3, 11], [20, 1, 2]);
    Case { size: (24, 56), patch: 8, image, text, embed: 12, ratio: 0.75, batch: 3, ..tiny("plain") }.check()
}

fn clips_towers_agree_with_open_clip() -> Outcome {
    let (image, text) = ([60, 2, 5], [24, 2, 3]);
    Case { size: (30, 42), patch: 6, image, text, embed: 16, batch: 7, ..tiny("clip") }.check()
}

fn nothing_hidden_agrees_with_open_clip() -> Outcome {
    let (image, text) = ([24, 1, 2], [16, 2, 4]);
    Case { size: (20, 20), patch: 4, image, text, embed: 8, ratio: 0.0, batch: 4, ..tiny("plain") }.check()
}

fn captions_with_tokens_hidden_agree_with_open_clip() -> Outcome {
    for (towers, prioritised) in [("plain", true), ("plain", false), ("clip", true), ("clip", false)] {
        let (image, text) = ([24, 1, 2], [20, 2, 2]);
        let words = json!({"ratio": 0.5, "prioritised": prioritised, "padding": 3});
        Case { size: (20, 20), patch: 4, image, text, embed: 8, ratio: 0.5, towers, batch: 6, words }.check()?;
    }
    Ok(())
}

/// Nine tokens of which four stay, of captions of one to nine tokens.
fn the_token_that_speaks_is_seen_and_padding_is_hidden_first() -> Outcome {
    let rows: Vec<[i64; 9]> =
        (1..=9).map(|length| std::array::from_fn(|at| if at < length { 10 + at as i64 } else { 3 })).collect();
    let ids = Tensor::from_slice(&rows.concat()).view([9, 9]);
    let speaker = |towers, row: usize| if towers == "plain" { 0 } else { row as i64 };
    for (towers, prioritised) in [("plain", true), ("plain", false), ("clip", true), ("clip", false)] {
        let words = json!({"ratio": 0.5, "prioritised": prioritised, "padding": 3});
        let pair = Case { words, ..tiny(towers) }.method().pair;
        let mut seen = [[0; 9]; 9];
        for epoch in 0..60 {
            let origins: Vec<Origin> = (0..9).map(|id| Origin { id, epoch, repeat: 0 }).collect();
            let keep = pair.words(&ids, 9, &Origin::table(&origins, Device::Cpu)).expect("some are hidden");
            assert_eq!(keep.size(), [9, 4]);
            for (row, seen) in seen.iter_mut().enumerate() {
                let keep: Vec<i64> = Vec::try_from(keep.get(row as i64))?;
                assert!(keep.windows(2).all(|pair| pair[0] < pair[1]), "{towers}: {keep:?} in order");
                assert!(keep.contains(&speaker(towers, row)), "{towers}: {keep:?} without the token that speaks");
                let words = keep.iter().filter(|&&at| at <= row as i64).count();
                assert!(!prioritised || words == 4.min(row + 1), "{towers}: {keep:?} of {} words", row + 1);
                keep.iter().for_each(|&at| seen[at as usize] += 1);
            }
        }
        // Of nine tokens each but the one that speaks stays in three eighths of the epochs.
        let others = (0..9).filter(|&at| at as i64 != speaker(towers, 8)).map(|at| seen[8][at]);
        assert!(others.clone().all(|times| (9..38).contains(&times)), "{towers}: {:?}", seen[8]);
    }
    Ok(())
}

fn a_mask_of_captions_that_does_not_fit_is_refused() -> Outcome {
    for (words, told) in [
        (json!({"ratio": 0.95}), "method.flip.text.mask.ratio is 0.95, which keeps 0 of 16 tokens"),
        (json!({"ratio": 0.0}), "method.flip.text.mask.ratio is 0, which keeps 16 of 16"),
        (json!({"ration": 0.5}), "did you mean `ratio`?"),
    ] {
        let path = root().join("configs/tiny/flip.json");
        let fault = Config::read(&path, &[format!("method.flip.text.mask={words}")]).expect_err("refused");
        assert!(fault.code == Code::Usage && fault.message.contains(told), "{fault}");
    }
    Ok(())
}

/// Two blocks each, for pictures of 16 by 16.
pub fn tiny(towers: &'static str) -> Case {
    let (image, text) = ([16, 2, 2], [16, 2, 2]);
    Case { size: (16, 16), patch: 4, image, text, embed: 8, ratio: 0.5, towers, batch: 4, words: Value::Null }
}

impl Case {
    pub fn method(&self) -> flip::Flip {
        let (height, width) = self.size;
        let input = Input {
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
            "encoder": shape(self.image), "mask": {"ratio": self.ratio}, "embed": self.embed, "towers": self.towers,
            "text": {"shape": shape(self.text), "vocabulary": VOCABULARY, "length": LENGTH, "mask": self.words},
        });
        flip::Flip::new(&serde_json::from_value(config).expect("numbers"), &input).expect("a method")
    }

    fn check(&self) -> Outcome {
        let method = self.method();
        let grid = *method.grid();
        let flat = parity::moved(&method)?;
        let batch = batch(&normal(1, &[self.batch, 3, 1, self.size.0, self.size.1]));
        let mask = method.mask(&batch);
        let captions = batch.text.as_ref().expect("captions");
        let words = method.pair.words(captions, batch.seed, &batch.origins);
        let mut asked: Vec<(String, Tensor)> = vec![
            ("input".into(), batch.pixels.squeeze_dim(2)),
            ("text".into(), captions.shallow_clone()),
            ("order".into(), Tensor::cat(&[&mask.keep, &mask.drop], 1)),
            ("positions".into(), position::sine_cosine(&grid, self.image[0])),
        ];
        asked.extend(words.map(|words| ("words".into(), words)));
        let reply = parity::reply(&["flip.py"], &flat, &parity::ours, asked, &self.theirs())?;

        let loss = &method.loss(&flat.leaves, &batch)?[0].sum / self.batch;
        parity::loss(loss.double_value(&[]), &reply["loss.0"], 0);
        loss.backward();
        parity::gradients(&flat, "grad.0.", &reply, &parity::ours);
        let image = no_grad(|| method.match_images(&flat.leaves, &batch))?;
        let caption = no_grad(|| method.match_captions(&flat.leaves, batch.captions().expect("captions")))?;
        for (what, ours) in [("image", image), ("caption", caption)] {
            let off = (ours - &reply[what]).abs().max().double_value(&[]);
            assert!(off <= 2e-6, "{what}: whole samples are off by {off:e}");
        }
        Ok(())
    }

    fn theirs(&self) -> Value {
        let ([width, depth, heads], [text_width, text_depth, text_heads]) = (self.image, self.text);
        json!({
            "size": [self.size.0, self.size.1], "patch": self.patch, "width": width, "depth": depth, "heads": heads,
            "text_width": text_width, "text_depth": text_depth, "text_heads": text_heads, "embed": self.embed,
            "ratio": self.ratio, "towers": self.towers, "vocabulary": VOCABULARY, "length": LENGTH,
        })
    }
}

/// Pixels [B, C, 1, Y, X] with a caption each, of which one token is the greatest.
pub fn batch(pixels: &Tensor) -> Batch {
    let rows = pixels.size()[0];
    let mut draw = Draw::new(4, 5, 0, Purpose::Order, 0);
    let mut ids: Vec<i64> = (0..rows * LENGTH).map(|_| draw.below(VOCABULARY as u64 - 1) as i64).collect();
    (0..rows).for_each(|row| ids[(row * LENGTH) as usize + draw.below(LENGTH as u64) as usize] = VOCABULARY - 1);
    let origins: Vec<Origin> = (0..rows as u64).map(|id| Origin { id, epoch: 0, repeat: 0 }).collect();
    let text = Tensor::from_slice(&ids).view([rows, LENGTH]);
    Batch::new(pixels.shallow_clone(), &origins, 9).with_text(Some(text))
}

/// The loss and the gradient of twelve samples, on this rank of `world`.
fn seen_from(world: Arc<dyn World>) -> (f64, Tensor) {
    tch::set_num_threads(1);
    let (image, text) = ([24, 2, 2], [20, 2, 2]);
    let case = Case { size: (20, 24), patch: 4, image, text, embed: 12, batch: 12, ..tiny("plain") };
    let method = case.method();
    let flat = parity::moved(&method).expect("weights");
    let optim: update::Config = serde_json::from_value(json!({"lr": 1e-3})).expect("numbers");
    let updater = Updater::new(&flat, &optim);
    let all = batch(&normal(6, &[case.batch, 3, 1, 20, 24]));
    let rows = case.batch as usize / world.size();
    let first = world.rank() * rows;
    let own = all.part(first..first + rows).expect("rows");
    // Small buckets, so that gradients are reduced while the gather's way back is still to come.
    let mut stepper = Stepper::new(Box::new(method), flat, updater, world, 1 << 10, SOON).expect("a stepper");
    let mut gradient = Tensor::new();
    let outcome = stepper.step(&[own], 1e-3, |stepper, _| {
        gradient = stepper.flat.gradient.copy();
        Ok(())
    });
    (outcome.expect("a step").loss, gradient)
}

fn one_to_four_ranks_see_one_batch() -> Outcome {
    let (loss, gradient) = seen_from(Arc::new(Solo::new(Device::Cpu)));
    for ranks in [1, 2, 3, 4] {
        for (rank, (other, theirs)) in threads(ranks, seen_from).into_iter().enumerate() {
            let off = (other - loss).abs() / loss;
            assert!(off <= 1e-5, "{ranks} ranks, rank {rank}: loss {other} against {loss}");
            let off = distance(&theirs, &gradient) / gradient.norm().double_value(&[]);
            assert!(off <= 1e-5, "{ranks} ranks, rank {rank}: the gradient is off by {off:e} of itself");
        }
    }
    Ok(())
}

/// Pairs of a global batch.
pub const PAIRS: u64 = 12;

/// This rank's share of them; every step has others.
pub fn share(step: u64, world: &dyn World) -> Share {
    let all = batch(&normal(6 + step, &[PAIRS as i64, 3, 1, 16, 16]));
    let rows = PAIRS as usize / world.size();
    let own = world.rank() * rows..(world.rank() + 1) * rows;
    let part = all.part(own.clone()).expect("rows");
    let origins = own.map(|id| Origin { id: id as u64, epoch: step, repeat: 0 }).collect();
    Share { pixels: part.pixels, origins, text: part.text, valid: None, seed: 9, micro: rows }
}

pub fn stepper(towers: &'static str, world: Arc<dyn World>) -> Stepper {
    crate::step::stepper(tiny(towers).method(), world, Kind::Float, 1 << 10)
}

fn captions_go_along_with_steps_ahead() -> Outcome {
    let alone: Arc<dyn World> = Arc::new(Solo::new(Device::Cpu));
    let mut watched = stepper("plain", alone.clone());
    let step = |step| {
        let batches = share(step, alone.as_ref()).batches(Device::Cpu).expect("a batch");
        watched.step(&batches, LR, |_, _| Ok(())).expect("a step").loss
    };
    let wanted: Vec<f64> = (0..4).map(step).collect();
    assert!(wanted.windows(2).all(|pair| pair[0] != pair[1]), "captions of its own to every step");
    for size in [1, 2, 3] {
        let told = threads(size, |world| {
            let mut stepper = stepper("plain", world.clone());
            let mut ahead = Ahead::new(PAIRS, &stepper, &world).expect("a pace");
            let step = |step| ahead.step(&mut stepper, &share(step, world.as_ref()), LR).expect("a step");
            let mut told: Vec<_> = (0..4).flat_map(step).collect();
            told.extend(ahead.settle(&stepper).expect("the last"));
            told.into_iter().map(|outcome| outcome.loss).collect::<Vec<_>>()
        });
        for ours in told {
            let same = ours.iter().zip(&wanted).all(|(ours, wanted)| (ours - wanted).abs() <= 1e-5 * wanted);
            assert!(same && ours.len() == 4, "{size} ranks: {ours:?} for {wanted:?}");
        }
    }
    Ok(())
}

fn captions_that_change_their_length_are_refused() -> Outcome {
    let world: Arc<dyn World> = Arc::new(Solo::new(Device::Cpu));
    let mut stepper = stepper("plain", world.clone());
    let mut ahead = Ahead::new(PAIRS, &stepper, &world)?;
    let _ = ahead.step(&mut stepper, &share(0, world.as_ref()), LR)?;
    for text in [None, Some(Tensor::zeros([PAIRS as i64, LENGTH - 1], (Kind::Int64, Device::Cpu)))] {
        let other = Share { text, ..share(1, world.as_ref()) };
        let fault = ahead.step(&mut stepper, &other, LR).expect_err("other captions");
        assert!(fault.message.contains(&format!("captions [{PAIRS}, {LENGTH}] Int64")), "{fault}");
    }
    Ok(())
}

fn one_rank_alone_is_captured() -> Outcome {
    let capturable = |world| stepper("plain", world).method.capturable();
    assert_eq!(threads(1, capturable), [Ok(())]);
    assert!(threads(2, capturable).iter().all(|told| told.is_err_and(|why| why.contains("from all ranks"))));
    let wide = Case { size: (260, 260), ..tiny("plain") };
    assert!(wide.method().capturable().is_err_and(|why| why.contains("drawn on the host")));
    let whole = Case { ratio: 0.0, ..wide };
    assert_eq!(whole.method().capturable(), Ok(()), "there is no mask to draw");
    Ok(())
}

fn the_scale_is_held_between_one_and_a_hundred() -> Outcome {
    let (image, text) = ([16, 1, 2], [16, 1, 2]);
    let case = Case { size: (16, 16), patch: 4, image, text, embed: 8, batch: 4, ..tiny("plain") };
    let method = case.method();
    let flat = Flat::new(method.table(), 3, Kind::Float, Device::Cpu)?;
    let at = flat.specs.iter().position(|spec| spec.name == "logit_scale").expect("a scale");
    assert!((flat.part(&flat.master, at).double_value(&[0, 0]) - (1.0f64 / 0.07).ln()).abs() < 1e-6);
    let batch = batch(&normal(1, &[4, 3, 1, 16, 16]));
    let mut losses = Vec::new();
    for (value, moves) in [(2.0, true), (100f64.ln() + 1.0, false), (100f64.ln(), true), (-1.0, false), (0.0, true)] {
        let _ = no_grad(|| flat.part(&flat.master, at).fill_(value));
        let _ = flat.gradient.shallow_clone().zero_();
        let loss = method.loss(&flat.leaves, &batch)?.remove(0).sum;
        loss.backward();
        let gradient = flat.part(&flat.gradient, at).double_value(&[0, 0]);
        assert_eq!(gradient != 0.0, moves, "at {value} the gradient is {gradient}");
        losses.push(loss.double_value(&[]));
    }
    assert!((losses[1] - losses[2]).abs() <= 1e-5 * losses[2] && (losses[3] - losses[4]).abs() <= 1e-5 * losses[4]);
    Ok(())
}

fn ranks_without_equal_shares_are_told_apart() -> Outcome {
    // Ranks that bring different numbers of rows are found out by the channel, whatever the config let through.
    let refused = threads(2, |world| {
        let ranks = occlude::part::loss::gather::Gather::join(&world, SOON).expect("a channel");
        let fault =
            ranks.all(&Tensor::zeros([2 + world.rank() as i64, 3], (Kind::Float, Device::Cpu))).expect_err("uneven");
        fault.code
    });
    assert!(refused.iter().all(|code| *code == occlude::fault::Code::Disagree), "{refused:?}");
    Ok(())
}
