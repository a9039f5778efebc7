//! Kernels that handle tokens, from patches to the loss, each against its formula in odd sizes: values and gradients.

use crate::bar::{compare_kernel, grounds, inputs, judge};
use crate::support::{Outcome, normal};
use occlude::grid::Grid;
use occlude::op::fill::{self, Places};
use occlude::op::patch::{self, Level, Scale};
use occlude::op::shuffle::{Origin, shuffle};
use occlude::op::{cosine, layer_norm, masked_mse, scale};
use tch::{Device, Kind, Tensor};

crate::trials![
    layer_norm_s_kernel_agrees_in_every_width,
    layer_norm_s_kernel_adds_the_residual_first,
    layer_norm_s_kernel_stands_a_row_far_from_nought,
    fill_s_kernel_agrees_wherever_the_class_token_comes_from,
    fill_s_kernel_leaves_out_gradients_that_nobody_wants,
    patch_s_kernel_reads_and_levels_as_the_formula,
    patch_s_kernel_takes_a_grid_of_several_frames,
    masked_mse_s_kernel_agrees,
    cosine_s_kernel_agrees,
    cosine_s_kernel_bears_rows_of_nought,
    scale_s_kernel_rounds_once,
];

const KINDS: [Kind; 2] = [Kind::Float, Kind::BFloat16];

/// Rows that fill no block; widths of a warp, of a block, and of no whole number of 16 bytes.
const NORMS: [(Kind, &[i64], i64); 12] = [
    (Kind::Float, &[1], 8),
    (Kind::Float, &[3, 50], 24),
    (Kind::Float, &[65], 192),
    (Kind::Float, &[2, 9], 768),
    (Kind::Float, &[3], 1280),
    (Kind::Float, &[3, 7], 33),
    (Kind::BFloat16, &[197], 64),
    (Kind::BFloat16, &[99], 384),
    (Kind::BFloat16, &[3, 3], 1280),
    (Kind::BFloat16, &[2], 1408),
    (Kind::Half, &[5], 768),
    (Kind::Half, &[160], 36),
];

/// x, r, scale and shift.
fn rows(kind: Kind, rows: &[i64], width: i64) -> Vec<Tensor> {
    let shape: Vec<i64> = rows.iter().copied().chain([width]).collect();
    inputs(1, &[&shape, &shape, &[width], &[width]], kind)
}

fn layer_norm_s_kernel_agrees_in_every_width() -> Outcome {
    for (kind, shape, width) in NORMS {
        let [x, _, scale, shift] = <[Tensor; 4]>::try_from(rows(kind, shape, width)).expect("four");
        compare_kernel(
            &format!("{shape:?} rows of {width} in {kind:?}"),
            &[x, scale, shift],
            &|x| layer_norm::kernel(&x[0], &x[1], &x[2]).expect("a launch"),
            &|x| layer_norm::formula(&x[0], &x[1], &x[2]),
        );
    }
    Ok(())
}

/// Both outputs as one, so that both have a gradient.
fn both((sum, y): (Tensor, Tensor)) -> Tensor {
    Tensor::cat(&[sum, y], 0)
}

fn layer_norm_s_kernel_adds_the_residual_first() -> Outcome {
    for (kind, shape, width) in NORMS {
        let what = format!("{shape:?} rows of {width} in {kind:?}");
        let given = rows(kind, shape, width);
        let kernel = |x: &[Tensor]| layer_norm::add_kernel(&x[0], &x[1], &x[2], &x[3]).expect("a launch");
        let formula = |x: &[Tensor]| layer_norm::add_formula(&x[0], &x[1], &x[2], &x[3]);
        compare_kernel(&what, &given, &move |x| both(kernel(x)), &move |x| both(formula(x)));
        let alone = format!("{what}, the sum unused");
        compare_kernel(&alone, &given, &move |x| kernel(x).1, &move |x| formula(x).1);
    }
    Ok(())
}

fn layer_norm_s_kernel_stands_a_row_far_from_nought() -> Outcome {
    for (spread, shift) in [(1.0, 300.0), (1e-3, 0.0), (100.0, -5.0)] {
        let x = normal(7, &[13, 96]) * spread + shift;
        let [scale, offset] = [normal(8, &[96]) + 1.0, normal(9, &[96])];
        compare_kernel(
            &format!("× {spread} + {shift}"),
            &[x, scale, offset],
            &|x| layer_norm::kernel(&x[0], &x[1], &x[2]).expect("a launch"),
            &|x| layer_norm::formula(&x[0], &x[1], &x[2]),
        );
    }
    Ok(())
}

/// An order of N places for each sample, cut into `keep` [B, K] and `drop` [B, N − K].
fn places(batch: i64, tokens: i64, kept: i64) -> [Tensor; 2] {
    let origins: Vec<Origin> = (0..batch as u64).map(|id| Origin { id, epoch: 0, repeat: 0 }).collect();
    let order = shuffle(1, &origins, tokens, Device::Cpu);
    [order.narrow(1, 0, kept).contiguous(), order.narrow(1, kept, tokens - kept).contiguous()]
}

type Filled<'a> = (&'a Tensor, Option<&'a Tensor>, Places<'a>);

/// Hands tensors over to `run` as fill's arguments: seen, then class token and mask token where they are apart.
fn filled(x: &[Tensor], fixed: &[Tensor; 3], apart: bool, fills: bool, run: &dyn Fn(Filled) -> Tensor) -> Tensor {
    let [positions, keep, drop] = fixed.each_ref().map(|tensor| tensor.to_device(x[0].device()));
    let token = fills.then(|| x.last().expect("a mask token"));
    let places = Places { positions: &positions, keep: &keep, hidden: token.map(|token| (token, &drop)) };
    run((&x[0], apart.then(|| &x[1]), places))
}

fn fill_s_kernel_agrees_wherever_the_class_token_comes_from() -> Outcome {
    let sizes = [(1, 64, 16, 24), (3, 49, 12, 33), (3, 64, 33, 300), (2, 196, 49, 64)];
    for (i, (batch, tokens, kept, width)) in sizes.into_iter().enumerate() {
        for (apart, fills) in [(true, true), (true, false), (false, true), (false, false)] {
            let kind = KINDS[(i + usize::from(apart)) % 2];
            let [keep, drop] = places(batch, tokens, kept);
            let seen: &[i64] = &[batch, kept + i64::from(!apart), width];
            let vector: &[i64] = &[width];
            let shapes = [&[seen][..], &vec![vector; usize::from(apart) + usize::from(fills)]].concat();
            let positions = normal(5, &[tokens, width]).to_kind(kind).to_kind(Kind::Float);
            let [ours, plain] = [[&positions, &keep, &drop]; 2].map(|all| all.map(Tensor::shallow_clone));
            compare_kernel(
                &format!("{batch} × {kept} of {tokens} × {width} in {kind:?}, apart: {apart}, fills: {fills}"),
                &inputs(1, &shapes, kind),
                &move |x| {
                    filled(x, &ours, apart, fills, &|(x, class, at)| fill::kernel(x, class, at).expect("a launch"))
                },
                &move |x| filled(x, &plain, apart, fills, &|(x, class, at)| fill::formula(x, class, at)),
            );
        }
    }
    Ok(())
}

fn fill_s_kernel_leaves_out_gradients_that_nobody_wants() -> Outcome {
    let [keep, drop] = places(2, 9, 4);
    let positions = normal(5, &[9, 16]);
    for wanted in 0..3 {
        let x = inputs(3, &[&[2, 4, 16], &[16], &[16]], Kind::Float);
        let x: Vec<Tensor> = x.into_iter().enumerate().map(|(i, t)| t.set_requires_grad(i == wanted)).collect();
        let places = Places { positions: &positions, keep: &keep, hidden: Some((&x[2], &drop)) };
        fill::kernel(&x[0], Some(&x[1]), places)?.sum(Kind::Float).backward();
        for (i, t) in x.iter().enumerate() {
            assert_eq!(t.grad().defined(), i == wanted, "input {i} where {wanted} is trained");
        }
    }
    Ok(())
}

/// Pixels of every value, and the constants of as many channels.
fn picture(grid: &Grid, batch: i64) -> (Tensor, Scale) {
    let [c, t, y, x] = grid.pixels();
    let bytes = (normal(11, &[batch, c, t, y, x]) * 60.0 + 120.0).clamp(0.0, 255.0).to_kind(Kind::Uint8);
    let of = |values: [f64; 4]| values[..c as usize].to_vec();
    (bytes, Scale { mean: of([0.485, 0.456, 0.406, 0.2]), std: of([0.229, 0.224, 0.225, 0.5]) })
}

fn patches_agree(grid: &Grid, batch: i64, kept: i64) -> Outcome {
    let (bytes, constants) = picture(grid, batch);
    let [index, _] = places(batch, grid.tokens(), kept);
    let column = |values: &[f64]| Tensor::from_slice(values).view([1, -1, 1, 1, 1]);
    let exact = (bytes.to_kind(Kind::Double) / 255.0 - column(&constants.mean)) / column(&constants.std);
    for ground in grounds() {
        let levels = [Level::Raw, Level::Patch, Level::Channel, Level::ChannelInside];
        for (x, level) in levels.map(|level| (0, level)).into_iter().chain([(1, Level::Raw), (1, Level::Patch)]) {
            // Floats are taken as they come.
            let floats = exact.to_kind(Kind::Float);
            let (x, exact) = if x == 0 { (&bytes, &exact) } else { (&floats, &floats.to_kind(Kind::Double)) };
            let exact = patch::formula(exact, grid, &constants, &index, level, Kind::Double);
            for kind in KINDS {
                let [x, index] = [x, &index].map(|tensor| tensor.to_device(ground));
                let ours = patch::kernel(&x, grid, &constants, &index, level, kind)?;
                let plain = patch::formula(&x, grid, &constants, &index, level, kind);
                let what = format!("{grid:?} of {:?} as {kind:?}, {level:?}, on {ground:?}", x.kind());
                judge(&what, &ours.to_device(Device::Cpu), &plain.to_device(Device::Cpu), &exact);
            }
        }
    }
    Ok(())
}

fn patch_s_kernel_reads_and_levels_as_the_formula() -> Outcome {
    let image = |rows, cols, channels, patch| Grid { frames: 1, rows, cols, channels, patch_frames: 1, patch };
    patches_agree(&image(3, 2, 3, 16), 2, 5)?;
    patches_agree(&image(2, 3, 3, 14), 2, 2)?;
    patches_agree(&image(5, 4, 1, 7), 3, 13)?;
    patches_agree(&image(2, 7, 4, 4), 1, 14)
}

fn patch_s_kernel_takes_a_grid_of_several_frames() -> Outcome {
    patches_agree(&Grid { frames: 3, rows: 2, cols: 5, channels: 3, patch_frames: 2, patch: 8 }, 2, 11)?;
    patches_agree(&Grid { frames: 2, rows: 3, cols: 1, channels: 2, patch_frames: 3, patch: 5 }, 3, 4)
}

fn masked_mse_s_kernel_agrees() -> Outcome {
    for kind in KINDS {
        for (batch, dropped, values) in [(1, 1, 1), (3, 147, 48), (3, 13, 75), (2, 50, 588)] {
            let truth = normal(12, &[batch, dropped, values]);
            let [ours, plain] = [&truth, &truth].map(Tensor::shallow_clone);
            compare_kernel(
                &format!("{batch} × {dropped} × {values} in {kind:?}"),
                &inputs(11, &[&[batch, dropped, values]], kind),
                &move |x| masked_mse::kernel(&x[0], &ours.to_device(x[0].device())).expect("a launch"),
                &move |x| masked_mse::formula(&x[0], &plain.to_device(x[0].device())),
            );
        }
    }
    Ok(())
}

fn cosine_s_kernel_agrees() -> Outcome {
    for (kind, of_target) in [(KINDS[0], KINDS[0]), (KINDS[1], KINDS[0]), (KINDS[0], KINDS[1]), (KINDS[1], KINDS[1])] {
        for (rows, width) in [(1, 1), (50, 512), (65, 33), (19, 200)] {
            let target = (normal(14, &[rows, width]) + 0.3).to_kind(of_target);
            let [ours, plain] = [&target, &target].map(Tensor::shallow_clone);
            compare_kernel(
                &format!("{rows} × {width} in {kind:?} against {of_target:?}"),
                &[(normal(13, &[rows, width]) + 0.3).to_kind(kind)],
                &move |x| cosine::kernel(&x[0], &ours.to_device(x[0].device())).expect("a launch"),
                &move |x| cosine::formula(&x[0], &plain.to_device(x[0].device())),
            );
        }
    }
    Ok(())
}

fn cosine_s_kernel_bears_rows_of_nought() -> Outcome {
    let (x, y) = (normal(15, &[3, 8]), normal(16, &[3, 8]));
    let (_, _) = (x.get(0).zero_(), y.get(1).zero_());
    let x = x.set_requires_grad(true);
    let sum = cosine::kernel(&x, &y)?;
    sum.backward();
    let wanted = 2.0 + cosine::formula(&x.get(2), &y.get(2)).double_value(&[]);
    assert!((sum.double_value(&[]) - wanted).abs() < 1e-5, "{sum} against {wanted}");
    let gradient = x.grad();
    assert!(gradient.isfinite().all().int64_value(&[]) == 1, "{gradient}");
    assert!(gradient.get(1).abs().max().double_value(&[]) == 0.0, "a target of nought pulls nowhere");
    Ok(())
}

fn scale_s_kernel_rounds_once() -> Outcome {
    for kind in KINDS {
        for numel in [1, 33, 2400] {
            let (x, by) = (normal(17, &[numel]).to_kind(kind), Tensor::from(0.123_456_7f32));
            assert!(scale::kernel(&x, &by)?.equal(&scale::formula(&x, &by)), "{numel} in {kind:?}");
        }
    }
    Ok(())
}
