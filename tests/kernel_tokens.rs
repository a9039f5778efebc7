//! Kernels that handle tokens, from patches to the loss, each against its formula in odd sizes: values and gradients.

use crate::bar::{compare_kernel, inputs};
use crate::support::{Outcome, normal};
use occlude::op::layer_norm;
use tch::{Kind, Tensor};

crate::trials![
    layer_norm_s_kernel_agrees_in_every_width,
    layer_norm_s_kernel_adds_the_residual_first,
    layer_norm_s_kernel_stands_a_row_far_from_nought,
];

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
