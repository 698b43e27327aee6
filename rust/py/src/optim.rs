//! Optimizer steps.

use crate::array::{Checked, Dtype, Element, Name, Noted, Opening};
use crate::gate::{self, Outcome, error};
use kilter_core::Error;
use kilter_core::kernel::{Kernel, launch};
use kilter_core::optim::{Prepare, Scan, Scanned, Step, Tensor, Window, named};
use kilter_core::real::Real;
use kilter_core::stored::{Source, Stored};
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

/// The arrays of one step, not yet opened.
struct Noting<'a> {
    rule: &'a str,
    names: &'a [Bound<'a, PyString>],
    params: Vec<Noted<'a>>,
    grads: Vec<Noted<'a>>,
    state: Vec<Noted<'a>>,
    masters: Option<Noted<'a>>,
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
) -> Outcome<()> {
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
    let state = state.iter().map(|slot| o.write("state", slot)).collect::<Outcome<Vec<_>>>()?;
    let (masters, h) = (o.maybe_write("masters", masters)?, o.read("h", h)?);
    let checked = o.check()?;
    let h = checked.read::<f64>(&h)?;
    let Some(first) = noted_params.first() else { return Ok(()) };
    let (dtype, name) = (first.dtype, first.name());
    let check_only = flags & CHECK_ONLY != 0;
    let noting = Noting { rule, names: &names, params: noted_params, grads: noted_grads, state, masters, check_only };
    match dtype {
        Dtype::F64 => open::<f64>(py, &checked, noting, h),
        Dtype::F32 | Dtype::F16 | Dtype::Bf16 => open::<f32>(py, &checked, noting, h),
        Dtype::U32 => Err(error(Error::new(name, "a floating-point dtype", dtype.name()))),
    }
}

fn open<T: Real + Element>(py: Python<'_>, checked: &Checked, noting: Noting<'_>, h: &[f64]) -> Outcome<()> {
    let &[scale, limit, oldest, ref scalars @ ..] = h else {
        return Err(error(Error::new("h", "at least three numbers", h.len())));
    };
    let rule = named::<T>(noting.rule, scalars).map_err(error)?;
    let mut tensors = Vec::with_capacity(noting.params.len());
    for ((name, p), g) in noting.names.iter().zip(&noting.params).zip(&noting.grads) {
        tensors.push(Tensor::new(name.to_str()?, written::<T>(checked, p)?, read::<T>(checked, g)?).map_err(error)?);
    }
    let (mut windows, mut slots) = (Vec::new(), Vec::new());
    for slot in &noting.state {
        let stored = written::<T>(checked, slot)?;
        match *slot.shape() {
            [rows, len] => windows.push(window(stored, rows, len, oldest)?),
            _ => slots.push(stored),
        }
    }
    let masters = checked.maybe_write(&noting.masters)?;
    gate::run(py, || {
        let step = Step::new(&*rule, Prepare::new(scale, limit), tensors, windows, slots, masters)?;
        if !noting.check_only {
            step.launch();
        }
        Ok(())
    })
}

/// The elements of an array in the arithmetic of `T`.
fn read<'a, T: Real + Element>(checked: &Checked, array: &Noted<'a>) -> Outcome<Source<'a, T>> {
    Ok(match (T::DTYPE, array.dtype) {
        (Dtype::F32, Dtype::F16) => Source::F16(checked.read(array)?),
        (Dtype::F32, Dtype::Bf16) => Source::Bf16(checked.read(array)?),
        _ => Source::Real(checked.read(array)?),
    })
}

/// The elements of an array that is written, in the arithmetic of `T`.
fn written<'a, T: Real + Element>(checked: &Checked, array: &Noted<'a>) -> Outcome<Stored<'a, T>> {
    Ok(match (T::DTYPE, array.dtype) {
        (Dtype::F32, Dtype::F16) => Stored::F16(checked.write(array)?),
        (Dtype::F32, Dtype::Bf16) => Stored::Bf16(checked.write(array)?),
        _ => Stored::Real(checked.write(array)?),
    })
}

/// The rows of a state array, the oldest first.
fn window<T: Real>(array: Stored<'_, T>, rows: usize, len: usize, oldest: f64) -> Outcome<Window<'_, T>> {
    if !(0.0..rows as f64).contains(&oldest) {
        return Err(error(Error::new("h", format_args!("the number of one of {rows} rows"), oldest)));
    }
    let (mut window, mut rest) = (Vec::with_capacity(rows), array);
    for _ in 0..rows {
        let (row, others) = rest.split_at(len);
        window.push(row);
        rest = others;
    }
    window.rotate_left(oldest as usize);
    Ok(window)
}

/// Writes the sum of the squares of all gradients, and 1 or 0 for whether all are finite.
#[pyfunction]
fn grad_scan(
    py: Python<'_>,
    names: Vec<Bound<'_, PyString>>,
    grads: Arrays<'_>,
    out: &Bound<'_, PyAny>,
) -> Outcome<()> {
    let mut o = Opening::default();
    let grads = names
        .iter()
        .zip(&grads)
        .map(|(name, g)| o.read(Name::of("grads", name.to_str()?), g))
        .collect::<Outcome<Vec<_>>>()?;
    let out = o.write("out", out)?;
    let checked = o.check()?;
    let [squares, finite] = checked.write::<f64>(&out)? else {
        return Err(error(Error::new("out", "two numbers", out.shape()[0])));
    };
    let (wide, narrow): (Vec<_>, Vec<_>) = grads.iter().partition(|g| g.dtype == Dtype::F64);
    let found = Scan::<f64>::merge(scan::<f64>(py, &checked, &wide)?, scan::<f32>(py, &checked, &narrow)?);
    (*squares, *finite) = (found.squares, f64::from(u8::from(found.finite)));
    Ok(())
}

fn scan<T: Real + Element>(py: Python<'_>, checked: &Checked, grads: &[&Noted<'_>]) -> Outcome<Scanned> {
    let grads = grads.iter().map(|g| read::<T>(checked, g)).collect::<Outcome<Vec<_>>>()?;
    gate::run(py, || Ok(launch(Scan::new(grads))))
}
