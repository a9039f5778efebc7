//! Named tensors. Parts declare what they need in a [`Table`] and receive values as [`Weights`] with every call, so that
//! one model runs with the trained weights, their moving average, a teacher's or freshly drawn ones.

use crate::fault::Result;
use crate::op::bias_gelu::{Form, bias_gelu};
use crate::op::layer_norm::{add_layer_norm, layer_norm};
use crate::rng::{self, Draw, Purpose};
use std::ops::Index;
use tch::{Device, Kind, Tensor};

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
    /// Normal with this deviation, drawn again wherever it lies beyond one deviation.
    Truncated(f64),
    Zero,
    One,
    Constant(f64),
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
            Init::Constant(value) => vec![value as f32; n],
            Init::Uniform(bound) => uniform(bound),
            Init::Xavier => {
                let fan = self.shape[0] as f64 + (n as f64 / self.shape[0] as f64);
                uniform((6.0 / fan).sqrt())
            }
            Init::Normal(deviation) => (0..n).map(|_| (deviation * draw.normal()) as f32).collect(),
            Init::Truncated(deviation) => {
                let mut within = || std::iter::repeat_with(|| draw.normal()).find(|z| z.abs() <= 1.0).expect("endless");
                (0..n).map(|_| (deviation * within()) as f32).collect()
            }
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

    /// Weight decay spares this tensor too.
    pub fn spare(&mut self, slot: Slot) {
        self.specs[slot.0].decays = false;
    }

    pub fn specs(&self) -> &[Spec] {
        &self.specs
    }

    pub fn parameters(&self) -> usize {
        self.specs.iter().map(Spec::numel).sum()
    }
}

/// What is called with a tensor's number before it is computed with.
type Arrival = Box<dyn Fn(usize) + Send + Sync>;

/// The values of a table's tensors, in its order.
pub struct Weights(pub Vec<Tensor>, Option<Arrival>);

impl Weights {
    pub fn new(tensors: Vec<Tensor>) -> Weights {
        Weights(tensors, None)
    }

    /// From now on `arrive` is called with a tensor's number before it is used: values may still be on their way.
    pub fn arrive_by(&mut self, arrive: impl Fn(usize) + Send + Sync + 'static) {
        self.1 = Some(Box::new(arrive));
    }

    /// The dtype that the model computes in.
    pub fn kind(&self) -> Kind {
        self.0[0].kind()
    }
}

impl Index<Slot> for Weights {
    type Output = Tensor;
    fn index(&self, slot: Slot) -> &Tensor {
        if let Some(arrive) = &self.1 {
            arrive(slot.0);
        }
        &self.0[slot.0]
    }
}

/// A linear layer: `<name>.weight` [out, in] and what it adds, [out].
#[derive(Clone, Copy, Debug)]
pub struct Linear {
    weight: Slot,
    bias: Bias,
}

#[derive(Clone, Copy, Debug)]
enum Bias {
    All(Slot),
    /// One for the first third of the outputs, one for the last.
    QueryValue(Slot, Slot),
    None,
}

impl Linear {
    /// Xavier-uniform weight and zero bias `<name>.bias`, as every linear layer of the official code.
    pub fn new(table: &mut Table, name: &str, inputs: i64, outputs: i64) -> Self {
        Self::begun(table, name, inputs, outputs, [Init::Xavier, Init::Zero])
    }

    /// As `new`, with the first values of weight and bias.
    pub fn begun(table: &mut Table, name: &str, inputs: i64, outputs: i64, [weight, bias]: [Init; 2]) -> Self {
        Linear {
            weight: table.add(format!("{name}.weight"), &[outputs, inputs], weight),
            bias: Bias::All(table.add(format!("{name}.bias"), &[outputs], bias)),
        }
    }

    /// As `new`, adding nothing.
    pub fn bare(table: &mut Table, name: &str, inputs: i64, outputs: i64) -> Self {
        Linear { weight: table.add(format!("{name}.weight"), &[outputs, inputs], Init::Xavier), bias: Bias::None }
    }

    /// The packed projection `<name>.qkv.weight` [3D, D] with biases for queries, `<name>.q_bias`, and values,
    /// `<name>.v_bias` [D], and none for keys: softmax does not see theirs (official BEiT and VideoMAE code).
    pub fn query_value(table: &mut Table, name: &str, width: i64) -> Self {
        let weight = table.add(format!("{name}.qkv.weight"), &[3 * width, width], Init::Xavier);
        let mut bias = |which| table.add(format!("{name}.{which}_bias"), &[width], Init::Zero);
        Linear { weight, bias: Bias::QueryValue(bias("q"), bias("v")) }
    }

    /// x [.., in] → [.., out].
    pub fn forward(&self, w: &Weights, x: &Tensor) -> Result<Tensor> {
        let weight = &w[self.weight];
        let bias = match self.bias {
            Bias::All(bias) => w[bias].shallow_clone(),
            Bias::QueryValue(q, v) => Tensor::cat(&[&w[q], &w[v].zeros_like(), &w[v]], 0),
            // The products add a bias in passing; zeros cost less than another form of them.
            Bias::None => weight.new_zeros([weight.size()[0]], (weight.kind(), weight.device())),
        };
        crate::op::linear::linear(x, weight, &bias)
    }

    /// x [.., in] → the unit of `form` over [.., out]. On a GPU it adds the bias in its own pass.
    pub fn through_gelu(&self, w: &Weights, x: &Tensor, form: Form) -> Result<Tensor> {
        match (x.device(), self.bias) {
            (Device::Cuda(_), Bias::All(bias)) => {
                bias_gelu(&x.linear(&w[self.weight], None::<Tensor>), Some(&w[bias]), form)
            }
            _ => bias_gelu(&self.forward(w, x)?, None, form),
        }
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
