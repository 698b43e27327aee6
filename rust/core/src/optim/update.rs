//! Rules as scalar functions, and the kernel that carries one over runs of numbers.

use crate::kernel::Kernel;
use crate::lanes::LANES;
use crate::real::Real;
use crate::simd::{self, Level};
use std::array::from_fn;
use std::hint::black_box;

/// An update rule that changes `N` numbers of state per parameter; the first `W` of them are the oldest rows of windows.
pub trait Rule<T: Real, const W: usize, const N: usize>: Copy + Send + Sync {
    /// The new parameter and state from the parameter `p`, its gradient `g`, the sums `past` over the windows and the
    /// state `slots`. `#[inline(always)]` on every implementation: see [`Kernel::run`].
    fn step(self, p: T, g: T, past: [T; W], slots: [T; N]) -> (T, [T; N]);
}

/// What happens to a gradient before a rule sees it: `clamp(g * scale, -limit, limit)`.
#[derive(Debug, Clone, Copy)]
pub struct Prepare<T> {
    scale: T,
    limit: T,
}

impl<T: Real> Prepare<T> {
    /// A negative scale climbs instead of descending; an infinite limit clips nothing.
    pub fn new(scale: f64, limit: f64) -> Self {
        Self { scale: T::from_f64(scale), limit: T::from_f64(limit) }
    }

    #[inline(always)]
    fn apply(self, g: T) -> T {
        clamp(g * self.scale, self.limit)
    }
}

/// `x` within `limit` of zero; NaN stays NaN.
#[inline(always)]
pub(super) fn clamp<T: Real>(x: T, limit: T) -> T {
    let x = if x > limit { limit } else { x };
    if x < -limit { -limit } else { x }
}

/// A rule whose state is known at run time only.
pub trait AnyRule<T>: Send + Sync {
    /// How many windows it has.
    fn windows(&self) -> usize;

    /// How many numbers of state it changes per parameter, windows included.
    fn slots(&self) -> usize;

    /// Updates a run of parameters and their state, all of one length.
    fn update(&self, level: Level, prepare: Prepare<T>, p: &mut [T], g: &[T], past: &[&[T]], slots: &mut [&mut [T]]);
}

struct Carried<R, const W: usize, const N: usize>(R);

/// A rule as one whose state is known at run time only.
pub fn carry<'a, T: Real, R: Rule<T, W, N> + 'a, const W: usize, const N: usize>(rule: R) -> Box<dyn AnyRule<T> + 'a> {
    Box::new(Carried::<R, W, N>(rule))
}

impl<T: Real, R: Rule<T, W, N>, const W: usize, const N: usize> AnyRule<T> for Carried<R, W, N> {
    fn windows(&self) -> usize {
        W
    }

    fn slots(&self) -> usize {
        N
    }

    fn update(&self, level: Level, prepare: Prepare<T>, p: &mut [T], g: &[T], past: &[&[T]], slots: &mut [&mut [T]]) {
        let n = p.len();
        let past = from_fn(|w| &past[w][..n]);
        let mut slots = slots.iter_mut();
        let slots = from_fn(|_| &mut slots.next().expect("as many as the rule changes")[..n]);
        simd::enter(level, Update { rule: self.0, prepare, p, g: &g[..n], past, slots });
    }
}

/// A rule on a run of numbers. A part of [`Step`](super::Step): it is not split.
pub struct Update<'a, T, R, const W: usize, const N: usize> {
    rule: R,
    prepare: Prepare<T>,
    p: &'a mut [T],
    g: &'a [T],
    past: [&'a [T]; W],
    slots: [&'a mut [T]; N],
}

impl<T: Real, R: Rule<T, W, N>, const W: usize, const N: usize> Update<'_, T, R, W, N> {
    /// Updates `L` parameters from `i` on.
    #[inline(always)]
    fn group<const L: usize>(&mut self, i: usize) {
        let g: [T; L] = T::load(&self.g[i..i + L]);
        let mut p: [T; L] = T::load(&self.p[i..i + L]);
        let (mut past, mut slots) = ([[T::ZERO; L]; W], [[T::ZERO; L]; N]);
        for w in 0..W {
            past[w] = T::load(&self.past[w][i..i + L]);
        }
        for n in 0..N {
            slots[n] = T::load(&self.slots[n][i..i + L]);
        }
        for l in 0..L {
            let (new, state) =
                self.rule.step(p[l], self.prepare.apply(g[l]), from_fn(|w| past[w][l]), from_fn(|n| slots[n][l]));
            p[l] = new;
            for n in 0..N {
                slots[n][l] = state[n];
            }
        }
        T::store(p, &mut self.p[i..i + L]);
        for n in 0..N {
            T::store(slots[n], &mut self.slots[n][i..i + L]);
        }
    }

    /// The few parameters after the groups, or all at a compact level. Not inlined: one small copy serves every level.
    #[inline(never)]
    fn rest(&mut self, from: usize) {
        for i in from..self.p.len() {
            // A place that the compiler cannot foresee: it would unroll the loop and compile it for overlapping slices.
            self.group::<1>(black_box(i));
        }
    }
}

impl<T: Real, R: Rule<T, W, N>, const W: usize, const N: usize> Kernel for Update<'_, T, R, W, N> {
    type Out = ();

    fn bytes(&self) -> usize {
        size_of_val(self.p)
    }

    fn halve(self) -> Result<(Self, Self), Self> {
        Err(self)
    }

    #[inline(always)]
    fn run(mut self, level: Level) {
        let mut i = 0;
        while i + LANES <= self.p.len() && !level.compact() {
            self.group::<LANES>(i);
            i += LANES;
        }
        self.rest(i);
    }

    fn merge(_: (), _: ()) {}
}
