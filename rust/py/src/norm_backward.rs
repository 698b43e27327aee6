//! Batch norm, backward.

use crate::array::{Checked, Dtype, Element, Noted, Opening};
use crate::gate::{self, Outcome, error};
use crate::norm::{Array, How, Missing, affine, alike, around, fill, not_data, one};
use kilter_core::error::length;
use kilter_core::norm::{self, Data, Shape, Sums, Upstream};
use kilter_core::storage::Storage;
use kilter_core::{bf16, f16};
use pyo3::prelude::*;

/// Adds the functions to the module.
pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(bn_backward_reduce, m)?)?;
    m.add_function(wrap_pyfunction!(bn_backward_apply, m)?)?;
    m.add_function(wrap_pyfunction!(bn_backward, m)?)
}

/// What a backward pass reads.
struct Reads<'a> {
    dy: Noted<'a>,
    x: Noted<'a>,
    weights: Option<Noted<'a>>,
    how: How<'a>,
    residual: Option<Noted<'a>>,
    relu: bool,
    axis: usize,
}

impl<'a> Reads<'a> {
    fn shape(&self) -> Outcome<Shape> {
        alike(Some(&self.dy), &self.x)?;
        alike(self.residual.as_ref(), &self.x)?;
        around(&self.x, self.axis)
    }

    fn open<S: Storage + Element>(
        &self,
        checked: &Checked,
        shape: Shape,
        missing: &'a Missing<S::Real>,
    ) -> Outcome<Upstream<'a, S>>
    where
        S::Real: Element,
    {
        let data = Data::new(checked.read(&self.x)?, checked.maybe(&self.weights)?, shape).map_err(error)?;
        let (affine, residual) = (affine(checked, &self.how, missing)?, checked.maybe(&self.residual)?);
        Upstream::new(checked.read(&self.dy)?, data, affine, residual, self.relu).map_err(error)
    }
}

#[pyfunction]
fn bn_backward_reduce(
    py: Python<'_>,
    dy: &Array<'_>,
    x: &Array<'_>,
    axis: usize,
    hi: &Array<'_>,
    lo: &Array<'_>,
    rstd: &Array<'_>,
    gamma: Option<&Array<'_>>,
    beta: Option<&Array<'_>>,
    residual: Option<&Array<'_>>,
    relu: bool,
    sum_dy: &Array<'_>,
    sum_dy_xhat: &Array<'_>,
) -> Outcome<()> {
    let mut o = Opening::default();
    let reads = Reads {
        dy: o.read("dy", dy)?,
        x: o.read("x", x)?,
        weights: None,
        how: How::note(&mut o, [hi, lo, rstd], gamma, beta)?,
        residual: o.maybe("residual", residual)?,
        relu,
        axis,
    };
    let sums = [o.write("sum_dy", sum_dy)?, o.write("sum_dy_xhat", sum_dy_xhat)?];
    let checked = o.check()?;
    match reads.x.dtype {
        Dtype::F64 => reduce::<f64>(py, &checked, reads, sums),
        Dtype::F32 => reduce::<f32>(py, &checked, reads, sums),
        Dtype::F16 => reduce::<f16>(py, &checked, reads, sums),
        Dtype::Bf16 => reduce::<bf16>(py, &checked, reads, sums),
        Dtype::U32 => Err(not_data(reads.x.dtype)),
    }
}

fn reduce<S: Storage + Element>(
    py: Python<'_>,
    checked: &Checked,
    reads: Reads<'_>,
    [sum_dy, sum_dy_xhat]: [Noted<'_>; 2],
) -> Outcome<()>
where
    S::Real: Element,
{
    let shape = reads.shape()?;
    let missing = Missing::new(shape.channels);
    let up = reads.open::<S>(checked, shape, &missing)?;
    let (sum_dy, sum_dy_xhat) = (checked.write(&sum_dy)?, checked.write(&sum_dy_xhat)?);
    gate::run(py, || {
        let sums = norm::backward_reduce(up);
        fill(sum_dy, &sums.dy, "sum_dy")?;
        fill(sum_dy_xhat, &sums.dy_xhat, "sum_dy_xhat")
    })
}

#[pyfunction]
fn bn_backward_apply(
    py: Python<'_>,
    dy: &Array<'_>,
    x: &Array<'_>,
    axis: usize,
    weights: Option<&Array<'_>>,
    count: &Array<'_>,
    hi: &Array<'_>,
    lo: &Array<'_>,
    rstd: &Array<'_>,
    gamma: Option<&Array<'_>>,
    beta: Option<&Array<'_>>,
    residual: Option<&Array<'_>>,
    relu: bool,
    sum_dy: &Array<'_>,
    sum_dy_xhat: &Array<'_>,
    dx: &Array<'_>,
    dresidual: Option<&Array<'_>>,
) -> Outcome<()> {
    let mut o = Opening::default();
    let reads = Reads {
        dy: o.read("dy", dy)?,
        x: o.read("x", x)?,
        weights: o.maybe("weights", weights)?,
        how: How::note(&mut o, [hi, lo, rstd], gamma, beta)?,
        residual: o.maybe("residual", residual)?,
        relu,
        axis,
    };
    let sums = [o.read("count", count)?, o.read("sum_dy", sum_dy)?, o.read("sum_dy_xhat", sum_dy_xhat)?];
    let out = (o.write("out", dx)?, o.maybe_write("dresidual", dresidual)?);
    let checked = o.check()?;
    match reads.x.dtype {
        Dtype::F64 => backward_apply::<f64>(py, &checked, reads, sums, out),
        Dtype::F32 => backward_apply::<f32>(py, &checked, reads, sums, out),
        Dtype::F16 => backward_apply::<f16>(py, &checked, reads, sums, out),
        Dtype::Bf16 => backward_apply::<bf16>(py, &checked, reads, sums, out),
        Dtype::U32 => Err(not_data(reads.x.dtype)),
    }
}

fn backward_apply<S: Storage + Element>(
    py: Python<'_>,
    checked: &Checked,
    reads: Reads<'_>,
    [count, sum_dy, sum_dy_xhat]: [Noted<'_>; 3],
    (dx, dresidual): (Noted<'_>, Option<Noted<'_>>),
) -> Outcome<()>
where
    S::Real: Element,
{
    let shape = reads.shape()?;
    let missing = Missing::new(shape.channels);
    let up = reads.open::<S>(checked, shape, &missing)?;
    alike(Some(&dx), &reads.x)?;
    alike(dresidual.as_ref(), &reads.x)?;
    let count = one(checked.read(&count)?)?;
    let (dy, dy_xhat) = (checked.read::<f64>(&sum_dy)?.to_vec(), checked.read::<f64>(&sum_dy_xhat)?.to_vec());
    let (dx, dresidual) = (checked.write(&dx)?, checked.maybe_write(&dresidual)?);
    gate::run(py, || norm::backward_apply(up, count, &Sums { first: 0, dy, dy_xhat }, dx, dresidual))
}

#[pyfunction]
fn bn_backward(
    py: Python<'_>,
    dy: &Array<'_>,
    x: &Array<'_>,
    axis: usize,
    weights: Option<&Array<'_>>,
    count: &Array<'_>,
    hi: &Array<'_>,
    lo: &Array<'_>,
    rstd: &Array<'_>,
    gamma: Option<&Array<'_>>,
    beta: Option<&Array<'_>>,
    residual: Option<&Array<'_>>,
    relu: bool,
    sum_dy: &Array<'_>,
    sum_dy_xhat: &Array<'_>,
    dx: &Array<'_>,
    dresidual: Option<&Array<'_>>,
) -> Outcome<()> {
    let mut o = Opening::default();
    let reads = Reads {
        dy: o.read("dy", dy)?,
        x: o.read("x", x)?,
        weights: o.maybe("weights", weights)?,
        how: How::note(&mut o, [hi, lo, rstd], gamma, beta)?,
        residual: o.maybe("residual", residual)?,
        relu,
        axis,
    };
    let count = o.read("count", count)?;
    let sums = [o.write("sum_dy", sum_dy)?, o.write("sum_dy_xhat", sum_dy_xhat)?];
    let out = (o.write("out", dx)?, o.maybe_write("dresidual", dresidual)?);
    let checked = o.check()?;
    match reads.x.dtype {
        Dtype::F64 => backward::<f64>(py, &checked, reads, count, sums, out),
        Dtype::F32 => backward::<f32>(py, &checked, reads, count, sums, out),
        Dtype::F16 => backward::<f16>(py, &checked, reads, count, sums, out),
        Dtype::Bf16 => backward::<bf16>(py, &checked, reads, count, sums, out),
        Dtype::U32 => Err(not_data(reads.x.dtype)),
    }
}

fn backward<S: Storage + Element>(
    py: Python<'_>,
    checked: &Checked,
    reads: Reads<'_>,
    count: Noted<'_>,
    [sum_dy, sum_dy_xhat]: [Noted<'_>; 2],
    (dx, dresidual): (Noted<'_>, Option<Noted<'_>>),
) -> Outcome<()>
where
    S::Real: Element,
{
    let shape = reads.shape()?;
    let missing = Missing::new(shape.channels);
    let up = reads.open::<S>(checked, shape, &missing)?;
    alike(Some(&dx), &reads.x)?;
    alike(dresidual.as_ref(), &reads.x)?;
    let count = one(checked.read(&count)?)?;
    let open = |array: &_, name| Total::open(checked, array, name, shape.channels);
    let (sum_dy, sum_dy_xhat) = (open(&sum_dy, "sum_dy")?, open(&sum_dy_xhat, "sum_dy_xhat")?);
    let (dx, dresidual) = (checked.write(&dx)?, checked.maybe_write(&dresidual)?);
    gate::run(py, || {
        let sums = norm::backward(up, count, dx, dresidual)?;
        sum_dy.fill(&sums.dy);
        sum_dy_xhat.fill(&sums.dy_xhat);
        Ok(())
    })
}

/// Where sums over a channel go to: gradients of gamma and beta that are float32 are rounded here, at no call of NumPy.
enum Total<'a> {
    F64(&'a mut [f64]),
    F32(&'a mut [f32]),
}

impl<'a> Total<'a> {
    #[inline(never)] // once for all element types
    fn open(checked: &Checked, array: &Noted<'a>, name: &str, channels: usize) -> Outcome<Self> {
        let found = match array.dtype {
            Dtype::F32 => Self::F32(checked.write(array)?),
            _ => Self::F64(checked.write(array)?),
        };
        match &found {
            Self::F64(total) => length(name, total, channels),
            Self::F32(total) => length(name, total, channels),
        }
        .map_err(error)?;
        Ok(found)
    }

    #[inline(never)]
    fn fill(self, sums: &[f64]) {
        match self {
            Self::F64(total) => total.copy_from_slice(sums),
            Self::F32(total) => total.iter_mut().zip(sums).for_each(|(to, sum)| *to = *sum as f32),
        }
    }
}
