//! The exponential and the logarithm in float64: plain products and sums, so that every CPU gives the same bits.

use crate::kernel::Kernel;
use crate::simd::{self, Level};
use std::f64::consts::{FRAC_1_SQRT_2, LOG2_E};

/// 1.5 * 2^52: adding it rounds a small number to a whole one, which then stands in the lowest bits.
const WHOLE: f64 = 6_755_399_441_055_744.0;

/// ln 2 in two parts; the first has so few digits that its product with an exponent is exact.
const LN_2_HI: f64 = 0.693_147_180_369_123_8;
const LN_2_LO: f64 = 1.908_214_929_270_587_7e-10;

/// 1 / k! for k from 13 down to 2: past the last one no digit of e^r changes for |r| <= ln(2) / 2.
const INVERSE_FACTORIALS: [f64; 12] = [
    1.0 / 6_227_020_800.0,
    1.0 / 479_001_600.0,
    1.0 / 39_916_800.0,
    1.0 / 3_628_800.0,
    1.0 / 362_880.0,
    1.0 / 40_320.0,
    1.0 / 5_040.0,
    1.0 / 720.0,
    1.0 / 120.0,
    1.0 / 24.0,
    1.0 / 6.0,
    1.0 / 2.0,
];

/// 1 / k for k from 23 down to 3: past the last one no digit of ln m changes.
const INVERSE_ODDS: [f64; 11] = [
    1.0 / 23.0,
    1.0 / 21.0,
    1.0 / 19.0,
    1.0 / 17.0,
    1.0 / 15.0,
    1.0 / 13.0,
    1.0 / 11.0,
    1.0 / 9.0,
    1.0 / 7.0,
    1.0 / 5.0,
    1.0 / 3.0,
];

/// Below this e^x is taken for zero: it is 3e-308 there.
const LEAST: f64 = -708.0;

/// e^x for x <= 0, within a unit in the last place; NaN stays NaN.
#[inline(always)]
fn exp<const L: usize>(x: [f64; L]) -> [f64; L] {
    // x = n ln 2 + r, e^x = 2^n e^r
    let (mut r, mut power, mut tail) = ([0.0; L], [0.0; L], [INVERSE_FACTORIALS[0]; L]);
    for l in 0..L {
        let shifted = x[l] * LOG2_E + WHOLE;
        let n = shifted - WHOLE;
        r[l] = (x[l] - n * LN_2_HI) - n * LN_2_LO;
        power[l] = f64::from_bits(shifted.to_bits().wrapping_add(1023) << 52);
    }
    for k in 1..INVERSE_FACTORIALS.len() {
        for l in 0..L {
            tail[l] = tail[l] * r[l] + INVERSE_FACTORIALS[k];
        }
    }
    let mut y = [0.0; L];
    for l in 0..L {
        let value = (1.0 + (r[l] + r[l] * r[l] * tail[l])) * power[l];
        y[l] = if x[l] < LEAST { 0.0 } else { value };
    }
    y
}

/// The natural logarithm for x >= 1, within two units in the last place; infinity and NaN stay themselves.
#[inline(always)]
fn ln<const L: usize>(x: [f64; L]) -> [f64; L] {
    // x = 2^e m with m in [sqrt(1/2), sqrt(2)), ln m = 2 artanh((m - 1) / (m + 1))
    let (mut e, mut s, mut z, mut series) = ([0.0; L], [0.0; L], [0.0; L], [0.0; L]);
    for l in 0..L {
        let exponent = x[l].to_bits().wrapping_sub(FRAC_1_SQRT_2.to_bits()) >> 52;
        let m = f64::from_bits(x[l].to_bits().wrapping_sub(exponent << 52));
        e[l] = f64::from_bits(WHOLE.to_bits() + exponent) - WHOLE;
        s[l] = (m - 1.0) / (m + 1.0);
        z[l] = s[l] * s[l];
    }
    for inverse in INVERSE_ODDS {
        for l in 0..L {
            series[l] = (series[l] + inverse) * z[l];
        }
    }
    let mut y = [0.0; L];
    for l in 0..L {
        let value = e[l] * LN_2_HI + (2.0 * s[l] + (2.0 * s[l] * series[l] + e[l] * LN_2_LO));
        y[l] = if x[l] < f64::INFINITY { value } else { x[l] };
    }
    y
}

/// Numbers that are taken together; slices have a multiple of as many.
pub const GROUP: usize = 8;

/// Fills `y` with e^x, for x <= 0.
pub(crate) fn exps(level: Level, x: &[f64], y: &mut [f64]) {
    simd::enter(level, Exps { x, y });
}

/// Puts ln x in the place of x, for x >= 1.
pub(crate) fn lns(level: Level, x: &mut [f64]) {
    simd::enter(level, Lns { x });
}

/// A part of other kernels: it is not split.
struct Exps<'a> {
    x: &'a [f64],
    y: &'a mut [f64],
}

impl Kernel for Exps<'_> {
    type Out = ();

    fn bytes(&self) -> usize {
        size_of_val(self.x) + size_of_val(self.y)
    }

    fn halve(self) -> Result<(Self, Self), Self> {
        Err(self)
    }

    #[inline(always)]
    fn run(self, level: Level) {
        let Self { x, y } = self;
        if level.compact() {
            x.as_chunks::<2>().0.iter().zip(y.as_chunks_mut().0).for_each(|(x, y)| *y = exp(*x));
        } else {
            x.as_chunks::<GROUP>().0.iter().zip(y.as_chunks_mut().0).for_each(|(x, y)| *y = exp(*x));
        }
    }

    fn merge(_: (), _: ()) {}
}

/// A part of other kernels: it is not split.
struct Lns<'a> {
    x: &'a mut [f64],
}

impl Kernel for Lns<'_> {
    type Out = ();

    fn bytes(&self) -> usize {
        2 * size_of_val(self.x)
    }

    fn halve(self) -> Result<(Self, Self), Self> {
        Err(self)
    }

    #[inline(always)]
    fn run(self, level: Level) {
        if level.compact() {
            self.x.as_chunks_mut::<2>().0.iter_mut().for_each(|x| *x = ln(*x));
        } else {
            self.x.as_chunks_mut::<GROUP>().0.iter_mut().for_each(|x| *x = ln(*x));
        }
    }

    fn merge(_: (), _: ()) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many numbers lie between two of the same sign.
    fn apart(a: f64, b: f64) -> u64 {
        a.to_bits().abs_diff(b.to_bits())
    }

    #[test]
    fn both_follow_the_functions() {
        for i in 0..=1_000_000 {
            let x = -707.9 * (i as f64 / 1e6).powi(3);
            let ([y], exact) = (exp([x]), x.exp());
            assert!(apart(y, exact) <= 1, "exp {x}: {y:e}, not {exact:e}");
            let x = (i as f64 / 1e6 * 80.0).exp2();
            for x in [x, 1.0 + x * 1e-16, 1.0 + x * 1e-24] {
                let ([y], exact) = (ln([x]), x.ln());
                assert!(apart(y, exact) <= 2, "ln {x}: {y:e}, not {exact:e}");
            }
        }
    }

    #[test]
    fn at_the_ends() {
        assert_eq!(exp([0.0, -0.0, -709.0, f64::NEG_INFINITY]), [1.0, 1.0, 0.0, 0.0]);
        assert!(exp([f64::NAN])[0].is_nan());
        assert_eq!(ln([1.0, f64::INFINITY]), [0.0, f64::INFINITY]);
        assert!(ln([f64::NAN])[0].is_nan());
    }
}
