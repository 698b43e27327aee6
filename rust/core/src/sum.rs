//! The loop that reads: a [`Sum`] over runs of memory, in groups of 16 elements and the rest one by one. The lane of an
//! element depends on its place in the run, never on its address.

use crate::lanes::{LANES, loads, settled};
use crate::real::Real;
use crate::simd::{self, Level};
use crate::storage::Storage;
use std::array::from_fn;

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
        let groups = n / LANES;
        let xs = x.map(|x| &x.as_chunks::<LANES>().0[..groups]);
        let vs = v.map(|v| &v.as_chunks::<LANES>().0[..groups]);
        let lines = ahead.map(|ahead| ahead.as_chunks::<LANES>().0);
        let mut i = 0;
        while i + 2 <= groups {
            for lines in lines {
                if i + 1 < lines.len() {
                    simd::prefetch(&lines[i]);
                    simd::prefetch(&lines[i + 1]);
                }
            }
            // Not a loop: the lanes stay in registers.
            add_group(level, &mut lanes, 0, &xs, &vs, i, f);
            add_group(level, &mut lanes, 1, &xs, &vs, i + 1, f);
            i += 2;
        }
        if i < groups {
            add_group(level, &mut lanes, 0, &xs, &vs, i, f);
        }
        self.lanes = lanes;
        if groups * LANES < n {
            self.one_by_one(&x.map(|x| &x[groups * LANES..]), &v.map(|v| &v[groups * LANES..]), f);
        }
    }

    /// The few places after the groups, or all: the lanes that [`Sum::chain`] gives them. Not inlined: one small copy serves every level.
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
    x: &[&[[S; LANES]]; N],
    v: &[&[[S::Real; LANES]]; K],
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
