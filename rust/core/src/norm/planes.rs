//! Channels first: each channel of each sample is a plane, a run of `inner` elements.
//!
//! A block is as many consecutive planes of one channel as have about 4,096 elements, or 4,096 elements of one plane.
//! Small planes are walked in tiles of adjacent channels, so that memory is read in longer runs; what is added to what
//! does not depend on the tile.

use super::region::{Block, Region, Samples, TILE, cut, pieces, tile, tiles};
use super::{Affine, Data, Finish, Shape, Statistics, centred, floor, floored};
use crate::kernel::{Kernel, launch};
use crate::lanes::{Stores, Sum, map};
use crate::moments::{Channels, about, conclude, inverse};
use crate::real::Real;
use crate::simd::Level;
use crate::storage::Storage;
use std::ops::Range;

/// The moments of every channel.
pub struct Stats<'a, S: Storage, const WEIGHTED: bool> {
    data: Data<'a, S>,
    region: Region,
}

impl<'a, S: Storage, const WEIGHTED: bool> Stats<'a, S, WEIGHTED> {
    /// Over the whole array.
    pub fn new(data: Data<'a, S>) -> Self {
        Self { data, region: Region::all(data.shape, size_of::<S>()) }
    }

    /// Adds the moments of the channels `tile`, at most [`TILE`] of them, to `state`, whose first channel is
    /// `tile.start`.
    #[inline(always)]
    fn tile(&self, tile: Range<usize>, state: &mut Channels) {
        let mut plain_sums = [Sum::<S::Real, 1>::ZERO; TILE];
        let mut sums = [Sum::<S::Real, 2>::ZERO; TILE];
        let (mut plain, mut mean) = ([0.0; TILE], [S::Real::ZERO; TILE]);
        let (mut block_mean, mut block_m2) = ([0.0; TILE], [0.0; TILE]);
        let mut blocks = self.region.blocks().peekable();
        while let Some(block) = blocks.next() {
            // First look: the mean of each channel, rounded.
            let count = match self.data.weights {
                Some(weights) if WEIGHTED => self.weighted_means(&tile, &block, weights, &mut sums, &mut plain),
                _ => self.plain_means(&tile, &block, &mut plain_sums, &mut plain),
            };
            for t in 0..tile.len() {
                mean[t] = about::<S>(plain[t]);
            }
            // Second look: squares about that mean; a third with a better one where it is worth it.
            for look in 0..2 {
                match self.data.weights {
                    Some(weights) if WEIGHTED => self.weighted_squares(&tile, &block, weights, &mean, &mut sums),
                    _ => self.squares(&tile, &block, blocks.peek(), &mean, &mut sums),
                }
                let mut settled = true;
                for t in 0..tile.len() {
                    let [first, second] = sums[t].total();
                    let (moments, again) = conclude(count, inverse(count), plain[t], mean[t].to_f64(), first, second);
                    (block_mean[t], block_m2[t]) = (moments.mean, moments.m2);
                    if again {
                        mean[t] = about::<S>(moments.mean);
                        settled = false;
                    }
                }
                if settled || look == 1 {
                    break;
                }
            }
            state.absorb(count, &block_mean[..tile.len()], &block_m2[..tile.len()]);
        }
    }

    /// Writes the mean of a block for each channel and returns the block's count.
    #[inline(always)]
    fn plain_means(
        &self,
        tile: &Range<usize>,
        (planes, inner): &Block,
        sums: &mut [Sum<S::Real, 1>; TILE],
        means: &mut [f64; TILE],
    ) -> f64 {
        sums[..tile.len()].fill(Sum::ZERO);
        for n in planes.clone() {
            for c in tile.clone() {
                let run = &self.data.x[self.region.at(n, c, inner)];
                sums[c - tile.start].add([run], [], [], |[x], []| [x]);
            }
        }
        let count = (planes.len() * inner.len()) as f64;
        for t in 0..tile.len() {
            means[t] = sums[t].total()[0] * inverse(count);
        }
        count
    }

    #[inline(always)]
    fn weighted_means(
        &self,
        tile: &Range<usize>,
        (planes, inner): &Block,
        weights: &[S::Real],
        sums: &mut [Sum<S::Real, 2>; TILE],
        means: &mut [f64; TILE],
    ) -> f64 {
        sums[..tile.len()].fill(Sum::ZERO);
        for n in planes.clone() {
            let w = &weights[self.region.weight_at(n, inner)];
            for c in tile.clone() {
                let run = &self.data.x[self.region.at(n, c, inner)];
                sums[c - tile.start].add([run], [w], [], |[x], [w]| [w, if w == S::Real::ZERO { w } else { w * x }]);
            }
        }
        let mut count = 0.0;
        for t in 0..tile.len() {
            let [weight, sum] = sums[t].total();
            count = weight;
            means[t] = sum * inverse(weight);
        }
        count
    }

    /// Sums the differences from `mean` and their squares. Meanwhile memory fetches the next block.
    #[inline(always)]
    fn squares(
        &self,
        tile: &Range<usize>,
        (planes, inner): &Block,
        next: Option<&Block>,
        mean: &[S::Real; TILE],
        sums: &mut [Sum<S::Real, 2>; TILE],
    ) {
        sums[..tile.len()].fill(Sum::ZERO);
        for n in planes.clone() {
            for c in tile.clone() {
                let run = &self.data.x[self.region.at(n, c, inner)];
                let ahead = match next {
                    Some((next, inner)) if n - planes.start < next.len() => {
                        &self.data.x[self.region.at(next.start + n - planes.start, c, inner)]
                    }
                    _ => &[],
                };
                let mean = mean[c - tile.start];
                sums[c - tile.start].add([run], [], [ahead], |[x], []| {
                    let d = x - mean;
                    [d, d * d]
                });
            }
        }
    }

    #[inline(always)]
    fn weighted_squares(
        &self,
        tile: &Range<usize>,
        (planes, inner): &Block,
        weights: &[S::Real],
        mean: &[S::Real; TILE],
        sums: &mut [Sum<S::Real, 2>; TILE],
    ) {
        sums[..tile.len()].fill(Sum::ZERO);
        for n in planes.clone() {
            let w = &weights[self.region.weight_at(n, inner)];
            for c in tile.clone() {
                let run = &self.data.x[self.region.at(n, c, inner)];
                let mean = mean[c - tile.start];
                sums[c - tile.start].add([run], [w], [], |[x], [w]| {
                    let d = if w == S::Real::ZERO { w } else { x - mean };
                    [w * d, w * d * d]
                });
            }
        }
    }
}

impl<S: Storage, const WEIGHTED: bool> Kernel for Stats<'_, S, WEIGHTED> {
    type Out = Channels;

    const TOP: Level = if WEIGHTED { Level::Baseline } else { Level::Avx2 };

    fn bytes(&self) -> usize {
        self.region.len() * size_of::<S>()
    }

    fn halve(self) -> Result<(Self, Self), Self> {
        let data = self.data;
        match self.region.halve() {
            Ok((left, right)) => Ok((Self { data, region: left }, Self { data, region: right })),
            Err(region) => Err(Self { data, region }),
        }
    }

    #[inline(always)]
    fn run(self) -> Channels {
        let channels = self.region.channels.clone();
        let mut all = Channels::empty(channels.start, 0);
        for tile in tiles(&channels, tile(self.data.shape, size_of::<S>())) {
            let mut state = Channels::empty(tile.start, tile.len());
            self.tile(tile, &mut state);
            all.count = state.count;
            all.mean.extend(&state.mean);
            all.m2.extend(&state.m2);
        }
        all
    }

    fn merge(left: Channels, right: Channels) -> Channels {
        left.merge(right)
    }
}

/// Writes `y` for a run of channel c.
#[inline(always)]
fn normalise<S: Storage>(
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
        None => map([x], [], [y], stores, [ahead], |[x], []| [floored(centred(x, hi, lo) * scale + beta, floor)]),
        Some(r) => {
            map([x, r], [], [y], stores, [ahead], |[x, r], []| [floored(centred(x, hi, lo) * scale + beta + r, floor)])
        }
    }
}

/// The normalised array: elements `start..start + y.len()`.
struct Apply<'a, S: Storage> {
    x: &'a [S],
    residual: Option<&'a [S]>,
    affine: Affine<'a, S::Real>,
    floor: S::Real,
    shape: Shape,
    start: usize,
    stores: Stores,
    y: &'a mut [S],
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
    let stores = Stores::joined(y, shape.inner);
    launch(Apply { x, residual, affine, floor: floor(relu), shape, start: 0, stores, y });
}

impl<S: Storage> Kernel for Apply<'_, S> {
    type Out = ();

    fn bytes(&self) -> usize {
        size_of_val(self.x) + size_of_val(self.y) + self.residual.map_or(0, size_of_val)
    }

    fn halve(self) -> Result<(Self, Self), Self> {
        let Some(at) = cut(self.y.len()) else { return Err(self) };
        let (x, y) = (self.x.split_at(at), self.y.split_at_mut(at));
        let residual = self.residual.map(|r| r.split_at(at));
        let left = Self { x: x.0, y: y.0, residual: residual.map(|r| r.0), ..self };
        Ok((left, Self { x: x.1, y: y.1, residual: residual.map(|r| r.1), start: self.start + at, ..self }))
    }

    #[inline(always)]
    fn run(self) {
        for (c, run) in pieces(self.shape, self.start, self.y.len()) {
            let residual = self.residual.map(|r| &r[run.clone()]);
            normalise(
                &self.x[run.clone()],
                residual,
                self.affine.one(c),
                self.floor,
                &mut self.y[run],
                self.stores,
                &[],
            );
        }
    }

    fn merge(_: (), _: ()) {}
}

/// Statistics and normalised array in one pass over memory, without weights: each tile of channels stays in cache in
/// between.
pub struct Train<'a, S: Storage> {
    stats: Stats<'a, S, false>,
    rule: Finish,
    gamma: &'a [S::Real],
    beta: &'a [S::Real],
    residual: Option<&'a [S]>,
    floor: S::Real,
    stores: Stores,
    out: Statistics<'a, S::Real>,
    y: Samples<'a, S>,
}

impl<'a, S: Storage> Train<'a, S> {
    /// See [`super::train`], which checks the lengths.
    pub(super) fn new(
        data: Data<'a, S>,
        rule: Finish,
        gamma: &'a [S::Real],
        beta: &'a [S::Real],
        residual: Option<&'a [S]>,
        relu: bool,
        out: Statistics<'a, S::Real>,
        y: &'a mut [S],
    ) -> Self {
        let stores = Stores::apart(y, data.shape.inner);
        let y = Samples::new(y, data.shape);
        Self { stats: Stats::new(data), rule, gamma, beta, residual, floor: floor(relu), stores, out, y }
    }
}

impl<S: Storage> Kernel for Train<'_, S> {
    type Out = Channels;

    fn bytes(&self) -> usize {
        self.stats.bytes() * if self.residual.is_some() { 3 } else { 2 }
    }

    fn halve(self) -> Result<(Self, Self), Self> {
        let Some((left, right)) = self.stats.region.clone().halve_tiles(tile(self.stats.data.shape, size_of::<S>()))
        else {
            return Err(self);
        };
        let n = left.channels.len();
        let Statistics { hi, lo, rstd, running } = self.out;
        let (hi, lo, rstd) = (hi.split_at_mut(n), lo.split_at_mut(n), rstd.split_at_mut(n));
        let (running_left, running_right) = running
            .map(|(mean, var)| {
                let (mean, var) = (mean.split_at_mut(n), var.split_at_mut(n));
                ((mean.0, var.0), (mean.1, var.1))
            })
            .unzip();
        let (y_left, y_right) = self.y.split(n * left.shape.inner);
        let data = self.stats.data;
        let (rule, residual, floor, stores) = (self.rule, self.residual, self.floor, self.stores);
        let ((gamma_left, gamma_right), (beta_left, beta_right)) = (self.gamma.split_at(n), self.beta.split_at(n));
        Ok((
            Self {
                stats: Stats { data, region: left },
                gamma: gamma_left,
                beta: beta_left,
                out: Statistics { hi: hi.0, lo: lo.0, rstd: rstd.0, running: running_left },
                y: y_left,
                rule,
                residual,
                floor,
                stores,
            },
            Self {
                stats: Stats { data, region: right },
                gamma: gamma_right,
                beta: beta_right,
                out: Statistics { hi: hi.1, lo: lo.1, rstd: rstd.1, running: running_right },
                y: y_right,
                rule,
                residual,
                floor,
                stores,
            },
        ))
    }

    #[inline(always)]
    fn run(mut self) -> Channels {
        let Region { shape, channels, .. } = self.stats.region.clone();
        let first = channels.start;
        let mut all = Channels::empty(first, 0);
        for tile in tiles(&channels, tile(shape, size_of::<S>())) {
            let mut state = Channels::empty(tile.start, tile.len());
            self.stats.tile(tile.clone(), &mut state);
            for t in 0..tile.len() {
                self.out.put(tile.start - first + t, state.count, state.mean[t], state.m2[t], self.rule);
            }
            let Statistics { hi, lo, rstd, .. } = &self.out;
            let affine = Affine { hi, lo, rstd, gamma: self.gamma, beta: self.beta };
            for (n, y) in self.y.0.iter_mut().enumerate() {
                for c in tile.clone() {
                    let at = self.stats.region.at(n, c, &(0..shape.inner));
                    let y = &mut y[(c - first) * shape.inner..(c - first + 1) * shape.inner];
                    let residual = self.residual.map(|r| &r[at.clone()]);
                    // Memory fetches the next tile while this one is written.
                    let next = at.start + tile.len() * shape.inner;
                    let ahead = if c + tile.len() < channels.end { next..next + shape.inner } else { 0..0 };
                    let (x, ahead) = (&self.stats.data.x[at], &self.stats.data.x[ahead]);
                    normalise(x, residual, affine.one(c - first), self.floor, y, self.stores, ahead);
                }
            }
            all.count = state.count;
            all.mean.extend(&state.mean);
            all.m2.extend(&state.m2);
        }
        all
    }

    fn merge(left: Channels, right: Channels) -> Channels {
        left.merge(right)
    }
}
