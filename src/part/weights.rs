//! Named tensors. Parts declare what they need in a [`Table`] and receive values as [`Weights`] with every call, so that
//! one model runs with the trained weights, their moving average, a teacher's or freshly drawn ones.

use crate::fault::Result;
use crate::op::layer_norm::{add_layer_norm, layer_norm};
use crate::rng::{self, Draw, Purpose};
use std::ops::Index;
use tch::{Kind, Tensor};

/// A tensor's place in its table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot(usize);

/// How a tensor begins.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// Uniform within ±√(6 / (fan in + fan out)) (Glorot and Bengio, 2010), the tensor seen as a matrix
    /// [first dimension, the rest].
    Xavier,
    /// Uniform within ±bound.
    Uniform(f64),
    /// Normal with this deviation.
    Normal(f64),
    Zero,
    One,
}

#[derive(Clone, Debug)]
pub struct Spec {
    pub name: String,
    pub shape: Vec<i64>,
    pub init: Init,
    /// Weight decay applies to it.
    pub decays: bool,
}

impl Spec {
    pub fn numel(&self) -> usize {
        self.shape.iter().product::<i64>() as usize
    }

    /// The first values, fp32. They depend on the seed and the name alone, never on what else the model holds.
    pub fn draw(&self, seed: u64) -> Vec<f32> {
        let n = self.numel();
        let mut draw = Draw::new(seed, rng::id(&[&self.name]), 0, Purpose::Init, 0);
        let mut uniform = |bound: f64| (0..n).map(|_| draw.between(-bound, bound) as f32).collect();
        match self.init {
            Init::Zero => vec![0.0; n],
            Init::One => vec![1.0; n],
            Init::Uniform(bound) => uniform(bound),
            Init::Xavier => {
                let fan = self.shape[0] as f64 + (n as f64 / self.shape[0] as f64);
                uniform((6.0 / fan).sqrt())
            }
            Init::Normal(deviation) => (0..n).map(|_| (deviation * draw.normal()) as f32).collect(),
        }
    }
}

/// What a model is made of, in the order of use.
#[derive(Clone, Debug, Default)]
pub struct Table {
    specs: Vec<Spec>,
}

impl Table {
    /// One tensor. As in the official code, weight decay spares vectors (all biases, scales and shifts).
    pub fn add(&mut self, name: impl Into<String>, shape: &[i64], init: Init) -> Slot {
        let name = name.into();
        assert!(self.specs.iter().all(|spec| spec.name != name), "two tensors are called {name}");
        self.specs.push(Spec { name, shape: shape.to_vec(), init, decays: shape.len() > 1 });
        Slot(self.specs.len() - 1)
    }

    pub fn specs(&self) -> &[Spec] {
        &self.specs
    }

    pub fn parameters(&self) -> usize {
        self.specs.iter().map(Spec::numel).sum()
    }
}

/// The values of a table's tensors, in its order.
#[derive(Debug)]
pub struct Weights(pub Vec<Tensor>);

impl Weights {
    /// The dtype that the model computes in.
    pub fn kind(&self) -> Kind {
        self.0[0].kind()
    }
}

impl Index<Slot> for Weights {
    type Output = Tensor;
    fn index(&self, slot: Slot) -> &Tensor {
        &self.0[slot.0]
    }
}

/// A linear layer's two tensors: `<name>.weight` [out, in] and `<name>.bias` [out].
#[derive(Clone, Copy, Debug)]
pub struct Linear {
    weight: Slot,
    bias: Slot,
}

impl Linear {
    /// Xavier-uniform weight and zero bias, as every linear layer of the official code.
    pub fn new(table: &mut Table, name: &str, inputs: i64, outputs: i64) -> Self {
        Self::with_bias(table, name, inputs, outputs, Init::Zero)
    }
    pub fn with_bias(table: &mut Table, name: &str, inputs: i64, outputs: i64, bias: Init) -> Self {
        Linear {
            weight: table.add(format!("{name}.weight"), &[outputs, inputs], Init::Xavier),
            bias: table.add(format!("{name}.bias"), &[outputs], bias),
        }
    }
    /// x [.., in] → [.., out].
    pub fn forward(&self, w: &Weights, x: &Tensor) -> Result<Tensor> {
        crate::op::linear::linear(x, &w[self.weight], &w[self.bias])
    }
}

/// A layer normalisation's two tensors, `<name>.weight` and `<name>.bias` [D].
#[derive(Clone, Copy, Debug)]
pub struct Norm {
    scale: Slot,
    shift: Slot,
}

impl Norm {
    pub fn new(table: &mut Table, name: &str, width: i64) -> Self {
        Norm {
            scale: table.add(format!("{name}.weight"), &[width], Init::One),
            shift: table.add(format!("{name}.bias"), &[width], Init::Zero),
        }
    }
    /// x [.., D] → [.., D].
    pub fn forward(&self, w: &Weights, x: &Tensor) -> Result<Tensor> {
        layer_norm(x, &w[self.scale], &w[self.shift])
    }
    /// x and r [.., D] → x + r, and that normalised.
    pub fn after(&self, w: &Weights, x: &Tensor, r: &Tensor) -> Result<(Tensor, Tensor)> {
        add_layer_norm(x, r, &w[self.scale], &w[self.shift])
    }
}
