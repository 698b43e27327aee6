//! Arrays whose element type is known at run time only: what lies in memory as numbers of the arithmetic type `T`, or as
//! 16-bit ones that are widened into scratch and rounded back, a block at a time.

use crate::kernel::Kernel;
use crate::lanes::{LANES, LINE};
use crate::real::Real;
use crate::simd::{self, Level};
use crate::storage::Storage;
use half::{bf16, f16};
use std::hint::black_box;
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
        self.load(level, at, to);
        to
    }

    fn load(self, level: Level, at: Range<usize>, to: &mut [T]) {
        match self {
            Source::Real(x) => to.copy_from_slice(&x[at]),
            Source::F16(x) => simd::enter(level, Load { from: &x[at], to }),
            Source::Bf16(x) => simd::enter(level, Load { from: &x[at], to }),
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
        self.source().load(level, at, to);
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

/// `L` elements from `i` on, widened.
#[inline(always)]
fn widened<T: Real, S: Storage, const L: usize>(level: Level, from: &[S], i: usize) -> [T; L] {
    let x: [S::Real; L] = S::load_at(level, &from[i..i + L]);
    let mut to = [T::ZERO; L];
    for l in 0..L {
        to[l] = T::from_f64(x[l].to_f64());
    }
    to
}

/// Widens: `to = from`. Meanwhile memory fetches as many elements after them: the next ones that a step will want. A part of
/// other kernels: it is not split.
struct Load<'a, T, S> {
    from: &'a [S],
    to: &'a mut [T],
}

impl<T: Real, S: Storage> Kernel for Load<'_, T, S> {
    type Out = ();

    const TOP: Level = if size_of::<T>() == 4 { S::TOP } else { Level::Avx2 };

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
            if (i * size_of::<S>()).is_multiple_of(LINE) {
                simd::prefetch_at(from, n + i);
            }
            T::store(widened::<T, S, LANES>(level, from, i), &mut to[i..i + LANES]);
            i += LANES;
        }
        load_rest(&from[i..], &mut to[i..]);
    }

    fn merge(_: (), _: ()) {}
}

/// The few elements after the groups, or all at a compact level. Not inlined: one small copy serves every level.
#[inline(never)]
fn load_rest<T: Real, S: Storage>(from: &[S], to: &mut [T]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = T::from_f64(from.widen().to_f64());
    }
}

/// How far ahead memory is asked for the rows of a sum, in elements: there may be more rows than it foresees by itself.
const AHEAD: usize = 8 * LANES;

/// Adds up rows from an element on, the first row first. A part of other kernels: it is not split.
pub(crate) struct Sum<'a, 'b, T> {
    /// The rows, all of one length.
    pub rows: &'a [Stored<'b, T>],
    /// The first element of each.
    pub from: usize,
    /// The sums.
    pub to: &'a mut [T],
}

impl<T: Real> Sum<'_, '_, T> {
    #[inline(always)]
    fn group<const L: usize>(&mut self, level: Level, i: usize) {
        let (at, mut sum) = (self.from + i, [T::ZERO; L]);
        for row in self.rows {
            let x = match row {
                Stored::Real(x) => ahead_of::<T, T, L>(level, x, at),
                Stored::F16(x) => ahead_of(level, x, at),
                Stored::Bf16(x) => ahead_of(level, x, at),
            };
            for l in 0..L {
                sum[l] = sum[l] + x[l];
            }
        }
        T::store(sum, &mut self.to[i..i + L]);
    }

    /// See [`load_rest`].
    #[inline(never)]
    fn rest(&mut self, from: usize) {
        for i in from..self.to.len() {
            self.group::<1>(Level::Baseline, black_box(i));
        }
    }
}

#[inline(always)]
fn ahead_of<T: Real, S: Storage, const L: usize>(level: Level, x: &[S], i: usize) -> [T; L] {
    if L > 1 && i + AHEAD < x.len() {
        simd::prefetch(&x[i + AHEAD]);
    }
    widened(level, x, i)
}

impl<T: Real> Kernel for Sum<'_, '_, T> {
    type Out = ();

    fn bytes(&self) -> usize {
        size_of_val(self.to) * (1 + self.rows.len())
    }

    fn halve(self) -> Result<(Self, Self), Self> {
        Err(self)
    }

    #[inline(always)]
    fn run(mut self, level: Level) {
        let mut i = 0;
        while i + LANES <= self.to.len() && !level.compact() {
            self.group::<LANES>(level, i);
            i += LANES;
        }
        self.rest(i);
    }

    fn merge(_: (), _: ()) {}
}

/// Rounds: `to = from`. A part of other kernels: it is not split.
struct Store<'a, T, S> {
    from: &'a [T],
    to: &'a mut [S],
}

impl<T: Real, S: Storage> Kernel for Store<'_, T, S> {
    type Out = ();

    const TOP: Level = if size_of::<T>() == 4 { S::TOP } else { Level::Avx2 };

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
