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

/// So many groups ahead, the other cores are told of parameters that will be written: where a matrix product on several
/// threads has just read them, each keeps copies, and to take these back as late as the store is twice the step's time.
const AHEAD: usize = 24;

/// Most windows of a rule, and most numbers of state that it changes per parameter.
pub(super) const WINDOWS: usize = 2;
pub(super) const SLOTS: usize = 3;

/// A rule whose state is known at run time only.
pub trait AnyRule<T>: Send + Sync {
    /// How many windows it has.
    fn windows(&self) -> usize;

    /// How many numbers of state it changes per parameter, windows included.
    fn slots(&self) -> usize;

    /// Updates whole groups of [`LANES`] parameters and their state; see [`update`].
    fn groups(&self, level: Level, prepare: Prepare<T>, p: &mut [T], g: &[T], past: &[&[T]], slots: &mut [&mut [T]]);
}

/// Updates a run of parameters and their state, all of one length. What is left after the whole groups is one more, filled
/// up with zeros: rules need no loop of their own for it.
pub fn update<T: Real>(
    rule: &dyn AnyRule<T>,
    level: Level,
    prepare: Prepare<T>,
    p: &mut [T],
    g: &[T],
    past: &[&[T]],
    slots: &mut [&mut [T]],
) {
    let (at, n) = (p.len() / LANES * LANES, p.len());
    if at > 0 {
        rule.groups(level, prepare, p, g, past, slots);
    }
    if at == n {
        return;
    }
    let fill = |from: &[T]| {
        let mut group = [T::ZERO; LANES];
        group[..n - at].copy_from_slice(&from[at..n]);
        group
    };
    let (mut last_p, last_g) = (fill(p), fill(g));
    let (mut last_past, mut last_slots) = ([[T::ZERO; LANES]; WINDOWS], [[T::ZERO; LANES]; SLOTS]);
    for (last, past) in last_past.iter_mut().zip(past) {
        *last = fill(past);
    }
    for (last, slot) in last_slots.iter_mut().zip(&*slots) {
        *last = fill(slot);
    }
    let last_past = last_past.each_ref().map(|last| &last[..]);
    let mut lasts = last_slots.each_mut().map(|last| &mut last[..]);
    rule.groups(level, prepare, &mut last_p, &last_g, &last_past[..past.len()], &mut lasts[..slots.len()]);
    p[at..].copy_from_slice(&last_p[..n - at]);
    for (last, slot) in last_slots.iter().zip(slots) {
        slot[at..n].copy_from_slice(&last[..n - at]);
    }
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

    fn groups(&self, level: Level, prepare: Prepare<T>, p: &mut [T], g: &[T], past: &[&[T]], slots: &mut [&mut [T]]) {
        let n = p.len() / LANES * LANES;
        let (p, past) = (&mut p[..n], from_fn(|w| &past[w][..n]));
        let mut slots = slots.iter_mut();
        let slots = from_fn(|_| &mut slots.next().expect("as many as the rule changes")[..n]);
        simd::enter(level, Update { rule: self.0, prepare, p, g: &g[..n], past, slots });
    }
}

/// A rule on whole groups of numbers. A part of [`Step`](super::Step): it is not split.
pub struct Update<'a, T, R, const W: usize, const N: usize> {
    rule: R,
    prepare: Prepare<T>,
    p: &'a mut [T],
    g: &'a [T],
    past: [&'a [T]; W],
    slots: [&'a mut [T]; N],
}

impl<T: Real, R: Rule<T, W, N>, const W: usize, const N: usize> Update<'_, T, R, W, N> {
    /// Updates the whole groups of `L` parameters.
    #[inline(always)]
    fn groups<const L: usize>(self) {
        let Self { rule, prepare, p, g, past, slots } = self;
        let p = p.as_chunks_mut::<L>().0;
        let n = p.len();
        let (g, past) = (&g.as_chunks::<L>().0[..n], past.map(|past| &past.as_chunks::<L>().0[..n]));
        let slots = slots.map(|slot| &mut slot.as_chunks_mut::<L>().0[..n]);
        for i in 0..n {
            // Else compilers spread the loop over several groups: shuffles without end.
            let i = black_box(i);
            if L == LANES {
                simd::prefetch_to_write(p.as_flattened(), (i + AHEAD) * L);
            }
            let (past, mut state): ([[T; L]; W], [[T; L]; N]) = (from_fn(|w| past[w][i]), from_fn(|k| slots[k][i]));
            let (mut new, g) = (p[i], g[i]);
            for l in 0..L {
                let (value, values) =
                    rule.step(new[l], prepare.apply(g[l]), from_fn(|w| past[w][l]), from_fn(|k| state[k][l]));
                new[l] = value;
                for k in 0..N {
                    state[k][l] = values[k];
                }
            }
            p[i] = new;
            for k in 0..N {
                slots[k][i] = state[k];
            }
        }
    }
}

impl<T: Real, R: Rule<T, W, N>, const W: usize, const N: usize> Kernel for Update<'_, T, R, W, N> {
    type Out = ();

    // Twice as many roots and quotients at a time. Without state or with windows, memory is what takes the time.
    const TOP: Level = if W == 0 && N > 0 { Level::Avx512 } else { Level::Avx2 };

    fn bytes(&self) -> usize {
        size_of_val(self.p)
    }

    fn halve(self) -> Result<(Self, Self), Self> {
        Err(self)
    }

    #[inline(always)]
    fn run(self, level: Level) {
        if level.compact() { self.groups::<4>() } else { self.groups::<LANES>() }
    }

    fn merge(_: (), _: ()) {}
}
