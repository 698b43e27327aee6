//! Layer norm (Ba, Kiros, Hinton 2016, arXiv:1607.06450) and RMS norm (Zhang, Sennrich 2019, arXiv:1910.07467): each row
//! of a matrix is normalised by itself.
//!
//! A row is read from memory once: its statistics are taken of what lies in cache, then it is written. Short rows go in
//! groups, so that the arithmetic between the two loops of one row runs beside the loops of the others.

use super::centred;
pub use super::rows_backward::Backward;
use crate::error::{Error, length};
use crate::kernel::Kernel;
use crate::lanes::{Stores, map, steps};
use crate::moments::{BLOCK, LOOKS, Moments, again, conclude, guess, inverse};
use crate::real::{Real, split};
use crate::simd::Level;
use crate::storage::Storage;
use crate::sum::{Sum, totals};
use std::ops::Range;

/// No more rows than this go together.
pub(super) const GROUP: usize = 8;

/// Rows go together as long as they fit in the first cache.
const GROUP_BYTES: usize = 16 << 10;

/// How many rows, of `bytes` each, go together.
pub(super) fn group(bytes: usize) -> usize {
    (GROUP_BYTES / bytes.max(1)).clamp(1, GROUP)
}

/// What is added before normalising, and where the sum goes, rounded to the type of the data.
pub struct Residual<'a, S> {
    /// Added to x.
    pub residual: &'a [S],
    /// x + residual.
    pub sum: &'a mut [S],
}

impl<S> Residual<'_, S> {
    fn split(self, at: usize) -> (Self, Self) {
        let (residual, sum) = (self.residual.split_at(at), self.sum.split_at_mut(at));
        (Self { residual: residual.0, sum: sum.0 }, Self { residual: residual.1, sum: sum.1 })
    }
}

/// `y = (x - mean) * rstd * gamma + beta` of each row, with `rstd = 1 / sqrt(var + eps)`; without a mean
/// `rstd = 1 / sqrt(mean(x²) + eps)`.
pub struct Forward<'a, S: Storage> {
    x: &'a [S],
    residual: Option<Residual<'a, S>>,
    gamma: &'a [S::Real],
    beta: &'a [S::Real],
    eps: f64,
    mean: Option<[&'a mut [S::Real]; 2]>,
    rstd: &'a mut [S::Real],
    stores: Stores,
    y: &'a mut [S],
}

impl<'a, S: Storage> Forward<'a, S> {
    /// Of rows as long as `gamma`, as many as `rstd` is long. `mean`, as hi + lo, is there for layer norm.
    pub fn new(
        x: &'a [S],
        residual: Option<Residual<'a, S>>,
        [gamma, beta]: [&'a [S::Real]; 2],
        eps: f64,
        mean: Option<[&'a mut [S::Real]; 2]>,
        rstd: &'a mut [S::Real],
        y: &'a mut [S],
    ) -> Result<Self, Error> {
        length("beta", beta, gamma.len())?;
        length("x", x, gamma.len() * rstd.len())?;
        length("y", y, x.len())?;
        if let Some(Residual { residual, sum }) = &residual {
            length("residual", residual, x.len())?;
            length("sum", sum, x.len())?;
        }
        if let Some(mean) = &mean {
            length("hi", mean[0], rstd.len())?;
            length("lo", mean[1], rstd.len())?;
        }
        let stores = Stores::joined(y, gamma.len(), 1);
        Ok(Self { x, residual, gamma, beta, eps, mean, rstd, stores, y })
    }
}

/// What memory fetches while a row is written: the one `step` elements further on, where arrays are past the cache.
#[inline(always)]
pub(super) fn ahead<'a, S, const N: usize>(
    stores: Stores,
    x: [&'a [S]; N],
    row: &Range<usize>,
    step: usize,
) -> [&'a [S]; N] {
    let at = row.start + step..row.end + step;
    x.map(|x| if stores == Stores::Cached { &[] } else { x.get(at.clone()).unwrap_or(&[]) })
}

/// The place at which rows are cut in two, a multiple of `step`.
pub(super) fn cut(rows: usize, step: usize) -> Option<usize> {
    Some(rows.div_ceil(step) / 2 * step).filter(|at| *at > 0)
}

/// Mean and sum of squared differences of the `n` rows of `x`; without `centred`, of squares.
#[inline(always)]
fn moments<S: Storage>(
    level: Level,
    x: &[S],
    n: usize,
    centred: bool,
    sums: &mut [Sum<S::Real, 2>; GROUP],
) -> [[f64; GROUP]; 2] {
    let (width, mut before) = (x.len() / n, 0.0);
    let [mut mean, mut m2] = [[0.0; GROUP]; 2];
    for Range { start: from, end: to } in steps(0..width, BLOCK) {
        let count = (to - from) as f64;
        let (inverse, mut guessed) = (inverse(count), [S::Real::ZERO; GROUP]);
        if centred && from > 0 {
            for k in 0..n {
                guessed[k] = guess::<S>(before, mean[k], m2[k]);
            }
        }
        let (mut about, mut found, mut wavers) = (guessed, [Moments::default(); GROUP], [true; GROUP]);
        for look in 0..LOOKS {
            for k in 0..n {
                if wavers[k] {
                    let (block, about) = (&x[k * width + from..k * width + to], about[k]);
                    sums[k].clear();
                    sums[k].add(level, [block], [], [], move |[x], []| {
                        let d = x - about;
                        [d, d * d]
                    });
                }
            }
            let (totals, mut unsettled) = (totals(level, sums, n), false);
            for k in 0..n {
                if wavers[k] {
                    let [first, second] = totals[k];
                    (found[k], wavers[k]) = match centred {
                        true => conclude(count, inverse, about[k], first, second),
                        false => (Moments { count, mean: 0.0, m2: second }, false),
                    };
                    if wavers[k] {
                        about[k] = again::<S>(look, guessed[k], found[k].mean);
                        unsettled = true;
                    }
                }
            }
            if !unsettled {
                break;
            }
        }
        let total = before + count;
        let share = count / total;
        for k in 0..n {
            let delta = found[k].mean - mean[k];
            mean[k] += delta * share;
            m2[k] = m2[k] + found[k].m2 + delta * delta * (before * share);
        }
        before = total;
    }
    [mean, m2]
}

impl<S: Storage> Kernel for Forward<'_, S> {
    type Out = ();

    const TOP: Level = S::TOP;

    fn bytes(&self) -> usize {
        size_of_val(self.x) * if self.residual.is_some() { 4 } else { 2 }
    }

    fn halve(self) -> Result<(Self, Self), Self> {
        let width = self.gamma.len();
        let Some(rows) = cut(self.rstd.len(), group(width * size_of::<S>())) else { return Err(self) };
        let at = rows * width;
        let (x, y, rstd) = (self.x.split_at(at), self.y.split_at_mut(at), self.rstd.split_at_mut(rows));
        let residual = self.residual.map(|r| r.split(at)).unzip();
        let mean = self.mean.map(|[hi, lo]| (hi.split_at_mut(rows), lo.split_at_mut(rows)));
        let mean = mean.map(|(hi, lo)| ([hi.0, lo.0], [hi.1, lo.1])).unzip();
        let Self { gamma, beta, eps, stores, .. } = self;
        Ok((
            Self { x: x.0, residual: residual.0, gamma, beta, eps, mean: mean.0, rstd: rstd.0, stores, y: y.0 },
            Self { x: x.1, residual: residual.1, gamma, beta, eps, mean: mean.1, rstd: rstd.1, stores, y: y.1 },
        ))
    }

    #[inline(always)]
    fn run(mut self, level: Level) {
        let (width, rows, v) = (self.gamma.len(), self.rstd.len(), [self.gamma, self.beta]);
        let mut sums = [Sum::ZERO; GROUP];
        let (group, inverse) = (group(width * size_of::<S>()), inverse(width as f64));
        let mut scratch = vec![S::default(); if self.residual.is_some() { group * width } else { 0 }];
        for chunk in steps(0..rows, group) {
            let (first, n) = (chunk.start, chunk.len());
            let all = first * width..(first + n) * width;
            let mut x = &self.x[all.clone()];
            if let Some(r) = &self.residual {
                let sum = &mut scratch[..n * width];
                map(level, [x, &r.residual[all]], [], [&mut *sum], Stores::Cached, [], move |[x, r], []| [x + r]);
                x = sum;
            }
            let [mean, m2] = moments(level, x, n, self.mean.is_some(), &mut sums);
            let mut rstds = [0.0; GROUP];
            for k in 0..GROUP {
                rstds[k] = 1.0 / (m2[k] * inverse + self.eps).sqrt();
            }
            for k in 0..n {
                let ((hi, lo), rstd) = (split::<S::Real>(mean[k]), S::Real::from_f64(rstds[k]));
                self.rstd[first + k] = rstd;
                if let Some([his, los]) = &mut self.mean {
                    (his[first + k], los[first + k]) = (hi, lo);
                }
                let (at, from) = ((first + k) * width..(first + k + 1) * width, &x[k * width..(k + 1) * width]);
                let ahead = ahead(self.stores, [self.x], &at, n * width);
                let y = &mut self.y[at.clone()];
                match &mut self.residual {
                    None => map(level, [from], v, [y], self.stores, ahead, move |[x], [gamma, beta]| {
                        [centred(x, hi, lo) * rstd * gamma + beta]
                    }),
                    Some(r) => {
                        let out = [y, &mut r.sum[at]];
                        map(level, [from], v, out, self.stores, [], move |[x], [gamma, beta]| {
                            [centred(x, hi, lo) * rstd * gamma + beta, x]
                        });
                    }
                }
            }
        }
    }

    fn merge(_: (), _: ()) {}
}
