//! Channels first: each channel of each sample is a plane, a run of `inner` elements.
//!
//! A block is as many consecutive planes of one channel as have about 4,096 elements, or 4,096 elements of one plane.
//! Small planes are walked in tiles of adjacent channels, so that memory is read in longer runs; what is added to what
//! does not depend on the tile.

use super::planes_write::Write;
use super::region::{Block, Region, Samples, TILE, tile};
use super::{Affine, Data, Finish, Statistics, floor};
use crate::kernel::Kernel;
use crate::lanes::{Stores, steps};
use crate::moments::{Channels, LOOKS, again, conclude, guess, inverse};
use crate::real::Real;
use crate::simd::{self, Level};
use crate::storage::Storage;
use crate::sum::Sum;
use std::ops::Range;

/// Tiles of up to this many bytes are still in the second cache when the tile after them has been read.
const LAG_BYTES: usize = 512 << 10;

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

    /// The moments of some channels. The `write` has a turn after every run that is read: reads and writes overlap.
    fn of(
        &self,
        level: Level,
        channels: Range<usize>,
        sums: &mut [Sum<S::Real, 2>; TILE],
        write: Option<Write<'_, S>>,
    ) -> Channels {
        simd::enter(level, Tiles::<S, WEIGHTED> { data: self.data, region: &self.region, channels, sums, write })
    }
}

impl<S: Storage, const WEIGHTED: bool> Kernel for Stats<'_, S, WEIGHTED> {
    type Out = Channels;

    const TOP: Level = if WEIGHTED { Level::Avx2 } else { S::TOP };

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
    fn run(self, level: Level) -> Channels {
        let channels = self.region.channels.clone();
        self.of(level, channels, &mut [Sum::ZERO; TILE], None)
    }

    fn merge(left: Channels, right: Channels) -> Channels {
        left.merge(right)
    }
}

/// The moments of some adjacent channels. A part of other kernels: it is not split.
struct Tiles<'a, 'b, S: Storage, const WEIGHTED: bool> {
    data: Data<'a, S>,
    region: &'b Region,
    channels: Range<usize>,
    sums: &'b mut [Sum<S::Real, 2>; TILE],
    /// Without weights, and where the channels are one tile.
    write: Option<Write<'b, S>>,
}

impl<S: Storage, const WEIGHTED: bool> Kernel for Tiles<'_, '_, S, WEIGHTED> {
    type Out = Channels;

    const TOP: Level = if WEIGHTED { Level::Avx2 } else { S::TOP };

    fn bytes(&self) -> usize {
        self.channels.len() * self.data.shape.count() * size_of::<S>()
    }

    fn halve(self) -> Result<(Self, Self), Self> {
        Err(self)
    }

    #[inline(always)]
    fn run(mut self, level: Level) -> Channels {
        let mut all = Channels::empty(self.channels.start, 0);
        for tile in steps(self.channels.clone(), tile(self.data.shape, size_of::<S>())) {
            let mut state = Channels::empty(tile.start, tile.len());
            let mut blocks = self.region.blocks().peekable();
            while let Some(block) = blocks.next() {
                self.block(level, &tile, &block, blocks.peek(), &mut state);
            }
            all.append(state);
        }
        all
    }

    fn merge(left: Channels, right: Channels) -> Channels {
        left.merge(right)
    }
}

impl<S: Storage, const WEIGHTED: bool> Tiles<'_, '_, S, WEIGHTED> {
    /// Adds the moments of a block to `state`. Memory fetches the block `next` while this is done.
    #[inline(always)]
    fn block(&mut self, level: Level, tile: &Range<usize>, block: &Block, next: Option<&Block>, state: &mut Channels) {
        let n = tile.len();
        let count = match self.data.weights {
            Some(weights) if WEIGHTED => self.weight(level, block, weights),
            _ => (block.0.len() * block.1.len()) as f64,
        };
        let inverse = inverse(count);
        let mut guessed = [S::Real::ZERO; TILE];
        for t in 0..n {
            guessed[t] = guess::<S>(state.count, state.mean[t], state.m2[t]);
        }
        let mut about = guessed;
        let (mut mean, mut m2) = ([0.0; TILE], [0.0; TILE]);
        for look in 0..LOOKS {
            self.look(level, look == 0, tile, block, next, &about);
            let mut unsettled = false;
            for t in 0..n {
                let [first, second] = self.sums[t].total(level);
                let (moments, wavers) = conclude(count, inverse, about[t], first, second);
                (mean[t], m2[t]) = (moments.mean, moments.m2);
                if wavers {
                    about[t] = again::<S>(look, guessed[t], mean[t]);
                    unsettled = true;
                }
            }
            if !unsettled {
                break;
            }
        }
        state.absorb(count, &mean[..n], &m2[..n]);
    }

    /// Sums the differences from `about` and their squares. The `first` time, memory fetches what is next and the write has
    /// its turns.
    #[inline(always)]
    fn look(
        &mut self,
        level: Level,
        first: bool,
        tile: &Range<usize>,
        (planes, inner): &Block,
        next: Option<&Block>,
        about: &[S::Real; TILE],
    ) {
        let Self { data, region, sums, write, .. } = self;
        let mut write = write.as_mut().filter(|_| first && !WEIGHTED);
        sums[..tile.len()].fill(Sum::ZERO);
        for n in planes.clone() {
            for t in 0..tile.len() {
                let c = tile.start + t;
                let run = &data.x[region.at(n, c, inner)];
                let ahead = match next {
                    Some((next, places)) if first && n - planes.start < next.len() => {
                        &data.x[region.at(next.start + n - planes.start, c, places)]
                    }
                    _ => &[],
                };
                // Most of it while something is written.
                let waits = write.as_ref().is_some_and(|write| t < write.channels);
                let (ahead, later) = ahead.split_at(if waits { ahead.len() / 4 } else { ahead.len() });
                let (sum, about) = (&mut sums[t], about[t]);
                if WEIGHTED {
                    let w = &data.weights.unwrap_or(&[])[region.weight_at(n, inner)];
                    sum.add(level, [run], [w], [], move |[x], [w]| {
                        let d = if w == S::Real::ZERO { w } else { x - about };
                        [w * d, w * d * d]
                    });
                } else {
                    sum.add(level, [run], [], [ahead], move |[x], []| {
                        let d = x - about;
                        [d, d * d]
                    });
                }
                if let Some(write) = write.as_mut().filter(|_| waits) {
                    write.turn(level, n, t, inner, later);
                }
            }
        }
    }

    /// The sum of the weights of a block.
    #[inline(always)]
    fn weight(&self, level: Level, (planes, inner): &Block, weights: &[S::Real]) -> f64 {
        let mut sum = Sum::<S::Real, 1>::ZERO;
        for n in planes.clone() {
            sum.add(level, [&weights[self.region.weight_at(n, inner)]], [], [], |[w], []| [w]);
        }
        sum.total(level)[0]
    }
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
        let stores = Stores::apart(y, data.shape.inner, 2); // x is looked at twice
        let y = Samples::new(y, data.shape);
        Self { stats: Stats::new(data), rule, gamma, beta, residual, floor: floor(relu), stores, out, y }
    }
}

impl<S: Storage> Train<'_, S> {
    /// What writes the channels `some`, of which the statistics are known. Memory fetches the channels `step` further on.
    fn write(&mut self, some: &Range<usize>, step: usize) -> Write<'_, S> {
        let Self { gamma, beta, residual, floor, stores, out: Statistics { hi, lo, rstd, .. }, .. } = self;
        let (Data { x, shape, .. }, all) = (self.stats.data, &self.stats.region.channels);
        let part = some.start - all.start..some.end - all.start;
        let [hi, lo, rstd] = [hi, lo, rstd].map(|v| &v[part.clone()]);
        let [gamma, beta] = [gamma, beta].map(|v| &v[part.clone()]);
        Write {
            x,
            residual: *residual,
            from: 0,
            affine: Affine { hi, lo, rstd, gamma, beta },
            first: some.start,
            floor: *floor,
            shape,
            start: some.start * shape.inner,
            channels: some.len(),
            stores: *stores,
            step,
            end: all.end,
            y: self.y.of(part.start * shape.inner..part.end * shape.inner),
        }
    }
}

impl<S: Storage> Kernel for Train<'_, S> {
    type Out = Channels;

    const TOP: Level = S::TOP;

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
    fn run(mut self, level: Level) -> Channels {
        let Region { shape, channels, .. } = self.stats.region.clone();
        let first = channels.start;
        let mut all = Channels::empty(first, 0);
        let mut sums = [Sum::ZERO; TILE];
        let width = tile(shape, size_of::<S>());
        // While a tile is summed, run by run, the one before it is written: memory is read and written at once. Where
        // that one would have left the cache by then, a tile is written as soon as it is summed.
        let lag = width * shape.count() * size_of::<S>() <= LAG_BYTES;
        let mut before = first..first;
        let stats = Stats::<S, false> { data: self.stats.data, region: self.stats.region.clone() };
        for tile in steps(channels.clone(), width) {
            let write = if before.is_empty() { None } else { Some(self.write(&before, width)) };
            let state = stats.of(level, tile.clone(), &mut sums, write);
            self.out.put(tile.start - first, state.count, &state.mean, &state.m2, self.rule);
            all.append(state);
            let partners = before.end.min(before.start + tile.len());
            let now = if lag && tile.end < channels.end { tile.start..tile.start } else { tile.clone() };
            for rest in [partners..before.end, now.clone()] {
                if !rest.is_empty() {
                    simd::enter(level, self.write(&rest, width));
                }
            }
            before = now.end..tile.end;
        }
        all
    }

    fn merge(left: Channels, right: Channels) -> Channels {
        left.merge(right)
    }
}
