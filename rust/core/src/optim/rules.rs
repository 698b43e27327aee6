//! The rules, from short to long. Constants are computed in float64 and rounded once.

use super::Rule;
use crate::real::Real;

/// Zero for what would decay into the subnormal range, where arithmetic is several times slower.
#[inline(always)]
fn flush<T: Real>(x: T) -> T {
    if x.abs() < T::TINY { T::ZERO } else { x }
}

/// Gradient descent: `p <- p - lr (g + weight_decay p)`.
#[derive(Debug, Clone, Copy)]
pub struct Sgd<T> {
    lr: T,
    decay: T,
}

impl<T: Real> Sgd<T> {
    /// From the learning rate and the L2 penalty.
    pub fn new(lr: f64, weight_decay: f64) -> Self {
        Self { lr: T::from_f64(lr), decay: T::from_f64(weight_decay) }
    }
}

impl<T: Real> Rule<T, 0> for Sgd<T> {
    #[inline(always)]
    fn step(self, p: T, g: T, slots: [T; 0]) -> (T, [T; 0]) {
        let g = g + self.decay * p;
        (p - self.lr * g, slots)
    }
}

/// Momentum (Polyak 1964): `v <- momentum v + (1 - dampening) g; p <- p - lr v`, or with the learning rate inside
/// `v <- momentum v + lr (1 - dampening) g; p <- p - v`.
#[derive(Debug, Clone, Copy)]
pub struct Momentum<T> {
    decay: T,
    momentum: T,
    /// Weight of the gradient in the velocity.
    rate: T,
    /// Weight of the velocity in the step.
    size: T,
}

impl<T: Real> Momentum<T> {
    /// `rate` is the weight of the gradient in the velocity: 1 - dampening, or 1 at the first step; `size` is that of the
    /// velocity in the step. The learning rate is a factor of one of them.
    pub fn new(weight_decay: f64, momentum: f64, rate: f64, size: f64) -> Self {
        let [decay, momentum, rate, size] = [weight_decay, momentum, rate, size].map(T::from_f64);
        Self { decay, momentum, rate, size }
    }

    #[inline(always)]
    fn velocity(self, p: T, g: T, v: T) -> (T, T) {
        let g = g + self.decay * p;
        (g, self.momentum * v + self.rate * g)
    }
}

impl<T: Real> Rule<T, 1> for Momentum<T> {
    #[inline(always)]
    fn step(self, p: T, g: T, [v]: [T; 1]) -> (T, [T; 1]) {
        let (_, v) = self.velocity(p, g, v);
        (p - self.size * v, [flush(v)])
    }
}

/// Nesterov's look ahead (Sutskever, Martens, Dahl, Hinton 2013): [`Momentum`] that steps along `g + momentum v`.
#[derive(Debug, Clone, Copy)]
pub struct Nesterov<T>(pub Momentum<T>);

impl<T: Real> Rule<T, 1> for Nesterov<T> {
    #[inline(always)]
    fn step(self, p: T, g: T, [v]: [T; 1]) -> (T, [T; 1]) {
        let rule = self.0;
        let (g, v) = rule.velocity(p, g, v);
        (p - rule.size * (rule.rate * g + rule.momentum * v), [flush(v)])
    }
}

/// Adam (Kingma, Ba 2015, arXiv:1412.6980) and AdamW (Loshchilov, Hutter 2019, arXiv:1711.05101):
/// `m <- m + (1 - beta1)(g - m); v <- v + (1 - beta2)(g² - v);
/// p <- keep p - lr (m / bias1) / (sqrt(v / bias2) + eps)`.
#[derive(Debug, Clone, Copy)]
pub struct Adam<T> {
    decay: T,
    keep: T,
    rate1: T,
    rate2: T,
    size: T,
    inverse: T,
    eps: T,
}

/// What [`Adam`] is made of.
#[derive(Debug, Clone, Copy)]
pub struct AdamOptions {
    /// Learning rate.
    pub lr: f64,
    /// L2 penalty, part of the gradient.
    pub l2: f64,
    /// Decoupled decay: what a parameter keeps of itself.
    pub keep: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the corrected second moment.
    pub eps: f64,
    /// 1 - the product of all beta1 used so far.
    pub bias1: f64,
    /// 1 - the product of all beta2 used so far.
    pub bias2: f64,
}

impl<T: Real> Adam<T> {
    /// With one division per element: three would be slower than memory.
    pub fn new(o: AdamOptions) -> Self {
        let [decay, keep, rate1, rate2, size, inverse, eps] =
            [o.l2, o.keep, 1.0 - o.beta1, 1.0 - o.beta2, o.lr / o.bias1, 1.0 / o.bias2.sqrt(), o.eps].map(T::from_f64);
        Self { decay, keep, rate1, rate2, size, inverse, eps }
    }

    #[inline(always)]
    fn moments(self, p: T, g: T, m: T, v: T) -> (T, T) {
        let g = g + self.decay * p;
        (flush(m + self.rate1 * (g - m)), flush(v + self.rate2 * (g * g - v)))
    }

    #[inline(always)]
    fn moved(self, p: T, m: T, v: T) -> T {
        p * self.keep - self.size * m / (v.sqrt() * self.inverse + self.eps)
    }
}

impl<T: Real> Rule<T, 2> for Adam<T> {
    #[inline(always)]
    fn step(self, p: T, g: T, [m, v]: [T; 2]) -> (T, [T; 2]) {
        let (m, v) = self.moments(p, g, m, v);
        (self.moved(p, m, v), [m, v])
    }
}

/// AMSGrad (Reddi, Kale, Kumar 2018, arXiv:1904.09237): [`Adam`] with the largest second moment so far, compared before
/// it is corrected.
#[derive(Debug, Clone, Copy)]
pub struct AmsGrad<T>(pub Adam<T>);

impl<T: Real> Rule<T, 3> for AmsGrad<T> {
    #[inline(always)]
    fn step(self, p: T, g: T, [m, v, most]: [T; 3]) -> (T, [T; 3]) {
        let (m, v) = self.0.moments(p, g, m, v);
        let most = if v > most { v } else { most };
        (self.0.moved(p, m, most), [m, v, most])
    }
}
