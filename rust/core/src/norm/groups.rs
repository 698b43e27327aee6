//! Group norm (Wu, He 2018, arXiv:1803.08494), forward; instance norm is that with one group per channel.
//!
//! Channels first, a group of a sample is a run of memory: it is summed as a plane of [`super::planes`] is, and written
//! while it is still in cache, a chunk of groups at a time. Channels last, a sample is a matrix of rows whose columns are
//! summed side by side as in [`super::columns`]; the moments of a group's columns merge.

pub use super::groups_backward::{Reads, backward};
use super::region::cut;
use super::{Affine, Data, Shape, centred, columns, columns_write, planes, small, start};
use crate::error::{Error, length};
use crate::kernel::Kernel;
use crate::lanes::{Stores, map, steps};
use crate::moments::Channels;
use crate::real::{Real, split};
use crate::simd::Level;
use crate::storage::Storage;
use std::borrow::Cow;
use std::ops::Range;

/// Small groups are summed and written in chunks of about this many bytes, which stay in the second cache.
const CHUNK_BYTES: usize = 128 << 10;

/// Chunks of up to this many bytes are fetched while the one before is written.
const AHEAD_BYTES: usize = 384 << 10;

/// Of more places than this a channel is a run with one gamma and beta; else each place of a sample has its own.
const RUN: usize = 64;

/// An array of samples whose channels are normalised in groups of adjacent ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grouped {
    samples: usize,
    channels: usize,
    inner: usize,
    groups: usize,
    last: bool,
}

impl Grouped {
    /// Samples of `channels` times `inner` elements, or of `inner` times `channels` with the channels `last`.
    pub fn new(samples: usize, channels: usize, inner: usize, groups: usize, last: bool) -> Result<Self, Error> {
        if groups == 0 || !channels.is_multiple_of(groups) {
            let wanted = format_args!("a divisor of the {channels} channels");
            return Err(Error::new("groups", wanted, groups));
        }
        Ok(Self { samples, channels, inner, groups, last: last && inner > 1 })
    }

    /// How many channels.
    pub fn channels(&self) -> usize {
        self.channels
    }

    /// How many groups all samples have.
    pub fn groups(&self) -> usize {
        self.samples * self.groups
    }

    /// How many elements.
    pub fn len(&self) -> usize {
        self.samples * self.channels * self.inner
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Elements of a group.
    pub fn count(&self) -> usize {
        self.width() * self.inner
    }

    /// Channels of a group.
    pub(super) fn width(&self) -> usize {
        self.channels / self.groups
    }

    /// Whether channels come last.
    pub(super) fn last(&self) -> bool {
        self.last
    }

    /// Whether gamma and beta are vectors with one value for each place of a sample.
    pub(super) fn by_place(&self) -> bool {
        !self.last && self.inner <= RUN
    }

    /// The length of runs with one mean, and one gamma unless that is a vector.
    pub(super) fn run(&self) -> usize {
        if self.by_place() { self.count() } else { self.inner }
    }

    /// The array of `groups` groups as planes, one per group.
    pub(super) fn planes(&self, groups: usize) -> Shape {
        Shape { outer: 1, channels: groups, inner: self.count() }
    }

    /// A sample with its channels last.
    pub(super) fn rows(&self) -> Shape {
        Shape { outer: self.inner, channels: self.channels, inner: 1 }
    }

    /// Groups that are handled together when `size` bytes are read per element: of whole samples with channels last.
    pub(super) fn chunk(&self, size: usize) -> usize {
        if self.last { self.groups } else { (CHUNK_BYTES / (self.count() * size)).max(1) }
    }

    /// Whether a chunk is one thread's work: there are chunks enough for all, or they are too small to share.
    pub(super) fn alone(&self, size: usize) -> bool {
        let (chunks, bytes) = (self.groups() / self.chunk(size), self.chunk(size) * self.count() * size);
        chunks >= 32 || chunks >= 4 && bytes < 16 << 20
    }

    /// A vector with one value per channel, or with one for each place of a sample where that is asked for.
    pub(super) fn spread<'a, R: Real>(&self, v: &'a [R]) -> Cow<'a, [R]> {
        if !self.by_place() || self.inner == 1 {
            return Cow::Borrowed(v);
        }
        Cow::Owned(small::spread(v, self.inner))
    }

    /// How an output is written while `reads` arrays like it are read.
    pub(super) fn stores<S: Storage>(&self, y: &[S], reads: usize) -> Stores {
        let row = || self.channels * columns::fold(self.channels, columns_write::ROW.min(y.len() / self.samples));
        Stores::joined(y, if self.last { row() } else { self.run() }, reads)
    }
}

/// Mean, as hi + lo, and 1 / sqrt(var + eps) of some groups.
#[inline(never)]
pub(super) fn saved<R: Real>(count: usize, mean: &[f64], m2: &[f64], eps: f64) -> Vec<[R; 3]> {
    let mut all = Vec::with_capacity(mean.len());
    for (mean, m2) in mean.iter().zip(m2) {
        let (hi, lo) = split(*mean);
        all.push([hi, lo, R::from_f64(1.0 / (m2 / count as f64 + eps).sqrt())]);
    }
    all
}

/// What is saved of groups, as vectors with one value per channel.
pub(super) fn per_channel<R: Real>(saved: &[[R; 3]], width: usize) -> [Vec<R>; 3] {
    [0, 1, 2].map(|k| saved.iter().flat_map(|group| std::iter::repeat_n(group[k], width)).collect())
}

/// The moments of each group, from those of its columns, all of the same count. Means are taken about the first, so that
/// equal ones give no variance.
#[inline(never)]
fn merge_columns(columns: &Channels, mean: &mut [f64], m2: &mut [f64]) {
    let width = columns.mean.len() / mean.len();
    for g in 0..mean.len() {
        let (means, m2s) = (&columns.mean[g * width..(g + 1) * width], &columns.m2[g * width..(g + 1) * width]);
        let first = means[0];
        let mut sum = 0.0;
        for mean in means {
            sum += mean - first;
        }
        let centre = first + sum / width as f64;
        let (mut within, mut between) = (0.0, 0.0);
        for (mean, m2) in means.iter().zip(m2s) {
            within += m2;
            between += (mean - centre) * (mean - centre);
        }
        (mean[g], m2[g]) = (centre, within + between * columns.count);
    }
}

/// Normalises: `y = (x - mean) / sqrt(m2 / count + eps) * gamma + beta`, mean and m2 over each group of each sample.
pub fn forward<S: Storage>(
    x: &[S],
    shape: Grouped,
    eps: f64,
    gamma: &[S::Real],
    beta: &[S::Real],
    mean: &mut [f64],
    m2: &mut [f64],
    y: &mut [S],
) -> Result<(), Error> {
    length("x", x, shape.len())?;
    length("y", y, shape.len())?;
    for (name, slice) in [("gamma", gamma), ("beta", beta)] {
        length(name, slice, shape.channels)?;
    }
    for (name, slice) in [("mean", &*mean), ("m2", &*m2)] {
        length(name, slice, shape.groups())?;
    }
    if shape.is_empty() {
        mean.fill(0.0);
        m2.fill(0.0);
        return Ok(());
    }
    let reads = if shape.last { 1 } else { 2 }; // runs are looked at twice
    let (gamma, beta, stores) = (&*shape.spread(gamma), &*shape.spread(beta), shape.stores(y, reads));
    let alone = shape.alone(size_of::<S>());
    start(!alone, Forward { x, shape, eps, gamma, beta, first: 0, stores, alone, mean, m2, y });
    Ok(())
}

/// Moments and normalised groups, from the group `first` on: chunk by chunk, with kernels that have doors of their own.
struct Forward<'a, S: Storage> {
    x: &'a [S],
    shape: Grouped,
    eps: f64,
    gamma: &'a [S::Real],
    beta: &'a [S::Real],
    first: usize,
    stores: Stores,
    alone: bool,
    mean: &'a mut [f64],
    m2: &'a mut [f64],
    y: &'a mut [S],
}

impl<S: Storage> Forward<'_, S> {
    /// The groups `chunk`, counted from `first`.
    fn rows(&mut self, chunk: Range<usize>) {
        let (shape, count) = (self.shape, self.shape.count());
        let (x, y) =
            (&self.x[chunk.start * count..chunk.end * count], &mut self.y[chunk.start * count..chunk.end * count]);
        let (mean, m2) = (&mut self.mean[chunk.clone()], &mut self.m2[chunk]);
        let rows = shape.rows();
        merge_columns(&columns::stats_by(Data { x, weights: None, shape: rows }, self.alone), mean, m2);
        let [hi, lo, rstd] = &per_channel(&saved::<S::Real>(count, mean, m2, self.eps), shape.width());
        let affine = Affine { hi, lo, rstd, gamma: self.gamma, beta: self.beta };
        columns_write::apply_by(x, rows, affine, None, false, y, self.stores, self.alone);
    }

    /// The groups `chunk`, counted from `first`, channels first.
    fn runs(&mut self, chunk: Range<usize>) {
        let (shape, count) = (self.shape, self.shape.count());
        let at = chunk.start * count..chunk.end * count;
        let (x, ahead) = self.x[at.start..].split_at(at.len());
        let data = Data { x, weights: None, shape: shape.planes(chunk.len()) };
        let found = start(self.alone, planes::Stats::<S, false>::new(data));
        self.mean[chunk.clone()].copy_from_slice(&found.mean);
        self.m2[chunk.clone()].copy_from_slice(&found.m2);
        let apply = Apply {
            x,
            ahead: if size_of_val(x) <= AHEAD_BYTES { ahead } else { &[] },
            saved: &saved(count, &found.mean, &found.m2, self.eps),
            shape,
            gamma: self.gamma,
            beta: self.beta,
            first: self.first + chunk.start,
            start: 0,
            stores: self.stores,
            y: &mut self.y[at],
        };
        start(self.alone, apply);
    }
}

impl<S: Storage> Kernel for Forward<'_, S> {
    type Out = ();

    const TOP: Level = S::TOP;

    fn bytes(&self) -> usize {
        2 * size_of_val(self.x)
    }

    fn halve(self) -> Result<(Self, Self), Self> {
        let chunk = self.shape.chunk(size_of::<S>());
        let at = self.mean.len().div_ceil(chunk) / 2 * chunk;
        if at == 0 {
            return Err(self);
        }
        let elements = at * self.shape.count();
        let (x, y) = (self.x.split_at(elements), self.y.split_at_mut(elements));
        let (mean, m2) = (self.mean.split_at_mut(at), self.m2.split_at_mut(at));
        let left = Self { x: x.0, mean: mean.0, m2: m2.0, y: y.0, ..self };
        Ok((left, Self { x: x.1, mean: mean.1, m2: m2.1, y: y.1, first: self.first + at, ..self }))
    }

    #[inline(always)]
    fn run(mut self, _: Level) {
        let (groups, step) = (self.mean.len(), self.shape.chunk(size_of::<S>()));
        for chunk in steps(0..groups, step) {
            if self.shape.last { self.rows(chunk) } else { self.runs(chunk) }
        }
    }

    fn merge(_: (), _: ()) {}
}

/// Groups that are runs of memory, normalised: elements `start..start + y.len()` of those from the group `first` on.
struct Apply<'a, S: Storage> {
    x: &'a [S],
    ahead: &'a [S],
    saved: &'a [[S::Real; 3]],
    shape: Grouped,
    gamma: &'a [S::Real],
    beta: &'a [S::Real],
    first: usize,
    start: usize,
    stores: Stores,
    y: &'a mut [S],
}

impl<S: Storage> Kernel for Apply<'_, S> {
    type Out = ();

    const TOP: Level = S::TOP;

    fn bytes(&self) -> usize {
        size_of_val(self.x) + size_of_val(self.y)
    }

    fn halve(self) -> Result<(Self, Self), Self> {
        let Some(at) = cut(self.y.len()) else { return Err(self) };
        let (x, y) = (self.x.split_at(at), self.y.split_at_mut(at));
        let left = Self { x: x.0, ahead: &[], y: y.0, ..self };
        Ok((left, Self { x: x.1, ahead: &[], y: y.1, start: self.start + at, ..self }))
    }

    #[inline(always)]
    fn run(self, level: Level) {
        let Self { x, ahead, saved, shape, gamma, beta, stores, y, .. } = self;
        for Run { group, channel, place, at } in runs(shape, self.first, self.start, y.len()) {
            let [hi, lo, rstd] = saved[group];
            let (x, ahead) = (&x[at.clone()], ahead.get(at.clone()).unwrap_or(&[]));
            let y = &mut y[at];
            if shape.by_place() {
                let [gamma, beta] = [gamma, beta].map(|v| &v[place..place + x.len()]);
                map(level, [x], [gamma, beta], [y], stores, [ahead], move |[x], [gamma, beta]| {
                    [centred(x, hi, lo) * (gamma * rstd) + beta]
                });
            } else {
                let (scale, beta) = (gamma[channel] * rstd, beta[channel]);
                map(level, [x], [], [y], stores, [ahead], move |[x], []| [centred(x, hi, lo) * scale + beta]);
            }
        }
    }

    fn merge(_: (), _: ()) {}
}

/// Elements with one mean: a group, or a channel of it where that has one gamma.
pub(super) struct Run {
    /// The group, counted from the first of a chunk.
    pub(super) group: usize,
    /// The channel, where the run is one.
    pub(super) channel: usize,
    /// Where the run starts in its sample.
    pub(super) place: usize,
    /// Where it lies in the slice that is walked.
    pub(super) at: Range<usize>,
}

/// The runs of elements `start..start + len` of a chunk whose first group is `first`.
#[inline(always)]
pub(super) fn runs(shape: Grouped, first: usize, start: usize, len: usize) -> impl Iterator<Item = Run> {
    let (count, unit, sample) = (shape.count(), shape.run(), shape.channels * shape.inner);
    let (mut group, mut at, mut place) = (start / count, 0, (first * count + start) % sample);
    let (mut channel, mut left) = (place / unit, count - start % count);
    std::iter::from_fn(move || {
        if at == len {
            return None;
        }
        // The first run may begin, and the last one end, inside a unit.
        let whole = if at == 0 { unit - place % unit } else { unit };
        let run = Run { group, channel, place, at: at..len.min(at + whole) };
        (at, place, channel, left) = (run.at.end, place + whole, channel + 1, left - whole.min(left));
        if left == 0 {
            (group, left) = (group + 1, count);
        }
        if place == sample {
            (place, channel) = (0, 0);
        }
        Some(run)
    })
}
