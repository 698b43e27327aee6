//! How an array of planes is cut: into parts for threads, blocks for sums, tiles for memory.

use super::{Shape, small};
use crate::moments::BLOCK;
use std::ops::Range;

/// A channel's data up to this many bytes is read twice from cache rather than from memory.
const RESIDENT_BYTES: usize = 2 << 20;

/// Memory is read in runs of at least about this many bytes.
const RUN_BYTES: usize = 4096;

/// No more adjacent channels than this are walked together.
pub(super) const TILE: usize = 16;

/// Whether one pass over memory is enough: a channel's data, `size` bytes per element, stays in cache, and there are
/// channels enough for every thread.
pub fn resident(shape: Shape, size: usize) -> bool {
    let tile = tile(shape, size);
    shape.inner > 1
        && small::matrix(shape).is_none()
        && shape.channels >= 4
        && shape.count() * size * tile <= RESIDENT_BYTES
}

pub(super) fn tile(shape: Shape, size: usize) -> usize {
    RUN_BYTES.div_ceil((shape.inner * size).max(1)).clamp(1, TILE)
}

/// Consecutive planes of a channel, and the places in them.
pub(super) type Block = (Range<usize>, Range<usize>);

/// A part of an array that splits by channels, then by samples, then inside the plane.
#[derive(Clone)]
pub(super) struct Region {
    pub(super) shape: Shape,
    /// Channels stay whole where one pass over memory is enough: both ways of training then add in the same order.
    whole: bool,
    pub(super) channels: Range<usize>,
    outer: Range<usize>,
    inner: Range<usize>,
}

impl Region {
    /// All of an array of which a kernel reads `size` bytes per element.
    pub(super) fn all(shape: Shape, size: usize) -> Self {
        let whole = resident(shape, size);
        Self { shape, whole, channels: 0..shape.channels, outer: 0..shape.outer, inner: 0..shape.inner }
    }

    pub(super) fn len(&self) -> usize {
        self.channels.len() * self.outer.len() * self.inner.len()
    }

    pub(super) fn halve(self) -> Result<(Self, Self), Self> {
        let middle = |range: &Range<usize>, step: usize| range.start + range.len().div_ceil(step) / 2 * step;
        let (mut left, mut right) = (self.clone(), self.clone());
        if self.channels.len() > 1 {
            let at = middle(&self.channels, 1);
            (left.channels.end, right.channels.start) = (at, at);
        } else if self.whole {
            return Err(self);
        } else if self.outer.len() > self.block_planes() {
            let at = middle(&self.outer, self.block_planes());
            (left.outer.end, right.outer.start) = (at, at);
        } else if self.inner.len() > BLOCK {
            let at = middle(&self.inner, BLOCK);
            (left.inner.end, right.inner.start) = (at, at);
        } else {
            return Err(self);
        }
        Ok((left, right))
    }

    /// Two parts with whole tiles of channels, so that both read long runs.
    pub(super) fn halve_tiles(self, tile: usize) -> Option<(Self, Self)> {
        let channels = &self.channels;
        if channels.len() <= tile {
            return None;
        }
        let at = channels.start + channels.len().div_ceil(tile) / 2 * tile;
        let (mut left, mut right) = (self.clone(), self);
        (left.channels.end, right.channels.start) = (at, at);
        Some((left, right))
    }

    /// Consecutive planes of one channel that make a block.
    #[inline(always)]
    fn block_planes(&self) -> usize {
        (BLOCK / self.shape.inner.max(1)).max(1)
    }

    /// The blocks, in order.
    #[inline(always)]
    pub(super) fn blocks(&self) -> impl Iterator<Item = Block> + use<> {
        let (planes, outer, inner) = (self.block_planes(), self.outer.clone(), self.inner.clone());
        let per_plane = inner.len().div_ceil(BLOCK);
        (0..outer.len().div_ceil(planes) * per_plane).map(move |b| {
            let (n, i) = (outer.start + b / per_plane * planes, inner.start + b % per_plane * BLOCK);
            (n..(n + planes).min(outer.end), i..(i + BLOCK).min(inner.end))
        })
    }

    /// Where the places `inner` of plane (n, c) lie in the array.
    #[inline(always)]
    pub(super) fn at(&self, n: usize, c: usize, inner: &Range<usize>) -> Range<usize> {
        let plane = (n * self.shape.channels + c) * self.shape.inner;
        plane + inner.start..plane + inner.end
    }

    /// Where the weights of the places `inner` of sample n lie.
    #[inline(always)]
    pub(super) fn weight_at(&self, n: usize, inner: &Range<usize>) -> Range<usize> {
        n * self.shape.inner + inner.start..n * self.shape.inner + inner.end
    }
}

/// The same range of every sample's channels: what a kernel that splits by channel writes to.
pub(super) struct Samples<'a, S>(pub(super) Vec<&'a mut [S]>);

impl<'a, S> Samples<'a, S> {
    pub(super) fn new(y: &'a mut [S], shape: Shape) -> Self {
        Self(y.chunks_exact_mut(shape.channels * shape.inner).collect())
    }

    /// A part of it.
    pub(super) fn of(&mut self, at: Range<usize>) -> Vec<&mut [S]> {
        self.0.iter_mut().map(|y| &mut y[at.clone()]).collect()
    }

    pub(super) fn split(self, at: usize) -> (Self, Self) {
        let (left, right) = self.0.into_iter().map(|y| y.split_at_mut(at)).unzip();
        (Self(left), Self(right))
    }
}

/// The place at which `len` elements are cut in two.
pub(super) fn cut(len: usize) -> Option<usize> {
    if len < 2 * BLOCK { None } else { Some(len / 2 / BLOCK * BLOCK) }
}

/// The pieces of planes in elements `start..start + len`: (channel, run), the run counted from `start`.
#[inline(always)]
pub(super) fn pieces(shape: Shape, start: usize, len: usize) -> impl Iterator<Item = (usize, Range<usize>)> {
    let (inner, end) = (shape.inner.max(1), start + len);
    (start / inner..end.div_ceil(inner)).map(move |plane| {
        let (from, to) = ((plane * inner).max(start), ((plane + 1) * inner).min(end));
        (plane % shape.channels, from - start..to - start)
    })
}

/// What elementwise work walks: it reads x and a residual that may be there, and writes y.
pub(super) struct Walk<'a, S> {
    pub(super) x: &'a [S],
    pub(super) residual: Option<&'a [S]>,
    pub(super) y: &'a mut [S],
}

impl<S> Walk<'_, S> {
    /// Bytes read and written.
    pub(super) fn bytes(&self) -> usize {
        size_of_val(self.x) + size_of_val(self.y) + self.residual.map_or(0, size_of_val)
    }

    /// The first `at` elements, and the others.
    pub(super) fn split_at(self, at: usize) -> (Self, Self) {
        let (x, y) = (self.x.split_at(at), self.y.split_at_mut(at));
        let residual = self.residual.map(|r| r.split_at(at)).unzip();
        (Self { x: x.0, residual: residual.0, y: y.0 }, Self { x: x.1, residual: residual.1, y: y.1 })
    }
}
