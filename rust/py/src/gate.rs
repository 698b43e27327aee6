//! The one place where the interpreter is released and errors become Python's.

use kilter_core::Error;
use pyo3::create_exception;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

create_exception!(kilter, KilterError, PyValueError, "An argument does not fit; the message names it.");
create_exception!(kilter, LayoutError, KilterError, "An input would have to be copied first; Python does that.");

/// An error on its way to Python: one word, as it is handed on in many places.
pub struct Fault(Box<PyErr>);

/// What may end in a [`Fault`].
pub type Outcome<T> = Result<T, Fault>;

impl From<PyErr> for Fault {
    #[cold]
    fn from(error: PyErr) -> Self {
        Self(Box::new(error))
    }
}

impl From<Fault> for PyErr {
    fn from(fault: Fault) -> Self {
        *fault.0
    }
}

/// An error of the core as Python's.
#[cold]
pub fn error(error: Error) -> Fault {
    KilterError::new_err(error.to_string()).into()
}

/// Runs `work` without the interpreter's lock.
pub fn run<R: Send>(py: Python<'_>, work: impl FnOnce() -> Result<R, Error> + Send) -> Outcome<R> {
    py.detach(work).map_err(error)
}
