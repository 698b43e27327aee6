//! Group norm, backward.
//!
//! With the sums of dy and dy * x̂ over the places of each channel of each sample, weighed by gamma and added over a
//! group, `dx = rstd * (dy * gamma - c1 - x̂ * c2)`; added over the samples, they are the gradients of beta and gamma.

use super::columns::{self, CHAIN, ColumnSums, repeat};
use super::columns_write;
use super::groups::{Grouped, Run, per_channel, runs, saved};
use super::region::cut;
use super::{
    Affine, Data, Shape, Sums, Upstream, centred, columns_backward, gradient, mean_dy, planes_backward, rows, slope,
    small, start,
};
use crate::error::{Error, length};
use crate::kernel::{Kernel, launch};
use crate::lanes::{Stores, map, map_add, steps};
use crate::real::Real;
use crate::simd::Level;
use crate::storage::Storage;
use crate::sum::Sum;
use std::array::from_fn;
use std::ops::Range;

/// Chunks of up to this many bytes of both arrays are fetched while the one before is written.
const AHEAD_BYTES: usize = 384 << 10;

/// What a backward pass reads: the upstream gradient, and what the forward had.
#[derive(Clone, Copy)]
pub struct Reads<'a, S: Storage> {
    /// The upstream gradient.
    pub dy: &'a [S],
    /// The data.
    pub x: &'a [S],
    /// One value per channel.
    pub gamma: &'a [S::Real],
    /// The mean of each group.
    pub mean: &'a [f64],
    /// The centred second moment of each group.
    pub m2: &'a [f64],
    /// Added to the variance, inside the root.
    pub eps: f64,
}

impl<S: Storage> Reads<'_, S> {
    /// The first `at` groups, of `count` elements each, and the others.
    fn split(self, at: usize, count: usize) -> (Self, Self) {
        let (dy, x) = (self.dy.split_at(at * count), self.x.split_at(at * count));
        let (mean, m2) = (self.mean.split_at(at), self.m2.split_at(at));
        let left = Self { dy: dy.0, x: x.0, mean: mean.0, m2: m2.0, ..self };
        (left, Self { dy: dy.1, x: x.1, mean: mean.1, m2: m2.1, ..self })
    }
}

/// Writes the gradient of x, and hands back those of beta and gamma.
pub fn backward<S: Storage>(reads: Reads<'_, S>, shape: Grouped, dx: &mut [S]) -> Result<Sums, Error> {
    for (name, slice) in [("dy", reads.dy), ("x", reads.x), ("dx", &*dx)] {
        length(name, slice, shape.len())?;
    }
    length("gamma", reads.gamma, shape.channels())?;
    for (name, slice) in [("mean", reads.mean), ("m2", reads.m2)] {
        length(name, slice, shape.groups())?;
    }
    if shape.is_empty() {
        return Ok(Sums::zero(0, shape.channels()));
    }
    let (stores, alone, gamma) = (shape.stores(dx, 2), shape.alone(2 * size_of::<S>()), shape.spread(reads.gamma));
    let reads = Reads { gamma: &gamma, ..reads };
    if shape.by_place() {
        return Ok(small::sums(&launch(Places { reads, shape, stores, dx }), gamma.len() / shape.channels()));
    }
    Ok(start(!alone, Backward { reads, shape, first: 0, stores, alone, dx }))
}

/// All gradients, from the group `first` on: chunk by chunk, with kernels that have doors of their own.
struct Backward<'a, S: Storage> {
    reads: Reads<'a, S>,
    shape: Grouped,
    first: usize,
    stores: Stores,
    alone: bool,
    dx: &'a mut [S],
}

/// Of each group mean (hi, lo), rstd, and the means of dy * gamma and dy * gamma * x̂, the latter times rstd.
type Slopes<R> = Vec<[R; 5]>;

impl<S: Storage> Backward<'_, S> {
    /// The groups `chunk`, counted from `first`; adds to the sums of all.
    fn chunk(&mut self, chunk: Range<usize>, total: &mut Sums) {
        let Self { reads: Reads { dy, x, gamma, mean, m2, eps }, shape, stores, alone, .. } = *self;
        let (count, first) = (shape.count(), self.first + chunk.start);
        let at = chunk.start * count..chunk.end * count;
        let saved = saved(count, &mean[chunk.clone()], &m2[chunk], eps);
        let ([dy, x], ahead): ([&[S]; 2], [&[S]; 2]) = {
            let [dy, x] = [dy, x].map(|a| a[at.start..].split_at(at.len()));
            ([dy.0, x.0], if 2 * size_of_val(x.0) <= AHEAD_BYTES { [dy.1, x.1] } else { [&[], &[]] })
        };
        let dx = &mut self.dx[at];
        let [hi, lo, rstd] = &per_channel(&saved, shape.width());
        // gamma and beta matter to a mask only.
        let affine = Affine { hi, lo, rstd, gamma: rstd, beta: rstd };
        let seen = if shape.last() { shape.rows() } else { Shape { channels: hi.len(), inner: shape.run(), outer: 1 } };
        let data = Data { x, weights: None, shape: seen };
        let up = Upstream { dy, data, affine, residual: None, relu: false };
        let found = if shape.last() {
            columns_backward::reduce_by(up, alone)
        } else {
            start(alone, planes_backward::Reduce::new(up))
        };
        let sums = weigh(&found, gamma, first * shape.width(), shape.width(), total);
        let slopes = &slopes(&saved, &sums, count);
        if shape.last() {
            write_rows(dy, x, [hi, lo, rstd], slopes, gamma, stores, alone, dx);
        } else {
            start(alone, Apply { dy, x, ahead, slopes, shape, gamma, first, start: 0, stores, dx });
        }
    }
}

/// Adds the sums of consecutive channels, the first of which is `first` modulo their number, to those of all samples, and
/// hands back the sums over each group, of `width` channels, weighed by gamma.
#[inline(never)]
fn weigh<R: Real>(found: &Sums, gamma: &[R], first: usize, width: usize, total: &mut Sums) -> Vec<[f64; 2]> {
    let mut sums = vec![[0.0; 2]; found.dy.len() / width];
    for k in 0..found.dy.len() {
        let c = (first + k) % gamma.len();
        total.dy[c] += found.dy[k];
        total.dy_xhat[c] += found.dy_xhat[k];
        sums[k / width][0] += gamma[c].to_f64() * found.dy[k];
        sums[k / width][1] += gamma[c].to_f64() * found.dy_xhat[k];
    }
    sums
}

#[inline(never)]
fn slopes<R: Real>(saved: &[[R; 3]], sums: &[[f64; 2]], count: usize) -> Slopes<R> {
    let mut all = Vec::with_capacity(saved.len());
    for ([hi, lo, rstd], [dy, dy_xhat]) in saved.iter().zip(sums) {
        all.push([*hi, *lo, *rstd, mean_dy(*dy, count as f64), slope(*dy_xhat, count as f64, *rstd)]);
    }
    all
}

impl<S: Storage> Kernel for Backward<'_, S> {
    type Out = Sums;

    const TOP: Level = S::TOP;

    fn bytes(&self) -> usize {
        3 * size_of_val(self.dx)
    }

    fn halve(self) -> Result<(Self, Self), Self> {
        let chunk = self.shape.chunk(2 * size_of::<S>());
        let at = self.reads.mean.len().div_ceil(chunk) / 2 * chunk;
        if at == 0 {
            return Err(self);
        }
        let (left, right) = self.reads.split(at, self.shape.count());
        let dx = self.dx.split_at_mut(left.dy.len());
        Ok((Self { reads: left, dx: dx.0, ..self }, Self { reads: right, dx: dx.1, first: self.first + at, ..self }))
    }

    #[inline(always)]
    fn run(mut self, _: Level) -> Sums {
        let (groups, step) = (self.reads.mean.len(), self.shape.chunk(2 * size_of::<S>()));
        let mut total = Sums::zero(0, self.reads.gamma.len());
        for chunk in steps(0..groups, step) {
            self.chunk(chunk, &mut total);
        }
        total
    }

    fn merge(left: Sums, right: Sums) -> Sums {
        left.merge(right)
    }
}

/// All gradients where gamma is a vector with one value for each place of a sample. The sums of each place go over the
/// samples.
struct Places<'a, S: Storage> {
    reads: Reads<'a, S>,
    shape: Grouped,
    stores: Stores,
    dx: &'a mut [S],
}

/// Parts have at least about this many samples: each has sums of its own, as long as a sample, in float64.
const PART: usize = 4;

impl<S: Storage> Kernel for Places<'_, S> {
    type Out = Sums;

    const TOP: Level = S::TOP;

    fn bytes(&self) -> usize {
        3 * size_of_val(self.dx)
    }

    fn halve(self) -> Result<(Self, Self), Self> {
        let groups = self.reads.gamma.len() / self.shape.count();
        let Some(at) = rows::cut(self.reads.mean.len() / groups, PART) else { return Err(self) };
        let (left, right) = self.reads.split(at * groups, self.shape.count());
        let dx = self.dx.split_at_mut(left.dy.len());
        Ok((Self { reads: left, dx: dx.0, ..self }, Self { reads: right, dx: dx.1, ..self }))
    }

    #[inline(always)]
    fn run(self, level: Level) -> Sums {
        let Self { reads: Reads { dy, x, gamma, mean, m2, eps }, shape, stores, dx } = self;
        let (count, places) = (shape.count(), gamma.len());
        let (groups, chain, step) = (mean.len(), CHAIN * places / count, rows::group(2 * count * size_of::<S>()));
        let mut sums = ColumnSums::<S::Real, 2>::new(places);
        let mut found = [[0.0; 2]; rows::GROUP];
        for all in steps(0..groups, chain) {
            for chunk in steps(all, step) {
                // The loops of a few short groups run beside the arithmetic between.
                let first = chunk.start;
                let saved = saved(count, &mean[chunk.clone()], &m2[chunk], eps);
                for (k, [hi, lo, rstd]) in saved.iter().copied().enumerate() {
                    let (at, place) = ((first + k) * count, (first + k) * count % places);
                    let mut sum = Sum::<S::Real, 2>::ZERO;
                    let (x, v) = ([&dy[at..at + count], &x[at..at + count]], [&gamma[place..place + count]]);
                    sum.add(level, x, v, [], move |[dy, x], [gamma]| {
                        let g = dy * gamma;
                        [g, g * (centred(x, hi, lo) * rstd)]
                    });
                    found[k] = sum.total(level);
                }
                for (k, [hi, lo, rstd, mean, slope]) in slopes(&saved, &found, count).into_iter().enumerate() {
                    let (at, place) = ((first + k) * count, (first + k) * count % places);
                    let (x, v) = ([&dy[at..at + count], &x[at..at + count]], [&gamma[place..place + count]]);
                    let (dx, sums) =
                        (&mut dx[at..at + count], sums.chain().map(|sums| &mut sums[place..place + count]));
                    map_add(level, x, v, [dx], sums, stores, [], move |[dy, x], [gamma]| {
                        let d = centred(x, hi, lo);
                        ([gradient(dy * gamma, d, rstd, mean, slope)], [dy, dy * (d * rstd)])
                    });
                }
            }
            sums.empty(level);
        }
        let [dy, dy_xhat] = sums.wide;
        Sums { first: 0, dy, dy_xhat }
    }

    fn merge(left: Sums, right: Sums) -> Sums {
        left.merge(right)
    }
}

/// The gradient of x where groups are runs of memory: elements `start..start + dx.len()` of those from the group `first`
/// on.
struct Apply<'a, S: Storage> {
    dy: &'a [S],
    x: &'a [S],
    ahead: [&'a [S]; 2],
    slopes: &'a [[S::Real; 5]],
    shape: Grouped,
    gamma: &'a [S::Real],
    first: usize,
    start: usize,
    stores: Stores,
    dx: &'a mut [S],
}

impl<S: Storage> Kernel for Apply<'_, S> {
    type Out = ();

    const TOP: Level = S::TOP;

    fn bytes(&self) -> usize {
        3 * size_of_val(self.dx)
    }

    fn halve(self) -> Result<(Self, Self), Self> {
        let Some(at) = cut(self.dx.len()) else { return Err(self) };
        let (dy, x, dx) = (self.dy.split_at(at), self.x.split_at(at), self.dx.split_at_mut(at));
        let left = Self { dy: dy.0, x: x.0, ahead: [&[]; 2], dx: dx.0, ..self };
        Ok((left, Self { dy: dy.1, x: x.1, ahead: [&[]; 2], dx: dx.1, start: self.start + at, ..self }))
    }

    #[inline(always)]
    fn run(self, level: Level) {
        let Self { dy, x, ahead, slopes, shape, gamma, stores, dx, .. } = self;
        for Run { group, channel, at, .. } in runs(shape, self.first, self.start, dx.len()) {
            let ([hi, lo, rstd, mean, slope], gamma) = (slopes[group], gamma[channel]);
            let ahead = ahead.map(|a| a.get(at.clone()).unwrap_or(&[]));
            let (dy, x, dx) = (&dy[at.clone()], &x[at.clone()], &mut dx[at]);
            map(level, [dy, x], [], [dx], stores, ahead, move |[dy, x], []| {
                [gradient(dy * gamma, centred(x, hi, lo), rstd, mean, slope)]
            });
        }
    }

    fn merge(_: (), _: ()) {}
}

/// The gradient of x of a sample with its channels last; the vectors are as long as a row.
struct Rows<'a, S: Storage> {
    dy: &'a [S],
    x: &'a [S],
    vectors: [&'a [S::Real]; 6],
    stores: Stores,
    dx: &'a mut [S],
}

/// Builds the vectors and runs.
fn write_rows<S: Storage>(
    dy: &[S],
    x: &[S],
    [hi, lo, rstd]: [&[S::Real]; 3],
    slopes: &[[S::Real; 5]],
    gamma: &[S::Real],
    stores: Stores,
    alone: bool,
    dx: &mut [S],
) {
    let channels = gamma.len();
    let times = columns::fold(channels, columns_write::ROW.min(dx.len()));
    let width = channels / slopes.len();
    let (mean, slope): (Vec<_>, Vec<_>) = (0..channels).map(|c| (slopes[c / width][3], slopes[c / width][4])).unzip();
    let vectors = [hi, lo, rstd, gamma, &mean, &slope].map(|v| repeat(v, times));
    start(alone, Rows { dy, x, vectors: from_fn(|k| &*vectors[k]), stores, dx });
}

impl<S: Storage> Kernel for Rows<'_, S> {
    type Out = ();

    const TOP: Level = S::TOP;

    fn bytes(&self) -> usize {
        3 * size_of_val(self.dx)
    }

    fn halve(self) -> Result<(Self, Self), Self> {
        let Some(at) = columns::cut(self.dx.len(), self.vectors[0].len(), 1) else { return Err(self) };
        let (dy, x, dx) = (self.dy.split_at(at), self.x.split_at(at), self.dx.split_at_mut(at));
        let left = Self { dy: dy.0, x: x.0, dx: dx.0, ..self };
        Ok((left, Self { dy: dy.1, x: x.1, dx: dx.1, ..self }))
    }

    #[inline(always)]
    fn run(self, level: Level) {
        let Self { dy, x, vectors, stores, dx } = self;
        let width = vectors[0].len();
        for (r, dx) in dx.chunks_mut(width).enumerate() {
            let at = r * width..r * width + dx.len();
            map(
                level,
                [&dy[at.clone()], &x[at]],
                vectors,
                [dx],
                stores,
                [],
                move |[dy, x], [hi, lo, rstd, gamma, mean, slope]| {
                    [gradient(dy * gamma, centred(x, hi, lo), rstd, mean, slope)]
                },
            );
        }
    }

    fn merge(_: (), _: ()) {}
}
