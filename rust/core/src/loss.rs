//! Softmax and cross-entropy in one pass over the logits. Exponentials take most of the time; the rest exists once for all
//! levels and both types.

use crate::error::{Error, length};
use crate::exp::{GROUP, exps, lns};
use crate::kernel::{Kernel, launch};
use crate::real::Real;
use crate::simd::Level;
use std::ops::Range;

/// Logits z and, as long, where their gradient goes.
pub enum Logits<'a> {
    /// In float64.
    F64(&'a [f64], &'a mut [f64]),
    /// In float32.
    F32(&'a [f32], &'a mut [f32]),
}

impl Logits<'_> {
    fn lengths(&self) -> (usize, usize) {
        match self {
            Logits::F64(z, dz) => (z.len(), dz.len()),
            Logits::F32(z, dz) => (z.len(), dz.len()),
        }
    }

    fn split_at(self, at: usize) -> (Self, Self) {
        match self {
            Logits::F64(z, dz) => {
                let (z, dz) = (z.split_at(at), dz.split_at_mut(at));
                (Logits::F64(z.0, dz.0), Logits::F64(z.1, dz.1))
            }
            Logits::F32(z, dz) => {
                let (z, dz) = (z.split_at(at), dz.split_at_mut(at));
                (Logits::F32(z.0, dz.0), Logits::F32(z.1, dz.1))
            }
        }
    }

    #[inline(never)]
    fn read(&self, at: Range<usize>, to: &mut [f64]) {
        match self {
            Logits::F64(z, _) => to.copy_from_slice(&z[at]),
            Logits::F32(z, _) => to.iter_mut().zip(&z[at]).for_each(|(to, z)| *to = z.to_f64()),
        }
    }

    #[inline(never)]
    fn write(&mut self, at: Range<usize>, from: &[f64]) {
        match self {
            Logits::F64(_, dz) => dz[at].copy_from_slice(from),
            Logits::F32(_, dz) => dz[at].iter_mut().zip(from).for_each(|(dz, from)| *dz = Real::from_f64(*from)),
        }
    }
}

/// What each sample should be.
#[derive(Debug, Clone, Copy)]
pub enum Targets<'a> {
    /// A class index for each sample; float64 holds every one exactly.
    Labels(&'a [f64]),
    /// A probability for each sample and class.
    Soft(&'a [f64]),
}

impl Targets<'_> {
    #[inline(never)]
    fn check(self, samples: usize, classes: usize) -> Result<(), Error> {
        match self {
            Targets::Labels(labels) => {
                length("targets", labels, samples)?;
                let wrong = labels.iter().find(|label| !(**label >= 0.0 && **label < classes as f64));
                wrong
                    .map_or(Ok(()), |label| Err(Error::new("targets", format_args!("labels in [0, {classes})"), label)))
            }
            Targets::Soft(q) => {
                length("targets", q, samples * classes)?;
                // Wide enough for rows rounded to bfloat16.
                let wrong =
                    q.chunks_exact(classes).find(|q| !((sum(q) - 1.0).abs() < 2e-2 && q.iter().all(|q| *q >= 0.0)));
                let wanted = "rows of numbers of at least 0 that sum to 1";
                wrong.map_or(Ok(()), |row| {
                    let negative = row.iter().find(|q| **q < 0.0);
                    let sum = format!("a sum of {}", sum(row));
                    Err(Error::new("targets", wanted, negative.map_or(sum, |q| q.to_string())))
                })
            }
        }
    }

    fn split_at(self, samples: usize, classes: usize) -> (Self, Self) {
        match self {
            Targets::Labels(labels) => {
                let (left, right) = labels.split_at(samples);
                (Targets::Labels(left), Targets::Labels(right))
            }
            Targets::Soft(q) => {
                let (left, right) = q.split_at(samples * classes);
                (Targets::Soft(left), Targets::Soft(right))
            }
        }
    }

    /// What sample `n` takes from the logarithm of its `total`; its gradient takes the place of the powers `e`.
    #[inline(never)]
    fn take(self, n: usize, z: &[f64], e: &mut [f64], total: f64, smoothing: Smoothing, weight: f64) -> f64 {
        let (inverse, Smoothing { on, off }) = (1.0 / total, smoothing);
        match self {
            Targets::Labels(labels) => {
                let label = labels[n] as usize;
                let own = (e[label] * inverse - on) * weight;
                for e in e.iter_mut() {
                    *e = (*e * inverse - off) * weight;
                }
                e[label] = own;
                let dot = (on - off) * z[label];
                // Without smoothing an infinite logit of another class does not count.
                if off == 0.0 { dot } else { dot + off * sum(z) }
            }
            Targets::Soft(q) => {
                let (q, mut dot) = (&q[n * z.len()..][..z.len()], 0.0);
                for ((q, z), e) in q.iter().zip(z).zip(e) {
                    let q = q * (on - off) + off;
                    dot += q * z;
                    *e = (*e * inverse - q) * weight;
                }
                dot
            }
        }
    }
}

/// How much probability a hard target keeps, and how much every other class gets.
#[derive(Debug, Clone, Copy)]
pub struct Smoothing {
    /// Of the target's class.
    pub on: f64,
    /// Of every other class.
    pub off: f64,
}

/// The loss, `sum_i w_i (log sum_k exp z_ik - sum_k q_ik z_ik)`, and its gradient `w_i (p_ik - q_ik)`. All arithmetic is in
/// float64.
pub struct SoftmaxCrossEntropy<'a> {
    logits: Logits<'a>,
    samples: usize,
    classes: usize,
    targets: Targets<'a>,
    smoothing: Smoothing,
    weights: Option<&'a [f64]>,
    weight: f64,
}

impl<'a> SoftmaxCrossEntropy<'a> {
    /// Checks lengths and targets. Without `weights` every sample weighs 1 / N.
    pub fn new(
        logits: Logits<'a>,
        classes: usize,
        targets: Targets<'a>,
        smoothing: Smoothing,
        weights: Option<&'a [f64]>,
    ) -> Result<Self, Error> {
        let (classes, (len, gradient)) = (classes.max(1), logits.lengths());
        let samples = len / classes;
        targets.check(samples, classes)?;
        if let Some(weights) = weights {
            length("weights", weights, samples)?;
        }
        if gradient != len {
            return Err(Error::new("dlogits", format_args!("{len} elements"), gradient));
        }
        Ok(Self { logits, samples, classes, targets, smoothing, weights, weight: 1.0 / samples as f64 })
    }

    /// Launches the kernel: the loss.
    pub fn launch(self) -> f64 {
        launch(self)
    }
}

/// About so many logits are worked on at a time; a longer row is one block.
const BLOCK: usize = 512;

impl Kernel for SoftmaxCrossEntropy<'_> {
    type Out = f64;

    fn bytes(&self) -> usize {
        // An exponential costs more than moving a number: threads pay earlier.
        32 * self.samples * self.classes
    }

    fn halve(self) -> Result<(Self, Self), Self> {
        let at = self.samples / 2;
        if at == 0 {
            return Err(self);
        }
        let logits = self.logits.split_at(at * self.classes);
        let targets = self.targets.split_at(at, self.classes);
        let weights = self.weights.map(|weights| weights.split_at(at)).unzip();
        let left = Self { logits: logits.0, samples: at, targets: targets.0, weights: weights.0, ..self };
        let samples = self.samples - at;
        Ok((left, Self { logits: logits.1, samples, targets: targets.1, weights: weights.1, ..self }))
    }

    #[inline(always)]
    fn run(mut self, level: Level) -> f64 {
        let classes = self.classes;
        let rows = (BLOCK / classes).max(1);
        let len = (rows * classes).next_multiple_of(GROUP);
        // z less the largest of its row; e to the power of that, then the gradient.
        let mut scratch = vec![1.0; 2 * (len + rows.next_multiple_of(GROUP))];
        let (shifted, rest) = scratch.split_at_mut(len);
        let (powers, rest) = rest.split_at_mut(len);
        let (totals, dots) = rest.split_at_mut(rest.len() / 2);
        let mut loss = 0.0;
        for first in (0..self.samples).step_by(rows) {
            let count = rows.min(self.samples - first);
            let at = first * classes..(first + count) * classes;
            self.logits.read(at.clone(), &mut shifted[..at.len()]);
            shifted[..at.len()].chunks_exact_mut(classes).for_each(shift);
            exps(level, shifted, powers);
            let weight = |r: usize| self.weights.map_or(self.weight, |weights| weights[first + r]);
            for r in 0..count {
                let row = r * classes..(r + 1) * classes;
                let (z, e) = (&shifted[row.clone()], &mut powers[row]);
                totals[r] = sum(e);
                dots[r] = self.targets.take(first + r, z, e, totals[r], self.smoothing, weight(r));
            }
            self.logits.write(at.clone(), &powers[..at.len()]);
            lns(level, totals);
            for r in 0..count {
                loss += weight(r) * (totals[r] - dots[r]);
            }
        }
        loss
    }

    fn merge(left: f64, right: f64) -> f64 {
        left + right
    }
}

/// z less its largest number. NaN and an infinity of either sign end as NaN, as they do in the formula.
#[inline(never)]
fn shift(z: &mut [f64]) {
    let mut most = z[0];
    for z in &*z {
        most = if *z > most { *z } else { most };
    }
    for z in z {
        *z -= most;
    }
}

/// The sum in four chains.
#[inline(never)]
fn sum(x: &[f64]) -> f64 {
    let (groups, rest) = x.as_chunks::<4>();
    let mut chains = [0.0; 4];
    for group in groups {
        for l in 0..4 {
            chains[l] += group[l];
        }
    }
    let mut total = (chains[0] + chains[1]) + (chains[2] + chains[3]);
    for x in rest {
        total += x;
    }
    total
}
