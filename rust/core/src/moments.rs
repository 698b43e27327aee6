//! Count, mean and centred second moment, and how they merge.
//!
//! A block is summed about the mean of the blocks before it, differences and their squares in one look; the sum of the
//! differences corrects both. Where that mean turns out to be far off, the block, still in cache, is looked at again about
//! its own mean. Blocks merge in float64. No single value is taken for a mean: it may be an outlier or a padding zero.

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

/// A block is not looked at more often than this.
pub const LOOKS: usize = 5;

/// The value about which a block is summed first, from the moments of what came before it: their mean where it is large
/// beside the spread; else 0, about which differences need no rounding.
#[inline(always)]
pub fn guess<S: Storage>(count: f64, mean: f64, m2: f64) -> S::Real {
    if 8.0 * mean * mean * count > m2 { about::<S>(mean) } else { S::Real::ZERO }
}

/// The value about which a block is summed again, after it was found to have this mean. A guess may be so far off that
/// no digits are left of the values: then the second time is about 0.
#[inline(always)]
pub fn again<S: Storage>(look: usize, guess: S::Real, mean: f64) -> S::Real {
    if look == 1 && guess != S::Real::ZERO { S::Real::ZERO } else { about::<S>(mean) }
}

/// What a look at a block says: its moments, and whether to look again about their mean.
///
/// `first` is the sum of the differences from `about`, `second` that of their squares; `inverse` is 1 / count. Where the
/// correction of the squares is no small part of them, another look is worth it; it also makes the variance of a constant
/// exactly zero.
#[inline(always)]
pub fn conclude<R: Real>(count: f64, inverse: f64, about: R, first: f64, second: f64) -> (Moments, bool) {
    let shift = first * inverse;
    let excess = shift * shift * count;
    let (mean, m2) = (about.to_f64() + shift, second - excess);
    let settled = excess <= 0.25 * second && second < f64::INFINITY || about == R::ZERO && mean.is_nan();
    (Moments { count, mean, m2: if m2 < 0.0 { 0.0 } else { m2 } }, !settled)
}

/// `mean` rounded to the type of the data, or 0 where it is not finite. More digits than the data have would be lost in
/// every difference, always in the same direction.
#[inline(always)]
fn about<S: Storage>(mean: f64) -> S::Real {
    if mean.is_finite() { S::narrow(S::Real::from_f64(mean)).widen() } else { S::Real::ZERO }
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

    /// Appends the channels that follow. Not inlined: once for many channels.
    #[inline(never)]
    pub fn append(&mut self, other: Self) {
        self.count = self.count.max(other.count);
        self.mean.extend(other.mean);
        self.m2.extend(other.m2);
    }

    /// Adds values of the same channels, or appends the channels that follow.
    pub fn merge(mut self, other: Self) -> Self {
        if other.first != self.first {
            self.append(other);
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
