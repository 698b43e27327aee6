//! Optimizer steps: one [`Step`] kernel carries every [`Rule`] over many tensors in one call.
//!
//! The tensors are seen as one long concatenation. Work is split over it, so that many small tensors and one huge one
//! both balance; state lies in one flat array per slot, in the order of the tensors.

pub mod rules;

use crate::error::{Error, length};
use crate::kernel::{Kernel, launch};
use crate::lanes::LANES;
use crate::moments::BLOCK;
use crate::real::Real;
use crate::storage::Storage;
use std::array::from_fn;

/// An update rule with `N` numbers of state per parameter.
pub trait Rule<T: Real, const N: usize>: Copy + Send + Sync {
    /// The new parameter and state from the parameter `p`, its gradient `g` and the state `slots`.
    /// `#[inline(always)]` on every implementation: see [`Kernel::run`].
    fn step(self, p: T, g: T, slots: [T; N]) -> (T, [T; N]);
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
        let g = g * self.scale;
        let g = if g > self.limit { self.limit } else { g };
        if g < -self.limit { -self.limit } else { g }
    }
}

/// A parameter tensor and its gradient.
pub struct Tensor<'a, P, G> {
    p: &'a mut [P],
    g: &'a [G],
}

impl<'a, P, G> Tensor<'a, P, G> {
    /// Checks the lengths; `name` is the parameter's.
    pub fn new(name: &str, p: &'a mut [P], g: &'a [G]) -> Result<Self, Error> {
        length(&format!("grads[{name}]"), g, p.len())?;
        Ok(Self { p, g })
    }
}

/// One step of `rule` on every tensor.
pub struct Step<'a, P: Storage, G: Storage<Real = P::Real>, R, const N: usize> {
    rule: R,
    prepare: Prepare<P::Real>,
    tensors: Vec<Tensor<'a, P, G>>,
    len: usize,
    slots: [&'a mut [P::Real]; N],
    /// The exact parameters, of which the tensors hold the rounded copies.
    masters: Option<&'a mut [P::Real]>,
}

impl<'a, P: Storage, G: Storage<Real = P::Real>, R: Rule<P::Real, N>, const N: usize> Step<'a, P, G, R, N> {
    /// Checks that state is as long as all tensors together.
    pub fn new(
        rule: R,
        prepare: Prepare<P::Real>,
        tensors: Vec<Tensor<'a, P, G>>,
        slots: [&'a mut [P::Real]; N],
        masters: Option<&'a mut [P::Real]>,
    ) -> Result<Self, Error> {
        let len = tensors.iter().map(|tensor| tensor.p.len()).sum();
        for slot in &slots {
            length("state", slot, len)?;
        }
        if let Some(masters) = &masters {
            length("masters", masters, len)?;
        }
        Ok(Self { rule, prepare, tensors, len, slots, masters })
    }

    /// Launches the kernel.
    pub fn launch(self) {
        launch(self);
    }

    /// Updates `L` parameters from `at` on in the tensor, `from + at` on in the state.
    #[inline(always)]
    fn group<const L: usize>(&mut self, tensor: &mut Tensor<'a, P, G>, from: usize, at: usize) {
        let place = from + at;
        let g: [P::Real; L] = G::load(&tensor.g[at..at + L]);
        let p: [P::Real; L] = match &self.masters {
            None => P::load(&tensor.p[at..at + L]),
            Some(masters) => P::Real::load(&masters[place..place + L]),
        };
        let slots: [[P::Real; L]; N] = from_fn(|n| P::Real::load(&self.slots[n][place..place + L]));
        let (mut new_p, mut new_slots) = (p, slots);
        for l in 0..L {
            let (p, state) = self.rule.step(p[l], self.prepare.apply(g[l]), from_fn(|n| slots[n][l]));
            new_p[l] = p;
            for n in 0..N {
                new_slots[n][l] = state[n];
            }
        }
        P::store(new_p, &mut tensor.p[at..at + L]);
        if let Some(masters) = &mut self.masters {
            P::Real::store(new_p, &mut masters[place..place + L]);
        }
        for n in 0..N {
            P::Real::store(new_slots[n], &mut self.slots[n][place..place + L]);
        }
    }
}

impl<P: Storage, G: Storage<Real = P::Real>, R: Rule<P::Real, N>, const N: usize> Kernel for Step<'_, P, G, R, N> {
    type Out = ();

    fn bytes(&self) -> usize {
        let state = 2 * (N + usize::from(self.masters.is_some())) * size_of::<P::Real>();
        self.len * (2 * size_of::<P>() + size_of::<G>() + state)
    }

    fn halve(mut self) -> Result<(Self, Self), Self> {
        let at = self.len / 2 / LANES * LANES;
        if at == 0 {
            return Err(self);
        }
        let (mut before, mut k) = (0, 0);
        while before + self.tensors[k].p.len() <= at {
            before += self.tensors[k].p.len();
            k += 1;
        }
        let mut right = self.tensors.split_off(k);
        let mut left = self.tensors;
        if before < at {
            let Tensor { p, g } = right.remove(0);
            let (p, g) = (p.split_at_mut(at - before), g.split_at(at - before));
            left.push(Tensor { p: p.0, g: g.0 });
            right.insert(0, Tensor { p: p.1, g: g.1 });
        }
        let (mut left_slots, mut right_slots) = (from_fn(|_| Default::default()), from_fn(|_| Default::default()));
        for (n, slot) in self.slots.into_iter().enumerate() {
            (left_slots[n], right_slots[n]) = slot.split_at_mut(at);
        }
        let masters = self.masters.map(|masters| masters.split_at_mut(at)).unzip();
        let Self { rule, prepare, len, .. } = self;
        Ok((
            Self { rule, prepare, tensors: left, len: at, slots: left_slots, masters: masters.0 },
            Self { rule, prepare, tensors: right, len: len - at, slots: right_slots, masters: masters.1 },
        ))
    }

    #[inline(always)]
    fn run(mut self, level: crate::simd::Level) {
        let mut from = 0;
        for mut tensor in std::mem::take(&mut self.tensors) {
            let n = tensor.p.len();
            let mut i = 0;
            while i + LANES <= n && !level.compact() {
                self.group::<LANES>(&mut tensor, from, i);
                i += LANES;
            }
            while i < n {
                self.group::<1>(&mut tensor, from, i);
                i += 1;
            }
            from += n;
        }
    }

    fn merge(_: (), _: ()) {}
}

/// Calls `f` with the lane of each element and the element.
#[inline(always)]
fn each<G: Storage>(g: &[G], mut f: impl FnMut(usize, G::Real)) {
    let mut i = 0;
    while i + LANES <= g.len() {
        let x: [G::Real; LANES] = G::load(&g[i..i + LANES]);
        for l in 0..LANES {
            f(l, x[l]);
        }
        i += LANES;
    }
    for l in 0..g.len() - i {
        f(l, g[i + l].widen());
    }
}

/// What [`Scan`] found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scanned {
    /// The sum of all squares.
    pub squares: f64,
    /// Whether every element is finite.
    pub finite: bool,
}

/// Reads gradients once: the sum of their squares in float64, and whether all are finite. The two are separate: finite
/// gradients may have squares that are not.
pub struct Scan<'a, G> {
    tensors: Vec<&'a [G]>,
    len: usize,
}

impl<'a, G: Storage> Scan<'a, G> {
    /// Over all tensors.
    pub fn new(tensors: Vec<&'a [G]>) -> Self {
        let len = tensors.iter().map(|g| g.len()).sum();
        Self { tensors, len }
    }
}

impl<G: Storage> Kernel for Scan<'_, G> {
    type Out = Scanned;

    fn bytes(&self) -> usize {
        self.len * size_of::<G>()
    }

    fn halve(mut self) -> Result<(Self, Self), Self> {
        let at = self.len / 2 / LANES * LANES;
        if at == 0 {
            return Err(self);
        }
        let (mut before, mut k) = (0, 0);
        while before + self.tensors[k].len() <= at {
            before += self.tensors[k].len();
            k += 1;
        }
        let mut right = self.tensors.split_off(k);
        let mut left = self.tensors;
        if before < at {
            let (l, r) = right[0].split_at(at - before);
            left.push(l);
            right[0] = r;
        }
        Ok((Self { tensors: left, len: at }, Self { tensors: right, len: self.len - at }))
    }

    #[inline(always)]
    fn run(self, _: crate::simd::Level) -> Scanned {
        let mut squares = [0.0; LANES];
        // x * 0 is 0 where x is finite and NaN where it is not.
        let mut bad = [G::Real::ZERO; LANES];
        // Two passes, the second over what the first left in cache: together they do not become wide instructions.
        for block in self.tensors.iter().flat_map(|g| g.chunks(BLOCK)) {
            each(block, |l, x| squares[l] += x.to_f64() * x.to_f64());
            each(block, |l, x| bad[l] = bad[l] + x * G::Real::ZERO);
        }
        let mut all = Scanned { squares: 0.0, finite: true };
        for l in 0..LANES {
            all.squares += squares[l];
            all.finite &= bad[l] == G::Real::ZERO;
        }
        all
    }

    fn merge(left: Scanned, right: Scanned) -> Scanned {
        Scanned { squares: left.squares + right.squares, finite: left.finite && right.finite }
    }
}
