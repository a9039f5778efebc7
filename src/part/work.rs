//! What a training step of a model has to do, told from shapes alone: the products of matrices, and the bytes that its
//! operations move as they are fused today. Floating-point operations are those of matrix products and attention, two for
//! each multiplication with its addition, and only of tokens that are computed; backward does every product twice, once
//! for each operand, but the first layer's, whose input is data.

/// One operation on one sample.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Op {
    /// [rows, inputs] · [inputs, outputs].
    Product {
        rows: i64,
        inputs: i64,
        outputs: i64,
        /// Whether gradients go on to its input; they do not to data.
        onward: bool,
        /// Whether the gradient of its bias takes a pass of its own on a GPU too.
        sums_bias: bool,
    },
    /// Softmax attention of all heads together over packed queries, keys and values.
    Attention { queries: i64, keys: i64, width: i64 },
    /// One that only moves values: normalisations, units, copies, losses.
    Pass {
        /// By our kernels on a GPU, and by libtorch's operations on a CPU.
        fused: Moved,
        plain: Moved,
    },
}

/// What a pass reads and writes, forward and backward.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Moved {
    /// Values in the dtype of the model.
    pub values: [i64; 2],
    /// Bytes of values of a fixed dtype.
    pub bytes: [i64; 2],
}

/// Floating-point operations and bytes of one kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Load {
    pub flops: f64,
    pub bytes: f64,
}

/// How the operations of a step are carried out.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct How {
    /// Samples that go through the model at a time.
    pub batch: i64,
    /// Bytes of a value of the model's dtype.
    pub element: i64,
    /// By our kernels, on a GPU.
    pub fused: bool,
}

impl Op {
    /// The kernels of the forward pass, and those of the backward pass.
    pub fn loads(&self, how: &How) -> [Vec<Load>; 2] {
        let How { batch, element, fused } = *how;
        let bytes = |values: i64| (values * element) as f64;
        match *self {
            Op::Product { rows, inputs, outputs, onward, sums_bias } => {
                let rows = rows * batch;
                let flops = 2.0 * rows as f64 * inputs as f64 * outputs as f64;
                let product = Load { flops, bytes: bytes(rows * inputs + inputs * outputs + rows * outputs) };
                // The weight's gradient, the bias's, which reads what comes back once more, and the input's.
                let bias = Load { flops: 0.0, bytes: bytes(rows * outputs) };
                let mut backward = vec![product];
                backward.extend((sums_bias || !fused).then_some(bias));
                backward.extend(onward.then_some(product));
                [vec![product], backward]
            }
            Op::Attention { queries, keys, width } => {
                let [q, kv] = [batch * queries * width, 2 * batch * keys * width];
                let flops = 4.0 * (batch * queries) as f64 * (keys * width) as f64;
                // q, k, v in, o out; then those, o and its gradient in, three gradients out.
                let forward = Load { flops, bytes: bytes(2 * q + kv) };
                [vec![forward], vec![Load { flops: 2.0 * flops, bytes: bytes(4 * q + 2 * kv) }]]
            }
            Op::Pass { fused: by_us, plain } => {
                let Moved { values, bytes: fixed } = if fused { by_us } else { plain };
                let load =
                    |way: usize| Load { flops: 0.0, bytes: bytes(batch * values[way]) + (batch * fixed[way]) as f64 };
                [vec![load(0)], vec![load(1)]]
            }
        }
    }
}

/// A model's operations on one sample, by part.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Work {
    pub parts: Vec<(&'static str, Vec<Op>)>,
}

impl Work {
    /// Floating-point operations of one sample, forward and backward.
    pub fn flops(&self) -> [f64; 2] {
        let how = How { batch: 1, element: 1, fused: true };
        self.kernels(&how).map(|loads| loads.iter().map(|load| load.flops).sum())
    }

    /// Of one sample's training step.
    pub fn training_flops(&self) -> f64 {
        self.flops().iter().sum()
    }

    /// Every kernel of the forward pass over a batch, and of the backward pass.
    pub fn kernels(&self, how: &How) -> [Vec<Load>; 2] {
        let mut both = [Vec::new(), Vec::new()];
        for [forward, backward] in self.parts.iter().flat_map(|(_, ops)| ops).map(|op| op.loads(how)) {
            both[0].extend(forward);
            both[1].extend(backward);
        }
        both
    }
}

/// A linear layer over `rows` tokens.
pub fn linear(rows: i64, inputs: i64, outputs: i64) -> Op {
    Op::Product { rows, inputs, outputs, onward: true, sums_bias: true }
}

/// The first linear layer, over rows of patches that are gathered from uint8 samples.
pub fn embed(rows: i64, values: i64, width: i64) -> [Op; 2] {
    let gathered = Moved { values: [rows * values, 0], bytes: [rows * values, 0] };
    let product = Op::Product { rows, inputs: values, outputs: width, onward: false, sums_bias: true };
    [Op::Pass { fused: gathered, plain: gathered }, product]
}

/// `seen` tokens become `all` of them: class and mask tokens are put in, and positions added.
pub fn fill(seen: i64, all: i64, width: i64) -> Op {
    let moved = Moved { values: [(seen + all) * width; 2], ..Moved::default() };
    Op::Pass { fused: moved, plain: moved }
}

/// A normalisation over `rows` tokens with what is still to be added: in one pass, or a sum and then the normalisation.
pub fn add_norm(rows: i64, width: i64) -> Op {
    let moved = |values: [i64; 2]| Moved { values: values.map(|values| values * rows * width), ..Moved::default() };
    Op::Pass { fused: moved([4, 4]), plain: moved([5, 6]) }
}

/// The operations of the transformer block over `tokens` tokens of which the last `answered` go on behind the attention;
/// the first normalisation finds something `due` in every block but the first.
pub fn block(tokens: i64, answered: i64, width: i64, hidden: i64, due: bool) -> Vec<Op> {
    let norm = Moved { values: [2 * tokens * width, 3 * tokens * width], ..Moved::default() };
    let unit = Moved { values: [2 * answered * hidden, 3 * answered * hidden], ..Moved::default() };
    vec![
        if due { add_norm(tokens, width) } else { Op::Pass { fused: norm, plain: norm } },
        linear(tokens, width, 3 * width),
        Op::Attention { queries: answered, keys: tokens, width },
        linear(answered, width, width),
        add_norm(answered, width),
        // The unit's kernel adds the bias, and sums its gradient.
        Op::Product { rows: answered, inputs: width, outputs: hidden, onward: true, sums_bias: false },
        Op::Pass { fused: unit, plain: unit },
        linear(answered, hidden, width),
    ]
}

/// A sample's two queries, an image and its caption, among `keys` keys each of the other kind, `width` wide. The kernels
/// between the products read logits in fp32; in backward, where logits are made once more, they write slopes too.
pub fn contrast(keys: i64, width: i64) -> Vec<Op> {
    let product = Op::Product { rows: 1, inputs: width, outputs: keys, onward: true, sums_bias: false };
    let fused = Moved { values: [0, 0], bytes: [4 * keys, 12 * keys] };
    // Scaling and the sum of exponentials; and those again, the slope, its share in the scale, and both factors.
    let plain = Moved { values: [0, 0], bytes: [16 * keys, 60 * keys] };
    let direction = [product, Op::Pass { fused, plain }];
    [direction, direction].concat()
}

/// A normalisation over `rows` tokens.
pub fn norm(rows: i64, width: i64) -> Op {
    let moved = Moved { values: [2 * rows * width, 3 * rows * width], ..Moved::default() };
    Op::Pass { fused: moved, plain: moved }
}

/// The operations of a block over `all` tokens in windows of `tokens`, normalised behind each half; of its second half for
/// the `answered` tokens alone.
pub fn windowed_block([all, answered]: [i64; 2], tokens: i64, width: i64, hidden: i64) -> Vec<Op> {
    let unit = Moved { values: [2 * answered * hidden, 3 * answered * hidden], ..Moved::default() };
    // The sum behind a normalisation: two in and one out; its gradient goes both ways as it is.
    let sum = Moved { values: [3 * answered * width, 0], ..Moved::default() };
    let sum = Op::Pass { fused: sum, plain: sum };
    let window = Op::Attention { queries: tokens, keys: tokens, width };
    let mut ops = vec![linear(all, width, 3 * width)];
    ops.extend(std::iter::repeat_n(window, (all / tokens) as usize));
    ops.extend([linear(answered, width, width), norm(answered, width), sum]);
    ops.extend([
        // The unit's kernel adds the bias, and sums its gradient.
        Op::Product { rows: answered, inputs: width, outputs: hidden, onward: true, sums_bias: false },
        Op::Pass { fused: unit, plain: unit },
        linear(answered, hidden, width),
    ]);
    ops.extend([norm(answered, width), sum]);
    ops
}

/// The squared error of `rows` guesses of `values` each against targets made of uint8 samples. The kernel makes its
/// gradient along with it, which backward scales.
pub fn pixel_loss(rows: i64, values: i64) -> Op {
    let n = rows * values;
    let fused = Moved { values: [2 * n, 2 * n], bytes: [9 * n, 0] };
    let plain = Moved { values: [n, n], bytes: [17 * n, 8 * n] };
    Op::Pass { fused, plain }
}
