//! The cost of a model's training step, from shapes alone: floating-point operations of matrix products and attention,
//! two per multiplication and addition, of the tokens that are computed; and the bytes that operations move, with
//! today's fusion. Backward computes every product twice, once per operand, except that of the first layer, whose input
//! is data.

/// The cost of one operation on one sample.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum OpCost {
    /// A matrix product [rows, inputs] · [inputs, outputs].
    Matmul {
        rows: i64,
        inputs: i64,
        outputs: i64,
        /// Backward computes the gradient of the input; false if the input is data.
        needs_input_grad: bool,
        /// The gradient of the bias is a separate pass, on a GPU too.
        separate_bias_grad: bool,
    },
    /// Softmax attention of all heads over packed queries, keys and values.
    Attention { queries: i64, keys: i64, width: i64 },
    /// An operation bound by memory: normalization, activation, copy, loss.
    MemoryBound {
        /// By our kernels, on a GPU.
        fused: Traffic,
        /// By libtorch's operations, on a CPU.
        unfused: Traffic,
    },
}

/// Memory traffic of an operation, in forward and in backward.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Traffic {
    /// Number of values in the model's dtype.
    pub values: [i64; 2],
    /// Bytes of values in a fixed dtype.
    pub bytes: [i64; 2],
}

/// Floating-point operations and bytes of one kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct KernelCost {
    pub flops: f64,
    pub bytes: f64,
}

/// How a step is executed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Execution {
    /// Samples per pass through the model.
    pub batch: i64,
    /// Bytes per value in the model's dtype.
    pub element_bytes: i64,
    /// Our kernels run, on a GPU.
    pub fused: bool,
}

impl OpCost {
    /// Returns the kernels of the forward pass and of the backward pass.
    pub fn kernel_costs(&self, execution: &Execution) -> [Vec<KernelCost>; 2] {
        let Execution { batch, element_bytes, fused: is_fused } = *execution;
        let bytes = |values: i64| (values * element_bytes) as f64;
        match *self {
            OpCost::Matmul { rows, inputs, outputs, needs_input_grad, separate_bias_grad } => {
                let rows = rows * batch;
                let flops = 2.0 * rows as f64 * inputs as f64 * outputs as f64;
                let product = KernelCost { flops, bytes: bytes(rows * inputs + inputs * outputs + rows * outputs) };
                let bias = KernelCost { flops: 0.0, bytes: bytes(rows * outputs) };
                // The gradients of the weight, of the bias, and of the input.
                let mut backward = vec![product];
                backward.extend((separate_bias_grad || !is_fused).then_some(bias));
                backward.extend(needs_input_grad.then_some(product));
                [vec![product], backward]
            }
            OpCost::Attention { queries, keys, width } => {
                let q = batch * queries * width;
                let kv = 2 * batch * keys * width;
                let flops = 4.0 * (batch * queries) as f64 * (keys * width) as f64;
                // Forward reads q, k, v and writes the output; backward reads these and the gradient of the output and
                // writes three gradients.
                let forward = KernelCost { flops, bytes: bytes(2 * q + kv) };
                let backward = KernelCost { flops: 2.0 * flops, bytes: bytes(4 * q + 2 * kv) };
                [vec![forward], vec![backward]]
            }
            OpCost::MemoryBound { fused, unfused } => {
                let traffic = if is_fused { fused } else { unfused };
                let cost = |pass: usize| KernelCost {
                    flops: 0.0,
                    bytes: bytes(batch * traffic.values[pass]) + (batch * traffic.bytes[pass]) as f64,
                };
                [vec![cost(0)], vec![cost(1)]]
            }
        }
    }
}

/// The cost of a model for one sample: the operations of each part.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ModelCost {
    pub parts: Vec<(&'static str, Vec<OpCost>)>,
}

impl ModelCost {
    /// Returns the floating-point operations of one sample, forward and backward.
    pub fn flops(&self) -> [f64; 2] {
        let execution = Execution { batch: 1, element_bytes: 1, fused: true };
        self.kernel_costs(&execution).map(|kernels| kernels.iter().map(|kernel| kernel.flops).sum())
    }

    /// Returns the floating-point operations of one sample's training step.
    pub fn training_flops(&self) -> f64 {
        self.flops().iter().sum()
    }

    /// Returns every kernel of the forward pass over a batch, and of the backward pass.
    pub fn kernel_costs(&self, execution: &Execution) -> [Vec<KernelCost>; 2] {
        let mut kernels = [Vec::new(), Vec::new()];
        for op in self.parts.iter().flat_map(|(_, ops)| ops) {
            let [forward, backward] = op.kernel_costs(execution);
            kernels[0].extend(forward);
            kernels[1].extend(backward);
        }
        kernels
    }
}

/// A linear layer over `rows` tokens.
pub fn linear(rows: i64, inputs: i64, outputs: i64) -> OpCost {
    OpCost::Matmul { rows, inputs, outputs, needs_input_grad: true, separate_bias_grad: true }
}

/// A linear layer without bias gradient of its own: the GELU kernel that follows adds the bias and sums its gradient.
fn linear_before_gelu(rows: i64, inputs: i64, outputs: i64) -> OpCost {
    OpCost::Matmul { rows, inputs, outputs, needs_input_grad: true, separate_bias_grad: false }
}

/// An operation with the same traffic whether fused or not.
fn memory_bound(traffic: Traffic) -> OpCost {
    OpCost::MemoryBound { fused: traffic, unfused: traffic }
}

/// Traffic of values in the model's dtype alone.
fn value_traffic(values: [i64; 2]) -> Traffic {
    Traffic { values, ..Traffic::default() }
}

/// The patch embedding of `rows` patches gathered from uint8 samples.
pub fn patch_embed(rows: i64, values: i64, width: i64) -> [OpCost; 2] {
    let gather = Traffic { values: [rows * values, 0], bytes: [rows * values, 0] };
    let product =
        OpCost::Matmul { rows, inputs: values, outputs: width, needs_input_grad: false, separate_bias_grad: true };
    [memory_bound(gather), product]
}

/// Assembly of `outputs` tokens from `inputs` tokens: class and mask tokens are inserted, and positions added.
pub fn assemble_tokens(inputs: i64, outputs: i64, width: i64) -> OpCost {
    memory_bound(value_traffic([(inputs + outputs) * width; 2]))
}

/// Layer normalization of `rows` tokens with a pending residual: fused, or a sum and a normalization.
pub fn add_layer_norm(rows: i64, width: i64) -> OpCost {
    let traffic = |values: [i64; 2]| value_traffic(values.map(|values| values * rows * width));
    OpCost::MemoryBound { fused: traffic([4, 4]), unfused: traffic([5, 6]) }
}

/// Layer normalization of `rows` tokens.
pub fn layer_norm(rows: i64, width: i64) -> OpCost {
    memory_bound(value_traffic([2 * rows * width, 3 * rows * width]))
}

/// Activation of `rows` tokens.
fn gelu(rows: i64, width: i64) -> OpCost {
    memory_bound(value_traffic([2 * rows * width, 3 * rows * width]))
}

/// A transformer block over `tokens` tokens that computes the last `outputs` of them after attention. `has_pending` is
/// false in the first block, whose first normalization has no pending residual.
pub fn block(tokens: i64, outputs: i64, width: i64, hidden: i64, has_pending: bool) -> Vec<OpCost> {
    vec![
        if has_pending { add_layer_norm(tokens, width) } else { layer_norm(tokens, width) },
        linear(tokens, width, 3 * width),
        OpCost::Attention { queries: outputs, keys: tokens, width },
        linear(outputs, width, width),
        add_layer_norm(outputs, width),
        linear_before_gelu(outputs, width, hidden),
        gelu(outputs, hidden),
        linear(outputs, hidden, width),
    ]
}

/// The InfoNCE loss of a sample's two queries, an image and its caption, among `keys` keys each of width `width`. The
/// kernels between the products read logits in fp32; in backward, which computes the logits again, they also write
/// their gradients.
pub fn info_nce(keys: i64, width: i64) -> Vec<OpCost> {
    let product =
        OpCost::Matmul { rows: 1, inputs: width, outputs: keys, needs_input_grad: true, separate_bias_grad: false };
    let fused = Traffic { values: [0, 0], bytes: [4 * keys, 12 * keys] };
    // Forward: scale and log-sum-exp. Backward: the same, the gradient, its part in the scale's, and both factors.
    let unfused = Traffic { values: [0, 0], bytes: [16 * keys, 60 * keys] };
    let direction = [product, OpCost::MemoryBound { fused, unfused }];
    [direction, direction].concat()
}

/// A block of windowed attention over `tokens` tokens in windows of `window` tokens, normalized after attention and
/// after the MLP. What follows the attention is computed for `outputs` tokens.
pub fn windowed_block(tokens: i64, outputs: i64, window: i64, width: i64, hidden: i64) -> Vec<OpCost> {
    // The sum after a normalization: two reads and one write. Its gradient is passed on unchanged.
    let sum = memory_bound(value_traffic([3 * outputs * width, 0]));
    let attention = OpCost::Attention { queries: window, keys: window, width };
    let mut ops = vec![linear(tokens, width, 3 * width)];
    ops.extend(std::iter::repeat_n(attention, (tokens / window) as usize));
    ops.extend([
        linear(outputs, width, width),
        layer_norm(outputs, width),
        sum,
        linear_before_gelu(outputs, width, hidden),
        gelu(outputs, hidden),
        linear(outputs, hidden, width),
        layer_norm(outputs, width),
        sum,
    ]);
    ops
}

/// Mean squared error of `rows` predictions of `values` values against targets from uint8 samples. The kernel computes
/// its gradient in the forward pass, and backward scales it.
pub fn pixel_loss(rows: i64, values: i64) -> OpCost {
    let n = rows * values;
    let fused = Traffic { values: [2 * n, 2 * n], bytes: [9 * n, 0] };
    let unfused = Traffic { values: [n, n], bytes: [17 * n, 8 * n] };
    OpCost::MemoryBound { fused, unfused }
}
