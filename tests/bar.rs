//! The bar that every faster form of an operation is held to: its RMS error against the formula in fp64 is at most twice
//! that of the formula in the same precision, plus one unit in the last place of the output's RMS.

use crate::support::normal;
use tch::{Cuda, Device, Kind, Tensor};

pub fn rms(x: &Tensor) -> f64 {
    x.to_kind(Kind::Double).square().mean(Kind::Double).sqrt().double_value(&[])
}

/// The distance between neighbouring numbers of this kind around `at`.
pub fn ulp(kind: Kind, at: f64) -> f64 {
    let digits = match kind {
        Kind::BFloat16 => 7,
        Kind::Half => 10,
        _ => 23,
    };
    if at == 0.0 { 0.0 } else { 2f64.powi(at.log2().floor() as i32 - digits) }
}

/// The bar.
pub fn judge(what: &str, ours: &Tensor, plain: &Tensor, exact: &Tensor) {
    assert_eq!((ours.size(), ours.kind()), (plain.size(), plain.kind()), "{what}: shape and kind");
    let error = |of: &Tensor| rms(&(of.to_kind(Kind::Double) - exact));
    let (off, bar) = (error(ours), 2.0 * error(plain) + ulp(ours.kind(), rms(exact)));
    assert!(off <= bar, "{what}: RMS error {off:e}, allowed {bar:e} (the formula's own is {:e})", error(plain));
}

pub type Op = dyn Fn(&[Tensor]) -> Tensor;
pub type View = fn(&Tensor) -> Tensor;

/// The output, and the gradients of the inputs under a random gradient of the output.
pub fn pass(inputs: &[Tensor], op: &Op) -> Vec<Tensor> {
    let leaves: Vec<Tensor> = inputs.iter().map(|input| input.detach().set_requires_grad(true)).collect();
    let y = op(&leaves);
    let upstream = normal(99, &y.size()).to_kind(inputs[0].kind()).to_kind(y.kind()).to_device(y.device());
    (&y * upstream).sum(y.kind()).backward();
    std::iter::once(y.detach()).chain(leaves.iter().map(Tensor::grad)).collect()
}

/// `op` on inputs of their own kind against `formula` in the same kind and in fp64.
pub fn compare(what: &str, inputs: &[Tensor], op: &Op, formula: &Op) {
    let wide: Vec<Tensor> = inputs.iter().map(|input| input.to_kind(Kind::Double)).collect();
    let all = pass(inputs, op).into_iter().zip(pass(inputs, formula)).zip(pass(&wide, formula));
    for (index, ((ours, plain), exact)) in all.enumerate() {
        let part = if index == 0 { "output".to_string() } else { format!("gradient of input {}", index - 1) };
        judge(&format!("{what}, {part}"), &ours, &plain, &exact);
    }
}

pub fn inputs(seed: u64, shapes: &[&[i64]], kind: Kind) -> Vec<Tensor> {
    shapes.iter().zip(seed..).map(|(shape, seed)| normal(seed, shape).to_kind(kind)).collect()
}

/// Where kernels are run: in the emulator, and on a GPU where there is one; OCCLUDE_GROUND=gpu leaves the emulator out.
pub fn grounds() -> Vec<Device> {
    let gpu = Cuda::is_available().then_some(Device::Cuda(0));
    let emulated = std::env::var("OCCLUDE_GROUND").map_or(true, |ground| ground != "gpu").then_some(Device::Cpu);
    emulated.into_iter().chain(gpu).collect()
}

/// A kernel's outputs and gradients against the formula's, on every ground.
pub fn compare_kernel(what: &str, given: &[Tensor], kernel: &Op, formula: &Op) {
    for ground in grounds() {
        let given: Vec<Tensor> = given.iter().map(|tensor| tensor.to_device(ground)).collect();
        compare(&format!("{what} on {ground:?}"), &given, kernel, formula);
    }
}
