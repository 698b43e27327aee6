//! Channels first: each channel of each sample is a plane, a run of `inner` elements.
//!
//! A block is as many consecutive planes of one channel as have about 4,096 elements, or 4,096 elements of one plane.
//! Small planes are walked in tiles of adjacent channels, so that memory is read in longer runs; what is added to what
//! does not depend on the tile.

use super::region::{Block, Region, Samples, TILE, cut, pieces, tile, tiles};
use super::{Affine, Data, Finish, Shape, Statistics, centred, floor, floored};
use crate::kernel::{Kernel, launch};
use crate::lanes::{Stores, Sum, map};
use crate::moments::{Channels, LOOKS, again, conclude, guess, inverse};
use crate::real::Real;
use crate::simd::Level;
use crate::storage::Storage;
use std::ops::Range;

/// Tiles of up to this many bytes are still in the second cache when the tile after them has been read.
const LAG_BYTES: usize = 512 << 10;

/// What has a turn after every run that is read.
trait Meanwhile<S> {
    /// Whether there is something to do for channel t of the tile.
    fn waits(&self, t: usize) -> bool;

    /// The run was of sample n, channel t of the tile; memory is to fetch `ahead`. `#[inline(always)]` on every
    /// implementation: see [`Kernel::run`].
    fn turn(&mut self, level: Level, n: usize, t: usize, places: Range<usize>, ahead: &[S]);
}

/// Reading and nothing else.
struct Nothing;

impl<S> Meanwhile<S> for Nothing {
    #[inline(always)]
    fn waits(&self, _: usize) -> bool {
        false
    }

    #[inline(always)]
    fn turn(&mut self, _: Level, _: usize, _: usize, _: Range<usize>, _: &[S]) {}
}

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

    /// Adds the moments of a block of the channels `tile`, at most [`TILE`] of them, to `state`, whose first channel is
    /// `tile.start`. Memory fetches the block `next` while this is done, and `meanwhile` has its turns.
    #[inline(always)]
    fn block(
        &self,
        level: Level,
        tile: &Range<usize>,
        block: &Block,
        next: Option<&Block>,
        sums: &mut [Sum<S::Real, 2>; TILE],
        state: &mut Channels,
        meanwhile: &mut impl Meanwhile<S>,
    ) {
        let count = match self.data.weights {
            Some(weights) if WEIGHTED => self.weight(level, block, weights),
            _ => (block.0.len() * block.1.len()) as f64,
        };
        let inverse = inverse(count);
        let mut guessed = [S::Real::ZERO; TILE];
        for t in 0..tile.len() {
            guessed[t] = guess::<S>(state.count, state.mean[t], state.m2[t]);
        }
        let mut about = guessed;
        let (mut mean, mut m2) = ([0.0; TILE], [0.0; TILE]);
        for look in 0..LOOKS {
            match look {
                0 => self.look(level, tile, block, next, &about, sums, meanwhile),
                _ => self.look_again(level, tile, block, &about, sums),
            }
            let mut unsettled = false;
            for t in 0..tile.len() {
                let [first, second] = sums[t].total();
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
        state.absorb(count, &mean[..tile.len()], &m2[..tile.len()]);
    }

    /// Sums the differences from `about` and their squares.
    #[inline(always)]
    fn look(
        &self,
        level: Level,
        tile: &Range<usize>,
        (planes, inner): &Block,
        next: Option<&Block>,
        about: &[S::Real; TILE],
        sums: &mut [Sum<S::Real, 2>; TILE],
        meanwhile: &mut impl Meanwhile<S>,
    ) {
        sums[..tile.len()].fill(Sum::ZERO);
        for n in planes.clone() {
            for t in 0..tile.len() {
                let c = tile.start + t;
                let run = &self.data.x[self.region.at(n, c, inner)];
                let ahead = match next {
                    Some((next, places)) if n - planes.start < next.len() => {
                        &self.data.x[self.region.at(next.start + n - planes.start, c, places)]
                    }
                    _ => &[],
                };
                // Most of it while something is written: reads and writes overlap.
                let (ahead, later) = ahead.split_at(if meanwhile.waits(t) { ahead.len() / 4 } else { ahead.len() });
                let (sum, about) = (&mut sums[t], about[t]);
                match self.data.weights {
                    Some(weights) if WEIGHTED => {
                        let w = &weights[self.region.weight_at(n, inner)];
                        sum.add(level, [run], [w], [], move |[x], [w]| {
                            let d = if w == S::Real::ZERO { w } else { x - about };
                            [w * d, w * d * d]
                        });
                    }
                    _ => sum.add(level, [run], [], [ahead], move |[x], []| {
                        let d = x - about;
                        [d, d * d]
                    }),
                }
                meanwhile.turn(level, n, t, inner.clone(), later);
            }
        }
    }

    /// The same once more. Not inlined, as it is rare; `level` still says what the CPU has.
    #[inline(never)]
    fn look_again(
        &self,
        level: Level,
        tile: &Range<usize>,
        block: &Block,
        about: &[S::Real; TILE],
        sums: &mut [Sum<S::Real, 2>; TILE],
    ) {
        self.look(level, tile, block, None, about, sums, &mut Nothing);
    }

    /// The sum of the weights of a block.
    #[inline(always)]
    fn weight(&self, level: Level, (planes, inner): &Block, weights: &[S::Real]) -> f64 {
        let mut sum = Sum::<S::Real, 1>::ZERO;
        for n in planes.clone() {
            sum.add(level, [&weights[self.region.weight_at(n, inner)]], [], [], |[w], []| [w]);
        }
        sum.total()[0]
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
        let mut all = Channels::empty(channels.start, 0);
        let mut sums = [Sum::ZERO; TILE];
        for tile in tiles(&channels, tile(self.data.shape, size_of::<S>())) {
            let mut state = Channels::empty(tile.start, tile.len());
            let mut blocks = self.region.blocks().peekable();
            while let Some(block) = blocks.next() {
                self.block(level, &tile, &block, blocks.peek(), &mut sums, &mut state, &mut Nothing);
            }
            all.append(state);
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

    const TOP: Level = S::TOP;

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
    fn run(self, level: Level) {
        for (c, run) in pieces(self.shape, self.start, self.y.len()) {
            let residual = self.residual.map(|r| &r[run.clone()]);
            normalise(
                level,
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

/// Writes the channels of a tile, of which the statistics are known; `first` is the first channel of this part.
struct Write<'a, 'b, S: Storage> {
    stats: &'a Stats<'b, S, false>,
    affine: Affine<'a, S::Real>,
    residual: Option<&'a [S]>,
    floor: S::Real,
    stores: Stores,
    tile: Range<usize>,
    first: usize,
    y: &'a mut Samples<'b, S>,
}

impl<'a, S: Storage> Train<'a, S> {
    /// What writes the channels `tile`.
    #[inline(always)]
    fn write(&mut self, tile: &Range<usize>, first: usize) -> (&Stats<'a, S, false>, Write<'_, 'a, S>) {
        let Self { stats, gamma, beta, residual, floor, stores, out: Statistics { hi, lo, rstd, .. }, y, .. } = self;
        let affine = Affine { hi, lo, rstd, gamma, beta };
        let (residual, floor, stores, tile) = (*residual, *floor, *stores, tile.clone());
        (stats, Write { stats, affine, residual, floor, stores, tile, first, y })
    }
}

impl<S: Storage> Meanwhile<S> for Write<'_, '_, S> {
    #[inline(always)]
    fn waits(&self, t: usize) -> bool {
        t < self.tile.len()
    }

    #[inline(always)]
    fn turn(&mut self, level: Level, n: usize, t: usize, places: Range<usize>, ahead: &[S]) {
        if t >= self.tile.len() {
            return;
        }
        let (at, c) = (self.stats.region.at(n, self.tile.start + t, &places), self.tile.start + t - self.first);
        let plane = c * self.stats.data.shape.inner;
        let y = &mut self.y.0[n][plane + places.start..plane + places.end];
        let residual = self.residual.map(|r| &r[at.clone()]);
        normalise(level, &self.stats.data.x[at], residual, self.affine.one(c), self.floor, y, self.stores, ahead);
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
        for tile in tiles(&channels, width) {
            let mut state = Channels::empty(tile.start, tile.len());
            let mut blocks = self.stats.region.blocks().peekable();
            let (stats, mut write) = self.write(&before, first);
            while let Some(block) = blocks.next() {
                stats.block(level, &tile, &block, blocks.peek(), &mut sums, &mut state, &mut write);
            }
            for t in 0..tile.len() {
                self.out.put(tile.start - first + t, state.count, state.mean[t], state.m2[t], self.rule);
            }
            all.append(state);
            let partners = before.end.min(before.start + tile.len());
            let now = if lag && tile.end < channels.end { tile.start..tile.start } else { tile.clone() };
            for rest in [partners..before.end, now.clone()] {
                let (stats, mut write) = self.write(&rest, first);
                for n in 0..shape.outer {
                    for t in 0..rest.len() {
                        let next = stats.region.at(n, rest.start + width + t, &(0..shape.inner));
                        let ahead = if rest.start + width + t < channels.end { &stats.data.x[next] } else { &[] };
                        write.turn(level, n, t, 0..shape.inner, ahead);
                    }
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
