//! Layer norm and RMS norm, backward.

use super::columns::{CHAIN, ColumnSums};
use super::rows::{GROUP, ahead, cut, group};
use super::{Sums, centred, gradient};
use crate::error::{Error, length};
use crate::kernel::Kernel;
use crate::lanes::{Stores, map_add, steps};
use crate::moments::inverse;
use crate::real::Real;
use crate::simd::Level;
use crate::storage::Storage;
use crate::sum::{Sum, totals};

/// Parts have at least about this many rows: each has sums of its own, as long as a row, in float64.
const PART: usize = 16;

/// With g = dy * gamma and x̂ = (x - mean) * rstd: `dx = rstd * (g - mean(g) - x̂ * mean(g * x̂)) + dsum` of each row, and
/// over all rows the sums of dy and of dy * x̂, the gradients of beta and gamma. Without a mean, x̂ = x * rstd, and mean(g)
/// is left out.
pub struct Backward<'a, S: Storage> {
    dy: &'a [S],
    x: &'a [S],
    gamma: &'a [S::Real],
    mean: Option<[&'a [S::Real]; 2]>,
    rstd: &'a [S::Real],
    dsum: Option<&'a [S]>,
    stores: Stores,
    dx: &'a mut [S],
}

impl<'a, S: Storage> Backward<'a, S> {
    /// Of what [`super::rows::Forward`] normalised; `x` is the sum where there was a residual.
    pub fn new(
        dy: &'a [S],
        x: &'a [S],
        gamma: &'a [S::Real],
        mean: Option<[&'a [S::Real]; 2]>,
        rstd: &'a [S::Real],
        dsum: Option<&'a [S]>,
        dx: &'a mut [S],
    ) -> Result<Self, Error> {
        length("x", x, gamma.len() * rstd.len())?;
        length("dy", dy, x.len())?;
        length("dx", dx, x.len())?;
        if let Some([hi, lo]) = mean {
            length("hi", hi, rstd.len())?;
            length("lo", lo, rstd.len())?;
        }
        if let Some(dsum) = dsum {
            length("dsum", dsum, x.len())?;
        }
        let stores = Stores::joined(dx, gamma.len(), 2);
        Ok(Self { dy, x, gamma, mean, rstd, dsum, stores, dx })
    }

    /// hi, lo and rstd of a row.
    #[inline(always)]
    fn row(&self, r: usize) -> [S::Real; 3] {
        let [hi, lo] = self.mean.map_or([S::Real::ZERO; 2], |[hi, lo]| [hi[r], lo[r]]);
        [hi, lo, self.rstd[r]]
    }
}

impl<S: Storage> Kernel for Backward<'_, S> {
    type Out = Sums;

    const TOP: Level = S::TOP;

    fn bytes(&self) -> usize {
        // Not those of dsum: it changes no sum, so it must not change where they are split.
        3 * size_of_val(self.x)
    }

    fn halve(self) -> Result<(Self, Self), Self> {
        let Some(rows) = cut(self.rstd.len(), PART) else { return Err(self) };
        let at = rows * self.gamma.len();
        let (dy, x, dx) = (self.dy.split_at(at), self.x.split_at(at), self.dx.split_at_mut(at));
        let mean = self.mean.map(|[hi, lo]| (hi.split_at(rows), lo.split_at(rows)));
        let mean = mean.map(|(hi, lo)| ([hi.0, lo.0], [hi.1, lo.1])).unzip();
        let (rstd, dsum) = (self.rstd.split_at(rows), self.dsum.map(|d| d.split_at(at)).unzip());
        let Self { gamma, stores, .. } = self;
        Ok((
            Self { dy: dy.0, x: x.0, gamma, mean: mean.0, rstd: rstd.0, dsum: dsum.0, stores, dx: dx.0 },
            Self { dy: dy.1, x: x.1, gamma, mean: mean.1, rstd: rstd.1, dsum: dsum.1, stores, dx: dx.1 },
        ))
    }

    #[inline(always)]
    fn run(self, level: Level) -> Sums {
        let (width, rows, gamma) = (self.gamma.len(), self.rstd.len(), self.gamma);
        let (group, inverse) = (group(2 * width * size_of::<S>()), inverse(width as f64));
        let mut sums = ColumnSums::<S::Real, 2>::new(width);
        let mut means = [[S::Real::ZERO; 2]; GROUP];
        let mut terms = [Sum::ZERO; GROUP];
        for chain in steps(0..rows, CHAIN) {
            for chunk in steps(chain, group) {
                let (first, n) = (chunk.start, chunk.len());
                for k in 0..n {
                    let at = (first + k) * width..(first + k + 1) * width;
                    let ([hi, lo, _], x) = (self.row(first + k), [&self.dy[at.clone()], &self.x[at]]);
                    terms[k].clear();
                    terms[k].add(level, x, [gamma], [], move |[dy, x], [gamma]| {
                        let g = dy * gamma;
                        [g, g * centred(x, hi, lo)]
                    });
                }
                let totals = totals(level, &terms, n);
                for k in 0..n {
                    let ([g, gd], rstd) = (totals[k], self.rstd[first + k].to_f64());
                    let mean = if self.mean.is_some() { g * inverse } else { 0.0 };
                    means[k] = [mean, gd * inverse * rstd * rstd].map(S::Real::from_f64);
                }
                for k in 0..n {
                    let at = (first + k) * width..(first + k + 1) * width;
                    let ([hi, lo, rstd], [mean, slope]) = (self.row(first + k), means[k]);
                    let (dy, x) = (&self.dy[at.clone()], &self.x[at.clone()]);
                    let (v, dx) = ([gamma], &mut self.dx[at.clone()]);
                    let ahead = ahead(self.stores, [self.dy, self.x], &at, n * width);
                    let one = move |dy, x, gamma| {
                        let d = centred(x, hi, lo);
                        (gradient(dy * gamma, d, rstd, mean, slope), [dy, dy * (d * rstd)])
                    };
                    match self.dsum {
                        None => map_add(
                            level,
                            [dy, x],
                            v,
                            [dx],
                            sums.chain(),
                            self.stores,
                            ahead,
                            move |[dy, x], [gamma]| {
                                let (dx, terms) = one(dy, x, gamma);
                                ([dx], terms)
                            },
                        ),
                        Some(dsum) => {
                            let x = [dy, x, &dsum[at]];
                            map_add(
                                level,
                                x,
                                v,
                                [dx],
                                sums.chain(),
                                self.stores,
                                ahead,
                                move |[dy, x, ds], [gamma]| {
                                    let (dx, terms) = one(dy, x, gamma);
                                    ([dx + ds], terms)
                                },
                            );
                        }
                    }
                }
            }
            sums.empty(level);
        }
        let [dy, dy_xhat] = sums.wide;
        Sums { first: 0, dy, dy_xhat }
    }

    fn merge(left: Sums, right: Sums) -> Sums {
        left.merge(right)
    }
}
