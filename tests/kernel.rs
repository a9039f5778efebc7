//! Every kernel against its formula, in odd sizes, values and gradients.

use crate::bar::{compare_kernel, grounds, inputs, judge};
use crate::support::{Outcome, normal, root};
use occlude::op::bias_gelu::{self, Form};
use occlude::op::{fold, linear};
use tch::Kind;

crate::trials![
    bias_gelu_agrees_in_every_form,
    bias_gelu_agrees_without_a_bias,
    a_bias_is_added_before_the_product_is_rounded,
    the_library_s_product_with_a_unit_is_another_function_on_each_device,
    fold_adds_rows_in_their_order,
];

const KINDS: [Kind; 3] = [Kind::Float, Kind::BFloat16, Kind::Half];

fn bias_gelu_agrees_in_every_form() -> Outcome {
    for kind in KINDS {
        for form in [Form::Exact, Form::Tanh, Form::Sigmoid] {
            for (rows, width) in [(1, 1), (65, 24), (3, 301), (130, 33)] {
                compare_kernel(
                    &format!("{form:?} of {rows} × {width} in {kind:?}"),
                    &inputs(1, &[&[rows, width], &[width]], kind),
                    &move |x| bias_gelu::kernel(&x[0], Some(&x[1]), form).expect("a launch"),
                    &move |x| bias_gelu::formula(&x[0], Some(&x[1]), form),
                );
            }
        }
    }
    Ok(())
}

fn bias_gelu_agrees_without_a_bias() -> Outcome {
    for spread in [0.01, 1.0, 30.0] {
        let x = inputs(2, &[&[2, 5, 16]], Kind::Float).remove(0) * spread;
        compare_kernel(
            &format!("× {spread}"),
            &[x],
            &|x| bias_gelu::kernel(&x[0], None, Form::Exact).expect("a launch"),
            &|x| bias_gelu::formula(&x[0], None, Form::Exact),
        );
    }
    Ok(())
}

/// `addmm` does so; a product and a sum behind it round twice.
fn a_bias_is_added_before_the_product_is_rounded() -> Outcome {
    for ground in grounds() {
        for kind in [Kind::BFloat16, Kind::Half] {
            let given = inputs(4, &[&[3, 50, 96], &[288, 96], &[288]], kind);
            let [x, w, b] = [0, 1, 2].map(|i: usize| given[i].to_device(ground));
            let turned = x.transpose(0, 1);
            for x in [&x, &turned] {
                let ours = linear::linear(x, &w, &b)?;
                let whole = b.addmm(&x.reshape([-1, 96]), &w.tr()).view_as(&ours);
                assert!(ours.equal(&whole), "not addmm's in {kind:?} on {ground:?}");
                assert!(!ours.equal(&(x.matmul(&w.tr()) + &b)), "nothing shows which it was in {kind:?} on {ground:?}");
            }
        }
    }
    Ok(())
}

/// libtorch's product with a unit behind it is the exact form on a CPU and the tanh form on a GPU: no one function.
fn the_library_s_product_with_a_unit_is_another_function_on_each_device() -> Outcome {
    let script = "import torch, torch.nn.functional as f\n\
                  x, w, b = torch.randn(35, 16), torch.randn(24, 16), torch.randn(24)\n\
                  y, p = torch._addmm_activation(b, x, w.T, use_gelu=True), torch.addmm(b, x, w.T)\n\
                  print((y - f.gelu(p)).abs().max().item(), (y - f.gelu(p, approximate='tanh')).abs().max().item())";
    let python = root().join(".deps/venv/bin/python");
    let output = std::process::Command::new(python).args(["-c", script]).output()?;
    let told = String::from_utf8(output.stdout)?;
    let off: Vec<f64> = told.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
    assert!(off[0] < 1e-6 && off[1] > 1e-5, "{off:?}: on a CPU it is no longer the exact form; see op/linear.rs");
    Ok(())
}

fn fold_adds_rows_in_their_order() -> Outcome {
    let parts = normal(3, &[37, 130]);
    let exact = fold::formula(&parts.to_kind(Kind::Double), Kind::Double);
    for kind in KINDS {
        judge(&format!("{kind:?}"), &fold::kernel(&parts, kind)?, &fold::formula(&parts, kind), &exact);
    }
    Ok(())
}
