//! Many ranks' numbers into one, in rank order, on the bytes as they arrived.

use super::world::Reduce;
use tch::Kind;

/// Elements that are accumulated at once: small enough to stay in the first cache.
const BLOCK: usize = 1024;

/// `out` = the reduction of `parts`, which stand in rank order and have `out`'s length. Kinds: f32, f64, bf16, i64.
pub fn fold(kind: Kind, how: Reduce, parts: &[&[u8]], out: &mut [u8]) {
    match kind {
        Kind::Float => fold_as::<F32>(how, parts, out),
        Kind::Double => fold_as::<F64>(how, parts, out),
        Kind::BFloat16 => fold_as::<Bf16>(how, parts, out),
        Kind::Int64 => fold_as::<I64>(how, parts, out),
        other => unreachable!("{other:?} is refused when the collective is started"),
    }
}

/// A number as it travels, and the form in which it is accumulated.
trait Number {
    const SIZE: usize;
    type Sum: Copy + Default;
    fn load(bytes: &[u8]) -> Self::Sum;
    fn store(sum: Self::Sum, bytes: &mut [u8]);
    fn add(a: Self::Sum, b: Self::Sum) -> Self::Sum;
    fn max(a: Self::Sum, b: Self::Sum) -> Self::Sum;
}

fn fold_as<N: Number>(how: Reduce, parts: &[&[u8]], out: &mut [u8]) {
    let mut sums = [N::Sum::default(); BLOCK];
    for (index, out) in out.chunks_mut(BLOCK * N::SIZE).enumerate() {
        let start = index * BLOCK * N::SIZE;
        for (rank, part) in parts.iter().enumerate() {
            let values = part[start..start + out.len()].chunks_exact(N::SIZE);
            match (rank, how) {
                (0, _) => sums.iter_mut().zip(values).for_each(|(sum, value)| *sum = N::load(value)),
                (_, Reduce::Sum) => sums.iter_mut().zip(values).for_each(|(s, v)| *s = N::add(*s, N::load(v))),
                (_, Reduce::Max) => sums.iter_mut().zip(values).for_each(|(s, v)| *s = N::max(*s, N::load(v))),
            }
        }
        out.chunks_exact_mut(N::SIZE).zip(&sums).for_each(|(bytes, &sum)| N::store(sum, bytes));
    }
}

/// The form that `load` and `store` of plain numbers share.
macro_rules! plain {
    ($name:ident, $number:ty, $add:expr, $max:expr) => {
        struct $name;
        impl Number for $name {
            const SIZE: usize = size_of::<$number>();
            type Sum = $number;
            fn load(bytes: &[u8]) -> $number {
                <$number>::from_ne_bytes(bytes.try_into().expect("one number"))
            }
            fn store(sum: $number, bytes: &mut [u8]) {
                bytes.copy_from_slice(&sum.to_ne_bytes());
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

plain!(F32, f32, |a, b| a + b, |a: f32, b: f32| if a.is_nan() || a > b { a } else { b });
plain!(F64, f64, |a, b| a + b, |a: f64, b: f64| if a.is_nan() || a > b { a } else { b });
plain!(I64, i64, i64::wrapping_add, Ord::max);

struct Bf16;
impl Number for Bf16 {
    const SIZE: usize = 2;
    type Sum = f32;
    fn load(bytes: &[u8]) -> f32 {
        f32::from_bits(u32::from(u16::from_ne_bytes(bytes.try_into().expect("one number"))) << 16)
    }
    /// Rounds to nearest, ties to even, as libtorch does; a NaN stays one.
    fn store(sum: f32, bytes: &mut [u8]) {
        let bits = sum.to_bits();
        let rounded = if sum.is_nan() { 0x7fc0 } else { (bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16) as u16 };
        bytes.copy_from_slice(&rounded.to_ne_bytes());
    }
    fn add(a: f32, b: f32) -> f32 {
        a + b
    }
    fn max(a: f32, b: f32) -> f32 {
        F32::max(a, b)
    }
}
