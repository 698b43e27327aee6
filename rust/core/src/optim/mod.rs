//! Optimizer steps: one [`Step`] kernel carries every [`Rule`] over many tensors in one call.
//!
//! The tensors are seen as one long concatenation. Work is split over it, so that many small tensors and one huge one
//! both balance; state lies in one flat array per slot, in the order of the tensors.
//!
//! `Step` does not know its rule: each rule is compiled once per arithmetic type, as an [`Update`] of runs of numbers. What
//! lies in memory as 16-bit numbers is widened into scratch before it and rounded back after it, [`BLOCK`] elements at a
//! time.
//!
//! [`Update`]: update::Update

pub mod adam;
pub mod rules;
pub mod scan;
pub mod squares;
pub mod update;

pub use rules::named;
pub use scan::{Scan, Scanned};
pub use update::{AnyRule, Prepare, Rule, carry};

use crate::error::{Error, length};
use crate::kernel::{Kernel, launch};
use crate::lanes::{LANES, steps};
use crate::real::Real;
use crate::simd::{self, Level};
use crate::stored::{Source, Stored, Sum};
use std::ops::Range;
use update::{SLOTS, WINDOWS, update};

/// Elements that are widened together: all scratch of a step stays in the first cache.
pub const BLOCK: usize = 512;

/// Arrays that may need scratch: gradient, parameter, sums over windows, slots.
const SCRATCH: usize = 2 + WINDOWS + SLOTS;

/// A parameter tensor and its gradient.
pub struct Tensor<'a, T> {
    p: Stored<'a, T>,
    g: Source<'a, T>,
}

impl<'a, T: Real> Tensor<'a, T> {
    /// Checks the lengths; `name` is the parameter's.
    pub fn new(name: &str, p: Stored<'a, T>, g: Source<'a, T>) -> Result<Self, Error> {
        if p.source().len() != g.len() {
            let wanted = format_args!("{} elements", p.source().len()).to_string();
            return Err(Error::new(format_args!("grads[{name}]"), wanted, g.len()));
        }
        Ok(Self { p, g })
    }

    fn len(&self) -> usize {
        self.g.len()
    }

    fn split_at(self, at: usize) -> (Self, Self) {
        let (p, g) = (self.p.split_at(at), self.g.split_at(at));
        (Self { p: p.0, g: g.0 }, Self { p: p.1, g: g.1 })
    }
}

/// A slot of the last steps, one row each, from the oldest to the newest. A rule sees the sum of all rows, and replaces
/// the oldest. The sum is made anew at each step: a running one that loses its oldest term cancels.
pub type Window<'a, T> = Vec<Stored<'a, T>>;

/// One step of a rule on every tensor.
pub struct Step<'a, T> {
    rule: &'a dyn AnyRule<T>,
    prepare: Prepare<T>,
    tensors: Vec<Tensor<'a, T>>,
    len: usize,
    windows: Vec<Window<'a, T>>,
    slots: Vec<Stored<'a, T>>,
    /// The exact parameters, of which the tensors hold the rounded copies.
    masters: Option<&'a mut [T]>,
    /// Bytes read and written per element, state included; the narrowest tensor counts for all.
    width: usize,
}

impl<'a, T: Real> Step<'a, T> {
    /// Checks that state is what the rule needs, and as long as all tensors together.
    pub fn new(
        rule: &'a dyn AnyRule<T>,
        prepare: Prepare<T>,
        tensors: Vec<Tensor<'a, T>>,
        windows: Vec<Window<'a, T>>,
        slots: Vec<Stored<'a, T>>,
        masters: Option<&'a mut [T]>,
    ) -> Result<Self, Error> {
        let len = tensors.iter().map(Tensor::len).sum();
        let needed = (rule.windows(), rule.slots() - rule.windows());
        if (windows.len(), slots.len()) != needed {
            let wanted = format!("{} windows and {} slots", needed.0, needed.1);
            return Err(Error::new("state", wanted, format_args!("{} and {}", windows.len(), slots.len())));
        }
        if windows.iter().any(Vec::is_empty) {
            return Err(Error::new("state", "windows of at least one row", "none"));
        }
        let state = || windows.iter().flatten().chain(&slots);
        for slot in state() {
            if slot.source().len() != len {
                return Err(Error::new("state", format_args!("{len} elements"), slot.source().len()));
            }
        }
        if let Some(masters) = &masters {
            length("masters", masters, len)?;
        }
        let rows: usize = state().map(|slot| slot.source().width()).sum();
        let written: usize = windows.iter().map(|rows| &rows[0]).chain(&slots).map(|slot| slot.source().width()).sum();
        let tensor = tensors.iter().map(|tensor| 2 * tensor.p.source().width() + tensor.g.width()).min().unwrap_or(0);
        let width = tensor + rows + written + if masters.is_some() { 2 * size_of::<T>() } else { 0 };
        Ok(Self { rule, prepare, tensors, len, windows, slots, masters, width })
    }

    /// Launches the kernel.
    pub fn launch(self) {
        launch(self);
    }

    /// Updates a tensor, whose state starts at `from`, if everything can be changed where it lies: says whether it was.
    fn in_place(&mut self, level: Level, tensor: &mut Tensor<'a, T>, from: usize) -> bool {
        let place = from..from + tensor.len();
        let (Stored::Real(p), Source::Real(g), None, true) =
            (&mut tensor.p, tensor.g, &self.masters, self.windows.is_empty())
        else {
            return false;
        };
        let mut slots: [&mut [T]; SLOTS] = Default::default();
        let count = self.slots.len();
        for (slot, stored) in slots.iter_mut().zip(&mut self.slots) {
            let Stored::Real(stored) = stored else { return false };
            *slot = &mut stored[place.clone()];
        }
        update(self.rule, level, self.prepare, p, g, &[], &mut slots[..count]);
        true
    }

    /// Updates the parameters `at` of a tensor, whose state is at `place`.
    fn block(
        &mut self,
        level: Level,
        tensor: &mut Tensor<'a, T>,
        at: Range<usize>,
        place: Range<usize>,
        scratch: &mut [T],
    ) {
        let mut chunks: [&mut [T]; SCRATCH] = Default::default();
        for (chunk, part) in chunks.iter_mut().zip(scratch.chunks_exact_mut(BLOCK)) {
            *chunk = part;
        }
        let [for_g, for_p, for_sums @ ..] = &mut chunks;
        let (for_sums, for_slots) = for_sums.split_at_mut(WINDOWS);

        let mut sums: [&[T]; WINDOWS] = Default::default();
        for ((rows, sum), to) in self.windows.iter().zip(&mut sums).zip(for_sums) {
            let to = &mut to[..at.len()];
            simd::enter(level, Sum { rows, from: place.start, to });
            *sum = to;
        }
        let g = tensor.g.read(level, at.clone(), for_g);
        let p = match &mut self.masters {
            Some(masters) => &mut masters[place.clone()],
            None => tensor.p.open(level, at.clone(), for_p),
        };
        let windows = self.windows.len();
        let changed = self.windows.iter_mut().map(|rows| &mut rows[0]).chain(&mut self.slots);
        let mut slots: [&mut [T]; SLOTS] = Default::default();
        let mut count = 0;
        for (stored, to) in changed.zip(for_slots.iter_mut()) {
            slots[count] = stored.open(level, place.clone(), to);
            count += 1;
        }
        update(self.rule, level, self.prepare, p, g, &sums[..windows], &mut slots[..count]);

        match &self.masters {
            Some(masters) => tensor.p.write(level, at, &masters[place.clone()]),
            None => tensor.p.close(level, at, for_p),
        }
        let changed = self.windows.iter_mut().map(|rows| &mut rows[0]).chain(&mut self.slots);
        for (stored, from) in changed.zip(for_slots.iter()) {
            stored.close(level, place.clone(), from);
        }
    }
}

/// How many of the tensors, of these lengths, lie before `at`, and how many elements they have.
fn before(at: usize, lengths: impl Iterator<Item = usize>) -> (usize, usize) {
    let (mut count, mut elements) = (0, 0);
    for n in lengths {
        if elements + n > at {
            break;
        }
        (count, elements) = (count + 1, elements + n);
    }
    (count, elements)
}

fn halves<T: Real>(stored: Vec<Stored<'_, T>>, at: usize) -> (Vec<Stored<'_, T>>, Vec<Stored<'_, T>>) {
    stored.into_iter().map(|one| one.split_at(at)).unzip()
}

impl<T: Real> Kernel for Step<'_, T> {
    type Out = ();

    // For what it widens and rounds, and as far as rules go; these have levels of their own.
    const TOP: Level = Level::Avx512;

    fn bytes(&self) -> usize {
        self.len * self.width
    }

    fn halve(self) -> Result<(Self, Self), Self> {
        let at = self.len / 2 / LANES * LANES;
        if at == 0 {
            return Err(self);
        }
        let (k, elements) = before(at, self.tensors.iter().map(Tensor::len));
        let mut left = self.tensors;
        let mut right = left.split_off(k);
        if elements < at {
            let (l, r) = right.remove(0).split_at(at - elements);
            left.push(l);
            right.insert(0, r);
        }
        let windows: (Vec<_>, Vec<_>) = self.windows.into_iter().map(|rows| halves(rows, at)).unzip();
        let slots = halves(self.slots, at);
        let masters = self.masters.map(|masters| masters.split_at_mut(at)).unzip();
        let Self { rule, prepare, len, width, .. } = self;
        let part = |tensors, len, windows, slots, masters| Self {
            rule,
            prepare,
            tensors,
            len,
            windows,
            slots,
            masters,
            width,
        };
        Ok((part(left, at, windows.0, slots.0, masters.0), part(right, len - at, windows.1, slots.1, masters.1)))
    }

    #[inline(always)]
    fn run(mut self, level: Level) {
        let (mut from, mut scratch) = (0, Vec::new());
        for mut tensor in std::mem::take(&mut self.tensors) {
            let n = tensor.len();
            if !self.in_place(level, &mut tensor, from) {
                scratch.resize(SCRATCH * BLOCK, T::ZERO);
                for at in steps(0..n, BLOCK) {
                    let place = from + at.start..from + at.end;
                    self.block(level, &mut tensor, at, place, &mut scratch);
                }
            }
            from += n;
        }
    }

    fn merge(_: (), _: ()) {}
}
