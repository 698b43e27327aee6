//! Losses.

use crate::array::{Checked, Dtype, Element, Noted, Opening};
use crate::gate::{self, Outcome, error};
use kilter_core::Error;
use kilter_core::loss::{Smoothing, SoftmaxCrossEntropy, Targets};
use kilter_core::real::Real;
use pyo3::prelude::*;

/// Adds the functions to the module.
pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(softmax_cross_entropy, m)?)
}

#[pyfunction]
fn softmax_cross_entropy(
    py: Python<'_>,
    logits: &Bound<'_, PyAny>,
    labels: Option<&Bound<'_, PyAny>>,
    soft: Option<&Bound<'_, PyAny>>,
    weights: Option<&Bound<'_, PyAny>>,
    h: &Bound<'_, PyAny>,
    loss: &Bound<'_, PyAny>,
    dlogits: &Bound<'_, PyAny>,
) -> Outcome<()> {
    let mut o = Opening::default();
    let logits = o.read("logits", logits)?;
    let (labels, soft, weights) =
        (o.maybe("targets", labels)?, o.maybe("targets", soft)?, o.maybe("weights", weights)?);
    let (h, loss, dlogits) = (o.read("h", h)?, o.write("loss", loss)?, o.write("dlogits", dlogits)?);
    let checked = o.check()?;
    let [on, off] = *checked.read::<f64>(&h)? else { return Err(error(Error::new("h", "on, off", h.shape().len()))) };
    let call = Call { labels, soft, weights, smoothing: Smoothing { on, off }, loss, dlogits };
    match logits.dtype {
        Dtype::F64 => call.launch::<f64>(py, &checked, &logits),
        Dtype::F32 => call.launch::<f32>(py, &checked, &logits),
        Dtype::F16 | Dtype::Bf16 | Dtype::U32 => {
            Err(error(Error::new("logits", "float64 or float32", logits.dtype.name())))
        }
    }
}

/// The arguments beside the logits.
struct Call<'a> {
    labels: Option<Noted<'a>>,
    soft: Option<Noted<'a>>,
    weights: Option<Noted<'a>>,
    smoothing: Smoothing,
    loss: Noted<'a>,
    dlogits: Noted<'a>,
}

impl Call<'_> {
    fn launch<R: Real + Element>(self, py: Python<'_>, checked: &Checked, logits: &Noted<'_>) -> Outcome<()> {
        let [_, classes] = *logits.shape() else {
            return Err(error(Error::new("logits", "shape (N, K)", format_args!("{:?}", logits.shape()))));
        };
        let targets = match (&self.labels, &self.soft) {
            (Some(labels), None) => Targets::Labels(checked.read(labels)?),
            (None, Some(soft)) => Targets::Soft(checked.read::<R>(soft)?),
            _ => return Err(error(Error::new("targets", "labels or soft targets", "neither or both"))),
        };
        let (weights, dlogits) = (checked.maybe(&self.weights)?, checked.write(&self.dlogits)?);
        let [loss] = checked.write::<f64>(&self.loss)? else {
            return Err(error(Error::new("loss", "one element", format_args!("{:?}", self.loss.shape()))));
        };
        let logits = checked.read::<R>(logits)?;
        gate::run(py, || {
            *loss = SoftmaxCrossEntropy::new(logits, classes, targets, self.smoothing, weights, dlogits)?.launch();
            Ok(())
        })
    }
}
