//! Channels first, backward.

use super::region::{Region, Samples, TILE, cut, pieces, tile};
use super::{Shape, Sums, Upstream, centred, gradient, masked, mean_dy, slope};
use crate::kernel::{Kernel, launch};
use crate::lanes::{Stores, map, steps};
use crate::real::Real;
use crate::simd::{self, Level};
use crate::storage::Storage;
use crate::sum::{Sum, totals};
use std::ops::Range;

/// Elements that memory needs to have warning of, at least.
const AHEAD: usize = 2048;

/// The gradients of beta and gamma of every channel.
pub struct Reduce<'a, S: Storage> {
    up: Upstream<'a, S>,
    region: Region,
}

impl<'a, S: Storage> Reduce<'a, S> {
    /// Over the whole array.
    pub fn new(up: Upstream<'a, S>) -> Self {
        Self { up, region: Region::all(up.data.shape, 2 * size_of::<S>()) }
    }

    /// Adds the sums of some channels to `all`.
    fn add(&self, level: Level, channels: Range<usize>, sums: &mut [Sum<S::Real, 2>; TILE], all: &mut Sums) {
        simd::enter(level, Tiles { up: self.up, region: &self.region, channels, sums, all });
    }
}

impl<S: Storage> Kernel for Reduce<'_, S> {
    type Out = Sums;

    const TOP: Level = S::TOP;

    fn bytes(&self) -> usize {
        self.region.len() * size_of::<S>() * if self.up.residual.is_some() { 3 } else { 2 }
    }

    fn halve(self) -> Result<(Self, Self), Self> {
        let up = self.up;
        match self.region.halve() {
            Ok((left, right)) => Ok((Self { up, region: left }, Self { up, region: right })),
            Err(region) => Err(Self { up, region }),
        }
    }

    #[inline(always)]
    fn run(self, level: Level) -> Sums {
        let channels = self.region.channels.clone();
        let mut all = Sums::zero(channels.start, channels.len());
        let mut sums = [Sum::ZERO; TILE];
        self.add(level, channels, &mut sums, &mut all);
        all
    }

    fn merge(left: Sums, right: Sums) -> Sums {
        left.merge(right)
    }
}

/// The sums of some adjacent channels. A part of other kernels: it is not split.
struct Tiles<'a, 'b, S: Storage> {
    up: Upstream<'a, S>,
    region: &'b Region,
    channels: Range<usize>,
    sums: &'b mut [Sum<S::Real, 2>; TILE],
    all: &'b mut Sums,
}

impl<S: Storage> Kernel for Tiles<'_, '_, S> {
    type Out = ();

    const TOP: Level = S::TOP;

    fn bytes(&self) -> usize {
        self.channels.len() * self.up.data.shape.count() * 2 * size_of::<S>()
    }

    fn halve(self) -> Result<(Self, Self), Self> {
        Err(self)
    }

    #[inline(always)]
    fn run(mut self, level: Level) {
        for tile in steps(self.channels.clone(), tile(self.up.data.shape, 2 * size_of::<S>())) {
            self.tile(level, tile);
        }
    }

    fn merge(_: (), _: ()) {}
}

impl<S: Storage> Tiles<'_, '_, S> {
    /// Channels that are walked together.
    #[inline(always)]
    fn tile(&mut self, level: Level, tile: Range<usize>) {
        let Upstream { dy, data, affine, residual, relu } = self.up;
        let Self { region, sums, all, .. } = self;
        let first = tile.start - all.first;
        // Memory fetches the plane of the next sample meanwhile; of a small plane, one further ahead.
        let stride = data.shape.channels * data.shape.inner * (AHEAD / data.shape.inner.max(1)).max(1);
        for (planes, inner) in region.blocks() {
            for t in 0..tile.len() {
                sums[t].clear();
            }
            for n in planes {
                for c in tile.clone() {
                    let at = region.at(n, c, &inner);
                    let ahead = [dy, data.x].map(|a| a.get(at.start + stride..at.end + stride).unwrap_or(&[]));
                    let (dy, x) = (&dy[at.clone()], &data.x[at.clone()]);
                    let [hi, lo, rstd, gamma, beta] = affine.one(c);
                    let scale = gamma * rstd;
                    let sum = &mut sums[c - tile.start];
                    match (relu, residual) {
                        (false, _) => sum
                            .add(level, [dy, x], [], ahead, move |[dy, x], []| [dy, dy * (centred(x, hi, lo) * rstd)]),
                        (true, None) => sum.add(level, [dy, x], [], ahead, move |[dy, x], []| {
                            let d = centred(x, hi, lo);
                            let dz = masked(dy, d * scale + beta);
                            [dz, dz * (d * rstd)]
                        }),
                        (true, Some(r)) => sum.add(level, [dy, x, &r[at]], [], ahead, move |[dy, x, r], []| {
                            let d = centred(x, hi, lo);
                            let dz = masked(dy, d * scale + beta + r);
                            [dz, dz * (d * rstd)]
                        }),
                    }
                }
            }
            let totals = totals(level, sums, tile.len());
            for t in 0..tile.len() {
                all.dy[first + t] += totals[t][0];
                all.dy_xhat[first + t] += totals[t][1];
            }
        }
    }
}

/// Writes `dx`, and dz into `dresidual`, for the run `at` of channel c, of which `weights` are the weights if there are any.
#[inline(always)]
fn write<S: Storage, const WEIGHTED: bool>(
    level: Level,
    up: &Upstream<'_, S>,
    at: Range<usize>,
    weights: &[S::Real],
    c: usize,
    [mean_dy, slope]: [S::Real; 2],
    dx: &mut [S],
    dresidual: Option<&mut [S]>,
    stores: Stores,
    ahead: [&[S]; 2],
) {
    let [hi, lo, rstd, gamma, beta] = up.affine.one(c);
    let scale = gamma * rstd;
    let (dy, x) = (&up.dy[at.clone()], &up.data.x[at.clone()]);
    let plain = move |dz, d| gradient(dz, d, scale, mean_dy, slope);
    let weighted = move |dz, d, w| gradient(dz, d, scale, mean_dy * w, slope * w);
    let behind = move |dy, d| masked(dy, d * scale + beta);
    let behind_sum = move |dy, d, r| masked(dy, d * scale + beta + r);
    match (up.relu, up.residual.map(|r| &r[at]).zip(dresidual)) {
        (false, _) if WEIGHTED => {
            map(level, [dy, x], [weights], [dx], stores, ahead, move |[dy, x], [w]| {
                [weighted(dy, centred(x, hi, lo), w)]
            });
        }
        (false, _) => map(level, [dy, x], [], [dx], stores, ahead, move |[dy, x], []| [plain(dy, centred(x, hi, lo))]),
        (true, None) if WEIGHTED => map(level, [dy, x], [weights], [dx], stores, ahead, move |[dy, x], [w]| {
            let d = centred(x, hi, lo);
            [weighted(behind(dy, d), d, w)]
        }),
        (true, None) => map(level, [dy, x], [], [dx], stores, ahead, move |[dy, x], []| {
            let d = centred(x, hi, lo);
            [plain(behind(dy, d), d)]
        }),
        (true, Some((r, dr))) if WEIGHTED => {
            map(level, [dy, x, r], [weights], [dx, dr], stores, ahead, move |[dy, x, r], [w]| {
                let d = centred(x, hi, lo);
                let dz = behind_sum(dy, d, r);
                [weighted(dz, d, w), dz]
            })
        }
        (true, Some((r, dr))) => map(level, [dy, x, r], [], [dx, dr], stores, ahead, move |[dy, x, r], []| {
            let d = centred(x, hi, lo);
            let dz = behind_sum(dy, d, r);
            [plain(dz, d), dz]
        }),
    }
}

/// The gradient of x: elements `start..start + dx.len()`.
struct Apply<'a, S: Storage, const WEIGHTED: bool> {
    up: Upstream<'a, S>,
    mean_dy: &'a [S::Real],
    slope: &'a [S::Real],
    start: usize,
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
    let stores = Stores::joined(dx, up.data.shape.inner, 2);
    if up.data.weights.is_some() {
        launch(Apply::<S, true> { up, mean_dy, slope, start: 0, stores, dx, dresidual });
    } else {
        launch(Apply::<S, false> { up, mean_dy, slope, start: 0, stores, dx, dresidual });
    }
}

impl<S: Storage, const WEIGHTED: bool> Kernel for Apply<'_, S, WEIGHTED> {
    type Out = ();

    const TOP: Level = if WEIGHTED { Level::Avx2 } else { S::TOP };

    fn bytes(&self) -> usize {
        size_of_val(self.dx) * if self.dresidual.is_some() { 5 } else { 3 }
    }

    fn halve(self) -> Result<(Self, Self), Self> {
        let Some(at) = cut(self.dx.len()) else { return Err(self) };
        let Self { up, mean_dy, slope, start, stores, dx, dresidual } = self;
        let dx = dx.split_at_mut(at);
        let (left, right) = dresidual.map(|d| d.split_at_mut(at)).unzip();
        Ok((
            Self { up, mean_dy, slope, start, stores, dx: dx.0, dresidual: left },
            Self { up, mean_dy, slope, start: start + at, stores, dx: dx.1, dresidual: right },
        ))
    }

    #[inline(always)]
    fn run(self, level: Level) {
        let Self { up, mean_dy, slope, start, stores, dx, dresidual } = self;
        let (dx, dresidual) = (vec![dx], dresidual.map(|d| vec![d]));
        let write =
            Write::<S, WEIGHTED> { up, mean_dy, slope, first: 0, start, stores, step: 0, end: 0, dx, dresidual };
        simd::enter(level, write);
    }

    fn merge(_: (), _: ()) {}
}

/// The gradient of x: one run of memory per sample. A part of other kernels: it is not split.
struct Write<'a, S: Storage, const WEIGHTED: bool> {
    up: Upstream<'a, S>,
    /// Of the channels from `first` on.
    mean_dy: &'a [S::Real],
    slope: &'a [S::Real],
    first: usize,
    /// Where the run of the first sample starts in the array.
    start: usize,
    stores: Stores,
    /// Memory meanwhile fetches the channel so many further on, if that is before `end`.
    step: usize,
    end: usize,
    dx: Vec<&'a mut [S]>,
    dresidual: Option<Vec<&'a mut [S]>>,
}

impl<S: Storage, const WEIGHTED: bool> Kernel for Write<'_, S, WEIGHTED> {
    type Out = ();

    const TOP: Level = if WEIGHTED { Level::Avx2 } else { S::TOP };

    fn bytes(&self) -> usize {
        3 * self.dx.iter().map(|dx| size_of_val(*dx)).sum::<usize>()
    }

    fn halve(self) -> Result<(Self, Self), Self> {
        Err(self)
    }

    #[inline(always)]
    fn run(self, level: Level) {
        let Self { up, mean_dy, slope, first, stores, step, end, dx, mut dresidual, .. } = self;
        let Shape { channels, inner, .. } = up.data.shape;
        for (n, dx) in dx.into_iter().enumerate() {
            let start = self.start + n * channels * inner;
            for (c, run) in pieces(up.data.shape, start, dx.len()) {
                let at = start + run.start..start + run.end;
                let next = at.start + step * inner..at.end + step * inner;
                let ahead = if c + step < end { next } else { 0..0 };
                let ahead = [up.dy, up.data.x].map(|a| &a[ahead.clone()]);
                let weights = match up.data.weights {
                    Some(weights) if WEIGHTED => {
                        let place = at.start / (channels * inner) * inner + at.start % inner;
                        &weights[place..place + run.len()]
                    }
                    _ => &[],
                };
                let dresidual = dresidual.as_mut().map(|d| &mut d[n][run.clone()]);
                let (means, dx) = ([mean_dy[c - first], slope[c - first]], &mut dx[run]);
                write::<S, WEIGHTED>(level, &up, at, weights, c, means, dx, dresidual, stores, ahead);
            }
        }
    }

    fn merge(_: (), _: ()) {}
}

/// Sums and gradient in one pass over memory, without weights: each tile of channels stays in cache in between.
pub struct Backward<'a, S: Storage> {
    reduce: Reduce<'a, S>,
    count: f64,
    stores: Stores,
    dx: Samples<'a, S>,
    dresidual: Option<Samples<'a, S>>,
}

impl<'a, S: Storage> Backward<'a, S> {
    /// See [`super::backward`], which checks the lengths.
    pub(super) fn new(up: Upstream<'a, S>, count: f64, dx: &'a mut [S], dresidual: Option<&'a mut [S]>) -> Self {
        let shape = up.data.shape;
        let stores = Stores::apart(dx, shape.inner, 2);
        let dresidual = dresidual.map(|d| Samples::new(d, shape));
        Self { reduce: Reduce::new(up), count, stores, dx: Samples::new(dx, shape), dresidual }
    }
}

impl<S: Storage> Kernel for Backward<'_, S> {
    type Out = Sums;

    const TOP: Level = S::TOP;

    fn bytes(&self) -> usize {
        self.reduce.region.len() * size_of::<S>() * if self.dresidual.is_some() { 5 } else { 3 }
    }

    fn halve(self) -> Result<(Self, Self), Self> {
        let Self { reduce: Reduce { up, region }, count, stores, dx, dresidual } = self;
        let Some((left, right)) = region.clone().halve_tiles(tile(up.data.shape, 2 * size_of::<S>())) else {
            return Err(Self { reduce: Reduce { up, region }, count, stores, dx, dresidual });
        };
        let at = left.channels.len() * up.data.shape.inner;
        let dx = dx.split(at);
        let dresidual = dresidual.map(|d| d.split(at)).unzip();
        Ok((
            Self { reduce: Reduce { up, region: left }, count, stores, dx: dx.0, dresidual: dresidual.0 },
            Self { reduce: Reduce { up, region: right }, count, stores, dx: dx.1, dresidual: dresidual.1 },
        ))
    }

    #[inline(always)]
    fn run(mut self, level: Level) -> Sums {
        let up = self.reduce.up;
        let Shape { inner, .. } = up.data.shape;
        let channels = self.reduce.region.channels.clone();
        let first = channels.start;
        let mut all = Sums::zero(first, channels.len());
        let mut sums = [Sum::ZERO; TILE];
        for tile in steps(channels.clone(), tile(up.data.shape, 2 * size_of::<S>())) {
            self.reduce.add(level, tile.clone(), &mut sums, &mut all);
            let run = (tile.start - first) * inner..(tile.end - first) * inner;
            let mut means = [[S::Real::ZERO; TILE]; 2];
            for c in tile.clone() {
                means[0][c - tile.start] = mean_dy(all.dy[c - first], self.count);
                means[1][c - tile.start] = slope(all.dy_xhat[c - first], self.count, up.affine.rstd[c]);
            }
            let write = Write::<S, false> {
                up,
                mean_dy: &means[0],
                slope: &means[1],
                first: tile.start,
                start: tile.start * inner,
                stores: self.stores,
                // The next tile.
                step: tile.len(),
                end: channels.end,
                dx: self.dx.of(run.clone()),
                dresidual: self.dresidual.as_mut().map(|d| d.of(run)),
            };
            simd::enter(level, write);
        }
        all
    }

    fn merge(left: Sums, right: Sums) -> Sums {
        left.merge(right)
    }
}
