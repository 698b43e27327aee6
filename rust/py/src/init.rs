//! Fills.

use crate::array::{Checked, Dtype, Element, Noted, Opening};
use crate::gate::{self, Outcome, error};
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
fn philox(py: Python<'_>, out: &Bound<'_, PyAny>, seed: u64, stream: u32, attempt: u32) -> Outcome<()> {
    let mut o = Opening::default();
    let out = o.write("out", out)?;
    let out = o.check()?.write::<u32>(&out)?;
    gate::run(py, || {
        launch(Words::new(out, seed, stream, attempt));
        Ok(())
    })
}

#[pyfunction]
fn fill_uniform(py: Python<'_>, out: &Bound<'_, PyAny>, seed: u64, stream: u32, h: &Bound<'_, PyAny>) -> Outcome<()> {
    fill(py, out, Uniform, seed, stream, 0, h)
}

#[pyfunction]
#[pyo3(signature = (out, seed, stream, h, attempt=0))]
fn fill_normal(
    py: Python<'_>,
    out: &Bound<'_, PyAny>,
    seed: u64,
    stream: u32,
    h: &Bound<'_, PyAny>,
    attempt: u32,
) -> Outcome<()> {
    fill(py, out, Normal, seed, stream, attempt, h)
}

fn fill(
    py: Python<'_>,
    out: &Bound<'_, PyAny>,
    variate: impl Variate,
    seed: u64,
    stream: u32,
    attempt: u32,
    h: &Bound<'_, PyAny>,
) -> Outcome<()> {
    let mut o = Opening::default();
    let (out, h) = (o.write("out", out)?, o.read("h", h)?);
    let checked = o.check()?;
    let [shift, scale] = *checked.read::<f64>(&h)? else {
        return Err(error(Error::new("h", "shift, scale", format_args!("{:?}", h.shape()))));
    };
    let how = How { variate, seed, stream, attempt, shift, scale };
    match out.dtype {
        Dtype::F64 => how.launch::<f64>(py, &checked, &out),
        Dtype::F32 => how.launch::<f32>(py, &checked, &out),
        Dtype::F16 => how.launch::<f16>(py, &checked, &out),
        Dtype::Bf16 => how.launch::<bf16>(py, &checked, &out),
        Dtype::U32 => Err(error(Error::new("out", "a floating-point dtype", out.dtype.name()))),
    }
}

/// What to fill with.
struct How<V> {
    variate: V,
    seed: u64,
    stream: u32,
    attempt: u32,
    shift: f64,
    scale: f64,
}

impl<V: Variate> How<V> {
    fn launch<S: Storage + Element>(self, py: Python<'_>, checked: &Checked, out: &Noted<'_>) -> Outcome<()> {
        let out = checked.write::<S>(out)?;
        gate::run(py, || {
            let fill = Fill::new(out, self.variate, self.seed, self.stream, self.shift, self.scale);
            launch(fill.attempt(self.attempt));
            Ok(())
        })
    }
}
