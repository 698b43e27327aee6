//! Layer norm and RMS norm.

use crate::array::{Checked, Dtype, Element, Noted, Opening};
use crate::gate::{self, Outcome, error};
use crate::norm::{Array, Missing, alike, fill, not_data, one};
use kilter_core::kernel::launch;
use kilter_core::norm::rows::{Backward, Forward, Residual};
use kilter_core::storage::Storage;
use kilter_core::{Error, bf16, f16};
use pyo3::prelude::*;

/// Adds the functions to the module.
pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(ln_forward, m)?)?;
    m.add_function(wrap_pyfunction!(ln_backward, m)?)
}

/// How long the rows of a matrix are.
fn width(x: &Noted<'_>) -> Outcome<usize> {
    match *x.shape() {
        [_, width] => Ok(width),
        _ => Err(error(Error::new("x", "2 axes", format_args!("{:?}", x.shape())))),
    }
}

/// Two that are there together, or neither.
fn both<T>(names: &str, one: Option<T>, other: Option<T>) -> Outcome<Option<[T; 2]>> {
    match (one, other) {
        (Some(one), Some(other)) => Ok(Some([one, other])),
        (None, None) => Ok(None),
        _ => Err(error(Error::new(names, "both or neither", "one"))),
    }
}

#[pyfunction]
fn ln_forward(
    py: Python<'_>,
    x: &Array<'_>,
    residual: Option<&Array<'_>>,
    h: &Array<'_>,
    gamma: Option<&Array<'_>>,
    beta: Option<&Array<'_>>,
    hi: Option<&Array<'_>>,
    lo: Option<&Array<'_>>,
    rstd: &Array<'_>,
    sum: Option<&Array<'_>>,
    y: &Array<'_>,
) -> Outcome<()> {
    let mut o = Opening::default();
    let (x, y) = (o.read("x", x)?, o.write("out", y)?);
    let reads = Reads {
        residual: o.maybe("residual", residual)?,
        h: o.read("h", h)?,
        gamma: o.maybe("gamma", gamma)?,
        beta: o.maybe("beta", beta)?,
    };
    let mean = both("hi and lo", o.maybe_write("hi", hi)?, o.maybe_write("lo", lo)?)?;
    let (rstd, sum) = (o.write("rstd", rstd)?, o.maybe_write("sum", sum)?);
    alike(reads.residual.as_ref(), &x)?;
    alike(sum.as_ref(), &x)?;
    alike(Some(&y), &x)?;
    let checked = o.check()?;
    match x.dtype {
        Dtype::F64 => forward::<f64>(py, &checked, &x, &reads, &mean, &rstd, &sum, &y),
        Dtype::F32 => forward::<f32>(py, &checked, &x, &reads, &mean, &rstd, &sum, &y),
        Dtype::F16 => forward::<f16>(py, &checked, &x, &reads, &mean, &rstd, &sum, &y),
        Dtype::Bf16 => forward::<bf16>(py, &checked, &x, &reads, &mean, &rstd, &sum, &y),
        Dtype::U32 => Err(not_data(x.dtype)),
    }
}

/// What the forward pass reads besides x.
struct Reads<'a> {
    residual: Option<Noted<'a>>,
    h: Noted<'a>,
    gamma: Option<Noted<'a>>,
    beta: Option<Noted<'a>>,
}

fn forward<S: Storage + Element>(
    py: Python<'_>,
    checked: &Checked,
    x: &Noted<'_>,
    reads: &Reads<'_>,
    mean: &Option<[Noted<'_>; 2]>,
    rstd: &Noted<'_>,
    sum: &Option<Noted<'_>>,
    y: &Noted<'_>,
) -> Outcome<()>
where
    S::Real: Element,
{
    let missing = Missing::new(width(x)?);
    let gamma = missing.gamma(checked.maybe(&reads.gamma)?);
    let beta = missing.beta(checked.maybe(&reads.beta)?);
    let eps = one(checked.read(&reads.h)?)?;
    let mean = match mean {
        Some([hi, lo]) => Some([checked.write(hi)?, checked.write(lo)?]),
        None => None,
    };
    let residual = match (checked.maybe(&reads.residual)?, checked.maybe_write(sum)?) {
        (Some(residual), Some(sum)) => Some(Residual { residual, sum }),
        (None, None) => None,
        _ => return Err(error(Error::new("residual and sum", "both or neither", "one"))),
    };
    let (x, rstd, y) = (checked.read::<S>(x)?, checked.write(rstd)?, checked.write(y)?);
    gate::run(py, || {
        launch(Forward::new(x, residual, [gamma, beta], eps, mean, rstd, y)?);
        Ok(())
    })
}

#[pyfunction]
fn ln_backward(
    py: Python<'_>,
    dy: &Array<'_>,
    x: &Array<'_>,
    gamma: Option<&Array<'_>>,
    hi: Option<&Array<'_>>,
    lo: Option<&Array<'_>>,
    rstd: &Array<'_>,
    dsum: Option<&Array<'_>>,
    sum_dy: &Array<'_>,
    sum_dy_xhat: &Array<'_>,
    dx: &Array<'_>,
) -> Outcome<()> {
    let mut o = Opening::default();
    let (x, dy, dsum) = (o.read("x", x)?, o.read("dy", dy)?, o.maybe("dsum", dsum)?);
    let (gamma, rstd) = (o.maybe("gamma", gamma)?, o.read("rstd", rstd)?);
    let mean = both("hi and lo", o.maybe("hi", hi)?, o.maybe("lo", lo)?)?;
    let out = [o.write("sum_dy", sum_dy)?, o.write("sum_dy_xhat", sum_dy_xhat)?, o.write("out", dx)?];
    alike(Some(&dy), &x)?;
    alike(dsum.as_ref(), &x)?;
    alike(Some(&out[2]), &x)?;
    let checked = o.check()?;
    match x.dtype {
        Dtype::F64 => backward::<f64>(py, &checked, [&dy, &x], &gamma, &mean, &rstd, &dsum, out),
        Dtype::F32 => backward::<f32>(py, &checked, [&dy, &x], &gamma, &mean, &rstd, &dsum, out),
        Dtype::F16 => backward::<f16>(py, &checked, [&dy, &x], &gamma, &mean, &rstd, &dsum, out),
        Dtype::Bf16 => backward::<bf16>(py, &checked, [&dy, &x], &gamma, &mean, &rstd, &dsum, out),
        Dtype::U32 => Err(not_data(x.dtype)),
    }
}

fn backward<S: Storage + Element>(
    py: Python<'_>,
    checked: &Checked,
    [dy, x]: [&Noted<'_>; 2],
    gamma: &Option<Noted<'_>>,
    mean: &Option<[Noted<'_>; 2]>,
    rstd: &Noted<'_>,
    dsum: &Option<Noted<'_>>,
    [sum_dy, sum_dy_xhat, dx]: [Noted<'_>; 3],
) -> Outcome<()>
where
    S::Real: Element,
{
    let width = width(x)?;
    let missing = Missing::new(width);
    let gamma = missing.gamma(checked.maybe(gamma)?);
    let mean = match mean {
        Some([hi, lo]) => Some([checked.read(hi)?, checked.read(lo)?]),
        None => None,
    };
    let (dy, x, rstd, dsum) = (checked.read::<S>(dy)?, checked.read(x)?, checked.read(rstd)?, checked.maybe(dsum)?);
    let (sum_dy, sum_dy_xhat) = (checked.write::<f64>(&sum_dy)?, checked.write::<f64>(&sum_dy_xhat)?);
    let dx = checked.write(&dx)?;
    gate::run(py, || {
        for (name, slice) in [("sum_dy", &*sum_dy), ("sum_dy_xhat", &*sum_dy_xhat)] {
            kilter_core::error::length(name, slice, width)?;
        }
        let sums = launch(Backward::new(dy, x, gamma, mean, rstd, dsum, dx)?);
        fill(sum_dy, &sums.dy, "sum_dy")?;
        fill(sum_dy_xhat, &sums.dy_xhat, "sum_dy_xhat")
    })
}
