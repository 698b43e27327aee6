//! Fills.

use crate::array::{Checked, Dtype, Element, Noted, Opening};
use crate::gate::{self, error};
use kilter_core::init::{Fill, Normal, Uniform, Variate, Words};
use kilter_core::kernel::launch;
use kilter_core::storage::Storage;
use kilter_core::{Error, bf16, f16};
use pyo3::prelude::*;

/// Adds the functions to the module.
pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(philox, m)?)?;
    m.add_function(wrap_pyfunction!(fill_uniform, m)?)?;
    m.add_function(wrap_pyfunction!(fill_normal, m)?)
}

/// Fills a uint32 array with Philox4x32-10 words.
#[pyfunction]
#[pyo3(signature = (out, seed, stream, attempt=0))]
fn philox(py: Python<'_>, out: &Bound<'_, PyAny>, seed: u64, stream: u32, attempt: u32) -> PyResult<()> {
    let mut o = Opening::default();
    let out = o.write("out", out)?;
    let out = o.check()?.write::<u32>(&out)?;
    gate::run(py, || {
        launch(Words::new(out, seed, stream, attempt));
        Ok(())
    })
}

#[pyfunction]
fn fill_uniform(py: Python<'_>, out: &Bound<'_, PyAny>, seed: u64, stream: u32, h: &Bound<'_, PyAny>) -> PyResult<()> {
    fill(py, out, Uniform, seed, stream, h)
}

#[pyfunction]
fn fill_normal(py: Python<'_>, out: &Bound<'_, PyAny>, seed: u64, stream: u32, h: &Bound<'_, PyAny>) -> PyResult<()> {
    fill(py, out, Normal, seed, stream, h)
}

fn fill(
    py: Python<'_>,
    out: &Bound<'_, PyAny>,
    variate: impl Variate,
    seed: u64,
    stream: u32,
    h: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let mut o = Opening::default();
    let (out, h) = (o.write("out", out)?, o.read("h", h)?);
    let checked = o.check()?;
    let [shift, scale] = *checked.read::<f64>(&h)? else {
        return Err(error(Error::new("h", "shift, scale", format_args!("{:?}", h.shape()))));
    };
    match out.dtype {
        Dtype::F64 => launch_fill::<f64>(py, &checked, &out, variate, seed, stream, shift, scale),
        Dtype::F32 => launch_fill::<f32>(py, &checked, &out, variate, seed, stream, shift, scale),
        Dtype::F16 => launch_fill::<f16>(py, &checked, &out, variate, seed, stream, shift, scale),
        Dtype::Bf16 => launch_fill::<bf16>(py, &checked, &out, variate, seed, stream, shift, scale),
        Dtype::U32 => Err(error(Error::new("out", "a floating-point dtype", out.dtype.name()))),
    }
}

fn launch_fill<S: Storage + Element>(
    py: Python<'_>,
    checked: &Checked,
    out: &Noted<'_>,
    variate: impl Variate,
    seed: u64,
    stream: u32,
    shift: f64,
    scale: f64,
) -> PyResult<()> {
    let out = checked.write::<S>(out)?;
    gate::run(py, || {
        launch(Fill::new(out, variate, seed, stream, shift, scale));
        Ok(())
    })
}
