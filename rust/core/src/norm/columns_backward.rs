//! Channels last, backward.

use super::columns::{ColumnSums, block_rows, cut, fold, repeat, scale};
use super::columns_write::{ROW, together};
use super::{Data, Shape, Sums, Upstream, centred, gradient, masked, start};
use crate::kernel::{Kernel, launch};
use crate::lanes::{Stores, map, map_whole};
use crate::real::Real;
use crate::simd::{self, Level};
use crate::storage::Storage;
use std::array::from_fn;

/// The gradients of beta and gamma of every column; the vectors are as long as a row.
struct Reduce<'a, S: Storage> {
    dy: &'a [S],
    x: &'a [S],
    residual: Option<&'a [S]>,
    relu: bool,
    vectors: [&'a [S::Real]; 5],
}

/// See [`super::backward_reduce`].
pub(super) fn reduce<S: Storage>(up: Upstream<'_, S>) -> Sums {
    reduce_by(up, false)
}

/// The same, `alone` on this thread.
pub(super) fn reduce_by<S: Storage>(up: Upstream<'_, S>, alone: bool) -> Sums {
    let Upstream { dy, data: Data { x, shape: Shape { outer, channels, .. }, .. }, affine, residual, relu } = up;
    let fold = fold(channels, 64);
    let scale = scale(&affine);
    let once = [affine.hi, affine.lo, affine.rstd, &scale, affine.beta];
    let at = outer / fold * fold * channels;
    let vectors = once.map(|v| repeat(v, fold));
    let kernel = |part: std::ops::Range<usize>, vectors| Reduce {
        dy: &dy[part.clone()],
        x: &x[part.clone()],
        residual: residual.map(|r| &r[part]),
        relu,
        vectors,
    };
    let folded = start(alone, kernel(0..at, from_fn(|k| &*vectors[k])));
    if fold == 1 {
        return folded;
    }
    let mut all = simd::run(kernel(at..x.len(), once));
    for c in 0..channels * fold {
        all.dy[c % channels] += folded.dy[c];
        all.dy_xhat[c % channels] += folded.dy_xhat[c];
    }
    all
}

impl<S: Storage> Kernel for Reduce<'_, S> {
    type Out = Sums;

    const TOP: Level = S::TOP;

    fn bytes(&self) -> usize {
        size_of_val(self.dy) + size_of_val(self.x) + self.residual.map_or(0, size_of_val)
    }

    fn halve(self) -> Result<(Self, Self), Self> {
        let width = self.vectors[0].len();
        let Some(at) = cut(self.x.len(), width, block_rows(width)) else { return Err(self) };
        let (dy, x) = (self.dy.split_at(at), self.x.split_at(at));
        let residual = self.residual.map(|r| r.split_at(at));
        let left = Self { dy: dy.0, x: x.0, residual: residual.map(|r| r.0), ..self };
        Ok((left, Self { dy: dy.1, x: x.1, residual: residual.map(|r| r.1), ..self }))
    }

    #[inline(always)]
    fn run(self, level: Level) -> Sums {
        let [hi, lo, rstd, ..] = self.vectors;
        let mut sums = ColumnSums::<S::Real, 2>::new(hi.len()).fetching(self.x);
        if hi.is_empty() {
            return Sums::zero(0, 0);
        }
        match (self.relu, self.residual) {
            (false, _) => {
                sums.add(level, [self.dy, self.x], [hi, lo, rstd], None, move |[dy, x], [hi, lo, rstd], _| {
                    [dy, dy * (centred(x, hi, lo) * rstd)]
                })
            }
            (true, None) => {
                sums.add(
                    level,
                    [self.dy, self.x],
                    self.vectors,
                    None,
                    move |[dy, x], [hi, lo, rstd, scale, beta], _| {
                        let d = centred(x, hi, lo);
                        let dz = masked(dy, d * scale + beta);
                        [dz, dz * (d * rstd)]
                    },
                );
            }
            (true, Some(r)) => {
                sums.add(
                    level,
                    [self.dy, self.x, r],
                    self.vectors,
                    None,
                    |[dy, x, r], [hi, lo, rstd, scale, beta], _| {
                        let d = centred(x, hi, lo);
                        let dz = masked(dy, d * scale + beta + r);
                        [dz, dz * (d * rstd)]
                    },
                );
            }
        }
        let [dy, dy_xhat] = sums.wide;
        Sums { first: 0, dy, dy_xhat }
    }

    fn merge(left: Sums, right: Sums) -> Sums {
        left.merge(right)
    }
}

/// The gradient of x; the vectors are as long as a row.
struct Apply<'a, S: Storage> {
    dy: &'a [S],
    x: &'a [S],
    residual: Option<&'a [S]>,
    weights: Option<&'a [S::Real]>,
    relu: bool,
    vectors: [&'a [S::Real]; 6],
    stores: Stores,
    dx: &'a mut [S],
    dresidual: Option<&'a mut [S]>,
}

/// See [`super::backward_apply`], which checks the lengths.
pub(super) fn apply<S: Storage>(
    up: Upstream<'_, S>,
    mean_dy: &[S::Real],
    slope: &[S::Real],
    dx: &mut [S],
    dresidual: Option<&mut [S]>,
) {
    let Upstream { dy, data: Data { x, weights, shape }, affine, residual, relu } = up;
    // A row of several positions would need several weights.
    let times = if weights.is_some() { 1 } else { fold(shape.channels, ROW.min(shape.len())) };
    let scale = scale(&affine);
    let vectors = [affine.hi, affine.lo, &scale, affine.beta, mean_dy, slope].map(|v| repeat(v, times));
    let vectors = from_fn(|k| &*vectors[k]);
    let stores = Stores::joined(dx, shape.channels * times, 2);
    launch(Apply { dy, x, residual, weights, relu, vectors, stores, dx, dresidual });
}

impl<S: Storage> Kernel for Apply<'_, S> {
    type Out = ();

    const TOP: Level = S::TOP;

    fn bytes(&self) -> usize {
        size_of_val(self.dx) * if self.dresidual.is_some() { 5 } else { 3 }
    }

    fn halve(self) -> Result<(Self, Self), Self> {
        let width = self.vectors[0].len();
        let Some(at) = cut(self.dx.len(), width, 1) else { return Err(self) };
        let (dy, x, dx) = (self.dy.split_at(at), self.x.split_at(at), self.dx.split_at_mut(at));
        let residual = self.residual.map(|r| r.split_at(at)).unzip();
        let weights = self.weights.map(|w| w.split_at(at / width)).unzip();
        let dresidual = self.dresidual.map(|d| d.split_at_mut(at)).unzip();
        let Self { relu, vectors, stores, .. } = self;
        Ok((
            Self {
                dy: dy.0,
                x: x.0,
                residual: residual.0,
                weights: weights.0,
                dx: dx.0,
                dresidual: dresidual.0,
                relu,
                vectors,
                stores,
            },
            Self {
                dy: dy.1,
                x: x.1,
                residual: residual.1,
                weights: weights.1,
                dx: dx.1,
                dresidual: dresidual.1,
                relu,
                vectors,
                stores,
            },
        ))
    }

    #[inline(always)]
    fn run(self, level: Level) {
        let Self { relu, vectors, stores, mut dresidual, .. } = self;
        let width = vectors[0].len().max(1);
        let linear = move |[dy, x]: [S::Real; 2], [hi, lo, scale, _, mean_dy, slope]: [S::Real; 6]| {
            [gradient(dy, centred(x, hi, lo), scale, mean_dy, slope)]
        };
        let rectified = move |[dy, x]: [S::Real; 2], [hi, lo, scale, beta, mean_dy, slope]: [S::Real; 6]| {
            let d = centred(x, hi, lo);
            [gradient(masked(dy, d * scale + beta), d, scale, mean_dy, slope)]
        };
        let mut first = 0;
        if self.weights.is_none() && self.residual.is_none() && together(level, stores, self.dx, width) {
            let two = 2 * width;
            for ((dy, x), dx) in
                self.dy.chunks_exact(two).zip(self.x.chunks_exact(two)).zip(self.dx.chunks_exact_mut(two))
            {
                let ((a, b), (c, d), (p, q)) = (dy.split_at(width), x.split_at(width), dx.split_at_mut(width));
                map_whole(level, [a, b, c, d], vectors, [p, q], stores, move |[a, b, c, d], v| {
                    let (f, g) = if relu {
                        (rectified([a, c], v), rectified([b, d], v))
                    } else {
                        (linear([a, c], v), linear([b, d], v))
                    };
                    [f[0], g[0]]
                });
                first += 2;
            }
        }
        for (r, dx) in (first..).zip(self.dx[first * width..].chunks_mut(width)) {
            let at = r * width..r * width + dx.len();
            let (dy, x) = (&self.dy[at.clone()], &self.x[at.clone()]);
            let w = self.weights.map_or(S::Real::ONE, |w| w[r]);
            let residual = self.residual.map(|r| &r[at.clone()]);
            let weighted = move |[hi, lo, scale, beta, mean_dy, slope]: [S::Real; 6]| {
                [hi, lo, scale, beta, mean_dy * w, slope * w]
            };
            match (relu, residual.zip(dresidual.as_deref_mut())) {
                (false, _) => map(level, [dy, x], vectors, [dx], stores, [], move |x, v| linear(x, weighted(v))),
                (true, None) => map(level, [dy, x], vectors, [dx], stores, [], move |x, v| rectified(x, weighted(v))),
                (true, Some((r, dr))) => {
                    let out = [dx, &mut dr[at]];
                    map(
                        level,
                        [dy, x, r],
                        vectors,
                        out,
                        stores,
                        [],
                        |[dy, x, r], [hi, lo, scale, beta, mean_dy, slope]| {
                            let d = centred(x, hi, lo);
                            let dz = masked(dy, d * scale + beta + r);
                            [gradient(dz, d, scale, mean_dy * w, slope * w), dz]
                        },
                    );
                }
            }
        }
    }

    fn merge(_: (), _: ()) {}
}
