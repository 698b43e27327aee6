//! Group norm; instance norm is that with one group per channel.

use crate::array::{Checked, Dtype, Element, Noted, Opening};
use crate::gate::{self, Outcome, error};
use crate::norm::{Array, Missing, alike, fill, not_data};
use kilter_core::norm::groups::{self, Grouped, Reads};
use kilter_core::storage::Storage;
use kilter_core::{Error, bf16, f16};
use pyo3::prelude::*;

/// Adds the functions to the module.
pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(gn_forward, m)?)?;
    m.add_function(wrap_pyfunction!(gn_backward, m)?)
}

/// The array as samples with their channels first or last.
fn grouped(x: &Noted<'_>, axis: usize, groups: usize) -> Outcome<Grouped> {
    let shape = x.shape();
    let last = shape.len().saturating_sub(1);
    if shape.len() < 2 || axis != 1 && axis != last {
        return Err(error(Error::new("axis", format_args!("1 or {last}"), axis)));
    }
    let (channels, inner) = (shape[axis], (1..=last).filter(|i| *i != axis).map(|i| shape[i]).product());
    Grouped::new(shape[0], channels, inner, groups, axis == last).map_err(error)
}

fn eps(h: &[f64]) -> Outcome<f64> {
    match *h {
        [eps] => Ok(eps),
        _ => Err(error(Error::new("h", "eps", format_args!("{} numbers", h.len())))),
    }
}

#[pyfunction]
fn gn_forward(
    py: Python<'_>,
    x: &Array<'_>,
    axis: usize,
    groups: usize,
    h: &Array<'_>,
    gamma: Option<&Array<'_>>,
    beta: Option<&Array<'_>>,
    mean: &Array<'_>,
    m2: &Array<'_>,
    y: &Array<'_>,
) -> Outcome<()> {
    let mut o = Opening::default();
    let (x, h, y) = (o.read("x", x)?, o.read("h", h)?, o.write("out", y)?);
    let affine = [o.maybe("gamma", gamma)?, o.maybe("beta", beta)?];
    let moments = [o.write("mean", mean)?, o.write("m2", m2)?];
    alike(Some(&y), &x)?;
    let (shape, checked) = (grouped(&x, axis, groups)?, o.check()?);
    match x.dtype {
        Dtype::F64 => forward::<f64>(py, &checked, &x, shape, &h, affine, moments, &y),
        Dtype::F32 => forward::<f32>(py, &checked, &x, shape, &h, affine, moments, &y),
        Dtype::F16 => forward::<f16>(py, &checked, &x, shape, &h, affine, moments, &y),
        Dtype::Bf16 => forward::<bf16>(py, &checked, &x, shape, &h, affine, moments, &y),
        Dtype::U32 => Err(not_data(x.dtype)),
    }
}

fn forward<S: Storage + Element>(
    py: Python<'_>,
    checked: &Checked,
    x: &Noted<'_>,
    shape: Grouped,
    h: &Noted<'_>,
    [gamma, beta]: [Option<Noted<'_>>; 2],
    [mean, m2]: [Noted<'_>; 2],
    y: &Noted<'_>,
) -> Outcome<()>
where
    S::Real: Element,
{
    let missing = Missing::new(shape.channels());
    let gamma = missing.gamma(checked.maybe(&gamma)?);
    let beta = missing.beta(checked.maybe(&beta)?);
    let (eps, mean, m2) = (eps(checked.read(h)?)?, checked.write(&mean)?, checked.write(&m2)?);
    let (x, y) = (checked.read::<S>(x)?, checked.write(y)?);
    gate::run(py, || groups::forward(x, shape, eps, gamma, beta, mean, m2, y))
}

#[pyfunction]
fn gn_backward(
    py: Python<'_>,
    dy: &Array<'_>,
    x: &Array<'_>,
    axis: usize,
    groups: usize,
    h: &Array<'_>,
    mean: &Array<'_>,
    m2: &Array<'_>,
    gamma: Option<&Array<'_>>,
    sum_dy: &Array<'_>,
    sum_dy_xhat: &Array<'_>,
    dx: &Array<'_>,
) -> Outcome<()> {
    let mut o = Opening::default();
    let (dy, x, h) = (o.read("dy", dy)?, o.read("x", x)?, o.read("h", h)?);
    let saved = [o.read("mean", mean)?, o.read("m2", m2)?];
    let gamma = o.maybe("gamma", gamma)?;
    let out = [o.write("sum_dy", sum_dy)?, o.write("sum_dy_xhat", sum_dy_xhat)?, o.write("out", dx)?];
    alike(Some(&dy), &x)?;
    alike(Some(&out[2]), &x)?;
    let (shape, checked) = (grouped(&x, axis, groups)?, o.check()?);
    let arrays = [dy, x];
    match arrays[1].dtype {
        Dtype::F64 => backward::<f64>(py, &checked, arrays, shape, &h, saved, gamma, out),
        Dtype::F32 => backward::<f32>(py, &checked, arrays, shape, &h, saved, gamma, out),
        Dtype::F16 => backward::<f16>(py, &checked, arrays, shape, &h, saved, gamma, out),
        Dtype::Bf16 => backward::<bf16>(py, &checked, arrays, shape, &h, saved, gamma, out),
        Dtype::U32 => Err(not_data(Dtype::U32)),
    }
}

fn backward<S: Storage + Element>(
    py: Python<'_>,
    checked: &Checked,
    [dy, x]: [Noted<'_>; 2],
    shape: Grouped,
    h: &Noted<'_>,
    [mean, m2]: [Noted<'_>; 2],
    gamma: Option<Noted<'_>>,
    [sum_dy, sum_dy_xhat, dx]: [Noted<'_>; 3],
) -> Outcome<()>
where
    S::Real: Element,
{
    let missing = Missing::new(shape.channels());
    let gamma = missing.gamma(checked.maybe(&gamma)?);
    let (eps, mean, m2) = (eps(checked.read(h)?)?, checked.read(&mean)?, checked.read(&m2)?);
    let reads = Reads::<S> { dy: checked.read(&dy)?, x: checked.read(&x)?, gamma, mean, m2, eps };
    let (sum_dy, sum_dy_xhat, dx) = (checked.write(&sum_dy)?, checked.write(&sum_dy_xhat)?, checked.write(&dx)?);
    gate::run(py, || {
        for (name, slice) in [("sum_dy", &*sum_dy), ("sum_dy_xhat", &*sum_dy_xhat)] {
            kilter_core::error::length(name, slice, shape.channels())?;
        }
        let sums = groups::backward(reads, shape, dx)?;
        fill(sum_dy, &sums.dy, "sum_dy")?;
        fill(sum_dy_xhat, &sums.dy_xhat, "sum_dy_xhat")
    })
}
