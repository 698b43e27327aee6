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
        let stores = Stores::joined(to, LANES);
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

/// Reads `g` and some arrays and writes the arrays back, with one addition per element and array: the yardstick of an
/// optimizer with as many arrays.
pub struct Update<'a> {
    g: &'a [f32],
    arrays: Vec<&'a mut [f32]>,
}

impl<'a> Update<'a> {
    /// One to four arrays as long as `g`.
    pub fn new(g: &'a [f32], arrays: Vec<&'a mut [f32]>) -> Result<Self, Error> {
        if !(1..=4).contains(&arrays.len()) {
            return Err(Error::new("arrays", "1 to 4 arrays", arrays.len()));
        }
        for array in &arrays {
            length("arrays", array, g.len())?;
        }
        Ok(Self { g, arrays })
    }
}

#[inline(always)]
fn update<const N: usize>(g: &[f32], arrays: Vec<&mut [f32]>) {
    let mut arrays: [&mut [f32]; N] = arrays.try_into().expect("as many arrays as counted");
    for i in 0..g.len() / LANES {
        let at = i * LANES..(i + 1) * LANES;
        let g: [f32; LANES] = f32::load(&g[at.clone()]);
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
        size_of_val(self.g) * (1 + 2 * self.arrays.len())
    }

    fn halve(self) -> Result<(Self, Self), Self> {
        let Some(at) = cut(self.g.len()) else { return Err(self) };
        let g = self.g.split_at(at);
        let (left, right) = self.arrays.into_iter().map(|array| array.split_at_mut(at)).unzip();
        Ok((Self { g: g.0, arrays: left }, Self { g: g.1, arrays: right }))
    }

    #[inline(always)]
    fn run(self, _: Level) {
        match self.arrays.len() {
            1 => update::<1>(self.g, self.arrays),
            2 => update::<2>(self.g, self.arrays),
            3 => update::<3>(self.g, self.arrays),
            _ => update::<4>(self.g, self.arrays),
        }
    }

    fn merge(_: (), _: ()) {}
}
