//! Optimizer steps.

use crate::array::{Checked, Dtype, Element, Name, Noted, Opening};
use crate::gate::{self, error};
use kilter_core::kernel::launch;
use kilter_core::optim::rules::{Adam, AdamOptions, AmsGrad, Momentum, Nesterov, Sgd};
use kilter_core::optim::{Prepare, Rule, Scan, Step, Tensor};
use kilter_core::storage::Storage;
use kilter_core::{Error, bf16, f16};
use pyo3::prelude::*;
use pyo3::types::PyString;

type Arrays<'py> = Vec<Bound<'py, PyAny>>;

/// Adds the functions to the module.
pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add("CHECK_ONLY", CHECK_ONLY)?;
    m.add_function(wrap_pyfunction!(step, m)?)?;
    m.add_function(wrap_pyfunction!(grad_scan, m)?)
}

/// The bit of `flags` that says: check every argument, change nothing.
const CHECK_ONLY: u32 = 1;

/// The rules by name, with their scalars. `h` starts with the scale and the limit of gradients.
#[derive(Clone, Copy)]
enum Named {
    Sgd { lr: f64, weight_decay: f64 },
    Momentum { weight_decay: f64, momentum: f64, rate: f64, size: f64 },
    Nesterov { weight_decay: f64, momentum: f64, rate: f64, size: f64 },
    Adam(AdamOptions),
    AmsGrad(AdamOptions),
}

fn named(rule: &str, h: &[f64]) -> Result<Named, Error> {
    match (rule, h) {
        ("sgd", &[lr, weight_decay]) => Ok(Named::Sgd { lr, weight_decay }),
        ("momentum", &[weight_decay, momentum, rate, size]) => {
            Ok(Named::Momentum { weight_decay, momentum, rate, size })
        }
        ("nesterov", &[weight_decay, momentum, rate, size]) => {
            Ok(Named::Nesterov { weight_decay, momentum, rate, size })
        }
        ("adam" | "amsgrad", &[lr, l2, keep, beta1, beta2, eps, bias1, bias2]) => {
            let options = AdamOptions { lr, l2, keep, beta1, beta2, eps, bias1, bias2 };
            Ok(if rule == "adam" { Named::Adam(options) } else { Named::AmsGrad(options) })
        }
        _ => Err(Error::new("rule", "a known rule with its scalars", format_args!("{rule:?} with {}", h.len()))),
    }
}

/// The arrays of one step, not yet opened.
struct Noting<'a> {
    names: &'a [Bound<'a, PyString>],
    params: Vec<Noted<'a>>,
    grads: Vec<Noted<'a>>,
    state: Vec<Noted<'a>>,
    masters: Option<Noted<'a>>,
    rule: Named,
    scale: f64,
    limit: f64,
    check_only: bool,
}

#[pyfunction]
fn step(
    py: Python<'_>,
    rule: &str,
    names: Vec<Bound<'_, PyString>>,
    params: Arrays<'_>,
    grads: Arrays<'_>,
    state: Arrays<'_>,
    masters: Option<&Bound<'_, PyAny>>,
    h: &Bound<'_, PyAny>,
    flags: u32,
) -> PyResult<()> {
    if names.len() != params.len() || grads.len() != params.len() {
        return Err(error(Error::new("grads", format_args!("{} arrays", params.len()), grads.len())));
    }
    let mut o = Opening::default();
    let (mut noted_params, mut noted_grads) = (Vec::with_capacity(params.len()), Vec::with_capacity(params.len()));
    for ((name, p), g) in names.iter().zip(&params).zip(&grads) {
        let name = name.to_str()?;
        let (p, g) = (o.write(Name::of("params", name), p)?, o.read(Name::of("grads", name), g)?);
        if p.shape() != g.shape() {
            let wanted = format!("shape {:?}", p.shape());
            return Err(error(Error::new(g.name(), wanted, format_args!("{:?}", g.shape()))));
        }
        noted_params.push(p);
        noted_grads.push(g);
    }
    let state = state.iter().map(|slot| o.write("state", slot)).collect::<PyResult<Vec<_>>>()?;
    let (masters, h) = (o.maybe_write("masters", masters)?, o.read("h", h)?);
    let checked = o.check()?;
    let [scale, limit, h @ ..] = checked.read::<f64>(&h)? else {
        return Err(error(Error::new("h", "at least two numbers", h.shape()[0])));
    };
    let rule = named(rule, h).map_err(error)?;
    let Some(first) = noted_params.first() else { return Ok(()) };
    let (p, g, name) = (first.dtype, noted_grads[0].dtype, first.name());
    let (scale, limit, check_only) = (*scale, *limit, flags & CHECK_ONLY != 0);
    let noting = Noting {
        names: &names,
        params: noted_params,
        grads: noted_grads,
        state,
        masters,
        rule,
        scale,
        limit,
        check_only,
    };
    match (p, g) {
        (Dtype::F64, _) => open::<f64, f64>(py, &checked, noting),
        (Dtype::F32, _) => open::<f32, f32>(py, &checked, noting),
        (Dtype::F16, Dtype::F32) => open::<f16, f32>(py, &checked, noting),
        (Dtype::F16, _) => open::<f16, f16>(py, &checked, noting),
        (Dtype::Bf16, Dtype::F32) => open::<bf16, f32>(py, &checked, noting),
        (Dtype::Bf16, _) => open::<bf16, bf16>(py, &checked, noting),
        (Dtype::U32, _) => Err(error(Error::new(name, "a floating-point dtype", p.name()))),
    }
}

/// A step whose arrays are open, before its rule is known.
struct Opened<'a, P: Storage, G> {
    tensors: Vec<Tensor<'a, P, G>>,
    state: Vec<&'a mut [P::Real]>,
    masters: Option<&'a mut [P::Real]>,
    prepare: Prepare<P::Real>,
    check_only: bool,
}

fn open<P, G>(py: Python<'_>, checked: &Checked, noting: Noting<'_>) -> PyResult<()>
where
    P: Storage + Element,
    G: Storage<Real = P::Real> + Element,
    P::Real: Element,
{
    let mut tensors = Vec::with_capacity(noting.params.len());
    for ((name, p), g) in noting.names.iter().zip(&noting.params).zip(&noting.grads) {
        tensors.push(Tensor::new(name.to_str()?, checked.write::<P>(p)?, checked.read::<G>(g)?).map_err(error)?);
    }
    let opened = Opened {
        tensors,
        state: noting.state.iter().map(|slot| checked.write(slot)).collect::<PyResult<_>>()?,
        masters: checked.maybe_write(&noting.masters)?,
        prepare: Prepare::new(noting.scale, noting.limit),
        check_only: noting.check_only,
    };
    let rule = noting.rule;
    gate::run(py, || match rule {
        Named::Sgd { lr, weight_decay } => opened.launch(Sgd::new(lr, weight_decay)),
        Named::Momentum { weight_decay, momentum, rate, size } => {
            opened.launch(Momentum::new(weight_decay, momentum, rate, size))
        }
        Named::Nesterov { weight_decay, momentum, rate, size } => {
            opened.launch(Nesterov(Momentum::new(weight_decay, momentum, rate, size)))
        }
        Named::Adam(options) => opened.launch(Adam::new(options)),
        Named::AmsGrad(options) => opened.launch(AmsGrad(Adam::new(options))),
    })
}

impl<P: Storage, G: Storage<Real = P::Real>> Opened<'_, P, G> {
    fn launch<R: Rule<P::Real, N>, const N: usize>(self, rule: R) -> Result<(), Error> {
        let got = self.state.len();
        let slots: [_; N] = self.state.try_into().map_err(|_| Error::new("state", format_args!("{N} arrays"), got))?;
        let step = Step::new(rule, self.prepare, self.tensors, slots, self.masters)?;
        if !self.check_only {
            step.launch();
        }
        Ok(())
    }
}

/// Writes the sum of the squares of all gradients, and 1 or 0 for whether all are finite.
#[pyfunction]
fn grad_scan(
    py: Python<'_>,
    names: Vec<Bound<'_, PyString>>,
    grads: Arrays<'_>,
    out: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let mut o = Opening::default();
    let grads = names
        .iter()
        .zip(&grads)
        .map(|(name, g)| o.read(Name::of("grads", name.to_str()?), g))
        .collect::<PyResult<Vec<_>>>()?;
    let out = o.write("out", out)?;
    let checked = o.check()?;
    let [squares, finite] = checked.write::<f64>(&out)? else {
        return Err(error(Error::new("out", "two numbers", out.shape()[0])));
    };
    let found: [_; 4] = [
        scan::<f64>(py, &checked, &grads)?,
        scan::<f32>(py, &checked, &grads)?,
        scan::<f16>(py, &checked, &grads)?,
        scan::<bf16>(py, &checked, &grads)?,
    ];
    *squares = found.iter().map(|one| one.0).sum();
    *finite = f64::from(u8::from(found.iter().all(|one| one.1)));
    Ok(())
}

fn scan<G: Storage + Element>(py: Python<'_>, checked: &Checked, grads: &[Noted<'_>]) -> PyResult<(f64, bool)> {
    let grads =
        grads.iter().filter(|g| g.dtype == G::DTYPE).map(|g| checked.read::<G>(g)).collect::<PyResult<Vec<_>>>()?;
    if grads.is_empty() {
        return Ok((0.0, true));
    }
    gate::run(py, || {
        let all = launch(Scan::new(grads));
        Ok((all.squares, all.finite))
    })
}
