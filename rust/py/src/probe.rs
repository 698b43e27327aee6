//! The yardsticks.

use crate::array::Opening;
use crate::gate::{self, Outcome};
use kilter_core::kernel::launch;
use kilter_core::probe::{Copy, Update};
use pyo3::prelude::*;

/// Adds the functions to the module.
pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(probe_copy, m)?)?;
    m.add_function(wrap_pyfunction!(probe_update, m)?)
}

#[pyfunction]
fn probe_copy(py: Python<'_>, source: &Bound<'_, PyAny>, target: &Bound<'_, PyAny>) -> Outcome<()> {
    let mut o = Opening::default();
    let (source, target) = (o.read("source", source)?, o.write("target", target)?);
    let checked = o.check()?;
    let (source, target) = (checked.read(&source)?, checked.write(&target)?);
    gate::run(py, || {
        launch(Copy::new(source, target)?);
        Ok(())
    })
}

#[pyfunction]
fn probe_update(py: Python<'_>, inputs: Vec<Bound<'_, PyAny>>, arrays: Vec<Bound<'_, PyAny>>) -> Outcome<()> {
    let mut o = Opening::default();
    let inputs = inputs.iter().map(|input| o.read("inputs", input)).collect::<Outcome<Vec<_>>>()?;
    let arrays = arrays.iter().map(|array| o.write("arrays", array)).collect::<Outcome<Vec<_>>>()?;
    let checked = o.check()?;
    let arrays = arrays.iter().map(|array| checked.write(array)).collect::<Outcome<Vec<_>>>()?;
    let inputs = inputs.iter().map(|input| checked.read(input)).collect::<Outcome<Vec<_>>>()?;
    gate::run(py, || {
        launch(Update::new(inputs, arrays)?);
        Ok(())
    })
}
