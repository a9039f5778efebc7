//! Every kernel against its formula, in odd sizes, values and gradients.

use crate::bar::{compare_kernel, inputs, judge};
use crate::support::{Outcome, normal};
use occlude::op::bias_gelu::{self, Form};
use occlude::op::fold;
use tch::Kind;

crate::trials![bias_gelu_agrees_in_every_form, bias_gelu_agrees_without_a_bias, fold_adds_rows_in_their_order,];

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

fn fold_adds_rows_in_their_order() -> Outcome {
    let parts = normal(3, &[37, 130]);
    let exact = fold::formula(&parts.to_kind(Kind::Double), Kind::Double);
    for kind in KINDS {
        judge(&format!("{kind:?}"), &fold::kernel(&parts, kind)?, &fold::formula(&parts, kind), &exact);
    }
    Ok(())
}
