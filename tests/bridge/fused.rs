//! Tests of the fused operations of libtorch that tch lacks, against formulas, and of the order of attention backends.

use crate::support::child_process::run_case;
use crate::support::{Outcome, normal};
use occlude::bridge::{SdpBackend, layer_norm_backward, sdp_backends, set_sdp_backends};
use occlude::error::ExitCode;
use tch::{Kind, Tensor};

crate::trials![
    layer_norm_gradients_match_the_formula,
    layer_norm_computes_only_required_gradients,
    a_layer_norm_error_names_the_mismatch,
    attention_uses_the_selected_backends,
];

const EPS: f64 = 1e-6;

/// Returns x [4, 7, 24], scale and shift [24], and a gradient of the shape of x, in fp64.
fn arguments() -> [Tensor; 4] {
    let draw = |seed, shape: &[i64]| normal(seed, shape).to_kind(Kind::Double);
    [draw(1, &[4, 7, 24]) * 3.0 + 1.0, draw(2, &[24]) + 1.0, draw(3, &[24]), draw(4, &[4, 7, 24])]
}

/// Returns the three gradients by the chain rule, with x̂ = (x − mean) · rstd and g' = g · scale: rstd · (g' − mean(g')
/// − x̂ · mean(g' · x̂)), Σ g · x̂, Σ g.
fn formula(x: &Tensor, scale: &Tensor, gradient: &Tensor) -> [Tensor; 3] {
    let mean = |t: &Tensor| t.mean_dim(-1, true, None);
    let centered = x - mean(x);
    let rstd = (mean(&centered.square()) + EPS).rsqrt();
    let hat = centered * &rstd;
    let inner = gradient * scale;
    let gx: Tensor = rstd * (&inner - mean(&inner) - &hat * mean(&(&inner * &hat)));
    let rows = |t: Tensor| t.sum_dim_intlist([0, 1].as_slice(), false, None);
    [gx, rows(gradient * hat), rows(gradient.shallow_clone())]
}

fn layer_norm_gradients_match_the_formula() -> Outcome {
    // fp32 rounds to 6e-8, and sums 28 rows.
    for (kind, bound) in [(Kind::Double, 1e-13), (Kind::Float, 2e-6)] {
        let exact = arguments();
        let [x, scale, shift, gradient] = [0, 1, 2, 3].map(|i: usize| exact[i].to_kind(kind));
        let (_, mean, rstd) = x.native_layer_norm([24], Some(&scale), Some(&shift), EPS);
        let found = layer_norm_backward(&gradient, &x, [&mean, &rstd], [&scale, &shift], [true; 3])?;
        for (at, (found, expected)) in found.iter().zip(formula(&exact[0], &exact[1], &exact[3])).enumerate() {
            let found = found.as_ref().expect("all three are required");
            assert_eq!((found.kind(), found.size()), (kind, expected.size()));
            let difference = (found.to_kind(Kind::Double) - &expected).norm() / expected.norm();
            let difference = difference.double_value(&[]);
            assert!(difference <= bound, "{kind:?}: gradient {at} is off by {difference:e}");
        }
    }
    Ok(())
}

fn layer_norm_computes_only_required_gradients() -> Outcome {
    let [x, scale, shift, gradient] = arguments();
    let (_, mean, rstd) = x.native_layer_norm([24], Some(&scale), Some(&shift), EPS);
    for expected in [[true, false, false], [false, true, true], [false; 3]] {
        let found = layer_norm_backward(&gradient, &x, [&mean, &rstd], [&scale, &shift], expected)?;
        assert_eq!(found.each_ref().map(|gradient| gradient.is_some()), expected);
    }
    // Leaves that require gradients do not make it a recorded operation.
    let scale = scale.set_requires_grad(true);
    let [gx, _, _] = layer_norm_backward(&gradient, &x, [&mean, &rstd], [&scale, &shift], [true, false, false])?;
    assert!(!gx.expect("wanted").requires_grad());
    Ok(())
}

fn a_layer_norm_error_names_the_mismatch() -> Outcome {
    let [x, scale, shift, gradient] = arguments();
    let (_, mean, rstd) = x.native_layer_norm([24], Some(&scale), Some(&shift), EPS);
    let short = scale.narrow(0, 0, 23);
    let error = layer_norm_backward(&gradient, &x, [&mean, &rstd], [&short, &shift], [true; 3]).expect_err("23 for 24");
    assert!(error.message.starts_with("layer norm, backward: ") && error.message.contains("23"), "{error}");
    Ok(())
}

/// Runs in its own process, because the order of backends is process-wide.
pub fn check_sdp_order() {
    use SdpBackend::*;
    let attention = || {
        let [q, k, v] = [5, 6, 7].map(|seed| normal(seed, &[2, 3, 10, 8]));
        Tensor::f_scaled_dot_product_attention(&q, &k, &v, None::<Tensor>, 0.0, false, None, false)
    };
    assert_eq!(sdp_backends(), [Flash, Efficient, Math, Cudnn], "libtorch's own");
    let usual = attention().expect("attention");
    for order in [&[Cudnn, Flash, Efficient, Math][..], &[Math], &[Efficient, Math], &[Flash, Cudnn, Math]] {
        set_sdp_backends(order).expect("an order");
        assert_eq!(sdp_backends(), order);
        let difference = (attention().expect("attention") - &usual).abs().max().double_value(&[]);
        assert!(difference < 1e-6, "{order:?} is off by {difference:e}");
    }
    // A CPU has the flash kernel and the formula.
    set_sdp_backends(&[Cudnn]).expect("an order");
    assert_eq!(sdp_backends(), [Cudnn]);
    let error = attention().expect_err("no backend is left").to_string();
    assert!(error.contains("No viable backend"), "{error}");
    for order in [&[][..], &[Flash, Math, Flash]] {
        let error = set_sdp_backends(order).expect_err("refused");
        assert!(error.code == ExitCode::Usage && error.message.contains("each once; got ["), "{error}");
    }
    assert_eq!(sdp_backends(), [Cudnn], "a rejected order changes nothing");
}

fn attention_uses_the_selected_backends() -> Outcome {
    let (code, output, why) = run_case("sdp")?;
    assert_eq!(code, Some(0), "{output}{why}");
    Ok(())
}
