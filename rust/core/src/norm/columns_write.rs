//! Channels last: the normalised rows, from what [`super::columns`] found.

use super::columns::{cut, fold, repeat, scale};
use super::region::Walk;
use super::{Affine, Shape, centred, floor, floored, start};
use crate::kernel::Kernel;
use crate::lanes::{Stores, map, map_whole};
use crate::simd::Level;
use crate::storage::Storage;
use std::array::from_fn;

/// The normalised rows; the vectors are as long as a row.
struct Apply<'a, S: Storage> {
    walk: Walk<'a, S>,
    vectors: [&'a [S::Real]; 4],
    floor: S::Real,
    stores: Stores,
}

/// Vectors of this many columns come from the second cache: it is worth reading them for several rows at once.
const WIDE: usize = 4096;

/// Whether rows of `width` are written several at once. Those of float64, which are rare, are not: it is much code.
#[inline(always)]
pub(super) fn together<S: Storage>(level: Level, stores: Stores, y: &[S], width: usize) -> bool {
    size_of::<S>() < size_of::<f64>() && width >= WIDE && stores.whole(y, width) && !level.compact()
}

/// Elementwise work sees rows of at least this many elements.
pub(super) const ROW: usize = 512;

/// See [`super::apply`], which checks the lengths.
pub(super) fn apply<S: Storage>(
    x: &[S],
    shape: Shape,
    affine: Affine<'_, S::Real>,
    residual: Option<&[S]>,
    relu: bool,
    y: &mut [S],
) {
    let stores = Stores::joined(y, shape.channels * fold(shape.channels, ROW.min(shape.len())), 1);
    apply_by(x, shape, affine, residual, relu, y, stores, false);
}

/// The same with these stores, `alone` on this thread.
pub(super) fn apply_by<S: Storage>(
    x: &[S],
    shape: Shape,
    affine: Affine<'_, S::Real>,
    residual: Option<&[S]>,
    relu: bool,
    y: &mut [S],
    stores: Stores,
    alone: bool,
) {
    let times = fold(shape.channels, ROW.min(shape.len()));
    let scale = scale(&affine);
    let vectors = [affine.hi, affine.lo, &scale, affine.beta].map(|v| repeat(v, times));
    let walk = Walk { x, residual, y };
    start(alone, Apply { walk, vectors: from_fn(|k| &*vectors[k]), floor: floor(relu), stores });
}

impl<S: Storage> Kernel for Apply<'_, S> {
    type Out = ();

    const TOP: Level = S::TOP;

    fn bytes(&self) -> usize {
        self.walk.bytes()
    }

    fn halve(self) -> Result<(Self, Self), Self> {
        let Some(at) = cut(self.walk.y.len(), self.vectors[0].len(), 1) else { return Err(self) };
        let (left, right) = self.walk.split_at(at);
        Ok((Self { walk: left, ..self }, Self { walk: right, ..self }))
    }

    #[inline(always)]
    fn run(self, level: Level) {
        let Self { walk: Walk { x, residual, y }, vectors, floor, stores } = self;
        let width = vectors[0].len().max(1);
        let f = move |x, [hi, lo, scale, beta]: [S::Real; 4]| floored(centred(x, hi, lo) * scale + beta, floor);
        let mut first = 0;
        if residual.is_none() && together(level, stores, y, width) {
            for (x, y) in x.chunks_exact(4 * width).zip(y.chunks_exact_mut(4 * width)) {
                let ((x, far), (y, far_y)) = (x.split_at(2 * width), y.split_at_mut(2 * width));
                let ((a, b), (c, d)) = (x.split_at(width), far.split_at(width));
                let ((p, q), (r, s)) = (y.split_at_mut(width), far_y.split_at_mut(width));
                let one = move |[a, b, c, d]: [S::Real; 4], v| [f(a, v), f(b, v), f(c, v), f(d, v)];
                map_whole(level, [a, b, c, d], vectors, [p, q, r, s], stores, one);
                first += 4;
            }
        }
        for (r, y) in (first..).zip(y[first * width..].chunks_mut(width)) {
            let at = r * width..r * width + y.len();
            let x = &x[at.clone()];
            match residual {
                None => map(level, [x], vectors, [y], stores, [], move |[x], v| [f(x, v)]),
                Some(r) => map(level, [x, &r[at]], vectors, [y], stores, [], move |[x, r], [hi, lo, scale, beta]| {
                    [floored(centred(x, hi, lo) * scale + beta + r, floor)]
                }),
            }
        }
    }

    fn merge(_: (), _: ()) {}
}
