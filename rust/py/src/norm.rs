//! Batch norm, forward.

use crate::array::{Checked, Dtype, Element, Noted, Opening};
use crate::gate::{self, Fault, Outcome, error};
use kilter_core::norm::{self, Affine, Data, Finish, Shape, Statistics};
use kilter_core::storage::Storage;
use kilter_core::{Error, bf16, f16};
use pyo3::prelude::*;
use std::cell::OnceCell;

pub(crate) type Array<'py> = Bound<'py, PyAny>;

/// Adds the functions to the module.
pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(bn_stats, m)?)?;
    m.add_function(wrap_pyfunction!(bn_finish, m)?)?;
    m.add_function(wrap_pyfunction!(bn_apply, m)?)?;
    m.add_function(wrap_pyfunction!(bn_infer, m)?)?;
    m.add_function(wrap_pyfunction!(bn_train, m)?)
}

/// The array around its channel axis.
pub(crate) fn around(x: &Noted<'_>, axis: usize) -> Outcome<Shape> {
    let shape = x.shape();
    let Some(&channels) = shape.get(axis) else {
        return Err(error(Error::new("axis", format_args!("less than {}", shape.len()), axis)));
    };
    Ok(Shape { outer: shape[..axis].iter().product(), channels, inner: shape[axis + 1..].iter().product() })
}

/// Refuses an array of another shape than x's.
pub(crate) fn alike(array: Option<&Noted<'_>>, x: &Noted<'_>) -> Outcome<()> {
    match array {
        Some(array) if array.shape() != x.shape() => {
            let wanted = format!("shape {:?}", x.shape());
            Err(error(Error::new(array.name(), wanted, format_args!("{:?}", array.shape()))))
        }
        _ => Ok(()),
    }
}

pub(crate) fn not_data(dtype: Dtype) -> Fault {
    error(Error::new("x", "dtype float64, float32, float16 or bfloat16", dtype.name()))
}

/// The scalars of `finish`: eps, momentum, unbiased.
fn finish_rule(h: &[f64]) -> Outcome<Finish> {
    match *h {
        [eps, momentum, unbiased] => Ok(Finish { eps, momentum, unbiased: unbiased != 0.0 }),
        _ => Err(error(Error::new("h", "eps, momentum, unbiased", format_args!("{} numbers", h.len())))),
    }
}

pub(crate) fn one(count: &[f64]) -> Outcome<f64> {
    match *count {
        [count] => Ok(count),
        _ => Err(error(Error::new("count", "one number", count.len()))),
    }
}

#[pyfunction]
fn bn_stats(
    py: Python<'_>,
    x: &Array<'_>,
    axis: usize,
    weights: Option<&Array<'_>>,
    count: &Array<'_>,
    mean: &Array<'_>,
    m2: &Array<'_>,
) -> Outcome<()> {
    let mut o = Opening::default();
    let (x, weights) = (o.read("x", x)?, o.maybe("weights", weights)?);
    let out = [o.write("count", count)?, o.write("mean", mean)?, o.write("m2", m2)?];
    let (shape, checked) = (around(&x, axis)?, o.check()?);
    match x.dtype {
        Dtype::F64 => stats::<f64>(py, &checked, &x, &weights, shape, out),
        Dtype::F32 => stats::<f32>(py, &checked, &x, &weights, shape, out),
        Dtype::F16 => stats::<f16>(py, &checked, &x, &weights, shape, out),
        Dtype::Bf16 => stats::<bf16>(py, &checked, &x, &weights, shape, out),
        Dtype::U32 => Err(not_data(x.dtype)),
    }
}

fn stats<S: Storage + Element>(
    py: Python<'_>,
    checked: &Checked,
    x: &Noted<'_>,
    weights: &Option<Noted<'_>>,
    shape: Shape,
    [count, mean, m2]: [Noted<'_>; 3],
) -> Outcome<()>
where
    S::Real: Element,
{
    let (x, weights) = (checked.read::<S>(x)?, checked.maybe(weights)?);
    let (count, mean, m2) = (checked.write(&count)?, checked.write(&mean)?, checked.write(&m2)?);
    gate::run(py, || copy_moments(norm::stats(Data::new(x, weights, shape)?), count, mean, m2))
}

fn copy_moments(
    moments: kilter_core::moments::Channels,
    count: &mut [f64],
    mean: &mut [f64],
    m2: &mut [f64],
) -> Result<(), Error> {
    fill(count, &[moments.count], "count")?;
    fill(mean, &moments.mean, "mean")?;
    fill(m2, &moments.m2, "m2")
}

pub(crate) fn fill(to: &mut [f64], from: &[f64], name: &str) -> Result<(), Error> {
    kilter_core::error::length(name, to, from.len())?;
    to.copy_from_slice(from);
    Ok(())
}

#[pyfunction]
fn bn_finish(
    py: Python<'_>,
    count: &Array<'_>,
    mean: &Array<'_>,
    m2: &Array<'_>,
    h: &Array<'_>,
    hi: &Array<'_>,
    lo: &Array<'_>,
    rstd: &Array<'_>,
    running_mean: Option<&Array<'_>>,
    running_var: Option<&Array<'_>>,
) -> Outcome<()> {
    let mut o = Opening::default();
    let moments = [o.read("count", count)?, o.read("mean", mean)?, o.read("m2", m2)?, o.read("h", h)?];
    let out = Out::note(&mut o, hi, lo, rstd, running_mean, running_var)?;
    let checked = o.check()?;
    match out.hi.dtype {
        Dtype::F64 => finish::<f64>(py, &checked, moments, out),
        Dtype::F32 => finish::<f32>(py, &checked, moments, out),
        dtype => Err(error(Error::new("hi", "dtype float64 or float32", dtype.name()))),
    }
}

fn finish<R: kilter_core::real::Real + Element>(
    py: Python<'_>,
    checked: &Checked,
    [count, mean, m2, h]: [Noted<'_>; 4],
    out: Out<'_>,
) -> Outcome<()> {
    let (count, rule) = (one(checked.read(&count)?)?, finish_rule(checked.read(&h)?)?);
    let (mean, m2, out) = (checked.read(&mean)?, checked.read(&m2)?, out.open::<R>(checked)?);
    gate::run(py, || norm::finish(count, mean, m2, rule, out))
}

/// The arrays that statistics go to.
struct Out<'a> {
    hi: Noted<'a>,
    lo: Noted<'a>,
    rstd: Noted<'a>,
    running_mean: Option<Noted<'a>>,
    running_var: Option<Noted<'a>>,
}

impl<'a> Out<'a> {
    fn note(
        o: &mut Opening<'a>,
        hi: &'a Array<'_>,
        lo: &'a Array<'_>,
        rstd: &'a Array<'_>,
        running_mean: Option<&'a Array<'_>>,
        running_var: Option<&'a Array<'_>>,
    ) -> Outcome<Self> {
        Ok(Self {
            hi: o.write("hi", hi)?,
            lo: o.write("lo", lo)?,
            rstd: o.write("rstd", rstd)?,
            running_mean: o.maybe_write("running_mean", running_mean)?,
            running_var: o.maybe_write("running_var", running_var)?,
        })
    }

    fn open<R: kilter_core::real::Real + Element>(&self, checked: &Checked) -> Outcome<Statistics<'a, R>> {
        let (mean, var) = (checked.maybe_write(&self.running_mean)?, checked.maybe_write(&self.running_var)?);
        let (hi, lo, rstd) = (checked.write(&self.hi)?, checked.write(&self.lo)?, checked.write(&self.rstd)?);
        Ok(Statistics { hi, lo, rstd, running: mean.zip(var) })
    }
}

/// The arrays that say how channels are normalised.
pub(crate) struct How<'a> {
    hi: Noted<'a>,
    lo: Noted<'a>,
    rstd: Noted<'a>,
    gamma: Option<Noted<'a>>,
    beta: Option<Noted<'a>>,
}

impl<'a> How<'a> {
    pub(crate) fn note(
        o: &mut Opening<'a>,
        [hi, lo, rstd]: [&'a Array<'_>; 3],
        gamma: Option<&'a Array<'_>>,
        beta: Option<&'a Array<'_>>,
    ) -> Outcome<Self> {
        Ok(Self {
            hi: o.read("hi", hi)?,
            lo: o.read("lo", lo)?,
            rstd: o.read("rstd", rstd)?,
            gamma: o.maybe("gamma", gamma)?,
            beta: o.maybe("beta", beta)?,
        })
    }
}

/// What a missing gamma or beta is, made where one is missing.
pub(crate) struct Missing<R> {
    channels: usize,
    ones: OnceCell<Vec<R>>,
    zeros: OnceCell<Vec<R>>,
}

impl<R: kilter_core::real::Real> Missing<R> {
    pub(crate) fn new(channels: usize) -> Self {
        Self { channels, ones: OnceCell::new(), zeros: OnceCell::new() }
    }

    /// Gamma, or ones.
    #[inline(never)]
    pub(crate) fn gamma<'a>(&'a self, given: Option<&'a [R]>) -> &'a [R] {
        given.unwrap_or_else(|| self.ones.get_or_init(|| vec![R::ONE; self.channels]))
    }

    /// Beta, or zeros.
    #[inline(never)]
    pub(crate) fn beta<'a>(&'a self, given: Option<&'a [R]>) -> &'a [R] {
        given.unwrap_or_else(|| self.zeros.get_or_init(|| vec![R::ZERO; self.channels]))
    }
}

pub(crate) fn affine<'a, R: kilter_core::real::Real + Element>(
    checked: &Checked,
    how: &How<'a>,
    missing: &'a Missing<R>,
) -> Outcome<Affine<'a, R>> {
    let gamma = missing.gamma(checked.maybe(&how.gamma)?);
    let beta = missing.beta(checked.maybe(&how.beta)?);
    let (hi, lo, rstd) = (checked.read(&how.hi)?, checked.read(&how.lo)?, checked.read(&how.rstd)?);
    Affine::new(missing.channels, hi, lo, rstd, gamma, beta).map_err(error)
}

#[pyfunction]
#[inline(never)] // two functions need it
fn bn_apply(
    py: Python<'_>,
    x: &Array<'_>,
    axis: usize,
    hi: &Array<'_>,
    lo: &Array<'_>,
    rstd: &Array<'_>,
    gamma: Option<&Array<'_>>,
    beta: Option<&Array<'_>>,
    residual: Option<&Array<'_>>,
    relu: bool,
    y: &Array<'_>,
) -> Outcome<()> {
    let mut o = Opening::default();
    let (x, residual) = (o.read("x", x)?, o.maybe("residual", residual)?);
    let (how, y) = (How::note(&mut o, [hi, lo, rstd], gamma, beta)?, o.write("out", y)?);
    alike(residual.as_ref(), &x)?;
    alike(Some(&y), &x)?;
    let (shape, checked) = (around(&x, axis)?, o.check()?);
    match x.dtype {
        Dtype::F64 => apply::<f64>(py, &checked, &x, shape, &how, &residual, relu, &y),
        Dtype::F32 => apply::<f32>(py, &checked, &x, shape, &how, &residual, relu, &y),
        Dtype::F16 => apply::<f16>(py, &checked, &x, shape, &how, &residual, relu, &y),
        Dtype::Bf16 => apply::<bf16>(py, &checked, &x, shape, &how, &residual, relu, &y),
        Dtype::U32 => Err(not_data(x.dtype)),
    }
}

fn apply<S: Storage + Element>(
    py: Python<'_>,
    checked: &Checked,
    x: &Noted<'_>,
    shape: Shape,
    how: &How<'_>,
    residual: &Option<Noted<'_>>,
    relu: bool,
    y: &Noted<'_>,
) -> Outcome<()>
where
    S::Real: Element,
{
    let missing = Missing::new(shape.channels);
    let (affine, residual) = (affine(checked, how, &missing)?, checked.maybe(residual)?);
    let (x, y) = (checked.read::<S>(x)?, checked.write(y)?);
    gate::run(py, || norm::apply(x, shape, affine, residual, relu, y))
}

#[pyfunction]
fn bn_infer(
    py: Python<'_>,
    x: &Array<'_>,
    axis: usize,
    eps: f64,
    gamma: Option<&Array<'_>>,
    beta: Option<&Array<'_>>,
    residual: Option<&Array<'_>>,
    relu: bool,
    running_mean: &Array<'_>,
    running_var: &Array<'_>,
    mean: &Array<'_>,
    hi: &Array<'_>,
    lo: &Array<'_>,
    rstd: &Array<'_>,
    y: &Array<'_>,
) -> Outcome<()> {
    let mut o = Opening::default();
    // Nothing that is written, y least of all, may lie over the running statistics; `bn_apply` looks at the rest.
    let running = [o.read("running_mean", running_mean)?, o.read("running_var", running_var)?];
    let mean = o.write("mean", mean)?;
    o.write("out", y)?;
    let (out, checked) = (Out::note(&mut o, hi, lo, rstd, None, None)?, o.check()?);
    match out.hi.dtype {
        Dtype::F64 => recall::<f64>(&checked, running, eps, &mean, &out)?,
        Dtype::F32 => recall::<f32>(&checked, running, eps, &mean, &out)?,
        dtype => return Err(error(Error::new("hi", "dtype float64 or float32", dtype.name()))),
    }
    bn_apply(py, x, axis, hi, lo, rstd, gamma, beta, residual, relu, y)
}

/// What `bn_apply` needs, from the running statistics.
fn recall<R: kilter_core::real::Real + Element>(
    checked: &Checked,
    [running_mean, running_var]: [Noted<'_>; 2],
    eps: f64,
    mean: &Noted<'_>,
    out: &Out<'_>,
) -> Outcome<()> {
    let (mean, wide) = (checked.write(mean)?, |values: &[R]| values.iter().map(|v| v.to_f64()).collect::<Vec<f64>>());
    fill(mean, &wide(checked.read(&running_mean)?), "mean").map_err(error)?;
    let var = wide(checked.read(&running_var)?);
    let rule = Finish { eps, momentum: 0.0, unbiased: false };
    norm::finish(1.0, mean, &var, rule, out.open::<R>(checked)?).map_err(error)
}

#[pyfunction]
fn bn_train(
    py: Python<'_>,
    x: &Array<'_>,
    axis: usize,
    weights: Option<&Array<'_>>,
    h: &Array<'_>,
    gamma: Option<&Array<'_>>,
    beta: Option<&Array<'_>>,
    residual: Option<&Array<'_>>,
    relu: bool,
    count: &Array<'_>,
    mean: &Array<'_>,
    m2: &Array<'_>,
    hi: &Array<'_>,
    lo: &Array<'_>,
    rstd: &Array<'_>,
    running_mean: Option<&Array<'_>>,
    running_var: Option<&Array<'_>>,
    y: &Array<'_>,
) -> Outcome<()> {
    let mut o = Opening::default();
    let (x, y) = (o.read("x", x)?, o.write("out", y)?);
    let inputs = Inputs {
        weights: o.maybe("weights", weights)?,
        h: o.read("h", h)?,
        gamma: o.maybe("gamma", gamma)?,
        beta: o.maybe("beta", beta)?,
        residual: o.maybe("residual", residual)?,
        relu,
    };
    let moments = [o.write("count", count)?, o.write("mean", mean)?, o.write("m2", m2)?];
    let out = Out::note(&mut o, hi, lo, rstd, running_mean, running_var)?;
    alike(inputs.residual.as_ref(), &x)?;
    alike(Some(&y), &x)?;
    let (shape, checked) = (around(&x, axis)?, o.check()?);
    match x.dtype {
        Dtype::F64 => train::<f64>(py, &checked, &x, shape, inputs, moments, out, &y),
        Dtype::F32 => train::<f32>(py, &checked, &x, shape, inputs, moments, out, &y),
        Dtype::F16 => train::<f16>(py, &checked, &x, shape, inputs, moments, out, &y),
        Dtype::Bf16 => train::<bf16>(py, &checked, &x, shape, inputs, moments, out, &y),
        Dtype::U32 => Err(not_data(x.dtype)),
    }
}

/// What training reads besides x.
struct Inputs<'a> {
    weights: Option<Noted<'a>>,
    h: Noted<'a>,
    gamma: Option<Noted<'a>>,
    beta: Option<Noted<'a>>,
    residual: Option<Noted<'a>>,
    relu: bool,
}

fn train<S: Storage + Element>(
    py: Python<'_>,
    checked: &Checked,
    x: &Noted<'_>,
    shape: Shape,
    inputs: Inputs<'_>,
    [count, mean, m2]: [Noted<'_>; 3],
    out: Out<'_>,
    y: &Noted<'_>,
) -> Outcome<()>
where
    S::Real: Element,
{
    let missing = Missing::new(shape.channels);
    let gamma = missing.gamma(checked.maybe(&inputs.gamma)?);
    let beta = missing.beta(checked.maybe(&inputs.beta)?);
    let (weights, residual) = (checked.maybe(&inputs.weights)?, checked.maybe(&inputs.residual)?);
    let rule = finish_rule(checked.read(&inputs.h)?)?;
    let (count, mean, m2) = (checked.write(&count)?, checked.write(&mean)?, checked.write(&m2)?);
    let (out, x, y) = (out.open::<S::Real>(checked)?, checked.read::<S>(x)?, checked.write(y)?);
    let relu = inputs.relu;
    gate::run(py, || {
        for (name, slice) in [("mean", &*mean), ("m2", &*m2)] {
            kilter_core::error::length(name, slice, shape.channels)?;
        }
        let data = Data::new(x, weights, shape)?;
        copy_moments(norm::train(data, rule, gamma, beta, residual, relu, out, y)?, count, mean, m2)
    })
}
