//! Small planes, 7x7 and the like: the array is seen as a matrix with one row per sample. Its columns are summed side by
//! side, and those of a channel merged at the end; its rows are written with vectors of one value per column.

use super::{Affine, Data, Shape, Sums, Upstream};
use crate::moments::{Channels, Moments};
use crate::real::Real;
use crate::storage::Storage;

/// Planes of more elements than this are long enough by themselves.
const INNER: usize = 64;

/// Fewer rows than this do not pay for the longer vectors.
const OUTER: usize = 16;

/// The matrix, where planes are small.
pub(super) fn matrix(shape: Shape) -> Option<Shape> {
    let small = (2..=INNER).contains(&shape.inner) && shape.outer >= OUTER;
    small.then(|| Shape { channels: shape.channels * shape.inner, inner: 1, ..shape })
}

/// Each value `inner` times.
pub(super) fn spread<R: Real>(values: &[R], inner: usize) -> Vec<R> {
    let mut all = vec![R::ZERO; values.len() * inner];
    for (to, value) in all.chunks_exact_mut(inner).zip(values) {
        to.fill(*value);
    }
    all
}

/// The vectors of an [`Affine`], one value per column.
pub(super) struct Vectors<R>([Vec<R>; 5]);

impl<R: Real> Vectors<R> {
    pub(super) fn new(affine: Affine<'_, R>, inner: usize) -> Self {
        let Affine { hi, lo, rstd, gamma, beta } = affine;
        Self([hi, lo, rstd, gamma, beta].map(|values| spread(values, inner)))
    }

    pub(super) fn affine(&self) -> Affine<'_, R> {
        let [hi, lo, rstd, gamma, beta] = &self.0;
        Affine { hi, lo, rstd, gamma, beta }
    }
}

/// The same pass with one channel per column; `vectors` are [`Vectors`] of its affine.
pub(super) fn upstream<'a, S: Storage>(
    up: Upstream<'a, S>,
    matrix: Shape,
    vectors: &'a Vectors<S::Real>,
) -> Upstream<'a, S> {
    Upstream { data: Data { shape: matrix, ..up.data }, affine: vectors.affine(), ..up }
}

/// The moments of channels from those of their columns.
pub(super) fn channels(columns: &Channels, inner: usize) -> Channels {
    let count = columns.count;
    let of = |c: usize| Moments { count, mean: columns.mean[c], m2: columns.m2[c] };
    let mut all = Channels { count: count * inner as f64, ..Channels::default() };
    for first in (0..columns.mean.len()).step_by(inner) {
        let moments = (first..first + inner).map(of).fold(Moments::default(), Moments::merge);
        all.mean.push(moments.mean);
        all.m2.push(moments.m2);
    }
    all
}

/// The sums of channels from those of their columns.
pub(super) fn sums(columns: &Sums, inner: usize) -> Sums {
    let add = |sums: &[f64]| sums.chunks_exact(inner).map(|columns| columns.iter().sum()).collect();
    Sums { first: 0, dy: add(&columns.dy), dy_xhat: add(&columns.dy_xhat) }
}
