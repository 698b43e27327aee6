//! Channels last, and plain matrices: each channel is a column of a matrix of rows.
//!
//! Rows are read in the order in which they lie. A block is as many rows as fit in a part of the L2 cache; its columns
//! are summed side by side, eight rows at a time. Where there are few columns, several rows are seen as one longer row,
//! and the sums of the columns that belong to one channel are merged at the end.

use super::{Affine, Data, Shape, start};
use crate::kernel::Kernel;
use crate::lanes::{LANES, LINE, loads, steps};
use crate::moments::{Channels, LOOKS, again, conclude, guess, inverse};
use crate::real::Real;
use crate::simd::{self, Level};
use crate::storage::Storage;
use std::array::from_fn;
use std::borrow::Cow;
use std::hint::black_box;
use std::ops::Range;

/// Elements of a block: in float32, 512 KiB, which another look finds in the second cache.
const BLOCK: usize = 131_072;

/// No more rows than this are added in the arithmetic type before float64 takes over; see [`crate::sum::Sum`].
pub(super) const CHAIN: usize = 32;

/// Statistics are taken of at most this many columns at a time, so that their sums stay in the first caches.
const TILE: usize = 2048;

/// Rows of so many bytes are too short for memory to foresee the next ones, which are fetched meanwhile.
const SHORT: usize = 2048;

/// Parts of no more elements are those of arrays that lie in a cache.
const CACHED: usize = 1 << 16;

/// Rows that are added to the sums of 16 columns while these stay in registers.
const ROWS: usize = 8;

pub(super) fn block_rows(width: usize) -> usize {
    (BLOCK / width.clamp(1, TILE)).clamp(ROWS, 8 * CHAIN) / ROWS * ROWS
}

/// How many rows to see as one, so that it has whole groups of lanes and at least `wanted` elements.
pub(super) fn fold(channels: usize, wanted: usize) -> usize {
    if channels == 0 || channels >= wanted {
        return 1;
    }
    let lcm = (1..=LANES).find(|k| (channels * k).is_multiple_of(LANES)).unwrap_or(1);
    lcm * wanted.div_ceil(channels * lcm)
}

/// `v` as often as a row holds it.
pub(super) fn repeat<R: Real>(v: &[R], times: usize) -> Cow<'_, [R]> {
    if times == 1 { Cow::Borrowed(v) } else { Cow::Owned(v.repeat(times)) }
}

pub(super) fn scale<R: Real>(affine: &Affine<'_, R>) -> Vec<R> {
    affine.gamma.iter().zip(affine.rstd).map(|(gamma, rstd)| *gamma * *rstd).collect()
}

/// Cuts rows of `width` in two at a multiple of `step` rows: the number of elements on the left.
pub(super) fn cut(len: usize, width: usize, step: usize) -> Option<usize> {
    let rows = (len / width.max(1)).div_ceil(step) / 2 * step;
    if rows == 0 { None } else { Some(rows * width) }
}

/// `M` sums of every column.
pub(super) struct ColumnSums<R, const M: usize> {
    stride: usize,
    /// Whether memory is told of the rows to come: see [`Self::fetching`].
    ahead: bool,
    narrow: [Vec<R>; M],
    /// The sums.
    pub(super) wide: [Vec<f64>; M],
}

impl<R: Real, const M: usize> ColumnSums<R, M> {
    pub(super) fn new(width: usize) -> Self {
        Self::of(width, width)
    }

    /// Of `width` columns of rows that begin every `stride` elements.
    fn of(width: usize, stride: usize) -> Self {
        Self { stride, ahead: false, narrow: from_fn(|_| vec![R::ZERO; width]), wide: from_fn(|_| vec![0.0; width]) }
    }

    /// Of an array with this part, whose rows memory may have to be told of.
    pub(super) fn fetching<S>(self, part: &[S]) -> Self {
        Self { ahead: part.len() > CACHED && self.stride * size_of::<S>() <= SHORT, ..self }
    }

    pub(super) fn clear(&mut self) {
        for m in 0..M {
            self.wide[m].fill(0.0);
        }
    }

    /// Adds `f(x[..][r][c], v[..][c], w[r])` for each row r in order. w is 1 without weights.
    #[inline(always)]
    pub(super) fn add<S: Storage<Real = R>, const N: usize, const K: usize>(
        &mut self,
        level: Level,
        x: [&[S]; N],
        v: [&[R]; K],
        weights: Option<&[R]>,
        f: impl Fn([R; N], [R; K], R) -> [R; M],
    ) {
        let (width, stride) = (self.wide[0].len(), self.stride);
        let all = (x[0].len() + stride - width) / stride;
        let mut row = 0;
        while row < all {
            let rows = CHAIN.min(all - row);
            let part = x.map(|x| &x[row * stride..]);
            let weights = weights.map(|w| &w[row..row + rows]);
            add_rows(level, part, rows, stride, self.ahead, v, weights, self.chain(), &f);
            self.empty(level);
            row += rows;
        }
    }

    /// The sums of at most [`CHAIN`] rows in the arithmetic type, to be added to.
    #[inline(always)]
    pub(super) fn chain(&mut self) -> [&mut [R]; M] {
        self.narrow.each_mut().map(|narrow| &mut narrow[..])
    }

    /// Adds the sums of a chain to those in float64.
    #[inline(always)]
    pub(super) fn empty(&mut self, level: Level) {
        for (narrow, wide) in self.narrow.iter_mut().zip(&mut self.wide) {
            simd::enter(level, Empty { narrow, wide });
        }
    }
}

/// `wide += narrow; narrow = 0`. A part of other kernels: it is not split.
struct Empty<'a, R> {
    narrow: &'a mut [R],
    wide: &'a mut [f64],
}

impl<R: Real> Kernel for Empty<'_, R> {
    type Out = ();

    fn bytes(&self) -> usize {
        size_of_val(self.narrow) + size_of_val(self.wide)
    }

    fn halve(self) -> Result<(Self, Self), Self> {
        Err(self)
    }

    #[inline(always)]
    fn run(self, _: Level) {
        let Self { narrow, wide } = self;
        let (mut groups, mut c) = (wide.chunks_exact_mut(LANES), 0);
        for wide in &mut groups {
            let lanes: [R; LANES] = R::load(&narrow[c..c + LANES]);
            for l in 0..LANES {
                wide[l] += lanes[l].to_f64();
            }
            c += LANES;
        }
        for wide in groups.into_remainder() {
            *wide += narrow[c].to_f64();
            c += 1;
        }
        narrow.fill(R::ZERO);
    }

    fn merge(_: (), _: ()) {}
}

/// Adds `f(x[..][r][c], v[..][c], w[r])` to `sums[..][c]`, for each row r in order.
#[inline(always)]
fn add_rows<S: Storage, const N: usize, const K: usize, const M: usize>(
    level: Level,
    x: [&[S]; N],
    rows: usize,
    stride: usize,
    ahead: bool,
    v: [&[S::Real]; K],
    weights: Option<&[S::Real]>,
    mut sums: [&mut [S::Real]; M],
    f: &impl Fn([S::Real; N], [S::Real; K], S::Real) -> [S::Real; M],
) {
    let mut r = 0;
    while r + ROWS <= rows && !level.compact() {
        add_some::<S, N, K, M, ROWS>(
            level,
            x.map(|x| &x[r * stride..]),
            stride,
            ahead,
            &v,
            weights.map(|w| &w[r..]),
            &mut sums,
            f,
        );
        r += ROWS;
    }
    while r < rows {
        add_some::<S, N, K, M, 1>(
            level,
            x.map(|x| &x[r * stride..]),
            stride,
            ahead,
            &v,
            weights.map(|w| &w[r..]),
            &mut sums,
            f,
        );
        r += 1;
    }
}

/// Adds the first `B` rows.
#[inline(always)]
fn add_some<S: Storage, const N: usize, const K: usize, const M: usize, const B: usize>(
    level: Level,
    x: [&[S]; N],
    stride: usize,
    ahead: bool,
    v: &[&[S::Real]; K],
    weights: Option<&[S::Real]>,
    sums: &mut [&mut [S::Real]; M],
    f: &impl Fn([S::Real; N], [S::Real; K], S::Real) -> [S::Real; M],
) {
    // Every slice gets the same length here, so that the loops below need no bounds checks.
    let width = sums[0].len();
    let rows: [[&[S]; B]; N] = from_fn(|k| from_fn(|b| &x[k][b * stride..][..width]));
    let v = v.map(|v| &v[..width]);
    let mut sums = sums.each_mut().map(|sums| &mut sums[..width]);
    let w: [S::Real; B] = from_fn(|b| weights.map_or(S::Real::ONE, |w| w[b]));
    let groups = if level.compact() { 0 } else { width / LANES };
    {
        let rows: [[&[[S; LANES]]; B]; N] = from_fn(|k| from_fn(|b| &rows[k][b].as_chunks().0[..groups]));
        let v: [&[[S::Real; LANES]]; K] = v.map(|v| &v.as_chunks().0[..groups]);
        let mut sums = sums.each_mut().map(|sums| &mut sums.as_chunks_mut::<LANES>().0[..groups]);
        for i in 0..groups {
            if ahead && B > 1 && (i * size_of::<[S; LANES]>()).is_multiple_of(LINE) {
                for row in rows.as_flattened() {
                    simd::prefetch_at(row.as_flattened(), B * stride + i * LANES);
                }
            }
            add_group::<S, N, K, M, B>(level, &rows, &v, &w, &mut sums, i, f);
        }
    }
    if groups * LANES < width {
        let (rows, v) = (from_fn(|k| from_fn(|b| &rows[k][b][groups * LANES..])), v.map(|v| &v[groups * LANES..]));
        add_edge::<S, N, K, M, B>(rows, v, w, sums.map(|sums| &mut sums[groups * LANES..]), f);
    }
}

/// The few columns of a row after the groups, one by one; all columns at a compact level. Not inlined: one small copy
/// serves every level.
#[inline(never)]
fn add_edge<S: Storage, const N: usize, const K: usize, const M: usize, const B: usize>(
    rows: [[&[S]; B]; N],
    v: [&[S::Real]; K],
    w: [S::Real; B],
    sums: [&mut [S::Real]; M],
    f: &impl Fn([S::Real; N], [S::Real; K], S::Real) -> [S::Real; M],
) {
    for c in 0..sums[0].len() {
        // Of many arrays a wide loop would first look whether any two overlap: 9 KB of the wheel for machines without AVX2.
        let c = if N + K + M > 9 { black_box(c) } else { c };
        for b in 0..B {
            let values = f(from_fn(|k| rows[k][b][c].widen()), from_fn(|k| v[k][c]), w[b]);
            for m in 0..M {
                sums[m][c] = sums[m][c] + values[m];
            }
        }
    }
}

#[inline(always)]
fn add_group<S: Storage, const N: usize, const K: usize, const M: usize, const B: usize>(
    level: Level,
    rows: &[[&[[S; LANES]]; B]; N],
    v: &[&[[S::Real; LANES]]; K],
    w: &[S::Real; B],
    sums: &mut [&mut [[S::Real; LANES]]; M],
    i: usize,
    f: &impl Fn([S::Real; N], [S::Real; K], S::Real) -> [S::Real; M],
) {
    let v: [[S::Real; LANES]; K] = loads(level, v, i);
    let mut lanes: [[S::Real; LANES]; M] = from_fn(|m| sums[m][i]);
    for b in 0..B {
        let x: [[S::Real; LANES]; N] = loads(level, &from_fn(|k| rows[k][b]), i);
        for l in 0..LANES {
            let values = f(from_fn(|k| x[k][l]), from_fn(|k| v[k][l]), w[b]);
            for m in 0..M {
                lanes[m][l] = lanes[m][l] + values[m];
            }
        }
    }
    for m in 0..M {
        sums[m][i] = lanes[m];
    }
}

/// The moments of every column.
struct Stats<'a, S: Storage, const WEIGHTED: bool> {
    x: &'a [S],
    weights: Option<&'a [S::Real]>,
    width: usize,
}

/// See [`super::stats`].
pub(super) fn stats<S: Storage>(data: Data<'_, S>) -> Channels {
    stats_by(data, false)
}

/// The same, `alone` on this thread.
pub(super) fn stats_by<S: Storage>(data: Data<'_, S>, alone: bool) -> Channels {
    let Data { x, weights, shape: Shape { outer, channels, .. } } = data;
    let fold = if weights.is_some() { 1 } else { fold(channels, 64) };
    let (x, rest) = x.split_at(outer / fold * fold * channels);
    if weights.is_some() {
        return start(alone, Stats::<S, true> { x, weights, width: channels });
    }
    let folded = start(alone, Stats::<S, false> { x, weights, width: channels * fold });
    if fold == 1 {
        return folded;
    }
    let mut all = simd::run(Stats::<S, false> { x: rest, weights, width: channels });
    for k in 0..fold {
        let columns = k * channels..(k + 1) * channels;
        all.absorb(folded.count, &folded.mean[columns.clone()], &folded.m2[columns]);
    }
    all
}

impl<S: Storage, const WEIGHTED: bool> Kernel for Stats<'_, S, WEIGHTED> {
    type Out = Channels;

    const TOP: Level = if WEIGHTED { Level::Avx2 } else { S::TOP };

    fn bytes(&self) -> usize {
        size_of_val(self.x)
    }

    fn halve(self) -> Result<(Self, Self), Self> {
        let Some(at) = cut(self.x.len(), self.width, block_rows(self.width)) else { return Err(self) };
        let (left, right) = self.x.split_at(at);
        let (w_left, w_right) = self.weights.map(|w| w.split_at(at / self.width)).unzip();
        Ok((Self { x: left, weights: w_left, ..self }, Self { x: right, weights: w_right, ..self }))
    }

    #[inline(always)]
    fn run(self, level: Level) -> Channels {
        let mut all = Channels::empty(0, 0);
        for columns in steps(0..self.width, TILE) {
            all.append(self.tile(level, columns));
        }
        all
    }

    fn merge(left: Channels, right: Channels) -> Channels {
        left.merge(right)
    }
}

impl<S: Storage, const WEIGHTED: bool> Stats<'_, S, WEIGHTED> {
    /// The moments of some columns.
    #[inline(always)]
    fn tile(&self, level: Level, columns: Range<usize>) -> Channels {
        let (width, stride, zero) = (columns.len(), self.width, S::Real::ZERO);
        let mut state = Channels::empty(0, width);
        let (mut guessed, mut about) = (vec![zero; width], vec![zero; width]);
        let (mut mean, mut m2, mut wavers) = (vec![0.0; width], vec![0.0; width], vec![false; width]);
        let mut sums = ColumnSums::<S::Real, 2>::of(width, stride).fetching(self.x);
        let rows = block_rows(stride);
        for (b, x) in self.x.chunks(rows * stride).enumerate() {
            let weights = self.weights.filter(|_| WEIGHTED).map(|w| &w[b * rows..b * rows + x.len() / stride]);
            let count = match weights {
                None => (x.len() / stride) as f64,
                Some(weights) => weights.iter().map(|w| w.to_f64()).sum(),
            };
            let (inverse, x) = (inverse(count), &x[columns.start..]);
            for c in 0..width {
                guessed[c] = guess::<S>(state.count, state.mean[c], state.m2[c]);
            }
            about.copy_from_slice(&guessed);
            for look in 0..LOOKS {
                sums.clear();
                if WEIGHTED {
                    sums.add(level, [x], [&about], weights, move |[x], [about], w| {
                        let d = if w == zero { zero } else { x - about };
                        [w * d, w * d * d]
                    });
                } else {
                    sums.add(level, [x], [&about], None, move |[x], [about], _| {
                        let d = x - about;
                        [d, d * d]
                    });
                }
                let [first, second] = &sums.wide;
                let (first, second) = (&first[..width], &second[..width]);
                for c in 0..width {
                    let (moments, unsettled) = conclude(count, inverse, about[c], first[c], second[c]);
                    (mean[c], m2[c], wavers[c]) = (moments.mean, moments.m2, unsettled);
                }
                if !wavers.contains(&true) {
                    break;
                }
                for c in (0..width).filter(|c| wavers[*c]) {
                    about[c] = again::<S>(look, guessed[c], mean[c]);
                }
            }
            state.absorb(count, &mean, &m2);
        }
        state
    }
}
