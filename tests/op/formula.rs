//! Tests of every operation against its plain formula: values and gradients, in odd sizes.
//!
//! Faster forms are compared with the tolerance of `support/tolerance.rs`; operations without a faster form are
//! compared with loops.

use super::formula_tokens::{GRID, bytes};
use crate::support::tolerance::{View, assert_within_tolerance, compare, random_inputs, rms, ulp};
use crate::support::{Outcome, normal};
use occlude::op::attention::{AttentionMask, Windows};
use occlude::op::bias_gelu::Gelu;
use occlude::op::patch::{ChannelStats, PatchNorm, gather_target};
use occlude::op::{adamw, attention, bias_gelu, cosine, layer_norm, lerp, linear, masked_mse, rms_norm, square_sum};
use tch::{Device, Kind, Tensor};

crate::trials![
    linear_matches_in_odd_sizes,
    linear_matches_in_bf16,
    linear_takes_strided_and_expanded_input,
    linear_computes_only_required_gradients,
    attention_matches_in_odd_sizes,
    attention_computes_only_the_requested_queries,
    masked_and_cross_attention_match,
    gelu_matches_for_large_values,
    layer_norm_matches,
    rms_norm_matches,
    five_adamw_updates_match,
    masked_mse_sums_patch_means,
    cosine_sums_row_distances,
    targets_are_normalized_per_patch_or_channel,
    square_sum_sums_squares,
    square_sum_of_anything_not_finite_is_not_finite,
    lerp_moves_by_its_weight,
];

fn linear_op(x: &[Tensor]) -> Tensor {
    linear::linear(&x[0], &x[1], &x[2]).expect("a product")
}

fn linear_formula(x: &[Tensor]) -> Tensor {
    linear::formula(&x[0], &x[1], &x[2])
}

const LINEAR: [(&[i64], i64, i64); 6] =
    [(&[7], 33, 19), (&[1], 1, 1), (&[2, 5], 131, 67), (&[3, 1], 5, 130), (&[3, 50], 96, 289), (&[2, 3, 5], 17, 3)];

fn linears(kind: Kind) {
    for (rows, k, n) in LINEAR {
        let x: Vec<i64> = rows.iter().copied().chain([k]).collect();
        compare(
            &format!("{x:?} by [{n}, {k}] in {kind:?}"),
            &random_inputs(1, &[&x, &[n, k], &[n]], kind),
            &linear_op,
            &linear_formula,
        );
    }
}

fn linear_matches_in_odd_sizes() -> Outcome {
    linears(Kind::Float);
    Ok(())
}

fn linear_matches_in_bf16() -> Outcome {
    linears(Kind::BFloat16);
    Ok(())
}

fn linear_takes_strided_and_expanded_input() -> Outcome {
    let leaves = random_inputs(2, &[&[13, 2, 21], &[9, 21], &[9]], Kind::Float);
    let through = |view: View, op: fn(&[Tensor]) -> Tensor| {
        move |x: &[Tensor]| op(&[view(&x[0]), x[1].shallow_clone(), x[2].shallow_clone()])
    };
    let views: [(&str, View); 3] = [
        ("transposed", |x| x.transpose(0, 1)),
        ("narrowed", |x| x.narrow(0, 3, 7)),
        ("expanded", |x| x.narrow(1, 0, 1).expand([13, 4, 21], false)),
    ];
    for (label, view) in views {
        compare(label, &leaves, &through(view, linear_op), &through(view, linear_formula));
    }
    // The gradient of a plain sum is expanded and has strides of 0.
    let summed = |op: fn(&[Tensor]) -> Tensor| move |x: &[Tensor]| op(x).sum(x[0].kind());
    compare("summed", &leaves, &summed(linear_op), &summed(linear_formula));
    Ok(())
}

fn linear_computes_only_required_gradients() -> Outcome {
    for expected in 0..3 {
        let x = random_inputs(3, &[&[4, 6], &[5, 6], &[5]], Kind::Float);
        let x: Vec<Tensor> = x.into_iter().enumerate().map(|(i, t)| t.set_requires_grad(i == expected)).collect();
        linear_op(&x).sum(Kind::Float).backward();
        for (i, t) in x.iter().enumerate() {
            assert_eq!(t.grad().defined(), i == expected, "input {i} where {expected} is trained");
        }
    }
    Ok(())
}

fn attention_matches_in_odd_sizes() -> Outcome {
    for (batch, tokens, heads, width) in [(1, 1, 1, 8), (2, 17, 3, 32), (3, 50, 5, 64), (1, 197, 2, 80)] {
        for kind in [Kind::Float, Kind::BFloat16] {
            compare(
                &format!("{tokens} tokens, {heads} heads of {width} in {kind:?}"),
                &random_inputs(4, &[&[batch, tokens, 3 * heads * width]], kind),
                &move |x| attention::attention(&x[0], heads, 0).expect("attention"),
                &move |x| attention::formula(&x[0], heads, AttentionMask::Full { from: 0 }),
            );
        }
    }
    Ok(())
}

fn attention_computes_only_the_requested_queries() -> Outcome {
    let qkv = normal(5, &[2, 19, 3 * 24]);
    let all = attention::attention(&qkv, 3, 0)?;
    for from in [1, 7, 18] {
        let tail = attention::attention(&qkv, 3, from)?;
        let difference = (&tail - all.narrow(1, from, 19 - from)).abs().max().double_value(&[]);
        assert!(difference <= 1e-6, "from {from}: off by {difference:e} from the tail of all outputs");
        compare(
            &format!("from token {from}"),
            &[qkv.shallow_clone()],
            &move |x| attention::attention(&x[0], 3, from).expect("attention"),
            &move |x| attention::formula(&x[0], 3, AttentionMask::Full { from }),
        );
    }
    Ok(())
}

fn masked_and_cross_attention_match() -> Outcome {
    for kind in [Kind::Float, Kind::BFloat16] {
        compare(
            &format!("causal in {kind:?}"),
            &random_inputs(8, &[&[2, 19, 3 * 48]], kind),
            &|x| attention::causal_attention(&x[0], 3).expect("attention"),
            &|x| attention::formula(&x[0], 3, AttentionMask::Causal),
        );
        compare(
            &format!("cross in {kind:?}"),
            &random_inputs(9, &[&[2, 7, 48], &[2, 19, 2 * 48]], kind),
            &|x| attention::cross::cross_attention(&x[0], &x[1], 3).expect("attention"),
            &|x| attention::cross::formula(&x[0], &x[1], 3),
        );
        for shift in [[0, 0], [1, 2]] {
            let windows: &'static Windows = Box::leak(Box::new(Windows::new([4, 6], [2, 3], shift, Device::Cpu)?));
            compare(
                &format!("windows moved by {shift:?} in {kind:?}"),
                &random_inputs(10, &[&[2, 24, 3 * 48]], kind),
                &move |x| attention::windowed_attention(&x[0], 3, windows).expect("attention"),
                &move |x| attention::formula(&x[0], 3, AttentionMask::Windows(windows)),
            );
        }
    }
    let qkv = normal(11, &[2, 9, 3 * 48]);
    let [q, k] = [0, 1].map(|part| qkv.narrow(2, part * 48, 48).view([2, 9, 3, 16]).transpose(1, 2));
    let all = (q.matmul(&k.transpose(-2, -1)) / 4.0).softmax(-1, Kind::Float);
    let difference =
        (attention::class_row::class_token_attention(&qkv, 3)? - all.select(2, 0)).abs().max().double_value(&[]);
    assert!(difference < 1e-6, "the class token's probabilities are off by {difference:e}");
    Ok(())
}

fn gelu_matches_for_large_values() -> Outcome {
    for kind in [Kind::Float, Kind::BFloat16] {
        for spread in [0.01, 1.0, 4.0] {
            let x = (normal(6, &[3, 7, 53]) * spread).to_kind(kind);
            let formula = |x: &[Tensor]| {
                bias_gelu::formula(&x[0].to_kind(compute_kind(x[0].kind())), None, Gelu::Exact).to_kind(x[0].kind())
            };
            compare(
                &format!("{kind:?} × {spread}"),
                &[x],
                &|x| bias_gelu::bias_gelu(&x[0], None, Gelu::Exact).expect("on a CPU"),
                &formula,
            );
        }
    }
    Ok(())
}

/// bf16 formulas of one elementwise function are computed in fp32, as in any implementation.
fn compute_kind(kind: Kind) -> Kind {
    if kind == Kind::Double { kind } else { Kind::Float }
}

fn layer_norm_matches() -> Outcome {
    for kind in [Kind::Float, Kind::BFloat16] {
        // The last one is so flat that the epsilon matters.
        for (shape, spread, shift) in
            [(vec![3, 7, 36], 1.0, 0.0), (vec![5, 129], 3.0, 2.0), (vec![2, 11, 64], 1e-3, 0.0)]
        {
            let width = shape[shape.len() - 1];
            let x = (normal(7, &shape) * spread + shift).to_kind(kind);
            let scale = (normal(8, &[width]) + 1.0).to_kind(kind);
            let offset = normal(9, &[width]).to_kind(kind);
            compare(
                &format!("{shape:?} × {spread} in {kind:?}"),
                &[x, scale, offset],
                &|x| layer_norm::layer_norm(&x[0], &x[1], &x[2]).expect("on a CPU"),
                &|x| layer_norm::formula(&x[0], &x[1], &x[2]),
            );
        }
    }
    Ok(())
}

fn rms_norm_matches() -> Outcome {
    for shape in [[3, 1, 8], [2, 7, 13], [1, 5, 96]] {
        let inputs = random_inputs(3, &[&shape, &shape[2..]], Kind::Float);
        let ours = |x: &[Tensor]| rms_norm::rms_norm(&x[0], &x[1]);
        let library = move |x: &[Tensor]| x[0].rms_norm([shape[2]], Some(&x[1]), rms_norm::EPS);
        compare(&format!("rms_norm of {shape:?}"), &inputs, &ours, &library);
    }
    // A row of one value becomes its sign times the scale.
    let row = Tensor::full([1, 6], -3.0, (Kind::Double, Device::Cpu));
    let scale = normal(1, &[6]).to_kind(Kind::Double);
    let difference = (rms_norm::rms_norm(&row, &scale) + &scale).abs().max().double_value(&[]);
    assert!(difference < 1e-5, "{difference:e}");
    Ok(())
}

fn five_adamw_updates_match() -> Outcome {
    let with = adamw::AdamWOptions { lr: 1e-2, betas: [0.9, 0.95], weight_decay: 0.1, eps: 1e-8 };
    let shapes: [&[i64]; 4] = [&[1], &[17, 31], &[129], &[3, 5, 7]];
    let begin = random_inputs(10, &shapes, Kind::Float);
    // Weights and both moments of each tensor.
    let state =
        |kind| begin.iter().map(move |w| [w.to_kind(kind).copy(), w.to_kind(kind) * 0.0, w.to_kind(kind) * 0.0]);
    let mut ours: Vec<[Tensor; 3]> = state(Kind::Float).collect();
    let mut plain: Vec<[Tensor; 3]> = state(Kind::Float).collect();
    let mut exact: Vec<[Tensor; 3]> = state(Kind::Double).collect();
    let steps = shapes.map(|_| Tensor::zeros([], (Kind::Float, Device::Cpu)));
    for step in 1..=5 {
        let gradients = random_inputs(100 * step as u64, &shapes, Kind::Float);
        let list = |part: usize| ours.iter().map(|state| state[part].shallow_clone()).collect::<Vec<_>>();
        adamw::adamw(&list(0), &gradients, &list(1), &list(2), &steps, with)?;
        for state in [&mut plain, &mut exact] {
            for ([w, m, v], g) in state.iter_mut().zip(&gradients) {
                let g = g.to_kind(w.kind());
                adamw::formula(w, &g, m, v, step, with);
            }
        }
        for (tensor, ((ours, plain), exact)) in ours.iter_mut().zip(&plain).zip(&exact).enumerate() {
            for (part, label) in ["weight", "first moment", "second moment"].iter().enumerate() {
                let label = format!("{label} of tensor {tensor} after {step} updates");
                assert_within_tolerance(&label, &ours[part], &plain[part], &exact[part]);
            }
        }
    }
    assert!(steps.iter().all(|steps| steps.double_value(&[]) == 5.0), "updates are counted");
    Ok(())
}

fn values(x: &Tensor) -> Vec<f64> {
    Vec::<f64>::try_from(x.to_kind(Kind::Double).contiguous().view(-1)).expect("numbers")
}

fn assert_close(label: &str, ours: f64, expected: f64, relative: f64) {
    let difference = (ours - expected).abs();
    assert!(difference <= relative * expected.abs(), "{label}: {ours} against {expected}");
}

fn masked_mse_sums_patch_means() -> Outcome {
    for kind in [Kind::Float, Kind::BFloat16] {
        let prediction = normal(11, &[3, 5, 7]).to_kind(kind).set_requires_grad(true);
        let target = normal(12, &[3, 5, 7]);
        let sum = masked_mse::masked_mse(&prediction, &target)?;
        assert_eq!(sum.kind(), Kind::Float);
        let expected: f64 = values(&prediction).iter().zip(values(&target)).map(|(g, t)| (g - t).powi(2) / 7.0).sum();
        assert_close("the sum", sum.double_value(&[]), expected, 1e-6);
        sum.backward();
        let expected = (prediction.detach().to_kind(Kind::Float) - &target) * (2.0 / 7.0);
        let difference = rms(&(prediction.grad().to_kind(Kind::Float) - &expected));
        assert!(difference <= ulp(kind, rms(&expected)), "the gradient is off by {difference:e} in {kind:?}");
    }
    Ok(())
}

fn cosine_sums_row_distances() -> Outcome {
    for kind in [Kind::Float, Kind::BFloat16] {
        let x = normal(23, &[3, 5, 7]).to_kind(kind);
        let y = normal(24, &[3, 5, 7]);
        let [ours, plain] = [&y, &y].map(Tensor::shallow_clone);
        compare(
            &format!("{kind:?}"),
            &[x.shallow_clone()],
            &move |x| cosine::cosine_distance(&x[0], &ours).expect("on a CPU"),
            &move |x| cosine::formula(&x[0], &plain),
        );
        let rows = |of: &Tensor| values(of).chunks(7).map(<[f64]>::to_vec).collect::<Vec<_>>();
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let expected =
            rows(&x).iter().zip(rows(&y)).map(|(x, y)| 1.0 - dot(x, &y) / (dot(x, x) * dot(&y, &y)).sqrt()).sum();
        assert_close("the sum", cosine::cosine_distance(&x, &y)?.double_value(&[]), expected, 1e-6);
    }
    Ok(())
}

fn targets_are_normalized_per_patch_or_channel() -> Outcome {
    let scale = ChannelStats { mean: vec![0.0; 2], std: vec![1.0; 2] };
    let x = bytes(2);
    let index = Tensor::from_slice2(&[[29i64, 0, 7], [3, 28, 1]]);
    let raw = gather_target(&x, &GRID, &scale, &index, PatchNorm::Raw)?;
    for (level, stride) in [(PatchNorm::PerPatch, 1), (PatchNorm::PerChannel, 2), (PatchNorm::PerChannelEpsInside, 2)] {
        let ours = gather_target(&x, &GRID, &scale, &index, level)?;
        for channel in 0..stride {
            let channel_values =
                |of: &Tensor| values(&of.get(1).get(2)).into_iter().skip(channel).step_by(stride).collect::<Vec<_>>();
            let raw = channel_values(&raw);
            let ours = channel_values(&ours);
            let mean = raw.iter().sum::<f64>() / raw.len() as f64;
            let variance = raw.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (raw.len() - 1) as f64;
            let deviation =
                if level == PatchNorm::PerChannel { variance.sqrt() + 1e-6 } else { (variance + 1e-6).sqrt() };
            for (raw, ours) in raw.iter().zip(ours) {
                assert!((ours - (raw - mean) / deviation).abs() < 1e-5, "{level:?}: {ours} from {raw}");
            }
        }
    }
    Ok(())
}

fn square_sum_sums_squares() -> Outcome {
    for n in [0, 1, 3, 1027, 300_007] {
        let x = normal(13, &[n]);
        let expected = values(&x).iter().map(|v| v * v).sum();
        assert_close(&format!("{n} values"), square_sum::square_sum(&x)?.double_value(&[]), expected, 1e-6);
    }
    assert_close(
        "a matrix",
        square_sum::square_sum(&Tensor::from_slice2(&[[1f32, 2.0], [3.0, 4.0]]))?.double_value(&[]),
        30.0,
        0.0,
    );
    Ok(())
}

fn square_sum_of_anything_not_finite_is_not_finite() -> Outcome {
    for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        for at in [0, 511, 1026] {
            let x = normal(14, &[1027]);
            let _ = x.get(at).fill_(bad);
            let sum = square_sum::square_sum(&x)?.double_value(&[]);
            assert!(!sum.is_finite(), "{bad} at {at} gives {sum}");
        }
    }
    Ok(())
}

fn lerp_moves_by_its_weight() -> Outcome {
    for fraction in [0.0, 0.001, 0.4, 1.0] {
        let mut average = normal(15, &[67]);
        let before = values(&average);
        let current = normal(16, &[67]);
        let data = average.data_ptr();
        lerp::lerp(&mut average, &current, fraction);
        assert_eq!(average.data_ptr(), data, "in place");
        for ((ours, a), c) in values(&average).into_iter().zip(before).zip(values(&current)) {
            let expected = a + (c - a) * fraction;
            assert!((ours - expected).abs() <= 3e-7 * (a.abs() + c.abs()), "{fraction}: {ours} against {expected}");
        }
    }
    Ok(())
}
