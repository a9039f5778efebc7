//! Rank-ordered reduction of the bytes that arrived from all ranks.

use super::world::ReduceOp;
use tch::Kind;

/// Elements that are accumulated at once: small enough for the first-level cache.
const BLOCK: usize = 1024;

/// Writes the reduction of `parts` to `out`. The parts are in rank order and have the length of `out`. Kinds: f32, f64,
/// bf16, i64.
pub fn reduce(kind: Kind, op: ReduceOp, parts: &[&[u8]], out: &mut [u8]) {
    match kind {
        Kind::Float => reduce_as::<F32>(op, parts, out),
        Kind::Double => reduce_as::<F64>(op, parts, out),
        Kind::BFloat16 => reduce_as::<Bf16>(op, parts, out),
        Kind::Int64 => reduce_as::<I64>(op, parts, out),
        other => unreachable!("{other:?} is refused when the collective is started"),
    }
}

/// An element type, and the type in which it is accumulated.
trait Element {
    const SIZE: usize;
    type Accumulator: Copy + Default;
    fn load(bytes: &[u8]) -> Self::Accumulator;
    fn store(value: Self::Accumulator, bytes: &mut [u8]);
    fn add(a: Self::Accumulator, b: Self::Accumulator) -> Self::Accumulator;
    fn max(a: Self::Accumulator, b: Self::Accumulator) -> Self::Accumulator;
}

fn reduce_as<E: Element>(op: ReduceOp, parts: &[&[u8]], out: &mut [u8]) {
    let mut block = [E::Accumulator::default(); BLOCK];
    for (index, out) in out.chunks_mut(BLOCK * E::SIZE).enumerate() {
        let start = index * BLOCK * E::SIZE;
        for (rank, part) in parts.iter().enumerate() {
            let values = part[start..start + out.len()].chunks_exact(E::SIZE);
            match (rank, op) {
                (0, _) => block.iter_mut().zip(values).for_each(|(acc, value)| *acc = E::load(value)),
                (_, ReduceOp::Sum) => block.iter_mut().zip(values).for_each(|(acc, v)| *acc = E::add(*acc, E::load(v))),
                (_, ReduceOp::Max) => block.iter_mut().zip(values).for_each(|(acc, v)| *acc = E::max(*acc, E::load(v))),
            }
        }
        out.chunks_exact_mut(E::SIZE).zip(&block).for_each(|(bytes, &value)| E::store(value, bytes));
    }
}

/// Implements [`Element`] for a number that is accumulated in its own type.
macro_rules! element {
    ($name:ident, $number:ty, $add:expr, $max:expr) => {
        struct $name;
        impl Element for $name {
            const SIZE: usize = size_of::<$number>();
            type Accumulator = $number;
            fn load(bytes: &[u8]) -> $number {
                <$number>::from_ne_bytes(bytes.try_into().expect("one number"))
            }
            fn store(value: $number, bytes: &mut [u8]) {
                bytes.copy_from_slice(&value.to_ne_bytes());
            }
            fn add(a: $number, b: $number) -> $number {
                $add(a, b)
            }
            fn max(a: $number, b: $number) -> $number {
                $max(a, b)
            }
        }
    };
}

element!(F32, f32, |a, b| a + b, |a: f32, b: f32| if a.is_nan() || a > b { a } else { b });
element!(F64, f64, |a, b| a + b, |a: f64, b: f64| if a.is_nan() || a > b { a } else { b });
element!(I64, i64, i64::wrapping_add, Ord::max);

struct Bf16;
impl Element for Bf16 {
    const SIZE: usize = 2;
    type Accumulator = f32;
    fn load(bytes: &[u8]) -> f32 {
        f32::from_bits(u32::from(u16::from_ne_bytes(bytes.try_into().expect("one number"))) << 16)
    }
    /// Rounds to nearest, ties to even, as libtorch does; NaN remains NaN.
    fn store(value: f32, bytes: &mut [u8]) {
        let bits = value.to_bits();
        let rounded =
            if value.is_nan() { 0x7fc0 } else { (bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16) as u16 };
        bytes.copy_from_slice(&rounded.to_ne_bytes());
    }
    fn add(a: f32, b: f32) -> f32 {
        a + b
    }
    fn max(a: f32, b: f32) -> f32 {
        F32::max(a, b)
    }
}
