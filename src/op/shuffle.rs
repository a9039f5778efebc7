//! Token orders sampled per sample: the one source of random masks.
//!
//! A sample's random stream gives one word of noise per unit, then what its rule needs. Units are sorted by (hidden by
//! the rule, noise, unit), and the first units stay visible. A rule that hides too few units is thus completed at
//! random, and one that hides too many keeps a random choice of the units it hides, so that every sample keeps the same
//! number.

use super::launch::{KernelSource, Launch, single_variant};
use super::sizes;
use crate::error::{Error, Result};
use crate::grid::Grid;
use crate::rng::{Philox, Purpose};
use tch::{Device, Kind, Tensor};

/// The key of a sample's random streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SampleKey {
    pub id: u64,
    pub epoch: u64,
    pub repeat: u32,
}

impl SampleKey {
    /// Stacks keys as kernels read them, int64 [3, B]: ids (as bits), epochs, repeats.
    pub fn stack(keys: &[SampleKey], device: Device) -> Tensor {
        let mut rows: Vec<i64> = Vec::with_capacity(3 * keys.len());
        rows.extend(keys.iter().map(|key| key.id as i64));
        rows.extend(keys.iter().map(|key| key.epoch as i64));
        rows.extend(keys.iter().map(|key| i64::from(key.repeat)));
        Tensor::from_slice(&rows).view([3, keys.len() as i64]).to_device(device)
    }
}

/// Returns a random permutation of 0..n per sample, int64 [B, n]. Sampled on the host, whatever the device;
/// [`sample_mask`] with [`MaskPlan::random`] gives the same orders.
pub fn shuffle(seed: u64, keys: &[SampleKey], n: i64, device: Device) -> Tensor {
    let mut orders: Vec<i64> = Vec::with_capacity(keys.len() * n as usize);
    for key in keys {
        let order = Philox::new(seed, key.id, key.epoch, Purpose::Mask, key.repeat).permutation(n as usize);
        orders.extend(order.into_iter().map(i64::from));
    }
    Tensor::from_slice(&orders).view([keys.len() as i64, n]).to_device(device)
}

/// Which units are hidden before the others.
#[derive(Clone, Copy, Debug, PartialEq)]
enum MaskRule {
    /// None: the noise alone decides.
    Random,
    /// Units of random rectangles.
    Blocks(BlockOptions),
    /// Units outside `rows` random rows and `cols` random columns.
    Axes { rows: i64, cols: i64 },
}

/// Block-wise masking as in BEiT (Bao et al., 2022, §2.3; its `masking_generator.py`): rectangles of units with an area
/// uniform between `min_area` and the smaller of `max_area` and the number of units left to hide, an aspect ratio
/// log-uniform between `min_aspect` and 1 / `min_aspect`, and both sides smaller than the grid's. A rectangle that
/// hides nothing new, or more than is left, is sampled again, at most `max_tries` times in a row. On a grid of several
/// frames a block also covers several consecutive frames (MaskFeat's cubes).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BlockOptions {
    /// Units to hide by blocks.
    pub target: i64,
    pub min_area: i64,
    pub max_area: i64,
    pub max_tries: i64,
    pub min_aspect: f64,
}

/// How many tokens stay visible, and the rule that chooses them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MaskPlan {
    /// Size of the grid in units: frames, rows, columns.
    units: [i64; 3],
    /// Size of a unit in tokens: frames, rows, columns. The tokens of a unit are kept or hidden together.
    unit_size: [i64; 3],
    /// Visible units.
    kept: i64,
    rule: MaskRule,
}

/// Maximum number of units: a block of threads must sort them in the shared memory that every GPU grants.
pub const MAX_UNITS: i64 = 4096;

/// Maximum of the integers of [`BlockOptions`].
const MAX_BLOCK_OPTION: i64 = 1 << 14;

impl MaskPlan {
    /// Keeps `kept` units of `unit_size` tokens (frames, rows, columns), uniformly at random. Units of one token are
    /// MAE's random sampling, units of all frames and one token VideoMAE's tubes, units of two by two tokens CMAE's.
    ///
    /// # Errors
    /// A usage error if units do not divide the grid, or if `kept` exceeds their number.
    pub fn random(grid: &Grid, unit_size: [i64; 3], kept: i64) -> Result<MaskPlan> {
        MaskPlan::new(grid, unit_size, kept, MaskRule::Random)
    }

    /// Keeps `kept` units: random ones outside the blocks, and random ones inside if blocks hide too many.
    ///
    /// # Errors
    /// The same as [`MaskPlan::random`], and a usage error if the block options are out of range.
    pub fn blocks(grid: &Grid, unit_size: [i64; 3], kept: i64, blocks: BlockOptions) -> Result<MaskPlan> {
        let BlockOptions { target, min_area, max_area, max_tries, min_aspect } = blocks;
        let in_range = [target, min_area, max_area, max_tries].iter().all(|n| (1..=MAX_BLOCK_OPTION).contains(n));
        if !in_range || min_area > max_area || !(1.0 / 256.0..=1.0).contains(&min_aspect) {
            return Err(Error::usage(format!(
                "{blocks:?}: target, min_area, max_area and max_tries must be in 1..={MAX_BLOCK_OPTION}, min_area at most \
                 max_area, and min_aspect in [1/256, 1]"
            )));
        }
        MaskPlan::new(grid, unit_size, kept, MaskRule::Blocks(blocks))
    }

    /// Keeps the tokens at the intersections of `rows` random rows and `cols` random columns, in every frame (Audio-MAE
    /// §3, "time + frequency").
    ///
    /// # Errors
    /// A usage error if `rows` or `cols` exceeds the grid.
    pub fn axes(grid: &Grid, rows: i64, cols: i64) -> Result<MaskPlan> {
        if !(0..=grid.rows).contains(&rows) || !(0..=grid.cols).contains(&cols) {
            return Err(Error::usage(format!(
                "cannot keep {rows} rows and {cols} columns of a grid of {} × {}",
                grid.rows, grid.cols
            )));
        }
        MaskPlan::new(grid, [1; 3], grid.frames * rows * cols, MaskRule::Axes { rows, cols })
    }

    fn new(grid: &Grid, unit_size: [i64; 3], kept: i64, rule: MaskRule) -> Result<MaskPlan> {
        let tokens = [grid.frames, grid.rows, grid.cols];
        if unit_size.iter().zip(tokens).any(|(unit, tokens)| *unit < 1 || tokens % unit != 0) {
            return Err(Error::usage(format!(
                "units of {unit_size:?} tokens (frames, rows, columns) do not divide a grid of {tokens:?}; choose divisors"
            )));
        }
        let units = [0, 1, 2].map(|axis| tokens[axis] / unit_size[axis]);
        let plan = MaskPlan { units, unit_size, kept, rule };
        if !(0..=plan.unit_count()).contains(&kept) {
            return Err(Error::usage(format!("cannot keep {kept} of {} units", plan.unit_count())));
        }
        Ok(plan)
    }

    /// Units per sample.
    fn unit_count(&self) -> i64 {
        self.units.iter().product()
    }

    fn tokens_per_unit(&self) -> i64 {
        self.unit_size.iter().product()
    }

    /// Tokens per sample, N.
    fn tokens(&self) -> i64 {
        self.unit_count() * self.tokens_per_unit()
    }

    /// Returns K, the visible tokens per sample.
    pub fn visible_tokens(&self) -> i64 {
        self.kept * self.tokens_per_unit()
    }

    /// Returns the tokens of one sample, visible tokens first: the reference of every mask. Units are in the sampled
    /// order, the tokens of a unit in row-major order.
    pub fn sample_order(&self, rng: &mut Philox) -> Vec<u32> {
        let noise: Vec<u32> = (0..self.unit_count()).map(|_| rng.next_u32()).collect();
        let hidden = match self.rule {
            MaskRule::Random => vec![false; noise.len()],
            MaskRule::Blocks(blocks) => blocks.sample_hidden(self.units, rng),
            MaskRule::Axes { rows, cols } => self.sample_outside_axes(rows, cols, rng),
        };
        let key = |unit: usize| u64::from(hidden[unit]) << 63 | u64::from(noise[unit]) << 31 | unit as u64;
        let mut keys: Vec<u64> = (0..noise.len()).map(key).collect();
        keys.sort_unstable();
        keys.into_iter().flat_map(|key| self.tokens_of((key & 0x7FFF_FFFF) as i64)).collect()
    }

    /// Returns the tokens of a unit.
    fn tokens_of(&self, unit: i64) -> Vec<u32> {
        let [_, rows, cols] = self.units;
        let [unit_frames, unit_rows, unit_cols] = self.unit_size;
        let first_frame = unit / (rows * cols) * unit_frames;
        let first_row = unit / cols % rows * unit_rows;
        let first_col = unit % cols * unit_cols;
        let mut tokens = Vec::with_capacity(self.tokens_per_unit() as usize);
        for frame in first_frame..first_frame + unit_frames {
            for row in first_row..first_row + unit_rows {
                for col in first_col..first_col + unit_cols {
                    tokens.push(((frame * rows * unit_rows + row) * cols * unit_cols + col) as u32);
                }
            }
        }
        tokens
    }

    /// Marks the units outside the kept rows and columns, which are those with the least noise.
    fn sample_outside_axes(&self, kept_rows: i64, kept_cols: i64, rng: &mut Philox) -> Vec<bool> {
        let [_, rows, cols] = self.units;
        let row_hidden = sample_hidden_lines(rows, kept_rows, rng);
        let col_hidden = sample_hidden_lines(cols, kept_cols, rng);
        (0..self.unit_count())
            .map(|unit| row_hidden[(unit / cols % rows) as usize] || col_hidden[(unit % cols) as usize])
            .collect()
    }

    /// Returns the number of the rule in the kernel, and its parameters.
    fn rule_arguments(&self) -> [i32; 6] {
        match self.rule {
            MaskRule::Random => [0; 6],
            MaskRule::Blocks(blocks) => {
                let BlockOptions { target, min_area, max_area, max_tries, .. } = blocks;
                [1, target as i32, min_area as i32, max_area as i32, max_tries as i32, blocks.aspect_span() as i32]
            }
            MaskRule::Axes { rows, cols } => [2, rows as i32, cols as i32, 0, 0, 0],
        }
    }
}

/// Marks all but `kept` of `lines` rows or columns.
fn sample_hidden_lines(lines: i64, kept: i64, rng: &mut Philox) -> Vec<bool> {
    let mut hidden = vec![true; lines as usize];
    for line in rng.permutation(lines as usize).iter().take(kept as usize) {
        hidden[*line as usize] = false;
    }
    hidden
}

impl BlockOptions {
    /// log₂ of the maximum aspect ratio, in units of 2⁻¹⁶.
    fn aspect_span(&self) -> i64 {
        (-self.min_aspect.log2() * 65536.0).round() as i64
    }

    /// Marks the units that blocks hide. All arithmetic is in integers, so that the result does not depend on the
    /// machine. Consumes six words per try.
    fn sample_hidden(&self, [frames, rows, cols]: [i64; 3], rng: &mut Philox) -> Vec<bool> {
        let mut hidden = vec![false; (frames * rows * cols) as usize];
        let mut count = 0;
        let mut failed = 0;
        while count < self.target && failed < self.max_tries {
            failed += 1;
            let words = [0; 6].map(|_| u64::from(rng.next_u32()));
            let uniform_below = |word: usize, n: i64| ((words[word] * n as u64) >> 32) as i64;
            let remaining = self.target - count;
            let min_area = self.min_area.min(remaining);
            let max_area = self.min_area.max(remaining.min(self.max_area));
            let area = (min_area << 16) + uniform_below(0, ((max_area - min_area) << 16) + 1);
            let aspect = uniform_below(1, 2 * self.aspect_span() + 1) - self.aspect_span();
            let height = nearest_side(area, aspect, rows);
            let width = nearest_side(area, -aspect, cols);
            if height >= rows || width >= cols {
                continue;
            }
            let depth = 1 + uniform_below(4, frames);
            let top = uniform_below(2, rows - height + 1);
            let left = uniform_below(3, cols - width + 1);
            let first_frame = uniform_below(5, frames - depth + 1);
            let units: Vec<usize> = (first_frame..first_frame + depth)
                .flat_map(|frame| (top..top + height).map(move |row| frame * rows + row))
                .flat_map(|line| (left..left + width).map(move |col| (line * cols + col) as usize))
                .collect();
            let new_units = units.iter().filter(|unit| !hidden[**unit]).count() as i64;
            if new_units == 0 || new_units > remaining.min(self.max_area * frames) {
                continue;
            }
            for unit in units {
                hidden[unit] = true;
            }
            count += new_units;
            failed = 0;
        }
        hidden
    }
}

/// √(area · 2^(e / 2¹⁶)) rounded to the nearest integer, at most `max_side`; area in units of 2⁻¹⁶.
fn nearest_side(area: i64, e: i64, max_side: i64) -> i64 {
    let square = area as u64 * exp2_fixed(e);
    (0..max_side).find(|side| ((2 * side + 1) as u64).pow(2) << 30 > square).unwrap_or(max_side)
}

/// 2^(e / 2¹⁶) in units of 2⁻¹⁶, as a product of one root of two per binary digit of the fraction.
fn exp2_fixed(e: i64) -> u64 {
    /// 2^(2⁻¹), 2^(2⁻²) … in units of 2⁻³¹.
    const ROOTS: [u64; 16] = [
        3037000500, 2553802834, 2341847524, 2242560872, 2194507417, 2170868212, 2159144272, 2153306067, 2150392887,
        2148937775, 2148210589, 2147847087, 2147665360, 2147574502, 2147529075, 2147506361,
    ];
    let is_set = |i: &usize| e >> (15 - i) & 1 == 1;
    let fraction = (0..16).filter(is_set).fold(1 << 31, |x: u64, i| (x * ROOTS[i]) >> 31);
    fraction >> (15 - (e >> 16))
}

/// The tokens of a batch by index, int64.
#[derive(Debug)]
pub struct MaskIndices {
    /// Visible tokens, [B, K].
    pub keep: Tensor,
    /// Hidden tokens, [B, N - K].
    pub drop: Tensor,
    /// Position of each token in (keep, drop), [B, N].
    pub restore: Tensor,
}

/// Samples a mask per sample of `keys` (int64 [3, B], see [`SampleKey::stack`]), on the device of that tensor.
pub fn sample_mask(plan: &MaskPlan, seed: u64, keys: &Tensor) -> Result<MaskIndices> {
    if keys.device().is_cuda() && plan.unit_count() <= MAX_UNITS {
        return kernel(plan, seed, keys);
    }
    Ok(formula(plan, seed, keys))
}

/// The reference.
pub fn formula(plan: &MaskPlan, seed: u64, keys: &Tensor) -> MaskIndices {
    let [_, batch] = sizes(keys);
    let values = Vec::<i64>::try_from(keys.contiguous().view(-1)).expect("int64 sample keys");
    let tokens = plan.tokens();
    let visible = plan.visible_tokens();
    let mut orders = Vec::new();
    let mut restore = vec![0i64; (batch * tokens) as usize];
    for row in 0..batch as usize {
        let [id, epoch, repeat] = [0, 1, 2].map(|part| values[part * batch as usize + row]);
        let order = plan.sample_order(&mut Philox::new(seed, id as u64, epoch as u64, Purpose::Mask, repeat as u32));
        let row_restore = &mut restore[row * tokens as usize..];
        for (position, token) in order.iter().enumerate() {
            row_restore[*token as usize] = position as i64;
        }
        orders.extend(order.into_iter().map(i64::from));
    }
    let to_tensor = |values: &[i64]| Tensor::from_slice(values).view([batch, tokens]).to_device(keys.device());
    let orders = to_tensor(&orders);
    MaskIndices {
        keep: orders.narrow(1, 0, visible).contiguous(),
        drop: orders.narrow(1, visible, tokens - visible).contiguous(),
        restore: to_tensor(&restore),
    }
}

/// Kernel source.
pub const SOURCE: KernelSource =
    KernelSource { name: "shuffle", embedded: include_str!("../../kernels/shuffle.cu"), variants: single_variant };

/// The same by the kernel, with exactly the same result.
///
/// # Errors
/// If a sample has more than [`MAX_UNITS`] units.
pub fn kernel(plan: &MaskPlan, seed: u64, keys: &Tensor) -> Result<MaskIndices> {
    let [_, batch] = sizes(keys);
    let tokens = plan.tokens();
    let visible = plan.visible_tokens();
    let units = plan.unit_count();
    if units > MAX_UNITS {
        return Err(Error::failed(format!("shuffle: {units} units per sample; the kernel sorts at most {MAX_UNITS}")));
    }
    let empty = |width: i64| Tensor::empty([batch, width], (Kind::Int64, keys.device()));
    let out = MaskIndices { keep: empty(visible), drop: empty(tokens - visible), restore: empty(tokens) };
    let count = (units as usize).next_power_of_two().max(32);
    let marks = match plan.rule {
        MaskRule::Random => 0,
        MaskRule::Blocks(_) => units,
        MaskRule::Axes { .. } => 2 * (plan.units[1] + plan.units[2]),
    };
    let launch = Launch {
        source: &SOURCE,
        variant: vec![],
        entry: "token_order",
        grid: [batch as u32, 1, 1],
        threads: (count / 2).clamp(32, 512) as u32,
        shared_bytes: 8 * count + 4 * marks as usize,
    };
    let tensors = [keys.into(), (&out.keep).into(), (&out.drop).into(), (&out.restore).into(), seed.into()];
    let shape = [&[batch], &plan.units[..], &plan.unit_size, &[visible, count as i64]].concat();
    let integers = shape.into_iter().map(|n| n as i32).chain(plan.rule_arguments()).map(Into::into);
    launch.run(&tensors.into_iter().chain(integers).collect::<Vec<_>>())?;
    Ok(out)
}
