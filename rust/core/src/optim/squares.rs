//! Rules that divide by the root of squares of gradients: Adagrad, RMSprop, Adadelta, and their windowed forms.

use super::rules::{flush, reals};
use super::update::Rule;
use crate::real::Real;

/// RMSprop (Hinton 2012): `v <- v + rate (g² - pull v); p <- p - lr g / (sqrt(v) + eps)`. With a rate of 1 and a pull of 0
/// it is Adagrad (Duchi, Hazan, Singer 2011), which when it lags divides by the sum without the present square.
#[derive(Debug, Clone, Copy)]
pub struct Squares<T> {
    lr: T,
    l2: T,
    eps: T,
    rate: T,
    keep: T,
    pull: T,
    lagged: bool,
    momentum: T,
}

impl<T: Real> Squares<T> {
    /// From the learning rate, the L2 penalty, eps, rate, pull, whether it lags, and the momentum of those that have one.
    pub fn new([lr, l2, eps, rate, pull, lagged, momentum]: [f64; 7]) -> Self {
        let lagged = lagged != 0.0;
        let [lr, l2, eps, rate, keep, pull, momentum] = reals([lr, l2, eps, rate, 1.0 - rate, pull, momentum]);
        Self { lr, l2, eps, rate, keep, pull, lagged, momentum }
    }

    /// The gradient over the root, and the squares.
    #[inline(always)]
    fn direction(self, p: T, g: T, v: T) -> (T, T) {
        let g = g + self.l2 * p;
        let new = v + self.rate * (g * g - self.pull * v);
        let v = if self.lagged { v } else { new };
        (g / (v.sqrt() + self.eps), new)
    }

    /// With the root of the variance in place of that of the squares. It is kept itself, by the recursion of West (1979)
    /// with constant weights: the difference of the squares and the square of the mean cancels, and falls below zero.
    #[inline(always)]
    fn centered(self, p: T, g: T, variance: T, mean: T) -> (T, T, T) {
        let g = g + self.l2 * p;
        let off = g - mean;
        let variance = variance + self.rate * (self.keep * (off * off) - variance);
        (g / (variance.sqrt() + self.eps), variance, mean + self.rate * off)
    }
}

impl<T: Real> Rule<T, 0, 1> for Squares<T> {
    #[inline(always)]
    fn step(self, p: T, g: T, []: [T; 0], [v]: [T; 1]) -> (T, [T; 1]) {
        let (d, v) = self.direction(p, g, v);
        (p - self.lr * d, [flush(v)])
    }
}

/// [`Squares`] with momentum: `velocity <- momentum velocity + direction; p <- p - lr velocity`.
#[derive(Debug, Clone, Copy)]
pub struct SquaresMomentum<T>(pub Squares<T>);

impl<T: Real> Rule<T, 0, 2> for SquaresMomentum<T> {
    #[inline(always)]
    fn step(self, p: T, g: T, []: [T; 0], [v, velocity]: [T; 2]) -> (T, [T; 2]) {
        let (d, v) = self.0.direction(p, g, v);
        let velocity = self.0.momentum * velocity + d;
        (p - self.0.lr * velocity, [flush(v), flush(velocity)])
    }
}

/// [`Squares`] with the variance of the gradients in place of their squares (Graves 2013, arXiv:1308.0850).
#[derive(Debug, Clone, Copy)]
pub struct Centered<T>(pub Squares<T>);

impl<T: Real> Rule<T, 0, 2> for Centered<T> {
    #[inline(always)]
    fn step(self, p: T, g: T, []: [T; 0], [variance, mean]: [T; 2]) -> (T, [T; 2]) {
        let (d, variance, mean) = self.0.centered(p, g, variance, mean);
        (p - self.0.lr * d, [flush(variance), flush(mean)])
    }
}

/// [`Centered`] with momentum.
#[derive(Debug, Clone, Copy)]
pub struct CenteredMomentum<T>(pub Squares<T>);

impl<T: Real> Rule<T, 0, 3> for CenteredMomentum<T> {
    #[inline(always)]
    fn step(self, p: T, g: T, []: [T; 0], [variance, mean, velocity]: [T; 3]) -> (T, [T; 3]) {
        let (d, variance, mean) = self.0.centered(p, g, variance, mean);
        let velocity = self.0.momentum * velocity + d;
        (p - self.0.lr * velocity, [flush(variance), flush(mean), flush(velocity)])
    }
}

/// RMSprop over the last squares: `p <- p - lr g / (sqrt(past sum + now g²) + eps)`.
#[derive(Debug, Clone, Copy)]
pub struct Windowed<T> {
    lr: T,
    l2: T,
    eps: T,
    past: T,
    now: T,
    momentum: T,
}

impl<T: Real> Windowed<T> {
    /// From the learning rate, the L2 penalty, eps, the weights of each older square and of the present one, and the
    /// momentum of those that have one.
    pub fn new(h: [f64; 6]) -> Self {
        let [lr, l2, eps, past, now, momentum] = reals(h);
        Self { lr, l2, eps, past, now, momentum }
    }

    #[inline(always)]
    fn direction(self, p: T, g: T, sum: T) -> (T, T) {
        let g = g + self.l2 * p;
        let square = g * g;
        (g / ((self.past * sum + self.now * square).sqrt() + self.eps), square)
    }
}

impl<T: Real> Rule<T, 1, 1> for Windowed<T> {
    #[inline(always)]
    fn step(self, p: T, g: T, [sum]: [T; 1], _: [T; 1]) -> (T, [T; 1]) {
        let (d, square) = self.direction(p, g, sum);
        (p - self.lr * d, [flush(square)])
    }
}

/// [`Windowed`] with momentum.
#[derive(Debug, Clone, Copy)]
pub struct WindowedMomentum<T>(pub Windowed<T>);

impl<T: Real> Rule<T, 1, 2> for WindowedMomentum<T> {
    #[inline(always)]
    fn step(self, p: T, g: T, [sum]: [T; 1], [_, velocity]: [T; 2]) -> (T, [T; 2]) {
        let (d, square) = self.0.direction(p, g, sum);
        let velocity = self.0.momentum * velocity + d;
        (p - self.0.lr * velocity, [flush(square), flush(velocity)])
    }
}

/// Adadelta (Zeiler 2012, arXiv:1212.5701): `v <- v + rate (g² - v); d = g sqrt((u + eps) / (v + eps));
/// u <- u + rate (d² - u); p <- p - lr d`.
#[derive(Debug, Clone, Copy)]
pub struct Adadelta<T> {
    lr: T,
    l2: T,
    eps: T,
    rate: T,
}

impl<T: Real> Adadelta<T> {
    /// From the learning rate, the L2 penalty, eps and rho.
    pub fn new([lr, l2, eps, rho]: [f64; 4]) -> Self {
        let [lr, l2, eps, rate] = reals([lr, l2, eps, 1.0 - rho]);
        Self { lr, l2, eps, rate }
    }
}

impl<T: Real> Rule<T, 0, 2> for Adadelta<T> {
    #[inline(always)]
    fn step(self, p: T, g: T, []: [T; 0], [v, u]: [T; 2]) -> (T, [T; 2]) {
        let g = g + self.l2 * p;
        let v = v + self.rate * (g * g - v);
        let d = g * ((u + self.eps) / (v + self.eps)).sqrt();
        (p - self.lr * d, [flush(v), flush(u + self.rate * (d * d - u))])
    }
}

/// Adadelta over the last squares: the sums are those of the older gradients' squares and of the squared updates older
/// than the last, which lies in a slot of its own.
#[derive(Debug, Clone, Copy)]
pub struct WindowedDelta<T> {
    lr: T,
    l2: T,
    eps: T,
    past: T,
    now: T,
    older: T,
    last: T,
}

impl<T: Real> WindowedDelta<T> {
    /// From the learning rate, the L2 penalty, eps, and the weights of each older square, of the present one, of each older
    /// squared update and of the last one.
    pub fn new(h: [f64; 7]) -> Self {
        let [lr, l2, eps, past, now, older, last] = reals(h);
        Self { lr, l2, eps, past, now, older, last }
    }
}

impl<T: Real> Rule<T, 2, 3> for WindowedDelta<T> {
    #[inline(always)]
    fn step(self, p: T, g: T, [squares, updates]: [T; 2], [_, _, last]: [T; 3]) -> (T, [T; 3]) {
        let g = g + self.l2 * p;
        let square = g * g;
        let r = self.past * squares + self.now * square;
        let q = self.older * updates + self.last * last;
        let d = g * ((q + self.eps) / (r + self.eps)).sqrt();
        (p - self.lr * d, [flush(square), last, flush(d * d)])
    }
}
