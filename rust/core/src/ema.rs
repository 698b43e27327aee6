//! Exponential moving averages: `s <- s + m (x - s)`, where m is the weight of the new value.

use crate::error::{Error, length};
use crate::kernel::{Kernel, launch};
use crate::lanes::LANES;
use crate::real::Real;
use crate::simd::Level;
use crate::storage::Storage;

/// One step of an average, in float64.
#[inline(always)]
pub fn mix<R: Real>(s: R, x: f64, momentum: f64) -> R {
    let s = s.to_f64();
    R::from_f64(s + momentum * (x - s))
}

/// Moves every element of `s` towards that of `x`.
pub struct Ema<'a, S: Storage> {
    s: &'a mut [S::Real],
    x: &'a [S],
    momentum: S::Real,
}

impl<'a, S: Storage> Ema<'a, S> {
    /// Checks the lengths.
    pub fn new(s: &'a mut [S::Real], x: &'a [S], momentum: f64) -> Result<Self, Error> {
        length("x", x, s.len())?;
        Ok(Self { s, x, momentum: S::Real::from_f64(momentum) })
    }

    /// Launches the kernel.
    pub fn launch(self) {
        launch(self);
    }
}

impl<S: Storage> Kernel for Ema<'_, S> {
    type Out = ();

    fn bytes(&self) -> usize {
        2 * size_of_val(self.s) + size_of_val(self.x)
    }

    fn halve(self) -> Result<(Self, Self), Self> {
        let at = self.s.len() / 2 / LANES * LANES;
        if at == 0 {
            return Err(self);
        }
        let momentum = self.momentum;
        let (s, x) = (self.s.split_at_mut(at), self.x.split_at(at));
        Ok((Self { s: s.0, x: x.0, momentum }, Self { s: s.1, x: x.1, momentum }))
    }

    #[inline(always)]
    fn run(self, _: Level) {
        let x = &self.x[..self.s.len()];
        for i in 0..self.s.len() {
            self.s[i] = self.s[i] + self.momentum * (x[i].widen() - self.s[i]);
        }
    }

    fn merge(_: (), _: ()) {}
}
