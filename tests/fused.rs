//! libtorch's fused operations that tch leaves out, against formulas; the order of attention kernels.

use crate::bridge::run;
use crate::support::{Outcome, normal};
use occlude::bridge::{Backend, layer_norm_backward, sdp_order, set_sdp_order};
use occlude::fault::Code;
use tch::{Kind, Tensor};

crate::trials![
    layer_norm_s_gradients_are_those_of_the_formula,
    only_wanted_gradients_of_layer_norm_are_computed,
    a_fault_of_layer_norm_says_what_does_not_fit,
    attention_takes_the_kernels_that_are_named,
];

const EPS: f64 = 1e-6;

/// x [4, 7, 24], scale and shift [24], and a gradient of the shape of x, in fp64.
fn arguments() -> [Tensor; 4] {
    let draw = |seed, shape: &[i64]| normal(seed, shape).to_kind(Kind::Double);
    [draw(1, &[4, 7, 24]) * 3.0 + 1.0, draw(2, &[24]) + 1.0, draw(3, &[24]), draw(4, &[4, 7, 24])]
}

/// The three gradients by the chain rule, with x̂ = (x − mean) · rstd and g' = g · scale:
/// rstd · (g' − mean(g') − x̂ · mean(g' · x̂)), Σ g · x̂, Σ g.
fn formula(x: &Tensor, scale: &Tensor, gradient: &Tensor) -> [Tensor; 3] {
    let mean = |t: &Tensor| t.mean_dim(-1, true, None);
    let centred = x - mean(x);
    let rstd = (mean(&centred.square()) + EPS).rsqrt();
    let hat = centred * &rstd;
    let inner = gradient * scale;
    let gx: Tensor = rstd * (&inner - mean(&inner) - &hat * mean(&(&inner * &hat)));
    let rows = |t: Tensor| t.sum_dim_intlist([0, 1].as_slice(), false, None);
    [gx, rows(gradient * hat), rows(gradient.shallow_clone())]
}

fn layer_norm_s_gradients_are_those_of_the_formula() -> Outcome {
    // fp32 rounds to 6e-8, and sums 28 rows.
    for (kind, bound) in [(Kind::Double, 1e-13), (Kind::Float, 2e-6)] {
        let exact = arguments();
        let [x, scale, shift, gradient] = [0, 1, 2, 3].map(|i: usize| exact[i].to_kind(kind));
        let (_, mean, rstd) = x.native_layer_norm([24], Some(&scale), Some(&shift), EPS);
        let found = layer_norm_backward(&gradient, &x, [&mean, &rstd], [&scale, &shift], [true; 3])?;
        for (at, (found, wanted)) in found.iter().zip(formula(&exact[0], &exact[1], &exact[3])).enumerate() {
            let found = found.as_ref().expect("all three are wanted");
            assert_eq!((found.kind(), found.size()), (kind, wanted.size()));
            let off = (found.to_kind(Kind::Double) - &wanted).norm() / wanted.norm();
            let off = off.double_value(&[]);
            assert!(off <= bound, "{kind:?}: gradient {at} is off by {off:e}");
        }
    }
    Ok(())
}

fn only_wanted_gradients_of_layer_norm_are_computed() -> Outcome {
    let [x, scale, shift, gradient] = arguments();
    let (_, mean, rstd) = x.native_layer_norm([24], Some(&scale), Some(&shift), EPS);
    for wanted in [[true, false, false], [false, true, true], [false; 3]] {
        let found = layer_norm_backward(&gradient, &x, [&mean, &rstd], [&scale, &shift], wanted)?;
        assert_eq!(found.each_ref().map(|gradient| gradient.is_some()), wanted);
    }
    // Leaves that want gradients do not make it a recorded operation.
    let scale = scale.set_requires_grad(true);
    let [gx, _, _] = layer_norm_backward(&gradient, &x, [&mean, &rstd], [&scale, &shift], [true, false, false])?;
    assert!(!gx.expect("wanted").requires_grad());
    Ok(())
}

fn a_fault_of_layer_norm_says_what_does_not_fit() -> Outcome {
    let [x, scale, shift, gradient] = arguments();
    let (_, mean, rstd) = x.native_layer_norm([24], Some(&scale), Some(&shift), EPS);
    let short = scale.narrow(0, 0, 23);
    let fault = layer_norm_backward(&gradient, &x, [&mean, &rstd], [&short, &shift], [true; 3]).expect_err("23 for 24");
    assert!(fault.message.starts_with("layer norm, backward: ") && fault.message.contains("23"), "{fault}");
    Ok(())
}

/// In a process of its own: the order holds for the whole process.
pub fn sdp() {
    use Backend::*;
    let attention = || {
        let [q, k, v] = [5, 6, 7].map(|seed| normal(seed, &[2, 3, 10, 8]));
        Tensor::f_scaled_dot_product_attention(&q, &k, &v, None::<Tensor>, 0.0, false, None, false)
    };
    assert_eq!(sdp_order(), [Flash, Efficient, Math, Cudnn], "libtorch's own");
    let usual = attention().expect("attention");
    for order in [&[Cudnn, Flash, Efficient, Math][..], &[Math], &[Efficient, Math], &[Flash, Cudnn, Math]] {
        set_sdp_order(order).expect("an order");
        assert_eq!(sdp_order(), order);
        let off = (attention().expect("attention") - &usual).abs().max().double_value(&[]);
        assert!(off < 1e-6, "{order:?} is off by {off:e}");
    }
    // On a CPU there are flash and the formula.
    set_sdp_order(&[Cudnn]).expect("an order");
    assert_eq!(sdp_order(), [Cudnn]);
    let error = attention().expect_err("no kernel is left").to_string();
    assert!(error.contains("No viable backend"), "{error}");
    for order in [&[][..], &[Flash, Math, Flash]] {
        let fault = set_sdp_order(order).expect_err("refused");
        assert!(fault.code == Code::Usage && fault.message.contains("each once; got ["), "{fault}");
    }
    assert_eq!(sdp_order(), [Cudnn], "what is refused changes nothing");
}

fn attention_takes_the_kernels_that_are_named() -> Outcome {
    let (code, told, why) = run("sdp")?;
    assert_eq!(code, Some(0), "{told}{why}");
    Ok(())
}
