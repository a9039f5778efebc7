//! The tolerance for every faster form of an operation: its RMS error against the formula in fp64 is at most twice that
//! of the formula in the same precision, plus one unit in the last place of the output's RMS.

use crate::support::{Tensors, distance, normal};
use tch::{Cuda, Device, Kind, Tensor};

pub fn rms(x: &Tensor) -> f64 {
    x.to_kind(Kind::Double).square().mean(Kind::Double).sqrt().double_value(&[])
}

/// Returns the distance between neighboring numbers of this dtype around `at`.
pub fn ulp(kind: Kind, at: f64) -> f64 {
    let digits = match kind {
        Kind::BFloat16 => 7,
        Kind::Half => 10,
        _ => 23,
    };
    if at == 0.0 { 0.0 } else { 2f64.powi(at.log2().floor() as i32 - digits) }
}

/// Asserts the tolerance.
pub fn assert_within_tolerance(label: &str, ours: &Tensor, plain: &Tensor, exact: &Tensor) {
    assert_eq!((ours.size(), ours.kind()), (plain.size(), plain.kind()), "{label}: shape and kind");
    let error = |of: &Tensor| rms(&(of.to_kind(Kind::Double) - exact));
    let difference = error(ours);
    let limit = 2.0 * error(plain) + ulp(ours.kind(), rms(exact));
    assert!(
        difference <= limit,
        "{label}: RMS error {difference:e}, allowed {limit:e} (that of the formula is {:e})",
        error(plain)
    );
}

/// Asserts that ours is near the output `name` of another implementation, which `reference` has in fp64, and as
/// `fp32.<name>` in fp32: the distance may be `usual` plus twice that of the fp32 output, because the rounding of an
/// ill-conditioned output differs from processor to processor.
pub fn assert_near_reference(reference: &Tensors, name: &str, ours: &Tensor, usual: f64) {
    let exact = reference[name].to_kind(Kind::Double);
    let error = |of: &Tensor| distance(&of.to_kind(Kind::Double).reshape(exact.size()), &exact);
    let difference = error(ours);
    let limit = usual + 2.0 * error(&reference[&format!("fp32.{name}")]);
    let norm = exact.norm().double_value(&[]);
    assert!(difference <= limit, "{name}: ‖Δ‖ = {difference:e} of {norm:e}, allowed {limit:e} (usually {usual:e})");
}

pub type Op = dyn Fn(&[Tensor]) -> Tensor;
pub type View = fn(&Tensor) -> Tensor;

/// Returns the output, and the gradients of the inputs under a random gradient of the output.
pub fn forward_backward(inputs: &[Tensor], op: &Op) -> Vec<Tensor> {
    let leaves: Vec<Tensor> = inputs.iter().map(|input| input.detach().set_requires_grad(true)).collect();
    let y = op(&leaves);
    let upstream = normal(99, &y.size()).to_kind(inputs[0].kind()).to_kind(y.kind()).to_device(y.device());
    (&y * upstream).sum(y.kind()).backward();
    std::iter::once(y.detach()).chain(leaves.iter().map(Tensor::grad)).collect()
}

/// Compares `op` on inputs of their own dtype with `formula` in the same dtype and in fp64.
pub fn compare(label: &str, inputs: &[Tensor], op: &Op, formula: &Op) {
    let wide: Vec<Tensor> = inputs.iter().map(|input| input.to_kind(Kind::Double)).collect();
    let all = forward_backward(inputs, op)
        .into_iter()
        .zip(forward_backward(inputs, formula))
        .zip(forward_backward(&wide, formula));
    for (index, ((ours, plain), exact)) in all.enumerate() {
        let part = if index == 0 { "output".to_string() } else { format!("gradient of input {}", index - 1) };
        assert_within_tolerance(&format!("{label}, {part}"), &ours, &plain, &exact);
    }
}

pub fn random_inputs(seed: u64, shapes: &[&[i64]], kind: Kind) -> Vec<Tensor> {
    shapes.iter().zip(seed..).map(|(shape, seed)| normal(seed, shape).to_kind(kind)).collect()
}

/// Returns the devices on which kernels are tested: the emulator, and a GPU where there is one; OCCLUDE_GROUND=gpu
/// leaves out the emulator.
pub fn kernel_devices() -> Vec<Device> {
    let gpu = Cuda::is_available().then_some(Device::Cuda(0));
    let emulated = std::env::var("OCCLUDE_GROUND").map_or(true, |device| device != "gpu").then_some(Device::Cpu);
    emulated.into_iter().chain(gpu).collect()
}

/// Compares outputs and gradients of a kernel with those of the formula, on every device.
pub fn compare_kernel(label: &str, inputs: &[Tensor], kernel: &Op, formula: &Op) {
    for device in kernel_devices() {
        let inputs: Vec<Tensor> = inputs.iter().map(|tensor| tensor.to_device(device)).collect();
        compare(&format!("{label} on {device:?}"), &inputs, kernel, formula);
    }
}
