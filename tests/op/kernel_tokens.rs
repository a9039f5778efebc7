//! Tests of the kernels over tokens, from patches to the loss, against their formulas in odd sizes: values and
//! gradients.

use crate::support::tolerance::{assert_within_tolerance, compare_kernel, kernel_devices, random_inputs};
use crate::support::{Outcome, normal};
use occlude::grid::Grid;
use occlude::op::patch::{self, ChannelStats, PatchNorm};
use occlude::op::shuffle::{SampleKey, shuffle};
use occlude::op::tokens;
use occlude::op::tokens::TokenLayout;
use occlude::op::{cosine, layer_norm, masked_mse, scale};
use tch::{Device, Kind, Tensor};

crate::trials![
    layer_norm_kernel_matches_for_every_width,
    layer_norm_kernel_adds_the_residual_first,
    layer_norm_kernel_is_stable_for_rows_far_from_zero,
    token_assembly_kernel_matches_for_every_class_token_source,
    token_assembly_kernel_computes_only_required_gradients,
    patch_kernel_reads_and_normalizes_like_the_formula,
    patch_kernel_accepts_grids_of_several_frames,
    masked_mse_kernel_matches,
    cosine_kernel_matches,
    cosine_kernel_accepts_zero_rows,
    scale_kernel_rounds_once,
];

const KINDS: [Kind; 2] = [Kind::Float, Kind::BFloat16];

/// Rows that do not fill a block; widths of a warp, of a block, and of no multiple of 16 bytes.
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

/// Returns x, r, scale and shift.
fn rows(kind: Kind, rows: &[i64], width: i64) -> Vec<Tensor> {
    let shape: Vec<i64> = rows.iter().copied().chain([width]).collect();
    random_inputs(1, &[&shape, &shape, &[width], &[width]], kind)
}

fn layer_norm_kernel_matches_for_every_width() -> Outcome {
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

/// Joins both outputs, so that both have a gradient.
fn concat_outputs(outputs: impl Into<[Tensor; 2]>) -> Tensor {
    Tensor::cat(&outputs.into(), 0)
}

fn layer_norm_kernel_adds_the_residual_first() -> Outcome {
    for (kind, shape, width) in NORMS {
        let label = format!("{shape:?} rows of {width} in {kind:?}");
        let inputs = rows(kind, shape, width);
        let kernel = |x: &[Tensor]| layer_norm::add_kernel(&x[0], &x[1], &x[2], &x[3]).expect("a launch");
        let formula = |x: &[Tensor]| layer_norm::add_formula(&x[0], &x[1], &x[2], &x[3]);
        compare_kernel(&label, &inputs, &move |x| concat_outputs(kernel(x)), &move |x| concat_outputs(formula(x)));
        let alone = format!("{label}, the sum unused");
        compare_kernel(&alone, &inputs, &move |x| kernel(x).1, &move |x| formula(x).1);
    }
    Ok(())
}

fn layer_norm_kernel_is_stable_for_rows_far_from_zero() -> Outcome {
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

/// Returns an order of N tokens for each sample, split into `keep` [B, K] and `drop` [B, N − K].
fn token_orders(batch: i64, tokens: i64, kept: i64) -> [Tensor; 2] {
    let keys: Vec<SampleKey> = (0..batch as u64).map(|id| SampleKey { id, epoch: 0, repeat: 0 }).collect();
    let order = shuffle(1, &keys, tokens, Device::Cpu);
    [order.narrow(1, 0, kept).contiguous(), order.narrow(1, kept, tokens - kept).contiguous()]
}

type Filled<'a> = (&'a Tensor, Option<&'a Tensor>, TokenLayout<'a>);

/// Passes tensors to `run` as the arguments of fill: visible tokens, then class token and mask token where they are
/// separate.
fn run_assembly(x: &[Tensor], fixed: &[Tensor; 3], apart: bool, fills: bool, run: &dyn Fn(Filled) -> Tensor) -> Tensor {
    let [positions, keep, drop] = fixed.each_ref().map(|tensor| tensor.to_device(x[0].device()));
    let token = fills.then(|| x.last().expect("a mask token"));
    let ranges = TokenLayout { positions: &positions, keep: &keep, hidden: token.map(|token| (token, &drop)) };
    run((&x[0], apart.then(|| &x[1]), ranges))
}

fn token_assembly_kernel_matches_for_every_class_token_source() -> Outcome {
    let sizes = [(1, 64, 16, 24), (3, 49, 12, 33), (3, 64, 33, 300), (2, 196, 49, 64)];
    for (i, (batch, tokens, kept, width)) in sizes.into_iter().enumerate() {
        for (apart, fills) in [(true, true), (true, false), (false, true), (false, false)] {
            let kind = KINDS[(i + usize::from(apart)) % 2];
            let [keep, drop] = token_orders(batch, tokens, kept);
            let visible: &[i64] = &[batch, kept + i64::from(!apart), width];
            let vector: &[i64] = &[width];
            let shapes = [&[visible][..], &vec![vector; usize::from(apart) + usize::from(fills)]].concat();
            let positions = normal(5, &[tokens, width]).to_kind(kind).to_kind(Kind::Float);
            let [ours, plain] = [[&positions, &keep, &drop]; 2].map(|all| all.map(Tensor::shallow_clone));
            compare_kernel(
                &format!("{batch} × {kept} of {tokens} × {width} in {kind:?}, apart: {apart}, fills: {fills}"),
                &random_inputs(1, &shapes, kind),
                &move |x| {
                    run_assembly(x, &ours, apart, fills, &|(x, class, at)| {
                        tokens::kernel(x, class, at).expect("a launch")
                    })
                },
                &move |x| run_assembly(x, &plain, apart, fills, &|(x, class, at)| tokens::formula(x, class, at)),
            );
        }
    }
    Ok(())
}

fn token_assembly_kernel_computes_only_required_gradients() -> Outcome {
    let [keep, drop] = token_orders(2, 9, 4);
    let positions = normal(5, &[9, 16]);
    for expected in 0..3 {
        let x = random_inputs(3, &[&[2, 4, 16], &[16], &[16]], Kind::Float);
        let x: Vec<Tensor> = x.into_iter().enumerate().map(|(i, t)| t.set_requires_grad(i == expected)).collect();
        let ranges = TokenLayout { positions: &positions, keep: &keep, hidden: Some((&x[2], &drop)) };
        tokens::kernel(&x[0], Some(&x[1]), ranges)?.sum(Kind::Float).backward();
        for (i, t) in x.iter().enumerate() {
            assert_eq!(t.grad().defined(), i == expected, "input {i} where {expected} is trained");
        }
    }
    Ok(())
}

/// Returns pixels of every value, and the normalization constants of their channels.
fn random_image(grid: &Grid, batch: i64) -> (Tensor, ChannelStats) {
    let [c, t, y, x] = grid.pixel_shape();
    let bytes = (normal(11, &[batch, c, t, y, x]) * 60.0 + 120.0).clamp(0.0, 255.0).to_kind(Kind::Uint8);
    let first_channels = |values: [f64; 4]| values[..c as usize].to_vec();
    (
        bytes,
        ChannelStats {
            mean: first_channels([0.485, 0.456, 0.406, 0.2]),
            std: first_channels([0.229, 0.224, 0.225, 0.5]),
        },
    )
}

fn patches_agree(grid: &Grid, batch: i64, kept: i64) -> Outcome {
    let (bytes, constants) = random_image(grid, batch);
    let [index, _] = token_orders(batch, grid.tokens(), kept);
    let column = |values: &[f64]| Tensor::from_slice(values).view([1, -1, 1, 1, 1]);
    let exact = (bytes.to_kind(Kind::Double) / 255.0 - column(&constants.mean)) / column(&constants.std);
    for device in kernel_devices() {
        let levels = [PatchNorm::Raw, PatchNorm::PerPatch, PatchNorm::PerChannel, PatchNorm::PerChannelEpsInside];
        for (x, level) in
            levels.map(|level| (0, level)).into_iter().chain([(1, PatchNorm::Raw), (1, PatchNorm::PerPatch)])
        {
            // Floats are not normalized.
            let floats = exact.to_kind(Kind::Float);
            let (x, exact) = if x == 0 { (&bytes, &exact) } else { (&floats, &floats.to_kind(Kind::Double)) };
            let exact = patch::formula(exact, grid, &constants, &index, level, Kind::Double);
            for kind in KINDS {
                let [x, index] = [x, &index].map(|tensor| tensor.to_device(device));
                let ours = patch::kernel(&x, grid, &constants, &index, level, kind)?;
                let plain = patch::formula(&x, grid, &constants, &index, level, kind);
                let label = format!("{grid:?} of {:?} as {kind:?}, {level:?}, on {device:?}", x.kind());
                assert_within_tolerance(&label, &ours.to_device(Device::Cpu), &plain.to_device(Device::Cpu), &exact);
            }
        }
    }
    Ok(())
}

fn patch_kernel_reads_and_normalizes_like_the_formula() -> Outcome {
    let image = |rows, cols, channels, patch| Grid { frames: 1, rows, cols, channels, patch_frames: 1, patch };
    patches_agree(&image(3, 2, 3, 16), 2, 5)?;
    patches_agree(&image(2, 3, 3, 14), 2, 2)?;
    patches_agree(&image(5, 4, 1, 7), 3, 13)?;
    patches_agree(&image(2, 7, 4, 4), 1, 14)
}

fn patch_kernel_accepts_grids_of_several_frames() -> Outcome {
    patches_agree(&Grid { frames: 3, rows: 2, cols: 5, channels: 3, patch_frames: 2, patch: 8 }, 2, 11)?;
    patches_agree(&Grid { frames: 2, rows: 3, cols: 1, channels: 2, patch_frames: 3, patch: 5 }, 3, 4)
}

fn masked_mse_kernel_matches() -> Outcome {
    for kind in KINDS {
        for (batch, dropped, values) in [(1, 1, 1), (3, 147, 48), (3, 13, 75), (2, 50, 588)] {
            let target = normal(12, &[batch, dropped, values]);
            let [ours, plain] = [&target, &target].map(Tensor::shallow_clone);
            compare_kernel(
                &format!("{batch} × {dropped} × {values} in {kind:?}"),
                &random_inputs(11, &[&[batch, dropped, values]], kind),
                &move |x| masked_mse::kernel(&x[0], &ours.to_device(x[0].device())).expect("a launch"),
                &move |x| masked_mse::formula(&x[0], &plain.to_device(x[0].device())),
            );
        }
    }
    Ok(())
}

fn cosine_kernel_matches() -> Outcome {
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

fn cosine_kernel_accepts_zero_rows() -> Outcome {
    let x = normal(15, &[3, 8]);
    let y = normal(16, &[3, 8]);
    let _ = x.get(0).zero_();
    let _ = y.get(1).zero_();
    let x = x.set_requires_grad(true);
    let sum = cosine::kernel(&x, &y)?;
    sum.backward();
    let expected = 2.0 + cosine::formula(&x.get(2), &y.get(2)).double_value(&[]);
    assert!((sum.double_value(&[]) - expected).abs() < 1e-5, "{sum} against {expected}");
    let gradient = x.grad();
    assert!(gradient.isfinite().all().int64_value(&[]) == 1, "{gradient}");
    assert!(gradient.get(1).abs().max().double_value(&[]) == 0.0, "a target of zero has no gradient");
    Ok(())
}

fn scale_kernel_rounds_once() -> Outcome {
    for kind in KINDS {
        for numel in [1, 33, 2400] {
            let x = normal(17, &[numel]).to_kind(kind);
            let by = Tensor::from(0.123_456_7f32);
            assert!(scale::kernel(&x, &by)?.equal(&scale::formula(&x, &by)), "{numel} in {kind:?}");
        }
    }
    Ok(())
}
