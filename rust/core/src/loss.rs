//! Softmax and cross-entropy in one pass over the logits.

use crate::error::{Error, length};
use crate::exp::{exp, ln};
use crate::kernel::{Kernel, launch};
use crate::real::Real;
use crate::simd::Level;

/// What each sample should be.
#[derive(Debug, Clone, Copy)]
pub enum Targets<'a, R> {
    /// A class index for each sample; float64 holds every one exactly.
    Labels(&'a [f64]),
    /// A probability for each sample and class.
    Soft(&'a [R]),
}

impl<'a, R: Real> Targets<'a, R> {
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
                for (n, q) in q.chunks_exact(classes).enumerate() {
                    let sum: f64 = q.iter().map(|q| q.to_f64()).sum();
                    // Wide enough for rows rounded to bfloat16.
                    if !((sum - 1.0).abs() < 2e-2 && q.iter().all(|q| *q >= R::ZERO)) {
                        let got = format_args!("those of sample {n}, whose sum is {sum}").to_string();
                        return Err(Error::new("targets", "rows of numbers of at least 0 that sum to 1", got));
                    }
                }
                Ok(())
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
pub struct SoftmaxCrossEntropy<'a, R> {
    logits: &'a [R],
    classes: usize,
    targets: Targets<'a, R>,
    smoothing: Smoothing,
    weights: Option<&'a [f64]>,
    weight: f64,
    dlogits: &'a mut [R],
}

impl<'a, R: Real> SoftmaxCrossEntropy<'a, R> {
    /// Checks lengths and targets. Without `weights` every sample weighs 1 / N.
    pub fn new(
        logits: &'a [R],
        classes: usize,
        targets: Targets<'a, R>,
        smoothing: Smoothing,
        weights: Option<&'a [f64]>,
        dlogits: &'a mut [R],
    ) -> Result<Self, Error> {
        let classes = classes.max(1);
        let samples = logits.len() / classes;
        targets.check(samples, classes)?;
        if let Some(weights) = weights {
            length("weights", weights, samples)?;
        }
        length("dlogits", dlogits, logits.len())?;
        Ok(Self { logits, classes, targets, smoothing, weights, weight: 1.0 / samples as f64, dlogits })
    }

    /// Launches the kernel: the loss.
    pub fn launch(self) -> f64 {
        launch(self)
    }
}

/// Exponentials that are taken together.
const GROUP: usize = 8;

/// About so many logits are worked on at a time; a longer row is one block.
const BLOCK: usize = 512;

impl<R: Real> Kernel for SoftmaxCrossEntropy<'_, R> {
    type Out = f64;

    fn bytes(&self) -> usize {
        // An exponential costs more than moving a number: threads pay earlier.
        8 * size_of_val(self.logits)
    }

    fn halve(self) -> Result<(Self, Self), Self> {
        let at = self.logits.len() / self.classes / 2;
        if at == 0 {
            return Err(self);
        }
        let (logits, dlogits) = (self.logits.split_at(at * self.classes), self.dlogits.split_at_mut(at * self.classes));
        let targets = self.targets.split_at(at, self.classes);
        let weights = self.weights.map(|weights| weights.split_at(at)).unzip();
        let left = Self { logits: logits.0, targets: targets.0, weights: weights.0, dlogits: dlogits.0, ..self };
        Ok((left, Self { logits: logits.1, targets: targets.1, weights: weights.1, dlogits: dlogits.1, ..self }))
    }

    #[inline(always)]
    fn run(self, _: Level) -> f64 {
        let classes = self.classes;
        let rows = (BLOCK / classes).max(1);
        let len = (rows * classes).next_multiple_of(GROUP);
        // z less the largest of its row, and e to the power of that.
        let (mut shifted, mut powers) = (vec![0.0; len], vec![0.0; len]);
        let mut totals = vec![1.0; rows.next_multiple_of(GROUP)];
        let mut dots = vec![0.0; rows];
        let mut loss = 0.0;
        let blocks = self.logits.chunks(rows * classes).zip(self.dlogits.chunks_mut(rows * classes));
        for (first, (logits, dlogits)) in (0..).step_by(rows).zip(blocks) {
            for (z, shifted) in logits.chunks_exact(classes).zip(shifted.chunks_exact_mut(classes)) {
                shift(z, shifted);
            }
            for (x, y) in shifted.as_chunks().0.iter().zip(powers.as_chunks_mut::<GROUP>().0) {
                *y = exp(*x);
            }
            let weight = |r: usize| self.weights.map_or(self.weight, |weights| weights[first + r]);
            for (r, dz) in dlogits.chunks_exact_mut(classes).enumerate() {
                let at = r * classes..(r + 1) * classes;
                let (z, e) = (&shifted[at.clone()], &powers[at]);
                totals[r] = sum(e);
                let inverse = 1.0 / totals[r];
                dots[r] = match self.targets {
                    Targets::Labels(labels) => {
                        hard(z, e, inverse, labels[first + r] as usize, self.smoothing, weight(r), dz)
                    }
                    Targets::Soft(q) => {
                        let q = &q[(first + r) * classes..][..classes];
                        soft(z, e, inverse, q, self.smoothing, weight(r), dz)
                    }
                };
            }
            for group in totals.as_chunks_mut::<GROUP>().0 {
                *group = ln(*group);
            }
            for r in 0..dlogits.len() / classes {
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
#[inline(always)]
fn shift<R: Real>(z: &[R], shifted: &mut [f64]) {
    let mut most = z[0];
    for z in z {
        most = if *z > most { *z } else { most };
    }
    let most = most.to_f64();
    for (z, shifted) in z.iter().zip(shifted) {
        *shifted = z.to_f64() - most;
    }
}

/// The sum in four chains.
#[inline(always)]
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

/// What class `label` takes from a sample's loss; the gradient goes to `dz`.
#[inline(always)]
fn hard<R: Real>(
    z: &[f64],
    e: &[f64],
    inverse: f64,
    label: usize,
    Smoothing { on, off }: Smoothing,
    weight: f64,
    dz: &mut [R],
) -> f64 {
    for (e, dz) in e.iter().zip(dz.iter_mut()) {
        *dz = R::from_f64((e * inverse - off) * weight);
    }
    dz[label] = R::from_f64((e[label] * inverse - on) * weight);
    let dot = (on - off) * z[label];
    // Without smoothing an infinite logit of another class does not count.
    if off == 0.0 { dot } else { dot + off * sum(z) }
}

/// What the probabilities `q` take from a sample's loss; the gradient goes to `dz`.
#[inline(always)]
fn soft<R: Real>(
    z: &[f64],
    e: &[f64],
    inverse: f64,
    q: &[R],
    Smoothing { on, off }: Smoothing,
    weight: f64,
    dz: &mut [R],
) -> f64 {
    let mut dot = 0.0;
    for k in 0..z.len() {
        let q = q[k].to_f64() * (on - off) + off;
        dot += q * z[k];
        dz[k] = R::from_f64((e[k] * inverse - q) * weight);
    }
    dot
}
