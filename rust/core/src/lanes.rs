//! The loop that writes: [`map`] over runs of memory, in groups of 16 elements and the rest one by one. [`crate::sum`] is
//! the one that reads.

use crate::real::Real;
use crate::simd::{self, Level, STREAM_ALIGN, STREAM_BYTES};
use crate::storage::Storage;
use std::array::from_fn;
use std::hint::black_box;
use std::ops::Range;

/// Elements that are handled together: one 512-bit register of f32, two 256-bit ones.
pub const LANES: usize = 16;

/// Bytes of a line of cache.
pub const LINE: usize = 64;

/// Writes `y[m][i] = f(x[..][i], v[..][i])[m]` for every `i`. Meanwhile, where stores are streamed, memory fetches `ahead`.
#[inline(always)]
pub fn map<S: Storage, const N: usize, const K: usize, const M: usize, const A: usize>(
    level: Level,
    x: [&[S]; N],
    v: [&[S::Real]; K],
    y: [&mut [S]; M],
    stores: Stores,
    ahead: [&[S]; A],
    f: impl Fn([S::Real; N], [S::Real; K]) -> [S::Real; M] + Copy,
) {
    map_add(level, x, v, y, [], stores, ahead, move |x, v| (f(x, v), []));
}

/// As [`map`], where `f` also gives what is added to `sums[..][i]`.
#[inline(always)]
pub fn map_add<S: Storage, const N: usize, const K: usize, const M: usize, const B: usize, const A: usize>(
    level: Level,
    x: [&[S]; N],
    v: [&[S::Real]; K],
    mut y: [&mut [S]; M],
    mut sums: [&mut [S::Real]; B],
    stores: Stores,
    ahead: [&[S]; A],
    f: impl Fn([S::Real; N], [S::Real; K]) -> ([S::Real; M], [S::Real; B]) + Copy,
) {
    let n = y[0].len();
    if level.compact() {
        return fours_apart(x, v, y, sums, f);
    }
    let (mut at, mut apart) = (0, false);
    // Two groups of 16-bit elements make a line. With sums beside them they do not fit in registers.
    let pairs = size_of::<S>() < 4 && B == 0;
    if let Stores::Streamed { from } = stores {
        // With ordinary stores up to there; an output out of step with the first uses them throughout.
        let offset = y[0].as_ptr().align_offset(from);
        if offset > 0 && offset < LINE / size_of::<S>() {
            at = offset.min(n);
            let (y, sums) = (y.each_mut().map(|y| &mut y[..at]), sums.each_mut().map(|sums| &mut sums[..at]));
            few(x.map(|x| &x[..at]), v.map(|v| &v[..at]), y, sums, f);
        }
        let step = if pairs { 2 * LANES } else { LANES };
        let to = at + (n - at) / step * step;
        let (x, v) = (x.map(|x| &x[at..to]), v.map(|v| &v[at..to]));
        let (y, sums) = (y.each_mut().map(|y| &mut y[at..to]), sums.each_mut().map(|sums| &mut sums[at..to]));
        if pairs {
            groups::<S, N, K, M, B, { 2 * LANES }, A>(level, true, x, v, y, sums, ahead, f);
        } else {
            groups::<S, N, K, M, B, LANES, A>(level, true, x, v, y, sums, ahead, f);
        }
        (at, apart) = (to, pairs && n - to >= LANES);
    } else if pairs && N == 1 {
        // With more inputs it is no faster in a cache.
        at = n / (2 * LANES) * (2 * LANES);
        let (y, sums) = (y.each_mut().map(|y| &mut y[..at]), sums.each_mut().map(|sums| &mut sums[..at]));
        let (x, v) = (x.map(|x| &x[..at]), v.map(|v| &v[..at]));
        groups::<S, N, K, M, B, { 2 * LANES }, 0>(level, false, x, v, y, sums, [], f);
    }
    let to = at + (n - at) / LANES * LANES;
    if at < to {
        // Half a line is streamed as well: runs that follow each other in memory complete it.
        let mut half = [[S::default(); LANES]; M];
        let out = if apart { half.each_mut().map(|half| &mut half[..]) } else { y.each_mut().map(|y| &mut y[at..to]) };
        let (x, v, sums) =
            (x.map(|x| &x[at..to]), v.map(|v| &v[at..to]), sums.each_mut().map(|sums| &mut sums[at..to]));
        groups::<S, N, K, M, B, LANES, 0>(level, false, x, v, out, sums, [], f);
        if apart {
            for m in 0..M {
                simd::stream(level, &half[m], &mut y[m][at..to]);
            }
        }
    }
    if to < n {
        let (y, sums) = (y.each_mut().map(|y| &mut y[to..]), sums.each_mut().map(|sums| &mut sums[to..n]));
        few(x.map(|x| &x[to..n]), v.map(|v| &v[to..n]), y, sums, f);
    }
}

/// As [`map`], where [`Stores::whole`] holds for every output.
#[inline(always)]
pub fn map_whole<S: Storage, const N: usize, const K: usize, const M: usize>(
    level: Level,
    x: [&[S]; N],
    v: [&[S::Real]; K],
    y: [&mut [S]; M],
    stores: Stores,
    f: impl Fn([S::Real; N], [S::Real; K]) -> [S::Real; M] + Copy,
) {
    let stream = stores != Stores::Cached;
    groups::<S, N, K, M, 0, LANES, 0>(level, stream, x, v, y, [], [], move |x, v| (f(x, v), []));
}

/// The whole groups of `L` places.
#[inline(always)]
fn groups<
    S: Storage,
    const N: usize,
    const K: usize,
    const M: usize,
    const B: usize,
    const L: usize,
    const A: usize,
>(
    level: Level,
    stream: bool,
    x: [&[S]; N],
    v: [&[S::Real]; K],
    y: [&mut [S]; M],
    sums: [&mut [S::Real]; B],
    ahead: [&[S]; A],
    f: impl Fn([S::Real; N], [S::Real; K]) -> ([S::Real; M], [S::Real; B]) + Copy,
) {
    // Else compilers work out the slices again for every group, to save registers.
    let (x, v, y, sums) = black_box((x, v, y, sums));
    let n = y[0].len() / L;
    let (x, v) = (x.map(|x| &x.as_chunks::<L>().0[..n]), v.map(|v| &v.as_chunks::<L>().0[..n]));
    let y = y.map(|y| &mut y.as_chunks_mut::<L>().0[..n]);
    let sums = sums.map(|sums| &mut sums.as_chunks_mut::<L>().0[..n]);
    let ahead = ahead.map(|ahead| ahead.as_chunks::<L>().0);
    for i in 0..n {
        // Else they see that no place is out of bounds, and spread the loop over several groups: shuffles without end.
        let i = black_box(i);
        if i % (LINE / size_of::<S>() / L).max(1) == 0 {
            for ahead in ahead {
                if i < ahead.len() {
                    simd::prefetch_far(&ahead[i]);
                }
            }
        }
        let x: [[S::Real; L]; N] = settled::<S, N, K, L>(level, &x, i);
        let v: [[S::Real; L]; K] = loads(level, &v, i);
        let (mut out, mut add) = ([[S::Real::ZERO; L]; M], [[S::Real::ZERO; L]; B]);
        for l in 0..L {
            let (values, terms) = f(from_fn(|k| x[k][l]), from_fn(|k| v[k][l]));
            for m in 0..M {
                out[m][l] = values[m];
            }
            for b in 0..B {
                add[b][l] = terms[b];
            }
        }
        for b in 0..B {
            for l in 0..L {
                sums[b][i][l] = sums[b][i][l] + add[b][l];
            }
        }
        for m in 0..M {
            if stream {
                S::stream(level, out[m], &mut y[m][i]);
            } else {
                S::store_at(level, out[m], &mut y[m][i]);
            }
        }
    }
}

/// Less than a line: four by four, then one by one.
#[inline(always)]
fn few<S: Storage, const N: usize, const K: usize, const M: usize, const B: usize>(
    x: [&[S]; N],
    v: [&[S::Real]; K],
    y: [&mut [S]; M],
    sums: [&mut [S::Real]; B],
    f: impl Fn([S::Real; N], [S::Real; K]) -> ([S::Real; M], [S::Real; B]) + Copy,
) {
    // The call is a tenth of what a run of 3 KB takes: f32 has a copy in every loop, for half a percent of the wheel.
    if size_of::<S>() == 4 { fours(x, v, y, sums, f) } else { fours_apart(x, v, y, sums, f) }
}

/// Not inlined, nor is [`edge`]: one small copy serves every level. By value: a loop beside it could not keep in registers
/// what another function may see.
#[inline(never)]
fn fours_apart<S: Storage, const N: usize, const K: usize, const M: usize, const B: usize>(
    x: [&[S]; N],
    v: [&[S::Real]; K],
    y: [&mut [S]; M],
    sums: [&mut [S::Real]; B],
    f: impl Fn([S::Real; N], [S::Real; K]) -> ([S::Real; M], [S::Real; B]) + Copy,
) {
    fours(x, v, y, sums, f);
}

#[inline(always)]
fn fours<S: Storage, const N: usize, const K: usize, const M: usize, const B: usize>(
    x: [&[S]; N],
    v: [&[S::Real]; K],
    mut y: [&mut [S]; M],
    mut sums: [&mut [S::Real]; B],
    f: impl Fn([S::Real; N], [S::Real; K]) -> ([S::Real; M], [S::Real; B]) + Copy,
) {
    let at = y[0].len() / 4 * 4;
    if at > 0 {
        let (y, sums) = (y.each_mut().map(|y| &mut y[..at]), sums.each_mut().map(|sums| &mut sums[..at]));
        let (x, v) = (x.map(|x| &x[..at]), v.map(|v| &v[..at]));
        groups::<S, N, K, M, B, 4, 0>(Level::Baseline, false, x, v, y, sums, [], f);
    }
    if at < y[0].len() {
        let (y, sums) = (y.each_mut().map(|y| &mut y[at..]), sums.each_mut().map(|sums| &mut sums[at..]));
        edge(x.map(|x| &x[at..]), v.map(|v| &v[at..]), y, sums, f);
    }
}

/// Places one by one.
#[inline(never)]
fn edge<S: Storage, const N: usize, const K: usize, const M: usize, const B: usize>(
    x: [&[S]; N],
    v: [&[S::Real]; K],
    y: [&mut [S]; M],
    sums: [&mut [S::Real]; B],
    f: impl Fn([S::Real; N], [S::Real; K]) -> ([S::Real; M], [S::Real; B]),
) {
    for i in 0..y[0].len() {
        let i = black_box(i); // else there would be a second, wide loop for up to three places
        let (values, terms) = f(from_fn(|k| x[k][i].widen()), from_fn(|k| v[k][i]));
        for b in 0..B {
            sums[b][i] = sums[b][i] + terms[b];
        }
        for m in 0..M {
            y[m][i] = S::narrow(values[m]);
        }
    }
}

/// The values of one group of each array. A loop, as `from_fn` may become a function of its own, outside the door of the
/// kernel.
#[inline(always)]
pub fn loads<S: Storage, const N: usize, const L: usize>(
    level: Level,
    x: &[&[[S; L]]; N],
    group: usize,
) -> [[S::Real; L]; N] {
    let mut values = [[S::Real::ZERO; L]; N];
    for k in 0..N {
        values[k] = S::load_at(level, &x[k][group]);
    }
    values
}

/// [`loads`] for a function that also takes `K` vectors. With few of them the values meet plain numbers first.
#[inline(always)]
pub fn settled<S: Storage, const N: usize, const K: usize, const L: usize>(
    level: Level,
    x: &[&[[S; L]]; N],
    group: usize,
) -> [[S::Real; L]; N] {
    #[repr(align(64))]
    struct Line<T>(T);
    let mut values = Line(loads(level, x, group));
    if size_of::<S>() < size_of::<S::Real>() && (K == 0 || N == 1 && K < 3) {
        simd::settle(level, &mut values.0);
    }
    values.0
}

/// How an output is written: through the caches, or past them from the first place of each run that has this alignment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stores {
    /// Ordinary stores.
    Cached,
    /// Streaming stores.
    Streamed {
        /// The alignment, in bytes, at which they start.
        from: usize,
    },
}

impl Stores {
    /// Whether rows of `width` elements are whole groups of lanes, to be written in this way from their first place on.
    pub fn whole<S>(self, y: &[S], width: usize) -> bool {
        let started = match self {
            Stores::Cached => true,
            Stores::Streamed { from } => {
                y.as_ptr().addr().is_multiple_of(from) && (width * size_of::<S>()).is_multiple_of(from)
            }
        };
        started && width.is_multiple_of(LANES)
    }

    /// For an output that is written in runs of `run` elements of which few follow each other in memory, while `reads` arrays
    /// like it are read: whole lines, but for runs of whole groups that end in the middle of one, where the beginning of
    /// each would take longer.
    pub fn apart<S>(y: &[S], run: usize, reads: usize) -> Self {
        Self::of(y.as_ptr().addr(), size_of_val(y) * (1 + reads), run, size_of::<S>(), false)
    }

    /// For an output whose runs follow each other in memory: each completes the line that the last one began.
    pub fn joined<S>(y: &[S], run: usize, reads: usize) -> Self {
        Self::of(y.as_ptr().addr(), size_of_val(y) * (1 + reads), run, size_of::<S>(), true)
    }

    /// For memory from `place` on, in runs of `run` elements of `size` bytes, by a call that touches `bytes`.
    #[inline(never)]
    fn of(place: usize, bytes: usize, run: usize, size: usize, joined: bool) -> Self {
        // Whether every group of every run can be streamed.
        let groups = place.is_multiple_of(STREAM_ALIGN) && run.is_multiple_of(LANES);
        let lines = (run * size).is_multiple_of(LINE);
        if bytes < STREAM_BYTES || run * size < 1024 && !(joined && groups) {
            Stores::Cached
        } else {
            Stores::Streamed { from: if groups && (joined || !lines) { STREAM_ALIGN } else { LINE } }
        }
    }
}

/// `range` in pieces of `step`. Without a division, unlike `step_by`.
#[inline(always)]
pub fn steps(range: Range<usize>, step: usize) -> impl Iterator<Item = Range<usize>> {
    let Range { mut start, end } = range;
    std::iter::from_fn(move || {
        let at = start..end.min(start + step);
        start = at.end;
        (!at.is_empty()).then_some(at)
    })
}
