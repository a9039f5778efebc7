//! Token orders drawn per sample: the one source of random masks.
//!
//! A sample's stream gives one word of noise a unit, then what its policy needs. Units are sorted by (hidden by the
//! policy, noise, unit); the first ones stay. So a policy that hides too few units is completed at random, and one that
//! hides too many keeps a random choice of those it hid: every sample keeps as many.

use super::launch::{Launch, Source, plain};
use super::sizes;
use crate::fault::{Fault, Result};
use crate::grid::Grid;
use crate::rng::{Draw, Purpose};
use tch::{Device, Kind, Tensor};

/// A sample's place in the stream of random numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin {
    pub id: u64,
    pub epoch: u64,
    pub repeat: u32,
}

impl Origin {
    /// int64 [3, B]: ids (their bits), epochs, repeats, as kernels take them.
    pub fn table(samples: &[Origin], device: Device) -> Tensor {
        let row = |of: fn(&Origin) -> i64| samples.iter().map(of);
        let rows: Vec<i64> =
            row(|o| o.id as i64).chain(row(|o| o.epoch as i64)).chain(row(|o| i64::from(o.repeat))).collect();
        Tensor::from_slice(&rows).view([3, samples.len() as i64]).to_device(device)
    }
}

/// 0..n in an order drawn for each sample → int64 [B, n]. Drawn on the host, whatever the device; the same orders come
/// from [`mask`] with [`Plan::random`].
pub fn shuffle(seed: u64, samples: &[Origin], n: i64, device: Device) -> Tensor {
    let mut orders: Vec<i64> = Vec::with_capacity(samples.len() * n as usize);
    for origin in samples {
        let order = Draw::new(seed, origin.id, origin.epoch, Purpose::Mask, origin.repeat).order(n as usize);
        orders.extend(order.into_iter().map(i64::from));
    }
    Tensor::from_slice(&orders).view([samples.len() as i64, n]).to_device(device)
}

/// Which units are hidden before the others.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Policy {
    /// None: noise alone decides.
    Random,
    Blocks(Blocks),
    /// Those outside the kept rows or outside the kept columns.
    Axes {
        rows: i64,
        cols: i64,
    },
}

/// Rectangles of units, in BEiT's way (Bao et al., 2022, §2.3; its `masking_generator.py`): area uniform between `least`
/// and the smaller of `most` and what is left to hide, aspect log-uniform between `aspect` and 1 / `aspect`, both sides
/// smaller than the grid's. One that would hide nothing new, or more than is left, is drawn again, at most `tries` times
/// in a row. On a grid of several frames a block also takes some frames in a row (MaskFeat's cubes).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Blocks {
    /// Units to hide by blocks.
    pub goal: i64,
    pub least: i64,
    pub most: i64,
    pub tries: i64,
    pub aspect: f64,
}

/// How many tokens stay, and by what rule they are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Plan {
    /// The grid in units: frames, rows, columns.
    units: [i64; 3],
    /// One unit in tokens: frames, rows, columns. A unit stays or goes as a whole.
    of: [i64; 3],
    /// Units that stay.
    kept: i64,
    policy: Policy,
}

/// Units that a block of threads can sort in the shared memory that any GPU grants.
pub const MOST_UNITS: i64 = 4096;

impl Plan {
    /// `kept` units of `of` tokens (frames, rows, columns), each as likely as any other. A unit of one token is MAE's
    /// random sampling, one of all frames and one token VideoMAE's tube, one of two by two tokens CMAE's.
    ///
    /// # Errors
    /// Usage, where units do not fill the grid or more of them are kept than there are.
    pub fn random(grid: &Grid, of: [i64; 3], kept: i64) -> Result<Plan> {
        Plan::new(grid, of, kept, Policy::Random)
    }

    /// `kept` units: random ones of those that no block hides, and, where blocks hide more than go, of the others.
    ///
    /// # Errors
    /// Usage, as above and where the blocks' numbers make no sense.
    pub fn blocks(grid: &Grid, of: [i64; 3], kept: i64, blocks: Blocks) -> Result<Plan> {
        let Blocks { goal, least, most, tries, aspect } = blocks;
        let whole = [goal, least, most, tries].iter().all(|n| (1..=1 << 14).contains(n));
        if !whole || least > most || !(1.0 / 256.0..=1.0).contains(&aspect) {
            return Err(Fault::usage(format!(
                "{blocks:?}: goal, least, most and tries must lie in 1..=16384 with least at most `most`, and aspect in \
                 [1/256, 1]"
            )));
        }
        Plan::new(grid, of, kept, Policy::Blocks(blocks))
    }

    /// The tokens where a kept row meets a kept column, in every frame (Audio-MAE §3, "time + frequency").
    ///
    /// # Errors
    /// Usage, where more rows or columns are kept than there are.
    pub fn axes(grid: &Grid, rows: i64, cols: i64) -> Result<Plan> {
        if !(0..=grid.rows).contains(&rows) || !(0..=grid.cols).contains(&cols) {
            return Err(Fault::usage(format!(
                "{rows} rows and {cols} columns are to be kept of a grid of {} × {}",
                grid.rows, grid.cols
            )));
        }
        Plan::new(grid, [1; 3], grid.frames * rows * cols, Policy::Axes { rows, cols })
    }

    fn new(grid: &Grid, of: [i64; 3], kept: i64, policy: Policy) -> Result<Plan> {
        let tokens = [grid.frames, grid.rows, grid.cols];
        if of.iter().zip(tokens).any(|(of, tokens)| *of < 1 || tokens % of != 0) {
            return Err(Fault::usage(format!(
                "units of {of:?} tokens (frames, rows, columns) do not fill a grid of {tokens:?}; give divisors of it"
            )));
        }
        let plan = Plan { units: [0, 1, 2].map(|axis| tokens[axis] / of[axis]), of, kept, policy };
        match (0..=plan.count()).contains(&kept) {
            true => Ok(plan),
            false => Err(Fault::usage(format!("{kept} units are to be kept of {}", plan.count()))),
        }
    }

    /// Units of a sample.
    fn count(&self) -> i64 {
        self.units.iter().product()
    }

    /// N and K.
    fn tokens(&self) -> [i64; 2] {
        [self.count(), self.kept].map(|units| units * self.of.iter().product::<i64>())
    }

    /// The tokens of one sample, those that stay first: the reference of every mask. Kept units stand in the order drawn,
    /// the tokens of a unit in row-major order.
    pub fn order(&self, draw: &mut Draw) -> Vec<u32> {
        let noise: Vec<u32> = (0..self.count()).map(|_| draw.bits()).collect();
        let hidden = match self.policy {
            Policy::Random => vec![false; noise.len()],
            Policy::Blocks(blocks) => blocks.hidden(self.units, draw),
            Policy::Axes { rows, cols } => self.outside(rows, cols, draw),
        };
        let key = |unit: usize| u64::from(hidden[unit]) << 63 | u64::from(noise[unit]) << 31 | unit as u64;
        let mut keys: Vec<u64> = (0..noise.len()).map(key).collect();
        keys.sort_unstable();
        keys.into_iter().flat_map(|key| self.of_unit((key & 0x7FFF_FFFF) as i64)).collect()
    }

    /// The tokens of a unit.
    fn of_unit(&self, unit: i64) -> Vec<u32> {
        let [[_, rows, cols], [f, r, c]] = [self.units, self.of];
        let first = [unit / (rows * cols) * f, unit / cols % rows * r, unit % cols * c];
        let inside = (0..f).flat_map(|a| (0..r).flat_map(move |b| (0..c).map(move |c| [a, b, c])));
        inside
            .map(|at| (((first[0] + at[0]) * rows * r + first[1] + at[1]) * cols * c + first[2] + at[2]) as u32)
            .collect()
    }

    /// The units outside the rows and columns that stay: of each, those with the least noise.
    fn outside(&self, kept_rows: i64, kept_cols: i64, draw: &mut Draw) -> Vec<bool> {
        let [_, rows, cols] = self.units;
        let mut gone = |lines: i64, kept: i64| {
            let mut gone = vec![true; lines as usize];
            draw.order(lines as usize).iter().take(kept as usize).for_each(|line| gone[*line as usize] = false);
            gone
        };
        let (rows_gone, cols_gone) = (gone(rows, kept_rows), gone(cols, kept_cols));
        (0..self.count())
            .map(|unit| rows_gone[(unit / cols % rows) as usize] || cols_gone[(unit % cols) as usize])
            .collect()
    }

    /// What the kernel calls the policy, and its numbers.
    fn numbers(&self) -> [i32; 6] {
        match self.policy {
            Policy::Random => [0; 6],
            Policy::Blocks(b) => [1, b.goal as i32, b.least as i32, b.most as i32, b.tries as i32, b.span() as i32],
            Policy::Axes { rows, cols } => [2, rows as i32, cols as i32, 0, 0, 0],
        }
    }
}

impl Blocks {
    /// log₂ of the greatest aspect, in units of 2⁻¹⁶.
    fn span(&self) -> i64 {
        (-self.aspect.log2() * 65536.0).round() as i64
    }

    /// In whole numbers, so that no rounding tells one machine from another. Six words a try.
    fn hidden(&self, [frames, rows, cols]: [i64; 3], draw: &mut Draw) -> Vec<bool> {
        let mut hidden = vec![false; (frames * rows * cols) as usize];
        let (mut count, mut failed) = (0, 0);
        while count < self.goal && failed < self.tries {
            failed += 1;
            let words = [0; 6].map(|_| u64::from(draw.bits()));
            let below = |word: usize, n: i64| ((words[word] * n as u64) >> 32) as i64;
            let left = self.goal - count;
            let (low, high) = (self.least.min(left), self.least.max(left.min(self.most)));
            let area = (low << 16) + below(0, ((high - low) << 16) + 1);
            let lean = below(1, 2 * self.span() + 1) - self.span();
            let (height, width) = (side(area, lean, rows), side(area, -lean, cols));
            if height >= rows || width >= cols {
                continue;
            }
            let depth = 1 + below(4, frames);
            let [top, left_side, begin] =
                [below(2, rows - height + 1), below(3, cols - width + 1), below(5, frames - depth + 1)];
            let units: Vec<usize> = (begin..begin + depth)
                .flat_map(|f| (top..top + height).map(move |r| f * rows + r))
                .flat_map(|line| (left_side..left_side + width).map(move |c| (line * cols + c) as usize))
                .collect();
            let fresh = units.iter().filter(|unit| !hidden[**unit]).count() as i64;
            if fresh == 0 || fresh > left.min(self.most * frames) {
                continue;
            }
            units.into_iter().for_each(|unit| hidden[unit] = true);
            count += fresh;
            failed = 0;
        }
        hidden
    }
}

/// √(area · 2^(e / 2¹⁶)) to the nearest whole number up to `most`; area in units of 2⁻¹⁶.
fn side(area: i64, e: i64, most: i64) -> i64 {
    let square = area as u64 * power(e);
    (0..most).find(|side| ((2 * side + 1) as u64).pow(2) << 30 > square).unwrap_or(most)
}

/// 2^(e / 2¹⁶) in units of 2⁻¹⁶, by one root of two for each digit of the fraction.
fn power(e: i64) -> u64 {
    /// 2^(2⁻¹), 2^(2⁻²) … in units of 2⁻³¹.
    const ROOTS: [u64; 16] = [
        3037000500, 2553802834, 2341847524, 2242560872, 2194507417, 2170868212, 2159144272, 2153306067, 2150392887,
        2148937775, 2148210589, 2147847087, 2147665360, 2147574502, 2147529075, 2147506361,
    ];
    let digit = |i: &usize| e >> (15 - i) & 1 == 1;
    let fraction = (0..16).filter(digit).fold(1 << 31, |x: u64, i| (x * ROOTS[i]) >> 31);
    fraction >> (15 - (e >> 16))
}

/// The tokens of a batch by number, int64.
#[derive(Debug)]
pub struct Indices {
    /// [B, K].
    pub keep: Tensor,
    /// [B, N - K].
    pub drop: Tensor,
    /// [B, N]: where each token stands in (keep, drop).
    pub restore: Tensor,
}

/// Draws a mask for each sample of `origins` (int64 [3, B], see [`Origin::table`]), on the device where that lies.
pub fn mask(plan: &Plan, seed: u64, origins: &Tensor) -> Result<Indices> {
    if origins.device().is_cuda() && plan.count() <= MOST_UNITS {
        return kernel(plan, seed, origins);
    }
    Ok(formula(plan, seed, origins))
}

/// The reference.
pub fn formula(plan: &Plan, seed: u64, origins: &Tensor) -> Indices {
    let [_, batch] = sizes(origins);
    let numbers = Vec::<i64>::try_from(origins.contiguous().view(-1)).expect("int64 origins");
    let [tokens, kept] = plan.tokens();
    let (mut orders, mut restore) = (Vec::new(), vec![0i64; (batch * tokens) as usize]);
    for row in 0..batch as usize {
        let [id, epoch, repeat] = [0, 1, 2].map(|part| numbers[part * batch as usize + row]);
        let order = plan.order(&mut Draw::new(seed, id as u64, epoch as u64, Purpose::Mask, repeat as u32));
        let places = &mut restore[row * tokens as usize..];
        order.iter().enumerate().for_each(|(place, token)| places[*token as usize] = place as i64);
        orders.extend(order.into_iter().map(i64::from));
    }
    let there = |list: &[i64]| Tensor::from_slice(list).view([batch, tokens]).to_device(origins.device());
    let orders = there(&orders);
    let part = |begin, length| orders.narrow(1, begin, length).contiguous();
    Indices { keep: part(0, kept), drop: part(kept, tokens - kept), restore: there(&restore) }
}

pub const SOURCE: Source =
    Source { name: "shuffle", built_in: include_str!("../../kernels/shuffle.cu"), variants: plain };

/// The same by our kernel, to the last number.
///
/// # Errors
/// Where a sample has more than 4,096 units.
pub fn kernel(plan: &Plan, seed: u64, origins: &Tensor) -> Result<Indices> {
    let [_, batch] = sizes(origins);
    let [tokens, kept] = plan.tokens();
    let units = plan.count();
    if units > MOST_UNITS {
        return Err(Fault::failed(format!("shuffle: {units} units a sample; the kernel sorts up to {MOST_UNITS}")));
    }
    let empty = |width: i64| Tensor::empty([batch, width], (Kind::Int64, origins.device()));
    let out = Indices { keep: empty(kept), drop: empty(tokens - kept), restore: empty(tokens) };
    let count = (units as usize).next_power_of_two().max(32);
    let marks = match plan.policy {
        Policy::Random => 0,
        Policy::Blocks(_) => units,
        Policy::Axes { .. } => 2 * (plan.units[1] + plan.units[2]),
    };
    let launch = Launch {
        source: &SOURCE,
        variant: vec![],
        entry: "token_order",
        grid: [batch as u32, 1, 1],
        threads: (count / 2).clamp(32, 512) as u32,
        shared: 8 * count + 4 * marks as usize,
    };
    let tensors = [origins.into(), (&out.keep).into(), (&out.drop).into(), (&out.restore).into(), seed.into()];
    let shape = [&[batch], &plan.units[..], &plan.of, &[kept, count as i64]].concat();
    let numbers = shape.into_iter().map(|n| n as i32).chain(plan.numbers()).map(Into::into);
    launch.run(&tensors.into_iter().chain(numbers).collect::<Vec<_>>())?;
    Ok(out)
}
