//! Tests of the kernels over flat buffers and sample streams: masks (exactly), the update, the moving average, the
//! norm.

use crate::support::tolerance::{assert_within_tolerance, kernel_devices};
use crate::support::{Outcome, normal, oracle};
use occlude::grid::Grid;
use occlude::op::adamw::{self, AdamWBuffers, AdamWOptions, TensorState};
use occlude::op::lerp::{self, LerpWeight};
use occlude::op::noise;
use occlude::op::shuffle::{self, BlockOptions, MaskPlan, SampleKey, sample_mask, shuffle};
use occlude::op::square_sum;
use occlude::part::mask::Mask;
use occlude::rng::{Philox, Purpose};
use std::collections::BTreeSet;
use std::ops::Range;
use tch::{Device, Kind, Tensor};

crate::trials![
    mask_kernels_match_the_reference,
    a_random_mask_splits_the_token_order,
    a_tube_mask_hides_the_same_patches_in_every_frame,
    a_coarse_mask_hides_whole_units,
    axis_masks_keep_intersections_of_kept_rows_and_columns,
    block_masks_match_the_reference_implementation,
    noise_kernels_match_the_reference,
    noise_is_uniform_and_independent_of_purpose,
    block_masks_fill_the_rest_at_random,
    a_mismatched_mask_plan_is_rejected,
    five_updates_of_flat_buffers_match,
    an_update_with_apply_off_changes_nothing,
    lerp_accepts_a_number_or_a_tensor,
    square_sum_has_a_fixed_order,
    square_sum_of_non_finite_values_is_not_finite,
];

const CPU: (Kind, Device) = (Kind::Float, Device::Cpu);

fn grid(frames: i64, rows: i64, cols: i64) -> Grid {
    Grid { frames, rows, cols, channels: 3, patch_frames: 1, patch: 16 }
}

fn origins(count: u64) -> Vec<SampleKey> {
    let id = |i: u64| i.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (0..count).map(|i| SampleKey { id: id(i + 1), epoch: (1 << 20) + i, repeat: (i % 3) as u32 }).collect()
}

fn beit() -> BlockOptions {
    BlockOptions { target: 75, min_area: 16, max_area: 75, max_tries: 10, min_aspect: 0.3 }
}

/// Returns the tokens of each row, as sets.
fn rows(tokens: &Tensor) -> Vec<BTreeSet<i64>> {
    let all = Vec::<Vec<i64>>::try_from(tokens).expect("numbers");
    all.into_iter().map(|row| row.into_iter().collect()).collect()
}

fn noise_kernels_match_the_reference() -> Outcome {
    for device in kernel_devices() {
        for (samples, count) in [(1, 1), (3, 7), (5, 64), (260, 5)] {
            let keys = SampleKey::stack(&origins(samples), device);
            for purpose in [Purpose::Mask, Purpose::Filter] {
                let ours = noise::kernel(0x1234_5678_9ABC_DEF0, &keys, purpose, count)?;
                let reference = noise::formula(0x1234_5678_9ABC_DEF0, &keys, purpose, count);
                assert!(ours == reference, "{samples} × {count} on {device:?}");
            }
        }
    }
    Ok(())
}

fn noise_is_uniform_and_independent_of_purpose() -> Outcome {
    let keys = SampleKey::stack(&origins(2000), Device::Cpu);
    let filter = noise::noise(7, &keys, Purpose::Filter, 10)?;
    let mask = noise::noise(7, &keys, Purpose::Mask, 10)?;
    assert!(filter.min().double_value(&[]) >= 0.0 && filter.max().double_value(&[]) < 1.0);
    // 20,000 draws: the standard error of the mean is 0.002, of the variance 0.0005.
    assert!((filter.mean(Kind::Double).double_value(&[]) - 0.5).abs() < 0.01);
    assert!((filter.to_kind(Kind::Double).var(true).double_value(&[]) - 1.0 / 12.0).abs() < 0.003);
    let product = ((&filter - 0.5) * (&mask - 0.5)).mean(Kind::Double).double_value(&[]);
    assert!(product.abs() < 0.003, "{product}");
    Ok(())
}

fn mask_kernels_match_the_reference() -> Outcome {
    let cubes = BlockOptions { target: 157, min_area: 9, max_area: 49, max_tries: 100, min_aspect: 0.3 };
    let image = grid(1, 14, 14);
    let clip = grid(8, 14, 14);
    let audio = grid(1, 64, 8);
    let mut plans = vec![
        ("tube", MaskPlan::random(&clip, [8, 1, 1], 20)?, 3),
        ("tokens of a clip", MaskPlan::random(&clip, [1; 3], 157)?, 1),
        ("units of a picture", MaskPlan::random(&image, [1, 2, 2], 17)?, 3),
        ("blocks", MaskPlan::blocks(&image, [1; 3], 121, beit())?, 33),
        (
            "many blocks",
            MaskPlan::blocks(
                &image,
                [1; 3],
                49,
                BlockOptions { target: 120, max_area: 60, max_tries: 1000, ..beit() },
            )?,
            5,
        ),
        (
            "narrow blocks",
            MaskPlan::blocks(&grid(1, 5, 13), [1; 3], 20, BlockOptions { min_area: 1, min_aspect: 0.004, ..beit() })?,
            9,
        ),
        ("cubes", MaskPlan::blocks(&clip, [1, 2, 2], 235, cubes)?, 5),
        ("axes", MaskPlan::axes(&audio, 44, 5)?, 3),
        ("axes of a line", MaskPlan::axes(&grid(1, 1, 64), 1, 10)?, 1),
        ("axes of a clip", MaskPlan::axes(&grid(3, 5, 7), 3, 2)?, 3),
    ];
    for tokens in [1, 50, 65, 99, 160, 197, 1568] {
        plans.push(("tokens", MaskPlan::random(&grid(1, 1, tokens), [1; 3], tokens / 4)?, 3));
    }
    for device in kernel_devices() {
        for (label, plan, batch) in &plans {
            let origins = SampleKey::stack(&origins(*batch), device);
            let ours = shuffle::kernel(plan, u64::MAX - 5, &origins)?;
            let expected = shuffle::formula(plan, u64::MAX - 5, &origins);
            for (part, ours, expected) in [
                ("keep", ours.keep, expected.keep),
                ("drop", ours.drop, expected.drop),
                ("restore", ours.restore, expected.restore),
            ] {
                assert!(ours.equal(&expected), "{part} of {label}, {plan:?} on {device:?}");
            }
        }
    }
    Ok(())
}

fn a_random_mask_splits_the_token_order() -> Outcome {
    let samples = origins(3);
    let order = shuffle(7, &samples, 65, Device::Cpu);
    let indices =
        sample_mask(&MaskPlan::random(&grid(1, 5, 13), [1; 3], 16)?, 7, &SampleKey::stack(&samples, Device::Cpu))?;
    assert!(Tensor::cat(&[&indices.keep, &indices.drop], 1).equal(&order));
    assert_eq!(indices.keep.size(), [3, 16]);
    assert!(indices.restore.equal(&order.argsort(1, false)));
    let plan = MaskPlan::random(&grid(1, 5, 13), [1; 3], 16)?;
    let drawn = Mask::sample(&plan, 7, &SampleKey::stack(&samples, Device::Cpu));
    let cut = Mask::from_order(&order, 16);
    assert!(drawn.keep.equal(&cut.keep) && drawn.drop.equal(&cut.drop) && drawn.restore().equal(&cut.restore()));
    Ok(())
}

fn a_tube_mask_hides_the_same_patches_in_every_frame() -> Outcome {
    let plan = MaskPlan::random(&grid(4, 5, 7), [4, 1, 1], 9)?;
    let indices = sample_mask(&plan, 1, &SampleKey::stack(&origins(4), Device::Cpu))?;
    let kept = rows(&indices.keep);
    for row in &kept {
        let positions: BTreeSet<i64> = row.iter().map(|token| token % 35).collect();
        assert_eq!((row.len(), positions.len()), (36, 9));
        assert!((0..4).all(|frame| positions.iter().all(|range| row.contains(&(frame * 35 + range)))));
    }
    assert_ne!(kept[0], kept[1]);
    Ok(())
}

fn a_coarse_mask_hides_whole_units() -> Outcome {
    let plan = MaskPlan::random(&grid(1, 14, 14), [1, 2, 2], 17)?;
    for row in rows(&sample_mask(&plan, 1, &SampleKey::stack(&origins(4), Device::Cpu))?.keep) {
        let unit = |token: &i64| token / 28 * 7 + token % 14 / 2;
        assert_eq!((row.len(), row.iter().map(unit).collect::<BTreeSet<_>>().len()), (68, 17));
    }
    Ok(())
}

fn axis_masks_keep_intersections_of_kept_rows_and_columns() -> Outcome {
    let indices =
        sample_mask(&MaskPlan::axes(&grid(1, 64, 8), 44, 5)?, 1, &SampleKey::stack(&origins(4), Device::Cpu))?;
    assert_eq!(indices.drop.size(), [4, 512 - 220]);
    for row in rows(&indices.keep) {
        let lines: BTreeSet<i64> = row.iter().map(|token| token / 8).collect();
        let columns: BTreeSet<i64> = row.iter().map(|token| token % 8).collect();
        assert_eq!((row.len(), lines.len(), columns.len()), (220, 44, 5));
    }
    Ok(())
}

/// Statistics of 3,000 masks: neighbors that are both hidden, hidden patches in the middle 6 × 6, and at the border.
fn features(hidden: &[BTreeSet<i64>]) -> [f64; 3] {
    let mut sums = [0.0; 3];
    for row in hidden {
        let both = |token: &i64, next: i64| f64::from(u8::from(row.contains(&(token + next))));
        for token in row {
            let r = token / 14;
            let c = token % 14;
            sums[0] += both(token, 14) + if c < 13 { both(token, 1) } else { 0.0 };
            sums[1] += f64::from(u8::from((4..10).contains(&r) && (4..10).contains(&c)));
            sums[2] += f64::from(u8::from(r == 0 || c == 0 || r == 13 || c == 13));
        }
    }
    sums.map(|sum| sum / hidden.len() as f64)
}

fn block_masks_match_the_reference_implementation() -> Outcome {
    let plan = MaskPlan::blocks(&grid(1, 14, 14), [1; 3], 121, beit())?;
    let ours = features(&rows(&sample_mask(&plan, 1, &SampleKey::stack(&origins(3000), Device::Cpu))?.drop));
    let reference: Vec<f64> = serde_json::from_str(&oracle("blocks.py", &["3000"])?)?;
    for ((label, ours), reference) in ["neighbors", "middle", "border"].iter().zip(ours).zip(reference) {
        assert!((ours / reference - 1.0).abs() < 0.03, "{label}: {ours} against {reference}");
    }
    Ok(())
}

fn block_masks_fill_the_rest_at_random() -> Outcome {
    // Blocks of up to 6 units cannot hide 60 of 65 in one try each; the number of hidden tokens is still the requested
    // one.
    let few = BlockOptions { target: 60, min_area: 4, max_area: 6, max_tries: 1, min_aspect: 0.5 };
    let plan = MaskPlan::blocks(&grid(1, 5, 13), [1; 3], 5, few)?;
    let drop = rows(&sample_mask(&plan, 3, &SampleKey::stack(&origins(20), Device::Cpu))?.drop);
    assert!(drop.iter().all(|row| row.len() == 60));
    // If fewer tokens are dropped than the blocks hide, the dropped ones are part of the blocks.
    let full = MaskPlan::blocks(&grid(1, 14, 14), [1; 3], 121, BlockOptions { max_tries: 1000, ..beit() })?;
    let part = MaskPlan::blocks(&grid(1, 14, 14), [1; 3], 150, BlockOptions { max_tries: 1000, ..beit() })?;
    let [full, part] = [full, part].map(|plan| sample_mask(&plan, 3, &SampleKey::stack(&origins(20), Device::Cpu)));
    for (full, part) in rows(&full?.drop).into_iter().zip(rows(&part?.drop)) {
        assert!(part.len() == 46 && part.is_subset(&full));
    }
    Ok(())
}

fn a_mismatched_mask_plan_is_rejected() -> Outcome {
    let g = grid(2, 14, 14);
    for (plan, words) in [
        (MaskPlan::random(&g, [1, 3, 1], 4), "do not divide a grid of [2, 14, 14]"),
        (MaskPlan::random(&g, [2, 2, 2], 50), "cannot keep 50 of 49 units"),
        (MaskPlan::axes(&g, 15, 3), "15 rows and 3 columns"),
        (MaskPlan::blocks(&g, [1; 3], 4, BlockOptions { min_area: 80, ..beit() }), "min_area at most max_area"),
    ] {
        let error = plan.expect_err(words);
        assert!(error.code == occlude::error::ExitCode::Usage && error.message.contains(words), "{error}");
    }
    let large = MaskPlan::random(&grid(1, 80, 80), [1; 3], 100)?;
    let error = shuffle::kernel(&large, 0, &SampleKey::stack(&origins(1), Device::Cpu)).expect_err("too many");
    assert!(error.message.contains("at most 4096"), "{error}");
    // The position of a stream in the reference is its position in the order of tokens.
    let mut draw = Philox::new(5, 6, 7, Purpose::Mask, 8);
    assert_eq!(large.sample_order(&mut draw.clone()), draw.permutation(6400));
    Ok(())
}

const SIZES: [i64; 5] = [1, 527, 128, 3, 1031];
const BETAS: [f64; 2] = [0.9, 0.999];

/// Returns the ranges of tensors of SIZES; the buffers end with the last of them, in the middle of four elements.
fn ranges() -> Vec<Range<usize>> {
    let mut at = 0usize;
    SIZES.map(|n| (at..at + n as usize, at = (at + n as usize).next_multiple_of(128)).0).to_vec()
}

struct State {
    weight: Tensor,
    first: Tensor,
    second: Tensor,
}

/// Returns values in the ranges of the tensors, and zeros between them, as in flat buffers.
fn scatter_values(seed: u64, device: Device) -> Tensor {
    let n = ranges().last().expect("a tensor").end as i64;
    let all = Tensor::zeros([n], CPU);
    for range in ranges() {
        let begin = range.start as i64;
        let length = range.len() as i64;
        all.narrow(0, begin, length).copy_(&normal(seed, &[n]).narrow(0, begin, length));
    }
    all.to_device(device)
}

fn state(device: Device, kind: Kind) -> State {
    let n = ranges().last().expect("a tensor").end as i64;
    let zeros = || Tensor::zeros([n], (kind, device));
    State { weight: scatter_values(1, device).to_kind(kind), first: zeros(), second: zeros() }
}

fn five_updates_of_flat_buffers_match() -> Outcome {
    let kinds = [(Kind::Float, None), (Kind::BFloat16, Some(Kind::BFloat16)), (Kind::Float, Some(Kind::Half))];
    let decays = [true, false, true, false, true];
    for device in kernel_devices() {
        for (gradient_kind, low) in kinds {
            let ours = state(device, Kind::Float);
            let [mut plain, mut exact] = [Kind::Float, Kind::Double].map(|kind| state(device, kind));
            let n = ours.weight.numel();
            let steps = Tensor::zeros([5], (Kind::Float, device));
            let mut table = TensorState::new(&ranges(), &decays, n, &steps);
            let compute = low.map(|kind| ours.weight.to_kind(kind));
            for step in 1..=5 {
                let gradient = scatter_values(10 + step as u64, device).to_kind(gradient_kind);
                let lr = 1e-3 * step as f64;
                // The second tensor gets no gradient at first.
                let late = if step > 2 { 1f32 } else { 0.0 };
                table.used = Tensor::from_slice(&[1f32, late, 1.0, 1.0, 1.0]).to_device(device);
                let buffers = AdamWBuffers {
                    master: &ours.weight,
                    exp_avg: &ours.first,
                    exp_avg_sq: &ours.second,
                    gradient: &gradient,
                    compute_weights: compute.as_ref(),
                };
                adamw::kernel(buffers, &table, &adamw::control(lr, 0.1, 0.5, true, device), BETAS, 1e-8)?;
                for (tensor, range) in ranges().iter().enumerate() {
                    let moved = step - if tensor == 1 { 2 } else { 0 };
                    if moved < 1 {
                        continue;
                    }
                    let weight_decay = if decays[tensor] { 0.1 } else { 0.0 };
                    let with = AdamWOptions { lr, betas: BETAS, weight_decay, eps: 1e-8 };
                    for state in [&mut plain, &mut exact] {
                        let part = |of: &Tensor| of.narrow(0, range.start as i64, range.len() as i64);
                        let mut w = part(&state.weight);
                        let mut m = part(&state.first);
                        let mut v = part(&state.second);
                        let g = part(&gradient).to_kind(w.kind()) * 0.5;
                        adamw::formula(&mut w, &g, &mut m, &mut v, moved, with);
                    }
                }
                let label = |part: &str| format!("{part} after {step} updates by {gradient_kind:?} on {device:?}");
                assert_within_tolerance(&label("weight"), &ours.weight, &plain.weight, &exact.weight);
                assert_within_tolerance(&label("first moment"), &ours.first, &plain.first, &exact.first);
                assert_within_tolerance(&label("second moment"), &ours.second, &plain.second, &exact.second);
                let low = compute.as_ref().map(|compute| compute.equal(&ours.weight.to_kind(compute.kind())));
                assert_ne!(low, Some(false), "{}", label("the narrow copy"));
            }
            assert_eq!(Vec::<f32>::try_from(&steps)?, [5.0, 3.0, 5.0, 5.0, 5.0], "updates are counted");
        }
    }
    Ok(())
}

fn an_update_with_apply_off_changes_nothing() -> Outcome {
    for device in kernel_devices() {
        let ours = state(device, Kind::Float);
        let before = state(device, Kind::Float);
        let n = ours.weight.numel();
        let steps = Tensor::full([5], 3.0, (Kind::Float, device));
        let table = TensorState::new(&ranges(), &[true; 5], n, &steps);
        let gradient = Tensor::full([n as i64], f64::NAN, (Kind::Float, device));
        let compute = Tensor::zeros([n as i64], (Kind::BFloat16, device));
        let master = &ours.weight;
        let first = &ours.first;
        let second = &ours.second;
        let buffers = AdamWBuffers {
            master,
            exp_avg: first,
            exp_avg_sq: second,
            gradient: &gradient,
            compute_weights: Some(&compute),
        };
        let control = adamw::control(f64::NAN, 0.1, f64::NAN, false, device);
        adamw::kernel(buffers, &table, &control, BETAS, 1e-8)?;
        assert!(master.equal(&before.weight) && first.equal(&before.first) && second.equal(&before.second));
        assert!(compute.equal(&compute.zeros_like()) && steps.equal(&(steps.ones_like() * 3.0)));
    }
    Ok(())
}

fn lerp_accepts_a_number_or_a_tensor() -> Outcome {
    for device in kernel_devices() {
        for n in [1, 4, 67, 1031] {
            let begin = normal(3, &[n]).to_device(device);
            let current = normal(4, &[n]).to_device(device);
            for fraction in [0.0, 0.001, 0.5, 0.9, 1.0] {
                let value = Tensor::from_slice(&[fraction as f32]).to_device(device);
                let wide = |x: &Tensor| x.to_kind(Kind::Double);
                let exact = lerp::formula(&wide(&begin), &wide(&current), fraction);
                for how in [LerpWeight::Scalar(fraction), LerpWeight::Device(&value)] {
                    let ours = begin.copy();
                    lerp::kernel(&ours, &current, how)?;
                    assert_within_tolerance(
                        &format!("{fraction} of {n}"),
                        &ours,
                        &lerp::formula(&begin, &current, fraction),
                        &exact,
                    );
                    assert!(fraction != 0.0 || ours.equal(&begin));
                    assert!(fraction != 1.0 || ours.equal(&current));
                }
            }
        }
        let ours = normal(3, &[9]).to_device(device);
        lerp::kernel(&ours, &(&ours * f64::NAN), LerpWeight::Device(&Tensor::zeros([1], (Kind::Float, device))))?;
        assert!(ours.equal(&normal(3, &[9]).to_device(device)), "a weight of 0 reads nothing");
    }
    Ok(())
}

fn square_sum_has_a_fixed_order() -> Outcome {
    for device in kernel_devices() {
        for kind in [Kind::Float, Kind::BFloat16] {
            for n in [0, 1, 3, 1027, 9001, 40_007] {
                let x = normal(13, &[n]).to_device(device).to_kind(kind);
                let ours = square_sum::kernel(&x)?;
                let exact = square_sum::formula(&x.to_kind(Kind::Double));
                let label = format!("{n} of {kind:?} on {device:?}");
                assert_eq!((ours.size(), ours.kind()), (vec![], Kind::Float), "{label}");
                let difference = (ours.double_value(&[]) - exact.double_value(&[])).abs();
                assert!(difference <= 5e-7 * exact.double_value(&[]), "{label}: off by {difference:e}");
                assert!(square_sum::kernel(&x)?.equal(&ours), "{label}: a different sum");
            }
        }
        // A part that begins in the middle of 16 bytes, and one with gaps.
        let x = normal(14, &[6, 101]).to_device(device);
        for part in [x.view(-1).narrow(0, 3, 500), x.narrow(1, 5, 50), x.transpose(0, 1)] {
            let ours = square_sum::kernel(&part)?;
            let expected = square_sum::formula(&part.to_kind(Kind::Double));
            assert!((ours.double_value(&[]) / expected.double_value(&[]) - 1.0).abs() < 5e-7);
        }
    }
    Ok(())
}

fn square_sum_of_non_finite_values_is_not_finite() -> Outcome {
    for device in kernel_devices() {
        for kind in [Kind::Float, Kind::BFloat16] {
            for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
                for at in [0, 511, 9001] {
                    let x = Tensor::ones([9002], CPU).to_kind(kind).to_device(device);
                    let _ = x.get(at).fill_(bad);
                    let sum = square_sum::kernel(&x)?.double_value(&[]);
                    assert!(!sum.is_finite(), "{bad} at {at} gives {sum}");
                }
            }
        }
    }
    Ok(())
}
