//! Count, mean and centred second moment, and how they merge.
//!
//! A block's mean is a sum in the arithmetic type; a second look at the block, still in cache, takes the squares about
//! that mean, and the sum of the differences corrects it. Blocks merge in float64. No shift is taken from the data: it
//! may be an outlier or a padding zero.

use crate::real::Real;
use crate::storage::Storage;

/// Elements of a run that are summed in the arithmetic type before float64 takes over.
pub const BLOCK: usize = 4096;

/// Count (or sum of weights), mean, and sum of squared differences from the mean.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Moments {
    /// How many values, or the sum of their weights.
    pub count: f64,
    /// Their mean.
    pub mean: f64,
    /// The sum of (value - mean)².
    pub m2: f64,
}

impl Moments {
    /// The moments of both sets together (Chan, Golub, LeVeque 1979). Either may be empty.
    #[inline(always)]
    pub fn merge(self, other: Self) -> Self {
        let count = self.count + other.count;
        let share = if count > 0.0 { other.count / count } else { 0.0 };
        let delta = other.mean - self.mean;
        Self { count, mean: self.mean + delta * share, m2: self.m2 + other.m2 + delta * delta * (self.count * share) }
    }
}

/// What two looks at a block say: its moments, and whether to look again about their mean.
///
/// The first look gave the mean `plain` of the values; the second gave `first`, the sum of their differences from
/// `about`, and `second`, that of their squares; `inverse` is 1 / count. Where the mean is large beside the spread, `first`
/// corrects it; where it is small, the differences would only add their own rounding. Where they say more about the
/// rounding of `about` than about the spread, another look is worth it: it makes the variance of a constant exactly zero.
#[inline(always)]
pub fn conclude(count: f64, inverse: f64, plain: f64, about: f64, first: f64, second: f64) -> (Moments, bool) {
    let spread = second * inverse;
    let shift = if 64.0 * about * about < spread { plain - about } else { first * inverse };
    let excess = shift * shift * count;
    let m2 = second - excess;
    (Moments { count, mean: about + shift, m2: if m2 < 0.0 { 0.0 } else { m2 } }, excess > 0.5 * second)
}

/// The value about which a block is summed: its mean, rounded to the type of the data. More digits than the data have
/// would be lost in every difference, always in the same direction.
#[inline(always)]
pub fn about<S: Storage>(mean: f64) -> S::Real {
    S::narrow(S::Real::from_f64(mean)).widen()
}

/// 1 / count, or 0 where there is nothing.
#[inline(always)]
pub fn inverse(count: f64) -> f64 {
    if count > 0.0 { 1.0 / count } else { 0.0 }
}

/// [`Moments`] of several channels that share their count.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Channels {
    /// The first channel that this part covers.
    pub first: usize,
    /// How many values each, or the sum of their weights.
    pub count: f64,
    /// One mean per channel.
    pub mean: Vec<f64>,
    /// One sum of squared differences per channel.
    pub m2: Vec<f64>,
}

impl Channels {
    /// `n` channels from `first` on, with no values.
    pub fn empty(first: usize, n: usize) -> Self {
        Self { first, count: 0.0, mean: vec![0.0; n], m2: vec![0.0; n] }
    }

    /// Adds values of the same channels, or appends the channels that follow.
    pub fn merge(mut self, other: Self) -> Self {
        if other.first != self.first {
            self.mean.extend(other.mean);
            self.m2.extend(other.m2);
            return self;
        }
        self.absorb(other.count, &other.mean, &other.m2);
        self
    }

    /// Adds values of the same channels: [`Moments::merge`] with what is common to all channels taken out of the loop.
    #[inline(always)]
    pub fn absorb(&mut self, count: f64, mean: &[f64], m2: &[f64]) {
        let total = self.count + count;
        let share = if total > 0.0 { count / total } else { 0.0 };
        let cross = self.count * share;
        let n = self.mean.len();
        let (own_mean, own_m2, mean, m2) = (&mut self.mean[..n], &mut self.m2[..n], &mean[..n], &m2[..n]);
        for c in 0..n {
            let delta = mean[c] - own_mean[c];
            own_mean[c] += delta * share;
            own_m2[c] = own_m2[c] + m2[c] + delta * delta * cross;
        }
        self.count = total;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merging_nothing_changes_nothing() {
        let some = Moments { count: 3.0, mean: 2.0, m2: 5.0 };
        assert_eq!(some.merge(Moments::default()), some);
        assert_eq!(Moments::default().merge(some), some);
        assert_eq!(Moments::default().merge(Moments::default()), Moments::default());
    }

    #[test]
    fn ranks_of_unequal_size_equal_the_pooled_data() {
        let ranks = [(2.0, 2.0, 2.0), (3.0, 4.0, 8.0), (1.0, 10.0, 0.0), (0.0, 0.0, 0.0)];
        let all =
            ranks.map(|(count, mean, m2)| Moments { count, mean, m2 }).into_iter().reduce(Moments::merge).unwrap();
        assert_eq!(all.count, 6.0);
        assert!((all.mean - 26.0 / 6.0).abs() < 1e-14);
        assert!((all.m2 / all.count - 80.0 / 9.0).abs() < 1e-13);
    }
}
