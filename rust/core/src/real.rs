//! The arithmetic that a kernel may use.

use crate::storage::Storage;
use std::fmt::Debug;
use std::ops::{Add, Div, Mul, Neg, Sub};

/// A number type that kernels compute in: f32 or f64.
///
/// Only operations that IEEE 754 rounds once, on every CPU, are offered. There is no fused multiply-add (without the
/// feature it is a library call, and with it the bits differ), no `min` or `max` (they lose NaN: write `if a > b`)
/// and nothing from libm.
pub trait Real:
    Storage<Real = Self>
    + Debug
    + PartialOrd
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
{
    /// 0.
    const ZERO: Self;
    /// 1.
    const ONE: Self;
    /// State smaller than this is flushed to zero long before it becomes subnormal.
    const TINY: Self;
    /// The nearest value.
    fn from_f64(x: f64) -> Self;
    /// The variate as this type, exactly.
    fn from_f32(x: f32) -> Self;
    /// The same value in f64, exactly.
    fn to_f64(self) -> f64;
    /// The square root, rounded once.
    fn sqrt(self) -> Self;
    /// The absolute value.
    fn abs(self) -> Self;
    /// False for infinities and NaN.
    fn is_finite(self) -> bool;
}

macro_rules! real {
    ($t:ty, $tiny:literal) => {
        impl Real for $t {
            const ZERO: Self = 0.0;
            const ONE: Self = 1.0;
            const TINY: Self = $tiny;
            #[inline(always)]
            fn from_f64(x: f64) -> Self {
                x as $t
            }
            #[inline(always)]
            fn from_f32(x: f32) -> Self {
                x as $t
            }
            #[inline(always)]
            fn to_f64(self) -> f64 {
                self as f64
            }
            #[inline(always)]
            fn sqrt(self) -> Self {
                <$t>::sqrt(self)
            }
            #[inline(always)]
            fn abs(self) -> Self {
                <$t>::abs(self)
            }
            #[inline(always)]
            fn is_finite(self) -> bool {
                <$t>::is_finite(self)
            }
        }
    };
}

real!(f32, 1e-30);
real!(f64, 1e-290);

/// `x` as a value of the arithmetic type and the rest that it loses: `x = hi + lo` to about twice its digits.
pub fn split<R: Real>(x: f64) -> (R, R) {
    let hi = R::from_f64(x);
    // An infinite or NaN mean must not turn its rest into a second NaN source.
    let lo = if hi.is_finite() { R::from_f64(x - hi.to_f64()) } else { R::ZERO };
    (hi, lo)
}
