//! The rules by name, and the short ones. Constants are computed in float64 and rounded once.

use super::adam::{Adam, Adamax, AmsGrad, NAdam};
use super::squares::{
    Adadelta, Centered, CenteredMomentum, Squares, SquaresMomentum, Windowed, WindowedDelta, WindowedMomentum,
};
use super::update::{AnyRule, Rule, carry, clamp};
use crate::error::Error;
use crate::real::Real;

/// The rule `name` with the scalars `h`, in the order in which its `new` names them.
pub fn named<T: Real>(name: &str, h: &[f64]) -> Result<Box<dyn AnyRule<T>>, Error> {
    let (rule, wanted) = match name {
        "sgd" => made(h, |h| carry::<T, _, 0, 0>(Sgd::new(h))),
        "momentum" => made(h, |h| carry::<T, _, 0, 1>(Momentum::new(h))),
        "rmsprop" => made(h, |h| carry::<T, _, 0, 1>(Squares::new(h))),
        "rmsprop_momentum" => made(h, |h| carry::<T, _, 0, 2>(SquaresMomentum(Squares::new(h)))),
        "rmsprop_centered" => made(h, |h| carry::<T, _, 0, 2>(Centered(Squares::new(h)))),
        "rmsprop_centered_momentum" => made(h, |h| carry::<T, _, 0, 3>(CenteredMomentum(Squares::new(h)))),
        "rmsprop_window" => made(h, |h| carry::<T, _, 1, 1>(Windowed::new(h))),
        "rmsprop_window_momentum" => made(h, |h| carry::<T, _, 1, 2>(WindowedMomentum(Windowed::new(h)))),
        "adadelta" => made(h, |h| carry::<T, _, 0, 2>(Adadelta::new(h))),
        "adadelta_window" => made(h, |h| carry::<T, _, 2, 3>(WindowedDelta::new(h))),
        "adam" => made(h, |h| carry::<T, _, 0, 2>(Adam::new(h))),
        "nadam" => made(h, |h| carry::<T, _, 0, 2>(NAdam(Adam::new(h)))),
        "amsgrad" => made(h, |h| carry::<T, _, 0, 3>(AmsGrad(Adam::new(h)))),
        "adamax" => made(h, |h| carry::<T, _, 0, 2>(Adamax::new(h))),
        "lion" => made(h, |h| carry::<T, _, 0, 1>(Lion::new(h))),
        "newton" => made(h, |h| carry::<T, _, 0, 1>(Newton::new(h))),
        "curvature" => made(h, |h| carry::<T, _, 0, 0>(Curvature::new(h))),
        _ => return Err(Error::new("rule", "the name of a rule", format_args!("{name:?}"))),
    };
    rule.ok_or_else(|| Error::new("h", format_args!("{wanted} scalars for {name}"), h.len()))
}

/// The rule, if the number of scalars is right, and that number.
fn made<const K: usize, A>(h: &[f64], make: impl Fn([f64; K]) -> A) -> (Option<A>, usize) {
    (h.try_into().ok().map(make), K)
}

/// The nearest values of the arithmetic type.
pub(super) fn reals<T: Real, const K: usize>(h: [f64; K]) -> [T; K] {
    h.map(T::from_f64)
}

/// Zero for what would decay into the subnormal range, where arithmetic is several times slower.
#[inline(always)]
pub(super) fn flush<T: Real>(x: T) -> T {
    if x.abs() < T::TINY { T::ZERO } else { x }
}

/// Gradient descent: `p <- p - lr (g + l2 p)`.
#[derive(Debug, Clone, Copy)]
pub struct Sgd<T> {
    lr: T,
    l2: T,
}

impl<T: Real> Sgd<T> {
    /// From the learning rate and the L2 penalty.
    pub fn new(h: [f64; 2]) -> Self {
        let [lr, l2] = reals(h);
        Self { lr, l2 }
    }
}

impl<T: Real> Rule<T, 0, 0> for Sgd<T> {
    #[inline(always)]
    fn step(self, p: T, g: T, []: [T; 0], slots: [T; 0]) -> (T, [T; 0]) {
        (p - self.lr * (g + self.l2 * p), slots)
    }
}

/// Momentum (Polyak 1964): `v <- momentum v + rate g; p <- p - (size v + look g)`. The learning rate is a factor of `rate`,
/// or of `size` and `look`. Nesterov's look ahead (Sutskever, Martens, Dahl, Hinton 2013) has the momentum in `size`.
#[derive(Debug, Clone, Copy)]
pub struct Momentum<T> {
    l2: T,
    momentum: T,
    rate: T,
    size: T,
    look: T,
}

impl<T: Real> Momentum<T> {
    /// From the L2 penalty, the momentum, the weight of the gradient in the velocity, and the weights of the velocity and of
    /// the gradient in the step.
    pub fn new(h: [f64; 5]) -> Self {
        let [l2, momentum, rate, size, look] = reals(h);
        Self { l2, momentum, rate, size, look }
    }
}

impl<T: Real> Rule<T, 0, 1> for Momentum<T> {
    #[inline(always)]
    fn step(self, p: T, g: T, []: [T; 0], [v]: [T; 1]) -> (T, [T; 1]) {
        let g = g + self.l2 * p;
        let v = self.momentum * v + self.rate * g;
        (p - (self.size * v + self.look * g), [flush(v)])
    }
}

/// Lion (Chen et al. 2023, arXiv:2302.06675): `p <- keep p - lr sign(m + (1 - beta1)(g - m)); m <- m + (1 - beta2)(g - m)`.
#[derive(Debug, Clone, Copy)]
pub struct Lion<T> {
    lr: T,
    keep: T,
    rate1: T,
    rate2: T,
}

impl<T: Real> Lion<T> {
    /// From the learning rate, what a parameter keeps of itself, beta1 and beta2.
    pub fn new([lr, keep, beta1, beta2]: [f64; 4]) -> Self {
        let [lr, keep, rate1, rate2] = reals([lr, keep, 1.0 - beta1, 1.0 - beta2]);
        Self { lr, keep, rate1, rate2 }
    }
}

impl<T: Real> Rule<T, 0, 1> for Lion<T> {
    #[inline(always)]
    fn step(self, p: T, g: T, []: [T; 0], [m]: [T; 1]) -> (T, [T; 1]) {
        let c = m + self.rate1 * (g - m);
        // The sign of zero is zero, that of NaN is NaN.
        let step = if c > T::ZERO { self.lr } else { c * T::ZERO };
        let step = if c < T::ZERO { -self.lr } else { step };
        (p * self.keep - step, [flush(m + self.rate2 * (g - m))])
    }
}

/// A Newton step along the diagonal: `p <- p - clamp(lr g / (inverse h + damping), ± clip)`.
#[derive(Debug, Clone, Copy)]
pub struct Newton<T> {
    lr: T,
    damping: T,
    inverse: T,
    clip: T,
}

impl<T: Real> Newton<T> {
    /// From the learning rate, the damping, what corrects the curvature for its start at zero, and the largest step.
    pub fn new(h: [f64; 4]) -> Self {
        let [lr, damping, inverse, clip] = reals(h);
        Self { lr, damping, inverse, clip }
    }
}

impl<T: Real> Rule<T, 0, 1> for Newton<T> {
    #[inline(always)]
    fn step(self, p: T, g: T, []: [T; 0], [h]: [T; 1]) -> (T, [T; 1]) {
        (p - clamp(self.lr * g / (h * self.inverse + self.damping), self.clip), [h])
    }
}

/// The mean absolute curvature, which takes the place of the parameters, from a new curvature in that of the gradients:
/// `h <- h + rate (|c| - h)`.
#[derive(Debug, Clone, Copy)]
pub struct Curvature<T> {
    rate: T,
}

impl<T: Real> Curvature<T> {
    /// From the weight of the new curvature.
    pub fn new([rate]: [f64; 1]) -> Self {
        Self { rate: T::from_f64(rate) }
    }
}

impl<T: Real> Rule<T, 0, 0> for Curvature<T> {
    #[inline(always)]
    fn step(self, h: T, c: T, []: [T; 0], slots: [T; 0]) -> (T, [T; 0]) {
        (flush(h + self.rate * (c.abs() - h)), slots)
    }
}
