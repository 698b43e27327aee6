//! Rules with a first and a second moment: Adam and its kin.

use super::rules::{flush, reals};
use super::update::Rule;
use crate::real::Real;

/// Adam (Kingma, Ba 2015, arXiv:1412.6980) and AdamW (Loshchilov, Hutter 2019, arXiv:1711.05101):
/// `m <- m + (1 - beta1)(g - m); v <- v + (1 - beta2)(g² - v); p <- keep p - size m / (sqrt(v / bias2) + eps)`.
#[derive(Debug, Clone, Copy)]
pub struct Adam<T> {
    l2: T,
    keep: T,
    rate1: T,
    rate2: T,
    eps: T,
    inverse: T,
    size: T,
    look: T,
}

impl<T: Real> Adam<T> {
    /// From the L2 penalty, what a parameter keeps of itself, beta1, beta2, eps, bias2, the weight of the first moment in the
    /// step, and that of the gradient where it has one.
    pub fn new([l2, keep, beta1, beta2, eps, bias2, size, look]: [f64; 8]) -> Self {
        let [l2, keep, rate1, rate2, eps, inverse, size, look] =
            reals([l2, keep, 1.0 - beta1, 1.0 - beta2, eps, 1.0 / bias2.sqrt(), size, look]);
        Self { l2, keep, rate1, rate2, eps, inverse, size, look }
    }

    /// The gradient with its penalty, and both moments.
    #[inline(always)]
    fn moments(self, p: T, g: T, m: T, v: T) -> (T, T, T) {
        let g = g + self.l2 * p;
        (g, m + self.rate1 * (g - m), v + self.rate2 * (g * g - v))
    }

    /// One division per element: three would be slower than memory.
    #[inline(always)]
    fn moved(self, p: T, step: T, v: T) -> T {
        p * self.keep - step / (v.sqrt() * self.inverse + self.eps)
    }
}

impl<T: Real> Rule<T, 0, 2> for Adam<T> {
    #[inline(always)]
    fn step(self, p: T, g: T, []: [T; 0], [m, v]: [T; 2]) -> (T, [T; 2]) {
        let (_, m, v) = self.moments(p, g, m, v);
        (self.moved(p, self.size * m, v), [flush(m), flush(v)])
    }
}

/// NAdam (Dozat 2016): [`Adam`] that steps along `size m + look g`.
#[derive(Debug, Clone, Copy)]
pub struct NAdam<T>(pub Adam<T>);

impl<T: Real> Rule<T, 0, 2> for NAdam<T> {
    #[inline(always)]
    fn step(self, p: T, g: T, []: [T; 0], [m, v]: [T; 2]) -> (T, [T; 2]) {
        let (g, m, v) = self.0.moments(p, g, m, v);
        (self.0.moved(p, self.0.size * m + self.0.look * g, v), [flush(m), flush(v)])
    }
}

/// AMSGrad (Reddi, Kale, Kumar 2018, arXiv:1904.09237): [`Adam`] with the largest second moment so far, compared before
/// it is corrected.
#[derive(Debug, Clone, Copy)]
pub struct AmsGrad<T>(pub Adam<T>);

impl<T: Real> Rule<T, 0, 3> for AmsGrad<T> {
    #[inline(always)]
    fn step(self, p: T, g: T, []: [T; 0], [m, v, most]: [T; 3]) -> (T, [T; 3]) {
        let (_, m, v) = self.0.moments(p, g, m, v);
        let most = if most > v { most } else { v };
        (self.0.moved(p, self.0.size * m, most), [flush(m), flush(v), flush(most)])
    }
}

/// Adamax (Kingma, Ba 2015, section 7.1): `u <- max(beta2 u, |g| + eps); p <- p - size m / u`.
#[derive(Debug, Clone, Copy)]
pub struct Adamax<T> {
    l2: T,
    rate1: T,
    beta2: T,
    eps: T,
    size: T,
}

impl<T: Real> Adamax<T> {
    /// From the L2 penalty, beta1, beta2, eps, and the weight of the first moment in the step.
    pub fn new([l2, beta1, beta2, eps, size]: [f64; 5]) -> Self {
        let [l2, rate1, beta2, eps, size] = reals([l2, 1.0 - beta1, beta2, eps, size]);
        Self { l2, rate1, beta2, eps, size }
    }
}

impl<T: Real> Rule<T, 0, 2> for Adamax<T> {
    #[inline(always)]
    fn step(self, p: T, g: T, []: [T; 0], [m, u]: [T; 2]) -> (T, [T; 2]) {
        let g = g + self.l2 * p;
        let m = m + self.rate1 * (g - m);
        let (old, new) = (self.beta2 * u, g.abs() + self.eps);
        let u = if old > new { old } else { new };
        (p - self.size * m / u, [flush(m), flush(u)])
    }
}
