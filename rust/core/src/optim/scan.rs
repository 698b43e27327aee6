//! One reading of all gradients before a step: their norm, and whether they are finite.

use super::{BLOCK, before};
use crate::kernel::Kernel;
use crate::lanes::{LANES, steps};
use crate::real::Real;
use crate::simd::Level;
use crate::stored::Source;
use std::hint::black_box;

/// What [`Scan`] found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scanned {
    /// The sum of all squares.
    pub squares: f64,
    /// Whether every element is finite.
    pub finite: bool,
}

/// Reads gradients once: the sum of their squares in float64, and whether all are finite. The two are separate: finite
/// gradients may have squares that are not.
pub struct Scan<'a, T> {
    tensors: Vec<Source<'a, T>>,
    len: usize,
    width: usize,
}

impl<'a, T: Real> Scan<'a, T> {
    /// Over all tensors.
    pub fn new(tensors: Vec<Source<'a, T>>) -> Self {
        let len = tensors.iter().map(|g| g.len()).sum();
        let width = tensors.iter().map(|g| g.width()).min().unwrap_or(1);
        Self { tensors, len, width }
    }
}

impl<T: Real> Kernel for Scan<'_, T> {
    type Out = Scanned;

    fn bytes(&self) -> usize {
        self.len * self.width
    }

    fn halve(self) -> Result<(Self, Self), Self> {
        let at = self.len / 2 / LANES * LANES;
        if at == 0 {
            return Err(self);
        }
        let (k, elements) = before(at, self.tensors.iter().map(|g| g.len()));
        let mut left = self.tensors;
        let mut right = left.split_off(k);
        if elements < at {
            let (l, r) = right[0].split_at(at - elements);
            left.push(l);
            right[0] = r;
        }
        let width = self.width;
        Ok((Self { tensors: left, len: at, width }, Self { tensors: right, len: self.len - at, width }))
    }

    #[inline(always)]
    fn run(self, level: Level) -> Scanned {
        let mut lanes = Lanes { squares: [0.0; LANES], bad: [T::ZERO; LANES] };
        let mut scratch = if self.tensors.iter().all(|g| g.is_real()) { vec![] } else { vec![T::ZERO; BLOCK] };
        for g in self.tensors {
            for at in steps(0..g.len(), BLOCK) {
                lanes.add(level, g.read(level, at, &mut scratch));
            }
        }
        let mut all = Scanned { squares: 0.0, finite: true };
        for l in 0..LANES {
            all.squares += lanes.squares[l];
            all.finite &= lanes.bad[l] == T::ZERO;
        }
        all
    }

    fn merge(left: Scanned, right: Scanned) -> Scanned {
        Scanned { squares: left.squares + right.squares, finite: left.finite && right.finite }
    }
}

/// Sums of lanes.
struct Lanes<T> {
    squares: [f64; LANES],
    /// Sums of x * 0, which is 0 where x is finite and NaN where it is not.
    bad: [T; LANES],
}

impl<T: Real> Lanes<T> {
    #[inline(always)]
    fn add(&mut self, level: Level, x: &[T]) {
        let whole = if level.compact() { 0 } else { x.len() / LANES * LANES };
        let (mut squares, mut bad) = (self.squares, self.bad);
        // Two passes, the second over what the first left in cache: together they do not become wide instructions.
        for x in x[..whole].chunks_exact(LANES) {
            for l in 0..LANES {
                squares[l] += x[l].to_f64() * x[l].to_f64();
            }
        }
        for x in x[..whole].chunks_exact(LANES) {
            for l in 0..LANES {
                bad[l] = bad[l] + x[l] * T::ZERO;
            }
        }
        (self.squares, self.bad) = (squares, bad);
        self.rest(&x[whole..]);
    }

    /// The few elements after the groups, or all at a compact level. Not inlined: one small copy serves every level.
    #[inline(never)]
    fn rest(&mut self, x: &[T]) {
        for i in 0..x.len() {
            let (x, l) = (x[black_box(i)], i % LANES);
            self.squares[l] += x.to_f64() * x.to_f64();
            self.bad[l] = self.bad[l] + x * T::ZERO;
        }
    }
}
