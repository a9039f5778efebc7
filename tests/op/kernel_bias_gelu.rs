//! Tests of the kernels of bias, GELU and partial sums against their formulas: values and gradients, in odd sizes.

use crate::support::tolerance::{assert_within_tolerance, compare_kernel, kernel_devices, random_inputs};
use crate::support::{Outcome, normal, root};
use occlude::op::bias_gelu::{self, Gelu};
use occlude::op::{linear, sum_partials};
use tch::Kind;

crate::trials![
    bias_gelu_matches_for_every_gelu,
    bias_gelu_matches_without_bias,
    a_bias_is_added_before_the_product_is_rounded,
    the_fused_product_of_the_library_differs_by_device,
    fold_sums_rows_in_order,
];

const KINDS: [Kind; 3] = [Kind::Float, Kind::BFloat16, Kind::Half];

fn bias_gelu_matches_for_every_gelu() -> Outcome {
    for kind in KINDS {
        for form in [Gelu::Exact, Gelu::Tanh, Gelu::Quick] {
            for (rows, width) in [(1, 1), (65, 24), (3, 301), (130, 33)] {
                compare_kernel(
                    &format!("{form:?} of {rows} × {width} in {kind:?}"),
                    &random_inputs(1, &[&[rows, width], &[width]], kind),
                    &move |x| bias_gelu::kernel(&x[0], Some(&x[1]), form).expect("a launch"),
                    &move |x| bias_gelu::formula(&x[0], Some(&x[1]), form),
                );
            }
        }
    }
    Ok(())
}

fn bias_gelu_matches_without_bias() -> Outcome {
    for spread in [0.01, 1.0, 30.0] {
        let x = random_inputs(2, &[&[2, 5, 16]], Kind::Float).remove(0) * spread;
        compare_kernel(
            &format!("× {spread}"),
            &[x],
            &|x| bias_gelu::kernel(&x[0], None, Gelu::Exact).expect("a launch"),
            &|x| bias_gelu::formula(&x[0], None, Gelu::Exact),
        );
    }
    Ok(())
}

/// `addmm` does so; a product followed by a sum rounds twice.
fn a_bias_is_added_before_the_product_is_rounded() -> Outcome {
    for device in kernel_devices() {
        for kind in [Kind::BFloat16, Kind::Half] {
            let inputs = random_inputs(4, &[&[3, 50, 96], &[288, 96], &[288]], kind);
            let [x, w, b] = [0, 1, 2].map(|i: usize| inputs[i].to_device(device));
            let turned = x.transpose(0, 1);
            for x in [&x, &turned] {
                let ours = linear::linear(x, &w, &b)?;
                let full = b.addmm(&x.reshape([-1, 96]), &w.tr()).view_as(&ours);
                assert!(ours.equal(&full), "differs from addmm in {kind:?} on {device:?}");
                assert!(
                    !ours.equal(&(x.matmul(&w.tr()) + &b)),
                    "the two roundings do not differ in {kind:?} on {device:?}"
                );
            }
        }
    }
    Ok(())
}

/// The fused product and activation of libtorch is the exact GELU on a CPU and the tanh form on a GPU, so it cannot be
/// used.
fn the_fused_product_of_the_library_differs_by_device() -> Outcome {
    let script = "import torch, torch.nn.functional as f\n\
                  x, w, b = torch.randn(35, 16), torch.randn(24, 16), torch.randn(24)\n\
                  y, p = torch._addmm_activation(b, x, w.T, use_gelu=True), torch.addmm(b, x, w.T)\n\
                  print((y - f.gelu(p)).abs().max().item(), (y - f.gelu(p, approximate='tanh')).abs().max().item())";
    let python = root().join(".deps/venv/bin/python");
    let output = std::process::Command::new(python).args(["-c", script]).output()?;
    let text = String::from_utf8(output.stdout)?;
    let difference: Vec<f64> = text.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
    assert!(
        difference[0] < 1e-6 && difference[1] > 1e-5,
        "{difference:?}: on a CPU it is no longer the exact form; see op/linear.rs"
    );
    Ok(())
}

fn fold_sums_rows_in_order() -> Outcome {
    let parts = normal(3, &[37, 130]);
    let exact = sum_partials::formula(&parts.to_kind(Kind::Double), Kind::Double);
    for kind in KINDS {
        assert_within_tolerance(
            &format!("{kind:?}"),
            &sum_partials::kernel(&parts, kind)?,
            &sum_partials::formula(&parts, kind),
            &exact,
        );
    }
    Ok(())
}
