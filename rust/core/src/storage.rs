//! What lies in memory, and how it becomes numbers that kernels compute with.

use crate::real::Real;
use crate::simd::{self, Level};
use crate::stored::{Source, Stored};
use half::{bf16, f16};
use std::array::from_fn;

/// An element type of arrays: f64, f32, f16 or bf16.
///
/// 16-bit types are widened in registers and rounded to nearest even on the way back; the conversions are plain bit
/// operations without branches, so that loops over them vectorise at every CPU level and give the same bits.
pub trait Storage: Copy + Default + PartialEq + Send + Sync + 'static {
    /// The arithmetic of kernels on this type.
    type Real: Real;

    /// The highest level at which kernels on this type are faster than at the one below; see [`crate::kernel::Kernel::TOP`].
    const TOP: Level = Level::Avx2;

    /// The value, exactly.
    fn widen(self) -> Self::Real;

    /// The nearest value of this type, ties to even.
    fn narrow(x: Self::Real) -> Self;

    /// An array of this type, to be read by what learns its type at run time only.
    fn source(from: &[Self]) -> Source<'_, Self::Real>;

    /// An array of this type, to be changed by what learns its type at run time only.
    fn stored(to: &mut [Self]) -> Stored<'_, Self::Real>;

    /// The first `L` values of `from`.
    #[inline(always)]
    fn load<const L: usize>(from: &[Self]) -> [Self::Real; L] {
        let from: &[Self; L] = from[..L].try_into().expect("sliced to L");
        from_fn(|l| from[l].widen())
    }

    /// [`Storage::load`] inside the door of `level`.
    #[inline(always)]
    fn load_at<const L: usize>(level: Level, from: &[Self]) -> [Self::Real; L] {
        let _ = level;
        Self::load(from)
    }

    /// [`Storage::round`] inside the door of `level`.
    #[inline(always)]
    fn round_at<const L: usize>(level: Level, values: [Self::Real; L]) -> [Self; L] {
        let _ = level;
        Self::round(values)
    }

    /// `values`, each rounded to this type.
    #[inline(always)]
    fn round<const L: usize>(values: [Self::Real; L]) -> [Self; L] {
        // A loop: `from_fn` may become a function of its own, outside the door of the kernel.
        let mut line = [Self::default(); L];
        for l in 0..L {
            line[l] = Self::narrow(values[l]);
        }
        line
    }

    /// Writes `values` to the start of `to`.
    #[inline(always)]
    fn store<const L: usize>(values: [Self::Real; L], to: &mut [Self]) {
        to[..L].copy_from_slice(&Self::round(values));
    }

    /// [`Storage::store`] inside the door of `level`.
    #[inline(always)]
    fn store_at<const L: usize>(level: Level, values: [Self::Real; L], to: &mut [Self]) {
        to[..L].copy_from_slice(&Self::round_at(level, values));
    }

    /// Writes `values` to the start of `to` past the caches; `to` is 16-byte aligned.
    #[inline(always)]
    fn stream<const L: usize>(level: Level, values: [Self::Real; L], to: &mut [Self]) {
        simd::stream(level, &Self::round_at(level, values), &mut to[..L]);
    }
}

macro_rules! native {
    ($t:ty) => {
        impl Storage for $t {
            type Real = $t;
            #[inline(always)]
            fn widen(self) -> $t {
                self
            }
            #[inline(always)]
            fn narrow(x: $t) -> Self {
                x
            }
            fn source(from: &[Self]) -> Source<'_, Self> {
                Source::Real(from)
            }
            fn stored(to: &mut [Self]) -> Stored<'_, Self> {
                Stored::Real(to)
            }
        }
    };
}

native!(f32);
native!(f64);

impl Storage for bf16 {
    type Real = f32;

    // Twice as many conversions an instruction.
    const TOP: Level = Level::Avx512;

    fn source(from: &[Self]) -> Source<'_, f32> {
        Source::Bf16(from)
    }

    fn stored(to: &mut [Self]) -> Stored<'_, f32> {
        Stored::Bf16(to)
    }

    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits((self.to_bits() as u32) << 16)
    }

    #[inline(always)]
    fn narrow(x: f32) -> Self {
        let bits = x.to_bits();
        let rounded = bits.wrapping_add(0x7FFF + ((bits >> 16) & 1)) >> 16;
        let quiet_nan = (bits >> 16) | 0x40;
        bf16::from_bits(if bits & 0x7FFF_FFFF > 0x7F80_0000 { quiet_nan } else { rounded } as u16)
    }

    #[inline(always)]
    fn load_at<const L: usize>(level: Level, from: &[Self]) -> [f32; L] {
        let from: &[Self; L] = from[..L].try_into().expect("sliced to L");
        let mut to = [0.0; L];
        if !simd::widen_bfloats(level, from, &mut to) {
            to = Self::load(from);
        }
        to
    }

    #[inline(always)]
    fn round_at<const L: usize>(level: Level, values: [f32; L]) -> [Self; L] {
        let mut line = [bf16::ZERO; L];
        if !simd::narrow_bfloats(level, &values, &mut line) {
            line = Self::round(values);
        }
        line
    }
}

impl Storage for f16 {
    type Real = f32;

    fn source(from: &[Self]) -> Source<'_, f32> {
        Source::F16(from)
    }

    fn stored(to: &mut [Self]) -> Stored<'_, f32> {
        Stored::F16(to)
    }

    #[inline(always)]
    fn widen(self) -> f32 {
        let bits = self.to_bits() as u32;
        let magnitude = (bits & 0x7FFF) << 13;
        // Moves the exponent bias from 15 to 127; exact, subnormals included.
        let finite = f32::from_bits(magnitude) * f32::from_bits((254 - 15) << 23);
        let special = f32::from_bits(magnitude | 0x7F80_0000);
        let value = if magnitude >= 0x0F80_0000 { special } else { finite };
        f32::from_bits(value.to_bits() | (bits & 0x8000) << 16)
    }

    #[inline(always)]
    fn narrow(x: f32) -> Self {
        let bits = x.to_bits();
        let magnitude = bits & 0x7FFF_FFFF;
        // Below 2^-14 the sum with 0.5 rounds at the last bit of an f16 subnormal; its low bits are the result.
        let subnormal = (f32::from_bits(magnitude) + 0.5).to_bits().wrapping_sub(0.5f32.to_bits());
        let odd = (magnitude >> 13) & 1;
        let normal = magnitude.wrapping_sub(112 << 23).wrapping_add(0xFFF + odd) >> 13;
        let finite = if magnitude < 113 << 23 { subnormal } else { normal };
        let special = if magnitude > 0x7F80_0000 { 0x7E00 } else { 0x7C00 };
        // From 65520 on, halfway to the value after the largest, the nearest is infinity.
        let value = if magnitude >= 0x477F_F000 { special } else { finite };
        f16::from_bits((value | (bits >> 16) & 0x8000) as u16)
    }

    #[inline(always)]
    fn load<const L: usize>(from: &[Self]) -> [f32; L] {
        Self::load_at(simd::level(), from)
    }

    #[inline(always)]
    fn load_at<const L: usize>(level: Level, from: &[Self]) -> [f32; L] {
        let from: &[Self; L] = from[..L].try_into().expect("sliced to L");
        let mut to = [0.0; L];
        if !simd::widen_halves(level, from, &mut to) {
            widen_halves(from, &mut to);
        }
        to
    }

    #[inline(always)]
    fn round<const L: usize>(values: [f32; L]) -> [Self; L] {
        Self::round_at(simd::level(), values)
    }

    #[inline(always)]
    fn round_at<const L: usize>(level: Level, values: [f32; L]) -> [Self; L] {
        let mut line = [f16::ZERO; L];
        if !simd::narrow_halves(level, &values, &mut line) {
            narrow_halves(&values, &mut line);
        }
        line
    }
}

// Not inlined: the conversions are long, and a copy in every loop of every kernel would be a tenth of the wheel.

#[inline(never)]
fn widen_halves<const L: usize>(from: &[f16; L], to: &mut [f32; L]) {
    for l in 0..L {
        to[l] = from[l].widen();
    }
}

#[inline(never)]
fn narrow_halves<const L: usize>(from: &[f32; L], to: &mut [f16; L]) {
    for l in 0..L {
        to[l] = f16::narrow(from[l]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wide_registers_round_alike() {
        // NaNs of every kind, infinities, ties, and whatever else 16 bits and some below them can be.
        for top in 0..=u16::MAX {
            for low in [0u32, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF] {
                let mut values: [f32; 16] = from_fn(|l| f32::from_bits((top as u32) << 16 | low ^ l as u32 & 1));
                if top % 3 == 0 {
                    values[top as usize % 16] = f32::from_bits(0x0001_8000 + low); // a denormal among others
                }
                let wanted = bf16::round(values).map(bf16::to_bits);
                for level in Level::ALL.into_iter().filter(|level| *level <= simd::level()) {
                    assert_eq!(bf16::round_at(level, values).map(bf16::to_bits), wanted, "{top:#x} {low:#x}");
                    let halves = wanted.map(bf16::from_bits);
                    let wide = bf16::load_at::<16>(level, &halves).map(f32::to_bits);
                    assert_eq!(wide, bf16::load::<16>(&halves).map(f32::to_bits), "{top:#x} {low:#x}");
                }
            }
        }
    }

    #[test]
    fn every_16_bit_value_survives_the_round_trip() {
        for bits in 0..=u16::MAX {
            let (h, b) = (f16::from_bits(bits), bf16::from_bits(bits));
            assert!(h.is_nan() && h.widen().is_nan() || h.widen() == h.to_f32(), "f16 {bits:#x}");
            assert!(b.is_nan() && b.widen().is_nan() || b.widen() == b.to_f32(), "bf16 {bits:#x}");
            assert!(h.is_nan() && f16::narrow(h.widen()).is_nan() || f16::narrow(h.widen()).to_bits() == bits);
            assert!(b.is_nan() && bf16::narrow(b.widen()).is_nan() || bf16::narrow(b.widen()).to_bits() == bits);
        }
    }

    #[test]
    fn rounding_is_to_nearest_even_everywhere() {
        // Every exponent, with mantissas around each rounding boundary of both types.
        for top in 0..=0x1FFu32 {
            for middle in 0..=0x7FFu32 {
                for low in [0x000u32, 0x001, 0x7FF, 0x800, 0x801, 0xFFF] {
                    let x = f32::from_bits(top << 23 | middle << 12 | low);
                    let (h, b) = (f16::from_f32_const(x), bf16::from_f32_const(x));
                    assert!(h.is_nan() && f16::narrow(x).is_nan() || f16::narrow(x) == h, "f16 {x:e}");
                    assert!(b.is_nan() && bf16::narrow(x).is_nan() || bf16::narrow(x) == b, "bf16 {x:e}");
                }
            }
        }
    }
}
