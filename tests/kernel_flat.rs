//! The kernels over flat buffers and sample streams: masks to the last number, the update, the average, the norm.

use crate::bar::{grounds, judge};
use crate::support::{Outcome, normal, oracle};
use occlude::grid::Grid;
use occlude::op::adamw::{self, AdamW, Buffers, Table};
use occlude::op::lerp::{self, Share};
use occlude::op::shuffle::{self, Blocks, Origin, Plan, mask, shuffle};
use occlude::op::square_sum;
use occlude::part::mask::Mask;
use occlude::rng::{Draw, Purpose};
use std::collections::BTreeSet;
use std::ops::Range;
use tch::{Device, Kind, Tensor};

crate::trials![
    masks_of_the_kernel_are_those_of_the_reference,
    a_random_mask_is_the_token_order_cut_in_two,
    a_tube_hides_the_same_places_in_every_frame,
    a_coarse_mask_hides_whole_units,
    axes_keep_where_a_kept_row_meets_a_kept_column,
    blocks_are_those_of_the_reference_implementation,
    blocks_leave_what_they_miss_to_chance,
    a_plan_that_does_not_fit_is_refused,
    five_updates_over_flat_buffers_agree,
    an_update_that_is_not_applied_changes_nothing,
    an_average_moves_by_a_number_or_by_a_value,
    squares_are_summed_in_one_order,
    a_sum_of_squares_of_anything_not_finite_is_not_finite,
];

const CPU: (Kind, Device) = (Kind::Float, Device::Cpu);

fn grid(frames: i64, rows: i64, cols: i64) -> Grid {
    Grid { frames, rows, cols, channels: 3, patch_frames: 1, patch: 16 }
}

fn origins(count: u64) -> Vec<Origin> {
    let id = |i: u64| i.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (0..count).map(|i| Origin { id: id(i + 1), epoch: (1 << 20) + i, repeat: (i % 3) as u32 }).collect()
}

fn beit() -> Blocks {
    Blocks { goal: 75, least: 16, most: 75, tries: 10, aspect: 0.3 }
}

/// The tokens of each row, as sets.
fn rows(tokens: &Tensor) -> Vec<BTreeSet<i64>> {
    let all = Vec::<Vec<i64>>::try_from(tokens).expect("numbers");
    all.into_iter().map(|row| row.into_iter().collect()).collect()
}

fn masks_of_the_kernel_are_those_of_the_reference() -> Outcome {
    let cubes = Blocks { goal: 157, least: 9, most: 49, tries: 100, aspect: 0.3 };
    let (picture, clip, sound) = (grid(1, 14, 14), grid(8, 14, 14), grid(1, 64, 8));
    let mut plans = vec![
        ("tube", Plan::random(&clip, [8, 1, 1], 20)?, 3),
        ("tokens of a clip", Plan::random(&clip, [1; 3], 157)?, 1),
        ("units of a picture", Plan::random(&picture, [1, 2, 2], 17)?, 3),
        ("blocks", Plan::blocks(&picture, [1; 3], 121, beit())?, 33),
        ("many blocks", Plan::blocks(&picture, [1; 3], 49, Blocks { goal: 120, most: 60, tries: 1000, ..beit() })?, 5),
        ("narrow blocks", Plan::blocks(&grid(1, 5, 13), [1; 3], 20, Blocks { least: 1, aspect: 0.004, ..beit() })?, 9),
        ("cubes", Plan::blocks(&clip, [1, 2, 2], 235, cubes)?, 5),
        ("axes", Plan::axes(&sound, 44, 5)?, 3),
        ("axes of a line", Plan::axes(&grid(1, 1, 64), 1, 10)?, 1),
        ("axes of a clip", Plan::axes(&grid(3, 5, 7), 3, 2)?, 3),
    ];
    for tokens in [1, 50, 65, 99, 160, 197, 1568] {
        plans.push(("tokens", Plan::random(&grid(1, 1, tokens), [1; 3], tokens / 4)?, 3));
    }
    for ground in grounds() {
        for (what, plan, batch) in &plans {
            let origins = Origin::table(&origins(*batch), ground);
            let (ours, wanted) =
                (shuffle::kernel(plan, u64::MAX - 5, &origins)?, shuffle::formula(plan, u64::MAX - 5, &origins));
            for (part, ours, wanted) in [
                ("keep", ours.keep, wanted.keep),
                ("drop", ours.drop, wanted.drop),
                ("restore", ours.restore, wanted.restore),
            ] {
                assert!(ours.equal(&wanted), "{part} of {what}, {plan:?} on {ground:?}");
            }
        }
    }
    Ok(())
}

fn a_random_mask_is_the_token_order_cut_in_two() -> Outcome {
    let samples = origins(3);
    let order = shuffle(7, &samples, 65, Device::Cpu);
    let indices = mask(&Plan::random(&grid(1, 5, 13), [1; 3], 16)?, 7, &Origin::table(&samples, Device::Cpu))?;
    assert!(Tensor::cat(&[&indices.keep, &indices.drop], 1).equal(&order));
    assert_eq!(indices.keep.size(), [3, 16]);
    assert!(indices.restore.equal(&order.argsort(1, false)));
    let plan = Plan::random(&grid(1, 5, 13), [1; 3], 16)?;
    let (drawn, cut) = (Mask::drawn(&plan, 7, &Origin::table(&samples, Device::Cpu)), Mask::from_order(&order, 16));
    assert!(drawn.keep.equal(&cut.keep) && drawn.drop.equal(&cut.drop) && drawn.restore().equal(&cut.restore()));
    Ok(())
}

fn a_tube_hides_the_same_places_in_every_frame() -> Outcome {
    let plan = Plan::random(&grid(4, 5, 7), [4, 1, 1], 9)?;
    let indices = mask(&plan, 1, &Origin::table(&origins(4), Device::Cpu))?;
    let kept = rows(&indices.keep);
    for row in &kept {
        let places: BTreeSet<i64> = row.iter().map(|token| token % 35).collect();
        assert_eq!((row.len(), places.len()), (36, 9));
        assert!((0..4).all(|frame| places.iter().all(|place| row.contains(&(frame * 35 + place)))));
    }
    assert_ne!(kept[0], kept[1]);
    Ok(())
}

fn a_coarse_mask_hides_whole_units() -> Outcome {
    let plan = Plan::random(&grid(1, 14, 14), [1, 2, 2], 17)?;
    for row in rows(&mask(&plan, 1, &Origin::table(&origins(4), Device::Cpu))?.keep) {
        let unit = |token: &i64| token / 28 * 7 + token % 14 / 2;
        assert_eq!((row.len(), row.iter().map(unit).collect::<BTreeSet<_>>().len()), (68, 17));
    }
    Ok(())
}

fn axes_keep_where_a_kept_row_meets_a_kept_column() -> Outcome {
    let indices = mask(&Plan::axes(&grid(1, 64, 8), 44, 5)?, 1, &Origin::table(&origins(4), Device::Cpu))?;
    assert_eq!(indices.drop.size(), [4, 512 - 220]);
    for row in rows(&indices.keep) {
        let lines: BTreeSet<i64> = row.iter().map(|token| token / 8).collect();
        let columns: BTreeSet<i64> = row.iter().map(|token| token % 8).collect();
        assert_eq!((row.len(), lines.len(), columns.len()), (220, 44, 5));
    }
    Ok(())
}

/// What of 3,000 masks is compared: neighbours that are both hidden, those hidden in the middle 6 × 6, of the border.
fn features(hidden: &[BTreeSet<i64>]) -> [f64; 3] {
    let mut sums = [0.0; 3];
    for row in hidden {
        let both = |token: &i64, next: i64| f64::from(u8::from(row.contains(&(token + next))));
        for token in row {
            let (r, c) = (token / 14, token % 14);
            sums[0] += both(token, 14) + if c < 13 { both(token, 1) } else { 0.0 };
            sums[1] += f64::from(u8::from((4..10).contains(&r) && (4..10).contains(&c)));
            sums[2] += f64::from(u8::from(r == 0 || c == 0 || r == 13 || c == 13));
        }
    }
    sums.map(|sum| sum / hidden.len() as f64)
}

fn blocks_are_those_of_the_reference_implementation() -> Outcome {
    let plan = Plan::blocks(&grid(1, 14, 14), [1; 3], 121, beit())?;
    let ours = features(&rows(&mask(&plan, 1, &Origin::table(&origins(3000), Device::Cpu))?.drop));
    let theirs: Vec<f64> = serde_json::from_str(&oracle("blocks.py", &["3000"])?)?;
    for ((what, ours), theirs) in ["neighbours", "middle", "border"].iter().zip(ours).zip(theirs) {
        assert!((ours / theirs - 1.0).abs() < 0.03, "{what}: {ours} against {theirs}");
    }
    Ok(())
}

fn blocks_leave_what_they_miss_to_chance() -> Outcome {
    // Blocks of up to 6 units cannot hide 60 of 65 in one try each; those that stay are what is asked for all the same.
    let few = Blocks { goal: 60, least: 4, most: 6, tries: 1, aspect: 0.5 };
    let plan = Plan::blocks(&grid(1, 5, 13), [1; 3], 5, few)?;
    let drop = rows(&mask(&plan, 3, &Origin::table(&origins(20), Device::Cpu))?.drop);
    assert!(drop.iter().all(|row| row.len() == 60));
    // Where fewer go than blocks hide, what goes is a part of the blocks.
    let whole = Plan::blocks(&grid(1, 14, 14), [1; 3], 121, Blocks { tries: 1000, ..beit() })?;
    let part = Plan::blocks(&grid(1, 14, 14), [1; 3], 150, Blocks { tries: 1000, ..beit() })?;
    let [whole, part] = [whole, part].map(|plan| mask(&plan, 3, &Origin::table(&origins(20), Device::Cpu)));
    for (whole, part) in rows(&whole?.drop).into_iter().zip(rows(&part?.drop)) {
        assert!(part.len() == 46 && part.is_subset(&whole));
    }
    Ok(())
}

fn a_plan_that_does_not_fit_is_refused() -> Outcome {
    let g = grid(2, 14, 14);
    for (plan, words) in [
        (Plan::random(&g, [1, 3, 1], 4), "do not fill a grid of [2, 14, 14]"),
        (Plan::random(&g, [2, 2, 2], 50), "50 units are to be kept of 49"),
        (Plan::axes(&g, 15, 3), "15 rows and 3 columns"),
        (Plan::blocks(&g, [1; 3], 4, Blocks { least: 80, ..beit() }), "least at most `most`"),
    ] {
        let fault = plan.expect_err(words);
        assert!(fault.code == occlude::fault::Code::Usage && fault.message.contains(words), "{fault}");
    }
    let large = Plan::random(&grid(1, 80, 80), [1; 3], 100)?;
    let fault = shuffle::kernel(&large, 0, &Origin::table(&origins(1), Device::Cpu)).expect_err("too many");
    assert!(fault.message.contains("up to 4096"), "{fault}");
    // A stream's place in the reference is its place in the order of tokens.
    let mut draw = Draw::new(5, 6, 7, Purpose::Mask, 8);
    assert_eq!(large.order(&mut draw.clone()), draw.order(6400));
    Ok(())
}

const SIZES: [i64; 5] = [1, 527, 128, 3, 1031];
const BETAS: (f64, f64) = (0.9, 0.999);

/// Where tensors of SIZES lie; the buffers end with the last of them, in the middle of four elements.
fn places() -> Vec<Range<usize>> {
    let mut at = 0usize;
    SIZES.map(|n| (at..at + n as usize, at = (at + n as usize).next_multiple_of(128)).0).to_vec()
}

struct State {
    weight: Tensor,
    first: Tensor,
    second: Tensor,
}

/// Values at the tensors' places, and zeros between them, as flat buffers have it.
fn spread(seed: u64, device: Device) -> Tensor {
    let n = places().last().expect("a tensor").end as i64;
    let all = Tensor::zeros([n], CPU);
    for place in places() {
        let (begin, length) = (place.start as i64, place.len() as i64);
        all.narrow(0, begin, length).copy_(&normal(seed, &[n]).narrow(0, begin, length));
    }
    all.to_device(device)
}

fn state(device: Device, kind: Kind) -> State {
    let n = places().last().expect("a tensor").end as i64;
    let zeros = || Tensor::zeros([n], (kind, device));
    State { weight: spread(1, device).to_kind(kind), first: zeros(), second: zeros() }
}

fn five_updates_over_flat_buffers_agree() -> Outcome {
    let (kinds, decays) = (
        [(Kind::Float, None), (Kind::BFloat16, Some(Kind::BFloat16)), (Kind::Float, Some(Kind::Half))],
        [true, false, true, false, true],
    );
    for ground in grounds() {
        for (gradient_kind, low) in kinds {
            let ours = state(ground, Kind::Float);
            let [mut plain, mut exact] = [Kind::Float, Kind::Double].map(|kind| state(ground, kind));
            let n = ours.weight.numel();
            let steps = Tensor::zeros([5], (Kind::Float, ground));
            let mut table = Table::new(&places(), &decays, n, &steps);
            let compute = low.map(|kind| ours.weight.to_kind(kind));
            for step in 1..=5 {
                let gradient = spread(10 + step as u64, ground).to_kind(gradient_kind);
                let lr = 1e-3 * step as f64;
                // The second tensor gets no gradient at first.
                let late = if step > 2 { 1f32 } else { 0.0 };
                table.used = Tensor::from_slice(&[1f32, late, 1.0, 1.0, 1.0]).to_device(ground);
                let buffers = Buffers {
                    master: &ours.weight,
                    first: &ours.first,
                    second: &ours.second,
                    gradient: &gradient,
                    compute: compute.as_ref(),
                };
                adamw::kernel(buffers, &table, &adamw::control(lr, 0.1, 0.5, true, ground), BETAS, 1e-8)?;
                for (tensor, place) in places().iter().enumerate() {
                    let moved = step - if tensor == 1 { 2 } else { 0 };
                    if moved < 1 {
                        continue;
                    }
                    let weight_decay = if decays[tensor] { 0.1 } else { 0.0 };
                    let with = AdamW { lr, betas: BETAS, weight_decay, eps: 1e-8 };
                    for state in [&mut plain, &mut exact] {
                        let part = |of: &Tensor| of.narrow(0, place.start as i64, place.len() as i64);
                        let (mut w, mut m, mut v) = (part(&state.weight), part(&state.first), part(&state.second));
                        let g = part(&gradient).to_kind(w.kind()) * 0.5;
                        adamw::formula(&mut w, &g, &mut m, &mut v, moved, with);
                    }
                }
                let what = |part: &str| format!("{part} after {step} updates by {gradient_kind:?} on {ground:?}");
                judge(&what("weight"), &ours.weight, &plain.weight, &exact.weight);
                judge(&what("first moment"), &ours.first, &plain.first, &exact.first);
                judge(&what("second moment"), &ours.second, &plain.second, &exact.second);
                let low = compute.as_ref().map(|compute| compute.equal(&ours.weight.to_kind(compute.kind())));
                assert_ne!(low, Some(false), "{}", what("the narrow copy"));
            }
            assert_eq!(Vec::<f32>::try_from(&steps)?, [5.0, 3.0, 5.0, 5.0, 5.0], "updates are counted");
        }
    }
    Ok(())
}

fn an_update_that_is_not_applied_changes_nothing() -> Outcome {
    for ground in grounds() {
        let (ours, before) = (state(ground, Kind::Float), state(ground, Kind::Float));
        let n = ours.weight.numel();
        let steps = Tensor::full([5], 3.0, (Kind::Float, ground));
        let table = Table::new(&places(), &[true; 5], n, &steps);
        let gradient = Tensor::full([n as i64], f64::NAN, (Kind::Float, ground));
        let compute = Tensor::zeros([n as i64], (Kind::BFloat16, ground));
        let (master, first, second) = (&ours.weight, &ours.first, &ours.second);
        let buffers = Buffers { master, first, second, gradient: &gradient, compute: Some(&compute) };
        let control = adamw::control(f64::NAN, 0.1, f64::NAN, false, ground);
        adamw::kernel(buffers, &table, &control, BETAS, 1e-8)?;
        assert!(master.equal(&before.weight) && first.equal(&before.first) && second.equal(&before.second));
        assert!(compute.equal(&compute.zeros_like()) && steps.equal(&(steps.ones_like() * 3.0)));
    }
    Ok(())
}

fn an_average_moves_by_a_number_or_by_a_value() -> Outcome {
    for ground in grounds() {
        for n in [1, 4, 67, 1031] {
            let (begin, current) = (normal(3, &[n]).to_device(ground), normal(4, &[n]).to_device(ground));
            for share in [0.0, 0.001, 0.5, 0.9, 1.0] {
                let value = Tensor::from_slice(&[share as f32]).to_device(ground);
                let wide = |x: &Tensor| x.to_kind(Kind::Double);
                let exact = lerp::formula(&wide(&begin), &wide(&current), share);
                for how in [Share::Number(share), Share::Value(&value)] {
                    let ours = begin.copy();
                    lerp::kernel(&ours, &current, how)?;
                    judge(&format!("{share} of {n}"), &ours, &lerp::formula(&begin, &current, share), &exact);
                    assert!(share != 0.0 || ours.equal(&begin));
                    assert!(share != 1.0 || ours.equal(&current));
                }
            }
        }
        let ours = normal(3, &[9]).to_device(ground);
        lerp::kernel(&ours, &(&ours * f64::NAN), Share::Value(&Tensor::zeros([1], (Kind::Float, ground))))?;
        assert!(ours.equal(&normal(3, &[9]).to_device(ground)), "a share of 0 looks at nothing");
    }
    Ok(())
}

fn squares_are_summed_in_one_order() -> Outcome {
    for ground in grounds() {
        for kind in [Kind::Float, Kind::BFloat16] {
            for n in [0, 1, 3, 1027, 9001, 40_007] {
                let x = normal(13, &[n]).to_device(ground).to_kind(kind);
                let ours = square_sum::kernel(&x)?;
                let exact = square_sum::formula(&x.to_kind(Kind::Double));
                let what = format!("{n} of {kind:?} on {ground:?}");
                assert_eq!((ours.size(), ours.kind()), (vec![], Kind::Float), "{what}");
                let off = (ours.double_value(&[]) - exact.double_value(&[])).abs();
                assert!(off <= 5e-7 * exact.double_value(&[]), "{what}: off by {off:e}");
                assert!(square_sum::kernel(&x)?.equal(&ours), "{what}: another sum");
            }
        }
        // A part that begins in the middle of 16 bytes, and one with gaps.
        let x = normal(14, &[6, 101]).to_device(ground);
        for part in [x.view(-1).narrow(0, 3, 500), x.narrow(1, 5, 50), x.transpose(0, 1)] {
            let (ours, wanted) = (square_sum::kernel(&part)?, square_sum::formula(&part.to_kind(Kind::Double)));
            assert!((ours.double_value(&[]) / wanted.double_value(&[]) - 1.0).abs() < 5e-7);
        }
    }
    Ok(())
}

fn a_sum_of_squares_of_anything_not_finite_is_not_finite() -> Outcome {
    for ground in grounds() {
        for kind in [Kind::Float, Kind::BFloat16] {
            for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
                for at in [0, 511, 9001] {
                    let x = Tensor::ones([9002], CPU).to_kind(kind).to_device(ground);
                    let _ = x.get(at).fill_(bad);
                    let sum = square_sum::kernel(&x)?.double_value(&[]);
                    assert!(!sum.is_finite(), "{bad} at {at} gives {sum}");
                }
            }
        }
    }
    Ok(())
}
