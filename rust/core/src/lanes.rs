//! The two loops that kernels are made of: [`map`] over runs of memory and [`Sum`] over runs of memory.
//!
//! Both walk fixed groups of 16 elements and treat the rest one by one. In a sum, the lane of an element depends on its
//! place in the run, never on its address.

use crate::real::Real;
use crate::simd::STREAM_ALIGN;
use crate::storage::Storage;
use std::array::from_fn;

/// Elements that are handled together: one 512-bit register of f32, two 256-bit ones.
pub const LANES: usize = 16;

/// Writes `y[m][i] = f(x[..][i], v[..][i])[m]` for every `i`; past the caches when `stream`.
#[inline(always)]
pub fn map<S: Storage, const N: usize, const K: usize, const M: usize>(
    x: [&[S]; N],
    v: [&[S::Real]; K],
    mut y: [&mut [S]; M],
    stream: bool,
    f: impl Fn([S::Real; N], [S::Real; K]) -> [S::Real; M],
) {
    let n = y[0].len();
    let mut i = 0;
    if stream {
        // One by one up to the first line of the first output; an output out of step with it uses ordinary stores.
        let line = 64;
        let head = y[0].as_ptr().align_offset(line).min(n);
        let skip = if head * size_of::<S>() < line { head } else { 0 };
        while i < skip {
            group::<S, N, K, M, 1>(&x, &v, &mut y, i, false, &f);
            i += 1;
        }
    }
    while i + LANES <= n {
        group::<S, N, K, M, LANES>(&x, &v, &mut y, i, stream, &f);
        i += LANES;
    }
    while i < n {
        group::<S, N, K, M, 1>(&x, &v, &mut y, i, false, &f);
        i += 1;
    }
}

#[inline(always)]
fn group<S: Storage, const N: usize, const K: usize, const M: usize, const L: usize>(
    x: &[&[S]; N],
    v: &[&[S::Real]; K],
    y: &mut [&mut [S]; M],
    i: usize,
    stream: bool,
    f: &impl Fn([S::Real; N], [S::Real; K]) -> [S::Real; M],
) {
    let x: [[S::Real; L]; N] = from_fn(|k| S::load(&x[k][i..i + L]));
    let v: [[S::Real; L]; K] = from_fn(|k| S::Real::load(&v[k][i..i + L]));
    let mut out = [[S::Real::ZERO; L]; M];
    for l in 0..L {
        let values = f(from_fn(|k| x[k][l]), from_fn(|k| v[k][l]));
        for m in 0..M {
            out[m][l] = values[m];
        }
    }
    for m in 0..M {
        S::store(out[m], &mut y[m][i..i + L], stream);
    }
}

/// Whether outputs of these bytes, cut into runs of `run` elements, are better written past the caches.
pub fn streams<S: Storage>(y: &[S], run: usize) -> bool {
    let bytes = run * size_of::<S>();
    let aligned = y.as_ptr().addr().is_multiple_of(STREAM_ALIGN) && bytes.is_multiple_of(STREAM_ALIGN);
    size_of_val(y) >= crate::simd::STREAM_BYTES && (bytes >= 1024 || aligned && run.is_multiple_of(LANES))
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

    /// Adds `f(x[..][i], v[..][i])` for every `i`.
    #[inline(always)]
    pub fn add<S: Storage<Real = R>, const N: usize, const K: usize>(
        &mut self,
        x: [&[S]; N],
        v: [&[R]; K],
        f: impl Fn([R; N], [R; K]) -> [R; M],
    ) {
        let n = x[0].len();
        let mut from = 0;
        while from < n {
            if self.filled >= Self::CHAIN {
                self.empty();
            }
            let to = n.min(from + Self::CHAIN - self.filled);
            self.chain(x.map(|x| &x[from..to]), v.map(|v| &v[from..to]), &f);
            self.filled += to - from;
            from = to;
        }
    }

    #[inline(always)]
    fn chain<S: Storage<Real = R>, const N: usize, const K: usize>(
        &mut self,
        x: [&[S]; N],
        v: [&[R]; K],
        f: &impl Fn([R; N], [R; K]) -> [R; M],
    ) {
        let n = x[0].len();
        let mut lanes = self.lanes;
        let mut i = 0;
        while i + 2 * LANES <= n {
            for a in 0..2 {
                add_group(&mut lanes, a, &x, &v, i + a * LANES, f);
            }
            i += 2 * LANES;
        }
        if i + LANES <= n {
            add_group(&mut lanes, 0, &x, &v, i, f);
            i += LANES;
        }
        for l in 0..n - i {
            let values = f(from_fn(|k| x[k][i + l].widen()), from_fn(|k| v[k][i + l]));
            for m in 0..M {
                lanes[m][1][l] = lanes[m][1][l] + values[m];
            }
        }
        self.lanes = lanes;
    }

    #[inline(always)]
    fn empty(&mut self) {
        for m in 0..M {
            for l in 0..LANES {
                self.wide[m][l] += (self.lanes[m][0][l] + self.lanes[m][1][l]).to_f64();
            }
        }
        self.lanes = [[[R::ZERO; LANES]; 2]; M];
        self.filled = 0;
    }

    /// The sums, their lanes added pairwise.
    #[inline(always)]
    pub fn total(mut self) -> [f64; M] {
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

#[inline(always)]
fn add_group<S: Storage, const N: usize, const K: usize, const M: usize>(
    lanes: &mut [[[S::Real; LANES]; 2]; M],
    a: usize,
    x: &[&[S]; N],
    v: &[&[S::Real]; K],
    i: usize,
    f: &impl Fn([S::Real; N], [S::Real; K]) -> [S::Real; M],
) {
    let x: [[S::Real; LANES]; N] = from_fn(|k| S::load(&x[k][i..i + LANES]));
    let v: [[S::Real; LANES]; K] = from_fn(|k| S::Real::load(&v[k][i..i + LANES]));
    for l in 0..LANES {
        let values = f(from_fn(|k| x[k][l]), from_fn(|k| v[k][l]));
        for m in 0..M {
            lanes[m][a][l] = lanes[m][a][l] + values[m];
        }
    }
}
