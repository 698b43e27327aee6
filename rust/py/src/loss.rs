//! Losses.

use crate::array::{Dtype, Opening};
use crate::gate::{self, Outcome, error};
use kilter_core::Error;
use kilter_core::loss::{Logits, Smoothing, SoftmaxCrossEntropy, Targets};
use pyo3::prelude::*;

/// Adds the functions to the module.
pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(softmax_cross_entropy, m)?)
}

#[pyfunction]
fn softmax_cross_entropy(
    py: Python<'_>,
    logits: &Bound<'_, PyAny>,
    targets: &Bound<'_, PyAny>,
    weights: Option<&Bound<'_, PyAny>>,
    on: f64,
    off: f64,
    dlogits: &Bound<'_, PyAny>,
) -> Outcome<f64> {
    let mut o = Opening::default();
    let logits = o.read("logits", logits)?;
    let (targets, weights) = (o.read("targets", targets)?, o.maybe("weights", weights)?);
    let dlogits = o.write("dlogits", dlogits)?;
    let checked = o.check()?;
    let [_, classes] = *logits.shape() else {
        return Err(error(Error::new("logits", "shape (N, K)", format_args!("{:?}", logits.shape()))));
    };
    let q = checked.read(&targets)?;
    let targets = if targets.shape().len() == 1 { Targets::Labels(q) } else { Targets::Soft(q) };
    let weights = checked.maybe(&weights)?;
    let both = match logits.dtype {
        Dtype::F64 => Logits::F64(checked.read(&logits)?, checked.write(&dlogits)?),
        Dtype::F32 => Logits::F32(checked.read(&logits)?, checked.write(&dlogits)?),
        Dtype::F16 | Dtype::Bf16 | Dtype::U32 => {
            return Err(error(Error::new("logits", "float64 or float32", logits.dtype.name())));
        }
    };
    gate::run(py, || Ok(SoftmaxCrossEntropy::new(both, classes, targets, Smoothing { on, off }, weights)?.launch()))
}
