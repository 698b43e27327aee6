//! The two loops that kernels are made of: [`map`] over runs of memory and [`Sum`] over runs of memory.
//!
//! Both walk fixed groups of 16 elements and treat the rest one by one. In a sum, the lane of an element depends on its
//! place in the run, never on its address.

use crate::real::Real;
use crate::simd::{self, Level, STREAM_ALIGN, STREAM_BYTES};
use crate::storage::Storage;
use std::array::from_fn;
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
    let x = x.map(|x| &x[..n]);
    let v = v.map(|v| &v[..n]);
    let mut y = y.each_mut().map(|y| &mut y[..n]);
    let mut sums = sums.each_mut().map(|sums| &mut sums[..n]);
    let (mut i, mut stream) = (0, false);
    if level.compact() {
        return edge(&x, &v, &mut y, &mut sums, 0..n, &{ f });
    }
    if let Stores::Streamed { from } = stores {
        // With ordinary stores up to there; an output out of step with the first uses them throughout.
        let head = y[0].as_ptr().align_offset(from);
        let head = if head < LINE / size_of::<S>() { head.min(n) } else { 0 };
        few(&x, &v, &mut y, &mut sums, 0..head, f);
        (i, stream) = (head, true);
    }
    while i + LANES <= n {
        if stream {
            for ahead in ahead {
                if i < ahead.len() {
                    simd::prefetch_far(&ahead[i]);
                }
            }
        }
        group::<S, N, K, M, B, LANES>(level, stream, &x, &v, &mut y, &mut sums, i, &f);
        i += LANES;
    }
    few(&x, &v, &mut y, &mut sums, i..n, f);
}

/// As [`map`], where [`Stores::whole`] holds for every output.
#[inline(always)]
pub fn map_whole<S: Storage, const N: usize, const K: usize, const M: usize>(
    level: Level,
    x: [&[S]; N],
    v: [&[S::Real]; K],
    mut y: [&mut [S]; M],
    stores: Stores,
    f: impl Fn([S::Real; N], [S::Real; K]) -> [S::Real; M] + Copy,
) {
    let n = y[0].len() / LANES * LANES;
    let (x, v) = (x.map(|x| &x[..n]), v.map(|v| &v[..n]));
    let mut y = y.each_mut().map(|y| &mut y[..n]);
    let f = move |x, v| (f(x, v), []);
    for places in steps(0..n, LANES) {
        let stream = stores != Stores::Cached;
        group::<S, N, K, M, 0, LANES>(level, stream, &x, &v, &mut y, &mut [], places.start, &f);
    }
}

/// Less than a group: four by four, then one by one.
#[inline(always)]
fn few<S: Storage, const N: usize, const K: usize, const M: usize, const B: usize>(
    x: &[&[S]; N],
    v: &[&[S::Real]; K],
    y: &mut [&mut [S]; M],
    sums: &mut [&mut [S::Real]; B],
    places: Range<usize>,
    f: impl Fn([S::Real; N], [S::Real; K]) -> ([S::Real; M], [S::Real; B]) + Copy,
) {
    let mut i = places.start;
    while i + 4 <= places.end {
        group::<S, N, K, M, B, 4>(Level::Baseline, false, x, v, y, sums, i, &f);
        i += 4;
    }
    if i < places.end {
        edge(x, v, y, sums, i..places.end, &{ f });
    }
}

/// Places one by one: what is left of a run, or all of it at a compact level. Not inlined: one small copy serves every
/// level.
#[inline(never)]
fn edge<S: Storage, const N: usize, const K: usize, const M: usize, const B: usize>(
    x: &[&[S]; N],
    v: &[&[S::Real]; K],
    y: &mut [&mut [S]; M],
    sums: &mut [&mut [S::Real]; B],
    places: Range<usize>,
    f: &impl Fn([S::Real; N], [S::Real; K]) -> ([S::Real; M], [S::Real; B]),
) {
    for i in places {
        let i = plain(N + K + M, i);
        group::<S, N, K, M, B, 1>(Level::Baseline, false, x, v, y, sums, i, f);
    }
}

/// A place in `arrays` arrays, of which compilers know nothing where there are many: a loop in wide registers would first
/// look whether any two of them overlap, which is 20 KB of code for a case of backward passes without AVX2.
#[inline(always)]
pub fn plain(arrays: usize, i: usize) -> usize {
    if arrays > 9 { std::hint::black_box(i) } else { i }
}

/// `L` values of each array, from `i` on. A loop, as `from_fn` may become a function of its own, outside the door of the
/// kernel.
#[inline(always)]
pub fn loads<S: Storage, const N: usize, const L: usize>(level: Level, x: &[&[S]; N], i: usize) -> [[S::Real; L]; N] {
    let mut values = [[S::Real::ZERO; L]; N];
    for k in 0..N {
        values[k] = S::load_at(level, &x[k][i..i + L]);
    }
    values
}

/// [`loads`] for a function that also takes `K` vectors. With few of them the values meet plain numbers first.
#[inline(always)]
fn settled<S: Storage, const N: usize, const K: usize, const L: usize>(
    level: Level,
    x: &[&[S]; N],
    i: usize,
) -> [[S::Real; L]; N] {
    #[repr(align(64))]
    struct Line<T>(T);
    let mut values = Line(loads(level, x, i));
    if size_of::<S>() < size_of::<S::Real>() && (K == 0 || N == 1 && K < 3) {
        simd::settle(level, &mut values.0);
    }
    values.0
}

#[inline(always)]
fn group<S: Storage, const N: usize, const K: usize, const M: usize, const B: usize, const L: usize>(
    level: Level,
    stream: bool,
    x: &[&[S]; N],
    v: &[&[S::Real]; K],
    y: &mut [&mut [S]; M],
    sums: &mut [&mut [S::Real]; B],
    i: usize,
    f: &impl Fn([S::Real; N], [S::Real; K]) -> ([S::Real; M], [S::Real; B]),
) {
    let x: [[S::Real; L]; N] = settled::<S, N, K, L>(level, x, i);
    let v: [[S::Real; L]; K] = loads(level, v, i);
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
        let sums = &mut sums[b][i..i + L];
        for l in 0..L {
            sums[l] = sums[l] + add[b][l];
        }
    }
    for m in 0..M {
        if stream {
            S::stream(level, out[m], &mut y[m][i..i + L]);
        } else {
            S::store_at(level, out[m], &mut y[m][i..i + L]);
        }
    }
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

    /// For an output that is written in runs of `run` elements of which few follow each other in memory: whole lines, but
    /// for runs of whole groups that end in the middle of one, where the beginning of each would take longer.
    pub fn apart<S>(y: &[S], run: usize) -> Self {
        Self::of(y.as_ptr().addr(), size_of_val(y), run, size_of::<S>(), false)
    }

    /// For an output whose runs follow each other in memory: each completes the line that the last one began.
    pub fn joined<S>(y: &[S], run: usize) -> Self {
        Self::of(y.as_ptr().addr(), size_of_val(y), run, size_of::<S>(), true)
    }

    /// For `bytes` of memory from `place` on, in runs of `run` elements of `size` bytes.
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

/// `M` sums over runs of memory: 32 lanes of the arithmetic type, emptied into 16 lanes of float64 every
/// [`Sum::CHAIN`] elements. Chains of 16 additions keep the float32 error below what the data carry; longer ones do not:
/// squares of data on a coarse grid lose the same low bits at every addition.
#[derive(Clone, Copy)]
pub struct Sum<R, const M: usize> {
    lanes: [[[R; LANES]; 2]; M],
    wide: [[f64; LANES]; M],
    filled: usize,
}

impl<R: Real, const M: usize> Sum<R, M> {
    /// Nothing added yet.
    pub const ZERO: Self = Self { lanes: [[[R::ZERO; LANES]; 2]; M], wide: [[0.0; LANES]; M], filled: 0 };

    /// Elements that are added in the arithmetic type.
    pub const CHAIN: usize = 512;

    /// Adds `f(x[..][i], v[..][i])` for every `i`. Meanwhile memory fetches `ahead`.
    #[inline(always)]
    pub fn add<S: Storage<Real = R>, const N: usize, const K: usize, const A: usize>(
        &mut self,
        level: Level,
        x: [&[S]; N],
        v: [&[R]; K],
        ahead: [&[S]; A],
        f: impl Fn([R; N], [R; K]) -> [R; M],
    ) {
        let n = x[0].len();
        let mut from = 0;
        while from < n {
            if self.filled >= Self::CHAIN {
                if level.compact() { self.empty_apart() } else { self.empty() }
            }
            let to = n.min(from + Self::CHAIN - self.filled);
            let ahead = ahead.map(|ahead| ahead.get(from..).unwrap_or(&[]));
            self.chain(level, x.map(|x| &x[from..to]), v.map(|v| &v[from..to]), ahead, &f);
            self.filled += to - from;
            from = to;
        }
    }

    #[inline(always)]
    fn chain<S: Storage<Real = R>, const N: usize, const K: usize, const A: usize>(
        &mut self,
        level: Level,
        x: [&[S]; N],
        v: [&[R]; K],
        ahead: [&[S]; A],
        f: &impl Fn([R; N], [R; K]) -> [R; M],
    ) {
        let n = x[0].len();
        let mut lanes = if self.filled == 0 { [[[R::ZERO; LANES]; 2]; M] } else { self.lanes };
        if level.compact() {
            self.lanes = lanes;
            return self.one_by_one(&x, &v, f);
        }
        let mut i = 0;
        while i + 2 * LANES <= n {
            for ahead in ahead {
                if i + LANES < ahead.len() {
                    simd::prefetch(&ahead[i]);
                    simd::prefetch(&ahead[i + LANES]);
                }
            }
            // Not a loop: the lanes stay in registers.
            add_group(level, &mut lanes, 0, &x, &v, i, f);
            add_group(level, &mut lanes, 1, &x, &v, i + LANES, f);
            i += 2 * LANES;
        }
        if i + LANES <= n {
            add_group(level, &mut lanes, 0, &x, &v, i, f);
            i += LANES;
        }
        self.lanes = lanes;
        if i < n {
            self.one_by_one(&x.map(|x| &x[i..]), &v.map(|v| &v[i..]), f);
        }
    }

    /// The few places after the groups, or all: the lanes that [`Sum::chain`] gives them. Not inlined: see [`edge`].
    #[inline(never)]
    fn one_by_one<S: Storage<Real = R>, const N: usize, const K: usize>(
        &mut self,
        x: &[&[S]; N],
        v: &[&[R]; K],
        f: &impl Fn([R; N], [R; K]) -> [R; M],
    ) {
        let n = x[0].len();
        let (x, v) = (x.map(|x| &x[..n]), v.map(|v| &v[..n]));
        for (group, from) in (0..n).step_by(LANES).enumerate() {
            let len = LANES.min(n - from);
            let half = if len == LANES { group % 2 } else { 1 };
            for l in 0..len {
                let values = f(from_fn(|k| x[k][from + l].widen()), from_fn(|k| v[k][from + l]));
                for m in 0..M {
                    self.lanes[m][half][l] = self.lanes[m][half][l] + values[m];
                }
            }
        }
    }

    /// Starts anew, before something is added.
    #[inline(always)]
    pub fn clear(&mut self) {
        self.wide = [[0.0; LANES]; M];
        self.filled = 0;
    }

    /// Without values in them, the lanes count as zero.
    #[inline(always)]
    fn empty(&mut self) {
        for m in 0..M {
            for l in 0..LANES {
                self.wide[m][l] += (self.lanes[m][0][l] + self.lanes[m][1][l]).to_f64();
            }
        }
        self.filled = 0;
    }

    /// The sums, their lanes added pairwise.
    #[inline(always)]
    pub fn total(mut self, level: Level) -> [f64; M] {
        if level.compact() { self.total_apart() } else { self.pairwise() }
    }

    // At a compact level one copy serves all kernels.

    #[inline(never)]
    fn empty_apart(&mut self) {
        self.empty();
    }

    #[inline(never)]
    fn total_apart(&mut self) -> [f64; M] {
        self.pairwise()
    }

    #[inline(always)]
    fn pairwise(&mut self) -> [f64; M] {
        self.empty();
        self.wide.map(|mut lanes| {
            let mut width = LANES / 2;
            while width > 0 {
                for l in 0..width {
                    lanes[l] += lanes[l + width];
                }
                width /= 2;
            }
            lanes[0]
        })
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

/// [`Sum::total`] of the first `n`. Step by step for all of them: each step is a loop over arrays in memory, of which
/// compilers make wide registers.
#[inline(always)]
pub fn totals<R: Real, const M: usize, const G: usize>(level: Level, sums: &[Sum<R, M>; G], n: usize) -> [[f64; M]; G] {
    if level.compact() { totals_apart(sums, n) } else { side_by_side(sums, n) }
}

/// See [`Sum::total_apart`].
#[inline(never)]
fn totals_apart<R: Real, const M: usize, const G: usize>(sums: &[Sum<R, M>; G], n: usize) -> [[f64; M]; G] {
    side_by_side(sums, n)
}

#[inline(always)]
fn side_by_side<R: Real, const M: usize, const G: usize>(sums: &[Sum<R, M>; G], n: usize) -> [[f64; M]; G] {
    let mut quarters = [[[0.0; 4]; M]; G];
    for k in 0..n {
        for m in 0..M {
            let ([left, right], wide) = (&sums[k].lanes[m], &sums[k].wide[m]);
            for l in 0..4 {
                let lane = |l: usize| wide[l] + (left[l] + right[l]).to_f64();
                quarters[k][m][l] = (lane(l) + lane(l + 8)) + (lane(l + 4) + lane(l + 12));
            }
        }
    }
    let mut totals = [[0.0; M]; G];
    for k in 0..n {
        for m in 0..M {
            let [a, b, c, d] = quarters[k][m];
            totals[k][m] = (a + c) + (b + d);
        }
    }
    totals
}

#[inline(always)]
fn add_group<S: Storage, const N: usize, const K: usize, const M: usize>(
    level: Level,
    lanes: &mut [[[S::Real; LANES]; 2]; M],
    a: usize,
    x: &[&[S]; N],
    v: &[&[S::Real]; K],
    i: usize,
    f: &impl Fn([S::Real; N], [S::Real; K]) -> [S::Real; M],
) {
    let x: [[S::Real; LANES]; N] = settled::<S, N, K, LANES>(level, x, i);
    let v: [[S::Real; LANES]; K] = loads(level, v, i);
    for l in 0..LANES {
        let values = f(from_fn(|k| x[k][l]), from_fn(|k| v[k][l]));
        for m in 0..M {
            lanes[m][a][l] = lanes[m][a][l] + values[m];
        }
    }
}
