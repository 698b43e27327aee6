//! Arrays whose element type is known at run time only: what lies in memory as numbers of the arithmetic type `T`, or as
//! 16-bit ones that are widened into scratch and rounded back, a block at a time.

use crate::kernel::Kernel;
use crate::lanes::LANES;
use crate::real::Real;
use crate::simd::{self, Level};
use crate::storage::Storage;
use half::{bf16, f16};
use std::ops::Range;

/// An array that is read. The 16-bit ones have the arithmetic of f32.
#[derive(Debug, Clone, Copy)]
pub enum Source<'a, T> {
    /// Numbers of the arithmetic type.
    Real(&'a [T]),
    /// Halves.
    F16(&'a [f16]),
    /// Bfloats.
    Bf16(&'a [bf16]),
}

/// An array that is written.
#[derive(Debug)]
pub enum Stored<'a, T> {
    /// Numbers of the arithmetic type.
    Real(&'a mut [T]),
    /// Halves.
    F16(&'a mut [f16]),
    /// Bfloats.
    Bf16(&'a mut [bf16]),
}

impl<'a, T: Real> Source<'a, T> {
    /// The number of elements.
    pub fn len(self) -> usize {
        match self {
            Source::Real(x) => x.len(),
            Source::F16(x) => x.len(),
            Source::Bf16(x) => x.len(),
        }
    }

    /// Whether there are no elements.
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }

    /// Bytes of an element.
    pub fn width(self) -> usize {
        if self.is_real() { size_of::<T>() } else { 2 }
    }

    /// Whether kernels read the elements where they lie.
    pub fn is_real(self) -> bool {
        matches!(self, Source::Real(_))
    }

    /// The elements before `at` and the others.
    pub fn split_at(self, at: usize) -> (Self, Self) {
        match self {
            Source::Real(x) => pair(x.split_at(at), Source::Real),
            Source::F16(x) => pair(x.split_at(at), Source::F16),
            Source::Bf16(x) => pair(x.split_at(at), Source::Bf16),
        }
    }

    /// Some elements, widened into `scratch` where that is needed.
    pub fn read<'s>(self, level: Level, at: Range<usize>, scratch: &'s mut [T]) -> &'s [T]
    where
        'a: 's,
    {
        if let Source::Real(x) = self {
            return &x[at];
        }
        let to = &mut scratch[..at.len()];
        self.load(level, at, to, false);
        to
    }

    /// Adds some elements to `to`.
    pub fn add(self, level: Level, at: Range<usize>, to: &mut [T]) {
        self.load(level, at, to, true);
    }

    fn load(self, level: Level, at: Range<usize>, to: &mut [T], add: bool) {
        match self {
            Source::Real(x) => simd::enter(level, Load { from: &x[at], to, add }),
            Source::F16(x) => simd::enter(level, Load { from: &x[at], to, add }),
            Source::Bf16(x) => simd::enter(level, Load { from: &x[at], to, add }),
        }
    }
}

impl<'a, T: Real> Stored<'a, T> {
    /// The same elements, to be read.
    pub fn source(&self) -> Source<'_, T> {
        match self {
            Stored::Real(x) => Source::Real(x),
            Stored::F16(x) => Source::F16(x),
            Stored::Bf16(x) => Source::Bf16(x),
        }
    }

    /// The elements before `at` and the others.
    pub fn split_at(self, at: usize) -> (Self, Self) {
        match self {
            Stored::Real(x) => pair(x.split_at_mut(at), Stored::Real),
            Stored::F16(x) => pair(x.split_at_mut(at), Stored::F16),
            Stored::Bf16(x) => pair(x.split_at_mut(at), Stored::Bf16),
        }
    }

    /// Some elements, to be changed: in place, or widened into `scratch` until they are [closed](Stored::close).
    pub fn open<'s>(&'s mut self, level: Level, at: Range<usize>, scratch: &'s mut [T]) -> &'s mut [T] {
        if let Stored::Real(x) = self {
            return &mut x[at];
        }
        let to = &mut scratch[..at.len()];
        self.source().load(level, at, to, false);
        to
    }

    /// Rounds the opened elements back from `scratch` where they are not changed in place.
    pub fn close(&mut self, level: Level, at: Range<usize>, scratch: &[T]) {
        if !self.source().is_real() {
            self.write(level, at.clone(), &scratch[..at.len()]);
        }
    }

    /// Writes `values`, rounded to nearest even.
    pub fn write(&mut self, level: Level, at: Range<usize>, values: &[T]) {
        match self {
            Stored::Real(x) => x[at].copy_from_slice(values),
            Stored::F16(x) => simd::enter(level, Store { from: values, to: &mut x[at] }),
            Stored::Bf16(x) => simd::enter(level, Store { from: values, to: &mut x[at] }),
        }
    }
}

fn pair<A, B>((left, right): (A, A), wrap: impl Fn(A) -> B) -> (B, B) {
    (wrap(left), wrap(right))
}

/// Widens: `to = from`, or `to = to + from` with `add`. A part of other kernels: it is not split.
struct Load<'a, T, S> {
    from: &'a [S],
    to: &'a mut [T],
    add: bool,
}

impl<T: Real, S: Storage> Kernel for Load<'_, T, S> {
    type Out = ();

    fn bytes(&self) -> usize {
        size_of_val(self.from)
    }

    fn halve(self) -> Result<(Self, Self), Self> {
        Err(self)
    }

    #[inline(always)]
    fn run(self, level: Level) {
        let n = self.from.len();
        let (from, to) = (self.from, &mut self.to[..n]);
        let mut i = 0;
        while i + LANES <= n && !level.compact() {
            let x: [S::Real; LANES] = S::load_at(level, &from[i..i + LANES]);
            let mut sum = [T::ZERO; LANES];
            for l in 0..LANES {
                sum[l] = T::from_f64(x[l].to_f64());
            }
            if self.add {
                let before: [T; LANES] = T::load(&to[i..i + LANES]);
                for l in 0..LANES {
                    sum[l] = before[l] + sum[l];
                }
            }
            T::store(sum, &mut to[i..i + LANES]);
            i += LANES;
        }
        load_rest(&from[i..], &mut to[i..], self.add);
    }

    fn merge(_: (), _: ()) {}
}

/// The few elements after the groups, or all at a compact level. Not inlined: one small copy serves every level.
#[inline(never)]
fn load_rest<T: Real, S: Storage>(from: &[S], to: &mut [T], add: bool) {
    for (to, from) in to.iter_mut().zip(from) {
        let x = T::from_f64(from.widen().to_f64());
        *to = if add { *to + x } else { x };
    }
}

/// Rounds: `to = from`. A part of other kernels: it is not split.
struct Store<'a, T, S> {
    from: &'a [T],
    to: &'a mut [S],
}

impl<T: Real, S: Storage> Kernel for Store<'_, T, S> {
    type Out = ();

    fn bytes(&self) -> usize {
        size_of_val(self.to)
    }

    fn halve(self) -> Result<(Self, Self), Self> {
        Err(self)
    }

    #[inline(always)]
    fn run(self, level: Level) {
        let n = self.from.len();
        let to = &mut self.to[..n];
        let mut i = 0;
        while i + LANES <= n && !level.compact() {
            let x: [T; LANES] = T::load(&self.from[i..i + LANES]);
            let mut values = [S::Real::ZERO; LANES];
            for l in 0..LANES {
                values[l] = S::Real::from_f64(x[l].to_f64());
            }
            S::store_at(level, values, &mut to[i..i + LANES]);
            i += LANES;
        }
        store_rest(&self.from[i..], &mut to[i..]);
    }

    fn merge(_: (), _: ()) {}
}

/// See [`load_rest`].
#[inline(never)]
fn store_rest<T: Real, S: Storage>(from: &[T], to: &mut [S]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = S::narrow(S::Real::from_f64(from.to_f64()));
    }
}
