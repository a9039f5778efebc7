//! Autograd nodes of closures: gradients, what they are given, how they fail, what they hold.

use crate::support::Outcome;
use occlude::bridge::{Forward, Hooks, node, set_gradient};
use occlude::fault::{Fault, Result};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use tch::{Device, Kind, Tensor};

crate::trials![
    gradients_agree_with_finite_differences,
    an_output_that_nobody_differentiates_has_a_gradient_of_zeros,
    only_inputs_that_want_a_gradient_get_one,
    a_whole_number_output_takes_its_place_among_the_gradients,
    an_output_may_be_an_input_or_a_view_of_one,
    a_fault_in_backward_reaches_its_caller_with_its_text,
    a_panic_in_backward_reaches_its_caller_with_its_text,
    a_gradient_too_few_or_of_another_shape_is_refused,
    a_fault_in_forward_is_the_caller_s,
    a_backward_may_start_on_another_thread,
    a_backward_may_run_a_backward_of_its_own,
    nothing_is_recorded_where_no_gradient_is_wanted,
    saved_tensors_live_until_the_backward_pass,
    a_change_in_place_of_a_saved_tensor_is_found_out,
    a_second_derivative_is_refused,
    nodes_and_their_closures_do_not_outlive_their_graph,
    a_bf16_weight_takes_an_fp32_gradient_unrounded,
    hooks_fire_in_backward_order_behind_nodes,
];

const F64: (Kind, Device) = (Kind::Double, Device::Cpu);

/// A leaf of values between -1 and 1 that follow no simple rule.
fn leaf(seed: i64, shape: &[i64]) -> Tensor {
    let n = shape.iter().product::<i64>();
    let values = (Tensor::arange(n, F64) * 1.7 + seed as f64).sin();
    values.view(shape).set_requires_grad(true)
}

/// tanh(a · b) [R, N] and Σ a² [], of a [R, K] and b [K, N].
fn product(a: &Tensor, b: &Tensor) -> Result<Vec<Tensor>> {
    node(
        &[a, b],
        |x| {
            let y = x[0].f_matmul(&x[1])?.tanh();
            let squares = x[0].square().sum(Kind::Double);
            let saved = vec![x[0].shallow_clone(), x[1].shallow_clone(), y.shallow_clone()];
            Ok(Forward { outputs: vec![y, squares], saved })
        },
        |saved, gradients, wanted| {
            let [a, b, y] = saved else { unreachable!("three were saved") };
            let inner: Tensor = &gradients[0] * (1.0 - y.square());
            let ga = wanted[0].then(|| inner.matmul(&b.tr()) + a * 2.0 * &gradients[1]);
            let gb = wanted[1].then(|| a.tr().matmul(&inner));
            Ok(vec![ga, gb])
        },
    )
}

/// A node of one input and one output, y = x · by.
fn scaled(x: &Tensor, by: f64) -> Result<Tensor> {
    let forward = move |x: &[Tensor]| Ok(Forward { outputs: vec![&x[0] * by], saved: vec![] });
    Ok(node(&[x], forward, move |_, g, _| Ok(vec![Some(&g[0] * by)]))?.remove(0))
}

/// A node whose backward is the closure.
fn failing(x: &Tensor, backward: impl Fn() -> Result<Vec<Option<Tensor>>> + Send + Sync + 'static) -> Result<Tensor> {
    let forward = |x: &[Tensor]| Ok(Forward { outputs: vec![&x[0] * 2.0], saved: vec![] });
    Ok(node(&[x], forward, move |_, _, _| backward())?.remove(0))
}

/// The gradients of f(leaves) (one number, fp64) are its central differences.
fn gradcheck(leaves: &[Tensor], f: impl Fn(&[Tensor]) -> Tensor) {
    let gradients = Tensor::run_backward(&[f(leaves)], leaves, false, false);
    let step = 1e-5;
    for (which, leaf) in leaves.iter().enumerate() {
        let found: Vec<f64> = Vec::try_from(gradients[which].contiguous().view([-1])).expect("numbers");
        for (at, found) in found.iter().enumerate() {
            let moved = |by: f64| {
                let _off = tch::no_grad_guard();
                let leaves: Vec<Tensor> = leaves.iter().map(Tensor::shallow_clone).collect();
                let mut place = leaf.view([-1]).get(at as i64);
                let _ = place.g_add_scalar_(by);
                let value = f(&leaves).double_value(&[]);
                let _ = place.g_sub_scalar_(by);
                value
            };
            let wanted = (moved(step) - moved(-step)) / (2.0 * step);
            assert!((found - wanted).abs() <= 1e-8 * (1.0 + wanted.abs()), "leaf {which} [{at}]: {found} for {wanted}");
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
    // Behind and in front of other operations, and used twice.
    gradcheck(&leaves, |x| {
        let out = product(&x[0].sin(), &x[1]).expect("a node");
        let again = product(&out[0].tr(), &x[0]).expect("a node");
        out[0].square().sum(Kind::Double) + &again[0].sum(Kind::Double) * &out[1] + &again[1]
    });
    Ok(())
}

fn an_output_that_nobody_differentiates_has_a_gradient_of_zeros() -> Outcome {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let told = seen.clone();
    let x = leaf(1, &[2, 3]);
    let out = node(
        &[&x],
        |x| Ok(Forward { outputs: vec![&x[0] * 2.0, x[0].sum_dim_intlist(1, false, Kind::Float)], saved: vec![] }),
        move |_, g, _| {
            told.lock().expect("a list").push((g[1].size(), g[1].kind(), g[1].abs().max().double_value(&[])));
            Ok(vec![Some(&g[0] * 2.0)])
        },
    )?;
    out[0].sum(Kind::Double).backward();
    assert_eq!(*seen.lock().unwrap(), [(vec![2], Kind::Float, 0.0)]);
    assert_eq!(x.grad(), Tensor::full([2, 3], 2.0, F64));
    Ok(())
}

fn only_inputs_that_want_a_gradient_get_one() -> Outcome {
    let (a, b) = (leaf(1, &[2, 2]), leaf(2, &[2, 2]));
    let wishes = Arc::new(Mutex::new(Vec::new()));
    let sum = |a: &Tensor, b: &Tensor| -> Result<Tensor> {
        let told = wishes.clone();
        let forward = |x: &[Tensor]| Ok(Forward { outputs: vec![&x[0] + &x[1]], saved: vec![] });
        let out = node(&[a, b], forward, move |_, g, wanted| {
            told.lock().expect("a list").push(wanted.to_vec());
            // More than was asked for is no mistake.
            Ok(vec![Some(g[0].shallow_clone()), Some(&g[0] * 3.0)])
        })?;
        Ok(out[0].sum(Kind::Double))
    };
    sum(&a, &b.detach())?.backward();
    assert_eq!(a.grad(), Tensor::ones([2, 2], F64));
    // Both could have one, and the pass asks for the second alone.
    let gradients = Tensor::run_backward(&[sum(&a, &b)?], &[&b], false, false);
    assert_eq!(gradients[0], Tensor::full([2, 2], 3.0, F64));
    assert_eq!(*wishes.lock().unwrap(), [[true, false], [false, true]]);
    Ok(())
}

fn a_whole_number_output_takes_its_place_among_the_gradients() -> Outcome {
    let x = leaf(1, &[5]);
    let out = node(
        &[&x],
        |x| {
            let (values, order) = x[0].sort(0, false);
            Ok(Forward { outputs: vec![order.shallow_clone(), values], saved: vec![order] })
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
    let forward = |x: &[Tensor]| Ok(Forward { outputs: vec![x[0].shallow_clone(), x[0].tr()], saved: vec![] });
    let out = node(&[&x], forward, |_, g, _| Ok(vec![Some(&g[0] * 10.0 + g[1].tr() * 100.0)]))?;
    assert_eq!(out[0].data_ptr(), x.data_ptr());
    (out[0].sum(Kind::Double) + out[1].sum(Kind::Double)).backward();
    assert_eq!(x.grad(), Tensor::full([2, 3], 110.0, F64));
    Ok(())
}

fn a_fault_in_backward_reaches_its_caller_with_its_text() -> Outcome {
    let x = leaf(1, &[2]);
    let y = failing(&x, || Err(Fault::usage("the kernel wants a head of 64, got 63")))?;
    let error = y.sum(Kind::Double).f_backward().expect_err("a fault");
    let fault = Fault::from(error);
    assert!(fault.message.ends_with("the kernel wants a head of 64, got 63"), "{fault}");
    // A tensor's own failure inside the closure, too.
    let y = failing(&x, || Ok(vec![Some(Tensor::zeros([2], F64).f_matmul(&Tensor::zeros([3, 3], F64))?)]))?;
    let error = y.sum(Kind::Double).f_backward().expect_err("shapes that do not fit").to_string();
    assert!(error.contains("libtorch: ") && error.contains("cannot be multiplied (1x2 and 3x3)"), "{error}");
    // The engine goes on.
    scaled(&x, 3.0)?.sum(Kind::Double).f_backward()?;
    assert_eq!(x.grad(), Tensor::full([2], 3.0, F64));
    Ok(())
}

fn a_panic_in_backward_reaches_its_caller_with_its_text() -> Outcome {
    let x = leaf(1, &[2]);
    let y = failing(&x, || panic!("row {} has no place", 7))?;
    let error = y.sum(Kind::Double).f_backward().expect_err("a panic").to_string();
    assert!(error.contains("a panic in a node's backward: row 7 has no place"), "{error}");
    let y = failing(&x, || panic!("a plain text"))?;
    let error = std::thread::spawn(move || y.sum(Kind::Double).f_backward().expect_err("a panic").to_string()).join();
    assert!(error.expect("no panic here").contains("backward: a plain text"));
    Ok(scaled(&x, 3.0)?.sum(Kind::Double).f_backward()?)
}

fn a_gradient_too_few_or_of_another_shape_is_refused() -> Outcome {
    let x = leaf(1, &[2]);
    let error = failing(&x, || Ok(vec![]))?.sum(Kind::Double).f_backward().expect_err("none for one").to_string();
    assert!(error.contains("gave 0 gradients; one for each of its 1 inputs is wanted"), "{error}");
    let y = failing(&x, || Ok(vec![Some(Tensor::zeros([3], F64))]))?;
    let error = y.sum(Kind::Double).f_backward().expect_err("three for two").to_string();
    assert!(error.contains("invalid gradient at index 0 - got [3] but expected shape compatible with [2]"), "{error}");
    failing(&x, || Ok(vec![None]))?.sum(Kind::Double).f_backward()?;
    assert!(!x.grad().defined(), "None is no gradient, and no mistake");
    Ok(())
}

fn a_fault_in_forward_is_the_caller_s() -> Outcome {
    let (a, b) = (leaf(1, &[2, 3]), leaf(2, &[2, 3]));
    let fault = product(&a, &b).expect_err("3 columns by 2 rows");
    assert!(fault.message.contains("mat1 and mat2 shapes cannot be multiplied"), "{fault}");
    assert!((&a * 2.0).requires_grad(), "gradients are on again");
    Ok(())
}

fn a_backward_may_start_on_another_thread() -> Outcome {
    let (a, b) = (leaf(1, &[3, 4]), leaf(2, &[4, 2]));
    let loss = product(&a, &b)?[0].sum(Kind::Double);
    std::thread::spawn(move || loss.backward()).join().expect("a backward pass");
    let wanted = Tensor::run_backward(&[a.matmul(&b).tanh().sum(Kind::Double)], &[&a, &b], false, false);
    assert!((a.grad() - &wanted[0]).abs().max().double_value(&[]) < 1e-14);
    assert!((b.grad() - &wanted[1]).abs().max().double_value(&[]) < 1e-14);
    Ok(())
}

fn a_backward_may_run_a_backward_of_its_own() -> Outcome {
    // Activation checkpointing: only the input is saved, and the body runs again.
    let body = |x: &Tensor| scaled(&x.sin().square(), 3.0).expect("a node");
    let x = leaf(1, &[4]);
    let forward = |x: &[Tensor]| Ok(Forward { outputs: vec![body(&x[0])], saved: vec![x[0].shallow_clone()] });
    let out = node(&[&x], forward, move |saved, g, _| {
        let x = saved[0].detach().set_requires_grad(true);
        let loss = tch::with_grad(|| (body(&x) * &g[0]).sum(Kind::Double));
        Ok(vec![Some(Tensor::f_run_backward(&[loss], &[&x], false, false)?.remove(0))])
    })?;
    (&out[0] * &x).sum(Kind::Double).backward();
    let wanted = Tensor::run_backward(&[(body(&x) * &x).sum(Kind::Double)], &[&x], false, false);
    assert!((x.grad() - &wanted[0]).abs().max().double_value(&[]) < 1e-14);
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

/// x², which saves its input and its output, and carries a token.
fn square(x: &Tensor, dropped: &Dropped) -> Result<Tensor> {
    let token = Token(dropped.clone());
    let forward = |x: &[Tensor]| {
        let y = x[0].square();
        Ok(Forward { saved: vec![x[0].shallow_clone(), y.shallow_clone()], outputs: vec![y] })
    };
    let out = node(&[x], forward, move |saved, g, _| {
        let _held = &token;
        Ok(vec![Some(&saved[0] * 2.0 * &g[0])])
    })?;
    Ok(out[0].shallow_clone())
}

fn nothing_is_recorded_where_no_gradient_is_wanted() -> Outcome {
    let dropped = Dropped::default();
    let x = leaf(1, &[3]);
    let plain = square(&x.detach(), &dropped)?;
    assert!(!plain.requires_grad() && dropped.so_far() == 1, "no input wants one");
    let off = tch::no_grad(|| square(&x, &dropped))?;
    assert!(!off.requires_grad() && dropped.so_far() == 2, "gradients are off");
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
    // A graph that is kept can be gone through again.
    for _ in 0..2 {
        let gradient = Tensor::f_run_backward(&[&loss], &[&x], true, false)?.remove(0);
        assert_eq!(gradient, x.detach() * 2.0);
        assert_eq!(dropped.so_far(), 0);
    }
    loss.f_backward()?;
    assert_eq!(dropped.so_far(), 1, "dropped after the pass, though the output lives");
    let error = loss.f_backward().expect_err("its tensors are freed").to_string();
    assert!(error.contains("backward has run through this node before"), "{error}");
    assert_eq!(x.grad(), x.detach() * 2.0);
    Ok(())
}

fn a_change_in_place_of_a_saved_tensor_is_found_out() -> Outcome {
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

fn a_second_derivative_is_refused() -> Outcome {
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

fn nodes_and_their_closures_do_not_outlive_their_graph() -> Outcome {
    let dropped = Dropped::default();
    let x = leaf(1, &[3]);
    for pass in 0..2000 {
        let y = square(&square(&x, &dropped)?, &dropped)?;
        match pass % 3 {
            // Gone through.
            0 => y.sum(Kind::Double).backward(),
            // Let go of without a backward pass.
            1 => drop(y),
            // Let go of while the graph is kept.
            _ => drop((Tensor::run_backward(&[y.sum(Kind::Double)], &[&x], true, false), y)),
        }
        assert_eq!(dropped.so_far(), 2 * (pass + 1), "pass {pass}");
    }
    // A pass that fails.
    let y = failing(&square(&x, &dropped)?, || Err(Fault::failed("no")))?;
    assert!(y.sum(Kind::Double).f_backward().is_err());
    drop(y);
    assert_eq!(dropped.so_far(), 4001);
    // A long chain ends without a deep recursion.
    let mut y = x.shallow_clone();
    for _ in 0..50_000 {
        y = square(&y, &dropped)?;
    }
    drop(y);
    assert_eq!(dropped.so_far(), 54_001);
    Ok(())
}

fn a_bf16_weight_takes_an_fp32_gradient_unrounded() -> Outcome {
    let w = Tensor::ones([5], (Kind::BFloat16, Device::Cpu)).set_requires_grad(true);
    let sums = Tensor::zeros([5], (Kind::Float, Device::Cpu));
    set_gradient(&w, &sums)?;
    // 1 + 2⁻¹² is 1 in bf16.
    let exact = 1.0 + 2f64.powi(-12);
    for _ in 0..2 {
        let forward = |x: &[Tensor]| Ok(Forward { outputs: vec![x[0].to_kind(Kind::Float)], saved: vec![] });
        let y = node(&[&w], forward, move |_, g, _| Ok(vec![Some(&g[0] * exact)]))?;
        y[0].sum(Kind::Float).backward();
    }
    assert_eq!(Vec::<f32>::try_from(&sums)?, [2.0 * exact as f32; 5]);
    Ok(())
}

fn hooks_fire_in_backward_order_behind_nodes() -> Outcome {
    let leaves: Vec<Tensor> = (0..3).map(|i| leaf(i, &[2, 2])).collect();
    let fired = Arc::new(Mutex::new(Vec::new()));
    let told = fired.clone();
    let _hooks = Hooks::set(&leaves, move |leaf| told.lock().expect("a list").push(leaf))?;
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
