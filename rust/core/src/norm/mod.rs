//! Normalisation, forward and backward: batch norm (Ioffe, Szegedy 2015, arXiv:1502.03167) here, layer norm and RMS norm
//! in [`rows`], group norm and instance norm in [`groups`].
//!
//! Batch norm sees an array as (outer, channels, inner) around its channel axis, with one statistic per channel over outer
//! and inner. [`planes`] handles inner > 1 (channels first), [`columns`] inner = 1 (channels last and plain matrices): of
//! each there is the file of its sums, one that ends in `_write`, and one that ends in `_backward`.
//!
//! Training is statistics, [`finish`], [`apply`]; [`train`] does all three, and where the slice of a channel fits in
//! cache it reads x from memory once. The same bits come out either way.

pub mod columns;
mod columns_backward;
mod columns_write;
pub mod groups;
mod groups_backward;
pub mod planes;
mod planes_backward;
mod planes_write;
mod region;
pub mod rows;
mod rows_backward;
mod small;

use crate::error::{Error, length};
use crate::kernel::{Kernel, launch, launch_on, threads};
use crate::moments::Channels;
use crate::real::{Real, split};
use crate::storage::Storage;

/// An array around its channel axis.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// The product of the axes before the channel axis.
    pub outer: usize,
    /// The number of channels.
    pub channels: usize,
    /// The product of the axes after the channel axis.
    pub inner: usize,
}

impl Shape {
    /// How many elements.
    pub fn len(&self) -> usize {
        self.outer * self.channels * self.inner
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many elements each channel has.
    pub fn count(&self) -> usize {
        self.outer * self.inner
    }
}

/// What statistics are taken of: x, and the weight of each position, `outer * inner` of them.
#[derive(Clone, Copy)]
pub struct Data<'a, S: Storage> {
    pub(crate) x: &'a [S],
    pub(crate) weights: Option<&'a [S::Real]>,
    pub(crate) shape: Shape,
}

impl<'a, S: Storage> Data<'a, S> {
    /// Checks the lengths.
    pub fn new(x: &'a [S], weights: Option<&'a [S::Real]>, shape: Shape) -> Result<Self, Error> {
        length("x", x, shape.len())?;
        if let Some(weights) = weights {
            length("weights", weights, shape.count())?;
        }
        Ok(Self { x, weights, shape })
    }
}

/// How each channel is normalised: `y = ((x - hi) - lo) * (gamma * rstd) + beta`.
///
/// The mean travels as hi + lo; the folded form `x * a + (beta - mean * a)` would lose digits where the mean is large.
#[derive(Clone, Copy)]
pub struct Affine<'a, R> {
    pub(crate) hi: &'a [R],
    pub(crate) lo: &'a [R],
    pub(crate) rstd: &'a [R],
    pub(crate) gamma: &'a [R],
    pub(crate) beta: &'a [R],
}

impl<'a, R> Affine<'a, R> {
    /// Checks the lengths: one of each per channel.
    pub fn new(
        channels: usize,
        hi: &'a [R],
        lo: &'a [R],
        rstd: &'a [R],
        gamma: &'a [R],
        beta: &'a [R],
    ) -> Result<Self, Error> {
        for (name, slice) in [("hi", hi), ("lo", lo), ("rstd", rstd), ("gamma", gamma), ("beta", beta)] {
            length(name, slice, channels)?;
        }
        Ok(Self { hi, lo, rstd, gamma, beta })
    }

    fn one(&self, c: usize) -> [R; 5]
    where
        R: Copy,
    {
        [self.hi[c], self.lo[c], self.rstd[c], self.gamma[c], self.beta[c]]
    }
}

/// What turns sums into a normalisation, and how running statistics follow.
#[derive(Debug, Clone, Copy)]
pub struct Finish {
    /// Added to the variance, inside the root.
    pub eps: f64,
    /// The weight of this batch in the running statistics.
    pub momentum: f64,
    /// Whether the running variance is corrected by n / (n - 1).
    pub unbiased: bool,
}

/// Where the statistics of each channel go: `hi + lo` is the mean, `rstd = 1 / sqrt(var + eps)`, and the running mean
/// and variance are moved towards this batch's.
pub struct Statistics<'a, R> {
    /// The mean, rounded to the arithmetic type.
    pub hi: &'a mut [R],
    /// What the rounding lost.
    pub lo: &'a mut [R],
    /// 1 / sqrt(var + eps).
    pub rstd: &'a mut [R],
    /// Running mean and variance.
    pub running: Option<(&'a mut [R], &'a mut [R])>,
}

impl<R: Real> Statistics<'_, R> {
    fn check(&self, channels: usize) -> Result<(), Error> {
        for (name, slice) in [("hi", &*self.hi), ("lo", &*self.lo), ("rstd", &*self.rstd)] {
            length(name, slice, channels)?;
        }
        if let Some((mean, var)) = &self.running {
            length("running_mean", mean, channels)?;
            length("running_var", var, channels)?;
        }
        Ok(())
    }

    /// Of channels from `first` on. Not inlined: once for many elements.
    #[inline(never)]
    fn put(&mut self, first: usize, count: f64, mean: &[f64], m2: &[f64], finish: Finish) {
        for (c, (&mean, &m2)) in (first..).zip(mean.iter().zip(m2)) {
            let var = m2 / count;
            (self.hi[c], self.lo[c]) = split(mean);
            self.rstd[c] = R::from_f64(1.0 / (var + finish.eps).sqrt());
            if let Some((running_mean, running_var)) = &mut self.running {
                let var = if finish.unbiased { m2 / (count - 1.0) } else { var };
                running_mean[c] = crate::ema::mix(running_mean[c], mean, finish.momentum);
                running_var[c] = crate::ema::mix(running_var[c], var, finish.momentum);
            }
        }
    }
}

/// Whether training reads each element from memory once, because the slice of a channel stays in cache; `size` is the
/// number of bytes read per element.
pub fn one_pass(shape: Shape, size: usize) -> bool {
    region::resident(shape, size)
}

/// Count, mean and centred second moment of every channel.
pub fn stats<S: Storage>(data: Data<'_, S>) -> Channels {
    if data.shape.inner == 1 {
        columns::stats(data)
    } else if data.weights.is_some() {
        launch(planes::Stats::<S, true>::new(data))
    } else if let Some(shape) = small::matrix(data.shape) {
        small::channels(&columns::stats(Data { shape, ..data }), data.shape.inner)
    } else {
        launch(planes::Stats::<S, false>::new(data))
    }
}

/// From moments to what [`apply`] needs.
pub fn finish<R: Real>(
    count: f64,
    mean: &[f64],
    m2: &[f64],
    rule: Finish,
    mut out: Statistics<'_, R>,
) -> Result<(), Error> {
    length("m2", m2, mean.len())?;
    out.check(mean.len())?;
    out.put(0, count, mean, m2, rule);
    Ok(())
}

/// Checks the lengths of the data.
fn check<S>(shape: Shape, x: &[S], residual: Option<&[S]>, y: &[S]) -> Result<(), Error> {
    length("x", x, shape.len())?;
    length("y", y, shape.len())?;
    residual.map_or(Ok(()), |residual| length("residual", residual, shape.len()))
}

/// `y = normalised x (+ residual)`, cut off below zero with `relu`.
pub fn apply<S: Storage>(
    x: &[S],
    shape: Shape,
    affine: Affine<'_, S::Real>,
    residual: Option<&[S]>,
    relu: bool,
    y: &mut [S],
) -> Result<(), Error> {
    check(shape, x, residual, y)?;
    if shape.inner == 1 {
        columns_write::apply(x, shape, affine, residual, relu, y);
    } else if let Some(matrix) = small::matrix(shape) {
        let vectors = small::Vectors::new(affine, shape.inner);
        columns_write::apply(x, matrix, vectors.affine(), residual, relu, y);
    } else {
        planes_write::apply(x, shape, affine, residual, relu, y);
    }
    Ok(())
}

/// [`stats`], [`finish`] and [`apply`] in one call; hands the moments back.
pub fn train<S: Storage>(
    data: Data<'_, S>,
    rule: Finish,
    gamma: &[S::Real],
    beta: &[S::Real],
    residual: Option<&[S]>,
    relu: bool,
    mut out: Statistics<'_, S::Real>,
    y: &mut [S],
) -> Result<Channels, Error> {
    let shape = data.shape;
    length("gamma", gamma, shape.channels)?;
    length("beta", beta, shape.channels)?;
    check(shape, data.x, residual, y)?;
    out.check(shape.channels)?;
    if data.weights.is_none() && region::resident(shape, size_of::<S>()) {
        return Ok(launch(planes::Train::new(data, rule, gamma, beta, residual, relu, out, y)));
    }
    let moments = stats(data);
    out.put(0, moments.count, &moments.mean, &moments.m2, rule);
    let affine = Affine { hi: out.hi, lo: out.lo, rstd: out.rstd, gamma, beta };
    apply(data.x, shape, affine, residual, relu, y)?;
    Ok(moments)
}

/// What a backward pass reads: the upstream gradient, and what the forward had.
#[derive(Clone, Copy)]
pub struct Upstream<'a, S: Storage> {
    pub(crate) dy: &'a [S],
    pub(crate) data: Data<'a, S>,
    pub(crate) affine: Affine<'a, S::Real>,
    pub(crate) residual: Option<&'a [S]>,
    pub(crate) relu: bool,
}

impl<'a, S: Storage> Upstream<'a, S> {
    /// Checks the lengths. `residual` matters only with `relu`, whose mask is computed again from x.
    pub fn new(
        dy: &'a [S],
        data: Data<'a, S>,
        affine: Affine<'a, S::Real>,
        residual: Option<&'a [S]>,
        relu: bool,
    ) -> Result<Self, Error> {
        length("dy", dy, data.shape.len())?;
        let residual = if relu { residual } else { None };
        if let Some(residual) = residual {
            length("residual", residual, data.shape.len())?;
        }
        Ok(Self { dy, data, affine, residual, relu })
    }
}

/// Per channel, over all positions: the sum of dz and of dz * x̂, where dz is dy behind the ReLU's mask. These are the
/// gradients of beta and gamma.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Sums {
    /// The first channel that this part covers.
    pub first: usize,
    /// One sum of dz per channel.
    pub dy: Vec<f64>,
    /// One sum of dz * x̂ per channel.
    pub dy_xhat: Vec<f64>,
}

impl Sums {
    fn zero(first: usize, n: usize) -> Self {
        Self { first, dy: vec![0.0; n], dy_xhat: vec![0.0; n] }
    }

    fn merge(mut self, other: Self) -> Self {
        if other.first != self.first {
            self.dy.extend(other.dy);
            self.dy_xhat.extend(other.dy_xhat);
            return self;
        }
        for c in 0..self.dy.len() {
            self.dy[c] += other.dy[c];
            self.dy_xhat[c] += other.dy_xhat[c];
        }
        self
    }
}

/// The gradients of beta and gamma.
pub fn backward_reduce<S: Storage>(up: Upstream<'_, S>) -> Sums {
    let inner = up.data.shape.inner;
    if inner == 1 {
        columns_backward::reduce(up)
    } else if let Some(matrix) = small::matrix(up.data.shape) {
        let vectors = small::Vectors::new(up.affine, inner);
        small::sums(&columns_backward::reduce(small::upstream(up, matrix, &vectors)), inner)
    } else {
        launch(planes_backward::Reduce::new(up))
    }
}

/// The gradient of x:
/// `dx = gamma * rstd * (dz - w * sum(dz) / count - x̂ * w * sum(dz * x̂) / count)`, and dz itself into `dresidual`.
/// w is 1 without weights. Sums of zero give the gradient with constant statistics.
pub fn backward_apply<S: Storage>(
    up: Upstream<'_, S>,
    count: f64,
    sums: &Sums,
    dx: &mut [S],
    dresidual: Option<&mut [S]>,
) -> Result<(), Error> {
    let shape = up.data.shape;
    length("sum_dy", &sums.dy, shape.channels)?;
    length("sum_dy_xhat", &sums.dy_xhat, shape.channels)?;
    length("dx", dx, shape.len())?;
    if let Some(dresidual) = &dresidual {
        length("dresidual", dresidual, shape.len())?;
    }
    let mean_dy: Vec<_> = sums.dy.iter().map(|sum| mean_dy(*sum, count)).collect();
    let slope: Vec<_> = sums.dy_xhat.iter().zip(up.affine.rstd).map(|(sum, rstd)| slope(*sum, count, *rstd)).collect();
    if shape.inner == 1 {
        columns_backward::apply(up, &mean_dy, &slope, dx, dresidual);
    } else if let (Some(matrix), None) = (small::matrix(shape), up.data.weights) {
        let vectors = small::Vectors::new(up.affine, shape.inner);
        let [mean_dy, slope] = [mean_dy, slope].map(|v| small::spread(&v, shape.inner));
        columns_backward::apply(small::upstream(up, matrix, &vectors), &mean_dy, &slope, dx, dresidual);
    } else {
        planes_backward::apply(up, &mean_dy, &slope, dx, dresidual);
    }
    Ok(())
}

/// [`backward_reduce`] and [`backward_apply`] in one call.
pub fn backward<S: Storage>(
    up: Upstream<'_, S>,
    count: f64,
    dx: &mut [S],
    dresidual: Option<&mut [S]>,
) -> Result<Sums, Error> {
    let shape = up.data.shape;
    if up.data.weights.is_none() && region::resident(shape, 2 * size_of::<S>()) {
        length("dx", dx, shape.len())?;
        if let Some(dresidual) = &dresidual {
            length("dresidual", dresidual, shape.len())?;
        }
        return Ok(launch(planes_backward::Backward::new(up, count, dx, dresidual)));
    }
    let sums = backward_reduce(up);
    backward_apply(up, count, &sums, dx, dresidual)?;
    Ok(sums)
}

/// Runs a kernel: `alone` on this thread, where the others do the like, or on all.
fn start<K: Kernel>(alone: bool, kernel: K) -> K::Out {
    launch_on(if alone { 1 } else { threads() }, kernel)
}

/// x̂ * sd: x minus its mean.
#[inline(always)]
fn centred<R: Real>(x: R, hi: R, lo: R) -> R {
    (x - hi) - lo
}

/// `if z < 0 { 0 } else { z }` for a floor of 0, z for a floor of -inf; NaN stays.
#[inline(always)]
fn floored<R: Real>(z: R, floor: R) -> R {
    if z < floor { floor } else { z }
}

/// The floor of [`floored`].
fn floor<R: Real>(relu: bool) -> R {
    if relu { R::ZERO } else { R::from_f64(f64::NEG_INFINITY) }
}

/// dy where the pre-activation z let it pass.
#[inline(always)]
fn masked<R: Real>(dy: R, z: R) -> R {
    if z <= R::ZERO { R::ZERO } else { dy }
}

/// The mean of dz over a channel.
#[inline(always)]
fn mean_dy<R: Real>(sum: f64, count: f64) -> R {
    R::from_f64(sum / count)
}

/// rstd times the mean of dz * x̂ over a channel.
#[inline(always)]
fn slope<R: Real>(sum: f64, count: f64, rstd: R) -> R {
    R::from_f64(sum / count * rstd.to_f64())
}

/// One element of dx, from dz and x - mean; per channel `scale = gamma * rstd`, `mean_dy` is the mean of dz and
/// `slope` is rstd times the mean of dz * x̂.
#[inline(always)]
fn gradient<R: Real>(dz: R, centred: R, scale: R, mean_dy: R, slope: R) -> R {
    ((dz - mean_dy) - centred * slope) * scale
}
