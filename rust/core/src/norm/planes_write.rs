//! Channels first: the normalised array, from what [`super::planes`] found.

use super::region::{Walk, cut, pieces};
use super::{Affine, Shape, centred, floor, floored};
use crate::kernel::{Kernel, launch};
use crate::lanes::{Stores, map};
use crate::simd::{self, Level};
use crate::storage::Storage;
use std::ops::Range;

/// Writes `y` for a run of channel c.
#[inline(always)]
fn normalise<S: Storage>(
    level: Level,
    x: &[S],
    residual: Option<&[S]>,
    [hi, lo, rstd, gamma, beta]: [S::Real; 5],
    floor: S::Real,
    y: &mut [S],
    stores: Stores,
    ahead: &[S],
) {
    let scale = gamma * rstd;
    match residual {
        None => map(level, [x], [], [y], stores, [ahead], move |[x], []| {
            [floored(centred(x, hi, lo) * scale + beta, floor)]
        }),
        Some(r) => map(level, [x, r], [], [y], stores, [ahead], move |[x, r], []| {
            [floored(centred(x, hi, lo) * scale + beta + r, floor)]
        }),
    }
}

/// The normalised array: elements `start..start + y.len()`.
struct Apply<'a, S: Storage> {
    walk: Walk<'a, S>,
    affine: Affine<'a, S::Real>,
    floor: S::Real,
    shape: Shape,
    start: usize,
    stores: Stores,
}

/// See [`super::apply`], which checks the lengths.
pub(super) fn apply<S: Storage>(
    x: &[S],
    shape: Shape,
    affine: Affine<'_, S::Real>,
    residual: Option<&[S]>,
    relu: bool,
    y: &mut [S],
) {
    let stores = Stores::joined(y, shape.inner, 1);
    launch(Apply { walk: Walk { x, residual, y }, affine, floor: floor(relu), shape, start: 0, stores });
}

impl<S: Storage> Kernel for Apply<'_, S> {
    type Out = ();

    const TOP: Level = S::TOP;

    fn bytes(&self) -> usize {
        self.walk.bytes()
    }

    fn halve(self) -> Result<(Self, Self), Self> {
        let Some(at) = cut(self.walk.y.len()) else { return Err(self) };
        let (left, right) = self.walk.split_at(at);
        Ok((Self { walk: left, ..self }, Self { walk: right, start: self.start + at, ..self }))
    }

    #[inline(always)]
    fn run(self, level: Level) {
        let Self { walk: Walk { x, residual, y }, affine, floor, shape, start, stores } = self;
        // What it reads starts where it writes.
        let write = Write {
            x,
            residual,
            affine,
            first: 0,
            floor,
            shape,
            start,
            from: start,
            stores,
            channels: 0,
            step: 0,
            end: 0,
            y: vec![y],
        };
        simd::enter(level, write);
    }

    fn merge(_: (), _: ()) {}
}

/// The normalised array: one run of memory per sample. A part of other kernels: it is not split.
pub(super) struct Write<'a, S: Storage> {
    /// The array from element `from` on.
    pub(super) x: &'a [S],
    pub(super) residual: Option<&'a [S]>,
    pub(super) from: usize,
    /// Of the channels from `first` on.
    pub(super) affine: Affine<'a, S::Real>,
    pub(super) first: usize,
    pub(super) floor: S::Real,
    pub(super) shape: Shape,
    /// Where the run of the first sample starts in the array, and how many whole channels it has.
    pub(super) start: usize,
    pub(super) channels: usize,
    pub(super) stores: Stores,
    /// Memory meanwhile fetches the channel so many further on, if that is before `end`.
    pub(super) step: usize,
    pub(super) end: usize,
    pub(super) y: Vec<&'a mut [S]>,
}

impl<S: Storage> Write<'_, S> {
    /// Writes the places `at` of the array, in sample n and channel `first + t`.
    #[inline(always)]
    fn run_of(&mut self, level: Level, n: usize, t: usize, at: Range<usize>, ahead: &[S]) {
        let start = self.start + n * self.shape.channels * self.shape.inner;
        let y = &mut self.y[n][at.start - start..at.end - start];
        let at = at.start - self.from..at.end - self.from;
        let residual = self.residual.map(|r| &r[at.clone()]);
        normalise(level, &self.x[at], residual, self.affine.one(t), self.floor, y, self.stores, ahead);
    }

    /// Writes the places `inner` of sample n and channel `first + t`, where each run starts with a whole channel.
    #[inline(always)]
    pub(super) fn turn(&mut self, level: Level, n: usize, t: usize, inner: &Range<usize>, ahead: &[S]) {
        let plane = self.start + (n * self.shape.channels + t) * self.shape.inner;
        self.run_of(level, n, t, plane + inner.start..plane + inner.end, ahead);
    }
}

impl<S: Storage> Kernel for Write<'_, S> {
    type Out = ();

    const TOP: Level = S::TOP;

    fn bytes(&self) -> usize {
        2 * self.y.iter().map(|y| size_of_val(*y)).sum::<usize>()
    }

    fn halve(self) -> Result<(Self, Self), Self> {
        Err(self)
    }

    #[inline(always)]
    fn run(mut self, level: Level) {
        let Shape { channels, inner, .. } = self.shape;
        for n in 0..self.y.len() {
            let start = self.start + n * channels * inner;
            for (c, run) in pieces(self.shape, start, self.y[n].len()) {
                let at = start + run.start..start + run.end;
                let next = at.start + self.step * inner - self.from..at.end + self.step * inner - self.from;
                let ahead = if c + self.step < self.end { &self.x[next] } else { &[] };
                self.run_of(level, n, c - self.first, at, ahead);
            }
        }
    }

    fn merge(_: (), _: ()) {}
}
