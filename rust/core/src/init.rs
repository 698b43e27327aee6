//! Fills: element i of an array is a pure function of (seed, stream, i), for any thread count, CPU and device.

use crate::kernel::Kernel;
use crate::lanes::{LANES, Stores};
use crate::real::Real;
use crate::rng::{GROUP, group, normal_pair, unit};
use crate::simd::Level;
use crate::storage::Storage;

/// What is made of the random words of 64 elements.
pub trait Variate: Copy + Send + Sync {
    /// 64 float32 variates, word k of lane l at `[k][l]`.
    fn variates(self, words: [[u32; LANES]; 4]) -> [[f32; LANES]; 4];
}

/// Uniform on [0, 1), in steps of 2^-24.
#[derive(Debug, Clone, Copy)]
pub struct Uniform;

/// Standard normal.
#[derive(Debug, Clone, Copy)]
pub struct Normal;

impl Variate for Uniform {
    #[inline(always)]
    fn variates(self, words: [[u32; LANES]; 4]) -> [[f32; LANES]; 4] {
        // Loops: `map` may become a function of its own, outside the door of the kernel.
        let mut out = [[0.0; LANES]; 4];
        for k in 0..4 {
            for l in 0..LANES {
                out[k][l] = unit(words[k][l]);
            }
        }
        out
    }
}

impl Variate for Normal {
    #[inline(always)]
    fn variates(self, words: [[u32; LANES]; 4]) -> [[f32; LANES]; 4] {
        let mut out = [[0.0; LANES]; 4];
        for pair in 0..2 {
            for l in 0..LANES {
                let values = normal_pair(words[2 * pair][l], words[2 * pair + 1][l]);
                out[2 * pair][l] = values[0];
                out[2 * pair + 1][l] = values[1];
            }
        }
        out
    }
}

/// Fills with `shift + scale * variate`, product and sum rounded separately in the arithmetic type.
pub struct Fill<'a, S: Storage, V> {
    out: &'a mut [S],
    variate: V,
    seed: u64,
    stream: u32,
    attempt: u32,
    first: u64,
    shift: S::Real,
    scale: S::Real,
    past: bool,
}

impl<'a, S: Storage, V: Variate> Fill<'a, S, V> {
    /// Fills all of `out`.
    pub fn new(out: &'a mut [S], variate: V, seed: u64, stream: u32, shift: f64, scale: f64) -> Self {
        let past = Stores::joined(out, GROUP, 0) != Stores::Cached;
        let (shift, scale) = (S::Real::from_f64(shift), S::Real::from_f64(scale));
        Self { out, variate, seed, stream, attempt: 0, first: 0, shift, scale, past }
    }

    /// The same fill with other words: of the counters whose last part is `attempt`.
    pub fn attempt(self, attempt: u32) -> Self {
        Self { attempt, ..self }
    }
}

impl<S: Storage, V: Variate> Kernel for Fill<'_, S, V> {
    type Out = ();

    fn bytes(&self) -> usize {
        // Making a number costs more than moving one: threads pay earlier.
        4 * size_of_val(self.out)
    }

    fn halve(self) -> Result<(Self, Self), Self> {
        let at = self.out.len() / 2 / GROUP * GROUP;
        if at == 0 {
            return Err(self);
        }
        let (left, right) = self.out.split_at_mut(at);
        Ok((Self { out: left, ..self }, Self { out: right, first: self.first + (at / GROUP) as u64, ..self }))
    }

    #[inline(always)]
    fn run(self, level: Level) {
        for (b, chunk) in (self.first..).zip(self.out.chunks_mut(GROUP)) {
            let variates = self.variate.variates(group(self.seed, self.stream, self.attempt, b));
            for k in 0..4 {
                let mut values = [S::Real::ZERO; LANES];
                for l in 0..LANES {
                    values[l] = self.shift + self.scale * S::Real::from_f32(variates[k][l]);
                }
                let from = (k * LANES).min(chunk.len());
                let part = &mut chunk[from..];
                if part.len() >= LANES && self.past {
                    S::stream(level, values, part);
                } else if part.len() >= LANES {
                    S::store(values, part);
                } else {
                    for (to, value) in part.iter_mut().zip(values) {
                        *to = S::narrow(value);
                    }
                }
            }
        }
    }

    fn merge(_: (), _: ()) {}
}

/// Fills with the words themselves.
pub struct Words<'a> {
    out: &'a mut [u32],
    seed: u64,
    stream: u32,
    attempt: u32,
    first: u64,
}

impl<'a> Words<'a> {
    /// Fills all of `out`.
    pub fn new(out: &'a mut [u32], seed: u64, stream: u32, attempt: u32) -> Self {
        Self { out, seed, stream, attempt, first: 0 }
    }
}

impl Kernel for Words<'_> {
    type Out = ();

    fn bytes(&self) -> usize {
        size_of_val(self.out)
    }

    fn halve(self) -> Result<(Self, Self), Self> {
        let at = self.out.len() / 2 / GROUP * GROUP;
        if at == 0 {
            return Err(self);
        }
        let (left, right) = self.out.split_at_mut(at);
        Ok((Self { out: left, ..self }, Self { out: right, first: self.first + (at / GROUP) as u64, ..self }))
    }

    #[inline(always)]
    fn run(self, _: Level) {
        for (b, chunk) in self.out.chunks_mut(GROUP).enumerate() {
            let words = group(self.seed, self.stream, self.attempt, self.first + b as u64);
            chunk.copy_from_slice(&words.as_flattened()[..chunk.len()]);
        }
    }

    fn merge(_: (), _: ()) {}
}
