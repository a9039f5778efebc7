//! Tests of autograd nodes made of closures: gradients, inputs, errors, lifetimes.

use crate::support::Outcome;
use occlude::bridge::{ForwardOutput, GradHooks, apply_function, set_grad};
use occlude::error::{Error, Result};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use tch::{Device, Kind, Tensor};

crate::trials![
    gradients_agree_with_finite_differences,
    an_unused_output_has_a_zero_gradient,
    only_inputs_that_require_grad_get_gradients,
    an_integer_output_keeps_its_position_among_gradients,
    an_output_may_be_an_input_or_a_view_of_one,
    an_error_in_backward_keeps_its_message,
    a_panic_in_backward_keeps_its_message,
    missing_or_misshapen_gradients_are_rejected,
    an_error_in_forward_is_returned,
    backward_can_start_on_another_thread,
    backward_can_run_a_nested_backward,
    no_node_is_recorded_without_grad,
    saved_tensors_live_until_the_backward_pass,
    an_in_place_change_of_a_saved_tensor_is_detected,
    a_second_derivative_is_rejected,
    nodes_and_closures_are_freed_with_their_graph,
    a_bf16_weight_accumulates_an_fp32_gradient,
    hooks_fire_in_backward_order_after_nodes,
];

const F64: (Kind, Device) = (Kind::Double, Device::Cpu);

/// Returns a leaf of pseudo-random values between -1 and 1.
fn leaf(seed: i64, shape: &[i64]) -> Tensor {
    let n = shape.iter().product::<i64>();
    let values = (Tensor::arange(n, F64) * 1.7 + seed as f64).sin();
    values.view(shape).set_requires_grad(true)
}

/// Returns tanh(a · b) [R, N] and Σ a² [], for a [R, K] and b [K, N].
fn product(a: &Tensor, b: &Tensor) -> Result<Vec<Tensor>> {
    apply_function(
        &[a, b],
        |x| {
            let y = x[0].f_matmul(&x[1])?.tanh();
            let squares = x[0].square().sum(Kind::Double);
            let saved = vec![x[0].shallow_clone(), x[1].shallow_clone(), y.shallow_clone()];
            Ok(ForwardOutput { outputs: vec![y, squares], saved })
        },
        |saved, gradients, expected| {
            let [a, b, y] = saved else { unreachable!("three were saved") };
            let inner: Tensor = &gradients[0] * (1.0 - y.square());
            let ga = expected[0].then(|| inner.matmul(&b.tr()) + a * 2.0 * &gradients[1]);
            let gb = expected[1].then(|| a.tr().matmul(&inner));
            Ok(vec![ga, gb])
        },
    )
}

/// A node with one input and one output, y = x · by.
fn scale_node(x: &Tensor, by: f64) -> Result<Tensor> {
    let forward = move |x: &[Tensor]| Ok(ForwardOutput { outputs: vec![&x[0] * by], saved: vec![] });
    Ok(apply_function(&[x], forward, move |_, g, _| Ok(vec![Some(&g[0] * by)]))?.remove(0))
}

/// A node whose backward is the closure.
fn failing_node(
    x: &Tensor,
    backward: impl Fn() -> Result<Vec<Option<Tensor>>> + Send + Sync + 'static,
) -> Result<Tensor> {
    let forward = |x: &[Tensor]| Ok(ForwardOutput { outputs: vec![&x[0] * 2.0], saved: vec![] });
    Ok(apply_function(&[x], forward, move |_, _, _| backward())?.remove(0))
}

/// Compares the gradients of f(leaves) (a scalar, fp64) with central differences.
fn gradcheck(leaves: &[Tensor], f: impl Fn(&[Tensor]) -> Tensor) {
    let gradients = Tensor::run_backward(&[f(leaves)], leaves, false, false);
    let step = 1e-5;
    for (which, leaf) in leaves.iter().enumerate() {
        let found: Vec<f64> = Vec::try_from(gradients[which].contiguous().view([-1])).expect("numbers");
        for (at, found) in found.iter().enumerate() {
            let moved = |by: f64| {
                let _off = tch::no_grad_guard();
                let leaves: Vec<Tensor> = leaves.iter().map(Tensor::shallow_clone).collect();
                let mut folder = leaf.view([-1]).get(at as i64);
                let _ = folder.g_add_scalar_(by);
                let value = f(&leaves).double_value(&[]);
                let _ = folder.g_sub_scalar_(by);
                value
            };
            let expected = (moved(step) - moved(-step)) / (2.0 * step);
            assert!(
                (found - expected).abs() <= 1e-8 * (1.0 + expected.abs()),
                "leaf {which} [{at}]: {found} for {expected}"
            );
        }
    }
}

fn gradients_agree_with_finite_differences() -> Outcome {
    let leaves = [leaf(1, &[3, 4]), leaf(2, &[4, 2])];
    gradcheck(&leaves, |x| {
        let out = product(&x[0], &x[1]).expect("a node");
        assert_eq!((out[0].size(), out[1].size()), (vec![3, 2], vec![]));
        (&out[0] * leaf(3, &[3, 2]).detach()).sum(Kind::Double) + out[1].exp()
    });
    // Between other operations, and used twice.
    gradcheck(&leaves, |x| {
        let out = product(&x[0].sin(), &x[1]).expect("a node");
        let second = product(&out[0].tr(), &x[0]).expect("a node");
        out[0].square().sum(Kind::Double) + &second[0].sum(Kind::Double) * &out[1] + &second[1]
    });
    Ok(())
}

fn an_unused_output_has_a_zero_gradient() -> Outcome {
    let visible = Arc::new(Mutex::new(Vec::new()));
    let output = visible.clone();
    let x = leaf(1, &[2, 3]);
    let out = apply_function(
        &[&x],
        |x| {
            Ok(ForwardOutput { outputs: vec![&x[0] * 2.0, x[0].sum_dim_intlist(1, false, Kind::Float)], saved: vec![] })
        },
        move |_, g, _| {
            output.lock().expect("a list").push((g[1].size(), g[1].kind(), g[1].abs().max().double_value(&[])));
            Ok(vec![Some(&g[0] * 2.0)])
        },
    )?;
    out[0].sum(Kind::Double).backward();
    assert_eq!(*visible.lock().unwrap(), [(vec![2], Kind::Float, 0.0)]);
    assert_eq!(x.grad(), Tensor::full([2, 3], 2.0, F64));
    Ok(())
}

fn only_inputs_that_require_grad_get_gradients() -> Outcome {
    let a = leaf(1, &[2, 2]);
    let b = leaf(2, &[2, 2]);
    let wishes = Arc::new(Mutex::new(Vec::new()));
    let sum = |a: &Tensor, b: &Tensor| -> Result<Tensor> {
        let output = wishes.clone();
        let forward = |x: &[Tensor]| Ok(ForwardOutput { outputs: vec![&x[0] + &x[1]], saved: vec![] });
        let out = apply_function(&[a, b], forward, move |_, g, expected| {
            output.lock().expect("a list").push(expected.to_vec());
            // Gradients that were not requested are ignored.
            Ok(vec![Some(g[0].shallow_clone()), Some(&g[0] * 3.0)])
        })?;
        Ok(out[0].sum(Kind::Double))
    };
    sum(&a, &b.detach())?.backward();
    assert_eq!(a.grad(), Tensor::ones([2, 2], F64));
    // Both inputs could have a gradient, but only the second is requested.
    let gradients = Tensor::run_backward(&[sum(&a, &b)?], &[&b], false, false);
    assert_eq!(gradients[0], Tensor::full([2, 2], 3.0, F64));
    assert_eq!(*wishes.lock().unwrap(), [[true, false], [false, true]]);
    Ok(())
}

fn an_integer_output_keeps_its_position_among_gradients() -> Outcome {
    let x = leaf(1, &[5]);
    let out = apply_function(
        &[&x],
        |x| {
            let (values, order) = x[0].sort(0, false);
            Ok(ForwardOutput { outputs: vec![order.shallow_clone(), values], saved: vec![order] })
        },
        |saved, g, _| Ok(vec![Some(Tensor::zeros([5], F64).scatter(0, &saved[0], &g[1]))]),
    )?;
    assert!(!out[0].requires_grad() && out[1].requires_grad());
    let weights = Tensor::arange(5, F64);
    (&out[1] * &weights).sum(Kind::Double).backward();
    assert_eq!(x.grad().gather(0, &out[0], false), weights);
    Ok(())
}

fn an_output_may_be_an_input_or_a_view_of_one() -> Outcome {
    let x = leaf(1, &[2, 3]);
    let forward = |x: &[Tensor]| Ok(ForwardOutput { outputs: vec![x[0].shallow_clone(), x[0].tr()], saved: vec![] });
    let out = apply_function(&[&x], forward, |_, g, _| Ok(vec![Some(&g[0] * 10.0 + g[1].tr() * 100.0)]))?;
    assert_eq!(out[0].data_ptr(), x.data_ptr());
    (out[0].sum(Kind::Double) + out[1].sum(Kind::Double)).backward();
    assert_eq!(x.grad(), Tensor::full([2, 3], 110.0, F64));
    Ok(())
}

fn an_error_in_backward_keeps_its_message() -> Outcome {
    let x = leaf(1, &[2]);
    let y = failing_node(&x, || Err(Error::usage("the kernel wants a head of 64, got 63")))?;
    let error = y.sum(Kind::Double).f_backward().expect_err("an error");
    let error = Error::from(error);
    assert!(error.message.ends_with("the kernel wants a head of 64, got 63"), "{error}");
    // An error of tch inside the closure is passed on as well.
    let y = failing_node(&x, || Ok(vec![Some(Tensor::zeros([2], F64).f_matmul(&Tensor::zeros([3, 3], F64))?)]))?;
    let error = y.sum(Kind::Double).f_backward().expect_err("shapes that do not fit").to_string();
    assert!(error.contains("libtorch: ") && error.contains("cannot be multiplied (1x2 and 3x3)"), "{error}");
    // The autograd engine still works.
    scale_node(&x, 3.0)?.sum(Kind::Double).f_backward()?;
    assert_eq!(x.grad(), Tensor::full([2], 3.0, F64));
    Ok(())
}

fn a_panic_in_backward_keeps_its_message() -> Outcome {
    let x = leaf(1, &[2]);
    let y = failing_node(&x, || panic!("row {} has no position", 7))?;
    let error = y.sum(Kind::Double).f_backward().expect_err("a panic").to_string();
    assert!(error.contains("a panic in a node's backward: row 7 has no position"), "{error}");
    let y = failing_node(&x, || panic!("a string"))?;
    let error = std::thread::spawn(move || y.sum(Kind::Double).f_backward().expect_err("a panic").to_string()).join();
    assert!(error.expect("no panic here").contains("backward: a string"));
    Ok(scale_node(&x, 3.0)?.sum(Kind::Double).f_backward()?)
}

fn missing_or_misshapen_gradients_are_rejected() -> Outcome {
    let x = leaf(1, &[2]);
    let error = failing_node(&x, || Ok(vec![]))?
        .sum(Kind::Double)
        .f_backward()
        .expect_err("no gradient for one input")
        .to_string();
    assert!(error.contains("gave 0 gradients; one for each of its 1 inputs is wanted"), "{error}");
    let y = failing_node(&x, || Ok(vec![Some(Tensor::zeros([3], F64))]))?;
    let error = y.sum(Kind::Double).f_backward().expect_err("three gradients for two inputs").to_string();
    assert!(error.contains("invalid gradient at index 0 - got [3] but expected shape compatible with [2]"), "{error}");
    failing_node(&x, || Ok(vec![None]))?.sum(Kind::Double).f_backward()?;
    assert!(!x.grad().defined(), "None is a valid gradient");
    Ok(())
}

fn an_error_in_forward_is_returned() -> Outcome {
    let a = leaf(1, &[2, 3]);
    let b = leaf(2, &[2, 3]);
    let error = product(&a, &b).expect_err("3 columns by 2 rows");
    assert!(error.message.contains("mat1 and mat2 shapes cannot be multiplied"), "{error}");
    assert!((&a * 2.0).requires_grad(), "gradients are enabled again");
    Ok(())
}

fn backward_can_start_on_another_thread() -> Outcome {
    let a = leaf(1, &[3, 4]);
    let b = leaf(2, &[4, 2]);
    let loss = product(&a, &b)?[0].sum(Kind::Double);
    std::thread::spawn(move || loss.backward()).join().expect("a backward pass");
    let expected = Tensor::run_backward(&[a.matmul(&b).tanh().sum(Kind::Double)], &[&a, &b], false, false);
    assert!((a.grad() - &expected[0]).abs().max().double_value(&[]) < 1e-14);
    assert!((b.grad() - &expected[1]).abs().max().double_value(&[]) < 1e-14);
    Ok(())
}

fn backward_can_run_a_nested_backward() -> Outcome {
    // Activation checkpointing: only the input is saved, and the body is recomputed.
    let body = |x: &Tensor| scale_node(&x.sin().square(), 3.0).expect("a node");
    let x = leaf(1, &[4]);
    let forward = |x: &[Tensor]| Ok(ForwardOutput { outputs: vec![body(&x[0])], saved: vec![x[0].shallow_clone()] });
    let out = apply_function(&[&x], forward, move |saved, g, _| {
        let x = saved[0].detach().set_requires_grad(true);
        let loss = tch::with_grad(|| (body(&x) * &g[0]).sum(Kind::Double));
        Ok(vec![Some(Tensor::f_run_backward(&[loss], &[&x], false, false)?.remove(0))])
    })?;
    (&out[0] * &x).sum(Kind::Double).backward();
    let expected = Tensor::run_backward(&[(body(&x) * &x).sum(Kind::Double)], &[&x], false, false);
    assert!((x.grad() - &expected[0]).abs().max().double_value(&[]) < 1e-14);
    Ok(())
}

/// Counts how often it was dropped.
#[derive(Clone, Default)]
struct Dropped(Arc<AtomicUsize>);

impl Dropped {
    fn so_far(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }
}

struct Token(Dropped);

impl Drop for Token {
    fn drop(&mut self) {
        self.0.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// Returns x², saving input and output; the closure owns a drop counter.
fn square(x: &Tensor, dropped: &Dropped) -> Result<Tensor> {
    let token = Token(dropped.clone());
    let forward = |x: &[Tensor]| {
        let y = x[0].square();
        Ok(ForwardOutput { saved: vec![x[0].shallow_clone(), y.shallow_clone()], outputs: vec![y] })
    };
    let out = apply_function(&[x], forward, move |saved, g, _| {
        let _held = &token;
        Ok(vec![Some(&saved[0] * 2.0 * &g[0])])
    })?;
    Ok(out[0].shallow_clone())
}

fn no_node_is_recorded_without_grad() -> Outcome {
    let dropped = Dropped::default();
    let x = leaf(1, &[3]);
    let plain = square(&x.detach(), &dropped)?;
    assert!(!plain.requires_grad() && dropped.so_far() == 1, "no input requires a gradient");
    let difference = tch::no_grad(|| square(&x, &dropped))?;
    assert!(!difference.requires_grad() && dropped.so_far() == 2, "gradients are disabled");
    let on = square(&x, &dropped)?;
    assert!(on.requires_grad() && dropped.so_far() == 2);
    assert_eq!(on.detach(), plain);
    Ok(())
}

fn saved_tensors_live_until_the_backward_pass() -> Outcome {
    let dropped = Dropped::default();
    let x = leaf(1, &[3]);
    let y = square(&x, &dropped)?;
    let loss = y.sum(Kind::Double);
    // A retained graph can be traversed again.
    for _ in 0..2 {
        let gradient = Tensor::f_run_backward(&[&loss], &[&x], true, false)?.remove(0);
        assert_eq!(gradient, x.detach() * 2.0);
        assert_eq!(dropped.so_far(), 0);
    }
    loss.f_backward()?;
    assert_eq!(dropped.so_far(), 1, "dropped after backward, although the output is alive");
    let error = loss.f_backward().expect_err("its tensors are freed").to_string();
    assert!(error.contains("backward has run through this node before"), "{error}");
    assert_eq!(x.grad(), x.detach() * 2.0);
    Ok(())
}

fn an_in_place_change_of_a_saved_tensor_is_detected() -> Outcome {
    for change_output in [false, true] {
        let x = leaf(1, &[3]);
        let between = &x * 1.0;
        let mut y = square(&between, &Dropped::default())?;
        let mut changed = if change_output { y.detach() } else { between.detach() };
        let _ = changed.g_add_scalar_(1.0);
        let error = y.sum(Kind::Double).f_backward().expect_err("a changed tensor").to_string();
        assert!(error.contains("modified by an inplace operation"), "{error}");
        let _ = y.detach_();
    }
    Ok(())
}

fn a_second_derivative_is_rejected() -> Outcome {
    let x = leaf(1, &[3]);
    let y = square(&x, &Dropped::default())?.sum(Kind::Double);
    let error = Tensor::f_run_backward(&[&y], &[&x], true, true).expect_err("a recorded backward").to_string();
    assert!(
        error.contains("no second derivative can be had through it: call backward without create_graph"),
        "{error}"
    );
    assert_eq!(Tensor::f_run_backward(&[&y], &[&x], false, false)?[0], x.detach() * 2.0);
    Ok(())
}

fn nodes_and_closures_are_freed_with_their_graph() -> Outcome {
    let dropped = Dropped::default();
    let x = leaf(1, &[3]);
    for pass in 0..2000 {
        let y = square(&square(&x, &dropped)?, &dropped)?;
        match pass % 3 {
            // Backward was run.
            0 => y.sum(Kind::Double).backward(),
            // Dropped without a backward pass.
            1 => drop(y),
            // Dropped while the graph is retained.
            _ => drop((Tensor::run_backward(&[y.sum(Kind::Double)], &[&x], true, false), y)),
        }
        assert_eq!(dropped.so_far(), 2 * (pass + 1), "pass {pass}");
    }
    // The backward pass fails.
    let y = failing_node(&square(&x, &dropped)?, || Err(Error::failed("no")))?;
    assert!(y.sum(Kind::Double).f_backward().is_err());
    drop(y);
    assert_eq!(dropped.so_far(), 4001);
    // A long chain is freed without deep recursion.
    let mut y = x.shallow_clone();
    for _ in 0..50_000 {
        y = square(&y, &dropped)?;
    }
    drop(y);
    assert_eq!(dropped.so_far(), 54_001);
    Ok(())
}

fn a_bf16_weight_accumulates_an_fp32_gradient() -> Outcome {
    let w = Tensor::ones([5], (Kind::BFloat16, Device::Cpu)).set_requires_grad(true);
    let sums = Tensor::zeros([5], (Kind::Float, Device::Cpu));
    set_grad(&w, &sums)?;
    // 1 + 2⁻¹² is 1 in bf16.
    let exact = 1.0 + 2f64.powi(-12);
    for _ in 0..2 {
        let forward = |x: &[Tensor]| Ok(ForwardOutput { outputs: vec![x[0].to_kind(Kind::Float)], saved: vec![] });
        let y = apply_function(&[&w], forward, move |_, g, _| Ok(vec![Some(&g[0] * exact)]))?;
        y[0].sum(Kind::Float).backward();
    }
    assert_eq!(Vec::<f32>::try_from(&sums)?, [2.0 * exact as f32; 5]);
    Ok(())
}

fn hooks_fire_in_backward_order_after_nodes() -> Outcome {
    let leaves: Vec<Tensor> = (0..3).map(|i| leaf(i, &[2, 2])).collect();
    let fired = Arc::new(Mutex::new(Vec::new()));
    let output = fired.clone();
    let _hooks = GradHooks::register(&leaves, move |leaf| output.lock().expect("a list").push(leaf))?;
    for _ in 0..2 {
        let mut x = Tensor::ones([2, 2], F64);
        for w in &leaves {
            x = product(&x, w)?.remove(0);
        }
        x.sum(Kind::Double).backward();
        assert_eq!(std::mem::take(&mut *fired.lock().unwrap()), [2, 1, 0]);
    }
    Ok(())
}
