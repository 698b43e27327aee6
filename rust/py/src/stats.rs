//! Running statistics.

use crate::array::{Checked, Dtype, Element, Noted, Opening};
use crate::gate::{self, Outcome, error};
use kilter_core::ema::Ema;
use kilter_core::storage::Storage;
use kilter_core::{Error, bf16, f16};
use pyo3::prelude::*;

/// Adds the functions to the module.
pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(ema, m)?)
}

#[pyfunction]
fn ema(py: Python<'_>, s: &Bound<'_, PyAny>, x: &Bound<'_, PyAny>, h: &Bound<'_, PyAny>) -> Outcome<()> {
    let mut o = Opening::default();
    let (s, x, h) = (o.write("s", s)?, o.read("x", x)?, o.read("h", h)?);
    let checked = o.check()?;
    let [momentum] = *checked.read::<f64>(&h)? else { return Err(error(Error::new("h", "momentum", h.shape().len()))) };
    match x.dtype {
        Dtype::F64 => move_towards::<f64>(py, &checked, &s, &x, momentum),
        Dtype::F32 => move_towards::<f32>(py, &checked, &s, &x, momentum),
        Dtype::F16 => move_towards::<f16>(py, &checked, &s, &x, momentum),
        Dtype::Bf16 => move_towards::<bf16>(py, &checked, &s, &x, momentum),
        Dtype::U32 => Err(error(Error::new("x", "a floating-point dtype", x.dtype.name()))),
    }
}

fn move_towards<S: Storage + Element>(
    py: Python<'_>,
    checked: &Checked,
    s: &Noted<'_>,
    x: &Noted<'_>,
    momentum: f64,
) -> Outcome<()>
where
    S::Real: Element,
{
    let (s, x) = (checked.write(s)?, checked.read::<S>(x)?);
    gate::run(py, || {
        Ema::new(s, x, momentum)?.launch();
        Ok(())
    })
}
