//! Every operation against its plain formula: values and gradients, in odd sizes.
//!
//! Faster forms are held to the bar of `bar.rs`; what has none is held to loops.

use crate::bar::{View, compare, inputs, judge, rms, ulp};
use crate::support::{Outcome, normal};
use occlude::grid::Grid;
use occlude::op::attention::{Sight, Windows};
use occlude::op::bias_gelu::Form;
use occlude::op::patch::{Level, Scale, gather, patch, patches, pixels, target};
use occlude::op::shuffle::{Origin, shuffle};
use occlude::op::{adamw, attention, bias_gelu, cosine, fill, layer_norm, lerp, linear, masked_mse, square_sum};
use tch::{Device, Kind, Tensor};

crate::trials![
    linear_agrees_in_odd_sizes,
    linear_agrees_in_bf16,
    linear_takes_strided_and_expanded_input,
    linear_leaves_out_gradients_that_nobody_wants,
    attention_agrees_in_odd_sizes,
    attention_answers_only_the_tokens_asked_for,
    attention_in_its_other_forms_agrees,
    gelu_agrees_far_out_too,
    layer_norm_agrees,
    five_updates_of_adamw_agree,
    masked_mse_sums_over_patches_the_mean_over_values,
    cosine_sums_the_distance_of_rows,
    targets_are_levelled_by_patch_or_by_channel,
    square_sum_adds_up,
    square_sum_of_anything_not_finite_is_not_finite,
    lerp_moves_by_its_share,
    fill_puts_every_token_at_its_place,
    fill_puts_the_class_token_first,
    fill_wants_no_class_token,
    fill_sends_gradients_to_the_token_and_to_what_was_seen,
    patches_are_in_the_official_order,
    pixels_are_the_inverse_of_patches,
    patch_reads_bytes_as_it_reads_normalised_floats,
    a_sample_s_order_depends_on_nothing_but_the_sample,
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
            &inputs(1, &[&x, &[n, k], &[n]], kind),
            &linear_op,
            &linear_formula,
        );
    }
}

fn linear_agrees_in_odd_sizes() -> Outcome {
    linears(Kind::Float);
    Ok(())
}

fn linear_agrees_in_bf16() -> Outcome {
    linears(Kind::BFloat16);
    Ok(())
}

fn linear_takes_strided_and_expanded_input() -> Outcome {
    let leaves = inputs(2, &[&[13, 2, 21], &[9, 21], &[9]], Kind::Float);
    let through = |view: View, op: fn(&[Tensor]) -> Tensor| {
        move |x: &[Tensor]| op(&[view(&x[0]), x[1].shallow_clone(), x[2].shallow_clone()])
    };
    let views: [(&str, View); 3] = [
        ("transposed", |x| x.transpose(0, 1)),
        ("narrowed", |x| x.narrow(0, 3, 7)),
        ("expanded", |x| x.narrow(1, 0, 1).expand([13, 4, 21], false)),
    ];
    for (what, view) in views {
        compare(what, &leaves, &through(view, linear_op), &through(view, linear_formula));
    }
    // The gradient of a plain sum has no strides at all.
    let summed = |op: fn(&[Tensor]) -> Tensor| move |x: &[Tensor]| op(x).sum(x[0].kind());
    compare("summed", &leaves, &summed(linear_op), &summed(linear_formula));
    Ok(())
}

fn linear_leaves_out_gradients_that_nobody_wants() -> Outcome {
    for wanted in 0..3 {
        let x = inputs(3, &[&[4, 6], &[5, 6], &[5]], Kind::Float);
        let x: Vec<Tensor> = x.into_iter().enumerate().map(|(i, t)| t.set_requires_grad(i == wanted)).collect();
        linear_op(&x).sum(Kind::Float).backward();
        for (i, t) in x.iter().enumerate() {
            assert_eq!(t.grad().defined(), i == wanted, "input {i} where {wanted} is trained");
        }
    }
    Ok(())
}

fn attention_agrees_in_odd_sizes() -> Outcome {
    for (batch, tokens, heads, width) in [(1, 1, 1, 8), (2, 17, 3, 32), (3, 50, 5, 64), (1, 197, 2, 80)] {
        for kind in [Kind::Float, Kind::BFloat16] {
            compare(
                &format!("{tokens} tokens, {heads} heads of {width} in {kind:?}"),
                &inputs(4, &[&[batch, tokens, 3 * heads * width]], kind),
                &move |x| attention::attention(&x[0], heads, 0).expect("attention"),
                &move |x| attention::formula(&x[0], heads, Sight::All { from: 0 }),
            );
        }
    }
    Ok(())
}

fn attention_answers_only_the_tokens_asked_for() -> Outcome {
    let qkv = normal(5, &[2, 19, 3 * 24]);
    let all = attention::attention(&qkv, 3, 0)?;
    for from in [1, 7, 18] {
        let tail = attention::attention(&qkv, 3, from)?;
        let off = (&tail - all.narrow(1, from, 19 - from)).abs().max().double_value(&[]);
        assert!(off <= 1e-6, "from {from}: off by {off:e} from the tail of all answers");
        compare(
            &format!("from token {from}"),
            &[qkv.shallow_clone()],
            &move |x| attention::attention(&x[0], 3, from).expect("attention"),
            &move |x| attention::formula(&x[0], 3, Sight::All { from }),
        );
    }
    Ok(())
}

fn attention_in_its_other_forms_agrees() -> Outcome {
    for kind in [Kind::Float, Kind::BFloat16] {
        compare(
            &format!("causal in {kind:?}"),
            &inputs(8, &[&[2, 19, 3 * 48]], kind),
            &|x| attention::causal(&x[0], 3).expect("attention"),
            &|x| attention::formula(&x[0], 3, Sight::Causal),
        );
        compare(
            &format!("cross in {kind:?}"),
            &inputs(9, &[&[2, 7, 48], &[2, 19, 2 * 48]], kind),
            &|x| attention::cross(&x[0], &x[1], 3).expect("attention"),
            &|x| attention::cross::formula(&x[0], &x[1], 3),
        );
        for shift in [[0, 0], [1, 2]] {
            let windows: &'static Windows = Box::leak(Box::new(Windows::new([4, 6], [2, 3], shift, Device::Cpu)?));
            compare(
                &format!("windows moved by {shift:?} in {kind:?}"),
                &inputs(10, &[&[2, 24, 3 * 48]], kind),
                &move |x| attention::windowed(&x[0], 3, windows).expect("attention"),
                &move |x| attention::formula(&x[0], 3, Sight::Windows(windows)),
            );
        }
    }
    let qkv = normal(11, &[2, 9, 3 * 48]);
    let [q, k] = [0, 1].map(|part| qkv.narrow(2, part * 48, 48).view([2, 9, 3, 16]).transpose(1, 2));
    let all = (q.matmul(&k.transpose(-2, -1)) / 4.0).softmax(-1, Kind::Float);
    let off = (attention::class_row(&qkv, 3)? - all.select(2, 0)).abs().max().double_value(&[]);
    assert!(off < 1e-6, "the class token's probabilities are off by {off:e}");
    Ok(())
}

fn gelu_agrees_far_out_too() -> Outcome {
    for kind in [Kind::Float, Kind::BFloat16] {
        for spread in [0.01, 1.0, 4.0] {
            let x = (normal(6, &[3, 7, 53]) * spread).to_kind(kind);
            let formula = |x: &[Tensor]| {
                bias_gelu::formula(&x[0].to_kind(wide(x[0].kind())), None, Form::Exact).to_kind(x[0].kind())
            };
            compare(
                &format!("{kind:?} × {spread}"),
                &[x],
                &|x| bias_gelu::bias_gelu(&x[0], None, Form::Exact).expect("on a CPU"),
                &formula,
            );
        }
    }
    Ok(())
}

/// bf16 formulas of one elementwise function are worked out in fp32, as any implementation does.
fn wide(kind: Kind) -> Kind {
    if kind == Kind::Double { kind } else { Kind::Float }
}

fn layer_norm_agrees() -> Outcome {
    for kind in [Kind::Float, Kind::BFloat16] {
        // The last one is so flat that the epsilon matters.
        for (shape, spread, shift) in
            [(vec![3, 7, 36], 1.0, 0.0), (vec![5, 129], 3.0, 2.0), (vec![2, 11, 64], 1e-3, 0.0)]
        {
            let width = shape[shape.len() - 1];
            let x = (normal(7, &shape) * spread + shift).to_kind(kind);
            let (scale, offset) = ((normal(8, &[width]) + 1.0).to_kind(kind), normal(9, &[width]).to_kind(kind));
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

fn five_updates_of_adamw_agree() -> Outcome {
    let with = adamw::AdamW { lr: 1e-2, betas: (0.9, 0.95), weight_decay: 0.1, eps: 1e-8 };
    let shapes: [&[i64]; 4] = [&[1], &[17, 31], &[129], &[3, 5, 7]];
    let begin = inputs(10, &shapes, Kind::Float);
    // Weights and both moments of each tensor.
    let state =
        |kind| begin.iter().map(move |w| [w.to_kind(kind).copy(), w.to_kind(kind) * 0.0, w.to_kind(kind) * 0.0]);
    let mut ours: Vec<[Tensor; 3]> = state(Kind::Float).collect();
    let mut plain: Vec<[Tensor; 3]> = state(Kind::Float).collect();
    let mut exact: Vec<[Tensor; 3]> = state(Kind::Double).collect();
    let steps = shapes.map(|_| Tensor::zeros([], (Kind::Float, Device::Cpu)));
    for step in 1..=5 {
        let gradients = inputs(100 * step as u64, &shapes, Kind::Float);
        let list = |part: usize| ours.iter().map(|state| state[part].shallow_clone()).collect::<Vec<_>>();
        adamw::adamw(&list(0), &gradients, &list(1), &list(2), &steps, with)?;
        for state in [&mut plain, &mut exact] {
            for ([w, m, v], g) in state.iter_mut().zip(&gradients) {
                let g = g.to_kind(w.kind());
                adamw::formula(w, &g, m, v, step, with);
            }
        }
        for (tensor, ((ours, plain), exact)) in ours.iter_mut().zip(&plain).zip(&exact).enumerate() {
            for (part, what) in ["weight", "first moment", "second moment"].iter().enumerate() {
                let what = format!("{what} of tensor {tensor} after {step} updates");
                judge(&what, &ours[part], &plain[part], &exact[part]);
            }
        }
    }
    assert!(steps.iter().all(|steps| steps.double_value(&[]) == 5.0), "updates are counted");
    Ok(())
}

fn values(x: &Tensor) -> Vec<f64> {
    Vec::<f64>::try_from(x.to_kind(Kind::Double).contiguous().view(-1)).expect("numbers")
}

fn close(what: &str, ours: f64, wanted: f64, relative: f64) {
    let off = (ours - wanted).abs();
    assert!(off <= relative * wanted.abs(), "{what}: {ours} against {wanted}");
}

fn masked_mse_sums_over_patches_the_mean_over_values() -> Outcome {
    for kind in [Kind::Float, Kind::BFloat16] {
        let guess = normal(11, &[3, 5, 7]).to_kind(kind).set_requires_grad(true);
        let truth = normal(12, &[3, 5, 7]);
        let sum = masked_mse::masked_mse(&guess, &truth)?;
        assert_eq!(sum.kind(), Kind::Float);
        let wanted: f64 = values(&guess).iter().zip(values(&truth)).map(|(g, t)| (g - t).powi(2) / 7.0).sum();
        close("the sum", sum.double_value(&[]), wanted, 1e-6);
        sum.backward();
        let wanted = (guess.detach().to_kind(Kind::Float) - &truth) * (2.0 / 7.0);
        let off = rms(&(guess.grad().to_kind(Kind::Float) - &wanted));
        assert!(off <= ulp(kind, rms(&wanted)), "the gradient is off by {off:e} in {kind:?}");
    }
    Ok(())
}

fn cosine_sums_the_distance_of_rows() -> Outcome {
    for kind in [Kind::Float, Kind::BFloat16] {
        let (x, y) = (normal(23, &[3, 5, 7]).to_kind(kind), normal(24, &[3, 5, 7]));
        let [ours, plain] = [&y, &y].map(Tensor::shallow_clone);
        compare(
            &format!("{kind:?}"),
            &[x.shallow_clone()],
            &move |x| cosine::cosine(&x[0], &ours).expect("on a CPU"),
            &move |x| cosine::formula(&x[0], &plain),
        );
        let rows = |of: &Tensor| values(of).chunks(7).map(<[f64]>::to_vec).collect::<Vec<_>>();
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let wanted =
            rows(&x).iter().zip(rows(&y)).map(|(x, y)| 1.0 - dot(x, &y) / (dot(x, x) * dot(&y, &y)).sqrt()).sum();
        close("the sum", cosine::cosine(&x, &y)?.double_value(&[]), wanted, 1e-6);
    }
    Ok(())
}

fn targets_are_levelled_by_patch_or_by_channel() -> Outcome {
    let scale = Scale { mean: vec![0.0; 2], std: vec![1.0; 2] };
    let (x, index) = (bytes(2), Tensor::from_slice2(&[[29i64, 0, 7], [3, 28, 1]]));
    let raw = target(&x, &GRID, &scale, &index, Level::Raw)?;
    for (level, stride) in [(Level::Patch, 1), (Level::Channel, 2), (Level::ChannelInside, 2)] {
        let ours = target(&x, &GRID, &scale, &index, level)?;
        for channel in 0..stride {
            let own =
                |of: &Tensor| values(&of.get(1).get(2)).into_iter().skip(channel).step_by(stride).collect::<Vec<_>>();
            let (raw, ours) = (own(&raw), own(&ours));
            let mean = raw.iter().sum::<f64>() / raw.len() as f64;
            let variance = raw.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (raw.len() - 1) as f64;
            let deviation = if level == Level::Channel { variance.sqrt() + 1e-6 } else { (variance + 1e-6).sqrt() };
            for (raw, ours) in raw.iter().zip(ours) {
                assert!((ours - (raw - mean) / deviation).abs() < 1e-5, "{level:?}: {ours} from {raw}");
            }
        }
    }
    Ok(())
}

fn square_sum_adds_up() -> Outcome {
    for n in [0, 1, 3, 1027, 300_007] {
        let x = normal(13, &[n]);
        let wanted = values(&x).iter().map(|v| v * v).sum();
        close(&format!("{n} values"), square_sum::square_sum(&x)?.double_value(&[]), wanted, 1e-6);
    }
    close(
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

fn lerp_moves_by_its_share() -> Outcome {
    for share in [0.0, 0.001, 0.4, 1.0] {
        let mut average = normal(15, &[67]);
        let (before, current) = (values(&average), normal(16, &[67]));
        let place = average.data_ptr();
        lerp::lerp(&mut average, &current, share);
        assert_eq!(average.data_ptr(), place, "in place");
        for ((ours, a), c) in values(&average).into_iter().zip(before).zip(values(&current)) {
            let wanted = a + (c - a) * share;
            assert!((ours - wanted).abs() <= 3e-7 * (a.abs() + c.abs()), "{share}: {ours} against {wanted}");
        }
    }
    Ok(())
}

/// seen [2, 1 + 3, 5], token [5], positions [7, 5], keep [2, 3], drop [2, 4].
fn sequence() -> [Tensor; 5] {
    let order = Tensor::from_slice2(&[[4i64, 0, 6, 1, 5, 2, 3], [2, 3, 1, 0, 6, 5, 4]]);
    let (keep, drop) = (order.narrow(1, 0, 3), order.narrow(1, 3, 4));
    [normal(17, &[2, 4, 5]), normal(18, &[5]), normal(19, &[7, 5]), keep, drop]
}

fn filled(seen: &Tensor, token: &Tensor, positions: &Tensor, keep: &Tensor, drop: &Tensor) -> Tensor {
    let places = fill::Places { positions, keep, hidden: Some((token, drop)) };
    fill::fill(seen, None, places).expect("on a CPU")
}

fn fill_puts_every_token_at_its_place() -> Outcome {
    let [seen, token, positions, keep, drop] = sequence();
    let all = filled(&seen, &token, &positions, &keep, &drop);
    assert_eq!(all.size(), [2, 8, 5]);
    for b in 0..2 {
        for s in 0..8 {
            for d in 0..5 {
                let position = |index: &Tensor, at: i64| positions.double_value(&[index.int64_value(&[b, at]), d]);
                let wanted = match s {
                    0 => seen.double_value(&[b, 0, d]),
                    1..=3 => seen.double_value(&[b, s, d]) + position(&keep, s - 1),
                    _ => token.double_value(&[d]) + position(&drop, s - 4),
                };
                let ours = all.double_value(&[b, s, d]);
                assert!((ours - wanted).abs() <= 1e-6, "sample {b}, token {s}, channel {d}: {ours} against {wanted}");
            }
        }
    }
    Ok(())
}

fn fill_puts_the_class_token_first() -> Outcome {
    let [seen, token, positions, keep, drop] = sequence();
    let all = filled(&seen, &token, &positions, &keep, &drop);
    let (class, visible) = (seen.get(0).get(0), seen.narrow(1, 1, 3));
    for hidden in [None, Some((&token, &drop))] {
        let apart = fill::fill(&visible, Some(&class), fill::Places { positions: &positions, keep: &keep, hidden })?;
        assert_eq!(apart.size()[1], if hidden.is_some() { 8 } else { 4 });
        for b in 0..2 {
            assert!(apart.get(b).get(0).equal(&class), "sample {b}");
            let tokens = apart.size()[1] - 1;
            assert!(apart.get(b).narrow(0, 1, tokens).equal(&all.get(b).narrow(0, 1, tokens)), "sample {b}");
        }
    }
    Ok(())
}

fn fill_wants_no_class_token() -> Outcome {
    let [seen, token, positions, keep, drop] = sequence();
    let with = filled(&seen, &token, &positions, &keep, &drop);
    let without = filled(&seen.narrow(1, 1, 3), &token, &positions, &keep, &drop);
    assert!(without.equal(&with.narrow(1, 1, 7)), "the other tokens are the same");
    Ok(())
}

fn fill_sends_gradients_to_the_token_and_to_what_was_seen() -> Outcome {
    let [seen, token, positions, keep, drop] = sequence();
    let (seen, token) = (seen.set_requires_grad(true), token.set_requires_grad(true));
    let upstream = normal(20, &[2, 8, 5]);
    (filled(&seen, &token, &positions, &keep, &drop) * &upstream).sum(Kind::Float).backward();
    assert!(seen.grad().equal(&upstream.narrow(1, 0, 4)), "what was seen stands first, class token included");
    let wanted = upstream.narrow(1, 4, 4).sum_dim_intlist([0i64, 1].as_slice(), false, Kind::Float);
    let off = (token.grad() - wanted).abs().max().double_value(&[]);
    assert!(off <= 1e-6, "the token's gradient is off by {off:e}");
    Ok(())
}

/// Two frames a token, a grid that is no square, two channels.
const GRID: Grid = Grid { frames: 2, rows: 3, cols: 5, channels: 2, patch_frames: 2, patch: 3 };

fn bytes(batch: i64) -> Tensor {
    let [c, t, y, x] = GRID.pixels();
    let n = batch * c * t * y * x;
    (Tensor::arange(n, (Kind::Int64, Device::Cpu)) * 37 + 11)
        .remainder(251)
        .to_kind(Kind::Uint8)
        .view([batch, c, t, y, x])
}

fn patches_are_in_the_official_order() -> Outcome {
    let x = bytes(2);
    let rows = patches(&x, &GRID);
    assert_eq!((rows.size(), rows.kind()), (vec![2, GRID.tokens(), GRID.values()], Kind::Uint8));
    let Grid { rows: high, cols: wide, channels, patch_frames, patch, .. } = GRID;
    for token in 0..GRID.tokens() {
        let (frame, row, col) = (token / (high * wide), token / wide % high, token % wide);
        for value in 0..GRID.values() {
            let (c, px) = (value % channels, value / channels % patch);
            let (py, f) = (value / channels / patch % patch, value / channels / patch / patch);
            let at = [1, c, frame * patch_frames + f, row * patch + py, col * patch + px];
            let (ours, wanted) = (rows.int64_value(&[1, token, value]), x.int64_value(&at));
            assert_eq!(ours, wanted, "token {token}, value {value}");
        }
    }
    Ok(())
}

fn pixels_are_the_inverse_of_patches() -> Outcome {
    let x = bytes(3);
    assert!(pixels(&patches(&x, &GRID), &GRID).equal(&x), "bytes");
    let x = normal(21, &x.size());
    assert!(pixels(&patches(&x, &GRID), &GRID).equal(&x), "floats");
    Ok(())
}

fn patch_reads_bytes_as_it_reads_normalised_floats() -> Outcome {
    let scale = Scale { mean: vec![0.2, 0.7], std: vec![0.3, 0.11] };
    let x = bytes(2);
    let index = Tensor::from_slice2(&[[29i64, 0, 7, 7], [3, 28, 1, 14]]);
    let ours = patch(&x, &GRID, &scale, &index, Kind::Float)?;
    assert_eq!((ours.size(), ours.kind()), (vec![2, 4, GRID.values()], Kind::Float));
    let constants = |values: &[f64]| Tensor::from_slice(values).view([1, -1, 1, 1, 1]);
    let exact = (x.to_kind(Kind::Double) / 255.0 - constants(&scale.mean)) / constants(&scale.std);
    let off =
        (&ours - patch(&exact.to_kind(Kind::Float), &GRID, &scale, &index, Kind::Float)?).abs().max().double_value(&[]);
    assert!(off <= 2e-6, "off by {off:e} where values reach 7");
    for (b, k) in [(0, 0), (0, 3), (1, 1)] {
        let row = patches(&exact, &GRID).get(b).get(index.int64_value(&[b, k]));
        let off = (ours.get(b).get(k) - row).abs().max().double_value(&[]);
        assert!(off <= 2e-6, "row {k} of sample {b} is not the one asked for");
    }
    // And back, for pictures.
    let unit = scale.to_unit(&exact.to_kind(Kind::Float)) * 255.0;
    let off = (unit - x.to_kind(Kind::Float)).abs().max().double_value(&[]);
    assert!(off <= 1e-3, "pixels come back {off} off");
    assert_eq!(gather(&patches(&x, &GRID), &index).kind(), Kind::Uint8, "gathered before it is widened");
    Ok(())
}

fn a_sample_s_order_depends_on_nothing_but_the_sample() -> Outcome {
    let origin = |id, epoch, repeat| Origin { id, epoch, repeat };
    let draw = |seed, samples: &[Origin]| shuffle(seed, samples, 30, Device::Cpu);
    let (a, b, c) = (origin(5, 0, 0), origin(u64::MAX, 3, 0), origin(9, 1, 2));
    let all = draw(1, &[a, b, c]);
    assert_eq!((all.size(), all.kind()), (vec![3, 30], Kind::Int64));
    let (sorted, _) = all.sort(1, false);
    assert!(sorted.equal(&Tensor::arange(30, (Kind::Int64, Device::Cpu)).expand([3, 30], false)), "permutations");
    for (batch, row, whole) in [(vec![a], 0, 0), (vec![c, a], 0, 2), (vec![b, b, b, a], 3, 0), (vec![c, b], 1, 1)] {
        assert!(draw(1, &batch).get(row).equal(&all.get(whole)), "another batch, another order");
    }
    for other in [draw(2, &[a]), draw(1, &[origin(6, 0, 0)]), draw(1, &[origin(5, 1, 0)]), draw(1, &[origin(5, 0, 1)])]
    {
        assert!(!other.get(0).equal(&all.get(0)), "seed, sample, epoch and repeat each change the order");
    }
    Ok(())
}
