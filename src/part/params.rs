//! Parameters: parts declare named tensors in [`ParamSpecs`] and receive their values as [`Weights`] with every call,
//! so that one model runs with the trained weights, their moving average, a teacher's weights or newly initialized
//! ones.

use crate::error::Result;
use crate::op::bias_gelu::{Gelu, bias_gelu};
use crate::op::layer_norm::{add_layer_norm, layer_norm};
use crate::op::rms_norm::rms_norm;
use crate::rng::{self, Philox, Purpose};
use std::ops::Index;
use tch::{Device, Kind, Tensor};

/// Index of a parameter in its [`ParamSpecs`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ParamId(usize);

/// Initializer of a parameter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// Uniform within ±√(6 / (fan in + fan out)) (Glorot and Bengio, 2010), for the tensor as a matrix
    /// [first dimension, the rest].
    Xavier,
    /// Uniform within ±bound.
    Uniform(f64),
    /// Normal with this standard deviation.
    Normal(f64),
    /// Normal with this standard deviation, truncated at one standard deviation.
    TruncatedNormal(f64),
    Zero,
    One,
    Constant(f64),
    /// Learned from the training set before the first step; until then uniform within ±1. Of buffers alone.
    FromData,
}

/// Declaration of a parameter.
#[derive(Clone, Debug)]
pub struct ParamSpec {
    pub name: String,
    pub shape: Vec<i64>,
    pub init: Init,
    /// Weight decay applies.
    pub weight_decay: bool,
}

impl ParamSpec {
    /// Number of elements.
    pub fn numel(&self) -> usize {
        self.shape.iter().product::<i64>() as usize
    }

    /// Returns the initial values, fp32. They depend only on the seed and the name, not on the rest of the model.
    pub fn initial_values(&self, seed: u64) -> Vec<f32> {
        let n = self.numel();
        let mut rng = Philox::new(seed, rng::hash_id(&[&self.name]), 0, Purpose::Init, 0);
        match self.init {
            Init::Zero => vec![0.0; n],
            Init::One => vec![1.0; n],
            Init::Constant(value) => vec![value as f32; n],
            Init::Uniform(bound) => uniform(&mut rng, n, bound),
            Init::FromData => uniform(&mut rng, n, 1.0),
            Init::Xavier => {
                let fan = self.shape[0] as f64 + (n as f64 / self.shape[0] as f64);
                uniform(&mut rng, n, (6.0 / fan).sqrt())
            }
            Init::Normal(std) => (0..n).map(|_| (std * rng.normal()) as f32).collect(),
            Init::TruncatedNormal(std) => (0..n).map(|_| (std * truncated_normal(&mut rng)) as f32).collect(),
        }
    }
}

fn uniform(rng: &mut Philox, n: usize, bound: f64) -> Vec<f32> {
    (0..n).map(|_| rng.uniform_range(-bound, bound) as f32).collect()
}

fn truncated_normal(rng: &mut Philox) -> f64 {
    loop {
        let z = rng.normal();
        if z.abs() <= 1.0 {
            return z;
        }
    }
}

/// The parameters of a model, in the order of use.
#[derive(Clone, Debug, Default)]
pub struct ParamSpecs {
    specs: Vec<ParamSpec>,
}

impl ParamSpecs {
    /// Declares a parameter. As in the official code, weight decay does not apply to vectors (all biases, scales and
    /// shifts).
    pub fn add(&mut self, name: impl Into<String>, shape: &[i64], init: Init) -> ParamId {
        let name = name.into();
        assert!(self.specs.iter().all(|spec| spec.name != name), "two parameters are called {name}");
        self.specs.push(ParamSpec { name, shape: shape.to_vec(), init, weight_decay: shape.len() > 1 });
        ParamId(self.specs.len() - 1)
    }

    /// Excludes a parameter from weight decay.
    pub fn no_weight_decay(&mut self, id: ParamId) {
        self.specs[id.0].weight_decay = false;
    }

    /// All declarations.
    pub fn specs(&self) -> &[ParamSpec] {
        &self.specs
    }

    /// Number of elements of all parameters.
    pub fn parameter_count(&self) -> usize {
        self.specs.iter().map(ParamSpec::numel).sum()
    }
}

/// A hook that is called with the index of a parameter before its use.
type UseHook = Box<dyn Fn(usize) + Send + Sync>;

/// The values of the parameters, in the order of their [`ParamSpecs`].
pub struct Weights(pub Vec<Tensor>, Option<UseHook>);

impl Weights {
    /// Without a hook.
    pub fn new(tensors: Vec<Tensor>) -> Weights {
        Weights(tensors, None)
    }

    /// Sets a hook that is called with the index of a parameter before its use, to wait for values in transfer.
    pub fn on_use(&mut self, hook: impl Fn(usize) + Send + Sync + 'static) {
        self.1 = Some(Box::new(hook));
    }

    /// The dtype that the model computes in.
    pub fn kind(&self) -> Kind {
        self.0[0].kind()
    }
}

impl Index<ParamId> for Weights {
    type Output = Tensor;
    fn index(&self, id: ParamId) -> &Tensor {
        if let Some(hook) = &self.1 {
            hook(id.0);
        }
        &self.0[id.0]
    }
}

/// A linear layer: `<name>.weight` [out, in] and a bias `[out]`.
#[derive(Clone, Copy, Debug)]
pub struct Linear {
    weight: ParamId,
    bias: LinearBias,
}

#[derive(Clone, Copy, Debug)]
enum LinearBias {
    All(ParamId),
    /// Biases of the first third of the outputs (queries) and of the last third (values).
    QueryValue(ParamId, ParamId),
    None,
}

impl Linear {
    /// Declares a Xavier-uniform weight and a zero bias `<name>.bias`, as in every linear layer of the official code.
    pub fn new(params: &mut ParamSpecs, name: &str, inputs: i64, outputs: i64) -> Self {
        Self::with_init(params, name, inputs, outputs, Init::Xavier, Init::Zero)
    }

    /// The same as [`Linear::new`], with other initializers of weight and bias; without bias where there is none.
    pub fn with_init(
        params: &mut ParamSpecs,
        name: &str,
        inputs: i64,
        outputs: i64,
        weight_init: Init,
        bias_init: impl Into<Option<Init>>,
    ) -> Self {
        let weight = params.add(format!("{name}.weight"), &[outputs, inputs], weight_init);
        let bias = bias_init.into().map(|init| params.add(format!("{name}.bias"), &[outputs], init));
        Linear { weight, bias: bias.map_or(LinearBias::None, LinearBias::All) }
    }

    /// The same as [`Linear::new`], without bias.
    pub fn without_bias(params: &mut ParamSpecs, name: &str, inputs: i64, outputs: i64) -> Self {
        Linear::with_init(params, name, inputs, outputs, Init::Xavier, None)
    }

    /// Declares the packed projection `<name>.qkv.weight` [3D, D] with biases of queries, `<name>.q_bias`, and values,
    /// `<name>.v_bias` `[D]`, but not of keys, to which softmax is invariant (official BEiT and VideoMAE code).
    pub fn with_query_value_bias(params: &mut ParamSpecs, name: &str, width: i64, init: Init) -> Self {
        let weight = params.add(format!("{name}.qkv.weight"), &[3 * width, width], init);
        let query_bias = params.add(format!("{name}.q_bias"), &[width], Init::Zero);
        let value_bias = params.add(format!("{name}.v_bias"), &[width], Init::Zero);
        Linear { weight, bias: LinearBias::QueryValue(query_bias, value_bias) }
    }

    /// x [.., in] → [.., out].
    pub fn forward(&self, w: &Weights, x: &Tensor) -> Result<Tensor> {
        let weight = &w[self.weight];
        let bias = match self.bias {
            LinearBias::All(bias) => w[bias].shallow_clone(),
            LinearBias::QueryValue(query, value) => Tensor::cat(&[&w[query], &w[value].zeros_like(), &w[value]], 0),
            // The product adds a bias at no cost; zeros are cheaper than a second kind of product.
            LinearBias::None => weight.new_zeros([weight.size()[0]], (weight.kind(), weight.device())),
        };
        crate::op::linear::linear(x, weight, &bias)
    }

    /// x [.., in] → GELU(linear(x)) [.., out]. On a GPU, bias and activation take one pass.
    pub fn forward_gelu(&self, w: &Weights, x: &Tensor, gelu: Gelu) -> Result<Tensor> {
        match (x.device(), self.bias) {
            (Device::Cuda(_), LinearBias::All(bias)) => {
                bias_gelu(&x.linear(&w[self.weight], None::<Tensor>), Some(&w[bias]), gelu)
            }
            _ => bias_gelu(&self.forward(w, x)?, None, gelu),
        }
    }
}

/// Layer normalization, `<name>.weight` and `<name>.bias` `[D]`; or by the root mean square alone, without bias.
#[derive(Clone, Copy, Debug)]
pub struct LayerNorm {
    scale: ParamId,
    /// None normalizes by the root mean square (Zhang and Sennrich, 2019).
    shift: Option<ParamId>,
}

impl LayerNorm {
    /// Declares scale 1 and shift 0.
    pub fn new(params: &mut ParamSpecs, name: &str, width: i64) -> Self {
        LayerNorm::with_shift(params, name, width, Init::Zero)
    }
    /// Declares scale 1 and a shift of this initializer.
    pub fn with_shift(params: &mut ParamSpecs, name: &str, width: i64, shift_init: Init) -> Self {
        let scale = params.add(format!("{name}.weight"), &[width], Init::One);
        LayerNorm { scale, shift: Some(params.add(format!("{name}.bias"), &[width], shift_init)) }
    }
    /// Declares scale 1 alone: normalization by the root mean square.
    pub fn root_mean_square(params: &mut ParamSpecs, name: &str, width: i64) -> Self {
        LayerNorm { scale: params.add(format!("{name}.weight"), &[width], Init::One), shift: None }
    }
    /// x [.., D] → [.., D].
    pub fn forward(&self, w: &Weights, x: &Tensor) -> Result<Tensor> {
        match self.shift {
            Some(shift) => layer_norm(x, &w[self.scale], &w[shift]),
            None => Ok(rms_norm(x, &w[self.scale])),
        }
    }
    /// x and r [.., D] → x + r, and its normalization.
    pub fn forward_add(&self, w: &Weights, x: &Tensor, r: &Tensor) -> Result<(Tensor, Tensor)> {
        match self.shift {
            Some(shift) => add_layer_norm(x, r, &w[self.scale], &w[shift]),
            None => {
                let sum = x + r;
                let normalized = rms_norm(&sum, &w[self.scale]);
                Ok((sum, normalized))
            }
        }
    }
}
