//! The yardsticks: how fast this machine moves bytes when there is next to nothing to compute.

use crate::error::{Error, length};
use crate::kernel::Kernel;
use crate::lanes::{LANES, Stores, map};
use crate::simd::Level;
use crate::storage::Storage;

/// Copies, past the caches where an output of that size would be: the yardstick of everything that writes a new array.
pub struct Copy<'a> {
    from: &'a [f32],
    to: &'a mut [f32],
    stores: Stores,
}

impl<'a> Copy<'a> {
    /// Checks the lengths.
    pub fn new(from: &'a [f32], to: &'a mut [f32]) -> Result<Self, Error> {
        length("to", to, from.len())?;
        let stores = Stores::joined(to, LANES, 1);
        Ok(Self { from, to, stores })
    }
}

fn cut(len: usize) -> Option<usize> {
    if len < 2 * LANES { None } else { Some(len / 2 / LANES * LANES) }
}

impl Kernel for Copy<'_> {
    type Out = ();

    fn bytes(&self) -> usize {
        size_of_val(self.from) + size_of_val(self.to)
    }

    fn halve(self) -> Result<(Self, Self), Self> {
        let Some(at) = cut(self.from.len()) else { return Err(self) };
        let (from, to) = (self.from.split_at(at), self.to.split_at_mut(at));
        let stores = self.stores;
        Ok((Self { from: from.0, to: to.0, stores }, Self { from: from.1, to: to.1, stores }))
    }

    #[inline(always)]
    fn run(self, level: Level) {
        map(level, [self.from], [], [self.to], self.stores, [], |x, []| x);
    }

    fn merge(_: (), _: ()) {}
}

/// Adds the sum of some arrays to each of some others: the yardstick of an optimizer that reads and writes as many.
pub struct Update<'a> {
    inputs: Vec<&'a [f32]>,
    arrays: Vec<&'a mut [f32]>,
}

impl<'a> Update<'a> {
    /// At least one array to read, and one to four of the same length to change.
    pub fn new(inputs: Vec<&'a [f32]>, arrays: Vec<&'a mut [f32]>) -> Result<Self, Error> {
        let Some(first) = inputs.first() else { return Err(Error::new("inputs", "at least one array", 0)) };
        for input in &inputs {
            length("inputs", input, first.len())?;
        }
        if !(1..=4).contains(&arrays.len()) {
            return Err(Error::new("arrays", "1 to 4 arrays", arrays.len()));
        }
        for array in &arrays {
            length("arrays", array, first.len())?;
        }
        Ok(Self { inputs, arrays })
    }
}

#[inline(always)]
fn update<const N: usize>(inputs: &[&[f32]], arrays: Vec<&mut [f32]>) {
    let mut arrays: [&mut [f32]; N] = arrays.try_into().expect("as many arrays as counted");
    for i in 0..inputs[0].len() / LANES {
        let at = i * LANES..(i + 1) * LANES;
        let mut g: [f32; LANES] = f32::load(&inputs[0][at.clone()]);
        for input in &inputs[1..] {
            let more: [f32; LANES] = f32::load(&input[at.clone()]);
            for l in 0..LANES {
                g[l] += more[l];
            }
        }
        for array in &mut arrays {
            let mut sum: [f32; LANES] = f32::load(&array[at.clone()]);
            for l in 0..LANES {
                sum[l] += g[l];
            }
            f32::store(sum, &mut array[at.clone()]);
        }
    }
}

impl Kernel for Update<'_> {
    type Out = ();

    fn bytes(&self) -> usize {
        size_of_val(self.inputs[0]) * (self.inputs.len() + 2 * self.arrays.len())
    }

    fn halve(self) -> Result<(Self, Self), Self> {
        let Some(at) = cut(self.inputs[0].len()) else { return Err(self) };
        let inputs: (Vec<_>, Vec<_>) = self.inputs.into_iter().map(|input| input.split_at(at)).unzip();
        let (left, right) = self.arrays.into_iter().map(|array| array.split_at_mut(at)).unzip();
        Ok((Self { inputs: inputs.0, arrays: left }, Self { inputs: inputs.1, arrays: right }))
    }

    #[inline(always)]
    fn run(self, _: Level) {
        match self.arrays.len() {
            1 => update::<1>(&self.inputs, self.arrays),
            2 => update::<2>(&self.inputs, self.arrays),
            3 => update::<3>(&self.inputs, self.arrays),
            _ => update::<4>(&self.inputs, self.arrays),
        }
    }

    fn merge(_: (), _: ()) {}
}
